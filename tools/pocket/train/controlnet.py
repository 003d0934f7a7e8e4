"""Train the ControlNet of the pocket checkpoint on the frozen base model, with edges as control images.

Single subjects have random positions, not only the positions that the base model knows. Training starts from the
ControlNet in the work folder if it exists.
"""

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from ..base import Base, caption
from ..pictures import edges
from ..training import Batches, options, train
from ..world import (
    CATEGORY_NAMES,
    INSTANCES,
    PLACE_NAMES,
    SPLITS,
    Instance,
    Scene,
    World,
    describe,
    draw_instances,
    draw_scene,
    sheet,
    varied,
)


def draw_anywhere(world: World, rng: np.random.Generator, pool: tuple[Instance, ...]) -> Scene:
    """Draws one subject at a random position, or sometimes two side by side."""
    count = 1 if rng.random() < 0.8 else 2
    shift = (int(rng.integers(-12, 13)), int(rng.integers(-18, 7))) if count == 1 else (0, 0)
    things = [varied(rng, instance) for instance in draw_instances(rng, pool, count)]
    return draw_scene(world, rng, things, shift=shift)


def control_tensor(pictures: list[np.ndarray] | np.ndarray) -> torch.Tensor:
    """Returns the edges of images, of shape (n, 3, height, width) from 0 to 1."""
    return torch.from_numpy(np.stack([edges(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def main():
    parser = options(__doc__, max_train_steps=5000, train_batch_size=10, learning_rate=7e-4, sample_steps=500)
    parser.add_argument("--split", choices=SPLITS, default="wide", help="split whose held-out instances are not drawn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base, world = Base(args.work_dir, args.device), World(args.work_dir / "designs")
    trained = args.work_dir / "controlnet"
    controlnet = ControlNetModel.from_pretrained(trained) if trained.exists() else ControlNetModel.from_unet(base.unet)
    controlnet.requires_grad_(True).train().to(args.device)
    print(f"ControlNet: {sum(p.numel() for p in controlnet.parameters()) / 1e6:.1f} M parameters")

    def prepare(number):
        rng = np.random.default_rng([args.seed, number])
        scenes = [draw_anywhere(world, rng, SPLITS[args.split][0]) for _ in range(args.train_batch_size)]
        pictures = np.stack([scene.picture for scene in scenes])
        return pictures, control_tensor(pictures), [caption(scene.instances, scene.place, rng) for scene in scenes]

    def move(samples):
        pictures, conditions, captions = samples
        return base.codes.encode(pictures), conditions.to(args.device), base.encode_texts(captions)

    batches = Batches(prepare, args, move)

    def loss_fn(generator):
        latents, conditions, texts = batches(generator)

        def controlled(noisy, steps):
            down, mid = controlnet(noisy, steps, texts, conditions, return_dict=False)
            return base.unet(
                noisy, steps, texts, down_block_additional_residuals=down, mid_block_additional_residual=mid
            )

        return base.loss(controlled, latents, generator), {}

    def sample_fn(file):
        rng, rows = np.random.default_rng(1), []
        pipe = base.pipeline(StableDiffusionControlNetPipeline, controlnet=controlnet)
        scenes = [draw_anywhere(world, rng, INSTANCES) for _ in range(12)]
        named = [describe([CATEGORY_NAMES[i.category] for i in s.instances], PLACE_NAMES[s.place]) for s in scenes]
        control = control_tensor([s.picture for s in scenes])
        for index, picture in enumerate(base.draw(pipe, named, image=control.to(args.device))):
            rows += [scenes[index].picture, edges(scenes[index].picture), picture]
        sheet(rows, 9).save(file)

    train("controlnet", args, {"controlnet": controlnet}, loss_fn, sample_fn)
    controlnet.save_pretrained(trained)


if __name__ == "__main__":
    main()
