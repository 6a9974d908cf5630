"""Image + prompt -> video.

    python sample.py --image examples/creature.png --prompt "a creature is jumping" --adapter checkpoints/toy/switch    the toy
    python sample.py --model THUDM/CogVideoX-5b --adapter ADAPTER ...  Switch on the official weights
    python sample.py --model SUGAR_FOLDER ...                          a SUGAR model
    torchrun --nproc-per-node N sample.py --prompts FILE.jsonl ...     many videos, shared among GPUs
    torchrun --nproc-per-node N sample.py --prompt TEXT ...            one video, its branches and sequence split among GPUs

Everything that can be wrong with the input is found here, before the first network of the checkpoint runs.
"""

import argparse
import json
import math
import re
import sys
import zlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import checkpoint
import distributed
import media
from checkpoint import BadInput, check_seed, exit_status
from diffusion import T
from encoders import GroundedSAM
from pipeline import DTYPES, Request, Sampler, Settings


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(message[0].upper() + message[1:] + ("" if message.endswith(".") else "."))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description="Image + prompt -> video.")
    p.add_argument("--image", help="the subject (Switch, SUGAR) or the first frame (image to video); without: text to video")
    p.add_argument("--prompt", help="what the video shows")
    p.add_argument("--prompts", metavar="FILE.jsonl", help='many: {"prompt": ..., and any of "image", "mask", "subject", "noun", '
                   '"negative_prompt", "seed", "name"} a line; paths are relative to the file')
    p.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: the empty prompt)")
    p.add_argument("--noun", help="the subject's noun in the prompt, before which <cls> stands (default: --subject, else in front)")
    p.add_argument("--model", default="checkpoints/toy", help="folder in the diffusers layout, or hub id (default: %(default)s)")
    p.add_argument("--adapter", help="Switch adapter: a .safetensors file or its folder")
    p.add_argument("--out", default="samples/", help="FILE.mp4, FILE.gif or a folder (default: %(default)s)")
    for name in ("frames", "height", "width"):
        p.add_argument(f"--{name}", type=int, help="default: the checkpoint's")
    p.add_argument("--fps", type=float, help="default: the checkpoint's")
    p.add_argument("--steps", type=int, help="default: 50")
    p.add_argument("--scheduler", choices=["ddim", "dpm"], help="default: the checkpoint's")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    p.add_argument("--guidance", type=float, help="on the text; not for SUGAR (default: the checkpoint's, else 6.0)")
    p.add_argument("--omega-image", type=float, help="SUGAR's guidance on the identity (default: the checkpoint's, else 7.5)")
    p.add_argument("--omega-text", type=float, help="SUGAR's guidance on the text (default: likewise)")
    p.add_argument("--equation", type=int, choices=[1, 2], help="SUGAR: which guidance (default: 2)")
    p.add_argument("--t-bar", type=int, help="SUGAR: from this timestep up, equation 3 or 4 (default: 1000, never)")
    p.add_argument("--drop", choices=["dino", "clip", "both"], help="SUGAR: what is dropped then (default: dino)")
    cut = p.add_mutually_exclusive_group()
    cut.add_argument("--subject", metavar="NOUN", help="cut this out of the image, with Grounded SAM")
    cut.add_argument("--mask", metavar="FILE", help="cut out what is white here")
    p.add_argument("--fit", choices=["crop", "pad"], help="how the image meets the video's size, or SUGAR's square (default: pad "
                   "where a subject was cut out and for SUGAR, else crop)")
    p.add_argument("--tile", action="store_true", help="decode in spatial tiles: less memory, slightly different pixels")
    p.add_argument("--low-memory", action="store_true",
                   help="stream the blocks of transformer and T5 from host memory: the 5b on a small GPU; implies --tile")
    p.add_argument("--compile", action="store_true", help="torch.compile on the blocks: slow to start, then faster")
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
    made_for = sampler.defaults()
    settings = replace(made_for, **{name: getattr(args, name) for name in asdict(made_for) if getattr(args, name, None) is not None})
    media.check_clip(settings.frames, settings.height, settings.width)
    size = ("frames", "height", "width")
    if sampler.config.use_learned_positional_embeddings and any(getattr(settings, n) != getattr(made_for, n) for n in size):
        raise BadInput(f"{args.model} has learned positions and makes only videos of {made_for.frames} frames of "
                       f"{made_for.height}x{made_for.width}.")
    for name in ("guidance", "omega_image", "omega_text"):
        if not math.isfinite(getattr(settings, name)):
            raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)}: choose a number.")
    if not 1 <= settings.steps <= T:
        raise BadInput(f"--steps {settings.steps}: choose 1 to {T}.")
    if not 0 <= settings.t_bar <= T:
        raise BadInput(f"--t-bar {settings.t_bar}: choose 0 to {T}.")
    if not 0 < settings.fps <= 240:
        raise BadInput(f"--fps {settings.fps:g}: choose more than 0 and at most 240.")
    return settings


def check_effects(args: argparse.Namespace, sampler: Sampler, settings: Settings, requests: list[Request]) -> None:
    """Raises where something is asked for that would change nothing."""
    sugar, pictured = sampler.kind == "sugar", any(request.image is not None for request in requests)
    for name in ("fit", *(SUGAR_FLAGS if sugar else ())):
        if getattr(args, name) is not None and not pictured and name != "omega_text":
            raise BadInput(f"--{name.replace('_', '-')} has no effect without an image: give --image as well.")
    if args.drop is not None and settings.t_bar == T:
        raise BadInput(f"--drop {args.drop} has no effect at --t-bar {T}: choose a smaller --t-bar, from which timestep up it is dropped.")
    if args.noun is not None and sampler.adapter.cls == "none":
        raise BadInput(f"--noun {args.noun} has no effect without an adapter that was trained with <cls>; --subject cuts a noun out.")
    for request in requests:
        scale, flag = (settings.omega_text, "--omega-text") if sugar else (settings.guidance, "--guidance")
        if request.negative_prompt and scale == 1 and not (sugar and request.image is not None):
            raise BadInput(f"--negative-prompt {request.negative_prompt!r} has no effect at {flag} 1: choose another scale.")


def slug(text: str) -> str:
    """A file's name from a prompt; with a checksum where the prompt is longer, or has letters of other alphabets."""
    whole = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    lost = len(whole) > 60 or not text.isascii()
    return "-".join(filter(None, [whole[:60].strip("-") or "video", f"{zlib.crc32(text.encode()):08x}" * lost]))


def read_requests(args: argparse.Namespace) -> list[Request]:
    """What is asked for, one or many, with files not yet opened."""
    out, is_file = Path(args.out), Path(args.out).suffix in media.VIDEO_SUFFIXES
    if not is_file and Path(args.out).suffix and not out.is_dir() and not args.out.endswith("/"):
        raise BadInput(f"--out {args.out}: videos are written as .mp4 or .gif; a new folder ends in a slash.")
    if (args.prompt is None) == (args.prompts is None):
        raise BadInput("Give either --prompt TEXT or --prompts FILE.jsonl.")
    check_seed(args.seed)
    common = Request("", args.negative_prompt, args.seed, out, args.image, args.mask, args.subject, args.noun)
    if args.prompt is not None:
        if not args.prompt.strip():
            raise BadInput("--prompt is empty: say what the video shows.")
        file = out if is_file else out / f"{slug(args.prompt)}-{args.seed}.mp4"
        return [replace(common, prompt=args.prompt, out=file)]
    if is_file:
        raise BadInput(f"--prompts makes many videos: --out must be a folder, not {args.out}.")
    return read_listing(Path(args.prompts), common)


def read_listing(listing: Path, common: Request) -> list[Request]:
    """The requests in a file of JSON lines; what a line does not say is as in `common`."""
    requests = []
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")  # not at the other ends of line that Unicode has
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{listing} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            requests.append(read_line(line, number, listing, common))
    if not requests:
        raise BadInput(f"{listing} has no prompts.")
    names = [request.out for request in requests]
    twice = [name.name for name in names if names.count(name) > 1]
    if twice:
        raise BadInput(f"{listing} has the name {twice[0]} more than once.")
    return requests


def read_line(line: str, number: int, listing: Path, common: Request) -> Request:
    """A request from a line of --prompts."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BadInput(f"Line {number} of {listing} is not JSON: {error}.") from error
    kinds = {"prompt": str, "image": str, "mask": str, "subject": str, "noun": str, "negative_prompt": str, "seed": int, "name": str}
    if not isinstance(entry, dict) or not all(isinstance(v, kinds.get(k, ())) for k, v in entry.items()):
        raise BadInput(f"Line {number} of {listing} must be an object with {', '.join(kinds)} alone: the seed a whole number, "
                       f"the others text.")
    if not entry.get("prompt", "").strip():
        raise BadInput(f"Line {number} of {listing} has no prompt.")
    if "mask" in entry and "subject" in entry:
        raise BadInput(f"Line {number} of {listing} has a mask and a subject: one of them cuts out.")
    check_seed(entry.get("seed", 0), f"Line {number} of {listing}: seed")
    for name, other in (("mask", "subject"), ("subject", "mask")):
        if name in entry:
            common = replace(common, **{other: None})
    for name in ("image", "mask"):
        if name in entry:
            entry[name] = str(listing.parent / entry[name])
    name = entry.pop("name", f"{number:04d}-{slug(entry['prompt'])}").removesuffix(".mp4")
    if name != Path(name).name or not name.strip(". "):
        raise BadInput(f"Line {number} of {listing} has the name {name!r}, which is no file name.")
    return replace(common, **entry, out=common.out / f"{name}.mp4")


def prepare_images(requests: list[Request], sampler: Sampler, settings: Settings, how: str | None) -> None:
    """Opens every image, cuts its subject out and fits it: fills source, cutout, reference and fit of each request."""
    masks, segment, found, warnings = {}, None, {}, []
    for request in requests:
        if request.image is not None:
            request.source = media.open_image(request.image)
            masks[id(request)] = media.alpha_mask(request.source)
        if request.mask is not None:
            masks[id(request)] = media.open_mask(request.mask, request.source)
    for request in (request for request in requests if request.image is not None):
        mask = masks[id(request)]
        if request.subject is not None:
            segment = segment or GroundedSAM(sampler.folder, sampler.device)
            if (request.image, request.subject) not in found:  # one photograph may have many prompts
                found[request.image, request.subject] = segment(request.source, request.subject)
            mask = found[request.image, request.subject]
            if mask is None:
                raise BadInput(f"There is no {request.subject} to be found in {request.image}: try another noun, or --mask.")
        if mask is not None and sampler.kind != "i2v":
            request.cutout = media.cut_out(request.source, mask, request.image)
        elif sampler.kind == "sugar" and not media.stands_on_white(request.source):
            warnings.append(f"warning: {request.image} has no transparency and neither --mask nor --subject is given: its "
                            f"background counts as part of the subject")
        request.reference, request.fit = media.fit_subject(request.cutout or request.source, request.cutout is not None,
                                                           (settings.height, settings.width), sampler.kind == "sugar", how)
    for warning in warnings:
        print(warning, file=sys.stderr)


def check_image_use(request: Request, sampler: Sampler) -> None:
    """Whether the checkpoint can use the image that is given, or do without one."""
    cut = request.mask is not None or request.subject is not None
    if request.image is None and cut:
        raise BadInput("--mask and --subject cut a subject out of an image: give --image as well.")
    if request.image is None and sampler.kind == "i2v":
        raise BadInput(f"{sampler.name} makes videos from a first frame: give --image.")
    if request.image is not None and sampler.kind == "t2v":
        raise BadInput(f"{sampler.name} is a plain text-to-video model and takes no image: add a Switch --adapter, or give a "
                       f"SUGAR or an image-to-video model.")
    if cut and sampler.kind == "i2v":
        raise BadInput("An image-to-video model takes the whole image as first frame: --mask and --subject are for Switch and "
                       "SUGAR.")


def open_sampler(args: argparse.Namespace, device: str, requests: list[Request]) -> tuple[Sampler, Settings]:
    """The checkpoint, of which nothing large is read yet, and how it samples. Raises what it cannot do of what is asked for."""
    sampler = Sampler(args.model, args.adapter, device, args.dtype)
    sampler.low_memory, sampler.compiled, args.tile = args.low_memory, args.compile, args.tile or args.low_memory
    settings = read_settings(args, sampler)
    check_effects(args, sampler, settings, requests)
    for request in requests:
        check_image_use(request, sampler)
    return sampler, settings


def prepare(args: argparse.Namespace) -> tuple[Sampler | None, Settings | None, list[Request], int]:
    """Everything that can be wrong, found. Returns what this process, one of several under torchrun, has to do."""
    (rank, world), device = distributed.place(), str(distributed.find_device(args.device))
    requests = everything = read_requests(args)
    for request in requests:
        media.check_writable(request.out)
    if args.prompts is not None:
        # Shared out before looking what is there: ranks that look at different times must not see different lists.
        requests = requests[rank::world]
        there = [request.out.name for request in requests if request.out.exists()]
        requests = [request for request in requests if request.out.name not in there]
        if there:
            print(f"{len(there)} videos are already there ({checkpoint.some(there)})")
    if not requests:
        return None, None, [], rank
    if args.compile:
        distributed.check_compiler(device)
    sampler, settings = open_sampler(args, device, everything)  # judged by the whole list, so that all ranks agree
    together, branches = world > 1 and args.prompts is None, sampler.branch_count(settings, with_image=requests[0].image is not None)
    if together:  # before heavy work
        groups, within = distributed.video_groups(world, branches, sampler.config.num_attention_heads)
        if rank == 0:
            print(f"{world} ranks: {groups} for the {branches} branches of guidance, each with {within} for the sequence")
    prepare_images(requests, sampler, settings, args.fit)
    if together:
        ranks = distributed.start(device)
        sampler.split = partial(distributed.split_video, ranks=ranks, branches=branches)
        sampler.in_turn = groups < branches  # a batch would take more memory, and a split sequence is enough for a device
    return sampler, settings, requests, rank


def run(args: argparse.Namespace) -> None:
    sampler, settings, requests, rank = prepare(args)
    if not requests:
        return
    sampler.run(requests, settings, rank)
    if sampler.split is None or rank == 0:
        for request in requests:
            print(request.out)


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))


if __name__ == "__main__":
    distributed.leave(main())
