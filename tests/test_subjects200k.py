"""Subjects200K's reader, on parquet shards with PNG bytes as they are published."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_readers import CLIP

import readers
from checkpoint import BadInput
from data import Broken, Tolerant, Unfit
from readers import Subjects200K, Videos


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue()


def views(side: int, margin: int, left, right, gap: int | None = None) -> bytes:
    """Two views side by side, as Subjects200K has them, as PNG."""
    gap = margin if gap is None else gap
    picture = Image.new("RGB", (2 * side + 2 * margin + gap, side + 2 * margin), "black")
    for x, colour in ((margin, left), (margin + side + gap, right)):
        picture.paste(Image.new("RGB", (side, side), colour), (x, margin))
    return png(picture)


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


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([512, 1024]), st.integers(0, 20), st.data())
def test_views_are_where_the_margin_says(tmp_path_factory, side, margin, data):
    """1048x528, 1056x528 (each view in a cell of 528), 1024x512, their doubles, and whatever else holds two views."""
    gap = data.draw(st.one_of(st.sampled_from([0, margin, 2 * margin]), st.integers(0, 40)))
    folder = subjects200k(tmp_path_factory.mktemp("views"), [{"png": views(side, margin, "red", "blue", gap)}])
    pair = Subjects200K(folder, side=side)[0]
    assert (pair.video == [0, 0, 255]).all() and (np.asarray(pair.image) == [255, 0, 0]).all()
    assert pair.video.shape == (1, side, side, 3)


@pytest.mark.parametrize("width,height", [(1048, 528), (1056, 528), (1024, 512), (2096, 1056), (2112, 1056), (2048, 1024)])
def test_sizes_that_are_published(width, height, tmp_path):
    """Nothing of a view is lost, and nothing else is in it: what is not a view is noise here, and each view has one colour."""
    side = 1024 if width > 2000 else 512
    top = (height - side) // 2
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    for x, colour in ((top, "red"), (width - top - side, "blue")):
        picture.paste(colour, (x, top, x + side, top + side))
    pair = Subjects200K(subjects200k(tmp_path, [{"png": png(picture)}]), side=side)[1]
    assert (pair.video == [255, 0, 0]).all() and (np.asarray(pair.image) == [0, 0, 255]).all()


@pytest.mark.parametrize("width,height", [(1023, 512), (1024, 511), (1039, 528), (2048, 1023), (2079, 1056), (528, 528), (1048, 1056)])
def test_pictures_that_cannot_hold_two_views(width, height, tmp_path):
    folder = subjects200k(tmp_path, [{"png": png(Image.new("RGB", (width, height)))}])
    with pytest.raises(Broken, match=f"is {width}x{height}, too small for two views of {1024 if width >= 2048 else 512} pixels"):
        Subjects200K(folder)[0]


def test_rows_of_low_quality_are_left_out(tmp_path, capfd):
    """A description_valid that is null says nothing: the publisher does not filter by it."""
    png = views(512, 8, "red", "blue")
    bad = [{"png": png, "scores": {name: 4}} for name in Subjects200K.QUALITIES]
    data = Subjects200K(subjects200k(tmp_path, [*bad, {"png": png, "valid": False}, {"png": png}, {"png": png, "valid": None},
                                                {"png": png, "scores": {"imageQuality": None}}]), side=64)
    assert len(data) == 4 and f"{tmp_path}: kept 2 of 7 rows\n" == capfd.readouterr().out
    with pytest.raises(BadInput, match="None of the rows"):
        Subjects200K(subjects200k(tmp_path / "bad", bad))


@pytest.mark.parametrize("png,reason", [(b"no picture", "row 0 of row group 0"), (b"", "row 0 of row group 0"),
                                        (views(256, 8, "red", "blue"), "too small for two views of 512 pixels")])
def test_a_broken_row_says_which_it_is(png, reason, tmp_path):
    with pytest.raises(Broken, match=reason):
        Subjects200K(subjects200k(tmp_path, [{"png": png}]))[0]


def test_views_smaller_than_asked_for_are_skipped_or_enlarged(tmp_path):
    folder = subjects200k(tmp_path, [{"png": views(512, 8, "red", "blue")}])
    with pytest.raises(Unfit, match="512x512, smaller than 640x640"):
        Subjects200K(folder, side=640)[0]
    assert Subjects200K(folder, side=640, small="enlarge")[0].video.shape == (1, 640, 640, 3)


def test_a_damaged_row_group_is_a_broken_example(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (528, 1048, 3), dtype=np.uint8))
    folder = subjects200k(tmp_path, [{"png": png(picture)}])
    dataset = Subjects200K(folder, side=64)
    file = next(folder.rglob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5000] = bytes(5000)
    file.write_bytes(content)
    readers.row_group.cache_clear()
    with pytest.raises(Broken):
        dataset[0]
    readers.row_group.cache_clear()
    file.write_bytes(content[:100])  # also where it is cut off after it was opened
    with pytest.raises(Broken, match="is truncated, or no parquet file"):
        dataset[0]


def test_a_truncated_file_does_not_cost_the_others(tmp_path, capfd):
    """It is one broken row among those of the others, so it is counted and listed with its reason like any other."""
    folder = subjects200k(tmp_path / "all", [{"png": views(512, 8, "red", "blue")}] * 6)
    first, second, third = sorted(folder.rglob("*.parquet"))
    for file in (first, third):
        file.write_bytes(file.read_bytes()[:-20])
        data = Subjects200K(folder, side=64)
    assert "kept 2 of 2 rows; " in (said := capfd.readouterr().out) and f"{first} is truncated" in said and "and 1 more" in said
    tolerant = Tolerant(data, len(data), tmp_path / "skipped.jsonl")
    assert [tolerant[i].text.split()[-1] for i in range(8)] == ["right"] * 3 + ["left", "right", "left"] + ["right"] * 2
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["example"] for line in lines] == [0, 1, 6, 7] and all("is truncated" in line["reason"] for line in lines)
    second.write_bytes(b"")
    with pytest.raises(BadInput, match=f"None of the parquet files in {folder} can be read: {first} is truncated"):
        Subjects200K(folder)


@pytest.mark.parametrize("reader", [Subjects200K, lambda file: Videos(file, CLIP)])
def test_parquet_without_pyarrow(reader, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(BadInput, match=r"a.parquet is parquet, and reading it needs pyarrow: pip install pyarrow"):
        reader(tmp_path / "a.parquet")


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
