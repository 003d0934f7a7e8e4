"""Tests of the FLOPs that a subject adds to a step of the full-size SD 1.5 UNet, counted on the meta device."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers_ssr import SSREncoder, subject_in_unet
from diffusers_ssr.attention_processors import SubjectConditions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


TOKENS = 6 * 77


def count(function) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def count_operations(function) -> int:
    with torch.no_grad(), Operations() as counter:
        function()
    return counter.number


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(), SSREncoder()


def step(unet, batch_size: int = 1, frames: int | None = None, counted=count) -> int:
    shape = (batch_size, 4, 64, 64) if frames is None else (batch_size, 4, frames, 64, 64)
    sample, text = torch.empty(shape, device="meta"), torch.empty(batch_size * (frames or 1), 77, 768, device="meta")
    return counted(lambda: unet(sample, torch.empty((), dtype=torch.long, device="meta"), text))


def conditions_of(encoder, batch_size: int, subjects: int, tokens: int | None = None) -> SubjectConditions:
    """Creates conditions. `tokens` is the number of tokens of each subject after `SubjectEmbeds.compact`."""
    length = subjects * (tokens or TOKENS)
    counts = torch.empty(batch_size, length, device="meta") if tokens else None
    with torch.no_grad():
        pairs = encoder.project(torch.empty(batch_size, length, 768, device="meta"))
    return SubjectConditions(dict(zip(encoder.config.attention_layers, pairs, strict=True)), counts=counts)


@pytest.mark.parametrize("subjects,most", [(1, 1.027), (3, 1.080)])
def test_flops_of_a_step(models, subjects, most):
    unet, encoder = models
    stock = step(unet, 2)
    assert abs(stock / 2 - 803.3e9) < 0.1e9
    with subject_in_unet(unet, encoder, conditions_of(encoder, 2, subjects)):
        assert 1 < step(unet, 2) / stock <= most
    assert step(unet, 2) == stock


def test_operations_of_a_step(models):
    """The operations that a subject adds are launches on a GPU. On the meta device, attention decomposes to several."""
    unet, encoder = models
    stock = step(unet, counted=count_operations)
    with subject_in_unet(unet, encoder, conditions_of(encoder, 1, 1)):
        added = step(unet, counted=count_operations) - stock
    assert added <= 560, added


@pytest.mark.parametrize("tokens,most", [(96, 1.006), (24, 1.002)])
def test_fewer_tokens_need_fewer_flops(models, tokens, most):
    unet, encoder = models
    with subject_in_unet(unet, encoder, conditions_of(encoder, 1, 1, tokens)):
        with_subject = step(unet)
    assert 1 < with_subject / step(unet) <= most


def test_flops_of_a_video(models):
    """The added FLOPs are proportional to the number of frames, because no keys and values are projected in a step. A
    moving subject needs as many as a still one."""
    _, encoder = models
    with torch.device("meta"):
        unet = UNetMotionModel(sample_size=64, cross_attention_dim=768, motion_num_attention_heads=8).eval()
    still = conditions_of(encoder, 1, 1)
    twice = {name: tuple(torch.stack([each, each], 1) for each in pair) for name, pair in still.pairs.items()}
    keyframes = SubjectConditions(twice, frames=4, keyframes=torch.empty(4, device="meta"))
    owner = torch.zeros(1, TOKENS, device="meta")
    region = SubjectConditions(still.pairs, owner, [[torch.ones(4, 64, 64)]], frames=4)
    stock, added = {frames: step(unet, 1, frames) for frames in (1, 4)}, []
    for frames, conditions in ((1, still), (4, still), (4, keyframes), (4, region)):
        conditions.frames = frames
        with subject_in_unet(unet, encoder, conditions):
            added.append(step(unet, 1, frames) - stock[frames])
    assert added[1] == added[2] == added[3] == 4 * added[0]
    assert added[0] / 803.3e9 <= 0.027
