"""Private names of torch, diffusers and transformers, differences between their versions, and small functions that
several modules use.

There are no public equivalents of the private names in diffusers 0.42 and torch 2.14. To support a newer version of one
of the libraries, start with this file.
"""

import numbers
import types
from collections.abc import Callable
from typing import Any

import diffusers
import PIL
import torch
import transformers
from torch import nn


OLDEST = {torch: "2.4", diffusers: "0.31", transformers: "4.44", PIL: "10.1"}


def parse_version(version: str) -> tuple[int, ...]:
    """Returns the major and minor number of a version."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])


def check_versions() -> None:
    """Raises an `ImportError` if a library is too old. pip checks the versions for the installed package, but not for
    code that is loaded from the Hub. The entry files import this module first, because the other modules cannot be
    imported with versions that are too old."""
    for library, oldest in OLDEST.items():
        version, name = library.__version__, library.__name__.replace("PIL", "pillow")
        if parse_version(version) < parse_version(oldest):
            raise ImportError(f"diffusers-ssr needs {name} {oldest} or newer, but {version} is installed.")


check_versions()

# The name of the precision argument of `from_pretrained` and `from_pipe`: `torch_dtype` before these versions, `dtype`
# since then. Newer versions warn about the old name, and older versions ignore the new name.
_DIFFUSERS_DTYPE = "dtype" if parse_version(diffusers.__version__) >= (0, 40) else "torch_dtype"
_TRANSFORMERS_DTYPE = "dtype" if parse_version(transformers.__version__) >= (4, 56) else "torch_dtype"


def precision_arguments(arguments: dict, library: str = "diffusers", default: torch.dtype | None = None) -> dict:
    """Returns arguments for `from_pretrained` or `from_pipe` of a library, with the precision (`dtype` or `torch_dtype` in
    `arguments`, or else `default`) under the name that the installed version of the library accepts."""
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


def reapply_group_offloading(module: nn.Module) -> None:
    """Applies a module's group offloading again to include new submodules, as diffusers' loaders do after loading."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(module)


def expand_block_scales(unet: Any, scale: dict) -> dict[str, float]:
    """Expands scales per block, in the format of `set_ip_adapter_scale`, to one scale for each attention of the UNet."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    (expanded,) = _maybe_expand_lora_scales(unet, [scale], default_scale=0.0)
    return expanded


def uses_split_inference(unet: nn.Module) -> bool:
    """Returns whether FreeNoise's split inference is enabled in a UNet."""
    from diffusers.pipelines.free_noise_utils import SplitInferenceModule

    return any(isinstance(module, SplitInferenceModule) for module in unet.modules())


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
    """Registers a class for `AutoPipelineFor...from_pipe` of diffusers, for the same tasks as the stock class. The first class
    of a stock class is kept, but `StableDiffusionSSRPipeline` has priority over a class of `ssr_pipeline_class`."""
    made, own = f"SSR{stock_class.__name__}", stock_class.__name__.replace("StableDiffusion", "StableDiffusionSSR", 1)
    for mapping in _auto_mappings():
        for family, known in list(mapping.items()):
            if known is stock_class:
                present = mapping.setdefault(f"{family}-ssr", pipeline_class)
                if pipeline_class.__name__ == own and present.__name__ != own:
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


# The functions below register forward hooks under a fixed key. `register_forward_hook` of torch gives each
# registration a new number, and `torch.compile` guards these numbers: it would compile again for every call and every
# layer. A key is a string; torch's annotations only allow its own keys, which are integers.
HookKey = Any


def set_forward_hooks(module: nn.Module, key: HookKey, before: Callable | None, after: Callable | None) -> None:
    """Registers `before(module, args, kwargs)` as a forward pre-hook and `after(module, args, output)` as a forward
    hook. Registering the same hooks again has no effect."""
    if before is not None:
        # The flag is set first: another thread may be running the module, and must not call the hook without `kwargs`.
        module._forward_pre_hooks_with_kwargs[key] = True
        module._forward_pre_hooks[key] = before
    if after is not None:
        module._forward_hooks[key] = after


def set_eager_pre_hook(module: nn.Module, key: HookKey, before: Callable) -> None:
    """Registers `before(module, args, kwargs)` so that it is never compiled. A forward pre-hook of a module that was
    compiled in place (`module.compile()`) would be compiled with the module."""
    call = module._compiled_call_impl
    if call is None:
        set_forward_hooks(module, key, before, None)
    elif not isinstance(call, _EagerHookedCall) or call.key != key:
        module._compiled_call_impl = _EagerHookedCall(module, call, key, before)


class _EagerHookedCall:
    """Runs a pre-hook, and then the compiled call of a module that was compiled in place."""

    def __init__(self, module: nn.Module, compiled: Callable, key: HookKey, before: Callable):
        self.module, self.compiled, self.key, self.before = module, compiled, key, before

    def __call__(self, *args, **kwargs):
        args, kwargs = self.before(self.module, args, kwargs) or (args, kwargs)
        return self.compiled(*args, **kwargs)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Returns whether a module was compiled with `module.compile()`."""
    return module._compiled_call_impl is not None


def clear_forward_hooks(module: nn.Module, key: HookKey) -> None:
    """Removes the hooks that are registered under `key`, if there are any."""
    module._forward_pre_hooks.pop(key, None)
    module._forward_pre_hooks_with_kwargs.pop(key, None)
    module._forward_hooks.pop(key, None)
    call: Any = module._compiled_call_impl
    if isinstance(call, _EagerHookedCall) and call.key == key:
        module._compiled_call_impl = call.compiled


def is_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values are finite, also after a conversion to `dtype`. Tensors on the meta device, integer tensors,
    and tensors of packed numbers with 4 bits are not checked and count as finite."""
    packed = tensor.element_size() < 2 and not str(tensor.dtype).startswith("torch.float8")
    if tensor.is_meta or not tensor.is_floating_point() or packed or not tensor.numel():
        return True
    if tensor.element_size() < 2:
        dtype = dtype or torch.float32  # there are no computations with float8
    # NaN spreads to both. This is about 20 times as fast as `torch.isfinite` of each value, and needs no memory.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach().to(dtype or tensor.dtype)))).all())


def check_weights(problem: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Raises a `ValueError` if a loaded model has weights that are missing, unexpected, of another shape or not finite.
    The libraries only warn about them, and initialize those that they could not load with random numbers."""
    broken = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    kinds = {kind: info.get(kind, ()) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, found in {**kinds, "values that are not finite numbers in": broken}.items():
        names = sorted(name if isinstance(name, str) else name[0] for name in found)
        if names:
            raise ValueError(f"{problem}: {kind.replace('_', ' ')} {', '.join(names[:3])}.")


# Far larger than useful scales. Larger values cause NaN in half precision.
MAX_SCALE = 100


def check_scale(name: str, scale: Any) -> float:
    """Returns a number that a user passes, such as a scale, as a `float`. It can be a number of Python or numpy, or an
    array or tensor without dimensions. Raises a `ValueError` with the argument's `name` if it is not a number from -100
    to 100."""
    number = _number(scale)
    # NaN fails the comparison
    if number is None or not abs(number) <= MAX_SCALE:
        raise ValueError(
            f"`{name}` has to be a number from {-MAX_SCALE:g} to {MAX_SCALE:g} (usually from 0 to 1), but is {scale!r}."
        )
    return float(number)


def check_count(name: str, count: Any) -> int:
    """Same as [`check_scale`], for positive integers. Returns an `int`."""
    number = _number(count)
    if not isinstance(number, numbers.Integral) or number < 1:
        raise ValueError(f"`{name}` has to be a positive whole number, but is {count!r}.")
    return int(number)


def _number(value: Any) -> Any:
    """Converts an array or tensor without dimensions to a Python number, and returns other numbers unchanged. Returns
    `None` for all other values, including booleans."""
    if getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    return value if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def is_frame(value: Any) -> bool:
    """Whether a value is the number of a frame, of Python or numpy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0
