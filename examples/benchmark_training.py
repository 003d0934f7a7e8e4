"""Compare the training speed of train_ssr.py with the released training script, in samples per second.

    python examples/benchmark_training.py --preset pocket --size 64 --steps 15

The released script computes the VAE, vision and text features again in every step and uses the anomaly mode of
autograd. Both compute the same loss on the same samples, and take turns in one run. With --preset sd15, the models
have the full size and random weights.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from extras import needs

import numpy as np
import torch
from command_line import image_side, make_parser, positive, run_script
from diffusers import DDPMScheduler
from diffusers_ssr import SSREncoder
from diffusers_ssr.image_processing_ssr import preprocess
from diffusers_ssr.unet_hooks import subject_in_unet
from PIL import Image
from random_models import PRESETS
from tqdm.auto import tqdm


with needs("train"):
    from train_ssr import FrozenFeatures, SubjectEncoding, compute_loss, draw
    from training_data import FeatureCache


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="sd15", help="the sizes of SD 1.5, or the pocket checkpoint")
    add("--size", type=image_side, default=512, help="size of the images in pixels")
    add("--train_batch_size", type=positive, default=2, help="samples per step")
    add("--steps", type=positive, default=3, help="number of steps in each round")
    add("--rounds", type=positive, default=3, help="number of rounds")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = PRESETS[args.preset]()
    pipe.to(device)
    encoder: SSREncoder = pipe.ssr_encoder.train()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.ssr_image_encoder):
        model.requires_grad_(False)
    settings = argparse.Namespace(
        prompt_dropout=0.8, subject_dropout=0.05, timestep_bias=1.0, latents="sample", prediction_type=None,
        consistency_form="released", consistency_weight=0.1, mask_weight=1.0,
    )  # fmt: skip
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    model = SubjectEncoding(encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-5)

    samples = []
    for index in range(args.train_batch_size):
        image = Image.effect_noise((args.size, args.size), 30 + index).convert("RGB")
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        reference = preprocess(image, pipe.ssr_image_processor)[0]
        samples.append(
            {"pixel_values": pixels, "reference_values": reference[None], "masks": [None],
             "caption": "a cat on the beach", "queries": ["cat"], "digest": f"{index:040x}"}
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        levels = encoder.config.image_levels
        cache = FeatureCache(Path(folder), {})
        anew = FrozenFeatures(pipe, levels, torch.float32, None, "0")
        cached = FrozenFeatures(pipe, levels, torch.float32, cache, "0")

        def step(frozen: FrozenFeatures, anomaly: bool) -> float:
            started = time.perf_counter()
            with (
                torch.autograd.set_detect_anomaly(anomaly),
                subject_in_unet(pipe.unet, encoder.config.attention_layers),
            ):
                batch = (
                    samples if frozen.cache is None else [{**s, "features": cache.load(s["digest"])} for s in samples]
                )
                features = frozen(batch)
                drawn = draw(0, 0, len(batch), features["latent_mean"].shape[1:])
                loss, _ = compute_loss(model, frozen, features, drawn, scheduler, settings)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        turns = {
            "released recipe": (anew, True),
            "no anomaly mode": (anew, False),
            "cached features": (cached, False),
        }
        seconds = {name: [] for name in turns}
        bar = tqdm(total=args.rounds * len(turns) * args.steps, desc="steps")
        for turn in range(args.rounds + 1):
            for name, (frozen, anomaly) in turns.items():
                # the first turn fills the cache and is not counted
                for _ in range(args.steps if turn else 1):
                    taken = step(frozen, anomaly)
                    if turn:
                        seconds[name].append(taken)
                        bar.update()
        bar.close()
    print(f"{args.preset}, {args.size} px, batch of {args.train_batch_size}, on {device}:")
    slowest = statistics.median(seconds["released recipe"])
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"  {name:16s} {len(samples) / median:8.3f} samples a second, {slowest / median:.2f} times")


if __name__ == "__main__":
    run_script(main)
