"""Tests of the command line of the example scripts: invalid options and files end a script with a message."""

import argparse
import json
import re
import shlex
import shutil
import sys
from contextlib import nullcontext

import pytest
from command_line import check_companions, naming, picture_side, port, positive, run_script, seed, share
from conftest import POCKET, make_components
from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline, StableDiffusionSSRPipeline
from huggingface_hub.errors import HfHubHTTPError


REFERENCE = POCKET / "references" / "1_cat_car.png"
TRAINING = f"--image_encoder_name_or_path {POCKET}/ssr_image_encoder"
# Arguments of the scripts, and the message that they end with. `test_invalid_arguments` creates the files.
INVALID = [
    # options whose value has the wrong type or range
    ("benchmark.py --size 100", "argument --size: has to be a multiple of 8, but is '100'"),
    ("benchmark.py --rounds 0", "argument --rounds: has to be a positive whole number, but is '0'"),
    ("benchmark.py --frames -3", "argument --frames: has to be a positive whole number, but is '-3'"),
    ("benchmark_memory.py --steps -1", "argument --steps: has to be"),
    ("benchmark_training.py --size 65", "argument --size: has to be"),
    ("controlnet.py --num_images 0", "argument --num_images: has to be"),
    ("animatediff.py --num_inference_steps 0", "argument --num_inference_steps: has to be"),
    ("animatediff.py --num_frames 0", "argument --num_frames: has to be"),
    ("animatediff.py --num_frames 33", "`num_frames` has to be at most 32"),
    ("animatediff.py --fps 0", "argument --fps: has to be"),
    ("animatediff.py --seed -1", "argument --seed: has to be a whole number from 0"),
    ("demo.py --eta 5", "argument --eta: has to be a number from 0 to 1, but is '5'"),
    ("generate_batch.py --eta=-1", "argument --eta: has to be a number from 0 to 1, but is '-1'"),
    ("app.py --eta nan", "argument --eta: has to be a number from 0 to 1"),
    ("demo.py --output_dir file", "argument --output_dir: has to be a folder, but file is a file"),
    ("attention_map.py --output_dir file/new", "argument --output_dir: has to be a folder, but file is a file"),
    ("publish.py --repo_id a/b --output_dir file", "argument --output_dir: has to be a folder"),
    ("evaluate.py --generated_dir empty --output_dir file", "argument --output_dir: has to be a folder"),
    ("train_ssr.py --pretrained_model_name_or_path a --output_dir file", "argument --output_dir: has to be a folder"),
    ("prepare_dataset.py --output_dir file", "argument --output_dir: has to be a folder"),
    ("animatediff.py --scale nan", "`subject_scale` has to be a number"),
    ("animatediff.py --query ''", "`subject_query` has to be a text"),
    ("evaluate.py --generated_dir empty --images_per_prompt 0", "argument --images_per_prompt: has to be"),
    ("prepare_dataset.py --output_dir new --shard_size 0", "argument --shard_size: has to be"),
    ("demo.py --places ''", "--places: a place has to be a text"),
    ("app.py --port 99999", "argument --port: has to be from 1 to 65535, but is '99999'"),
    ("app.py --max_subjects 0", "argument --max_subjects: has to be"),
    ("app.py --host nowhere.invalid", "--host: nowhere.invalid is not an address"),
    # files that are missing or broken
    ("attention_map.py --image no.png --queries cat", "--image: no.png cannot be loaded"),
    ("attention_map.py --image empty --queries cat", "--image: empty cannot be loaded"),
    ("animatediff.py --reference broken.png", "--reference: broken.png cannot be loaded"),
    ("controlnet.py --reference no.png", "--reference: no.png cannot be loaded"),
    ("controlnet.py --photo broken.png", "--photo: broken.png cannot be loaded"),
    ("demo.py --references empty", "--references: empty holds no queries.json"),
    ("demo.py --references broken_json", "--references: broken_json/queries.json cannot be loaded"),
    ("demo.py --references no_picture", "--references: no_picture/queries.json cannot be loaded: .*no.png"),
    ("demo.py --references no_queries", "--references: no_queries/queries.json cannot be loaded: it has to be of"),
    ("convert_released_checkpoint.py --aligner no --layers no --output_dir new", "--aligner: there is no file no"),
    ("convert_released_checkpoint.py --aligner file --layers no --output_dir new", "--layers: there is no file no"),
    ("generate_batch.py --table no.csv --output_dir new --pretrained_model_name_or_path a --ssr b", "no file no.csv"),
    ("generate_batch.py --table rows.csv --output_dir file", "argument --output_dir: has to be a folder"),
    ("prepare_dataset.py --source no --output_dir new", "`source`: there is no folder no"),
    ("prepare_dataset.py --source empty --output_dir new", "`source`: the folder empty holds no pictures"),
    (f"train_ssr.py --pretrained_model_name_or_path {POCKET} --train_data_dir no {TRAINING}", "`train_data_dir`"),
    # models that are missing, or a folder that is not a model
    ("animatediff.py --motion_adapter empty", "--motion_adapter: empty cannot be loaded"),
    ("controlnet.py --controlnet empty", "--controlnet: empty cannot be loaded"),
    (f"animatediff.py --motion_adapter {POCKET}/controlnet", "it is a ControlNetModel, not a MotionAdapter"),
    (
        f"controlnet.py --controlnet {POCKET}/unet",
        "--controlnet: .* it is a UNet2DConditionModel, not a ControlNetModel",
    ),
    (f"app.py --controlnet {POCKET}/unet", "--controlnet: .* it is a UNet2DConditionModel, not a ControlNetModel"),
    (
        f"app.py --motion_adapter {POCKET}/controlnet",
        "--motion_adapter: .* it is a ControlNetModel, not a MotionAdapter",
    ),
    ("app.py --ssr /no", "--ssr: /no is neither a folder nor"),
    ("app.py --ssr empty", "--ssr: empty cannot be loaded"),
    ("app.py --controlnet /no", "--controlnet: /no is neither a folder nor"),
    ("app.py --controlnet empty", "--controlnet: empty cannot be loaded"),
    ("app.py --motion_adapter /no", "--motion_adapter: /no is neither a folder nor"),
    ("app.py --motion_adapter empty", "--motion_adapter: empty cannot be loaded"),
    ("evaluate.py --subjects_dir empty --generated_dir empty --dino no --clip none", "--dino: no cannot be loaded"),
    ("evaluate.py --subjects_dir empty --generated_dir empty --dino none --clip no", "--clip: no cannot be loaded"),
    (
        "generate_batch.py --table rows.csv --output_dir new --pretrained_model_name_or_path no --ssr b",
        "--pretrained_model_name_or_path: no cannot be loaded",
    ),
    (
        f"generate_batch.py --table rows.csv --output_dir new --pretrained_model_name_or_path {POCKET} --ssr empty",
        "--ssr: empty cannot be loaded",
    ),
    (
        f"prepare_dataset.py --source {POCKET}/references --output_dir new --caption_model no",
        "--caption_model: no cannot be loaded",
    ),
    (
        f"train_ssr.py --pretrained_model_name_or_path no --train_data_dir rows {TRAINING}",
        "--pretrained_model_name_or_path: no cannot be loaded",
    ),
    (
        f"train_ssr.py --pretrained_model_name_or_path {POCKET} --train_data_dir rows --image_encoder_name_or_path no",
        "--image_encoder_name_or_path: no cannot be loaded",
    ),
    # options without the option that they depend on
    ("attention_map.py --queries cat", "--image and --queries go together"),
    ("benchmark.py --count_only --profile", "argument --profile: has no effect with --count_only"),
    ("evaluate.py --generated_dir empty --scale 0.5", "argument --scale: has no effect without --ssr"),
    ("prepare_dataset.py --output_dir new --streaming", "argument --streaming: has no effect without --dataset_name"),
    ("publish.py --repo_id a/b --space_weights copy", "argument --space_weights: has no effect without --space"),
    ("publish.py --repo_id a/b --private", "argument --private: has no effect without --push_to_hub"),
    (
        "train_ssr.py --pretrained_model_name_or_path a --ema_decay 0.5",
        "argument --ema_decay: has no effect without --use_ema",
    ),
    (
        "train_ssr.py --pretrained_model_name_or_path a --ssr_encoder_name_or_path b --inner_dim 64",
        "argument --inner_dim: has no effect with --ssr_encoder_name_or_path",
    ),
    (
        "train_ssr.py --pretrained_model_name_or_path a --released_aligner b --no-init_from_text",
        "argument --init_from_text: has no effect with --released_aligner",
    ),
]


def make_files(folder) -> None:
    for name in ("empty", "broken_json", "no_picture", "no_queries", "rows"):
        (folder / name).mkdir()
    (folder / "file").write_text("")
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "rows.csv").write_text("image,query,prompt\nno.png,cat,a cat\n")
    (folder / "broken_json" / "queries.json").write_text("{")
    (folder / "no_picture" / "queries.json").write_text(json.dumps({"no.png": ["cat"]}))
    (folder / "no_queries" / "queries.json").write_text(json.dumps({REFERENCE.name: []}))
    shutil.copy(REFERENCE, folder / "rows" / "0.png")
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
        run("attention_map.py", "--checkpoint", tmp_path / "base")


@pytest.mark.parametrize("script", ["app.py", "attention_map.py", "demo.py", "controlnet.py", "animatediff.py"])
@pytest.mark.parametrize("source, said", [("/nope", "is neither a folder nor"), ("owner/nope", "cannot be loaded")])
def test_missing_checkpoint(run, script, source, said):
    if script == "app.py":
        pytest.importorskip("gradio", reason="the page needs Gradio")
    with pytest.raises(SystemExit, match=f"--checkpoint: {source} {said}"):
        run(script, "--checkpoint", source)


@pytest.mark.parametrize(
    "convert, valid, invalid",
    [
        (positive, ["1", "64"], ["0", "-1", "1.5", "", "one"]),
        (picture_side, ["8", "512"], ["0", "12", "-8", "8.0"]),
        (port, ["1", "65535"], ["0", "65536", "http"]),
        (seed, ["0", str(2**63 - 1)], ["-1", str(2**63), "1e3"]),
    ],
)
def test_types_of_options(convert, valid, invalid):
    assert [convert(text) for text in valid] == [int(text) for text in valid]
    for text in invalid:
        with pytest.raises(argparse.ArgumentTypeError, match="has to be"):
            convert(text)


@pytest.mark.parametrize("given, refused", [([], False), (["--a", "1"], True), (["--flag", "--a", "1"], False)])
def test_an_option_needs_its_companion(given, refused, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--a", type=int, default=0)
    try:
        check_companions(parser, parser.parse_args(given), {"flag": ["a"]})
    except SystemExit:
        assert refused and "argument --a: has no effect without --flag" in capsys.readouterr().err
    else:
        assert not refused


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError("no"), HfHubHTTPError.__bases__[0]("no")])
def test_naming_adds_the_option_to_an_error(error):
    with pytest.raises(ValueError, match="^--photo: x.png cannot be loaded: no$"), naming("--photo", "x.png"):
        raise error


@pytest.mark.parametrize("text", ["-0.1", "1.1", "nan", "inf", "half", ""])
def test_a_share_is_from_0_to_1(text):
    assert [share(each) for each in ("0", "0.5", "1")] == [0, 0.5, 1]
    with pytest.raises(argparse.ArgumentTypeError, match="a number from 0 to 1"):
        share(text)


@pytest.mark.parametrize("script", ["controlnet.py", "animatediff.py"])
def test_the_default_prompt_names_the_query(run, monkeypatch, script):
    prompts = []

    class Drawn(Exception):
        pass

    def stop(self, prompt, *args, **kwargs):
        prompts.append(prompt)
        raise Drawn

    for pipeline_class in (AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline):
        monkeypatch.setattr(pipeline_class, "__call__", stop)
    photo = ["--photo", REFERENCE] if script == "controlnet.py" else []
    with pytest.raises(Drawn):
        run(script, "--query", "umbrella", *photo)
    assert prompts[0].startswith("an umbrella ")


@pytest.mark.parametrize("arguments", [[], ["--space", "owner/space"]])
def test_a_missing_package_for_the_space_is_named_before_anything_is_written(run, tmp_path, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="gradio.*not installed") if arguments else nullcontext():
        run("publish.py", "--repo_id", "owner/name", "--variants", *arguments)
    assert (tmp_path / "outputs").exists() != bool(arguments)


def test_run_script(monkeypatch):
    def fail(error):
        raise error

    monkeypatch.setattr("sys.argv", ["examples/some.py"])
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    for main, code in ((lambda: None, None), (lambda: 0, None), (lambda: True, True), (lambda: 3, 3)):
        with pytest.raises(SystemExit) if code else nullcontext() as ended:
            run_script(main)
        assert code is None or ended.value.code == code
    for error in (ValueError("bad"), OSError("bad")):
        with pytest.raises(SystemExit, match="^some.py: error: bad$"):
            run_script(lambda error=error: fail(error))
    # a mistake in the code keeps its traceback, and so do all errors in debug mode
    with pytest.raises(TypeError):
        run_script(lambda: fail(TypeError("bug")))
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "debug")
    with pytest.raises(ValueError, match="bad"):
        run_script(lambda: fail(ValueError("bad")))
