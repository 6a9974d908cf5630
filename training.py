"""The training loop that both papers' trainers share. A trainer hands it three functions: which batch a step takes, the loss
of some samples, and a validation picture; everything else, here once: ranks, accumulation, schedule, clipping, EMA, metrics,
checkpoints, resuming.

Nothing is random but by number: the branch of a step, the order of the data, and each sample's frame, noise, timestep and
dropping follow from (seed, stream, position). So a resumed run is the uninterrupted run, bit for bit, and N ranks draw what
one rank draws. What is left to torch's own generator (LoRA's dropout) is seeded anew at every step.
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import checkpoint
from checkpoint import BadInput, at_least
from distributed import Ranks, check_compiler, find_device, local, reshard
from resume import agreed_checkpoint, load_checkpoint, save_checkpoint


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Options:
    """The flags of every trainer; each trainer has defaults of its own."""

    out: Path
    steps: int
    lr: float
    seed: int = 0
    warmup: int = 0
    weight_decay: float = 0.01
    beta2: float = 0.95
    clip: float = 1.0
    micro_batch: int = 8
    ema: float = 0.0
    save_every: int = 500
    keep: int = 3
    validate_every: int = 500
    validate_count: int = 4
    max_skipped: int = 10

    @staticmethod
    def add_to(parser: argparse.ArgumentParser, by_base: dict[str, tuple], **defaults) -> None:
        """by_base: see set_defaults()."""
        help = {"out": "folder for checkpoints, metrics.jsonl and validation sheets",
                "steps": "optimizer steps; for SUGAR of each stage, unless --second-steps is given",
                "lr": "peak learning rate, cosine after the warm-up", "warmup": "steps of linear warm-up, half of the run at most",
                "clip": "largest gradient norm", "micro_batch": "samples that a rank takes at a time; the global batch does not "
                "depend on it", "ema": "decay of an exponential moving average of the weights, at most (1+n)/(10+n) "
                "at step n; 0 is none",
                "keep": "checkpoints that are kept", "validate_count": "subjects on a validation sheet; 0 is no sheet",
                "max_skipped": "steps with a loss that is not finite before stopping"}
        for name, option in Options.__dataclass_fields__.items():
            default = None if name in by_base else defaults.get(name, option.default)
            said = default_of(name, by_base) if name in by_base else f"(default: {default})"
            said = f"{help.get(name, '')} {said}".strip()
            parser.add_argument(f"--{name.replace('_', '-')}", type=option.type, default=default, help=said)


def default_of(name: str, by_base: dict[str, tuple]) -> str:
    official, toy = by_base[name]
    return f"(default: {official:g}; for the toy {toy:g})"


def set_defaults(args: argparse.Namespace, by_base: dict[str, tuple], toy: bool) -> None:
    """Flags that the command line leaves open. by_base: for each the value for official weights, which is the paper's where the paper
    has one, and the toy's."""
    for name, values in by_base.items():
        if getattr(args, name) is None:
            setattr(args, name, values[toy])
    if args.dtype is None:
        args.dtype = "bf16" if args.plan else usual_dtype(find_device(args.device))  # a plan is for other machines than this one


def usual_dtype(device: torch.device) -> str:
    """Of the computation: bfloat16, but for CPUs for which oneDNN has none, as those without AVX-512: they take ten times as long as in
    float32."""
    slow = device.type == "cpu" and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "fp32" if slow else "bf16"


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags of every trainer that are not the loop's."""
    parser.add_argument("--model", default="checkpoints/toy", help="the base: a folder or a hub id (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the computation (default: bf16; fp32 on a CPU that has no bfloat16)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--recompute", nargs="?", const="all", choices=["all", "keep-attention"],
                        help="activation checkpointing: far less memory, a third slower; keep-attention keeps what takes longest")
    parser.add_argument("--compile", action="store_true", help="torch.compile on the blocks: slow to start, then faster")
    parser.add_argument("--sequence-parallel", type=int, default=1, metavar="N",
                        help="N ranks share each sample, for samples that are too long for one (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="remove what an earlier run has left in --out, instead of going on with it")
    parser.add_argument("--validate-on", type=Path, metavar="FILE.jsonl", help='held-out subjects for the validation sheets, "prompt" and '
                        '"image" in each line as for sample.py --prompts (default: on the toy\'s world its own, else none)')
    parser.add_argument("--plan", action="store_true", help="say what the run would take, and do not train")
    parser.add_argument("--gpu-memory", type=float, default=80, help="--plan: GB of each GPU (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="--plan: samples/s of all ranks (default: %(default)s)")


def options_of(args: argparse.Namespace, **changes) -> Options:
    return Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__} | changes)


def settings_of(args: argparse.Namespace, **more) -> dict:
    """What makes a run what it is: the flags without those that change neither weights nor metrics (but for rounding, and for a
    LoRA's dropout, of which each micro-batch of each rank has its own)."""
    free = {"out", "model", "device", "micro_batch", "save_every", "keep", "validate_every", "validate_count", "restart", "max_skipped",
            "validate_on", "broken", "recompute", "sequence_parallel", "compile", "plan", "gpu_memory", "rate", "second_steps"}
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name not in free} | more


def check_range(args: argparse.Namespace, probabilities: tuple[str, ...], counts: tuple[str, ...], positive: tuple[str, ...] = ()) -> None:
    """Of what was given, what cannot be."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in given.keys() & {*probabilities}:
        if not 0 <= given[name] <= 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: choose a probability from 0 to 1.")
    checkpoint.check_out(args.out)
    at_least(1, args, *counts, "steps", "micro_batch", "save_every", "validate_every", "keep")
    at_least(0, args, "validate_count", "max_skipped", "warmup", "weight_decay")
    checkpoint.check_seed(args.seed)
    for name in ("ema", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: choose a number from 0 to below 1.")
    for name in given.keys() & {"lr", "clip", "rate", "gpu_memory", *positive}:
        if not 0 < given[name] < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: choose a number above 0.")


def check_parallel(args: argparse.Namespace, ranks: Ranks, heads: int) -> None:
    if heads % ranks.sequence:
        raise BadInput(f"--sequence-parallel {ranks.sequence} does not divide this model's {heads} heads.")
    if args.compile:
        check_compiler(ranks.device.type)


@dataclass
class State:
    """Where a run is: all that is not a tensor. There is no random state, see above."""

    step: int = 0
    positions: dict[str, int] = field(default_factory=dict)  # samples taken from each stream of data
    skipped: int = 0
    seconds: float = 0.0  # that training took, up to the checkpoint


def generator(*key: int | str) -> torch.Generator:
    """A generator that depends on nothing but the key."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, for half of the run at most, then a cosine to zero at the last step."""
    warmup = min(options.warmup, options.steps // 2)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / (options.steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: nn.Module, options: Options, ranks: Ranks, batch_of: Callable[[int], tuple[str, int]],
          loss_of: Callable[[str, list[int]], Tensor], validate: Callable[[int], None], settings: dict) -> bool:
    """Trains the parameters of `model` that require a gradient. Returns whether the run has come to its end: SIGTERM stops it before.

    batch_of(step) -> (stream, global batch): what a step trains on, the same on every rank.
    loss_of(stream, positions) -> mean loss of those samples of the stream.
    validate(step): called on every rank, as sampling from a sharded model needs them all.
    settings: what a resumed run must share with the one that it continues.
    """
    folder, trained = options.out / "checkpoints", {k: p for k, p in model.named_parameters() if p.requires_grad}
    # AdamW works element by element, so each rank gives it the plain tensors that it holds: DTensors are slow to handle.
    held = {key: nn.Parameter(local(p.detach())) for key, p in trained.items()}
    optimizer = torch.optim.AdamW(held.values(), lr=options.lr, betas=(0.9, options.beta2), eps=1e-8,
                                  weight_decay=options.weight_decay, fused=True)
    average = {key: p.detach().clone() for key, p in trained.items()} if options.ema else {}
    tensors = state_tensors(trained, held, optimizer, average)
    state, metrics = State(), options.out / "metrics.jsonl"
    found = agreed_checkpoint(folder, ranks)
    if found is not None:
        check_settings(found[1]["settings"], settings, options.out)
        load_checkpoint(*found, tensors, ranks)
        state = State(**{key: found[1].get(key, value) for key, value in asdict(state).items()})
    if ranks.first:
        options.out.mkdir(parents=True, exist_ok=True)
        keep_lines(metrics, state.step)

    def look() -> float:
        """Returns the seconds that it took, which are not training's."""
        begun = time.perf_counter()
        model.eval()
        swap(trained, average)  # what is shown is what a run that ended here would hand on
        validate(state.step)
        swap(trained, average)
        reshard(model)
        return time.perf_counter() - begun

    def due() -> bool:
        return options.validate_count > 0 and (state.step % options.validate_every == 0 or state.step == options.steps)

    with stop_on_signal() as stop:
        if due():  # before the first step; or the run may have died while it was at this sheet
            look()
        bar = tqdm(total=options.steps, initial=state.step, unit="step", disable=not ranks.first, dynamic_ncols=True)
        saved, clock, done, before = state.step, time.perf_counter(), 0, state.seconds
        while state.step < options.steps:
            stream, batch = batch_of(state.step)
            first = state.positions.get(stream, 0)
            mine = [first + i for i in ranks.share(batch)]
            torch.manual_seed(generator(options.seed, "step", state.step, ranks.rank // ranks.sequence).initial_seed())
            model.train()
            total = torch.zeros((), dtype=torch.float64, device=ranks.device)
            for low in range(0, len(mine), options.micro_batch):
                part = mine[low : low + options.micro_batch]
                if hasattr(model, "set_requires_gradient_sync"):  # gradients meet once a step, after the last part
                    model.set_requires_gradient_sync(low + options.micro_batch >= len(mine))
                loss = loss_of(stream, part) * (len(part) / len(mine))
                loss.backward()
                total += loss.detach().double()  # on the device, which need not wait for us
            loss = ranks.mean(total)
            for key, p in trained.items():
                held[key].grad, p.grad = None if p.grad is None else local(p.grad), None
            norm = get_total_norm(p.grad for p in held.values() if p.grad is not None)
            norm = (ranks.mean(norm.square()) * ranks.world) ** 0.5  # of the whole gradient, of which each rank holds a part
            clip_grads_with_norm_(held.values(), options.clip, torch.tensor(norm))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, options)
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                decay = min(options.ema, (1 + state.step) / (10 + state.step))  # else a short run's mean would be its beginning
                for key, mean in average.items():
                    local(mean).lerp_(held[key].detach(), 1 - decay)
            else:
                state.skipped += 1
                if state.skipped > options.max_skipped:
                    raise BadInput(f"The loss was not finite for {state.skipped} steps, the last one step {state.step} on {stream} "
                                   f"samples {first} to {first + batch - 1}: look at those samples, or lower --lr and --restart.")
            optimizer.zero_grad()
            state.positions[stream] = first + batch
            number = lambda x: x if math.isfinite(x) else None  # JSON knows no NaN
            line = {"step": state.step, "stream": stream, "loss": number(loss), "lr": learning_rate(state.step, options),
                    "grad_norm": number(norm), "samples": sum(state.positions.values()), "skipped": state.skipped}
            state.step, state.seconds, done = state.step + 1, before + time.perf_counter() - clock, done + batch
            if ranks.first:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            bar.update()
            bar.set_postfix_str(f"{stream} loss {loss:.4f}, {done / (time.perf_counter() - clock):.1f} samples/s, "
                                f"{peak_memory(ranks) / 2**30:.1f} GiB")
            stopping = ranks.any(stop.asked)  # asked once a step: all ranks must come to one decision
            if state.step % options.save_every == 0 or state.step == options.steps or stopping:
                save_checkpoint(folder, tensors, {**asdict(state), "settings": settings}, ranks, options.keep)
                saved = state.step
            if stopping:
                break
            if due():
                clock += look()
        bar.close()
        stopped = ranks.any(stop.asked)  # be it after the last step: there may be another stage
    if ranks.first and stopped:
        print(f"stopped by a signal after step {saved}; the same command, without --restart, goes on from there", file=sys.stderr)
    swap(trained, average)  # a finished run hands on the averaged weights
    return not stopped


@torch.no_grad()
def swap(trained: dict[str, Tensor], average: dict[str, Tensor]) -> None:
    """The weights and their averages, where there are any, change places."""
    for key, mean in average.items():
        weight = trained[key].clone()
        trained[key].copy_(mean)
        mean.copy_(weight)


def state_tensors(trained: dict[str, Tensor], held: dict[str, Tensor], optimizer: torch.optim.AdamW,
                  average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by name; AdamW's are created here, so that there is something to load into."""
    tensors = {f"model.{key}": p for key, p in trained.items()} | {f"ema.{key}": p for key, p in average.items()}
    for key, p in trained.items():
        state = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[held[key]] = {name: local(tensor.detach()) for name, tensor in state.items()}
        tensors |= {f"adamw.{name}.{key}": tensor for name, tensor in state.items()}
    return tensors


RESULTS = ("checkpoints/step-*", "transformer", "pytorch_lora_weights.safetensors")  # in --out


def drop_earlier(out: Path, ranks: Ranks, *parts: str) -> None:
    """--restart: what an earlier run left in `out`, files and folders, goes, so that nobody takes it for this one's; of checkpoints and
    sheets of validation those that a run writes, and nothing else that may lie beside them. Not when torchrun has started the ranks
    anew after one died: then it is this run's."""
    if ranks.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0):
        return
    check_ours(out)
    ranks.wait()  # all have looked
    if ranks.first:
        for part in (out / part for part in (*parts, "settings.json")):
            written = [*part.glob("step-*"), *part.glob(".step-*")] if part.name in ("checkpoints", "validation") else [part]
            for path in written:  # of a link the link, not what it names
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    ranks.wait()


def check_ours(out: Path) -> None:
    """Raises where there are results that no run of a trainer has noted as its own: another model, say, whose place ours would take."""
    found = [str(path) for pattern in RESULTS for path in out.glob(pattern)]
    if found and not (out / "settings.json").exists():
        raise BadInput(f"--out {out} holds {checkpoint.some(found)}, and no settings.json says that a run of this trainer made it: choose "
                       f"another --out.")


def claim(args: argparse.Namespace, ranks: Ranks) -> None:
    """Notes in --out what the whole run is, be it of several stages, and raises where another run has its results there."""
    file, settings = args.out / "settings.json", settings_of(args)
    check_ours(args.out)
    # A first stage that another run has handed on has no settings beside it: with it alone nothing is begun.
    begun = any(found.name != "transformer" or found.with_name("settings.json").exists()
                for pattern in RESULTS for found in (*args.out.glob(pattern), *args.out.glob(f"*/{pattern}")))
    if begun and file.exists():
        check_settings(checkpoint.read_json(file), settings, args.out)
    ranks.wait()  # all have looked
    if ranks.first and not begun:  # what a first try has noted that came to nothing is void
        args.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(file, settings)


def check_settings(old: dict, new: dict, out: Path) -> None:
    """Raises where a run would be resumed with other settings than it was begun with; of what it has not noted, nothing is known."""
    for name in sorted(old, key=lambda name: (name != "strategy", name)):  # which says the most
        if old.get(name) != new.get(name) and name == "weights":
            raise BadInput(f"{out} holds a run that began with other weights than those that --model, or the stage before, has now: choose "
                           f"another --out, or --restart to begin anew.")
        if old.get(name) != new.get(name):
            raise BadInput(f"{out} holds a run with {name} = {old.get(name)}, and now it is {new.get(name)}: choose another "
                           f"--out, or --restart to begin anew.")


def keep_lines(file: Path, step: int) -> None:
    """Drops the lines of this step and later ones from a file of JSON lines: a killed run wrote them after its last checkpoint, the
    last one perhaps by half, and they will be written again."""
    lines, kept = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.exists() else [], []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):  # half a line, or one that a loss of power damaged
            if json.loads(line)["step"] < step and line.endswith("\n"):
                kept.append(line)
    if len(kept) < len(lines):
        checkpoint.write_text(file, "".join(kept))


def peak_memory(ranks: Ranks) -> int:
    """The most memory that this process has held, in bytes: of the GPU, or of the host where there is none."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class stop_on_signal:
    """Notes SIGTERM, so that the step is finished and saved before the process ends."""

    def __enter__(self) -> "stop_on_signal":
        self.asked, self.before = False, signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def note(self, *_) -> None:
        self.asked = True
