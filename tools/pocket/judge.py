"""The judge: a small classifier, trained apart from everything it judges, that says what a picture shows."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .training import picture_tensor
from .world import CATEGORY_NAMES, DESIGNS, NUM_VARIANTS, PLACE_NAMES


@dataclass
class Verdict:
    """Logits for a batch of pictures: which categories are there (n, categories, independent of each other), and the
    place, the design and the variant (colour or look) of the subject, the latter two given each category
    (n, categories, designs) and (n, categories, variants)."""

    categories: torch.Tensor
    places: torch.Tensor
    designs: torch.Tensor
    variants: torch.Tensor


class Judge(nn.Module):
    """A convolutional network on 64 x 64 pictures."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 160)
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
            if after > 24:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        categories = len(CATEGORY_NAMES)
        # each cell votes for what it shows; the strongest vote counts
        self.cells = nn.Conv2d(widths[-1], categories * (1 + len(DESIGNS) + NUM_VARIANTS), 1)
        self.place = nn.Linear(widths[-1], len(PLACE_NAMES))

    def forward(self, pixels: torch.Tensor) -> Verdict:
        """`pixels` (n, 3, 64, 64) from -1 to 1."""
        features = self.features(pixels)
        votes = self.cells(features).flatten(2).unflatten(1, (len(CATEGORY_NAMES), -1))
        presence = votes[:, :, 0]
        weights = presence.softmax(-1)[:, :, None]
        details = (votes[:, :, 1:] * weights).sum(-1)
        categories = presence.logsumexp(-1)
        places = self.place(features.mean((2, 3)))
        return Verdict(categories, places, details[..., : len(DESIGNS)], details[..., len(DESIGNS) :])

    @torch.no_grad()
    def look_at(self, pictures) -> Verdict:
        """`pictures` (n, 64, 64, 3) uint8."""
        return self(picture_tensor(pictures))


def load_judge(folder: str | Path) -> Judge:
    judge = Judge()
    state_dict = load_file(Path(folder) / "judge" / "model.safetensors")
    judge.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}
    )
    return judge.eval()
