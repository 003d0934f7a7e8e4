"""Opens image files of unknown origin: uploads, and the rows of tables and of training sets."""

import io
import os
from contextlib import suppress
from pathlib import Path

from PIL import Image, UnidentifiedImageError


with suppress(ImportError):  # optional: Pillow itself does not read the HEIC files of phones
    from pillow_heif import register_heif_opener

    register_heif_opener()

MAX_PIXELS = 2**26  # 67 million
MAX_BYTES = 4 * MAX_PIXELS
Image.init()
# EPS files are programs, which Pillow passes to Ghostscript. Of the other excluded formats, Pillow only reads the header.
FORMATS = tuple(sorted(set(Image.OPEN) - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}))
SUFFIXES = frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS)


def open_image(file: str | os.PathLike | bytes, name: str = "image") -> Image.Image:
    """
    Opens and decodes an image file. Of an animation, the first frame is decoded.

    Args:
        file (`str`, `os.PathLike` or `bytes`): the path or the content of the file.
        name (`str`): the name of the argument in error messages.

    Raises:
        `ValueError`: if the file is missing, empty, not an image, truncated, larger than `MAX_BYTES`, or if the image
            has more than `MAX_PIXELS` pixels. The number of pixels is checked before they are decoded.
    """
    where = "" if isinstance(file, bytes) else f" (in {os.fspath(file)!r:.300})"
    content = file if isinstance(file, bytes) else _read(Path(file), name, where)
    if len(content) > MAX_BYTES:
        raise ValueError(f"`{name}` has more than the {MAX_BYTES:,} bytes that are accepted{where}.")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return image
    except Exception as error:  # decoders can raise any exception on corrupted data
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "its format is unknown, or the file is truncated"
            if content[4:8] == b"ftyp":
                reason = "HEIC files need the package pillow-heif (`pip install pillow-heif`)"
        raise ValueError(f"`{name}` cannot be decoded: {reason}{where}.") from error
    raise ValueError(
        f"`{name}` has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are accepted{where}."
    )


def _read(file: Path, name: str, where: str) -> bytes:
    try:
        # a named pipe or a device could block forever
        if file.exists() and not file.is_file():
            raise ValueError("it is not a regular file")
        with open(file, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # such as a missing file, or a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`{name}` cannot be read: {reason}{where}.") from error


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """Crops the central square and scales it to `side` pixels."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
