"""The papers' ablations: every flag is known, every finding speaks of rows that there are, and verdicts follow from numbers."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st

import evaluate
import figures
import measure
import run_ablations
import sample
import train_sugar
import train_switch
import untrained
from ablations import ABLATIONS, SCORES, Finding
from cli import ROOT
from run_ablations import Busy, Point, difference, elapsed, flags_of, locked, no_verdict, over_seeds, parsed, read_measured, trained, verdict

POINT = Point("run/videos", "", "", 0, {"identity": 0.5, "clip_t": None}, 2.0, {"flags": "", "step": 1, "seconds": 1.0})._asdict()


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_flags_and_findings_are_known(name):
    ablation = ABLATIONS[name]
    for variant in ablation.variants.values():
        {"switch": train_switch, "sugar": train_sugar}[ablation.method].parse((variant.train or "").split())
        for sweep in ablation.sweep:
            sample.parse(["--prompt", "a", *variant.sample.split(), *sweep.split()])
    assert ablation.control in ablation.variants
    for finding in ablation.findings:
        assert {finding.more, finding.less, *(finding.than or ())} <= ablation.variants.keys() and finding.more != finding.less
        assert finding.score in SCORES and finding.at in ("", *SCORES) and (not finding.at or len(ablation.sweep) > 1)
    assert len({(v.train, v.sample) for v in ablation.variants.values()}) == len(ablation.variants)


def test_both_papers_tables_and_figures_are_there():
    sources = " ".join(ablation.source for ablation in ABLATIONS.values())
    assert all(f"Table {n}" in sources for n in (1, 2, 3, 5, 6, 7, 8)) and all(f"Figure {n}" in sources for n in (5, 6, 7, 9, 11))


def test_table_1_of_sugar_has_its_five_rows():
    assert len(ABLATIONS["sugar-guidance"].variants) == 5


def test_figures_6_and_7_of_sugar_have_the_design_that_the_paper_names():
    for name in ("sugar-strategy", "sugar-synthetic"):  # "we use the simplest attention design, which is design (e)"
        assert all("--design e" in (variant.train or "") for variant in ABLATIONS[name].variants.values())


def test_students_interval():
    mean, low, high = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.3027 / np.sqrt(3), rel=1e-3) and mean - low == pytest.approx(high - mean)
    assert np.isnan(over_seeds([1.0])[1])


@pytest.mark.parametrize("differences,margin,said", [
    ((0.2, 0.21, 0.19), 0, "holds"), ((-0.2, -0.21, -0.19), 0, "does not hold: the opposite"), ((0.2, -0.2, 0.1), 0, "undecided"),
    ((-0.02, -0.021, -0.019), 0.05, "holds"), ((-0.08, -0.081, -0.079), 0.05, "does not hold: the opposite"),
    ((1 / 64, 1 / 64, 1 / 64), 0, "undecided")])  # one video of each 64, three times over
def test_a_verdict_is_about_differences_seed_by_seed(differences, margin, said):
    base = np.random.default_rng(0).normal(0, 5, len(differences))  # seeds differ by far more than the rows do
    results = {"a": [[{"look": b + d}] for b, d in zip(base, differences)], "b": [[{"look": b}] for b in base]}
    finding = Finding("a claim", "look", "a", "b", margin=margin)
    line = verdict(finding, results, 64, "")
    assert f"| {said}" in line and f"{np.mean(differences):+.3f}" in line
    assert "no verdict (a reason)" in verdict(finding, results, 64, "a reason")


@pytest.mark.parametrize("gaps,said", [((0.3, 0.1), "holds"), ((0.1, 0.3), "does not hold: the opposite"), ((0.1, 0.1), "undecided")])
def test_a_gap_beside_another(gaps, said):
    base = np.random.default_rng(0).normal(0, 5, (3, 2))  # of seeds and of pairs
    rows = {"a": base[:, 0] + gaps[0], "b": base[:, 0], "c": base[:, 1] + gaps[1], "d": base[:, 1]}
    results = {label: [[{"look": value}] for value in values] for label, values in rows.items()}
    line = verdict(Finding("the gap is smaller", "look", "a", "b", than=("c", "d")), results, 64, "")
    assert f"a minus b, that minus (c minus d) = {gaps[0] - gaps[1]:+.3f}" in line and f"| {said}" in line


def test_lines_are_compared_at_the_same_level(seed):
    """Two lines of known shape, one 0.3 above the other, at levels that hardly overlap: their plain means say the opposite."""
    shape = lambda level: 1 - 2 * level
    line = lambda levels, above: [{"dino_i": level, "movement": shape(level) + above} for level in np.random.default_rng(seed).permutation(levels)]
    more, less = line([0.5, 0.7, 0.9], 0.3), line([0.1, 0.4, 0.6], 0.0)
    assert difference(Finding("", "movement", "a", "b", at="dino_i"), more, less) == pytest.approx(0.3)
    assert difference(Finding("", "movement", "a", "b"), more, less) < 0
    apart = Finding("a claim", "movement", "a", "b", at="dino_i")
    far = line([0.95, 0.99], 0.0)
    assert np.isnan(difference(apart, far, less))
    judged = lambda *rows: verdict(apart, dict(zip("ab", rows)), 64, "")
    assert "no verdict (hardly a common level of DINO-I)" in judged([far] * 3, [less] * 3)
    # Whether there are enough common levels is asked of the lines' means over the seeds: 0.1 of 0.4, 0.25 of 0.5.
    assert "no verdict (hardly a common level of DINO-I)" in judged([more] * 3, [less] * 3)
    half = line([0.35, 0.7, 0.9], 0.3)
    assert "at the same DINO-I (50% of the shorter line)" in judged([half] * 3, [less] * 3) and "| holds" in judged([half] * 3, [less] * 3)
    lower, higher = (line([level + by for level in (0.4, 0.7, 0.8)], 0.3) for by in (-0.1, 0.1))  # 0.3 and 0.1 of 0.4
    assert "(50% of the shorter line)" in judged([lower, higher] * 2, [less] * 4)
    assert "not measured" in verdict(Finding("", "movement", "a", "b", at="clip_t"), {"a": [more] * 3, "b": [less] * 3}, 64, "")
    # Exact scores are counts, so levels tie: a tie is its mean, in whatever order, and a row of one level is no line.
    exact = Finding("", "movement", "a", "b", at="identity")
    tied = [{"identity": i, "movement": m} for i, m in ((0.1, 0.1), (0.1, 0.5), (0.3, 0.7))]
    other = [{"identity": i, "movement": 0.2} for i in (0.1, 0.2, 0.3)]
    assert difference(exact, tied, other) == pytest.approx(0.3) == difference(exact, tied[::-1], other)
    assert np.isnan(difference(exact, [{**point, "identity": 0.1} for point in tied], other))
    assert "not measured" in verdict(Finding("", "clip_t", "a", "b"), {"a": [[{"clip_t": None}]] * 3, "b": [[{}]] * 3}, 64, "")


def test_a_short_run_or_one_that_has_learnt_nobody_gives_no_verdict(tmp_path):
    untrained.init(tmp_path / "toy")
    usual = {"count": 64, "sampling_steps": 25, "seeds": 3, "quick": False, "train": "", "model": tmp_path / "toy", "out": tmp_path, "device": None}
    reason = lambda identity=0.5, **more: no_verdict(
        ABLATIONS["switch-cls"], {"with <cls>": [[{"identity": identity}]] * 3}, SimpleNamespace(**usual | more))
    assert reason() == "" and all(reason(train=flags) == "" for flags in ("--steps 5000", "--dtype fp32", "--dtype bf16 --compile"))
    assert "trained with --rank 4" in reason(train="--rank 4")
    assert "fewer than 3 seeds" in reason(seeds=2) and "--quick" in reason(quick=True)
    assert all("fewer than 2000 steps" in reason(**less) for less in ({"count": 63}, {"sampling_steps": 24}, {"train": "--steps 1"}))
    assert "does not know its subjects" in reason(2 / 16) and "does not know" not in reason(0.2)
    changed = {"with <cls>": [[{"identity": 0.1, "own_look": 0.4}]] * 3}  # looks may hide whom it knows
    assert no_verdict(ABLATIONS["switch-cls"], changed, SimpleNamespace(**usual)) == ""


def test_what_a_run_depends_on_tells_it_apart(tmp_path):
    untrained.init(tmp_path / "toy")
    args = SimpleNamespace(model=tmp_path / "toy", out=tmp_path, device=None)
    name = lambda flags: parsed("sugar", flags, 0, args)[0].out
    assert name("--p 0.5 --strategy tsf") == name("--strategy tsf") != name("--strategy ts")
    assert name("--dtype bf16") == name("--dtype fp32") == name("--compile --micro-batch 2")  # computers differ in what is fast
    mixed, staged = (parsed("sugar", f"--strategy {strategy}", 0, args)[0] for strategy in ("mix", "tsf"))
    assert mixed.steps == 2 * staged.steps  # which has two stages
    before = name("")
    file = tmp_path / "toy" / "dino" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + 8] ^= 1
    file.write_bytes(content)
    assert name("") != before  # SUGAR is trained on DINO's tokens


def test_quick_ablations_run_and_share_their_runs(tmp_path, monkeypatch, capsys):
    untrained.init(tmp_path / "toy")
    known = {"identity": 0.5, "motion": 1.0, "background": 0.0, "look": 1.0, "movement": 0.3}
    monkeypatch.setattr(measure, "score", lambda *_: known)  # which takes a second for each video
    command = lambda name: ["ablate", name, "--quick", "--model", str(tmp_path / "toy"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main(command("switch-cls")) == 0
    out = tmp_path / "out" / "quick"
    text = (out / "switch-cls.md").read_text()
    assert "| without `<cls>` | " in text and text.count("no verdict (--quick)") == len(ABLATIONS["switch-cls"].findings) and "mean nothing" in text and "8 steps at" in text
    assert (out / "switch-cls.png").exists()
    runs = [json.loads(file.read_text())["flags"] for file in out.glob("switch-*/done.json")]
    assert len(runs) == 2 and any(flags.startswith("--no-cls") for flags in runs)
    # Two designs of two stages, each sampled in several ways; then another second stage of one of them.
    assert evaluate.main(command("sugar-synthetic")) == 0
    text = (out / "sugar-synthetic.md").read_text()
    assert text.count("| TSF-Video --omega-image") == 3 and "at the same Subject consistency" in text
    assert len(list(out.glob("first-*"))) == 1 and len(list(out.glob("sugar-*/real/checkpoints"))) == 1  # trained once, for both
    assert len(list(out.glob("sugar-*/settings.json"))) == 2  # also where the first stage is another's: without it nothing is resumed
    # Ways to sample from the toy's own model, which is not trained.
    assert evaluate.main(command("sugar-guidance")) == 0
    text = (out / "sugar-guidance.md").read_text()
    assert "Nothing is trained." in text and text.count("| image ") == 5 and len(list(out.glob("sugar-own-*/videos-*/videos/*.mp4"))) == 10
    assert evaluate.main([*command("sugar-guidance"), "--train=--compile"]) == 2 and "trains nothing" in capsys.readouterr().err
    # Once more: nothing is trained or sampled again. What another ablation needs as well is there.
    for trainer in (train_switch, train_sugar):
        monkeypatch.setattr(trainer, "run", lambda args: pytest.fail("it trained again"))
    made = {file: file.stat().st_mtime_ns for file in out.glob("*/videos-*/videos/*.mp4")}
    assert evaluate.main(command("switch-cls")) == 0 and evaluate.main(command("sugar-synthetic")) == 0
    assert made == {file: file.stat().st_mtime_ns for file in out.glob("*/videos-*/videos/*.mp4")}
    args = evaluate.parse(command("switch-t2v"))
    args.out, args.count = out, 2
    assert trained("switch", flags_of("switch", ABLATIONS["switch-t2v"].variants["I2V"], args), 0, args).is_dir()
    # Nor elsewhere, where what was measured here is given.
    elsewhere = ["--out", str(tmp_path / "elsewhere"), "--measured", str(out / "measured.jsonl")]
    for name in ("switch-cls", "sugar-synthetic", "sugar-guidance"):
        assert evaluate.main([*command(name), *elsewhere]) == 0
        assert (tmp_path / "elsewhere/quick" / f"{name}.md").read_text() == (out / f"{name}.md").read_text()
    assert not list((tmp_path / "elsewhere").rglob("*.mp4")) and len(read_measured(out / "measured.jsonl")) == 2 + 2 * 3 + 5
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate.main(command("switch-cls")) == 2


def test_processes_side_by_side_do_each_what_no_other_is_at(tmp_path, monkeypatch):
    ablation, asked, scores = ABLATIONS["switch-p"], [], dict.fromkeys(SCORES, 0.5)

    def stub(ablation, variant, sweep, seed, known, args, wait):
        asked.append((seed, variant.train, wait))
        if asked[-1] == (1, "--p 0.4", False):
            raise Busy
        return Point(f"switch-{seed}-{variant.train}/videos", variant.train, "", seed, scores, 1.0, {"step": 1, "seconds": 1.0})

    monkeypatch.setattr(run_ablations, "measured", stub)
    untrained.init(tmp_path / "toy")
    assert evaluate.main(f"ablate switch-p --model {tmp_path / 'toy'} --out {tmp_path / 'out'} --device cpu".split()) == 0
    rows = [variant.train for variant in ablation.variants.values()]
    assert asked == [(seed, row, False) for seed in range(3) for row in rows] + [(1, "--p 0.4", True)]
    assert "12 trainings" in (tmp_path / "out/switch-p.md").read_text()
    with locked(tmp_path / "run"):
        with pytest.raises(Busy), locked(tmp_path / "run", wait=False):
            pytest.fail("two at one run")
    with locked(tmp_path / "run", wait=False):
        pass


@pytest.mark.parametrize("flags", ["--seed 0", "--seed=2", "--see 1 --out here", "--model elsewhere", "--device cpu", "--restart", "--plan"])
def test_what_the_ablation_gives_itself_is_not_given_to_all_trainings(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_switch, "run", lambda args: pytest.fail("it trained"))
    assert evaluate.main(["ablate", "switch-cls", "--out", str(tmp_path / "out"), f"--train={flags}"]) == 2
    assert "is the ablation's own to give" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"point": "a"}', POINT | {"scores": {"identity": "high"}}, POINT | {"scores": None},
                                  POINT | {"scores": {"look": 1.0}}, POINT | {"scores": {"identity": None}}, POINT | {"point": ["a"]}, POINT | {"more": 1},
                                  POINT | {"trained": {"step": "many"}}, POINT | {"trained": []}, POINT | {"seconds": None},
                                  POINT | {"trained": {"step": 0, "seconds": 1}}, POINT | {"trained": {"step": 1, "seconds": None}}])
def test_a_line_that_was_not_measured_is_named(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_switch, "run", lambda args: pytest.fail("it trained"))
    file = tmp_path / "measured.jsonl"
    file.write_text(f"{json.dumps(POINT)}\n{line if isinstance(line, str) else json.dumps(line)}\n")
    assert evaluate.main(["ablate", "switch-cls", "--out", str(tmp_path / "out"), "--measured", str(file)]) == 2
    assert f"{file}, line 2: this is no point of an ablation" in capsys.readouterr().err and not (tmp_path / "out").exists()
    file.unlink()
    assert evaluate.main(["ablate", "switch-cls", "--out", str(tmp_path / "out"), "--measured", str(file)]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out/measured.jsonl").write_text("half a li")  # to which is added
    assert evaluate.main(["ablate", "switch-cls", "--out", str(tmp_path / "out")]) == 2
    assert "out/measured.jsonl, line 1: this is no point" in capsys.readouterr().err


@pytest.mark.parametrize("name,rows", [
    ("sugar-guidance", []), ("sugar-design", ["design (b)", "design (e)"]), ("sugar-drop", ["nothing dropped", "both dropped"]),
    ("switch-videos", ["100 videos", "400 videos"])])
def test_readme_says_what_was_measured_of_the_shipped_model(name, rows, tmp_path, monkeypatch):
    """examples/measured.jsonl is of the weights that are shipped, and README's findings follow from it."""
    monkeypatch.setattr(sample, "run", lambda args: pytest.fail("it sampled"))
    file = ROOT / "examples/measured.jsonl"
    monkeypatch.setattr(run_ablations, "trained", lambda *_: pytest.fail("it trained"))
    command = ["ablate", name, *(["--rows", *rows] if rows else []), "--model", str(ROOT / "checkpoints/toy"), "--out", str(tmp_path)]
    assert evaluate.main([*command, "--measured", str(file), "--device", "cpu"]) == 0
    _, findings = re.findall(r"(?:^\|.*\n)+", (tmp_path / f"{name}.md").read_text(), flags=re.MULTILINE)
    assert {*findings.splitlines()} <= {*(ROOT / "README.md").read_text().splitlines()}
    assert "no verdict" not in findings.replace("no verdict (hardly a common level", "")  # which is what was measured, not what is missing


def test_the_time_of_an_attempt_that_was_stopped_counts(tmp_path, monkeypatch):
    clock = iter([0.0, 7.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(run_ablations, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with pytest.raises(KeyboardInterrupt), elapsed(tmp_path):
        raise KeyboardInterrupt
    with elapsed(tmp_path):
        (tmp_path / "scores.json").write_text("{}")
    with elapsed(tmp_path):  # where nothing is left to do
        pass
    assert json.loads((tmp_path / "elapsed.json").read_text()) == {"seconds": 10.0}


def test_some_rows_of_a_table(tmp_path, monkeypatch):
    """They are judged as in the whole table: alone what speaks of no other row, with the same numbers."""
    ablation, generator = ABLATIONS["switch-p"], np.random.default_rng(0)
    drawn = {(seed, variant.train): dict(zip(SCORES, generator.uniform(0.4, 0.6, len(SCORES)))) for seed in range(3) for variant in ablation.variants.values()}
    monkeypatch.setattr(run_ablations, "measured", lambda ablation, variant, sweep, seed, *_: Point(
        f"switch-{seed}-{variant.train}/videos", variant.train, "", seed, drawn[seed, variant.train], 1.0, {"step": 1, "seconds": 1.0}))
    untrained.init(tmp_path / "toy")
    written = []
    for rows in ([], ["--rows", "p = 0.2", "p = 0"], ["--rows", *ablation.variants]):
        assert evaluate.main(["ablate", "switch-p", *rows, "--model", str(tmp_path / "toy"), "--out", str(tmp_path), "--device", "cpu"]) == 0
        written.append((tmp_path / "switch-p.md").read_text())
    whole, part, every = written
    assert whole == every and "Left out" not in whole and "Left out: p = 0.4, p = 0.6." in part and "6 trainings" in part
    lines = [line for line in whole.splitlines() if "p = 0.4" not in line and "p = 0.6" not in line and not line.startswith("3 seeds")]
    assert lines == [line for line in part.splitlines() if not line.startswith("3 seeds")] and any(": p = 0.2 minus p = 0 " in line for line in lines)


@pytest.mark.parametrize("rows,said", [
    (["p = 0.2", "p = 1"], "no 'p = 1'; there are 'p = 0', 'p = 0.2', 'p = 0.4', 'p = 0.6'"),
    (["p = 0", "p = 0.4"], "'p = 0.2' must be among them"), (["p = 0.2", "p = 0.4"], "no finding speaks of these alone")])
def test_rows_of_which_nothing_is_found(rows, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_switch, "run", lambda args: pytest.fail("it trained"))
    assert evaluate.main(["ablate", "switch-p", "--out", str(tmp_path / "out"), "--rows", *rows]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_unknown_ablation_lists_them(capsys):
    assert evaluate.main(["ablate", "nothing"]) == 2
    assert "there are switch-strategy, " in capsys.readouterr().err


@given(st.floats(-1e3, 1e3), st.just(0) | st.floats(1e-3, 1e3))
def test_an_axis_has_round_numbers_that_hold_what_it_shows(low, wide):
    ticks = figures.axis(low, low + wide)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and low + wide <= ticks[-1] + 1e-6 * step and 3 <= len(ticks) <= 7
    assert np.allclose(np.diff(ticks), step) and min(abs(step / 10.0 ** power / of - 1) for power in range(-9, 4) for of in (1, 2, 2.5, 5)) < 1e-6
    assert abs(ticks[0] / step - round(ticks[0] / step)) < 0.01  # each a multiple of the step, which is known to some digits alone


def test_charts_show_every_row():
    interval = lambda x: (x, x - 0.1, x + 0.1)
    dots = np.asarray(figures.scatter({"one": [(interval(0.2), interval(0.3))], "two": [(interval(0.8), interval(0.7))]}, "x", "y", "t"))
    places = [np.argwhere((dots == np.array(colour)).all(-1)).mean(0) for colour in figures.COLOURS[:2]]
    assert places[0][1] < places[1][1] and places[0][0] > places[1][0]  # further right, and higher up
    chart = np.asarray(figures.bars({"score": {"one": interval(1.0), "two": interval(0.5)}}, "t"))
    areas = [(chart[76:] == np.array(colour)).all(-1).sum() for colour in figures.COLOURS[:2]]
    assert areas[0] > 1.6 * areas[1] > 0
