"""Both trainers: the branches and rates are those asked for, who learns, what is drawn; whole runs are in test_runs.py."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VARIANTS, randomize, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import distributed
import toy_networks
import train_sugar
import train_switch
import untrained
from checkpoint import BadInput
from data import Encoder, OneFrame, Stream, Toy, ToyTest, posterior_sample, shuffled
from diffusion import alpha_bar_schedule
from distributed import local
from encoders import ImageEncoder
from lora import Adapter, inject
from model import Config, Transformer, load_transformer
from resume import bounds
from training import Options, claim, generator, learning_rate, set_defaults, train
from vae import VAE, VAEConfig
from validation import Validation

# --- what is drawn ----------------------------------------------------------------------------------------------------


def switch(arguments: str):
    return train_switch.parse(arguments.split())


def test_the_switch_is_thrown_with_probability_p_and_by_number(seed):
    args = switch(f"--p 0.2 --seed {seed}")
    phases = [train_switch.phase_of(step, args) for step in range(3000)]
    share = phases.count("video") / len(phases)
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 3000)
    assert phases == [train_switch.phase_of(step, args) for step in range(3000)]
    assert phases != [train_switch.phase_of(step, switch(f"--p 0.2 --seed {seed + 1}")) for step in range(3000)]


def test_strategies_of_switch():
    def phases(more):
        args = switch(f"--steps 10 --p 0.2 {more}")
        return [train_switch.phase_of(step, args, run) for run, steps in train_switch.runs_of(args) for step in range(steps)]

    assert phases("--strategy image-only") == ["image"] * 10 and phases("--strategy video-only") == ["video"] * 10
    assert phases("--strategy two-stage") == ["image"] * 8 + ["video"] * 2
    assert train_switch.runs_of(switch("--steps 10")) == [("", 10)]


def test_stages_of_sugar():
    stages = lambda arguments: [(s.p, s.frozen) for s in train_sugar.stages_of(train_sugar.parse(arguments.split()))]
    assert stages("--strategy mix --p 0") == [(0, False)] and stages("--strategy mix --p 1") == [(1, False)]
    assert stages("--strategy ts") == [(0, False), (0.5, False)]
    assert stages("--strategy tsf") == [(0, False), (0.5, True)]


def test_the_second_stage_may_have_a_length_of_its_own():
    lengths = lambda arguments: [stage.steps for stage in train_sugar.stages_of(train_sugar.parse(arguments.split()))]
    assert lengths("--steps 5 --second-steps 3") == [5, 3] and lengths("--steps 5") == [5, 5] and lengths("--strategy mix --steps 5") == [5]
    with pytest.raises(BadInput, match="one stage"):
        lengths("--strategy mix --second-steps 3")


def test_an_epoch_meets_every_example_once(seed):
    for epoch in range(3):
        met = [shuffled(epoch * 17 + i, 17, seed) for i in range(17)]
        assert sorted(met) == list(range(17))
    assert [shuffled(i, 17, seed) for i in range(17)] != [shuffled(17 + i, 17, seed) for i in range(17)]


def test_learning_rate_warms_up_and_follows_a_cosine():
    options = Options(out=Path("x"), steps=110, lr=2.0, warmup=10)
    assert learning_rate(0, options) == pytest.approx(0.2) and learning_rate(9, options) == 2.0
    assert learning_rate(10, options) == 2.0 and learning_rate(60, options) == pytest.approx(1.0)
    assert learning_rate(109, options) < 0.001
    short = replace(options, steps=8)  # shorter than the warm-up, which then takes half of it
    assert [learning_rate(step, short) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0] and learning_rate(7, short) < 0.3


def test_generators_depend_on_the_key_alone():
    draw = lambda *key: torch.rand(3, generator=generator(*key)).tolist()
    assert draw(1, "image", 5) == draw(1, "image", 5)
    assert len({tuple(draw(*key)) for key in ((1, "image", 5), (1, "image", 6), (1, "video", 5), (2, "image", 5))}) == 4


@pytest.mark.parametrize("length,world", [(10, 3), (7, 8), (64, 2), (1, 4)])
def test_shards_are_cut_as_torch_cuts_them(length, world):
    chunks = list(torch.arange(length).chunk(world)) + [torch.empty(0)] * world
    for rank in range(world):
        low, high = bounds(length, rank, world)
        assert list(range(low, high)) == chunks[rank].tolist()


# --- what is learned ----------------------------------------------------------------------------------------------------


def encoded_sample(**more):
    latents = {name: torch.randn(16, 3, 8, 8).half() for name in ("mean", "std")}
    references = {name: torch.randn(4, 16, 8, 8).half() for name in ("ref_mean", "ref_std")}
    return {**latents, **references, "text": torch.ones(toy_networks.TOKENS, toy_networks.TEXT_DIM).half(), **more}


def vae():
    return VAEConfig(scaling_factor=0.7)


@pytest.mark.parametrize("unit,size", [("reference", 1), ("token", 16)])
def test_references_are_dropped_at_the_rate_asked_for(unit, size, seed):
    args, network = switch(f"--reference-drop 0.3 --reference-drop-unit {unit}"), vae()
    encoded = encoded_sample()
    kept = [train_switch.draw(encoded, generator(seed, "x", i), network, args)[-1] for i in range(600)]
    assert all(keep.shape == (16,) for keep in kept)
    if unit == "reference":
        assert all(keep.all() or not keep.any() for keep in kept)
    rate = 1 - torch.stack(kept).float().mean().item()
    assert abs(rate - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (600 * size))


def test_every_frame_is_drawn_as_reference(seed):
    encoded = encoded_sample(ref_mean=torch.arange(4.0).view(4, 1, 1, 1).expand(4, 16, 8, 8), ref_std=torch.zeros(4, 16, 8, 8))
    drawn = [train_switch.draw(encoded, generator(seed, "x", i), vae(), switch(""))[4] for i in range(40)]
    assert {round(reference[0, 0, 0].item() / 0.7) for reference in drawn} == {0, 1, 2, 3}


def test_conditions_of_sugar_are_dropped_independently_at_their_rates(seed):
    args, network, n = train_sugar.parse([]), vae(), 1500
    null = torch.zeros(toy_networks.TOKENS, toy_networks.TEXT_DIM).half()
    encoded = encoded_sample(dino=torch.ones(65, 8), clip=torch.ones(65, 8))
    samples = [train_sugar.draw(encoded, generator(seed, "x", i), network, null, args) for i in range(n)]
    dropped = np.array([[not s[6], not s[7], not s[3].any()] for s in samples], dtype=float)
    for column, rate in enumerate((0.5, 0.2, 0.2)):  # SUGAR 3.2
        assert abs(dropped[:, column].mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    assert np.abs(np.corrcoef(dropped.T) - np.eye(3)).max() < 4 / math.sqrt(n)


def test_only_the_lora_learns_and_the_norms_lora_only_from_the_reference():
    model = train_switch.prepare(randomize(Transformer(Config(**VARIANTS["5b"]))), Adapter(rank=2, alpha=2, dropout=0))
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in key)
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter)
    x, t, text, reference = torch.randn(1, 3, 16, 8, 8), torch.tensor([500]), torch.randn(1, 10, 32), torch.randn(1, 16, 8, 8)

    def learned(**given):
        model.zero_grad()
        model(x, t, text, **given).square().mean().backward()
        return {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    loras = {key for key, p in model.named_parameters() if p.requires_grad}
    norms = {key for key in loras if "norm" in key}
    last = {key for key in norms if "transformer_blocks.1.norm2" in key}  # what comes after the last attention is not seen
    assert learned(reference=reference) >= loras - last and norms
    assert not learned() & norms
    assert not learned(reference=reference, keep_reference=torch.zeros(1, 16, dtype=torch.bool)) & norms


class Attentions(TorchDispatchMode):
    """Counts the attentions that are computed inside it, the backward passes' own kernels aside."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "_scaled_dot_product" in op.name() and "backward" not in op.name()
        return op(*args, **(kwargs or {}))


def counted(run) -> tuple[int, object]:
    """Attentions that are computed, and what is returned."""
    with Attentions() as attentions:
        out = run()
    return attentions.count, out


def profiled(run) -> tuple[int, object]:
    """The same in compiled code, of blocks that keep them: where one is asked for and not kept yet, it is computed from within torch's
    mode that keeps it. While code is compiled, there are more."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = run()
    within = lambda event: event.cpu_parent is not None and event.cpu_parent.name == "PythonDispatchMode"
    return sum("_scaled_dot_product" in event.name and "backward" not in event.name and within(event) for event in profile.events()), out


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("recompute,adapted,compiled", [
    *product(["all", "keep-attention"], [None, "all", "reference"], [False]),
    pytest.param("keep-attention", "all", True, marks=needs_compiler)])
def test_recomputed_or_compiled_blocks_give_the_same_gradients(recompute, adapted, compiled):
    """Also with a LoRA, on all tokens or on the reference's, when what is frozen is no part of FSDP2."""
    model, given = Transformer(Config(**VARIANTS["5b"])), dict(
        x=torch.randn(1, 3, 16, 8, 8), t=torch.tensor([500]), text=torch.randn(1, 10, 32), reference=torch.randn(1, 16, 8, 8))
    if adapted:
        randomize(model).requires_grad_(False)
        inject(model, rank=3, dropout=0.0)
        randomize(model).set_lora_tokens("reference", adapted)
    model(**given).square().mean().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    ranks = distributed.start("cpu")
    distributed.shard(model, list(model.transformer_blocks), ranks, torch.float32, recompute, compiled)
    counts, attentions = len(model.transformer_blocks), profiled if compiled else counted
    forward, loss = attentions(lambda: model(**given).square().mean())
    backward, _ = attentions(loss.backward)
    assert forward == counts or compiled and forward > counts
    assert backward == (0 if recompute == "keep-attention" else counts)
    for key, gradient in expected.items():
        assert relative_error(model.get_parameter(key).grad.to_local(), gradient) < 1e-4 or gradient.norm() < 1e-6, key


@needs_compiler
def test_compiled_blocks_compute_the_same_in_one_piece():
    """Training, sampling with guidance in between, and training: a graph each, which both blocks share."""
    model = randomize(Transformer(Config(**VARIANTS["5b"])))
    given = dict(x=torch.randn(2, 3, 16, 8, 8), t=torch.tensor([500, 3]), text=torch.randn(2, 10, 32), reference=torch.randn(2, 16, 8, 8))
    model(**given).square().mean().backward()
    expected, grads = model(**given).detach(), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    names = list(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    distributed.compile_blocks(list(model.transformer_blocks))
    assert list(model.state_dict()) == names
    model(**given)
    with torch.no_grad():
        assert relative_error(model(**given), expected) < 1e-5
    model(**given).square().mean().backward()
    assert all(relative_error(p.grad, grad) < 1e-4 or grad.norm() < 1e-6 for p, grad in zip(model.parameters(), grads))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("main", [train_switch.main, train_sugar.main])
def test_the_plan_says_what_a_run_takes_and_does_not_train(main, base, tmp_path, capsys):
    assert main(f"--plan --model {base} --out {tmp_path / 'run'} --device cpu --gpu-memory 0.001 --rate 10".split()) == 0
    said = capsys.readouterr().out
    for phrase in ("trainable parameters", "tokens in a sample", "AdamW", "activations of 16", "hours", "disk per checkpoint",
                   "warning: "):
        assert phrase in said
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_the_tokens_of_the_bases_own_image_encoders(base, tmp_path, capsys):
    assert train_sugar.main(f"--plan --model {base} --out {tmp_path / 'run'} --device cpu".split()) == 0
    tokens = int(re.search(r"tokens in a sample +([\d,]+)", capsys.readouterr().out)[1].replace(",", ""))
    seen = sum(ImageEncoder(base, part).tokens for part in ("dino", "clip"))
    assert tokens == seen + toy_networks.TOKENS + 3 * 4 * 4


@pytest.mark.parametrize("main,batches,more", [
    (train_switch.main, (256, 32), {"rank": 128, "alpha": 64, "dropout": 0.1, "lr": 5e-5}), (train_sugar.main, (64,), {"lr": 1e-5})])
def test_defaults_are_the_papers_unless_the_base_is_of_the_toys_size(main, batches, more, base, tmp_path, monkeypatch, capsys):
    large = tmp_path / "large"
    shutil.copytree(base, large)
    config = large / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_frames": 17}))
    assert main(f"--plan --model {large} --out {tmp_path / 'run'} --device cpu".split()) == 0
    said = capsys.readouterr().out
    steps = {train_switch.main: 4000, train_sugar.main: 10000}[main]
    assert re.search(rf"steps +{steps:,} on 1 rank", said) and "activations of 1 sample " in said
    trainer = {train_switch.main: train_switch, train_sugar.main: train_sugar}[main]
    for toy in (False, True):
        args = trainer.parse(["--lr", "3e-4"])
        set_defaults(args, trainer.DEFAULTS, toy)
        wanted = {"steps": steps, **dict(zip(("image_batch", "video_batch") if len(batches) == 2 else ("batch",), batches)), **more, "lr": 3e-4}
        assert all((getattr(args, name) == value) != (toy and name != "lr") for name, value in wanted.items())
    for has_bf16, flags, dtype in ((True, "", "bf16"), (False, "", "fp32"), (False, "--dtype bf16", "bf16"), (False, "--plan", "bf16")):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
        args = trainer.parse([*flags.split(), "--device", "cpu"])
        set_defaults(args, trainer.DEFAULTS, toy=True)
        assert args.dtype == dtype  # in bfloat16 a CPU without instructions for it takes ten times as long; a plan is for other machines
    assert main(f"--model {large} --out {tmp_path / 'run'} --device cpu".split()) == 2  # it would draw 64x64 creatures for it
    assert "name data of your own" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_plan_is_for_the_clips_that_are_asked_for(base, tmp_path, capsys):
    tokens = []
    for size in ("", "--frames 17 --height 96 --width 64"):
        assert train_switch.main(f"--plan --model {base} --out {tmp_path / 'run'} --device cpu {size}".split()) == 0
        tokens.append(int(re.search(r"tokens in a sample +([\d,]+)", capsys.readouterr().out)[1].replace(",", "")))
    assert tokens == [toy_networks.TOKENS + (3 + 1) * 4 * 4, toy_networks.TOKENS + (5 + 1) * 6 * 4]
    assert train_switch.main(f"--plan --model {base} --out {tmp_path / 'run'} --device cpu --strategy image-only".split()) == 0
    assert f"tokens in a sample     {toy_networks.TOKENS + 2 * 4 * 4}\n" in capsys.readouterr().out  # a picture and its reference


@pytest.mark.parametrize("main,batches", [(train_switch.main, "--image-batch 4096 --video-batch 4096"), (train_sugar.main, "--batch 4096")])
def test_a_plan_in_float32_counts_twice_the_activations(main, batches, base, tmp_path, capsys):
    sizes = []
    for dtype in ("bf16", "fp32"):
        assert main(f"--plan --model {base} --out {tmp_path / 'run'} --device cpu --micro-batch 4096 {batches} --dtype {dtype}".split()) == 0
        sizes.append(float(re.search(r"activations of 4096 samples +([\d.]+)", capsys.readouterr().out)[1]))
    assert sizes[0] > 1 and sizes[1] == pytest.approx(2 * sizes[0], abs=0.02)


@pytest.mark.parametrize("flags", ["--seed -1", "--beta2 1", "--ema 1.5", "--lr 0", "--lr nan", "--clip 0", "--alpha 0", "--plan --rate 0",
                                   "--warmup -1", "--max-skipped -1", "--frames 17"])
def test_numbers_that_cannot_be_are_named(flags, base, tmp_path, capsys):
    assert train_switch.main(f"--model {base} --out {tmp_path / 'run'} --device cpu {flags}".split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {flags.split()[-2]} ")
    assert not (tmp_path / "run").exists()


def test_a_plan_from_caches_counts_no_encoders(base, tmp_path, capsys):
    (tmp_path / "index.json").write_text('{"length": 0, "settings": {}}')
    sizes = []
    for more in ("", " --validate-count 0"):
        command = f"--plan --model {base} --out {tmp_path / 'run'} --device cpu --image-data {tmp_path} --video-data {tmp_path}{more}"
        assert train_switch.main(command.split()) == 0
        sizes.append(float(re.search(r"frozen encoders, on every rank +([\d.]+)", capsys.readouterr().out)[1]))
    assert sizes[0] >= sizes[1] == 0


def test_a_plan_counts_the_image_encoders_of_the_hub(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "plain", ignore=shutil.ignore_patterns("dino", "clip"))
    sizes = []
    for model in (base, tmp_path / "plain"):
        assert train_sugar.main(f"--plan --model {model} --out {tmp_path / 'run'} --device cpu".split()) == 0
        sizes.append(float(re.search(r"frozen encoders, on every rank +([\d.]+)", capsys.readouterr().out)[1]))
    assert sizes[1] - sizes[0] == pytest.approx(1.2, abs=0.1)


# --- the loop ---------------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """loss(step) of it has the gradient that `losses` names for the step."""

    def __init__(self, losses=None):
        super().__init__()
        self.weight, self.losses, self.seen = torch.nn.Parameter(torch.ones(3)), losses or {}, []

    def loss(self, stream: str, positions: list[int]) -> torch.Tensor:
        self.seen.append(self.weight.detach().clone())
        action = self.losses.get(positions[0])
        if callable(action):
            action()
        return (self.weight * torch.tensor([1.0, -2.0, positions[0]])).sum() * (action if isinstance(action, float) else 1.0)


def loop(model: Small, out: Path, validate=lambda step: None, **options) -> bool:
    options = Options(out=out, **{"steps": 6, "lr": 0.1, "validate_count": 0, "save_every": 2, **options})
    return train(model, options, distributed.start("cpu"), lambda step: ("stream", 1), model.loss, validate, {})


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    model = Small({3: math.nan})
    assert loop(model, tmp_path)
    moved = [not torch.equal(a, b) for a, b in zip(model.seen, [*model.seen[1:], model.weight.detach()])]
    assert moved == [True, True, True, False, True, True] and model.weight.isfinite().all()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1] and lines[3]["loss"] is None
    with pytest.raises(BadInput, match="not finite for 1 steps, the last one step 1 on stream samples 1 to 1"):
        loop(Small({1: math.inf}), tmp_path / "strict", max_skipped=0)


def test_the_average_of_the_weights_is_handed_on_and_resumed(tmp_path):
    whole, shown = Small(), []
    assert loop(whole, tmp_path / "whole", lambda step: shown.append(whole.weight.detach().clone()), ema=0.9, validate_count=1,
                validate_every=1)
    free = Small()
    loop(free, tmp_path / "free")
    means = free.seen[:1]
    for weight in [*free.seen[1:], free.weight.detach()]:
        decay = min(0.9, len(means) / (9 + len(means)))  # a tenth, two elevenths, ...
        means.append(decay * means[-1] + (1 - decay) * weight)
    assert torch.allclose(whole.weight, means[-1], rtol=1e-6) and not torch.allclose(whole.weight, free.weight)
    assert torch.allclose(torch.stack(shown), torch.stack(means), rtol=1e-6)  # and each sheet has shown the average of its step
    assert torch.equal(torch.stack(whole.seen), torch.stack(free.seen))  # while the run went on from the weights themselves

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(Small({5: die}), tmp_path / "killed", ema=0.9)
    resumed = Small()
    assert loop(resumed, tmp_path / "killed", ema=0.9)
    assert len(resumed.seen) == 2 and torch.equal(resumed.weight, whole.weight)  # from step 4
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_signal_in_the_last_step_is_not_lost(tmp_path):
    """There may be another stage."""
    assert not loop(Small({5: lambda: os.kill(os.getpid(), signal.SIGTERM)}), tmp_path)
    again = Small()
    assert loop(again, tmp_path) and not again.seen


@torch.no_grad()
def test_the_loss_of_each_phase_is_the_formula(base, tmp_path, monkeypatch, seed):
    """Switch eq. 4 and SUGAR's, sample by sample: |sqrt(a) eps - sqrt(1 - a) x_0 - v|^2, v without what was dropped."""
    caught = {}

    def catch(model, options, ranks, plan, loss_of, *rest):
        torch.manual_seed(seed)
        for p in model.parameters():  # else a LoRA does nothing yet
            local(p).add_(0.05 * torch.randn(local(p).shape))
        caught.update(model=model, loss_of=loss_of)
        return False

    positions, alpha_bar = [0, 1, 2, 3, 4, 5], alpha_bar_schedule(toy_networks.SCHEDULE)

    def expected(x_0, eps, t, **given):
        a = alpha_bar[t].float()
        v = caught["model"]((a.sqrt() * x_0 + (1 - a).sqrt() * eps)[None], t[None], **{name: y[None] for name, y in given.items()})[0]
        return (a.sqrt() * eps - (1 - a).sqrt() * x_0 - v).square().mean()

    common = f"--model {base} --device cpu --dtype fp32 --seed {seed} --validate-count 0"
    monkeypatch.setattr(train_switch, "train", catch)
    args = train_switch.parse(f"{common} --out {tmp_path / 'switch'} --images 6 --videos 6 --rank 4 --reference-drop 0.5".split())
    train_switch.run(args)
    encoder = Encoder(base, "token", toy_networks.TOKENS, "cpu")
    for phase, kind in (("image", "pairs"), ("video", "videos")):
        stream, losses = Stream(Toy(kind, seed), 6, encoder, seed), []
        for i in positions:
            x_0, eps, t, text, reference, keep = train_switch.draw(stream[i], generator(seed, phase, i), encoder.vae_config, args)
            dropped = phase == "video" and not keep.any()
            losses.append(expected(x_0, eps, t, text=text.float(), **({} if dropped else {"reference": reference})))
        assert caught["loss_of"](phase, positions).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4), phase

    monkeypatch.setattr(train_sugar, "train", catch)
    args = train_sugar.parse(f"{common} --out {tmp_path / 'sugar'} --strategy mix --real 6 --triplets 6 --drop-clip 0.5 --drop-text 0.5".split())
    train_sugar.run(args)
    encoder = Encoder(base, "none", toy_networks.TOKENS, "cpu", sugar=True)
    for name, kind in (("real", "subjects"), ("synthetic", "triplets")):
        stream, losses = Stream(Toy(kind, seed), 6, encoder, seed), []
        for i in positions:
            x_0, eps, t, text, dino, clip, keep_dino, keep_clip = train_sugar.draw(
                stream[i], generator(seed, "mix", name, i), encoder.vae_config, encoder.null, args)
            kept = {key: y.float() for key, y, keep in (("dino", dino, keep_dino), ("clip", clip, keep_clip)) if keep}
            losses.append(expected(x_0, eps, t, text=text.float(), **kept))
        assert caught["loss_of"](name, positions).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4), name


def test_a_folder_with_results_is_another_runs_and_one_without_is_free(tmp_path):
    args, ranks = [switch(f"--out {tmp_path} --p {p}") for p in (0.2, 0.3)], distributed.start("cpu")
    noted = lambda: json.loads((tmp_path / "settings.json").read_text())["p"]
    for one in args:  # the first try came to nothing
        claim(one, ranks)
        assert noted() == one.p
    (tmp_path / "image" / "checkpoints" / "step-000002").mkdir(parents=True)
    claim(args[1], ranks)
    with pytest.raises(BadInput, match="with p = 0.3, and now it is 0.2"):
        claim(args[0], ranks)
    (tmp_path / "settings.json").unlink()  # a run that has not noted it is known by its checkpoints alone
    claim(args[0], ranks)
    assert not (tmp_path / "settings.json").exists()


def test_a_sheet_without_room_is_decoded_in_tiles_and_training_encodes_none(base, tmp_path, seed, monkeypatch):
    encoder, model = Encoder(base, "token", toy_networks.TOKENS, "cpu"), load_transformer(base / "transformer").eval()
    look = Validation(model, encoder, toy_networks.SCHEDULE, ToyTest(seed), tmp_path, distributed.start("cpu"), torch.float32, 1)
    whole, decode, tried = look.sample(ToyTest(seed)[0], seed), VAE.decode, []

    def small(self, z):
        tried.append(self.tiled)
        if not self.tiled:
            raise torch.OutOfMemoryError("no room")
        return decode(self, z)

    monkeypatch.setattr(VAE, "decode", small)
    assert look.sample(ToyTest(seed)[0], seed).shape == whole.shape and tried == [False, True] and not encoder.vae.tiled


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(base):
    return {sugar: Encoder(base, "none" if sugar else "token", toy_networks.TOKENS, "cpu", sugar=sugar)
            for sugar in (False, True)}


@pytest.mark.parametrize("stream,sugar", [("pairs", False), ("videos", False), ("subjects", True), ("triplets", True)])
def test_what_an_example_is_encoded_to(stream, sugar, encoders):
    example = Toy(stream)[3]
    again = Toy(stream)[3]
    assert np.array_equal(example.video, again.video) and example.text == again.text
    encoded = Stream(Toy(stream), 5, encoders[sugar], seed=1)[0]
    T = 1 if stream == "pairs" else 3
    assert encoded["mean"].shape == encoded["std"].shape == (16, T, 8, 8)
    assert encoded["text"].shape == (toy_networks.TOKENS, toy_networks.TEXT_DIM)
    if sugar:
        assert encoded["dino"].shape == encoded["clip"].shape == (untrained.IMAGE_TOKENS, toy_networks.IMAGE_DIM)
    else:
        assert encoded["ref_mean"].shape == ((1 if stream == "pairs" else 4), 16, 8, 8)
    assert {value.dtype for value in encoded.values()} == {torch.float16}


def test_a_random_frame_is_one_of_the_video_and_first_is_the_first(base, encoders):
    example = Toy("videos")[0]
    frames = [encoders[False].posterior(frame[None])[0][:, 0] for frame in example.video]
    encoded = encoders[False].encode(example, 0, 0)
    assert all(any(torch.equal(ours, frame) for frame in frames) for ours in encoded["ref_mean"])
    first = Encoder(base, "token", toy_networks.TOKENS, "cpu", reference_frames=1)
    assert torch.equal(first.encode(example, 0, 0)["ref_mean"][0], frames[0])


def test_one_frame_stands_for_a_video_in_turn(seed):
    whole, frames = Toy("triplets")[2], OneFrame(Toy("triplets"), seed)
    seen = [frames[2 * OneFrame.EACH + turn] for turn in range(OneFrame.EACH)]
    assert all(one.video.shape[0] == 1 and one.text == whole.text for one in seen)
    of = [[i for i, frame in enumerate(whole.video) if np.array_equal(one.video[0], frame)] for one in seen]
    assert all(of) and frames[2 * OneFrame.EACH - 1].text == Toy("triplets")[1].text
    differ = len({frame.tobytes() for frame in whole.video})
    assert len({one.video.tobytes() for one in seen}) >= OneFrame.EACH - (len(whole.video) - differ)  # frames may look alike


def test_the_posterior_is_sampled_with_its_deviation(seed):
    g = torch.Generator().manual_seed(seed)
    mean, std = torch.full((20000,), 3.0), torch.full((20000,), 0.5)
    sample = posterior_sample(mean, std, g)
    assert abs(sample.mean() - 3) < 0.02 and abs(sample.std() - 0.5) < 0.02


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main,arguments,phrase", [
    (train_switch.main, "--p 1.5", "--p 1.5: choose a probability"),
    (train_switch.main, "--p -0.1", "--p -0.1: choose a probability"),
    (train_switch.main, "--reference-drop 2", "--reference-drop 2.0"),
    (train_switch.main, "--image-batch 0", "--image-batch 0: choose 1 or more"),
    (train_switch.main, "--steps 0", "--steps 0: choose 1 or more"),
    (train_switch.main, "--strategy video-only --p 0", "--p 0.0 of the steps are none"),
    (train_switch.main, "--validate-count -1", "--validate-count -1: choose 0 or more"),
    (train_switch.main, "--out {base}/model_index.json --model {base}", "model_index.json is a file: give a folder"),
    (train_switch.main, "--out {base}/model_index.json/new --model {base}", "model_index.json is a file: give a folder"),
    (train_switch.main, "--seed 18446744073709551616", "a seed is a whole number from 0 to 2^63 - 1"),
    (train_switch.main, "--out {base} --restart", "and no settings.json says that a run of this trainer made it"),  # the base itself
    (train_switch.main, "--out {base}/switch", "pytorch_lora_weights.safetensors, and no settings.json says"),
    (train_sugar.main, "--out {base}/sugar --restart", "transformer, and no settings.json says"),  # another's model
    (train_switch.main, "--validate-on nowhere.jsonl", "nowhere.jsonl cannot be read"),
    (train_switch.main, "--model nowhere", "There is no folder nowhere"),
    (train_switch.main, "--model {base}/i2v", "Switch cannot stand on"),
    (train_switch.main, "--model {base}/sugar", "Switch cannot stand on"),
    (train_switch.main, "--share 0.5", "--share 0.5 is for data of your own"),
    (train_switch.main, "--lora-tokens reference --reference-drop 1", "--lora-tokens reference has nothing to learn"),
    (train_switch.main, "--lora-tokens reference --strategy video-only", "--lora-tokens reference has nothing to learn"),
    (train_sugar.main, "--out {base}", "is the folder of --model"),
    (train_sugar.main, "--model {base}/sugar --out {base} --restart", "is the folder of --model"),  # from which it has all but one part
    (train_sugar.main, "--p 1.5", "--p 1.5: choose a probability"),
    (train_sugar.main, "--drop-dino 3", "--drop-dino 3.0: choose a probability"),
    (train_sugar.main, "--model {base}/i2v", "SUGAR cannot stand on"),
])
def test_bad_input_is_one_sentence_before_any_training(main, arguments, phrase, base, tmp_path, capfd):
    defaults = f"--model {base} --out {tmp_path / 'run'} --device cpu"
    status = main(f"{defaults} {arguments.format(base=base)}".split())  # the last of two counts
    errors = [line for line in capfd.readouterr().err.splitlines() if line]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and phrase in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_batch_that_ranks_cannot_share_is_refused():
    ranks = distributed.Ranks(0, 3, torch.device("cpu"), None)
    assert ranks.share(9) == range(3)
    assert distributed.Ranks(3, 4, torch.device("cpu"), None, sequence=2).share(8) == range(4, 8)  # the second pair's half
    with pytest.raises(BadInput, match="8 cannot be shared out evenly among 3 ranks"):
        ranks.share(8)


