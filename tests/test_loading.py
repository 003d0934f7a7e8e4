"""Tests of all ways to load the pipeline in new processes, in which the package cannot be imported, and of installing
the package."""

import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version

import diffusers
import numpy as np
import pytest
from conftest import ROOT, call_args, make_picture, quiet, save_ssr, subject_args
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline, ssr_pipeline_class
from packaging.version import Version
from test_chains import make_controlnet, make_motion_adapter


HEAD = """
import importlib, os, sys
import numpy as np
import torch
import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from PIL import Image

folder = os.getcwd()

def new_cache():
    # as in a new process: without the modules that an earlier load has copied and imported
    cache = os.path.join(folder, f"modules-{len(os.listdir(folder))}")
    sys.path[:] = [path for path in sys.path if not os.path.basename(path).startswith("modules")]
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    dynamic_modules_utils.HF_MODULES_CACHE = cache
    os.makedirs(cache)

def load(folder, **kwargs):
    new_cache()
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **kwargs)

def generate(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    photo = Image.open("image.png")
    arguments = dict(
        num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np",
        subject_image=photo, subject_query="cat", subject_scale=1.0,
    )
    return pipe("a cat on the beach", **{**arguments, **kwargs})[0]

expected = np.load("expected.npy")
"""


def run_in_new_process(code: str, folder, python=sys.executable) -> None:
    """Runs `code` in a new process with an empty cache for custom code."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [str(python), "-c", HEAD + code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Expected types" not in done.stderr, done.stderr


@pytest.fixture
def saved(tmp_path, pipe):
    """A folder with a stock pipeline in `base`, the SSR components in `ssr`, a complete pipeline in `whole`, one of a
    made class in `made`, and the image that `pipe` generates."""
    stock = {name: part for name, part in pipe.components.items() if not name.startswith("ssr_")}
    StableDiffusionPipeline(**stock, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    save_ssr(pipe, tmp_path / "ssr")
    make_picture().save(tmp_path / "image.png")
    np.save(tmp_path / "expected.npy", pipe(**subject_args()).images)
    pipe.save_pretrained(tmp_path / "whole")
    made = ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline).from_pipe(pipe)
    made.save_pretrained(tmp_path / "made")
    np.save(tmp_path / "made.npy", quiet(made)(**subject_args(image=make_picture())).images)
    make_controlnet().save_pretrained(tmp_path / "controlnet")
    make_motion_adapter().save_pretrained(tmp_path / "motion_adapter")
    return tmp_path


WITHOUT_PACKAGE = """
sys.modules["diffusers_ssr"] = None
# saved pipelines
assert np.array_equal(generate(load("whole")), expected)
assert np.array_equal(generate(load("made"), image=Image.open("image.png")), np.load("made.npy"))

# a local folder with the code, and a file of it
os.chdir(ROOT)
pipe = load(f"{folder}/base", custom_pipeline=".")
os.chdir(folder)
pipe.load_ssr("ssr")
assert np.array_equal(generate(pipe), expected)
other = load("base", custom_pipeline=f"{ROOT}/pipeline_ssr.py")
other.load_ssr("ssr")
assert np.array_equal(generate(other), expected)

# two copies of the code in one process
assert type(other) is not type(pipe)
cat = pipe.encode_subject(Image.open("image.png"), query="cat").scaled(1.0)
arguments = dict(subject_image=None, subject_query=None, subject_scale=None, subject=cat)
assert np.array_equal(generate(type(other).from_pipe(pipe), **arguments), expected)
assert np.array_equal(generate(other, **arguments), expected)

# saved again
pipe.save_pretrained("again")
again = load("again")
assert np.array_equal(generate(again), expected)
assert type(again).from_pipe(again).ssr_encoder is again.ssr_encoder

# the other entry files
for part, chain, model, extra in (
    ("controlnet", "controlnet", diffusers.ControlNetModel, {"image": Image.open("image.png").resize((16, 16))}),
    ("motion_adapter", "animatediff", diffusers.MotionAdapter, {"num_frames": 2}),
):
    parts = {part: model.from_pretrained(part)}
    first = load("base", custom_pipeline=f"{ROOT}/pipeline_ssr_{chain}.py", **parts)
    first.load_ssr("ssr")
    image = generate(first, height=16, width=16, **extra)
    assert np.isfinite(image).all() and np.std(image) > 0
    first.save_pretrained(f"whole-{chain}")
    assert np.array_equal(generate(load(f"whole-{chain}"), height=16, width=16, **extra), image)
"""


def test_custom_code_without_the_package(saved):
    run_in_new_process(f"ROOT = {str(ROOT)!r}\n{WITHOUT_PACKAGE}", saved)


def test_custom_code_and_package_are_compatible(saved):
    """`custom_pipeline=` imports a copy of the code. Its subjects work in the pipelines of the package, and vice
    versa."""
    custom = DiffusionPipeline.from_pretrained(
        saved / "base", custom_pipeline=str(ROOT / "pipeline_ssr.py"), trust_remote_code=True
    )
    custom.load_ssr(saved / "ssr")
    own = StableDiffusionSSRPipeline.from_pipe(custom)
    assert type(custom).__name__ == type(own).__name__ and type(custom) is not type(own)
    cats = [pipe.encode_subject(make_picture(), "cat").scaled(1.0) for pipe in (custom, own)]
    expected = np.load(saved / "expected.npy")
    for pipe in (custom, own):
        for cat in cats:
            assert np.array_equal(quiet(pipe)(**call_args(subject=cat)).images, expected)
        pipe(**call_args(subject=cats[0] + cats[1]))


def test_custom_code_requires_trust_remote_code(saved):
    from diffusers.utils import dynamic_modules_utils

    if "trust_remote_code" not in inspect.signature(dynamic_modules_utils.get_cached_module_file).parameters:
        pytest.skip("older versions of diffusers run local code without `trust_remote_code`")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved / "base", custom_pipeline=str(ROOT))


INSTALLED = """
import diffusers_ssr
from diffusers_ssr import StableDiffusionSSRPipeline
assert diffusers_ssr.__file__.startswith(PLACE), diffusers_ssr.__file__
pipe = StableDiffusionSSRPipeline.from_pretrained("base")
pipe.load_ssr("ssr")
assert np.array_equal(generate(pipe), expected)
"""


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_installed_package(saved, tmp_path_factory, editable):
    """The wheel holds the modules and nothing else."""
    if Version(version("setuptools")) < Version("77"):
        pytest.skip("the package is built with the installed setuptools, and pyproject.toml needs version 77 or newer")
    source = tmp_path_factory.mktemp("source")
    for name in ("README.md", "LICENSE", "pyproject.toml", "py.typed"):
        shutil.copy(ROOT / name, source)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, source)
    # an environment with the packages of the current one, but without this project
    environment, packages = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("packages")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = next(environment.glob("lib/python*/site-packages"))
    for item in os.scandir(sysconfig.get_paths()["purelib"]):
        if "diffusers_ssr" not in item.name and not item.name.endswith(".pth"):
            os.symlink(item.path, packages / item.name)
    (site / "others.pth").write_text(str(packages))
    pip = [str(python), "-m", "pip", "-q"]
    options = ["--no-deps", "--no-build-isolation"]
    if editable:
        commands = [[*pip, "install", *options, "-e", str(source)]]
    else:
        wheels = source / "wheels"
        commands = [[*pip, "wheel", *options, "-w", str(wheels), str(source)]]
        commands.append([*pip, "install", "--no-deps", "--no-index", "--find-links", str(wheels), "diffusers-ssr"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    if not editable:
        (wheel,) = wheels.glob("*.whl")
        files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        modules = {f"diffusers_ssr/{file.name}" for file in ROOT.glob("*.py") if file.name != "setup.py"}
        assert files == modules | {"diffusers_ssr/py.typed"}
    place = source if editable else site
    run_in_new_process(INSTALLED.replace("PLACE", repr(str(place))), saved, python)
