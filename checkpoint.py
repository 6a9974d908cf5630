"""Checkpoints on disk, in the diffusers layout: a folder for each network with a config.json and its weights as
safetensors, in one file or in shards with an index. This file knows no network; it reads, checks and writes files, and it has what a
command says, and its exit status, where it cannot go on (BadInput, exit_status).
"""

import argparse
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "diffusion_pytorch_model"  # stem of diffusers' weight files; transformers' is "model"
CHUNK = 128 * 2**20  # bytes of a shard that are mapped at a time, see load()
SHARD = 5 * 10**9  # bytes in a shard that we write, diffusers' default
CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # why a disk takes nothing


class BadInput(Exception):
    """Something a person gave cannot work. The message is a sentence: what is wrong, where, and what to do."""


def at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Raises where one of these flags, which are numbers or None, is below `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {value}: choose {least} or more.")


def check_seed(seed: int, where: str = "--seed") -> None:
    if not 0 <= seed < 2**63:
        raise BadInput(f"{where} {seed}: a seed is a whole number from 0 to 2^63 - 1.")


def exit_status(run: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Runs a command. What a person gave wrong is said in one sentence and is status 2, and so is a disk that is full or closed to us;
    Ctrl-C is status 130."""
    try:
        run()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in CLOSED and not any(f"os error {number})" in str(error) for number in CLOSED):
            raise
        print(f"error: A file could not be read or written: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: The GPU's memory is full ({str(error).splitlines()[0]}): train with a smaller --micro-batch, with --recompute, or "
              f"on more GPUs; sample with --low-memory, or fewer frames.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


class Entry(NamedTuple):
    """Where a tensor lies, from the header of its file alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name for it: "F32", "BF16", "F16", ...
    nbytes: int


def resolve(model: str, more: tuple[str, ...] = ()) -> Path:
    """The local folder of a model: `model` itself where it is one, else a snapshot of the hub id `model`. more: patterns of
    files that are needed beside the usual ones."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BadInput(f"{model} is a file: a model is a folder in the diffusers layout, or a hub id.")
    if model.rstrip("/") == "checkpoints/toy":
        raise BadInput("There is no checkpoints/toy here: it comes with the repository, so run this in its folder, or give --model.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise BadInput(f"There is no folder {model}: give a folder in the diffusers layout, or a hub id such as "
                       f"THUDM/CogVideoX-5b.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", *more]))
    except Exception as error:  # no network, no such repository, no permission: the hub has a class for each
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{model} is neither a folder here nor a model that the hub gave ({reason}); check the name, or "
                       f"download it where there is a network and pass its folder.") from error


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing: is {path.parent} a folder in the diffusers layout?") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds no JSON object.")
    return content


def fill(kind: type, raw: dict, file: Path):
    """The dataclass `kind` with those of its fields that `raw`, read from `file`, has; the types are those of the
    defaults, and where the default is None whole numbers."""
    chosen = {}
    for field in fields(kind):
        value, default = raw.get(field.name, field.default), field.default
        wanted = {float: (int, float), tuple: (list, tuple), type(None): (int, type(None))}.get(type(default), type(default))
        if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise BadInput(f"{file} has {field.name} = {value!r}, where {default!r} would be usual.")
        chosen[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**chosen)


def part(model: Path, name: str, depth: int = 0) -> Path | None:
    """The folder of one network ("vae", "transformer", ...) of a model, or None. A fine-tuned model need not repeat what
    it did not change: parts that its folder lacks come from the base that its model_index.json names, a folder relative
    to its own or a hub id."""
    if (model / name).is_dir():
        return model / name
    base = read_json(model / "model_index.json").get("base") if (model / "model_index.json").exists() else None
    if base is None:
        return None
    if depth == 8:
        raise BadInput(f"The bases that {model / 'model_index.json'} and its like name go round in a circle.")
    return part(model / base if (model / base).is_dir() else resolve(base), name, depth + 1)


def check_apart(out: Path, model: Path) -> None:
    """Raises where a new model in `out` would take the place of `model`, or of one that it takes parts from."""
    parts = [part(model, name) for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "dino", "clip")]
    if out.resolve() in {model.resolve(), *(folder.parent.resolve() for folder in parts if folder is not None)}:
        raise BadInput(f"--out {out} is the folder of --model, or of a model that it takes parts from: what is written would take its place. "
                       f"Choose another --out.")


def name_base(model: Path, base: str) -> None:
    """Writes that what `model` lacks is to be taken from `base`: see part()."""
    write_json(model / "model_index.json", {"base": base})


def need(model: Path, name: str) -> Path:
    """part(), where the model cannot do without."""
    folder = part(model, name)
    if folder is None:
        raise BadInput(f"{model} has no folder {name}: it is not a whole CogVideoX checkpoint in the diffusers layout.")
    return folder


def read_header(file: Path) -> dict[str, Entry]:
    """Names, shapes and types of the tensors in one safetensors file, without reading the tensors."""
    if not file.is_file():
        raise BadInput(f"The weight file {file} is missing.")
    try:
        with safe_open(file, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}
            entries = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"The weight file {file} is truncated or damaged ({error}); download it again.") from error
    bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16}
    return {key: Entry(file, shape, dtype, torch.Size(shape).numel() * bits.get(dtype, 8) // 8)
            for key, (shape, dtype) in entries.items()}


def index(folder: Path, stem: str = WEIGHTS) -> dict[str, Entry]:
    """Where each tensor of a network lies. Every shard is opened and checked against the index, none is read."""
    listing, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if not listing.exists():
        if not single.exists():
            raise BadInput(f"{folder} has no weights: neither {single.name} nor {listing.name} is there (.bin and .pt "
                           f"files are not read).")
        return read_header(single)
    where = read_json(listing).get("weight_map")
    if not isinstance(where, dict):
        raise BadInput(f"{listing} has no weight_map.")
    entries = {}
    for name in sorted(set(where.values())):
        found, listed = read_header(folder / name), {key for key, file in where.items() if file == name}
        if found.keys() != listed:
            odd = sorted(found.keys() ^ listed)
            raise BadInput(f"The shard {folder / name} does not belong to {listing.name}: they disagree on {some(odd)}.")
        entries |= found
    return entries


def some(keys: list[str], count: int = 3) -> str:
    """The first few of many names, and how many there are."""
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def check(model: nn.Module, folder: Path, new: tuple[str, ...] = (), stem: str = WEIGHTS) -> dict[str, Entry]:
    """Compares the weights in `folder` with what `model` (on any device, also meta) expects, reading headers only.

    Keys that start with one of `new` may be missing: load() leaves them to the caller to initialise.
    """
    entries, wanted = index(folder, stem), model.state_dict()
    missing = [key for key in wanted if key not in entries and not key.startswith(new)]
    unexpected = [key for key in entries if key not in wanted]
    if missing or unexpected:
        parts = [f"{len(keys)} {kind} ({some(keys)})" for kind, keys in
                 (("missing", missing), ("unexpected", unexpected)) if keys]
        raise BadInput(f"The weights in {folder} do not fit its config.json: {', '.join(parts)}.")
    for key, entry in entries.items():
        if entry.shape != tuple(wanted[key].shape):
            raise BadInput(f"{key} in {entry.file} has shape {list(entry.shape)}, the config.json beside it asks for "
                           f"{list(wanted[key].shape)}.")
    return entries


def load(model: nn.Module, folder: Path, device="cpu", dtype=torch.float32, new: tuple[str, ...] = ()) -> nn.Module:
    """Fills `model`, built on the meta device, from the safetensors in `folder`.

    The files are memory-mapped. On a CPU, tensors that are stored in `dtype` already stay in the mapping: loading them
    takes no time and no second copy. Others are converted, and the file is mapped anew for every CHUNK bytes, which lets
    the pages go that were read: host memory peaks at the weights plus one chunk, on a GPU at one chunk.
    """
    waiting: dict[Path, list[tuple[str, int]]] = {}
    for key, entry in check(model, folder, new).items():
        waiting.setdefault(entry.file, []).append((key, entry.nbytes))
    for file, keys in waiting.items():
        while keys:
            part, size = {}, 0
            with safe_open(file, "pt") as tensors:
                while keys and size < CHUNK:
                    key, nbytes = keys.pop()
                    part[key] = tensors.get_tensor(key).to(device=device, dtype=dtype)
                    size += nbytes
            model.load_state_dict(part, strict=False, assign=True)
    return model


@contextmanager
def replace_when_whole(file: Path) -> Iterator[Path]:
    """A temporary path beside `file` to write to, with the same suffix. It takes the name of `file` when the block ends
    well and vanishes when it does not: nobody ever sees half a file."""
    handle, name = tempfile.mkstemp(prefix=".part-", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)  # mkstemp's file is closed to others
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """All of it or nothing."""
    with replace_when_whole(file) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_jsonl(file: Path, rows: list[dict]) -> None:
    """A line of JSON for each row."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def check_out(folder: Path) -> None:
    """Raises where --out names a file, before anything is written into it."""
    for path in (folder, *folder.parents):
        if path.is_file():
            raise BadInput(f"--out {folder}{f': {path}' if path != folder else ''} is a file: give a folder, which may be new.")


def remove_parts(folder: Path, below: str = "") -> None:
    """Removes what replace_when_whole() left in `folder`, or in the folders `below`, when its process was killed. Only while nobody
    writes there."""
    for part in folder.glob(f"{below}.part-*"):
        part.unlink(missing_ok=True)


def fingerprint(*folders: Path | None) -> str:
    """Tells weights apart by the names, the sizes, and the contents of the config.json and weight files in the folders: of large files
    16 samples, as what is trained differs everywhere."""
    kinds = ("config.json", "*.safetensors", "pytorch_model*.bin")
    digest = hashlib.sha256()
    for folder in folders:
        files = [] if folder is None else [folder] if folder.is_file() else [file for kind in kinds for file in folder.rglob(kind)]
        for file in sorted(files):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:
                for i in range(16):
                    content.seek(i * size // 16)
                    digest.update(content.read(-(-size // 16) if size < 2**26 else 2**12))
    return digest.hexdigest()[:16]


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point type in which most of a network's bytes are stored."""
    size: dict[str, int] = {}
    for entry in index(folder).values():
        size[entry.dtype] = size.get(entry.dtype, 0) + entry.nbytes
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    return names.get(max(size, key=size.get), torch.float32)


def save(folder: Path, config: dict, tensors: dict[str, torch.Tensor], stem: str = WEIGHTS, shard: int = SHARD) -> None:
    """Writes config.json and the weights, sharded as diffusers does. The folder appears whole or not at all. One process at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for killed in folder.parent.glob(f".{folder.name}-????????"):  # many gigabytes may lie there
        shutil.rmtree(killed, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_json(part / "config.json", config)
        shards, room = [{}], shard
        for key, tensor in tensors.items():
            if shards[-1] and tensor.nbytes > room:
                shards.append({})
                room = shard
            shards[-1][key] = tensor.detach().cpu().contiguous()
            room -= tensor.nbytes
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            where = {key: name for name, content in zip(names, shards) for key in content}
            total = sum(tensor.nbytes for tensor in tensors.values())
            listing = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(part / f"{stem}.safetensors.index.json", listing)
        for name, content in zip(names, shards):
            save_file(content, part / name, metadata={"format": "pt"})
            (part / name).chmod(0o644)  # safetensors' file is closed to others
        part.chmod(0o755)  # mkdtemp's folder is closed to others
        old = part.with_name(part.name + "-old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        for replaced in folder.parent.glob(f".{folder.name}-????????-old"):  # now, or by a process that was killed then
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- weights as other projects publish them ---------------------------------------------------------------------------


def read_published(path: Path, source: str, inside: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors in a .safetensors file, or in a PyTorch file, of which nothing but tensors is unpickled. source: a sentence,
    where they are published. inside: the name under which a PyTorch file may hold them, beside other things."""
    if not path.is_file():
        raise BadInput(f"There are no weights at {path}{': it is a folder; give a file' if path.is_dir() else ''}. {source}")
    if path.suffix == ".safetensors":
        read_header(path)  # for its errors
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage has as many classes here as there are places in a file
        if "Unsupported global" in str(error):
            raise BadInput(f"{path} holds pickled objects beside its tensors, which would run code and are not loaded, or is truncated "
                           f"within a name: give the published weights, downloaded again, or a file of tensors alone.") from error
        reason = (str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"The weight file {path} is truncated, damaged or no PyTorch weights ({reason}); download it "
                       f"again.") from error
    if inside is not None and isinstance(content, dict) and isinstance(content.get(inside), dict):
        content = content[inside]
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        raise BadInput(f"{path} holds something else than tensors by name.")
    return content


def fill_exactly(model: nn.Module, tensors: dict[str, torch.Tensor], names: dict[str, str], path: Path, what: str) -> None:
    """Loads tensors, under their names in `model`, into it; names: what the file at `path` called them."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unexpected = [names[key] for key in tensors if key not in wanted]
    if missing or unexpected:
        parts = [f"{len(keys)} tensors are {kind} ({some(keys)})" for kind, keys in
                 (("missing", missing), ("unexpected", unexpected)) if keys]
        raise BadInput(f"{path} does not hold the weights of {what}: {', '.join(parts)}.")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise BadInput(f"{names[key]} in {path} has shape {list(tensor.shape)}, {what} has {list(wanted[key].shape)}.")
    model.load_state_dict(tensors)
