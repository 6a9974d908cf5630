"""The published datasets' own files, from the folder they lie in to a trained model: directly, and through a cache."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_readers import write_video
from test_subjects200k import subjects200k, views

import cache
import readers
import train_sugar
import train_switch

QUIET = ["--device", "cpu", "--validate-count", "0", "--micro-batch", "2"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Subjects200K's parquet, and a folder of videos with their captions; of either something is broken."""
    folder = tmp_path_factory.mktemp("published")
    colours = ("blue", "green", "white", "black", "grey", "pink")
    subjects200k(folder / "Subjects200K", [{"png": views(512, 8, "red", colour)} for colour in colours])
    (folder / "Subjects200K" / "data" / "train-00002.parquet").write_bytes(b"PAR1 and nothing more")
    (folder / "videos").mkdir()
    for name, seconds in (("a", 2), ("b", 3), ("c", 2), ("short", 0.5)):
        write_video(folder / "videos" / f"{name}.mp4", seconds=seconds)
        (folder / "videos" / f"{name}.txt").write_text(f"video {name} gets bright\n")
    (folder / "videos" / "torn.mp4").write_bytes((folder / "videos" / "a.mp4").read_bytes()[:500])
    (folder / "videos" / "torn.txt").write_text("a torn one\n")
    return folder


def steps(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def skipped(folder: Path) -> dict[int, str]:
    return {line["example"]: line["reason"] for line in map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())}


def test_switch_trains_on_published_files_and_on_caches_of_them(published, base, tmp_path, capfd):
    """A step of each phase, which takes every example once; the caches give what the files give."""
    common = ["--model", str(base), "--steps", "2", "--image-batch", "10", "--video-batch", "5", "--p", "0.5", "--rank", "4", *QUIET]
    phases = lambda seed: {train_switch.phase_of(step, train_switch.parse([*common, "--seed", str(seed)])) for step in range(2)}
    seed = ["--seed", str(next(seed for seed in range(99) if len(phases(seed)) == 2))]
    files = {"pairs": str(published / "Subjects200K"), "videos": str(published / "videos")}
    for stream, data in files.items():
        arguments = ["cache", "--as", stream, "--data", data, "--out", str(tmp_path / stream), *common[:2], "--device", "cpu", *seed]
        assert cache.main(arguments) == 0
        said = capfd.readouterr().out
        assert f"2 skipped, see {tmp_path / stream / 'skipped.jsonl'}" in said
        assert cache.main(arguments) == 0 and "; 0 of them now" in capfd.readouterr().out, "nothing is left to do"
        arguments[4] = str(tmp_path / stream)
        assert cache.main(arguments) == 2 and f"{tmp_path / stream} is a cache already" in capfd.readouterr().err
    for name, pairs, videos in (("plain", *files.values()), ("cached", tmp_path / "pairs", tmp_path / "videos")):
        data = ["--image-data", str(pairs), "--video-data", str(videos), "--out", str(tmp_path / name)]
        assert train_switch.main([*common, *seed, *data]) == 0
    plain, cached = steps(tmp_path / "plain"), steps(tmp_path / "cached")
    assert {step["stream"] for step in plain} == {"image", "video"}
    assert [step["loss"] for step in plain] == [step["loss"] for step in cached]
    one, two = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("plain", "cached"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for log in (tmp_path / "plain" / "videos", tmp_path / "videos"):
        short, torn = (skipped(log)[i] for i in (3, 4))
        assert "lasts 0.50 s" in short and "torn.mp4: it cannot be read" in torn
    for log in (tmp_path / "plain" / "pairs", tmp_path / "pairs"):
        assert skipped(log).keys() == {4, 5} and all("train-00002.parquet is truncated" in reason for reason in skipped(log).values())


def test_a_forgotten_source_is_named_and_one_that_nobody_reads_is_not_asked_for(published, base, tmp_path, capfd):
    """Else drawn creatures would be mixed in, without a word."""
    data, common = str(published / "Subjects200K"), ["--model", str(base), "--steps", "1", "--out", str(tmp_path / "run"), *QUIET]
    assert train_switch.main([*common, "--image-data", data]) == 2
    assert "--image-data is data of your own, and --video-data is of the toy's world" in capfd.readouterr().err
    assert train_sugar.main([*common, "--real-data", str(published / "videos")]) == 2
    assert "--real-data is data of your own, and --data is of the toy's world" in capfd.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert train_switch.main([*common, "--image-data", data, "--height", "64", "--strategy", "image-only", "--image-batch", "2"]) == 0
    assert [step["stream"] for step in steps(tmp_path / "run")] == ["image"]


def test_a_run_whose_data_have_grown_is_not_resumed(published, base, tmp_path, capfd):
    """The order of examples depends on their number: a position would mean another one."""
    shutil.copytree(published / "videos", tmp_path / "videos")
    run = ["--model", str(base), "--video-data", str(tmp_path / "videos"), "--strategy", "video-only", "--p", "1", "--video-batch", "2",
           "--out", str(tmp_path / "run"), "--broken", "1", *QUIET]
    assert train_switch.main([*run, "--steps", "2"]) == 0
    for suffix in (".mp4", ".txt"):
        shutil.copy(tmp_path / "videos" / f"a{suffix}", tmp_path / "videos" / f"d{suffix}")
    assert train_switch.main([*run, "--steps", "2"]) == 2
    assert "with examples of video = 5, and now it is 6" in capfd.readouterr().err


def test_sugar_trains_on_videos_with_their_subject_cut_out_and_on_triplets(published, base, tmp_path, monkeypatch):
    """A step of either. Grounded SAM answers with a square, and finds nothing in the second video."""

    class Segmenter:
        def __init__(self, model, device):
            pass

        def __call__(self, image, words):
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).rectangle((8, 8, 39, 39), fill=255)
            return None if "video b" in words else mask

    monkeypatch.setattr(readers, "GroundedSAM", Segmenter)
    lines = []
    for name in "ac":
        Image.new("RGB", (40, 30), "red").save(published / f"{name}.png")
        lines.append({"video": f"videos/{name}.mp4", "text": "a golden lamp", "image": f"{name}.png", "noun": "lamp"})
    (published / "triplets.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = ["--model", str(base), "--real-data", str(published / "videos"), "--data", str(published), "--steps", "1", "--batch", "5",
           "--p", "1", "--strategy", "tsf", "--out", str(tmp_path / "run"), *QUIET]
    assert train_sugar.main(run) == 0
    assert [step["stream"] for stage in ("real", "mixed") for step in steps(tmp_path / "run" / stage)] == ["real", "synthetic"]
    assert (tmp_path / "run" / "transformer" / "config.json").exists()
    reasons = skipped(tmp_path / "run" / "subjects")
    assert reasons.keys() == {1, 3, 4} and "no 'video b gets bright' was found" in reasons[1]
    assert len(list((tmp_path / "run" / "subjects" / "cutouts").glob("*.png"))) == 2
    assert not (tmp_path / "run" / "triplets").exists(), "nothing was wrong with them"
