"""Image conversions: edges for the ControlNet, and the photograph look, which is the second style of images."""

import cv2
import numpy as np


FRAME = 6
PAPER = np.array((247, 244, 235), np.float32)
FADED_TO = np.array((225, 190, 150), np.float32)


def edges(picture: np.ndarray) -> np.ndarray:
    """Detects edges in the same way as `CannyDetector` of controlnet-aux. Returns white edges on black. Both images
    are uint8 of shape (height, width, 3)."""
    return np.repeat(cv2.Canny(picture, 100, 200)[..., None], 3, axis=-1)


def as_photograph(pictures: np.ndarray) -> np.ndarray:
    """Makes uint8 images of shape (n, 64, 64, 3) look like faded instant photographs with a white frame."""
    faded = 0.68 * pictures + 0.32 * FADED_TO
    framed = np.broadcast_to(PAPER, pictures.shape).copy()
    framed[:, FRAME:-FRAME, FRAME:-FRAME] = faded[:, FRAME:-FRAME, FRAME:-FRAME]
    return framed.round().astype(np.uint8)


def without_look(pictures: np.ndarray) -> np.ndarray:
    """The approximate inverse of `as_photograph`: restores the colors and fills the frame with the pixels at its inner
    edge. It is needed for the judge, which was not trained on photographs."""
    inner = pictures[:, FRAME:-FRAME, FRAME:-FRAME].astype(np.float32)
    vivid = ((inner - 0.32 * FADED_TO) / 0.68).clip(0, 255).round().astype(np.uint8)
    return np.pad(vivid, ((0, 0), (FRAME, FRAME), (FRAME, FRAME), (0, 0)), mode="edge")


def is_framed(pictures: np.ndarray) -> np.ndarray:
    """Returns which of the uint8 images of shape (n, 64, 64, 3) have the frame of `as_photograph`. The color of all
    four sides has to be close to `PAPER`."""
    depth = FRAME - 2  # the inner edge may be blurred
    sides = (pictures[:, :depth], pictures[:, -depth:], pictures[:, :, :depth], pictures[:, :, -depth:])
    return np.all([np.abs(side - PAPER).mean((1, 2, 3)) < 20 for side in sides], axis=0)
