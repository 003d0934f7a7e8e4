"""Train the pocket's SSR-Encoder with examples/train_ssr.py, and what it is compared with: an adapter of IP-Adapter-Plus's
kind and three ablations, on the same pairs, for the same steps and batches, with as many parameters within a tenth.

    python -m tools.pocket.train.pairs
    python -m tools.pocket.train.adapters --methods ssr

The base model is that of `--checkpoint`, and the vision encoder that of the work folder. Every method resumes.
"""

import argparse
import os
from pathlib import Path

import torch

from ..methods import COMMON, METHODS, ROOT, train_ssr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--checkpoint", default=str(ROOT / "pocket"), help="the base model")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training"))
    parser.add_argument("--max_train_steps", type=int, default=4800)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.methods:
        method = METHODS[name]
        own = {
            "pretrained_model_name_or_path": args.checkpoint,
            "image_encoder_name_or_path": args.work_dir / "clip",
            "train_data_dir": args.work_dir / "pairs",
            "cache_features": args.work_dir / "features",
            "output_dir": args.work_dir / "adapters" / name,
            "max_train_steps": args.max_train_steps,
            "train_batch_size": args.train_batch_size,
        }
        options = [str(part) for option, value in own.items() for part in (f"--{option}", value)]
        train_ssr.main([*options, *COMMON.split(), *method.options.split()], method.build)


if __name__ == "__main__":
    main()
