"""Checks the versions of Python and of the libraries. The other modules cannot be imported with versions that are too
old, so the entry files import this one first. It imports none of the libraries."""

import importlib
import sys
from importlib import metadata


OLDEST = {"python": "3.10", "torch": "2.4", "diffusers": "0.31", "transformers": "4.44", "pillow": "10.1"}

# the modules of the packages that have another name
_MODULES = {"pillow": "PIL"}


def parsed(version: str) -> "tuple[int, ...]":
    """Returns the major and minor number of a version."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])


def _installed(package: str) -> str:
    """Returns the version of a package. A package that is not imported yet is not imported, because an old one can
    raise an error of its own, beside newer versions of the others."""
    name = _MODULES.get(package, package)
    if name not in sys.modules:
        try:
            # `None` in an environment whose metadata is broken
            version = metadata.version(package)
            if version:
                return version
        except metadata.PackageNotFoundError:  # a copy of its source code has no metadata
            pass
    return importlib.import_module(name).__version__


def check_versions() -> None:
    """Raises an `ImportError` if Python or a library is too old. pip checks the versions of the installed package, but
    not those for code that is loaded from the Hub."""
    for package, oldest in OLDEST.items():
        version = "{}.{}.{}".format(*sys.version_info) if package == "python" else _installed(package)
        if parsed(version) < parsed(oldest):
            raise ImportError(f"diffusers-ssr needs {package} {oldest} or newer, but {version} is installed.")


check_versions()
