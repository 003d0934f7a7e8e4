"""Threads that share one UNet, scheduler, tokenizer and SSR-Encoder; copies of the code, and interrupts.

`RUN_SLOW=1 pytest tests/test_threads.py` does longer runs. docs/reliability.md has their results.
"""

import copy
import importlib.util
import io
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, call_args, make_image_encoder, make_picture, make_unet, snapshot
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from diffusers_ssr import SSRPipelineMixin, StableDiffusionSSRControlNetPipeline, StableDiffusionSSRPipeline, hooks_ssr
from PIL import Image
from test_chains import make_controlnet
from test_pipeline_ssr import stock_of

from tools.mixed_requests import mixed_requests, wrong_outcomes


pytestmark = pytest.mark.usefixtures("one_thread")
SLOW = os.environ.get("RUN_SLOW") == "1"


@pytest.fixture
def subject(pipe):
    return pipe.encode_subject(make_picture(), "cat").scaled(1.0)


@pytest.fixture(params=[None, 1e-4], ids=["as usual", "1e-4"])
def switch_interval(request):
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param or before)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def in_threads(*functions, timeout: float = 300) -> list:
    """Runs the functions at the same time and returns their results."""
    results: list = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    # not a `ThreadPoolExecutor`, which would wait for a thread that hangs
    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout)
        assert not each.is_alive(), "a thread hangs"
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return results


def as_file(picture: Image.Image) -> Image.Image:
    """Returns an image that is not decoded yet."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Image.open(file)


@pytest.mark.parametrize("switch_interval", [None, 1e-4] if SLOW else [None], indirect=True)
def test_200_mixed_requests_from_8_threads(pipe, switch_interval, quiet):
    """Each request has the same result (an image or an error) as alone, bit by bit. The slow run repeats this,
    also with more frequent switches between the threads."""
    photos, queries = [make_picture(seed) for seed in range(3)], ["cat", "dog", "blue car on the left"]
    requests = mixed_requests(pipe, make_controlnet(), photos, queries, size=16)
    expected, before = [each.outcome() for each in requests], snapshot(pipe.unet)
    assert Counter(type(each) for each in expected) == {np.ndarray: 33, str: 6}
    for turn in range(2 if SLOW else 1):
        order = random.Random(turn).choices(range(len(requests)), k=200)
        assert wrong_outcomes(requests, expected, order) == []
        assert snapshot(pipe.unet) == before and not hooks_ssr._hooked


def test_encodes_from_8_threads(pipe, quiet, switch_interval):
    """The threads share images that are not decoded yet, and a tokenizer that pads queries of different lengths. The
    slow run has 5,000 encodes."""
    photos, queries = [make_picture(seed) for seed in range(20)], ["cat", "a dog on the left", "the blue car " * 20]

    def encode(index: int, photos) -> torch.Tensor:
        return pipe.encode_subject(photos[index % 20], queries[index % 3]).subjects[0].embeds

    expected, files = [encode(index, photos) for index in range(60)], [as_file(photo) for photo in photos]
    with ThreadPoolExecutor(8) as pool:
        same = pool.map(
            lambda index: torch.equal(encode(index, files), expected[index % 60]), range(5000 if SLOW else 80)
        )
        assert all(same)


class OverridesStock(SSRPipelineMixin, StableDiffusionPipeline):
    def encode_prompt(self, *args, **kwargs):
        return super().encode_prompt(*args, **kwargs)


class OverridesOurs(StableDiffusionSSRPipeline):
    def encode_prompt(self, *args, **kwargs):
        return super().encode_prompt(*args, **kwargs)


class CallsTheFirst(OverridesStock):
    pass


@pytest.mark.parametrize("own_class", [OverridesStock, OverridesOurs, CallsTheFirst, StableDiffusionSSRPipeline])
def test_prompts_of_different_lengths_from_several_threads(pipe, own_class, switch_interval):
    """Also with a class that overrides `encode_prompt`."""
    own = own_class.from_pipe(pipe)
    prompts = ["a cat", ["a cat on the beach", "a dog"]]
    expected = [own.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts]
    seen = in_threads(
        *(lambda p=p: [own.encode_prompt(p, "cpu", 1, False)[0] for _ in range(20)] for p in prompts * 2)
    )
    for index, states in enumerate(seen):
        assert all(torch.equal(state, expected[index % 2]) for state in states)


@pytest.mark.parametrize("action", ["exchange", "unload"])
def test_components_that_change_during_a_call_do_not_change_it(pipe, subject, action):
    """Another thread exchanges the vision encoder, or removes the SSR-Encoder, while a query or a prompt is
    encoded."""
    expected = pipe.encode_subject(make_picture(), "cat").subjects[0].embeds
    vision, encoder = pipe.ssr_image_encoder, pipe.ssr_encoder

    def change(*_):
        if action == "exchange":
            pipe.ssr_image_encoder = make_image_encoder(seed=99)
        else:
            pipe.unload_ssr()

    def changed(function):
        hook = pipe.text_encoder.register_forward_hook(change)
        result = function()
        hook.remove()
        pipe.load_ssr(encoder, image_encoder=vision)
        return result

    assert torch.equal(changed(lambda: pipe.encode_subject(make_picture(), "cat").subjects[0].embeds), expected)
    for given in ({"subject_image": make_picture(), "subject_query": "cat"}, {"subject": subject}):
        images = pipe(**call_args(**given)).images
        assert np.array_equal(changed(lambda given=given: pipe(**call_args(**given)).images), images)
    assert torch.equal(pipe.encode_subject(make_picture(), "cat").subjects[0].embeds, expected)


def test_from_pipe_while_another_thread_generates(pipe, subject):
    """The modules of the UNet do not change while another thread iterates over them."""
    expected, done = pipe(**call_args(subject=subject)).images, threading.Event()

    def make():
        made = 0
        while not done.is_set() or made < 20:
            StableDiffusionPipeline.from_pipe(pipe)
            StableDiffusionSSRPipeline.from_pipe(pipe)
            sum(parameter.numel() for parameter in pipe.unet.parameters())
            made += 1
        return made

    def draw():
        images = [pipe(**call_args(subject=subject)).images for _ in range(10)]
        done.set()
        return images

    made, images = in_threads(make, draw)
    assert made >= 20 and all(np.array_equal(each, expected) for each in images)


def test_calls_with_and_without_subject_in_controlnet_at_the_same_time(pipe, subject):
    control = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet())
    control.set_progress_bar_config(disable=True)
    kinds = [{"subject_in_controlnet": True}, {}]

    def draw(**extra):
        return control(**call_args(image=make_picture(1, (16, 16)), subject=subject, **extra)).images

    expected = [draw(**each) for each in kinds]
    assert np.abs(expected[0] - expected[1]).max() > 1e-5
    seen = in_threads(*(lambda each=each: [draw(**each) for _ in range(6)] for each in kinds * 2))
    for index, images in enumerate(seen):
        assert all(np.array_equal(each, expected[index % 2]) for each in images)
    assert not control.controlnet._forward_pre_hooks


def test_pipelines_with_different_unets_can_share_a_scheduler(pipe, subject, components):
    """The pipelines have different UNets and the same scheduler."""
    second = StableDiffusionSSRPipeline.from_pipe(pipe, unet=make_unet(seed=4))
    second.set_progress_bar_config(disable=True)
    assert second.scheduler is pipe.scheduler and isinstance(pipe.scheduler, DDIMScheduler)
    pipes = (pipe, second)
    expected = [each(**call_args(subject=subject, num_inference_steps=3)).images for each in pipes]
    seen = in_threads(
        *(
            lambda each=each: [each(**call_args(subject=subject, num_inference_steps=3)).images for _ in range(5)]
            for each in pipes * 2
        )
    )
    for index, images in enumerate(seen):
        assert all(np.array_equal(each, expected[index % 2]) for each in images)


def test_a_stock_pipeline_in_another_thread_is_not_changed(pipe, subject):
    """While another thread generates with a subject, with its own scheduler and prompt embeddings."""
    stock = stock_of(pipe)
    stock.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    embeds, negative = stock.encode_prompt("a cat on the beach", "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    expected = [pipe(**call_args(subject=subject)).images, stock(**call_args(**given)).images]
    seen = in_threads(
        lambda: [pipe(**call_args(subject=subject)).images for _ in range(8)],
        lambda: [stock(**call_args(**given)).images for _ in range(8)],
    )
    assert all(np.array_equal(image, expected[index]) for index in range(2) for image in seen[index])


# Copies of the code


@pytest.fixture(scope="module")
def second_copy():
    """A second copy of the code with another module name, as `custom_pipeline=` loads it in addition to an installed
    package."""
    spec = importlib.util.spec_from_file_location(
        "diffusers_ssr_again", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [each for each in sys.modules if each.startswith(spec.name)]:
        del sys.modules[name]


def test_two_copies_of_the_code_on_one_unet(pipe, second_copy, switch_interval):
    """Each copy has its own scheduler and tokenizer."""
    assert second_copy.StableDiffusionSSRPipeline is not StableDiffusionSSRPipeline
    own = {"scheduler": DDIMScheduler.from_config(pipe.scheduler.config), "tokenizer": copy.deepcopy(pipe.tokenizer)}
    other = second_copy.StableDiffusionSSRPipeline(**{**pipe.components, **own}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    pipes, before = (pipe, other), snapshot(pipe.unet)
    subjects = [each.encode_subject(make_picture(seed), "cat").scaled(1.0) for seed, each in enumerate(pipes)]
    expected = [each(**call_args(subject=one)).images for each, one in zip(pipes, subjects, strict=True)]

    def draw(index: int):
        return [pipes[index](**call_args(subject=subjects[index])).images for _ in range(5)]

    for index, images in enumerate(in_threads(*(lambda index=index: draw(index % 2) for index in range(4)))):
        assert all(np.array_equal(each, expected[index % 2]) for each in images)
    assert snapshot(pipe.unet) == before


# Interrupts


def test_ctrl_c_at_random_moments(pipe, subject):
    """After a signal, another pipeline's images are those of the stock UNet, and once the next call has begun and ended,
    nothing is left in the UNet. In every third case another thread generates at the same time. The slow run has 300
    signals."""
    assert threading.current_thread() is threading.main_thread()
    stock, before = stock_of(pipe), snapshot(pipe.unet)
    expected, plain = pipe(**call_args(subject=subject)).images, stock(**call_args()).images
    started = time.monotonic()
    pipe(**call_args(subject=subject))
    duration = time.monotonic() - started
    handler, chance, interrupts = signal.signal(signal.SIGALRM, signal.default_int_handler), random.Random(0), 0
    turns, beside_images = 300 if SLOW else 12, []

    def generate_beside():
        beside_images.append(pipe(**call_args(subject=subject)).images)

    try:
        for turn in range(turns):
            beside = threading.Thread(target=generate_beside if turn % 3 == 0 else lambda: None)
            beside.start()
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.1, 1.0) * duration)
                pipe(**call_args(subject=subject))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            beside.join(timeout=60)
            assert not beside.is_alive(), turn
            assert np.array_equal(stock(**call_args()).images, plain), turn
            assert np.array_equal(pipe(**call_args(subject=subject)).images, expected), turn
            assert snapshot(pipe.unet) == before, turn
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupts > turns / 3
    assert all(np.array_equal(image, expected) for image in beside_images)
