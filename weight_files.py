"""Reads and checks the headers of safetensors files, and checks the weights of a model before they are loaded. The
files can come from untrusted sources."""

import json
import math
import os
from typing import Any, BinaryIO, NamedTuple


_NUM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Entry(NamedTuple):
    """A tensor in a safetensors file: its dtype as the format writes it ("F32"), its shape, and the position of its
    values in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(file: BinaryIO, most: int) -> tuple[dict[str, str], dict[str, Entry]]:
    r"""
    Read and check the header of a safetensors file. It contains the sizes of all tensors, so they can be checked before
    memory is allocated for the tensors.

    Args:
        file (`BinaryIO`):
            The open file, at its beginning.
        most (`int`):
            The maximum length of the header in bytes.

    Returns:
        `tuple[dict, dict[str, Entry]]`: the metadata, and the tensors by name.

    Raises:
        `ValueError`: if it is not a safetensors file, or is truncated or longer than its tensors.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= most:
        raise ValueError(f"it is not a safetensors file, or its header is longer than {most:,} bytes")
    try:
        described = json.loads(file.read(length))
        metadata = described.pop("__metadata__", {})
        entries = {name: _entry(value, 8 + length) for name, value in described.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are not texts")
    # a header that is nested deeply raises a `RecursionError`
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("its header is broken") from error
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != end:
            raise ValueError("its header is broken")
        end += entry.num_bytes
    size = os.fstat(file.fileno()).st_size
    if size != end:
        raise ValueError(f"it has {size:,} bytes, but its header describes {end:,}")
    return metadata, entries


def _entry(described: dict[str, Any], offset: int) -> Entry:
    dtype, shape, (start, end) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a shape or position is not a whole number")
    if end - start != math.prod(shape) * _NUM_BYTES[dtype]:
        raise ValueError("a tensor has another size than its shape")
    return Entry(dtype, shape, offset + start, end - start)
