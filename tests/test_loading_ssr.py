"""Tests of components that are exchanged, missing, offloaded, pickled or loaded as another class."""

import copy
import inspect
import os
import pickle
import shutil
import subprocess
import sys
from typing import Union, get_origin

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, CpuOffload
from conftest import (
    ROOT,
    call_args,
    make_components,
    make_image_encoder,
    make_image_processor,
    make_picture,
    make_pipe_that_only_encodes,
    make_ssr_encoder,
    make_unet,
)
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from diffusers_ssr import (
    AnimateDiffSSRPipeline,
    SSREncoder,
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
    internals_ssr,
    mixin_ssr,
    ssr_pipeline_class,
    versions_ssr,
)
from safetensors.torch import load_file, save_file
from test_chains import make_controlnet
from test_chains import picture as control_picture
from test_pipeline_ssr import subject_args
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection


def make_pipe_without_ssr() -> StableDiffusionSSRPipeline:
    pipe = StableDiffusionSSRPipeline(**make_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Offloading

OFFLOADING = {"enable_model_cpu_offload": CpuOffload, "enable_sequential_cpu_offload": AlignDevicesHook}


def exchanges(pipe, load):
    """Yields each method that exchanges components, and whether the encoder and the image encoder exist afterwards."""
    yield load, (True, True)
    yield lambda: pipe.drop_ssr_encoders(), (True, False)
    yield lambda: pipe.unload_ssr(), (False, False)
    yield load, (True, True)


@pytest.mark.parametrize(
    "method,way",
    [
        ("enable_model_cpu_offload", "memory"),
        ("enable_model_cpu_offload", "folder"),
        ("enable_sequential_cpu_offload", "folder"),
    ],
)
def test_components_can_be_exchanged_with_offloading(tmp_path, method, way):
    """The components of the pipeline are offloaded after each exchange, removed components are not, and no weights are
    lost. Another pipeline with the same encoder works as before."""
    pipe, other = make_pipe_without_ssr(), make_pipe_without_ssr()
    encoder, image_encoder = make_ssr_encoder(), make_image_encoder()
    other.load_ssr(encoder, image_encoder=image_encoder)
    save_ssr(other, tmp_path)
    expected = other(**subject_args()).images
    getattr(pipe, method)(device="cpu")

    def load():
        if way == "memory":
            pipe.load_ssr(encoder, image_encoder=image_encoder)
        else:
            pipe.load_ssr(tmp_path)

    for exchange, present in exchanges(pipe, load):
        exchange()
        parts = (pipe.ssr_encoder, pipe.ssr_image_encoder)
        assert tuple(part is not None for part in parts) == present
        for part in (pipe.unet, *(part for part in parts if part is not None)):
            assert isinstance(part._hf_hook, OFFLOADING[method])
    pipe.remove_all_hooks()
    assert {parameter.device.type for parameter in (*encoder.parameters(), *image_encoder.parameters())} == {"cpu"}
    assert np.array_equal(other(**subject_args()).images, expected)
    assert np.array_equal(pipe(**subject_args()).images, expected)


@pytest.mark.parametrize("given", ["encoder", "image_encoder", "compiled"])
def test_sequential_offloading_does_not_take_the_weights_of_a_given_encoder(tmp_path, pipe, given):
    """The encoder of another pipeline keeps its weights, and nothing changes in either pipeline."""
    expected = pipe(**subject_args()).images
    save_ssr(pipe, tmp_path)
    other = make_pipe_without_ssr()
    other.enable_sequential_cpu_offload(device="cpu")
    source = {"encoder": pipe.ssr_encoder, "image_encoder": tmp_path}.get(given)
    if given == "compiled":
        source = torch.compile(pipe.ssr_encoder, backend="eager")
    image_encoder = pipe.ssr_image_encoder if given != "compiled" else None
    name = "CLIPVisionModel" if given == "image_encoder" else "SSREncoder"
    with pytest.raises(ValueError, match=f"`{name}` is already in memory.*pass the name of a folder"):
        other.load_ssr(source, image_encoder=image_encoder, image_encoder_folder=None)
    assert other.ssr_encoder is None and isinstance(other.unet._hf_hook, AlignDevicesHook)
    assert not hasattr(pipe.ssr_encoder, "_hf_hook") and not hasattr(pipe.ssr_image_encoder, "_hf_hook")
    assert np.array_equal(pipe(**subject_args()).images, expected)
    other.load_ssr(tmp_path)
    other.remove_all_hooks()
    assert np.array_equal(other(**subject_args()).images, expected)


@pytest.mark.parametrize("method", OFFLOADING)
def test_a_pipeline_with_offloading_can_load_its_own_encoder_again(pipe, method):
    expected = pipe(**subject_args()).images
    getattr(pipe, method)(device="cpu")
    pipe.load_ssr(pipe.ssr_encoder, image_encoder=pipe.ssr_image_encoder)
    assert isinstance(pipe.ssr_encoder._hf_hook, OFFLOADING[method])
    pipe.remove_all_hooks()
    assert np.array_equal(pipe(**subject_args()).images, expected)


def test_model_offloading_does_not_move_a_given_encoder(monkeypatch):
    """A pipeline with model offloading keeps its models on the CPU, so it refuses an encoder on the GPU."""
    pipe, encoder = make_pipe_without_ssr(), make_ssr_encoder()
    pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr(type(encoder), "device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r'on cuda:0, but the pipeline keeps its models on cpu: .*`.to\("cpu"\)`'):
        pipe.load_ssr(encoder, image_encoder_folder=None)
    assert pipe.ssr_encoder is None and isinstance(pipe.unet._hf_hook, CpuOffload)


def test_call_with_model_offloading():
    pipe = make_pipe_without_ssr()
    pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    expected = pipe(**subject_args()).images
    pipe.unload_ssr()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    assert np.array_equal(pipe(**subject_args()).images, expected)


def test_encoder_with_weights_on_the_meta_device(pipe, monkeypatch):
    """As with sequential offloading. `encode_subject` and the call both compute the fingerprint of the encoder."""
    expected = pipe(**subject_args()).images
    cpu_offload(pipe.ssr_encoder, torch.device("cpu"))
    monkeypatch.setattr(StableDiffusionSSRPipeline, "_execution_device", torch.device("cpu"))
    assert pipe.ssr_encoder.device.type == "meta"
    assert np.array_equal(pipe(**subject_args(subject_image=np.asarray(make_picture()))).images, expected)
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)


@pytest.mark.skipif(not hasattr(DiffusionPipeline, "enable_group_offload"), reason="needs diffusers 0.35 or newer")
def test_components_can_be_exchanged_with_group_offloading():
    pipe = make_pipe_without_ssr()
    expected_pipe = make_pipe_without_ssr()
    expected_pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    assert np.array_equal(pipe(**subject_args()).images, expected_pipe(**subject_args()).images)
    pipe.drop_ssr_encoders()
    pipe.unload_ssr()
    assert np.array_equal(pipe(**call_args()).images, expected_pipe(**call_args()).images)


def test_load_ssr_keeps_dtype_and_device_of_a_given_encoder():
    """The dtype and device do not change, and the dtype may be different from that of the UNet."""
    pipe, encoder, image_encoder = make_pipe_without_ssr(), make_ssr_encoder().half(), make_image_encoder().bfloat16()
    pipe.load_ssr(encoder, image_encoder=image_encoder)
    assert (encoder.dtype, image_encoder.dtype) == (torch.float16, torch.bfloat16)
    assert np.isfinite(pipe(**subject_args()).images).all()


@pytest.mark.parametrize("training", ["ssr_encoder", "ssr_image_encoder"])
def test_load_ssr_sets_models_to_eval_mode(training):
    pipe, parts = (
        make_pipe_without_ssr(),
        {"ssr_encoder": make_ssr_encoder(), "ssr_image_encoder": make_image_encoder()},
    )
    parts[training].train()
    pipe.load_ssr(parts["ssr_encoder"], image_encoder=parts["ssr_image_encoder"])
    assert not any(module.training for part in parts.values() for module in part.modules())


def test_unload_ssr_resets_the_scale(pipe):
    expected = pipe(**subject_args(subject_scale=None)).images
    pipe.set_ssr_scale(0.2)
    parts = pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor
    pipe.unload_ssr()
    pipe.load_ssr(parts[0], image_encoder=parts[1], image_processor=parts[2])
    assert np.array_equal(pipe(**subject_args(subject_scale=None)).images, expected)


def test_encoder_on_another_device_raises_an_error(monkeypatch):
    pipe = make_pipe_without_ssr()
    monkeypatch.setattr(StableDiffusionSSRPipeline, "_execution_device", torch.device("cuda"))
    with pytest.raises(ValueError, match="`SSREncoder` is on cpu, but the pipeline runs on cuda"):
        pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    assert pipe.ssr_encoder is None


# Precision


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_raise_an_error_that_names_the_components(pipe, dtypes):
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.text_encoder.to(dtypes[0]), pipe.unet.to(dtypes[1])
    with pytest.raises(ValueError, match="`text_encoder` is in torch.float.*, but `unet` in torch.*`dtype=`"):
        pipe(**call_args(subject=subject))


@pytest.mark.parametrize("with_dtype", [True, False])
def test_a_pipeline_that_was_saved_in_half_precision_says_how_to_load_it(pipe, tmp_path, with_dtype):
    """Without `dtype=`, transformers 5 keeps the precision of the files, and diffusers loads in float32."""
    pipe.to(torch.float16).save_pretrained(tmp_path)
    loaded = StableDiffusionSSRPipeline.from_pretrained(tmp_path, **({"dtype": torch.float32} if with_dtype else {}))
    loaded.set_progress_bar_config(disable=True)
    if loaded.text_encoder.dtype == loaded.unet.dtype:
        assert np.isfinite(loaded(**subject_args()).images).all()
        return
    assert not with_dtype
    for arguments in (subject_args(), call_args()):
        with pytest.raises(
            ValueError, match="`text_encoder` is in torch.float16, but `unet` in torch.float32.*`dtype="
        ):
            loaded(**arguments)
    loaded.to(torch.float32)
    assert np.isfinite(loaded(**subject_args()).images).all()


def test_autocast_allows_mixed_dtypes(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.text_encoder.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert np.isfinite(pipe(**call_args(subject=subject)).images).all()


# Missing components


def test_encoded_subjects_work_without_a_text_encoder(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    embeds, negative = pipe.encode_prompt("a cat on the beach", "cpu", 1, True)
    text = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    expected = pipe(**call_args(**text, subject=subject)).images
    pipe.text_encoder = None
    assert np.array_equal(pipe(**call_args(**text, subject=subject)).images, expected)
    for refused in (
        lambda: pipe.encode_subject(make_picture(), "cat"),
        lambda: pipe.subject_attention_map(make_picture(), "cat"),
        lambda: pipe(**call_args(**text, subject_image=make_picture(), subject_query="cat")),
    ):
        with pytest.raises(ValueError, match="`text_encoder` is None, but a query needs it"):
            refused()
    pipe.load_ssr(pipe.ssr_encoder, image_encoder=pipe.ssr_image_encoder)
    pipe.drop_ssr_encoders()
    assert np.array_equal(pipe(**call_args(**text, subject=subject)).images, expected)


def test_image_encoder_folder_none_loads_no_image_encoder(tmp_path, pipe):
    """Encoded subjects still work, as with `load_ip_adapter`."""
    pipe.ssr_encoder.save_pretrained(tmp_path / "ssr_encoder")
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = pipe(**call_args(subject=subject)).images
    for source in (str(tmp_path), pipe.ssr_encoder):
        pipe.load_ssr(source, image_encoder_folder=None)
        assert pipe.ssr_image_encoder is None
        assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)
        with pytest.raises(ValueError, match="not loaded, or were dropped"):
            pipe.encode_subject(make_picture(), "cat")


@pytest.mark.parametrize("way", ["class", "custom code", "load_ssr", "pickle", "deepcopy", "saved again"])
def test_pipeline_without_its_encoders_can_be_saved_and_loaded(tmp_path, pipe, way):
    """The loaded pipeline draws encoded subjects, and refuses those of another encoder."""
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = pipe(**call_args(subject=subject)).images
    pipe.drop_ssr_encoders()
    pipe.save_pretrained(tmp_path / "saved")
    if way == "load_ssr":
        again = make_pipe_without_ssr()
        again.load_ssr(tmp_path / "saved", image_encoder_folder=None)
    elif way == "custom code":
        again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    else:
        again = StableDiffusionSSRPipeline.from_pretrained(tmp_path / "saved")
    if way == "saved again":
        again.save_pretrained(tmp_path / "again")
        again = StableDiffusionSSRPipeline.from_pretrained(tmp_path / "again")
    elif way in ("pickle", "deepcopy"):
        again = pickle.loads(pickle.dumps(again)) if way == "pickle" else copy.deepcopy(again)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**call_args(subject=subject)).images, expected)
    with pytest.raises(ValueError, match="not loaded, or were dropped"):
        again.encode_subject(make_picture(), "cat")
    pipe.load_ssr(make_ssr_encoder(seed=9), image_encoder=make_image_encoder())
    with pytest.raises(ValueError, match="`subject` was encoded by another SSR-Encoder"):
        again(**call_args(subject=pipe.encode_subject(make_picture(), "cat")))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_load_ssr_with_a_dtype(tmp_path, pipe, name):
    for part in ("ssr_encoder", "ssr_image_encoder"):
        getattr(pipe, part).save_pretrained(tmp_path / part)
    pipe.load_ssr(tmp_path, **{name: torch.float16})
    assert pipe.ssr_encoder.dtype == pipe.ssr_image_encoder.dtype == torch.float16
    assert np.isfinite(pipe(**subject_args()).images).all()
    pipe.load_ssr(tmp_path)
    assert pipe.ssr_encoder.dtype == torch.float32


WRONG_LOADS = {
    "a UNet": (lambda pipe: {"image_encoder_folder": None}, lambda pipe: pipe.unet, "name_or_path`.*UNet2DCondition"),
    "a pipeline": (lambda pipe: {}, lambda pipe: pipe, "`pretrained_model_name_or_path`.*StableDiffusionSSRPipeline"),
    "None": (lambda pipe: {}, lambda pipe: None, "`pretrained_model_name_or_path`.*NoneType"),
    "a number": (lambda pipe: {}, lambda pipe: 5, "`pretrained_model_name_or_path`.*int"),
    "UNet as vision encoder": (lambda pipe: {"image_encoder": pipe.unet}, lambda pipe: "x", "`image_encoder`.*UNet2D"),
    "name of a vision encoder": (
        lambda pipe: {"image_encoder": "openai/clip"},
        lambda pipe: "x",
        "`image_encoder`.*str",
    ),
    "unknown argument": (
        lambda pipe: {"foo": 1},
        lambda pipe: "x",
        "`foo` is not an argument of `load_ssr`.*revision",
    ),
    "misspelled argument": (
        lambda pipe: {"varient": "fp16"},
        lambda pipe: pipe.ssr_encoder,
        "`varient` is not an arg",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LOADS)
def test_wrong_arguments_of_load_ssr_are_named(pipe, wrong):
    arguments, source, message = WRONG_LOADS[wrong]
    parts = pipe.ssr_encoder, pipe.ssr_image_encoder
    with pytest.raises(ValueError, match=message):
        pipe.load_ssr(source(pipe), **arguments(pipe))
    assert (pipe.ssr_encoder, pipe.ssr_image_encoder) == parts


def test_load_ssr_accepts_an_encoder_of_custom_code(pipe, tmp_path):
    """Loading a saved pipeline imports a copy of the class."""
    expected = pipe(**subject_args()).images
    pipe.save_pretrained(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipe.load_ssr(theirs.ssr_encoder, image_encoder=theirs.ssr_image_encoder)
    assert np.array_equal(pipe(**subject_args()).images, expected)


def save_ssr(pipe, folder):
    for name in ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor"):
        getattr(pipe, name).save_pretrained(folder / name)


def test_a_given_image_processor_is_used(tmp_path, pipe):
    save_ssr(pipe, tmp_path)
    given = make_image_processor()
    pipe.load_ssr(tmp_path, image_processor=given)
    assert pipe.ssr_image_processor is given
    given.image_mean = [0.1, 0.2, 0.3]
    given.save_pretrained(tmp_path / "ssr_image_processor")
    pipe.load_ssr(tmp_path)
    assert list(pipe.ssr_image_processor.image_mean) == given.image_mean and pipe.ssr_image_processor is not given
    pipe.load_ssr(tmp_path, image_processor_folder=None)
    assert list(pipe.ssr_image_processor.image_mean) != given.image_mean
    # without the processor's folder, it is created from the config of the vision encoder
    shutil.rmtree(tmp_path / "ssr_image_processor")
    pipe.load_ssr(tmp_path)
    side = pipe.ssr_image_encoder.config.image_size
    assert dict(pipe.ssr_image_processor.crop_size) == {"height": side, "width": side}
    pipe.drop_ssr_encoders()
    assert pipe.ssr_image_encoder is None and pipe.ssr_image_processor is None


def test_an_image_processor_that_does_not_fit_is_rejected(tmp_path, pipe):
    """Also one that is given, and one of a whole pipeline. `load_ssr` changes nothing."""
    parts = pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor
    wrong = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    with pytest.raises(
        ValueError, match="`image_processor` has to have 32, as the vision encoder takes, .* edge of 64"
    ):
        pipe.load_ssr(pipe.ssr_encoder, image_encoder=pipe.ssr_image_encoder, image_processor=wrong)
    with pytest.raises(ValueError, match="`image_processor` has to be a CLIPImageProcessor with `size`"):
        pipe.load_ssr(pipe.ssr_encoder, image_encoder=pipe.ssr_image_encoder, image_processor="ssr_image_processor")
    assert (pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor) == parts
    pipe.load_ssr(pipe.ssr_encoder, image_encoder_folder=None, image_processor=wrong)
    pipe.register_modules(ssr_image_encoder=parts[1], ssr_image_processor=wrong)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: `ssr_image_processor` has to have 32"):
        StableDiffusionSSRPipeline.from_pretrained(tmp_path)


def test_a_whole_pipeline_with_a_vision_encoder_that_is_not_finite_is_rejected(tmp_path, pipe):
    next(pipe.ssr_image_encoder.parameters()).data.fill_(torch.nan)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: `ssr_image_encoder` holds weights that are not finite"):
        StableDiffusionSSRPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", ["variant", "shards", "pickle", "projection", "whole CLIP", "variant in shards"])
def test_load_ssr_reads_all_forms_of_weights(tmp_path, pipe, form):
    """A vision encoder can also be a part of a larger model."""
    expected = pipe(**subject_args()).images
    small = {"max_shard_size": "4KB"} if "shards" in form else {}
    variant = {"variant": "fp16"} if "variant" in form else {}
    if form == "pickle":
        small = {"safe_serialization": False}
    pipe.ssr_encoder.save_pretrained(tmp_path / "ssr_encoder", **small, **variant)
    vision, config = pipe.ssr_image_encoder, pipe.ssr_image_encoder.config
    if form == "projection":
        vision = CLIPVisionModelWithProjection(config)
    elif form == "whole CLIP":
        vision = CLIPModel(CLIPConfig(text_config=pipe.text_encoder.config.to_dict(), vision_config=config.to_dict()))
    if vision is not pipe.ssr_image_encoder:
        inner = getattr(pipe.ssr_image_encoder, "vision_model", pipe.ssr_image_encoder)
        getattr(vision, "vision_model", vision).load_state_dict(inner.state_dict())
    vision.save_pretrained(tmp_path / "ssr_image_encoder", **(small if form != "pickle" else {}), **variant)
    assert len(list((tmp_path / "ssr_encoder").iterdir())) > 5 or "shards" not in form
    pipe.unload_ssr()
    pipe.load_ssr(tmp_path, **variant)
    # older versions of transformers compute the attention of a part of CLIP in another way
    np.testing.assert_allclose(pipe(**subject_args()).images, expected, atol=1e-4)


@pytest.mark.parametrize("fault", ["missing", "dtype", "shape", "broken"])
def test_shards_of_an_encoder_are_checked(tmp_path, fault):
    make_ssr_encoder().save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*-of-*.safetensors"))[-1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].long() if fault == "dtype" else tensors[name][:-1].clone()
    save_file(tensors, shard, {"format": "pt"})
    if fault == "broken":
        shard.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=f"{tmp_path} .*{shard.name if fault == 'broken' else name}"):
        SSREncoder.from_pretrained(tmp_path)


def test_load_ssr_into_a_pipeline_that_only_encodes(tmp_path, pipe):
    save_ssr(pipe, tmp_path)
    parts = {name: part for name, part in make_components().items() if name not in ("unet", "vae")}
    only_encodes = make_pipe_that_only_encodes(**parts)
    only_encodes.load_ssr(tmp_path)
    assert only_encodes.ssr_encoder.dtype == torch.float32
    subject = only_encodes.encode_subject(make_picture(), "cat")
    assert torch.equal(subject.subjects[0].embeds, pipe.encode_subject(make_picture(), "cat").subjects[0].embeds)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_from_pipe_keeps_one_precision_and_treats_several_like_the_stock_method(dtypes):
    found = []
    for pipeline_class in (StableDiffusionSSRPipeline, StableDiffusionPipeline):
        pipe = StableDiffusionPipeline(**make_components(), requires_safety_checker=False).to(dtypes[0])
        pipe.vae.to(dtypes[1])
        other = pipeline_class.from_pipe(pipe)
        found.append([getattr(other, name).dtype for name in ("unet", "vae", "text_encoder")])
    ours, stock = found
    assert ours == ([dtypes[0]] * 3 if dtypes[0] == dtypes[1] else stock)


def test_the_scale_of_a_new_pipeline_is_0_65(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = pipe(**call_args(subject=subject.scaled(0.65))).images
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)


def test_load_ssr_from_a_training_checkpoint(tmp_path, pipe):
    """A training checkpoint has no vision encoder. It is loaded from the parent folder, or the error names the missing
    folder."""
    pipe.ssr_encoder.save_pretrained(tmp_path / "out" / "checkpoint-4" / "ssr_encoder")
    checkpoint = tmp_path / "out" / "checkpoint-4"
    fresh = make_pipe_without_ssr()
    with pytest.raises(ValueError, match="`image_encoder_folder`.*holds no folder 'ssr_image_encoder'"):
        fresh.load_ssr(checkpoint)
    assert fresh.ssr_encoder is None
    fresh.load_ssr(checkpoint, image_encoder=pipe.ssr_image_encoder)
    expected = fresh(**subject_args()).images
    pipe.ssr_image_encoder.save_pretrained(tmp_path / "out" / "ssr_image_encoder")
    fresh.load_ssr(checkpoint)
    assert np.array_equal(fresh(**subject_args()).images, expected)


# Other processes, other classes


def test_pipeline_can_be_pickled_after_encoding(pipe):
    expected = pipe(**subject_args()).images
    again = pickle.loads(pickle.dumps(pipe))
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**subject_args()).images, expected)
    assert np.array_equal(pipe(**subject_args()).images, expected)


class OwnPipeline(StableDiffusionPipeline):
    """A user's stock pipeline."""


class OwnSSRPipeline(StableDiffusionSSRPipeline):
    """A user's subclass of a class of the package."""


class OwnSSRInpaintPipeline(ssr_pipeline_class(diffusers.StableDiffusionInpaintPipeline)):
    """A user's subclass of a class that `ssr_pipeline_class` made."""


PICKLED = [
    StableDiffusionSSRPipeline,
    ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline),
    ssr_pipeline_class(diffusers.StableDiffusionInpaintPipeline),
    ssr_pipeline_class(OwnPipeline),
    OwnSSRPipeline,
    OwnSSRInpaintPipeline,
]


@pytest.mark.parametrize("made", PICKLED, ids=lambda made: made.__name__)
def test_pipelines_of_every_class_can_be_pickled_and_copied(pipe, made):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(made, protocol)) is made
    assert copy.deepcopy(made) is made
    other = made.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    pictures = dict.fromkeys(("image", "mask_image"), control_picture())
    taken = inspect.signature(made.__call__).parameters
    arguments = {name: value for name, value in {**pictures, "height": 16, "width": 16}.items() if name in taken}
    expected = other(**subject_args(**arguments)).images
    for again in (pickle.loads(pickle.dumps(other)), copy.deepcopy(other)):
        again.set_progress_bar_config(disable=True)
        assert type(again) is made
        assert np.array_equal(again(**subject_args(**arguments)).images, expected)


def test_pickled_pipelines_can_be_loaded_in_a_new_process(pipe, tmp_path):
    (tmp_path / "pipes").write_bytes(pickle.dumps([made.from_pipe(pipe) for made in PICKLED[:3]]))
    code = (
        f"import pickle\npipes = pickle.load(open({str(tmp_path / 'pipes')!r}, 'rb'))\n"
        "for pipe in pipes: print(type(pipe).__name__, pickle.loads(pickle.dumps(type(pipe))) is type(pipe))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{made.__name__} True" for made in PICKLED[:3]], done.stderr[-2000:]


def test_pipelines_of_custom_code_can_be_pickled(pipe, tmp_path):
    """Loading a saved pipeline imports a copy of the code. A pickle contains the names of its modules."""
    pipe.save_pretrained(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    make = sys.modules[type(theirs).__module__].ssr_pipeline_class
    assert make is not ssr_pipeline_class
    for made in (type(theirs), make(diffusers.StableDiffusionImg2ImgPipeline)):
        assert pickle.loads(pickle.dumps(made)) is made
        assert type(pickle.loads(pickle.dumps(made.from_pipe(theirs)))) is made


@pytest.mark.parametrize("parent", PICKLED, ids=lambda made: made.__name__)
def test_a_subclass_has_the_arguments_and_components_of_its_parent(parent):
    own = type("Own", (parent,), {})
    for name in ("__init__", "__call__"):
        assert inspect.signature(getattr(own, name)) == inspect.signature(getattr(parent, name))
    assert own._optional_components == parent._optional_components
    assert own.model_cpu_offload_seq == parent.model_cpu_offload_seq
    assert own.model_cpu_offload_seq.count("ssr_encoder") == 1


def test_auto_pipelines_return_ssr_pipelines(pipe):
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    found = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(found) is ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline)
    found.set_progress_bar_config(disable=True)
    drawn = [found(**call_args(image=control_picture(), **extra)).images for extra in ({"subject": subject}, {})]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4
    assert type(AutoPipelineForText2Image.from_pipe(found)) is StableDiffusionSSRPipeline
    inpaint = AutoPipelineForInpainting.from_pipe(pipe)
    assert type(inpaint) is ssr_pipeline_class(diffusers.StableDiffusionInpaintPipeline)
    control = AutoPipelineForText2Image.from_pipe(pipe, controlnet=make_controlnet())
    assert type(control) is StableDiffusionSSRControlNetPipeline
    # the result for stock pipelines does not change
    stock = AutoPipelineForImage2Image.from_pipe(StableDiffusionPipeline.from_pipe(pipe))
    assert type(stock) is diffusers.StableDiffusionImg2ImgPipeline


AUTO_CLASSES = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
SWITCHES = [
    {**pag, **control} for pag in ({}, {"enable_pag": True}, {"enable_pag": False})
    for control in ({}, {"controlnet": make_controlnet()}, {"controlnet": None})
]  # fmt: skip


def auto_class(auto, pipe, switches: dict) -> type | None:
    """Returns the class that an auto class converts a pipeline to, or `None` if it cannot convert it."""
    try:
        return type(auto.from_pipe(pipe, **switches))
    except ValueError:
        return None


@pytest.mark.parametrize("stock_class", internals_ssr.auto_pipeline_classes(), ids=lambda each: each.__name__)
@pytest.mark.parametrize("auto", AUTO_CLASSES, ids=lambda each: each.__name__)
def test_auto_pipelines_convert_like_those_of_stock_pipelines(components, stock_class, auto):
    """With every combination of `enable_pag` and `controlnet`, from the SSR version of every class."""
    parts = {**components, "requires_safety_checker": False, "controlnet": make_controlnet()}
    taken = inspect.signature(stock_class.__init__).parameters
    parts = {name: part for name, part in parts.items() if name in taken}
    stock = stock_class(**parts)
    sources = [ssr_pipeline_class(stock_class)]
    sources += [each for each in (StableDiffusionSSRPipeline, StableDiffusionSSRControlNetPipeline)
                if mixin_ssr._stock_class_of(each) is stock_class]  # fmt: skip
    encoder = make_ssr_encoder()
    for switches in SWITCHES:
        expected = auto_class(auto, stock, switches)
        for source in sources:
            made = auto_class(auto, source(**parts, ssr_encoder=encoder), switches)
            assert (made and mixin_ssr._stock_class_of(made)) is expected, (source, switches)


def test_auto_pipelines_with_pag_draw_subjects(pipe):
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    pag = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True)
    assert type(pag) is ssr_pipeline_class(diffusers.StableDiffusionPAGPipeline)
    pag.set_progress_bar_config(disable=True)
    drawn = [pag(**call_args(pag_scale=2.0, **extra)).images for extra in ({"subject": subject}, {})]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4
    assert type(AutoPipelineForText2Image.from_pipe(pag, enable_pag=False)) is StableDiffusionSSRPipeline


@pytest.mark.parametrize(
    "pipeline_class", [StableDiffusionSSRPipeline, StableDiffusionSSRControlNetPipeline, AnimateDiffSSRPipeline]
)
def test_component_annotations_are_compatible_with_old_diffusers_versions(pipeline_class):
    """diffusers 0.36 supports `Optional[X]` but not `X | None`, and cannot load a pipeline with such a component."""
    parameters = inspect.signature(pipeline_class.__init__).parameters
    for name in ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor"):
        assert get_origin(parameters[name].annotation) is Union, name


def test_complete_pipeline_can_be_loaded_as_another_class(pipe, tmp_path):
    """`from_pretrained` returns the class that it is called on, with its components, without remote code."""
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.save_pretrained(tmp_path)
    controlnet = make_controlnet()
    control = StableDiffusionSSRControlNetPipeline.from_pretrained(tmp_path, controlnet=controlnet)
    control.set_progress_bar_config(disable=True)
    assert type(control) is StableDiffusionSSRControlNetPipeline and control.controlnet is controlnet
    edges = [control(**call_args(image=make_picture(seed, (16, 16)), subject=subject)).images for seed in (1, 2)]
    assert np.abs(edges[0] - edges[1]).max() > 1e-4
    again = StableDiffusionSSRPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**call_args(subject=subject)).images, pipe(**call_args(subject=subject)).images)
    made = ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline)
    assert type(made.from_pretrained(tmp_path)) is made
    made.from_pretrained(tmp_path).save_pretrained(tmp_path / "made")
    assert type(StableDiffusionSSRPipeline.from_pretrained(tmp_path / "made")) is StableDiffusionSSRPipeline
    trusted = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(trusted).__name__ == "StableDiffusionSSRPipeline" and type(trusted) is not StableDiffusionSSRPipeline


def test_stock_pipeline_can_be_loaded_as_an_ssr_pipeline(components, tmp_path):
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(tmp_path)
    pipe = StableDiffusionSSRPipeline.from_pretrained(tmp_path)
    assert pipe.ssr_encoder is None
    pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    assert pipe.ssr_image_processor is not None


# Defaults of torch


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_default_device_and_dtype_of_torch_do_not_affect_subjects(pipe, default):
    """Checks pictures, masks, the fingerprint, regions, and keys and values. The text is encoded by the stock
    pipeline."""
    from diffusers_ssr.checks_ssr import check_references
    from diffusers_ssr.images_ssr import preprocess, preprocess_mask
    from diffusers_ssr.request_ssr import SubjectRequest, SubjectRow

    subject = pipe.encode_subject(make_picture(), "cat")
    left = np.zeros((32, 40))
    left[:, :20] = 1

    def everything():
        ((_, picture, _, mask),) = check_references(make_picture(), "cat", left)
        row = SubjectRow((subject.inside(left) + subject.compact(9),))
        request = SubjectRequest([row], 1, pipe.ssr_encoder, torch.float32, 0.5, lambda: [(False, True)])
        conditions = request.conditions(torch.zeros(2, 4, 8, 8, device="cpu", dtype=torch.float32))
        layer = conditions.for_layer(next(iter(conditions.pairs)), 2, (8, 8))
        pixels = preprocess(picture, pipe.ssr_image_processor), preprocess_mask(mask, pipe.ssr_image_processor)
        return *pixels, pipe.ssr_encoder.fingerprint(torch.device("cpu")), *layer

    expected = everything()
    if default == "device":
        with torch.device("meta"):
            seen = everything()
    else:
        torch.set_default_dtype(torch.float64)
        try:
            seen = everything()
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(seen, expected, strict=True):
        assert one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def test_entry_files_import_every_module():
    """diffusers only copies the relative imports of the entry file, not the relative imports of these files. When it
    loads from the Hub, it requests each relative import of each file again, so only the entry files may have relative
    imports."""
    from diffusers.utils.dynamic_modules_utils import get_relative_imports

    entries = {"pipeline_ssr", "pipeline_ssr_animatediff", "pipeline_ssr_controlnet"}
    modules = {file.stem for file in ROOT.glob("*.py")} - entries - {"__init__", "setup", "pipeline", "conftest"}
    for entry in entries:
        assert set(get_relative_imports(ROOT / f"{entry}.py")) == modules
    assert set(get_relative_imports(ROOT / "pipeline.py")) == modules | {"pipeline_ssr"}
    for module in modules:
        assert not get_relative_imports(ROOT / f"{module}.py"), module


def test_only_internals_ssr_imports_private_names_of_libraries():
    import ast

    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and file.stem != "internals_ssr":
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                private = [part for part in parts if part.startswith("_") and part != "__future__"]
                assert not private, f"{file.name} imports {private}"


def test_import_works_without_optional_packages():
    code = (
        "import sys\n"
        "for name in ('peft', 'accelerate', 'datasets', 'gradio', 'tqdm.notebook'): sys.modules[name] = None\n"
        "import diffusers_ssr\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_lora_scale_applies_to_the_query(pipe):
    """A LoRA of the text encoder with a scale of 0 has no effect on the query and the prompt."""
    from peft import LoraConfig, inject_adapter_in_model

    expected = pipe(**subject_args()).images
    torch.manual_seed(0)
    inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), pipe.text_encoder
    )
    with_lora = pipe(**subject_args()).images
    assert np.abs(with_lora - expected).max() > 1e-4
    scaled = pipe(**subject_args(cross_attention_kwargs={"scale": 0.0})).images
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name,meant",
    [
        ("subject_scal", "subject_scale"),
        ("subject_embeds", "subject"),
        ("subjects", "subject"),
        ("subject_begin", "subject_end"),
        ("mask_wieght", "mask_weight"),
        ("image", "subject_image"),
        ("images", "subject_image"),
        ("reference", "subject_image"),
        ("reference_images", "subject_image"),
        ("query", "subject_query"),
        ("queries", "subject_query"),
        ("querry", "subject_query"),
        ("mask", "subject_mask"),
        ("masks", "subject_mask"),
        ("scale", "subject_scale"),
        ("ssr_scale", "subject_scale"),
        ("start", "subject_start"),
        ("end", "subject_end"),
        ("resize_mode", "subject_resize_mode"),
        ("lora_scale", "cross_attention_kwargs="),
    ],
)
@pytest.mark.parametrize("with_subject", [False, True])
def test_misspelled_arguments_raise_an_error_with_a_suggestion(pipe, name, meant, with_subject):
    extra = {"subject": pipe.encode_subject(make_picture(), "cat")} if with_subject else {}
    with pytest.raises(ValueError, match=f"`{name}` is not an argument of this pipeline; did you mean `{meant}"):
        pipe(**call_args(**extra, **{name: 0.5}))


STOCK = [
    StableDiffusionPipeline, StableDiffusionControlNetPipeline, AnimateDiffPipeline, StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline, AnimateDiffVideoToVideoPipeline,
]  # fmt: skip


@pytest.mark.parametrize("stock", STOCK, ids=lambda stock: stock.__name__)
def test_arguments_of_stock_pipelines_are_not_misspelled(stock):
    """Includes the deprecated arguments, and the arguments of other classes, which a stock call ignores. Only `image`
    is an error in a call that takes none."""
    from diffusers_ssr.checks_ssr import check_unknown_arguments
    from diffusers_ssr.mixin_ssr import _OWN_ARGUMENTS

    parameters = inspect.signature(stock.__call__).parameters
    given = {name: 1 for other in STOCK for name in inspect.signature(other.__call__).parameters}
    given |= {"callback": 1, "callback_steps": 1, "image": None, "subject_scal": None}
    if "image" in parameters:
        given["image"] = 1
    check_unknown_arguments(given, parameters, _OWN_ARGUMENTS)


@pytest.mark.parametrize("with_subject", [False, True])
def test_a_call_that_passes_its_arguments_on_accepts_the_names_of_that_call(pipe, with_subject):
    class Mine(StableDiffusionImg2ImgPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__(prompt, **kwargs)

    extra = {"subject": pipe.encode_subject(make_picture(), "cat")} if with_subject else {}
    arguments = call_args(image=make_picture(size=(16, 16)), num_inference_steps=4, **extra)
    images = ssr_pipeline_class(Mine).from_pipe(pipe)(**arguments).images
    assert images.shape == (1, 16, 16, 3)
    for name in ("subject_scal", "subject_images"):
        with pytest.raises(ValueError, match=f"`{name}` is not an argument"):
            ssr_pipeline_class(Mine).from_pipe(pipe)(**arguments, **{name: 1})


# Saving


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("number", [1, 4, 8, 11])
def test_full_disk_keeps_the_saved_pipeline(pipe, tmp_path, monkeypatch, number):
    """The disk is full at different files. The pipeline that was saved before can still be loaded."""
    import errno
    import shutil
    from pathlib import Path

    folder, writes = tmp_path / "saved", []
    pipe.save_pretrained(folder)
    before, expected = contents(folder), pipe(**subject_args()).images

    def failing(write):
        def wrapper(*args, **kwargs):
            writes.append(args)
            if len(writes) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return wrapper

    changed = StableDiffusionSSRPipeline(**pipe.components, requires_safety_checker=False)
    changed.unet = make_unet(seed=7)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", failing(shutil.copyfile))
        patch.setattr(Path, "write_text", failing(Path.write_text))
        for part in (changed.unet, changed.vae, changed.text_encoder, changed.ssr_encoder):
            patch.setattr(part, "save_pretrained", failing(part.save_pretrained))
        with pytest.raises(OSError, match="No space left"):
            changed.save_pretrained(folder)
    assert contents(folder) == before
    again = StableDiffusionSSRPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**subject_args()).images, expected)
    changed.save_pretrained(folder)
    assert contents(folder).keys() == before.keys() and contents(folder) != before


CLASSES_WITHOUT_CODE = """
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers_ssr import SSREncoder, SSRPipelineMixin, StableDiffusionSSRPipeline, ssr_pipeline_class

class Mixed(SSRPipelineMixin, StableDiffusionPipeline): ...
class Derived(StableDiffusionSSRPipeline): ...
class OfMade(ssr_pipeline_class(StableDiffusionImg2ImgPipeline)): ...
class Stock(StableDiffusionPipeline): ...
class Whole(DiffusionPipeline):
    def __init__(self, unet, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer)

    def __call__(self, prompt=None, cross_attention_kwargs=None): ...
class Encoder(SSREncoder): ...

Made = ssr_pipeline_class(Stock)
OfWhole = ssr_pipeline_class(Whole)
def nested():
    class Nested(StableDiffusionSSRPipeline): ...
    return Nested
Nested = nested()
"""
SAVED_AS = {
    "Mixed": "SSRStableDiffusionPipeline",
    "Made": "SSRStableDiffusionPipeline",
    "Derived": "StableDiffusionSSRPipeline",
    "Nested": "StableDiffusionSSRPipeline",
    "OfMade": "SSRStableDiffusionImg2ImgPipeline",
}


def class_without_code(name: str, module: str = "__main__") -> type:
    """Returns a class as it is defined in a notebook or script (`__main__`), or in a module without a file."""
    namespace = {"__name__": module}
    exec(compile(CLASSES_WITHOUT_CODE, "<stdin>", "exec"), namespace)
    return namespace[name]


@pytest.mark.parametrize(
    "name,module",
    [*((name, module) for name in SAVED_AS for module in ("__main__", "no_file")), ("Nested", "test_loading_ssr")],
)
def test_a_class_without_code_is_saved_as_its_nearest_parent(pipe, tmp_path, caplog, name, module):
    """No file of the program is copied, and the saved pipeline draws the same picture."""
    own = class_without_code(name, module).from_pipe(pipe)
    own.set_progress_bar_config(disable=True)
    own.save_pretrained(tmp_path)
    assert f"it is saved as {SAVED_AS[name]}" in caplog.text
    assert {file.name for file in tmp_path.glob("*.py")} <= {
        *(file.name for file in ROOT.glob("*.py")), f"pipeline_{SAVED_AS[name].lower()}.py",
    }  # fmt: skip
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == SAVED_AS[name]
    extra = {"image": control_picture()} if name == "OfMade" else {}
    assert np.array_equal(again(**subject_args(**extra)).images, own(**subject_args(**extra)).images)
    assert type(type(own).from_pretrained(tmp_path)) is type(own)


def test_a_class_without_code_or_a_stock_parent_raises_an_error_before_it_is_saved(pipe, tmp_path):
    own = class_without_code("OfWhole")(pipe.unet, pipe.text_encoder, pipe.tokenizer, ssr_encoder=pipe.ssr_encoder)
    with pytest.raises(ValueError, match="SSRWhole cannot be saved.*move it to a module"):
        own.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_encoder_without_code_is_saved_as_an_ssr_encoder(pipe, tmp_path):
    expected = pipe(**subject_args()).images
    encoder = class_without_code("Encoder").from_config(pipe.ssr_encoder.config)
    encoder.load_state_dict(pipe.ssr_encoder.state_dict())
    pipe.load_ssr(encoder, image_encoder=pipe.ssr_image_encoder)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**subject_args()).images, expected)


@pytest.mark.parametrize("way", ["attribute", "load_ssr", "in place"])
def test_a_pipeline_with_a_compiled_encoder_can_be_saved_and_loaded(pipe, tmp_path, way):
    """With an argument of `load_ssr`, a component that is set, or `encoder.compile()`."""
    expected = pipe(**subject_args()).images
    if way == "in place":
        pipe.ssr_encoder.compile(backend="eager")
    elif way == "attribute":
        pipe.ssr_encoder = torch.compile(pipe.ssr_encoder, backend="eager")
    else:
        pipe.load_ssr(torch.compile(pipe.ssr_encoder, backend="eager"), image_encoder=pipe.ssr_image_encoder)
    assert np.allclose(pipe(**subject_args()).images, expected, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "ssr_encoder" / "modeling_ssr.py").exists()
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(**subject_args()).images, expected)


def test_a_shallow_copy_shares_all_components(pipe):
    expected = pipe(**subject_args()).images
    copied = copy.copy(pipe)
    assert all(getattr(copied, name) is each for name, each in pipe.components.items())
    copied.set_ssr_scale(0.1)
    assert np.array_equal(pipe(**subject_args()).images, expected)
    assert np.array_equal(copied(**subject_args()).images, expected)


# Versions


OLD = [("torch", "2.3.1+cu121"), ("diffusers", "0.30.3"), ("transformers", "4.43.0"), ("pillow", "10.0.1")]


@pytest.mark.parametrize("package,version", OLD)
def test_old_versions_raise_an_error(package, version, monkeypatch):
    monkeypatch.setattr(sys.modules[{"pillow": "PIL"}.get(package, package)], "__version__", version)
    oldest = versions_ssr.OLDEST[package]
    with pytest.raises(ImportError) as refused:
        versions_ssr.check_versions()
    assert str(refused.value) == f"diffusers-ssr needs {package} {oldest} or newer, but {version} is installed."


def test_an_old_python_raises_an_error(monkeypatch):
    monkeypatch.setattr(versions_ssr.sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(ImportError, match=r"needs python 3.10 or newer, but 3.9.18 is installed"):
        versions_ssr.check_versions()


def test_the_oldest_versions_are_those_of_the_package():
    described = (ROOT / "pyproject.toml").read_text()
    for package, oldest in versions_ssr.OLDEST.items():
        assert f'requires-python = ">={oldest}"' in described or f'"{package}>={oldest}"' in described


def test_versions_are_checked_at_import():
    code = "import diffusers\ndiffusers.__version__ = '0.30.3'\nimport diffusers_ssr\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: diffusers-ssr needs diffusers 0.31 or newer, but 0.30.3 is installed."
    )


@pytest.mark.parametrize("package,version", OLD)
@pytest.mark.parametrize("entry", ["package", "pipeline", "pipeline_ssr", "pipeline_ssr_controlnet"])
def test_versions_are_checked_before_the_libraries_are_imported(tmp_path, package, version, entry):
    """An old library beside newer ones raises an error of its own when its modules are imported."""
    name = {"pillow": "PIL"}.get(package, package)
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('FLAX_WEIGHTS_NAME is missing')")
    information = tmp_path / f"{package}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if entry == "package":
        code = "import diffusers_ssr"
    else:  # as `custom_pipeline=` imports it: without the file of the package
        (tmp_path / "copied").mkdir()
        for file in ROOT.glob("*.py"):
            if file.stem != "__init__":
                shutil.copy(file, tmp_path / "copied")
        code = f"import copied.{entry}"
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: diffusers-ssr needs {package} {versions_ssr.OLDEST[package]} or newer, but {version} is installed."
    )


@pytest.mark.parametrize("version", ["2.4", "2.10.0", "3.0.0.dev0", "2.15.0a0+git"])
def test_versions_are_compared_as_numbers(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    versions_ssr.check_versions()


@pytest.mark.parametrize("given", [{"dtype": torch.float16}, {"torch_dtype": torch.float16}, {"dtype": None}, {}])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize("known", ["dtype", "torch_dtype"])
def test_dtype_argument_has_the_name_that_the_library_expects(given, library, known, monkeypatch):
    monkeypatch.setattr(internals_ssr, f"_{library.upper()}_DTYPE", known)
    dtype = torch.float16 if any(given.values()) else torch.float32
    assert internals_ssr.precision_arguments({**given, "variant": "x"}, library, torch.float32) == {
        "variant": "x",
        known: dtype,
    }
    assert internals_ssr.precision_arguments({}, library) == {}


def test_no_deprecation_warnings(pipe, tmp_path):
    """Checks Python warnings and the log, because transformers logs deprecations."""
    import logging
    import warnings

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "torch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe.save_pretrained(tmp_path / "whole")
            loaded = StableDiffusionSSRPipeline.from_pretrained(tmp_path / "whole", dtype=torch.float32)
            loaded.load_ssr(tmp_path / "whole")
            other = ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline).from_pipe(loaded, dtype=torch.float32)
            other.set_progress_bar_config(disable=True)
            other(**subject_args(image=control_picture(), subject_end=0.5))
            control = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet())
            control(**subject_args(image=make_picture(1, (16, 16)), subject_in_controlnet=True))
            subject = pipe.encode_subject(make_picture(), "cat")
            subject.save(tmp_path / "cat.safetensors")
            pipe.subject_attention_map(make_picture(), "cat").overlay()
            pipe.drop_ssr_encoders()
            pipe.unload_ssr()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    deprecations = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
    assert [str(each.message) for each in caught if issubclass(each.category, deprecations)] == []
    # diffusers before 0.40 uses deprecated names of transformers
    if internals_ssr._DIFFUSERS_DTYPE == "dtype":
        assert [text for text in said if "deprecat" in text] == []
