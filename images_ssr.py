"""Converts reference images and masks to the pixel values of the vision encoder, and attention maps back to the size of
the image."""

import threading
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor


RESIZE_MODES = ("pad", "crop")
SMALLEST_SIDE = 8
LARGEST_RATIO = 16

# how far float values may be outside of their range, because bicubic resizing overshoots
_SLACK = 1e-3

# An image from `Image.open` is decoded when it is first used. Two threads that share such an image would both seek and
# read in the same file.
_decoding = threading.Lock()


def to_pil(image: Any, name: str = "subject_image") -> Image.Image:
    r"""
    Converts a reference image to an upright RGB image.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            The image. PIL images can have any mode. Transparent parts become white, and EXIF rotation is applied.
            Modes with more than 8 bits are scaled by the smallest of 1, 255 and 65535 that contains all values (I;16
            always by 65535). Arrays have shape `(height, width, 3)` or `(1, height, width, 3)`, tensors
            `(3, height, width)` or `(1, 3, height, width)`. They hold uint8, uint16, or floats from 0 to 1.
        name (`str`, defaults to `"subject_image"`):
            The name of the argument in error messages.

    Returns:
        `PIL.Image.Image` in mode RGB. It does not share memory with `image`.

    Raises:
        `ValueError`: if it is not an image, is truncated, or is too small or too narrow.

    Example:

    ```py
    >>> to_pil(np.zeros((64, 48, 3))).size
    (48, 64)
    ```
    """
    if isinstance(image, torch.Tensor):
        image = _channels_last(image, name)
    if isinstance(image, np.ndarray):
        image = _image_of_array(image, name)
    if not isinstance(image, Image.Image):
        hint = ": open a path or a URL with `diffusers.utils.load_image`" if isinstance(image, str) else ""
        raise ValueError(
            f"`{name}` has to be a PIL image, a numpy array or a torch tensor, but is {type(image).__name__}{hint}."
        )
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(
            f"`{name}` is {width} x {height} pixels: it has to be at least {SMALLEST_SIDE} on each side, and at most"
            f" {LARGEST_RATIO} times as long as wide."
        )
    return _to_rgb(_upright(image, name), name)


def is_box(value: Any) -> bool:
    """Whether a mask is given as a box: a tuple or list of four numbers."""
    numbers = isinstance(value, (tuple, list)) and len(value) == 4
    return numbers and all(isinstance(side, Real) and not isinstance(side, bool) for side in value)


def box_values(box: Sequence[float], shape: tuple[int, int], name: str) -> np.ndarray:
    """Returns the mask of a box `(left, top, right, bottom)`, in fractions from 0 to 1 of the width and the height, as
    float32 of a shape `(height, width)`. Pixels that the box covers in part have values between 0 and 1."""
    left, top, right, bottom = (float(side) for side in box)
    # comparisons with NaN are false
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"`{name}` as a box has to be (left, top, right, bottom) in fractions from 0 to 1, left before right and top"
            f" before bottom, but is {tuple(box)}."
        )
    rows, columns = (
        (np.minimum(np.arange(1, size + 1), high * size) - np.maximum(np.arange(size), low * size)).clip(0, 1)
        for size, low, high in ((shape[0], top, bottom), (shape[1], left, right))
    )
    return np.outer(rows, columns).astype(np.float32)


def mask_values(mask: Any, name: str = "subject_mask") -> np.ndarray:
    r"""
    Converts a mask to numbers. The formats that common image editors and libraries write are accepted.

    Args:
        mask (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            White, or 1, inside. PIL images can have any mode. If parts of an image are transparent, its alpha channel
            is the mask, and its colors are ignored. Otherwise the largest color channel is the mask, so that pure
            colors count as white. Arrays and tensors hold booleans, values from 0 to 1, or values from 0 to 255
            (uint16 also from 0 to 65535). Their shape is `(height, width)` or `(frames, height, width)`, with optional
            dimensions of size 1. RGB and RGBA arrays have 3 or 4 channels in their last dimension.
        name (`str`, defaults to `"subject_mask"`):
            The name of the argument in error messages.

    Returns:
        `np.ndarray` of float32 from 0 to 1, with shape `(height, width)`, or `(frames, height, width)` if there is
        more than one frame.

    Raises:
        `ValueError`: if it is not a valid mask.

    Example:

    ```py
    >>> mask_values(np.array([[[0, 255]]], np.uint8))
    array([[0., 1.]], dtype=float32)
    ```
    """
    if isinstance(mask, Image.Image):
        return _mask_of_image(_upright(mask, name), name)
    if isinstance(mask, torch.Tensor):
        mask = _to_numpy(mask, name)
    if not isinstance(mask, np.ndarray):
        raise ValueError(
            f"`{name}` has to be a PIL image, a numpy array or a torch tensor, but is {type(mask).__name__}."
        )
    if mask.size and mask.ndim == 3 and mask.shape[2] in (3, 4) and mask.shape[0] > 1:
        return _mask_of_colors(mask, name)
    return _unit(mask.reshape(_mask_shape(mask.shape, name)), name)


def to_mask(mask: Any, size: tuple[int, int], name: str = "subject_mask") -> Image.Image:
    """Converts the mask of an image of a size `(width, height)`, see [`mask_values`], or a box, to a black and white image: 255 where
    the subject is, 0 elsewhere. Raises a `ValueError` if it is not a valid mask, does not have the size of the image, or
    marks nothing or everything."""
    values = box_values(mask, size[::-1], name) if is_box(mask) else mask_values(mask, name)
    if values.shape != size[::-1]:
        hint = ": pass one mask or one color channel of it" if values.shape[1:] == size[::-1] else ""
        raise ValueError(
            f"`{name}` has to be as large as its image, (height, width) = {size[::-1]}, but is {values.shape}{hint}."
        )
    marked = values > 0.5
    if not marked.any():
        raise ValueError(f"`{name}` is empty: it has to mark the subject.{hint_for_labels(mask)}")
    if marked.all():
        raise ValueError(f"`{name}` marks the whole image: leave it out to select the whole image.")
    return Image.fromarray(marked.astype(np.uint8) * 255)


def hint_for_labels(mask: Any) -> str:
    """Returns a hint for the error message of an empty mask, if its values look like the numbers of segments."""
    values = np.asarray(mask) if isinstance(mask, Image.Image) and mask.mode in ("L", "I") else mask
    if isinstance(values, (np.ndarray, torch.Tensor)) and 1 < values.max() <= 127:
        return (
            f" Its values are from {values.min().item()} to {values.max().item()}, of 255 for white: of a segmentation with"
            " one number for each segment, pass `mask == number`."
        )
    return ""


def preprocess(image: Image.Image, processor: CLIPImageProcessor, resize_mode: str = "pad") -> torch.Tensor:
    """Resizes an RGB image to the square input of the vision encoder and normalizes it, to a tensor of shape
    `(1, 3, height, width)`. "pad" keeps the whole image, and fills the rest of the square with the mean color. "crop"
    takes the central square, as CLIP and the released code do.

    This function always uses PIL. The image backend of transformers depends on the installed packages, and different
    backends give different pixel values."""
    # always on the CPU and in float32, even if the default device or dtype is another one
    mean, std = (
        torch.tensor(values, device="cpu", dtype=torch.float32).view(3, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    return _to_square(image, processor, resize_mode, mean, std)


def preprocess_mask(
    mask: Image.Image, processor: CLIPImageProcessor, resize_mode: str = "pad", name: str = "subject_mask"
) -> torch.Tensor:
    """Resizes a mask in mode L in the same way as [`preprocess`] resizes its image, so that it marks the same patches.
    Returns a tensor of shape `(1, 1, height, width)`, from 0 to 1. Raises a `ValueError` if nothing of the mask is left:
    it is outside the central square that "crop" keeps, or too small."""
    values = _to_square(mask, processor, resize_mode)
    if not values.any():
        height, width = values.shape[2:]
        raise ValueError(
            f"`{name}` is empty at the input of the vision encoder: with the resize mode {resize_mode!r}, nothing of it"
            f" remains in {width} x {height} pixels."
        )
    return values


def postprocess_map(attention_map: torch.Tensor, size: tuple[int, int], resize_mode: str) -> torch.Tensor:
    """Resizes attention maps of shape `(count, side, side)` from the square input of the vision encoder to the size of the
    image. The parts that were cropped are 0."""
    width, height = size
    edge = max(size) if resize_mode == "pad" else min(size)
    resized = F.interpolate(attention_map[None], (edge, edge), mode="bilinear")[0]
    # The position of the square relative to the image. With "pad" the square is larger than the image: the values
    # are negative or 0, and `F.pad` crops.
    left, top = (width - edge) // 2, (height - edge) // 2
    return F.pad(resized, (left, width - edge - left, top, height - edge - top))


def check_resize_mode(resize_mode: Any, name: str = "resize_mode") -> None:
    """Raises a `ValueError` if `resize_mode` is not one of `RESIZE_MODES`."""
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"`{name}` has to be one of {RESIZE_MODES}, but is {resize_mode!r}.")


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Decodes an image if necessary, and returns a copy to which the EXIF rotation is applied."""
    try:
        with _decoding:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # the errors of Pillow's decoders
        raise ValueError(f"`{name}` cannot be decoded: {error}.") from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data raise different errors, and the pixels are still right
        return image.copy()


def _to_numpy(tensor: torch.Tensor, name: str) -> np.ndarray:
    if tensor.is_complex() or tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(
            f"`{name}` has to be a plain tensor of real numbers, but is {tensor.dtype} on {tensor.device}."
        )
    tensor = tensor.detach().cpu()
    # numpy does not support bfloat16
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _channels_last(tensor: torch.Tensor, name: str) -> np.ndarray:
    image = tensor[0] if tensor.ndim == 4 and tensor.shape[0] == 1 else tensor
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"`{name}` as a tensor has to be of shape (3, height, width), but is {tuple(tensor.shape)}.")
    return _to_numpy(image, name).transpose(1, 2, 0)


def _image_of_array(array: np.ndarray, name: str) -> Image.Image:
    shape = array.shape
    array = array[0] if array.ndim == 4 and shape[0] == 1 else array
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"`{name}` as an array has to be of shape (height, width, 3), but is {shape}.")
    if array.dtype.str[1:] == "u2":  # uint16 in any byte order
        array = array / 65535
    if array.dtype != np.uint8:
        # resizing causes a small overshoot of float values; comparisons with NaN are false
        slack = _SLACK if array.dtype.kind == "f" else 0
        if array.dtype.kind not in "biuf" or not (array.min() >= -slack and array.max() <= 1 + slack):
            values = f" from {array.min()} to {array.max()}" if array.dtype.kind in "biuf" else ""
            raise ValueError(
                f"`{name}` has to hold uint8, uint16, or floats from 0 to 1, but holds {array.dtype}{values}."
            )
        array = (array * 255.0).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        # modes I and F have no range; they also hold images of 8 bits, for example after `convert("I")`
        values = pixels / np.float32(65535) if image.mode.startswith("I;16") else _unit(pixels, name, deep=True)
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _mask_of_image(image: Image.Image, name: str) -> np.ndarray:
    if image.mode == "P" and not image.has_transparency_data and len(image.getcolors() or ()) > 2:
        raise ValueError(f"`{name}` is a segmentation with numbers: pass `np.asarray(mask) == number`.")
    if image.mode == "F" or image.mode.startswith("I"):
        return _unit(np.asarray(image), name, deep=image.mode.startswith("I"))
    image = image.convert("RGBA") if image.has_transparency_data else _to_rgb(image, name)
    return _mask_of_colors(np.asarray(image), name)


def _mask_of_colors(pixels: np.ndarray, name: str) -> np.ndarray:
    """Converts pixels of shape `(height, width, 3 or 4)` to a mask. The mask is the alpha channel if it has different
    values or is zero everywhere, and otherwise the largest color channel."""
    if pixels.shape[2] == 4:
        alpha = _unit(pixels[..., 3], name)
        if alpha.min() < alpha.max() or not alpha.any():
            # scaled to a maximum of 1, so that a mask painted with a half transparent brush is a valid mask
            return alpha / max(alpha.max(), 1 / 255)
    # the largest channel and not the luminance, because annotation tools use pure red, which has a low luminance
    return _unit(pixels[..., :3].max(-1), name)


def _mask_shape(shape: Sequence[int], name: str) -> tuple[int, ...]:
    """Returns the shape without the extra dimensions of size 1: (height, width) or (frames, height, width)."""
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"`{name}` has to be of shape (height, width), but is {tuple(shape)}.")
    found = list(shape)
    # remove a channel dimension at the end, or batch dimensions at the start; height and width can also be 1
    if len(found) > 2 and found[-1] == 1:
        del found[-1]
    while len(found) > 2 and found[0] == 1:
        del found[0]
    if len(found) > 3 and found[1] == 1:  # a channel dimension after the frames
        del found[1]
    if len(found) > 3:
        hint = ": pass one color channel of it" if shape[-1] in (3, 4) else ""
        raise ValueError(f"`{name}` has to be of shape (height, width), but is {tuple(shape)}{hint}.")
    return tuple(found)


def _unit(values: np.ndarray, name: str, deep: bool = False) -> np.ndarray:
    """Scales numbers to float32 from 0 to 1. Their range is 0 to 1, 0 to 255, or, for uint16, 0 to 65535. With `deep`,
    any larger range is accepted for all types."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"`{name}` has to hold numbers, but holds {values.dtype}.")
    low, high = float(values.min()), float(values.max())
    # allow a small overshoot of float values, which bicubic resizing causes; comparisons with NaN are false
    slack = _SLACK if values.dtype.kind == "f" else 0
    ranges = [1, 255, *([65535] if deep or values.dtype.str[1:] == "u2" else []), *([high] if deep else [])]
    fitting = [top for top in ranges if high <= top + slack and top < np.inf]
    if not low >= -slack or not fitting:
        raise ValueError(f"`{name}` has to hold values from 0 to 1, or to 255, but holds {low:g} to {high:g}.")
    return (values.astype(np.float32) / np.float32(fitting[0])).clip(0, 1)


def _to_square(
    image: Image.Image, processor: CLIPImageProcessor, resize_mode: str, mean: Any = 0.0, std: Any = 1.0
) -> torch.Tensor:
    """Returns the pixels of an image at the input size of the vision encoder, normalized, of shape
    `(1, channels, height, width)`: resized, and then cropped, or padded with zeros."""
    check_resize_mode(resize_mode)
    # 1. resize the longer or the shorter edge to the side of the square
    edge = max(image.size) if resize_mode == "pad" else min(image.size)
    ratio = processor.size["shortest_edge"] / edge
    width, height = (max(round(side * ratio), 1) for side in image.size)
    array = np.array(image.resize((width, height), Image.Resampling(processor.resample)))
    pixels = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).float() / 255
    pixels = (pixels - mean) / std
    # 2. center crop, or pad
    left, top = (processor.crop_size["width"] - width) // 2, (processor.crop_size["height"] - height) // 2
    right, bottom = processor.crop_size["width"] - width - left, processor.crop_size["height"] - height - top
    return F.pad(pixels, (left, right, top, bottom))[None]


def default_image_processor(image_encoder) -> CLIPImageProcessor:
    """Creates an image processor for a vision encoder, with its input size and the normalization of CLIP."""
    side = image_encoder.config.image_size
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
