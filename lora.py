"""LoRA by hand: y = W x + alpha / rank * B A dropout(x), for linear layers and convolutions, and its files.

An injected layer stays the layer it was, with the same weight under the same name, and gains lora_A and lora_B below
itself. So a base checkpoint loads with or without adapters, and the adapter's keys are PEFT's.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint import BadInput, read_header, replace_when_whole, some

# Switch's layers: a module is adapted when its name is one of these or ends in "." and one of these. "proj" is the patch
# projection (a convolution) and the first linear of each feed-forward.
SWITCH_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "ff.net.2", "text_proj", "norm1.linear", "norm2.linear")

PREFIX = "transformer."  # of every key in a file
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
OURS = "nanos2v."  # of our own settings in that metadata; diffusers reads only those with PREFIX
FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_transformer.safetensors")


@dataclass
class Adapter:
    """What an adapter file says about itself. The defaults are Switch's and our trainer's (see the README's readings)."""

    rank: int = 128
    alpha: float = 64.0
    dropout: float = 0.1
    norm_lora: str = "reference"  # who passes the adapted norm: "reference" tokens (Switch 3.3) or "all"
    lora_tokens: str = "all"  # who passes the other adapted layers: "all" or "reference" tokens
    cls: str = "token"  # <cls> in the prompt: a "token" of its own, word "pieces", or "none"


CHOICES = {"norm_lora": ("reference", "all"), "lora_tokens": ("all", "reference"), "cls": ("token", "pieces", "none")}
# The released adapter's file says nothing about itself. This is how its public code in fact runs it.
RELEASED = {"alpha": 64.0, "norm_lora": "all", "lora_tokens": "all", "cls": "pieces"}


class LoRA:
    """What LoRALinear and LoRAConv2d share: the low-rank update beside the layer."""

    def add_lora(self, rank: int, alpha: float, dropout: float, lora_A: nn.Module, lora_B: nn.Module) -> None:
        self.lora_A, self.lora_B, self.lora_dropout = lora_A, lora_B, nn.Dropout(dropout)
        self.lora_scale = alpha / rank
        self.lora_dropout.train(self.training)  # an adapter that joins a model in eval mode must not drop anything
        if not self.weight.is_meta:
            nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(lora_B.weight)  # so that training starts at the base model
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def base(self, x: Tensor) -> Tensor:
        """The layer without its LoRA."""
        return super().forward(x)

    def low(self, x: Tensor) -> Tensor:
        """A dropout(x)"""
        return self.lora_A(self.lora_dropout(x))

    def update(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_scale * self.low(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).add_(self.update(x))  # in place: no backward pass asks for what the base gave


def survivors(x: Tensor, p: float, draws: torch.Generator | None) -> Tensor | None:
    """Which elements of x dropout leaves, True with probability 1 - p, however x lies in memory; None where p is 0.

    Each element has 16 bits of a random number of 64, and p is rounded to them: on a CPU a number for each element would take a
    quarter of the training step."""
    if not (lost := round(p * 2**16)):
        return None
    lots = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=draws)
    return (lots.view(torch.int16)[:x.numel()] > lost - 1 - 2**15).view(x.shape)  # at p = 1 "lost - 2**15" would be no int16


def dropped(x: Tensor, p: float, kept: Tensor | None) -> Tensor:
    """dropout(x), of which `kept` is left, and scaled so that its mean stays."""
    if kept is None:
        return x
    return torch.where(kept, x, 0).mul_(2**16 / max(2**16 - round(p * 2**16), 1))  # at p = 1 nothing is left


def in_rows(x: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Tensor | None]]:
    """x [n, in] some rows at a time, and which of their elements dropout leaves, the same for the same seed: so what it left, and GELU(x),
    are never there as a whole. On a CPU the pieces are small enough for malloc to give the same memory again."""
    draws = torch.Generator(x.device).manual_seed(seed) if p else None
    step = max((2**26 if x.is_cuda else 2**21) // x.shape[1], 1)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        yield rows, survivors(x[rows], p, draws)


def fed(x: Tensor, gelu: bool) -> Tensor:
    """What a layer is fed: x, or GELU(x)."""
    return F.gelu(x, approximate="tanh") if gelu else x


class LoRAProduct(torch.autograd.Function):
    """y = W g + b + s B A dropout(g) for g = x or, with `gelu`, GELU(x), whose weight and bias do not learn. By itself autograd would keep
    g and what dropout left of it beside x, and make the gradient of g twice, through W and through A, to add the two."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float, gelu: bool, p: float) -> Tensor:
        """x [n, in] -> y [n, out]"""
        ctx.s, ctx.gelu, ctx.p, ctx.seed = s, gelu, p, int(torch.randint(2**62, ())) if p else 0
        g, low = fed(x, gelu), x.new_empty(x.shape[0], A.shape[0])  # low: [n, rank]
        for rows, kept in in_rows(g, p, ctx.seed):
            torch.mm(dropped(g[rows], p, kept), A.t(), out=low[rows])
        ctx.save_for_backward(x, weight, A, B, low)
        return F.linear(g, weight, bias).addmm_(low, B.t(), alpha=s)  # the update is never there by itself

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, low = ctx.saved_tensors
        d_low = ctx.s * (dy @ B)  # [n, rank]
        dA, dB = torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32)), ctx.s * (dy.t() @ low)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        for rows, kept in in_rows(x, ctx.p, ctx.seed):
            dA.add_(d_low[rows].t() @ dropped(fed(x[rows], ctx.gelu), ctx.p, kept))
            if dx is None:
                continue
            if kept is None:
                dx[rows].addmm_(d_low[rows], A)
            else:
                dx[rows].add_(dropped(d_low[rows] @ A, ctx.p, kept))
            if ctx.gelu:
                dx[rows] = torch.ops.aten.gelu_backward(dx[rows], x[rows], approximate="tanh")
        return dx, None, None, dA.to(A.dtype), dB, None, None, None


class LoRALinear(LoRA, nn.Linear):
    """A linear layer with a LoRA: A [rank, in], B [out, rank]."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """gelu: the layer is fed GELU(x), which is not kept for the backward pass."""
        x, shape = x.flatten(0, -2), x.shape[:-1]
        A, B, p = self.lora_A.weight, self.lora_B.weight, self.lora_dropout.p if self.lora_dropout.training else 0.0
        learns = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if learns or torch.compiler.is_compiling():  # a compiler sees for itself what is cheaper to compute again
            x = fed(x, gelu)
            low = self.low(x)
            y = self.base(x).addmm_(low, B.t(), alpha=self.lora_scale)
        else:
            y = LoRAProduct.apply(x, self.weight, self.bias, A, B, self.lora_scale, gelu, p)
        return y.unflatten(0, shape)


class LoRAConv2d(LoRA, nn.Conv2d):
    """A convolution with a LoRA: A [rank, in, k, k] does the convolving, B [out, rank, 1, 1] mixes channels."""


def without_lora(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) without its LoRA, where it has one."""
    return layer.base(x) if isinstance(layer, LoRA) else layer(x)


def on_tokens(layer: nn.Module, x: Tensor, tokens: slice | None) -> Tensor:
    """layer(x) for x [B, L, d], its LoRA (where it has one) only on `tokens` of the sequence; None means on all."""
    if tokens is None or not isinstance(layer, LoRA):
        return layer(x)
    y, part = layer.base(x), x[:, tokens]
    part = part.clone() if torch.is_grad_enabled() else part  # for the backward pass, which would else keep all of x
    y[:, tokens].add_(layer.update(part))
    return y


def inject(model: nn.Module, rank: int = 128, alpha: float = 64.0, dropout: float = 0.1,
           names: tuple[str, ...] = SWITCH_TARGETS, dtype: torch.dtype | None = None) -> None:
    """Adds a LoRA to every linear layer and convolution of `model` that `names` reach. The layers' own weights are frozen;
    A is drawn as PEFT draws it, B is zero. dtype: of the LoRA, None is that of each layer.
    """
    found = [module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
             and any(name == target or name.endswith("." + target) for target in names)]
    if not found:
        raise ValueError(f"No linear layer or convolution of the model is named {', '.join(names)}.")
    for layer in found:
        place = {"device": layer.weight.device, "dtype": dtype or layer.weight.dtype, "bias": False}
        if isinstance(layer, nn.Conv2d):
            A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, **place)
            B = nn.Conv2d(rank, layer.out_channels, 1, **place)
            layer.__class__ = LoRAConv2d
        else:
            A, B = nn.Linear(layer.in_features, rank, **place), nn.Linear(rank, layer.out_features, **place)
            layer.__class__ = LoRALinear
        layer.add_lora(rank, alpha, dropout, A, B)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, named as in the model: <module>.lora_A.weight and <module>.lora_B.weight."""
    return {key: tensor for key, tensor in model.state_dict().items() if ".lora_A." in key or ".lora_B." in key}


@torch.no_grad()
def merge(layer: nn.Module) -> None:
    """Folds the layer's LoRA, where it has one, into its weight, by way of float32, and removes it. Only right where all tokens pass
    it."""
    if isinstance(layer, LoRA):
        A, B = layer.lora_A.weight.float(), layer.lora_B.weight.float()
        delta = (B.flatten(1) @ A.flatten(1)).view_as(layer.weight)  # also for a convolution, as its B is 1x1
        layer.weight.copy_(layer.weight.float() + layer.lora_scale * delta)
        del layer.lora_A, layer.lora_B, layer.lora_dropout
        layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear


# --- files ------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module | dict[str, Tensor], path: Path, adapter: Adapter) -> None:
    """Writes the adapter of a model, or its lora_state_dict(), as `path`, or as the usual name in `path` where that is a
    folder. diffusers loads the file with load_lora_weights(); our settings stand beside PEFT's in its metadata."""
    file = path if path.suffix == ".safetensors" else path / FILES[0]
    state = model if isinstance(model, dict) else lora_state_dict(model)
    modules = sorted({key.split(".lora_")[0] for key in state})
    # PEFT's lora_dropout is left out: diffusers would not switch it off when it samples with our file.
    settings = {f"{PREFIX}r": adapter.rank, f"{PREFIX}lora_alpha": adapter.alpha, f"{PREFIX}target_modules": modules,
                f"{PREFIX}bias": "none", f"{PREFIX}peft_type": "LORA"}
    settings |= {OURS + key: value for key, value in asdict(adapter).items() if key not in ("rank", "alpha")}
    tensors = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_whole(file) as part:
        save_file(tensors, part, metadata={"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)})


def find_adapter(path: str) -> Path:
    """The safetensors file that `path`, a file or a folder, means. Pickled files beside it are never read."""
    given = Path(path).expanduser()
    if given.is_file() and given.suffix == ".safetensors":
        return given
    for name in FILES:
        if (given / name).is_file():
            return given / name
    raise BadInput(f"No adapter at {path}: give a .safetensors file, or a folder with {' or '.join(FILES)}.")


def read_adapter(file: Path) -> Adapter:
    """An adapter's settings, from the file's header alone."""
    ranks = {key: entry.shape[0] for key, entry in read_header(file).items() if key.endswith(".lora_A.weight")}
    if not ranks:
        raise BadInput(f"{file} holds no LoRA: no key ends in .lora_A.weight.")
    rank = next(iter(ranks.values()))
    odd = [key for key in ranks if ranks[key] != rank]
    if odd:
        raise BadInput(f"{file} mixes ranks ({some(odd)} are not of rank {rank}); one rank for all layers is supported.")
    with safe_open(file, "pt") as tensors:
        raw = (tensors.metadata() or {}).get(METADATA)
    try:
        settings = json.loads(raw) if raw else {}
        settings.items()
    except (ValueError, AttributeError) as error:
        raise BadInput(f"The {METADATA} in {file} is no JSON object ({error}).") from error
    for name in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
        if settings.get(PREFIX + name):
            raise BadInput(f"{file} was made with PEFT's {name}, which this code does not know.")
    known = dict(RELEASED)
    known |= {name: settings[PREFIX + key] for name, key in (("alpha", "lora_alpha"), ("dropout", "lora_dropout"))
              if PREFIX + key in settings}
    names = {field.name for field in fields(Adapter)}
    known |= {key[len(OURS):]: value for key, value in settings.items() if key.startswith(OURS) and key[len(OURS):] in names}
    for name, value in known.items():
        if value not in CHOICES[name] if name in CHOICES else not isinstance(value, (int, float)):
            wanted = " or ".join(CHOICES.get(name, ("a number",)))
            raise BadInput(f"The {METADATA} in {file} says {name} = {value!r}, and it should be {wanted}.")
    return Adapter(**{**known, "rank": rank})


def check_adapter(model: nn.Module, file: Path) -> list[str]:
    """Compares the file with the layers of `model` (on any device, also meta); returns the names of adapted modules."""
    entries, modules = read_header(file), dict(model.named_modules())
    rank = read_adapter(file).rank
    adapted = sorted({key.removeprefix(PREFIX).split(".lora_")[0] for key in entries})
    foreign = [name for name in adapted if not isinstance(modules.get(name), (nn.Linear, nn.Conv2d))]
    foreign += [key for key in entries if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign:
        raise BadInput(f"The adapter {file} is for another base: this one has no {some(foreign)}.")
    for name in adapted:
        shape = tuple(modules[name].weight.shape)  # [out, in] or [out, in, k, k]
        for letter, wanted in (("A", (rank, *shape[1:])), ("B", (shape[0], rank, *(1 for _ in shape[2:])))):
            entry = entries.get(f"{PREFIX}{name}.lora_{letter}.weight")
            if entry is None:
                raise BadInput(f"The adapter {file} has no lora_{letter} for {name}; the file is not whole.")
            if entry.shape != wanted:
                raise BadInput(f"The adapter {file} is for another base: {name}.lora_{letter} has shape "
                               f"{list(entry.shape)}, and {list(wanted)} would fit this base at rank {rank}.")
    return adapted


def load_adapter(model: nn.Module, file: Path) -> Adapter:
    """Injects the adapter in `file` into `model`, and returns its settings. Who passes which LoRA is the model's to set:
    see model.use_adapter()."""
    adapter, names = read_adapter(file), check_adapter(model, file)
    inject(model, adapter.rank, adapter.alpha, adapter.dropout, tuple(names))
    with safe_open(file, "pt") as tensors:
        state = {key.removeprefix(PREFIX): tensors.get_tensor(key) for key in tensors.keys()}
    model.load_state_dict(state, strict=False)
    return adapter
