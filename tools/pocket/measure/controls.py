"""Control measurements for the main results: absent queries, masks, single things, neighbours, people, and the peak of
the attention map."""

import numpy as np
from tqdm.auto import tqdm

from ..world import CATEGORIES, CATEGORY_NAMES, Instance, draw_scene
from .references import References, draw, hue_distance, hues, share


NEAR = 30  # degrees; the distance between neighbouring colours


def coloured(refs: References) -> tuple[Instance, ...]:
    """Returns the held-out instances that have a hue, which are all except people."""
    return tuple(instance for instance in refs.held_out if instance.hue is not None)


def alone(refs: References) -> None:
    """Measures whether design and colour are kept if the reference shows one thing and the prompt names its
    category."""
    for name, pool in (("held out", refs.held_out), ("seen", refs.seen)):
        single = refs.of(pool, 1)
        queried = single.wanted("category")
        verdict = single.judge.look_at(single.draw(single.prompts(queried), single.encode(0), f"alone, {name}"))
        design = verdict.designs[single.rows, queried].argmax(1).numpy() == single.wanted("design")
        variant = verdict.variants[single.rows, queried].argmax(1).numpy() == single.wanted("variant")
        print(f"a thing alone in its reference, its category in the prompt, {name} ({len(queried)} pictures):")
        print(f"  its design (of 3):          {share(design)}")
        print(f"  its colour or look (of 12): {share(variant)}")


def absent(refs: References) -> None:
    """Measures queries for a thing that is not in the reference, so that only the word in the query describes it."""
    rng = np.random.default_rng(refs.args.seed + 1)
    first, second = refs.wanted("category"), refs.wanted("category", 1)
    missing = np.array(
        [rng.choice(np.setdiff1d(np.arange(len(CATEGORIES)), pair)) for pair in zip(first, second, strict=True)]
    )
    empty = [draw_scene(refs.world, rng, [], boxes=[]).picture for _ in refs.rows]
    for name, pictures in (("two other things", [scene.picture for scene in refs.scenes]), ("an empty place", empty)):
        subjects = [
            refs.pipe.encode_subject(picture, query=CATEGORY_NAMES[category])
            for picture, category in zip(tqdm(pictures, desc="encoding"), missing, strict=True)
        ]
        scores = refs.judge.look_at(refs.draw(refs.prompts(None), subjects, f"absent: {name}")).categories.numpy()
        clearest = scores.argmax(1)
        print(f"the queried thing is not in the reference, which shows {name} ({len(missing)} pictures):")
        print(f"  it is drawn:                     {share(clearest == missing)}")
        print(f"  it is drawn, and clearly:        {share((clearest == missing) & (scores.max(1) > 0))}")
        if pictures is not empty:
            print(f"  one of the reference's is drawn: {share((clearest == first) | (clearest == second))}")


def masks(refs: References) -> None:
    """Measures the selection of one of two things by its name, by its mask, or by both."""
    refs = refs.of(coloured(refs), 2)
    queried = refs.wanted("category")
    wanted = np.array([scene.instances[0].hue for scene in refs.scenes])
    for how, options in (
        ("name", {}),
        ("mask", {"by_mask": True}),
        ("mask and name", {"by_mask": True, "by_name": True}),
    ):
        verdict = refs.judge.look_at(refs.draw(refs.prompts(None), refs.encode(0, **options), f"by {how}"))
        print(f"chosen by {how}, the prompt names a thing ({len(queried)} pictures):")
        print(f"  right subject:         {share(verdict.categories.argmax(1).numpy() == queried)}")
        print(f"  hue within {NEAR} degrees: {share(hue_distance(hues(verdict), wanted) <= NEAR)}")


def three(refs: References) -> None:
    """Measures the selection of one of three things, and whether the hue is nearer to that of another thing."""
    refs = refs.of(coloured(refs), 3)
    wanted = np.array([[i.hue for i in scene.instances] for scene in refs.scenes])
    queried = refs.wanted("category")
    for how, options in (
        ("name", {}),
        ("mask and name", {"by_mask": True, "by_name": True}),
        ("mask", {"by_mask": True}),
    ):
        verdict = refs.judge.look_at(refs.draw(refs.prompts(None), refs.encode(0, **options), f"three, by {how}"))
        distance = hue_distance(hues(verdict)[:, None], wanted)
        print(f"one of three things, chosen by {how}, the prompt names a thing ({len(queried)} pictures):")
        print(f"  right subject:                        {share(verdict.categories.argmax(1).numpy() == queried)}")
        print(f"  nearer in hue to a neighbour:         {share(distance[:, 0] > distance[:, 1:].min(1))}")
        print(f"  hue within {NEAR} degrees of the queried: {share(distance[:, 0] <= NEAR)}")


def people(refs: References) -> None:
    """Measures whether the look of women next to another thing is kept, for held-out and seen instances."""
    woman = CATEGORY_NAMES.index("woman")
    for name, pool in (("held out", refs.held_out), ("seen", refs.seen)):
        rng = np.random.default_rng(refs.args.seed)
        women, others = ([i for i in pool if (i.category == woman) == wanted] for wanted in (True, False))
        looks = [women[rng.integers(len(women))] for _ in refs.rows]
        scenes = [draw_scene(refs.world, rng, [look, others[rng.integers(len(others))]]) for look in looks]
        subjects = [refs.pipe.encode_subject(scene.picture, query="woman") for scene in scenes]
        pictures = draw(refs.pipe, refs.args, refs.prompts(np.full(len(looks), woman)), subjects, f"people, {name}")
        verdict = refs.judge.look_at(pictures)
        variant = verdict.variants[:, woman].argmax(1).numpy()
        print(f"a woman beside another thing, {name} ({len(looks)} pictures):")
        print(f"  a woman is drawn: {share(verdict.categories.argmax(1).numpy() == woman)}")
        print(f"  her look (of 12): {share(variant == np.array([look.variant for look in looks]))}")
        print(f"  her skin (of 3):  {share(variant % 3 == np.array([look.variant for look in looks]) % 3)}")


def pointing(refs: References) -> None:
    """Measures whether the peak of the attention map is on the queried thing."""
    for things in (2, 3):
        several = refs.of(refs.held_out, things)
        own, other = [], []
        for scene in tqdm(several.scenes, desc=f"pointing, {things} things"):
            heat = refs.pipe.subject_attention_map(scene.picture, query=scene.instances[0].name).heat
            peak = np.unravel_index(np.argmax(heat), heat.shape)
            own.append(bool(scene.masks[0][peak]))
            other.append(any(bool(mask[peak]) for mask in scene.masks[1:]))
        print(f"the attention map's peak, {things} things ({len(own)} references):")
        print(f"  lies on the queried thing: {share(np.array(own))}")
        print(f"  lies on another one:       {share(np.array(other))}")
