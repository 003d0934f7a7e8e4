"""The file format of `SubjectEmbeds.save`: reads such files and checks them, because they can come from untrusted
sources."""

import json
import math
import os
from collections.abc import Callable, Iterable
from io import BufferedReader
from typing import Any

import torch

from . import file_utils, weight_files


FORMAT = "ssr-subject-1"
TENSORS = ("embeds", "negative_embeds", "region", "counts", "negative_counts")

# Upper limits, far above real subjects: a subject of Stable Diffusion 1.5 has 462 tokens of width 768. The header
# contains all sizes, so they are checked before memory is allocated for the tensors.
MAX_HEADER_BYTES = 2**20
MAX_BYTES = 2**28
MAX_SUBJECTS = 64
MAX_TOKENS = 2**14
# The maximum number of values of a region, over all frames: 32 frames of 1024 x 1024.
MAX_REGION_VALUES = 2**25
# The maximum height and width of a region, and the maximum number of its frames. No picture that is accepted as a
# reference is longer: it has at most 2**26 pixels, and is at most 16 times as long as wide.
MAX_REGION_SIDE = 2**15
# The largest number in the tokens of a subject. Tokens come out of a layer norm: with a width of 768, they are at most
# 27.7 times as large as its weights, which are near 1. With much larger values, the keys and values could exceed the
# largest number in half precision, and the picture would be NaN.
MAX_TOKEN_VALUE = 1000.0

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# of a fingerprint, which is float32 and only compared
_LARGEST = 65504.0

Layout = dict[str, tuple[str, tuple[int, ...]]]


def read_subject_file(
    path: str | os.PathLike, check_scale: Callable[[str, Any], float]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    r"""
    Read and check a file of subjects from an untrusted source.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        check_scale (`Callable[[str, Any], float]`):
            Takes a name and a scale. It returns the scale as a float, or raises a `ValueError` that contains the name.

    Returns:
        `tuple[list[dict], dict[str, torch.Tensor]]`: the query and scale of each subject, and the tensors. The tensors
        are named `<subject>.<name>`, where `<name>` is one of `TENSORS`, and optionally `fingerprint`.

    Raises:
        `FileNotFoundError`: if the file does not exist.
        `ValueError`: if it is not a file of subjects, is truncated, or has content that is not valid for subjects.
    """
    file_utils.check_regular_file(path, "path")
    try:
        # The header and the tensors are read from the same open file. `safe_open` would open the file again for the
        # tensors, and another thread or process could replace the file before that.
        with open(path, "rb") as file:
            metadata, entries = weight_files.read_header(file, MAX_HEADER_BYTES)
            subjects = _described(metadata, check_scale)
            check_layout({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, len(subjects))
            # The tensors are read twice. In the first pass, there is only one of them in the memory, so that a broken
            # file does not take the memory of all of its tensors.
            for name, entry in entries.items():
                _read_tensor(file, name, entry)
            tensors = {name: _read_tensor(file, name, entry) for name, entry in entries.items()}
    except Exception as error:  # a parser that meets arbitrary bytes may raise anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"`path`: {os.fspath(path)} cannot be used as a file of subjects: {reason}.") from error
    return subjects, tensors


def _read_tensor(file: BufferedReader, name: str, entry: weight_files.Entry) -> torch.Tensor:
    """Reads a tensor and checks its values."""
    tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="cpu")
    file.seek(entry.start)
    # The file can become shorter while it is read. numpy has no bfloat16, so it gets the bytes of the tensor.
    if file.readinto(tensor.flatten().view(torch.uint8).numpy().data) != entry.num_bytes:
        raise ValueError("it is truncated")
    _check_values(name, tensor)
    return tensor


def check_content(subjects: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
    """
    Check what `SubjectEmbeds.save` is about to write, so that each file that it writes can be loaded.

    Args:
        subjects (`list[dict]`): the query and scale of each subject.
        tensors (`dict[str, torch.Tensor]`): the tensors by their names in the file.

    Raises:
        `ValueError`: if the values of a tensor are out of range or not finite, or if the queries are too long.
    """
    # the rest of the header needs less than 64 KiB
    length = len(json.dumps(json.dumps(subjects)))
    if length > MAX_HEADER_BYTES - 2**16:
        raise ValueError(f"These subjects cannot be saved: their queries take {length:,} bytes.")
    for name, tensor in tensors.items():
        try:
            _check_values(name, tensor)
        except ValueError as error:
            raise ValueError(f"These subjects cannot be saved: {error}.") from None


def check_layout(layout: Layout, num_subjects: int) -> None:
    r"""
    Check the names, dtypes and shapes of the tensors, before the tensors are loaded.

    Args:
        layout (`dict[str, tuple[str, tuple[int, ...]]]`):
            The dtype, as written in safetensors files ("F32"), and the shape of each tensor.
        num_subjects (`int`):
            The number of subjects.

    Raises:
        `ValueError`: if a tensor is missing or unknown, or has a wrong dtype or shape. The message names the tensor.
    """
    known = {f"{number}.{name}" for number in range(num_subjects) for name in TENSORS} | {"fingerprint"}
    unknown = sorted(layout.keys() - known)
    if unknown:
        raise ValueError(f"it holds {unknown[0]!r}, which does not belong to a subject")
    if "fingerprint" in layout:
        _check_tensor(layout, "fingerprint", ("F32",), (MAX_TOKENS, 8))
    for number in range(num_subjects):
        _check_subject(layout, str(number))
    if len({shape[2] for name, (_, shape) in layout.items() if name.endswith("embeds")}) > 1:
        raise ValueError("its subjects are of different widths")
    size = sum(_DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in layout.values())
    if size > MAX_BYTES:
        raise ValueError(f"its tensors take {size:,} bytes, more than the {MAX_BYTES:,} that are accepted")


def _check_subject(layout: Layout, subject: str) -> None:
    for name in ("embeds", "negative_embeds"):
        if f"{subject}.{name}" not in layout:
            raise ValueError(f"it lacks the tokens {subject}.{name}")
        _check_tensor(layout, f"{subject}.{name}", tuple(_DTYPES), (1, MAX_TOKENS, MAX_TOKENS))
    embeds, negative_embeds = layout[f"{subject}.embeds"], layout[f"{subject}.negative_embeds"]
    if embeds != negative_embeds:
        raise ValueError(f"{subject}.embeds is {embeds}, but {subject}.negative_embeds is {negative_embeds}")
    given = [name for name in (f"{subject}.counts", f"{subject}.negative_counts") if name in layout]
    if len(given) == 1:
        raise ValueError(f"it holds {given[0]}, but not both counts of that subject")
    for name in given:
        _check_tensor(layout, name, ("F32",), (1, MAX_TOKENS))
        if layout[name][1] != embeds[1][:2]:
            raise ValueError(f"{name} has shape {layout[name][1]}, but there are {embeds[1][1]} tokens")
    if f"{subject}.region" in layout:
        _check_region(layout, f"{subject}.region")


def _check_region(layout: Layout, name: str) -> None:
    rank = min(max(len(layout[name][1]), 2), 3)
    _check_tensor(layout, name, ("F32",), (MAX_REGION_SIDE,) * rank)
    shape = layout[name][1]
    if math.prod(shape) > MAX_REGION_VALUES or rank == 3 and shape[0] == 1:
        raise ValueError(
            f"{name} has shape {shape}, but has to be (height, width) or (frames, height, width), of at most"
            f" {MAX_REGION_VALUES:,} values"
        )


def _check_tensor(layout: Layout, name: str, dtypes: Iterable[str], largest: tuple[int, ...]) -> None:
    """Raises a `ValueError` if the dtype is not in `dtypes`, or if the shape has another number of dimensions than
    `largest`, an empty dimension, or a dimension that is larger than in `largest`."""
    dtype, shape = layout[name]
    if dtype not in dtypes:
        raise ValueError(f"{name} is of type {dtype}, not of {' or '.join(dtypes)}")
    if len(shape) != len(largest) or any(not 0 < side <= most for side, most in zip(shape, largest, strict=False)):
        raise ValueError(f"{name} has shape {shape}, but has to have {len(largest)} dimensions, up to {largest}")


def _check_values(name: str, tensor: torch.Tensor) -> None:
    low, high = (float(value) for value in torch.aminmax(tensor))
    part = name.rpartition(".")[2]
    if part == "region":
        lowest, highest = 0.0, 1.0
    elif part in ("counts", "negative_counts"):
        lowest, highest = 1.0, float(MAX_TOKENS)
    elif part in ("embeds", "negative_embeds"):
        lowest, highest = -MAX_TOKEN_VALUE, MAX_TOKEN_VALUE
    else:
        lowest, highest = -_LARGEST, _LARGEST
    # comparisons with NaN are false
    if not (low >= lowest and high <= highest):
        raise ValueError(f"{name} holds values from {low:g} to {high:g}, but has to hold {lowest:g} to {highest:g}")
    if part == "region" and not high > 0.5:
        raise ValueError(f"{name} is empty")


def _described(metadata: dict[str, str], check_scale: Callable[[str, Any], float]) -> list[dict[str, Any]]:
    """Checks the metadata of the file and returns the query and scale of each subject."""
    if metadata.get("format") != FORMAT:
        raise ValueError("`SubjectEmbeds.save` did not write it")
    subjects = json.loads(metadata.get("subjects", "null"))
    if not isinstance(subjects, list) or not 1 <= len(subjects) <= MAX_SUBJECTS:
        raise ValueError(f"it has to describe 1 to {MAX_SUBJECTS} subjects, but does not")
    for number, subject in enumerate(subjects):
        if not isinstance(subject, dict) or subject.keys() != {"query", "scale"}:
            raise ValueError(f"subject {number} has to have a query and a scale, but is {str(subject)[:80]}")
        if not isinstance(subject["query"], str):
            raise ValueError(f"the query of subject {number} is {subject['query']!r:.80}, not a text")
        if subject["scale"] is not None:
            subject["scale"] = check_scale(f"scale of subject {number}", subject["scale"])
    return subjects
