"""Reads the rows of a training set, from a folder, shards, Parquet files or a dataset by name, in an order that can be
resumed.

The order of the rows depends only on the seed and the epoch, and each row has a position in this order. A run that was
interrupted therefore continues with the next row. A checkpoint only needs to store two numbers for each process.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
from datasets.distributed import split_dataset_by_node
from text_files import read_rows
from training_columns import ERROR_COLUMN, PICTURE_SUFFIXES, own_columns, row_or_error, with_lists
from training_shards import read_shards
from training_tables import load_tables


# The rest of a metadata file is left out after so many consecutive lines that cannot be read: three bytes a line would
# otherwise take a hundred times as much memory.
MAX_BAD_LINES = 1000
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
MAX_NAME = 2**10
Position = tuple[int, int]


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset on the Hub that is streamed."""

    url: str


def read_folder(folder: Path) -> list[dict]:
    """
    Reads the rows of every `metadata.jsonl` and `metadata.csv` in a folder of pictures. The path in `file_name`, which
    is relative to the metadata file, becomes the column `image`, and `<name>_file_name` becomes the column `<name>`.
    Pictures are not opened yet. A line that cannot be read becomes a row with the reason in `ERROR_COLUMN`.

    Raises:
        `ValueError`: if there is no metadata file.
    """
    files = sorted(file for name in METADATA_FILES for file in folder.rglob(name))
    if not files:
        raise ValueError(
            f"`train_data_dir`: {folder} holds neither *.tar nor *.parquet nor one of {METADATA_FILES}, which name each"
            " picture in `file_name` and hold its caption and query."
        )
    return [_with_paths(row, file.parent, folder) for file in files for row in _metadata_rows(file)]


def _metadata_rows(file: Path) -> Iterator[dict]:
    bad = 0
    try:
        for number, row in read_rows(file, errors="replace"):
            name, bad = f"{file}, line {number}", 0 if isinstance(row, dict) and row else bad + 1
            if bad > MAX_BAD_LINES:
                reason = f"the rest of this file is left out, after {MAX_BAD_LINES:,} lines that cannot be used"
                yield {"__key__": name, ERROR_COLUMN: reason}
                return
            yield own_columns(row) if isinstance(row, dict) else {"__key__": name, ERROR_COLUMN: row}
    except (OSError, ValueError) as error:
        yield {"__key__": str(file), ERROR_COLUMN: f"cannot be read: {error}"}


def _with_paths(row: dict, folder: Path, root: Path) -> dict:
    columns = {}
    for name, value in row.items():
        columns[name] = value
        if value and (name == "file_name" or name.endswith("_file_name")):
            listed = value if isinstance(value, list) else [value]
            # only a `Path` is opened later; plain text from an untrusted file is never opened as a path
            paths = [each and Path(os.path.abspath(folder / str(each))) for each in listed]
            if not all(path.is_relative_to(os.path.abspath(root)) for path in paths if path):
                columns[ERROR_COLUMN] = f"{name} is {value!r:.80}, which lies outside of {root}"
            columns[name.removesuffix("file_name").removesuffix("_") or "image"] = (
                paths if isinstance(value, list) else paths[0]
            )
    return columns


def load_rows(
    train_data_dir: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
):
    """
    Open a training set: a folder with `metadata.jsonl`, a folder of Parquet files or of WebDataset shards, or a
    dataset by name. Pictures are not decoded here, because `datasets` raises an error at the first broken picture.

    Args:
        train_data_dir (`str` or `Path`, *optional*): the folder.
        dataset_name (`str`, *optional*), dataset_config_name (`str`, *optional*): the dataset, instead of a folder.
        streaming (`bool`): read the rows one after the other, without a copy of the training set on the disk.
        columns (`Sequence[str]`, *optional*): the only columns that are read from Parquet files and datasets. Without
            it, all columns are read.

    Returns:
        A sequence of rows, or a `datasets.IterableDataset` of rows if `streaming` (shards are always streamed).

    Raises:
        `ValueError`: if no training set is found.
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError(
            f"Pass either `train_data_dir` or `dataset_name`: got {str(train_data_dir)!r} and {dataset_name!r}."
        )
    if dataset_name is not None:
        dataset = datasets.load_dataset(dataset_name, dataset_config_name, split="train", streaming=streaming)
        return _with_files(_undecoded(dataset, columns), dataset_name, streaming)
    folder = Path(train_data_dir)
    if not folder.is_dir():
        raise ValueError(f"`train_data_dir` has to be a folder, but there is none at {folder}.")
    shards = sorted(map(str, folder.rglob("*.tar")))
    if shards:
        return datasets.IterableDataset.from_generator(read_shards, gen_kwargs={"shards": shards})
    tables = sorted(folder.rglob("*.parquet"))
    if tables:
        return load_tables(tables, streaming, columns)
    rows = read_folder(folder)
    if not rows:
        raise ValueError(f"`train_data_dir`: the metadata in {folder} does not name any picture.")
    if streaming:
        raise ValueError("`streaming` is for WebDataset shards, Parquet files and datasets by name, not for a folder.")
    return rows


def _undecoded(dataset, columns: Sequence[str] | None):
    """Returns the dataset without other columns, and with columns that `datasets` does not decode."""
    features = dataset.features or {}
    # the columns of a WebDataset shard are the suffixes of its files, see `_flat`
    kept = [name for name in features if columns is None or name in columns or "__url__" in features]
    decoded = {name: feature for name, feature in features.items() if name in kept and _is_decoded(feature)}
    pictures = {}
    for name, feature in decoded.items():
        if isinstance(feature, datasets.Image):
            pictures[name] = datasets.Image(decode=False)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            pictures[name] = datasets.List(datasets.Image(decode=False))
    # other types than pictures, such as audio, open files or need more packages when they are decoded
    kept = [name for name in kept if name in pictures or name not in decoded]
    if len(kept) < len(features):
        dataset = dataset.select_columns(kept)
    for name, feature in pictures.items():
        dataset = dataset.cast_column(name, feature)
    return dataset


def _is_decoded(feature) -> bool:
    """Whether `datasets` decodes values of a column, which can mean opening files."""
    if isinstance(feature, dict):
        return any(map(_is_decoded, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_is_decoded, feature))
    return hasattr(feature, "decode_example") or _is_decoded(getattr(feature, "feature", ()))


def _with_files(dataset, dataset_name: str, streaming: bool):
    """Replaces the pictures of a dataset by their bytes, or by the file that `datasets` has downloaded. A path to
    any other file remains a text, which is not opened."""
    features = dataset.features or {}
    pictures = [name for name, feature in features.items() if _is_decoded(feature)]
    cache = datasets.config
    folders = [dataset_name, cache.HF_DATASETS_CACHE, cache.DOWNLOADED_DATASETS_PATH, cache.EXTRACTED_DATASETS_PATH]
    folders += [huggingface_hub.constants.HF_HUB_CACHE]
    known = [each for folder in folders for each in (os.path.abspath(folder), os.path.realpath(folder))]

    def file(value):
        if isinstance(value, list):
            return list(map(file, value))
        if not isinstance(value, dict) or value.get("bytes") or not value.get("path"):
            return value
        path = value["path"]
        if "://" not in path:
            return Path(path) if any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in known) else path
        *archives, last = path.split("::")
        hub = last.startswith("hf://datasets/") and all(each.startswith(("zip://", "tar://")) for each in archives)
        return HubFile(path) if hub else path

    def replaced(batch: dict[str, list]) -> dict[str, list]:
        return {name: list(map(file, values)) if name in pictures else values for name, values in batch.items()}

    return dataset.map(replaced, batched=True) if streaming else dataset.with_transform(replaced)


def row_at(rows, index: int) -> dict:
    """Returns a row of a sequence, or a row with the reason in `ERROR_COLUMN` if it cannot be read."""
    return row_or_error(lambda: rows[index])


def row_name(row: dict, default: str) -> str:
    """Returns the name of a row for messages. Names in untrusted files can be long, have line breaks, or characters
    that cannot be printed."""
    name = str(row.get("__key__", row.get("file_name", default)))
    name = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name[-MAX_NAME:])
    return name if name.strip() else default


class FiniteRows:
    """Rows with random access. Each epoch uses a new permutation, and the processes take turns with one batch each.

    Args:
        rows (`Sequence[dict]`): the rows that `load_rows` returns.
        seed (`int`): the seed of the permutations.
        batch_size (`int`): the number of consecutive rows that a process takes.
        process_index (`int`), num_processes (`int`): the index of this process and the number of processes.
    """

    def __init__(self, rows, seed: int, batch_size: int, process_index: int = 0, num_processes: int = 1):
        self.rows = rows
        self.seed = seed
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes

    def read(self, position: Position) -> Iterator[tuple[Position, str, dict]]:
        """Yields rows endlessly, starting at `position` (epoch, place in the epoch). Each item is the position after
        the row, the name of the row, and the row."""
        epoch, start = position
        count = len(self.rows)
        if not count:
            raise ValueError("The training set has no rows.")
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            for place in range(start, count):
                if (epoch * count + place) // self.batch_size % self.num_processes != self.process_index:
                    continue
                index = int(order[place])
                row = row_at(self.rows, index)
                yield (epoch, place + 1), row_name(row, f"row {index}"), row
            epoch, start = epoch + 1, 0


class StreamedRows:
    """Rows from a stream, which can be larger than the disk. In each epoch, the order of the shards is shuffled, and
    the rows are shuffled within a buffer. Each process reads different shards. If the shards cannot be divided evenly,
    each process reads every `num_processes`-th row. To resume from a position, the rows before it are read, but not
    decoded.

    Args:
        rows (`datasets.IterableDataset`): the rows that `load_rows` returns.
        seed (`int`): the seed for shuffling.
        buffer_size (`int`): the number of rows in the shuffle buffer.
        process_index (`int`), num_processes (`int`): the index of this process and the number of processes.
    """

    def __init__(self, rows, seed: int, buffer_size: int = 1000, process_index: int = 0, num_processes: int = 1):
        self.num_processes = num_processes
        rows = rows.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size > 1 else rows
        self.rows = split_dataset_by_node(rows, process_index, num_processes) if num_processes > 1 else rows

    def read(self, position: Position) -> Iterator[tuple[Position, str, dict]]:
        """See [`FiniteRows.read`]."""
        epoch, place = position
        while True:
            self.rows.set_epoch(epoch)
            count = 0
            for count, row in enumerate(self.rows, 1):
                if count > place:
                    row = _flat(row)
                    yield (epoch, count), row_name(row, f"row {count} of epoch {epoch}"), row
            if not count:
                raise ValueError("The training set has no rows for this process: it needs more rows or more shards.")
            epoch, place = epoch + 1, 0


def _flat(row: dict) -> dict:
    """Converts a row that `datasets` has read from a WebDataset shard to the columns that `read_shards` returns."""
    if "__url__" not in row:
        return row
    columns = {}
    for name, value in row.items():
        prefix, _, suffix = name.rpartition(".")
        if "." + suffix.lower() in PICTURE_SUFFIXES and value is not None:
            columns[prefix or "image"] = value
        elif suffix == "json" and isinstance(value, dict):
            columns.update(own_columns(value))
        else:
            columns["text" if name == "txt" else name] = value
    return with_lists(columns)
