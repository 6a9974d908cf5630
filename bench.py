"""Speed and memory beside diffusers, both sides in one run. Without names, every row but load and data.

    python bench.py [forward switch sugar decode encode train attention]     --frames 9 --height 320 --width 512 --layers 2
    python bench.py load [--model 2b]               host memory and time of loading a transformer
    python bench.py data [--samples 10000]          clips/s beside decoding all frames; a manifest of 400,000 rows; memory

Of the 5b, on a GPU, all of it at 49x480x720 in bf16; on a CPU two of its layers, a small clip and float32 stand for it. The
two sides take turns in one process, with the same random weights; their peaks of memory are each measured in a process of
their own. The floor of a row is the time of its matrix products, convolutions and unmasked attentions alone.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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
from training import DTYPES
from vae import VAE, VAEConfig

SUGAR = dict(dino_dim=1024, clip_dim=1024)  # 257 tokens of each
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
                rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTS = {FLASH[0]: lambda q, k, v, *_, **more: sdpa_flop_count(q, k, v),  # two that torch's counter does not know
          FLASH[1]: lambda grad, q, k, v, *_, **more: sdpa_backward_flop_count(grad, q, k, v)}
Run = Callable[[], object]


@torch.no_grad()
def filled(network: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The network with random weights that follow from their names: the same on both sides."""
    network = network.to(args.dtype).to_empty(device=args.device)
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


def our_transformer(args: argparse.Namespace, compiled: bool = True, **more) -> Transformer:
    with torch.device("meta"):
        model = Transformer(replace(config_of(args), **more))
    model = filled(model, args).eval().requires_grad_(False)
    if args.compile and compiled:
        distributed.compile_blocks(list(model.transformer_blocks))
    return model


def their_transformer(args: argparse.Namespace) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    config = config_of(args)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_attention_heads=config.num_attention_heads, num_layers=args.layers,
                                            use_rotary_positional_embeddings=True, sample_frames=args.frames,
                                            sample_height=config.sample_height, sample_width=config.sample_width)
    model = filled(model, args).eval().requires_grad_(False)
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

    def theirs() -> Run:
        model, rotary = their_transformer(args), their_rotary(args, T)
        return torch.no_grad()(lambda: model(x, text, t, image_rotary_emb=rotary, return_dict=False)[0])

    return {"ours": ours, "diffusers": theirs}


def loop(args: argparse.Namespace, sugar: bool) -> dict[str, Callable[[], Run]]:
    """The sampling loop: for Switch an adapter of rank 128, a reference and 2 branches; for SUGAR DINO and CLIP tokens, design
    (b) and 3 branches. diffusers knows neither: there the reference is a frame more, and the image's tokens are tokens of text to
    which everything attends."""
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
        alpha_bar = alpha_bar_schedule(SCHEDULE).to(args.device)
        return lambda: sample_latents(model, given, alpha_bar, settings, x, lambda: None)

    def theirs() -> Run:
        from diffusers import CogVideoXDDIMScheduler
        from peft import LoraConfig

        model, rotary = their_transformer(args), their_rotary(args, T + (not sugar))
        if not sugar:
            model.add_adapter(LoraConfig(r=128, lora_alpha=64, target_modules=list(SWITCH_TARGETS), lora_dropout=0.1))
            model.to(args.dtype).eval().requires_grad_(False)
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

    return {"ours": ours, "diffusers": theirs}


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
        distributed.shard(model, list(model.transformer_blocks), distributed.start(args.device), args.dtype, args.recompute, args.compile)
        predict = lambda x_t, t: model(x_t.to(args.dtype), t, text, reference=reference)
        return step(predict, model)

    def theirs() -> Run:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        model, rotary = their_transformer(args), their_rotary(args, T + 1)
        model.add_adapter(LoraConfig(r=128, lora_alpha=64, target_modules=list(SWITCH_TARGETS)))
        if args.recompute:
            model.enable_gradient_checkpointing()
        model.train()
        cast_training_params(model, torch.float32)  # as diffusers' own training script has it, with autocast

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(args.device, args.dtype, enabled=args.dtype != torch.float32):
                return model(torch.cat([reference[:, None], x_t.to(args.dtype)], dim=1), text, t, image_rotary_emb=rotary,
                             return_dict=False)[0][:, 1:]

        return step(predict, model)

    return {"ours": ours, "diffusers": theirs}


def attention_row(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """Selective attention of one layer of SUGAR: each design as a few unmasked attentions, as a dense boolean mask and, on a
    GPU, as FlexAttention, beside attention without a mask."""
    T, h, w = latents(args)
    first = h * w // 4
    lengths = (2 * 257, 226, first, (T - 1) * first)
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
        if args.device.startswith("cuda"):
            sides[f"({design}), FlexAttention"] = lambda design=design: flex(design)
    return sides


ROWS = {"forward": forward, "switch": partial(loop, sugar=False), "sugar": partial(loop, sugar=True),
        "decode": partial(vae_row, decode=True), "encode": partial(vae_row, decode=False), "train": train,
        "attention": attention_row}


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(run: Run, device: str) -> float:
    """Wall time of one run, with the GPU's work done."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


class Products(TorchDispatchMode):
    """Notes the matrix products, convolutions and attentions that run inside it, and of what shapes."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::").partition(".")[0]
        if name in self.NAMES or name.startswith("_scaled_dot_product"):
            shape = lambda x: ((tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else
                               tuple(x) if isinstance(x, list) else x)
            given = tuple((key, shape(value)) for key, value in (kwargs or {}).items() if key != "attn_mask")
            self.seen[op, tuple(map(shape, args)), given] += 1
        return op(*args, **(kwargs or {}))


def strided(shape: tuple, stride: tuple, dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers that lie in memory as a given tensor did."""
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride)) if 0 not in shape else 0
    return torch.rand(size, device=device).to(dtype).as_strided(shape, stride)


def floor(run: Run, args: argparse.Namespace) -> Run:
    """The products of one run by themselves, on random numbers of the same shapes and strides."""
    with Products() as products:
        run()
    is_tensor = lambda x: isinstance(x, tuple) and len(x) == 3 and isinstance(x[2], torch.dtype)
    fresh = lambda x: strided(*x, args.device) if is_tensor(x) else list(x) if isinstance(x, tuple) else x
    again = [(op, [fresh(x) for x in given], {key: fresh(value) for key, value in named}, count)
             for (op, given, named), count in products.seen.items()]

    def products_alone() -> None:
        for op, given, named, count in again:
            for _ in range(count):
                op(*given, **named)

    return torch.no_grad()(products_alone)


def machine(args: argparse.Namespace) -> dict[str, float]:
    """What this machine does at best: floating-point operations and bytes a second, of a large matrix product and a copy."""
    n = 8192 if args.device.startswith("cuda") else 2048
    a, large = noise(args, n, n), torch.empty(2**28, dtype=torch.uint8, device=args.device)
    rate = lambda run: 1 / statistics.median(seconds(run, args.device) for _ in range(7))
    return {"flops": 2 * n**3 * rate(lambda: a @ a), "bytes": 2 * large.numel() * rate(large.clone)}


def peak(row: str, side: str, args: argparse.Namespace) -> int:
    """The most memory that one side takes for its weights and one run, in a process of its own."""
    command = [sys.executable, __file__, row, "--child", side, *args.flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def child(row: str, side: str, args: argparse.Namespace) -> dict:
    import diffusers, peft  # noqa: E401, F401 (both sides start from the same imports)

    sides, cuda = ROWS[row](args), args.device.startswith("cuda")
    before = host_bytes()
    run = sides[side]()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets its peak
    run()
    return {"peak": torch.cuda.max_memory_allocated() if cuda else host_bytes(peak=True) - before}


def measure(row: str, args: argparse.Namespace, best: dict[str, float]) -> dict:
    """One row: medians of the sides, which take turns, their peaks and floors."""
    print(f"\n{row}: {' '.join(getattr(ROWS[row], 'func', ROWS[row]).__doc__.split())}")
    sides = {side: build() for side, build in ROWS[row](args).items()}
    counted = {} if args.compile else {side: run for side, run in sides.items() if "FlexAttention" not in side}
    runs = {**sides, **{f"floor of {side}": floor(run, args) for side, run in counted.items()}}
    times: dict[str, list[float]] = {side: [] for side in runs}
    for turn in tqdm(range(args.runs + 1), f"{row}: {len(sides)} sides", leave=False):
        for side, run in runs.items():
            times[side].append(seconds(run, args.device))
    median, table = {side: statistics.median(values[1:]) for side, values in times.items()}, {}
    reference = [side for side in sides if side in ("diffusers", "unmasked")][0]
    for side, run in sides.items():
        flop = None
        if side in counted:
            with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
                run()
            flop = counter.get_total_flops()
        table[side] = {"seconds": median[side], "floor": median.get(f"floor of {side}"), "flop": flop}
    del sides, runs, counted, run
    gc.collect()
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()  # for the processes that measure memory
    for side, entry in table.items():
        entry["peak"] = peak(row, side, args)
    print("\n| | seconds | of " + reference + " | over its floor | peak memory | of " + reference + " | TFLOP/s | of a matrix product's |"
          "\n|---|---|---|---|---|---|---|---|")
    for side, entry in table.items():
        over = f"{entry['seconds'] / entry['floor'] - 1:+.0%}" if entry["floor"] else ""
        rate = (entry["flop"] or 0) / entry["seconds"]
        print(f"| {side} | {entry['seconds']:.3f} | {entry['seconds'] / table[reference]['seconds']:.2f} | {over} | "
              f"{entry['peak'] / 1e9:.2f} GB | {entry['peak'] / table[reference]['peak']:.2f} | {rate / 1e12:.3f} | "
              f"{rate / best['flops']:.0%} |")
    return {"sides": table, "times": times}


def rows(args: argparse.Namespace) -> dict:
    best = machine(args)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, {args.dtype}, {args.layers} layers of the 5b, {args.frames}x{args.height}x{args.width}, medians of {args.runs} "
          f"runs; a matrix product {best['flops'] / 1e12:.2f} TFLOP/s, a copy {best['bytes'] / 1e9:.0f} GB/s")
    return {"machine": name, "best": best, "flags": args.flags, **{row: measure(row, args, best) for row in args.what}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="row", choices=["all", *ROWS, "load", "data"], default="all",
                        help=", ".join([*ROWS, "load", "data"]))
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if gpu else "fp32", help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=42 if gpu else 2, help="of the 5b (default: %(default)s)")
    for name, size in (("frames", 49 if gpu else 9), ("height", 480 if gpu else 320), ("width", 720 if gpu else 512)):
        parser.add_argument(f"--{name}", type=int, default=size, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of the sampling loops (default: %(default)s)")
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--compile", action="store_true", help="compiled blocks, on both sides")
    parser.add_argument("--recompute", nargs="?", const="all", choices=["all", "keep-attention"],
                        help="activation checkpointing in the training step; diffusers knows only \"all\"")
    parser.add_argument("--model", choices=list(MODELS), default="2b", help="load: which (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=10000, help="data: over which memory is watched (default: %(default)s)")
    parser.add_argument("--child", metavar="SIDE", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.what = list(ROWS) if args.what in ("all", ["all"]) else args.what
    if len(args.what) > 1 and {"all", "load", "data"} & {*args.what}:
        parser.error("all, load and data stand alone.")
    args.flags = sys.argv[next((i for i, flag in enumerate(sys.argv) if flag.startswith("-")), len(sys.argv)) :]
    args.dtype = DTYPES[args.dtype]
    if args.child:
        row = args.what[0]
        print(json.dumps(load_once(args.child, args.folder, args.dtype) if row == "load" else child(row, args.child, args)))
        distributed.leave(0)
    result = {"load": load, "data": data}.get(args.what[0], rows)(args)
    Path("bench.json").write_text(json.dumps(result, indent=2) + "\n")
    distributed.leave(0)


if __name__ == "__main__":
    main()
