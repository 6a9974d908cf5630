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


def histogram(values: Sequence[float], title: str, least: float, bins: int = 40, width: int = 420, height: int = 180) -> Image.Image:
    """How often each value occurs. A line stands at the smallest that is kept."""
    values = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    image = Image.new("RGB", (width, height), "white")
    draw, left, bottom, top = ImageDraw.Draw(image), 10, height - 24, 26
    draw.text((left, 6), f"{title} ({len(values)})", fill=INK, font=font())
    if not len(values):
        return image
    low, high = min(values.min(), least), max(values.max(), least)
    high = high if high > low else low + 1
    counts, _ = np.histogram(values, bins=bins, range=(low, high))
    step = (width - 2 * left) / bins
    for i, count in enumerate(counts):
        middle = low + (i + 0.5) * (high - low) / bins
        rise = (bottom - top) * count / counts.max()
        draw.rectangle((left + i * step, bottom - rise, left + (i + 1) * step - 1, bottom), fill=BAR if middle >= least else DROPPED)
    x = left + (least - low) / (high - low) * (width - 2 * left)
    draw.line((x, top - 4, x, bottom), fill=INK, width=2)
    draw.text((min(x + 4, width - 60), top - 4), f"{least:g}", fill=INK, font=font())
    draw.text((left, bottom + 4), f"{low:.3g}", fill=INK, font=font())
    draw.text((width - left, bottom + 4), f"{high:.3g}", fill=INK, font=font(), anchor="ra")
    return image


def tiled(pictures: Sequence[Image.Image], columns: int = 1, gap: int = 8) -> Image.Image:
    """In rows of so many."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    wide, high = max(p.width for p in pictures) + gap, [max(p.height for p in row) + gap for row in rows]
    page = Image.new("RGB", (wide * min(columns, len(pictures)) - gap, sum(high) - gap), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            page.paste(picture, (j * wide, sum(high[:i])))
    return page


# --- charts -----------------------------------------------------------------------------------------------------------

COLOURS = [(31, 119, 180), (214, 96, 40), (46, 140, 80), (170, 60, 120), (120, 100, 60), (90, 90, 200), (20, 150, 150), (190, 150, 20)]
Interval = tuple[float, float, float]  # mean, and the bounds of its confidence interval


def axis(low: float, high: float) -> tuple[float, float]:
    """A range with some air, that is never empty."""
    air = 0.08 * (high - low) or 0.05
    return low - air, high + air


def scatter(points: dict[str, list[tuple[Interval, Interval]]], x: str, y: str, title: str, width: int = 560,
            height: int = 420) -> Image.Image:
    """A line of points for each name, with intervals in both directions, as the papers' trade-off figures."""
    image = Image.new("RGB", (width, height), "white")
    draw, left, right, top, bottom = ImageDraw.Draw(image), 70, width - 20, 60, height - 60
    finite = lambda values: [value for value in values if np.isfinite(value)] or [0.0]
    whole = lambda interval: [value if np.isfinite(value) else interval[0] for value in interval]  # of one seed there is none
    points = {name: [(whole(one), whole(two)) for one, two in line] for name, line in points.items()}
    every = [point for line in points.values() for point in line]
    ranges = [axis(min(finite(p[i][1] for p in every)), max(finite(p[i][2] for p in every))) for i in (0, 1)]
    place = lambda value, i: (left + (value - ranges[0][0]) / (ranges[0][1] - ranges[0][0]) * (right - left) if i == 0 else
                              bottom - (value - ranges[1][0]) / (ranges[1][1] - ranges[1][0]) * (bottom - top))
    draw.text((6, 8), title, fill=INK, font=font(15))
    draw.rectangle((left, top, right, bottom), outline=INK)
    for i, name in enumerate((x, y)):
        for value in np.linspace(*ranges[i], 5):
            at = (place(value, 0), bottom + 4) if i == 0 else (left - 6, place(value, 1))
            draw.text(at, f"{value:.2f}", fill=INK, font=font(11), anchor="mt" if i == 0 else "rm")
        draw.text(((left + right) / 2, height - 30) if i == 0 else (6, 44), name, fill=INK, font=font(), anchor="mt" if i == 0 else "lm")
    taken: list[tuple[float, ...]] = []  # by names
    for number, (name, line) in enumerate(points.items()):
        colour, middles = COLOURS[number % len(COLOURS)], []
        for one, two in line:
            if not np.isfinite([*one, *two]).all():
                continue
            at = place(one[0], 0), place(two[0], 1)
            draw.line((place(one[1], 0), at[1], place(one[2], 0), at[1]), fill=colour)
            draw.line((at[0], place(two[1], 1), at[0], place(two[2], 1)), fill=colour)
            draw.ellipse((at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4), fill=colour)
            middles.append(at)
        if len(middles) > 1:
            draw.line(middles, fill=colour, width=2)
        if middles:
            corners = [((middles[-1][0] + dx, middles[-1][1] + dy), ("l" if dx > 0 else "r") + ("s" if dy < 0 else "t"))
                       for dx, dy in ((7, -7), (7, 7), (-7, -7), (-7, 7))]
            boxes = [draw.textbbox(at, name, font(12), anchor) for at, anchor in corners]
            apart = lambda a, b: a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
            free = [i for i, box in enumerate(boxes) if 0 < box[0] and box[2] < width and all(apart(box, other) for other in taken)]
            (at, anchor), box = next(((corners[i], boxes[i]) for i in free), (corners[0], boxes[0]))
            draw.text(at, name, fill=colour, font=font(12), anchor=anchor)
            taken.append(box)
    return image


def bars(values: dict[str, dict[str, Interval]], title: str, height: int = 220) -> Image.Image:
    """A group of bars for each score, {score: {name: interval}}, each score on its own scale from 0 to its largest."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    bar, left, top = 26, 20, 60 + 16 * len(names)
    wide = [max(len(names) * bar, round(font(12).getlength(score))) + 20 for score in values]
    image = Image.new("RGB", (left + sum(wide), top + height + 40), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 10), title, fill=INK, font=font(15))
    for number, name in enumerate(names):
        draw.rectangle((left, 38 + 16 * number, left + 10, 48 + 16 * number), fill=COLOURS[number % len(COLOURS)])
        draw.text((left + 16, 43 + 16 * number), name, fill=INK, font=font(12), anchor="lm")
    for group, (score, of) in enumerate(values.items()):
        start, largest = left + sum(wide[:group]), max([x for v in of.values() for x in v if np.isfinite(x)] + [1e-9])
        draw.text((start, top + height + 8), score, fill=INK, font=font(12))
        for number, name in enumerate(names):
            mean, low, high = of.get(name, (np.nan,) * 3)
            if np.isfinite(mean):
                x, rise = start + number * bar, lambda value: top + height - height * min(max(value / largest, 0), 1)
                draw.rectangle((x, rise(mean), x + bar - 6, top + height), fill=COLOURS[number % len(COLOURS)])
                if np.isfinite([low, high]).all():
                    draw.line((x + bar / 2 - 3, rise(low), x + bar / 2 - 3, rise(high)), fill=INK, width=2)
                draw.text((x, rise(np.nanmax([mean, high])) - 3), f"{mean:.2f}", fill=INK, font=font(10), anchor="ls")
    return image
