"""Reads and writes files: those of `SubjectEmbeds.save`, and the two files in which the authors of SSR-Encoder released
their weights."""

import json
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from . import internals_ssr


# The limits of a file of subjects, which can come from a stranger. A subject of Stable Diffusion 1.5 in full precision
# has 2.8 MB, and a region of 32 frames of 512 x 512 has 34 MB.
MAX_BYTES = 2**26
MAX_HEADER_BYTES = 2**20
# The largest number in the tokens of a subject. Tokens come out of a layer norm: with a width of 768, they are at most
# 27.7 times as large as its weights, which are near 1. With much larger values, the keys and values could exceed the
# largest number in half precision, and the image would be NaN.
MAX_TOKEN_VALUE = 1000.0

FORMAT = "ssr-subject-1"
SUBJECT_TENSORS = ("embeds", "negative_embeds", "region", "counts", "negative_counts")


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager that writes a file whole or not at all. It yields a temporary file in the same folder, which replaces
    `path` when the block ends, and is deleted if the block raises an error."""
    # resolved, because `os.replace` would replace a symbolic link and not the file that it points to
    target = Path(os.path.realpath(path))
    # A unique name for each writer. It does not contain the name of `path`, which can already have the maximum length.
    partial = target.parent / f".{uuid.uuid4().hex}.part"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`path`: {os.fspath(path)!r} has to be in a folder that exists.")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_subject_file(path: str | os.PathLike) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Returns the query and scale of each subject in a file, and the tensors by `<subject>.<name>`. The file can come from
    a stranger: sizes and shapes are checked before memory is allocated, and then the values."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError("it is not a regular file")
        # The file is read once, because another thread or process may replace it.
        with open(path, "rb") as file:
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            _check_size(os.fstat(file.fileno()).st_size, header_bytes)
            content = start + file.read(MAX_BYTES + MAX_HEADER_BYTES)
        header = json.loads(content[8 : 8 + header_bytes])
        described = _parse_metadata(header.pop("__metadata__", {}))
        _check_shapes({name: entry["shape"] for name, entry in header.items()}, len(described))
        tensors = safetensors.torch.load(content)
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
    except FileNotFoundError:
        raise
    except Exception as error:  # a parser that reads arbitrary bytes may raise anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"`path`: {os.fspath(path)!r} cannot be used as a file of subjects: {reason}.") from error
    return described, tensors


def write_subject_file(path: str | os.PathLike, described: list[dict], tensors: dict[str, torch.Tensor]) -> None:
    """Writes what [`read_subject_file`] returns. Raises a `ValueError` for what it would not accept."""
    # cloned, because subjects can share a region, and safetensors refuses tensors that share memory
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "subjects": json.dumps(described)}
    with atomic_file(path) as partial:
        try:
            for name, tensor in tensors.items():
                _check_tensor(name, tensor)
            safetensors.torch.save_file(tensors, partial, metadata=metadata)
            with open(partial, "rb") as file:
                _check_size(partial.stat().st_size, int.from_bytes(file.read(8), "little"))
        except ValueError as error:
            raise ValueError(f"These subjects cannot be saved: {error}.") from None


def _check_size(num_bytes: int, header_bytes: int) -> None:
    if num_bytes > MAX_BYTES + MAX_HEADER_BYTES or header_bytes > MAX_HEADER_BYTES:
        raise ValueError(
            f"it has {num_bytes:,} bytes and a header of {header_bytes:,}, more than the"
            f" {MAX_BYTES + MAX_HEADER_BYTES:,} and {MAX_HEADER_BYTES:,} that are accepted"
        )


def _parse_metadata(metadata: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the query and scale of each subject in a file."""
    if metadata.get("format") != FORMAT:
        raise ValueError("`SubjectEmbeds.save` did not write it")
    subjects = json.loads(metadata.get("subjects", "null"))
    if not isinstance(subjects, list) or not subjects:
        raise ValueError("it has to describe at least one subject, but does not")
    for number, subject in enumerate(subjects):
        if not isinstance(subject, dict) or subject.keys() != {"query", "scale"}:
            raise ValueError(f"subject {number} has to have a query and a scale, but is {str(subject)[:80]}")
        if not isinstance(subject["query"], str):
            raise ValueError(f"the query of subject {number} is {subject['query']!r:.80}, not a text")
        if subject["scale"] is not None:
            subject["scale"] = internals_ssr.check_scale(f"scale of subject {number}", subject["scale"])
    return subjects


def _check_shapes(shapes: dict[str, list[int]], num_subjects: int) -> None:
    """Raises a `ValueError` if tensors of a file are missing or unknown, or have shapes that are not those of
    subjects."""
    known = {f"{number}.{name}" for number in range(num_subjects) for name in SUBJECT_TENSORS} | {"fingerprint"}
    for name in sorted(shapes.keys() - known):
        raise ValueError(f"it holds {name!r:.80}, which does not belong to a subject")
    widths = set()
    for number in range(num_subjects):
        embeds, negative, region, *counts = (shapes.get(f"{number}.{name}") for name in SUBJECT_TENSORS)
        if embeds is None or len(embeds) != 3 or embeds[0] != 1 or 0 in embeds or negative != embeds:
            raise ValueError(
                f"{number}.embeds and {number}.negative_embeds have to be of one shape, (1, num_tokens, width), but are"
                f" {embeds} and {negative}"
            )
        widths.add(embeds[2])
        if counts != [None, None] and counts != [embeds[:2], embeds[:2]]:
            raise ValueError(f"the counts of subject {number} have the shapes {counts}, but have to have {embeds[:2]}")
        if region is not None and (len(region) not in (2, 3) or 0 in region):
            raise ValueError(f"{number}.region has shape {region}, but has to be (height, width) or (frames, ...)")
    if len(widths) != 1:
        raise ValueError(f"its subjects are of different widths: {sorted(widths)}")
    fingerprint = shapes.get("fingerprint", [1, 1])
    if len(fingerprint) != 2 or 0 in fingerprint:
        raise ValueError(f"fingerprint has shape {fingerprint}, but has to have 2 dimensions")


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises a `ValueError` if the dtype or a value of a tensor is not one of a subject."""
    part = name.rpartition(".")[2]
    low, high = {
        "embeds": (-MAX_TOKEN_VALUE, MAX_TOKEN_VALUE),
        "negative_embeds": (-MAX_TOKEN_VALUE, MAX_TOKEN_VALUE),
        "region": (0.0, 1.0),
        "fingerprint": (-65504.0, 65504.0),
        "counts": (1.0, 65504.0),
        "negative_counts": (1.0, 65504.0),
    }[part]
    exact = part not in ("embeds", "negative_embeds")
    if tensor.dtype not in (
        (torch.float32,) if exact else (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ):
        raise ValueError(f"{name} is of type {tensor.dtype}")
    least, most = (float(value) for value in torch.aminmax(tensor))
    # comparisons with NaN are false
    if not (least >= low and most <= high):
        raise ValueError(f"{name} holds values from {least:g} to {most:g}, but has to hold {low:g} to {high:g}")
    if part == "region" and not most > 0.5:
        raise ValueError(f"{name} is empty")


def read_released_weights(
    aligner: str | os.PathLike | Mapping[str, torch.Tensor],
    layers: str | os.PathLike | Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    layer_names: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Reads the two released files or state dicts (see [`SSREncoder.from_released`]) and returns a state dict for an encoder.

    `expected` is the state dict of the encoder, of which only names and shapes are used. `layer_names` are the names of
    its modules for the UNet's layers, in the order of the released file."""
    names = {
        "aligner": {_released_aligner_name(name): name for name in expected if not name.startswith("layers.")},
        # the released file numbers all attention layers; every second one is a cross-attention layer
        "layers": {
            f"{2 * index + 1}.{part}_SSR.weight": f"layers.{name}.{part}.weight"
            for index, name in enumerate(layer_names)
            for part in ("to_k", "to_v")
        },
    }
    released = {"aligner": _read_state_dict("aligner", aligner), "layers": _read_state_dict("layers", layers)}
    _check_released_names(released, names)
    state_dict = {}
    for argument in released:
        for released_name, name in names[argument].items():
            tensor = released[argument][released_name]
            _check_released_tensor(argument, released_name, tensor, expected[name])
            state_dict[name] = tensor
    return state_dict


def _released_aligner_name(name: str) -> str:
    if name.startswith("norm."):
        return name
    if name.startswith(("to_q.", "to_k.")):
        return f"aligner.{name}"
    return f"aligner.processor.{name}"


# Kinds of files that users may pass, with a test of the tensor names for each. The first kind that matches is used.
# The error message then says what the file is.
_KINDS: dict[str, Callable[[set[str]], bool]] = {
    "the released aligner (pytorch_model.bin)": lambda names: any(name.startswith("aligner.") for name in names),
    "the released layers (pytorch_model_1.bin)": lambda names: any("_SSR." in name for name in names),
    "an encoder that `save_pretrained` wrote, which `SSREncoder.from_pretrained` loads": lambda names: (
        any(name.startswith("layers.") for name in names) and "to_q.weight" in names or "to_out.0.weight" in names
    ),
    "a LoRA": lambda names: any("lora" in name.lower() for name in names),
    "an IP-Adapter": lambda names: any(name.startswith(("ip_adapter", "image_proj")) for name in names),
    "a whole Stable Diffusion checkpoint": lambda names: any(
        name.startswith("model.diffusion_model.") for name in names
    ),
}
_ALIGNER, _LAYERS = list(_KINDS)[:2]


def _kind(names: set[str]) -> str | None:
    return next((kind for kind, fits in _KINDS.items() if fits(names)), None)


def _check_released_names(
    released: Mapping[str, Mapping[str, torch.Tensor]], names: Mapping[str, Mapping[str, str]]
) -> None:
    kinds = {argument: _kind(set(tensors)) for argument, tensors in released.items()}
    if (kinds["aligner"], kinds["layers"]) == (_LAYERS, _ALIGNER):
        raise ValueError(
            f"`aligner` and `layers` are in the wrong order: `aligner` is {_LAYERS}, `layers` is {_ALIGNER}."
        )
    for argument, wanted in (("aligner", _ALIGNER), ("layers", _LAYERS)):
        missing = sorted(names[argument].keys() - released[argument].keys())
        extra = sorted(released[argument].keys() - names[argument].keys())
        if (missing or extra) and kinds[argument] not in (None, wanted):
            twice = ", as the other file is" if len(set(kinds.values())) == 1 else ""
            raise ValueError(f"`{argument}` has to be {wanted}, but is {kinds[argument]}{twice}.")
        if missing or extra:
            raise ValueError(
                f"`{argument}` does not hold the released tensors: missing {', '.join(missing[:3]) or 'none'},"
                f" unexpected {', '.join(extra[:3]) or 'none'}."
            )


def _check_released_tensor(argument: str, name: str, tensor: Any, expected: torch.Tensor) -> None:
    shape = expected.shape
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        what = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"`{argument}` holds {name} as {what}, but it has to be a tensor of floats.")
    if tensor.shape != shape:
        raise ValueError(f"`{argument}` holds {name} of shape {tuple(tensor.shape)}, but {tuple(shape)} was expected.")
    # the weights are converted to the dtype of the encoder
    if tensor.is_meta or not internals_ssr.is_finite(tensor, expected.dtype):
        raise ValueError(f"`{argument}` holds {name} with values that are not finite numbers in {expected.dtype}.")


def _read_state_dict(argument: str, source: Any) -> Mapping[str, torch.Tensor]:
    state_dict = source
    if not isinstance(source, Mapping):
        try:
            path = os.fspath(source)
            if path.endswith(".safetensors"):
                state_dict = safetensors.torch.load_file(path)
            else:
                state_dict = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # a parser that reads arbitrary bytes may raise anything
            # the message of an `UnpicklingError` advises to load the file with code execution enabled
            lines = not isinstance(error, pickle.UnpicklingError) and str(error).splitlines()
            reason = lines[0] if lines else "it is not a file of tensors"
            raise ValueError(f"`{argument}`: {source} holds no weights that can be read: {reason}") from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise ValueError(f"`{argument}` has to hold tensors by name, but holds {type(state_dict).__name__}.")
    return state_dict
