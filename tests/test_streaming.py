"""Blocks that stream compute what blocks that stay compute, and no more than two of them are on the device."""

from pathlib import Path

import pytest
import torch
from cli import FOX, SMALL, frames_of, run
from conftest import TINY, randomize
from memory import live
from torch import nn

import streaming
from bench_files import MODELS
from model import Config, Transformer
from streaming import ALIGN, blocks_of, padded, streamed, views

CPU = torch.device("cpu")


def pointers(network: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


@torch.no_grad()
def test_what_low_memory_keeps_of_the_5b_at_the_official_size():
    """Counted: Switch's two branches at 49x480x720 in bfloat16, two blocks, and what is not in blocks."""
    with torch.device("meta"):
        model = Transformer(Config(**MODELS["5b"] | {"num_layers": 2})).bfloat16().eval()
        rotary = torch.empty(14 * 30 * 45, 64)
        x, text, reference = (torch.empty(2, *shape).bfloat16() for shape in ((13, 16, 60, 90), (226, 4096), (16, 60, 90)))
        model.rotary = lambda *_: rotary
        for block in model.transformer_blocks:
            block.attn1.attend = lambda q, *_: torch.empty_like(q)  # as a kernel that holds no more than its result
        weights = sum(p.nbytes for p in model.parameters())
        assert 2.4e9 < weights + live(lambda: model(x, torch.zeros(2), text, reference=reference))[0] < 2.5e9


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_streamed_is_plain_with_two_blocks_at_a_time(layers):
    model = randomize(Transformer(Config(**{**TINY, "num_layers": layers}))).eval()
    inputs, homes, seen = (torch.randn(2, 3, 16, 12, 18), torch.tensor([5, 900]), torch.randn(2, 10, 32)), {}, []

    def there() -> set[int]:
        return {int(name.split(".")[1]) for name, pointer in pointers(model).items()
                if name.startswith("transformer_blocks.") and pointer != homes[name]}

    with torch.no_grad():
        plain = model(*inputs)
        with streamed(model, blocks_of(model), CPU):
            homes.update(pointers(model))
            for block in model.transformer_blocks:
                block.norm2.register_forward_pre_hook(lambda *_: seen.append(there()))
            assert all(torch.equal(model(*inputs), plain) for _ in range(2))
        assert seen == [{i % layers, (i + 1) % layers} for i in range(2 * layers)]
        assert homes == pointers(model)  # all is at home again
        seen.clear()
        assert torch.equal(model(*inputs), plain) and seen == layers * [set()]


def test_the_second_time_no_memory_is_taken():
    """Each video of a list streams the same network."""
    network = nn.Sequential(*(nn.Linear(200, 200) for _ in range(4)))
    whole, x = sum(p.nbytes for p in network.parameters()), torch.randn(3, 200)
    plain, taken = network(x), []

    def stream() -> None:
        with streamed(network, list(network), CPU):
            assert torch.equal(network(x), plain)

    for _ in range(3):
        taken.append(live(stream)[0])
    assert taken[0] > 1.4 * whole and all(again < 0.6 * whole for again in taken[1:])  # then room for two of the four blocks
    with torch.no_grad():
        network[2].weight.data = torch.randn(200, 200)  # weights that were changed in between are not overlooked
    plain = network(x)
    stream()


class Odd(nn.Module):
    """Adds up tensors of any type and shape."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"tensor_{i}", tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum((tensor.double().sum() for tensor in self.buffers()), torch.zeros(()))


def test_blocks_that_differ_in_tensors_types_and_shapes():
    odd = [torch.randn(3, 5), torch.randn(()).bfloat16(), torch.arange(7, dtype=torch.uint8), torch.rand(2, 2, 33).double(),
           torch.tensor([True, False, True]), torch.empty(0, 4), torch.randn(130).half()]
    network = nn.Sequential(Odd(*odd), nn.Linear(6, 6), Odd(*reversed(odd)), Odd(odd[0]), nn.Identity())
    x = torch.randn(4, 6)
    flat = torch.zeros(sum(map(padded, odd)), dtype=torch.uint8)
    for tensor, view in zip(odd, views(flat, odd), strict=True):
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert tensor.numel() == 0 or (view.data_ptr() - flat.data_ptr()) % ALIGN == 0
    with torch.no_grad():
        plain = network(x)
        with streamed(network, list(network), CPU):
            assert torch.equal(network(x), plain) and torch.equal(network(x), plain)
        assert torch.equal(network(x), plain)


def test_a_room_is_filled_when_its_last_block_is_computed_and_used_when_it_is_filled(monkeypatch):
    """On a GPU both queues run behind the program that fills them: what they wait for keeps them in order."""
    model, queues, ran, waited = Transformer(Config(**{**TINY, "num_layers": 3})).eval(), [], [], []

    class Watched(streaming.Queue):
        """Marks count what was done: passes of a block on one queue, copies on the other."""

        def __init__(self, stream):
            super().__init__(stream)
            queues.append(self)
            self.copied = self.heard = 0

        def mark(self) -> int:
            if self is queues[0]:
                return len(ran)
            assert self.heard >= self.copied - 1  # two blocks before this one have left the room
            self.copied += 1
            return self.copied

        def wait(self, mark: int) -> None:
            self.heard = mark

    monkeypatch.setattr(streaming, "Queue", Watched)
    for i, block in enumerate(model.transformer_blocks):
        block.norm1.register_forward_pre_hook(lambda *_: waited.append(queues[0].heard))
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad(), streamed(model, blocks_of(model), CPU):
        for _ in range(3):
            model(torch.randn(1, 3, 16, 12, 18), torch.tensor([5]), torch.randn(1, 10, 32))
    assert ran == 3 * [0, 1, 2] and waited == list(range(1, 10))  # each for its own copy
    assert queues[1].copied == 10  # the first block of a next pass is there already


def test_what_fails_in_between_leaves_everything_at_home():
    model, homes = Transformer(Config(**TINY)).eval(), {}
    model.transformer_blocks[1].norm1.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), streamed(model, blocks_of(model), CPU), torch.no_grad():
        homes = pointers(model)
        model(torch.randn(1, 3, 16, 12, 18), torch.tensor([5]), torch.randn(1, 10, 32))
    assert homes == pointers(model)


@pytest.mark.parametrize("where", ["on the way to the device", "in a block"])
def test_a_pass_that_ran_out_of_memory_can_be_done_again(where, monkeypatch):
    model = randomize(Transformer(Config(**{**TINY, "num_layers": 4}))).eval()
    inputs, arranged, calls = (torch.randn(1, 3, 16, 12, 18), torch.tensor([5]), torch.randn(1, 10, 32)), streaming.views, []

    def fail_once(*_):
        calls.append("call")
        if len(calls) == (3 if where == "on the way to the device" else 1):
            raise torch.OutOfMemoryError("no room")

    with torch.no_grad():
        plain = model(*inputs)
        with streamed(model, blocks_of(model), CPU):
            homes = pointers(model)
            if where == "in a block":
                model.transformer_blocks[2].ff.register_forward_pre_hook(fail_once)
            else:
                monkeypatch.setattr(streaming, "views", lambda *given: fail_once() or arranged(*given))
            with pytest.raises(torch.OutOfMemoryError):
                model(*inputs)
            assert torch.equal(model(*inputs), plain)
        assert homes == pointers(model)


def test_sampling_with_low_memory_gives_the_same_video(here):
    for name, more in (("plain", "--tile"), ("streamed", "--low-memory")):
        assert run(f"{FOX} {SMALL} --adapter toy/switch --out {name}.gif {more}") == 0
    assert (frames_of(Path("plain.gif")) == frames_of(Path("streamed.gif"))).all()
