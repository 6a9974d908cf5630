"""Checkpoints on disk: sharded and whole, checked before anything is read, written whole or not at all."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from checkpoint import BadInput, check, index, load, need, part, replace_when_whole, resolve, save, stored_dtype


def network():
    return nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50), nn.BatchNorm1d(50))


@pytest.fixture
def folder(tmp_path):
    """A network saved in several shards, with an index."""
    save(tmp_path / "net", {"a": 1}, network().state_dict(), shard=4000)
    return tmp_path / "net"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def meta():
    with torch.device("meta"):
        return network()


def test_a_disk_that_takes_nothing_is_a_sentence_and_a_bug_is_none(tmp_path, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    def full_in_rust():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for run in (full, full_in_rust):
        assert checkpoint.exit_status(run) == 2
        assert "No space left on device" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        checkpoint.exit_status(lambda: (tmp_path / "nowhere").read_text())

    def crowded():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    assert checkpoint.exit_status(crowded) == 2
    assert "(CUDA out of memory. Tried to allocate 2 GiB.): train with a smaller --micro-batch" in capsys.readouterr().err


def test_what_is_saved_comes_back(tmp_path):
    saved = network()
    for killed in (".net-a1b2c3d4", ".net-a1b2c3d4-old"):  # processes that wrote it before
        (tmp_path / killed).mkdir()
    for shard, files in ((10**9, 1), (4000, 4)):
        save(tmp_path / "net", {"a": 1}, saved.state_dict(), shard=shard)
        assert len(shards(tmp_path / "net")) == files and [path.name for path in tmp_path.iterdir()] == ["net"]
        loaded = load(meta(), tmp_path / "net")
        assert all(torch.equal(v, saved.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert checkpoint.read_json(tmp_path / "net" / "config.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_loading_in_small_chunks_is_the_same(folder, monkeypatch):
    whole = load(meta(), folder).state_dict()
    monkeypatch.setattr(checkpoint, "CHUNK", 100)
    assert all(torch.equal(v, whole[k]) for k, v in load(meta(), folder).state_dict().items())


def test_a_failed_save_leaves_the_old_checkpoint(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(TypeError):
        save(folder, {"not JSON": object()}, network().state_dict())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["net"]


def test_missing_truncated_and_foreign_shards_are_named(folder):
    second = shards(folder)[1]
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(BadInput, match=f"{second} is missing"):
        index(folder)
    for length in (0, 5, 60, len(whole) - 1):
        second.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=f"{second} is truncated or damaged"):
            index(folder)
    save_file({"somebody.elses": torch.zeros(3)}, second)
    with pytest.raises(BadInput, match=f"{second} does not belong to"):
        index(folder)


def rewrite(folder, change):
    """The shards joined into one file, with the tensors changed."""
    tensors = {k: v for file in shards(folder) for k, v in load_file(file).items()}
    for file in folder.glob("diffusion*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def test_missing_and_unexpected_keys_are_counted_and_named(folder):
    rewrite(folder, lambda t: (t.pop("0.weight"), t.pop("0.bias"), t.update(extra=torch.zeros(1))))
    with pytest.raises(BadInput, match=r"2 missing \(0.weight, 0.bias\), 1 unexpected \(extra\)"):
        check(meta(), folder)
    rewrite(folder, lambda t: t.pop("extra"))
    assert set(check(meta(), folder, new=("0.",))) == set(network().state_dict()) - {"0.weight", "0.bias"}


def test_many_keys_are_not_all_listed(folder):
    rewrite(folder, lambda t: t.clear() or t.update(extra=torch.zeros(1)))
    with pytest.raises(BadInput, match=r"9 missing \(0.weight, 0.bias, 1.weight and 6 more\)"):
        check(meta(), folder)


def test_a_shape_that_does_not_fit_is_named(folder):
    rewrite(folder, lambda t: t.update({"1.bias": torch.zeros(51)}))
    with pytest.raises(BadInput, match=r"1.bias in .* has shape \[51\], .* asks for \[50\]"):
        load(meta(), folder)


def test_nothing_there(tmp_path):
    with pytest.raises(BadInput, match="has no weights"):
        index(tmp_path)
    with pytest.raises(BadInput, match="config.json is missing"):
        checkpoint.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read as JSON"):
        checkpoint.read_json(tmp_path / "config.json")


def test_the_type_that_most_bytes_have(tmp_path):
    save(tmp_path / "a", {}, {"big": torch.zeros(100, dtype=torch.bfloat16), "small": torch.zeros(3)})
    save(tmp_path / "b", {}, {"big": torch.zeros(100), "small": torch.zeros(3, dtype=torch.float16)})
    assert stored_dtype(tmp_path / "a") == torch.bfloat16 and stored_dtype(tmp_path / "b") == torch.float32


def test_parts_that_a_model_lacks_come_from_its_base(tmp_path):
    (tmp_path / "base" / "vae").mkdir(parents=True)
    (tmp_path / "tuned" / "transformer").mkdir(parents=True)
    (tmp_path / "tuned" / "model_index.json").write_text(json.dumps({"base": "../base"}))
    assert part(tmp_path / "tuned", "transformer") == tmp_path / "tuned" / "transformer"
    assert part(tmp_path / "tuned", "vae").resolve() == (tmp_path / "base" / "vae").resolve()
    assert part(tmp_path / "tuned", "scheduler") is None
    with pytest.raises(BadInput, match="has no folder scheduler"):
        need(tmp_path / "tuned", "scheduler")


def test_resolve(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(BadInput, match="There is no folder"):
        resolve(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        resolve(str(tmp_path / "file"))
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BadInput, match="somebody/model is neither a folder here nor .*no route to host"):
        resolve("somebody/model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, allow_patterns: tmp_path / model)
    assert resolve("somebody/model") == tmp_path / "somebody/model"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file.txt"
    with replace_when_whole(file) as part_of_it:
        part_of_it.write_text("whole")
        assert not file.exists() and part_of_it.suffix == ".txt"
    with pytest.raises(KeyboardInterrupt), replace_when_whole(file) as part_of_it:
        part_of_it.write_text("ha")
        raise KeyboardInterrupt
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]
    shutil.rmtree(tmp_path)


def test_a_fingerprint_tells_any_byte_of_small_files_and_any_setting(tmp_path, seed):
    rng = np.random.default_rng(seed)
    (tmp_path / "vae").mkdir()
    file, config = tmp_path / "vae" / "model.safetensors", tmp_path / "vae" / "config.json"
    content = bytearray(rng.bytes(int(rng.integers(1, 200_000))))
    file.write_bytes(content)
    config.write_text('{"scaling_factor": 1.0}')
    seen = {checkpoint.fingerprint(tmp_path), checkpoint.fingerprint(file)}
    content[rng.integers(len(content))] ^= 1
    file.write_bytes(content)
    seen |= {checkpoint.fingerprint(tmp_path), checkpoint.fingerprint(file)}
    config.write_text('{"scaling_factor": 1.1}')
    seen.add(checkpoint.fingerprint(tmp_path))
    assert len(seen) == 5 and checkpoint.fingerprint(None, tmp_path) == checkpoint.fingerprint(tmp_path)
