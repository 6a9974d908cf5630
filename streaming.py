"""A network larger than the device: its blocks stay in host memory, each comes to the device for its own forward pass, and the
next one is on its way meanwhile. The device has room for two of them, which they take in turn."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from checkpoint import BadInput

ALIGN = 256  # bytes: where in a block's memory a tensor may begin, as torch's own allocator has it


class Queue:
    """What a device does one after the other: a CUDA stream. On a CPU all is done at once, and nothing waits."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self.stream = stream

    def mark(self) -> torch.cuda.Event | None:
        """All that is queued so far, for another queue to wait for."""
        return self.stream.record_event() if self.stream else None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if self.stream:
            self.stream.wait_event(mark)


@contextmanager
def streamed(network: nn.Module, blocks: list[nn.Module], device: torch.device) -> Iterator[nn.Module]:
    """The network, ready to run on `device` for as long as the block lasts, with the weights of `blocks` streamed in the order in
    which they stand. Afterwards everything is in host memory again. On a GPU the copies run beside the computation."""
    cuda = device.type == "cuda"
    compute = Queue(torch.cuda.current_stream(device) if cuda else None)
    copies = Queue(torch.cuda.Stream(device) if cuda else None)
    tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
    inside = {id(tensor) for part in tensors for tensor in part}
    others = [tensor for tensor in (*network.parameters(), *network.buffers()) if id(tensor) not in inside]
    at_home = [tensor.data for tensor in others]

    sizes = [sum(map(padded, part)) for part in tensors]
    memory = getattr(network, "host_memory", None)  # of an earlier time
    if memory is None or memory.numel() != sum(sizes):
        memory = network.host_memory = torch.empty(sum(sizes), dtype=torch.uint8)
    host = memory.split(sizes)  # the tensors of a block behind one another, so that a single copy moves them
    homes = [views(flat, part) for flat, part in zip(host, tensors)]
    for tensor, home in zip(sum(tensors, []), sum(homes, [])):
        if tensor.data_ptr() != home.data_ptr():
            tensor.data = home.copy_(tensor.data)  # and the memory where it was is free again
    if cuda and not memory.is_pinned():
        pin(memory)
    rooms, left, arrived, here = [], [None, None], [None, None], {}  # here: for each block on the device, the room that it is in

    def fetch(i: int) -> None:
        if i in here:
            return
        room = min({0, 1} - {*here.values()})
        copies.wait(left[room])  # the block that was there is computed
        with torch.cuda.stream(copies.stream):  # of None: no other stream
            rooms[room][: sizes[i]].copy_(host[i], non_blocking=True)
        arrived[room] = copies.mark()
        for tensor, there in zip(tensors[i], views(rooms[room], tensors[i])):
            tensor.data = there
        here[i] = room

    def leave(i: int) -> None:
        left[here.pop(i)] = compute.mark()
        for tensor, home in zip(tensors[i], homes[i]):
            tensor.data = home

    def before(i: int) -> None:
        following = (i + 1) % len(blocks)  # after the last block the first one, for the next step
        for other in here.keys() - {i, following}:  # left behind by a pass that failed
            leave(other)
        fetch(i)
        fetch(following)
        compute.wait(arrived[here[i]])

    handles = [handle for i, block in enumerate(blocks) for handle in (
        block.register_forward_pre_hook(lambda module, args, i=i: before(i)),
        block.register_forward_hook(lambda module, args, out, i=i: leave(i)))]
    try:
        rooms += [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in blocks[:2]]
        left[:] = [compute.mark()] * 2  # work that may still read what was in this memory
        for tensor in others:
            tensor.data = tensor.data.to(device)
        yield network
    finally:
        for handle in handles:
            handle.remove()
        for tensor, home in zip(others + sum(tensors, []), at_home + sum(homes, [])):
            tensor.data = home
        if cuda:
            copies.stream.synchronize()


def pin(memory: Tensor) -> None:
    """Page-locks `memory` where it is, for as long as the tensor lives, so that copies run beside computation. pin_memory() would copy
    it, and round its size up to 2^n."""
    cudart, address = torch.cuda.cudart(), memory.data_ptr()
    try:
        torch.cuda.check_error(cudart.cudaHostRegister(address, memory.nbytes, 0))
    except torch.cuda.CudaError as error:
        raise BadInput(f"{memory.nbytes / 1e9:.1f} GB of host memory cannot be pinned for --low-memory ({error}): free as much, or raise "
                       f"the limit that `ulimit -l` shows.") from error
    weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False


def padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGN) * ALIGN


def views(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The bytes of `flat` as tensors of the types and shapes of those given, one behind the other."""
    starts = accumulate(map(padded, tensors), initial=0)
    return [flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, start in zip(tensors, starts)]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks that stream: the transformer's, or those of T5's encoder; a network without either has none."""
    if hasattr(network, "transformer_blocks"):
        return list(network.transformer_blocks)
    return list(network.encoder.block) if hasattr(getattr(network, "encoder", None), "block") else []
