"""The toy's world: creatures in scenes, 64x64 pixels and 9 frames, drawn from a seed; measure.py measures them. No networks.

Who a subject is (shape, pattern, detail, two colours) no text ever says: it is "a creature". How it moves, where it is
and what it is made of only the text says. So identity can only come from an image, and all else only from the text.

    python world.py        draws subjects, motions, backgrounds and looks -> world.png
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy import abs, cos, exp, hypot, ndarray, sin

SIZE, FRAMES, NOUN = 64, 9, "creature"  # pixels of a side, frames of a clip, and what every caption calls the subject
RADIUS = 12.5  # pixels of one unit of length at scale 1: bodies reach from about -1 to 1, details further
TEXELS, REACH = 128, 2.1 * RADIUS  # a subject is drawn once, finely: TEXELS x TEXELS over -REACH..REACH pixels
Rng = np.random.Generator | int

# --- identity ---------------------------------------------------------------------------------------------------------

u, v = np.meshgrid(*[((np.arange(TEXELS) + 0.5) / TEXELS * 2 - 1) * REACH / RADIUS] * 2)  # units to the right and down


def star(u: ndarray, v: ndarray, points: int = 5, tip: float = 1.2, valley: float = 0.62) -> ndarray:
    """Whether (u, v) is inside a star: from a tip to the valley beside it the edge is straight."""
    t = abs((np.arctan2(u, -v) + np.pi / points) % (2 * np.pi / points) - np.pi / points)
    x, y = valley * cos(np.pi / points), valley * sin(np.pi / points)
    return (x - tip) * hypot(u, v) * sin(t) > y * (hypot(u, v) * cos(t) - tip)


SHAPES = {  # is (u, v) inside the body?
    "ball": lambda u, v: hypot(u, v) < 1,
    "block": lambda u, v: u**6 + v**6 < 0.95**6,
    "triangle": lambda u, v: (v < 0.85) & (abs(u) < (v + 1.1) * 0.6),
    "diamond": lambda u, v: abs(u) / 0.95 + abs(v) / 1.2 < 1,
    "star": star,
    "heart": lambda u, v: (u**2 + (0.25 - v) ** 2 * 1.1 - 0.85) ** 3 < 1.3 * u**2 * (0.25 - v) ** 3,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.42) & (np.maximum(abs(u), abs(v)) < 1),
    "drop": lambda u, v: (hypot(u, v - 0.25) < 0.8) | ((abs(u) < (v + 1.2) * 0.62) & (v < -0.1)),
    "flower": lambda u, v: hypot(u, v) < 0.76 + 0.34 * abs(cos(2.5 * np.arctan2(u, -v))),
    "ghost": lambda u, v: (v < 0.8 + 0.2 * cos(11 * u)) & (hypot(u, np.minimum(v + 0.2, 0)) < 0.86),
    "hourglass": lambda u, v: (abs(v) < 1) & (abs(u) < 0.4 + 0.6 * abs(v) ** 1.5),
    "mushroom": lambda u, v: ((v < 0.1) & (hypot(u / 1.15, v - 0.1) < 1)) | ((abs(u) < 0.5) & (v > 0) & (v < 1)),
}
EYES = {"triangle": 0.2, "drop": 0.1, "hourglass": -0.6, "mushroom": -0.35}  # their height v; -0.15 for the others
PATTERNS = {  # has (u, v) the secondary colour? Features of 4 pixels and more: a VAE that compresses by 8 keeps them
    "stripes": lambda u, v, body: cos(v * 7.5) < 0,
    "bars": lambda u, v, body: cos(u * 7.5) > 0,
    "diagonals": lambda u, v, body: sin((u + v) * 5.3) > 0,
    "spots": lambda u, v, body: hypot((u + 0.4) % 0.8 - 0.4, (v + 0.35) % 0.8 - 0.4) < 0.26,
    "quarters": lambda u, v, body: u * (v - 0.1) > 0,
    "dipped": lambda u, v, body: v > 0.15,
    "halves": lambda u, v, body: u > 0,
    "rimmed": lambda u, v, body: ~body(u / 0.66, v / 0.66),
}
DETAILS = {  # grown from which side of the body, at which places; at x along the edge and y out from it, is it there?
    "ears": ("top", (-0.4, 0.4), lambda x, y: (y > -0.3) & (abs(x) < 0.5 * (0.65 - y))),
    "long ears": ("top", (-0.38, 0.38), lambda x, y: hypot(x / 0.2, (y - 0.22) / 0.56) < 1),
    "horn": ("top", (0,), lambda x, y: (y > -0.3) & (abs(x) < 0.33 * (0.65 - y))),
    "antennae": ("top", (-0.38, 0.38), lambda x, y: ((abs(x) < 0.08) & (abs(y) < 0.5)) | (hypot(x, y - 0.5) < 0.22)),
    "hat": ("top", (-0.2, 0.2), lambda x, y: (abs(x) < np.where(y < 0.13, 0.48, 0.22)) & (y > -0.13) & (y < 0.68)),
    "crest": ("top", (-0.5, 0, 0.5), lambda x, y: hypot(x, y - 0.1) < 0.27),
    "legs": ("bottom", (-0.36, 0.36), lambda x, y: (abs(x) < 0.19) & (abs(y) < 0.5)),
    "tail": ("right", (0.35,), lambda x, y: ((abs(x) < 0.14) & (abs(y) < 0.4)) | (hypot(x + 0.12, y - 0.42) < 0.33)),
    "wings": ("sides", (-0.15,), lambda x, y: hypot((y - 0.1 - 0.4 * x) / 0.48, (x + 0.4 * y) / 0.34) < 1),
    "spikes": None, "one eye": None, "mouth": None,
}
COLOURS = {
    "red": (222, 40, 44), "orange": (246, 134, 30), "yellow": (250, 222, 60), "green": (60, 176, 70),
    "cyan": (60, 204, 220), "blue": (48, 88, 222), "purple": (132, 52, 172), "pink": (250, 140, 192),
    "white": (246, 246, 246), "black": (62, 62, 74),
}
SUBJECTS = len(SHAPES) * len(PATTERNS) * len(DETAILS) * len(COLOURS) * (len(COLOURS) - 1)  # 103,680


@dataclass(frozen=True)
class Subject:
    shape: str
    pattern: str
    detail: str
    primary: str  # colour
    secondary: str

    @property
    def held_out(self) -> bool:
        """Whether it is for tests only: one subject in twenty is, by a hash, and training never draws it."""
        return zlib.crc32(" ".join(vars(self).values()).encode()) % 20 == 0


# --- what the text controls -------------------------------------------------------------------------------------------
#
# Each entry begins with the words for it, where {} is the noun, and goes on with what it does.

CLEAR, OUTLINE, PRIMARY, SECONDARY, WHITE, PUPIL = range(6)  # what a texel belongs to
LOOKS = {  # the colours of OUTLINE to PUPIL, and light added at (u, v), given where the secondary colour is
    "plain": ("a {}",) * 2 + (None, None),
    "golden": ("a golden {}", "a {} made of gold",
               ((96, 56, 8), (255, 206, 62), (196, 126, 20), (255, 246, 200), (96, 56, 8)),
               lambda u, v, second: 75 * exp(-(((u + v + 0.4) / 0.3) ** 2)) - 25 * (u + v > 0.8)),
    "sketch": ("a pencil sketch of a {}", "a {} drawn in pencil",
               ((72, 72, 72), (252, 252, 248), (205, 205, 205), (252, 252, 248), (72, 72, 72)),
               lambda u, v, second: -110 * (second & (sin((u - v) * 13) > 0))),
    "ice": ("an icy {}", "a {} made of ice",
            ((40, 104, 176), (206, 242, 255), (112, 184, 240), (255, 255, 255), (40, 104, 176)),
            lambda u, v, second: 60 * ((u - 0.6 * v + 0.2) % 1.1 < 0.22)),
    "glowing": ("a glowing {}", "a {} made of light",
                ((250, 255, 150), (70, 236, 80), (12, 96, 48), (255, 255, 220), (0, 56, 24)),
                lambda u, v, second: 110 * exp(-(u**2 + v**2) * 1.5) * ~second),
}
RAMP = np.linspace(-0.5, 0.5, FRAMES)
ARCH = np.square(RAMP).mean() * 4 - 4 * RAMP**2  # up and down again; the mean is 0, as of RAMP, and they are orthogonal
# Which part of the pose (x, y, log scale, angle) changes, by how much (pixels, degrees), along which curve. 16 pixels are a patch.
MOTIONS = {
    "still": (" is standing still", " stands still", 0, 0.0, RAMP),
    "left": (" is moving left", " moves to the left", 0, -16.0, RAMP),
    "right": (" is moving right", " moves to the right", 0, 16.0, RAMP),
    "up": (" is floating up", " rises into the air", 1, -16.0, RAMP),
    "down": (" is sinking down", " drops down", 1, 16.0, RAMP),
    "jump": (" is jumping", " jumps up and down", 1, -16.0, ARCH),
    "spin": (" is spinning", " turns around", 3, 120.0, RAMP),
    "grow": (" is growing", " becomes bigger", 2, np.log(1.5), RAMP),
    "shrink": (" is shrinking", " becomes smaller", 2, -np.log(1.5), RAMP),
}
CENTRE = (SIZE / 2, SIZE / 2 + 1)  # where clips begin with their subject, give or take 2 pixels
SHIFT = 4  # pixels that a background may be moved to either side


def discs(x: ndarray, y: ndarray, radius: float, *centres: tuple[float, float]) -> ndarray:
    return np.any([hypot(x - cx, y - cy) < radius for cx, cy in centres], axis=0)


BACKGROUNDS = {  # layers painted one over the other: where, the colour, and the colour towards the bottom if it changes
    "snow": ("in the snow", "on a snowy hill", lambda x, y: [
        (y > 0, (150, 190, 232), (224, 238, 250)), (y > 34 + 7 * sin(x / 11), (226, 234, 246)),
        (y > 46 + 4 * sin(x / 8 + 2), (252, 253, 255)),
        (discs(x, y, 1.8, (6, 8), (20, 22), (33, 6), (46, 20), (58, 9), (10, 38), (52, 40)), (255, 255, 255))]),
    "desert": ("in the desert", "among sand dunes", lambda x, y: [
        (y > 0, (250, 196, 92), (252, 226, 150)), (discs(x, y, 7, (50, 13)), (255, 246, 200)),
        (y > 38 + 8 * sin(x / 12 + 1), (232, 150, 70)), (y > 50 + 5 * sin(x / 9 + 3.5), (206, 116, 50))]),
    "forest": ("in a forest", "among the trees", lambda x, y: [
        (y > 0, (150, 200, 150), (90, 150, 90)), ((abs(x % 14 - 4) < 2) & (y > 40), (88, 58, 34)),
        ((y < 46) & (abs(x % 14 - 4) < (y - 4 - x // 14 % 3 * 4) * 0.22), (24, 96, 54)), (y > 52, (60, 110, 46))]),
    "city": ("in a city at night", "in front of dark towers", lambda x, y: [
        (y > 0, (20, 20, 56), (70, 40, 100)), (tower := (x % 14 < 12) & (y > 10 + x // 14 * 17 % 26), (48, 48, 66)),
        (tower & (x % 14 % 5 > 2) & (y % 8 > 4), (250, 206, 90)), (y > 58, (64, 60, 70))]),
    "space": ("in space", "among the stars", lambda x, y: [
        (y > 0, (34, 12, 60), (14, 4, 34)),
        (discs(x, y, 10, (15, 16)), (176, 84, 150)), (discs(x, y, 5, (12, 13)), (210, 120, 180)),
        (discs(x, y, 1.6, (36, 8), (52, 18), (30, 30), (8, 44), (24, 56), (44, 46), (60, 36), (56, 58)), (250,) * 3)]),
    "sea": ("under water", "in the sea", lambda x, y: [
        (y > 0, (40, 190, 200), (6, 60, 120)), (y > 56 + 2 * sin(x / 5), (214, 190, 130)),
        *((discs(x, y, radius, (9, 14), (56, 38), (36, 9)), colour)
          for radius, colour in ((4, (190, 240, 244)), (2.5, (70, 180, 200)))),
        ((abs(x % 23 - 8 - 2 * sin(y / 3)) < 1.7) & (y > 42), (20, 130, 80))]),
    "room": ("in a room", "inside a house", lambda x, y: [
        (y > 0, (238, 196, 196)), (x % 12 < 6, (226, 168, 176)), ((abs(x - 47) < 11) & (abs(y - 17) < 10), (250,) * 3),
        ((abs(x - 47) < 8.5) & (abs(y - 17) < 7.5) & (abs(x - 47) > 1), (130, 196, 240)), (y > 46, (150, 96, 60)),
        ((y > 46) & ((x + 8 * ((y - 46) // 6 % 2)) % 16 < 8), (172, 116, 74))]),
    "meadow": ("on a meadow", "on green grass", lambda x, y: [
        (y > 0, (100, 180, 250), (190, 226, 250)),
        (discs(x, y, 5, (12, 12), (18, 10), (24, 13), (46, 20), (53, 18)), (252, 252, 255)),
        (y > 40 + 4 * sin(x / 14), (120, 206, 74)), (y > 52 + 3 * sin(x / 9 + 2), (92, 182, 56)),
        (discs(x, y, 2.3, (6, 50), (20, 58), (34, 49), (47, 58), (58, 51)), (250, 90, 110))]),
}


@dataclass(frozen=True)
class Scene:
    """All that a clip shows. The seed decides what the text leaves open: where, how large, how tilted, how far."""

    subject: Subject
    motion: str | None  # None is a photograph: nothing moves, and its text says nothing of it
    background: str
    look: str
    seed: int
    strength: float = 1.0  # of the motion: 1 is what its name says


def captions(motion: str | None, background: str, look: str) -> list[str]:
    """Every way to say it. The subject is not asked for: no caption tells it from another."""
    return sorted({order.format(what.format(NOUN), does, where) for order in ("{0}{1} {2}", "{2}, {0}{1}")
                   for what in LOOKS[look][:2] for does in (MOTIONS[motion][:2] if motion else ("",))
                   for where in BACKGROUNDS[background][:2]})


def caption(scene: Scene, rng: Rng) -> str:
    return pick(np.random.default_rng(rng), captions(scene.motion, scene.background, scene.look))


def sentences() -> Iterator[str]:
    """Every caption that there is, for training a tokenizer."""
    for motion in (None, *MOTIONS):
        for background in BACKGROUNDS:
            for look in LOOKS:
                yield from captions(motion, background, look)


def templates() -> dict:
    """What can be said, in the form of synthesize.TEMPLATES: all looks but the plain one, and motions that move."""
    looks = {family: [text for name in names for text in LOOKS[name][:2]] for family, names in
             (("style", ("sketch",)), ("texture", ("ice", "golden")), ("colour", ("glowing",)))}
    return {**looks, "background": [text for background in BACKGROUNDS.values() for text in background[:2]],
            "motion": [text.strip() for name, motion in MOTIONS.items() if name != "still" for text in motion[:2]]}


# --- drawing ----------------------------------------------------------------------------------------------------------


def box(image: ndarray, width: int) -> ndarray:
    """Means over width x width (odd) around every pixel of images [..., H, W, C], float32; the border is repeated."""
    image, around = image.astype(np.float32), np.arange(width) - width // 2
    for axis in (-3, -2):
        n = image.shape[axis]
        image = sum(image.take((np.arange(n) + i).clip(0, n - 1), axis) for i in around) / width
    return image


@lru_cache(maxsize=None)
def drawing(shape: str, pattern: str, detail: str) -> ndarray:
    """A subject without its colours: for each texel what it belongs to, uint8 [TEXELS, TEXELS]."""
    thick = lambda mask, texels=4: box(mask[..., None], 2 * texels + 1)[..., 0] > 0.04  # and all that is so near
    body, grown, part = SHAPES[shape](u, v), np.zeros(u.shape, dtype=bool), np.zeros(u.shape, dtype=np.uint8)
    if detail == "spikes":
        grown = SHAPES[shape](u / 1.33, v / 1.33) & (cos(10 * np.arctan2(u, -v)) > -0.1)
    elif DETAILS[detail]:
        side, places, there = DETAILS[detail]
        for at in places:
            line = (body if side in ("right", "sides") else body.T)[int((at * RADIUS / REACH + 1) * TEXELS / 2)]
            edge = u[0, np.flatnonzero(line)[0 if side == "top" else -1]]  # the body's, in the place's row or column
            x, y = {"top": (u - at, edge - v), "bottom": (u - at, v - edge), "right": (v - at, u - edge),
                    "sides": (v - at, abs(u) - edge)}[side]
            grown |= there(x, y)
    part[thick(grown)] = OUTLINE
    part[grown] = SECONDARY
    part[thick(body)] = OUTLINE
    part[body] = np.where(PATTERNS[pattern](u, v, SHAPES[shape]), SECONDARY, PRIMARY)[body]
    height = v - EYES.get(shape, -0.15)
    for x, size in [(u, 0.4)] if detail == "one eye" else [(u - 0.3, 0.24), (u + 0.3, 0.24)]:
        part[hypot(x, height) < size + 0.07] = OUTLINE
        part[hypot(x, height) < size] = WHITE
        part[hypot(x, height - 0.05) < size * 0.55] = PUPIL
    if detail == "mouth":
        smile = (hypot(u / 0.62, (height - 0.3) / 0.5) < 1) & (height > 0.3)
        part[thick(smile, 2)] = OUTLINE
        part[smile] = np.where(height < 0.46, WHITE, PUPIL)[smile]
    return part


@lru_cache(maxsize=128)
def texture(subject: Subject, look: str, blur: int = 3) -> ndarray:
    """A subject in colour: float32 [TEXELS, TEXELS, 4], RGB in 0..255 times alpha, and alpha in 0..1. It is averaged
    over `blur` texels beforehand (3 is about a pixel), so that to draw it no more is needed than to pick texels."""
    part = drawing(subject.shape, subject.pattern, subject.detail)
    plain = ((28, 24, 38), COLOURS[subject.primary], COLOURS[subject.secondary], (255, 255, 255), (16, 14, 22))
    _, _, colours, light = LOOKS[look]
    image = np.array([(0, 0, 0, 0), *((*colour, 1) for colour in colours or plain)], dtype=np.float32)[part]
    if light:
        coloured = (part == PRIMARY) | (part == SECONDARY)
        image[..., :3] = (image[..., :3] + (light(u, v, part == SECONDARY) * coloured)[..., None]).clip(0, 255)
    image = box(image, blur)
    image[[0, -1]] = image[:, [0, -1]] = 0  # place() repeats the border
    return image


def place(texture: ndarray, reach: float, poses: ndarray, pitch: int = 1) -> ndarray:
    """A texture [N, N, 4] over -reach..reach pixels, drawn at poses [P, 4]: [P, SIZE/pitch, SIZE/pitch, 4].

    A pose is x and y of the centre in pixels, the logarithm of the scale, and the angle in degrees, clockwise.
    """
    x, y, log_scale, angle = (poses[:, i, None, None].astype(np.float32) for i in range(4))
    n, pixel = len(texture), np.arange(SIZE // pitch, dtype=np.float32) * pitch + pitch / 2
    zoom = n / (2 * reach) * exp(-log_scale)  # texels in a pixel
    c, s, dx, dy = cos(np.radians(angle)) * zoom, sin(np.radians(angle)) * zoom, pixel - x, pixel[:, None] - y
    column, row = dx * c + (dy * s + n / 2), dy * c + (n / 2 - dx * s)
    index = row.clip(0, n - 1).astype(np.int32) * n + column.clip(0, n - 1).astype(np.int32)
    return np.take(texture.reshape(-1, 4), index, axis=0)


@lru_cache(maxsize=None)
def backdrop(background: str, shift: int = 0) -> ndarray:
    """A background, moved to the right by `shift` pixels: float32 [SIZE, SIZE, 3]."""
    x, y = np.meshgrid(np.arange(SIZE) - shift + 0.5, np.arange(SIZE) + 0.5)
    image = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    for where, *colours in BACKGROUNDS[background][2](x, y):
        top, bottom = np.array(colours[0]), np.array(colours[-1])
        image = np.where(where[..., None], top + (bottom - top) * y[..., None] / SIZE, image)
    return image.astype(np.float32)


def poses(scene: Scene) -> tuple[ndarray, int]:
    """The subject's pose (see place) in each frame, [FRAMES, 4], and the shift of the background in pixels. It begins in the middle."""
    rng = np.random.default_rng(scene.seed)
    (x, y, tilt), size, reach = rng.uniform(-1, 1, 3), rng.uniform(0.95, 1.05), rng.uniform(0.85, 1.1)
    sign, shift = rng.choice([-1, 1]), int(rng.integers(-SHIFT, SHIFT + 1))
    path = np.tile([CENTRE[0] + 2 * x, CENTRE[1] + 2 * y, np.log(size), 5 * tilt], (FRAMES, 1))
    if scene.motion is not None:
        _, _, part, amount, curve = MOTIONS[scene.motion]
        path[:, part] += amount * (curve - curve[0]) * reach * scene.strength * (sign if part == 3 else 1)
    return path, shift


def render(scene: Scene, frames: slice = slice(None)) -> ndarray:
    """The clip, or some of its frames: uint8 [frames, SIZE, SIZE, 3]."""
    path, shift = poses(scene)
    subject = place(texture(scene.subject, scene.look), REACH, path[frames])
    return (backdrop(scene.background, shift) * (1 - subject[..., 3:]) + subject[..., :3] + 0.5).astype(np.uint8)


def masks(scene: Scene, frames: slice = slice(None)) -> ndarray:
    """Where the subject is: bool [frames, SIZE, SIZE]."""
    return place(texture(scene.subject, scene.look), REACH, poses(scene)[0][frames])[..., 3] > 0.5


def alone(frame: ndarray, mask: ndarray) -> ndarray:
    """The subject where it is in a frame [SIZE, SIZE, 3], and all else white."""
    return np.where(mask[..., None], frame, np.uint8(255))


def portrait(subject: Subject, look: str = "plain", scale: float = 1.0, angle: float = 0.0) -> ndarray:
    """The subject alone, where clips begin with it: uint8 RGBA [SIZE, SIZE, 4]; white where it is not."""
    image = place(texture(subject, look), REACH, np.array([[*CENTRE, np.log(scale), angle]]))[0]
    image[..., :3] += 255 * (1 - image[..., 3:])
    return (image * (1, 1, 1, 255) + 0.5).astype(np.uint8)


# --- the four kinds of data -------------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    return str(rng.choice(list(options)))


def sample_subject(rng: Rng, split: str = "train") -> Subject:
    """A subject of the split "train" or "test"; they share none."""
    rng = np.random.default_rng(rng)
    while True:
        primary, secondary = rng.permutation(list(COLOURS))[:2]
        subject = Subject(pick(rng, SHAPES), pick(rng, PATTERNS), pick(rng, DETAILS), str(primary), str(secondary))
        if subject.held_out == {"train": False, "test": True}[split]:
            return subject


def sample_scene(rng: Rng, split: str = "train", **fixed) -> Scene:
    """A plain-looking subject doing something somewhere. `fixed` sets fields of the Scene, such as look="golden"."""
    rng = np.random.default_rng(rng)
    drawn = {"subject": sample_subject(rng, split), "motion": pick(rng, MOTIONS), "background": pick(rng, BACKGROUNDS),
             "look": "plain", "seed": int(rng.integers(2**62))}
    return Scene(**{**drawn, **fixed})


def sample_pair(rng: Rng, split: str = "train") -> dict:
    """Two pictures of one subject, posed a little differently (Switch 3.2): "reference" and "target", uint8 [SIZE, SIZE, 3]; the
    target's caption "text", "noun" in it, and "scene". The target is a photograph; so is the reference, before another
    background, or it is a portrait on white."""
    rng = np.random.default_rng(rng)
    one, two = (sample_scene(rng, split, motion=None) for _ in range(2))
    elsewhere = pick(rng, (name for name in BACKGROUNDS if name != one.background))
    two = replace(two, subject=one.subject, background=elsewhere)
    reference = render(one, slice(1))[0]
    if rng.random() < 0.5:
        reference = portrait(one.subject, scale=rng.uniform(0.95, 1.05), angle=rng.uniform(-5, 5))[..., :3]
    return {"reference": reference, "target": render(two, slice(1))[0], "text": caption(two, rng), "noun": NOUN,
            "scene": two}


def sample_video(rng: Rng, split: str = "train", looks: Iterable[str] = ("plain",)) -> dict:
    """A clip with much motion: "video" uint8 [FRAMES, SIZE, SIZE, 3], "text", "scene". A base model that is to know the
    other looks as well trains with looks=LOOKS."""
    rng = np.random.default_rng(rng)
    scene = sample_scene(rng, split, look=pick(rng, looks))
    return {"video": render(scene), "text": caption(scene, rng), "scene": scene}


def sample_masked(rng: Rng, split: str = "train", looks: Iterable[str] = ("plain",)) -> dict:
    """The same with "masks", bool [FRAMES, SIZE, SIZE], of the subject: SUGAR's real videos (3.2)."""
    sample = sample_video(rng, split, looks)
    return {**sample, "masks": masks(sample["scene"])}


STILL_SHARE = 0.8  # of the triplets in whose text the subject stands still; in the others it does little of what it should


def sample_triplet(rng: Rng, split: str = "train") -> dict:
    """SUGAR's synthetic data (3.1): "video", "text", "image" uint8 RGBA [SIZE, SIZE, 4], "scene". The image is plain,
    the video is not; and as in the paper (3.2) most subjects stand still, some although the text asks them to move."""
    rng = np.random.default_rng(rng)
    scene = sample_scene(rng, split, look=pick(rng, (look for look in LOOKS if look != "plain")),
                         strength=rng.uniform(0.2, 0.5))
    if rng.random() < STILL_SHARE:
        scene = replace(scene, motion="still")
    image = portrait(scene.subject, scale=rng.uniform(0.95, 1.05), angle=rng.uniform(-5, 5))
    return {"video": render(scene), "text": caption(scene, rng), "image": image, "scene": scene}


def candidates(subject: Subject, rng: Rng, n: int = 16) -> list[Subject]:
    """The subject and n - 1 others. No two share shape, pattern and detail, which is all that looks leave of them."""
    rng, found = np.random.default_rng(rng), {(subject.shape, subject.pattern, subject.detail): subject}
    while len(found) < n:
        other = sample_subject(rng, "test")
        found.setdefault((other.shape, other.pattern, other.detail), other)
    return list(found.values())


# --- the sheet --------------------------------------------------------------------------------------------------------


def draw_sheet(file: str = "world.png", tile: int = 96, margin: int = 130) -> None:
    """Subjects, motions (a row of frames each), backgrounds and looks on one picture."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(7)
    subjects = [sample_subject(rng) for _ in range(27)]
    rows = [("subjects" * (i == 0), [portrait(s)[..., :3] for s in subjects[9 * i :][:9]]) for i in range(3)]
    rows += [(motion, render(sample_scene(rng, motion=motion, look="plain"))) for motion in MOTIONS]
    rows += [("backgrounds", [backdrop(name).astype(np.uint8) for name in BACKGROUNDS])]
    rows += [(look, [render(Scene(*shown, look, 3))[0] for shown in zip(subjects, ["still"] * 8, BACKGROUNDS)])
             for look in LOOKS]
    sheet = Image.new("RGB", (margin + 9 * (tile + 4), len(rows) * (tile + 4) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for row, (name, pictures) in enumerate(rows):
        draw.text((margin - 12, (row + 0.5) * (tile + 4)), name, fill="black", font=font, anchor="rm")
        for column, picture in enumerate(pictures):
            picture = Image.fromarray(picture).resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(picture, (margin + column * (tile + 4), 4 + row * (tile + 4)))
    sheet.save(file)


if __name__ == "__main__":
    draw_sheet()
    print("wrote world.png")
