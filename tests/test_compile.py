"""Tests with torch.compile: there are no graph breaks, and other subjects, scales or seeds cause no recompilation. The
"eager" backend is sufficient for this."""

import numpy as np
import pytest
import torch
from conftest import call_args, make_picture
from test_pipeline_ssr import stock_of


def compile_whole(pipe):
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")


def compile_in_place(pipe):
    pipe.unet.compile(fullgraph=True, backend="eager")


def compile_blocks(pipe):
    if not hasattr(pipe.unet, "compile_repeated_blocks"):
        pytest.skip("needs diffusers 0.34 or newer")
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_blocks])
def test_unet_is_compiled_once_for_all_subjects(pipe, compiled):
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    calls = [
        {"subject": cat},
        {"subject": dog},
        {"subject": cat, "subject_scale": 0.3},
        {"subject": dog, "num_inference_steps": 3},
        {"subject": cat, "generator": torch.Generator().manual_seed(7), "prompt": "a dog in the snow"},
    ]
    expected = [pipe(**call_args(**each)).images for each in calls]
    calls[-1]["generator"].manual_seed(7)
    compiled(pipe)
    np.testing.assert_allclose(pipe(**call_args(**calls[0])).images, expected[0], atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for each, images in zip(calls, expected, strict=True):
            np.testing.assert_allclose(pipe(**call_args(**each)).images, images, atol=1e-6)


def test_alternating_calls_with_and_without_a_subject(pipe):
    """The UNet is compiled once with and once without a subject."""
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = [pipe(**call_args(subject=subject)).images, stock_of(pipe)(**call_args()).images]
    compile_whole(pipe)
    for _ in range(2):
        assert np.abs(pipe(**call_args(subject=subject)).images - expected[0]).max() < 1e-6
        assert np.abs(pipe(**call_args()).images - expected[1]).max() < 1e-6
        # both are compiled in the first iteration
        torch._dynamo.config.error_on_recompile = True
    torch._dynamo.config.error_on_recompile = False


def test_layers_of_the_same_width_share_a_compiled_block(pipe):
    """Four layers of two widths need as many compiled graphs as in the stock UNet."""
    subject = pipe.encode_subject(make_picture(), "cat")
    counts = []
    for extra in ({}, {"subject": subject}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_blocks(pipe)
        pipe(**call_args(**extra))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] == 2
