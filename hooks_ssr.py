"""Adds a subject to the forward passes of a UNet with forward hooks, for the duration of a `with` block."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models import Transformer2DModel, UNet2DConditionModel, UNetMotionModel
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from . import arguments_ssr, attention_processors, internals_ssr, request_ssr


# The key of the subject in `cross_attention_kwargs`, between the UNet's pre-hook and its transformers' pre-hooks.
SUBJECT = "ssr_subject"

# The key of the hooks in torch's dictionaries. Several copies of this code can be loaded: the installed package and
# those that `custom_pipeline=` loads. Each copy has its own hooks, and they ignore the subjects of the other copies.
_KEY = __name__

# Must be held while hooks are added or removed. It is not held while a UNet runs.
_lock = threading.RLock()


def find_unet(unet: Any) -> UNet2DConditionModel | UNetMotionModel:
    """Returns the UNet inside its wrappers: `torch.compile`, a `PeftModel`, the wrappers of accelerate or DDP, or a
    user-defined wrapper that forwards attribute access. Raises a `ValueError` if there is none."""
    # A wrapper that is not a module but forwards attribute access also forwards `get_submodule`. This is a bound
    # method, and its `__self__` is the wrapped module.
    module = unet if isinstance(unet, nn.Module) else getattr(getattr(unet, "get_submodule", None), "__self__", None)
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(part, (UNet2DConditionModel, UNetMotionModel)):
            return part
    raise ValueError(f"`unet` has to be, or to wrap, a UNet of Stable Diffusion 1.5, but is {type(unet).__name__}.")


@contextmanager
def subject_in_unet(
    unet: Any,
    encoder: Any,
    subject: Any,
    scale: float = 0.65,
    do_classifier_free_guidance: bool = True,
    controlnet: nn.Module | None = None,
) -> Iterator[None]:
    r"""
    Context manager, inside which the forward passes of a UNet attend to a subject. The pipelines' calls, training, and
    any other denoising loop use it. It affects only the thread that enters it: the UNet remains the stock UNet in all
    other threads, and is the stock UNet again after the block, also after an error.

    Args:
        unet (`UNet2DConditionModel` or `UNetMotionModel`):
            The UNet, which may be wrapped or compiled.
        encoder ([`SSREncoder`]):
            The SSR-Encoder, which names the UNet's layers that attend to the subject.
        subject ([`SubjectEmbeds`], `dict` or `list`):
            What a pipeline's call takes as `subject`. A list has one for each image of the batch. (The pipelines pass a
            [`SubjectRequest`], and training passes [`SubjectConditions`].)
        scale (`float`, defaults to 0.65):
            How strongly subjects without their own scale affect the result.
        do_classifier_free_guidance (`bool`, defaults to `True`):
            Whether the first half of each batch is the unconditional branch.
        controlnet (`ControlNetModel` or `MultiControlNetModel`, *optional*):
            A ControlNet that gets the tokens of the subject, after those of the text (for a [`SubjectRequest`]).

    Raises:
        `ValueError`: if `subject` or `scale` is something else; in the forward pass, if a layer has an attention
            processor that cannot be used with a subject.

    Example:

    ```py
    >>> with subject_in_unet(pipe.unet, ssr_encoder, cat):
    ...     image = stock_pipe("a cat on the beach").images[0]
    ```
    """
    if not isinstance(subject, (request_ssr.SubjectRequest, attention_processors.SubjectConditions)):
        branches = (False, True) if do_classifier_free_guidance else (True,)
        rows = arguments_ssr.parse_subjects(subject, len(subject) if isinstance(subject, list) else 1)
        scale = internals_ssr.check_scale("scale", scale)
        rows = [arguments_ssr.without_disabled_subjects(row, scale) for row in rows]
        subject = request_ssr.SubjectRequest(rows, None, encoder, find_unet(unet).dtype, scale, lambda: [branches])
    block = _Block(unet, encoder, subject, controlnet)
    try:
        with _lock:
            _users.setdefault(block.unet, []).append(block)
        block.add_hooks()
        _blocks().append(block)
        yield
    finally:
        try:
            block.end()
        finally:
            block.end()  # again, in case Ctrl-C interrupted the first call


class _Block:
    """A `with subject_in_unet(...)` block."""

    def __init__(self, unet: Any, encoder: Any, subject: Any, controlnet: nn.Module | None):
        self.unet = find_unet(unet)
        self.outermost = _outermost_compiled(unet, self.unet)
        self.subject = subject
        self.controlnet = controlnet
        self.names = list(encoder.config.attention_layers)
        self.layers: list[Any] = [self.unet.get_submodule(name) for name in self.names]
        self.parts: list[Any] = []
        self.modules: set[nn.Module] = set()

    def add_hooks(self) -> None:
        """Registers the hooks. It is called again before each forward pass, and registers them again if a module of a
        layer was replaced, for example by a LoRA that a callback loads."""
        parts = [part for attn in self.layers for part in (attn.to_q, attn.to_out[0], attn.processor)]
        if len(parts) == len(self.parts) and all(new is old for new, old in zip(parts, self.parts, strict=True)):
            return
        hooks = hooks_of_layers(self.unet, self.names)
        if self.controlnet is not None:
            hooks[self.controlnet] = _before_controlnet, None
        with _lock:
            # first, so that the hooks are removed even if Ctrl-C interrupts this method
            _hooked.setdefault(self.unet, set()).update([self.outermost, *hooks])
            for module, (before, after) in hooks.items():
                internals_ssr.set_forward_hooks(module, _KEY, before, after)
            internals_ssr.set_eager_pre_hook(self.outermost, _KEY, _before_unet)
            for module in self.modules - hooks.keys():
                internals_ssr.clear_forward_hooks(module, _KEY)
        self.parts, self.modules = parts, set(hooks)

    def end(self) -> None:
        """Removes the block, and the hooks if no other block uses them."""
        if self in _blocks():
            _blocks().remove(self)
        with _lock:
            users = _users.get(self.unet, [])
            if self in users:
                users.remove(self)
            if not users:
                for module in _hooked.pop(self.unet, ()):
                    internals_ssr.clear_forward_hooks(module, _KEY)
        # an interrupted forward pass leaves its state
        for index in {int(name.split(".")[-2]) for name in self.names}:
            attention_processors.processor_of_block(index).forget()


# The blocks of each UNet in all threads, and the modules with hooks; and the blocks of each thread, innermost last. A
# forward pass in a thread without a block finds none there, so the hooks do nothing in it.
_users: WeakKeyDictionary[nn.Module, list[_Block]] = WeakKeyDictionary()
_hooked: WeakKeyDictionary[nn.Module, set[nn.Module]] = WeakKeyDictionary()
_thread = threading.local()


def _blocks() -> list[_Block]:
    if not hasattr(_thread, "blocks"):
        _thread.blocks = []
    return _thread.blocks


def _before_unet(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of the UNet. Passes the conditions of the forward pass to the UNet's transformers."""
    block = next((block for block in reversed(_blocks()) if block.outermost is module), None)
    if block is None or kwargs is None:
        return None
    conditions = block.subject
    if isinstance(conditions, request_ssr.SubjectRequest):
        conditions = conditions.conditions(args[0] if args else kwargs["sample"])
    if conditions is None:
        return None
    block.add_hooks()
    attention_kwargs = {**(kwargs.get("cross_attention_kwargs") or {}), SUBJECT: conditions}
    return args, {**kwargs, "cross_attention_kwargs": attention_kwargs}


def _before_controlnet(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a ControlNet. Appends the tokens of the subject to those of the text."""
    block = next((block for block in reversed(_blocks()) if block.controlnet is module), None)
    if block is None or kwargs is None:
        return None
    states = kwargs["encoder_hidden_states"]
    tokens = block.subject.tokens(len(states), states.device)
    if tokens is None:
        return None
    return args, {**kwargs, "encoder_hidden_states": torch.cat([states, tokens.to(states.dtype)], dim=1)}


class _TransformerHook:
    """Forward pre-hook of a transformer. Takes the conditions out of `cross_attention_kwargs`, and passes the part of
    the transformer's cross-attention layers on together with the text.

    The hook is on the transformer and not on the layers for two reasons. First, the input of a transformer has the
    shape `(batch_size, channels, height, width)`, which gives the grid that a region is resized to. A layer gets
    flattened positions, and the grid could not be determined from them. Second, with compiled blocks a hook on the
    layer would be compiled with the layer's name, and each layer would need its own compiled block."""

    def __init__(self, layers: tuple[str, ...]):
        self.layers = layers

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        attention_kwargs = (kwargs or {}).get("cross_attention_kwargs") or {}
        conditions = attention_kwargs.get(SUBJECT)
        if kwargs is None or not isinstance(conditions, attention_processors.SubjectConditions):
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        grid = tuple(hidden_states.shape[2:])
        subject = conditions.for_transformer(self.layers, text, hidden_states.shape[0], grid)
        attention_kwargs = {name: value for name, value in attention_kwargs.items() if name != SUBJECT}
        return args[:1], {**kwargs, "encoder_hidden_states": subject, "cross_attention_kwargs": attention_kwargs}


@functools.cache
def _transformer_hook(layers: tuple[str, ...]) -> _TransformerHook:
    # the same hook for the same layers, because compiled code is only valid for the same hooks
    return _TransformerHook(layers)


def hooks_of_layers(unet: nn.Module, names: list[str]) -> dict[nn.Module, tuple[Any, Any]]:
    """Returns the forward pre-hook and the forward hook of each module of the cross-attention layers `names`, and of
    the transformers."""
    hooks: dict[nn.Module, tuple[Any, Any]] = {}
    # All transformers and all their layers, because those without a subject have to take it out of their input as well.
    # The names are those of `names`: in `named_modules`, a compiled block adds `_orig_mod` to them.
    owners = {name.rpartition(".transformer_blocks.")[0] for name in names}
    transformers: dict[Any, str] = {unet.get_submodule(name): name for name in owners}
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            transformers.setdefault(module, "")
    for module, name in transformers.items():
        count = len(module.transformer_blocks) if name else 0
        layers = tuple(f"{name}.transformer_blocks.{index}.attn2" for index in range(count))
        hooks[module] = _transformer_hook(layers), None
        for index, layer in enumerate(layers):
            attn, processor = unet.get_submodule(layer), attention_processors.processor_of_block(index)
            queries, outputs = _projections(attn)
            hooks.update(dict.fromkeys(queries, (None, processor.keep_query)))
            hooks.update(dict.fromkeys(outputs, (processor.add_subject, None)))
            hooks[attn] = processor.enter, processor.leave
    return hooks


def _projections(attn: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns the modules that compute the queries and outputs of a layer: `to_q` and `to_out[0]`, and the processor's
    own modules with names that begin with `to_q` or `to_out` (for example `to_q_custom_diffusion`)."""
    queries: list[nn.Module] = [attn.to_q]
    outputs: list[nn.Module] = [attn.to_out[0]]
    if isinstance(attn.processor, nn.Module):
        for name, module in attn.processor.named_children():
            if name.startswith("to_q"):
                queries.append(module)
            elif name.startswith("to_out"):
                outputs.append(module[0] if isinstance(module, (nn.ModuleList, nn.Sequential)) else module)
    return queries, outputs


def _outermost_compiled(wrapped: Any, unet: nn.Module) -> nn.Module:
    """Returns the outermost compiled module around the UNet, or the UNet if there is none. A hook on a module inside a
    compiled module would be compiled with it."""
    module = wrapped if isinstance(wrapped, nn.Module) else unet
    for part in module.modules():
        if part is unet:
            break
        compiled = is_compiled_module(part) or internals_ssr.is_compiled_in_place(part)
        if compiled and any(inner is unet for inner in part.modules()):
            return part
    return unet
