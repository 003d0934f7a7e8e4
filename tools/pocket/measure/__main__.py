"""Measure the pocket checkpoint: selection, the comparison with other methods, chains, and what cheaper drawing costs in the picture.

The judge (see judge.py) looks at the pictures. References hold two subjects; their instances were held out from everything
that was trained, the judge apart. Needs the design sets, which are downloaded from the npm registry at the first call.
"""

import argparse
from pathlib import Path

from diffusers.utils import logging

from ..methods import ROOT
from . import chains, comparison, controls, features, selection, speed, words
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
    "alone": controls.alone,
    "absent": controls.absent,
    "masks": controls.masks,
    "three": controls.three,
    "people": controls.people,
    "pointing": controls.pointing,
    "comparison": comparison.comparison,
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
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training"), help="for the design sets")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="for the sample sheet")
    parser.add_argument("--num_references", type=int, default=200)
    parser.add_argument(
        "--seed", type=int, default=12345, help="of the references; settings are chosen on others than are reported"
    )
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--eta", type=float, default=0.9, help="DDIM's noise: it corrects errors on the way")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--mask_weight", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="how often the ways of drawing take turns (few_steps)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    references = References(args)
    for part in args.parts:
        PARTS[part](references)
    if references.columns:
        print(f"references, each with what was drawn for it in the order above: {references.save_sheet()}")


if __name__ == "__main__":
    main()
