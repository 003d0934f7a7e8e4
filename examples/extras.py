"""Prints how to install a missing package, instead of a traceback.

The packages that only some scripts need are optional dependencies ("extras") of the project, listed in pyproject.toml.
Scripts import this module before any third-party package, so that it can check the project's own dependencies first.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


def _exit(package: str, install: str) -> NoReturn:
    script = Path(sys.argv[0]).name
    sys.exit(
        f"{script} needs the package {package}, which is not installed. In the repository's folder run\n\n    {install}\n"
    )


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """
    For the imports of a script: if one of them is not installed, exit with the command that installs it.

    Args:
        extra (`str`): the name of the optional dependencies that the imports belong to, such as `"train"`.

    Example:

    ```py
    >>> with needs("train"):
    ...     from accelerate import PartialState
    ```
    """
    try:
        yield
    except ModuleNotFoundError as error:
        _exit((error.name or "").partition(".")[0], f'pip install -e ".[{extra}]"')


def is_installed(package: str) -> bool:
    """Whether `package` can be imported."""
    return importlib.util.find_spec(package) is not None


if not is_installed("diffusers_ssr"):
    _exit("diffusers_ssr", "pip install -e .")
