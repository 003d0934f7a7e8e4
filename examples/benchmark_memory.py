"""Measure the memory and seconds of a call with different settings, for the stock pipeline and with subjects.

    python examples/benchmark_memory.py --dtype float16
    python examples/benchmark_memory.py --dtype float16 --size 512 768 --batch_size 1 8 --subjects 1 3 --settings none compiled
    python examples/benchmark_memory.py --preset pocket --size 64

The models have the sizes of Stable Diffusion 1.5 and random weights, which does not affect memory or time. On a GPU,
the result is the peak memory that PyTorch allocates on the GPU. Without a GPU, it is the peak memory of the process,
and the offloading settings are left out.
"""

import argparse
import contextlib
import gc
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import extras  # noqa: F401  (exits with a message if the project is not installed)

from command_line import image_side, make_parser, positive, run_script


SETTING_NAMES = (
    "none", "drop_ssr_encoders", "attention_slicing", "vae_slicing_and_tiling", "compiled", "model_offload",
    "sequential_offload",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=("sd15", "pocket"), default="sd15", help="the sizes of SD 1.5, or the pocket checkpoint")
    add("--size", type=image_side, nargs="+", default=[512], help="sizes of the images in pixels")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="precision")
    add("--batch_size", type=positive, nargs="+", default=[1], help="numbers of images per call")
    add("--subjects", type=positive, nargs="+", default=[1], help="numbers of subjects in each image")
    add("--num_inference_steps", type=positive, default=4, help="steps that are timed")
    add("--rounds", type=positive, default=1, help="how often each call is timed")
    default = [name for name in SETTING_NAMES if name != "compiled"]
    add("--settings", nargs="+", choices=SETTING_NAMES, default=default, help="the settings to measure")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the imports below, which take seconds

import torch
from benchmark import time_calls
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from random_models import PIPELINES


def drop_encoders(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.drop_ssr_encoders()
    pipe.to(device)


def slice_attention(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.enable_attention_slicing()
    pipe.to(device)


def slice_vae(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.to(device)


def compile_blocks(pipe: DiffusionPipeline, device: torch.device) -> None:
    # each size, number of images and number of subjects is a new compilation
    torch._dynamo.config.cache_size_limit = 64
    pipe.to(device)
    pipe.unet.compile_repeated_blocks(fullgraph=True)


# each function prepares a new pipeline after its subject was encoded
PREPARE: tuple[Callable[[DiffusionPipeline, torch.device], None], ...] = (
    lambda pipe, device: pipe.to(device),
    drop_encoders,
    slice_attention,
    slice_vae,
    compile_blocks,
    lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
)
SETTINGS = dict(zip(SETTING_NAMES, PREPARE, strict=True))
NEED_GPU = ("model_offload", "sequential_offload")


def reset_peak(on_gpu: bool) -> None:
    """Resets the peak memory of the GPU, or that of this process on Linux."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(on_gpu: bool) -> int:
    """Returns the peak memory since `reset_peak`, or 0 if it is unknown."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def measure(setting: str, args: argparse.Namespace, device: torch.device) -> Iterator[list[str]]:
    """Yields the rows of the table: the peak memory and the seconds of a step, without and with subjects."""
    pipe = PIPELINES[args.preset]()
    pipe.to(getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    subject = pipe.encode_subject(Image.effect_noise((256, 256), 20), query="cat")
    SETTINGS[setting](pipe, device)
    for size, count in itertools.product(args.size, args.batch_size):
        cells = [setting, str(size), str(count)]
        for given in ({}, *({"subject": sum([subject] * (each - 1), subject)} for each in args.subjects)):

            def call(steps: int, callback: Callable, size=size, count=count, given=given) -> None:
                pipe(
                    ["a cat"] * count, height=size, width=size, num_inference_steps=steps,
                    callback_on_step_end=callback, output_type="pil", **given,
                )  # fmt: skip

            gc.collect()
            reset_peak(device.type == "cuda")
            seconds = time_calls({setting: call}, args)[setting]
            cells += [f"{peak_bytes(device.type == 'cuda') / 2**30:.2f} GiB", f"{seconds:.4f} s"]
        yield cells


def main():
    args = parse_args()
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, memory of the process"
    settings = [each for each in args.settings if device.type == "cuda" or each not in NEED_GPU]
    print(f"{args.preset}, {args.dtype}, {name}")
    head = ["setting", "px", "images", "stock: peak", "a step"]
    for count in args.subjects:
        head += [f"{count} subject(s): peak", "a step"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for setting in settings:
        for row in measure(setting, args, device):
            print("| " + " | ".join(row) + " |", flush=True)
    skipped = [each for each in args.settings if each not in settings]
    if skipped:
        print(f"Skipped, because they need a GPU: {', '.join(skipped)}")


if __name__ == "__main__":
    run_script(main)
