"""Private names of torch, diffusers and transformers that this project needs, each with what it is for, and what differs
between their versions.

Public equivalents do not exist (at the time of diffusers 0.42 and torch 2.14). To adapt this project to a newer version of
one of them, begin here.
"""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import nn


__all__ = [
    "check_versions",
    "precision_arguments",
    "clear_forward_hooks",
    "compiled_call",
    "disable_offloading",
    "expand_block_scales",
    "reapply_group_offloading",
    "register_auto_pipeline",
    "set_compiled_call",
    "set_forward_hook",
    "set_forward_pre_hook",
    "tokenizer_backend",
    "uses_split_inference",
    "with_tokenizer_backend",
    "without_capturing_hooks",
]


OLDEST = {"torch": "2.4", "diffusers": "0.31", "transformers": "4.44"}


def _parsed(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])


def check_versions() -> None:
    """Raise an `ImportError` if a library is too old. Code that comes from the Hub was never installed by pip, which would
    have said so."""
    for module in (torch, diffusers, transformers):
        oldest = OLDEST[module.__name__]
        if _parsed(module.__version__) < _parsed(oldest):
            raise ImportError(
                f"diffusers-ssr needs {module.__name__} {oldest} or newer, but {module.__version__} is installed."
            )


check_versions()

# What `from_pretrained` and `from_pipe` call a precision: `torch_dtype` before these versions, `dtype` since then. The old
# name warns in the new ones, and the old ones overlook the new name.
_DIFFUSERS_DTYPE = "dtype" if _parsed(diffusers.__version__) >= (0, 40) else "torch_dtype"
_TRANSFORMERS_DTYPE = "dtype" if _parsed(transformers.__version__) >= (4, 56) else "torch_dtype"


def precision_arguments(arguments: dict, library: str = "diffusers", default: torch.dtype | None = None) -> dict:
    r"""
    Arguments of a `from_pretrained` or `from_pipe`, with the precision under the name that the installed library knows.

    Args:
        arguments (`dict`):
            May hold `dtype` or `torch_dtype`.
        library (`"diffusers"` or `"transformers"`, defaults to `"diffusers"`):
            Whose method it is.
        default (`torch.dtype`, *optional*):
            The precision where neither is given.
    """
    rest = {name: value for name, value in arguments.items() if name not in ("dtype", "torch_dtype")}
    dtype = next((arguments[name] for name in ("dtype", "torch_dtype") if arguments.get(name) is not None), default)
    if dtype is not None:
        rest[_DIFFUSERS_DTYPE if library == "diffusers" else _TRANSFORMERS_DTYPE] = dtype
    return rest


def disable_offloading(pipeline) -> tuple[bool, bool, bool]:
    """Take the offloading hooks off a pipeline's components, as diffusers' own loaders do. Returns which kind of offloading
    was on: of models, sequential, of groups (which stays, and is unknown before diffusers 0.35)."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    model, sequential, *group = LoraBaseMixin._optionally_disable_offloading(pipeline)
    return model, sequential, any(group)


def expand_block_scales(unet: Any, scale: dict) -> dict[str, float]:
    """Scales per block, as `set_ip_adapter_scale` takes them, as one for each attention of the UNet. diffusers has no public
    function for it."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    (expanded,) = _maybe_expand_lora_scales(unet, [scale], default_scale=0.0)
    return expanded


def reapply_group_offloading(module: nn.Module) -> None:
    """Give a module's group offloading its new submodules, as diffusers' own loaders do after loading."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(module)


def register_auto_pipeline(pipeline_class: type[Any], stock_class: type[Any]) -> None:
    """Let diffusers' `AutoPipelineFor...from_pipe` find a class where it finds the stock class. It looks classes up by name in
    these mappings, which are the only way to be found."""
    from diffusers.pipelines import auto_pipeline

    for kind in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
        mapping = getattr(auto_pipeline, f"AUTO_{kind}_PIPELINES_MAPPING")
        for name, known in list(mapping.items()):
            if known is stock_class:
                mapping.setdefault(f"{name}-ssr", pipeline_class)


def uses_split_inference(unet: nn.Module) -> bool:
    """Whether FreeNoise's split inference is switched on in a UNet."""
    try:
        from diffusers.pipelines.free_noise_utils import SplitInferenceModule
    except ImportError:  # diffusers before 0.31 has no split inference
        return False
    return any(isinstance(module, SplitInferenceModule) for module in unet.modules())


def without_capturing_hooks(model: nn.Module) -> nn.Module:
    """A copy of a transformers model without the hooks that `output_hidden_states=True` has left in it: they are local
    functions, which cannot be pickled. transformers puts them in again when they are needed."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return model


def tokenizer_backend(tokenizer):
    """The part of a fast tokenizer that is written in Rust and keeps its state, or `None` for one that is written in Python."""
    return getattr(tokenizer, "_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None


def with_tokenizer_backend(tokenizer, backend):
    """A shallow copy of a fast tokenizer with another such part. Its public `backend_tokenizer` can only be read."""
    twin = object.__new__(type(tokenizer))
    twin.__dict__.update(tokenizer.__dict__)
    twin._tokenizer = backend
    return twin


# The fixed key of a forward hook, a text. torch declares the keys of its own counter, numbers.
HookKey = Any

# Forward hooks are registered under a fixed key here. torch's `register_forward_hook` gives each registration a new number, and
# `torch.compile` guards these numbers: it would compile again at every forward pass, and for every layer.


def set_forward_pre_hook(module: nn.Module, key: HookKey, hook: Callable) -> None:
    """Register `hook(module, args, kwargs)` before a module's forward pass; a second time it changes nothing."""
    # the flag first: another thread may be on its way through the module, and must not call the hook without `kwargs`
    module._forward_pre_hooks_with_kwargs[key] = True
    module._forward_pre_hooks[key] = hook


def set_forward_hook(module: nn.Module, key: HookKey, hook: Callable) -> None:
    """Register `hook(module, args, kwargs, output)` after a module's forward pass, also one that raises."""
    module._forward_hooks_with_kwargs[key] = True
    module._forward_hooks_always_called[key] = True
    module._forward_hooks[key] = hook


def clear_forward_hooks(module: nn.Module, key: HookKey) -> None:
    """Remove what stands under `key`, if anything does."""
    module._forward_pre_hooks.pop(key, None)
    module._forward_pre_hooks_with_kwargs.pop(key, None)
    module._forward_hooks.pop(key, None)
    module._forward_hooks_with_kwargs.pop(key, None)
    module._forward_hooks_always_called.pop(key, None)


def compiled_call(module: nn.Module) -> Callable | None:
    """What runs instead of a module that was compiled in place (`module.compile()`), hooks included."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable) -> None:
    """Replace what `compiled_call` returns."""
    module._compiled_call_impl = call
