"""The panel for the edge map of a ControlNet."""

import gradio as gr
from PIL import Image

from .edges import find_edges, fit
from .messages import messages
from .studio import Studio
from .uploads import open_upload
from .widgets import DAY, HIDDEN, at_end, file_drop


FIND, READY = "Detect edges in the image", "The image is an edge map (white lines on black)"


class EdgesPanel:
    """
    Panel to upload an edge map, or an image to detect edges in.

    Args:
        studio ([`Studio`]):
            Provides the size of generated images.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self.image = gr.State(time_to_live=DAY)
        file = file_drop("Edge map, or an image to detect edges in", "file-edges")
        self.how = gr.Radio([FIND, READY], value=FIND, label="Kind of image", elem_id="how-edges")
        edges = gr.Image(
            label="Edges", height=200, interactive=False, format="png", buttons=["download"], elem_id="edges"
        )
        with gr.Accordion("Settings of the edges", open=False):
            hint = "Usual: {}. Lower thresholds find more edges"
            self.low = gr.Slider(0, 255, 100, step=1, label="Low threshold (Canny)", info=hint.format(100))
            self.high = gr.Slider(0, 255, 200, step=1, label="High threshold (Canny)", info=hint.format(200))
            self.scale = gr.Slider(
                0,
                2,
                1,
                step=0.05,
                label="ControlNet scale",
                info="Usual: 1. How closely the image follows the edges; 0 ignores them",
                elem_id="edges-scale",
            )
        self.given = [self.image, self.how, self.low, self.high]
        self.components = [*self.given, self.scale]

        opened = file.upload(self._open, file, self.image, **HIDDEN)
        at_end(opened, lambda: None, None, file)
        for event in (opened.success, self.how.change, self.low.release, self.high.release):
            event(self._edges, self.given, edges, **HIDDEN)

    def read(self, values: dict) -> dict:
        """Returns the values of the panel as arguments of a `GenerationRequest`."""
        edges = self._edges(*(values[component] for component in self.given))
        if edges is None:
            raise ValueError("There is no edge map yet: upload one, or an image to detect edges in.")
        return {"edges": edges, "controlnet_conditioning_scale": values[self.scale]}

    @messages()
    def _open(self, file: str) -> Image.Image:
        return open_upload(file)

    @messages()
    def _edges(self, image: Image.Image | None, how: str, low: int, high: int) -> Image.Image | None:
        if image is None:
            return None
        side = self.studio.side
        return fit(image, side) if how == READY else find_edges(image, side, low, high)
