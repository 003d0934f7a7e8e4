"""Measure the pocket checkpoint: selection, the comparison with other methods, other pipelines, and how cheaper
inference changes the images.

The judge (see judge.py) classifies the images. Each reference shows two subjects. Their instances are held out from
the training of all models except the judge. The required design sets are downloaded from the npm registry at the first
call.
"""

import argparse
from pathlib import Path

from diffusers.utils import logging

from ..methods import COMPARISON, ROOT
from . import chains, comparison, controls, features, selection, several_images, shapes, speed, words
from .references import References


PARTS = {
    "text": selection.from_text,
    "selection": selection.selection,
    "seen": selection.seen,
    "both": selection.both_subjects,
    "together": selection.together,
    "features": features.features,
    "words": words.words,
    "pairs": words.pairs,
    "shapes": shapes.shapes,
    "alone": controls.alone,
    "absent": controls.absent,
    "masks": controls.masks,
    "three": controls.three,
    "people": controls.people,
    "pointing": controls.pointing,
    "images": several_images.images,
    "negative": several_images.negative,
    "comparison": comparison.comparison,
    "cutouts": comparison.cutouts,
    "controlnet": chains.controlnet,
    "video": chains.video,
    "look": chains.look,
    "tokens": speed.tokens,
    "few_steps": speed.few_steps,
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tools.pocket.measure",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--checkpoint", default=str(ROOT / "pocket"))
    parser.add_argument(
        "--work_dir", type=Path, default=Path("outputs/pocket-training"), help="folder with the design sets"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="folder for the sample sheet")
    parser.add_argument(
        "--comparison_dir", type=Path, default=COMPARISON, help="folder with the methods of `comparison`"
    )
    parser.add_argument("--num_references", type=int, default=200)
    parser.add_argument(
        "--seed", type=int, default=12345, help="seed of the references; settings and results need different seeds"
    )
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--eta", type=float, default=0.9, help="noise of DDIM, which corrects errors of earlier steps")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--mask_weight", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="device of the pipeline; the judge stays on the CPU")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of timing in few_steps")
    parser.add_argument(
        "--choosing", action="store_true", help="measure on the instances for choosing a checkpoint (`CHOOSING`)"
    )
    parser.add_argument(
        "--at_least", type=float, default=0.0, help="percent of the others that the base has to reach in `shapes`"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    references = References(args)
    for part in args.parts:
        PARTS[part](references)
    if references.columns:
        print(f"references, each with its images in the order above: {references.save_sheet()}")


if __name__ == "__main__":
    main()
