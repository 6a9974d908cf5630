"""What the tests of sample.py share: a working directory with the toy and photographs, and ways to run and to look."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageSequence

import media
import sample
import untrained

ROOT = Path(sample.__file__).resolve().parent
SMALL = "--steps 2 --frames 9 --height 32 --width 48"
FOX = "--image fox.png --prompt 'a fox'"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BOX = (20, 8, 44, 40)  # of the fox in its photograph of 80x60


@pytest.fixture(scope="module")
def one_thread():
    """The toy is too small for threads to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The untrained toy: a T2V base, and in it a Switch adapter, a SUGAR model and an image-to-video model."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    untrained.init(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, base):
    """An empty working directory with the toy (a tree of links, so that a test may break it) and some photographs."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    shutil.copytree(base, tmp_path / "toy", copy_function=os.symlink)
    photographs(tmp_path)
    return tmp_path


def no_network(*args, **kwargs):
    raise ConnectionError("no network\nand a long explanation")


def photographs(folder: Path) -> None:
    """One fox with a background (fox.png), as mask (mask.png), and with the background transparent (fox-alpha.png)."""
    y, x = np.mgrid[:60, :80]
    photo = Image.fromarray(np.stack([3 * x, 4 * y, 255 - x - y], axis=-1).astype(np.uint8))
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).ellipse((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill=255)
    photo.save(folder / "fox.png")
    mask.save(folder / "mask.png")
    photo.putalpha(mask)
    photo.save(folder / "fox-alpha.png")
    Image.new("RGB", (80, 60), "darkgreen").save(folder / "frog.png")


def run(arguments: str) -> int:
    """sample.py's exit status; --model toy and the CPU unless the arguments say otherwise (the last one counts)."""
    return sample.main(["--model", "toy", "--device", "cpu", *shlex.split(arguments)])


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below the folder, with what would change if somebody wrote to it."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def frames_of(path: Path) -> np.ndarray:
    """[F, H, W, 3]"""
    if path.suffix == ".gif":
        return np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(path))])
    return np.stack(imageio.mimread(path, memtest=False))


def metadata(path: Path) -> dict:
    if path.suffix == ".gif":
        return json.loads(Image.open(path).info["comment"])
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    output = subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8")
    comment = next(line for line in output.splitlines() if line.startswith("comment="))
    return json.loads(re.sub(r"\\(.)", r"\1", comment.removeprefix("comment=")))  # ffmpeg escapes = ; # and \


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sampled(here, monkeypatch):
    """sampled(arguments): a small video [3, F, H, W] before it is rounded to bytes, where small changes still show."""
    videos, to_frames = [], media.video_to_frames
    monkeypatch.setattr(media, "video_to_frames", lambda video: videos.append(video.float()) or to_frames(video))

    def call(arguments: str) -> torch.Tensor:
        assert run(f"--steps 2 --frames 1 --height 32 --width 32 --out out.gif {arguments}") == 0
        return videos[-1]

    return call


def segmented(monkeypatch, mask: Image.Image | None) -> list[str]:
    """Puts a network in Grounded SAM's place that always answers with `mask`; returns the nouns it was asked for."""
    nouns = []

    class Segmenter:
        def __init__(self, *args, **kwargs):
            pass

        def __call__(self, image, noun):
            nouns.append(noun)
            return mask

    monkeypatch.setattr(sample, "GroundedSAM", Segmenter)
    return nouns


def listing(*lines: dict) -> None:
    Path("list.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


def script(arguments: str, **environment) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "sample.py"), "--model", "toy", "--device", "cpu", *shlex.split(arguments)]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts in the background ignore it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}, preexec_fn=heard)
