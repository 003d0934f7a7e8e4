"""Tests of loading from and publishing to the Hub, with the client of huggingface_hub and a local Hub server."""

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
import numpy as np, torch
from PIL import Image
from diffusers import DiffusionPipeline

def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a cat on the beach", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
        output_type="np", subject_image=Image.open("picture.png"), subject_query="cat", subject_scale=1.0, **kwargs,
    ).images

expected = np.load("expected.npy")
"""


def ssr_parts() -> dict:
    """Returns components with another image processor than the default, so that pictures differ if it is not loaded."""
    parts = make_ssr_components()
    parts["ssr_image_processor"].image_mean = [0.3, 0.5, 0.7]
    return parts


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local Hub with a complete repository, a branch with other weights and a private repository. Also saves the
    expected picture."""
    folder = tmp_path_factory.mktemp("hub")
    from conftest import make_components

    components = make_components()
    pipe = StableDiffusionSSRPipeline(**components, **ssr_parts(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    make_picture().save(folder / "picture.png")
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
    hub.add("owner/private", folder / "whole")
    hub.tokens["owner/private"] = "hf_secret"
    make_ssr_encoder(seed=9).save_pretrained(folder / "whole" / "ssr_encoder")
    hub.add("owner/ssr", folder / "whole", revision="other-seed")
    yield hub
    hub.close()


def run_in_new_process(hub, code: str, home: str = "hf", **environment) -> str:
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
    return done.stdout


def test_code_and_encoder_from_the_hub_with_a_local_base_model(hub):
    run_in_new_process(
        hub,
        """
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline="owner/ssr", trust_remote_code=True)
pipe.load_ssr("owner/ssr")
assert np.array_equal(draw(pipe), expected)
pipe.load_ssr("owner/ssr", variant="fp16")
assert np.abs(draw(pipe) - expected).max() < 0.05
""",
    )
    assert any(name.endswith("diffusion_pytorch_model.fp16.safetensors") for name in hub.requests)
    # the encoder is in the cache now, so it can be loaded offline; the code is in a local folder
    run_in_new_process(
        hub,
        f"""
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline={str(ROOT)!r}, trust_remote_code=True)
pipe.load_ssr("owner/ssr")
assert np.array_equal(draw(pipe), expected)
""",
        HF_HUB_OFFLINE="1",
    )
    assert not hub.requests


@pytest.mark.parametrize(
    "load,cold,warm",
    [
        ("DiffusionPipeline.from_pretrained('base', custom_pipeline='owner/ssr', trust_remote_code=True)", 82, 50),
        ("DiffusionPipeline.from_pretrained('owner/ssr', trust_remote_code=True)", 110, 29),
    ],
    ids=["code", "whole"],
)
def test_number_of_requests_for_loading(hub, load, cold, warm, request):
    """diffusers requests each relative import of each file and the commit each time. Only the entry files have
    relative imports, so the number of requests is a small multiple of the number of files."""
    home, counts = f"hf-count-{request.node.callspec.id}", []
    for _ in range(2):
        run_in_new_process(
            hub, f"pipe = {load}\npipe.load_ssr('owner/ssr')\nassert np.array_equal(draw(pipe), expected)", home
        )
        counts.append(len(hub.requests))
    assert counts[0] <= cold and counts[1] <= warm, counts


def test_complete_repository_online_and_offline(hub):
    load = """
from huggingface_hub import snapshot_download
folder = snapshot_download("owner/ssr")
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert np.array_equal(draw(pipe), expected)
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline=f"{folder}/pipeline_ssr.py", trust_remote_code=True)
pipe.load_ssr("owner/ssr")
assert np.array_equal(draw(pipe), expected)
"""
    by_name = """
pipe = DiffusionPipeline.from_pretrained("owner/ssr", trust_remote_code=True)
assert np.array_equal(draw(pipe), expected)
"""
    run_in_new_process(hub, by_name + load, home="hf-whole")
    run_in_new_process(hub, load, home="hf-whole", HF_HUB_OFFLINE="1")
    assert not hub.requests


def test_load_ssr_honours_revision_token_cache_dir_and_local_files_only(hub):
    run_in_new_process(
        hub,
        f"""
import os
import re
pipe = DiffusionPipeline.from_pretrained("base", custom_pipeline={str(ROOT)!r}, trust_remote_code=True)

def refused(**kwargs):
    try:
        pipe.load_ssr(**kwargs)
    except (OSError, ValueError) as error:
        assert pipe.ssr_encoder is None
        return True

assert refused(pretrained_model_name_or_path="owner/ssr", local_files_only=True)
assert refused(pretrained_model_name_or_path="owner/private")
pipe.load_ssr("owner/private", token="hf_secret", cache_dir="here")
assert os.path.isdir("here/models--owner--private")
assert np.array_equal(draw(pipe), expected)
pipe.load_ssr("owner/private", cache_dir="here", local_files_only=True)
assert np.array_equal(draw(pipe), expected)
pipe.load_ssr("owner/ssr", revision="other-seed")
assert np.abs(draw(pipe) - expected).max() > 1e-4
pipe.unload_ssr()
assert refused(pretrained_model_name_or_path="owner/ssr", revision="no-such-branch")
""",
        home="hf-options",
    )


def test_published_repository_can_be_loaded(hub):
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(hub.folder / "hf-publish")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, str(ROOT / "examples" / "publish.py"), "--repo_id", "owner/published"]
    command += ["--weights", "whole", "--push_to_hub", "--token", "hf_mine", "--space", "owner/page"]
    StableDiffusionSSRPipeline.from_pretrained(hub.folder / "base", **ssr_parts()).save_pretrained(
        hub.folder / "whole"
    )
    done = subprocess.run(command, cwd=hub.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    files = hub.repos["owner/published"]["main"]
    assert {"pipeline.py", "mixin_ssr.py", "LICENSE", "README.md", "model_index.json"} <= set(files)
    assert "ssr_encoder/diffusion_pytorch_model.fp16.safetensors" in files
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "library_name: diffusers" in card and "base_model" not in card
    assert not re.findall(r"\]\((?!https:)", card), "a link to a file that is not in the repository"
    load = card.partition("```python\n")[2].partition("```")[0]
    space = hub.repos["owner/page"]["main"]
    assert {"app.py", "README.md", "requirements.txt", "page/layout.py", "diffusers_ssr/mixin_ssr.py"} <= set(space)
    assert b"'owner/published'" in space["app.py"] and b"sdk: gradio" in space["README.md"]
    assert "POST api/spaces/owner/page/commit/main" in hub.requests
    run_in_new_process(
        hub,
        load + "assert np.array_equal(draw(pipe), expected)\n",
        home="hf-published",
    )
