"""prepare_dataset.py: from a folder of pictures to shards for training."""

import json
import runpy
import sys
import tarfile
from itertools import islice

import prepare_dataset
import pytest
import torch
from conftest import POCKET, make_image_processor, make_picture
from PIL import Image
from prepare_dataset import AestheticScore, query_from_caption
from similarity import ClipFeatures
from training_data import BadSample, Columns, Preparation, Samples
from training_rows import StreamedRows, load_rows
from training_shards import read_shards
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)


@pytest.fixture
def photos(tmp_path):
    """Six usable pictures with captions, and four unusable pictures."""
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
    return list(read_shards(sorted(map(str, folder.glob("*.tar")))))


def test_prepared_shards_can_be_used_for_training(photos, tmp_path, capsys):
    out = tmp_path / "shards"
    prepare_dataset.main(arguments(photos, out))
    rows = rows_of(out)
    assert len(rows) == 6 and "6 samples" in capsys.readouterr().out
    assert {row["query"] for row in rows} == {"brown dog"}
    assert {row["source"] for row in rows} == {f"{'more/' if i % 2 else ''}{i}.png" for i in range(6)}
    assert (rows[0]["width"], rows[0]["height"]) == (40, 32)
    bad = json.loads((out / "bad_samples.json").read_text())
    assert bad.keys() == {"alone.png", "small.png", "long.png", "broken.jpg"}
    assert "caption" in bad["alone.png"] and "less than 16" in bad["small.png"] and "to 1" in bad["long.png"]
    prepare = Preparation(Columns(), make_image_processor(), 16)
    samples = Samples(StreamedRows(load_rows(out), 0, 4), prepare)
    assert {sample["queries"][0] for sample in islice(samples, 6)} == {"brown dog"} and not samples.bad


def test_an_interrupted_run_continues_with_the_next_shard(photos, tmp_path, monkeypatch):
    prepare_dataset.main(arguments(photos, tmp_path / "uncut"))
    out = tmp_path / "cut"
    write_shard = prepare_dataset.write_shard
    written = []

    def interrupted(file, samples):
        if written:
            file.with_suffix(".part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file.name)
        write_shard(file, samples)

    monkeypatch.setattr(prepare_dataset, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset.main(arguments(photos, out))
    assert [file.name for file in out.glob("*.tar")] == written
    again = []
    monkeypatch.setattr(
        prepare_dataset, "write_shard", lambda file, samples: (again.append(file.name), write_shard(file, samples))
    )
    prepare_dataset.main(arguments(photos, out))
    assert not set(again) & set(written)
    shards = sorted(file.name for file in (tmp_path / "uncut").glob("*.tar"))
    assert shards == sorted(again + written)
    for name in [*shards, "bad_samples.json"]:
        assert (out / name).read_bytes() == (tmp_path / "uncut" / name).read_bytes()
    with pytest.raises(ValueError, match="output_dir.*other options"):
        prepare_dataset.main(arguments(photos, out, jpeg_quality=50))


def test_options_can_be_changed_after_a_run_that_kept_nothing(photos, tmp_path):
    assert prepare_dataset.main(arguments(photos, tmp_path / "out", min_image_size=500)) == 0
    assert prepare_dataset.main(arguments(photos, tmp_path / "out")) > 0
    assert rows_of(tmp_path / "out") and "500" not in (tmp_path / "out" / "bad_samples.json").read_text()


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
    # shards can also be the source, and are streamed
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


def test_a_caption_without_a_thing_is_a_bad_sample():
    with pytest.raises(BadSample, match="no thing"):
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
    prepare_dataset.main(arguments(photos, tmp_path / "out", caption_model=model, max_new_tokens=2))
    captions = {row["source"]: row["text"] for row in rows_of(tmp_path / "out")}
    assert captions["0.png"] == "a brown dog sitting on couch 0", "an existing caption was replaced"
    assert captions["alone.png"] == "cat cat"


def tiny_clip(folder):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer").save_pretrained(folder)


def test_pictures_with_a_low_aesthetic_score_are_left_out(photos, tmp_path):
    tiny_clip(tmp_path / "clip")
    clip = ClipFeatures.from_pretrained(tmp_path / "clip")
    torch.manual_seed(1)
    weights = [torch.randn(8, 16), torch.randn(1, 8)]
    biases = [torch.randn(8), torch.randn(1)]
    head = {f"layers.{place}.{part}": value for i, place in enumerate((0, 10)) for part, value in
            (("weight", weights[i]), ("bias", biases[i]))}  # fmt: skip
    torch.save(head, tmp_path / "head.pth")
    pictures = [make_picture(index) for index in range(6)]
    scores = AestheticScore(tmp_path / "head.pth", clip)(pictures)
    expected = (clip(pictures) @ weights[0].T + biases[0]) @ weights[1].T + biases[1]
    torch.testing.assert_close(torch.tensor(scores), expected[:, 0])
    limit = sorted(scores)[3] - 1e-3
    options = {"aesthetic_head": tmp_path / "head.pth", "aesthetic_clip": tmp_path / "clip", "min_aesthetic": limit}
    prepare_dataset.main(arguments(photos, tmp_path / "out", **options))
    rows = rows_of(tmp_path / "out")
    assert all(row["aesthetic"] >= limit for row in rows) and 2 <= len(rows) <= 4
    bad = json.loads((tmp_path / "out" / "bad_samples.json").read_text())
    assert sum("aesthetic" in reason for reason in bad.values()) == 6 - len(rows)
    torch.save({"weight": torch.randn(1, 5), "bias": torch.randn(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="aesthetic_head"):
        AestheticScore(tmp_path / "other.pth", clip)


def test_large_pictures_are_scaled_down(photos, tmp_path):
    prepare_dataset.main(arguments(photos, tmp_path / "out", max_image_size=16))
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        name = next(name for name in archive.getnames() if name.endswith(".jpg"))
        assert Image.open(archive.extractfile(name)).size == (20, 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "nowhere"}, "source"),
        ({"dataset_name": "a"}, "dataset_name"),
        ({"max_image_size": 8}, "max_image_size"),
        ({"jpeg_quality": 0}, "jpeg_quality"),
        ({"aesthetic_head": "nowhere"}, "aesthetic_head"),
    ],
)
def test_errors_name_the_invalid_option(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare_dataset.main(arguments(**{"source": tmp_path, "output_dir": tmp_path / "out", **changes}))


def test_a_folder_without_pictures_raises_an_error(tmp_path):
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
    assert not list((tmp_path / "out").glob("*.tar"))
