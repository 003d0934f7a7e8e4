"""Tables and lists in the encodings that editors and spreadsheets save them in."""

import codecs
import os

import pytest
from text_files import MAX_LINE, open_text, read_json, read_lines, read_rows


ROWS = [{"a": "café, 日本", "b": "1"}, {"a": 'say "hi"\nthere', "b": ""}]
TABLES = {
    "csv": 'a,b\r\n"café, 日本",1\r\n"say ""hi""\nthere",\r\n',
    "semicolons.csv": 'a;b\r\n"café, 日本";1\r\n"say ""hi""\nthere";\r\n',
    "tabs.csv": 'a\tb\r\n"café, 日本"\t1\r\n"say ""hi""\nthere"\t\r\n',
    "empty lines and columns.csv": 'a,b,,\r\n"café, 日本",1,,\r\n,,,\r\n\r\n"say ""hi""\nthere",,,\r\n',
    "jsonl": '{"a": "café, 日本", "b": "1"}\n\n{"a": "say \\"hi\\"\\nthere", "b": ""}',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("name", TABLES)
def test_read_rows_in_all_formats(tmp_path, name, encoding):
    file = tmp_path / f"table.{name}"
    file.write_bytes((codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b"") + TABLES[name].encode(encoding))
    assert [row for _, row in read_rows(file)] == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_read_lines_removes_byte_order_marks_and_blanks(tmp_path, encoding, end):
    file = tmp_path / "prompts.txt"
    file.write_bytes(end.join(["a café ", "", " in the snow"]).encode(encoding))
    assert read_lines(file) == ["a café", "in the snow"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_can_be_read_in_all_encodings(tmp_path, encoding):
    (tmp_path / "queries.json").write_bytes('{"a.png": ["café"]}'.encode(encoding))
    assert read_json(tmp_path / "queries.json") == {"a.png": ["café"]}


@pytest.mark.parametrize(
    "name,content,reason",
    [
        ("a.jsonl", b"{half", "not JSON"),
        ("a.jsonl", b"[1]", "not a JSON object"),
        ("a.jsonl", b"[" * 10**5, "not JSON"),
        ("a.jsonl", b"\xff\xfea", "cannot be read"),
        ("a.jsonl", b"caf\xe9", "cannot be read"),
        ("a.csv", b"a,b\ncaf\xe9,1\n", "cannot be read"),
        ("a.csv", b"a,b\n1,2,3\n", "more fields than the header has: '3'"),
        ("a.csv", b'a,b\n"' + b"x" * 200_000 + b'",1', "cannot be read: field larger than field limit"),
        ("a.csv", b"x" * (MAX_LINE + 1), "a line has more than"),
        ("a.jsonl", b" " * (MAX_LINE + 1), "a line has more than"),
    ],
)
def test_invalid_rows_have_a_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    rows = [row for _, row in read_rows(tmp_path / name)]
    assert isinstance(rows[-1], str) and reason in rows[-1]


def test_rows_after_an_invalid_row_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{half\n{"a": 2}\n')
    assert [number for number, row in read_rows(tmp_path / "a.jsonl") if isinstance(row, dict)] == [1, 3]
    (tmp_path / "a.csv").write_text("a\n1\n2,3\n4\n")
    assert [number for number, row in read_rows(tmp_path / "a.csv") if isinstance(row, dict)] == [2, 4]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(codecs.BOM_UTF8)
    assert list(read_rows(tmp_path / name)) == [] == read_lines(tmp_path / name)


def test_a_named_pipe_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="`table`.*not a regular file"):
        open_text(tmp_path / "pipe", "table")
