"""The toy's world: creatures in scenes, 64x64 pixels and 9 frames, drawn from a seed and measured exactly. No networks.

What makes it fit for the two papers: a subject's identity (shape, two colours, pattern, detail) is never in the text, which
only says "creature"; the text says how the subject moves, where it is and what it is made of, which no image shows.

    python world.py        draws subjects, motions, backgrounds and looks -> world.png
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

SIZE, FRAMES = 64, 9  # pixels of a side, frames of a clip
RADIUS = 12.5  # pixels in one unit of length of a body at scale 1; bodies reach from about -1 to 1, details further
TEXELS, BOX = 128, 2.05  # a subject is drawn once, finely, as TEXELS x TEXELS over -BOX..BOX units, then moved about
NOUN = "creature"
Rng = np.random.Generator | int  # every sample_...() takes either

# Coordinates of the fine drawing, in units: u to the right, v down, r and angle from the centre (0 is up).
u, v = np.meshgrid(*[(np.arange(TEXELS, dtype=np.float32) + 0.5) / TEXELS * 2 * BOX - BOX] * 2)


def star(u, v, points=5, tip=1.2, valley=0.62):
    """Inside a star: between a tip and a valley its edge is a straight line."""
    sector = np.pi / points
    t = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
    x, y, qx, qy = np.hypot(u, v) * np.cos(t), np.hypot(u, v) * np.sin(t), valley * np.cos(sector), valley * np.sin(sector)
    return (qx - tip) * y - qy * (x - tip) > 0


# Identity. SHAPES: is (u, v) inside the body? PATTERNS: does it have the secondary colour?
SHAPES = {
    "ball": lambda u, v: np.hypot(u, v) < 1,
    "block": lambda u, v: u**6 + v**6 < 0.9**6,
    "triangle": lambda u, v: (v < 0.85) & (np.abs(u) < (v + 1.1) * 0.6),
    "diamond": lambda u, v: np.abs(u) / 0.95 + np.abs(v) / 1.2 < 1,
    "star": star,
    "heart": lambda u, v: (u**2 + (0.25 - v) ** 2 * 1.1 - 0.85) ** 3 < 1.3 * u**2 * (0.25 - v) ** 3,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.42) & (np.maximum(np.abs(u), np.abs(v)) < 1.05),
    "drop": lambda u, v: (np.hypot(u, v - 0.25) < 0.8) | ((np.abs(u) < (v + 1.2) * 0.62) & (v < -0.1)),
    "flower": lambda u, v: np.hypot(u, v) < 0.76 + 0.34 * np.abs(np.cos(2.5 * np.arctan2(u, -v))),
    "ghost": lambda u, v: (v < 0.8 + 0.2 * np.cos(11 * u)) & (np.hypot(u, np.minimum(v + 0.2, 0)) < 0.86),
    "hourglass": lambda u, v: (np.abs(v) < 1) & (np.abs(u) < 0.4 + 0.6 * np.abs(v) ** 1.5),
    "mushroom": lambda u, v: ((v < 0.1) & (np.hypot(u / 1.15, v - 0.1) < 1)) | ((np.abs(u) < 0.5) & (v > 0) & (v < 1)),
}
EYES = {"triangle": 0.2, "drop": 0.1, "hourglass": -0.6, "mushroom": -0.35, "star": -0.1}  # height v of the eyes, else:
EYE_HEIGHT = -0.15
PATTERNS = {  # features of at least 4 pixels, so that they survive a VAE that compresses by 8
    "stripes": lambda u, v, shape: np.cos(v * 7.5) < 0,
    "bars": lambda u, v, shape: np.cos(u * 7.5) > 0,
    "diagonals": lambda u, v, shape: np.sin((u + v) * 5.3) > 0,
    "spots": lambda u, v, shape: np.hypot((u + 0.4) % 0.8 - 0.4, (v + 0.35) % 0.8 - 0.4) < 0.26,
    "quarters": lambda u, v, shape: u * (v - 0.1) > 0,
    "dipped": lambda u, v, shape: v > 0.15,
    "halves": lambda u, v, shape: u > 0,
    "rimmed": lambda u, v, shape: ~SHAPES[shape](u / 0.66, v / 0.66),
}
DETAILS = ("ears", "long ears", "horn", "antennae", "hat", "crest", "legs", "tail", "wings", "spikes", "one eye", "mouth")
COLOURS = {
    "red": (222, 40, 44), "orange": (246, 134, 30), "yellow": (250, 222, 60), "green": (60, 176, 70),
    "cyan": (60, 204, 220), "blue": (48, 88, 222), "purple": (132, 52, 172), "pink": (250, 140, 192),
    "white": (246, 246, 246), "black": (46, 46, 56),
}
CLEAR, OUTLINE, PRIMARY, SECONDARY, WHITE, PUPIL = range(6)  # what a texel of a drawing belongs to

# A look keeps shape, pattern and detail, and replaces the colours: of outline, primary, secondary, white and pupil, and
# a light that is added at (u, v), given where the secondary colour is.
LOOKS = {
    "plain": None,
    "golden": (((96, 56, 8), (255, 206, 62), (196, 126, 20), (255, 246, 200), (96, 56, 8)),
               lambda u, v, second: 75 * np.exp(-(((u + v + 0.4) / 0.3) ** 2)) - 25 * (u + v > 0.8)),
    "sketch": (((72, 72, 72), (252, 252, 248), (205, 205, 205), (252, 252, 248), (72, 72, 72)),
               lambda u, v, second: -110 * (second & (np.sin((u - v) * 13) > 0))),
    "ice": (((40, 104, 176), (206, 242, 255), (112, 184, 240), (255, 255, 255), (40, 104, 176)),
            lambda u, v, second: 60 * ((u - 0.6 * v + 0.2) % 1.1 < 0.22)),
    "glowing": (((250, 255, 150), (70, 236, 80), (12, 96, 48), (255, 255, 220), (0, 56, 24)),
                lambda u, v, second: 110 * np.exp(-(u**2 + v**2) * 1.5) * ~second),
}
SUBJECTS = len(SHAPES) * len(PATTERNS) * len(DETAILS) * len(COLOURS) * (len(COLOURS) - 1)  # 103,680


@dataclass(frozen=True)
class Subject:
    """An identity. Held-out subjects (one in twenty, by a hash) are drawn for testing only, the others for training only."""

    shape: str
    pattern: str
    detail: str
    primary: str
    secondary: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(repr((self.shape, self.pattern, self.detail, self.primary, self.secondary)).encode()) % 20 == 0


@dataclass(frozen=True)
class Scene:
    """All that a clip shows. `seed` decides what the text leaves open: where, how large, how tilted, how far."""

    subject: Subject
    motion: str | None  # None is a photograph: nothing moves, and the subject may be posed more freely
    background: str
    look: str
    seed: int
    strength: float = 1.0  # of the motion: 1 is what its name says, 0 none at all


# --- drawing ----------------------------------------------------------------------------------------------------------


def detail_mask(shape: str, detail: str) -> np.ndarray:
    """Where a detail is that grows out of a body: bool [TEXELS, TEXELS]. It sits on the body's own edge."""
    body = SHAPES[shape](u, v)

    def edge(at: float, side: str) -> float:
        """v of the body's top or bottom in the column u = at, or u of its right edge in the row v = at."""
        line = (body[int((at / BOX + 1) * TEXELS / 2)] if side == "right" else body[:, int((at / BOX + 1) * TEXELS / 2)])
        found = np.flatnonzero(line)
        return u[0, found[0] if side == "top" else found[-1]]

    def over(at: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates from the body's top edge at u = at: to the right, and up."""
        return u - at, edge(at, "top") - v

    match detail:
        case "ears":
            return np.any([(y > -0.3) & (np.abs(x) < 0.5 * (0.65 - y)) for x, y in (over(-0.4), over(0.4))], axis=0)
        case "long ears":
            return np.any([np.hypot(x / 0.2, (y - 0.3) / 0.62) < 1 for x, y in (over(-0.38), over(0.38))], axis=0)
        case "horn":
            x, y = over(0)
            return (y > -0.3) & (np.abs(x) < 0.3 * (0.75 - y))
        case "antennae":
            return np.any([((np.abs(x) < 0.08) & (np.abs(y) < 0.5)) | (np.hypot(x, y - 0.5) < 0.22)
                           for x, y in (over(-0.38), over(0.38))], axis=0)
        case "hat":
            x, y = u, over(0.2)[1]
            return ((np.abs(x) < 0.68) & (np.abs(y) < 0.13)) | ((np.abs(x) < 0.42) & (y > 0) & (y < 0.68))
        case "crest":
            return np.any([np.hypot(x, y - 0.1) < 0.27 for x, y in (over(-0.5), over(0), over(0.5))], axis=0)
        case "legs":
            return np.any([(np.abs(u - at) < 0.19) & (np.abs(v - edge(at, "bottom")) < 0.5) for at in (-0.36, 0.36)], axis=0)
        case "tail":
            x, y = u - edge(0.35, "right"), v - 0.35
            return ((np.abs(y) < 0.14) & (np.abs(x) < 0.4)) | (np.hypot(x - 0.42, y + 0.12) < 0.33)
        case "wings":
            x, y = np.abs(u) - edge(0, "right"), v + 0.15
            return np.hypot((x - 0.2 - 0.4 * y) / 0.55, (y + 0.4 * x) / 0.34) < 1
        case "spikes":
            return SHAPES[shape](u / 1.33, v / 1.33) & (np.cos(10 * np.arctan2(u, -v)) > -0.1)
    return np.zeros_like(body)  # "one eye" and "mouth" are drawn on the body


@lru_cache(maxsize=None)
def drawing(shape: str, pattern: str, detail: str) -> np.ndarray:
    """A subject without its colours: for each texel what it belongs to, uint8 [TEXELS, TEXELS]."""

    def thick(mask: np.ndarray, texels: int = 4) -> np.ndarray:
        """The mask, and all that is within so many texels of it."""
        turns = np.arange(0, 2 * np.pi, np.pi / 8)
        shifts = np.stack([np.sin(turns), np.cos(turns)], axis=1) * texels
        return np.any([mask, *(np.roll(mask, shift, axis=(0, 1)) for shift in shifts.round().astype(int))], axis=0)

    body, part = SHAPES[shape](u, v), np.zeros((TEXELS, TEXELS), dtype=np.uint8)
    grown = detail_mask(shape, detail)
    part[thick(grown)] = OUTLINE
    part[grown] = SECONDARY
    part[thick(body)] = OUTLINE
    part[body] = np.where(PATTERNS[pattern](u, v, shape), SECONDARY, PRIMARY)[body]
    height = v - EYES.get(shape, EYE_HEIGHT)
    for x, size in ([(u, 0.4)] if detail == "one eye" else [(u - 0.3, 0.24), (u + 0.3, 0.24)]):
        part[np.hypot(x, height) < size + 0.07] = OUTLINE
        part[np.hypot(x, height) < size] = WHITE
        part[np.hypot(x, height - 0.05) < size * 0.55] = PUPIL
    if detail == "mouth":
        smile = (np.hypot(u / 0.62, (height - 0.3) / 0.5) < 1) & (height > 0.3)
        part[thick(smile, 2)] = OUTLINE
        part[smile] = np.where(height < 0.46, WHITE, PUPIL)[smile]
    return part


def box(image: np.ndarray, width: int) -> np.ndarray:
    """Averages of width x width (odd) around every pixel of images [..., H, W, C], float32; the border is repeated."""
    image = image.astype(np.float32)
    for axis in (-3, -2):
        n = image.shape[axis]
        image = sum(image.take((np.arange(n) + i).clip(0, n - 1), axis) for i in range(-(width // 2), width // 2 + 1)) / width
    return image


@lru_cache(maxsize=128)
def texture(subject: Subject, look: str, pitch: int = 1) -> np.ndarray:
    """A subject in colour: float32 [TEXELS, TEXELS, 4], RGB in 0..255 times alpha, and alpha in 0..1.

    It is averaged over pixels `pitch` wide already, so that drawing it needs no more than to pick texels.
    """
    part = drawing(subject.shape, subject.pattern, subject.detail)
    ink = COLOURS["black"]
    plain = ((28, 24, 38), COLOURS[subject.primary], COLOURS[subject.secondary], (255, 255, 255), (16, 14, 22))
    colours, light = LOOKS[look] or (plain, None)
    palette = np.array([(0, 0, 0, 0), *((*colour, 1) for colour in colours)], dtype=np.float32)
    image = palette[part]
    if light:
        coloured = (part == PRIMARY) | (part == SECONDARY)
        image[..., :3] = (image[..., :3] + (light(u, v, part == SECONDARY) * coloured)[..., None]).clip(0, 255)
    return box(image, (3, 13)[pitch - 1])


def place(texture: np.ndarray, half: float, poses: np.ndarray, pitch: int = 1) -> np.ndarray:
    """Textures [N, N, 4] that reach from -half to half pixels, drawn at poses [P, 4]: float32 [P, SIZE/pitch, SIZE/pitch, 4].

    A pose is x and y of the centre in pixels, the logarithm of the scale, and the angle in degrees, clockwise.
    """
    n = len(texture)
    x, y, log_scale, angle = (poses[:, i, None, None].astype(np.float32) for i in range(4))
    pixel = np.arange(SIZE // pitch, dtype=np.float32) * pitch + pitch / 2
    zoom = n / (2 * half) * np.exp(-log_scale)  # texels in a pixel
    cos, sin = np.cos(np.radians(angle)) * zoom, np.sin(np.radians(angle)) * zoom
    dx, dy = pixel[None, None, :] - x, pixel[None, :, None] - y
    column, row = (dx * cos + (dy * sin + n / 2)), (dy * cos + (n / 2 - dx * sin))
    index = row.clip(0, n - 1).astype(np.int32) * n + column.clip(0, n - 1).astype(np.int32)  # the border is clear
    return np.take(texture.reshape(-1, 4), index, axis=0)


@lru_cache(maxsize=None)
def backdrop(background: str, shift: int = 0) -> np.ndarray:
    """A background, moved to the right by `shift` pixels: float32 [SIZE, SIZE, 3]."""
    x, y = np.meshgrid(np.arange(SIZE) - shift + 0.5, np.arange(SIZE) + 0.5)
    image = np.zeros((SIZE, SIZE, 3), dtype=np.float32)

    def paint(where, colour, to=None):
        """Paints a region in one colour, or from one at the top of the picture to another at its bottom."""
        t = (y / SIZE)[..., None] if to else 0
        image[:] = np.where(np.asarray(where)[..., None], np.array(colour) * (1 - t) + np.array(to or colour) * t, image)

    everywhere, disc = y > 0, lambda cx, cy, r: np.hypot(x - cx, y - cy) < r
    match background:
        case "snow":
            paint(everywhere, (150, 190, 232), (224, 238, 250))
            paint(y > 34 + 7 * np.sin(x / 11), (226, 234, 246))
            paint(y > 46 + 4 * np.sin(x / 8 + 2), (252, 253, 255))
            for cx, cy in ((6, 8), (20, 22), (33, 6), (46, 20), (58, 9), (10, 38), (52, 40), (30, 54)):
                paint(disc(cx, cy, 1.8), (255, 255, 255))
        case "desert":
            paint(everywhere, (250, 196, 92), (252, 226, 150))
            paint(disc(50, 13, 7), (255, 246, 200))
            paint(y > 38 + 8 * np.sin(x / 12 + 1), (232, 150, 70))
            paint(y > 50 + 5 * np.sin(x / 9 + 3.5), (206, 116, 50))
        case "forest":
            paint(everywhere, (150, 200, 150), (90, 150, 90))
            for cx in range(-10, 80, 14):
                paint((np.abs(x - cx) < 2) & (y > 40), (88, 58, 34))
                paint((y < 46) & (np.abs(x - cx) < (y - 4 - cx % 5 * 2) * 0.22), (24, 96, 54))
            paint(y > 52, (60, 110, 46))
        case "city":
            paint(everywhere, (20, 20, 56), (70, 40, 100))
            for cx, top, shade in ((-2, 30, 30), (12, 14, 44), (26, 34, 34), (40, 20, 48), (54, 8, 36), (68, 28, 44)):
                tower = (np.abs(x - cx) < 6.5) & (y > top)
                paint(tower, (shade, shade, shade + 22))
                paint(tower & ((x - cx + 6.5) % 6 > 3) & ((y - top) % 8 > 4) & (np.abs(x - cx) < 5), (250, 206, 90))
            paint(y > 58, (44, 40, 50))
        case "space":
            paint(everywhere, (8, 6, 20))
            paint(disc(15, 16, 10), (176, 84, 150))
            paint(disc(12, 13, 5), (210, 120, 180))
            for cx, cy in ((36, 8), (52, 18), (30, 30), (8, 44), (24, 56), (44, 46), (60, 36), (56, 58), (40, 24), (4, 30)):
                paint(disc(cx, cy, 1.6), (250, 250, 230))
        case "sea":
            paint(everywhere, (40, 190, 200), (6, 60, 120))
            for cx, cy, r in ((9, 14, 4), (16, 30, 2.5), (52, 12, 3), (56, 38, 4), (34, 8, 2)):
                paint(disc(cx, cy, r), (190, 240, 244))
                paint(disc(cx, cy, r - 1.3), (70, 180, 200))
            paint(y > 56 + 2 * np.sin(x / 5), (214, 190, 130))
            for cx in (8, 30, 54):
                paint((np.abs(x - cx - 2 * np.sin(y / 3)) < 1.7) & (y > 42), (20, 130, 80))
        case "room":
            paint(everywhere, (238, 196, 196))
            paint(x % 12 < 6, (226, 168, 176))
            paint((np.abs(x - 47) < 11) & (np.abs(y - 17) < 10), (250, 250, 250))
            paint((np.abs(x - 47) < 8.5) & (np.abs(y - 17) < 7.5) & (np.abs(x - 47) > 1), (130, 196, 240))
            paint(y > 46, (150, 96, 60))
            paint((y > 46) & ((x + 8 * ((y - 46) // 6 % 2)) % 16 < 8), (172, 116, 74))
        case "meadow":
            paint(everywhere, (100, 180, 250), (190, 226, 250))
            for cx, cy in ((12, 12), (18, 10), (24, 13), (46, 20), (53, 18)):
                paint(disc(cx, cy, 5), (252, 252, 255))
            paint(y > 40 + 4 * np.sin(x / 14), (120, 206, 74))
            paint(y > 52 + 3 * np.sin(x / 9 + 2), (92, 182, 56))
            for cx, cy in ((6, 50), (20, 58), (34, 49), (47, 58), (58, 51)):
                paint(disc(cx, cy, 2.3), (250, 90, 110))
    return image


# --- motion -----------------------------------------------------------------------------------------------------------

TRAVEL, SPIN, GROWTH, SHIFT = 24.0, 200.0, np.log(1.9), 4  # pixels, degrees, log scale, largest shift of a background
RAMP = np.linspace(-0.5, 0.5, FRAMES)
ARCH = 2 / 3 - 4 * RAMP**2  # up and down again, mean near 0
# For each motion what it adds to a pose (x, y, log scale, angle): along which of the four, how much, over which curve.
MOTIONS = {
    "still": (0, 0.0, RAMP), "left": (0, -TRAVEL, RAMP), "right": (0, TRAVEL, RAMP), "up": (1, -TRAVEL, RAMP),
    "down": (1, TRAVEL, RAMP), "jump": (1, -TRAVEL, ARCH), "spin": (3, SPIN, RAMP), "grow": (2, GROWTH, RAMP),
    "shrink": (2, -GROWTH, RAMP),
}
BACKGROUNDS = ("snow", "desert", "forest", "city", "space", "sea", "room", "meadow")


def poses(scene: Scene) -> tuple[np.ndarray, int]:
    """The subject's pose (see place()) in each frame [FRAMES, 4], and the shift of the background in pixels."""
    rng = np.random.default_rng(scene.seed)
    (x, y, tilt), size, reach = rng.uniform(-1, 1, 3), rng.uniform(0.9, 1.08), rng.uniform(0.85, 1.1)
    sign, shift = rng.choice([-1, 1]), int(rng.integers(-SHIFT, SHIFT + 1))
    if scene.motion is None:
        pose = np.array([32 + 9 * x, 34 + 7 * y, np.log(size * rng.uniform(0.75, 1.1)), 25 * tilt])
        return np.tile(pose, (FRAMES, 1)), shift
    axis, amount, curve = MOTIONS[scene.motion]
    path = np.tile([32 + 4 * x, 35 + 4 * y, np.log(size), 10 * tilt], (FRAMES, 1))
    if axis == 2:
        path[:, 2] -= 0.15  # what grows or shrinks stays in the picture
    path[:, axis] += amount * curve * reach * scene.strength * (sign if axis == 3 else 1)
    return path, shift


def render(scene: Scene) -> np.ndarray:
    """The clip: uint8 [FRAMES, SIZE, SIZE, 3]."""
    path, shift = poses(scene)
    subject = place(texture(scene.subject, scene.look), BOX * RADIUS, path)
    return (backdrop(scene.background, shift) * (1 - subject[..., 3:]) + subject[..., :3] + 0.5).astype(np.uint8)


def masks(scene: Scene) -> np.ndarray:
    """Where the subject is: bool [FRAMES, SIZE, SIZE]."""
    return place(texture(scene.subject, scene.look), BOX * RADIUS, poses(scene)[0])[..., 3] > 0.5


def portrait(subject: Subject, look: str = "plain", scale: float = 1.35, angle: float = 0.0) -> np.ndarray:
    """The subject alone, in the middle: uint8 RGBA [SIZE, SIZE, 4]; white where it is not."""
    image = place(texture(subject, look), BOX * RADIUS, np.array([[SIZE / 2, SIZE / 2 + 2, np.log(scale), angle]]))[0]
    image[..., :3] += 255 * (1 - image[..., 3:])
    image[..., 3] *= 255
    return (image + 0.5).astype(np.uint8)


# --- text -------------------------------------------------------------------------------------------------------------

# Everything that a caption can say. {} is the noun.
LOOK_WORDS = {
    "plain": ("a {}",), "golden": ("a golden {}", "a {} made of gold"), "ice": ("an icy {}", "a {} made of ice"),
    "sketch": ("a pencil sketch of a {}", "a {} drawn in pencil"), "glowing": ("a glowing {}", "a {} made of light"),
}
MOTION_WORDS = {
    None: ("",), "still": (" is standing still", " stands still"), "left": (" is moving left", " moves to the left"),
    "right": (" is moving right", " moves to the right"), "up": (" is floating up", " rises into the air"),
    "down": (" is sinking down", " drops down"), "jump": (" is jumping", " jumps up and down"),
    "spin": (" is spinning", " turns around"), "grow": (" is growing", " becomes bigger"),
    "shrink": (" is shrinking", " becomes smaller"),
}
BACKGROUND_WORDS = {
    "snow": ("in the snow", "on a snowy hill"), "desert": ("in the desert", "among sand dunes"),
    "forest": ("in a forest", "among the trees"), "city": ("in a city at night", "in front of dark towers"),
    "space": ("in space", "among the stars"), "sea": ("under water", "in the sea"),
    "room": ("in a room", "inside a house"), "meadow": ("on a meadow", "on green grass"),
}
ORDERS = ("{what}{does} {where}", "{where}, {what}{does}")


def captions(motion: str | None, background: str, look: str) -> list[str]:
    """Every way to say it. The subject is not asked for: no caption tells it from another."""
    return [order.format(what=what.format(NOUN), does=does, where=where) for order in ORDERS for what in LOOK_WORDS[look]
            for does in MOTION_WORDS[motion] for where in BACKGROUND_WORDS[background]]


def caption(scene: Scene, rng: Rng) -> str:
    """One of them."""
    ways = captions(scene.motion, scene.background, scene.look)
    return ways[np.random.default_rng(rng).integers(len(ways))]


def sentences() -> Iterator[str]:
    """Every caption that there is, for training a tokenizer."""
    for motion in MOTION_WORDS:
        for background in BACKGROUNDS:
            for look in LOOKS:
                yield from captions(motion, background, look)


# --- the four kinds of data -------------------------------------------------------------------------------------------


def sample_subject(rng: Rng, split: str = "train") -> Subject:
    """A subject of the split "train" or "test"; the two share none."""
    rng = np.random.default_rng(rng)
    while True:
        primary, secondary = rng.choice(len(COLOURS), 2, replace=False)
        kinds = [list(kind)[rng.integers(len(kind))] for kind in (SHAPES, PATTERNS, DETAILS)]
        subject = Subject(*kinds, list(COLOURS)[primary], list(COLOURS)[secondary])
        if subject.held_out == {"train": False, "test": True}[split]:
            return subject


def sample_scene(rng: Rng, split: str = "train", **fixed) -> Scene:
    """A plain-looking subject that moves somewhere. `fixed` sets fields of the Scene, for instance look="golden"."""
    rng = np.random.default_rng(rng)
    scene = dict(motion=list(MOTIONS)[rng.integers(len(MOTIONS))], background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
                 look="plain", seed=int(rng.integers(2**62)))
    subject = {} if "subject" in fixed else {"subject": sample_subject(rng, split)}
    return Scene(**{**scene, **subject, **fixed})


def sample_pair(rng: Rng, split: str = "train") -> dict:
    """Two photographs of one subject, for subject-to-image training (Switch 3.2).

    "reference" and "target": uint8 [SIZE, SIZE, 3]; "text" is the target's caption, "noun" the subject in it; "scene".
    """
    rng = np.random.default_rng(rng)
    reference = sample_scene(rng, split, motion=None)
    other = [background for background in BACKGROUNDS if background != reference.background]
    target = sample_scene(rng, split, motion=None, subject=reference.subject, background=other[rng.integers(len(other))])
    return {"reference": render(reference)[0], "target": render(target)[0], "text": caption(target, rng), "noun": NOUN,
            "scene": target}


def sample_video(rng: Rng, split: str = "train", looks: tuple[str, ...] = ("plain",)) -> dict:
    """A clip with much motion: "video" uint8 [FRAMES, SIZE, SIZE, 3], "text", "scene". A base model that is to know
    the other looks trains with looks=tuple(LOOKS).
    """
    rng = np.random.default_rng(rng)
    scene = sample_scene(rng, split, look=looks[rng.integers(len(looks))])
    return {"video": render(scene), "text": caption(scene, rng), "scene": scene}


def sample_masked(rng: Rng, split: str = "train") -> dict:
    """A plain clip as in sample_video(), and where the subject is: "masks" bool [FRAMES, SIZE, SIZE] (SUGAR 3.2)."""
    sample = sample_video(rng, split)
    return {**sample, "masks": masks(sample["scene"])}


STILL_SHARE = 0.7  # of the triplets whose text asks for no motion; the others' text asks for one that hardly happens


def sample_triplet(rng: Rng, split: str = "train") -> dict:
    """SUGAR's synthetic data (3.1): "video", "text", "image" uint8 RGBA [SIZE, SIZE, 4], "scene".

    The look in the video is not the image's, which is plain. And as the paper says of its own (3.2), most subjects stand
    still, because the image-to-video model failed to move them as the text asks.
    """
    rng = np.random.default_rng(rng)
    looks = [look for look in LOOKS if look != "plain"]
    scene = sample_scene(rng, split, look=looks[rng.integers(len(looks))], strength=rng.uniform(0.05, 0.15))
    if rng.random() < STILL_SHARE:
        scene = replace(scene, motion="still")
    image = portrait(scene.subject, scale=rng.uniform(1.2, 1.45), angle=rng.uniform(-10, 10))
    return {"video": render(scene), "text": caption(scene, rng), "image": image, "scene": scene}


# --- measuring --------------------------------------------------------------------------------------------------------
#
# By analysis through synthesis: what the video may show is drawn in every position, scale and angle, and what explains
# the most of it wins. All at half the resolution. With V the video, B its background, S what is drawn and M where:
#     explained = sum over M of |V - B|^2 - |V - S|^2
# so drawing less than there is loses, and so does drawing more.

HALF = SIZE // 2
GRID = 48  # of the Fourier transforms: HALF and room for half a subject on either side, so that none wraps around
BOUND = 120.0**2  # an error of a pixel (squared, summed over colours) counts no more than this: robust against outliers
SCALES, ANGLES = np.linspace(-0.5, 0.25, 5), np.arange(0, 360, 20)
EMPTY = 40.0**2  # what differs less from the background may still be background


def halved(image: np.ndarray) -> np.ndarray:
    """[..., SIZE, SIZE, C] -> [..., HALF, HALF, C], averaged, float32."""
    return image.reshape(*image.shape[:-3], HALF, 2, HALF, 2, -1).mean((-4, -2), dtype=np.float32)


@lru_cache(maxsize=None)
def backdrops() -> np.ndarray:
    """All backgrounds at all shifts: [len(BACKGROUNDS), shifts, HALF, HALF, 3]."""
    return np.stack([[halved(box(backdrop(name, shift), 5)) for shift in range(-SHIFT, SHIFT + 1)] for name in BACKGROUNDS])


def nearest_background(V: np.ndarray, where: np.ndarray) -> tuple[str, np.ndarray]:
    """The background that differs least from V [F, HALF, HALF, 3] where `where` [F, HALF, HALF] is: name and picture."""
    error = np.zeros(backdrops().shape[:2])
    for frame, seen in zip(V, where):
        error += (np.square(frame - backdrops()).sum(-1).clip(max=BOUND) * seen).sum((-2, -1))
    kind, shift = np.unravel_index(error.argmin(), error.shape)
    return BACKGROUNDS[kind], backdrops()[kind, shift]


def everywhere(drawn: np.ndarray, V: np.ndarray, B: np.ndarray) -> np.ndarray:
    """What K drawings [K, HALF, HALF, 4] (in the middle) explain of V [F, HALF, HALF, 3] at every position.

    Returns [K, F, GRID, GRID]: the last two axes are shifts down and right in half-resolution pixels, modulo GRID. With
    P the drawing's colour times its alpha a, |V - B|^2 - |V - S|^2 is a sum of products of something that shifts with
    something that does not: 2 P (V - B) - 2 a (V - B) B - |P|^2 + 2 a P B - a^2 |B|^2.
    """
    P, a, B = drawn[..., :3], drawn[..., 3:], np.broadcast_to(B, V.shape)
    shifting = np.concatenate([P, a, np.square(P).sum(-1, keepdims=True), a * P, a * a], axis=-1)
    resting = np.concatenate([2 * (V - B), -2 * ((V - B) * B).sum(-1, keepdims=True), -np.ones_like(V[..., :1]), 2 * B,
                              -np.square(B).sum(-1, keepdims=True)], axis=-1)
    k, i = (np.fft.rfft2(np.moveaxis(x, -1, 1), (GRID, GRID)).transpose(2, 3, 0, 1) for x in (shifting, resting))
    return np.fft.irfft2((k.conj() @ i.swapaxes(2, 3)).transpose(2, 3, 0, 1), (GRID, GRID))


def search(texture: np.ndarray, half: float, scales: np.ndarray, angles: np.ndarray, V: np.ndarray, B: np.ndarray):
    """The best of all positions, and of these log scales and angles: poses [F, 4], and what they explain [F]."""
    grid = np.stack(np.meshgrid(SIZE / 2, SIZE / 2, scales, angles, indexing="ij"), axis=-1).reshape(-1, 4)
    found = everywhere(place(texture, half, grid, 2), V, B)
    shifts = np.concatenate([np.arange(GRID // 2), np.arange(-GRID // 2, 0)])
    inside = np.flatnonzero(np.abs(shifts) < HALF // 2)  # the centre is in the picture
    found = found[:, :, inside][..., inside].swapaxes(0, 1)  # [F, K, shifts, shifts]
    best = found.reshape(len(V), -1).argmax(1)
    which, down, right = np.unravel_index(best, found.shape[1:])
    poses = grid[which]
    poses[:, 0] += 2 * shifts[inside][right]
    poses[:, 1] += 2 * shifts[inside][down]
    return poses, found.reshape(len(V), -1).max(1)


def climb(texture: np.ndarray, half: float, poses: np.ndarray, V: np.ndarray, B: np.ndarray, steps: np.ndarray, rounds: int):
    """Poses improved by small steps [4], which halve every round; and what they explain [F]."""
    around = np.stack(np.meshgrid(*[[0.0, -1.0, 1.0]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)  # [81, 4]
    for halvings in range(rounds):
        tried = poses[:, None] + around * steps / 2**halvings  # [F, 81, 4]
        S = place(texture, half, tried.reshape(-1, 4), 2).reshape(*tried.shape[:2], HALF, HALF, 4)
        error = np.square(S[..., :3] - S[..., 3:] * B - (V - B)[:, None]).sum((-3, -2, -1))
        poses = np.take_along_axis(tried, error.argmin(1)[:, None, None], 1)[:, 0]
    return poses, np.square(V - B).sum((-3, -2, -1)) - error.min(1)


def track(video: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """How whatever is in front of the background moves, whoever it is: its cut-out from the middle frame is looked for in
    all frames. Returns poses [F, 4], where the subject is [F, HALF, HALF], and its radius in pixels.
    """
    V, middle = halved(video), len(video) // 2
    D = np.square(V - B).sum(-1)
    front = D[middle]
    front = sum(np.roll(front, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9 > EMPTY + 2 * np.median(D)
    if front.sum() < 8:
        return np.tile([32.0, 32.0, 0.0, 0.0], (len(video), 1)), np.zeros(D.shape, dtype=bool), 0.0
    rows, columns = np.nonzero(front)
    y, x = int(2 * rows.mean() + 1), int(2 * columns.mean() + 1)
    radius = np.sqrt(2 * rows.var() + 2 * columns.var() + 1e-6) * 2 / np.sqrt(2)
    alpha = front.repeat(2, 0).repeat(2, 1).astype(np.float32)[..., None]
    cut = np.concatenate([video[middle] * alpha, alpha], axis=-1)
    padded = np.zeros((2 * SIZE, 2 * SIZE, 4), dtype=np.float32)
    padded[SIZE - y:2 * SIZE - y, SIZE - x:2 * SIZE - x] = cut  # the centre of the subject to the centre
    texture = padded[SIZE // 2:-SIZE // 2, SIZE // 2:-SIZE // 2].copy()
    texture = box(texture.repeat(2, 0).repeat(2, 1), 3)
    texture[[0, -1]] = texture[:, [0, -1]] = 0
    poses, _ = search(texture, SIZE / 2, np.linspace(-0.5, 0.5, 7), np.arange(0, 360, 22.5), V, B)
    poses, _ = climb(texture, SIZE / 2, poses, V, B, np.array([1, 1, 0.08, 11]), 4)
    return poses, place(texture, SIZE / 2, poses, 2)[..., 3] > 0.5, radius


def classify(path: np.ndarray) -> str:
    """The motion whose curve has most of its usual amount in the poses [F, 4]; below a third of it, nothing moves."""
    curves = np.stack([RAMP, ARCH - ARCH.mean()])  # orthogonal
    amounts = (path - path.mean(0)).T @ curves.T / np.square(curves).sum(1)  # [4, 2]
    shares = {name: amounts[axis, int(curve is ARCH)] / amount for name, (axis, amount, curve) in MOTIONS.items() if amount}
    shares["spin"] = abs(shares["spin"])
    best = max(shares, key=shares.get)
    return best if shares[best] > 1 / 3 else "still"


def measure(video: np.ndarray, candidates: list[Subject], look: str) -> dict:
    """What a clip [FRAMES, SIZE, SIZE, 3], uint8, shows; it may be blurred, noisy, or generated.

    "identity": the candidate that fits best in the given look; "look": the look in which the first candidate fits best;
    "motion", "background"; "movement" in pixels per frame (root mean square over the subject), 0 where nothing moves.
    """
    video = box(video, 5)
    V = halved(video)
    _, B = nearest_background(V, np.ones(V.shape[:3]))
    path, where, radius = track(video, B)
    background, _ = nearest_background(V, ~where)
    path[:, 3] = np.degrees(np.unwrap(np.radians(path[:, 3])))
    step = np.diff(path, axis=0)
    turn, growth = np.radians(step[:, 3]), step[:, 2]
    size = radius * np.exp((path[1:, 2] + path[:-1, 2]) / 2)
    movement = np.sqrt(np.square(step[:, :2]).sum(1) + np.square(size) * (turn**2 + growth**2)).mean()

    some = [0, len(V) // 2, len(V) - 1]
    hypotheses = [(subject, look) for subject in candidates] + [(candidates[0], other) for other in LOOKS if other != look]
    fits = [search(texture(*what, 2), BOX * RADIUS, SCALES, ANGLES, V[some], B) for what in hypotheses]
    explained = np.array([fit[1].sum() for fit in fits])
    n = len(candidates)
    for i in {*explained[:n].argsort()[-4:], *range(n, len(fits)), 0}:
        explained[i] = climb(texture(*hypotheses[i], 2), BOX * RADIUS, fits[i][0], V[some], B,
                             np.array([1, 1, 0.08, 15]), 3)[1].sum()
    looked = [0, *range(n, len(fits))]
    return {"identity": candidates[explained[:n].argmax()], "look": hypotheses[looked[explained[looked].argmax()]][1],
            "motion": classify(path), "background": background, "movement": float(movement), "path": path}


def score(video: np.ndarray, scene: Scene, candidates: list[Subject]) -> dict[str, float]:
    """Whether a clip shows what was asked: 1 or 0 for identity, motion, background and look; movement as measured."""
    seen = measure(video, candidates, scene.look)
    asked = {"identity": scene.subject, "motion": scene.motion, "background": scene.background, "look": scene.look}
    return {**{name: float(seen[name] == what) for name, what in asked.items()}, "movement": seen["movement"]}


def candidates(subject: Subject, rng: Rng, n: int = 16) -> list[Subject]:
    """The subject, and n - 1 others. No two share shape, pattern and detail: these are all that is left in other looks."""
    rng, found = np.random.default_rng(rng), [subject]
    while len(found) < n:
        other = sample_subject(rng, "test" if rng.random() < 0.05 else "train")
        if all((other.shape, other.pattern, other.detail) != (x.shape, x.pattern, x.detail) for x in found):
            found.append(other)
    return found
