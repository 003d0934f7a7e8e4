"""prepare_dataset.py: from a folder of images to Parquet files for training."""

import io
import json
import os
import runpy
import sys
from itertools import islice

import prepare_dataset
import pytest
import torch
from conftest import make_image_processor, make_picture
from PIL import Image
from prepare_dataset import query_from_caption
from training_data import Columns, Preparation, Samples, load_rows, read_row
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def photos(tmp_path):
    """Six usable images with captions, four unusable images, and two files that are no images."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index in range(6):
        file = folder / ("more" if index % 2 else "") / f"{index}.png"
        make_picture(index).save(file)
        file.with_suffix(".txt").write_text(f"a brown dog sitting on couch {index}\n")
    make_picture(7).save(folder / "alone.png")
    make_picture(7, (20, 9)).save(folder / "small.png")
    make_picture(7, (90, 20)).save(folder / "long.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    (folder / "movie.mp4").write_bytes(b"nothing")
    (folder / "0.TXT").write_bytes(b"nothing")
    return folder


def arguments(source, output_dir, **changes) -> list[str]:
    options = {
        "source": source,
        "output_dir": output_dir,
        "min_image_size": 16,
        "shard_size": 4,
        "batch_size": 3,
        **changes,
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def rows_of(folder) -> list[dict]:
    return [read_row(row, "")[1] for row in load_rows(folder)] if list(folder.glob("*.parquet")) else []


def test_prepared_shards_can_be_used_for_training(photos, tmp_path, capsys):
    out = tmp_path / "shards"
    prepare_dataset.main(arguments(photos, out))
    rows = rows_of(out)
    assert len(rows) == 6 and "6 samples" in capsys.readouterr().out
    assert {row["query"] for row in rows} == {"brown dog"}
    assert {row["__key__"] for row in rows} == {f"{'more/' if i % 2 else ''}{i}.png" for i in range(6)}
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (40, 32)
    bad = json.loads((out / "bad_samples.json").read_text())
    reasons = {"alone.png": "caption", "small.png": "less than 16", "long.png": "to 1", "broken.jpg": "cannot be decoded",
               "movie.mp4": "suffix", "0.TXT": "suffix"}  # fmt: skip
    assert bad.keys() == reasons.keys()
    assert all(reasons[name] in reason for name, reason in bad.items())
    for streaming in (False, True):
        rows = load_rows(out, streaming=streaming)
        samples = Samples(rows, Preparation(Columns(), make_image_processor(), 16), buffer_size=4)
        assert {sample["queries"][0] for sample in islice(samples, 6)} == {"brown dog"} and not samples.bad


@pytest.mark.parametrize("suffix", [".jfif", ".JPEG", ".jpe", ".tga", ".ppm", ".webp", ".jp2", ".ico"])
def test_every_kind_of_image_is_used(tmp_path, suffix):
    """Browsers on Windows save JPEG files as `.jfif`."""
    photos = tmp_path / "photos"
    photos.mkdir()
    make_picture(size=(32, 32)).save(photos / f"1{suffix}")
    (photos / "1.txt").write_text("a cat")
    assert prepare_dataset.main(arguments(photos, tmp_path / "out")) == 1


TEXT = "a café"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["1.txt", "1.query.txt", "metadata.csv"])
def test_texts_that_are_not_utf8_are_named(tmp_path, name, encoding):
    """A text in another encoding is a bad sample, or an error. It is never decoded with replacement characters."""
    photos = tmp_path / "photos"
    photos.mkdir()
    make_picture().save(photos / "1.png")
    (photos / "1.txt").write_text(TEXT)
    content = f"file_name,text\n1.png,{TEXT}\n" if name == "metadata.csv" else TEXT
    (photos / name).write_bytes(content.encode(encoding))
    if name == "metadata.csv":
        (photos / "1.txt").unlink()
    options = {"query_from": "file"} if "query" in name else {}
    if encoding != "cp1252":
        assert prepare_dataset.main(arguments(photos, tmp_path / "out", **options)) == 1
        (row,) = rows_of(tmp_path / "out")
        assert row["text"] == TEXT and "caf" in row["query"]
    elif name == "metadata.csv":
        with pytest.raises(ValueError, match="metadata.csv is not UTF-8"):
            prepare_dataset.main(arguments(photos, tmp_path / "out", **options))
    else:
        assert prepare_dataset.main(arguments(photos, tmp_path / "out", **options)) == 0
        bad = json.loads((tmp_path / "out" / "bad_samples.json").read_text())
        assert f"{name} is not UTF-8" in bad["1.png"]


def test_an_interrupted_run_continues_with_the_next_shard(photos, tmp_path, monkeypatch):
    prepare_dataset.main(arguments(photos, tmp_path / "uncut"))
    out = tmp_path / "cut"
    replace, renamed = os.replace, []

    def killed(source, target):
        """The second shard is written, and not renamed."""
        if len(renamed) == 3:
            raise KeyboardInterrupt
        renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(prepare_dataset.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset.main(arguments(photos, out))
    assert renamed == ["settings.json", "000000.parquet", "000000.json"]
    monkeypatch.undo()
    first = (out / "000000.parquet").stat()
    prepare_dataset.main(arguments(photos, out))
    assert (out / "000000.parquet").stat() == first, "a finished shard was written again"
    files = sorted(file.relative_to(out) for file in out.rglob("*"))
    assert files == sorted(file.relative_to(tmp_path / "uncut") for file in (tmp_path / "uncut").rglob("*"))
    assert (out / "bad_samples.json").read_bytes() == (tmp_path / "uncut" / "bad_samples.json").read_bytes()
    assert rows_of(out) == rows_of(tmp_path / "uncut")
    with pytest.raises(ValueError, match="output_dir.*other options"):
        prepare_dataset.main(arguments(photos, out, jpeg_quality=50))


def test_queries_from_files_and_columns(photos, tmp_path):
    (photos / "0.query.txt").write_text("left dog\n")
    prepare_dataset.main(arguments(photos, tmp_path / "files", query_from="file"))
    (row,) = rows_of(tmp_path / "files")
    assert row["query"] == "left dog"
    lines = [{"file_name": "0.png", "text": "a cat", "query": "paw"}, {"file_name": "2.png", "text": "a cat"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare_dataset.main(arguments(photos, tmp_path / "columns", query_from="column"))
    (row,) = rows_of(tmp_path / "columns")
    assert row["query"] == "paw"
    # the result can be the source again
    prepare_dataset.main(arguments(tmp_path / "columns", tmp_path / "again", query_from="column"))
    assert [row["query"] for row in rows_of(tmp_path / "again")] == ["paw"]


@pytest.mark.parametrize(
    "caption, query",
    [
        ("a brown dog sitting on a couch", "brown dog"),
        ("there is a cat that is laying on a bed", "cat"),
        ("a close up of a person holding a phone", "person"),
        ("A photo of the old building with a clock.", "old building"),
        ("two women walking down a street", "women"),
        ("people, cars and dogs", "people"),
        ("a king and a queen", "king"),
        ("a living room", "living room"),
    ],
)
def test_query_from_caption(caption, query):
    assert query_from_caption(caption) == query


def test_a_caption_without_a_thing_raises_an_error():
    with pytest.raises(ValueError, match="no thing"):
        query_from_caption("on the")


def test_captions_from_a_model(photos, tmp_path):
    model = tmp_path / "blip"
    model.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "car", "red"]
    (model / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
            "encoder_hidden_size": 16}  # fmt: skip
    torch.manual_seed(0)
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    blip = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    # the model always predicts "cat"
    blip.text_decoder.cls.predictions.decoder.bias.data[:] = -100.0
    blip.text_decoder.cls.predictions.bias.data[:] = torch.tensor([-100.0] * 5 + [20.0, 0, 0, 0])
    blip.save_pretrained(model)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, BertTokenizer(str(model / "vocab.txt"))).save_pretrained(model)
    prepare_dataset.main(arguments(photos, tmp_path / "out", caption_model=model))
    captions = {row["__key__"]: row["text"] for row in rows_of(tmp_path / "out")}
    assert captions["0.png"] == "a brown dog sitting on couch 0", "an existing caption was replaced"
    assert set(captions["alone.png"].split()) == {"cat"}


def test_large_images_are_scaled_down(photos, tmp_path):
    prepare_dataset.main(arguments(photos, tmp_path / "out", max_image_size=16))
    assert Image.open(io.BytesIO(rows_of(tmp_path / "out")[0]["image"]["bytes"])).size == (20, 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "nowhere"}, "source"),
        ({"dataset_name": "a"}, "dataset_name"),
    ],
)
def test_errors_name_the_invalid_option(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare_dataset.main(arguments(**{"source": tmp_path, "output_dir": tmp_path / "out", **changes}))


def test_a_folder_without_images_raises_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="source"):
        prepare_dataset.main(arguments(tmp_path / "empty", tmp_path / "out"))


def test_the_script_fails_if_no_sample_is_kept(photos, tmp_path, capsys, monkeypatch):
    options = arguments(photos, tmp_path / "out", min_image_size=500)
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(prepare_dataset.__file__, run_name="__main__")
    assert int(ended.value.code) == 1
    output = capsys.readouterr().out
    assert "No sample was kept" in output and "less than 500" in output
    assert not list((tmp_path / "out").glob("*.parquet"))
