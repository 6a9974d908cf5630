"""The published datasets' readers, each on a small fixture in the publisher's own format."""

import io
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
from data import Broken, Tolerant
from media import Clip, probe
from readers import DreamBench, Subjects200K, SubjectVideos, Triplets, Videos

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


def views(side: int, margin: int, left, right) -> bytes:
    """Two views side by side, as Subjects200K has them, as PNG."""
    picture = Image.new("RGB", (2 * side + 3 * margin, side + 2 * margin), "black")
    for x, colour in ((margin, left), (2 * margin + side, right)):
        picture.paste(Image.new("RGB", (side, side), colour), (x, margin))
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue()


def subjects200k(folder: Path, rows: list[dict], **changes) -> Path:
    """Parquet shards with the columns of Yuanshi/Subjects200K."""
    (folder / "data").mkdir(parents=True)
    table = [{"quality_assessment": {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5, **row.get("scores", {})},
              "description": {"item": "mug", "description_0": "a mug on the left", "description_1": "a mug on the right",
                              "category": "kitchen", "description_valid": row.get("valid", True)},
              "raw_json": "{}", "image": {"bytes": row["png"], "path": None}, "collection": row.get("collection", "collection_2")}
             for row in rows]
    for number in range(0, len(table), 2):
        pq.write_table(pa.Table.from_pylist(table[number : number + 2]), folder / "data" / f"train-{number:05d}.parquet",
                       row_group_size=1)
    return folder


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


# --- Subjects200K -----------------------------------------------------------------------------------------------------


def test_both_views_and_directions_of_subjects200k(tmp_path):
    rows = [{"png": views(512, 8, "red", "blue")}, {"png": views(1024, 16, "green", "white"), "collection": "collection_3"}]
    data = Subjects200K(subjects200k(tmp_path, rows), side=64)
    assert len(data) == 4
    seen = [(e.video[0, 32, 32].tolist(), np.asarray(e.image)[32, 32].tolist(), e.text, e.noun) for e in map(data.__getitem__, range(4))]
    red, blue, green, white = [255, 0, 0], [0, 0, 255], [0, 128, 0], [255] * 3
    assert seen == [(blue, red, "a mug on the right", "mug"), (red, blue, "a mug on the left", "mug"),
                    (white, green, "a mug on the right", "mug"), (green, white, "a mug on the left", "mug")]
    example = data[0]
    assert example.video.shape == (1, 64, 64, 3) and example.image.size == (64, 64)
    assert np.ptp(example.video, axis=(0, 1, 2)).max() == 0, "nothing of the margin or of the other view"


def test_rows_of_low_quality_are_left_out(tmp_path):
    png = views(512, 8, "red", "blue")
    bad = [{"png": png, "scores": {name: 4}} for name in Subjects200K.QUALITIES]
    data = Subjects200K(subjects200k(tmp_path, [*bad, {"png": png, "valid": False}, {"png": png},
                                                {"png": png, "scores": {"imageQuality": None}}]), side=64)
    assert len(data) == 2
    with pytest.raises(BadInput, match="None of the rows"):
        Subjects200K(subjects200k(tmp_path / "bad", bad))


@pytest.mark.parametrize("png,reason", [(b"no picture", "row 0 of row group 0"), (b"", "row 0 of row group 0"),
                                        (views(256, 8, "red", "blue"), "not two views of 512 pixels")])
def test_a_broken_row_says_which_it_is(png, reason, tmp_path):
    with pytest.raises(Broken, match=reason):
        Subjects200K(subjects200k(tmp_path, [{"png": png}]))[0]


def test_views_smaller_than_asked_for_are_skipped_or_enlarged(tmp_path):
    folder = subjects200k(tmp_path, [{"png": views(512, 8, "red", "blue")}])
    with pytest.raises(Broken, match="512x512, smaller than 640x640"):
        Subjects200K(folder, side=640)[0]
    assert Subjects200K(folder, side=640, small="enlarge")[0].video.shape == (1, 640, 640, 3)


def test_a_damaged_row_group_is_a_broken_example(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (528, 1048, 3), dtype=np.uint8))
    data = io.BytesIO()
    picture.save(data, "png")
    folder = subjects200k(tmp_path, [{"png": data.getvalue()}])
    dataset = Subjects200K(folder, side=64)
    file = next(folder.rglob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5000] = bytes(5000)
    file.write_bytes(content)
    readers.row_group.cache_clear()
    with pytest.raises(Broken):
        dataset[0]


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(BadInput, match="train.parquet is truncated, or no parquet file"):
        Subjects200K(tmp_path)
    pq.write_table(pa.table({"image": [b""], "caption": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(BadInput, match="no column quality_assessment: it has image, caption"):
        Subjects200K(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no parquet files"):
        Subjects200K(tmp_path / "empty")


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


@pytest.mark.parametrize("name,clip,reason", [
    ("short", CLIP, r"lasts 0.5\d* s, and 9 frames at 8 fps take 1.12 s"), ("tiny", CLIP, "32x32, smaller than 64x48"),
    ("sound", CLIP, "sound and no pictures"), ("truncated", CLIP, "cannot be read"), ("empty", CLIP, "cannot be read")])
def test_videos_that_do_not_do(name, clip, reason, videos):
    with pytest.raises(BadInput, match=reason):
        readers.decode(videos / f"{name}.mp4", clip, np.random.default_rng(0))


def test_short_ones_can_be_looped_and_small_ones_enlarged(videos):
    looped = readers.decode(videos / "short.mp4", replace(CLIP, short="loop"), np.random.default_rng(0))
    assert looped.shape == (9, 48, 64, 3) and (np.diff(levels(looped)) < 0).sum() == 2  # begun anew twice
    assert readers.decode(videos / "tiny.mp4", replace(CLIP, small="enlarge"), np.random.default_rng(0)).shape == (9, 48, 64, 3)


ROWS = [{"video": "plain.mp4", "caption": "it gets brighter"}, {"video": "https://example.org/files/portrait.mp4", "caption": "tall"},
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
    at = damaged.index(b"mdat") + 8
    damaged[at : at + 600] = bytes(600)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    try:
        readers.decode(tmp_path / "damaged.mp4", replace(CLIP, short="loop"), np.random.default_rng(0))
    except BadInput:
        pass  # what can be saved of it does not matter, but that it comes to an end


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
    with pytest.raises(Broken, match="no 'lamp' was found"):
        SubjectVideos(Videos(videos / "subjects.jsonl", CLIP), lambda: lambda *_: None, tmp_path / "others")[0]


def test_triplets(videos, tmp_path):
    (tmp_path / "video.mp4").write_bytes((videos / "plain.mp4").read_bytes())
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(tmp_path / "subject.png")
    lines = [{"video": "video.mp4", "text": "a golden lamp", "image": "subject.png", "noun": "lamp"},
             {"video": "video.mp4", "text": "a lamp", "image": "gone.png"}]
    (tmp_path / "triplets.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = Triplets(tmp_path, CLIP)
    example = data[0]
    assert (example.text, example.noun, example.image.size) == ("a golden lamp", "lamp", (30, 20))
    assert np.asarray(example.image).min() == 255 and example.video.shape == (9, 48, 64, 3)
    with pytest.raises(Broken, match="gone.png"):
        data[1]
    (tmp_path / "triplets.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(BadInput, match="Line 1 of .*triplets.jsonl"):
        Triplets(tmp_path, CLIP)
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
    data = DreamBench(tmp_path, side=64)
    assert [(p.subject, p.noun, p.kind) for p in data.photographs] == [
        ("dog6", "dog", "animal"), ("dog6", "dog", "animal"), ("fancy_boot", "boot", "static object"),
        ("wolf_plushie", "stuffed animal", "active object")]
    assert data[3].text == "a stuffed animal" and data[3].image.size == (50, 40) and data[3].video.shape == (1, 64, 64, 3)
    (folder / "prompts_and_classes.txt").write_text(listing.replace("boot\n", "spoon\n"))
    with pytest.raises(BadInput, match="a class 'spoon'"):
        DreamBench(tmp_path)


# --- broken examples --------------------------------------------------------------------------------------------------


class Numbers:
    """Examples 0, 1, 2, ...; some are broken."""

    def __init__(self, broken):
        self.broken = broken

    def __getitem__(self, i):
        if i in self.broken:
            raise Broken(f"{i} is bad")
        return i


def test_a_broken_example_is_replaced_by_the_next_and_listed_once(tmp_path):
    data = Tolerant(Numbers({2, 3, 9}), 10, tmp_path / "run" / "skipped.jsonl")
    for _ in range(2):
        assert [data[i] for i in range(10)] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    again = Tolerant(Numbers({2, 3, 9}), 10, tmp_path / "run" / "skipped.jsonl")
    assert again[2] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert lines == [{"example": i, "reason": f"{i} is bad"} for i in (2, 3, 9)]


def test_half_a_line_of_a_run_that_was_killed_does_no_harm(tmp_path):
    log = tmp_path / "skipped.jsonl"
    log.write_text('{"example": 2, "reason": "2 is bad"}\n{"example": 3, "rea')
    for _ in range(2):
        data = Tolerant(Numbers({2, 3, 9}), 10, log)
        assert [data[i] for i in range(10)] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert log.read_text().count('"example": 2,') == log.read_text().count('"3 is bad"') == log.read_text().count('"9 is bad"') == 1


def test_without_tolerance_the_first_broken_example_stops_the_run(tmp_path):
    with pytest.raises(BadInput, match="1 of the first 1 examples"):
        Tolerant(Numbers({0}), 10, tmp_path / "skipped.jsonl", share=0)[0]


def test_too_many_broken_examples_stop_the_run(tmp_path):
    data = Tolerant(Numbers(set(range(0, 1000, 4))), 1000, tmp_path / "skipped.jsonl", share=0.2)
    with pytest.raises(BadInput, match=r"10 of the first 37 examples cannot be used, more than 20%.*The last one: 36 is bad"):
        for i in range(1000):
            data[i]
    fine = Tolerant(Numbers(set(range(0, 1000, 4))), 1000, tmp_path / "others.jsonl", share=0.3)
    assert len([fine[i] for i in range(1000)]) == 1000
    with pytest.raises(BadInput, match="None of the 5 examples can be used"):
        Tolerant(Numbers(set(range(5))), 5, tmp_path / "none.jsonl")[0]
