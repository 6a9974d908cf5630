"""The toy's recipe: every stage runs, what it leaves is a checkpoint that samples, and a finished stage is not repeated."""

import json

import pytest
import torch

import measure
import sample
import toy
import toy_networks
import validation
import world
from encoders import Tokenizer
from pipeline import Sampler


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("built"), torch.get_num_threads()
    torch.set_num_threads(1)
    command = ["build", "--scale", "0.0002", "--out", str(folder / "toy"), "--work", str(folder / "work"), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation.Validation, "sample", lambda self, example, seed: example.video)  # test_runs.py looks at real ones
        patch.setattr(measure, "score", lambda *_: {"identity": 0.0})  # which takes a second for each video of the sheets
        assert toy.main(command) == 0
    yield folder, command
    torch.set_num_threads(threads)


def test_every_stage_leaves_its_part(built):
    folder, _ = built
    assert all((folder / "work" / stage / "done").exists() for stage in toy.STAGES)
    assert all((folder / "toy" / part).is_dir() for part in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler", "clip", "dino",
                                                               "i2v/transformer", "switch", "sugar/transformer"))
    assert len(list((folder / "work").glob("**/validation/*.png"))) == 16  # of Switch, and of SUGAR seven times: before and after
    assert json.loads((folder / "toy" / "vae" / "config.json").read_text())["scaling_factor"] != 1


def test_what_was_built_samples(built, tmp_path):
    folder, _ = built
    world_image = tmp_path / "subject.png"
    toy.media.save_image(toy.media.Image.fromarray(world.portrait(world.sample_subject(0, "test"))), world_image)
    for name, more in (("switch", ["--adapter", str(folder / "toy" / "switch")]), ("sugar", []), ("i2v", [])):
        model = folder / "toy" if name == "switch" else folder / "toy" / name
        assert sample.main(["--model", str(model), *more, "--image", str(world_image), "--prompt", "a creature jumps", "--steps", "2", "--out",
                            str(tmp_path / f"{name}.gif"), "--device", "cpu"]) == 0


def test_the_checkpoint_says_how_much_guidance(built):
    for part in ("", "sugar", "i2v"):
        settings = Sampler(str(built[0] / "toy" / part)).defaults()
        assert {name: getattr(settings, name) for name in toy_networks.SCALES} == toy_networks.SCALES


def test_a_finished_stage_is_not_repeated(built, monkeypatch, capsys):
    monkeypatch.setattr(toy, "train", lambda *args: pytest.fail("it trained again"))
    assert toy.main(built[1]) == 0


def test_a_stage_built_at_another_scale_is_not_taken_for_done(built, capsys):
    assert toy.main(["1" if argument == "0.0002" else argument for argument in built[1]]) == 2
    assert "was built with --scale 0.0002" in capsys.readouterr().err


def test_ranks_that_cannot_share_a_later_stage_are_refused_before_the_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy.distributed, "start", lambda device: toy.distributed.Ranks(0, 4, torch.device("cpu"), None))
    assert toy.main(["build", "--out", str(tmp_path / "toy"), "--work", str(tmp_path / "work")]) == 2
    assert "A batch of 2 cannot be shared out evenly among 4 ranks" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_every_caption_fits_and_a_word_is_a_token(built):
    tokenizer = Tokenizer(built[0] / "toy" / "tokenizer")
    lengths = [len(tokenizer(sentence)) for sentence in world.sentences()]
    assert max(lengths) + 1 <= toy_networks.TOKENS  # and <cls>
    assert len(tokenizer("a golden creature jumps up and down in the snow")) == 11
