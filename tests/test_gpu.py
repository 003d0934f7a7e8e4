"""The pocket checkpoint on a GPU: half precision, offloading and compilation. `make gpu-report` runs them."""

import numpy as np
import pytest
import torch
from conftest import POCKET
from diffusers_ssr import StableDiffusionSSRPipeline
from PIL import Image


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the other tests run on a CPU")


def draw(device: str, dtype: torch.dtype, prepare=lambda pipe: None) -> np.ndarray:
    pipe = StableDiffusionSSRPipeline.from_pretrained(POCKET, trust_remote_code=True, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if device:
        pipe.to(device)
    prepare(pipe)
    return pipe(
        "a thing in the snow", subject_image=Image.open(POCKET / "references" / "1_cat_car.png"), subject_query="cat",
        subject_scale=1.0, guidance_scale=3.0, num_inference_steps=8, generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]  # fmt: skip


def test_half_precision_generates_the_same_image_as_a_cpu():
    assert np.abs(draw("cuda", torch.float16) - draw("cpu", torch.float32)).mean() < 0.03


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_generates_the_same_image(offload):
    offloaded = draw("", torch.float16, lambda pipe: getattr(pipe, offload)())
    np.testing.assert_allclose(offloaded, draw("cuda", torch.float16), atol=0.02)


def test_compiled_blocks_generate_the_same_image():
    compiled = draw("cuda", torch.float16, lambda pipe: pipe.unet.compile_repeated_blocks(fullgraph=True))
    assert np.abs(compiled - draw("cuda", torch.float16)).mean() < 0.02
