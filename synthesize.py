"""SUGAR section 3.1: builds (video, text, subject image) triplets in which the subject looks as the text says, not as in the
image.

    python synthesize.py                                          from 64 subjects of the toy's world
    torchrun --nproc-per-node 8 synthesize.py --source subjects.csv --model .. --adapter .. --i2v .. --out triplets

    source         a picture of a subject and its label
    prompt         a text that asks for a style, texture or colour, a background and a motion
    customize      Switch with one frame draws the subject as the text says
    filter-images  out: what CLIP finds unlike the text, or DINO unlike the subject
    fit            padded to the video's proportions, inpainted, resized
    animate        an image-to-video model makes it move
    filter-videos  out: subjects that change, and videos in which nothing moves
    triplets       triplets.jsonl, which train_sugar.py --data reads

Each stage can be stopped at any moment and shared among ranks, and leaves a manifest, a sheet and histograms: see stages.py.
"""

import argparse
import csv
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
import distributed
import media
import world
from checkpoint import BadInput, at_least, check_seed, exit_status
from encoders import GroundedSAM, find
from flow import Flow, flow_magnitude
from pipeline import Request, Sampler
from readers import CLASSES
from scorers import Similarity
from stages import Run

TEMPLATES = {  # {} is the label. What a subject does depends on what it is; ours, as the paper does not print its own
    "style": ["a watercolour painting of a {}", "a pencil sketch of a {}", "an oil painting of a {}", "a {} in pixel art style",
              "a {} in the style of a comic book", "a cartoon of a {}", "a {} as a paper cut-out"],
    "texture": ["a {} made of glass", "a {} made of wood", "a knitted {}", "a {} made of marble", "a {} made of clay",
                "a {} carved from ice", "a chrome {}"],
    "colour": ["a red {}", "a golden {}", "a purple {}", "a neon green {}", "a black and white {}", "a rainbow coloured {}"],
    "background": ["in the snow", "on a beach", "in a forest", "in a city at night", "on the moon", "in a flower field",
                   "under water", "on a wooden table", "in a library"],
    "motion": {
        "animal": ["is running", "is jumping", "is walking towards the camera", "is swimming", "is turning its head",
                   "is dancing"],
        "active object": ["is walking", "is jumping up and down", "is waving", "is dancing", "is flying", "is spinning"],
        "static object": ["is slowly rotating", "is floating in the air", "is rolling", "falls and bounces",
                          "is being circled by the camera"],
    },
}
INSTRUCTION = ("Rewrite this description of a {medium} as one vivid sentence. Keep the {label} and everything that is said "
               "about it. Answer with the sentence alone.\n\n{text}")
SAMPLED_BY = ("transformer", "vae", "text_encoder")  # the networks of a model that make a picture or video
CHUNK = 64  # samples that a network is loaded for at a time, at least


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=Path("runs/triplets"), help="folder of manifests and media (default: %(default)s)")
    p.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="which to run (default: all)")
    p.add_argument("--source", type=Path, help="CSV or JSONL with the columns image, label, and if need be kind "
                   f"({', '.join(CLASSES)}); default: the toy's world")
    p.add_argument("--count", type=int, default=64, help="source images (default: %(default)s)")
    p.add_argument("--prompts", type=int, default=1, help="texts for each image (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--templates", type=Path, help="JSON in the form of TEMPLATES in synthesize.py")
    p.add_argument("--llm", help="a language model, folder or hub id, that enriches the texts")
    p.add_argument("--segment", action="store_true", help="cut the subjects out of their pictures with Grounded SAM")
    p.add_argument("--model", default="checkpoints/toy", help="base of Switch, and whose CLIP and DINO filter (default: %(default)s)")
    p.add_argument("--adapter", default="checkpoints/toy/switch", help="Switch (default: %(default)s)")
    p.add_argument("--i2v", default="checkpoints/toy/i2v", help="image-to-video model (default: %(default)s)")
    p.add_argument("--image-side", type=int, help="of customized images, a multiple of 16 (default: the height of the videos)")
    p.add_argument("--steps", type=int, default=50, help="of sampling (default: %(default)s)")
    p.add_argument("--clip-text", type=float, default=0.2, help="least cosine of picture and text (default: %(default)s)")
    p.add_argument("--dino-identity", type=float, default=0.4, help="least cosine to the subject's picture (default: %(default)s)")
    p.add_argument("--dino-consecutive", type=float, default=0.8,
                   help="least mean cosine of neighbouring frames (default: %(default)s)")
    p.add_argument("--dino-random", type=float, default=0.7,
                   help="least mean cosine of random pairs of frames (default: %(default)s)")
    p.add_argument("--flow", type=float, default=0.01,
                   help="least motion: flow of the fastest 5%% of pixels as a share of the shorter side (default: %(default)s)")
    p.add_argument("--raft", type=Path, help="RAFT's published weights; without them a classical estimator stands in")
    p.add_argument("--inpaint", metavar="MODULE:FUNCTION", help="function(image, mask) -> image that fills the padding")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    return p.parse_args(argv)


# --- the stages, in order ---------------------------------------------------------------------------------------------


def source(run: Run, args: argparse.Namespace) -> None:
    """Pictures and labels: the toy's subjects, or a table's. Each becomes the subject on white: SUGAR's z."""
    if args.source is None:
        rows = [{"image": None, "label": world.NOUN, "kind": "active object"} for _ in range(args.count)]
    else:
        rows = source_rows(args.source)[: args.count]
    samples = [{"id": f"{i:06d}", **row} for i, row in enumerate(rows)]

    def work(todo: list[dict]) -> Iterator[dict]:
        segment = GroundedSAM(checkpoint.resolve(args.model), run.ranks.device) if args.segment else None
        for sample in todo:
            try:
                if sample.get("why"):  # the table's row is of no use
                    yield {**sample, "kept": False}
                    continue
                if sample["image"] is None:
                    image = media.on_white(Image.fromarray(world.portrait(world.sample_subject((args.seed, 31, int(sample["id"]))))))
                else:
                    image = media.open_image(sample["image"])
                mask = segment(image, sample["label"]) if segment else media.alpha_mask(image)
                if segment and mask is None:
                    yield {**sample, "image": str(sample["image"]), "kept": False, "why": f"not found: no {sample['label']}"}
                    continue
                alone = mask is not None or media.stands_on_white(image)
                image = media.cut_out(image, mask) if mask is not None else image.convert("RGB")
                yield {**sample, "image": save_picture(run, "source", sample["id"], image), "alone": alone}
            except BadInput as error:
                yield {**sample, "image": str(sample["image"]), "kept": False, "why": f"unreadable: {error}"}

    made_by = weights_of(args.model, "grounding_dino", "sam") if args.segment else None
    run.stage("source", samples, {"source": args.source and str(args.source), "count": args.count, "seed": args.seed,
                                  "segment": args.segment, "weights": made_by}, work, lambda sample: [Path(sample["image"])], {})
    kept = run.samples("source")
    if run.ranks.first and (scenes := [sample for sample in kept if not sample.get("alone", True)]):
        print(f"warning: {len(scenes)} of {len(kept)} pictures have neither transparency nor a white border, as {scenes[0]['id']}: their "
              f"backgrounds will count as part of the subject; --segment cuts it out", file=sys.stderr)


def source_rows(table: Path) -> list[dict]:
    """image, label and kind of each row of a CSV or JSONL file; paths are relative to it. A row that lacks one says "why" it is of no
    use; there must be others."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file)) if table.suffix == ".csv" else [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"--source {table} cannot be read: {error}.") from error
    if not rows:
        raise BadInput(f"--source {table} is empty.")
    kinds, samples = {noun: kind for kind, nouns in CLASSES.items() for noun in nouns}, []
    for number, row in enumerate(rows, 1):
        image, label, kind = (row.get(name) if isinstance(row, dict) else None for name in ("image", "label", "kind"))
        whole = all(isinstance(value, str) and value for value in (image, label))
        if not whole:
            samples.append({"image": "", "label": "", "kind": "", "why": f"unusable row: {number} lacks an image or a label"})
            continue
        samples.append({"image": str((table.parent / image).resolve()), "label": label, "kind": kind or kinds.get(label, "active object")})
        if samples[-1]["kind"] not in [*CLASSES]:  # a list, as a JSON value may be no key
            samples[-1]["why"] = f"unusable row: {number} is of kind {kind!r}, known are {', '.join(CLASSES)}"
    if all("why" in sample for sample in samples):
        raise BadInput(f"--source {table} has no row that can be used ({samples[0]['why']}): it needs the columns image and label.")
    return samples


def prompt(run: Run, args: argparse.Namespace) -> None:
    """A text from the templates for each picture, --prompts of them; a language model may enrich it, and first what it says of the looks,
    as that alone is what the picture is made from and judged by."""
    templates = templates_of(args)
    samples = [{**sample, "id": f"{sample['id']}-{i}"} for sample in run.samples("source") for i in range(args.prompts)]

    def work(todo: list[dict]) -> Iterator[dict]:
        rewrite = rewriter(args.llm, run.ranks.device) if args.llm else None
        for sample in todo:
            number, variant = map(int, sample["id"].split("-"))
            sample = {**sample, **compose(templates, sample["label"], sample["kind"], (args.seed, 32, number, variant))}
            if rewrite:
                looks = rewrite(sample["image_text"], "picture", sample["label"])
                if looks != sample["image_text"]:
                    sample |= {"image_text": looks, "text": f"{looks.rstrip('.')}. The {sample['label']} {sample['motion']}."}
                sample["text"] = rewrite(sample["text"], "video", sample["label"])
            yield sample

    digest = hashlib.sha256(json.dumps(templates).encode()).hexdigest()[:16]
    made_by = {"llm": args.llm, "weights": checkpoint.fingerprint(checkpoint.resolve(args.llm)) if args.llm else None}
    run.stage("prompt", samples, {"templates": digest, **made_by, "prompts": args.prompts, "seed": args.seed}, work,
              lambda sample: [Path(sample["image"])], {})


def templates_of(args: argparse.Namespace) -> dict:
    """Those of --templates, else the toy's for the toy's world, else our own."""
    if args.templates is None:
        return TEMPLATES if args.source else world.templates()
    templates = checkpoint.read_json(args.templates)
    motion = templates.get("motion")
    looks = [templates.get(name) for name in ("style", "texture", "colour")]
    others = [templates.get("background"), *([motion.get(kind) for kind in CLASSES] if isinstance(motion, dict) else [motion])]
    whole = all(isinstance(of, list) and all(isinstance(text, str) for text in of) for of in looks + others)
    if not whole or not any(looks) or not all(others):
        raise BadInput(f"--templates {args.templates} must have lists of texts for style, texture, colour, background, and motion, "
                       f"the last for each of {', '.join(CLASSES)} or for all; none is empty, but for two of the first three.")
    for text in sum(looks, []):
        if not text.count("{}") == text.count("{") == text.count("}") == 1:
            raise BadInput(f"--templates {args.templates}: {text!r} must have {{}} once, where the label goes, and no other braces.")
    return templates


def compose(templates: dict, label: str, kind: str, seed) -> dict:
    """A text and what it was made of: "image_text" says how the subject looks and where, "text" also what it does."""
    rng = np.random.default_rng(seed)
    family = str(rng.choice([name for name in ("style", "texture", "colour") if templates[name]]))
    motions = templates["motion"][kind] if isinstance(templates["motion"], dict) else templates["motion"]
    what, where, does = (str(rng.choice(options)) for options in (templates[family], templates["background"], motions))
    what = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", what.format(label))
    return {"family": family, "motion": does, "image_text": f"{what} {where}", "text": f"{what} {does} {where}"}


def rewriter(name: str, device: torch.device) -> Callable[[str, str, str], str]:
    """A language model of transformers that enriches the text of a "picture" or "video"; where it loses the subject, the text stays."""
    tokenizer, model = language_model(name, "AutoTokenizer"), language_model(name, "AutoModelForCausalLM").eval().to(device)

    @torch.no_grad()
    def rewrite(text: str, medium: str, label: str) -> str:
        asked = INSTRUCTION.format(text=text, medium=medium, label=label)
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": asked}]
            asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(asked, return_tensors="pt").input_ids.to(device)
        new = model.generate(ids, max_new_tokens=80, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        line = next((line.strip().strip('"') for line in answer.splitlines() if line.strip()), "")
        return line if label.lower() in line.lower() else text

    return rewrite


def language_model(name: str, part: str):
    """The language model, or its AutoTokenizer or AutoConfig."""
    import transformers

    folder = checkpoint.resolve(name)
    try:
        return getattr(transformers, part).from_pretrained(folder)
    except Exception as error:  # a config, a file or a class that does not fit: each has its own way to be displeased
        raise BadInput(f"--llm {name} is no language model of transformers ({part}): {' '.join(str(error).split())}") from error


def customize(run: Run, args: argparse.Namespace) -> None:
    """The subject as the text says: Switch with one frame, for the paper's Toffee."""
    sampler = Sampler(args.model, args.adapter, str(run.ranks.device))
    settings = sampler.defaults()
    side = args.image_side or settings.height
    settings = replace(settings, frames=1, height=side, width=side, steps=args.steps)

    def work(todo: list[dict]) -> Iterator[dict]:
        for low in range(0, len(todo), CHUNK):
            part = todo[low : low + CHUNK]
            references = [media.fit(media.open_image(run.out / sample["image"]), side, side, "pad") for sample in part]
            requests = [Request(sample["image_text"], "", seed_of(args.seed, sample["id"]), run.out, subject=sample["label"],
                                reference=reference) for sample, reference in zip(part, references)]
            for sample, (_, video) in zip(part, sampler.videos(requests, settings, quiet=True)):
                picture = Image.fromarray(media.video_to_frames(video)[0])
                yield {**sample, "customized": save_picture(run, "customize", sample["id"], picture)}

    made_by = {"model": args.model, "adapter": args.adapter, "settings": str(settings), "seed": args.seed,
               "weights": weights_of(args.model, *SAMPLED_BY), "adapter's weights": checkpoint.fingerprint(sampler.adapter_file)}
    run.stage("customize", run.samples("prompt"), made_by, work, lambda sample: [Path(sample["image"]), Path(sample["customized"])], {})


def filter_images(run: Run, args: argparse.Namespace) -> None:
    """CLIP: does the picture show what the text says? DINO: is it the same subject?"""

    def work(todo: list[dict]) -> Iterator[dict]:
        networks = Similarity(checkpoint.resolve(args.model), run.ranks.device)
        for sample in todo:
            subject, picture = (media.open_image(run.out / sample[name]) for name in ("image", "customized"))
            yield {**sample, "clip-text": networks.text([picture], sample["image_text"])[0],
                   "dino-identity": networks.identity([subject], [picture])[0]}

    made_by = {"model": args.model, "weights": weights_of(args.model, "clip", "dino")}
    run.stage("filter-images", run.samples("customize"), made_by, work,
              lambda sample: [Path(sample["image"]), Path(sample["customized"])],
              {"clip-text": args.clip_text, "dino-identity": args.dino_identity})


def fit(run: Run, args: argparse.Namespace) -> None:
    """The picture at the video's size: what its proportions lack is padded with its own border, and inpainted where a
    function for that is given."""
    made = Sampler(args.i2v, None, str(run.ranks.device)).defaults()
    inpaint = hook(args.inpaint) if args.inpaint else None

    def work(todo: list[dict]) -> Iterator[dict]:
        for sample in todo:
            picture, padding = pad_to(media.open_image(run.out / sample["customized"]), made.height, made.width)
            if inpaint and padding.getbbox():
                picture = inpaint(picture, padding)
            picture = media.fit(picture, made.height, made.width, "crop")
            yield {**sample, "fitted": save_picture(run, "fit", sample["id"], picture)}

    run.stage("fit", run.samples("filter-images"), {"size": f"{made.width}x{made.height}", "inpaint": args.inpaint}, work,
              lambda sample: [Path(sample["customized"]), Path(sample["fitted"])], {})


def hook(name: str) -> Callable[[Image.Image, Image.Image], Image.Image]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"--inpaint {name} cannot be imported ({error}): give MODULE:FUNCTION.") from error


def pad_to(picture: Image.Image, height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """The picture in the middle of a frame of the proportions height : width, its border pixels repeated outwards, and a mask
    that is white where that happened."""
    w = max(picture.width, round(picture.height * width / height))
    h = max(picture.height, round(picture.width * height / width))
    left, top = (w - picture.width) // 2, (h - picture.height) // 2
    edges = ((top, h - picture.height - top), (left, w - picture.width - left))
    mask = np.pad(np.zeros((picture.height, picture.width), dtype=np.uint8), edges, constant_values=255)
    return Image.fromarray(np.pad(np.asarray(picture.convert("RGB")), (*edges, (0, 0)), mode="edge")), Image.fromarray(mask)


def animate(run: Run, args: argparse.Namespace) -> None:
    """The picture becomes the first frame of a video."""
    sampler = Sampler(args.i2v, None, str(run.ranks.device))
    settings = replace(sampler.defaults(), steps=args.steps)

    def work(todo: list[dict]) -> Iterator[dict]:
        for low in range(0, len(todo), CHUNK):
            part = todo[low : low + CHUNK]
            requests = [Request(sample["text"], "", seed_of(args.seed, sample["id"]), run.path("animate", sample["id"], ".mp4"),
                                reference=media.open_image(run.out / sample["fitted"])) for sample in part]
            for sample, (request, video) in zip(part, sampler.videos(requests, settings, quiet=True)):
                media.save_video(media.video_to_frames(video), request.out, settings.fps, {"text": sample["text"]})
                yield {**sample, "video": str(request.out.relative_to(run.out))}

    made_by = {"i2v": args.i2v, "weights": weights_of(args.i2v, *SAMPLED_BY), "settings": str(settings), "seed": args.seed}
    run.stage("animate", run.samples("fit"), made_by, work,
              lambda sample: [Path(sample["image"]), Path(sample["video"])], {})


def filter_videos(run: Run, args: argparse.Namespace) -> None:
    """DINO: does the subject stay the same, from frame to frame and from any frame to any other? Flow: does anything move?"""
    flow = Flow(args.raft, run.ranks.device)

    def work(todo: list[dict]) -> Iterator[dict]:
        networks = Similarity(checkpoint.resolve(args.model), run.ranks.device)
        for sample in todo:
            frames = media.read_video(run.out / sample["video"])
            features = networks.dino_features([Image.fromarray(frame) for frame in frames])
            rng = np.random.default_rng(seed_of(args.seed, sample["id"]))
            one, two = rng.permuted(np.tile(np.arange(len(frames)), (len(frames), 1)), axis=1)[:, :2].T  # distinct pairs
            cosine = lambda a, b: float((features[a] * features[b]).sum(dim=-1).mean())
            moved = float(flow_magnitude(frames, flow).mean()) / min(frames.shape[1:3])
            yield {**sample, "dino-consecutive": cosine(range(len(frames) - 1), range(1, len(frames))),
                   "dino-random": cosine(one, two), "flow": moved}

    if run.ranks.first:
        print(f"filter-videos: optical flow by {flow.name}")
    made_by = {"model": args.model, "weights": weights_of(args.model, "dino"), "seed": args.seed, "flow-by": flow.name,
               "flow's weights": checkpoint.fingerprint(args.raft) if args.raft else None}
    run.stage("filter-videos", run.samples("animate"), made_by, work,
              lambda sample: [Path(sample["image"]), Path(sample["video"])],
              {"dino-consecutive": args.dino_consecutive, "dino-random": args.dino_random, "flow": args.flow})


def triplets(run: Run, args: argparse.Namespace) -> None:
    """(x, c, s): the video, the text, and the subject's own picture."""
    rows = [{"video": sample["video"], "text": sample["text"], "image": sample["image"], "noun": sample["label"]}
            for sample in run.samples("filter-videos")]
    if not rows:
        raise BadInput(f"No triplet is left in {run.out}: look at its sheets and histograms, and lower a threshold.")
    if run.ranks.first:
        checkpoint.write_jsonl(run.out / "triplets.jsonl", rows)
        print(f"wrote {run.out / 'triplets.jsonl'}: {len(rows)} triplets; python train_sugar.py --data {run.out} trains on them")


def weights_of(model: str, *parts: str) -> str:
    """Tells these networks of a model from others."""
    return checkpoint.fingerprint(*(find(checkpoint.resolve(model), part) for part in parts))


def seed_of(seed: int, name: str) -> int:
    """A seed for sampling that follows from the run's and the sample's name."""
    return int(np.random.SeedSequence([seed, *map(int, name.split("-"))]).generate_state(1)[0])


def save_picture(run: Run, stage: str, name: str, picture: Image.Image) -> str:
    """Its path, relative to the run."""
    file = run.path(stage, name, ".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    media.save_image(picture, file)
    return str(file.relative_to(run.out))


STAGES = {"source": source, "prompt": prompt, "customize": customize, "filter-images": filter_images, "fit": fit,
          "animate": animate, "filter-videos": filter_videos, "triplets": triplets}


def check(args: argparse.Namespace, device: str) -> None:
    """All that the later stages need, looked at before the first one works."""
    if "prompt" in args.stages:
        templates_of(args)
        for part in ("AutoConfig", "AutoTokenizer") if args.llm else ():
            language_model(args.llm, part)
    if "source" in args.stages and args.source is not None:
        source_rows(args.source)
    if "customize" in args.stages:
        Sampler(args.model, args.adapter, device)
        if args.image_side is not None and (args.image_side % 16 or args.image_side < 16):
            raise BadInput(f"--image-side {args.image_side} is not a multiple of 16.")
    if "animate" in args.stages and Sampler(args.i2v, None, device).kind != "i2v":
        raise BadInput(f"--i2v {args.i2v} is no image-to-video model.")
    if "fit" in args.stages and args.inpaint:
        hook(args.inpaint)
    if {"filter-images", "filter-videos"} & set(args.stages):
        Similarity(checkpoint.resolve(args.model))
    if "filter-videos" in args.stages:
        Flow(args.raft)
        made = Sampler(args.i2v, None, device).defaults() if args.raft and "animate" in args.stages else None
        if made and min(made.height, made.width) < 121:
            raise BadInput(f"--raft {args.raft}: RAFT needs videos of at least 121 pixels a side, and those of --i2v {args.i2v} have "
                           f"{made.width}x{made.height}; without --raft a classical estimator stands in.")


def run(args: argparse.Namespace) -> None:
    ranks = distributed.start(args.device)
    at_least(1, args, "count", "prompts", "steps")
    check_seed(args.seed)
    check(args, str(ranks.device))
    for name in STAGES:
        if name in args.stages:
            STAGES[name](Run(args.out, ranks), args)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: run(args), interrupted="interrupted; the same command goes on from here")


if __name__ == "__main__":
    distributed.leave(main())
