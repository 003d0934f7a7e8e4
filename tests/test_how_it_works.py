"""Tests that the files and functions that docs/how_it_works.md mentions exist."""

import ast
import re

import pytest
from conftest import ROOT


TEXT = (ROOT / "docs" / "how_it_works.md").read_text()
FILES = {name: (ROOT / name).read_text() for name in re.findall(r"\b\w+\.py\b", TEXT) if (ROOT / name).is_file()}


def defined_in(source: str) -> set[str]:
    """Returns the names of functions, classes, methods (`Class.method`) and assigned variables and attributes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def rows() -> list[tuple[str, str]]:
    table = TEXT.partition("| Question | File | Function |")[2].partition("\n\n")[0]
    cells = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return [(file.strip(), functions) for _, file, functions in cells]


@pytest.mark.parametrize("file, functions", rows())
def test_functions_in_the_table_exist_in_their_file(file, functions):
    named = re.findall(r"`([\w.]+)`", functions)
    others = re.findall(r"\b\w+\.py\b", functions)
    known = set().union(*(defined_in(FILES[each]) for each in (file, *others)))
    assert set(named) <= known, set(named) - known
    assert not named or defined_in(FILES[file]) & set(named)


def test_names_in_the_text_exist():
    everything = set().union(*map(defined_in, FILES.values()))
    of_others = {"DiffusionPipeline", "None", "Q"}
    named = set(re.findall(r"`(_\w+|[A-Z]\w*(?:\.\w+)?)`", TEXT)) - of_others
    assert len(named) > 20 and named <= everything, named - everything


def test_every_module_is_mentioned():
    """The entry files with the pipeline classes are not checked, because they are mentioned together."""
    modules = {file.name for file in ROOT.glob("*.py")} - {"__init__.py", "setup.py", "conftest.py"}
    assert {name for name in modules if not name.startswith("pipeline_ssr")} <= set(FILES)
