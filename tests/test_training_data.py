"""Rows and samples for training: every source, the order, and what is unusable."""

import io
import json
import tarfile
from itertools import islice

import datasets
import pytest
import torch
from conftest import make_image_processor, make_picture
from PIL import Image
from training_data import (
    BadSample,
    Columns,
    FeatureCache,
    FiniteRows,
    Preparation,
    Samples,
    StreamedRows,
    load_rows,
    open_picture,
    read_shards,
    summary,
)


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


def test_each_epoch_holds_every_row_once_in_an_order_of_its_own():
    read = names(FiniteRows(keyed(10), seed=0, batch_size=4), 30)
    epochs = [read[:10], read[10:20], read[20:]]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert names(FiniteRows(keyed(10), seed=1, batch_size=4), 10) != epochs[0]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_processes_together_read_what_one_reads(processes):
    alone = names(FiniteRows(keyed(11), 0, 2 * processes), 60)
    each = [names(FiniteRows(keyed(11), 0, 2, index, processes), 60 // processes) for index in range(processes)]
    together = [row for start in range(0, 60 // processes, 2) for read in each for row in read[start : start + 2]]
    assert together == alone


@pytest.mark.parametrize("at", [1, 10, 11, 23])
def test_reading_goes_on_where_it_stopped(at, tmp_path):
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


def test_a_shards_files_become_columns(tmp_path):
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
    """One usable picture and one of each kind of bad row."""
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
def test_bad_rows_are_left_out_and_named(tmp_path, threads):
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
        "text is no text: 3",
        "image is missing",
        "not JSON",
        "not a JSON object",
    ):
        assert reason in reasons
    assert f"{len(rows) - 1} bad samples" in summary(samples.bad)
    assert "and 2 more" in summary(samples.bad, most=len(rows) - 3)


def test_bad_rows_in_a_stream(tmp_path):
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


def test_tables_with_broken_pictures_do_not_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    columns = {
        "image": [{"bytes": PICTURE, "path": None}, {"bytes": PICTURE[:300], "path": None}, None],
        "text": ["a cat"] * 3,
        "query": ["cat"] * 3,
    }
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), query=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        rows = load_rows(tmp_path, streaming=streaming)
        rows = StreamedRows(rows, 0, 2) if streaming else FiniteRows(rows, 0, 1)
        samples = Samples(rows, PREPARE)
        assert [sample["pixel_values"].shape for sample in islice(samples, 2)] == [(3, 16, 16)] * 2
        assert len(samples.bad) >= 1


def test_rows_that_datasets_reads_from_shards_itself(tmp_path):
    write_shard(tmp_path / "a.tar", {"1.png": PICTURE, "1.json": b'{"text": "a cat", "query": "cat"}'})
    stream = datasets.load_dataset("webdataset", data_files=str(tmp_path / "a.tar"), split="train", streaming=True)
    stream = stream.cast_column("png", datasets.Image(decode=False))
    (sample,) = islice(Samples(StreamedRows(stream, 0, 1), PREPARE), 1)
    assert sample["caption"] == "a cat"


def test_a_set_without_any_usable_row_is_an_error():
    with pytest.raises(ValueError, match="No row of the training set can be used"):
        next(iter(Samples(FiniteRows([{}, {}], 0, 1, 1, 3), PREPARE)))


@pytest.mark.parametrize("given", [{}, {"train_data_dir": ".", "dataset_name": "a"}, {"train_data_dir": "nowhere"}])
def test_a_missing_set_is_named(given):
    with pytest.raises(ValueError, match="train_data_dir"):
        load_rows(**given)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="metadata"):
        load_rows(tmp_path)


def test_csv_metadata_in_a_subfolder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(PICTURE)
    (tmp_path / "a" / "metadata.csv").write_text('file_name,text,query\n1.png,"a cat, a dog",cat\n')
    (sample,) = islice(Samples(FiniteRows(load_rows(tmp_path), 0, 1), PREPARE), 1)
    assert sample["caption"] == "a cat, a dog"


def striped(size=(48, 32)) -> Image.Image:
    """Red left, green middle, blue right."""
    picture = Image.new("RGB", size, (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, 8, size[1]))
    picture.paste((0, 0, 255), (size[0] - 8, 0, *size))
    return picture


def test_a_reference_that_is_the_target_shows_what_the_target_shows():
    processor = make_image_processor()
    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 0, 24, 32))
    row = {"image": encoded(striped()), "mask": encoded(mask), "text": "a wall"}
    sample = Preparation(Columns(mask="mask"), processor, 16)(row)
    assert sample["queries"] == ["a wall"]
    # the square holds the middle alone
    assert torch.equal(sample["pixel_values"], torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 16, 16))
    assert sample["reference_values"][0].flatten(1).std(1).max() < 1e-5
    assert sample["masks"][0].mean((0, 1)).round().tolist() == [1.0] * 16 + [0.0] * 16
    empty = Preparation(Columns(mask="mask"), processor, 16, mask_query="empty")
    assert empty(row)["queries"] == [""] and empty({**row, "query": "wall"})["queries"] == ["wall"]


def test_a_reference_of_its_own_is_shown_whole():
    row = {"image": PICTURE, "reference": encoded(striped()), "text": "a wall", "query": "wall"}
    sample = Preparation(Columns(reference="reference"), make_image_processor(), 16)(row)
    red, green, blue = sample["reference_values"][0]
    assert red[16, 1] > green[16, 1] and blue[16, -2] > green[16, -2] and green[16, 16] > red[16, 16]


@pytest.mark.parametrize("kind", ["folder", "parquet", "shard"])
def test_a_row_may_hold_several_subjects(tmp_path, kind):
    """Lists of references, queries and masks, with one mask left empty, from every kind of training set."""
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


def test_what_is_no_list_holds_for_every_subject():
    prepare = Preparation(Columns(reference="reference"), make_image_processor(), 16)
    row = {"image": PICTURE, "text": "a wall", "reference": encoded(striped())}
    sample = prepare({**row, "query": ["wall", "floor"]})
    assert sample["queries"] == ["wall", "floor"] and torch.equal(*sample["reference_values"])


@pytest.mark.parametrize(
    "changed", [{"query": ["a", "b", "c"]}, {"query": []}, {"query": ["a", ""]}, {"query": ["a", 3]}]
)
def test_lists_that_do_not_fit_are_a_bad_sample(changed):
    prepare = Preparation(Columns(reference="reference"), make_image_processor(), 16)
    with pytest.raises(BadSample, match="query"):
        prepare({"image": PICTURE, "text": "a wall", "reference": [PICTURE, PICTURE], **changed})


def test_a_mask_that_does_not_fit_is_a_bad_sample():
    prepare = Preparation(Columns(mask="mask"), make_image_processor(), 16)
    for mask in (Image.new("L", (5, 5), 255), Image.new("L", (40, 32))):
        with pytest.raises(BadSample, match="mask"):
            prepare({"image": PICTURE, "mask": encoded(mask), "text": "a", "query": "b"})


def test_pictures_come_upright_and_without_transparency():
    picture = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert open_picture(picture).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "jpeg", exif=exif)
    assert open_picture(buffer.getvalue()).size == (10, 20)


def test_the_cache_knows_content_and_settings(tmp_path):
    cache = FeatureCache(tmp_path, {"resolution": 16})
    digest = cache.digest(b"picture", b"a cat")
    assert cache.load(digest) is None
    cache.save(digest, {"a": torch.arange(3)}, "0")
    assert torch.equal(cache.load(digest)["a"], torch.arange(3))
    others = [cache.digest(b"picture", b"a dog"), cache.digest(b"picturea", b" cat")]
    others.append(FeatureCache(tmp_path, {"resolution": 32}).digest(b"picture", b"a cat"))
    assert len({digest, *others}) == 4
    # a file that was cut off is as good as none
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    assert cache.load(digest) is None
