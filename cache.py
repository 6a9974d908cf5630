"""The latent cache: a dataset encoded once, so that training needs neither VAE nor encoders.

    python data.py cache --data PATH --as videos --out CACHE                  one process
    torchrun --nproc-per-node 8 data.py cache ...                             every rank its share of the files

    index.json                   settings, and how many examples there are
    shard-00000.safetensors      examples 0 to 63: tensors named "12.mean", "12.text", ...; appears whole or not at all

What is stored is what data.Encoder makes: posteriors, of which the sample is drawn at training time, so a cached example is
never twice the same.
"""

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import checkpoint
import distributed
from checkpoint import BadInput, at_least, check_seed, exit_status
from data import Encoder
from distributed import Ranks
from world import FRAMES, SIZE

SHARD = 64  # examples in a file


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def missing(folder: Path, length: int) -> dict[int, int]:
    """The files that a cache of `length` examples lacks, and how many examples each will hold."""
    sizes = (min(SHARD, length - low) for low in range(0, length, SHARD))
    return {number: size for number, size in enumerate(sizes) if not shard_file(folder, number).exists()}


class Cache:
    """A dataset that is encoded already: item i is what Encoder made of example i."""

    def __init__(self, folder: Path):
        index = checkpoint.read_json(folder / "index.json")
        try:
            self.folder, self.length, self.settings = folder, index["length"], index["settings"]
        except KeyError as error:
            raise BadInput(f"{folder / 'index.json'} is not the index of a cache: it has no {error}.") from error
        lacking = [shard_file(folder, number).name for number in missing(folder, self.length)]
        if lacking:
            raise BadInput(f"The cache {folder} is not whole: it lacks {checkpoint.some(lacking)}. Run the command that began "
                           f"it again; it goes on where it was.")

    def __len__(self) -> int:
        return self.length

    def null(self) -> Tensor:
        """[M, D], the features of the empty text."""
        return open_shard(shard_file(self.folder, 0))[0].get_tensor("null.text")

    def digest(self) -> str:
        """Tells apart what is in caches."""
        made_of = {name: value for name, value in self.settings.items() if name != "data"}
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]

    def check(self, encoder: Encoder, stream: str) -> None:
        """Raises where what is stored is not what `encoder` would make for that stream."""
        for name, wanted in stored_settings(encoder, stream).items():
            if name == "weights" and wanted is None:  # a base of which nothing but the transformer is there
                continue
            if name == "reference_frames" and (self.settings.get(name) == 1) == (wanted == 1):
                continue  # always the first frame, or any number to choose from
            if self.settings.get(name) != wanted:
                raise BadInput(f"The cache {self.folder} was written with {name} = {self.settings.get(name)}, and this run needs "
                               f"{wanted}: write another one with python data.py cache.")

    def clip(self) -> dict:
        """frames, height, width and, but for the toy's world, fps of its clips; of pairs the height alone says something."""
        return self.settings.get("clip") or {"frames": FRAMES, "height": SIZE, "width": SIZE}

    def check_clip(self, asked: dict) -> None:
        """Raises where a run's clips, by frames, height, width or fps, are not what was cached."""
        for name, value in asked.items():
            if value is not None and self.clip().get(name) != value:
                raise BadInput(f"The clips of this run have --{name} {value:g}, and the cache {self.folder} was written with "
                               f"{self.clip().get(name, 'no frame rate')}: say --{name}, or take another cache.")

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        file, names = open_shard(shard_file(self.folder, i // SHARD))
        return {name: file.get_tensor(f"{i}.{name}") for name in names[str(i)]}


@lru_cache(maxsize=256)
def open_shard(file: Path) -> tuple[safe_open, dict[str, list[str]]]:
    """A memory-mapped file of the cache, and the names of each example's tensors in it."""
    try:
        opened, names = safe_open(file, "pt"), {}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is truncated or damaged ({error}): remove it, and run the command that wrote the cache again; it "
                       f"writes what is missing.") from error
    for key in opened.keys():
        i, name = key.split(".")
        names.setdefault(i, []).append(name)
    return opened, names


def stored_settings(encoder: Encoder, stream: str) -> dict:
    """What a reader of the cache must agree on: how its examples were encoded, and by whom. Only videos have frames to choose
    from."""
    frames = {"reference_frames": encoder.reference_frames} if stream == "videos" and not encoder.sugar else {}
    return {"stream": stream, "cls": encoder.cls, "text_length": encoder.text_length, "sugar": encoder.sugar,
            "weights": encoder_weights(encoder), **frames}


def encoder_weights(encoder: Encoder) -> str | None:
    """Tells the encoder's networks apart; None where they are not there, as training from a cache needs none."""
    parts = ["vae", "text_encoder", *(("dino", "clip") if encoder.sugar else ())]
    folders = [checkpoint.part(encoder.model, part) for part in parts]
    there = all(folder is not None and any(folder.glob("*.safetensors")) for folder in folders[:2])
    return checkpoint.fingerprint(*folders) if there else None


def digest_of(data: Path, out: Path) -> str:
    """Tells whether a dataset is what it was: by the table's contents, or by names, sizes, and tables in its folder, without what lies
    in the cache's own."""
    within = [file for file in data.rglob("*") if file.is_file() and file.name[0] != "." and out.resolve() not in file.resolve().parents]
    files = [data] if data.is_file() else sorted(within)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(data.parent)}:{file.stat().st_size};".encode(errors="surrogateescape"))
        if file.suffix.lower() in (".csv", ".jsonl") or file == data:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def write_cache(folder: Path, dataset, length: int, encoder: Encoder, ranks: Ranks, seed: int, settings: dict) -> Cache:
    """Encodes the first `length` examples into `folder`, every rank its share of the files. Files that are there are kept,
    so a run that was stopped goes on where it was.

    settings: what the examples and their encoding depend on; a folder that was begun with others is an error.
    """
    index = {"length": length, "settings": {**settings, "seed": seed}}
    if (folder / "index.json").exists():
        found = checkpoint.read_json(folder / "index.json")
        old, new = ({"length": each["length"], **each["settings"]} for each in (found, index))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise BadInput(f"{folder} holds a cache with {name} = {old.get(name)}, and now it is {new.get(name)}: choose "
                               f"another folder.")
    ranks.wait()  # all have looked
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_parts(folder)
        checkpoint.remove_parts(folder, "cutouts/")
        checkpoint.write_json(folder / "index.json", index)
    todo = missing(folder, length)
    ranks.wait()  # all have looked at the same files; what is left is shared out
    mine = list(todo.items())[ranks.rank :: ranks.world]
    with tqdm(total=sum(size for _, size in mine), unit="example", desc=folder.name, disable=not ranks.first, dynamic_ncols=True) as bar:
        for number, size in mine:
            tensors = {"null.text": encoder.null} if number == 0 else {}
            for i in range(number * SHARD, number * SHARD + size):
                tensors |= {f"{i}.{name}": tensor.contiguous() for name, tensor in encoder.encode(dataset[i], i, seed).items()}
                bar.update()
            with checkpoint.replace_when_whole(shard_file(folder, number)) as part:
                save_file(tensors, part)
    ranks.wait()
    return Cache(folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    import readers

    p = argparse.ArgumentParser(prog="data.py", description="Encodes a dataset once, for training without VAE and encoders.")
    p.add_argument("command", choices=["cache"])
    p.add_argument("--as", dest="stream", choices=list(readers.STREAMS), required=True, help="what the data is: see data.py")
    p.add_argument("--data", metavar="PATH", help="the dataset (default: the toy's world)")
    p.add_argument("--out", type=Path, required=True, help="folder of the cache")
    p.add_argument("--model", default="checkpoints/toy", help="whose VAE and encoders; a folder or a hub id (default: %(default)s)")
    p.add_argument("--count", type=int, help="examples (default: all; of the toy's world 4000)")
    p.add_argument("--reference-frames", type=int, default=4,
                   help="videos: frames kept for RandomFrameSelect; 1 is always the first (default: %(default)s)")
    p.add_argument("--no-cls", action="store_true", help="Switch: no <cls> in the captions")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    readers.add_arguments(p)
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    import readers
    from model import read_config

    at_least(1, args, "count", "reference_frames")
    check_seed(args.seed)
    if args.data is not None and (Path(args.data) / "index.json").exists():
        raise BadInput(f"--data {args.data} is a cache already: give the dataset that it was made of.")
    ranks = distributed.start(args.device)
    folder = checkpoint.resolve(args.model)
    config = read_config(checkpoint.need(folder, "transformer"))
    if config.patch_t != 1:
        raise BadInput(f"Neither trainer can stand on {args.model}: its patches span two latent frames.")
    sugar = args.stream in ("subjects", "triplets")
    for flag, given, of in (("--share", args.share != 1, ("videos", "subjects")), ("--no-cls", args.no_cls, ("pairs", "videos")),
                            ("--reference-frames", args.reference_frames != 4, ("videos",))):
        if given and args.stream not in of:
            raise BadInput(f"{flag} has no effect --as {args.stream}, but --as {' or '.join(of)}: leave it out.")
    encoder = Encoder(folder, "none" if sugar or args.no_cls else "token", config.max_text_seq_length, ranks.device, sugar,
                      args.reference_frames)
    clip = readers.clip_of(args, config)
    dataset, length = readers.open_data(args.data, args.stream, args.count, 4000, clip, args, encoder, args.out)
    started, new = time.perf_counter(), sum(missing(args.out, length).values())
    about = {"data": args.data, "data's digest": args.data and digest_of(Path(args.data), args.out),
             "clip": asdict(clip) if args.data else {}, "share": args.share}
    if args.data is not None and readers.of_the_toy(dataset):
        about["toy"] = True  # made from the toy's world by synthesize.py
    if (by := readers.cut_out_by(dataset)) is not None:
        about["subjects are cut out by"] = by
    written = write_cache(args.out, dataset, length, encoder, ranks, args.seed, {**stored_settings(encoder, args.stream), **about})
    if ranks.first:
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in args.out.glob("shard-*"))
        print(f"wrote {args.out}: {len(written):,} examples, {size / len(written) / 1e3:,.1f} kB each; {new:,} of them now, at "
              f"{new / seconds:.1f} examples/s")
        if (args.out / "skipped.jsonl").exists():
            skipped = len((args.out / "skipped.jsonl").read_text(encoding="utf-8").splitlines())
            print(f"{skipped:,} skipped, see {args.out / 'skipped.jsonl'}")


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))
