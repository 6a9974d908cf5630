"""The transformer beside diffusers' on the same random weights; Switch's and SUGAR's conditioning beside what they reduce to."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, VARIANTS, randomize, relative_error
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

import attention
import model as model_module
from attention import selective_mask
from lora import inject
from model import AdaLayerNormZero, Config, Transformer, load_transformer, save_transformer

SUGAR = dict(dino_dim=24, clip_dim=40, dino_tokens=5, clip_tokens=7)
REAL = dict(num_attention_heads=48, num_layers=42, sample_height=60, sample_width=90, sample_frames=49)
OFFICIAL = {  # section 4 of the design: the sizes of the five checkpoints
    "2b": {},
    "5b": {**REAL, "use_rotary_positional_embeddings": True},
    "5b-I2V": {**REAL, "in_channels": 32, "use_rotary_positional_embeddings": True,
               "use_learned_positional_embeddings": True},
    "1.5-5B": {**REAL, "use_rotary_positional_embeddings": True, "sample_height": 300, "sample_width": 300,
               "sample_frames": 81, "patch_size_t": 2, "patch_bias": False},
    "1.5-5B-I2V": {**REAL, "in_channels": 32, "ofs_embed_dim": 512, "use_rotary_positional_embeddings": True,
                   "sample_height": 300, "sample_width": 300, "sample_frames": 81, "patch_size_t": 2, "patch_bias": False},
}


def pair(config):
    theirs = randomize(CogVideoXTransformer3DModel(**config).eval())
    ours = Transformer(Config(**config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@torch.no_grad()
def their_forward(theirs, x, t, text):
    """diffusers' forward pass with the positions and the ofs value that its pipelines prepare."""
    pipeline, config, rotary = SimpleNamespace(vae_scale_factor_spatial=8, transformer=theirs), theirs.config, None
    if config.use_rotary_positional_embeddings:
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipeline, x.shape[3] * 8, x.shape[4] * 8, x.shape[1], "cpu")
    ofs = torch.full((1,), 2.0, dtype=x.dtype) if config.ofs_embed_dim else None
    return theirs(x, text, t, ofs=ofs, image_rotary_emb=rotary).sample


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_forward_beside_diffusers(name):
    config = VARIANTS[name]
    ours, theirs = pair(config)
    sizes = [(3, 12, 18)] if name == "5b-I2V" else [(3, 12, 18), (5, 8, 20), (1, 30, 10)]
    for frames, height, width in sizes:
        frames += frames % config.get("patch_size_t", 1)
        x, text = torch.randn(2, frames, config.get("in_channels", 16), height, width), torch.randn(2, 10, 32)
        t = torch.randint(0, 1000, (2,))
        assert relative_error(ours(x, t, text), their_forward(theirs, x, t, text)) < 1e-5, (frames, height, width)


@torch.no_grad()
def test_forward_beside_diffusers_at_the_real_width():
    config = {**OFFICIAL["5b"], "num_layers": 1}
    ours, theirs = pair(config)
    x, text, t = torch.randn(2, 2, 16, 8, 12), torch.randn(2, 226, 4096), torch.tensor([999, 3])
    assert relative_error(ours(x, t, text), their_forward(theirs, x, t, text)) < 1e-5


@pytest.mark.parametrize("name", OFFICIAL)
def test_keys_and_shapes_at_the_real_sizes(name):
    with torch.device("meta"):
        ours, theirs = Transformer(Config(**OFFICIAL[name])), CogVideoXTransformer3DModel(**OFFICIAL[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_learned_positions_refuse_another_size():
    ours = Transformer(Config(**VARIANTS["5b-I2V"]))
    with pytest.raises(ValueError, match="learned"):
        ours(torch.randn(1, 3, 32, 8, 8), torch.tensor([1]), torch.randn(1, 10, 32))


# --- Switch -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_reference_is_a_frame_in_front_of_the_video():
    """Without an adapter, the reference (rotary frame 0, the video's adaptive norm) is just what a first frame would be."""
    ours, theirs = pair(VARIANTS["5b"])
    x, reference, text = torch.randn(2, 3, 16, 12, 18), torch.randn(2, 16, 12, 18), torch.randn(2, 10, 32)
    t = torch.tensor([700, 20])
    longer = their_forward(theirs, torch.cat([reference[:, None], x], dim=1), t, text)
    assert relative_error(ours(x, t, text, reference=reference), longer[:, 1:]) < 1e-5


@torch.no_grad()
def test_reference_tokens_that_are_not_kept_are_as_good_as_removed():
    ours = randomize(Transformer(Config(**VARIANTS["5b"])).eval())
    x, reference, text = torch.randn(3, 3, 16, 8, 8), torch.randn(3, 16, 8, 8), torch.randn(3, 10, 32)
    t, keep = torch.randint(0, 1000, (3,)), torch.tensor([True, False, True])[:, None].expand(3, 16)
    mixed = ours(x, t, text, reference=reference, keep_reference=keep)
    without = ours(x, t, text)
    whole = ours(x, t, text, reference=reference)
    assert relative_error(mixed[1], without[1]) < 1e-5
    assert relative_error(mixed[[0, 2]], whole[[0, 2]]) < 1e-5 and relative_error(mixed[1], whole[1]) > 1e-4


def adapted(config=VARIANTS["5b"], only=None):
    """A transformer with a LoRA that does something; `only` these layers."""
    ours = randomize(Transformer(Config(**config)).eval())
    inject(ours, rank=4, alpha=8.0, **({"names": only} if only else {}))
    for key, parameter in ours.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return ours


@torch.no_grad()
def test_norm_lora_reference_leaves_text_and_video_to_the_base_norm():
    norm = AdaLayerNormZero(Config(**TINY)).eval()
    inject(norm, rank=4, alpha=8.0, names=("linear",))
    torch.nn.init.normal_(norm.linear.lora_B.weight)
    text, reference, video, temb = torch.randn(2, 4, 128), torch.randn(2, 3, 128), torch.randn(2, 6, 128), torch.randn(2, 64)
    act = torch.nn.functional.silu(temb)
    base = act @ norm.linear.weight.T + norm.linear.bias
    full = base + 8.0 / 4 * act @ norm.linear.lora_A.weight.T @ norm.linear.lora_B.weight.T

    def modulated(x, triple):
        shift, scale, gate = (part[:, None] for part in triple)
        return torch.nn.functional.layer_norm(x, (128,)) * (1 + scale) + shift, gate

    for mode, others in (("reference", base), ("all", full)):
        norm.norm_lora = mode
        x, gates = norm(torch.cat([text, reference, video], dim=1), (4, 3, 6), temb)
        wanted = [modulated(text, others.chunk(6, 1)[3:]), modulated(reference, full.chunk(6, 1)[:3]),
                  modulated(video, others.chunk(6, 1)[:3])]
        assert torch.allclose(x, torch.cat([y for y, _ in wanted], dim=1), atol=1e-5)
        assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, (_, theirs) in zip(gates, wanted))


@torch.no_grad()
def test_without_a_reference_an_adapter_for_reference_tokens_changes_nothing():
    ours = adapted()
    x, t, text = torch.randn(2, 3, 16, 8, 8), torch.tensor([5, 900]), torch.randn(2, 10, 32)
    plain = Transformer(ours.config).eval()
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if ".lora_" not in k})
    ours.set_lora_tokens(norm_lora="reference", lora_tokens="reference")
    assert torch.allclose(ours(x, t, text), plain(x, t, text), atol=1e-5)
    ours.set_lora_tokens(norm_lora="reference", lora_tokens="all")
    assert relative_error(ours(x, t, text), plain(x, t, text)) > 0.01


@torch.no_grad()
def test_lora_tokens_reference_still_shows_the_reference_to_the_video():
    ours = adapted()
    x, t, text = torch.randn(1, 3, 16, 8, 8), torch.tensor([500]), torch.randn(1, 10, 32)
    ours.set_lora_tokens("reference", "reference")
    one, two = (ours(x, t, text, reference=torch.randn(1, 16, 8, 8)) for _ in range(2))
    assert relative_error(one, two) > 1e-4


# --- SUGAR ------------------------------------------------------------------------------------------------------------


def sugar(design, base="5b", **changes):
    return randomize(Transformer(Config(**{**VARIANTS[base], **SUGAR, "design": design, **changes})).eval(), std=0.1)


def inputs(base="5b", batch=2):
    frames = 4 if base.startswith("1.5") else 3
    return dict(x=torch.randn(batch, frames, 16, 12, 18), t=torch.randint(0, 1000, (batch,)), text=torch.randn(batch, 10, 32))


@pytest.mark.parametrize("base", ["2b", "5b", "1.5-5B"])
@torch.no_grad()
def test_design_a_ignores_the_image_exactly_and_is_the_text_to_video_model(base):
    ours, given = sugar("a", base), inputs(base)
    images = [dict(dino=10 * torch.randn(2, 5, 24), clip=10 * torch.randn(2, 7, 40)) for _ in range(2)]
    assert torch.equal(ours(**given, **images[0]), ours(**given, **images[1]))
    theirs = CogVideoXTransformer3DModel(**VARIANTS[base]).eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()})
    assert relative_error(ours(**given, **images[0]), their_forward(theirs, **given)) < 1e-5


@torch.no_grad()
def test_design_e_is_the_image_tokens_put_in_front_of_the_text():
    """A simple extension: DINO and CLIP tokens as more text, so diffusers can stand in once the projections are done."""
    ours, given = sugar("e"), inputs()
    dino, clip = torch.randn(2, 5, 24), torch.randn(2, 7, 40)
    theirs = CogVideoXTransformer3DModel(**VARIANTS["5b"]).eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()})
    joined = torch.cat([ours.dino_proj(dino), ours.clip_proj(clip), ours.patch_embed.text_proj(given["text"])], dim=1)
    theirs.patch_embed.text_proj = torch.nn.Identity()
    assert relative_error(ours(**given, dino=dino, clip=clip), their_forward(theirs, given["x"], given["t"], joined)) < 1e-5


@pytest.mark.parametrize("design", "bcde")
@torch.no_grad()
def test_the_model_obeys_the_mask(design, monkeypatch):
    ours, given = sugar(design), inputs()
    images = dict(dino=torch.randn(2, 5, 24), clip=torch.randn(2, 7, 40))
    fast = ours(**given, **images)
    mask = selective_mask(design, (12, 10, 54, 108))  # 54 tokens in each frame of 12x18 latents

    def by_mask(q, k, v, segments, key_mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    monkeypatch.setattr(model_module, "attention", by_mask)
    assert relative_error(fast, ours(**given, **images)) < 1e-5
    assert attention.attention is not by_mask


@torch.no_grad()
def test_null_embeddings_stand_in_for_what_is_dropped():
    ours, given = sugar("b"), inputs()
    dino, clip = torch.randn(2, 5, 24), torch.randn(2, 7, 40)
    null_dino, null_clip = ours.null_dino.expand(1, 5, -1), ours.null_clip.expand(1, 7, -1)
    mixed = ours(**given, dino=dino, clip=clip, keep_dino=torch.tensor([True, False]), keep_clip=torch.tensor([False, True]))
    by_hand = ours(**given, dino=torch.cat([dino[:1], null_dino]), clip=torch.cat([null_clip, clip[1:]]))
    assert torch.allclose(mixed, by_hand, atol=1e-6)
    nothing = ours(**given, dino=dino, clip=clip, keep_dino=torch.zeros(2).bool(), keep_clip=torch.zeros(2).bool())
    assert torch.allclose(nothing, ours(**given), atol=1e-6)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_files_both_ways(name, tmp_path):
    ours, theirs = pair(VARIANTS[name])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    save_transformer(ours, tmp_path / "ours")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    loaded = load_transformer(tmp_path / "theirs")
    assert loaded.config == ours.config
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in loaded.state_dict().items())
    back = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(v, theirs.state_dict()[k].float()) for k, v in back.state_dict().items())
    assert back.config.patch_size_t == theirs.config.patch_size_t


@torch.no_grad()
def test_a_plain_checkpoint_becomes_a_sugar_model_and_comes_back(tmp_path):
    plain, given = randomize(Transformer(Config(**VARIANTS["5b"]))), inputs()
    save_transformer(plain, tmp_path / "plain")
    ours = load_transformer(tmp_path / "plain", **SUGAR, design="a").eval()
    new = {k for k in ours.state_dict() if k not in plain.state_dict()}
    assert new == {"dino_proj.weight", "dino_proj.bias", "clip_proj.weight", "clip_proj.bias", "null_dino", "null_clip"}
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in plain.state_dict().items())
    assert all(v.isfinite().all() for v in ours.state_dict().values())
    assert relative_error(ours(**given), plain.eval()(**given)) < 1e-5
    save_transformer(ours, tmp_path / "sugar")
    again = load_transformer(tmp_path / "sugar")
    assert again.config == ours.config and again.config.sugar
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    assert CogVideoXTransformer3DModel.from_pretrained(tmp_path / "sugar") is not None  # the CogVideoX inside it


def test_loading_in_another_type(tmp_path):
    save_transformer(Transformer(Config(**TINY)), tmp_path / "half", torch.bfloat16)
    assert {v.dtype for v in load_transformer(tmp_path / "half").state_dict().values()} == {torch.float32}
    loaded = load_transformer(tmp_path / "half", dtype=torch.float16, **SUGAR)
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float16}
