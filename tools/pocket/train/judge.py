"""Train the judge on scenes of all instances, the held-out ones too: it has to know what it judges.

Pictures are blurred, moved and recoloured a little, as generated ones are.
"""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..judge import Judge
from ..scenes import load_scenes
from ..training import options, picture_tensor, train
from ..world import CATEGORY_NAMES, INSTANCES


def spoil(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur half of the pictures by a random amount, shift all, and change light and noise."""
    blurred = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    amount = torch.rand(len(pixels), 1, 1, 1, generator=generator).mul(1.6).sub(0.6).clamp(min=0)
    pixels = pixels + (blurred - pixels) * amount
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    pixels = F.pad(pixels, (4, 4, 4, 4), mode="replicate")[
        ..., 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]
    ]
    light = 1 + 0.12 * torch.randn(len(pixels), 1, 1, 1, generator=generator)
    noise = 0.06 * torch.randn(pixels.shape, generator=generator)
    return pixels * light + noise


def main():
    parser = options(__doc__, max_train_steps=3000, train_batch_size=48, learning_rate=2e-3, ema_decay=0.99)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes = load_scenes(args.work_dir, 12_000, seed=1, pool="all")
    tests = load_scenes(args.work_dir, 1_000, seed=2, pool="all")
    judge = Judge().train()
    attributes = torch.tensor([(i.category, i.design, i.variant) for i in INSTANCES])

    def targets(scenes, rows):
        numbers = torch.from_numpy(scenes.instances[rows])
        shown = numbers >= 0
        known = attributes[numbers.clamp(min=0)]
        present = torch.zeros(len(rows), len(CATEGORY_NAMES))
        row, slot = shown.nonzero(as_tuple=True)
        category, design, variant = known[row, slot].unbind(1)
        present[row, category] = 1
        return present, (row, category), design, variant, torch.from_numpy(scenes.places[rows])

    def loss_fn(generator):
        rows = torch.randint(len(scenes), (args.train_batch_size,), generator=generator).numpy()
        verdict = judge(spoil(picture_tensor(scenes.pictures[rows]), generator))
        present, where, design, variant, place = targets(scenes, rows)
        loss = 4 * F.binary_cross_entropy_with_logits(verdict.categories, present)
        loss = loss + 0.3 * F.cross_entropy(verdict.places, place)
        loss = loss + F.cross_entropy(verdict.designs[where], design)
        loss = loss + F.cross_entropy(verdict.variants[where], variant)
        return loss, {"variant": (verdict.variants[where].argmax(1) == variant).float().mean().item()}

    train("judge", args, {"judge": judge}, loss_fn)
    verdict = judge.look_at(tests.pictures)
    present, where, design, variant, place = targets(tests, np.arange(len(tests)))
    print(f"categories exactly right: {((verdict.categories > 0) == present.bool()).all(1).float().mean():.3f}")
    print(f"place: {(verdict.places.argmax(1) == place).float().mean():.3f}")
    print(f"design: {(verdict.designs[where].argmax(1) == design).float().mean():.3f}")
    print(f"variant: {(verdict.variants[where].argmax(1) == variant).float().mean():.3f}")
    folder = args.work_dir / "judge"
    folder.mkdir(exist_ok=True)
    save_file(judge.state_dict(), folder / "model.safetensors")


if __name__ == "__main__":
    main()
