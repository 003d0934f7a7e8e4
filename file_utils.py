"""Which files are safe to open, and how files and folders are written whole or not at all."""

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
    Refuse what cannot be read as a file: opening a named pipe or a device may wait for ever.

    Args:
        file (`str` or `os.PathLike`):
            The path.
        name (`str`):
            What errors call it.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is a folder, a device or a named pipe, or if no file can have that name.
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
    Write a file whole or not at all. Readers see the old file or the new one, and threads and processes that write the same
    one do not disturb each other: the last one wins.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Yields:
        `Path`: a new name in the same folder. What is written there replaces `path` when the block ends, and is removed
        when the block raises.

    Example:

    ```py
    >>> with atomic_file("cat.safetensors") as partial:
    ...     save_file(tensors, partial)
    ```
    """
    # replacing a symbolic link would leave the file that it points to as it was
    target = Path(os.path.realpath(path))
    # a name of its own for each writer, and a short one: `path` may be as long as names can be
    partial = target.parent / f".{uuid.uuid4().hex}.part"
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    r"""
    Write a folder of files all or nothing: if the disk fills up, or anything else goes wrong, the folder stays as it was.
    Other files in it are kept, but for the shards of weights that are replaced. (If the process is killed in the instant in
    which the finished files are moved, some may be new and others old.)

    Args:
        folder (`str` or `os.PathLike`):
            The folder; it is made if it is not there.

    Yields:
        `Path`: an empty folder of the same name on the same disk. What is written there is moved into `folder` when the
        block ends.

    Raises:
        `ValueError`: if there is a file of that name.

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
    # inside the folder, and so surely on its file system: then moving needs no room
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    # of the same name, which diffusers takes for the repository's when it pushes
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
    """Move all files of `source` to the same places in `target`, and what they replace to `replaced`; undone on errors."""
    new = [file.relative_to(source) for file in sorted(source.rglob("*")) if not file.is_dir()]
    places = [*new, *_old_weights(new, target)]
    existed = {place: os.path.lexists(target / place) for place in places}
    begun = []
    try:
        for place in places:
            # before the first step, or an interrupt between step and note would leave the step
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
    """Shards and indices of weights that `new` brings anew. Left there, an old index would lead readers to old shards."""
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
