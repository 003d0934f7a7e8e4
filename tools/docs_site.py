"""MkDocs hooks that convert links between files of the repository to links of the documentation site.

The pages in docs/ link to other files of the repository with relative paths. These links work on GitHub. The site
serves the other files under `repository/`.

The API reference is made from a copy of the modules. The repository itself is the package, so mkdocstrings would search
all of its folders for modules, including environments, which takes minutes. In the copy, the markup of the docstrings,
which is that of diffusers, is converted to that of mkdocstrings.
"""

import re
import tempfile
from pathlib import Path, PurePosixPath

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parent.parent
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")


@event_priority(100)  # before mkdocstrings, which reads its options in the same event
def on_config(config):
    # removed at the end of the process
    folder = config["package_copy"] = tempfile.TemporaryDirectory(prefix="docs-package-")
    package = Path(folder.name, "diffusers_ssr")
    package.mkdir()
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: diffusers_ssr\.(\w+)", page, re.MULTILINE))
    for module in ROOT.glob("*.py"):
        text = with_site_markup(module.read_text(encoding="utf-8"), shown)
        (package / module.name).write_text(text, encoding="utf-8")
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [folder.name]
    return config


def with_site_markup(text: str, shown: set[str]) -> str:
    """Converts the markup of docstrings: [`Class`] becomes a link if the API reference shows the class, and otherwise
    code, and examples with `>>>` become a block of that language."""

    def reference(found):
        name = found[1]
        return f"[`{name}`][diffusers_ssr.{name}]" if name.partition(".")[0] in shown else f"`{name}`"

    return REFERENCE.sub(reference, re.sub(r"```py(?=\n\s*>>>)", "```pycon", text))


def outside_files() -> set[str]:
    """Returns the files outside of docs/ that the pages link to, directly or through other linked pages, as paths in
    the repository."""
    found, waiting = set(), list((ROOT / "docs").glob("*.md"))
    while waiting:
        page = waiting.pop()
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            file = (page.parent / link[1]).resolve()
            path = file.relative_to(ROOT).as_posix()
            if file.is_file() and not path.startswith("docs/") and path not in found:
                found.add(path)
                waiting += [file] if file.suffix == ".md" else []
    return found


def on_files(files, config):
    for path in sorted(outside_files()):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Converts links that are relative to the page's path in the repository to links that are relative to its path on
    the site."""
    source = PurePosixPath(page.file.src_uri)
    outside = source.parts[0] == "repository"
    folder = ROOT / source.relative_to("repository").parent if outside else ROOT / "docs" / source.parent

    def rewrite(found):
        target = (folder / found[2]).resolve()
        path = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        uri = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
        if files.get_file_from_path(uri) is None:
            # a folder has no page on the site, so its link leads to the top of the current page
            return f"{found[1]}{found[2]}{found[3]}" if not target.is_dir() else "](#)"
        up = "../" * (len(source.parts) - 1)
        return f"{found[1]}{up}{uri}{found[3]}"

    return LINK.sub(rewrite, markdown)


def on_page_content(html, page, config, files):
    """Renders the markup of types in the API reference, which mkdocstrings shows as plain text in code."""

    def render(found):
        text = re.sub(r"\[`([^`]+)`\]\[([\w.]+)\]", r'<a href="#\2">`\1`</a>', found[1])
        return re.sub(r"\*(\w+)\*", r"<em>\1</em>", re.sub(r"`([^`]+)`", r"<code>\1</code>", text))

    return re.sub(r"<code>([^<]*`[^<]*)</code>", render, html) if page.file.src_uri == "api.md" else html
