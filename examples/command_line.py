"""The help of the example scripts: commands on lines that can be copied, and every option's default."""

import argparse
import re
import textwrap


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wraps a description's paragraphs, keeps its indented lines as they are, and adds the defaults of the options."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        filled = [each if each.startswith(" ") else textwrap.fill(each, width) for each in paragraphs]
        return "\n\n".join(filled) + "\n"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # options without a default, or with a default in their help, need no "(default: None)"
        said = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)
