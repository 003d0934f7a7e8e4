"""Reads tables and lists, in the encodings that editors and spreadsheets use."""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from diffusers_ssr.file_utils import check_regular_file


# UTF-32's mark begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# A line is read whole, so one that never ends would fill the memory.
MAX_LINE = 2**20


def open_text(file: Path, name: str = "file", errors: str = "strict") -> TextIO:
    """
    Open a text file for reading, as UTF-8, or as the byte order mark says that it begins with. Lines keep their ends.

    Args:
        file (`Path`): the file.
        name (`str`): what errors call it.
        errors (`str`): `"strict"` raises on bytes that are no text, `"replace"` puts a sign in their place.

    Raises:
        `OSError`: if it is not there. `ValueError`: if it is a folder, a device or a named pipe.
    """
    check_regular_file(file, name)
    with open(file, "rb") as content:
        start = content.read(4)
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")
    return open(file, encoding=encoding, errors=errors, newline="")


def read_lines(file: Path, name: str = "file") -> list[str]:
    """The lines of a list that are not empty, without the blanks around them."""
    with open_text(file, name) as lines:
        return [line.strip() for line in _bounded(lines) if line.strip()]


def read_json(file: Path, name: str = "file") -> Any:
    """What a JSON file holds."""
    with open_text(file, name) as text:
        return json.load(text)


def read_rows(file: Path, name: str = "table", errors: str = "strict") -> Iterator[tuple[int, dict | str]]:
    """
    The rows of a table: CSV with a header if its name ends so, divided by commas, semicolons or tabs, as spreadsheets write
    it; else JSON lines.

    Args:
        file (`Path`), name (`str`), errors (`str`): as in [`open_text`].

    Yields:
        `tuple[int, dict | str]`: the line's number, and its row, or why it is none. Reading ends after a row that says that
        the rest of the file cannot be read.

    Raises:
        `OSError` or `ValueError`: as [`open_text`].
    """
    with open_text(file, name, errors) as lines:
        read = _csv_rows if file.suffix.lower() in (".csv", ".tsv") else _json_rows
        number = 0
        try:
            for number, row in read(lines):
                yield number, row
        except (csv.Error, ValueError) as error:
            yield number + 1, f"the rest of {file} cannot be read: {error}"


def _bounded(lines: TextIO) -> Iterator[str]:
    while line := lines.readline(MAX_LINE):
        if len(line) == MAX_LINE and line[-1] not in "\r\n":
            raise ValueError(f"a line has more than {MAX_LINE:,} characters")
        yield line


def _csv_rows(lines: TextIO) -> Iterator[tuple[int, dict | str]]:
    source = _bounded(lines)
    header = next(source, "")
    delimiter = max(",;\t", key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    reader = csv.reader(source, delimiter=delimiter)
    for fields in reader:
        if not any(fields):
            continue
        surplus = [field for field in fields[len(names) :] if field]
        if surplus:
            yield (
                reader.line_num + 1,
                f"more fields than the header has: {surplus[0]!r:.80}; quote text with {delimiter!r}",
            )
        else:
            fields += [""] * (len(names) - len(fields))
            yield reader.line_num + 1, {name: field for name, field in zip(names, fields, strict=False) if name}


def _json_rows(lines: TextIO) -> Iterator[tuple[int, dict | str]]:
    for number, line in enumerate(_bounded(lines), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
        else:
            yield number, row if isinstance(row, dict) else "not a JSON object"
