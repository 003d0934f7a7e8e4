"""The judge: a small classifier that recognizes the content of an image. It is trained separately from the models
that it evaluates."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .training import picture_tensor
from .world import CATEGORY_NAMES, DESIGNS, NUM_VARIANTS, PLACE_NAMES


@dataclass
class Verdict:
    """Logits for a batch of images: `categories` (n, categories), independent of each other, tell which categories
    are in the image; `places` (n, places) tell the place; `designs` (n, categories, designs) and `variants` (n,
    categories, variants) tell the design and the variant (color or look) of the subject of each category."""

    categories: torch.Tensor
    places: torch.Tensor
    designs: torch.Tensor
    variants: torch.Tensor


class Judge(nn.Module):
    """A convolutional network for images of 64 x 64 pixels. `num_designs` is the number of designs of its split."""

    def __init__(self, num_designs: int = len(DESIGNS)):
        super().__init__()
        self.num_designs = num_designs
        widths = (3, 24, 48, 96, 160)
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
            if after > 24:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        categories = len(CATEGORY_NAMES)
        # each cell of the feature map predicts its content; cells with a higher presence logit have a larger weight
        self.cells = nn.Conv2d(widths[-1], categories * (1 + num_designs + NUM_VARIANTS), 1)
        self.place = nn.Linear(widths[-1], len(PLACE_NAMES))

    def forward(self, pixels: torch.Tensor) -> Verdict:
        """Classifies `pixels` of shape (n, 3, 64, 64), from -1 to 1."""
        features = self.features(pixels)
        votes = self.cells(features).flatten(2).unflatten(1, (len(CATEGORY_NAMES), -1))
        presence = votes[:, :, 0]
        weights = presence.softmax(-1)[:, :, None]
        details = (votes[:, :, 1:] * weights).sum(-1)
        categories = presence.logsumexp(-1)
        places = self.place(features.mean((2, 3)))
        return Verdict(categories, places, details[..., : self.num_designs], details[..., self.num_designs :])

    @torch.no_grad()
    def look_at(self, pictures) -> Verdict:
        """Classifies uint8 `pictures` of shape (n, 64, 64, 3)."""
        return self(picture_tensor(pictures))


def load_judge(folder: str | Path) -> Judge:
    state_dict = load_file(Path(folder) / "judge" / "model.safetensors")
    judge = Judge(len(state_dict["cells.weight"]) // len(CATEGORY_NAMES) - 1 - NUM_VARIANTS)
    judge.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}
    )
    return judge.eval()
