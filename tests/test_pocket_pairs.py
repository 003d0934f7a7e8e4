"""The training pairs of the pocket checkpoint, as a Parquet file and as arrays."""

import io
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import Columns, Preparation
from transformers import CLIPImageProcessor

from tools.pocket.drawn_pairs import DrawnSamples, write_arrays
from tools.pocket.train.pairs import Rows, rows
from tools.pocket.world import CATEGORY_NAMES, DESIGN_SETS, DESIGNS, SPLITS, Instance, _code_points


@pytest.fixture(scope="module")
def designs(tmp_path_factory):
    """Design sets of plain squares."""
    folder = tmp_path_factory.mktemp("designs")
    for number, (name, (_, _, ending, _)) in enumerate(DESIGN_SETS.items()):
        (folder / name).mkdir()
        for index, code in enumerate([*_code_points(), "1f004"]):
            Image.new("RGBA", (16, 16), (index * 10, 40 + number * 80, 120, 255)).save(
                folder / name / f"{code}.{ending}"
            )
    (folder / "others.json").write_text('{"others": {"1f004": "mahjong"}, "kin": {}}')
    return folder


def test_pairs_depend_only_on_their_number_and_the_seed(designs):
    together, alone = list(rows(str(designs), [0, 1, 2], 7)), list(rows(str(designs), [2], 7))
    assert together[2] == alone[0]
    assert together[2] != next(rows(str(designs), [2], 8))


def test_kinds_of_pairs_and_no_colours_in_texts(designs):
    pairs = list(rows(str(designs), list(range(120)), 0))
    kinds = {"two": 0, "masked": 0, "without a query": 0, "absent": 0}
    for pair in pairs:
        pictures = [Image.open(io.BytesIO(each["bytes"])) for each in (pair["image"], *pair["reference"])]
        assert all(picture.size == (64, 64) for picture in pictures)
        assert len(pair["reference"]) == len(pair["query"]) == len(pair["mask"]) in (1, 2)
        words = " ".join([pair["text"], *(query or "" for query in pair["query"])]).split()
        assert not any(word in words for word in ("red", "blue", *DESIGNS))
        assert all(query or mask for query, mask in zip(pair["query"], pair["mask"], strict=True))
        kinds["two"] += len(pair["query"]) == 2
        kinds["masked"] += any(pair["mask"])
        kinds["without a query"] += not all(pair["query"])
        (first, *_), (mask, *_) = pair["query"], pair["mask"]
        kinds["absent"] += not mask and "a thing" not in pair["text"] and first.split()[-1] not in pair["text"]
    assert all(count >= 5 for count in kinds.values()), kinds
    assert 12 <= kinds["two"] <= 40 and kinds["absent"] <= 20


@pytest.mark.parametrize(
    "shares",
    [
        {"two_share": 1.0, "absent_share": 0.0},
        {"two_share": 0.0, "absent_share": 0.0, "masked_share": 0.0},
        {"two_share": 0.0, "absent_share": 0.0, "masked_share": 1.0},
        {"two_share": 0.0, "absent_share": 1.0},
    ],
)
def test_shares_of_the_kinds_of_pairs(designs, shares):
    pairs = list(rows(str(designs), list(range(20)), 0, **shares))
    assert all(len(pair["query"]) == 1 + shares["two_share"] for pair in pairs)
    masked = sum(pair["mask"][0] is not None for pair in pairs)
    if shares["absent_share"]:
        assert masked == 0
    elif "masked_share" in shares:
        # things that are hidden behind another one are never masked
        assert masked == 0 if shares["masked_share"] == 0 else masked >= 15


def test_a_target_shows_the_queried_things_and_no_held_out_instance(designs):
    """The target shows the queried thing of each of two references, and all instances belong to the training split."""
    drawing, rng = Rows(str(designs), "wide"), np.random.default_rng(3)
    drawn = []
    original = drawing.world.paste
    drawing.world.paste = lambda canvas, thing, *rest: drawn.append(thing) or original(canvas, thing, *rest)
    for _ in range(20):
        drawn.clear()
        row = drawing.two(rng)
        target = drawn[-2:]
        assert {name for name in row["text"].split() if name in CATEGORY_NAMES} <= {thing.name for thing in target}
        grid = [
            replace(t, shift=0.0, saturation=1.0, lightness=1.0, flipped=False)
            for t in drawn
            if isinstance(t, Instance)
        ]
        assert set(grid) <= set(SPLITS["wide"][0])
        for thing in target:
            assert sum(replace(each, flipped=False) == thing for each in drawn if isinstance(each, Instance)) >= 2


def test_subjects_and_absent_things_can_be_other_emoji(designs):
    drawing = Rows(str(designs), "wide", other_subjects_share=1.0, others_share=0.0)
    rng = np.random.default_rng(0)
    for _ in range(10):
        row = drawing.one(rng)
        assert "mahjong" in (row["query"][0] or "mahjong") or row["mask"][0] is not None
        assert "mahjong" in row["text"] or "thing" in row["text"]
        row = drawing.absent(rng)
        assert "mahjong" in row["query"][0] and "mahjong" not in row["text"]


@pytest.fixture(scope="module")
def arrays(designs, tmp_path_factory):
    """Seven rows of all kinds, as arrays that two processes wrote."""
    folder = tmp_path_factory.mktemp("arrays")
    write_arrays(folder, partial(Rows, str(designs), "wide", two_share=0.4), 7, 3, 2)
    return folder


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})


def test_samples_of_arrays_are_those_of_the_parquet_file(designs, arrays, processor):
    """`train_ssr.py` gets the same pixels, masks, captions and queries from both."""
    columns = Columns(reference="reference", mask="mask")
    prepare = Preparation(columns, processor, 64, mask_query="empty")
    expected = [prepare(row) for row in rows(str(designs), list(range(7)), 3, two_share=0.4)]
    samples = DrawnSamples(arrays, processor)
    order = np.random.default_rng([0, 0]).permutation(7)
    for number, sample in zip(order, samples, strict=False):
        wanted = expected[number]
        assert sample["caption"] == wanted["caption"] and sample["queries"] == wanted["queries"]
        torch.testing.assert_close(sample["pixel_values"], wanted["pixel_values"])
        torch.testing.assert_close(sample["reference_values"], wanted["reference_values"])
        for mask, own in zip(wanted["masks"], sample["masks"], strict=True):
            assert (mask is None) == (own is None)
            assert mask is None or torch.equal(mask, own)
    assert {len(each["queries"]) for each in expected} == {1, 2}


def test_samples_of_arrays_go_on_from_their_position(arrays, processor):
    def captions(samples, count):
        return [sample["caption"] for sample in itertools.islice(samples, count)]

    samples = DrawnSamples(arrays, processor, seed=5)
    first = captions(samples, 10)
    assert samples.position == (1, 3)
    rest = captions(DrawnSamples(arrays, processor, 5, samples.position), 6)
    assert captions(DrawnSamples(arrays, processor, seed=5), 16) == first + rest
    # every epoch has all rows
    assert sorted(first[:7]) == sorted((first + rest)[7:14])
