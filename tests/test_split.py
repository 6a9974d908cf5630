"""One video on many ranks is the video of one rank: guidance branches, the sequence, and both, for every attention design."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import ROOT
from conftest import relative_error

import distributed
import media
import untrained
from checkpoint import BadInput
from model import Config, Transformer


def torchrun(ranks: int, script: Path, *arguments) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("ranks,branches", [(2, 1), (3, 3), (4, 2), (4, 3)])
def test_ranks_share_a_forward_pass(ranks, branches, tmp_path, seed):
    """2 x 1: the sequence; 3 x 3: the branches, some of which are a batch of 2; 4 x 2: both; 4 x 3 have no divisor in common: the
    sequence. Lengths of 7, 15, 45 and 16 tokens do not divide evenly."""
    torchrun(ranks, Path(__file__).with_name("split_worker.py"), tmp_path / "results.pt", seed, branches)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 2 * 8
    for kind, design, alone, shared, again in results:
        assert relative_error(shared, alone) < (1e-4 if "loop" in kind else 1e-5), (kind, design)
        assert torch.equal(shared, again)


@pytest.mark.parametrize("ranks,sequence,recompute", [(4, 4, []), (4, 2, ["keep-attention"])])
def test_ranks_share_each_training_sample(ranks, sequence, recompute, tmp_path, seed):
    torchrun(ranks, Path(__file__).with_name("sequence_worker.py"), tmp_path / "worst.pt", seed, sequence, *recompute)
    worst = torch.load(tmp_path / "worst.pt", weights_only=True)
    assert len(worst) > 120
    assert max(worst.values()) < 1e-4, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("ranks,groups,within", [(2, 2, 1), (3, 1, 3)])
def test_sample_splits_one_video(ranks, groups, within, tmp_path):
    untrained.init(tmp_path / "toy")
    common = ["--model", tmp_path / "toy", "--adapter", tmp_path / "toy" / "switch", "--image", ROOT / "examples" / "creature.png", "--prompt",
              "a creature jumps", "--steps", "3", "--device", "cpu", "--guidance", "6"]
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, common), "--out", str(tmp_path / "one.mp4")],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    said = torchrun(ranks, ROOT / "sample.py", *common, "--out", tmp_path / "two.mp4")
    assert said.count("two.mp4") == 1 and f"{ranks} ranks: {groups} for the 2 branches of guidance, each with {within} for the sequence" in said
    one, two = (media.read_video(tmp_path / name).astype(int) for name in ("one.mp4", "two.mp4"))
    assert np.abs(one - two).mean() < 1  # of 255: where a pixel is rounded the other way, the codec decides otherwise around it


def test_heads_that_do_not_divide_are_refused():
    model = Transformer(Config(num_attention_heads=3, attention_head_dim=16, num_layers=1, time_embed_dim=8, text_embed_dim=8))
    with pytest.raises(BadInput, match="its 3 heads do not divide among 2"):
        distributed.split_video(model, distributed.Ranks(0, 4, torch.device("cpu"), None), branches=2)
