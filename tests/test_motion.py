"""Switch's temporal protocol, on the toy's world: who moves how far, and whether a model moves its subjects so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_i3d import PUBLISHED, random_weights

import evaluate
import media
import motion
import untrained
import world
from data import Broken
from media import Clip
from readers import Videos

PIXELS = SimpleNamespace(camera=10, small=25, medium=50)


@pytest.mark.parametrize("subject,background,height,expected", [
    (0, 0, 480, "small"), (25, 10, 480, "small"), (25.1, 0, 480, "medium"), (50, 0, 480, "medium"), (50.1, 0, 480, "large"),
    (30, 10.1, 480, None), (30, 1, 64, "large"), (30, 0, 960, "small"), (4, 1.4, 64, None)])
def test_classes_are_the_papers(subject, background, height, expected):
    found, why = motion.class_of(subject, background, height, PIXELS)
    assert found == expected and bool(why) == (expected is None)


def test_flow_is_taken_from_the_first_frame():
    seen = []

    def flow(one, two):
        seen.append((one[0, 0, 0, 0].item(), two[0, 0, 0, 0].item()))
        return torch.stack([torch.full((4, 5), 3.0), torch.full((4, 5), 4.0)])[None]

    frames = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 4, 5, 3)).copy()
    lengths = motion.flow_from_first(frames, flow)
    assert seen == [(0, i) for i in range(1, 5)] and lengths.shape == (4, 4, 5) and (lengths == 5).all()


def test_the_protocol_from_videos_to_distances(tmp_path, capsys, monkeypatch):
    untrained.init(tmp_path / "toy")
    motions = ["still", "left", "right", "still", "up", "down"]

    def masked(rng, split):
        scene = world.sample_scene(rng, split, motion=motions[drawn.append(0) or len(drawn) - 1])
        return {"video": world.render(scene), "masks": world.masks(scene), "text": world.caption(scene, rng)}

    drawn = []
    monkeypatch.setattr(world, "sample_masked", masked)
    command = ["motion", "--out", str(tmp_path / "run"), "--own", str(tmp_path / "toy"), "--count", "6", "--device", "cpu", "--",
               "--model", str(tmp_path / "toy"), "--adapter", str(tmp_path / "toy" / "switch"), "--steps", "1", "--device", "cpu"]
    assert evaluate.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "classes.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row, scene in zip(rows, motions):  # what stands still is told from what moves
        assert row["subject"] < 0.3 if scene == "still" else row["subject"] > 2 * row["background"] and row["subject"] > 2, (scene, row)
        assert row["kept"] or row["background"] > 10 * 64 / 480
    assert [row["class"] for row in rows if row["subject"] < 0.3] == ["small"] * 2
    found = json.loads((tmp_path / "run" / "motion.json").read_text())
    assert "own DINO" in found["by"] and sum(of["videos"] for of in found["classes"].values()) == sum(row["kept"] for row in rows)
    assert all(of["distance"] > 0 for of in found["classes"].values()) and "| Switch (the paper, FVD) | 512.30" in capsys.readouterr().out
    asked = [json.loads(line) for line in (tmp_path / "run" / "list.jsonl").read_text().splitlines()]
    assert len({line["seed"] for line in asked}) == len(asked), "a noise of its own for each"
    assert evaluate.main([*command[:3], "--seed", "1", *command[3:]]) == 2
    assert "were made with seed = 0, and now it is 1" in capsys.readouterr().err, "videos of other clips are not reused"
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.startswith(f"{found['by']}; classes by classical") and found["flow"].startswith("classical") and table.splitlines()[-1].count("videos)") == len(found["classes"])


def test_videos_of_ones_own_with_i3d(tmp_path, capsys, monkeypatch):
    """Real files, with a segmenter that always says the middle; what cannot be used is listed, and so is what was damaged later."""
    untrained.init(tmp_path / "toy")
    data, out = tmp_path / "data", tmp_path / "run"
    for i, scene in enumerate(("left", "still", "up")):
        media.save_video(world.render(world.sample_scene(np.random.default_rng(i), "test", motion=scene)), data / f"{i}.mp4", 8, {})
    media.save_video(np.zeros((1, 64, 64, 3), np.uint8), data / "one.mp4", 8, {})
    (data / "damaged.mp4").write_bytes(b"nothing")
    names = ("0.mp4", "1.mp4", "2.mp4", "one.mp4", "damaged.mp4", "gone.mp4")
    (data / "videos.csv").write_text("video,caption\n" + "".join(f"{name},a creature\n" for name in names))
    torch.save(random_weights(PUBLISHED), tmp_path / "i3d.pt")
    middle = np.zeros((64, 64), np.uint8)
    middle[16:48, 16:48] = 255
    monkeypatch.setattr(motion, "GroundedSAM", lambda *_: lambda image, noun: Image.fromarray(middle))
    monkeypatch.setattr(motion, "find", lambda *_: tmp_path / "toy" / "dino")
    command = ["motion", "--out", str(out), "--data", str(data / "videos.csv"), "--own", str(tmp_path / "toy"), "--device", "cpu", "--i3d",
               str(tmp_path / "i3d.pt"), "--camera", "1000", "--small", "999", "--medium", "1000", "--frames", "9", "--height", "64",
               "--width", "64", "--", "--model", str(tmp_path / "toy"), "--adapter", str(tmp_path / "toy" / "switch"), "--steps", "1"]
    assert evaluate.main([*command, "--frames", "17"]) == 2 and "--frames is not for sample.py here" in capsys.readouterr().err
    assert evaluate.main(command) == 0
    rows = {row["id"]: row for row in map(json.loads, (out / "classes.jsonl").read_text().splitlines())}
    assert len(rows) == 6 and sum(row["kept"] for row in rows.values()) == 3
    assert all(any(name in row.get("why", "") for row in rows.values()) for name in names[3:])
    found = json.loads((out / "motion.json").read_text())
    assert "FVD, by I3D" in found["by"] and found["classes"]["small"]["videos"] == 3 and found["classes"]["small"]["distance"] >= 0
    assert not found["unreadable"] and "unreadable" not in (out / "table.md").read_text()
    first = sorted((out / "videos").glob("*.mp4"))[0]
    first.write_bytes(b"damaged")
    assert evaluate.main(command) == 0
    found = json.loads((out / "motion.json").read_text())
    assert list(found["unreadable"]) == [first.stem] and found["classes"]["small"]["videos"] == 2
    assert f"unreadable: {first}" in (out / "table.md").read_text()


def test_what_training_saw_is_left_out(tmp_path, seed):
    names = [f"{i:03d}.mp4" for i in range(200)]
    (tmp_path / "videos.csv").write_text("video,caption\n" + "".join(f"{name},a dog\n" for name in names))
    clip, share = Clip(9, 64, 64, 8), float(np.random.default_rng(seed).uniform(0.01, 0.9))
    trained = {row.video for row in Videos(tmp_path / "videos.csv", clip, seed % 1000, share).rows}
    args = evaluate.parse(["motion", "--out", str(tmp_path), "--data", str(tmp_path / "videos.csv"), "--trained-share", str(share),
                           "--trained-seed", str(seed % 1000)])
    tested = []
    count, video = motion.videos_of(args, clip, lambda: None)
    for i in range(count):
        with pytest.raises(Broken) as error:  # there is no file, which the sentence names
            video(i)
        tested.append(str(error.value).split("/")[-1].split()[0])
    assert sorted([*tested, *trained]) == names


@pytest.mark.parametrize("flags,said", [
    ("--camera nan", "--camera nan --small 25 --medium 50: choose pixels from 0 up"), ("--small -5", "choose pixels from 0 up"),
    ("--small 60", "--small no more than --medium"), ("--medium inf", "choose pixels"), ("--frames 17", "--frames 17 is for --data"),
    ("--height 480", "the toy's videos have 9 frames of 64x64"), ("--trained-seed 3", "--trained-seed 3 has no effect without --trained-share"),
    ("--data DATA --frames 10", "--frames 10: a video has 1 or 8k+1 frames"), ("--data DATA --frames 1", "motion takes 9 frames at least"),
    ("--data DATA --height 50", "--height 50 is not a multiple of 16"), ("--data DATA", "takes no image: add a Switch --adapter"),
    ("--data NOWHERE --no-image", "There is no")])
def test_what_cannot_be_is_said_before_any_video_is_classified(flags, said, base, tmp_path, capsys, monkeypatch):
    for name in ("classify",) * ("NOWHERE" not in flags) + ("GroundedSAM",):
        monkeypatch.setattr(motion, name, lambda *_: pytest.fail("it had begun"))
    (tmp_path / "DATA.csv").write_text("video,caption\nnone.mp4,a dog\n")
    flags = flags.replace("DATA", str(tmp_path / "DATA.csv")).replace("NOWHERE", str(tmp_path / "nowhere.csv"))
    monkeypatch.setattr(motion, "find", lambda *_: base / "dino")
    assert evaluate.main(["motion", *flags.split(), "--out", str(tmp_path / "run"), "--own", str(base), "--device", "cpu", "--", "--model", str(base)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("share", ["1", "-0.1", "nan"])
def test_all_cannot_have_been_trained_on(share, tmp_path, capsys):
    assert evaluate.main(["motion", "--out", str(tmp_path / "run"), "--trained-share", share]) == 2
    assert f"--trained-share {float(share)}: choose a share" in capsys.readouterr().err
