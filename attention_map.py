"""Attention maps: the attention of a query to its picture, as returned by `subject_attention_map`."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from . import image_processing_ssr


@dataclass(frozen=True, eq=False, repr=False)
class SubjectAttentionMap:
    r"""
    The token-to-patch attention of a query to its picture, averaged over the heads. The subject embeddings are
    computed with this attention, so it shows which parts of the picture are used. The attention of an empty query is
    subtracted, because every query attends to some parts of a picture, such as a horizon or the brightest object.

    Args:
        heat (`np.ndarray` of shape `(height, width)`):
            A map of the size of the picture, from 0 to 1. By default, it shows how much more attention the query's
            tokens, including the padding, pay to each place than the tokens of an empty query. The map is scaled to a
            maximum of twice `gathered` (at most 1). A query that attends to no particular place gives a faint map.
            With `tokens="own"`, it shows the attention of the tokens of the query's words instead, as in figure 5 of
            the paper. This map is scaled to a maximum of 1, and the attention of an empty query is not subtracted.
        tokens (`list[tuple[str, np.ndarray]]`):
            The text and the map of each token of the query's words. A textual inversion with several vectors has one
            token for each vector.
        picture (`PIL.Image.Image`):
            The picture, upright and in RGB.
        gathered (`float`):
            The share of the query's attention, from 0 to 1, that goes to other places than the attention of an empty
            query. It tends to be lower if the picture does not contain the queried subject. The typical values depend
            on the checkpoint.

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
        Returns the picture with the map drawn over it: red where the attention is high, and gray where it is low.

        Args:
            heat (`np.ndarray` of shape `(height, width)`, *optional*):
                The map to draw, for example the map of one token. Defaults to the map of the whole query.

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
    Create an attention map from the attention of a query and the attention of an empty query.

    Args:
        probs (`torch.Tensor` of shape `(num_tokens, 1 + num_patches)`):
            The attention of the query, averaged over the heads, class token first.
        empty_probs (`torch.Tensor` of the same shape):
            The attention of the empty query.
        own_tokens (`dict[int, str]`):
            The tokens of the query's words, by their index in the first dimension of `probs`.
        picture (`PIL.Image.Image`):
            The picture.
        resize_mode (`str`):
            The `resize_mode` with which the picture was preprocessed.
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
    # the clamp prevents a division by 0 for a map that is 0 everywhere
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12) * peaks[:, None, None]
    gathered = float(_distance(probs.mean(0), empty))
    return SubjectAttentionMap(
        maps[0].numpy(), list(zip(own_tokens.values(), maps[1:].numpy(), strict=True)), picture, gathered
    )


def _distance(probs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns the total variation distance: the share of the attention that two distributions do not have in
    common."""
    return (probs - others).abs().sum(-1) / 2
