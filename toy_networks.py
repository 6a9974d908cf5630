"""The toy's networks, small, in the official layout: made, untrained, and written; and what each learns. toy.py trains them."""

import re
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import world
from checkpoint import name_base, write_json
from encoders import Tokenizer
from model import Config, Transformer, load_transformer, save_transformer
from vae import VAE, VAEConfig

TEXT_DIM, IMAGE_DIM, TOKENS = 64, 96, 24  # widths of T5's and of DINO's and CLIP's features; tokens in a prompt
SIDE, PATCH = 48, 12  # pixels of the image encoders' input and of their patches
BASE = dict(num_attention_heads=3, attention_head_dim=64, num_layers=8, time_embed_dim=64, text_embed_dim=TEXT_DIM,
            max_text_seq_length=TOKENS, sample_height=8, sample_width=8, sample_frames=9, use_rotary_positional_embeddings=True)
# A small network's: the papers' burn its colours, and with more guidance on the text it loses Switch's subjects.
SCALES = {"guidance": 1.0, "omega_image": 3.0, "omega_text": 4.0}
SCHEDULE = {"_class_name": "CogVideoXDDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True, "set_alpha_to_one": True, "snr_shift_scale": 1.0, "clip_sample": False,
            "timestep_spacing": "trailing", **SCALES}


def write_tokenizer(folder: Path) -> int:
    """A SentencePiece model with T5's conventions, as the official checkpoints ship it. Returns the number of tokens."""
    import sentencepiece

    folder.mkdir(parents=True)
    corpus = folder / "corpus.txt"
    sentences = list(world.sentences())
    words = {word for sentence in sentences for word in re.findall(r"\w+", sentence)}
    corpus.write_text("\n".join(sentences + 200 * sorted(words)), encoding="utf-8")  # so that a word is one token
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=400, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, model_type="unigram", minloglevel=2,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-")
    corpus.unlink()
    (folder / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": TOKENS, "extra_ids": 100, "eos_token": "</s>",
              "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", config)
    return Tokenizer(folder).size


def new_text_encoder(tokens: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=tokens + 28, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                                   feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, dropout_rate=0))


def new_image_encoder(part: str) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, Dinov2Config, Dinov2Model

    shape = dict(hidden_size=IMAGE_DIM, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH)
    if part == "dino":
        return Dinov2Model(Dinov2Config(**shape, mlp_ratio=3))
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=2 * TEXT_DIM, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=64,
                          bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    vision = CLIPVisionConfig(**shape, intermediate_size=3 * IMAGE_DIM, projection_dim=64)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


@lru_cache(maxsize=1)
def clip_tokenizer():
    """CLIP's tokenizer, trained on the world's words: those of the captions, and names that only CLIP's captions have."""
    from transformers import CLIPTokenizer

    start = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=TOKENS)
    return start.train_new_from_iterator([*world.sentences(), *(20 * [*world.SHAPES, *world.COLOURS])], 600)


def new_vae() -> VAE:
    return VAE(VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_height=64,
                         sample_width=64, scaling_factor=1.0))


def new_transformer(**changes) -> Transformer:
    """A transformer to be trained from nothing: as in DiT, gates, modulation and output start at zero, so that each block
    starts as the identity."""
    model = Transformer(Config(**{**BASE, **changes}))
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def start_from_base(model: Transformer, base: Path) -> None:
    """An image-to-video model that begins as the text-to-video model `base`: it does not look at its image yet."""
    weights = load_transformer(base).state_dict()
    patch = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = torch.cat([patch, torch.zeros_like(patch)], dim=1)
    model.load_state_dict(weights)


def save_half(network: nn.Module, folder: Path) -> None:
    """A network of transformers, as it is shipped: in float16."""
    network.half().save_pretrained(folder)
    if folder.name == "clip":
        clip_tokenizer().save_pretrained(folder)
    if folder.name in ("dino", "clip"):
        settings = {"crop_size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        write_json(folder / "preprocessor_config.json", settings)


def write_frame(folder: Path) -> None:
    """What is not trained: scheduler and model_index.json."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULE)
    parts = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"],
             "vae": ["diffusers", "AutoencoderKLCogVideoX"], "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
             "scheduler": ["diffusers", "CogVideoXDDIMScheduler"]}
    write_json(folder / "model_index.json", {"_class_name": "CogVideoXPipeline", **parts})


def write_variant(folder: Path, model: Transformer) -> None:
    """A transformer that shares everything else with the toy it lies in."""
    save_transformer(model, folder / "transformer", torch.bfloat16)
    name_base(folder, "..")


# --- what they learn ---------------------------------------------------------------------------------------------------


class TextTask(nn.Module):
    """T5 learns what its captions say: motion, background and look, each read off its mean feature."""

    def __init__(self, tokens: int):
        super().__init__()
        self.t5 = new_text_encoder(tokens)
        self.heads = nn.ModuleList(nn.Linear(TEXT_DIM, n) for n in (1 + len(world.MOTIONS), len(world.BACKGROUNDS),
                                                                    len(world.LOOKS)))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids [B, M], labels [B, 3] -> loss."""
        feature = self.t5(ids)[0].float().mean(dim=1)
        return sum(F.cross_entropy(head(feature), label) for head, label in zip(self.heads, labels.T))


class DINOTask(nn.Module):
    """DINOv2 learns identity: two views of one subject must be closer than views of two (InfoNCE), and from each view its
    shape, pattern and detail can be told."""

    def __init__(self):
        super().__init__()
        self.network = new_image_encoder("dino")
        self.project = nn.Linear(2 * IMAGE_DIM, 64)
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.heads = nn.ModuleList(nn.Linear(2 * IMAGE_DIM, len(names)) for names in IDENTITY)

    def forward(self, one: Tensor, two: Tensor, labels: Tensor) -> Tensor:
        """one, two: [B, 3, SIDE, SIDE]; labels [B, 3] -> loss."""
        tokens = self.network(pixel_values=torch.cat([one, two])).last_hidden_state
        features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=-1)
        a, b = F.normalize(self.project(features), dim=-1).chunk(2)
        logits, same = self.scale.exp() * a @ b.T, torch.arange(len(a), device=a.device)
        told = sum(F.cross_entropy(head(features), label.repeat(2)) for head, label in zip(self.heads, labels.T))
        return told + (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


IDENTITY = (world.SHAPES, world.PATTERNS, world.DETAILS)


class CLIPTask(nn.Module):
    """CLIP learns which caption belongs to which picture."""

    def __init__(self):
        super().__init__()
        self.network = new_image_encoder("clip")
        scale = self.network.logit_scale.data  # stays as it is: FSDP2 shards no scalars
        del self.network.logit_scale
        self.network.register_buffer("logit_scale", scale)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels [B, 3, SIDE, SIDE], ids and mask [B, M] -> loss."""
        return self.network(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True).loss


class VAETask(nn.Module):
    """Reconstruction, of edges too, beside the KL divergence of the latents. First by absolute error; then by Huber's, which lets
    go of what is nearly right, the backgrounds, and heeds what is not, the subjects that move."""

    def __init__(self, stage: str):
        super().__init__()
        self.vae, self.stage = new_vae(), stage
        _, _, _, self.far, self.weight, self.kl = VAE_STAGES[stage]

    def forward(self, video: Tensor, masks: Tensor, noise: Tensor) -> Tensor:
        """video [B, 3, F, H, W], masks of the subject [B, 1, F, H, W], noise like its latents -> loss."""
        mean, std = self.vae.encode(video.to(self.vae.encoder.conv_in.conv.weight.dtype))
        out = self.vae.decode(mean + std * noise.to(mean)).float()
        weight = 1 + self.weight * F.max_pool3d(masks, (1, 5, 5), stride=1, padding=(0, 2, 2))  # the rim of 2 pixels as well
        kl = 0.5 * (mean.float().square() + std.float().square() - 2 * std.float().log() - 1).mean()
        far = (weight * self.far(out, video, reduction="none")).mean()
        for d in (-1, -2):
            edges = self.far(out.diff(dim=d), video.diff(dim=d), reduction="none")
            far = far + (weight.narrow(d, 1, edges.shape[d]) * edges).mean()
        return far + self.kl * kl


HUBER = partial(F.smooth_l1_loss, beta=0.2)
# The stages of the VAE, each from where the one before ended: steps; learning rate; streams in turn, of which clips teach time and
# single frames cost a third; distance; how much more a pixel of the subject counts; weight of the KL divergence. In the last stage the
# latents pay for their information: what they drop nobody sees, but a small transformer would have to learn it.
VAE_STAGES = {"vae": (10000, 2e-3, ("frames", "clips"), F.l1_loss, 0.0, 1e-3),
              "vae_moving": (8000, 1e-3, ("clips",), HUBER, 0.0, 1e-4),
              "vae_sharp": (9000, 2.5e-3, ("frames", "clips"), HUBER, 4.0, 5e-2)}
