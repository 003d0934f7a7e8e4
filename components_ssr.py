"""What the mixins share: the components of an SSR pipeline, whether they fit each other, and what is shared by the calls
of several threads."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import CLIPImageProcessor, PreTrainedModel

from . import hooks_ssr, internals_ssr, modeling_ssr


COMPONENTS = ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor")
DEFAULT_SCALE = 0.65

# For type checkers the mixins are subclasses of `DiffusionPipeline`, because they are mixed into pipelines. At run
# time they must not be, because diffusers refuses a file of custom code that contains two pipeline classes.
if TYPE_CHECKING:
    _Pipeline = DiffusionPipeline
else:
    _Pipeline = object


class SSRComponents(_Pipeline):
    """Declares the pipeline's attributes that the mixins use. The SSR components are `None` before `load_ssr`."""

    unet: Any
    text_encoder: Any
    tokenizer: Any
    ssr_encoder: modeling_ssr.SSREncoder
    ssr_image_encoder: PreTrainedModel
    ssr_image_processor: CLIPImageProcessor
    _ssr_scale: float | dict = DEFAULT_SCALE

    if TYPE_CHECKING:
        controlnet: Any
        __call__: Callable[..., Any]
        _encode_prompt: Callable[..., Any]
        _offload_device: Any

    def _loaded_encoder(self) -> modeling_ssr.SSREncoder:
        """Returns the SSR-Encoder. Raises a `ValueError` if there is none, or if it does not fit the pipeline.
        Components that are only needed to encode a reference image may be absent."""
        encoder = self.ssr_encoder
        if encoder is None:
            raise ValueError("There is no SSR-Encoder in this pipeline yet: call `load_ssr` first.")
        check_fits(self.unet, encoder, self.ssr_image_encoder, self.text_encoder)
        return encoder


def check_fits(unet, encoder, image_encoder, text_encoder) -> None:
    """Raises a `ValueError` if an SSR-Encoder was made for other models. A model that is `None` is not checked:
    generating needs no image encoder and, with `prompt_embeds`, no text encoder, and encoding needs no UNet."""
    config = encoder.config
    if "vision_hidden_size" not in config:
        raise ValueError(f"`ssr_encoder` has to be an SSREncoder, but is a {type(encoder).__name__}.")
    text_width = None if text_encoder is None else text_encoder.config.hidden_size
    if text_width not in (None, config.cross_attention_dim):
        raise ValueError(
            f"`ssr_encoder` was made for a text encoder of width {config.cross_attention_dim}, but this pipeline's"
            f" has {text_width}: SSR-Encoder needs Stable Diffusion 1.5's."
        )
    if image_encoder is not None and image_encoder.config.hidden_size != config.vision_hidden_size:
        raise ValueError(
            f"`ssr_encoder` reads hidden states of width {config.vision_hidden_size}, but the image encoder's are"
            f" {image_encoder.config.hidden_size} wide."
        )
    if image_encoder is not None and image_encoder.config.num_hidden_layers < max(config.image_levels, default=0):
        raise ValueError(
            f"`ssr_encoder` reads levels {tuple(config.image_levels)}, but the image encoder has only"
            f" {image_encoder.config.num_hidden_layers} layers."
        )
    if unet is not None:
        check_fits_unet(unet, encoder)


def check_fits_unet(unet, encoder) -> None:
    """Raises a `ValueError` if an SSR-Encoder was made for another UNet, or with FreeNoise's split inference."""
    config, unet = encoder.config, hooks_ssr.find_unet(unet)
    if internals_ssr.uses_split_inference(unet):
        raise ValueError(
            "A subject cannot be used with FreeNoise's split inference, which splits the frames but not the"
            " subject: call `enable_free_noise` without `enable_free_noise_split_inference`."
        )
    for name, width in config.attention_layers.items():
        try:
            attn = unet.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"`ssr_encoder` has weights for the layer {name}, but the UNet has no such layer."
            ) from None
        if (attn.inner_dim, attn.cross_attention_dim) != (width, config.cross_attention_dim):
            raise ValueError(
                f"`ssr_encoder` expects the UNet's layer {name} to be {width} wide over text of width"
                f" {config.cross_attention_dim}, but it is {attn.inner_dim} wide over {attn.cross_attention_dim}."
            )


def check_precision(text_encoder, unet) -> None:
    """Raises a `ValueError` if the text encoder and the UNet have different precisions, with which the first step would
    fail. Without `dtype=`, transformers keeps the precision of the files, and diffusers loads in float32."""
    unet = hooks_ssr.find_unet(unet)
    dtypes = {None if model is None else model.dtype for model in (text_encoder, unet)}
    usual = {torch.float16, torch.bfloat16, torch.float32}
    if len(dtypes & usual) > 1 and not torch.is_autocast_enabled(unet.device.type):
        raise ValueError(
            f"`text_encoder` is in {text_encoder.dtype}, but `unet` in {unet.dtype}: load the pipeline with `dtype=`, or"
            " move it with `pipe.to(dtype)`."
        )


# The pipelines and schedulers that are in a call, and a lock for each tokenizer. `_lock` is held while they are changed.
# It is reentrant, because the garbage collector can end an interrupted call in any thread, even one that holds it.
_in_use: WeakSet[Any] = WeakSet()
_tokenizer_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_lock = threading.RLock()


@contextmanager
def own_pipeline(pipeline) -> Iterator:
    """Context manager that gives a call a pipeline that no other call uses: the pipeline itself, or, if the pipeline or
    its scheduler is in a call already (in another thread, or the call whose callback this is), a shallow copy with its
    own scheduler. A scheduler and the private attributes of a pipeline store the state of one call."""
    with _lock:
        scheduler = pipeline.scheduler
        if pipeline in _in_use or scheduler in _in_use:
            pipeline = copy.copy(pipeline)
            # made from the config and not as a deep copy, because the other call may be changing the scheduler
            vars(pipeline)["scheduler"] = type(scheduler).from_config(scheduler.config)
        used = [pipeline, pipeline.scheduler]
        _in_use.update(used)
    try:
        yield pipeline
    finally:
        with _lock:
            _in_use.difference_update(used)


def tokenizer_lock(tokenizer) -> threading.RLock:
    """Returns the lock that must be held while a tokenizer is used. A fast tokenizer stores padding and truncation as
    state, so that two threads that use it at the same time would apply each other's padding and truncation."""
    with _lock:
        return _tokenizer_locks.setdefault(tokenizer, threading.RLock())
