"""Adds the forward hooks of a subject to a UNet for its forward passes, and removes them after each pass."""

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


# the key of a subject in `cross_attention_kwargs`, from the pipeline's call to the UNet's transformers
SUBJECT = "ssr_subject"

# Each copy of this code (the installed package, and the copy that `custom_pipeline=` loads) has its own hooks, which ignore the
# subjects of the other copy.
_KEY = __name__
_processor = attention_processors.SSRAttnProcessor2_0()


def find_unet(unet: Any) -> UNet2DConditionModel | UNetMotionModel:
    r"""
    Find the UNet inside a wrapper: `torch.compile`, a `PeftModel`, a wrapper of accelerate or DDP, or your own wrapper that
    forwards attributes.

    Args:
        unet (`torch.nn.Module` or any callable object):
            A pipeline's `unet`.

    Raises:
        `ValueError`: if there is no UNet.
    """
    # A wrapper that is not a module but forwards attributes also forwards `get_submodule`. The `__self__` of this bound method is
    # the module inside.
    module = unet if isinstance(unet, nn.Module) else getattr(getattr(unet, "get_submodule", None), "__self__", None)
    for each in module.modules() if isinstance(module, nn.Module) else ():
        if isinstance(each, (UNet2DConditionModel, UNetMotionModel)):
            return each
    raise ValueError(f"`unet` has to be, or to wrap, a UNet of Stable Diffusion 1.5, but is {type(unet).__name__}.")


class _TransformerHook:
    """Forward pre-hook of the transformer around a cross-attention layer: removes the conditions from
    `cross_attention_kwargs`, and passes the part for this layer on with the text.

    It is a hook of the transformer and not of the layer for two reasons. The input of a transformer has the shape
    `(batch_size, channels, height, width)`, which gives the grid for the regions. The layer gets the positions in one dimension
    and would have to guess the grid. And with compiled blocks, a hook of the layer would be compiled with the layer's name, so
    each layer would be compiled separately. This way one compiled block is used for all layers of the same width."""

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
    """The hooks in one UNet, and their users: forward passes of calls, or a training loop. The references to users are weak. If
    Ctrl-C ends a user before it could remove its hooks, it disappears with its frame, and the next user removes them."""

    def __init__(self):
        self.users: WeakSet = WeakSet()
        self.modules: set[nn.Module] = set()
        # kept between passes, because compiled code is valid only for these objects
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
    """The modules that compute a layer's queries and outputs: `to_q` and `to_out[0]`, and modules of the processor with names
    that start in the same way (`to_q_custom_diffusion`)."""
    queries: list[nn.Module] = [attn.to_q]
    outputs: list[nn.Module] = [attn.to_out[0]]
    if isinstance(attn.processor, nn.Module):
        for name, module in attn.processor.named_children():
            if name.startswith("to_q"):
                queries.append(module)
            elif name.startswith("to_out"):
                outputs.append(module[0] if isinstance(module, (nn.ModuleList, nn.Sequential)) else module)
    return queries, outputs


# by UNet; protected by `shared_components.registry_lock`, which is not held while a UNet runs
_hooks: WeakKeyDictionary = WeakKeyDictionary()


def _after_fork() -> None:
    """In a forked process only the forking thread continues, so remove the hooks of other threads."""
    for unet, hooks in _hooks.items():
        for user in _of_other_threads(hooks.users):
            _remove_hooks(unet, user)
    for passes in {each for watchers in _watchers.values() for each in _of_other_threads(watchers)}:
        passes.stop()


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
    A context manager for training. Inside, the UNet accepts
    `cross_attention_kwargs={"ssr_subject": SubjectConditions(...)}`. Forward passes without it are those of the stock UNet. The
    hooks stay until the end, because gradient checkpointing runs layers again in the backward pass. Afterwards, also after an
    error, the UNet is unchanged.

    Args:
        unet (`UNet2DConditionModel`):
            The UNet, wrapped or not.
        layers (`Iterable[str]`):
            Names of its cross-attention layers, `SSREncoder.config.attention_layers`.

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
    The forward passes of a pipeline call through a UNet. The call passes this object as `cross_attention_kwargs["ssr_subject"]`.
    As a context manager it watches the UNet: in each forward pass that gets this object, it replaces it with the subject, and
    adds the hooks for this pass. Passes of other calls, in any thread, are not changed.

    To watch the UNet, it adds one forward pre-hook and one forward hook to it. They are also removed while a callback runs
    (`paused`), so a callback can inspect, change and use the stock UNet.

    Args:
        unet (`UNet2DConditionModel`):
            The UNet, wrapped or not.
        layers (`Iterable[str]`):
            Names of its cross-attention layers in which the subject acts.
        conditions (`Callable`):
            Called with the latents of a pass. Returns its [`SubjectConditions`], or `None` for no subject.
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
        self.watch(unet)

    def watch(self, unet) -> None:
        """Set the UNet to watch from the next `start` on."""
        self.wrapped_unet, self.unet = unet, find_unet(unet)
        self.watched = _outermost_compiled(unet, self.unet)

    def watch_controlnet(self, controlnet: nn.Module, tokens: Callable[[int, torch.device], torch.Tensor]) -> None:
        r"""
        Pass the subject's tokens to one or several ControlNets in this call, after those of the text.

        Args:
            controlnet (`ControlNetModel` or `MultiControlNetModel`):
                The ControlNet.
            tokens (`Callable`):
                Called with a batch size and a device. Returns the tokens,
                `(batch_size, num_subject_tokens, cross_attention_dim)`.
        """
        self.controlnet, self.tokens = controlnet, tokens

    def start(self) -> None:
        """Watch the UNet."""
        with shared_components.registry_lock():
            _watchers.setdefault(self.watched, WeakSet()).add(self)
            _add_watch(self.watched)
            if self.controlnet is not None:
                _watchers.setdefault(self.controlnet, WeakSet()).add(self)
                library_internals.set_forward_pre_hook(self.controlnet, _KEY, _before_controlnet)

    def stop(self) -> None:
        """Stop watching. It can be called again at any time, also if Ctrl-C interrupted the first call."""
        with shared_components.registry_lock():
            for module in (self.watched, self.controlnet):
                if module is not None and module in _watchers:
                    _watchers[module].discard(self)
                    if not _watchers[module]:
                        _remove_watch(module)
        # a pass that Ctrl-C interrupted did not call `end`
        self.end()

    def __enter__(self) -> "SubjectPasses":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop watching while a callback runs. After an error in the callback, do not start again."""
        self.stop()
        yield
        self.start()

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Start a forward pass: return its arguments, with this object replaced by the subject."""
        conditions = self.conditions(args[0] if args else kwargs["sample"])
        self.count += 1
        attention_kwargs = {name: each for name, each in kwargs["cross_attention_kwargs"].items() if name != SUBJECT}
        if conditions is not None:
            _running[threading.get_ident()] = self
            _add_hooks(self.unet, self.layers, self)
            attention_kwargs[SUBJECT] = conditions
        kwargs = {**kwargs, "cross_attention_kwargs": attention_kwargs or None}
        added = kwargs.get("added_cond_kwargs") or {}
        # `load_ip_adapter` sets the config's attribute, not its item, which keeps the old value
        hid_dim_type = getattr(self.unet.config, "encoder_hid_dim_type", None)
        if hid_dim_type == "ip_image_proj" and "image_embeds" not in added:
            kwargs["added_cond_kwargs"] = {**added, "image_embeds": _NoPictures(self.unet.encoder_hid_proj)}
        return args, kwargs

    def end(self) -> None:
        """End a forward pass."""
        if _running.get(threading.get_ident()) is self:
            del _running[threading.get_ident()]
            _processor.forget()
        _remove_hooks(self.unet, self)


class _NoPictures(list):
    """The image embeddings of IP-Adapters that are loaded but got no picture, so that they add nothing in a call with a subject. The
    UNet compares the list's length with the number of its adapters and then iterates over both. This list reports that length
    but is empty, so that each adapter adds nothing. Zeros would not do: an adapter projects
    them to tokens other than zero."""

    def __init__(self, image_projection: Any):
        super().__init__()
        self.length = len(image_projection.image_projection_layers)

    def __len__(self) -> int:
        return self.length


# by watched module: the running calls, with weak references as in `_Hooks`; by thread: the call whose forward pass runs
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
        # there is at most one call per thread, because an outer call is paused during its callbacks
        passes = next((each for each in _watchers.get(module, ()) if each.thread == threading.get_ident()), None)
    if passes is None:
        return None
    states = kwargs["encoder_hidden_states"]
    tokens = passes.tokens(len(states), states.device).to(states.dtype)
    return args, {**kwargs, "encoder_hidden_states": torch.cat([states, tokens], dim=1)}


class _CompiledCall:
    """Replaces the call of a UNet that was compiled in place: it runs the compiled call between `_before_pass` and
    `_after_pass`. As forward hooks, these would be compiled with the UNet, and neither a lock nor the projection of a new subject
    can be compiled."""

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
    """A compiled call and the calls that it wraps. Another copy of this code can have added its own wrapper."""
    while call is not None:
        yield call
        call = getattr(call, "call", None)


def _outermost_compiled(wrapped, unet: nn.Module) -> nn.Module:
    """The UNet, or the outermost compiled module around it. Hooks inside a compiled module would be compiled with it."""
    module = wrapped if isinstance(wrapped, nn.Module) else unet
    for each in module.modules():
        if each is unet:
            break
        compiled = is_compiled_module(each) or library_internals.compiled_call(each) is not None
        if compiled and any(inner is unet for inner in each.modules()):
            return each
    return unet
