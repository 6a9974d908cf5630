"""ViCLIP beside the published code, on random weights: the network in small, its names and shapes in full."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from checkpoint import BadInput
from checkpoint import fill_exactly
from viclip import Sizes, ViCLIP, load_viclip, middle_frames

# The names and shapes of ViClip-InternVid-10M-FLT.pth: 447. A star stands for the number of a block, 24 and 12 of them.
PUBLISHED = json.loads((Path(__file__).parent / "viclip_keys.json").read_text())
LAYERS = {"vision_encoder": 24, "text_encoder": 12}

# A vocabulary made as CLIP's is, with 15 pairs of pieces that merge, where CLIP has 48,894.
MERGES = ["f o", "fo x</w>", "i n</w>", "i n", "t h", "th e</w>", "s n", "sn o", "sno w</w>", "j u", "ju m", "jum p",
          "in g</w>", "jump ing</w>", "' s</w>"]
SIZES = Sizes(side=56, vision_width=128, vision_layers=2, vocabulary=512 + len(MERGES) + 2, text_width=128, text_layers=2,
              features=64)
SHORT, LONG = "A fox\u2019s  JUMPING in the &quot;snow&quot;", "the fox is jumping in the snow, " * 9

# What the published code itself says to random_weights() of its own keys, in float32 on a CPU: OpenGVLab's ViCLIP as VBench
# has it at 45e79ec (third_party/ViCLIP, its own tokenizer on MERGES, and ftfy 6.3.1), frames chosen by get_frame_indices()
# and prepared by clip_transform() with torchvision 0.28.0. Every 8th number of the unit features of two videos() and of
# SHORT and LONG; the cosines of the first video with the two texts; their tokens. At full size, on a 480x720 video, our
# relative error was 6.6e-7 for the video and 6.6e-7 for the text, and the score differed by 1.5e-8. All of 6,320 prompts that
# VBench ships had the same tokens with CLIP's vocabulary.
VIDEOS = [
    [0.181020096, -0.22883831, -0.00140575424, 0.219462797, 0.0331295244, -0.0947649255, 0.0111930426, 0.0343253277],
    [0.192455888, -0.234092265, -0.00354103372, 0.239359885, 0.0311328229, -0.0910827145, 0.0344750099, 0.0209801178]]
TEXTS = [
    [-0.106866173, 0.042962715, 0.0417162701, 0.0267528631, -0.133475438, 0.112737119, 0.152767465, 0.13984561],
    [-0.098475337, 0.118853129, 0.0677575767, 0.00356762693, -0.034690164, -0.118088484, 0.00548751839, 0.153862372]]
SCORES = [0.0558471456, 0.0873513073]
TOKENS = [
    [527, 320, 513, 526, 525, 514, 517, 257, 520, 257, 528],
    [527, *[517, 513, 72, 338, 525, 514, 517, 520, 267] * 3, 517, 513, 72, 528]]


def random_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Each tensor from a generator of its own, seeded by its key, so that no order of parameters matters. numpy's legacy
    generator, as its numbers stay the same."""
    tensors = {}
    for key, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if key.endswith("bias"):
            values = 0.1 * values
        elif ".ln_" in key:
            values = 1 + 0.2 * values
        elif "embedding" in key:
            values = 0.5 * values
        elif len(shape) > 1:
            values = values / math.sqrt(shape[0] if key.endswith(("proj", "projection")) else math.prod(shape[1:]))
        tensors[key] = torch.tensor(values, dtype=torch.float32)
    return tensors


def videos() -> list[np.ndarray]:
    """Of 11 frames 70x99 and of 5 frames 97x70, uint8: squares of 7 pixels."""
    coarse = np.random.RandomState(7).randint(0, 256, (11, 14, 15, 3)).astype(np.uint8)
    fine = coarse.repeat(7, axis=1).repeat(7, axis=2)
    return [fine[:, :70, :99], fine[:5, :97, :70]]


def vocabulary(folder: Path, merges: list[str]) -> Path:
    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file as it is published, in small, and a tokenizer."""
    folder = tmp_path_factory.mktemp("viclip")
    with torch.device("meta"):
        shapes = {key: list(tensor.shape) for key, tensor in ViCLIP(SIZES).state_dict().items()}
    torch.save({"model": random_weights(shapes)}, folder / "viclip.pth")
    return folder / "viclip.pth", vocabulary(folder / "tokenizer", MERGES)


@pytest.fixture(scope="module")
def viclip(files):
    return load_viclip(*files, sizes=SIZES)


def test_it_computes_what_the_published_code_computes(viclip):
    for i, video in enumerate(videos()):
        feature = viclip.video(video)
        assert feature.shape == (64,) and feature.norm().item() == pytest.approx(1, abs=1e-6)
        assert relative_error(feature[::8], torch.tensor(VIDEOS[i])) < 1e-5
    for i, text in enumerate([SHORT, LONG]):
        feature = viclip.text(text)
        assert viclip.ids(text) == TOKENS[i] and feature.norm().item() == pytest.approx(1, abs=1e-6)
        assert relative_error(feature[::8], torch.tensor(TEXTS[i])) < 1e-5
        assert viclip.overall_consistency(videos()[0], text) == pytest.approx(SCORES[i], abs=1e-6)


def test_it_accepts_exactly_the_published_keys():
    shapes = {key.replace("*", str(i)): shape for key, shape in PUBLISHED.items()
              for i in range(LAYERS[key.split(".")[0]] if "*" in key else 1)}
    assert len(shapes) == 447
    with torch.device("meta"):  # all the names and shapes, but none of the 428 million numbers
        full, tensors = ViCLIP(), {key: torch.empty(shape) for key, shape in shapes.items()}

    def error(changed: dict) -> str:
        with pytest.raises(BadInput) as caught:
            fill_exactly(full, changed, {key: key for key in changed}, Path("file.pth"), "ViCLIP-L/14")
        return str(caught.value)

    fill_exactly(full, tensors, {key: key for key in tensors}, Path("file.pth"), "ViCLIP-L/14")
    victim = list(tensors)[torch.randint(447, ()).item()]
    assert f"1 tensors are missing ({victim})" in error({key: x for key, x in tensors.items() if key != victim})
    assert "1 tensors are unexpected (extra.weight)" in error({**tensors, "extra.weight": torch.empty(1)})
    assert f"{victim} in file.pth has shape [7, 7]" in error({**tensors, victim: torch.empty(7, 7)})


def test_the_frames_it_sees(viclip):
    # As VBench's get_frame_indices() has them, of the middle of each part; short videos end in copies of their last frame.
    assert middle_frames(49, 8) == [2, 8, 14, 20, 26, 32, 38, 45]
    assert middle_frames(81, 8) == [4, 14, 24, 34, 44, 54, 64, 75]
    assert middle_frames(13, 8) == [0, 1, 3, 4, 6, 8, 9, 11]
    assert middle_frames(5, 8) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert middle_frames(1, 8) == [0] * 8
    video = torch.randint(256, (13, 60, 60, 3), dtype=torch.uint8).numpy()
    feature = viclip.video(video)
    for frame in range(13):
        changed = video.copy()
        changed[frame] = 255 - changed[frame]
        assert torch.equal(viclip.video(changed), feature) == (frame in (2, 5, 7, 10, 12))
    assert relative_error(viclip.video(video[:3]), viclip.video(video[[0, 1, 2, 2, 2, 2, 2, 2]])) < 1e-6
    assert relative_error(viclip.video(video[::-1]), feature) > 1e-3  # it knows time


def test_texts_that_are_the_same(viclip):
    plain = viclip.ids("it's \"the fox\", a&b!")
    for text in ("It\u2019s  \u201cthe\nFOX\u201d, a&amp;b!", " it&amp;#39;s &quot;the fox&quot;\uff0c a\uff06b\uff01 "):
        assert viclip.ids(text) == plain
    assert viclip.ids("caf\u00e9") == viclip.ids("cafe\u0301")
    assert viclip.ids("") == [527, 528] and viclip.ids("fox <|endoftext|> in") == [527, 513, 528]
    assert torch.equal(viclip.text(LONG), viclip.text(LONG + "and more"))  # only 30 of its tokens are seen


def test_other_files_with_the_same_tensors(files, viclip, tmp_path):
    tensors, expected = torch.load(files[0], weights_only=True)["model"], viclip.state_dict()
    save_file(tensors, tmp_path / "viclip.safetensors")
    torch.save(tensors, tmp_path / "bare.pth")
    torch.save({"model": {key: tensor.half() for key, tensor in tensors.items()}}, tmp_path / "half.pth")
    for name, tolerance in (("viclip.safetensors", 0), ("bare.pth", 0), ("half.pth", 1e-3)):
        loaded = load_viclip(tmp_path / name, files[1], sizes=SIZES)
        assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
        for key, tensor in loaded.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], rtol=tolerance, atol=tolerance)


def test_what_cannot_be(files, viclip, tmp_path):
    def error(path, tokenizer=files[1]) -> str:
        with pytest.raises(BadInput) as caught:
            load_viclip(path, tokenizer, sizes=SIZES)
        return str(caught.value)

    assert "There are no weights at" in error(tmp_path / "nowhere.pth")
    assert "is a folder" in error(tmp_path)
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "foreign.pth")
    assert "does not hold the weights of ViCLIP-L/14: 63 tensors are missing" in error(tmp_path / "foreign.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "other.pth")
    assert "something else than tensors" in error(tmp_path / "other.pth")
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "pickled.pth")  # a pickled module would run its own code
    (tmp_path / "cut.pth").write_bytes(files[0].read_bytes()[: torch.randint(1, files[0].stat().st_size, ()).item()])
    (tmp_path / "page.pth").write_text("<html>Sign in to download</html>")
    assert "pickled objects" in error(tmp_path / "pickled.pth")
    for name in ("cut.pth", "page.pth"):
        assert "truncated" in error(tmp_path / name)

    assert "gave no CLIP tokenizer" in error(files[0], tmp_path / "nowhere")
    assert "is not CLIP's" in error(files[0], vocabulary(tmp_path / "fewer", MERGES[:-1]))
    assert "gave no CLIP tokenizer (it has no vocabulary); put the vocab.json" in error(files[0], tmp_path)  # a folder without any
    assert "There are no weights at" in error(tmp_path / "nowhere.pth", tmp_path / "nowhere"), "which is looked at first"

    with pytest.raises(BadInput, match="without frames"):
        viclip.video(np.zeros((0, 56, 56, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"uint8 \[F, H, W, 3\], not float64 \[8, 56, 56, 3\]"):
        viclip.video(np.zeros((8, 56, 56, 3)))
