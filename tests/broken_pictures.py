"""Pictures that are small files, but take seconds or gigabytes to decode, and pictures of unusual depth."""

import struct
import zlib


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_start(width: int, height: int, depth: int = 8, colour_type: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def png(width: int, height: int, depth: int, colour_type: int, rows: list[bytes], transparent: bytes = b"") -> bytes:
    """Returns a PNG file with the raw bytes of its rows."""
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    extra = png_chunk(b"tRNS", transparent) if transparent else b""
    return png_start(width, height, depth, colour_type) + extra + pixels + png_chunk(b"IEND", b"")


def huge_png(width: int, height: int) -> bytes:
    """Returns a PNG with the header for this size and only some of the pixels."""
    pixels = zlib.compress(b"\0" * 10**6)
    return png_start(width, height) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def rle_bmp(width: int, height: int, codes: bytes) -> bytes:
    """Returns a BMP file with run length encoding and a palette of 256 colors."""
    palette = b"\0\0\0\0" * 256
    start = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(codes), 0, 0, start) + header + palette + codes


def tiff(width: int, height: int, bits: int, data: bytes, **tags: int) -> bytes:
    """Returns a TIFF file with one channel. `tags` replaces values, and adds those of a tile."""
    number_of = {"photometric": 262, "compression": 259, "format": 339, "tile_width": 322, "tile_height": 323}
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 339: 1}
    values |= {number_of[name]: value for name, value in tags.items()}
    values |= {324: -1, 325: len(data)} if "tile_width" in tags else {273: -1, 278: height, 279: len(data)}
    start = 8 + 2 + 12 * len(values) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if value < 0 else value) for tag, value in sorted(values.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + b"\0" * 4 + data


def progressive_jpeg(width: int, height: int, scans: int) -> bytes:
    """Returns a gray JPEG file with this number of scans, without its end."""

    def segment(marker: int, content: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content

    content = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64)
    content += segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
    content += segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
    content += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    content += segment(0xDA, b"\1\1\0\0\0\0") + b"\0" * 8
    return content + (segment(0xDA, b"\1\1\0" + bytes([1, 63, 0])) + b"\0" * 60) * scans


ZEROS = zlib.compress(b"\0" * 10**6)
BOMBS = {
    "huge": huge_png(9_000, 9_000),
    "larger": huge_png(60_000, 60_000),
    "long": huge_png(2**31 - 1, 1),
    "bomb": huge_png(30_000, 3_000),
    "255 rows in one code": rle_bmp(2**22, 1, b"\0\2\0\xff"),
    "one pixel a row": rle_bmp(8000, 8000, b"\1\1\0\0" * 7999),
    "a decoder in Python": b"P5 4000 4000 254\n" + b"\0" * (4000 * 4000 - 1),
    "plain text": b"P3 2000 2000 255\n" + b"0 " * 10**6,
    "a tile of 40,000 x 40,000": tiff(64, 64, 8, ZEROS, compression=8, tile_width=40_000, tile_height=40_000),
    "3,000 scans": progressive_jpeg(8000, 8000, 3000),
}
# the start of a file that continues with zeros up to 600 MB
SPARSE_BOMBS = {
    "a text of 600 MB": png_start(64, 64) + struct.pack(">I", 600 * 10**6) + b"tEXt",
    "a webp of 600 MB": b"RIFF" + struct.pack("<I", 600 * 10**6) + b"WEBPVP8 ",
}
