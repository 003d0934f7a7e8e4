"""Tests of loading from and publishing to the Hub, with the client of huggingface_hub and a local Hub server."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, call_args, make_picture, make_ssr_components, make_ssr_encoder
from diffusers import StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline
from hub_server import Hub
from publish import copy_code


HEAD = """
import os, urllib.error, urllib.parse, urllib.request
import numpy as np, torch
from PIL import Image
from diffusers import DiffusionPipeline

def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a cat on the beach", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
        output_type="np", subject_image=Image.open("image.png"), subject_query="cat", subject_scale=1.0, **kwargs,
    ).images

def mark(name):
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + urllib.parse.quote(name))
    except urllib.error.HTTPError:
        pass

expected = np.load("expected.npy")
"""
# loads the code from a folder, and the encoder or the whole pipeline from the cache
SNAPSHOT = """
from huggingface_hub import snapshot_download
folder = snapshot_download("owner/ssr")
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert np.array_equal(draw(pipe), expected)
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline=f"{folder}/pipeline_ssr.py", trust_remote_code=True)
pipe.load_ssr("owner/ssr")
assert np.array_equal(draw(pipe), expected)
"""


def ssr_parts() -> dict:
    """Returns components with another image processor than the default, so that images differ if it is not loaded."""
    parts = make_ssr_components()
    parts["ssr_image_processor"].image_mean = [0.3, 0.5, 0.7]
    return parts


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local Hub with a complete repository, a branch with other weights and a private repository. Also saves the
    expected image."""
    folder = tmp_path_factory.mktemp("hub")
    from conftest import make_components

    components = make_components()
    pipe = StableDiffusionSSRPipeline(**components, **ssr_parts(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    make_picture().save(folder / "image.png")
    arguments = {"subject_image": make_picture(), "subject_query": "cat", "subject_scale": 1.0}
    np.save(folder / "expected.npy", pipe(**call_args(**arguments)).images)
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(folder / "base")
    pipe.save_pretrained(folder / "whole")
    copy_code(folder / "whole")
    for name, part in ssr_parts().items():
        # the variant first, because both write the same config, with the dtype in it
        if name != "ssr_image_processor":
            make_ssr_components()[name].half().save_pretrained(folder / "whole" / name, variant="fp16")
        part.save_pretrained(folder / "whole" / name)
    hub = Hub()
    hub.folder = folder
    hub.add("owner/ssr", folder / "whole")
    hub.add("owner/whole", folder / "whole")
    hub.add("owner/private", folder / "whole")
    hub.tokens["owner/private"] = "hf_secret"
    make_ssr_encoder(seed=9).save_pretrained(folder / "whole" / "ssr_encoder")
    hub.add("owner/ssr", folder / "whole", revision="other-seed")
    yield hub
    hub.close()


def run_in_new_process(hub, code: str, home: str = "hf", **environment) -> dict[str, int]:
    """Runs `code` in a new process. Returns the number of requests before each `mark(name)`, by name."""
    hub.requests.clear()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(hub.folder / home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], cwd=hub.folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts, number = {}, 0
    for request in hub.requests:
        number += 1
        if request.startswith("GET mark/"):
            counts[request.removeprefix("GET mark/")] = number - 1
            number = 0
    return counts


@pytest.fixture(scope="module")
def counts(hub) -> dict[str, int]:
    """Loads the repository in all ways in one process, and returns the number of requests of each way: with an empty
    cache (cold), and again (warm)."""
    return run_in_new_process(
        hub,
        f"""
import os
for state in ("cold", "warm"):
    pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline="owner/ssr", trust_remote_code=True)
    mark(f"code, {{state}}")
    pipe.load_ssr("owner/ssr")
    mark(f"encoder, {{state}}")
    assert np.array_equal(draw(pipe), expected)
for state in ("cold", "warm"):
    whole = DiffusionPipeline.from_pretrained("owner/whole", trust_remote_code=True)
    mark(f"whole, {{state}}")
    assert np.array_equal(draw(whole), expected)
pipe.load_ssr("owner/ssr", variant="fp16")
assert np.abs(draw(pipe) - expected).max() < 0.05
{SNAPSHOT}
pipe.load_ssr("owner/ssr", revision="other-seed")
assert np.abs(draw(pipe) - expected).max() > 1e-4
pipe.unload_ssr()

def refused(*args, **kwargs):
    try:
        pipe.load_ssr(*args, **kwargs)
    except (OSError, ValueError) as error:
        assert pipe.ssr_encoder is None
        return True

assert refused("owner/ssr", revision="no-such-branch")
assert refused("owner/private")
assert refused("owner/private", token="hf_secret", local_files_only=True)
pipe.load_ssr("owner/private", token="hf_secret", cache_dir="here")
assert os.path.isdir("here/models--owner--private")
assert np.array_equal(draw(pipe), expected)
pipe.load_ssr("owner/private", cache_dir="here", local_files_only=True)
assert np.array_equal(draw(pipe), expected)
""",
    )


@pytest.mark.parametrize("state,code,encoder,whole", [("cold", 48, 16, 81), ("warm", 32, 4, 17)], ids=["cold", "warm"])
def test_number_of_requests(counts, state, code, encoder, whole):
    """`custom_pipeline=` requests each file of the code and the commit for each; `load_ssr` requests the encoders."""
    assert counts[f"code, {state}"] <= code
    assert counts[f"encoder, {state}"] <= encoder
    assert counts[f"whole, {state}"] <= whole


def test_loading_offline(hub, counts):
    """The code is in a local folder, because diffusers always asks the Hub for the commit of custom code."""
    run_in_new_process(hub, SNAPSHOT, HF_HUB_OFFLINE="1")
    assert not hub.requests


def test_published_repository_can_be_loaded(hub):
    """Publishes the repository and a Space, and runs the code of the model card."""
    StableDiffusionSSRPipeline.from_pretrained(hub.folder / "base", **ssr_parts()).save_pretrained(hub.folder / "mine")
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "eta": 0.0, "scale": 1.0}
    (hub.folder / "mine" / "settings.json").write_text(json.dumps(settings))
    arguments = [
        "--weights",
        "mine",
        "--push_to_hub",
        "--token",
        "hf_mine",
        "--space",
        "owner/page",
        "--image",
        "image.png",
    ]
    run_in_new_process(
        hub,
        f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "examples")!r})
sys.argv = ["publish.py", "--repo_id", "owner/published", *{arguments!r}]
runpy.run_path({str(ROOT / "examples" / "publish.py")!r}, run_name="__main__")
card = open("outputs/hub/owner--published/README.md").read()
exec(card.partition("```python\\n")[2].partition("```")[0])
assert np.array_equal(draw(pipe), expected)
# the code for another base model, and the metadata
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline="owner/published", trust_remote_code=True)
pipe.load_ssr("owner/published")
assert np.array_equal(draw(pipe), expected)
from huggingface_hub import ModelCard
ModelCard.load("owner/published").validate()
from drawing import default_settings
assert default_settings("owner/published") == {settings} != default_settings("owner/ssr") == default_settings("no/one")
""",
        home="hf-published",
    )
    files = hub.repos["owner/published"]["main"]
    assert {"pipeline.py", "mixin_ssr.py", "LICENSE", "README.md", "model_index.json"} <= set(files)
    assert "ssr_encoder/diffusion_pytorch_model.fp16.safetensors" in files
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "library_name: diffusers" in card and "base_model" not in card
    assert set(re.findall(r"\]\((?!https:)([^)]*)", card)) == {"example.png"} and "url: example.png" in card
    assert "example.png" in files and "num_inference_steps=4" in card and "text: a cat in the snow" in card
    for name, content in files.items():
        assert not name.endswith(".json") or (b"_name_or_path" not in content and b"mine" not in content), name
    assert hub.requests.count("POST api/validate-yaml") >= 2
    space = hub.repos["owner/page"]["main"]
    assert {"app.py", "README.md", "requirements.txt", "page/layout.py", "diffusers_ssr/mixin_ssr.py"} <= set(space)
    assert b"'owner/published'" in space["app.py"] and b"sdk: gradio" in space["README.md"]
    assert "POST api/spaces/owner/page/commit/main" in hub.requests
