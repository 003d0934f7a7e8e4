"""Tests of a subject in one cross-attention layer, with different attention processors."""

from pathlib import Path

import pytest
import torch
from conftest import call_args, make_picture
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers_ssr.attention_processors import SubjectConditions
from diffusers_ssr.hooks_ssr import SUBJECT, hooks_of_layers
from diffusers_ssr.internals_ssr import clear_forward_hooks, set_forward_hooks
from safetensors.torch import load_file
from torch import nn


PARITY = Path(__file__).parent / "parity"
LAYER = "transformer.transformer_blocks.0.attn2"


def parity_layer():
    tensors = load_file(PARITY / "cross_attention.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    attn = Attention(query_dim=40, cross_attention_dim=32, heads=4, dim_head=10)
    attn.load_state_dict({name: t for name, t in weights.items() if "SSR" not in name})
    to_k, to_v = (next(t for name, t in weights.items() if f"to_{part}_SSR" in name) for part in "kv")
    return attn, tensors, tensors["subject_embeds"] @ to_k.T, tensors["subject_embeds"] @ to_v.T


class Transformer(nn.Module):
    """One cross-attention layer with the module structure of a UNet."""

    def __init__(self, attn: Attention):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn2": attn})])

    def forward(self, hidden_states, encoder_hidden_states=None, cross_attention_kwargs=None):
        states = hidden_states.flatten(2).transpose(1, 2)
        attn = self.transformer_blocks[0]["attn2"]
        return attn(states, encoder_hidden_states=encoder_hidden_states, **cross_attention_kwargs)


def attend(attn, hidden_states, text, conditions=None, grid=None, **kwargs):
    """Returns the output of a layer with a subject, for `hidden_states` of shape `(batch_size, positions, width)`."""
    model = nn.ModuleDict({"transformer": Transformer(attn)})
    hooks = hooks_of_layers(model, [LAYER])
    for module, (before, after) in hooks.items():
        set_forward_hooks(module, "ssr", before, after)
    grid = grid or (hidden_states.shape[1], 1)
    if conditions is not None:
        kwargs[SUBJECT] = conditions
    try:
        with torch.no_grad():
            return model["transformer"](
                hidden_states.transpose(1, 2).unflatten(2, grid),
                encoder_hidden_states=text,
                cross_attention_kwargs=kwargs,
            )
    finally:
        for module in hooks:
            clear_forward_hooks(module, "ssr")
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def conditions_of(key, value, *args, **kwargs) -> SubjectConditions:
    return SubjectConditions({LAYER: (key, value)}, *args, **kwargs)


@pytest.mark.parametrize("scale", ["0.0", "0.65", "1.0"])
@pytest.mark.parametrize("inner", ["plain", "math", "sliced", "fused"])
def test_output_matches_the_released_code_with_every_processor(scale, inner):
    attn, tensors, key, value = parity_layer()
    if inner == "fused":
        attn.fuse_projections()
    attn.set_processor(
        {
            "plain": AttnProcessor2_0(),
            "math": AttnProcessor(),
            "sliced": SlicedAttnProcessor(slice_size=2),
            "fused": FusedAttnProcessor2_0(),
        }[inner]
    )
    out = attend(attn, tensors["hidden_states"], tensors["text_embeds"], conditions_of(key, value * float(scale)))
    torch.testing.assert_close(out, tensors[f"output.scale_{scale}"], atol=1e-5, rtol=0)


class OwnProjections(nn.Module):
    """A processor with its own projections and its own argument, which also reads the weights of the layer."""

    def __init__(self, own_query: bool, own_output: bool):
        super().__init__()
        if own_query:
            self.to_q_mine = nn.Linear(40, 40, bias=False)
        if own_output:
            self.to_out_mine = nn.Linear(40, 40)
        self.strength, self.further = None, ()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, my_strength=1.0):
        self.strength = my_strength
        assert isinstance(attn, Attention) and attn.to_q.weight.shape == (40, 40)
        to_q, to_out = getattr(self, "to_q_mine", attn.to_q), getattr(self, "to_out_mine", attn.to_out[0])
        query, key, value = to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        states = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(*states) * my_strength
        return to_out(found.transpose(1, 2).flatten(2), *self.further)


def by_hand(attn, to_q, to_out, hidden, text, key, value):
    """Implements equation 5 directly."""

    def attention(key, value):
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (to_q(hidden), key, value))
        return (((q @ k.transpose(-1, -2)) * attn.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)

    with torch.no_grad():
        return to_out(attention(attn.to_k(text), attn.to_v(text)) + attention(key, value))


@pytest.mark.parametrize("own_query", [False, True])
@pytest.mark.parametrize("own_output", [False, True])
def test_custom_processor_with_its_own_projections(own_query, own_output):
    attn, tensors, key, value = parity_layer()
    processor = OwnProjections(own_query, own_output)
    attn.set_processor(processor)
    hidden, text = tensors["hidden_states"], tensors["text_embeds"]
    to_q = processor.to_q_mine if own_query else attn.to_q
    to_out = processor.to_out_mine if own_output else attn.to_out[0]
    out = attend(attn, hidden, text, conditions_of(key, value))
    torch.testing.assert_close(out, by_hand(attn, to_q, to_out, hidden, text, key, value), atol=1e-5, rtol=1e-5)


def test_custom_processor_receives_its_own_arguments():
    attn, tensors, key, value = parity_layer()
    attn.set_processor(OwnProjections(False, False))
    attend(attn, tensors["hidden_states"], tensors["text_embeds"], conditions_of(key, value), my_strength=0.5)
    assert attn.processor.strength == 0.5


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", [CustomDiffusionAttnProcessor, CustomDiffusionAttnProcessor2_0])
def test_custom_diffusion(kind, own):
    """With and without the processor's own query and output projections."""
    attn, tensors, key, value = parity_layer()
    torch.manual_seed(0)
    processor = kind(train_kv=own, train_q_out=own, hidden_size=40, cross_attention_dim=32).eval()
    attn.set_processor(processor)
    hidden, text = tensors["hidden_states"], tensors["text_embeds"]
    plain = attend(attn, hidden, text)
    out = attend(attn, hidden, text, conditions_of(key, value))
    to_q = processor.to_q_custom_diffusion if own else attn.to_q
    to_out = processor.to_out_custom_diffusion[0] if own else attn.to_out[0]
    nothing = torch.zeros(text.shape[0], 1, 40)
    both = by_hand(attn, to_q, lambda x: x, hidden, text, key, value)
    text_alone = by_hand(attn, to_q, lambda x: x, hidden, text, nothing, nothing)
    with torch.no_grad():
        torch.testing.assert_close(out - plain, (both - text_alone) @ to_out.weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ip_scale", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", [IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0])
def test_ip_adapter_and_subject_outputs_are_added(kind, ip_scale):
    attn, tensors, key, value = parity_layer()
    processor = kind(40, 32, num_tokens=(4,), scale=[ip_scale])
    attn.set_processor(processor)
    hidden, text = tensors["hidden_states"], (tensors["text_embeds"], [torch.randn(2, 1, 4, 32)])
    added = attend(attn, hidden, text, conditions_of(key, value)) - attend(attn, hidden, text)
    attn.set_processor(AttnProcessor2_0())
    plain = attend(attn, hidden, text[0], conditions_of(key, value)) - attend(attn, hidden, text[0])
    torch.testing.assert_close(added, plain, atol=1e-5, rtol=1e-5)


class Functional(nn.Module):
    """A processor that bypasses some projections of the layer, or calls them more than once."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if self.way == "neither":
            return hidden_states
        if self.way == "query by weight":
            query = hidden_states @ attn.to_q.weight.T
        else:
            query = attn.to_q(hidden_states)
        if self.way == "queries twice":
            query = query + attn.to_q(hidden_states)
        if self.way == "output by weight":
            return query @ attn.to_out[0].weight.T
        if self.way == "another shape":
            return attn.to_out[0](query[:, ::2])
        out = attn.to_out[0](query)
        return attn.to_out[0](out) if self.way == "outputs twice" else out


@pytest.mark.parametrize(
    "way", ["neither", "query by weight", "queries twice", "output by weight", "outputs twice", "another shape"]
)
def test_unsupported_processor_raises_an_error_with_its_name(way):
    attn, tensors, key, value = parity_layer()
    attn.set_processor(Functional(way))
    text = tensors["text_embeds"]
    with pytest.raises(ValueError, match="with the attention processor Functional: .*(queries|to_out|shape)"):
        attend(attn, tensors["hidden_states"], text, conditions_of(key, value))
    attend(attn, tensors["hidden_states"], text)  # without a subject there is no error


def test_a_cache_of_cross_attention_outputs_raises_an_error_that_names_it(pipe):
    diffusers = pytest.importorskip("diffusers", minversion="0.33", reason="has Pyramid Attention Broadcast")
    config = diffusers.PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_identifiers=("attentions",),
        current_timestep_callback=lambda: 500,
    )
    diffusers.apply_pyramid_attention_broadcast(pipe.unet, config)
    subject = pipe.encode_subject(make_picture(), "cat")
    with pytest.raises(ValueError, match="a cache of cross-attention outputs skipped the layer"):
        pipe(**call_args(subject=subject, num_inference_steps=4))
    assert pipe(**call_args(num_inference_steps=4)).images.shape[0] == 1


def test_output_projection_receives_additional_arguments():
    class Scaled(nn.Linear):
        def forward(self, states, factor):
            return factor * super().forward(states)

    attn, tensors, key, value = parity_layer()
    processor = OwnProjections(False, True)
    processor.to_out_mine, processor.further = Scaled(40, 40), (3.0,)
    attn.set_processor(processor)
    hidden, text = tensors["hidden_states"], tensors["text_embeds"]
    out = attend(attn, hidden, text, conditions_of(key, value))
    expected = by_hand(attn, attn.to_q, lambda states: processor.to_out_mine(states, 3.0), hidden, text, key, value)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_processor_error_is_propagated():
    attn, tensors, key, value = parity_layer()

    def broken(*args, **kwargs):
        raise RuntimeError("mine")

    attn.set_processor(broken)
    with pytest.raises(RuntimeError, match="mine"):
        attend(attn, tensors["hidden_states"], tensors["text_embeds"], conditions_of(key, value))
    attn.set_processor(AttnProcessor2_0())
    plain = attend(attn, tensors["hidden_states"], tensors["text_embeds"])
    assert torch.equal(plain, attn(tensors["hidden_states"], encoder_hidden_states=tensors["text_embeds"]))


def test_without_a_subject_the_layer_is_unchanged():
    attn, tensors, key, value = parity_layer()
    states = tensors["hidden_states"], tensors["text_embeds"]
    with torch.no_grad():
        expected = attn(states[0], encoder_hidden_states=states[1])
    assert torch.equal(attend(attn, *states), expected)
    assert torch.equal(attend(attn, *states, conditions_of(key[:, :0], value[:, :0])), expected)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("regions", [None, torch.eye(2)[None]])
def test_consecutive_images_and_frames_share_a_subject(rows, regions):
    """The result is the same as for each image alone."""
    attn, tensors, key, value = parity_layer()
    each = 3
    states = torch.randn(rows * each, 16, 40, generator=torch.Generator().manual_seed(0))
    text = tensors["text_embeds"][:1]
    key, value = key[:rows] * torch.tensor([1.0, -1.0])[:rows, None, None], value[:rows]
    owner = None if regions is None else torch.zeros(rows, key.shape[1])
    regions = None if regions is None else [[regions]] * rows
    many = attend(
        attn, states, text.expand(rows * each, -1, -1), conditions_of(key, value, owner, regions), grid=(4, 4)
    )
    for index in range(rows * each):
        row = slice(index // each, index // each + 1)
        one = conditions_of(key[row], value[row], None if owner is None else owner[row], regions and regions[:1])
        alone = attend(attn, states[index][None], text, one, grid=(4, 4))
        torch.testing.assert_close(many[index], alone[0], atol=1e-6, rtol=1e-5)


def test_padding_has_no_effect():
    attn, tensors, key, value = parity_layer()
    padded = [torch.cat([states, torch.full_like(states[:, :9], 50.0)], 1) for states in (key, value)]
    token_subject = torch.cat([torch.zeros(2, key.shape[1]), torch.full((2, 9), -1.0)], 1)
    states = tensors["hidden_states"], tensors["text_embeds"]
    torch.testing.assert_close(
        attend(attn, *states, conditions_of(*padded, token_subject)), attend(attn, *states, conditions_of(key, value))
    )


@pytest.mark.parametrize("grid", [(8, 8), (4, 16), (16, 4), (2, 32), (64, 1)])
@pytest.mark.parametrize("mask_size", [(64, 64), (40, 24), (16, 16), (256, 128)])
def test_regions_restrict_each_subject(grid, mask_size):
    """The first subject is restricted to the upper half and the second one to the lower left quarter, for any aspect
    ratio of mask and layer."""
    attn, tensors, key, value = parity_layer()
    half = key.shape[1] // 2
    first, second = (conditions_of(key[:, part], value[:, part]) for part in (slice(half), slice(half, None)))
    upper, lower_left = torch.zeros(1, *mask_size), torch.zeros(1, *mask_size)
    upper[:, : mask_size[0] // 2] = 1
    lower_left[:, mask_size[0] // 2 :, : mask_size[1] // 2] = 1
    token_subject = (torch.arange(key.shape[1]) >= half).float().expand(2, -1)
    generator = torch.Generator().manual_seed(0)
    hidden, text = torch.randn(2, 64, 40, generator=generator), tensors["text_embeds"]
    regions = [[upper, lower_left]] * 2
    out = attend(attn, hidden, text, conditions_of(key, value, token_subject, regions), grid).unflatten(1, grid)
    above, below = (attend(attn, hidden, text, each, grid).unflatten(1, grid) for each in (first, second))
    nothing = attend(attn, hidden, text).unflatten(1, grid)
    rows, columns = grid[0] // 2, grid[1] // 2
    torch.testing.assert_close(out[:, :rows], above[:, :rows])
    torch.testing.assert_close(out[:, rows:, :columns], below[:, rows:, :columns])
    if columns:
        torch.testing.assert_close(out[:, rows:, columns:], nothing[:, rows:, columns:])


def test_region_includes_positions_that_are_more_than_half_covered():
    """The region covers a quarter and a half of the upper two positions, and three quarters and all of the lower
    two."""
    region = torch.tensor([[[1.0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1]]])
    tokens = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    subject = conditions_of(*tokens, torch.zeros(1, 3), [[region]]).for_transformer([LAYER], "text", 1, (2, 2))
    assert subject.reached.flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("regions", [None, [[torch.eye(4)[None]]]])
def test_attention_masks_are_cached_per_grid_and_have_the_dtype_of_the_keys(dtype, regions):
    tokens = torch.randn(1, 3, 8, dtype=dtype), torch.randn(1, 3, 8, dtype=dtype)
    conditions = conditions_of(*tokens, torch.zeros(1, 3), regions, torch.tensor([[1.0, 2.0, 4.0]]))
    first, again = (conditions.for_transformer([LAYER], "text", 1, (2, 2)) for _ in range(2))
    assert first.mask is again.mask and first.reached is again.reached and first.mask.dtype == dtype
    assert first.reached is None or first.reached.dtype == dtype
    if regions is not None:
        shapes = [
            conditions.for_transformer([LAYER], "text", *size).mask.shape[2]
            for size in ((1, (2, 2)), (3, (2, 2)), (1, (4, 4)))
        ]
        assert shapes == [4, 12, 16]


def test_regions_are_resized_on_the_device_of_the_keys():
    tokens = torch.zeros(1, 3, 8, device="meta"), torch.zeros(1, 3, 8, device="meta")
    owner = torch.zeros(1, 3, device="meta")
    subject = conditions_of(*tokens, owner, [[torch.eye(4)[None], None]]).for_transformer([LAYER], "text", 1, (2, 2))
    assert {subject.mask.device.type, subject.reached.device.type} == {"meta"}


def test_only_regions_require_positions_that_form_a_grid():
    attn, tensors, key, value = parity_layer()
    states = torch.randn(2, 10, 40), tensors["text_embeds"]
    owner, region = torch.zeros(2, key.shape[1]), [[torch.eye(8)[None]]] * 2
    attend(attn, *states, conditions_of(key, value), grid=(10, 1))
    attn.set_processor(lambda attn, hidden, *args, **kwargs: AttnProcessor2_0()(attn, hidden[:, ::2], *args, **kwargs))
    with pytest.raises(ValueError, match="grid.*5 positions"):
        attend(attn, *states, conditions_of(key, value, owner, region), grid=(10, 1))


def test_keyframes_are_interpolated():
    """Each frame attends to keys and values that are interpolated between its keyframes."""
    attn, tensors, key, value = parity_layer()
    frames = 5
    hidden, text = torch.randn(2 * frames, 6, 40), tensors["text_embeds"][:1].expand(2 * frames, -1, -1)
    places = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0])
    pair = [
        states[None].expand(2, -1, -1, -1) * torch.tensor([1.0, -0.5])[:, None, None, None] for states in (key, value)
    ]
    video = attend(attn, hidden, text, conditions_of(*pair, frames=frames, keyframes=places))
    for index in range(2 * frames):
        row, place = index // frames, places[index % frames]
        blended = (each[row, 0] * (1 - place) + each[row, 1] * place for each in pair)
        alone = attend(attn, hidden[index][None], text[:1], conditions_of(*(each[None] for each in blended)))
        torch.testing.assert_close(video[index], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("regions", [None, [[torch.ones(1, 2, 2)]]])
def test_padding_is_masked_in_every_frame(regions):
    """With keyframes, each frame has its own row in the mask."""
    tokens, owner = torch.randn(1, 2, 3, 8), torch.tensor([[0.0, 0.0, -1.0]])
    places = torch.tensor([0.0, 0.5, 1.0])
    conditions = conditions_of(tokens, tokens, owner, regions, frames=3, keyframes=places)
    mask = conditions.for_transformer([LAYER], "text", 3, (2, 2)).mask
    assert mask.shape == (3, 1, 1 if regions is None else 4, 3)
    assert torch.equal(mask, torch.tensor([True, True, False]).expand_as(mask))


def test_regions_can_differ_between_frames():
    attn, tensors, key, value = parity_layer()
    hidden, text = torch.randn(3, 16, 40), tensors["text_embeds"][:1].expand(3, -1, -1)
    masks = torch.zeros(3, 4, 4)
    for frame in range(3):
        masks[frame, :, frame] = 1
    owner = torch.zeros(1, key.shape[1])
    video = attend(attn, hidden, text, conditions_of(key[:1], value[:1], owner, [[masks]], frames=3), grid=(4, 4))
    for frame in range(3):
        region = [[masks[frame][None]]]
        alone = attend(
            attn, hidden[frame][None], text[:1], conditions_of(key[:1], value[:1], owner, region), grid=(4, 4)
        )
        torch.testing.assert_close(video[frame], alone[0], atol=1e-6, rtol=1e-5)
