"""Subjects that were encoded lately, so that the same picture and query are never encoded twice."""

import hashlib
from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch import nn


class SubjectCache:
    """
    The last few subjects by what they depend on. Pictures, masks, query states and the SSR-Encoder's fingerprint are
    compared by content, so a changed picture, a LoRA on the text encoder, or a training step makes another subject; the
    vision encoder by its identity and the versions of its weights.

    Args:
        size (`int`, defaults to 16):
            How many subjects are kept: 2.8 MB each for SD 1.5 in full precision.
    """

    def __init__(self, size: int = 16):
        self.size = size
        self.entries: OrderedDict[tuple, object] = OrderedDict()

    def get(self, key: tuple):
        """What was kept under `key`, or `None`."""
        entry = self.entries.get(key)
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    def keep(self, key: tuple, entry) -> None:
        self.entries[key] = entry
        while len(self.entries) > self.size:
            self.entries.popitem(last=False)


def digest(tensor: torch.Tensor | None) -> bytes:
    """A tensor's content in 20 bytes."""
    if tensor is None:
        return b""
    content = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=20).digest()


def version(module: nn.Module) -> tuple:
    """Something that is another for another module, and when a module's weights are changed in place."""
    counts = sum(0 if parameter.is_inference() else parameter._version for parameter in module.parameters())
    return _identities.setdefault(module, object()), counts, next(module.parameters()).dtype


# an `id` may come again once its module is gone
_identities: WeakKeyDictionary = WeakKeyDictionary()
