"""Reads training sets: rows of folders, Parquet files, WebDataset shards and the Hub, and the samples made of them."""

import hashlib
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import torch
from datasets.distributed import split_dataset_by_node
from diffusers_ssr.images_ssr import preprocess, preprocess_mask, to_mask, to_pil
from diffusers_ssr.internals_ssr import atomic_file
from huggingface_hub.constants import HF_HUB_CACHE
from image_files import MAX_BYTES, SUFFIXES, crop_square, open_image
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from text_files import is_blank, open_text, read_rows, text_of
from transformers import CLIPImageProcessor


METADATA_FILES = ("metadata.csv", "metadata.jsonl")
ERROR_COLUMN = "__error__"  # if a row could not be read, this column holds the reason
MAX_SUBJECTS = 16
SHARD_FILE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # the key of the row, and the column
Tensors = dict[str, torch.Tensor]


class FilePath(str):
    """The path or URL of a file that belongs to the training set. Other texts of a row are never opened."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns. If `reference` is `None`, the image itself is the reference. A row with several subjects
    has lists of one length in `query`, `reference` or `mask`. Other values apply to every subject."""

    image: str = "image"
    caption: str = "text"
    query: str = "query"
    reference: str | None = None
    mask: str | None = None


def load_rows(train_data_dir, dataset_name=None, dataset_config_name=None, streaming=False, columns=Columns()):
    """Opens a training set: a folder with one of `METADATA_FILES`, Parquet files or WebDataset shards, or a dataset of
    the Hub. Shards are always streamed. Raises a `ValueError` if there is none or if it cannot be read."""
    if dataset_name is not None:
        options = {"path": dataset_name, "name": dataset_config_name}
        return _load_dataset(f"`dataset_name`: {dataset_name}", options, streaming, columns)
    folder = Path(train_data_dir)
    if not folder.is_dir():
        raise ValueError(f"`train_data_dir` has to be a folder, but there is none at {folder}.")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    shards = [str(file) for file in files if file.suffix == ".tar"]
    tables = [str(file) for file in files if file.suffix == ".parquet"]
    if shards:
        return datasets.IterableDataset.from_generator(read_shards, gen_kwargs={"shards": shards})
    if tables:
        options = {"path": "parquet", "data_files": tables}
        return _load_dataset(f"`train_data_dir`: {folder}", options, streaming, columns)
    return read_metadata([file for file in files if file.name in METADATA_FILES], folder)


def _load_dataset(source: str, options: dict, streaming: bool, columns: Columns):
    try:
        dataset = datasets.load_dataset(**options, split="train", streaming=streaming)
    except Exception as error:  # `datasets` and the parsers that it uses raise many kinds of errors
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    features = sorted(dataset.features or ())
    if "__url__" not in features:  # the columns of shards are named by suffixes, see `shard_columns`
        if columns.image not in features:
            raise ValueError(f"{source} has no column {columns.image!r}, only {features}: pass `--image_column`.")
        used = {"__key__", *vars(columns).values()}
        dataset = dataset.select_columns([name for name in features if name in used])
    # tables, because `datasets` would raise an error at the first image or text that it cannot decode
    return dataset.with_format("arrow")


def read_metadata(files: list[Path], root: Path) -> list[dict]:
    """Reads the rows of metadata files in a folder of images. The path in `file_name`, which is relative to the metadata
    file, becomes the column `image`, and `<name>_file_name` becomes the column `<name>`. Raises a `ValueError` if there
    is no row, or if a file is not UTF-8."""
    rows = []
    for file in files:
        try:
            with open_text(file) as text:
                text.read()  # if it is not UTF-8, the error is raised before any row is used
        except UnicodeDecodeError as error:
            raise ValueError(f"`train_data_dir`: {file} is not UTF-8, save it with this encoding: {error}") from error
        for number, row in read_rows(file):
            row = _with_paths(row, file.parent, root) if isinstance(row, dict) else {ERROR_COLUMN: row}
            name = f" ({row['file_name']})" if row.get("file_name") else ""
            rows.append({**row, "__key__": f"{file}, line {number}{name}"})
    if not rows:
        raise ValueError(
            f"`train_data_dir`: {root} has no *.tar and *.parquet files, and no rows in {', '.join(METADATA_FILES)}. To make"
            f" a training set of a folder of images: `prepare_dataset.py --source {root} --output_dir shards`."
        )
    return rows


def _with_paths(row: dict, folder: Path, root: Path) -> dict:
    columns = {name: value for name, value in row.items() if not name.startswith("__")}
    for name, value in list(columns.items()):
        if value and (name == "file_name" or name.endswith("_file_name")):
            names = value if isinstance(value, list) else [value]
            paths = [each and FilePath(os.path.abspath(folder / str(each))) for each in names]
            if not all(Path(path).is_relative_to(os.path.abspath(root)) for path in paths if path):
                columns[ERROR_COLUMN] = f"{name} is {value!r:.80}, which is outside of {root}"
            columns[name[: -len("_file_name")] or "image"] = paths if isinstance(value, list) else paths[0]
    return columns


def read_shards(shards: list[str]) -> Iterator[dict]:
    """Yields the rows of WebDataset shards: files whose names are the same up to the first dot. If a shard is damaged,
    the last row has the reason in `ERROR_COLUMN`."""
    for shard in shards:
        try:
            with tarfile.open(shard, "r|*") as archive:
                for key, files in groupby(_shard_files(archive), itemgetter(0)):
                    yield {field: content for _, field, content in files} | {"__key__": key, "__url__": shard}
                if archive.fileobj.read(2**14).strip(b"\0"):  # tarfile stops without an error
                    raise tarfile.ReadError("a header is damaged")
        except Exception as error:  # decompressors can raise any exception on corrupted data
            yield {"__key__": shard, ERROR_COLUMN: f"the rest of this shard cannot be read: {error}"}


def _shard_files(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    for member in archive:
        match = SHARD_FILE.fullmatch(member.name)
        if match and member.isfile():
            # one byte more than `open_image` accepts
            yield match[1], match[2], archive.extractfile(member).read(MAX_BYTES + 1)


def shard_columns(row: dict) -> dict:
    """Turns the files of a row into columns: `jpg` becomes `image`, `mask.png` becomes `mask`, `txt` becomes `text`, and
    each entry of `json` becomes a column."""
    entries, files = {}, {}
    for name, value in row.items():
        prefix, _, suffix = name.rpartition(".")
        if suffix == "json":
            value = json.loads(value) if isinstance(value, bytes) else value or {}
            if not isinstance(value, dict):
                raise ValueError(f"{name} is not a JSON object")
            entries |= {entry: each for entry, each in value.items() if not entry.startswith("__")}
        elif value is not None:
            default = "text" if suffix == "txt" else "image" if f".{suffix.lower()}" in SUFFIXES else name
            files[prefix if prefix and default != name else default] = value
    # files take precedence over entries of the same name, which are often only the original names of the files
    return entries | files


def read_row(row: dict | pyarrow.Table | Callable, name: str) -> tuple[str, dict]:
    """Returns the name and the columns of a row, or its name and the reason in `ERROR_COLUMN`. `name` is the name of a
    row that has none. `row` can be a function that reads the row."""
    try:
        row = row() if callable(row) else row
        if isinstance(row, pyarrow.Table):
            name = row["__key__"][0].as_py() if "__key__" in row.column_names else name
            row = row.to_pylist()[0]
        if "__url__" in row:
            name = f"{row['__url__']}:{row['__key__']}"
            row = shard_columns(row)
        else:
            name = str(row.get("__key__") or name)
    except UnicodeDecodeError as error:
        row = {ERROR_COLUMN: f"not UTF-8: {error}"}
    except Exception as error:  # the readers of untrusted files can raise any exception
        row = {ERROR_COLUMN: f"cannot be read: {error}"}
    return repr(name)[1:-1][-1000:], row  # without line breaks and characters that cannot be printed


def open_cell(value, name: str) -> Image.Image:
    """Opens the image of a cell: an image, bytes, a dict with bytes (the format of `datasets`), or a [`FilePath`]. The path
    in a dict comes from an untrusted file, and is only opened if it is on the Hub or in its cache."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        path = str(value.get("path") or "")
        path = path if "://" in path else os.path.abspath(path)
        cached = path.startswith((HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE), "hf://datasets/"))
        value = value.get("bytes") or (FilePath(path) if cached and "::" not in path else None)
    if isinstance(value, FilePath) and "://" in value:
        try:
            with fsspec.open(value, "rb") as file:
                value = file.read(MAX_BYTES + 1)
        except Exception as error:  # each fsspec file system raises other exceptions
            raise ValueError(f"{name} cannot be read: {error}") from error
    if isinstance(value, str) and value and not isinstance(value, FilePath):
        raise ValueError(f"{name} is the text {value!r:.80}, not an image; in a folder, `file_name` names images")
    if not isinstance(value, (bytes, FilePath)) or not value:
        raise ValueError(f"{name} is missing")
    return open_image(value, name)


def open_rgb(value, name: str, min_size: int = 1) -> Image.Image:
    """Opens the image of a cell upright and in RGB. Raises a `ValueError` if a side is shorter than `min_size`."""
    image = to_pil(open_cell(value, name), name)
    if min(image.size) < min_size:
        raise ValueError(f"{name} is {image.width} x {image.height} pixels, less than {min_size} on a side")
    return image


@dataclass(frozen=True)
class Preparation:
    """
    Turns a row into a sample: a dict with `caption`, `queries`, `pixel_values` of shape `(3, resolution, resolution)`
    from -1 to 1, `reference_values` of shape `(num_subjects, 3, height, width)` and `masks`, a list with a tensor of
    shape `(1, height, width)` or `None` for each subject. Raises a `ValueError` if the row cannot be used.

    If the target itself is the reference, the reference is cropped like the target, so that it does not show anything
    that is missing in the target. `mask_query` ("caption" or "empty") is the query of a subject with only a mask.
    """

    columns: Columns
    processor: CLIPImageProcessor
    resolution: int
    min_image_size: int = 1
    mask_query: str = "caption"

    def __call__(self, row: dict) -> dict:
        columns = self.columns
        if row.get(ERROR_COLUMN):
            raise ValueError(str(row[ERROR_COLUMN]))
        caption = text_of(row.get(columns.caption), columns.caption)
        subjects = self._subjects(row)
        queries = [self._query(subject, caption) for subject in subjects]
        image = open_rgb(row.get(columns.image), columns.image, self.min_image_size)
        pixels = torch.from_numpy(np.array(crop_square(image, self.resolution)))
        references, masks = zip(*(self._reference(subject, image) for subject in subjects), strict=True)
        sample = {"caption": caption, "queries": queries, "reference_values": torch.stack(references)}
        return {**sample, "masks": list(masks), "pixel_values": pixels.permute(2, 0, 1).float() / 127.5 - 1}

    def _subjects(self, row: dict) -> list[dict]:
        """Returns the query, reference and mask of each subject. Empty cells become `None`."""
        names = {part: getattr(self.columns, part) for part in ("query", "reference", "mask")}
        cells = {part: row.get(name) for part, name in names.items()}
        lengths = {names[part]: len(cell) for part, cell in cells.items() if isinstance(cell, list)}
        count = max(lengths.values(), default=1)
        if not 0 < count <= MAX_SUBJECTS or len(set(lengths.values())) > 1:
            raise ValueError(f"lists of subjects have to be of one length, 1 to {MAX_SUBJECTS}, but are {lengths}")
        cells = {part: cell if isinstance(cell, list) else [cell] * count for part, cell in cells.items()}
        return [{part: None if is_blank(cell[i]) else cell[i] for part, cell in cells.items()} for i in range(count)]

    def _query(self, subject: dict, caption: str) -> str:
        name, query = self.columns.query, subject["query"]
        if query is None and subject["mask"] is not None:
            # with a mask, the query describes the whole image, so the caption can be used as the query
            return caption if self.mask_query == "caption" else ""
        if query is None:
            caption_column = self.columns.caption
            raise ValueError(
                f"{name} is missing or empty; `--query_column {caption_column}` uses the captions as queries"
            )
        return text_of(query, name)

    def _reference(self, subject: dict, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the pixels and the mask of the subject's reference, preprocessed for the vision encoder."""
        columns, own = self.columns, self.columns.reference is not None
        whole = open_rgb(subject["reference"], columns.reference, self.min_image_size) if own else image
        edge = min(whole.size)
        pixels = preprocess(whole if own else crop_square(whole, edge), self.processor)[0]
        if subject["mask"] is None:
            return pixels, None
        mask = to_mask(open_cell(subject["mask"], columns.mask), whole.size, columns.mask)
        mask = mask if own else crop_square(mask, edge)
        return pixels, preprocess_mask(mask, self.processor, name=columns.mask)[0]


class Samples:
    """
    Yields usable samples endlessly. Bad rows, for which `prepare` raises a `ValueError`, are logged and kept in `bad`.

    The order of the rows depends only on the seed and the epoch. With random access, each epoch is a new permutation.
    In a stream, each epoch shuffles the shards, and the rows within a buffer. Several processes take turns, or read
    different shards; `process` is the index and the number of processes. `position` is the epoch and the number of
    rows up to the last sample. A run that resumes there continues with the next row; in a stream, the rows before it
    are read again, but not decoded. `threads` prepare rows ahead.
    """

    def __init__(
        self, rows, prepare, position=(0, 0), seed=0, buffer_size=1000, threads=0, process=(0, 1), log=lambda line: None
    ):  # fmt: skip
        self.is_stream = isinstance(rows, datasets.IterableDataset)
        if self.is_stream:
            rows = rows.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size > 1 else rows
            rows = split_dataset_by_node(rows, *process) if process[1] > 1 else rows
        self.rows, self.prepare, self.position, self.seed = rows, prepare, tuple(position), seed
        self.threads, self.process, self.log = threads, process, log
        self.bad: dict[str, str] = {}

    def __iter__(self) -> Iterator[dict]:
        begun = self.position[0]
        for position, name, sample in map_ahead(self._prepared, self._rows(), self.threads):
            self.position = position
            if not isinstance(sample, ValueError):
                begun = position[0]
                yield sample
                continue
            if name not in self.bad:
                self.bad[name] = str(sample)
                self.log(f"left out {name}: {sample}")
            # with a few rows, a process can have none in an epoch, but it has some within `num_processes` epochs
            if position[0] > begun + self.process[1]:
                raise ValueError(f"No row of the training set can be used; the last one, {name}: {sample}")

    def _rows(self) -> Iterator[tuple[tuple[int, int], str, dict]]:
        (epoch, start), (index, count) = self.position, self.process
        while True:
            if self.is_stream:
                self.rows.set_epoch(epoch)
                rows = ((f"row {place} of epoch {epoch}", row) for place, row in enumerate(self.rows))
            else:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)).tolist()
                rows = ((f"row {number}", partial(self.rows.__getitem__, number)) for number in order)
            place = None
            for place, (name, row) in enumerate(islice(rows, start, None), start):
                if self.is_stream or (epoch * len(self.rows) + place) % count == index:
                    yield (epoch, place + 1), *read_row(row, name)
            if place is None and start == 0:
                raise ValueError("The training set has no rows for this process: it needs more rows or more shards.")
            epoch, start = epoch + 1, 0

    def _prepared(self, item: tuple[tuple[int, int], str, dict]) -> tuple[tuple[int, int], str, dict | ValueError]:
        position, name, row = item
        try:
            return position, name, self.prepare(row)
        except ValueError as error:
            return position, name, error


def map_ahead(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Like `map`, but computes some items ahead in threads. Decoding and resizing release the interpreter lock."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
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
    """Stores the features of each sample on disk. The name of the file is a hash of the sample and of `settings`, which
    is everything else that the features depend on. Several processes can share the folder."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = Path(folder), settings

    def __call__(self, sample: dict, compute: Callable[[list[dict]], Tensors]) -> Tensors:
        """Loads the features, or computes and saves them."""
        tensors = [sample["pixel_values"], sample["reference_values"], *sample["masks"]]
        texts = [sample["caption"], sample["queries"], [None if each is None else each.shape for each in tensors]]
        digest = hashlib.blake2b(json.dumps([self.settings, texts]).encode(), digest_size=20)
        for tensor in tensors:
            digest.update(b"" if tensor is None else tensor.numpy().tobytes())
        name = digest.hexdigest()
        file = self.folder / name[:2] / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError):  # missing, or damaged
            features = compute([sample])
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as partial_file:
                save_file({name: tensor.contiguous().cpu() for name, tensor in features.items()}, partial_file)
            return features


def summary(bad: dict[str, str], most: int = 20) -> str:
    """Returns a text with the number of bad samples and the names and reasons of the first `most` ones."""
    lines = [f"{len(bad)} bad samples were left out" + (":" if bad else ".")]
    lines += [f"  {name}: {reason}" for name, reason in list(bad.items())[:most]]
    return "\n".join([*lines, f"  ... and {len(bad) - most} more"] if len(bad) > most else lines)
