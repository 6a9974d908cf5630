"""media.py: every photograph a person may bring opens the same way, is cut out and fitted; videos are written whole."""

import io
import json
import os
import secrets
import stat
import zlib

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

import media
from checkpoint import BadInput, replace_when_whole

# One that never changes and a fresh one, on which pytest's workers agree; the name of a failing test shows it.
SEEDS = [0, zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex()).encode()) >> 1]
sides = st.integers(1, 255)
multiples = st.integers(1, 12).map(lambda k: 16 * k)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def places(width: int, height: int) -> Image.Image:
    """Every pixel says where it lies: red is x, green is y, blue is 0 (white is nowhere)."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1))


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_rgb_and_rgba_open_as_they_are(tmp_path, mode, seed):
    pixels = noise(seed, 6, 9, len(mode))
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = media.open_image(tmp_path / "x.png")
    assert image.mode == mode and np.array_equal(image, pixels)


@pytest.mark.parametrize("seed", SEEDS)
def test_grey_is_three_equal_channels(tmp_path, seed):
    grey = noise(seed, 6, 9)
    Image.fromarray(grey).save(tmp_path / "x.png")
    image = media.open_image(tmp_path / "x.png")
    assert image.mode == "RGB" and np.array_equal(image, np.stack(3 * [grey], axis=-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_grey_with_alpha_keeps_its_alpha(tmp_path, seed):
    grey = noise(seed, 6, 9, 2)
    Image.fromarray(grey, "LA").save(tmp_path / "x.png")
    image = media.open_image(tmp_path / "x.png")
    assert image.mode == "RGBA" and np.array_equal(image, grey[..., [0, 0, 0, 1]])


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_a_palette_is_looked_up(tmp_path, name):
    colours = np.array([[200, 30, 40], [10, 220, 60], [70, 80, 240]], dtype=np.uint8)
    chosen = np.arange(12).reshape(3, 4) % 3
    palette = Image.fromarray(chosen.astype(np.uint8), "P")
    palette.putpalette(colours.flatten().tolist())
    palette.save(tmp_path / name)
    image = media.open_image(tmp_path / name)
    assert image.mode == "RGB" and np.array_equal(image, colours[chosen])


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_a_palettes_transparent_colour_becomes_alpha(tmp_path, name):
    palette = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / name, transparency=1)
    image = media.open_image(tmp_path / name)
    assert image.mode == "RGBA"
    assert np.array_equal(image.getchannel("A"), [[255, 0], [0, 255]])
    assert image.getpixel((0, 0)) == (255, 0, 0, 255) and image.getpixel((1, 1)) == (0, 0, 255, 255)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_png_may_name_one_colour_as_transparent(tmp_path, mode):
    picture = Image.new(mode, (4, 2), 9 if mode == "L" else (9, 9, 9))
    picture.putpixel((1, 0), 5 if mode == "L" else (5, 5, 5))
    picture.save(tmp_path / "x.png", transparency=5 if mode == "L" else (5, 5, 5))
    assert np.array_equal(media.open_image(tmp_path / "x.png").getchannel("A"), [[255, 0, 255, 255], 4 * [255]])


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize("brightest", [65535, 30000, 200], ids=["bright", "dim", "almost black"])
def test_16_bits_of_grey_become_8_whatever_the_brightest(tmp_path, name, brightest):
    deep = np.linspace(0, brightest, 24).astype(np.uint16).reshape(4, 6)
    Image.fromarray(deep).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == "I;16"
    image = media.open_image(tmp_path / name)
    wanted = np.stack(3 * [deep / 65535 * 255], axis=-1)
    assert image.mode == "RGB" and np.abs(np.array(image) - wanted).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("name", ["x.tif", "x.jpg"])
def test_printers_inks_become_light(tmp_path, name):
    """CMYK: no ink is white, all the cyan there is leaves no red, all the black there is leaves nothing."""
    inks = {(0, 0, 0, 0): ("RGB", ""), (255, 0, 0, 0): ("GB", "R"), (0, 0, 0, 255): ("", "RGB")}
    for ink, (light, dark) in inks.items():
        Image.new("CMYK", (16, 16), ink).save(tmp_path / name)
        assert Image.open(tmp_path / name).mode == "CMYK"
        image = media.open_image(tmp_path / name)
        pixel = dict(zip(image.mode, image.getpixel((8, 8)), strict=True))
        assert set(pixel) == set("RGB")
        assert all(pixel[c] > 140 for c in light) and all(pixel[c] < 60 for c in dark), (ink, pixel)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.bmp"])
def test_one_bit_is_black_or_white(tmp_path, name):
    bits = np.arange(24).reshape(4, 6) % 5 < 2
    Image.fromarray(bits).save(tmp_path / name)
    image = media.open_image(tmp_path / name)
    assert image.mode == "RGB" and np.array_equal(image, np.stack(3 * [255 * bits], axis=-1))


# For each orientation of the EXIF standard, how a camera that writes it has turned the upright picture.
TURNED = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
          7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_turned_photograph_is_upright(tmp_path, orientation, mode):
    upright = places(7, 4).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if TURNED[orientation] is None else upright.transpose(TURNED[orientation])
    stored.save(tmp_path / "x.png", exif=exif)
    image = media.open_image(tmp_path / "x.png")
    assert image.size == (7, 4) and np.array_equal(image.convert("RGB"), upright.convert("RGB"))


def test_a_name_may_lie_about_the_format(tmp_path):
    places(7, 4).save(tmp_path / "x.jpg", format="PNG")
    assert np.array_equal(media.open_image(tmp_path / "x.jpg"), places(7, 4))


# --- not opening ------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_cut_anywhere_is_refused_or_had_all_its_pixels(tmp_path, format, seed):
    """The last bytes of some formats hold no pixels; whatever else is missing is noticed."""
    whole = encoded(Image.fromarray(noise(seed, 12, 20, 3)), format)
    path = tmp_path / f"x.{format.lower()}"
    path.write_bytes(whole)
    pixels, refused = np.array(media.open_image(path)), 0
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(media.open_image(path), pixels), f"cut at {length}"
        except BadInput as error:
            assert str(path) in str(error), f"cut at {length}"
            refused += 1
    assert refused >= (len(whole) - 30) // 7


@pytest.mark.parametrize("content", [b"", b"fox", b"\x89PNG\r\n\x1a\n", b"P6\n0 4\n255\n", b"GIF89a\0\0\0\0\0\0\0;"],
                         ids=["nothing", "text", "only a signature", "no width", "no size"])
def test_what_holds_no_pixels_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadInput, match="x.png"):
        media.open_image(tmp_path / "x.png")


def test_what_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(BadInput, match="nowhere.png"):
        media.open_image(tmp_path / "nowhere.png")
    with pytest.raises(BadInput, match=tmp_path.name):
        media.open_image(tmp_path)


# --- cutting out ------------------------------------------------------------------------------------------------------


def test_alpha_is_a_mask_only_where_something_is_transparent():
    assert media.alpha_mask(Image.new("RGB", (4, 4))) is None
    assert media.alpha_mask(Image.new("RGBA", (4, 4), (1, 2, 3, 255))) is None
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 255))
    image.putpixel((2, 1), (1, 2, 3, 0))
    assert np.array(media.alpha_mask(image))[1, 2] == 0


@given(left=st.integers(0, 30), top=st.integers(0, 30), width=st.integers(1, 30), height=st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_a_cut_out_is_the_bounding_box_of_its_mask(left, top, width, height):
    image, mask = places(60, 61), Image.new("L", (60, 61))
    box = (left, top, left + width, top + height)
    mask.paste(255, box)
    assert np.array_equal(media.cut_out(image, mask), np.array(image.crop(box)))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_stands_on_white():
    image = Image.new("RGB", (8, 6), "white")
    image.putpixel((3, 3), (0, 0, 0))
    assert media.stands_on_white(image)
    for at in ((0, 3), (7, 3), (3, 0), (3, 5)):
        other = image.copy()
        other.putpixel(at, (255, 255, 200))
        assert not media.stands_on_white(other)


def test_a_cut_out_is_white_around_the_subject_and_blends_at_soft_edges(seed):
    pixels, weights = noise(seed, 10, 12, 3), noise(seed + 1, 10, 12)
    weights[[0, -1]] = weights[:, [0, -1]] = 255  # so that the box is the whole image
    cut = np.array(media.cut_out(Image.fromarray(pixels), Image.fromarray(weights))).astype(float)
    share = weights[..., None] / 255
    assert np.abs(cut - (share * pixels + (1 - share) * 255)).max() <= 1


@pytest.mark.parametrize("value", [0, 100])
def test_a_mask_of_nothing_is_refused(value):
    with pytest.raises(BadInput, match="empty"):
        media.cut_out(Image.new("RGB", (4, 4)), Image.new("L", (4, 4), value))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "RGBA"])
def test_a_mask_is_what_is_white_or_opaque(tmp_path, mode):
    shape = Image.new("L", (8, 6))
    shape.paste(255, (2, 1, 5, 4))
    picture = Image.merge("RGBA", 3 * [Image.new("L", (8, 6), 90)] + [shape]) if mode == "RGBA" else shape.convert(mode)
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(media.open_mask(tmp_path / "mask.png", Image.new("RGB", (8, 6))), shape)


def test_a_mask_of_another_size_is_refused(tmp_path):
    Image.new("L", (8, 6)).save(tmp_path / "mask.png")
    with pytest.raises(BadInput, match="8x6.*9x6"):
        media.open_mask(tmp_path / "mask.png", Image.new("RGB", (9, 6)))


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert np.array_equal(media.on_white(image), [[[10, 20, 30], [255, 255, 255]]])


# --- fitting ----------------------------------------------------------------------------------------------------------


@given(width=sides, height=sides, frame_width=multiples, frame_height=multiples, how=st.sampled_from(["crop", "pad"]))
@example(width=1, height=255, frame_width=16, frame_height=16, how="pad")
@example(width=255, height=1, frame_width=16, frame_height=192, how="crop")
@settings(max_examples=150, deadline=None)
def test_a_fitted_image_has_the_size_of_the_frame(width, height, frame_width, frame_height, how):
    fitted = media.fit(Image.new("RGBA", (width, height), "red"), frame_height, frame_width, how)
    assert fitted.mode == "RGB" and fitted.size == (frame_width, frame_height)


@given(width=st.integers(32, 255), height=st.integers(32, 255), frame_width=multiples, frame_height=multiples)
@settings(max_examples=150, deadline=None)
def test_crop_fills_the_frame_from_the_middle_in_true_proportions(width, height, frame_width, frame_height):
    """Both axes are scaled alike: a pixel shows the place that one scale about the centre brings there."""
    fitted = np.array(media.fit(places(width, height), frame_height, frame_width, "crop")).astype(float)
    scale = min(width / frame_width, height / frame_height)  # pixels of the image to a pixel of the frame
    y, x = np.mgrid[:frame_height, :frame_width]
    x = (x + 0.5 - frame_width / 2) * scale + width / 2 - 0.5
    y = (y + 0.5 - frame_height / 2) * scale + height / 2 - 0.5
    tolerance = 1 + 2 * scale  # the filter reaches over the border
    assert np.abs(fitted[..., 0] - x).max() <= tolerance and np.abs(fitted[..., 1] - y).max() <= tolerance
    assert (fitted[..., 2] == 0).all()


@given(width=st.integers(32, 255), height=st.integers(32, 255), frame_width=multiples, frame_height=multiples)
@settings(max_examples=150, deadline=None)
def test_pad_shows_all_of_the_image_in_true_proportions_on_white(width, height, frame_width, frame_height):
    fitted = np.array(media.fit(places(width, height), frame_height, frame_width, "pad"))
    shown = fitted[..., 2] == 0
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert shown[top:bottom, left:right].all() and (fitted[~shown] == 255).all()
    scale = min(frame_width / width, frame_height / height)
    assert abs(right - left - width * scale) <= 1 and abs(bottom - top - height * scale) <= 1
    assert abs(left - (frame_width - right)) <= 1 and abs(top - (frame_height - bottom)) <= 1  # in the middle
    corner, far_corner = fitted[top, left].astype(int), fitted[bottom - 1, right - 1].astype(int)
    tolerance = 1 + 2 / scale
    assert corner[0] <= tolerance and far_corner[0] >= width - 1 - tolerance
    assert corner[1] <= tolerance and far_corner[1] >= height - 1 - tolerance


@pytest.mark.parametrize("how", ["crop", "pad"])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_image_of_the_frames_size_stays_as_it_is(how, seed):
    pixels = noise(seed, 32, 48, 3)
    assert np.array_equal(media.fit(Image.fromarray(pixels), 32, 48, how), pixels)


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_what_is_transparent_is_white_after_fitting(how):
    assert (np.array(media.fit(Image.new("RGBA", (30, 20), (200, 0, 0, 0)), 32, 32, how)) == 255).all()


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_become_tensors_in_minus_one_to_one_and_come_back(seed):
    pixels = noise(seed, 8, 6, 3)
    pixels[0, 0], pixels[0, 1] = 0, 255
    tensor = media.image_to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 8, 6) and tensor.min() == -1 and tensor.max() == 1
    frames = media.video_to_frames(torch.stack([tensor, -tensor], dim=1))
    assert frames.dtype == np.uint8 and np.array_equal(frames, [pixels, 255 - pixels])


def test_what_overshoots_is_clipped_not_wrapped():
    frames = media.video_to_frames(torch.tensor([-3.0, 3.0]).expand(3, 1, 1, 2))
    assert np.array_equal(frames[0, 0], [[0, 0, 0], [255, 255, 255]])


# --- writing videos ---------------------------------------------------------------------------------------------------


def moving_square(frames: int, height: int, width: int) -> np.ndarray:
    """[F, H, W, 3]: a few colours, and in each frame something else."""
    video = np.full((frames, height, width, 3), (40, 90, 200), dtype=np.uint8)
    for f in range(frames):
        video[f, 4:12, f : f + 8] = (230, 180, 30)
    return video


@pytest.mark.parametrize("frames, height, width", [(1, 16, 16), (9, 32, 48), (17, 48, 32)])
def test_a_gif_gives_its_frames_back(tmp_path, frames, height, width):
    """A GIF holds 256 colours a frame; with fewer, nothing is lost."""
    video = moving_square(frames, height, width)
    media.save_video(video, tmp_path / "x.gif", 8, {})
    back = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(tmp_path / "x.gif"))]
    assert np.array_equal(back, video)


@pytest.mark.parametrize("frames, height, width", [(1, 16, 16), (9, 32, 48), (17, 48, 32)])
def test_an_mp4_gives_its_frames_back_nearly(tmp_path, frames, height, width):
    """H.264 loses a little, most of it in colour, which it stores at half the size; it turns and shifts nothing."""
    video = moving_square(frames, height, width)
    media.save_video(video, tmp_path / "x.mp4", 8, {})
    back = np.stack(imageio.mimread(tmp_path / "x.mp4", memtest=False))
    assert back.shape == video.shape
    assert np.abs(back.astype(float) - video).mean() < 8
    for f, frame in enumerate(back):  # of all the frames, each is nearest to itself
        assert np.abs(video.astype(float) - frame).mean(axis=(1, 2, 3)).argmin() == f


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_frames_that_do_not_change_are_all_written(tmp_path, suffix):
    """Who counts the frames of a video in which nothing moves gets what was asked for."""
    video = np.repeat(moving_square(1, 16, 32), 9, axis=0)
    path = tmp_path / f"x{suffix}"
    media.save_video(video, path, 8, {})
    if suffix == ".gif":  # a GIF has no frame without a change: the one frame stays for as long as nine
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(Image.open(path))) in (1120, 1130)
    else:
        assert len(imageio.mimread(path, memtest=False)) == 9


@pytest.mark.parametrize("fps", [8, 16])
def test_a_video_plays_at_its_speed(tmp_path, fps):
    """An MP4 exactly; a GIF counts in hundredths of a second, so it may be off by one a frame, but not in sum."""
    video = moving_square(9, 16, 32)
    media.save_video(video, tmp_path / "x.mp4", fps, {})
    assert imageio.get_reader(tmp_path / "x.mp4").get_meta_data()["fps"] == fps
    media.save_video(video, tmp_path / "x.gif", fps, {})
    durations = [frame.info["duration"] for frame in ImageSequence.Iterator(Image.open(tmp_path / "x.gif"))]
    assert len(durations) == 9 and all(abs(duration - 1000 / fps) < 10 for duration in durations)
    assert abs(sum(durations) - 9 * 1000 / fps) <= 5


def test_a_gif_carries_its_metadata_however_long(tmp_path):
    """A GIF's comment comes in blocks of 255 bytes."""
    about = {"prompt": "ein Fuchs, überall 狐 " * 50, "seed": 7}
    media.save_video(moving_square(2, 16, 32), tmp_path / "x.gif", 8, about)
    assert json.loads(Image.open(tmp_path / "x.gif").info["comment"]) == about


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_the_same_frames_give_the_same_bytes(tmp_path, suffix):
    for name in "ab":
        media.save_video(moving_square(9, 32, 48), tmp_path / f"{name}{suffix}", 8, {"prompt": "a fox"})
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", media.VIDEO_SUFFIXES)
def test_a_video_that_fails_half_way_leaves_nothing(tmp_path, suffix):
    """What goes wrong half way, here a frame that is no frame, leaves no file and no part of one."""
    frames = [*moving_square(3, 16, 32), "no frame"]
    with pytest.raises(Exception):
        media.save_video(frames, tmp_path / f"x{suffix}", 8, {})
    assert list(tmp_path.iterdir()) == []


# --- files appear whole or not at all ---------------------------------------------------------------------------------


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replace_when_whole(path) as part:
        assert part.parent == tmp_path and part.suffix == ".txt" and part != path
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(error), replace_when_whole(path) as part:
        part.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_others_may_read_what_is_written(tmp_path):
    media.save_image(places(4, 4), tmp_path / "x.png")
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == 0o644
    assert np.array_equal(Image.open(tmp_path / "x.png"), places(4, 4))


def test_checking_whether_a_file_can_be_written_writes_nothing(tmp_path):
    media.check_writable(tmp_path / "new" / "folder" / "x.mp4")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "x.mp4").mkdir()
    for path in (tmp_path / "file" / "x.mp4", tmp_path / "x.mp4", tmp_path / "file" / "deep" / "x.mp4"):
        with pytest.raises(BadInput, match=path.name):
            media.check_writable(path)
