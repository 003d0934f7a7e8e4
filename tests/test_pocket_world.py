"""The scenes that the pocket checkpoint is trained on: what varies, and what must not vary."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tools.pocket import world as world_module
from tools.pocket.scenes import SceneStream
from tools.pocket.world import (
    ALL_DESIGNS,
    CHOOSING,
    DESIGN_SETS,
    ICON_INSTANCES,
    INSTANCES,
    NUM_VARIANTS,
    ROUND,
    SIMPLE,
    SIZE,
    SPLITS,
    Instance,
    World,
    _code_points,
    arrange,
    download_icons,
    draw_scene,
    instances_of,
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
def test_things_are_inside_the_image_and_overlap_only_partly(count):
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


def test_the_older_splits_have_not_changed():
    """The figures of pocket/README.md are those of `wide`, whose instances and random draws must stay the same."""
    assert [(len(seen), len(held_out)) for seen, held_out in (SPLITS["first"], SPLITS["wide"])] == [
        (324, 108),
        (288, 144),
    ]
    assert not CHOOSING["wide"] and instances_of("wide") == INSTANCES
    assert all(each.design < SIMPLE for each in INSTANCES)


def test_the_split_sets_holds_out_a_design_of_each_category():
    seen, held_out = SPLITS["sets"]
    assert set(seen) | set(held_out) | set(CHOOSING["sets"]) == set(INSTANCES + ICON_INSTANCES)
    assert len(seen) + len(held_out) + len(CHOOSING["sets"]) == len(INSTANCES + ICON_INSTANCES)
    assert {each.category for each in held_out if each.design == ROUND} == set(range(12))
    assert not any(each.design == ROUND for each in seen + CHOOSING["sets"])
    # what chooses a checkpoint has unseen designs and colours of its own
    seen_designs = {(each.category, each.design) for each in seen}
    assert len({(each.category, each.design) for each in CHOOSING["sets"]} - seen_designs) == 4
    assert set(CHOOSING["sets"]) < set(SPLITS["wide"][1])


def test_other_emoji_have_the_designs_of_the_split(world):
    (world.folder / "simple").mkdir(exist_ok=True)
    Image.new("RGBA", (8, 8), "red").save(world.folder / "simple" / "1f004.png")
    drawn = {
        split: {world.draw_other(np.random.default_rng(seed), split=split).design for seed in range(40)}
        for split in ("wide", "sets")
    }
    assert drawn == {"wide": {0, 1, 2}, "sets": {0, 1, 2, SIMPLE}}


def test_icons_are_found_by_name_and_written_as_images(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    (tmp_path / "others.json").write_text(
        '{"others": {"1f004": "mahjong", "1f469-200d-1f52c": "scientist"}, "kin": {}}'
    )
    body = '<path fill="#f00" d="M0 0h4v4H0z"/>'
    names = ("cat-face", "cat", "mahjongtiledragon", "mahjong", "housebuilding", "woman-light-skin-tone", "woman")
    (tmp_path / "icons.json").write_text(
        json.dumps({"width": 4, "height": 4, "icons": {n: {"body": body} for n in names}})
    )

    def pack(package, folder):
        with tarfile.open(folder / "icons.tgz", "w:gz") as tar:
            tar.add(tmp_path / "icons.json", "package/icons.json")
        return folder / "icons.tgz"

    monkeypatch.setattr(world_module, "_pack", pack)
    download_icons(tmp_path)
    found = {design: {file.stem for file in (tmp_path / design).iterdir()} for design in ALL_DESIGNS[SIMPLE:]}
    assert found == {"simple": {"1f431", "1f004", "1f3e0"}, "round": {"1f431", "1f004", "1f3e0", "1f469-1f3fb"}}
    with Image.open(tmp_path / "round" / "1f431.png") as picture:
        assert picture.size == (128, 128) and picture.convert("RGBA").getpixel((64, 64)) == (255, 0, 0, 255)
