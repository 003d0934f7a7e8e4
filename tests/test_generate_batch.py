"""Tests of examples/generate_batch.py: tables of rows, processes, resuming, and invalid rows."""

import csv
import io
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import generate_batch
import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, make_components, make_picture, make_ssr_components
from diffusers import StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline
from page.request import SubjectChoice
from PIL import Image


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base model, an SSR-Encoder, and a complete pipeline with both."""
    folder = tmp_path_factory.mktemp("models")
    StableDiffusionPipeline(**make_components(), requires_safety_checker=False).save_pretrained(folder / "base")
    for name, part in make_ssr_components().items():
        part.save_pretrained(folder / "ssr" / name)
    pipe = StableDiffusionSSRPipeline(**make_components(), **make_ssr_components(), requires_safety_checker=False)
    pipe.save_pretrained(folder / "complete")
    return folder


ROWS = [
    {"image": "0.png", "query": "cat", "prompt": "a cat on the beach", "seed": "1"},
    {"image": "1.png", "query": "dog", "prompt": "a dog", "seed": "2", "scale": "1,0", "negative_prompt": "a car"},
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
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
        return file
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, sorted({name for row in rows for name in row}), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    return file


def arguments(models, table, output_dir, **changes) -> list[str]:
    options = {
        "table": table, "output_dir": output_dir, "checkpoint": models / "base",
        "ssr": models / "ssr", "num_inference_steps": 2, "height": 16, "width": 16, **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def manifest(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def images(folder) -> dict[str, np.ndarray]:
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
    "values, expected",
    [
        ({"seed": "1.0"}, {"seed": 1}),
        ({"seed": 2**53 + 1}, {"seed": 2**53 + 1}),
        ({"seed": ""}, {"seed": 0}),
        ({"scale": "0,8"}, {"scale": 0.8}),
        ({"scale": "0"}, {"scale": 0.0}),
        ({"scale": 0}, {"scale": 0.0}),
        ({"scale": None}, {"scale": 0.5}),
        ({"negative_prompt": "blurry"}, {"negative_prompt": "blurry"}),
        ({"negative_prompt": ""}, {"negative_prompt": "ugly"}),
        ({"seed": 1.7}, "`seed` has to be a whole number"),
        ({"seed": "1,000"}, "`seed` has to be a finite number"),
        ({"seed": -1}, "`seed` has to be a whole number"),
        ({"seed": "9" * 30}, "`seed` has to be a whole number"),
        ({"seed": "nan"}, "`seed` has to be a finite number"),
        ({"scale": True}, "`scale` has to be a finite number"),
        ({"scale": "inf"}, "`scale` has to be a finite number"),
        ({"scale": [1]}, "`scale` has to be a finite number"),
        ({"scale": 1000}, "`scale` has to be a number from -100 to 100"),
        ({"query": ["cat"]}, "`query` has to be a text"),
        ({"mask": ["mask.png"]}, "`mask` has to be a text"),
        ({"negative_prompt": 3}, "`negative_prompt` has to be a text"),
        ({"prompt": 3}, "`prompt` has to be a text"),
        ({"prompt": None}, "`prompt` is missing"),
        ({"image": "half.png"}, "`image` cannot be decoded"),
        ({"image": "pipe.png"}, "`image` cannot be read"),
        ({"image": "nul\0.png"}, "`image` cannot be read"),
    ],
    ids=str,
)  # fmt: skip
def test_values_of_rows(table, pipe, values, expected):
    (table.parent / "half.png").write_bytes((table.parent / "0.png").read_bytes()[:300])
    os.mkfifo(table.parent / "pipe.png")
    row, args = {**ROWS[0], **values}, SimpleNamespace(table=table, scale=0.5, negative_prompt="ugly")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            generate_batch.read_row(pipe, row, args)
        return
    request = generate_batch.read_row(pipe, row, args)
    request |= {"seed": request["generator"].initial_seed(), "scale": request["subject"].subjects[0].scale}
    assert {name: request[name] for name in expected} == expected


@pytest.mark.parametrize("ssr", ["ssr", None])
def test_images_are_written_and_invalid_rows_have_an_error(models, table, tmp_path, capsys, ssr):
    out = tmp_path / "out"
    base = {"checkpoint": models / "complete", "ssr": None} if ssr is None else {}
    message = generate_batch.main(arguments(models, table, out, **base))
    output = capsys.readouterr().out
    assert "process 0 of 1 on " in output and ": 6 of 6 rows" in output and "3 of 6 images are in" in output
    entries = manifest(out)
    assert [entry["row"] for entry in entries] == list(range(6))
    assert [entry["status"] for entry in entries] == ["done", "done", "failed", "done", "failed", "failed"]
    errors = {index: entries[index]["error"] for index in (2, 4, 5)}
    assert "missing.png" in errors[2] and "`query` is missing" in errors[4] and "seed" in errors[5]
    assert message.splitlines() == [f"row {index}: {error}" for index, error in errors.items()]
    assert [entry["file"] for entry in entries if "file" in entry] == list(images(out))
    assert entries[0]["prompt"] == "a cat on the beach"

    pipe = StableDiffusionSSRPipeline.from_pretrained(models / "complete", safety_checker=None)
    expected = pipe(
        "a dog", negative_prompt="a car", subject_image=make_picture(1), subject_query="dog", subject_scale=1.0,
        num_inference_steps=2, height=16, width=16, guidance_scale=5.0, generator=torch.Generator().manual_seed(2),
    ).images[0]  # fmt: skip
    assert np.array_equal(images(out)["000001.png"], np.asarray(expected))


def test_a_base_model_without_an_encoder_is_refused(models, table, tmp_path):
    with pytest.raises(ValueError, match="--checkpoint: .*base contains no SSR-Encoder.*--ssr"):
        generate_batch.main(arguments(models, table, tmp_path / "out", ssr=None))


def test_only_missing_and_changed_images_are_generated_again(models, table, tmp_path, counted):
    out = tmp_path / "out"
    rows = [{**ROWS[0], "name": "a/first"}, {**ROWS[1], "name": "second.png"}, ROWS[2]]

    def run(**changes) -> list[str]:
        counted.clear()
        generate_batch.main(arguments(models, write(table, rows), out, **changes))
        return list(counted)

    assert run() == ["a cat on the beach", "a dog"] and run(batch_size=2) == []
    first = images(out)
    assert list(first) == ["a/first.png", "second.png"]
    # a deleted image, and a row that failed
    (out / "second.png").unlink()
    make_picture(5).save(tmp_path / "missing.png")
    assert run() == ["a dog", "a dog"] and np.array_equal(images(out)["second.png"], first["second.png"])
    # files that are not the image of the row, and a foreign manifest
    for content in (b"no image", b"", (tmp_path / "0.png").read_bytes()):
        (out / "second.png").write_bytes(content)
        (out / "manifest.jsonl").write_text('{"id": "half a li\n{"row": 0}\n')
        assert run() == ["a dog"] and len(manifest(out)) == 3
    rows[0]["seed"] = "7"
    assert run() == ["a cat on the beach"]
    assert not np.array_equal(images(out)["a/first.png"], first["a/first.png"])
    assert len(run(guidance_scale=2.0)) == 3


@pytest.mark.parametrize("options, row, weight", [({}, 3, 3.0), ({"mask_weight": 2}, 3, 2.0), ({}, 0, 1.0)])
def test_masks_have_the_weight_of_the_other_scripts(models, table, tmp_path, options, row, weight):
    """The weight of 1 without a mask is the default of the pipeline, which accepts no other one."""
    given = []

    class Pipe:
        def encode_subject(self, image, query, mask, mask_weight):
            given.append(mask_weight)
            return SimpleNamespace(scaled=lambda scale: None)

    args = generate_batch.parse_args(arguments(models, table, tmp_path / "out", **options))
    generate_batch.read_row(Pipe(), ROWS[row], args)
    assert given == [weight]
    assert SubjectChoice(Image.new("L", (8, 8)), mask=Image.new("L", (8, 8))).selection()["mask_weight"] == 3.0


@pytest.fixture
def many_rows(table):
    """Seven valid rows, including one with a mask and one with a scale of 0, and two invalid rows."""
    prompts = ["a cat", "a dog on the beach", "a car", "a fish", "a tulip"]
    rows = [
        {"image": f"{i % 2}.png", "query": "cat", "prompt": prompt, "seed": str(i)} for i, prompt in enumerate(prompts)
    ]
    rows += [{**ROWS[3], "seed": "8"}, {**ROWS[1], "scale": "0"}, ROWS[2], ROWS[5]]
    return write(table, rows)


def test_batch_size_does_not_change_the_images(models, many_rows, tmp_path):
    for size in (1, 4, 100):
        generate_batch.main(arguments(models, many_rows, tmp_path / f"{size}", batch_size=size))
    alone = images(tmp_path / "1")
    assert len(alone) == 7 and not np.array_equal(alone["000000.png"], alone["000002.png"])
    for size in ("4", "100"):
        together = images(tmp_path / size)
        assert list(alone) == list(together) and manifest(tmp_path / "1") == manifest(tmp_path / size)
        # rounding errors of at most 1 of 255
        assert all(np.abs(alone[name].astype(int) - together[name]).max() <= 1 for name in alone)


def test_an_error_in_one_row_does_not_affect_its_batch(models, many_rows, tmp_path, monkeypatch):
    generate = generate_batch.generate

    def failing(pipe, requests, args):
        if any(request["prompt"] == "a car" for request in requests):
            raise RuntimeError("out of memory")
        return generate(pipe, requests, args)

    monkeypatch.setattr(generate_batch, "generate", failing)
    message = generate_batch.main(arguments(models, many_rows, tmp_path / "out", batch_size=4))
    assert [line.split(":")[0] for line in message.splitlines()] == ["row 2", "row 7", "row 8"]
    assert "out of memory" in manifest(tmp_path / "out")[2]["error"]


def count_rows(log, killed: int | None = None) -> None:
    """Writes the prompt of each row that this process generates to a file. Process `killed` ends at its second row."""
    read_row, rows = generate_batch.read_row, []

    def counting(pipe, row, args):
        rows.append(row)
        if len(rows) == 2 and os.environ["RANK"] == str(killed):
            os._exit(9)
        with open(log, "a") as file:
            print(row["prompt"], file=file)
        return read_row(pipe, row, args)

    generate_batch.read_row = counting


def run_killed(rank: int, port: int, log, command: list[str]) -> None:
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "1"}
    PartialState._reset_state()
    count_rows(log, killed=1)
    generate_batch.main(command)


def test_two_processes_do_each_row_once_and_continue_after_one_was_killed(models, table, tmp_path):
    rows = [{**ROWS[0], "prompt": f"a cat {index}"} for index in range(7)] + [{**ROWS[2], "image": "缺.png"}]
    command, log = arguments(models, write(table, rows), tmp_path / "out"), tmp_path / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # this process has imported the libraries already
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_killed, args=(rank, port, log, command)) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[1].join(60)
    assert processes[1].exitcode == 9
    processes[0].kill()
    processes[0].join()
    before = images(tmp_path / "out")
    assert "000001.png" in before and "000003.png" not in before and not (tmp_path / "out" / "manifest.jsonl").exists()
    assert max(Counter(log.read_text().splitlines()).values()) == 1

    log.unlink()
    script = tmp_path / "count.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT / 'tests'), str(ROOT / 'examples')]}\n"
        "import generate_batch, test_generate_batch\nfrom command_line import run_script\n"
        f"test_generate_batch.count_rows({str(log)!r})\nrun_script(generate_batch.main)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)
    # every row that was not done is done once
    expected = [row["prompt"] for index, row in enumerate(rows) if f"{index:06d}.png" not in before]
    assert Counter(log.read_text().splitlines()) == Counter(expected), done.stderr[-3000:]
    out = tmp_path / "out"
    assert len(images(out)) == 7 and [entry["row"] for entry in manifest(out)] == list(range(8))
    assert done.stdout.count("7 of 8 images are in") == 1
    assert all(f"process {index} of 2 on cpu" in done.stdout for index in (0, 1))
    # the message is at the end, after the traceback of the launcher
    assert done.returncode == 1 and "\\u7f3a.png" in done.stderr[done.stderr.index("Root Cause") :]


@pytest.mark.parametrize("given", [{}, {"height": 24}, {"width": 24}, {"height": 24, "width": 8}], ids=str)
def test_height_and_width_each_default_to_the_base_model(pipe, given):
    given = {"height": None, "width": None, **given}
    assert generate_batch.resolution(pipe, **given) == {name: given[name] or 16 for name in given}
    pipe.unet.register_to_config(sample_size=[8, 12])
    assert generate_batch.resolution(pipe, None, 32) == {"height": 16, "width": 32}
    assert generate_batch.resolution(pipe, 32, None) == {"height": 32, "width": 24}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no rows"),
        ('{"image": "0.png", "query": "cat"}', r"line 1: the columns \['prompt'\] are missing"),
        ('{"image": "0.png", "prompt": "cat"}', r"line 1: the columns \['query'\] are missing"),
        (
            json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[0], "colour": "red"}),
            r"line 2: the columns \['colour'\] are",
        ),
        ("{broken", "line 1: not JSON"),
        (b'{"image": "0.png", "query": "caf\xe9"}', 'line 1: not utf-8: save it as UTF-8.*"CSV UTF-8"'),
        (b"PK\3\4", "is a workbook"),
    ],
)
def test_an_invalid_table_is_refused(content, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"`table`: .*{message}"):
        generate_batch.read_table(file)


NAMES = {
    "a": "a.png", "first.png": "first.png", "b.PNG": "b.PNG", "c.jpg": "c.jpg.png", "d/e": "d/e.png", 7: "7.png",
    "": "000006.png", "n" * 300: None, "nul\0": None, "half\ud83d": None, "../a": None, "/a": None, "x/../../a": None,
    "é" * 130: None, "A": "as in row 0", "a.png": "as in row 0", "first": "as in row 1", "a/" * 500_000 + "b": "a/" * 500_000 + "b.png",
}  # fmt: skip


def test_names_of_files():
    for name, expected, file in zip(
        NAMES, NAMES.values(), generate_batch.name_files([{"name": n} for n in NAMES]), strict=True
    ):
        if expected is None or expected.startswith("as in"):
            assert isinstance(file, ValueError) and (expected or "cannot be a file") in str(file), name
        else:
            assert file == expected


def test_only_rows_with_an_invalid_name_fail(models, table, tmp_path):
    names = ["a", "nul\0", "half\ud83d", "A", "a.png/b", "a/" * 5000, 7]
    rows = write(tmp_path / "rows.jsonl", [{**ROWS[0], "name": name} for name in names])
    message = generate_batch.main(arguments(models, rows, tmp_path / "out"))
    assert list(images(tmp_path / "out")) == ["7.png", "a.png"]
    assert [line.split(":")[0] for line in message.splitlines()] == [f"row {index}" for index in range(1, 6)]
    assert {file.suffix for file in (tmp_path / "out").rglob("*") if file.is_file()} == {".png", ".jsonl"}


def test_the_part_of_a_text_that_was_cut_is_printed_once(models, table, tmp_path, monkeypatch):
    printed = io.StringIO()
    # pytest adds handlers of other types
    (handler,) = (each for each in logging.getLogger("diffusers").handlers if type(each) is logging.StreamHandler)
    monkeypatch.setattr(handler, "stream", printed)
    long = {**ROWS[0], "prompt": "dog " * 40 + "umbrella"}
    write(table, [long, {**long, "seed": "3"}, ROWS[0], {**ROWS[0], "query": "cat " * 40 + "tulip"}, long])
    generate_batch.main(arguments(models, table, tmp_path / "out", batch_size=2))
    lines = printed.getvalue().splitlines()
    assert len(lines) == 2 and all("was truncated" in line and "endoftext" not in line for line in lines)
    assert sum("umbrella" in line for line in lines) == sum("tulip" in line for line in lines) == 1
