"""Measures subjects that are encoded from several reference images, and subjects that are not wanted."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from diffusers_ssr import SubjectEmbeds
from tqdm.auto import tqdm

from ..judge import Verdict
from ..world import INSTANCES, Instance, Scene, draw_instances, draw_scene
from .controls import NEAR
from .references import References, hue_distance, hues, nearest_is_own, share


SCALES = (0.5, 1.0)  # of `negative_subject`


def joined(parts: list[SubjectEmbeds]) -> SubjectEmbeds:
    """Returns one subject with the tokens of all parts, which share one softmax. It is compared with
    `SubjectEmbeds.mean`."""
    subjects = [part.subjects[0] for part in parts]
    names = ("embeds", "negative_embeds")
    tokens = {name: torch.cat([getattr(subject, name) for subject in subjects], 1) for name in names}
    return replace(parts[0], subjects=(replace(subjects[0], **tokens),))


WAYS: dict[str, Callable[[list], SubjectEmbeds]] = {"the mean of the tokens": SubjectEmbeds.mean, "all tokens": joined}


def images(refs: References) -> None:
    """Measures subjects from one, two and four images. Also measures them if one of the images is wrong: it shows a
    random other instance of the category, or two other things."""
    rng = np.random.default_rng([refs.args.seed, 4])
    queried = [scene.instances[0] for scene in refs.scenes]
    kin = [[i for i in INSTANCES if i.category == each.category and i != each] for each in queried]
    others = [tuple(i for i in refs.held_out if i.category != each.category) for each in queried]
    wrong = [each[rng.integers(len(each))] for each in kin]
    scenes = [refs.scenes, *([_beside(refs, rng, each) for each in queried] for _ in range(3))]
    right = [_encode(refs, each, queried) for each in scenes]
    another = _encode(refs, [_beside(refs, rng, each) for each in wrong], queried)
    without = [draw_scene(refs.world, rng, draw_instances(rng, each, 2)) for each in others]
    unrelated = _encode(refs, without, queried)

    def nearer(verdict: Verdict) -> dict[str, np.ndarray]:
        own, other = (_log_probability(verdict, each) for each in (queried, wrong))
        return {"nearer to the wrong instance": own < other}

    def from_unrelated(verdict: Verdict) -> dict[str, np.ndarray]:
        shown = np.array([[i.category for i in scene.instances] for scene in without])
        return {"a thing of the wrong image": (shown.T == verdict.categories.argmax(1).numpy()).any(0)}

    _images(refs, "1 image", right[:1])
    for count in (2, 4):
        name, some = f"{count} images", right[: count - 1]
        _images(refs, name, right[:count])
        _images(refs, f"{name}, one of another instance of its category", [*some, another], nearer)
        _images(refs, f"{name}, one of two other things", [*some, unrelated], from_unrelated)


def _images(refs: References, name: str, columns: list[list[SubjectEmbeds]], further: Callable | None = None) -> None:
    """Measures subjects from several images, with each way to combine them. `columns` has the subjects of all
    references for each image, and `further` returns further figures."""
    both = []
    for way, combine in list(WAYS.items())[: len(columns)]:
        subjects = [combine(list(parts)) for parts in zip(*columns, strict=True)]
        verdict = refs.judge.look_at(refs.draw(refs.prompts(None), subjects, f"{name}, {way}"))
        length = subjects[0].subjects[0].embeds.shape[1]
        print(f'one subject from {name}, {way} ({length}), "a thing" ({len(subjects)} images):')
        refs.report_instances(verdict)
        shown = verdict.categories.argmax(1).numpy() == refs.wanted("category")
        both.append(shown * _nearest(refs, verdict, refs.scenes))
        _report({f"both, {kind} ({rows.sum()})": both[-1][rows] for kind, rows in refs.by_novelty()})
        _report(further(verdict) if further else {})
    if len(both) > 1:
        gain = 100 * (both[1] - both[0])  # of the same references
        low, high = gain.mean() + 1.96 * gain.std() / len(gain) ** 0.5 * np.array((-1, 1))
        print(f"  both, all tokens against the mean: {gain.mean():+.1f} points ({low:+.1f} to {high:+.1f})")


def negative(refs: References) -> None:
    """Measures how often a subject that is not wanted is generated, with and without `negative_subject`."""
    _unwanted_instance(refs.of(tuple(i for i in refs.held_out if i.hue is not None), 2))
    wanted, unwanted = refs.encode(0), refs.encode(1)
    category, other = refs.wanted("category"), refs.wanted("category", 1)
    for name, subjects in {
        "the wanted thing": wanted,
        "both things, added": [a + b for a, b in zip(wanted, unwanted, strict=True)],
        "both things, their mean": [SubjectEmbeds.mean(pair) for pair in zip(wanted, unwanted, strict=True)],
    }.items():
        for how, given in {"no negative subject": {}, **_negatives(unwanted)}.items():
            verdict = refs.judge.look_at(refs.draw(refs.prompts(None), subjects, f"{name}, {how}", **given))
            scores = verdict.categories.numpy()
            shown = scores.argmax(1)
            print(f'`subject` is {name}; {how}; "a thing" ({len(subjects)} images):')
            _report(
                {
                    "the wanted thing is generated": shown == category,
                    "and the right instance of 16": (shown == category) * _nearest(refs, verdict, refs.scenes),
                    "the unwanted thing is generated": shown == other,
                    "the unwanted thing is there": scores[refs.rows, other] > 0,
                    "no category is clear": scores.max(1) < 0,
                    "the place asked for": verdict.places.argmax(1).numpy() == refs.places,
                }
            )


def _unwanted_instance(refs: References) -> None:
    """Measures prompts that name a category, without `subject`. The unwanted instance is the one of the reference, or
    the one that the base model generates."""
    category, rng = refs.wanted("category"), np.random.default_rng([refs.args.seed, 5])
    prompts = refs.prompts(category)
    before = refs.judge.look_at(refs.draw(prompts, None, "no negative subject"))
    designs, variants = (part[refs.rows, category].argmax(1).tolist() for part in (before.designs, before.variants))
    drawn = [Instance(*parts) for parts in zip(category.tolist(), designs, variants, strict=True)]
    for what, scenes in {
        "a held-out instance": refs.scenes,
        "the instance generated without": [_beside(refs, rng, each) for each in drawn],
    }.items():
        queried = [scene.instances[0] for scene in scenes]
        ways = {"no negative subject": None, **_negatives(_encode(refs, scenes, queried))}
        for how, given in ways.items():
            verdict = refs.judge.look_at(refs.draw(prompts, None, how, **given)) if given else before
            unwanted = np.array([each.hue for each in queried])
            print(f"no `subject`, the category named; {what} is unwanted; {how} ({len(prompts)} images):")
            _report(
                {
                    f"hue within {NEAR} degrees of the unwanted": hue_distance(hues(verdict), unwanted) <= NEAR,
                    f"hue within {NEAR} degrees of that without": hue_distance(hues(verdict), hues(before)) <= NEAR,
                    "the unwanted instance of 16": _nearest(refs, verdict, scenes),
                    "the category asked for": verdict.categories.argmax(1).numpy() == category,
                    "no category is clear": verdict.categories.numpy().max(1) < 0,
                    "the place asked for": verdict.places.argmax(1).numpy() == refs.places,
                }
            )


def _negatives(unwanted: list[SubjectEmbeds]) -> dict[str, dict]:
    return {f"scale {s:g}": {"negative_subject": [each.scaled(s) for each in unwanted]} for s in SCALES}


def _report(figures: dict[str, np.ndarray]) -> None:
    for name, hits in figures.items():
        print(f"  {name + ':':47} {share(hits)}")


def _beside(refs: References, rng: np.random.Generator, instance: Instance) -> Scene:
    """Draws an instance beside a held-out thing of another category."""
    others = [other for other in refs.held_out if other.category != instance.category]
    return draw_scene(refs.world, rng, [instance, others[rng.integers(len(others))]])


def _encode(refs: References, scenes: list[Scene], queried: list[Instance]) -> list[SubjectEmbeds]:
    pairs = tqdm(list(zip(scenes, queried, strict=True)), desc="encoding")
    return [refs.pipe.encode_subject(scene.picture, query=each.name) for scene, each in pairs]


def _nearest(refs: References, verdict: Verdict, scenes: list[Scene]) -> np.ndarray:
    category = [scene.instances[0].category for scene in scenes]
    logits = (part[refs.rows, category].numpy() for part in (verdict.designs, verdict.variants))
    return nearest_is_own(*logits, scenes, np.random.default_rng(16))


def _log_probability(verdict: Verdict, instances: list[Instance]) -> np.ndarray:
    rows = torch.arange(len(instances))
    category, design, variant = torch.tensor([(i.category, i.design, i.variant) for i in instances]).unbind(1)
    designs, variants = verdict.designs.log_softmax(-1), verdict.variants.log_softmax(-1)
    return (designs[rows, category, design] + variants[rows, category, variant]).numpy()
