"""What several parts of the page share: the look of their components, and the options of their events."""

import gradio as gr
from PIL import Image

from .painting import CANVAS_SIDE


DAY = 86400  # seconds

SHOW = {"interactive": False, "format": "png", "elem_classes": "drawn", "buttons": ["download", "fullscreen"]}
PAINT = {
    "type": "pil",
    # pictures come in through `file_drop`: the editor itself takes files that are no pictures without a message
    "sources": (),
    "transforms": (),
    "layers": False,
    "format": "png",
    "brush": gr.Brush(default_size=30, colors=[("#ff2800", 0.6)], color_mode="fixed"),
}
# events are for the page, not for Gradio's generated API
HIDDEN = {"api_visibility": "private"}

CSS = """
.drawn img { width: 100%; object-fit: contain; }
"""


def file_drop(label: str, elem_id: str) -> gr.File:
    """A place to drop a picture file. It takes any file, so that it is the page that says what is wrong with it."""
    return gr.File(label=label, type="filepath", height=130, elem_id=elem_id)


def empty_after(opened: gr.events.Dependency, file: gr.File) -> None:
    """Empty a file drop when its file was opened or refused, so that another one can be dropped there."""
    for event in (opened.success, opened.failure):  # `then` does not follow an error
        event(lambda: None, None, file, **HIDDEN)


def empty_canvas() -> dict:
    """An editor's value: a grey canvas of a drawn picture's proportions."""
    return {"background": Image.new("RGB", (CANVAS_SIDE, CANVAS_SIDE), "#e4e4e7"), "layers": [], "composite": None}


def layers(painting: dict | None) -> list[Image.Image]:
    """The layers of an editor's value."""
    return [] if painting is None else painting["layers"]
