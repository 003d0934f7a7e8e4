"""Train the SSR-Encoder of the pocket checkpoint with examples/train_ssr.py, and the methods that it is compared with:
an adapter in the style of IP-Adapter Plus and three ablations. All use the same pairs, steps and batches, and their
numbers of parameters differ by at most a tenth.

    python -m tools.pocket.train.pairs --two_share 0 --absent_share 0
    python -m tools.pocket.train.adapters

The base model is loaded from `--checkpoint` and the vision encoder from the work folder. Training of each method
resumes automatically.

    python -m tools.pocket.train.adapters --methods ssr --max_train_steps 20000 --output_dir outputs/pocket-training/shipped

trains an SSR-Encoder for longer. `train.assemble` puts it into the checkpoint, and the methods that are compared beside
it.

    python -m tools.pocket.train.adapters --methods ssr --continued --max_train_steps 1500

continues the training of the encoder of `--checkpoint`, with its own vision encoder and a lower learning rate.
"""

import argparse
import os
from pathlib import Path

import torch

from ..drawn_pairs import DrawnSamples
from ..methods import COMMON, CONTINUED, METHODS, ROOT, train_ssr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--checkpoint", default=str(ROOT / "pocket"), help="the base model")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training"))
    parser.add_argument("--pairs_dir", type=Path, help="the training set; default: `pairs` in the work folder")
    parser.add_argument(
        "--arrays", action="store_true", help="the training set consists of arrays (`train.pairs --arrays`)"
    )
    parser.add_argument("--output_dir", type=Path, help="default: `adapters` in the work folder")
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="", help="further options of train_ssr.py")
    parser.add_argument("--continued", action="store_true", help="continue to train the checkpoint's SSR-Encoder")
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True,
        help="cache the outputs of the frozen models for each row; otherwise they run on each batch")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.continued and args.methods != ["ssr"]:
        parser.error(
            "`--continued` requires `--methods ssr`, because train_ssr.py cannot load the encoders of other methods."
        )
    torch.set_num_threads(args.threads)
    pairs = args.pairs_dir or args.work_dir / "pairs"

    def open_samples(prepare, position):
        return DrawnSamples(pairs, prepare.processor, args.seed, position)

    for name in args.methods:
        method = METHODS[name]
        own = {
            "pretrained_model_name_or_path": args.checkpoint,
            "train_data_dir": pairs,
            "output_dir": (args.output_dir or args.work_dir / "adapters") / name,
            "max_train_steps": args.max_train_steps,
            "train_batch_size": args.train_batch_size,
            "seed": args.seed,
        }
        if args.continued:
            own["ssr_encoder_name_or_path"] = args.checkpoint
        else:
            own["image_encoder_name_or_path"] = args.work_dir / "clip"
        if args.cache:
            own["cache_features"] = args.work_dir / "features"
        options = [str(part) for option, value in own.items() for part in (f"--{option}", value)]
        # the options of a method are the sizes of a new encoder
        further = CONTINUED.split() if args.continued else method.options.split()
        options += [*COMMON.split(), *further, *args.options.split()]
        train_ssr.main(options, method.build, open_samples if args.arrays else None)


if __name__ == "__main__":
    main()
