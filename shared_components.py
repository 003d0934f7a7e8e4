"""Manages what concurrent calls share (pipelines, schedulers and tokenizers), and how many calls may run at once."""

import copy
import os
import pickle
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from . import library_internals


class _Call:
    """A call that is running or waiting to begin. The registries below hold weak references to calls: if Ctrl-C ends a
    call before it is removed from a registry, it is freed with its frame."""

    def __init__(self, *used):
        self.thread = threading.get_ident()
        self.used = used
        # Gets an item when the call should check whether it may begin. It is written in C, unlike
        # `threading.Condition`, in which a Ctrl-C could leave the lock locked for good.
        self.woken: queue.SimpleQueue[None] = queue.SimpleQueue()


class _Shared:
    """The state that all calls in the process share. There is one object, even if several copies of this code are
    loaded (the installed package and those that `custom_pipeline=` loads)."""

    def __init__(self):
        self.using: WeakSet[_Call] = WeakSet()
        self.tokenizers: WeakKeyDictionary = WeakKeyDictionary()
        self.copied_tokenizers: WeakSet = WeakSet()
        self.compiled: WeakKeyDictionary = WeakKeyDictionary()
        self.max_calls: int | None = None
        self.running: WeakSet[_Call] = WeakSet()
        self.waiting: list[weakref.ref[_Call]] = []
        self.make_locks()

    def make_locks(self) -> None:
        self.lock = threading.RLock()
        self.decoding = threading.RLock()

    def after_fork(self) -> None:
        """Resets the locks and removes the calls of other threads in a forked process. Only the forking thread
        continues there, and the other threads may have held locks."""
        self.make_locks()
        self.tokenizers.clear()
        self.compiled.clear()
        self.waiting.clear()
        for calls in (self.using, self.running):
            for call in [each for each in calls if each.thread != threading.get_ident()]:
                calls.discard(call)


# The number is a version of the attributes of `_Shared`. Only copies of this code with the same number share the
# object.
_home = sys.modules.setdefault("_diffusers_ssr_shared_2", types.ModuleType("_diffusers_ssr_shared_2"))
_shared: _Shared = vars(_home).setdefault("shared", _Shared())

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _shared.after_fork())


def registry_lock() -> threading.RLock:
    """Returns the lock that must be held while shared state is changed. It is only held briefly, and never while a
    model runs."""
    return _shared.lock


def decoding_lock() -> threading.RLock:
    """Returns the lock that must be held while a picture is decoded."""
    return _shared.decoding


def compiled_lock(module) -> threading.RLock:
    """Returns the lock that must be held while a module that was compiled in place runs. Compiled code checks the
    hooks of all layers before it begins, and no hook may be added or removed during this check."""
    with _shared.lock:
        return _shared.compiled.setdefault(module, threading.RLock())


@contextmanager
def own_pipeline(pipeline) -> Iterator:
    r"""
    Context manager that gives a call a pipeline that no other call uses. This is the pipeline itself, unless the
    pipeline or its scheduler is already in a call (in another thread, or because a callback uses the pipeline that
    called it). In that case it is a shallow copy with its own scheduler, because a scheduler and the private
    attributes of a pipeline store the state of one call.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
    """
    with _shared.lock:
        scheduler = pipeline.scheduler
        if any(each is pipeline or each is scheduler for call in _shared.using for each in call.used):
            # made from the config and not as a deep copy, because the other call may be changing the scheduler
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
    """Releases the locks that this thread still holds after a call. These locks are only held during parts of a call.
    If one is still held afterwards, Ctrl-C interrupted the end of a `with` block, and other threads would wait for it
    forever."""
    locks = [_shared.lock, _shared.decoding, *(entry.lock for entry in _shared.tokenizers.values())]
    for lock in locks:
        while lock._is_owned():
            lock.release()


def _with_component(pipeline, name: str, component):
    """Returns a shallow copy of a pipeline with one component replaced."""
    twin = copy.copy(pipeline)
    vars(twin)[name] = component
    return twin


def with_own_tokenizer(pipeline, use: Callable[[Any], Any]) -> Any:
    r"""
    Calls a function with a pipeline whose tokenizer no other thread uses. A fast tokenizer stores padding and
    truncation as state, so that two threads that use it at the same time would apply each other's padding and
    truncation. A stock pipeline in another thread does not take a lock. Therefore the function gets a copy of the
    tokenizer's state, and the copy is protected by a lock.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
        use (`Callable`):
            A function that is called with a shallow copy of the pipeline, which has the copied tokenizer. Attributes
            that it sets on this copy are set on the pipeline afterwards.

    Returns:
        The return value of `use`.
    """
    tokenizer = pipeline.tokenizer
    # a method that overrides another one is called with a copy already, and passes it on
    if tokenizer is None or tokenizer in _shared.copied_tokenizers:
        return use(pipeline)
    with _shared.lock:
        entry = _shared.tokenizers.setdefault(tokenizer, types.SimpleNamespace(lock=threading.RLock(), known=None))
    # The lock is held in this frame and not in a generator (`contextmanager`), because a generator that Ctrl-C
    # interrupted would hold the lock until it is garbage-collected.
    with entry.lock:
        copied = _copied(tokenizer, entry)
        if copied is not tokenizer:
            _shared.copied_tokenizers.add(copied)
        twin = _with_component(pipeline, "tokenizer", copied)
        before = dict(vars(twin))
        try:
            return use(twin)
        finally:
            changed = {name: value for name, value in vars(twin).items() if before.get(name, before) is not value}
            vars(pipeline).update(changed)


def _copied(tokenizer, entry):
    """Returns a tokenizer with a copied state. The copy is made again if the tokens or rules of the tokenizer
    changed."""
    backend = library_internals.tokenizer_backend(tokenizer)
    if backend is None:  # the tokenizer is written in Python and does not store this state
        return tokenizer
    try:
        rules = pickle.dumps((backend.normalizer, backend.pre_tokenizer, backend.post_processor))
        state = backend.get_vocab_size(), rules
        if entry.known is None or entry.known[0] is not backend or entry.known[1] != state:
            entry.known = backend, state, copy.deepcopy(backend)
    except Exception:  # rules written in Python cannot be copied
        return tokenizer
    return library_internals.with_tokenizer_backend(tokenizer, entry.known[2])


def set_max_concurrent_calls(number: int | None) -> None:
    r"""
    Limits the number of calls of SSR pipelines that run at the same time in this process. This limits the memory they
    use, because each call has its own latents and activations. Further calls wait and begin in the order in which they
    were made. A call in a callback counts as part of the call that runs the callback, and does not wait. If a callback
    waits for a call in *another* thread, it can wait forever, because that call may have to wait for the call that
    runs the callback.

    Args:
        number (`int`, *optional*):
            The maximum number of calls. `None`, which is the initial setting, means no limit.

    Raises:
        `ValueError`: if `number` is not a positive integer or `None`.

    Example:

    ```py
    >>> from diffusers_ssr import set_max_concurrent_calls
    >>> set_max_concurrent_calls(2)
    ```

    For a pipeline from the Hub, without the installed package, use `pipe.set_max_concurrent_calls(2)`.
    """
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"`number` has to be a positive number of calls, or None, but is {number!r}.")
    with _shared.lock:
        _shared.max_calls = number
        _wake_waiting()


@contextmanager
def turn_to_run() -> Iterator[None]:
    """Context manager that waits until a call may begin according to [`set_max_concurrent_calls`], and counts the call
    as running until it ends."""
    call = _Call()
    try:
        with _shared.lock:
            if any(each.thread == call.thread for each in _shared.running):
                _shared.running.add(call)
            else:
                _shared.waiting.append(weakref.ref(call))
        while not _begin(call):
            with suppress(queue.Empty):
                # with a timeout, because a call that was ended by Ctrl-C may not have woken the others
                call.woken.get(timeout=1.0)
        yield
    finally:
        try:
            with _shared.lock:
                _stop_waiting(call)
                _shared.running.discard(call)
        finally:
            _release_locks()


def _begin(call: _Call) -> bool:
    """Counts a call as running if it may begin. Returns whether it is running."""
    with _shared.lock:
        if call not in _shared.running and _may_run(call):
            _shared.running.add(call)
            _stop_waiting(call)
        return call in _shared.running


def _may_run(call: _Call) -> bool:
    first = next(each for each in (reference() for reference in _shared.waiting) if each is not None)
    busy = {each.thread for each in _shared.running}
    return _shared.max_calls is None or first is call and len(busy) < _shared.max_calls


def _stop_waiting(call: _Call) -> None:
    _shared.waiting = [each for each in _shared.waiting if each() not in (None, call)]
    _wake_waiting()


def _wake_waiting() -> None:
    for call in [reference() for reference in _shared.waiting]:
        if call is not None:
            call.woken.put(None)
