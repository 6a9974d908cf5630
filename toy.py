"""The toy: a complete checkpoint in the official layout, small enough for a laptop.

    python toy.py init [--out checkpoints/toy]     writes it untrained: everything runs, its pixels mean nothing yet
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from encoders import Tokenizer
from lora import Adapter, inject, lora_state_dict, save_adapter
from model import Config, Transformer, init_sugar, save_transformer
from vae import VAE, VAEConfig, save_vae

SUBJECTS = "fox cat dog robot teapot car duck bear clock vase".split()
MOTIONS = "walking running jumping dancing spinning sliding flying floating standing still".split()
PLACES = "in the snow/on a beach/in a forest/on a street/in the sky/under water/in a desert/at night".split("/")
LOOKS = "made of gold/as a pencil sketch/made of ice/glowing/red/green/blue/yellow".split("/")

TEXT_DIM, IMAGE_DIM, TOKENS = 64, 48, 64  # widths of T5's and of DINO's and CLIP's features; tokens in a prompt


def sentences() -> list[str]:
    """What the tokenizer learns its pieces from."""
    return [f"a {subject} {look} is {motion} {place}" for subject in SUBJECTS for motion in MOTIONS for place in PLACES
            for look in LOOKS]


def write_tokenizer(folder: Path) -> int:
    """A SentencePiece model with T5's conventions, as the official checkpoints ship it. Returns the number of tokens."""
    import sentencepiece

    folder.mkdir(parents=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(sentences()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=200, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, model_type="unigram", minloglevel=2)
    corpus.unlink()
    (folder / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": TOKENS, "extra_ids": 100, "eos_token": "</s>",
              "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer(folder).size


def init(folder: Path) -> None:
    """Writes a complete untrained checkpoint, a Switch adapter, a SUGAR model and an image-to-video model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokens = write_tokenizer(folder / "tokenizer")
    t5 = T5Config(vocab_size=tokens + 28, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                  feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder")
    save_vae(VAE(VAEConfig(block_out_channels=(16, 32, 32, 64), layers_per_block=1, norm_num_groups=8, sample_height=64,
                           sample_width=64, scaling_factor=0.7)), folder / "vae")
    schedule = {"_class_name": "CogVideoXDDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
                "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True, "set_alpha_to_one": True, "snr_shift_scale": 1.0, "clip_sample": False,
                "timestep_spacing": "trailing"}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=2) + "\n")

    vision = dict(hidden_size=IMAGE_DIM, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4)
    Dinov2Model(Dinov2Config(**vision, mlp_ratio=2)).save_pretrained(folder / "dino")
    CLIPVisionModel(CLIPVisionConfig(**vision, intermediate_size=96)).save_pretrained(folder / "clip")
    for part in ("dino", "clip"):
        settings = {"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / part / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    config = dict(num_attention_heads=2, attention_head_dim=64, num_layers=4, time_embed_dim=128, text_embed_dim=TEXT_DIM,
                  max_text_seq_length=TOKENS, sample_height=8, sample_width=8, sample_frames=9,
                  use_rotary_positional_embeddings=True)
    base = Transformer(Config(**config))
    save_transformer(base, folder / "transformer", torch.bfloat16)
    images = dict(dino_dim=IMAGE_DIM, clip_dim=IMAGE_DIM, dino_tokens=65, clip_tokens=65)
    sugar = Transformer(Config(**config, **images))
    sugar.load_state_dict(base.state_dict(), strict=False)
    init_sugar(sugar, "cpu", torch.float32)
    write_variant(folder / "sugar", sugar)
    write_variant(folder / "i2v", Transformer(Config(**config, in_channels=32)))

    adapter = Adapter(rank=8, alpha=4.0)
    inject(base, adapter.rank, adapter.alpha)
    for key, tensor in lora_state_dict(base).items():
        if ".lora_B." in key:
            torch.nn.init.normal_(tensor, std=0.05)  # an adapter at zero would change nothing
    save_adapter(base, folder / "switch", adapter)
    parts = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"],
             "vae": ["diffusers", "AutoencoderKLCogVideoX"], "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
             "scheduler": ["diffusers", "CogVideoXDDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline", **parts}, indent=2) + "\n")


def write_variant(folder: Path, model: Transformer) -> None:
    """A transformer that shares everything else with the toy it lies in."""
    save_transformer(model, folder / "transformer", torch.bfloat16)
    (folder / "model_index.json").write_text(json.dumps({"base": ".."}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["init"])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/toy"))
    args = parser.parse_args()
    part = args.out.with_name(f".{args.out.name}-part")
    if args.out.exists():
        print(f"error: {args.out} is already there; remove it first.", file=sys.stderr)
        return 2
    shutil.rmtree(part, ignore_errors=True)
    init(part)
    part.rename(args.out)
    print(f"wrote {args.out}: untrained, its pixels mean nothing yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
