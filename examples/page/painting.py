"""What people paint in an image editor, as masks."""

import numpy as np
from PIL import Image, ImageChops


CANVAS_SIDE = 512


def canvas_for(picture: Image.Image) -> Image.Image:
    """The picture to paint on: a small one is enlarged, so that the brush is finer than its pixels."""
    ratio = CANVAS_SIDE / max(picture.size)
    if ratio <= 1:
        return picture
    return picture.resize(tuple(max(round(side * ratio), 1) for side in picture.size), Image.Resampling.BICUBIC)


def painted_mask(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """
    Where something was painted, whatever its colour.

    Args:
        layers (`list[PIL.Image.Image]`):
            The editor's layers, transparent where nothing was painted.
        size (`tuple[int, int]`):
            Width and height of the mask.

    Returns:
        `PIL.Image.Image` in mode "L", white where something was painted, or `None` if nothing was.
    """
    mask = Image.new("L", size)
    for layer in layers:
        touched = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0))
        mask = ImageChops.lighter(mask, touched.resize(size, Image.Resampling.BOX))
    covered = np.asarray(mask)
    if not covered.any():
        return None
    # of pixels that are painted in part, those to a quarter; a stroke thinner than that still counts
    marked = covered >= min(64, covered.max())
    return Image.fromarray(marked.astype(np.uint8) * 255)
