"""Edge maps for the ControlNet."""

import numpy as np
from PIL import Image, ImageOps


def fit(picture: Image.Image, side: int) -> Image.Image:
    """The picture's middle, as large as a drawn picture; the use for an edge map that is ready."""
    return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def find_edges(picture: Image.Image, side: int, low: int = 100, high: int = 200) -> Image.Image:
    """White edges on black, by Canny with these two thresholds (from 0 to 255): more of them where the thresholds are low."""
    import cv2  # a second to import, and not every page has a ControlNet

    edges = cv2.Canny(np.asarray(fit(picture, side)), low, high)
    return Image.fromarray(edges).convert("RGB")
