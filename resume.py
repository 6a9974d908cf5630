"""Checkpoints of a run: each rank writes what it holds, and any number of ranks resume from them.

    step-000500/               appears whole: written under another name, then renamed
      rank-00000.safetensors   what rank 0 holds of every tensor, sharded along dimension 0 as FSDP2 does
      state.json               step, positions in the data, settings; world size and sizes of the files
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoint import BadInput, read_json
from distributed import Ranks, local


def bounds(length: int, rank: int, world: int) -> tuple[int, int]:
    """The rows of a tensor with `length` rows that a rank holds: FSDP2 cuts as torch.chunk does."""
    size = -(-length // world)
    return min(rank * size, length), min((rank + 1) * size, length)


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict, ranks: Ranks, keep: int) -> Path:
    """Writes step-N in `folder`, and removes all but the last `keep`. When any rank fails, say because the disk is full, no
    trace of it is left, the older checkpoints survive, and every rank raises."""
    final = folder / f"step-{state['step']:06d}"
    part = folder / f".{final.name}-part"

    def begin() -> None:
        for killed in folder.glob(".step-*-part"):
            shutil.rmtree(killed, ignore_errors=True)
        part.mkdir(parents=True)

    def write() -> None:
        name = part / f"rank-{ranks.rank:05d}.safetensors"
        save_file({key: local(tensor).detach().cpu().contiguous() for key, tensor in tensors.items()}, name)
        with name.open("rb") as file:
            os.fsync(file.fileno())  # on the disk, before the folder has its name

    def finish() -> None:
        files = {file.name: file.stat().st_size for file in sorted(part.glob("rank-*"))}
        rows = {key: tensor.shape[0] if tensor.dim() else 0 for key, tensor in tensors.items()}
        (part / "state.json").write_text(json.dumps({**state, "world": ranks.world, "files": files, "rows": rows}))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        there = sorted(folder.glob("step-*"))
        now = there.index(final) + 1  # later ones are broken, or left by an earlier run
        for old in there[: max(now - keep, 0)] + there[now:]:
            shutil.rmtree(old, ignore_errors=True)

    for work, everybody in ((begin, False), (write, True), (finish, False)):
        problem = ""
        try:
            if everybody or ranks.first:
                work()
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if ranks.any(bool(problem)):  # all have come so far
            if ranks.first:
                shutil.rmtree(part, ignore_errors=True)
            last = last_checkpoint(folder)
            raise BadInput(f"The checkpoint {final} could not be written ({problem or 'on another rank'}); the last whole one is "
                           f"{last[0] if last else 'none'}.")
    return final


def last_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint in `folder` and its state. Broken ones are passed over, and said so."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            return candidate, state_of(candidate)
        except BadInput as error:
            print(f"warning: {error}; falling back to the one before", file=sys.stderr)
    return None


def state_of(candidate: Path) -> dict:
    """The state of a checkpoint, which must be whole."""
    try:
        state = read_json(candidate / "state.json")
        for name, size in state["files"].items():
            if (candidate / name).stat().st_size != size:
                raise BadInput(f"{name} is cut short")
            safe_open(candidate / name, "pt")
        return state
    except (BadInput, OSError, KeyError, SafetensorError) as error:
        raise BadInput(f"{candidate} is not whole ({error})") from error


def agreed_checkpoint(folder: Path, ranks: Ranks) -> tuple[Path, dict] | None:
    """last_checkpoint() as the first rank sees it: ranks that went on from different steps would train nonsense. When any rank does not
    see it whole, every rank raises."""
    found, problem = last_checkpoint(folder) if ranks.first else None, ""
    step = ranks.from_first(found[1]["step"] if found else -1)
    if step >= 0 and not ranks.first:
        chosen = folder / f"step-{step:06d}"
        try:
            found = chosen, state_of(chosen)
        except BadInput as error:
            problem = str(error)
    if ranks.any(bool(problem)):
        raise BadInput(f"Not all ranks can go on from step {step} ({problem or 'another rank says why'}): nodes need an --out on a disk that "
                       f"they share.")
    return found


@torch.no_grad()
def load_checkpoint(folder: Path, state: dict, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fills `tensors` from a checkpoint that any number of ranks wrote: each rank reads the rows that it holds now."""
    files = [safe_open(folder / name, "pt") for name in sorted(state["files"])]
    for key, tensor in tensors.items():
        target, rows = local(tensor), state["rows"].get(key)
        if rows is None:
            raise BadInput(f"{folder} has no {key}: it was written by a run with other settings.")
        if rows == 0 or not isinstance(tensor, DTensor):  # not sharded: the first file has all of it
            target.copy_(files[0].get_tensor(key))
            continue
        low, high = bounds(rows, ranks.rank, ranks.world)
        for old_rank, file in enumerate(files):
            old_low, old_high = bounds(rows, old_rank, state["world"])
            a, b = max(low, old_low), min(high, old_high)
            if a < b:
                target[a - low : b - low] = file.get_slice(key)[a - old_low : b - old_low].to(target.device)
