"""Manifests: tables of videos and their captions, CSV with a heading, JSONL, or parquet."""

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import checkpoint
from checkpoint import BadInput
from data import Broken
from distributed import place

COLUMNS = {  # what a manifest may call each column, in order of preference
    "video": ("video", "path", "file", "file_name", "filename", "video_path"),
    "text": ("text", "caption", "description", "prompt", "title"),
    "noun": ("noun", "subject", "item", "label"),
}


@contextmanager
def parquet(file: Path) -> Iterator:
    """A parquet file, opened; Broken is what happens to be wrong with it. Parquet needs pyarrow, which is an optional extra."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(f"{file} is parquet, and reading it needs pyarrow: pip install pyarrow.") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            yield opened
    except (OSError, pyarrow.ArrowException) as error:
        raise Broken(f"{file} is truncated, or no parquet file: {str(error).splitlines()[0]}") from error


class Row(NamedTuple):
    """A line of a manifest. Empty strings: nothing is said."""

    video: str
    text: str
    noun: str


def read_manifest(file: Path) -> list[Row]:
    """The rows of a manifest: CSV with a heading, JSONL, or parquet."""
    if not file.exists():
        raise BadInput(f"There is no {file}: give a manifest, or a folder of videos.")
    if file.suffix.lower() not in (".parquet", ".csv", ".jsonl"):
        raise BadInput(f"{file} is no manifest: .csv with a heading, .jsonl and .parquet are read, or a folder of videos.")
    if file.suffix.lower() == ".parquet":
        try:
            with parquet(file) as opened:
                chosen = choose(file, opened.schema_arrow.names)
                table = opened.read(columns=[name for name in chosen if name]).to_pydict()
                rows = zip(*(table[name] if name else [""] * opened.metadata.num_rows for name in chosen))
        except Broken as error:
            raise BadInput(f"The manifest {error}") from error
    else:
        csv.field_size_limit(2**31 - 1)
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:  # a spreadsheet writes a mark in front
            try:
                rows = list((csv_rows if file.suffix.lower() == ".csv" else json_rows)(file, lines))
            except csv.Error as error:
                raise BadInput(f"The manifest {file} cannot be read: {error}.") from error
    return [Row(*("" if value is None else str(value).strip() for value in row)) for row in rows]


def csv_rows(file: Path, lines):
    """The rows of a CSV file with a heading. A quote that is left open makes one field of the rows behind it: the name of a video can
    have no line breaks, a caption may."""
    reader, broken = csv.reader(lines), []
    heading = next(reader, [])
    places = [heading.index(name) if name else None for name in choose(file, heading)]
    for number, line in enumerate(filter(None, reader), 1):
        row = tuple("" if at is None or at >= len(line) else line[at] for at in places)
        if "\n" in row[0].strip():
            raise BadInput(f"Row {number} of {file} names a video over several lines: close the quote that is open before it.")
        if any("\n" in field.strip() for field in line):
            broken.append(str(number))
        yield row
    if broken and place()[0] == 0:
        print(f"warning: {file} has line breaks inside fields, in row {checkpoint.some(broken)}; if a quote is left open there, the "
              f"rows behind it are lost", file=sys.stderr)


def json_rows(file: Path, lines):
    """The rows of a JSONL file; a line that is no object becomes a row without a video, which is skipped when met."""
    chosen = None
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = {}
        if isinstance(row, dict) and row and chosen is None:
            chosen = choose(file, list(row))
        yield tuple(row.get(name, "") if name and isinstance(row, dict) else "" for name in chosen or ("", "", ""))
    if chosen is None:
        raise BadInput(f"{file} has no line that is a JSON object.")


def choose(file: Path, names: list[str]) -> list[str | None]:
    """Which of the columns `names` holds video, text and noun."""
    lower = {name.lower().strip(): name for name in names}
    found = [next((lower[name] for name in options if name in lower), None) for options in COLUMNS.values()]
    for column, options, name in zip(COLUMNS, COLUMNS.values(), found):
        if name is None and column != "noun":
            raise BadInput(f"{file} has no column for the {column}: it has {', '.join(names) or 'none at all'}; known are "
                           f"{', '.join(options)}.")
    return found
