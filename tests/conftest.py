"""Fixtures and small components of the real classes with fixed seeds."""

import os
import runpy
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parent.parent
# makes the modules in examples/ and the package `tools` importable
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# downloads and custom code of the tests are not written to the cache of the user
cache = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ["HF_HOME"] = cache.name
# parallel workers and their subprocesses share the cores; this is not set in the main process, because the workers
# would inherit its value
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1))
    )

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)


POCKET = ROOT / "pocket"
UNET_LAYERS = {
    f"{block}.attentions.{index}.transformer_blocks.0.attn2": width
    for block, count, width in (("down_blocks.0", 1, 8), ("up_blocks.1", 2, 8), ("mid_block", 1, 16))
    for index in range(count)
}


def make_unet(cross_attention_dim: int = 32, seed: int = 0, **config) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(cross_attention_dim=cross_attention_dim, **{**sizes, **config}).eval()


def make_ssr_encoder(seed: int = 1, **config) -> SSREncoder:
    torch.manual_seed(seed)
    sizes = {
        "cross_attention_dim": 32,
        "vision_hidden_size": 24,
        "inner_dim": 16,
        "num_attention_heads": 2,
        "image_levels": (1, 2, 3),
        "attention_layers": UNET_LAYERS,
    }
    return SSREncoder(**{**sizes, **config}).eval()


def make_image_encoder(seed: int = 2) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        initializer_range=0.5,
    )
    return CLIPVisionModel(config).eval()


def make_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_components(seed: int = 0) -> dict:
    """Creates the components of a stock pipeline, without an SSR-Encoder."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    return {
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text_config).eval(),
        "tokenizer": tokenizer,
        "unet": make_unet(seed=seed),
        "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }


def make_ssr_components(**encoder_config) -> dict:
    return {
        "ssr_encoder": make_ssr_encoder(**encoder_config),
        "ssr_image_encoder": make_image_encoder(),
        "ssr_image_processor": make_image_processor(),
    }


def make_picture(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def call_args(**overrides) -> dict:
    """Returns the arguments of a small deterministic call."""
    arguments = {
        "prompt": "a cat on the beach",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    return {**arguments, **overrides}


def snapshot(unet):
    """Returns everything of a UNet that a call with a subject could change."""
    return (
        dict(unet.attn_processors),
        list(unet.named_modules()),
        [[list(module._forward_pre_hooks), list(module._forward_hooks)] for module in unet.modules()],
        {name: value for name, value in vars(unet).items() if not name.startswith("_")},
        unet._compiled_call_impl,
        dict(unet.config),
        unet.config.encoder_hid_dim_type,
        unet.encoder_hid_proj,
    )


@pytest.fixture
def components() -> dict:
    return make_components()


@pytest.fixture
def pipe(components) -> StableDiffusionSSRPipeline:
    pipe = StableDiffusionSSRPipeline(**components, **make_ssr_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipe_that_only_encodes(**components) -> StableDiffusionSSRPipeline:
    """Returns a pipeline without UNet and VAE. Skips the test where the stock class does not support this."""
    nothing = {"unet": None, "vae": None, "requires_safety_checker": False}
    stock = {name: part for name, part in components.items() if not name.startswith("ssr_")}
    try:
        StableDiffusionPipeline(**stock, **nothing)
    except AttributeError:
        pytest.skip("this version of diffusers has no pipelines without UNet and VAE; other tests encode with both")
    return StableDiffusionSSRPipeline(**components, **nothing)


@pytest.fixture
def picture() -> Image.Image:
    return make_picture()


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs an example with arguments in an empty folder, in this process, because the libraries are already imported.
    Returns its output."""

    def run(script: str, *arguments) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return capfd.readouterr().out

    yield run
    logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def one_thread():
    """Uses one thread, because more threads do not make small models faster and slow down a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subject_args(**overrides) -> dict:
    """Returns the arguments of a small deterministic call with a subject."""
    return call_args(**{"subject_image": make_picture(), "subject_query": "cat", "subject_scale": 1.0, **overrides})


def make_pipe_without_ssr() -> StableDiffusionSSRPipeline:
    pipe = StableDiffusionSSRPipeline(**make_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_ssr(pipe, folder) -> None:
    """Saves the SSR components of a pipeline."""
    for name in ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor"):
        getattr(pipe, name).save_pretrained(folder / name)


def quiet(pipe):
    """Returns the pipeline, without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
