"""Adds the forward hooks that pass a subject to a UNet's layers, and removes them after each forward pass."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers.models import UNet2DConditionModel, UNetMotionModel
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from . import attention_processors, library_internals, shared_components


# The key of a subject in `cross_attention_kwargs`, from the pipeline's call to the UNet's transformers.
SUBJECT = "ssr_subject"

# Several copies of this code can be loaded: the installed package and those that `custom_pipeline=` loads. Each copy
# has its own hooks, which ignore the subjects of the other copies.
_KEY = __name__
_processor = attention_processors.SSRAttnProcessor2_0()


def find_unet(unet: Any) -> UNet2DConditionModel | UNetMotionModel:
    r"""
    Returns the UNet inside its wrappers: `torch.compile`, a `PeftModel`, the wrappers of accelerate or DDP, or a
    user-defined wrapper that forwards attribute access.

    Args:
        unet (`torch.nn.Module` or any callable object):
            A pipeline's `unet`.

    Raises:
        `ValueError`: if `unet` does not contain a UNet.
    """
    # A wrapper that is not a module but forwards attribute access also forwards `get_submodule`. This is a bound
    # method, and its `__self__` is the wrapped module.
    module = unet if isinstance(unet, nn.Module) else getattr(getattr(unet, "get_submodule", None), "__self__", None)
    for each in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(each, (UNet2DConditionModel, UNetMotionModel)):
            return each
    raise ValueError(f"`unet` has to be, or to wrap, a UNet of Stable Diffusion 1.5, but is {type(unet).__name__}.")


class _TransformerHook:
    """Forward pre-hook of the transformer around a cross-attention layer. Takes the conditions out of
    `cross_attention_kwargs`, and passes this layer's part of them on together with the text.

    The hook is on the transformer and not on the layer for two reasons. First, the input of a transformer has the
    shape `(batch_size, channels, height, width)`, which gives the grid that a region is resized to. The layer gets
    flattened positions, and the grid could not be determined from them. Second, with compiled blocks a hook on the
    layer would be compiled with the layer's name, and each layer would need its own compiled block. With a hook on the
    transformer, one compiled block is reused for all layers of the same width."""

    def __init__(self, layer: str):
        self.layer = layer

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        kwargs = kwargs or {}
        attention_kwargs = kwargs.get("cross_attention_kwargs") or {}
        conditions = attention_kwargs.get(SUBJECT)
        if not isinstance(conditions, attention_processors.SubjectConditions):
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        subject = conditions.for_layer(self.layer, hidden_states.shape[0], tuple(hidden_states.shape[2:]))
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        changed = {
            **kwargs,
            "encoder_hidden_states": attention_processors.TextAndSubject(text, subject),
            "cross_attention_kwargs": {name: each for name, each in attention_kwargs.items() if name != SUBJECT},
        }
        return args[:1], changed


class _Hooks:
    """The hooks in one UNet and their users, which are the forward passes of calls or a training loop. The set holds
    weak references to users: if Ctrl-C ends a user before it removes its hooks, the user is freed with its frame, and
    the next user removes the hooks."""

    def __init__(self):
        self.users: WeakSet = WeakSet()
        self.modules: set[nn.Module] = set()
        # These objects are kept between passes, because compiled code is only valid for the same hook objects.
        self.transformers: dict[str, _TransformerHook] = {}

    def add(self, unet: nn.Module, layers: Iterable[str], user) -> None:
        self.users.add(user)
        for layer in layers:
            self._add_to_layer(unet, layer)

    def _add_to_layer(self, unet: nn.Module, layer: str) -> None:
        attn = unet.get_submodule(layer)
        transformer = unet.get_submodule(layer.rpartition(".transformer_blocks.")[0])
        queries, outputs = _projections(attn)
        self.modules.update((attn, transformer, *queries, *outputs))
        for module in queries:
            library_internals.set_forward_hook(module, _KEY, _processor.keep_query)
        for module in outputs:
            library_internals.set_forward_pre_hook(module, _KEY, _processor.add_subject)
        library_internals.set_forward_hook(attn, _KEY, _processor.leave)
        library_internals.set_forward_pre_hook(attn, _KEY, _processor.enter)
        hook = self.transformers.setdefault(layer, _TransformerHook(layer))
        library_internals.set_forward_pre_hook(transformer, _KEY, hook)

    def remove(self, user) -> None:
        self.users.discard(user)
        if not self.users:
            for module in self.modules:
                library_internals.clear_forward_hooks(module, _KEY)
            self.modules.clear()


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


# The hooks of each UNet. Changes need `shared_components.registry_lock`, which is not held while a UNet runs.
_hooks: WeakKeyDictionary = WeakKeyDictionary()


def _after_fork() -> None:
    """Removes the hooks of other threads from all UNets, because only the forking thread continues in a forked
    process."""
    for unet, hooks in _hooks.items():
        for user in _of_other_threads(hooks.users):
            _remove_hooks(unet, user)
    for passes in {each for watchers in _watchers.values() for each in _of_other_threads(watchers)}:
        passes.stop()
    for thread in _running.keys() - {threading.get_ident()}:
        del _running[thread]


def _of_other_threads(users: WeakSet) -> list:
    return [user for user in users if user.thread != threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _add_hooks(unet: nn.Module, layers: Iterable[str], user) -> None:
    with shared_components.registry_lock():
        _hooks.setdefault(unet, _Hooks()).add(unet, layers, user)


def _remove_hooks(unet: nn.Module, user) -> None:
    with shared_components.registry_lock():
        if unet in _hooks:
            _hooks[unet].remove(user)


class _Loop:
    """A training loop that uses the hooks."""

    def __init__(self):
        self.thread = threading.get_ident()


@contextmanager
def subject_in_unet(unet: Any, layers: Iterable[str]) -> Iterator[None]:
    r"""
    Context manager for training, in which the forward passes of a UNet can attend to a subject. Inside it, the UNet
    accepts `cross_attention_kwargs={"ssr_subject": SubjectConditions(...)}`. Forward passes without this argument are
    those of the stock UNet. The hooks are not removed after each forward pass, because gradient checkpointing runs
    layers again in the backward pass. They are removed when the context ends, also after an error.

    Args:
        unet (`UNet2DConditionModel`):
            The UNet, which may be wrapped.
        layers (`Iterable[str]`):
            The names of its cross-attention layers, `SSREncoder.config.attention_layers`.

    Example:

    ```py
    >>> with subject_in_unet(unet, encoder.config.attention_layers):
    ...     predicted = unet(latents, timestep, text, cross_attention_kwargs={"ssr_subject": conditions}).sample
    ```
    """
    unet, user = find_unet(unet), _Loop()
    try:
        _add_hooks(unet, layers, user)
        yield
    finally:
        _remove_hooks(unet, user)


class SubjectPasses:
    r"""
    Adds a subject to the forward passes of a UNet in one pipeline call. The call passes this object to the UNet as
    `cross_attention_kwargs["ssr_subject"]`. As a context manager, it watches the UNet with one forward pre-hook and
    one forward hook: before each forward pass that has this object in its arguments, it replaces the object by the
    subject's [`SubjectConditions`] and adds the hooks on the layers, and it removes these hooks after that pass. Other
    forward passes, in this thread or in another one, are not changed.

    The two hooks on the UNet are also removed while a callback runs (`paused`), so that a callback can inspect, change
    and run the stock UNet.

    Args:
        unet (`UNet2DConditionModel`):
            The UNet, which may be wrapped.
        layers (`Iterable[str]`):
            The names of the cross-attention layers that attend to the subject.
        conditions (`Callable`):
            A function that takes the latents of a forward pass and returns the [`SubjectConditions`] for it, or `None`
            if the pass does not attend to a subject.
    """

    def __init__(
        self,
        unet,
        layers: Iterable[str],
        conditions: Callable[[torch.Tensor], attention_processors.SubjectConditions | None],
    ):
        self.layers = list(layers)
        self.conditions = conditions
        self.count = 0
        self.thread = threading.get_ident()
        self.controlnet: nn.Module | None = None
        self.tokens: Callable[[int, torch.device], torch.Tensor | None] = lambda batch_size, device: None
        self.watch(unet)

    def watch(self, unet) -> None:
        """Sets the UNet to watch. It is used from the next `start`."""
        self.wrapped_unet, self.unet = unet, find_unet(unet)
        self.watched = _outermost_compiled(unet, self.unet)

    def watch_controlnet(
        self, controlnet: nn.Module, tokens: Callable[[int, torch.device], torch.Tensor | None]
    ) -> None:
        r"""
        Appends the subject's tokens to the text that one or several ControlNets get in this call.

        Args:
            controlnet (`ControlNetModel` or `MultiControlNetModel`):
                The ControlNet.
            tokens (`Callable`):
                A function that takes a batch size and a device and returns the tokens, of shape
                `(batch_size, num_subject_tokens, cross_attention_dim)`, or `None` if nothing is appended in this step.
        """
        self.controlnet, self.tokens = controlnet, tokens

    def start(self) -> None:
        """Starts watching the UNet."""
        with shared_components.registry_lock():
            _watchers.setdefault(self.watched, WeakSet()).add(self)
            _add_watch(self.watched)
            if self.controlnet is not None:
                _watchers.setdefault(self.controlnet, WeakSet()).add(self)
                library_internals.set_forward_pre_hook(self.controlnet, _KEY, _before_controlnet)

    def stop(self) -> None:
        """Stops watching the UNet. It can be called repeatedly, for example after Ctrl-C interrupted the first
        call."""
        with shared_components.registry_lock():
            for module in (self.watched, self.controlnet):
                if module is not None and module in _watchers:
                    _watchers[module].discard(self)
                    if not _watchers[module]:
                        _remove_watch(module)
        # a forward pass that was interrupted by Ctrl-C did not call `end`
        self.end()

    def __enter__(self) -> "SubjectPasses":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that makes the UNet stock while a callback runs. After an error in the callback, the UNet
        stays stock."""
        self.stop()
        yield
        self.start()

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Returns the arguments of a forward pass, with this object replaced by the subject's conditions."""
        conditions = self.conditions(args[0] if args else kwargs["sample"])
        self.count += 1
        attention_kwargs = {name: each for name, each in kwargs["cross_attention_kwargs"].items() if name != SUBJECT}
        if conditions is not None:
            _running[threading.get_ident()] = self
            _add_hooks(self.unet, self.layers, self)
            attention_kwargs[SUBJECT] = conditions
        kwargs = {**kwargs, "cross_attention_kwargs": attention_kwargs or None}
        added = kwargs.get("added_cond_kwargs") or {}
        # `load_ip_adapter` sets only the attribute of the config; the dict item keeps the old value
        hid_dim_type = getattr(self.unet.config, "encoder_hid_dim_type", None)
        if hid_dim_type == "ip_image_proj" and "image_embeds" not in added:
            kwargs["added_cond_kwargs"] = {**added, "image_embeds": _NoPictures(self.unet.encoder_hid_proj)}
        return args, kwargs

    def end(self) -> None:
        """Removes the hooks on the layers after a forward pass."""
        if _running.get(threading.get_ident()) is self:
            del _running[threading.get_ident()]
            _processor.forget()
        _remove_hooks(self.unet, self)


class _NoPictures(list):
    """The image embeddings for IP-Adapters that are loaded but got no picture. The UNet compares the list's length
    with the number of its adapters and then iterates over both. This list reports that length but is empty, so that no
    adapter adds anything. Zeros cannot be used instead, because an adapter projects them to tokens other than zero."""

    def __init__(self, image_projection: Any):
        super().__init__()
        self.length = len(image_projection.image_projection_layers)

    def __len__(self) -> int:
        return self.length


# `_watchers` has the running calls of each watched module, as weak references for the same reason as in `_Hooks`.
# `_running` has the call that each thread runs a forward pass for.
_watchers: WeakKeyDictionary = WeakKeyDictionary()
_running: dict[int, SubjectPasses] = {}


def _before_pass(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    kwargs = kwargs or {}
    passes = (kwargs.get("cross_attention_kwargs") or {}).get(SUBJECT)
    return passes.begin(args, kwargs) if isinstance(passes, SubjectPasses) else None


def _after_pass(module: nn.Module, args: tuple, kwargs: dict | None = None, output=None) -> None:
    passes = _running.get(threading.get_ident())
    if passes is not None:
        passes.end()


def _before_controlnet(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    if kwargs is None:
        return None
    with shared_components.registry_lock():
        # There is at most one call per thread: if it was made in a callback of another call, that other call is
        # paused.
        passes = next((each for each in _watchers.get(module, ()) if each.thread == threading.get_ident()), None)
    if passes is None:
        return None
    states = kwargs["encoder_hidden_states"]
    tokens = passes.tokens(len(states), states.device)
    if tokens is None:
        return None
    return args, {**kwargs, "encoder_hidden_states": torch.cat([states, tokens.to(states.dtype)], dim=1)}


class _CompiledCall:
    """Replaces the compiled call of a UNet that was compiled in place. It runs `_before_pass`, the compiled call and
    `_after_pass`. As forward hooks, these two functions would be compiled with the UNet, but neither a lock nor the
    projection of a new subject can be compiled."""

    def __init__(self, module: nn.Module, call: Callable):
        self.module, self.call = module, call

    def __call__(self, *args, **kwargs):
        with shared_components.compiled_lock(self.module):
            args, kwargs = _before_pass(self.module, args, kwargs) or (args, kwargs)
            try:
                return self.call(*args, **kwargs)
            finally:
                _after_pass(self.module, args, kwargs)


def _add_watch(module: nn.Module) -> None:
    call = library_internals.compiled_call(module)
    if call is None:
        library_internals.set_forward_pre_hook(module, _KEY, _before_pass)
        library_internals.set_forward_hook(module, _KEY, _after_pass)
    elif not any(isinstance(each, _CompiledCall) for each in _chain(call)):
        library_internals.set_compiled_call(module, _CompiledCall(module, call))


def _remove_watch(module: nn.Module) -> None:
    library_internals.clear_forward_hooks(module, _KEY)
    outer: Any = None
    for call in _chain(library_internals.compiled_call(module)):
        if isinstance(call, _CompiledCall) and outer is None:
            library_internals.set_compiled_call(module, call.call)
        elif isinstance(call, _CompiledCall):
            outer.call = call.call
        outer = call


def _chain(call: Any) -> Iterator[Any]:
    """Yields a compiled call and the calls that it wraps, because another copy of this code may have wrapped it
    too."""
    while call is not None:
        yield call
        call = getattr(call, "call", None)


def _outermost_compiled(wrapped, unet: nn.Module) -> nn.Module:
    """Returns the outermost compiled module around the UNet, or the UNet if there is none. Hooks on a module inside a
    compiled module would be compiled with it."""
    module = wrapped if isinstance(wrapped, nn.Module) else unet
    for each in module.modules():
        if each is unet:
            break
        compiled = is_compiled_module(each) or library_internals.compiled_call(each) is not None
        if compiled and any(inner is unet for inner in each.modules()):
            return each
    return unet
