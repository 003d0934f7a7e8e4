"""Assembles the repository of a Hugging Face Space with the page of app.py."""

import shutil
from importlib import metadata
from pathlib import Path

from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from drawing import CODE
from huggingface_hub import SpaceCard, SpaceCardData
from packaging.requirements import Requirement


HERE = Path(__file__).resolve().parent
# parts of the pocket checkpoint that the page does not use
LEFT_OUT = ("judge", "look")

APP = '''"""Starts the page, with these options."""

from page.server import main


ARGUMENTS = {arguments!r}

if __name__ == "__main__":
    main(ARGUMENTS)
'''

CARD = """---
{data}
---

# {title}

Upload a reference image, name one of the things in it or paint over it, and generate new images of that thing:
[SSR-Encoder](https://arxiv.org/abs/2312.16272) for diffusers. `python app.py` starts the page on your own machine.
"""


def write_space(folder: Path, arguments: list[str], models: list[str], weights: Path | None = None) -> None:
    """
    Writes the repository of a Space: the card, app.py, requirements.txt, the page, and the modules of the package.

    Args:
        folder (`Path`):
            The folder of the repository.
        arguments (`list[str]`):
            The options of the page, in the form that app.py accepts.
        models (`list[str]`):
            The repositories on the Hub that the page loads. They are listed in the card.
        weights (`Path`, *optional*):
            A checkpoint to copy into the repository. The folder name stays the same.
    """
    for name in ("page", "drawing.py", "extras.py", "command_line.py", "image_files.py"):
        _copy(HERE / name, folder / name)
    # the package is copied, because a Space installs its requirements before the files of the repository are available
    package = folder / "diffusers_ssr"
    for file in [CODE / "__init__.py", *map(Path, get_relative_import_files(CODE / "__init__.py"))]:
        _copy(file, package / file.name)
    _copy(CODE / "pipeline.py", package / "pipeline.py")
    if (CODE / "LICENSE").exists():
        _copy(CODE / "LICENSE", folder / "LICENSE")
    if weights is not None:
        _copy(weights, folder / weights.name, LEFT_OUT)
    (folder / "app.py").write_text(APP.format(arguments=arguments), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    title = "SSR-Encoder"
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=metadata.version("gradio"),
        python_version="3.11",
        app_file="app.py",
        license="apache-2.0",
        models=models,
        short_description="Select a subject in an image and generate new images of it",
        colorFrom="yellow",
        colorTo="red",
    )
    SpaceCard(CARD.format(data=data.to_yaml(), title=title)).save(folder / "README.md")


def requirements() -> list[str]:
    """Returns the requirements of the package and the page, read from the metadata of the package."""
    lines = map(Requirement, metadata.requires("diffusers-ssr") or ())
    needed = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": "app"})]
    return sorted(f"{line.name}{line.specifier}" for line in needed)


def _copy(source: Path, target: Path, leave_out: tuple[str, ...] = ()) -> None:
    if source.is_dir():
        ignore = shutil.ignore_patterns("__pycache__", *leave_out)
        shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
