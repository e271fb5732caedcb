"""Strict reading of text, tables and JSON lines, plain or under gzip or xz; every complaint names file and line."""

import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 4 << 30  # of one file when unpacked; more is a mistake or an attack

Located = tuple[str, Any]  # (path:line, what stands there)


def text_of(path: Path) -> str:
    """The UTF-8 text of a file, unpacked if its name ends in .gz or .xz, without a byte order mark.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, too large or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            content = stream.read(MAX_TEXT_BYTES + 1)
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); get the file again") from error
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: more than {MAX_TEXT_BYTES} bytes of text; split the file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def lines_of(path: Path) -> list[Located]:
    """Every line with its place; only line feeds, or carriage return and line feed, end a line."""
    lines = text_of(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [(f"{path}:{number}", line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]


def cells_of(
    path: Path, columns: tuple[str, ...], *, header: bool = False, blank: tuple[str, ...] = ()
) -> Iterator[Located]:
    """Every line of a tab-separated table as its cells.

    Args:
        path: The file; quotes have no meaning in it.
        columns: The columns' names, for the complaint and, where there is a header, to compare with it.
        header: Whether the first line names the columns.
        blank: The columns that may be empty.

    Yields:
        (place, cells), one cell a column.

    Raises:
        ValueError: A line has another number of cells, or an empty one; or the header differs.
    """
    lines = lines_of(path)
    layout = " TAB ".join(columns)
    if header and (not lines or lines[0][1].split("\t") != list(columns)):
        raise ValueError(f"{path}:1: the header is not {layout}")
    for place, line in lines[header:]:
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise ValueError(f"{place}: {len(cells)} columns, expected {len(columns)}: {layout}")
        for column, cell in zip(columns, cells, strict=True):
            if column not in blank and not cell.strip():
                raise ValueError(f"{place}: {column} is empty; expected {layout}")
        yield place, cells


def aligned_lines_of(paths: tuple[Path, ...]) -> Iterator[Located]:
    """The lines with one number of several files, stripped of blanks at their ends.

    Raises:
        ValueError: The files differ in their number of lines, or a line is empty.
    """
    files = [lines_of(path) for path in paths]
    counts = {str(path): len(lines) for path, lines in zip(paths, files, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{paths[0]}: not aligned line by line: {counts} lines")
    for group in zip(*files, strict=True):
        for place, line in group:
            if not line.strip():
                raise ValueError(f"{place}: empty line; every line holds one sentence")
        yield group[0][0], [line.strip() for _, line in group]


def json_rows_of(path: Path) -> Iterator[Located]:
    """Every line of a JSON-lines file, each one object."""
    for place, line in lines_of(path):
        row = parsed_json(place, line)
        if not isinstance(row, dict):
            raise ValueError(f"{place}: not a JSON object")
        yield place, row


def parsed_json(place: str, text: str) -> Any:
    """The value of a JSON text; the complaint names its place."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error


def csv_rows_of(path: Path) -> Iterator[Located]:
    """Every record of a comma-separated file with a header, as column -> text."""
    reader = csv.DictReader(text_of(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{reader.line_num}: not one value a column of {reader.fieldnames}")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({error})") from error
