"""Reads tables and lists from text files, in the encodings that text editors and spreadsheets use."""

import codecs
import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


# UTF-32 is checked before UTF-16, because its byte order mark begins with the one of UTF-16
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
# Lines are read completely, so a file without line breaks could otherwise fill the memory.
MAX_LINE = 2**20
MAX_COLUMNS = 1024
_HINT = 'save it as UTF-8 (in a spreadsheet: "CSV UTF-8")'


def open_text(file: Path, name: str = "file") -> TextIO:
    """Opens a text file for reading. The encoding is given by the byte order mark, and is UTF-8 without one. Line
    endings are not translated. `name` is the name of the file in error messages."""
    if not file.is_file():
        raise ValueError(f"`{name}`: there is no file {file}.")
    with open(file, "rb") as content:
        start = content.read(4)
    if start == b"PK\3\4":
        raise ValueError(f"`{name}`: {file} is a workbook (such as .xlsx) or a zip file, but has to be text: {_HINT}.")
    encoding = next((encoding for mark, encoding in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
    return open(file, encoding=encoding, newline="")


class _Lines:
    """Iterates over the lines of a text and counts them."""

    def __init__(self, text: TextIO):
        self.text = text
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number += 1
        try:
            line = self.text.readline(MAX_LINE)
        except UnicodeDecodeError as error:
            # text is decoded in blocks of several lines
            self.number += error.object[: error.start].count(b"\n")
            raise ValueError(f"not {error.encoding}: {_HINT}") from error
        if not line:
            raise StopIteration
        if len(line) == MAX_LINE and line[-1] not in "\r\n":
            raise ValueError(f"a line has more than {MAX_LINE:,} characters")
        return line


def read_lines(file: Path, name: str = "file") -> list[str]:
    """Returns the lines of a file without surrounding whitespace, and leaves out empty lines."""
    with open_text(file, name) as text:
        lines = _Lines(text)
        try:
            return [line.strip() for line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f"`{name}`: {file}, line {lines.number}: {error}.") from error


def read_json(file: Path, name: str = "file") -> Any:
    """Returns the content of a JSON file."""
    with open_text(file, name) as text:
        return json.load(text)


def read_rows(file: Path, name: str = "table") -> Iterator[tuple[int, dict | str]]:
    """
    Yields the rows of a table. A file named `.csv` or `.tsv` is read as CSV with a header, with commas, semicolons or
    tabs as the delimiter, because spreadsheets use all of them. Any other file is read as JSON lines.

    Yields:
        `tuple[int, dict | str]`: the line number, and the row as a `dict`, or a `str` with the reason why the line
            cannot be read. If the rest of the file cannot be read, the last item gives the reason.
    """
    with open_text(file, name) as text:
        lines = _Lines(text)
        try:
            for row in (_csv_rows if file.suffix.lower() in (".csv", ".tsv") else _json_rows)(lines):
                yield lines.number, row
        except (csv.Error, ValueError) as error:
            yield lines.number, f"{error} (the rest of the file is not read)"


def _csv_rows(lines: _Lines) -> Iterator[dict | str]:
    header = next(lines, "")
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, restkey="", restval="")
    names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    named = [name for name in names if name]
    if len(names) > MAX_COLUMNS or len(set(named)) < len(named):
        raise ValueError(f"the header has columns twice, or too many: {names!s:.80}")
    for row in reader:
        # the fields of columns without a name, or a list of the fields after the last column
        surplus = row.pop("", "")
        if isinstance(surplus, list) and any(surplus):
            yield f"more fields than the header has: {max(surplus)!r:.80}; quote text with {delimiter!r}"
        elif any(row.values()):
            yield row


def _json_rows(lines: _Lines) -> Iterator[dict | str]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"not JSON: {error}"
        else:
            yield row if isinstance(row, dict) else "not a JSON object"


def text_of(value, name: str) -> str:
    """Returns a text without surrounding whitespace. Raises a `ValueError` if it is empty, not a text, or not UTF-8."""
    if isinstance(value, bytes):
        marked = value.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        try:
            value = value.decode("utf-16" if marked else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error}") from error
    if value is None or is_blank(value):
        raise ValueError(f"{name} is missing or empty")
    # JSON can contain halves of characters, which tokenizers cannot represent
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} is not a text: {value!r:.80}")
    return value.strip()


def is_blank(cell) -> bool:
    return isinstance(cell, (str, bytes)) and not cell.strip()
