"""A network larger than the device: its blocks stay in host memory, each comes to the device for its own forward pass, and the
next one is on its way meanwhile. Two blocks are there at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def streamed(network: nn.Module, blocks: list[nn.Module], device: torch.device) -> Iterator[nn.Module]:
    """The network, ready to run on `device` for as long as the block lasts, with the weights of `blocks` streamed in the order in
    which they stand. Afterwards everything is in host memory again. On a GPU the copies run beside the computation."""
    cuda = device.type == "cuda"
    tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
    # Copies that run beside something else need memory that the operating system cannot move.
    host = [[tensor.data.pin_memory() if cuda else tensor.data for tensor in part] for part in tensors]
    inside = {id(tensor) for part in tensors for tensor in part}
    others = [tensor for tensor in (*network.parameters(), *network.buffers()) if id(tensor) not in inside]
    at_home = [tensor.data for tensor in others]
    side, ready, here = torch.cuda.Stream(device) if cuda else None, {}, set()

    def fetch(i: int) -> None:
        if i in here:
            return
        if cuda:
            side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # of None: no other stream
            for tensor, home in zip(tensors[i], host[i]):
                tensor.data = torch.empty_like(home, device=device).copy_(home, non_blocking=True)
            if cuda:
                ready[i] = side.record_event()
        here.add(i)

    def before(i: int) -> None:
        for other in here - {i, (i + 1) % len(blocks)}:  # left behind by a pass that failed
            after(other)
        fetch(i)
        fetch((i + 1) % len(blocks))  # after the last block the first one, for the next step
        if cuda:
            torch.cuda.current_stream(device).wait_event(ready[i])

    def after(i: int) -> None:
        here.discard(i)
        for tensor, home in zip(tensors[i], host[i]):
            if cuda:  # its memory is free for others only when the block has been computed
                tensor.data.record_stream(torch.cuda.current_stream(device))
            tensor.data = home

    handles = [handle for i, block in enumerate(blocks) for handle in (
        block.register_forward_pre_hook(lambda module, args, i=i: before(i)),
        block.register_forward_hook(lambda module, args, out, i=i: after(i)))]
    try:
        for tensor in others:
            tensor.data = tensor.data.to(device)
        yield network
    finally:
        for handle in handles:
            handle.remove()
        for tensor, home in zip(others, at_home):
            tensor.data = home
        for i in list(here):
            after(i)
        for tensor, home in zip(sum(tensors, []), sum(host, [])):  # also of a block whose way here failed
            tensor.data = home


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks that stream: the transformer's, or those of T5's encoder; a network without either has none."""
    if hasattr(network, "transformer_blocks"):
        return list(network.transformer_blocks)
    return list(network.encoder.block) if hasattr(getattr(network, "encoder", None), "block") else []
