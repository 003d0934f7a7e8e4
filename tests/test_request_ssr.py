"""`SubjectRequest`: from the subjects of a call to the keys and values of the layers, without a pipeline."""

import pytest
import torch
from conftest import UNET_LAYERS, make_ssr_encoder
from diffusers_ssr import SubjectEmbeds
from diffusers_ssr.arguments_ssr import parse_negative_subject, parse_subjects, without_disabled_subjects
from diffusers_ssr.request_ssr import Row, SubjectRequest
from diffusers_ssr.subject_embeds_ssr import Subject


LEFT = torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def embeds_of(seed: int = 0, num_tokens: int = 3, **more) -> SubjectEmbeds:
    generator = torch.Generator().manual_seed(seed)
    embeds, negative_embeds = torch.randn(2, 1, num_tokens, 32, generator=generator)
    return SubjectEmbeds((Subject(embeds, negative_embeds, **more),))


def request_of(*rows: Row, num_images: int = 1, scale=1.0, num_frames: int = 1) -> SubjectRequest:
    return SubjectRequest(
        list(rows),
        num_images,
        make_ssr_encoder(),
        torch.float32,
        scale,
        lambda: [(True,), (False, True)],
        num_frames,
    )


def test_the_region_applies_to_both_branches_of_guidance():
    row = {0: embeds_of(region=LEFT)}
    (negative,), (positive,) = request_of(row).conditions(torch.zeros(2, 4, 8, 8)).regions
    assert torch.equal(negative, LEFT[None]) and torch.equal(positive, LEFT[None])


LATENTS = torch.zeros(2, 4, 8, 8)


def counted(seed: int, *counts: float) -> SubjectEmbeds:
    counts, tokens = torch.tensor([counts]), len(counts)
    return embeds_of(seed, tokens, counts=counts, negative_counts=counts + 10)


def test_counts_have_the_order_of_the_tokens():
    """Counts of several subjects are concatenated, for both branches. Tokens without counts and padding have a count
    of 1."""
    rows = [{0: counted(1, 1.0, 2.0) + embeds_of(2, 1) + counted(3, 5.0)}, {0: embeds_of(4, 3)}]
    counts = request_of(*rows, num_images=2).conditions(torch.zeros(4, 4, 8, 8)).counts
    assert counts.tolist() == [[11, 12, 1, 15], [1, 1, 1, 1], [1, 2, 1, 5], [1, 1, 1, 1]]


@pytest.mark.parametrize("none_first", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_prompt_without_a_subject_gets_values_of_zero(none_first, num_tokens):
    rows = [{0: embeds_of(num_tokens=num_tokens)}, {0: None}]
    rows = rows[::-1] if none_first else rows
    conditions = request_of(*rows, num_images=2).conditions(torch.zeros(4, 4, 8, 8))
    assert set(conditions.pairs) == set(UNET_LAYERS)
    for _, value in conditions.pairs.values():
        assert value.shape[:2] == (4, num_tokens)
        assert [bool(row.any()) for row in value] == [not none_first, none_first] * 2


def test_keyframes_of_each_branch_and_image():
    cat, dog = embeds_of(1), embeds_of(2)
    request = request_of({0: cat, 2: dog}, num_images=2, num_frames=3)
    conditions = request.conditions(torch.zeros(4, 4, 3, 8, 8))
    assert conditions.keyframes.tolist() == [0.0, 0.5, 1.0] and conditions.frames == 3
    expected = [each.subjects[0] for each in (cat, dog)]
    states = [torch.cat([getattr(each, name) for each in expected]) for name in ("negative_embeds", "embeds")]
    keys = [request.encoder.project(each)[0][0] for each in states]
    key, _ = conditions.pairs[list(UNET_LAYERS)[0]]
    torch.testing.assert_close(key, torch.stack([keys[0], keys[0], keys[1], keys[1]]))


def test_keyframes_after_the_last_frame_are_rejected():
    request = request_of({0: embeds_of(1), 3: embeds_of(2)}, num_frames=4)
    with pytest.raises(ValueError, match="keyframes at .*0, 3.*, but the video has 3 frames, 0 to 2"):
        request.conditions(torch.zeros(2, 4, 3, 8, 8))


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_a_batch_that_does_not_fit_the_number_of_images_is_rejected(batch_size):
    request = request_of({0: embeds_of()}, num_images=2)
    with pytest.raises(ValueError, match=f"a batch of {batch_size} latents for 2 images"):
        request.conditions(torch.zeros(batch_size, 4, 8, 8))


def test_a_part_of_a_batch_is_rejected():
    """If guidance is on, half of a batch is not taken for the conditional branch."""
    request = request_of({0: embeds_of()}, num_images=2)
    request.branches = lambda: [(False, True)]
    for batch_size in (1, 2, 3):
        with pytest.raises(ValueError, match=f"a batch of {batch_size} latents for 2 images with 2 branches"):
            request.conditions(torch.zeros(batch_size, 4, 8, 8))


def test_a_part_of_a_batch_is_rejected_after_a_controlnet_in_guess_mode():
    """The ControlNet gets the conditional branch only, and then a wrapper of the UNet splits the batch."""
    request = request_of({0: embeds_of()}, num_images=2)
    request.branches = lambda: [(False, True)]
    assert len(request.tokens(2, torch.device("cpu"))) == 2
    with pytest.raises(ValueError, match="a batch of 2 latents for 2 images"):
        request.conditions(torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("scale", [0.7, dict.fromkeys(UNET_LAYERS, 0.7)])
@pytest.mark.parametrize("own", [(0.5, 0.0), (0.0, 0.5), (None, 0.0), (0.5, 0.0, 0.4)])
def test_subjects_with_scale_0_are_removed(scale, own):
    parts = [embeds_of(index, scale=each) for index, each in enumerate(own)]
    kept = [part for part, each in zip(parts, own, strict=True) if each != 0]
    row = without_disabled_subjects({0: sum(parts[1:], parts[0])}, scale)
    assert row[0].subjects == sum(kept[1:], kept[0]).subjects


def test_subjects_with_scale_0_at_some_keyframes_are_kept():
    cat, dog = embeds_of(0, scale=0.5), embeds_of(1, scale=0.5)
    row = {0: cat + dog.scaled(0.0), 2: cat.scaled(0.0) + dog}
    assert without_disabled_subjects(row, 1.0) is row
    off = {0: cat + dog.scaled(0.0), 1: None, 2: cat.scaled(0.0) + dog.scaled(0.0)}
    first, second, third = without_disabled_subjects(off, 1.0).values()
    assert first.subjects == cat.subjects and second is None and len(third.subjects) == 1
    assert without_disabled_subjects({0: cat.scaled(0.0), 2: dog.scaled(0.0)}, 1.0) == {0: None, 2: None}


@pytest.mark.parametrize("region", ["a small square", "stripes"])
@pytest.mark.parametrize("num_frames", [1, 2])
def test_a_region_without_any_position_of_the_latents_is_rejected(region, num_frames):
    mask = torch.zeros(num_frames, 64, 64)
    if region == "stripes":
        mask[:, ::3] = 1
    else:
        mask[:, 30:34, 30:34] = 1
    latents = torch.zeros(2, 4, num_frames, 8, 8) if num_frames > 1 else torch.zeros(2, 4, 8, 8)
    request = request_of({0: embeds_of(region=mask)}, num_frames=num_frames)
    with pytest.raises(ValueError, match="`subject` has a region that covers no position of the latents .8 x 8."):
        request.conditions(latents)
    mask[-1, 24:32, 24:32] = 1
    assert request.conditions(latents) is not None


def test_conditions_are_created_once_for_a_batch_and_not_outside_the_window():
    request = request_of({0: embeds_of()})
    first = request.conditions(LATENTS)
    assert request.conditions(LATENTS + 1) is first and request.conditions(LATENTS[:1]) is not first
    request.active = False
    assert request.conditions(LATENTS) is None


@pytest.mark.parametrize("num_frames", [1, 3])
def test_tokens_for_a_controlnet(num_frames):
    cat, dog = embeds_of(1), embeds_of(2)
    request = request_of({0: cat}, {0: dog}, num_images=2, num_frames=num_frames)
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
    request = request_of({0: subject}, scale=scale)
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
@pytest.mark.parametrize("count", [1, 2])
def test_a_keyframe_without_subjects_has_values_of_zero(without, count):
    """In both branches, so that the subjects fade in or out."""
    keyframes = [sum((embeds_of(index, 2 + index) for index in range(count)), 0)] * 2
    keyframes[without] = None
    rows = parse_subjects(dict(enumerate(keyframes)), 1)
    conditions = request_of(*rows, num_frames=2).conditions(torch.zeros(2, 4, 2, 8, 8))
    assert conditions.token_subject is None
    for key, value in conditions.pairs.values():
        assert key.shape[:2] == value.shape[:2] == (2, 2)
        assert value[:, 1 - without].any() and not value[:, without].any()


@pytest.mark.parametrize(
    "subject", [{2: 0, 3: 1}, {1: 0, 3: None}, [{2: 0, 3: None}, 1], [{2: 0, 3: 1}, {2: 1}], [{3: 1}, None]]
)
@pytest.mark.parametrize("negative", [None, 1, {2: 1}])
def test_keyframes_need_not_begin_at_frame_0(subject, negative):
    """Also beside rows with one keyframe, and with a negative subject."""
    subjects = [embeds_of(0), embeds_of(1)]

    def replaced(value):
        if isinstance(value, dict):
            return {frame: replaced(part) for frame, part in value.items()}
        return (
            [replaced(part) for part in value]
            if isinstance(value, list)
            else None
            if value is None
            else subjects[value]
        )

    count = len(subject) if isinstance(subject, list) else 1
    rows = parse_subjects(replaced(subject), count)
    request = request_of(*rows, num_images=count, num_frames=4)
    request.negative_rows = parse_negative_subject(replaced(negative), count, list(rows[0]))
    conditions = request.conditions(torch.zeros(2 * count, 4, 4, 8, 8))
    assert all(torch.isfinite(value).all() for _, value in conditions.pairs.values())
