"""CogVideoX's MM-DiT with both kinds of subject conditioning, loading the official safetensors.

One sequence, full attention (SUGAR Figure 2, Switch Figure 2):

    DINO | CLIP | text | reference | video        Switch uses the reference, SUGAR the DINO and CLIP tokens, CogVideoX neither

Two experts, that is two sets of adaptive-norm parameters: DINO, CLIP and text tokens pass the text's, reference and video
tokens the video's. All other weights are shared by all tokens. Names of modules are those of the official checkpoints.
"""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from attention import DESIGNS, apply_rotary, apply_rotary_, attention, may_overwrite, rotary_3d, selective_segments
from checkpoint import BadInput
from lora import Adapter, LoRALinear, load_adapter, merge, on_tokens, without_lora

Lengths = tuple[int, int, int]  # tokens of the text (with DINO and CLIP before it), of the reference, and of the video
SUGAR_PARTS = ("dino_proj.", "clip_proj.", "null_dino", "null_clip")  # what SUGAR adds to a CogVideoX checkpoint


@dataclass(frozen=True)
class Config:
    """The official config.json (the defaults are the 2b's), and after it what SUGAR adds."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    attention_bias: bool = True
    sample_width: int = 90  # in latents
    sample_height: int = 60
    sample_frames: int = 49  # in pixel frames
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True
    # SUGAR: widths of the DINO and CLIP tokens (None: no SUGAR), their numbers, and the attention design.
    dino_dim: int | None = None
    clip_dim: int | None = None
    dino_tokens: int = 257
    clip_tokens: int = 257
    design: str = "b"

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def sample_latents(self) -> tuple[int, int, int]:
        """[T, H, W] of the latents that the checkpoint was made for."""
        return (self.sample_frames - 1) // self.temporal_compression_ratio + 1, self.sample_height, self.sample_width

    @property
    def patch_t(self) -> int:
        """Latent frames in a patch: 1, or 2 in CogVideoX 1.5."""
        return self.patch_size_t or 1

    @property
    def image_to_video(self) -> bool:
        """Whether the model takes the first frame's latents beside the noisy ones, as extra channels."""
        return self.in_channels == 2 * self.out_channels

    @property
    def sugar(self) -> bool:
        return self.dino_dim is not None


# What every official config says; another value would need code that is not here.
FIXED = {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0,
         "norm_elementwise_affine": True, "dropout": 0.0}


class PatchEmbed(nn.Module):
    """Latents to video tokens, text features to text tokens; learned or sinusoidal positions where there is no rotary."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, p = config, config.patch_size
        if config.patch_size_t is None:
            self.proj = nn.Conv2d(config.in_channels, config.dim, p, stride=p, bias=config.patch_bias)
        else:  # patch_bias is off in 1.5's config, yet the official weights have this bias
            self.proj = nn.Linear(config.in_channels * p * p * config.patch_size_t, config.dim)
        self.text_proj = nn.Linear(config.text_embed_dim, config.dim)
        if config.use_learned_positional_embeddings:
            tokens = math.prod(patch_grid(config, *config.sample_latents))
            self.register_buffer("pos_embedding", torch.zeros(1, config.max_text_seq_length + tokens, config.dim))

    def patches(self, x: Tensor, lora: bool = True) -> Tensor:
        """x [B, T, C, H, W] -> tokens [B, T/patch_t * H/2 * W/2, dim]. lora: whether a LoRA on the projection acts."""
        config, p = self.config, self.config.patch_size
        proj = self.proj if lora else lambda patch: without_lora(self.proj, patch)
        if config.patch_size_t is None:
            return proj(x.flatten(0, 1)).flatten(2).transpose(1, 2).reshape(x.shape[0], -1, config.dim)
        B, T, C, H, W = x.shape
        x = x.reshape(B, T // config.patch_t, config.patch_t, C, H // p, p, W // p, p)
        return proj(x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4, 7).flatten(1, 3))  # features: C, patch_t, p, p

    def positions(self, frames: int, height: int, width: int, like: Tensor) -> Tensor | None:
        """What is added to the video tokens of [frames, height, width] latents, [1, tokens, dim], or None."""
        config = self.config
        if config.use_rotary_positional_embeddings and not config.use_learned_positional_embeddings:
            return None
        if not config.use_learned_positional_embeddings:
            return sincos_3d(*patch_grid(config, frames, height, width), config.dim, config.spatial_interpolation_scale,
                             config.temporal_interpolation_scale, str(like.device), like.dtype)[None]
        if (frames, height, width) != config.sample_latents:
            raise ValueError(f"This model's positions are learned for latents of {config.sample_latents}, not {(frames, height, width)}.")
        return self.pos_embedding[:, config.max_text_seq_length :].to(like)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_features: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, dim], through cosines and sines of in_features / 2 frequencies from 1 down to 1/10000."""
        half = self.linear_1.in_features // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angle = t[:, None].float() * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class AdaLayerNormZero(nn.Module):
    """The expert adaptive norm: shift, scale and gate from the timestep, one triple for the video, one for the text.

    The reference takes the video's triple. With norm_lora = "reference" only the reference's triple comes from the adapted
    linear layer, the others from the base's (Switch 3.3); with "all" everybody passes the adapted one.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.norm_lora = "reference"
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, lengths: Lengths, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [B, L, dim], text, reference and video -> x normed, and the gate [B, 1, dim] of each."""
        temb = F.silu(temb)
        adapted = self.linear(temb)
        base = adapted if self.norm_lora == "all" else without_lora(self.linear, temb)
        modulation = lambda y: y.unsqueeze(1).chunk(6, dim=-1)  # shift, scale and gate of the video, then of the text: [B, 1, dim] each
        of_base, of_adapted = modulation(base), modulation(adapted)
        triples = of_base[3:], of_adapted[:3], of_base[:3]  # text, reference, video
        x = self.norm(x)
        parts, gates = split(x, lengths), [gate for _, _, gate in triples]
        if may_overwrite():
            for part, (shift, scale, _) in zip(parts, triples):
                torch.addcmul(shift, part, 1 + scale, out=part)
            return x, gates
        return torch.cat([torch.addcmul(shift, part, 1 + scale) for part, (shift, scale, _) in zip(parts, triples)], dim=1), gates


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.dim, config.dim, bias=config.attention_bias) for _ in range(3))
        self.norm_q, self.norm_k = (nn.LayerNorm(config.attention_head_dim, eps=1e-6) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])
        self.attend = attention  # distributed.py puts another in its place when a sequence is split among ranks

    def forward(self, x: Tensor, rotary: Tensor | None, segments, key_mask: Tensor | None, lora: slice | None) -> Tensor:
        """x [B, L, dim]; rotary [.., tokens, d]: rotary positions of the last tokens of the sequence."""
        q, k, v = (on_tokens(to, x, lora).unflatten(-1, (self.heads, -1))  # [B, L, heads, d]
                   for to in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = (self.rotate(y, x.shape[1] - rotary.shape[-2], rotary.unsqueeze(-2)) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, heads, L, d]
        return on_tokens(self.to_out[0], self.attend(q, k, v, segments, key_mask).transpose(1, 2).flatten(2), lora)

    def rotate(self, y: Tensor, still: int, rotary: Tensor) -> Tensor:
        """y [B, L, heads, d] with all tokens turned but the first `still`."""
        if may_overwrite():
            apply_rotary_(y[:, still:], rotary)
            return y
        return torch.cat([y[:, :still], apply_rotary(y[:, still:], rotary)], dim=1)


class GELU(nn.Module):
    """The linear alone, under the name of the official weights, ff.net.0.proj: FeedForward applies the function."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, inner)


class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        inner = 4 * config.dim
        self.net = nn.ModuleList([GELU(config.dim, inner), nn.Identity(), nn.Linear(inner, config.dim)])

    def forward(self, x: Tensor, lora: slice | None) -> Tensor:
        inner = on_tokens(self.net[0].proj, x, lora)
        if lora is None and isinstance(self.net[2], LoRALinear) and torch.is_grad_enabled():
            return self.net[2](inner, gelu=True)  # computes it once more in the backward pass, so that it need not be kept
        # The largest tensor of all: fresh memory for it would take longer than the function itself.
        inner = (torch.ops.aten.gelu_ if may_overwrite() else F.gelu)(inner, approximate="tanh")
        return on_tokens(self.net[2], inner, lora)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = AdaLayerNormZero(config)
        self.attn1 = Attention(config)
        self.norm2 = AdaLayerNormZero(config)
        self.ff = FeedForward(config)

    def forward(self, x: Tensor, lengths: Lengths, temb: Tensor, rotary: Tensor | None, segments, key_mask: Tensor | None,
                lora: slice | None) -> Tensor:
        """x [B, L, dim] -> the same, updated; where no gradient is asked for, in place.

        rotary: see Attention. segments: of attention.selective_segments(). key_mask: [B, L] bool, which tokens may be attended to; None
        is all. lora: the tokens on which adapted attention and feed-forward layers act; None is all.
        """
        normed, gates = self.norm1(x, lengths, temb)
        x = add_gated(x, self.attn1(normed, rotary, segments, key_mask, lora), gates, lengths)
        normed, gates = self.norm2(x, lengths, temb)
        return add_gated(x, self.ff(normed, lora), gates, lengths)


def split(x: Tensor, lengths: Lengths) -> list[Tensor]:
    """The text's, the reference's and the video's part of x, the reference's copied: Switch learns its shifts, scales and gates, so the
    backward pass keeps what they are applied to, and a mere view would keep all of x."""
    text, reference, video = x.split(lengths, dim=1)
    return [text, reference if may_overwrite() else reference.clone(), video]


def add_gated(x: Tensor, update: Tensor, gates: list[Tensor], lengths: Lengths) -> Tensor:
    """x + gate * update, each part of the sequence with its own gate."""
    parts = list(zip(x.split(lengths, dim=1), gates, split(update, lengths)))
    if may_overwrite():
        for part, gate, more in parts:
            part.addcmul_(gate, more)
        return x
    return torch.cat([torch.addcmul(part, gate, more) for part, gate, more in parts], dim=1)


class NormOut(nn.Module):
    """The last adaptive norm, video tokens only."""

    def __init__(self, config: Config):
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.lora_tokens = "all"  # on whom adapted layers other than the norms act; see use_adapter()
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimestepEmbedding(config.dim, config.time_embed_dim)
        if config.ofs_embed_dim:
            self.ofs_embedding = TimestepEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
        if config.sugar:
            self.dino_proj = nn.Linear(config.dino_dim, config.dim)
            self.clip_proj = nn.Linear(config.clip_dim, config.dim)
            self.null_dino = nn.Parameter(torch.zeros(config.dino_dim))  # the papers' empty set with index D
            self.null_clip = nn.Parameter(torch.zeros(config.clip_dim))
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.dim, config.norm_eps)
        self.norm_out = NormOut(config)
        self.proj_out = nn.Linear(config.dim, config.patch_size**2 * config.patch_t * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, reference: Tensor | None = None, dino: Tensor | None = None,
                clip: Tensor | None = None, keep_dino: Tensor | None = None, keep_clip: Tensor | None = None,
                keep_reference: Tensor | None = None) -> Tensor:
        """Predicts v, [B, T, 16, H/8, W/8].

        x          [B, T, C, H/8, W/8] noisy latents; T a multiple of patch_t. An image-to-video model takes the first
                   frame's latents in channels 16..31.
        t          [B] timesteps, 0..999
        text       [B, M, text_embed_dim] T5 features
        reference  [B, 16, H/8, W/8] latents of the subject's image (Switch)
        dino, clip [B, N, D] tokens of the identity image (SUGAR); None is null for the whole batch
        keep_dino, keep_clip  [B] bool: False puts the null embedding in that sample's place
        keep_reference  [B, tokens of the reference] bool: False takes that token out of the sequence (Switch 3.4)
        """
        config = self.config
        B, T, _, H, W = x.shape
        temb = self.time_embedding(t)
        if config.ofs_embed_dim:
            temb = temb + self.ofs_embedding(torch.full((1,), 2.0, device=x.device))  # 1.5-I2V was trained with 2 alone

        only_reference = self.lora_tokens == "reference"
        text = on_tokens(self.patch_embed.text_proj, text, slice(0, 0) if only_reference else None)
        video = self.patch_embed.patches(x, lora=not only_reference)
        positions = self.patch_embed.positions(T, H, W, like=video)
        if positions is not None:
            video = video + positions
        if config.use_learned_positional_embeddings:  # the text's are learned as well
            text = text + self.patch_embed.pos_embedding[:, : text.shape[1]].to(text)
        reference = video[:, :0] if reference is None else self.patch_embed.patches(reference[:, None])

        segments = None
        if config.sugar:
            if reference.shape[1]:
                raise ValueError("SUGAR's model takes no reference: to join both papers, give it a group of its own in attention.py.")
            image = torch.cat([self.image_tokens(dino, keep_dino, self.dino_proj, self.null_dino, config.dino_tokens, B),
                               self.image_tokens(clip, keep_clip, self.clip_proj, self.null_clip, config.clip_tokens, B)],
                              dim=1)
            first = math.prod(patch_grid(config, config.patch_t, H, W))
            segments = selective_segments(config.design, (image.shape[1], text.shape[1], first, video.shape[1] - first))
            text = torch.cat([image, text], dim=1)

        rotary = None
        if config.use_rotary_positional_embeddings:
            rotary = self.rotary(T, H, W, reference.shape[1] > 0, x.device)
        key_mask = None
        if keep_reference is not None:  # a token that nobody may attend to is as good as gone
            if rotary is not None:  # and where all are gone, the video is frames 0..T-1, as in the base
                alone = self.rotary(T, H, W, False, x.device)
                alone = torch.cat([alone[:1].expand(reference.shape[1], -1), alone])
                rotary = torch.where(keep_reference.any(dim=1)[:, None, None], rotary, alone)  # [B, tokens, d]
            before, after = (torch.ones(B, part.shape[1], dtype=torch.bool, device=x.device) for part in (text, video))
            key_mask = torch.cat([before, keep_reference, after], dim=1)
        lora = slice(text.shape[1], text.shape[1] + reference.shape[1]) if only_reference else None
        lengths, sequence = (text.shape[1], reference.shape[1], video.shape[1]), torch.cat([text, reference, video], dim=1)
        for block in self.transformer_blocks:
            sequence = block(sequence, lengths, temb, rotary, segments, key_mask, lora)
        video = sequence[:, -lengths[2] :]
        return self.unpatchify(self.proj_out(self.norm_out(self.norm_final(video), temb)), T, H, W)

    def image_tokens(self, features: Tensor | None, keep: Tensor | None, proj: nn.Linear, null: Tensor, count: int,
                     batch: int) -> Tensor:
        """Projected DINO or CLIP tokens [B, N, dim], the null embedding broadcast where there are none to keep."""
        if features is None:
            return proj(null.expand(batch, count, -1))
        if keep is not None:
            features = torch.where(keep[:, None, None], features, null.to(features.dtype))
        return proj(features)

    def rotary(self, T: int, H: int, W: int, with_reference: bool, device) -> Tensor:
        """Positions of [reference; video]: the reference is frame 0 and the video frames 1..T; alone, the video is 0..T-1."""
        config, p = self.config, self.config.patch_size
        frames, height, width = patch_grid(config, T, H, W)
        base = (config.sample_height // p, config.sample_width // p) if config.patch_size_t is None else None
        return rotary_on(frames + with_reference, height, width, config.attention_head_dim, base, str(device))

    def unpatchify(self, x: Tensor, T: int, H: int, W: int) -> Tensor:
        """Tokens [B, L, patch features] -> [B, T, 16, H, W]."""
        config, p = self.config, self.config.patch_size
        x = x.unflatten(1, patch_grid(config, T, H, W)).unflatten(-1, (config.out_channels, config.patch_t, p, p))
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)

    def merge_adapter(self) -> None:
        """Folds the adapter into the layers that it acts on for all tokens, which then cost what they cost without it. The others, such
        as the norms', keep it beside them."""
        for module in list(self.modules()):
            if (module.norm_lora if isinstance(module, AdaLayerNormZero) else self.lora_tokens) == "all":
                for layer in module.children():
                    merge(layer)

    def set_lora_tokens(self, norm_lora: str, lora_tokens: str) -> None:
        """Who passes the adapted norms, and who the other adapted layers: "all" or "reference" tokens."""
        self.lora_tokens = lora_tokens
        for module in self.modules():
            if isinstance(module, AdaLayerNormZero):
                module.norm_lora = norm_lora


# --- positions --------------------------------------------------------------------------------------------------------


def patch_grid(config: Config, T: int, H: int, W: int) -> tuple[int, int, int]:
    """Patches in time, height and width of [T, H, W] latents."""
    return T // config.patch_t, H // config.patch_size, W // config.patch_size


@lru_cache(maxsize=8)
def rotary_on(frames: int, height: int, width: int, dim: int, base: tuple[int, int] | None, device: str) -> Tensor:
    return rotary_3d(frames, height, width, dim, base).to(device)


@lru_cache(maxsize=8)
def sincos_3d(frames: int, height: int, width: int, dim: int, spatial_scale: float, temporal_scale: float, device: str = "cpu",
              dtype: torch.dtype = torch.float32) -> Tensor:
    """The 2b's positions, [frames * height * width, dim]: a quarter for time, then three eighths each for width, height."""
    axes = []
    for length, part, scale in ((frames, dim // 4, temporal_scale), (width, dim // 8 * 3, spatial_scale),
                                (height, dim // 8 * 3, spatial_scale)):
        frequency = 1.0 / 10000 ** (torch.arange(part // 2, dtype=torch.float64) / (part // 2))
        angle = torch.outer(torch.arange(length) / scale, frequency)
        axes.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    t, w, h = axes
    grid = (frames, height, width)
    return torch.cat([t[:, None, None].expand(*grid, -1), w[None, None].expand(*grid, -1),
                      h[None, :, None].expand(*grid, -1)], dim=-1).flatten(0, 2).to(device, dtype)


# --- files ------------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> Config:
    """The config.json in a transformer's folder, as a Config."""
    raw = checkpoint.read_json(folder / "config.json")
    name = raw.get("_class_name", "CogVideoXTransformer3DModel")
    if name != "CogVideoXTransformer3DModel":
        raise BadInput(f"{folder} holds a {name}, not a CogVideoX transformer.")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise BadInput(f"{folder / 'config.json'} has {key} = {raw[key]!r}; this code knows only {value!r}.")
    config = checkpoint.fill(Config, raw, folder / "config.json")
    if config.design not in DESIGNS:
        raise BadInput(f"{folder / 'config.json'} has design {config.design!r}; attention.py's DESIGNS has {', '.join(DESIGNS)}.")
    return config


def load_transformer(folder: Path, device="cpu", dtype=torch.float32, **sugar) -> Transformer:
    """The transformer in `folder`. With SUGAR's fields of Config as `sugar` (dino_dim=1024, clip_dim=1024, design="b")
    a plain CogVideoX becomes a SUGAR model: its weights are loaded, only the projections of the image are drawn anew.
    """
    config = read_config(folder)
    new = SUGAR_PARTS if sugar and not config.sugar else ()
    config = Config(**{**asdict(config), **sugar})
    with torch.device("meta"):
        model = Transformer(config)
    checkpoint.load(model, folder, device, dtype, new)
    if new:
        init_sugar(model, device, dtype)
    return model


def use_adapter(model: Transformer, file: Path) -> Adapter:
    """Loads a Switch adapter and sets which tokens pass which of its layers."""
    adapter = load_adapter(model, file)
    model.set_lora_tokens(adapter.norm_lora, adapter.lora_tokens)
    return adapter


@torch.no_grad()
def init_sugar(model: Transformer, device, dtype) -> None:
    """Draws what a plain CogVideoX lacks: projections scaled to keep the tokens' size, null embeddings near zero."""
    config = model.config
    for proj in (model.dino_proj, model.clip_proj):
        proj.to_empty(device=device).to(dtype)
        nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
        nn.init.zeros_(proj.bias)
    for name, width in (("null_dino", config.dino_dim), ("null_clip", config.clip_dim)):
        setattr(model, name, nn.Parameter(0.02 * torch.randn(width, device=device, dtype=dtype)))


def save_transformer(model: Transformer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and safetensors in the official layout; load_transformer() reads them back, SUGAR's included.
    diffusers reads a plain model, and of a SUGAR model the CogVideoX inside it."""
    tensors = {key: value.to(dtype or value.dtype) for key, value in model.state_dict().items() if ".lora_" not in key}
    save_tensors(model.config, tensors, folder)


def save_tensors(config: Config, tensors: dict[str, Tensor], folder: Path) -> None:
    """save_transformer() for tensors that were gathered from many ranks."""
    content = {"_class_name": "CogVideoXTransformer3DModel", **FIXED, **asdict(config)}
    if not config.sugar:
        content = {key: value for key, value in content.items() if key not in
                   ("dino_dim", "clip_dim", "dino_tokens", "clip_tokens", "design")}
    checkpoint.save(folder, content, tensors)
