"""MkDocs hooks that adapt the links of the pages to the site.

The pages in docs/ link to files elsewhere in the repository. On the site, these files are under `repository/`.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")


def outside_files() -> set[str]:
    """The files that the pages link to outside of docs/, as paths in the repository, and those that these link to."""
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
    """Links, relative to a page's place in the repository, become relative to its place on the site."""
    source = PurePosixPath(page.file.src_uri)
    outside = source.parts[0] == "repository"
    folder = ROOT / source.relative_to("repository").parent if outside else ROOT / "docs" / source.parent

    def rewrite(found):
        target = (folder / found[2]).resolve()
        path = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        uri = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
        if files.get_file_from_path(uri) is None:
            # a folder has no page: the link's text alone is left
            return f"{found[1]}{found[2]}{found[3]}" if not target.is_dir() else "](#)"
        up = "../" * (len(source.parts) - 1)
        return f"{found[1]}{up}{uri}{found[3]}"

    return LINK.sub(rewrite, markdown)
