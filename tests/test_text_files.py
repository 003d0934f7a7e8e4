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
def test_lists_and_json_in_all_encodings(tmp_path, encoding, end):
    (tmp_path / "prompts.txt").write_bytes(end.join(["a café ", "", " in the snow"]).encode(encoding))
    assert read_lines(tmp_path / "prompts.txt") == ["a café", "in the snow"]
    (tmp_path / "queries.json").write_bytes(f'{{"a.png":{end}["café"]}}'.encode(encoding))
    assert read_json(tmp_path / "queries.json") == {"a.png": ["café"]}


SAVE = 'not utf-8: save it as UTF-8 (in a spreadsheet: "CSV UTF-8")'


@pytest.mark.parametrize(
    "name, content, line, reason",
    [
        ("a.jsonl", b"{half", 1, "not JSON"),
        ("a.jsonl", b"[1]", 1, "not a JSON object"),
        ("a.jsonl", b"[" * 10**5, 1, "not JSON"),
        ("a.jsonl", b"\xff\xfea", 1, "not utf-16"),
        ("a.jsonl", b'{}\n{}\n{"a": "caf\xe9"}\n', 3, SAVE),
        # text is decoded in blocks, so the line is not the first one of its block
        ("a.csv", b"a,b\n" + b"1,2\n" * 5000 + b"caf\xe9,1\n1,2\n", 5002, SAVE),
        ("a.csv", b'a\n"two\nlines"\n"three\n\nlines"\ncaf\xe9\n', 7, SAVE),
        ("a.csv", b"a,b\n1,2,3\n", 2, "more fields than the header has: '3'"),
        ("a.csv", b'a,b\n"two\nlines",2\n1,2,3\n', 4, "more fields than the header has: '3'"),
        ("a.csv", b'a,b\n"' + b"x" * 200_000 + b'",1', 2, "field larger than field limit"),
        ("a.csv", b"a,b,a\n1,2,3\n", 1, "columns twice"),
        ("a.csv", b"x" * (MAX_LINE + 1), 1, "a line has more than"),
        ("a.jsonl", b" " * (MAX_LINE + 1), 1, "a line has more than"),
    ],
)
def test_invalid_rows_have_a_line_and_a_reason(tmp_path, name, content, line, reason):
    (tmp_path / name).write_bytes(content)
    *_, (number, row) = read_rows(tmp_path / name)
    assert isinstance(row, str) and reason in row and number == line


@pytest.mark.parametrize(
    "name, content, lines", [("a.jsonl", '{"a": 1}\n{half\n{"a": 2}\n', [1, 3]), ("a.csv", "a\n1\n2,3\n4\n", [2, 4])]
)
def test_rows_after_an_invalid_row_are_read(tmp_path, name, content, lines):
    (tmp_path / name).write_text(content)
    assert [number for number, row in read_rows(tmp_path / name) if isinstance(row, dict)] == lines


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(codecs.BOM_UTF8)
    assert list(read_rows(tmp_path / name)) == [] == read_lines(tmp_path / name)


@pytest.mark.parametrize(
    "kind, message", [("workbook", "is a workbook.*CSV UTF-8"), ("pipe", "no file"), ("none", "no file")]
)
def test_a_file_that_is_not_text_is_refused(tmp_path, kind, message):
    file = tmp_path / "table.xlsx"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "workbook":
        file.write_bytes(b"PK\3\4 and so on")
    with pytest.raises(ValueError, match=f"`table`: .*{message}"):
        open_text(file, "table")


def test_a_list_in_another_encoding_is_refused_with_its_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"a cat\na caf\xe9\n")
    with pytest.raises(ValueError, match="`prompts`: .*prompts.txt, line 2: not utf-8: save it as UTF-8"):
        read_lines(tmp_path / "prompts.txt", "prompts")
