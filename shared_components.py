"""The state that calls in different threads and callbacks share: pipelines, schedulers, tokenizers, and how many calls may run."""

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
    """A call that runs, or waits until it may start. The registries below use weak references, so a call that was ended by
    Ctrl-C before it could unregister disappears with its frame."""

    def __init__(self, *used):
        self.thread = threading.get_ident()
        self.used = used


class _Shared:
    """The state that all calls of the process share. There is only one, even if several copies of this code are loaded (the
    installed package, and the copy that `custom_pipeline=` loads)."""

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
        """Reset the state in a forked process: only the forking thread continues, and other threads may have held locks."""
        self.make_locks()
        self.tokenizers.clear()
        self.compiled.clear()
        self.waiting.clear()
        for calls in (self.using, self.running):
            for call in [each for each in calls if each.thread != threading.get_ident()]:
                calls.discard(call)


# the number is the version of the attributes that copies of this code expect
_home = sys.modules.setdefault("_diffusers_ssr_shared_1", types.ModuleType("_diffusers_ssr_shared_1"))
_shared: _Shared = vars(_home).setdefault("shared", _Shared())

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _shared.after_fork())


def registry_lock() -> threading.RLock:
    """Hold this lock while the shared state changes, and never while a model runs."""
    return _shared.lock


def compiled_lock(module) -> threading.RLock:
    """Hold this lock while a module that was compiled in place runs. Compiled code checks the hooks of all layers before it
    starts, and no hook may be added or removed meanwhile."""
    with _shared.lock:
        return _shared.compiled.setdefault(module, threading.RLock())


@contextmanager
def own_pipeline(pipeline) -> Iterator:
    r"""
    A pipeline for one call. Usually this is the pipeline itself. If it or its scheduler is already in a call (in another
    thread, or because a callback calls its own pipeline), it is a shallow copy with its own scheduler, because a scheduler and
    the private attributes of a pipeline hold the state of one call.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
    """
    with _shared.lock:
        scheduler = pipeline.scheduler
        if any(each is pipeline or each is scheduler for call in _shared.using for each in call.used):
            # from its config instead of a deep copy, because the other call may change it meanwhile
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
    """Release the locks that this thread still holds after a call. A call holds them only briefly, so such a lock was left by
    a Ctrl-C at the end of a `with` block, and other threads would wait for it for ever."""
    locks = [_shared.lock, *(entry.lock for entry in _shared.tokenizers.values())]
    for lock in locks:
        while lock._is_owned():
            lock.release()


def _with_component(pipeline, name: str, component):
    """A shallow copy of a pipeline with another component. `copy.copy` uses the pickling methods and would copy weights."""
    twin = object.__new__(type(pipeline))
    twin.__dict__.update(pipeline.__dict__)
    vars(twin)[name] = component
    return twin


def with_own_tokenizer(pipeline, use: Callable[[Any], Any]) -> Any:
    r"""
    Let a pipeline use a copy of its tokenizer that no other thread uses. A fast tokenizer keeps padding and truncation as state,
    so two threads that use it at the same time could cut or pad each other's text. A stock pipeline in another thread takes no
    lock, so a lock alone is not enough: the texts are encoded with a copy of the tokenizer's state, under a lock.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
        use (`Callable`):
            Called with a shallow copy of the pipeline that has the copied tokenizer. Attributes that it sets in the copy are
            then set in the pipeline.

    Returns:
        The return value of `use`.
    """
    tokenizer = pipeline.tokenizer
    if tokenizer is None:
        return use(pipeline)
    with _shared.lock:
        entry = _shared.tokenizers.setdefault(tokenizer, types.SimpleNamespace(lock=threading.RLock(), known=None))
    # held in this frame and not in a generator: a generator that Ctrl-C interrupted would hold it until it is collected
    with entry.lock:
        twin = _with_component(pipeline, "tokenizer", _copied(tokenizer, entry))
        before = dict(vars(twin))
        try:
            return use(twin)
        finally:
            changed = {name: value for name, value in vars(twin).items() if before.get(name, before) is not value}
            vars(pipeline).update(changed)


def _copied(tokenizer, entry):
    """A tokenizer with a copy of its state. The copy is renewed when the tokenizer's tokens or rules change."""
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
    Limit how many calls of SSR pipelines run at the same time in this process. This limits their memory, because each call has
    its own latents and activations. Other calls wait, and start in the order in which they arrived. A call inside a callback
    counts as part of the outer call and does not wait. (A callback that waits for a call in *another* thread can wait for ever,
    if that call has to wait for the callback's own call.)

    Args:
        number (`int`, *optional*):
            The limit. `None`, the default, is no limit.

    Raises:
        `ValueError`: if `number` is not a positive whole number.

    Example:

    ```py
    >>> from diffusers_ssr import set_max_concurrent_calls
    >>> set_max_concurrent_calls(2)
    ```

    With code from the Hub, without the installed package: `pipe.set_max_concurrent_calls(2)`.
    """
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"`number` has to be a positive number of calls, or None, but is {number!r}.")
    with _shared.changed:
        _shared.max_calls = number
        _shared.changed.notify_all()


@contextmanager
def turn_to_run() -> Iterator[None]:
    """Wait until a call may start (see [`set_max_concurrent_calls`]), and count it until it ends."""
    call = _Call()
    try:
        with _shared.changed:
            if not any(each.thread == call.thread for each in _shared.running):
                _shared.waiting.append(weakref.ref(call))
                while not _may_run(call):
                    # also wake up without a notification, because a call that was ended by Ctrl-C may not have sent one
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
