"""Checks which files are safe to open, and writes files and folders atomically."""

import errno
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusers.utils import logging


logger = logging.get_logger(__name__)

_WEIGHTS = re.compile(r"(?P<stem>.+?)(?P<shard>-\d{5}-of-\d{5})?\.(safetensors|bin)")


def check_regular_file(file: str | os.PathLike, name: str) -> None:
    r"""
    Raise an error if a path is not a regular file. Opening a named pipe or a device can block forever.

    Args:
        file (`str` or `os.PathLike`):
            The path.
        name (`str`):
            The name of the argument in error messages.

    Raises:
        `FileNotFoundError`: if the file does not exist.
        `ValueError`: if it is a folder, a device or a named pipe, or if the path is not a valid file name.
    """
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except ValueError as error:  # a zero byte, or a character that the file system cannot encode
        raise ValueError(f"`{name}`: {os.fspath(file)!r} cannot be the name of a file: {error}.") from error
    if not regular:
        raise ValueError(f"`{name}`: {os.fspath(file)!r} is not a regular file.")


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    r"""
    Write a file atomically. Other threads and processes always read either the complete old file or the complete new
    file. Several threads and processes can write the same file at the same time; the last one replaces the others.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Yields:
        `Path`: the path of a temporary file in the same folder. The temporary file replaces `path` when the block
        ends, and is deleted if the block raises an error.

    Raises:
        `OSError`: before the block runs, if `path` is a folder, or if no file can be written to its folder
        (`FileNotFoundError` if that does not exist).

    Example:

    ```py
    >>> with atomic_file("cat.safetensors") as partial:
    ...     save_file(tensors, partial)
    ```
    """
    # resolved, because `os.replace` would replace a symbolic link and not the file that it points to
    target = Path(os.path.realpath(path))
    # A unique name for each writer. It does not contain the name of `path`, which can already have the maximum length.
    partial = target.parent / f".{uuid.uuid4().hex}.part"
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "`path` is a folder, but has to be a file", os.fspath(path))
    try:
        # libraries that write the file would name the temporary file in their errors
        partial.touch()
        partial.unlink()
    except OSError as error:
        reason = (
            f"{error.strerror}: `path` has to be in a folder to which files can be written, but is in {target.parent}"
        )
        raise type(error)(error.errno, reason, os.fspath(path)) from None
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    r"""
    Write several files to a folder atomically: if an error occurs, for example because the disk is full, the folder is
    not changed. Other files in the folder are kept, except for the old shards of weights that are replaced. (If the
    process is killed while the finished files are moved, the folder can contain both new and old files.)

    Args:
        folder (`str` or `os.PathLike`):
            The folder. It is created if it does not exist.

    Yields:
        `Path`: an empty folder with the same name on the same disk. Its files are moved to `folder` when the block
        ends.

    Raises:
        `ValueError`: if `folder` is a file.

    Example:

    ```py
    >>> with atomic_folder("my-pipeline") as partial:
    ...     pipe.save_pretrained(partial)
    ```
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise ValueError(f"`folder`: {target} is a file, not a folder.")
    target.mkdir(parents=True, exist_ok=True)
    # inside the folder, because files can be moved without additional disk space only on the same file system
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    # with the same name as the folder, because diffusers uses it as the repository name in `push_to_hub`
    partial = staging / target.name
    replaced = staging / "replaced"
    moves = _Moves(partial, target, replaced)
    try:
        partial.mkdir()
        yield partial
        moves.do()
    except BaseException:
        try:
            moves.undo()
        finally:
            # a second time, in case Ctrl-C interrupted the first; it does nothing if everything is undone
            moves.undo()
        raise
    finally:
        if moves.done or not any(not file.is_dir() for file in replaced.rglob("*")):
            shutil.rmtree(staging, ignore_errors=True)
        else:
            logger.error(f"Some files of {target} could not be moved back: they are in {replaced}.")
        with suppress(OSError):  # fails if the folder is not empty
            target.rmdir()


class _Moves:
    """Moves all files of `source` to the same relative paths in `target`, and the files that they replace to
    `replaced`."""

    def __init__(self, source: Path, target: Path, replaced: Path):
        self.source, self.target, self.replaced = source, target, replaced
        self.existed: dict[Path, bool] = {}
        self.done = False

    def do(self) -> None:
        new = [file.relative_to(self.source) for file in sorted(self.source.rglob("*")) if not file.is_dir()]
        for place in (*new, *_old_weights(new, self.target)):
            # recorded before the first file is moved; otherwise an interrupt right after a move would not undo this
            # move
            self.existed[place] = os.path.lexists(self.target / place)
            for folder in (self.target, self.replaced):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
            if self.existed[place]:
                os.replace(self.target / place, self.replaced / place)
            if os.path.lexists(self.source / place):
                os.replace(self.source / place, self.target / place)
        self.done = True

    def undo(self) -> None:
        """Moves the old files back and deletes the new ones. It can be called repeatedly. A file that cannot be moved
        stays in `replaced`."""
        if self.done:
            return
        for place, existed in self.existed.items():
            with suppress(OSError):
                if os.path.lexists(self.replaced / place):
                    os.replace(self.replaced / place, self.target / place)
                elif not existed:
                    (self.target / place).unlink(missing_ok=True)


def _old_weights(new: list[Path], target: Path) -> list[Path]:
    """Returns the shards and index files in `target` of weights that `new` replaces. They have to be removed, because
    an old index file would make readers load the old shards."""
    weights = [(place, found) for place in new if (found := _WEIGHTS.fullmatch(place.name))]
    old = set()
    for place, found in weights:
        folder = target / place.parent
        for file in folder.iterdir() if folder.is_dir() else ():
            other = _WEIGHTS.fullmatch(file.name)
            shard = other is not None and other["shard"] is not None and other["stem"] == found["stem"]
            if shard or re.fullmatch(rf"{re.escape(found['stem'])}\.(safetensors|bin)\.index\.json", file.name):
                old.add(place.parent / file.name)
    return sorted(old - set(new))
