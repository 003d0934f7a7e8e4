"""The training scenes of the pocket world: drawn anew all the time (`SceneStream`), or once and kept in one file (`load_scenes`)."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .world import (
    INSTANCES,
    LAYOUTS,
    SEEN,
    SPLITS,
    Instance,
    Scene,
    World,
    arrange,
    download_designs,
    draw_instances,
    draw_scene,
    varied,
)


PATCHES = 8  # the vision encoder's grid is PATCHES x PATCHES
COUNTS = (1, 2, 3)
COUNT_SHARES = (0.7, 0.25, 0.05)
POOLS = {"seen": SEEN, "all": INSTANCES}
NUMBER = {instance: index for index, instance in enumerate(INSTANCES)}


@dataclass
class Scenes:
    """pictures (n, 64, 64, 3) uint8; places (n,); instances (n, 3), numbers in `INSTANCES` or -1; cover (n, 3, 8, 8),
    how much of each patch (0 to 255) each instance covers."""

    pictures: np.ndarray
    places: np.ndarray
    instances: np.ndarray
    cover: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    def instances_of(self, row: int) -> list[Instance]:
        return [INSTANCES[number] for number in self.instances[row] if number >= 0]

    @property
    def counts(self) -> np.ndarray:
        return (self.instances >= 0).sum(1)


class SceneStream:
    """
    Scenes of seen instances without end, each other than all before: hues are continuous, and a share of the scenes has things of
    any size at any place (`arrange`), mirrored in half of the cases.

    Args:
        world ([`World`]): draws them.
        split (`str`): whose held-out instances stay unseen.
        count_shares (`tuple[float, ...]`): how often a scene holds one, two, three (and four) things.
        varied_share (`float`): of scenes that are arranged freely; the others stand where `LAYOUTS` says.
        others_share (`float`): of things that are none of the measured categories.
        kin_share (`float`): of the rest that are of a measured category in a picture of its own (`KIN`).
        restyled_share (`float`): of scenes that are drawn as by another hand.
    """

    def __init__(
        self,
        world: World,
        split: str = "wide",
        count_shares: tuple[float, ...] = (0.4, 0.5, 0.1),
        varied_share: float = 0.5,
        others_share: float = 0.0,
        kin_share: float = 0.0,
        restyled_share: float = 0.0,
    ):
        self.world = world
        self.pool = INSTANCES if split == "all" else SPLITS[split][0]
        self.count_shares = np.array(count_shares) / sum(count_shares)
        self.varied_share = varied_share
        self.others_share = others_share
        self.kin_share = kin_share
        self.restyled_share = restyled_share

    def draw(self, rng: np.random.Generator, count: int) -> list[Scene]:
        return [self.draw_one(rng) for _ in range(count)]

    def draw_one(self, rng: np.random.Generator) -> Scene:
        number = 1 + int(rng.choice(len(self.count_shares), p=self.count_shares))
        free = bool(rng.random() < self.varied_share) or number not in LAYOUTS
        things = [varied(rng, each, flip=free) for each in draw_instances(rng, self.pool, number)]
        for index in range(number):
            if rng.random() < self.others_share:
                things[index] = self.world.draw_other(rng)
            elif rng.random() < self.kin_share:
                things[index] = self.world.draw_other(rng, self.world.kin)
        boxes = arrange(rng, number) if free else None
        restyle = bool(rng.random() < self.restyled_share)
        return draw_scene(self.world, rng, things, boxes=boxes, restyle=restyle)


def patch_cover(mask: np.ndarray) -> np.ndarray:
    """How much of each of the vision encoder's patches a mask (64, 64) covers, (8, 8) from 0 to 1."""
    return mask.reshape(PATCHES, 64 // PATCHES, PATCHES, 64 // PATCHES).mean((1, 3))


def _draw(job) -> tuple[np.ndarray, ...]:
    designs, seed, count, pool = job
    world, rng = World(designs), np.random.default_rng(seed)
    pictures = np.empty((count, 64, 64, 3), np.uint8)
    places = np.empty(count, np.int64)
    instances = np.full((count, 3), -1, np.int64)
    cover = np.zeros((count, 3, PATCHES, PATCHES), np.uint8)
    for index in range(count):
        chosen = draw_instances(rng, POOLS[pool], int(rng.choice(COUNTS, p=COUNT_SHARES)))
        scene = draw_scene(world, rng, chosen)
        pictures[index], places[index] = scene.picture, scene.place
        for slot, (instance, mask) in enumerate(zip(scene.instances, scene.masks, strict=True)):
            instances[index, slot] = NUMBER[instance]
            cover[index, slot] = (patch_cover(mask) * 255).round()
    return pictures, places, instances, cover


def load_scenes(work_dir: str | Path, count: int = 24_000, seed: int = 0, pool: str = "seen") -> Scenes:
    """Scenes of `pool`'s instances, drawn at the first call (about two minutes) and read from `work_dir` afterwards.

    Everything is trained on "seen"; only the judge, which has to know what it judges, on "all".
    """
    work_dir = Path(work_dir)
    file = work_dir / f"scenes_{pool}_{count}_{seed}.npz"
    if not file.exists():
        designs = work_dir / "designs"
        download_designs(designs)
        size = 500
        jobs = [(designs, (seed, start), min(size, count - start), pool) for start in range(0, count, size)]
        with ProcessPoolExecutor() as pool:
            parts = list(tqdm(pool.map(_draw, jobs), total=len(jobs), desc="scenes"))
        partial = file.with_suffix(".part.npz")
        np.savez(
            partial,
            **{n: np.concatenate(p) for n, p in zip(Scenes.__annotations__, zip(*parts, strict=True), strict=True)},
        )
        partial.rename(file)
    with np.load(file) as stored:
        return Scenes(**stored)
