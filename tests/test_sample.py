"""sample.py: an image and a prompt become a video; what is wrong with the input is said first, in one sentence."""

import json
import os
import re
import shlex
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import media
import pipeline
import sample
from cli import BOX, FOX, SMALL, digest, frames_of, listing, metadata, run, script, segmented, tree

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_prompts_that_differ_have_files_that_differ():
    prompts = ["a fox", "A fox is jumping, in the snow!", "\u4e00\u53ea\u72d7", "\u4e00\u53ea\u732b", "caf\u00e9", "caf\u00e8", "a " + 40 * "fox ", "a " + 41 * "fox "]
    names = [sample.slug(prompt) for prompt in prompts]
    assert len(set(names)) == len(names) and names[:2] == ["a-fox", "a-fox-is-jumping-in-the-snow"]
    assert all(name.isascii() and len(name) < 80 for name in names)


def test_a_line_of_a_list_ends_where_json_says(tmp_path):
    (tmp_path / "list.jsonl").write_bytes('\ufeff{"prompt": "a fox\u2028in the snow"}\r\n\n{"prompt": "a dog"}'.encode())
    requests = sample.read_listing(tmp_path / "list.jsonl", pipeline.Request("", "", 0, tmp_path))
    assert [request.prompt for request in requests] == ["a fox\u2028in the snow", "a dog"]


def test_half_precision_samples_too(sampled):
    for dtype in ("bf16", "fp16"):
        assert sampled(f"--prompt 'a fox' --dtype {dtype}").isfinite().all(), dtype


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


CHANGES = {
    "--prompt 'a fox' --guidance 3": ["--prompt 'a cat'", "--negative-prompt blurry", "--guidance 1", "--steps 3", "--scheduler dpm",
                                      "--seed 1", "--dtype bf16"],
    "--prompt 'a fox' --height 64": ["--tile"],
    "--prompt 'a fox' --image fox-alpha.png --model toy/sugar": [
        "--omega-image 1", "--omega-text 1", "--equation 1", "--t-bar 0", "--t-bar 0 --drop clip",
        "--t-bar 0 --drop both", "--image frog.png", "--prompt 'a cat'"],
    "--prompt 'a fox' --image fox.png --adapter toy/switch": [
        "--image frog.png", "--fit pad", "--mask mask.png", "--guidance 3"],
    "--prompt 'a fox' --image fox.png --model toy/i2v": ["--image frog.png", "--fit pad", "--guidance 3"],
}


@pytest.mark.parametrize("arguments", CHANGES)
def test_each_setting_changes_the_video(sampled, arguments):
    before = sampled(arguments)
    assert before.isfinite().all()
    for change in CHANGES[arguments]:
        after = sampled(f"{arguments} {change}")
        assert after.shape == before.shape and not torch.allclose(after, before, atol=1e-6), f"{change} has no effect"


def test_sugar_drops_nothing_by_default(sampled):
    """Steps run 999..0, and only from t_bar = 1000 up is something dropped."""
    plain = "--image fox-alpha.png --prompt 'a fox' --model toy/sugar"
    assert torch.equal(sampled(plain), sampled(f"{plain} --t-bar 1000"))
    assert not torch.equal(sampled(plain), sampled(f"{plain} --t-bar 999 --drop both"))


# --- the image --------------------------------------------------------------------------------------------------------

METHODS = {"switch": "--adapter toy/switch", "sugar": "--model toy/sugar"}


@pytest.mark.parametrize("method", METHODS)
def test_without_an_image_a_subject_model_makes_a_video_from_text(here, method):
    assert run(f"--prompt 'a fox' {METHODS[method]} {SMALL} --out out.gif") == 0
    assert frames_of(here / "out.gif").shape == (9, 32, 48, 3)
    assert not list(here.glob("out-*.png"))


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("design,same", [("a", True), ("b", False)])
def test_design_a_ignores_the_image_end_to_end(here, sampled, design, same):
    config = here / "toy/sugar/transformer/config.json"
    changed = {**json.loads(config.read_text()), "design": design}
    config.unlink()  # a link to the toy that all tests share
    config.write_text(json.dumps(changed))
    one, two = (sampled(f"--image {image} --prompt 'a fox' --model toy/sugar") for image in ("fox-alpha.png", "frog.png"))
    assert np.array_equal(one, two) == same


def test_sugar_warns_when_the_background_counts_as_subject(here, capsys):
    assert run(f"{FOX} --model toy/sugar {SMALL} --out out.gif") == 0
    assert "warning" in capsys.readouterr().err
    assert run(f"--image fox-alpha.png --prompt 'a fox' --model toy/sugar {SMALL} --out out.gif") == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name, mode", [
    ("grey.png", "L"), ("palette.png", "P"), ("deep.png", "I;16"), ("print.jpg", "CMYK")])
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
    read, encode = [], sample.Sampler.encode_text
    monkeypatch.setattr(sample.Sampler, "encode_text", lambda self, prompts: read.extend(prompts) or encode(self, prompts))
    assert run(f"--image fox.png --prompt '{prompt}' {cut} --adapter toy/switch {SMALL} --out out.gif") == 0
    assert read[0] == wanted
    assert metadata(here / "out.gif")["prompt"] == prompt


# --- many prompts -----------------------------------------------------------------------------------------------------


def test_a_subject_is_looked_for_once_in_an_image_of_many_prompts(here, monkeypatch):
    nouns = segmented(monkeypatch, Image.open("mask.png"))
    listing(*({"prompt": prompt, "image": "fox.png", "subject": noun} for prompt, noun in (("a fox", "fox"), ("a fox runs", "fox"), ("a dog", "dog"))))
    assert run(f"--prompts list.jsonl --adapter toy/switch {SMALL} --out many") == 0
    assert nouns == ["fox", "dog"] and len(list(here.glob("many/*-cutout.png"))) == 3


def test_a_list_of_prompts_gives_the_videos_that_single_runs_give(here):
    (here / "pictures").mkdir()
    shutil.copy("fox.png", "pictures/fox.png")
    (here / "pictures/list.jsonl").write_text(
        '{"prompt": "a fox", "seed": 4, "image": "fox.png", "name": "one"}\n\n'
        '{"prompt": "a dog", "image": "fox.png"}\n')
    assert run(f"--prompts pictures/list.jsonl --adapter toy/switch {SMALL} --out many") == 0
    assert sorted(path.name for path in (here / "many").glob("*.mp4")) == ["0003-a-dog.mp4", "one.mp4"]
    assert run(f"--image pictures/fox.png --prompt 'a fox' --seed 4 --adapter toy/switch {SMALL} --out one.mp4") == 0
    assert digest(here / "one.mp4") == digest(here / "many/one.mp4")


def test_a_flag_for_some_of_a_list_is_no_mistake_of_the_others(here):
    """Be they those that are left of a run that was stopped."""
    listing({"prompt": "a fox", "image": "fox-alpha.png", "name": "a"}, {"prompt": "a dog", "name": "b"})
    arguments = f"--prompts list.jsonl {SMALL} --out many --model toy/sugar --omega-image 3"
    assert run(arguments) == 0
    (here / "many/b.mp4").unlink()
    assert run(arguments) == 0 and (here / "many/b.mp4").exists()


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


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, order", [
    ("--image fox.png --adapter toy/switch", "T5EncoderModel VAE Transformer VAE"),
    ("--image fox-alpha.png --model toy/sugar", "T5EncoderModel Dinov2Model CLIPVisionModel Transformer VAE")])
def test_networks_come_to_the_device_one_at_a_time(here, monkeypatch, arguments, order):
    visits, inside, on_device = [], [], sample.Sampler.on_device

    @contextmanager
    def watched(self, network, *args, **kwargs):
        assert not inside, f"{type(network).__name__} joins {inside}"
        inside.append(type(network).__name__)
        visits.append(type(network).__name__)
        with on_device(self, network, *args, **kwargs) as network:
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
    monkeypatch.setattr(pipeline, "denoise", interrupt)
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
