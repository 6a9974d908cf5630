"""The latent cache: the same batches as without it, whole or not at all, and a training that needs no other network."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli import ROOT
from safetensors.torch import load_file, save_file

import cache
import distributed
import toy_networks
import train_switch
from cache import Cache, shard_file, stored_settings, write_cache
from checkpoint import BadInput
from data import Encoder, Stream, Toy
from media import Clip, save_video
from model import read_config
from readers import clip_of, open_data


@pytest.fixture(scope="module")
def ranks():
    return distributed.start("cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 3)
    cache.open_shard.cache_clear()


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)


@pytest.mark.parametrize("stream,sugar", [("pairs", False), ("videos", False), ("triplets", True)])
def test_a_cache_gives_what_encoding_gives(stream, sugar, base, ranks, tmp_path, seed):
    encoder = Encoder(base, "none" if sugar else "token", toy_networks.TOKENS, "cpu", sugar)
    written = write_cache(tmp_path / "cache", Toy(stream, seed), 8, encoder, ranks, seed, stored_settings(encoder, stream))
    assert len(written) == 8 and len(list((tmp_path / "cache").glob("shard-*"))) == 3
    plain, cached = (Stream(data, 8, encoder, seed) for data in (Toy(stream, seed), Cache(tmp_path / "cache")))
    assert all(equal(plain[position], cached[position]) for position in range(12))
    assert torch.equal(written.null(), encoder.text(""))


def test_what_is_there_is_not_encoded_again(base, ranks, tmp_path):
    encoder, folder = Encoder(base, "token", toy_networks.TOKENS, "cpu"), tmp_path / "cache"
    write = lambda **more: write_cache(folder, Toy("pairs"), 7, encoder, ranks, 0, {**stored_settings(encoder, "pairs"), **more})
    write()
    before = {i: load_file(shard_file(folder, i)) for i in range(3)}
    shard_file(folder, 1).unlink()
    cache.open_shard.cache_clear()
    with pytest.raises(BadInput, match=r"not whole: it lacks shard-00001.safetensors"):
        Cache(folder)
    kept = {i: shard_file(folder, i).stat().st_mtime_ns for i in (0, 2)}
    write()
    assert kept == {i: shard_file(folder, i).stat().st_mtime_ns for i in (0, 2)}
    assert all(equal(before[i], load_file(shard_file(folder, i))) for i in range(3))
    with pytest.raises(BadInput, match="holds a cache with data = None, and now it is elsewhere"):
        write(data="elsewhere")


def test_a_file_that_is_cut_off_is_named_and_written_again(base, ranks, tmp_path):
    """And what a killed run has left half written goes."""
    encoder, folder = Encoder(base, "token", toy_networks.TOKENS, "cpu"), tmp_path / "cache"
    write = lambda: write_cache(folder, Toy("pairs"), 7, encoder, ranks, 0, stored_settings(encoder, "pairs"))
    write()
    file = shard_file(folder, 1)
    content = file.read_bytes()
    for cut in (content[: len(content) // 2], content[:100], b""):
        cache.open_shard.cache_clear()
        file.write_bytes(cut)
        with pytest.raises(BadInput, match=f"{file} is truncated or damaged .*: remove it, and run the command"):
            Cache(folder)[3]
    file.unlink()
    (folder / ".part-abc.safetensors").write_bytes(content[:100])
    (folder / "cutouts").mkdir()
    (folder / "cutouts" / ".part-abc.png").touch()
    (folder / "another").mkdir()  # cache, which another process is writing
    (folder / "another" / ".part-abc.safetensors").touch()
    write()
    assert file.read_bytes() == content and [part.parent.name for part in folder.rglob(".part-*")] == ["another"]


def test_a_cache_for_something_else_is_refused(base, ranks, tmp_path):
    encoder = Encoder(base, "token", toy_networks.TOKENS, "cpu", reference_frames=2)
    written = write_cache(tmp_path / "cache", Toy("videos"), 2, encoder, ranks, 0, stored_settings(encoder, "videos"))
    written.check(encoder, "videos")
    for other, stream, reason in ((encoder, "pairs", "stream = videos, and this run needs pairs"),
                                  (Encoder(base, "none", toy_networks.TOKENS, "cpu", reference_frames=2), "videos", "cls = token"),
                                  (Encoder(base, "token", toy_networks.TOKENS, "cpu", reference_frames=1), "videos", "reference_frames = 2, and")):
        with pytest.raises(BadInput, match=reason):
            written.check(other, stream)
    written.check(Encoder(base, "token", toy_networks.TOKENS, "cpu"), "videos")  # any number of frames to choose from will do
    trained = tmp_path / "trained"  # the same base with another VAE
    shutil.copytree(base, trained)
    tensors = load_file(trained / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in tensors.items()}, trained / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="weights = "):
        written.check(Encoder(trained, "token", toy_networks.TOKENS, "cpu", reference_frames=2), "videos")
    ask = lambda clip, flags: open_data(str(tmp_path / "cache"), "videos", None, 1, clip, train_switch.parse(flags.split()), encoder, tmp_path)
    with pytest.raises(BadInput, match="--share 0.5: the cache"):
        ask(Clip(9, 64, 64), "--share 0.5")
    for clip, flags in ((Clip(17, 64, 64), "--frames 17"), (Clip(9, 64, 96), "--width 96"), (Clip(9, 64, 64, 8), "--fps 8")):
        with pytest.raises(BadInput, match=f"have {flags}, and the cache"):
            ask(clip, flags)
    assert ask(Clip(9, 64, 64), "--frames 9")[1] == 2
    write_cache(tmp_path / "pairs", Toy("pairs"), 2, encoder, ranks, 0, stored_settings(encoder, "pairs"))
    flags = train_switch.parse("--share 0.5".split())  # of the videos beside it
    assert open_data(str(tmp_path / "pairs"), "pairs", None, 1, Clip(17, 64, 96), flags, encoder, tmp_path)[1] == 2
    (tmp_path / "cache" / "index.json").write_text('{"metadata": {}}')
    with pytest.raises(BadInput, match="is not the index of a cache"):
        Cache(tmp_path / "cache")


def run(*arguments, **environment) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training_from_a_cache_is_training_without_and_loads_no_other_network(base, tmp_path):
    common = ["--model", base, "--device", "cpu", "--seed", "3"]
    for stream, count in (("pairs", 5), ("videos", 3)):
        said = run("data.py", "cache", "--as", stream, "--count", count, "--out", tmp_path / stream, *common)
        assert f"{count} examples" in said and "kB each" in said and "examples/s" in said
    train = ["train_switch.py", "--steps", "4", "--image-batch", "4", "--video-batch", "2", "--p", "0.5", "--rank", "4",
             "--validate-count", "0"]
    run(*train, *common, "--images", 5, "--videos", 3, "--out", tmp_path / "plain")
    bare = tmp_path / "bare"  # a base of which only the transformer is left
    shutil.copytree(base, bare)
    for weights in (*bare.glob("vae/*.safetensors"), *bare.glob("text_encoder/*.safetensors")):
        weights.unlink()
    run(*train, "--model", bare, *common[2:], "--image-data", tmp_path / "pairs", "--video-data", tmp_path / "videos",
        "--out", tmp_path / "cached")
    plain, cached = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "cached"))
    assert plain == cached and len(plain.splitlines()) == 4
    assert equal(*(load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("plain", "cached")))


def test_two_ranks_write_what_one_rank_writes(base, tmp_path):
    arguments = ["cache", "--as", "pairs", "--count", "66", "--model", base, "--device", "cpu"]
    run("data.py", *arguments, "--out", tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "data.py", *arguments, "--out", tmp_path / "two")
    files = sorted(file.name for file in (tmp_path / "one").glob("shard-*"))
    assert len(files) == 2 and files == sorted(file.name for file in (tmp_path / "two").glob("shard-*"))
    assert all(equal(load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)) for name in files)
    assert json.loads((tmp_path / "one" / "index.json").read_text()) == json.loads((tmp_path / "two" / "index.json").read_text())


@pytest.mark.parametrize("arguments,phrase", [
    ("--image-data nowhere", "There is no nowhere"), ("--image-data {empty}", "holds no parquet files"),
    ("--video-data {empty}", "holds no videos"), ("--frames 10", "the nearest are 9 and 17"), ("--height 50", "multiple of 16"),
    ("--frames -7", "choose more than 0"), ("--images 0", "--images 0"),
    ("--share 0", "--share 0.0"), ("--video-data {text}", "has no column for the video"),
])
def test_data_of_the_wrong_kind(arguments, phrase, base, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("a poem\n")
    arguments = arguments.format(empty=tmp_path / "empty", text=tmp_path / "text.csv").split()
    assert train_switch.main([*arguments, "--model", str(base), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and phrase in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_run_has_the_clips_of_its_cache(base, tmp_path, capfd):
    """Also its plan and its sheets, and the stream that is read beside it."""
    save_video(np.zeros((9, 64, 96, 3), np.uint8), tmp_path / "videos" / "a.mp4", 8, {})
    (tmp_path / "videos" / "a.txt").write_text("a dog")
    assert cache.main(f"cache --as videos --data {tmp_path / 'videos'} --out {tmp_path / 'cache'} --model {base} --device cpu --frames 9 "
                      "--height 64 --width 96".split()) == 0
    plan = f"--plan --model {base} --out {tmp_path / 'run'} --device cpu --video-data"
    assert train_switch.main([*plan.split(), str(tmp_path / "cache")]) == 0
    assert f"tokens in a sample     {toy_networks.TOKENS + (3 + 1) * 4 * 6}\n" in capfd.readouterr().out
    args = train_switch.parse(["--height", "128"])
    assert clip_of(args, read_config(base / "transformer"), None, str(tmp_path / "cache")) == Clip(9, 128, 96)


@pytest.mark.parametrize("arguments,phrase", [("pairs --share 0.5", "--share has no effect --as pairs"), ("triplets --no-cls", "--no-cls has"),
                                              ("subjects --reference-frames 2", "--reference-frames has no effect --as subjects")])
def test_what_has_no_effect_on_a_cache_is_refused(arguments, phrase, base, tmp_path, capfd):
    assert cache.main(["cache", "--out", str(tmp_path / "cache"), "--model", str(base), "--device", "cpu", "--as", *arguments.split()]) == 2
    assert phrase in capfd.readouterr().err and not (tmp_path / "cache").exists()


def test_data_that_has_changed_is_not_mixed(base, tmp_path, capfd):
    """Neither is the cache itself data, where it lies in the folder of its data."""
    data = tmp_path / "videos"
    for i in range(2):
        save_video(np.full((9, 64, 64, 3), 50 * i, np.uint8), data / f"{i}.mp4", 8, {})
        (data / f"{i}.txt").write_text("a dog")
    arguments = ["cache", "--as", "videos", "--data", str(data), "--out", str(data / "cache"), "--model", str(base), "--device", "cpu",
                 "--reference-frames", "1", "--frames", "9", "--height", "64", "--width", "64"]
    assert cache.main(arguments) == 0 and cache.main(arguments) == 0
    (data / "1.txt").write_text("a large dog")
    assert cache.main(arguments) == 2 and "data's digest" in capfd.readouterr().err
