"""The papers' scores beside hand-computed clips and transformers itself; the protocol from prompts to table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import media
import prompts
import scorers
import world
from checkpoint import BadInput
from data import ToyTest
from readers import CLASSES
from scorers import CLIP, DINO, Scorers, bootstrap, consistency, moves, pictures, resized


def texture(seed: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A smooth random picture, uint8 [height, width, 3]."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)).byte().numpy()


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_consistency_by_hand():
    angles = torch.tensor([0.0, 0.3, 0.9, 2.5])  # features on a circle: a cosine is that of the difference of angles
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    cos = lambda x: max(np.cos(x), 0)
    by_hand = [(cos(0.3) + cos(0.3)) / 2, (cos(0.6) + cos(0.9)) / 2, (cos(1.6) + cos(2.5)) / 2]
    assert consistency(features) == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert consistency(features[:1].repeat(5, 1)) == pytest.approx(1) and np.isnan(consistency(features[:1]))


@pytest.mark.parametrize("frames,fps,moving,expected", [
    (9, 8, 2, 1), (9, 8, 1, 0),  # round(9 / 4) = 2 pairs must move
    (10, 8, 2, 1), (10, 8, 1, 0),  # round(2.5) is 2: half to even
    (14, 8, 4, 1), (14, 8, 3, 0),  # round(3.5) is 4
    (18, 16, 2, 1), (18, 16, 1, 0),  # every second frame: 9 are left
    (49, 8, 12, 1), (49, 8, 11, 0)])
def test_enough_pairs_must_move(frames, fps, moving, expected):
    seen = []

    def magnitudes(few):
        seen.append(len(few))
        threshold = 6 * 48 / 256
        return np.array([threshold + 0.01] * moving + [threshold] * (len(few) - 1 - moving))

    assert moves(np.zeros((frames, 48, 64, 3), np.uint8), fps, magnitudes) == expected
    assert seen == [len(range(0, frames, max(1, round(fps / 8))))]


def test_a_still_clip_does_not_move_and_a_moving_one_does(seed):
    large = texture(seed, 128, 160)
    still = np.repeat(large[None, :64, :96], 9, axis=0)
    moving = np.stack([large[4 * i : 64 + 4 * i, 3 * i : 96 + 3 * i] for i in range(9)])  # 5 pixels a frame, 1.5 would do
    from flow import Flow, flow_magnitude

    flow = Flow()
    found = [moves(clip, 8, lambda frames: flow_magnitude(frames, flow)) for clip in (still, moving, moving[:1])]
    assert found[:2] == [0, 1] and np.isnan(found[2])
    assert np.isnan(moves(still[:2], 8, lambda frames: np.zeros(1)))  # of which no pair at all would have to move


def test_the_bootstrap_is_the_normal_interval_for_many_values(seed):
    values = np.random.default_rng(seed).normal(3, 2, 400)
    mean, low, high = bootstrap(list(values) + [float("nan")])
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.12) and low < mean < high
    assert bootstrap([0.5] * 10) == (0.5, 0.5, 0.5) and np.isnan(bootstrap([float("nan")])[0])


def test_the_bootstrap_draws_subjects_with_all_their_videos(seed):
    """30 subjects of 18 videos that differ by their subject alone are 30 values, not 540."""
    means = np.random.default_rng(seed).normal(0, 1, 30)
    values, of = np.repeat(means, 18), [f"subject {i}" for i in range(30) for _ in range(18)]
    mean, low, high = bootstrap(list(values), of)
    assert mean == pytest.approx(means.mean()) and (high - low) / 2 == pytest.approx(1.96 * means.std() / 30**0.5, rel=0.15)
    assert bootstrap(list(values), of[:1] * 540) == pytest.approx((mean, np.nan, np.nan), nan_ok=True)
    few = np.where(np.arange(540) < 500, np.nan, values)  # nor are those that were not measured counted
    assert bootstrap(list(few), of)[0] == pytest.approx(few[500:].mean())


# --- networks beside transformers -------------------------------------------------------------------------------------


def test_dino_is_transformers_and_positions_are_the_authors(tmp_path, seed):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)  # as the hub's: no pooler
    ours, theirs = DINO(str(tmp_path)), ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    pixels = torch.rand(2, 3, 64, 64)
    statistics = [torch.tensor(x).view(3, 1, 1) for x in scorers.IMAGENET]
    normal = (pixels - statistics[0]) / statistics[1]
    with torch.no_grad():
        expected = F.normalize(theirs(pixel_values=normal).last_hidden_state[:, 0], dim=-1)
        assert (ours(pixels) - expected).norm() < 1e-5 * expected.norm()
        wide = torch.rand(1, 3, 64, 96)
        near = F.normalize(theirs(pixel_values=(wide - statistics[0]) / statistics[1],
                                  interpolate_pos_encoding=True).last_hidden_state[:, 0], dim=-1)
    found = ours(wide)
    assert 0 < (found - near).norm() < 0.2  # not transformers' positions, but not far from them
    # The authors' formula, written out: a grid of 4 x 4 becomes 4 x 6, by the factors 4.1 / 4 and 6.1 / 4.
    known = ours.vit.embeddings.position_embeddings
    grid = F.interpolate(known[0, 1:].T.view(1, 32, 4, 4), scale_factor=(4.1 / 4, 6.1 / 4), mode="bicubic")
    assert torch.equal(ours.positions(None, 64, 96)[0, 1:], grid[0].flatten(1).T)
    assert torch.equal(ours.positions(None, 64, 64), known)
    assert not torch.equal(ours.positions(None, 64, 70), known), "as many patches, but not a square: the authors interpolate"


def test_clip_is_transformers(base, seed):
    from transformers import AutoTokenizer, CLIPModel

    ours, theirs = CLIP(str(base / "clip")), CLIPModel.from_pretrained(base / "clip", dtype=torch.float32).eval()
    pixels, text = torch.rand(3, 3, ours.side, ours.side), "a golden creature in the snow"
    words = AutoTokenizer.from_pretrained(base / "clip")([text], return_tensors="pt")
    with torch.no_grad():
        given = theirs(pixel_values=(pixels - 0.5) / 0.5, **words)
    assert (ours(pixels) - given.image_embeds).norm() < 1e-5 * given.image_embeds.norm()
    assert (ours.text(text) - given.text_embeds[0]).norm() < 1e-5 * given.text_embeds.norm()


def test_scores_are_those_that_transformers_gives(base, tmp_path, seed):
    """Every score of the networks for a clip that flickers between two pictures, beside transformers' own preprocessing."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel

    vits = {}
    for name, wide in (("dino-b16", 48), ("dino-s16", 32)):
        config = ViTConfig(hidden_size=wide, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=224, patch_size=16)
        ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / name)
        vits[name] = ViTModel.from_pretrained(tmp_path / name, add_pooling_layer=False).eval()
    mean, std = (list(value) for value in scorers.IMAGENET)
    one, two, subject = (texture(seed + i, 48, 64) for i in range(3))
    clip = CLIPModel.from_pretrained(base / "clip", dtype=torch.float32).eval()
    side = CLIP(str(base / "clip")).side
    clip_pixels = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    dino_pixels = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224, image_mean=mean, image_std=std)

    def unit(network, pixels):
        with torch.no_grad():
            return F.normalize(network(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    def clip_unit(pixels):
        with torch.no_grad():
            return F.normalize(clip.visual_projection(clip.vision_model(pixels).pooler_output), dim=-1)

    def flicker(features):  # one, two, one, two, one: by hand
        c = (features[0] @ features[1]).clamp(min=0).item()
        return (c + (c + 1) / 2) / 2

    with torch.no_grad():
        words = F.normalize(clip.text_projection(clip.text_model(**AutoTokenizer.from_pretrained(base / "clip")(
            ["a creature"], return_tensors="pt")).pooler_output), dim=-1)[0]
    shown = [Image.fromarray(picture) for picture in (one, two, subject)]
    small, large = (pixels(shown, return_tensors="pt").pixel_values for pixels in (clip_pixels, dino_pixels))
    # VBench's: float tensors, without antialiasing; the subject's whole width, the background's middle.
    raw = torch.from_numpy(np.stack([one, two])).permute(0, 3, 1, 2).float() / 255
    wide = F.interpolate(raw, (224, 298), mode="bilinear")
    vits["dino-b16"].embeddings.interpolate_pos_encoding = DINO(str(tmp_path / "dino-b16")).positions  # tested above
    with torch.no_grad():
        subject_of = F.normalize(vits["dino-b16"](pixel_values=(wide - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1),
                                                  interpolate_pos_encoding=True).last_hidden_state[:, 0], dim=-1)
    middle = F.interpolate(raw, (side, int(side * 64 / 48)), mode="bicubic")
    left = round((middle.shape[-1] - side) / 2)
    weights = torch.tensor([3, 2]) / 5  # of the two pictures
    dino, likeness = unit(vits["dino-s16"], large), clip_unit(small)
    expected = {"subject": flicker(subject_of), "background": flicker(clip_unit((middle[..., left : left + side] - 0.5) / 0.5)),
                "dino_i": (dino[:2] @ dino[2] @ weights).item(), "clip_i": (likeness[:2] @ likeness[2] @ weights).item(),
                "clip_t": (likeness[:2] @ words @ weights).item()}
    published = {"dino-b16": str(tmp_path / "dino-b16"), "dino-s16": str(tmp_path / "dino-s16"), "clip-b32": str(base / "clip")}
    found, without = Scorers(published=published)(np.stack([one, two, one, two, one]), 8, "a creature", shown[2])
    assert without == {} and found.keys() == expected.keys()
    for name, value in expected.items():
        # Networks at random: the likeness of all pictures is near 1, and what counts is how far from it.
        assert found[name] == pytest.approx(value, abs=2e-3 * (1 - value) + 1e-6), name


def test_pictures_are_resized_by_their_shorter_side():
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 40:] = 255
    assert resized(frames, 20, "bilinear").shape == (2, 3, 20, 40)
    middle = pictures([Image.fromarray(frames[0])], 20)
    assert middle.shape == (1, 3, 20, 20) and middle[..., :8].max() < 0.02 and middle[..., 12:].min() > 0.98


# --- the protocol -----------------------------------------------------------------------------------------------------


def dreambench(folder: Path) -> Path:
    """30 subjects: as many of each class as DreamBench has."""
    counts = {"dog": 7, "cat": 2, "stuffed animal": 3, "toy": 5, "cartoon": 1, "backpack": 2, "sneaker": 2}
    lines, nouns = [], [noun for kind in CLASSES.values() for noun in kind]
    for noun in nouns:
        for i in range(counts.get(noun, 1)):
            subject = f"{noun.replace(' ', '_')}{i}"
            (folder / "dataset" / subject).mkdir(parents=True)
            Image.new("RGB", (32, 32), "red").save(folder / "dataset" / subject / "00.jpg")
            lines.append(f"{subject},{noun}")
    (folder / "dataset" / "prompts_and_classes.txt").write_text("subject_name,class\n" + "\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("which,count", [("sugar", 540), ("switch", 120)])
def test_the_papers_pairs(which, count, tmp_path):
    args = evaluate.parse(["generate", "--set", which, "--dreambench", str(dreambench(tmp_path)), "--out", str(tmp_path / "out")])
    rows = evaluate.rows_of(args)
    assert len(rows) == count == len({row["name"] for row in rows}) and len({row["subject"] for row in rows}) == 30
    assert all("sks" not in row["prompt"] and row["noun"] in row["prompt"] and "/" not in row["name"] for row in rows)
    assert all(re.sub(r"-\d+$", "", row["name"]) == row["prompt"] for row in rows)  # how VBench reads a prompt off a name
    assert all(len(row["name"].encode()) < 200 for row in rows)
    if which == "sugar":
        kinds = {row["subject"]: row["kind"] for row in rows}.values()
        assert sum(row["restored"] for row in rows) == 5 * list(kinds).count("active object") + 3 * list(kinds).count("static object") > 0


def test_prompts_are_whole():
    assert all(len(set(texts)) == 18 and all("sks" in text for text in texts) for texts in prompts.SUGAR.values())
    assert {kind: sum(k == kind for k, _ in prompts.RESTORED) for kind in CLASSES} == {"animal": 0, "active object": 5, "static object": 3}


def truth(folder: Path, count: int, looks, seed: int, render) -> Path:
    """A folder as generate leaves it, with videos that render(example) makes."""
    args = evaluate.parse(["generate", "--out", str(folder), "--count", str(count), "--seed", str(seed), *(["--looks"] if looks else [])])
    rows = evaluate.rows_of(args)
    evaluate.save_portraits(folder, rows)
    (folder / "videos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, row in enumerate(rows):
        example = ToyTest(seed, tuple(world.LOOKS) if looks else ("plain",))[i]
        media.save_video(render(example), folder / "videos" / f"{row['name']}.mp4", 8, {})
    return folder


def test_true_clips_score_at_the_top_and_noise_moves_nowhere(base, tmp_path, seed, capsys):
    rng = np.random.default_rng(seed)
    good = truth(tmp_path / "good", 4, True, seed, lambda example: example.video)
    bad = truth(tmp_path / "bad", 4, True, seed, lambda example: rng.integers(0, 256, example.video.shape, dtype=np.uint8))
    assert evaluate.main(["score", str(good), str(bad), "--own", str(base)]) == 0
    said = capsys.readouterr().out
    means = [json.loads((folder / "scores.json").read_text())["means"] for folder in (good, bad)]
    assert all(means[0][name]["mean"] >= 0.75 for name in ("identity", "motion", "background_exact", "look"))
    drawn = [ToyTest(seed, tuple(world.LOOKS))[i] for i in range(4)]
    assert means[0]["movement"]["mean"] == pytest.approx(np.mean([clip.measure(clip.video)["movement"] for clip in drawn]), abs=0.1)
    assert means[1]["movement"]["mean"] < 0.1
    # Four noises may well hit what was asked of them; what the world says of each is what was written, hit or not.
    for folder, mean in zip((good, bad), means):
        said_by_world = [clip.measure(media.read_video(folder / "videos" / f"{row['name']}.mp4"))
                         for clip, row in zip(drawn, evaluate.read_videos(folder))]
        for name in ("identity", "motion", "background", "look", "movement"):
            written = mean["background_exact" if name == "background" else name]["mean"]
            assert written == pytest.approx(np.mean([scores[name] for scores in said_by_world]), abs=1e-6)
    assert "| good (4 videos) | **" in said and "not measured: ViCLIP: it needs" in said and "classical pyramidal flow" in said
    # A second time nothing is scored again; a video that is missing, or one too many, is named.
    before = (good / "scores.jsonl").read_text()
    assert evaluate.main(["score", str(good), "--own", str(base)]) == 0 and (good / "scores.jsonl").read_text() == before
    # A video that has changed is scored again; what a killed run left behind is no video.
    videos = sorted((good / "videos").glob("*.mp4"))
    media.save_video(rng.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8), videos[0], 8, {})
    (good / "videos" / ".part-abc.mp4").write_bytes(b"half a video")
    assert evaluate.main(["score", str(good), "--own", str(base)]) == 0
    lines = (good / "scores.jsonl").read_text().splitlines()
    assert len(lines) == len(before.splitlines()) + 1 and json.loads(lines[-1])["name"] == videos[0].stem
    videos[1].rename(good / "videos" / "stranger.mp4")
    assert evaluate.main(["score", str(good), "--own", str(base)]) == 2
    assert re.search(r"has 4 prompts and 4 videos: 1 without a video \(.*\.mp4\), 1 videos without a prompt \(stranger.mp4\)", capsys.readouterr().err)


def test_a_still_clip_is_consistent_and_unreadable_ones_are_listed(base, tmp_path, capsys):
    folder = truth(tmp_path / "videos", 3, False, 1, lambda example: np.repeat(example.video[:1], 9, axis=0))
    one, two, _ = sorted((folder / "videos").glob("*.mp4"))
    one.write_bytes(one.read_bytes()[:200])
    media.save_video(np.zeros((1, 64, 64, 3), np.uint8), two, 8, {})
    assert evaluate.main(["score", str(folder), "--own", str(base)]) == 0
    summary, said = json.loads((folder / "scores.json").read_text()), capsys.readouterr().out
    assert len(summary["unreadable"]) == 2 and "one frame" in summary["unreadable"][two.stem] and one.stem in said
    assert summary["means"]["subject"]["mean"] == pytest.approx(1, abs=1e-3) and summary["means"]["dynamic"]["mean"] == 0


def test_what_single_videos_lack_is_listed(base, tmp_path, capsys):
    """A clip of which two frames are left at 8 frames a second, one that the world cannot measure, and a lost image."""
    folder = truth(tmp_path / "videos", 4, False, 1, lambda example: example.video)
    names = [json.loads(line)["name"] for line in (folder / "videos.jsonl").read_text().splitlines()]
    for name, frames, fps in ((names[0], (4, 64, 64), 24), (names[1], (9, 96, 96), 8)):
        media.save_video(np.zeros((*frames, 3), np.uint8), folder / "videos" / f"{name}.mp4", fps, {})
    (folder / "images" / "0002.png").unlink()
    folder = folder.rename(tmp_path / "moved")  # its images with it
    assert evaluate.main(["score", str(folder), "--own", str(base)]) == 0
    summary, said = json.loads((folder / "scores.json").read_text()), capsys.readouterr().out
    lacking = summary["not measured of some"]
    portrait = ToyTest(1)[2].image
    media.save_image(portrait, folder / "images" / "0002.png")  # found again
    assert evaluate.main(["score", str(folder), "--own", str(base)]) == 0
    assert "dino_i" not in json.loads((folder / "scores.json").read_text())["not measured of some"]
    assert "2 are left" in lacking["dynamic"][names[0]] and "it is 9x96x96" in lacking["identity"][names[1]]
    assert "0002.png" in lacking["dino_i"][names[2]] and lacking["clip_i"].keys() == {names[2]}
    assert {name: each["videos"] for name, each in summary["means"].items() if name in lacking} == {
        "dynamic": 3, "dino_i": 3, "clip_i": 3, **dict.fromkeys(evaluate.EXACT, 2)}
    assert f"not measured: Dynamic degree: moved: {names[0]}: at 8 frames" in said and "of 3" in said


def test_from_prompts_to_a_table_and_a_sheet(base, tmp_path, capsys):
    out = tmp_path / "switch"
    more = ["--", "--model", str(base), "--adapter", str(base / "switch"), "--steps", "2", "--device", "cpu"]
    assert evaluate.main(["generate", "--out", str(out), "--count", "2", *more]) == 0
    assert evaluate.main(["generate", "--out", str(out), "--count", "2", *more]) == 0  # there is nothing left to do
    assert "2 videos are already there" in capsys.readouterr().out
    assert evaluate.main(["score", str(out), "--own", str(base)]) == 0
    lines = (out / "scores.jsonl").read_text()
    assert evaluate.main(["generate", "--out", str(out), "--count", "2", *more]) == 0 == evaluate.main(["score", str(out), "--own", str(base)])
    assert (out / "scores.jsonl").read_text() == lines, "nor to be scored"
    names = [line["name"] for line in map(json.loads, lines.splitlines())]
    assert json.loads((out / "prompts.json").read_text()).keys() == {f"{name}.mp4" for name in names}
    said = (out / "table.md").read_text()
    assert said.count("\n| ") == 2 and f"- CLIP-T: by {base}'s own" in said and "- Dynamic degree: by classical" in said
    for i, name in enumerate(names):  # the model has seen what it is trained on and validated by, not a part of it, nor larger
        assert np.array_equal(Image.open(out / "seen" / f"{name}-reference.png"), ToyTest(1)[i].image)
    said = json.loads((out / "list.jsonl").read_text().splitlines()[0])
    assert said["noun"] == world.NOUN  # so that <cls> stands where training put it
    # Another model must not go on with these videos.
    capsys.readouterr()
    assert evaluate.main(["generate", "--out", str(out), "--count", "2", "--", "--model", str(base), "--steps", "2", "--device", "cpu"]) == 2
    assert "were made with adapter = " in capsys.readouterr().err
    for change, said in ((["--seed", "2"], "seed = 1, and now it is 2"), (["--no-image"], "image = True, and now it is False")):
        assert evaluate.main(["generate", "--out", str(out), "--count", "2", *change, *more]) == 2
        assert f"were made with {said}" in capsys.readouterr().err
    assert evaluate.main(["sheet", str(out), str(out), "--count", "2", "--frames", "3"]) == 0
    assert Image.open(out / "sheet.png").height > 150 and Image.open(out / "sheet.gif").n_frames > 1
    for name in names:  # a method whose videos are larger
        media.save_video(np.zeros((9, 96, 128, 3), np.uint8), tmp_path / "large" / "videos" / f"{name}.mp4", 8, {})
    assert evaluate.main(["sheet", str(out), str(tmp_path / "large"), "--count", "2"]) == 0
    assert evaluate.main(["sheet", str(out), "--count", "0"]) == 2
    capsys.readouterr()
    (tmp_path / "large" / "videos" / f"{names[0]}.mp4").write_bytes(b"no video")
    assert evaluate.main(["sheet", str(out), str(tmp_path / "large")]) == 2 and f"videos/{names[0]}.mp4: " in capsys.readouterr().err
    # Nor are they bound to parts of the model that did not make them; what a killed run left half written goes.
    (base_of := tmp_path / "model").mkdir()
    for part in base.iterdir():
        (base_of / part.name).symlink_to(part)
    again = ["generate", "--out", str(tmp_path / "again"), "--count", "1", "--no-image", "--", "--model", str(base_of), "--steps", "1", "--device", "cpu"]
    assert evaluate.main(again) == 0
    (base_of / "sugar").unlink()
    (tmp_path / "again" / "videos" / ".part-x.mp4").write_bytes(b"half a video")
    assert evaluate.main(again) == 0 and not list((tmp_path / "again" / "videos").glob(".part*"))


def test_a_first_attempt_that_made_nothing_binds_nobody(base, tmp_path, capsys):
    more = ["generate", "--out", str(tmp_path / "run"), "--count", "1", "--no-image", "--", "--model", str(base), "--device", "cpu", "--steps"]
    assert evaluate.main(["generate", "--set", "switch", *more[1:], "2"]) == 2  # no --dreambench
    assert evaluate.main([*more, "0"]) == 2
    assert evaluate.main([*more, "1"]) == 0 and evaluate.main([*more, "2"]) == 2
    assert "were made with steps = 1, and now it is 2" in capsys.readouterr().err


def test_a_table_is_of_one_set(base, tmp_path, capsys):
    folders = []
    for name in ("sugar", "switch"):
        folder = truth(tmp_path / name, 1, False, 1, lambda example: example.video)
        (folder / "settings.json").write_text(json.dumps({"set": name}))
        folders.append(str(folder))
    assert evaluate.main(["score", *folders]) == 2 and "sugar is of sugar" in capsys.readouterr().err
    assert evaluate.main(["score", folders[0], "--set", "toy", "--own", str(base)]) == 2
    assert evaluate.set_of([Path(folders[1])], None) == "switch"


def test_one_subject_has_no_interval(base, tmp_path):
    folder = truth(tmp_path / "one", 1, False, 1, lambda example: example.video)
    assert evaluate.main(["score", str(folder), "--own", str(base)]) == 0
    means = json.loads((folder / "scores.json").read_text(), parse_constant=pytest.fail)["means"]
    assert means["dino_i"]["low"] is None and "[" not in (folder / "table.md").read_text().splitlines()[3]


def test_half_a_line_is_scored_again(base, tmp_path):
    folder = truth(tmp_path / "run", 2, False, 1, lambda example: example.video)
    assert evaluate.main(["score", str(folder), "--own", str(base)]) == 0
    whole, lines = (folder / "scores.json").read_text(), (folder / "scores.jsonl").read_text().splitlines()
    (folder / "scores.jsonl").write_text(f'{lines[0]}\n{lines[1][:40]}')
    assert evaluate.main(["score", str(folder), "--own", str(base)]) == 0
    assert (folder / "scores.json").read_text() == whole


def test_all_folders_are_looked_at_before_the_first_is_scored(base, tmp_path, capsys):
    whole, twice = (truth(tmp_path / name, 2, False, 1, lambda example: example.video) for name in ("whole", "twice"))
    with (twice / "videos.jsonl").open("a") as file:
        file.write((twice / "videos.jsonl").read_text().splitlines()[0] + "\n")
    assert evaluate.main(["score", str(whole), str(twice), "--own", str(base)]) == 2
    assert "has lines of one name" in capsys.readouterr().err and not (whole / "scores.jsonl").exists()
    next((twice / "videos").glob("*.mp4")).unlink()
    (twice / "videos.jsonl").write_text("".join((twice / "videos.jsonl").read_text().splitlines(keepends=True)[:2]))
    assert evaluate.main(["score", str(whole), str(twice), "--own", str(base)]) == 2
    assert "has 2 prompts and 1 videos" in capsys.readouterr().err and not (whole / "scores.jsonl").exists()
    (whole / "scores.jsonl").write_text("7\n[]\n{}\n")  # what no run has written
    assert evaluate.main(["score", str(whole), "--own", str(base)]) == 0


def test_two_ranks_score_as_one(base, tmp_path):
    folder = truth(tmp_path / "run", 3, False, 1, lambda example: example.video)
    found, command = [], ["score", str(folder), "--own", str(base), "--device", "cpu"]
    for ranks in (1, 2):
        (folder / "scores.jsonl").unlink(missing_ok=True)
        if ranks == 1:
            assert evaluate.main(command) == 0
        else:
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", evaluate.__file__, *command],
                           check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        found.append(json.loads((folder / "scores.json").read_text()))
        assert len((folder / "scores.jsonl").read_text().splitlines()) == 3
    assert found[0] == found[1]


def test_a_clip_without_a_tokenizer_is_not_measured(base, tmp_path):
    """transformers would make an empty one, to which all texts are alike."""
    shutil.copytree(base / "clip", tmp_path / "clip", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    missing = Scorers(published={name: str(tmp_path / "clip") for name in scorers.PUBLISHED}).missing
    assert "has no tokenizer" in missing["clip_t"]


def test_missing_networks_are_said_and_the_rest_goes_on(monkeypatch):
    def resolve(name, more=()):
        raise BadInput(f"{name} is not here")

    monkeypatch.setattr(scorers.checkpoint, "resolve", resolve)
    found = Scorers()
    assert found.missing.keys() == {"dino_i", "clip_i", "clip_t", "subject", "background", "dynamic", "smoothness", "viclip"}
    assert "facebook/dino-vits16 is not here" in found.missing["dino_i"] and "licence" in found.missing["smoothness"]
    for name, file in (("dynamic", "raft-things.pth"), ("smoothness", "amt-s.pth"), ("viclip", "ViClip-InternVid-10M-FLT.pth")):
        assert file in found.missing[name] and "https://" in found.missing[name]
    assert "no.pth" in Scorers(raft=Path("no.pth")).missing["dynamic"]
    standing_in = Scorers(own=Path("nowhere"))  # a toy's: the classical estimator, by its name
    assert "classical" in standing_in.by["dynamic"]
    assert standing_in(np.zeros((9, 64, 64, 3), np.uint8), 8, "a dog", None) == ({"dynamic": 0}, {})


def test_what_is_not_its_own_is_not_measured_by_another_name(base, tmp_path):
    for own in (tmp_path / "typo", tmp_path):
        missing = Scorers(own=own).missing
        assert {"dino_i", "clip_i", "clip_t", "subject", "background"} < missing.keys() and str(own) in missing["dino_i"]


@pytest.mark.parametrize("command", ["generate --count 0", "motion --per-class 0", "motion --count 0",
                                     "ablate switch-p --sampling-steps 0", "ablate switch-p --sampling-steps 1001", "ablate switch-p --seeds 0"])
def test_numbers_out_of_range(command, tmp_path, capsys):
    assert evaluate.main([*command.split(), "--out", str(tmp_path)]) == 2
    assert f"{command.split()[-2]} {command.split()[-1]}: choose " in capsys.readouterr().err
    for flag in ("generate --seed", "motion --seed", "motion --trained-seed"):
        assert evaluate.main([*flag.split(), "-1", "--out", str(tmp_path)]) == 2
        assert f"{flag.split()[1]} -1: a seed is a whole number" in capsys.readouterr().err


def test_bad_input(base, tmp_path, capsys):
    assert evaluate.main(["generate", "--set", "sugar", "--out", str(tmp_path)]) == 2
    assert "--set sugar needs --dreambench" in capsys.readouterr().err
    assert evaluate.main(["score", str(tmp_path / "nowhere"), "--own", str(base)]) == 2
    assert "nowhere/videos.jsonl" in capsys.readouterr().err
    folder = truth(tmp_path / "videos", 2, False, 1, lambda example: example.video)
    assert evaluate.main(["score", str(folder), "--own", str(base), "--fps", "nan"]) == 2
    assert "--fps nan: choose more than 0" in capsys.readouterr().err
    lines = (folder / "videos.jsonl").read_text().splitlines()
    for content, said in (("", "is empty"), (f"{lines[0]}\n{lines[1][:30]}", "Line 2 of .*videos.jsonl is no JSON object"),
                          ('{"name": "a", "prompt": "b", "subject": "c"}', 'Line 1 of .*videos.jsonl has no text as its "image"'),
                          *((json.dumps(json.loads(lines[0]) | {name: value}), f'Line 1 of .*videos.jsonl has no text as its "{name}"')
                            for name, value in (("image", 3), ("prompt", None), ("subject", None), ("name", ["a"]))),
                          *((json.dumps(json.loads(lines[0]) | {"toy": value}), 'Line 1 of .*videos.jsonl has a "toy"')
                            for value in (None, 3, [], [1, ["plain"]], [-1, ["plain"], 0], [0, [], 0], [0, ["odd"], 0], [0, [["plain"]], 0])),
                          ("\udcff", "Line 1 of"), ("3", "Line 1 of")):
        (folder / "videos.jsonl").write_text(content, errors="surrogateescape")
        for command in (["score", str(folder), "--own", str(base)], ["sheet", str(folder)]):
            assert evaluate.main(command) == 2 and re.search(said, capsys.readouterr().err), (content, command)
    (folder / "videos.jsonl").write_text("\n".join(lines))
    for name in ("foo", ["sugar"], None):
        (folder / "settings.json").write_text(json.dumps({"set": name}))
        assert evaluate.main(["score", str(folder), "--own", str(base)]) == 2
        assert f"settings.json names the set {name!r}; there are sugar, switch, toy" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for command in ("generate", "motion", "ablate switch-p"):
        assert evaluate.main([*command.split(), "--out", str(tmp_path / "file")]) == 2 and "file is a file: give a folder" in capsys.readouterr().err


def test_a_score_that_is_no_number_is_listed(base):
    found = Scorers(own=base)
    found.of["viclip"] = lambda frames, text: float("nan")
    scores, without = found(np.zeros((9, 64, 64, 3), np.uint8), 8, "a dog", None)
    assert "viclip" not in scores and without == {"viclip": "it came out as nan"}


@pytest.mark.parametrize("flags,phrase", [
    ("--set sugar --looks", "--looks has no effect with --set sugar"), ("--cut-out --no-image", "--cut-out has no effect with --no-image"),
    ("--dreambench .", "--dreambench has no effect with --set toy"), ("-- --out=elsewhere", "--out and --seed are not for sample.py here"),
    ("-- --seed=3", "--out and --seed are not for sample.py here")])
def test_flags_that_would_change_nothing_are_refused(flags, phrase, base, tmp_path, capsys):
    flags, _, given = flags.partition("-- ")
    command = ["generate", "--out", str(tmp_path / "out"), *flags.split(), "--", "--model", str(base), "--device", "cpu", *given.split()]
    assert evaluate.main(command) == 2 and phrase in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        evaluate.parse(["score", "out", "--", "--steps", "3"])
    assert "score makes no videos" in capsys.readouterr().err
