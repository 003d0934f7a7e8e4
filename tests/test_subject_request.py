"""`SubjectRequest`: from the subjects of a call to the keys and values of the layers, without a pipeline."""

import pytest
import torch
from conftest import UNET_LAYERS, make_ssr_encoder
from diffusers_ssr import SubjectEmbeds
from diffusers_ssr.subject_embeds import Subject
from diffusers_ssr.subject_request import SubjectRequest, SubjectRow


LEFT = torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def embeds_of(seed: int = 0, num_tokens: int = 3, **more) -> SubjectEmbeds:
    generator = torch.Generator().manual_seed(seed)
    embeds, negative_embeds = torch.randn(2, 1, num_tokens, 32, generator=generator)
    return SubjectEmbeds((Subject(embeds, negative_embeds, **more),))


def request_of(*rows: SubjectRow, num_pictures: int = 1, scale=1.0, num_frames: int = 1) -> SubjectRequest:
    known = {1: (True,), 2: (False, True)}
    return SubjectRequest(
        list(rows), num_pictures, make_ssr_encoder(), torch.float32, scale, known.__getitem__, num_frames
    )


def test_the_region_applies_to_both_branches_of_guidance():
    row = SubjectRow((embeds_of(region=LEFT),))
    (negative,), (positive,) = request_of(row).conditions(torch.zeros(2, 4, 8, 8)).regions
    assert torch.equal(negative, LEFT[None]) and torch.equal(positive, LEFT[None])


LATENTS = torch.zeros(2, 4, 8, 8)


def counted(seed: int, *counts: float) -> SubjectEmbeds:
    counts, tokens = torch.tensor([counts]), len(counts)
    return embeds_of(seed, tokens, counts=counts, negative_counts=counts + 10)


def test_counts_have_the_order_of_the_tokens():
    """Counts of several subjects are concatenated, for both branches. Tokens without counts and padding have a count
    of 1."""
    rows = [SubjectRow((counted(1, 1.0, 2.0) + embeds_of(2, 1) + counted(3, 5.0),)), SubjectRow((embeds_of(4, 3),))]
    counts = request_of(*rows, num_pictures=2).conditions(torch.zeros(4, 4, 8, 8)).counts
    assert counts.tolist() == [[11, 12, 1, 15], [1, 1, 1, 1], [1, 2, 1, 5], [1, 1, 1, 1]]


@pytest.mark.parametrize("none_first", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_prompt_without_a_subject_gets_values_of_zero(none_first, num_tokens):
    rows = [SubjectRow((embeds_of(num_tokens=num_tokens),)), SubjectRow((None,))]
    rows = rows[::-1] if none_first else rows
    conditions = request_of(*rows, num_pictures=2).conditions(torch.zeros(4, 4, 8, 8))
    assert set(conditions.pairs) == set(UNET_LAYERS)
    for _, value in conditions.pairs.values():
        assert value.shape[:2] == (4, num_tokens)
        assert [bool(row.any()) for row in value] == [not none_first, none_first] * 2


def test_keyframes_of_each_branch_and_picture():
    cat, dog = embeds_of(1), embeds_of(2)
    request = request_of(SubjectRow((cat, dog), (0, 2)), num_pictures=2, num_frames=3)
    conditions = request.conditions(torch.zeros(4, 4, 3, 8, 8))
    assert conditions.keyframes.tolist() == [0.0, 0.5, 1.0] and conditions.frames == 3
    expected = [each.subjects[0] for each in (cat, dog)]
    states = [torch.cat([getattr(each, name) for each in expected]) for name in ("negative_embeds", "embeds")]
    keys = [request.encoder.project(each)[0][0] for each in states]
    key, _ = conditions.pairs[list(UNET_LAYERS)[0]]
    torch.testing.assert_close(key, torch.stack([keys[0], keys[0], keys[1], keys[1]]))


def test_keyframes_after_the_last_frame_are_rejected():
    request = request_of(SubjectRow((embeds_of(1), embeds_of(2)), (0, 3)), num_frames=4)
    with pytest.raises(ValueError, match="keyframes at .*0, 3.*, but the video has 3 frames, the last one 2"):
        request.conditions(torch.zeros(2, 4, 3, 8, 8))


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_a_batch_that_does_not_fit_the_number_of_pictures_is_rejected(batch_size):
    request = request_of(SubjectRow((embeds_of(),)), num_pictures=2)
    with pytest.raises(ValueError, match=f"a batch of {batch_size} latents for 2 pictures"):
        request.conditions(torch.zeros(batch_size, 4, 8, 8))


def test_conditions_are_created_once_for_a_batch_and_not_outside_the_window():
    request = request_of(SubjectRow((embeds_of(),)))
    first = request.conditions(LATENTS)
    assert request.conditions(LATENTS + 1) is first and request.conditions(LATENTS[:1]) is not first
    request.active = False
    assert request.conditions(LATENTS) is None


@pytest.mark.parametrize("num_frames", [1, 3])
def test_tokens_for_a_controlnet(num_frames):
    cat, dog = embeds_of(1), embeds_of(2)
    request = request_of(SubjectRow((cat,)), SubjectRow((dog,)), num_pictures=2, num_frames=num_frames)
    if num_frames == 1:
        request.num_frames = SubjectRequest(*[None] * 6).num_frames
    tokens = request.tokens(4 * num_frames, torch.device("cpu"))
    expected = [each.subjects[0].negative_embeds for each in (cat, dog)] + [
        each.subjects[0].embeds for each in (cat, dog)
    ]
    assert torch.equal(tokens, torch.cat(expected).repeat_interleave(num_frames, dim=0))


@pytest.mark.parametrize("scale", [0.5, {name: index / 4 for index, name in enumerate(UNET_LAYERS)}])
@pytest.mark.parametrize("own", [None, 0.8])
def test_values_are_multiplied_by_the_scales(scale, own):
    """The scale of a subject replaces the scale of the call if this is a number, and is multiplied by it if this is a
    scale per layer."""
    subject = embeds_of()
    subject = subject if own is None else subject.scaled(own)
    request = request_of(SubjectRow((subject,)), scale=scale)
    pairs = request.conditions(LATENTS[:1]).pairs
    projected = request.encoder.project(subject.subjects[0].embeds)
    for (name, (key, value)), (all_keys, all_values) in zip(pairs.items(), projected, strict=True):
        factor = (1.0 if own is None else own) * scale[name] if isinstance(scale, dict) else own or scale
        if factor == 0:
            assert key.shape[1] == value.shape[1] == 0
        else:
            torch.testing.assert_close(key, all_keys)
            torch.testing.assert_close(value, factor * all_values)


@pytest.mark.parametrize("without", [0, 1])
def test_a_keyframe_without_subjects_has_tokens_with_values_of_zero(without):
    keyframes = [embeds_of(1, 2) + embeds_of(2, 3)] * 2
    keyframes[without] = None
    conditions = request_of(SubjectRow(tuple(keyframes), (0, 1)), num_frames=2).conditions(torch.zeros(2, 4, 2, 8, 8))
    assert conditions.token_subject is None
    for key, value in conditions.pairs.values():
        assert key.shape[:3] == value.shape[:3] == (2, 2, 5)
        assert value[:, 1 - without].any() and not value[:, without].any()
