"""Selective attention beside the table in brute force, the fast path beside the mask, rotary beside diffusers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import attention
from attention import DESIGNS, GROUPS, apply_rotary, draw_designs, rotary_3d, selective_segments, selective_mask

# SUGAR Figure 4 as the README reads it, cell by cell: which designs let this query see this key.
TABLE = {
    ("image", "image"): "abcde", ("image", "text"): "abcde", ("image", "first"): "ce", ("image", "other"): "e",
    ("text", "image"): "e", ("text", "text"): "abcde", ("text", "first"): "abcde", ("text", "other"): "abcde",
    ("first", "image"): "bcde", ("first", "text"): "abcde", ("first", "first"): "abcde", ("first", "other"): "abcde",
    ("other", "image"): "de", ("other", "text"): "abcde", ("other", "first"): "abcde", ("other", "other"): "abcde",
}
lengths = st.tuples(*[st.integers(0, 5)] * 4).filter(lambda n: sum(n) > 0)
any_table = st.tuples(*[st.sets(st.sampled_from(GROUPS), min_size=1).map(" ".join)] * 4)


@given(st.sampled_from("abcde"), lengths)
def test_the_mask_is_the_table(design, lengths):
    group = [name for name, n in zip(GROUPS, lengths) for _ in range(n)]
    mask = selective_mask(design, lengths)
    for i, query in enumerate(group):
        for j, key in enumerate(group):
            assert mask[i, j] == (design in TABLE[query, key]), (design, query, key)


@given(st.sampled_from("abcde"), lengths)
def test_each_design_needs_one_slice_of_keys_for_each_group_of_queries(design, lengths):
    assert all(len(keys) <= 1 for _, keys in selective_segments(design, lengths))


@given(any_table, lengths, st.integers(0, 2**31))
def test_blocks_compute_what_the_mask_does_for_any_table(table, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 2, sum(lengths), 8, generator=generator)
    DESIGNS["mine"] = table
    try:
        mask, segments = selective_mask("mine", lengths), selective_segments("mine", lengths)
    finally:
        del DESIGNS["mine"]
    ours, sees = attention.attention(q, k, v, segments), mask.any(dim=1)  # a group may see only groups that are empty
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~sees[:, None])
    assert relative_error(ours[:, :, sees], theirs[:, :, sees]) < 1e-5 if sees.any() else True
    assert not ours[:, :, ~sees].any()


@pytest.mark.parametrize("table", [("imag text",) * 4, ("image text",) * 3])
def test_a_table_with_a_slip_of_the_pen_is_refused(table, monkeypatch):
    monkeypatch.setitem(DESIGNS, "mine", table)
    for use in (selective_mask, selective_segments):
        with pytest.raises(ValueError, match="one cell for each of image, text, first, other"):
            use("mine", (1, 1, 1, 1))


@pytest.mark.parametrize("design", DESIGNS)
def test_blocks_at_a_real_length(design):
    lengths = (514, 226, 1350, 1350)  # DINO and CLIP, T5, and two latent frames of 60x90
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 64)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=selective_mask(design, lengths))
    assert relative_error(attention.attention(q, k, v, selective_segments(design, lengths)), theirs) < 1e-5


@pytest.mark.parametrize("frames,height,width", [(13, 30, 45), (4, 17, 33), (1, 40, 10)])
@pytest.mark.parametrize("base", [(30, 45), None])
def test_rotary_beside_diffusers(frames, height, width, base):
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    if base:
        where = dict(crops_coords=get_resize_crop_region_for_grid((height, width), base[1], base[0]))
    else:
        where = dict(crops_coords=None, grid_type="slice", max_size=(150, 150))
    theirs = get_3d_rotary_pos_embed(64, grid_size=(height, width), temporal_size=frames, **where)
    ours = rotary_3d(frames, height, width, 64, base)
    x = torch.randn(2, 3, frames * height * width, 64)
    for part, wanted in zip(ours.unflatten(-1, (-1, 2)).unbind(-1), theirs):
        assert relative_error(part.repeat_interleave(2, dim=1), wanted) < 1e-5  # they have each number twice, for both of a pair
    assert relative_error(apply_rotary(x, ours), apply_rotary_emb(x, theirs)) < 1e-5


def test_the_picture_shows_the_table(tmp_path):
    draw_designs(tmp_path / "designs.png", cell=56)
    picture = Image.open(tmp_path / "designs.png")
    for panel, design in enumerate(DESIGNS):
        for row, query in enumerate(GROUPS):
            for column, key in enumerate(GROUPS):
                x, y = 56 + panel * (4 * 56 + 28) + column * 56 + 28, 58 + row * 56 + 28
                shaded = picture.getpixel((x, y)) != (255, 255, 255)
                assert shaded == (design in TABLE[query, key]), (design, query, key)
