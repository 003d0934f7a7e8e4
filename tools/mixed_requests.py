"""Requests of every kind on one UNet, similar to the load of a server, for load tests and soak tests."""

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from diffusers_ssr import StableDiffusionSSRControlNetPipeline, ssr_pipeline_class
from PIL import Image


class CallbackError(Exception):
    """The error that the callbacks of some requests raise."""


@dataclass(frozen=True)
class Request:
    r"""
    A request that can be repeated.

    Args:
        name (`str`):
            The kind of the request.
        draw (`Callable`):
            Generates and returns images of shape `(num_images, height, width, 3)`.
    """

    name: str
    draw: Callable[[], np.ndarray]

    def outcome(self) -> np.ndarray | str:
        """Runs the request and returns its images, or its error as text."""
        try:
            return self.draw()
        except (CallbackError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def same_outcome(one: np.ndarray | str, other: np.ndarray | str) -> bool:
    """Whether two outcomes are exactly equal."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and one == other
    return np.array_equal(one, other)


def mixed_requests(
    pipe, controlnet, photos: list[Image.Image], queries: list[str], size: int, steps: int = 2
) -> list[Request]:
    r"""
    Creates requests of every kind that all use the UNet of `pipe`: text-to-image with encoded subjects, with photos,
    with several subjects and regions, image-to-image, ControlNet, requests without a subject, stock pipelines,
    requests with callbacks that raise an error or run the pipeline again, and invalid requests.

    Args:
        pipe ([`StableDiffusionSSRPipeline`]):
            The pipeline.
        controlnet (`ControlNetModel`):
            The ControlNet for the ControlNet requests.
        photos (`list[PIL.Image.Image]`), queries (`list[str]`):
            The reference images and the query for each of them.
        size (`int`):
            Height and width of the images.
        steps (`int`, defaults to 2):
            The number of denoising steps.
    """
    image_to_image = ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline).from_pipe(pipe)
    with_control = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    for each in (pipe, image_to_image, with_control):
        each.set_progress_bar_config(disable=True)
    start = Image.effect_noise((size, size), 80).convert("RGB")
    left = np.zeros((size, size), np.float32)
    left[:, : size // 2] = 1
    # Stock pipelines do not use the tokenizer in a thread-safe way, so they have their own, and only one of them runs at
    # a time.
    stock_lock, tokenizer = threading.Lock(), copy.deepcopy(pipe.tokenizer)

    def arguments(seed: int, **extra) -> dict:
        generator = torch.Generator("cpu").manual_seed(seed)
        common = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": generator, "output_type": "np"}
        return {"height": size, "width": size, **common, **extra}

    def stock(prompt: str, seed: int) -> np.ndarray:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        with stock_lock:
            # created for each request, because `from_pipe` iterates over the UNet's modules while other threads use it
            stock_pipe = diffusers.StableDiffusionPipeline.from_pipe(pipe, scheduler=scheduler, tokenizer=tokenizer)
            stock_pipe.set_progress_bar_config(disable=True)
            return stock_pipe(prompt, **arguments(seed)).images

    def raising(own, step, timestep, callback_kwargs):
        raise CallbackError("the callback's own")

    def drawing(prompt: str, subject, seed: int) -> np.ndarray:
        drawn = []

        def callback(own, step, timestep, callback_kwargs):
            drawn.append(pipe(prompt, subject=subject, **arguments(seed + 1, num_inference_steps=1)).images)
            return callback_kwargs

        outer = pipe(prompt, subject=subject, **arguments(seed, callback_on_step_end=callback)).images
        return np.concatenate([outer, *drawn])

    requests = []
    for seed, (photo, query) in enumerate(zip(photos, queries, strict=True)):
        subject = pipe.encode_subject(photo, query)
        other = pipe.encode_subject(photos[seed - 1], queries[seed - 1])
        pair = subject.inside(left) + other.scaled(0.5)
        # prompts with other lengths than the queries
        prompt = f"a {query} on the beach " * (1 + 12 * (seed % 2))

        def draw(own=pipe, prompt=prompt, seed=seed, **extra):
            control = {"height": size, "width": size} if own is not image_to_image else {}
            given = {name: each for name, each in arguments(seed, **extra).items() if name not in ("height", "width")}
            return own(prompt, **given, **control).images

        kinds = {
            "subject": functools.partial(draw, subject=subject),
            "photo": functools.partial(draw, subject_image=photo, subject_query=query),
            "two subjects": functools.partial(draw, subject=pair),
            "window": functools.partial(draw, subject=subject, subject_end=0.5),
            "image-to-image": functools.partial(draw, image_to_image, image=start, strength=0.99, subject=subject),
            "ControlNet": functools.partial(draw, with_control, image=start, subject=subject),
            "ControlNet sees it": functools.partial(
                draw, with_control, image=start, subject=subject, subject_in_controlnet=True
            ),
            "ControlNet without": functools.partial(draw, with_control, image=start),
            "without": draw,
            "stock": functools.partial(stock, prompt, seed),
            "callback raises": functools.partial(draw, subject=subject, callback_on_step_end=raising),
            "callback generates": functools.partial(drawing, prompt, subject, seed),
            "invalid": functools.partial(draw, subject=subject, subject_image=photo),
        }
        requests += [Request(name, each) for name, each in kinds.items()]
    return requests


def wrong_outcomes(requests: list[Request], expected: list, order: list[int], num_threads: int = 8) -> list[str]:
    r"""
    Run requests in threads and compare their outcomes with the expected ones.

    Args:
        requests (`list[Request]`):
            The requests to choose from.
        expected (`list`):
            The outcome of each request when it runs alone.
        order (`list[int]`):
            The indices of the requests to run.
        num_threads (`int`, defaults to 8):
            The number of threads.

    Returns:
        `list[str]`: a description of each outcome that differs from the expected one.
    """

    def check(index: int) -> str | None:
        try:
            outcome = requests[index].outcome()
        except Exception as error:  # any error under load is a finding
            return f"{requests[index].name}: {type(error).__name__}: {error}"
        return None if same_outcome(outcome, expected[index]) else f"{requests[index].name}: another outcome"

    with ThreadPoolExecutor(num_threads) as pool:
        return [wrong for wrong in pool.map(check, order) if wrong is not None]
