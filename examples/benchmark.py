"""Benchmark the cost of a subject in each denoising step. The script compares the stock pipeline, this pipeline (with
all tokens and with compact subjects), the released implementation and an IP-Adapter-Plus, which take turns.

    python examples/benchmark.py --count_only
    python examples/benchmark.py --dtype float16

FLOPs are counted for one sample and step with FlopCounterMode of PyTorch on the meta device, so they do not depend on
the machine. Seconds depend on the machine, so only their ratios within one run are meaningful. The weights are random,
except for the pocket checkpoint.
"""

import argparse
import gc
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from extras import needs

import torch
import torch.nn.functional as F
from command_line import HelpFormatter, picture_side, positive, run_script
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.utils import logging
from diffusers_ssr import AnimateDiffSSRPipeline, SSREncoder, StableDiffusionSSRPipeline
from diffusers_ssr.attention_processors import SubjectConditions
from diffusers_ssr.unet_hooks import subject_in_unet
from PIL import Image
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel


POCKET = Path(__file__).resolve().parent.parent / "pocket"
IP_TOKENS = 16
PEAK_RESET = Path("/proc/self/clear_refs")
COMPACT_TOKENS = 48
METHODS = ("stock", "ssr", "ssr_compact", "released", "ip_adapter_plus")


def random_model(make: Callable[[], nn.Module]) -> nn.Module:
    """Creates a large model with weights of a typical magnitude. All weights are copied from one random vector,
    because it would take minutes to sample each weight."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").eval()
    noise = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
            continue
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])
        parameter.data *= parameter[0].numel() ** -0.5
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
        else:
            buffer.zero_()
    return model


def sd15_pipeline() -> StableDiffusionSSRPipeline:
    """Creates a pipeline with the sizes of SD 1.5 and CLIP ViT-L/14 and random weights. The tokenizer is taken from
    the pocket checkpoint, with a length of 77 tokens as in SD 1.5."""
    tokenizer = CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return StableDiffusionSSRPipeline(
        vae=random_model(lambda: AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=4, **blocks)),
        text_encoder=random_model(lambda: CLIPTextModel(text)),
        tokenizer=tokenizer,
        unet=random_model(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768)),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        ssr_encoder=random_model(SSREncoder),
        ssr_image_encoder=random_model(lambda: CLIPVisionModel(vision)),
    )


def pocket_pipeline() -> StableDiffusionSSRPipeline:
    return StableDiffusionSSRPipeline.from_pretrained(POCKET, trust_remote_code=True)


def motion_adapter(unet: UNet2DConditionModel) -> MotionAdapter:
    """Creates an AnimateDiff motion adapter that fits the UNet."""
    config = unet.config
    return MotionAdapter(
        block_out_channels=tuple(config.block_out_channels), motion_layers_per_block=config.layers_per_block
    )


# Other methods


class ReleasedAttnProcessor:
    """The released implementation for one subject. The subject tokens are appended to the text tokens, and are
    projected to keys and values in every step."""

    def __init__(self, to_k: nn.Module, to_v: nn.Module, num_subject_tokens: int, scale: float = 0.65):
        self.to_k = to_k
        self.to_v = to_v
        self.num_subject_tokens = num_subject_tokens
        self.scale = scale

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, **kwargs):
        text, subject = encoder_hidden_states.tensor_split([-self.num_subject_tokens], dim=1)
        subject = subject.to(self.to_k.weight.dtype)

        def heads(states):
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        found = F.scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        of_subject = F.scaled_dot_product_attention(query, heads(self.to_k(subject)), heads(self.to_v(subject)))
        return attn.to_out[0]((found + self.scale * of_subject).transpose(1, 2).flatten(2))


@contextmanager
def processors(unet: nn.Module, make: Callable[[str, nn.Module], object]) -> Iterator[None]:
    """Replaces the processors of the cross-attention layers inside the context."""
    own = dict(unet.attn_processors)
    names = [name.removesuffix(".processor") for name in own if name.endswith("attn2.processor")]
    names = [name for name in names if "motion_modules" not in name]
    ours = {f"{name}.processor": make(name, unet.get_submodule(name)) for name in names}
    unet.set_attn_processor({**own, **ours})
    try:
        yield
    finally:
        unet.set_attn_processor(own)


@contextmanager
def released(unet: nn.Module, encoder: SSREncoder, num_subject_tokens: int) -> Iterator[None]:
    """Uses the released implementation in the UNet inside the context."""

    def make(name, attn):
        pair = encoder.layers[name.replace(".", "_")]
        return ReleasedAttnProcessor(pair["to_k"], pair["to_v"], num_subject_tokens)

    with processors(unet, make):
        yield


@contextmanager
def ip_adapter_plus(unet: nn.Module) -> Iterator[None]:
    """Uses an IP-Adapter with 16 precomputed tokens in the UNet inside the context."""

    def make(name, attn):
        parameter = attn.to_k.weight
        with torch.device(parameter.device):
            return IPAdapterAttnProcessor2_0(attn.inner_dim, attn.cross_attention_dim, (IP_TOKENS,)).to(
                parameter.dtype
            )

    kind = unet.config.encoder_hid_dim_type
    with processors(unet, make):
        unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = nn.Identity(), "ip_image_proj"
        try:
            yield
        finally:
            unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = None, kind


# FLOPs


def count_flops(pipe, method: str, size: int, subjects: int = 1, frames: int = 0) -> dict[str, float]:
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
        channels = unet.config.in_channels
        sample = torch.empty(1, channels, *([frames] if frames else []), latent, latent)
        text, timestep = torch.empty(max(frames, 1), length, width), torch.empty((), dtype=torch.long)
        subject_embeds = torch.empty(1, tokens, width)

    def counted(function) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def step(text=text, **arguments) -> float:
        return counted(lambda: unet(sample, timestep, text, **arguments)) / max(frames, 1)

    once = 0.0
    if method == "stock":
        flops = step()
    elif method == "released":
        with released(unet, encoder, tokens):
            flops = step(torch.cat([text, subject_embeds.expand(len(text), -1, -1)], dim=1))
    elif method == "ip_adapter_plus":
        with ip_adapter_plus(unet), torch.device("meta"):
            flops = step(added_cond_kwargs={"image_embeds": [torch.empty(1, 1, IP_TOKENS, width)]})
    else:
        counts = None
        if method == "ssr_compact":
            subject_embeds = subject_embeds[:, : subjects * COMPACT_TOKENS]
            counts = torch.empty(subject_embeds.shape[:2], device="meta")
        once = counted(lambda: encoder.project(subject_embeds))
        with torch.no_grad():
            pairs = dict(zip(encoder.config.attention_layers, encoder.project(subject_embeds), strict=True))
            conditions = SubjectConditions(pairs, counts=counts)
        with subject_in_unet(unet, encoder.config.attention_layers):
            flops = step(cross_attention_kwargs={"ssr_subject": conditions})
    return {"step": flops, "once": once}


# Seconds


def make_draws(pipe: StableDiffusionSSRPipeline, args: argparse.Namespace) -> tuple[dict[str, Callable], float]:
    """Returns a function for each method that draws with `steps` steps, and the seconds to encode one subject."""
    device = pipe.device
    arguments = {"height": args.size, "width": args.size, "output_type": "latent"}
    if args.frames:
        adapter = random_model(lambda: motion_adapter(pipe.unet))
        pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter).to(device)
        stock = AnimateDiffPipeline.from_pipe(pipe)
        arguments["num_frames"] = args.frames
    else:
        stock = StableDiffusionPipeline.from_pipe(pipe)
    for each in (pipe, stock):
        each.set_progress_bar_config(disable=True)

    pictures = [Image.effect_noise((256, 256), 20 + index) for index in range(args.batch_size * args.subjects)]
    started = time.perf_counter()
    encoded = [pipe.encode_subject(picture, query="cat") for picture in pictures]
    encode_seconds = (time.perf_counter() - started) / len(encoded)
    subjects = [sum(encoded[i :: args.batch_size][1:], encoded[i]) for i in range(args.batch_size)]
    embeds, negative = pipe.encode_prompt(["a cat on the beach"] * args.batch_size, device, 1, True)
    rows = [[torch.cat([getattr(s, part) for s in each.subjects], dim=1) for each in subjects]
            for part in ("embeds", "negative_embeds")]  # fmt: skip
    tokens = rows[0][0].shape[1]
    ip_tokens = torch.zeros(2 * args.batch_size, 1, IP_TOKENS, embeds.shape[-1], device=device, dtype=embeds.dtype)

    @contextmanager
    def nothing():
        yield

    def drawing(pipeline, inside, embeds=embeds, negative=negative, **kwargs):
        def draw(steps, callback=None):
            with inside():
                pipeline(
                    prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **arguments, **kwargs,
                )  # fmt: skip

        return draw

    draws = {
        "stock": drawing(stock, nothing),
        "ssr": drawing(pipe, nothing, subject=subjects),
        "ssr_compact": drawing(pipe, nothing, subject=[each.compact(COMPACT_TOKENS) for each in subjects]),
        "released": drawing(
            stock, lambda: released(stock.unet, pipe.ssr_encoder, tokens),
            *(torch.cat([text, torch.cat(row)], dim=1) for text, row in zip((embeds, negative), rows, strict=True)),
        ),
        "ip_adapter_plus": drawing(
            stock, lambda: ip_adapter_plus(stock.unet), ip_adapter_image_embeds=[ip_tokens]
        ),
    }  # fmt: skip
    return {name: draws[name] for name in args.methods}, encode_seconds


def reset_peak(on_gpu: bool) -> None:
    """Resets the peak memory of the GPU, or the peak memory of this process on Linux."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not Linux, or not allowed
            PEAK_RESET.write_text("5")


def peak_bytes(on_gpu: bool) -> int:
    """Returns the peak memory since `reset_peak`, or 0 if it is unknown."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def time_draws(draws: dict[str, Callable], args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """Measures the seconds of each step and the peak memory of each method. The methods take turns."""
    on_gpu = device.type == "cuda"
    result = {name: {"seconds": [], "peak_bytes": 0} for name in draws}
    marks = []

    def mark(*_):
        if on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())
        return {}

    bar = tqdm(total=(args.rounds + on_gpu) * len(draws), desc="runs")
    for turn in range(args.rounds + on_gpu):
        for name, draw in draws.items():
            marks.clear()
            gc.collect()
            reset_peak(on_gpu)
            # the time of the first step includes the preparation of the call, so it only starts the timer
            draw(args.steps + 1, mark)
            if on_gpu:
                torch.cuda.synchronize()
            pairs = zip(marks, marks[1:], strict=False)
            seconds = [a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in pairs]
            # on a GPU, the first turn is a warm-up
            if turn or not on_gpu:
                result[name]["seconds"] += seconds
            result[name]["peak_bytes"] = max(result[name]["peak_bytes"], peak_bytes(on_gpu))
            bar.update()
    bar.close()
    return result


def profile_draws(draws: dict[str, Callable]) -> str:
    """Profiles one step after the first step. Returns a table of the calls and seconds of each operator and method."""
    operators: dict[str, dict[str, tuple[int, float]]] = {}
    for name, draw in draws.items():
        profiler = profile()

        def begin(pipeline, step, timestep, callback_kwargs, profiler=profiler):
            if step == 0:
                profiler.__enter__()
            return {}

        draw(2, begin)
        profiler.__exit__(None, None, None)
        for event in profiler.key_averages():
            seconds = (event.self_cpu_time_total + event.self_device_time_total) / 1e6
            operators.setdefault(event.key, {})[name] = (event.count, seconds)
    rows = sorted(operators.items(), key=lambda row: -max(seconds for _, seconds in row[1].values()))[:12]
    lines = ["| operator | " + " | ".join(draws) + " |", "|---" * (1 + len(draws)) + "|"]
    for operator, found in rows:
        cells = ("{} calls, {:.3f} s".format(*found.get(name, (0, 0.0))) for name in draws)
        lines.append(f"| {operator} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(pipe, size: int, file: Path) -> None:
    """Plots the FLOPs in addition to the stock pipeline against the number of subjects and the number of frames."""
    with needs("train"):
        import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, (what, numbers) in zip(axes, (("subjects", (1, 2, 3, 4)), ("frames", (1, 4, 8, 16))), strict=True):
        for method in METHODS[1:]:
            ratios = []
            for number in numbers:
                counts = {"subjects": number} if what == "subjects" else {"frames": number}
                stock = count_flops(pipe, "stock", size, **counts)["step"]
                ratios.append(100 * (count_flops(pipe, method, size, **counts)["step"] / stock - 1))
            axis.plot(numbers, ratios, marker="o", label=method)
        axis.set_xlabel(f"number of {what}")
        axis.set_xticks(numbers)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("additional FLOPs per step, %")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def report(results: dict, args: argparse.Namespace) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        "| | GFLOP a sample and step | of stock | once a call | seconds a step | of stock | peak memory above stock |",
        "|---|---|---|---|---|---|---|",
    ]
    stock = results["methods"]["stock"]
    for name, each in results["methods"].items():
        seconds = memory = ratio = "-"
        if each.get("seconds"):
            seconds = f"{each['seconds']:.3f}"
            ratio = f"{each['seconds'] / stock['seconds']:.3f}"
        if each.get("peak_bytes"):
            memory = f"{(each['peak_bytes'] - stock['peak_bytes']) / 2**20:.0f} MiB"
        lines.append(
            f"| {name} | {each['step'] / 1e9:.1f} | {each['step'] / stock['step']:.4f} | {each['once'] / 1e9:.1f} |"
            f" {seconds} | {ratio} | {memory} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--preset",
        choices=("sd15", "pocket"),
        default="sd15",
        help="Stable Diffusion 1.5's sizes with random weights, or the pocket checkpoint",
    )
    parser.add_argument("--size", type=picture_side, default=512, help="size of the picture in pixels")
    parser.add_argument("--steps", type=positive, default=4, help="number of steps that are timed in each round")
    parser.add_argument(
        "--batch_size", type=positive, default=1, help="number of prompts per call, each with its own subjects"
    )
    parser.add_argument("--subjects", type=positive, default=1, help="number of subjects in each picture")
    parser.add_argument(
        "--frames", type=positive, default=0, help="number of frames of a video (AnimateDiff); 0 for pictures"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="number of rounds")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="methods to compare with the stock pipeline",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="precision; float16 is usual on a GPU",
    )
    parser.add_argument("--count_only", action="store_true", help="only count FLOPs, which takes seconds")
    parser.add_argument("--profile", action="store_true", help="also profile one step of each method")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--plot", type=Path, help="also plot the FLOPs against the number of subjects and of frames, in this file"
    )
    args = parser.parse_args()
    if args.count_only and args.profile:
        parser.error("argument --profile: has no effect with --count_only")
    args.methods = ["stock", *(name for name in args.methods if name != "stock")]
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = sd15_pipeline() if args.preset == "sd15" else pocket_pipeline()

    counted = {name: count_flops(pipe, name, args.size, args.subjects, args.frames) for name in args.methods}
    results = {"settings": {**vars(args), "device": str(device)}, "methods": counted}
    if not args.count_only:
        if device.type == "cuda":
            results["settings"]["device"] = torch.cuda.get_device_name()
        pipe.to(device, getattr(torch, args.dtype))
        draws, results["encode_seconds"] = make_draws(pipe, args)
        for name, each in time_draws(draws, args, device).items():
            # use the fastest step, because other processes on the machine can only slow a step down
            counted[name].update(seconds=min(each["seconds"]), peak_bytes=each["peak_bytes"])
    what = (
        f"{args.batch_size} picture(s)" if not args.frames else f"{args.batch_size} video(s) of {args.frames} frames"
    )
    print(
        f"{args.preset}, {args.size} px, {what}, {args.subjects} subject(s) each, guidance, {results['settings']['device']}"
    )
    print(report(results, args))
    if args.profile and not args.count_only:
        print(profile_draws(draws))
    if "encode_seconds" in results:
        print(f"encoding one subject: {results['encode_seconds']:.3f} s, once")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1, default=str) + "\n")
    if args.plot is not None:
        plot(pipe, args.size, args.plot)
        print(f"the plot is in {args.plot}")


if __name__ == "__main__":
    run_script(main)
