"""Tests of unknown arguments of a call, which stock calls with `**kwargs` would ignore."""

import inspect

import pytest
from conftest import call_args, make_picture
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from diffusers_ssr import ssr_pipeline_class
from diffusers_ssr.arguments_ssr import _INSTEAD, check_unknown_arguments
from diffusers_ssr.mixin_ssr import _OWN_ARGUMENTS


NEAR = {
    "subject_scal": "subject_scale", "mask_wieght": "mask_weight", "subjects": "subject", "subject_querry": "subject_query",
    "subject_images": "subject_image", "negative_subjects": "negative_subject",
}  # fmt: skip


@pytest.mark.parametrize("name,instead", [*NEAR.items(), *_INSTEAD.items()])
def test_names_like_ours_and_names_of_others_raise_an_error_with_a_suggestion(name, instead):
    with pytest.raises(ValueError) as raised:
        check_unknown_arguments({name: 0.5}, {"num_inference_steps": 50}, _OWN_ARGUMENTS)
    assert f"`{name}` is not an argument of this pipeline; did you mean `{instead}`" in str(raised.value)


@pytest.mark.parametrize("with_subject", [False, True])
@pytest.mark.parametrize(
    "name", ["subject_scal", "image", "subject_begin_at_step", "region", "ssr_image", "ref_image", "ssr_strength"]
)
def test_unknown_arguments_raise_an_error_in_a_call(pipe, name, with_subject):
    extra = {"subject": pipe.encode_subject(make_picture(), "cat")} if with_subject else {}
    with pytest.raises(ValueError, match=f"`{name}` is not an argument of this pipeline; "):
        pipe(**call_args(**extra, **{name: 0.5}))


STOCK = [
    StableDiffusionPipeline, StableDiffusionControlNetPipeline, AnimateDiffPipeline, StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline, AnimateDiffVideoToVideoPipeline,
]  # fmt: skip


@pytest.mark.parametrize("stock", STOCK, ids=lambda stock: stock.__name__)
def test_arguments_of_stock_pipelines_are_allowed(stock):
    """Includes the deprecated arguments, and the arguments of other classes, which a stock call ignores. Only `image`
    is an error in a call that takes none."""
    parameters = inspect.signature(stock.__call__).parameters
    arguments = {name: 1 for other in STOCK for name in inspect.signature(other.__call__).parameters}
    arguments |= {"callback": 1, "callback_steps": 1, "subject_scal": None}
    if "image" not in parameters:
        arguments["image"] = None
    check_unknown_arguments(arguments, parameters, _OWN_ARGUMENTS)


@pytest.mark.parametrize("with_subject", [False, True])
def test_a_call_that_passes_its_arguments_on_accepts_the_names_of_that_call(pipe, with_subject):
    class Own(StableDiffusionImg2ImgPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__(prompt, **kwargs)

    extra = {"subject": pipe.encode_subject(make_picture(), "cat")} if with_subject else {}
    arguments = call_args(image=make_picture(size=(16, 16)), num_inference_steps=4, **extra)
    assert ssr_pipeline_class(Own).from_pipe(pipe)(**arguments).images.shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="`subject_scal` is not an argument"):
        ssr_pipeline_class(Own).from_pipe(pipe)(**arguments, subject_scal=1)
