"""Speed and memory beside diffusers, both sides in one run, each measurement in a process of its own.

    python bench.py load [--model 2b] [--runs 5] [--dtype bf16]      host memory and time of loading a transformer
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import Config, Transformer, load_transformer, save_tensors

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIVE_B = dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
MODELS = {"tiny": dict(num_attention_heads=8, num_layers=4), "2b": {}, "5b": FIVE_B}


def write_synthetic(folder: Path, config: Config) -> int:
    """A transformer of the given size with random bfloat16 weights, in the official layout. Returns its bytes."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Transformer(config).state_dict().items()}
    tensors = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in tqdm(shapes.items(), "synthetic weights")}
    save_tensors(config, tensors, folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_bytes() -> int:
    """The most host memory that this process ever held, file pages that are mapped included."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def load_once(side: str, folder: Path, dtype: torch.dtype) -> dict:
    """Loads in this process: seconds, and the peak of host memory above what the imports had taken."""
    if side == "diffusers":
        from diffusers import CogVideoXTransformer3DModel
    before, start = peak_bytes(), time.perf_counter()
    if side == "diffusers":
        model = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    else:
        model = load_transformer(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    for tensor in model.state_dict().values():  # pages that are only mapped are not loaded yet: a sampler reads them all
        tensor.view(-1)[::1024].float().sum()
    return {"seconds": seconds, "seconds_until_read": time.perf_counter() - start, "peak": peak_bytes() - before}


def load(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "transformer"
        size = write_synthetic(folder, Config(**MODELS[args.model]))
        runs: dict[str, list[dict]] = {"ours": [], "diffusers": []}
        for _ in tqdm(range(args.runs), "runs"):
            for side in runs:
                command = [sys.executable, __file__, "load", "--child", side, "--folder", folder, "--dtype", args.dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    median = {side: {key: statistics.median(run[key] for run in done) for key in done[0]} for side, done in runs.items()}
    weights = size * DTYPES[args.dtype].itemsize // 2
    print(f"\n{args.model}: {size / 1e9:.2f} GB on disk, {weights / 1e9:.2f} GB of {args.dtype} weights in memory; "
          f"medians of {args.runs} runs\n\n| | peak host memory | of the weights | seconds to load | until all was read |\n"
          f"|---|---|---|---|---|")
    for side, row in median.items():
        print(f"| {side} | {row['peak'] / 1e9:.2f} GB | {row['peak'] / weights:.2f} | {row['seconds']:.1f} | "
              f"{row['seconds_until_read']:.1f} |")
    return {"model": args.model, "dtype": args.dtype, "bytes": size, "median": median, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load"])
    parser.add_argument("--model", choices=list(MODELS), default="2b")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load_once(args.child, args.folder, DTYPES[args.dtype])))
        return
    result = load(args)
    Path("bench.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
