"""Threads that share one UNet, scheduler, tokenizer and SSR-Encoder; copies of the code, forks, callbacks, interrupts.

`RUN_SLOW=1 pytest tests/test_threads.py` does longer runs. docs/reliability.md has their results.
"""

import contextlib
import gc
import importlib.util
import inspect
import io
import os
import queue
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
from conftest import ROOT, UNET_LAYERS, call_args, make_image_encoder, make_picture, make_unet, snapshot
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from diffusers_ssr import (
    SSRPipelineMixin,
    StableDiffusionSSRPipeline,
    internals_ssr,
    set_max_concurrent_calls,
    shared_components,
)
from diffusers_ssr import hooks_ssr as hooks_of_the_package
from PIL import Image
from test_chains import make_controlnet, make_pipeline

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


@pytest.fixture(autouse=True)
def quick_garbage_collection():
    """`nothing_is_left` collects garbage thousands of times. Without this, each collection visits all imported modules,
    which takes longer than drawing a picture."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def nothing_is_left() -> bool:
    """Returns whether the shared state has no call left."""
    gc.collect()
    shared = shared_components._shared
    return not (shared.using or shared.running or shared.waiting or hooks_of_the_package._running)


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
    """Returns a picture that is not decoded yet."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Image.open(file)


# Requests


def test_200_mixed_requests_from_8_threads(pipe, switch_interval, quiet):
    """Each request has the same result (a picture or an error) as alone, bit by bit. The slow run repeats this 20
    times."""
    photos, queries = [make_picture(seed) for seed in range(3)], ["cat", "dog", "blue car on the left"]
    requests = mixed_requests(pipe, make_controlnet(), photos, queries, size=16)
    expected, before = [each.outcome() for each in requests], snapshot(pipe.unet)
    assert Counter(type(each) for each in expected) == {np.ndarray: 33, str: 6}
    for turn in range(20 if SLOW else 1):
        order = random.Random(turn).choices(range(len(requests)), k=200)
        assert wrong_outcomes(requests, expected, order) == []
        assert snapshot(pipe.unet) == before and nothing_is_left()


@pytest.mark.parametrize("disturbed", [False, True], ids=["alone", "with stock use of the tokenizer"])
def test_encodes_from_8_threads(pipe, quiet, disturbed):
    """The slow run has 5,000 encodes. In the second case, stock code uses the shared tokenizer at the same time
    without a lock."""
    photos, queries = [make_picture(seed) for seed in range(20)], ["cat", "a dog on the left", "the blue car " * 20]

    def encode(index: int) -> torch.Tensor:
        return pipe.encode_subject(photos[index % 20], queries[index % 3]).subjects[0].embeds

    expected, stop = [encode(index) for index in range(60)], threading.Event()

    def disturb():
        while not stop.is_set():
            pipe.tokenizer(["a cat on the beach"], padding="longest", return_tensors="pt")
            pipe.tokenizer("a cat")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    beside = threading.Thread(target=disturb)
    try:
        if disturbed:
            beside.start()
        with ThreadPoolExecutor(8) as pool:
            seen = pool.map(
                lambda index: torch.equal(encode(index), expected[index % 60]), range(5000 if SLOW else 160)
            )
            assert all(seen)
    finally:
        stop.set()
        sys.setswitchinterval(before)
    if disturbed:
        beside.join()


def test_the_copied_tokenizer_follows_changes_of_the_original(pipe):
    """The copy has tokens that were added later, for example by textual inversion, and a changed
    `model_max_length`."""
    alone = StableDiffusionPipeline(
        **{name: part for name, part in pipe.components.items() if not name.startswith("ssr_")},
        requires_safety_checker=False,
    )

    def agree(text: str) -> bool:
        ours, stock = (each.encode_prompt(text, "cpu", 1, True)[0] for each in (pipe, alone))
        return torch.equal(ours, stock)

    assert agree("a CAT <new>")
    before = pipe.encode_prompt("a CAT <new>", "cpu", 1, False)[0]
    pipe.tokenizer.add_tokens("<new>")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    assert agree("a CAT <new>") and not torch.equal(pipe.encode_prompt("a CAT <new>", "cpu", 1, False)[0], before)
    pipe.tokenizer.model_max_length = 8
    assert agree("a CAT <new>") and pipe.encode_prompt("a cat", "cpu", 1, False)[0].shape[1] == 8


@pytest.mark.parametrize(
    "name,method",
    [("StableDiffusionPipeline", "encode_prompt"), ("StableDiffusionInstructPix2PixPipeline", "_encode_prompt")],
)
def test_the_state_of_the_shared_tokenizer_does_not_change(name, method):
    _, pipe = make_pipeline(name)
    state = internals_ssr.tokenizer_backend(pipe.tokenizer)
    if state is None:
        pytest.skip("the CLIP tokenizer of transformers 4 is written in Python and has no such state")
    state.no_padding()
    getattr(pipe, method)("a cat", "cpu", 1, False)
    pipe.encode_subject(make_picture(), "cat")
    assert state.padding is None


class OverridesStock(SSRPipelineMixin, StableDiffusionPipeline):
    def encode_prompt(self, *args, **kwargs):
        self.used = [*getattr(self, "used", []), self.tokenizer]
        return super().encode_prompt(*args, **kwargs)


class OverridesOurs(StableDiffusionSSRPipeline):
    def encode_prompt(self, *args, **kwargs):
        self.used = [*getattr(self, "used", []), self.tokenizer]
        return super().encode_prompt(*args, **kwargs)


@pytest.mark.parametrize("own_class", [OverridesStock, OverridesOurs])
def test_an_own_encode_prompt_gets_a_copied_tokenizer(pipe, monkeypatch, own_class):
    """Also if it calls the method that it overrides, for which the copy is not copied again."""
    if internals_ssr.tokenizer_backend(pipe.tokenizer) is None:
        pytest.skip("the CLIP tokenizer of transformers 4 is written in Python and is not copied")
    own, copies = own_class.from_pipe(pipe), []
    original = shared_components._copied
    monkeypatch.setattr(shared_components, "_copied", lambda *args: copies.append(args) or original(*args))
    assert torch.equal(
        own.encode_subject(make_picture(), "cat").subjects[0].embeds,
        pipe.encode_subject(make_picture(), "cat").subjects[0].embeds,
    )
    own.encode_prompt("a cat", "cpu", 1, False)
    assert len(own.used) == 2 and own.tokenizer is pipe.tokenizer and own.tokenizer not in own.used
    assert len(copies) == 3 and inspect.signature(own.encode_prompt) == inspect.signature(lambda *args, **kwargs: 0)


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


def test_attributes_that_encode_prompt_sets_are_set_in_the_pipeline(pipe):
    pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=0.25)
    assert pipe._lora_scale == 0.25


# Hooks


def test_hooks_removed_during_a_forward_pass_of_another_thread(pipe, subject):
    """torch calls the hooks that it has already looked up, even if another thread removes them in the meantime. In
    this test, a user-defined hook removes them at the same point of the forward pass."""
    stock = StableDiffusionPipeline(
        **{name: part for name, part in pipe.components.items() if not name.startswith("ssr_")},
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    expected, gone = stock(**call_args()).images, []

    def remove(module, *_):
        internals_ssr.clear_forward_hooks(module, hooks_of_the_package._KEY)
        gone.append(module)

    handles = []
    for module in [pipe.unet, *(pipe.unet.get_submodule(name) for name in UNET_LAYERS)]:
        for each in [module, *([module.to_q, module.to_out[0]] if module is not pipe.unet else [])]:
            handles += [each.register_forward_pre_hook(remove), each.register_forward_hook(remove)]
    passes = hooks_of_the_package.SubjectPasses(pipe.unet, list(UNET_LAYERS), lambda sample: None)
    with passes, hooks_of_the_package.subject_in_unet(pipe.unet, UNET_LAYERS):
        assert np.array_equal(stock(**call_args()).images, expected)
    assert len(set(gone)) == 1 + 3 * len(UNET_LAYERS)
    for handle in handles:
        handle.remove()


def test_from_pipe_while_another_thread_draws(pipe, subject):
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
    from diffusers_ssr import StableDiffusionSSRControlNetPipeline

    control = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet())
    control.set_progress_bar_config(disable=True)
    before = snapshot(control.controlnet)[:3] if hasattr(control.controlnet, "attn_processors") else None
    kinds = [{"subject_in_controlnet": True}, {}]

    def draw(**extra):
        return control(**call_args(image=make_picture(1, (16, 16)), subject=subject, **extra)).images

    expected = [draw(**each) for each in kinds]
    assert np.abs(expected[0] - expected[1]).max() > 1e-5
    seen = in_threads(*(lambda each=each: [draw(**each) for _ in range(6)] for each in kinds * 2))
    for index, images in enumerate(seen):
        assert all(np.array_equal(each, expected[index % 2]) for each in images)
    assert not control.controlnet._forward_pre_hooks
    assert before is None or snapshot(control.controlnet)[:3] == before


def test_a_call_while_another_thread_compiles(pipe, subject, monkeypatch):
    """While a thread compiles, `torch.compiler.is_compiling()` returns `True` in all threads. Here its value changes
    between calls."""
    expected, asked = pipe(**call_args(subject=subject)).images, []

    def is_compiling() -> bool:
        asked.append(1)
        return len(asked) % 3 == 0

    monkeypatch.setattr(torch.compiler, "is_compiling", is_compiling)
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)
    if not asked:
        pytest.skip("these versions of torch and diffusers do not call `is_compiling`")


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


@pytest.mark.parametrize("compiled", [False, True])
def test_two_copies_of_the_code_on_one_unet(pipe, second_copy, switch_interval, compiled):
    """The copies also share the scheduler and the tokenizer."""
    assert second_copy.StableDiffusionSSRPipeline is not StableDiffusionSSRPipeline
    if compiled:
        torch._dynamo.reset()
        pipe.unet.compile(backend="eager")
    other = second_copy.StableDiffusionSSRPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    pipes, before = (pipe, other), snapshot(pipe.unet)
    subjects = [each.encode_subject(make_picture(seed), "cat").scaled(1.0) for seed, each in enumerate(pipes)]
    expected = [each(**call_args(subject=one)).images for each, one in zip(pipes, subjects, strict=True)]

    def draw(index: int):
        return [pipes[index](**call_args(subject=subjects[index])).images for _ in range(1 if compiled else 5)]

    for _ in range(3 if compiled else 1):
        for index, images in enumerate(in_threads(*(lambda index=index: draw(index % 2) for index in range(4)))):
            assert all(np.array_equal(each, expected[index % 2]) for each in images)
        assert snapshot(pipe.unet) == before


def test_a_callback_draws_with_another_copy_of_the_code(pipe, second_copy, subject):
    other = second_copy.StableDiffusionSSRPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    dog = other.encode_subject(make_picture(3), "dog").scaled(1.0)
    expected, inner, drawn = pipe(**call_args(subject=subject)).images, other(**call_args(subject=dog)).images, []

    def callback(own, step, timestep, callback_kwargs):
        drawn.append(other(**call_args(subject=dog)).images)
        return callback_kwargs

    assert np.array_equal(pipe(**call_args(subject=subject, callback_on_step_end=callback)).images, expected)
    assert len(drawn) == 2 and all(np.array_equal(each, inner) for each in drawn)


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_during_calls(pipe, subject):
    """The process is forked in a callback while another thread draws. The child finishes its call, makes another call,
    and has no hooks of the other thread."""
    before, expected = snapshot(pipe.unet), pipe(**call_args(subject=subject)).images
    stop, children, is_child = threading.Event(), [], []

    def callback(own, step, timestep, callback_kwargs):
        if step == 0:
            child = os.fork()
            (is_child if child == 0 else children).append(child)
        if is_child and snapshot(pipe.unet) != before:
            os._exit(3)
        return callback_kwargs

    def draw():
        while not stop.is_set():
            pipe(**call_args(subject=subject))

    beside = threading.Thread(target=draw)
    beside.start()
    try:
        for _ in range(3):
            images = pipe(**call_args(subject=subject, callback_on_step_end=callback)).images
            if is_child:
                again = pipe(**call_args(subject=subject)).images
                good = np.array_equal(images, expected) and np.array_equal(again, expected)
                os._exit(0 if good and snapshot(pipe.unet) == before else 4)
            assert np.array_equal(images, expected)
        for child in children:
            deadline = time.monotonic() + 300
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.05)
            if ended == (0, 0):
                os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(ended[1]) == 0 and ended[0] == child
    finally:
        if is_child:  # after an error, the child must not continue with the tests of the parent
            os._exit(5)
        stop.set()
        beside.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_inside_the_work_of_other_threads(pipe, subject):
    """The process is forked while one thread is in a forward pass of the UNet, and another one trains and holds all
    locks. In the child, the UNet is stock, no call counts as running, and the locks are free."""
    expected, before = pipe(**call_args(subject=subject)).images, snapshot(pipe.unet)
    inside, holding, stop = threading.Event(), threading.Event(), threading.Event()
    main = threading.get_ident()

    def wait_inside(*_):
        if threading.get_ident() != main:
            inside.set()
            stop.wait(60)

    def hold():
        shared = shared_components._shared
        training = hooks_of_the_package.subject_in_unet(pipe.unet, UNET_LAYERS)
        with training, shared.lock, shared.decoding, shared.tokenizers[pipe.tokenizer].lock:
            holding.set()
            stop.wait(60)

    hook = pipe.unet.conv_norm_out.register_forward_pre_hook(wait_inside)
    threads = [threading.Thread(target=lambda: pipe(**call_args(subject=subject))), threading.Thread(target=hold)]
    threads[0].start()
    assert inside.wait(60)
    hook.remove()
    assert snapshot(pipe.unet) != before
    threads[1].start()
    assert holding.wait(60)
    child = os.fork()
    if child == 0:
        try:
            stock = snapshot(pipe.unet) == before and nothing_is_left()
            set_max_concurrent_calls(1)
            pipe.encode_subject(as_file(make_picture(5)), "dog")
            right = np.array_equal(pipe(**call_args(subject=subject)).images, expected)
            os._exit(0 if stock and right else 4)
        finally:
            os._exit(5)
    try:
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        stop.set()
        for each in threads:
            each.join()


# Limit of concurrent calls


def test_a_short_call_does_not_wait_for_long_ones(pipe, subject):
    started, short_is_done, ended = threading.Barrier(4), threading.Event(), []

    def long():
        seen = []

        def callback(own, step, timestep, callback_kwargs):
            if not seen:
                started.wait(timeout=300)
            seen.append(step)
            own._interrupt = short_is_done.is_set()
            return callback_kwargs

        pipe(**call_args(subject=subject, num_inference_steps=900, callback_on_step_end=callback))
        ended.append(short_is_done.is_set())

    def short():
        started.wait(timeout=300)
        pipe(**call_args(subject=subject, num_inference_steps=1))
        short_is_done.set()

    in_threads(long, long, long, short)
    assert ended == [True] * 3


@pytest.fixture
def bound():
    yield set_max_concurrent_calls
    set_max_concurrent_calls(None)


def most_at_once(pipe, subject, num_threads: int = 6) -> int:
    """Returns the largest number of calls that are between their first and last step at the same time."""
    lock, now, most = threading.Lock(), set(), []

    def draw(index: int):
        def callback(own, step, timestep, callback_kwargs):
            with lock:
                (now.discard if step == 2 else now.add)(index)
                most.append(len(now))
            time.sleep(0.01)
            return callback_kwargs

        return pipe(**call_args(subject=subject, num_inference_steps=3, callback_on_step_end=callback)).images

    images = in_threads(*(lambda index=index: draw(index) for index in range(num_threads)))
    assert all(np.array_equal(each, images[0]) for each in images)
    return max(most)


@pytest.mark.parametrize("number,with_subject", [(1, True), (2, True), (1, False)])
def test_the_limit_of_concurrent_calls(pipe, subject, bound, number, with_subject):
    subject = subject if with_subject else None
    bound(number)
    assert most_at_once(pipe, subject) <= number and nothing_is_left()
    bound(None)
    assert most_at_once(pipe, subject) > number


def test_the_limit_applies_to_all_copies_of_the_code(pipe, subject, bound, second_copy):
    second_copy.set_max_concurrent_calls(1)
    assert most_at_once(pipe, subject) == 1
    pipe.set_max_concurrent_calls(None)
    assert most_at_once(pipe, subject) > 1


def test_a_call_in_a_callback_does_not_wait_for_the_outer_call(pipe, subject, bound):
    bound(1)
    expected, drawn = pipe(**call_args(subject=subject)).images, []

    def callback(own, step, timestep, callback_kwargs):
        drawn.append(pipe(**call_args(subject=subject)).images)
        return callback_kwargs

    images = in_threads(*[lambda: pipe(**call_args(subject=subject, callback_on_step_end=callback)).images] * 3)
    assert all(np.array_equal(each, expected) for each in images + drawn) and len(drawn) == 6


def test_waiting_calls_run_in_order(bound):
    bound(1)
    order, threads = [], []

    def call(index: int):
        with shared_components.turn_to_run():
            order.append(index)

    with shared_components.turn_to_run():
        for index in range(6):
            threads.append(threading.Thread(target=call, args=(index,)))
            threads[-1].start()
            while len(shared_components._shared.waiting) <= index:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(6)) and nothing_is_left()


def test_an_error_ends_the_turn_of_a_call(pipe, subject, bound):
    bound(1)
    for arguments in ({"subject": "no subject"}, {"height": 13, "width": 16, "subject": subject}, {"subject_scal": 1}):
        with pytest.raises(ValueError):
            pipe(**call_args(**arguments))
        assert nothing_is_left()
    (images,) = in_threads(lambda: pipe(**call_args(subject=subject)).images)
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_an_invalid_limit_of_calls_is_rejected(number):
    with pytest.raises(ValueError, match="`number` has to be a positive number of calls"):
        set_max_concurrent_calls(number)


# Interrupts


def is_ours(file: str) -> bool:
    # not `ROOT`: the package may have been imported through a link
    return os.path.dirname(file) == os.path.dirname(shared_components.__file__)


def interrupted_at(call, moment: int, traced=is_ours, events: tuple[str, ...] = ("line",)) -> bool:
    """Runs a call and raises a `KeyboardInterrupt` at the event number `moment` in the traced files, which are this
    project's modules by default. Returns `False` if the call ends before that."""
    left = [moment]

    def trace(frame, event, argument):
        if not traced(frame.f_code.co_filename):
            return None
        if event in events:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    tracer = sys.gettrace()  # for example of a coverage run
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracer)
    return False


@pytest.mark.skipif(
    not SLOW, reason="slow, runs with RUN_SLOW=1; test_unet_hooks.py::test_ctrl_c_leaves_the_unet_unchanged is fast"
)
@pytest.mark.parametrize("way", ["UNet", "compiled in place", "ControlNet"])
def test_ctrl_c_at_every_line(pipe, subject, way):
    """After an interrupt, the UNet is unchanged, nothing counts as in use, and the next picture is right. A compiled
    UNet is only interrupted at every 11th line, because each interrupt can compile it again."""
    own, extra = pipe, {}
    if way == "compiled in place":
        torch._dynamo.reset()
        pipe.unet.compile(backend="eager")
    if way == "ControlNet":
        from diffusers_ssr import StableDiffusionSSRControlNetPipeline

        own = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet())
        own.set_progress_bar_config(disable=True)
        extra = {"image": make_picture(1, (16, 16)), "subject_in_controlnet": True}
    callback = {"callback_on_step_end": lambda own, step, timestep, callback_kwargs: callback_kwargs}

    def draw():
        return own(**call_args(subject=subject, height=16, width=16, **callback, **extra)).images

    before, expected, moment = snapshot(pipe.unet), draw(), 1
    while interrupted_at(draw, moment):
        assert nothing_is_left() and snapshot(pipe.unet) == before, moment
        assert way != "ControlNet" or not own.controlnet._forward_pre_hooks
        moment += 11 if way == "compiled in place" else 1
    assert moment > 1000
    assert np.array_equal(draw(), expected) and snapshot(pipe.unet) == before


@pytest.mark.parametrize("way", ["draw", "encode", "wait"])
def test_ctrl_c_in_the_standard_library(pipe, subject, way):
    """An interrupt inside the context managers, locks and queues of Python leaves no lock locked: another thread can
    draw and encode. The slow run tries every moment."""
    expected = pipe(**call_args(subject=subject)).images
    files = [module.__file__ for module in (threading, contextlib, queue)]

    def call():
        if way == "wait":
            set_max_concurrent_calls(1)
        if way == "encode":
            pipe.encode_subject(as_file(make_picture(1)), "dog")
        else:
            pipe(**call_args(subject=subject, num_inference_steps=1))

    def beside():
        pipe.encode_subject(as_file(make_picture(2)), "cat")
        return pipe(**call_args(subject=subject)).images

    moment = 1
    try:
        while interrupted_at(call, moment, files.__contains__, ("line", "return")):
            set_max_concurrent_calls(1)
            (images,) = in_threads(beside, timeout=30)
            assert np.array_equal(images, expected) and nothing_is_left(), moment
            moment += 1 if SLOW else 5
    finally:
        set_max_concurrent_calls(None)
    assert moment > 5


@pytest.mark.skipif(
    not SLOW, reason="slow, runs with RUN_SLOW=1; test_unet_hooks.py::test_ctrl_c_leaves_the_unet_unchanged is fast"
)
def test_ctrl_c_at_random_moments(pipe, subject):
    """300 signals, and in every third case another thread draws at the same time."""
    assert threading.current_thread() is threading.main_thread()
    before, expected = snapshot(pipe.unet), pipe(**call_args(subject=subject)).images
    started = time.monotonic()
    pipe(**call_args(subject=subject))
    duration = time.monotonic() - started
    handler, chance, interrupts = signal.signal(signal.SIGALRM, signal.default_int_handler), random.Random(0), 0
    beside_images = []

    def draw_beside():
        beside_images.append(pipe(**call_args(subject=subject)).images)

    try:
        for turn in range(300):
            beside = threading.Thread(target=draw_beside if turn % 3 == 0 else lambda: None)
            beside.start()
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.1, 1.0) * duration)
                pipe(**call_args(subject=subject))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            beside.join(timeout=60)
            assert not beside.is_alive() and snapshot(pipe.unet) == before and nothing_is_left(), turn
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupts > 100
    assert all(np.array_equal(each, expected) for each in beside_images)
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)


def test_the_next_call_removes_hooks_that_an_interrupted_call_left(pipe, subject):
    """A second interrupt can stop the cleanup of the first one. Hooks that remain have no effect, and the next call
    removes them."""
    before, expected = snapshot(pipe.unet), pipe(**call_args(subject=subject)).images
    request = lambda sample: None  # noqa: E731
    passes = hooks_of_the_package.SubjectPasses(pipe.unet, list(UNET_LAYERS), request)
    passes.start()
    hooks_of_the_package._add_hooks(pipe.unet, UNET_LAYERS, passes)
    del passes, request
    gc.collect()
    assert snapshot(pipe.unet) != before
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)
    assert snapshot(pipe.unet) == before


def test_an_interrupted_call_does_not_keep_the_scheduler_in_use(pipe):
    """After an interrupted call, the pipeline does not count as in use, so the next call runs on the pipeline
    itself."""
    seen = []

    def callback(own, step, timestep, callback_kwargs):
        seen.append(own is pipe)
        return callback_kwargs

    assert interrupted_at(lambda: pipe(**call_args()), 15)
    gc.collect()
    pipe(**call_args(callback_on_step_end=callback))
    assert seen == [True, True]


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


def test_the_next_call_releases_locks_that_an_interrupt_left(pipe, subject):
    """Ctrl-C between the body and the end of a `with` block can leave a lock held. After the next call, other threads
    can draw."""
    expected = pipe(**call_args(subject=subject)).images
    locks = [shared_components._shared.lock, shared_components._shared.tokenizers[pipe.tokenizer].lock]
    for lock in locks:
        lock.acquire()
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)
    assert not any(lock._is_owned() for lock in locks)
    (images,) = in_threads(lambda: pipe(**call_args(subject=subject)).images)
    assert np.array_equal(images, expected)
