"""Tests on a fake GPU in float16, without a real one. Fake tensors have a device, dtype and shape, and operations with
incompatible devices or dtypes raise an error."""

import numpy as np
import pytest
import torch
from conftest import call_args, make_components, make_picture, make_ssr_components
from diffusers import DDIMScheduler, UNetMotionModel
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers_ssr import (
    AnimateDiffSSRPipeline,
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
    images_ssr,
    request_ssr,
    subject_embeds_ssr,
)
from test_chains import make_controlnet, make_motion_adapter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily


LEFT = np.zeros((16, 16), np.float32)
LEFT[:, :8] = 1
MASK = np.zeros((32, 40), np.uint8)
MASK[8:24, 4:20] = 255


def on_gpu(pipeline):
    """Replaces the weights of all models with fake CUDA tensors in float16."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for module in part.modules():
                for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                    if tensor is not None:
                        dtype = torch.float16 if tensor.is_floating_point() else tensor.dtype
                        fake = torch.empty(tensor.shape, dtype=dtype, device="cuda")
                        place = module._parameters if name in module._parameters else module._buffers
                        place[name] = torch.nn.Parameter(fake, False) if place is module._parameters else fake
    return pipeline


def args(**overrides) -> dict:
    """Passes latents, because generators cannot create fake ones, and does not decode, because fake latents have no
    values."""
    batch = len(overrides.get("prompt", [])) if isinstance(overrides.get("prompt"), list) else 1
    shape = (batch, 4, 3, 8, 8) if "num_frames" in overrides else (batch, 4, 8, 8)
    latents = torch.empty(shape, dtype=torch.float16, device="cuda")
    return call_args(**{"generator": None, "latents": latents, "output_type": "latent", **overrides})


def with_values(function):
    """Returns the function outside the fake mode, because it checks values."""

    def called(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return called


@pytest.fixture
def parts() -> dict:
    """Created before the fake mode, because weights have no values in the fake mode."""
    return {"controlnet": make_controlnet(), "motion_adapter": make_motion_adapter()}


@pytest.fixture
def fake_gpu(monkeypatch, parts):
    """A pipeline on a fake GPU. Functions that compare values (fingerprints, regions) are patched, because
    fake tensors have none."""
    pipe = StableDiffusionSSRPipeline(**make_components(), **make_ssr_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(subject_embeds_ssr, "same_fingerprint", lambda first, second: True)
    monkeypatch.setattr(request_ssr, "_check_regions", lambda row, grid: None)
    monkeypatch.setattr(images_ssr, "preprocess_mask", with_values(images_ssr.preprocess_mask))
    # the scheduler uses the value of the timestep as an index
    monkeypatch.setattr(
        DDIMScheduler, "step", lambda self, output, t, sample, **_: DDIMSchedulerOutput(sample + output)
    )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield on_gpu(pipe)


def check(latents):
    assert isinstance(latents, FakeTensor) and latents.device.type == "cuda" and latents.dtype == torch.float16


SUBJECTS = {
    "plain": lambda cat, dog: cat,
    "regions": lambda cat, dog: cat.inside(LEFT) + dog.inside(1 - LEFT),
}


@pytest.mark.parametrize("how", [*SUBJECTS, "window", "blocks", "batch", "mask", "no guidance"])
def test_images(fake_gpu, how):
    cat, dog = fake_gpu.encode_subject(make_picture(), query=["cat", "dog"])
    for each in (cat, dog):
        assert each.subjects[0].embeds.device.type == "cuda"
    subject, extra = SUBJECTS.get(how, SUBJECTS["plain"])(cat, dog), {}
    if how == "window":
        extra = {"subject_start": 0.2, "subject_end": 0.8, "num_inference_steps": 4}
    elif how == "blocks":
        extra = {"subject_scale": {"down": 0.4, "up": {"block_1": 0.8}}}
    elif how == "batch":
        subject, extra = [cat, cat + dog, None], {"prompt": ["a", "b", "c"]}
    elif how == "mask":
        subject = fake_gpu.encode_subject(make_picture(), mask=MASK)
    elif how == "no guidance":
        extra = {"guidance_scale": 1.0}
    check(fake_gpu(**args(subject=subject, **extra)).images)


def test_compact_subjects(fake_gpu):
    """Merging depends on the values of the tokens, so the merged tokens are replaced by some of the tokens here."""
    from dataclasses import replace

    (subject,) = fake_gpu.encode_subject(make_picture(), "cat").subjects
    few = {name: getattr(subject, name)[:, :9] for name in ("embeds", "negative_embeds")}
    counts = {name: torch.ones(1, 9, device="cuda") for name in ("counts", "negative_counts")}
    whole = fake_gpu.encode_subject(make_picture(), "dog")
    compact = replace(whole, subjects=(replace(subject, **few, **counts),))
    check(fake_gpu(**args(subject=compact + whole)).images)


@pytest.mark.parametrize("in_controlnet", [False, True])
def test_controlnet(fake_gpu, parts, in_controlnet):
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(fake_gpu, controlnet=parts["controlnet"])
    pipe.set_progress_bar_config(disable=True)
    cat = on_gpu(pipe).encode_subject(make_picture(), "cat")
    edges = torch.empty(1, 3, 16, 16, dtype=torch.float16, device="cuda")
    check(pipe(**args(subject=cat, image=edges, subject_in_controlnet=in_controlnet)).images)


@pytest.mark.parametrize("how", ["region", "keyframes", "fading"])
def test_video(fake_gpu, parts, how):
    unet = UNetMotionModel.from_unet2d(fake_gpu.unet, parts["motion_adapter"], load_weights=False)
    stock = {name: part for name, part in fake_gpu.components.items() if name not in ("unet", "safety_checker")}
    pipe = AnimateDiffSSRPipeline(**stock, unet=unet, motion_adapter=parts["motion_adapter"])
    pipe.set_progress_bar_config(disable=True)
    cat, dog = on_gpu(pipe).encode_subject(make_picture(), query=["cat", "dog"])
    masks = np.stack([np.roll(LEFT, 4 * frame, 1) for frame in range(3)])
    subject = {
        "region": cat.inside(masks) + dog,
        "keyframes": {0: cat, 2: dog.inside(LEFT)},
        "fading": {0: cat, 2: None},
    }[how]
    check(pipe(**args(subject=subject, num_frames=3)).frames)


def test_subjects_on_the_cpu_are_moved_to_the_gpu(fake_gpu):
    """Subjects that were loaded from a file are on the CPU."""
    from dataclasses import replace

    cat = fake_gpu.encode_subject(make_picture(), "cat")
    (subject,) = cat.subjects
    moved = {name: getattr(subject, name).cpu().float() for name in ("embeds", "negative_embeds")}
    check(fake_gpu(**args(subject=replace(cat, subjects=(replace(subject, **moved),)).inside(LEFT))).images)


def test_tensor_on_the_wrong_device_raises_an_error(fake_gpu, monkeypatch):
    """Checks the method of these tests: regions that stay on the CPU raise an error."""
    from diffusers_ssr.attention_processors import SubjectConditions

    original = SubjectConditions._fit_regions
    monkeypatch.setattr(SubjectConditions, "_fit_regions", lambda self, *args: original(self, *args).cpu())
    cat = fake_gpu.encode_subject(make_picture(), "cat")
    with pytest.raises(RuntimeError, match="device"):
        fake_gpu(**args(subject=cat.inside(LEFT)))
