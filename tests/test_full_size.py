"""Chains at Stable Diffusion 1.5's full size, with random weights: small pictures, two steps, and nothing left changed."""

import numpy as np
import torch
from benchmark import motion_adapter, random_model, sd15_pipeline
from conftest import make_picture
from diffusers import ControlNetModel
from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline


def state(pipe) -> dict:
    """What a call must leave as it was: every weight, every processor, hook and setting."""
    found = {}
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        tensors = component.state_dict(keep_vars=True)
        # a sample of each tensor's numbers, and how often PyTorch saw it changed
        found[name] = {k: (t._version, t.dtype, t.detach().flatten()[::997].sum().item()) for k, t in tensors.items()}
        found[f"{name} hooks"] = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in component.modules()]
        found[f"{name} modules"] = [(key, type(module)) for key, module in component.named_modules()]
        if hasattr(component, "attn_processors"):
            found[f"{name} processors"] = {key: id(each) for key, each in component.attn_processors.items()}
    found["unet config"] = dict(pipe.unet.config)
    return found


def test_controlnet_and_animatediff_leave_every_component_as_it_was():
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
