"""Train the judge on scenes of all instances, including the held-out ones, because it has to recognise them. With `--split
sets`, it is only trained on seen instances and those that choose a checkpoint (`CHOOSING`), so none that is reported.

Things have the positions of the measured images, or random sizes and positions. Some are restyled, and some are not
of the twelve categories. Images are slightly blurred, shifted and recoloured, like generated images. Each colour
is a twelfth of the colour circle, so for a hue between two colours, the judge is wrong in half of the cases.
"""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..base import draw_noise
from ..judge import Judge
from ..scenes import SceneStream
from ..training import Batches, options, train
from ..world import ALL_DESIGNS, CATEGORY_NAMES, CHOOSING, DESIGNS, SPLITS, Instance, Scene, World, download_designs


def spoil(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blurs more than half of the images by a random amount, shifts all images, and changes their brightness and
    adds noise."""
    blurred = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    amount, light = (
        torch.rand(len(pixels), 1, 1, 1, generator=generator),
        torch.randn(len(pixels), 1, 1, 1, generator=generator),
    )
    amount = amount.to(pixels.device).mul(1.6).sub(0.6).clamp(min=0)
    pixels = pixels + (blurred - pixels) * amount
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    pixels = F.pad(pixels, (4, 4, 4, 4), mode="replicate")[
        ..., 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]
    ]
    return pixels * (1 + 0.12 * light.to(pixels.device)) + 0.06 * draw_noise(pixels, generator)


def targets(scenes: list[Scene]) -> tuple[torch.Tensor, ...]:
    """Returns the targets: the design and the variant of the thing of each category, of shape (n, categories), and the
    place of each scene. They are -100 for a category that is not in the scene, and the variant is also -100 for other
    images of a category."""
    designs, variants = (torch.full((len(scenes), len(CATEGORY_NAMES)), -100) for _ in range(2))
    for row, scene in enumerate(scenes):
        for thing in scene.instances:
            if thing.name in CATEGORY_NAMES:
                category = CATEGORY_NAMES.index(thing.name)
                designs[row, category] = thing.design
                variants[row, category] = thing.variant if isinstance(thing, Instance) else -100
    return designs, variants, torch.tensor([scene.place for scene in scenes])


def main():
    parser = options(__doc__, max_train_steps=6000, train_batch_size=48, learning_rate=2e-3, ema_decay=0.99)
    parser.add_argument("--split", choices=SPLITS, default="wide", help="the split of instances")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    download_designs(args.work_dir / "designs")
    world = World(args.work_dir / "designs")
    split = args.split if CHOOSING[args.split] else "all"
    stream = SceneStream(
        world, split, (0.6, 0.35, 0.05), varied_share=0.5, others_share=0.1, kin_share=0.05, restyled_share=0.2
    )
    stream.pool += CHOOSING[args.split]
    judge = Judge(len(ALL_DESIGNS if args.split == "sets" else DESIGNS)).train().to(args.device)

    def prepare(number):
        scenes = stream.draw(np.random.default_rng([args.seed, number]), args.train_batch_size)
        return torch.from_numpy(np.stack([scene.picture for scene in scenes])), *targets(scenes)

    batches = Batches(prepare, args, lambda samples: tuple(part.to(args.device) for part in samples))

    def loss_fn(generator):
        pictures, designs, variants, places = batches(generator)
        pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        verdict = judge(spoil(pixels, generator))
        loss = 4 * F.binary_cross_entropy_with_logits(verdict.categories, (designs >= 0).float())
        loss = loss + 0.3 * F.cross_entropy(verdict.places, places)
        # what is not known (-100) is ignored
        loss = loss + F.cross_entropy(verdict.designs.flatten(0, 1), designs.flatten())
        loss = loss + F.cross_entropy(verdict.variants.flatten(0, 1), variants.flatten())
        right = verdict.variants.argmax(2) == variants
        return loss, {"variant": right.sum() / (variants >= 0).sum()}

    train("judge", args, {"judge": judge}, loss_fn)
    measured = SceneStream(world, "all", (0.7, 0.25, 0.05), varied_share=0.0, vary_colours=False)
    if CHOOSING[args.split]:
        measured.pool = SPLITS[args.split][1]
    scenes = measured.draw(np.random.default_rng(2), 1000)
    verdict = judge.cpu().look_at(np.stack([scene.picture for scene in scenes]))
    designs, variants, places = targets(scenes)
    present = designs >= 0
    print(f"categories exactly right: {((verdict.categories > 0) == present).all(1).float().mean():.3f}")
    print(f"place: {(verdict.places.argmax(1) == places).float().mean():.3f}")
    print(f"design: {(verdict.designs.argmax(2) == designs)[present].float().mean():.3f}")
    print(f"variant: {(verdict.variants.argmax(2) == variants)[present].float().mean():.3f}")
    folder = args.work_dir / "judge"
    folder.mkdir(exist_ok=True)
    save_file(judge.state_dict(), folder / "model.safetensors")


if __name__ == "__main__":
    main()
