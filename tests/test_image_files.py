"""image_files.py: which files are opened, and which errors the others raise."""

import io
import os
import struct
import zlib

import image_files
import pytest
from conftest import make_picture
from image_files import FORMATS, SUFFIXES, open_image


def encoded(kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    make_picture().save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff", "gif", "tga", "ppm", "jpeg2000", "avif"])
def test_images_are_decoded(kind, tmp_path):
    if kind.upper() not in FORMATS:
        pytest.skip(f"this Pillow does not read {kind}")
    content = encoded(kind)
    (tmp_path / "image").write_bytes(content)
    for file in (content, tmp_path / "image", str(tmp_path / "image")):
        image = open_image(file)
        # the pixels are decoded, so the file can be removed
        assert image.size == make_picture().size and not getattr(image, "fp", None)


def test_the_suffixes_are_those_of_all_formats():
    assert {".jpg", ".jfif", ".png", ".webp", ".tif", ".bmp", ".tga"} <= SUFFIXES
    assert not SUFFIXES & {".eps", ".ps", ".txt", ".pdf", ".h5"}


def huge_png(width: int, height: int) -> bytes:
    """Returns a PNG with the header for this size and only some of the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")


BROKEN = {
    "no image": (b"this is no image", "its format is unknown"),
    "empty": (b"", "its format is unknown"),
    "truncated": (encoded()[:500], "truncated"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "its format is unknown"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
    "many pixels": (huge_png(9000, 9000), "9000 x 9000 pixels"),
    "far too many pixels": (huge_png(60_000, 60_000), "cannot be decoded"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BROKEN)
def test_other_files_raise_an_error_with_name_and_path(kind, tmp_path):
    content, message = BROKEN[kind]
    with pytest.raises(ValueError, match=f"^`photo` .*{message}"):
        open_image(content, "photo")
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)^`photo` .*{message}.*broken.png"):
        open_image(tmp_path / "broken.png", "photo")


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "zero byte"])
def test_paths_that_are_no_files_raise_an_error(kind, tmp_path):
    file = tmp_path / ("a\0.png" if kind == "zero byte" else "a.png")
    if kind == "folder":
        file.mkdir()
    if kind == "pipe":
        os.mkfifo(file)
    with pytest.raises(ValueError, match="^`photo` cannot be read: .*png"):
        open_image(file, "photo")


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(encoded())
    for file in (encoded(), tmp_path / "a.png"):
        with pytest.raises(ValueError, match="more than the 100 bytes"):
            open_image(file)
