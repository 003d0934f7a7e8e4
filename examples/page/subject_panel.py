"""The panel to choose a subject."""

import argparse
import json
from pathlib import Path

import gradio as gr
from PIL import Image

from .messages import messages
from .painting import CANVAS_SIDE, canvas_for, painted_mask
from .pictures import open_picture
from .request import SubjectChoice
from .studio import Studio
from .widgets import DAY, HIDDEN, PAINT, SHOW, empty_after, empty_canvas, file_drop, layers


class SubjectPanel:
    """
    Panel for a reference picture, the query or painted mask that selects a subject in the picture, the scale of the
    subject, and its region in the new picture.

    Args:
        studio ([`Studio`]):
            Computes the attention map.
        args (`argparse.Namespace`):
            The options of the page.
        number (`int`):
            The number of the subject on the page, starting at 1.
    """

    def __init__(self, studio: Studio, args: argparse.Namespace, number: int):
        self.studio = studio
        self.number = number
        self.samples = _samples(Path(studio.checkpoints.ssr or studio.checkpoints.base) / "references")
        # the picture is stored separately, because the canvas of the editor can be larger than the picture
        self.picture = gr.State(time_to_live=DAY)
        file = file_drop("Reference picture", f"file-{number}")
        examples = self._examples(number)
        self.painting = gr.ImageEditor(
            label="Paint over the subject",
            visible=False,
            height=400,
            elem_id=f"painting-{number}",
            **PAINT,
        )
        self.query = gr.Textbox(
            label="Name the subject (optional with a mask)", placeholder="cat", max_lines=1, elem_id=f"query-{number}"
        )
        look = gr.Button("Show the attention map", size="sm", elem_id=f"look-{number}")
        self.heat = gr.Image(
            label="Attention map (red: high)", visible=False, height=260, elem_id=f"heat-{number}", **SHOW
        )
        self.scale = gr.Slider(0, 1.5, args.scale, step=0.05, label="Subject scale", elem_id=f"scale-{number}")
        with gr.Accordion("Region in the new picture", open=False, elem_id=f"place-{number}"):
            gr.Markdown("Paint where the subject can appear. Without paint, it can appear anywhere.")
            self.region = gr.ImageEditor(
                value=empty_canvas(), show_label=False, height=340, elem_id=f"region-{number}", **PAINT
            )
        self.components = {self.picture, self.painting, self.query, self.scale, self.region}

        shown = [self.picture, self.painting, self.heat]
        opened = file.upload(self._open, file, shown, **HIDDEN)
        empty_after(opened, file)
        self.painting.clear(self._clear, None, shown, **HIDDEN)
        events = [look.click, self.query.submit]
        if examples is not None:
            opened = examples.click(self._open_sample, examples, [*shown, self.query], **HIDDEN)
            events.append(opened.success)
        for event in events:
            event(self._look, self.components, self.heat, **HIDDEN)

    def read(self, values: dict) -> SubjectChoice | None:
        """Returns the subject that was chosen in the components, or `None` if there is no picture. Raises a `ValueError`
        if there is a query or a region without a picture."""
        picture = values[self.picture]
        query = (values[self.query] or "").strip()  # a tab that was not opened yet has no value
        if picture is None:
            region = painted_mask(layers(values[self.region]), (CANVAS_SIDE, CANVAS_SIDE))
            if query or region is not None:
                raise ValueError(f"Subject {self.number} has a name or a region, but no reference picture.")
            return None
        return SubjectChoice(
            picture=picture,
            query=query,
            mask=painted_mask(layers(values[self.painting]), picture.size),
            scale=values[self.scale],
            region=painted_mask(layers(values[self.region]), (CANVAS_SIDE, CANVAS_SIDE)),
        )

    def _examples(self, number: int) -> gr.Dataset | None:
        if not self.samples:
            return None
        return gr.Dataset(
            components=[gr.Image(render=False, type="filepath")],
            samples=[[file] for file, _ in self.samples],
            type="index",
            label="Example pictures",
            elem_id=f"examples-{number}",
        )

    @messages()
    def _open(self, file: str) -> tuple:
        return self._shown(open_picture(file))

    @messages()
    def _open_sample(self, index: int) -> tuple:
        file, query = self.samples[index]
        return *self._shown(open_picture(file)), query

    def _shown(self, picture: Image.Image) -> tuple:
        painting = {"background": canvas_for(picture), "layers": [], "composite": None}
        return picture, gr.ImageEditor(value=painting, visible=True), gr.Image(value=None, visible=False)

    def _clear(self) -> tuple:
        return None, gr.ImageEditor(visible=False), gr.Image(value=None, visible=False)

    @messages()
    def _look(self, values: dict) -> gr.Image:
        if values[self.picture] is None:
            raise ValueError(f"Subject {self.number}: there is no reference picture yet.")
        return self.look(values)

    def look(self, values: dict) -> gr.Image | dict:
        """Returns the attention map, or no update if there is no picture."""
        choice = self.read(values)
        if choice is None:
            return gr.skip()
        try:
            return gr.Image(value=self.studio.attention_map(choice), visible=True)
        except ValueError as error:
            raise ValueError(f"Subject {self.number}: {error}") from error


class SubjectPanels:
    """Tabs with a panel for each subject."""

    def __init__(self, studio: Studio, args: argparse.Namespace):
        self.panels = []
        with gr.Tabs():
            for number in range(1, args.max_subjects + 1):
                with gr.Tab(f"Subject {number}"):
                    self.panels.append(SubjectPanel(studio, args, number))
        self.components = {component for panel in self.panels for component in panel.components}
        self.heats = [panel.heat for panel in self.panels]

    def read(self, values: dict) -> dict:
        """Returns the values of the panels as arguments of a `DrawingRequest`."""
        choices = (panel.read(values) for panel in self.panels)
        return {"subjects": tuple(choice for choice in choices if choice is not None)}

    def look(self, values: dict) -> list:
        """Returns the attention maps of all panels, which are the new values of `heats`."""
        return [panel.look(values) for panel in self.panels]


def _samples(folder: Path) -> list[tuple[str, str]]:
    """Returns the paths of the reference pictures of a checkpoint, each with its first query."""
    listed = folder / "queries.json"
    if not listed.is_file():
        return []
    return [(str(folder / name), queries[0]) for name, queries in json.loads(listed.read_text()).items()]
