"""The latents of the pocket model: linear codes of the 8 x 8 patches, computed by principal component analysis.

Training a latent space from scratch takes hours on a CPU, and colors are learned last. A linear code needs no training
and preserves colors exactly. The UNet can be trained on the codes while the AutoencoderKL is trained: its encoder
learns to produce the codes, and its decoder learns to reconstruct sharp images from them.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .scenes import SceneStream, draw_pictures
from .world import World, download_designs


CHANNELS = 24
PATCH = 8


class Codes:
    """Linear codes. `encode` converts uint8 images of shape (n, 64, 64, 3) to latents of shape (n, 24, 8, 8)."""

    def __init__(self, mean: torch.Tensor, basis: torch.Tensor):
        self.mean = mean
        self.basis = basis

    @classmethod
    def fit(cls, pictures: np.ndarray) -> "Codes":
        patches = _patches(pictures).flatten(0, 2)
        mean = patches.mean(0)
        variance, basis = torch.linalg.eigh(torch.cov((patches - mean).T))
        variance, basis = variance.flip(0)[:CHANNELS], basis.flip(1)[:, :CHANNELS]
        # strong components (colors) remain stronger than weak ones (details), but the difference is smaller than in
        # the image
        weights = variance**-0.25
        weights = weights / (variance * weights**2).mean().sqrt()
        return cls(mean, basis * weights)

    @classmethod
    def from_latents(cls, pictures: np.ndarray, latents: torch.Tensor) -> "Codes":
        """Fits codes to given latents of shape (n, 24, 8, 8) of these images, by least squares."""
        patches = _patches(pictures).flatten(0, 2).double()
        mean = patches.mean(0)
        # the codes have no bias, so the latents of the mean patch are zero
        basis = torch.linalg.lstsq(patches - mean, latents.permute(0, 2, 3, 1).flatten(0, 2).double()).solution
        return cls(mean.float(), basis.float())

    def to(self, device: str) -> "Codes":
        return Codes(self.mean.to(device), self.basis.to(device))

    def save(self, file: Path) -> None:
        save_file({"mean": self.mean, "basis": self.basis.contiguous()}, file)

    def importance(self) -> torch.Tensor:
        """Returns the weight of each latent channel in the loss, of shape (1, 24, 1, 1) with a mean of 1. Weaker
        channels have larger weights. If channels were weighted by their contribution to the image, the details that
        distinguish the designs would not be learned."""
        weights = self.basis.norm(dim=0)
        return (weights / weights.mean())[None, :, None, None]

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        patches = _patches(pictures, self.mean.device)
        return ((patches - self.mean) @ self.basis).permute(0, 3, 1, 2).contiguous()


def _patches(pictures: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    pixels = torch.from_numpy(pictures).to(device).float() / 127.5 - 1
    return pixels.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3).flatten(3)


def load_codes(work_dir: Path) -> Codes:
    """Loads the codes of the training scenes. The first call fits and saves them."""
    file = work_dir / "codes.safetensors"
    if not file.exists():
        download_designs(work_dir / "designs")
        stream = SceneStream(World(work_dir / "designs"), others_share=0.2)
        Codes.fit(draw_pictures(stream, 3000, (0,))).save(file)
    return Codes(**load_file(file))
