"""Image + prompt -> video.

    python sample.py --image IMAGE --prompt TEXT                       the toy
    python sample.py --model THUDM/CogVideoX-5b --adapter ADAPTER ...  Switch on the official weights
    python sample.py --model SUGAR_FOLDER ...                          a SUGAR model
    torchrun --nproc-per-node N sample.py --prompts FILE.jsonl ...     many videos, shared among GPUs

What is made of the image is the checkpoint's to say: a Switch adapter takes it as reference, a SUGAR model as identity, an
image-to-video model as first frame. Everything that can be wrong with the input is found before the first network runs.
"""

import argparse
import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
import media
from checkpoint import BadInput
from diffusion import Predictor, alpha_bar_schedule, denoise, sugar_guidance, text_guidance
from encoders import GroundedSAM, ImageEncoder, TextEncoder, add_cls
from lora import Adapter, check_adapter, find_adapter, read_adapter
from model import Transformer, load_transformer, read_config
from vae import VAE, load_vae
from vae import read_config as read_vae_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Settings:
    """How a video is sampled. None in the command line's place means: what the checkpoint was made for."""

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


# --- sampling ---------------------------------------------------------------------------------------------------------


def branches(model: Transformer, x: Tensor, t: int, given: Conditions) -> Predictor:
    """The `eps` of diffusion.py's guidance: all the sets of conditions it asks for, predicted in one batch."""

    def eps(*sets: str) -> list[Tensor]:
        distinct = list(dict.fromkeys(sets))
        n, like = len(distinct), given.text
        keep = {letter: torch.tensor([letter in conditions for conditions in distinct], device=x.device) for letter in "DC"}
        repeat = lambda y: None if y is None else y.expand(n, *y.shape[1:])
        x_in = x.to(like)
        if given.first is not None:  # beside the first latent frame (1.5: the one that pads), zeros beside the others
            first = torch.zeros_like(x_in)
            first[:, 0] = given.first
            x_in = torch.cat([x_in, first], dim=2)
        v = model(repeat(x_in), torch.full((n,), t, device=x.device),
                  torch.cat([given.text if "T" in conditions else given.null for conditions in distinct]),
                  reference=repeat(given.reference) if "R" in distinct[0] else None,
                  dino=repeat(given.dino), clip=repeat(given.clip), keep_dino=keep["D"], keep_clip=keep["C"])
        return [v[distinct.index(conditions)][None].float() for conditions in sets]

    return eps


@torch.no_grad()
def sample_latents(model: Transformer, given: Conditions, alpha_bar: Tensor, settings: Settings, x: Tensor,
                   noise: Callable[[], Tensor], progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Clean latents [1, T, 16, H/8, W/8] from noise x of that shape. Where the model has a temporal patch of 2, the caller's
    x has a frame of padding in front (see padding()), and so has the result."""

    def predict(x: Tensor, t: int) -> Tensor:
        eps = branches(model, x, t, given)
        if model.config.sugar and given.dino is not None:
            return sugar_guidance(eps, t, settings.omega_image, settings.omega_text, settings.equation, settings.t_bar,
                                  settings.drop)
        omega = settings.omega_text if model.config.sugar else settings.guidance
        return text_guidance(eps, omega, image="R" if given.reference is not None else "")

    return denoise(predict, x, alpha_bar, settings.steps, settings.scheduler, noise, progress)


def padding(model: Transformer, latent_frames: int) -> int:
    """Latent frames to put in front so that the temporal patch divides their number; dropped before decoding."""
    return -latent_frames % model.config.patch_t


def noise_source(seed: int) -> Callable[..., Tensor]:
    """A function of a shape that draws normal noise; from the CPU's generator, so that the device does not matter."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


class Sampler:
    """A checkpoint: what is in it, whether it is whole, and its networks, brought to the device one at a time."""

    def __init__(self, model: str, adapter: str | None = None, device="cpu", dtype: str | None = None):
        self.name, self.folder, self.device = model, checkpoint.resolve(model), torch.device(device)
        self.config = read_config(checkpoint.need(self.folder, "transformer"))
        self.vae_config = read_vae_config(checkpoint.need(self.folder, "vae"))
        self.scheduler = checkpoint.read_json(checkpoint.need(self.folder, "scheduler") / "scheduler_config.json")
        self.alpha_bar = alpha_bar_schedule(self.scheduler)
        with torch.device("meta"):  # headers are compared, nothing is read
            transformer, vae = Transformer(self.config), VAE(self.vae_config)
        checkpoint.check(transformer, checkpoint.need(self.folder, "transformer"))
        checkpoint.check(vae, checkpoint.need(self.folder, "vae"))
        checkpoint.index(checkpoint.need(self.folder, "text_encoder"), stem="model")
        checkpoint.need(self.folder, "tokenizer")

        self.adapter_file, self.adapter = None, Adapter(cls="none")
        if adapter is not None:
            if self.config.sugar or not switch_stands_on(self.config):
                raise BadInput(f"A Switch adapter cannot stand on {model}: it needs a text-to-video base with rotary "
                               f"positions and a temporal patch of 1, that is CogVideoX-5b or the toy.")
            self.adapter_file = find_adapter(adapter)
            self.adapter = read_adapter(self.adapter_file)
            check_adapter(transformer, self.adapter_file)
        self.kind = ("i2v" if self.config.image_to_video else "sugar" if self.config.sugar else
                     "switch" if adapter is not None else "t2v")
        # On a CPU float32 is the fast type; on a GPU the checkpoint's own is what it was trained for.
        default = torch.float32 if self.device.type == "cpu" else checkpoint.stored_dtype(checkpoint.need(self.folder, "transformer"))
        self.dtype = DTYPES[dtype] if dtype else default

    def defaults(self) -> Settings:
        """What the checkpoint was made for. The 1.5 config's size is only an upper bound; it was made for 768x1360."""
        config, schedulers = self.config, {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm"}
        name = self.scheduler.get("_class_name", "CogVideoXDDIMScheduler")
        if name not in schedulers:
            raise BadInput(f"{self.name} names {name} as its scheduler; known are {' and '.join(schedulers)}.")
        new = config.patch_t == 2
        return Settings(frames=config.sample_frames, height=768 if new else config.sample_height * 8,
                        width=1360 if new else config.sample_width * 8, fps=16 if new else 8, scheduler=schedulers[name])

    @contextmanager
    def on_device(self, network: torch.nn.Module):
        """The network on the device, for as long as the block lasts: others find its memory free again."""
        try:
            yield network.to(self.device)
        finally:
            network.to("cpu")
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        encoder = TextEncoder(self.folder, self.adapter.cls, self.config.max_text_seq_length, self.dtype)
        with self.on_device(encoder.t5):
            return {prompt: encoder([prompt]).cpu() for prompt in dict.fromkeys(prompts)}

    def encode_identity(self, requests: list[Request]) -> dict[int, tuple[Tensor, Tensor]]:
        """DINO and CLIP tokens [1, N, D] of each request's identity image, by the request's id()."""
        features = []
        for part in ("dino", "clip"):
            encoder = ImageEncoder(self.folder, part, self.device, self.dtype)
            with self.on_device(encoder.network):
                features.append([encoder([request.reference]).cpu() for request in requests])
        return {id(request): pair for request, *pair in zip(requests, *features)}

    def encode_image(self, vae: VAE, image: Image.Image, noise: Tensor) -> Tensor:
        """A sample of the posterior of the fitted image, [1, 16, H/8, W/8], scaled for the transformer."""
        pixels = media.image_to_tensor(image)[None, :, None].to(self.device, self.dtype)
        mean, std = vae.encode(pixels)
        return vae.scale(mean + std * noise.to(mean), image=self.kind == "i2v")[:, :, 0]

    def run(self, requests: list[Request], settings: Settings, tile: bool = False, rank: int = 0) -> None:
        """Makes and writes the videos."""
        for request, video in self.videos(requests, settings, tile, rank):
            self.write(request, settings, media.video_to_frames(video))

    @torch.no_grad()
    def videos(self, requests: list[Request], settings: Settings, tile: bool = False,
               rank: int = 0) -> Iterator[tuple[Request, Tensor]]:
        """Makes the videos, each [3, F, H, W] in [-1, 1]. The networks take turns on the device: text encoder, image
        encoders, then for each video VAE, transformer, VAE."""
        texts = self.encode_text([p for request in requests for p in (request.prompt, request.negative_prompt)])
        pictured = [request for request in requests if request.reference is not None]
        identity = self.encode_identity(pictured) if self.kind == "sugar" and pictured else {}
        vae = load_vae(checkpoint.need(self.folder, "vae"), "cpu", self.dtype)
        vae.tiled = tile
        transformer = load_transformer(checkpoint.need(self.folder, "transformer"), "cpu", self.dtype).eval()
        if self.adapter_file is not None:
            transformer.use_adapter(self.adapter_file)
        transformer.requires_grad_(False)
        T, h, w = (settings.frames - 1) // 4 + 1, settings.height // 8, settings.width // 8
        pad, channels = padding(transformer, T), self.config.out_channels
        to = lambda y: y.to(self.device, self.dtype)
        for number, request in enumerate(requests, 1):
            draw = noise_source(request.seed)
            x = draw(1, T + pad, channels, h, w).to(self.device)
            given = Conditions(to(texts[request.prompt]), to(texts[request.negative_prompt]))
            if id(request) in identity:
                given.dino, given.clip = map(to, identity[id(request)])
            if request.reference is not None and self.kind in ("switch", "i2v"):
                with self.on_device(vae):
                    latents = self.encode_image(vae, request.reference, draw(1, channels, 1, h, w))
                given = replace(given, **{"reference" if self.kind == "switch" else "first": latents})
            title = f"{number}/{len(requests)} {request.out.name}"
            progress = lambda steps: tqdm(steps, desc=title, unit="step", position=rank, dynamic_ncols=True)
            with self.on_device(transformer):
                latents = sample_latents(transformer, given, self.alpha_bar, settings, x,
                                         lambda: draw(*x.shape).to(self.device), progress)
            with self.on_device(vae):
                video = vae.decode(vae.unscale(to(latents[:, pad:].transpose(1, 2))))[0]
            yield request, video

    def write(self, request: Request, settings: Settings, frames) -> None:
        """The video, and beside it what the model saw of the image. The video comes last: it says that all is there."""
        request.out.parent.mkdir(parents=True, exist_ok=True)
        for name, image in (("cutout", request.cutout), ("reference", request.reference)):
            if image is not None:
                media.save_image(image, request.out.with_name(f"{request.out.stem}-{name}.png"))
        about = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": request.seed,
                 "image": request.image, "model": self.name, "adapter": str(self.adapter_file or "") or None,
                 **asdict(settings)}
        media.save_video(frames, request.out, settings.fps, about)


def switch_stands_on(config) -> bool:
    return (config.use_rotary_positional_embeddings and not config.use_learned_positional_embeddings
            and config.patch_t == 1 and not config.image_to_video)


# --- the command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(message[0].upper() + message[1:] + ("" if message.endswith(".") else "."))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description="Image + prompt -> video.")
    p.add_argument("--image", help="the subject (Switch, SUGAR) or the first frame (image to video); without: text to video")
    p.add_argument("--prompt")
    p.add_argument("--prompts", metavar="FILE.jsonl", help='many: {"prompt": ..., and any of "image", "mask", "subject", '
                   '"negative_prompt", "seed", "name"} a line; paths are relative to the file')
    p.add_argument("--negative-prompt", default="")
    p.add_argument("--model", default="checkpoints/toy", help="folder in the diffusers layout, or hub id (default: %(default)s)")
    p.add_argument("--adapter", help="Switch adapter: a .safetensors file or its folder")
    p.add_argument("--out", default="samples/", help="FILE.mp4, FILE.gif or a folder (default: %(default)s)")
    for name in ("frames", "height", "width"):
        p.add_argument(f"--{name}", type=int, help="default: the checkpoint's")
    p.add_argument("--fps", type=float, help="default: the checkpoint's")
    p.add_argument("--steps", type=int, help="default: 50")
    p.add_argument("--scheduler", choices=["ddim", "dpm"], help="default: the checkpoint's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--guidance", type=float, help="on the text; not for SUGAR (default: 6.0)")
    p.add_argument("--omega-image", type=float, help="SUGAR's guidance on the identity (default: 7.5)")
    p.add_argument("--omega-text", type=float, help="SUGAR's guidance on the text (default: 7.5)")
    p.add_argument("--equation", type=int, choices=[1, 2], help="SUGAR: which guidance (default: 2)")
    p.add_argument("--t-bar", type=int, help="SUGAR: from this timestep up, equation 3 or 4 (default: 1000, never)")
    p.add_argument("--drop", choices=["dino", "clip", "both"], help="SUGAR: what is dropped then (default: dino)")
    cut = p.add_mutually_exclusive_group()
    cut.add_argument("--subject", metavar="NOUN", help="cut this out of the image, with Grounded SAM")
    cut.add_argument("--mask", metavar="FILE", help="cut out what is white here")
    p.add_argument("--fit", choices=["crop", "pad"], help="how the image meets the video's size (default: crop, or pad "
                   "where a subject was cut out)")
    p.add_argument("--tile", action="store_true", help="decode in spatial tiles: less memory, slightly different pixels")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: the checkpoint's on a GPU, fp32 on a CPU")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    return p.parse_args(argv)


SUGAR_FLAGS = ("omega_image", "omega_text", "equation", "t_bar", "drop")


def read_settings(args: argparse.Namespace, sampler: Sampler) -> Settings:
    """The checkpoint's defaults with the command line's choices, checked."""
    sugar = sampler.kind == "sugar"
    for name in ("guidance",) if sugar else SUGAR_FLAGS:
        if getattr(args, name) is not None:
            method, instead = ("all but SUGAR", "--omega-text") if sugar else ("SUGAR models", "--guidance")
            raise BadInput(f"--{name.replace('_', '-')} is for {method}, which {args.model} is not; see {instead}.")
    settings = sampler.defaults()
    chosen = {name: getattr(args, name) for name in asdict(settings) if getattr(args, name) is not None}
    settings = replace(settings, **chosen)
    if settings.frames != 1 and (settings.frames < 1 or settings.frames % 8 != 1):
        below = max(settings.frames - 1, 0) // 8 * 8 + 1
        raise BadInput(f"--frames {settings.frames}: a video has 1 or 8k+1 frames; the nearest are {below} and {below + 8}.")
    for name in ("height", "width"):
        size = getattr(settings, name)
        if size < 16 or size % 16:
            near = max(size // 16 * 16, 16)
            raise BadInput(f"--{name} {size} is not a multiple of 16; the nearest are {near} and {near + 16}.")
    config, made_for = sampler.config, sampler.defaults()
    size = ("frames", "height", "width")
    if config.use_learned_positional_embeddings and any(getattr(settings, n) != getattr(made_for, n) for n in size):
        raise BadInput(f"{args.model} has learned positions and makes only videos of {made_for.frames} frames of "
                       f"{made_for.height}x{made_for.width}.")
    if not 1 <= settings.steps <= 1000:
        raise BadInput(f"--steps {settings.steps}: choose 1 to 1000.")
    if not 0 <= settings.t_bar <= 1000:
        raise BadInput(f"--t-bar {settings.t_bar}: choose 0 to 1000.")
    if not 0 < settings.fps <= 240:
        raise BadInput(f"--fps {settings.fps:g}: choose more than 0 and at most 240.")
    return settings


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "video"


def read_requests(args: argparse.Namespace) -> list[Request]:
    """What is asked for, one or many, with files not yet opened."""
    out, is_file = Path(args.out), Path(args.out).suffix in media.VIDEO_SUFFIXES
    if not is_file and Path(args.out).suffix and not out.is_dir() and not args.out.endswith("/"):
        raise BadInput(f"--out {args.out}: videos are written as .mp4 or .gif; a new folder ends in a slash.")
    if (args.prompt is None) == (args.prompts is None):
        raise BadInput("Give either --prompt TEXT or --prompts FILE.jsonl.")
    common = Request("", args.negative_prompt, args.seed, out, args.image, args.mask, args.subject)
    if args.prompt is not None:
        if not args.prompt.strip():
            raise BadInput("--prompt is empty: say what the video shows.")
        file = out if is_file else out / f"{slug(args.prompt)}-{args.seed}.mp4"
        return [replace(common, prompt=args.prompt, out=file)]
    if is_file:
        raise BadInput(f"--prompts makes many videos: --out must be a folder, not {args.out}.")
    listing, requests = Path(args.prompts), []
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts {listing} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            requests.append(read_line(line, number, listing, common))
    if not requests:
        raise BadInput(f"--prompts {listing} has no prompts.")
    names = [request.out for request in requests]
    twice = [name.name for name in names if names.count(name) > 1]
    if twice:
        raise BadInput(f"--prompts {listing} has the name {twice[0]} more than once.")
    return requests


def read_line(line: str, number: int, listing: Path, common: Request) -> Request:
    """A request from a line of --prompts."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BadInput(f"Line {number} of {listing} is not JSON: {error}.") from error
    kinds = {"prompt": str, "image": str, "mask": str, "subject": str, "negative_prompt": str, "seed": int, "name": str}
    if not isinstance(entry, dict) or not all(isinstance(v, kinds.get(k, ())) for k, v in entry.items()):
        raise BadInput(f"Line {number} of {listing} must be an object with {', '.join(kinds)} alone: the seed a whole number, "
                       f"the others text.")
    if not entry.get("prompt", "").strip():
        raise BadInput(f"Line {number} of {listing} has no prompt.")
    for name in ("image", "mask"):
        if name in entry:
            entry[name] = str(listing.parent / entry[name])
    name = Path(entry.pop("name", f"{number:04d}-{slug(entry['prompt'])}")).name
    return replace(common, **entry, out=common.out / f"{name.removesuffix('.mp4')}.mp4")


def prepare_images(requests: list[Request], sampler: Sampler, settings: Settings, how: str | None) -> None:
    """Opens every image, cuts its subject out and fits it: fills source, cutout and reference of each request."""
    segment = None
    for request in requests:
        if request.image is None:
            if request.mask or request.subject:
                raise BadInput("--mask and --subject cut a subject out of an image: give --image as well.")
            if sampler.kind == "i2v":
                raise BadInput(f"{sampler.name} makes videos from a first frame: give --image.")
            continue
        if sampler.kind == "t2v":
            raise BadInput(f"{sampler.name} is a plain text-to-video model and takes no image: add a Switch --adapter, or "
                           f"give a SUGAR or an image-to-video model.")
        if sampler.kind == "i2v" and (request.mask or request.subject):
            raise BadInput("An image-to-video model takes the whole image as first frame: --mask and --subject are for "
                           "Switch and SUGAR.")
        request.source = media.open_image(request.image)
        if request.mask:
            request.mask = media.open_mask(request.mask, request.source)
    for request in requests:
        if request.image is None:
            continue
        mask = request.mask or media.alpha_mask(request.source)
        if request.subject:
            segment = segment or GroundedSAM(sampler.folder, sampler.device)
            mask = segment(request.source, request.subject)
            if mask is None:
                raise BadInput(f"There is no {request.subject} to be found in {request.image}: try another noun, or --mask.")
        if mask is not None and sampler.kind != "i2v":
            request.cutout = media.cut_out(request.source, mask)
        elif sampler.kind == "sugar":
            how = how or "pad"
            print(f"warning: {request.image} has no transparency and neither --mask nor --subject is given: its background "
                  f"counts as part of the subject", file=sys.stderr)
        picture, fit = request.cutout or request.source, how or ("pad" if request.cutout else "crop")
        if sampler.kind == "sugar":  # the encoders resize this square to their own size
            request.reference = media.fit(picture, max(picture.size), max(picture.size), fit)
        else:
            request.reference = media.fit(picture, settings.height, settings.width, fit)


def main(argv: list[str] | None = None) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        args = parse(argv)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and world > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
        requests = read_requests(args)
        for request in requests:
            media.check_writable(request.out)
        if args.prompts:
            there = [request for request in requests if request.out.exists()]
            if there and rank == 0:
                print(f"{len(there)} of {len(requests)} videos are already there")
            requests = [request for request in requests if request not in there][rank::world]
        else:
            requests = requests[rank:1]
        if not requests:
            return 0
        sampler = Sampler(args.model, args.adapter, device, args.dtype)
        settings = read_settings(args, sampler)
        prepare_images(requests, sampler, settings, args.fit)
        if sampler.adapter.cls != "none":
            for request in requests:
                request.prompt = add_cls(request.prompt, request.subject)
        sampler.run(requests, settings, args.tile, rank)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for request in requests:
        print(request.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
