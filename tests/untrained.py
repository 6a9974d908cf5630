"""The toy as it is before any training, small and at random: what the tests stand on."""

from pathlib import Path

import torch
from torch import nn

from lora import Adapter, inject, lora_state_dict, save_adapter
from model import Config, Transformer, init_sugar, save_transformer
from toy_networks import (BASE, IMAGE_DIM, PATCH, SIDE, new_image_encoder, new_text_encoder, new_vae, save_half, write_frame,
                          write_tokenizer, write_variant)
from vae import save_vae

IMAGE_TOKENS = (SIDE // PATCH) ** 2 + 1
SUGAR = dict(dino_dim=IMAGE_DIM, clip_dim=IMAGE_DIM, dino_tokens=IMAGE_TOKENS, clip_tokens=IMAGE_TOKENS)


def init(folder: Path) -> None:
    """Writes a complete checkpoint, in it a Switch adapter, a SUGAR model and an image-to-video model."""
    torch.manual_seed(0)
    save_half(new_text_encoder(write_tokenizer(folder / "tokenizer")), folder / "text_encoder")
    for part in ("dino", "clip"):
        save_half(new_image_encoder(part), folder / part)
    save_vae(new_vae(), folder / "vae")
    write_frame(folder)
    base = Transformer(Config(**BASE))  # not new_transformer(): a network of zeros would hide what it is given
    save_transformer(base, folder / "transformer", torch.bfloat16)
    sugar = Transformer(Config(**BASE, **SUGAR))
    sugar.load_state_dict(base.state_dict(), strict=False)
    init_sugar(sugar, "cpu", torch.float32)
    write_variant(folder / "sugar", sugar)
    write_variant(folder / "i2v", Transformer(Config(**BASE, in_channels=32)))
    adapter = Adapter(rank=8, alpha=4.0)
    inject(base, adapter.rank, adapter.alpha)
    for key, tensor in lora_state_dict(base).items():
        if ".lora_B." in key:
            nn.init.normal_(tensor, std=0.05)  # an adapter at zero would change nothing
    save_adapter(base, folder / "switch", adapter)
