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
from diffusers_ssr.attention_processors import SSRAttnProcessor2_0, SubjectConditions, subject_in_unet
from safetensors.torch import load_file


PARITY = Path(__file__).parent / "parity"


def parity_layer():
    tensors = load_file(PARITY / "cross_attention.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    attn = Attention(query_dim=40, cross_attention_dim=32, heads=4, dim_head=10)
    attn.load_state_dict({name: t for name, t in weights.items() if "SSR" not in name})
    to_k, to_v = (next(t for name, t in weights.items() if f"to_{part}_SSR" in name) for part in "kv")
    return attn, tensors, tensors["subject_embeds"] @ to_k.T, tensors["subject_embeds"] @ to_v.T


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
    conditions = SubjectConditions(None, [(key, value * float(scale))])
    with torch.no_grad():
        out = SSRAttnProcessor2_0(processor, 0)(attn, tensors["hidden_states"], (tensors["text_embeds"], conditions))
    torch.testing.assert_close(out, tensors[f"output.scale_{scale}"], atol=1e-5, rtol=0)


def test_without_a_subject_the_own_processor_runs_unchanged():
    attn, tensors, key, value = parity_layer()
    states = tensors["hidden_states"], tensors["text_embeds"]
    with torch.no_grad():
        expected = AttnProcessor2_0()(attn, *states)
        assert torch.equal(SSRAttnProcessor2_0(AttnProcessor2_0(), 0)(attn, *states), expected)
        none = SubjectConditions(None, [(key[:, :0], value[:, :0])])
        out = SSRAttnProcessor2_0(AttnProcessor2_0(), 0)(attn, states[0], (states[1], none))
    assert torch.equal(out, expected)


def snapshot(unet):
    return (
        dict(unet.attn_processors),
        list(unet.named_modules()),
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
