"""Switch: Algorithm 1 of "Subject-driven Video Generation via Disentangled Identity and Motion".

    python train_switch.py                                    the toy, from its base, on a laptop
    torchrun --nproc-per-node 8 train_switch.py --model THUDM/CogVideoX-5b ...

A LoRA on a frozen text-to-video base learns from two streams that have nothing to do with each other: pairs of pictures teach
who the subject is, plain videos keep alive how things move. Every step draws one of them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import distributed
from checkpoint import BadInput, exit_status
from data import Encoder, Stream, ToyTest, posterior_sample
from diffusion import T, alpha_bar_schedule, training_loss
from lora import CHOICES, Adapter, inject, save_adapter
from model import Config, Transformer, load_transformer, read_config
from pipeline import check_switch_base, read_schedule
from plan import print_plan
from readers import add_arguments, check_sources, clip_of, open_data, toy_sized, what_is_trained_on
from training import (DTYPES, Options, add_common, check_parallel, check_range, claim, default_of, drop_earlier, generator, options_of,
                      set_defaults, settings_of, train)
from vae import VAEConfig, latent_size
from validation import Validation, held_out_subjects


# The paper's values (rank and alpha are the authors' code's), and the toy's.
DEFAULTS = {"steps": (4000, 2000), "lr": (5e-5, 4e-3), "image_batch": (256, 32), "video_batch": (32, 8), "micro_batch": (1, 16),
            "rank": (128, 32), "alpha": (64.0, 32.0), "dropout": (0.1, 0.0)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_common(p)
    p.add_argument("--strategy", choices=["switch", "image-only", "two-stage", "video-only"], default="switch",
                   help="Table 2; two-stage is two runs in a row; video-only is Table 3's base: no reference, no <cls>, p x steps "
                   "(default: %(default)s)")
    p.add_argument("--p", type=float, default=0.2, help="probability of the video phase (default: %(default)s)")
    p.add_argument("--image-batch", type=int, help=f"samples of an image step {default_of('image_batch', DEFAULTS)}")
    p.add_argument("--video-batch", type=int, help=f"samples of a video step {default_of('video_batch', DEFAULTS)}")
    p.add_argument("--image-data", metavar="PATH", help="D_S2I: Subjects200K's parquet files or a cache (default: the toy's world)")
    p.add_argument("--video-data", metavar="PATH", help="D_vid: a manifest, a folder or a cache (default: the toy's world)")
    p.add_argument("--images", type=int, help="pairs to train on (default: all; of the toy's 4000)")
    p.add_argument("--videos", type=int, help="videos to train on, Table 7 (default: all; of the toy's 400)")
    add_arguments(p)
    p.add_argument("--reference-frame", choices=["random", "first"], default="random", help="Figure 6 (default: %(default)s)")
    p.add_argument("--reference-drop", type=float, default=0.1,
                   help="video phase: probability that the reference is dropped; 1 is Table 6's T2V (default: %(default)s)")
    p.add_argument("--reference-drop-unit", choices=["reference", "token"], default="reference",
                   help="what is dropped: the whole reference, or each of its tokens for itself (default: %(default)s)")
    p.add_argument("--no-cls", action="store_true", help="no <cls> in the prompt; Table 5")
    for name, kind in (("rank", int), ("alpha", float), ("dropout", float)):
        p.add_argument(f"--{name}", type=kind, help=f"of the LoRA {default_of(name, DEFAULTS)}")
    p.add_argument("--norm-lora", choices=CHOICES["norm_lora"], default="reference",
                   help="whose norm is adapted; 3.3 (default: %(default)s)")
    p.add_argument("--lora-tokens", choices=CHOICES["lora_tokens"], default="all",
                   help="on whom the other LoRAs act (default: %(default)s)")
    Options.add_to(p, DEFAULTS, out=Path("runs/switch"), warmup=50)
    return p.parse_args(argv)


def runs_of(args: argparse.Namespace) -> list[tuple[str, int]]:
    """The runs, one after the other, each with an optimizer and a schedule of its own: a folder below --out, and its steps.
    Two-stage has two, with as many steps of each phase as switching takes on average."""
    if args.strategy != "two-stage":
        return [("", args.steps)]
    video = round(args.p * args.steps)
    return [("image", args.steps - video), ("video", video)]


def phases_of(args: argparse.Namespace) -> list[str]:
    """Those that occur."""
    p = {"image-only": 0, "video-only": 1}.get(args.strategy, args.p)
    return ["image"] * (p < 1) + ["video"] * (p > 0)


def phase_of(step: int, args: argparse.Namespace, run: str = "") -> str:
    """Algorithm 1, "Sample u ~ U(0, 1); if u < p": "video" or "image". The same on every rank and in a resumed run."""
    if args.strategy in ("image-only", "video-only"):
        return args.strategy.removesuffix("-only")
    if run:
        return run
    u = torch.rand((), generator=generator(args.seed, "switch", step)).item()
    return "video" if u < args.p else "image"


def draw(encoded: dict[str, Tensor], g: torch.Generator, vae: VAEConfig, args: argparse.Namespace) -> tuple[Tensor, ...]:
    """A training sample: x_0 and eps [T, 16, h, w], t, text, reference [16, h, w], which of its tokens are kept in the video phase."""
    x_0 = vae.scale(posterior_sample(encoded["mean"], encoded["std"], g)).transpose(0, 1)  # X_out
    frame = torch.randint(len(encoded["ref_mean"]), (), generator=g)  # RandomFrameSelect
    reference = vae.scale(posterior_sample(encoded["ref_mean"][frame], encoded["ref_std"][frame], g))  # X_in
    tokens = reference.shape[1] * reference.shape[2] // 4  # patches of 2x2
    drop = torch.rand(tokens if args.reference_drop_unit == "token" else 1, generator=g) < args.reference_drop
    t, eps = torch.randint(T, (), generator=g), torch.randn(x_0.shape, generator=g)
    return x_0, eps, t, encoded["text"], reference, ~drop.expand(tokens)  # RandomImageDrop


def prepare(model: Transformer, adapter: Adapter) -> Transformer:
    """The base frozen, in the type that it was loaded in, and a LoRA injected in float32: only the LoRA learns."""
    model.requires_grad_(False)
    inject(model, adapter.rank, adapter.alpha, adapter.dropout, dtype=torch.float32)
    model.set_lora_tokens(adapter.norm_lora, adapter.lora_tokens)
    return model


def plan_run(config: Config, adapter: Adapter, folder: Path, args: argparse.Namespace, world: int) -> None:
    with torch.device("meta"):
        model = prepare(Transformer(config).bfloat16(), adapter)
    block = prepare(Transformer(replace(config, num_layers=1)).bfloat16(), adapter).bfloat16().transformer_blocks[0]
    clip = clip_of(args, config, args.video_data)
    frames, h, w = latent_size(clip.frames, clip.height, clip.width)
    latents = {"image": 2 * h * h, "video": (frames + (args.reference_drop < 1)) * h * w}  # with the reference; pairs are squares
    tokens = config.max_text_seq_length + max(latents[phase] for phase in phases_of(args)) // config.patch_size**2
    batches = {phase: getattr(args, f"{phase}_batch") for phase in phases_of(args)}
    sources = [getattr(args, f"{phase}_data") for phase in phases_of(args)]
    phases = [phase_of(step, args, name) for name, steps in runs_of(args) for step in range(steps)]
    samples = sum(phases.count(phase) * batch for phase, batch in batches.items())
    print_plan(model, block, folder, tokens, max(batches.values()), samples, sources, len(runs_of(args)), args, world)


def run(args: argparse.Namespace) -> None:
    ranks = distributed.start(args.device, args.sequence_parallel)
    check_range(args, ("p", "reference_drop", "dropout"), ("image_batch", "video_batch", "images", "videos", "rank"), ("alpha",))
    folder = checkpoint.resolve(args.model)
    config = read_config(checkpoint.need(folder, "transformer"))
    check_switch_base(config, args.model)
    set_defaults(args, DEFAULTS, toy_sized(config))
    if args.strategy == "video-only":
        args.reference_drop, args.no_cls, args.steps = 1.0, True, round(args.p * args.steps)
        if args.steps < 1:
            raise BadInput(f"--p {args.p} of the steps are none: video-only trains for p x --steps steps.")
    if args.lora_tokens == args.norm_lora == "reference" and args.reference_drop == 1 and "video" in phases_of(args):
        raise BadInput("--lora-tokens reference has nothing to learn from videos without a reference, that is with --reference-drop 1 or "
                       "--strategy video-only.")
    for phase in phases_of(args):
        ranks.share(getattr(args, f"{phase}_batch"))
    check_parallel(args, ranks, config.num_attention_heads)
    dtype = DTYPES[args.dtype]
    adapter = Adapter(args.rank, args.alpha, args.dropout, args.norm_lora, args.lora_tokens, "none" if args.no_cls else "token")
    if args.plan:
        return plan_run(config, adapter, folder, args, ranks.world) if ranks.first else None
    # The two data sets: D_S2I and D_vid.
    encoder = Encoder(folder, adapter.cls, config.max_text_seq_length, ranks.device,
                      reference_frames=1 if args.reference_frame == "first" else 4)
    clip, streams = clip_of(args, config, args.video_data), {}
    for phase, stream, source, count, toy_count in (("image", "pairs", args.image_data, args.images, 4000),
                                                    ("video", "videos", args.video_data, args.videos, 400)):
        if phase in phases_of(args):
            dataset, length = open_data(source, stream, count, toy_count, clip, args, encoder, args.out / stream)
            streams[phase] = Stream(dataset, length, encoder, args.seed)
    check_sources({f"--{phase}-data": stream for phase, stream in streams.items()})

    held_out = held_out_subjects(args, clip, ToyTest(args.seed), streams, encoder, ranks)
    if args.restart:
        drop_earlier(args.out, ranks, *(f"{run}{part}" for run in ("", "image/", "video/") for part in
                                        ("checkpoints", "metrics.jsonl", "validation", "validation.jsonl")),
                     "pairs/skipped.jsonl", "videos/skipped.jsonl", "pytorch_lora_weights.safetensors")
    claim(args, ranks)

    torch.manual_seed(args.seed)
    weights = checkpoint.need(folder, "transformer")
    frozen = min(checkpoint.stored_dtype(weights), dtype, key=lambda each: each.itemsize)  # more than is computed with is of no use
    model = prepare(load_transformer(weights, ranks.device, frozen), adapter)
    distributed.shard(model, list(model.transformer_blocks), ranks, dtype, args.recompute, args.compile)
    schedule = read_schedule(folder)
    alpha_bar = alpha_bar_schedule(schedule).to(ranks.device)

    def loss_of(phase: str, positions: list[int]) -> Tensor:
        """L_img or L_vid (Switch eq. 4): v-prediction of X_out given X_in and C_T."""
        samples = zip(*(draw(streams[phase][position], generator(args.seed, phase, position), encoder.vae_config, args)
                        for position in positions))
        *tensors, keep = (torch.stack(part) for part in samples)
        x_0, eps, t, text, reference = (tensor.to(ranks.device) for tensor in tensors)
        given = {"reference": reference.to(dtype)}
        if phase == "video" and args.reference_drop == 1:
            given = {}  # none of them has any, on any rank
        elif phase == "video" and not keep.all():  # attention without a mask is faster
            given["keep_reference"] = keep.to(ranks.device)
        predict = lambda x_t, t: model(x_t.to(dtype), t, text.to(dtype), **given)
        return training_loss(predict, x_0, eps, t, alpha_bar)

    for name, steps in runs_of(args):
        out, used = args.out / name, {phase: stream for phase, stream in streams.items() if name in ("", phase)}
        settings = settings_of(args, weights=checkpoint.fingerprint(weights), **what_is_trained_on(used, encoder))

        def batch_of(step: int) -> tuple[str, int]:
            phase = phase_of(step, args, name)
            return phase, getattr(args, f"{phase}_batch")

        validation = Validation(model, encoder, schedule, held_out, out, ranks, dtype, args.validate_count,
                                with_reference=args.strategy != "video-only")
        if not train(model, options_of(args, out=out, steps=steps), ranks, batch_of, loss_of, validation, settings):
            return  # stopped by a signal
    tensors = distributed.full_state_dict(model)  # the LoRA: all else is frozen
    if ranks.first:
        save_adapter(tensors, args.out, adapter)
        print(f"wrote {args.out}/pytorch_lora_weights.safetensors: python sample.py --adapter {args.out} ...")


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))


if __name__ == "__main__":
    distributed.leave(main())
