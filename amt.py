"""AMT-S, which draws the frame between two frames (Li et al. 2023, "AMT: All-Pairs Multi-Field Transforms for Efficient
Frame Interpolation"), and the score that VBench makes of it: motion smoothness.

The frame at time t of two, at 0 and 1, is found by looking back: where in the first frame, and where in the second, does
each of its pixels come from? A pyramid of four decoders answers with flows from t to either frame, at 1/8, 1/4, 1/2 and 1
of the resolution. After each of the first three, the flows are corrected by what they point to in the correlation of all
pixels with all pixels, at 1/8. The last one gives three flows to each frame, whose pictures are mixed.

Both flows go together as one [B, 4, H, W], in pixels: x and y to the first frame, then x and y to the second.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flow
from checkpoint import BadInput, fill_exactly, read_published
from flow import LEVELS, conv, correlation_pyramid, pixel_grid, sample

RADIUS = 3  # the correlation is looked up within 3 cells
FIELDS = 3  # flows to each frame, in the end
CHANNELS = (20, 32, 44, 56)  # of the features at 1/2, 1/4, 1/8 and 1/16
SIDE = 20  # channels that pass two more convolutions in the decoders

SOURCE = ("AMT's authors publish amt-s.pth at https://huggingface.co/lalala125/AMT, for non-commercial use only (licence "
          "CC BY-NC 4.0, https://github.com/MCG-NKU/AMT).")


def resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear")


def resized_flow(flow: Tensor, factor: float) -> Tensor:
    """Its vectors grow with the picture."""
    return factor * resized(flow, factor)


def fetched(x: Tensor, flow: Tensor) -> Tensor:
    """x [B, C, H, W] where the flow [B, 2, H, W] points to; what is outside is as at the border."""
    return sample(x, pixel_grid(flow) + flow, "bilinear", "border")


# --- features ---------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        inner = after // 4
        self.conv1, self.conv2, self.conv3 = conv(before, inner, 1), conv(inner, inner, 3, stride), conv(inner, after, 1)
        shorter = nn.Sequential(conv(before, after, 1, stride), nn.InstanceNorm2d(after))
        self.downsample = shorter if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in (self.conv1, self.conv2, self.conv3):
            h = F.relu(F.instance_norm(layer(h)))
        return F.relu(self.downsample(x) + h)


class CorrelationFeatures(nn.Module):
    """What is correlated: [B, 3, H, W] -> [B, 84, H/8, W/8]."""

    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 32, 7, stride=2)
        self.layer1 = nn.Sequential(Bottleneck(32, 32, 1), Bottleneck(32, 32, 1))
        self.layer2 = nn.Sequential(Bottleneck(32, 64, 2), Bottleneck(64, 64, 1))
        self.layer3 = nn.Sequential(Bottleneck(64, 96, 2), Bottleneck(96, 96, 1))
        self.conv2 = conv(96, 84, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.instance_norm(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


def conv_prelu(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(before, after, 3, stride), nn.PReLU(after))


class Pyramid(nn.Module):
    """What the decoders see of a frame: [B, 3, H, W] -> its features at 1/2, 1/4, 1/8 and 1/16."""

    def __init__(self):
        super().__init__()
        for i, (before, after) in enumerate(zip((3, *CHANNELS), CHANNELS), 1):
            self.add_module(f"pyramid{i}", nn.Sequential(conv_prelu(before, after, stride=2), conv_prelu(after, after)))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for level in self.children():
            features.append(x := level(x))
        return features


# --- decoders ---------------------------------------------------------------------------------------------------------


class SideResidual(nn.Module):
    """A residual block. After two of its convolutions, the last SIDE channels alone pass one more."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv3 = conv_prelu(width, width), conv_prelu(width, width)
        self.conv2, self.conv4 = conv_prelu(SIDE, SIDE), conv_prelu(SIDE, SIDE)
        self.conv5, self.prelu = conv(width, width, 3), nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for whole, side in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            h = whole(h)
            h = torch.cat([h[:, :-SIDE], side(h[:, -SIDE:])], dim=1)
        return self.prelu(x + self.conv5(h))


class Decoder(nn.Module):
    """[B, before, h, w] -> [B, after, 2h, 2w]."""

    def __init__(self, before: int, width: int, after: int):
        super().__init__()
        self.convblock = nn.Sequential(conv_prelu(before, width), SideResidual(width),
                                       nn.ConvTranspose2d(width, after, 4, stride=2, padding=1))

    def forward(self, *parts: Tensor) -> Tensor:
        return self.convblock(torch.cat(parts, dim=1))


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


class UpdateBlock(nn.Module):
    """How the correlation changes the features and the flows of one level. Like RAFT's, but without memory, and for both
    frames at once; it works at 1/8 of the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        def pair(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(conv(before, 76, 3), nn.LeakyReLU(0.1), conv(76, after, 3))

        self.convc1 = conv(2 * LEVELS * (2 * RADIUS + 1) ** 2, 64, 1)
        self.convf1, self.convf2 = conv(4, 40, 7), conv(40, 20, 3)
        self.conv = conv(64 + 20, 68, 3)
        self.gru = pair(68 + 4 + channels, 76)  # the name is the weights'; there are no gates
        self.feat_head, self.flow_head = pair(76, channels), pair(76, 4)

    def forward(self, h: Tensor, flow: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """The changes of h [B, channels, H/8, W/8] and of the flow [B, 4, H/8, W/8]."""
        c, f = leaky(self.convc1(correlation)), leaky(self.convf2(leaky(self.convf1(flow))))
        x = self.gru(torch.cat([leaky(self.conv(torch.cat([c, f], dim=1))), flow, h], dim=1))
        return self.feat_head(x), self.flow_head(x)


def look_up(pyramid: list[Tensor], at: Tensor) -> Tensor:
    """The correlations within RADIUS cells of the positions `at` [B, 2, h, w], from each level: [B, 4 * 7 * 7, h, w]."""
    side, margin = 2 * flow.RADIUS + 1, flow.RADIUS - RADIUS  # RAFT's window is wider
    windows = flow.look_up(pyramid, at).unflatten(1, (LEVELS, side, side))
    return windows[:, :, margin : side - margin, margin : side - margin].flatten(1, 3)


# --- the network ------------------------------------------------------------------------------------------------------


class AMT(nn.Module):
    """AMT-S. Its parameters bear the names of the original release."""

    def __init__(self):
        super().__init__()
        c1, c2, c3, c4 = CHANNELS
        self.feat_encoder, self.encoder = CorrelationFeatures(), Pyramid()
        self.decoder4 = Decoder(2 * c4 + 1, 2 * c4, c3 + 4)  # sees the frames and the time
        self.decoder3 = Decoder(3 * c3 + 4, 3 * c3, c2 + 4)  # these see the frames, and the last one's features and flows
        self.decoder2 = Decoder(3 * c2 + 4, 3 * c2, c1 + 4)
        self.decoder1 = Decoder(3 * c1 + 4, 3 * c1, 8 * FIELDS)
        self.update4, self.update3, self.update2 = UpdateBlock(c3), UpdateBlock(c2), UpdateBlock(c1)
        self.comb_block = nn.Sequential(conv(3 * FIELDS, 6 * FIELDS, 3), nn.PReLU(6 * FIELDS), conv(6 * FIELDS, 3, 3))

    def forward(self, first: Tensor, second: Tensor, t: float = 0.5) -> Tensor:
        """The frame at time t between frames [B, 3, H, W] in 0..1: [B, 3, H, W] in 0..1. 0 < t < 1; amt-s.pth was
        trained at 0.5 alone."""
        height, width = first.shape[-2:]
        if height % 16 or width % 16 or min(height, width) < 128:  # or the coarsest correlation would be one cell wide
            raise BadInput(f"AMT needs frames with sides that are multiples of 16 and at least 128 pixels (113 before "
                           f"padding), not {width}x{height}.")
        mean = torch.cat([first, second], dim=1).mean(dim=(1, 2, 3), keepdim=True)  # of all pixels and colours
        first, second = first - mean, second - mean
        matched = self.feat_encoder(first), self.feat_encoder(second)
        there, back = correlation_pyramid(*matched), correlation_pyramid(*matched[::-1])
        here = pixel_grid(matched[0])
        one, two = self.encoder(first), self.encoder(second)  # lists: features at 1/2, ..., 1/16

        def updated(update: UpdateBlock, h: Tensor, flow: Tensor, shrink: int) -> tuple[Tensor, Tensor]:
            """h and flow, which are `shrink` times finer than 1/8, with their changes."""
            small = resized_flow(flow, 1 / shrink)
            # From one frame to the other, as if motion were linear: at t = 0.5 twice as far. (At other times one would
            # exchange the divisors; the published code has them so.)
            to_first, to_second = small[:, :2] / (1 - t), small[:, 2:] / t
            correlation = torch.cat([look_up(there, here + to_second), look_up(back, here + to_first)], dim=1)
            h_change, flow_change = update(resized(h, 1 / shrink), small, correlation)
            return h + resized(h_change, shrink), flow + resized_flow(flow_change, shrink)

        time = first.new_full((len(first), 1, height // 16, width // 16), t)
        out = self.decoder4(one[3], two[3], time)
        h, flow = updated(self.update4, out[:, 4:], out[:, :4], 1)
        for decoder, update, level, shrink in ((self.decoder3, self.update3, 2, 2), (self.decoder2, self.update2, 1, 4)):
            out = decoder(h, fetched(one[level], flow[:, :2]), fetched(two[level], flow[:, 2:]), flow)
            h, flow = updated(update, out[:, 4:], out[:, :4] + resized_flow(flow, 2), shrink)
        out = self.decoder1(h, fetched(one[0], flow[:, :2]), fetched(two[0], flow[:, 2:]), flow)
        return self.mixed(first, second, mean, resized_flow(flow, 2), out)

    def mixed(self, first: Tensor, second: Tensor, mean: Tensor, flow: Tensor, out: Tensor) -> Tensor:
        """The frame, from FIELDS pairs of flows that differ from `flow` [B, 4, H, W], with a mask and a residual for each:
        out [B, 8 * FIELDS, H, W]. first, second: less their mean. (The paper's multi-field refinement)"""
        to_first, to_second, mask, residual = (
            part.unflatten(1, (FIELDS, -1)) for part in out.split([2 * FIELDS, 2 * FIELDS, FIELDS, 3 * FIELDS], dim=1))
        pictures = []
        for i in range(FIELDS):
            one, two = fetched(first, flow[:, :2] + to_first[:, i]), fetched(second, flow[:, 2:] + to_second[:, i])
            weight = mask[:, i].sigmoid()
            pictures.append(weight * one + (1 - weight) * two + mean + residual[:, i])
        return (torch.stack(pictures).mean(dim=0) + self.comb_block(torch.cat(pictures, dim=1))).clamp(0, 1)


def load_amt(path: Path) -> AMT:
    """AMT-S with the published weights, amt-s.pth, or with the same tensors as safetensors; ready to use and frozen."""
    path = Path(path)
    raw = read_published(path, SOURCE, inside="state_dict")
    model = AMT()
    fill_exactly(model, raw, {key: key for key in raw}, path, "AMT-S")
    return model.eval().requires_grad_(False)


# --- the score --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def motion_smoothness(frames: np.ndarray, amt: nn.Module, device="cpu") -> float:
    """VBench's motion smoothness of a video, uint8 [F, H, W, 3] with F >= 3, in 0..1: how well `amt`, on `device`, draws
    its odd frames from the even frames around them. It is 1 - d/255, where d is the mean absolute difference in
    grey levels, of which what is drawn has whole ones: truncated. Of an even number of frames the last is not looked at.

    Fewer than three frames have none in between: BadInput, where VBench stops at an assertion. VBench also contains a
    reduction of frames that are large for the GPU's memory, which its own scripts never reach (they compare a
    torch.device with the string "cuda"), and which at 24 GB would leave 1080p alone: here nothing is reduced.
    """
    if len(frames) < 3:
        raise BadInput(f"Motion smoothness is of frames between two others: a video needs at least 3, not {len(frames)}.")
    height, width = frames.shape[1:3]
    down, right = -height % 16, -width % 16
    top, left = down // 2, right // 2

    def padded(frame: np.ndarray) -> Tensor:
        x = torch.tensor(frame).permute(2, 0, 1)[None] / 255
        return F.pad(x, (left, right - left, top, down - top), mode="replicate").to(device)

    differences = []
    for i in range(1, len(frames) - 1, 2):
        between = amt(padded(frames[i - 1]), padded(frames[i + 1]))[0, :, top : top + height, left : left + width]
        drawn = (between.cpu() * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        differences.append(np.abs(drawn.astype(int) - frames[i]).mean())
    return float((255 - np.mean(differences)) / 255)
