"""The theme, and components and event options that several parts of the page share."""

import gradio as gr
from PIL import Image

from .painting import CANVAS_SIDE


DAY = 86400  # seconds

PAINT = {
    "type": "pil",
    # images are uploaded with `file_drop`, because the editor accepts other files without an error message
    "sources": (),
    "transforms": (),
    "layers": False,
    "format": "png",
    "brush": gr.Brush(default_size=30, colors=[("#ff2800", 0.6)], color_mode="fixed"),
}
# events are hidden in the API that Gradio generates
HIDDEN = {"api_visibility": "private"}

# some colours of the default theme have less contrast than the 4.5:1 that WCAG requires
THEME = gr.themes.Default(primary_hue="indigo").set(
    color_accent="*primary_600",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_300",
)
CSS = """
.results .grid-wrap, .results .grid-container { height: 100% !important; max-height: none; }
.results .grid-container {
    grid-template-columns: repeat(auto-fit, minmax(40%, 1fr)); grid-auto-rows: minmax(0, 1fr); padding-top: 28px;
}
.results .grid-wrap { overflow: hidden !important; box-sizing: border-box; }
.results .gallery-item { width: 100%; height: 100%; min-height: 0; }
.results .grid-container .thumbnail-item { width: 100%; height: 100%; min-height: 0; aspect-ratio: auto; }
/* captions are below the images and not over them */
.grid-container .thumbnail-item:has(.caption-label) { display: flex; flex-direction: column; }
.grid-container .thumbnail-item:has(.caption-label) img { flex: 1; min-height: 0; width: 100%; object-fit: contain; }
.grid-container .caption-label {
    position: static; max-width: 100%; margin: 0; padding: 0 4px; border: 0; border-radius: 0; background: none;
    overflow: hidden; text-align: center; text-overflow: ellipsis; white-space: nowrap;
}
/* the message of an error is shown at the top, and earlier results stay in view */
.results .wrap:has(> .error) { display: none !important; }
.dark [role=tab][aria-selected=true] { color: #c7d2fe; }
#history .grid-container .caption-label { display: none; }
#history:has(.preview) { min-height: 360px; }
.small-images .grid-wrap { height: auto; max-height: none; min-height: 0; overflow: hidden; }
.small-images .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)); padding-top: 28px; }
.small-images .grid-container { grid-auto-rows: min-content; height: auto; }
.small-images .grid-container .thumbnail-item { width: 100%; height: auto; aspect-ratio: auto; }
.small-images .grid-container .thumbnail-item img { aspect-ratio: 1; }
@media (max-width: 767px) {
    .small-images .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); }
    .results { height: 300px !important; }
}
"""

# scrolls on a phone, where the results are below the reference image
SHOW_RESULTS = """() => setTimeout(() => {
    const results = [...document.querySelectorAll(".results")].find((element) => element.offsetParent);
    if (window.innerWidth < 768) results?.scrollIntoView({block: "end"});
}, 400)"""
# Enter presses the button of the tab that is open
GENERATE = """() => {
    [...document.querySelectorAll("button.generate")].find((button) => button.offsetParent)?.click();
}"""


def file_drop(label: str, elem_id: str) -> gr.File:
    """Creates an upload field for an image. It accepts any file, so that the page can show its own error message."""
    return gr.File(label=label, type="filepath", height=155, elem_id=elem_id)


def at_end(event: gr.events.Dependency, *args, **kwargs) -> None:
    """Adds a listener for the end of an event, also after an error, when `then` is not triggered."""
    for end in (event.success, event.failure):
        end(*args, **HIDDEN, **kwargs)


def empty_canvas() -> dict:
    """Returns an editor value with a gray canvas that has the aspect ratio of a generated image."""
    return editor_value(Image.new("RGB", (CANVAS_SIDE, CANVAS_SIDE), "#e4e4e7"))


def editor_value(background: Image.Image) -> dict:
    """Returns an editor value with an image to paint on."""
    return {"background": background, "layers": [], "composite": None}


def layers(painting: dict | None) -> list[Image.Image]:
    """Returns the layers of an editor value."""
    return [] if painting is None else painting["layers"]
