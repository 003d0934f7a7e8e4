"""Checks whether a file is safe to open, and writes files and folders completely or not at all."""

import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


_WEIGHTS = re.compile(r"(?P<stem>.+?)(?P<shard>-\d{5}-of-\d{5})?\.(safetensors|bin)")


def check_regular_file(file: str | os.PathLike, name: str) -> None:
    r"""
    Raise an error for a path that cannot be read as a file. Opening a named pipe or a device could wait for ever.

    Args:
        file (`str` or `os.PathLike`):
            The path.
        name (`str`):
            The name of the argument, for errors.

    Raises:
        `FileNotFoundError`: if the file does not exist.
        `ValueError`: if it is a folder, a device or a named pipe, or if the name is not a valid file name.
    """
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except ValueError as error:  # a zero byte, or a character that the file system cannot encode
        raise ValueError(f"`{name}`: {os.fspath(file)!r} cannot be the name of a file: {error}.") from error
    if not regular:
        raise ValueError(f"`{name}`: {os.fspath(file)!r} is no regular file.")


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    r"""
    Write a file completely or not at all. Readers see the old file or the new one. Several threads and processes can write the
    same file, and the last one wins.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Yields:
        `Path`: a new name in the same folder. This file replaces `path` at the end of the block, and is deleted if the block
        raises an error.

    Example:

    ```py
    >>> with atomic_file("cat.safetensors") as partial:
    ...     save_file(tensors, partial)
    ```
    """
    # replacing a symbolic link would not change the file that it points to
    target = Path(os.path.realpath(path))
    # a unique name for each writer, and a short one, because `path` may have the maximum length
    partial = target.parent / f".{uuid.uuid4().hex}.part"
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    r"""
    Write a folder of files completely or not at all. If the disk is full, or after any other error, the folder is unchanged.
    Other files in it are kept, except for old shards of weights that are replaced. (If the process is killed while the finished
    files are moved, some files can be new and others old.)

    Args:
        folder (`str` or `os.PathLike`):
            The folder. It is created if it does not exist.

    Yields:
        `Path`: an empty folder with the same name on the same disk. Its files are moved to `folder` at the end of the block.

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
    # inside the folder, so on the same file system, where moving needs no disk space
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    # with the same name, which diffusers uses as the name of the repository with `push_to_hub`
    partial = staging / target.name
    try:
        partial.mkdir()
        yield partial
        _move_files(partial, target, staging / "replaced")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # only if it is empty: nothing was there before, and nothing was written
            target.rmdir()


def _move_files(source: Path, target: Path, replaced: Path) -> None:
    """Move all files of `source` to `target`, and the files that they replace to `replaced`. Errors undo all moves."""
    new = [file.relative_to(source) for file in sorted(source.rglob("*")) if not file.is_dir()]
    places = [*new, *_old_weights(new, target)]
    existed = {place: os.path.lexists(target / place) for place in places}
    begun = []
    try:
        for place in places:
            # noted before the move, so that an interrupt cannot come between the move and the note
            begun.append(place)
            for folder in (target, replaced):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
            if existed[place]:
                os.replace(target / place, replaced / place)
            if os.path.lexists(source / place):
                os.replace(source / place, target / place)
    except BaseException:
        for place in begun:
            if os.path.lexists(replaced / place):
                os.replace(replaced / place, target / place)
            elif not existed[place]:
                (target / place).unlink(missing_ok=True)
        raise


def _old_weights(new: list[Path], target: Path) -> list[Path]:
    """Old shards and index files of weights that `new` contains. An old index file would refer to old shards."""
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
