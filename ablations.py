"""The papers' ablations on the toy: which runs each needs, what its table and picture show, and whether each of its findings
holds here. `python evaluate.py ablate NAME` is its command.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import evaluate
import figures
import toy_networks
import train_sugar
import train_switch
from checkpoint import BadInput
from figures import Interval
from media import save_image
from pipeline import read_scales, read_schedule
from resume import last_checkpoint
from scorers import TITLES
from training import settings_of


@dataclass(frozen=True)
class Variant:
    """A row of a table: how a model is trained, and how videos are sampled from it."""

    train: str = ""  # flags of train_switch.py or train_sugar.py
    sample: str = ""  # flags of sample.py


@dataclass(frozen=True)
class Finding:
    """The paper's claim, as an inequality between two rows: the mean of `score` is higher in `more` than in `less`.

    at: compared where the two rows' lines have the same value of this score ("under the same level of identity").
    margin: "without loss" of the score holds where `more` is not lower by this much.
    """

    claim: str
    score: str
    more: str
    less: str
    at: str = ""
    margin: float = 0.0


@dataclass(frozen=True)
class Ablation:
    """variants: the rows. control: the row that must know its subject, or nothing is judged. looks: do the texts ask for every look?
    sweep: flags of sample.py, with each of which every row is sampled; they make it a line. picture: the scores of a scatter's axes;
    without them there are bars. note: what a reader must know of it."""

    source: str
    method: str
    variants: dict[str, Variant]
    findings: tuple[Finding, ...]
    control: str
    picture: tuple[str, str] | None = None
    looks: bool = False
    sweep: tuple[str, ...] = ("",)
    note: str = ""


SCORES = ("identity", "motion", "background_exact", "look", "movement", "dino_i", "clip_i", "clip_t", "dynamic", "subject", "background")
SWITCH = Variant()
P = {f"p = {p}": Variant(f"--p {p}") for p in (0.4, 0.6)}
IMAGE, TEXT = (toy_networks.SCALES[name] for name in ("omega_image", "omega_text"))  # where a row names none, the toy's own
SWEEP = tuple(f"--omega-image {image:g}" for image in (1, IMAGE, TEXT))
TSF, TSF_E = Variant("--strategy tsf"), Variant("--strategy tsf --design e")
MIX_E = {f"Mix, p = {p}": Variant(f"--strategy mix --p {p} --design e") for p in (0, 0.5, 1)}

ABLATIONS = {
    "switch-strategy": Ablation("Switch, Table 2", "switch", {
        "image-only": Variant("--strategy image-only"), "two-stage": Variant("--strategy two-stage"), "switching": SWITCH}, (
        Finding("trained on images only, the subject barely moves", "movement", "switching", "image-only"),
        Finding("two stages move more than switching", "movement", "two-stage", "switching"),
        Finding("switching keeps the identity better than images only (DINO-I)", "dino_i", "switching", "image-only"),
        Finding("two stages inflate the likeness (DINO-I)", "dino_i", "two-stage", "switching"),
        Finding("two stages forget the subject (exact identity)", "identity", "switching", "two-stage"),
        Finding("two stages forget the text (CLIP-T)", "clip_t", "switching", "two-stage")), "switching"),
    "switch-temporal": Ablation("Switch, Table 3, by exact motion in place of FVD", "switch", {
        "base on the videos": Variant("--strategy video-only"), "image-only": Variant("--strategy image-only"),
        "two-stage": Variant("--strategy two-stage"), "switching": SWITCH}, (
        Finding("switching models motion better than images only", "motion", "switching", "image-only"),
        Finding("switching models motion better than two stages", "motion", "switching", "two-stage"),
        Finding("switching models motion better than the base on the videos", "motion", "switching", "base on the videos")), "switching",
        note="The paper's protocol, from the first frame and by classes of motion, is `evaluate.py motion`."),
    "switch-frame": Ablation("Switch, Figure 6", "switch", {
        "first frame, no dropping": Variant("--reference-frame first --reference-drop 0"),
        "random frame, no dropping": Variant("--reference-drop 0"), "random frame, dropping": SWITCH}, (
        Finding("the first frame alone makes near-static videos", "movement", "random frame, dropping", "first frame, no dropping"),
        Finding("a random frame brings some of the motion back", "movement", "random frame, no dropping", "first frame, no dropping"),
        Finding("the first frame alone inflates DINO-I", "dino_i", "first frame, no dropping", "random frame, dropping"),
        Finding("and CLIP-I", "clip_i", "first frame, no dropping", "random frame, dropping"),
        Finding("a random frame alone costs likeness (DINO-I)", "dino_i", "first frame, no dropping", "random frame, no dropping")),
        "random frame, dropping"),
    "switch-cls": Ablation("Switch, Table 5", "switch", {"without <cls>": Variant("--no-cls"), "with <cls>": SWITCH}, (
        Finding("<cls> helps the identity (DINO-I)", "dino_i", "with <cls>", "without <cls>"),
        Finding("<cls> helps the identity (exact)", "identity", "with <cls>", "without <cls>"),
        Finding("<cls> gives more motion", "movement", "with <cls>", "without <cls>"),
        Finding("without it, the text is met a little better (CLIP-T)", "clip_t", "without <cls>", "with <cls>")), "with <cls>",
        note="Every caption of the toy has the same noun, so <cls> says nothing that is not known: a weak test."),
    "switch-t2v": Ablation("Switch, Table 6", "switch", {"T2V": Variant("--reference-drop 1"), "I2V": SWITCH}, (
        Finding("I2V keeps the identity better (DINO-I)", "dino_i", "I2V", "T2V"),
        Finding("I2V moves more", "movement", "I2V", "T2V"),
        Finding("T2V meets the text better (CLIP-T)", "clip_t", "T2V", "I2V")), "I2V"),
    "switch-videos": Ablation("Switch, Table 7, a tenth of its counts", "switch", {
        **{f"{n} videos": Variant(f"--videos {n}") for n in (100, 200, 300)}, "400 videos": SWITCH}, (
        Finding("four times the videos: better identity (DINO-I)", "dino_i", "400 videos", "100 videos"),
        Finding("four times the videos: more motion", "movement", "400 videos", "100 videos")), "400 videos"),
    "switch-p": Ablation("Switch, Table 8", "switch", {"p = 0": Variant("--strategy image-only"), "p = 0.2": SWITCH, **P}, (
        Finding("without video steps there is no motion", "movement", "p = 0.2", "p = 0"),
        Finding("many video steps strengthen the identity (DINO-I)", "dino_i", "p = 0.6", "p = 0.2")), "p = 0.2"),
    "sugar-guidance": Ablation("SUGAR, Table 1", "sugar", {
        f"image {image:g}": Variant(TSF.train, f"--omega-image {image:g}") for image in (TEXT, 3, IMAGE, 2, 1)}, (
        Finding("a lower image scale meets the text better (CLIP-T)", "clip_t", "image 1", f"image {TEXT:g}"),
        Finding("a lower image scale moves more", "movement", "image 1", f"image {TEXT:g}"),
        Finding("a higher image scale keeps the identity better (DINO-I)", "dino_i", f"image {TEXT:g}", "image 1")),
        f"image {IMAGE:g}", ("dino_i", "movement"), looks=True, note=f"The text's scale is {TEXT:g}, where the paper's is 7.5."),
    "sugar-design": Ablation("SUGAR, Figure 5", "sugar", {
        f"design ({design})": Variant("--strategy mix --p 0.5" + f" --design {design}" * (design != "b")) for design in "abcde"}, (
        Finding("(a) never sees the subject (identity)", "identity", "design (b)", "design (a)"),
        Finding("in (b), where one frame sees the subject, its identity is not lost", "identity", "design (b)", "design (e)", margin=0.05),
        *(Finding(f"at the same likeness (b) {what} than ({other})", score, "design (b)", f"design ({other})", at="dino_i")
          for other in "cde" for what, score in (("moves more", "movement"), ("meets the text better (CLIP-T)", "clip_t")))),
        "design (b)", ("dino_i", "movement"), looks=True, sweep=SWEEP),
    "sugar-design-tsf": Ablation("SUGAR, Figure 11", "sugar", {
        "design (b), TSF": TSF, "design (e), TSF": TSF_E}, (
        Finding("at the same likeness (b) moves more than (e)", "movement", "design (b), TSF", "design (e), TSF", at="dino_i"),
        Finding("at the same likeness (b) meets the text better than (e) (CLIP-T)", "clip_t", "design (b), TSF", "design (e), TSF",
                at="dino_i")), "design (b), TSF", ("dino_i", "movement"), looks=True, sweep=SWEEP),
    "sugar-strategy": Ablation("SUGAR, Figure 6", "sugar", {
        **MIX_E, "TS": Variant("--strategy ts --design e"), "TSF": TSF_E}, (
        Finding("real videos alone cannot change the look", "look", "Mix, p = 0.5", "Mix, p = 0"),
        Finding("real videos alone meet the text worse (CLIP-T)", "clip_t", "Mix, p = 0.5", "Mix, p = 0"),
        Finding("synthetic videos in the mix cost motion", "movement", "Mix, p = 0", "Mix, p = 0.5"),
        Finding("synthetic videos alone hardly move", "movement", "Mix, p = 0", "Mix, p = 1"),
        Finding("two stages move more than mixing", "movement", "TS", "Mix, p = 0.5"),
        Finding("freezing the first half moves more than not", "movement", "TSF", "TS"),
        Finding("TSF moves no less than real videos alone", "movement", "TSF", "Mix, p = 0", margin=0.05),
        Finding("TSF still changes the look", "look", "TSF", "Mix, p = 0")), "TSF", ("look", "movement"), looks=True,
        note="Mix takes as many steps as the two stages together."),
    "sugar-synthetic": Ablation("SUGAR, Figure 7", "sugar", {
        "TSF-Video": TSF_E, "TSF-Image": Variant("--strategy tsf --design e --synthetic image")}, (
        Finding("synthetic videos meet the text better than synthetic images (CLIP-T)", "clip_t", "TSF-Video", "TSF-Image"),
        Finding("and the asked look (exact)", "look", "TSF-Video", "TSF-Image"),
        Finding("at the same subject consistency they move more", "movement", "TSF-Video", "TSF-Image", at="subject")),
        "TSF-Video", ("subject", "movement"), looks=True, sweep=SWEEP),
    "sugar-drop": Ablation("SUGAR, Figure 9", "sugar", {
        "nothing dropped": TSF, **{f"{what} dropped": Variant(TSF.train, f"--t-bar 900 --drop {what}") for what in
                                   ("dino", "clip", "both")},
        "trained without dropping": Variant("--strategy tsf --drop-dino 0 --drop-clip 0")}, (
        Finding("dropping DINO early moves more", "movement", "dino dropped", "nothing dropped"),
        Finding("without loss of identity", "identity", "dino dropped", "nothing dropped", margin=0.05),
        Finding("or of what the text asks for", "look", "dino dropped", "nothing dropped", margin=0.05),
        Finding("dropping both loses the identity", "identity", "dino dropped", "both dropped")), "nothing dropped",
        ("identity", "movement"), looks=True,
        note="A model trained without dropping has never seen its null embeddings, which guidance subtracts."),
}
QUICK = ("--steps 4 --micro-batch 4", {"switch": "--image-batch 4 --video-batch 2 --images 8 --videos 4",
                                       "sugar": "--batch 4 --real 4 --triplets 4"})


# --- runs -------------------------------------------------------------------------------------------------------------


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
    if method == "sugar" and options.strategy == "mix":
        options.steps *= 2
    parts = ("transformer", "vae", "text_encoder", "dino", "clip")
    weights = checkpoint.fingerprint(*(checkpoint.part(args.model, part) for part in parts))
    settings = {name: value for name, value in settings_of(options).items() if name != "seed"} | {"of": weights}
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
    of_first = {name: value for name, value in settings.items() if name not in ("strategy", "p", "synthetic", "second_steps")}
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
        there, started = len(list(folder.glob("videos/*.mp4"))), time.perf_counter()
        # Each seed has subjects, texts and noise of its own, the same for all rows.
        status = evaluate.main(["generate", "--out", str(folder), "--count", str(args.count), "--seed", str(seed + 1),
                                *(["--looks"] if ablation.looks else []), *blind, "--", *model,
                                "--steps", "2" if args.quick else str(args.sampling_steps), *device, *way])
        if status or evaluate.main(["score", str(folder), "--own", str(args.model), *device]):
            raise BadInput(f"The videos of {folder} could not be made, or not be scored.")
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
    the same levels of another score. NaN where there is no such part, or no score."""
    score = lambda line, name: np.array([np.nan if point.get(name) is None else point[name] for point in line], dtype=float)
    if not finding.at:
        return float(np.mean(score(more, finding.score) - score(less, finding.score)))
    lines = []
    for line in (more, less):
        levels, values = score(line, finding.at), score(line, finding.score)
        order = np.argsort(levels)
        lines.append((levels[order], values[order]))
    low, high = max(levels[0] for levels, _ in lines), min(levels[-1] for levels, _ in lines)
    if not low <= high:
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
        return f"fewer than {usual['steps']} steps, 64 videos or 25 steps of sampling"
    if given != usual | {"steps": given["steps"]}:
        return f"trained with {args.train}"
    _, low, _ = over_seeds([max(point["identity"] for point in line) for line in results[ablation.control]], 1 / args.count)
    return "" if low > KNOWN else f"the control, {ablation.control!r}, does not know its subjects"


def verdict(finding: Finding, results: dict[str, list[Line]], count: int, reason: str) -> str:
    """A line: the claim, the difference that was measured, seed by seed the same data, and whether it holds. reason: why there is no
    verdict. A score that is 0 or 1 for each of `count` videos is not known better than by one of them."""
    differences = [difference(finding, more, less) for more, less in zip(results[finding.more], results[finding.less])]
    coarse = finding.score in ("identity", "motion", "background_exact", "look", "dynamic")
    mean, low, high = over_seeds(differences, coarse / count)
    if not np.isfinite(mean):
        said = f"no verdict (no common level of {TITLES[finding.at]})" if finding.at else "not measured"
    elif reason:
        said = f"no verdict ({reason})"
    else:
        low_enough, high_enough = low > -finding.margin, high < -finding.margin
        said = "holds" if low_enough else "does not hold: the opposite was measured" if high_enough else "undecided"
    where = f", at the same {TITLES[finding.at]}" if finding.at else ""
    return (f"| {finding.claim} | {TITLES[finding.score]}: {finding.more} minus {finding.less}{where} = {mean:+.3f} "
            f"[{low:+.3f}, {high:+.3f}]{f', margin {finding.margin}' if finding.margin else ''} | {said} |")


def ablate(args) -> None:
    """Trains, samples, scores; writes NAME.md and NAME.png."""
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
    value = lambda point, name: float("nan") if point[name] is None else point[name]
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
             "optical flow, what is exact by the world itself.", "",
             "| | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|",
             *(f"| {' '.join([label, sweep]).strip()} | " + " | ".join(cell(row[name]) for name in names) + " |"
               for label, rows in table.items() for sweep, row in zip(ablation.sweep, rows)), "",
             "| the paper's finding | measured | here |", "|---|---|---|",
             *(verdict(finding, results, args.count, reason) for finding in ablation.findings)]
    checkpoint.write_text(args.out / f"{args.name}.md", "\n".join(lines) + "\n")
    if ablation.picture:
        x, y = ablation.picture
        picture = figures.scatter({label: [(row[x], row[y]) for row in rows] for label, rows in table.items()}, TITLES[x], TITLES[y],
                                  f"{args.name} ({ablation.source})")
    else:
        picture = figures.bars({TITLES[name]: {label: rows[0][name] for label, rows in table.items()} for name in names},
                               f"{args.name} ({ablation.source})")
    save_image(picture, args.out / f"{args.name}.png")
    return args.out / f"{args.name}.md"
