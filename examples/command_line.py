"""The command line of the example scripts: parsers, types of options, and messages for invalid options and files."""

import argparse
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError


# Errors of invalid options and files. A failed connection raises an error of the HTTP library that huggingface_hub uses,
# which depends on its version.
_USER_ERRORS = (ValueError, OSError, *HfHubHTTPError.__bases__)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wraps the paragraphs of the description, keeps indented lines unchanged, and shows the defaults of options."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in paragraphs) + "\n"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: ...)" is not useful for `None` and `False`, or if the help text already describes the default
        described = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if described else super()._get_help_string(action)


def make_parser(description: str | None, **kwargs) -> argparse.ArgumentParser:
    """Creates the parser of a script. Abbreviations are refused: `--output` could be a file, unlike `--output_dir`."""
    return argparse.ArgumentParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs
    )


def _whole(least: int, most: int = 2**63 - 1, multiple: int = 1) -> Callable[[str], int]:
    """Creates the type of an option that is a whole number."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most or int(text) % multiple:
            limits = f"of {least} or more" if most == 2**63 - 1 else f"from {least} to {most}"
            step = f", a multiple of {multiple}" if multiple > 1 else ""
            raise argparse.ArgumentTypeError(f"has to be a whole number {limits}{step}, but is {text!r}")
        return int(text)

    return convert


positive = _whole(1)
port = _whole(1, 65535)
seed = _whole(0)
image_side = _whole(8, 2**15, multiple=8)


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
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise argparse.ArgumentTypeError(f"has to be a folder, but {file} is a file")
    return folder


Groups = Mapping[str, Sequence[str]]


def check_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, unused: Groups) -> None:
    """Ends the script with a message if an option of `unused` was passed together with one that has no effect then."""
    _refuse(parser, args, unused, passed=True, reason="with")


def check_companions(parser: argparse.ArgumentParser, args: argparse.Namespace, companions: Groups) -> None:
    """Ends the script with a message if an option was passed without the option of `companions` that it depends on."""
    _refuse(parser, args, companions, passed=False, reason="without")


def _refuse(
    parser: argparse.ArgumentParser, args: argparse.Namespace, groups: Groups, passed: bool, reason: str
) -> None:
    for option, names in groups.items():
        for name in names if (getattr(args, option) not in (None, False)) == passed else ():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"argument --{name}: has no effect {reason} --{option}")


@contextmanager
def naming(option: str, value: object) -> Iterator[None]:
    """Adds the option and its value to the errors of the code that reads its file or loads its model."""
    try:
        yield
    except _USER_ERRORS as error:
        raise ValueError(f"{option}: {value} cannot be loaded: {error}") from error


def run_script(main: Callable[[], int | str | None]) -> None:
    """
    Runs the `main` function of a script and exits with the status or the message that it returns. A message has status
    1. If an option or a file is not valid, the message is that of the error, without a traceback. The environment
    variable `DIFFUSERS_VERBOSITY=debug` shows the traceback.
    """
    # names and prompts can contain characters that the encoding of the output lacks
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except _USER_ERRORS as error:
        if os.environ.get("DIFFUSERS_VERBOSITY") == "debug":
            raise
        status = f"{os.path.basename(sys.argv[0])}: error: {error}"
    if status:
        sys.stdout.flush()  # the message is printed after the output
        # torchrun and accelerate end their own traceback with the message in this file
        if isinstance(status, str) and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
            error = {"message": status, "extraInfo": {"timestamp": int(time.time())}}
            Path(file).write_text(json.dumps({"message": error}))
        sys.exit(status)
