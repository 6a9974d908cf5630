"""Runs the ablations of ablations.py: trains, samples, scores, and writes NAME.md and NAME.png. `python evaluate.py ablate NAME` is its
command.

Runs are told apart by what they were trained with, so ablations share those they have in common: runs/ablations/switch-1a2b3c4d-0
is one training, below it a folder for each way to sample from it.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import checkpoint
import evaluate
import figures
import train_sugar
import train_switch
from ablations import ABLATIONS, QUICK, SCORES, Ablation, Finding, Variant
from checkpoint import BadInput
from data import OneFrame
from figures import Interval
from media import save_image
from pipeline import read_scales, read_schedule
from resume import last_checkpoint
from scorers import TITLES
from training import set_defaults, settings_of


# --- runs -------------------------------------------------------------------------------------------------------------

RECIPE = 1  # one more whenever the same flags would teach something else: other data of the toy's world, other defaults


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Ablations share their runs: another process waits until this one has finished with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is at {folder.name}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def copy_whole(source: Path, target: Path) -> None:
    """A copy of a folder that is there when it is whole."""
    part = target.with_name(f".{target.name}-part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    part.rename(target)


def digest(*what) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def parsed(method: str, flags: str, seed: int, args) -> tuple[argparse.Namespace, dict]:
    """The trainer's arguments, and what its weights depend on but the seed."""
    trainer, device = {"switch": train_switch, "sugar": train_sugar}[method], ["--device", args.device] if args.device else []
    options = trainer.parse(["--model", str(args.model), "--seed", str(seed), "--validate-count", "0", *device, *flags.split()])
    set_defaults(options, trainer.DEFAULTS, toy=True)
    if method == "sugar" and options.strategy == "mix":
        options.steps *= 2
    weights = checkpoint.fingerprint(*(checkpoint.part(args.model, part) for part in evaluate.MADE_BY))
    settings = {name: value for name, value in settings_of(options).items() if name != "seed"} | {"of": weights, "recipe": RECIPE}
    if getattr(options, "synthetic", None) == "image":
        settings["frames of a video"] = OneFrame.EACH
    if getattr(options, "second_steps", None):  # which the first stage does not depend on
        settings["second_steps"] = options.second_steps
    options.out = args.out / f"{method}-{digest(settings)}-{seed}"
    return options, settings


def trained(method: str, variant: Variant, seed: int, args) -> Path:
    """The folder of a finished training; it is trained, or gone on with, where it is not there."""
    flags = f"{variant.train} {args.train}".strip()
    if args.quick:
        flags += f" {QUICK[0]} {QUICK[1][method]}"
    options, settings = parsed(method, flags, seed, args)
    out, done = options.out, options.out / "done.json"
    two = method == "sugar" and options.strategy != "mix"
    # Trainings that differ in the second stage alone share the first.
    of_first = {name: value for name, value in settings.items() if name not in ("strategy", "p", "synthetic", "frames of a video", "second_steps")}
    first = args.out / f"first-{digest(of_first)}-{seed}"
    with locked(out):
        if done.exists():
            return out
        print(f"training {out.name}: {flags or 'the defaults'}, seed {seed}")
        if two and first.exists() and not any((out / "real" / part).exists() for part in ("checkpoints", "transformer")):
            copy_whole(first, out / "real" / "transformer")
        {"switch": train_switch, "sugar": train_sugar}[method].run(options)
        if not ((out / "pytorch_lora_weights.safetensors").exists() or (out / "model_index.json").exists()):
            raise BadInput(f"The training {out} was stopped; the same command goes on from there.")
        with locked(first):
            if two and not first.exists():
                copy_whole(out / "real" / "transformer", first)
        ends = [last_checkpoint(folder)[1] for folder in out.rglob("checkpoints")]
        took = {name: sum(end[name] for end in ends) for name in ("step", "seconds")}
        checkpoint.write_json(done, {"flags": flags, **took})
    return out


def with_scales(method: str, flags: str, model: Path) -> list[str]:
    """Flags of sample.py, with the checkpoint's scales of guidance where they name none, in one order: what is sampled alike is shared."""
    names, scales = {"switch": ("guidance",), "sugar": ("omega_image", "omega_text")}[method], read_scales(read_schedule(model))
    words = flags.split()
    given = {f"--{name.replace('_', '-')}": f"{scales[name]:g}" for name in names if name in scales} | dict(zip(words[::2], words[1::2]))
    return [word for pair in sorted(given.items()) for word in pair]


def scored(ablation: Ablation, variant: Variant, sweep: str, seed: int, args) -> tuple[dict[str, float], Path, float]:
    """The mean of each score over the videos of one training, sampled one way; the training; and the seconds that a video took."""
    run, way = trained(ablation.method, variant, seed, args), with_scales(ablation.method, f"{variant.sample} {sweep}", args.model)
    folder = run / f"videos-{digest(way, ablation.looks, args.count, args.sampling_steps)}"
    # The base that was only shown videos has no reference to be given.
    blind = ["--no-image"] if "video-only" in variant.train else []
    model = ["--model", str(args.model), "--adapter", str(run)] if ablation.method == "switch" else ["--model", str(run)]
    device, took = ["--device", args.device] if args.device else [], folder / "took.json"
    with locked(folder):
        there, started = len(list(folder.glob("videos/[!.]*.mp4"))), time.perf_counter()
        # Each seed has subjects, texts and noise of its own, the same for all rows.
        make = ["generate", "--out", str(folder), "--count", str(args.count), "--seed", str(seed + 1),
                *(["--looks"] if ablation.looks else []), *blind, "--", *model,
                "--steps", "2" if args.quick else str(args.sampling_steps), *device, *way]
        evaluate.generate(evaluate.parse(make))
        evaluate.score(evaluate.parse(["score", str(folder), "--own", str(args.model), *device]))
        if there < args.count:
            checkpoint.write_json(took, {"seconds": (time.perf_counter() - started) / (args.count - there)})
        summary = checkpoint.read_json(folder / "scores.json")
    if summary["unreadable"]:
        raise BadInput(f"Some videos of {folder} cannot be scored ({checkpoint.some(sorted(summary['unreadable']))}): remove the folder.")
    seconds = checkpoint.read_json(took)["seconds"] if took.exists() else 0.0
    return {name: of["mean"] for name, of in summary["means"].items()}, run, seconds


# --- statistics over seeds --------------------------------------------------------------------------------------------

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5%, by seeds
FEWEST = 3  # seeds for a verdict
COMMON = 0.2  # how much of the shorter line must have levels in common with the other
KNOWN = 2 / 16  # the identity that the control must be above: twice chance
Line = list[dict[str, float]]  # the scores of one row and seed, for each way to sample


def over_seeds(values: list[float], least: float = 0.0) -> Interval:
    """Mean and Student's 95% interval, whose half is `least` at least; of a single seed there is none."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = max(STUDENT.get(len(values), STUDENT[10]) * values.std(ddof=1) / np.sqrt(len(values)), least)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def difference(finding: Finding, more: Line, less: Line) -> float:
    """By how much one row is above the other, for one seed: the mean over their lines, or over the part of them in which they have
    the same levels of another score. NaN where that part is too small, or there is no score."""
    score = lambda line, name: np.array([np.nan if point.get(name) is None else point[name] for point in line], dtype=float)
    if not finding.at:
        return float(np.mean(score(more, finding.score) - score(less, finding.score)))
    lines = []
    for line in (more, less):
        levels, number = np.unique(score(line, finding.at), return_inverse=True)
        lines.append((levels, np.bincount(number, score(line, finding.score)) / np.bincount(number)))  # of ties the mean
    low, high = max(levels[0] for levels, _ in lines), min(levels[-1] for levels, _ in lines)
    shorter = min(levels[-1] - levels[0] for levels, _ in lines)
    if not (high > low and high - low >= COMMON * shorter):
        return float("nan")
    common = np.linspace(low, high, 21)
    one, two = (np.interp(common, *line) for line in lines)
    return float(np.mean(one - two))


def no_verdict(ablation: Ablation, results: dict[str, list[Line]], args) -> str:
    """Why nothing can be concluded; empty where something can."""
    if args.quick:
        return "--quick"
    if args.seeds < FEWEST:
        return f"fewer than {FEWEST} seeds"
    (_, given), (_, usual) = (parsed(ablation.method, flags, 0, args) for flags in (args.train, ""))
    if given["steps"] < usual["steps"] or args.count < 64 or args.sampling_steps < 25:
        return f"fewer than {usual['steps']} steps, 64 videos or 25 steps of sampling ({given['steps']}, {args.count}, {args.sampling_steps})"
    if given != usual | {"steps": given["steps"]}:
        return f"trained with {args.train}"
    _, low, _ = over_seeds([max(point["identity"] for point in line) for line in results[ablation.control]], 1 / args.count)
    return "" if low > KNOWN else f"the control, {ablation.control!r}, does not know its subjects"


def verdict(finding: Finding, results: dict[str, list[Line]], count: int, reason: str) -> str:
    """A line: the claim, the difference that was measured, seed by seed the same data, and whether it holds. reason: why there is no
    verdict. A score that is 0 or 1 for each of `count` videos is not known better than by one of them."""
    between = lambda one, other: np.array([difference(finding, *lines) for lines in zip(results[one], results[other])])
    differences = between(finding.more, finding.less) - (between(*finding.than) if finding.than else 0)
    coarse = finding.score in ("identity", "motion", "background_exact", "look", "dynamic")
    mean, low, high = over_seeds(differences, coarse / count)
    if not np.isfinite(mean):
        said = f"no verdict (hardly a common level of {TITLES[finding.at]})" if finding.at else "not measured"
    elif reason:
        said = f"no verdict ({reason})"
    else:
        low_enough, high_enough = low > -finding.margin, high < -finding.margin
        said = "holds" if low_enough else "does not hold: the opposite was measured" if high_enough else "undecided"
    where = f", at the same {TITLES[finding.at]}" if finding.at else ""
    within = f" [{low:+.3f}, {high:+.3f}]" if np.isfinite(low) else ""
    margin = f", margin {finding.margin}" if finding.margin else ""
    rows = f"{finding.more} minus {finding.less}" + (f", that minus ({finding.than[0]} minus {finding.than[1]})" if finding.than else "")
    measured = f"{TITLES[finding.score]}: {rows}{where} = {mean:+.3f}{within}{margin}"
    return f"| {finding.claim} | {measured} | {said} |"


def run(args) -> None:
    """Trains, samples, scores; writes NAME.md and NAME.png."""
    checkpoint.check_out(args.out)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("An ablation is one process: start several, of other names, beside each other; they share their runs.")
    own = {"seed": 0, "model": str(args.model), "device": args.device}
    for variant in ABLATIONS[args.name].variants.values():  # before the first training
        options, _ = parsed(ABLATIONS[args.name].method, f"{variant.train} {args.train}", 0, args)
        for flag, value in own.items():
            if getattr(options, flag) != value:
                raise BadInput(f"--train {args.train!r}: --{flag} is the ablation's own to give.")
        if ABLATIONS[args.name].method == "sugar":
            train_sugar.stages_of(options)  # a row may have one stage where another has two
    ablation, seeds = ABLATIONS[args.name], range(1 if args.quick else args.seeds)
    if args.quick:
        args.out, args.count = args.out / "quick", 2
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Line]] = {label: [] for label in ablation.variants}
    runs, seconds = set(), []
    for seed in seeds:
        for label, variant in ablation.variants.items():
            points = [scored(ablation, variant, sweep, seed, args) for sweep in ablation.sweep]
            results[label].append([scores for scores, _, _ in points])
            runs |= {run for _, run, _ in points}
            seconds += [args.count * each for _, _, each in points]
    path = write(args, ablation, results, [checkpoint.read_json(run / "done.json") for run in runs], sum(seconds))
    print(f"\n{path.read_text()}\nwrote {path} and .png")


def write(args, ablation: Ablation, results: dict[str, list[Line]], runs: list[dict], seconds: float) -> Path:
    """The table, the findings and the picture."""
    names = [score for score in SCORES if score in next(iter(results.values()))[0][0]]
    value = lambda point, name: float("nan") if point.get(name) is None else point[name]
    table = {label: [{name: over_seeds([value(line[i], name) for line in lines]) for name in names} for i in range(len(ablation.sweep))]
             for label, lines in results.items()}
    cell = lambda interval: "not measured" if not np.isfinite(interval[0]) else f"{interval[0]:.3f}" + (
        f" [{interval[1]:.3f}, {interval[2]:.3f}]" if np.isfinite(interval[1]) else "")
    steps, trained_for = (sum(run[name] for run in runs) for name in ("step", "seconds"))
    reason = no_verdict(ablation, results, args)
    lines = [f"# {args.name}: {ablation.source}", "",
             f"{len(next(iter(results.values())))} seeds, {args.count} videos each{f', trained with {args.train}' if args.train else ''}. "
             f"{len(runs)} trainings, which ablations share: {steps:,} steps at {trained_for / max(steps, 1):.2f} s = "
             f"{trained_for / 3600:.2f} hours. Videos, made and scored: {seconds / 3600:.2f} hours."
             f"{' A quick try: the numbers mean nothing.' * args.quick} {ablation.note}".rstrip(), "",
             "DINO-I, CLIP-I, CLIP-T and the consistencies are by the toy's own networks, the dynamic degree by a classical estimator of "
             "optical flow, what is exact by the world itself. Not measured: motion smoothness, as AMT-S needs frames of 128 pixels, and "
             "ViCLIP, whose published weights have not seen the toy's world.", "",
             "| | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|",
             *(f"| {' '.join([label, sweep]).strip()} | " + " | ".join(cell(row[name]) for name in names) + " |"
               for label, rows in table.items() for sweep, row in zip(ablation.sweep, rows)), "",
             "| the paper's finding | measured | here |", "|---|---|---|",
             *(verdict(finding, results, args.count, reason) for finding in ablation.findings)]
    checkpoint.write_text(args.out / f"{args.name}.md", "\n".join(lines) + "\n")
    if ablation.pictures:
        picture = figures.stacked([
            figures.scatter({label: [(row[x], row[y]) for row in rows] for label, rows in table.items()}, TITLES[x], TITLES[y],
                            f"{args.name} ({ablation.source})") for x, y in ablation.pictures])
    else:
        picture = figures.bars({TITLES[name]: {label: rows[0][name] for label, rows in table.items()} for name in names},
                               f"{args.name} ({ablation.source})")
    save_image(picture, args.out / f"{args.name}.png")
    return args.out / f"{args.name}.md"
