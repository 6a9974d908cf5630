"""What bench.py measures of files: loading a transformer, and reading videos."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import media
from model import Config, Transformer, load_transformer, save_tensors
from readers import Videos

BENCH = Path(__file__).with_name("bench.py")
MODELS = {"tiny": dict(num_attention_heads=8, num_layers=4), "2b": {},
          "5b": dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)}


def write_synthetic(folder: Path, config: Config) -> int:
    """A transformer of the given size with random bfloat16 weights, in the official layout. Returns its bytes."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Transformer(config).state_dict().items()}
    tensors = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in tqdm(shapes.items(), "synthetic weights")}
    save_tensors(config, tensors, folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def host_bytes(peak: bool = False) -> int:
    """The host memory that this process holds, or the most that it ever held; mapped pages of files included."""
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def load_once(side: str, folder: Path, dtype: torch.dtype) -> dict:
    """Loads in this process: seconds, and the peak of host memory above what the imports had taken."""
    if side == "diffusers":
        from diffusers import CogVideoXTransformer3DModel
    before, start = host_bytes(peak=True), time.perf_counter()
    if side == "diffusers":
        model = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    else:
        model = load_transformer(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    for tensor in model.state_dict().values():  # pages that are only mapped are not loaded yet: a sampler reads them all
        tensor.view(-1)[::1024].float().sum()
    return {"seconds": seconds, "seconds_until_read": time.perf_counter() - start, "peak": host_bytes(peak=True) - before}


def load(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "transformer"
        size = write_synthetic(folder, Config(**MODELS[args.model]))
        runs: dict[str, list[dict]] = {"ours": [], "diffusers": []}
        for _ in tqdm(range(args.runs), "runs"):
            for side in runs:
                command = [sys.executable, BENCH, "load", "--child", side, "--folder", folder, *args.flags]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    median = {side: {key: statistics.median(run[key] for run in done) for key in done[0]} for side, done in runs.items()}
    weights = size * args.dtype.itemsize // 2
    print(f"\n{args.model}: {size / 1e9:.2f} GB on disk, {weights / 1e9:.2f} GB of {args.dtype} weights in memory; "
          f"medians of {args.runs} runs\n\n| | peak host memory | of the weights | seconds to load | until all was read |\n"
          f"|---|---|---|---|---|")
    for side, row in median.items():
        print(f"| {side} | {row['peak'] / 1e9:.2f} GB | {row['peak'] / weights:.2f} | {row['seconds']:.1f} | "
              f"{row['seconds_until_read']:.1f} |")
    return {"model": args.model, "dtype": str(args.dtype), "bytes": size, "median": median, "runs": runs}


def synthetic_video(file: Path, size: str, seconds: int) -> Path:
    """A moving test picture with grain, as H.264 with ffmpeg's own settings for key frames."""
    done = media.ffmpeg("-loglevel", "error", "-f", "lavfi", "-i", f"testsrc2=size={size}:rate=30:duration={seconds}", "-vf",
                        "noise=alls=8:allf=t", "-pix_fmt", "yuv420p", str(file))
    if not file.exists():
        raise RuntimeError(done.stderr.decode())
    return file


def whole_video(file: Path, clip: media.Clip, rng: np.random.Generator) -> np.ndarray:
    """What decode() is beside: every frame is decoded, then those of a window are taken and fitted."""
    frames = media.read_video(file)
    start = rng.integers(0, len(frames) - round(clip.seconds * 30))
    chosen = [frames[start + round(i * 30 / clip.fps)] for i in range(clip.frames)]
    return np.stack([np.asarray(media.fit(Image.fromarray(frame), clip.height, clip.width, "crop")) for frame in chosen])


def data(args: argparse.Namespace) -> dict:
    clip, seconds = media.Clip(49, 480, 720, 8), {"ours": [], "all frames": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = synthetic_video(folder / "large.mp4", "1280x720", 30)
        for run in tqdm(range(args.runs), "runs"):
            for side, read in (("ours", media.decode), ("all frames", whole_video)):
                start = time.perf_counter()
                assert read(file, clip, np.random.default_rng(run)).shape == (49, 480, 720, 3)
                seconds[side].append(time.perf_counter() - start)
        rate = {side: 1 / statistics.median(times) for side, times in seconds.items()}
        synthetic_video(folder / "small.mp4", "160x120", 4)
        rows = "".join(f'small.mp4,"number {i}, a caption of the usual length that says what can be seen"\n' for i in range(400_000))
        (folder / "manifest.csv").write_text("video,caption\n" + rows)
        start, small = time.perf_counter(), media.Clip(9, 64, 64, 8)
        videos = Videos(folder / "manifest.csv", small)
        first = [videos[i] for i in range(4)]
        until_first = time.perf_counter() - start
        memory = {}
        for i in tqdm(range(args.samples), "samples"):
            videos[i % len(videos)]
            if i + 1 in (args.samples // 10, args.samples):
                memory[i + 1] = host_bytes()
    print("\n| 49x480x720 out of 30 s of 1280x720 | clips/s |\n|---|---|")
    for side, value in rate.items():
        print(f"| {side} | {value:.2f} |")
    print(f"ratio {rate['ours'] / rate['all frames']:.1f}; first batch of {len(first)} out of 400,000 rows after "
          f"{until_first:.1f} s; memory "
          + ", ".join(f"{size / 1e6:.0f} MB after {count:,} samples" for count, size in memory.items()))
    return {"clips_per_second": rate, "seconds": seconds, "first_batch": until_first, "memory": memory}
