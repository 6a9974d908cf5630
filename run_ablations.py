"""Runs the ablations of ablations.py: trains, samples, scores, and writes NAME.md and NAME.png. `python evaluate.py ablate NAME` is its
command.

Runs are told apart by what they were trained with, so ablations share those they have in common: runs/ablations/switch-1a2b3c4d-0
is one training, below it a folder for each way to sample from it. What was measured of each is a line of runs/ablations/measured.jsonl.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

import checkpoint
import evaluate
import figures
import train_sugar
import train_switch
from ablations import ABLATIONS, QUICK, SAMPLING_STEPS, SCORES, SEEDS, VIDEOS, Ablation, Finding, Variant
from checkpoint import BadInput
from data import OneFrame
from figures import Interval
from media import save_image
from pipeline import read_scales, read_schedule
from resume import last_checkpoint
from scorers import TITLES
from training import set_defaults, settings_of

TRAINERS = {"switch": train_switch, "sugar": train_sugar}

# --- runs -------------------------------------------------------------------------------------------------------------

RECIPE = 1  # one more whenever the same flags would teach something else, or be scored otherwise: other data of the toy's world, ...


class Busy(Exception):
    """Another process is at a run."""


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Processes share their runs: where another one is at this one, we wait until it has finished with it, or raise Busy."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise Busy(folder.name) from None
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


def weights_of(model: Path) -> str | None:
    return checkpoint.fingerprint(*(checkpoint.part(model, part) for part in evaluate.MADE_BY))


def parsed(method: str, flags: str, seed: int, args) -> tuple[argparse.Namespace, dict]:
    """The trainer's arguments, and what its weights depend on but the seed."""
    trainer, device = TRAINERS[method], ["--device", args.device] if args.device else []
    options = trainer.parse(["--model", str(args.model), "--seed", str(seed), "--validate-count", "0", *device, *flags.split()])
    set_defaults(options, trainer.DEFAULTS, toy=True)
    if method == "sugar" and options.strategy == "mix":
        options.steps *= 2
    rest = ("seed", "dtype")  # whose rounding teaches nothing else
    settings = {name: value for name, value in settings_of(options).items() if name not in rest}
    settings |= {"of": weights_of(args.model), "recipe": RECIPE}
    if getattr(options, "synthetic", None) == "image":
        settings["frames of a video"] = OneFrame.EACH
    if getattr(options, "second_steps", None):  # which the first stage does not depend on
        settings["second_steps"] = options.second_steps
    options.out = args.out / f"{method}-{digest(settings)}-{seed}"
    return options, settings


def flags_of(method: str, variant: Variant, args) -> str:
    quick = f" {QUICK[0]} {QUICK[1][method]}" if args.quick else ""
    return f"{variant.train} {args.train}".strip() + quick


def trained(method: str, flags: str, seed: int, args, wait: bool = True) -> Path:
    """The folder of a finished training; it is trained, or gone on with, where it is not there. Raises Busy, if it is not to wait, where
    another process trains it."""
    options, settings = parsed(method, flags, seed, args)
    out, done = options.out, options.out / "done.json"
    two = method == "sugar" and options.strategy != "mix"
    # Trainings that differ in the second stage alone share the first.
    second = ("strategy", "p", "synthetic", "frames of a video", "second_steps")
    of_first = {name: value for name, value in settings.items() if name not in second}
    first = args.out / f"first-{digest(of_first)}-{seed}"
    if done.exists():
        return out
    with ExitStack() as held:
        held.enter_context(locked(out, wait))
        if done.exists():
            return out
        if two and not first.exists():
            held.enter_context(locked(first, wait))  # or another process, at another second stage, would train the same first one
        print(f"training {out.name}: {flags or 'the defaults'}, seed {seed}")
        if two and first.exists() and not any((out / "real" / part).exists() for part in ("checkpoints", "transformer")):
            copy_whole(first, out / "real" / "transformer")
        TRAINERS[method].run(options)
        if not ((out / "pytorch_lora_weights.safetensors").exists() or (out / "model_index.json").exists()):
            raise BadInput(f"The training {out} was stopped; the same command goes on from there.")
        if two and not first.exists():
            copy_whole(out / "real" / "transformer", first)
        ends = [last_checkpoint(folder)[1] for folder in out.rglob("checkpoints")]
        took = {name: sum(end[name] for end in ends) for name in ("step", "seconds")}
        checkpoint.write_json(done, {"flags": flags, **took})
    return out


@contextmanager
def elapsed(folder: Path) -> Iterator[None]:
    """Adds to elapsed.json the seconds in which its videos are made and scored, also of an attempt that is stopped, until all are."""
    file, started = folder / "elapsed.json", time.perf_counter()
    before, scored = checkpoint.read_json(file)["seconds"] if file.exists() else 0.0, (folder / "scores.json").exists()
    try:
        yield
    finally:
        if folder.exists() and not (file.exists() and scored):
            checkpoint.write_json(file, {"seconds": before + time.perf_counter() - started})


def with_scales(method: str, flags: str, model: Path) -> list[str]:
    """Flags of sample.py, with the checkpoint's scales of guidance where they name none, in one order: what is sampled alike is shared."""
    names, scales = {"switch": ("guidance",), "sugar": ("omega_image", "omega_text")}[method], read_scales(read_schedule(model))
    words = flags.split()
    # Each flag that changes how a row is sampled has a value: they go in pairs.
    given = {f"--{name.replace('_', '-')}": f"{scales[name]:g}" for name in names if name in scales} | dict(zip(words[::2], words[1::2]))
    return [word for pair in sorted(given.items()) for word in pair]


class Point(NamedTuple):
    """What was measured of one training, sampled one way; a line of measured.jsonl."""

    point: str  # the folder of its videos, whose name says by what they were made
    flags: str | None  # of the training; None: the toy's own model
    sample: str  # flags of sample.py
    seed: int
    scores: dict[str, float]  # the mean of each over the videos
    seconds: float  # that a video took
    trained: dict | None  # steps and seconds of the training


def read_measured(path: Path) -> dict[str, Point]:
    """The points of a measured.jsonl, by their names. Raises BadInput where it cannot be read or a line is something else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}).") from error
    points = {}
    for number, line in enumerate(lines, 1):
        try:
            point = Point(**json.loads(line))
            took = {"step": 0, "seconds": 0} if point.trained is None else point.trained
            numbers = [point.seconds, *(took[name] for name in ("step", "seconds")), *(x for x in point.scores.values() if x is not None)]
            if not all(isinstance(value, (int, float)) for value in [*numbers, point.scores["identity"]]):
                raise ValueError("not a number")
            if not isinstance(point.point, str) or point.trained is not None and not took["step"] > 0:
                raise ValueError("its name, or the steps that were trained")
            points[point.point] = point
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"{path}, line {number}: this is no point of an ablation ({error}); remove the line.") from error
    return points


def note(point: Point, file: Path) -> None:
    """Adds it to measured.jsonl, or puts it in the place of an earlier one of its name."""
    with locked(file):
        points = read_measured(file) if file.exists() else {}
        checkpoint.write_jsonl(file, [each._asdict() for each in (points | {point.point: point}).values()])


def measured(ablation: Ablation, variant: Variant, sweep: str, seed: int, known: dict[str, Point], args, wait: bool) -> Point:
    """One row, one seed, one way to sample: from `known`, else from its videos, made and scored where they are not there. Raises Busy, if
    it is not to wait, where another process is at it."""
    flags = None if variant.train is None else flags_of(ablation.method, variant, args)
    if flags is None:
        run = args.model / ablation.method
        videos = args.out / f"{ablation.method}-own-{digest(weights_of(run), RECIPE)}-{seed}"
    else:
        run = videos = parsed(ablation.method, flags, seed, args)[0].out
    way = with_scales(ablation.method, f"{variant.sample} {sweep}", args.model)
    folder = videos / f"videos-{digest(way, ablation.looks, args.count, args.sampling_steps)}"
    name = str(folder.relative_to(args.out))
    if name in known:
        return known[name]
    if flags is not None:
        trained(ablation.method, flags, seed, args, wait)
    # The base that was only shown videos has no reference to be given.
    blind = ["--no-image"] if variant.train and "video-only" in variant.train else []
    model = ["--model", str(args.model), "--adapter", str(run)] if ablation.method == "switch" else ["--model", str(run)]
    device = ["--device", args.device] if args.device else []
    with locked(folder, wait), elapsed(folder):
        # Each seed has subjects, texts and noise of its own, the same for all rows.
        make = ["generate", "--out", str(folder), "--count", str(args.count), "--seed", str(seed + 1),
                *(["--looks"] if ablation.looks else []), *blind, "--", *model,
                "--steps", "2" if args.quick else str(args.sampling_steps), *device, *way]
        evaluate.generate(evaluate.parse(make))
        evaluate.score(evaluate.parse(["score", str(folder), "--own", str(args.model), *device]))
    summary = checkpoint.read_json(folder / "scores.json")
    if summary["unreadable"]:
        raise BadInput(f"Some videos of {folder} cannot be scored ({checkpoint.some(sorted(summary['unreadable']))}): remove the folder.")
    seconds = checkpoint.read_json(folder / "elapsed.json")["seconds"] / args.count
    scores = {name: of["mean"] for name, of in summary["means"].items()}
    point = Point(name, flags, " ".join(way), seed, scores, seconds, checkpoint.read_json(run / "done.json") if flags is not None else None)
    note(point, args.out / "measured.jsonl")
    return point


# --- statistics over seeds --------------------------------------------------------------------------------------------

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5%, by seeds
COMMON = 0.5  # how much of the shorter line must have levels in common with the other; where less has, noise in the levels decides
KNOWN = 2 / 16  # the identity that the control must be above: twice chance
Line = list[dict[str, float]]  # the scores of one row and seed, for each way to sample


def over_seeds(values: list[float], least: float = 0.0) -> Interval:
    """Mean and Student's 95% interval, whose half is `least` at least; of a single seed there is none."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = max(STUDENT.get(len(values), STUDENT[10]) * values.std(ddof=1) / np.sqrt(len(values)), least)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def values_of(line: Line, name: str) -> np.ndarray:
    return np.array([np.nan if point.get(name) is None else point[name] for point in line], dtype=float)


def common_levels(*levels: np.ndarray) -> tuple[float, float, float]:
    """The range of levels that two lines have in common, and how much it is of the shorter one's; 0 or less where they have none."""
    low, high = max(each.min() for each in levels), min(each.max() for each in levels)
    shorter = min(np.ptp(each) for each in levels)
    return low, high, (high - low) / shorter if shorter > 0 else 0.0


def overlap(at: str, *rows: list[Line]) -> float:
    """How much of the shorter of two rows' lines, averaged over the seeds, has levels of a score in common with the other."""
    return common_levels(*(np.mean([values_of(line, at) for line in row], axis=0) for row in rows))[2]


def difference(finding: Finding, more: Line, less: Line) -> float:
    """By how much one row is above the other, for one seed: the mean over their lines, or over the part of them in which they have
    the same levels of another score. NaN where there is no such part, or no score."""
    if not finding.at:
        return float(np.mean(values_of(more, finding.score) - values_of(less, finding.score)))
    lines = []
    for line in (more, less):
        levels, number = np.unique(values_of(line, finding.at), return_inverse=True)
        lines.append((levels, np.bincount(number, values_of(line, finding.score)) / np.bincount(number)))  # of ties the mean
    low, high, share = common_levels(*(levels for levels, _ in lines))
    if not share > 0:
        return float("nan")
    common = np.linspace(low, high, 21)
    one, two = (np.interp(common, *line) for line in lines)
    return float(np.mean(one - two))


def no_verdict(ablation: Ablation, results: dict[str, list[Line]], args) -> str:
    """Why nothing can be concluded; empty where something can."""
    if args.quick:
        return "--quick"
    if args.seeds < SEEDS:
        return f"fewer than {SEEDS} seeds"
    (_, given), (_, usual) = (parsed(ablation.method, flags, 0, args) for flags in (args.train, ""))
    if given["steps"] < usual["steps"] or args.count < VIDEOS or args.sampling_steps < SAMPLING_STEPS:
        return (f"fewer than {usual['steps']} steps, {VIDEOS} videos or {SAMPLING_STEPS} steps of sampling ({given['steps']}, "
                f"{args.count}, {args.sampling_steps})")
    if given != usual | {"steps": given["steps"]}:
        return f"trained with {args.train}"
    recognised = lambda point: point.get("own_look", point["identity"])  # changed looks hide it
    _, low, _ = over_seeds([max(map(recognised, line)) for line in results[ablation.control]], 1 / args.count)
    return "" if low > KNOWN else f"the control, {ablation.control!r}, does not know its subjects"


def verdict(finding: Finding, results: dict[str, list[Line]], count: int, reason: str) -> str:
    """A line: the claim, the difference that was measured, seed by seed the same data, and whether it holds. reason: why there is no
    verdict. A score that is 0 or 1 for each of `count` videos is not known better than by one of them."""
    between = lambda one, other: np.array([difference(finding, *lines) for lines in zip(results[one], results[other])])
    differences = between(finding.more, finding.less) - (between(*finding.than) if finding.than else 0)
    coarse = finding.score in ("identity", "motion", "background_exact", "look", "dynamic")
    mean, low, high = over_seeds(differences, coarse / count)
    pairs = [(finding.more, finding.less), *([finding.than] if finding.than else [])]
    share = min(overlap(finding.at, *map(results.get, pair)) for pair in pairs) if finding.at else 1.0
    names = filter(None, (finding.score, finding.at))
    complete = all(np.isfinite(values_of(line, name)).all() for name in names for pair in pairs for row in pair for line in results[row])
    if not complete:
        said = "not measured"
    elif share < COMMON or not np.isfinite(mean):
        said = f"no verdict (hardly a common level of {TITLES[finding.at]})"
    elif reason:
        said = f"no verdict ({reason})"
    else:
        above, below = low > -finding.margin, high < -finding.margin
        said = "holds" if above else "does not hold: the opposite was measured" if below else "undecided"
    where = f", at the same {TITLES[finding.at]} ({max(share, 0):.0%} of the shorter line)" if finding.at and complete else ""
    within = f" [{low:+.3f}, {high:+.3f}]" if np.isfinite(low) else ""
    margin = f", margin {finding.margin}" if finding.margin else ""
    rows = f"{finding.more} minus {finding.less}" + (f", that minus ({finding.than[0]} minus {finding.than[1]})" if finding.than else "")
    found = f"{TITLES[finding.score]}: {rows}{where} = {mean:+.3f}{within}{margin}"
    return f"| {finding.claim} | {found} | {said} |"


def only(ablation: Ablation, rows: list[str]) -> Ablation:
    """Some of its rows, and what is found of these. Raises BadInput where one is unknown, the control is missing, or nothing is found of
    them."""
    unknown = [row for row in rows if row not in ablation.variants]
    if unknown:
        raise BadInput(f"--rows: there is no {unknown[0]!r}; there are {', '.join(map(repr, ablation.variants))}.")
    if ablation.control not in rows:
        raise BadInput(f"--rows: {ablation.control!r} must be among them, as nothing is judged unless it knows its subjects.")
    findings = tuple(each for each in ablation.findings if {each.more, each.less, *(each.than or ())} <= set(rows))
    if not findings:
        raise BadInput(f"--rows: no finding speaks of these alone; there are {', '.join(map(repr, ablation.variants))}.")
    variants = {label: variant for label, variant in ablation.variants.items() if label in rows}
    left_out = [label for label in ablation.variants if label not in rows]
    note = f"{ablation.note} Left out: {', '.join(left_out)}.".strip() if left_out else ablation.note
    return replace(ablation, variants=variants, findings=findings, note=note)


def run(args) -> None:
    """Trains, samples, scores; writes NAME.md and NAME.png."""
    checkpoint.check_out(args.out)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("An ablation is one process: start the same command several times, side by side; they share the work.")
    ablation, seeds = ABLATIONS[args.name], range(1 if args.quick else args.seeds)
    if args.rows:
        ablation = only(ablation, args.rows)
    to_train = [variant for variant in ablation.variants.values() if variant.train is not None]
    if args.train and not to_train:
        raise BadInput(f"{args.name} trains nothing, so --train has no effect: leave it out.")
    if len(to_train) < len(ablation.variants) and not (args.model / ablation.method).is_dir():
        raise BadInput(f"{args.model} has no folder {ablation.method}, and {args.name} samples from the toy's own model there.")
    ours = {"seed": "1", "model": "MODEL", "device": "DEVICE", "out": "OUT"}
    for variant in to_train:  # before the first training
        flags = flags_of(ablation.method, variant, args)
        probe = TRAINERS[ablation.method].parse([word for name, value in ours.items() for word in (f"--{name}", value)] + flags.split())
        for name, value in {**ours, "restart": False, "plan": False}.items():
            if str(getattr(probe, name)) != str(value):
                raise BadInput(f"--train {args.train!r}: --{name} is the ablation's own to give.")
        options, _ = parsed(ablation.method, flags, 0, args)
        if ablation.method == "sugar":
            train_sugar.stages_of(options)  # a row may have one stage where another has two
    known = read_measured(args.measured) if args.measured else {}
    if args.quick:
        args.out, args.count = args.out / "quick", 2
    if (args.out / "measured.jsonl").exists():
        read_measured(args.out / "measured.jsonl")  # to which is added: no training is to end at a damaged line
    args.out.mkdir(parents=True, exist_ok=True)
    points: dict[tuple[int, str, str], Point] = {}
    for wait in (False, True):  # first what no other process is at, so that several share the work
        for seed, label, sweep in product(seeds, ablation.variants, ablation.sweep):
            if (seed, label, sweep) not in points:
                with suppress(Busy):
                    points[seed, label, sweep] = measured(ablation, ablation.variants[label], sweep, seed, known, args, wait)
    results = {label: [[points[seed, label, sweep].scores for sweep in ablation.sweep] for seed in seeds] for label in ablation.variants}
    runs = {Path(point.point).parts[0]: point.trained for point in points.values() if point.trained}
    path = write(args, ablation, results, list(runs.values()), sum(args.count * point.seconds for point in points.values()))
    print(f"\n{path.read_text()}\nwrote {path} and .png")


def write(args, ablation: Ablation, results: dict[str, list[Line]], runs: list[dict], seconds: float) -> Path:
    """The table, the findings and the picture."""
    names = [score for score in SCORES if score in next(iter(results.values()))[0][0]]
    table = {label: [{name: over_seeds([values_of(line, name)[i] for line in lines]) for name in names} for i in range(len(ablation.sweep))]
             for label, lines in results.items()}
    cell = lambda interval: "not measured" if not np.isfinite(interval[0]) else f"{interval[0]:.3f}" + (
        f" [{interval[1]:.3f}, {interval[2]:.3f}]" if np.isfinite(interval[1]) else "")
    steps, trained_for = (sum(run[name] for run in runs) for name in ("step", "seconds"))
    reason = no_verdict(ablation, results, args)
    trainings = (f"{len(runs)} trainings, which ablations share: {steps:,} steps at {trained_for / steps:.2f} s = "
                 f"{trained_for / 3600:.2f} hours." if runs else "Nothing is trained.")
    lines = [f"# {args.name}: {ablation.source}", "",
             f"{len(next(iter(results.values())))} seeds, {args.count} videos each{f', trained with {args.train}' if args.train else ''}. "
             f"{trainings} Videos, made and scored: {seconds / 3600:.2f} hours."
             f"{' A quick try: the numbers mean nothing.' * args.quick} {ablation.note}".rstrip(), "",
             "DINO-I, CLIP-I, CLIP-T and the consistencies are by the toy's own networks, the dynamic degree by a classical estimator of "
             "optical flow, what is exact by the world itself. Not measured: motion smoothness, as AMT-S needs frames of 128 pixels, and "
             "ViCLIP, whose published weights have not seen the toy's world.", "",
             "| | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|",
             *(f"| {' '.join([label, sweep]).strip()} | " + " | ".join(cell(row[name]) for name in names) + " |"
               for label, rows in table.items() for sweep, row in zip(ablation.sweep, rows)), "",
             "| the paper's finding | measured | here |", "|---|---|---|",
             *(verdict(finding, results, args.count, reason) for finding in ablation.findings)]
    text = "\n".join(lines).replace("<cls>", "`<cls>`")  # which Markdown would take for a tag, and hide
    checkpoint.write_text(args.out / f"{args.name}.md", text + "\n")
    if ablation.pictures:
        picture = figures.tiled([
            figures.scatter({label: [(row[x], row[y]) for row in rows] for label, rows in table.items()}, TITLES[x], TITLES[y],
                            f"{args.name} ({ablation.source})") for x, y in ablation.pictures], columns=2)
    else:
        picture = figures.bars({TITLES[name]: {label: rows[0][name] for label, rows in table.items()} for name in names},
                               f"{args.name} ({ablation.source})")
    save_image(picture, args.out / f"{args.name}.png")
    return args.out / f"{args.name}.md"
