"""Opens uploaded image files."""

import base64
import io
from pathlib import Path

from diffusers_ssr.images_ssr import to_pil
from image_files import open_image
from PIL import Image


LONGEST_SIDE = 1024


def open_upload(path: str | Path) -> Image.Image:
    """
    Opens an image file. Large images are scaled down, because the vision encoder only uses a few hundred pixels and
    the image is transferred between the browser and the server several times.

    Args:
        path (`str` or `Path`):
            The image file.

    Returns:
        `PIL.Image.Image`, upright, in RGB, with at most 1024 pixels on the longer side.

    Raises:
        `ValueError`: if the file is not an image, is truncated, or is too large, too small or too narrow. The message
            contains the file name.
    """
    name = Path(path).name
    image = to_pil(open_image(Path(path).read_bytes(), name), name)  # errors do not show the server's path
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def to_text(image: Image.Image) -> str:
    """Returns an image as a text that the browser can keep. A large image is compressed with a loss."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=max(image.size) <= 256, quality=90)
    return base64.b64encode(file.getvalue()).decode()


def from_text(text: str) -> Image.Image:
    """Returns the image of `to_text`."""
    return open_image(base64.b64decode(text)).convert("RGB")
