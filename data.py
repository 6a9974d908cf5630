"""What a training example is: one form for every dataset, and what the frozen networks make of it.

    python data.py cache ...      encodes a dataset once, for training without VAE and encoders (see cache.py)

    stream      example                                                   trains
    pairs       two pictures of one subject, caption of the second        Switch, image phase (3.3)
    videos      a video and its caption                                   Switch, video phase (3.4)
    subjects    a video, its caption, the subject cut out of a frame      SUGAR, real videos (3.2)
    triplets    the same, but the subject looks different in the image    SUGAR, synthetic videos (3.1)
"""

import fcntl
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import checkpoint
import measure
import media
import world
from checkpoint import BadInput
from encoders import ImageEncoder, TextEncoder, add_cls
from vae import VAE, load_vae, read_config


@dataclass
class Example:
    """The common form. A picture is a video of one frame."""

    video: np.ndarray  # uint8 [F, H, W, 3], what is to be generated
    text: str
    image: Image.Image | None = None  # of the subject: the other view (pairs), the identity image (subjects, triplets)
    noun: str | None = None  # of the subject in the text, where the data names it
    measure: Callable[[np.ndarray], dict[str, float]] | None = None  # exact scores of a generated video, where there are any


class Broken(Exception):
    """One example of a dataset cannot be had; the message says why. It is passed over, see Tolerant."""


class Unfit(Broken):
    """The files are whole, but the example does not suit the settings: too short, too small, no subject in it."""


class Toy:
    """The toy's world as an endless dataset: example i is drawn from seed and i. Its subjects are those of the split."""

    def __init__(self, stream: str, seed: int = 0, split: str = "train"):
        self.stream, self.seed, self.split = stream, seed, split

    def __getitem__(self, i: int) -> Example:
        kinds = ("pairs", "videos", "subjects", "triplets", "styled")
        rng = np.random.default_rng((self.seed, kinds.index(self.stream), self.split == "test", i))
        if self.stream == "pairs":
            drawn = world.sample_pair(rng, self.split)
            return Example(drawn["target"][None], drawn["text"], Image.fromarray(drawn["reference"]), drawn["noun"])
        if self.stream == "styled":  # what the base is trained on: it must know every look
            drawn = world.sample_video(rng, self.split, tuple(world.LOOKS))
            return Example(drawn["video"], drawn["text"])
        if self.stream == "triplets":
            drawn = world.sample_triplet(rng, self.split)
            image = media.on_white(Image.fromarray(drawn["image"]))
        else:
            drawn, image = world.sample_masked(rng, self.split), None
            if self.stream == "subjects":  # "object segmentation on randomly sampled frames"
                frame = rng.integers(len(drawn["video"]))
                image = Image.fromarray(world.alone(drawn["video"][frame], drawn["masks"][frame]))
        return Example(drawn["video"], drawn["text"], image, world.NOUN)


class ToyTest:
    """Held-out subjects for validation: a portrait on white and a text that asks for a scene, with the exact scores of the world.
    looks: what the texts may ask the subject to look like."""

    def __init__(self, seed: int = 0, looks: tuple[str, ...] = ("plain",)):
        self.seed, self.looks = seed, looks

    def __len__(self) -> int:
        return sys.maxsize

    def scene(self, i: int) -> tuple[world.Scene, np.random.Generator]:
        """What the text asks for, and the randomness of its words."""
        rng = np.random.default_rng((self.seed, 99, i))
        return world.sample_scene(rng, "test", look=self.looks[rng.integers(len(self.looks))]), rng

    def __getitem__(self, i: int) -> Example:
        scene, rng = self.scene(i)
        others = world.candidates(scene.subject, rng)
        return Example(world.render(scene), world.caption(scene, rng), media.on_white(Image.fromarray(world.portrait(scene.subject))),
                       world.NOUN, lambda video: measure.score(video, scene, others))


def shuffled(position: int, length: int, seed: int) -> int:
    """The index of the example at `position` of a stream that goes through `length` examples again and again, each time in
    another order."""
    epoch, place = divmod(position, length)
    return int(order(length, seed, epoch)[place])


@lru_cache(maxsize=4)
def order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


class Encoder:
    """The frozen networks: examples -> the tensors that a transformer trains on, on the CPU in float16.

    mean, std      [16, T, H/8, W/8]      posterior of the video's latents: the sample is drawn at training time
    text           [M, D]                 T5 features
    ref_mean, ref_std  [K, 16, H/8, W/8]  Switch: posterior of the other view, or of K frames of the video
    dino, clip     [N, D]                 SUGAR: tokens of the identity image

    A network is loaded when it is first needed: training from a cache needs none.
    """

    def __init__(self, model: Path, cls: str, text_length: int, device, sugar: bool = False, reference_frames: int = 4):
        self.model, self.device = model, torch.device(device)
        weights = checkpoint.part(model, "transformer") or checkpoint.need(model, "vae")  # the toy's base is yet to be trained
        self.dtype = torch.float32 if self.device.type == "cpu" else checkpoint.stored_dtype(weights)  # as for sampling
        self.cls, self.text_length, self.sugar, self.reference_frames = cls, text_length, sugar, reference_frames
        self.vae_config = read_config(checkpoint.need(model, "vae"))

    @cached_property
    def vae(self) -> VAE:
        return load_vae(checkpoint.need(self.model, "vae"), self.device, self.dtype)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        encoder = TextEncoder(self.model, self.cls, self.text_length, self.dtype)
        encoder.t5.to(self.device)
        return encoder

    @cached_property
    def image_encoders(self) -> dict[str, ImageEncoder]:
        encoders = {part: ImageEncoder(self.model, part, self.dtype) for part in ("dino", "clip")} if self.sugar else {}
        for encoder in encoders.values():
            encoder.network.to(self.device)
        return encoders

    def text(self, text: str, noun: str | None = None) -> Tensor:
        """[M, D]; with <cls> where the model is trained with it. The empty text is null and stays empty."""
        text = add_cls(text, noun) if self.cls != "none" and text else text
        return self.text_encoder([text])[0].cpu().half()

    @cached_property
    def null(self) -> Tensor:
        """[M, D], the features of the empty text. A cache has them stored."""
        return self.text("")

    @torch.no_grad()
    def posterior(self, video: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of uint8 frames [F, H, W, 3]."""
        pixels = torch.tensor(video).permute(3, 0, 1, 2)[None].to(self.device).float() / 127.5 - 1
        mean, std = self.vae.encode(pixels.to(self.dtype))
        return mean[0].cpu().half(), std[0].cpu().half()

    def encode(self, example: Example, i: int, seed: int) -> dict[str, Tensor]:
        """Example i as tensors; which frames are references follows from seed and i."""
        rng = np.random.default_rng((seed, 7, i))
        mean, std = self.posterior(example.video)
        encoded = {"mean": mean, "std": std, "text": self.text(example.text, example.noun)}
        if self.sugar:
            for part, encoder in self.image_encoders.items():
                encoded[part] = encoder([example.image])[0].cpu().half()
            return encoded
        if example.image is not None:
            frames = [np.asarray(example.image)]
        elif self.reference_frames == 1:  # without random-frame selection: always the first
            frames = [example.video[0]]
        else:
            frames = example.video[rng.choice(len(example.video), min(self.reference_frames, len(example.video)), False)]
        references = [self.posterior(frame[None]) for frame in frames]
        encoded["ref_mean"], encoded["ref_std"] = (torch.stack([r[i][:, 0] for r in references]) for i in (0, 1))
        return encoded


def posterior_sample(mean: Tensor, std: Tensor, g: torch.Generator) -> Tensor:
    """A sample of the latents' posterior in float32, the noise from g."""
    mean = mean.float()
    return mean + std.float() * torch.randn(mean.shape, generator=g)


class OneFrame:
    """The dataset with a frame in place of each video: "we directly sample random frames" (SUGAR 4.3, TSF-Image). Each video is there
    EACH times, with another frame of it."""

    EACH = 4

    def __init__(self, dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, i: int) -> Example:
        number, turn = divmod(i, self.EACH)
        example = self.dataset[number]
        frames = np.random.default_rng((self.seed, 5, number)).permutation(len(example.video))
        frame = frames[turn % len(frames)]
        return replace(example, video=example.video[frame : frame + 1])


class Tolerant:
    """A dataset's first `length` examples, in which one that cannot be used is replaced by the next that can, and not tried again.
    Each is listed once, with its reason, in `log`, to which all ranks write. When the broken ones are more than `broken_share` of those that
    were met (and ten at least, unless the broken_share is 0), the run stops; those that are Unfit do not count."""

    def __init__(self, dataset, length: int, log: Path, broken_share: float = 0.1):
        self.dataset, self.length, self.log, self.broken_share = dataset, length, log, broken_share
        self.met: set[int] = set()
        self.skipped: set[int] = set()
        self.broken = 0  # of the skipped ones
        self.listed: set[int] = set()  # by any rank, in as much of the log as was read
        self.read = 0  # bytes of it

    def __getitem__(self, i: int) -> Example:
        for j in ((i + step) % self.length for step in range(self.length)):
            if j in self.skipped:
                continue
            self.met.add(j)
            try:
                return self.dataset[j]
            except Broken as error:
                self.skip(j, error)
        raise BadInput(f"None of the {self.length} examples can be used; {self.log} says why.")

    def skip(self, i: int, error: Broken) -> None:
        self.skipped.add(i)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two ranks may meet one at the same time
            file.seek(self.read)
            # A run that was killed while it wrote may have left half a line, perhaps with another behind it.
            self.listed |= {int(found[1]) for line in file if (found := re.search(rb'\{"example": (\d+), "reason": ".*"\}$', line))}
            self.read = file.tell()
            if i not in self.listed:
                file.write(json.dumps({"example": i, "reason": str(error)}).encode() + b"\n")
        if len(self.skipped) == len(self.met) == 100:
            print(f"warning: none of the first 100 examples can be used; {self.log} says why", file=sys.stderr)
        self.broken += not isinstance(error, Unfit)
        if self.broken > self.broken_share * len(self.met) and (self.broken >= 10 or self.broken_share == 0):
            raise BadInput(f"{self.broken} of the first {len(self.met)} examples are broken, more than {self.broken_share:.0%} (--broken); "
                           f"{self.log} says why. The last one: {error}")


class Stream:
    """A dataset's first `length` examples in shuffled order. They are encoded when first met and kept in memory while there
    is ROOM; those of a cache are encoded already."""

    ROOM = 2 * 2**30  # bytes

    def __init__(self, dataset, length: int, encoder: Encoder, seed: int):
        self.dataset, self.length, self.encoder, self.seed = dataset, length, encoder, seed
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.size = 0  # of what is kept

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        i = shuffled(position, self.length, self.seed)
        if i in self.kept:
            return self.kept[i]
        example = self.dataset[i]
        if not isinstance(example, Example):
            return example
        encoded = self.encoder.encode(example, i, self.seed)
        if self.size < self.ROOM:
            self.kept[i] = encoded
            self.size += sum(tensor.nbytes for tensor in encoded.values())
        return encoded


if __name__ == "__main__":
    import cache  # which imports this file, under its own name
    import distributed

    distributed.leave(cache.main())
