"""Decodes pictures of any origin within limits of time and memory, and makes them upright."""

from functools import cache
from typing import Any

import numpy as np
from diffusers.utils import logging
from PIL import Image

from . import shared_components


logger = logging.get_logger(__name__)

# The largest tile of a TIFF file, in pixels, in a picture that is smaller. A whole tile is decoded at once.
SMALLEST_TILE_LIMIT = 2**20
# Decoders that Pillow implements in Python need up to a second for so many pixels.
SLOW_DECODERS = ("bmp_rle", "ppm", "ppm_plain")
MAX_SLOW_PIXELS = 2**20
MAX_SLOW_WIDTH = 2**13  # one code of `bmp_rle` adds up to 255 rows
# Each scan of a progressive JPEG file passes over the whole picture. Encoders write about ten.
MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT = 258, 262, 322, 323  # tags of TIFF files


def check_pixels(count: int, name: str, most: int) -> None:
    """Raises a `ValueError` if a picture has more than `most` pixels."""
    if count > most:
        raise ValueError(
            f"`{name}` has {count:,} pixels, more than the {most:,} that are accepted: make it smaller, or set"
            f" `{__package__}.image_processing_ssr.MAX_PIXELS`."
        )


def reason(error: Exception) -> str:
    """Returns the message of an error in one line, without a period at the end."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def decode(image: Image.Image, name: str, most: int) -> None:
    r"""
    Decode a picture if it is not decoded yet. Only one thread decodes at a time: a picture from `Image.open` is decoded
    when it is first used, and two threads that share it would both seek and read in the same file, so that one of them
    would get corrupted pixels or an error.

    Args:
        image (`PIL.Image.Image`):
            The picture.
        name (`str`):
            The name of the argument in error messages.
        most (`int`):
            The maximum number of pixels.

    Raises:
        `ValueError`: if it has more pixels, cannot be decoded, or would need far more time or memory than a picture of
            its size.
    """
    # the size comes from the file's header; nothing is decoded yet
    check_pixels(image.width * image.height, name, most)
    with shared_components.decoding_lock():
        try:
            # before `load`, because `is_animated` may seek to another frame, and the pixels would have to be decoded
            # again
            if getattr(image, "is_animated", False):
                _say_animated(name)
            _check_decoder(image)
            transparency = _png_transparency(image)
            image.load()
        except Exception as error:  # a decoder that meets arbitrary bytes may raise anything
            raise ValueError(f"`{name}` cannot be decoded: {reason(error)}.") from error
        if transparency is not None:
            image.info["transparency"] = transparency


def upright(image: Image.Image, name: str, most: int) -> Image.Image:
    """Returns a decoded copy of a picture, with its EXIF rotation applied. The copy has no metadata, except which
    pixels are transparent. For the arguments and errors see [`decode`]."""
    decode(image, name, most)
    with shared_components.decoding_lock():
        try:
            # needs the lock, because it seeks in the file if the EXIF data come after the pixels
            method = _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # broken EXIF data
            method = None
        copied = image.copy() if method is None else image.transpose(method)
    # `ImageOps.exif_transpose` would also rewrite the EXIF data, which fails if any other tag is broken
    copied.info = {name: value for name, value in image.info.items() if name == "transparency"}
    return _with_full_range(copied, getattr(image, "tag_v2", {}))


def _check_decoder(image: Image.Image) -> None:
    """Raises a `ValueError` for files of a few bytes that take seconds or gigabytes to decode."""
    pixels, decoders = image.width * image.height, {tile[0] for tile in getattr(image, "tile", ())}
    if not decoders:  # decoded already
        return
    if decoders & set(SLOW_DECODERS) and (pixels > MAX_SLOW_PIXELS or image.width > MAX_SLOW_WIDTH):
        raise ValueError(
            f"only pictures of up to {MAX_SLOW_PIXELS:,} pixels can have this encoding of {image.format} files"
        )
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_HEIGHT, 0)
    if tile > max(SMALLEST_TILE_LIMIT, pixels):
        raise ValueError(f"its tiles have {tile:,} pixels, but the picture only {pixels:,}")
    file = getattr(image, "fp", None)
    if "progressive" in image.info and file is not None:
        scans = _count(file, _START_OF_SCAN)
        if scans > MAX_SCANS:
            raise ValueError(f"it has {scans:,} scans, more than the {MAX_SCANS:,} that are accepted")


def _count(file: Any, part: bytes) -> int:
    """Returns how often `part` is in the rest of a file, whose position does not change."""
    position, total, before = file.tell(), 0, b""
    while block := file.read(2**20):
        total += (before + block).count(part)
        before = block[1 - len(part) :]
    file.seek(position)
    return total


def _png_transparency(image: Image.Image) -> int | tuple[int, ...] | None:
    """Returns the transparent color of a PNG file with the depth of the decoded picture, or `None` if Pillow has
    already converted it."""
    given = image.info.get("transparency")
    raw_modes = {tile[3] for tile in getattr(image, "tile", ()) if image.format == "PNG"}
    if isinstance(given, int) and raw_modes & {"L;2", "L;4"}:
        return given * (85 if "L;2" in raw_modes else 17)
    if isinstance(given, tuple) and "RGB;16B" in raw_modes:
        return tuple(value >> 8 for value in given)
    return None


def _with_full_range(image: Image.Image, tags: Any) -> Image.Image:
    """Scales the values of TIFF files with 12 bits to 16, and inverts deep pictures in which 0 is white. Pillow inverts
    only pictures of up to 8 bits."""
    deep, inverted = image.mode.startswith("I;16"), tags.get(_PHOTOMETRIC) == 0
    if deep and tags.get(_BITS) == (12,):
        return Image.fromarray((np.asarray(image).astype(np.uint32) * 65535 // 4095).astype(np.uint16))
    if deep and inverted:
        return Image.fromarray(65535 - np.asarray(image).astype(np.uint16))
    if image.mode in ("F", "I") and inverted:
        pixels = np.asarray(image)
        highest = pixels.max()
        white = next((top for top in (1, 255, 65535) if highest <= top), highest)
        return Image.fromarray(white - pixels)
    return image


@cache
def _say_animated(name: str) -> None:
    """Logs a warning. The cache limits it to one warning for each name, because training would repeat it in every
    step."""
    logger.warning(f"`{name}` has several frames: only its current frame is used, by default the first one.")
