"""The measurements of the pocket checkpoint: intervals, and what an image shows by its pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from tools.pocket.judge import Judge, load_judge
from tools.pocket.measure.references import share
from tools.pocket.measure.shapes import nearest_by_pixels
from tools.pocket.world import DESIGN_SETS, Other, World, draw_scene


def bounds(text: str) -> list[float]:
    return [float(part.strip("( )")) for part in text.rpartition("designs")[2].split(" to ")]


def test_the_interval_over_designs_is_wider_if_designs_differ():
    designs = np.repeat(["a", "b", "c", "d"], 25)
    differing = np.concatenate([np.arange(25) < 25 * rate for rate in (0.3, 0.7, 0.8, 1.0)])
    text = share(differing, designs)
    assert text.startswith("71.0 % (61.5 to 79.0), over 4 designs (")
    low, high = bounds(text)
    # Student's t with three degrees of freedom: 71 +- 3.18 * 29 / 2 percent, kept inside 0 to 100 by Wilson's formula
    assert low < 40 and high > 90
    alike = bounds(share(np.arange(100) % 10 < 7, designs))
    assert alike[1] - alike[0] < 45


def test_the_interval_over_designs_of_perfect_results_counts_designs():
    assert bounds(share(np.ones(100), np.repeat(["a", "b", "c", "d"], 25)))[0] < 50
    assert share(np.ones(100)) == share(np.ones(100), np.repeat("a", 100))


@pytest.fixture
def world(tmp_path) -> World:
    """Design sets with a disc and shapes that differ from it."""
    y, x = np.mgrid[:32, :32] - 15.5
    shown = [np.hypot(x, y) < 14, (abs(x) < 5) | (abs(y) < 5), (x + y < 0), abs(y) < 6]
    for name, (_, _, ending, _) in DESIGN_SETS.items():
        (tmp_path / name).mkdir()
        for code, shape in enumerate(shown):
            rgba = np.zeros((32, 32, 4), np.uint8)
            rgba[shape] = (220, 30, 30, 255)
            Image.fromarray(rgba).save(tmp_path / name / f"{code}.{ending}", lossless=True)
    (tmp_path / "others.json").write_text(json.dumps({"others": {}, "kin": {}}))
    return World(tmp_path)


def test_the_nearest_thing_is_found_by_pixels_on_any_place(world):
    things = [Other(str(code), str(code), 0, 0.5) for code in range(4)]
    for place in range(6):
        rng = np.random.default_rng(place)
        own = place % 4
        shifted = draw_scene(world, rng, [things[own]], place, shift=(2, -2)).picture
        order = [things[own], *(each for each in things if each is not things[own])]
        assert nearest_by_pixels(world, shifted[None], [order]).all(), place
        assert not nearest_by_pixels(world, shifted[None], [order[::-1]]).any(), place


def test_a_judge_with_more_designs_is_loaded(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "judge").mkdir()
    save_file(Judge(5).state_dict(), tmp_path / "judge" / "model.safetensors")
    verdict = load_judge(tmp_path).look_at(np.zeros((2, 64, 64, 3), np.uint8))
    assert verdict.designs.shape == (2, 12, 5) and verdict.variants.shape == (2, 12, 12)
