import itertools
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_picture, make_ssr_encoder
from diffusers_ssr import SubjectEmbeds, files_ssr, subject_embeds_ssr
from diffusers_ssr.subject_embeds_ssr import same_fingerprint
from PIL import Image
from safetensors import safe_open


@pytest.fixture
def pair(pipe):
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    return cat.scaled(0.8).inside(np.eye(8)) + dog


def test_save_and_load(pair, tmp_path):
    pair.save(tmp_path / "pair.safetensors")
    loaded = SubjectEmbeds.load(tmp_path / "pair.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["pair.safetensors"]
    assert torch.equal(loaded.fingerprint, pair.fingerprint)
    for ours, theirs in zip(pair.subjects, loaded.subjects, strict=True):
        assert (ours.query, ours.scale) == (theirs.query, theirs.scale)
        assert torch.equal(ours.embeds, theirs.embeds)
        assert torch.equal(ours.negative_embeds, theirs.negative_embeds)
        assert (ours.region is None) == (theirs.region is None)
    with safe_open(tmp_path / "pair.safetensors", "pt") as file:
        assert '"query": "cat"' in file.metadata()["subjects"]


def test_compact_subjects_can_be_saved_and_compacted_again(pair, tmp_path):
    few = pair.compact(9)
    few.save(tmp_path / "few.safetensors")
    loaded = SubjectEmbeds.load(tmp_path / "few.safetensors")
    length = pair.subjects[0].embeds.shape[1]
    for subject, fewer in zip(loaded.subjects, loaded.compact(4).subjects, strict=True):
        assert subject.embeds.shape[1] == 9 and fewer.negative_embeds.shape[1] == 4
        for counts in (subject.counts, subject.negative_counts, fewer.counts, fewer.negative_counts):
            assert counts.sum() == length
    assert pair.subjects[0].embeds.shape[1] == length and pair.compact(length).subjects == pair.subjects


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sum_combines_subjects(pipe, count):
    given = pipe.encode_subject(make_picture(), query=["cat", "dog", "car"][:count])
    total = sum(given)
    assert total.subjects == tuple(subject for each in given for subject in each.subjects)
    assert torch.equal(total.fingerprint, given[0].fingerprint)


@pytest.mark.parametrize("other", [1, 0.0, False, None, "cat", []])
def test_other_values_cannot_be_added_to_a_subject(pair, other):
    for add in (lambda: other + pair, lambda: pair + other):
        with pytest.raises(TypeError, match="SubjectEmbeds"):
            add()


@pytest.mark.parametrize(
    "num_tokens", [0, -1, 2.5, True, "few", None, np.float64(3), np.bool_(True), torch.tensor([3])]
)
def test_an_invalid_number_of_tokens_is_rejected(pair, num_tokens):
    with pytest.raises(ValueError, match="`num_tokens`"):
        pair.compact(num_tokens)


NUMBERS = [
    np.float32(0.5), np.float16(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).bfloat16(),
    Fraction(1, 2), 0.5,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{type(number).__module__}.{type(number).__name__}")
def test_a_scale_can_have_any_number_type(pair, number):
    (scale,) = {subject.scale for subject in pair.scaled(number).subjects}
    assert type(scale) is float and scale == 0.5


@pytest.mark.parametrize("count", [9, np.int64(9), np.uint8(9), np.array(9), torch.tensor(9)])
def test_a_number_of_tokens_can_have_any_integer_type(pair, count):
    assert [subject.embeds.shape[1] for subject in pair.compact(count).subjects] == [9, 9]


NOT_NUMBERS = [
    "0.8", None, True, np.bool_(True), torch.tensor(True), 1j, torch.tensor(1j), float("nan"), np.float32("inf"), 1e30,
    10**400, np.array([0.5]), torch.tensor([0.5]), torch.tensor(0.5, device="meta"), [0.5],
]  # fmt: skip


@pytest.mark.parametrize("scale", NOT_NUMBERS, ids=str)
def test_a_scale_that_is_not_a_number_is_rejected(pair, scale):
    with pytest.raises(ValueError, match="`scale` has to be a number"):
        pair.scaled(scale)


@pytest.mark.parametrize("frames", [None, 1, 3])
def test_a_region_that_subjects_share_can_be_saved(pair, tmp_path, frames):
    region = np.eye(8) if frames is None else [np.eye(8) * (frame != 1) for frame in range(frames)]
    pair.inside(region).save(tmp_path / "pair.safetensors")
    loaded = SubjectEmbeds.load(tmp_path / "pair.safetensors")
    expected = torch.from_numpy(np.eye(8) if frames in (None, 1) else np.stack(region)).float()
    assert all(torch.equal(subject.region, expected) for subject in loaded.subjects)


def test_loaded_tensors_do_not_depend_on_the_file(pair, tmp_path):
    """The tensors are copies of the file content, so the file can be overwritten."""
    path = tmp_path / "pair.safetensors"
    pair.save(path)
    loaded = SubjectEmbeds.load(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(loaded.subjects[0].embeds, pair.subjects[0].embeds)


def test_threads_can_save_to_the_same_path(pipe, tmp_path):
    subjects = [pipe.encode_subject(make_picture(seed), "cat").scaled(seed / 8) for seed in range(8)]
    path, start = tmp_path / "cat.safetensors", threading.Barrier(8)

    def save(subject):
        start.wait()
        for _ in range(20):
            subject.save(path)
            loaded = SubjectEmbeds.load(path).subjects[0]
            assert torch.equal(loaded.embeds, subjects[int(loaded.scale * 8)].subjects[0].embeds)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, subjects))
    assert [file.name for file in tmp_path.iterdir()] == ["cat.safetensors"]


def test_a_full_disk_keeps_the_old_file(pair, tmp_path):
    path = tmp_path / "pair.safetensors"
    pair.compact(2).save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(Exception, match="[Ff]ile too large"):
            pair.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_write_error_keeps_the_old_file(pair, tmp_path, monkeypatch):
    """This does not depend on whether safetensors itself writes files atomically."""
    path = tmp_path / "pair.safetensors"
    pair.save(path)
    before = path.read_bytes()

    def write_a_part(tensors, file, metadata):
        Path(file).write_bytes(before[:100])
        raise OSError("the disk is gone")

    monkeypatch.setattr("safetensors.torch.save_file", write_a_part)
    with pytest.raises(OSError, match="the disk is gone"):
        pair.compact(2).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_subjects_that_are_too_large_to_load_are_not_saved(pair, tmp_path, monkeypatch):
    """The limit is the size of the file: a file of that size can be saved and loaded, a smaller limit accepts neither."""
    saved, other = tmp_path / "pair.safetensors", tmp_path / "other.safetensors"
    pair.save(saved)
    size = saved.stat().st_size
    monkeypatch.setattr(files_ssr, "MAX_BYTES", size - files_ssr.MAX_HEADER_BYTES)
    pair.save(other)
    assert len(SubjectEmbeds.load(other)) == len(pair)
    other.unlink()
    monkeypatch.setattr(files_ssr, "MAX_BYTES", size - files_ssr.MAX_HEADER_BYTES - 1)
    with pytest.raises(ValueError, match="cannot be saved: it has .* bytes"):
        pair.save(other)
    with pytest.raises(ValueError, match="it has .* bytes"):
        SubjectEmbeds.load(saved)
    assert list(tmp_path.iterdir()) == [saved]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embeds": float("nan")}, "0.embeds holds values from nan"),
        ({"embeds": 1e6}, "0.embeds holds values from"),
        ({"embeds": 1001.0}, "0.embeds holds values from"),
        ({"negative_embeds": float("inf")}, "0.negative_embeds holds"),
        ({"query": "a cat " * 200_000}, "and a header of"),
        ({"query": "猫" * 170_000}, "and a header of"),
    ],
)
def test_subjects_that_cannot_be_loaded_are_not_saved(pair, tmp_path, changes, message):
    first = pair.subjects[0]
    changes = {
        name: value if isinstance(value, str) else torch.full_like(getattr(first, name), value)
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=f"These subjects cannot be saved: .*{message}"):
        SubjectEmbeds((replace(first, **changes),)).save(tmp_path / "pair.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_longest_query_that_can_be_saved_can_be_loaded(pair, tmp_path):
    subjects = tuple(replace(subject, query="猫" * 1170) for subject in pair.subjects * 32)
    SubjectEmbeds(subjects, pair.fingerprint).save(tmp_path / "pair.safetensors")
    assert len(SubjectEmbeds.load(tmp_path / "pair.safetensors").subjects) == 64


def test_repr_is_one_short_line(pair):
    assert repr(pair) == (
        "SubjectEmbeds([Subject('cat', scale 0.8, 96 tokens, region 8 x 8), Subject('dog', 96 tokens)], float32, cpu)"
    )
    many = SubjectEmbeds(tuple(replace(pair.subjects[0], query="a very long query " * 9) for _ in range(60)))
    shown = repr(many.inside([np.eye(8)] * 3))
    assert "... 56 more" in shown and "region 3 x 8 x 8" in shown and len(shown) < 500 and "\n" not in shown


def test_scaled_and_inside_change_every_subject_of_a_copy(pair):
    assert [subject.scale for subject in pair.scaled(0.3).subjects] == [0.3, 0.3]
    assert [subject.scale for subject in pair.subjects] == [0.8, None]
    region = Image.fromarray(np.eye(8, dtype=np.uint8) * 255)
    assert all(torch.equal(s.region, torch.eye(8)) for s in pair.inside(region).subjects)


def painted(size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A transparent layer with a left half that is painted black."""
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0, size[0] // 2, size[1]))
    return layer


LEFT = np.repeat([[1.0] * 4 + [0.0] * 4], 8, 0)


@pytest.mark.parametrize(
    "region",
    [LEFT, LEFT[None], LEFT[..., None], LEFT > 0, (LEFT * 255).astype(np.uint8), (LEFT * 65535).astype(np.uint16),
     torch.from_numpy(LEFT)[None, None], painted(), painted().convert("LA"), Image.fromarray(LEFT > 0), [LEFT], (painted(),)],
)  # fmt: skip
def test_a_region_can_be_any_mask(pair, region):
    for subject in pair.inside(region).subjects:
        assert subject.region.dtype == torch.float32 and torch.equal(subject.region, torch.from_numpy(LEFT).float())


STACK = np.stack([LEFT, LEFT * 0, LEFT[:, ::-1]])


@pytest.mark.parametrize(
    "region",
    [STACK, STACK[:, None], STACK[..., None], torch.from_numpy(STACK) > 0, (STACK * 255).astype(np.uint8), list(STACK),
     tuple(torch.from_numpy(STACK)), [painted(), LEFT * 0, painted().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]],
)  # fmt: skip
def test_a_region_can_have_one_mask_for_each_frame(pair, region):
    for subject in pair.inside(region).subjects:
        assert subject.region.dtype == torch.float32 and torch.equal(subject.region, torch.from_numpy(STACK).float())


@pytest.mark.parametrize(
    "region",
    [np.zeros((8, 8)), np.ones(8), "left", np.full((8, 8), np.nan), -LEFT, LEFT * 300, LEFT.astype(complex), LEFT.tolist(),
     [], [LEFT, LEFT[:4]], [STACK, STACK], [LEFT * 0] * 3, STACK * 0, STACK[None, :, None, None], np.zeros((0, 8)), None],
)  # fmt: skip
def test_a_region_that_is_not_a_mask_is_rejected(pair, region):
    with pytest.raises(ValueError, match="`region"):
        pair.inside(region)


@pytest.mark.parametrize("value", [1000.0, -1000.0])
def test_the_largest_tokens_that_can_be_loaded_do_not_overflow_in_half_precision(pipe, pair, tmp_path, value):
    subject = replace(pair.subjects[0], embeds=torch.full_like(pair.subjects[0].embeds, value))
    SubjectEmbeds((subject,)).save(tmp_path / "cat.safetensors")
    embeds = SubjectEmbeds.load(tmp_path / "cat.safetensors").subjects[0].embeds.half()
    projected = pipe.ssr_encoder.half().project(embeds)
    assert all(torch.isfinite(tensor).all() for each in projected for tensor in each)


def test_subjects_of_different_encoders_cannot_be_added(pipe, pair):
    pipe.register_modules(ssr_encoder=make_ssr_encoder(seed=9))
    with pytest.raises(ValueError, match="different SSR-Encoders"):
        pair + pipe.encode_subject(make_picture(), "cat")
    with pytest.raises(TypeError):
        pair + 1


@pytest.mark.parametrize("unknown", ["first", "second", "both"])
def test_a_sum_has_the_fingerprint_of_its_parts(pair, unknown):
    parts = [replace(pair, fingerprint=None) if unknown in (which, "both") else pair for which in ("first", "second")]
    assert (parts[0] + parts[1]).fingerprint is (None if unknown == "both" else pair.fingerprint)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("change,same", [(1.02, True), (1.2, False), (-1.0, False)])
def test_fingerprints_are_compared_row_by_row(row, change, same):
    """A difference in one row is found even if another row has larger numbers."""
    first = torch.tensor([[1.0], [100.0]]).expand(2, 8)
    second = first.clone()
    second[row] *= change
    assert same_fingerprint(first, second) is same_fingerprint(second, first) is same
    assert not same_fingerprint(first, first[:1])


def test_a_subclass_can_be_added(pair):
    class Mine(SubjectEmbeds):
        pass

    both = pair + Mine(pair.subjects, pair.fingerprint)
    assert len(both.subjects) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_depends_on_the_encoder_but_not_on_its_dtype(dtype):
    encoder = make_ssr_encoder()
    fingerprint = encoder.fingerprint()
    rough = encoder.to(dtype).fingerprint()
    assert same_fingerprint(fingerprint, rough) and (rough.dtype, rough.device.type) == (torch.float32, "cpu")
    assert not same_fingerprint(fingerprint, make_ssr_encoder(seed=5).fingerprint())
    changed = make_ssr_encoder()
    next(iter(changed.layers.values()))["to_v"].weight.data *= 2
    assert not same_fingerprint(fingerprint, changed.fingerprint())


def test_saving_to_a_missing_folder_raises_an_error_that_names_it(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "missing" / "pair.safetensors")):
        pair.save(tmp_path / "missing" / "pair.safetensors")


# Merging tokens with Ward's criterion, compared with a search over all pairs


def merged_by_hand(tokens: list[torch.Tensor], counts: list[float], number: int) -> list[tuple[float, torch.Tensor]]:
    groups = list(zip(counts, tokens, strict=True))
    while len(groups) > number:

        def cost(pair):
            (m, a), (n, b) = groups[pair[0]], groups[pair[1]]
            return (m * n / (m + n) * (a - b).square().sum()).item()

        i, j = min(itertools.combinations(range(len(groups)), 2), key=cost)
        (m, a), (n, b) = groups[i], groups[j]
        groups[i] = (m + n, (m * a + n * b) / (m + n))
        del groups[j]
    return groups


@pytest.mark.parametrize("number", [1, 4, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_two_most_similar_tokens_are_merged(number, weighted):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 12, 5, generator=generator)
    counts = torch.randint(1, 9, (1, 12), generator=generator).float() if weighted else None
    merged, sizes = subject_embeds_ssr._merge_tokens(embeds, counts, number)
    given = [1.0] * 12 if counts is None else counts[0].tolist()
    expected = merged_by_hand(list(embeds[0].double()), given, number)
    assert merged.shape == (1, number, 5) and sizes.tolist()[0] == [size for size, _ in expected]
    torch.testing.assert_close(merged[0], torch.stack([token for _, token in expected]).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merging_equal_tokens_does_not_change_the_attention(dtype):
    """A token with count n has the same effect as n equal tokens, because log(n) is added to its logit."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(1, 6, 8, generator=generator)
    many = few[:, [0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5]]
    merged, counts = subject_embeds_ssr._merge_tokens(many.to(dtype), None, 6)
    assert merged.dtype == dtype and counts.dtype == torch.float32
    query = torch.randn(1, 3, 8, generator=generator)

    def attend(tokens, bias=None):
        return torch.nn.functional.scaled_dot_product_attention(query, tokens, tokens, attn_mask=bias)

    expected = attend(many.to(dtype).float())
    torch.testing.assert_close(attend(merged.float(), counts.log()[:, None]), expected, atol=1e-2, rtol=1e-2)


# Boxes


HALF = np.repeat([[1.0] * 128 + [0.0] * 128], 256, 0)


@pytest.mark.parametrize(
    "region, expected",
    [
        ((0, 0, 0.5, 1), HALF),
        ([0.0, 0.0, 0.5, 1.0], HALF),
        ([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], np.stack([HALF, HALF[:, ::-1]])),
        ({0: (0, 0, 0.5, 1), 2: (0.5, 0, 1, 1)}, np.stack([HALF, np.roll(HALF, 64, 1), HALF[:, ::-1]])),
        ({1: (0, 0, 0.5, 1)}, np.stack([HALF, HALF])),
        ({np.int64(1): (0, 0, np.float32(0.5), 1)}, np.stack([HALF, HALF])),
    ],
    ids=["tuple", "list", "one for each frame", "keyframes", "one keyframe", "numpy"],
)
def test_regions_as_boxes(pair, region, expected):
    for subject in pair.inside(region).subjects:
        assert torch.equal(subject.region, torch.from_numpy(expected.copy()).float())


@pytest.mark.parametrize(
    "region",
    [(0, 0, 0, 1), (0.5, 0, 0.2, 1), (0, 0, 2, 1), (0, -0.1, 1, 1), (0, 0, 1, np.nan), (0, 0, 1), [(0, 0, 1, 1), LEFT],
     {}, {-1: (0, 0, 1, 1)}, {0: LEFT}, {"0": (0, 0, 1, 1)}, {0: (0, 0, 1, 2)}],
)  # fmt: skip
def test_boxes_that_cannot_be_regions_are_rejected(pair, region):
    with pytest.raises(ValueError, match="`region"):
        pair.inside(region)


def test_a_stack_with_color_channels_is_explained(pair):
    with pytest.raises(ValueError, match=r"`region`.*\(8, 8, 8, 3\): pass one color channel"):
        pair.inside(np.ones((8, 8, 8, 3)))


# A container of subjects


def test_len_indexing_and_iteration(pair):
    assert len(pair) == 2 and [part.subjects for part in pair] == [(subject,) for subject in pair.subjects]
    assert pair[-1].subjects == pair.subjects[1:] and pair[:1].subjects == pair.subjects[:1]
    assert pair[0].fingerprint is pair.fingerprint and sum(pair).subjects == pair.subjects
    with pytest.raises(IndexError):
        pair[2]
    with pytest.raises(IndexError):
        pair[2:]


def test_equality_is_identity(pair):
    assert pair == pair and pair != replace(pair) and len({pair, replace(pair)}) == 2


def test_to(pair):
    moved = pair.to(dtype=torch.bfloat16).to("meta")
    for subject, before in zip(moved.subjects, pair.subjects, strict=True):
        assert subject.embeds.dtype == subject.negative_embeds.dtype == torch.bfloat16
        assert subject.embeds.device.type == "meta" and subject.scale == before.scale
    assert pair.subjects[0].embeds.dtype == torch.float32


def test_scaled_replaces_the_scale(pair):
    assert [subject.scale for subject in pair.scaled(0.5).scaled(0.5).subjects] == [0.5, 0.5]


def test_mean(pair):
    other = replace(pair, subjects=tuple(replace(s, embeds=3 * s.embeds, query="x", scale=0.1) for s in pair.subjects))
    mean = SubjectEmbeds.mean([pair, other])
    for subject, first in zip(mean.subjects, pair.subjects, strict=True):
        torch.testing.assert_close(subject.embeds, 2 * first.embeds)
        torch.testing.assert_close(subject.negative_embeds, first.negative_embeds)
        assert (subject.query, subject.scale) == (first.query, first.scale)
    assert mean.fingerprint is pair.fingerprint


@pytest.mark.parametrize(
    "subjects, message",
    [
        (lambda pair: [], "with at least one"),
        (lambda pair: [pair, None], "list of SubjectEmbeds"),
        (lambda pair: [pair, pair[0]], "the same numbers of subjects"),
        (lambda pair: [pair.compact(3), pair.compact(3)], "not to be compact"),
        (lambda pair: [pair, replace(pair, fingerprint=pair.fingerprint + 9)], "different SSR-Encoders"),
    ],
)
def test_subjects_without_a_mean_are_rejected(pair, subjects, message):
    with pytest.raises(ValueError, match=message):
        SubjectEmbeds.mean(subjects(pair))
