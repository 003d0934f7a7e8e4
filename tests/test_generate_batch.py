"""Tests of examples/generate_batch.py: tables of rows, resuming, and invalid rows."""

import csv
import json
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import generate_batch
import numpy as np
import pytest
import torch
from conftest import ROOT, make_components, make_picture, make_ssr_components
from diffusers import StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline
from PIL import Image


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    StableDiffusionPipeline(**make_components(), requires_safety_checker=False).save_pretrained(folder / "base")
    for name, part in make_ssr_components().items():
        part.save_pretrained(folder / "ssr" / name)
    return folder


ROWS = [
    {"image": "0.png", "query": "cat", "prompt": "a cat on the beach", "seed": "1"},
    {"image": "1.png", "query": "dog", "prompt": "a dog", "seed": "2", "scale": "1.0"},
    {"image": "missing.png", "query": "dog", "prompt": "a dog", "seed": "2"},
    {"image": "0.png", "query": "", "prompt": "a cat", "seed": "1", "mask": "mask.png"},
    {"image": "0.png", "query": "", "prompt": "a cat", "seed": "1"},
    {"image": "0.png", "query": "cat", "prompt": "a cat", "seed": "one"},
]


@pytest.fixture
def table(tmp_path):
    for index in range(2):
        make_picture(index).save(tmp_path / f"{index}.png")
    mask = Image.new("L", (40, 32))
    mask.paste(255, (0, 0, 20, 20))
    mask.save(tmp_path / "mask.png")
    return write(tmp_path / "rows.csv", ROWS)


def write(file, rows):
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return file


def arguments(models, table, output_dir, **changes) -> list[str]:
    options = {
        "table": table, "output_dir": output_dir, "pretrained_model_name_or_path": models / "base",
        "ssr": models / "ssr", "num_inference_steps": 2, "height": 16, "width": 16, **changes,
    }  # fmt: skip
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def manifest(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pictures(folder) -> dict[str, np.ndarray]:
    return {str(file.relative_to(folder)): np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))}


@pytest.fixture
def counted(monkeypatch):
    """Records the prompts of all calls."""
    prompts = []
    call = StableDiffusionSSRPipeline.__call__

    def counting(self, prompt, **kwargs):
        prompts.extend(prompt)
        return call(self, prompt, **kwargs)

    monkeypatch.setattr(StableDiffusionSSRPipeline, "__call__", counting)
    return prompts


@pytest.mark.parametrize(
    "values, fault",
    [
        ({"seed": "1.0"}, None),
        ({"seed": 2**53 + 1}, None),
        ({"seed": 1.7}, "`seed` has to be a whole number"),
        ({"seed": -1}, "`seed` has to be a whole number"),
        ({"seed": "9" * 30}, "`seed` has to be a whole number"),
        ({"seed": "nan"}, "`seed` has to be a finite number"),
        ({"scale": True}, "`scale` has to be a finite number"),
        ({"scale": "inf"}, "`scale` has to be a finite number"),
        ({"scale": [1]}, "`scale` has to be a finite number"),
        ({"scale": 1000}, "`scale` has to be a number from -100 to 100"),
        ({"query": ["cat"]}, "`query` has to be a text"),
        ({"mask": ["mask.png"]}, "`mask` has to be the path of a file"),
        ({"prompt": 3}, "`prompt` is missing"),
    ],
)
def test_values_of_rows(table, pipe, values, fault):
    row, args = {**ROWS[0], **values}, SimpleNamespace(scale=0.5)
    if fault is None:
        request = generate_batch.read_row(pipe, row, table.parent, args)
        assert request.seed == (1 if values["seed"] == "1.0" else values["seed"])
        return
    with pytest.raises(ValueError, match=fault):
        generate_batch.read_row(pipe, row, table.parent, args)


def test_pictures_are_written_and_invalid_rows_have_an_error(models, table, tmp_path):
    out = tmp_path / "out"
    generate_batch.main(arguments(models, table, out))
    entries = manifest(out)
    assert [entry["row"] for entry in entries] == list(range(6))
    assert [entry["status"] for entry in entries] == ["done", "done", "failed", "done", "failed", "failed"]
    assert (
        "missing.png" in entries[2]["error"]
        and "`query` is missing" in entries[4]["error"]
        and "seed" in entries[5]["error"]
    )
    assert [entry.get("file") for entry in entries if "file" in entry] == list(pictures(out))
    assert entries[0]["prompt"] == "a cat on the beach"

    pipe = StableDiffusionSSRPipeline.from_pretrained(models / "base", safety_checker=None)
    pipe.load_ssr(models / "ssr")
    expected = pipe(
        "a dog", subject_image=make_picture(1), subject_query="dog", subject_scale=1.0, num_inference_steps=2, height=16,
        width=16, guidance_scale=5.0, generator=torch.Generator().manual_seed(2),
    ).images[0]  # fmt: skip
    assert np.array_equal(pictures(out)["000001.png"], np.asarray(expected))


def test_only_missing_pictures_are_generated_again(models, table, tmp_path, counted):
    out = tmp_path / "out"
    generate_batch.main(arguments(models, table, out))
    first = pictures(out)
    counted.clear()
    (out / "000001.png").unlink()
    make_picture(5).save(tmp_path / "missing.png")
    generate_batch.main(arguments(models, table, out))
    # the deleted picture and the row with the missing reference; two rows are invalid
    assert counted == ["a dog", "a dog"]
    assert np.array_equal(pictures(out)["000001.png"], first["000001.png"])
    assert [entry["status"] for entry in manifest(out)] == ["done"] * 4 + ["failed"] * 2


def test_changed_rows_are_generated_again(models, table, tmp_path, counted):
    out = tmp_path / "out"
    rows = [{**ROWS[0], "name": "a/first"}, {**ROWS[1], "name": "a/second"}]
    write(table, rows)
    generate_batch.main(arguments(models, table, out))
    first = pictures(out)
    assert list(first) == ["a/first.png", "a/second.png"]
    counted.clear()
    write(table, [{**rows[0], "seed": "7"}, rows[1]])
    generate_batch.main(arguments(models, table, out))
    assert counted == [ROWS[0]["prompt"]]
    assert not np.array_equal(pictures(out)["a/first.png"], first["a/first.png"])
    counted.clear()
    generate_batch.main(arguments(models, table, out, guidance_scale=2.0))
    assert len(counted) == 2


@pytest.fixture
def many_rows(tmp_path, table):
    """Seven valid rows, including one with a mask and one with a scale of 0, and two invalid rows."""
    prompts = ["a cat", "a dog on the beach", "a car", "a fish", "a tulip"]
    rows = [
        {"image": f"{i % 2}.png", "query": "cat", "prompt": prompt, "seed": str(i)} for i, prompt in enumerate(prompts)
    ]
    rows += [{**ROWS[3], "seed": "8"}, {**ROWS[1], "scale": "0"}, ROWS[2], ROWS[5]]
    return write(table, rows)


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batch_size_does_not_change_the_pictures(models, many_rows, tmp_path, batch_size):
    for name, size in (("alone", 1), ("together", batch_size)):
        assert generate_batch.main(arguments(models, many_rows, tmp_path / name, batch_size=size)) == 2
    alone, together = pictures(tmp_path / "alone"), pictures(tmp_path / "together")
    assert list(alone) == list(together) and len(alone) == 7
    for name in alone:
        # rounding errors of at most 1 of 255
        assert np.abs(alone[name].astype(int) - together[name]).max() <= 1
    assert not np.array_equal(alone["000000.png"], alone["000002.png"])
    assert manifest(tmp_path / "alone") == manifest(tmp_path / "together")


def test_error_in_one_row_does_not_affect_its_batch(models, many_rows, tmp_path, monkeypatch):
    draw = generate_batch.draw

    def failing(pipe, requests, args):
        if any(request.prompt == "a car" for request in requests):
            raise RuntimeError("out of memory")
        return draw(pipe, requests, args)

    monkeypatch.setattr(generate_batch, "draw", failing)
    assert generate_batch.main(arguments(models, many_rows, tmp_path / "out", batch_size=4)) == 3
    entries = manifest(tmp_path / "out")
    assert [entry["row"] for entry in entries if entry["status"] == "failed"] == [2, 7, 8]
    assert "out of memory" in entries[2]["error"]


@pytest.mark.parametrize("rows, status", [(ROWS[:2], 0), (ROWS[:3], 1)])
def test_exit_status_reports_failed_rows(models, table, tmp_path, monkeypatch, rows, status):
    write(table, rows)
    monkeypatch.setattr(sys, "argv", ["generate_batch.py", *arguments(models, table, tmp_path / "out", batch_size=2)])
    with pytest.raises(SystemExit) if status else nullcontext() as ended:
        runpy.run_path(generate_batch.__file__, run_name="__main__")
    assert status == 0 or ended.value.code == status


def test_interrupted_run_can_be_resumed(models, table, tmp_path, monkeypatch, counted):
    out = tmp_path / "out"
    read_row = generate_batch.read_row

    def interrupted(pipe, row, *args):
        if row["seed"] == "2":
            raise KeyboardInterrupt
        return read_row(pipe, row, *args)

    monkeypatch.setattr(generate_batch, "read_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_batch.main(arguments(models, table, out))
    monkeypatch.setattr(generate_batch, "read_row", read_row)
    with (out / "manifest.0.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    counted.clear()
    generate_batch.main(arguments(models, table, out))
    assert ROWS[0]["prompt"] not in counted
    assert len(pictures(out)) == 3
    assert not list(out.glob("manifest.*.jsonl"))


def test_two_processes_generate_the_same_pictures_as_one(models, table, tmp_path):
    generate_batch.main(arguments(models, table, tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "examples" / "generate_batch.py"), *arguments(models, table, tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # three of the rows are invalid
    assert done.returncode == 1 and "3 of 6 pictures" in done.stdout, done.stderr[-3000:]
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert list(one) == list(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")


@pytest.mark.parametrize(
    "row, file", [({"name": 0}, "0"), ({"name": 7}, "7"), ({"name": ""}, "000004"), ({}, "000004")]
)
def test_the_file_of_a_row(row, file):
    assert generate_batch.file_of(row, 4) == f"{file}.png"


@pytest.mark.parametrize("given", [{}, {"height": 24}, {"width": 24}, {"height": 24, "width": 8}], ids=str)
def test_height_and_width_each_default_to_the_base_model(models, table, tmp_path, given):
    write(table, ROWS[:2])
    options = {"table": table, "output_dir": tmp_path / "out", "pretrained_model_name_or_path": models / "base",
               "ssr": models / "ssr", "num_inference_steps": 1, "batch_size": 2, **given}  # fmt: skip
    assert generate_batch.main([str(part) for name, value in options.items() for part in (f"--{name}", value)]) == 0
    shapes = [each.shape[:2] for each in pictures(tmp_path / "out").values()]
    assert shapes == [(given.get("height", 16), given.get("width", 16))] * 2


def test_resolution_of_a_base_model_that_is_not_square(pipe):
    pipe.unet.register_to_config(sample_size=[8, 12])
    sizes = [generate_batch.resolution(pipe, *given) for given in ((None, None), (32, None), (None, 32), (8, 40))]
    assert sizes == [(16, 24), (32, 24), (16, 32), (8, 40)]


@pytest.mark.parametrize(
    "option, value",
    [
        ("height", 65), ("width", 65), ("height", 0), ("width", -8), ("height", 4), ("batch_size", 0),
        ("num_inference_steps", 0),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected_before_a_model_is_loaded(
    models, table, tmp_path, monkeypatch, capsys, option, value
):
    monkeypatch.setattr(StableDiffusionSSRPipeline, "from_pretrained", None)
    with pytest.raises(SystemExit):
        generate_batch.main(arguments(models, table, tmp_path / "out", **{option: value}))
    assert f"argument --{option}: has to be " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([{"image": "0.png", "query": "cat"}], "prompt"),
        ([{"image": "0.png", "prompt": "cat"}], "query"),
        ([{**ROWS[0], "colour": "red"}], "colour"),
    ],
)
def test_invalid_table_raises_an_error(rows, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"table.*{message}"):
        generate_batch.read_table(file)
    file.write_text("{broken")
    with pytest.raises(ValueError, match="JSON lines"):
        generate_batch.read_table(file)
    with pytest.raises(ValueError, match="there is no file"):
        generate_batch.read_table(tmp_path / "nowhere.csv")


BAD_NAMES = ["n" * 300, "nul\0", "half\ud83d", "../a", "/a", "x/../../a", "é" * 130]


def test_a_long_name_is_not_compared_with_other_names():
    """Each folder of a path is compared, which would take minutes and gigabytes."""
    rows = [{"name": "a/" * 500_000}, {"name": "a/b"}, {"name": "n" * 1020}]
    faults = generate_batch.check_names(rows)
    assert sorted(faults) == [0, 2] and "1,000,004 characters" in str(faults[0])


def test_only_rows_with_invalid_file_names_fail(models, table, tmp_path, capsys):
    out = tmp_path / "out"
    names = ["a", *BAD_NAMES, "a", "A", "a.png/b", "c.png/d", "c", "C", "c.png/e", 7]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**ROWS[0], "name": name}) for name in names))
    generate_batch.main(arguments(models, file, out))
    entries = manifest(out)
    done = [names[entry["row"]] for entry in entries if entry["status"] == "done"]
    assert done == ["a", "c.png/d", "c.png/e", 7]
    drawn = sorted(str(file.relative_to(out)) for file in out.rglob("*.png") if file.is_file())
    assert drawn == ["7.png", "a.png", "c.png/d.png", "c.png/e.png"]
    errors = [entry["error"] for entry in entries if entry["status"] == "failed"]
    assert all("cannot be a file in the output folder" in error for error in errors[: len(BAD_NAMES)])
    assert all("conflicts with row" in error for error in errors[len(BAD_NAMES) :])
    assert "4 of 16 pictures" in capsys.readouterr().out
    assert {file.suffix for file in out.rglob("*") if file.is_file()} == {".png", ".jsonl"}


def test_scale_of_0_is_used_and_empty_scale_is_replaced_by_the_option(models, table, tmp_path):
    out = tmp_path / "out"
    rows = [{**ROWS[0], "scale": scale} for scale in (0, "0", "0.0", "", None, 0.65, "nan", "much")]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    generate_batch.main(arguments(models, file, out))
    drawn = list(pictures(out).values())
    assert len(drawn) == 6 and [entry["status"] for entry in manifest(out)[6:]] == ["failed"] * 2
    assert all(np.array_equal(each, drawn[0]) for each in drawn[:3])
    assert all(np.array_equal(each, drawn[5]) for each in drawn[3:5]) and not np.array_equal(drawn[0], drawn[5])


def test_invalid_manifest_lines_and_pictures_are_ignored(models, table, tmp_path, counted):
    out = tmp_path / "out"
    write(table, ROWS[:1])
    generate_batch.main(arguments(models, table, out))
    entry = manifest(out)[0]
    lines = ["3", "[]", "{}", '{"id": 3}', '{"id": "x"}', '{"id": "x", "status": "done"}', "[" * 10**5, "{half", "\0",
             json.dumps({"id": "x", "status": "failed"}), json.dumps({"id": ["x"], "status": "done", "file": "a"})]  # fmt: skip
    (out / "manifest.5.jsonl").write_text("\n".join(lines))
    (out / "manifest.6.jsonl").mkdir()
    counted.clear()
    generate_batch.main(arguments(models, table, out))
    assert not counted and manifest(out) == [entry]
    for content in (b"no picture", b""):
        (out / entry["file"]).write_bytes(content)
        counted.clear()
        generate_batch.main(arguments(models, table, out))
        assert len(counted) == 1 and len(pictures(out)) == 1


def test_only_rows_with_invalid_pictures_fail(models, table, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    names = ["pipe.png", "half.png", "huge.png", ".", "nul\0.png", 3, "0.png"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**ROWS[0], "image": name}) for name in names))
    generate_batch.main(arguments(models, file, tmp_path / "out"))
    entries = manifest(tmp_path / "out")
    assert [entry["status"] for entry in entries] == ["failed"] * 6 + ["done"]
    for entry, reason in zip(
        entries,
        ["not a regular file", "decoded", "81,000,000 pixels", "not a regular file", "name", "image"],
        strict=False,
    ):
        assert reason in entry["error"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_table_encodings_and_delimiters_of_spreadsheets(table, tmp_path, encoding):
    expected = generate_batch.read_table(table)
    for delimiter in ",;":
        text = table.read_text().replace(",", delimiter)
        (tmp_path / "again.csv").write_bytes(text.encode(encoding))
        assert generate_batch.read_table(tmp_path / "again.csv") == expected
