"""Mutation testing: make small faults in a module one at a time, and list those that no test detects.

    pip install cosmic-ray
    python -m tools.mutants modeling_ssr mixin_ssr --tests tests/test_modeling_ssr.py tests/test_selection.py

cosmic-ray changes operators, numbers and conditions. This script adds mutants without a statement, a keyword argument,
an element of a tuple, an operand or a conversion (`.to(...)`, `.eval()`). Annotations, decorators, imports, docstrings
and raised errors are not changed. A first run with coverage determines which tests reach which line. Each mutant is
only tested with these tests, the fastest ones first, in a process that is forked from a process with the imported
libraries. The file of the module is not changed.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.machinery
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent
PARTS_LEFT_OUT = (
    "eval",
    "to",
    "detach",
    "cpu",
    "float",
    "contiguous",
    "clone",
    "clamp",
    "log",
    "sqrt",
    "bool",
    "copy",
)


class Mutant(NamedTuple):
    start: tuple[int, int]
    end: tuple[int, int]
    what: str
    code: str


def cosmic_ray_mutants(code: str) -> Iterator[Mutant]:
    """Yields one mutant of each kind at each place, because one of the many possible operators is enough."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    tree, seen = get_ast(code), set()
    for name in sorted(cosmic_ray.plugins.operator_names(), key=lambda name: random.Random(name).random()):
        operator_class = cosmic_ray.plugins.get_operator(name)
        if operator_class.arguments() or "RemoveDecorator" in name:
            continue
        operator = operator_class()
        places = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        for index, (start, end) in enumerate(places):
            kind = start, end, name.split("_")[0]
            if kind not in seen:
                seen.add(kind)
                yield Mutant(tuple(start), tuple(end), name.removeprefix("core/"), mutate_code(code, operator, index))


def left_out(code: str) -> Iterator[Mutant]:
    """Yields mutants without a part of the code."""
    lines = code.splitlines(keepends=True)
    # `ast` counts columns in bytes, and the modules only contain ASCII
    starts = [0, *(sum(len(line) for line in lines[: index + 1]) for index in range(len(lines)))]

    def replaced(node: ast.AST, text: str, what: str) -> Mutant:
        begin, end = (starts[line - 1] + column for line, column in (
            (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        ))  # fmt: skip
        place = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        return Mutant(*place, what, code[:begin] + text + code[end:])

    def without(node: ast.AST, parent: ast.AST, name: str, index: int) -> str:
        # only the parent is unparsed, so the other lines do not change
        kept = list(getattr(parent, name))
        del kept[index]
        changed = type(parent)(**{**{field: getattr(parent, field) for field in parent._fields}, name: kept})
        return f"({ast.unparse(ast.fix_missing_locations(ast.copy_location(changed, parent)))})"

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign, ast.Delete)):
            yield replaced(node, "pass", "statement")
        elif isinstance(node, ast.Call):
            for index in range(len(node.keywords)):
                yield replaced(node, without(node.keywords[index], node, "keywords", index), "keyword argument")
            if isinstance(node.func, ast.Attribute) and node.func.attr in PARTS_LEFT_OUT:
                yield replaced(node, ast.unparse(node.func.value), "call of a method")
        elif isinstance(node, (ast.Tuple, ast.List)) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
            for index in range(len(node.elts)):
                yield replaced(node, without(node.elts[index], node, "elts", index), "element")
        elif isinstance(node, ast.BoolOp):
            for index, operand in enumerate(node.values):
                kept = [each for each in node.values if each is not operand]
                joined = " and " if isinstance(node.op, ast.And) else " or "
                yield replaced(
                    node, "(" + joined.join(f"({ast.unparse(each)})" for each in kept) + ")", f"operand {index}"
                )
        elif isinstance(node, ast.IfExp):
            for kept in (node.body, node.orelse):
                yield replaced(node, f"({ast.unparse(kept)})", "choice")


def untouched(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns the places that are not mutated, because no test is expected to detect a change there."""
    nodes: list[ast.AST] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom)):
            nodes.append(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, (ast.Constant, ast.Yield)):
            nodes.append(node)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            nodes.append(node)
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                nodes.append(getattr(node, name))
        nodes += getattr(node, "decorator_list", [])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "cast":
            nodes.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def mutants_of(code: str, sample: int, seed: int) -> tuple[list[Mutant], int]:
    spared, mutants, codes = untouched(code), [], {code}
    for mutant in (*cosmic_ray_mutants(code), *left_out(code)):
        inside = any(start <= mutant.start and mutant.end <= end for start, end in spared)
        if not inside and mutant.code not in codes and is_python(mutant.code):
            codes.add(mutant.code)
            mutants.append(mutant)
    chosen = random.Random(seed).sample(mutants, min(sample, len(mutants)))
    return sorted(chosen), len(mutants)


def run_with_coverage(tests: list[str], folder: Path) -> None:
    config = folder / "coveragerc"
    config.write_text(
        f"[run]\nsource = {ROOT}\nomit = {ROOT}/.venv*/*, {ROOT}/tests/*\ndata_file = {folder}/coverage\n"
    )
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        "-vv",
        "--cov",
        f"--cov-config={config}",
        "--cov-report=",
    ]
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, "--cov-context=test", *tests], cwd=ROOT, stdout=log, check=True
        )


def durations_of(log: Path) -> dict[str, float]:
    durations: dict[str, float] = {}
    for seconds, test in re.findall(r"^([\d.]+)s (?:setup|call) +(tests/.*)$", log.read_text(), re.M):
        durations[test] = durations.get(test, 0.0) + float(seconds)
    return durations


class Reach:
    """Finds the tests that reach a line of a module."""

    def __init__(self, folder: Path, module: Path, seconds: float):
        from coverage import CoverageData

        data = CoverageData(str(folder / "coverage"))
        data.read()
        self.contexts = data.contexts_by_lineno(str(module))
        self.durations, self.seconds = durations_of(folder / "log"), seconds
        self.statements = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.stmt)]

    def tests(self, line: int) -> list[str]:
        around = [node for node in self.statements if node.lineno <= line <= node.end_lineno]
        first, last = line, line
        if around:
            node = max(around, key=lambda node: node.lineno)
            first, last = node.lineno, node.end_lineno
            if getattr(node, "body", None):
                last = max(first, min(last, node.body[0].lineno - 1))
        found = {each for number in range(first, last + 1) for each in self.contexts.get(number, ())}
        tests = {each.rpartition("|")[0] for each in found if "|" in each}
        if not tests or "" in found:  # the line runs at import
            tests |= {each.rpartition("|")[0] for known in self.contexts.values() for each in known if "|" in each}
        chosen, total = [], 0.0
        for test in sorted(tests, key=lambda test: (self.durations.get(test, 0.0), test)):
            total += self.durations.get(test, 0.0) + 0.02
            if chosen and total > self.seconds:
                break
            chosen.append(test)
        return chosen


def import_libraries(tests: list[str], folder: Path) -> None:
    """Imports all libraries that the tests need. A forked process collects the tests to find them."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hf-home"))
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    names = folder / "imported"
    child = os.fork()
    if child == 0:
        import pytest

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        files = sorted({test.partition("::")[0] for test in tests})
        pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", *files])
        own = "diffusers_ssr", "conftest", "__main__", "test_"
        imported = [
            name
            for name, module in list(sys.modules.items())
            if "site-packages" in (getattr(module, "__file__", None) or "") and not name.startswith(own)
        ]
        names.write_text("\n".join(imported))
        os._exit(0)
    os.waitpid(child, 0)
    for name in names.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def survives(module: Path, code: str, tests: list[str], timeout: float, log: Path) -> bool:
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        get_code = importlib.machinery.SourceFileLoader.get_code

        def get_mutated_code(self, name):
            if os.path.samefile(self.path, module):
                return compile(code, str(module), "exec", dont_inherit=True)
            return get_code(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_mutated_code
        result = 1
        try:
            import pytest

            result = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        finally:
            os._exit(int(result))
    deadline = time.monotonic() + timeout
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if ended == (0, 0):
        os.waitpid(child, 0)
        return False
    return ended[1] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", nargs="+", help="modules in the root folder, without .py")
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("--sample", type=int, default=100, help="number of mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="maximum duration of the tests of one mutant")
    parser.add_argument("--work_dir", type=Path, help="folder that keeps the coverage data for later runs")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of mutants from the output of an earlier run")
    args = parser.parse_args()
    folder = args.work_dir or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "coverage").exists():
        run_with_coverage(args.tests, folder)
    import_libraries(list(durations_of(folder / "log")), folder)
    for name in args.modules:
        module = ROOT / f"{name}.py"
        code = module.read_text()
        reach, (mutants, count) = Reach(folder, module, args.seconds), mutants_of(code, args.sample, args.seed)
        if not survives(module, code, reach.tests(1), 600, folder / "mutant.log"):
            raise SystemExit(f"the tests of {name} fail without a mutant: see {folder / 'mutant.log'}")
        survivors = 0
        for number, mutant in enumerate(mutants):
            if args.only and number not in args.only:
                continue
            tests = reach.tests(mutant.start[0])
            if survives(module, mutant.code, tests, 60 + 5 * args.seconds, folder / "mutant.log"):
                survivors += 1
                old, new = (text.splitlines() for text in (code, mutant.code))
                shown = [f"    -{line.strip()}" for line in old if line not in new] + [
                    f"    +{line.strip()}" for line in new if line not in old
                ]
                place = f"{name}.py:{mutant.start[0]}:{mutant.start[1]}"
                print(f"{number} {place} {mutant.what}, {len(tests)} tests", *shown[:6], sep="\n", flush=True)
        print(f"{name}: {len(mutants)} of {count} mutants tried, {survivors} survived", flush=True)


if __name__ == "__main__":
    main()
