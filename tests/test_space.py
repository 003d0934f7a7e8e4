"""A Space with the page is assembled and started in its folder. test_hub.py tests the upload."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import POCKET, make_image_encoder, make_ssr_encoder
from page.checkpoints import Checkpoints
from page.request import GenerationRequest, SubjectChoice
from page.studio import Studio
from PIL import Image
from publish import assemble_space
from space import requirements, write_space


pytest.importorskip("gradio", reason="the card of a Space contains the installed version of Gradio")

START = """
import sys, urllib.request
sys.path.insert(0, ".")
import app, diffusers_ssr, numpy, runpy
from page.request import GenerationRequest, SubjectChoice
from page.script import write_bundle, write_script
from page.server import parse_args, start
from PIL import Image

assert diffusers_ssr.__file__.startswith(sys.argv[1]), diffusers_ssr.__file__
page = start(parse_args(app.ARGUMENTS ), wait=False)
html = urllib.request.urlopen(page.blocks.local_url).read().decode()
assert "SSR-Encoder" in html and "Along edges" in html and "Video" in html
reference = Image.open("pocket/references/1_cat_car.png").convert("RGB")
request = GenerationRequest("a cat", (SubjectChoice(reference, "cat"),), num_inference_steps=2)
numpy.save("image.npy", page.studio.generate(request)[0])
write_bundle("bundle.zip", request, write_script(request, page.studio.checkpoints, page.studio.dtype, page.studio.device))
import zipfile
zipfile.ZipFile("bundle.zip").extractall(".")
assert numpy.array_equal(runpy.run_path("repeat.py")["images"][0], numpy.load("image.npy"))
page.blocks.close(verbose=False)
"""


def options(weights: Path, space_weights: str) -> Namespace:
    return Namespace(weights=weights, space_weights=space_weights, repo_id="owner/ssr", base_model="sd/base")


def test_a_space_can_be_started_from_its_folder(tmp_path):
    folder = tmp_path / "space"
    assemble_space(options(POCKET, "copy"), folder)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    wanted = {"README.md", "app.py", "requirements.txt", "LICENSE", "page/server.py", "diffusers_ssr/__init__.py"}
    assert wanted | {"pocket/unet/config.json", "pocket/README.md"} <= files
    assert not [name for name in files if "__pycache__" in name or "judge" in name or name.endswith("setup.py")]

    environment = {**os.environ, "PYTHONPATH": "", "GRADIO_TEMP_DIR": str(tmp_path / "gradio"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    here = Studio(Checkpoints(str(POCKET)))
    choice = SubjectChoice(Image.open(POCKET / "references" / "1_cat_car.png").convert("RGB"), "cat")
    expected = here.generate(GenerationRequest("a cat", (choice,), num_inference_steps=2))[0]
    assert np.abs(np.load(folder / "image.npy").astype(int) - np.asarray(expected)).max() <= 1


def test_the_card_has_the_metadata_that_the_hub_requires(tmp_path):
    from gradio import __version__
    from huggingface_hub import SpaceCard

    write_space(tmp_path, ["--checkpoint", "owner/ssr"], ["owner/ssr"])
    card = SpaceCard.load(tmp_path / "README.md")
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", __version__, "app.py")
    assert card.data.models == ["owner/ssr"] and card.data.license == "apache-2.0"
    # the Hub rejects other colours and longer descriptions
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card.data.to_dict()[name] for name in ("colorFrom", "colorTo")} <= colours
    assert len(card.data.to_dict()["short_description"]) <= 60


def test_the_requirements_of_a_space(tmp_path):
    names = {line.split(">")[0] for line in requirements()}
    assert {"diffusers", "torch", "transformers", "gradio", "opencv-python-headless"} <= names
    assert not names & {"pytest", "accelerate", "setuptools", "selenium"}


@pytest.mark.parametrize("weights", ["hub", "copy"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_page_of_a_space_loads_the_weights_from_the_hub_or_a_copy(tmp_path, monkeypatch, weights, whole):
    monkeypatch.chdir(tmp_path)
    make_ssr_encoder().save_pretrained("mine/ssr_encoder")
    make_image_encoder().save_pretrained("mine/ssr_image_encoder")
    if whole:
        (tmp_path / "mine" / "model_index.json").write_text("{}")
    args = options(tmp_path / "mine", weights)
    assemble_space(args, tmp_path / "space")
    namespace = {}
    exec((tmp_path / "space" / "app.py").read_text().partition("if __name__")[0], namespace)
    ssr = "owner/ssr" if weights == "hub" else "mine"
    assert namespace["ARGUMENTS"] == (["--checkpoint", ssr] if whole else ["--checkpoint", "sd/base", "--ssr", ssr])
    assert (tmp_path / "space" / "mine" / "ssr_encoder" / "config.json").exists() == (weights == "copy")
