"""Checks commands that a text prints, without carrying them out."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT


class Parsed(Exception):
    """The command's options are what the script takes."""


def shell_lines(text: str) -> list[str]:
    """The lines of a shell block, those that end in a backslash joined, without comments and prompts."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if line]


def check_script(words: list[str], monkeypatch) -> None:
    """`words` are a script of this repository and its arguments: it has to take them."""
    script = ROOT / words[0]
    assert script.is_file(), f"there is no script {words[0]}"
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    # an option that is not known ends in SystemExit
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")
    monkeypatch.undo()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def split_command(line: str) -> list[str]:
    """The words of a command, without settings of the environment before it and without what starts a script."""
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    for launcher in (["accelerate", "launch"], [".venv/bin/python"], ["python"], ["python3"]):
        if words[: len(launcher)] == launcher:
            words = words[len(launcher) :]
            while words and words[0].startswith("--") and launcher[0] == "accelerate":
                del words[:2]
            break
    return words


def example_scripts() -> list[Path]:
    """The scripts for users: the files in examples/ that can be run."""
    return sorted(file for file in (ROOT / "examples").glob("*.py") if "__main__" in file.read_text())
