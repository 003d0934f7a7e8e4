"""The mixin class of all SSR pipelines: its components and its `__call__`."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models import UNet2DConditionModel, UNetMotionModel
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from transformers import CLIPImageProcessor, PreTrainedModel

from . import (
    checks_ssr,
    encoding_ssr,
    library_internals,
    loading_ssr,
    modeling_ssr,
    shared_components,
    subject_embeds,
    subject_request,
    unet_hooks,
)


def _in_own_pipeline(call: Callable) -> Callable:
    """Decorator of a pipeline's `__call__`. The call waits until it may begin, and runs on a copy of the pipeline if
    the pipeline is already in a call."""

    @functools.wraps(call)
    def method(self, *args, **kwargs):
        with shared_components.turn_to_run(), shared_components.own_pipeline(self) as pipeline:
            return call(pipeline, *args, **kwargs)

    return method


class SSRPipelineMixin(loading_ssr.SSRLoaderMixin, encoding_ssr.SubjectEncodingMixin):
    r"""
    Adds SSR-Encoder to a Stable Diffusion 1.5 pipeline of diffusers. With
    `class MyPipeline(SSRPipelineMixin, StockPipeline)`, the new class has the arguments and components of the stock
    pipeline and those documented here. docs/how_it_works.md describes how the modules process a picture and a query.

    **When the hooks are in the UNet.** The weights are in the `ssr_encoder` component and are never copied into the
    UNet. The subject is added by forward hooks. They are on the UNet's layers only during the forward passes of a call
    with a subject. Between these passes, two hooks on the UNet detect the next one. In the call's callbacks, between
    calls and after an error, the UNet is stock. Any number of threads, SSR pipelines and stock pipelines can use one
    UNet at the same time.

    **How the subject is passed to the UNet.** The subject's keys and values are projected once per call, and the
    values are multiplied by the scale. They are passed in an argument that every pipeline passes on to its UNet:
    `cross_attention_kwargs["ssr_subject"]`.
    """

    _ssr_scale: float | dict = loading_ssr.DEFAULT_SCALE
    set_max_concurrent_calls = staticmethod(shared_components.set_max_concurrent_calls)

    def __init__(
        self,
        *args,
        # not `ModelMixin | None`: diffusers 0.36 does not support such an annotation, and `from_pretrained` would
        # raise a KeyError
        ssr_encoder: Optional[ModelMixin] = None,  # noqa: UP045
        ssr_image_encoder: Optional[PreTrainedModel] = None,  # noqa: UP045
        ssr_image_processor: Optional[CLIPImageProcessor] = None,  # noqa: UP045
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.register_modules(
            ssr_encoder=ssr_encoder, ssr_image_encoder=ssr_image_encoder, ssr_image_processor=ssr_image_processor
        )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # also the methods that a user's own class overrides
        for name in ("encode_prompt", "_encode_prompt"):
            if inspect.isfunction(vars(cls).get(name)):
                setattr(cls, name, _with_own_tokenizer(vars(cls)[name]))
        if any(issubclass(base, SSRPipelineMixin) for base in cls.__bases__ if base is not SSRPipelineMixin):
            return  # the class inherits all of this
        # diffusers reads a class's components and arguments from its signatures. With only `*args, **kwargs`,
        # `from_pretrained` and `from_pipe` would load no component, so each class gets a signature with all names.
        for name in ("__init__", "__call__"):
            if name not in vars(cls):
                setattr(cls, name, _with_signature(getattr(cls, name), getattr(super(), name)))
        stock: Any = super()
        for name in ("encode_prompt", "_encode_prompt"):
            if name not in vars(cls) and hasattr(stock, name):
                setattr(cls, name, _with_own_tokenizer(getattr(stock, name)))
        library_internals.register_auto_pipeline(cls, _stock_class_of(cls))
        cls._optional_components = [*stock._optional_components, *loading_ssr.COMPONENTS]
        if stock.model_cpu_offload_seq is not None:  # a user's own pipeline may not support offloading
            order = stock.model_cpu_offload_seq.replace("unet", "ssr_image_encoder->ssr_encoder->unet")
            cls.model_cpu_offload_seq = order

    @_in_own_pipeline
    def __call__(
        self,
        *args,
        subject_image=None,
        subject_query: str | list[str] | None = None,
        subject_mask=None,
        mask_weight: float = 1.0,
        subject_scale: float | dict | None = None,
        subject: subject_embeds.SubjectEmbeds | dict | list | None = None,
        subject_start: float = 0.0,
        subject_end: float = 1.0,
        subject_resize_mode: str = "pad",
        subject_in_controlnet: bool = False,
        **kwargs,
    ):
        r"""
        Generates pictures or videos like the stock pipeline, with subjects from reference pictures. It accepts all
        arguments of the stock pipeline. Without a subject, the stock call runs unchanged.

        `subject_image`, `subject_query` and `subject_mask` can be lists. With a list of prompts, they have one element
        for each prompt. With a single prompt, they are several subjects that appear together in the generated picture.

        Args:
            subject_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*):
                The reference picture. It may contain several objects. Arrays have the shape `(height, width, 3)`, in
                uint8 or as floats from 0 to 1. Tensors have the shape `(3, height, width)`, with values from 0 to 1.
            subject_query (`str` or `list[str]`, *optional*):
                A text that names the subject in the picture, for example "cat" or "the woman on the left". With a
                mask, the query is optional; the authors used a caption of the whole picture.
            subject_mask (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*):
                A mask of the subject in the reference picture, of shape `(height, width)` and the size of the picture:
                white, or 1, where the subject is.
            mask_weight (`float`, defaults to 1.0):
                How strongly the mask increases the attention inside it, 0 or more. It needs a mask.
            subject_scale (`float` or `dict`, *optional*):
                How strongly the subject affects the result. 0 disables it, and usual values are 0.5 to 0.8. A higher
                value follows the subject more closely and the prompt less closely. A dict sets the scale per block, in
                the format of `set_ip_adapter_scale`. Defaults to the scale set with `set_ssr_scale`, which is 0.65
                initially. A number is not used for subjects that have their own scale (`SubjectEmbeds.scaled`), and a
                dict is multiplied with it.
            subject ([`SubjectEmbeds`], `dict` or `list`, *optional*):
                Subjects returned by `encode_subject`, instead of the arguments above. Pass one for all prompts, or a
                list with one for each prompt, with `None` for a prompt without a subject. For a video, a dict maps
                frames to subjects (`{0: cat, 8: dog}`), and the subjects are interpolated for the frames between
                them. `None` at a frame fades the subject out.
            subject_start (`float`, defaults to 0.0), subject_end (`float`, defaults to 1.0):
                The part of the denoising process in which the subject is used, as fractions of the steps. Early steps
                determine layout and colours, late steps determine details.
            subject_resize_mode (`str`, defaults to `"pad"`):
                `"pad"` passes the whole reference picture to the encoder. `"crop"` passes the central square, as the
                released code does.
            subject_in_controlnet (`bool`, defaults to `False`):
                Whether the subject's tokens are appended to the text that a ControlNet gets, as in the released demo.
                They are appended in the part of the denoising process in which the subject is used. As in the released
                demo, the scale of a single subject and regions have no effect on the ControlNet.

        Returns:
            The output of the stock pipeline.

        Raises:
            `ValueError`: before the first step, if the subject's arguments are invalid, have no effect, or do not fit
                together; in the first step, if the UNet has an attention processor that does not work with a subject,
                if a region covers no position of the latents, or if `subject_start` and `subject_end` contain no step.

        Example:

        ```py
        >>> image = pipe("a cat on the beach", subject_image=photo, subject_query="cat").images[0]
        ```
        """
        stock_call = super().__call__
        stock_parameters = inspect.signature(stock_call).parameters
        checks_ssr.check_unknown_arguments(kwargs, stock_parameters, _OWN_ARGUMENTS)
        references = {"subject_image": subject_image, "subject_query": subject_query, "subject_mask": subject_mask}
        of_references = {"mask_weight": mask_weight, "subject_resize_mode": subject_resize_mode}
        of_subjects = {
            "subject_scale": subject_scale,
            "subject_start": subject_start,
            "subject_end": subject_end,
            "subject_in_controlnet": subject_in_controlnet,
        }
        if subject is None and all(value is None for value in references.values()):
            checks_ssr.check_unused({**of_subjects, **of_references}, _OWN_ARGUMENTS, "there is no subject")
            # another kind of UNet works without a subject
            if isinstance(self.unet, (UNet2DConditionModel, UNetMotionModel)):
                checks_ssr.check_precision(self.text_encoder, self.unet)
            return stock_call(*args, **kwargs)

        arguments = _by_name(stock_call, args, kwargs)
        if arguments.get("num_inference_steps") is not None:
            subject_embeds.check_count("num_inference_steps", arguments["num_inference_steps"])
        # read once, because another thread may exchange the encoder during the call
        encoder = self._loaded_encoder()
        scale = self._layer_scales("subject_scale", self._ssr_scale if subject_scale is None else subject_scale)
        window = checks_ssr.check_window(subject_start, subject_end)
        if window is not None and "callback_on_step_end" not in stock_parameters:
            raise ValueError("`subject_start` and `subject_end` need a pipeline with `callback_on_step_end`.")
        num_prompts = _num_prompts(arguments)
        if subject is None:
            text, encoders = _text_arguments(arguments), self._encoders()
            encoder = encoders[-1]
            encoded = self._encode_subjects(
                encoders, subject_image, subject_query, subject_mask, mask_weight, subject_resize_mode, text
            )
            if num_prompts > 1 or isinstance(arguments.get("prompt"), list):
                names = ", ".join(f"`{name}`" for name in references)
                rows = [
                    subject_request.SubjectRow((each,))
                    for each in checks_ssr.one_for_each(names, encoded, num_prompts)
                ]
            else:
                rows = [subject_request.SubjectRow((functools.reduce(subject_embeds.SubjectEmbeds.__add__, encoded),))]
        else:
            given = [name for name, value in references.items() if value is not None]
            if given:
                raise ValueError(f"Pass either `subject` or `{given[0]}`, but not both.")
            checks_ssr.check_unused(
                of_references, _OWN_ARGUMENTS, "`subject` is encoded already: pass it to `encode_subject`"
            )
            rows = checks_ssr.check_subjects(subject, num_prompts, self._check_encoded_by(encoder))
        rows = [subject_request.without_disabled_subjects(row, scale) for row in rows]
        if subject_in_controlnet:
            has_controlnet = getattr(self, "controlnet", None) is not None
            checks_ssr.check_in_controlnet(rows, has_controlnet, type(self).__name__)
        if arguments.get("padding_mask_crop") is not None:
            checks_ssr.check_no_regions(rows, "`padding_mask_crop` draws a part of the picture")
        num_frames = _num_frames(stock_parameters, arguments)
        for row in rows:
            subject_request.check_frames(row, num_frames)
        if not checks_ssr.acts(rows, scale):
            return stock_call(**arguments)

        request = subject_request.SubjectRequest(
            rows,
            num_prompts * (arguments.get("num_images_per_prompt") or 1),
            encoder,
            unet_hooks.find_unet(self.unet).dtype,
            scale,
            functools.partial(_branches, self),
            num_frames,
        )
        return self._draw(stock_call, arguments, request, window, subject_in_controlnet)

    def _draw(self, stock_call, arguments: dict, request: subject_request.SubjectRequest, window, in_controlnet: bool):
        """Runs the stock call, with a subject added to the UNet's forward passes."""
        passes = unet_hooks.SubjectPasses(self.unet, request.encoder.config.attention_layers, request.conditions)
        if in_controlnet:
            passes.watch_controlnet(self.controlnet, request.tokens)
        attention_kwargs = arguments.get("cross_attention_kwargs") or {}
        arguments = {**arguments, "cross_attention_kwargs": {**attention_kwargs, unet_hooks.SUBJECT: passes}}
        steps = inspect.signature(stock_call).parameters.get("num_inference_steps")
        arguments.update(_callbacks(passes, request, window, arguments, steps.default if steps is not None else 0))
        try:
            with passes:
                output = stock_call(**arguments)
        finally:
            # a second time, in case Ctrl-C interrupted `stop` at the end of the `with` block
            passes.stop()
            # otherwise the pipeline would keep the encoder and the keys and values in memory until its next call
            if (getattr(self, "_cross_attention_kwargs", None) or {}).get(unet_hooks.SUBJECT) is passes:
                self._cross_attention_kwargs = attention_kwargs or None
        if passes.count == 0:
            raise ValueError(
                f"{type(self).__name__} drew without its subject: no forward pass of the UNet was given"
                f" `cross_attention_kwargs`. Something is between the pipeline and `unet` ({type(self.unet).__name__})."
            )
        return output

    def set_ssr_scale(self, scale: float | dict) -> None:
        r"""
        Sets the scale of subjects in calls without `subject_scale`. Subjects that have their own scale
        (`SubjectEmbeds.scaled`) keep it.

        Args:
            scale (`float` or `dict`):
                How strongly subjects affect the result. 0 disables them, and usual values are 0.5 to 0.8. A dict sets
                the scale per block, in the format of `set_ip_adapter_scale`. Blocks that are not in the dict get 0.

        Raises:
            `ValueError`: if `scale` is not a number or a dict of numbers, or if it has blocks that do not attend to
                subjects.

        Example:

        ```py
        >>> pipe.set_ssr_scale(0.8)
        >>> pipe.set_ssr_scale({"down": 0.4, "up": {"block_1": [0.8, 0.8, 0.6]}})
        ```
        """
        self._layer_scales("scale", scale)
        self._ssr_scale = copy.deepcopy(scale)

    def _layer_scales(self, name: str, scale) -> float | dict[str, float]:
        """Returns a scale as one number for all layers, or as a dict with one number for each of
        `config.attention_layers`."""
        if isinstance(scale, (list, tuple)):
            raise ValueError(
                f"`{name}` has to be a number or a dict, but is a {type(scale).__name__}: for a scale of each subject, pass"
                " `subject=[cat.scaled(0.5), dog.scaled(0.8)]`."
            )
        if not isinstance(scale, dict):
            return subject_embeds.check_scale(name, scale)
        if self.ssr_encoder is None:
            raise ValueError(f"`{name}` names blocks, but there is no SSR-Encoder yet: call `load_ssr` first.")
        layers = self.ssr_encoder.config.attention_layers
        checks_ssr.check_block_scales(name, scale, layers)
        expanded = library_internals.expand_block_scales(unet_hooks.find_unet(self.unet), scale)
        return {
            layer: float(next((s for block, s in expanded.items() if layer.startswith(block)), 0.0))
            for layer in layers
        }

    def _loaded_encoder(self) -> modeling_ssr.SSREncoder:
        """Returns the SSR-Encoder. Raises a `ValueError` if the pipeline's components cannot generate a subject.
        Components that are only needed to encode a reference picture may be absent."""
        encoder = self.ssr_encoder
        if encoder is None:
            raise ValueError("There is no SSR-Encoder in this pipeline yet: call `load_ssr` before drawing a subject.")
        checks_ssr.check_fits(self.unet, encoder, self.ssr_image_encoder, self.text_encoder)
        checks_ssr.check_precision(self.text_encoder, self.unet)
        checks_ssr.check_controlnet(getattr(self, "controlnet", None), encoder)
        return encoder

    def _check_encoded_by(self, encoder: modeling_ssr.SSREncoder) -> Callable[[subject_embeds.SubjectEmbeds], None]:
        """Returns a function that checks whether a [`SubjectEmbeds`] was encoded by an SSR-Encoder. The encoder's
        fingerprint is only computed if it is needed."""
        fingerprint = functools.cache(lambda: encoder.fingerprint(self._execution_device))

        def check(subject: subject_embeds.SubjectEmbeds) -> None:
            known = subject.fingerprint is not None
            width = subject.subjects[0].embeds.shape[-1]
            if width != encoder.config.cross_attention_dim or (
                known and not subject_embeds.same_fingerprint(subject.fingerprint, fingerprint())
            ):
                raise ValueError(
                    "`subject` was encoded by another SSR-Encoder than this pipeline's: encode its picture again."
                )

        return check


# the names and default values of the arguments that this class adds to those of the stock call
_OWN_ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SSRPipelineMixin.__call__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def _by_name(call: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Returns the arguments of a call by name, those that it takes as `**kwargs` included."""
    signature = inspect.signature(call)
    arguments = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and arguments.pop(name, ()):
            # the prompts are among them, and their number is needed
            raise ValueError(
                f"The call of this pipeline takes `*{name}`, so with a subject its arguments have to be passed by name:"
                " `prompt=...`."
            )
    return arguments


def _num_prompts(arguments: dict) -> int:
    prompt, prompt_embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    return len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)


def _num_frames(parameters, arguments: dict) -> int:
    """Returns the number of frames that a call generates. It is 1 for pictures."""
    latents: Any = arguments.get("latents")
    if getattr(latents, "ndim", 0) == 5:
        return latents.shape[2]  # a call that gets the latents of a video draws their frames
    if "num_frames" in parameters:
        return arguments.get("num_frames", parameters["num_frames"].default)
    videos = (arguments.get(name) for name in ("video", "conditioning_frames"))
    return next((_length(video) for video in videos if video is not None), 1)


def _length(video) -> int:
    """Returns the number of frames of a video in one of the formats of `VideoProcessor.preprocess_video`: frames, or a
    batch of videos."""
    if isinstance(video, list) and video:
        first = video[0]
        is_frame = isinstance(first, Image.Image) or getattr(first, "ndim", 0) in (2, 3)
        return len(video) if is_frame else _length(first)
    if getattr(video, "ndim", 0) == 5:
        return video.shape[1]
    return len(video) if getattr(video, "ndim", 0) == 4 else 1


def _text_arguments(arguments: dict) -> dict:
    """Returns the arguments that the call passes to `encode_prompt` for its prompts. They are used for queries too."""
    lora_scale = (arguments.get("cross_attention_kwargs") or {}).get("scale")
    return {"lora_scale": lora_scale, "clip_skip": arguments.get("clip_skip")}


def _branches(pipeline) -> list[tuple[bool, ...]]:
    """Returns the possible branches of guidance in the order of the UNet's batch, `True` for a conditional branch. The
    list has one element if the pipeline says whether guidance is on. A callback may switch it off or on."""
    guided: tuple[bool, ...] = (False, True)
    unguided: tuple[bool, ...] = (True,)
    if isinstance(pipeline, StableDiffusionInstructPix2PixPipeline):
        guided = (True, False, False)
    elif getattr(pipeline, "do_perturbed_attention_guidance", False):
        guided, unguided = (False, True, True), (True, True)
    is_guided = getattr(pipeline, "do_classifier_free_guidance", None)
    return [unguided, guided] if is_guided is None else [guided if is_guided else unguided]


def _callbacks(
    passes: unet_hooks.SubjectPasses,
    request: subject_request.SubjectRequest,
    window,
    arguments: dict,
    default_steps: int,
) -> dict:
    """Returns the callback arguments of the stock call: the user's callbacks, during which the UNet is stock, and a
    callback that disables the subject outside its window."""
    changed: dict[str, Any] = {}
    if arguments.get("callback") is not None:  # deprecated in most pipelines, the only one in some
        changed["callback"] = _while_paused(passes, arguments["callback"])
    callback = arguments.get("callback_on_step_end")
    if callback is None and window is None:
        return changed
    start, end = window or (0.0, 1.0)
    request.active = start == 0
    num_inference_steps = arguments.get("num_inference_steps", default_steps)

    def on_step_end(pipeline, step, timestep, callback_kwargs):
        # FreeInit with fast sampling denoises with fewer steps first; the last time has all steps
        if step == 0 and not (
            getattr(pipeline, "_free_init_use_fast_sampling", False) and pipeline.num_timesteps < num_inference_steps
        ):
            checks_ssr.check_window_has_steps(start, end, pipeline.num_timesteps)
        if callback is not None:
            callback_kwargs = _while_paused(passes, callback)(pipeline, step, timestep, callback_kwargs)
            _follow(pipeline, passes)
        # FreeInit denoises several times, so that the last step is followed by the first step
        following = (step + 1) % pipeline.num_timesteps
        request.active = start * pipeline.num_timesteps <= following < end * pipeline.num_timesteps
        return callback_kwargs

    changed["callback_on_step_end"] = on_step_end
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        changed["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
    return changed


def _while_paused(passes: unet_hooks.SubjectPasses, callback: Callable) -> Callable:
    def paused(*args, **kwargs):
        with passes.paused():
            return callback(*args, **kwargs)

    return paused


def _follow(pipeline, passes: unet_hooks.SubjectPasses) -> None:
    """Handles changes that a callback made to the pipeline's UNet, its ControlNet or its `cross_attention_kwargs`."""
    if pipeline.unet is not passes.wrapped_unet:
        checks_ssr.check_fits_unet(pipeline.unet, pipeline.ssr_encoder)
        with passes.paused():
            passes.watch(pipeline.unet)
    if passes.controlnet is not None and pipeline.controlnet is not passes.controlnet:
        checks_ssr.check_controlnet(pipeline.controlnet, pipeline.ssr_encoder)
        with passes.paused():
            passes.watch_controlnet(pipeline.controlnet, passes.tokens)
    attention_kwargs = getattr(pipeline, "_cross_attention_kwargs", None) or {}
    if hasattr(pipeline, "_cross_attention_kwargs") and attention_kwargs.get(unet_hooks.SUBJECT) is not passes:
        pipeline._cross_attention_kwargs = {**attention_kwargs, unet_hooks.SUBJECT: passes}


def _stock_class_of(pipeline_class: type) -> type:
    """Returns the class of diffusers, or the user-defined class, to which the mixin was added."""
    return next(
        each
        for each in pipeline_class.__mro__
        if not issubclass(each, SSRPipelineMixin) and each not in SSRPipelineMixin.__mro__
    )


def _with_own_tokenizer(encode_prompt: Callable) -> Callable:
    @functools.wraps(encode_prompt)
    def method(self, *args, **kwargs):
        return shared_components.with_own_tokenizer(self, lambda pipeline: encode_prompt(pipeline, *args, **kwargs))

    return method


def _with_signature(ours: Callable, stock: Callable) -> Callable:
    """Returns the method `ours`, which takes the stock method's arguments as `*args, **kwargs`, with a signature that
    has all arguments."""

    @functools.wraps(ours)
    def method(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(stock).parameters.values())
    added = [p for p in inspect.signature(ours).parameters.values() if p.kind not in variadic and p.name != "self"]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [p for p in parameters if p.kind not in variadic] + added + rest
    # `inspect.signature` reads this attribute, and diffusers uses `inspect.signature`
    vars(method)["__signature__"] = inspect.Signature(parameters)
    method.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not inspect.Parameter.empty}
    return method
