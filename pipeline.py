"""A checkpoint that samples: its networks take turns on the device and turn a request into a video.

What is made of an image is the checkpoint's to say: a Switch adapter takes it as reference, a SUGAR model as identity, an
image-to-video model as first frame. sample.py is the command line of this file; validation and evaluation use it too.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
import media
from checkpoint import BadInput
from diffusion import Predictor, alpha_bar_schedule, denoise, sugar_guidance, text_guidance
from distributed import compile_blocks
from encoders import ImageEncoder, TextEncoder, add_cls, check_text_encoder
from lora import Adapter, check_adapter, find_adapter, read_adapter
from model import Config, Transformer, load_transformer, read_config, use_adapter
from streaming import blocks_of, streamed
from vae import VAE, latent_size, load_vae
from vae import read_config as read_vae_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Settings:
    """How a video is sampled. What has no default here is the checkpoint's to say: see Sampler.defaults()."""

    frames: int
    height: int
    width: int
    fps: float
    scheduler: str
    steps: int = 50
    guidance: float = 6.0  # on the text, all but SUGAR
    omega_image: float = 7.5  # SUGAR
    omega_text: float = 7.5
    equation: int = 2
    t_bar: int = 1000
    drop: str = "dino"
    tile: bool = False  # decode in spatial tiles


@dataclass
class Request:
    """One video to make. `source` is the image as read, `cutout` its subject on white, `reference` what it was fitted to."""

    prompt: str
    negative_prompt: str
    seed: int
    out: Path
    image: str | None = None
    mask: str | None = None
    subject: str | None = None
    noun: str | None = None  # of the subject in the prompt, where it is not the one to cut out
    fit: str | None = None
    source: Image.Image | None = None
    cutout: Image.Image | None = None
    reference: Image.Image | None = None


@dataclass
class Conditions:
    """What the transformer is given for one video, each with a batch of one. None: the condition is absent."""

    text: Tensor  # [1, M, D]
    null: Tensor  # [1, M, D], of the negative prompt
    reference: Tensor | None = None  # [1, 16, H/8, W/8] (Switch)
    dino: Tensor | None = None  # [1, N, D] (SUGAR)
    clip: Tensor | None = None
    first: Tensor | None = None  # [1, 16, H/8, W/8] (image to video)
    in_turn: bool = False  # the branches of guidance go one after the other
    may_fall_back: bool = False  # and they do so from when memory runs out for all of them in one batch


@lru_cache(maxsize=8)
def mentions(letter: str, *sets: str, device: str) -> Tensor:
    """Which sets of conditions name the letter, [sets] bool. Made once, as the device would stop for it at every step."""
    return torch.tensor([letter in conditions for conditions in sets], device=device)


def predictor(model: Transformer, x: Tensor, t: int, given: Conditions) -> Predictor:
    """The `eps` of diffusion.py's guidance: all the sets of conditions that it asks for, predicted in one batch or, see Conditions, one
    after the other."""

    def eps(*sets: str) -> list[Tensor]:
        distinct = list(dict.fromkeys(sets))
        assert len({"R" in conditions for conditions in distinct}) == 1, "the reference is in all sets or in none"
        n, like = len(distinct), given.text
        keep_dino, keep_clip = (mentions(letter, *distinct, device=str(x.device)) for letter in "DC")
        repeat = lambda y: None if y is None else y.expand(n, *y.shape[1:])
        x_in = x.to(like)
        if given.first is not None:  # beside the first latent frame (1.5: the one that pads), zeros beside the others
            first = torch.zeros_like(x_in)
            first[:, 0] = given.first
            x_in = torch.cat([x_in, first], dim=2)
        inputs = (repeat(x_in), torch.full((n,), t, device=x.device),
                  torch.cat([given.text if "T" in conditions else given.null for conditions in distinct]))
        more = dict(reference=repeat(given.reference) if "R" in distinct[0] else None, dino=repeat(given.dino),
                    clip=repeat(given.clip), keep_dino=keep_dino, keep_clip=keep_clip)
        if not given.in_turn:
            try:
                v = model(*inputs, **more)
            except torch.OutOfMemoryError:
                if n == 1 or not given.may_fall_back:
                    raise
                given.in_turn = True
        if given.in_turn:
            one = lambda y, i: None if y is None else y[i : i + 1]
            v = torch.cat([model(*(one(y, i) for y in inputs), **{name: one(y, i) for name, y in more.items()}) for i in range(n)])
        return [v[distinct.index(conditions)][None].float() for conditions in sets]

    return eps


@torch.no_grad()
def sample_latents(model: Transformer, given: Conditions, alpha_bar: Tensor, settings: Settings, x: Tensor,
                   noise: Callable[[], Tensor] | None = None, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Clean latents [1, T, 16, H/8, W/8] from noise x of that shape. Where the model has a temporal patch of 2, the caller's
    x has a frame of padding in front, and so has the result."""

    def predict(x: Tensor, t: int) -> Tensor:
        eps = predictor(model, x, t, given)
        if model.config.sugar and given.dino is not None:
            return sugar_guidance(eps, t, settings.omega_image, settings.omega_text, settings.equation, settings.t_bar,
                                  settings.drop)
        omega = settings.omega_text if model.config.sugar else settings.guidance
        return text_guidance(eps, omega, image="R" if given.reference is not None else "")

    return denoise(predict, x, alpha_bar, settings.steps, settings.scheduler, noise, progress)


def noise_source(seed: int) -> Callable[..., Tensor]:
    """A function of a shape that draws normal noise; from the CPU's generator, so that the device does not matter."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


class Sampler:
    """A checkpoint: what is in it, whether it is whole, and its networks, brought to the device one at a time."""

    def __init__(self, model: str, adapter: str | None = None, device="cpu", dtype: str | None = None):
        self.name, self.folder, self.device = model, checkpoint.resolve(model), torch.device(device)
        weights, vae_weights = (checkpoint.need(self.folder, part) for part in ("transformer", "vae"))
        self.config, self.vae_config = read_config(weights), read_vae_config(vae_weights)
        self.scheduler = read_schedule(self.folder)
        self.alpha_bar = alpha_bar_schedule(self.scheduler)
        with torch.device("meta"):  # headers are compared, nothing is read
            transformer, vae = Transformer(self.config), VAE(self.vae_config)
        checkpoint.check(transformer, weights)
        checkpoint.check(vae, vae_weights)
        if self.config.sugar and self.config.image_to_video:
            raise BadInput(f"{model} is a SUGAR model on an image-to-video base, and SUGAR cannot stand on one: it needs a text-to-video "
                           f"base (2b, 5b or the toy).")
        self.adapter_file, self.adapter = None, Adapter(cls="none")
        if adapter is not None:
            check_switch_base(self.config, model)
            self.adapter_file = find_adapter(adapter)
            self.adapter = read_adapter(self.adapter_file)
            check_adapter(transformer, self.adapter_file)
        check_text_encoder(self.folder, self.config.text_embed_dim, self.adapter.cls)
        self.kind = ("i2v" if self.config.image_to_video else "sugar" if self.config.sugar else
                     "switch" if adapter is not None else "t2v")
        # On a CPU float32 is the fast type; on a GPU the checkpoint's own is what it was trained for.
        own = torch.float32 if self.device.type == "cpu" else checkpoint.stored_dtype(weights)
        self.dtype = DTYPES[dtype] if dtype else own
        self.image_encoders = self.load_image_encoders() if self.config.sugar else []
        self.low_memory = False  # blocks of large networks stay in host memory and are streamed
        self.compiled = False  # torch.compile on the transformer's blocks
        self.in_turn = False  # guidance branches one after the other: memory has run out before, or ranks share the sequence alone
        self.crowded = False  # the transformer leaves the device before a video is decoded, likewise
        self.tiled = False  # the VAE works in tiles although none were asked for, likewise
        self.split: Callable[[Transformer], None] | None = None  # lets several ranks share each video

    def defaults(self) -> Settings:
        """What the checkpoint was made for. The 1.5 config's size is only an upper bound; it was made for 768x1360."""
        config, schedulers = self.config, {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}
        name = self.scheduler.get("_class_name", "CogVideoXDDIMScheduler")
        if name not in schedulers:
            raise BadInput(f"{self.name} names {name} as its scheduler; known are {' and '.join(schedulers)}.")
        new = config.patch_t == 2
        return Settings(frames=config.sample_frames, height=768 if new else config.sample_height * 8,
                        width=1360 if new else config.sample_width * 8, fps=16 if new else 8, scheduler=schedulers[name],
                        **read_scales(self.scheduler))

    def branch_count(self, settings: Settings, with_image: bool) -> int:
        """How many predictions guidance asks for at each step, all conditions being given: see sugar_guidance, text_guidance."""
        if self.kind == "sugar" and with_image:
            return 3
        return 1 if (settings.omega_text if self.kind == "sugar" else settings.guidance) == 1 else 2

    @contextmanager
    def on_device(self, network: torch.nn.Module, again: bool = True, stay: bool = False):
        """The network on the device, for as long as the block lasts: others find its memory free again, unless it may `stay`.
        Where it will not be needed `again`, its weights are let go."""
        blocks = blocks_of(network) if self.low_memory else []
        if blocks:
            with streamed(network, blocks, self.device):
                yield network
            return
        try:
            yield network.to(self.device)
        finally:
            if not stay:
                self.unload(network, again)

    def unload(self, network: torch.nn.Module, again: bool = True) -> None:
        network.to("cpu" if again else "meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompt(self, request: Request) -> str:
        """The prompt as the adapter was trained to read it, that is with <cls>."""
        return request.prompt if self.adapter.cls == "none" else add_cls(request.prompt, request.noun or request.subject)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        encoder = TextEncoder(self.folder, self.adapter.cls, self.config.max_text_seq_length, self.dtype)
        with self.on_device(encoder.t5, again=False):
            return {prompt: encoder([prompt]).cpu() for prompt in dict.fromkeys(prompts)}

    def load_image_encoders(self) -> list[ImageEncoder]:
        """DINOv2 and CLIP. They are small enough to be loaded, on the CPU, just to know that they fit."""
        encoders = []
        for part, dim, tokens in (("dino", self.config.dino_dim, self.config.dino_tokens),
                                  ("clip", self.config.clip_dim, self.config.clip_tokens)):
            encoder = ImageEncoder(self.folder, part, self.dtype)
            given = (encoder.tokens, encoder.network.config.hidden_size)
            if given != (tokens, dim):
                raise BadInput(f"The {part} encoder of {self.name} gives {given[0]} tokens of width {given[1]}, but the "
                               f"transformer was made for {tokens} of width {dim}.")
            encoders.append(encoder)
        return encoders

    def encode_identity(self, requests: list[Request]) -> dict[int, list[Tensor]]:
        """DINO and CLIP tokens, each [1, N, D], of each request's identity image, by the request's id()."""
        features = {id(request): [] for request in requests}
        for encoder in self.image_encoders:
            with self.on_device(encoder.network):
                for request in requests:
                    features[id(request)].append(encoder([request.reference]).cpu())
        return features

    def encode_image(self, vae: VAE, image: Image.Image, noise: Tensor) -> Tensor:
        """A sample of the posterior of the fitted image, [1, 16, H/8, W/8], scaled for the transformer."""
        pixels = media.image_to_tensor(image)[None, :, None].to(self.device, self.dtype)
        mean, std = vae.encode(pixels)
        return vae.config.scale(mean + std * noise.to(mean), image=self.kind == "i2v")[:, :, 0]

    def with_vae(self, vae: VAE, use: Callable[[VAE], Tensor], beside: torch.nn.Module | None, alike: bool = False) -> Tensor:
        """What `use` makes with the VAE on the device. beside: a network that may have stayed there, and leaves it where both are too
        much. Where the VAE alone is too much, it goes on in tiles, and so for all that follows. alike: ranks that share a video must all
        do the same."""
        if beside is not None and not self.crowded:
            try:
                with self.on_device(vae):
                    return use(vae)
            except torch.OutOfMemoryError:
                self.crowded = True
            self.unload(beside)
        with self.on_device(vae):
            try:
                return use(vae)
            except torch.OutOfMemoryError:
                if vae.tiled or (alike and self.split is not None):
                    raise
            print("warning: the memory is too small for whole frames; the VAE goes on in tiles, as with --tile", file=sys.stderr)
            vae.tiled = self.tiled = True
            return use(vae)

    def run(self, requests: list[Request], settings: Settings, rank: int = 0) -> None:
        """Makes and writes the videos."""
        for request, video in self.videos(requests, settings, rank):
            self.write(request, settings, media.video_to_frames(video))

    @torch.no_grad()
    def videos(self, requests: list[Request], settings: Settings, rank: int = 0,
               quiet: bool = False) -> Iterator[tuple[Request, Tensor]]:
        """Makes the videos, each [3, F, H, W] in [-1, 1]; of ranks that share them, the first has them. quiet: without progress
        bars. The networks take turns on the device: text encoder, image encoders, then for each video VAE, transformer, VAE. The
        transformer stays there for the next video until memory runs out."""
        texts = self.encode_text([p for request in requests for p in (self.prompt(request), request.negative_prompt)])
        pictured = [request for request in requests if request.reference is not None]
        identity = self.encode_identity(pictured) if self.kind == "sugar" and pictured else {}
        vae = load_vae(checkpoint.need(self.folder, "vae"), "cpu", self.dtype)
        vae.tiled = settings.tile or self.tiled
        transformer = load_transformer(checkpoint.need(self.folder, "transformer"), "cpu", self.dtype).eval()
        if self.adapter_file is not None:
            use_adapter(transformer, self.adapter_file)
            transformer.merge_adapter()
        transformer.requires_grad_(False)
        if self.compiled:
            compile_blocks(list(transformer.transformer_blocks))
        if self.split is not None:
            self.split(transformer)
        T, h, w = latent_size(settings.frames, settings.height, settings.width)
        pad = -T % transformer.config.patch_t  # frames in front, so that the temporal patch divides their number; not decoded
        channels = self.config.out_channels
        to = lambda y: y.to(self.device, self.dtype)
        for number, request in enumerate(requests, 1):
            draw = noise_source(request.seed)
            x = draw(1, T + pad, channels, h, w).to(self.device)
            given = Conditions(to(texts[self.prompt(request)]), to(texts[request.negative_prompt]))
            # Ranks that share a forward pass must all do the same: none may fall back by itself.
            given.in_turn, given.may_fall_back = self.in_turn, self.split is None
            if id(request) in identity:
                given.dino, given.clip = map(to, identity[id(request)])
            if request.reference is not None and self.kind in ("switch", "i2v"):
                sample = draw(1, channels, 1, h, w)
                latents = self.with_vae(vae, lambda vae: self.encode_image(vae, request.reference, sample), transformer,
                                        alike=True)
                given = replace(given, **{"reference" if self.kind == "switch" else "first": latents})
            title = f"{number}/{len(requests)} {request.out.name}"
            progress = lambda steps: tqdm(steps, desc=title, unit="step", position=rank, dynamic_ncols=True,
                                            disable=quiet)
            last = number == len(requests)
            with self.on_device(transformer, again=not last, stay=not (last or self.crowded)):
                latents = sample_latents(transformer, given, self.alpha_bar, settings, x,
                                         lambda: draw(*x.shape).to(self.device), progress)
            self.in_turn = given.in_turn
            if self.split is not None and rank > 0:  # the first rank decodes what all have sampled
                continue
            latents = vae.config.unscale(to(latents[:, pad:].transpose(1, 2)))
            yield request, self.with_vae(vae, lambda vae: vae.decode(latents)[0], None if last else transformer)

    def write(self, request: Request, settings: Settings, frames) -> None:
        """The video, and beside it what the model saw of the image. The video comes last: it says that all is there."""
        request.out.parent.mkdir(parents=True, exist_ok=True)
        for name, image in (("cutout", request.cutout), ("reference", request.reference)):
            if image is not None:
                media.save_image(image, request.out.with_name(f"{request.out.stem}-{name}.png"))
        asked = {name: getattr(request, name) for name in
                 ("prompt", "negative_prompt", "seed", "image", "mask", "subject", "noun", "fit")}
        about = {**asked, "model": self.name, "adapter": self.adapter_file and str(self.adapter_file),
                 "dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device), **asdict(settings),
                 "tile": settings.tile or self.tiled}
        media.save_video(frames, request.out, settings.fps, about)


def read_schedule(model: Path) -> dict:
    """The checkpoint's scheduler_config.json."""
    return checkpoint.read_json(checkpoint.need(model, "scheduler") / "scheduler_config.json")


def read_scales(schedule: dict) -> dict[str, float]:
    """The scales of guidance that a scheduler_config.json asks for: those of the official checkpoints name none, the toy's does."""
    scales = {name: schedule[name] for name in ("guidance", "omega_image", "omega_text") if name in schedule}
    for name, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise BadInput(f"scheduler_config.json has {name} {scale!r}, which is no number.")
    return scales


def check_switch_base(config: Config, name: str) -> None:
    """Raises where a base lacks what Switch needs."""
    rotary = config.use_rotary_positional_embeddings and not config.use_learned_positional_embeddings
    if config.sugar or config.image_to_video or config.patch_t != 1 or not rotary:
        raise BadInput(f"Switch cannot stand on {name}: it needs a text-to-video base with rotary positions and a temporal patch of 1, "
                       f"that is CogVideoX-5b or the toy.")
