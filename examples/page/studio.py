"""Generates the requests of users with pipelines for images, ControlNet and video that share one SSR-Encoder."""

import copy
import threading
from collections.abc import Callable

import numpy as np
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
from .request import ALONG_EDGES, IMAGE, VIDEO, GenerationRequest, SubjectChoice


class Cancelled(Exception):
    """The generation was cancelled."""


class Studio:
    """
    Generates images and videos. It can be used by several threads at the same time. The models are loaded once. The
    pipelines for images and ControlNet share one UNet. The UNet for video is created for the first video.

    Args:
        checkpoints ([`Checkpoints`]):
            The checkpoints to load.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._loading = threading.Lock()
        loaded = load_pipeline(checkpoints.base, checkpoints.ssr)
        # `custom_pipeline` imports a copy of the code, and all pipelines that share the UNet must use the same copy
        # counting tokens changes the truncation of a tokenizer, so the pipelines need another one
        self._tokenizer = copy.deepcopy(loaded.tokenizer)
        self._pipelines: dict[str, DiffusionPipeline] = {IMAGE: StableDiffusionSSRPipeline.from_pipe(loaded)}

    @property
    def dtype(self) -> torch.dtype:
        return self._pipelines[IMAGE].unet.dtype

    @property
    def device(self) -> torch.device:
        return self._pipelines[IMAGE].device

    @property
    def side(self) -> int:
        """Height and width of a generated image in pixels."""
        pipe = self._pipelines[IMAGE]
        return pipe.unet.config.sample_size * pipe.vae_scale_factor

    def pipeline(self, kind: str) -> DiffusionPipeline:
        """Returns a pipeline for one call, with the shared models and a new scheduler. Two calls cannot share a
        scheduler, because it counts the steps of a call."""
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
        return StableDiffusionSSRControlNetPipeline.from_pipe(self._pipelines[IMAGE], controlnet=controlnet)

    def _with_motion(self) -> DiffusionPipeline:
        adapter = MotionAdapter.from_pretrained(self.checkpoints.motion_adapter, dtype=self.dtype)
        pipe = AnimateDiffSSRPipeline.from_pipe(self._pipelines[IMAGE], motion_adapter=adapter)
        return pipe.to(self.device)

    def attention(self, choice: SubjectChoice) -> np.ndarray:
        """Returns where the query or the mask finds the subject, from 0 to 1 for each pixel of the reference image."""
        pipe = self.pipeline(IMAGE)
        return pipe.subject_attention_map(choice.image, **choice.selection()).heat

    def cut_end(self, text: str) -> str:
        """Returns the end of a prompt or query that the text encoder does not see, because it is too long."""
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self._pipelines[IMAGE].tokenizer.decode(tokens[self._tokenizer.model_max_length - 2 :]).strip()

    def generate(
        self,
        request: GenerationRequest,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Image.Image]:
        """
        Generates an image for each seed, or the frames of a video.

        Args:
            request ([`GenerationRequest`]):
                The request to generate.
            on_step (`Callable`, *optional*):
                Called after each step with the number of the step, starting at 1, and the total number of steps.
            cancelled (`Callable`, *optional*):
                Called after each step. The generation stops if it returns `True`.

        Returns:
            `list[PIL.Image.Image]`.

        Raises:
            [`Cancelled`]: if the generation was cancelled. `ValueError`: if the request is invalid.
        """

        def after_step(pipe: DiffusionPipeline, step: int, timestep, tensors: dict) -> dict:
            on_step(step + 1, request.num_inference_steps)
            if cancelled():
                pipe._interrupt = True  # diffusers skips the remaining steps
            return tensors

        pipe = self.pipeline(request.kind)
        arguments = request.call_arguments()
        if request.subjects:
            arguments["subject"] = encode(pipe, request.subjects)
        if request.edges is not None:
            arguments["image"] = request.edges
        if cancelled():
            raise Cancelled
        generator = [torch.Generator().manual_seed(seed) for seed in request.seeds]
        output = pipe(**arguments, generator=generator, callback_on_step_end=after_step)
        if cancelled():
            raise Cancelled
        return output.frames[0] if request.kind == VIDEO else output.images


def encode(pipe: DiffusionPipeline, choices: tuple[SubjectChoice, ...]) -> SubjectEmbeds:
    """Encodes all subjects and combines them to generate them in one image."""
    together = None
    for number, choice in enumerate(choices, start=1):
        try:
            subject = pipe.encode_subject(choice.image, **choice.selection())
        except ValueError as error:
            raise ValueError(f"Subject {number}: {error}") from error
        subject = subject.scaled(choice.scale)
        if choice.region is not None:
            subject = subject.inside(choice.region)
        together = subject if together is None else together + subject
    return together
