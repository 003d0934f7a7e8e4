"""Tests of all ways to load the pipeline, each in a new process."""

import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version

import numpy as np
import pytest
from conftest import ROOT, call_args, make_picture, make_ssr_components
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline
from packaging.version import Version
from test_chains import make_controlnet, make_motion_adapter


DRAW = """
import sys
import numpy as np
import torch
from PIL import Image
{load}
pipe.set_progress_bar_config(disable=True)
image = pipe(
    "a cat on the beach", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
    output_type="np", subject_image=Image.open({folder!r} + "/picture.png"), subject_query="cat", subject_scale=1.0,
).images
np.save({folder!r} + "/image.npy", image)
print(type(pipe).__module__, type(pipe).__name__)
"""


def draw_in_new_process(load: str, folder, python=sys.executable) -> np.ndarray:
    """Runs `load` in a new process with an empty cache for custom code, and returns the picture that it generates."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    script = DRAW.format(load=load, folder=str(folder))
    done = subprocess.run([str(python), "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Expected types" not in done.stderr, done.stderr
    return np.load(folder / "image.npy")


@pytest.fixture
def saved(tmp_path, pipe):
    """A folder with a stock pipeline in `base` and the SSR components in `ssr`, and the picture that `pipe`
    generates."""
    stock = {name: part for name, part in pipe.components.items() if not name.startswith("ssr_")}
    StableDiffusionPipeline(**stock, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    for name, part in make_ssr_components().items():
        part.save_pretrained(tmp_path / "ssr" / name)
    make_picture().save(tmp_path / "picture.png")
    expected = pipe(**call_args(subject_image=make_picture(), subject_query="cat", subject_scale=1.0)).images
    return tmp_path, expected


@pytest.mark.parametrize("entry", [".", "pipeline_ssr.py"])
def test_custom_pipeline(saved, entry):
    folder, expected = saved
    load = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline={str(ROOT / entry)!r}, trust_remote_code=True)
pipe.load_ssr("ssr")
"""
    assert np.array_equal(draw_in_new_process(load, folder), expected)


def test_custom_code_and_package_are_compatible(saved, monkeypatch):
    """`custom_pipeline=` imports a copy of the code. Its subjects work in the pipelines of the package, and vice
    versa."""
    folder, expected = saved
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.syspath_prepend(str(folder / "modules"))
    theirs = DiffusionPipeline.from_pretrained(
        folder / "base", custom_pipeline=str(ROOT / "pipeline_ssr.py"), trust_remote_code=True
    )
    theirs.load_ssr(folder / "ssr")
    ours = StableDiffusionSSRPipeline.from_pipe(theirs)
    assert type(theirs).__name__ == type(ours).__name__ and type(theirs) is not type(ours)
    cats = [each.encode_subject(make_picture(), "cat").scaled(1.0) for each in (theirs, ours)]
    for each in (theirs, ours):
        each.set_progress_bar_config(disable=True)
        for cat in cats:
            assert np.array_equal(each(**call_args(subject=cat)).images, expected)
        each(**call_args(subject=cats[0] + cats[1]))


def test_saved_pipeline_can_be_loaded(saved, pipe):
    folder, expected = saved
    pipe.save_pretrained(folder / "whole")
    load = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("whole", trust_remote_code=True)
"""
    assert np.array_equal(draw_in_new_process(load, folder), expected)


def test_pipeline_with_custom_code_can_be_saved_and_loaded(saved):
    folder, expected = saved
    load = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline={str(ROOT)!r}, trust_remote_code=True)
pipe.load_ssr("ssr")
pipe.save_pretrained("whole")
pipe = DiffusionPipeline.from_pretrained("whole", trust_remote_code=True)
again = type(pipe).from_pipe(pipe)
assert again.ssr_encoder is pipe.ssr_encoder
"""
    assert np.array_equal(draw_in_new_process(load, folder), expected)


@pytest.mark.parametrize("chain", ["controlnet", "animatediff"])
def test_controlnet_and_animatediff_custom_pipelines(saved, chain):
    """Pipelines that are loaded with `custom_pipeline=<file>` generate the same pictures after saving and loading."""
    folder, _ = saved
    part, model = {
        "controlnet": ("controlnet", make_controlnet()),
        "animatediff": ("motion_adapter", make_motion_adapter()),
    }[chain]
    model.save_pretrained(folder / part)
    output = {"controlnet": "images", "animatediff": "frames"}[chain]
    extra = {"controlnet": ", image=Image.open('picture.png').resize((16, 16))", "animatediff": ", num_frames=2"}[
        chain
    ]
    load = f"""
import diffusers
from diffusers import DiffusionPipeline
model = getattr(diffusers, {type(model).__name__!r}).from_pretrained({part!r})
file = {str(ROOT / f"pipeline_ssr_{chain}.py")!r}
first = DiffusionPipeline.from_pretrained("base", custom_pipeline=file, trust_remote_code=True, {part}=model)
first.load_ssr("ssr")
first.save_pretrained("whole")
again = DiffusionPipeline.from_pretrained("whole", trust_remote_code=True)

class Both:
    set_progress_bar_config = first.set_progress_bar_config

    def __call__(self, *args, generator, **kwargs):
        again.set_progress_bar_config(disable=True)
        draws = [
            pipe(*args, **kwargs, generator=generator.manual_seed(0), height=16, width=16{extra}).{output}
            for pipe in (first, again)
        ]
        assert np.array_equal(*draws)
        self.images = draws[0]
        return self

pipe = Both()
"""
    images = draw_in_new_process(load, folder)
    assert np.isfinite(images).all() and images.std() > 0


def test_custom_code_requires_trust_remote_code(saved):
    from diffusers.utils import dynamic_modules_utils

    if "trust_remote_code" not in inspect.signature(dynamic_modules_utils.get_cached_module_file).parameters:
        pytest.skip("older versions of diffusers run local code without `trust_remote_code`")
    folder, _ = saved
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder / "base", custom_pipeline=str(ROOT))


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_installed_package(saved, tmp_path_factory, editable):
    if Version(version("setuptools")) < Version("77"):
        pytest.skip("the package is built with the installed setuptools, and pyproject.toml needs version 77 or newer")
    folder, expected = saved
    source = tmp_path_factory.mktemp("source")
    for file in [*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "pyproject.toml"]:
        shutil.copy(file, source)
    # an environment with the packages of the current one, but without this project
    environment = tmp_path_factory.mktemp("venv")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    packages = tmp_path_factory.mktemp("packages")
    for item in os.scandir(sysconfig.get_paths()["purelib"]):
        if "diffusers_ssr" not in item.name and not item.name.endswith(".pth"):
            os.symlink(item.path, packages / item.name)
    with open(os.path.join(site, "others.pth"), "w") as file:
        file.write(str(packages))
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*install, *(["-e"] if editable else []), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    load = """
import diffusers_ssr
from diffusers_ssr import StableDiffusionSSRPipeline
from packaging.version import Version
assert (SOURCE in diffusers_ssr.__file__) == EDITABLE, diffusers_ssr.__file__
pipe = StableDiffusionSSRPipeline.from_pretrained("base")
pipe.load_ssr("ssr")
""".replace("SOURCE", repr(str(source))).replace("EDITABLE", str(editable))
    assert np.array_equal(draw_in_new_process(load, folder, python), expected)
