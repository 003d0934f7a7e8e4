"""Train the UNet of the pocket checkpoint, with the architecture of SD 1.5, on captions, linear codes and a frozen
text encoder.

Captions name category and place. More than half of them also name colour and design, as real captions do. A base model
that was trained without colours in captions would not be able to use the colour of a subject.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..base import caption, diffusion_loss, encode_texts
from ..codes import CHANNELS, load_codes
from ..scenes import SceneStream
from ..training import Batches, options, picture_array, train
from ..world import CATEGORY_NAMES, PLACE_NAMES, SPLITS, World, describe, sheet


def build(trained: Path, channels: tuple[int, ...], layers: int) -> UNet2DConditionModel:
    """Loads the UNet from `trained` if it exists, or creates a new one."""
    if trained.exists():
        return UNet2DConditionModel.from_pretrained(trained)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
        block_out_channels=channels,
        layers_per_block=layers,
        attention_head_dim=4,
        cross_attention_dim=96,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Creates a scheduler with the noise schedule of SD, rescaled to end in pure noise. Otherwise the colours would
    depend on the initial noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def main():
    parser = options(__doc__, max_train_steps=17000, train_batch_size=10, learning_rate=1.3e-3, sample_steps=1000)
    parser.add_argument("--split", choices=SPLITS, default="wide", help="split whose held-out instances are not drawn")
    parser.add_argument(
        "--varied_share", type=float, default=0.25, help="share of scenes with random sizes, positions and mirroring"
    )
    parser.add_argument(
        "--others_share", type=float, default=0.9, help="share of things that are not of a measured category"
    )
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 128], help="channels of a new UNet's levels")
    parser.add_argument("--layers", type=int, default=2, help="layers of each block of a new UNet")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes = SceneStream(
        World(args.work_dir / "designs"), args.split, varied_share=args.varied_share, others_share=args.others_share
    )
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "clip")
    text_encoder = CLIPTextModel.from_pretrained(args.work_dir / "clip").eval().to(args.device)
    codes = load_codes(args.work_dir).to(args.device)
    importance = codes.importance()
    scheduler = build_scheduler()
    unet = build(args.work_dir / "unet", tuple(args.channels), args.layers).train().to(args.device)
    print(f"UNet: {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters")

    def prepare(number):
        rng = np.random.default_rng([args.seed, number])
        drawn = scenes.draw(rng, args.train_batch_size)
        return np.stack([s.picture for s in drawn]), [caption(s.instances, s.place, rng) for s in drawn]

    def move(samples):
        pictures, texts = samples
        return codes.encode(pictures), encode_texts(tokenizer, text_encoder, texts)

    batches = Batches(prepare, args, move)

    def loss_fn(generator):
        clean, states = batches(generator)
        return diffusion_loss(scheduler, unet, clean, importance, generator, encoder_hidden_states=states), {}

    def sample_fn(file):
        if not (args.work_dir / "vae").exists():
            return  # the VAE is not trained yet
        vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").eval().to(args.device)
        pipe = StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        prompts = [describe([c], PLACE_NAMES[i % len(PLACE_NAMES)]) for i, c in enumerate(CATEGORY_NAMES)]
        prompts += ["a cat and a car on the beach", "a dog and a tulip in the room", "a thing in the snow"]
        prompts += [
            "a red flat car in the meadow",
            "a blue glossy cat on the beach",
            "a pink painted fish in the night",
        ]
        images = pipe(
            prompts,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        sheet(list(picture_array(images * 2 - 1)), 6).save(file)

    train("unet", args, {"unet": unet}, loss_fn, sample_fn)
    unet.save_pretrained(args.work_dir / "unet")
    scheduler.save_pretrained(args.work_dir / "scheduler")


if __name__ == "__main__":
    main()
