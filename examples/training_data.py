"""Training data: reads rows, leaves out the unusable ones with a reason, and turns the others into samples.

The order of the rows depends only on the seed and the epoch, and each sample has a position in this order. A run that
was interrupted therefore continues with the next row. A checkpoint only needs to store two numbers for each process.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow.parquet
import torch
from datasets.distributed import split_dataset_by_node
from diffusers_ssr.file_utils import atomic_file, check_regular_file
from diffusers_ssr.image_processing_ssr import open_image, preprocess, preprocess_mask, to_mask, to_pil
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from text_files import read_rows
from transformers import CLIPImageProcessor


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# If a row could not be read, this column holds the reason. A metadata file is unlikely to use this name.
ERROR_COLUMN = "__error__"
# Limits for one row, for one text file in a shard, and for one text in a row. Without limits, a shard of 2 KB could
# require 20 GB of memory.
MAX_ROW_BYTES = 2**27
MAX_TEXT_BYTES = 2**20
MAX_TEXT = 2**15
MAX_NAME = 2**10
MAX_SUBJECTS = 16
MAX_ROW_FILES = 256
# Limits for one entry of a shard that is not a file, such as an extended header, and for everything in a shard that
# does not become part of a row. 1 MB can unpack to a gigabyte, or to two million headers.
MAX_HEADER_BYTES = 2**16
SKIPPED_HEADERS, SKIPPED_HEADERS_PER_FILE = 1000, 4
SKIPPED_BYTES, SKIPPED_BYTES_PER_FILE = 2**24, 2**16
READ_SIZE = 2**20
# Limits for a Parquet file: each row has its picture, which takes more than 16 bytes of the file, and pictures are
# compressed already. Small files may have more rows, and unpack to more.
SMALL_TABLE_ROWS, TABLE_ROW_BYTES, TABLE_RATIO = 4096, 16, 20
# part of the names of copied tables; changes with the content of the copies
TABLE_VERSION = 1

Position = tuple[int, int]


class BadSample(Exception):
    """A row that cannot be used for training. The message gives the reason."""


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset on the Hub that is streamed."""

    url: str


@dataclass(frozen=True)
class Columns:
    """
    The names of the columns. If `reference` is `None`, the picture itself is the reference. If `mask` is `None`, there
    are no masks.

    A row with several subjects has lists in `query`, `reference` or `mask`, and all lists have the same length. A
    value that is not a list applies to every subject. The picture shows all subjects of the row together.
    """

    image: str = "image"
    caption: str = "text"
    query: str = "query"
    reference: str | None = None
    mask: str | None = None

    def names(self) -> list[str]:
        """Returns the names of all columns, sorted."""
        return sorted({name for name in (self.image, self.caption, self.query, self.reference, self.mask) if name})


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
    try:
        for number, row in read_rows(file, errors="replace"):
            yield (
                _own_columns(row)
                if isinstance(row, dict)
                else {"__key__": f"{file}, line {number}", ERROR_COLUMN: row}
            )
    except (OSError, ValueError) as error:
        yield {"__key__": str(file), ERROR_COLUMN: f"cannot be read: {error}"}


def _with_paths(row: dict, folder: Path, root: Path) -> dict:
    columns = {}
    for name, value in row.items():
        columns[name] = value
        if value and (name == "file_name" or name.endswith("_file_name")):
            listed = value if isinstance(value, list) else [value]
            # only a `Path` is opened later; plain text from an untrusted file is never opened as a path
            paths = [each and Path(os.path.normpath(folder / str(each))) for each in listed]
            if not all(path.is_relative_to(os.path.normpath(root)) for path in paths if path):
                columns[ERROR_COLUMN] = f"{name} is {value!r:.80}, which lies outside of {root}"
            columns[name.removesuffix("file_name").removesuffix("_") or "image"] = (
                paths if isinstance(value, list) else paths[0]
            )
    return columns


class _Unpacked:
    """
    Reads a shard forwards, and decompresses it in small steps. (tarfile decompresses a block of the file completely,
    and copies the result with each header that it reads.) What is not the content of a file for a row, such as folders,
    extended headers and files without a suffix, counts against a budget, which grows with the files.
    """

    def __init__(self, stream: BinaryIO):
        start = _Peeked(stream)
        kinds = ((b"\x1f\x8b", gzip.GzipFile), (b"BZh", bz2.BZ2File), (b"\xfd7zXZ\0", lzma.LZMAFile))
        opened = [
            kind(fileobj=start) if kind is gzip.GzipFile else kind(start) for mark, kind in kinds if start.is_(mark)
        ]
        self.stream = opened[0] if opened else start
        self.position = 0
        self.headers, self.bytes = SKIPPED_HEADERS, SKIPPED_BYTES

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if position < self.position:
            raise tarfile.ReadError("an entry ends before it begins")
        while position > self.position:
            if not self.read(min(position - self.position, READ_SIZE)):
                raise tarfile.ReadError("unexpected end of data")

    def read(self, size: int) -> bytes:
        """Reads bytes that are not the content of a file for a row."""
        self.bytes -= size
        if self.bytes < 0:
            raise tarfile.ReadError(f"more than {SKIPPED_BYTES:,} bytes do not belong to files of samples")
        return self._read(size)

    def count_header(self) -> None:
        self.headers -= 1
        if self.headers < 0:
            raise tarfile.ReadError(f"more than {SKIPPED_HEADERS:,} headers do not belong to files of samples")

    def content(self, member: tarfile.TarInfo) -> bytes:
        """Reads the content of a file, and adds to the budget."""
        self.seek(member.offset_data)
        content = self._read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        self.headers = min(self.headers + SKIPPED_HEADERS_PER_FILE, SKIPPED_HEADERS)
        self.bytes = min(self.bytes + SKIPPED_BYTES_PER_FILE, SKIPPED_BYTES)
        return content

    def _read(self, size: int) -> bytes:
        read = io.BytesIO()
        while read.tell() < size and (part := self.stream.read(min(size - read.tell(), READ_SIZE))):
            read.write(part)
        self.position += read.tell()
        return read.getvalue()


class _Peeked:
    """A stream whose first bytes are known, without a need to seek in it."""

    def __init__(self, stream: BinaryIO):
        self.start, self.stream = stream.read(6), stream

    def is_(self, mark: bytes) -> bool:
        return self.start.startswith(mark)

    def read(self, size: int) -> bytes:
        if not self.start:
            return self.stream.read(size)
        part, self.start = self.start[:size], self.start[size:]
        return part


class _BoundedTarInfo(tarfile.TarInfo):
    """An entry of a shard with a limited size. tarfile itself reads the content of some entries into memory, such as a
    long name, and limits neither the size nor the number of these entries. It also takes a damaged header for the end
    of the archive."""

    @classmethod
    def fromtarfile(cls, archive):
        archive.fileobj.count_header()
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        entry = super().frombuf(buf, encoding, errors)
        if entry.type == tarfile.GNUTYPE_SPARSE:
            entry._refuse_sparse()
        if entry.size < 0 or entry.size > MAX_HEADER_BYTES and entry.type not in tarfile.REGULAR_TYPES:
            raise tarfile.ReadError(f"an entry of type {entry.type!r} declares a size of {entry.size:,} bytes")
        return entry

    def _refuse_sparse(self, *_):
        raise tarfile.ReadError(f"{self.name!r:.80} is a sparse file")

    # tarfile calls these methods for the three formats of sparse files with pax headers
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def read_shards(shards: list[str]) -> Iterator[dict]:
    """
    Yields the rows of WebDataset shards, one shard after the other. The files with the same key form one row.
    `key.jpg` (or another picture format) becomes the column `image`, `key.txt` becomes `text`, `key.mask.png` becomes
    `mask`, and each entry of `key.json` becomes a column. `key.reference.0.png`, `key.reference.1.png` and so on
    become a list in `reference`. If a shard is truncated or exceeds the limits for a row, the rows before that point
    are yielded, followed by a row with the reason in `ERROR_COLUMN`.
    """
    for shard in shards:
        row = {}
        try:
            if "://" not in shard:
                check_regular_file(shard, "train_data_dir")
            with fsspec.open(shard, "rb") as stream:
                for key, field, content in _shard_files(_Unpacked(stream)):
                    name = f"{shard}:{key}"
                    if row and row["__key__"] != name:
                        yield _with_lists(row)
                        row = {}
                    columns = _shard_columns(field, content)
                    # a file in the shard takes precedence over a JSON entry of the same name, because the JSON entry
                    # is often only the original file name
                    row |= {each: columns[each] for each in columns if not isinstance(row.get(each), bytes)}
                    row["__key__"] = name
            if row:
                yield _with_lists(row)
        except Exception as error:  # a decompressor can raise any exception on corrupted data
            if row:
                yield _with_lists(row)
            yield {"__key__": shard, ERROR_COLUMN: f"the rest of this shard cannot be read: {error}"}


def _shard_files(shard: _Unpacked) -> Iterator[tuple[str, str, bytes]]:
    """Yields the key, field and content of each file in a shard."""
    last_key, size, count = None, 0, 0
    with tarfile.TarFile(fileobj=shard, mode="r", tarinfo=_BoundedTarInfo) as archive:
        while (member := archive.next()) is not None:
            # otherwise these grow with each entry
            archive.members.clear()
            archive.pax_headers.clear()
            folder, _, name = member.name.rpartition("/")
            stem, _, field = name.partition(".")
            if not member.isfile() or not stem or not field:
                continue
            key = f"{folder}/{stem}" if folder else stem
            size, count = (size, count) if key == last_key else (0, 0)
            last_key, size, count = key, size + member.size, count + 1
            most = MAX_TEXT_BYTES if field.rpartition(".")[2] in ("json", "txt") else MAX_ROW_BYTES
            if not 0 <= member.size <= most or size > MAX_ROW_BYTES:
                # the rest of the shard is not read, because skipping this file could mean decompressing gigabytes
                raise ValueError(
                    f"{member.name!r:.80} needs {max(size, member.size):,} bytes, but at most {most:,} are allowed"
                )
            if count > MAX_ROW_FILES:
                raise ValueError(f"{key!r:.80} has more than {MAX_ROW_FILES:,} files")
            yield key, field, shard.content(member)


def _shard_columns(field: str, content: bytes) -> dict:
    prefix, _, suffix = field.rpartition(".")
    if "." + suffix.lower() in PICTURE_SUFFIXES:
        return {prefix or "image": content}
    if suffix == "json":
        try:
            columns = json.loads(content)
        except (ValueError, RecursionError) as error:
            return {ERROR_COLUMN: f"{field} is not JSON: {error}"}
        return _own_columns(columns) if isinstance(columns, dict) else {ERROR_COLUMN: f"{field} is not a JSON object"}
    if suffix == "txt":
        return {prefix or "text": content.decode("utf-8-sig", errors="replace").strip()}
    return {field: content}


def _own_columns(columns: dict) -> dict:
    """Removes columns with names that start with `__`. These names are reserved for internal use."""
    return {name: value for name, value in columns.items() if not name.startswith("__")}


def _with_lists(row: dict) -> dict:
    """Combines the columns `name.0`, `name.1`, ... into one list in `name`."""
    columns, lists = {}, {}
    for name, value in row.items():
        stem, _, number = name.rpartition(".")
        if stem and number.isdecimal() and len(number) < 9:
            lists.setdefault(stem, {})[int(number)] = value
        else:
            columns[name] = value
    return {**columns, **{stem: [values[number] for number in sorted(values)] for stem, values in lists.items()}}


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
        return _load_tables(tables, streaming, columns)
    rows = read_folder(folder)
    if not rows:
        raise ValueError(f"`train_data_dir`: the metadata in {folder} does not name any picture.")
    if streaming:
        raise ValueError("`streaming` is for WebDataset shards, Parquet files and datasets by name, not for a folder.")
    return rows


def _load_tables(tables: list[Path], streaming: bool, columns: Sequence[str] | None):
    faults = []
    for table in tables:
        try:
            _open_table(str(table), columns)
        except Exception as error:  # a parser can raise any exception on corrupted data
            faults.append(f"{table} is truncated or not a Parquet file that can be used: {error}")
    if len(faults) == len(tables):
        raise ValueError(f"`train_data_dir`: {faults[0]}")
    names = list(map(str, tables))
    if streaming:
        # `datasets` divides lists among the processes, and passes on other values
        given = {"tables": names, "columns": columns and tuple(columns)}
        return datasets.IterableDataset.from_generator(read_tables, gen_kwargs=given)
    return TableRows(names, columns)


def _open_table(table: str, columns: Sequence[str] | None) -> tuple[pyarrow.parquet.ParquetFile, pyarrow.Schema]:
    """
    Opens a Parquet file whose content has a sensible size, compared with the size of the file. The metadata of
    `datasets` in the file is not used: it could name types of columns which open other files when they are read.

    Returns:
        The file, and the columns to read, with plain types. A picture is a struct with its bytes.

    Raises:
        `ValueError` or an exception of pyarrow: if the file cannot be used.
    """
    check_regular_file(table, "train_data_dir")
    file = pyarrow.parquet.ParquetFile(table)
    metadata, size = file.metadata, os.path.getsize(table)
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        raise ValueError("several columns have the same name")
    fields = [
        pyarrow.field(field.name, _plain_type(field.type)) for field in file.schema_arrow if _plain_type(field.type)
    ]
    fields = [field for field in fields if field.name in (columns or names) and not field.name.startswith("__")]
    if not fields:
        raise ValueError(
            f"it holds none of the columns {list(columns or [])} as text, pictures or numbers, but {names}"[:500]
        )
    rows = values = unpacked = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        # a dot separates the parts of a path
        chunks = [
            chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{each.name}.") for each in fields)
        ]
        rows += group.num_rows
        values = max(values, *(chunk.num_values for chunk in chunks))
        unpacked += sum(chunk.total_uncompressed_size for chunk in chunks)
    _check_size("rows", rows, SMALL_TABLE_ROWS + size // TABLE_ROW_BYTES, size)
    _check_size("values in a column", values, SMALL_TABLE_ROWS * MAX_SUBJECTS + size, size)
    _check_size("unpacked bytes", unpacked, MAX_ROW_BYTES + TABLE_RATIO * size, size)
    return file, pyarrow.schema(fields)


def _check_size(kind: str, count: int, most: int, size: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"it holds {count:,} {kind}, but at most {most:,} are allowed in a file of {size:,} bytes")


def _plain_type(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    """Returns the type under which a column is read, or `None` if it is none of those of pictures, texts and numbers."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    nested = []
    if types.is_struct(kind):
        nested = [kind.field(index).type for index in range(kind.num_fields)]
    elif types.is_list(kind) or types.is_large_list(kind):
        nested = [kind.value_type]
    elif not any(
        check(kind)
        for check in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_integer,
                      types.is_floating, types.is_boolean, types.is_null)
    ):  # fmt: skip
        return None
    # the values of a dictionary inside of another type cannot be cast by all versions of pyarrow
    return kind if all(_plain_type(each) == each for each in nested) else None


def _table_batches(table: str, columns: Sequence[str] | None) -> Iterator[pyarrow.RecordBatch]:
    """Yields the rows of a Parquet file in small batches. If the rest cannot be read, the last row has the reason in
    `ERROR_COLUMN`."""
    error_field = pyarrow.field(ERROR_COLUMN, pyarrow.string())
    schema = pyarrow.schema([error_field])
    try:
        file, plain = _open_table(table, columns)
        schema = plain.append(error_field)
        size, unpacked = os.path.getsize(table), 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            # A small dictionary can stand for a large column, so the sizes of the rows are not known in advance. But
            # no row is larger than the row group.
            largest = sum(group.column(index).total_uncompressed_size for index in range(group.num_columns))
            count = max(1, min(64, MAX_ROW_BYTES // 8 // max(1, largest)))
            for batch in file.iter_batches(count, [number], plain.names, use_threads=False):
                cells = [batch.column(batch.schema.get_field_index(field.name)) for field in plain]
                cells = [cell.cast(field.type) for cell, field in zip(cells, plain, strict=True)]
                errors = pyarrow.nulls(batch.num_rows, pyarrow.string())
                batch = pyarrow.RecordBatch.from_arrays([*cells, errors], schema=schema)
                unpacked += batch.nbytes
                _check_size("unpacked bytes", unpacked, MAX_ROW_BYTES + TABLE_RATIO * size, size)
                yield batch
    except Exception as error:  # a parser can raise any exception on corrupted data
        reason = f"the rest of this table cannot be read: {error}"
        yield pyarrow.RecordBatch.from_pylist([{ERROR_COLUMN: reason}], schema=schema)


def read_tables(tables: list[str], columns: Sequence[str] | None = None) -> Iterator[dict]:
    """
    Yields the rows of Parquet files, one file after the other. If a file is corrupted or unpacks to much more than its
    size, the rows before that point are yielded, followed by a row with the reason in `ERROR_COLUMN`.

    Args:
        tables (`list[str]`): the files.
        columns (`Sequence[str]`, *optional*): the only columns that are read.
    """
    for table in tables:
        number = 0
        for batch in _table_batches(table, columns):
            for index in range(batch.num_rows):
                yield _table_row(lambda: batch.slice(index, 1).to_pylist()[0], table, number)  # noqa: B023
                number += 1


def _table_row(read: Callable[[], dict], table: str, number: int) -> dict:
    return {**_row_or_error(read), "__key__": f"{table}, row {number}"}


class TableRows:
    """
    The rows of Parquet files with random access. A Parquet file can only be read in large parts, so each is first
    copied to a memory-mapped file in the cache of `datasets`.

    Args:
        tables (`list[str]`): the files.
        columns (`Sequence[str]`, *optional*): the only columns that are read.
    """

    def __init__(self, tables: list[str], columns: Sequence[str] | None = None):
        self.tables = tables
        self.copies = [_arrow_copy(table, columns) for table in tables]
        self.ends = list(accumulate(len(_mapped(copy)) for copy in self.copies))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        table = bisect_right(self.ends, index)
        rows = _mapped(self.copies[table])
        number = index - (self.ends[table] - len(rows))
        return _table_row(lambda: rows[number], self.tables[table], number)


# the number of files that are open at the same time is limited
@lru_cache(maxsize=100)
def _mapped(copy: Path) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(copy))


def _arrow_copy(table: str, columns: Sequence[str] | None) -> Path:
    """Copies the rows of a Parquet file to a file in the cache, unless it is there already, and returns that file."""
    state = os.stat(table)
    source = (os.path.abspath(table), state.st_size, state.st_mtime_ns, columns and sorted(columns), TABLE_VERSION)
    key = hashlib.blake2b(repr(source).encode(), digest_size=20).hexdigest()
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "ssr_tables" / f"{key}.arrow"
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):
        if not copy.exists():
            with atomic_file(copy) as partial, pyarrow.OSFile(str(partial), "wb") as sink:
                writer = None
                for part in _joined(_table_batches(table, columns)):
                    writer = writer or pyarrow.ipc.new_stream(sink, part.schema)
                    writer.write_table(part)
                if writer is None:  # there are no rows
                    writer = pyarrow.ipc.new_stream(sink, pyarrow.schema([(ERROR_COLUMN, pyarrow.string())]))
                writer.close()
    return copy


def _joined(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.Table]:
    """Joins batches, because a file of many small batches is slow to read."""
    waiting, size = [], 0
    for batch in batches:
        if waiting and (size > 2**23 or len(waiting) >= 1000):
            yield pyarrow.Table.from_batches(waiting).combine_chunks()
            waiting, size = [], 0
        waiting.append(batch)
        size += batch.nbytes
    if waiting:
        yield pyarrow.Table.from_batches(waiting).combine_chunks()


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
    return _row_or_error(lambda: rows[index])


def row_name(row: dict, default: str) -> str:
    """Returns the name of a row for messages. Names in untrusted files can be long, have line breaks, or characters
    that cannot be printed."""
    name = str(row.get("__key__", row.get("file_name", default)))
    name = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name[-MAX_NAME:])
    return name if name.strip() else default


def _row_or_error(read: Callable[[], dict]) -> dict:
    try:
        return read()
    except Exception as error:  # such as a text in a table that is not UTF-8
        return {ERROR_COLUMN: f"cannot be read: {error}"}


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
            columns.update(_own_columns(value))
        else:
            columns["text" if name == "txt" else name] = value
    return _with_lists(columns)


def open_picture(value, min_size: int = 1, name: str = "image") -> Image.Image:
    """
    Opens a picture from bytes, a `Path`, a [`HubFile`], a dict with bytes (the format of `datasets`), or a PIL image.
    The result is upright and in RGB.

    Raises:
        [`BadSample`]: if the picture is missing, cannot be decoded completely, is larger than
            `image_processing_ssr.MAX_PIXELS`, or is smaller than `min_size` on a side.
    """
    try:
        picture = to_pil(_decode(value, name), name)
    except ValueError as error:
        raise BadSample(str(error)) from error
    if min(picture.size) < min_size:
        raise BadSample(f"{name} is {picture.width} x {picture.height} pixels, less than {min_size} on a side")
    return picture


def _decode(value, name: str) -> Image.Image:
    return value if isinstance(value, Image.Image) else open_image(read_bytes(value, name), name)


def read_bytes(value, name: str = "image") -> bytes:
    """Returns the bytes of a picture cell. Raises [`BadSample`] for an empty cell or more than `MAX_ROW_BYTES`. Of a
    dict, only the bytes are used: its path, like any other text, comes from an untrusted file."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, Image.Image):
        return value.mode.encode() + str(value.size).encode() + value.tobytes()
    if isinstance(value, Path):
        value = _read_file(str(value), name)
    if isinstance(value, HubFile):
        value = _read_file(value.url, name)
    if isinstance(value, str) and value:
        raise BadSample(f"{name} is the text {value!r:.80}, not a picture; in a folder, `file_name` names pictures")
    if not isinstance(value, (bytes, bytearray)) or not value:
        raise BadSample(f"{name} is missing")
    return bytes(value)


def _read_file(path: str, name: str) -> bytes:
    try:
        if "://" not in path:
            check_regular_file(path, name)
        with fsspec.open(path, "rb") as file:
            content = file.read(MAX_ROW_BYTES + 1)
    except Exception as error:  # each fsspec file system raises different exceptions
        raise BadSample(f"{name} cannot be read: {error}") from error
    if len(content) > MAX_ROW_BYTES:
        raise BadSample(f"{name} has more than {MAX_ROW_BYTES:,} bytes")
    return content


def crop_square(picture: Image.Image, side: int) -> Image.Image:
    """Crops the central square and scales it to `side` pixels."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Preparation:
    """
    Turns a row into a sample: pixels of the target for the VAE, pixels of the references for the vision encoder, the
    caption and the queries. If the target itself is the reference, the reference is cropped like the target, so that
    it does not show anything that is missing in the target.

    Args:
        columns ([`Columns`]): the names of the columns.
        processor (`CLIPImageProcessor`): the image sizes and normalization for the vision encoder.
        resolution (`int`): height and width of the target in pixels.
        min_image_size (`int`): a picture that is smaller than this on a side is a bad sample.
        cache ([`FeatureCache`], *optional*): the cache with the features of earlier samples.
        mask_query (`"caption"` or `"empty"`): the query of a subject that has a mask and no query.
    """

    columns: Columns
    processor: CLIPImageProcessor
    resolution: int
    min_image_size: int = 1
    cache: "FeatureCache | None" = None
    mask_query: str = "caption"

    def __call__(self, row: dict) -> dict:
        """
        Returns:
            `dict` with `caption`, `queries` and either `features` from the cache, or `pixel_values` of shape
            `(3, resolution, resolution)` from -1 to 1, `reference_values` of shape `(num_subjects, 3, height, width)`
            and `masks`, a list with a tensor of shape `(1, height, width)` or `None` for each subject. With a cache,
            the `dict` also has `digest`.

        Raises:
            [`BadSample`]: if the row cannot be used.
        """
        columns = self.columns
        if row.get(ERROR_COLUMN):
            raise BadSample(row[ERROR_COLUMN])
        caption = _text(row.get(columns.caption), columns.caption)
        subjects = self._subjects(row)
        sample = {"caption": caption, "queries": [self._query(each, caption) for each in subjects]}
        if self.cache is not None:
            contents = [read_bytes(row.get(columns.image), columns.image)]
            for each in subjects:
                if columns.reference is not None:
                    contents.append(read_bytes(each["reference"], columns.reference))
                contents.append(b"" if each["mask"] is None else read_bytes(each["mask"], columns.mask))
            texts = (text.encode() for text in (caption, *sample["queries"]))
            sample["digest"] = self.cache.digest(*contents, *texts)
            features = self.cache.load(sample["digest"])
            if features is not None:
                return {**sample, "features": features}

        picture = open_picture(row.get(columns.image), self.min_image_size, columns.image)
        target = crop_square(picture, self.resolution)
        sample["pixel_values"] = torch.from_numpy(np.array(target)).permute(2, 0, 1).float() / 127.5 - 1
        references = [self._reference(each, picture) for each in subjects]
        sample["reference_values"] = torch.stack([reference for reference, _ in references])
        return {**sample, "masks": [mask for _, mask in references]}

    def _subjects(self, row: dict) -> list[dict]:
        """Returns the query, reference and mask of each subject. Empty cells become `None`."""
        columns = self.columns
        names = {"query": columns.query, "reference": columns.reference, "mask": columns.mask}
        cells = {part: row.get(name) if name else None for part, name in names.items()}
        cells = {part: list(cell) if isinstance(cell, (list, tuple)) else cell for part, cell in cells.items()}
        lengths = {names[part]: len(cell) for part, cell in cells.items() if isinstance(cell, list)}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise BadSample(f"lists of several subjects have to be of one length and not empty, but are {lengths}")
        count = max(lengths.values(), default=1)
        if count > MAX_SUBJECTS:
            raise BadSample(f"a row may have at most {MAX_SUBJECTS} subjects, but has {count}")
        cells = {part: cell if isinstance(cell, list) else [cell] * count for part, cell in cells.items()}
        return [
            {
                part: None if isinstance(each, str) and not each.strip() else each
                for part, each in zip(cells, subject, strict=True)
            }
            for subject in zip(*cells.values(), strict=True)
        ]

    def _query(self, subject: dict, caption: str) -> str:
        query = subject["query"]
        if query is None and subject["mask"] is not None:
            # with a mask, the query describes the whole picture, so the caption can be used as the query
            return caption if self.mask_query == "caption" else ""
        return _text(query, self.columns.query)

    def _reference(self, subject: dict, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the pixels and the mask of the subject's reference, preprocessed for the vision encoder."""
        columns, own = self.columns, self.columns.reference is not None
        whole = open_picture(subject["reference"], self.min_image_size, columns.reference) if own else picture
        edge = min(whole.size)
        mask = subject["mask"]
        if mask is not None:
            try:
                mask = to_mask(_decode(mask, columns.mask), whole.size, columns.mask)
                mask = mask if own else crop_square(mask, edge)
                mask = preprocess_mask(mask, self.processor, name=columns.mask)[0]
            except ValueError as error:
                raise BadSample(str(error)) from error
        return preprocess(whole if own else crop_square(whole, edge), self.processor)[0], mask


def _text(value, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"{name} is missing or empty" if not value else f"{name} is not a text: {value!r:.80}")
    if len(value) > MAX_TEXT or any("\ud800" <= letter <= "\udfff" for letter in value):
        # JSON can contain lone surrogates, which tokenizers and UTF-8 files cannot represent
        raise BadSample(f"{name} is not a text of at most {MAX_TEXT:,} characters: {value!r:.80}")
    return value.strip()


class Samples:
    """
    Yields usable samples endlessly. Unusable rows are left out and recorded in `bad`.

    Args:
        rows ([`FiniteRows`] or [`StreamedRows`]): the source of the rows.
        prepare (`Callable[[dict], dict]`): turns a row into a sample, or raises [`BadSample`].
        position (`tuple[int, int]`): the start position. The attribute `position` is always the position after the
            last sample that was yielded.
        threads (`int`): the number of threads that prepare rows ahead. The order of the rows does not change.
        log (`Callable[[str], None]`, *optional*): called once for each bad row.
    """

    def __init__(
        self,
        rows,
        prepare: Callable[[dict], dict],
        position: Position = (0, 0),
        threads: int = 0,
        log: Callable[[str], None] | None = None,
    ):
        self.rows = rows
        self.prepare = prepare
        self.position = tuple(position)
        self.threads = threads
        self.log = log
        self.bad: dict[str, str] = {}

    def __iter__(self) -> Iterator[dict]:
        begun = self.position[0]
        for position, name, sample in _ahead(self._prepared, self.rows.read(self.position), self.threads):
            self.position = position
            if not isinstance(sample, BadSample):
                begun = position[0]
                yield sample
                continue
            if name not in self.bad:
                self.bad[name] = str(sample)
                if self.log is not None:
                    self.log(f"left out {name}: {sample}")
            # with a small training set, a process can have no rows in an epoch, but it has some within
            # `num_processes` epochs
            if position[0] > begun + self.rows.num_processes:
                raise ValueError(f"No row of the training set can be used; the last one, {name}: {sample}")

    def _prepared(self, item):
        position, name, row = item
        try:
            return position, name, self.prepare(row)
        except BadSample as error:
            return position, name, error


def _ahead(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Like `map`, but computes some items ahead in threads. Threads are enough, because decoding and scaling release
    the global interpreter lock."""
    if not threads:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * threads:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class FeatureCache:
    """
    Stores tensors on disk, in one safetensors file for each sample. The file name is a hash of the content and the
    settings, so changed pictures, captions or settings lead to a different file. Files are written under a temporary
    name and then renamed, so several processes can share a folder.

    Args:
        folder (`Path`): the folder for the files.
        settings (`dict`): everything else that the tensors depend on, such as models and sizes.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder = Path(folder)
        self.settings = json.dumps(settings, sort_keys=True, default=str).encode()

    def digest(self, *contents: bytes) -> str:
        """Returns the hash of `contents` and the settings, which is the file name of the sample."""
        digest = hashlib.blake2b(self.settings, digest_size=20)
        for content in contents:
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()

    def _file(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load(self, digest: str) -> dict[str, torch.Tensor] | None:
        """Loads the tensors, or returns `None` if they are not in the cache."""
        try:
            return load_file(self._file(digest))
        except (OSError, SafetensorError):
            return None

    def save(self, digest: str, tensors: dict[str, torch.Tensor], writer: str = "") -> None:
        """Saves the tensors. `writer` identifies the process, because several processes can save the same sample at
        the same time."""
        file = self._file(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{writer}.part")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        partial.replace(file)


def summary(bad: dict[str, str], most: int = 20) -> str:
    """Returns a text with the number of bad samples and the names and reasons of the first `most` ones."""
    lines = [f"{len(bad)} bad samples were left out" + (":" if bad else ".")]
    lines += [f"  {name}: {reason}" for name, reason in list(bad.items())[:most]]
    if len(bad) > most:
        lines.append(f"  ... and {len(bad) - most} more")
    return "\n".join(lines)
