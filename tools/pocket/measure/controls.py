"""Control measurements for the main results: absent queries, masks, single things, neighbours, people, and the peak of
the attention map."""

import numpy as np
from tqdm.auto import tqdm

from ..world import CATEGORY_NAMES, PLACE_NAMES, SKIN_TONES, describe, draw_scene
from .references import References, draw, hue_distance, hues, share


NEAR = 30  # degrees; the distance between neighbouring colours
WAYS = {"name": {}, "mask": {"by_mask": True}, "mask and name": {"by_mask": True, "by_name": True}}


def alone(refs: References) -> None:
    """Measures whether design and colour are kept if the reference shows one thing and the prompt names its
    category."""
    for name, single in refs.pools(1):
        queried = single.wanted("category")
        verdict = single.judge.look_at(single.draw(single.prompts(queried), single.encode(0), f"alone, {name}"))
        design = verdict.designs[single.rows, queried].argmax(1).numpy() == single.wanted("design")
        variant = verdict.variants[single.rows, queried].argmax(1).numpy() == single.wanted("variant")
        print(f"a thing alone in its reference, its category in the prompt, {name} ({len(queried)} images):")
        print(f"  its design (of 3):          {share(design)}")
        print(f"  its colour or look (of 12): {share(variant)}")
        for kind, rows in single.by_novelty():
            print(f"  its design, {kind} ({rows.sum()} images): {share(design[rows], single.designs()[rows])}")


def absent(refs: References) -> None:
    """Measures queries for a thing that is not in the reference, so that only the word in the query describes it."""
    for name, some in refs.pools():
        _absent(some, f"two other things, {name}")
    rng = np.random.default_rng(refs.args.seed + 2)
    _absent(refs, "an empty place", [draw_scene(refs.world, rng, [], boxes=[]).picture for _ in refs.rows])


def _absent(refs: References, name: str, pictures: list[np.ndarray] | None = None) -> None:
    missing, subjects = refs.encode_absent(pictures)
    scores = refs.judge.look_at(refs.draw(refs.prompts(None), subjects, f"absent: {name}")).categories.numpy()
    drawn = scores.argmax(1) == missing
    print(f"the queried thing is not in the reference, which shows {name} ({len(missing)} images):")
    print(f"  it is generated:              {share(drawn)}")
    print(f"  it is generated, and clearly: {share(drawn & (scores.max(1) > 0))}")


def masks(refs: References) -> None:
    """Measures the selection of one of two things by its name, by its mask, or by both."""
    for name, some in refs.pools(with_hue=True):
        queried = some.wanted("category")
        wanted = np.array([scene.instances[0].hue for scene in some.scenes])
        for how, options in WAYS.items():
            verdict = some.judge.look_at(some.draw(some.prompts(None), some.encode(0, **options), f"by {how}"))
            print(f"chosen by {how}, the prompt names a thing, {name} ({len(queried)} images):")
            right = verdict.categories.argmax(1).numpy() == queried
            colour = verdict.variants[some.rows, queried].argmax(1).numpy() == some.wanted("variant")
            print(f"  right subject:         {share(right)}")
            for kind, rows in some.by_novelty():
                print(f"  right subject, {kind} ({rows.sum()} images): {share(right[rows], some.designs()[rows])}")
            print(f"  its colour (of 12):    {share(colour)}")
            print(f"  hue within {NEAR} degrees: {share(hue_distance(hues(verdict), wanted) <= NEAR)}")


def three(refs: References) -> None:
    """Measures the selection of one of three things, and whether the hue is nearer to that of another thing."""
    for name, some in refs.pools(3, with_hue=True):
        wanted = np.array([[i.hue for i in scene.instances] for scene in some.scenes])
        queried = some.wanted("category")
        for how, options in WAYS.items():
            verdict = some.judge.look_at(some.draw(some.prompts(None), some.encode(0, **options), f"three, by {how}"))
            distance = hue_distance(hues(verdict)[:, None], wanted)
            colour = verdict.variants[some.rows, queried].argmax(1).numpy() == some.wanted("variant")
            print(f"one of three things, chosen by {how}, the prompt names a thing, {name} ({len(queried)} images):")
            print(f"  right subject:                        {share(verdict.categories.argmax(1).numpy() == queried)}")
            print(f"  nearer in hue to a neighbour:         {share(distance[:, 0] > distance[:, 1:].min(1))}")
            print(f"  hue within {NEAR} degrees of the queried: {share(distance[:, 0] <= NEAR)}")
            print(f"  its colour (of 12):                   {share(colour)}")


def people(refs: References) -> None:
    """Measures whether the look of women next to another thing is kept, and whether the base model generates a look that
    the prompt describes."""
    woman = CATEGORY_NAMES.index("woman")
    for name, pool in (("held out", refs.held_out), ("seen", refs.seen)):
        rng = np.random.default_rng(refs.args.seed)
        women, others = ([i for i in pool if (i.category == woman) == wanted] for wanted in (True, False))
        looks = [women[rng.integers(len(women))] for _ in refs.rows]
        scenes = [draw_scene(refs.world, rng, [look, others[rng.integers(len(others))]]) for look in looks]
        subjects = [refs.pipe.encode_subject(scene.picture, query="woman") for scene in scenes]
        described = [
            describe([look.words], PLACE_NAMES[place]) for look, place in zip(looks, refs.places, strict=True)
        ]
        wanted = np.array([look.variant for look in looks])
        for how, prompts, given in (
            ("beside another thing", refs.prompts(np.full(len(looks), woman)), subjects),
            ("in full words, without SSR", described, None),
        ):
            verdict = refs.judge.look_at(draw(refs.pipe, refs.args, prompts, given, f"people, {how}, {name}"))
            right = verdict.variants[:, woman].argmax(1).numpy() == wanted
            skin = verdict.variants[:, woman].argmax(1).numpy() % len(SKIN_TONES) == wanted % len(SKIN_TONES)
            print(f"a woman {how}, {name} ({len(looks)} images):")
            print(f"  a woman is generated: {share(verdict.categories.argmax(1).numpy() == woman)}")
            print(f"  her look (of 12): {share(right)}")
            print(f"  her skin (of 3):  {share(skin)}")
            for index, tone in enumerate(SKIN_TONES.values()):
                some = wanted % len(SKIN_TONES) == index
                print(f"  her look, {tone} ({some.sum()} images): {share(right[some])}")


def pointing(refs: References) -> None:
    """Measures whether the peak of the attention map is on the queried thing."""
    for things, name, several in ((count, *each) for count in (2, 3) for each in refs.pools(count)):
        own, other = [], []
        for scene in tqdm(several.scenes, desc=f"pointing, {things} things"):
            heat = refs.pipe.subject_attention_map(scene.picture, query=scene.instances[0].name).heat
            peak = np.unravel_index(np.argmax(heat), heat.shape)
            own.append(bool(scene.masks[0][peak]))
            other.append(any(bool(mask[peak]) for mask in scene.masks[1:]))
        print(f"the attention map's peak, {things} things, {name} ({len(own)} references):")
        print(f"  lies on the queried thing: {share(np.array(own))}")
        print(f"  lies on another one:       {share(np.array(other))}")
