"""The training scenes of the pocket world. New scenes are generated continuously."""

import numpy as np

from .world import INSTANCES, LAYOUTS, SPLITS, Scene, World, arrange, draw_instances, draw_scene, varied


PATCHES = 8  # the vision encoder's grid is PATCHES x PATCHES


class SceneStream:
    """
    An endless stream of scenes with seen instances. Scenes practically never repeat: hues are continuous, and in a
    share of the scenes the things have random sizes and positions (`arrange`), and half of them are mirrored.

    Args:
        world ([`World`]): draws the scenes.
        split (`str`): the split of instances. Its held-out instances are not drawn.
        count_shares (`tuple[float, ...]`): the relative frequency of scenes with one, two, three (and four) things.
        varied_share (`float`): the share of scenes with random positions; the other scenes use `LAYOUTS`.
        others_share (`float`): the share of things that are not of a measured category.
        kin_share (`float`): the share of the remaining things that are other images of a measured category (`KIN`).
        restyled_share (`float`): the share of scenes that are drawn in another style (`restyled`).
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
        self.split = split
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
                things[index] = self.world.draw_other(rng, split=self.split)
            elif rng.random() < self.kin_share:
                things[index] = self.world.draw_other(rng, self.world.kin)
        boxes = arrange(rng, number) if free else None
        restyle = bool(rng.random() < self.restyled_share)
        return draw_scene(self.world, rng, things, boxes=boxes, restyle=restyle)


def draw_pictures(stream: SceneStream, count: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns uint8 images of shape (count, 64, 64, 3) from a stream. The same seed gives the same images."""
    return np.stack([scene.picture for scene in stream.draw(np.random.default_rng(seed), count)])


def patch_cover(mask: np.ndarray) -> np.ndarray:
    """Returns how much of each patch of the vision encoder is covered by a mask of shape (64, 64). The result has
    shape (8, 8), with values from 0 to 1."""
    return mask.reshape(PATCHES, 64 // PATCHES, PATCHES, 64 // PATCHES).mean((1, 3))
