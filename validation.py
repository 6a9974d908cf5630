"""Validation: a few held-out subjects, the toy's or a user's, are sampled with the model in training, for a person to look at
and, where the data can measure, for the record."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import media
from checkpoint import BadInput
from data import Encoder, Example, Stream, ToyTest
from diffusion import alpha_bar_schedule
from distributed import Ranks
from media import Clip
from pipeline import Conditions, Request, Settings, noise_source, read_scales, sample_latents
from readers import of_the_toy
from sample import read_listing
from training import keep_lines
from vae import latent_size

STEPS = 20  # of the sampler: enough to look at


class Subjects:
    """Held-out subjects that a user gives: a file of JSON lines as for `sample.py --prompts`, with "prompt", "image", and if need be
    "mask" and "noun" in each. What is transparent or masked out becomes white."""

    def __init__(self, listing: Path, clip: Clip, sugar: bool):
        self.examples, video = [], np.broadcast_to(np.uint8(0), (clip.frames, clip.height, clip.width, 3))  # for its size alone
        for request in read_listing(listing, Request("", "", 0, Path())):
            if request.image is None or request.subject is not None:
                raise BadInput(f"{listing}: {request.prompt!r} needs an image, with the subject cut out already or a mask beside it.")
            image = media.open_image(request.image)
            mask = media.alpha_mask(image) if request.mask is None else media.open_mask(request.mask, image)
            cut = image if mask is None else media.cut_out(image, mask, request.image)
            fitted, _ = media.fit_subject(cut, mask is not None, (clip.height, clip.width), sugar)
            self.examples.append(Example(video, request.prompt, fitted, request.noun))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        return self.examples[i]


def held_out_subjects(args: argparse.Namespace, clip: Clip, toy: ToyTest, streams: dict[str, Stream], encoder: Encoder, ranks: Ranks
                      ) -> ToyTest | Subjects | None:
    """Whom the sheets show: the subjects of --validate-on, else the toy's where all data are of the toy's world."""
    if args.validate_on is not None:
        return Subjects(args.validate_on, clip, encoder.sugar)
    if all(of_the_toy(stream.dataset) for stream in streams.values()):
        return toy
    if args.validate_count and ranks.first:
        print("there will be no validation sheets: name subjects with --validate-on", file=sys.stderr)
    return None


class Validation:
    """validate(step): writes validation/step-N.png and .gif, and a line of mean scores to validation.jsonl.

    Every rank samples, as a sharded model needs them all; the first one writes. examples: None is no validation.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, schedule: dict, examples: ToyTest | Subjects | None, out: Path,
                 ranks: Ranks, dtype: torch.dtype, count: int = 4, with_reference: bool = True):
        self.model, self.encoder, self.alpha_bar, self.examples = model, encoder, alpha_bar_schedule(schedule), examples
        self.out, self.ranks, self.dtype, self.with_reference = out, ranks, dtype, with_reference
        self.count = 0 if examples is None else min(count, len(examples))
        self.settings = Settings(0, 0, 0, 8, "ddim", steps=STEPS, **read_scales(schedule))

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        if self.count == 0:
            return
        rows, scores = [], []
        for number in range(self.count):
            example = self.examples[number]
            frames = self.sample(example, number)
            rows.append((example.image, example.text, frames))
            if example.measure is not None and self.ranks.first:
                scores.append(example.measure(frames))
        if not self.ranks.first:
            return
        folder = self.out / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        media.save_sheet(rows, folder / f"step-{step:06d}")
        if scores:
            mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
            keep_lines(self.out / "validation.jsonl", step)
            with (self.out / "validation.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **mean}) + "\n")

    def sample(self, example, seed: int) -> np.ndarray:
        """uint8 frames [F, H, W, 3] of the example's subject doing what its text says."""
        to = lambda tensor: tensor[None].to(self.ranks.device, self.dtype)
        given = Conditions(to(self.encoder.text(example.text, example.noun)), to(self.encoder.text("")))
        frames, height, width, _ = example.video.shape
        if self.encoder.sugar:
            image = example.image
            given.dino, given.clip = (to(encoder([image])[0]) for encoder in self.encoder.image_encoders.values())
        elif self.with_reference:
            fitted = np.asarray(media.fit(example.image, height, width, "pad"))
            # The posterior's mean, so that only training changes the sheets from step to step.
            given.reference = to(self.encoder.vae_config.scale(self.encoder.posterior(fitted[None])[0].float())[:, 0])
        T, h, w = latent_size(frames, height, width)
        x = noise_source(seed)(1, T, self.model.config.out_channels, h, w).to(self.ranks.device)
        latents = sample_latents(self.model, given, self.alpha_bar, self.settings, x)
        vae = self.encoder.vae
        latents = vae.config.unscale(latents.transpose(1, 2)).to(self.encoder.dtype)
        try:
            video = vae.decode(latents)[0]
        except torch.OutOfMemoryError:  # beside the optimizer there may be no room for whole frames
            video = None  # the second try is outside, where the error no longer holds memory
        if video is None:
            vae.tiled = True
            video = vae.decode(latents)[0]
            vae.tiled = False  # training encodes in whole frames
        return media.video_to_frames(video)
