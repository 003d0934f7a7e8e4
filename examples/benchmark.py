"""Benchmark the cost of a subject in each denoising step. The script compares the stock pipeline, this pipeline (with
all tokens and with compact subjects) and the released implementation, which take turns.

    python examples/benchmark.py --count_only
    python examples/benchmark.py --dtype float16

FLOPs are counted for one sample and step with FlopCounterMode of PyTorch on the meta device, so they do not depend on
the machine. Seconds depend on the machine, so only their ratios within one run are meaningful. The weights are random,
except for the pocket checkpoint.
"""

import argparse
import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import extras  # noqa: F401  (exits with a message if the project is not installed)

from command_line import image_side, make_parser, positive, run_script


PRESETS = ("sd15", "pocket")
METHODS = ("stock", "ssr", "ssr_compact", "released")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="sd15", help="the sizes of SD 1.5, or the pocket checkpoint")
    add("--size", type=image_side, default=512, help="size of the images in pixels")
    add("--rounds", type=positive, default=3, help="number of rounds")
    add("--num_inference_steps", type=positive, default=4, help="number of steps that are timed in each round")
    add("--batch_size", type=positive, default=1, help="number of prompts per call, each with its own subjects")
    add("--subjects", type=positive, default=1, help="number of subjects in each image")
    add("--frames", type=positive, default=0, help="number of frames of a video (AnimateDiff); 0 for images")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to compare with stock")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="float16 is usual on a GPU")
    add("--count_only", action="store_true", help="only count FLOPs, which takes seconds")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the imports below, which take seconds

import torch
import torch.nn.functional as F
from diffusers import AnimateDiffPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNetMotionModel
from diffusers.utils import logging
from diffusers_ssr import AnimateDiffSSRPipeline, SSREncoder, StableDiffusionSSRPipeline, subject_in_unet
from diffusers_ssr.attention_processors import SubjectConditions
from PIL import Image
from random_models import PIPELINES, motion_adapter, random_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm


COMPACT_TOKENS = 48


class ReleasedAttnProcessor:
    """The released implementation for one subject. The subject tokens are appended to the text tokens, and are
    projected to keys and values in every step."""

    def __init__(self, pair: nn.ModuleDict, num_subject_tokens: int, scale: float = 0.65):
        self.pair = pair
        self.num_subject_tokens = num_subject_tokens
        self.scale = scale

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, **kwargs):
        text, subject = encoder_hidden_states.tensor_split([-self.num_subject_tokens], dim=1)
        subject = subject.to(self.pair["to_k"].weight.dtype)

        def attention(key, value):
            parts = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
            return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

        query = attn.to_q(hidden_states)
        hidden_states = attention(attn.to_k(text), attn.to_v(text))
        subject_states = attention(self.pair["to_k"](subject), self.pair["to_v"](subject))
        return attn.to_out[0](hidden_states + self.scale * subject_states)


@contextlib.contextmanager
def released(unet: nn.Module, encoder: SSREncoder, num_subject_tokens: int) -> Iterator[None]:
    """Uses the released implementation in the UNet inside the context."""
    own = dict(unet.attn_processors)
    replaced = {
        f"{name}.processor": ReleasedAttnProcessor(encoder.layers[name.replace(".", "_")], num_subject_tokens)
        for name in encoder.config.attention_layers
    }
    unet.set_attn_processor({**own, **replaced})
    try:
        yield
    finally:
        unet.set_attn_processor(own)


def count_flops(pipe, method: str, size: int, subjects: int = 1, frames: int = 0) -> tuple[float, float]:
    """Counts the FLOPs of one sample and step, and the FLOPs that are needed once in a call, on the meta device. Each
    frame of a video counts as a sample."""
    latent = size // pipe.vae_scale_factor
    width, length = pipe.ssr_encoder.config.cross_attention_dim, pipe.tokenizer.model_max_length
    tokens = subjects * len(pipe.ssr_encoder.config.image_levels) * length
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(pipe.unet.config).eval()
        if frames:
            unet = UNetMotionModel.from_unet2d(unet, motion_adapter(unet)).eval()
        encoder = SSREncoder.from_config(pipe.ssr_encoder.config)
        sample = torch.empty(1, unet.config.in_channels, *([frames] if frames else []), latent, latent)
        text, timestep = torch.empty(max(frames, 1), length, width), torch.empty((), dtype=torch.long)
        subject_embeds = torch.empty(1, subjects * COMPACT_TOKENS if method == "ssr_compact" else tokens, width)

    def count(function: Callable) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def step(text=text) -> float:
        return count(lambda: unet(sample, timestep, text)) / max(frames, 1)

    if method == "stock":
        return step(), 0.0
    if method == "released":
        with released(unet, encoder, tokens):
            return step(torch.cat([text, subject_embeds.expand(len(text), -1, -1)], dim=1)), 0.0
    with torch.no_grad():
        pairs = dict(zip(encoder.config.attention_layers, encoder.project(subject_embeds), strict=True))
    counts = torch.empty(subject_embeds.shape[:2], device="meta") if method == "ssr_compact" else None
    conditions = SubjectConditions(pairs, counts=counts)
    with subject_in_unet(unet, encoder, conditions):
        flops = step()
    return flops, count(lambda: encoder.project(subject_embeds))


def make_calls(pipe: StableDiffusionSSRPipeline, args: argparse.Namespace) -> dict[str, Callable]:
    """Returns a function for each method that calls the pipeline with a number of steps and a callback."""
    arguments = {"height": args.size, "width": args.size, "output_type": "latent"}
    stock = StableDiffusionPipeline.from_pipe(pipe)
    if args.frames:
        adapter = random_model(lambda: motion_adapter(pipe.unet))
        pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter).to(pipe.device)
        stock = AnimateDiffPipeline.from_pipe(pipe)
        arguments["num_frames"] = args.frames
    for each in (pipe, stock):
        each.set_progress_bar_config(disable=True)
    images = [Image.effect_noise((256, 256), 20 + index) for index in range(args.batch_size * args.subjects)]
    encoded = [pipe.encode_subject(image, query="cat") for image in images]
    subjects = [sum(encoded[i :: args.batch_size][1:], encoded[i]) for i in range(args.batch_size)]
    embeds = pipe.encode_prompt(["a cat on the beach"] * args.batch_size, pipe.device, 1, True)
    # the subject tokens of the released implementation are part of the prompt
    tokens = [
        torch.cat([torch.cat([getattr(part, name) for part in subject.subjects], dim=1) for subject in subjects])
        for name in ("embeds", "negative_embeds")
    ]
    longer = [torch.cat(pair, dim=1) for pair in zip(embeds, tokens, strict=True)]

    def make_call(pipeline, embeds=embeds, context=contextlib.nullcontext, **kwargs) -> Callable:
        def call(steps: int, callback: Callable) -> None:
            with context():
                pipeline(
                    prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **arguments, **kwargs,
                )  # fmt: skip

        return call

    calls = {
        "stock": make_call(stock),
        "ssr": make_call(pipe, subject=subjects),
        "ssr_compact": make_call(pipe, subject=[subject.compact(COMPACT_TOKENS) for subject in subjects]),
        "released": make_call(stock, longer, lambda: released(stock.unet, pipe.ssr_encoder, tokens[0].shape[1])),
    }
    return {name: calls[name] for name in args.methods}


def time_calls(calls: dict[str, Callable], args: argparse.Namespace) -> dict[str, float]:
    """Measures the seconds of the fastest step of each call. The calls take turns."""
    on_gpu = torch.cuda.is_available()
    seconds = {name: float("inf") for name in calls}
    times: list[float] = []

    def mark(*_) -> dict:
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return {}

    # on a GPU, the first round is a warm-up
    turns = [name for _ in range(args.rounds + on_gpu) for name in calls]
    for index, name in enumerate(tqdm(turns, desc="runs")):
        times.clear()
        gc.collect()
        # the first step includes the preparation of the call, so it only starts the timer
        calls[name](args.num_inference_steps + 1, mark)
        if index >= len(calls) or not on_gpu:
            # other processes on the machine can only slow a step down
            seconds[name] = min(seconds[name], *(end - start for start, end in zip(times, times[1:], strict=False)))
    return seconds


def report(flops: dict[str, tuple[float, float]], seconds: dict[str, float]) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        "| | GFLOP per sample and step | of stock | once per call | seconds per step | of stock |",
        "|---" * 6 + "|",
    ]
    for name, (step, once) in flops.items():
        line = f"| {name} | {step / 1e9:.1f} | {step / flops['stock'][0]:.4f} | {once / 1e9:.1f} |"
        timed = f" {seconds[name]:.3f} | {seconds[name] / seconds['stock']:.3f} |" if seconds else " - | - |"
        lines.append(line + timed)
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    args.methods = ["stock", *(name for name in args.methods if name != "stock")]
    logging.set_verbosity_error()
    pipe = PIPELINES[args.preset]()
    flops = {name: count_flops(pipe, name, args.size, args.subjects, args.frames) for name in args.methods}
    seconds = {}
    if not args.count_only:
        pipe.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype))
        seconds = time_calls(make_calls(pipe, args), args)
    kind = f"{args.batch_size} " + (f"video(s) of {args.frames} frames" if args.frames else "image(s)")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.preset}, {args.size} px, {kind}, {args.subjects} subject(s) each, guidance, {device}")
    print(report(flops, seconds))


if __name__ == "__main__":
    run_script(main)
