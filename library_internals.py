"""The private names of torch, diffusers and transformers that this project uses, with the reason for each, and the differences
between versions of these libraries.

There are no public equivalents (as of diffusers 0.42 and torch 2.14). To adapt this project to a newer version, start here.
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
    """Raise an `ImportError` if a library is too old. pip checks this at installation, but not for code from the Hub."""
    for module in (torch, diffusers, transformers):
        oldest = OLDEST[module.__name__]
        if _parsed(module.__version__) < _parsed(oldest):
            raise ImportError(
                f"diffusers-ssr needs {module.__name__} {oldest} or newer, but {module.__version__} is installed."
            )


check_versions()

# The name of the precision in `from_pretrained` and `from_pipe`: `torch_dtype` before these versions, and `dtype` since then. New
# versions warn about the old name, and old versions ignore the new name.
_DIFFUSERS_DTYPE = "dtype" if _parsed(diffusers.__version__) >= (0, 40) else "torch_dtype"
_TRANSFORMERS_DTYPE = "dtype" if _parsed(transformers.__version__) >= (4, 56) else "torch_dtype"


def precision_arguments(arguments: dict, library: str = "diffusers", default: torch.dtype | None = None) -> dict:
    r"""
    The arguments of `from_pretrained` or `from_pipe`, with the precision under the name that the installed library uses.

    Args:
        arguments (`dict`):
            May hold `dtype` or `torch_dtype`.
        library (`"diffusers"` or `"transformers"`, defaults to `"diffusers"`):
            The library of the method.
        default (`torch.dtype`, *optional*):
            The precision if neither is given.
    """
    rest = {name: value for name, value in arguments.items() if name not in ("dtype", "torch_dtype")}
    dtype = next((arguments[name] for name in ("dtype", "torch_dtype") if arguments.get(name) is not None), default)
    if dtype is not None:
        rest[_DIFFUSERS_DTYPE if library == "diffusers" else _TRANSFORMERS_DTYPE] = dtype
    return rest


def disable_offloading(pipeline) -> tuple[bool, bool, bool]:
    """Remove the offloading hooks from a pipeline's components, like diffusers' own loaders. Returns which kind of offloading was
    enabled: model, sequential, or group offloading (which is not removed, and does not exist before diffusers 0.35)."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    model, sequential, *group = LoraBaseMixin._optionally_disable_offloading(pipeline)
    return model, sequential, any(group)


def expand_block_scales(unet: Any, scale: dict) -> dict[str, float]:
    """Expand scales per block, in the form of `set_ip_adapter_scale`, to one scale for each attention of the UNet."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    (expanded,) = _maybe_expand_lora_scales(unet, [scale], default_scale=0.0)
    return expanded


def reapply_group_offloading(module: nn.Module) -> None:
    """Apply group offloading to new submodules of a module, like diffusers' own loaders after loading."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(module)


def register_auto_pipeline(pipeline_class: type[Any], stock_class: type[Any]) -> None:
    """Register a class for diffusers' `AutoPipelineFor...from_pipe`, in the same mappings as its stock class."""
    from diffusers.pipelines import auto_pipeline

    for kind in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
        mapping = getattr(auto_pipeline, f"AUTO_{kind}_PIPELINES_MAPPING")
        for name, known in list(mapping.items()):
            if known is stock_class:
                mapping.setdefault(f"{name}-ssr", pipeline_class)


def uses_split_inference(unet: nn.Module) -> bool:
    """Whether FreeNoise's split inference is enabled in a UNet."""
    try:
        from diffusers.pipelines.free_noise_utils import SplitInferenceModule
    except ImportError:  # diffusers before 0.31 has no split inference
        return False
    return any(isinstance(module, SplitInferenceModule) for module in unet.modules())


def without_capturing_hooks(model: nn.Module) -> nn.Module:
    """A copy of a transformers model without the hooks of `output_hidden_states=True`. They are local functions, which cannot be
    pickled. transformers adds them again when they are needed."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return model


def tokenizer_backend(tokenizer):
    """The Rust part of a fast tokenizer, which holds its state, or `None` for a tokenizer that is written in Python."""
    return getattr(tokenizer, "_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None


def with_tokenizer_backend(tokenizer, backend):
    """A shallow copy of a fast tokenizer with another Rust part. Its public `backend_tokenizer` is read-only."""
    twin = object.__new__(type(tokenizer))
    twin.__dict__.update(tokenizer.__dict__)
    twin._tokenizer = backend
    return twin


# The fixed key of a forward hook is a string. The type annotations of torch expect the numbers of its own counter.
HookKey = Any

# These functions register forward hooks under a fixed key. `register_forward_hook` of torch uses a new number each time, and
# `torch.compile` guards these numbers, so it would compile again for every forward pass and every layer.


def set_forward_pre_hook(module: nn.Module, key: HookKey, hook: Callable) -> None:
    """Register `hook(module, args, kwargs)` before a module's forward pass. Registering it again changes nothing."""
    # set the flag first, because another thread may run the module and must not call the hook without `kwargs`
    module._forward_pre_hooks_with_kwargs[key] = True
    module._forward_pre_hooks[key] = hook


def set_forward_hook(module: nn.Module, key: HookKey, hook: Callable) -> None:
    """Register `hook(module, args, kwargs, output)` after a module's forward pass, also if it raises an error."""
    module._forward_hooks_with_kwargs[key] = True
    module._forward_hooks_always_called[key] = True
    module._forward_hooks[key] = hook


def clear_forward_hooks(module: nn.Module, key: HookKey) -> None:
    """Remove the hooks with this `key`, if there are any."""
    module._forward_pre_hooks.pop(key, None)
    module._forward_pre_hooks_with_kwargs.pop(key, None)
    module._forward_hooks.pop(key, None)
    module._forward_hooks_with_kwargs.pop(key, None)
    module._forward_hooks_always_called.pop(key, None)


def compiled_call(module: nn.Module) -> Callable | None:
    """The compiled call of a module that was compiled in place (`module.compile()`), including its hooks."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable) -> None:
    """Replace the compiled call of a module."""
    module._compiled_call_impl = call
