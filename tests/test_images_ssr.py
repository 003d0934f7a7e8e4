import io
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_image_processor, make_picture
from diffusers_ssr.images_ssr import (
    mask_values,
    postprocess_map,
    preprocess,
    preprocess_mask,
    to_mask,
    to_pil,
)
from PIL import Image


ARRAY = np.asarray(make_picture())


@pytest.mark.parametrize(
    "image",
    [
        ARRAY,
        ARRAY.astype(np.float32) / 255,
        ARRAY.astype(np.float64) / 255,
        ARRAY[None] / 255,
        ARRAY / 254.95,
        torch.from_numpy(ARRAY.copy()).permute(2, 0, 1) / 255,
        torch.from_numpy(ARRAY.copy()).permute(2, 0, 1)[None] / 255,
        make_picture(),
    ],
    ids=["uint8", "float32", "float64", "array of one", "a little more than 1", "tensor", "batch of one", "PIL"],
)
def test_to_pil_accepts_all_types_of_images(image):
    assert np.array_equal(np.asarray(to_pil(image)), ARRAY)


COLOURS = Image.new("RGB", (48, 16), "white")
COLOURS.paste((204, 51, 51), (0, 0, 16, 16))
COLOURS.paste("black", (16, 0, 32, 16))
GREY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode.startswith("I;16"):
        values = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        order = ">" if mode.endswith("B") else "<" if mode != "I;16N" else "="
        return Image.frombytes(mode, picture.size, values.astype(f"{order}u2").tobytes())
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("RGBA", "PA")}
    for step in steps.get(mode, (mode,)):
        picture = picture.convert(step)
    return picture


@pytest.mark.parametrize("mode", GREY_MODES + COLOUR_MODES)
def test_to_pil_converts_every_mode_to_rgb(mode):
    expected = COLOURS if mode in COLOUR_MODES else COLOURS.convert("1" if mode == "1" else "L").convert("RGB")
    given = in_mode(COLOURS, mode)
    assert given.mode == mode
    found = to_pil(given)
    assert found.mode == "RGB" and given.mode == mode
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 3


def half_and_half(left: bytes, right: bytes) -> list[bytes]:
    return [left + right] * 16


# images of 16 x 16 whose left half has the transparent color, and the value of the right half from 0 to 1


def test_exif_orientation_is_applied(tmp_path):
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
def test_invalid_images_raise_an_error_that_names_the_argument(image, message):
    with pytest.raises(ValueError, match=f"`photo`.*{message}"):
        to_pil(image, "photo")


@pytest.mark.parametrize("resize_mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 40), (41, 101), (8, 128)])
def test_preprocessed_pixels_have_the_size_of_the_encoder(size, resize_mode):
    assert preprocess(make_picture(size=size), make_image_processor(), resize_mode).shape == (1, 3, 32, 32)


def test_square_images_are_the_same_in_both_modes():
    pixels = [preprocess(make_picture(size=(50, 50)), make_image_processor(), mode) for mode in ("pad", "crop")]
    assert torch.equal(*pixels)


def test_pad_keeps_the_edges_that_crop_removes():
    """A wide image with a red left edge."""
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("red", (0, 0, 16, 32))
    padded, cropped = (preprocess(picture, make_image_processor(), mode) for mode in ("pad", "crop"))
    assert padded[0, 0].max() > 1.5 and cropped[0, 0].max() < 0
    assert not padded[0, :, 0].any() and not padded[0, :, -1].any()


def test_unknown_resize_mode_raises_an_error():
    with pytest.raises(ValueError, match="`resize_mode`.*'squash'"):
        preprocess(make_picture(), make_image_processor(), "squash")


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (7, 50)])
def test_too_small_or_too_narrow_images_raise_an_error(size):
    with pytest.raises(ValueError, match=f"`subject_image` is {size[0]} x {size[1]} pixels"):
        to_pil(Image.new("RGB", size))


# tag, type (of the TIFF format), count and value. Pillow can read them, but cannot write them again.
ODD_TAGS = {
    "a negative resolution": (0x11A, 10, 1, struct.pack("<ii", -1, 1)),
    "a resolution of text": (0x11A, 2, 4, b"abc\0"),
    "a width below 0": (0x100, 9, 1, struct.pack("<i", -5)),
    "bits of a float": (0x102, 12, 1, struct.pack("<d", 1.5)),
    "a unit of a float": (0x128, 11, 1, struct.pack("<f", 1.5)),
}


def test_an_upright_image_is_not_rotated_again():
    exif = Image.Exif()
    exif[0x0112] = 6
    once = to_pil(opened(encoded(make_picture(size=(64, 32)), "jpeg", exif=exif)))
    assert once.size == to_pil(once).size == (32, 64)


def test_transparent_pixels_become_white():
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 8, 16))
    pixels = np.asarray(to_pil(picture))
    assert (pixels[:, :8] == (255, 0, 0)).all() and (pixels[:, 8:] == 255).all()


@pytest.mark.parametrize(
    "values,expected",
    [
        (np.full((16, 16), 0x8080, np.uint16), 0x80),
        (np.full((16, 16), 0x80, np.uint16), 0),
        (np.diag([257] * 15 + [514]).astype(np.uint16), np.diag([1] * 15 + [2])),
        (np.full((16, 16), 0xFFFF, np.int32), 0xFF),
        (np.diag([70_000] * 16).astype(np.int32), np.diag([255] * 16)),
        (np.full((16, 16), 0.5, np.float32), 128),
        (np.full((16, 16), 200.0, np.float32), 200),
    ],
    ids=[
        "16 bits",
        "dark, 16 bits",
        "dark diagonal, 16 bits",
        "mode I",
        "above 16 bits",
        "floats to 1",
        "floats to 255",
    ],
)
def test_images_with_more_than_8_bits_are_scaled_by_their_range(values, expected):
    assert (np.asarray(to_pil(Image.fromarray(values)))[..., 0] == expected).all()


@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_invalid_pixel_values_raise_an_error(value):
    with pytest.raises(ValueError, match=f"`photo`.*{value}"):
        to_pil(Image.fromarray(np.full((16, 16), value, np.float32)), "photo")


def test_integer_arrays_and_tensors():
    deep = ARRAY.astype(np.uint16) * 257
    for image in (deep, deep.astype(">u2"), torch.from_numpy(ARRAY.copy()).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(to_pil(image)), ARRAY)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def encoded(picture: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.9])
def test_truncated_file_raises_an_error(tmp_path, kind, part):
    content = encoded(make_picture(size=(64, 64)), kind)
    content = content[: int(len(content) * part)]
    (tmp_path / "photo").write_bytes(content)
    try:
        lazy = Image.open(tmp_path / "photo")
    except OSError:
        return
    with lazy, pytest.raises(ValueError, match="`photo` cannot be decoded"):
        to_pil(lazy, "photo")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff"])
def test_threads_can_share_an_image_that_is_not_decoded_yet(kind, tmp_path):
    file = tmp_path / "photo"
    file.write_bytes(encoded(make_picture(size=(300, 200)), kind))
    expected = np.asarray(to_pil(Image.open(file)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                shared = Image.open(file)
                for found in pool.map(to_pil, [shared] * 8):
                    assert np.array_equal(np.asarray(found), expected)
    finally:
        sys.setswitchinterval(interval)


def test_to_pil_returns_a_copy():
    given = make_picture()
    found = to_pil(given)
    found.paste("red", (0, 0, *found.size))
    assert np.array_equal(np.asarray(given), ARRAY)


MASK = np.zeros((32, 40), np.uint8)
MASK[:, :10] = 255


def painted(colour, mode: str = "RGBA", opacity: int = 255) -> Image.Image:
    """Returns the mask, painted on a transparent layer."""
    layer = Image.new("RGBA", (40, 32), (0, 0, 0, 0))
    layer.paste(Image.new("RGBA", (10, 32), (*colour, opacity)), (0, 0))
    converted = layer.convert(mode)
    if mode == "PA":
        converted.putalpha(layer.getchannel("A"))  # `convert` of old versions of Pillow drops it
    return converted


def palette_mask(colour) -> Image.Image:
    """Returns the mask as palette indices, as in segmentation data sets."""
    mask = Image.fromarray(MASK // 255, "P")
    mask.putpalette([0, 0, 0, *colour])
    return mask


def as_file(mask: Image.Image, kind: str = "png") -> Image.Image:
    return opened(encoded(mask, kind))


WHITE_ON_BLACK = Image.fromarray(MASK)
MASKS = {
    "uint8": MASK,
    "uint8 of 0 and 1": MASK // 255,
    "int64": MASK.astype(int),
    "uint16": MASK.astype(np.uint16) * 257,
    "uint16, other byte order": (MASK.astype(np.uint16) * 257).astype(">u2"),
    "uint16 to 255": MASK.astype(np.uint16),
    "float": MASK / 255,
    "float to 255": MASK.astype(np.float32),
    "float16": (MASK / 255).astype(np.float16),
    "float, a little more than 1": MASK / 254.9,
    "bool": MASK > 0,
    "(1, H, W)": MASK[None],
    "(H, W, 1)": MASK[..., None],
    "(1, 1, H, W)": MASK[None, None],
    "(1, H, W, 1)": MASK[None, ..., None],
    "(H, W, 3)": np.repeat(MASK[..., None], 3, -1),
    "(H, W, 4)": np.asarray(painted((0, 0, 0))),
    "tensor": torch.from_numpy(MASK / 255),
    "bfloat16": torch.from_numpy(MASK / 255).bfloat16(),
    "bool tensor": torch.from_numpy(MASK > 0)[None],
    "uint8 tensor": torch.from_numpy(MASK)[None, None],
    "tensor with gradient": torch.from_numpy(MASK / 255).requires_grad_(),
    **{f"mode {mode}": in_mode(WHITE_ON_BLACK, mode) for mode in GREY_MODES + COLOUR_MODES},
    "mode L of 0 and 1": Image.fromarray(MASK // 255),
    "mode I": Image.fromarray(MASK.astype(np.int32)),
    "I;16 of 0 and 1": Image.fromarray((MASK // 255).astype(np.uint16)),
    "I;16 from a file": as_file(Image.fromarray(MASK.astype(np.uint16) * 257)),
    "painted in black": painted((0, 0, 0)),
    "painted in red": painted((255, 0, 0)),
    "painted in white": painted((255, 255, 255)),
    "painted, half transparent": painted((255, 0, 0), opacity=100),
    "painted, LA": painted((0, 0, 0), "LA"),
    "painted, RGBa": painted((0, 0, 0), "RGBa"),
    "painted, PA": painted((0, 0, 0), "PA"),
    "painted, a file": as_file(painted((0, 0, 0))),
    "painted, a GIF": as_file(painted((0, 0, 0)), "gif"),
    "painted, WebP": opened(encoded(painted((0, 0, 0)), "webp", lossless=True)),
    "red on black": palette_mask((128, 0, 0)).convert("RGB"),
    "palette, red on black": palette_mask((128, 0, 0)),
    "palette, white on black, a file": as_file(palette_mask((255, 255, 255))),
    "palette with a transparent index": opened(encoded(palette_mask((0, 0, 0)), transparency=0)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_to_mask_accepts_all_types_of_masks(mask):
    assert np.array_equal(np.asarray(to_mask(mask, (40, 32))), MASK)
    assert np.abs(mask_values(mask) - MASK / 255).max() < 0.5


def test_soft_masks_keep_their_values():
    """A region can have soft edges."""
    soft = np.linspace(0, 1, 256).reshape(16, 16)
    for mask in (soft, Image.fromarray((soft * 255).round().astype(np.uint8)), torch.from_numpy(soft)[None]):
        assert np.abs(mask_values(mask) - soft).max() < 0.003


def test_mask_values_of_several_frames():
    frames = np.stack([MASK, MASK.T[:32].repeat(2, 1)[:, :40], np.zeros_like(MASK)])
    for mask in (frames, frames[:, None], frames[..., None], frames[None], torch.from_numpy(frames)):
        assert np.array_equal(mask_values(mask) * 255, frames)
    assert mask_values(np.ones((9, 1, 2))).shape == (9, 1, 2) and mask_values(np.ones((1, 1, 1, 2, 3))).shape == (2, 3)
    with pytest.raises(ValueError, match="as large as its image"):
        to_mask(frames, (40, 32))


@pytest.mark.parametrize(
    "mask,message",
    [
        (MASK[:-1], r"as large as its image, .*\(32, 40\), but is \(31, 40\)"),
        (MASK.T, r"\(40, 32\)"),
        (np.repeat(MASK[None], 3, 0), r"\(3, 32, 40\): pass one mask or one color channel"),
        (np.zeros_like(MASK), "is empty: it has to mark the subject.$"),
        (MASK // 255 + MASK.astype(bool)[::-1], "is empty.*from 0 to 2.*pass `mask == number`"),
        (torch.from_numpy(MASK) // 100, "is empty.*from 0 to 2.*pass `mask == number`"),
        (np.ones_like(MASK), "marks the whole image"),
        (np.full(MASK.shape, np.nan), "nan"),
        (MASK.astype(int) * 2, "510"),
        (np.zeros((32, 40, 4)), "is empty"),
        (Image.new("RGBA", (40, 32), (255, 255, 255, 0)), "is empty"),
        (Image.new("RGBA", (40, 32), (0, 0, 0, 255)), "is empty"),
        (Image.new("RGBA", (40, 32), (255, 255, 255, 255)), "marks the whole image"),
        (MASK.astype(np.int16) - 1, "-1"),
        (MASK.astype(complex), "complex128"),
        (MASK.astype(str), "<U"),
        (MASK.astype(object), "object"),
        (MASK[:0], r"\(0, 40\)"),
        (MASK[0], r"\(40,\)"),
        (np.array(1.0), r"\(\)"),
        (np.stack([MASK[None]] * 2)[None, None], r"\(1, 1, 2, 1, 32, 40\)|as large as"),
        (torch.zeros(32, 40, dtype=torch.complex64), "complex64"),
        (torch.zeros(32, 40, device="meta"), "meta"),
        (torch.eye(32).to_sparse(), "plain tensor"),
        ("mask.png", "str"),
    ],
)
def test_invalid_masks_raise_an_error_that_names_the_argument(mask, message):
    with pytest.raises(ValueError, match=f"`subject_mask`.*{message}"):
        to_mask(mask, (40, 32))


@pytest.mark.parametrize("size", [(40, 32), (90, 30), (30, 90)])
@pytest.mark.parametrize("resize_mode", ["pad", "crop"])
def test_mask_and_image_are_preprocessed_in_the_same_way(size, resize_mode):
    """A white thing and its mask are preprocessed in the same way, and `postprocess_map` restores the position of the
    thing."""
    picture, mask = Image.new("RGB", size, "black"), Image.new("L", size)
    box = (size[0] // 3, size[1] // 3, size[0] // 2, size[1] // 2)
    picture.paste("white", box)
    mask.paste(255, box)
    processor = make_image_processor()
    pixels, marked = preprocess(picture, processor, resize_mode), preprocess_mask(mask, processor, resize_mode)
    assert pixels[0, 0][marked[0, 0] > 0.8].min() > 0.5 and pixels[0, 0][marked[0, 0] < 0.05].max() < 0.1
    back = postprocess_map(marked[0], size, resize_mode)[0]
    assert back.shape == size[::-1]
    inside = torch.zeros(size[::-1], dtype=torch.bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert back[inside].mean() > 0.6 and back[~inside].mean() < 0.1


@pytest.mark.parametrize(
    "size,box,resize_mode,is_empty",
    [
        ((96, 32), (0, 0, 32, 32), "crop", True),
        ((96, 32), (64, 0, 96, 32), "crop", True),
        ((32, 96), (0, 70, 32, 90), "crop", True),
        ((96, 32), (0, 0, 40, 32), "crop", False),
        ((96, 32), (0, 0, 32, 32), "pad", False),
        ((2048, 2048), (9, 9, 10, 10), "pad", True),
        ((2048, 2048), (9, 9, 10, 10), "crop", True),
        ((2048, 2048), (0, 0, 64, 64), "pad", False),
    ],
)
def test_a_mask_of_which_nothing_remains_is_rejected(size, box, resize_mode, is_empty):
    mask = Image.new("L", size)
    mask.paste(255, box)
    if is_empty:
        with pytest.raises(ValueError, match=f"`mask` is empty .*'{resize_mode}', nothing .* in 32 x 32 pixels"):
            preprocess_mask(mask, make_image_processor(), resize_mode, "mask")
    else:
        assert preprocess_mask(mask, make_image_processor(), resize_mode).max() > 0.5


def test_preprocess_matches_the_clip_processor():
    """Compares with the PIL processor of transformers, on an image that needs resizing, cropping and normalising."""
    module = pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip", reason="transformers 4 has no processor with this name"
    )
    processor = make_image_processor()
    picture = make_picture(size=(90, 60))
    expected = module.CLIPImageProcessorPil(size=processor.size, crop_size=processor.crop_size)(
        picture, return_tensors="pt"
    ).pixel_values
    torch.testing.assert_close(preprocess(picture, processor, "crop"), expected, atol=1e-5, rtol=0)


LABELS = np.zeros((32, 40), np.uint8)
LABELS[:10], LABELS[10:20] = 1, 2


@pytest.mark.parametrize("mode", ["array", "L", "I", "P"])
def test_label_images_are_explained(mode):
    """The numbers of a palette image are labels; its colors are no mask."""
    labels = LABELS if mode == "array" else Image.fromarray(LABELS, "P" if mode == "P" else None)
    if mode == "P":
        labels.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    elif mode == "I":
        labels = labels.convert("I")
    with pytest.raises(ValueError, match=r"`subject_mask`.*pass `(np.asarray\()?mask\)? == number`"):
        to_mask(labels, (40, 32))


@pytest.mark.parametrize("image", ["photo.jpg", "https://host/photo.jpg"])
def test_a_path_is_explained(image):
    with pytest.raises(ValueError, match="`subject_image` has to be a PIL image.*load_image"):
        to_pil(image)
