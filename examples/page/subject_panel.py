"""The panel to choose a subject."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from .messages import messages
from .painting import CANVAS_SIDE, canvas_for, painted_mask
from .request import SubjectChoice
from .studio import Studio
from .uploads import from_text, open_upload, to_text
from .widgets import DAY, GENERATE, HIDDEN, PAINT, SHOW_RESULTS, at_end, editor_value, empty_canvas, file_drop, layers


class SubjectPanel:
    """
    Panel for a reference image, the query or painted mask that selects a subject in the image, the scale of the
    subject, and its region in the new image.

    Args:
        studio ([`Studio`]):
            Computes the attention map.
        args (`argparse.Namespace`):
            The options of the page.
        number (`int`):
            The number of the subject on the page, starting at 1.
        kept (`gr.BrowserState`):
            Keeps the reference image in the browser.
    """

    def __init__(self, studio: Studio, args: argparse.Namespace, number: int, kept: gr.BrowserState):
        self.studio = studio
        self.number = number
        self.usual_scale = args.scale
        self.examples = _examples(Path(studio.checkpoints.ssr or studio.checkpoints.base) / "references")
        # the image is stored separately, because the canvas of the editor can be larger than the image
        self.image = gr.State(time_to_live=DAY)
        self.kept = kept
        with gr.Accordion("Reference image", elem_id=f"choose-{number}") as choose:
            file = file_drop("Upload a reference image", f"file-{number}")
            self.gallery = gr.Gallery(
                [(file, query) for file, query in self.examples],
                label="Or choose an example",
                visible=bool(self.examples),
                columns=6,
                height="auto",
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id=f"examples-{number}",
                elem_classes="small-images",
            )
        self.painting = gr.ImageEditor(
            label="Paint over the thing",
            visible=False,
            height=330,
            elem_id=f"painting-{number}",
            **PAINT,
        )
        self.query = gr.Textbox(
            value="",
            label="Name of the subject",
            info="The thing to take from the reference image, in a word. It can stay empty if you paint over the thing",
            max_lines=1,
            elem_id=f"query-{number}",
        )
        with gr.Accordion("Scale, and region in the new image", open=False, elem_id=f"place-{number}"):
            self.scale = gr.Slider(
                0,
                1.5,
                args.scale,
                step=0.05,
                label="Subject scale",
                info=f"Usual: {args.scale:g}. A higher scale follows the reference more, and the prompt less",
                elem_id=f"scale-{number}",
            )
            gr.Markdown(
                "The gray square is the new image: paint where this subject can appear. Without paint, anywhere."
            )
            self.region = gr.ImageEditor(
                value=empty_canvas(),
                label="Region",
                height=340,
                elem_id=f"region-{number}",
                **PAINT,
            )
        self.components = [self.image, self.painting, self.query, self.scale, self.region]
        self.shown = [self.image, self.painting, choose]

        opened = file.upload(self._open, file, [*self.shown, self.kept], **HIDDEN)
        at_end(opened, lambda: None, None, file)  # another file can be uploaded
        opened.success(None, js=SHOW_RESULTS, **HIDDEN)
        self.painting.clear(self._clear, None, [*self.shown, self.kept, self.query], **HIDDEN)
        self.query.submit(None, js=GENERATE, **HIDDEN)

    def read(self, values: dict) -> SubjectChoice | None:
        """Returns the subject that was chosen in the components, or `None` if the panel was not used. Raises a
        `ValueError` if the reference image is missing, or both the name and the mask."""
        image = values[self.image]
        query = (values[self.query] or "").strip()  # a tab that was not opened yet has no value
        region = painted_mask(layers(values[self.region]), (CANVAS_SIDE, CANVAS_SIDE))
        if image is None:
            if query or region is not None:
                field = "name" if query else "region"
                raise ValueError(f"Subject {self.number} has a {field}, but no reference image: upload one.")
            return None
        mask = painted_mask(layers(values[self.painting]), image.size)
        if not query and mask is None:
            raise ValueError(f"Which subject is meant in reference image {self.number}? Name it, or paint over it.")
        return SubjectChoice(image, query, mask, values[self.scale], region)

    @messages()
    def _open(self, file: str) -> tuple:
        image = open_upload(file)
        return *self._show(image), to_text(image)

    @messages()
    def open_example(self, index: int) -> dict:
        """Returns the new values of the components for an example."""
        file, query = self.examples[index]
        image = open_upload(file)
        values = [*self._show(image), to_text(image), query, self.usual_scale, empty_canvas()]
        return dict(zip([*self.shown, self.kept, self.query, self.scale, self.region], values, strict=True))

    def _show(self, image: Image.Image) -> tuple:
        painting = gr.ImageEditor(editor_value(canvas_for(image)), visible=True)
        return image, painting, gr.Accordion("Change the reference image", open=False)

    def _clear(self) -> tuple:
        return None, gr.ImageEditor(visible=False), gr.Accordion("Reference image", open=True), None, ""

    def restore(self, kept: str | None) -> dict:
        """Returns the values of the components after a reload."""
        return {} if kept is None else dict(zip(self.shown, self._show(from_text(kept)), strict=True))

    def attention(self, choice: SubjectChoice) -> gr.AnnotatedImage:
        """Returns the gray reference image with the attention of the query and the mask over it. Also says if they show
        different things."""
        canvas = canvas_for(choice.image).convert("L").point(lambda value: 90 + value * 0.6).convert("RGB")
        layers = []
        if choice.query:
            heat = Image.fromarray(self.studio.attention(choice).astype(np.float32))
            heat = np.asarray(heat.resize(canvas.size, Image.Resampling.BILINEAR))
            layers.append((heat, "attention of the name (faint: little, red: much)"))
        if choice.mask is not None:
            layers.append((np.asarray(choice.mask.resize(canvas.size)) / 255 * 0.6, "mask"))
        if choice.query and choice.mask is not None:
            heat = self.studio.attention(replace(choice, mask=None))
            if heat[np.asarray(choice.mask) > 0].max() < heat.max() / 2:
                gr.Warning(
                    f"The name “{choice.query:.40}” does not seem to fit the painted thing: change or remove it."
                )
        return gr.AnnotatedImage((canvas, layers), visible=True, label=f"Subject {self.number}")


class SubjectPanels:
    """Tabs with a panel for each subject."""

    def __init__(self, studio: Studio, args: argparse.Namespace):
        self.panels: list[SubjectPanel] = []
        numbers = range(1, args.max_subjects + 1)
        # the browser does not load the states in a tab before it is opened
        kept = [gr.BrowserState(storage_key=f"ssr-subject-{number}") for number in numbers]
        with gr.Tabs():
            for number in numbers:
                with gr.Tab(f"Subject {number}"):
                    self.panels.append(SubjectPanel(studio, args, number, kept[number - 1]))
        self.components = [component for panel in self.panels for component in panel.components]
        self.queries = [panel.query for panel in self.panels]

    def read(self, values: dict) -> dict:
        """Returns the values of the panels as arguments of a `GenerationRequest`. Raises a `ValueError` if there is no
        subject."""
        choices = tuple(choice for choice in (panel.read(values) for panel in self.panels) if choice is not None)
        if not choices:
            raise ValueError("There is no reference image yet: upload one, or choose an example.")
        return {"subjects": choices}


def _examples(folder: Path) -> list[tuple[str, str]]:
    """Returns the reference images of a checkpoint, each with the query in the middle of its list."""
    listed = folder / "queries.json"
    if not listed.is_file():
        return []
    found = json.loads(listed.read_text())
    return [(str(folder / name), queries[len(queries) // 2]) for name, queries in found.items()]
