"""Reads training rows from WebDataset shards (tar files) of any origin, within limits of memory and time."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
from diffusers_ssr.file_utils import check_regular_file
from training_columns import ERROR_COLUMN, MAX_ROW_BYTES, MAX_TEXT_BYTES, PICTURE_SUFFIXES, own_columns, with_lists


MAX_ROW_FILES = 256
# Limits for one entry of a shard that is not a file, such as an extended header, and for everything in a shard that
# does not become part of a row. 1 MB can unpack to a gigabyte, or to two million headers.
MAX_HEADER_BYTES = 2**16
SKIPPED_HEADERS, SKIPPED_HEADERS_PER_FILE = 1000, 4
SKIPPED_BYTES, SKIPPED_BYTES_PER_FILE = 2**24, 2**16
# Pictures are compressed already, so a shard that unpacks to many times its size would only fill the memory.
SHARD_RATIO = 20
READ_SIZE = 2**20


class _Unpacked:
    """
    Reads a shard forwards, and decompresses it in small steps. (tarfile decompresses a block of the file completely,
    and copies the result with each header that it reads.) What is not the content of a file for a row, such as folders,
    extended headers and files without a suffix, counts against a budget, which grows with the files.
    """

    def __init__(self, stream: BinaryIO):
        self.packed = start = _Peeked(stream)
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
        most = MAX_ROW_BYTES + SHARD_RATIO * self.packed.position
        if self.position > most:
            raise tarfile.ReadError(
                f"{self.packed.position:,} bytes of it unpack to more than {most:,} bytes, which no pictures do"
            )
        return read.getvalue()


class _Peeked:
    """A stream whose first bytes are known, without a need to seek in it. It counts the bytes that were read."""

    def __init__(self, stream: BinaryIO):
        self.start, self.stream = stream.read(6), stream
        self.position = len(self.start)

    def is_(self, mark: bytes) -> bool:
        return self.start.startswith(mark)

    def read(self, size: int) -> bytes:
        if not self.start:
            part = self.stream.read(size)
            self.position += len(part)
            return part
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
            local = "://" not in shard
            if local:
                check_regular_file(shard, "train_data_dir")
            # fsspec takes "::" in the name of a file for several file systems, one in the other
            with open(shard, "rb") if local else fsspec.open(shard, "rb") as stream:
                for key, field, content in _shard_files(_Unpacked(stream)):
                    name = f"{shard}:{key}"
                    if row and row["__key__"] != name:
                        yield with_lists(row)
                        row = {}
                    columns = _shard_columns(field, content)
                    # a file in the shard takes precedence over a JSON entry of the same name, because the JSON entry
                    # is often only the original file name
                    row |= {each: columns[each] for each in columns if not isinstance(row.get(each), bytes)}
                    row["__key__"] = name
            if row:
                yield with_lists(row)
        except Exception as error:  # a decompressor can raise any exception on corrupted data
            if row:
                yield with_lists(row)
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
        return own_columns(columns) if isinstance(columns, dict) else {ERROR_COLUMN: f"{field} is not a JSON object"}
    if suffix == "txt":
        return {prefix or "text": content.decode("utf-8-sig", errors="replace").strip()}
    return {field: content}
