"""Tests of the example scripts, run as by a user."""

import argparse
import importlib.util
import io
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import check_script, example_scripts, shell_lines, split_command
from conftest import POCKET, ROOT, make_image_encoder, make_image_processor
from diffusers_ssr import SSREncoder
from PIL import Image
from test_modeling_ssr import ALIGNER, LAYERS, random_released


POCKET_SCRIPTS = ROOT / "tools" / "pocket" / "train"


def test_demo_writes_its_contact_sheet(tmp_path):
    """Runs the script in a new process, as a user does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--num_inference_steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "outputs/demo.png" in done.stdout
    # only progress bars
    assert re.sub(r"[^\r\n]*\d+/\d+ \[[^\r\n]*", "", done.stderr).strip() == ""
    sheet = Image.open(tmp_path / "outputs" / "demo.png")
    assert sheet.width > 800 and sheet.height > 1300
    with Image.open(tmp_path / "outputs" / "demo.gif") as video:
        assert video.n_frames == 8


def test_attention_maps_are_drawn(run, tmp_path):
    assert "outputs/attention_map.png" in run("attention_map.py")
    picture = next((POCKET / "references").glob("*.png"))
    run("attention_map.py", "--image", picture, "--queries", "a cat", "car")
    sheet = Image.open(tmp_path / "outputs" / "attention_map.png")
    assert sheet.width > 4 * 64


def test_demo_with_other_references(run, tmp_path):
    references = tmp_path / "mine"
    references.mkdir()
    shutil.copy(POCKET / "references" / "1_cat_car.png", references / "photo.png")
    (references / "queries.json").write_text('{"photo.png": ["cat", "car"]}')
    run("demo.py", "--references", references, "--places", "in the snow", "--num_inference_steps", 1)
    assert (tmp_path / "outputs" / "demo.png").exists() and (tmp_path / "outputs" / "demo.gif").exists()


@pytest.mark.parametrize("kind", ["missing", "file", "no encoder"])
def test_publishing_without_weights_raises_an_error_before_anything_is_written(run, tmp_path, kind):
    weights = tmp_path / "weights"
    if kind == "file":
        weights.write_text("")
    elif kind == "no encoder":
        (weights / "ssr_image_encoder").mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"--weights: the folder {weights} "):
        run("publish.py", "--repo_id", "owner/name", "--weights", weights)
    assert not (tmp_path / "outputs").exists()


def test_publishing_under_a_bad_name_raises_an_error_before_anything_is_written(run, tmp_path):
    for arguments in (["--repo_id", "bad id"], ["--repo_id", "owner/name", "--space", "a/b/c"]):
        with pytest.raises(SystemExit, match=arguments[-2]):
            run("publish.py", *arguments)
    assert not (tmp_path / "outputs").exists()


def test_the_model_card_of_an_encoder_loads_it_into_its_base_model(tmp_path):
    from publish import write_card

    write_card(tmp_path, "owner/encoder", "owner/base")
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("owner/base", custom_pipeline="owner/encoder", trust_remote_code=True)' in card
    assert 'pipe.load_ssr("owner/encoder")' in card and "base_model: owner/base" in card and "@inproceedings" in card
    for block in card.split("```python\n")[1:]:
        compile(block.partition("```")[0], "card", "exec")


def test_transparent_parts_of_a_reference_are_white(tmp_path):
    from drawing import load_reference

    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_reference("--reference", str(tmp_path / "clear.png")).getcolors() == [(256, (255, 255, 255))]


def test_a_long_query_is_reported_and_nothing_else(run, monkeypatch):
    """The examples print the warning of diffusers that a text is too long, and no other one."""
    printed = io.StringIO()
    # pytest adds handlers of other types
    (handler,) = (each for each in logging.getLogger("diffusers").handlers if type(each) is logging.StreamHandler)
    monkeypatch.setattr(handler, "stream", printed)
    options = ("--detector", "canny", "--num_inference_steps", 1)
    run("controlnet.py", *options)
    assert printed.getvalue() == ""
    run("controlnet.py", *options, "--query", "cat " * 40)
    lines = printed.getvalue().splitlines()
    assert lines and all("was truncated because CLIP can only handle" in line for line in lines)


@pytest.mark.parametrize("detector", ["canny", "lineart"])
def test_controlnet_example(run, tmp_path, detector):
    run("controlnet.py", "--detector", detector, "--num_inference_steps", 3)
    sheet = np.asarray(Image.open(tmp_path / "outputs" / "controlnet.png"))
    assert sheet.shape[1] > 6 * 128 and sheet[40:160, 40:-40].std() > 30


def test_animatediff_example(run, tmp_path):
    run("animatediff.py", "--num_inference_steps", 3, "--num_frames", 4)
    with Image.open(tmp_path / "outputs" / "animatediff.gif") as video:
        assert video.n_frames == 4
    assert (tmp_path / "outputs" / "animatediff.mp4").read_bytes()[4:8] == b"ftyp"


def test_released_files_are_converted(run, tmp_path):
    torch.save(random_released(ALIGNER), tmp_path / "pytorch_model.bin")
    torch.save(random_released(LAYERS), tmp_path / "pytorch_model_1.bin")
    make_image_encoder().save_pretrained(tmp_path / "clip")
    make_image_processor().save_pretrained(tmp_path / "clip")
    run(
        "convert_released_checkpoint.py", "--aligner", "pytorch_model.bin", "--layers", "pytorch_model_1.bin",
        "--image_encoder", "clip", "--output_dir", "converted",
    )  # fmt: skip
    expected = SSREncoder.from_released(random_released(ALIGNER), random_released(LAYERS))
    converted = SSREncoder.from_pretrained(tmp_path / "converted", subfolder="ssr_encoder")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    assert (tmp_path / "converted" / "ssr_image_processor" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("extra", [("--subjects", 2, "--batch_size", 2), ("--frames", 2), ("--count_only",)])
def test_benchmark_compares_the_methods(run, extra):
    output = run("benchmark.py", "--preset", "pocket", "--size", 64, "--steps", 1, "--rounds", 1, *extra)
    rows = re.findall(r"^\| (\w+) \| \S+ \| (\S+) \| \S+ \| (\S+) \| (\S+) \|$", output, re.MULTILINE)
    flops = {method: float(ratio) for method, ratio, *_ in rows}
    assert list(flops) == ["stock", "ssr", "ssr_compact", "released"]
    assert 1 == flops["stock"] < flops["ssr_compact"] < flops["ssr"] < flops["released"]
    timed = [(seconds, ratio) for *_, seconds, ratio in rows]
    assert (
        timed == [("-", "-")] * 4 if "--count_only" in extra else all(float(s) > 0 and float(r) > 0 for s, r in timed)
    )


def test_benchmark_memory_measures_every_setting(run):
    output = run("benchmark_memory.py", "--preset", "pocket", "--size", 64, "--steps", 1)
    cells = dict(re.findall(r"^\| (\w+) \| 64 \| 1 (\| .* s \|)$", output, re.MULTILINE))
    settings = {"none", "drop_ssr_encoders", "attention_slicing", "vae_slicing_and_tiling"}
    offloading = {"model_offload", "sequential_offload"}
    if torch.cuda.is_available():
        settings |= offloading
    else:
        assert "they need a GPU: model_offload, sequential_offload" in output
    assert cells.keys() == settings
    for row in cells.values():
        assert re.fullmatch(r"(\| \d+\.\d\d GiB \| \d+\.\d{4} s ){2}\|", row), row


def test_demo_skips_a_row_without_peft(run, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find_spec(name, *args)
    )
    output = run("demo.py", "--num_inference_steps", 2)
    assert 'pip install -e ".[demo]"' in output and "outputs/demo.png" in output
    assert (tmp_path / "outputs" / "demo.gif").exists()


def test_library_progress_bars_are_hidden(run, capfd):
    run("controlnet.py", "--num_inference_steps", 2)
    run("attention_map.py")
    shown = capfd.readouterr().err
    assert "Loading" not in shown


SCRIPTS = [file.name for file in example_scripts()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_commands_and_defaults(script, run, monkeypatch, capfd):
    """The commands in the help are valid, and the help contains each default."""
    parsers = []
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        parsers.append(self)
        return parse_args(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        patched.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit, match="0"):
            run(script, "--help")
    shown = capfd.readouterr().out
    (parser,) = parsers
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help"
        if action.default is not None and action.default is not False and action.default != argparse.SUPPRESS:
            described = re.sub(r"\s+", " ", parser._get_formatter()._expand_help(action))
            assert "default" in described and described in re.sub(r"\s+", " ", shown)
    indented = "\n".join(line[4:] for line in shown.splitlines() if re.match(r"    +\S", line) or line.endswith("\\"))
    commands = [line for line in shell_lines(indented) if f"examples/{script} " in f"{line} "]
    assert commands, "the help contains no command"
    for command in commands:
        check_script(split_command(command), monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_abbreviated_options_are_refused(script, run):
    """`--output` of a script with `--output_dir` could be meant as a file."""
    with pytest.raises(SystemExit, match="2"):
        run(script, "--hel")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_with_run_script(script):
    """It prints all characters in every encoding, and errors of users without a traceback."""
    assert re.search(r"\n    run_script\(.*\)\n$", (ROOT / "examples" / script).read_text())


@pytest.mark.parametrize(
    "script, package, extra",
    [
        ("controlnet.py", "controlnet_aux", "demo"),
        ("animatediff.py", "imageio_ffmpeg", "demo"),
        ("generate_batch.py", "accelerate", "demo"),
        ("train_ssr.py", "accelerate", "train"),
        ("train_ssr.py", "datasets", "train"),
        ("prepare_dataset.py", "datasets", "train"),
        ("evaluate.py", "accelerate", "demo"),
    ],
)
def test_missing_package_raises_an_error_with_the_extra(script, package, extra, run, monkeypatch):
    for module in [
        name for name in sys.modules if name.partition(".")[0] in (package, "processes") or name.startswith("train")
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        run(script, "--help")
    assert package in ended.value.code and f'pip install -e ".[{extra}]"' in ended.value.code
    metadata = (ROOT / "pyproject.toml").read_text()
    listed = re.search(rf"^{extra} = \[(.*?)\]", metadata, re.MULTILINE | re.DOTALL)[1]
    assert package.replace("_", "-") in listed


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_project_raises_an_error_with_the_install_command(script, run, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] in ("extras", "drawing", "page")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "diffusers_ssr", None)
    with pytest.raises(SystemExit) as ended:
        run(script, "--help")
    assert "pip install -e ." in ended.value.code and script in ended.value.code


@pytest.mark.parametrize("script", sorted(file.stem for file in POCKET_SCRIPTS.glob("[!_]*.py")))
def test_pocket_scripts_show_their_options(script, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    # runpy warns about a module that is already imported
    monkeypatch.delitem(sys.modules, f"tools.pocket.train.{script}", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"tools.pocket.train.{script}", run_name="__main__")
    assert "--work_dir" in capfd.readouterr().out
