"""From the files that people upload to pictures."""

from pathlib import Path

from diffusers_ssr.image_processing_ssr import open_image, to_pil
from PIL import Image


LONGEST_SIDE = 1024


def open_picture(path: str | Path) -> Image.Image:
    """
    Read a picture file. Large pictures are made smaller, since the vision encoder sees a few hundred pixels and the browser
    sends the picture back and forth.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `PIL.Image.Image`, upright, in RGB, of at most 1024 pixels on the longer side.

    Raises:
        `ValueError`: if it is no picture, is cut off, or is too large, too small or too narrow. The message names the file.
    """
    name = Path(path).name
    picture = to_pil(open_image(path, name), name)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
