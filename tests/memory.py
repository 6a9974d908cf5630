"""Bytes that live: what a function holds at its worst, counted tensor by tensor, also on the device "meta", where none exist."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def tensors(x: object) -> list[torch.Tensor]:
    """Those among an operation's arguments or results."""  # tree_leaves, which looks for containers of any kind, is slow
    return [x] if isinstance(x, torch.Tensor) else [y for each in x for y in tensors(each)] if isinstance(x, (list, tuple)) else []


class Live(TorchDispatchMode):
    """Counts the memory of tensors that operations inside it make, for as long as anybody holds it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tensors([*args, *(kwargs or {}).values()])}
        out = op(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if id(storage := tensor.untyped_storage()) not in given and id(storage) not in self.held:
                self.now += storage.nbytes()
                self.held[id(storage)] = weakref.ref(storage, lambda _, key=id(storage), size=storage.nbytes(): self.free(key, size))
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        del self.held[key]
        self.now -= size


def live(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that are made by run(): at the peak, and when it has returned and its result is still held."""
    with Live() as counted:
        out = run()  # noqa: F841 (held)
        return counted.peak, counted.now
