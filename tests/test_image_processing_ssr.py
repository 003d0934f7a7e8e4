import numpy as np
import pytest
import torch
from conftest import make_image_processor, make_picture
from diffusers_ssr.image_processing_ssr import preprocess, preprocess_mask, to_mask, to_pil, unfit
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
        (torch.full((3, 16, 16), torch.nan), "nan"),
        (torch.full((3, 4, 4), 2.0), "2.0"),
        (b"picture", "bytes"),
    ],
)
def test_what_is_no_picture_is_named(image, message):
    with pytest.raises(ValueError, match=f"`photo`.*{message}"):
        to_pil(image, "photo")


@pytest.mark.parametrize("resize_mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 40), (41, 101), (8, 128)])
def test_pixels_have_the_encoders_size(size, resize_mode):
    assert preprocess(make_picture(size=size), make_image_processor(), resize_mode).shape == (1, 3, 32, 32)


def test_square_pictures_are_the_same_in_both_modes():
    pixels = [preprocess(make_picture(size=(50, 50)), make_image_processor(), mode) for mode in ("pad", "crop")]
    assert torch.equal(*pixels)


def test_padding_keeps_what_cropping_loses():
    """A red edge of a wide picture."""
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("red", (0, 0, 16, 32))
    padded, cropped = (preprocess(picture, make_image_processor(), mode) for mode in ("pad", "crop"))
    assert padded[0, 0].max() > 1.5 and cropped[0, 0].max() < 0
    assert not padded[0, :, 0].any() and not padded[0, :, -1].any()


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="`resize_mode`.*'squash'"):
        preprocess(make_picture(), make_image_processor(), "squash")


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (7, 50)])
def test_pictures_that_hold_no_subject_are_refused(size):
    with pytest.raises(ValueError, match=f"`subject_image` is {size[0]} x {size[1]} pixels"):
        to_pil(Image.new("RGB", size))


def test_transparent_parts_become_white():
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 8, 16))
    pixels = np.asarray(to_pil(picture))
    assert (pixels[:, :8] == (255, 0, 0)).all() and (pixels[:, 8:] == 255).all()


def test_sixteen_bits_are_scaled():
    values = np.full((16, 16), 0x8080, np.uint16)
    assert (np.asarray(to_pil(Image.fromarray(values))) == 0x80).all()


def test_float_pictures_are_refused():
    with pytest.raises(ValueError, match="mode F"):
        to_pil(Image.new("F", (16, 16)))


MASK = np.zeros((32, 40), np.uint8)
MASK[:, :10] = 255


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK / 255,
        MASK > 0,
        torch.from_numpy(MASK / 255),
        torch.from_numpy(MASK > 0)[None],
        Image.fromarray(MASK),
    ],
    ids=["uint8", "float", "bool", "tensor", "bool tensor", "PIL"],
)
def test_all_kinds_of_masks_are_one(mask):
    assert np.array_equal(np.asarray(to_mask(mask, (40, 32))), MASK)


@pytest.mark.parametrize(
    "mask,message",
    [
        (MASK[:-1], r"as large as its picture, .*\(32, 40\), but is \(31, 40\)"),
        (MASK.T, r"\(40, 32\)"),
        (np.zeros_like(MASK), "is empty"),
        (np.ones_like(MASK), "marks the whole picture"),
        (np.full(MASK.shape, np.nan), "nan"),
        (MASK.astype(int) * 2, "510"),
        ("mask.png", "str"),
    ],
)
def test_what_is_no_mask_is_named(mask, message):
    with pytest.raises(ValueError, match=f"`subject_mask`.*{message}"):
        to_mask(mask, (40, 32))


@pytest.mark.parametrize("size", [(40, 32), (90, 30), (30, 90)])
@pytest.mark.parametrize("resize_mode", ["pad", "crop"])
def test_a_mask_marks_the_pixels_of_its_subject(size, resize_mode):
    """A white thing on black and its mask go the same way; a map over the square comes back to where the thing is."""
    picture, mask = Image.new("RGB", size, "black"), Image.new("L", size)
    box = (size[0] // 3, size[1] // 3, size[0] // 2, size[1] // 2)
    picture.paste("white", box)
    mask.paste(255, box)
    processor = make_image_processor()
    pixels, marked = preprocess(picture, processor, resize_mode), preprocess_mask(mask, processor, resize_mode)
    assert pixels[0, 0][marked[0, 0] > 0.8].min() > 0.5 and pixels[0, 0][marked[0, 0] < 0.05].max() < 0.1
    back = unfit(marked[0], size, resize_mode)[0]
    assert back.shape == size[::-1]
    inside = torch.zeros(size[::-1], dtype=torch.bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert back[inside].mean() > 0.6 and back[~inside].mean() < 0.1


def test_pixels_are_clips():
    """Against transformers' own processor on PIL, on a picture that needs scaling, cropping and normalising."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = make_image_processor()
    picture = make_picture(size=(90, 60))
    expected = CLIPImageProcessorPil(size=processor.size, crop_size=processor.crop_size)(
        picture, return_tensors="pt"
    ).pixel_values
    torch.testing.assert_close(preprocess(picture, processor, "crop"), expected, atol=1e-5, rtol=0)
