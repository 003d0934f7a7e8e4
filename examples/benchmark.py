"""What a subject costs: the stock pipeline and the SSR pipeline, alternating in one run.

FLOPs are counted with PyTorch's FlopCounterMode on the math attention kernel, for one sample and step, so that they do not
depend on the machine. Seconds do; only their ratio says something.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel


POCKET = Path(__file__).resolve().parent.parent / "pocket"


def random_model(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A large model with weights of a usual size, all cut out of one random vector: drawing each would take minutes."""
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
    return model


def sd15_pipeline() -> StableDiffusionSSRPipeline:
    """SD 1.5 and CLIP ViT-L/14 with random weights. The tokenizer is the pocket's, with SD 1.5's 77 tokens."""
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
    pipe = StableDiffusionSSRPipeline.from_pretrained(POCKET, torch_dtype=torch.float32)
    pipe.load_ssr(POCKET)
    return pipe


def count_flops(draw: Callable[[int], None], batch_size: int) -> tuple[float, float]:
    """FLOPs of one sample and step, and those once a call."""
    totals = []
    for steps in (1, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            draw(steps)
        totals.append(counter.get_total_flops())
    step = totals[1] - totals[0]
    return step / batch_size, (totals[0] - step) / batch_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=("sd15", "pocket"), default="sd15")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=1, help="prompts in a call, each with a subject of its own")
    parser.add_argument("--rounds", type=int, default=3, help="how often stock and SSR take turns")
    args = parser.parse_args()
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = (sd15_pipeline() if args.preset == "sd15" else pocket_pipeline()).to(device)
    pipe.set_progress_bar_config(disable=True)
    stock = StableDiffusionPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    subjects = [
        pipe.encode_subject(Image.effect_noise((256, 256), 20 + index), query="cat")
        for index in range(args.batch_size)
    ]
    prompts = ["a cat on the beach"] * args.batch_size
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(prompts, device, 1, True)

    def drawing(pipeline, **kwargs):
        def draw(steps, callback=None):
            pipeline(
                prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, height=args.size,
                width=args.size, num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
                output_type="latent", callback_on_step_end=callback, **kwargs,
            )  # fmt: skip

        return draw

    draws = {"stock": drawing(stock), "SSR": drawing(pipe, subject=subjects)}
    seconds = {name: [] for name in draws}
    marks = []

    def mark(*_):
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    bar = tqdm(total=args.rounds * len(draws), desc="runs")
    for _ in range(args.rounds):
        for name, draw in draws.items():
            marks.clear()
            # the first step also prepares the call, so it only starts the clock
            draw(args.steps + 1, mark)
            seconds[name] += [after - before for before, after in zip(marks, marks[1:], strict=False)]
            bar.update()
    bar.close()

    flops = {name: count_flops(draw, batch_size=2 * args.batch_size) for name, draw in draws.items()}
    print(f"{args.preset}, {args.size} px, {args.batch_size} picture(s) with guidance, on {device}:")
    for name in draws:
        step, once = flops[name]
        print(
            f"  {name:5s}  {statistics.median(seconds[name]):8.3f} s a step  {step / 1e9:8.1f} GFLOP a sample and step"
            f"  {once / 1e9:6.1f} once a call"
        )
    time_ratio = statistics.median(seconds["SSR"]) / statistics.median(seconds["stock"])
    print(f"  ratio  {time_ratio:8.3f}             {flops['SSR'][0] / flops['stock'][0]:8.4f}")


if __name__ == "__main__":
    main()
