"""Draw the pocket's training set for ../train_ssr.py: a Parquet file of pairs.

The reference shows two or three subjects, of which one is queried; the target shows that very instance alone, on a place of
its own. Captions name place and category, or only "a thing", so that colour and design have to come from the reference. In
one row of five a mask says which subject is meant, and the query describes the whole reference.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ..world import PLACE_NAMES, SEEN, World, describe, download_designs, draw_instances, draw_scene


def _png(picture: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def rows(designs: str, numbers: list[int], seed: int) -> Iterator[dict]:
    """The rows of these numbers; each depends on its number and the seed alone."""
    world = World(designs)
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        reference = draw_scene(world, rng, draw_instances(rng, SEEN, 3 if rng.random() < 0.2 else 2))
        slot = rng.integers(len(reference.instances))
        target = draw_scene(world, rng, [reference.instances[slot]])
        name = reference.instances[slot].name
        mask, query = None, str(rng.choice([name, describe([name], None), f"the {name}"]))
        if rng.random() < 0.2:
            mask, query = _png((reference.masks[slot] * 255).astype(np.uint8)), reference.caption(rng)
        named = "thing" if rng.random() < 0.6 else name
        yield {
            "image": _png(target.picture),
            "text": describe([named], PLACE_NAMES[target.place]),
            "reference": _png(reference.picture),
            "query": query,
            "mask": mask,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training"), help="for the design sets")
    parser.add_argument("--output_dir", type=Path, help="default: pairs, in the work folder")
    parser.add_argument("--num_rows", type=int, default=12_000)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    download_designs(args.work_dir / "designs")
    output = args.output_dir or args.work_dir / "pairs"
    output.mkdir(parents=True, exist_ok=True)
    pictures = {name: datasets.Image() for name in ("image", "reference", "mask")}
    texts = {name: datasets.Value("string") for name in ("text", "query")}
    drawn = datasets.Dataset.from_generator(
        rows,
        features=datasets.Features({**pictures, **texts}),
        cache_dir=str(output / ".cache"),
        gen_kwargs={
            "designs": str(args.work_dir / "designs"), "numbers": list(range(args.num_rows)), "seed": args.seed,
        },
        num_proc=args.num_proc,
    )  # fmt: skip
    drawn.to_parquet(output / "pairs.parquet")
    print(f"{output} holds {len(drawn)} pairs")


if __name__ == "__main__":
    main()
