"""The panel for the edge map of a ControlNet."""

import gradio as gr
from PIL import Image

from .edges import find_edges, fit
from .messages import messages
from .pictures import open_picture
from .studio import Studio
from .widgets import DAY, HIDDEN, SHOW, empty_after, file_drop


FIND, READY = "Detect edges in the picture", "The picture is an edge map (white lines on black)"


class EdgesPanel:
    """
    Panel to upload an edge map, or a picture to detect edges in.

    Args:
        studio ([`Studio`]):
            Provides the size of drawn pictures.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self.picture = gr.State(time_to_live=DAY)
        file = file_drop("Edge map, or a picture to detect edges in", "file-edges")
        self.how = gr.Radio([FIND, READY], value=FIND, show_label=False, elem_id="how-edges")
        self.low = gr.Slider(0, 255, 100, step=1, label="Low threshold (Canny)")
        self.high = gr.Slider(0, 255, 200, step=1, label="High threshold (Canny)")
        edges = gr.Image(label="Edges", height=200, elem_id="edges", **SHOW)
        self.scale = gr.Slider(0, 2, 1, step=0.05, label="ControlNet scale", elem_id="edges-scale")
        self.given = [self.picture, self.how, self.low, self.high]
        self.components = {*self.given, self.scale}

        opened = file.upload(self._open, file, self.picture, **HIDDEN)
        empty_after(opened, file)
        for event in (opened.success, self.how.change, self.low.release, self.high.release):
            event(self._edges, self.given, edges, **HIDDEN)

    def read(self, values: dict) -> dict:
        """Returns the values of the panel as arguments of a `DrawingRequest`."""
        edges = self._edges(*(values[component] for component in self.given))
        if edges is None:
            raise ValueError("There is no picture yet: upload an edge map, or a picture to detect edges in.")
        return {"edges": edges, "controlnet_conditioning_scale": values[self.scale]}

    @messages()
    def _open(self, file: str) -> Image.Image:
        return open_picture(file)

    @messages()
    def _edges(self, picture: Image.Image | None, how: str, low: int, high: int) -> Image.Image | None:
        if picture is None:
            return None
        side = self.studio.side
        return fit(picture, side) if how == READY else find_edges(picture, side, low, high)
