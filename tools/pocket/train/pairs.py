"""Draw the training set of the pocket checkpoint for examples/train_ssr.py as a Parquet file.

A reference shows one to four things, with other emoji among them. In half of the rows they have random sizes and
positions. The target shows exactly the queried thing in another place. Captions name the place and either the category
or only "a thing", so that colour and design have to be taken from the reference. There are three kinds of rows:

- One subject. In four of ten rows (`--masked_share`) it is marked by a mask. The query is its name, a caption of the
  whole reference, or nothing.
- Two subjects in the target, from two references or from one.
- A query that names nothing in the reference. The target shows the content of the caption, so that the encoder learns
  to add nothing.

With `--arrays`, the rows are written as arrays instead of a Parquet file (see drawn_pairs.py), which a GPU needs: reading
the PNG files of a row takes longer than training on it.
"""

import argparse
import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..drawn_pairs import write_arrays
from ..world import (
    LAYOUTS,
    PLACE_NAMES,
    SPLITS,
    Instance,
    Other,
    Scene,
    World,
    arrange,
    describe,
    download_designs,
    draw_instances,
    draw_scene,
    varied,
)


LISTS = ("reference", "query", "mask")


def _png(picture: np.ndarray | None) -> dict | None:
    if picture is None:
        return None
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


class Rows:
    """
    Draws rows of the three kinds. In a row, `image` is a uint8 image of shape (64, 64, 3), and `reference`, `query` and
    `mask` are lists with an entry for each subject: an image, a text or `None`, and a uint8 mask of shape (64, 64) or
    `None`.

    Args:
        designs (`str`): the folder of the design sets.
        split (`str`): the split of instances. Its held-out instances are not drawn.
        free_share (`float`): the share of references with random sizes and positions; the others use `LAYOUTS`.
        others_share (`float`): the share of neighbours that are not of a measured category.
        two_share (`float`): the share of rows with two subjects.
        absent_share (`float`): the share of rows whose query names nothing in the reference.
        masked_share (`float`): the share of subjects that are marked by a mask.
        other_subjects_share (`float`): the share of subjects that are not of a measured category.
    """

    def __init__(
        self,
        designs: str,
        split: str,
        free_share: float = 0.5,
        others_share: float = 0.4,
        two_share: float = 0.2,
        absent_share: float = 0.15,
        masked_share: float = 0.4,
        other_subjects_share: float = 0.0,
    ):
        self.world = World(designs)
        self.split, self.seen = split, SPLITS[split][0]
        self.free_share = free_share
        self.others_share = others_share
        self.shares = (1 - two_share - absent_share, two_share, absent_share)
        self.masked_share = masked_share
        self.other_subjects_share = other_subjects_share

    def draw(self, rng: np.random.Generator) -> dict:
        """Draws a row of a random kind."""
        kind = rng.choice(3, p=self.shares)
        return (self.one, self.two, self.absent)[kind](rng)

    def one(self, rng: np.random.Generator) -> dict:
        (subject,) = self._subjects(rng, 1)
        reference = self._reference(rng, [subject])
        return self._row(rng, [subject], [self._asked(rng, reference, 0)])

    def two(self, rng: np.random.Generator) -> dict:
        subjects = self._subjects(rng, 2)
        if rng.random() < 0.3:
            reference = self._reference(rng, subjects)
            asked = [self._asked(rng, reference, slot) for slot in range(2)]
        else:
            asked = [self._asked(rng, self._reference(rng, [subject]), 0) for subject in subjects]
        return self._row(rng, subjects, asked)

    def absent(self, rng: np.random.Generator) -> dict:
        missing, shown, asked_for = draw_instances(rng, self.seen, 3)
        if self.other_subjects_share and rng.random() < self.other_subjects_share:
            missing = self.world.draw_other(rng, split=self.split)
        drawn = [varied(rng, shown)] if rng.random() < 0.85 else []
        reference = self._reference(rng, drawn, but=missing.name)
        asked = {"reference": reference.picture, "query": _name(rng, missing.name), "mask": None}
        return self._row(rng, [varied(rng, asked_for)], [asked])

    def _subjects(self, rng: np.random.Generator, count: int) -> list[Instance | Other]:
        drawn: list = [varied(rng, each) for each in draw_instances(rng, self.seen, count)]
        if self.other_subjects_share:  # otherwise the same seed draws the same rows as before
            others = rng.random(count) < self.other_subjects_share
            drawn = [
                self.world.draw_other(rng, split=self.split) if o else each
                for each, o in zip(drawn, others, strict=True)
            ]
        return drawn

    def _reference(self, rng: np.random.Generator, subjects: list[Instance | Other], but: str = "") -> Scene:
        """Draws a scene with the subjects first and up to four things in total, none of them of the category `but`."""
        count = max(len(subjects), 1 + int(rng.choice(4, p=(0.1, 0.45, 0.3, 0.15)))) if subjects else 0
        things: list = list(subjects)
        while len(things) < count:
            if rng.random() < self.others_share:
                other = self.world.draw_other(rng, split=self.split)
                if other.name not in (but, *(subject.name for subject in subjects)):
                    things.append(other)
                continue
            (neighbour,) = draw_instances(rng, self.seen, 1)
            if neighbour.name not in (but, *(thing.name for thing in things)):
                things.append(varied(rng, neighbour))
        free = rng.random() < self.free_share or count not in LAYOUTS
        if free:
            things = [replace(thing, flipped=bool(rng.random() < 0.5)) for thing in things]
        return draw_scene(
            self.world, rng, things, boxes=arrange(rng, count) if free and count else None if count else []
        )

    def _asked(self, rng: np.random.Generator, reference: Scene, slot: int) -> dict:
        """Returns the reference, query and mask for the thing with the index `slot` in a reference."""
        name, mask = reference.instances[slot].name, reference.masks[slot]
        row = {"reference": reference.picture, "query": _name(rng, name), "mask": None}
        # a thing that is hidden behind another one cannot be marked
        if rng.random() < self.masked_share and mask.sum() > 20:
            row["mask"] = (mask * 255).astype(np.uint8)
            caption = reference.caption(rng) if len(reference.instances) < 4 else None
            row["query"] = (row["query"], caption, None)[rng.integers(3)]
        return row

    def _row(self, rng: np.random.Generator, subjects: list[Instance | Other], asked: list[dict]) -> dict:
        target = draw_scene(self.world, rng, subjects)
        named = [subject.name for subject in subjects]
        if rng.random() < 0.5:
            named = ["thing"] * len(named)
        rng.shuffle(named)
        row = {name: [each[name] for each in asked] for name in LISTS}
        return {"image": target.picture, "text": describe(named, PLACE_NAMES[target.place]), **row}


def _name(rng: np.random.Generator, name: str) -> str:
    return str(rng.choice([name, describe([name], None), f"the {name}"]))


def rows(designs: str, numbers: list[int], seed: int, split: str = "wide", **shares: float) -> Iterator[dict]:
    """Yields the rows with these numbers, with PNG files. Each row depends only on its number, the seed and the
    arguments of [`Rows`]."""
    drawing = Rows(designs, split, **shares)
    for number in numbers:
        row = drawing.draw(np.random.default_rng([seed, number]))
        for name in ("reference", "mask"):
            row[name] = [_png(picture) for picture in row[name]]
        yield {**row, "image": _png(row["image"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work_dir", type=Path, default=Path("outputs/pocket-training"), help="folder with the design sets"
    )
    parser.add_argument("--output_dir", type=Path, help="default: `pairs` in the work folder")
    parser.add_argument("--num_rows", type=int, default=24_000)
    parser.add_argument("--split", choices=SPLITS, default="wide", help="split whose held-out instances are not drawn")
    parser.add_argument(
        "--free_share", type=float, default=0.5, help="share of references with random sizes and positions"
    )
    parser.add_argument("--others_share", type=float, default=0.4, help="share of neighbours that are other emoji")
    parser.add_argument("--two_share", type=float, default=0.2, help="share of rows with two subjects")
    parser.add_argument(
        "--absent_share", type=float, default=0.15, help="share of rows whose query names nothing in the reference"
    )
    parser.add_argument("--masked_share", type=float, default=0.4, help="share of subjects that are marked by a mask")
    parser.add_argument(
        "--other_subjects_share", type=float, default=0.0, help="share of subjects that are not of a measured category"
    )
    parser.add_argument("--arrays", action="store_true", help="write arrays instead of a Parquet file")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    download_designs(args.work_dir / "designs")
    output = args.output_dir or args.work_dir / "pairs"
    output.mkdir(parents=True, exist_ok=True)
    shares = {name: value for name, value in vars(args).items() if name.endswith("_share")}
    if args.arrays:
        drawing = partial(Rows, str(args.work_dir / "designs"), args.split, **shares)
        write_arrays(output, drawing, args.num_rows, args.seed, args.num_proc)
        print(f"{output} contains {args.num_rows} pairs")
        return
    import datasets  # only needed here

    picture, text = datasets.Image(), datasets.Value("string")
    columns = {"image": picture, "text": text, "reference": [picture], "query": [text], "mask": [picture]}
    drawn = datasets.Dataset.from_generator(
        rows,
        features=datasets.Features(columns),
        cache_dir=str(output / ".cache"),
        gen_kwargs={
            "designs": str(args.work_dir / "designs"), "numbers": list(range(args.num_rows)), "seed": args.seed,
            "split": args.split, **shares,
        },
        num_proc=args.num_proc,
    )  # fmt: skip
    drawn.to_parquet(output / "pairs.parquet")
    print(f"{output} contains {len(drawn)} pairs")


if __name__ == "__main__":
    main()
