"""Measures the base model with complete descriptions in the prompt, which is the upper limit for images with a
subject."""

import numpy as np
import torch

from ..world import CATEGORY_NAMES, PLACE_NAMES, describe, draw_instances
from .references import References, draw, share


def words(refs: References) -> None:
    """Measures complete descriptions of instances ("a red flat car on the beach"), seen and held out."""
    for name, pool in (("held out", refs.held_out), ("seen", refs.seen)):
        rng = np.random.default_rng(refs.args.seed)
        asked = [pool[rng.integers(len(pool))] for _ in refs.rows]
        prompts = [describe([i.words], PLACE_NAMES[p]) for i, p in zip(asked, refs.places, strict=True)]
        verdict = refs.judge.look_at(draw(refs.pipe, refs.args, prompts, None, f"full words, {name}"))
        category, design, variant = torch.tensor([(i.category, i.design, i.variant) for i in asked]).unbind(1)
        print(f"the base model, instances in full words, {name} ({len(asked)} images):")
        print(f"  category:            {share((verdict.categories.argmax(1) == category).numpy())}")
        print(f"  design (of 3):       {share((verdict.designs[refs.rows, category].argmax(1) == design).numpy())}")
        print(f"  colour or look:      {share((verdict.variants[refs.rows, category].argmax(1) == variant).numpy())}")
        right = (verdict.designs[refs.rows, category].argmax(1) == design).numpy()
        for kind, rows in refs.by_novelty(asked):
            print(f"  {kind} ({rows.sum()} images): {share(right[rows], refs.designs(asked)[rows])}")


def pairs(refs: References) -> None:
    """Measures two named things in one image."""
    rng = np.random.default_rng(refs.args.seed)
    asked = np.array([[i.category for i in draw_instances(rng, refs.held_out, 2)] for _ in refs.rows])
    prompts = [
        describe([CATEGORY_NAMES[c] for c in two], PLACE_NAMES[p]) for two, p in zip(asked, refs.places, strict=True)
    ]
    present = refs.judge.look_at(draw(refs.pipe, refs.args, prompts, None, "two things")).categories.numpy() > 0
    both = present[refs.rows, asked[:, 0]] & present[refs.rows, asked[:, 1]]
    print(f"the base model, two named things ({len(prompts)} images):")
    print(f"  both are there:      {share(both)}")
    print(f"  a third one as well: {share(present.sum(1) > 2)}")
