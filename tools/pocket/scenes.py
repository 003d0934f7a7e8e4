"""The training scenes of the pocket world, drawn anew all the time."""

import numpy as np

from .world import (
    INSTANCES,
    LAYOUTS,
    SPLITS,
    Scene,
    World,
    arrange,
    draw_instances,
    draw_scene,
    varied,
)


PATCHES = 8  # the vision encoder's grid is PATCHES x PATCHES


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
        vary_colours (`bool`): whether hues are continuous.
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
        vary_colours: bool = True,
    ):
        self.world = world
        self.pool = INSTANCES if split == "all" else SPLITS[split][0]
        self.count_shares = np.array(count_shares) / sum(count_shares)
        self.varied_share = varied_share
        self.others_share = others_share
        self.kin_share = kin_share
        self.restyled_share = restyled_share
        self.vary_colours = vary_colours

    def draw(self, rng: np.random.Generator, count: int) -> list[Scene]:
        return [self.draw_one(rng) for _ in range(count)]

    def draw_one(self, rng: np.random.Generator) -> Scene:
        number = 1 + int(rng.choice(len(self.count_shares), p=self.count_shares))
        free = bool(rng.random() < self.varied_share) or number not in LAYOUTS
        things: list = draw_instances(rng, self.pool, number)
        if self.vary_colours:
            things = [varied(rng, each, flip=free) for each in things]
        for index in range(number):
            if rng.random() < self.others_share:
                things[index] = self.world.draw_other(rng)
            elif rng.random() < self.kin_share:
                things[index] = self.world.draw_other(rng, self.world.kin)
        boxes = arrange(rng, number) if free else None
        restyle = bool(rng.random() < self.restyled_share)
        return draw_scene(self.world, rng, things, boxes=boxes, restyle=restyle)


def draw_pictures(stream: SceneStream, count: int, seed: tuple[int, ...]) -> np.ndarray:
    """Pictures (count, 64, 64, 3) uint8 of a stream, the same for the same seed."""
    return np.stack([scene.picture for scene in stream.draw(np.random.default_rng(seed), count)])


def patch_cover(mask: np.ndarray) -> np.ndarray:
    """How much of each of the vision encoder's patches a mask (64, 64) covers, (8, 8) from 0 to 1."""
    return mask.reshape(PATCHES, 64 // PATCHES, PATCHES, 64 // PATCHES).mean((1, 3))
