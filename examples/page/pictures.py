"""Opens uploaded picture files."""

from pathlib import Path

from diffusers_ssr.images_ssr import to_pil
from image_files import open_image
from PIL import Image


LONGEST_SIDE = 1024


def open_picture(path: str | Path) -> Image.Image:
    """
    Opens a picture file. Large pictures are scaled down, because the vision encoder only uses a few hundred pixels and
    the picture is transferred between the browser and the server several times.

    Args:
        path (`str` or `Path`):
            The picture file.

    Returns:
        `PIL.Image.Image`, upright, in RGB, with at most 1024 pixels on the longer side.

    Raises:
        `ValueError`: if the file is not a picture, is truncated, or is too large, too small or too narrow. The message
            contains the file name.
    """
    name = Path(path).name
    picture = to_pil(open_image(path, name), name)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
