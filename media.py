"""Images and videos as files: reading whatever photograph a person brings, cutting out, fitting, writing videos."""

import json
import re
import subprocess
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from checkpoint import BadInput, replace_when_whole

VIDEO_SUFFIXES = (".mp4", ".gif")


def open_image(path: str | Path) -> Image.Image:
    """The image at `path`, upright, as 8-bit RGB, or RGBA where it has transparency."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:  # what matters is raised as well
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError as error:
        raise BadInput(f"There is no image {path}.") from error
    except UnidentifiedImageError as error:
        empty = Path(path).stat().st_size == 0
        raise BadInput(f"{path} is empty." if empty else f"{path} is not an image that can be read.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words for damage
        raise BadInput(f"The image {path} cannot be read: {error}.") from error
    if 0 in image.size:
        raise BadInput(f"The image {path} has no pixels: its size is {image.width}x{image.height}.")
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits or more to a pixel: convert() would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        values = values / 257 if image.mode.startswith("I;16") or values.max() > 255 else values
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def alpha_mask(image: Image.Image) -> Image.Image | None:
    """The alpha channel [H, W], where it says something: some of the image is transparent."""
    if image.mode != "RGBA":
        return None
    alpha = image.getchannel("A")
    return alpha if alpha.getextrema()[0] < 255 else None


def open_mask(path: str | Path, image: Image.Image) -> Image.Image:
    """A mask for `image` from a file: white, or opaque, is the subject."""
    picture = open_image(path)
    alpha = alpha_mask(picture)
    mask = alpha if alpha is not None else picture.convert("L")
    if mask.size != image.size:
        raise BadInput(f"The mask {path} is {mask.width}x{mask.height}, the image {image.width}x{image.height}; they must "
                       f"have one size.")
    return mask


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with what is transparent in white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def stands_on_white(image: Image.Image) -> bool:
    """Whether all of the image's border is white: then its subject is as good as cut out."""
    pixels = np.asarray(image.convert("RGB"))
    return bool(min(edge.min() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) >= 245)


def cut_out(image: Image.Image, mask: Image.Image, name: str = "the image") -> Image.Image:
    """The subject on white, cropped to its bounding box: SUGAR's identity image z. mask: 8 bits, 255 is the subject."""
    box = mask.point(lambda value: 255 * (value > 127)).getbbox()
    if box is None:
        raise BadInput(f"The mask of the subject is empty: nothing would be left of {name}.")
    white = Image.new("RGB", image.size, "white")
    return Image.composite(image.convert("RGB"), white, mask).crop(box)


def fit(image: Image.Image, height: int, width: int, how: str) -> Image.Image:
    """The image at exactly height x width, its proportions kept: "crop" fills the frame and cuts the overhang, "pad"
    shows everything, on white."""
    image = on_white(image)
    if how == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white")


def fit_subject(picture: Image.Image, cut: bool, size: tuple[int, int], square: bool, how: str | None = None) -> tuple[Image.Image, str]:
    """A subject's image as a model takes it, and how it was fitted: what is cut out is shown whole, a photograph fills the frame.

    size: the video's height and width. square: for SUGAR, whose encoders resize a square to their own size.
    """
    how = how or ("pad" if cut or square else "crop")
    return fit(picture, *((max(picture.size),) * 2 if square else size), how), how


def image_to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(on_white(image))).permute(2, 0, 1).float() / 127.5 - 1


def video_to_frames(video: Tensor) -> np.ndarray:
    """uint8 frames [F, H, W, 3] from a video [3, F, H, W] in [-1, 1]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def check_clip(frames: int, height: int, width: int) -> None:
    """Raises where the models cannot make a clip of this size."""
    if frames != 1 and (frames < 1 or frames % 8 != 1):
        below = max(frames - 1, 0) // 8 * 8 + 1
        raise BadInput(f"--frames {frames}: a video has 1 or 8k+1 frames; the nearest are {below} and {below + 8}.")
    for name, size in (("height", height), ("width", width)):
        if size < 16 or size % 16:
            near = max(size // 16 * 16, 16)
            raise BadInput(f"--{name} {size} is not a multiple of 16; the nearest are {near} and {near + 16}.")


def check_writable(path: Path) -> None:
    """Raises where a file could not be written at `path`. Leaves nothing behind."""
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a folder, a file was expected.")
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):  # asking for permission is not enough: root has it everywhere
            return
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}.") from error


def save_image(image: Image.Image, path: Path) -> None:
    with replace_when_whole(path) as part:
        image.save(part)


def save_video(frames: np.ndarray, path: Path, fps: float, metadata: dict) -> None:
    """Writes uint8 frames [F, H, W, 3] as .mp4 or .gif. `metadata` travels in the file, as JSON in its comment. (A GIF
    stores a frame that equals the one before it as a longer delay.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = json.dumps(metadata, ensure_ascii=False)
    with replace_when_whole(path) as part:
        if path.suffix == ".gif":
            first, *rest = (Image.fromarray(frame) for frame in frames)
            ticks = [round(100 * i / fps) for i in range(len(frames) + 1)]  # a GIF counts hundredths of a second
            durations = [10 * max(b - a, 1) for a, b in zip(ticks, ticks[1:])]
            first.save(part, save_all=True, append_images=rest, duration=durations, loop=0, comment=comment.encode())
        else:
            import imageio.v2 as imageio

            options = ["-crf", "16", "-metadata", f"comment={comment}"]
            # closing(), as the writer's own context leaves ffmpeg running, and its file coming back, after an error.
            with closing(imageio.get_writer(part, format="FFMPEG", fps=fps, codec="libx264", quality=None,
                                            macro_block_size=1, output_params=options)) as writer:
                for frame in frames:
                    writer.append_data(frame)


# --- reading videos ---------------------------------------------------------------------------------------------------


class TooLittle(BadInput):
    """A picture or video is whole, but less than the clip, and such ones are to be skipped."""


@dataclass(frozen=True)
class Clip:
    """What a clip is made to be, and what happens to a file that is too little for it."""

    frames: int = 49
    height: int = 480
    width: int = 720
    fps: float = 8
    short: str = "skip"  # a video shorter than the clip: "skip" it, or "loop" it
    small: str = "skip"  # a picture or video smaller than the clip: "skip" it, or "enlarge" it

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


class Probe(NamedTuple):
    seconds: float | None  # None: the file does not say
    width: int  # as shown: a phone's rotation is applied, and pixels are square
    height: int
    fps: float


def ffmpeg(*arguments: str, seconds: float = 600) -> subprocess.CompletedProcess:
    """Runs ffmpeg, for so many seconds at most."""
    import imageio_ffmpeg

    try:
        return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments], capture_output=True,
                              timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"ffmpeg did not come to an end within {seconds:g} s") from error


def probe(file: Path) -> Probe:
    """Length and size of a video, read off its container: nothing is decoded."""
    said = ffmpeg("-i", str(file)).stderr.decode("utf-8", "replace")
    # Each is sought where ffmpeg says it: a comment, such as our prompt, may speak of rates and rotations too.
    stream = re.search(r"^ *Stream #.*?: Video: .*?\b(\d{2,5})x(\d{2,5})\b(.*)", said, re.MULTILINE)
    length = re.search(r"^ *Duration: (\d+):(\d+):([\d.]+)", said, re.MULTILINE)
    if stream is None:
        audio = "Audio:" in said
        reason = said.strip().splitlines()[-1].removeprefix(f"{file}: ") if said.strip() else "ffmpeg says nothing"
        raise BadInput("it has sound and no pictures" if audio else f"it cannot be read ({reason})")
    width, height = int(stream[1]), int(stream[2])
    for across, down in re.findall(r"SAR ([1-9]\d*):([1-9]\d*)", stream[3])[-1:]:  # of a pixel; the container's comes last
        width = max(int(width * int(across) / int(down)), 1)
    turned = re.search(r"^ *[Dd]isplay ?[Mm]atrix: rotation of (-?[\d.]+) degrees", said, re.MULTILINE)
    if turned and round(abs(float(turned[1]))) % 180 == 90:
        width, height = height, width
    seconds = 3600 * int(length[1]) + 60 * int(length[2]) + float(length[3]) if length else None
    rate = re.search(r"([\d.]+) fps", stream[3])
    return Probe(seconds, width, height, float(rate[1]) if rate else 8.0)


def decode(file: Path, clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """A window of the video as uint8 [frames, height, width, 3]: at clip.fps whatever the file's own rate (which may vary),
    scaled to cover the frame, the overhang cut off evenly. ffmpeg seeks to the window, so the rest is not decoded."""
    seconds, width, height, _ = probe(file)
    if clip.small == "skip" and (width < clip.width or height < clip.height):
        raise TooLittle(f"it is {width}x{height}, smaller than {clip.width}x{clip.height}")
    asked = f"{clip.frames} frames at {clip.fps:g} fps take {clip.seconds:.2f} s"
    spare = 0.0 if seconds is None else seconds - clip.seconds
    if spare < -0.5 / clip.fps and clip.short == "skip":
        raise TooLittle(f"it lasts {seconds:.2f} s, and {asked}")
    start = rng.uniform(0, spare - 0.01) if spare > 0.01 else 0.0  # ffmpeg rounds to hundredths: let no frame be lost to that
    filters = (f"fps={clip.fps:g},scale='max({clip.width},round({clip.height}*dar))':'max({clip.height},round({clip.width}/dar))'"
               f":flags=bicubic,crop={clip.width}:{clip.height}")  # dar: proportions as shown, also where pixels are not square
    size = clip.height * clip.width * 3
    for begin in dict.fromkeys((start, 0.0)):  # its pictures may end before its sound does: then from the beginning
        done = ffmpeg("-loglevel", "repeat+error", "-ss", f"{begin:.3f}", "-i", str(file), "-an", "-sn", "-vf", filters,
                      "-frames:v", str(clip.frames), "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        frames = np.frombuffer(done.stdout[: len(done.stdout) // size * size], dtype=np.uint8)
        frames = frames.reshape(-1, clip.height, clip.width, 3)
        missing = clip.frames - len(frames)
        if missing <= 1 and len(frames):  # the last frame may lie half a tick beyond the end
            return np.concatenate([frames, frames[-1:].repeat(missing, axis=0)]) if missing else frames
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    whole = not said or (spare < 0 and len(frames) + 1 >= seconds * clip.fps)  # all its pictures are there: it is short, not damaged
    if not len(frames) or not whole:
        raise BadInput(f"{len(frames)} of {clip.frames} frames could be decoded ({said[-1] if said else 'it is cut short'})")
    if clip.short == "skip":
        raise TooLittle(f"its pictures last {len(frames) / clip.fps:.2f} s, and {asked}")
    return frames[np.arange(clip.frames) % len(frames)]


def read_video(file: Path) -> np.ndarray:
    """All frames of a video, uint8 [F, H, W, 3], at its own rate and size, as shown."""
    _, width, height, _ = probe(file)
    done = ffmpeg("-loglevel", "error", "-i", str(file), "-vf", f"scale={width}:{height}", "-fps_mode", "passthrough", "-f", "rawvideo",
                  "-pix_fmt", "rgb24", "-")
    if done.stderr or not done.stdout or len(done.stdout) % (height * width * 3):  # what is damaged is concealed, and complained of
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise BadInput(f"{file} cannot be read: {said[0].rstrip('.') if said else 'it is cut short'}.")
    return np.frombuffer(bytearray(done.stdout), dtype=np.uint8).reshape(-1, height, width, 3)  # not bytes: one may write to it


# --- sheets -----------------------------------------------------------------------------------------------------------


def save_sheet(rows: list[tuple[Image.Image, str, np.ndarray]], stem: Path, fps: float = 8, side: int = 128,
               still: bool = True) -> None:
    """A sheet for a person to look at: in each row a subject, a prompt, and a video, uint8 [F, H, W, 3], shown `side` pixels
    high. stem.gif plays them, and stem.png, where `still`, shows the frames side by side."""
    height, width = side, round(side * rows[0][2].shape[2] / rows[0][2].shape[1])
    frames, text, gap = max(len(video) for _, _, video in rows), 230, 4
    font = ImageFont.load_default(size=15)

    def row_start(draw: ImageDraw.ImageDraw, page: Image.Image, top: int, image: Image.Image, prompt: str) -> None:
        page.paste(fit(image, height, width, "pad"), (0, top))
        draw.multiline_text((width + 2 * gap, top + gap), textwrap.fill(prompt, 28), fill="black", font=font)

    def page(columns: int, show: Callable[[np.ndarray], list[np.ndarray]]) -> Image.Image:
        sheet = Image.new("RGB", (width + text + columns * (width + gap), len(rows) * (height + gap)), "white")
        draw = ImageDraw.Draw(sheet)
        for number, (image, prompt, video) in enumerate(rows):
            top = number * (height + gap)
            row_start(draw, sheet, top, image, prompt)
            for column, frame in enumerate(show(video)):
                smooth = Image.Resampling.NEAREST if len(frame) < height else Image.Resampling.LANCZOS
                sheet.paste(Image.fromarray(frame).resize((width, height), smooth),
                            (width + text + column * (width + gap), top))
        return sheet

    if still:
        save_image(page(frames, list), stem.with_suffix(".png"))
    playing = [np.asarray(page(1, lambda video: [video[min(i, len(video) - 1)]])) for i in range(frames)]
    save_video(np.stack(playing), stem.with_suffix(".gif"), fps, {"prompts": [prompt for _, prompt, _ in rows]})
