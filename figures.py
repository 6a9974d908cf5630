"""Pictures beside the numbers, drawn with Pillow: sheets of what was kept and dropped, histograms with their thresholds, charts."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from media import fit

KEPT, DROPPED, INK, BAR, GRID = (46, 140, 80), (200, 60, 60), (40, 40, 48), (96, 132, 190), (232, 232, 236)


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


def axis(low: float, high: float, ticks: int = 5) -> np.ndarray:
    """Round numbers, each a step of 1, 2, 2.5 or 5 times a power of ten above the one before, that hold low..high in `ticks` + 1 steps at
    most."""
    if high - low < 1e-6:  # a single value: it stands in the middle
        low, high = low - 0.05, high + 0.05
    wide = (high - low) / ticks
    power = 10.0 ** np.floor(np.log10(wide))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= wide * (1 - 1e-9))
    return step * np.arange(np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9) + 1)


def scatter(points: dict[str, list[tuple[Interval, Interval]]], x: str, y: str, title: str, width: int = 560,
            height: int = 420) -> Image.Image:
    """A line of points for each name, with intervals in both directions, as the papers' trade-off figures."""
    whole = lambda interval: [value if np.isfinite(value) else interval[0] for value in interval]  # of one seed there is none
    lines = {name: [[*map(whole, point)] for point in line if np.isfinite([each[0] for each in point]).all()]
             for name, line in points.items()}
    bounds = np.array([point for line in lines.values() for point in line] or [[[0.0]] * 2])  # [points, x and y, mean and bounds]
    ticks = [axis(bounds[:, i].min(), bounds[:, i].max()) for i in (0, 1)]
    rows, wide = [[]], 0.0  # of the legend
    for number, name in enumerate(lines):
        long = font(12).getlength(name) + 30
        if rows[-1] and wide + long > width - 12:
            rows, wide = [*rows, []], 0.0
        rows[-1].append((wide, number, name))
        wide += long
    left, right, top, bottom = 70, width - 20, 64 + 18 * len(rows), height - 60 + 18 * len(rows)
    image = Image.new("RGB", (width, bottom + 60), "white")
    draw, colour = ImageDraw.Draw(image), lambda number: COLOURS[number % len(COLOURS)]
    across = lambda value: left + (value - ticks[0][0]) / np.ptp(ticks[0]) * (right - left)
    up = lambda value: bottom - (value - ticks[1][0]) / np.ptp(ticks[1]) * (bottom - top)
    draw.text((6, 8), title, fill=INK, font=font(15))
    for row, entries in enumerate(rows):
        for start, number, name in entries:
            draw.ellipse((6 + start, 36 + 18 * row, 14 + start, 44 + 18 * row), fill=colour(number))
            draw.text((19 + start, 40 + 18 * row), name, fill=INK, font=font(12), anchor="lm")
    for value in ticks[0]:
        draw.line((across(value), top, across(value), bottom), fill=GRID)
        draw.text((across(value), bottom + 4), f"{value:.4g}", fill=INK, font=font(11), anchor="mt")
    for value in ticks[1]:
        draw.line((left, up(value), right, up(value)), fill=GRID)
        draw.text((left - 6, up(value)), f"{value:.4g}", fill=INK, font=font(11), anchor="rm")
    draw.text(((left + right) / 2, bottom + 30), x, fill=INK, font=font(), anchor="mt")
    draw.text((6, top - 14), y, fill=INK, font=font(), anchor="lm")
    for number, line in enumerate(lines.values()):  # below what is to be seen first
        pale = tuple((part + 2 * 255) // 3 for part in colour(number))
        for one, two in line:
            draw.line((across(one[1]), up(two[0]), across(one[2]), up(two[0])), fill=pale)
            draw.line((across(one[0]), up(two[1]), across(one[0]), up(two[2])), fill=pale)
    for number, line in enumerate(lines.values()):
        middles = [(across(one[0]), up(two[0])) for one, two in line]
        draw.line(middles, fill=colour(number), width=2)
        for at in middles:
            draw.ellipse((at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4), fill=colour(number))
    draw.rectangle((left, top, right, bottom), outline=INK)
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
