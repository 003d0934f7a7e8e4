"""Rows and samples for training: all sources, their order, and unusable rows."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
import zlib
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_image_processor, make_picture
from PIL import Image
from training_columns import ERROR_COLUMN
from training_data import BadSample, Columns, FeatureCache, Preparation, Samples, open_picture, summary
from training_rows import FiniteRows, StreamedRows, load_rows
from training_shards import read_shards


def encoded(picture: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


PICTURE = encoded(make_picture())


def write_shard(file, entries: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def names(rows, count: int, position=(0, 0)) -> list[str]:
    return [name for _, name, _ in islice(rows.read(position), count)]


def keyed(count: int) -> list[dict]:
    return [{"__key__": str(index)} for index in range(count)]


def test_each_epoch_has_every_row_once_in_a_new_order():
    read = names(FiniteRows(keyed(10), seed=0, batch_size=4), 30)
    epochs = [read[:10], read[10:20], read[20:]]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert names(FiniteRows(keyed(10), seed=1, batch_size=4), 10) != epochs[0]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_together_read_the_rows_of_one_process(processes):
    alone = names(FiniteRows(keyed(11), 0, 2 * processes), 60)
    each = [names(FiniteRows(keyed(11), 0, 2, index, processes), 60 // processes) for index in range(processes)]
    together = [row for start in range(0, 60 // processes, 2) for read in each for row in read[start : start + 2]]
    assert together == alone


@pytest.mark.parametrize("at", [1, 10, 11, 23])
def test_reading_continues_from_a_position(at, tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", {f"{number}{i}.txt": b"a" for i in range(4)})
    stream = load_rows(tmp_path)
    for rows in (FiniteRows(keyed(11), 0, 2), StreamedRows(stream, 0, buffer_size=5)):
        uncut = list(islice(rows.read((0, 0)), 40))
        position = uncut[at - 1][0]
        assert names(rows, 40 - at, position) == [name for _, name, _ in uncut[at:]]


def test_streams_are_shuffled_and_divided_among_processes(tmp_path):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", {f"{number}{i}.txt": b"a" for i in range(5)})
    everything = names(StreamedRows(load_rows(tmp_path), 0, 8), 40)
    first, second = everything[:20], everything[20:]
    assert sorted(first) == sorted(second) and len(set(first)) == 20
    assert first != second and first != sorted(first)
    each = [names(StreamedRows(load_rows(tmp_path), 0, 8, index, 2), 10) for index in range(2)]
    assert sorted(each[0] + each[1]) == sorted(first)
    # four shards cannot be divided by three
    each = [names(StreamedRows(load_rows(tmp_path), 0, 8, index, 3), 6) for index in range(3)]
    assert len(set(sum(each, []))) == 18


def test_files_of_a_shard_become_columns(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        {
            "x/1.jpg": b"picture", "x/1.mask.png": b"mask", "x/1.json": b'{"text": "a cat", "query": "cat"}',
            "2.webp": b"other", "2.txt": b"a dog\n", "2.query.txt": b"dog",
        },
    )  # fmt: skip
    first, second = read_shards([str(tmp_path / "a.tar")])
    assert first["__key__"].endswith("a.tar:x/1")
    assert (first["image"], first["mask"], first["text"], first["query"]) == (b"picture", b"mask", "a cat", "cat")
    assert (second["image"], second["text"], second["query"]) == (b"other", "a dog", "dog")


def folder_of_everything(folder) -> None:
    """Writes a folder with one usable row and each kind of bad row."""
    (folder / "good.png").write_bytes(PICTURE)
    (folder / "truncated.png").write_bytes(PICTURE[: len(PICTURE) // 2])
    (folder / "text.png").write_bytes(b"this is no picture")
    (folder / "empty.png").write_bytes(b"")
    make_picture(size=(9, 9)).save(folder / "tiny.png")
    rows = [{"file_name": f"{name}.png", "text": "a cat", "query": "cat"} for name in BAD if name.isalpha()]
    rows += [{"file_name": "good.png", "text": "a cat", "query": "cat"}]
    rows += [{"file_name": "good.png", "text": "", "query": "cat"}, {"file_name": "good.png", "text": "a cat"}]
    rows += [{"file_name": "good.png", "text": 3, "query": "cat"}, {"text": "a cat", "query": "cat"}]
    lines = [json.dumps(row) for row in rows] + ["{half a line", "[]"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


BAD = {
    "missing": "cannot be read",
    "truncated": "cannot be decoded",
    "text": "cannot be decoded",
    "empty": "missing",
    "tiny": "9 x 9 pixels, less than 16",
}
PREPARE = Preparation(Columns(), make_image_processor(), 16, 16)


@pytest.mark.parametrize("threads", [0, 3])
def test_bad_rows_are_left_out_and_reported(tmp_path, threads):
    folder_of_everything(tmp_path)
    rows = load_rows(tmp_path)
    for index, row in enumerate(rows):
        row["__key__"] = row.get("__key__", f"{index} {row.get('file_name', '')}")
    told = []
    samples = Samples(FiniteRows(rows, 0, 1), PREPARE, threads=threads, log=told.append)
    for sample in islice(samples, 3):
        assert (sample["caption"], sample["queries"]) == ("a cat", ["cat"])
    assert len(samples.bad) == len(told) == len(rows) - 1
    for name, reason in BAD.items():
        ((_, given),) = [(row, bad) for row, bad in samples.bad.items() if row.endswith(f" {name}.png")]
        assert reason in given
    reasons = " ".join(samples.bad.values())
    for reason in (
        "text is missing",
        "query is missing",
        "text is not a text: 3",
        "image is missing",
        "not JSON",
        "not a JSON object",
    ):
        assert reason in reasons
    assert f"{len(rows) - 1} bad samples" in summary(samples.bad)
    assert "and 2 more" in summary(samples.bad, most=len(rows) - 3)


def test_bad_rows_in_a_stream_are_left_out_and_reported(tmp_path):
    texts = json.dumps({"text": "a cat", "query": "cat"}).encode()
    write_shard(
        tmp_path / "1.tar",
        {"good.png": PICTURE, "good.json": texts, "half.png": PICTURE[:300], "half.json": texts,
         "broken.png": PICTURE, "broken.json": b"{half", "alone.json": texts},
    )  # fmt: skip
    write_shard(tmp_path / "2.tar", {"also.png": PICTURE, "also.json": texts, "cut.json": texts, "cut.png": PICTURE})
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[: whole.rindex(PICTURE) + 700])
    (tmp_path / "3.tar").write_bytes(b"no archive at all")
    samples = Samples(StreamedRows(load_rows(tmp_path), 0, 4), PREPARE)
    assert len(list(islice(samples, 6))) == 6
    named = {name.rsplit("/", 1)[-1]: reason for name, reason in samples.bad.items()}
    assert {"1.tar:half", "1.tar:broken", "1.tar:alone", "2.tar", "3.tar"} <= set(named)
    assert "JSON" in named["1.tar:broken"] and "unexpected end" in named["2.tar"]


TEXTS = {"text": "a cat", "query": "cat"}


def entry(name: str, content: bytes = b"", size: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar entry. `size` is the declared size, which can differ from the real one."""
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content) if size is None else size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)


def sparse_entry(name: str, size: int, more: bool = False) -> bytes:
    """An entry without content that is read as `size` zeros, as in sparse files of GNU tar. `more` tells that the map
    continues in the next block."""
    header = bytearray(entry(name, kind=tarfile.GNUTYPE_SPARSE))
    header[482] = more
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def extended_header(kind: bytes = tarfile.XHDTYPE, **values) -> bytes:
    """A pax header with the given values for the next entry."""
    records = [f" {name.replace('_', '.')}={value}\n" for name, value in values.items()]
    # the number at the start of a record counts its own digits, so it is padded with zeros to six digits
    return entry("pax", "".join(f"{len(record) + 6:06}{record}" for record in records).encode(), kind=kind)


def gzipped(head: bytes, block: bytes = b"", count: int = 0) -> bytes:
    """A gzip file with one member, in which `block` follows `count` times after `head`. The compressed block is copied,
    so that this is fast even for gigabytes. The file is cut off after the last block."""
    compressor = zlib.compressobj(9, wbits=31)
    start = compressor.compress(head) + compressor.flush(zlib.Z_FULL_FLUSH)
    return start + (compressor.compress(block) + compressor.flush(zlib.Z_FULL_FLUSH)) * count


GOOD = entry("good.png", PICTURE) + entry("good.json", json.dumps(TEXTS).encode())
HUGE = 20 * 10**9
# a block of the map of a sparse file, which tells that another one follows
SPARSE_MAP = b"%011o\0" % 1 * 42 + b"\1" + b"\0" * 7
BAD_SHARDS = {
    "sparse": GOOD + sparse_entry("bomb.png", HUGE),
    "huge": GOOD + entry("bomb.png", size=HUGE) + b"\0" * 600,
    "a long name": GOOD + entry("././@LongLink", size=HUGE, kind=tarfile.GNUTYPE_LONGNAME),
    "a header": GOOD + entry("pax", size=HUGE, kind=tarfile.XHDTYPE),
    "zeros, gzipped": gzip.compress(GOOD + entry("bomb.png", size=2**28) + b"\0" * 2**24, 1),
    "zeros, bz2": bz2.compress(GOOD + entry("bomb.png", size=2**28) + b"\0" * 2**24, 9),
    "folders, gzipped": gzip.compress(GOOD + entry("folder/", kind=tarfile.DIRTYPE) * 20_000, 1),
    "4 GB of folders, gzipped": gzipped(GOOD, entry("folder/", kind=tarfile.DIRTYPE) * 8192, 1000),
    "4 GB of files without suffix, gzipped": gzipped(GOOD, entry("bomb", b"\0" * 2**22), 1000),
    "4 GB of zeros without suffix, gzipped": gzipped(GOOD + entry("bomb", size=2**32), b"\0" * 2**22, 1000),
    "4 GB of zeros without suffix, bz2": bz2.compress(GOOD + entry("bomb", size=2**32) + b"\0" * 2**24, 9),
    "4 GB of headers for all files, gzipped": gzipped(
        GOOD, extended_header(tarfile.XGLTYPE, comment="x" * 9999) + entry("file"), 2**16
    ),
    "4 GB of a map, gzipped": gzipped(GOOD + sparse_entry("bomb.png", 9, True), SPARSE_MAP * 2**13, 2**10),
    "sparse in a header, 0.0": GOOD + extended_header(GNU_sparse_size=9) + entry("bomb.png") * 2,
    "sparse in a header, 0.1": GOOD + extended_header(GNU_sparse_map="0,1," * 9 + "0,1") + entry("bomb.png") * 2,
    "sparse in a header, 1.0": gzipped(
        GOOD
        + extended_header(GNU_sparse_major=1, GNU_sparse_minor=0)
        + entry("bomb.png", b"99999999999\n" + b"1\n" * 250),
        b"1\n" * 2**21,
        1000,
    ),
    "negative size in a header": GOOD + extended_header(size=-5) + entry("bomb.png") * 2,
    "negative size": GOOD + entry("bomb.png", size=-5) + GOOD,
    "many files of one sample": GOOD + b"".join(entry(f"many.{index}.png") for index in range(2000)),
    "damaged header": GOOD + b"x" * 512 + GOOD,
    "half of a header": GOOD + GOOD[:300],
    "json": GOOD + entry("bomb.json", size=2**21),
    "noise": bytes(range(256)) * 40,
    "cut off": GOOD[:-500],
    "xz of noise": b"\xfd7zXZ\0" + bytes(range(256)),
    "empty": b"",
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_shards_that_exceed_the_size_limits_are_left_out(tmp_path, kind):
    (tmp_path / "0.tar").write_bytes(BAD_SHARDS[kind])
    (tmp_path / "1.tar").write_bytes(GOOD)
    samples = Samples(StreamedRows(load_rows(tmp_path), 0, 1), PREPARE)
    tracemalloc.start()
    assert len(list(islice(samples, 3))) == 3
    assert tracemalloc.get_traced_memory()[1] < 150 * 2**20
    tracemalloc.stop()
    if kind == "empty":
        return
    assert any("0.tar" in name for name in samples.bad)
    assert any("cannot be read" in reason for reason in samples.bad.values())


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards_of_several_parts_are_read_completely(tmp_path, compress):
    """Some tools write a compressed file in parts, which are compressed one by one."""
    samples = [
        entry(f"{number}.png", PICTURE) + entry(f"folder{number}/", kind=tarfile.DIRTYPE) for number in range(9)
    ]
    end = b"\0" * 1024
    (tmp_path / "0.tar").write_bytes(b"".join(map(compress, [*samples, end])))
    rows = list(read_shards([str(tmp_path / "0.tar")]))
    assert [(row["__key__"][-1], row.get("image")) for row in rows] == [(str(i), PICTURE) for i in range(9)]


def test_gzipped_blocks_are_one_member():
    unpacked = zlib.decompressobj(wbits=31)
    assert unpacked.decompress(gzipped(b"head", b"block", 3)) == b"head" + b"block" * 3 and not unpacked.unused_data


@pytest.mark.parametrize(
    "columns",
    [
        {"image": "/etc/hostname"}, {"image": {"path": "good.png"}}, {"image": ["good.png"]}, {"image": 3}, {"text": None},
        {"text": "half of a letter: \ud83d"}, {"query": "x" * 10**5}, {"query": {"a": 1}}, {"text": ["a cat"]},
        {"query": ["cat"] * 10**5}, {"query": ["cat", 3]}, {"query": []},
    ],
)  # fmt: skip
def test_invalid_json_values_in_a_shard_are_a_bad_sample(tmp_path, columns):
    with_picture = entry("0.png", PICTURE) * ("image" not in columns)
    (tmp_path / "0.tar").write_bytes(with_picture + entry("0.json", json.dumps({**TEXTS, **columns}).encode()) + GOOD)
    samples = Samples(StreamedRows(load_rows(tmp_path), 0, 1), PREPARE)
    assert len(list(islice(samples, 2))) == 2
    ((name, reason),) = samples.bad.items()
    assert name.endswith("0.tar:0") and "root:" not in reason


@pytest.mark.parametrize("order", [1, -1])
def test_a_picture_in_a_shard_takes_precedence_over_its_json(tmp_path, order):
    described = json.dumps({**TEXTS, "image": "/etc/hostname", "__key__": "x", "__error__": "y"}).encode()
    parts = [entry("0.png", PICTURE), entry("0.json", described)][::order]
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    ((row,), (_, _, again)) = (
        list(read_shards([str(tmp_path / "0.tar")])),
        next(StreamedRows(load_rows(tmp_path), 0, 1).read((0, 0))),
    )
    assert row["image"] == again["image"] == PICTURE and row["__key__"].endswith("0.tar:0") and "__error__" not in row


def test_numbered_files_of_a_shard_become_a_sorted_list(tmp_path):
    order = [10, 0, 2]
    entries = [entry(f"0.reference.{number}.png", bytes([number]) * 9) for number in order]
    described = {"reference": "named in JSON as well", "a.1": "x", "a": "y"}
    (tmp_path / "0.tar").write_bytes(b"".join(entries) + entry("0.json", json.dumps(described).encode()) + GOOD)
    first, second = read_shards([str(tmp_path / "0.tar")])
    assert first["reference"] == [bytes([number]) * 9 for number in sorted(order)]
    assert second["image"] == PICTURE


def test_pipes_and_folders_are_left_out_and_reported(tmp_path):
    for name in ("0.tar", "picture.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "1.tar").mkdir()
    (tmp_path / "2.tar").write_bytes(GOOD)
    samples = Samples(StreamedRows(load_rows(tmp_path), 0, 1), PREPARE)
    assert len(list(islice(samples, 2))) == 2
    assert sorted(name[-5:] for name in samples.bad) == ["0.tar", "1.tar"]
    assert all("is not a regular file" in reason for reason in samples.bad.values())
    with pytest.raises(BadSample, match="image cannot be read: .*not a regular file"):
        open_picture(tmp_path / "picture.png")


@pytest.mark.parametrize("key", ["path", "bytes"])
@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}", "simplecache::file://{}"])
@pytest.mark.parametrize("column", ["image", "reference", "mask"])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "0.tar", "1.tar"])
def test_json_does_not_name_files_to_open(tmp_path, monkeypatch, kind, column, form, key):
    (tmp_path / "set").mkdir()
    outside = tmp_path / "outside.png"
    outside.write_bytes(PICTURE)
    cell = {key: form.format(outside)}
    row = {**TEXTS, column: [cell] if kind == "1.tar" and column != "image" else cell}
    if kind == "metadata.jsonl":
        (tmp_path / "set" / "good.png").write_bytes(PICTURE)
        row = {"file_name": "good.png", "reference_file_name": "good.png", **row}
        content = json.dumps(row).encode()
    else:
        parts = {"image": entry("0.png", PICTURE), "reference": entry("0.reference.png", PICTURE)}
        content = b"".join(parts[part] for part in parts if part != column) + entry("0.json", json.dumps(row).encode())
    (tmp_path / "set" / kind).write_bytes(content)
    rows = load_rows(tmp_path / "set")
    rows = FiniteRows(rows, 0, 1) if kind == "metadata.jsonl" else StreamedRows(rows, 0, 1)
    prepare = Preparation(Columns(reference="reference", mask="mask"), make_image_processor(), 16, 16)
    opened = []
    monkeypatch.setattr("training_data._read_file", lambda path, name: opened.append(path) or PICTURE)
    with pytest.raises(ValueError, match=f"{column} is (missing|the text)"):
        next(iter(Samples(rows, prepare)))
    assert not [path for path in opened if "outside" in str(path)]


def test_a_dict_of_a_dataset_holds_the_bytes_of_its_picture():
    assert open_picture({"bytes": PICTURE, "path": "/etc/hostname"}).size == make_picture().size


def test_paths_outside_of_the_folder_are_rejected(tmp_path):
    inside, outside = tmp_path / "set" / "a", tmp_path / "outside.png"
    inside.mkdir(parents=True)
    outside.write_bytes(PICTURE)
    (tmp_path / "set" / "beside.png").write_bytes(PICTURE)
    (tmp_path / "set" / "metadata.jsonl").symlink_to("/dev/null")
    names = ["../beside.png", str(tmp_path / "set" / "beside.png"), "../../outside.png", str(outside), "/etc/passwd",
             "a/../../../outside.png", "nul\0.png", "n" * 300, "half\ud83d.png", "..", ".", "/dev/zero"]  # fmt: skip
    lines = [json.dumps({"file_name": name, **TEXTS}) for name in names]
    lines.append(json.dumps({"image": str(outside), "file_name": "", **TEXTS}))
    lines.append(json.dumps({"file_name": "../beside.png", "mask_file_name": str(outside), **TEXTS}))
    (inside / "metadata.jsonl").write_text("\n".join(lines))
    rows = load_rows(tmp_path / "set")
    samples = Samples(FiniteRows([{**row, "__key__": str(index)} for index, row in enumerate(rows)], 0, 1), PREPARE)
    assert len(list(islice(samples, 4))) == 4
    assert len(rows) == len(names) + 3 and "not a regular file" in samples.bad[str(len(rows) - 1)]
    assert sorted(map(int, samples.bad)) == list(range(2, len(rows)))
    assert all("lies outside of" in samples.bad[str(index)] for index in (2, 3, 4, 5, 11, 13))


@pytest.mark.parametrize("folder", [".", "..", "set", "../set"])
def test_paths_outside_of_a_relative_folder_are_rejected(tmp_path, monkeypatch, folder):
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(PICTURE)
    metadata = tmp_path / "set" / "metadata.jsonl"
    if folder == "..":
        names = ["../../outside.png"]
        metadata = tmp_path / "set" / "a" / "metadata.jsonl"
    else:
        names = ["../outside.png", "a/../../outside.png"]
    metadata.write_text("\n".join(json.dumps({"file_name": name, **TEXTS}) for name in names))
    monkeypatch.chdir(tmp_path / {".": "set", "..": "set/a", "set": "", "../set": "set"}[folder])
    rows = load_rows(folder)
    assert len(rows) == len(names) and all("lies outside of" in row[ERROR_COLUMN] for row in rows)


def test_a_file_name_is_not_a_chain_of_file_systems(tmp_path):
    """fsspec would open the pipe behind "::", and wait."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe::x").write_bytes(PICTURE)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "pipe::x", **TEXTS}))
    assert len(list(islice(Samples(FiniteRows(load_rows(tmp_path), 0, 1), PREPARE), 2))) == 2
    (tmp_path / "pipe::x.tar").write_bytes(GOOD)
    assert len(list(islice(Samples(StreamedRows(load_rows(tmp_path), 0, 1), PREPARE), 2))) == 2


def test_a_metadata_file_of_short_lines_is_not_read_to_its_end(tmp_path):
    content = json.dumps({"file_name": "a.png", **TEXTS}) + "\n" + "[]\n{}\n" * 100_000
    (tmp_path / "metadata.jsonl").write_text(content)
    rows = load_rows(tmp_path)
    assert len(rows) < 2000 and "the rest of this file is left out" in rows[-1][ERROR_COLUMN]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    return tmp_path / "cache"


def write_table(file, features: dict | None = None, types: dict | None = None, **columns) -> None:
    """Writes a Parquet file. `features` are the types that `datasets` would use."""
    file.parent.mkdir(exist_ok=True)
    table = pa.table({name: pa.array(cells, (types or {}).get(name)) for name, cells in columns.items()})
    if features is not None:
        texts = {name: {"dtype": "string", "_type": "Value"} for name in TEXTS}
        described = {"info": {"features": {"image": {"_type": "Image"}, **texts, **features}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    pq.write_table(table, file, row_group_size=4)


def good_cells(count: int) -> dict:
    return {"image": [{"bytes": PICTURE, "path": None}] * count, "text": ["a cat"] * count, "query": ["cat"] * count}


def table_samples(folder, streaming: bool, columns=None) -> Samples:
    rows = load_rows(folder, streaming=streaming, columns=columns)
    return Samples(StreamedRows(rows, 0, 1) if streaming else FiniteRows(rows, 0, 1), PREPARE)


@pytest.mark.parametrize("streaming", [False, True])
def test_file_names_in_a_table_are_not_opened(tmp_path, cache, streaming):
    (tmp_path / "secret.png").write_bytes(PICTURE)
    cells = good_cells(2)
    cells["image"][1] = {"bytes": None, "path": str(tmp_path / "secret.png")}
    write_table(tmp_path / "set" / "train.parquet", {}, **cells)
    samples = table_samples(tmp_path / "set", streaming)
    assert len(list(islice(samples, 3))) == 3
    ((name, reason),) = samples.bad.items()
    assert name.endswith("train.parquet, row 1") and reason == "image is missing"


FILE_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "feature",
    [
        {"a": {"_type": "Image"}}, {"a": [{"_type": "Image"}]}, {"_type": "Audio"}, {"_type": "Video"}, {"_type": "Pdf"},
        {"_type": "Unknown"}, {"_type": "Array2D", "shape": [10**5, 10**5], "dtype": "float32"}, {"_type": "Image"}, 3,
    ],
)  # fmt: skip
def test_other_columns_of_a_table_are_not_opened(tmp_path, cache, feature, streaming):
    os.mkfifo(tmp_path / "pipe")
    cell, kind = {"bytes": None, "path": str(tmp_path / "pipe")}, FILE_CELL
    if isinstance(feature, dict) and "a" in feature:
        nested = isinstance(feature["a"], list)
        cell, kind = {"a": [cell] if nested else cell}, pa.struct([("a", pa.list_(kind) if nested else kind)])
    cells = {**good_cells(3), "extra": [cell] * 3}
    write_table(tmp_path / "set" / "a.parquet", {"extra": feature}, {"extra": kind}, **cells)
    for columns in (None, Columns().names()):
        samples = table_samples(tmp_path / "set", streaming, columns)
        assert len(list(islice(samples, 4))) == 4 and not samples.bad


@pytest.mark.parametrize("content", [b"", b"PAR1" * 100, "pipe"])
def test_an_unreadable_parquet_file_raises_an_error(tmp_path, content):
    if content == "pipe":
        os.mkfifo(tmp_path / "a.parquet")
    else:
        (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="`train_data_dir`: .*a.parquet"):
        load_rows(tmp_path)


def repeated(content: bytes, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array([content]))


# each is the column of pictures in a file of a few KB
BAD_TABLES = {
    "a million rows": lambda: repeated(b"x" * 5000, 10**6),
    "4 GB in a dictionary": lambda: repeated(b"x" * 2**20, 4000),
    "a list of a billion values": lambda: pa.array([[None] * 10**5] * 100, pa.list_(pa.binary())),
    "a picture of 140 MB": lambda: [b"\0" * (14 * 10**7)],
}


def write_bad_table(folder, kind: str) -> None:
    """Writes the Parquet file `bad.parquet`, and another one with a good row."""
    picture = BAD_TABLES[kind]()
    cells = {name: repeated(text.encode(), len(picture)) for name, text in TEXTS.items()}
    table = pa.table({"image": picture, **cells})
    options = {"use_dictionary": len(picture) > 1, "write_statistics": False, "dictionary_pagesize_limit": 2**22}
    pq.write_table(table, folder / "bad.parquet", compression="zstd", **options)
    write_table(folder / "good.parquet", {}, **good_cells(1))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [b"", b"PAR1" * 100, "pipe", "cut off", "other columns"])
def test_an_unusable_table_is_left_out(tmp_path, cache, kind, streaming):
    file = tmp_path / "set" / "bad.parquet"
    write_table(file, {}, **({"a": [1]} if kind == "other columns" else good_cells(9)))
    write_table(tmp_path / "set" / "good.parquet", {}, **good_cells(1))
    if kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif kind != "other columns":
        file.write_bytes(file.read_bytes()[:-5] if kind == "cut off" else kind)
    samples = table_samples(tmp_path / "set", streaming, Columns().names())
    assert len(list(islice(samples, 3))) == 3
    ((name, reason),) = samples.bad.items()
    assert "bad.parquet" in name and "cannot be read" in reason


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["image", "extra"])
def test_a_table_with_a_damaged_part(tmp_path, cache, column, streaming):
    file = tmp_path / "set" / "a.parquet"
    write_table(file, {}, **good_cells(12), extra=[f"some text {number}" for number in range(12)])
    metadata, content = pq.read_metadata(file), bytearray(file.read_bytes())
    damaged = metadata.row_group(1).column(0 if column == "image" else metadata.num_columns - 1)
    start = damaged.dictionary_page_offset
    content[start : start + damaged.total_compressed_size] = b"\xff" * damaged.total_compressed_size
    file.write_bytes(content)
    samples = table_samples(tmp_path / "set", streaming, Columns().names())
    assert len(list(islice(samples, 12))) == 12
    if column == "extra":  # is not read
        assert not samples.bad
    else:
        ((name, reason),) = samples.bad.items()
        assert name.endswith("a.parquet, row 4") and "the rest of this table cannot be read" in reason


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_is_not_utf8_is_a_bad_sample(tmp_path, cache, streaming):
    cells = {**good_cells(3), "text": pa.array([b"a cat", b"\xff", b"a dog"]).view(pa.string())}
    write_table(tmp_path / "set" / "a.parquet", **cells)
    samples = table_samples(tmp_path / "set", streaming)
    assert {sample["caption"] for sample in islice(samples, 4)} == {"a cat", "a dog"}
    assert [name[-5:] for name in samples.bad] == ["row 1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_can_have_different_types(tmp_path, cache, streaming):
    plain = {**good_cells(1), "image": [PICTURE]}
    write_table(tmp_path / "set" / "0.parquet", {}, **good_cells(2))
    write_table(tmp_path / "set" / "1.parquet", types={"image": pa.large_binary(), "text": pa.large_string()}, **plain)
    write_table(tmp_path / "set" / "2.parquet", **{**plain, "text": pa.array(["a dog"]).dictionary_encode()})
    write_table(tmp_path / "set" / "3.parquet", **{**plain, "query": [["cat", "mat"]]})
    write_table(tmp_path / "set" / "4.parquet", image=[PICTURE], text=["no query"])
    write_table(tmp_path / "set" / "5.parquet", **{**plain, "text": [3]})
    write_table(tmp_path / "set" / "6.parquet", **good_cells(0))
    samples = table_samples(tmp_path / "set", streaming)
    read = [(sample["caption"], len(sample["queries"])) for sample in islice(samples, 10)]
    assert sorted(set(read)) == [("a cat", 1), ("a cat", 2), ("a dog", 1)]
    assert sorted(name[-16:] for name in samples.bad) == ["4.parquet, row 0", "5.parquet, row 0"]


def test_a_changed_table_is_read_again(tmp_path, cache):
    for text in ("a cat", "a dog", "a dog"):
        write_table(tmp_path / "set" / "a.parquet", **{**good_cells(1), "text": [text]})
        (sample,) = islice(table_samples(tmp_path / "set", False), 1)
        assert sample["caption"] == text
    assert len(list(cache.rglob("*.arrow"))) in (2, 3)


def test_a_table_without_rows_raises_an_error(tmp_path, cache):
    write_table(tmp_path / "a.parquet", {}, **good_cells(0))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="has no rows"):
            next(iter(table_samples(tmp_path, streaming)))


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_with_broken_pictures_do_not_crash(tmp_path, cache, streaming):
    pictures = [{"bytes": PICTURE, "path": None}, {"bytes": PICTURE[:300], "path": None}, None]
    write_table(tmp_path / "set" / "train.parquet", {}, **{**good_cells(3), "image": pictures})
    samples = table_samples(tmp_path / "set", streaming)
    assert [sample["pixel_values"].shape for sample in islice(samples, 2)] == [(3, 16, 16)] * 2
    assert len(samples.bad) >= 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["pictures", "parquet"])
def test_a_dataset_by_name_opens_only_its_own_files(tmp_path, cache, kind, streaming):
    """A dataset by name can be a folder on this machine. Its pictures are files, and other types are not opened."""
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(PICTURE)
    os.mkfifo(tmp_path / "pipe")
    if kind == "pictures":
        (folder / "1.png").write_bytes(PICTURE)
        line = {"file_name": "1.png", **TEXTS, "extra": {"path": str(tmp_path / "pipe"), "bytes": None}}
        (folder / "metadata.jsonl").write_text(json.dumps(line))
    else:
        paths = [str(tmp_path / "outside.png"), f"file://{tmp_path}/outside.png", str(folder / "../outside.png")]
        cells = good_cells(1 + len(paths))
        cells["image"][1:] = [{"bytes": None, "path": path} for path in paths]
        extra = [{"a": {"bytes": None, "path": str(tmp_path / "pipe")}}] * len(cells["image"])
        other = {"extra": {"a": {"_type": "Image"}}, "sound": {"_type": "Audio"}}
        types = {"extra": pa.struct([("a", FILE_CELL)]), "sound": FILE_CELL}
        write_table(folder / "a.parquet", other, types, **cells, extra=extra, sound=[each["a"] for each in extra])
    for columns in (None, Columns().names()):
        rows = load_rows(dataset_name=str(folder), streaming=streaming, columns=columns)
        samples = Samples(StreamedRows(rows, 0, 1) if streaming else FiniteRows(rows, 0, 1), PREPARE)
        assert len(list(islice(samples, 2))) == 2
        assert len(samples.bad) == (3 if kind == "parquet" else 0)
        assert all("is the text" in reason for reason in samples.bad.values())


def test_shards_that_datasets_reads_itself(tmp_path):
    write_shard(tmp_path / "a.tar", {"1.png": PICTURE, "1.json": b'{"text": "a cat", "query": "cat"}'})
    stream = datasets.load_dataset("webdataset", data_files=str(tmp_path / "a.tar"), split="train", streaming=True)
    stream = stream.cast_column("png", datasets.Image(decode=False))
    (sample,) = islice(Samples(StreamedRows(stream, 0, 1), PREPARE), 1)
    assert sample["caption"] == "a cat"


def test_a_training_set_without_usable_rows_raises_an_error():
    with pytest.raises(ValueError, match="No row of the training set can be used"):
        next(iter(Samples(FiniteRows([{}, {}], 0, 1, 1, 3), PREPARE)))


@pytest.mark.parametrize("given", [{}, {"train_data_dir": ".", "dataset_name": "a"}, {"train_data_dir": "nowhere"}])
def test_a_missing_training_set_raises_an_error(given):
    with pytest.raises(ValueError, match="train_data_dir"):
        load_rows(**given)


def test_an_empty_folder_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="metadata"):
        load_rows(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_in_the_encodings_of_spreadsheets(tmp_path, encoding, suffix):
    (tmp_path / "1.png").write_bytes(PICTURE)
    text = "file_name,text,query\r\n1.png,a café,café\r\n"
    if suffix == "jsonl":
        text = json.dumps({"file_name": "1.png", "text": "a café", "query": "café"}, ensure_ascii=False) + "\n"
    (tmp_path / f"metadata.{suffix}").write_bytes(text.encode(encoding))
    (sample,) = islice(Samples(FiniteRows(load_rows(tmp_path), 0, 1), PREPARE), 1)
    assert (sample["caption"], sample["queries"]) == ("a café", ["café"])


def test_csv_metadata_in_a_subfolder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(PICTURE)
    (tmp_path / "a" / "metadata.csv").write_text('file_name,text,query\n1.png,"a cat, a dog",cat\n')
    (sample,) = islice(Samples(FiniteRows(load_rows(tmp_path), 0, 1), PREPARE), 1)
    assert sample["caption"] == "a cat, a dog"


def striped(size=(48, 32)) -> Image.Image:
    """A picture that is red on the left, green in the middle and blue on the right."""
    picture = Image.new("RGB", size, (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, 8, size[1]))
    picture.paste((0, 0, 255), (size[0] - 8, 0, *size))
    return picture


def test_a_reference_that_is_also_the_target_is_cropped_like_it():
    processor = make_image_processor()
    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 0, 24, 32))
    row = {"image": encoded(striped()), "mask": encoded(mask), "text": "a wall"}
    sample = Preparation(Columns(mask="mask"), processor, 16)(row)
    assert sample["queries"] == ["a wall"]
    # the central square only contains the middle
    assert torch.equal(sample["pixel_values"], torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 16, 16))
    assert sample["reference_values"][0].flatten(1).std(1).max() < 1e-5
    assert sample["masks"][0].mean((0, 1)).round().tolist() == [1.0] * 16 + [0.0] * 16
    empty = Preparation(Columns(mask="mask"), processor, 16, mask_query="empty")
    assert empty(row)["queries"] == [""] and empty({**row, "query": "wall"})["queries"] == ["wall"]


def test_a_separate_reference_is_not_cropped():
    row = {"image": PICTURE, "reference": encoded(striped()), "text": "a wall", "query": "wall"}
    sample = Preparation(Columns(reference="reference"), make_image_processor(), 16)(row)
    red, green, blue = sample["reference_values"][0]
    assert red[16, 1] > green[16, 1] and blue[16, -2] > green[16, -2] and green[16, 16] > red[16, 16]


@pytest.mark.parametrize("kind", ["folder", "parquet", "shard"])
def test_a_row_can_have_several_subjects(tmp_path, kind):
    """The row has lists of references, queries and masks, and one mask is empty, in all kinds of training sets."""
    references = [encoded(striped()), PICTURE]
    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 0, 24, 32))
    row = {"text": "a wall and a cat", "query": ["wall", "cat"]}
    if kind == "folder":
        for name, content in (("0", PICTURE), ("1", references[0]), ("2", references[1]), ("mask", encoded(mask))):
            (tmp_path / f"{name}.png").write_bytes(content)
        row |= {"file_name": "0.png", "reference_file_name": ["1.png", "2.png"], "mask_file_name": ["mask.png", None]}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    elif kind == "parquet":
        picture, pictures = datasets.Image(), datasets.List(datasets.Image())
        features = {"image": picture, "reference": pictures, "mask": pictures}
        features |= {"text": datasets.Value("string"), "query": datasets.List(datasets.Value("string"))}
        each = {"image": PICTURE, "reference": references, "mask": [encoded(mask), None]}
        each = {
            name: [[{"bytes": b} if b else None for b in v] if isinstance(v, list) else {"bytes": v}]
            for name, v in each.items()
        }
        table = datasets.Dataset.from_dict(
            {**each, **{name: [value] for name, value in row.items()}}, datasets.Features(features)
        )
        table.to_parquet(tmp_path / "a.parquet")
    else:
        names = {"1.png": PICTURE, "1.reference.0.png": references[0], "1.reference.1.png": references[1]}
        row["mask"] = None
        write_shard(tmp_path / "a.tar", {**names, "1.json": json.dumps(row).encode()})
    columns = Columns(reference="reference", mask="mask")
    prepare = Preparation(columns, make_image_processor(), 16)
    rows = load_rows(tmp_path)
    reader = StreamedRows(rows, 0) if kind == "shard" else FiniteRows(rows, 0, 1)
    (sample,) = islice(Samples(reader, prepare), 1)
    assert sample["queries"] == ["wall", "cat"]
    alone = [
        prepare({"image": PICTURE, "text": "a", "query": "b", "reference": reference})["reference_values"]
        for reference in references
    ]
    assert torch.equal(sample["reference_values"], torch.cat(alone))
    assert [each is not None for each in sample["masks"]] == [kind != "shard", False]


def test_a_value_that_is_not_a_list_applies_to_every_subject():
    prepare = Preparation(Columns(reference="reference"), make_image_processor(), 16)
    row = {"image": PICTURE, "text": "a wall", "reference": encoded(striped())}
    sample = prepare({**row, "query": ["wall", "floor"]})
    assert sample["queries"] == ["wall", "floor"] and torch.equal(*sample["reference_values"])


@pytest.mark.parametrize(
    "changed", [{"query": ["a", "b", "c"]}, {"query": []}, {"query": ["a", ""]}, {"query": ["a", 3]}]
)
def test_invalid_lists_are_a_bad_sample(changed):
    prepare = Preparation(Columns(reference="reference"), make_image_processor(), 16)
    with pytest.raises(BadSample, match="query"):
        prepare({"image": PICTURE, "text": "a wall", "reference": [PICTURE, PICTURE], **changed})


def test_a_mask_that_does_not_fit_is_a_bad_sample():
    prepare = Preparation(Columns(mask="mask"), make_image_processor(), 16)
    outside = Image.new("L", (40, 32))
    outside.paste(255, (0, 0, 3, 32))  # not in the central square
    for mask in (Image.new("L", (5, 5), 255), Image.new("L", (40, 32)), outside):
        with pytest.raises(BadSample, match="mask"):
            prepare({"image": PICTURE, "mask": encoded(mask), "text": "a", "query": "b"})


def test_pictures_are_opened_upright_and_without_transparency():
    picture = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert open_picture(picture).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "jpeg", exif=exif)
    assert open_picture(buffer.getvalue()).size == (10, 20)


def test_cache_entries_depend_on_content_and_settings(tmp_path):
    cache = FeatureCache(tmp_path, {"resolution": 16})
    digest = cache.digest(b"picture", b"a cat")
    assert cache.load(digest) is None
    cache.save(digest, {"a": torch.arange(3)}, "0")
    assert torch.equal(cache.load(digest)["a"], torch.arange(3))
    others = [cache.digest(b"picture", b"a dog"), cache.digest(b"picturea", b" cat")]
    others.append(FeatureCache(tmp_path, {"resolution": 32}).digest(b"picture", b"a cat"))
    assert len({digest, *others}) == 4
    # a truncated file is treated like a missing file
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    assert cache.load(digest) is None
