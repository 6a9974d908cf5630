"""The toy: a complete checkpoint in the official layout, trained on the toy's world by this repository's own code.

    python toy.py build [--stages vae base ..] trains one, stage by stage; a stage that was stopped goes on where it was
    python toy.py score [--count 64]           identity, motion, background and look on held-out subjects, by method

checkpoints/toy was made so but for its history, which the README tells.
"""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import distributed
import evaluate
import media
import world
from cache import Cache, stored_settings, write_cache
from checkpoint import BadInput, exit_status, name_base, write_text
from data import Encoder, Stream, Toy, posterior_sample
from diffusion import alpha_bar_schedule, training_loss
from encoders import Tokenizer
from lora import read_adapter, save_adapter
from model import load_transformer, save_tensors
from toy_networks import (IDENTITY, SCHEDULE, SIDE, TOKENS, VAE_STAGES, CLIPTask, DINOTask, TextTask, VAETask, clip_tokenizer,
                          new_transformer, save_half, start_from_base, write_frame, write_tokenizer, write_variant)
from training import DTYPES, Options, generator, train, usual_dtype
from vae import latent_size, load_vae, save_vae


# Steps and learning rate. The second stage of the base goes on from the first, the image-to-video model from the base.
TRANSFORMER_STAGES = {"base": (5000, 3e-3), "base_long": (16000, 2e-3), "i2v": (1500, 1e-3)}
# Steps of train_sugar.py's stages, and its flags. What DINO's and CLIP's tokens mean has to be learned from nothing, on real videos;
# then comes the paper's strategy, and then, as shapes take long, all blocks four times more, which see DINO's tokens more often.
SUGAR_STAGES = {"sugar_real": ((5000,), "--strategy mix --p 0 --lr 1e-3"), "sugar": ((8000, 6000), "--strategy tsf --lr 1.5e-3"),
                "sugar_long": ((16000,), "--strategy mix --p 0.5 --drop-dino 0.2 --drop-text 0.1 --lr 2e-3 --warmup 200"),
                "sugar_looks": ((18000,), "--strategy mix --p 0.7 --drop-dino 0.2 --drop-text 0.1 --lr 2e-3 --warmup 200 --seed 1"),
                "sugar_more": ((17000,), "--strategy mix --p 0.8 --drop-dino 0.1 --drop-text 0.1 --lr 2e-3 --warmup 200 --seed 2"),
                "sugar_again": ((16000,), "--strategy mix --p 0.8 --drop-dino 0.1 --drop-text 0.1 --lr 2e-3 --warmup 200 --seed 3")}


VAE_BATCH = {"clips": 2, "frames": 8}


class Builder:
    """The stages of `toy.py build`. Each is a run of training.train() below `work`, and writes its network into `folder`."""

    def __init__(self, folder: Path, work: Path, ranks: distributed.Ranks, scale: float, seed: int = 0):
        self.folder, self.work, self.ranks, self.scale, self.seed = folder, work, ranks, scale, seed
        self.dtype = DTYPES[usual_dtype(ranks.device)]  # of what takes long
        if ranks.first:
            write_frame(folder)
            if not (folder / "tokenizer").exists():
                shutil.rmtree(folder / ".tokenizer-part", ignore_errors=True)
                write_tokenizer(folder / ".tokenizer-part")
                (folder / ".tokenizer-part").rename(folder / "tokenizer")
        ranks.wait()

    def fit(self, stage: str, model: nn.Module, blocks: list[nn.Module], steps: int, lr: float,
            plan: Callable[[int], tuple[str, int]], loss_of: Callable[[str, list[int]], Tensor], dtype=torch.float32) -> dict:
        """Trains all of `model`; returns its whole weights."""
        distributed.shard(model, blocks, self.ranks, dtype)
        steps = self.count(steps, least=2)
        options = Options(out=self.work / stage, steps=steps, lr=lr, seed=self.seed, warmup=min(200, steps // 2),
                          micro_batch=64, ema=0.999 if steps > 4000 else 0.0, save_every=200, keep=1, validate_count=0)
        if not train(model, options, self.ranks, plan, loss_of, lambda step: None, {"stage": stage, "steps": steps}):  # by a signal
            distributed.leave(0)
        return distributed.full_state_dict(model)

    def count(self, whole: int, least: int = 8) -> int:
        """Examples, or steps, at this scale."""
        return max(round(whole * self.scale), least)

    def cached(self, stream: str, whole: int, encoder: Encoder) -> Cache:
        """A stream of the world, encoded once, every rank its share."""
        return write_cache(self.work / stream, Toy(stream, self.seed), self.count(whole), encoder, self.ranks, self.seed,
                           stored_settings(encoder, stream))

    def rng(self, stage: str, position: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *stage.encode(), position))

    def text_encoder(self) -> None:
        tokenizer = Tokenizer(self.folder / "tokenizer")
        model = TextTask(tokenizer.size).to(self.ranks.device)

        def loss_of(stream: str, positions: list[int]) -> Tensor:
            ids, labels = torch.zeros(len(positions), TOKENS, dtype=torch.long), []
            for row, position in zip(ids, positions):
                rng = self.rng("text", position)
                still = {"motion": None} if rng.random() < 0.1 else {}
                scene = world.sample_scene(rng, look=world.pick(rng, world.LOOKS), **still)
                tokens = tokenizer(world.caption(scene, rng))
                row[: len(tokens)] = torch.tensor(tokens)
                labels.append([list(names).index(name) for names, name in (((None, *world.MOTIONS), scene.motion),
                               (world.BACKGROUNDS, scene.background), (world.LOOKS, scene.look))])
            return model(ids.to(self.ranks.device), torch.tensor(labels, device=self.ranks.device))

        weights = self.fit("text_encoder", model, [], 800, 2e-3, lambda step: ("captions", 64), loss_of)
        self.finish(TextTask(tokenizer.size), weights, lambda task: save_half(task.t5, self.folder / "text_encoder"))

    def picture(self, rng: np.random.Generator, subject: world.Subject, look: str) -> tuple[Tensor, str]:
        """The subject at some moment, before its background or alone, and a caption: [3, SIDE, SIDE]."""
        still = {"motion": None} if rng.random() < 0.5 else {}
        scene, frame = world.sample_scene(rng, subject=subject, look=look, **still), int(rng.integers(world.FRAMES))
        this = slice(frame, frame + 1)
        [image], text = world.render(scene, this), world.caption(scene, rng)
        if rng.random() < 0.5:
            image, text = world.alone(image, world.masks(scene, this)[0]), world.LOOKS[look][rng.integers(2)].format(world.NOUN)
        return media.image_to_tensor(media.Image.fromarray(image).resize((SIDE, SIDE))), text

    def dino(self) -> None:
        model = DINOTask().to(self.ranks.device)

        def loss_of(stream: str, positions: list[int]) -> Tensor:
            views, labels = ([], []), []
            for position in positions:
                rng = self.rng(stream, position)
                subject = world.sample_subject(rng)
                for view in views:
                    view.append(self.picture(rng, subject, world.pick(rng, world.LOOKS))[0])
                labels.append([list(names).index(name) for names, name in
                               zip(IDENTITY, (subject.shape, subject.pattern, subject.detail))])
            one, two = (torch.stack(view).to(self.ranks.device) for view in views)
            return model(one, two, torch.tensor(labels, device=self.ranks.device))

        weights = self.fit("dino", model, [], 2000, 1e-3, lambda step: ("views", 64), loss_of)
        self.finish(DINOTask(), weights, lambda task: save_half(task.network, self.folder / "dino"))

    def clip(self) -> None:
        model, tokenizer = CLIPTask().to(self.ranks.device), clip_tokenizer()

        def loss_of(stream: str, positions: list[int]) -> Tensor:
            pictures, texts = [], []
            for position in positions:
                rng = self.rng(stream, position)
                subject = world.sample_subject(rng)
                picture, text = self.picture(rng, subject, world.pick(rng, world.LOOKS))
                if rng.random() < 0.5:  # what no other network is told: CLIP has words for the subject
                    text = text.replace(world.NOUN, f"{subject.primary} {subject.shape}")
                pictures.append(picture)
                texts.append(text)
            words = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(self.ranks.device)
            return model(torch.stack(pictures).to(self.ranks.device), words.input_ids, words.attention_mask)

        weights = self.fit("clip", model, [], 2000, 1e-3, lambda step: ("captions", 64), loss_of)
        self.finish(CLIPTask(), weights, lambda task: save_half(task.network, self.folder / "clip"))

    def masked(self, rng: np.random.Generator, stream: str) -> dict:
        """What the VAE learns from: "video" and "masks" of the subject. "clips", or "frames": photographs and portraits."""
        if stream == "clips":
            return world.sample_masked(rng, looks=tuple(world.LOOKS))
        scene = world.sample_scene(rng, look=world.pick(rng, world.LOOKS), motion=None)
        if rng.random() < 0.25:
            image = world.portrait(scene.subject, scene.look, rng.uniform(1.0, 1.4), rng.uniform(-15, 15))[None]
            return {"video": image[..., :3], "masks": image[..., 3] > 127}
        return {"video": world.render(scene, slice(1)), "masks": world.masks(scene, slice(1))}

    def vae(self, stage: str) -> None:
        model, (steps, lr, streams, *_) = VAETask(stage).to(self.ranks.device), VAE_STAGES[stage]
        if stage != "vae":
            model.vae.load_state_dict(load_vae(self.folder / "vae").state_dict())

        def plan(step: int) -> tuple[str, int]:
            stream = streams[step % len(streams)]
            return stream, VAE_BATCH[stream]

        def loss_of(stream: str, positions: list[int]) -> Tensor:
            videos, masks, device = [], [], self.ranks.device
            for position in positions:
                drawn = self.masked(self.rng(stage + stream, position), stream)
                videos.append(drawn["video"])
                masks.append(drawn["masks"])
            video = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).to(device).float() / 127.5 - 1
            noise = torch.randn(len(videos), 16, *latent_size(*video.shape[2:]), generator=generator(self.seed, stream, positions[0]))
            return model(video, torch.from_numpy(np.stack(masks))[:, None].to(device).float(), noise.to(device))

        weights = self.fit(stage, model, [], steps, lr, plan, loss_of, self.dtype)
        self.finish(VAETask(stage), weights, self.save_scaled_vae)

    @torch.no_grad()
    def save_scaled_vae(self, task: VAETask) -> None:
        """scaling_factor makes the latents' deviation 1, as the transformer expects. When the VAE is finished, a tenth of the latents'
        noise is left: it has taught the decoder what to ignore, and a small transformer would take long to learn that it is noise."""
        if task.stage == list(VAE_STAGES)[-1]:
            _, logvar = task.vae.encoder.conv_out.conv.bias.chunk(2)
            logvar -= 2 * np.log(10)
        frames = np.stack([world.sample_video(self.rng("scale", i))["video"][:1] for i in range(64)])
        mean, std = task.vae.encode(torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
        task.vae.config.scaling_factor = round(1 / (mean.var() + std.square().mean()).sqrt().item(), 4)
        save_vae(task.vae.half(), self.folder / "vae")

    def transformer(self, stage: str) -> None:
        """The text-to-video base ("base", "base_long"): clips in all looks and, every other step, twice as many single pictures, as
        they cost half. Or the image-to-video model ("i2v"): clips."""
        i2v, (steps, lr) = stage == "i2v", TRANSFORMER_STAGES[stage]
        model = new_transformer(**({"in_channels": 32} if i2v else {})).to(self.ranks.device)
        if stage == "base_long":
            model.load_state_dict(load_transformer(self.folder / "transformer").state_dict())
        if i2v:
            start_from_base(model, self.folder / "transformer")
        encoder = Encoder(self.folder, "none", TOKENS, self.ranks.device, reference_frames=1)
        cache = self.cached("styled", 12000, encoder)
        clips = Stream(cache, len(cache), encoder, self.seed)
        alpha_bar, null = alpha_bar_schedule(SCHEDULE).to(self.ranks.device), encoder.null

        def plan(step: int) -> tuple[str, int]:
            return ("clips", 32) if step % 2 == 0 or i2v else ("pictures", 64)

        def draw(stream: str, position: int) -> tuple[Tensor, ...]:
            encoded, g = clips[position], generator(self.seed, stage, stream, position)
            x_0 = encoder.vae_config.scale(posterior_sample(encoded["mean"], encoded["std"], g)).transpose(0, 1)
            alone = posterior_sample(encoded["ref_mean"][0], encoded["ref_std"][0], g)  # the first frame, encoded as a picture
            if stream == "pictures":
                x_0 = encoder.vae_config.scale(alone)[None]
            first = torch.zeros_like(x_0)  # what the image-to-video model is given: the first frame, and zeros
            first[0] = encoder.vae_config.scale(alone, image=True)
            text = null if torch.rand((), generator=g) < 0.1 else encoded["text"]
            return x_0, torch.randn(x_0.shape, generator=g), torch.randint(1000, (), generator=g), text, first

        def loss_of(stream: str, positions: list[int]) -> Tensor:
            samples = zip(*(draw(stream, position) for position in positions))
            x_0, eps, t, text, first = (torch.stack(part).to(self.ranks.device) for part in samples)
            to = lambda x: x.to(self.dtype)
            predict = lambda x_t, t: model(to(torch.cat([x_t, first], dim=2) if i2v else x_t), t, to(text))
            return training_loss(predict, x_0, eps, t, alpha_bar)

        weights = self.fit(stage, model, list(model.transformer_blocks), steps, lr, plan, loss_of, self.dtype)
        if self.ranks.first:
            out = self.folder / "i2v" if i2v else self.folder
            save_tensors(model.config, {key: value.bfloat16() for key, value in weights.items()}, out / "transformer")
            if i2v:
                name_base(out, "..")

    def switch(self) -> None:
        """The adapter, by the paper's own trainer."""
        import train_switch

        out = self.work / "switch"
        encoder = Encoder(self.folder, "token", TOKENS, self.ranks.device)
        train_switch.run(train_switch.parse(
            ["--model", str(self.folder), "--out", str(out), "--device", str(self.ranks.device), "--steps", str(self.count(12000, least=2)),
             "--image-data", str(self.cached("pairs", 8000, encoder).folder),
             "--video-data", str(self.cached("videos", 4000, encoder).folder), "--validate-every", "1000"]))
        self.ranks.wait()
        file = out / "pytorch_lora_weights.safetensors"
        if not file.exists():  # stopped by a signal
            distributed.leave(0)
        if self.ranks.first:
            half = {key.removeprefix("transformer."): tensor.half() for key, tensor in load_file(file).items()}
            save_adapter(half, self.folder / "switch", read_adapter(file))

    def sugar(self, stage: str) -> None:
        """The SUGAR model, design (b), by the paper's own trainer: each stage goes on from the one before."""
        import train_sugar

        (steps, flags), out, stages = SUGAR_STAGES[stage], self.work / stage, list(SUGAR_STAGES)
        before = self.folder if stage == stages[0] else self.work / stages[stages.index(stage) - 1]
        encoder = Encoder(self.folder, "none", TOKENS, self.ranks.device, sugar=True)
        train_sugar.run(train_sugar.parse(
            ["--model", str(before), "--out", str(out),
             "--device", str(self.ranks.device), *flags.split(),
             *(word for flag, count in zip(("--steps", "--second-steps"), steps) for word in (flag, str(self.count(count, least=2)))),
             "--real-data", str(self.cached("subjects", 14000, encoder).folder),
             "--data", str(self.cached("triplets", 44000, encoder).folder), "--validate-every", "1000", "--validate-count", "4"]))
        self.ranks.wait()
        if not (out / "model_index.json").exists():
            distributed.leave(0)
        if self.ranks.first and stage == stages[-1]:
            write_variant(self.folder / "sugar", load_transformer(out / "transformer"))

    def finish(self, task: nn.Module, weights: dict[str, Tensor], save: Callable[[nn.Module], None]) -> None:
        """Puts the gathered weights into a fresh task and lets it save its network."""
        if self.ranks.first:
            task.load_state_dict(weights)
            save(task.eval())


STAGES = {"text_encoder": Builder.text_encoder, "clip": Builder.clip, "dino": Builder.dino,
          **{stage: partial(Builder.vae, stage=stage) for stage in VAE_STAGES},
          **{stage: partial(Builder.transformer, stage=stage) for stage in TRANSFORMER_STAGES},
          "switch": Builder.switch, **{stage: partial(Builder.sugar, stage=stage) for stage in SUGAR_STAGES}}


def build(args: argparse.Namespace) -> None:
    ranks = distributed.start(args.device)
    for stage in VAE_STAGES.keys() & {*args.stages}:  # now, not when it comes to them
        if not (args.work / stage / "done").exists():
            ranks.share(min(VAE_BATCH[stream] for stream in VAE_STAGES[stage][2]))
    builder = Builder(args.out, args.work, ranks, args.scale)
    for stage in args.stages:
        done = args.work / stage / "done"  # with the scale at which it was
        if done.exists() and done.read_text() != str(args.scale):
            raise BadInput(f"{done.parent} was built with --scale {done.read_text()}: choose another --work and --out, or remove it.")
        if not done.exists():
            print(f"{stage}:")
            STAGES[stage](builder)
            if ranks.first:
                done.parent.mkdir(parents=True, exist_ok=True)
                write_text(done, str(args.scale))
            ranks.wait()  # the next stage reads what the first rank has just written
    print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "score"])
    parser.add_argument("--out", type=Path,
                        help="the checkpoint that build writes and score reads (default: runs/toy/checkpoint; checkpoints/toy)")
    parser.add_argument("--work", type=Path, default=Path("runs/toy"), help="build: checkpoints of the stages (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="build: these alone (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="build: of steps and data; a small "
                        "number tries it out, with a --work and --out of its own")
    parser.add_argument("--count", type=int, default=64, help="score: subjects and texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="score: another one takes other subjects (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/toy/checkpoint" if args.command == "build" else "checkpoints/toy")
    return exit_status(lambda: {"build": build, "score": score}[args.command](args))


def score(args: argparse.Namespace) -> None:
    """Base, Switch and SUGAR on held-out subjects, scored by evaluate.py. SUGAR's texts ask for every look."""
    folders = {"base": ["--no-image", "--", "--model", args.out],
               "switch": ["--", "--model", args.out, "--adapter", args.out / "switch"],
               "sugar": ["--looks", "--", "--model", args.out / "sugar"]}
    for method, more in folders.items():
        shutil.rmtree(args.work / "score" / method, ignore_errors=True)  # the checkpoint may be another by now
        command = ["generate", "--out", args.work / "score" / method, "--count", args.count, "--seed", args.seed, *more, "--steps", 25]
        evaluate.generate(evaluate.parse([*map(str, command), *(["--device", args.device] if args.device else [])]))
    evaluate.score(evaluate.parse(["score", *(str(args.work / "score" / method) for method in folders), "--own", str(args.out)]))


if __name__ == "__main__":
    distributed.leave(main())
