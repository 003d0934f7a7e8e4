"""Run mixed requests from many threads for a long time. Compares every outcome, and monitors memory and object counts.

python -m tools.soak --minutes 60
python -m tools.soak --rounds 10        # only compare the time of threads with the time of one request at a time
"""

import argparse
import gc
import os
import random
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import ControlNetModel
from diffusers_ssr import StableDiffusionSSRPipeline
from diffusers_ssr.internals_ssr import precision_arguments
from PIL import Image

from tools.mixed_requests import Request, mixed_requests, wrong_outcomes


POCKET = Path(__file__).resolve().parent.parent / "pocket"


def resident_megabytes() -> float:
    """Returns the resident memory of this process in megabytes (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_requests(checkpoint: str, size: int) -> list[Request]:
    """Creates requests of every kind on one pipeline with the weights in `checkpoint`."""
    float32 = precision_arguments({"dtype": torch.float32})
    pipe = StableDiffusionSSRPipeline.from_pretrained(checkpoint, safety_checker=None, **float32)
    if pipe.ssr_encoder is None:
        pipe.load_ssr(checkpoint)
    controlnet = ControlNetModel.from_pretrained(checkpoint, subfolder="controlnet", **float32)
    files = sorted(f"{checkpoint}/references/{name}" for name in os.listdir(f"{checkpoint}/references"))[:3]
    queries = [os.path.basename(file).split("_")[1].split(".")[0] for file in files]
    return mixed_requests(pipe, controlnet, [Image.open(file).convert("RGB") for file in files], queries, size)


def soak(requests: list[Request], expected: list, minutes: float, num_threads: int, batch: int) -> bool:
    """Runs batches of requests and prints the status after each batch. Returns whether all outcomes were as expected
    and neither the memory nor the number of objects grew."""
    chance, started, done, wrong, levels = random.Random(0), time.monotonic(), 0, [], []
    while time.monotonic() - started < minutes * 60:
        order = chance.choices(range(len(requests)), k=batch)
        wrong += wrong_outcomes(requests, expected, order, num_threads)
        done += batch
        gc.collect()
        levels.append((resident_megabytes(), len(gc.get_objects())))
        print(
            f"{(time.monotonic() - started) / 60:6.1f} min {done:7d} requests {len(wrong):3d} wrong"
            f" {levels[-1][0]:8.1f} MB {levels[-1][1]:8d} objects",
            flush=True,
        )
    for each in wrong[:20]:
        print(each)
    # the first quarter is ignored, because caches and allocators grow at first
    quarter = len(levels) // 4
    early, late = levels[quarter : 2 * quarter] or levels[:1], levels[-quarter:] or levels[-1:]

    def growth_of(index: int) -> float:
        then, now = (statistics.median(level[index] for level in part) for part in (early, late))
        return now / then - 1

    growth = growth_of(0), growth_of(1)
    print(
        f"{done} requests, {len(wrong)} wrong; memory {growth[0]:+.2%}, objects {growth[1]:+.2%}"
        " from the second to the last quarter"
    )
    return not wrong and growth[0] < 0.05 and growth[1] < 0.01


def compare_throughput(requests: list[Request], rounds: int, num_threads: int, batch: int) -> None:
    """Measures the time of the same requests one at a time and in threads. Both are measured alternately, so that
    other load on the machine affects both."""
    chance, seconds = random.Random(0), {1: [], num_threads: []}
    for turn in range(rounds):
        order = chance.choices(range(len(requests)), k=batch)
        for threads in sorted(seconds, reverse=bool(turn % 2)):
            started = time.monotonic()
            wrong_outcomes(requests, [""] * len(requests), order, threads)
            seconds[threads].append(time.monotonic() - started)
        print({threads: round(each[-1], 2) for threads, each in seconds.items()}, flush=True)
    ratios = [many / one for one, many in zip(seconds[1], seconds[num_threads], strict=True)]
    print(
        f"{num_threads} threads take {statistics.median(ratios):.2f} of the time of one request at a time"
        f" (median of {rounds})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(POCKET), help="a folder like pocket/ (default: pocket/)")
    parser.add_argument("--minutes", type=float, default=0, help="duration of the soak test")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of the comparison with one request at a time")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="requests between two measurements of the memory")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    requests = make_requests(args.checkpoint, args.size)
    expected = [each.outcome() for each in requests]
    if args.rounds:
        compare_throughput(requests, args.rounds, args.threads, args.batch)
    if args.minutes:
        return 0 if soak(requests, expected, args.minutes, args.threads, args.batch) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
