"""Drawing tables of rows: each picture on its own, resumable, a bad row never fatal."""

import csv
import json
import os
import subprocess
import sys

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
    """The prompts of all calls."""
    prompts = []
    call = StableDiffusionSSRPipeline.__call__

    def counting(self, prompt, **kwargs):
        prompts.append(prompt)
        return call(self, prompt, **kwargs)

    monkeypatch.setattr(StableDiffusionSSRPipeline, "__call__", counting)
    return prompts


def test_rows_become_pictures_and_bad_rows_say_why(models, table, tmp_path):
    out = tmp_path / "out"
    generate_batch.main(arguments(models, table, out))
    entries = manifest(out)
    assert [entry["row"] for entry in entries] == list(range(6))
    assert [entry["status"] for entry in entries] == ["done", "done", "failed", "done", "failed", "failed"]
    assert (
        "missing.png" in entries[2]["error"]
        and "subject_query" in entries[4]["error"]
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


def test_only_what_is_missing_is_drawn_again(models, table, tmp_path, counted):
    out = tmp_path / "out"
    generate_batch.main(arguments(models, table, out))
    first = pictures(out)
    counted.clear()
    (out / "000001.png").unlink()
    make_picture(5).save(tmp_path / "missing.png")
    generate_batch.main(arguments(models, table, out))
    # the picture that was gone and the rows that failed, of which one fails before it is drawn
    assert counted == ["a dog", "a dog", "a cat"]
    assert np.array_equal(pictures(out)["000001.png"], first["000001.png"])
    assert [entry["status"] for entry in manifest(out)] == ["done"] * 4 + ["failed"] * 2


def test_another_request_is_another_picture(models, table, tmp_path, counted):
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


def test_an_interrupted_run_goes_on(models, table, tmp_path, monkeypatch, counted):
    out = tmp_path / "out"
    draw_row = generate_batch.draw_row

    def interrupted(pipe, row, *args):
        if row["seed"] == "2":
            raise KeyboardInterrupt
        return draw_row(pipe, row, *args)

    monkeypatch.setattr(generate_batch, "draw_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_batch.main(arguments(models, table, out))
    monkeypatch.setattr(generate_batch, "draw_row", draw_row)
    with (out / "manifest.0.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    counted.clear()
    generate_batch.main(arguments(models, table, out))
    assert ROWS[0]["prompt"] not in counted
    assert len(pictures(out)) == 3
    assert not list(out.glob("manifest.*.jsonl"))


def test_two_processes_draw_what_one_does(models, table, tmp_path):
    generate_batch.main(arguments(models, table, tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "examples" / "generate_batch.py"), *arguments(models, table, tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert list(one) == list(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([{"image": "0.png", "query": "cat"}], "prompt"),
        ([{"image": "0.png", "prompt": "cat"}], "query"),
        ([{**ROWS[0], "colour": "red"}], "colour"),
        ([{**ROWS[0], "name": "a"}] * 2, "name"),
        ([{**ROWS[0], "name": "../a"}], "name"),
    ],
)
def test_a_table_that_is_none_is_refused(rows, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"table.*{message}"):
        generate_batch.read_table(file)
    file.write_text("{broken")
    with pytest.raises(ValueError, match="JSON lines"):
        generate_batch.read_table(file)
    with pytest.raises(ValueError, match="there is no file"):
        generate_batch.read_table(tmp_path / "nowhere.csv")
