"""LoRA beside PEFT on the same weights, and files that diffusers and we read from each other."""

import json
import re
from dataclasses import fields

import pytest
import torch
from conftest import VARIANTS, randomize, relative_error
from diffusers import CogVideoXTransformer3DModel
from memory import live
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import their_forward

import distributed
from checkpoint import BadInput
from lora import (METADATA, RELEASED, SWITCH_TARGETS, Adapter, LoRAProduct, check_adapter, dropped, fed, find_adapter, in_rows, inject,
                  lora_state_dict, on_tokens, read_adapter, save_adapter, survivors)
from model import Config, Transformer, use_adapter

# The list in Switch's public code, which PEFT matches against the ends of names.
PEFT_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "proj", "text_proj", "norm1.linear", "norm2.linear", "ff.net.2"]


@pytest.fixture
def pair():
    """Our 5b and diffusers', one set of weights; diffusers' has a PEFT adapter with random B."""
    theirs = randomize(CogVideoXTransformer3DModel(**VARIANTS["5b"]).eval())
    ours = Transformer(Config(**VARIANTS["5b"])).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6.0, lora_dropout=0.1, target_modules=PEFT_TARGETS))
    for key, parameter in theirs.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return ours, theirs.eval()  # PEFT leaves a new adapter's dropout on


def given():
    return dict(x=torch.randn(2, 3, 16, 8, 8), t=torch.randint(0, 1000, (2,)), text=torch.randn(2, 10, 32))


def test_the_same_layers_get_the_same_shapes_as_in_peft(pair):
    ours, theirs = pair
    inject(ours, rank=4, alpha=6.0)
    expected = get_peft_model_state_dict(theirs)
    assert {k: v.shape for k, v in lora_state_dict(ours).items()} == {k: v.shape for k, v in expected.items()}
    assert "patch_embed.proj.lora_A.weight" in expected  # the convolution


@torch.no_grad()
def test_forward_beside_peft(pair):
    ours, theirs = pair
    inject(ours, rank=4, alpha=6.0)
    ours.load_state_dict(get_peft_model_state_dict(theirs), strict=False)
    ours.eval().set_lora_tokens("all", "all")
    inputs = given()
    assert relative_error(ours(**inputs), their_forward(theirs, **inputs)) < 1e-5


def test_gradients_beside_peft(pair):
    ours, theirs = pair
    inject(ours, rank=4, alpha=6.0, dropout=0.0)
    ours.load_state_dict(get_peft_model_state_dict(theirs), strict=False)
    ours.set_lora_tokens("all", "all")
    inputs = given()
    for model, output in ((ours, ours(**inputs)), (theirs, their_forward.__wrapped__(theirs, **inputs))):
        output.square().mean().backward()
    expected = {k.replace(".default", ""): p.grad for k, p in theirs.named_parameters() if ".lora_" in k}
    for key, parameter in ours.named_parameters():
        if ".lora_" in key:
            assert relative_error(parameter.grad, expected[key]) < 1e-4, key
        elif key.rsplit(".", 1)[0] + ".lora_A.weight" in expected:
            assert parameter.grad is None, key


@torch.no_grad()
def test_a_new_lora_changes_nothing_and_dropout_acts_only_in_training():
    ours, inputs = Transformer(Config(**VARIANTS["5b"])).eval(), given()
    before = ours(**inputs)
    inject(ours, rank=4, alpha=6.0, dropout=0.5)
    ours.set_lora_tokens("all", "all")
    assert torch.equal(ours(**inputs), before)
    for key, parameter in ours.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter)
    assert torch.equal(ours(**inputs), ours(**inputs))
    ours.train()
    assert not torch.equal(ours(**inputs), ours(**inputs))


@pytest.mark.parametrize("norm_lora,lora_tokens", [("all", "all"), ("reference", "all"), ("reference", "reference")])
@torch.no_grad()
def test_merged_is_the_same(pair, norm_lora, lora_tokens):
    """What acts on all tokens is folded in, and nothing else."""
    ours, theirs = pair
    keys = set(ours.state_dict())
    inject(ours, rank=4, alpha=6.0)
    adapted = set(ours.state_dict()) - keys
    ours.load_state_dict(get_peft_model_state_dict(theirs), strict=False)
    ours.eval().set_lora_tokens(norm_lora, lora_tokens)
    inputs = given()
    before = ours(**inputs)
    ours.merge_adapter()
    left = {key for key in adapted if (norm_lora if "norm" in key else lora_tokens) == "reference"}
    assert set(ours.state_dict()) == keys | left
    assert (len(left) == 0, len(left) == len(adapted)) == (norm_lora == "all", lora_tokens == "reference")
    assert relative_error(ours(**inputs), before) < 1e-5


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [None, slice(100, 130)])
def test_a_lora_needs_no_more_activations_than_its_layer(dropout, grad, tokens):
    layer, x = torch.nn.Linear(256, 256), torch.randn(2, 500, 256, requires_grad=grad)
    inject(torch.nn.ModuleDict({"to_q": layer}), rank=4, dropout=dropout)
    layer.train()
    with torch.set_grad_enabled(grad):
        peak, kept = live(lambda: on_tokens(layer, x, tokens))
    assert kept < 1.15 * x.nbytes  # its outcome, and what rank 4 or 30 tokens need
    assert peak < (1.3 if dropout and tokens is None else 1.25) * x.nbytes  # with dropout, what it left and where, for a moment


def test_a_block_that_learns_a_lora_keeps_no_more_than_its_backward_pass_needs():
    """As multiples of the sequence: the second norm's input, those of q, k and v, of the norms of q and k, and of the feed-forward (5),
    what attention is given and gives (4), what the GELU is given (4), the outcome (1), and of the reference, a fourteenth, four parts."""
    config = Config(num_attention_heads=4, num_layers=1, use_rotary_positional_embeddings=True)
    block, lengths, temb = Transformer(config).transformer_blocks[0], (20, 40, 500), torch.randn(1, 512)
    inject(block, rank=2, dropout=0.0)
    x = torch.randn(1, sum(lengths), config.dim, requires_grad=True)
    rotary = torch.polar(torch.ones(540, 32), torch.randn(540, 32))
    rotary = torch.view_as_real(rotary).flatten(-2)
    _, kept = live(lambda: block(x, lengths, temb, rotary, None, None, None))
    assert kept / x.nbytes < 15  # 22 as autograd would have it


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_backward_pass_by_hand_is_the_derivative(gelu, bias, grad):
    layer = torch.nn.Linear(6, 7, bias=bias).double()
    inject(torch.nn.ModuleDict({"to_q": layer}), rank=3, alpha=2.0, dropout=0.0)
    x, A, B = torch.randn(2, 5, 6).double().requires_grad_(grad), layer.lora_A.weight, layer.lora_B.weight
    torch.nn.init.normal_(B)
    act = (lambda x: torch.nn.functional.gelu(x, approximate="tanh")) if gelu else (lambda x: x)
    by_hand = lambda x: layer.base(act(x)) + 2 / 3 * act(x) @ A.T @ B.T
    assert relative_error(layer(x, gelu), by_hand(x)) < 1e-12
    given = [x, A, B] if grad else [A, B]
    ours, theirs = (torch.autograd.grad(forward(x).cos().sum(), given) for forward in (lambda x: layer(x, gelu), by_hand))
    assert all(relative_error(one, other) < 1e-12 for one, other in zip(ours, theirs))


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [0.5, 0.1, 1 / 3, 1e-3, 1 - 2**-16, 1.0])
def test_dropout_drops_each_element_by_itself(p, seed):
    n = 200_001  # not a multiple of four
    x = torch.ones(3, n // 3)
    kept = survivors(x, p, draws(seed))
    flat, share = kept.flatten().double(), 1 - p
    assert abs(flat.mean() - share) < 6 * (p * share / n) ** 0.5 + 2**-17
    for lag in (1, 2, 3, 4):  # neighbours share a random number
        both = (flat[:-lag] * flat[lag:]).mean()
        assert abs(both - share**2) < 6 * (3 * share**2 * (1 - share**2) / n) ** 0.5 + 2**-16
    for lane in range(4):
        assert abs(flat[lane::4].mean() - share) < 6 * (4 * p * share / n) ** 0.5 + 2**-17
    assert torch.equal(kept, survivors(x.t().contiguous().t(), p, draws(seed))) and torch.equal(dropped(x, p, kept) != 0, kept)
    if 1e-3 <= p <= 0.5:
        assert not torch.equal(kept, survivors(x, p, draws(seed + 1)))
        assert dropped(x, p, kept).max() == pytest.approx(1 / share, rel=1e-4)


def test_dropout_of_nothing_and_of_all(seed):
    x = torch.randn(4, 5)
    assert survivors(x, 0.0, draws(seed)) is None and dropped(x, 0.0, None) is x
    assert not dropped(x, 1.0, survivors(x, 1.0, draws(seed))).any()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_lora_some_rows_at_a_time_is_that_of_all(p, gelu, seed):
    """A layer so wide that its rows come in several pieces, beside what autograd makes of the same dropout."""
    x, A, B = torch.randn(7, 2**20).div(2**10).requires_grad_(), torch.randn(2, 2**20).requires_grad_(), torch.randn(3, 2).requires_grad_()
    W = torch.randn(3, 2**20)
    torch.manual_seed(seed)
    ours = LoRAProduct.apply(x, W, None, A, B, 0.5, gelu, p)
    torch.manual_seed(seed)
    pieces = list(in_rows(x, p, int(torch.randint(2**62, ())) if p else 0))
    assert [rows.start for rows, _ in pieces] == [0, 2, 4, 6]
    g = fed(x, gelu)
    left = torch.cat([kept for _, kept in pieces]) / (1 - round(p * 2**16) / 2**16) * g if p else g
    by_hand = g @ W.t() + 0.5 * left @ A.t() @ B.t()
    assert relative_error(ours, by_hand) < 1e-5
    grads = [torch.autograd.grad(y.cos().sum(), (x, A, B)) for y in (ours, by_hand)]
    assert all(relative_error(one, other) < 1e-4 for one, other in zip(*grads))


def test_the_gradient_of_many_pieces_is_not_added_up_in_bfloat16():
    x, A = torch.rand(192, 2**18).bfloat16(), torch.randn(1, 2**18).bfloat16().requires_grad_()  # 24 pieces, all of one sign
    ones = torch.ones(1, 1).bfloat16()
    y = LoRAProduct.apply(x, torch.zeros(1, 2**18).bfloat16(), None, A, ones, 1.0, False, 0.0)
    y.sum().backward()
    assert relative_error(A.grad[0].float(), x.float().sum(0)) < 2**-8


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("lies", [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
def test_the_backward_pass_with_dropout_is_the_derivative(gelu, lies, seed):
    layer = torch.nn.Linear(6, 7).double()
    inject(torch.nn.ModuleDict({"to_q": layer}), rank=3, alpha=2.0, dropout=0.4)
    torch.nn.init.normal_(layer.lora_B.weight)
    x, kept = lies(torch.randn(1, 5, 6).double()).requires_grad_(), []

    def forward(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed)  # what is dropped follows from it
        return torch.func.functional_call(layer, {"lora_A.weight": A, "lora_B.weight": B}, (x, gelu))

    assert torch.autograd.gradcheck(forward, (x, layer.lora_A.weight, layer.lora_B.weight))
    for i in range(200):  # on average it is what it is without dropout
        torch.manual_seed(seed + i)
        kept.append(layer(x, gelu))
    assert not torch.equal(kept[0], kept[1])
    assert relative_error(torch.stack(kept).mean(0), layer.eval()(x, gelu)) < 0.2


@pytest.mark.parametrize("tokens", [slice(0, 7), slice(3, 5)])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(tokens, seed):
    layer, x = torch.nn.Linear(6, 10), torch.randn(2, 7, 6, requires_grad=True)
    inject(torch.nn.ModuleDict({"to_q": layer}), rank=3, alpha=2.0, dropout=0.4)
    torch.nn.init.normal_(layer.lora_B.weight)
    A, B, somebody_else, grads = layer.lora_A.weight, layer.lora_B.weight, torch.randn(5), []

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        update = 2.0 / 3 * torch.nn.functional.dropout(x[:, tokens], 0.4) @ A.T @ B.T
        return layer.base(x) + torch.nn.functional.pad(update, (0, 0, tokens.start, 7 - tokens.stop))

    for forward in (layer.train() and (lambda x: on_tokens(layer, x, tokens)), by_hand):
        torch.manual_seed(seed)
        loss = forward(x).square().sum()
        somebody_else.normal_()
        grads.append(torch.autograd.grad(loss, (x, A, B)))
    assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in zip(*grads))


@pytest.mark.parametrize("keep_attention", [False, True])
def test_recomputed_blocks_drop_the_same(keep_attention, seed):
    model, inputs = Transformer(Config(**VARIANTS["5b"])), given()
    randomize(model)
    inject(model, rank=4, dropout=0.3)
    grads = []
    for recompute in (False, True):
        if recompute:
            distributed.recompute_blocks(list(model.transformer_blocks), keep_attention)
        torch.manual_seed(seed)
        loss = model.train()(**inputs).square().mean()
        grads.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.equal(one, other) for one, other in zip(*grads))


# --- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_our_file_in_diffusers_and_theirs_in_ours(pair, tmp_path):
    from diffusers import CogVideoXPipeline

    ours, theirs = pair
    adapter, inputs = Adapter(rank=4, alpha=6.0, norm_lora="all"), given()
    inject(ours, adapter.rank, adapter.alpha)
    ours.load_state_dict(get_peft_model_state_dict(theirs), strict=False)
    ours.eval().set_lora_tokens("all", "all")
    save_adapter(ours, tmp_path / "ours", adapter)
    expected = ours(**inputs)

    base = CogVideoXTransformer3DModel(**VARIANTS["5b"]).eval()
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if ".lora_" not in k})
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=base, scheduler=None)
    pipeline.load_lora_weights(tmp_path / "ours")
    assert relative_error(their_forward(base, **inputs), expected) < 1e-5

    CogVideoXPipeline.save_lora_weights(tmp_path / "theirs", get_peft_model_state_dict(theirs),
                                        transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict())
    fresh = Transformer(ours.config).eval()
    fresh.load_state_dict({k: v for k, v in ours.state_dict().items() if ".lora_" not in k})
    settings = use_adapter(fresh, find_adapter(str(tmp_path / "theirs")))
    fresh.eval()
    assert (settings.rank, settings.alpha, settings.norm_lora, settings.cls) == (4, 6.0, "all", "pieces")
    assert relative_error(fresh(**inputs), expected) < 1e-5


def test_our_settings_travel_in_the_metadata(tmp_path):
    ours = Transformer(Config(**VARIANTS["5b"]))
    adapter = Adapter(rank=2, alpha=3.0, dropout=0.2, norm_lora="reference", lora_tokens="reference", cls="none")
    inject(ours, adapter.rank, adapter.alpha)
    save_adapter(ours, tmp_path, adapter)
    file = find_adapter(str(tmp_path))
    assert read_adapter(file) == adapter
    fresh = Transformer(ours.config)
    assert use_adapter(fresh, file) == adapter
    assert fresh.lora_tokens == "reference"
    assert {m.norm_lora for m in fresh.modules() if hasattr(m, "norm_lora")} == {"reference"}
    with safe_open(file, "pt") as tensors:
        metadata = json.loads(tensors.metadata()[METADATA])
    assert metadata["transformer.r"] == 2 and metadata["transformer.lora_alpha"] == 3.0


def test_a_file_that_says_nothing_is_taken_for_the_released_adapter(tmp_path):
    ours = Transformer(Config(**VARIANTS["5b"]))
    inject(ours, rank=8)
    name = tmp_path / "pytorch_lora_weights_transformer.safetensors"
    save_file({"transformer." + k: v for k, v in lora_state_dict(ours).items()}, name)
    (tmp_path / "optimizer.bin").write_bytes(b"a pickle that nobody opens")
    adapter = read_adapter(find_adapter(str(tmp_path)))
    assert (adapter.rank, adapter.alpha) == (8, 64.0)
    assert {key: getattr(adapter, key) for key in RELEASED} == RELEASED
    assert RELEASED == {"alpha": 64.0, "norm_lora": "all", "lora_tokens": "all", "cls": "pieces"}


@pytest.mark.parametrize("says,phrase", [
    ("[]", "is no JSON object"), ("null", "is no JSON object"), ("{", "is no JSON object"),
    ({"lora_alpha": "x"}, "says alpha = 'x', and it should be a number"), ({"lora_dropout": None}, "dropout = None"),
    ({"norm_lora": "foo"}, "norm_lora = 'foo', and it should be reference or all"), ({"cls": 7}, "cls = 7, and it should be token or")])
def test_metadata_that_cannot_be_is_refused(says, phrase, tmp_path):
    if isinstance(says, dict):
        ours = {field.name for field in fields(Adapter)}
        says = json.dumps({("nanos2v." if name in ours else "transformer.") + name: value for name, value in says.items()})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"transformer.proj_out.lora_{letter}.weight": torch.zeros(2, 2) for letter in "AB"}, file, {METADATA: says})
    with pytest.raises(BadInput, match=re.escape(phrase)):
        read_adapter(file)


def file_with(tmp_path, change):
    """A saved adapter whose tensors were changed."""
    ours = Transformer(Config(**VARIANTS["5b"]))
    inject(ours, rank=4)
    save_adapter(ours, tmp_path, Adapter(rank=4))
    file = find_adapter(str(tmp_path))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("change,phrase", [
    (lambda t: t.pop("transformer.patch_embed.proj.lora_B.weight"), "no lora_B for patch_embed.proj"),
    (lambda t: t.update({"transformer.nowhere.lora_A.weight": torch.zeros(4, 8)}), "another base: this one has no nowhere"),
    (lambda t: t.update({"transformer.proj_in.weight": torch.zeros(4, 8)}), "another base"),
    (lambda t: t.update({"transformer.patch_embed.proj.lora_A.weight": torch.zeros(4, 32, 2, 2)}), "lora_A has shape"),
    (lambda t: t.update({"transformer.patch_embed.proj.lora_A.weight": torch.zeros(4, 16, 3, 3)}), "lora_A has shape"),
    (lambda t: t.update({"transformer.patch_embed.text_proj.lora_B.weight": torch.zeros(99, 4)}), "lora_B has shape"),
])
def test_an_adapter_that_does_not_fit_is_refused_by_name(change, phrase, tmp_path):
    file = file_with(tmp_path, change)
    with torch.device("meta"):
        base = Transformer(Config(**VARIANTS["5b"]))
    with pytest.raises(BadInput, match=phrase):
        check_adapter(base, file)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(BadInput, match="No adapter at"):
        find_adapter(str(tmp_path))
    save_file({"weight": torch.zeros(2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(BadInput, match="holds no LoRA"):
        read_adapter(find_adapter(str(tmp_path)))
    with pytest.raises(ValueError, match="No linear layer"):
        inject(torch.nn.Sequential(torch.nn.ReLU()), names=SWITCH_TARGETS)


def test_mixed_ranks_are_refused(tmp_path):
    file = file_with(tmp_path, lambda t: t.update({
        "transformer.patch_embed.text_proj.lora_A.weight": torch.zeros(2, 32),
        "transformer.patch_embed.text_proj.lora_B.weight": torch.zeros(128, 2)}))
    with pytest.raises(BadInput, match="mixes ranks"):
        read_adapter(file)
