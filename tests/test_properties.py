"""Properties that hold for arbitrary and untrusted inputs. hypothesis searches for counterexamples."""

import gzip
import json
import math
import tarfile
import tempfile
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import make_image_processor, make_ssr_encoder
from diffusers_ssr import SSREncoder, SubjectEmbeds
from diffusers_ssr.images_ssr import mask_values, postprocess_map, preprocess, preprocess_mask, to_mask, to_pil
from diffusers_ssr.internals_ssr import check_count, check_scale
from diffusers_ssr.subject_embeds_ssr import Subject
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from safetensors.torch import save_file
from test_modeling_ssr import TWO_LAYERS, small_released
from test_training_data import GOOD, PICTURE, TEXTS, entry
from text_files import read_rows
from training_data import Columns, Preparation, Samples, load_rows, read_shards, summary


settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("suite")

FLOATS = st.floats(-100, 100)
SIDES = st.integers(1, 6)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def tensors(draw, *shape: int, dtype=torch.float32):
    seed = draw(st.integers(0, 2**32))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def regions(draw):
    shape = draw(st.sampled_from([(5, 7), (1, 1), (2, 3, 4), (9, 1, 2)]))
    region = draw(tensors(*shape)).abs().clamp(0, 1)
    region.view(-1)[draw(st.integers(0, region.numel() - 1))] = 1.0
    return region


@st.composite
def subjects(draw):
    dtype, width = draw(DTYPES), draw(SIDES)
    each = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(SIDES)
        counts = draw(st.none() | st.just(torch.ones(1, length) * draw(st.floats(1, 100, width=32))))
        each.append(
            Subject(
                draw(tensors(1, length, width, dtype=dtype)),
                draw(tensors(1, length, width, dtype=dtype)),
                draw(st.text()),
                draw(st.none() | FLOATS),
                draw(st.none() | regions()),
                counts,
                counts,
            )
        )
    return SubjectEmbeds(tuple(each), draw(st.none() | tensors(4, 8)))


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    return first == second


@pytest.fixture(scope="module")
def file():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "file"


@given(subject=subjects())
def test_a_loaded_subject_equals_the_saved_one(subject, file):
    subject.save(file)
    loaded = SubjectEmbeds.load(file)
    assert same(loaded.fingerprint, subject.fingerprint) and len(loaded.subjects) == len(subject.subjects)
    for first, second in zip(loaded.subjects, subject.subjects, strict=True):
        assert all(same(vars(first)[name], vars(second)[name]) for name in vars(second))
    assert "\n" not in repr(loaded) and len(repr(loaded)) < 800


@settings(max_examples=150)
@given(subject=subjects(), data=st.data())
def test_a_corrupted_file_is_rejected_or_still_a_valid_subject(subject, data, file):
    """Bytes are overwritten, removed or added at any place. If the file can still be loaded, the result is valid and
    can be saved."""
    subject.save(file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(content) - 1, 0)))
        content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    file.write_bytes(content)
    try:
        loaded = SubjectEmbeds.load(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert all(torch.isfinite(each.embeds).all() for each in loaded.subjects)
        loaded.save(file)
        SubjectEmbeds.load(file)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda each: (
    st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(["query", "scale", "dtype", "shape", "data_offsets"]), each)
), max_leaves=6)  # fmt: skip


@settings(max_examples=100)
@given(
    header=st.dictionaries(st.sampled_from(["__metadata__", "0.embeds", "0.negative_embeds", "fingerprint"]), JSON)
    | JSON
)
def test_an_arbitrary_header_is_rejected(header, file):
    content = json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + b"\0" * 64)
    with pytest.raises(ValueError, match="`path`: .*cannot be used as a file of subjects"):
        SubjectEmbeds.load(file)


ANY_ARRAY = npst.arrays(
    st.one_of(npst.boolean_dtypes(), npst.integer_dtypes(), npst.unsigned_integer_dtypes(), npst.floating_dtypes(),
              npst.complex_number_dtypes(), npst.unicode_string_dtypes(max_len=2)),
    npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=12),
)  # fmt: skip


@settings(max_examples=150)
@given(array=ANY_ARRAY)
@example(array=np.full((8, 8, 3), 2**15, np.uint16))
@example(array=np.zeros((2, 0, 3), bool))
@example(array=np.zeros((0, 2, 4), bool))
def test_any_array_is_a_mask_or_rejected(array):
    for function in (mask_values, to_pil, lambda mask, name: to_mask(mask, (8, 8), name)):
        try:
            found = function(array, "given")
        except ValueError as error:
            assert "`given`" in str(error)
        else:
            if function is mask_values:
                assert found.dtype == np.float32 and found.ndim in (2, 3) and 0 <= found.min() <= found.max() <= 1
            else:
                assert isinstance(found, Image.Image)


@given(
    mask=npst.arrays(bool, (8, 8)), top=st.sampled_from([1, 255, 65535]), dims=st.integers(0, 3), last=st.booleans()
)
def test_a_mask_has_the_same_values_in_all_formats(mask, top, dims, last):
    values = mask.astype(np.uint16) * top
    expected = mask.astype(np.float32)
    disguised = values.reshape((1,) * dims + (8, 8) + (1,) * last)
    if dims + last <= 3:
        assert np.array_equal(mask_values(disguised), expected)
        assert np.array_equal(mask_values(torch.from_numpy(disguised.astype(np.int64).clip(0, 255))) > 0, mask)
    assert np.array_equal(mask_values(Image.fromarray(values)), expected)


@given(width=st.integers(8, 200), height=st.integers(8, 200), mode=st.sampled_from(["pad", "crop"]))
def test_preprocessing_and_postprocessing_of_all_sizes(width, height, mode):
    if max(width, height) > 16 * min(width, height):
        return
    picture, processor = Image.new("RGB", (width, height), "gray"), make_image_processor()
    assert preprocess(picture, processor, mode).shape == (1, 3, 32, 32)
    assert preprocess_mask(picture.convert("L"), processor, mode).shape == (1, 1, 32, 32)
    assert postprocess_map(torch.ones(2, 4, 4), (width, height), mode).shape == (2, height, width)


@given(number=st.one_of(st.floats(), st.integers(), st.fractions(), st.booleans(), st.text(max_size=3), st.none(),
                        st.complex_numbers()))  # fmt: skip
def test_numbers_of_all_libraries_are_treated_alike(number):
    def outcome(function, value):
        try:
            return function("x", value)
        except ValueError as error:
            assert "`x`" in str(error)
            return None

    scale = outcome(check_scale, number)
    usable = not isinstance(number, (bool, str, complex, type(None))) and abs(number) <= 100
    assert (scale is not None) == usable and (scale is None or math.isclose(scale, number))
    if isinstance(number, float):
        assert (
            outcome(check_scale, np.float64(number))
            == outcome(check_scale, torch.tensor(number, dtype=torch.float64))
            == scale
        )
    if isinstance(number, int) and not isinstance(number, bool) and abs(number) < 2**62:
        count = number if number > 0 else None
        assert outcome(check_count, np.int64(number)) == outcome(check_count, torch.tensor(number)) == count


@pytest.fixture(scope="module")
def encoder_folder():
    with tempfile.TemporaryDirectory() as folder:
        make_ssr_encoder().save_pretrained(folder)
        yield Path(folder)


@settings(max_examples=100)
@given(position=st.floats(0, 1), content=st.binary(min_size=1, max_size=9), in_header=st.booleans())
def test_an_encoder_with_any_changed_bytes_is_loaded_or_rejected(position, content, in_header, encoder_folder):
    weights = encoder_folder / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    length = 8 + int.from_bytes(before[:8], "little") if in_header else len(before)
    start = int(position * length)
    weights.write_bytes(before[:start] + content + before[start + len(content) :])
    try:
        loaded = SSREncoder.from_pretrained(encoder_folder)
        assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())
    except (OSError, ValueError) as error:
        assert str(encoder_folder) in str(error)
    finally:
        weights.write_bytes(before)


VALUES = st.builds(
    lambda shape, value, dtype: torch.full(shape, value, dtype=torch.float64).to(dtype),
    st.lists(st.sampled_from([0, 1, 16, 32]), max_size=3),
    st.sampled_from([0.5, 1e300, float("nan"), float("inf")]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]),
)


@given(argument=st.sampled_from(["aligner", "layers"]), ending=st.sampled_from(["bin", "safetensors"]), data=st.data())
def test_any_released_weights_are_loaded_or_rejected(argument, ending, data, file):
    _, *released = small_released()
    given_weights = dict(zip(("aligner", "layers"), released, strict=True))
    content = {name: tensor.detach().clone() for name, tensor in given_weights[argument].items()}
    names = st.sampled_from(sorted(content)) | st.text(max_size=6)
    content.update(data.draw(st.dictionaries(names, VALUES, max_size=2)))
    removed = data.draw(st.none() | st.sampled_from(sorted(content)))
    content.pop(removed, None)
    given_weights[argument] = file.with_suffix(f".{ending}")
    (torch.save if ending == "bin" else save_file)(content, given_weights[argument])
    try:
        loaded = SSREncoder.from_released(**given_weights, **TWO_LAYERS)
        assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())
    except ValueError as error:
        assert f"`{argument}`" in str(error)


@settings(max_examples=100)
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".csv", ".jsonl"]))
def test_any_bytes_give_rows_or_reasons(content, suffix, file):
    table = file.with_suffix(suffix)
    table.write_bytes(content)
    try:
        assert all(isinstance(row, (dict, str)) for _, row in read_rows(table))
    except ValueError as error:
        assert "workbook" in str(error) and content.startswith(b"PK")


# what a stranger's row can hold: any JSON, and the names of files in all forms
OUTSIDE = st.sampled_from(["/etc/hostname", "../outside.png", "file:///etc/hostname", "outside.png", "good.png", "/dev/zero",
                           "http://localhost:9/a.png", "", ".", "\ud83d.png", "\0"])  # fmt: skip
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | OUTSIDE
FILES = st.dictionaries(st.sampled_from(["path", "bytes"]), OUTSIDE, min_size=1)
JSON_CELL = st.recursive(
    LEAF | FILES, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from("ab"), each), max_leaves=4
)
CELL = LEAF | FILES | st.lists(LEAF | FILES, max_size=3) | JSON_CELL
PARTS = ["image", "text", "query", "reference", "mask", "file_name", "mask_file_name", "reference_file_name", "_file_name",
         "image.0", "query.1", "reference.1", "__key__", "__error__", "__error___file_name", "__url__"]  # fmt: skip
PICTURES = st.dictionaries(
    st.sampled_from(["image", "reference", "mask"]), FILES | st.lists(FILES, max_size=2), max_size=1
)
ROWS = st.dictionaries(st.sampled_from(PARTS), CELL, max_size=6) | PICTURES


@pytest.fixture(scope="module")
def training_set():
    """A folder with an image, and with another image beside the folder."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "set"
        folder.mkdir()
        (folder / "good.png").write_bytes(PICTURE)
        (Path(parent) / "outside.png").write_bytes(PICTURE)
        yield folder


@settings(max_examples=100)
@given(row=ROWS, whole=st.booleans(), kind=st.sampled_from(["metadata.jsonl", "0.tar"]))
@example(row={"image": {"path": "/etc/hostname"}}, whole=True, kind="metadata.jsonl")
@example(row={"mask": {"bytes": "file:///etc/hostname"}}, whole=True, kind="0.tar")
@example(row={"file_name": "\ud83d.png"}, whole=True, kind="metadata.jsonl")
def test_any_json_in_a_training_set_is_a_sample_or_named(row, whole, kind, training_set):
    """`whole` adds what a sample needs to the row, so that the other values meet more of the code."""
    if whole:
        row = {**TEXTS, "reference_file_name": "good.png", "file_name": "good.png", **row}
    file = training_set / kind
    if kind == "0.tar":
        pictures = entry("0.png", PICTURE) + entry("0.reference.png", PICTURE)
        good = GOOD + entry("good.reference.png", PICTURE)
        file.write_bytes(pictures * whole + entry("0.json", json.dumps(row).encode()) + good)
    else:
        good = {**TEXTS, "file_name": "good.png", "reference_file_name": "good.png"}
        file.write_text(f"{json.dumps(row)}\n{json.dumps(good)}\n")
    prepare = Preparation(Columns(reference="reference", mask="mask"), make_image_processor(), 16, 16)
    try:
        with patch("builtins.open", wraps=open) as opened:
            samples = Samples(load_rows(training_set), prepare, buffer_size=1)
            assert len(list(islice(samples, 4))) == 4
    finally:
        file.unlink()
    assert len(samples.bad) <= 1
    summary(samples.bad).encode()
    images = [
        call.args[0] for call in opened.call_args_list if str(call.args[0]).endswith((".png", "hostname", "zero"))
    ]
    assert all(Path(image).is_relative_to(training_set) for image in images)


@settings(max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["tar", "gz"]))
def test_a_corrupted_shard_is_read_or_named(data, kind, training_set):
    """Bytes are overwritten, removed or added at any place."""
    content = bytearray(GOOD + entry("a.png", PICTURE) + entry("a.json", b"{}") + entry("b/", kind=tarfile.DIRTYPE))
    content = bytearray(gzip.compress(content)) if kind == "gz" else content
    # the headers are at the start of a block
    place = st.integers(0, len(content) - 1) | st.integers(0, len(content) // 512 - 1).map(lambda block: 512 * block)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(place) + data.draw(st.integers(0, 160))
        content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    file = training_set / "0.tar"
    file.write_bytes(content)
    rows = list(read_shards([str(file)]))
    file.unlink()
    assert rows and all(isinstance(row, dict) and row.get("__url__", row["__key__"]) == str(file) for row in rows)
