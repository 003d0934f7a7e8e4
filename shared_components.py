"""What calls share with calls in other threads and in callbacks: pipelines, schedulers, tokenizers."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary


_lock = threading.RLock()
_tokenizer_locks: WeakKeyDictionary = WeakKeyDictionary()
# ids of the pipelines and schedulers that are in a call; the call keeps them alive
_in_use: list[int] = []


def _after_fork() -> None:
    """In a forked process only the forking thread goes on, and it may have been forked out of another one's call."""
    global _lock
    _lock = threading.RLock()
    _in_use.clear()
    _tokenizer_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
    with _lock:
        scheduler = pipeline.scheduler
        if id(pipeline) in _in_use or id(scheduler) in _in_use:
            pipeline = _shallow_copy(pipeline)
            # from its config and not as a deep copy: the other call may be changing it
            pipeline.scheduler = scheduler = type(scheduler).from_config(scheduler.config)
        used = [id(pipeline), id(scheduler)]
        _in_use.extend(used)
    try:
        yield pipeline
    finally:
        with _lock:
            for each in used:
                if each in _in_use:
                    _in_use.remove(each)


def _shallow_copy(pipeline):
    # not `copy.copy`, which goes the way of pickling and would copy weights with it
    twin = object.__new__(type(pipeline))
    twin.__dict__.update(pipeline.__dict__)
    return twin


def tokenizer_lock(tokenizer) -> threading.RLock:
    """To be held around every use of a tokenizer: a fast one keeps padding and truncation as state, so that two threads
    that use it at once would cut or pad each other's text."""
    with _lock:
        return _tokenizer_locks.setdefault(tokenizer, threading.RLock())
