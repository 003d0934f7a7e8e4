"""The mixin class of all SSR pipelines: its components and its `__call__`."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from transformers import CLIPImageProcessor, PreTrainedModel

from . import (
    arguments_ssr,
    components_ssr,
    encoding_ssr,
    hooks_ssr,
    internals_ssr,
    loading_ssr,
    request_ssr,
    subject_embeds_ssr,
)


def _in_own_pipeline(call: Callable) -> Callable:
    """Decorator of a pipeline's `__call__`. The call runs on a copy of the pipeline if the pipeline is already in a
    call."""

    @functools.wraps(call)
    def method(self, *args, **kwargs):
        with components_ssr.own_pipeline(self) as pipeline:
            return call(pipeline, *args, **kwargs)

    return method


class SSRPipelineMixin(loading_ssr.SSRLoaderMixin, encoding_ssr.SubjectEncodingMixin):
    r"""
    Adds SSR-Encoder to a Stable Diffusion 1.5 pipeline of diffusers. With
    `class MyPipeline(SSRPipelineMixin, StockPipeline)`, the new class has the arguments and components of the stock
    pipeline and those documented here. docs/how_it_works.md describes how the modules process an image and a query.

    The weights are in the `ssr_encoder` component and are never copied into the UNet. The subject's keys and values are
    projected once per call, and forward hooks add the attention to them. The hooks are in the UNet during a call with a
    subject, and act only in the forward passes of this call. In the call's callbacks, in other threads, between calls
    and after an error, the UNet is stock. Any number of threads, SSR pipelines and stock pipelines can use one UNet at
    the same time.
    """

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
        # the methods that use the tokenizer: those of the class, and below those of the stock class
        stock: Any = super()
        tokenizing = {name: vars(cls).get(name) for name in ("encode_prompt", "_encode_prompt")}
        is_first = not any(
            issubclass(base, SSRPipelineMixin) for base in cls.__bases__ if base is not SSRPipelineMixin
        )
        for name, method in tokenizing.items():
            method = getattr(stock, name, None) if method is None and is_first else method
            if inspect.isfunction(method):
                setattr(cls, name, _with_tokenizer_lock(method))
        if not is_first:
            return  # the class inherits all of the following
        # diffusers reads a class's components and arguments from its signatures. With only `*args, **kwargs`,
        # `from_pretrained` and `from_pipe` would load no component, so each class gets a signature with all names.
        for name in ("__init__", "__call__"):
            if name not in vars(cls):
                setattr(cls, name, _with_signature(getattr(cls, name), getattr(super(), name)))
        internals_ssr.register_auto_pipeline(cls, _stock_class_of(cls))
        cls._optional_components = [*stock._optional_components, *components_ssr.COMPONENTS]
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
        subject: subject_embeds_ssr.SubjectEmbeds | dict | list | None = None,
        negative_subject: subject_embeds_ssr.SubjectEmbeds | list | None = None,
        subject_start: float = 0.0,
        subject_end: float = 1.0,
        subject_resize_mode: str = "pad",
        subject_in_controlnet: bool = False,
        **kwargs,
    ):
        r"""
        Generates images or videos like the stock pipeline, with subjects from reference images. It accepts all
        arguments of the stock pipeline. Without a subject, the stock call runs unchanged. If the pipeline or its
        scheduler is in a call already, the call runs on a shallow copy of the pipeline with its own scheduler.

        `subject_image`, `subject_query` and `subject_mask` can be lists. With a list of prompts, they have one element
        for each prompt. With a single prompt, they are several subjects that appear together in the generated image. A
        list of images inside of the list, `[[a, b, c]]`, shows one subject.

        Args:
            subject_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*):
                The reference image. It may contain several objects. Arrays have the shape `(height, width, 3)`, in
                uint8 or as floats from 0 to 1. Tensors have the shape `(3, height, width)`, with values from 0 to 1.
            subject_query (`str` or `list[str]`, *optional*):
                A text that names the subject in the image, for example "cat" or "the woman on the left". With a
                mask, the query is optional; the authors used a caption of the whole image.
            subject_mask (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `tuple` or `list`, *optional*):
                A mask of the subject in the reference image, of shape `(height, width)` and the size of the image:
                white, or 1, where the subject is. Or a box, `(left, top, right, bottom)` in fractions from 0 to 1.
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
            negative_subject ([`SubjectEmbeds`] or `list`, *optional*):
                A subject that is not wanted, for all prompts or one for each. It is in the unconditional branch of
                guidance, in place of the empty subject, with its own scale and region. `subject` can be left out.
            subject_start (`float`, defaults to 0.0), subject_end (`float`, defaults to 1.0):
                The part of the denoising process in which the subject is used, as fractions of the steps. Early steps
                determine layout and colors, late steps determine details.
            subject_resize_mode (`str`, defaults to `"pad"`):
                `"pad"` passes the whole reference image to the encoder. `"crop"` passes the central square, as the
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
        # 1. parse: read the arguments, and check those that need no model
        stock_call = super().__call__
        own = {
            "subject_image": subject_image,
            "subject_query": subject_query,
            "subject_mask": subject_mask,
            "mask_weight": mask_weight,
            "subject_scale": subject_scale,
            "subject": subject,
            "negative_subject": negative_subject,
            "subject_start": subject_start,
            "subject_end": subject_end,
            "subject_resize_mode": subject_resize_mode,
            "subject_in_controlnet": subject_in_controlnet,
        }
        if not arguments_ssr.check_own_arguments(own, _OWN_ARGUMENTS, kwargs, stock_call):
            return stock_call(*args, **kwargs)
        arguments = arguments_ssr.arguments_by_name(stock_call, args, kwargs)
        window = arguments_ssr.parse_window(subject_start, subject_end, stock_call)
        encoder = self._loaded_encoder()
        components_ssr.check_precision(self.text_encoder, self.unet)
        scale = self._layer_scales("subject_scale", self._ssr_scale if subject_scale is None else subject_scale)

        # 2. rows: the subjects of each prompt
        num_prompts = arguments_ssr.num_prompts(arguments)
        num_frames = arguments_ssr.num_frames(stock_call, arguments)
        if any(own[name] is not None for name in _REFERENCE):
            own["subject"] = self._encode_for_prompts(own, arguments, num_prompts)
        rows = arguments_ssr.parse_subjects([None] if own["subject"] is None else own["subject"], num_prompts)
        negative_rows = arguments_ssr.parse_negative_subject(negative_subject, num_prompts, list(rows[0]))
        all_rows = rows + (negative_rows or [])
        self._check_encoded_by(encoder, all_rows)
        arguments_ssr.check_rows(all_rows, num_frames, own, arguments, self)
        rows = [arguments_ssr.without_disabled_subjects(row, scale) for row in rows]
        if negative_rows is not None:
            negative_rows = [arguments_ssr.without_disabled_subjects(row, scale) for row in negative_rows]
        if not arguments_ssr.has_effect(all_rows, scale):
            return stock_call(**arguments)

        # 3. generate
        num_images = num_prompts * (arguments.get("num_images_per_prompt") or 1)
        dtype, branches = hooks_ssr.find_unet(self.unet).dtype, functools.partial(_branches, self)
        request = request_ssr.SubjectRequest(
            rows, num_images, encoder, dtype, scale, branches, num_frames, negative_rows
        )
        return self._generate(stock_call, arguments, request, window, subject_in_controlnet)

    def _encode_for_prompts(self, own: dict, arguments: dict, num_prompts: int):
        """Encodes the reference images of a call. Returns one subject for each prompt of a list, or the subjects that
        appear together for a single prompt."""
        references = encoding_ssr.parse_references(*(own[name] for name in _REFERENCE))
        text = arguments_ssr.text_arguments(arguments)
        encoded: Any = self._encode_references(references, own["mask_weight"], own["subject_resize_mode"], text)
        if num_prompts > 1 or isinstance(arguments.get("prompt"), list):
            return arguments_ssr.check_one_for_each(
                ", ".join(f"`{name}`" for name in _REFERENCE), encoded, num_prompts
            )
        return sum(encoded)

    def _generate(
        self, stock_call: Callable, arguments: dict, request: request_ssr.SubjectRequest, window, in_controlnet: bool
    ):
        """Runs the stock call, with the subject in the UNet's forward passes."""
        with contextlib.ExitStack() as stack:
            models: list[Any] = [None, None]

            def follow(pipeline) -> None:
                """Adds the subject to the UNet and the ControlNet, again if a callback replaced them."""
                controlnet = pipeline.controlnet if in_controlnet else None
                if models[0] is pipeline.unet and models[1] is controlnet:
                    return
                if models[0] is not None:
                    components_ssr.check_fits_unet(pipeline.unet, request.encoder)
                models[:] = pipeline.unet, controlnet
                request.dtype = hooks_ssr.find_unet(pipeline.unet).dtype
                stack.enter_context(
                    hooks_ssr.subject_in_unet(pipeline.unet, request.encoder, request, controlnet=controlnet)
                )

            follow(self)
            output = stock_call(**{**arguments, **_callbacks(follow, request, window, stock_call, arguments)})
        if request.passes == 0:
            raise ValueError(
                f"{type(self).__name__} generated without its subject: the call did not run `unet`"
                f" ({type(self.unet).__name__}) in its own thread."
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
        """Returns a scale as one number for all layers, or as a dict with one number for each layer."""
        if isinstance(scale, (list, tuple)):
            raise ValueError(
                f"`{name}` has to be a number or a dict, but is a {type(scale).__name__}: for a scale of each subject, pass"
                " `subject=[cat.scaled(0.5), dog.scaled(0.8)]`."
            )
        if not isinstance(scale, dict):
            return internals_ssr.check_scale(name, scale)
        if self.ssr_encoder is None:
            raise ValueError(
                f"`{name}` has scales for blocks, but there is no SSR-Encoder yet: call `load_ssr` first."
            )
        layers = self.ssr_encoder.config.attention_layers
        arguments_ssr.check_block_scales(name, scale, layers)
        expanded = internals_ssr.expand_block_scales(hooks_ssr.find_unet(self.unet), scale)
        return {
            layer: float(next((s for block, s in expanded.items() if layer.startswith(block)), 0.0))
            for layer in layers
        }

    def _check_encoded_by(self, encoder, rows: list[request_ssr.Row]) -> None:
        """Raises a `ValueError` if a subject was encoded by another SSR-Encoder."""
        fingerprint = functools.cache(lambda: encoder.fingerprint(self._execution_device))
        for subject in (subject for row in rows for subject in row.values() if subject is not None):
            width = subject.subjects[0].embeds.shape[-1]
            if width != encoder.config.cross_attention_dim or (
                subject.fingerprint is not None
                and not subject_embeds_ssr.same_fingerprint(subject.fingerprint, fingerprint())
            ):
                raise ValueError(
                    "`subject` was encoded by another SSR-Encoder than this pipeline's: encode its image again."
                )


# the arguments of a call that `encode_subject` takes
_REFERENCE = ("subject_image", "subject_query", "subject_mask")

# the names and default values of the arguments that this class adds to those of the stock call
_OWN_ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SSRPipelineMixin.__call__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


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
    follow: Callable, request: request_ssr.SubjectRequest, window, stock_call: Callable, arguments: dict
) -> dict:
    """Returns the callback arguments of the stock call: the user's callbacks, during which the UNet is stock, and a
    callback that disables the subject outside its window."""
    changed: dict[str, Any] = {}
    if arguments.get("callback") is not None:  # deprecated in most pipelines, the only one in some
        changed["callback"] = _marked(request, arguments["callback"])
    callback = arguments.get("callback_on_step_end")
    if callback is None and window is None:
        return changed
    start, end = window or (0.0, 1.0)
    request.active = start == 0
    steps = inspect.signature(stock_call).parameters.get("num_inference_steps")
    num_inference_steps = arguments.get("num_inference_steps", 0 if steps is None else steps.default)

    def on_step_end(pipeline, step, timestep, callback_kwargs):
        num_steps = pipeline.num_timesteps
        # FreeInit with fast sampling denoises with fewer steps first; the last time has all steps
        partial = getattr(pipeline, "_free_init_use_fast_sampling", False) and num_steps < num_inference_steps
        if step == 0 and not partial and not any(start * num_steps <= s < end * num_steps for s in range(num_steps)):
            raise ValueError(
                f"`subject_start` = {start} and `subject_end` = {end} are between two steps, so that the subject would"
                f" not be used: {num_steps} steps begin at multiples of {1 / num_steps:.3g}."
            )
        if callback is not None:
            callback_kwargs = _marked(request, callback)(pipeline, step, timestep, callback_kwargs)
            follow(pipeline)
        # FreeInit denoises several times, so that the last step is followed by the first step
        request.active = start * num_steps <= (step + 1) % num_steps < end * num_steps
        return callback_kwargs

    changed["callback_on_step_end"] = on_step_end
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        changed["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
    return changed


def _marked(request: request_ssr.SubjectRequest, callback: Callable) -> Callable:
    """Returns the callback, during which the UNet is stock."""

    def marked(*args, **kwargs):
        request.in_callback = True
        try:
            return callback(*args, **kwargs)
        finally:
            request.in_callback = False

    return marked


def _stock_class_of(pipeline_class: type) -> type:
    """Returns the class of diffusers, or the user-defined class, to which the mixin was added."""
    bases = (base for base in pipeline_class.__mro__ if not issubclass(base, SSRPipelineMixin))
    return next(base for base in bases if base not in SSRPipelineMixin.__mro__)


def _with_tokenizer_lock(encode_prompt: Callable) -> Callable:
    @functools.wraps(encode_prompt)
    def method(self, *args, **kwargs):
        has_none = self.tokenizer is None
        with contextlib.nullcontext() if has_none else components_ssr.tokenizer_lock(self.tokenizer):
            return encode_prompt(self, *args, **kwargs)

    return method


def _with_signature(ours: Callable, stock: Callable) -> Callable:
    """Returns the method `ours`, which takes the stock method's arguments as `*args, **kwargs`, with a signature that
    has all arguments."""

    @functools.wraps(ours)
    def method(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:  # annotations that are texts are evaluated, because the names in them are not those of this module
        signature = inspect.signature(stock, eval_str=True)
    except NameError:
        signature = inspect.signature(stock)
    parameters = list(signature.parameters.values())
    added = [p for p in inspect.signature(ours).parameters.values() if p.kind not in variadic and p.name != "self"]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [p for p in parameters if p.kind not in variadic] + added + rest
    # `inspect.signature` reads this attribute, and diffusers uses `inspect.signature`
    vars(method)["__signature__"] = inspect.Signature(parameters)
    method.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not inspect.Parameter.empty}
    return method
