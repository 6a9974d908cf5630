"""Blocks that stream compute what blocks that stay compute, and no more than two of them are on the device."""

from pathlib import Path

import pytest
import torch
from cli import FOX, SMALL, frames_of, run
from conftest import TINY, randomize

from model import Config, Transformer
from streaming import blocks_of, streamed


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_streamed_is_plain_with_two_blocks_at_a_time(layers, seed):
    model = randomize(Transformer(Config(**{**TINY, "num_layers": layers}))).eval()
    inputs = torch.randn(2, 3, 16, 12, 18), torch.tensor([5, 900]), torch.randn(2, 10, 32)
    homes = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    inside = {name: pointer for name, pointer in homes.items() if name.startswith("transformer_blocks.")}

    def there() -> set[str]:
        return {name.split(".")[1] for name, tensor in model.named_parameters() if name in inside and tensor.data_ptr() != inside[name]}

    seen = []
    for block in model.transformer_blocks:
        block.norm2.register_forward_pre_hook(lambda *_: seen.append(there()))
    with torch.no_grad():
        plain = model(*inputs)
        seen.clear()
        with streamed(model, blocks_of(model), torch.device("cpu")):
            assert all(torch.equal(model(*inputs), plain) for _ in range(2))
    assert len(seen) == 2 * layers and max(map(len, seen)) == min(layers, 2)
    assert all({str(i % layers), str((i + 1) % layers)} == found for i, found in enumerate(seen))
    assert homes == {name: tensor.data_ptr() for name, tensor in model.named_parameters()}  # all is where it was
    with torch.no_grad():
        assert torch.equal(model(*inputs), plain)


def test_what_fails_in_between_leaves_everything_at_home():
    model = Transformer(Config(**TINY)).eval()
    homes = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    model.transformer_blocks[1].norm1.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), streamed(model, blocks_of(model), torch.device("cpu")), torch.no_grad():
        model(torch.randn(1, 3, 16, 12, 18), torch.tensor([5]), torch.randn(1, 10, 32))
    assert homes == {name: tensor.data_ptr() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("where", ["on the way to the device", "in a block"])
def test_a_pass_that_ran_out_of_memory_can_be_done_again(where, monkeypatch):
    model = randomize(Transformer(Config(**{**TINY, "num_layers": 4}))).eval()
    inputs, fresh, made = (torch.randn(1, 3, 16, 12, 18), torch.tensor([5]), torch.randn(1, 10, 32)), torch.empty_like, []

    def fail_once(*_):
        if "failed" not in made:
            made.append("failed")
            raise torch.OutOfMemoryError("no room")

    def full(*args, **kwargs):
        made.append("tensor")
        if len(made) == 60:  # in the middle of the third block
            fail_once()
        return fresh(*args, **kwargs)

    with torch.no_grad():
        plain = model(*inputs)
        if where == "in a block":
            model.transformer_blocks[2].ff.register_forward_pre_hook(fail_once)
        else:
            monkeypatch.setattr(torch, "empty_like", full)
        homes = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
        with streamed(model, blocks_of(model), torch.device("cpu")):
            with pytest.raises(torch.OutOfMemoryError):
                model(*inputs)
            assert torch.equal(model(*inputs), plain)
        assert homes == {name: tensor.data_ptr() for name, tensor in model.named_parameters()}


def test_sampling_with_low_memory_gives_the_same_video(here):
    for name, more in (("plain", "--tile"), ("streamed", "--low-memory")):
        assert run(f"{FOX} {SMALL} --adapter toy/switch --out {name}.gif {more}") == 0
    assert (frames_of(Path("plain.gif")) == frames_of(Path("streamed.gif"))).all()
