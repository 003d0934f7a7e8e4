"""Requests of every kind on one UNet, as a server gets them: for tests and soaks under load."""

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
    """What the callbacks of some requests raise."""


@dataclass(frozen=True)
class Request:
    r"""
    A request that can be repeated.

    Args:
        name (`str`):
            Its kind.
        draw (`Callable`):
            Draws and returns pictures, `(num_images, height, width, 3)`.
    """

    name: str
    draw: Callable[[], np.ndarray]

    def outcome(self) -> np.ndarray | str:
        """Its pictures, or the error that it raises as text."""
        try:
            return self.draw()
        except (CallbackError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def same_outcome(one: np.ndarray | str, other: np.ndarray | str) -> bool:
    """Whether two outcomes are the same, bit by bit."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and one == other
    return np.array_equal(one, other)


def mixed_requests(
    pipe, controlnet, photos: list[Image.Image], queries: list[str], size: int, steps: int = 2
) -> list[Request]:
    r"""
    Requests of every kind, all on the UNet of `pipe`: text-to-image with encoded subjects, with photos, with several subjects
    and regions, image-to-image, ControlNet, without a subject, stock pipelines; with callbacks that raise, or draw
    themselves; and invalid ones.

    Args:
        pipe ([`StableDiffusionSSRPipeline`]):
            The pipeline.
        controlnet (`ControlNetModel`):
            For the ControlNet requests.
        photos (`list[PIL.Image.Image]`), queries (`list[str]`):
            References and what is meant in each.
        size (`int`):
            Height and width of the pictures.
        steps (`int`, defaults to 2):
            Denoising steps.
    """
    image_to_image = ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline).from_pipe(pipe)
    with_control = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    for each in (pipe, image_to_image, with_control):
        each.set_progress_bar_config(disable=True)
    start = Image.effect_noise((size, size), 80).convert("RGB")
    left = np.zeros((size, size), np.float32)
    left[:, : size // 2] = 1
    # a stock pipeline's use of the tokenizer is not guarded: those that share one draw one after the other
    stock_lock = threading.Lock()

    def arguments(seed: int, **extra) -> dict:
        generator = torch.Generator("cpu").manual_seed(seed)
        common = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": generator, "output_type": "np"}
        return {"height": size, "width": size, **common, **extra}

    def stock(prompt: str, seed: int) -> np.ndarray:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        with stock_lock:
            # made anew each time: `from_pipe` walks the UNet's modules while others draw
            stock_pipe = diffusers.StableDiffusionPipeline.from_pipe(pipe, scheduler=scheduler)
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
        # prompts of other lengths than the queries
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
            "callback draws": functools.partial(drawing, prompt, subject, seed),
            "invalid": functools.partial(draw, subject=subject, subject_image=photo),
        }
        requests += [Request(name, each) for name, each in kinds.items()]
    return requests


def wrong_outcomes(requests: list[Request], expected: list, order: list[int], num_threads: int = 8) -> list[str]:
    r"""
    Run requests in threads and compare.

    Args:
        requests (`list[Request]`):
            What can be asked.
        expected (`list`):
            The outcome of each alone.
        order (`list[int]`):
            Which requests are run, by index.
        num_threads (`int`, defaults to 8):
            In how many threads.

    Returns:
        `list[str]`: what was not as alone.
    """

    def check(index: int) -> str | None:
        try:
            outcome = requests[index].outcome()
        except Exception as error:  # whatever happens under load is what is looked for
            return f"{requests[index].name}: {type(error).__name__}: {error}"
        return None if same_outcome(outcome, expected[index]) else f"{requests[index].name}: another outcome"

    with ThreadPoolExecutor(num_threads) as pool:
        return [wrong for wrong in pool.map(check, order) if wrong is not None]
