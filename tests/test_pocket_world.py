"""The scenes that the pocket checkpoint is trained on: what varies, and what must not vary."""

import numpy as np
import pytest
from PIL import Image

from tools.pocket.scenes import SceneStream
from tools.pocket.world import (
    DESIGN_SETS,
    INSTANCES,
    NUM_VARIANTS,
    SIZE,
    SPLITS,
    Instance,
    World,
    _code_points,
    arrange,
    draw_scene,
    load_split,
    restyled,
    varied,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Design sets of red discs with a dark spot on the left."""
    folder = tmp_path_factory.mktemp("designs")
    y, x = np.mgrid[:32, :32] - 15.5
    disc = np.zeros((32, 32, 4), np.uint8)
    disc[np.hypot(x, y) < 14] = (220, 30, 30, 255)
    disc[np.hypot(x + 7, y) < 4] = (30, 30, 30, 255)
    for name, (_, _, ending, _) in DESIGN_SETS.items():
        (folder / name).mkdir()
        for code in [*_code_points(), "1f004"]:
            Image.fromarray(disc).save(folder / name / f"{code}.{ending}", lossless=True)
    (folder / "others.json").write_text('{"others": {"1f004": "mahjong"}, "kin": {}}')
    return World(folder)


def test_a_varied_instance_keeps_the_name_of_its_colour():
    """The hue stays in the colour's twelfth of the colour wheel, so held-out colours do not occur in training."""
    rng = np.random.default_rng(0)
    for instance in INSTANCES[::7]:
        other = varied(rng, instance, flip=True)
        assert other.words == instance.words
        if instance.hue is not None:
            off = (other.hue - instance.variant / NUM_VARIANTS + 0.5) % 1 - 0.5
            assert abs(off) <= 0.5 / NUM_VARIANTS and other.hue != instance.hue


def test_people_are_not_recoloured():
    woman = next(instance for instance in INSTANCES if instance.hue is None)
    other = varied(np.random.default_rng(0), woman)
    assert (other.saturation, other.lightness, other.shift) == (1, 1, 0)


def test_sprites_have_the_hue_and_mirroring_of_the_instance(world):
    red, cyan = (Instance(0, 0, variant) for variant in (0, 6))
    pixels = [world.sprite(each)[32, 40, :3].astype(int) for each in (red, cyan)]
    assert pixels[0][0] > pixels[0][2] + 100 and pixels[1][2] > pixels[1][0] + 100
    mirrored = world.sprite(Instance(0, 0, 0, flipped=True))
    assert np.array_equal(mirrored, world.sprite(red)[:, ::-1]) and not np.array_equal(mirrored, world.sprite(red))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_things_are_inside_the_picture_and_overlap_only_partly(count):
    rng = np.random.default_rng(0)
    overlapping = 0
    for _ in range(200):
        boxes = arrange(rng, count)
        assert all(0 <= x <= SIZE - side and 0 <= y <= SIZE - side and side >= 8 for x, y, side in boxes)
        spans = sorted((x, x + side) for x, _, side in boxes)
        shared = [max(a[1] - b[0], 0) / (b[1] - b[0]) for a, b in zip(spans, spans[1:], strict=False)]
        assert max(shared, default=0) < 0.6
        overlapping += max(shared, default=0) > 0.15
    assert (10 < overlapping < 100) == (count > 1)
    assert len({side for _ in range(20) for *_, side in arrange(rng, count)}) > 3


def test_a_mask_covers_only_the_visible_part(world):
    back, front = Instance(0, 0, 0), Instance(1, 0, 6)
    scenes = [
        draw_scene(world, np.random.default_rng(seed), [back, front], place=0, boxes=[(4, 10, 40), (24, 20, 40)])
        for seed in range(8)
    ]
    for scene in scenes:
        assert not (scene.masks[0] & scene.masks[1]).any()
        assert {int(mask.sum()) for mask in scene.masks} != {int(scene.masks[0].sum())}


def test_restyled_sprites_differ_and_keep_their_size(world):
    sprite = world.sprite(Instance(0, 0, 0))
    drawn = [restyled(np.random.default_rng(seed), sprite) for seed in range(12)]
    assert all(each.shape == sprite.shape and each.dtype == np.uint8 for each in drawn)
    assert len({each.tobytes() for each in drawn}) == 12
    cover = [(each[..., 3] > 127).mean() / (sprite[..., 3] > 127).mean() for each in drawn]
    assert 0.5 < min(cover) and max(cover) < 1.5


def test_a_stream_has_no_held_out_instances_and_no_repeated_scenes(world):
    stream = SceneStream(world, "wide", (0.3, 0.3, 0.2, 0.2), others_share=0.2, restyled_share=0.3)
    scenes = stream.draw(np.random.default_rng(0), 60)
    things = [thing for scene in scenes for thing in scene.instances]
    ours = [thing for thing in things if isinstance(thing, Instance)]
    grid = {Instance(thing.category, thing.design, thing.variant) for thing in ours}
    assert grid <= set(SPLITS["wide"][0]) and len(ours) < len(things)
    assert len({scene.picture.tobytes() for scene in scenes}) == 60
    assert {len(scene.instances) for scene in scenes} == {1, 2, 3, 4}
    again = stream.draw(np.random.default_rng(0), 60)
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(scenes, again, strict=True))


def test_load_split_reads_the_split_of_a_checkpoint(tmp_path):
    (tmp_path / "world.json").write_text('{"split": "wide"}')
    assert load_split(tmp_path) == "wide"
