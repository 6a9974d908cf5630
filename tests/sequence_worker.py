"""What test_split.py runs under torchrun: gradients of a model whose samples are shared by `sequence` ranks each, beside those of the
whole batch on one rank. Writes the largest relative error among all parameters."""

import sys

import torch

import distributed
from lora import inject
from model import Config, Transformer

file, seed, sequence, recompute = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if sys.argv[4:] else None
ranks, worst = distributed.start("cpu", sequence), {}
for kind in ("reference", "reference, some dropped, with a LoRA", "sugar"):
    torch.manual_seed(seed)
    config = Config(num_attention_heads=4, attention_head_dim=16, num_layers=3, time_embed_dim=16, text_embed_dim=8,
                    max_text_seq_length=7, sample_height=6, sample_width=10, sample_frames=9, use_rotary_positional_embeddings=True,
                    **({"dino_dim": 6, "clip_dim": 6, "dino_tokens": 5, "clip_tokens": 4} if kind == "sugar" else {}))
    model, alone = Transformer(config), Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    alone.load_state_dict(model.state_dict())
    x, t, text = torch.randn(4, 3, 16, 6, 10), torch.tensor([3, 700, 41, 999]), torch.randn(4, 7, 8)
    for network in (model, alone) if "LoRA" in kind else ():
        inject(network, rank=2, alpha=2.0, dropout=0.0)
        torch.manual_seed(seed + 1)
        for key, parameter in network.named_parameters():
            if ".lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
    given = {"dino": torch.randn(4, 5, 6), "clip": torch.randn(4, 4, 6)} if kind == "sugar" else {"reference": torch.randn(4, 16, 6, 10)}
    if "dropped" in kind:
        given["keep_reference"] = torch.tensor([True, False, True, True])[:, None].expand(4, 15)
    alone(x, t, text, **given).square().mean().backward()
    distributed.SMALL = 0 if kind == "reference" else 2**30  # gathered twice, as large models are, and once
    distributed.shard(model, list(model.transformer_blocks), ranks, torch.float32, recompute)
    mine = list(ranks.share(4))
    model(x[mine], t[mine], text[mine], **{name: value[mine] for name, value in given.items()}).square().mean().backward()
    for (key, ours), theirs in zip(model.named_parameters(), alone.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), key
        if ours.grad is not None and theirs.grad.norm() > 1e-6:
            worst[f"{kind} {key}"] = ((ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()).item()
if ranks.first:
    torch.save(worst, file)
distributed.leave(0)
