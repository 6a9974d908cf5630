"""The papers' ablations on the toy: which runs each needs, what its table and picture show, and whether each of its findings
holds here. `python evaluate.py ablate NAME` is its command.

Runs are told apart by what they were trained with, so ablations share those they have in common: runs/ablations/switch-1a2b3c4d-0
is one training, below it a folder for each way to sample from it.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import evaluate
import figures
import train_sugar
import train_switch
from checkpoint import BadInput
from figures import Interval
from media import save_image
from scorers import TITLES


@dataclass(frozen=True)
class Variant:
    """A row of a table: how a model is trained, and how videos are sampled from it."""

    train: str = ""  # flags of train_switch.py or train_sugar.py
    sample: str = ""  # flags of sample.py


@dataclass(frozen=True)
class Finding:
    """The paper's claim, as an inequality between two rows: the mean of `score` is higher in `more` than in `less`."""

    claim: str
    score: str
    more: str
    less: str


@dataclass(frozen=True)
class Ablation:
    source: str
    method: str
    variants: dict[str, Variant]
    findings: tuple[Finding, ...]
    picture: tuple[str, str] | None = None  # scores of a scatter's axes; else bars
    looks: bool = False  # do the texts ask for every look?


SCORES = ("identity", "motion", "background_exact", "look", "movement", "dino_i", "clip_i", "clip_t", "dynamic")
SWITCH = Variant()
P = {f"p = {p}": Variant(f"--p {p}") for p in (0.4, 0.6)}
MIX = {f"Mix, p = {p}": Variant(f"--strategy mix --p {p}") for p in (0, 0.5, 1)}
TSF = Variant("--strategy tsf")

ABLATIONS = {
    "switch-strategy": Ablation("Switch, Table 2", "switch", {
        "image-only": Variant("--strategy image-only"), "two-stage": Variant("--strategy two-stage"), "switching": SWITCH}, (
        Finding("trained on images only, the subject barely moves", "movement", "switching", "image-only"),
        Finding("two stages move more than switching", "movement", "two-stage", "switching"),
        Finding("switching keeps the identity better than images only (DINO-I)", "dino_i", "switching", "image-only"),
        Finding("two stages forget the text (CLIP-T)", "clip_t", "switching", "two-stage"))),
    "switch-temporal": Ablation("Switch, Table 3, by exact motion in place of FVD", "switch", {
        "base on the videos": Variant("--strategy video-only"), "image-only": Variant("--strategy image-only"),
        "two-stage": Variant("--strategy two-stage"), "switching": SWITCH}, (
        Finding("switching models motion better than images only", "motion", "switching", "image-only"),
        Finding("switching models motion better than two stages", "motion", "switching", "two-stage"),
        Finding("switching models motion better than the base on the videos", "motion", "switching", "base on the videos"))),
    "switch-frame": Ablation("Switch, Figure 6", "switch", {
        "first frame, no dropping": Variant("--reference-frame first --reference-drop 0"),
        "random frame, no dropping": Variant("--reference-drop 0"), "random frame, dropping": SWITCH}, (
        Finding("the first frame alone makes near-static videos", "movement", "random frame, dropping", "first frame, no dropping"),
        Finding("a random frame brings some of the motion back", "movement", "random frame, no dropping", "first frame, no dropping"),
        Finding("the first frame alone inflates DINO-I", "dino_i", "first frame, no dropping", "random frame, dropping"))),
    "switch-cls": Ablation("Switch, Table 5", "switch", {"without <cls>": Variant("--no-cls"), "with <cls>": SWITCH}, (
        Finding("<cls> helps the identity (DINO-I)", "dino_i", "with <cls>", "without <cls>"),
        Finding("<cls> helps the identity (exact)", "identity", "with <cls>", "without <cls>"),
        Finding("<cls> gives more motion", "movement", "with <cls>", "without <cls>"),
        Finding("without it, the text is met a little better (CLIP-T)", "clip_t", "without <cls>", "with <cls>"))),
    "switch-t2v": Ablation("Switch, Table 6", "switch", {"T2V": Variant("--reference-drop 1"), "I2V": SWITCH}, (
        Finding("I2V keeps the identity better (DINO-I)", "dino_i", "I2V", "T2V"),
        Finding("I2V moves more", "movement", "I2V", "T2V"),
        Finding("T2V meets the text better (CLIP-T)", "clip_t", "T2V", "I2V"))),
    "switch-videos": Ablation("Switch, Table 7, a tenth of its counts", "switch", {
        **{f"{n} videos": Variant(f"--videos {n}") for n in (100, 200, 300)}, "400 videos": SWITCH}, (
        Finding("four times the videos: better identity (DINO-I)", "dino_i", "400 videos", "100 videos"),
        Finding("four times the videos: more motion", "movement", "400 videos", "100 videos"))),
    "switch-p": Ablation("Switch, Table 8", "switch", {"p = 0": Variant("--strategy image-only"), "p = 0.2": SWITCH, **P}, (
        Finding("without video steps there is no motion", "movement", "p = 0.2", "p = 0"),
        Finding("many video steps strengthen the identity (DINO-I)", "dino_i", "p = 0.6", "p = 0.2"))),
    "sugar-guidance": Ablation("SUGAR, Table 1", "sugar", {
        f"scales {image:g} and {text:g}": Variant(TSF.train, f"--omega-image {image} --omega-text {text}")
        for image, text in ((7.5, 7.5), (5, 7.5), (4, 7.5), (3, 7.5), (2.5, 7.5))}, (
        Finding("a lower image scale meets the text better (CLIP-T)", "clip_t", "scales 2.5 and 7.5", "scales 7.5 and 7.5"),
        Finding("a lower image scale moves more", "movement", "scales 2.5 and 7.5", "scales 7.5 and 7.5"),
        Finding("a higher image scale keeps the identity better (DINO-I)", "dino_i", "scales 7.5 and 7.5", "scales 2.5 and 7.5")),
        ("dino_i", "movement"), looks=True),
    "sugar-design": Ablation("SUGAR, Figure 5", "sugar", {
        f"design ({design})": Variant("--strategy mix --p 0.5" + f" --design {design}" * (design != "b")) for design in "abcde"}, (
        Finding("(a) never sees the subject (identity)", "identity", "design (b)", "design (a)"),
        Finding("(b) meets the text better than (e) (CLIP-T)", "clip_t", "design (b)", "design (e)"),
        Finding("(b) moves more than (e)", "movement", "design (b)", "design (e)"),
        Finding("(b) moves more than (d)", "movement", "design (b)", "design (d)")), ("dino_i", "movement"), looks=True),
    "sugar-design-tsf": Ablation("SUGAR, Figure 11", "sugar", {
        "design (b), TSF": TSF, "design (e), TSF": Variant("--strategy tsf --design e")}, (
        Finding("(b) moves more than (e)", "movement", "design (b), TSF", "design (e), TSF"),
        Finding("(b) meets the text better than (e) (CLIP-T)", "clip_t", "design (b), TSF", "design (e), TSF")),
        ("dino_i", "movement"), looks=True),
    "sugar-strategy": Ablation("SUGAR, Figure 6", "sugar", {**MIX, "TS": Variant("--strategy ts"), "TSF": TSF}, (
        Finding("real videos alone cannot change the look", "look", "Mix, p = 0.5", "Mix, p = 0"),
        Finding("synthetic videos alone hardly move", "movement", "Mix, p = 0", "Mix, p = 1"),
        Finding("two stages move more than mixing", "movement", "TS", "Mix, p = 0.5"),
        Finding("freezing the first half moves more than not", "movement", "TSF", "TS"),
        Finding("TSF still changes the look", "look", "TSF", "Mix, p = 0")), ("look", "movement"), looks=True),
    "sugar-synthetic": Ablation("SUGAR, Figure 7", "sugar", {
        "TSF": TSF, "TSF-Image": Variant("--strategy tsf --synthetic image")}, (
        Finding("synthetic videos, little as they move, beat synthetic images in motion", "movement", "TSF", "TSF-Image"),
        Finding("and in the identity (DINO-I)", "dino_i", "TSF", "TSF-Image")), looks=True),
    "sugar-drop": Ablation("SUGAR, Figure 9", "sugar", {
        "nothing dropped": TSF, **{f"{what} dropped": Variant(TSF.train, f"--t-bar 900 --drop {what}") for what in
                                   ("dino", "clip", "both")},
        "trained without dropping": Variant("--strategy tsf --drop-dino 0 --drop-clip 0")}, (
        Finding("dropping DINO early moves more", "movement", "dino dropped", "nothing dropped"),
        Finding("dropping both loses the identity", "identity", "dino dropped", "both dropped")), looks=True),
}
QUICK = ("--steps 4 --micro-batch 4", {"switch": "--image-batch 4 --video-batch 2 --images 8 --videos 4",
                                       "sugar": "--batch 4 --real 4 --triplets 4"})


# --- runs -------------------------------------------------------------------------------------------------------------


def trained(method: str, variant: Variant, seed: int, args) -> tuple[Path, float]:
    """The folder of a finished training, and the seconds it took; it is trained, or gone on with, where it is not there."""
    flags = f"{variant.train} {args.train}".strip()
    if args.quick:
        flags += f" {QUICK[0]} {QUICK[1][method]}"
    made_of = checkpoint.fingerprint(checkpoint.part(args.model, "transformer"), checkpoint.part(args.model, "vae"))
    digest = hashlib.sha256(f"{method} {made_of} {flags}".encode()).hexdigest()[:8]
    out = args.out / f"{method}-{digest}-{seed}"
    done = out / "done.json"
    if not done.exists():
        print(f"training {out.name}: {flags or 'the defaults'}, seed {seed}")
        trainer, started = {"switch": train_switch, "sugar": train_sugar}[method], time.perf_counter()
        trainer.run(trainer.parse(["--model", str(args.model), "--out", str(out), "--seed", str(seed), "--validate-count", "0",
                                   *(["--device", args.device] if args.device else []), *flags.split()]))
        if not ((out / "pytorch_lora_weights.safetensors").exists() or (out / "model_index.json").exists()):
            raise BadInput(f"The training {out} was stopped; the same command goes on from there.")
        seconds = time.perf_counter() - started
        with checkpoint.replace_when_whole(done) as part:
            part.write_text(json.dumps({"flags": flags, "seconds": seconds}) + "\n", encoding="utf-8")
    return out, checkpoint.read_json(done)["seconds"]


def scored(ablation: Ablation, variant: Variant, seed: int, args) -> dict[str, float]:
    """The mean of each score over the videos of one training, sampled one way."""
    run, _ = trained(ablation.method, variant, seed, args)
    way = f"{variant.sample} {'--looks' if ablation.looks else ''} {args.count} {args.sampling_steps}"
    folder = run / f"videos-{hashlib.sha256(way.encode()).hexdigest()[:8]}"
    # The base that was only shown videos has no reference to be given.
    blind = ["--no-image"] if "video-only" in variant.train else []
    model = ["--model", str(args.model), "--adapter", str(run)] if ablation.method == "switch" else ["--model", str(run)]
    summary = folder / "scores.json"
    if not summary.exists():
        steps = "2" if args.quick else str(args.sampling_steps)
        device = ["--device", args.device] if args.device else []
        if evaluate.main(["generate", "--out", str(folder), "--count", str(args.count), *(["--looks"] if ablation.looks else []), *blind,
                          "--", *model, "--steps", steps, *device, *variant.sample.split()]):
            raise BadInput(f"The videos of {folder} could not be made.")
        if evaluate.main(["score", str(folder), "--own", str(args.model)]):
            raise BadInput(f"The videos of {folder} could not be scored.")
    return {name: of["mean"] for name, of in checkpoint.read_json(summary)["means"].items()}


# --- statistics over seeds --------------------------------------------------------------------------------------------

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5%, by seeds
FEWEST = 3  # seeds for a verdict


def over_seeds(values: list[float]) -> Interval:
    """Mean and Student's 95% interval; of a single seed there is none."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = STUDENT.get(len(values), STUDENT[10]) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def verdict(finding: Finding, results: dict[str, list[dict]], quick: bool) -> str:
    """A line: the claim, the difference that was measured, seed by seed the same data, and whether it holds."""
    pairs = zip(results[finding.more], results[finding.less])
    mean, low, high = over_seeds([more[finding.score] - less[finding.score] for more, less in pairs])
    if quick:
        said = "no verdict (--quick)"
    elif len(results[finding.more]) < FEWEST:
        said = f"no verdict (fewer than {FEWEST} seeds)"
    else:
        said = "holds" if low > 0 else "does not hold: the opposite was measured" if high < 0 else "undecided: the interval holds 0"
    return (f"| {finding.claim} | {TITLES[finding.score]}: {finding.more} minus {finding.less} = {mean:+.3f} "
            f"[{low:+.3f}, {high:+.3f}] | {said} |")


def ablate(args) -> None:
    """Trains, samples, scores; writes NAME.md and NAME.png."""
    ablation, seeds = ABLATIONS[args.name], range(1 if args.quick else args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.out, args.count = args.out / "quick", 2
    results = {label: [scored(ablation, variant, seed, args) for seed in seeds] for label, variant in ablation.variants.items()}
    seconds = sum(trained(ablation.method, variant, seed, args)[1] for variant in {v.train: v for v in ablation.variants.values()}
                  .values() for seed in seeds)
    table = {label: {score: over_seeds([run[score] for run in runs]) for score in SCORES if score in runs[0]}
             for label, runs in results.items()}
    cell = lambda value: f"{value[0]:.3f}" + (f" [{value[1]:.3f}, {value[2]:.3f}]" if np.isfinite(value[1]) else "")
    names = [score for score in SCORES if score in next(iter(table.values()))]
    lines = [f"# {args.name}: {ablation.source}", "", f"{len(seeds)} seeds, {args.count} videos each; training took "
             f"{seconds / 3600:.2f} hours in all.{' A quick try: the numbers mean nothing.' if args.quick else ''}", "",
             "| | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|",
             *(f"| {label} | " + " | ".join(cell(row[name]) for name in names) + " |" for label, row in table.items()), "",
             "| the paper's finding | measured | here |", "|---|---|---|",
             *(verdict(finding, results, args.quick) for finding in ablation.findings)]
    text = "\n".join(lines) + "\n"
    with checkpoint.replace_when_whole(args.out / f"{args.name}.md") as part:
        part.write_text(text, encoding="utf-8")
    if ablation.picture:
        x, y = ablation.picture
        picture = figures.scatter({label: [(row[x], row[y])] for label, row in table.items()}, TITLES[x], TITLES[y],
                                  f"{args.name} ({ablation.source})")
    else:
        picture = figures.bars({TITLES[name]: {label: row[name] for label, row in table.items()} for name in names},
                               f"{args.name} ({ablation.source})")
    save_image(picture, args.out / f"{args.name}.png")
    print(f"\n{text}\nwrote {args.out / args.name}.md and .png")
