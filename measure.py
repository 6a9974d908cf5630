"""What a clip of the toy's world shows, measured exactly. No networks.

Analysis by synthesis: what a video may show is drawn at every position, scale and angle, and what explains most wins.
With V the video, B its background and S the drawing over B, it explains |V - B|^2 - |V - S|^2, summed over all
pixels: to draw less than there is loses as much as to draw more. All at half the resolution, after a blur that makes
noise and small misfits harmless.
"""

from functools import lru_cache

import numpy as np
from numpy import ndarray

from world import BACKGROUNDS, LOOKS, MOTIONS, REACH, SHIFT, SIZE, Scene, Subject, backdrop, box, place, texture

HALF, BLUR = SIZE // 2, 5  # pixels
GRID = 48  # of the Fourier transforms: HALF, and room for half a subject on either side, so that none wraps around
BOUND = 120.0**2  # no pixel's squared error counts more than this when backgrounds are compared: subjects are outliers
SHARES = np.linspace(0, 1.4, 29)  # of a motion's usual amount
GAIN = 0.07  # of what standing still leaves unexplained: noise on a still clip gains 0.06 at most, true motions 0.2 at least
EMPTY = 40.0**2  # what differs less from the background (squared, summed over colours) is not yet a subject


def halved(image: ndarray) -> ndarray:
    """[..., SIZE, SIZE, C] -> [..., HALF, HALF, C]"""
    return image.reshape(*image.shape[:-3], HALF, 2, HALF, 2, -1).mean((-4, -2), dtype=np.float32)


@lru_cache(maxsize=None)
def backdrops() -> ndarray:
    """Every background at every shift: [len(BACKGROUNDS), shifts, HALF, HALF, 3]."""
    shifts = range(-SHIFT, SHIFT + 1)
    return np.stack([[halved(box(backdrop(name, shift), BLUR)) for shift in shifts] for name in BACKGROUNDS])


def fit(texture: ndarray, reach: float, scales: ndarray, angles: ndarray, V: ndarray, B: ndarray):
    """The poses at which a texture explains most of V [F, HALF, HALF, 3] before B [HALF, HALF, 3]: [F, 4], and how much
    it explains: [F].

    First these log scales and angles at all positions at once: with P the drawn colours times their alpha a, it
    explains 2 P (V - B) - 2 a (V - B) B - |P|^2 + 2 a P B - a^2 |B|^2, which correlates what moves with what does not.
    """
    grid = np.stack(np.meshgrid(SIZE / 2, SIZE / 2, scales, angles), axis=-1).reshape(-1, 4)  # [K, 4]
    drawn, B = place(texture, reach, grid, 2), np.broadcast_to(B, V.shape)
    P, a, total = drawn[..., :3], drawn[..., 3:], lambda x: x.sum(-1, keepdims=True)
    moved = np.concatenate([2 * P, -2 * a, total(P * P), 2 * a * P, a * a], axis=-1)
    fixed = np.concatenate([V - B, total((V - B) * B), -np.ones_like(V[..., :1]), B, -total(B * B)], axis=-1)
    moved, fixed = (np.fft.rfft2(np.moveaxis(x, -1, 1), (GRID, GRID)).transpose(2, 3, 0, 1) for x in (moved, fixed))
    explained = np.fft.irfft2((moved.conj() @ fixed.swapaxes(2, 3)).transpose(3, 2, 0, 1), (GRID, GRID))  # [F, K, ...]
    shifts = np.r_[0 : HALF // 2, -HALF // 2 : 0]  # the centre stays in the picture
    explained = explained[:, :, shifts][..., shifts].reshape(len(V), -1)
    which, down, right = np.unravel_index(explained.argmax(1), (len(grid), HALF, HALF))
    poses = grid[which] + 2 * np.stack([shifts[right], shifts[down], 0 * right, 0 * right], axis=1)
    # Then by small steps in all four at once, which halve every time.
    steps = np.stack(np.meshgrid(*[[0.0, -1.0, 1.0]] * 4), axis=-1).reshape(-1, 4)  # [81, 4]
    for size in (1, 0.5, 0.25):
        tried = poses[:, None] + steps * size * (1, 1, 0.08, 12)
        S = place(texture, reach, tried.reshape(-1, 4), 2).reshape(len(V), -1, HALF, HALF, 4)
        error = np.square(S[..., :3] - S[..., 3:] * B[:, None] - (V - B)[:, None]).sum((-3, -2, -1))
        poses = tried[np.arange(len(V)), error.argmin(1)]
    return poses, np.square(V - B).sum((-3, -2, -1)) - error.min(1)


def motion_of(video: ndarray, B: ndarray) -> tuple[str, float]:
    """How what is in front of B moves, whoever it is, and how much. What the middle one of the frames [F, SIZE, SIZE, 3] shows there
    is drawn in all of them, moved as each of the motions by each share of its usual amount; what explains the clip best wins. Below a
    third of the amount nothing moves, nor where the path explains less than GAIN of what standing still does not.

    How much: that share, 1 at most, times how far the frames agree, as what tears from place to place does not move: of what the
    path gains over standing still, frame by frame, the sum over the sum of the magnitudes.
    """
    V, middle = halved(video), len(video) // 2
    D = np.square(V - B).sum(-1)[middle]
    front = box(D[..., None], 3) > EMPTY + 2 * np.median(D)
    front = box(front, 3) > 0.99  # without the rim, into which a background is mixed that stays where it is
    if front.sum() < 8:  # nothing there
        return "still", 0.0
    rows, columns, _ = np.nonzero(front)
    y, x = int(2 * rows.mean() + 1), int(2 * columns.mean() + 1)
    alpha = front.repeat(2, 0).repeat(2, 1)
    cut = np.zeros((2 * SIZE, 2 * SIZE, 4), dtype=np.float32)  # its middle on the middle
    cut[SIZE - y : 2 * SIZE - y, SIZE - x : 2 * SIZE - x] = np.concatenate([video[middle] * alpha, alpha], axis=-1)
    cut = box(cut[HALF:-HALF, HALF:-HALF].repeat(2, 0).repeat(2, 1), 3)
    cut[[0, -1]] = cut[:, [0, -1]] = 0  # place() repeats the border

    best = ("still", 0.0, np.zeros(1))  # what moves, by which share, and each frame's gain over standing still
    for name, (_, _, part, amount, curve) in MOTIONS.items():
        for way in (1, -1) if name == "spin" else (1,) if amount else ():
            poses = np.tile([x, y, 0.0, 0.0], (len(SHARES), len(V), 1))
            poses[..., part] += SHARES[:, None] * way * amount * (curve - curve[middle])
            S = place(cut, HALF, poses.reshape(-1, 4), 2).reshape(len(SHARES), len(V), HALF, HALF, 4)
            error = np.square(S[..., :3] + (1 - S[..., 3:]) * B - V).sum((-3, -2, -1))  # [shares, F]
            gain, still = error[0] - error, error[0].sum()
            most = gain.sum(1).argmax()
            if gain[most].sum() > max(best[2].sum(), GAIN * still):
                best = name, SHARES[most], gain[most]
    name, share, gain = best
    return name if share > 1 / 3 else "still", float(min(share, 1.0) * gain.sum() / max(np.abs(gain).sum(), 1e-9))


def measure(video: ndarray, candidates: list[Subject], look: str) -> dict:
    """What a clip shows: uint8 [FRAMES, SIZE, SIZE, 3]; it may be blurred, noisy, or generated. Takes about a second.

    "identity": the candidate that fits best in the given look. "look": that in which the first candidate fits best.
    "motion", "background". "movement": how much moves at all, as a share of the usual amount of that motion.
    """
    video = box(video, BLUR)
    V = halved(video)
    error = sum(np.square(frame - backdrops()).sum(-1).clip(max=BOUND).sum((-2, -1)) for frame in V)
    kind, shift = np.unravel_index(error.argmin(), error.shape)
    B = backdrops()[kind, shift]
    motion, movement = motion_of(video, B)
    V = V[[0, len(V) // 2, -1]]  # three frames suffice for the rest
    explained = {(subject, dressed): fit(texture(subject, dressed, 13), REACH, np.linspace(-0.4, 0.4, 4),
                                         np.arange(0, 360, 30), V, B)[1].sum()
                 for subject in candidates for dressed in (LOOKS if subject == candidates[0] else [look])}
    return {"identity": max(candidates, key=lambda subject: explained[subject, look]),
            "look": max(LOOKS, key=lambda dressed: explained[candidates[0], dressed]),
            "motion": motion, "movement": movement, "background": list(BACKGROUNDS)[kind]}


def score(video: ndarray, scene: Scene, candidates: list[Subject]) -> dict[str, float]:
    """Whether a clip shows what was asked, 1 or 0 for identity, motion, background and look; and its movement."""
    seen = measure(video, [scene.subject, *(other for other in candidates if other != scene.subject)], scene.look)
    asked = {"identity": scene.subject, "motion": scene.motion, "background": scene.background, "look": scene.look}
    return {**{name: float(seen[name] == what) for name, what in asked.items()}, "movement": seen["movement"]}
