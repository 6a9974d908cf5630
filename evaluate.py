"""The papers' protocols: videos for their prompts, their scores, their tables.

    python evaluate.py generate --set sugar --dreambench DIR --out runs/eval/sugar -- --model MODEL --omega-image 5
    python evaluate.py score runs/eval/sugar --set sugar --raft raft-things.pth --viclip ViClip-InternVid-10M-FLT.pth
    python evaluate.py sheet runs/eval/sugar runs/eval/other
    python evaluate.py ablate switch-strategy            a paper's ablation on the toy
    python evaluate.py motion --data DIR --out ..        Switch's temporal protocol

`generate` without --set takes the toy's held-out subjects, which have their world's exact measures beside the learned scores. What
stands after `--` goes to sample.py, which makes the videos: it goes on where it was stopped, and under torchrun shares them among ranks.

    DIR/videos/         PROMPT-N.mp4                       DIR/scores.jsonl    the scores of each video
    DIR/videos.jsonl    what each video was to show        DIR/scores.json     means and their confidence intervals
    DIR/settings.json   by what they were made             DIR/table.md        beside the paper's own rows
    DIR/seen/           what the model saw of the image    DIR/prompts.json    prompts by file, for VBench

VBench scores the videos too: `vbench evaluate --dimension dynamic_degree --mode custom_input --videos_path DIR/videos --prompt_file
DIR/prompts.json`.
"""

import argparse
import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import checkpoint
import distributed
import figures
import media
import motion
import prompts
import sample
import world
from ablations import ABLATIONS, SAMPLING_STEPS, SEEDS, VIDEOS
from checkpoint import BadInput, at_least, check_seed, exit_status
from data import ToyTest
from diffusion import T
from distributed import Ranks
from lora import find_adapter
from pipeline import read_scales, read_schedule
from readers import dreambench
from scorers import PUBLISHED, Scorers
from tables import EXACT, SETS, summarize, table

# --- generate ---------------------------------------------------------------------------------------------------------


def rows_of(args: argparse.Namespace) -> list[dict]:
    """What is to be made: "name" of the video, "prompt", "noun", "subject", "kind", "image" and "seed"; of SUGAR's prompts also
    whether we "restored" it."""
    if args.set == "toy":
        return toy_rows(args)
    if args.dreambench is None:
        raise BadInput(f"--set {args.set} needs --dreambench, the folder of DreamBench's subjects.")
    first = {}  # one photograph of each subject, the first by name
    for photograph in dreambench(args.dreambench):
        first.setdefault(photograph.subject, photograph)
    if len(first) != 30:
        print(f"warning: {args.dreambench} has {len(first)} subjects; SUGAR's protocol and ours of Switch are of 30", file=sys.stderr)
    rows = []
    for number, photograph in enumerate(first.values()):
        for i, text in enumerate(prompts.SUGAR[photograph.kind] if args.set == "sugar" else prompts.SWITCH[photograph.noun]):
            prompt = text.replace("sks", photograph.noun)
            rows.append({"name": f"{prompt}-{number}", "prompt": prompt, "noun": photograph.noun, "subject": photograph.subject,
                         "kind": photograph.kind, "image": str(photograph.file.resolve()), "seed": args.seed + len(rows),
                         **({"restored": (photograph.kind, i) in prompts.RESTORED} if args.set == "sugar" else {})})
    return rows


def toy_rows(args: argparse.Namespace) -> list[dict]:
    """Held-out subjects of the toy's world, whose portraits come to lie in DIR/images."""
    looks, rows = tuple(world.LOOKS) if args.looks else ("plain",), []
    for i in range(args.count or 64):
        example = ToyTest(args.seed, looks)[i]
        rows.append({"name": f"{example.text}-{i}", "prompt": example.text, "noun": example.noun, "subject": f"{i:04d}",
                     "kind": "toy", "image": f"images/{i:04d}.png", "seed": 1000 * args.seed + i, "toy": [args.seed, looks, i]})
    return rows


def save_portraits(out: Path, rows: list[dict]) -> None:
    (out / "images").mkdir(parents=True, exist_ok=True)
    for row in rows:
        seed, looks, i = row["toy"]
        media.save_image(ToyTest(seed, looks)[i].image, out / row["image"])


def subject_of(folder: Path, row: dict) -> Image.Image:
    return media.on_white(media.open_image(folder / row["image"]))


def generate(args: argparse.Namespace) -> None:
    """Writes the lists and lets sample.py make the videos."""
    which = f"--set {args.set}"
    for flag, with_what, lost in (("--looks", which, args.looks and args.set != "toy"),
                                  ("--dreambench", which, args.dreambench and args.set == "toy"),
                                  ("--cut-out", "--no-image", args.cut_out and args.no_image)):
        if lost:
            raise BadInput(f"{flag} has no effect with {with_what}: leave one of them out.")
    at_least(1, args, "count")
    check_seed(args.seed)
    ranks = distributed.start(sample.parse([*args.sample, "--prompts", "list.jsonl"]).device)
    rows, photographs = rows_of(args), None
    if args.set != "toy":
        contents = [Path(image).read_bytes() for image in dict.fromkeys(row["image"] for row in rows)]
        photographs = hashlib.sha256(b"".join(contents)).hexdigest()[:16]
    rows = rows[: args.count]
    made_by(args.out, {"set": args.set, "seed": args.seed, "looks": args.looks, "image": not args.no_image, "cut_out": args.cut_out,
                       "photographs": photographs}, args.sample)
    if args.set == "toy":
        save_portraits(args.out, rows)
    asked = [{"name": row["name"], "prompt": row["prompt"], "noun": row["noun"], "seed": row["seed"]} for row in rows]
    if not args.no_image:
        for line, row in zip(asked, rows):
            line["image"] = row["image"]
            if args.cut_out:
                line["subject"] = row["noun"]
    for name, lines in (("list.jsonl", asked), ("videos.jsonl", rows)):
        checkpoint.write_jsonl(args.out / name, lines)
    checkpoint.write_json(args.out / "prompts.json", {f"{row['name']}.mp4": row["prompt"] for row in rows})
    make(args.out / "list.jsonl", args.out, args.sample, ranks)


def make(listing: Path, out: Path, flags: list[str], ranks: Ranks) -> None:
    """Lets sample.py make the videos of the list, in out/videos; what it shows of the images is put into out/seen."""
    if ranks.first:
        checkpoint.remove_parts(out / "videos")  # of a run that was killed: VBench would take them for videos
    ranks.wait()
    sample.run(sample.parse([*flags, "--prompts", str(listing), "--out", str(out / "videos")]))
    (out / "seen").mkdir(exist_ok=True)
    for picture in (out / "videos").glob("[!.]*.png"):
        with suppress(FileNotFoundError):  # another rank was quicker
            picture.replace(out / "seen" / picture.name)


MADE_BY = ("transformer", "vae", "text_encoder", "dino", "clip")  # parts of a model that make videos


def given(flags: list[str], *names: str) -> list[str]:
    """Which of these flags of sample.py are given behind --, though they are evaluate.py's to give."""
    parsed, plain = sample.parse(flags), sample.parse([])
    return [name for name in names if getattr(parsed, name) != getattr(plain, name)]


def made_by(out: Path, settings: dict, flags: list[str]) -> None:
    """Notes in out/settings.json by what the videos are made, and raises where there are videos that something else made."""
    checkpoint.check_out(out)
    if given(flags, "prompts", "out", "seed"):
        raise BadInput("--prompts, --out and --seed are not for sample.py here, behind --: evaluate.py gives it the list, in which each "
                       "video has a seed of its own, and a folder in its own --out. evaluate.py's --seed is another list.")
    parsed = sample.parse([*flags, "--prompts", "list.jsonl"])
    model, there = Path(parsed.model), Path(parsed.model).is_dir()
    cut_by = ("grounding_dino", "sam") if settings.get("cut_out") or parsed.subject else ()
    parts = [checkpoint.part(model, name) for name in (*MADE_BY, *cut_by)] if there else []
    weights = checkpoint.fingerprint(*parts, *([find_adapter(parsed.adapter)] if parsed.adapter else []))
    scales = read_scales(read_schedule(model)) if there else {}  # what flags that are not given stand for
    free = {"device", "out", "prompts", "low_memory"}
    settings = {**{name: value for name, value in vars(parsed).items() if name not in free}, **settings, "weights": weights,
                "the checkpoint's guidance": scales}  # of two that have one name, such as the seed, the list's own says what is made
    file = out / "settings.json"
    begun = file.exists() and any((out / "videos").glob("[!.]*.mp4"))  # a first try may have made none
    old = checkpoint.read_json(file) if begun else settings
    for name in sorted(settings.keys() | old.keys()):
        if old.get(name) != settings.get(name):
            raise BadInput(f"The videos in {out} were made with {name} = {old.get(name)}, and now it is {settings.get(name)}: choose "
                           f"another --out, or remove that one.")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(file, settings)


# --- score ------------------------------------------------------------------------------------------------------------

# What was scored by other code is scored again.
SCORED_BY = ("world", "data", "measure", "scorers", "flow", "amt", "viclip", "encoders", "media")
CODE = checkpoint.fingerprint(*(Path(__file__).with_name(f"{name}.py") for name in SCORED_BY))


def read_videos(folder: Path) -> list[dict]:
    """videos.jsonl: what each video was to show."""
    file, rows = folder / "videos.jsonl", []
    if not file.exists():
        raise BadInput(f"There is no {file}: is {folder} what evaluate.py generate wrote?")
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            rows.append(json.loads(line))
            lacking = [name for name in ("name", "prompt", "subject", "image") if not isinstance(rows[-1].get(name), str)]
        except (ValueError, AttributeError) as error:
            raise BadInput(f"Line {number} of {file} is no JSON object: run evaluate.py generate again.") from error
        if "toy" in rows[-1] and not is_toy(rows[-1]["toy"]):
            raise BadInput(f'Line {number} of {file} has a "toy" that evaluate.py generate did not write: run it again.')
        if lacking:
            raise BadInput(f'Line {number} of {file} has no text as its "{lacking[0]}": run evaluate.py generate again.')
    if not rows:
        raise BadInput(f"{file} is empty: run evaluate.py generate again.")
    return rows


def is_toy(toy) -> bool:
    """Whether it is a seed, looks and a number, as toy_rows() writes them for ToyTest."""
    return (isinstance(toy, list) and [*map(type, toy)] == [int, list, int] and min(toy[0], toy[2]) >= 0
            and toy[1] != [] and all(look in list(world.LOOKS) for look in toy[1]))


def read_scores(folder: Path) -> dict[str, dict]:
    """The lines of scores.jsonl, by what they are of."""
    file, lines = folder / "scores.jsonl", {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        with suppress(ValueError, TypeError, KeyError):  # a run that was killed while it wrote may have left half a line
            read = json.loads(line)
            lines[read["of"]] = read
    return lines


def check_complete(folder: Path, rows: list[dict]) -> None:
    """Raises where videos and prompts do not match."""
    names = [row["name"] for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{folder / 'videos.jsonl'} has lines of one name ({checkpoint.some(twice)}): run evaluate.py generate again.")
    wanted, there = {f"{row['name']}.mp4" for row in rows}, {file.name for file in (folder / "videos").glob("[!.]*.mp4")}
    if wanted != there:
        parts = [f"{len(names)} {what} ({checkpoint.some(sorted(names))})" for what, names in
                 (("without a video", wanted - there), ("videos without a prompt", there - wanted)) if names]
        raise BadInput(f"{folder} has {len(rows)} prompts and {len(there)} videos: {', '.join(parts)}.")


def exact_scores(frames: np.ndarray, seed: int, looks: list[str], number: int) -> dict[str, float]:
    """What the world itself says of a video of ToyTest(seed, looks)[number]; of those that show the subject as it is, among others
    that change its look, the identity once more."""
    test = ToyTest(seed, tuple(looks))
    found = test[number].measure(frames)
    if len(looks) > 1 and test.scene(number)[0].look == "plain":
        found["own_look"] = found["identity"]
    return {("background_exact" if name == "background" else name): value for name, value in found.items()}


def score(args: argparse.Namespace) -> None:
    """Scores each folder's videos, every rank its share; those that scores.jsonl has already are not scored again."""
    ranks, which = distributed.start(args.device), set_of(args.folders, args.set)
    listed = {folder: read_videos(folder) for folder in args.folders}
    for folder, rows in listed.items():
        check_complete(folder, rows)
    if args.fps is not None and not 0 < args.fps <= 1000:
        raise BadInput(f"--fps {args.fps:g}: choose more than 0 and at most 1000.")
    args.own = args.own or (Path("checkpoints/toy") if which == "toy" else None)
    published = {name: getattr(args, name.replace("-", "_")) for name in PUBLISHED}
    scorers = Scorers(ranks.device, args.own, published, args.raft, args.amt, args.viclip)
    parts = (args.own, args.raft, args.amt, args.viclip, *map(Path, published.values()))
    weights = checkpoint.fingerprint(*(part for part in parts if part is not None and part.exists()))
    by, tables = [args.fps, scorers.by, weights, CODE], {}
    for folder, rows in listed.items():
        done = {of for of, line in read_scores(folder).items() if "scores" in line}
        keys = {row["name"]: key_of(folder, row, by) for row in rows}
        todo = [row for row in rows if keys[row["name"]] not in done]
        ranks.wait()  # all have looked
        if ranks.first and (folder / "scores.jsonl").exists() and not (folder / "scores.jsonl").read_bytes().endswith(b"\n"):
            with (folder / "scores.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n")
        ranks.wait()
        with (folder / "scores.jsonl").open("a", encoding="utf-8") as file:
            for row in tqdm(todo[ranks.rank :: ranks.world], folder.name, unit="video", disable=not ranks.first, dynamic_ncols=True):
                line = {"of": keys[row["name"]], "name": row["name"], **score_one(folder, row, scorers, args.fps)}
                file.write(json.dumps(line) + "\n")
                file.flush()
        ranks.wait()
        if ranks.first:
            scored = read_scores(folder)
            lost = [row["name"] for row in rows if keys[row["name"]] not in scored]
            if lost:  # file systems of several nodes may lose lines that two of them append at once
                raise BadInput(f"{folder / 'scores.jsonl'} has no line of {checkpoint.some(lost)}: run the same command again.")
            tables[folder] = summarize(folder, rows, {row["name"]: scored[keys[row["name"]]] for row in rows}, scorers, which)
    if ranks.first:
        print(f"\n{table(tables, which)}")


def set_of(folders: list[Path], asked: str | None) -> str:
    """Whose prompts the videos in all folders were made for, as generate noted it; "toy" where nothing is known."""
    files = [folder / "settings.json" for folder in folders]
    sets = {folder: checkpoint.read_json(file).get("set", "toy") if file.exists() else asked or "toy"
            for folder, file in zip(folders, files)}
    for file, name in zip(files, sets.values()):
        if not isinstance(name, str) or name not in SETS:
            raise BadInput(f"{file} names the set {name!r}; there are {', '.join(SETS)}.")
    if len({*sets.values(), *([asked] if asked else [])}) > 1:
        raise BadInput("One table is of one set: " + ", ".join(f"{folder} is of {name}" for folder, name in sets.items()) +
                       (f", and --set is {asked}" if asked else "") + ".")
    return sets[folders[0]]


def key_of(folder: Path, row: dict, by: list) -> str:
    """What a line of scores.jsonl depends on: the video and its subject's image as they are now, what it was to show, and by what it is
    scored."""
    about, image = (folder / "videos" / f"{row['name']}.mp4").stat(), folder / row["image"]
    shown = checkpoint.fingerprint(image) if image.is_file() else None  # of the toy's, generate writes the same anew
    return hashlib.sha256(json.dumps((row, about.st_size, about.st_mtime_ns, shown, by)).encode()).hexdigest()[:16]


def score_one(folder: Path, row: dict, scorers: Scorers, fps: float | None) -> dict:
    """Scores, and why others are missing; or the reason why there are none."""
    subject, lacking = None, {}
    try:
        subject = subject_of(folder, row)
    except BadInput as error:
        lacking = {name: str(error) for name in ("dino_i", "clip_i")}
    try:
        file = folder / "videos" / f"{row['name']}.mp4"
        frames, own = media.read_video(file), media.probe(file).fps
    except BadInput as error:
        return {"unreadable": str(error)}
    if len(frames) == 1:
        return {"unreadable": "it has one frame: neither motion nor consistency can be told"}
    found, without = scorers(frames, fps or own, row["prompt"], subject)
    if "toy" in row and frames.shape == (world.FRAMES, world.SIZE, world.SIZE, 3):
        found |= exact_scores(frames, *row["toy"])
    elif "toy" in row:
        whose, shown = (f"{n}x{h}x{w}" for n, h, w in ((world.FRAMES, world.SIZE, world.SIZE), frames.shape[:3]))
        lacking |= {name: f"the world measures clips of {whose}, and it is {shown}" for name in EXACT}
    return {"scores": found, "without": without | lacking}


# --- sheet ------------------------------------------------------------------------------------------------------------


def at_height(video: np.ndarray, height: int) -> np.ndarray:
    width = round(video.shape[2] * height / video.shape[1])
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in video])


def sheet(args: argparse.Namespace) -> None:
    """Methods side by side: FIRST/sheet.png with some frames, FIRST/sheet.gif playing, a row for each prompt. All are shown as high as
    the first."""
    at_least(1, args, "count", "frames", "fps")
    methods = f" ({', '.join(folder.name for folder in args.folders)})" if len(args.folders) > 1 else ""
    rows = read_videos(args.folders[0])[: args.count]
    items, playing = [], []
    for row in rows:
        videos = []
        for folder in args.folders:
            file = folder / "videos" / f"{row['name']}.mp4"
            if not file.exists():
                raise BadInput(f"{folder} has no video {row['name']}.mp4, which {args.folders[0]} has.")
            try:
                videos.append(media.read_video(file))
            except BadInput as error:
                raise BadInput(f"{file}: {error}") from error
        subject = subject_of(args.folders[0], row)
        height = videos[0].shape[1]
        videos = [video if video.shape[1] == height else at_height(video, height) for video in videos]
        stills = [Image.fromarray(video[i]) for video in videos for i in np.linspace(0, len(video) - 1, args.frames).round().astype(int)]
        items.append(([subject, *stills], row["prompt"] + methods, True))
        side_by_side = [np.concatenate([video[min(i, len(video) - 1)] for video in videos], axis=1)
                        for i in range(max(map(len, videos)))]
        playing.append((subject, row["prompt"] + methods, np.stack(side_by_side)))
    media.save_image(figures.contact_sheet(items), args.folders[0] / "sheet.png")
    media.save_sheet(playing, args.folders[0] / "sheet", fps=args.fps, still=False)
    print(f"wrote {args.folders[0] / 'sheet.png'} and .gif: {', '.join(map(str, args.folders))}")


def ablate(args: argparse.Namespace) -> None:
    import run_ablations  # it stands on this file

    if args.name not in ABLATIONS:
        raise BadInput(f"There is no ablation {args.name}; there are {', '.join(ABLATIONS)}.")
    at_least(1, args, "seeds", "count", "sampling_steps")
    if args.sampling_steps > T:
        raise BadInput(f"--sampling-steps {args.sampling_steps}: choose 1 to {T}.")
    run_ablations.run(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="videos for a paper's prompts")
    g.add_argument("--out", type=Path, required=True, help="folder of the videos")
    g.add_argument("--set", choices=list(SETS), default="toy", help="whose subjects and prompts (default: %(default)s)")
    g.add_argument("--dreambench", type=Path, help="DreamBench's folder: dataset/<subject>/NN.jpg")
    g.add_argument("--count", type=int, help="of videos, the first ones (default: all; of the toy's 64)")
    g.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    g.add_argument("--looks", action="store_true", help="toy: texts that ask for every look, not only the plain one")
    g.add_argument("--cut-out", action="store_true", help="cut the subjects out of their photographs with Grounded SAM")
    g.add_argument("--no-image", action="store_true", help="give no image: what a plain text-to-video model makes of the prompts")
    s = commands.add_parser("score", help="the papers' scores, beside their tables")
    s.add_argument("folders", nargs="+", type=Path)
    s.add_argument("--set", choices=list(SETS), help="whose table (default: that for which the videos were made)")
    s.add_argument("--own", type=Path, help="a checkpoint whose own CLIP and DINO stand in (the toy's: checkpoints/toy)")
    for name, hub in PUBLISHED.items():
        s.add_argument(f"--{name}", default=hub, help="folder or hub id (default: %(default)s)")
    s.add_argument("--raft", type=Path, help="raft-things.pth; with --own a classical estimator can stand in")
    s.add_argument("--amt", type=Path, help="amt-s.pth, whose licence forbids commercial use")
    s.add_argument("--viclip", type=Path, help="ViClip-InternVid-10M-FLT.pth")
    s.add_argument("--fps", type=float, help="of the videos (default: what their files say)")
    s.add_argument("--device", help="default: cuda where there is one, else cpu")
    t = commands.add_parser("sheet", help="methods side by side")
    t.add_argument("folders", nargs="+", type=Path)
    t.add_argument("--count", type=int, default=8, help="prompts, the first ones (default: %(default)s)")
    t.add_argument("--frames", type=int, default=4, help="of each video (default: %(default)s)")
    t.add_argument("--fps", type=float, default=8, help="of the playing sheet (default: %(default)s)")
    a = commands.add_parser("ablate", help="a paper's ablation on the toy: see ablations.py")
    a.add_argument("name", metavar="NAME", help="switch-strategy, sugar-design, ...; an unknown one lists them all")
    a.add_argument("--rows", nargs="+", metavar="ROW", help="of its table these alone, and the findings that speak of no other")
    a.add_argument("--out", type=Path, default=Path("runs/ablations"), help="default: %(default)s")
    a.add_argument("--model", type=Path, default=Path("checkpoints/toy"), help="the toy (default: %(default)s)")
    a.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each variant (default: %(default)s)")
    a.add_argument("--count", type=int, default=VIDEOS, help="videos of each training (default: %(default)s)")
    a.add_argument("--train", default="", help="more flags for all trainings, such as '--steps 1000'; a single one as --train=--compile")
    a.add_argument("--sampling-steps", type=int, default=SAMPLING_STEPS, help="default: %(default)s")
    a.add_argument("--quick", action="store_true", help="everything once, in minutes; there is no verdict")
    a.add_argument("--measured", type=Path, metavar="FILE.jsonl", help="what has been measured elsewhere, the measured.jsonl of another "
                   "--out: only what it lacks is trained")
    a.add_argument("--device", help="default: cuda where there is one, else cpu")
    m = commands.add_parser("motion", help="Switch's temporal protocol: see motion.py")
    m.add_argument("--out", type=Path, required=True)
    m.add_argument("--data", type=Path, help="videos: a manifest or a folder, see readers.py (default: the toy's world)")
    m.add_argument("--count", type=int, help="videos to classify (default: all; of the toy's 64)")
    m.add_argument("--trained-share", type=float, default=0.0, help="what training had as --share of these videos is left out: the paper "
                   "tests on others (default: nothing)")
    m.add_argument("--trained-seed", type=int, default=0, help="the --seed of that training, or of the data.py cache "
                   "that it was given (default: %(default)s)")
    m.add_argument("--per-class", type=int, default=300, help="videos of each class (default: %(default)s)")
    for name, pixels in (("camera", 10), ("small", 25), ("medium", 50)):
        m.add_argument(f"--{name}", type=float, default=pixels, help="pixels at a height of 480 (default: %(default)s)")
    for name in ("frames", "height", "width", "fps"):
        m.add_argument(f"--{name}", type=int, help=f"of real and generated videos (default: {getattr(media.Clip, name)})")
    m.add_argument("--own", help="a checkpoint that has or names DINO and Grounded SAM (default: checkpoints/toy)")
    m.add_argument("--i3d", type=Path, help="rgb_imagenet.pt; without it the checkpoint's own DINO stands in")
    m.add_argument("--raft", type=Path, help="raft-things.pth; without it a classical estimator stands in")
    m.add_argument("--no-image", action="store_true", help="give no first frame: for a plain text-to-video model")
    m.add_argument("--seed", type=int, default=0)
    m.add_argument("--device", help="default: cuda where there is one, else cpu")
    argv = sys.argv[1:] if argv is None else argv
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = p.parse_args(own)
    if rest and args.command not in ("generate", "motion"):
        p.error(f"{args.command} makes no videos: what stands after -- is for sample.py, which generate and motion call.")
    args.sample = rest
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    command = {"generate": generate, "score": score, "sheet": sheet, "ablate": ablate, "motion": motion.motion}[args.command]
    return exit_status(lambda: command(args))


if __name__ == "__main__":
    distributed.leave(main())
