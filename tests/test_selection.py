"""Masks, several subjects, batches, windows, blocks, regions and attention maps, on tiny random components."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    UNET_LAYERS,
    call_args,
    make_picture,
    make_pipe_that_only_encodes,
    make_ssr_encoder,
    snapshot,
)
from diffusers import HeunDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers.callbacks import PipelineCallback
from diffusers_ssr import StableDiffusionSSRPipeline, SubjectEmbeds, hooks_ssr, ssr_pipeline_class
from diffusers_ssr.encoding_ssr import _make_attention_map as make_attention_map
from diffusers_ssr.images_ssr import preprocess
from PIL import Image
from test_pipeline_ssr import stock_of, subject_args


MASK = np.zeros((32, 40), np.uint8)
MASK[8:24, 4:20] = 255


def count_forwards(module) -> list:
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


# Masks


@pytest.mark.parametrize("query", [None, "cat", ""])
def test_a_mask_changes_the_subject_with_and_without_a_query(pipe, query):
    plain = pipe.encode_subject(make_picture(), query or "cat").subjects[0]
    masked = pipe.encode_subject(make_picture(), query, mask=MASK, mask_weight=3.0).subjects[0]
    assert (plain.embeds - masked.embeds).abs().max() > 1e-3
    # the unconditional branch is biased by the same mask
    assert (plain.negative_embeds - masked.negative_embeds).abs().max() > 1e-4


def test_the_encoder_gets_the_mask_in_the_geometry_of_the_image(pipe):
    """The expected result is computed with the mask that `preprocess_mask` returns."""
    from diffusers_ssr.images_ssr import preprocess, preprocess_mask

    subject = pipe.encode_subject(make_picture(), "cat", mask=MASK, mask_weight=2.0).subjects[0]
    mask = preprocess_mask(Image.fromarray(MASK), pipe.ssr_image_processor)
    query, _ = pipe.encode_prompt("cat", "cpu", 1, False)
    with torch.no_grad():
        hidden = pipe.ssr_image_encoder(
            preprocess(make_picture(), pipe.ssr_image_processor), output_hidden_states=True
        ).hidden_states
        expected = pipe.ssr_encoder(query, [hidden[level] for level in (1, 2, 3)], mask, 2.0)
    torch.testing.assert_close(subject.embeds, expected)


def test_each_image_has_its_own_mask(pipe):
    other = MASK[::-1].copy()
    pictures = [make_picture(1), make_picture(2)]
    both = pipe.encode_subject(pictures, None, mask=[MASK, other])
    for picture, mask, subject in zip(pictures, [MASK, other], both, strict=True):
        alone = pipe.encode_subject(picture, None, mask=mask).subjects[0]
        torch.testing.assert_close(subject.subjects[0].embeds, alone.embeds, atol=1e-5, rtol=1e-5)


# Several subjects


def test_the_image_is_encoded_once_for_two_queries(pipe):
    seen = []
    pipe.ssr_image_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len((args or kwargs["pixel_values"].unbind(1))[0])), with_kwargs=True
    )
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    assert seen == [2]  # the image of zeros and the reference
    torch.testing.assert_close(
        cat.subjects[0].embeds, pipe.encode_subject(make_picture(), "cat").subjects[0].embeds, atol=1e-5, rtol=1e-5
    )
    assert (cat.subjects[0].embeds - dog.subjects[0].embeds).abs().max() > 1e-4


def test_several_subjects_are_concatenated_with_their_scales(pipe):
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(hooks_ssr._blocks()[-1].subject.conditions(args[0])),
        with_kwargs=True,
    )
    pipe(**call_args(subject=cat.scaled(0.8) + dog, subject_scale=0.5))
    parts = [cat.subjects[0], dog.subjects[0]]
    positive = torch.cat([parts[0].embeds * 0.8, parts[1].embeds * 0.5], 1)
    negative = torch.cat([part.negative_embeds for part in parts], 1)
    expected = pipe.ssr_encoder.project(torch.cat([negative, positive]))
    for name, (key, value) in zip(UNET_LAYERS, expected, strict=True):
        torch.testing.assert_close(seen[0].pairs[name][0], key)
        torch.testing.assert_close(seen[0].pairs[name][1], value)


def test_lists_in_a_call_are_several_subjects_of_one_prompt(pipe):
    pictures = [make_picture(1), make_picture(2)]
    images = pipe(**subject_args(subject_image=pictures, subject_query=["cat", "dog"], subject_scale=0.7)).images
    cat, dog = pipe.encode_subject(pictures[0], "cat"), pipe.encode_subject(pictures[1], "dog")
    expected = pipe(**call_args(subject=(cat + dog).scaled(0.7))).images
    np.testing.assert_allclose(images, expected, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_mixed_numbers_of_subjects_in_one_batch(pipe, guidance_scale, num_images_per_prompt):
    cat, dog = pipe.encode_subject(make_picture(1), query=["cat", "dog"])
    car = pipe.encode_subject(make_picture(2), "car")
    subjects = [cat.scaled(0.9), cat + dog.scaled(0.4) + car, None, dog + car]
    prompts = ["a cat", "a cat and a dog", "nothing", "a dog and a car"]
    latents = torch.randn(4 * num_images_per_prompt, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = call_args(guidance_scale=guidance_scale, generator=None)
    images = pipe(
        **{**arguments, "prompt": prompts, "num_images_per_prompt": num_images_per_prompt, "latents": latents},
        subject=subjects,
    ).images
    for index, image in enumerate(images):
        number = index // num_images_per_prompt
        alone = pipe(
            **{**arguments, "prompt": prompts[number], "latents": latents[index : index + 1]}, subject=subjects[number]
        ).images[0]
        np.testing.assert_allclose(image, alone, atol=2e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_merged_tokens_in_one_batch(pipe, guidance_scale):
    """A batch with compact and whole subjects, a pair with a region, and no subject gives the same images as single
    calls."""
    left = np.zeros((8, 8))
    left[:, :4] = 1
    cat, dog = pipe.encode_subject(make_picture(1), query=["cat", "dog"])
    subjects = [cat.compact(9), dog, cat.scaled(0.4).compact(20) + dog.inside(left), None]
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = call_args(guidance_scale=guidance_scale, generator=None)
    images = pipe(**{**arguments, "prompt": ["a cat"] * 4, "latents": latents}, subject=subjects).images
    for index, subject in enumerate(subjects):
        one = {**arguments, "prompt": "a cat", "latents": latents[index : index + 1]}
        np.testing.assert_allclose(images[index], pipe(**one, subject=subject).images[0], atol=2e-5)


def test_merging_equal_tokens_changes_nothing(pipe):
    cat = pipe.encode_subject(make_picture(), "cat")
    (subject,) = cat.subjects
    length = subject.embeds.shape[1]
    twice = {name: getattr(subject, name)[:, [*range(length), *range(7)]] for name in ("embeds", "negative_embeds")}
    twice = SubjectEmbeds((replace(subject, **twice),), cat.fingerprint)
    merged = twice.compact(length)
    assert (
        merged.subjects[0].embeds.shape[1] == length and sorted(merged.subjects[0].counts[0].tolist())[-7:] == [2] * 7
    )
    images = [pipe(**call_args(subject=each)).images for each in (twice, merged, cat)]
    np.testing.assert_allclose(images[0], images[1], atol=2e-5)
    assert np.abs(images[0] - images[2]).max() > 1e-4


def test_fewer_tokens_change_the_image_more(pipe):
    cat = pipe.encode_subject(make_picture(), "cat")
    length = cat.subjects[0].embeds.shape[1]
    whole = pipe(**call_args(subject=cat)).images
    change = [np.abs(pipe(**call_args(subject=cat.compact(n))).images - whole).mean() for n in (length, 48, 12, 1)]
    assert change[0] == 0 and change == sorted(change)
    assert change[1] < 0.3 * np.abs(pipe(**call_args()).images - whole).mean()


@pytest.mark.parametrize("encoded", [False, True])
def test_one_reference_for_each_prompt(pipe, encoded):
    prompts, queries = ["a cat", "a dog"], ["cat", "dog"]
    pictures = [make_picture(1), make_picture(2)]
    arguments = subject_args(generator=None, latents=torch.zeros(2, 4, 8, 8))
    text = {"prompt": prompts}
    if encoded:
        embeds = pipe.encode_prompt(prompts, "cpu", 1, True)
        text = {"prompt": None, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    images = pipe(**{**arguments, **text, "subject_image": pictures, "subject_query": queries}).images
    for index in range(2):
        changed = {"prompt": prompts[index], "subject_image": pictures[index], "subject_query": queries[index]}
        alone = pipe(**{**arguments, **changed, "latents": torch.zeros(1, 4, 8, 8)}).images[0]
        np.testing.assert_allclose(images[index], alone, atol=2e-5)


# Scale per block, window and region


def active_layers(pipe, **kwargs) -> list[str]:
    """Returns the layers whose keys and values were not empty."""
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(hooks_ssr._blocks()[-1].subject.conditions(args[0])),
        with_kwargs=True,
    )
    pipe(**subject_args(**kwargs))
    handle.remove()
    return [name for name, (_, value) in seen[0].pairs.items() if value.shape[1]]


@pytest.mark.parametrize(
    "scale,expected",
    [
        ({"down": 1.0}, ["down_blocks.0"]),
        ({"mid": 0.5}, ["mid_block"]),
        ({"up": {"block_1": [0.0, 1.0]}}, ["up_blocks.1.attentions.1"]),
        (0.5, ["down_blocks.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "mid_block"]),
    ],
)
def test_scale_per_block(pipe, scale, expected):
    active = active_layers(pipe, subject_scale=scale)
    assert len(active) == len(expected)
    assert all(any(name.startswith(block) for block in expected) for name in active)
    pipe.set_ssr_scale(scale)
    assert active_layers(pipe, subject_scale=None) == active


@pytest.mark.parametrize("scale", [0.0, {"up": 0.0}, {}])
def test_a_scale_of_zero_is_the_stock_call(pipe, scale, monkeypatch):
    """The call adds no hooks and no projections, so it has exactly the FLOPs of the stock pipeline."""
    expected = stock_of(pipe)(**call_args()).images
    monkeypatch.setattr("diffusers_ssr.hooks_ssr.subject_in_unet", None)
    assert np.array_equal(pipe(**subject_args(subject_scale=scale)).images, expected)


@pytest.mark.parametrize(
    "window,subject_steps",
    [((0.0, 1.0), [0, 1, 2, 3]), ((0.5, 1.0), [2, 3]), ((0.0, 0.5), [0, 1]), ((0.25, 0.75), [1, 2])],
)
@pytest.mark.parametrize("user_callback", [False, True])
def test_window(pipe, monkeypatch, window, subject_steps, user_callback):
    """The layers attend to the subject only in these steps, with and without a user-defined callback."""
    callbacks, steps, attended = [], count_forwards(pipe.unet), set()
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        if key.shape[2] == 3 * pipe.tokenizer.model_max_length:
            attended.add(len(steps) - 1)
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    extra = {"callback_on_step_end": lambda p, i, t, k: callbacks.append(i) or {}} if user_callback else {}
    pipe(**subject_args(num_inference_steps=4, subject_start=window[0], subject_end=window[1], **extra))
    assert sorted(attended) == subject_steps
    assert callbacks == ([0, 1, 2, 3] if user_callback else [])


def test_a_step_outside_the_window_is_the_stock_step(pipe):
    """With a window that starts after the first two steps, the latents of these steps are those of the stock
    pipeline."""
    seen = {}

    def keep(name):
        return lambda p, i, t, k: seen.setdefault((name, i), k["latents"].clone()) is None or {}

    pipe(**subject_args(num_inference_steps=4, subject_start=0.5, callback_on_step_end=keep("ours")))
    stock_of(pipe)(**call_args(num_inference_steps=4, callback_on_step_end=keep("stock")))
    for step in (0, 1):
        assert torch.equal(seen["ours", step], seen["stock", step])
    for step in (2, 3):
        assert not torch.equal(seen["ours", step], seen["stock", step])


def test_a_window_with_a_second_order_scheduler(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    images = [pipe(**subject_args(num_inference_steps=3, subject_end=end)).images for end in (0.5, 1.0)]
    assert np.abs(images[0] - images[1]).max() > 1e-5


def test_a_window_with_a_pipeline_callback(pipe):
    class Watch(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert set(callback_kwargs) == {"prompt_embeds"}
            return callback_kwargs

    pipe(**subject_args(subject_end=0.5, callback_on_step_end=Watch(cutoff_step_ratio=1.0)))


def test_a_region_of_the_whole_image_changes_nothing(pipe):
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    plain = pipe(**call_args(subject=subject)).images
    np.testing.assert_allclose(pipe(**call_args(subject=subject.inside(np.ones((16, 16))))).images, plain, atol=1e-5)
    half = np.zeros((16, 16))
    half[:, :8] = 1
    assert np.abs(pipe(**call_args(subject=subject.inside(half))).images - plain).max() > 1e-4


# Attention maps


@pytest.mark.parametrize("resize_mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(40, 32), (32, 64)])
def test_attention_maps_have_the_size_of_the_image(pipe, size, resize_mode):
    attention = pipe.subject_attention_map(make_picture(size=size), "a cat", resize_mode=resize_mode)
    assert attention.heat.shape == size[::-1] and attention.overlay().size == size
    assert (
        attention.heat.max() == pytest.approx(min(2 * attention.gathered, 1), abs=1e-6) and attention.heat.min() >= 0
    )
    assert 0 < attention.gathered < 1 and "gathered=" in repr(attention)
    assert [name for name, _ in attention.tokens] == ["a</w>", "cat</w>"]
    assert all(heat.shape == size[::-1] for _, heat in attention.tokens)
    assert attention.overlay(attention.tokens[1][1]).size == size


def test_attention_map_of_the_papers_figure(pipe):
    """The map is the attention of the tokens of the query's words, averaged over tokens and heads and divided by its
    maximum."""
    picture = make_picture(size=(32, 32))
    attention = pipe.subject_attention_map(picture, "a cat", tokens="own")
    with torch.no_grad():
        pixels = preprocess(picture, pipe.ssr_image_processor)
        level = pipe.ssr_image_encoder(pixels, output_hidden_states=True).hidden_states[3]
        query, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
        probs = pipe.ssr_encoder.attention_probs(query, level)[0, :, [1, 2], 1:].mean((0, 1)).unflatten(0, (4, 4))
    # the centre of each patch of 8 pixels
    expected = torch.nn.functional.interpolate(probs[None, None], (32, 32), mode="bilinear")[0, 0]
    np.testing.assert_allclose(attention.heat, expected / expected.max(), atol=1e-5)
    assert attention.heat.max() == 1
    with pytest.raises(ValueError, match="`tokens` has to be"):
        pipe.subject_attention_map(picture, "a cat", tokens="none")


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_an_attention_map_has_the_tokens_of_a_textual_inversion(pipe, num_vectors):
    torch.manual_seed(0)
    vectors = torch.randn(num_vectors, pipe.text_encoder.config.hidden_size)
    pipe.load_textual_inversion({"<thing>": vectors}, token="<thing>")
    picture = make_picture(size=(32, 32))
    attention = pipe.subject_attention_map(picture, "<thing> cat", tokens="own")
    names = ["<thing>", *(f"<thing>_{index}" for index in range(1, num_vectors))]
    assert [name for name, _ in attention.tokens] == [*names, "cat</w>"]
    with torch.no_grad():
        pixels = preprocess(picture, pipe.ssr_image_processor)
        level = pipe.ssr_image_encoder(pixels, output_hidden_states=True).hidden_states[3]
        query, _ = pipe.encode_prompt("<thing> cat", "cpu", 1, False)
        probs = pipe.ssr_encoder.attention_probs(query, level)[0, :, 1 : num_vectors + 2, 1:].mean(0)
    expected = torch.nn.functional.interpolate(probs.unflatten(1, (4, 4))[None], (32, 32), mode="bilinear")[0]
    for (_, heat), own in zip(attention.tokens, expected, strict=True):
        np.testing.assert_allclose(heat, own / own.max(), atol=1e-5)


def test_the_attention_map_of_an_empty_query_is_zero():
    """The attention of the query is the same as the attention of the empty query."""
    probs = torch.rand(5, 17).softmax(-1)
    attention = make_attention_map(probs, probs, {}, make_picture(size=(32, 32)), "pad", "all")
    assert attention.gathered == 0 and not attention.heat.any()


def test_an_attention_map_follows_a_mask(pipe):
    heat = pipe.subject_attention_map(make_picture(), mask=MASK, mask_weight=5.0).heat
    assert heat[MASK > 0].mean() > 3 * heat[MASK == 0].mean()


# Invalid arguments


PAIR = [make_picture(1), make_picture(2)]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"subject_mask": MASK}, "`subject_mask` is given, but `subject_image` is missing"),
        ({"subject_image": make_picture(), "subject_mask": MASK[1:]}, "`subject_mask` has to be as large"),
        ({"subject_image": make_picture(), "subject_mask": np.zeros_like(MASK)}, "`subject_mask` is empty"),
        ({"subject_image": make_picture(), "subject_mask": np.ones_like(MASK)}, "`subject_mask` marks the whole"),
        ({"subject_image": make_picture(), "subject_mask": MASK, "mask_weight": "5"}, "`mask_weight` has to be a number"),
        ({"subject_image": PAIR, "subject_query": ["cat"]}, "one length.*'subject_image': 2, 'subject_query': 1"),
        ({"subject_image": [], "subject_query": "cat"}, "not empty"),
        ({"subject_image": PAIR, "subject_query": "cat", "prompt": ["a", "b", "c"]}, "holds 2 for 3"),
        ({"subject_image": make_picture(), "subject_query": "cat", "subject_resize_mode": "fill"}, "`subject_resize_mode`"),
        ({"subject_image": make_picture(), "subject_query": "cat", "subject_start": 0.5, "subject_end": 0.5}, "`subject_start`"),
        ({"subject_image": make_picture(), "subject_query": "cat", "subject_end": 1.5}, "`subject_end`"),
        ({"subject_image": make_picture(), "subject_query": "cat", "subject_scale": {"down": "all"}}, "`subject_scale`.*'all'"),
        ({"subject_image": make_picture(), "subject_query": "cat", "subject_scale": {"down": {"block_1": 1.0}}}, "`subject_scale`.*block_1"),
        ({"subject_image": make_picture(), "subject_query": "cat", "subject_scale": {"side": 1.0}}, "`subject_scale`.*side"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_rejected_before_any_step(pipe, arguments, message):
    calls = count_forwards(pipe.unet)
    state = snapshot(pipe.unet)
    with pytest.raises(ValueError, match=message):
        pipe(**call_args(**arguments))
    assert not calls and snapshot(pipe.unet) == state


@pytest.mark.parametrize("method", ["encode_subject", "subject_attention_map"])
@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"image": None}, "`image` is missing"),
        ({"image": None, "query": "cat"}, "`query` is 'cat', but `image` is missing"),
        ({"image": None, "mask": MASK}, "`mask` is given, but `image` is missing"),
        ({}, "`image` is given, but `query` is missing: .* in `mask`"),
        ({"query": ""}, "`query` has to be a text that names the subject, but is ''"),
        ({"query": ("cat", "dog")}, r"`query` has to be a text .*\('cat', 'dog'\)"),
        ({"query": 3, "mask": MASK}, "`query` has to be a text .* is 3"),
        ({"image": "cat.png", "query": "cat"}, "`image` has to be a PIL image"),
        ({"image": (make_picture(),), "query": "cat"}, "`image` has to be a PIL image"),
        ({"image": make_picture(size=(4, 4)), "query": "cat"}, "`image` is 4 x 4 pixels"),
        ({"mask": MASK[1:]}, "`mask` has to be as large"),
        ({"mask": np.zeros_like(MASK)}, "`mask` is empty"),
        ({"mask": "mask.png"}, "`mask` has to be a PIL image"),
        ({"mask": MASK, "mask_weight": "5"}, "`mask_weight` has to be a number"),
        ({"query": "cat", "resize_mode": "fill"}, "`resize_mode` has to be one of"),
    ],
)
def test_errors_name_the_arguments_of_the_method(pipe, method, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        getattr(pipe, method)(**{"image": make_picture(), **arguments})
    assert "subject_" not in str(raised.value)


@pytest.mark.parametrize("method", ["__call__", "encode_subject", "subject_attention_map"])
def test_a_mask_outside_the_cropped_square_is_rejected(pipe, method):
    prefix = "subject_" if method == "__call__" else ""
    mask = np.zeros((32, 80))
    mask[:, :20] = 1
    given = {"image": make_picture(size=(80, 32)), "mask": mask, "resize_mode": "crop"}
    calls = [count_forwards(part) for part in (pipe.unet, pipe.text_encoder, pipe.ssr_image_encoder)]
    with pytest.raises(ValueError, match=f"`{prefix}mask` is empty"):
        getattr(pipe, method)(**{f"{prefix}{name}": value for name, value in given.items()})
    assert not any(calls)


@pytest.mark.parametrize(
    "name,value", [("query", ["cat", "dog"]), ("query", ["cat"]), ("image", PAIR), ("image", []), ("mask", [MASK] * 3)]
)
def test_an_attention_map_of_a_list_is_rejected(pipe, name, value):
    calls = count_forwards(pipe.ssr_image_encoder)
    with pytest.raises(ValueError, match=f"`{name}` is a list of {len(value)}, but .* one query in one image"):
        pipe.subject_attention_map(**{"image": make_picture(), "query": "cat", name: value})
    assert not calls


def test_a_subject_of_another_encoder_is_rejected(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.register_modules(ssr_encoder=make_ssr_encoder(seed=9))
    with pytest.raises(ValueError, match="`subject` was encoded by another SSR-Encoder"):
        pipe(**call_args(subject=subject))


@pytest.mark.parametrize("part", ["text_encoder", "ssr_image_encoder", "ssr_encoder"])
def test_changed_weights_encode_the_subject_again(pipe, part):
    before = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    with torch.no_grad():
        for parameter in getattr(pipe, part).parameters():
            parameter.mul_(1.3).add_(0.01)
    after = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize(
    "given, count",
    [
        ({"image": make_picture(), "query": "cat"}, None),
        ({"image": make_picture(), "query": ["cat"]}, 1),
        ({"image": [make_picture()], "query": "cat"}, 1),
        ({"image": [make_picture(), make_picture(5), make_picture(6)], "query": "cat"}, 3),
        ({"image": make_picture(), "mask": [MASK]}, 1),
        ({"image": make_picture(), "query": "cat", "mask": [MASK, MASK[::-1]]}, 2),
        ({"image": [make_picture(), make_picture(5), make_picture()], "query": ["cat", "dog", "bird"]}, 3),
    ],
)
def test_lists_are_encoded_like_their_elements(pipe, given, count):
    encoded = pipe.encode_subject(**given)
    if count is None:
        assert isinstance(encoded, SubjectEmbeds)
        return
    assert isinstance(encoded, list) and len(encoded) == count
    for index, subject in enumerate(encoded):
        pipe.register_modules(ssr_encoder=make_ssr_encoder())  # with an empty cache
        each = {name: value[index] if isinstance(value, list) else value for name, value in given.items()}
        alone = pipe.encode_subject(**each).subjects[0]
        for name in ("embeds", "negative_embeds"):
            torch.testing.assert_close(getattr(subject.subjects[0], name), getattr(alone, name), atol=1e-5, rtol=0)


def test_negative_embeds_do_not_depend_on_image_and_query(pipe):
    subjects = [pipe.encode_subject(make_picture(seed), query) for seed, query in ((0, "cat"), (5, "dog"))]
    negative = [subject.subjects[0].negative_embeds for subject in subjects]
    torch.testing.assert_close(*negative)
    assert (subjects[0].subjects[0].embeds - subjects[1].subjects[0].embeds).abs().max() > 1e-3


@pytest.mark.parametrize("index", [0, 1])
def test_changed_text_states_encode_the_subject_again(pipe, index):
    """The text encoder's output of the empty query (index 0) belongs to the key of the cache as well."""
    before = pipe.encode_subject(make_picture(), "cat").subjects[0]
    encode_prompt = pipe.encode_prompt

    def changed(*args, **kwargs):
        states, *rest = encode_prompt(*args, **kwargs)
        states[index] *= 2
        return states, *rest

    pipe.encode_prompt = changed
    after = pipe.encode_subject(make_picture(), "cat").subjects[0]
    name = ("negative_embeds", "embeds")[index]
    assert (getattr(before, name) - getattr(after, name)).abs().max() > 1e-4


def test_instruct_pix2pix_encodes_like_other_pipelines(pipe):
    """This class only has `_encode_prompt`, without `clip_skip`."""
    other = ssr_pipeline_class(StableDiffusionInstructPix2PixPipeline).from_pipe(pipe)
    queries = ["cat", "dog"]
    expected = pipe.encode_subject(make_picture(), queries)
    other.register_modules(ssr_encoder=make_ssr_encoder())  # with an empty cache
    for clip_skip in (None, 1):
        encoded = other.encode_subject(make_picture(), queries, clip_skip=clip_skip)
        for one, two in zip(expected, encoded, strict=True):
            torch.testing.assert_close(one.subjects[0].embeds, two.subjects[0].embeds)


def test_an_encoder_without_image_levels_cannot_encode(pipe):
    pipe.register_modules(ssr_encoder=make_ssr_encoder(image_levels=()))
    with pytest.raises(ValueError, match="were dropped: call `load_ssr`"):
        pipe.encode_subject(make_picture(), "cat")


def test_a_mask_weight_of_0_or_more_is_accepted(pipe):
    embeds = [
        pipe.encode_subject(make_picture(), "cat", mask=MASK, mask_weight=weight).subjects[0].embeds
        for weight in (0, 0.5, 1, 3)
    ]
    for one, two in itertools.combinations(embeds, 2):
        assert (one - two).abs().max() > 1e-4


def test_an_attention_map_of_a_long_query_has_the_tokens_that_fit(pipe):
    attention = pipe.subject_attention_map(make_picture(), "cat " * 200)
    assert 0 < len(attention.tokens) <= pipe.tokenizer.model_max_length - 2


def flip(module, args):
    return args[0].flip(-1), *args[1:]


def replace_forward(module):
    forward = module.forward
    module.forward = lambda hidden_states, *args, **kwargs: forward(hidden_states * 2, *args, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.ssr_image_encoder.get_submodule("vision_model.embeddings.patch_embedding"
            if hasattr(pipe.ssr_image_encoder, "vision_model") else "embeddings.patch_embedding"
        ).register_forward_pre_hook(flip),
        lambda pipe: next(m for m in pipe.ssr_encoder.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
            lambda module, args, output: output * 2
        ),
        lambda pipe: replace_forward(next(m for m in pipe.ssr_image_encoder.modules() if isinstance(m, torch.nn.Linear))),
    ],
    ids=["hook of the vision encoder", "hook of the SSR-Encoder", "replaced forward"],
)  # fmt: skip
def test_a_hook_that_is_added_later_encodes_the_subject_again(pipe, change):
    before = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    handle = change(pipe)
    after = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    assert (before - after).abs().max() > 1e-4
    if handle is not None:
        handle.remove()
        assert torch.equal(pipe.encode_subject(make_picture(), "cat").subjects[0].embeds, before)


def test_a_pipeline_without_unet_and_vae_can_encode(pipe):
    """To save memory: encode first, and generate later with another pipeline."""
    parts = {name: part for name, part in pipe.components.items() if name not in ("unet", "vae")}
    only_encodes = make_pipe_that_only_encodes(**parts)
    subject = only_encodes.encode_subject(make_picture(), "cat")
    assert torch.equal(subject.subjects[0].embeds, pipe.encode_subject(make_picture(), "cat").subjects[0].embeds)
    assert only_encodes.subject_attention_map(make_picture(), "cat").heat.max() > 0
    pipe(**call_args(subject=subject))


@pytest.mark.parametrize("subject", [[None], [None, None]])
def test_a_batch_without_any_subject_is_the_stock_batch(pipe, subject):
    prompts = ["a cat"] * len(subject)
    expected = stock_of(pipe)(**call_args(prompt=prompts)).images
    assert np.array_equal(pipe(**call_args(prompt=prompts, subject=subject)).images, expected)


@pytest.mark.parametrize("from_file", [False, True])
def test_the_encoders_can_be_dropped(pipe, tmp_path, from_file):
    subject = pipe.encode_subject(make_picture(), "cat").scaled(0.9)
    expected = pipe(**call_args(subject=subject)).images
    other = StableDiffusionSSRPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    full = sum(parameter.numel() for parameter in pipe.ssr_encoder.parameters())
    pipe.drop_ssr_encoders()
    assert pipe.ssr_image_encoder is None
    assert sum(parameter.numel() for parameter in pipe.ssr_encoder.parameters()) < full
    if from_file:
        subject.save(tmp_path / "cat.safetensors")
        subject = SubjectEmbeds.load(tmp_path / "cat.safetensors")
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)
    with pytest.raises(ValueError, match="call `load_ssr`"):
        pipe.encode_subject(make_picture(), "cat")
    with pytest.raises(ValueError, match="another SSR-Encoder"):
        stranger = StableDiffusionSSRPipeline.from_pipe(other, ssr_encoder=make_ssr_encoder(seed=9))
        pipe(**call_args(subject=stranger.encode_subject(make_picture(), "cat")))
    assert np.array_equal(other(**subject_args(subject_scale=0.9)).images, expected)


# Several images of one subject, boxes, and a subject that is not wanted


def test_a_list_in_a_list_has_the_images_of_one_subject(pipe):
    """Also beside another subject, with one query or one for each image, and with masks and boxes."""
    a, b, c = (make_picture(seed) for seed in range(3))
    alone = pipe.encode_subject([a, b, c], query=["cat", "cat", "dog"])
    (cat,) = pipe.encode_subject([[a, b]], query="cat")
    expected = SubjectEmbeds.mean(alone[:2])
    torch.testing.assert_close(cat.subjects[0].embeds, expected.subjects[0].embeds)
    cat, dog = pipe.encode_subject([[a, b], c], query=["cat", "dog"])
    torch.testing.assert_close(cat.subjects[0].embeds, expected.subjects[0].embeds)
    torch.testing.assert_close(dog.subjects[0].embeds, alone[2].subjects[0].embeds)
    box = (0.25, 0.25, 0.75, 0.75)
    mask = np.zeros((32, 40))
    mask[8:24, 10:30] = 1
    (masked,) = pipe.encode_subject([[a, b]], query=[["cat", "thing"]], mask=[[mask, box]])
    parts = [pipe.encode_subject(a, "cat", mask), pipe.encode_subject(b, "thing", mask)]
    torch.testing.assert_close(masked.subjects[0].embeds, SubjectEmbeds.mean(parts).subjects[0].embeds)
    images = pipe(**subject_args(subject_image=[[a, b]], subject_query="cat", subject_scale=1.0)).images
    np.testing.assert_allclose(images, pipe(**call_args(subject=expected.scaled(1.0))).images, atol=1e-5)


@pytest.mark.parametrize("query", [[["cat"]], [["cat", "dog", "cow"]], [[]]])
def test_lists_of_images_of_one_subject_have_one_length(pipe, query):
    with pytest.raises(ValueError, match="Lists of images of one subject have to be of one length"):
        pipe.encode_subject([[make_picture(), make_picture(1)]], query=query)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_box_is_a_mask(pipe, kind):
    box = pipe.encode_subject(make_picture(), mask=kind((0.25, 0.25, 0.75, 0.75))).subjects[0]
    assert pipe.subject_attention_map(make_picture(), mask=kind((0.25, 0.25, 0.75, 0.75))).heat.ndim == 2
    mask = np.zeros((32, 40))
    mask[8:24, 10:30] = 1
    assert torch.equal(box.embeds, pipe.encode_subject(make_picture(), mask=mask).subjects[0].embeds)
    with pytest.raises(ValueError, match="`mask` as a box has to be"):
        pipe.encode_subject(make_picture(), mask=(0.5, 0, 0.2, 1))


def test_a_negative_subject_is_in_the_unconditional_branch(pipe):
    """With its conditional tokens, its scale and its region. A prompt with `None` has the usual empty subject."""
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda m, args: seen.append(hooks_ssr._blocks()[-1].subject.conditions(args[0]))
    )
    left = (0, 0, 0.5, 1)
    arguments = {"prompt": ["a", "b"], "subject": cat, "negative_subject": [dog.scaled(0.3).inside(left), None]}
    pipe(**call_args(**arguments, subject_scale=0.5, latents=None))
    tokens = [dog.subjects[0].embeds, cat.subjects[0].negative_embeds, cat.subjects[0].embeds, cat.subjects[0].embeds]
    expected = pipe.ssr_encoder.project(torch.cat(tokens))
    scales = torch.tensor([0.3, 0.5, 0.5, 0.5])[:, None, None]
    for name, (key, value) in zip(UNET_LAYERS, expected, strict=True):
        torch.testing.assert_close(seen[0].pairs[name][0], key)
        torch.testing.assert_close(seen[0].pairs[name][1], value * scales)
    assert [row[0] is not None for row in seen[0].regions] == [True, False, False, False]


def test_a_negative_subject_alone_and_in_a_video(pipe):
    from diffusers_ssr import AnimateDiffSSRPipeline
    from test_chains import make_motion_adapter, video_args

    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    stock = pipe(**call_args()).images
    alone = pipe(**call_args(negative_subject=dog.scaled(1.0))).images
    both = pipe(**call_args(subject=cat.scaled(1.0), negative_subject=dog.scaled(1.0))).images
    assert min(np.abs(alone - stock).max(), np.abs(both - alone).max()) > 1e-4
    assert np.array_equal(pipe(**call_args(negative_subject=dog.scaled(0.0))).images, stock)
    expected = pipe(**call_args(subject=cat, subject_start=0.5)).images
    for negative in (dog.scaled(0.0), [dog.scaled(0.0)]):
        images = pipe(**call_args(subject=cat, negative_subject=negative, subject_start=0.5)).images
        assert np.array_equal(images, expected)
    video = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=make_motion_adapter())
    video.set_progress_bar_config(disable=True)
    moving = {"subject": {0: cat, 2: dog}}
    with_negative = video(**video_args(**moving, negative_subject=dog)).frames
    assert np.abs(with_negative - video(**video_args(**moving)).frames).max() > 1e-4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"guidance_scale": 1.0}, "`negative_subject` needs guidance"),
        ({"guidance_scale": 1.0, "subject_start": 0.5}, "`negative_subject` needs guidance"),
        ({"negative_subject": "dog"}, "`negative_subject` has to be a SubjectEmbeds"),
        ({"negative_subject": [None, None]}, "`negative_subject` as a list"),
    ],
)
@pytest.mark.parametrize("with_subject", [True, False])
def test_negative_subjects_that_cannot_be_used_are_rejected(pipe, arguments, message, with_subject):
    cat = pipe.encode_subject(make_picture(), "cat")
    given = {"negative_subject": cat, **({"subject": cat} if with_subject else {}), **arguments}
    with pytest.raises(ValueError, match=message):
        pipe(**call_args(**given))
