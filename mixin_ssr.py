"""What every SSR pipeline shares: loading, encoding subjects, and how a subject reaches the UNet."""

import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from huggingface_hub.utils import EntryNotFoundError, validate_hf_hub_args
from transformers import CLIPImageProcessor, CLIPVisionModel, PreTrainedModel

from .attention_processors import subject_in_unet, unwrap
from .image_processing_ssr import preprocess, to_pil
from .modeling_ssr import SSREncoder
from .subject_embeds import SubjectEmbeds, check_scale


logger = logging.get_logger(__name__)

COMPONENTS = ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor")
DEFAULT_SCALE = 0.65


class SSRPipelineMixin:
    r"""
    Adds SSR-Encoder to a Stable Diffusion 1.5 pipeline of diffusers: `class MyPipeline(SSRPipelineMixin, StockPipeline)`
    has the stock pipeline's arguments and components and, beside them, those documented here.

    **When the subject is in the UNet.** The weights live in the `ssr_encoder` component, never in the UNet. The
    processors and the projection that carry a subject are put into the UNet for one call and taken out after it, also
    when the call raises, so that a UNet can be shared with any other pipeline, saved, converted or given an IP-Adapter at
    any time, and a pipeline without a subject runs the stock code. The price is a lock: calls with a subject on one UNet
    run one after the other. The processor objects are kept from call to call, so that compiled code stays valid. (Left in
    the UNet for good, they would meet `load_ip_adapter`, `from_unet2d` and `save_pretrained`; in a view that shares
    parameters but not modules, a LoRA loaded later would be missing.)

    **How it gets there.** The subject's keys and values, projected once a call with the scale contained in the values,
    travel as the arguments of the call: as image embeddings behind those of an IP-Adapter, the one road that guidance,
    PAG and AnimateDiff all know. `prepare_ip_adapter_image_embeds` is where they get on.
    """

    _ssr_scale = DEFAULT_SCALE

    def __init__(
        self,
        *args,
        ssr_encoder: ModelMixin = None,
        ssr_image_encoder: PreTrainedModel = None,
        ssr_image_processor: CLIPImageProcessor = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.register_modules(
            ssr_encoder=ssr_encoder, ssr_image_encoder=ssr_image_encoder, ssr_image_processor=ssr_image_processor
        )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # diffusers reads components and arguments off the signatures, so each class needs its own, with all names
        for name in ("__init__", "__call__"):
            if name not in vars(cls):
                setattr(cls, name, _with_signature(getattr(cls, name), getattr(super(), name)))
        stock = super()
        cls._optional_components = [*stock._optional_components, *COMPONENTS]
        cls.model_cpu_offload_seq = stock.model_cpu_offload_seq.replace("unet", "ssr_image_encoder->ssr_encoder->unet")

    def __call__(
        self,
        *args,
        subject_image=None,
        subject_query: str | None = None,
        subject_scale: float | None = None,
        subject: SubjectEmbeds | list[SubjectEmbeds | None] | None = None,
        **kwargs,
    ):
        r"""
        Generate as the stock pipeline does, with a subject picked out of a reference picture. All arguments of the stock
        pipeline are accepted; without a subject its very own call runs.

        Args:
            subject_image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*):
                The reference picture, which may hold several things. Arrays are `(height, width, 3)` in uint8 or floats
                from 0 to 1, tensors `(3, height, width)` from 0 to 1.
            subject_query (`str`, *optional*):
                Which of them is meant: "cat", "the woman on the left".
            subject_scale (`float`, *optional*):
                How strongly the subject acts: 0 not at all, 0.5 to 0.8 usually, more keeps the subject closer and the
                prompt less. Defaults to the scale of `set_ssr_scale`, 0.65 at first.
            subject ([`SubjectEmbeds`] or `list`, *optional*):
                A subject from `encode_subject`, instead of `subject_image` and `subject_query`: one for all prompts, or a
                list with one for each, `None` for a prompt without a subject.

        Returns:
            What the stock pipeline returns.

        Raises:
            `ValueError`: if the subject's arguments do not fit together or are not what they should be, before any step.

        Example:

        ```py
        >>> image = pipe("a cat on the beach", subject_image=photo, subject_query="cat").images[0]
        ```
        """
        stock_call = super().__call__
        if subject is None and subject_image is None and subject_query is None:
            if subject_scale is not None:
                raise ValueError(f"`subject_scale` is {subject_scale!r}, but there is no subject to scale.")
            return stock_call(*args, **kwargs)

        self._check_ssr_loaded()
        scale = self._ssr_scale if subject_scale is None else check_scale("subject_scale", subject_scale)
        if subject is None:
            subject = self.encode_subject(subject_image, subject_query)
        elif subject_image is not None or subject_query is not None:
            raise ValueError("Pass either `subject`, or `subject_image` and `subject_query`, but not both.")
        arguments = inspect.signature(stock_call).bind_partial(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        ip_adapter_image = arguments.pop("ip_adapter_image", None)
        ip_adapter_image_embeds = arguments.pop("ip_adapter_image_embeds", None)
        if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
            raise ValueError("Pass either `ip_adapter_image` or `ip_adapter_image_embeds`, but not both.")
        subjects = _check_subjects(subject, arguments.get("prompt"), arguments.get("prompt_embeds"))
        request = _Request(subjects, scale, ip_adapter_image, ip_adapter_image_embeds)
        with subject_in_unet(self.unet, list(self.ssr_encoder.config.attention_layers)):
            return stock_call(**arguments, ip_adapter_image=request)

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
    ):
        """The stock method, and behind what it returns the subject's keys and values, one after the other, each of shape
        `(batch_size, num_subject_tokens, width)`, the unconditional branch first."""
        if not isinstance(ip_adapter_image, _Request):
            return super().prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
            )
        request = ip_adapter_image
        prepared = []
        if request.ip_adapter_image is not None or request.ip_adapter_image_embeds is not None:
            prepared = super().prepare_ip_adapter_image_embeds(
                request.ip_adapter_image,
                request.ip_adapter_image_embeds,
                device,
                num_images_per_prompt,
                do_classifier_free_guidance,
            )
        subject_embeds, scales = self._batch_subjects(request, do_classifier_free_guidance)
        subject_embeds = subject_embeds.to(device, self.ssr_encoder.dtype)
        scales = scales.to(device)[:, None, None]
        repeats = num_images_per_prompt // len(request.subjects)
        for key, value in self.ssr_encoder.project(subject_embeds):
            for states in (key, value * scales):
                prepared.append(states.to(self.unet.dtype).repeat_interleave(repeats, dim=0))
        return prepared

    @staticmethod
    def _batch_subjects(request: "_Request", do_classifier_free_guidance: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The request's subject tokens, `(batch_size, num_subject_tokens, cross_attention_dim)`, the unconditional
        branch first, and the scale of each. A prompt without a subject gets scale 0: its values vanish, and so does
        what they add."""
        example = next(subject for subject in request.subjects if subject is not None)
        embeds, negative_embeds, scales = [], [], []
        for subject in request.subjects:
            embeds.append((subject or example).embeds)
            negative_embeds.append((subject or example).negative_embeds)
            if subject is None:
                scales.append(0.0)
            else:
                scales.append(request.scale if subject.scale is None else subject.scale)
        if do_classifier_free_guidance:
            embeds, scales = negative_embeds + embeds, scales * 2
        return torch.cat(embeds), torch.tensor(scales)

    @torch.no_grad()
    def encode_subject(self, image, query: str) -> SubjectEmbeds:
        r"""
        Pick a subject out of a picture.

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                The reference picture. Its shorter edge is scaled to the vision encoder's size and the centre is cropped.
            query (`str`):
                Which thing in it is meant. It goes through the pipeline's own text encoder, like a prompt.

        Returns:
            [`SubjectEmbeds`], for the `subject` argument of any pipeline with the same SSR-Encoder.

        Raises:
            `ValueError`: if no SSR-Encoder is loaded, `image` is not a picture, or `query` is not a text or is empty.

        Example:

        ```py
        >>> subject = pipe.encode_subject(photo, query="cat")
        >>> image = pipe("a cat on the beach", subject=subject).images[0]
        ```
        """
        self._check_ssr_loaded()
        if image is None:
            raise ValueError(
                f"`subject_query` is {query!r}, but `subject_image` is missing: a query needs its picture."
            )
        if query is None:
            raise ValueError(
                "`subject_image` is given, but `subject_query` is missing: say which thing in it is meant."
            )
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"`subject_query` has to be a text that names the subject, but is {query!r}.")
        pixels = preprocess(to_pil(image), self.ssr_image_processor)

        device = self._execution_device
        vision = self.ssr_image_encoder
        # the unconditional branch sees the empty query on zeros after normalisation (section 3.3)
        pixels = torch.cat([torch.zeros_like(pixels), pixels]).to(device, vision.dtype)
        hidden_states = vision(pixels, output_hidden_states=True).hidden_states
        levels = torch.stack([hidden_states[level] for level in self.ssr_encoder.config.image_levels])
        query_hidden_states, _ = self.encode_prompt(["", query], device, 1, False)
        dtype = self.ssr_encoder.dtype
        negative_embeds, embeds = self.ssr_encoder(query_hidden_states.to(dtype), levels.to(dtype)).chunk(2)
        return SubjectEmbeds(embeds, negative_embeds)

    @validate_hf_hub_args
    def load_ssr(
        self,
        pretrained_model_name_or_path: str | os.PathLike | SSREncoder,
        subfolder: str = "ssr_encoder",
        image_encoder: PreTrainedModel | None = None,
        image_encoder_folder: str = "ssr_image_encoder",
        image_processor: CLIPImageProcessor | None = None,
        image_processor_folder: str = "ssr_image_processor",
        **kwargs,
    ) -> None:
        r"""
        Load an SSR-Encoder and the vision encoder it was trained on into the pipeline.

        Args:
            pretrained_model_name_or_path (`str`, `os.PathLike` or [`SSREncoder`]):
                A repository on the Hub, a folder, or an encoder that is already in memory.
            subfolder (`str`, defaults to `"ssr_encoder"`):
                Where in it the SSR-Encoder lies.
            image_encoder (`CLIPVisionModel` or `CLIPVisionModelWithProjection`, *optional*):
                A vision encoder already in memory; otherwise it is loaded.
            image_encoder_folder (`str`, defaults to `"ssr_image_encoder"`):
                Where the vision encoder lies.
            image_processor (`CLIPImageProcessor`, *optional*):
                The vision encoder's sizes and normalisation. Where it is neither given nor in the repository, it is made
                from the vision encoder's config.
            image_processor_folder (`str`, defaults to `"ssr_image_processor"`):
                Where it lies.
            **kwargs:
                `cache_dir`, `force_download`, `local_files_only`, `proxies`, `revision`, `token` and `variant`, as
                `from_pretrained` takes them.

        Raises:
            `ValueError`: if the encoder does not fit the UNet, the text encoder or the vision encoder.

        Example:

        ```py
        >>> pipe.load_ssr("<owner>/<repo>")
        ```
        """
        if isinstance(pretrained_model_name_or_path, ModelMixin):
            encoder = pretrained_model_name_or_path
            if image_encoder is None:
                raise ValueError("`image_encoder` has to be given with an SSREncoder that is already in memory.")
        else:
            encoder = SSREncoder.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            if image_encoder is None:
                image_encoder = CLIPVisionModel.from_pretrained(
                    pretrained_model_name_or_path, subfolder=image_encoder_folder, **kwargs
                )
            if image_processor is None:
                image_processor = _load_image_processor(pretrained_model_name_or_path, image_processor_folder, kwargs)
        self._check_ssr_fits(encoder, image_encoder)
        modules = {
            "ssr_encoder": encoder.eval(),
            "ssr_image_encoder": image_encoder.eval(),
            "ssr_image_processor": image_processor or _image_processor_for(image_encoder),
        }
        for name in ("ssr_encoder", "ssr_image_encoder"):
            modules[name].to(device=self.unet.device, dtype=self.unet.dtype)
        self.register_modules(**modules)

    def unload_ssr(self) -> None:
        r"""
        Take the SSR-Encoder and its vision encoder out of the pipeline, which then is the stock pipeline.

        Example:

        ```py
        >>> pipe.unload_ssr()
        ```
        """
        self.register_modules(**dict.fromkeys(COMPONENTS))
        self._ssr_scale = DEFAULT_SCALE

    def set_ssr_scale(self, scale: float) -> None:
        r"""
        Set how strongly subjects act in calls that do not say it themselves.

        Args:
            scale (`float`):
                0 not at all, 0.5 to 0.8 usually.

        Raises:
            `ValueError`: if `scale` is not a number.

        Example:

        ```py
        >>> pipe.set_ssr_scale(0.8)
        ```
        """
        self._ssr_scale = check_scale("scale", scale)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        r"""
        Save the whole pipeline, its code included, so that `DiffusionPipeline.from_pretrained(save_directory,
        trust_remote_code=True)` loads it anywhere. Arguments are those of `DiffusionPipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        entry = Path(inspect.getfile(type(self)))
        for file in {entry, *map(Path, get_relative_import_files(entry))}:
            _copy_code(file, folder)
        model_index = folder / self.config_name
        config = json.loads(model_index.read_text())
        config["_class_name"] = [entry.stem, type(self).__name__]
        if self.ssr_encoder is not None:
            code = Path(inspect.getfile(type(self.ssr_encoder)))
            _copy_code(code, folder / "ssr_encoder")
            config["ssr_encoder"] = [code.stem, type(self.ssr_encoder).__name__]
        model_index.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        r"""
        Make this pipeline from another one's components, its SSR-Encoder included. Arguments are those of
        `DiffusionPipeline.from_pipe`.

        Example:

        ```py
        >>> pipe = StableDiffusionSSRPipeline.from_pipe(stock_pipe)
        ```
        """
        ours = {name: getattr(pipeline, name) for name in COMPONENTS if getattr(pipeline, name, None) is not None}
        return super().from_pipe(pipeline, **{**ours, **kwargs})

    def _check_ssr_loaded(self):
        if self.ssr_encoder is None or self.ssr_image_encoder is None:
            raise ValueError("There is no SSR-Encoder in this pipeline yet: call `load_ssr` before drawing a subject.")
        if self.ssr_image_processor is None:
            self.register_modules(ssr_image_processor=_image_processor_for(self.ssr_image_encoder))
        self._check_ssr_fits(self.ssr_encoder, self.ssr_image_encoder)

    def _check_ssr_fits(self, encoder, image_encoder):
        config = encoder.config
        text_width = self.text_encoder.config.hidden_size
        if text_width != config.cross_attention_dim:
            raise ValueError(
                f"`ssr_encoder` was made for a text encoder of width {config.cross_attention_dim}, but this pipeline's"
                f" has {text_width}: SSR-Encoder needs Stable Diffusion 1.5's."
            )
        if image_encoder.config.hidden_size != config.vision_hidden_size:
            raise ValueError(
                f"`ssr_encoder` reads hidden states of width {config.vision_hidden_size}, but the image encoder's are"
                f" {image_encoder.config.hidden_size} wide."
            )
        if image_encoder.config.num_hidden_layers < max(config.image_levels):
            raise ValueError(
                f"`ssr_encoder` reads levels {tuple(config.image_levels)}, but the image encoder has only"
                f" {image_encoder.config.num_hidden_layers} layers."
            )
        modules = dict(unwrap(self.unet).named_modules())
        for name, width in config.attention_layers.items():
            if name not in modules:
                raise ValueError(f"`ssr_encoder` has weights for the layer {name}, but the UNet has no such layer.")
            attn = modules[name]
            if (attn.inner_dim, attn.cross_attention_dim) != (width, config.cross_attention_dim):
                raise ValueError(
                    f"`ssr_encoder` expects the UNet's layer {name} to be {width} wide over text of width"
                    f" {config.cross_attention_dim}, but it is {attn.inner_dim} wide over {attn.cross_attention_dim}."
                )


class _Request:
    """A call's subject on its way through the stock pipeline, in the place of the IP-Adapter's image."""

    def __init__(self, subjects, scale, ip_adapter_image, ip_adapter_image_embeds):
        self.subjects = subjects
        self.scale = scale
        self.ip_adapter_image = ip_adapter_image
        self.ip_adapter_image_embeds = ip_adapter_image_embeds


def _check_subjects(subject, prompt, prompt_embeds) -> list[SubjectEmbeds | None]:
    """`subject` as a list with one for all prompts or one for each."""
    subjects = subject if isinstance(subject, list) else [subject]
    for each in subjects:
        if not isinstance(each, SubjectEmbeds) and not (each is None and isinstance(subject, list)):
            raise ValueError(
                f"`subject` has to be a SubjectEmbeds, or a list of them and None, but holds {type(each).__name__}."
            )
    if isinstance(subject, list):
        if prompt_embeds is not None:
            num_prompts = len(prompt_embeds)
        else:
            num_prompts = len(prompt) if isinstance(prompt, list) else 1
        if len(subjects) != num_prompts:
            raise ValueError(
                f"`subject` as a list has to hold one for each prompt, but holds {len(subjects)} for {num_prompts}."
            )
        if all(each is None for each in subjects):
            raise ValueError("`subject` holds None alone: leave it out to draw without a subject.")
    return subjects


def _with_signature(ours: Callable, stock: Callable) -> Callable:
    """`ours`, a method taking the stock method's arguments as `*args, **kwargs`, with all arguments in its signature."""

    @functools.wraps(ours)
    def method(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(stock).parameters.values())
    added = [
        p for p in inspect.signature(ours).parameters.values() if p.kind not in variadic and p.name not in {"self"}
    ]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [p for p in parameters if p.kind not in variadic] + added + rest
    method.__signature__ = inspect.Signature(parameters)
    method.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not inspect.Parameter.empty}
    return method


def _load_image_processor(path, subfolder: str, kwargs) -> CLIPImageProcessor | None:
    if os.path.isdir(path) and not os.path.isdir(os.path.join(path, subfolder)):
        return None
    try:
        kwargs = {name: value for name, value in kwargs.items() if name != "variant"}
        return CLIPImageProcessor.from_pretrained(path, subfolder=subfolder, **kwargs)
    except (EntryNotFoundError, OSError):
        logger.info(f"{path} holds no {subfolder}; it is made from the vision encoder's config.")
        return None


def _image_processor_for(image_encoder) -> CLIPImageProcessor:
    side = image_encoder.config.image_size
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _copy_code(file: Path, folder: Path) -> None:
    target = folder / file.name
    if not target.exists() or not target.samefile(file):
        shutil.copyfile(file, target)
