"""The layout of the page, and the actions of its buttons."""

import argparse
from collections.abc import Iterator

import gradio as gr
from diffusers.utils import export_to_gif

from .edges_panel import EdgesPanel
from .messages import messages
from .request import ALONG_EDGES, IMAGE, VIDEO, GenerationRequest
from .script import FRAMES_PER_SECOND, write_bundle, write_script
from .sessions import Sessions
from .settings_panel import SettingsPanel
from .studio import Cancelled, Studio
from .subject_panel import SubjectPanel, SubjectPanels
from .widgets import DAY, GENERATE, HIDDEN, SHOW_RESULTS, at_end


TITLE = "SSR-Encoder"
INTRODUCTION = f"""# {TITLE}
Upload a reference image, name one of the things in it, or paint over it, and generate new images of that thing."""
PLACE = "in the meadow"
LONGEST_HISTORY = 24
# the prompt, until it is edited, and whether it was
FOLLOW = f"""(edited, prompt, ...queries) => {{
    const names = queries.map((query) => (query || "").trim()).filter((query) => query);
    const things = names.map((name) => /^(an?|the|my|this|that|some|two|three) /i.test(name) ? name
        : (/^[aeiou]/i.test(name) ? "an " : "a ") + name);
    const keep = Boolean(edited && (prompt || "").trim());
    return [keep ? prompt : (things.join(" and ") || "a thing") + " {PLACE}", keep];
}}"""


class FramesPanel:
    """Panel for the number of frames of a video."""

    def __init__(self, args: argparse.Namespace):
        self.num_frames = gr.Slider(2, args.max_frames, 8, step=1, label="Frames", elem_id="frames")
        self.components = [self.num_frames]

    def read(self, values: dict) -> dict:
        """Returns the values of the panel as arguments of a `GenerationRequest`."""
        return {"num_frames": values[self.num_frames]}


class Outputs:
    """The buttons and outputs of one kind of generation."""

    def __init__(self, kind: str):
        self.kind = kind
        self.generate = gr.Button("Generate", variant="primary", elem_id=f"generate-{kind}", elem_classes="generate")
        self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id=f"cancel-{kind}")
        self.results = gr.Gallery(
            label="New video" if kind == VIDEO else "New images",
            format="png",
            columns=1 if kind == VIDEO else 2,
            height=420,
            object_fit="contain",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id=f"results-{kind}",
            elem_classes="results",
        )
        with gr.Accordion("Python script", open=False, elem_id=f"repeat-{kind}"):
            self.script = gr.Code(language="python", label="Script", interactive=False, elem_id=f"script-{kind}")
            self.bundle = gr.DownloadButton(
                "Download the script and its images (.zip)", size="sm", elem_id=f"bundle-{kind}"
            )


class Page:
    """
    The page of a studio. The attribute `blocks` is the Gradio app.

    Args:
        studio ([`Studio`]):
            Generates the images.
        args (`argparse.Namespace`):
            The options of the page.
    """

    def __init__(self, studio: Studio, args: argparse.Namespace):
        self.studio = studio
        self.args = args
        self.sessions = Sessions()
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, DAY)) as self.blocks:
            gr.Markdown(INTRODUCTION)
            gr.Markdown(studio.checkpoints.describe(studio.side), elem_id="checkpoint", container=True)
            with gr.Row():
                with gr.Column(min_width=340):
                    self.subjects = SubjectPanels(studio, args)
                with gr.Column(min_width=340):
                    self.prompt = gr.Textbox(
                        label="Prompt",
                        value=args.prompt or f"a thing {PLACE}",
                        info="Follows the name of the subject until you edit it",
                        max_lines=3,
                        elem_id="prompt",
                    )
                    with gr.Tabs():
                        kinds = self._kinds()
                    look = gr.Button("Show what is selected", size="sm", elem_id="look")
                    with gr.Row():
                        self.maps = [
                            gr.AnnotatedImage(
                                visible=False, format="png", height=300, elem_id=f"map-{panel.number}", color_map=None
                            )
                            for panel in self.subjects.panels
                        ]
                    self.settings = SettingsPanel(args, self.prompt)
                    self.history = gr.Gallery(
                        label="Earlier results",
                        visible=False,
                        columns=6,
                        height="auto",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id="history",
                        elem_classes="small-images",
                    )
            for outputs, panels in kinds:
                self._generating(outputs, [self.subjects, self.settings, *panels])
            look.click(self._look, {*self.subjects.components}, self.maps, **HIDDEN)
            self.prompt.submit(None, js=GENERATE, **HIDDEN)
            self._follow_queries()
            self._keep_after_reload()
            self.blocks.unload(self._close)

    def _kinds(self) -> list[tuple[Outputs, list]]:
        """Adds a tab for each kind of generation. Returns their outputs and panels."""
        with gr.Tab("Image"):
            kinds = [(Outputs(IMAGE), [])]
        if self.studio.checkpoints.controlnet is not None:
            with gr.Tab("Along edges"):
                edges = EdgesPanel(self.studio)
                kinds.append((Outputs(ALONG_EDGES), [edges]))
        if self.studio.checkpoints.motion_adapter is not None:
            with gr.Tab("Video"):
                frames = FramesPanel(self.args)
                kinds.append((Outputs(VIDEO), [frames]))
        return kinds

    def _follow_queries(self) -> None:
        """Lets the prompt follow the queries until it is edited, and examples set it."""
        self.edited = gr.BrowserState(bool(self.args.prompt), storage_key="ssr-edited")
        given = [self.edited, self.prompt, *self.subjects.queries]
        self.prompt.input(None, self.prompt, self.edited, js="() => true", **HIDDEN)
        gr.on(
            [query.change for query in self.subjects.queries],
            None,
            given,
            [self.prompt, self.edited],
            js=FOLLOW,
            **HIDDEN,
        )
        for panel in self.subjects.panels:

            def choose(event: gr.SelectData, panel: SubjectPanel = panel) -> dict:
                return {**panel.open_example(event.index), **self.settings.defaults, self.edited: False}

            outputs = [*panel.components, *panel.shown, panel.kept, *self.settings.defaults, self.edited]
            chosen = panel.gallery.select(choose, None, list(dict.fromkeys(outputs)), **HIDDEN)
            # also if the query did not change
            chosen.success(None, given, [self.prompt, self.edited], js=FOLLOW, **HIDDEN)
            chosen.success(None, js=SHOW_RESULTS, **HIDDEN)

    def _keep_after_reload(self) -> None:
        """Keeps texts and settings in the browser when they change, and reference images when they are opened.
        Paint is not kept: the editor shows layers that it is given at another place."""
        panels = self.subjects.panels
        components = [*self.settings.components, *self.subjects.queries, *(panel.scale for panel in panels)]
        entered = gr.BrowserState(storage_key="ssr-entered")
        changes = [component.change for component in components]
        gr.on(changes, None, components, entered, js="(...values) => ({values})", **HIDDEN)

        def restore(entered: dict | None, *kept: str | None) -> dict:
            values = {} if entered is None else dict(zip(components, entered["values"], strict=True))
            for panel, image in zip(panels, kept, strict=True):
                values |= panel.restore(image)
            return values or {self.prompt: gr.skip()}

        outputs = [*components, *(component for panel in panels for component in panel.shown)]
        self.blocks.load(
            restore, [entered, *(panel.kept for panel in panels)], outputs, show_progress="hidden", **HIDDEN
        )

    def _generating(self, outputs: Outputs, panels: list) -> None:
        """Adds the actions of the buttons of one kind of generation. The inputs are the panels."""
        buttons = [outputs.generate, outputs.cancel]

        # Gradio recognizes the last two arguments by their type and default value
        def run(values: dict, request: gr.Request, progress=gr.Progress()) -> Iterator[dict]:  # noqa: B008
            with messages():
                arguments = {}
                for panel in panels:
                    arguments |= panel.read(values)
                if outputs.kind == VIDEO:
                    arguments["seeds"] = arguments["seeds"][:1]
                asked = GenerationRequest(**arguments)
                self._report_texts(asked)
                yield self._maps(values)
                results = self._generate(asked, request.session_hash, progress)
                if results is not None:
                    history = [*(values[outputs.results] or ()), *(values[self.history] or ())][:LONGEST_HISTORY]
                    yield {
                        self.settings.seed: asked.seeds[0],
                        **dict(zip([outputs.results, outputs.script, outputs.bundle], results, strict=True)),
                        self.history: gr.Gallery(history, visible=bool(history)),
                    }

        def swap(running: bool) -> list[gr.Button]:
            return [gr.Button(visible=not running), gr.Button(visible=running)]

        started = outputs.generate.click(lambda: swap(True), None, buttons, queue=False, **HIDDEN)
        started.success(None, js=SHOW_RESULTS, **HIDDEN)
        generating = started.success(
            run,
            {component for panel in panels for component in panel.components} | {outputs.results, self.history},
            [outputs.results, outputs.script, outputs.bundle, self.history, self.settings.seed, *self.maps],
            concurrency_limit=self.args.concurrency,
            concurrency_id="generate",
            show_progress_on=outputs.results,
            **HIDDEN,
        )
        at_end(generating, lambda: swap(False), None, buttons, queue=False)

        def cancel(request: gr.Request) -> list[gr.Button]:
            self.sessions.cancel(request.session_hash, outputs.kind)
            gr.Info("The generation was cancelled.")
            return swap(False)

        # a waiting request is removed from the queue, and a running one stops after the current step
        outputs.cancel.click(cancel, None, buttons, cancels=generating, concurrency_limit=None, **HIDDEN)

    def _generate(self, request: GenerationRequest, session: str, progress: gr.Progress) -> tuple | None:
        """Returns the results with captions, the script, and the archive file, or `None` if cancelled."""
        progress(0, desc="Encoding")
        try:
            with self.sessions.generating(session, request.kind) as cancelled:
                results = self.studio.generate(
                    request, lambda step, steps: progress((step, steps), desc="Generating"), cancelled.is_set
                )
        except Cancelled:
            return None
        if request.kind == VIDEO:
            file = self.sessions.file(session, "video.gif")
            export_to_gif(results, str(file), fps=FRAMES_PER_SECOND)
            results = [str(file)]
        captions = (f"seed {seed}: {request.prompt}" for seed in request.seeds)
        script = write_script(request, self.studio.checkpoints, self.studio.dtype, self.studio.device)
        bundle = self.sessions.file(session, f"{request.kind}.zip")
        write_bundle(bundle, request, script)
        return list(zip(results, captions, strict=True)), script, str(bundle)

    def _report_texts(self, request: GenerationRequest) -> None:
        """Says which texts are too long, and which names are missing, unknown or not in the prompt."""
        if "a thing" in request.prompt and not all(choice.query for choice in request.subjects):
            gr.Info(
                "Without a name, the prompt says “a thing”. The images are often better if it says what the thing is."
            )
        kinds = self.studio.checkpoints.world().get("categories")
        for name in [choice.query for choice in request.subjects if choice.query]:
            if kinds and not any(kind in name.lower().split() for kind in kinds):
                gr.Warning(f"This checkpoint does not know “{name:.40}”. It knows: {', '.join(kinds)}.")
            elif name.lower() not in request.prompt.lower():
                gr.Info(f"The prompt does not say “{name:.40}”. The images are better if it names the subject.")
        texts = {"prompt": request.prompt, "negative prompt": request.negative_prompt}
        texts |= {f"name of subject {number}": choice.query for number, choice in enumerate(request.subjects, 1)}
        for field, text in texts.items():
            if cut := self.studio.cut_end(text):
                gr.Warning(
                    f"The {field} is too long. Its end is not used: “{cut if len(cut) < 60 else cut[:60] + '…'}”"
                )

    @messages()
    def _look(self, values: dict) -> dict:
        self.subjects.read(values)
        return self._maps(values)

    def _maps(self, values: dict) -> dict:
        """Returns the new values of `maps`."""
        choices = [panel.read(values) for panel in self.subjects.panels]
        return {
            shown: gr.AnnotatedImage(visible=False) if choice is None else panel.attention(choice)
            for panel, shown, choice in zip(self.subjects.panels, self.maps, choices, strict=True)
        }

    def _close(self, request: gr.Request) -> None:
        self.sessions.close(request.session_hash)
