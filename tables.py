"""Tables of scores: the papers' own rows, and below them ours."""

import math
from pathlib import Path

import checkpoint
import world
from scorers import TITLES, Scorers, bootstrap

EXACT = ("identity", "motion", "background_exact", "look", "movement")  # what the world measures
SETS = {  # which scores a paper prints, as a factor times the share, and its rows
    "sugar": (("dino_i", "clip_t", "viclip", "dynamic", "subject", "background"), 1, {  # Table 1
        "VideoBooth": (0.493, 0.266, 0.173, 0.512, 0.938, 0.960), "DreamVideo": (0.376, 0.296, 0.213, 0.722, 0.875, 0.937),
        "Vidu-1.5": (0.654, 0.303, 0.237, 0.645, 0.928, 0.942), "T2I + DynamiCrafter": (0.660, 0.321, 0.260, 0.420, 0.970, 0.971),
        "T2I + CogVideoX": (0.642, 0.323, 0.264, 0.325, 0.969, 0.967),
        "T2I + Runway Gen-3": (0.650, 0.326, 0.265, 0.522, 0.944, 0.950),
        "T2I + Luma Dream Machine": (0.578, 0.320, 0.270, 0.634, 0.915, 0.935),
        # The table calls the scale that falls the text's and the text calls it the image's, which fits the scores.
        **{f"SUGAR, image scale {scale} (printed as the text's)": row for scale, row in {
            7.5: (0.742, 0.311, 0.250, 0.608, 0.979, 0.983), 5: (0.723, 0.318, 0.262, 0.687, 0.976, 0.981),
            4: (0.708, 0.322, 0.267, 0.737, 0.972, 0.980), 3: (0.684, 0.327, 0.273, 0.757, 0.970, 0.977),
            2.5: (0.664, 0.329, 0.275, 0.772, 0.962, 0.974)}.items()}}),
    "switch": (("smoothness", "dynamic", "clip_t", "clip_i", "dino_i"), 100, {  # Table 1
        "VideoBooth": (96.95, 51.67, 29.59, 66.06, 34.54), "OmniControl + I2V": (98.21, 51.67, 31.89, 72.58, 54.16),
        "BLIP + I2V": (97.53, 49.17, 28.19, 79.29, 56.58), "IP-Adapter + I2V": (97.21, 55.83, 26.97, 73.86, 45.18),
        "Switch": (98.72, 60.19, 32.24, 73.70, 59.29)}),
    "toy": ((*EXACT, "dino_i", "clip_i", "clip_t", "dynamic"), 1, {
        "chance": (1 / 16, 1 / len(world.MOTIONS), 1 / len(world.BACKGROUNDS), 1 / len(world.LOOKS), *[math.nan] * 5)}),
}
# Switch, Table 3: FVD where the motion is small, medium, large
TEMPORAL = {"CogVideoX, fine-tuned": (597.54, 594.26, 573.86), "image-only": (641.92, 636.42, 680.34),
            "two-stage": (801.97, 872.30, 824.03), "Switch": (512.30, 511.66, 550.14)}


def summarize(folder: Path, rows: list[dict], done: dict[str, dict], scorers: Scorers, which: str) -> dict:
    """scores.json: each score's mean over the videos and its 95% interval, whose it is, what was not measured and why."""
    lines = [done[row["name"]] for row in rows]
    means = {}
    for name in dict.fromkeys(name for line in lines for name in line.get("scores", {})):
        values = {row["name"]: line["scores"][name] for row, line in zip(rows, lines) if name in line.get("scores", {})}
        interval = bootstrap(list(values.values()), [row["subject"] for row in rows if row["name"] in values])
        known = (None if math.isnan(value) else value for value in interval)
        means[name] = {**dict(zip(("mean", "low", "high"), known)), "videos": len(values)}
    reasons: dict[str, dict[str, str]] = {}  # for each score, videos that lack it, and why
    for line in lines:
        for name, why in line.get("without", {}).items():
            reasons.setdefault(name, {})[line["name"]] = why
    without = {name: next(iter(each.values())) for name, each in reasons.items() if name not in means}
    summary = {"videos": len(rows), "means": means, "by": {name: by for name, by in scorers.by.items() if name not in without},
               "not measured": scorers.missing | without,
               "not measured of some": {name: each for name, each in reasons.items() if name in means},
               "unreadable": {line["name"]: line["unreadable"] for line in lines if "unreadable" in line}}
    checkpoint.write_json(folder / "scores.json", summary)
    checkpoint.write_text(folder / "table.md", table({folder: summary}, which))
    return summary


def table(tables: dict[Path, dict], which: str) -> str:
    """A row for each folder, below the paper's own; and below that by whom each score is, and what is missing and why."""
    names, factor, printed = SETS[which]
    digits = 2 if factor == 100 else 3
    number = lambda value: "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
    lines = ["| | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(map(number, row)) + " |" for title, row in printed.items()]
    for folder, summary in tables.items():
        cells = []
        for name in names:
            found = summary["means"].get(name)
            if found is None:
                cells.append("not measured")
                continue
            few = f" of {found['videos']}" if found["videos"] < summary["videos"] else ""
            mean, low, high = (number(found[of] and factor * found[of]) for of in ("mean", "low", "high"))
            cells.append(f"**{mean}**" + f" [{low}, {high}]" * bool(low) + few)
        lines.append(f"| {folder.name} ({summary['videos']} videos) | " + " | ".join(cells) + " |")
    lines.append("")
    for name, by in {name: by for summary in tables.values() for name, by in summary["by"].items()}.items():
        lines.append(f"- {TITLES[name]}: by {by}")
    for name, reason in {name: why for summary in tables.values() for name, why in summary["not measured"].items()}.items():
        lines.append(f"- not measured: {TITLES[name]}: {reason}")
    for folder, summary in tables.items():
        lines += [f"- not measured: {TITLES[name]}: {folder.name}: {video}: {reason}"
                  for name, each in summary["not measured of some"].items() for video, reason in each.items()]
        lines += [f"- unreadable: {folder.name}: {video}: {reason}" for video, reason in summary["unreadable"].items()]
    return "\n".join(lines) + "\n"
