"""Pictures beside the numbers, drawn with Pillow: sheets of what was kept and dropped, histograms with their thresholds."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from media import fit

KEPT, DROPPED, INK, BAR = (46, 140, 80), (200, 60, 60), (40, 40, 48), (96, 132, 190)


def font(size: int = 13) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def contact_sheet(items: Sequence[tuple[list[Image.Image], str, bool]], side: int = 96, lines: int = 3) -> Image.Image:
    """A row for each item: its pictures, then its text; framed in green where it was kept, in red where it was dropped."""
    widest, gap, text = max((len(pictures) for pictures, _, _ in items), default=1), 6, 420
    sheet = Image.new("RGB", (widest * (side + gap) + gap + text, max(len(items), 1) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (pictures, caption, kept) in enumerate(items):
        top = gap + row * (side + gap)
        for column, picture in enumerate(pictures):
            left = gap + column * (side + gap)
            sheet.paste(fit(picture, side, side, "pad"), (left, top))
            draw.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline=KEPT if kept else DROPPED, width=2)
        wrapped = "\n".join(line for part in caption.split("\n") for line in textwrap.wrap(part, 58)[:lines])
        draw.multiline_text((widest * (side + gap) + 2 * gap, top), wrapped, fill=KEPT if kept else DROPPED, font=font())
    return sheet


def histogram(values: Sequence[float], title: str, least: float | None = None, most: float | None = None, bins: int = 40,
              width: int = 420, height: int = 180) -> Image.Image:
    """How often each value occurs. Lines stand at the smallest and the largest that are kept."""
    values = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    image = Image.new("RGB", (width, height), "white")
    draw, left, bottom, top = ImageDraw.Draw(image), 10, height - 24, 26
    draw.text((left, 6), f"{title} ({len(values)})", fill=INK, font=font())
    if not len(values):
        return image
    marks = [mark for mark in (least, most) if mark is not None]
    low, high = min([values.min(), *marks]), max([values.max(), *marks])
    high = high if high > low else low + 1
    counts, _ = np.histogram(values, bins=bins, range=(low, high))
    step = (width - 2 * left) / bins
    for i, count in enumerate(counts):
        middle = low + (i + 0.5) * (high - low) / bins
        kept = (least is None or middle >= least) and (most is None or middle <= most)
        rise = (bottom - top) * count / counts.max()
        draw.rectangle((left + i * step, bottom - rise, left + (i + 1) * step - 1, bottom), fill=BAR if kept else DROPPED)
    for mark in marks:
        x = left + (mark - low) / (high - low) * (width - 2 * left)
        draw.line((x, top - 4, x, bottom), fill=INK, width=2)
        draw.text((min(x + 4, width - 60), top - 4), f"{mark:g}", fill=INK, font=font())
    draw.text((left, bottom + 4), f"{low:.3g}", fill=INK, font=font())
    draw.text((width - left, bottom + 4), f"{high:.3g}", fill=INK, font=font(), anchor="ra")
    return image


def stacked(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """One below the other."""
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height + gap
    return page
