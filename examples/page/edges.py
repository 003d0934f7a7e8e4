"""Edge maps for the ControlNet."""

import numpy as np
from PIL import Image, ImageOps


def fit(image: Image.Image, side: int) -> Image.Image:
    """Crops the center of the image and resizes it to the size of a generated image. An uploaded edge map is only
    resized with this function."""
    return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def find_edges(image: Image.Image, side: int, low: int = 100, high: int = 200) -> Image.Image:
    """Returns an edge map with white edges on black, computed with the Canny algorithm. The thresholds are from 0 to
    255. Lower thresholds lead to more edges."""
    import cv2  # imported here, because the import takes a second and not every page has a ControlNet

    edges = cv2.Canny(np.asarray(fit(image, side)), low, high)
    return Image.fromarray(edges).convert("RGB")
