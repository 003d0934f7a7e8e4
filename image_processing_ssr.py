"""From pictures and masks as people have them to the pixels that the vision encoder sees, and back to the picture."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor


RESIZE_MODES = ("pad", "crop")
SMALLEST_SIDE = 8
LARGEST_RATIO = 16


def to_pil(image, name: str = "subject_image") -> Image.Image:
    """`image` (PIL, array or tensor) as an upright RGB picture.

    Arrays are `(height, width, 3)` with integers from 0 to 255 or floats from 0 to 1; tensors `(3, height, width)`, or
    with a batch dimension of 1, with floats from 0 to 1. Transparent parts become white, 16-bit pictures are scaled to 8
    bits, and EXIF rotation is applied.

    Raises a `ValueError` that names the argument `name` if it is no picture, or too small or narrow to hold a subject.
    """
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu().float()
        tensor = tensor[0] if tensor.ndim == 4 and tensor.shape[0] == 1 else tensor
        if tensor.ndim != 3 or tensor.shape[0] != 3:
            raise ValueError(
                f"`{name}` as a tensor has to be of shape (3, height, width), but is {tuple(image.shape)}."
            )
        image = tensor.permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"`{name}` as an array has to be of shape (height, width, 3), but is {image.shape}.")
        if image.dtype != np.uint8:
            if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
                raise ValueError(
                    f"`{name}` has to hold uint8, or floats from 0 to 1, but holds {image.dtype} from {image.min()} to"
                    f" {image.max()}."
                )
            image = (image * 255).round().astype(np.uint8)
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"`{name}` has to be a PIL image, a numpy array or a torch tensor, but is {type(image).__name__}."
        )
    image = ImageOps.exif_transpose(image)
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(
            f"`{name}` is {width} x {height} pixels: it has to be at least {SMALLEST_SIDE} on each side, and at most"
            f" {LARGEST_RATIO} times as long as wide."
        )
    return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"`{name}` has to be a picture of 8 or 16 bits a channel, but is of floats (mode F).")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values / 257 if values.max() > 255 else values).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def to_mask(mask, size: tuple[int, int], name: str = "subject_mask") -> Image.Image:
    """`mask` (PIL, array or tensor, `(height, width)`) as an 8-bit picture, white where the subject is.

    Raises a `ValueError` that names the argument `name` if it is no mask, has not its picture's `size` (width, height), or
    marks nothing or everything.
    """
    if isinstance(mask, Image.Image):
        mask = np.asarray(ImageOps.exif_transpose(mask).convert("L"))
    elif isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu().float().numpy()
    if not isinstance(mask, np.ndarray):
        raise ValueError(
            f"`{name}` has to be a PIL image, a numpy array or a torch tensor, but is {type(mask).__name__}."
        )
    mask = mask.reshape(mask.shape[-2:]) if mask.ndim > 2 and mask.size == np.prod(mask.shape[-2:]) else mask
    if mask.shape != size[::-1]:
        raise ValueError(
            f"`{name}` has to be as large as its picture, (height, width) = {size[::-1]}, but is {mask.shape}."
        )
    if not np.isfinite(mask).all() or mask.min() < 0 or mask.max() > 255:
        raise ValueError(
            f"`{name}` has to hold values from 0 to 1, or to 255, but holds {mask.min()} to {mask.max()}."
        )
    marked = mask > (127 if mask.max() > 1 else 0.5)
    if not marked.any():
        raise ValueError(f"`{name}` is empty: it has to mark the subject.")
    if marked.all():
        raise ValueError(f"`{name}` marks the whole picture: leave it out to mean all of it.")
    return Image.fromarray(marked.astype(np.uint8) * 255)


def preprocess(image: Image.Image, processor: CLIPImageProcessor, resize_mode: str = "pad") -> torch.Tensor:
    """Fit a picture into the vision encoder's square and normalise it, as `(1, 3, height, width)`.

    "pad" keeps the whole picture: its longer edge is scaled to the square and the rest filled with the mean colour. "crop"
    scales the shorter edge and cuts the centre out, as CLIP and the released code do; what lies at the ends of a long
    picture is lost. Square pictures are the same in both.

    Done with PIL whatever image backend transformers has picked, so that pixels do not depend on what is installed.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return _fit((_resized(image, processor, resize_mode) - mean) / std, processor)


def preprocess_mask(mask: Image.Image, processor: CLIPImageProcessor, resize_mode: str = "pad") -> torch.Tensor:
    """The same for a mask, as `(1, 1, height, width)` from 0 to 1, so that it marks the same patches."""
    return _fit(_resized(mask, processor, resize_mode), processor)


def unfit(heat: torch.Tensor, size: tuple[int, int], resize_mode: str) -> torch.Tensor:
    """A map over the vision encoder's square, `(count, side, side)`, as one over the picture of `size` (width, height),
    `(count, height, width)`; what the encoder did not see is 0."""
    width, height = size
    edge = max(size) if resize_mode == "pad" else min(size)
    heat = F.interpolate(heat[None], (edge, edge), mode="bilinear")[0]
    # the square's place in the picture: outside it when padded, inside when cropped
    left, top = (width - edge) // 2, (height - edge) // 2
    return F.pad(heat, (left, width - edge - left, top, height - edge - top))


def check_resize_mode(resize_mode) -> None:
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"`resize_mode` has to be one of {RESIZE_MODES}, but is {resize_mode!r}.")


def _resized(image: Image.Image, processor: CLIPImageProcessor, resize_mode: str) -> torch.Tensor:
    """The picture scaled, uncropped, `(channels, height, width)` from 0 to 1."""
    check_resize_mode(resize_mode)
    edge = max(image.size) if resize_mode == "pad" else min(image.size)
    ratio = processor.size["shortest_edge"] / edge
    size = tuple(max(round(side * ratio), 1) for side in image.size)
    pixels = np.array(image.resize(size, Image.Resampling(processor.resample)))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(pixels).float() / 255


def _fit(pixels: torch.Tensor, processor: CLIPImageProcessor) -> torch.Tensor:
    """Cut the centre out, or fill up with zeros, to the encoder's size."""
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    left, top = (width - pixels.shape[2]) // 2, (height - pixels.shape[1]) // 2
    return F.pad(pixels, (left, width - pixels.shape[2] - left, top, height - pixels.shape[1] - top))[None]


def default_image_processor(image_encoder) -> CLIPImageProcessor:
    """The image processor of a vision encoder that has none: its size, and CLIP's normalisation."""
    side = image_encoder.config.image_size
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
