"""What cannot work is said in one sentence, with exit status 2, before anything is written or any network runs."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import pipeline
import sample
from lora import Adapter, inject, save_adapter
from model import Config, Transformer, save_transformer

from cli import FOX, SMALL, WEIGHTS, listing, run, script, segmented, tree

pytestmark = pytest.mark.usefixtures("one_thread")


def replace_file(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # else one would write through the link into the session's toy
    path.write_bytes(content)


def truncate(path: str, keep: float = 0.5) -> None:
    content = Path(path).read_bytes()
    replace_file(Path(path), content[: int(keep * len(content))])


def edit_json(path: str, **changes) -> None:
    replace_file(Path(path), json.dumps(json.loads(Path(path).read_text()) | changes).encode())


def edit_weights(path: str, change) -> None:
    """change(tensors) returns the tensors to write in their place."""
    tensors = change(load_file(path))
    Path(path).unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def without(count: int):
    """The last `count` tensors missing."""
    return lambda tensors: dict(list(tensors.items())[:-count])


def beside(count: int):
    """`count` tensors too many."""
    return lambda tensors: tensors | {f"stranger.{i}": torch.zeros(1) for i in range(count)}


def reshaped(key: str):
    return lambda tensors: tensors | {key: torch.zeros(3, 5)}


def shard(folder: str, stem: str = checkpoint.WEIGHTS) -> list[Path]:
    """Rewrites a network's weights in four shards or so, and returns them."""
    config = json.loads((Path(folder) / "config.json").read_text())
    tensors = load_file(Path(folder) / f"{stem}.safetensors")
    checkpoint.save(Path(folder), config, tensors, stem, shard=sum(t.nbytes for t in tensors.values()) // 4)
    shards = sorted(Path(folder).glob("*-of-*.safetensors"))
    assert len(shards) > 2
    return shards


def first_shard(damage, folder: str = "toy/transformer", stem: str = checkpoint.WEIGHTS):
    """A corruption: the network in shards, damage(path) done to the first of them."""
    return lambda: damage(shard(folder, stem)[0])


def foreign(path: Path) -> None:
    """Another shard in the place of this one."""
    shutil.copy(sorted(path.parent.glob("*-of-*.safetensors"))[1], path)


def other_size(path: Path) -> None:
    """The shard of a model of other size: all its tensors have the right names."""
    edit_weights(str(path), lambda tensors: {key: torch.cat([tensor, tensor]) for key, tensor in tensors.items()})


SMALL_CONFIG = dict(num_attention_heads=1, attention_head_dim=64, num_layers=1, time_embed_dim=32, text_embed_dim=64,
                    max_text_seq_length=64, sample_height=8, sample_width=8, sample_frames=9)


def new_base(**config):
    """The model folder "other": the toy with a small transformer of another kind."""
    save_transformer(Transformer(Config(**SMALL_CONFIG | config)), Path("other/transformer"))
    Path("other/model_index.json").write_text('{"base": "../toy"}')


def adapter_for(names=("to_q",), **config) -> None:
    """A Switch adapter for such a base, as "other.safetensors"."""
    model = Transformer(Config(**SMALL_CONFIG | {"use_rotary_positional_embeddings": True} | config))
    inject(model, 2, 2.0, names=names)
    save_adapter(model, Path("other.safetensors"), Adapter(rank=2, alpha=2.0))


def adapter_weights(change):
    return lambda: edit_weights("toy/switch/pytorch_lora_weights.safetensors", change)


def other_rank(tensors):
    """lora_B of another rank than lora_A."""
    key = next(key for key in tensors if key.endswith("to_q.lora_B.weight"))
    return tensors | {key: torch.zeros(tensors[key].shape[0], 3)}


def write(name: str, content) -> None:
    replace_file(Path(name), content if isinstance(content, bytes) else content.encode())


def tiff(name: str) -> None:
    Image.open("fox.png").save(name, compression="tiff_lzw")
    truncate(name, 0.9)


T2V = "--prompt 'a fox'"
SWITCH = f"{FOX} --adapter toy/switch"
ANIMAL = "--prompt 'a fox' --adapter toy/switch --image"
MANY = "--prompts list.jsonl"
SUGAR = "--image fox-alpha.png --prompt 'a fox' --model toy/sugar"
LONG = "x" * 300
Q = "transformer_blocks.0.attn1.to_q.weight"
T5_Q = "encoder.block.0.layer.0.SelfAttention.q.weight"

# What is done beforehand, the arguments, and what the message must say.
BAD = {
    # the image
    "image missing": (None, f"{ANIMAL} nowhere.png", ["nowhere.png"]),
    "image unreadable": (lambda: write("x.png", b"no image at all"), f"{ANIMAL} x.png", ["x.png"]),
    "image a folder": (lambda: Path("x.png").mkdir(), f"{ANIMAL} x.png", ["x.png"]),
    "image zero-sized": (lambda: write("x.png", b""), f"{ANIMAL} x.png", ["x.png", "empty"]),
    "image without pixels": (lambda: write("x.ppm", b"P6\n0 4\n255\n"), f"{ANIMAL} x.ppm", ["x.ppm"]),
    "image truncated": (lambda: truncate("fox.png"), f"{ANIMAL} fox.png", ["fox.png", "truncated"]),
    "image truncated, tiff": (lambda: tiff("x.tif"), f"{ANIMAL} x.tif", ["x.tif"]),
    "image all transparent": (lambda: Image.new("RGBA", (8, 8)).save("x.png"), f"{ANIMAL} x.png", ["empty"]),
    "image for a text-to-video model": (None, FOX, ["takes no image", "--adapter"]),
    "image missing for an image-to-video model": (None, f"{T2V} --model toy/i2v", ["--image"]),
    "mask missing": (None, f"{SWITCH} --mask nowhere.png", ["nowhere.png"]),
    "mask of another size": (lambda: Image.new("L", (9, 7)).save("x.png"), f"{SWITCH} --mask x.png", ["9x7", "80x60"]),
    "mask empty": (lambda: Image.new("L", (80, 60)).save("x.png"), f"{SWITCH} --mask x.png", ["mask", "empty"]),
    "mask without image": (None, f"{T2V} --adapter toy/switch --mask mask.png", ["--image"]),
    "mask for a first frame": (None, f"{FOX} --model toy/i2v --mask mask.png", ["--mask", "first frame"]),
    "mask and subject": (None, f"{SWITCH} --mask mask.png --subject fox", ["--mask", "--subject"]),
    "subject without image": (None, f"{T2V} --adapter toy/switch --subject fox", ["--image"]),
    # the prompt
    "prompt empty": (None, "--prompt ''", ["--prompt is empty"]),
    "prompt blank": (None, "--prompt '  '", ["--prompt is empty"]),
    "prompt forgotten": (None, "--seed 1", ["--prompt"]),
    "list missing": (None, "--prompts nowhere.jsonl", ["nowhere.jsonl"]),
    "list empty": (lambda: write("list.jsonl", "\n"), MANY, ["list.jsonl", "no prompts"]),
    "list not text": (lambda: write("list.jsonl", b"\xff\xfe"), MANY, ["list.jsonl"]),
    "list not JSON": (lambda: write("list.jsonl", '{"prompt": "a fox"}\nfox'), MANY, ["Line 2", "JSON"]),
    "line without prompt": (lambda: listing({"seed": 1}), MANY, ["Line 1", "prompt"]),
    "line with an empty prompt": (lambda: listing({"prompt": "a fox"}, {"prompt": " "}), MANY, ["Line 2", "prompt"]),
    "line with a word too many": (lambda: listing({"prompt": "a fox", "sede": 1}), MANY, ["Line 1", "seed"]),
    "line with an empty name": (lambda: listing({"prompt": "a fox", "name": ""}), MANY, ["ine 1", "name"]),
    "names twice": (lambda: listing(*2 * [{"prompt": "a", "name": "x"}]), MANY, ["x.mp4", "more than once"]),
    "line with a missing image": (
        lambda: listing({"prompt": "a", "image": "x.png"}), f"{MANY} --adapter toy/switch", ["x.png"]),
    "list into a file": (lambda: listing({"prompt": "a"}), f"{MANY} --out x.mp4", ["folder", "x.mp4"]),
    # numbers
    "frames 10": (None, f"{T2V} --frames 10", ["--frames 10", "9 and 17"]),
    "frames 8": (None, f"{T2V} --frames 8", ["--frames 8", "1 and 9"]),
    "frames 48": (None, f"{T2V} --frames 48", ["--frames 48", "41 and 49"]),
    "frames 0": (None, f"{T2V} --frames 0", ["--frames 0", "1 and 9"]),
    "frames negative": (None, f"{T2V} --frames -7", ["--frames -7", "1 and 9"]),
    "frames a word": (None, f"{T2V} --frames many", ["--frames", "many"]),
    "height 72": (None, f"{T2V} --height 72", ["--height 72", "64 and 80"]),
    "width 1": (None, f"{T2V} --width 1", ["--width 1", "multiple of 16"]),
    "width 0": (None, f"{T2V} --width 0", ["--width 0", "multiple of 16"]),
    "height negative": (None, f"{T2V} --height -32", ["--height -32", "multiple of 16"]),
    "steps negative": (None, f"{T2V} --steps -5", ["--steps -5"]),
    "steps zero": (None, f"{T2V} --steps 0", ["--steps 0"]),
    "steps beyond the schedule": (None, f"{T2V} --steps 1001", ["--steps 1001", "1000"]),
    "fps zero": (None, f"{T2V} --fps 0", ["--fps 0"]),
    "fps not a number": (None, f"{T2V} --fps nan", ["--fps nan"]),
    "seed beyond 64 bits": (None, f"{T2V} --seed {2**70}", ["--seed", str(2**70)]),
    "negative prompt without guidance": (None, f"{T2V} --negative-prompt blurry", ["--negative-prompt", "--guidance"]),
    "negative prompt of a line without guidance": (
        lambda: listing({"prompt": "a fox", "negative_prompt": "blurry"}), MANY, ["'blurry'", "--guidance 1"]),
    "fit without an image": (None, f"{T2V} --fit pad", ["--fit", "--image"]),
    "guidance on an image that is not given": (None, "--prompt a --model toy/sugar --omega-image 3", ["--omega-image", "--image"]),
    "dropping at no time": (None, f"{SUGAR} --drop clip", ["--drop clip", "--t-bar"]),
    "guidance for SUGAR": (None, f"{SUGAR} --guidance 3", ["--guidance", "--omega-text"]),
    "omega for a plain model": (None, f"{T2V} --omega-image 3", ["--omega-image", "SUGAR"]),
    "a noun without <cls>": (None, f"{SUGAR} --noun fox", ["--noun fox"]),
    "t-bar beyond T": (None, f"{SUGAR} --t-bar 1001", ["--t-bar 1001"]),
    "equation unknown": (None, f"{SUGAR} --equation 5", ["--equation"]),
    "device unknown": (None, f"{T2V} --device abacus", ["--device abacus"]),
    "flag unknown": (None, f"{T2V} --colour red", ["--colour"]),
    # where it goes
    "output a folder": (lambda: Path("x.mp4").mkdir(), f"{T2V} --out x.mp4", ["x.mp4", "folder"]),
    "output below a file": (None, f"{T2V} --out fox.png/x.mp4", ["fox.png/x.mp4"]),
    "output below a file, folder": (None, f"{T2V} --out fox.png/", ["fox.png"]),
    "output of another format": (None, f"{T2V} --out x.avi", ["x.avi", ".mp4", ".gif"]),
    "output name too long": (None, f"{T2V} --out {LONG}.mp4", [LONG]),
    "output in a folder that takes no files": (None, f"{T2V} --out /proc/x.mp4", ["/proc/x.mp4"]),
    # the model's folder
    "no such folder": (None, f"{T2V} --model ./nowhere", ["nowhere"]),
    "model a file": (None, f"{T2V} --model fox.png", ["fox.png", "folder"]),
    "model an empty folder": (lambda: Path("x").mkdir(), f"{T2V} --model x", ["x", "transformer"]),
    "hub id without network": (None, f"{T2V} --model nobody/nothing", ["nobody/nothing", "no network"]),
    "base on the hub without network": (
        lambda: edit_json("toy/sugar/model_index.json", base="nobody/nothing"), SUGAR,
        ["nobody/nothing", "no network"]),
    "Grounded SAM without network": (None, f"{SWITCH} --subject fox", ["grounding-dino", "no network"]),
    "CLIP without network": (lambda: shutil.rmtree("toy/clip"), SUGAR, ["clip", "no network"]),
    "no transformer": (lambda: shutil.rmtree("toy/transformer"), T2V, ["transformer"]),
    "no VAE": (lambda: shutil.rmtree("toy/vae"), T2V, ["vae"]),
    "no text encoder": (lambda: shutil.rmtree("toy/text_encoder"), T2V, ["text_encoder"]),
    "no tokenizer": (lambda: shutil.rmtree("toy/tokenizer"), T2V, ["tokenizer"]),
    "no config": (lambda: Path("toy/transformer/config.json").unlink(), T2V, ["transformer/config.json"]),
    "no config of the VAE": (lambda: Path("toy/vae/config.json").unlink(), T2V, ["vae/config.json"]),
    "no config of the text encoder": (
        lambda: Path("toy/text_encoder/config.json").unlink(), T2V, ["text_encoder/config.json"]),
    "no config of the scheduler": (
        lambda: Path("toy/scheduler/scheduler_config.json").unlink(), T2V, ["scheduler_config.json"]),
    "no config of CLIP": (lambda: Path("toy/clip/config.json").unlink(), SUGAR, ["clip/config.json"]),
    "no preprocessing of DINO": (
        lambda: Path("toy/dino/preprocessor_config.json").unlink(), SUGAR, ["dino/preprocessor_config.json"]),
    "a design that is not there": (
        lambda: edit_json("toy/sugar/transformer/config.json", design="f"), SUGAR, ["design 'f'", "a, b, c, d, e"]),
    "config not JSON": (lambda: truncate("toy/transformer/config.json"), T2V, ["transformer/config.json"]),
    "config a list": (lambda: write("toy/vae/config.json", "[]"), T2V, ["vae/config.json"]),
    "config of another model": (
        lambda: edit_json("toy/transformer/config.json", _class_name="FluxTransformer2DModel"), T2V,
        ["FluxTransformer2DModel"]),
    "config with a word for a number": (
        lambda: edit_json("toy/transformer/config.json", num_layers="four"), T2V, ["transformer/config.json"]),
    "scheduler of another kind": (
        lambda: edit_json("toy/scheduler/scheduler_config.json", prediction_type="epsilon"), T2V,
        ["prediction_type", "epsilon"]),
    "guidance that is a word": (
        lambda: edit_json("toy/scheduler/scheduler_config.json", guidance="much"), T2V, ["guidance", "much"]),
    "tokenizer empty": (lambda: Path("toy/tokenizer/spiece.model").unlink(), T2V, ["tokenizer", "spiece.model"]),
    "tokenizer damaged": (lambda: truncate("toy/tokenizer/spiece.model"), T2V, ["spiece.model"]),
    # its weights
    "no weights": (lambda: Path(f"toy/transformer/{WEIGHTS}").unlink(), T2V, ["toy/transformer", WEIGHTS]),
    "weights truncated": (lambda: truncate(f"toy/transformer/{WEIGHTS}"), T2V, [f"transformer/{WEIGHTS}", "truncated"]),
    "weights zero-sized": (lambda: truncate(f"toy/vae/{WEIGHTS}", 0), T2V, [f"vae/{WEIGHTS}", "truncated"]),
    "text encoder truncated": (
        lambda: truncate("toy/text_encoder/model.safetensors"), T2V, ["text_encoder/model.safetensors", "truncated"]),
    "CLIP truncated": (lambda: truncate("toy/clip/model.safetensors"), SUGAR, ["clip/model.safetensors", "truncated"]),
    "shard missing": (first_shard(Path.unlink), T2V, ["00001-of", "missing"]),
    "shard truncated": (first_shard(lambda path: truncate(str(path))), T2V, ["00001-of", "truncated"]),
    "shard truncated by one byte": (
        first_shard(lambda path: path.write_bytes(path.read_bytes()[:-1])), T2V, ["00001-of", "truncated"]),
    "shard foreign": (first_shard(foreign), T2V, ["00001-of", "belong"]),
    "shard of a model of other size": (first_shard(other_size), T2V, ["00001-of", "shape"]),
    "shard of the VAE foreign": (first_shard(foreign, "toy/vae"), T2V, ["vae", "00001-of", "belong"]),
    "shard of the text encoder missing": (
        first_shard(Path.unlink, "toy/text_encoder", "model"), T2V, ["text_encoder/model-00001-of", "missing"]),
    "shard index damaged": (
        first_shard(lambda path: truncate(f"toy/transformer/{WEIGHTS}.index.json")), T2V, ["index.json"]),
    "keys missing": (lambda: edit_weights(f"toy/transformer/{WEIGHTS}", without(5)), T2V,
                     ["toy/transformer", "5 missing", "and 2 more"]),
    "keys unexpected": (lambda: edit_weights(f"toy/transformer/{WEIGHTS}", beside(7)), T2V,
                        ["toy/transformer", "7 unexpected", "stranger.0", "and 4 more"]),
    "keys missing and unexpected": (
        lambda: edit_weights(f"toy/vae/{WEIGHTS}", lambda t: beside(1)(without(1)(t))), T2V,
        ["1 missing", "1 unexpected"]),
    "keys of the text encoder missing": (
        lambda: edit_weights("toy/text_encoder/model.safetensors", lambda t: {k: v for k, v in t.items() if k != T5_Q}),
        T2V, ["text_encoder", "1 missing", T5_Q]),
    "keys of DINO missing": (
        lambda: edit_weights("toy/dino/model.safetensors", without(5)), SUGAR, ["dino", "5 missing"]),
    "a layer more than in the config": (
        lambda: edit_json("toy/transformer/config.json", num_layers=3), T2V, ["unexpected", "transformer_blocks.3"]),
    "a shape that does not fit": (
        lambda: edit_weights(f"toy/transformer/{WEIGHTS}", reshaped(Q)), T2V, [Q, "[3, 5]", "[192, 192]"]),
    "a shape of the text encoder that does not fit": (
        lambda: edit_weights("toy/text_encoder/model.safetensors", reshaped(T5_Q)), T2V, [T5_Q, "[3, 5]", "[64, 64]"]),
    "a text encoder of another width": (lambda: new_base(text_embed_dim=96), f"{T2V} --model other", ["64", "96"]),
    "a DINO of another width": (
        lambda: new_base(dino_dim=48, clip_dim=96, dino_tokens=37, clip_tokens=37),
        "--image fox-alpha.png --prompt 'a fox' --model other", ["dino", "48", "96"]),
    # the adapter and its base
    "no adapter": (None, f"{FOX} --adapter nowhere", ["nowhere"]),
    "adapter truncated": (
        lambda: truncate("toy/switch/pytorch_lora_weights.safetensors"), SWITCH, ["switch", "truncated"]),
    "adapter that is none": (None, f"{FOX} --adapter toy/transformer/{WEIGHTS}", [WEIGHTS, "LoRA"]),
    "adapter of a wider base": (
        lambda: adapter_for(num_attention_heads=4), f"{FOX} --adapter other.safetensors",
        ["other.safetensors", "another base"]),
    "adapter of a deeper base": (
        lambda: adapter_for(("transformer_blocks.7.attn1.to_q",), num_layers=8, num_attention_heads=2),
        f"{FOX} --adapter other.safetensors", ["other.safetensors", "another base", "transformer_blocks.7.attn1.to_q"]),
    "adapter half there": (adapter_weights(without(1)), SWITCH, ["switch", "not whole"]),
    "adapter of two ranks": (adapter_weights(other_rank), SWITCH, ["switch", "rank"]),
    "adapter on image-to-video": (None, f"{SWITCH} --model toy/i2v", ["cannot stand on", "CogVideoX-5b"]),
    "adapter on SUGAR": (None, f"{SWITCH} --model toy/sugar", ["cannot stand on", "CogVideoX-5b"]),
    "adapter on a base without rotary positions": (
        new_base, f"{SWITCH} --model other", ["cannot stand on", "CogVideoX-5b"]),
    "adapter on a base with a temporal patch": (
        lambda: new_base(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
        f"{SWITCH} --model other", ["cannot stand on", "CogVideoX-5b"]),
    "SUGAR on image-to-video": (
        lambda: new_base(in_channels=32, dino_dim=48, clip_dim=48, dino_tokens=65, clip_tokens=65),
        f"{FOX} --model other", ["SUGAR", "cannot stand on"]),
    "another size with learned positions": (
        lambda: new_base(in_channels=32, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True),
        f"{FOX} --model other --height 128", ["learned positions", "9 frames", "64x64"]),
}


def refused(capfd, arguments: str) -> str:
    """Runs sample.py, which must refuse: status 2, one line on standard error. Returns that line."""
    with warnings.catch_warnings(record=True) as raised:  # Python would print these as well
        warnings.simplefilter("default")
        status = run(arguments)
    errors = capfd.readouterr().err.splitlines() + [str(w.message) for w in raised if w.category is UserWarning]
    assert status == 2
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test when sampling starts, or a network is brought into memory (DINO and CLIP, small, may be)."""
    monkeypatch.setattr(sample.Sampler, "run", lambda *args: pytest.fail("the heavy work began"))
    for name in ("TextEncoder", "load_vae", "load_transformer"):
        monkeypatch.setattr(pipeline, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_nothing_written(here, capfd, no_work, case):
    prepare, arguments, phrases = BAD[case]
    if prepare is not None:
        prepare()
    before = tree(here)
    capfd.readouterr()
    message = refused(capfd, f"--out new/ {arguments}")
    for phrase in phrases:
        assert phrase in message
    assert tree(here) == before


def test_a_subject_that_is_not_in_the_image(here, monkeypatch, capfd, no_work):
    before, nouns = tree(here), segmented(monkeypatch, None)
    message = refused(capfd, f"{SWITCH} --subject zebra --out new/out.mp4")
    assert nouns == ["zebra"] and "zebra" in message and "fox.png" in message
    assert tree(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_one_may_not_write_to(here, capfd, no_work):
    (here / "closed").mkdir(mode=0o500)
    assert "closed" in refused(capfd, f"{T2V} --out closed/out.mp4")


def test_one_bad_line_in_a_list_is_found_before_the_first_video(here, capfd, no_work):
    listing({"prompt": "a fox", "image": "fox.png"}, {"prompt": "a dog", "image": "nowhere.png"})
    before = tree(here)
    assert "nowhere.png" in refused(capfd, f"{MANY} --adapter toy/switch {SMALL} --out many")
    assert tree(here) == before


def test_the_script_itself_says_it_in_one_line_offline(here):
    """As a person sees it: a process, its exit status, its standard error."""
    before = tree(here)
    with script("--prompt 'a fox' --model nobody/nothing --out new/", HF_HUB_OFFLINE="1", HF_HOME=str(here)) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and not output
    lines = errors.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "nobody/nothing" in lines[0], lines
    assert tree(here) == before
