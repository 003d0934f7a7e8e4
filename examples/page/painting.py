"""Masks from the layers of an image editor."""

import numpy as np
from PIL import Image, ImageChops


CANVAS_SIDE = 512


def canvas_for(image: Image.Image) -> Image.Image:
    """Returns the image to paint on. A small image is enlarged, so that the brush is smaller than its pixels."""
    ratio = CANVAS_SIDE / max(image.size)
    if ratio <= 1:
        return image
    return image.resize(tuple(max(round(side * ratio), 1) for side in image.size), Image.Resampling.BICUBIC)


def painted_mask(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """
    Returns a mask of the painted area. The color does not matter.

    Args:
        layers (`list[PIL.Image.Image]`):
            The layers of the editor, which are transparent where nothing was painted.
        size (`tuple[int, int]`):
            Width and height of the mask.

    Returns:
        `PIL.Image.Image` in mode "L", white where something was painted, or `None` if nothing was painted.
    """
    mask = Image.new("L", size)
    for layer in layers:
        touched = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0))
        mask = ImageChops.lighter(mask, touched.resize(size, Image.Resampling.BOX))
    covered = np.asarray(mask)
    if not covered.any():
        return None
    # a pixel is marked if at least a quarter of it is painted; if no pixel reaches a quarter, because the strokes are
    # too thin, the pixels with the largest painted area are marked
    marked = covered >= min(64, covered.max())
    return Image.fromarray(marked.astype(np.uint8) * 255)
