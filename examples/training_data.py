"""Turns the rows of a training set into samples, and leaves out the unusable ones with a reason."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import torch
from diffusers_ssr.file_utils import check_regular_file
from diffusers_ssr.images_ssr import open_image, preprocess, preprocess_mask, to_mask, to_pil
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training_columns import ERROR_COLUMN, MAX_ROW_BYTES, MAX_SUBJECTS, MAX_TEXT
from training_rows import HubFile, Position
from transformers import CLIPImageProcessor


class BadSample(Exception):
    """A row that cannot be used for training. The message gives the reason."""


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


def open_picture(value, min_size: int = 1, name: str = "image") -> Image.Image:
    """
    Opens a picture from bytes, a `Path`, a [`HubFile`], a dict with bytes (the format of `datasets`), or a PIL image.
    The result is upright and in RGB.

    Raises:
        [`BadSample`]: if the picture is missing, cannot be decoded completely, is larger than
            `images_ssr.MAX_PIXELS`, or is smaller than `min_size` on a side.
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
        value = _read_file(value, name)
    if isinstance(value, HubFile):
        value = _read_file(value.url, name)
    if isinstance(value, str) and value:
        raise BadSample(f"{name} is the text {value!r:.80}, not a picture; in a folder, `file_name` names pictures")
    if not isinstance(value, (bytes, bytearray)) or not value:
        raise BadSample(f"{name} is missing")
    return bytes(value)


def _read_file(path: Path | str, name: str) -> bytes:
    """Reads a file on the disk (a `Path`) or a URL. fsspec must not open the first kind, because it takes "::" in a name
    for several file systems, one in the other."""
    try:
        if isinstance(path, Path):
            check_regular_file(path, name)
        with open(path, "rb") if isinstance(path, Path) else fsspec.open(path, "rb") as file:
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
