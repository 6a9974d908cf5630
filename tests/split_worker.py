"""What test_split.py runs under torchrun: a model whose forward pass the ranks share. Writes what the first rank got, and what it
gets alone."""

import sys

import torch

import distributed
from diffusion import alpha_bar_schedule
from model import Config, Transformer
from pipeline import Conditions, Settings, sample_latents
from toy_networks import SCHEDULE

torch.manual_seed(int(sys.argv[2]))
ranks, results, alpha_bar = distributed.start("cpu"), [], alpha_bar_schedule(SCHEDULE)
for design, kind in [(None, "t2v"), (None, "reference"), (None, "reference, lora on it alone"), *((d, "sugar") for d in "abcde")]:
    config = Config(num_attention_heads=4, attention_head_dim=16, num_layers=3, time_embed_dim=16, text_embed_dim=8,
                    max_text_seq_length=7, sample_height=6, sample_width=10, sample_frames=9, use_rotary_positional_embeddings=True,
                    **({"dino_dim": 6, "clip_dim": 6, "dino_tokens": 5, "clip_tokens": 4, "design": design} if design else {}))
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    inputs = [torch.randn(2, 3, 16, 6, 10), torch.tensor([3, 700]), torch.randn(2, 7, 8)]
    given = {}
    if "reference" in kind:
        given["reference"] = torch.randn(2, 16, 6, 10)
        if "lora" in kind:
            from lora import inject

            inject(model, rank=2, alpha=2.0, dropout=0.0)
            model.set_lora_tokens("reference", "reference")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter += 0.3 * torch.randn_like(parameter)
            model.eval()
    if design:
        given = {"dino": torch.randn(2, 5, 6), "clip": torch.randn(2, 4, 6), "keep_dino": torch.tensor([True, False]),
                 "keep_clip": torch.tensor([True, True])}
    conditions = Conditions(inputs[2][:1], inputs[2][1:], *(given[name][:1] if name in given else None for name in ("reference", "dino", "clip")))
    loop = lambda: sample_latents(model, conditions, alpha_bar, Settings(9, 48, 80, 8, "ddim", steps=4), inputs[0][:1], lambda: None)
    with torch.no_grad():
        alone, alone_loop = model(*inputs, **given), loop()
        distributed.split_video(model, ranks, branches=int(sys.argv[3]))
        results.append((kind, design, alone, model(*inputs, **given), model(*inputs, **given)))
        results.append((f"{kind}, the whole loop", design, alone_loop, loop(), loop()))
if ranks.first:
    torch.save(results, sys.argv[1])
distributed.leave(0)
