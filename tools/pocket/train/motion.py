"""Train the motion adapter of the pocket checkpoint on the frozen base model. The subject hops once in eight frames,
and the video can be repeated in a loop.

Training starts from the adapter in the work folder if it exists.
"""

import math

import numpy as np
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel, UNetMotionModel

from ..base import Base, caption
from ..training import Batches, options, picture_array, train
from ..world import (
    CATEGORY_NAMES,
    PLACE_NAMES,
    PLACES,
    SPLITS,
    Instance,
    World,
    describe,
    draw_instances,
    draw_scene,
    paint_place,
    sheet,
    varied,
)


FRAMES = 8
HEIGHT = 14


def draw_hop(world: World, rng: np.random.Generator, instance: Instance, place: int) -> np.ndarray:
    """Returns a uint8 video of shape (frames, 64, 64, 3) of a subject that hops in a place."""
    canvas = paint_place(place, rng)
    shifts = [(0, -round(HEIGHT * math.sin(math.pi * frame / FRAMES))) for frame in range(FRAMES)]
    return np.stack([draw_scene(world, rng, [instance], place, shift=s, canvas=canvas).picture for s in shifts])


def build(unet: UNet2DConditionModel) -> MotionAdapter:
    """Creates a new adapter for the UNet."""
    config = unet.config
    return MotionAdapter(
        block_out_channels=tuple(config.block_out_channels),
        motion_layers_per_block=config.layers_per_block,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=config.norm_num_groups,
        motion_max_seq_length=32,
    )


def main():
    parser = options(__doc__, max_train_steps=4000, train_batch_size=2, learning_rate=1e-3, sample_steps=500)
    parser.add_argument("--split", choices=SPLITS, default="wide", help="split whose held-out instances are not drawn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base, world = Base(args.work_dir, args.device), World(args.work_dir / "designs")
    trained = args.work_dir / "motion_adapter"
    adapter = MotionAdapter.from_pretrained(trained) if trained.exists() else build(base.unet)
    unet = UNetMotionModel.from_unet2d(base.unet, adapter).train().to(args.device)
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    print(f"motion modules: {sum(p.numel() for p in unet.parameters() if p.requires_grad) / 1e6:.1f} M parameters")

    def prepare(number):
        rng = np.random.default_rng([args.seed, number])
        videos, texts = [], []
        for _ in range(args.train_batch_size):
            (instance,), place = draw_instances(rng, SPLITS[args.split][0], 1), int(rng.integers(len(PLACES)))
            videos.append(draw_hop(world, rng, varied(rng, instance), place))
            texts.append(caption([instance], place, rng))
        return videos, texts

    def move(samples):
        videos, texts = samples
        return torch.stack([base.codes.encode(video).transpose(0, 1) for video in videos]), base.encode_texts(texts)

    batches = Batches(prepare, args, move)

    def loss_fn(generator):
        latents, states = batches(generator)
        states = states.repeat_interleave(FRAMES, dim=0)
        return base.loss(unet, latents, generator, encoder_hidden_states=states), {}

    def sample_fn(file):
        pipe = base.pipeline(AnimateDiffPipeline, unet=unet, motion_adapter=adapter)
        rows = []
        for index in range(6):
            video = pipe(
                describe([CATEGORY_NAMES[2 * index]], PLACE_NAMES[index]),
                num_frames=FRAMES,
                num_inference_steps=20,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(index),
                output_type="pt",
            ).frames[0]
            rows += list(picture_array(video * 2 - 1))
        sheet(rows, FRAMES).save(file)

    train("motion_adapter", args, {"unet": unet}, loss_fn, sample_fn)
    unet.save_motion_modules(trained)


if __name__ == "__main__":
    main()
