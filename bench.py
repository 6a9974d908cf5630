"""Speed and memory beside diffusers, both sides in one run. Without names, every row but data.

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
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import distributed
from attention import DESIGNS
from bench_files import MODELS, data, host_bytes, load, load_once
from bench_rows import FLEX, ROWS, Run, group_lengths, noise
from training import DTYPES

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTS = {FLASH[0]: lambda q, k, v, *_, **more: sdpa_flop_count(q, k, v),  # what torch's counter does not know
          FLASH[1]: lambda grad, q, k, v, *_, **more: sdpa_backward_flop_count(grad, q, k, v),
          torch.ops.aten.addmm_: lambda out, a, b, *_, **more: 2 * a[0] * a[1] * b[1]}
# Frames, height and width where nothing else is asked for. Attention: 7,490 tokens on a CPU and 18,290 on a GPU.
ON_GPU = {"": (49, 480, 720)}
ON_CPU = {"": (9, 320, 512), "decode": (9, 240, 360), "encode": (9, 240, 360), "attention": (17, 480, 720)}


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
        """Random numbers that lie so, of mean 0 as those of the runs, and small, as some are added up; zeros where they are whole
        numbers, which kernels use as seeds."""
        size = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride)) if 0 not in self.shape else 0
        made = torch.zeros(size, dtype=self.dtype, device=self.device)
        return (made.normal_(std=0.02) if self.dtype.is_floating_point else made).as_strided(self.shape, self.stride)


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
    """The most memory that one side takes for its weights and a run, in a process of its own; None where there is not enough, or where it
    fails, which is printed."""
    command = [sys.executable, __file__, row, "--child", side, *args.flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"the memory of {side} cannot be measured:\n{done.stderr[-2000:]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def child(row: str, side: str, args: argparse.Namespace) -> dict:
    # Both sides start from the same imports; diffusers loads a class when it is asked for.
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel  # noqa: F401
    from peft import LoraConfig  # noqa: F401

    sides, before = ROWS[row](args), host_bytes()
    try:
        run = sides[side]()
        run()  # compiles, and makes what the runs after it find: an optimizer's state
        if args.cuda:
            torch.cuda.synchronize(args.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(args.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets its peak
        run()
    except torch.OutOfMemoryError:
        return {"peak": None}
    return {"peak": torch.cuda.max_memory_allocated(args.device) if args.cuda else host_bytes(peak=True) - before}


def take_turns(row: str, args: argparse.Namespace) -> tuple[dict[str, dict | None], dict[str, list[float]], list[str]]:
    """What each side of a row computes, the times of sides and floors, turn by turn, and which sides failed. Every other turn draws an
    order, which the next one reverses: none always comes first, or after the same other. A side that fails or runs out of memory is left
    out from there on, and None, with what is counted by it."""
    runs, counts, times, failed = {}, {}, {}, []

    def leave_out(lost: str, error: Exception | None = None) -> None:
        if error is not None and not isinstance(error, torch.OutOfMemoryError):
            print(f"{lost} failed: {type(error).__name__}: {str(error).strip()[:500]}")
            failed.append(lost)
        for side in {lost, *(side for side in runs if side.removesuffix(FLEX) == lost)}:
            counts[side] = None
            runs.pop(side, None)

    for side, build in ROWS[row](args).items():
        plain = side.removesuffix(FLEX)
        try:
            runs[side] = {side: build()}
            if side == plain:
                runs[side][f"floor of {side}"], counts[side] = counted(runs[side][side])
            else:  # its kernel hides what it computes: the same as the blocks
                counts[side] = counts[plain]
            if counts[side] is None:
                leave_out(side)
        except Exception as error:  # the others go on
            leave_out(side, error)
    draw, order = random.Random(0), []
    for turn in tqdm(range(args.runs + 1), f"{row}: {len(counts)} sides", leave=False):
        order = order[::-1] if turn % 2 else draw.sample(list(counts), len(counts))
        for side in order:
            try:
                for name, run in runs.get(side, {}).items():
                    times.setdefault(name, []).append(seconds(run, args))
            except Exception as error:
                leave_out(side, error)
    return counts, times, failed


def measure(row: str, args: argparse.Namespace, best: dict[str, float]) -> dict:
    """One row: the sides take turns, then each shows its peak of memory. Ratios are taken turn by turn, as both sides of a turn found
    the machine in the same state; the first turn warms up."""
    print(f"\n{row}, {size_of(row, args)}: {' '.join(getattr(ROWS[row], 'func', ROWS[row]).__doc__.split())}\n")
    counts, times, failed = take_turns(row, args)
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
        memory = [f"{most / 1e9:.2f} GB" if most else "not measured", f"{most / theirs:.2f}" if most and theirs else ""]
        if counts[side] is None:
            line(side, "failed" if side in failed else "out of memory", *[""] * 4, *memory, "", "")
            continue
        flop, moved, rate = entry["flop"], entry["bytes"], entry["flop"] / entry["seconds"]
        line(side, f"{entry['seconds']:.3f}", f"{entry['ratio']:.2f}" if entry["ratio"] else "", f"{entry['over_floor']:+.0%}",
             f"{flop / 1e12:.2f}, {flop / best['flops']:.2f} s", f"{moved / 1e9:.2f}, {moved / best['bytes']:.2f} s", *memory,
             f"{rate / 1e12:.3f}", f"{rate / best['flops']:.0%}")
    return {"sides": table, "times": times} | ({"failed": failed} if failed else {})


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
    """Puts a row into bench.json, in place of one of the same machine, type, size, compilation and, of attention, designs."""
    key = {"machine": name_of_machine(args), "dtype": str(args.dtype), "size": size, "row": row, "compile": args.compile,
           **({"designs": args.designs} if row == "attention" else {})}
    old = json.loads(file.read_text()) if file.exists() else []
    others = [entry for entry in old if any(entry.get(name) != value for name, value in key.items())]
    file.write_text(json.dumps([*others, {**key, "torch": torch.__version__, "flags": args.flags, **result}], indent=2) + "\n")


def rows(args: argparse.Namespace, what: list[str]) -> bool:
    """Measures these rows and keeps those of which no side failed. Returns whether that was all of them."""
    whole, best = True, machine(args)
    print(f"{name_of_machine(args)}, {args.dtype}{', compiled' if args.compile else ''}, medians of {args.runs} runs; "
          f"a matrix product {best['flops'] / 1e12:.2f} TFLOP/s, a copy {best['bytes'] / 1e9:.0f} GB/s"
          + (f", from host memory {best['from_host'] / 1e9:.0f} GB/s" if args.cuda else ""))
    for row in what:
        if row == "low-memory" and not args.cuda:
            print("\nlow-memory: needs a GPU; a CPU has no other memory to stream from.")
            continue
        given = sized(row, args)
        result = measure(row, given, best)
        if "failed" in result:
            whole = False
            print(f"{row} is not kept in bench.json.")
        else:
            keep(row, size_of(row, given), {"best": best, **result}, args)
    return whole


def flags_of(args: argparse.Namespace) -> list[str]:
    """The flags that say the same, for a process that measures one side."""
    flags = []
    for name, value in vars(args).items():
        if name not in ("what", "child", "folder") and value is not None and value is not False:
            flags += [f"--{name}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="row", choices=[*ROWS, "load", "data"],
                        help=", ".join([*ROWS, "load", "data"]) + " (default: all but data)")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if gpu else "fp32", help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=42 if gpu else 2, help="of the 5b (default: %(default)s)")
    parser.add_argument("--frames", type=int, help="these three default to 49x480x720; on a CPU to 9x320x512, for the VAE to "
                        "9x240x360, and for attention to 17x480x720, that is 7,490 tokens")
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
    args.what = args.what or [*ROWS, "load"]
    if len(args.what) > 1 and "data" in args.what:
        parser.error("data stands alone.")
    args.flags = flags_of(args)
    args.dtype, args.cuda, row = DTYPES[args.dtype], args.device.startswith("cuda"), args.what[0]
    args.recompute = args.recompute or ("all" if args.cuda else "none")
    if args.child:
        once = load_once(args.child, args.folder, args.dtype) if row == "load" else child(row, args.child, sized(row, args))
        print(json.dumps(once))
    elif row == "data":
        keep(row, f"{args.samples} samples", data(args), args)
    else:
        whole = args.what == ["load"] or rows(args, [row for row in args.what if row != "load"])
        if "load" in args.what:
            keep("load", args.model, load(args), args)
        distributed.leave(0 if whole else 1)
    distributed.leave(0)


if __name__ == "__main__":
    main()
