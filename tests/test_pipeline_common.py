"""The checks of diffusers' pipeline tests, for a pipeline that is called with a subject."""

import ast
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_args, make_components, make_picture, make_ssr_components, snapshot
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from diffusers.utils.testing_utils import torch_device
from diffusers_ssr import SSREncoder, SSRPipelineMixin, StableDiffusionSSRPipeline, mixin_ssr
from diffusers_ssr.attention_processors import SubjectConditions
from diffusers_ssr.subject_embeds_ssr import Subject
from peft import LoraConfig, inject_adapter_in_model
from test_pipeline_ssr import stock_of, subject_args


OURS = {
    "subject_image",
    "subject_query",
    "subject_mask",
    "mask_weight",
    "subject_scale",
    "subject",
    "negative_subject",
    "subject_start",
    "subject_end",
    "subject_resize_mode",
    "subject_in_controlnet",
}


def test_the_signature_names_every_argument():
    parameters = inspect.signature(StableDiffusionSSRPipeline.__call__).parameters
    stock = inspect.signature(StableDiffusionPipeline.__call__).parameters
    assert [name for name in parameters if name not in OURS] == list(stock)
    assert set(parameters) - set(stock) == OURS
    annotated = {name: each.annotation for name, each in parameters.items() if each.annotation is not each.empty}
    assert StableDiffusionSSRPipeline.__call__.__annotations__ == annotated
    components = inspect.signature(StableDiffusionSSRPipeline.__init__).parameters
    assert set(components) - set(inspect.signature(StableDiffusionPipeline.__init__).parameters) == {
        "ssr_encoder",
        "ssr_image_encoder",
        "ssr_image_processor",
    }


def test_every_argument_is_documented():
    for name in OURS:
        assert f"{name} (" in inspect.getdoc(StableDiffusionSSRPipeline.__call__), name


DOCUMENTED = [
    SSRPipelineMixin.__call__, SSRPipelineMixin.encode_subject, SSRPipelineMixin.subject_attention_map,
    SSRPipelineMixin.load_ssr, SSREncoder, SSREncoder.attention_probs, SSREncoder.forward,
    SubjectConditions, Subject,
]  # fmt: skip


@pytest.mark.parametrize("what", DOCUMENTED, ids=lambda what: what.__qualname__)
def test_defaults_agree_with_the_documentation(what):
    if what.__doc__ is None:
        pytest.skip("`apply_forward_hook` of older diffusers versions hides the docstring; newer versions test it")
    parameters = inspect.signature(what).parameters
    documented = dict(re.findall(r"(\w+) \(`[^\n]*?defaults to `?(.+?)`?\)[,:]", what.__doc__))
    assert documented
    found = {name: parameters[name].default for name in documented}
    assert found == {name: ast.literal_eval(value) for name, value in documented.items()}


PAG_ON = {"do_perturbed_attention_guidance": True}
BRANCHES = {
    "stock": ({}, (False, True), (True,)),
    "PAG": (PAG_ON, (False, True, True), (True, True)),
    "PAG, switched off": ({"do_perturbed_attention_guidance": False}, (False, True), (True,)),
    "InstructPix2Pix": ({"base": StableDiffusionInstructPix2PixPipeline}, (True, False, False), (True,)),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_of_guidance(kind):
    state, guided, unguided = BRANCHES[kind]
    base = state.get("base", object)
    state = {name: value for name, value in state.items() if name != "base"}
    for is_guided, expected in ((True, [guided]), (False, [unguided]), (None, [unguided, guided])):
        pipeline_class = type("InCall", (base,), {**state, "do_classifier_free_guidance": is_guided})
        assert mixin_ssr._branches(object.__new__(pipeline_class)) == expected


def test_a_user_defined_class_keeps_its_own_methods():
    made = []

    class Stock(StableDiffusionPipeline):
        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            made.append(cls)

    class Mine(SSRPipelineMixin, Stock):
        def encode_prompt(self, prompt):
            return f"mine: {prompt}"

    assert made == [Mine] and Mine.encode_prompt(SimpleNamespace(tokenizer=None), "a cat") == "mine: a cat"


def test_a_pipeline_from_the_components_generates_the_same_image(pipe):
    assert {"ssr_encoder", "ssr_image_encoder", "ssr_image_processor"} < set(pipe.components)
    again = StableDiffusionSSRPipeline(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**subject_args()).images, pipe(**subject_args()).images)


def test_save_and_load_with_optional_components_missing(tmp_path):
    pipe = StableDiffusionSSRPipeline(**make_components(), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionSSRPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert all(getattr(again, name) is None for name in pipe._optional_components)
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**call_args()).images, pipe(**call_args()).images)


def test_a_missing_image_processor_is_created_from_the_vision_encoder(pipe):
    expected = pipe(**subject_args()).images
    pipe.register_modules(ssr_image_processor=None)
    assert np.array_equal(pipe(**subject_args()).images, expected)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_number_of_images(pipe, batch_size, num_images_per_prompt):
    images = pipe(**subject_args(prompt=["a cat"] * batch_size, num_images_per_prompt=num_images_per_prompt)).images
    assert images.shape[0] == batch_size * num_images_per_prompt


@pytest.mark.parametrize(
    "setting",
    [
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.vae.enable_slicing(),
        lambda pipe: pipe.vae.enable_tiling(),
    ],
    ids=["attention slicing", "VAE slicing", "VAE tiling"],
)
def test_memory_settings_do_not_change_the_image(pipe, setting):
    expected = pipe(**subject_args()).images
    setting(pipe)
    state = snapshot(pipe.unet)
    np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-4)
    assert snapshot(pipe.unet) == state


def test_fused_projections_do_not_change_the_image(pipe):
    expected = pipe(**subject_args()).images
    pipe.fuse_qkv_projections()
    np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-4)
    pipe.unfuse_qkv_projections()
    np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-6)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DDIMScheduler])
def test_schedulers(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    difference = pipe(**subject_args()).images - stock_of(pipe)(**call_args()).images
    assert np.isfinite(difference).all() and np.abs(difference).max() > 1e-3


def test_the_same_seed_gives_the_same_image(pipe):
    assert np.array_equal(pipe(**subject_args()).images, pipe(**subject_args()).images)


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(pipe, method):
    if torch_device == "cpu":
        pytest.skip("offloading needs an accelerator; test_offloading_hooks_run_for_every_method covers the hooks")
    expected = pipe(**subject_args()).images
    getattr(pipe, method)()
    np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-2)


def test_offloading_hooks_run_for_every_method(pipe):
    """`project` calls the offloading hook before it runs, which moves the weights to the execution device."""
    brought = []

    class Hook:
        def pre_forward(self, module, *args, **kwargs):
            brought.append(1)
            return args, kwargs

    pipe.ssr_encoder._hf_hook = Hook()
    pipe.ssr_encoder.project(torch.zeros(1, 3, 32))
    assert brought
    sequence = pipe.model_cpu_offload_seq.split("->")
    assert sequence.index("ssr_image_encoder") < sequence.index("ssr_encoder") < sequence.index("unet")


@pytest.mark.parametrize("offload", ["block_level", "leaf_level"])
def test_group_offloading(pipe, offload, monkeypatch):
    """Each group of weights is onloaded before it is used, also if only `project` of the encoder is called."""
    expected = pipe(**subject_args()).images
    heat = pipe.subject_attention_map(make_picture(), "cat").heat
    ModuleGroup = pytest.importorskip("diffusers.hooks.group_offloading", reason="diffusers before 0.33").ModuleGroup
    leaders, original = [], ModuleGroup.onload_

    def onload(group):
        leaders.append(group.onload_leader)
        return original(group)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    groups = {"num_blocks_per_group": 1} if offload == "block_level" else {}
    pipe.ssr_encoder.enable_group_offload(torch.device("cpu"), offload_type=offload, **groups)
    pipe.ssr_encoder.project(torch.zeros(1, 3, 32))
    layers = pipe.ssr_encoder.layers
    assert set(leaders) >= (
        {layers} if offload == "block_level" else {m for m in layers.modules() if hasattr(m, "weight")}
    )
    np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-6)
    np.testing.assert_allclose(pipe.subject_attention_map(make_picture(), "cat").heat, heat, atol=1e-6)


def test_layerwise_casting(pipe):
    """With weights stored in 8 bits, the image changes slightly, the subject still has an effect, and the UNet is
    the same after the call."""
    if not hasattr(pipe.unet, "enable_layerwise_casting"):
        pytest.skip("diffusers before 0.33 has no layerwise casting")
    expected = pipe(**subject_args()).images
    subject = pipe.encode_subject(make_picture(), "cat")
    for part in (pipe.unet, pipe.ssr_encoder):
        part.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in pipe.ssr_encoder.parameters())
    state = snapshot(pipe.unet)
    images = pipe(**subject_args()).images
    assert 0 < np.abs(images - expected).max() < 0.2
    # a subject that was encoded before can still be used
    assert (
        np.abs(pipe(**subject_args(subject_image=None, subject_query=None, subject=subject)).images - expected).max()
        < 0.2
    )
    assert np.abs(images - pipe(**call_args()).images).max() > 1e-3 and snapshot(pipe.unet) == state


def test_channels_last(pipe):
    expected = pipe(**subject_args()).images
    pipe.unet.to(memory_format=torch.channels_last)
    np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(pipe, backend):
    expected = pipe(**subject_args()).images
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch", reason="diffusers before 0.35")
    with dispatch.attention_backend(backend):
        np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-5)


def _lora_config(*layers: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False)


@pytest.fixture
def lora(pipe):
    pipe.unet.add_adapter(_lora_config("to_q", "to_k", "to_v", "to_out.0"), adapter_name="style")
    # not `add_adapter` of transformers, because it can require a newer version of peft than the installed one
    inject_adapter_in_model(_lora_config("q_proj"), pipe.text_encoder, adapter_name="style")
    return pipe


def test_lora(lora):
    """The subject has an effect with an active, fused and unfused LoRA, also with a LoRA of the text encoder."""
    with_both = lora(**subject_args()).images
    with_lora = stock_of(lora)(**call_args()).images
    assert np.abs(with_both - with_lora).max() > 1e-3
    lora.fuse_lora()
    np.testing.assert_allclose(lora(**subject_args()).images, with_both, atol=1e-3)
    lora.unfuse_lora()
    np.testing.assert_allclose(lora(**subject_args()).images, with_both, atol=1e-3)
    lora.disable_lora()
    plain = StableDiffusionSSRPipeline(**make_components(), **make_ssr_components(), requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(lora(**subject_args()).images, plain(**subject_args()).images, atol=1e-4)
    lora.unload_lora_weights()
    np.testing.assert_allclose(lora(**subject_args()).images, plain(**subject_args()).images, atol=1e-4)
