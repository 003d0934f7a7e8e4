import numpy as np
import pytest
import torch
from conftest import make_image_processor, make_picture
from diffusers_ssr.image_processing_ssr import preprocess, to_pil
from PIL import Image


ARRAY = np.asarray(make_picture())


@pytest.mark.parametrize(
    "image",
    [
        ARRAY,
        ARRAY.astype(np.float32) / 255,
        ARRAY.astype(np.float64) / 255,
        torch.from_numpy(ARRAY.copy()).permute(2, 0, 1) / 255,
        torch.from_numpy(ARRAY.copy()).permute(2, 0, 1)[None] / 255,
        make_picture(),
    ],
    ids=["uint8", "float32", "float64", "tensor", "batch of one", "PIL"],
)
def test_all_kinds_of_pictures_are_one(image):
    assert np.array_equal(np.asarray(to_pil(image)), ARRAY)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    assert to_pil(make_picture().convert(mode)).mode == "RGB"


def test_a_rotated_photo_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture().save(tmp_path / "photo.jpg", exif=exif)
    assert to_pil(Image.open(tmp_path / "photo.jpg")).size == (32, 40)


@pytest.mark.parametrize(
    "image,message",
    [
        (np.zeros((4, 4, 4)), r"\(4, 4, 4\)"),
        (np.full((4, 4, 3), -0.1), "-0.1"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\)"),
        (torch.full((3, 4, 4), 2.0), "2.0"),
        (b"picture", "bytes"),
    ],
)
def test_what_is_no_picture_is_named(image, message):
    with pytest.raises(ValueError, match=f"`photo`.*{message}"):
        to_pil(image, "photo")


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 40), (40, 100), (1, 1)])
def test_pixels_have_the_encoders_size(size):
    assert preprocess(make_picture(size=size), make_image_processor()).shape == (1, 3, 32, 32)


def test_pixels_are_clips():
    """Against transformers' own processor on PIL, on a picture that needs scaling, cropping and normalising."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = make_image_processor()
    picture = make_picture(size=(90, 60))
    expected = CLIPImageProcessorPil(size=processor.size, crop_size=processor.crop_size)(
        picture, return_tensors="pt"
    ).pixel_values
    torch.testing.assert_close(preprocess(picture, processor), expected, atol=1e-5, rtol=0)
