"""What is made of the pocket's pictures: edges for the ControlNet, and the second look."""

import cv2
import numpy as np


FRAME = 6
PAPER = np.array((247, 244, 235), np.float32)
FADED_TO = np.array((225, 190, 150), np.float32)


def edges(picture: np.ndarray) -> np.ndarray:
    """White edges on black, as controlnet-aux's CannyDetector finds them; (height, width, 3) uint8, both."""
    return np.repeat(cv2.Canny(picture, 100, 200)[..., None], 3, axis=-1)


def as_photograph(pictures: np.ndarray) -> np.ndarray:
    """Pictures (n, 64, 64, 3) uint8 as they look on a faded instant photograph with its white frame."""
    faded = 0.68 * pictures + 0.32 * FADED_TO
    framed = np.broadcast_to(PAPER, pictures.shape).copy()
    framed[:, FRAME:-FRAME, FRAME:-FRAME] = faded[:, FRAME:-FRAME, FRAME:-FRAME]
    return framed.round().astype(np.uint8)


def without_look(pictures: np.ndarray) -> np.ndarray:
    """The reverse of `as_photograph`, as far as it goes: colours as they were, the frame filled from its inner edge. For a
    judge who knows no photographs."""
    inner = pictures[:, FRAME:-FRAME, FRAME:-FRAME].astype(np.float32)
    vivid = ((inner - 0.32 * FADED_TO) / 0.68).clip(0, 255).round().astype(np.uint8)
    return np.pad(vivid, ((0, 0), (FRAME, FRAME), (FRAME, FRAME), (0, 0)), mode="edge")


def is_framed(pictures: np.ndarray) -> np.ndarray:
    """Which of the pictures (n, 64, 64, 3) uint8 have that frame: all of its four sides are nearly paper."""
    depth = FRAME - 2  # the inner edge may be soft
    sides = (pictures[:, :depth], pictures[:, -depth:], pictures[:, :, :depth], pictures[:, :, -depth:])
    return np.all([np.abs(side - PAPER).mean((1, 2, 3)) < 20 for side in sides], axis=0)
