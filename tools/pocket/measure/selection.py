"""Measures text-to-image of the base model, and whether SSR-Encoder generates the queried subject."""

import itertools

import numpy as np

from ..world import CATEGORY_NAMES, PLACE_NAMES, describe
from .references import References, candidates_of, draw, nearest_is_own, share
from .shapes import nearest_by_pixels


def from_text(refs: References) -> None:
    """Measures the images of the base model without a subject."""
    pairs = [(c, p) for c in range(len(CATEGORY_NAMES)) for p in range(len(PLACE_NAMES))] * 3
    prompts = [describe([CATEGORY_NAMES[c]], PLACE_NAMES[p]) for c, p in pairs]
    verdict = refs.judge.look_at(draw(refs.pipe, refs.args, prompts, None, "text alone"))
    category, place = np.array(pairs).T
    print(f"from text alone ({len(pairs)} images):")
    print(f"  category asked for: {share(verdict.categories.argmax(1).numpy() == category)}")
    print(f"  place asked for:    {share(verdict.places.argmax(1).numpy() == place)}")


def selection(refs: References) -> None:
    """Measures one query for each reference, with and without SSR-Encoder, and with and without the category in the
    prompt."""
    queried, other = refs.wanted("category"), refs.wanted("category", 1)
    subjects = refs.encode(0)
    for naming, categories in (("a thing", None), ("its category", queried)):
        for method, given in (("with SSR", subjects), ("without", None)):
            verdict = refs.judge.look_at(refs.draw(refs.prompts(categories), given, f"{naming}, {method}"))
            present = verdict.categories.numpy() > 0
            design = verdict.designs[refs.rows, queried].argmax(1).numpy() == refs.wanted("design")
            variant = verdict.variants[refs.rows, queried].argmax(1).numpy() == refs.wanted("variant")
            place = verdict.places.argmax(1).numpy() == refs.places
            print(f"one query a reference, the prompt names {naming}, {method} ({len(refs.rows)} images):")
            refs.report_queried(verdict)
            print(f"  the other one is there:                {share(present[refs.rows, other])}")
            print(f"  its design (of 3):                     {share(design)}")
            print(f"  design and colour:                     {share(design & variant)}")
            print(f"  place asked for:                       {share(place)}")


def seen(refs: References) -> None:
    """Compares held-out and seen instances. Also measures the nearest of 16 instances by only the colour and only the
    design."""
    for name, some in refs.pools():
        queried = some.wanted("category")
        pictures = some.draw(some.prompts(None), some.encode(0), name)
        verdict = some.judge.look_at(pictures)
        shown = verdict.categories.argmax(1).numpy() == queried
        design, variant = (part[some.rows, queried].argmax(1).numpy() for part in (verdict.designs, verdict.variants))
        other = verdict.categories.numpy()[some.rows, some.wanted("category", 1)]
        print(f'one query a reference, the prompt names "a thing", {name} ({len(queried)} images):')
        some.report_instances(verdict)
        print(
            f"  right subject, and clearly:                     {share(shown & (verdict.categories.numpy().max(1) > 0))}"
        )
        print(f"  the other subject is there:                     {share(other > 0)}")
        print(f"  its design (of 3):                              {share(design == some.wanted('design'))}")
        print(f"  its colour or look (of 12):                     {share(variant == some.wanted('variant'))}")
        logits = (part[some.rows, queried].numpy() for part in (verdict.designs, verdict.variants))
        nearest = nearest_is_own(*logits, some.scenes, np.random.default_rng(16), some.instances)
        rng = np.random.default_rng(16)
        candidates = [candidates_of(scene.instances[0], rng, some.instances) for scene in some.scenes]
        by_pixels = nearest_by_pixels(some.world, pictures, candidates)
        print(f"  right instance of 16 by pixels:                 {share(by_pixels, some.designs())}")
        for kind, rows in some.by_novelty():
            print(f"  {kind} ({rows.sum()} images):")
            for what, hits in (
                ("right subject", shown),
                ("right instance of 16", nearest),
                ("right instance of 16 by pixels", by_pixels),
                ("its design (of 3)", design == some.wanted("design")),
                ("its colour or look (of 12)", variant == some.wanted("variant")),
            ):
                print(f"    {f'{what}:':45} {share(hits[rows], some.designs()[rows])}")


def both_subjects(refs: References) -> None:
    """Measures both queries of each reference with the same seed, by text and by mask."""
    for (name, some), by_mask in itertools.product(refs.pools(), (False, True)):
        own = []
        for slot in (0, 1):
            subjects = some.encode(slot, by_mask)
            verdict = some.judge.look_at(some.draw(some.prompts(None), subjects, "masks" if by_mask else "texts"))
            category, other = some.wanted("category", slot), some.wanted("category", 1 - slot)
            scores = verdict.categories.numpy()
            own.append((scores.argmax(1) == category) & (scores[some.rows, other] < 0))
        how = f"masks of weight {some.args.mask_weight:g}" if by_mask else "text"
        print(f"both subjects of a reference, the same seed, by {how}, {name} ({len(some.rows)} references):")
        print(f"  each image shows its own subject: {share(np.concatenate(own))}")
        print(f"  both images of a reference do:    {share(own[0] & own[1])}")


def together(refs: References) -> None:
    """Measures the first subjects of two references in one image, with and without regions, at two scales."""
    for name, some in refs.pools():
        _together(some, name)


def _together(refs: References, name: str) -> None:
    first, partner = refs.encode(0), np.roll(refs.rows, 1)
    category = refs.wanted("category")
    use = category != category[partner]
    left = np.zeros((64, 64), np.float32)
    left[:, :32] = 1
    prompts = [
        describe([CATEGORY_NAMES[category[i]], CATEGORY_NAMES[category[partner[i]]]], PLACE_NAMES[refs.places[i]])
        for i in refs.rows[use]
    ]
    subjects: dict[str, list | None] = {", without SSR": None}
    for scale in (1.0, 0.6):
        pairs = [(first[i].scaled(scale), first[partner[i]].scaled(scale)) for i in refs.rows[use]]
        subjects[f", scale {scale:g}"] = [a + b for a, b in pairs]
        subjects[f", scale {scale:g}, each in its half"] = [a.inside(left) + b.inside(1 - left) for a, b in pairs]
    for how, given in subjects.items():
        pictures = draw(refs.pipe, refs.args, prompts, given, "together")
        refs.columns.append(pictures)
        verdict = refs.judge.look_at(pictures)
        present = verdict.categories.numpy() > 0
        rows = np.arange(len(prompts))
        both = present[rows, category[use]] & present[rows, category[partner][use]]
        looks, exact = [], both
        for index in (refs.rows[use], partner[use]):
            judged = verdict.variants[rows, category[index]].argmax(1).numpy()
            looks.append(judged == refs.wanted("variant")[index])
            design = verdict.designs[rows, category[index]].argmax(1).numpy() == refs.wanted("design")[index]
            exact = exact & looks[-1] & design
        print(f"subjects of two references in one image{how}, {name} ({len(prompts)} images):")
        print(f"  both are there:                       {share(both)}")
        print(f"  each in its colour or look (of 12):   {share(np.concatenate(looks))}")
        print(f"  both, in both colours and designs:    {share(exact)}")
        known = {(instance.category, instance.design) for instance in refs.seen}
        new = np.array(
            [(scene.instances[0].category, scene.instances[0].design) not in known for scene in refs.scenes]
        )
        for kind, some in (("seen", ~(new | new[partner])[use]), ("never seen", (new | new[partner])[use])):
            if some.any() and not some.all():
                print(f"    a design {kind + ' (' + str(some.sum()) + ' images):':26} {share(exact[some])}")
