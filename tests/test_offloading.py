"""Tests of components that are replaced while offloading is enabled. test_devices.py checks the devices of a call."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, CpuOffload
from conftest import (
    call_args,
    make_image_encoder,
    make_picture,
    make_pipe_without_ssr,
    make_ssr_encoder,
    save_ssr,
    subject_args,
)
from diffusers import DiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline


HOOKS = {"enable_model_cpu_offload": CpuOffload, "enable_sequential_cpu_offload": AlignDevicesHook}


@pytest.mark.parametrize("source", ["memory", "folder"])
@pytest.mark.parametrize("method", HOOKS)
def test_components_are_replaced_with_offloading(tmp_path, method, source):
    """After each change, the components of the pipeline are offloaded, and no weights are lost. Another pipeline with
    the same encoder works as before."""
    pipe, other = make_pipe_without_ssr(), make_pipe_without_ssr()
    encoder, image_encoder = make_ssr_encoder(), make_image_encoder()
    other.load_ssr(encoder, image_encoder=image_encoder)
    save_ssr(other, tmp_path)
    expected = other(**subject_args()).images
    getattr(pipe, method)(device="cpu")

    def load():
        if source == "memory":
            pipe.load_ssr(encoder, image_encoder=image_encoder)
        else:
            pipe.load_ssr(tmp_path)

    def load_again():
        pipe.load_ssr(pipe.ssr_encoder, image_encoder=pipe.ssr_image_encoder)

    changes = [
        (load, (True, True)),
        (load_again, (True, True)),
        (pipe.drop_ssr_encoders, (True, False)),
        (pipe.unload_ssr, (False, False)),
        (load, (True, True)),
    ]
    for change, present in changes:
        change()
        parts = (pipe.ssr_encoder, pipe.ssr_image_encoder)
        assert tuple(part is not None for part in parts) == present
        for part in (pipe.unet, *(part for part in parts if part is not None)):
            assert isinstance(part._hf_hook, HOOKS[method])
    if method == "enable_model_cpu_offload":  # accelerate cannot offload a text encoder sequentially to the CPU
        assert np.array_equal(pipe(**subject_args()).images, expected)
    pipe.remove_all_hooks()
    assert {parameter.device.type for parameter in (*encoder.parameters(), *image_encoder.parameters())} == {"cpu"}
    for restored in (other, pipe):
        assert np.array_equal(restored(**subject_args()).images, expected)


@pytest.mark.skipif(not hasattr(DiffusionPipeline, "enable_group_offload"), reason="needs diffusers 0.35 or newer")
def test_components_are_replaced_with_group_offloading():
    pipe, expected_pipe = make_pipe_without_ssr(), make_pipe_without_ssr()
    expected_pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    assert np.array_equal(pipe(**subject_args()).images, expected_pipe(**subject_args()).images)
    pipe.drop_ssr_encoders()
    pipe.unload_ssr()
    assert np.array_equal(pipe(**call_args()).images, expected_pipe(**call_args()).images)


def test_an_encoder_with_weights_on_the_meta_device(pipe, monkeypatch):
    """As with sequential offloading. `encode_subject` and the call both compute the fingerprint of the encoder."""
    expected = pipe(**subject_args()).images
    cpu_offload(pipe.ssr_encoder, torch.device("cpu"))
    monkeypatch.setattr(StableDiffusionSSRPipeline, "_execution_device", torch.device("cpu"))
    assert pipe.ssr_encoder.device.type == "meta"
    assert np.array_equal(pipe(**subject_args()).images, expected)
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)


def test_an_encoder_in_memory_on_another_device_raises_an_error(monkeypatch):
    pipe = make_pipe_without_ssr()
    monkeypatch.setattr(StableDiffusionSSRPipeline, "_execution_device", torch.device("cuda"))
    with pytest.raises(ValueError, match="`SSREncoder` is on cpu, but the pipeline runs on cuda"):
        pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    assert pipe.ssr_encoder is None
