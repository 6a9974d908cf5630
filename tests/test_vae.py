"""The VAE beside diffusers' on the same random weights: encode and decode, in chunks of time and in tiles of space."""

from itertools import product

import pytest
import torch
from conftest import TINY_VAE, randomize, relative_error
from diffusers import AutoencoderKLCogVideoX
from memory import live

import vae
from checkpoint import BadInput
from vae import VAE, VAEConfig, load_vae, save_vae

STAGES = dict(down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)


def pair(**config):
    theirs = randomize(AutoencoderKLCogVideoX(**config, **STAGES).eval(), std=0.02)
    ours = VAE(VAEConfig(**config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("tiled,frames", [*product([False, True], [1, 9, 17]), (False, 49)])
@torch.no_grad()
def test_encode_and_decode_beside_diffusers(frames, tiled):
    ours, theirs = pair(**TINY_VAE)
    ours.tiled = tiled
    (theirs.enable_tiling if tiled else theirs.disable_tiling)()
    for height, width in ((96, 144), (80, 160)) if frames < 17 else ((96, 144),):
        video = torch.rand(2, 3, frames, height, width) * 2 - 1
        posterior = theirs.encode(video).latent_dist
        mean, std = ours.encode(video)
        assert mean.shape == (2, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert relative_error(mean, posterior.mean) < 1e-5 and relative_error(std, posterior.std) < 1e-5
        z = torch.randn(2, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        decoded = ours.decode(z)
        assert decoded.shape == (2, 3, frames, height, width)
        assert relative_error(decoded, theirs.decode(z).sample) < 1e-5


@torch.no_grad()
def test_what_is_convolved_in_three_dimensions_beside_diffusers():
    """As on a GPU: it is float32 on the CPU alone that is convolved frame by frame."""
    ours, theirs = (network.double() for network in pair(**TINY_VAE))
    video, z = torch.rand(1, 3, 17, 32, 48).double() * 2 - 1, torch.randn(1, 16, 5, 4, 6).double()
    mean, decoded = theirs.encode(video).latent_dist.mean, theirs.decode(z).sample
    assert relative_error(ours.encode(video)[0], mean) < 1e-12 and relative_error(ours.decode(z), decoded) < 1e-12
    for network in (ours, theirs):
        network.bfloat16()
    short_mean, short_decoded = theirs.encode(video.bfloat16()).latent_dist.mean, theirs.decode(z.bfloat16()).sample
    assert relative_error(ours.encode(video.bfloat16())[0], mean) < 1.2 * relative_error(short_mean, mean)
    assert relative_error(ours.decode(z.bfloat16()), decoded) < 1.2 * relative_error(short_decoded, decoded)


@pytest.mark.parametrize("frames", [1, 9, 17])
@pytest.mark.parametrize("size", [1, 100_000], ids=["a frame each", "some frames each"])
@torch.no_grad()
def test_slices_of_time_change_nothing(frames, size, monkeypatch):
    """As at official sizes. And for a gradient nothing is sliced."""
    ours, theirs = (network.double() for network in pair(**TINY_VAE))
    z, truth = torch.randn(2, 16, (frames - 1) // 4 + 1, 4, 6).double(), None
    monkeypatch.setattr(vae, "SLICE", size)
    slices, over = set(), vae.GroupNorm.over
    monkeypatch.setattr(vae.GroupNorm, "over", lambda self, x, *more: slices.add(len(x)) or over(self, x, *more))
    for dtype, wrong in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, None)):
        expected = theirs.to(dtype).decode(z.to(dtype)).sample
        truth = expected if truth is None else truth
        wrong = wrong or 1.2 * relative_error(expected, truth)
        assert relative_error(ours.to(dtype).decode(z.to(dtype)), truth) < wrong, dtype
    assert max(slices) > 1 or frames == 1
    slices.clear()
    with torch.enable_grad():
        assert relative_error(ours.double().decode(z), theirs.double().decode(z).sample) < 1e-12
    assert slices == {1}


@pytest.mark.parametrize("dtype,wrong", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
@torch.no_grad()
def test_the_norm_of_large_slices_is_exact(dtype, wrong):
    """A million numbers in each group, far from zero: sums in float32 must not go through them one by one."""
    norm, x = vae.GroupNorm(4, 8).requires_grad_(False), (5 + torch.randn(1, 8, 3, 600, 800)).to(dtype)
    expected = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    parts = list(x.split([1, 2], dim=2))
    normed = norm.to(dtype).over(parts)
    assert relative_error(torch.cat([normed(i) for i in range(2)], dim=2), expected) < wrong


@torch.no_grad()
def test_memory_at_the_official_size():
    with torch.device("meta"):
        ours = VAE(VAEConfig()).bfloat16()
        video, z = torch.empty(1, 3, 49, 480, 720).bfloat16(), torch.empty(1, 16, 13, 60, 90).bfloat16()
    assert live(lambda: ours.encode(video))[0] < 4.9e9
    assert live(lambda: ours.decode(z))[0] < 4.95e9
    ours.tiled = True
    assert live(lambda: ours.decode(z))[0] < 1.4e9


@torch.no_grad()
def test_the_official_size_beside_diffusers():
    with torch.device("meta"):
        official = AutoencoderKLCogVideoX(**STAGES)
        mine = VAE(VAEConfig())
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in official.state_dict().items()}
    ours, theirs = pair(block_out_channels=(128, 256, 256, 512), layers_per_block=3, norm_num_groups=32)
    video, z = torch.rand(1, 3, 9, 32, 48) * 2 - 1, torch.randn(1, 16, 3, 4, 6)
    assert relative_error(ours.encode(video)[0], theirs.encode(video).latent_dist.mean) < 1e-5
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5


@torch.no_grad()
def test_no_network_ever_sees_more_than_one_chunk():
    ours, seen = VAE(VAEConfig(**TINY_VAE)).eval(), []
    for network in (ours.encoder, ours.decoder):
        network.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].shape[2])))
    mean, _ = ours.encode(torch.rand(1, 3, 33, 16, 16))
    ours.decode(mean)
    assert [frames for module, frames in seen if module is ours.encoder] == [9, 8, 8, 8]
    assert [frames for module, frames in seen if module is ours.decoder] == [3, 2, 2, 2]


@pytest.mark.parametrize("sides", [(64, 64), (48, 80), (32, 112)])
@torch.no_grad()
def test_tiles_of_any_size_keep_the_size_of_the_video(sides):
    ours = VAE(VAEConfig(**{**TINY_VAE, "sample_height": sides[0], "sample_width": sides[1]})).eval()
    ours.tiled = True
    mean, _ = ours.encode(torch.rand(1, 3, 1, 96, 112))
    assert mean.shape == (1, 16, 1, 12, 14) and ours.decode(mean).shape == (1, 3, 1, 96, 112)


@pytest.mark.parametrize("said,expected", [("GET was unable to find an engine to execute this computation", torch.OutOfMemoryError),
                                           ("the devil is in it", RuntimeError)])
def test_a_convolution_without_memory_is_told_as_such(said, expected, monkeypatch):
    """Or sampling would not go on in tiles."""
    def fail(self, x, cache):
        raise RuntimeError(said)

    monkeypatch.setattr(vae.CausalConv3d, "forward", fail)
    with pytest.raises(RuntimeError, match=said) as error:
        VAE(VAEConfig(**TINY_VAE)).decode(torch.zeros(1, 16, 1, 4, 4))
    assert type(error.value) is expected


def test_frames_that_the_official_vae_cannot_do_are_refused():
    ours = VAE(VAEConfig(**TINY_VAE))
    with pytest.raises(ValueError, match="8k\\+1"):
        ours.encode(torch.rand(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match="odd"):
        ours.decode(torch.rand(1, 16, 2, 2, 2))


@pytest.mark.parametrize("inverted", [False, True])
def test_scaling(inverted):
    ours, z = VAE(VAEConfig(**TINY_VAE, scaling_factor=0.7, invert_scale_latents=inverted)), torch.randn(1, 16, 1, 2, 2)
    assert torch.equal(ours.config.scale(z), z * 0.7) and torch.equal(ours.config.unscale(z), z / 0.7)
    assert torch.equal(ours.config.scale(z, image=True), z / 0.7 if inverted else z * 0.7)


def test_files_both_ways(tmp_path):
    ours, theirs = pair(**TINY_VAE)
    save_vae(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back, z = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "ours").eval(), torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(back.decode(z).sample, theirs.decode(z).sample)
        assert torch.equal(load_vae(tmp_path / "theirs").decode(z), ours.decode(z))


def test_a_vae_of_another_make_is_refused(tmp_path):
    AutoencoderKLCogVideoX(**TINY_VAE, **STAGES, use_quant_conv=True).save_pretrained(tmp_path / "odd")
    with pytest.raises(BadInput, match="use_quant_conv"):
        load_vae(tmp_path / "odd")
