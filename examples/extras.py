"""Prints how to install missing packages instead of a traceback.

Packages that only some scripts need are optional dependencies ("extras") of the project, listed in pyproject.toml.
Scripts import this module before any third-party package, because it first checks the dependencies of the project.
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
    """Context manager for the imports of a script. If a package is not installed, the script exits and prints the
    command that installs the optional dependencies `extra`, such as `"train"`."""
    try:
        yield
    except ModuleNotFoundError as error:
        _exit((error.name or "").partition(".")[0], f'pip install -e ".[{extra}]"')


def is_installed(package: str) -> bool:
    """Returns whether `package` can be imported."""
    return importlib.util.find_spec(package) is not None


if not is_installed("diffusers_ssr"):
    _exit("diffusers_ssr", "pip install -e .")
