"""Tests of README and docs: the Python code runs, the commands are valid, and the links have targets."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import check_script, make_targets, shell_lines, split_command
from conftest import POCKET, ROOT
from diffusers.utils import logging
from PIL import Image


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    POCKET / "README.md",
]
REAL = "# with a real checkpoint"
SHELL = ("bash", "sh", "powershell")
# commands that are not part of this repository
FAMILIAR = {"cp", "git", "cd", "conda", "sudo", "tensorboard", "deactivate", "source", "ruff", "pre-commit", "py"}

page = pytest.mark.parametrize("page", PAGES, ids=lambda file: str(file.relative_to(ROOT)))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Returns the language and the text of every fenced code block."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A writable folder with links to the files of the repository."""
    for item in ROOT.iterdir():
        if not item.name.startswith(".") and item.name not in ("outputs", "build"):
            os.symlink(item, tmp_path / item.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@page
def test_python_blocks_run(page, checkout, capfd, one_thread):
    """The blocks of a page run in order in one namespace, with two steps for videos. Of a block that needs a real
    checkpoint, only the imports run."""
    logging.disable_progress_bar()
    namespace = {"__name__": "__main__"}
    for number, (language, text) in enumerate(blocks(page)):
        if language != "python":
            continue
        if page.name == "video.md":
            text = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", text)
        code = compile(text, f"{page.name}, block {number}", "exec")
        if text.startswith(REAL):
            imports = [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            code = compile(ast.Module(imports, []), page.name, "exec")
        exec(code, namespace)
    if page == ROOT / "README.md":  # the image that is shown beside the quick start
        shown, made = (
            np.asarray(Image.open(file).convert("RGB")).astype(int) for file in ("docs/quick_start.png", "cat.png")
        )
        assert np.abs(made - shown).max() <= 8  # libraries round differently


def test_the_quick_start_has_the_settings_of_pocket_and_its_image():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    settings = json.loads((POCKET / "settings.json").read_text())
    settings["subject_scale"] = settings.pop("scale")
    code = next(text for language, text in blocks(ROOT / "README.md") if language == "python")
    assert all(f"{name}={value}" in code for name, value in settings.items())
    assert text.index("```python") < text.index("docs/quick_start.png") < text.index(REAL)


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 850
    assert text.index("docs/figure.jpg") < text.index("make demo") < text.index("Nothing here was run on real weights")


@pytest.mark.parametrize("url", ["", "git@github.com:owner/repo.git", "https://huggingface.co/owner/repo"])
def test_the_long_description_has_no_front_matter_and_no_relative_links(tmp_path, url):
    for name in ("setup.py", "README.md", "pyproject.toml", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "py.typed").touch()
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "long_description.py", tmp_path / "tools")
    if url:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", url], check=True)
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metadata = (tmp_path / "diffusers_ssr.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    description = metadata.partition("\n\n")[2]
    assert description.startswith("# SSR-Encoder for diffusers") and "text/markdown" in metadata
    links = re.findall(r"\]\(([^)\s]+)\)", without_blocks(description))
    assert links and all(link.startswith("https://") for link in links)
    image = {"": None, "git": "https://github.com/owner/repo/raw/HEAD/docs/figure.jpg"}.get(
        url[:3], f"{url}/resolve/main/docs/figure.jpg"
    )
    assert image is None or image in links


def check_pip(words: list[str], name: str) -> None:
    """Checks that the extras in a `pip install` command of this project exist."""
    section = (
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n\n[")[0]
    )
    known = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    for extras in re.findall(rf"(?:\.|{name})\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= known, extras


def check_command(line: str, monkeypatch) -> None:
    """Checks that a line of a shell block is a valid command."""
    words = split_command(line.replace(".venv\\Scripts\\python", "python").replace("\\", "/"))
    if words[:2] == ["-m", "pip"]:
        words = words[1:]
    if words[0].startswith("ACCELERATE_"):  # a variable of the environment
        words = words[1:]
    if words[0] == "torchrun":
        words = words[words.index("-m") :]
    if words[0] == "make":
        assert words[1] in make_targets(), f"make target {words[1]} does not exist"
    elif words[0] == "pip":
        check_pip(words, "diffusers-ssr")
    elif words[0].startswith(("examples/", "tools/")):
        check_script(words, monkeypatch)
    elif words[0] == "-m" and words[1].startswith("tools."):
        module = ROOT / words[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), f"no module {words[1]}"
    else:
        assert words[0] in FAMILIAR or words[:2] == ["-m", "venv"] or words[0] == "-c", f"unknown command: {line}"


@page
def test_shell_commands_exist(page, monkeypatch):
    lines = [line for language, text in blocks(page) if language in SHELL for line in shell_lines(text)]
    text = without_blocks(page.read_text(encoding="utf-8"))
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]
    lines += [span for span in spans if re.match(r"(make|python|accelerate launch) \S", span) and "..." not in span]
    for line in lines:
        check_command(line, monkeypatch)


def slugs(page: Path) -> set[str]:
    """Returns the anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@page
def test_link_targets_exist(page):
    text = without_blocks(page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"(https?|mailto):", link):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?|mailto:\S+", link), link
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{link}: {file} does not exist"
        assert not anchor or anchor in slugs(file), f"{link}: the heading does not exist"


def strings_of(file: Path) -> list[str]:
    """Returns the strings in a Python file, with "..." for the replacement fields of f-strings."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (each.value if isinstance(each, ast.Constant) else "..." for each in node.values)
            found.append("".join(parts))
    return found


def test_troubleshooting_quotes_messages_exactly():
    """Only checks quoted messages of this project, because messages of other libraries change with their versions."""
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "troubleshooting.md").read_text())
    quoted = [each for each in re.findall(r'\*\*"([^"]+)"', text) if each.startswith("`") or "SSR-Encoder in" in each]
    assert len(quoted) >= 5
    known = " ".join(s for file in [*ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")] for s in strings_of(file))
    known = re.sub(r"torch\.\w+|\d+", "...", re.sub(r"\s+", " ", known))
    for each in quoted:
        message = re.sub(r"torch\.\w+|\d+", "...", each).rstrip(".")
        assert message in known, each


def test_every_page_is_in_the_index_and_the_navigation():
    index = (ROOT / "docs" / "README.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    for file in (ROOT / "docs").glob("*.md"):
        if file.name != "README.md":
            assert f"({file.name})" in index, f"docs/README.md does not link {file.name}"
        assert file.name in navigation, f"mkdocs.yml does not contain {file.name}"


def test_the_images_of_the_guide_are_shown_and_can_be_made():
    from tools.guide_images import NAMES, file_of

    files = set((ROOT / "docs" / "images").iterdir())
    assert files == {file_of(name) for name in NAMES}
    assert sum(file.stat().st_size for file in files) < 600_000
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md"))
    for file in files:
        assert f"](images/{file.name})" in text, f"no page shows {file.name}"


def test_tests_in_the_composition_table_exist():
    text = (ROOT / "docs" / "composition.md").read_text()
    named = re.findall(r"`(test_\w+\.py)((?:::\w+)?)`((?:, `::\w+`)*)", text)
    assert len(named) > 10
    for file, first, more in named:
        source = (ROOT / "tests" / file).read_text()
        for function in re.findall(r"::(\w+)", first + more):
            assert f"def {function}(" in source, f"{file} has no {function}"


def test_the_training_guide_with_two_steps(checkout, monkeypatch):
    """Runs the data preparation and the training command of the guide with two steps. The result can be loaded and
    used."""
    page = ROOT / "docs" / "training.md"
    python = [text for language, text in blocks(page) if language == "python"]
    exec(python[0], {})
    lines = [line for language, text in blocks(page) if language == "bash" for line in shell_lines(text)]
    (command,) = [line for line in lines if "--ssr_encoder_name_or_path pocket" in line]
    words = split_command(command.replace("--max_train_steps 1000", "--max_train_steps 2"))
    assert words[words.index("--max_train_steps") + 1] == "2"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((checkout / "my-ssr" / "bad_samples.json").read_text()) == {}
    assert python[1].startswith(REAL)
    exec(python[1], {})
    assert (checkout / "dog.png").exists()


def test_the_notebook_runs_from_top_to_bottom(checkout):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is optional; the code blocks of the docs cover it")
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "ssr_encoder.ipynb", as_version=4)
    steps = '"num_inference_steps": 12'
    assert sum(steps in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:  # two steps are faster
        cell.source = cell.source.replace(steps, '"num_inference_steps": 2')
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(checkout)}}
    ).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 8 and all(cell.execution_count for cell in cells)
    shown = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(shown) >= 4
