"""SUGAR: section 3.2 of "Subject-Driven Video Customization in a Zero-Shot Manner".

    python train_sugar.py                                     the toy, from its base, on a laptop
    torchrun --nproc-per-node 8 train_sugar.py --model THUDM/CogVideoX-5b ...

The whole transformer learns to see a subject through DINO and CLIP tokens, from real videos, whose subject looks as in its
image, and from synthetic ones, whose subject looks different but hardly moves.
"""

import argparse
import gc
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import distributed
import world
from attention import DESIGNS
from cache import Cache
from checkpoint import BadInput, exit_status
from data import Encoder, OneFrame, Stream, ToyTest, posterior_sample
from diffusion import T, alpha_bar_schedule, training_loss
from encoders import image_tokens
from model import Block, Config, Transformer, load_transformer, read_config, save_tensors, save_transformer
from pipeline import read_schedule
from plan import print_plan
from readers import add_arguments, check_sources, clip_of, open_data, toy_sized, what_is_trained_on
from training import (DTYPES, Options, add_common, check_parallel, check_range, check_settings, claim, default_of, drop_earlier, generator,
                      options_of, set_defaults, settings_of, train)
from vae import VAEConfig, latent_size
from validation import Subjects, Validation, held_out_subjects


DEFAULTS = {"steps": (10000, 1800), "lr": (1e-5, 2e-3), "batch": (64, 16), "micro_batch": (1, 16), "validate_every": (500, 600),
            "validate_count": (8, 32)}  # our guess, and the toy's


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_common(p)
    p.add_argument("--strategy", choices=["mix", "ts", "tsf"], default="tsf", help="Figure 6 (default: %(default)s)")
    p.add_argument("--p", type=float, default=0.5,
                   help="probability of the synthetic videos: with mix throughout, with ts and tsf in the second stage (default: "
                   "%(default)s)")
    p.add_argument("--design", choices=list(DESIGNS), help="attention, Figure 4 (default: that of the model if it is SUGAR's, else b)")
    p.add_argument("--synthetic", choices=["video", "image"], default="video", help="image is Figure 7's TSF-Image")
    p.add_argument("--batch", type=int, help=f"samples of a step {default_of('batch', DEFAULTS)}")
    p.add_argument("--real-data", metavar="PATH", help="real videos: a manifest, a folder or a cache (default: the toy's world)")
    p.add_argument("--data", metavar="PATH", help="synthetic ones: synthesize.py's triplets or a cache (default: the toy's world)")
    p.add_argument("--real", type=int, help="real videos to train on (default: all; of the toy's 1,600)")
    p.add_argument("--triplets", type=int, help="synthetic triplets to train on (default: all; of the toy's 1,600)")
    add_arguments(p)
    p.add_argument("--second-steps", type=int, help="steps of the second stage of ts and tsf (default: --steps)")
    for name, probability in (("dino", 0.5), ("clip", 0.2), ("text", 0.2)):
        p.add_argument(f"--drop-{name}", type=float, default=probability,
                       help=f"probability that {name} is null, for guidance (default: %(default)s)")
    Options.add_to(p, DEFAULTS, out=Path("runs/sugar"), warmup=50)
    return p.parse_args(argv)


@dataclass
class Stage:
    """One training run, with synthetic videos at probability p."""

    name: str
    p: float
    steps: int
    frozen: bool = False  # the first half of the transformer's blocks


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """SUGAR-Mix, -TS and -TSF."""
    if args.strategy == "mix":
        if args.second_steps is not None:
            raise BadInput("--second-steps: --strategy mix has one stage.")
        return [Stage("mix", args.p, args.steps)]
    return [Stage("real", 0.0, args.steps), Stage("mixed", args.p, args.second_steps or args.steps, frozen=args.strategy == "tsf")]


def streams_of(stages: list[Stage]) -> list[str]:
    """The videos that they train on."""
    return ["real"] * any(stage.p < 1 for stage in stages) + ["synthetic"] * any(stage.p > 0 for stage in stages)


def draw(encoded: dict[str, Tensor], g: torch.Generator, vae: VAEConfig, null: Tensor,
         args: argparse.Namespace) -> tuple[Tensor, ...]:
    """A training sample: x_0 and eps [T, 16, h, w], t, text or null, DINO and CLIP tokens and whether they are kept."""
    x_0 = vae.scale(posterior_sample(encoded["mean"], encoded["std"], g)).transpose(0, 1)
    drop_dino, drop_clip, drop_text = torch.rand(3, generator=g) < torch.tensor(
        [args.drop_dino, args.drop_clip, args.drop_text])  # "independently"
    t, eps = torch.randint(T, (), generator=g), torch.randn(x_0.shape, generator=g)
    return x_0, eps, t, null if drop_text else encoded["text"], encoded["dino"], encoded["clip"], ~drop_dino, ~drop_clip


def freeze_first_half(model: Transformer, dtype: torch.dtype) -> None:
    """SUGAR-TSF, second stage: "we keep the first half of the model layers frozen", read as blocks 0 to L/2 - 1. What does not learn
    needs no more than the type that is computed in."""
    for block in model.transformer_blocks[: len(model.transformer_blocks) // 2]:
        block.requires_grad_(False).to(dtype)


def plan_run(config: Config, folder: Path, args: argparse.Namespace, world: int) -> None:
    """The first stage, which trains the most. DINOv2-large and CLIP ViT-L/14, as by default, where the base has none of its own."""
    image = {"dino_dim": 1024, "clip_dim": 1024}
    for name in ("dino", "clip"):
        if (encoder := checkpoint.part(folder, name)) is not None:
            image[f"{name}_tokens"], image[f"{name}_dim"] = image_tokens(encoder)
    with torch.device("meta"):
        model = Transformer(config if config.sugar else replace(config, **image, design=args.design))
    config, block, clip = model.config, Block(config).bfloat16(), clip_of(args, config, args.real_data, args.data)
    frames, h, w = latent_size(clip.frames, clip.height, clip.width)
    tokens = config.dino_tokens + config.clip_tokens + config.max_text_seq_length + frames * h * w // config.patch_size**2
    steps = [f"{stage.steps:,}" for stage in stages_of(args)]
    print(f"{len(steps)} stage{'s' * (len(steps) > 1)}, of {' and '.join(steps)} steps; what follows is for the first")
    sources = [{"real": args.real_data, "synthetic": args.data}[stream] for stream in streams_of(stages_of(args))]
    print_plan(model, block, folder, tokens, args.batch, args.steps * args.batch, sources, len(steps), args, world)


def run(args: argparse.Namespace) -> None:
    ranks = distributed.start(args.device, args.sequence_parallel)
    check_range(args, ("p", "drop_dino", "drop_clip", "drop_text"), ("batch", "real", "triplets", "second_steps"))
    folder = checkpoint.resolve(args.model)
    config = read_config(checkpoint.need(folder, "transformer"))
    checkpoint.check_apart(args.out, folder)
    set_defaults(args, DEFAULTS, toy_sized(config))
    stages = stages_of(args)
    ranks.share(args.batch)
    args.design = args.design or config.design
    if config.image_to_video:
        raise BadInput(f"SUGAR cannot stand on {args.model}, an image-to-video model: it needs a text-to-video base.")
    if config.patch_t != 1:
        raise BadInput(f"SUGAR is not trained on {args.model} here: its patches span two latent frames, and a clip of 8k+1 frames has "
                       f"an odd number. Take CogVideoX-2b or 5b.")
    check_parallel(args, ranks, config.num_attention_heads)
    if args.plan:
        return plan_run(config, folder, args, ranks.world) if ranks.first else None
    encoder = Encoder(folder, "none", config.max_text_seq_length, ranks.device, sugar=True)
    clip, streams = clip_of(args, config, args.real_data, args.data), {}
    for name, kind, source, count in (("real", "subjects", args.real_data, args.real),
                                      ("synthetic", "triplets", args.data, args.triplets)):
        if name not in streams_of(stages):
            continue
        dataset, length = open_data(source, kind, count, 1600, clip, args, encoder, args.out / kind)
        if name == "synthetic" and args.synthetic == "image":
            if isinstance(dataset, Cache):
                raise BadInput(f"--synthetic image draws a frame of each video, which the cache {source} does not hold: give the "
                               f"triplets themselves.")
            dataset, length = OneFrame(dataset, args.seed), length * OneFrame.EACH
        streams[name] = Stream(dataset, length, encoder, args.seed)
    flags = {"real": "--real-data", "synthetic": "--data"}
    check_sources({flags[name]: stream for name, stream in streams.items()})
    held_out = held_out_subjects(args, clip, ToyTest(args.seed, tuple(world.LOOKS)), streams, encoder, ranks)
    if args.restart:
        of_stages = ("checkpoints", "transformer", "settings.json", "metrics.jsonl", "validation", "validation.jsonl")
        drop_earlier(args.out, ranks, "transformer", "model_index.json", "subjects/skipped.jsonl", "triplets/skipped.jsonl",
                     *(f"{stage}/{part}" for stage in ("mix", "real", "mixed") for part in of_stages))
    claim(args, ranks)
    example = next(iter(streams.values()))[0]  # says how many image tokens there are, and how wide
    (dino_tokens, dino_dim), (clip_tokens, clip_dim) = example["dino"].shape, example["clip"].shape
    image = {"dino_tokens": dino_tokens, "dino_dim": dino_dim, "clip_tokens": clip_tokens, "clip_dim": clip_dim}
    weights = checkpoint.need(folder, "transformer")
    for stage in stages:
        out = args.out / stage.name
        # Real videos alone teach no other look than the image's.
        shown = ToyTest(args.seed) if isinstance(held_out, ToyTest) and stage.p == 0 else held_out
        settings = settings_of(args, stage=stage.name, steps=stage.steps, weights=checkpoint.fingerprint(weights),
                               **what_is_trained_on({name: streams[name] for name in streams_of([stage])}, encoder))
        if (out / "transformer").is_dir():  # it has come to its end before
            if (out / "settings.json").exists():  # else another run has handed it on
                check_settings(checkpoint.read_json(out / "settings.json"), settings, out)
        elif not train_stage(stage, weights, out, settings, args, ranks, folder, encoder, streams, shown,
                             {**image, "design": args.design}):
            return  # stopped by a signal
        weights = out / "transformer"
        gc.collect()  # FSDP2's modules refer to each other: else this stage's weights would stay beside the next one's
    if ranks.first:
        save_transformer(load_transformer(weights, dtype=DTYPES[args.dtype]), args.out / "transformer")  # the stages' are float32
        base = str(folder.resolve()) if Path(args.model).is_dir() else args.model
        checkpoint.name_base(args.out, base)
        print(f"wrote {args.out}: python sample.py --model {args.out} ...")


def train_stage(stage: Stage, weights: Path, out: Path, settings: dict, args: argparse.Namespace, ranks: distributed.Ranks,
                folder: Path, encoder: Encoder, streams: dict[str, Stream], held_out: ToyTest | Subjects | None, sugar: dict) -> bool:
    """Trains one stage and writes its transformer below `out`. Returns whether it came to its end."""
    dtype, null = DTYPES[args.dtype], encoder.null
    torch.manual_seed(args.seed)  # for the projections that a plain base lacks
    model = load_transformer(weights, ranks.device, **sugar)
    if stage.frozen:
        freeze_first_half(model, dtype)
    distributed.shard(model, list(model.transformer_blocks), ranks, dtype, args.recompute, args.compile)
    schedule = read_schedule(folder)
    alpha_bar = alpha_bar_schedule(schedule).to(ranks.device)

    def batch_of(step: int) -> tuple[str, int]:
        """p is "the probability of sampling from the synthetic dataset": drawn for each step, on all ranks alike."""
        u = torch.rand((), generator=generator(args.seed, stage.name, step)).item()
        return "synthetic" if u < stage.p else "real", args.batch

    def loss_of(stream: str, positions: list[int]) -> Tensor:
        samples = zip(*(draw(streams[stream][position], generator(args.seed, stage.name, stream, position),
                             encoder.vae_config, null, args) for position in positions))
        x_0, eps, t, text, dino, clip, keep_dino, keep_clip = (torch.stack(part).to(ranks.device) for part in samples)
        predict = lambda x_t, t: model(x_t.to(dtype), t, text.to(dtype), dino=dino.to(dtype), clip=clip.to(dtype),
                                       keep_dino=keep_dino, keep_clip=keep_clip)
        return training_loss(predict, x_0, eps, t, alpha_bar)

    validation = Validation(model, encoder, schedule, held_out, out, ranks, dtype, args.validate_count)
    if not train(model, options_of(args, out=out, steps=stage.steps), ranks, batch_of, loss_of, validation, settings):
        return False
    tensors = distributed.full_state_dict(model)
    if ranks.first:
        before = load_transformer(weights).state_dict() if stage.frozen else {}  # in float32, as they no longer are here
        checkpoint.write_json(out / "settings.json", settings)
        save_tensors(model.config, before | tensors, out / "transformer")
    ranks.wait()  # the next stage begins with what the first rank has just written
    return True


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))


if __name__ == "__main__":
    distributed.leave(main())
