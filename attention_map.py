"""Where in a picture a query looks: what `subject_attention_map` returns."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from . import image_processing_ssr


@dataclass(frozen=True, eq=False, repr=False)
class SubjectAttentionMap:
    r"""
    The token-to-patch attention of a query over its picture (figure 5 of the paper), averaged over the heads.

    Args:
        heat (`np.ndarray` of shape `(height, width)`):
            Averaged over the query's own tokens, from 0 to 1 (where it looks most), at the picture's own size.
        tokens (`list[tuple[str, np.ndarray]]`):
            The same for each of the query's tokens alone.
        picture (`PIL.Image.Image`):
            The picture, upright and in RGB.

    Example:

    ```py
    >>> attention = pipe.subject_attention_map(photo, query="cat")
    >>> attention.overlay().save("where_is_the_cat.png")
    ```
    """

    heat: np.ndarray
    tokens: list[tuple[str, np.ndarray]]
    picture: Image.Image
    gathered: float = 0.0

    def __repr__(self) -> str:
        height, width = self.heat.shape
        tokens = [token.removesuffix("</w>") for token, _ in self.tokens]
        shown = tokens if len(tokens) <= 8 else [*tokens[:8], f"... {len(tokens) - 8} more"]
        return f"SubjectAttentionMap({' '.join(shown)!r}, {len(tokens)} tokens, {width} x {height} pixels)"

    def overlay(self, heat: np.ndarray | None = None) -> Image.Image:
        r"""
        The picture with the heat laid over it: red where the query looks, the picture greyed out where it does not.

        Args:
            heat (`np.ndarray` of shape `(height, width)`, *optional*):
                One token's map instead of the whole query's.

        Returns:
            `PIL.Image.Image` of the picture's size.
        """
        heat = (self.heat if heat is None else heat)[..., None]
        pixels = np.asarray(self.picture).astype(np.float32)
        grey = pixels.mean(-1, keepdims=True).repeat(3, -1) * 0.6
        mixed = grey * (1 - heat) + (0.55 * pixels + 0.45 * np.array([255, 40, 0])) * heat
        return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def make_attention_map(probs, empty_probs, own, picture, resize_mode, tokens):
    heat = probs[list(own) or slice(None)] if tokens == "own" else probs
    heat = torch.cat([heat.mean(0, keepdim=True), probs[list(own)]])[:, 1:]
    side = round(heat.shape[1] ** 0.5)
    maps = image_processing_ssr.postprocess_map(heat.unflatten(1, (side, side)), picture.size, resize_mode)
    maps = (maps / maps.amax((1, 2), keepdim=True)).numpy()
    gathered = float((probs.mean(0) - empty_probs.mean(0)).abs().sum() / 2)
    return SubjectAttentionMap(maps[0], list(zip(own.values(), maps[1:], strict=False)), picture, gathered)
