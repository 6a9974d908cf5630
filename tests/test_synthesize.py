"""SUGAR's data pipeline: every stage on the toy, killed and resumed, shared among ranks, and what it keeps and drops."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cache
import distributed
import figures
import media
import synthesize
import toy_networks
import world
from media import Clip
from readers import Triplets
from stages import Run

ANY = "--clip-text -1 --dino-identity -1 --dino-consecutive -1 --dino-random -1 --flow 0"  # every sample is kept
QUICK = "--steps 2 --device cpu"


def arguments(base: Path, out: Path, more: str = "") -> list[str]:
    return [*f"--model {base} --adapter {base}/switch --i2v {base}/i2v --out {out} {QUICK} {more}".split()]


def start(base: Path, out: Path, more: str = "", ranks: int = 1) -> subprocess.Popen:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(ROOT / "synthesize.py"), *arguments(base, out, more)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return out


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def manifests(out: Path) -> dict[str, list[dict]]:
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in out.glob("*.jsonl")}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run that nobody disturbed: three subjects, two texts each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    said = finish(start(base, out, f"{ANY} --count 3 --prompts 2"))
    return out, said


def test_the_whole_chain_ends_in_triplets_that_train(whole, base, tmp_path):
    out, said = whole
    assert "source: kept 3, dropped 0" in said and "filter-videos: kept 6, dropped 0" in said
    assert "classical pyramidal flow" in said and "6 triplets" in said
    stages = [name for name in synthesize.STAGES if name != "triplets"]
    assert set(manifests(out)) == {*stages, "triplets"} and all((out / f"{stage}.png").exists() for stage in stages)
    assert all((out / f"{stage}-scores.png").exists() for stage in ("filter-images", "filter-videos"))
    data = Triplets(out, Clip(9, 64, 64))
    examples = [data[i] for i in range(6)]
    assert len(data) == 6 and {example.noun for example in examples} == {world.NOUN}
    assert len({example.text for example in examples}) > 2
    assert np.array_equal(np.asarray(examples[0].image), np.asarray(examples[1].image)), "two texts, one subject"
    import train_sugar

    run = ["--model", str(base), "--data", str(out), "--real", "2", "--out", str(tmp_path / "run"), "--device", "cpu", "--steps", "2",
           "--batch", "2", "--p", "1", "--strategy", "mix", "--validate-count", "0"]
    assert train_sugar.main(run) == 0
    assert [json.loads(line)["stream"] for line in (tmp_path / "run" / "mix" / "metrics.jsonl").read_text().splitlines()] == ["synthetic"] * 2
    cached = tmp_path / "cache"
    assert cache.main(["cache", "--as", "triplets", "--data", str(out), "--out", str(cached), "--model", str(base), "--device", "cpu"]) == 0
    for source in (out, cached):
        assert train_sugar.main([*run, "--p", "0.5", "--data", str(source), "--out", str(tmp_path / f"both of {source.name}")]) == 0, \
            "triplets of the toy's world go with its real videos"


def test_killed_at_any_moment_and_run_again_is_the_undisturbed_run(whole, base, tmp_path, seed):
    killed = start(base, tmp_path / "run", f"{ANY} --count 3 --prompts 2")
    wanted = 1 + seed % 30  # records of samples, of 3 + 6 x 6
    while killed.poll() is None and len(list((tmp_path / "run").glob("*/000/*.json"))) < wanted:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*/000/*.json")}
    assert len(written) >= wanted
    (tmp_path / "run" / "source" / "000" / ".part-abc.png").touch()  # as a kill in the midst of writing leaves it
    finish(start(base, tmp_path / "run", f"{ANY} --count 3 --prompts 2"))
    assert written == {file: file.stat().st_mtime_ns for file in written}, "no sample twice"
    assert manifests(tmp_path / "run") == manifests(whole[0])
    for file in whole[0].rglob("*.png"):
        if file.parent != whole[0]:
            assert file.read_bytes() == (tmp_path / "run" / file.relative_to(whole[0])).read_bytes()


def test_two_ranks_make_what_one_makes(whole, base, tmp_path):
    finish(start(base, tmp_path / "run", f"{ANY} --count 3 --prompts 2", ranks=2))
    ours, theirs = manifests(tmp_path / "run"), manifests(whole[0])
    assert ours.keys() == theirs.keys()
    for stage in ours:
        for one, two in zip(ours[stage], theirs[stage], strict=True):
            assert one.keys() == two.keys()
            assert all(one[key] == pytest.approx(two[key], abs=1e-4) if isinstance(one[key], float) else one[key] == two[key] for key in one)


def test_what_falls_short_is_dropped_and_why_is_said(base, tmp_path, monkeypatch, capfd):
    """With networks whose answers are known: picture i of 6 is like its text by i / 10, and so on."""

    class Known:
        def __init__(self, *args):
            self.seen = 0

        def text(self, pictures, text):
            self.seen += 1
            return [self.seen / 10]

        def identity(self, one, two):
            return [0.9 if self.seen % 2 else 0.1]

        def dino_features(self, pictures):
            return torch.nn.functional.normalize(torch.ones(len(pictures), 4), dim=-1)

    monkeypatch.setattr(synthesize, "Similarity", Known)
    monkeypatch.setattr(synthesize, "flow_magnitude", lambda frames, flow: np.full(8, 0.064))
    limits = "--clip-text 0.25 --dino-identity 0.5 --count 6 --flow 0.01"
    assert synthesize.main(arguments(base, tmp_path / "run", limits)) == 2  # nothing moves: no triplet is left
    out, err = capfd.readouterr()
    rows = manifests(tmp_path / "run")
    assert [row["kept"] for row in rows["filter-images"]] == [False, False, True, False, True, False]
    assert rows["filter-images"][1]["why"] == "clip-text 0.20 < 0.25, dino-identity 0.10 < 0.5"
    assert "filter-images: kept 2, dropped 4 (2 dino-identity < 0.5; 1 clip-text < 0.25; 1 clip-text < 0.25, dino-identity < 0.5)" in out
    assert len(rows["animate"]) == 2 and [row["why"] for row in rows["filter-videos"]] == ["flow 0.00 < 0.01"] * 2
    assert [row["dino-random"] for row in rows["filter-videos"]] == pytest.approx([1, 1])
    assert "No triplet is left" in err and not (tmp_path / "run" / "triplets.jsonl").exists()


def test_a_table_of_pictures_and_a_broken_one_among_them(base, tmp_path, capfd):
    Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(tmp_path / "dog.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "dog.png").read_bytes()[:40])
    (tmp_path / "source.csv").write_text("image,label\ndog.png,dog\ntorn.png,teapot\ndog.png,axe\n")
    status = synthesize.main(arguments(base, tmp_path / "run", f"--stages source prompt --source {tmp_path / 'source.csv'} --count 9"))
    assert status == 0 and "source: kept 2, dropped 1 (1 unreadable)" in capfd.readouterr().out
    rows = manifests(tmp_path / "run")
    assert [row["kind"] for row in rows["source"]] == ["animal", "static object", "active object"]
    dog, axe = rows["prompt"]
    assert any(dog["text"].count(does) for does in synthesize.TEMPLATES["motion"]["animal"]) and "axe" in axe["text"]
    assert dog["image_text"] != dog["text"] and " a axe" not in f' {axe["text"]}'


def test_rows_that_are_of_no_use_are_dropped(base, tmp_path, capfd):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "dog.png")
    (tmp_path / "source.jsonl").write_text('{"image": "dog.png", "label": "dog"}\n{"image": 3, "label": "dog"}\n{"image": "dog.png"}\n')
    status = synthesize.main(arguments(base, tmp_path / "run", f"--stages source --source {tmp_path / 'source.jsonl'} --count 9"))
    assert status == 0 and "source: kept 1, dropped 2 (2 unusable row)" in capfd.readouterr().out


def test_subjects_that_are_not_found_have_a_reason_of_their_own(base, tmp_path, monkeypatch, capfd):
    found = lambda image, label: Image.new("L", image.size, 255) if label == "dog" else None
    monkeypatch.setattr(synthesize, "GroundedSAM", lambda *_: found)
    monkeypatch.setattr(synthesize, "weights_of", lambda *_: "of the stub")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "dog.png")
    (tmp_path / "source.csv").write_text("image,label\ndog.png,dog\ngone.png,dog\ndog.png,teapot\n")
    assert synthesize.main(arguments(base, tmp_path / "run", f"--stages source --source {tmp_path / 'source.csv'} --segment")) == 0
    assert "source: kept 1, dropped 2 (1 unreadable; 1 not found)" in capfd.readouterr().out
    assert manifests(tmp_path / "run")["source"][2]["why"] == "not found: no teapot"


def test_templates_of_ones_own(base, tmp_path, capfd):
    """Through the chain; those that could not be filled in are refused before it begins."""
    own = {"style": ["{} as a stamp"], "texture": [], "colour": [], "background": ["at sea"],
           "motion": {"animal": ["barks"], "active object": ["hums"], "static object": ["stands"]}}
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "source.csv").write_text("image,label\na.png,dog\na.png,teapot\na.png,owl\n")
    run = f"--stages source prompt --source {tmp_path / 'source.csv'} --templates {tmp_path / 'own.json'}"
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert synthesize.main(arguments(base, tmp_path / "run", run)) == 0
    texts = ["dog as a stamp barks at sea", "teapot as a stamp stands at sea", "owl as a stamp hums at sea"]
    assert [row["text"] for row in manifests(tmp_path / "run")["prompt"]] == texts
    for change, phrase in (({"style": ["a {label}"]}, "'a {label}' must have {} once"), ({"style": ["a thing"]}, "'a thing' must have {}"),
                           ({"colour": ["a {} in {}"]}, "'a {} in {}' must have"), ({"background": []}, "none is empty"),
                           ({"style": []}, "none is empty"), ({"motion": []}, "none is empty"),
                           ({"motion": {**own["motion"], "animal": []}}, "none is empty"),
                           ({"motion": {"animal": ["barks"]}}, "lists of texts")):
        (tmp_path / "own.json").write_text(json.dumps({**own, **change}))
        assert synthesize.main(arguments(base, tmp_path / "other", run)) == 2
        assert phrase in capfd.readouterr().err and not (tmp_path / "other").exists()


def test_texts_are_made_of_the_templates(seed):
    for i in range(30):
        made = synthesize.compose(synthesize.TEMPLATES, "owl", "animal", (seed, i))
        what, where = made["image_text"], made["text"]
        assert made["family"] in ("style", "texture", "colour") and "owl" in what and " a owl" not in f" {what}"
        assert any(what.endswith(place) and where.endswith(place) for place in synthesize.TEMPLATES["background"])
        assert any(f" {does} " in where and does not in what for does in synthesize.TEMPLATES["motion"]["animal"])
    sentences = set(world.sentences())
    assert all(synthesize.compose(world.templates(), world.NOUN, "active object", (seed, i))["text"] in sentences for i in range(50))


def test_a_language_model_that_loses_the_subject_is_not_heeded(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = toy_networks.clip_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=1, pad_token_id=1)).save_pretrained(tmp_path / "llm")
    rewrite = synthesize.rewriter(str(tmp_path / "llm"), torch.device("cpu"))
    assert rewrite("a golden creature jumps in space", "picture", "zeppelin") == "a golden creature jumps in space"


def test_what_a_language_model_adds_to_the_looks_is_drawn_and_told(tmp_path, monkeypatch):
    asked = []

    def rewrite(text, medium, label):
        asked.append((text, medium, label))
        return f"{text.rstrip('.')} at dusk."

    monkeypatch.setattr(synthesize, "rewriter", lambda name, device: rewrite)
    monkeypatch.setattr(synthesize.checkpoint, "fingerprint", lambda *folders: "weights")
    args = synthesize.parse(["--out", str(tmp_path), "--count", "2", "--llm", str(tmp_path)])
    run = Run(tmp_path, distributed.start("cpu"))
    synthesize.source(run, args)
    synthesize.prompt(run, args)
    for sample, (picture, video) in zip(run.samples("prompt"), zip(asked[::2], asked[1::2])):
        assert picture[1:] == ("picture", "creature") and video[1:] == ("video", "creature")
        assert sample["image_text"] == f"{picture[0]} at dusk." and sample["motion"] not in picture[0]
        assert video[0] == f"{picture[0]} at dusk. The creature {sample['motion']}." and sample["text"] == f"{video[0].rstrip('.')} at dusk."


def test_a_source_with_its_background_is_warned_of(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 200, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    pixels[[0, -1]] = pixels[:, [0, -1]] = 255
    Image.fromarray(pixels).save(tmp_path / "white.png")
    (tmp_path / "table.csv").write_text("image,label\nscene.png,dog\nwhite.png,dog\n")
    args = synthesize.parse(["--out", str(tmp_path / "run"), "--source", str(tmp_path / "table.csv")])
    synthesize.source(Run(tmp_path / "run", distributed.start("cpu")), args)
    assert "1 of 2 pictures have neither transparency nor a white border, as 000000:" in capsys.readouterr().err


@pytest.mark.parametrize("size,height,width,expected", [((64, 64), 480, 720, (96, 64)), ((90, 40), 64, 64, (90, 90)), ((30, 20), 40, 60, (30, 20))])
def test_padding_repeats_the_border_and_is_marked(size, height, width, expected):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    padded, mask = synthesize.pad_to(picture, height, width)
    assert padded.size == mask.size == expected
    inside = np.asarray(mask) == 0
    assert inside.sum() == size[0] * size[1] and np.array_equal(np.asarray(padded)[inside], np.asarray(picture).reshape(-1, 3))
    if expected == (96, 64):
        assert (np.asarray(padded)[:, :16] == np.asarray(picture)[:, :1]).all()


def black(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """An "inpainting model" for --inpaint."""
    return Image.composite(Image.new("RGB", picture.size), picture, mask)


def test_an_inpainting_function_can_be_hooked_in(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    function = synthesize.hook("test_synthesize:black")
    padded, mask = synthesize.pad_to(Image.new("RGB", (8, 8), "white"), 8, 16)
    assert np.asarray(function(padded, mask))[:, :4].max() == 0
    with pytest.raises(synthesize.BadInput, match="MODULE:FUNCTION"):
        synthesize.hook("nowhere:black")


def test_the_fit_stage_inpaints_the_padding_alone(base, tmp_path, monkeypatch):
    """A picture of 48x32 for videos of 64x64: a sixth of the height is padding, above and below."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "run").mkdir()
    Image.new("RGB", (48, 32), "white").save(tmp_path / "run" / "wide.png")
    row = {"id": "000000-0", "label": "sheet", "customized": "wide.png", "kept": True}
    (tmp_path / "run" / "filter-images.jsonl").write_text(json.dumps(row) + "\n")
    assert synthesize.main(arguments(base, tmp_path / "run", "--stages fit --inpaint test_synthesize:black")) == 0
    [row] = manifests(tmp_path / "run")["fit"]
    fitted = np.asarray(Image.open(tmp_path / "run" / row["fitted"]).convert("L"))
    assert fitted.shape == (64, 64) and fitted[:8].max() == fitted[-8:].max() == 0 and fitted[14:50].min() == 255


@pytest.mark.parametrize("more,phrase", [
    ("--stages customize", "run the stage prompt first"), ("--count 0", "--count 0: choose 1 or more"),
    ("--source nowhere.csv", "--source nowhere.csv cannot be read"), ("--i2v {base}", "is no image-to-video model"),
    ("--raft nowhere.pth", "nowhere.pth"), ("--image-side 50", "--image-side 50 is not a multiple of 16"),
    ("--inpaint nowhere:black", "MODULE:FUNCTION"), ("--templates {base}/model_index.json", "must have lists of texts"),
])
def test_bad_input(more, phrase, base, tmp_path, capfd):
    assert synthesize.main(arguments(base, tmp_path / "run", more.format(base=base))) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and phrase in errors[0]
    assert not list((tmp_path / "run").glob("*.jsonl")), "found before any stage has worked"


@pytest.mark.parametrize("row,phrase", [("dog.png,,", "row: 1 lacks"), (",dog,", "row: 1 lacks"), ("dog.png,car,vehicle", "of kind 'vehicle'")])
def test_rows_that_lack_something_are_named(row, phrase, base, tmp_path, capfd):
    (tmp_path / "source.csv").write_text(f"image,label,kind\n{row}\n")
    assert synthesize.main(arguments(base, tmp_path / "run", f"--source {tmp_path / 'source.csv'}")) == 2
    assert phrase in capfd.readouterr().err


def test_other_settings_are_refused_by_name(base, tmp_path, capfd):
    assert synthesize.main(arguments(base, tmp_path / "run", "--stages source --count 2")) == 0
    assert synthesize.main(arguments(base, tmp_path / "run", "--stages source --count 3")) == 2
    assert "was begun with count = 2, and now it is 3" in capfd.readouterr().err


def test_a_table_that_has_changed_is_refused(base, tmp_path, capfd):
    """At its own stage, and where only that one was removed, at the next."""
    table, out = tmp_path / "source.csv", tmp_path / "run"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    table.write_text("image,label\na.png,dog\na.png,axe\n")
    again = lambda: synthesize.main(arguments(base, out, f"--stages source prompt --source {table}"))
    assert again() == again() == 0
    table.write_text("image,label\na.png,axe\na.png,dog\n")
    capfd.readouterr()
    assert again() == 2 and f"The stage source in {out} was begun with samples = " in capfd.readouterr().err
    shutil.rmtree(out / "source")
    (out / "source.jsonl").unlink()
    assert again() == 2 and f"The stage prompt in {out} was begun with samples = " in capfd.readouterr().err


def test_other_weights_in_the_same_place_are_refused(base, tmp_path, capfd):
    shutil.copytree(base, tmp_path / "toy")
    more = f"{ANY} --stages source prompt customize filter-images --count 1"
    again = lambda: synthesize.main(arguments(tmp_path / "toy", tmp_path / "run", more))
    assert again() == again() == 0
    for part, stage, name in (("clip", "filter-images", "weights"), ("switch", "customize", "adapter's weights"),
                              ("vae", "customize", "weights")):
        [file] = (tmp_path / "toy" / part).glob("*.safetensors")
        before = file.read_bytes()
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file, metadata_of(file))
        assert again() == 2 and f"The stage {stage} in {tmp_path / 'run'} was begun with {name} = " in capfd.readouterr().err
        file.write_bytes(before)
    assert again() == 0
    # Another adapter makes other pictures under the same names: what was scored before is not theirs.
    [file] = (tmp_path / "toy" / "switch").glob("*.safetensors")
    save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file, metadata_of(file))
    shutil.rmtree(tmp_path / "run" / "customize")
    (tmp_path / "run" / "customize.jsonl").unlink()
    assert again() == 2 and f"The stage filter-images in {tmp_path / 'run'} was begun with the stages before = " in capfd.readouterr().err


def test_raft_is_refused_for_small_videos_before_any_is_made(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(synthesize, "Flow", lambda *_: None)
    assert synthesize.main(arguments(base, tmp_path / "run", "--raft raft.pth")) == 2
    assert "at least 121 pixels a side" in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_a_histogram_marks_what_is_dropped():
    chart = np.asarray(figures.histogram([0.1] * 10 + [0.9] * 10, "score", least=0.5))
    red, blue = ((chart == np.array(colour)).all(axis=-1) for colour in (figures.DROPPED, figures.BAR))
    assert 0 < red.sum() and 0 < blue.sum() and np.nonzero(red)[1].max() < np.nonzero(blue)[1].min()
    assert figures.histogram([], "nothing", 0.5).size == figures.histogram([float("nan")], "nothing", 0.5).size


def test_frames_of_a_written_video_come_back(tmp_path, seed):
    frames = world.render(world.sample_scene(seed))
    media.save_video(frames, tmp_path / "clip.mp4", 8, {})
    read = media.read_video(tmp_path / "clip.mp4")
    assert read.shape == frames.shape and np.abs(read.astype(int) - frames).mean() < 8
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:300])
    with pytest.raises(synthesize.BadInput, match="torn.mp4|cannot be read"):
        media.read_video(tmp_path / "torn.mp4")
