"""Reads training rows from Parquet files of any origin, within limits of memory and time."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import datasets
import pyarrow.parquet
from diffusers_ssr.internals_ssr import atomic_file, check_regular_file
from filelock import FileLock
from training_columns import ERROR_COLUMN, MAX_ROW_BYTES, MAX_SUBJECTS, row_or_error


# Limits for a Parquet file: each row has its picture, which takes more than 16 bytes of the file, and pictures are
# compressed already. Small files may have more rows, and unpack to more.
SMALL_TABLE_ROWS, TABLE_ROW_BYTES, TABLE_RATIO = 4096, 16, 20
# part of the names of copied tables; changes with the content of the copies
TABLE_VERSION = 1


def load_tables(tables: list[Path], streaming: bool, columns: Sequence[str] | None):
    """
    Opens Parquet files, of which those that cannot be used are left out.

    Returns:
        [`TableRows`], or a `datasets.IterableDataset` of rows if `streaming`.

    Raises:
        `ValueError`: if no file can be used.
    """
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
    return {**row_or_error(read), "__key__": f"{table}, row {number}"}


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
