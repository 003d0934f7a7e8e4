"""The layout of the page, and the actions of its buttons."""

import argparse
from collections.abc import Iterator

import gradio as gr
from diffusers.utils import export_to_gif

from .edges_panel import EdgesPanel
from .messages import messages
from .request import ALONG_EDGES, PICTURE, VIDEO, DrawingRequest
from .script import FRAMES_PER_SECOND, write_bundle, write_script
from .sessions import Sessions
from .settings_panel import SettingsPanel
from .studio import Cancelled, Studio
from .subject_panel import SubjectPanels
from .widgets import DAY, HIDDEN, SHOW


TITLE = "SSR-Encoder"
INTRODUCTION = f"""# {TITLE}
Upload a picture, name one of the things in it or paint over it, and draw new pictures of that thing."""


class FramesPanel:
    """Panel for the number of frames of a video."""

    def __init__(self, args: argparse.Namespace):
        self.num_frames = gr.Slider(2, args.max_frames, 8, step=1, label="Frames", elem_id="frames")
        self.components = {self.num_frames}

    def read(self, values: dict) -> dict:
        """Returns the values of the panel as arguments of a `DrawingRequest`."""
        return {"num_frames": values[self.num_frames]}


class Page:
    """
    The page of a studio. The attribute `blocks` is the Gradio app.

    Args:
        studio ([`Studio`]):
            Draws the pictures.
        args (`argparse.Namespace`):
            The options of the page.
    """

    def __init__(self, studio: Studio, args: argparse.Namespace):
        self.studio = studio
        self.args = args
        self.sessions = Sessions()
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, DAY)) as self.blocks:
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column(min_width=340):
                    self.subjects = SubjectPanels(studio, args)
                with gr.Column(min_width=340):
                    settings = SettingsPanel(args)
                    with gr.Tabs():
                        self._kinds(settings)
            self.blocks.unload(self._close)

    def _kinds(self, settings: SettingsPanel) -> None:
        with gr.Tab("Picture"):
            self._drawing(PICTURE, [settings])
        if self.studio.checkpoints.controlnet is not None:
            with gr.Tab("Along edges"):
                self._drawing(ALONG_EDGES, [settings, EdgesPanel(self.studio)])
        if self.studio.checkpoints.motion_adapter is not None:
            with gr.Tab("Video"):
                self._drawing(VIDEO, [settings, FramesPanel(self.args)])

    def _drawing(self, kind: str, panels: list) -> None:
        """Adds the buttons and outputs of one kind of drawing. The inputs are the subjects and the panels."""
        panels = [self.subjects, *panels]
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id=f"draw-{kind}")
            cancel = gr.Button("Cancel", elem_id=f"cancel-{kind}")
        drawn = gr.Image(
            label="New video" if kind == VIDEO else "New picture",
            type="filepath",
            height=420,
            elem_id=f"drawn-{kind}",
            **{**SHOW, "format": "gif" if kind == VIDEO else "png"},
        )
        with gr.Accordion("Python script", open=False, elem_id=f"repeat-{kind}"):
            script = gr.Code(language="python", show_label=False, interactive=False, elem_id=f"script-{kind}")
            bundle = gr.DownloadButton(
                "Download the script and its pictures (.zip)", size="sm", elem_id=f"bundle-{kind}"
            )

        # Gradio recognizes the last two arguments by their type and default value
        def run(values: dict, request: gr.Request, progress=gr.Progress()) -> Iterator[tuple]:  # noqa: B008
            with messages():
                asked = {}
                for panel in panels:
                    asked |= panel.read(values)
                yield *[gr.skip()] * 3, *self.subjects.look(values)
                results = self._draw(DrawingRequest(**asked), request.session_hash, progress)
                yield *results, *[gr.skip()] * len(self.subjects.heats)

        drawing = draw.click(
            run,
            {component for panel in panels for component in panel.components},
            [drawn, script, bundle, *self.subjects.heats],
            concurrency_limit=self.args.concurrency,
            concurrency_id="draw",
            show_progress_on=drawn,
            **HIDDEN,
        )
        # a waiting drawing is removed from the queue, and a running drawing stops after the current step
        cancel.click(self._cancel, None, None, cancels=drawing, concurrency_limit=None, **HIDDEN)

    def _draw(self, request: DrawingRequest, session: str, progress: gr.Progress) -> tuple:
        """Returns the picture or video file, the script, and the archive file, or no updates if cancelled."""
        progress(0, desc="Encoding")
        try:
            with self.sessions.drawing(session) as cancelled:
                result = self.studio.draw(
                    request, lambda step, steps: progress((step, steps), desc="Drawing"), cancelled.is_set
                )
        except Cancelled:
            return (gr.skip(),) * 3
        if request.kind == VIDEO:
            file = self.sessions.file(session, "video.gif")
            export_to_gif(result, str(file), fps=FRAMES_PER_SECOND)
            result = str(file)
        script = write_script(request, self.studio.checkpoints, self.studio.dtype, self.studio.device)
        bundle = self.sessions.file(session, f"{request.kind}.zip")
        write_bundle(bundle, request, script)
        return result, script, str(bundle)

    def _cancel(self, request: gr.Request) -> None:
        if self.sessions.cancel(request.session_hash):
            gr.Info("The drawing was cancelled.")
        else:
            # whether one was waiting is not known here: `cancels=` removes it from the queue
            gr.Info("No drawing was running. Waiting ones were cancelled.")

    def _close(self, request: gr.Request) -> None:
        self.sessions.close(request.session_hash)
