"""The published datasets, read from files as their publishers ship them, in the common form of data.py.

    Subjects200K    pairs of pictures of one subject (Switch 3.2)            parquet shards
    Videos          captioned videos (Switch 3.4, SUGAR 3.2)                 a manifest, or name.mp4 beside name.txt
    SubjectVideos   the same, with the subject cut out of a random frame     Videos and Grounded SAM
    Triplets        (video, text, subject image) (SUGAR 3.1)                 triplets.jsonl of synthesize.py
    dreambench      photographs of 30 subjects, for evaluate.py              dataset/<subject>/NN.jpg

A file that is broken raises Broken with the reason, one that does not fit what was asked Unfit: data.py skips it and says so.
What is wrong with a dataset as a whole is a BadInput, raised before anything is read.
"""

import argparse
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import checkpoint
import media
import world
from cache import Cache, encoder_weights
from checkpoint import BadInput, replace_when_whole
from data import Broken, Encoder, Example, OneFrame, Stream, Tolerant, Toy, Unfit
from distributed import place
from encoders import GroundedSAM
from manifests import Row, parquet, read_manifest
from media import Clip, TooLittle, decode
from model import Config

FORMATS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".gif")  # of the videos that a folder is searched for


def fitted(image: Image.Image, height: int, width: int, small: str) -> np.ndarray:
    """uint8 [height, width, 3]: the picture, cut to the frame's proportions and resized."""
    if small == "skip" and (image.height < height or image.width < width):
        raise Unfit(f"it is {image.width}x{image.height}, smaller than {width}x{height}")
    return np.asarray(media.fit(image, height, width, "crop"))


# --- which dataset ----------------------------------------------------------------------------------------------------

STREAMS = ("pairs", "videos", "subjects", "triplets")  # of data.py


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Flags that say how real data is read."""
    p.add_argument("--frames", type=int, help="of a clip, 8k+1 (default: a cache's, else the model's)")
    p.add_argument("--height", type=int, help="of a clip; pictures of pairs are squares of this side (default: as of frames)")
    p.add_argument("--width", type=int, help="of a clip (default: a cache's, else the model's)")
    p.add_argument("--fps", type=float, help="of a clip (default: a cache's, else 8)")
    p.add_argument("--short", choices=["skip", "loop"], default="skip", help="a video that is too short (default: %(default)s)")
    p.add_argument("--small", choices=["skip", "enlarge"], default="skip", help="one that is too small (default: %(default)s)")
    p.add_argument("--share", type=float, default=1.0, help="of the videos, a random part; Switch uses 0.01 of Pexels-400k")
    p.add_argument("--broken", type=float, default=0.1,
                   help="share of the examples that may be broken before the run stops; what is skipped for being short or small "
                   "does not count (default: %(default)s)")


def clip_of(args: argparse.Namespace, config: Config, *sources: str | None) -> Clip:
    """The clips that are asked for; what is not said is as in the first of `sources` that is a cache, else the model's size, at 8 fps.
    (No trainer stands on 1.5, made for another.)"""
    for name in ("frames", "height", "width", "fps"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise BadInput(f"--{name} {getattr(args, name)}: choose more than 0.")
    if not 0 < args.share <= 1 or not 0 <= args.broken <= 1:
        raise BadInput(f"--share {args.share} and --broken {args.broken} are shares: choose from 0 to 1.")
    usual = {"frames": config.sample_frames, "height": config.sample_height * 8, "width": config.sample_width * 8, "fps": 8}
    cached = [Cache(Path(source)).clip() for source in sources if source and (Path(source) / "index.json").exists()]
    said = usual | (cached[0] if cached else {}) | {name: value for name in usual if (value := getattr(args, name)) is not None}
    clip = Clip(*(said[name] for name in usual), args.short, args.small)
    media.check_clip(clip.frames, clip.height, clip.width)
    return clip


def open_data(source: str | None, stream: str, count: int | None, toy_count: int, clip: Clip, args: argparse.Namespace,
              encoder: Encoder, out: Path):
    """A stream's dataset and how many of its examples are used: `count`, else all of them.

    source: None is the toy's world (endless: `toy_count` of it), else the folder of a cache, or what the stream's reader
    takes; out: where skipped.jsonl is written.
    """
    if source is None:
        for name, default in (("frames", None), ("height", None), ("width", None), ("fps", None), ("share", 1.0)):
            if getattr(args, name) != default:
                raise BadInput(f"--{name} {getattr(args, name)} is for data of your own, and no {stream} are given: the toy's have 9 "
                               f"frames of 64x64.")
        if (clip.frames, clip.height, clip.width) != (world.FRAMES, world.SIZE, world.SIZE):
            raise BadInput(f"No {stream} are given, and the toy's world, of {world.FRAMES} frames of {world.SIZE}x{world.SIZE}, is not for "
                           f"this base, which was made for {clip.frames} of {clip.height}x{clip.width}: name data of your own.")
        return Toy(stream, args.seed), count or toy_count
    path = Path(source)
    if not path.exists():
        raise BadInput(f"There is no {path}: give the folder or file of a dataset, or of a cache.")
    if (path / "index.json").exists():
        cache = Cache(path)
        cache.check(encoder, stream)
        sizes = ("height",) if stream == "pairs" else ("frames", "height", "width")
        rate = {} if stream == "pairs" else {"fps": clip.fps if "fps" in cache.clip() else args.fps}
        cache.check_clip({name: getattr(clip, name) for name in sizes} | rate)
        if args.share != 1 and stream in ("videos", "subjects"):  # no other has shares
            raise BadInput(f"--share {args.share}: the cache {path} holds the share that it was written with; leave the flag out, or "
                           f"choose fewer by their number.")
        encoder.null = cache.null()  # so that T5 need not be loaded
        dataset = cache
    elif stream == "pairs":
        dataset = Subjects200K(path, clip.height, clip.small)
    elif stream == "triplets":
        dataset = Triplets(path, clip)
    else:
        dataset = Videos(path, clip, args.seed, args.share)
        if stream == "subjects":
            by = checkpoint.fingerprint(*(checkpoint.part(encoder.model, part) for part in ("grounding_dino", "sam")))
            dataset = SubjectVideos(dataset, lambda: GroundedSAM(encoder.model, encoder.device), out / "cutouts", by)
    if count is not None and count > len(dataset):
        raise BadInput(f"{count} examples were asked for, and {source} has {len(dataset)}.")
    length = count or len(dataset)
    return (dataset if isinstance(dataset, Cache) else Tolerant(dataset, length, out / "skipped.jsonl", args.broken)), length


def toy_sized(config: Config) -> bool:
    """Whether a base was made for the toy world's clips."""
    return (config.sample_frames, 8 * config.sample_height, 8 * config.sample_width) == (world.FRAMES, world.SIZE, world.SIZE)


def of_the_toy(dataset) -> bool:
    """Whether it is the toy's world or made from it by synthesize.py, or a cache of either."""
    match dataset:
        case OneFrame() | Tolerant():
            return of_the_toy(dataset.dataset)
        case Cache():
            return dataset.settings.get("data") is None or dataset.settings.get("toy", False)
        case Triplets():
            return dataset.of_the_toy()
    return isinstance(dataset, Toy)


def check_sources(streams: dict[str, Stream]) -> None:
    """Raises where data of one's own would be mixed with the toy's, as when a flag was forgotten. streams: by the flags that name their
    data."""
    toys = [flag for flag, stream in streams.items() if of_the_toy(stream.dataset)]
    own = [flag for flag in streams if flag not in toys]
    if toys and own:
        raise BadInput(f"{own[0]} is data of your own, and {toys[0]} is of the toy's world, as it is where it is not given: they do not go "
                       f"together.")


def what_is_trained_on(streams: dict[str, Stream], encoder: Encoder) -> dict:
    """For a run's settings: how many examples there are, on which their order depends, and by which networks they are encoded (a cache
    has seen to that)."""
    caches = {name: stream.dataset for name, stream in streams.items() if isinstance(stream.dataset, Cache)}
    cut_out = {name: by for name, stream in streams.items() if (by := cut_out_by(stream.dataset)) is not None}
    return {**{f"examples of {name}": stream.length for name, stream in streams.items()},
            **{f"subjects of {name} are cut out by": by for name, by in cut_out.items()},
            **{f"cache of {name}": cache.digest() for name, cache in caches.items()},
            "encoders": None if len(caches) == len(streams) else encoder_weights(encoder)}


# --- pairs ------------------------------------------------------------------------------------------------------------


class Subjects200K:
    """Switch's S2I data: parquet shards in which one picture holds two views of a subject side by side.

    Kept are rows whose three quality scores are all 5 or more and whose descriptions are not called invalid; each is two examples,
    one for each direction. The views are squares of 512 pixels, in the third collection 1024, with some margin around them. A file
    that cannot be read is one row, which is broken.
    """

    QUALITIES = ("compositeStructure", "objectConsistency", "imageQuality")

    def __init__(self, path: Path, side: int = 480, small: str = "skip"):
        self.side, self.small = side, small
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise BadInput(f"{path} holds no parquet files: Subjects200K comes as data/train-*.parquet.")
        self.rows: list[tuple[Path, int, int]] = []  # file, row group, row in it
        self.lost: dict[Path, str] = {}  # files that cannot be read, and why
        count = 0
        for file in files:
            try:
                with parquet(file) as opened:
                    lacking = [name for name in ("image", "quality_assessment", "description") if name not in opened.schema_arrow.names]
                    if lacking:
                        raise BadInput(f"{file} has no column {lacking[0]}: it has {', '.join(opened.schema_arrow.names)}.")
                    groups = [opened.read_row_group(group, columns=["quality_assessment", "description"]).to_pylist()
                              for group in range(opened.num_row_groups)]  # the pictures are not read yet
            except Broken as error:
                self.lost[file], groups = str(error), []
                self.rows.append((file, 0, 0))
            count += sum(map(len, groups))
            self.rows += [(file, group, row) for group, table in enumerate(groups) for row, about in enumerate(table)
                          if self.good(about)]
        lost, kept = checkpoint.some(list(self.lost.values()), 1), len(self.rows) - len(self.lost)
        if len(self.lost) == len(files):
            raise BadInput(f"None of the parquet files in {path} can be read: {lost}.")
        if not kept:
            raise BadInput(f"None of the rows in {path} has three quality scores of 5 and valid descriptions.")
        if place()[0] == 0:
            print(f"{path}: kept {kept:,} of {count:,} rows" + (f"; {lost}" if lost else ""))

    def good(self, about: dict) -> bool:
        scores, description = about["quality_assessment"] or {}, about["description"]
        good = description is not None and description.get("description_valid") is not False  # null says nothing
        return good and all((scores.get(name) or 0) >= 5 for name in self.QUALITIES)

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, i: int) -> Example:
        file, group, row = self.rows[i // 2]
        if file in self.lost:
            raise Broken(self.lost[file])
        try:
            about = row_group(file, group).slice(row, 1).to_pylist()[0]
            picture = Image.open(io.BytesIO(about["image"]["bytes"])).convert("RGB")
        except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Broken(f"row {row} of row group {group} of {file.name}: {error}") from error
        # The publisher speaks of 16 pixels of padding and crops at 8: the outer margin is read off the height, and whatever is left
        # of the width lies between the views.
        side = 1024 if picture.width >= 2048 else 512
        margin = (picture.height - side) // 2
        if margin < 0 or picture.width < 2 * (margin + side):
            raise Broken(f"row {row} of row group {group} of {file.name} is {picture.width}x{picture.height}, too small for two views "
                         f"of {side} pixels side by side")
        views = [picture.crop((x, margin, x + side, margin + side)) for x in (margin, picture.width - margin - side)]
        reference, target = views if i % 2 == 0 else views[::-1]
        description, number = about["description"], 1 - i % 2
        return Example(fitted(target, self.side, self.side, self.small)[None], caption_of(description.get(f"description_{number}")),
                       Image.fromarray(fitted(reference, self.side, self.side, self.small)), description.get("item") or None)


@lru_cache(maxsize=2)
def row_group(file: Path, number: int):
    """A table. Parquet is read a row group at a time; both directions of a pair, and a cache's next example, are in the same one."""
    with parquet(file) as opened:
        return opened.read_row_group(number, columns=["image", "description"])


def caption_of(text: str | None) -> str:
    if not text or not text.strip():
        raise Broken("its caption is empty")
    return " ".join(text.split())


# --- videos -----------------------------------------------------------------------------------------------------------


class Videos:
    """Captioned videos: a manifest (CSV with a heading, JSONL, parquet) whose paths are relative to it, or a folder with a
    name.txt beside each name.mp4. A clip is a random window of the video, the same one each time; only its frames are
    decoded. share: a random part of the videos is used; 0.01 is Switch's 4,000 of Pexels-400k."""

    def __init__(self, path: Path, clip: Clip, seed: int = 0, share: float = 1.0):
        self.path, self.clip, self.seed = path, clip, seed
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FORMATS and file.name[0] != ".")
            if not files:
                raise BadInput(f"{path} holds no videos ({', '.join(FORMATS)}).")
            if not any(file.with_suffix(".txt").exists() for file in files):
                raise BadInput(f"{path} has videos but no captions: put name.txt beside name.mp4, or give a manifest.")
            self.rows = [Row(str(file.relative_to(path)), "", "") for file in files]
        else:
            self.rows = read_manifest(path)
            if not self.rows:
                raise BadInput(f"The manifest {path} is empty.")
        if share < 1:
            order = np.random.default_rng(seed).permutation(len(self.rows))
            self.rows = [self.rows[i] for i in sorted(order[: max(round(share * len(self.rows)), 1)])]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        row, folder = self.rows[i], self.path if self.path.is_dir() else self.path.parent
        if not row.video:
            raise Broken(f"row {i + 1} of those chosen from {self.path.name} names no video")
        # A manifest that lists the addresses that videos were downloaded from is read as one of their names, without a ?query.
        name = re.split("[?#]", row.video)[0].rstrip("/").rsplit("/", 1)[-1] if "://" in row.video else row.video
        file = folder / name
        try:
            if not file.is_file():
                raise Broken(f"{file} does not exist")
        except OSError as error:
            raise Broken(f"{name[:80]}...: {error.strerror}") from error
        beside = file.with_suffix(".txt")
        text = row.text or (beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else "")
        try:
            rng = np.random.default_rng((self.seed, zlib.crc32(row.video.encode(errors="surrogateescape"))))
            return Example(decode(file, self.clip, rng), caption_of(text), noun=row.noun or None)
        except (BadInput, Broken) as error:
            raise (Unfit if isinstance(error, TooLittle) else Broken)(f"{file}: {error}") from error


class SubjectVideos:
    """SUGAR's real videos: "object segmentation on randomly sampled frames" gives the identity image (3.2). What to look for
    is the manifest's noun, else the whole caption, of which GroundingDINO finds what it is surest of. Cut-outs are kept in
    `cutouts`, so each is made once.

    segment(image, words) -> its mask, or None: encoders.GroundedSAM, made when the first cut-out is needed; by: tells its weights apart.
    """

    def __init__(self, videos: Videos, segment: Callable[[], Callable[[Image.Image, str], Image.Image | None]], cutouts: Path,
                 by: str = ""):
        self.videos, self.make_segmenter, self.segmenter, self.cutouts, self.by = videos, segment, None, cutouts, by

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, i: int) -> Example:
        example, row, clip = self.videos[i], self.videos.rows[i], self.videos.clip
        words = row.noun or example.text
        key = f"{row.video} {words} {clip} {self.videos.seed}".encode(errors="surrogateescape")
        frame = np.random.default_rng((self.videos.seed, 11, zlib.crc32(key))).integers(len(example.video))
        image = Image.fromarray(example.video[frame])
        made_of = key + f" {zlib.crc32(image.tobytes())} {self.by}".encode()
        file = self.cutouts / f"{zlib.crc32(made_of):08x}-{zlib.adler32(made_of):08x}.png"
        if not file.exists():
            self.segmenter = self.segmenter or self.make_segmenter()
            mask = self.segmenter(image, words)
            if mask is None or not np.any(mask):
                raise Unfit(f"{row.video}: no {words!r} was found in frame {frame}")
            self.cutouts.mkdir(parents=True, exist_ok=True)
            with replace_when_whole(file) as part:
                media.cut_out(image, mask, row.video).save(part)
        return replace(example, image=media.open_image(file))


def cut_out_by(dataset) -> str | None:
    """By which networks a stream's subjects are cut out; None where that has been done."""
    within = getattr(dataset, "dataset", None)
    return within.by if isinstance(within, SubjectVideos) else None


class Triplets:
    """SUGAR's synthetic data: the triplets.jsonl that synthesize.py writes, each line an object with "video", "text" and
    "image", paths relative to the file."""

    def __init__(self, path: Path, clip: Clip):
        self.path, self.clip = (path / "triplets.jsonl" if path.is_dir() else path), clip
        if not self.path.is_file():
            raise BadInput(f"There is no {self.path}: synthesize.py writes it when its last stage is done.")
        self.rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.rows.append((row["video"], row["text"], row["image"], row.get("noun")))
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f'Line {number} of {self.path} is no object with "video", "text" and "image".') from error
            if not all(isinstance(value, str) for value in (*self.rows[-1][:3], row.get("noun") or "")):
                raise BadInput(f'Line {number} of {self.path}: "video", "text", "image", and "noun" where there is one, must be texts.')
        if not self.rows:
            raise BadInput(f"{self.path} is empty.")

    def of_the_toy(self) -> bool:
        made_by = self.path.parent / "source" / "settings.json"
        return made_by.exists() and checkpoint.read_json(made_by).get("source", "") is None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        video, text, image, noun = self.rows[i]
        file = self.path.parent / video
        try:
            if not file.is_file():
                raise Broken("it does not exist")
            frames = decode(file, self.clip, np.random.default_rng(0))
            return Example(frames, caption_of(text), media.on_white(media.open_image(self.path.parent / image)), noun)
        except (BadInput, Broken, OSError) as error:
            raise (Unfit if isinstance(error, TooLittle) else Broken)(f"{file}: {error}") from error


# --- photographs ------------------------------------------------------------------------------------------------------

CLASSES = {  # SUGAR's three kinds (Figure 18 shows them by colour only: which class is in which is our assignment)
    "animal": ("dog", "cat"),
    "active object": ("stuffed animal", "toy", "cartoon"),
    "static object": ("backpack", "bowl", "can", "candle", "clock", "sneaker", "boot", "glasses", "teapot", "vase"),
}


class Photograph(NamedTuple):
    subject: str  # its folder
    noun: str  # its class in words
    kind: str  # of CLASSES
    file: Path


def dreambench(folder: Path) -> list[Photograph]:
    """DreamBooth's 30 subjects: dataset/<subject>/NN.jpg and prompts_and_classes.txt."""
    folder = folder / "dataset" if (folder / "dataset").is_dir() else folder
    listing = folder / "prompts_and_classes.txt"
    if not listing.is_file():
        raise BadInput(f"{folder} has no prompts_and_classes.txt: is it DreamBench's dataset folder?")
    photographs, kinds = [], {noun: kind for kind, nouns in CLASSES.items() for noun in nouns}
    for subject, noun in re.findall(r"^(\w+),([\w ]+)$", listing.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE):
        if subject == "subject_name":
            continue
        if noun not in kinds:
            raise BadInput(f"{listing} has a class {noun!r}, which is none of SUGAR's animals, active and static objects.")
        files = sorted(file for file in (folder / subject).glob("*")
                       if file.suffix.lower() in (".jpg", ".jpeg", ".png") and file.name[0] != ".")
        if not files:
            raise BadInput(f"{folder / subject} has no photographs, though {listing.name} lists the subject.")
        photographs += [Photograph(subject, noun, kinds[noun], file) for file in files]
    if not photographs:
        raise BadInput(f"{folder} has none of the subjects that its prompts_and_classes.txt lists.")
    return photographs
