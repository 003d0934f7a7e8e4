"""Reads and checks the headers of safetensors files, and checks the weights of a model before they are loaded. The
files can come from untrusted sources."""

import json
import math
import mmap
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import huggingface_hub


# Upper limits, far above those of real files: the header of a vision encoder with 400 weights has 40 KB.
MAX_CONFIG_BYTES = 2**20
MAX_HEADER_BYTES = 2**22
MAX_DIMENSIONS = 16

# A torch pickle can hold more than the model that is loaded from it, for example the text encoder of CLIP.
_BYTES_PER_WEIGHT = 16
_SLACK_BYTES = 2**24

_NUM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# the dtypes that weights can have; float8 is for storing them
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_DESCRIPTION = "/data.pkl"
# The only function that `torch.load(weights_only=True)` calls with a size from the file.
_RESERVING = b"\nbytearray\n"

_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_VISION_PREFIX = "vision_model."


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
    # the limits keep the product of thousands of numbers with thousands of digits short
    if len(shape) > MAX_DIMENSIONS or not all(
        type(number) is int and 0 <= number < 2**63 for number in (*shape, start, end)
    ):
        raise ValueError("a shape or position is not a whole number")
    if end - start != math.prod(shape) * _NUM_BYTES[dtype]:
        raise ValueError("a tensor has another size than its shape")
    return Entry(dtype, shape, offset + start, end - start)


def find_file(source: Any, subfolder: str | None, name: str, arguments: Mapping[str, Any]) -> Path | None:
    r"""
    Returns the path of a file of a folder or repository.

    Args:
        source (`str` or `os.PathLike`):
            The folder, or the name of a repository on the Hub.
        subfolder (`str`, *optional*):
            The subfolder with the file.
        name (`str`):
            The name of the file.
        arguments (`dict`):
            The arguments of `from_pretrained`. Those of a download are used.

    Returns:
        `Path`: the file, which is downloaded if it is not in the cache. It is `None` if there is no such file, or if
        it cannot be downloaded; `from_pretrained` then raises the right error.
    """
    if os.path.isdir(source):
        file = Path(source, subfolder or "", name)
        return file if file.is_file() else None
    if os.path.exists(source) or arguments.get("proxies"):  # newer versions of huggingface_hub take no proxies
        return None
    given = {key: arguments[key] for key in _DOWNLOAD if arguments.get(key) is not None}
    try:
        return Path(huggingface_hub.hf_hub_download(os.fspath(source), name, subfolder=subfolder or None, **given))
    except Exception:  # the name is wrong, there is no such file, or no connection
        return None


def check_small(file: Path, most: int = MAX_CONFIG_BYTES) -> None:
    """Raises a `ValueError` if a file of JSON is larger than `most` bytes. The libraries would read all of it."""
    size = file.stat().st_size
    if size > most:
        raise ValueError(f"{file.name} has {size:,} bytes, more than the {most:,} that are accepted")


def check_config(
    source: Any, subfolder: str | None, arguments: Mapping[str, Any], name: str = "config.json"
) -> tuple[Path | None, dict[str, Any]]:
    r"""
    Check the size of a config before it is read.

    Args:
        source, subfolder, name, arguments:
            See [`find_file`].

    Returns:
        `tuple[Path, dict]`: the file, see [`find_file`], and the arguments for `from_pretrained`. Their revision is the
        commit of the file, so that the other files are of the same commit, and those that are in the cache are used
        without a request.

    Raises:
        `ValueError`: if the file is too large.
    """
    file, given = find_file(source, subfolder, name, arguments), dict(arguments)
    if file is not None:
        check_small(file)
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", file.as_posix())
        if commit and not os.path.isdir(source):
            given["revision"] = commit[1]
    return file, given


def check_pickle(file: str | os.PathLike, most: int, limit_archives: bool = True) -> bool:
    r"""
    Check a file before `torch.load(..., weights_only=True)` reads it.

    Args:
        file (`str` or `os.PathLike`):
            The file.
        most (`int`):
            The maximum number of bytes.
        limit_archives (`bool`, defaults to `True`):
            Whether `most` also limits archives. They can be memory-mapped, so that unused tensors are not read.

    Returns:
        `bool`: whether it is an archive, as torch 1.6 and newer write it.

    Raises:
        `ValueError`: if it is not a torch pickle, is compressed or larger than `most`, or can take more memory than its
            size.
    """
    archive, size = zipfile.is_zipfile(file), os.stat(file).st_size
    if archive:
        with zipfile.ZipFile(file) as opened:
            entries = opened.infolist()
            # torch does not compress; a compressed entry can be a thousand times larger than the file and fill the
            # memory
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, but torch saves uncompressed files")
            size = max(size, sum(entry.file_size for entry in entries))
            pickles = [entry for entry in entries if entry.filename.endswith(_DESCRIPTION)]
            if any(entry.file_size > MAX_HEADER_BYTES for entry in pickles):
                raise ValueError(f"the description of its tensors is longer than {MAX_HEADER_BYTES:,} bytes")
            reserves = any(_RESERVING in opened.read(entry) for entry in pickles)
    if size > most and (limit_archives or not archive):
        raise ValueError(f"it has {size:,} bytes, more than the {most:,} that are accepted for these weights")
    if not archive:
        with open(file, "rb") as legacy:
            if legacy.read(1) != b"\x80":
                raise ValueError("it is not a file of tensors")
            with mmap.mmap(legacy.fileno(), 0, access=mmap.ACCESS_READ) as content:
                reserves = content.find(_RESERVING) >= 0
    if reserves:
        raise ValueError("it holds other objects than tensors")
    return archive


def check_weights(
    source: Any,
    subfolder: str | None,
    names: tuple[str, str],
    arguments: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    strict: bool = True,
) -> None:
    r"""
    Check the weights of a folder or repository before they are loaded: the sizes of the files, and the names, dtypes
    and shapes in the headers of safetensors files.

    Args:
        source, subfolder, arguments:
            See [`find_file`].
        names (`tuple[str, str]`):
            The names of a safetensors file and of a torch pickle, without a variant.
        shapes (`dict[str, tuple[int, ...]]`):
            The shapes of the model's weights by name.
        strict (`bool`, defaults to `True`):
            Whether to refuse weights that the model does not have. If `False`, the prefix of the vision part of a CLIP
            model does not matter, and a file in which no name is known, but which has as many numbers as the model, is
            not checked further.

    Raises:
        `ValueError`: if a file is broken, or if a weight is missing or unexpected, or has a wrong dtype or shape.
    """
    limit = _BYTES_PER_WEIGHT * _count(shapes.values()) + _SLACK_BYTES
    found: dict[str, Entry] = {}
    files = _weight_files(source, subfolder, names, arguments)
    for file in files:
        try:
            if not file.name.endswith(".safetensors"):
                check_pickle(file, limit)
                return
            with file.open("rb") as opened:
                found.update(read_header(opened, MAX_HEADER_BYTES)[1])
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from error
    if not files:
        return
    if not strict:
        found = {name.removeprefix(_VISION_PREFIX): entry for name, entry in found.items()}
        shapes = {name.removeprefix(_VISION_PREFIX): shape for name, shape in shapes.items()}
        # the names of another layout, which transformers may know; without the weights, it would initialise them
        if not found.keys() & shapes.keys() and _count(entry.shape for entry in found.values()) >= _count(
            shapes.values()
        ):
            return
    _check_entries(found, shapes, strict)


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    """Returns how many numbers tensors of these shapes have in total."""
    return sum(map(math.prod, shapes))


def _check_entries(found: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], strict: bool) -> None:
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise ValueError(f"it lacks the weights {some_names(missing)}")
    unexpected = sorted(found.keys() - shapes.keys())
    if strict and unexpected:
        raise ValueError(f"it holds weights that do not belong to the model: {some_names(unexpected)}")
    for name, shape in shapes.items():
        entry = found[name]
        if entry.dtype not in _FLOATS:
            raise ValueError(f"{name} is of type {entry.dtype}, not of {' or '.join(_FLOATS)}")
        if entry.shape != tuple(shape):
            raise ValueError(f"{name} has shape {entry.shape}, but has to have shape {tuple(shape)}")


def _weight_files(
    source: Any, subfolder: str | None, names: tuple[str, str], arguments: Mapping[str, Any]
) -> list[Path]:
    """Returns the file with the weights, or all of its shards. The list is empty if there is none."""
    variant, safetensors = arguments.get("variant"), arguments.get("use_safetensors")
    for name in names if safetensors is None else names[:1] if safetensors else names[1:]:
        stem, _, ending = name.rpartition(".")
        single, indices = name, [f"{name}.index.json"]
        if variant:
            single = f"{stem}.{variant}.{ending}"
            # diffusers has written the names of indices in two ways
            indices = [f"{name}.index.{variant}.json", f"{name}.{variant}.index.json"]
        # diffusers prefers the shards; on the Hub, a file that does not exist costs a request each time
        order = [*indices, single] if os.path.isdir(source) else [single, *indices]
        for each in order:
            file = find_file(source, subfolder, each, arguments)
            if file is not None:
                return [file] if each == single else _shards(source, subfolder, file, arguments)
    return []


def _shards(source: Any, subfolder: str | None, index: Path, arguments: Mapping[str, Any]) -> list[Path]:
    check_small(index, MAX_HEADER_BYTES)
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not all(isinstance(shard, str) and shard == os.path.basename(shard) for shard in shards):
            raise ValueError("a shard is in another folder")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of weights") from error
    files = {shard: find_file(source, subfolder, shard, arguments) for shard in shards}
    lost = [shard for shard, file in files.items() if file is None]
    if lost and os.path.isdir(source):
        raise ValueError(f"{index.name} names files that do not exist: {some_names(lost)}")
    return [file for file in files.values() if file is not None]


def some_names(names: Sequence[str], most: int = 3) -> str:
    """Formats the first `most` names and the number of the remaining ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
