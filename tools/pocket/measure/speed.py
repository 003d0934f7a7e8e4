"""Measures how cheaper inference changes the images: fewer tokens, fewer steps, cached and merged features."""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import tomesd
from DeepCache import DeepCacheSDHelper
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler

from .references import References, draw


def tokens(refs: References) -> None:
    """Measures subjects with fewer tokens."""
    subjects = refs.encode(0)
    whole = None
    length = subjects[0].subjects[0].embeds.shape[1]
    for count in (length, *(n for n in (96, 48, 24, 12, 6) if n < length)):
        pictures = refs.draw(refs.prompts(None), [each.compact(count) for each in subjects], f"{count} tokens")
        whole = pictures if whole is None else whole
        change = np.abs(pictures.astype(np.float32) - whole).mean() / 255
        print(f'"a thing", with {count} tokens a subject ({len(pictures)} images):')
        refs.report_queried(refs.judge.look_at(pictures))
        print(f"  mean change of a pixel:                {100 * change:.2f} % of its range")


@contextmanager
def dpm_solver(pipe) -> Iterator[None]:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    yield


@contextmanager
def lcm(pipe) -> Iterator[None]:
    """Only uses the scheduler, because the pocket checkpoint has no LCM-LoRA and does not need one."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    yield


@contextmanager
def deepcache(pipe, interval: int) -> Iterator[None]:
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def tome(pipe) -> Iterator[None]:
    tomesd.apply_patch(pipe, ratio=0.5)
    try:
        yield
    finally:
        tomesd.remove_patch(pipe)


@dataclass
class Way:
    """A variant of inference: a context manager that changes the pipeline, and the settings of the call."""

    apply: Callable[[DiffusionPipeline], AbstractContextManager] = nullcontext
    steps: int = 25
    tokens: int = 10**6  # more than any subject has
    with_subject: bool = True


WHOLE = "DDIM, 25 steps"
WAYS = {
    WHOLE: Way(),
    "the same without a subject": Way(with_subject=False),
    "24 tokens a subject": Way(tokens=24),
    "ToMe, half of the positions": Way(tome),
    "DeepCache, every 2nd step": Way(functools.partial(deepcache, interval=2)),
    "DeepCache, every 3rd step": Way(functools.partial(deepcache, interval=3)),
    "DDIM, 8 steps": Way(steps=8),
    "DPM-Solver++, 8 steps": Way(dpm_solver, steps=8),
    "LCM's scheduler, 4 steps": Way(lcm, steps=4),
}


def few_steps(refs: References) -> None:
    """Measures the time and the change of the images with fewer steps, cached features and merged positions.

    The variants run alternately, so their times are comparable. DDIM adds no noise, so the same seed gives the same
    image.
    """
    subjects, stock = refs.encode(0), refs.pipe.scheduler
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    drawn: dict[str, np.ndarray] = {}
    for _ in range(refs.args.rounds):
        for name, way in WAYS.items():
            args = argparse.Namespace(**{**vars(refs.args), "eta": 0.0, "num_inference_steps": way.steps})
            given = [each.compact(way.tokens) for each in subjects] if way.with_subject else None
            with way.apply(refs.pipe):
                started = time.perf_counter()
                drawn[name] = draw(refs.pipe, args, refs.prompts(None), given, name)
                seconds[name].append(time.perf_counter() - started)
            refs.pipe.scheduler = stock
    whole = drawn[WHOLE].astype(np.float32)
    for name, pictures in drawn.items():
        refs.columns.append(pictures)
        change = np.abs(pictures - whole).mean() / 255
        print(f'{name} ("a thing", {len(pictures)} images):')
        print(f"  time:                                  {min(seconds[name]) / min(seconds[WHOLE]):.2f} of 25 steps")
        print(f"  mean change of a pixel:                {100 * change:.1f} % of its range")
        refs.report_queried(refs.judge.look_at(pictures))
