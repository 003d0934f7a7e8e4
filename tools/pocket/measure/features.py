"""Measures what linear probes can predict from the patches of the vision encoder. An SSR-Encoder can only use
information that is in the patches."""

import numpy as np
import torch

from ..scenes import PATCHES, patch_cover
from ..training import picture_tensor
from ..world import CATEGORY_NAMES, Instance, Scene, arrange, draw_instances, draw_scene, varied
from .references import References, hue_distance, share


NUM_SCENES = 600  # number of scenes for the fit


def features(refs: References) -> None:
    """Measures how well category, design and hue of held-out instances can be predicted from the patches that they
    cover, at each level, for things at the positions of the references and for restyled things at random positions."""
    known = _draw(refs, refs.seen, NUM_SCENES, 0, False) + _draw(refs, refs.seen, NUM_SCENES, 1, True)
    tests = {
        "held out": _draw(refs, refs.held_out, refs.args.num_references, 2, False),
        "held out, restyled": _draw(refs, refs.held_out, refs.args.num_references, 3, True),
    }
    fitted, targets = _patches(refs, known)
    designs = 1 + max(instance.design for instance in refs.instances)
    probes = [_fit(level, _wanted(targets, designs)) for level in fitted]
    for name, scenes in tests.items():
        levels, things = _patches(refs, scenes)
        print(f"linear probes of the vision encoder's patches, {name} ({len(things)} patches):")
        for level, (states, probe) in enumerate(zip(levels, probes, strict=True), 1):
            category, design, hue = (_with_one(states) @ probe).split([len(CATEGORY_NAMES), designs, 2], 1)
            coloured = np.array([thing.hue is not None for thing in things])
            angle = torch.atan2(hue[:, 1], hue[:, 0]).numpy() / (2 * np.pi) % 1.0
            off = hue_distance(angle[coloured], np.array([thing.hue for thing in things if thing.hue is not None]))
            print(
                f"  level {level}: category {share(category.argmax(1).numpy() == [t.category for t in things])},"
                f" design {share(design.argmax(1).numpy() == [t.design for t in things])},"
                f" hue within 30 degrees {share(off <= 30)}"
            )


def _draw(refs: References, pool: tuple[Instance, ...], count: int, seed: int, anywhere: bool) -> list[Scene]:
    rng = np.random.default_rng([refs.args.seed, seed])
    scenes = []
    for _ in range(count):
        things = [varied(rng, each, flip=anywhere) for each in draw_instances(rng, pool, 2)]
        scenes.append(
            draw_scene(refs.world, rng, things, boxes=arrange(rng, 2) if anywhere else None, restyle=anywhere)
        )
    return scenes


@torch.no_grad()
def _patches(refs: References, scenes: list[Scene]) -> tuple[list[torch.Tensor], list[Instance]]:
    """Returns the hidden states of the patches that are more than half covered by a thing, for each level, and the
    things."""
    processor, encoder = refs.pipe.ssr_image_processor, refs.pipe.ssr_image_encoder
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (processor.image_mean, processor.image_std))
    pixels = (picture_tensor(np.stack([scene.picture for scene in scenes])) / 2 + 0.5 - mean) / std
    states = [
        torch.cat(each)
        for each in zip(
            *(
                encoder(part.to(encoder.device), output_hidden_states=True).hidden_states[1:]
                for part in pixels.split(50)
            ),
            strict=True,
        )
    ]
    where = [
        (row, 1 + int(patch), thing)
        for row, scene in enumerate(scenes)
        for thing, mask in zip(scene.instances, scene.masks, strict=True)
        for patch in np.flatnonzero(patch_cover(mask).reshape(PATCHES * PATCHES) > 0.5)
    ]
    rows, patches, things = zip(*where, strict=True)
    return [level[list(rows), list(patches)].float().cpu() for level in states], list(things)


def _wanted(things: list[Instance], designs: int) -> torch.Tensor:
    """Returns the targets of a probe: category and design as one-hot vectors, and the hue as a direction (0 for
    people)."""
    category = torch.nn.functional.one_hot(torch.tensor([t.category for t in things]), len(CATEGORY_NAMES))
    design = torch.nn.functional.one_hot(torch.tensor([t.design for t in things]), designs)
    turns = torch.tensor([[0.0] if t.hue is None else [2 * np.pi * t.hue] for t in things])
    direction = torch.cat([turns.cos(), turns.sin()], 1) * torch.tensor([[t.hue is not None] for t in things])
    return torch.cat([category, design, direction], 1).float()


def _with_one(states: torch.Tensor) -> torch.Tensor:
    return torch.cat([states, torch.ones(len(states), 1)], 1)


def _fit(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Fits a probe with ridge regression."""
    states = _with_one(states)
    return torch.linalg.solve(states.T @ states + 1e-2 * len(states) * torch.eye(states.shape[1]), states.T @ wanted)
