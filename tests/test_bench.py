"""bench.py: both sides compute the same where they can, every row runs, and the floor counts what was computed."""

import argparse

import pytest
import torch
from conftest import relative_error

import bench


@pytest.fixture
def args(monkeypatch):
    """Two narrow layers."""
    monkeypatch.setitem(bench.MODELS, "5b", dict(num_attention_heads=2, num_layers=2, use_rotary_positional_embeddings=True))
    return argparse.Namespace(frames=9, height=64, width=96, layers=2, device="cpu", dtype=torch.float32, compile=False,
                              recompute=None, steps=2, designs=["b", "d"], runs=1, flags=[])


@pytest.mark.parametrize("row", ["forward", "decode", "encode", "attention"])
def test_sides_compute_the_same(row, args):
    if row in ("decode", "encode"):
        args.frames, args.height, args.width = 1, 16, 32  # of the official VAE
    made = {side: build()() for side, build in bench.ROWS[row](args).items()}
    if row == "attention":
        for design in args.designs:
            assert relative_error(made[f"({design})"], made[f"({design}), mask"]) < 1e-5
    else:
        assert made["ours"].norm() > 0 and relative_error(made["ours"], made["diffusers"]) < 1e-5


@pytest.mark.parametrize("row", ["forward", "switch", "sugar", "train", "attention"])
def test_every_row_is_measured(row, args, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak", lambda row, side, args: 10**9)
    measured = bench.measure(row, args, {"flops": 1e12, "bytes": 1e10})
    said = capsys.readouterr().out
    for side, entry in measured["sides"].items():
        assert f"| {side} |" in said and entry["seconds"] > 0 and entry["flop"] > 0
        assert entry["floor"] > 0
    assert all(len(times) == args.runs + 1 for times in measured["times"].values())


def test_products_are_noted_with_their_shapes():
    a, b, q = torch.randn(4, 5), torch.randn(5, 6), torch.randn(1, 2, 7, 64)
    with bench.Products() as products:
        a @ b
        a @ b
        (a + 1).relu()
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert sorted(products.seen.values()) == [1, 2]
    [name, _] = [op.name() for op, *_ in products.seen]
    assert name == "aten::mm"
