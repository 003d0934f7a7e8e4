"""Measure the pocket checkpoint: what its base model draws from text, and whether SSR-Encoder draws the queried subject.

The judge (see judge.py) looks at the pictures. References hold two subjects; their instances were held out from everything
that was trained, the judge apart. Needs the design sets, which are downloaded from the npm registry at the first call.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from judge import load_judge
from tqdm.auto import tqdm
from world import (
    CATEGORY_NAMES,
    HELD_OUT,
    PLACE_NAMES,
    World,
    describe,
    download_designs,
    draw_instances,
    draw_scene,
    sheet,
)


ROOT = Path(__file__).resolve().parent.parent.parent


def share(hits: np.ndarray) -> str:
    """A share in per cent with its 95 % Wilson interval."""
    count, rate, z = len(hits), float(np.mean(hits)), 1.96
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return f"{100 * rate:.1f} % ({100 * max(centre - half, 0):.1f} to {100 * min(centre + half, 1):.1f})"


def draw(pipe, args, prompts: list[str], subjects: list | None, label: str) -> np.ndarray:
    """Pictures (n, 64, 64, 3) uint8, the i-th always from the i-th seed."""
    pictures = []
    for start in tqdm(range(0, len(prompts), args.batch_size), desc=label):
        part = slice(start, start + args.batch_size)
        extra = {} if subjects is None else {"subject": subjects[part], "subject_scale": args.scale}
        images = pipe(
            prompts[part],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            eta=args.eta,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts[part]))],
            output_type="np",
            **extra,
        ).images
        pictures.append((images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


class Measurement:
    """The references, what draws and what judges."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        download_designs(args.work_dir / "designs")
        self.world, self.judge = World(args.work_dir / "designs"), load_judge(args.checkpoint)
        self.pipe = DiffusionPipeline.from_pretrained(
            args.checkpoint, custom_pipeline=str(ROOT), trust_remote_code=True, dtype=torch.float32
        )
        self.pipe.load_ssr(args.checkpoint)
        self.pipe.set_progress_bar_config(disable=True)
        rng = np.random.default_rng(12345)
        count = args.num_references
        self.scenes = [draw_scene(self.world, rng, draw_instances(rng, HELD_OUT, 2)) for _ in range(count)]
        self.places = rng.integers(len(PLACE_NAMES), size=count)
        self.rows = np.arange(count)
        self.columns: list[np.ndarray] = []

    def wanted(self, part: str, slot: int = 0) -> np.ndarray:
        """The category, design or variant of each reference's first or second subject; either may be left or right."""
        return np.array([getattr(scene.instances[slot], part) for scene in self.scenes])

    def prompts(self, categories: np.ndarray | None) -> list[str]:
        names = ["thing"] * len(self.rows) if categories is None else [CATEGORY_NAMES[c] for c in categories]
        return [describe([name], PLACE_NAMES[place]) for name, place in zip(names, self.places, strict=True)]

    def draw(self, prompts: list[str], subjects: list | None, label: str):
        pictures = draw(self.pipe, self.args, prompts, subjects, label)
        self.columns.append(pictures)
        return self.judge.look_at(pictures)

    def encode(self, slot: int, by_mask: bool = False) -> list:
        return [
            self.pipe.encode_subject(
                scene.picture,
                query=None if by_mask else scene.instances[slot].name,
                mask=scene.masks[slot] if by_mask else None,
                mask_weight=self.args.mask_weight,
            )
            for scene in tqdm(self.scenes, desc="encoding")
        ]

    def from_text(self) -> None:
        """What the base model draws without any subject."""
        pairs = [(c, p) for c in range(len(CATEGORY_NAMES)) for p in range(len(PLACE_NAMES))] * 3
        prompts = [describe([CATEGORY_NAMES[c]], PLACE_NAMES[p]) for c, p in pairs]
        verdict = self.judge.look_at(draw(self.pipe, self.args, prompts, None, "text alone"))
        category, place = np.array(pairs).T
        print(f"from text alone ({len(pairs)} pictures):")
        print(f"  category asked for: {share(verdict.categories.argmax(1).numpy() == category)}")
        print(f"  place asked for:    {share(verdict.places.argmax(1).numpy() == place)}")

    def selection(self) -> None:
        """One query a reference, with SSR and without, the prompt naming the category or not."""
        queried, other = self.wanted("category"), self.wanted("category", 1)
        subjects = self.encode(0)
        for naming, categories in (("a thing", None), ("its category", queried)):
            for method, given in (("with SSR", subjects), ("without", None)):
                verdict = self.draw(self.prompts(categories), given, f"{naming}, {method}")
                shown, present = verdict.categories.argmax(1).numpy(), verdict.categories.numpy() > 0
                design = verdict.designs[self.rows, queried].argmax(1).numpy() == self.wanted("design")
                variant = verdict.variants[self.rows, queried].argmax(1).numpy() == self.wanted("variant")
                place = verdict.places.argmax(1).numpy() == self.places
                print(f"one query a reference, the prompt names {naming}, {method} ({len(self.rows)} pictures):")
                print(
                    f"  the queried subject and not the other: {share((shown == queried) & ~present[self.rows, other])}"
                )
                print(f"  the other one is there:                {share(present[self.rows, other])}")
                print(f"  its design (of 3):                     {share(design)}")
                print(f"  its colour or look (of 12):            {share(variant)}")
                print(f"  design and colour:                     {share(design & variant)}")
                print(f"  place asked for:                       {share(place)}")

    def both_subjects(self) -> None:
        """Both queries of each reference with the same seed, by text and by mask."""
        for by_mask in (False, True):
            own = []
            for slot in (0, 1):
                verdict = self.draw(self.prompts(None), self.encode(slot, by_mask), "masks" if by_mask else "texts")
                category, other = self.wanted("category", slot), self.wanted("category", 1 - slot)
                scores = verdict.categories.numpy()
                own.append((scores.argmax(1) == category) & (scores[self.rows, other] < 0))
            how = f"masks of weight {self.args.mask_weight:g}" if by_mask else "text"
            print(f"both subjects of a reference, the same seed, by {how} ({len(self.rows)} references):")
            print(f"  each picture shows its own subject: {share(np.concatenate(own))}")
            print(f"  both pictures of a reference do:    {share(own[0] & own[1])}")

    def together(self) -> None:
        """The first subjects of two references in one picture, each kept to its half."""
        first, partner = self.encode(0), np.roll(self.rows, 1)
        category = self.wanted("category")
        use = category != category[partner]
        left = np.zeros((64, 64), np.float32)
        left[:, :32] = 1
        prompts, plain, halves = [], [], []
        for i in self.rows[use]:
            names = [CATEGORY_NAMES[category[i]], CATEGORY_NAMES[category[partner[i]]]]
            prompts.append(describe(names, PLACE_NAMES[self.places[i]]))
            plain.append(first[i] + first[partner[i]])
            halves.append(first[i].inside(left) + first[partner[i]].inside(1 - left))
        for how, subjects in (("", plain), (", each in its half", halves), (", without SSR", None)):
            verdict = self.judge.look_at(draw(self.pipe, self.args, prompts, subjects, "together"))
            present = verdict.categories.numpy() > 0
            rows = np.arange(len(prompts))
            both = present[rows, category[use]] & present[rows, category[partner][use]]
            looks = []
            for index in (self.rows[use], partner[use]):
                judged = verdict.variants[rows, category[index]].argmax(1).numpy()
                looks.append(judged == self.wanted("variant")[index])
            print(f"subjects of two references in one picture{how} ({len(prompts)} pictures):")
            print(f"  both are there:                       {share(both)}")
            print(f"  each in its colour or look (of 12):   {share(np.concatenate(looks))}")

    def save_sheet(self) -> Path:
        pictures = []
        for i in range(min(20, len(self.rows))):
            pictures += [self.scenes[i].picture, *(column[i] for column in self.columns)]
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        file = self.args.output_dir / "measure.png"
        sheet(pictures, 2 * (1 + len(self.columns))).save(file)
        return file


PARTS = {
    "text": Measurement.from_text,
    "selection": Measurement.selection,
    "both": Measurement.both_subjects,
    "together": Measurement.together,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--checkpoint", default=str(ROOT / "pocket"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training"), help="for the design sets")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="for the sample sheet")
    parser.add_argument("--num_references", type=int, default=200)
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--eta", type=float, default=0.9, help="DDIM's noise: it corrects errors on the way")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--mask_weight", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=20)
    args = parser.parse_args()
    logging.set_verbosity_error()
    measurement = Measurement(args)
    for part in args.parts:
        PARTS[part](measurement)
    if measurement.columns:
        print(f"references, each with what was drawn for it in the order above: {measurement.save_sheet()}")


if __name__ == "__main__":
    main()
