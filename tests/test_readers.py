"""The readers of videos, triplets and photographs, each on a small fixture in the publisher's own format."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

import readers
from checkpoint import BadInput
from data import Broken, Unfit
from media import Clip, TooLittle, probe, read_video, save_video
from readers import SubjectVideos, Triplets, Videos, dreambench

CLIP = Clip(frames=9, height=48, width=64, fps=8)
SLOPE = 40  # the grey level of the fixtures' videos rises by this much a second


# --- fixtures ---------------------------------------------------------------------------------------------------------


def ffmpeg(*arguments, stdin: bytes = b"") -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)], input=stdin, check=True)


def write_video(file: Path, width: int = 96, height: int = 64, seconds: float = 4, fps: int = 24, *options) -> Path:
    """A video whose brightness tells the time: it rises by SLOPE grey levels a second."""
    levels = (16 + SLOPE * np.arange(round(seconds * fps)) / fps).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), height, width, 3))
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-", *options, "-pix_fmt",
           "yuv444p", "-crf", 4, file, stdin=np.ascontiguousarray(frames).tobytes())
    return file


def levels(video: np.ndarray) -> np.ndarray:
    return video.mean(axis=(1, 2, 3))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of videos as they are found in the wild."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "plain.mp4")
    write_video(folder / "portrait.mp4", 64, 112)
    write_video(folder / "odd.mp4", 97, 65)
    write_video(folder / "tiny.mp4", 32, 32)
    write_video(folder / "short.mp4", seconds=0.5)
    # Every other frame of the first two seconds is missing: the rate varies, the time does not.
    write_video(folder / "varying.mp4", 96, 64, 4, 24, "-vf", "select='not(lt(t,2)*mod(n,2))'", "-fps_mode", "vfr")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=3", folder / "sound.mp4")
    whole = (folder / "plain.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    return folder


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "portrait", "odd", "varying"])
def test_a_clip_is_a_window_at_the_asked_rate(name, videos, seed):
    clip = Clip(9, 48, 64, fps=8)
    drawn = [readers.decode(videos / f"{name}.mp4", clip, np.random.default_rng(seed + i)) for i in range(3)]
    for video in drawn:
        assert video.shape == (9, 48, 64, 3) and video.dtype == np.uint8
        steps, tick = np.diff(levels(video)), SLOPE / 12 + 1.5  # an eighth of a second each, up to the source's slowest tick
        assert abs(steps.mean() - SLOPE / 8) < tick / 8 and (np.abs(steps - SLOPE / 8) < tick).all()
    starts = [levels(video)[0] for video in drawn]
    assert np.ptp(starts) > 0 and 14 < min(starts) and max(starts) < 16 + SLOPE * (4 - 9 / 8) + 3
    again = readers.decode(videos / f"{name}.mp4", clip, np.random.default_rng(seed))
    assert np.array_equal(again, drawn[0])


def test_the_middle_of_the_picture_is_kept(tmp_path):
    """Of a portrait, the overhang above and below is cut off; nothing is squeezed."""
    frame = np.zeros((128, 64, 3), dtype=np.uint8)
    frame[52:76] = 255  # 24 of the 128 rows, in the middle
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x128", "-r", 8, "-i", "-", "-pix_fmt", "yuv444p", "-crf", 4,
           tmp_path / "a.mp4", stdin=frame.tobytes() * 16)
    video = readers.decode(tmp_path / "a.mp4", CLIP, np.random.default_rng(0))
    bright = (video[0].mean(axis=(1, 2)) > 128).nonzero()[0]
    assert (bright[0], bright[-1]) == (12, 35)


def test_sizes_are_those_that_are_shown(videos, tmp_path):
    assert probe(videos / "odd.mp4")[1:] == (97, 65, 24) and abs(probe(videos / "plain.mp4").seconds - 4) < 0.1
    ffmpeg("-display_rotation", 90, "-i", videos / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert probe(tmp_path / "turned.mp4")[1:3] == (64, 96)
    assert readers.decode(tmp_path / "turned.mp4", Clip(9, 96, 64), np.random.default_rng(0)).shape == (9, 96, 64, 3)


def test_what_a_comment_says_is_not_taken_for_the_video(tmp_path):
    said = "a dog at 60 fps, a rotation of 90 degrees\n  Duration: 01:00:00.00\n  displaymatrix: rotation of 90.00 degrees"
    save_video(np.zeros((9, 64, 96, 3), np.uint8), tmp_path / "a.mp4", 8, {"prompt": said})
    assert probe(tmp_path / "a.mp4")[1:] == (96, 64, 8) and abs(probe(tmp_path / "a.mp4").seconds - 9 / 8) < 0.02


@pytest.mark.parametrize("frames", [9, 17, 49])
def test_a_video_as_long_as_the_clip_is_read_whole(frames, tmp_path, seed):
    """As synthesize.py's are: no frame is lost, the first least of all."""
    shades = np.linspace(20, 230, frames).astype(np.uint8)
    save_video(np.broadcast_to(shades[:, None, None, None], (frames, 64, 64, 3)), tmp_path / "a.mp4", 8, {})
    seen = readers.decode(tmp_path / "a.mp4", Clip(frames, 64, 64, 8), np.random.default_rng(seed))
    assert np.abs(seen.mean(axis=(1, 2, 3)) - shades).max() < 4


def test_damaged_videos_are_not_read(tmp_path, seed):
    rng = np.random.default_rng(seed)
    save_video(rng.integers(0, 256, (27, 64, 96, 3), dtype=np.uint8), tmp_path / "whole.mp4", 8, {})
    content, file = bytearray((tmp_path / "whole.mp4").read_bytes()), tmp_path / "damaged.mp4"
    middle, length = len(content) // 2, len(content) // 5
    content[middle : middle + length] = bytes(length)
    file.write_bytes(content)
    ffmpeg("-i", tmp_path / "whole.mp4", "-c", "copy", "-movflags", "faststart", tmp_path / "start.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "start.mp4").read_bytes()[: int(0.6 * len(content))])
    assert read_video(tmp_path / "whole.mp4").shape == read_video(tmp_path / "start.mp4").shape == (27, 64, 96, 3)
    for name in ("damaged.mp4", "cut.mp4"):
        with pytest.raises(BadInput, match="cannot be read"):
            read_video(tmp_path / name)


def test_pixels_that_are_not_square_are_shown_as_they_are_meant(tmp_path):
    """A square of 40x40 on a screen, stored as 20x40, is square again; sizes are those of the screen."""
    frame = np.zeros((64, 48, 3), dtype=np.uint8)
    frame[12:52, 14:34] = 255
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "48x64", "-r", 8, "-i", "-", "-vf", "setsar=2", "-pix_fmt", "yuv444p", "-crf", 4,
           tmp_path / "a.mp4", stdin=frame.tobytes() * 16)
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    for name, height, width in (("a", 64, 96), ("turned", 96, 64)):
        file = tmp_path / f"{name}.mp4"
        assert probe(file)[1:3] == (width, height)
        with pytest.raises(TooLittle, match=f"it is {width}x{height}, smaller than {width + 16}x{height}"):
            readers.decode(file, Clip(9, height, width + 16), np.random.default_rng(0))
        for clip in (readers.decode(file, Clip(9, height, width), np.random.default_rng(0)), read_video(file)):
            bright = clip[0].mean(axis=-1) > 128
            assert bright.shape == (height, width) and abs(np.ptp(bright.any(0).nonzero()) - 39) <= 1
            assert abs(np.ptp(bright.any(1).nonzero()) - 39) <= 1 and abs(bright.sum() - 1600) < 100


@pytest.mark.parametrize("name,kind,reason", [
    ("short", TooLittle, r"lasts 0.5\d* s, and 9 frames at 8 fps take 1.12 s"), ("tiny", TooLittle, "32x32, smaller than 64x48"),
    ("sound", BadInput, "sound and no pictures"), ("truncated", BadInput, "cannot be read"), ("empty", BadInput, "cannot be read")])
def test_videos_that_do_not_do(name, kind, reason, videos):
    """What is asked to be skipped is told from what is broken."""
    with pytest.raises(BadInput, match=reason) as error:
        readers.decode(videos / f"{name}.mp4", CLIP, np.random.default_rng(0))
    assert error.type is kind


def test_short_ones_can_be_looped_and_small_ones_enlarged(videos):
    looped = readers.decode(videos / "short.mp4", replace(CLIP, short="loop"), np.random.default_rng(0))
    assert looped.shape == (9, 48, 64, 3) and (np.diff(levels(looped)) < 0).sum() == 2  # begun anew twice
    assert readers.decode(videos / "tiny.mp4", replace(CLIP, small="enlarge"), np.random.default_rng(0)).shape == (9, 48, 64, 3)


ROWS = [{"video": "plain.mp4", "caption": "it gets brighter"},
        {"video": "https://example.org/files/portrait.mp4?download=1&h=720#t=3", "caption": "tall"},
        {"video": "sound.mp4", "caption": "a hum"}, {"video": "odd.mp4", "caption": " "}, {"video": "gone.mp4", "caption": "lost"}]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_manifests(kind, videos):
    """Also with what a spreadsheet puts in front of a CSV."""
    file = videos / f"manifest.{kind}"
    if kind == "csv":
        file.write_text("\ufeff" + "\n".join(["Video,id,caption", *(f'{row["video"]},{i},"{row["caption"]}"' for i, row in enumerate(ROWS))]))
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    data = Videos(file, CLIP)
    assert len(data) == 5
    assert [data[i].text for i in (0, 1)] == ["it gets brighter", "tall"] and data[0].video.shape == (9, 48, 64, 3)
    for i, reason in ((2, "sound.mp4: it has sound"), (3, "caption is empty"), (4, "gone.mp4 does not exist")):
        with pytest.raises(Broken, match=reason):
            data[i]


def test_sound_that_goes_on_and_loops_that_would_never_end(videos, tmp_path):
    ffmpeg("-i", videos / "plain.mp4", "-f", "lavfi", "-i", "sine=duration=20", "-c:v", "copy", tmp_path / "long.mp4")
    assert probe(tmp_path / "long.mp4").seconds > 15  # the pictures take four of them
    for i in range(3):
        assert len(readers.decode(tmp_path / "long.mp4", CLIP, np.random.default_rng(i))) == 9
    damaged = bytearray((videos / "short.mp4").read_bytes())
    at = damaged.index(b"mdat")
    size = int.from_bytes(damaged[at - 4 : at]) - 8
    damaged[at + 4 : at + 4 + size] = bytes(size)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    with pytest.raises(BadInput, match="0 of 9 frames could be decoded") as error:
        readers.decode(tmp_path / "damaged.mp4", replace(CLIP, short="loop"), np.random.default_rng(0))
    assert error.type is not TooLittle


def test_pictures_that_end_before_the_file_says_are_short_or_looped(videos, tmp_path):
    """Because the sound goes on, or because a stream that was recorded does not say how long it is."""
    ffmpeg("-i", videos / "short.mp4", "-f", "lavfi", "-i", "sine=duration=20", "-c:v", "copy", tmp_path / "sound.mp4")
    recorded = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", videos / "short.mp4", "-c:v", "libvpx", "-f",
                               "webm", "-"], stdout=subprocess.PIPE, check=True)  # nobody can go back and write the length
    (tmp_path / "recorded.webm").write_bytes(recorded.stdout)
    assert probe(tmp_path / "sound.mp4").seconds > 15 and probe(tmp_path / "recorded.webm").seconds is None
    for name in ("sound.mp4", "recorded.webm"):
        with pytest.raises(TooLittle, match="its pictures last 0.50 s, and 9 frames at 8 fps take 1.12 s"):
            readers.decode(tmp_path / name, CLIP, np.random.default_rng(0))
        looped = readers.decode(tmp_path / name, replace(CLIP, short="loop"), np.random.default_rng(0))
        assert looped.shape == (9, 48, 64, 3) and np.array_equal(looped[:4], looped[4:8]) and np.array_equal(looped[0], looped[8])


def test_a_video_that_is_cut_off_is_not_looped(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 96, 64, 4, 24, "-vf", "noise=alls=20:allf=t", "-movflags", "faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 5])  # what it holds comes first, so it opens, and lasts four seconds
    assert probe(tmp_path / "cut.mp4").seconds > 3.9
    with pytest.raises(BadInput, match="of 9 frames could be decoded") as error:
        readers.decode(tmp_path / "cut.mp4", replace(CLIP, short="loop"), np.random.default_rng(0))
    assert error.type is not TooLittle


def test_a_folder_with_captions_beside_the_videos(videos, tmp_path):
    for name in ("plain", "odd"):
        (tmp_path / f"{name}.mp4").symlink_to(videos / f"{name}.mp4")
    with pytest.raises(BadInput, match="no captions"):
        Videos(tmp_path, CLIP)
    (tmp_path / "plain.txt").write_text("it gets\n brighter\n")
    data = Videos(tmp_path, CLIP)
    assert [row.video for row in data.rows] == ["odd.mp4", "plain.mp4"] and data[1].text == "it gets brighter"
    with pytest.raises(Broken, match="caption is empty"):
        data[0]


@pytest.mark.parametrize("content,reason", [("", "has no column for the video"), ("id,caption\n1,a\n", "has no column for the video: it has id, caption"),
                                            ("video,size\na.mp4,3\n", "has no column for the text"), ("video,text\n", "is empty")])
def test_manifests_that_lack_something(content, reason, tmp_path):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(BadInput, match=reason):
        Videos(tmp_path / "m.csv", CLIP)


def test_a_damaged_manifest_of_parquet(tmp_path):
    rows = [{"video": f"{i}.mp4", "caption": f"{i} " * 99} for i in range(999)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    content = bytearray((tmp_path / "m.parquet").read_bytes())
    content[4:2000] = bytes(1996)  # the listing at its end is whole
    (tmp_path / "m.parquet").write_bytes(content)
    with pytest.raises(BadInput, match="The manifest .*m.parquet is truncated"):
        Videos(tmp_path / "m.parquet", CLIP)


def test_quotes_that_are_left_open_are_seen(tmp_path, capfd):
    """They make one field of the rows behind them: in a name that is an error, in a caption it may be meant."""
    (tmp_path / "m.csv").write_text('text,video\none,a.mp4\ntwo,"b.mp4\nthree,c.mp4\n')
    with pytest.raises(BadInput, match="Row 2 of .*m.csv names a video over several lines: close the quote"):
        Videos(tmp_path / "m.csv", CLIP)
    (tmp_path / "m.csv").write_text('video,text\na.mp4,one\nb.mp4,"two\nc.mp4,three\nd.mp4,four\n')
    assert len(Videos(tmp_path / "m.csv", CLIP)) == 2
    assert "m.csv has line breaks inside fields, in row 2; if a quote" in capfd.readouterr().err
    (tmp_path / "m.csv").write_text('id,video,text\n1,a.mp4,one\n"2,b.mp4,two\n3,c.mp4,"three"\n')
    assert len(Videos(tmp_path / "m.csv", CLIP)) == 2 and "in row 2; if a quote" in capfd.readouterr().err
    (tmp_path / "m.csv").write_text('video,text\na.mp4,"one\n"\nb.mp4,two\n')
    assert len(Videos(tmp_path / "m.csv", CLIP)) == 2 and not capfd.readouterr().err


def test_a_share_is_random_and_stays_the_same(tmp_path):
    (tmp_path / "m.csv").write_text("video,text\n" + "".join(f"{i}.mp4,number {i}\n" for i in range(1000)))
    one, again, other = (Videos(tmp_path / "m.csv", CLIP, seed, share=0.01).rows for seed in (0, 0, 1))
    assert len(one) == 10 and one == again and one != other


# --- subjects, triplets, photographs ------------------------------------------------------------------------------------


def test_subjects_are_cut_out_once(videos, tmp_path):
    (videos / "subjects.jsonl").write_text(json.dumps({"video": "plain.mp4", "text": "a lamp in a room", "noun": "lamp"}) + "\n")
    asked = []

    def segment(image, words):
        asked.append((image.size, words))
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).rectangle((10, 5, 29, 24), fill=255)
        return mask

    for _ in range(2):
        example = SubjectVideos(Videos(videos / "subjects.jsonl", CLIP), lambda: segment, tmp_path / "cutouts")[0]
        assert example.image.size == (20, 20) and example.video.shape == (9, 48, 64, 3) and example.noun == "lamp"
        grey = np.asarray(example.image).mean()
        assert np.abs(levels(example.video) - grey).min() < 1.5, "it is out of one of the frames"
    assert asked == [((64, 48), "lamp")]
    SubjectVideos(Videos(videos / "subjects.jsonl", CLIP), lambda: segment, tmp_path / "cutouts", by="other weights")[0]
    assert len(asked) == 2
    with pytest.raises(Unfit, match="no 'lamp' was found"):
        SubjectVideos(Videos(videos / "subjects.jsonl", CLIP), lambda: lambda *_: None, tmp_path / "others")[0]


def test_triplets(videos, tmp_path):
    (tmp_path / "video.mp4").write_bytes((videos / "plain.mp4").read_bytes())
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(tmp_path / "subject.png")
    lines = [{"video": "video.mp4", "text": "a golden lamp", "image": "subject.png", "noun": "lamp"},
             {"video": "video.mp4", "text": "a lamp", "image": "gone.png"}]
    lines[0]["text"] = "a golden\u2028lamp"  # a line's end to Unicode, not to JSON
    (tmp_path / "triplets.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    data = Triplets(tmp_path, CLIP)
    example = data[0]
    assert (example.text.split(), example.noun, example.image.size) == (["a", "golden", "lamp"], "lamp", (30, 20))
    assert np.asarray(example.image).min() == 255 and example.video.shape == (9, 48, 64, 3)
    with pytest.raises(Broken, match="gone.png"):
        data[1]
    (tmp_path / "triplets.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(BadInput, match="Line 1 of .*triplets.jsonl"):
        Triplets(tmp_path, CLIP)
    for name, value in (("video", None), ("text", 3), ("image", ["a.png"]), ("noun", 3)):
        (tmp_path / "triplets.jsonl").write_text("\n".join(json.dumps({**lines[0], **change}) for change in ({}, {name: value})))
        with pytest.raises(BadInput, match="Line 2 of .*triplets.jsonl.* must be texts"):
            Triplets(tmp_path, CLIP)
    (tmp_path / "triplets.jsonl").write_text(json.dumps({**lines[0], "video": 300 * "a"}))
    with pytest.raises(Broken, match="name too long"):
        Triplets(tmp_path, CLIP)[0]
    with pytest.raises(BadInput, match="There is no .*nowhere"):
        Triplets(tmp_path / "nowhere", CLIP)


def test_dreambench(tmp_path):
    folder = tmp_path / "dataset"
    for subject in ("dog6", "fancy_boot", "wolf_plushie"):
        (folder / subject).mkdir(parents=True)
        Image.new("RGB", (50, 40), "red").save(folder / subject / "00.jpg")
    Image.new("RGB", (50, 40), "red").save(folder / "dog6" / "01.jpg")
    listing = "Classes\n\nsubject_name,class\ndog6,dog\nfancy_boot,boot\nwolf_plushie,stuffed animal\n\nPrompts\n"
    (folder / "prompts_and_classes.txt").write_text(listing)
    assert [(p.subject, p.noun, p.kind) for p in dreambench(tmp_path)] == [
        ("dog6", "dog", "animal"), ("dog6", "dog", "animal"), ("fancy_boot", "boot", "static object"),
        ("wolf_plushie", "stuffed animal", "active object")]
    (folder / "prompts_and_classes.txt").write_text(listing.replace("boot\n", "spoon\n"))
    with pytest.raises(BadInput, match="a class 'spoon'"):
        dreambench(tmp_path)
