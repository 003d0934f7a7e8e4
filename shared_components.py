"""What calls share with calls in other threads and in callbacks: pipelines, schedulers, tokenizers, and how many may run."""

import copy
import os
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from . import library_internals


class _Call:
    """A call that is under way, or waits until it may begin. The registries below hold calls weakly: one that Ctrl-C has
    ended, before it could say so, is gone with its frame."""

    def __init__(self, *used):
        self.thread = threading.get_ident()
        self.used = used


class _Shared:
    """What all calls of the process share. There is one, also where several copies of this code are loaded
    (`custom_pipeline=` loads one, the installed package is another)."""

    def __init__(self):
        self.using: WeakSet[_Call] = WeakSet()
        self.tokenizers: WeakKeyDictionary = WeakKeyDictionary()
        self.compiled: WeakKeyDictionary = WeakKeyDictionary()
        self.max_calls: int | None = None
        self.running: WeakSet[_Call] = WeakSet()
        self.waiting: list[weakref.ref[_Call]] = []
        self.make_locks()

    def make_locks(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition()

    def after_fork(self) -> None:
        """In a forked process only the forking thread goes on, and others may have held anything."""
        self.make_locks()
        self.tokenizers.clear()
        self.compiled.clear()
        self.waiting.clear()
        for calls in (self.using, self.running):
            for call in [each for each in calls if each.thread != threading.get_ident()]:
                calls.discard(call)


# the number is that of the attributes that copies of this code expect of each other
_home = sys.modules.setdefault("_diffusers_ssr_shared_1", types.ModuleType("_diffusers_ssr_shared_1"))
_shared: _Shared = vars(_home).setdefault("shared", _Shared())

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _shared.after_fork())


def registry_lock() -> threading.RLock:
    """To be held for a moment while what calls share is changed, and never while a model runs."""
    return _shared.lock


def compiled_lock(module) -> threading.RLock:
    """To be held while a module that was compiled in place runs: compiled code looks through the hooks of all layers before
    it begins, and meanwhile none may come or go."""
    with _shared.lock:
        return _shared.compiled.setdefault(module, threading.RLock())


@contextmanager
def own_pipeline(pipeline) -> Iterator:
    r"""
    A pipeline for one call. It is the pipeline itself; or, where that one or its scheduler is in a call already (in another
    thread, or because a callback draws with the pipeline that it is called by), a shallow copy with a scheduler of its own:
    a scheduler and a pipeline's private attributes hold one call's state.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
    """
    with _shared.lock:
        scheduler = pipeline.scheduler
        if any(each is pipeline or each is scheduler for call in _shared.using for each in call.used):
            # from its config and not as a deep copy: the other call may be changing it
            pipeline = _with_component(pipeline, "scheduler", type(scheduler).from_config(scheduler.config))
        call = _Call(pipeline, pipeline.scheduler)
        _shared.using.add(call)
    try:
        yield pipeline
    finally:
        with _shared.lock:
            _shared.using.discard(call)
        _release_locks()


def _release_locks() -> None:
    """After a call: these locks are held for moments inside of one, so that one which this thread still holds was left by a
    Ctrl-C between a `with` block and its end. Other threads would wait for it without end."""
    locks = [_shared.lock, *(entry.lock for entry in _shared.tokenizers.values())]
    for lock in locks:
        while lock._is_owned():
            lock.release()


def _with_component(pipeline, name: str, component):
    """A shallow copy of a pipeline with another component. Not `copy.copy`, which goes the way of pickling and would copy
    weights with it."""
    twin = object.__new__(type(pipeline))
    twin.__dict__.update(pipeline.__dict__)
    vars(twin)[name] = component
    return twin


def with_own_tokenizer(pipeline, use: Callable[[Any], Any]) -> Any:
    r"""
    Let a pipeline use its tokenizer alone. A fast tokenizer keeps padding and truncation as state, so that two threads that
    use it at once cut or pad each other's text. A stock pipeline in another thread takes no lock; the text of a subject is
    therefore read with a copy of the tokenizer's state, and that one under a lock.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
        use (`Callable`):
            Is called with a shallow copy of the pipeline that has the copied tokenizer. What it sets in the copy is set in
            the pipeline afterwards.

    Returns:
        What `use` returns.
    """
    tokenizer = pipeline.tokenizer
    if tokenizer is None:
        return use(pipeline)
    with _shared.lock:
        entry = _shared.tokenizers.setdefault(tokenizer, types.SimpleNamespace(lock=threading.RLock(), known=None))
    # held in this frame and not by a generator: one that Ctrl-C has cut off would hold it until it is collected
    with entry.lock:
        twin = _with_component(pipeline, "tokenizer", _copied(tokenizer, entry))
        before = dict(vars(twin))
        try:
            return use(twin)
        finally:
            changed = {name: value for name, value in vars(twin).items() if before.get(name, before) is not value}
            vars(pipeline).update(changed)


def _copied(tokenizer, entry):
    """A tokenizer with a copied state, made anew when the tokenizer has got other tokens or rules."""
    backend = library_internals.tokenizer_backend(tokenizer)
    if backend is None:  # it is written in Python and keeps no such state
        return tokenizer
    try:
        rules = pickle.dumps((backend.normalizer, backend.pre_tokenizer, backend.post_processor))
        state = backend.get_vocab_size(), rules
        if entry.known is None or entry.known[0] is not backend or entry.known[1] != state:
            entry.known = backend, state, copy.deepcopy(backend)
    except Exception:  # rules that are written in Python cannot be copied
        return tokenizer
    return library_internals.with_tokenizer_backend(tokenizer, entry.known[2])


def set_max_concurrent_calls(number: int | None) -> None:
    r"""
    Bound how many calls of SSR pipelines run at the same time in this process, and so how much memory they take: each holds
    its own latents and activations. Others wait, and begin in the order in which they came. A call that a callback makes
    belongs to the call that it is called by, and does not wait. (A callback that waits for a call in *another* thread may
    wait for ever, if that one has to wait for the callback's own call.)

    Args:
        number (`int`, *optional*):
            How many; `None`, the default of the process, is any number.

    Raises:
        `ValueError`: if `number` is no positive number.

    Example:

    ```py
    >>> from diffusers_ssr import set_max_concurrent_calls
    >>> set_max_concurrent_calls(2)
    ```

    From the Hub, without the package: `pipe.set_max_concurrent_calls(2)`.
    """
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"`number` has to be a positive number of calls, or None, but is {number!r}.")
    with _shared.changed:
        _shared.max_calls = number
        _shared.changed.notify_all()


@contextmanager
def turn_to_run() -> Iterator[None]:
    """Wait until a call may begin, by [`set_max_concurrent_calls`], and count it until it ends."""
    call = _Call()
    try:
        with _shared.changed:
            if not any(each.thread == call.thread for each in _shared.running):
                _shared.waiting.append(weakref.ref(call))
                while not _may_run(call):
                    # now and then without a notice: a call that Ctrl-C has ended may have given none
                    _shared.changed.wait(timeout=1.0)
                _stop_waiting(call)
            _shared.running.add(call)
        yield
    finally:
        with _shared.changed:
            _stop_waiting(call)
            _shared.running.discard(call)


def _may_run(call: _Call) -> bool:
    first = next(each for each in (reference() for reference in _shared.waiting) if each is not None)
    busy = {each.thread for each in _shared.running}
    return _shared.max_calls is None or first is call and len(busy) < _shared.max_calls


def _stop_waiting(call: _Call) -> None:
    _shared.waiting = [each for each in _shared.waiting if each() not in (None, call)]
    _shared.changed.notify_all()
