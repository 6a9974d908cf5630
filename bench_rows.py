"""What bench.py runs: each row gives a function for each side, ours and diffusers', which builds what the side runs, with the same
random weights."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import train_switch
from attention import attention, selective_mask, selective_segments
from bench_files import MODELS
from diffusion import alpha_bar_schedule, training_loss
from lora import SWITCH_TARGETS, Adapter
from model import Config, Transformer
from pipeline import Conditions, Settings, sample_latents
from streaming import streamed
from vae import VAE, VAEConfig, latent_size

SUGAR = dict(dino_dim=1024, clip_dim=1024)  # 257 tokens of each
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
                rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False)
FLEX = ", FlexAttention"  # ends the name of a side
Run = Callable[[], object]


@torch.no_grad()
def filled(network: nn.Module, args: argparse.Namespace, place: str | None = None) -> nn.Module:
    """The network with random weights that follow from their names: the same on both sides. place: other than args.device."""
    network = network.to(args.dtype).to_empty(device=place or args.device)
    for key, tensor in network.state_dict().items():
        generator = torch.Generator(args.device).manual_seed(sum(map(ord, key)))
        around = 1.0 if "norm" in key and key.endswith("weight") and tensor.dim() == 1 else 0.0
        tensor.copy_(around + 0.02 * torch.randn(tensor.shape, generator=generator, device=args.device))
    return network


def noise(args: argparse.Namespace, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(args.device, dtype or args.dtype)


def latents(args: argparse.Namespace) -> tuple[int, int, int]:
    return latent_size(args.frames, args.height, args.width)


def config_of(args: argparse.Namespace) -> Config:
    T, h, w = latents(args)
    return Config(**{**MODELS["5b"], "num_layers": args.layers}, sample_frames=args.frames, sample_height=h, sample_width=w)


def our_transformer(args: argparse.Namespace, compiled: bool = True, place: str | None = None, **more) -> Transformer:
    with torch.device("meta"):
        model = Transformer(replace(config_of(args), **more))
    model = filled(model, args, place).eval().requires_grad_(False)
    if args.compile and compiled:
        distributed.compile_blocks(list(model.transformer_blocks))
    return model


def their_transformer(args: argparse.Namespace, place: str | None = None) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    config = config_of(args)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_attention_heads=config.num_attention_heads, num_layers=args.layers,
                                            use_rotary_positional_embeddings=True, sample_frames=args.frames,
                                            sample_height=config.sample_height, sample_width=config.sample_width)
    model = filled(model, args, place).eval().requires_grad_(False)
    if args.compile:
        for block in model.transformer_blocks:
            block.compile()
    return model


def their_rotary(args: argparse.Namespace, frames: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    _, h, w = latents(args)
    return get_3d_rotary_pos_embed(64, ((0, 0), (h // 2, w // 2)), (h // 2, w // 2), frames, device=args.device)


# --- the rows ---------------------------------------------------------------------------------------------------------


def forward(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """One pass of the transformer, text-to-video, a batch of one."""
    T, h, w = latents(args)
    x, t, text = noise(args, 1, T, 16, h, w), torch.tensor([500], device=args.device), noise(args, 1, 226, 4096)

    def ours() -> Run:
        model = our_transformer(args)
        return torch.no_grad()(lambda: model(x, t, text))

    def theirs(fused: bool = False) -> Run:
        model, rotary = their_transformer(args), their_rotary(args, T)
        if fused:
            model.fuse_qkv_projections()
        return torch.no_grad()(lambda: model(x, text, t, image_rotary_emb=rotary, return_dict=False)[0])

    return {"ours": ours, "diffusers": theirs, "diffusers, fused": partial(theirs, fused=True)}


def low_memory(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """The same pass with its weights in host memory, as --low-memory has it. diffusers: enable_sequential_cpu_offload(), and
    enable_group_offload() of one block at a time on a stream of its own."""
    T, h, w = latents(args)
    x, t, text = noise(args, 1, T, 16, h, w), torch.tensor([500], device=args.device), noise(args, 1, 226, 4096)
    device = torch.device(args.device)

    def ours() -> Run:
        model, stack = our_transformer(args, place="cpu"), ExitStack()
        stack.enter_context(streamed(model, list(model.transformer_blocks), device))
        return torch.no_grad()(lambda stack=stack: model(x, t, text))  # which holds the stack, so that the blocks go on streaming

    def theirs(groups: bool) -> Run:
        from accelerate import cpu_offload

        model, rotary = their_transformer(args, place="cpu"), their_rotary(args, T)
        if groups:
            model.enable_group_offload(device, num_blocks_per_group=1, use_stream=True)
        else:
            cpu_offload(model, device)  # what the pipeline's enable_sequential_cpu_offload() does to each network
        return torch.no_grad()(lambda: model(x, text, t, image_rotary_emb=rotary, return_dict=False)[0])

    return {"ours": ours, "diffusers, sequential": partial(theirs, groups=False), "diffusers, groups": partial(theirs, groups=True)}


def loop(args: argparse.Namespace, sugar: bool) -> dict[str, Callable[[], Run]]:
    """The sampling loop: for Switch an adapter of rank 128, a reference and 2 branches; for SUGAR DINO and CLIP tokens, design
    (b) and 3 branches. diffusers knows neither: there the reference is a frame more, and the image's tokens are tokens of text to
    which everything attends. Fused: the adapter merged into the weights by fuse_lora(), and fuse_qkv_projections()."""
    T, h, w = latents(args)
    x, text = noise(args, 1, T, 16, h, w, dtype=torch.float32), noise(args, 1, 226, 4096)
    null = noise(args, 1, 226, 4096, seed=1)

    def ours() -> Run:
        model = our_transformer(args, **(SUGAR if sugar else {}))
        given = Conditions(text, null)
        if sugar:
            given.dino, given.clip = (noise(args, 1, 257, 1024, seed=seed) for seed in (2, 3))
        else:
            given.reference = noise(args, 1, 16, h, w)
            train_switch.prepare(model, Adapter()).to(args.dtype).eval().requires_grad_(False).merge_adapter()
        settings = Settings(args.frames, args.height, args.width, 8, "ddim", steps=args.steps)
        alpha_bar = alpha_bar_schedule(SCHEDULE)
        return lambda: sample_latents(model, given, alpha_bar, settings, x)

    def theirs(fused: bool = False) -> Run:
        from diffusers import CogVideoXDDIMScheduler
        from peft import LoraConfig

        model, rotary = their_transformer(args), their_rotary(args, T + (not sugar))
        if not sugar:
            model.add_adapter(LoraConfig(r=128, lora_alpha=64, target_modules=list(SWITCH_TARGETS), lora_dropout=0.1))
            model.to(args.dtype).eval().requires_grad_(False)
        if fused:
            model.fuse_lora()
            model.fuse_qkv_projections()
        scheduler = CogVideoXDDIMScheduler(**SCHEDULE)
        branches = 3 if sugar else 2
        prompts = torch.cat([null, text, text][:branches])
        if sugar:
            prompts = torch.cat([prompts, noise(args, branches, 2 * 257, 4096)], dim=1)
        first = x.to(args.dtype) if sugar else torch.cat([noise(args, 1, 1, 16, h, w), x.to(args.dtype)], dim=1)

        @torch.no_grad()
        def run() -> Tensor:
            scheduler.set_timesteps(args.steps, device=args.device)
            latent = first
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(torch.cat([latent] * branches), t)
                v = model(given, prompts, t.expand(branches), image_rotary_emb=rotary, return_dict=False)[0].float()
                null_v, *more = v.chunk(branches)
                guided = null_v + sum(6.0 * (y - null_v) for y in more)
                latent = scheduler.step(guided, t, latent, return_dict=False)[0].to(args.dtype)
            return latent

        return run

    name = "diffusers, attending densely" if sugar else "diffusers"
    return {"ours": ours, name: theirs, f"{name}, fused": partial(theirs, fused=True)}


def vae_row(args: argparse.Namespace, decode: bool) -> dict[str, Callable[[], Run]]:
    """The official VAE, whole frames."""
    T, h, w = latents(args)
    z, video = noise(args, 1, 16, T, h, w), noise(args, 1, 3, args.frames, args.height, args.width).clamp(-1, 1)

    def ours() -> Run:
        with torch.device("meta"):
            vae = VAE(VAEConfig())
        vae = filled(vae, args).eval().requires_grad_(False)
        return torch.no_grad()((lambda: vae.decode(z)) if decode else (lambda: vae.encode(video)[0]))

    def theirs() -> Run:
        from diffusers import AutoencoderKLCogVideoX

        with torch.device("meta"):
            vae = AutoencoderKLCogVideoX()
        vae = filled(vae, args).eval().requires_grad_(False)
        return torch.no_grad()((lambda: vae.decode(z).sample) if decode else (lambda: vae.encode(video).latent_dist.mean))

    return {"ours": ours, "diffusers": theirs}


def train(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """A training step of Switch: forward and backward pass of one video with its reference, and AdamW on the paper's LoRA.
    diffusers + PEFT have the reference as a frame more."""
    T, h, w = latents(args)
    x, eps, text, t = (noise(args, 1, T, 16, h, w), noise(args, 1, T, 16, h, w, seed=1), noise(args, 1, 226, 4096),
                       torch.tensor([500], device=args.device))
    reference, alpha_bar = noise(args, 1, 16, h, w), alpha_bar_schedule(SCHEDULE).to(args.device)

    def step(predict, model: nn.Module) -> Run:
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [nn.Parameter(distributed.local(p.detach())) for p in trained]  # as in training.py
        optimizer = torch.optim.AdamW(held, lr=1e-4, fused=True)

        def run() -> Tensor:
            loss = training_loss(predict, x, eps, t, alpha_bar)
            loss.backward()
            for parameter, plain in zip(trained, held):
                plain.grad, parameter.grad = distributed.local(parameter.grad), None
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return run

    def ours() -> Run:
        model = train_switch.prepare(our_transformer(args, compiled=False), Adapter()).train()
        recompute = None if args.recompute == "none" else args.recompute
        distributed.shard(model, list(model.transformer_blocks), distributed.start(args.device), args.dtype, recompute, args.compile)
        predict = lambda x_t, t: model(x_t.to(args.dtype), t, text, reference=reference)
        return step(predict, model)

    def theirs() -> Run:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        model, rotary = their_transformer(args), their_rotary(args, T + 1)
        model.add_adapter(LoraConfig(r=128, lora_alpha=64, target_modules=list(SWITCH_TARGETS), lora_dropout=0.1))
        if args.recompute != "none":
            model.enable_gradient_checkpointing()
        model.train()
        cast_training_params(model, torch.float32)  # as diffusers' own training script has it, with autocast

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(torch.device(args.device).type, args.dtype, enabled=args.dtype != torch.float32):
                return model(torch.cat([reference[:, None], x_t.to(args.dtype)], dim=1), text, t, image_rotary_emb=rotary,
                             return_dict=False)[0][:, 1:]

        return step(predict, model)

    return {"ours": ours, "diffusers": theirs}


def group_lengths(args: argparse.Namespace) -> tuple[int, int, int, int]:
    """Tokens of SUGAR's groups: DINO and CLIP, text, first frame, other frames."""
    T, h, w = latents(args)
    return 2 * 257, 226, h * w // 4, (T - 1) * h * w // 4


def attention_row(args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """Selective attention of one layer of SUGAR: each design as a few unmasked attentions, as a dense boolean mask and, on a
    GPU, as FlexAttention, beside attention without a mask."""
    lengths = group_lengths(args)
    L = sum(lengths)
    q, k, v = (noise(args, 1, L, 48, 64, seed=seed).transpose(1, 2) for seed in range(3))
    sides = {"unmasked": lambda: lambda: F.scaled_dot_product_attention(q, k, v)}

    def masked(design: str) -> Run:
        mask = selective_mask(design, lengths).to(args.device)
        return lambda: F.scaled_dot_product_attention(q, k, v, mask)

    def flex(design: str) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        table = selective_mask(design, (1, 1, 1, 1)).to(args.device)
        group = torch.repeat_interleave(torch.tensor(lengths)).to(args.device)  # of each token
        blocks = create_block_mask(lambda b, h, i, j: table[group[i], group[j]], None, None, L, L, device=args.device)
        compiled = torch.compile(flex_attention)
        return lambda: compiled(q, k, v, block_mask=blocks)

    def grouped(design: str) -> Run:
        segments = selective_segments(design, lengths)
        return lambda: attention(q, k, v, segments)

    for design in args.designs:
        sides[f"({design})"] = lambda design=design: grouped(design)
        sides[f"({design}), mask"] = lambda design=design: masked(design)
        if args.cuda:
            sides[f"({design}){FLEX}"] = lambda design=design: flex(design)
    return sides


ROWS = {"forward": forward, "switch": partial(loop, sugar=False), "sugar": partial(loop, sugar=True), "low-memory": low_memory,
        "decode": partial(vae_row, decode=True), "encode": partial(vae_row, decode=False), "train": train,
        "attention": attention_row}
