"""The training set of the pocket world: many scenes of seen instances, drawn once and kept in one file."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .world import INSTANCES, SEEN, Instance, World, download_designs, draw_instances, draw_scene


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
            grid = mask.reshape(PATCHES, 64 // PATCHES, PATCHES, 64 // PATCHES).mean((1, 3))
            cover[index, slot] = (grid * 255).round()
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
