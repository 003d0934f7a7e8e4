"""Shared by all measurements of the pocket checkpoint: held-out references, the pipeline, the judge, and the report of
shares."""

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..judge import Verdict, load_judge
from ..methods import ROOT
from ..world import (
    CATEGORY_NAMES,
    CHOOSING,
    INSTANCES,
    NUM_VARIANTS,
    PLACE_NAMES,
    SPLITS,
    Instance,
    World,
    describe,
    download_designs,
    download_icons,
    draw_instances,
    draw_scene,
    instances_of,
    load_split,
    sheet,
)


NUM_CANDIDATES = 16


def share(hits: np.ndarray, designs: np.ndarray | None = None) -> str:
    """Formats a share as a percentage with its 95 % Wilson interval. With the design of each image, a second interval
    follows that is for other designs and not only for other images of these: it has the number of independent images
    that the variation between designs corresponds to, and the quantile of Student's t."""
    rate, z = float(np.mean(hits)), 1.96
    text = f"{100 * rate:.1f} % ({_wilson(rate, len(hits), z)})"
    if designs is None or len(names := np.unique(designs)) < 2:
        return text
    rest = np.array([(hits[designs == name] - rate).sum() for name in names])
    freedom = len(names) - 1
    variance = (rest**2).sum() / len(hits) ** 2 * len(names) / freedom
    # if no image differs from another, each design counts once
    count = float(np.clip(rate * (1 - rate) / variance, 1, len(hits))) if variance else len(names)
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return f"{text}, over {len(names)} designs ({_wilson(rate, count, student)})"


def _wilson(rate: float, count: float, z: float) -> str:
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return f"{100 * max(centre - half, 0):.1f} to {100 * min(centre + half, 1):.1f}"


def draw(pipe, args, prompts: list[str], subjects: list | None, label: str, **each) -> np.ndarray:
    """Generates uint8 images of shape (n, 64, 64, 3), or videos of shape (n, frames, 64, 64, 3) with AnimateDiff.
    The seed of each image is its index. `each` are additional arguments with one value for each image."""
    pictures = []
    for start in tqdm(range(0, len(prompts), args.batch_size), desc=label):
        part = slice(start, start + args.batch_size)
        extra = {name: values[part] for name, values in each.items()}
        if subjects is not None:
            extra.update(subject=subjects[part], subject_scale=args.scale)
        drawn = pipe(
            prompts[part],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            eta=args.eta,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts[part]))],
            output_type="np",
            **extra,
        )
        pictures.append((drawn[0] * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def hues(verdict: Verdict) -> np.ndarray:
    """Returns the hue of the clearest category in each image, from 0 to 1. It is the mean direction of the colours,
    weighted by the probabilities of the judge."""
    rows = torch.arange(len(verdict.categories))
    colours = verdict.variants[rows, verdict.categories.argmax(1)].softmax(1).numpy()
    direction = (colours * np.exp(2j * np.pi * np.arange(NUM_VARIANTS) / NUM_VARIANTS)).sum(1)
    return np.angle(direction) / (2 * np.pi) % 1.0


def hue_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the distance in degrees, from 0 to 180."""
    return 360 * np.abs((first - second + 0.5) % 1.0 - 0.5)


def candidates_of(queried: Instance, rng: np.random.Generator, instances: tuple[Instance, ...]) -> list[Instance]:
    """Returns the queried instance and 15 other random instances of its category."""
    others = [i for i in instances if i.category == queried.category and i != queried]
    return [queried, *(others[c] for c in rng.choice(len(others), NUM_CANDIDATES - 1, replace=False))]


def nearest_is_own(
    designs: np.ndarray,
    variants: np.ndarray,
    scenes: list,
    rng: np.random.Generator,
    instances: tuple[Instance, ...] = INSTANCES,
) -> np.ndarray:
    """Returns for each image whether the queried instance is the nearest of 16 instances of its category. The
    nearest instance is the one whose design and colour have the highest probability. If several instances are equally
    near, each counts as a fraction of a hit. `designs` of shape (n, designs) and `variants` of shape (n, variants) are
    the logits of the judge; zeros mean that only the other part is compared."""
    designs, variants = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (designs, variants))
    hits = []
    for scene, design, variant in zip(scenes, designs, variants, strict=True):
        candidates = candidates_of(scene.instances[0], rng, instances)
        scores = np.array([design[i.design] + variant[i.variant] for i in candidates])
        nearest = scores == scores.max()
        hits.append(nearest[0] / nearest.sum())
    return np.array(hits)


class References:
    """References of two subjects, with the pipeline and the judge."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        download_designs(args.work_dir / "designs")
        self.world, self.judge = World(args.work_dir / "designs"), load_judge(args.checkpoint)
        self.pipe = DiffusionPipeline.from_pretrained(
            args.checkpoint, custom_pipeline=str(ROOT), trust_remote_code=True, dtype=torch.float32
        )
        # a base model can be measured without an SSR-Encoder (`--parts text words pairs`)
        if (Path(args.checkpoint) / "ssr_encoder").is_dir():
            self.pipe.load_ssr(args.checkpoint)
        self.pipe.to(args.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.columns: list[np.ndarray] = []
        split = load_split(args.checkpoint)
        self.instances, (self.seen, self.held_out) = instances_of(split), SPLITS[split]
        if split == "sets":
            download_icons(args.work_dir / "designs")
        if args.choosing:
            self.held_out = CHOOSING[split]
        knows = "was not" if CHOOSING[split] and not args.choosing else "was"
        print(f"The judge {knows} trained on the held-out instances. What is measured by pixels needs no judge.")
        self._sample(self.held_out, 2)

    def _sample(self, pool: tuple[Instance, ...], things: int) -> None:
        rng, count = np.random.default_rng(self.args.seed), self.args.num_references
        self.scenes = [draw_scene(self.world, rng, draw_instances(rng, pool, things)) for _ in range(count)]
        self.places = rng.integers(len(PLACE_NAMES), size=count)
        self.rows = np.arange(count)

    def of(self, pool: tuple[Instance, ...], things: int) -> "References":
        """Returns other references with `things` instances of `pool` each. They use the same pipeline and judge, and
        their images are not added to the sheet."""
        other = copy.copy(self)
        other.columns = []
        other._sample(pool, things)
        return other

    def pools(self, things: int = 2, with_hue: bool = False) -> Iterator[tuple[str, "References"]]:
        """Yields references of held-out instances, and then those of instances that were seen in training, each with
        its name. `with_hue` leaves out instances without a hue, which are people."""
        for name, pool in (("held out", self.held_out), ("seen", self.seen)):
            pool = tuple(instance for instance in pool if instance.hue is not None or not with_hue)
            yield name, self if things == 2 and pool == self.held_out else self.of(pool, things)

    def wanted(self, part: str, slot: int = 0) -> np.ndarray:
        """Returns the category, design or variant of the first or second subject of each reference. The order is not
        related to the position in the image."""
        return np.array([getattr(scene.instances[slot], part) for scene in self.scenes])

    def by_novelty(self, instances: list[Instance] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yields which of the instances (by default the queried ones) have a held-out color, and which have a design
        that no training image of the category has, if there are both."""
        known = {(instance.category, instance.design) for instance in self.seen}
        instances = [scene.instances[0] for scene in self.scenes] if instances is None else instances
        new = np.array([(instance.category, instance.design) not in known for instance in instances])
        if new.any() and not new.all():
            yield "design seen in other colours", ~new
            yield "design never seen", new

    def designs(self, instances: list[Instance] | None = None) -> np.ndarray:
        """Returns the category and design of each instance (by default the queried ones) as a text."""
        instances = [scene.instances[0] for scene in self.scenes] if instances is None else instances
        return np.array([f"{each.name} {each.design}" for each in instances])

    def prompts(self, categories: np.ndarray | None) -> list[str]:
        names = ["thing"] * len(self.rows) if categories is None else [CATEGORY_NAMES[c] for c in categories]
        return [describe([name], PLACE_NAMES[place]) for name, place in zip(names, self.places, strict=True)]

    def draw(self, prompts: list[str], subjects: list | None, label: str, pipe=None, **each) -> np.ndarray:
        """Same as the function `draw`, with the pipeline of this object by default. Adds the images to the sheet."""
        pictures = draw(pipe or self.pipe, self.args, prompts, subjects, label, **each)
        self.columns += [pictures] if pictures.ndim == 4 else [pictures[:, frame] for frame in (0, 4, 7)]
        return pictures

    def encode(self, slot: int, by_mask: bool = False, by_name: bool | None = None) -> list:
        """Encodes the subject with the index `slot` of each reference, by its name, by its mask, or by both."""
        by_name = not by_mask if by_name is None else by_name
        return [
            self.pipe.encode_subject(
                scene.picture,
                query=scene.instances[slot].name if by_name else None,
                mask=scene.masks[slot] if by_mask else None,
                mask_weight=self.args.mask_weight if by_mask else 1.0,
            )
            for scene in tqdm(self.scenes, desc="encoding")
        ]

    def encode_absent(self, pictures: list[np.ndarray] | None = None) -> tuple[np.ndarray, list]:
        """Encodes each reference, or each of the given images, with a query for a category that it does not show.
        Returns the categories and the subjects."""
        missing = self.absent_categories()
        shown = tqdm(pictures or [scene.picture for scene in self.scenes], desc="encoding")
        return missing, [
            self.pipe.encode_subject(picture, query=CATEGORY_NAMES[category])
            for picture, category in zip(shown, missing, strict=True)
        ]

    def absent_categories(self) -> np.ndarray:
        """Returns for each reference a category that it does not show."""
        rng = np.random.default_rng(self.args.seed + 1)
        shown = zip(self.wanted("category"), self.wanted("category", 1), strict=True)
        return np.array([rng.choice(np.setdiff1d(np.arange(len(CATEGORY_NAMES)), pair)) for pair in shown])

    def report_instances(self, verdict: Verdict) -> None:
        """Prints how many images show the right category, and the right one of 16 instances of this category, by
        design and colour, and by only one of them."""
        queried = self.wanted("category")
        shown = verdict.categories.argmax(1).numpy() == queried
        designs, variants = (part[self.rows, queried].numpy() for part in (verdict.designs, verdict.variants))
        print(f"  right subject:                                  {share(shown)}")
        for name, design, variant in (("", 1, 1), (", by colour or look alone", 0, 1), (", by design alone", 1, 0)):
            hits = nearest_is_own(
                design * designs, variant * variants, self.scenes, np.random.default_rng(16), self.instances
            )
            print(f"  {f'right instance of 16{name}:':47} {share(hits, self.designs())}")
            if not name:
                print(f"  both:                                           {share(shown * hits)}")

    def report_queried(self, verdict: Verdict) -> None:
        """Prints how many images show the first subject of their reference, and how many show it in its colour."""
        queried, other = self.wanted("category"), self.wanted("category", 1)
        shown, present = verdict.categories.argmax(1).numpy(), verdict.categories.numpy() > 0
        variant = verdict.variants[self.rows, queried].argmax(1).numpy() == self.wanted("variant")
        print(f"  the queried subject and not the other: {share((shown == queried) & ~present[self.rows, other])}")
        print(f"  its colour or look (of 12):            {share(variant)}")

    def save_sheet(self) -> Path:
        pictures = []
        for i in range(min(20, len(self.rows))):
            pictures += [self.scenes[i].picture, *(column[i] for column in self.columns)]
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        file = self.args.output_dir / "measure.png"
        across = 1 + len(self.columns)
        sheet(pictures, across * (2 if across < 8 else 1)).save(file)
        return file
