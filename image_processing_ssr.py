"""From a picture as people have it to the pixels that the vision encoder sees."""

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor


def to_pil(image, name: str = "subject_image") -> Image.Image:
    """`image` (PIL, array or tensor) as an upright RGB picture; a `ValueError` naming the argument `name` if it is none.

    Arrays are `(height, width, 3)` with integers from 0 to 255 or floats from 0 to 1; tensors `(3, height, width)`, or
    with a batch dimension of 1, with floats from 0 to 1.
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
    return ImageOps.exif_transpose(image).convert("RGB")


def preprocess(image: Image.Image, processor: CLIPImageProcessor) -> torch.Tensor:
    """Scale the shorter edge, crop the centre and normalise, with `processor`'s sizes, as `(1, 3, height, width)`.

    Done with PIL whatever image backend transformers has picked, so that pixels do not depend on what is installed.
    """
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    ratio = processor.size["shortest_edge"] / min(image.size)
    size = tuple(max(round(edge * ratio), 1) for edge in image.size)
    image = image.resize(size, Image.Resampling(processor.resample))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((pixels - mean) / std)[None]
