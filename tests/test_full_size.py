"""Tests of pipelines and training at the full size of Stable Diffusion 1.5, with random weights."""

import json
import os

import numpy as np
import pytest
import torch
import train_ssr
from conftest import make_picture
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline, StableDiffusionSSRPipeline
from random_models import motion_adapter, random_model, sd15_pipeline
from transformers import CLIPImageProcessor


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


@pytest.mark.skipif(
    "RUN_SLOW" not in os.environ,
    reason="needs RUN_SLOW=1, minutes and 5 GB of disk space; test_train_ssr.py trains small models in the same way",
)
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
