"""torch.compile: no graph break, and nothing compiled again for another subject, scale or seed. The "eager" backend shows
that; what a backend makes of the graph is torch's own."""

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
        pytest.skip("diffusers before 0.34 cannot do it")
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_blocks])
def test_compiled_once_for_all_subjects(pipe, compiled):
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


def test_with_and_without_a_subject_in_turn(pipe):
    """Two compiled forms, both of them kept."""
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = [pipe(**call_args(subject=subject)).images, stock_of(pipe)(**call_args()).images]
    compile_whole(pipe)
    for _ in range(2):
        assert np.abs(pipe(**call_args(subject=subject)).images - expected[0]).max() < 1e-6
        assert np.abs(pipe(**call_args()).images - expected[1]).max() < 1e-6
        # the first round compiles both
        torch._dynamo.config.error_on_recompile = True
    torch._dynamo.config.error_on_recompile = False


def test_one_compiled_block_serves_all_layers_of_a_width(pipe):
    """Four layers of two widths: as many compiled forms as the stock UNet needs."""
    subject = pipe.encode_subject(make_picture(), "cat")
    counts = []
    for extra in ({}, {"subject": subject}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_blocks(pipe)
        pipe(**call_args(**extra))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] == 2
