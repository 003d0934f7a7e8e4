"""Formats the help of the example scripts, with commands that can be copied and the defaults of the options."""

import argparse
import re
import textwrap


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
