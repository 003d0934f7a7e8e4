"""training_data.py: all kinds of training sets, the order of the rows, and rows that cannot be used."""

import bz2
import gzip
import io
import json
import os
import tarfile
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_image_processor, make_picture
from PIL import Image
from training_data import (
    Columns,
    FeatureCache,
    Preparation,
    Samples,
    load_rows,
    open_rgb,
    read_row,
    read_shards,
    shard_columns,
    summary,
)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = encoded(make_picture())
TEXTS = {"text": "a cat", "query": "cat"}
PREPARE = Preparation(Columns(), make_image_processor(), 16, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar entry."""
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    return member.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)


def shard(**files: bytes) -> bytes:
    """A tar file. The names have underscores instead of dots."""
    return b"".join(entry(name.replace("_", "."), content) for name, content in files.items()) + b"\0" * 1024


GOOD = entry("good.png", PICTURE) + entry("good.json", json.dumps(TEXTS).encode())


def write_table(file, **columns) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=4)


def good_cells(count: int) -> dict:
    return {"image": [{"bytes": PICTURE, "path": None}] * count, "text": ["a cat"] * count, "query": ["cat"] * count}


def keyed(count: int) -> list[dict]:
    return [{"__key__": str(index)} for index in range(count)]


def order(rows, count: int, **options) -> list[str]:
    """Returns the names of the rows in the order in which they are read."""
    return [name for _, name, _ in islice(Samples(rows, None, **options)._rows(), count)]


def test_each_epoch_has_every_row_once_in_a_new_order():
    read = order(keyed(10), 30)
    epochs = [read[:10], read[10:20], read[20:]]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(keyed(10), 10, seed=1) != epochs[0]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_together_read_the_rows_of_one_process(processes):
    alone = order(keyed(11), 60)
    parts = [order(keyed(11), 60 // processes, process=(index, processes)) for index in range(processes)]
    assert [name for names in zip(*parts, strict=True) for name in names] == alone


def stream_of(folder, shards: int, rows: int):
    for number in range(shards):
        names = [f"{number}{index}" for index in range(rows)]
        (folder / f"{number}.tar").write_bytes(b"".join(entry(f"{name}.txt", b"a") for name in names) + b"\0" * 1024)
    return load_rows(folder)


@pytest.mark.parametrize("at", [1, 10, 11, 23])
@pytest.mark.parametrize("kind", ["list", "parquet", "stream", "parquet stream"])
def test_reading_continues_from_a_position(at, kind, tmp_path):
    if kind == "list":
        rows = keyed(11)
    elif kind == "stream":
        rows = stream_of(tmp_path, 3, 4)
    else:
        write_table(tmp_path / "set" / "a.parquet", **good_cells(11), __key__=list(map(str, range(11))))
        rows = load_rows(tmp_path / "set", streaming="stream" in kind)
    uncut = list(islice(Samples(rows, None, buffer_size=5)._rows(), 40))
    rest = order(rows, 40 - at, position=uncut[at - 1][0], buffer_size=5)
    assert rest == [name for _, name, _ in uncut[at:]]


def test_streams_are_shuffled_and_divided_among_processes(tmp_path):
    rows = stream_of(tmp_path, 4, 5)
    everything = order(rows, 40, buffer_size=8)
    first, second = everything[:20], everything[20:]
    assert sorted(first) == sorted(second) and len(set(first)) == 20
    assert first != second and first != sorted(first)
    parts = [order(rows, 10, buffer_size=8, process=(index, 2)) for index in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(first)
    # four shards cannot be divided by three
    parts = [order(rows, 6, buffer_size=8, process=(index, 3)) for index in range(3)]
    assert len({name for names in parts for name in names}) == 18


BAD_FILES = {
    "missing": "cannot be read",
    "truncated": "cannot be decoded",
    "text": "cannot be decoded",
    "empty": "cannot be decoded",
    "tiny": "9 x 9 pixels, less than 16",
    "pipe": "not a regular file",
}
BAD_VALUES = [
    ({"text": ""}, "text is missing"),
    ({"text": None}, "text is missing"),
    ({"text": 3}, "text is not a text: 3"),
    ({"text": ["a cat"]}, "text is not a text"),
    ({"text": "half of a letter: \ud83d"}, "text is not a text"),
    ({"query": " "}, "query is missing or empty; `--query_column text`"),
    ({"query": {"a": 1}}, "query is not a text"),
    ({"query": ["cat", 3]}, "query is not a text"),
    ({"query": []}, "lists of subjects"),
    ({"query": ["cat"] * 10**5}, "lists of subjects"),
    ({"image": "/etc/hostname"}, "image is the text"),
    ({"image": {"path": "/etc/hostname"}}, "image is missing"),
    ({"image": 3}, "image is missing"),
    ({"image": ["good.png"]}, "image is missing"),
]


@pytest.mark.parametrize("threads", [0, 3])
def test_bad_rows_of_a_folder_are_left_out_and_named(tmp_path, threads):
    contents = {"good": PICTURE, "truncated": PICTURE[: len(PICTURE) // 2], "text": b"this is no image", "empty": b""}
    for name, content in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    make_picture(size=(9, 9)).save(tmp_path / "tiny.png")
    os.mkfifo(tmp_path / "pipe.png")
    rows = [{"file_name": f"{name}.png", **TEXTS} for name in [*BAD_FILES, "good"]]
    bad_values = [(changes, reason) for changes, reason in BAD_VALUES if "image" not in changes]
    rows += [{"file_name": "good.png", **TEXTS, **changes} for changes, _ in bad_values]
    lines = [*map(json.dumps, rows), "{half a line", "[]"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    told = []
    samples = Samples(load_rows(tmp_path), PREPARE, threads=threads, log=told.append)
    for sample in islice(samples, 3):
        assert (sample["caption"], sample["queries"]) == ("a cat", ["cat"])
    reasons = [*BAD_FILES.values(), None, *(reason for _, reason in bad_values), "not JSON", "not a JSON object"]
    assert len(samples.bad) == len(told) == len(lines) - 1
    for number, reason in enumerate(reasons, 1):
        named = [given for name, given in samples.bad.items() if f"line {number} " in f"{name} "]
        assert not named if reason is None else reason in named[0]
    assert f"{len(lines) - 1} bad samples" in summary(samples.bad)
    assert "and 2 more" in summary(samples.bad, most=len(lines) - 3)


@pytest.mark.parametrize("changes, reason", BAD_VALUES)
def test_bad_rows_of_a_shard_are_left_out_and_named(tmp_path, changes, reason):
    image = entry("0.png", PICTURE) * ("image" not in changes)
    (tmp_path / "0.tar").write_bytes(image + entry("0.json", json.dumps({**TEXTS, **changes}).encode()) + GOOD)
    samples = Samples(load_rows(tmp_path), PREPARE, buffer_size=1)
    assert len(list(islice(samples, 2))) == 2
    ((name, given),) = samples.bad.items()
    assert name.endswith("0.tar:0") and reason in given


@pytest.mark.parametrize("buffer_size", [1, 3])
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_a_table_are_left_out_and_named(tmp_path, streaming, buffer_size):
    cells = {
        **good_cells(6), "__key__": list("abcdef"), "text": pa.array([b"a cat", b"\xff", b"", b"a", b"a", b"a"]).view(pa.string()),
    }  # fmt: skip
    (tmp_path / "outside.png").write_bytes(PICTURE)
    cells["image"] = [*cells["image"][:3], {"bytes": PICTURE[:300], "path": None}, None,
                      {"bytes": None, "path": str(tmp_path / "outside.png")}]  # fmt: skip
    write_table(tmp_path / "set" / "a.parquet", **cells)
    samples = Samples(load_rows(tmp_path / "set", streaming=streaming), PREPARE, buffer_size=buffer_size)
    assert [sample["caption"] for sample in islice(samples, 3)] == ["a cat"] * 3
    reasons = {
        "b": "not UTF-8",
        "c": "text is missing",
        "d": "cannot be decoded",
        "e": "image is missing",
        "f": "image is missing",
    }
    assert samples.bad.keys() == reasons.keys()
    assert all(reasons[name] in samples.bad[name] for name in reasons)


NOT_UTF8 = "a café".encode("cp1252")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "cp932"])
@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl", "0.txt", "0.query.txt", "0.json"])
def test_texts_are_utf8_or_named(tmp_path, kind, encoding):
    """No text is decoded with replacement characters."""
    text = "ネコ" if encoding == "cp932" else "a café"
    row = {"file_name": "1.png", "text": text, "query": text}
    (tmp_path / "1.png").write_bytes(PICTURE)
    if kind.startswith("metadata"):
        lines = {
            ".csv": f"file_name,text,query\r\n1.png,{text},{text}\r\n",
            ".jsonl": json.dumps(row, ensure_ascii=False),
        }
        (tmp_path / kind).write_bytes(lines[kind[8:]].encode(encoding))
    else:
        files = {"0.png": PICTURE, "0.txt": text, "0.query.txt": text}
        files = {"0.png": PICTURE, kind: json.dumps(row, ensure_ascii=False)} if kind == "0.json" else files
        encoded_files = [
            entry(name, each if name == "0.png" else each.encode(encoding)) for name, each in files.items()
        ]
        (tmp_path / "0.tar").write_bytes(b"".join(encoded_files))
    valid = not encoding.startswith("cp")
    with pytest.raises(ValueError, match="not UTF-8") if not valid else pytest.MonkeyPatch.context():
        (sample,) = islice(Samples(load_rows(tmp_path), PREPARE), 1)
        assert (sample["caption"], sample["queries"]) == (text, [text])


def test_files_of_a_shard_become_columns(tmp_path):
    described = {**TEXTS, "image": "/etc/hostname", "reference": "x", "__key__": "x", "__error__": "y"}
    files = [
        ("x/1.JPG", b"image"),
        ("x/1.mask.png", b"mask"),
        ("x/1.reference.png", b"reference"),
    ]
    files += [("x/1.json", json.dumps(described).encode()), ("2.webp", b"other"), ("2.txt", b"a dog"), ("no", b"x")]
    (tmp_path / "a.tar").write_bytes(b"".join(entry(name, content) for name, content in files))
    (name, first), (_, second) = (read_row(lambda row=row: row, "") for row in read_shards([str(tmp_path / "a.tar")]))
    assert name == f"{tmp_path}/a.tar:x/1" and "__error__" not in first
    assert [first[column] for column in ("image", "mask", "text", "query")] == [b"image", b"mask", "a cat", "cat"]
    assert first["reference"] == b"reference"
    assert (second["image"], second["text"]) == (b"other", b"a dog")
    assert shard_columns({"json": {"text": "a"}, "png": None})["text"] == "a"  # as `datasets` reads a shard


BAD_SHARDS = {
    "truncated": GOOD + entry("bad.png", PICTURE)[:700],
    "damaged header": GOOD + b"x" * 512 + GOOD,
    "truncated gzip": gzip.compress(GOOD + entry("bad.png", PICTURE))[:-300],
    "damaged bz2": bz2.compress(GOOD)[:-20] + b"x" * 20,
    "noise": bytes(range(256)) * 40,
    "empty": b"",
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_damaged_shards_are_named(tmp_path, kind):
    (tmp_path / "0.tar").write_bytes(BAD_SHARDS[kind])
    (tmp_path / "1.tar").write_bytes(gzip.compress(GOOD))
    os.mkfifo(tmp_path / "2.tar")
    samples = Samples(load_rows(tmp_path), PREPARE, buffer_size=1)
    assert len(list(islice(samples, 4))) == 4
    ((name, reason),) = samples.bad.items()
    assert name.endswith("0.tar") and "the rest of this shard cannot be read" in reason


def test_paths_outside_of_the_folder_are_bad_rows(tmp_path, monkeypatch):
    inside = tmp_path / "set" / "a"
    inside.mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(PICTURE)
    (tmp_path / "set" / "beside.png").write_bytes(PICTURE)
    good = ["../beside.png", str(tmp_path / "set" / "beside.png")]
    outside = [
        "../../outside.png",
        str(tmp_path / "outside.png"),
        "/etc/passwd",
        "a/../../../outside.png",
        "/dev/zero",
    ]
    other = ["nul\0.png", "n" * 300, "half\ud83d.png", "..", "."]
    names = [*good, *outside, *other]
    lines = [{"file_name": name, **TEXTS} for name in names]
    lines.append({"file_name": good[0], "mask_file_name": str(tmp_path / "outside.png"), **TEXTS})
    (inside / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "set", "set", "set/../set"):
        samples = Samples(load_rows(folder), PREPARE)
        assert len(list(islice(samples, 6))) == 6
        assert len(samples.bad) == len(lines) - len(good)
        assert sum("is outside of" in reason for reason in samples.bad.values()) >= len(outside) + 1


@pytest.mark.parametrize("column", ["image", "reference", "mask", "text", "query"])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "0.tar", "a.parquet"])
@pytest.mark.parametrize("form", ["{}", "file://{}", "simplecache::file://{}"])
def test_texts_are_not_opened_as_files(tmp_path, monkeypatch, kind, column, form):
    outside = tmp_path / "outside.png"
    outside.write_bytes(PICTURE)
    (tmp_path / "set").mkdir()
    value = form.format(outside)
    row = {**TEXTS, column: value if column in TEXTS else {"path": value, "bytes": None}}
    pictures = [name for name in ("image", "reference") if name != column]
    if kind == "metadata.jsonl":
        (tmp_path / "set" / "good.png").write_bytes(PICTURE)
        names = {"image": "file_name", "reference": "reference_file_name"}
        (tmp_path / "set" / kind).write_text(json.dumps({**{names[name]: "good.png" for name in pictures}, **row}))
    elif kind == "0.tar":
        files = b"".join(entry(f"0.{name}.png".replace(".image", ""), PICTURE) for name in pictures)
        (tmp_path / "set" / kind).write_bytes(files + entry("0.json", json.dumps(row).encode()))
    else:
        cells = {name: [{"bytes": PICTURE, "path": None}] for name in pictures}
        write_table(tmp_path / "set" / kind, **cells, **{name: [cell] for name, cell in row.items()})
    columns = Columns(reference="reference", mask="mask")
    rows = load_rows(tmp_path / "set", columns=columns)
    opened = []
    real_open = open
    monkeypatch.setattr("builtins.open", lambda file, *args: opened.append(str(file)) or real_open(file, *args))
    samples = Samples(rows, Preparation(columns, make_image_processor(), 16), buffer_size=1)
    if column in TEXTS:
        assert value in next(iter(samples)).values() or [value] in next(iter(samples)).values()
    else:
        with pytest.raises(ValueError, match=f"{column} is missing"):
            next(iter(samples))
    assert not [file for file in opened if "outside" in file]


def test_files_of_the_cache_of_the_hub_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("training_data.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    for folder in ("hub", "."):
        (tmp_path / folder / "1.png").write_bytes(PICTURE)
    assert open_rgb({"bytes": None, "path": str(tmp_path / "hub" / "1.png")}, "image").size == (40, 32)
    for path in (tmp_path / "1.png", tmp_path / "hub" / ".." / "1.png", "file:///hf://datasets/1.png"):
        with pytest.raises(ValueError, match="image is missing"):
            open_rgb({"bytes": None, "path": str(path)}, "image")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_by_name_is_read(tmp_path, monkeypatch, streaming):
    """A dataset by name can be a folder on this machine. Its images are files, and other columns are not decoded."""
    monkeypatch.setattr("training_data.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.png").write_bytes(PICTURE)
    line = {"file_name": "1.png", **TEXTS, "extra": {"path": "/etc/hostname", "bytes": None}}
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps(line))
    rows = load_rows(None, str(tmp_path / "set"), streaming=streaming)
    (sample,) = islice(Samples(rows, PREPARE), 1)
    assert sample["caption"] == "a cat"


def test_shards_that_datasets_reads(tmp_path):
    (tmp_path / "a.tar").write_bytes(GOOD)
    rows = load_rows(None, str(tmp_path), streaming=True)
    (sample,) = islice(Samples(rows, PREPARE), 1)
    assert sample["caption"] == "a cat"


def test_a_changed_table_is_read_again(tmp_path):
    for text in ("a cat", "a dog"):
        write_table(tmp_path / "set" / "a.parquet", **{**good_cells(1), "text": [text]})
        (sample,) = islice(Samples(load_rows(tmp_path / "set"), PREPARE), 1)
        assert sample["caption"] == text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", [b"", b"PAR1" * 100])
def test_a_broken_table_raises_an_error(tmp_path, content, streaming):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="`train_data_dir`: .*cannot be read"):
        load_rows(tmp_path, streaming=streaming)


@pytest.mark.parametrize(
    "files, message",
    [
        (None, "`train_data_dir` has to be a folder"),
        ({}, "prepare_dataset.py --source"),
        ({"1.png": PICTURE}, "prepare_dataset.py --source"),
        ({"metadata.jsonl": b""}, "prepare_dataset.py --source"),
        ({"metadata.csv": b"file_name,text\n1.png,a cat\n", "1.png": PICTURE}, "--query_column text"),
        ({"0.tar": shard(a_png=PICTURE, a_txt=b"a cat")}, "--query_column text"),
        ({"0.tar": b""}, "cannot be read"),
    ],
)
def test_a_training_set_without_usable_rows_raises_an_error(tmp_path, files, message):
    """The error says what to do."""
    for name, content in (files or {}).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        next(iter(Samples(load_rows(tmp_path if files is not None else tmp_path / "no"), PREPARE)))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_without_the_columns_raises_an_error(tmp_path, streaming):
    write_table(tmp_path / "set" / "a.parquet", picture=[PICTURE], text=["a cat"])
    with pytest.raises(ValueError, match="no column 'image'.*--image_column"):
        load_rows(tmp_path / "set", streaming=streaming)
    rows = load_rows(tmp_path / "set", streaming=streaming, columns=Columns(image="picture"))
    with pytest.raises(ValueError, match="--query_column text"):
        next(iter(Samples(rows, Preparation(Columns(image="picture"), make_image_processor(), 16))))


def striped(size=(48, 32)) -> Image.Image:
    """An image that is red on the left, green in the middle and blue on the right."""
    image = Image.new("RGB", size, (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 8, size[1]))
    image.paste((0, 0, 255), (size[0] - 8, 0, *size))
    return image


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


@pytest.mark.parametrize("kind", ["folder", "parquet", "parquet stream"])
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
        single = {"file_name": "0.png", "reference_file_name": "1.png", "text": "one subject", "query": "wall"}
        (tmp_path / "metadata.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(single)}")
    else:
        image, images = datasets.Image(), datasets.List(datasets.Image())
        features = {"image": image, "reference": images, "mask": images}
        features |= {"text": datasets.Value("string"), "query": datasets.List(datasets.Value("string"))}
        cells = {"image": {"bytes": PICTURE}, "reference": [{"bytes": each} for each in references]}
        row |= {**cells, "mask": [{"bytes": encoded(mask)}, None]}
        datasets.Dataset.from_list([row], datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    columns = Columns(reference="reference", mask="mask")
    prepare = Preparation(columns, make_image_processor(), 16)
    samples = Samples(load_rows(tmp_path, streaming="stream" in kind, columns=columns), prepare)
    sample = next(sample for sample in samples if sample["caption"] != "one subject")
    assert not samples.bad and sample["queries"] == ["wall", "cat"]
    alone = [
        prepare({"image": PICTURE, "text": "a", "query": "b", "reference": reference})["reference_values"]
        for reference in references
    ]
    assert torch.equal(sample["reference_values"], torch.cat(alone))
    assert [each is not None for each in sample["masks"]] == [True, False]


def test_a_value_that_is_not_a_list_applies_to_every_subject():
    prepare = Preparation(Columns(reference="reference"), make_image_processor(), 16)
    row = {"image": PICTURE, "text": "a wall", "reference": encoded(striped())}
    sample = prepare({**row, "query": ["wall", "floor"]})
    assert sample["queries"] == ["wall", "floor"] and torch.equal(*sample["reference_values"])
    with pytest.raises(ValueError, match="lists of subjects have to be of one length"):
        prepare({**row, "reference": [PICTURE, PICTURE], "query": ["a", "b", "c"]})


def test_a_mask_that_does_not_fit_is_a_bad_sample():
    prepare = Preparation(Columns(mask="mask"), make_image_processor(), 16)
    outside = Image.new("L", (40, 32))
    outside.paste(255, (0, 0, 3, 32))  # not in the central square
    for mask in (Image.new("L", (5, 5), 255), Image.new("L", (40, 32)), outside):
        with pytest.raises(ValueError, match="mask"):
            prepare({"image": PICTURE, "mask": encoded(mask), "text": "a", "query": "b"})


def test_images_are_opened_upright_and_without_transparency():
    assert open_rgb(Image.new("RGBA", (20, 10), (255, 0, 0, 0)), "image").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_rgb(encoded(Image.new("RGB", (20, 10)), "jpeg", exif=exif), "image").size == (10, 20)


def test_cached_features_depend_on_the_sample_and_the_settings(tmp_path):
    computed = []

    def compute(samples):
        computed.append(samples)
        return {"a": torch.full((3,), len(computed))}

    row = {"image": PICTURE, **TEXTS}
    sample, other = PREPARE(row), PREPARE({**row, "image": encoded(make_picture(1))})
    caches = [FeatureCache(tmp_path, {"resolution": resolution}) for resolution in (16, 32)]
    masked = {**sample, "masks": [torch.eye(32)[None]]}
    samples = [sample, other, {**sample, "caption": "a dog"}, {**sample, "queries": ["dog"]}, masked]
    results = [cache(each, compute)["a"][0].item() for cache in caches for each in samples]
    assert results == list(range(1, 11))
    again = [cache(each, compute)["a"][0].item() for cache in caches for each in samples]
    assert again == results
    # a damaged file is treated like a missing file
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    assert caches[0](sample, compute)["a"][0] == caches[0](sample, compute)["a"][0] == 11
