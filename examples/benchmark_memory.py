"""Measure the memory and seconds of a call with different settings, for the stock pipeline and with a subject.

    python examples/benchmark_memory.py --dtype float16
    python examples/benchmark_memory.py --preset pocket --size 64

The models have the sizes of Stable Diffusion 1.5 and random weights, which does not affect memory or time. On a GPU,
the result is the peak memory that PyTorch allocates on the GPU. Without a GPU, it is the peak memory of the process,
and the offloading settings are left out.
"""

import argparse
import contextlib
import gc
import re
from collections.abc import Callable
from pathlib import Path

import extras  # noqa: F401  (exits with a message if the project is not installed)

from command_line import image_side, make_parser, positive, run_script


SETTING_NAMES = (
    "none", "drop_ssr_encoders", "attention_slicing", "vae_slicing_and_tiling", "model_offload", "sequential_offload",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=("sd15", "pocket"), default="sd15", help="the sizes of SD 1.5, or the pocket checkpoint")
    add("--size", type=image_side, default=512, help="size of the images in pixels")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="precision")
    add("--batch_size", type=positive, default=1, help="images per call")
    add("--num_inference_steps", type=positive, default=4, help="steps that are timed")
    add("--rounds", type=positive, default=1, help="how often each call is timed")
    add("--settings", nargs="+", choices=SETTING_NAMES, default=list(SETTING_NAMES), help="the settings to measure")
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


# each function prepares a new pipeline after its subject was encoded
PREPARE: tuple[Callable[[DiffusionPipeline, torch.device], None], ...] = (
    lambda pipe, device: pipe.to(device),
    drop_encoders,
    slice_attention,
    slice_vae,
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


def measure(setting: str, args: argparse.Namespace, device: torch.device) -> list[str]:
    """Returns a row of the table: the peak memory and the seconds of a step, without and with a subject."""
    pipe = PIPELINES[args.preset]()
    pipe.to(getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    subject = pipe.encode_subject(Image.effect_noise((256, 256), 20), query="cat")
    SETTINGS[setting](pipe, device)
    cells = [setting]
    for given in ({}, {"subject": subject}):

        def call(steps: int, callback: Callable, given=given) -> None:
            pipe(
                ["a cat"] * args.batch_size, height=args.size, width=args.size, num_inference_steps=steps,
                callback_on_step_end=callback, output_type="pil", **given,
            )  # fmt: skip

        gc.collect()
        reset_peak(device.type == "cuda")
        seconds = time_calls({setting: call}, args)[setting]
        cells += [f"{peak_bytes(device.type == 'cuda') / 2**30:.2f} GiB", f"{seconds:.3f} s"]
    return cells


def main():
    args = parse_args()
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, memory of the process"
    settings = [each for each in args.settings if device.type == "cuda" or each not in NEED_GPU]
    print(f"{args.preset}, {args.size} px, {args.batch_size} image(s), {args.dtype}, {name}")
    print("| setting | stock: peak | a step | with a subject: peak | a step |\n|---|---|---|---|---|")
    for setting in settings:
        print("| " + " | ".join(measure(setting, args, device)) + " |", flush=True)
    skipped = [each for each in args.settings if each not in settings]
    if skipped:
        print(f"Skipped, because they need a GPU: {', '.join(skipped)}")


if __name__ == "__main__":
    run_script(main)
