"""Stages over manifests: each turns the samples of the one before into its own, sample by sample.

    STAGE/000/000012.json     the record of sample 12, written when all else of it is: a run that was stopped at any moment
                              goes on with the samples that have none
    STAGE/settings.json       what the stage was begun with, and a digest of its samples: where either changes it must be begun anew
    STAGE.jsonl               the manifest: all records, when there are all
    STAGE.png                 a sheet of what was kept and what was thrown away; STAGE-scores.png: how scores are distributed
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import checkpoint
import figures
import media
from checkpoint import BadInput
from distributed import Ranks


class Run:
    """A folder of stages. A sample is a dict that grows from stage to stage; "id" names it, "kept" says whether it goes on."""

    def __init__(self, out: Path, ranks: Ranks):
        self.out, self.ranks = out, ranks
        self.before = ""  # by what the stage before was made, and those before it

    def path(self, stage: str, name: str, suffix: str) -> Path:
        """A file of a sample; a thousand of them share a folder."""
        return self.out / stage / f"{int(name.split('-')[0]) // 1000:03d}" / f"{name}{suffix}"

    def samples(self, stage: str) -> list[dict]:
        """What a finished stage handed on."""
        file = self.out / f"{stage}.jsonl"
        if not file.exists():
            raise BadInput(f"There is no {file}: run the stage {stage} first.")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        settings = self.out / stage / "settings.json"
        self.before = hashlib.sha256(settings.read_bytes()).hexdigest()[:16] if settings.exists() else ""
        return [row for row in rows if row["kept"]]

    def stage(self, name: str, samples: list[dict], settings: dict, work: Callable[[list[dict]], Iterator[dict]],
              show: Callable[[dict], list[Path]], limits: dict[str, float]) -> None:
        """Runs one stage over those samples that it has no record of, every rank over its share.

        work(samples) yields each sample, grown, when its files are written. show(sample): the files on the sheet.
        limits: the least that each score may be; a sample that falls short is dropped, and why is said.
        """
        digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:16]
        self.check_settings(name, {**settings, **limits, "samples": digest, "the stages before": self.before})
        if (self.out / f"{name}.jsonl").exists():
            return self.say(name)
        if self.ranks.first:
            checkpoint.remove_parts(self.out / name)
            checkpoint.remove_parts(self.out / name, "*/")
        todo = [sample for sample in samples if not self.path(name, sample["id"], ".json").exists()]
        self.ranks.wait()  # all have looked at the same records; what is left is shared out
        todo = todo[self.ranks.rank :: self.ranks.world]
        with tqdm(total=len(todo), desc=name, unit="sample", disable=not self.ranks.first, dynamic_ncols=True) as bar:
            for sample in work(todo) if todo else ():
                self.judge(sample, limits)
                record = self.path(name, sample["id"], ".json")
                record.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write_json(record, sample)
                bar.update()
        self.ranks.wait()
        if self.ranks.first:
            rows = [json.loads(self.path(name, sample["id"], ".json").read_text(encoding="utf-8")) for sample in samples]
            self.draw(name, rows, show, limits)
            checkpoint.write_jsonl(self.out / f"{name}.jsonl", rows)  # last, as it says that the stage is done
        self.ranks.wait()
        self.say(name)

    def judge(self, sample: dict, limits: dict[str, float]) -> None:
        short = [f"{score} {sample[score]:.2f} < {least:g}" for score, least in limits.items() if sample.get("kept", True)
                 and not sample[score] >= least]
        sample["kept"] = sample.get("kept", True) and not short
        if short:
            sample["why"] = ", ".join(short)

    def check_settings(self, name: str, settings: dict) -> None:
        """Raises where a stage would be continued with other settings than it was begun with."""
        file = self.out / name / "settings.json"
        if file.exists():
            old = checkpoint.read_json(file)
            for key in dict.fromkeys([*settings, *old]):
                if old.get(key) != settings.get(key):
                    raise BadInput(f"The stage {name} in {self.out} was begun with {key} = {old.get(key)}, and now it is "
                                   f"{settings.get(key)}: remove {name} and {name}.jsonl and those of the later stages, or choose "
                                   f"another --out.")
        self.ranks.wait()
        if self.ranks.first and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(file, settings)
        self.ranks.wait()

    def say(self, name: str) -> None:
        """How many were kept and dropped, and why."""
        if not self.ranks.first:
            return
        rows = [json.loads(line) for line in (self.out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        why = Counter(re.sub(r" -?[\d.]+ <", " <", row["why"]).split(": ")[0] for row in rows if not row["kept"])
        dropped = "; ".join(f"{count} {reason}" for reason, count in why.most_common())
        print(f"{name}: kept {sum(row['kept'] for row in rows)}, dropped {sum(why.values())}" + (f" ({dropped})" if why else ""))

    def draw(self, name: str, rows: list[dict], show: Callable[[dict], list[Path]], limits: dict[str, float]) -> None:
        """The contact sheet, of up to 12 that were kept and 12 that were dropped, and the histograms."""
        some = [*[row for row in rows if row["kept"]][:12], *[row for row in rows if not row["kept"]][:12]]
        items = []
        for row in some:
            pictures = [picture for path in show(row) for picture in pictures_of(self.out / path)]
            scores = " ".join(f"{score} {row[score]:.2f}" for score in limits if score in row)
            said = (row.get("text", row["label"]), scores, row.get("why", ""))
            items.append((pictures, "\n".join(filter(None, said)), row["kept"]))
        media.save_image(figures.contact_sheet(items), self.out / f"{name}.png")
        if limits:
            charts = [figures.histogram([row[score] for row in rows if score in row], score, least)
                      for score, least in limits.items()]
            media.save_image(figures.tiled(charts), self.out / f"{name}-scores.png")


def pictures_of(file: Path, count: int = 5) -> list[Image.Image]:
    """A picture, or `count` frames of a video."""
    try:
        if file.suffix != ".mp4":
            return [media.open_image(file)]
        frames = media.read_video(file)
    except BadInput:  # it was dropped for being broken
        return []
    return [Image.fromarray(frames[i]) for i in np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
