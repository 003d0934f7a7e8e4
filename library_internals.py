"""Wrappers of private names of torch, diffusers and transformers, and of differences between their versions.

There are no public equivalents of these names in diffusers 0.42 and torch 2.14. To support a newer version of one of
the libraries, start with this file.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from . import versions_ssr


__all__ = [
    "auto_pipeline_classes",
    "precision_arguments",
    "clear_forward_hooks",
    "compiled_call",
    "disable_offloading",
    "expand_block_scales",
    "offloading",
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


# again, because a library that is copied to a folder can have the metadata of another version
versions_ssr.check_versions()

# The name of the precision argument of `from_pretrained` and `from_pipe`: `torch_dtype` before these versions, `dtype`
# since then. Newer versions warn about the old name, and older versions ignore the new name.
_DIFFUSERS_DTYPE = "dtype" if versions_ssr.parsed(diffusers.__version__) >= (0, 40) else "torch_dtype"
_TRANSFORMERS_DTYPE = "dtype" if versions_ssr.parsed(transformers.__version__) >= (4, 56) else "torch_dtype"


def precision_arguments(arguments: dict, library: str = "diffusers", default: torch.dtype | None = None) -> dict:
    r"""
    Returns arguments for `from_pretrained` or `from_pipe`, with the precision under the name that the installed
    version of the library accepts.

    Args:
        arguments (`dict`):
            The arguments, which may contain `dtype` or `torch_dtype`.
        library (`"diffusers"` or `"transformers"`, defaults to `"diffusers"`):
            The library that the arguments are for.
        default (`torch.dtype`, *optional*):
            The precision if `arguments` has neither `dtype` nor `torch_dtype`.
    """
    rest = {name: value for name, value in arguments.items() if name not in ("dtype", "torch_dtype")}
    dtype = next((arguments[name] for name in ("dtype", "torch_dtype") if arguments.get(name) is not None), default)
    if dtype is not None:
        rest[_DIFFUSERS_DTYPE if library == "diffusers" else _TRANSFORMERS_DTYPE] = dtype
    return rest


def disable_offloading(pipeline) -> tuple[bool, bool, bool]:
    """Removes the offloading hooks from a pipeline's components, as diffusers' loaders do. Returns whether model
    offloading, sequential offloading and group offloading were enabled. Group offloading is not removed, and it is not
    reported before diffusers 0.35."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    model, sequential, *group = LoraBaseMixin._optionally_disable_offloading(pipeline)
    return model, sequential, any(group)


def offloading(pipeline) -> tuple[bool, bool]:
    """Returns whether model offloading or sequential offloading is enabled, and whether it is sequential offloading. It
    looks for the same hooks as `disable_offloading`, and changes nothing."""
    hooks = [getattr(each, "_hf_hook", None) for each in pipeline.components.values() if isinstance(each, nn.Module)]
    # several hooks of one module are in a `SequentialHook`
    hooks = [getattr(hook, "hooks", [hook])[0] for hook in hooks if hook is not None]
    kinds = {type(hook).__name__ for hook in hooks}
    return bool(kinds & {"CpuOffload", "AlignDevicesHook"}), "AlignDevicesHook" in kinds


def expand_block_scales(unet: Any, scale: dict) -> dict[str, float]:
    """Expands scales per block, in the format of `set_ip_adapter_scale`, to one scale for each attention of the UNet.
    diffusers has no public function for this."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    (expanded,) = _maybe_expand_lora_scales(unet, [scale], default_scale=0.0)
    return expanded


def reapply_group_offloading(module: nn.Module) -> None:
    """Applies a module's group offloading again to include new submodules, as diffusers' loaders do after loading."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(module)


# the names that diffusers' mappings give to the families of pipelines for Stable Diffusion 1.5
_FAMILIES = (
    "stable-diffusion",
    "stable-diffusion-controlnet",
    "stable-diffusion-pag",
    "stable-diffusion-controlnet-pag",
    "lcm",
)


def _auto_mappings() -> list[dict[str, type[Any]]]:
    from diffusers.pipelines import auto_pipeline

    return [
        getattr(auto_pipeline, f"AUTO_{kind}_PIPELINES_MAPPING") for kind in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT")
    ]


def auto_pipeline_classes() -> list[Any]:
    """Returns the stock classes for Stable Diffusion 1.5 that `AutoPipelineFor...from_pipe` of diffusers can return."""
    return [mapping[family] for mapping in _auto_mappings() for family in _FAMILIES if family in mapping]


def register_auto_pipeline(pipeline_class: type[Any], stock_class: type[Any]) -> None:
    """Registers a class for `AutoPipelineFor...from_pipe` of diffusers, for the same tasks as the stock class.
    `from_pipe` only finds classes in these mappings. The first class of a stock class is kept, but
    `StableDiffusionSSRPipeline` has priority over a class that `ssr_pipeline_class` made of the same stock class."""
    made, own = f"SSR{stock_class.__name__}", stock_class.__name__.replace("StableDiffusion", "StableDiffusionSSR", 1)
    for mapping in _auto_mappings():
        for family, known in list(mapping.items()):
            if known is stock_class:
                present = mapping.setdefault(f"{family}-ssr", pipeline_class)
                if present.__name__ != own == pipeline_class.__name__:
                    mapping[f"{family}-ssr"] = pipeline_class
                for name in (made, own):
                    _add_auto_name(name, f"{family}-ssr")


def _add_auto_name(name: str, family: str) -> None:
    """Makes `AutoPipelineFor...from_pipe` find a family of pipelines by a further name. To switch PAG or a ControlNet
    on or off, diffusers adds "PAG" or "ControlNet" to the name of a class or removes it. The result is not always the
    name of a class: "StableDiffusionSSRPAGPipeline" means `ssr_pipeline_class(StableDiffusionPAGPipeline)`."""
    from diffusers.pipelines import auto_pipeline

    mappings: Any = auto_pipeline.SUPPORTED_TASKS_MAPPINGS
    if not any(known.__name__ == name for mapping in mappings for known in mapping.values()):
        mappings.append({family: types.SimpleNamespace(__name__=name)})


def uses_split_inference(unet: nn.Module) -> bool:
    """Returns whether FreeNoise's split inference is enabled in a UNet."""
    try:
        from diffusers.pipelines.free_noise_utils import SplitInferenceModule
    except ImportError:  # diffusers before 0.31 has no split inference
        return False
    return any(isinstance(module, SplitInferenceModule) for module in unet.modules())


def without_capturing_hooks(model: nn.Module) -> nn.Module:
    """Returns a copy of a transformers model without the hooks that `output_hidden_states=True` added to it. These
    hooks are local functions, which cannot be pickled. transformers adds them again when they are needed."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return model


def tokenizer_backend(tokenizer):
    """Returns the Rust part of a fast tokenizer, which stores its state, or `None` for a tokenizer written in
    Python."""
    return getattr(tokenizer, "_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None


def with_tokenizer_backend(tokenizer, backend):
    """Returns a shallow copy of a fast tokenizer with another backend. The public `backend_tokenizer` is read-only."""
    twin = object.__new__(type(tokenizer))
    twin.__dict__.update(tokenizer.__dict__)
    twin._tokenizer = backend
    return twin


# The type of the fixed key of a forward hook, which is a string. torch's annotations only allow its own keys, which
# are integers.
HookKey = Any

# The functions below register forward hooks under a fixed key. `register_forward_hook` of torch gives each
# registration a new number, and `torch.compile` guards these numbers: it would compile again for every forward pass
# and every layer.


def set_forward_pre_hook(module: nn.Module, key: HookKey, hook: Callable) -> None:
    """Registers `hook(module, args, kwargs)` before a module's forward pass. Registering the same hook again has no
    effect."""
    # The flag is set first: another thread may be running the module, and must not call the hook without `kwargs`.
    module._forward_pre_hooks_with_kwargs[key] = True
    module._forward_pre_hooks[key] = hook


def set_forward_hook(module: nn.Module, key: HookKey, hook: Callable) -> None:
    """Registers `hook(module, args, kwargs, output)` after a module's forward pass. It also runs if the pass raises an
    error."""
    module._forward_hooks_with_kwargs[key] = True
    module._forward_hooks_always_called[key] = True
    module._forward_hooks[key] = hook


def clear_forward_hooks(module: nn.Module, key: HookKey) -> None:
    """Removes the forward hooks that are registered under `key`, if there are any."""
    module._forward_pre_hooks.pop(key, None)
    module._forward_pre_hooks_with_kwargs.pop(key, None)
    module._forward_hooks.pop(key, None)
    module._forward_hooks_with_kwargs.pop(key, None)
    module._forward_hooks_always_called.pop(key, None)


def compiled_call(module: nn.Module) -> Callable | None:
    """Returns the function that runs instead of a module that was compiled in place (`module.compile()`). It includes
    the module's hooks. Returns `None` for a module that was not compiled in place."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable) -> None:
    """Replaces the function that `compiled_call` returns."""
    module._compiled_call_impl = call
