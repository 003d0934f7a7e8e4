"""Training samples: reads rows, skips unusable rows with the reason, and prepares the others.

The order of the rows depends only on seed and epoch, and every sample has its position in this order. An interrupted run can therefore
continue with the next row, and has to store only two numbers for each process.
"""

import hashlib
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet
import torch
from datasets.distributed import split_dataset_by_node
from diffusers_ssr.file_utils import check_regular_file
from diffusers_ssr.image_processing_ssr import open_image, preprocess, preprocess_mask, to_mask, to_pil
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from text_files import read_rows
from transformers import CLIPImageProcessor


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# Where a row could not even be read, this column says why; it is no name that a metadata file would use.
ERROR_COLUMN = "__error__"
# The most that is read for one row, of one text file in a shard, and of one text in a row. A shard of 2 KB may ask for 20 GB.
MAX_ROW_BYTES = 2**27
MAX_TEXT_BYTES = 2**20
MAX_TEXT = 2**15
MAX_SUBJECTS = 16

Position = tuple[int, int]


class BadSample(Exception):
    """A row that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Columns:
    """
    The names of the columns. `reference` and `mask` can be `None`: the picture itself is then the reference, without a mask.

    A row with several subjects has lists of the same length in `query`, `reference` or `mask`. A single value applies to all of
    them. The picture then shows all subjects.
    """

    image: str = "image"
    caption: str = "text"
    query: str = "query"
    reference: str | None = None
    mask: str | None = None


def read_folder(folder: Path) -> list[dict]:
    """
    The rows of a folder of pictures, from every `metadata.jsonl` or `metadata.csv` in it; `file_name`, relative to its
    metadata file, becomes the column `image`, `<name>_file_name` the column `<name>`. Pictures are not opened yet, and a
    line that cannot be read becomes a row that says so.

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
            yield row if isinstance(row, dict) else {"__key__": f"{file}, line {number}", ERROR_COLUMN: row}
    except (OSError, ValueError) as error:
        yield {"__key__": str(file), ERROR_COLUMN: f"cannot be read: {error}"}


def _with_paths(row: dict, folder: Path, root: Path) -> dict:
    columns = {}
    for name, value in row.items():
        columns[name] = value
        if value and (name == "file_name" or name.endswith("_file_name")):
            listed = value if isinstance(value, list) else [value]
            # a `Path` is opened later; text from a file of somebody else never is
            paths = [each and Path(os.path.normpath(folder / str(each))) for each in listed]
            if not all(path.is_relative_to(os.path.normpath(root)) for path in paths if path):
                columns[ERROR_COLUMN] = f"{name} is {value!r:.80}, which lies outside of {root}"
            columns[name.removesuffix("file_name").removesuffix("_") or "image"] = (
                paths if isinstance(value, list) else paths[0]
            )
    return columns


class _BoundedTarInfo(tarfile.TarInfo):
    """An entry of a shard. tarfile reads what some entries hold on its own, such as a long name, however long it says it is."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        entry = super().frombuf(buf, encoding, errors)
        if entry.size > MAX_TEXT_BYTES and entry.type not in tarfile.REGULAR_TYPES:
            raise tarfile.ReadError(f"an entry of type {entry.type!r} asks for {entry.size:,} bytes")
        return entry


def read_shards(shards: list[str]) -> Iterator[dict]:
    """
    The rows of WebDataset shards. Files with the same key are one row: `key.jpg` (or another picture) is the column `image`,
    `key.txt` is `text`, `key.mask.png` is `mask`, and the entries of `key.json` are further columns. `key.reference.0.png`,
    `key.reference.1.png` and so on are a list in `reference`.
    If a shard is truncated, or a row exceeds the size limit, the rows before it are returned, and then a row with the error.
    """
    for shard in shards:
        row = {}
        try:
            if "://" not in shard:
                check_regular_file(shard, "train_data_dir")
            with (
                fsspec.open(shard, "rb") as stream,
                tarfile.open(fileobj=stream, mode="r|*", tarinfo=_BoundedTarInfo) as archive,
            ):
                for key, field, content in _shard_files(archive):
                    name = f"{shard}:{key}"
                    if row and row["__key__"] != name:
                        yield _with_lists(row)
                        row = {}
                    columns = _shard_columns(field, content)
                    # a file of the shard is worth more than what its JSON says: that often names the file it once was
                    columns = {each: columns[each] for each in columns if not isinstance(row.get(each), bytes)}
                    row = {**row, **columns, "__key__": name}
            if row:
                yield _with_lists(row)
        except Exception as error:  # a decompressor that meets arbitrary bytes may raise anything
            if row:
                yield _with_lists(row)
            yield {"__key__": shard, ERROR_COLUMN: f"the rest of this shard cannot be read: {error}"}


def _shard_files(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Key, field and content of each file in a shard."""
    last_key, size = None, 0
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        stem, _, field = name.partition(".")
        if not member.isfile() or not stem or not field:
            continue
        key = f"{folder}/{stem}" if folder else stem
        # each file counts for its header as well, or a row could have any number of empty ones
        size = member.size + tarfile.BLOCKSIZE + (size if key == last_key else 0)
        last_key = key
        most = MAX_TEXT_BYTES if field.rpartition(".")[2] in ("json", "txt") else MAX_ROW_BYTES
        if member.size > most or size > MAX_ROW_BYTES:
            # to read on behind it, gigabytes of zeros may have to be decompressed
            raise ValueError(f"{member.name!r:.80} asks for {max(size, member.size):,} bytes, of at most {most:,}")
        yield key, field, archive.extractfile(member).read()


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
    """Without the names that mean something here."""
    return {name: value for name, value in columns.items() if not name.startswith("__")}


def _with_lists(row: dict) -> dict:
    """The columns `name.0`, `name.1`, ... as one list in `name`."""
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
):
    """
    Open a training set: a folder with `metadata.jsonl`, a folder of Parquet files or of WebDataset shards, or a dataset by
    name. Pictures stay undecoded, since `datasets` raises on the first one that is broken.

    Returns:
        a sequence of rows, or a `datasets.IterableDataset` of them if `streaming` (shards are always streamed).

    Raises:
        `ValueError`: if nothing of the kind is there.
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError(
            f"Pass either `train_data_dir` or `dataset_name`: got {str(train_data_dir)!r} and {dataset_name!r}."
        )
    if dataset_name is not None:
        return _undecoded(datasets.load_dataset(dataset_name, dataset_config_name, split="train", streaming=streaming))
    folder = Path(train_data_dir)
    if not folder.is_dir():
        raise ValueError(f"`train_data_dir` has to be a folder, but there is none at {folder}.")
    shards = sorted(map(str, folder.rglob("*.tar")))
    if shards:
        return datasets.IterableDataset.from_generator(read_shards, gen_kwargs={"shards": shards})
    tables = sorted(folder.rglob("*.parquet"))
    if tables:
        return _load_tables(tables, streaming)
    rows = read_folder(folder)
    if not rows:
        raise ValueError(f"`train_data_dir`: the metadata in {folder} names no picture.")
    if streaming:
        raise ValueError("`streaming` is for WebDataset shards, Parquet files and datasets by name, not for a folder.")
    return rows


def _load_tables(tables: list[Path], streaming: bool):
    for table in tables:
        check_regular_file(table, "train_data_dir")
        try:
            pyarrow.parquet.read_metadata(table)
        except Exception as error:  # a parser that meets arbitrary bytes may raise anything
            raise ValueError(f"`train_data_dir`: {table} is cut off or no Parquet file: {error}") from error
    files = list(map(str, tables))
    dataset = _undecoded(datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming))
    return dataset.map(_without_paths, batched=True) if streaming else dataset.with_transform(_without_paths)


def _without_paths(batch: dict[str, list]) -> dict[str, list]:
    """A table holds its pictures: a path in it would be that of any file on this machine."""
    return {
        name: [{**value, "path": None} if isinstance(value, dict) and "path" in value else value for value in values]
        for name, values in batch.items()
    }


def _undecoded(dataset):
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset


class FiniteRows:
    """Rows with an index. Each epoch has its own permutation, and the processes take one batch each in turn.

    Args:
        rows (`Sequence[dict]`): what `load_rows` gives.
        seed (`int`): of the permutations.
        batch_size (`int`): how many rows in sequence a process takes.
        process_index (`int`), num_processes (`int`): which of how many processes reads.
    """

    def __init__(self, rows, seed: int, batch_size: int, process_index: int = 0, num_processes: int = 1):
        self.rows = rows
        self.seed = seed
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes

    def read(self, position: Position) -> Iterator[tuple[Position, str, dict]]:
        """Endlessly, from `position` (epoch, place in it) on: the position behind the row, its name and the row."""
        epoch, start = position
        count = len(self.rows)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            for place in range(start, count):
                if (epoch * count + place) // self.batch_size % self.num_processes != self.process_index:
                    continue
                index = int(order[place])
                row = self.rows[index]
                yield (epoch, place + 1), str(row.get("__key__", row.get("file_name", f"row {index}"))), row
            epoch, start = epoch + 1, 0


class StreamedRows:
    """Rows from a stream, which can be larger than the disk. The order of shards and a buffer are shuffled in each epoch. Each
    process reads its own shards, or every n-th row if the shards cannot be divided. To continue from a position, the rows before
    it are read but not decoded.

    Args:
        rows (`datasets.IterableDataset`): what `load_rows` gives.
        seed (`int`): of the shuffling.
        buffer_size (`int`): out of how many rows the next one is drawn.
        process_index (`int`), num_processes (`int`): which of how many processes reads.
    """

    def __init__(self, rows, seed: int, buffer_size: int = 1000, process_index: int = 0, num_processes: int = 1):
        self.num_processes = num_processes
        rows = rows.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size > 1 else rows
        self.rows = split_dataset_by_node(rows, process_index, num_processes) if num_processes > 1 else rows

    def read(self, position: Position) -> Iterator[tuple[Position, str, dict]]:
        """As [`FiniteRows.read`]."""
        epoch, place = position
        while True:
            self.rows.set_epoch(epoch)
            count = 0
            for count, row in enumerate(self.rows, 1):
                if count > place:
                    row = _flat(row)
                    yield (epoch, count), str(row.get("__key__", f"row {count} of epoch {epoch}")), row
            if not count:
                raise ValueError("The training set has no rows for this process: it needs more rows or more shards.")
            epoch, place = epoch + 1, 0


def _flat(row: dict) -> dict:
    """The columns of `read_shards` out of a row that `datasets` itself read from a shard."""
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
    A picture from bytes, a `Path`, a dict of bytes or a path as `datasets` has it, or a PIL image, upright and in RGB.

    Raises:
        [`BadSample`]: if it is missing, cannot be decoded to its end, is larger than `image_processing_ssr.MAX_PIXELS`, or
            smaller than `min_size` on a side.
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
    """The bytes behind what a row holds as a picture. Raises [`BadSample`] if there are none, or more than a picture has."""
    if isinstance(value, dict):
        # only rows that `datasets` itself made hold paths here: see `_load_tables`
        value = value.get("bytes") or value.get("path")
        value = _read_file(value, name) if isinstance(value, str) and value else value
    if isinstance(value, Image.Image):
        return value.mode.encode() + str(value.size).encode() + value.tobytes()
    if isinstance(value, Path):
        value = _read_file(str(value), name)
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
    except Exception as error:  # each file system of fsspec has its own errors
        raise BadSample(f"{name} cannot be read: {error}") from error
    if len(content) > MAX_ROW_BYTES:
        raise BadSample(f"{name} has more than {MAX_ROW_BYTES:,} bytes")
    return content


def crop_square(picture: Image.Image, side: int) -> Image.Image:
    """The central square, scaled to `side` pixels."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Preparation:
    """
    Turns a row into a sample: the target's pixels for the VAE, the references' for the vision encoder, caption and queries.
    A reference that is the target itself is cropped like it, so that it shows nothing which the target does not.

    Args:
        columns ([`Columns`]): which column holds what.
        processor (`CLIPImageProcessor`): the vision encoder's sizes and normalisation.
        resolution (`int`): side of the target in pixels.
        min_image_size (`int`): a picture smaller than this on a side is a bad sample.
        cache ([`FeatureCache`], *optional*): where the features of samples seen before lie.
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
            `dict` with `caption`, `queries` and either `features` from the cache or `pixel_values` `(3, resolution,
            resolution)` from -1 to 1 and, for each subject, `reference_values` `(num_subjects, 3, height, width)` and `masks`, a list
            of `(1, height, width)` or `None`; with a cache also `digest`.

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
        """Query, reference and mask of each subject; an empty cell is `None`."""
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
            # with a mask, the query is a caption of the whole picture, and may be the caption itself
            return caption if self.mask_query == "caption" else ""
        return _text(query, self.columns.query)

    def _reference(self, subject: dict, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels and mask of a subject's reference, as the vision encoder sees them."""
        columns, own = self.columns, self.columns.reference is not None
        whole = open_picture(subject["reference"], self.min_image_size, columns.reference) if own else picture
        edge = min(whole.size)
        mask = subject["mask"]
        if mask is not None:
            try:
                mask = to_mask(_decode(mask, columns.mask), whole.size, columns.mask)
                mask = mask if own else crop_square(mask, edge)
                mask = preprocess_mask(mask, self.processor)[0]
            except ValueError as error:
                raise BadSample(str(error)) from error
        return preprocess(whole if own else crop_square(whole, edge), self.processor)[0], mask


def _text(value, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"{name} is missing or empty" if not value else f"{name} is no text: {value!r:.80}")
    if len(value) > MAX_TEXT or any("\ud800" <= letter <= "\udfff" for letter in value):
        # JSON can hold halves of characters, which tokenizers and files cannot
        raise BadSample(f"{name} is no text of at most {MAX_TEXT:,} characters: {value!r:.80}")
    return value.strip()


class Samples:
    """
    Endlessly, the usable samples of rows. Unusable rows are named in `bad` and left out.

    Args:
        rows ([`FiniteRows`] or [`StreamedRows`]): where rows come from.
        prepare (`Callable[[dict], dict]`): makes a sample of a row, or raises [`BadSample`].
        position (`tuple[int, int]`): where to begin; `position` is always that behind the last sample given.
        threads (`int`): how many rows are prepared ahead at the same time; their order stays.
        log (`Callable[[str], None]`, *optional*): told of each bad row, once.
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
            # a process may have no row of a small set in one epoch, but has in as many as there are processes
            if position[0] > begun + self.rows.num_processes:
                raise ValueError(f"No row of the training set can be used; the last one, {name}: {sample}")

    def _prepared(self, item):
        position, name, row = item
        try:
            return position, name, self.prepare(row)
        except BadSample as error:
            return position, name, error


def _ahead(function: Callable, items: Iterable, threads: int) -> Iterator:
    """`map`, some items ahead in threads; decoding and scaling release the interpreter's lock."""
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
    Tensors on disk, with one safetensors file for each sample, named after a hash of its inputs. Changed pictures, captions or
    settings have another hash. Files are written to a temporary name and renamed, so several processes can share a folder.

    Args:
        folder (`Path`): where the files lie.
        settings (`dict`): everything else that the tensors depend on, such as models and sizes.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder = Path(folder)
        self.settings = json.dumps(settings, sort_keys=True, default=str).encode()

    def digest(self, *contents: bytes) -> str:
        """The file name for `contents`."""
        digest = hashlib.blake2b(self.settings, digest_size=20)
        for content in contents:
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()

    def _file(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load(self, digest: str) -> dict[str, torch.Tensor] | None:
        """The tensors, or `None` if they are not there yet."""
        try:
            return load_file(self._file(digest))
        except (OSError, SafetensorError):
            return None

    def save(self, digest: str, tensors: dict[str, torch.Tensor], writer: str = "") -> None:
        """Keep the tensors; `writer` tells processes apart that save the same sample at the same time."""
        file = self._file(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{writer}.part")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        partial.replace(file)


def summary(bad: dict[str, str], most: int = 20) -> str:
    """The bad rows of a run, counted and named."""
    lines = [f"{len(bad)} bad samples were left out" + (":" if bad else ".")]
    lines += [f"  {name}: {reason}" for name, reason in list(bad.items())[:most]]
    if len(bad) > most:
        lines.append(f"  ... and {len(bad) - most} more")
    return "\n".join(lines)
