"""Tests of the example scripts, run as by a user."""

import argparse
import importlib.util
import io
import json
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


SETTINGS = json.loads((POCKET / "settings.json").read_text())
SELF_CONTAINED = ("controlnet.py", "animatediff.py", "attention_map.py")
MODULES = [file.stem for file in (ROOT / "examples").glob("*.py")]
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


@pytest.mark.parametrize(
    "script, output, size",
    [("controlnet.py", "controlnet.png", (768, 256)), ("animatediff.py", "animatediff.gif", (256, 256)),
     ("attention_map.py", "attention_map.png", (768, 256))],
)  # fmt: skip
def test_self_contained_examples(run, tmp_path, script, output, size):
    """They need no other file of examples/, and pass the settings of the pocket checkpoint."""
    for name in ("pocket", "docs"):
        os.symlink(ROOT / name, tmp_path / name)
    source = (ROOT / "examples" / script).read_text()
    assert not re.findall(rf"^ *(?:from|import) ({'|'.join(MODULES)})\\b", source, re.MULTILINE)
    defaults = dict(
        re.findall(r'"--(scale|guidance_scale|num_inference_steps)",\s+type=\w+,\s+default=([\d.]+)', source)
    )
    defaults |= dict(re.findall(r"(eta)=([\d.]+)", source))
    assert {SETTINGS[name] - float(value) for name, value in defaults.items()} <= {0}
    assert script == "attention_map.py" or defaults.keys() == SETTINGS.keys()
    run(script, *(() if script == "attention_map.py" else ("--num_inference_steps", 2)))
    with Image.open(tmp_path / "outputs" / output) as image:
        assert image.size == size and getattr(image, "n_frames", 1) == (8 if output.endswith("gif") else 1)


def test_generate_writes_the_images_of_seeds(run, tmp_path):
    """Two subjects with a mask and regions, along edges, and on a photo of one's own."""
    Image.new("RGB", (90, 60), "green").save(tmp_path / "photo.jpg")
    said = run(
        "generate.py", "--reference", "photo.jpg", "--query", "cat", "--region", "0,0,0.5,1", "--mask", "0,0,0.5,1",
        "--query", "dog", "--region", "0.5,0,1,1", "--num_images", 2, "--seed", 7, "--num_inference_steps", 2, "--controlnet",
        POCKET / "controlnet", "--control_image", POCKET / "controls" / "cat.png", "--dtype", "bf16", "--device", "cpu",
    )  # fmt: skip
    assert "generates an emoji and not the subject of your photo" in said
    first, second = (np.asarray(Image.open(tmp_path / "outputs" / f"generated_{seed}.png")) for seed in (7, 8))
    assert first.shape == second.shape == (64, 64, 3) and (first != second).any()
    assert Image.open(tmp_path / "outputs" / "generated.png").width > 4 * 256


def test_generate_without_options_gives_the_image_of_a_call(run, tmp_path):
    from diffusers_ssr import StableDiffusionSSRPipeline

    assert "emoji" not in run("generate.py")
    pipe = StableDiffusionSSRPipeline.from_pretrained(POCKET, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    settings = {("subject_scale" if name == "scale" else name): value for name, value in SETTINGS.items()}
    expected = pipe(
        "a cat on the beach", subject_image=Image.open(POCKET / "references" / "1_cat_car.png"), subject_query="cat",
        generator=torch.Generator().manual_seed(0), **settings,
    ).images[0]  # fmt: skip
    difference = np.asarray(Image.open(tmp_path / "outputs" / "generated_0.png")).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("single_file", [False, True])
def test_generate_with_another_base_model_and_the_files_of_the_authors(monkeypatch, tmp_path, single_file):
    """The classes are replaced, because the files of the authors only fit Stable Diffusion 1.5."""
    import diffusers_ssr
    import transformers
    from drawing import RELEASED_IMAGE_ENCODER, load_pipeline

    calls = []

    class Pipeline:
        from_pretrained = classmethod(lambda cls, *args, **kwargs: calls.append(("folder", args, kwargs)) or cls())
        from_single_file = classmethod(lambda cls, *args, **kwargs: calls.append(("file", args, kwargs)) or cls())
        set_progress_bar_config = lambda self, **kwargs: None  # noqa: E731
        load_ssr = lambda self, *args, **kwargs: calls.append(("ssr", args, kwargs))  # noqa: E731
        to = lambda self, device: self  # noqa: E731

    monkeypatch.setattr(diffusers_ssr, "StableDiffusionSSRPipeline", Pipeline)
    monkeypatch.setattr(transformers.CLIPVisionModel, "from_pretrained", lambda name: name)
    monkeypatch.chdir(tmp_path)
    torch.save(random_released(ALIGNER), "pytorch_model.bin")
    torch.save(random_released(LAYERS), "pytorch_model_1.bin")
    (tmp_path / "model.safetensors").write_text("")
    base = "model.safetensors" if single_file else "owner/base"
    load_pipeline(base, ["pytorch_model.bin", "pytorch_model_1.bin"], device=torch.device("cpu"))
    (how, args, kwargs), (_, (encoder,), parts) = calls
    assert (how, args) == ("file" if single_file else "folder", (base,))
    assert kwargs["torch_dtype" if single_file else "dtype"] == torch.float32
    assert isinstance(encoder, SSREncoder) and parts == {"image_encoder": RELEASED_IMAGE_ENCODER}


def test_demo_with_other_references_and_without_peft(run, tmp_path, monkeypatch):
    """Without peft, a row is left out."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find_spec(name, *args)
    )
    references = tmp_path / "mine"
    references.mkdir()
    shutil.copy(POCKET / "references" / "1_cat_car.png", references / "photo.png")
    (references / "queries.json").write_text('{"photo.png": ["cat", "car"]}')
    output = run("demo.py", "--references", references, "--places", "in the snow", "--num_inference_steps", 1)
    assert 'pip install -e ".[demo]"' in output and "outputs/demo.png" in output
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

    write_card(tmp_path, "owner/encoder", "owner/base", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("owner/base", custom_pipeline="owner/encoder", trust_remote_code=True)' in card
    assert 'pipe.load_ssr("owner/encoder")' in card and "base_model: owner/base" in card and "@inproceedings" in card
    for block in card.split("```python\n")[1:]:
        compile(block.partition("```")[0], "card", "exec")


def test_the_model_card_of_pocket_says_what_it_is(tmp_path):
    from publish import write_card

    write_card(tmp_path, "owner/pocket", None, POCKET)
    card = (tmp_path / "README.md").read_text()
    assert "test fixture" in card and "emoji" in card and "base_model" not in card
    assert all(f"{name}={value}" in card for name, value in SETTINGS.items() if name != "scale")
    assert (tmp_path / "example.png").read_bytes() == (ROOT / "docs" / "quick_start.png").read_bytes()


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
    options = ("--num_inference_steps", 1)
    run("generate.py", *options)
    assert printed.getvalue() == ""
    run("generate.py", *options, "--query", "cat " * 40)
    lines = printed.getvalue().splitlines()
    assert lines and all("was truncated because CLIP can only handle" in line for line in lines)


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


@pytest.mark.parametrize("extra", [("--subjects", 2, "--batch_size", 2), ("--frames", 2, "--count_only")])
def test_benchmark_compares_the_methods(run, extra):
    output = run("benchmark.py", "--preset", "pocket", "--size", 64, "--num_inference_steps", 1, "--rounds", 1, *extra)
    rows = re.findall(r"^\| (\w+) \| \S+ \| (\S+) \| \S+ \| (\S+) \| (\S+) \|$", output, re.MULTILINE)
    flops = {method: float(ratio) for method, ratio, *_ in rows}
    assert list(flops) == ["stock", "ssr", "ssr_compact", "released"]
    assert 1 == flops["stock"] < flops["ssr_compact"] < flops["ssr"] < flops["released"]
    timed = [(seconds, ratio) for *_, seconds, ratio in rows]
    assert (
        timed == [("-", "-")] * 4 if "--count_only" in extra else all(float(s) > 0 and float(r) > 0 for s, r in timed)
    )


def test_benchmark_memory_measures_every_setting(run):
    output = run("benchmark_memory.py", "--preset", "pocket", "--size", 64, "--num_inference_steps", 1)
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


def test_library_progress_bars_are_hidden(run, capfd):
    run("generate.py", "--num_inference_steps", 2)
    shown = capfd.readouterr().err
    assert "Loading" not in shown


SCRIPTS = [file.name for file in example_scripts() if file.name not in SELF_CONTAINED]


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
        ("generate_batch.py --table a --output_dir a --checkpoint a", "accelerate", "demo"),
        ("train_ssr.py --pretrained_model_name_or_path a", "accelerate", "train"),
        ("train_ssr.py --pretrained_model_name_or_path a", "datasets", "train"),
        ("prepare_dataset.py --output_dir a", "datasets", "train"),
        ("evaluate.py --subjects_dir a --generated_dir a", "accelerate", "demo"),
    ],
)
def test_missing_package_raises_an_error_with_the_extra(script, package, extra, run, monkeypatch):
    for module in [
        name for name in sys.modules if name.partition(".")[0] in (package, "processes") or name.startswith("train")
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        run(*script.split())
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
