"""Tests of the FLOPs that a subject adds to a step of the full-size SD 1.5 UNet, counted on the meta device."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers_ssr import SSREncoder
from diffusers_ssr.attention_processors import SubjectConditions
from diffusers_ssr.hooks_ssr import subject_in_unet
from torch.utils.flop_counter import FlopCounterMode


TOKENS = 6 * 77


def count(function) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(), SSREncoder()


def step(unet, batch_size: int = 1, frames: int | None = None, conditions: SubjectConditions | None = None) -> int:
    shape = (batch_size, 4, 64, 64) if frames is None else (batch_size, 4, frames, 64, 64)
    sample, text = torch.empty(shape, device="meta"), torch.empty(batch_size * (frames or 1), 77, 768, device="meta")
    extra = {} if conditions is None else {"cross_attention_kwargs": {"ssr_subject": conditions}}
    return count(lambda: unet(sample, torch.empty((), dtype=torch.long, device="meta"), text, **extra))


def conditions_of(encoder, batch_size: int, subjects: int, tokens: int | None = None) -> SubjectConditions:
    """Creates conditions. `tokens` is the number of tokens of each subject after `SubjectEmbeds.compact`."""
    length = subjects * (tokens or TOKENS)
    counts = torch.empty(batch_size, length, device="meta") if tokens else None
    with torch.no_grad():
        pairs = encoder.project(torch.empty(batch_size, length, 768, device="meta"))
    return SubjectConditions(dict(zip(encoder.config.attention_layers, pairs, strict=True)), counts=counts)


@pytest.mark.parametrize("subjects,most", [(1, 1.027), (3, 1.080)])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_flops_of_a_step(models, subjects, most, batch_size):
    unet, encoder = models
    stock = step(unet, batch_size)
    assert abs(stock / batch_size - 803.3e9) < 0.1e9
    conditions = conditions_of(encoder, batch_size, subjects)
    with subject_in_unet(unet, encoder.config.attention_layers):
        assert 1 < step(unet, batch_size, conditions=conditions) / stock <= most
        assert step(unet, batch_size) == stock
    assert step(unet, batch_size) == stock


@pytest.mark.parametrize("tokens,most", [(96, 1.006), (24, 1.002)])
def test_fewer_tokens_need_fewer_flops(models, tokens, most):
    unet, encoder = models
    with subject_in_unet(unet, encoder.config.attention_layers):
        with_subject = step(unet, conditions=conditions_of(encoder, 1, 1, tokens))
    assert 1 < with_subject / step(unet) <= most


def test_flops_of_a_video(models):
    """The added FLOPs are proportional to the number of frames, because no keys and values are projected in a step."""
    _, encoder = models
    with torch.device("meta"):
        unet = UNetMotionModel(sample_size=64, cross_attention_dim=768, motion_num_attention_heads=8).eval()
    conditions = conditions_of(encoder, 1, 1)
    added = []
    for frames in (1, 4):
        stock = step(unet, 1, frames)
        with subject_in_unet(unet, encoder.config.attention_layers):
            added.append(step(unet, 1, frames, conditions) - stock)
    assert added[1] == 4 * added[0]
    assert added[0] / 803.3e9 <= 0.027


@pytest.mark.parametrize("moving", ["keyframes", "region"])
def test_moving_subject_needs_the_same_flops_as_a_still_one(models, moving):
    _, encoder = models
    with torch.device("meta"):
        unet = UNetMotionModel(sample_size=64, cross_attention_dim=768, motion_num_attention_heads=8).eval()
    still = conditions_of(encoder, 1, 1)
    if moving == "keyframes":
        pairs = {name: tuple(torch.stack([each, each], 1) for each in pair) for name, pair in still.pairs.items()}
        moves = SubjectConditions(pairs, frames=4, keyframes=torch.empty(4, device="meta"))
    else:
        owner = torch.zeros(1, TOKENS, device="meta")
        moves = SubjectConditions(still.pairs, owner, [[torch.ones(4, 64, 64)]], frames=4)
    still.frames = 4
    with subject_in_unet(unet, encoder.config.attention_layers):
        assert step(unet, 1, 4, moves) == step(unet, 1, 4, still)
