"""The papers' ablations: every flag is known, every finding speaks of rows that there are, and verdicts follow from numbers."""

import json

import numpy as np
import pytest

import ablations
import evaluate
import figures
import sample
import toy_networks
import train_sugar
import train_switch
from ablations import ABLATIONS, Finding, over_seeds, verdict


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_flags_and_findings_are_known(name):
    ablation = ABLATIONS[name]
    for variant in ablation.variants.values():
        {"switch": train_switch, "sugar": train_sugar}[ablation.method].parse(variant.train.split())
        sample.parse(["--prompt", "a", *variant.sample.split()])
    for finding in ablation.findings:
        assert {finding.more, finding.less} <= ablation.variants.keys() and finding.more != finding.less
        assert finding.score in ablations.SCORES
    assert len({(v.train, v.sample) for v in ablation.variants.values()}) == len(ablation.variants)


def test_both_papers_tables_and_figures_are_there():
    sources = " ".join(ablation.source for ablation in ABLATIONS.values())
    assert all(f"Table {n}" in sources for n in (1, 2, 3, 5, 6, 7, 8)) and all(f"Figure {n}" in sources for n in (5, 6, 7, 9, 11))


def test_students_interval():
    mean, low, high = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.3027 / np.sqrt(3), rel=1e-3) and mean - low == pytest.approx(high - mean)
    assert np.isnan(over_seeds([1.0])[1])


@pytest.mark.parametrize("differences,said", [((0.2, 0.21, 0.19), "holds"), ((-0.2, -0.21, -0.19), "does not hold"),
                                              ((0.2, -0.2, 0.1), "undecided"), ((0.3, 0.3), "no verdict (fewer than 3 seeds)")])
def test_a_verdict_is_about_differences_seed_by_seed(differences, said):
    base = np.random.default_rng(0).normal(0, 5, len(differences))  # seeds differ by far more than the rows do
    results = {"a": [{"look": b + d} for b, d in zip(base, differences)], "b": [{"look": b} for b in base]}
    line = verdict(Finding("a claim", "look", "a", "b"), results, quick=False)
    assert f"| {said}" in line and f"{np.mean(differences):+.3f}" in line
    assert "no verdict (--quick)" in verdict(Finding("a claim", "look", "a", "b"), results, quick=True)


def test_a_quick_ablation_runs_and_runs_are_shared(tmp_path, monkeypatch, capsys):
    toy_networks.init(tmp_path / "toy")
    capsys.readouterr()
    command = ["ablate", "switch-cls", "--quick", "--model", str(tmp_path / "toy"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main(command) == 0
    text = (tmp_path / "out" / "quick" / "switch-cls.md").read_text()
    assert "| without <cls> | " in text and text.count("no verdict (--quick)") == 4 and "mean nothing" in text
    assert (tmp_path / "out" / "quick" / "switch-cls.png").exists()
    runs = [json.loads(file.read_text())["flags"] for file in (tmp_path / "out" / "quick").glob("switch-*/done.json")]
    assert len(runs) == 2 and any(flags.startswith("--no-cls") for flags in runs)
    # Once more: nothing is trained or sampled again. What another ablation needs as well is there.
    monkeypatch.setattr(train_switch, "run", lambda args: pytest.fail("it trained again"))
    assert evaluate.main(command) == 0
    args = evaluate.parse(command)
    args.out, args.count = args.out / "quick", 2
    assert ablations.trained("switch", ABLATIONS["switch-t2v"].variants["I2V"], 0, args)[1] > 0


def test_an_unknown_ablation_lists_them(capsys):
    assert evaluate.main(["ablate", "nothing"]) == 2
    assert "there are switch-strategy, " in capsys.readouterr().err


def test_charts_show_every_row():
    interval = lambda x: (x, x - 0.1, x + 0.1)
    dots = np.asarray(figures.scatter({"one": [(interval(0.2), interval(0.3))], "two": [(interval(0.8), interval(0.7))]}, "x", "y", "t"))
    places = [np.argwhere((dots == np.array(colour)).all(-1)).mean(0) for colour in figures.COLOURS[:2]]
    assert places[0][1] < places[1][1] and places[0][0] > places[1][0]  # further right, and higher up
    chart = np.asarray(figures.bars({"score": {"one": interval(1.0), "two": interval(0.5)}}, "t"))
    areas = [(chart[76:] == np.array(colour)).all(-1).sum() for colour in figures.COLOURS[:2]]
    assert areas[0] > 1.6 * areas[1] > 0
