"""sample.py: an image and a prompt become a video, and whatever is wrong with the input is said in one sentence first."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageSequence
from safetensors.torch import load_file, save_file

import checkpoint
import media
import sample
import toy as toy_module
from lora import Adapter, inject, save_adapter
from model import Config, Transformer, save_transformer

ROOT = Path(sample.__file__).resolve().parent
SMALL = "--steps 2 --frames 9 --height 32 --width 48"
FOX = "--image fox.png --prompt 'a fox'"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BOX = (20, 8, 44, 40)  # of the fox in its photograph of 80x60


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """The untrained toy: a T2V base, and in it a Switch adapter, a SUGAR model and an image-to-video model."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy_module.init(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, checkpoint_folder):
    """An empty working directory with the toy (a tree of links, so that a test may break it) and some photographs."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    shutil.copytree(checkpoint_folder, tmp_path / "toy", copy_function=os.symlink)
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
    return {str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


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
    """sampled(arguments): the video tensor [3, F, H, W] before it is rounded to bytes, where small changes still show."""
    videos, to_frames = [], media.video_to_frames
    monkeypatch.setattr(media, "video_to_frames", lambda video: videos.append(video.clone()) or to_frames(video))

    def call(arguments: str) -> torch.Tensor:
        assert run(f"{SMALL} --out out.gif {arguments}") == 0
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


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_has_the_frames_and_the_size_asked_for(here, suffix):
    assert run(f"--prompt 'a fox' --steps 2 --frames 17 --height 32 --width 48 --out new/out{suffix}") == 0
    assert frames_of(here / f"new/out{suffix}").shape == (17, 32, 48, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_image_is_a_video_of_one_frame(here, suffix):
    assert run(f"--prompt 'a fox' --steps 2 --frames 1 --height 16 --width 16 --out out{suffix}") == 0
    assert frames_of(here / f"out{suffix}").shape == (1, 16, 16, 3)


def test_what_is_not_asked_for_comes_from_the_checkpoint(here):
    assert run("--prompt 'a fox' --steps 2 --out out.mp4") == 0
    config = json.loads((here / "toy/transformer/config.json").read_text())
    sides = config["sample_height"] * 8, config["sample_width"] * 8
    assert frames_of(here / "out.mp4").shape == (config["sample_frames"], *sides, 3)
    assert imageio.get_reader(here / "out.mp4").get_meta_data()["fps"] == 8
    assert metadata(here / "out.mp4")["scheduler"] == "ddim"


def test_the_default_number_of_steps_is_50(here, capsys):
    assert run("--prompt 'a fox' --frames 1 --height 16 --width 16 --out out.gif") == 0
    assert metadata(here / "out.gif")["steps"] == 50
    assert "50/50" in capsys.readouterr().err  # the progress bar


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_the_file_carries_prompt_seed_and_settings(here, suffix):
    prompt = 'a "fox" = 1; #2 \\ überall 狐'
    arguments = f"--seed 7 --guidance 3.5 --scheduler dpm --fps 16 --negative-prompt blurry --out out{suffix}"
    assert run(f"--prompt {shlex.quote(prompt)} {SMALL} {arguments}") == 0
    about = metadata(here / f"out{suffix}")
    assert about["prompt"] == prompt
    wanted = {"negative_prompt": "blurry", "seed": 7, "steps": 2, "frames": 9, "height": 32, "width": 48, "fps": 16,
              "guidance": 3.5, "scheduler": "dpm", "model": "toy"}
    assert {name: about[name] for name in wanted} == wanted


def test_metadata_of_a_subject_video_names_image_and_adapter(here):
    assert run(f"{FOX} --adapter toy/switch {SMALL} --out out.mp4") == 0
    about = metadata(here / "out.mp4")
    assert about["image"] == "fox.png" and about["adapter"].startswith("toy/switch")


def test_into_a_folder_the_file_is_named_after_prompt_and_seed(here, capsys):
    assert run(f"--prompt 'A fox, at Night!' --seed 3 {SMALL} --out new/") == 0
    assert [path.name for path in (here / "new").iterdir()] == ["a-fox-at-night-3.mp4"]
    assert capsys.readouterr().out.strip() == "new/a-fox-at-night-3.mp4"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_dtype_samples(sampled, dtype):
    assert sampled(f"--prompt 'a fox' --dtype {dtype}").isfinite().all()


# --- same seed and settings, same video -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    "--prompt 'a fox' --out {}.mp4", "--prompt 'a fox' --out {}.gif", "--prompt 'a fox' --scheduler dpm --out {}.gif",
    "--image fox.png --prompt 'a fox' --adapter toy/switch --out {}.gif",
    "--image fox.png --prompt 'a fox' --model toy/i2v --out {}.gif"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(here, arguments):
    first, again, other = "first", "again", "other"
    for name, seed in ((first, 5), (again, 5), (other, 6)):
        assert run(f"{arguments.format(name)} --seed {seed} {SMALL}") == 0
    first, again, other = (next(path for path in here.glob(f"{name}.*")) for name in (first, again, other))
    assert digest(first) == digest(again)
    assert (frames_of(first) != frames_of(other)).any()


@pytest.mark.parametrize("change", ["--prompt 'a cat'", "--negative-prompt blurry", "--guidance 1", "--steps 3",
                                    "--scheduler dpm", "--seed 1", "--tile --height 64"])
def test_each_setting_matters(sampled, change):
    plain = "--prompt 'a fox' " + ("--height 64" if "--tile" in change else "")
    changed = sampled(f"{plain} {change}")
    before = sampled(plain)
    assert changed.shape == before.shape and not torch.allclose(changed, before, atol=1e-6)


@pytest.mark.parametrize("change", ["--omega-image 1", "--omega-text 1", "--equation 1", "--t-bar 0",
                                    "--t-bar 0 --drop clip", "--t-bar 0 --drop both", "--prompt 'a cat'"])
def test_each_of_sugars_settings_matters(sampled, change):
    plain = "--image fox-alpha.png --prompt 'a fox' --model toy/sugar --omega-image 3"
    assert not torch.allclose(sampled(f"{plain} {change}"), sampled(plain), atol=1e-6)


def test_sugar_drops_nothing_by_default(sampled):
    """Steps run 999..0, and only from t_bar = 1000 up is something dropped."""
    plain = "--image fox-alpha.png --prompt 'a fox' --model toy/sugar"
    assert torch.equal(sampled(plain), sampled(f"{plain} --drop both"))


# --- the image --------------------------------------------------------------------------------------------------------

METHODS = {"switch": "--adapter toy/switch", "sugar": "--model toy/sugar", "i2v": "--model toy/i2v"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_looks_at_the_image(sampled, method):
    fox, frog = (sampled(f"--image {name}.png --prompt 'an animal' {METHODS[method]}") for name in ("fox", "frog"))
    assert not torch.allclose(fox, frog, atol=1e-5)


@pytest.mark.parametrize("method", ["switch", "sugar"])
def test_without_an_image_a_subject_model_makes_a_video_from_text(here, method):
    assert run(f"--prompt 'a fox' {METHODS[method]} {SMALL} --out out.gif") == 0
    assert frames_of(here / "out.gif").shape == (9, 32, 48, 3)
    assert not list(here.glob("out-*.png"))


@pytest.mark.parametrize("method", ["switch", "sugar"])
@pytest.mark.parametrize("how", ["--image fox-alpha.png", "--image fox.png --mask mask.png",
                                 "--image fox.png --subject fox"], ids=["alpha", "mask", "subject"])
def test_alpha_mask_and_subject_cut_the_same_subject_out(here, monkeypatch, method, how):
    mask = Image.open("mask.png")
    nouns = segmented(monkeypatch, mask)
    assert run(f"{how} --prompt 'a fox' {METHODS[method]} {SMALL} --out out.mp4") == 0
    assert nouns == (["fox"] if "--subject" in how else [])
    photo, white = Image.open("fox.png"), Image.new("RGB", (80, 60), "white")
    cutout = Image.open("out-cutout.png")
    assert cutout.size == (BOX[2] - BOX[0], BOX[3] - BOX[1])
    assert np.array_equal(cutout, Image.composite(photo, white, mask).crop(BOX))


def test_the_reference_is_saved_as_the_model_saw_it(here, monkeypatch):
    """The very pixels that the VAE encodes."""
    seen, to_tensor = [], media.image_to_tensor
    monkeypatch.setattr(media, "image_to_tensor", lambda image: seen.append(np.array(image)) or to_tensor(image))
    assert run(f"{FOX} --adapter toy/switch {SMALL} --out out.mp4") == 0
    assert len(seen) == 1 and np.array_equal(Image.open("out-reference.png"), seen[0])


@pytest.mark.parametrize("arguments, padded", [
    ("--image fox.png", False), ("--image fox.png --fit pad", True),
    ("--image fox-alpha.png", True), ("--image fox-alpha.png --fit crop", False)])
def test_a_photograph_is_cropped_and_a_cut_out_is_padded_unless_said_otherwise(here, arguments, padded):
    """A photograph of 80x60 in a video of 96x32: padding leaves white at the sides, cropping does not."""
    size = "--steps 2 --frames 9 --height 32 --width 96"
    assert run(f"{arguments} --prompt 'a fox' --adapter toy/switch {size} --out out.gif") == 0
    reference = np.array(Image.open("out-reference.png").convert("RGB"))
    assert reference.shape == (32, 96, 3)
    assert (reference[:, :4] == 255).all() == padded


def test_image_to_video_takes_the_whole_image_as_first_frame(here):
    assert run(f"{FOX} --model toy/i2v {SMALL} --out out.gif") == 0
    assert Image.open("out-reference.png").size == (48, 32) and not Path("out-cutout.png").exists()
    assert frames_of(here / "out.gif").shape == (9, 32, 48, 3)


def test_sugar_warns_when_the_background_counts_as_subject(here, capsys):
    assert run(f"{FOX} --model toy/sugar {SMALL} --out out.gif") == 0
    assert "warning" in capsys.readouterr().err
    assert run(f"--image fox-alpha.png --prompt 'a fox' --model toy/sugar {SMALL} --out out.gif") == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name, mode", [("grey.png", "L"), ("palette.png", "P"), ("deep.png", "I;16"), ("print.jpg", "CMYK")])
def test_any_photograph_works(here, name, mode):
    Image.open("fox.png").convert("L" if mode == "I;16" else mode).convert(mode).save(name)
    assert Image.open(name).mode == mode
    assert run(f"--image {name} --prompt 'a fox' --adapter toy/switch {SMALL} --out out.gif") == 0


# --- the prompt -------------------------------------------------------------------------------------------------------


def test_an_over_long_prompt_is_cut_and_what_was_dropped_is_quoted(here, capsys):
    prompt = " ".join(["a fox is running in the snow"] * 12 + ["and a dog is dancing"])
    assert run(f"--prompt '{prompt}' {SMALL} --out out.gif") == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    dropped = re.search('"(.*)"', warning)[1]
    assert dropped.endswith("and a dog is dancing") and prompt.endswith(dropped)
    assert len(dropped) < len(prompt)


def test_what_is_cut_from_the_prompt_does_not_matter_and_what_is_kept_does(sampled):
    kept = "a fox is running in the snow " * 12
    plain = sampled(f"--prompt '{kept} a dog'")
    assert torch.equal(plain, sampled(f"--prompt '{kept} a cat is sliding'"))
    assert not torch.equal(plain, sampled(f"--prompt 'a cat {kept}'"))


@pytest.mark.parametrize("prompt, subject, wanted", [
    ("a fox runs", "fox", "a <cls> fox runs"), ("a fox runs", None, "<cls> a fox runs"),
    ("a dog runs", "fox", "<cls> a dog runs"), ("see the <cls> fox", "fox", "see the <cls> fox")])
def test_the_reference_token_stands_before_the_subject_else_at_the_front(here, monkeypatch, prompt, subject, wanted):
    """The toy's adapter was trained with <cls>; a prompt without it gets it."""
    segmented(monkeypatch, Image.open("mask.png"))
    cut = f"--subject {subject}" if subject else ""
    assert run(f"--image fox.png --prompt '{prompt}' {cut} --adapter toy/switch {SMALL} --out out.gif") == 0
    assert metadata(here / "out.gif")["prompt"] == wanted


# --- many prompts -----------------------------------------------------------------------------------------------------


def listing(*lines: dict) -> None:
    Path("list.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


def test_a_list_of_prompts_gives_the_videos_that_single_runs_give(here):
    (here / "pictures").mkdir()
    shutil.copy("fox.png", "pictures/fox.png")
    (here / "pictures/list.jsonl").write_text(
        '{"prompt": "a fox", "seed": 4, "image": "fox.png", "name": "one"}\n\n{"prompt": "a dog", "image": "fox.png"}\n')
    assert run(f"--prompts pictures/list.jsonl --adapter toy/switch {SMALL} --out many") == 0
    assert sorted(path.name for path in (here / "many").glob("*.mp4")) == ["0003-a-dog.mp4", "one.mp4"]
    assert run(f"--image pictures/fox.png --prompt 'a fox' --seed 4 --adapter toy/switch {SMALL} --out one.mp4") == 0
    assert digest(here / "one.mp4") == digest(here / "many/one.mp4")


def test_what_is_there_is_skipped_and_what_is_lost_is_made_again(here, monkeypatch):
    listing({"prompt": "a fox", "name": "a"}, {"prompt": "a dog", "name": "b"}, {"prompt": "a cat", "name": "c"})
    arguments = f"--prompts list.jsonl {SMALL} --out many"
    assert run(arguments) == 0
    before, lost = tree(here / "many"), digest(here / "many/b.mp4")
    (here / "many/b.mp4").unlink()
    assert run(arguments) == 0
    after = tree(here / "many")
    assert digest(here / "many/b.mp4") == lost
    assert {name: after[name] for name in ("a.mp4", "c.mp4")} == {name: before[name] for name in ("a.mp4", "c.mp4")}
    monkeypatch.setattr(sample.Sampler, "run", lambda *args: pytest.fail("everything was there already"))
    assert run(arguments) == 0


def share(monkeypatch, rank: int, world: int, write: bool) -> list[str]:
    """What a rank of `world` takes of the list; with `write`, files stand in for the videos it makes."""
    taken = []

    def make(self, requests, *args):
        for request in requests:
            taken.append(request.out.name)
            request.out.parent.mkdir(exist_ok=True)
            if write:
                request.out.touch()

    monkeypatch.setattr(sample.Sampler, "run", make)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert run(f"--prompts list.jsonl {SMALL} --out many") == 0
    return taken


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_list_without_overlap(here, monkeypatch, world):
    listing(*({"prompt": "a fox", "name": f"{i}"} for i in range(5)))
    shares = [share(monkeypatch, rank, world, write=False) for rank in range(world)]
    assert sorted(sum(shares, [])) == [f"{i}.mp4" for i in range(5)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1)])
def test_a_rank_that_starts_late_still_takes_only_its_own_share(here, monkeypatch, order):
    """Ranks do not start at one instant: videos of the first may be there before the last has looked."""
    listing(*({"prompt": "a fox", "name": f"{i}"} for i in range(5)))
    shares = [share(monkeypatch, rank, len(order), write=True) for rank in order]
    assert sorted(sum(shares, [])) == [f"{i}.mp4" for i in range(5)]


def test_a_single_video_is_made_by_one_rank(here, monkeypatch):
    made = []
    monkeypatch.setattr(sample.Sampler, "run", lambda self, requests, *args: made.append(requests))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run(f"--prompt 'a fox' {SMALL} --out out.mp4") == 0
    assert len(made) == 1


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, order", [
    ("--image fox.png --adapter toy/switch", "T5EncoderModel VAE Transformer VAE"),
    ("--image fox-alpha.png --model toy/sugar", "T5EncoderModel Dinov2Model CLIPVisionModel Transformer VAE")])
def test_networks_come_to_the_device_one_at_a_time(here, monkeypatch, arguments, order):
    visits, on_device = [], sample.Sampler.on_device
    inside = []

    @contextmanager
    def watched(self, network):
        assert not inside, f"{type(network).__name__} joins {inside}"
        inside.append(type(network).__name__)
        visits.append(type(network).__name__)
        with on_device(self, network) as network:
            yield network
        inside.pop()

    monkeypatch.setattr(sample.Sampler, "on_device", watched)
    assert run(f"{arguments} --prompt 'a fox' {SMALL} --out out.gif") == 0
    assert visits == order.split()


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_ctrl_c_while_sampling_leaves_nothing(here, monkeypatch, capsys):
    before = tree(here)
    monkeypatch.setattr(sample, "denoise", interrupt)
    assert run(f"--image fox-alpha.png --prompt 'a fox' --adapter toy/switch {SMALL} --out new/out.mp4") == 130
    assert tree(here) == before
    assert "Traceback" not in capsys.readouterr().err


class Interrupted:
    """Frames of which the fourth never comes."""

    def __init__(self, frames):
        self.frames = frames

    def __iter__(self):
        yield from self.frames[:3]
        raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("moment", ["between frames", "before the name"])
def test_ctrl_c_while_writing_leaves_no_partial_file(here, monkeypatch, suffix, moment):
    if moment == "between frames":
        to_frames = media.video_to_frames
        monkeypatch.setattr(media, "video_to_frames", lambda video: Interrupted(to_frames(video)))
    else:
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: interrupt() if Path(b).suffix == suffix else replace(a, b))
    assert run(f"--image fox-alpha.png --prompt 'a fox' --adapter toy/switch {SMALL} --out new/out{suffix}") == 130
    left = sorted((here / "new").iterdir()) if (here / "new").exists() else []
    assert {path.name for path in left} <= {"out-cutout.png", "out-reference.png"}
    for path in left:
        Image.open(path).load()  # what is left is whole


def test_ctrl_c_leaves_an_older_video_as_it_was(here, monkeypatch):
    arguments = f"--prompt 'a fox' {SMALL} --out out.mp4"
    assert run(arguments) == 0
    before, to_frames = digest(here / "out.mp4"), media.video_to_frames
    monkeypatch.setattr(media, "video_to_frames", lambda video: Interrupted(to_frames(video)))
    assert run(f"{arguments} --seed 1") == 130
    assert digest(here / "out.mp4") == before and not list(here.glob(".out*"))


def script(arguments: str, **environment) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "sample.py"), "--model", "toy", "--device", "cpu", *shlex.split(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment})


def test_a_real_ctrl_c(here):
    before, seen = tree(here), b""
    with script("--prompt 'a fox' --steps 1000 --out new/out.mp4") as process:
        try:
            while b"/1000 [" not in seen and (byte := process.stderr.read(1)):  # the progress bar
                seen += byte
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, seen.decode()
    assert tree(here) == before


# --- bad input --------------------------------------------------------------------------------------------------------


def replace_file(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # else one would write through the link into the session's toy
    path.write_bytes(content)


def truncate(path: str, keep: float = 0.5) -> None:
    content = Path(path).read_bytes()
    replace_file(Path(path), content[: int(keep * len(content))])


def edit_json(path: str, **changes) -> None:
    replace_file(Path(path), json.dumps(json.loads(Path(path).read_text()) | changes).encode())


def edit_weights(path: str, change) -> None:
    """change(tensors) returns the tensors to write in their place."""
    tensors = change(load_file(path))
    Path(path).unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def without(count: int):
    """The last `count` tensors missing."""
    return lambda tensors: dict(list(tensors.items())[:-count])


def beside(count: int):
    """`count` tensors too many."""
    return lambda tensors: tensors | {f"stranger.{i}": torch.zeros(1) for i in range(count)}


def reshaped(key: str):
    return lambda tensors: tensors | {key: torch.zeros(3, 5)}


def shard(folder: str, stem: str = checkpoint.WEIGHTS) -> list[Path]:
    """Rewrites a network's weights in four shards or so, and returns them."""
    config = json.loads((Path(folder) / "config.json").read_text())
    tensors = load_file(Path(folder) / f"{stem}.safetensors")
    checkpoint.save(Path(folder), config, tensors, stem, shard=sum(t.nbytes for t in tensors.values()) // 4)
    shards = sorted(Path(folder).glob("*-of-*.safetensors"))
    assert len(shards) > 2
    return shards


def first_shard(damage, folder: str = "toy/transformer", stem: str = checkpoint.WEIGHTS):
    """A corruption: the network in shards, damage(path) done to the first of them."""
    return lambda: damage(shard(folder, stem)[0])


def foreign(path: Path) -> None:
    """Another shard in the place of this one."""
    shutil.copy(sorted(path.parent.glob("*-of-*.safetensors"))[1], path)


def other_size(path: Path) -> None:
    """The shard of a model of other size: all its tensors have the right names."""
    edit_weights(str(path), lambda tensors: {key: torch.zeros(2 * t.shape[0], *t.shape[1:]) for key, t in tensors.items()})


SMALL_CONFIG = dict(num_attention_heads=1, attention_head_dim=64, num_layers=1, time_embed_dim=32, text_embed_dim=64,
                    max_text_seq_length=64, sample_height=8, sample_width=8, sample_frames=9)


def new_base(**config):
    """The model folder "other": the toy with a small transformer of another kind."""
    save_transformer(Transformer(Config(**SMALL_CONFIG | config)), Path("other/transformer"))
    Path("other/model_index.json").write_text('{"base": "../toy"}')


def adapter_for(names=("to_q",), **config) -> None:
    """A Switch adapter for such a base, as "other.safetensors"."""
    model = Transformer(Config(**SMALL_CONFIG | {"use_rotary_positional_embeddings": True} | config))
    inject(model, 2, 2.0, names=names)
    save_adapter(model, Path("other.safetensors"), Adapter(rank=2, alpha=2.0))


def adapter_weights(change):
    return lambda: edit_weights("toy/switch/pytorch_lora_weights.safetensors", change)


def other_rank(tensors):
    """lora_B of another rank than lora_A."""
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    return tensors | {key: torch.zeros(tensors[key].shape[0], 3)}


def write(name: str, content) -> None:
    replace_file(Path(name), content if isinstance(content, bytes) else content.encode())


def tiff(name: str) -> None:
    Image.open("fox.png").save(name, compression="tiff_lzw")
    truncate(name, 0.9)


T2V = "--prompt 'a fox'"
SWITCH = f"{FOX} --adapter toy/switch"
ANIMAL = "--prompt 'a fox' --adapter toy/switch --image"
MANY = "--prompts list.jsonl"
SUGAR = "--image fox-alpha.png --prompt 'a fox' --model toy/sugar"
LONG = "x" * 300
Q = "transformer_blocks.0.attn1.to_q.weight"
T5_Q = "encoder.block.0.layer.0.SelfAttention.q.weight"

# What is done beforehand, the arguments, and what the message must say.
BAD = {
    # the image
    "image missing": (None, f"{ANIMAL} nowhere.png", ["nowhere.png"]),
    "image unreadable": (lambda: write("x.png", b"no image at all"), f"{ANIMAL} x.png", ["x.png"]),
    "image a folder": (lambda: Path("x.png").mkdir(), f"{ANIMAL} x.png", ["x.png"]),
    "image zero-sized": (lambda: write("x.png", b""), f"{ANIMAL} x.png", ["x.png", "empty"]),
    "image without pixels": (lambda: write("x.ppm", b"P6\n0 4\n255\n"), f"{ANIMAL} x.ppm", ["x.ppm"]),
    "image truncated": (lambda: truncate("fox.png"), f"{ANIMAL} fox.png", ["fox.png", "truncated"]),
    "image truncated, tiff": (lambda: tiff("x.tif"), f"{ANIMAL} x.tif", ["x.tif"]),
    "image all transparent": (lambda: Image.new("RGBA", (8, 8)).save("x.png"), f"{ANIMAL} x.png", ["empty"]),
    "image for a text-to-video model": (None, FOX, ["takes no image", "--adapter"]),
    "image missing for an image-to-video model": (None, f"{T2V} --model toy/i2v", ["--image"]),
    "mask missing": (None, f"{SWITCH} --mask nowhere.png", ["nowhere.png"]),
    "mask of another size": (lambda: Image.new("L", (9, 7)).save("x.png"), f"{SWITCH} --mask x.png", ["9x7", "80x60"]),
    "mask empty": (lambda: Image.new("L", (80, 60)).save("x.png"), f"{SWITCH} --mask x.png", ["mask", "empty"]),
    "mask without image": (None, f"{T2V} --adapter toy/switch --mask mask.png", ["--image"]),
    "mask for a first frame": (None, f"{FOX} --model toy/i2v --mask mask.png", ["--mask", "first frame"]),
    "mask and subject": (None, f"{SWITCH} --mask mask.png --subject fox", ["--mask", "--subject"]),
    "subject without image": (None, f"{T2V} --adapter toy/switch --subject fox", ["--image"]),
    # the prompt
    "prompt empty": (None, "--prompt ''", ["--prompt is empty"]),
    "prompt blank": (None, "--prompt '  '", ["--prompt is empty"]),
    "prompt forgotten": (None, "--seed 1", ["--prompt"]),
    "list missing": (None, "--prompts nowhere.jsonl", ["nowhere.jsonl"]),
    "list empty": (lambda: write("list.jsonl", "\n"), MANY, ["list.jsonl", "no prompts"]),
    "list not text": (lambda: write("list.jsonl", b"\xff\xfe"), MANY, ["list.jsonl"]),
    "list not JSON": (lambda: write("list.jsonl", '{"prompt": "a fox"}\nfox'), MANY, ["Line 2", "JSON"]),
    "line without prompt": (lambda: listing({"seed": 1}), MANY, ["Line 1", "prompt"]),
    "line with an empty prompt": (lambda: listing({"prompt": "a fox"}, {"prompt": " "}), MANY, ["Line 2", "prompt"]),
    "line with a word too many": (lambda: listing({"prompt": "a fox", "sede": 1}), MANY, ["Line 1", "seed"]),
    "line with an empty name": (lambda: listing({"prompt": "a fox", "name": ""}), MANY, ["ine 1", "name"]),
    "names twice": (lambda: listing(*2 * [{"prompt": "a", "name": "x"}]), MANY, ["x.mp4", "more than once"]),
    "line with a missing image": (lambda: listing({"prompt": "a", "image": "x.png"}), f"{MANY} --adapter toy/switch", ["x.png"]),
    "list into a file": (lambda: listing({"prompt": "a"}), f"{MANY} --out x.mp4", ["folder", "x.mp4"]),
    # numbers
    "frames 10": (None, f"{T2V} --frames 10", ["--frames 10", "9 and 17"]),
    "frames 8": (None, f"{T2V} --frames 8", ["--frames 8", "1 and 9"]),
    "frames 48": (None, f"{T2V} --frames 48", ["--frames 48", "41 and 49"]),
    "frames 0": (None, f"{T2V} --frames 0", ["--frames 0", "1 and 9"]),
    "frames negative": (None, f"{T2V} --frames -7", ["--frames -7", "1 and 9"]),
    "frames a word": (None, f"{T2V} --frames many", ["--frames", "many"]),
    "height 72": (None, f"{T2V} --height 72", ["--height 72", "64 and 80"]),
    "width 1": (None, f"{T2V} --width 1", ["--width 1", "multiple of 16"]),
    "width 0": (None, f"{T2V} --width 0", ["--width 0", "multiple of 16"]),
    "height negative": (None, f"{T2V} --height -32", ["--height -32", "multiple of 16"]),
    "steps negative": (None, f"{T2V} --steps -5", ["--steps -5"]),
    "steps zero": (None, f"{T2V} --steps 0", ["--steps 0"]),
    "steps beyond the schedule": (None, f"{T2V} --steps 1001", ["--steps 1001", "1000"]),
    "fps zero": (None, f"{T2V} --fps 0", ["--fps 0"]),
    "fps not a number": (None, f"{T2V} --fps nan", ["--fps nan"]),
    "seed beyond 64 bits": (None, f"{T2V} --seed {2**70}", ["--seed", str(2**70)]),
    "guidance for SUGAR": (None, f"{SUGAR} --guidance 3", ["--guidance", "--omega-text"]),
    "omega for a plain model": (None, f"{T2V} --omega-image 3", ["--omega-image", "SUGAR"]),
    "t-bar beyond T": (None, f"{SUGAR} --t-bar 1001", ["--t-bar 1001"]),
    "equation unknown": (None, f"{SUGAR} --equation 5", ["--equation"]),
    "device unknown": (None, f"{T2V} --device abacus", ["--device abacus"]),
    "flag unknown": (None, f"{T2V} --colour red", ["--colour"]),
    # where it goes
    "output a folder": (lambda: Path("x.mp4").mkdir(), f"{T2V} --out x.mp4", ["x.mp4", "folder"]),
    "output below a file": (None, f"{T2V} --out fox.png/x.mp4", ["fox.png/x.mp4"]),
    "output below a file, folder": (None, f"{T2V} --out fox.png/", ["fox.png"]),
    "output of another format": (None, f"{T2V} --out x.avi", ["x.avi", ".mp4", ".gif"]),
    "output name too long": (None, f"{T2V} --out {LONG}.mp4", [LONG]),
    "output in a folder that takes no files": (None, f"{T2V} --out /proc/x.mp4", ["/proc/x.mp4"]),
    # the model's folder
    "no such folder": (None, f"{T2V} --model ./nowhere", ["nowhere"]),
    "model a file": (None, f"{T2V} --model fox.png", ["fox.png", "folder"]),
    "model an empty folder": (lambda: Path("x").mkdir(), f"{T2V} --model x", ["x", "transformer"]),
    "hub id without network": (None, f"{T2V} --model nobody/nothing", ["nobody/nothing", "no network"]),
    "base on the hub without network": (
        lambda: edit_json("toy/sugar/model_index.json", base="nobody/nothing"), SUGAR, ["nobody/nothing", "no network"]),
    "Grounded SAM without network": (None, f"{SWITCH} --subject fox", ["grounding-dino", "no network"]),
    "CLIP without network": (lambda: shutil.rmtree("toy/clip"), SUGAR, ["clip", "no network"]),
    "no transformer": (lambda: shutil.rmtree("toy/transformer"), T2V, ["transformer"]),
    "no VAE": (lambda: shutil.rmtree("toy/vae"), T2V, ["vae"]),
    "no text encoder": (lambda: shutil.rmtree("toy/text_encoder"), T2V, ["text_encoder"]),
    "no tokenizer": (lambda: shutil.rmtree("toy/tokenizer"), T2V, ["tokenizer"]),
    "no config": (lambda: Path("toy/transformer/config.json").unlink(), T2V, ["transformer/config.json"]),
    "no config of the VAE": (lambda: Path("toy/vae/config.json").unlink(), T2V, ["vae/config.json"]),
    "no config of the text encoder": (
        lambda: Path("toy/text_encoder/config.json").unlink(), T2V, ["text_encoder/config.json"]),
    "no config of the scheduler": (
        lambda: Path("toy/scheduler/scheduler_config.json").unlink(), T2V, ["scheduler_config.json"]),
    "no config of CLIP": (lambda: Path("toy/clip/config.json").unlink(), SUGAR, ["clip/config.json"]),
    "no preprocessing of DINO": (
        lambda: Path("toy/dino/preprocessor_config.json").unlink(), SUGAR, ["dino/preprocessor_config.json"]),
    "config not JSON": (lambda: truncate("toy/transformer/config.json"), T2V, ["transformer/config.json"]),
    "config a list": (lambda: write("toy/vae/config.json", "[]"), T2V, ["vae/config.json"]),
    "config of another model": (
        lambda: edit_json("toy/transformer/config.json", _class_name="FluxTransformer2DModel"), T2V, ["FluxTransformer2DModel"]),
    "config with a word for a number": (
        lambda: edit_json("toy/transformer/config.json", num_layers="four"), T2V, ["transformer/config.json"]),
    "scheduler of another kind": (
        lambda: edit_json("toy/scheduler/scheduler_config.json", prediction_type="epsilon"), T2V, ["prediction_type", "epsilon"]),
    "tokenizer empty": (lambda: Path("toy/tokenizer/spiece.model").unlink(), T2V, ["tokenizer", "spiece.model"]),
    "tokenizer damaged": (lambda: truncate("toy/tokenizer/spiece.model"), T2V, ["spiece.model"]),
    # its weights
    "no weights": (lambda: Path(f"toy/transformer/{WEIGHTS}").unlink(), T2V, ["toy/transformer", WEIGHTS]),
    "weights truncated": (lambda: truncate(f"toy/transformer/{WEIGHTS}"), T2V, [f"transformer/{WEIGHTS}", "truncated"]),
    "weights zero-sized": (lambda: truncate(f"toy/vae/{WEIGHTS}", 0), T2V, [f"vae/{WEIGHTS}", "truncated"]),
    "text encoder truncated": (
        lambda: truncate("toy/text_encoder/model.safetensors"), T2V, ["text_encoder/model.safetensors", "truncated"]),
    "CLIP truncated": (lambda: truncate("toy/clip/model.safetensors"), SUGAR, ["clip/model.safetensors", "truncated"]),
    "shard missing": (first_shard(Path.unlink), T2V, ["00001-of", "missing"]),
    "shard truncated": (first_shard(lambda path: truncate(str(path))), T2V, ["00001-of", "truncated"]),
    "shard truncated by one byte": (
        first_shard(lambda path: path.write_bytes(path.read_bytes()[:-1])), T2V, ["00001-of", "truncated"]),
    "shard foreign": (first_shard(foreign), T2V, ["00001-of", "belong"]),
    "shard of a model of other size": (first_shard(other_size), T2V, ["00001-of", "shape"]),
    "shard of the VAE foreign": (first_shard(foreign, "toy/vae"), T2V, ["vae", "00001-of", "belong"]),
    "shard of the text encoder missing": (
        first_shard(Path.unlink, "toy/text_encoder", "model"), T2V, ["text_encoder/model-00001-of", "missing"]),
    "shard index damaged": (
        first_shard(lambda path: truncate(f"toy/transformer/{WEIGHTS}.index.json")), T2V, ["index.json"]),
    "keys missing": (lambda: edit_weights(f"toy/transformer/{WEIGHTS}", without(5)), T2V,
                     ["toy/transformer", "5 missing", "and 2 more"]),
    "keys unexpected": (lambda: edit_weights(f"toy/transformer/{WEIGHTS}", beside(7)), T2V,
                        ["toy/transformer", "7 unexpected", "stranger.0", "and 4 more"]),
    "keys missing and unexpected": (
        lambda: edit_weights(f"toy/vae/{WEIGHTS}", lambda t: beside(1)(without(1)(t))), T2V, ["1 missing", "1 unexpected"]),
    "keys of the text encoder missing": (
        lambda: edit_weights("toy/text_encoder/model.safetensors", lambda t: {k: v for k, v in t.items() if k != T5_Q}),
        T2V, ["text_encoder", "1 missing", T5_Q]),
    "keys of DINO missing": (lambda: edit_weights("toy/dino/model.safetensors", without(5)), SUGAR, ["dino", "5 missing"]),
    "a layer more than in the config": (
        lambda: edit_json("toy/transformer/config.json", num_layers=3), T2V, ["unexpected", "transformer_blocks.3"]),
    "a shape that does not fit": (
        lambda: edit_weights(f"toy/transformer/{WEIGHTS}", reshaped(Q)), T2V, [Q, "[3, 5]", "[128, 128]"]),
    "a shape of the text encoder that does not fit": (
        lambda: edit_weights("toy/text_encoder/model.safetensors", reshaped(T5_Q)), T2V, [T5_Q, "[3, 5]", "[64, 64]"]),
    "a text encoder of another width": (lambda: new_base(text_embed_dim=96), f"{T2V} --model other", ["64", "96"]),
    "a DINO of another width": (
        lambda: new_base(dino_dim=96, clip_dim=48, dino_tokens=65, clip_tokens=65),
        f"{FOX} --model other", ["dino", "48", "96"]),
    # the adapter and its base
    "no adapter": (None, f"{FOX} --adapter nowhere", ["nowhere"]),
    "adapter truncated": (
        lambda: truncate("toy/switch/pytorch_lora_weights.safetensors"), SWITCH, ["switch", "truncated"]),
    "adapter that is none": (None, f"{FOX} --adapter toy/transformer/{WEIGHTS}", [WEIGHTS, "LoRA"]),
    "adapter of a wider base": (
        lambda: adapter_for(num_attention_heads=4), f"{FOX} --adapter other.safetensors", ["other.safetensors", "another base"]),
    "adapter of a deeper base": (
        lambda: adapter_for(("transformer_blocks.7.attn1.to_q",), num_layers=8, num_attention_heads=2),
        f"{FOX} --adapter other.safetensors", ["other.safetensors", "another base", "transformer_blocks.7.attn1.to_q"]),
    "adapter half there": (adapter_weights(without(1)), SWITCH, ["switch", "not whole"]),
    "adapter of two ranks": (adapter_weights(other_rank), SWITCH, ["switch", "rank"]),
    "adapter on image-to-video": (None, f"{SWITCH} --model toy/i2v", ["cannot stand on", "CogVideoX-5b"]),
    "adapter on SUGAR": (None, f"{SWITCH} --model toy/sugar", ["cannot stand on", "CogVideoX-5b"]),
    "adapter on a base without rotary positions": (
        new_base, f"{SWITCH} --model other", ["cannot stand on", "CogVideoX-5b"]),
    "adapter on a base with a temporal patch": (
        lambda: new_base(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
        f"{SWITCH} --model other", ["cannot stand on", "CogVideoX-5b"]),
    "SUGAR on image-to-video": (
        lambda: new_base(in_channels=32, dino_dim=48, clip_dim=48, dino_tokens=65, clip_tokens=65),
        f"{FOX} --model other", ["SUGAR", "cannot stand on"]),
    "another size with learned positions": (
        lambda: new_base(in_channels=32, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True),
        f"{FOX} --model other --height 128", ["learned positions", "9 frames", "64x64"]),
}


def refused(capfd, arguments: str) -> str:
    """Runs sample.py, which must refuse: status 2, one line on standard error. Returns that line."""
    with warnings.catch_warnings(record=True) as raised:  # Python would print these as well
        warnings.simplefilter("default")
        status = run(arguments)
    errors = capfd.readouterr().err.splitlines() + [str(w.message) for w in raised if w.category is UserWarning]
    assert status == 2
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    assert errors[0].endswith((".", "\"")) or ":" in errors[0]
    return errors[0]


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test when sampling starts, or a network is brought into memory."""
    monkeypatch.setattr(sample.Sampler, "run", lambda *args: pytest.fail("the heavy work began"))
    for name in ("TextEncoder", "ImageEncoder", "load_vae", "load_transformer"):
        monkeypatch.setattr(sample, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_nothing_written(here, capfd, no_work, case):
    prepare, arguments, phrases = BAD[case]
    if prepare is not None:
        prepare()
    before = tree(here)
    capfd.readouterr()
    message = refused(capfd, f"--out new/ {arguments}")
    for phrase in phrases:
        assert phrase in message
    assert tree(here) == before


def test_a_subject_that_is_not_in_the_image(here, monkeypatch, capfd, no_work):
    before, nouns = tree(here), segmented(monkeypatch, None)
    message = refused(capfd, f"{SWITCH} --subject zebra --out new/out.mp4")
    assert nouns == ["zebra"] and "zebra" in message and "fox.png" in message
    assert tree(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_one_may_not_write_to(here, capfd, no_work):
    (here / "closed").mkdir(mode=0o500)
    assert "closed" in refused(capfd, f"{T2V} --out closed/out.mp4")


def test_one_bad_line_in_a_list_is_found_before_the_first_video(here, capfd, no_work):
    listing({"prompt": "a fox", "image": "fox.png"}, {"prompt": "a dog", "image": "nowhere.png"})
    before = tree(here)
    assert "nowhere.png" in refused(capfd, f"{MANY} --adapter toy/switch {SMALL} --out many")
    assert tree(here) == before


def test_the_script_itself_says_it_in_one_line_offline(here):
    """As a person sees it: a process, its exit status, its standard error."""
    before = tree(here)
    with script("--prompt 'a fox' --model nobody/nothing --out new/", HF_HUB_OFFLINE="1", HF_HOME=str(here)) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and not output
    lines = errors.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "nobody/nothing" in lines[0], lines
    assert tree(here) == before
