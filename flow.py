"""Optical flow: RAFT with its published weights, and a classical estimator for where they are not.

A flow is [B, 2, H, W] in pixels: where each pixel of the first frame went, x to the right, then y down. Frames are
[B, 3, H, W] in 0..255, as uint8 or float.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import BadInput, fill_exactly, read_published

# --- RAFT, the large model (Teed and Deng 2020) -----------------------------------------------------------------------

SOURCE = "RAFT's authors publish raft-things.pth by download_models.sh of https://github.com/princeton-vl/RAFT."
LEVELS, RADIUS = 4, 4  # the correlation is looked up at 4 scales, within 4 cells around the current estimate


def conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2)


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm: type[nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = conv(before, after, 3, stride), norm(after)
        self.conv2, self.norm2 = conv(after, after, 3), norm(after)
        self.downsample = nn.Sequential(conv(before, after, 1, stride), norm(after)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.downsample(x) + h)


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> [B, 256, H/8, W/8]."""

    def __init__(self, norm: type[nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = conv(3, 64, 7, stride=2), norm(64)
        self.layer1 = nn.Sequential(Residual(64, 64, 1, norm), Residual(64, 64, 1, norm))
        self.layer2 = nn.Sequential(Residual(64, 96, 2, norm), Residual(96, 96, 1, norm))
        self.layer3 = nn.Sequential(Residual(96, 128, 2, norm), Residual(128, 128, 1, norm))
        self.conv2 = conv(128, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class UpdateBlock(nn.Module):
    """One step of the recurrent refinement, at 1/8 of the resolution."""

    def __init__(self):
        super().__init__()
        seen = LEVELS * (2 * RADIUS + 1) ** 2
        self.encoder = nn.ModuleDict({"convc1": conv(seen, 256, 1), "convc2": conv(256, 192, 3), "convf1": conv(2, 128, 7),
                                      "convf2": conv(128, 64, 3), "conv": conv(256, 126, 3)})
        self.gru = nn.ModuleDict({f"conv{gate}{axis}": nn.Conv2d(384, 128, kernel, padding="same")
                                  for axis, kernel in ((1, (1, 5)), (2, (5, 1))) for gate in "zrq"})
        self.flow_head = nn.ModuleDict({"conv1": conv(128, 256, 3), "conv2": conv(256, 2, 3)})
        self.mask = nn.Sequential(conv(128, 256, 3), nn.ReLU(), conv(256, 9 * 8 * 8, 1))

    def forward(self, h: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """The next hidden state and the change of the flow. h, context: [B, 128, H/8, W/8]."""
        motion, gru, head = self.encoder, self.gru, self.flow_head
        c = F.relu(motion["convc2"](F.relu(motion["convc1"](correlation))))
        f = F.relu(motion["convf2"](F.relu(motion["convf1"](flow))))
        x = torch.cat([context, F.relu(motion["conv"](torch.cat([c, f], dim=1))), flow], dim=1)  # [B, 256, H/8, W/8]
        for axis in "12":  # a GRU along the rows, then one along the columns
            both = torch.cat([h, x], dim=1)
            z, r = gru["convz" + axis](both).sigmoid(), gru["convr" + axis](both).sigmoid()
            candidate = gru["convq" + axis](torch.cat([r * h, x], dim=1)).tanh()
            h = (1 - z) * h + z * candidate
        return h, head["conv2"](F.relu(head["conv1"](h)))


class RAFT(nn.Module):
    """Recurrent all-pairs field transforms. Its parameters bear the names of the original release."""

    def __init__(self):
        super().__init__()
        self.fnet = Encoder(nn.InstanceNorm2d)  # what is matched
        self.cnet = Encoder(nn.BatchNorm2d)  # what the first frame tells the update block
        self.update_block = UpdateBlock()

    def forward(self, first: Tensor, second: Tensor, iterations: int = 20) -> Tensor:
        """Flow [B, 2, H, W] between frames [B, 3, H, W], float in 0..255, padded to multiples of 8."""
        height, width = first.shape[-2:]
        if min(height, width) < 128:  # or the coarsest level would be one cell wide
            raise BadInput(f"RAFT needs frames of at least 128 pixels a side (121 before padding), not {width}x{height}; "
                           f"the classical estimator, which is used where no weights are given, takes smaller ones.")
        first, second = first / 127.5 - 1, second / 127.5 - 1
        pyramid = correlation_pyramid(self.fnet(first), self.fnet(second))
        h, context = self.cnet(first).split(128, dim=1)
        h, context = h.tanh(), context.relu()
        start = pixel_grid(context)
        flow = torch.zeros_like(start)
        for _ in range(iterations):
            h, change = self.update_block(h, context, look_up(pyramid, start + flow), flow)
            flow = flow + change
        return convex_upsample(flow, 0.25 * self.update_block.mask(h))  # the factor is part of the published model


def pixel_grid(x: Tensor) -> Tensor:
    """The coordinates of x's pixels, [B, 2, H, W]: x, then y."""
    rows, columns = (torch.arange(side, device=x.device, dtype=x.dtype) for side in x.shape[-2:])
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy")).expand(x.shape[0], -1, -1, -1)


def sample(x: Tensor, at: Tensor, mode: str, padding: str) -> Tensor:
    """x [B, C, H, W] at the positions `at` [B, 2, h, w] in its pixels -> [B, C, h, w]."""
    height, width = x.shape[-2:]
    grid = torch.stack([2 * at[:, 0] / (width - 1) - 1, 2 * at[:, 1] / (height - 1) - 1], dim=-1)  # a GPU need not wait for numbers
    return F.grid_sample(x, grid, mode, padding, align_corners=True)


def correlation_pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Every cell of the first features [B, D, h, w] with every cell of the second, these at 1, 1/2, 1/4 and 1/8 of their
    resolution: [B h w, 1, h, w] and smaller. (RAFT, section 3.2)"""
    batch, channels, height, width = first.shape
    products = first.flatten(2).transpose(1, 2) @ second.flatten(2) / channels**0.5
    pyramid = [products.reshape(-1, 1, height, width)]
    for _ in range(LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def look_up(pyramid: list[Tensor], at: Tensor) -> Tensor:
    """The correlations around the positions `at` [B, 2, h, w], from each level: [B, 4 * 9 * 9, h, w]."""
    batch, _, height, width = at.shape
    steps = torch.arange(-RADIUS, RADIUS + 1, device=at.device, dtype=at.dtype)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"))  # x grows down its rows: the weights expect that
    centre = at.permute(0, 2, 3, 1).reshape(-1, 2, 1, 1)
    found = [sample(level, centre / 2**i + window, "bilinear", "zeros") for i, level in enumerate(pyramid)]
    return torch.cat(found, dim=1).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def convex_upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """Eight times finer: each fine pixel is a mean of the 3x3 coarse ones around it, weighted by the softmax of the mask
    [B, 9 * 8 * 8, h, w]. (RAFT, section 3.3)"""
    batch, _, height, width = flow.shape
    weights = mask.view(batch, 1, 9, 64, height, width).softmax(dim=2)
    coarse = F.unfold(8 * flow, 3, padding=1).view(batch, 2, 9, 1, height, width)
    return F.pixel_shuffle((weights * coarse).sum(dim=2).flatten(1, 2), 8)


# From the names in torchvision's raft_large to the original's, each applied in turn; the original's stay as they are.
TORCHVISION = (
    ("feature_encoder", "fnet"), ("context_encoder", "cnet"), (r"net\.conv\.", "net.conv2."),
    (r"convnormrelu\.", "convnormrelu1."), (r"convnormrelu(.)\.0", r"conv\1"), (r"convnormrelu(.)\.1", r"norm\1"),
    ("motion_encoder", "encoder"), ("convcorr", "convc"), ("convflow", "convf"), (r"(encoder\.conv\w*)\.0", r"\1"),
    (r"recurrent_block\.convgru(.)\.conv(.)", r"gru.conv\2\1"),
    (r"mask_predictor\.convrelu\.0", "update_block.mask.0"), (r"mask_predictor\.conv", "update_block.mask.2"))


def load_raft(path: Path) -> RAFT:
    """RAFT with the published weights: the original's raft-things.pth or torchvision's raft_large, as PyTorch file or
    safetensors; ready to use and frozen."""
    raw = read_published(path, SOURCE)
    names = {}
    for key in raw:
        name = key.removeprefix("module.")
        for theirs, ours in TORCHVISION:
            name = re.sub(theirs, ours, name)
        if not re.match(r"cnet\.layer[23]\.0\.norm3\.", name):  # the original lists this norm twice, also as downsample.1
            names[name] = key
    model = RAFT()
    fill_exactly(model, {name: raw[key] for name, key in names.items()}, names, path, "RAFT (the large model)")
    return model.eval().requires_grad_(False)


# --- classical flow: nothing is learned -------------------------------------------------------------------------------

COARSEST = 48  # the whole frame is searched where its longer side has at most so many pixels,
REACH = 0.2  # for displacements up to this share of that side
FIDELITY = 30  # what a difference between the frames costs, beside a difference between neighbouring vectors
NOISE = 0.02  # differences below this, on a scale of 0 to 1, count little
WARPS, STEPS = 5, 15  # at each level of the pyramid: linearisations, and steps of the solver in each
DERIVATIVE = [1 / 12, -8 / 12, 0, 8 / 12, -1 / 12]


def classical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Flow [B, 2, H, W] between frames [B, 3, H, W], float in 0..255, from coarse to fine: matching patches at the
    coarsest level, then total variation against a data term that is gathered over a small neighbourhood and robust to
    outliers (TV-L1, Zach et al. 2007; its local-global form, Drulea and Nedevschi 2011).

    Where nothing has texture any flow would do; there it continues what is around.
    """
    if min(first.shape[-2:]) < 16:
        raise BadInput(f"Optical flow needs frames of at least 16 pixels a side, not {first.shape[3]}x{first.shape[2]}.")
    pyramid = [(first / 255, second / 255)]
    while max(pyramid[-1][0].shape[-2:]) > COARSEST:
        half = [max(side // 2, 8) for side in pyramid[-1][0].shape[-2:]]
        pyramid.append(tuple(F.interpolate(x, half, mode="bilinear", antialias=True) for x in pyramid[-1]))
    flow = search(*pyramid[-1])
    for first, second in reversed(pyramid):
        (height, width), before = first.shape[-2:], flow.shape[-2:]
        grown = torch.tensor([width / before[1], height / before[0]], device=flow.device).view(2, 1, 1)
        flow = F.interpolate(flow, (height, width), mode="bilinear") * grown
        dual = flow.new_zeros(len(flow), 2, 2, height, width)  # of the flow's gradient: [B, (x, y), (d/dx, d/dy), H, W]
        for _ in range(WARPS):
            flow, dual = refine(first, second, flow, dual)
    return flow


def search(first: Tensor, second: Tensor) -> Tensor:
    """Whole-pixel flow by exhaustive matching of patches, there and back. Where the two disagree, the pixel went out of
    sight, and the flow is what it is around."""
    there, back = best_shift(first, second), best_shift(second, first)
    returned, inside = warp(back, there)
    agree = inside * ((there + returned).norm(dim=1, keepdim=True) < 1.5) + 1e-6
    around = filtered(there * agree, gaussian(4.0)) / filtered(agree, gaussian(4.0))
    return torch.where(agree > 0.5, there, around)


def best_shift(first: Tensor, second: Tensor) -> Tensor:
    batch, channels, height, width = first.shape
    radius = max(1, round(REACH * max(height, width)))
    steps = torch.arange(-radius, radius + 1, device=first.device, dtype=first.dtype)
    shifts = torch.stack(torch.meshgrid(steps, steps, indexing="xy")).flatten(1)  # [2, n]: x, y, row by row
    shifted = F.unfold(F.pad(second, (radius,) * 4, mode="replicate"), len(steps)).view(batch, channels, -1, height, width)
    cost = filtered((shifted - first.unsqueeze(2)).abs().mean(dim=1), gaussian(1.5))  # [B, n, H, W]
    cost = cost + 0.002 * shifts.norm(dim=0).view(-1, 1, 1)  # among equals the shortest
    return shifts[:, cost.argmin(dim=1)].transpose(0, 1)


def refine(first: Tensor, second: Tensor, flow: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    """The flow that minimises |gradient of flow| + flow J flow / 2 + b flow, summed over the pixels: the data term is the
    weighted square of the frames' difference, linearised where `flow` is now. STEPS of Chambolle and Pock's
    primal-dual method, which continue from `dual`."""
    warped, inside = warp(second, flow)
    difference, mean = warped - first, (warped + first) / 2
    dx, dy = filtered(mean, DERIVATIVE, (-1,)), filtered(mean, DERIVATIVE, (-2,))
    weight = inside * FIDELITY / (difference.square().mean(dim=1, keepdim=True) + NOISE**2).sqrt()
    products = torch.stack([dx * dx, dx * dy, dy * dy, dx * difference, dy * difference], dim=1).mean(dim=2)
    xx, xy, yy, bx, by = filtered(products * weight, gaussian(1.0)).unbind(1)  # each [B, H, W]

    step, (x, y) = 8**-0.5, flow.unbind(1)  # 8 bounds the squared norm of the gradient operator
    pull = step * torch.stack([bx - xx * x - xy * y, by - xy * x - yy * y], dim=1)
    xx, yy, xy = 1 + step * xx, 1 + step * yy, step * xy
    inverse = torch.stack([yy, -xy, -xy, xx], dim=1).unflatten(1, (2, 2)) / (xx * yy - xy * xy)[:, None, None]
    ahead = flow
    for _ in range(STEPS):
        dual[:, :, 0, :, :-1] += step * (ahead[..., 1:] - ahead[..., :-1])
        dual[:, :, 1, :-1] += step * (ahead[..., 1:, :] - ahead[..., :-1, :])
        dual /= dual.square().sum(dim=2, keepdim=True).sqrt_().clamp_(min=1)
        divergence = dual.sum(dim=2)
        divergence[..., 1:] -= dual[:, :, 0, :, :-1]
        divergence[..., 1:, :] -= dual[:, :, 1, :-1]
        target = flow + step * divergence - pull
        after = (inverse * target.unsqueeze(1)).sum(dim=2)
        ahead, flow = 2 * after - flow, after
    return flow, dual


def warp(x: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """x where the flow [B, 2, H, W] points to, and whether [B, 1, H, W] that is within the frame."""
    at = pixel_grid(flow) + flow
    inside = (at >= 0).all(dim=1, keepdim=True) & (at[:, :1] <= x.shape[-1] - 1) & (at[:, 1:] <= x.shape[-2] - 1)
    return sample(x, at, "bicubic", "border"), inside


def filtered(x: Tensor, kernel: list[float], dims: tuple[int, ...] = (-1, -2)) -> Tensor:
    """x [B, C, H, W] filtered along some of its last two dims by a kernel of odd length; the border is repeated."""
    for dim in dims:
        side, radius = x.shape[dim], len(kernel) // 2
        wide = F.pad(x, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="replicate")
        x = wide.narrow(dim, 0, side) * kernel[0]
        for i, share in enumerate(kernel[1:], 1):
            x.add_(wide.narrow(dim, i, side), alpha=share)  # on a CPU faster than a convolution of one channel
    return x


def gaussian(sigma: float) -> list[float]:
    values = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(-round(2 * sigma), round(2 * sigma) + 1)]
    return [value / sum(values) for value in values]


# --- one entry to both ------------------------------------------------------------------------------------------------


class Flow:
    """Optical flow by RAFT where its weights are given, else the classical one. `name` says which, for every output that
    shows a score made of it."""

    def __init__(self, weights: str | Path | None = None, device="cpu"):
        self.device = device
        self.raft = None if weights is None else load_raft(Path(weights)).to(device)
        self.name = f"RAFT ({Path(weights).name})" if self.raft else "classical pyramidal flow: no RAFT weights were given"

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor, padded: bool = False) -> Tensor:
        """Flow [B, 2, H, W] on the estimator's device, between frames [B, 3, H, W] in 0..255, uint8 or float.

        RAFT sees them padded to multiples of 8, half on each side. padded: the flow of the padding comes back too, as
        VBench's scores have it; the classical estimator pads nothing.
        """
        if first.shape != second.shape or first.dim() != 4 or first.shape[1] != 3:
            raise ValueError(f"Flow is between two [B, 3, H, W], not {list(first.shape)} and {list(second.shape)}.")
        first, second = first.to(self.device, torch.float32), second.to(self.device, torch.float32)
        if self.raft is None:
            return classical_flow(first, second)
        height, width = first.shape[-2:]
        down, right = -height % 8, -width % 8
        left, top = right // 2, down // 2
        flow = self.raft(*(F.pad(x, (left, right - left, top, down - top), mode="replicate") for x in (first, second)))
        return flow if padded else flow[..., top : top + height, left : left + width]


def flow_magnitude(frames: np.ndarray, flow: Flow) -> np.ndarray:
    """How much moves between consecutive frames, uint8 [F, H, W, 3] -> [F - 1], in pixels: the mean of the 5% largest
    magnitudes of their flow, padding included where there is some. VBench's dynamic degree counts these."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    pairs = max(1, 2**15 // video[0, 0].numel())  # at a time: small frames together, large ones alone
    means = []
    for start in range(0, len(video) - 1, pairs):
        first, second = video[start:-1][:pairs], video[start + 1 :][:pairs]
        lengths = flow(first, second, padded=True).norm(dim=1).flatten(1)
        means.append(lengths.topk(int(0.05 * lengths.shape[1])).values.mean(dim=1).cpu())
    return torch.cat(means).numpy() if means else np.zeros(0, dtype=np.float32)
