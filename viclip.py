"""ViCLIP-L/14 (Wang et al. 2023, InternVid): how well a text describes a video. For scoring alone: nothing here trains.

VBench calls the dot product of its two unit features the overall consistency of a video and its prompt. The frames, their
preparation and the text's tokens are VBench's (vbench/overall_consistency.py and vbench/utils.py at 45e79ec).
"""

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import BadInput, fill_exactly, read_published

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
HEAD = 64  # channels of an attention head, in both encoders
SOURCE = "ViCLIP's authors publish ViClip-InternVid-10M-FLT.pth at https://huggingface.co/OpenGVLab/VBench_Used_Models."
TOKENIZER = "openai/clip-vit-large-patch14"  # on the hub


@dataclass(frozen=True)
class Sizes:
    """Those of the published ViCLIP-L/14."""

    side: int = 224  # pixels
    patch: int = 14
    frames: int = 8
    vision_width: int = 1024
    vision_layers: int = 24
    tokens: int = 32
    vocabulary: int = 49408  # the last two are the start and the end of a text
    text_width: int = 768
    text_layers: int = 12
    features: int = 768


# --- the network; its parameters bear the published names -------------------------------------------------------------


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = empty(3 * width, width), empty(3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, -1, HEAD))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, 64] each
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """[B, N, width] -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))  # CLIP's approximation of GELU


def blocks(width: int, layers: int) -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList(Block(width) for _ in range(layers))})


class VisionEncoder(nn.Module):
    """CLIP's image encoder, but attention sees the patches of all frames at once: [B, 3, T, H, W] -> [B, features]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, patch = sizes.vision_width, (1, sizes.patch, sizes.patch)
        self.conv1 = nn.Conv3d(3, width, patch, patch, bias=False)
        self.class_embedding = empty(width)
        self.positional_embedding = empty((sizes.side // sizes.patch) ** 2 + 1, width)  # the class token, then the patches
        self.temporal_positional_embedding = empty(1, sizes.frames, width)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = blocks(width, sizes.vision_layers)
        self.proj = empty(width, sizes.features)

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv1(video).flatten(3).permute(0, 2, 3, 1)  # [B, T, N, width]
        x = x + self.positional_embedding[1:] + self.temporal_positional_embedding[0, :, None]
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)  # one for the whole video
        x = self.ln_pre(torch.cat([first, x.flatten(1, 2)], dim=1))  # [B, 1 + T N, width]
        for block in self.transformer["resblocks"]:
            x = block(x, causal=False)
        return self.ln_post(x[:, 0]) @ self.proj


class TextEncoder(nn.Module):
    """CLIP's: token ids [B, N] that end in the end token -> [B, features]. A token sees those before it, so it does not
    matter whether a text is padded behind its end."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.text_width
        self.token_embedding = nn.Embedding(sizes.vocabulary, width)
        self.positional_embedding = empty(sizes.tokens, width)
        self.transformer = blocks(width, sizes.text_layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = empty(width, sizes.features)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer["resblocks"]:
            x = block(x, causal=True)
        return self.ln_final(x[:, -1]) @ self.text_projection


class ViCLIP(nn.Module):
    """load_viclip() makes one; as constructed its weights are not set."""

    def __init__(self, sizes: Sizes = Sizes(), tokenizer=None):
        super().__init__()
        self.sizes, self.tokenizer = sizes, tokenizer
        self.vision_encoder, self.text_encoder = VisionEncoder(sizes), TextEncoder(sizes)
        self.temp = empty()  # the temperature of its training; a score needs none

    @torch.no_grad()
    def video(self, frames: np.ndarray) -> Tensor:
        """The unit feature [768] of a video, uint8 [F, H, W, 3]: of 8 of its frames."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"A video is uint8 [F, H, W, 3], not {frames.dtype} {list(frames.shape)}.")
        if not len(frames):
            raise BadInput("A video without frames has no overall consistency with a text.")
        chosen = torch.as_tensor(frames[middle_frames(len(frames), self.sizes.frames)], device=self.temp.device)
        pixels = prepare(chosen.permute(0, 3, 1, 2), self.sizes.side)
        return F.normalize(self.vision_encoder(pixels.transpose(0, 1)[None])[0], dim=-1)

    def ids(self, text: str) -> list[int]:
        """At most 32 tokens, the start and the end among them; of a longer text the first 30 between them.

        The published tokenizer first repairs the text with ftfy. Of that we do what prompts need: HTML entities become
        characters, curly quotes straight and full-width ASCII plain; white space, lower case and composed accents are left
        to the tokenizer. What ftfy also does and we do not: it undoes wrong decoding, splits ligatures and drops control
        characters. (And a Greek sigma that ends a word is lower-cased as any other.) All prompts that VBench ships get the
        published ids.
        """
        text = html.unescape(html.unescape(text)).translate(PLAIN)
        ids = self.tokenizer(text, truncation=True, max_length=self.sizes.tokens)["input_ids"]
        return ids[: ids.index(self.sizes.vocabulary - 1) + 1]  # a text may itself spell <|endoftext|>: there it ends

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """The unit feature [768] of a text."""
        ids = torch.tensor([self.ids(text)], device=self.temp.device)
        return F.normalize(self.text_encoder(ids)[0], dim=-1)

    def overall_consistency(self, frames: np.ndarray, text: str) -> float:
        """VBench's score of a video, uint8 [F, H, W, 3], and its prompt: the cosine of their features, in -1..1."""
        return (self.video(frames) @ self.text(text)).item()


# --- what it is shown -------------------------------------------------------------------------------------------------

PLAIN = {c: "'" for c in (0x2bc, *range(0x2018, 0x201c))} | {c: '"' for c in range(0x201c, 0x2020)}  # curly quotes
PLAIN |= {c: c - 0xfee0 for c in range(0xff01, 0xff5f)}  # full-width ASCII


def middle_frames(total: int, count: int) -> list[int]:
    """The frame in the middle of each of `count` equal parts of a video. Where it has fewer frames: all of them, and the
    last one again until there are enough."""
    parts = min(count, total)
    bounds = [total * i // parts for i in range(parts + 1)]
    chosen = [(start + end - 1) // 2 for start, end in zip(bounds, bounds[1:])]
    return chosen + chosen[-1:] * (count - parts)


def prepare(frames: Tensor, side: int) -> Tensor:
    """uint8 [F, 3, H, W] -> normalised [F, 3, side, side]. The shorter side becomes `side`, by bicubic interpolation
    without antialiasing (it steps over pixels where it shrinks) and rounded to 8 bits again; then the centre is cut out."""
    height, width = frames.shape[-2:]
    shorter = min(height, width)
    size = [int(side * height / shorter), int(side * width / shorter)]
    x = F.interpolate(frames.float(), size, mode="bicubic", align_corners=False).clamp(0, 255).round()
    top, left = (round((length - side) / 2) for length in size)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x[..., top : top + side, left : left + side] / 255 - mean) / std


# --- the published files ----------------------------------------------------------------------------------------------


def load_tokenizer(where: str | Path, vocabulary: int):
    """CLIP's tokenizer, from a folder or the hub."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(where)
        start, *_, end = tokenizer("a video")["input_ids"]
        if len(tokenizer) < 3:  # as transformers makes one of nothing, where there is no network
            raise ValueError("it has no vocabulary")
    except Exception as error:  # no such folder, no network, other files: each has its class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{where} gave no CLIP tokenizer ({reason}); put the vocab.json and merges.txt of {TOKENIZER} beside the "
                       f"weights, or try again where there is a network.") from error
    if (start, end, len(tokenizer)) != (vocabulary - 2, vocabulary - 1, vocabulary):
        raise BadInput(f"The tokenizer {where} is not CLIP's, which ViCLIP was trained with: it has {len(tokenizer)} tokens "
                       f"instead of {vocabulary}. Use that of {TOKENIZER}.")
    return tokenizer


def load_viclip(path: str | Path, tokenizer: str | Path = TOKENIZER, sizes: Sizes = Sizes()) -> ViCLIP:
    """ViCLIP with the published weights (ViClip-InternVid-10M-FLT.pth, or safetensors), ready to use and frozen.
    tokenizer: folder or hub id of CLIP's."""
    tensors = read_published(Path(path), SOURCE, inside="model")
    vocabulary = load_tokenizer(tokenizer, sizes.vocabulary)
    with torch.device("meta"):
        model = ViCLIP(sizes, vocabulary)
    model.to_empty(device="cpu")  # nothing is drawn at random that the file then replaces
    fill_exactly(model, tensors, {key: key for key in tensors}, Path(path), "ViCLIP-L/14")
    return model.eval().requires_grad_(False)
