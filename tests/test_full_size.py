"""Tests of pipelines and training at the full size of Stable Diffusion 1.5, with random weights."""

import json
import os

import numpy as np
import pytest
import torch
import train_ssr
from conftest import call_args, make_components, make_picture
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers_ssr import (
    AnimateDiffSSRPipeline,
    SSREncoder,
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
)
from random_models import motion_adapter, random_model, sd15_pipeline
from test_modeling_ssr import ALIGNER, LAYERS, random_released
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel


def state(pipe) -> dict:
    """Returns everything that a call must not change: weights, attention processors, hooks and the config."""
    found = {}
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        tensors = component.state_dict(keep_vars=True)
        # the version of each tensor, its dtype, and the sum of some of its values
        found[name] = {k: (t._version, t.dtype, t.detach().flatten()[::997].sum().item()) for k, t in tensors.items()}
        found[f"{name} hooks"] = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in component.modules()]
        found[f"{name} modules"] = [(key, type(module)) for key, module in component.named_modules()]
        if hasattr(component, "attn_processors"):
            found[f"{name} processors"] = {key: id(each) for key, each in component.attn_processors.items()}
    found["unet config"] = dict(pipe.unet.config)
    return found


pytestmark = pytest.mark.skipif(
    os.environ.get("RUN_SLOW") != "1",
    reason="needs RUN_SLOW=1 (`make test-slow`): minutes, and 5 GB of disk space; the same runs on small models in"
    " test_chains.py and test_train_ssr.py",
)


def test_controlnet_and_animatediff_do_not_change_any_component():
    pipe = sd15_pipeline()
    pipe.set_progress_bar_config(disable=True)
    cat = pipe.encode_subject(make_picture(), query="cat")
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    video, picture = (1, 2, 64, 64, 3), (1, 64, 64, 3)
    for pipeline_class, name, make, extra, shape in (
        (AnimateDiffSSRPipeline, "motion_adapter", lambda: motion_adapter(pipe.unet), {"num_frames": 2}, video),
        (
            StableDiffusionSSRControlNetPipeline,
            "controlnet",
            lambda: ControlNetModel(cross_attention_dim=768),
            {"image": make_picture(1)},
            picture,
        ),
    ):
        chain = pipeline_class.from_pipe(pipe, **{name: random_model(make)})
        chain.set_progress_bar_config(disable=True)
        before, base = state(chain), state(pipe)
        drawn = [
            chain("a cat", subject=subject, generator=torch.Generator().manual_seed(0), **arguments, **extra)[0]
            for subject in (cat, None)
        ]
        assert drawn[0].shape == shape and np.isfinite(drawn[0]).all()
        assert not np.array_equal(drawn[0], drawn[1])
        assert state(chain) == before and state(pipe) == base


def test_encoder_can_be_loaded_after_three_training_steps(tmp_path):
    pipe = sd15_pipeline()
    pipe.ssr_image_encoder.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    StableDiffusionPipeline.from_pipe(pipe).save_pretrained(tmp_path / "base")
    del pipe
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for index in range(3):
        make_picture(index, (600, 512)).save(pictures / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": "a cat on the beach", "query": "cat"})
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "pretrained_model_name_or_path": tmp_path / "base", "image_encoder_name_or_path": tmp_path / "clip",
        "train_data_dir": pictures, "output_dir": tmp_path / "trained", "train_batch_size": 1, "max_train_steps": 3,
        "learning_rate": 1e-4, "lr_scheduler": "constant", "prompt_dropout": 0, "subject_dropout": 0,
        "report_to": "none",
    }  # fmt: skip
    train_ssr.main([str(part) for name, value in options.items() for part in (f"--{name}", value)])

    pipe = StableDiffusionSSRPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    pipe.load_ssr(tmp_path / "trained")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.ssr_encoder.config.image_levels == [4, 8, 12, 16, 20, 24]
    arguments = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "np"}
    drawn = [
        pipe("a cat", generator=torch.Generator().manual_seed(0), **arguments, **subject).images
        for subject in ({}, {"subject_image": make_picture(), "subject_query": "cat"})
    ]
    assert np.isfinite(drawn[1]).all() and not np.array_equal(*drawn)


def test_released_layout_loads_at_full_size_and_changes_the_image():
    """The UNet of SD 1.5, the width of CLIP ViT-L, random weights in the layout of the released files, and a small
    image."""
    encoder = SSREncoder.from_released(random_released(ALIGNER), random_released(LAYERS, seed=1))
    unet = random_model(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
    vae = make_components()["vae"]
    tokenizer = make_components()["tokenizer"]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=12,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=8,
        image_size=56,
        patch_size=14,
    )
    pipe = StableDiffusionSSRPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(clip_sample=False, steps_offset=1), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ssr(encoder, image_encoder=random_model(lambda: CLIPVisionModel(vision)))
    subject = pipe.encode_subject(make_picture(), "cat")
    assert subject.subjects[0].embeds.shape == (1, 6 * tokenizer.model_max_length, 768)
    arguments = call_args(height=64, width=64, num_inference_steps=1, output_type="latent")
    plain = pipe(**arguments).images
    arguments["generator"].manual_seed(0)
    drawn = pipe(**arguments, subject=subject, subject_scale=1.0).images
    assert torch.isfinite(drawn).all() and (plain - drawn).abs().max() > 1e-3
