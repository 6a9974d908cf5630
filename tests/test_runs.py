"""Whole runs of both trainers, in processes of their own: killed and resumed, on two ranks, begun anew, with sheets to look at."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli import ROOT
from PIL import Image
from safetensors.torch import load_file

import distributed
import resume
import train_sugar
from checkpoint import BadInput
from resume import last_checkpoint, load_checkpoint, save_checkpoint

SWITCH = "--image-batch 4 --video-batch 2 --images 6 --videos 4 --micro-batch 2 --rank 4 --dropout 0.1 --p 0.4 --lr 0.01"
SUGAR = "--batch 4 --real 4 --triplets 4 --micro-batch 2 --p 0.5 --strategy mix --lr 0.001"
QUIET = "--validate-count 0 --save-every 2"


def command(script: str, base: Path, out: Path, arguments: str, ranks: int = 1, restarts: int = 0) -> list[str]:
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    return [*launcher, str(ROOT / script), "--model", str(base), "--out", str(out), "--device", "cpu", *QUIET.split(),
            *arguments.split()]


def start(*args, **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.Popen(command(*args, **kwargs), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return out + err


def weights(out: Path) -> dict[str, torch.Tensor]:
    [file] = [f for f in (out / "pytorch_lora_weights.safetensors", *out.glob("transformer/*.safetensors")) if f.exists()]
    return load_file(file)


def metrics(out: Path) -> list[dict]:
    files = [*out.glob("metrics.jsonl"), *sorted(out.glob("*/metrics.jsonl"), reverse=True)]  # real, then mixed
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def wait_for_steps(process: subprocess.Popen, out: Path, lines: int) -> None:
    """Returns as soon as that many steps are in metrics.jsonl."""
    for _ in range(4000):
        written = sum(len(f.read_text().splitlines()) for f in [*out.glob("metrics.jsonl"), *out.glob("*/metrics.jsonl")])
        if written >= lines or process.poll() is not None:
            break
        time.sleep(0.02)


def saved(out: Path) -> set[tuple]:
    """The checkpoints that are there, so told apart that one written again is another."""
    return {(str(file.relative_to(out)), file.stat().st_ino, file.stat().st_mtime_ns) for file in out.rglob("step-*/state.json")}


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    parents = {int(stat.parent.name): int(stat.read_text().rpartition(")")[2].split()[1]) for stat in Path("/proc").glob("[0-9]*/stat")}
    return [child for child, parent in parents.items() if parent == pid]


@pytest.mark.parametrize("script,arguments,steps", [("train_switch.py", SWITCH, 12), ("train_sugar.py", SUGAR.replace("mix", "tsf"), 5)])
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(script, arguments, steps, base, tmp_path, seed):
    """Of SUGAR in either stage, of which the second has frozen blocks. It is resumed, not begun anew: what was saved is not written again."""
    arguments += f" --steps {steps} --seed {seed % 1000} --keep 99"
    whole = start(script, base, tmp_path / "whole", arguments)
    killed = start(script, base, tmp_path / "killed", arguments)
    wait_for_steps(killed, tmp_path / "killed", 3 + seed % 6)  # the second step is saved before there is a third
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = saved(tmp_path / "killed")
    finish(start(script, base, tmp_path / "killed", arguments))
    assert before and before < saved(tmp_path / "killed")
    finish(whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sigterm_saves_and_exits_0_and_other_settings_are_refused_by_name(base, tmp_path):
    process = start("train_switch.py", base, tmp_path / "run", SWITCH + " --steps 500 --save-every 400 --dtype bf16")
    wait_for_steps(process, tmp_path / "run", 3)
    process.terminate()
    assert "goes on from there" in finish(process)
    folder, state = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert state["step"] == len(metrics(tmp_path / "run")) >= 3
    again = start("train_switch.py", base, tmp_path / "run", SWITCH.replace("--p 0.4", "--p 0.3") + " --steps 500 --dtype bf16")
    out, err = again.communicate()
    assert again.returncode == 2 and "with p = 0.4, and now it is 0.3" in err


def test_a_rank_that_dies_ends_all_and_torchrun_begins_again_where_they_were(base, tmp_path, seed):
    arguments = SWITCH + " --steps 20 --keep 99"
    whole = start("train_switch.py", base, tmp_path / "whole", arguments, ranks=2)
    killed = start("train_switch.py", base, tmp_path / "killed", arguments, ranks=2, restarts=1)
    wait_for_steps(killed, tmp_path / "killed", 3)
    ranks = children(killed.pid)
    assert len(ranks) == 2
    before = saved(tmp_path / "killed")
    os.kill(ranks[seed % 2], signal.SIGKILL)
    finish(killed)
    assert before and before < saved(tmp_path / "killed")
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    finish(whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("script,arguments", [("train_switch.py", SWITCH), ("train_sugar.py", SUGAR)])
def test_two_ranks_are_one_rank_and_what_two_saved_one_resumes(script, arguments, base, tmp_path):
    arguments += " --dtype fp32" + (" --dropout 0" if "switch" in script else "")
    finish(start(script, base, tmp_path / "one", arguments + " --steps 5"))
    finish(start(script, base, tmp_path / "two", arguments + " --steps 5 --micro-batch 1", ranks=2))  # so that both accumulate gradients
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["stream"] == theirs["stream"] and ours["samples"] == theirs["samples"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((one[key] - two[key]).norm() <= 2e-3 * one[key].norm() + 1e-6 for key in one)
    # One rank goes on from what two ranks have saved: the last checkpoint is taken away, step 5 is done again.
    for folder in [tmp_path / "two", *(tmp_path / "two").glob("m*")]:
        if (folder / "checkpoints" / "step-000005").exists():
            (folder / "checkpoints" / "step-000005" / "state.json").unlink()
    for finished in (tmp_path / "two").glob("*/transformer"):
        shutil.rmtree(finished)
    said = finish(start(script, base, tmp_path / "two", arguments + " --steps 5"))
    assert "falling back to the one before" in said
    resumed = weights(tmp_path / "two")
    assert all((resumed[key] - two[key]).norm() <= 2e-3 * two[key].norm() + 1e-6 for key in two)


@pytest.mark.parametrize("script,arguments", [("train_switch.py", SWITCH + " --dropout 0 --p 0.5 --seed 1"), ("train_sugar.py", SUGAR)])  # the toy has three heads
def test_ranks_that_share_each_sample_train_as_one_does(script, arguments, base, tmp_path):
    arguments += " --dtype fp32 --steps 2 --warmup 1"
    finish(start(script, base, tmp_path / "one", arguments))
    finish(start(script, base, tmp_path / "three", arguments + " --sequence-parallel 3", ranks=3))
    for ours, theirs in zip(metrics(tmp_path / "three"), metrics(tmp_path / "one"), strict=True):
        assert ours["stream"] == theirs["stream"] and ours["samples"] == theirs["samples"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_a_rank_that_does_not_see_the_checkpoint_does_not_begin_anew(tmp_path):
    """As on a node whose disk is its own."""
    first, second = (SimpleNamespace(first=rank == 0, from_first=lambda step: 2, any=lambda flag: flag) for rank in (0, 1))
    save_checkpoint(tmp_path / "shared", {"model.x": torch.arange(6.0)}, {"step": 2, "positions": {}, "skipped": 0, "seconds": 0, "settings": {}},
                    distributed.start("cpu"), keep=2)
    found = resume.agreed_checkpoint(tmp_path / "shared", first)
    assert resume.agreed_checkpoint(tmp_path / "shared", second) == found and found[1]["step"] == 2
    with pytest.raises(BadInput, match="Not all ranks can go on from step 2.*step-000002 is not whole.*a disk that they share"):
        resume.agreed_checkpoint(tmp_path, second)
    first.any = lambda flag: True  # as the second one says
    with pytest.raises(BadInput, match="another rank says why"):
        resume.agreed_checkpoint(tmp_path / "shared", first)


def test_both_stages_of_sugar_on_two_ranks(base, tmp_path):
    """The second stage begins with what the first rank has just written."""
    arguments = SUGAR.replace("mix", "tsf") + " --steps 2 --warmup 1"
    assert "wrote" in finish(start("train_sugar.py", base, tmp_path / "run", arguments, ranks=2))
    assert [len((tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()) for stage in ("real", "mixed")] == [2, 2]


def test_a_finished_stage_of_another_run_is_refused_by_name_and_restart_drops_it(base, tmp_path):
    arguments = SUGAR + " --steps 2 --warmup 1"
    finish(start("train_sugar.py", base, tmp_path / "run", arguments))
    before = weights(tmp_path / "run")
    other = start("train_sugar.py", base, tmp_path / "run", arguments + " --design e")
    _, err = other.communicate(timeout=400)
    assert other.returncode == 2 and "with design = b, and now it is e" in err
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path / "run").items())
    other = start("train_sugar.py", base, tmp_path / "run", arguments.replace("mix", "ts"))  # whose stages have folders of their own
    _, err = other.communicate(timeout=400)
    assert other.returncode == 2 and "with strategy = mix, and now it is ts" in err and not (tmp_path / "run" / "real").exists()
    listed = tmp_path / "run" / "subjects" / "skipped.jsonl"  # of other data: it would hide the new reasons
    listed.parent.mkdir(exist_ok=True)
    listed.write_text('{"example": 0, "reason": "old"}\n')
    (tmp_path / "run" / "transformer").rename(tmp_path / "elsewhere")  # of a link the link goes, not what it names
    (tmp_path / "run" / "transformer").symlink_to(tmp_path / "elsewhere")
    finish(start("train_sugar.py", base, tmp_path / "run", arguments + " --design e --restart"))
    assert not listed.exists() and list((tmp_path / "elsewhere").iterdir())
    assert json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())["design"] == "e"
    assert len(metrics(tmp_path / "run")) == 2


def test_a_run_begun_anew_is_resumed_from_its_own_checkpoints(base, tmp_path):
    finish(start("train_switch.py", base, tmp_path / "run", SWITCH + " --steps 6 --keep 1"))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")  # a larger disk, where other things lie too
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "toy").mkdir()
    process = start("train_switch.py", base, tmp_path / "run", SWITCH + " --steps 400 --keep 1 --restart")
    wait_for_steps(process, tmp_path / "run", 3)
    process.kill()
    process.communicate()
    assert last_checkpoint(tmp_path / "run" / "checkpoints")[1]["settings"]["steps"] == 400
    assert (tmp_path / "elsewhere" / "toy").is_dir() and not (tmp_path / "elsewhere" / "step-000006").exists()


def test_the_second_of_two_stages_has_a_schedule_of_its_own_and_goes_on_from_the_first(base, tmp_path):
    """Else its learning rate would be what a cosine leaves at its end. Stopped in the second, resumed, and without the sheets: the
    same bit for bit."""
    arguments = SWITCH + " --strategy two-stage --steps 10 --warmup 1 --keep 99"
    finish(start("train_switch.py", base, tmp_path / "whole", arguments + " --validate-count 1"))
    rates, seen = {}, {}
    for name, steps in (("image", 6), ("video", 4)):
        lines = [json.loads(line) for line in (tmp_path / "whole" / name / "metrics.jsonl").read_text().splitlines()]
        rates[name], seen[name] = [line["lr"] for line in lines], {line["stream"] for line in lines}
        assert len(lines) == steps and max(rates[name]) == 0.01
    assert seen == {"image": {"image"}, "video": {"video"}}
    process = start("train_switch.py", base, tmp_path / "killed", arguments)
    wait_for_steps(process, tmp_path / "killed" / "video", 3)
    process.kill()
    process.communicate()
    before = saved(tmp_path / "killed")
    finish(start("train_switch.py", base, tmp_path / "killed", arguments))
    assert {name.split("/")[0] for name, *_ in before} == {"image", "video"} and before <= saved(tmp_path / "killed")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    # The second begins where the first has ended: two of its steps go no further than two learning rates.
    step = lambda run, number: load_file(next((tmp_path / "whole" / run / "checkpoints" / f"step-{number:06d}").glob("*.safetensors")))
    end, later = step("image", 6), step("video", 2)
    learnt = [key for key in end if key.startswith("model.") and "lora_B" in key]
    assert max(end[key].abs().max() for key in learnt) > 0.025
    assert 0 < max((later[key] - end[key]).abs().max() for key in learnt) <= 0.021


def test_what_is_later_than_this_run_goes_and_the_newest_stay(tmp_path):
    ranks, tensors = distributed.start("cpu"), {"model.x": torch.arange(6.0)}
    state = {"positions": {}, "skipped": 0, "seconds": 0, "settings": {}}
    (tmp_path / "step-000009").mkdir()  # broken
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, tensors, {**state, "step": step}, ranks, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_sheets_of_subjects_that_a_user_gives(base, tmp_path):
    Image.new("RGB", (80, 60), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "list.jsonl").write_text('{"prompt": "a creature is jumping in the snow", "image": "red.png", "noun": "creature"}\n')
    for script, arguments, folder in (("train_switch.py", SWITCH, "switch"), ("train_sugar.py", SUGAR, "sugar/mix")):
        said = f" --steps 1 --warmup 1 --validate-count 3 --validate-on {tmp_path / 'list.jsonl'}"
        finish(start(script, base, tmp_path / folder.split("/")[0], arguments + said))
        sheet = Image.open(tmp_path / folder / "validation" / "step-000001.png").convert("RGB")
        assert sheet.height == 2 * 64 + 4 and sheet.getpixel((66, 66)) == (255, 0, 0)  # one row, the subject in front
        assert not (tmp_path / folder / "validation.jsonl").exists()  # nothing measures it
    (tmp_path / "list.jsonl").write_text('{"prompt": "a creature"}\n')
    process = start("train_switch.py", base, tmp_path / "other", SWITCH + f" --validate-on {tmp_path / 'list.jsonl'}")
    assert "'a creature' needs an image" in process.communicate(timeout=400)[1] and process.returncode == 2


def test_the_frozen_half_is_truly_unchanged_and_each_stage_leaves_a_sheet(base, tmp_path, monkeypatch):
    frozen, train = {}, train_sugar.train

    def watched(model, options, *more) -> bool:
        """What is frozen, after training: in memory, as it is not what is written that tells."""
        done = train(model, options, *more)
        frozen[options.out.name] = {key: distributed.local(p.detach()).clone() for key, p in model.named_parameters() if not p.requires_grad}
        return done

    monkeypatch.setattr(train_sugar, "train", watched)
    arguments = SUGAR.replace("mix", "tsf") + " --steps 2 --warmup 1 --lr 0.01 --dtype bf16"  # slow where the CPU has none, so not everywhere
    assert train_sugar.main([*command("", base, tmp_path / "run", arguments)[2:], "--validate-count", "1"]) == 0
    for stage in ("real", "mixed"):
        sheet = Image.open(tmp_path / f"run/{stage}/validation/step-000002.png")
        assert sheet.height == 2 * 64 + 4 and Image.open(tmp_path / f"run/{stage}/validation/step-000002.gif").n_frames > 1
        before, line = (tmp_path / f"run/{stage}/validation.jsonl").read_text().splitlines()
        assert json.loads(before)["step"] == 0
        assert json.loads(line).keys() == {"step", "identity", "motion", "background", "look", "movement"}
    real, mixed = (load_file(tmp_path / f"run/{name}/transformer/diffusion_pytorch_model.safetensors") for name in ("real", "mixed"))
    first = {key for key in real if re.match(r"transformer_blocks\.[01]\.", key)}  # of four
    assert len(first) > 30 and all(torch.equal(real[key], mixed[key]) for key in first)
    changed = {key for key in real if not torch.equal(real[key], mixed[key])}
    assert {"patch_embed.proj.weight", "dino_proj.weight", "null_dino", "transformer_blocks.2.attn1.to_q.weight"} <= changed
    assert not changed & first
    assert frozen["real"] == {} and frozen["mixed"].keys() == first
    assert all(torch.equal(p, real[key].to(torch.bfloat16)) for key, p in frozen["mixed"].items())


@pytest.mark.parametrize("damage", ["cut short", "zeros"])
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path, capsys):
    ranks, state = distributed.start("cpu"), {"positions": {}, "skipped": 0, "seconds": 0, "settings": {}}
    for step in (1, 2):
        save_checkpoint(tmp_path, {"model.x": torch.arange(6.0)}, {**state, "step": step}, ranks, keep=2)
    file = tmp_path / "step-000002" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if damage == "cut short" else bytes(file.stat().st_size))
    assert last_checkpoint(tmp_path)[0].name == "step-000001"
    assert "step-000002 is not whole" in capsys.readouterr().err


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    ranks, tensors = distributed.start("cpu"), {"model.x": torch.arange(6.0)}
    state = {"step": 1, "positions": {}, "skipped": 0, "seconds": 0, "settings": {}}
    save_checkpoint(tmp_path, tensors, state, ranks, keep=2)

    def full(tensors, name):
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(BadInput, match="step-000002 could not be written.*No space left.*last whole one is .*step-000001"):
        save_checkpoint(tmp_path, tensors, {**state, "step": 2}, ranks, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = {"model.x": torch.zeros(6)}
    load_checkpoint(*last_checkpoint(tmp_path), found, ranks)
    assert torch.equal(found["model.x"], tensors["model.x"])


def test_a_loss_that_is_not_finite_skips_the_step_and_stops_in_the_end(base, tmp_path):
    process = start("train_switch.py", base, tmp_path / "run", SWITCH + " --steps 9 --lr 1e30 --clip 1e30 --max-skipped 2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.search(r"not finite for 3 steps, the last one step \d+ on (image|video) samples", err)
