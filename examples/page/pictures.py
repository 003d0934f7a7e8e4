"""From the files that people upload to pictures."""

from pathlib import Path

from diffusers_ssr.image_processing_ssr import to_pil
from PIL import Image, UnidentifiedImageError


LARGEST_PIXELS = 64_000_000
LONGEST_SIDE = 1024

# a fixed list: Pillow knows formats that start other programs (EPS)
Image.init()
FORMATS = [name for name in ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF") if name in Image.OPEN]


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
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > LARGEST_PIXELS:
                raise ValueError(
                    f"{name} has {file.width} x {file.height} pixels, but at most {LARGEST_PIXELS // 10**6} million are"
                    " read."
                )
            picture = to_pil(file, name)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a picture that can be read ({', '.join(FORMATS)}).") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is damaged or cut off: {error}.") from error
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
