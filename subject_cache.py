"""Subjects that were encoded lately, so that the same picture and query are never encoded twice."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


class SubjectCache:
    r"""
    The last few subjects by what they depend on. Pictures, masks, query states and the SSR-Encoder's fingerprint are
    compared by content, so a changed picture, a LoRA on the text encoder, or a training step makes another subject; the
    vision encoder by its identity and the versions of its weights. Threads may share it.

    Args:
        size (`int`, defaults to 16):
            How many subjects are kept: 2.8 MB each for SD 1.5 in full precision.
    """

    def __init__(self, size: int = 16):
        self.size = size
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()
        # between a look-up and the note that it was the last one, another thread may drop the entry
        self._lock = threading.Lock()

    def __reduce__(self):
        # a lock can neither be copied nor sent to another process: there the cache begins empty
        return type(self), (self.size,)

    def get(self, key: Hashable) -> Any:
        """What was kept under `key`, or `None`."""
        with self._lock:
            entry = self.entries.get(key)
            if entry is not None:
                self.entries.move_to_end(key)
            return entry

    def keep(self, key: Hashable, entry: Any) -> None:
        """Keep `entry`, and drop what was not asked for longest if there is no more room."""
        with self._lock:
            self.entries[key] = entry
            self.entries.move_to_end(key)
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)


def digest(tensor: torch.Tensor | None) -> bytes:
    """A tensor's content in 20 bytes."""
    if tensor is None:
        return b""
    content = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=20).digest()


def version(module: nn.Module) -> tuple[object, int, torch.dtype]:
    """A value that differs between modules, and changes when a module's weights are changed in place or cast."""
    counts = sum(0 if parameter.is_inference() else parameter._version for parameter in module.parameters())
    return _identities.setdefault(module, object()), counts, next(module.parameters()).dtype


# an `id` may come again once its module is gone
_identities: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
