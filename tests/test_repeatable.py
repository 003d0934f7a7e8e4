"""Which calls give the same image bit by bit, and which differ only by rounding errors. See docs/reliability.md."""

import numpy as np
import pytest
import torch
from conftest import POCKET, call_args, make_components, make_picture, make_ssr_components
from diffusers_ssr import StableDiffusionSSRPipeline, internals_ssr
from PIL import Image
from test_pipeline_ssr import subject_args


pytestmark = pytest.mark.usefixtures("one_thread")


def again(pipe, tmp_path):
    return pipe


def from_pipe(pipe, tmp_path):
    return StableDiffusionSSRPipeline.from_pipe(pipe)


def created_again(pipe, tmp_path):
    return StableDiffusionSSRPipeline(**make_components(), **make_ssr_components(), requires_safety_checker=False)


def saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    return StableDiffusionSSRPipeline.from_pretrained(tmp_path)


def without_the_cache(pipe, tmp_path):
    return pipe


@pytest.mark.parametrize("way", [again, from_pipe, created_again, saved_and_loaded, without_the_cache])
def test_the_same_request_gives_the_same_image(pipe, tmp_path, way):
    expected = pipe(**subject_args()).images
    other = way(pipe, tmp_path)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(other(**subject_args()).images, expected)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_position_in_a_list_of_queries_changes_only_rounding(pipe, place):
    queries = ["dog", "a house"]
    queries.insert(place, "cat")
    alone = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    listed = pipe.encode_subject(make_picture(), queries)[place].subjects[0].embeds
    np.testing.assert_allclose(listed.numpy(), alone.numpy(), atol=1e-5)


def test_a_batch_and_single_calls_differ_only_by_rounding(pipe):
    subjects = [pipe.encode_subject(make_picture(seed), "cat").scaled(1.0) for seed in range(3)]
    prompts = ["a cat", "a dog on the beach", "a house"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = pipe(**call_args(prompt=prompts, subject=subjects, generator=generators)).images
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        alone = pipe(**call_args(prompt=prompts[index], subject=subjects[index], generator=generator)).images[0]
        np.testing.assert_allclose(together[index], alone, atol=1e-5)


def load_pocket(dtype):
    pipe = StableDiffusionSSRPipeline.from_pretrained(
        POCKET, safety_checker=None, **internals_ssr.precision_arguments({"dtype": dtype})
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_subject_adds_little_rounding_error_in_bfloat16():
    """With trained weights, bfloat16 changes an image with a subject not much more than a stock image."""
    photo = Image.open(POCKET / "references" / "1_cat_car.png").convert("RGB")
    in_float32, in_half = load_pocket(torch.float32), load_pocket(torch.bfloat16)
    latents = torch.randn(3, 24, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(pipe, **kwargs):
        given = latents.to(pipe.unet.dtype)
        return pipe(
            ["a thing on the beach"] * 3, latents=given, num_inference_steps=3, output_type="np", **kwargs
        ).images

    def difference(**kwargs):
        return np.median(np.abs(draw(in_float32, **kwargs) - draw(in_half, **kwargs)).mean((1, 2, 3)))

    stock = difference()
    assert difference(subject=in_float32.encode_subject(photo, "cat")) < 1.5 * stock < 1e-2
    assert difference(subject_image=photo, subject_query="cat") < 2 * stock
