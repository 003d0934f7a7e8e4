"""Reads tables and lists from text files, in the encodings that text editors and spreadsheets use."""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from diffusers_ssr.file_utils import check_regular_file


# UTF-32 is checked before UTF-16, because its byte order mark begins with the one of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Lines are read completely, so a file without line breaks could otherwise fill the memory.
MAX_LINE = 2**20
MAX_COLUMNS = 1024


def open_text(file: Path, name: str = "file", errors: str = "strict") -> TextIO:
    """
    Opens a text file for reading. The encoding is given by the byte order mark, and is UTF-8 without one. Line endings
    are not translated.

    Args:
        file (`Path`): the file.
        name (`str`): the name of the file in error messages.
        errors (`str`): `"strict"` raises an error for invalid bytes, `"replace"` inserts a replacement character.

    Raises:
        `OSError`: if the file does not exist. `ValueError`: if it is a folder, a device or a named pipe.
    """
    check_regular_file(file, name)
    with open(file, "rb") as content:
        start = content.read(4)
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")
    return open(file, encoding=encoding, errors=errors, newline="")


def read_lines(file: Path, name: str = "file") -> list[str]:
    """Returns the lines of a file without surrounding whitespace, and leaves out empty lines."""
    with open_text(file, name) as lines:
        return [line.strip() for line in _bounded(lines) if line.strip()]


def read_json(file: Path, name: str = "file") -> Any:
    """Returns the content of a JSON file."""
    with open_text(file, name) as text:
        return json.load(text)


def read_rows(file: Path, name: str = "table", errors: str = "strict") -> Iterator[tuple[int, dict | str]]:
    """
    Yields the rows of a table. A file named `.csv` or `.tsv` is read as CSV with a header, with commas, semicolons or
    tabs as the delimiter, because spreadsheets use all of them. Any other file is read as JSON lines.

    Args:
        file (`Path`), name (`str`), errors (`str`): see [`open_text`].

    Yields:
        `tuple[int, dict | str]`: the line number, and the row as a `dict`, or a `str` with the reason why the line
            cannot be read. If the rest of the file cannot be read, the last item gives the reason.

    Raises:
        `OSError` or `ValueError`: see [`open_text`].
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
    twice = sorted({name for name in names if name and names.count(name) > 1}) if len(names) <= MAX_COLUMNS else names
    if twice:
        raise ValueError(f"the header has columns twice, or too many: {twice!s:.80}")
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
