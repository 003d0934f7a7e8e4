"""Measure the memory and seconds of a call with different settings, for the stock pipeline and with a subject.

    python examples/benchmark_memory.py --dtype float16
    python examples/benchmark_memory.py --preset pocket --size 64

The models have the sizes of Stable Diffusion 1.5 and random weights, which does not affect memory or time. On a GPU,
the result is the peak memory that PyTorch allocates on the GPU. Without a GPU, it is the peak memory of the process,
and the offloading settings are left out.
"""

import argparse
import gc
from collections.abc import Callable

import extras  # noqa: F401  (exits with a message if the project is not installed)

import torch
from benchmark import peak_bytes, pocket_pipeline, reset_peak, sd15_pipeline, time_draws
from command_line import HelpFormatter, picture_side, positive, run_script
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image


def to_device(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.to(device)


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


def model_offload(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.enable_model_cpu_offload(device=device)


def sequential_offload(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


# each function prepares a new pipeline after its subject was encoded
SETTINGS: dict[str, Callable[[DiffusionPipeline, torch.device], None]] = {
    "none": to_device,
    "drop_ssr_encoders": drop_encoders,
    "attention_slicing": slice_attention,
    "vae_slicing_and_tiling": slice_vae,
    "model_offload": model_offload,
    "sequential_offload": sequential_offload,
}
NEED_GPU = ("model_offload", "sequential_offload")


def measure(setting: str, args: argparse.Namespace, device: torch.device) -> list[str]:
    """Returns a row of the table: the peak memory and the seconds of a step, without and with a subject."""
    pipe = sd15_pipeline() if args.preset == "sd15" else pocket_pipeline()
    pipe.to(getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    subject = pipe.encode_subject(Image.effect_noise((256, 256), 20), query="cat")
    SETTINGS[setting](pipe, device)
    cells = [setting]
    for given in ({}, {"subject": subject}):

        def draw(steps: int, callback=None, given=given) -> None:
            pipe(
                ["a cat"] * args.batch_size, height=args.size, width=args.size, num_inference_steps=steps,
                callback_on_step_end=callback, output_type="pil", **given,
            )  # fmt: skip

        gc.collect()
        reset_peak(device.type == "cuda")
        result = time_draws({setting: draw}, args, device)[setting]
        peak = max(result["peak_bytes"], peak_bytes(device.type == "cuda"))
        cells += [f"{peak / 2**30:.2f} GiB", f"{min(result['seconds']):.3f} s"]
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--preset",
        choices=("sd15", "pocket"),
        default="sd15",
        help="the sizes of Stable Diffusion 1.5, or the pocket checkpoint",
    )
    parser.add_argument("--size", type=picture_side, default=512, help="size of the picture in pixels")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="precision")
    parser.add_argument("--batch_size", type=positive, default=1, help="pictures per call")
    parser.add_argument("--steps", type=positive, default=4, help="steps that are timed")
    parser.add_argument("--rounds", type=positive, default=1, help="how often each call is timed")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="the settings to measure"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, memory of the process"
    settings = [each for each in args.settings if device.type == "cuda" or each not in NEED_GPU]
    print(f"{args.preset}, {args.size} px, {args.batch_size} picture(s), {args.dtype}, {name}")
    print("| setting | stock: peak | a step | with a subject: peak | a step |\n|---|---|---|---|---|")
    for setting in settings:
        print("| " + " | ".join(measure(setting, args, device)) + " |", flush=True)
    skipped = [each for each in args.settings if each not in settings]
    if skipped:
        print(f"Skipped, because they need a GPU: {', '.join(skipped)}")


if __name__ == "__main__":
    run_script(main)
