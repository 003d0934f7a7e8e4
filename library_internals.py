"""Private names of torch and diffusers that this project needs, in one place, each with what it is for.

Public equivalents do not exist (at the time of diffusers 0.42 and torch 2.14). Whoever mends this project for a newer
version begins here.
"""

import copy
from collections.abc import Callable

from diffusers.loaders.lora_base import _func_optionally_disable_offloading as disable_offloading
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from torch import nn


__all__ = [
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


def expand_block_scales(unet: nn.Module, scale: dict) -> dict[str, float]:
    """Scales per block, as `set_ip_adapter_scale` takes them, as one for each attention of the UNet. diffusers has no public
    function for it."""
    (expanded,) = _maybe_expand_lora_scales(unet, [scale], default_scale=0.0)
    return expanded


def reapply_group_offloading(module: nn.Module) -> None:
    """Give a module's group offloading its new submodules, as diffusers' own loaders do after loading."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(module)


def register_auto_pipeline(pipeline_class: type, stock_class: type) -> None:
    """Let diffusers' `AutoPipelineFor...from_pipe` find a class where it finds the stock class. It looks classes up by name in
    these mappings, which are the only way to be found."""
    for mapping in (
        AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        AUTO_INPAINT_PIPELINES_MAPPING,
    ):
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


# Forward hooks are registered under a fixed key here, where torch's `register_forward_hook` counts a new number up for each
# registration: `torch.compile` guards these numbers, and would compile anew at every forward pass, and for every layer.


def set_forward_pre_hook(module: nn.Module, key: str, hook: Callable) -> None:
    """Register `hook(module, args, kwargs)` before a module's forward pass; a second time it changes nothing."""
    # the flag first: another thread may be on its way through the module, and must not call the hook without `kwargs`
    module._forward_pre_hooks_with_kwargs[key] = True
    module._forward_pre_hooks[key] = hook


def set_forward_hook(module: nn.Module, key: str, hook: Callable) -> None:
    """Register `hook(module, args, kwargs, output)` after a module's forward pass, also one that raises."""
    module._forward_hooks_with_kwargs[key] = True
    module._forward_hooks_always_called[key] = True
    module._forward_hooks[key] = hook


def clear_forward_hooks(module: nn.Module, key: str) -> None:
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
    """Put something else in its place."""
    module._compiled_call_impl = call
