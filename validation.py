"""Validation: a few held-out subjects are sampled with the model in training, for a person to look at and, where the data
can measure, for the record."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import media
from data import Encoder, ToyTest
from distributed import Ranks
from pipeline import Conditions, Settings, noise_source, sample_latents


class Validation:
    """validate(step): writes validation/step-N.png and .gif, and a line of mean scores to validation.jsonl.

    Every rank samples, as a sharded model needs them all; the first one writes.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, alpha_bar: torch.Tensor, examples: ToyTest, out: Path, ranks: Ranks,
                 dtype: torch.dtype, count: int = 4, with_reference: bool = True, settings: Settings | None = None):
        self.model, self.encoder, self.alpha_bar, self.examples = model, encoder, alpha_bar, examples
        self.out, self.ranks, self.dtype, self.with_reference = out, ranks, dtype, with_reference
        self.count, self.settings = count, settings or Settings(0, 0, 0, 8, "ddim", steps=20)

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        rows, scores = [], []
        for number in range(self.count):
            example = self.examples[number]
            frames = self.sample(example, number)
            rows.append((media.on_white(example.image), example.text, frames))
            if example.measure is not None and self.ranks.first:
                scores.append(example.measure(frames))
        if not self.ranks.first:
            return
        folder = self.out / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        media.save_sheet(rows, folder / f"step-{step:06d}")
        if scores:
            mean = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
            with (self.out / "validation.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **mean}) + "\n")

    def sample(self, example, seed: int) -> np.ndarray:
        """uint8 frames [F, H, W, 3] of the example's subject doing what its text says."""
        to = lambda tensor: tensor[None].to(self.ranks.device, self.dtype)
        given = Conditions(to(self.encoder.text(example.text, example.noun)), to(self.encoder.text("")))
        height, width = example.video.shape[1:3]
        if self.encoder.sugar:
            image = media.on_white(example.image)
            given.dino, given.clip = (to(encoder([image])[0]) for encoder in self.encoder.image_encoders.values())
        elif self.with_reference:
            fitted = np.asarray(media.fit(example.image, height, width, "pad"))
            given.reference = to(self.encoder.vae_config.scale(self.encoder.posterior(fitted[None])[0].float())[:, 0])
        T = (len(example.video) - 1) // 4 + 1
        x = noise_source(seed)(1, T, self.model.config.out_channels, height // 8, width // 8).to(self.ranks.device)
        latents = sample_latents(self.model, given, self.alpha_bar.cpu(), self.settings, x, noise=lambda: None)
        vae = self.encoder.vae
        return media.video_to_frames(vae.decode(vae.config.unscale(latents.transpose(1, 2)).to(self.encoder.dtype))[0])
