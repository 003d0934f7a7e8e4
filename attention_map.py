"""The attention map of a query: what `subject_attention_map` returns."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from . import image_processing_ssr


@dataclass(frozen=True, eq=False, repr=False)
class SubjectAttentionMap:
    r"""
    The token-to-patch attention of a query over its picture, averaged over the heads. This attention produces the subject's
    embeddings. The attention of an empty query is subtracted, because every query attends to some places (such as a horizon or
    the brightest thing) that are not the queried thing.

    Args:
        heat (`np.ndarray` of shape `(height, width)`):
            The attention map at the picture's size, from 0 to 1: the attention of the query's tokens, including padding, minus
            that of an empty query. Its maximum is twice `gathered`, so a query without a clear target gives a faint map.
            With `tokens="own"` it is the map of the paper's figure 5: only the tokens of the query's words, scaled to their own
            maximum.
        tokens (`list[tuple[str, np.ndarray]]`):
            The same for each token of the query's words.
        picture (`PIL.Image.Image`):
            The picture in RGB, rotated as its EXIF data say.
        gathered (`float`):
            The share of the attention, from 0 to 1, that the query moves to other places, compared with an empty query. It
            tends to be lower if the queried thing is not in the picture. Typical values depend on the checkpoint.

    Example:

    ```py
    >>> attention = pipe.subject_attention_map(photo, query="cat")
    >>> attention.overlay().save("where_is_the_cat.png")
    >>> attention.gathered
    ```
    """

    heat: np.ndarray
    tokens: list[tuple[str, np.ndarray]]
    picture: Image.Image = field(repr=False)
    gathered: float = 0.0

    def __repr__(self) -> str:
        height, width = self.heat.shape
        tokens = [token.removesuffix("</w>") for token, _ in self.tokens]
        shown = tokens if len(tokens) <= 8 else [*tokens[:8], f"... {len(tokens) - 8} more"]
        return (
            f"SubjectAttentionMap({' '.join(shown)!r}, {len(tokens)} tokens, {width} x {height} pixels,"
            f" gathered={self.gathered:.2f})"
        )

    def overlay(self, heat: np.ndarray | None = None) -> Image.Image:
        r"""
        The picture with the attention map on top: red where the attention is high, and grey where it is low.

        Args:
            heat (`np.ndarray` of shape `(height, width)`, *optional*):
                The map of one token, instead of that of the whole query.

        Returns:
            `PIL.Image.Image` with the size of the picture.
        """
        heat = (self.heat if heat is None else heat)[..., None]
        pixels = np.asarray(self.picture).astype(np.float32)
        grey = pixels.mean(-1, keepdims=True).repeat(3, -1) * 0.6
        mixed = grey * (1 - heat) + (0.55 * pixels + 0.45 * np.array([255, 40, 0])) * heat
        return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def make_attention_map(
    probs: torch.Tensor,
    empty_probs: torch.Tensor,
    own_tokens: dict[int, str],
    picture: Image.Image,
    resize_mode: str,
    tokens: str,
) -> SubjectAttentionMap:
    r"""
    Compare the attention of a query with that of an empty query.

    Args:
        probs (`torch.Tensor` of shape `(num_tokens, 1 + num_patches)`):
            The query's attention, averaged over the heads, class token first.
        empty_probs (`torch.Tensor` of the same shape):
            The attention of the empty query.
        own_tokens (`dict[int, str]`):
            The tokens of the query's words, by their position in `num_tokens`.
        picture (`PIL.Image.Image`):
            The picture.
        resize_mode (`str`):
            How the picture was resized to the vision encoder's square.
        tokens (`str`):
            `"all"` or `"own"`, see [`SubjectAttentionMap`].
    """
    empty = empty_probs.mean(0)
    own = probs[list(own_tokens)]
    if tokens == "own":
        attention = torch.cat([(own if len(own) else probs).mean(0, keepdim=True), own])
        peaks = torch.ones(len(attention))
    else:
        whole = torch.cat([probs.mean(0, keepdim=True), own])
        attention, peaks = (whole - empty).clamp(min=0), (2 * _distance(whole, empty)).clamp(max=1)
    side = round((probs.shape[1] - 1) ** 0.5)
    maps = image_processing_ssr.postprocess_map(attention[:, 1:].unflatten(1, (side, side)), picture.size, resize_mode)
    # a map that is 0 everywhere stays 0
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12) * peaks[:, None, None]
    gathered = float(_distance(probs.mean(0), empty))
    return SubjectAttentionMap(
        maps[0].numpy(), list(zip(own_tokens.values(), maps[1:].numpy(), strict=True)), picture, gathered
    )


def _distance(probs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The total variation distance of two distributions of attention."""
    return (probs - others).abs().sum(-1) / 2
