"""Speed and memory beside diffusers, both sides in one run. Without names, every row but load and data.

    python bench.py [forward switch sugar low-memory decode encode train attention] --frames 9 --height 320 --width 512 --layers 2
    python bench.py load [--model 2b]               host memory and time of loading a transformer
    python bench.py data [--samples 10000]          clips/s beside decoding all frames; a manifest of 400,000 rows; memory

Of the 5b, on a GPU, all of it at 49x480x720 in bf16; on a CPU two of its layers, a small clip and float32 stand for it. The
two sides take turns in one process, with the same random weights; their peaks of memory are each measured in a process of
their own. The floor of a row is the time of its matrix products, convolutions and unmasked attentions alone; beside it stand
what their operations would take at the rate of a large matrix product, and their bytes at the rate of a copy. Ratios are medians
over turns. Each row is kept in bench.json as soon as it is measured, in place of an earlier one of the same machine and size.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import distributed
import train_switch
from attention import DESIGNS, attention, selective_blocks, selective_mask
from bench_files import MODELS, data, host_bytes, load, load_once
from diffusion import alpha_bar_schedule, training_loss
from lora import SWITCH_TARGETS, Adapter
from model import Config, Transformer
from pipeline import Conditions, Settings, sample_latents
from streaming import streamed
from training import DTYPES
from vae import VAE, VAEConfig

SUGAR = dict(dino_dim=1024, clip_dim=1024)  # 257 tokens of each
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
                rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTS = {FLASH[0]: lambda q, k, v, *_, **more: sdpa_flop_count(q, k, v),  # what torch's counter does not know
          FLASH[1]: lambda grad, q, k, v, *_, **more: sdpa_backward_flop_count(grad, q, k, v),
          torch.ops.aten.addmm_: lambda out, a, b, *_, **more: 2 * a[0] * a[1] * b[1]}
FLEX = ", FlexAttention"
Run = Callable[[], object]
# Frames, height and width where nothing else is asked for. Attention: 7,490 tokens on a CPU and 18,290 on a GPU.
ON_GPU = {"": (49, 480, 720)}
ON_CPU = {"": (9, 320, 512), "decode": (9, 240, 360), "encode": (9, 240, 360), "attention": (17, 480, 720)}


@torch.no_grad()
def filled(network: nn.Module, args: argparse.Namespace, place: str | None = None) -> nn.Module:
    """The network with random weights that follow from their names: the same on both sides. place: other than args.device."""
    network = network.to(args.dtype).to_empty(device=place or args.device)
    for key, tensor in network.state_dict().items():
        generator = torch.Generator(args.device).manual_seed(sum(map(ord, key)))
        around = 1.0 if "norm" in key and key.endswith("weight") and tensor.dim() == 1 else 0.0
        tensor.copy_(around + 0.02 * torch.randn(tensor.shape, generator=generator, device=args.device))
    return network


def noise(args: argparse.Namespace, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device, dtype or args.dtype)


def latents(args: argparse.Namespace) -> tuple[int, int, int]:
    return (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8


def config_of(args: argparse.Namespace) -> Config:
    T, h, w = latents(args)
    return Config(**{**MODELS["5b"], "num_layers": args.layers}, sample_frames=args.frames, sample_height=h, sample_width=w)


def our_transformer(args: argparse.Namespace, compiled: bool = True, place: str | None = None, **more) -> Transformer:
    with torch.device("meta"):
        model = Transformer(replace(config_of(args), **more))
    model = filled(model, args, place).eval().requires_grad_(False)
    if args.compile and compiled:
        distributed.compile_blocks(list(model.transformer_blocks))
    return model


def their_transformer(args: argparse.Namespace, place: str | None = None) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    config = config_of(args)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_attention_heads=config.num_attention_heads, num_layers=args.layers,
                                            use_rotary_positional_embeddings=True, sample_frames=args.frames,
                                            sample_height=config.sample_height, sample_width=config.sample_width)
    model = filled(model, args, place).eval().requires_grad_(False)
    if args.compile:
        for block in model.transformer_blocks:
            block.compile()
    return model


def their_rotary(args: argparse.Namespace, frames: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    _, h, w = latents(args)
    return get_3d_rotary_pos_embed(64, ((0, 0), (h // 2, w // 2)), (h // 2, w // 2), frames, device=args.device)


# --- rows: each gives a function for each side, which builds what the side runs -------------------------------------------


def forward(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """One pass of the transformer, text-to-video, a batch of one."""
    T, h, w = latents(args)
    x, t, text = noise(args, 1, T, 16, h, w), torch.tensor([500], device=args.device), noise(args, 1, 226, 4096)

    def ours() -> Run:
        model = our_transformer(args)
        return torch.no_grad()(lambda: model(x, t, text))

    def theirs(fused: bool = False) -> Run:
        model, rotary = their_transformer(args), their_rotary(args, T)
        if fused:
            model.fuse_qkv_projections()
        return torch.no_grad()(lambda: model(x, text, t, image_rotary_emb=rotary, return_dict=False)[0])

    return {"ours": ours, "diffusers": theirs, "diffusers, fused": partial(theirs, fused=True)}


def low_memory(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """The same pass with its weights in host memory, as --low-memory has it. diffusers: enable_sequential_cpu_offload(), and
    enable_group_offload() of one block at a time on a stream of its own."""
    T, h, w = latents(args)
    x, t, text = noise(args, 1, T, 16, h, w), torch.tensor([500], device=args.device), noise(args, 1, 226, 4096)
    device = torch.device(args.device)

    def ours() -> Run:
        model, stack = our_transformer(args, place="cpu"), ExitStack()
        stack.enter_context(streamed(model, list(model.transformer_blocks), device))
        return torch.no_grad()(lambda stack=stack: model(x, t, text))  # which holds the stack, so that the blocks go on streaming

    def theirs(groups: bool) -> Run:
        from accelerate import cpu_offload

        model, rotary = their_transformer(args, place="cpu"), their_rotary(args, T)
        if groups:
            model.enable_group_offload(device, num_blocks_per_group=1, use_stream=True)
        else:
            cpu_offload(model, device)  # what the pipeline's enable_sequential_cpu_offload() does to each network
        return torch.no_grad()(lambda: model(x, text, t, image_rotary_emb=rotary, return_dict=False)[0])

    return {"ours": ours, "diffusers, sequential": partial(theirs, groups=False), "diffusers, groups": partial(theirs, groups=True)}


def loop(args: argparse.Namespace, sugar: bool) -> dict[str, Callable[[], Run]]:
    """The sampling loop: for Switch an adapter of rank 128, a reference and 2 branches; for SUGAR DINO and CLIP tokens, design
    (b) and 3 branches. diffusers knows neither: there the reference is a frame more, and the image's tokens are tokens of text to
    which everything attends. Fused: the adapter merged into the weights by fuse_lora(), and fuse_qkv_projections()."""
    T, h, w = latents(args)
    x, text, null = noise(args, 1, T, 16, h, w, dtype=torch.float32), noise(args, 1, 226, 4096), noise(args, 1, 226, 4096)

    def ours() -> Run:
        model = our_transformer(args, **(SUGAR if sugar else {}))
        given = Conditions(text, null)
        if sugar:
            given.dino = given.clip = noise(args, 1, 257, 1024)
        else:
            given.reference = noise(args, 1, 16, h, w)
            train_switch.prepare(model, Adapter()).to(args.dtype).eval().requires_grad_(False)
        settings = Settings(args.frames, args.height, args.width, 8, "ddim", steps=args.steps)
        alpha_bar = alpha_bar_schedule(SCHEDULE)
        return lambda: sample_latents(model, given, alpha_bar, settings, x, lambda: None)

    def theirs(fused: bool = False) -> Run:
        from diffusers import CogVideoXDDIMScheduler
        from peft import LoraConfig

        model, rotary = their_transformer(args), their_rotary(args, T + (not sugar))
        if not sugar:
            model.add_adapter(LoraConfig(r=128, lora_alpha=64, target_modules=list(SWITCH_TARGETS), lora_dropout=0.1))
            model.to(args.dtype).eval().requires_grad_(False)
        if fused:
            model.fuse_lora()
            model.fuse_qkv_projections()
        scheduler = CogVideoXDDIMScheduler(**SCHEDULE)
        branches = 3 if sugar else 2
        prompts = torch.cat([null, text, text][:branches])
        if sugar:
            prompts = torch.cat([prompts, noise(args, branches, 2 * 257, 4096)], dim=1)
        first = x.to(args.dtype) if sugar else torch.cat([noise(args, 1, 1, 16, h, w), x.to(args.dtype)], dim=1)

        @torch.no_grad()
        def run() -> Tensor:
            scheduler.set_timesteps(args.steps, device=args.device)
            latent = first
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(torch.cat([latent] * branches), t)
                v = model(given, prompts, t.expand(branches), image_rotary_emb=rotary, return_dict=False)[0].float()
                null_v, *more = v.chunk(branches)
                guided = null_v + sum(6.0 * (y - null_v) for y in more)
                latent = scheduler.step(guided, t, latent, return_dict=False)[0].to(args.dtype)
            return latent

        return run

    name = "diffusers, attending densely" if sugar else "diffusers"
    return {"ours": ours, name: theirs, f"{name}, fused": partial(theirs, fused=True)}


def vae_row(args: argparse.Namespace, decode: bool) -> dict[str, Callable[[], Run]]:
    """The official VAE, whole frames."""
    T, h, w = latents(args)
    z, video = noise(args, 1, 16, T, h, w), noise(args, 1, 3, args.frames, args.height, args.width).clamp(-1, 1)

    def ours() -> Run:
        with torch.device("meta"):
            vae = VAE(VAEConfig())
        vae = filled(vae, args).eval().requires_grad_(False)
        return torch.no_grad()((lambda: vae.decode(z)) if decode else (lambda: vae.encode(video)[0]))

    def theirs() -> Run:
        from diffusers import AutoencoderKLCogVideoX

        with torch.device("meta"):
            vae = AutoencoderKLCogVideoX()
        vae = filled(vae, args).eval().requires_grad_(False)
        return torch.no_grad()((lambda: vae.decode(z).sample) if decode else (lambda: vae.encode(video).latent_dist.mean))

    return {"ours": ours, "diffusers": theirs}


def train(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """A training step of Switch: forward and backward pass of one video with its reference, and AdamW on a LoRA of rank 128.
    diffusers + PEFT have the reference as a frame more."""
    T, h, w = latents(args)
    x, eps, text, t = (noise(args, 1, T, 16, h, w), noise(args, 1, T, 16, h, w), noise(args, 1, 226, 4096),
                       torch.tensor([500], device=args.device))
    reference, alpha_bar = noise(args, 1, 16, h, w), alpha_bar_schedule(SCHEDULE).to(args.device)

    def step(predict, model: nn.Module) -> Run:
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [nn.Parameter(distributed.local(p.detach())) for p in trained]  # as in training.py
        optimizer = torch.optim.AdamW(held, lr=1e-4, fused=True)

        def run() -> Tensor:
            loss = training_loss(predict, x, eps, t, alpha_bar)
            loss.backward()
            for parameter, plain in zip(trained, held):
                plain.grad, parameter.grad = distributed.local(parameter.grad), None
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return run

    def ours() -> Run:
        model = train_switch.prepare(our_transformer(args, compiled=False), Adapter(dropout=0.0)).train()
        recompute = None if args.recompute == "none" else args.recompute
        distributed.shard(model, list(model.transformer_blocks), distributed.start(args.device), args.dtype, recompute, args.compile)
        predict = lambda x_t, t: model(x_t.to(args.dtype), t, text, reference=reference)
        return step(predict, model)

    def theirs() -> Run:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        model, rotary = their_transformer(args), their_rotary(args, T + 1)
        model.add_adapter(LoraConfig(r=128, lora_alpha=64, target_modules=list(SWITCH_TARGETS)))
        if args.recompute != "none":
            model.enable_gradient_checkpointing()
        model.train()
        cast_training_params(model, torch.float32)  # as diffusers' own training script has it, with autocast

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(torch.device(args.device).type, args.dtype, enabled=args.dtype != torch.float32):
                return model(torch.cat([reference[:, None], x_t.to(args.dtype)], dim=1), text, t, image_rotary_emb=rotary,
                             return_dict=False)[0][:, 1:]

        return step(predict, model)

    return {"ours": ours, "diffusers": theirs}


def group_lengths(args: argparse.Namespace) -> tuple[int, int, int, int]:
    """Tokens of SUGAR's groups: DINO and CLIP, text, first frame, other frames."""
    T, h, w = latents(args)
    return 2 * 257, 226, h * w // 4, (T - 1) * h * w // 4


def attention_row(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """Selective attention of one layer of SUGAR: each design as a few unmasked attentions, as a dense boolean mask and, on a
    GPU, as FlexAttention, beside attention without a mask."""
    lengths = group_lengths(args)
    L = sum(lengths)
    q, k, v = (noise(args, 1, L, 48, 64).transpose(1, 2) for _ in range(3))
    sides = {"unmasked": lambda: lambda: F.scaled_dot_product_attention(q, k, v)}

    def masked(design: str) -> Run:
        mask = selective_mask(design, lengths).to(args.device)
        return lambda: F.scaled_dot_product_attention(q, k, v, mask)

    def flex(design: str) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        table = selective_mask(design, (1, 1, 1, 1)).to(args.device)
        group = torch.repeat_interleave(torch.tensor(lengths)).to(args.device)  # of each token
        blocks = create_block_mask(lambda b, h, i, j: table[group[i], group[j]], None, None, L, L, device=args.device)
        compiled = torch.compile(flex_attention)
        return lambda: compiled(q, k, v, block_mask=blocks)

    def grouped(design: str) -> Run:
        blocks = selective_blocks(design, lengths)
        return lambda: attention(q, k, v, blocks)

    for design in args.designs:
        sides[f"({design})"] = lambda design=design: grouped(design)
        sides[f"({design}), mask"] = lambda design=design: masked(design)
        if args.cuda:
            sides[f"({design}){FLEX}"] = lambda design=design: flex(design)
    return sides


ROWS = {"forward": forward, "switch": partial(loop, sugar=False), "sugar": partial(loop, sugar=True), "low-memory": low_memory,
        "decode": partial(vae_row, decode=True), "encode": partial(vae_row, decode=False), "train": train,
        "attention": attention_row}


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(run: Run, args: argparse.Namespace) -> float:
    """Wall time of one run, with the GPU's work done."""
    wait = partial(torch.cuda.synchronize, args.device) if args.cuda else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def fresh(self) -> Tensor:
        """Random numbers that lie so; zeros where they are whole numbers, which kernels use as seeds."""
        size = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride)) if 0 not in self.shape else 0
        made = torch.rand if self.dtype.is_floating_point else torch.zeros
        return made(size, dtype=self.dtype, device=self.device).as_strided(self.shape, self.stride)


class Products(TorchDispatchMode):
    """Notes the matrix products, convolutions and attentions that run inside it, of what shapes and without their masks, and the
    bytes that they move at least: each of them reads and writes its tensors once."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self):
        super().__init__()
        self.seen, self.bytes = Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, name = op(*args, **(kwargs or {})), op.name().removeprefix("aten::").partition(".")[0]
        if name.removesuffix("_") in self.NAMES or name.startswith("_scaled_dot_product"):
            masks = () if "backward" in name else ("attn_mask", "attn_bias")  # the latter is a GPU's, and not named in the call
            noted = lambda key, x: (None if key in masks else tuple(x) if isinstance(x, list) else
                                    Layout(tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x)
            given = tuple(noted(argument.name, x) for argument, x in zip(op._schema.arguments, args))
            self.seen[op, given, tuple((key, noted(key, x)) for key, x in (kwargs or {}).items())] += 1
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out

    def alone(self) -> Run:
        """The same products by themselves, on random numbers."""
        fresh = lambda x: x.fresh() if isinstance(x, Layout) else list(x) if isinstance(x, tuple) else x
        again = [(op, [fresh(x) for x in given], {key: fresh(x) for key, x in named}, count)
                 for (op, given, named), count in self.seen.items()]

        def products_alone() -> None:
            for op, given, named, count in again:
                for _ in range(count):
                    op(*given, **named)

        return torch.no_grad()(products_alone)


def counted(run: Run) -> tuple[Run, dict[str, int]]:
    """The floor of a run, its floating-point operations and the bytes of its products; compiled code is passed uncompiled."""
    flops = FlopCounterMode(display=False, custom_mapping=COUNTS)
    with torch.compiler.set_stance("force_eager"), Products() as products, flops:
        run()
    return products.alone(), {"flop": flops.get_total_flops(), "bytes": products.bytes}


def machine(args: argparse.Namespace) -> dict[str, float]:
    """What this machine does at best: floating-point operations and bytes a second, of a large matrix product and a copy."""
    n = 8192 if args.cuda else 2048
    a, large, room = noise(args, n, n), *(torch.ones(2**28, dtype=torch.uint8, device=args.device) for _ in range(2))
    rate = lambda run: 1 / statistics.median(seconds(run, args) for _ in range(7))
    best = {"flops": 2 * n**3 * rate(lambda: a @ a), "bytes": 2 * large.numel() * rate(lambda: room.copy_(large))}
    if args.cuda:
        pinned = torch.ones(2**28, dtype=torch.uint8).pin_memory()
        best["from_host"] = pinned.numel() * rate(lambda: room.copy_(pinned, non_blocking=True))
    return best


def peak(row: str, side: str, args: argparse.Namespace) -> int | None:
    """The most memory that one side takes for its weights and one run, in a process of its own; None where there is not enough."""
    command = [sys.executable, __file__, row, "--child", side, *args.flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def child(row: str, side: str, args: argparse.Namespace) -> dict:
    import diffusers, peft  # noqa: E401, F401 (both sides start from the same imports)

    sides, before = ROWS[row](args), host_bytes()
    try:
        run = sides[side]()
        if args.cuda:
            torch.cuda.reset_peak_memory_stats(args.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets its peak
        run()
    except torch.OutOfMemoryError:
        return {"peak": None}
    return {"peak": torch.cuda.max_memory_allocated(args.device) if args.cuda else host_bytes(peak=True) - before}


def take_turns(row: str, args: argparse.Namespace) -> tuple[dict[str, dict | None], dict[str, list[float]]]:
    """What each side of a row computes, and the times of sides and floors, turn by turn. Every other turn begins with the last side.
    A side that runs out of memory is left out from there on, and None."""
    runs, counts, times = {}, {}, {}
    for side, build in ROWS[row](args).items():
        plain = side.removesuffix(FLEX)
        try:
            runs[side] = {side: build()}
            if side == plain:
                runs[side][f"floor of {side}"], counts[side] = counted(runs[side][side])
            else:  # its kernel hides what it computes: the same as the blocks
                counts[side] = counts[plain]
        except torch.OutOfMemoryError:
            counts[side] = None
            runs.pop(side, None)
    for turn in tqdm(range(args.runs + 1), f"{row}: {len(counts)} sides", leave=False):
        for side in list(runs)[:: 1 if turn % 2 else -1]:
            try:
                for name, run in runs[side].items():
                    times.setdefault(name, []).append(seconds(run, args))
            except torch.OutOfMemoryError:
                counts[side] = None
                del runs[side]
    return counts, times


def measure(row: str, args: argparse.Namespace, best: dict[str, float]) -> dict:
    """One row: the sides take turns, then each shows its peak of memory. Ratios are taken turn by turn, as both sides of a turn found
    the machine in the same state; the first turn warms up."""
    print(f"\n{row}, {size_of(row, args)}: {' '.join(getattr(ROWS[row], 'func', ROWS[row]).__doc__.split())}\n")
    counts, times = take_turns(row, args)
    gc.collect()
    if args.cuda:
        torch.cuda.empty_cache()  # for the processes that measure memory
    ratio = lambda side, other: statistics.median(a / b for a, b in zip(times[side][1:], times[other][1:]))
    reference, table = next(side for side in counts if side.startswith(("diffusers", "unmasked"))), {}
    for side, count in counts.items():
        table[side] = entry = {"peak": peak(row, side, args)}
        if count:
            floor = f"floor of {side.removesuffix(FLEX)}"
            entry |= {**count, "seconds": statistics.median(times[side][1:]), "floor": statistics.median(times[floor][1:]),
                      "over_floor": ratio(side, floor) - 1, "ratio": ratio(side, reference) if counts[reference] else None}
    line = lambda *cells: print("|", *(f"{cell} |" for cell in cells))
    line("", "seconds", f"of {reference}", "over its floor", "TFLOP, s at a product's rate", "GB, s at a copy's rate", "peak memory",
         f"of {reference}", "TFLOP/s", "of a product's")
    line(*["---"] * 10)
    for side, entry in table.items():
        most, theirs = entry["peak"], table[reference]["peak"]
        memory = [f"{most / 1e9:.2f} GB" if most else "not enough", f"{most / theirs:.2f}" if most and theirs else ""]
        if counts[side] is None:
            line(side, "out of memory", *[""] * 4, *memory, "", "")
            continue
        flop, moved, rate = entry["flop"], entry["bytes"], entry["flop"] / entry["seconds"]
        line(side, f"{entry['seconds']:.3f}", f"{entry['ratio']:.2f}" if entry["ratio"] else "", f"{entry['over_floor']:+.0%}",
             f"{flop / 1e12:.2f}, {flop / best['flops']:.2f} s", f"{moved / 1e9:.2f}, {moved / best['bytes']:.2f} s", *memory,
             f"{rate / 1e12:.3f}", f"{rate / best['flops']:.0%}")
    return {"sides": table, "times": times}


def sized(row: str, args: argparse.Namespace) -> argparse.Namespace:
    """The flags with this row's own size of the clip, where they do not say one."""
    sizes = ON_GPU if args.cuda else ON_CPU
    given = zip(("frames", "height", "width"), sizes.get(row, sizes[""]))
    return argparse.Namespace(**vars(args) | {name: getattr(args, name) or size for name, size in given})


def size_of(row: str, args: argparse.Namespace) -> str:
    clip = f"{args.frames}x{args.height}x{args.width}"
    if row == "attention":
        return f"{sum(group_lengths(args)):,} tokens of {clip}"
    if row in ("decode", "encode"):
        return clip
    more = f", {args.steps} steps" if row in ("switch", "sugar") else f", recomputed: {args.recompute}" if row == "train" else ""
    return f"{args.layers} layers of the 5b, {clip}{more}"


def name_of_machine(args: argparse.Namespace) -> str:
    if args.cuda:
        return torch.cuda.get_device_name(args.device)
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def keep(row: str, size: str, result: dict, args: argparse.Namespace, file: Path = Path("bench.json")) -> None:
    """Puts a row into bench.json, in place of one of the same machine, type, size and compilation."""
    key = {"machine": name_of_machine(args), "dtype": str(args.dtype), "size": size, "row": row, "compile": args.compile}
    old = json.loads(file.read_text()) if file.exists() else []
    old = old if isinstance(old, list) else [old]  # as it once was
    others = [entry for entry in old if any(entry.get(name) != value for name, value in key.items())]
    file.write_text(json.dumps([*others, {**key, "torch": torch.__version__, "flags": args.flags, **result}], indent=2) + "\n")


def rows(args: argparse.Namespace) -> None:
    best = machine(args)
    print(f"{name_of_machine(args)}, {args.dtype}{', compiled' if args.compile else ''}, medians of {args.runs} runs; "
          f"a matrix product {best['flops'] / 1e12:.2f} TFLOP/s, a copy {best['bytes'] / 1e9:.0f} GB/s"
          + (f", from host memory {best['from_host'] / 1e9:.0f} GB/s" if args.cuda else ""))
    for row in args.what:
        if row == "low-memory" and not args.cuda:
            print("\nlow-memory: needs a GPU; a CPU has no other memory to stream from.")
            continue
        given = sized(row, args)
        keep(row, size_of(row, given), {"best": best, **measure(row, given, best)}, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="row", choices=["all", *ROWS, "load", "data"], default="all",
                        help=", ".join([*ROWS, "load", "data"]))
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if gpu else "fp32", help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=42 if gpu else 2, help="of the 5b (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="these three default to 49x480x720; on a CPU to 9x320x512, for the VAE to "
                        "9x240x360, and for attention to 17x480x720, that is 7,490 tokens: the 18,290 of 49 frames take an hour or two")
    for name in ("height", "width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--steps", type=int, default=4, help="of the sampling loops (default: %(default)s)")
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--compile", action="store_true", help="compiled blocks, on both sides")
    parser.add_argument("--recompute", nargs="?", const="all", choices=["none", "all", "keep-attention"],
                        help="activation checkpointing in the training step; diffusers knows only \"all\" (default: all on a GPU)")
    parser.add_argument("--model", choices=list(MODELS), default="2b", help="load: which (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=10000, help="data: over which memory is watched (default: %(default)s)")
    parser.add_argument("--child", metavar="SIDE", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.what = list(ROWS) if args.what in ("all", ["all"]) else args.what
    if len(args.what) > 1 and {"all", "load", "data"} & {*args.what}:
        parser.error("all, load and data stand alone.")
    args.flags = sys.argv[next((i for i, flag in enumerate(sys.argv) if flag.startswith("-")), len(sys.argv)) :]
    args.dtype, args.cuda, row = DTYPES[args.dtype], args.device.startswith("cuda"), args.what[0]
    args.recompute = args.recompute or ("all" if args.cuda else "none")
    if args.child:
        once = load_once(args.child, args.folder, args.dtype) if row == "load" else child(row, args.child, sized(row, args))
        print(json.dumps(once))
    elif row in ("load", "data"):
        keep(row, args.model if row == "load" else f"{args.samples} samples", {"load": load, "data": data}[row](args), args)
    else:
        rows(args)
    distributed.leave(0)


if __name__ == "__main__":
    main()
