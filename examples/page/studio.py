"""Draws what people ask for: pipelines for pictures, ControlNet and video that share one SSR-Encoder."""

import threading
from collections.abc import Callable

import torch
from diffusers import ControlNetModel, DiffusionPipeline, MotionAdapter
from diffusers_ssr import (
    AnimateDiffSSRPipeline,
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
    SubjectEmbeds,
)
from drawing import load_pipeline
from PIL import Image

from .checkpoints import Checkpoints
from .request import ALONG_EDGES, PICTURE, VIDEO, DrawingRequest, SubjectChoice


class Cancelled(Exception):
    """The drawing was cancelled."""


class Studio:
    """
    Draws for any number of threads at once. The models are loaded once: pictures and ControlNet share one UNet; the UNet for
    video is another one, made when the first video is asked for.

    Args:
        checkpoints ([`Checkpoints`]):
            What to load.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._loading = threading.Lock()
        loaded = load_pipeline(checkpoints.base, checkpoints.ssr)
        # `custom_pipeline` imports a copy of the code; the pipelines that share the UNet must be of the same copy
        self._pipelines: dict[str, DiffusionPipeline] = {PICTURE: StableDiffusionSSRPipeline.from_pipe(loaded)}

    @property
    def dtype(self) -> torch.dtype:
        return self._pipelines[PICTURE].unet.dtype

    @property
    def device(self) -> torch.device:
        return self._pipelines[PICTURE].device

    @property
    def side(self) -> int:
        """Height and width of a drawn picture in pixels."""
        pipe = self._pipelines[PICTURE]
        return pipe.unet.config.sample_size * pipe.vae_scale_factor

    def pipeline(self, kind: str) -> DiffusionPipeline:
        """A pipeline for one call, of shared models and a scheduler of its own: a scheduler counts the steps of a call, so
        that two calls cannot share it."""
        with self._loading:
            if kind not in self._pipelines:
                self._pipelines[kind] = {ALONG_EDGES: self._with_controlnet, VIDEO: self._with_motion}[kind]()
        pipe = self._pipelines[kind]
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        pipe = type(pipe)(**{**pipe.components, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _with_controlnet(self) -> DiffusionPipeline:
        controlnet = ControlNetModel.from_pretrained(self.checkpoints.controlnet, dtype=self.dtype).to(self.device)
        return StableDiffusionSSRControlNetPipeline.from_pipe(self._pipelines[PICTURE], controlnet=controlnet)

    def _with_motion(self) -> DiffusionPipeline:
        adapter = MotionAdapter.from_pretrained(self.checkpoints.motion_adapter, dtype=self.dtype)
        pipe = AnimateDiffSSRPipeline.from_pipe(self._pipelines[PICTURE], motion_adapter=adapter)
        return pipe.to(self.device)

    def attention_map(self, choice: SubjectChoice) -> Image.Image:
        """The reference with what its query, or its mask, looks at in red."""
        pipe = self.pipeline(PICTURE)
        return pipe.subject_attention_map(choice.picture, query=choice.query or None, mask=choice.mask).overlay()

    def draw(
        self,
        request: DrawingRequest,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Image.Image | list[Image.Image]:
        """
        Draw a picture, or the frames of a video.

        Args:
            request ([`DrawingRequest`]):
                What to draw.
            on_step (`Callable`, *optional*):
                Called after each step with its number, from 1, and the number of steps.
            cancelled (`Callable`, *optional*):
                Asked after each step whether to stop.

        Returns:
            `PIL.Image.Image` or `list[PIL.Image.Image]`.

        Raises:
            [`Cancelled`]: if it was cancelled. `ValueError`: if the request does not fit together.
        """

        def after_step(pipe: DiffusionPipeline, step: int, timestep, tensors: dict) -> dict:
            on_step(step + 1, request.num_inference_steps)
            if cancelled():
                pipe._interrupt = True  # diffusers' way to leave out the steps that remain
            return tensors

        pipe = self.pipeline(request.kind)
        arguments = request.call_arguments()
        if request.subjects:
            arguments["subject"] = encode(pipe, request.subjects)
        if request.edges is not None:
            arguments["image"] = request.edges
        if cancelled():
            raise Cancelled
        generator = torch.Generator().manual_seed(request.seed)
        output = pipe(**arguments, generator=generator, callback_on_step_end=after_step)
        if cancelled():
            raise Cancelled
        return output.frames[0] if request.kind == VIDEO else output.images[0]


def encode(pipe: DiffusionPipeline, choices: tuple[SubjectChoice, ...]) -> SubjectEmbeds:
    """All subjects, to be drawn in one picture."""
    together = None
    for number, choice in enumerate(choices, start=1):
        try:
            subject = pipe.encode_subject(choice.picture, query=choice.query or None, mask=choice.mask)
        except ValueError as error:
            raise ValueError(f"Subject {number}: {error}") from error
        subject = subject.scaled(choice.scale)
        if choice.region is not None:
            subject = subject.inside(choice.region)
        together = subject if together is None else together + subject
    return together
