"""bench.py: both sides compute the same where they can, every row runs, and the floor counts what was computed."""

import argparse
import json

import pytest
import torch
from conftest import relative_error

import bench

BEST = {"flops": 1e12, "bytes": 1e10}


@pytest.fixture
def args(monkeypatch):
    """Two narrow layers."""
    monkeypatch.setitem(bench.MODELS, "5b", dict(num_attention_heads=2, num_layers=2, use_rotary_positional_embeddings=True))
    return argparse.Namespace(frames=9, height=64, width=96, layers=2, device="cpu", cuda=False, dtype=torch.float32, compile=False,
                              recompute="none", steps=2, designs=["b", "d"], runs=1, flags=[])


@pytest.mark.parametrize("row", ["forward", "switch", "decode", "encode", "train", "attention"])
def test_sides_compute_the_same(row, args):
    if row in ("decode", "encode"):
        args.frames, args.height, args.width = 1, 16, 32  # of the official VAE
    made = {side: build()().detach() for side, build in bench.ROWS[row](args).items()}  # of train, the first step's loss
    if row == "attention":
        for design in args.designs:
            assert relative_error(made[f"({design})"], made[f"({design}), mask"]) < 1e-5
    else:
        assert all(result.norm() > 0 for result in made.values())
        if row != "switch":
            assert relative_error(made["ours"], made["diffusers"]) < 1e-5
        if row in ("forward", "switch"):
            assert relative_error(made["diffusers, fused"], made["diffusers"]) < 1e-5


def test_streamed_weights_compute_the_same(args):
    """On a CPU diffusers has no groups on a stream."""
    expected, sides = bench.ROWS["forward"](args)["ours"]()(), bench.ROWS["low-memory"](args)
    assert torch.equal(sides["ours"]()(), expected)
    assert relative_error(sides["diffusers, sequential"]()(), expected) < 1e-5


@pytest.mark.parametrize("row", ["forward", "switch", "sugar", "train", "attention"])
def test_every_row_is_measured(row, args, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak", lambda row, side, args: 10**9)
    measured = bench.measure(row, args, BEST)
    said = capsys.readouterr().out
    for side, entry in measured["sides"].items():
        assert f"| {side} |" in said and min(entry[name] for name in ("seconds", "flop", "bytes", "floor", "ratio")) > 0
    assert all(len(times) == args.runs + 1 for times in measured["times"].values())
    assert ("attending densely" in said) == (row == "sugar")


def test_a_process_of_its_own_is_asked_for_the_same(monkeypatch):
    """Wherever the flags stand among the rows."""
    asked = []
    monkeypatch.setattr(bench, "rows", lambda args, what: asked.append(args) or True)
    monkeypatch.setattr(bench.distributed, "leave", lambda status: None)
    for said in ("--runs 1 forward --designs b d --recompute all", "forward --runs 1 --designs b d --recompute", "forward"):
        monkeypatch.setattr("sys.argv", ["bench.py", *said.split(), "--device", "cpu", "--compile"])
        bench.main()
        monkeypatch.setattr("sys.argv", ["bench.py", "forward", *asked[-1].flags])
        bench.main()
        one, other = (vars(args) for args in asked[-2:])
        assert one == other and one["what"] == ["forward"] and one["compile"]


def test_ratios_are_of_sides_in_the_same_turn_and_turns_have_their_own_orders(args, monkeypatch):
    """A machine that gets slower and slower: each run takes half as long again as the one before."""
    order = []
    monkeypatch.setattr(bench, "peak", lambda row, side, args: None)
    sides = {side: lambda side=side: lambda: order.append(side) for side in ("ours", "diffusers")}
    monkeypatch.setitem(bench.ROWS, "forward", lambda args: sides)
    monkeypatch.setattr(bench, "seconds", lambda run, args: run() or 1.5 ** len(order))
    bench.ROWS["forward"].__doc__ = ""
    args.runs = 5
    measured = bench.measure("forward", args, BEST)["sides"]
    turns = [order[i : i + 2] for i in range(2, len(order), 2)]  # after those that were counted
    assert len(turns) == 6 and all(sorted(turn) == ["diffusers", "ours"] for turn in turns)
    first = sum(turn[0] == "ours" for turn in turns[1:])
    assert first in (2, 3), "each about as often"
    assert measured["ours"]["ratio"] == pytest.approx(1 / 1.5 if first == 3 else 1.5)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_side_that_runs_out_of_memory_is_said_to_and_the_others_are_measured(when, args, monkeypatch, capsys):
    ran = []

    def greedy():
        ran.append("")
        if when == "at once" or len(ran) > 2:
            raise torch.OutOfMemoryError("no room")
        return torch.ones(2, 2) @ torch.ones(2, 2)

    monkeypatch.setattr(bench, "peak", lambda row, side, args: None if side == "diffusers" else 10**9)
    monkeypatch.setitem(bench.ROWS, "forward", lambda args: {"ours": lambda: lambda: torch.ones(2, 2) @ torch.ones(2, 2),
                                                             "diffusers": lambda: greedy})
    bench.ROWS["forward"].__doc__ = ""
    measured = bench.measure("forward", args, BEST)["sides"]
    assert measured["ours"]["seconds"] > 0 and "seconds" not in measured["diffusers"]
    assert "| diffusers | out of memory |" in capsys.readouterr().out


def test_rows_are_kept_beside_those_of_other_sizes_and_machines(args, tmp_path):
    file = tmp_path / "bench.json"
    for row, size, seconds in (("forward", "small", 1), ("train", "small", 2), ("forward", "large", 3), ("forward", "small", 4)):
        bench.keep(row, size, {"seconds": seconds}, args, file)
    args.dtype = torch.bfloat16
    bench.keep("forward", "small", {"seconds": 5}, args, file)
    assert [entry.get("seconds") for entry in json.loads(file.read_text())] == [2, 3, 4, 5]


def test_each_row_has_a_size_of_its_own(args):
    args.frames = args.height = args.width = None
    assert bench.size_of("attention", bench.sized("attention", args)) == "7,490 tokens of 17x480x720"
    assert bench.size_of("decode", bench.sized("decode", args)) == "9x240x360"
    args.cuda, args.height = True, 96
    assert bench.size_of("forward", bench.sized("forward", args)) == "2 layers of the 5b, 49x96x720"


def test_products_are_noted_with_their_shapes_and_without_masks():
    a, b, q = torch.randn(4, 5), torch.randn(5, 6), torch.randn(1, 2, 7, 64)
    with bench.Products() as products:
        a @ b
        a @ b
        torch.zeros(4, 6).addmm_(a, b)
        (a + 1).relu()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, torch.ones(7, 7, dtype=torch.bool))
    counts = {op.name(): count for (op, *_), count in products.seen.items()}
    assert sorted(counts.values()) == [1, 1, 2] and counts["aten::mm"] == 2 and counts["aten::addmm_"] == 1
    assert products.bytes >= 4 * (2 * (20 + 30 + 24) + 20 + 30 + 2 * 24 + 4 * q.numel())
    [named] = [dict(named) for (op, _, named) in products.seen if "scaled_dot" in op.name()]
    assert named["attn_mask"] is None
    products.alone()()


def test_compiled_code_is_counted():
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    run = torch.compile(lambda: torch.relu(a @ b), backend="eager")
    run()
    floor, count = bench.counted(run)
    floor()
    assert count == {"flop": 2 * 4 * 5 * 6, "bytes": 4 * (20 + 30 + 24)}
    low = torch.compile(lambda: torch.zeros(4, 6).addmm_(a, b), backend="eager")
    assert bench.counted(low)[1]["flop"] == 2 * 4 * 5 * 6
