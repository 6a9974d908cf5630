"""Optical flow: RAFT beside the two published implementations, the classical estimator in worlds whose flow is known."""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from safetensors.torch import save_file

from checkpoint import BadInput
from flow import Flow, flow_magnitude, load_raft

# Every key and shape of the weights as they are published: the original's 179, torchvision's 169.
PUBLISHED = json.loads((Path(__file__).parent / "raft_keys.json").read_text())
LAYOUTS = list(PUBLISHED)

# What the published code itself says to random_weights() of its own keys and frames(), after 4 iterations, in float32 on
# a CPU: the norm of the flow, and of the second flow in the batch every 48th row and 64th column from (16, 16) on, first
# x, then y. The original is princeton-vl/RAFT at 2888e15 (core/raft.py in test mode), the other torchvision 0.28.0
# (raft_large, its last prediction; it takes frames in [-1, 1]). Over the whole flow our relative error was 4.4e-7 and
# 4.7e-7, and after 20 iterations 1.5e-6 and 1.9e-6.
EXPECTED = {
    "raft-things.pth": (6595.12549, [
        25.1906414, 45.4467697, 14.3262892, 24.8014603, 31.1798649, -2.82143116, 26.7887993, 37.4715271, 10.1539640,
        -5.01109838, -14.0195923, 7.18355131, -23.1874275, -0.903177977, 25.3084583, -28.7473221, -22.6471252, 1.14172530]),
    "torchvision raft_large": (7457.11914, [
        43.8990250, 34.1891212, 2.06167984, 33.6774635, 23.0801048, -11.4415731, 16.1380520, 4.05606651, 0.888643384,
        32.1945457, 18.4695473, 23.9389610, 39.2556229, 28.3716927, 34.9289627, 55.9075279, 39.8541183, 38.1424751]),
}


def random_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Each tensor from a generator of its own, seeded by its key, so that no order of parameters matters. numpy's legacy
    generator, as its numbers stay the same. The norm with two names (norm3, downsample.1) is one."""
    tensors = {}
    for key, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(key.replace("downsample.1", "norm3").encode())).standard_normal(shape)
        if key.endswith("num_batches_tracked"):
            values = np.int64(0)
        elif key.endswith("running_var"):
            values = 1 + 0.5 * np.tanh(values)
        elif len(shape) == 4:
            values = values * math.sqrt(1.5 / math.prod(shape[1:]))
        else:
            values = 1 + 0.2 * values if key.endswith("weight") else 0.1 * values
        tensors[key] = torch.tensor(values, dtype=torch.int64 if shape == [] else torch.float32)
    return tensors


def frames() -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of two smooth frames [2, 3, 128, 160] in 0..255."""
    coarse = torch.tensor(np.random.RandomState(7).uniform(0, 255, (4, 3, 16, 20)), dtype=torch.float32)
    return F.interpolate(coarse, (128, 160), mode="bilinear", align_corners=True).chunk(2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """For each layout a file with random weights."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for layout, shapes in PUBLISHED.items():
        files[layout] = folder / f"{layout.split('.')[0].replace(' ', '-')}.pth"
        torch.save(random_weights(shapes), files[layout])
    return files


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_raft_computes_what_the_published_code_computes(published, layout):
    flow = load_raft(published[layout])(*frames(), iterations=4)
    norm, values = EXPECTED[layout]
    assert flow.shape == (2, 2, 128, 160)
    assert flow.norm().item() == pytest.approx(norm, rel=1e-5)
    assert relative_error(flow[1, :, 16::48, 16::64].flatten(), torch.tensor(values)) < 1e-5


@torch.no_grad()
def test_raft_from_safetensors_where_a_tensor_has_one_name(published, tmp_path):
    tensors = torch.load(published["raft-things.pth"], weights_only=True)
    assert len(tensors) == 179
    single = {key.removeprefix("module."): tensor for key, tensor in tensors.items() if "norm3" not in key}
    save_file(single, tmp_path / "raft.safetensors")
    ours, again = load_raft(published["raft-things.pth"]).state_dict(), load_raft(tmp_path / "raft.safetensors").state_dict()
    assert len(ours) == len(single) == 169 and all(torch.equal(ours[key], again[key]) for key in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raft_accepts_exactly_the_published_keys(published, layout, tmp_path):
    tensors, file = torch.load(published[layout], weights_only=True), tmp_path / "changed.pth"
    victim = sorted(key for key in tensors if "norm3" not in key)[torch.randint(169, ()).item()]

    def error(changed: dict) -> str:
        torch.save(changed, file)
        with pytest.raises(BadInput) as caught:
            load_raft(file)
        assert str(file) in str(caught.value)
        return str(caught.value)

    assert "1 tensors are missing" in error({key: tensor for key, tensor in tensors.items() if key != victim})
    assert "1 tensors are unexpected (extra.weight)" in error({**tensors, "extra.weight": torch.zeros(1)})
    assert f"{victim} in" in error({**tensors, victim: torch.zeros(7, 7)})


def test_weights_that_are_no_weights(published, tmp_path):
    def error(path) -> str:
        with pytest.raises(BadInput) as caught:
            Flow(path)
        return str(caught.value)

    assert "There are no weights at" in error(tmp_path / "nowhere.pth") and "princeton-vl/RAFT" in error(tmp_path / "nowhere.pth")
    assert "is a folder" in error(tmp_path)
    foreign = {f"layer.{i}.weight": torch.zeros(2) for i in range(9)}
    torch.save(foreign, tmp_path / "foreign.pth")
    save_file(foreign, tmp_path / "foreign.safetensors")
    for name in ("foreign.pth", "foreign.safetensors"):
        assert "169 tensors are missing" in error(tmp_path / name)
        assert "9 tensors are unexpected (layer.0.weight, layer.1.weight, layer.2.weight and 6" in error(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    assert "something else than tensors" in error(tmp_path / "other.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.pth")  # a pickled module would run its own code
    torch.save(foreign, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "page.pth").write_text("<html>Sign in to download</html>")
    (tmp_path / "empty.pth").touch()
    for whole in (published["raft-things.pth"], tmp_path / "legacy.pth", tmp_path / "foreign.safetensors"):
        data = whole.read_bytes()
        (tmp_path / f"cut-{whole.name}").write_bytes(data[: torch.randint(1, len(data), ()).item()])
    assert "pickled objects" in error(tmp_path / "pickled.pth") and "weights_only" not in error(tmp_path / "pickled.pth")
    data = (tmp_path / "legacy.pth").read_bytes()
    (tmp_path / "cut-name.pth").write_bytes(data[: data.index(b"_rebuild_tensor_v2") + 4])  # reads as a class of another name
    for name in ("page.pth", "empty.pth", "cut-raft-things.pth", "cut-legacy.pth", "cut-name.pth", "cut-foreign.safetensors"):
        assert "truncated" in error(tmp_path / name)


@torch.no_grad()
def test_raft_pads_and_unpads(published):
    flow = Flow(published["raft-things.pth"])
    assert flow.name == "RAFT (raft-things.pth)"
    first, second = (torch.randint(256, (1, 3, 121, 129), dtype=torch.uint8) for _ in range(2))
    network, seen = flow.raft.forward, []
    flow.raft.forward = lambda *frames: seen.append(frames) or network(*frames, iterations=1)
    plain, padded = flow(first, second), flow(first, second, padded=True)
    # 7 more rows and columns, of which 3 in front: the border repeated, as in VBench.
    expected = np.pad(first.numpy(), ((0, 0), (0, 0), (3, 4), (3, 4)), mode="edge")
    assert seen[0][0].dtype == torch.float32 and np.array_equal(seen[0][0].numpy(), expected)
    assert padded.shape == (1, 2, 128, 136) and torch.equal(plain, padded[..., 3:124, 3:132])
    video = torch.cat([first, second]).permute(0, 2, 3, 1).numpy()
    lengths = np.sort(np.hypot(*padded[0].numpy()).ravel())[::-1]
    assert flow_magnitude(video, flow) == pytest.approx(lengths[: int(0.05 * 128 * 136)].mean(), rel=1e-5)


def test_frames_that_cannot_be(published):
    with pytest.raises(BadInput, match="RAFT needs frames of at least 128 pixels a side .* not 64x64"):
        Flow(published["raft-things.pth"])(*torch.zeros(2, 1, 3, 64, 64))
    with pytest.raises(BadInput, match="at least 16 pixels a side, not 15x40"):
        Flow()(*torch.zeros(2, 1, 3, 40, 15))
    with pytest.raises(ValueError, match=r"\[1, 3, 64, 64\] and \[1, 3, 64, 72\]"):
        Flow()(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 72))


# --- classical flow, in worlds whose flow is known --------------------------------------------------------------------


def texture(height: int, width: int, grain: float) -> torch.Tensor:
    """Random [1, 3, height, width] in 0..255: what is smaller than about `grain` pixels is smooth."""
    coarse = torch.rand(1, 3, math.ceil(height / grain), math.ceil(width / grain)) * 255
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).clamp(0, 255)


def moved(height: int, width: int, grain: float, matrix: torch.Tensor, shift: tuple[float, float]):
    """Two 8-bit views [1, 3, H, W] of one texture, the second after it moved by x -> matrix (x - centre) + centre + shift;
    the true flow [2, H, W]; and which pixels [H, W] stay within the frame."""
    margin = 24
    world = texture(height + 2 * margin, width + 2 * margin, grain)
    grid = torch.stack(torch.meshgrid(torch.arange(width) * 1.0, torch.arange(height) * 1.0, indexing="xy"))
    size = torch.tensor([width, height]).view(2, 1, 1)
    centre, shift = (size - 1) / 2, torch.tensor(shift).view(2, 1, 1)
    target = torch.einsum("ij,jhw->ihw", matrix, grid - centre) + centre + shift
    source = torch.einsum("ij,jhw->ihw", matrix.inverse(), grid - centre - shift) + centre  # which point shows up here
    at = 2 * (source + margin) / (size + 2 * margin - 1) - 1
    second = F.grid_sample(world, at.permute(1, 2, 0)[None], mode="bicubic", align_corners=True)
    first = world[..., margin:-margin, margin:-margin]
    inside = ((target >= 0) & (target <= size - 1)).all(dim=0)
    return first.round().byte(), second.clamp(0, 255).round().byte(), target - grid, inside


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (100, 132)], ids=str)
def test_a_translation(size):
    for length in (0.5, 3.0, 10.0):
        angle, grain = torch.rand(()).item() * 2 * math.pi, 1.5 + 4 * torch.rand(()).item()
        shift = (length * math.cos(angle), length * math.sin(angle))
        first, second, true, inside = moved(*size, grain, torch.eye(2), shift)
        error = (Flow()(first, second)[0] - true).norm(dim=0)
        assert error.median() < 0.05 and error[inside].mean() < 0.05 and error.mean() < 0.5, (shift, grain)


@pytest.mark.skipif("NANOS2V_RAFT" not in os.environ, reason="NANOS2V_RAFT names no published weights of RAFT")
@pytest.mark.parametrize("length", [0.5, 3.0, 10.0])
def test_a_translation_by_raft_with_its_published_weights(length):
    angle = torch.rand(()).item() * 2 * math.pi
    first, second, true, inside = moved(160, 192, 3.0, torch.eye(2), (length * math.cos(angle), length * math.sin(angle)))
    error = (Flow(Path(os.environ["NANOS2V_RAFT"]))(first, second)[0] - true).norm(dim=0)
    assert error[inside].mean() < 0.5


def test_a_rotation_and_a_zoom():
    for angle, zoom in ((0.06, 1.0), (0.0, 1.08), (-0.05, 0.95)):
        c, s = zoom * math.cos(angle), zoom * math.sin(angle)
        first, second, true, inside = moved(72, 96, 4.0, torch.tensor([[c, -s], [s, c]]), (1.0, -2.0))
        error = (Flow()(first, second)[0] - true).norm(dim=0)
        assert error[inside].mean() < 0.08 and error.median() < 0.06, (angle, zoom)


@pytest.mark.parametrize("distance", [2, 5, 8])
def test_an_object_before_a_still_background(distance):
    first, patch = texture(64, 64, 3.0), texture(20, 20, 3.0)
    second = first.clone()
    first[..., 20:40, 16:36] = patch
    second[..., 20:40, 16 + distance : 36 + distance] = patch
    flow = Flow()(first, second)[0]
    assert (flow[:, 24:36, 20:32] - torch.tensor([distance, 0.0]).view(2, 1, 1)).norm(dim=0).median() < 0.05
    assert flow[:, :12].norm(dim=0).mean() < 0.05 and flow[:, -16:].norm(dim=0).mean() < 0.05


def test_a_still_clip_has_no_flow():
    clip = texture(64, 64, 3.0).round().byte().permute(0, 2, 3, 1).expand(5, -1, -1, -1).numpy()
    assert (flow_magnitude(clip, Flow()) < 1e-3).all()
    grey = np.full((2, 40, 56, 3), 127, dtype=np.uint8)
    assert (flow_magnitude(grey, Flow()) < 1e-3).all()
    noisy = np.clip(clip + 3 * np.random.default_rng().standard_normal(clip.shape), 0, 255).astype(np.uint8)
    assert (flow_magnitude(noisy, Flow()) < 0.1).all()


def test_how_much_moves():
    world = texture(64, 120, 4.0).round().byte()[0].permute(1, 2, 0).numpy()
    steps = [0, 1, 1, 4, 10, 7]  # to the left, since the view goes to the right
    starts = np.cumsum(steps)
    clip = np.stack([world[:, start : start + 64] for start in starts])
    flow = Flow()
    assert flow.name == "classical pyramidal flow: no RAFT weights were given"
    assert flow_magnitude(clip, flow) == pytest.approx(np.array(steps[1:]), abs=0.2)
    assert flow_magnitude(clip[:1], flow).shape == (0,)
    long = np.concatenate([clip] * 4)  # more pairs than are looked at together
    assert flow_magnitude(long, flow)[-5:] == pytest.approx(flow_magnitude(clip, flow), abs=1e-3)
    pair = torch.from_numpy(clip[3:5]).permute(0, 3, 1, 2)
    assert flow(pair[:1], pair[1:])[0, 0].median().item() == pytest.approx(-steps[4], abs=0.1)


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_the_five_percent_that_move_most(share):
    """With an estimator that says 5 pixels for a share of the frame and nothing for the rest."""
    def known(first, second, padded):
        assert padded
        flow = torch.zeros(len(first), 2, 100, 100)
        flow[:, 0, : int(100 * share)], flow[:, 1, : int(100 * share)] = 3, -4
        return flow

    clip = np.zeros((4, 100, 100, 3), dtype=np.uint8)
    assert flow_magnitude(clip, known) == pytest.approx([5 * min(1, share / 0.05)] * 3)
