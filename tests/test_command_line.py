"""Tests of the command line of the example scripts: invalid options and files end a script with a message."""

import argparse
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from command_line import check_companions, check_unused, image_side, naming, port, positive, run_script, seed, share
from commands import example_scripts
from conftest import POCKET, ROOT, make_components
from diffusers_ssr import StableDiffusionSSRPipeline
from huggingface_hub.errors import HfHubHTTPError
from processes import check_processes, own_share


REFERENCE = POCKET / "references" / "1_cat_car.png"
TRAINING = f"--image_encoder_name_or_path {POCKET}/ssr_image_encoder"
BATCH = "generate_batch.py --table rows.csv --output_dir new --checkpoint"
# Arguments of the scripts, and the message that they end with. `make_files` creates the files.
INVALID = [
    # options whose value has the wrong type or range
    ("benchmark.py --frames -3", "argument --frames: has to be a whole number of 1 or more, but is '-3'"),
    ("benchmark_memory.py --num_inference_steps -1", "argument --num_inference_steps: has to be"),
    ("generate.py --num_images 0", "argument --num_images: has to be"),
    ("generate.py --scale nan", "`scale` has to be a"),
    ("generate.py --query ''", "`query` has to be a text"),
    ("demo.py --places ''", "--places: a place has to be a text"),
    ("generate_batch.py --height 65", "argument --height: has to be"),
    ("generate_batch.py --eta=-1", "argument --eta: has to be a number from 0 to 1, but is '-1'"),
    ("evaluate.py --generated_dir empty --images_per_prompt 0", "argument --images_per_prompt: has to be"),
    ("prepare_dataset.py --output_dir new --shard_size 0", "argument --shard_size: has to be"),
    ("app.py --port 99999", "argument --port: has to be a whole number from 1 to 65535, but is '99999'"),
    ("app.py --host nowhere.invalid", "--host: nowhere.invalid is not an address"),
    # output folders that are files
    ("demo.py --output_dir file", "argument --output_dir: has to be a folder, but file is a file"),
    ("generate.py --output_dir file/new", "argument --output_dir: has to be a folder, but file is a file"),
    ("publish.py --repo_id a/b --output_dir file", "argument --output_dir: has to be a folder"),
    ("evaluate.py --generated_dir empty --output_dir file", "argument --output_dir: has to be a folder"),
    ("generate_batch.py --table rows.csv --output_dir file", "argument --output_dir: has to be a folder"),
    ("train_ssr.py --pretrained_model_name_or_path a --output_dir file", "argument --output_dir: has to be a folder"),
    ("prepare_dataset.py --output_dir file", "argument --output_dir: has to be a folder"),
    # files that are missing or broken
    ("generate.py --reference no.png --query cat", "--reference: no.png cannot be loaded"),
    ("generate.py --reference empty --query cat", "--reference: empty cannot be loaded"),
    ("generate.py --mask broken.png", "--mask: broken.png cannot be loaded"),
    ("generate.py --query cat --region no.png", "--region: no.png cannot be loaded"),
    (f"generate.py --controlnet {POCKET}/controlnet --control_image broken.png", "--control_image: broken.png cannot"),
    ("demo.py --references empty", "--references: empty holds no queries.json"),
    ("demo.py --references broken_json", "--references: broken_json/queries.json cannot be loaded"),
    ("demo.py --references no_picture", "--references: no_picture/queries.json cannot be loaded: .*no.png"),
    ("demo.py --references no_queries", "--references: no_queries/queries.json cannot be loaded: it has to be of"),
    ("convert_released_checkpoint.py --aligner no --layers no --output_dir new", "--aligner: there is no file no"),
    (f"{BATCH.replace('rows', 'no')} a", "`table`: there is no file no.csv"),
    ("prepare_dataset.py --source empty --output_dir new", "`source`: the folder empty holds no images"),
    (f"train_ssr.py --pretrained_model_name_or_path {POCKET} --train_data_dir no {TRAINING}", "`train_data_dir`"),
    ("evaluate.py --subjects_dir no --generated_dir new", "no holds no subjects with images"),
    # models that are missing, or a folder that is not a model
    (
        f"generate.py --controlnet {POCKET}/unet --control_image {REFERENCE}",
        "it is a UNet2DConditionModel, not a Contr",
    ),
    ("generate.py --checkpoint broken.png", "--checkpoint: broken.png cannot be loaded"),
    ("generate.py --ssr file file", "--ssr: file file cannot be loaded"),
    ("app.py --ssr /no", "--ssr: /no is neither a folder nor"),
    ("app.py --controlnet empty", "--controlnet: empty cannot be loaded"),
    ("evaluate.py --subjects_dir subjects --generated_dir new --dino no", "--dino: no cannot be loaded"),
    ("evaluate.py --subjects_dir subjects --generated_dir new --dino none --clip no", "--clip: no cannot be loaded"),
    (f"{BATCH} no", "--checkpoint: no cannot be loaded"),
    (f"{BATCH} {POCKET} --ssr empty", "--ssr: empty cannot be loaded"),
    (f"prepare_dataset.py --source {POCKET}/references --output_dir new --caption_model no", "--caption_model: no "),
    (f"train_ssr.py --pretrained_model_name_or_path no --train_data_dir rows {TRAINING}", "path: no cannot be loaded"),
    # combinations of options
    (f"generate.py --reference {REFERENCE}", "name the subject with --query, or show where it is with --mask"),
    (
        f"generate.py --query cat --reference {REFERENCE} --region 0,0,1,1 --reference a",
        "--reference a: name the subject",
    ),
    ("generate.py --controlnet a", "--controlnet and --control_image go together"),
    ("generate.py --ssr a b c", "--ssr: pass a folder, a repository, or the two files"),
    ("evaluate.py --generated_dir empty", "pass either --subjects_dir or --selective_dir"),
    ("evaluate.py --subjects_dir a --selective_dir a --generated_dir empty", "pass either --subjects_dir"),
    ("evaluate.py --subjects_dir a --generated_dir empty --clip none --dino none", "there is no metric"),
    ("evaluate.py --generated_dir empty --scale 0.5", "argument --scale: has no effect without --checkpoint"),
    ("prepare_dataset.py --output_dir new --streaming", "argument --streaming: has no effect without --dataset_name"),
    ("publish.py --repo_id a/b --private", "argument --private: has no effect without --push_to_hub"),
]


def make_files(folder) -> None:
    for name in ("empty", "broken_json", "no_picture", "no_queries", "rows", "subjects/dog"):
        (folder / name).mkdir(parents=True)
    (folder / "file").write_text("")
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "rows.csv").write_text("image,query,prompt\nno.png,cat,a cat\n")
    (folder / "broken_json" / "queries.json").write_text("{")
    (folder / "no_picture" / "queries.json").write_text(json.dumps({"no.png": ["cat"]}))
    (folder / "no_queries" / "queries.json").write_text(json.dumps({REFERENCE.name: []}))
    for name in ("rows", "subjects/dog"):
        shutil.copy(REFERENCE, folder / name / "0.png")
    (folder / "rows" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat", "query": "cat"}')


@pytest.mark.parametrize("command, message", INVALID, ids=[command.replace(str(POCKET), "") for command, _ in INVALID])
def test_invalid_arguments_end_a_script_with_a_message(run, tmp_path, capfd, command, message):
    script, *arguments = shlex.split(command)
    if script == "app.py":
        pytest.importorskip("gradio", reason="the page needs Gradio")
    make_files(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(script, *arguments)
    # argparse prints the usage before the message, and exits with status 2
    said = capfd.readouterr().err if ended.value.code == 2 else ended.value.code
    assert re.search(f"^{script}: error: .*{message}", said, re.MULTILINE), said
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "new").exists()


def test_checkpoint_without_an_encoder(run, tmp_path):
    StableDiffusionSSRPipeline(**make_components(), requires_safety_checker=False).save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit, match="--checkpoint: .*base contains no SSR-Encoder.*pipe.load_ssr"):
        run("generate.py", "--checkpoint", tmp_path / "base")


@pytest.mark.parametrize("script", ["app.py", "demo.py", "generate.py"])
@pytest.mark.parametrize("source, said", [("/nope", "is neither a folder nor"), ("owner/nope", "cannot be loaded")])
def test_missing_checkpoint(run, script, source, said):
    if script == "app.py":
        pytest.importorskip("gradio", reason="the page needs Gradio")
    with pytest.raises(SystemExit, match=f"--checkpoint: {source} {said}"):
        run(script, "--checkpoint", source)


@pytest.mark.parametrize(
    "convert, valid, invalid",
    [
        (positive, [1, 64], ["0", "-1", "1.5", "", "one"]),
        (image_side, [8, 512], ["0", "12", "-8", "8.0"]),
        (port, [1, 65535], ["0", "65536", "http"]),
        (seed, [0, 2**63 - 1], ["-1", str(2**63), "1e3"]),
        (share, [0, 0.5, 1], ["-0.1", "1.1", "nan", "inf", "half", ""]),
    ],
)
def test_types_of_options(convert, valid, invalid):
    assert [convert(str(number)) for number in valid] == valid
    for text in invalid:
        with pytest.raises(argparse.ArgumentTypeError, match="has to be a"):
            convert(text)


@pytest.mark.parametrize("check, given", [(check_companions, ["--a", "1"]), (check_unused, ["--flag", "--a", "1"])])
def test_an_option_without_an_effect_is_refused(check, given, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--a", type=int, default=0)
    for arguments in ([], ["--flag"], ["--flag", "--a", "1"], ["--a", "1"]):
        with pytest.raises(SystemExit) if arguments == given else nullcontext():
            check(parser, parser.parse_args(arguments), {"flag": ["a"]})
    assert "argument --a: has no effect with" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError("no"), HfHubHTTPError.__bases__[0]("no")])
def test_naming_adds_the_option_to_an_error(error):
    with pytest.raises(ValueError, match="^--photo: x.png cannot be loaded: no$"), naming("--photo", "x.png"):
        raise error


@pytest.mark.parametrize(
    "arguments, subjects, prompt",
    [
        ([], [("1_cat_car", "cat", None)], "a cat on the beach"),
        (["--query", "umbrella"], [("1_cat_car", "umbrella", None)], "an umbrella on the beach"),
        (["--reference", "a", "--query", "cat", "--query", "car"], [("a", "cat", None), ("a", "car", None)],
         "a cat and a car on the beach"),
        (["--query", "cat", "--reference", "a", "--reference", "b", "--mask", "0,0,.5,1", "--prompt", "x"],
         [("a", "cat", None), ("b", None, (0, 0, 0.5, 1))], "x"),
        (["--mask", "m.png", "--mask", "1,2,3"], [("1_cat_car", None, "m.png"), ("1_cat_car", None, "1,2,3")],
         "a thing and a thing on the beach"),
    ],
)  # fmt: skip
def test_subjects_of_the_generate_script(monkeypatch, arguments, subjects, prompt):
    from generate import parse_args

    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    args = parse_args()
    found = [(each["reference"], each.get("query"), each.get("mask")) for each in args.subjects]
    assert [(Path(reference).stem, query, mask) for reference, query, mask in found] == subjects
    assert args.prompt == prompt
    # the settings of the checkpoint
    settings = json.loads((POCKET / "settings.json").read_text())
    assert {name: getattr(args, name) for name in settings} == settings


def test_options_are_read_before_slow_imports():
    """`--help` and wrong options are answered without torch, which takes seconds to import."""
    code = """
import contextlib, io, runpy, sys
sys.path.insert(0, sys.argv[1])
for script in sys.argv[2:]:
    for option in ("--help", "--no_such_option"):
        sys.argv = [script, option]
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.suppress(SystemExit):
            runpy.run_path(f"{sys.path[0]}/{script}", run_name="__main__")
        slow = {"torch", "diffusers", "transformers", "datasets", "gradio", "accelerate"} & set(sys.modules)
        assert not slow, (script, option, slow)
"""
    scripts = [file.name for file in example_scripts()]
    command = [sys.executable, "-c", code, str(ROOT / "examples"), *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(scripts)


def test_the_schedules_are_those_of_diffusers():
    from diffusers.optimization import SchedulerType
    from training_options import SCHEDULES

    assert set(SCHEDULES) == {each.value for each in SchedulerType}


@pytest.mark.parametrize("arguments", [[], ["--space", "owner/space"]])
def test_a_missing_package_for_the_space_is_named_before_anything_is_written(run, tmp_path, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="gradio.*not installed") if arguments else nullcontext():
        run("publish.py", "--repo_id", "owner/name", "--variants", *arguments)
    assert (tmp_path / "outputs").exists() != bool(arguments)


def test_run_script(monkeypatch, tmp_path):
    def fail(error):
        raise error

    monkeypatch.setattr("sys.argv", ["examples/some.py"])
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for result in (None, 0, 3, "row 1: no"):
        with pytest.raises(SystemExit) if result else nullcontext() as ended:
            run_script(lambda result=result: result)
        assert not result or ended.value.code == result
    # the report of torchrun ends with this message
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "row 1: no"
    for error in (ValueError("bad"), OSError("bad")):
        with pytest.raises(SystemExit, match="^some.py: error: bad$"):
            run_script(lambda error=error: fail(error))
    # a mistake in the code keeps its traceback, and so do all errors in debug mode
    with pytest.raises(TypeError):
        run_script(lambda: fail(TypeError("bug")))
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "debug")
    with pytest.raises(ValueError, match="bad"):
        run_script(lambda: fail(ValueError("bad")))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_scripts_print_characters_that_the_output_lacks(monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    run_script(lambda: print("缺.png", flush=True))
    assert output.buffer.getvalue() == b"\\u7f3a.png\n"


@pytest.mark.parametrize("world_size, seen", [("2", 1), ("8", 4)])
def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch, world_size, seen):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match=f"`WORLD_SIZE` is {world_size}, but accelerate sees {seen} process"):
        check_processes(seen)
    check_processes(int(world_size))


@pytest.mark.parametrize("num_processes, num_items", [(1, 3), (2, 5), (4, 3)])
def test_every_item_belongs_to_one_process(capsys, num_processes, num_items):
    shares = []
    for index in range(num_processes):
        state = argparse.Namespace(process_index=index, num_processes=num_processes, device="cpu")
        shares += own_share(state, range(num_items), "rows")
    assert sorted(shares) == list(range(num_items))
    assert f"process 0 of {num_processes} on cpu: " in capsys.readouterr().out
