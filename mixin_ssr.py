"""What every SSR pipeline shares: loading, encoding subjects, and how a subject reaches the UNet."""

import functools
import inspect
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from weakref import WeakKeyDictionary

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.free_noise_utils import SplitInferenceModule
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from huggingface_hub.utils import EntryNotFoundError, validate_hf_hub_args
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel, PreTrainedModel

from .attention_map import SubjectAttentionMap
from .attention_processors import SubjectConditions, SubjectProjection, alone_in_unet, subject_in_unet, unwrap
from .file_utils import atomic_folder  # noqa: F401  (see below)
from .image_processing_ssr import check_resize_mode, postprocess_map, preprocess, preprocess_mask, to_mask, to_pil
from .modeling_ssr import SSREncoder
from .subject_cache import SubjectCache, digest, version
from .subject_embeds import Subject, SubjectEmbeds, check_scale, is_subject_embeds, same_fingerprint
from .subject_file import read_subject_file  # noqa: F401  (see below)
from .token_merging import merge_tokens  # noqa: F401  (saved pipelines of made classes load this file: see pipeline.py)


logger = logging.get_logger(__name__)

COMPONENTS = ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor")
DEFAULT_SCALE = 0.65

# by SSR-Encoder, which many pipelines may share
_caches: WeakKeyDictionary = WeakKeyDictionary()


class SSRPipelineMixin:
    r"""
    Adds SSR-Encoder to a Stable Diffusion 1.5 pipeline of diffusers: `class MyPipeline(SSRPipelineMixin, StockPipeline)`
    has the stock pipeline's arguments and components and, beside them, those documented here.

    **When the subject is in the UNet.** The weights live in the `ssr_encoder` component, never in the UNet. The
    processors and the projection that carry a subject are put into the UNet for one call and taken out after it, also
    when the call raises, so that a UNet can be shared with any other pipeline, saved, converted or given an IP-Adapter at
    any time, and a pipeline without a subject runs the stock code. The price is a lock: the calls of SSR pipelines on one
    UNet run one after the other. The processor objects are kept from call to call, so that compiled code stays valid. (Left in
    the UNet for good, they would meet `load_ip_adapter`, `from_unet2d` and `save_pretrained`; in a view that shares
    parameters but not modules, a LoRA loaded later would be missing.)

    **How it gets there.** The subject's keys and values, projected once a call with the scale contained in the values,
    travel as the arguments of the call: as image embeddings behind those of an IP-Adapter, the one road that guidance,
    PAG and AnimateDiff all know. `prepare_ip_adapter_image_embeds` is where they get on; with pipelines that know no
    IP-Adapter (T2I-Adapter, GLIGEN) it is the UNet's door.
    """

    _ssr_scale: float | dict = DEFAULT_SCALE

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
        subject_query: str | list[str] | None = None,
        subject_mask=None,
        mask_weight: float = 1.0,
        subject_scale: float | dict | None = None,
        subject: SubjectEmbeds | list[SubjectEmbeds | None] | None = None,
        subject_start: float = 0.0,
        subject_end: float = 1.0,
        subject_resize_mode: str = "pad",
        subject_in_controlnet: bool = False,
        **kwargs,
    ):
        r"""
        Generate as the stock pipeline does, with subjects picked out of reference pictures. All arguments of the stock
        pipeline are accepted; without a subject its very own call runs.

        A list for `subject_image`, `subject_query` or `subject_mask` holds, with a list of prompts, one for each prompt,
        and with a single prompt several subjects that appear together in its picture.

        Args:
            subject_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*):
                The reference picture, which may hold several things. Arrays are `(height, width, 3)` in uint8 or floats
                from 0 to 1, tensors `(3, height, width)` from 0 to 1.
            subject_query (`str` or `list[str]`, *optional*):
                Which of them is meant: "cat", "the woman on the left". With a mask it is a caption of the picture, and
                may be left out.
            subject_mask (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*):
                White, or 1, where in the reference the subject is; `(height, width)`, as large as its picture.
            mask_weight (`float`, defaults to 1.0):
                How strongly the mask draws the attention inside.
            subject_scale (`float` or `dict`, *optional*):
                How strongly the subject acts: 0 not at all, 0.5 to 0.8 usually, more keeps the subject closer and the
                prompt less. A dict sets it per block, as `set_ip_adapter_scale` takes it. Defaults to the scale of
                `set_ssr_scale`, 0.65 at first.
            subject ([`SubjectEmbeds`] or `list`, *optional*):
                Subjects from `encode_subject`, instead of the arguments above: one for all prompts, or a list with one
                for each, `None` for a prompt without a subject.
            subject_start (`float`, defaults to 0.0), subject_end (`float`, defaults to 1.0):
                The part of the denoising during which the subject acts. Layout and colours are decided early, details
                late.
            subject_resize_mode (`str`, defaults to `"pad"`):
                `"pad"` shows the encoder the whole reference, `"crop"` the central square, as the released code does.
            subject_in_controlnet (`bool`, defaults to `False`):
                Whether a ControlNet sees the subject's tokens behind the text's, as in the released demo, or the text
                alone.

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
        named = {"subject_image": subject_image, "subject_query": subject_query, "subject_mask": subject_mask}
        if subject is None and all(value is None for value in named.values()):
            if subject_scale is not None:
                raise ValueError(f"`subject_scale` is {subject_scale!r}, but there is no subject to scale.")
            with alone_in_unet(self.unet):
                return stock_call(*args, **kwargs)

        self._check_ssr_loaded(encoding=subject is None)
        scale = self._ssr_scale if subject_scale is None else subject_scale
        layer_scales = self._layer_scales("subject_scale", scale)
        window = _check_window(subject_start, subject_end)
        if subject_in_controlnet and getattr(self, "controlnet", None) is None:
            raise ValueError(f"`subject_in_controlnet` is True, but {type(self).__name__} has no ControlNet.")
        stock_parameters = inspect.signature(stock_call).parameters
        arguments = inspect.signature(stock_call).bind_partial(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        if window is not None and "callback_on_step_end" not in stock_parameters:
            raise ValueError("`subject_start` and `subject_end` need a pipeline with `callback_on_step_end`.")
        ip_adapter_image = arguments.pop("ip_adapter_image", None)
        ip_adapter_image_embeds = arguments.pop("ip_adapter_image_embeds", None)
        if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
            raise ValueError("Pass either `ip_adapter_image` or `ip_adapter_image_embeds`, but not both.")

        prompt, prompt_embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
        num_prompts = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        if subject is None:
            encoded = self._encode_subjects(**named, mask_weight=mask_weight, resize_mode=subject_resize_mode)
            if num_prompts > 1 or isinstance(prompt, list):
                subjects = _one_for_each(", ".join(f"`{name}`" for name in named), encoded, num_prompts)
            else:
                subjects = [functools.reduce(SubjectEmbeds.__add__, encoded)]
        else:
            given = [name for name, value in named.items() if value is not None]
            if given:
                raise ValueError(f"Pass either `subject` or `{given[0]}`, but not both.")
            subjects = self._check_subjects(subject, num_prompts)
        counts = {0 if each is None else len(each.subjects) for each in subjects}
        if subject_in_controlnet and len(counts) > 1:
            raise ValueError(
                "`subject_in_controlnet` needs as many subjects for one prompt as for another, but got"
                f" {sorted(counts)}."
            )

        merged = any(s.counts is not None for each in subjects if each is not None for s in each.subjects)
        if subject_in_controlnet and merged:
            raise ValueError("`subject_in_controlnet` needs a subject with all of its tokens, not a compact one.")

        if not _acts(subjects, layer_scales):
            with alone_in_unet(self.unet):
                return stock_call(*args, **kwargs)
        request = _Request(subjects, layer_scales, ip_adapter_image, ip_adapter_image_embeds)
        with subject_in_unet(self.unet, self.ssr_encoder.config.attention_layers) as projection:
            if window is not None:
                arguments.update(_switching(projection, window, arguments))
            if "ip_adapter_image" in stock_parameters:
                arguments["ip_adapter_image"] = request
                hook = self._hook(self.controlnet, request.join_controlnet) if subject_in_controlnet else nullcontext()
            else:
                images_per_prompt = arguments.get("num_images_per_prompt") or 1
                hook = self._hook(self.unet, functools.partial(self._board, request, num_prompts * images_per_prompt))
            with hook:
                return stock_call(**arguments)

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
    ):
        """The stock method, and behind what it returns the subject's conditions, the unconditional branch first."""
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
        return prepared + self._image_embeds(request, num_images_per_prompt, device, do_classifier_free_guidance)

    def _image_embeds(self, request: "_Request", batch_size: int, device, guided: bool) -> list[torch.Tensor]:
        """The request's subjects as image embeddings, a row for each picture and branch of the guidance."""
        conditions = self._conditions(request, device, guided)
        repeats = batch_size // len(request.subjects)
        request.tokens = request.tokens.repeat_interleave(repeats, dim=0)
        return [each.repeat_interleave(repeats, dim=0) for each in conditions.as_image_embeds()]

    def _board(self, request: "_Request", batch_size: int, args: tuple, kwargs: dict) -> None:
        """Hand the subject to the UNet in a pipeline that hands over no image embeddings itself."""
        sample = args[0] if args else kwargs["sample"]
        if len(sample) not in (batch_size, 2 * batch_size):
            raise ValueError(
                f"{type(self).__name__} gives its UNet {len(sample)} latents for {batch_size} pictures, which leaves open"
                " where the subject belongs."
            )
        if request.image_embeds is None:
            guided = len(sample) > batch_size
            request.image_embeds = self._image_embeds(request, batch_size, sample.device, guided)
        kwargs["added_cond_kwargs"] = {**(kwargs.get("added_cond_kwargs") or {}), "image_embeds": request.image_embeds}

    @contextmanager
    def _hook(self, module: torch.nn.Module, change: Callable[[tuple, dict], None]) -> Iterator[None]:
        """Let `change` at a module's arguments in this thread's calls."""
        thread = threading.get_ident()

        def hook(module, args, kwargs):
            if threading.get_ident() == thread:
                change(args, kwargs)
            return args, kwargs

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _conditions(self, request: "_Request", device, do_classifier_free_guidance: bool) -> SubjectConditions:
        """The request's subjects, a row each, as keys and values with their scales (section 3.3 of the paper).

        A subject that is alone in its row acts with its scale on what the layers find; where there are several, each one's
        conditional tokens are multiplied by its scale, and the layers take the sum as it is."""
        number = request.layer_scales if isinstance(request.layer_scales, float) else 1.0
        rows, negative_rows, row_scales = [], [], []
        example = next(each for each in request.subjects if each is not None).subjects[0]
        for each in request.subjects:
            # a prompt without a subject gets the scale 0: its values vanish, and so does what they add
            subjects = (example,) if each is None else each.subjects
            scales = [number if subject.scale is None else subject.scale for subject in subjects]
            alone = len(subjects) == 1
            row_scales.append(0.0 if each is None else scales[0] if alone else 1.0)
            embeds = [subject.embeds.to(device) for subject in subjects]
            rows.append(embeds if alone else [e * scale for e, scale in zip(embeds, scales, strict=True)])
            negative_rows.append([subject.negative_embeds.to(device) for subject in subjects])
        branches = ["positive"]
        if do_classifier_free_guidance:
            branches = ["negative", "positive"]
            if isinstance(self, StableDiffusionInstructPix2PixPipeline):
                branches = ["positive", "negative", "negative"]
        rows = [row for branch in branches for row in (rows if branch == "positive" else negative_rows)]
        row_scales = row_scales * len(branches)

        lengths = [[tokens.shape[1] for tokens in row] for row in rows]
        longest = max(map(sum, lengths))
        embeds = torch.cat(
            [
                F.pad(torch.cat(row, dim=1), (0, 0, 0, longest - sum(each)))
                for row, each in zip(rows, lengths, strict=True)
            ]
        ).to(self.ssr_encoder.dtype)
        request.tokens = embeds
        # offloading moves the weights only when they are used
        projected = self.ssr_encoder.project(embeds)
        row_scales = torch.tensor(row_scales, device=device)[:, None, None]
        dtype = self.unet.dtype
        pairs = []
        for name, (key, value) in zip(self.ssr_encoder.config.attention_layers, projected, strict=True):
            layer_scale = 1.0 if isinstance(request.layer_scales, float) else request.layer_scales[name]
            scales = row_scales * layer_scale
            if not scales.any():
                key, value = key[:, :0], value[:, :0]
            pairs.append((key.to(dtype), (value * scales).to(dtype)))

        regions = _stack_regions(request.subjects, len(branches))
        counts = _stack_counts(request.subjects, example, branches, longest, device)
        if regions is None and len(set(map(sum, lengths))) == 1:
            return SubjectConditions(pairs, counts=counts)
        token_subject = torch.full((len(rows), longest), -1.0)
        for row, each in zip(token_subject, lengths, strict=True):
            row[: sum(each)] = torch.arange(len(each)).repeat_interleave(torch.tensor(each))
        regions = None if regions is None else regions.to(device)
        return SubjectConditions(pairs, token_subject.to(device), regions, counts)

    def encode_subject(
        self,
        image,
        query: str | list[str] | None = None,
        mask=None,
        mask_weight: float = 1.0,
        resize_mode: str = "pad",
    ) -> SubjectEmbeds | list[SubjectEmbeds]:
        r"""
        Pick a subject, or several, out of a picture (section 3.2 of the paper).

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                The reference picture.
            query (`str` or `list[str]`, *optional*):
                Which thing in it is meant; a list encodes the picture once and gives a list of subjects. It goes through
                the pipeline's own text encoder, like a prompt. With a mask it is a caption of the picture, and may be
                left out.
            mask (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*):
                White, or 1, where the subject is; `(height, width)`, as large as the picture.
            mask_weight (`float`, defaults to 1.0):
                How strongly the mask draws the attention inside.
            resize_mode (`str`, defaults to `"pad"`):
                `"pad"` shows the encoder the whole picture, with a margin where it is not square; `"crop"` only the
                central square, as the released code does: larger, but what lies at the ends of a long picture is lost.

        Returns:
            [`SubjectEmbeds`], for the `subject` argument of any pipeline with the same SSR-Encoder, or a `list` of them.

        Raises:
            `ValueError`: if no SSR-Encoder is loaded, `image` is not a picture, `query` is not a text or is empty, or
            `mask` does not fit.

        Example:

        ```py
        >>> subject = pipe.encode_subject(photo, query="cat")
        >>> image = pipe("a cat on the beach", subject=subject).images[0]
        ```
        """
        self._check_ssr_loaded()
        encoded = self._encode_subjects(image, query, mask, mask_weight, resize_mode)
        return encoded if isinstance(query, list) or isinstance(image, list) or isinstance(mask, list) else encoded[0]

    @torch.no_grad()
    def _encode_subjects(
        self, subject_image, subject_query, subject_mask, mask_weight: float, resize_mode: str
    ) -> list[SubjectEmbeds]:
        """Encode each (picture, query, mask), each picture once, and not those that the cache holds."""
        references = _check_references(subject_image, subject_query, subject_mask)
        check_scale("mask_weight", mask_weight)
        check_resize_mode(resize_mode)
        processor, vision, encoder = self.ssr_image_processor, self.ssr_image_encoder, self.ssr_encoder
        device = self._execution_device
        query_states = self._encode_queries(["", *(query for *_, query, _ in references)], device)
        fingerprint = encoder.fingerprint(device)
        weights = version(vision), digest(fingerprint), encoder.dtype
        pixels = {id(image): preprocess(picture, processor, resize_mode) for image, picture, _, _ in references}
        digests = {key: digest(each) for key, each in pixels.items()}
        masks = [None if m is None else preprocess_mask(m, processor, resize_mode) for *_, m in references]
        keys = [
            (digests[id(image)], digest(query_states[[0, index + 1]]), digest(mask), mask_weight, *weights)
            for index, ((image, *_), mask) in enumerate(zip(references, masks, strict=True))
        ]
        cache = _caches.setdefault(encoder, SubjectCache())
        subjects = {key: cache.get(key) for key in keys}

        missing = {id(image): None for (image, *_), key in zip(references, keys, strict=True) if subjects[key] is None}
        place = {key: index + 1 for index, key in enumerate(missing)}
        if missing:
            # the unconditional branch sees the empty query on zeros after normalisation (section 3.3)
            batch = [torch.zeros_like(next(iter(pixels.values()))), *(pixels[key] for key in missing)]
            hidden_states = vision(torch.cat(batch).to(device, vision.dtype), output_hidden_states=True).hidden_states
            levels = torch.stack([hidden_states[level] for level in encoder.config.image_levels]).to(encoder.dtype)
        for index, ((image, _, query, _), mask, key) in enumerate(zip(references, masks, keys, strict=True)):
            if subjects[key] is None:
                mask = None if mask is None else mask.to(device).expand(2, -1, -1, -1)
                embeds = encoder(query_states[[0, index + 1]], levels[:, [0, place[id(image)]]], mask, mask_weight)
                subjects[key] = Subject(embeds[1:], embeds[:1], query)
                cache.keep(key, subjects[key])
        return [SubjectEmbeds((subjects[key],), fingerprint) for key in keys]

    def _encode_queries(self, queries: list[str], device) -> torch.Tensor:
        """Text hidden states of the queries, through the pipeline's own text encoder as a prompt's."""
        if hasattr(self, "encode_prompt"):
            states = self.encode_prompt(queries, device, 1, False)[0]
        else:
            states = self._encode_prompt(queries, device, 1, False)  # InstructPix2Pix has no other
        return states.to(self.ssr_encoder.dtype)

    @torch.no_grad()
    def subject_attention_map(
        self, image, query: str | None = None, mask=None, mask_weight: float = 1.0, resize_mode: str = "pad"
    ) -> SubjectAttentionMap:
        r"""
        Where in a picture a query looks. Arguments are those of `encode_subject`, with one query.

        Returns:
            [`SubjectAttentionMap`]: a heat map and an overlay at the picture's own size, and one map a token.

        Raises:
            `ValueError`: as `encode_subject`.

        Example:

        ```py
        >>> pipe.subject_attention_map(photo, query="cat").overlay().save("where_is_the_cat.png")
        ```
        """
        self._check_ssr_loaded()
        ((_, picture, query, mask),) = _check_references(image, query, mask)
        check_scale("mask_weight", mask_weight)
        check_resize_mode(resize_mode)
        processor, vision, encoder = self.ssr_image_processor, self.ssr_image_encoder, self.ssr_encoder
        device = self._execution_device
        pixels = preprocess(picture, processor, resize_mode).to(device, vision.dtype)
        hidden_states = vision(pixels, output_hidden_states=True).hidden_states
        levels = [hidden_states[level].to(encoder.dtype) for level in encoder.config.image_levels]
        query_states = self._encode_queries([query], device)
        if mask is not None:
            mask = preprocess_mask(mask, processor, resize_mode).to(device)
        _, probs = encoder(query_states, levels, mask, mask_weight, output_attentions=True)
        probs = probs[0].mean(0)

        ids = self.tokenizer(query, truncation=True).input_ids
        own = [i for i, token in enumerate(ids) if token not in self.tokenizer.all_special_ids]
        names = self.tokenizer.convert_ids_to_tokens([ids[i] for i in own])
        # the empty caption has no tokens of its own, so all of them stand for it
        probs = probs[own or slice(None), 1:].float().cpu()
        side = round(probs.shape[1] ** 0.5)
        maps = postprocess_map(
            torch.cat([probs.mean(0)[None], probs]).unflatten(1, (side, side)), picture.size, resize_mode
        )
        maps = (maps / maps.amax((1, 2), keepdim=True)).numpy()
        return SubjectAttentionMap(maps[0], list(zip(names, maps[1:], strict=False)), picture)

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
            encoder = SSREncoder.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, dtype=self.unet.dtype, **kwargs
            )
            if image_encoder is None:
                image_encoder = CLIPVisionModel.from_pretrained(
                    pretrained_model_name_or_path, subfolder=image_encoder_folder, dtype=self.unet.dtype, **kwargs
                )
            if image_processor is None:
                image_processor = _load_image_processor(pretrained_model_name_or_path, image_processor_folder, kwargs)
        self._check_ssr_fits(encoder, image_encoder)
        for model in (encoder, image_encoder):
            model.eval().to(self.unet.device)
            if model.dtype != self.unet.dtype:
                model.to(self.unet.dtype)
        self.register_modules(
            ssr_encoder=encoder,
            ssr_image_encoder=image_encoder,
            ssr_image_processor=image_processor or _image_processor_for(image_encoder),
        )

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

    def drop_ssr_encoders(self) -> None:
        r"""
        Free the memory of the vision encoder and of the part of the SSR-Encoder that reads pictures. Subjects that are
        encoded already, or loaded from a file, are drawn as before; to encode another one, call `load_ssr` again. Other
        pipelines that share the encoders keep them.

        Raises:
            `ValueError`: if no SSR-Encoder is loaded.

        Example:

        ```py
        >>> cat = pipe.encode_subject(photo, query="cat")
        >>> pipe.drop_ssr_encoders()
        >>> image = pipe("a cat on the beach", subject=cat).images[0]
        ```
        """
        self._check_ssr_loaded(encoding=False)
        self.register_modules(
            ssr_encoder=self.ssr_encoder.layers_alone(), ssr_image_encoder=None, ssr_image_processor=None
        )

    def set_ssr_scale(self, scale: float | dict) -> None:
        r"""
        Set how strongly subjects act in calls that do not say it themselves.

        Args:
            scale (`float` or `dict`):
                0 not at all, 0.5 to 0.8 usually. A dict sets it per block, as `set_ip_adapter_scale` takes it; blocks
                that it leaves out get 0.

        Raises:
            `ValueError`: if `scale` is not a number, or names blocks that the UNet has not.

        Example:

        ```py
        >>> pipe.set_ssr_scale(0.8)
        >>> pipe.set_ssr_scale({"down": 0.4, "up": {"block_1": [0.8, 0.8, 0.6]}})
        ```
        """
        self._layer_scales("scale", scale)
        self._ssr_scale = scale

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
        `DiffusionPipeline.from_pipe`, but for `dtype`: where that one turns the shared components into float32 unless
        told otherwise, this one keeps the precision that they have in common.

        Args:
            pipeline (`DiffusionPipeline`):
                Any Stable Diffusion 1.5 pipeline, with or without an SSR-Encoder.
            kwargs:
                Components to put in, such as `controlnet`, and `dtype`.

        Returns:
            This class's pipeline, on the same components. A UNet with motion modules is a new one, on the CPU.

        Example:

        ```py
        >>> pipe = StableDiffusionSSRPipeline.from_pipe(stock_pipe)
        ```
        """
        ours = {name: getattr(pipeline, name) for name in COMPONENTS if getattr(pipeline, name, None) is not None}
        models = (each for each in pipeline.components.values() if isinstance(each, torch.nn.Module))
        dtypes = {getattr(each, "dtype", None) for each in models} - {None}
        if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None and len(dtypes) == 1:
            (kwargs["dtype"],) = dtypes
        return super().from_pipe(pipeline, **{**ours, **kwargs})

    def _check_ssr_loaded(self, encoding: bool = True):
        """`encoding` needs all of it; a subject that is encoded already needs only the layers' keys and values."""
        if self.ssr_encoder is None:
            raise ValueError("There is no SSR-Encoder in this pipeline yet: call `load_ssr` before drawing a subject.")
        if encoding and (self.ssr_image_encoder is None or not self.ssr_encoder.config.image_levels):
            raise ValueError(
                "The encoders of this pipeline are not loaded, or were dropped: call `load_ssr` before encoding a subject."
            )
        if encoding and self.ssr_image_processor is None:
            self.register_modules(ssr_image_processor=_image_processor_for(self.ssr_image_encoder))
        self._check_ssr_fits(self.ssr_encoder, self.ssr_image_encoder)
        controlnet = getattr(self, "controlnet", None)
        for net in getattr(controlnet, "nets", [controlnet] if controlnet is not None else []):
            if net.config.cross_attention_dim != self.ssr_encoder.config.cross_attention_dim:
                raise ValueError(
                    f"`controlnet` reads text of width {net.config.cross_attention_dim}, but this pipeline's is"
                    f" {self.ssr_encoder.config.cross_attention_dim} wide: it belongs to another model family."
                )

    def _check_ssr_fits(self, encoder, image_encoder):
        config = encoder.config
        text_width = self.text_encoder.config.hidden_size
        if text_width != config.cross_attention_dim:
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
        modules = dict(unwrap(self.unet).named_modules())
        if any(isinstance(module, SplitInferenceModule) for module in modules.values()):
            raise ValueError(
                "A subject cannot act under FreeNoise's split inference, which splits the frames but not what stands beside"
                " the text: call `enable_free_noise` without `enable_free_noise_split_inference`."
            )
        for name, width in config.attention_layers.items():
            if name not in modules:
                raise ValueError(f"`ssr_encoder` has weights for the layer {name}, but the UNet has no such layer.")
            attn = modules[name]
            if (attn.inner_dim, attn.cross_attention_dim) != (width, config.cross_attention_dim):
                raise ValueError(
                    f"`ssr_encoder` expects the UNet's layer {name} to be {width} wide over text of width"
                    f" {config.cross_attention_dim}, but it is {attn.inner_dim} wide over {attn.cross_attention_dim}."
                )

    def _check_subjects(self, subject, num_prompts: int) -> list[SubjectEmbeds | None]:
        """`subject` as a list with one for all prompts or one for each."""
        subjects = subject if isinstance(subject, list) else [subject]
        fingerprint = None
        for each in subjects:
            if each is None and isinstance(subject, list):
                continue
            if not is_subject_embeds(each):
                raise ValueError(
                    f"`subject` has to be a SubjectEmbeds, or a list of them and None, but holds {type(each).__name__}."
                )
            width = each.subjects[0].embeds.shape[-1]
            if fingerprint is None and each.fingerprint is not None:
                fingerprint = self.ssr_encoder.fingerprint(self._execution_device)
            if width != self.ssr_encoder.config.cross_attention_dim or not same_fingerprint(
                each.fingerprint, fingerprint
            ):
                raise ValueError(
                    "`subject` was encoded by another SSR-Encoder than this pipeline's: encode its picture again."
                )
        if isinstance(subject, list):
            subjects = _one_for_each("`subject`", subjects, num_prompts)
        if all(each is None for each in subjects):
            raise ValueError("`subject` holds None alone: leave it out to draw without a subject.")
        return subjects

    def _layer_scales(self, name: str, scale) -> float | dict[str, float]:
        """A scale as a number for all layers, or one for each of `config.attention_layers`."""
        if not isinstance(scale, dict):
            return check_scale(name, scale)
        _check_numbers(name, scale)
        if self.ssr_encoder is None:
            raise ValueError(f"`{name}` names blocks, but there is no SSR-Encoder yet: call `load_ssr` first.")
        layers = self.ssr_encoder.config.attention_layers
        _check_blocks(name, scale, layers)
        (expanded,) = _maybe_expand_lora_scales(unwrap(self.unet), [scale], default_scale=0.0)
        return {
            layer: float(next((s for block, s in expanded.items() if layer.startswith(block)), 0.0))
            for layer in layers
        }


class _Request:
    """A call's subjects on their way through the stock pipeline, in the place of the IP-Adapter's image.

    Once they are under way: `tokens` are the subject embeddings, a row for each picture and branch, and `image_embeds` what
    was made of them for the UNet, where the pipeline does not carry it itself."""

    def __init__(self, subjects, layer_scales, ip_adapter_image, ip_adapter_image_embeds):
        self.subjects = subjects
        self.layer_scales = layer_scales
        self.ip_adapter_image = ip_adapter_image
        self.ip_adapter_image_embeds = ip_adapter_image_embeds
        self.tokens: torch.Tensor | None = None
        self.image_embeds: list[torch.Tensor] | None = None

    def join_controlnet(self, args: tuple, kwargs: dict) -> None:
        """Put the subject's tokens behind the text's, frame by frame."""
        states, tokens = kwargs["encoder_hidden_states"], self.tokens
        if len(states) % len(tokens) or kwargs.get("guess_mode") and len(states) < len(tokens):
            tokens = tokens.chunk(2)[1]  # guess mode asks for the conditional branch alone
        tokens = tokens.repeat_interleave(len(states) // len(tokens), dim=0).to(states.dtype)
        kwargs["encoder_hidden_states"] = torch.cat([states, tokens], dim=1)


_OWN_PROCESSORS = "it replaces the UNet's attention processors itself"
_UNSUITABLE = {
    "CycleDiffusionPipeline": "it draws a source prompt in the same batch",
    "SemanticStableDiffusionPipeline": "it guides by editing prompts of its own",
    "StableDiffusionAttendAndExcitePipeline": _OWN_PROCESSORS,
    "StableDiffusionControlNetXSPipeline": "its UNet has other layers",
    "StableDiffusionDiffEditPipeline": "it runs the UNet outside its call as well",
    "StableDiffusionPanoramaPipeline": "it orders its views otherwise than its prompts",
    "StableDiffusionParadigmsPipeline": "it runs several steps in one batch",
    "StableDiffusionPix2PixZeroPipeline": _OWN_PROCESSORS,
    "StableDiffusionSAGPipeline": "it hands image embeddings to half of its batch",
    "TextToVideoZeroPipeline": _OWN_PROCESSORS,
}


@functools.cache
def ssr_pipeline_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    r"""
    The SSR version of a Stable Diffusion 1.5 pipeline class: the same arguments and components, and a subject's.

    Args:
        pipeline_class (`type`):
            A pipeline class of diffusers, or of your own, whose base model is Stable Diffusion 1.5.

    Returns:
        `type`: a subclass of it with [`SSRPipelineMixin`], the same one at every call. Its name is the stock class's with
        "SSR" before it.

    Raises:
        `ValueError`: if it is no pipeline of Stable Diffusion, or one in which a subject cannot act.

    Example:

    ```py
    >>> from diffusers import StableDiffusionInpaintPipeline
    >>> inpaint = ssr_pipeline_class(StableDiffusionInpaintPipeline).from_pipe(pipe)
    >>> image = inpaint("a cat on a bench", image=photo, mask_image=mask, subject=cat).images[0]
    ```
    """
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        raise ValueError(f"`pipeline_class` has to be a pipeline class of diffusers, but is {pipeline_class!r}.")
    if issubclass(pipeline_class, SSRPipelineMixin):
        return pipeline_class
    name, components = pipeline_class.__name__, inspect.signature(pipeline_class.__init__).parameters
    if name in _UNSUITABLE:
        raise ValueError(f"`pipeline_class` is {name}, but no subject can act in it: {_UNSUITABLE[name]}.")
    if not {"unet", "text_encoder", "tokenizer"} <= set(components) or "text_encoder_2" in components:
        raise ValueError(
            f"`pipeline_class` has to be a pipeline of Stable Diffusion 1.5, but {name} has the components"
            f" {sorted(set(components) - {'self'})}."
        )
    doc = f"[`{name}`] that also takes a subject; see [`SSRPipelineMixin`]."
    namespace = {"__doc__": doc, "__module__": __name__}
    return type(f"SSR{name}", (SSRPipelineMixin, pipeline_class), namespace)


def __getattr__(name: str):
    # so that a saved pipeline of such a class finds it again by its name
    wanted = name.startswith("SSR") and name.endswith("Pipeline")
    stock = getattr(diffusers, name.removeprefix("SSR"), None) if wanted else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return ssr_pipeline_class(stock)


def _check_references(image, query, mask) -> list[tuple[object, Image.Image, str, Image.Image | None]]:
    """(the picture as given, as PIL, query, mask) for each reference, single values standing for all."""
    given = {"subject_image": image, "subject_query": query, "subject_mask": mask}
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"Lists of subjects have to be of one length, and not empty, but got {lengths}.")
    count = max(lengths.values(), default=1)
    columns = [value if isinstance(value, list) else [value] * count for value in given.values()]
    pictures, references = {}, []
    for image, query, mask in zip(*columns, strict=True):
        if image is None:
            what = f"`subject_query` is {query!r}" if mask is None else "`subject_mask` is given"
            raise ValueError(f"{what}, but `subject_image` is missing: it needs its picture.")
        if query is None and mask is None:
            raise ValueError(
                "`subject_image` is given, but `subject_query` is missing: say which thing in it is meant."
            )
        if query is not None and (not isinstance(query, str) or not query.strip() and mask is None):
            raise ValueError(f"`subject_query` has to be a text that names the subject, but is {query!r}.")
        if id(image) not in pictures:
            pictures[id(image)] = to_pil(image)
        picture = pictures[id(image)]
        references.append((image, picture, query or "", None if mask is None else to_mask(mask, picture.size)))
    return references


def _one_for_each(names: str, subjects: list, num_prompts: int) -> list:
    if len(subjects) == 1:
        return subjects
    if len(subjects) != num_prompts:
        raise ValueError(
            f"{names} as a list has to hold one for each prompt, but holds {len(subjects)} for {num_prompts}."
        )
    return subjects


def _acts(subjects: list[SubjectEmbeds | None], layer_scales: float | dict[str, float]) -> bool:
    """Whether any subject has a scale other than 0, in any layer."""
    number = layer_scales if isinstance(layer_scales, float) else 1.0
    scales = [number if s.scale is None else s.scale for each in subjects if each is not None for s in each.subjects]
    return any(scales) and (isinstance(layer_scales, float) or any(layer_scales.values()))


def _check_window(start, end) -> tuple[float, float] | None:
    """The window, or `None` where it is the whole denoising."""
    start, end = check_scale("subject_start", start), check_scale("subject_end", end)
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"`subject_start` has to lie before `subject_end`, both from 0 to 1, but they are {start} and {end}."
        )
    return None if (start, end) == (0.0, 1.0) else (start, end)


def _check_numbers(name: str, scale) -> None:
    for value in scale.values() if isinstance(scale, dict) else scale:
        if isinstance(value, (dict, list)):
            _check_numbers(name, value)
        else:
            check_scale(name, value)


def _check_blocks(name: str, scale: dict, layers) -> None:
    blocks = {
        "down": {layer.split(".")[1] for layer in layers if layer.startswith("down_blocks.")},
        "up": {layer.split(".")[1] for layer in layers if layer.startswith("up_blocks.")},
        "mid": set(),
    }
    for part, value in scale.items():
        within = value if isinstance(value, dict) else {}
        unknown = [block for block in within if block.removeprefix("block_") not in blocks.get(part, ())]
        if part not in blocks or unknown:
            reached = {part: [f"block_{index}" for index in sorted(indices)] for part, indices in blocks.items()}
            raise ValueError(f"`{name}` names {unknown or [part]} ({part}), but subjects reach only {reached}.")


def _switching(projection: SubjectProjection, window: tuple[float, float], arguments: dict) -> dict:
    """The call's callback arguments, with one that lets the subject act inside `window` alone."""
    callback = arguments.get("callback_on_step_end")
    start, end = window

    def inside(step: int, num_steps: int) -> bool:
        return start * num_steps <= step < end * num_steps

    def switch(pipeline, step, timestep, callback_kwargs):
        projection.active = inside(step + 1, pipeline.num_timesteps)
        return callback_kwargs if callback is None else callback(pipeline, step, timestep, callback_kwargs)

    projection.active = start == 0
    changed = {"callback_on_step_end": switch}
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        changed["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
    return changed


def _stack_regions(rows: list[SubjectEmbeds | None], branches: int) -> torch.Tensor | None:
    """Where each row's subjects may appear, `(branches * num_rows, num_subjects, height, width)`, or `None` if nowhere is
    forbidden."""
    given = [s.region for row in rows if row is not None for s in row.subjects if s.region is not None]
    if not given:
        return None
    size = tuple(given[0].shape)
    count = max(len(row.subjects) for row in rows if row is not None)
    regions = torch.ones(len(rows), count, *size)
    for index, row in enumerate(rows):
        for slot, subject in enumerate(row.subjects if row is not None else ()):
            if subject.region is not None:
                regions[index, slot] = F.interpolate(subject.region[None, None], size, mode="nearest")[0, 0]
    return regions.repeat(branches, 1, 1, 1)


def _stack_counts(
    rows: list[SubjectEmbeds | None], example: Subject, branches: list[str], longest: int, device
) -> torch.Tensor | None:
    """How often each row's tokens count, `(branches * num_rows, longest)`, or `None` if all count once. A row without a
    subject holds the tokens of `example`."""
    subjects = [(example,) if row is None else row.subjects for row in rows]
    if all(subject.counts is None for row in subjects for subject in row):
        return None
    stacked = torch.ones(len(branches), len(rows), longest)
    for branch, counts_of_branch in zip(branches, stacked, strict=True):
        for row, counts in zip(subjects, counts_of_branch, strict=True):
            start = 0
            for subject in row:
                length = subject.embeds.shape[1]
                given = subject.counts if branch == "positive" else subject.negative_counts
                if given is not None:
                    counts[start : start + length] = given[0]
                start += length
    return stacked.flatten(0, 1).to(device)


def _with_signature(ours: Callable, stock: Callable) -> Callable:
    """`ours`, a method taking the stock method's arguments as `*args, **kwargs`, with all arguments in its signature."""

    @functools.wraps(ours)
    def method(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(stock).parameters.values())
    added = [p for p in inspect.signature(ours).parameters.values() if p.kind not in variadic and p.name != "self"]
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
