"""Helpers that check the commands in a text without executing them."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT


class Parsed(Exception):
    """Raised after the options of a command were parsed without an error."""


def shell_lines(text: str) -> list[str]:
    """Returns the lines of a shell block without comments and prompts. Lines that end with a backslash are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if line]


def check_script(words: list[str], monkeypatch) -> None:
    """Checks that a script of this repository accepts its arguments. `words` are the script and its arguments."""
    script = ROOT / words[0]
    assert script.is_file(), f"script {words[0]} does not exist"
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    # unknown options raise SystemExit
    with pytest.raises(SystemExit if "--help" in words else Parsed) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not getattr(ended.value, "code", 0)
    monkeypatch.undo()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def split_command(line: str) -> list[str]:
    """Splits a command into words, without environment variables and without the launcher (python, torchrun,
    accelerate launch)."""
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    for launcher in (["accelerate", "launch"], ["torchrun"], [".venv/bin/python"], ["python"], ["python3"]):
        if words[: len(launcher)] == launcher:
            words = words[len(launcher) :]
            while words and words[0].startswith("--") and launcher[0] in ("accelerate", "torchrun"):
                del words[: 1 if words[0] == "--standalone" else 2]
            break
    return words


def example_scripts() -> list[Path]:
    """Returns the scripts in examples/, which are the files that can be run."""

    def is_script(file: Path) -> bool:
        return any(
            isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in ast.parse(file.read_text()).body
        )

    return sorted(filter(is_script, (ROOT / "examples").glob("*.py")))
