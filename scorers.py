"""What is scored and how: the formulas of VBench (dynamic degree, consistency) and of DreamBooth (DINO-I, CLIP-I, CLIP-T),
on features of CLIP, DINO and the networks in flow.py, amt.py and viclip.py. Frames are uint8 [F, H, W, 3].
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import amt
import checkpoint
import flow
import viclip
from encoders import ImageEncoder, find, image_settings, load_network, load_tokenizer
from media import fit, image_to_tensor

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
PUBLISHED = {  # hub ids; the networks of our own code have their source in flow.py (RAFT), amt.py, viclip.py and i3d.py
    "dino-b16": "facebook/dino-vitb16",  # VBench's subject consistency
    "dino-s16": "facebook/dino-vits16",  # DreamBooth's DINO-I
    "clip-b32": "openai/clip-vit-base-patch32",  # VBench's background consistency, DreamBooth's CLIP-I and CLIP-T
}


# --- formulas ---------------------------------------------------------------------------------------------------------


def consistency(features: Tensor) -> float:
    """VBench's, of unit features [T, D] of T frames: from the second frame on, half of the cosine to the frame before and half
    of that to the first, each at least 0; their mean. NaN for a single frame, which is consistent with nothing."""
    if len(features) < 2:
        return float("nan")
    before = (features[1:] * features[:-1]).sum(dim=-1).clamp(min=0)
    first = (features[1:] * features[:1]).sum(dim=-1).clamp(min=0)
    return ((before + first) / 2).mean().item()


def at_8_fps(frames: np.ndarray, fps: float) -> np.ndarray:
    """The frames that dynamic degree looks at."""
    return frames[:: max(1, round(fps / 8))]


def moves(frames: np.ndarray, fps: float, magnitudes: Callable[[np.ndarray], np.ndarray]) -> float:
    """VBench's dynamic degree of one video, 1 or 0: does the fastest 5% of the pixels move by more than 6 of 256 pixels between
    enough pairs of frames, 4 of 16? NaN for fewer than three frames, for which the formula would ask for no moving pair. magnitudes: frames
    [T, H, W, 3] -> [T - 1], in pixels."""
    frames = at_8_fps(frames, fps)
    if len(frames) < 3:
        return float("nan")
    threshold, enough = 6 * min(frames.shape[1:3]) / 256, round(4 * len(frames) / 16)
    return float((magnitudes(frames) > threshold).sum() >= enough)


def bootstrap(values: list[float], of: list[str] | None = None, seed: int = 0, resamples: int = 2000, level: float = 0.95
              ) -> tuple[float, float, float]:
    """Mean, and the bounds of the percentile bootstrap's confidence interval. of: the subject of each value; subjects are drawn anew,
    each with all of its values, as eighteen videos of one dog are not eighteen independent ones. What is not a number is left out."""
    known, of = np.isfinite(values), np.asarray(range(len(values)) if of is None else of)
    if not known.any():
        return (float("nan"),) * 3
    values = np.asarray(values)[known]
    subjects, number = np.unique(of[known], return_inverse=True)
    if len(subjects) < 2:  # of a single one nobody can say how much it tells of others
        return float(values.mean()), float("nan"), float("nan")
    sums, counts = np.bincount(number, values), np.bincount(number)
    drawn = np.random.default_rng(seed).integers(len(subjects), size=(resamples, len(subjects)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


# --- published networks -----------------------------------------------------------------------------------------------


def normalized(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """[B, 3, H, W] in 0..1 -> with the networks' mean and deviation."""
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def resized(frames: np.ndarray, side: int, mode: str) -> Tensor:
    """[T, 3, h, w] in 0..1, the shorter side at `side`, without antialiasing, as VBench does it on float tensors."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[-2:]
    size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    return F.interpolate(pixels, size, mode=mode, align_corners=False)


def centre(pixels: Tensor, side: int) -> Tensor:
    top, left = round((pixels.shape[-2] - side) / 2), round((pixels.shape[-1] - side) / 2)
    return pixels[..., top : top + side, left : left + side]


class DINO:
    """DINO's ViT: unit class tokens."""

    def __init__(self, name: str, device="cpu"):
        self.device, folder = device, checkpoint.resolve(name, ("pytorch_model.bin",))
        self.vit = load_network(folder, "ViTModel", torch.float32, ignore=("pooler.",), pickled=True).to(device)
        self.vit.embeddings.interpolate_pos_encoding = self.positions

    def positions(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings for another size, interpolated as the authors' code does it, by a factor that is a tenth of a
        patch too large: transformers' own go to the exact size and differ a little."""
        known, patch = self.vit.embeddings.position_embeddings, self.vit.config.patch_size
        n = round((known.shape[1] - 1) ** 0.5)
        rows, columns = height // patch, width // patch
        if rows == columns == n and height == width:
            return known
        grid = known[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / n, (columns + 0.1) / n), mode="bicubic")
        return torch.cat([known[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels [T, 3, H, W] in 0..1 -> [T, D]"""
        pixels = normalized(pixels, *IMAGENET).to(self.device)
        tokens = self.vit(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return F.normalize(tokens[:, 0], dim=-1).cpu()


class CLIP:
    """CLIP: unit features of pictures and texts."""

    def __init__(self, name: str, device="cpu"):
        self.device, folder = device, checkpoint.resolve(name, ("pytorch_model.bin",))
        self.network = load_network(folder, "CLIPModel", torch.float32, pickled=True).to(device)
        self.tokenizer = load_tokenizer(folder)
        self.side, *self.statistics = image_settings(folder)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels [T, 3, side, side] in 0..1 -> [T, D]"""
        pixels = normalized(pixels, *self.statistics).to(self.device)
        return F.normalize(self.network.visual_projection(self.network.vision_model(pixels).pooler_output), dim=-1).cpu()

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """[D]"""
        ids = self.tokenizer([text], padding=True, truncation=True, return_tensors="pt").to(self.device)
        return F.normalize(self.network.text_projection(self.network.text_model(**ids).pooler_output), dim=-1)[0].cpu()


def pictures(images: list[Image.Image], side: int) -> Tensor:
    """Still pictures for DINO-I, CLIP-I and CLIP-T: the shorter side resized to `side`, bicubic and antialiased, the middle
    cut out: [N, 3, side, side] in 0..1."""
    fitted = []
    for image in images:
        short = min(image.size)  # the longer side is rounded down, as torchvision and transformers do
        image = image.convert("RGB").resize([side * length // short for length in image.size], Image.Resampling.BICUBIC)
        fitted.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    return torch.stack([centre(picture, side) for picture in fitted])


class Similarity:
    """Cosines of features: CLIP's of a picture and a text, DINO's of two pictures. Both networks are the checkpoint's own,
    or the hub's where it has none."""

    def __init__(self, model: Path, device="cpu"):
        self.clip, self.encoder = CLIP(str(find(model, "clip")), device), ImageEncoder(model, "dino")
        self.encoder.network.to(device)

    def clip_features(self, images: list[Image.Image]) -> Tensor:
        """CLIP's unit features of pictures [N, D]."""
        side = self.clip.side
        return self.clip(torch.stack([(image_to_tensor(fit(image, side, side, "crop")) + 1) / 2 for image in images]))

    def text(self, images: list[Image.Image], text: str) -> list[float]:
        """CLIP's cosine of each picture and the text."""
        return (self.clip_features(images) @ self.clip.text(text)).tolist()

    def dino_features(self, images: list[Image.Image]) -> Tensor:
        """DINO's class tokens [N, D], of length 1."""
        return F.normalize(self.encoder(images)[:, 0], dim=-1).cpu()

    def identity(self, one: list[Image.Image], two: list[Image.Image]) -> list[float]:
        """DINO's cosine of each pair."""
        return (self.dino_features(one) * self.dino_features(two)).sum(dim=-1).tolist()


# --- all of them, for one video ---------------------------------------------------------------------------------------


TITLES = {  # a score's name, and what tables call it; higher is better for all of them
    "dino_i": "DINO-I", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "viclip": "ViCLIP", "dynamic": "Dynamic degree",
    "smoothness": "Motion smoothness", "subject": "Subject consistency", "background": "Background consistency",
    "identity": "identity (exact)", "own_look": "identity in its own look (exact)", "motion": "motion (exact)",
    "background_exact": "background (exact)", "look": "look (exact)", "movement": "movement (exact)",
}


class Scorers:
    """The networks that are there, and in `missing`, for each score that lacks one, what it needs; `by` says whose a score is.

    own: a checkpoint whose own CLIP and DINO stand in for the published ones (the toy's), as a classical estimator of flow does for RAFT.
    raft, amt, viclip: published weights.
    """

    def __init__(self, device="cpu", own: Path | None = None, published: dict[str, str] | None = None, raft: Path | None = None,
                 amt: Path | None = None, viclip: Path | None = None):
        self.device, self.missing, self.by = device, {}, {}
        self.of: dict[str, Callable] = {}  # features: of frames or pictures, unit vectors [T, D]; of texts, [D]
        names = {**PUBLISHED, **(published or {})}
        if own is not None:
            self.try_to(("dino_i", "clip_i", "clip_t", "subject", "background"), f"{own}'s own", lambda: self.use_own(own))
        else:
            self.try_to(("subject",), names["dino-b16"], lambda: self.use_dino("subject", names["dino-b16"]))
            self.try_to(("dino_i",), names["dino-s16"], lambda: self.use_dino("dino", names["dino-s16"]))
            self.try_to(("clip_i", "clip_t", "background"), names["clip-b32"], lambda: self.use_clip(names["clip-b32"]))
        self.try_to(("dynamic",), "flow", lambda: self.use_flow(raft, own))
        self.try_to(("smoothness",), "AMT-S", lambda: self.use_amt(amt))
        self.try_to(("viclip",), "ViCLIP", lambda: self.use_viclip(viclip))

    def try_to(self, scores: tuple[str, ...], by: str, use: Callable[[], str | None]) -> None:
        """Loads a network, which may say by what name, or notes what is missing and goes on."""
        try:
            by = use() or by
        except checkpoint.BadInput as error:
            self.missing |= {score: str(error) for score in scores}
        else:
            self.by |= {score: by for score in scores}

    def use_own(self, model: Path) -> None:
        folder = checkpoint.resolve(str(model))
        for part in ("clip", "dino"):
            if checkpoint.part(folder, part) is None:  # the hub's, which other checkpoints fall back to, would go by a wrong name
                raise checkpoint.BadInput(f"{model} has no {part} of its own")
        likeness = Similarity(folder, self.device)
        stack = lambda frames: [Image.fromarray(frame) for frame in frames]
        self.of |= {"subject": lambda frames: likeness.dino_features(stack(frames)), "dino": likeness.dino_features,
                    "background": lambda frames: likeness.clip_features(stack(frames)), "clip": likeness.clip_features,
                    "text": likeness.clip.text}

    def use_dino(self, part: str, name: str) -> None:
        dino = DINO(name, self.device)
        self.of[part] = (lambda frames: dino(resized(frames, 224, "bilinear"))) if part == "subject" else (
            lambda images: dino(pictures(images, 224)))

    def use_clip(self, name: str) -> None:
        clip = CLIP(name, self.device)
        self.of |= {"clip": lambda images: clip(pictures(images, clip.side)), "text": clip.text,
                    "background": lambda frames: clip(centre(resized(frames, clip.side, "bicubic"), clip.side))}

    def use_flow(self, weights: Path | None, own: Path | None) -> str:
        if weights is None and own is None:  # beside the papers' own rows stands no other estimator's number
            raise checkpoint.BadInput(f"it needs RAFT's published weights: --raft raft-things.pth. {flow.SOURCE}")
        estimator = flow.Flow(weights, self.device)
        self.of["dynamic"] = lambda frames, fps: moves(frames, fps, lambda shown: flow.flow_magnitude(shown, estimator))
        return estimator.name

    def use_amt(self, weights: Path | None) -> None:
        if weights is None:
            raise checkpoint.BadInput(f"it needs AMT-S's published weights: --amt amt-s.pth. {amt.SOURCE}")
        network = amt.load_amt(weights).to(self.device)
        self.of["smoothness"] = lambda frames: amt.motion_smoothness(frames, network, self.device)

    def use_viclip(self, weights: Path | None) -> None:
        if weights is None:
            raise checkpoint.BadInput(f"it needs ViCLIP's published weights: --viclip ViClip-InternVid-10M-FLT.pth. {viclip.SOURCE}")
        beside = (weights.parent / "vocab.json").exists()  # CLIP's tokenizer, where the hub cannot be asked
        network = viclip.load_viclip(weights, *([weights.parent] if beside else [])).to(self.device)
        self.of["viclip"] = network.overall_consistency

    def __call__(self, frames: np.ndarray, fps: float, text: str, subject: Image.Image | None) -> tuple[dict[str, float], dict[str, str]]:
        """The scores of one video, cosines and shares of 1; and why others were not measured: RAFT and AMT-S need frames of 128
        pixels, AMT-S three of them."""
        of, found, without, images = self.of, {}, {}, [Image.fromarray(frame) for frame in frames]
        for name, given in (("dynamic", (frames, fps)), ("smoothness", (frames,))):
            if name in of:
                try:
                    found[name] = of[name](*given)
                except checkpoint.BadInput as error:
                    without[name] = str(error)
        if np.isnan(found.get("dynamic", 0)):
            del found["dynamic"]
            without["dynamic"] = f"at 8 frames a second {len(at_8_fps(frames, fps))} are left of it, and three are needed"
        for part in ("subject", "background"):
            if part in of:
                found[part] = consistency(of[part](frames))
        if "dino" in of and subject is not None:
            found["dino_i"] = (of["dino"](images) @ of["dino"]([subject])[0]).mean().item()
        if "clip" in of:
            many = of["clip"](images)
            found["clip_t"] = (many @ of["text"](text)).mean().item()
            if subject is not None:
                found["clip_i"] = (many @ of["clip"]([subject])[0]).mean().item()
        if "viclip" in of:
            found["viclip"] = of["viclip"](frames, text)
        for name in [name for name, value in found.items() if not np.isfinite(value)]:
            without[name] = f"it came out as {found.pop(name)}"
        return found, without
