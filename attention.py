"""Attention: SUGAR's selective attention (section 3.2, Figure 4), rotary positions, and the one attention call.

    python attention.py        draws the five designs as in Figure 4 -> designs.png
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The groups of tokens, in the order in which they stand in the sequence. "image" is DINO and CLIP tokens together.
GROUPS = ("image", "text", "first", "other")

# Selective attention, as data: for each design, which groups the queries of each group may attend to. To try a design
# of your own, add a row; the mask, the fast path below, the picture and `--design` follow from it.
# The paper states the image-frame cells of (a) and (b); the rest is our reading of its Figure 4 (see README).
DESIGNS = {
    #    image may see             text may see              first frame may see       other frames may see
    "a": ("image text",            "text first other",       "text first other",       "text first other"),
    "b": ("image text",            "text first other",       "image text first other", "text first other"),
    "c": ("image text first",      "text first other",       "image text first other", "text first other"),
    "d": ("image text",            "text first other",       "image text first other", "image text first other"),
    "e": ("image text first other", "image text first other", "image text first other", "image text first other"),
}

# The queries of one slice attend, unmasked, to the keys of a few slices.
Segment = tuple[slice, list[slice]]


def groups_seen(design: str) -> list[list[str]]:
    """For each of GROUPS, whom its queries may attend to."""
    seen = [groups.split() for groups in DESIGNS[design]]
    unknown = {group for groups in seen for group in groups} - {*GROUPS}
    if unknown or len(seen) != len(GROUPS):
        raise ValueError(f"Design {design!r} of DESIGNS has {len(seen)} cells and names {sorted(unknown)}: it needs one cell for each of "
                         f"{', '.join(GROUPS)}, of these names alone.")
    return seen


def selective_mask(design: str, lengths: tuple[int, int, int, int]) -> Tensor:
    """The boolean mask of a design: [L, L], True where the row's token may attend to the column's.

    lengths: tokens in each of GROUPS. This mask is the definition; attention() computes the same without it.
    """
    table = torch.tensor([[key in seen for key in GROUPS] for seen in groups_seen(design)])  # [4, 4]
    group = torch.repeat_interleave(torch.arange(len(GROUPS)), torch.tensor(lengths))  # [L], each token's group
    return table[group][:, group]


def selective_segments(design: str, lengths: tuple[int, int, int, int]) -> list[Segment]:
    """The same design as a few unmasked attentions: neighbouring groups that see the same keys share one, and
    neighbouring keys share a slice. With GROUPS in this order each of (a) to (e) needs a single slice of keys.
    """
    ends = torch.tensor(lengths).cumsum(0).tolist()
    span = {group: (end - n, end) for group, end, n in zip(GROUPS, ends, lengths)}
    segments: list[tuple[list, list]] = []
    for group, seen in zip(GROUPS, groups_seen(design)):
        if span[group][0] == span[group][1]:
            continue
        keys: list[tuple[int, int]] = []
        for low, high in (span[key] for key in GROUPS if key in seen):
            if keys and keys[-1][1] == low:
                keys[-1] = (keys[-1][0], high)
            elif low < high:
                keys.append((low, high))
        if segments and segments[-1][1] == keys:
            segments[-1][0][1] = span[group][1]
        else:
            segments.append((list(span[group]), keys))
    return [(slice(*queries), [slice(*key) for key in keys]) for queries, keys in segments]


def attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment] | None = None, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, everything with everything, or segment by segment (Switch eq. 2, SUGAR Figure 4).

    q, k, v: [B, heads, L, d]; returns [B, heads, L, d]. The queries of `segments` cover 0..L in order. key_mask: [B, L] bool, False for
    keys that a sample lacks; only without segments.
    """
    assert segments is None or key_mask is None, "segments know no key_mask"
    if segments is None:
        return dense(q, k, v, None if key_mask is None else key_mask[:, None, None])
    out = []
    for (_, keys), part in zip(segments, q.split([queries.stop - queries.start for queries, _ in segments], dim=2)):
        if not keys:  # the groups that they may attend to are empty, as the frames behind the first are in a picture
            out.append(torch.zeros_like(part))
            continue
        seen = (x[:, :, keys[0]] if len(keys) == 1 else torch.cat([x[:, :, key] for key in keys], dim=2) for x in (k, v))
        out.append(dense(part, *seen))
    # Joined as the kernels lay them out, [B, L, heads, d], so that nothing is copied when the heads are merged.
    return out[0] if len(out) == 1 else torch.cat([x.transpose(1, 2) for x in out], dim=1).transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by torch's kernel for the device. On the CPU the backward pass of that kernel takes three
    times as long in bfloat16 as in float32 where sequences are short, so there training takes the way through float32."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad and q.shape[2] * k.shape[2] <= 256**2:
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask)


def rotary_3d(frames: int, height: int, width: int, dim: int, base: tuple[int, int] | None) -> Tensor:
    """Rotary positions of a [frames, height, width] grid of patches: [frames*height*width, dim], for each pair of channels the
    cosine and the sine of its angle, that is a number on the complex unit circle.

    A quarter of `dim` turns with time, three eighths each with height and width. CogVideoX 1.0 stretches the spatial
    grid to the `base` (height, width) in patches that it was trained at, keeping the aspect ratio and centring it; 1.5
    (base None) counts patches from the top left corner.
    """
    rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    if base is not None:
        (top, left), (bottom, right) = resize_and_centre(height, width, *base)
        rows = torch.linspace(top, bottom * (height - 1) / height, height)
        columns = torch.linspace(left, right * (width - 1) / width, width)
    axes = (torch.arange(frames, dtype=torch.float32), dim // 4), (rows, dim // 8 * 3), (columns, dim // 8 * 3)
    angles = []
    for position, d in axes:
        frequency = 1.0 / 10000 ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
        angles.append(torch.outer(position, frequency))  # [n, d / 2]
    t, h, w = angles
    grid = (frames, height, width)
    angle = torch.cat([t[:, None, None].expand(*grid, -1), h[None, :, None].expand(*grid, -1),
                       w[None, None].expand(*grid, -1)], dim=-1).flatten(0, 2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(-2)


def resize_and_centre(height: int, width: int, base_height: int, base_width: int):
    """(top, left), (bottom, right) of a height x width grid scaled to fit into the base grid and centred in it."""
    if height / width > base_height / base_width:
        new_height, new_width = base_height, round(base_height / height * width)
    else:
        new_height, new_width = round(base_width / width * height), base_width
    top, left = round((base_height - new_height) / 2), round((base_width - new_width) / 2)
    return (top, left), (top + new_height, left + new_width)


def may_overwrite() -> bool:
    """Whether a tensor that nobody will ask for again may be overwritten, which spares memory and the time to clear it: where no
    gradient is asked for, and no compiler sees to it."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels of x [..., d] by its angle (Switch eq. 1), in float32: a complex product. rotary:
    rotary_3d(), with the same dimensions or ones that broadcast."""
    if torch.compiler.is_compiling():  # torch's compiler cannot fuse complex numbers
        (a, b), (cos, sin) = (y.unflatten(-1, (-1, 2)).unbind(-1) for y in (x.float(), rotary))
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    return torch.view_as_real(as_complex(x.float()) * as_complex(rotary)).flatten(-2).to(x.dtype)


def as_complex(x: Tensor) -> Tensor:
    """x [..., d] as [..., d / 2] complex numbers, in the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def apply_rotary_(x: Tensor, rotary: Tensor) -> Tensor:
    """apply_rotary() in place."""
    pairs = as_complex(x.float()).mul_(as_complex(rotary))  # of a float32 x this is x itself
    return x if x.dtype == torch.float32 else x.copy_(torch.view_as_real(pairs).flatten(-2))


def draw_designs(file: str = "designs.png", cell: int = 56) -> None:
    """Figure 4: a panel for each design, a row for each query group, shaded where it may attend to the key group."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    side, label, gap, head = cell * len(GROUPS), 56, 28, 58
    picture = Image.new("RGB", (label + len(DESIGNS) * (side + gap), head + side + 44), "white")
    draw = ImageDraw.Draw(picture)
    for row, group in enumerate(GROUPS):
        draw.text((label - 8, head + (row + 0.5) * cell), group, fill="black", font=small, anchor="rm")
    for panel, design in enumerate(DESIGNS):
        left = label + panel * (side + gap)
        seen = selective_mask(design, (1,) * len(GROUPS))
        for column, group in enumerate(GROUPS):
            draw.text((left + (column + 0.5) * cell, head - 8), group, fill="black", font=small, anchor="ms")
            for row in range(len(GROUPS)):
                box = (left + column * cell, head + row * cell, left + (column + 1) * cell, head + (row + 1) * cell)
                draw.rectangle(box, fill="#8fb3d9" if seen[row, column] else "white", outline="#30475e", width=2)
        draw.text((left + side / 2, head + side + 12), f"({design})", fill="black", font=font, anchor="mt")
    draw.text((label, 8), "rows: queries    columns: keys    shaded: may attend", fill="#30475e", font=small)
    picture.save(file)


if __name__ == "__main__":
    draw_designs()
    print("wrote designs.png")
