"""Tests of `load_ssr`, `unload_ssr` and `drop_ssr_encoders`. test_offloading.py has them with offloading."""

import shutil

import numpy as np
import pytest
import torch
from conftest import (
    call_args,
    make_components,
    make_image_encoder,
    make_image_processor,
    make_picture,
    make_pipe_that_only_encodes,
    make_pipe_without_ssr,
    make_ssr_encoder,
    quiet,
    save_ssr,
    subject_args,
)
from diffusers import DiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection


# What is loaded


def test_load_ssr_keeps_dtype_and_device_of_an_encoder_in_memory():
    """The dtype may be different from that of the UNet."""
    pipe, encoder, image_encoder = make_pipe_without_ssr(), make_ssr_encoder().half(), make_image_encoder().bfloat16()
    pipe.load_ssr(encoder, image_encoder=image_encoder)
    assert (encoder.dtype, image_encoder.dtype) == (torch.float16, torch.bfloat16)
    assert np.isfinite(pipe(**subject_args()).images).all()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_load_ssr_with_a_dtype(tmp_path, pipe, name):
    save_ssr(pipe, tmp_path)
    pipe.load_ssr(tmp_path, **{name: torch.float16})
    assert pipe.ssr_encoder.dtype == pipe.ssr_image_encoder.dtype == torch.float16
    assert np.isfinite(pipe(**subject_args()).images).all()
    pipe.load_ssr(tmp_path)
    assert pipe.ssr_encoder.dtype == torch.float32


def test_load_ssr_sets_models_to_eval_mode():
    pipe, parts = make_pipe_without_ssr(), (make_ssr_encoder().train(), make_image_encoder().train())
    pipe.load_ssr(parts[0], image_encoder=parts[1])
    assert not any(module.training for part in parts for module in part.modules())


def test_load_ssr_accepts_an_encoder_of_custom_code(pipe, tmp_path):
    """Loading a saved pipeline imports a copy of the class."""
    expected = pipe(**subject_args()).images
    pipe.save_pretrained(tmp_path)
    other = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipe.load_ssr(other.ssr_encoder, image_encoder=other.ssr_image_encoder)
    assert np.array_equal(pipe(**subject_args()).images, expected)


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


def test_load_ssr_from_a_training_checkpoint(tmp_path, pipe):
    """A training checkpoint has no vision encoder. It is loaded from the parent folder, or the error names the missing
    folder."""
    checkpoint = tmp_path / "out" / "checkpoint-4"
    pipe.ssr_encoder.save_pretrained(checkpoint / "ssr_encoder")
    fresh = make_pipe_without_ssr()
    with pytest.raises(ValueError, match="`image_encoder_folder`.*holds no folder 'ssr_image_encoder'"):
        fresh.load_ssr(checkpoint)
    assert fresh.ssr_encoder is None
    fresh.load_ssr(checkpoint, image_encoder=pipe.ssr_image_encoder)
    expected = fresh(**subject_args()).images
    pipe.ssr_image_encoder.save_pretrained(tmp_path / "out" / "ssr_image_encoder")
    fresh.load_ssr(checkpoint)
    assert np.array_equal(fresh(**subject_args()).images, expected)


def test_load_ssr_into_a_pipeline_that_only_encodes(tmp_path, pipe):
    save_ssr(pipe, tmp_path)
    parts = {name: part for name, part in make_components().items() if name not in ("unet", "vae")}
    only_encodes = make_pipe_that_only_encodes(**parts)
    only_encodes.load_ssr(tmp_path)
    assert only_encodes.ssr_encoder.dtype == torch.float32
    subject = only_encodes.encode_subject(make_picture(), "cat")
    assert torch.equal(subject.subjects[0].embeds, pipe.encode_subject(make_picture(), "cat").subjects[0].embeds)


# Image processors


def test_the_image_processor_is_the_argument_or_in_the_folder_or_made(tmp_path, pipe):
    save_ssr(pipe, tmp_path)
    processor = make_image_processor()
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "ssr_image_processor")
    pipe.load_ssr(tmp_path, image_processor=processor)
    assert pipe.ssr_image_processor is processor
    pipe.load_ssr(tmp_path)
    assert list(pipe.ssr_image_processor.image_mean) == processor.image_mean
    assert pipe.ssr_image_processor is not processor
    pipe.load_ssr(tmp_path, image_processor_folder=None)
    assert list(pipe.ssr_image_processor.image_mean) != processor.image_mean
    # without the processor's folder, it is created from the config of the vision encoder
    shutil.rmtree(tmp_path / "ssr_image_processor")
    pipe.load_ssr(tmp_path)
    assert dict(pipe.ssr_image_processor.crop_size) == {"height": 32, "width": 32}


@pytest.mark.parametrize("source", ["argument", "folder"])
def test_an_image_processor_that_does_not_fit_is_rejected(tmp_path, pipe, source):
    parts = pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor
    save_ssr(pipe, tmp_path)
    wrong = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    wrong.save_pretrained(tmp_path / "ssr_image_processor")
    with pytest.raises(ValueError, match="`image_processor` has to have the size of the vision encoder, 32"):
        pipe.load_ssr(tmp_path, image_processor=wrong if source == "argument" else None)
    assert (pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor) == parts


# Wrong arguments


WRONG_LOADS = {
    "a UNet": (lambda pipe: pipe.unet, {"image_encoder_folder": None}, "name_or_path`.*UNet2DCondition"),
    "a pipeline": (lambda pipe: pipe, {}, "`pretrained_model_name_or_path`.*StableDiffusionSSRPipeline"),
    "None": (lambda pipe: None, {}, "`pretrained_model_name_or_path`.*NoneType"),
    "UNet as vision encoder": (lambda pipe: "x", {"image_encoder": torch.nn.Linear(1, 1)}, "`image_encoder`.*Linear"),
    "name of a vision encoder": (lambda pipe: "x", {"image_encoder": "openai/clip"}, "`image_encoder`.*str"),
    "unknown argument": (lambda pipe: pipe.ssr_encoder, {"varient": "fp16"}, "`varient` is not .*revision"),
    "no vision encoder": (lambda pipe: pipe.ssr_encoder, {}, "`image_encoder` has to be given"),
    "no image processor": (
        lambda pipe: pipe.ssr_encoder,
        {"image_encoder": make_image_encoder(), "image_processor": "ssr_image_processor"},
        "`image_processor` has to have the size",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LOADS)
def test_wrong_arguments_of_load_ssr_are_named(pipe, wrong):
    source, arguments, message = WRONG_LOADS[wrong]
    parts = pipe.ssr_encoder, pipe.ssr_image_encoder
    with pytest.raises(ValueError, match=message):
        pipe.load_ssr(source(pipe), **arguments)
    assert (pipe.ssr_encoder, pipe.ssr_image_encoder) == parts


# Without some components


def test_unload_ssr_resets_the_scale(pipe):
    expected = pipe(**subject_args(subject_scale=None)).images
    pipe.set_ssr_scale(0.2)
    parts = pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor
    pipe.unload_ssr()
    pipe.load_ssr(parts[0], image_encoder=parts[1], image_processor=parts[2])
    assert np.array_equal(pipe(**subject_args(subject_scale=None)).images, expected)


def test_the_scale_of_a_new_pipeline_is_0_65(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = pipe(**call_args(subject=subject.scaled(0.65))).images
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)


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
    assert pipe.ssr_image_encoder is None and pipe.ssr_image_processor is None
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


@pytest.mark.parametrize("way", ["class", "custom code", "load_ssr", "saved again"])
def test_a_pipeline_without_its_encoders_can_be_saved_and_loaded(tmp_path, pipe, way):
    """The loaded pipeline generates encoded subjects, and refuses those of another encoder."""
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
    assert np.array_equal(quiet(again)(**call_args(subject=subject)).images, expected)
    with pytest.raises(ValueError, match="not loaded, or were dropped"):
        again.encode_subject(make_picture(), "cat")
    pipe.load_ssr(make_ssr_encoder(seed=9), image_encoder=make_image_encoder())
    with pytest.raises(ValueError, match="`subject` was encoded by another SSR-Encoder"):
        again(**call_args(subject=pipe.encode_subject(make_picture(), "cat")))


def test_lora_scale_applies_to_the_query(pipe):
    """A LoRA of the text encoder with a scale of 0 has no effect on the query and the prompt."""
    from peft import LoraConfig, inject_adapter_in_model

    expected = pipe(**subject_args()).images
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.text_encoder)
    assert np.abs(pipe(**subject_args()).images - expected).max() > 1e-4
    scaled = pipe(**subject_args(cross_attention_kwargs={"scale": 0.0})).images
    np.testing.assert_allclose(scaled, expected, atol=1e-5)
