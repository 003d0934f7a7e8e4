from pathlib import Path

import pytest
import torch
from conftest import UNET_LAYERS, make_unet
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers_ssr.attention_processors import (
    SSRAttnProcessor2_0,
    SubjectConditions,
    SubjectProjection,
    subject_in_unet,
)
from safetensors.torch import load_file


PARITY = Path(__file__).parent / "parity"


def parity_layer():
    tensors = load_file(PARITY / "cross_attention.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    attn = Attention(query_dim=40, cross_attention_dim=32, heads=4, dim_head=10)
    attn.load_state_dict({name: t for name, t in weights.items() if "SSR" not in name})
    to_k, to_v = (next(t for name, t in weights.items() if f"to_{part}_SSR" in name) for part in "kv")
    return attn, tensors, tensors["subject_embeds"] @ to_k.T, tensors["subject_embeds"] @ to_v.T


def arrive(key, value, active=True):
    """What the processors of one layer get of a subject."""
    projection = SubjectProjection(1)
    projection.active = active
    return projection(SubjectConditions([(key, value)]).as_image_embeds())


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("regions", [None, torch.eye(2)[None, None]])
def test_frames_share_the_subjects_keys_and_values(frames, regions):
    """A video's frames lie one after the other along the batch, and each is attended to as a picture of its own."""
    attn, tensors, key, value = parity_layer()
    states = torch.randn(2 * frames, 16, 40, generator=torch.Generator().manual_seed(0))
    text = tensors["text_embeds"][:1].expand(2 * frames, -1, -1)
    owner = None if regions is None else torch.zeros(2, key.shape[1])
    regions = regions if regions is None else regions.expand(2, -1, -1, -1)
    pairs = [(key[:1] * torch.tensor([1.0, -1.0])[:, None, None], value[:1].expand(2, -1, -1))]
    processor = SSRAttnProcessor2_0(AttnProcessor2_0())
    with torch.no_grad():
        (arrived,) = SubjectProjection(1)(SubjectConditions(pairs, owner, regions).as_image_embeds())
        video = processor(attn, states, (text, [arrived.repeat_interleave(frames, dim=0)]))
        for index in range(2 * frames):
            row = [each[index // frames][None] for each in SubjectConditions(pairs, owner, regions).as_image_embeds()]
            alone = processor(attn, states[index][None], (text[:1], SubjectProjection(1)(row)))
            torch.testing.assert_close(video[index], alone[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", ["0.0", "0.65", "1.0"])
@pytest.mark.parametrize("inner", ["plain", "math", "sliced", "fused"])
def test_agrees_with_the_released_code_whatever_the_own_processor(scale, inner):
    attn, tensors, key, value = parity_layer()
    if inner == "fused":
        attn.fuse_projections()
    processor = {
        "plain": AttnProcessor2_0(),
        "math": AttnProcessor(),
        "sliced": SlicedAttnProcessor(slice_size=2),
        "fused": FusedAttnProcessor2_0(),
    }[inner]
    arrived = arrive(key, value * float(scale))
    with torch.no_grad():
        out = SSRAttnProcessor2_0(processor)(attn, tensors["hidden_states"], (tensors["text_embeds"], arrived))
    torch.testing.assert_close(out, tensors[f"output.scale_{scale}"], atol=1e-5, rtol=0)


def test_without_a_subject_the_own_processor_runs_unchanged():
    attn, tensors, key, value = parity_layer()
    states = tensors["hidden_states"], tensors["text_embeds"]
    with torch.no_grad():
        expected = AttnProcessor2_0()(attn, *states)
        assert torch.equal(SSRAttnProcessor2_0(AttnProcessor2_0())(attn, *states), expected)
        for nothing in (arrive(key, value, active=False), arrive(key[:, :0], value[:, :0])):
            out = SSRAttnProcessor2_0(AttnProcessor2_0())(attn, states[0], (states[1], nothing))
            assert torch.equal(out, expected)


def snapshot(unet):
    return (
        dict(unet.attn_processors),
        list(unet.named_modules()),
        [list(module._forward_pre_hooks) for module in unet.modules()],
        {name: value for name, value in vars(unet).items() if not name.startswith("_")},
        dict(unet.config),
        unet.config.encoder_hid_dim_type,
        unet.encoder_hid_proj,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_unet_is_afterwards_what_it_was(fails):
    unet = make_unet()
    before = snapshot(unet)
    try:
        with subject_in_unet(unet, UNET_LAYERS):
            assert snapshot(unet) != before
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert snapshot(unet) == before


def test_processors_are_the_same_objects_at_every_call():
    unet = make_unet()
    seen = []
    for _ in range(2):
        with subject_in_unet(unet, UNET_LAYERS):
            seen.append([unet.get_submodule(name).processor for name in UNET_LAYERS])
    assert all(first is second for first, second in zip(*seen, strict=True))


def attend(conditions, seed=0):
    attn, tensors, *_ = parity_layer()
    text = tensors["text_embeds"]
    states = text if conditions is None else (text, SubjectProjection(1)(conditions.as_image_embeds()))
    with torch.no_grad():
        return SSRAttnProcessor2_0(AttnProcessor2_0())(attn, tensors["hidden_states"], states)


def test_padding_has_no_effect():
    _, _, key, value = parity_layer()
    padded = [torch.cat([states, torch.full_like(states[:, :9], 50.0)], 1) for states in (key, value)]
    token_subject = torch.cat([torch.zeros(2, key.shape[1]), torch.full((2, 9), -1.0)], 1)
    torch.testing.assert_close(
        attend(SubjectConditions([tuple(padded)], token_subject)), attend(SubjectConditions([(key, value)]))
    )


def test_conditions_survive_the_way_through_a_pipeline():
    _, _, key, value = parity_layer()
    conditions = SubjectConditions([(key, value)] * 3, torch.zeros(2, key.shape[1]), torch.ones(2, 1, 8, 8))
    again = SubjectConditions.from_image_embeds(conditions.as_image_embeds())
    assert len(again.pairs) == 3 and again.regions is conditions.regions
    plain = SubjectConditions.from_image_embeds(SubjectConditions([(key, value)]).as_image_embeds())
    assert plain.token_subject is None and plain.regions is None


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4)])
def test_regions_keep_each_subject_to_its_place(shape):
    """64 positions: the first subject may appear on the left half, the second in the top right quarter."""
    _, _, key, value = parity_layer()
    half = key.shape[1] // 2
    first, second = (SubjectConditions([(key[:, part], value[:, part])]) for part in (slice(half), slice(half, None)))
    height, width = 8 * shape[0], 8 * shape[1]
    regions = torch.zeros(2, 2, height, width)
    regions[:, 0, :, : width // 2] = 1
    regions[:, 1, : height // 2, width // 2 :] = 1
    token_subject = (torch.arange(key.shape[1]) >= half).float().expand(2, -1)
    out = attend(SubjectConditions([(key, value)], token_subject, regions)).unflatten(1, shape)
    left, right = (attend(conditions).unflatten(1, shape) for conditions in (first, second))
    nothing = attend(None).unflatten(1, shape)
    rows, columns = shape[0] // 2, shape[1] // 2
    torch.testing.assert_close(out[:, :, :columns], left[:, :, :columns])
    torch.testing.assert_close(out[:, :rows, columns:], right[:, :rows, columns:])
    torch.testing.assert_close(out[:, rows:, columns:], nothing[:, rows:, columns:])
