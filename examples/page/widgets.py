"""Components and event options that several parts of the page share."""

import gradio as gr
from PIL import Image

from .painting import CANVAS_SIDE


DAY = 86400  # seconds

SHOW = {"interactive": False, "format": "png", "elem_classes": "drawn", "buttons": ["download", "fullscreen"]}
PAINT = {
    "type": "pil",
    # pictures are uploaded with `file_drop`, because the editor accepts other files without an error message
    "sources": (),
    "transforms": (),
    "layers": False,
    "format": "png",
    "brush": gr.Brush(default_size=30, colors=[("#ff2800", 0.6)], color_mode="fixed"),
}
# events are hidden in the API that Gradio generates
HIDDEN = {"api_visibility": "private"}

CSS = """
.drawn img { width: 100%; object-fit: contain; }
"""


def file_drop(label: str, elem_id: str) -> gr.File:
    """Creates an upload field for a picture. It accepts any file, so that the page can show its own error message."""
    return gr.File(label=label, type="filepath", height=130, elem_id=elem_id)


def empty_after(opened: gr.events.Dependency, file: gr.File) -> None:
    """Clears an upload field after its file was opened or rejected, so that another file can be uploaded."""
    for event in (opened.success, opened.failure):  # `then` is not triggered after an error
        event(lambda: None, None, file, **HIDDEN)


def empty_canvas() -> dict:
    """Returns an editor value with a gray canvas that has the aspect ratio of a drawn picture."""
    return {"background": Image.new("RGB", (CANVAS_SIDE, CANVAS_SIDE), "#e4e4e7"), "layers": [], "composite": None}


def layers(painting: dict | None) -> list[Image.Image]:
    """Returns the layers of an editor value."""
    return [] if painting is None else painting["layers"]
