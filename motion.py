"""Switch's temporal protocol (A.5): does a model move its subjects as real videos do, be the motion small, medium or large?

    python evaluate.py motion --data pexels.csv --out runs/motion --i3d rgb_imagenet.pt -- --model MODEL --adapter ADAPTER

1. segmentation      the subject in the first frame, by Grounded SAM
2. flow              from the first frame to each other one, averaged over subject and background
3. filtering         out: videos whose camera moves, that is whose background flows by more than 10 pixels
4. classes           small, medium and large motion of the subject: up to 25 pixels, up to 50, more
5. generation        a video of the same length from the first frame and the caption; Frechet distance to the real ones by class

The paper's pixels are taken at a height of 480; other heights scale them. On the toy, its world gives the masks, and its own DINO's
features of frames stand in for I3D's of videos.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import distributed
import media
import sample
import world
from cache import digest_of
from checkpoint import BadInput, at_least, check_seed
from data import Broken
from encoders import GroundedSAM, find
from media import Clip
from pipeline import Request
from readers import Videos
from stages import Run
from tables import TEMPORAL

CLASSES = ("small", "medium", "large")


def flow_from_first(frames: np.ndarray, flow) -> torch.Tensor:
    """Length of the flow from the first frame to each other one: [F - 1, H, W], in pixels."""
    video = torch.tensor(frames).permute(0, 3, 1, 2)  # a copy: what was decoded cannot be written to
    return torch.cat([flow(video[:1], video[i : i + 1]).norm(dim=1).cpu() for i in range(1, len(video))])


def class_of(subject: float, background: float, height: int, args: argparse.Namespace) -> tuple[str | None, str]:
    """The class of a video by the mean flow of its subject, or None and why it is left out."""
    scale = height / 480
    if background > args.camera * scale:
        return None, f"the camera moves by more than {args.camera * scale:g} pixels"
    return CLASSES[int(subject > args.small * scale) + int(subject > args.medium * scale)], ""


def videos_of(args: argparse.Namespace, clip: Clip, load: Callable[[], GroundedSAM]) -> tuple[int, Callable[[int], tuple]]:
    """How many videos there are, and a function that gives the frames, caption, noun, and mask of the subject in the first frame of one.
    load: the segmenter of real ones, when there are some."""
    if args.data is None:
        def toy(i):
            drawn = world.sample_masked(np.random.default_rng((args.seed, 41, i)), "test")
            return drawn["video"], drawn["text"], world.NOUN, drawn["masks"][0]

        return args.count or 64, toy
    videos = Videos(args.data, clip, args.seed)
    if args.trained_share:
        trained = {row.video for row in Videos(args.data, clip, args.trained_seed, args.trained_share).rows}
        videos.rows = [row for row in videos.rows if row.video not in trained]
        if not videos.rows:
            raise BadInput(f"--trained-share {args.trained_share} leaves none of the videos of {args.data}.")
    segmenter = load()

    def real(i):
        example = videos[i]
        mask = segmenter(Image.fromarray(example.video[0]), example.noun or example.text)
        if mask is None:
            raise Broken("no subject was found in its first frame")
        return example.video, example.text, example.noun, np.asarray(mask) > 127

    return min(args.count or len(videos), len(videos)), real


def classify(args: argparse.Namespace, run: Run, clip: Clip, model: Path, flow, about: dict) -> list[dict]:
    """Steps 1 to 4. about: which videos they are of. Real clips and their first frames are written below the run's folder."""
    count, video = videos_of(args, clip, lambda: GroundedSAM(model, run.ranks.device))

    def work(todo: list[dict]) -> Iterator[dict]:
        for item in todo:
            try:
                frames, text, noun, mask = video(int(item["id"]))
            except Broken as error:
                yield {**item, "kept": False, "why": f"unusable: {error}"}
                continue
            if mask.all() or not mask.any():
                yield {**item, "kept": False, "why": "its subject fills the first frame, or is not in it"}
                continue
            moved = flow_from_first(frames, flow).mean(dim=0).numpy()
            subject, background = float(moved[mask].mean()), float(moved[~mask].mean())
            found, why = class_of(subject, background, frames.shape[1], args)
            real, first = run.path("classes", item["id"], ".mp4"), run.path("classes", item["id"], ".png")
            media.save_video(frames, real, clip.fps, {"text": text})
            media.save_image(Image.fromarray(frames[0]), first)
            yield {**item, "text": text, "noun": noun, "class": found, "subject": subject, "background": background,
                   "kept": found is not None, **({"why": why} if why else {}), "real": str(real.relative_to(run.out)),
                   "first": str(first.relative_to(run.out))}

    segmented_by = checkpoint.fingerprint(*(find(model, part) for part in ("grounding_dino", "sam"))) if args.data else None
    settings = {**about, "count": args.count, "flow": flow.name,
                "flow's weights": checkpoint.fingerprint(args.raft) if args.raft else None, "Grounded SAM's weights": segmented_by,
                "camera": args.camera, "small": args.small, "medium": args.medium}
    run.stage("classes", [{"id": f"{i:06d}", "label": ""} for i in range(count)], settings, work,
              lambda item: [Path(item["real"])] if "real" in item else [], {})
    kept = run.samples("classes")
    return [item for name in CLASSES for item in [row for row in kept if row["class"] == name][: args.per_class]]


def clip_of(args: argparse.Namespace) -> Clip:
    """The size, length and rate of real and generated videos."""
    given = {name: getattr(args, name) for name in ("frames", "height", "width", "fps") if getattr(args, name) is not None}
    if args.data is None and given:
        raise BadInput(f"--{next(iter(given))} {next(iter(given.values()))} is for --data, and none is given: the toy's videos have "
                       f"{world.FRAMES} frames of {world.SIZE}x{world.SIZE}.")
    clip = Clip(**given) if args.data else Clip(world.FRAMES, world.SIZE, world.SIZE, 8)
    if clip.frames < 9:
        raise BadInput(f"--frames {clip.frames}: motion takes 9 frames at least.")
    return clip


def motion(args: argparse.Namespace) -> None:
    from evaluate import given, made_by, make  # whose command this is
    from flow import Flow
    from i3d import frechet_distance, fvd_features, load_i3d
    from scorers import Similarity

    checkpoint.check_out(args.out)
    ranks, model = distributed.start(args.device), checkpoint.resolve(args.own or "checkpoints/toy")
    check_seed(args.seed)
    check_seed(args.trained_seed, "--trained-seed")
    if not 0 <= args.trained_share < 1:
        raise BadInput(f"--trained-share {args.trained_share}: choose a share of the videos from 0 up to, but not, 1.")
    if args.trained_share and args.data is None:
        raise BadInput("--trained-share is of --data, and none is given: what the toy is tested on is held out anyway.")
    if args.trained_seed and not args.trained_share:
        raise BadInput(f"--trained-seed {args.trained_seed} has no effect without --trained-share: give both.")
    if not 0 <= args.camera < math.inf or not 0 <= args.small <= args.medium < math.inf:
        raise BadInput(f"--camera {args.camera:g} --small {args.small:g} --medium {args.medium:g}: choose pixels from 0 up, --small no more "
                       f"than --medium.")
    at_least(1, args, "count", "per_class", "frames", "height", "width", "fps")
    clip = clip_of(args)
    for name in given(args.sample, "frames", "height", "width", "fps"):
        raise BadInput(f"--{name} is not for sample.py here, behind --: real and generated videos have one size and length, which "
                       f"evaluate.py motion gives it.")
    size = ["--frames", str(clip.frames), "--height", str(clip.height), "--width", str(clip.width), "--fps", str(clip.fps)]
    flags = [*size, *(["--device", args.device] if args.device else []), *args.sample]
    asked = sample.parse([*flags, "--prompts", "list.jsonl"])
    like = Request("a video", asked.negative_prompt, asked.seed, args.out, None if args.no_image else "first.png", asked.mask, asked.subject)
    sample.open_sampler(asked, str(ranks.device), [like])  # what it cannot do it says now
    # What is needed in the end is looked at in the beginning.
    network = load_i3d(args.i3d).to(ranks.device) if args.i3d is not None else None
    likeness = None if network else Similarity(model, ranks.device)
    about = {"data": args.data and str(args.data), "data's digest": args.data and digest_of(args.data, args.out), "clip": str(clip),
             "trained": [args.trained_share, args.trained_seed], "seed": args.seed}  # whose first frames and captions they are
    made_by(args.out, {"image": not args.no_image, **about}, flags)
    run, flow = Run(args.out, ranks), Flow(args.raft, ranks.device)
    chosen = classify(args, run, clip, model, flow, about)
    if not chosen:
        raise BadInput(f"No video is left in any class: {args.out / 'classes.jsonl'} says why.")
    listing = args.out / "list.jsonl"
    if ranks.first:
        lines = [{"name": item["id"], "prompt": item["text"], "seed": args.seed + int(item["id"]),
                  **({"noun": item["noun"]} if item["noun"] else {}),
                  **({} if args.no_image else {"image": str((args.out / item["first"]).resolve())})} for item in chosen]
        checkpoint.write_jsonl(listing, lines)
    make(listing, args.out, flags, ranks)
    ranks.wait()
    if not ranks.first:
        return
    if network is not None:
        by, features = "FVD, by I3D", lambda videos: fvd_features(videos, network, ranks.device)
    else:
        by = f"Frechet distance of {model}'s own DINO features of consecutive frames, two by two: no --i3d"

        def features(videos):
            """[N, 2D]: of single frames alone, the order would not count."""
            of = [likeness.dino_features([Image.fromarray(frame) for frame in video]) for video in videos]
            return torch.cat([torch.cat([each[:-1], each[1:]], dim=1) for each in of])
    rows, unreadable = {}, {}
    generated = {item["id"]: args.out / "videos" / f"{item['id']}.mp4" for item in chosen}
    for number, file in generated.items():
        try:
            media.probe(file)
        except BadInput as error:
            unreadable[number] = f"{file}: {error}"
    shown = lambda files, name: map(media.read_video, tqdm(files, name, unit="video", dynamic_ncols=True))  # one at a time
    for name in CLASSES:
        of_class = [item for item in chosen if item["class"] == name and item["id"] not in unreadable]
        if len(of_class) > 1 or (of_class and network is None):  # of a single video there is no covariance
            real, fake = [args.out / item["real"] for item in of_class], [generated[item["id"]] for item in of_class]
            distance = frechet_distance(features(shown(real, f"{name}, real")), features(shown(fake, f"{name}, generated")))
            rows[name] = {"videos": len(of_class), "distance": distance}
    checkpoint.write_json(args.out / "motion.json", {"by": by, "flow": flow.name, "classes": rows, "unreadable": unreadable})
    lines = [f"{by}; classes by {flow.name}", "", "| | small | medium | large |", "|---|---|---|---|"]
    lines += [f"| {title} (the paper, FVD) | " + " | ".join(f"{value:.2f}" for value in row) + " |" for title, row in TEMPORAL.items()]
    cells = [f"{rows[name]['distance']:.4g} ({rows[name]['videos']} videos)" if name in rows else "too few videos" for name in CLASSES]
    lines.append(f"| {args.out.name} | " + " | ".join(cells) + " |")
    if unreadable:
        lines += ["", *(f"- unreadable: {why}; remove it, and the same command makes it anew" for why in unreadable.values())]
    checkpoint.write_text(args.out / "table.md", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
