"""Train a new pocket checkpoint on one GPU, in two calls of at most nine minutes.

    python -m tools.pocket.train.gpu

trains the parts that are not trained yet, for at most `LONGEST` minutes, and assembles them in `--output_dir`. The next
call continues, and the time limit of each job applies to all calls together. The minutes go to the base model and the
SSR-Encoder. Before the SSR-Encoder is trained, the base model has to generate `AT_LEAST` percent of the emoji that it
was trained on (`tools.pocket.measure --parts shapes`); otherwise the plan stops. `--further` adds what depends on the
finished base model: the compared methods, ControlNet, motion modules and second look.

The jobs of a stage run in parallel, because such small models use only a small part of a GPU. An NVIDIA MPS
daemon (`nvidia-cuda-mps-control -d`) doubles their speed. The pairs need 6 GB on the disk. The design sets come from the
npm registry; on a machine without network, put them into `designs` of the work folder. `--dry_run` runs every job with
two steps in a folder of its own, one after the other and also on a CPU, to check that nothing is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..methods import METHODS
from ..world import download_designs, download_icons


LONGEST = 9.0  # maximum minutes of a call
AT_LEAST = 70  # percent of the others that the base model has to generate
SPLIT = "--split sets"
# More steps than any GPU reaches in the given minutes, so the learning rate schedule depends on the time.
ENDLESS = "--max_train_steps 1000000 --threads 2 --checkpointing_steps 250 --sample_steps 4000"


@dataclass(frozen=True)
class Job:
    """A module of `tools.pocket.train`, or `measure`, its options, and the minutes of training. `None` means that there is no time
    limit."""

    name: str
    module: str
    options: str
    minutes: float | None = None

    def command(self, args: argparse.Namespace) -> list[str]:
        """Returns the command line of the job."""
        package = "tools.pocket" if self.module == "measure" else "tools.pocket.train"
        line = [sys.executable, "-m", f"{package}.{self.module}", *self.options.split()]
        line += ["--work_dir", str(args.work_dir)]
        if self.module == "measure":
            line += ["--checkpoint", str(args.work_dir / "base"), "--device", args.device]
            return line + (["--num_references", "2", "--at_least", "0"] if args.dry_run else [])
        if self.module in ("assemble", "pairs"):
            line += ["--output_dir", str(args.work_dir / self.name)]
        if self.module == "assemble":
            line += ["--comparison_dir", str(args.comparison_dir)]
        if self.module == "adapters":
            folder, pairs = self.name.split()[0], "single-pairs" if self.name.startswith("adapters") else "pairs"
            line += ["--output_dir", str(args.work_dir / folder), "--pairs_dir", str(args.work_dir / pairs)]
            line += ["--checkpoint", str(args.work_dir / "base")]
        if self.minutes is not None:
            line += ["--device", args.device, "--minutes", str(self.minutes)]
        if args.dry_run:
            if self.module == "pairs":
                line += ["--num_rows", "40", "--num_proc", "1"]
            elif self.module != "assemble":
                line += ["--max_train_steps", "2", "--train_batch_size", "4", "--threads", "1"]
                line += [] if self.module == "adapters" else ["--num_workers", "0"]
        return line


def _adapter(name: str, method: str, options: str) -> Job:
    return Job(name, "adapters", f"--methods {method} --arrays --no-cache --threads 1 {options}")


# Each stage uses the results of the previous stages. The first two fill the first call.
STAGES = (
    (
        Job("clip", "clip", f"{SPLIT} {ENDLESS} --train_batch_size 384 --uses 8 --num_workers 4 --learning_rate 1.5e-3", 2.0),
        Job("vae decoder", "vae", f"--part decoder {SPLIT} {ENDLESS} --train_batch_size 64 --uses 8 --num_workers 1", 2.0),
        Job("judge", "judge", f"{SPLIT} {ENDLESS} --train_batch_size 192 --uses 6 --num_workers 2", 2.0),
        Job("pairs", "pairs", f"{SPLIT} --arrays --num_rows 120000 --other_subjects_share 0.8 --free_share 0.3"
            " --others_share 0.3 --two_share 0.22 --num_proc 5"),
    ),
    (
        Job("unet", "unet", f"{SPLIT} {ENDLESS} --others_share 0.9 --train_batch_size 384 --uses 10 --num_workers 8"
            " --learning_rate 1.5e-3 --ema_decay 0.999", 6.0),
        Job("vision", "clip", f"--part vision {SPLIT} {ENDLESS} --train_batch_size 384 --uses 8 --num_workers 4", 3.0),
        Job("vae encoder", "vae", f"--part encoder {SPLIT} {ENDLESS} --train_batch_size 64 --uses 8 --num_workers 1", 2.0),
    ),
    (Job("base", "assemble", SPLIT),),
    (Job("stop rule", "measure", f"--parts shapes --num_references 100 --batch_size 100 --at_least {AT_LEAST}"),),
    (_adapter("shipped", "ssr", "--max_train_steps 4500 --train_batch_size 64 --options=--consistency_weight=0.0003"),),
)  # fmt: skip
FURTHER = (
    # the rows of the compared methods show one subject each, because not all methods can have several
    (Job("single-pairs", "pairs", f"{SPLIT} --arrays --num_rows 30000 --two_share 0 --absent_share 0"
         " --masked_share 0.2 --num_proc 8 --seed 1"),),
    (
        *(_adapter(f"adapters {name}", name, "--max_train_steps 4000 --train_batch_size 16") for name in METHODS),
        Job("controlnet", "controlnet", f"{SPLIT} {ENDLESS} --train_batch_size 64 --uses 8 --num_workers 1", 4.0),
        Job("motion", "motion", f"{SPLIT} {ENDLESS} --train_batch_size 16 --uses 8 --num_workers 1", 4.0),
        Job("look", "look", f"{SPLIT} {ENDLESS} --train_batch_size 64 --uses 8 --num_workers 1", 2.0),
    ),
)  # fmt: skip


def run(jobs: tuple[Job, ...], args: argparse.Namespace, begun: float) -> None:
    """Runs the jobs that are not done yet in parallel.

    Raises:
        `SystemExit`: if a job fails, or `LONGEST` minutes after `begun`. The checkpoints are kept.
    """
    notes = args.work_dir / "gpu_stages.json"
    done = json.loads(notes.read_text()) if notes.exists() else []
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "2"}
    if args.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "1"
    (args.work_dir / "logs").mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen] = {}
    waiting = [job for job in jobs if job.name not in done]
    failed: list[str] = []
    try:
        while (running or waiting) and not failed:
            while waiting and not (running and args.dry_run):
                job = waiting.pop(0)
                with (args.work_dir / "logs" / f"{job.name.replace(' ', '_')}.log").open("a") as log:
                    running[job.name] = subprocess.Popen(
                        job.command(args), stdout=log, stderr=subprocess.STDOUT, env=environment
                    )
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    failed.append(name)
                    continue
                done.append(name)
                notes.write_text(json.dumps(done))
                print(f"{name} is done after {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
            if (running or waiting) and time.monotonic() - begun > 60 * LONGEST and not args.dry_run:
                raise SystemExit(f"Stopped after {LONGEST:g} minutes. Run it again; it goes on from there.")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    if failed:
        raise SystemExit(f"{failed[0]} failed; see {args.work_dir / 'logs'}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training-gpu"))
    parser.add_argument(
        "--output_dir", type=Path, help="the finished checkpoint; default: `result` in the work folder"
    )
    parser.add_argument("--comparison_dir", type=Path, help="default: `comparison` in the work folder")
    parser.add_argument("--further", action="store_true", help="also train what depends on the finished base model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry_run", action="store_true", help="run every job with two steps")
    args = parser.parse_args()
    begun = time.monotonic()
    if args.dry_run:
        args.work_dir /= "dry-run"
        args.output_dir = args.comparison_dir = None
    args.output_dir = args.output_dir or args.work_dir / "result"
    args.comparison_dir = args.comparison_dir or args.work_dir / "comparison"
    if args.device == "cpu" and not args.dry_run:
        raise SystemExit("No GPU is available. `make pocket` trains on a CPU, which takes hours.")
    download_designs(args.work_dir / "designs")
    download_icons(args.work_dir / "designs")
    for jobs in STAGES + (FURTHER if args.further else ()):
        run(jobs, args, begun)
    finish = [sys.executable, "-m", "tools.pocket.train.assemble", *SPLIT.split()]
    finish += ["--work_dir", str(args.work_dir), "--comparison_dir", str(args.comparison_dir)]
    subprocess.run([*finish, "--output_dir", str(args.output_dir)], check=True)


if __name__ == "__main__":
    main()
