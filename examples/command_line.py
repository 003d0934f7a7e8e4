"""The command line of the example scripts: help texts with commands that can be copied, the types of the options, and
messages for invalid options and files."""

import argparse
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError


# Errors of invalid options and files. A failed connection raises an error of the HTTP library that huggingface_hub uses,
# which depends on its version.
_USER_ERRORS = (ValueError, OSError, *HfHubHTTPError.__bases__)


def positive(text: str) -> int:
    """The type of an option that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"has to be a positive whole number, but is {text!r}")
    return int(text)


def port(text: str) -> int:
    """The type of an option that is a port of a server."""
    if positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"has to be from 1 to 65535, but is {text!r}")
    return int(text)


def seed(text: str) -> int:
    """The type of an option that is the seed of a generator."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"has to be a whole number from 0 to 2**63 - 1, but is {text!r}")
    return int(text)


def picture_side(text: str) -> int:
    """The type of an option that is a height or width in pixels."""
    if positive(text) % 8:
        raise argparse.ArgumentTypeError(f"has to be a multiple of 8, but is {text!r}")
    return int(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wraps the paragraphs of the description, keeps indented lines unchanged, and shows the defaults of options."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        filled = [each if each.startswith(" ") else textwrap.fill(each, width) for each in paragraphs]
        return "\n\n".join(filled) + "\n"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: ...)" is not useful for `None` and `False`, or if the help text already describes the default
        said = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def share(text: str) -> float:
    """The type of an option that is a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"has to be a number from 0 to 1, but is {text!r}")
    return number


def output_folder(text: str) -> Path:
    """The type of an option that is a folder to write to. It is created later."""
    folder = Path(text)
    file = next((each for each in (folder, *folder.parents) if each.exists() and not each.is_dir()), None)
    if file is not None:
        raise argparse.ArgumentTypeError(f"has to be a folder, but {file} is a file")
    return folder


def check_unused(
    parser: argparse.ArgumentParser, args: argparse.Namespace, unused: Mapping[str, Sequence[str]]
) -> None:
    """
    Ends the script with a message if an option was passed that has no effect together with another option.

    Args:
        parser (`argparse.ArgumentParser`), args (`argparse.Namespace`): the parser, and what it has parsed.
        unused (`Mapping[str, Sequence[str]]`): for the name of each option, the names of those without an effect.
    """
    for option, names in unused.items():
        for name in names if getattr(args, option) not in (None, False) else ():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"argument --{name}: has no effect with --{option}")


def check_companions(
    parser: argparse.ArgumentParser, args: argparse.Namespace, companions: Mapping[str, Sequence[str]]
) -> None:
    """
    Ends the script with a message if an option was passed that has no effect without another option.

    Args:
        parser (`argparse.ArgumentParser`), args (`argparse.Namespace`): the parser, and what it has parsed.
        companions (`Mapping[str, Sequence[str]]`): for the name of each option, the names of those that depend on it.
    """
    for option, dependents in companions.items():
        if getattr(args, option) not in (None, False):
            continue
        for name in dependents:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"argument --{name}: has no effect without --{option}")


@contextmanager
def naming(option: str, value: object) -> Iterator[None]:
    """
    Context manager for code that reads the file or loads the model of an option. If it raises an error, the error is
    raised again as a `ValueError` that names the option and its value.

    Example:

    ```py
    >>> with naming("--controlnet", args.controlnet):
    ...     controlnet = ControlNetModel.from_pretrained(args.controlnet)
    ```
    """
    try:
        yield
    except _USER_ERRORS as error:
        raise ValueError(f"{option}: {value} cannot be loaded: {error}") from error


def run_script(main: Callable[[], int | None]) -> None:
    """
    Runs the `main` function of a script, and exits with the status that it returns. If an option or a file is not
    valid, the script prints the message of the error without a traceback, and exits with status 1. The environment
    variable `DIFFUSERS_VERBOSITY=debug` shows the traceback.

    Args:
        main (`Callable[[], int | None]`): the function. It returns `None` for status 0.
    """
    script = os.path.basename(sys.argv[0])
    try:
        status = main()
    except _USER_ERRORS as error:
        if os.environ.get("DIFFUSERS_VERBOSITY") == "debug":
            raise
        raise SystemExit(f"{script}: error: {error}") from None
    if status:
        sys.exit(status)
