"""The help of the example scripts, with commands that can be copied and the defaults of the options, and the types of
their options."""

import argparse
import re
import textwrap


def positive(text: str) -> int:
    """The type of an option that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"has to be a positive whole number, but is {text!r}")
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
