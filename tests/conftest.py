"""What the tests share: fresh seeds, the measure of parity, and tiny models of all five variants."""

import os
import secrets

if "PYTEST_XDIST_WORKER" in os.environ:  # another worker has the other core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not take the processor from the others

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what has no --device stays on the CPU, with the process group of the others

import pytest
import torch
import toy_networks
from cli import base, here, one_thread, sampled  # noqa: F401 (fixtures)

toy_networks.BASE["num_layers"] = 4  # half of the toy, for the tests' sake

# The five official variants, narrow and shallow, with everything that distinguishes them.
TINY = dict(num_attention_heads=2, attention_head_dim=64, num_layers=2, text_embed_dim=32, time_embed_dim=64,
            max_text_seq_length=10, sample_height=12, sample_width=18, sample_frames=9)
NEW = dict(use_rotary_positional_embeddings=True, sample_height=300, sample_width=300, sample_frames=81, patch_size_t=2,
           patch_bias=False)
VARIANTS = {
    "2b": TINY,
    "5b": {**TINY, "use_rotary_positional_embeddings": True},
    "5b-I2V": {**TINY, "in_channels": 32, "use_rotary_positional_embeddings": True,
               "use_learned_positional_embeddings": True},
    "1.5-5B": {**TINY, **NEW},
    "1.5-5B-I2V": {**TINY, **NEW, "in_channels": 32, "ofs_embed_dim": 64},
}
TINY_VAE = dict(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_height=96,
                sample_width=160)


@pytest.fixture(autouse=True)
def seed():
    """A fresh seed for every test, shown when it fails; NANOS2V_SEED=N repeats one."""
    value = int(os.environ.get("NANOS2V_SEED", secrets.randbelow(2**31)))
    torch.manual_seed(value)
    print(f"NANOS2V_SEED={value}")
    return value


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@torch.no_grad()
def randomize(model: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """All that is learned moved by random amounts, so that no bias, scale or gate is at a value that hides a mistake."""
    positions = [buffer for name, buffer in model.state_dict().items() if name.endswith("pos_embedding")]  # learned, yet a buffer
    for parameter in (*model.parameters(), *positions):
        parameter += std * torch.randn_like(parameter)
    return model
