"""The 3D causal VAE of CogVideoX: pixels [B, 3, F, H, W] <-> latents [B, 16, T, H/8, W/8], T = (F - 1) / 4 + 1.

Video passes through in chunks of time: 8 frames when encoding, 2 latents when decoding, the first chunk takes the
remainder (8 + 1, 2 + 1). The chunks are part of what the official VAE computes, since its group norms see one chunk at a
time; between chunks every causal convolution carries its last frames over in `cache`. So memory does not grow with the
length of the clip.

Where the decoder's frames are large, a chunk is a list of slices, a few frames each, that layers take up and replace one by one: only
group norms need all of a chunk at once, and of it no more than its mean and variance.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from attention import may_overwrite
from checkpoint import BadInput

# The last frames that each causal convolution has seen, [B, C, 1, H, W] each: what a chunk leaves to the next one. None for a
# picture, which has no next chunk.
Cache = dict[nn.Module, list[Tensor]] | None
# A chunk, in slices of time: [B, C, t, H, W] each. Layers overwrite the items of the list that they are given.
Slices = list[Tensor]
SLICE = 2**26  # bytes of one, unless a single frame has more


@dataclass
class VAEConfig:
    """The fields of the official config.json that change what is computed; the defaults are the 2b's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480  # a tile is half of it
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    invert_scale_latents: bool = False  # 1.5: the image's latents are divided by scaling_factor, not multiplied

    def scale(self, z: Tensor, image: bool = False) -> Tensor:
        """From the VAE's latents to the transformer's. image: the first frame that an I2V model is given."""
        return z / self.scaling_factor if image and self.invert_scale_latents else z * self.scaling_factor

    def unscale(self, z: Tensor) -> Tensor:
        """From the transformer's latents to the VAE's."""
        return z / self.scaling_factor


def latent_size(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latents of a clip of that many frames and pixels."""
    return (frames - 1) // 4 + 1, height // 8, width // 8


class CausalConv3d(nn.Module):
    """Convolution that sees the present and the past: the time before the first frame is that frame repeated."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        super().__init__()
        self.past = kernel - 1
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:  # [B, C, T, H, W]
        if not self.past:
            return self.conv(x)
        if cache is None:  # a picture sees itself throughout time, so the kernel is summed over time
            conv = self.conv
            return F.conv2d(x[:, :, 0], conv.weight.sum(dim=2), conv.bias, padding=conv.padding[1:]).unsqueeze(2)
        before = cache.pop(self, None) or self.past * [x[:, :, :1]]
        kept = x.split(1, dim=2)[-self.past :]
        if x.shape[2] > 1:  # else x itself is kept
            kept = [frame.clone() for frame in kept]
        cache[self] = [*before, *kept][-self.past :]
        x = torch.cat([*before, x], dim=2)
        del before  # which are large
        return self.convolved(x)

    def convolved(self, x: Tensor) -> Tensor:
        """self.conv(x). For one small clip in float32 on a CPU (the toy's) torch by itself does without oneDNN, and takes up to ten times
        as long."""
        small = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] == 1 and x.shape[:4].numel() <= 20480
        if not small or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
            return self.conv(x)
        conv = self.conv
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)


class GroupNorm(nn.GroupNorm):
    def over(self, x: Slices, *_) -> Callable[[int], Tensor]:
        """The norm of the chunk x, as a function that gives its i-th slice."""
        if len(x) == 1:
            return lambda i: self(x[i])
        wide, (B, C), T = torch.promote_types(x[0].dtype, torch.float32), x[0].shape[:2], length(x)
        means, variances = [], []  # of each slice, [B, groups]
        for part in x:
            part = part.unflatten(1, (self.num_groups, -1)).flatten(2)
            means.append(part.mean(dim=2, dtype=wide))
            variances.append((part - means[-1].unsqueeze(2)).square_().mean(dim=2))
        shares = [part.shape[2] / T for part in x]
        mean = sum(share * own for share, own in zip(shares, means))
        variance = sum(share * (own + (m - mean).square()) for share, own, m in zip(shares, variances, means))
        of_channels = [y.repeat_interleave(C // self.num_groups, dim=1).flatten() for y in (mean, variance)]  # [B * C]
        of_channels += [y.to(wide).repeat(B) for y in (self.weight, self.bias)]
        # batch_norm over B * C "channels" applies these statistics, weight and bias in one pass.
        return lambda i: F.batch_norm(x[i].flatten(0, 1).unsqueeze(0), *of_channels, eps=self.eps).view_as(x[i])


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift are read off the latents z, upsampled to f's size (nearest)."""

    def __init__(self, channels: int, latent_channels: int, groups: int):
        super().__init__()
        self.norm_layer = GroupNorm(groups, channels, eps=1e-6)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel=1)

    def over(self, f: Slices, z: Tensor, cache: Cache) -> Callable[[int], Tensor]:
        """The norm of the chunk f, as a function that gives its i-th slice."""
        # A 1x1x1 convolution and nearest upsampling commute, and the latents are the smaller ones. Nor need they be upsampled in
        # height: the rows that share a latent's are multiplied by the same row.
        norm, scale, shift = self.norm_layer.over(f), self.conv_y(z, cache), self.conv_b(z, cache)
        nearest, starts = latent_of(length(f), z.shape[2]), [length(f[:i]) for i in range(len(f))]

        def normed(i: int) -> Tensor:
            rows = norm(i).unflatten(3, (z.shape[3], -1))  # [B, C, t, h, H / h, W]
            times = nearest[starts[i] : starts[i] + rows.shape[2]]
            s, b = (torch.stack([y[:, :, t] for t in times], dim=2).repeat_interleave(rows.shape[5] // z.shape[4], dim=4).unsqueeze(4)
                    for y in (scale, shift))
            return torch.addcmul(b, rows, s, out=rows if may_overwrite() else None).flatten(3, 4)

        return normed


def length(x: Slices) -> int:
    """Frames of a chunk."""
    return sum(part.shape[2] for part in x)


def latent_of(frames: int, T: int) -> list[int]:
    """For each frame of a chunk, which of its T latents is the nearest. A first frame, where there is one, stands alone in time."""
    first = frames % 2 if frames > 1 else 0
    return [0] * first + [first + i * (T - first) // (frames - first) for i in range(frames - first)]


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, decoder: bool):
        super().__init__()
        groups, eps, latent = config.norm_num_groups, config.norm_eps, config.latent_channels
        if decoder:
            self.norm1 = SpatialNorm(in_channels, latent, groups)
            self.norm2 = SpatialNorm(out_channels, latent, groups)
        else:
            self.norm1 = GroupNorm(groups, in_channels, eps)
            self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Slices, z: Tensor | None, cache: Cache) -> Slices:
        """z: the latents that the decoder's norms read; None in the encoder."""
        h, normed = [], self.norm1.over(x, z, cache)
        for i in range(len(x)):
            part = normed(i)
            if hasattr(self, "conv_shortcut"):
                x[i] = self.conv_shortcut(x[i])  # narrower, so before the next convolution takes its memory
            h.append(self.conv1(F.silu(part, inplace=may_overwrite()), cache))
            del part
        normed = self.norm2.over(h, z, cache)
        for i in range(len(x)):
            part, h[i] = normed(i), None
            part = self.conv2(F.silu(part, inplace=may_overwrite()), cache)
            x[i] = part.add_(x[i]) if may_overwrite() else part + x[i]
        return x


class Downsample(nn.Module):
    """Halves height and width, and time where `time`: frames are averaged in pairs, a first frame stays as it is."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Slices, *_) -> Slices:
        [x] = x  # the encoder's chunks are not sliced
        if self.time:
            first, rest = x[:, :, : x.shape[2] % 2], x[:, :, x.shape[2] % 2 :]
            x = torch.cat([first, rest.unflatten(2, (-1, 2)).mean(dim=3)], dim=2) if rest.shape[2] else first
        return [torch.stack([self.conv(F.pad(frame, (0, 1, 0, 1))) for frame in x.unbind(2)], dim=2)]


class Upsample(nn.Module):
    """Doubles height and width, and time where `time`: frames are repeated, a first frame is not."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Slices, *_) -> Slices:
        made, out, alone = [], [], length(x) % 2  # frames of the next slice; slices; whether the first frame is alone in time
        for i in range(len(x)):
            for j, frame in enumerate(x[i].unbind(2)):
                frame = self.conv(F.interpolate(frame, scale_factor=2.0))  # once for both of its moments
                made += [frame] * (2 if self.time and not (alone and i == j == 0) else 1)
                full = SLICE // frame.nbytes or 1
                while may_overwrite() and len(made) >= full:
                    out.append(torch.stack(made[:full], dim=2))
                    del made[:full]
            x[i] = None
        return [*out, torch.stack(made, dim=2)] if made else out


class Stage(nn.Module):
    """Residual blocks at one resolution, then at most one change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, config: VAEConfig, decoder: bool,
                 down: nn.Module | None = None, up: nn.Module | None = None):
        super().__init__()
        channels = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(i, o, config, decoder) for i, o in zip(channels, channels[1:]))
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])


def layers(*stages: Stage) -> list[nn.Module]:
    """What the stages consist of, in order. Called as a whole, a stage would hold its input until it is done."""
    parts = [getattr(stage, name, ()) for stage in stages for name in ("resnets", "downsamplers", "upsamplers")]
    return [layer for part in parts for layer in part]


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, halvings = config.block_out_channels, config.temporal_compression_ratio.bit_length() - 1
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], width, config.layers_per_block, config, decoder=False,
                  down=Downsample(width, time=i < halvings) if i < len(widths) - 1 else None)
            for i, width in enumerate(widths))
        self.mid_block = Stage(widths[-1], widths[-1], 2, config, decoder=False)
        self.norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = [self.conv_in(x, cache)]
        for layer in layers(*self.down_blocks, self.mid_block):
            x = layer(x, None, cache)
        return self.conv_out(F.silu(self.norm_out(x[0]), inplace=may_overwrite()), cache)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, halvings = config.block_out_channels[::-1], config.temporal_compression_ratio.bit_length() - 1
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = Stage(widths[0], widths[0], 2, config, decoder=True)
        self.up_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], width, config.layers_per_block + 1, config, decoder=True,
                  up=Upsample(width, time=i < halvings) if i < len(widths) - 1 else None)
            for i, width in enumerate(widths))
        self.norm_out = SpatialNorm(widths[-1], config.latent_channels, config.norm_num_groups)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, cache: Cache) -> Tensor:
        x = [self.conv_in(z, cache)]
        for layer in layers(self.mid_block, *self.up_blocks):
            x = layer(x, z, cache)
        normed = self.norm_out.over(x, z, cache)
        return torch.cat([self.conv_out(F.silu(normed(i), inplace=may_overwrite()), cache) for i in range(len(x))], dim=2)


class VAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.shrink = 2 ** (len(config.block_out_channels) - 1)  # 8: pixels to a latent, in height and in width
        self.tiled = False  # see in_tiles()
        self.latent_tile = [size // 2 // self.shrink for size in (config.sample_height, config.sample_width)]
        self.tile = [side * self.shrink for side in self.latent_tile]  # in pixels

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of video [B, 3, F, H, W] in [-1, 1], F = 1 or 8k+1: mean and deviation, each
        [B, 16, T, H/8, W/8], not yet scaled (see VAEConfig.scale)."""
        frames = video.shape[2]
        if frames != 1 and frames % 8 != 1:
            raise ValueError(f"The VAE encodes 1 or 8k+1 frames, not {frames}.")
        mean, log_variance = self.in_tiles(video, self.encoder, 8, self.tile, self.latent_tile).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Video [B, 3, F, H, W] from latents [B, 16, T, H/8, W/8], T = 1 or odd, unscaled (see VAEConfig.scale)."""
        if z.shape[2] % 2 != 1:
            raise ValueError(f"The VAE decodes an odd number of latent frames, not {z.shape[2]}.")
        return self.in_tiles(z, self.decoder, 2, self.latent_tile, self.tile)

    def in_tiles(self, x: Tensor, network: nn.Module, chunk: int, sides_in: list[int], sides_out: list[int]) -> Tensor:
        """Runs encoder or decoder over x, in overlapping tiles when self.tiled is set and x is larger than one: for
        frames too large to be processed whole. A tile sees less of the frame, so the result differs a little; sizes and
        overlaps (1/6 of the height, 1/5 of the width) are the official ones.

        sides_in, sides_out: height and width of a tile before and after the network.
        """
        if not self.tiled or (x.shape[-2] <= sides_in[0] and x.shape[-1] <= sides_in[1]):
            return in_chunks(x, network, chunk)
        steps_in, steps_out, blends = [], [], []
        for side, size_in, size_out, overlap in zip(self.latent_tile, sides_in, sides_out, (1 / 6, 1 / 5)):
            step = max(int(side * (1 - overlap)), 1)  # in latents, so that tiles meet at whole latents
            steps_in.append(step * size_in // side)
            steps_out.append(step * size_out // side)
            blends.append(size_out - steps_out[-1])
        rows, above = [], None
        for top in range(0, x.shape[-2], steps_in[0]):
            row, left = [], None
            for i, start in enumerate(range(0, x.shape[-1], steps_in[1])):
                tile = x[..., top : top + sides_in[0], start : start + sides_in[1]]
                tile = in_chunks(tile, network, chunk)
                if above is not None:
                    tile = blend(above[i], tile, blends[0], dim=-2)
                if left is not None:
                    tile = blend(left, tile, blends[1], dim=-1)
                row.append(left := tile)
            rows.append(torch.cat([tile[..., : steps_out[0], : steps_out[1]] for tile in row], dim=-1))
            above = row
        return torch.cat(rows, dim=-2)


def in_chunks(x: Tensor, network: nn.Module, chunk: int) -> Tensor:
    """Runs network over x [B, C, T, H, W] `chunk` frames at a time, the first time with the remainder of T."""
    cache: Cache = None if x.shape[2] == 1 else {}
    ends = range(x.shape[2] % chunk + chunk if x.shape[2] >= chunk else x.shape[2], x.shape[2] + 1, chunk)
    starts = [0, *ends[:-1]]
    try:
        return torch.cat([network(x[:, :, start:end], cache) for start, end in zip(starts, ends)], dim=2)
    except RuntimeError as error:  # cuDNN finds "no engine" for a convolution where there is no memory for one to work in
        if "unable to find an engine" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after` with its first `extent` lines along dim faded in over the last lines of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return after
    weight = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    weight = weight.view(-1, *[1] * (-dim - 1))
    old, new = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    return torch.cat([old * (1 - weight) + new * weight, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)


def read_config(folder: Path) -> VAEConfig:
    raw = checkpoint.read_json(folder / "config.json")
    for name in ("use_quant_conv", "use_post_quant_conv", "shift_factor", "latents_mean", "latents_std"):
        if raw.get(name):
            raise BadInput(f"{folder / 'config.json'} sets {name}, which no CogVideoX VAE does and this code does not know.")
    return checkpoint.fill(VAEConfig, raw, folder / "config.json")


def load_vae(folder: Path, device="cpu", dtype=torch.float32) -> VAE:
    """The VAE in `folder` (config.json and safetensors in the diffusers layout), ready to use and frozen."""
    with torch.device("meta"):
        vae = VAE(read_config(folder))
    return checkpoint.load(vae, folder, device, dtype).eval().requires_grad_(False)


def save_vae(vae: VAE, folder: Path) -> None:
    config = {"_class_name": "AutoencoderKLCogVideoX", **asdict(vae.config)}
    checkpoint.save(folder, config, vae.state_dict())
