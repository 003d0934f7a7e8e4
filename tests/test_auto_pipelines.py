"""Tests of `AutoPipelineFor...from_pipe` of diffusers with SSR pipelines."""

import inspect

import diffusers
import numpy as np
import pytest
from conftest import call_args, make_picture, make_ssr_encoder, quiet
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionPipeline,
)
from diffusers_ssr import (
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
    internals_ssr,
    mixin_ssr,
    ssr_pipeline_class,
)
from test_chains import make_controlnet


AUTO_CLASSES = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
SWITCHES = [
    {**pag, **control} for pag in ({}, {"enable_pag": True}, {"enable_pag": False})
    for control in ({}, {"controlnet": make_controlnet()}, {"controlnet": None})
]  # fmt: skip


@pytest.mark.parametrize("kind", ["image2image", "pag"])
def test_auto_pipelines_generate_subjects(pipe, kind):
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    if kind == "pag":
        made, stock = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True), diffusers.StableDiffusionPAGPipeline
        arguments, back = {"pag_scale": 2.0}, {"enable_pag": False}
    else:
        made, stock = AutoPipelineForImage2Image.from_pipe(pipe), diffusers.StableDiffusionImg2ImgPipeline
        arguments, back = {"image": make_picture(11, (16, 16))}, {}
    assert type(made) is ssr_pipeline_class(stock)
    images = [quiet(made)(**call_args(**arguments, **extra)).images for extra in ({"subject": subject}, {})]
    assert np.abs(images[0] - images[1]).max() > 1e-4
    assert type(AutoPipelineForText2Image.from_pipe(made, **back)) is StableDiffusionSSRPipeline


def test_auto_pipelines_of_stock_pipelines_do_not_change(pipe):
    stock = AutoPipelineForImage2Image.from_pipe(StableDiffusionPipeline.from_pipe(pipe))
    assert type(stock) is diffusers.StableDiffusionImg2ImgPipeline


def auto_class(auto, pipe, switches: dict) -> type | None:
    """Returns the class that an auto class converts a pipeline to, or `None` if it cannot convert it."""
    try:
        return type(auto.from_pipe(pipe, **switches))
    except ValueError:
        return None


@pytest.mark.parametrize("stock_class", internals_ssr.auto_pipeline_classes(), ids=lambda stock: stock.__name__)
@pytest.mark.parametrize("auto", AUTO_CLASSES, ids=lambda auto: auto.__name__)
def test_auto_pipelines_convert_like_those_of_stock_pipelines(components, stock_class, auto):
    """With every combination of `enable_pag` and `controlnet`, from the SSR version of every class."""
    parts = {**components, "requires_safety_checker": False, "controlnet": make_controlnet()}
    taken = inspect.signature(stock_class.__init__).parameters
    parts = {name: part for name, part in parts.items() if name in taken}
    stock = stock_class(**parts)
    sources = [ssr_pipeline_class(stock_class)]
    sources += [own for own in (StableDiffusionSSRPipeline, StableDiffusionSSRControlNetPipeline)
                if mixin_ssr._stock_class_of(own) is stock_class]  # fmt: skip
    encoder = make_ssr_encoder()
    for switches in SWITCHES:
        expected = auto_class(auto, stock, switches)
        for source in sources:
            made = auto_class(auto, source(**parts, ssr_encoder=encoder), switches)
            assert (made and mixin_ssr._stock_class_of(made)) is expected, (source, switches)
