"""AMT-S beside the published implementation, and motion smoothness beside VBench's and beside networks of known answers."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from safetensors.torch import save_file

from amt import AMT, load_amt, motion_smoothness
from checkpoint import BadInput

# Every key and shape under 'state_dict' in the weights as they are published.
PUBLISHED = json.loads((Path(__file__).parent / "amt_keys.json").read_text())

# What the published code itself says to random_weights() and clip(), in float32 on a CPU: the norm of the frame, and the
# last frame of the batch every 72nd row and 64th column from (16, 16) on, first red, then green, then blue. The original
# is the copy of MCG-NKU/AMT in Vchitect/VBench at 45e79ec (networks/AMT-S.py). By shape [B, H, W] and time. Over the whole
# frame our relative error was 6.2e-7 and 7.0e-7.
EXPECTED = {
    ((2, 128, 160), 0.5): (187.60661, [
        0.835311294, 0.555154145, 0.575971067, 0.821815789, 0.837141037, 0.887490571, 0.572582245, 0.516033828, 0.489719987,
        0.571528375, 0.386634648, 0.546660483, 0.680336833, 0.459278703, 0.367092907, 0.56600374, 0.258893788, 0.337783158]),
    ((1, 208, 144), 0.3): (160.63919, [
        0.464722693, 0.575544536, 0.899282634, 0.925222158, 0.765840232, 0.886501133, 0.404724628, 0.310018569, 0.638987184,
        0.394191563, 0.564501166, 0.408877492, 0.445855111, 0.444891572, 0.515720606, 0.221892446, 0.550829291, 0.349579096]),
}
# And what VBench's motion_smoothness.py says, with the same weights, to clip(5, 120, 150) in 8 bits. Ours differed by 4e-8.
EXPECTED_SCORE = 0.7429799564270152


def random_weights() -> dict[str, torch.Tensor]:
    """Each tensor from a generator of its own, seeded by its key; numpy's legacy generator, as its numbers stay the same."""
    tensors = {}
    for key, shape in PUBLISHED.items():
        values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if len(shape) == 4:
            values = values * math.sqrt(0.8 / math.prod(shape[1:]))
        else:  # slopes of PReLUs, and biases
            values = 0.25 + 0.1 * values if key.endswith("weight") else 0.1 * values
        tensors[key] = torch.tensor(values, dtype=torch.float32)
    return tensors


def clip(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth frames [count, 3, height, width] in 0..1 that have nothing in common."""
    shape = (count, 3, math.ceil(height / 8), math.ceil(width / 8))
    coarse = torch.tensor(np.random.RandomState(7).uniform(0, 1, shape), dtype=torch.float32)
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the published layout, with random weights."""
    file = tmp_path_factory.mktemp("weights") / "amt-s.pth"
    torch.save({"epoch": 299, "state_dict": random_weights()}, file)
    return file


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPECTED, ids=str)
@torch.no_grad()
def test_amt_computes_what_the_published_code_computes(published, case):
    (batch, height, width), t = case
    frame = load_amt(published)(*clip(2 * batch, height, width).chunk(2), t)
    norm, values = EXPECTED[case]
    assert frame.shape == (batch, 3, height, width)
    assert frame.norm().item() == pytest.approx(norm, rel=1e-5)
    assert relative_error(frame[-1, :, 16::72, 16::64].flatten(), torch.tensor(values)) < 1e-5


def test_amt_refuses_frames_it_cannot_correlate():
    for height, width in ((112, 160), (160, 112), (128, 136), (135, 128)):
        with pytest.raises(BadInput, match=f"multiples of 16 and at least 128 pixels .* not {width}x{height}"):
            AMT()(*torch.zeros(2, 1, 3, height, width))


def test_amt_from_safetensors(published, tmp_path):
    save_file(random_weights(), tmp_path / "amt.safetensors")
    ours, again = load_amt(published).state_dict(), load_amt(tmp_path / "amt.safetensors").state_dict()
    assert len(ours) == 213 and all(torch.equal(ours[key], again[key]) for key in ours)


def test_amt_accepts_exactly_the_published_keys(tmp_path):
    tensors, file = random_weights(), tmp_path / "changed.pth"
    victim = list(tensors)[torch.randint(213, ()).item()]

    def error(changed: dict) -> str:
        torch.save({"state_dict": changed}, file)
        with pytest.raises(BadInput) as caught:
            load_amt(file)
        assert str(file) in str(caught.value)
        return str(caught.value)

    assert f"1 tensors are missing ({victim})" in error({key: x for key, x in tensors.items() if key != victim})
    assert "1 tensors are unexpected (extra.weight)" in error({**tensors, "extra.weight": torch.zeros(1)})
    assert f"{victim} in" in error({**tensors, victim: torch.zeros(7, 7)})
    foreign = error({f"layer.{i}.weight": torch.zeros(2) for i in range(9)})
    assert "213 tensors are missing" in foreign
    assert "9 tensors are unexpected (layer.0.weight, layer.1.weight, layer.2.weight and 6 more)" in foreign


def test_weights_that_are_no_weights(published, tmp_path):
    def error(name: str) -> str:
        with pytest.raises(BadInput) as caught:
            load_amt(tmp_path / name)
        return str(caught.value)

    for name in ("nowhere.pth", ""):  # a file that is not there, and a folder
        assert "There are no weights at" in error(name)
        assert "https://huggingface.co/lalala125/AMT" in error(name) and "non-commercial use only" in error(name)
    assert "is a folder" in error("")
    for i, other in enumerate(({"state_dict": {"epoch": 3}}, {"state_dict": 7}, [torch.zeros(1)])):
        torch.save(other, tmp_path / f"{i}.pth")
        assert "something else than tensors by name" in error(f"{i}.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.pth")  # a pickled module would run its own code
    (tmp_path / "page.pth").write_text("<html>Sign in to download</html>")
    (tmp_path / "empty.pth").touch()
    save_file({"x": torch.zeros(9)}, tmp_path / "whole.safetensors")
    for whole in (published, tmp_path / "whole.safetensors"):
        data = whole.read_bytes()
        (tmp_path / f"cut-{whole.name}").write_bytes(data[: torch.randint(1, len(data), ()).item()])
    assert "pickled objects" in error("pickled.pth")
    for name in ("page.pth", "empty.pth", "cut-amt-s.pth", "cut-whole.safetensors"):
        assert "truncated" in error(name)


# --- motion smoothness ------------------------------------------------------------------------------------------------


def mean(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """In place of AMT: no motion, only fading. A quarter of a grey level more, so that what is truncated is known."""
    return (first + second) / 2 + 0.25 / 255


def noise(*shape: int) -> np.ndarray:
    return torch.randint(256, shape, dtype=torch.uint8).numpy()


def test_motion_smoothness_is_vbenchs(published):
    frames = (clip(5, 120, 150) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert motion_smoothness(frames, load_amt(published)) == pytest.approx(EXPECTED_SCORE, abs=1e-6)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 9])
def test_odd_frames_are_compared_with_what_is_between_the_even_ones(count):
    frames = noise(count, 9, 17, 3)
    grey, compared = frames.astype(int), {3: [1], 4: [1], 5: [1, 3], 6: [1, 3], 9: [1, 3, 5, 7]}[count]
    expected = np.mean([np.abs((grey[i - 1] + grey[i + 1]) // 2 - grey[i]).mean() for i in compared])
    assert motion_smoothness(frames, mean) == pytest.approx(1 - expected / 255, abs=1e-12)


def test_a_still_clip_is_smooth_a_ramp_nearly_and_a_shuffled_one_less():
    still = np.repeat(noise(1, 20, 20, 3), 7, axis=0)
    assert motion_smoothness(still, mean) == 1.0
    ramp = noise(1, 20, 20, 3) // 4 + np.arange(0, 7 * 25, 25, dtype=np.uint8).reshape(-1, 1, 1, 1)
    assert motion_smoothness(ramp, mean) == 1.0
    odd = noise(1, 20, 20, 3) // 4 + np.array([0, 7, 15, 22, 30], dtype=np.uint8).reshape(-1, 1, 1, 1)
    assert motion_smoothness(odd, mean) == 1.0  # between 0 and 15 is 7.5, of which 7 is left
    shuffled = ramp[[0, 4, 1, 6, 2, 5, 3]]  # between 0 and 25 lies 12, not 100; 37, not 150; 62, not 125
    assert motion_smoothness(shuffled, mean) == pytest.approx(1 - (88 + 113 + 63) / 3 / 255, abs=1e-12)


def test_frames_are_padded_to_16_by_their_border_and_come_back_unpadded():
    frames, seen = noise(4, 25, 42, 3), []

    def first_again(first, second):
        seen.extend((first, second))
        return first

    score = motion_smoothness(frames, first_again)
    # 7 more rows, of which 3 in front; 6 more columns, 3 and 3.
    padded = np.pad(frames, ((0, 0), (3, 4), (3, 3), (0, 0)), mode="edge").transpose(0, 3, 1, 2)
    assert len(seen) == 2 and seen[0].dtype == torch.float32
    for tensor, expected in zip(seen, padded[[0, 2]]):
        assert torch.equal(tensor, torch.tensor(expected)[None] / 255)
    expected = np.abs(frames[0].astype(int) - frames[1]).mean()
    assert score == pytest.approx(1 - expected / 255, abs=1e-12)


def test_what_is_drawn_is_clipped_and_truncated():
    black, white = np.zeros((3, 16, 16, 3), dtype=np.uint8), np.full((3, 16, 16, 3), 255, dtype=np.uint8)
    assert motion_smoothness(black, lambda first, second: first - 0.5) == 1.0
    assert motion_smoothness(white, lambda first, second: first + 0.5) == 1.0
    assert motion_smoothness(black, lambda first, second: first + 7.9 / 255) == 1 - 7 / 255


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_video_without_a_frame_in_between(count):
    with pytest.raises(BadInput, match=f"at least 3, not {count}"):
        motion_smoothness(noise(count, 16, 16, 3), mean)


def test_frames_too_small_for_amt():
    with pytest.raises(BadInput, match="113 before padding.* not 112x128"):
        motion_smoothness(noise(3, 113, 112, 3), AMT())
