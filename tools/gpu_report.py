"""Measure on one GPU, in at most five minutes, what needs a GPU: the table of docs/memory.md, the time that a subject adds
to a step, the speed of training, and the tests that are skipped without a GPU.

    python tools/gpu_report.py

prints the report and writes it to `outputs/gpu_report.md`. `--dry_run` runs everything with the sizes of the pocket
checkpoint, also on a CPU. It needs no network.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch


ROOT = Path(__file__).resolve().parents[1]
MINUTES = 5.0
ROWS = 2048  # training pairs of noise; neither memory nor time depends on the values


def commands(dry_run: bool) -> dict[str, list[str]]:
    """Returns the title and the command of each part except the training."""
    size = "--preset pocket --dtype float32 --num_inference_steps 1" if dry_run else "--dtype float16"
    sides, larger = ("64", "64 96") if dry_run else ("512", "512 768")
    more = "--subjects 1 3" if dry_run else "--batch_size 1 8 --subjects 1 3"
    memory, speed = (
        f"examples/benchmark_memory.py {size}",
        f"examples/benchmark.py {size} --size {sides} --rounds {1 if dry_run else 2}",
    )
    lines = {
        "Memory and seconds of a step": f"{memory} --size {larger} {more} --settings none",
        "Tests": "-m pytest -q -rs tests/test_gpu.py",
        "What a subject adds to a step": f"{speed} --methods stock ssr ssr_compact",
        "What three subjects add": f"{speed} --methods stock ssr ssr_compact --subjects 3",
        "Offloading": f"{memory} --size {sides} --settings model_offload sequential_offload",
        "Compiled": f"{memory} --size {sides} {more} --settings compiled",
    }
    return {title: [sys.executable, *line.split()] for title, line in lines.items()}


def run(title: str, command: list[str], ends: float) -> float:
    """Runs a command until `ends`, prints and returns its seconds. The rest of the report does not need it."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(ends - started, 1), env=ENVIRONMENT
        )
        output = done.stdout.strip() if done.returncode == 0 else f"Failed:\n{(done.stdout + done.stderr)[-2000:]}"
        failed = done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output, failed = f"{(error.stdout or b'').decode()}\nStopped, because the time is over.", True
    if title:
        report(f"## {title}\n\n{output}\n\n{time.monotonic() - started:.0f} s: `{' '.join(command[1:])}`\n")
    elif failed:
        report(output)
    if failed:
        FAILED.append(title or "training")
    return time.monotonic() - started


def train(folder: Path, ends: float, dry_run: bool) -> None:
    """Measures how many samples a second the training of the pocket SSR-Encoder processes, with and without the
    consistency loss. The difference between a long and a short training leaves out the start."""
    from tools.pocket.drawn_pairs import write_arrays

    write_arrays(folder / "pairs", Noise, ROWS if not dry_run else 16, 0, 1)
    batch, steps = (4, (2, 4)) if dry_run else (64, (50, 300))
    lines = []
    for name, options in (("with", ""), ("without", "--consistency_weight=0")):
        seconds = []
        for count in steps:
            command = [
                sys.executable,
                "-m",
                "tools.pocket.train.adapters",
                "--methods",
                "ssr",
                "--continued",
                "--arrays",
            ]
            command += [
                "--no-cache",
                "--threads",
                "1",
                "--max_train_steps",
                str(count),
                "--train_batch_size",
                str(batch),
            ]
            command += ["--pairs_dir", str(folder / "pairs"), "--output_dir", str(folder / f"{name}{count}")]
            seconds.append(run("", [*command, f"--options={options}"], ends))
        rate = batch * (steps[1] - steps[0]) / (seconds[1] - seconds[0])
        lines.append(f"- {name} the consistency loss: {rate:.0f} samples a second (batches of {batch})")
    report("## Training of the pocket SSR-Encoder, its encoder alone\n\n" + "\n".join(lines) + "\n")


class Noise:
    """Draws training pairs with one subject."""

    def draw(self, rng: np.random.Generator) -> dict:
        image, reference = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
        row = {"image": image, "text": "a cat on the beach"}
        return {**row, "reference": [reference], "query": ["cat"], "mask": [None]}


def report(text: str) -> None:
    print(text, flush=True)
    with REPORT.open("a") as file:
        file.write(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="run everything with small models, also on a CPU")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        raise SystemExit("No GPU is available. `--dry_run` runs on a CPU.")
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    ends = time.monotonic() + 60 * (MINUTES if not args.dry_run else 60)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, a dry run: the figures mean nothing"
    report(f"# GPU report: {device}, PyTorch {torch.__version__}\n")
    listed = list(commands(args.dry_run).items())
    # compiling takes longest, so it is last
    for title, command in listed[:-1]:
        run(title, command, ends)
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), ends, args.dry_run)
    run(*listed[-1], ends)
    if FAILED:
        raise SystemExit(f"Failed: {', '.join(FAILED)}")


REPORT = ROOT / "outputs" / "gpu_report.md"
ENVIRONMENT = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
FAILED: list[str] = []
sys.path.append(str(ROOT))


if __name__ == "__main__":
    main()
