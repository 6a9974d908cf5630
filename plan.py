"""What a training run would take, counted before it is begun: `--plan` of both trainers."""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from distributed import SMALL
from training import DTYPES

# Bytes in bfloat16 of DINOv2-large, and of CLIP ViT-L/14's half for images, which a base without its own takes from the hub.
IMAGE_ENCODER = 2 * 304e6


def kept_for_backward(block: nn.Module, config, lora_tokens: str) -> float:
    """Bytes in bfloat16 that autograd keeps of one block for each token: counted, by running the block on the CPU. lora_tokens: on whom
    its LoRAs act, "all" or "reference"."""
    tokens, kept, own = 512, {}, {p.untyped_storage().data_ptr() for p in block.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, or its address would be used again
        return tensor

    x = torch.randn(1, tokens, config.dim, dtype=torch.bfloat16, requires_grad=True)
    text, reference = tokens // 16, 0 if config.sugar else tokens // 14  # one of 14 latent frames
    lengths, rotary = (text, reference, tokens - text - reference), torch.zeros(tokens - text, config.attention_head_dim)
    lora = slice(text, text + reference) if lora_tokens == "reference" else None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x, lengths, torch.randn(1, config.time_embed_dim, dtype=torch.bfloat16), rotary, None, None, lora)
    return sum(size for size, _ in kept.values()) / tokens


def print_plan(model: nn.Module, block: nn.Module, folder: Path, tokens: int, batch: int, samples: int,
               sources: list[str | None], runs: int, args: argparse.Namespace, world: int) -> None:
    """--plan: what a run would take.

    model: on the meta device, with what is frozen frozen; block: one of its blocks for real, on the CPU in bfloat16;
    folder: of the base; tokens: of the longest sample; batch: the largest global one; samples: in the whole run; sources: the
    data, None is the toy's world; runs: one after the other, each with checkpoints of its own.
    """
    names = {"vae": checkpoint.WEIGHTS, "text_encoder": "model", **({"dino": "model", "clip": "model"} if model.config.sugar else {})}
    encoders = 0
    for name, stem in names.items():
        if part := checkpoint.part(folder, name):
            encoders += sum(entry.nbytes for entry in checkpoint.index(part, stem).values())
        elif name in ("dino", "clip"):
            encoders += IMAGE_ENCODER
    if not args.validate_count and all(source and (Path(source) / "index.json").exists() for source in sources):
        encoders = 0  # caches need none
    config, trained = model.config, sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    copies = 2 if args.ema else 1
    width = DTYPES[args.dtype].itemsize
    whole_block, its_input = kept_for_backward(block, config, getattr(args, "lora_tokens", "all")) * width / 2, width * config.dim
    of_each = {None: whole_block, "all": its_input, "keep-attention": 2 * its_input}[args.recompute]
    kept = of_each * config.num_layers + (whole_block if args.recompute else 0)  # bytes for each token
    lies = world == 1 and args.dtype == "bf16"  # and what is frozen is used as it lies
    gathered = lambda part: width * sum(p.numel() for p in part.parameters() if p.requires_grad or not lies)
    whole, largest = gathered(model), gathered(block)
    weights = sum(p.nbytes for p in model.parameters()) + 4 * trained * (copies - 1)
    of_rank = batch * args.sequence_parallel // world
    micro_batch = min(args.micro_batch, of_rank)
    accumulated = of_rank > micro_batch  # gradients are whole until the last micro-batch
    parts = {"frozen encoders, on every rank": encoders, "weights, sharded": weights / world,
             "gathered blocks": whole if whole <= SMALL else 2 * largest,
             "gradients" + ", sharded" * (not accumulated): 4 * trained / (1 if accumulated else world),
             "AdamW, sharded": 8 * trained / world,
             f"activations of {micro_batch} sample{'s' * (micro_batch > 1)}": kept * tokens * micro_batch / args.sequence_parallel}
    total = sum(parts.values()) / 1e9
    print(f"trainable parameters   {trained:,}\nfrozen parameters      {frozen:,}\ntokens in a sample     {tokens:,}")
    print(f"steps                  {args.steps:,} on {world} rank{'s' * (world > 1)}\nmemory of each rank")
    for name, size in {**parts, "in all": 1e9 * total}.items():
        print(f"  {name:<36} {size / 1e9:8.2f} GB")
    print(f"hours                  {samples / args.rate / 3600:.1f} at {args.rate:g} samples/s of all ranks (--rate)")
    disk, above = 4 * trained * (copies + 2), next(path for path in (args.out, *args.out.resolve().parents) if path.exists())
    most = args.keep * runs + 1  # the new one is written before the oldest goes
    print(f"disk per checkpoint    {disk / 1e9:.2f} GB, and {args.keep} are kept" + f" of each of {runs} stages" * (runs > 1))
    if disk * most > (free := shutil.disk_usage(above).free):
        print(f"warning: {most} checkpoints will not fit on the disk of {args.out}, where {free / 1e9:.1f} GB are free: a smaller --keep")
    if total > args.gpu_memory:
        print(f"warning: {total:.0f} GB will not fit into {args.gpu_memory:g} GB: more ranks, a smaller --micro-batch"
              + ("" if args.recompute else ", --recompute"))
