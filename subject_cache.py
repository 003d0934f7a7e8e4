"""A cache of encoded subjects. The same picture and query are not encoded again while they are in the cache."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from . import shared_components


class SubjectCache:
    r"""
    A cache of the most recently used subjects. The key of a subject contains everything that it depends on. Pictures,
    masks, the query's hidden states and the SSR-Encoder's fingerprint are compared by content, so a changed picture, a
    LoRA on the text encoder, or a training step results in a new entry. The vision encoder is compared by its identity,
    the versions of its weights, a sample of their values, the state of its adapters, and its forward hooks, which are
    also compared for the SSR-Encoder. The cache is thread-safe.

    Args:
        size (`int`, defaults to 16):
            The maximum number of subjects. Each needs 2.8 MB for SD 1.5 in full precision.
    """

    def __init__(self, size: int = 16):
        self.size = size
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """Returns the entry for `key`, or `None`."""
        # without the lock, another thread could remove an entry between the lookup and `move_to_end`
        with shared_components.registry_lock():
            entry = self.entries.get(key)
            if entry is not None:
                self.entries.move_to_end(key)
            return entry

    def keep(self, key: Hashable, entry: Any) -> None:
        """Adds `entry`, and removes the least recently used entries if the cache is full."""
        with shared_components.registry_lock():
            self.entries[key] = entry
            self.entries.move_to_end(key)
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)


def digest(tensor: torch.Tensor | None) -> bytes:
    """Returns a hash of the tensor's content, with 20 bytes."""
    if tensor is None:
        return b""
    content = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=20).digest()


def version(module: nn.Module) -> tuple[Hashable, ...]:
    """Returns a value that is different for each module, and that changes when the weights are changed in place or
    cast to another dtype, when an adapter (peft) is switched on or off, or when its forward hooks change."""
    parameters = list(module.parameters())
    counts = sum(0 if parameter.is_inference() else parameter._version for parameter in parameters)
    # models of transformers and diffusers have a method `disable_adapters`, and layers of peft have a property
    tuned: list[Any] = [each for each in module.modules() if isinstance(getattr(each, "disable_adapters", None), bool)]
    adapters = tuple(
        (tuple(each.active_adapters), bool(each.disable_adapters), str(getattr(each, "scaling", None)))
        for each in tuned
    )
    identity = _identities.setdefault(module, object())
    return identity, counts, parameters[0].dtype, digest(_sample(parameters)), adapters, hooks(module)


def hooks(module: nn.Module) -> tuple[Hashable, ...]:
    """Returns a value that changes when a forward hook is added or removed anywhere in a module, or when the `forward`
    of a part of it is replaced. Hooks are compared by their number, which torch does not use a second time. What a hook
    does is not known: if it does something else later, it has to be registered again."""
    found: list[Hashable] = []
    for index, each in enumerate(module.modules()):
        registered = {**each._forward_pre_hooks, **each._forward_hooks}
        # transformers registers hooks in the first forward pass, which collect the hidden states
        foreign = [
            n for n, hook in registered.items() if not getattr(hook, "__module__", "").startswith("transformers.")
        ]
        found += [(index, number) for number in foreign]
        # accelerate and diffusers (offloading, casting) and `torch.compile` replace `forward` without changing the
        # output, and offloading does so again each time it is enabled
        known = hasattr(each, "_hf_hook") or hasattr(each, "_diffusers_hook") or is_compiled_module(each)
        if "forward" in vars(each) and not known:
            found.append((index, id(vars(each)["forward"])))
    return tuple(found)


@torch.no_grad()
def _sample(parameters: list[nn.Parameter]) -> torch.Tensor | None:
    """Returns a few values of each parameter, because a change of `parameter.data` (as diffusers' `EMAModel` makes it)
    does not change the parameter's version. Offloaded parameters on the meta device have no values."""
    # with offloading or a device map, the parameters are on several devices; one transfer for each device is enough
    some: dict[torch.device, list[torch.Tensor]] = {}
    for each in parameters:
        if each.numel() and each.device.type != "meta":
            values = each.detach().flatten()[:: max(1, each.numel() // _VALUES)][:_VALUES].float()
            some.setdefault(each.device, []).append(values)
    return torch.cat([torch.cat(values).cpu() for values in some.values()]) if some else None


# the number of values in the sample of a parameter
_VALUES = 8


# Maps each module to a unique object. `id(module)` is not unique, because it can be reused after the module is
# deleted.
_identities: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
