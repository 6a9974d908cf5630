"""Text to video and image to video, whole, beside diffusers' pipelines: from a folder that diffusers saved, from one noise."""

from dataclasses import replace

import diffusers.models.autoencoders.vae as vae_module
import diffusers.schedulers.scheduling_dpm_cogvideox as dpm_module
import numpy as np
import pytest
import torch
from conftest import TINY_VAE, VARIANTS, randomize, relative_error
from diffusers import (AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline,
                       CogVideoXPipeline, CogVideoXTransformer3DModel)
from PIL import Image
from test_diffusion import OFFICIAL
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import pipeline
import toy_networks
from diffusion import alpha_bar_schedule
from model import Config, Transformer
from pipeline import Conditions, Request, Sampler, Settings
from vae import VAE

SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
STEPS = 6  # 50 steps of both schedulers are in test_diffusion.py
SMALL = dict(sample_height=6, sample_width=8)  # latents; the float64 run of the oracle is slow
SMALL_VAE = {**TINY_VAE, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    toy_networks.write_tokenizer(folder)
    return T5Tokenizer.from_pretrained(folder)


def save_checkpoint(folder, name, scheduler, tokenizer):
    """A whole checkpoint, made and saved by diffusers."""
    variant = VARIANTS[name] if name.startswith("1.5") else {**VARIANTS[name], **SMALL}
    transformer = randomize(CogVideoXTransformer3DModel(**variant), std=0.02)
    vae = AutoencoderKLCogVideoX(
        **SMALL_VAE, scaling_factor=1.15258426 if name == "2b" else 0.7, invert_scale_latents=name == "1.5-5B-I2V",
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 28, d_model=variant["text_embed_dim"], d_kv=8, d_ff=32,
                                 num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"))
    kind = CogVideoXImageToVideoPipeline if "I2V" in name else CogVideoXPipeline
    schedule = SCHEDULERS[scheduler](**OFFICIAL, snr_shift_scale=3.0 if name == "2b" else 1.0)
    kind(tokenizer=tokenizer, text_encoder=t5, vae=vae, transformer=transformer, scheduler=schedule).save_pretrained(folder)
    return kind


def their_video(kind, folder, dtype, prompt, negative, guidance, image, noises, monkeypatch, **size):
    """diffusers' whole pipeline in `dtype`, with the noises put in where it would draw them."""
    theirs = kind.from_pretrained(folder, torch_dtype=dtype)
    theirs.set_progress_bar_config(disable=True)
    # The DPM scheduler draws twice in a step of second order, and uses the second draw: both are given the step's noise.
    step = {"now": -1}
    original = type(theirs.scheduler).step

    def stepping(self, *args, **kwargs):
        step["now"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(theirs.scheduler), "step", stepping)
    monkeypatch.setattr(dpm_module, "randn_tensor", lambda *_, **__: noises["steps"][step["now"]].to(dtype))
    monkeypatch.setattr(vae_module, "randn_tensor", lambda *_, **__: noises["image"].to(dtype))
    more = {"image": image} if image is not None else {}
    out = theirs(prompt=prompt, negative_prompt=negative, guidance_scale=guidance, num_inference_steps=STEPS,
                   latents=noises["x"].to(dtype), output_type="pt", max_sequence_length=10, **size, **more).frames
    monkeypatch.setattr(type(theirs.scheduler), "step", original)
    return out[0].transpose(0, 1) * 2 - 1  # [F, 3, H, W] in [0, 1] -> [3, F, H, W] in [-1, 1]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@torch.no_grad()
def test_whole_runs_beside_diffusers(name, scheduler, tokenizer, tmp_path, monkeypatch, seed):
    kind = save_checkpoint(tmp_path / "model", name, scheduler, tokenizer)
    size = dict(height=48, width=64, num_frames=9)
    T = 4 if name.startswith("1.5") else 3  # 1.5 pads the three latent frames to its temporal patch
    noises = {"x": torch.randn(1, T, 16, 6, 8), "image": torch.randn(1, 16, 1, 6, 8),
              "steps": torch.randn(STEPS, 1, T, 16, 6, 8)}
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if "I2V" in name else None
    prompt, negative, guidance = "a fox is running in the snow", "a red cat", 6.0
    single, double = (their_video(kind, tmp_path / "model", dtype, prompt, negative, guidance, image, noises, monkeypatch,
                                  **size) for dtype in (torch.float32, torch.float64))

    draws = iter([noises["x"], *([noises["image"]] if image else []), *noises["steps"]])
    monkeypatch.setattr(pipeline, "noise_source", lambda seed: lambda *shape: next(draws).reshape(shape))
    sampler = Sampler(str(tmp_path / "model"))
    assert sampler.kind == ("i2v" if image else "t2v") and sampler.defaults().scheduler == scheduler
    assert sampler.defaults().guidance == 6.0
    settings = Settings(frames=9, height=48, width=64, fps=8, scheduler=scheduler, steps=STEPS, guidance=guidance)
    request = Request(prompt, negative, 0, tmp_path / "out.mp4", reference=image)
    [(_, ours)] = sampler.videos([request], settings)
    assert single.std() > 0.01  # the videos say something
    assert relative_error(ours.clamp(-1, 1), single) < max(10 * relative_error(single, double), 1e-6)


@pytest.mark.parametrize("sugar", [False, True])
def test_branches_that_do_not_fit_into_memory_go_in_turn(sugar, monkeypatch):
    """A forward pass that has room for a batch of one alone: the same video, and the large batch is tried only once."""
    image = dict(dino_dim=6, clip_dim=6, dino_tokens=5, clip_tokens=4) if sugar else {}
    model = randomize(Transformer(Config(**VARIANTS["5b"], **image))).eval()
    given = Conditions(torch.randn(1, 10, 32), torch.randn(1, 10, 32), may_fall_back=True)
    if sugar:
        given.dino, given.clip = torch.randn(1, 5, 6), torch.randn(1, 4, 6)
    else:
        given.reference = torch.randn(1, 16, 6, 8)
    x, alpha_bar = torch.randn(1, 3, 16, 6, 8), alpha_bar_schedule(OFFICIAL)
    settings = Settings(9, 48, 64, 8, "ddim", steps=3)
    sample = lambda: pipeline.sample_latents(model, given, alpha_bar, settings, x, lambda: None)
    expected, batches, forward = sample(), [], Transformer.forward

    def small(self, x, *args, **kwargs):
        batches.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("no room")
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", small)
    assert relative_error(sample(), expected) < 1e-5
    branches = 3 if sugar else 2
    assert batches == [branches] + 3 * branches * [1]
    given.in_turn = given.may_fall_back = False  # ranks that share a forward pass cannot each decide for themselves
    with pytest.raises(torch.OutOfMemoryError):
        sample()


@pytest.mark.parametrize("room", [True, False])
@torch.no_grad()
def test_the_transformer_stays_from_video_to_video_where_there_is_room(room, tokenizer, tmp_path, monkeypatch):
    """Without room for two networks: the first decoding fails, and from then on the transformer leaves before."""
    save_checkpoint(tmp_path / "model", "5b", "ddim", tokenizer)
    settings = Settings(frames=1, height=48, width=64, fps=8, scheduler="ddim", steps=2)
    requests = [Request("a fox", "", seed, tmp_path / f"{seed}.mp4") for seed in range(3)]
    alone = [video for request in requests for _, video in Sampler(str(tmp_path / "model")).videos([request], settings, quiet=True)]
    log, there, decode, unload, forward = [], set(), VAE.decode, Sampler.unload, Transformer.forward

    def enters(self, *args, **kwargs):
        there.add("transformer")
        log.append("step")
        return forward(self, *args, **kwargs)

    def decodes(self, z):
        log.append("decode")
        if there and not room:
            raise torch.OutOfMemoryError("no room")
        return decode(self, z)

    def unloads(self, network, again=True):
        if isinstance(network, Transformer):
            there.clear()
            log.append("leave" if again else "leave for good")
        unload(self, network, again)

    monkeypatch.setattr(Transformer, "forward", enters)
    monkeypatch.setattr(VAE, "decode", decodes)
    monkeypatch.setattr(Sampler, "unload", unloads)
    together = [video for _, video in Sampler(str(tmp_path / "model")).videos(requests, settings, quiet=True)]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    steps, last = ["step", "step"], ["step", "step", "leave for good", "decode"]
    if room:
        assert log == [*steps, "decode", *steps, "decode", *last]
    else:
        assert log == [*steps, "decode", "leave", "decode", *steps, "leave", "decode", *last]


@pytest.mark.parametrize("together", [False, True])
@torch.no_grad()
def test_what_is_too_large_to_be_decoded_whole_is_decoded_in_tiles(together, tokenizer, tmp_path, monkeypatch, capsys):
    """Also by the first one of ranks that share a video: decoding is its work alone."""
    save_checkpoint(tmp_path / "model", "5b", "ddim", tokenizer)
    settings = Settings(frames=1, height=48, width=64, fps=8, scheduler="ddim", steps=1)
    requests = [Request("a fox", "", seed, tmp_path / f"{seed}.mp4") for seed in range(2)]

    def sampled(settings):
        sampler = Sampler(str(tmp_path / "model"))
        sampler.split = (lambda transformer: None) if together else None
        return [video for _, video in sampler.videos(requests, settings, quiet=True)]

    tiled, decode = sampled(replace(settings, tile=True)), VAE.decode

    def decodes(self, z):
        if not self.tiled:
            raise torch.OutOfMemoryError("no room")
        return decode(self, z)

    monkeypatch.setattr(VAE, "decode", decodes)
    assert all(torch.equal(one, other) for one, other in zip(sampled(settings), tiled, strict=True))
    assert capsys.readouterr().err.count("the VAE goes on in tiles") == 1
