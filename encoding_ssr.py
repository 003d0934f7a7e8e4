"""Encodes reference pictures and queries into subject embeddings (section 3.2 of the paper)."""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPImageProcessor, PreTrainedModel

from . import (
    attention_map,
    checks_ssr,
    image_processing_ssr,
    loading_ssr,
    modeling_ssr,
    shared_components,
    subject_cache,
    subject_embeds,
)


# the cache of each SSR-Encoder, which several pipelines may share
_caches: WeakKeyDictionary = WeakKeyDictionary()


def _copied_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that autograd can use, even in `torch.inference_mode`."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


def _copied(subject: subject_embeds.Subject) -> subject_embeds.Subject:
    return replace(
        subject, embeds=_copied_tensor(subject.embeds), negative_embeds=_copied_tensor(subject.negative_embeds)
    )


def _vision_levels(
    vision: PreTrainedModel, encoder: modeling_ssr.SSREncoder, pixels: torch.Tensor, device
) -> list[torch.Tensor]:
    """Returns the hidden states of the vision encoder at the levels that the SSR-Encoder uses, lowest level first."""
    hidden_states = vision(pixels.to(device, vision.dtype), output_hidden_states=True).hidden_states
    return [hidden_states[level].to(encoder.dtype) for level in encoder.config.image_levels]


class SubjectEncodingMixin(loading_ssr.SSRComponents):
    """`encode_subject` and `subject_attention_map` for [`SSRPipelineMixin`]."""

    def encode_subject(
        self,
        image,
        query: str | list[str] | None = None,
        mask=None,
        mask_weight: float = 1.0,
        resize_mode: str = "pad",
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> subject_embeds.SubjectEmbeds | list[subject_embeds.SubjectEmbeds]:
        r"""
        Encodes one or several subjects of a picture (section 3.2 of the paper).

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                The reference picture.
            query (`str` or `list[str]`, *optional*):
                A text that names the subject in the picture. A list encodes the picture once and returns a list of
                subjects. The pipeline's text encoder encodes the query like a prompt. With a mask, the query is
                optional; the authors used a caption of the whole picture.
            mask (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*):
                A mask of the subject, of shape `(height, width)` and the size of the picture: white, or 1, where the
                subject is.
            mask_weight (`float`, defaults to 1.0):
                How strongly the mask increases the attention inside it, 0 or more. It needs a mask.
            resize_mode (`str`, defaults to `"pad"`):
                `"pad"` passes the whole picture to the encoder, with a margin if the picture is not square. `"crop"`
                passes only the central square, as the released code does: the subject is larger, but the ends of a
                long picture are lost.
            lora_scale (`float`, *optional*), clip_skip (`int`, *optional*):
                Arguments of `encode_prompt`, which are used for the query. A pipeline call passes the values that it
                uses for its prompt.

        Returns:
            [`SubjectEmbeds`] or a `list` of them, for the `subject` argument of any pipeline with the same
            SSR-Encoder.

        Raises:
            `ValueError`: if no SSR-Encoder or text encoder is loaded, `image` is not a picture, `query` is not a text
            or is empty, or `mask` does not have the size of the picture or marks nothing in the part that
            `resize_mode` keeps.

        Example:

        ```py
        >>> subject = pipe.encode_subject(photo, query="cat")
        >>> image = pipe("a cat on the beach", subject=subject).images[0]
        ```
        """
        text = {"lora_scale": lora_scale, "clip_skip": clip_skip}
        encoded = self._encode_subjects(
            self._encoders(), image, query, mask, mask_weight, resize_mode, text, prefix=""
        )
        return encoded if isinstance(query, list) or isinstance(image, list) or isinstance(mask, list) else encoded[0]

    @torch.no_grad()
    def _encode_subjects(
        self,
        encoders: tuple[CLIPImageProcessor, PreTrainedModel, modeling_ssr.SSREncoder],
        subject_image,
        subject_query,
        subject_mask,
        mask_weight: float,
        resize_mode: str,
        text: dict,
        prefix: str = "subject_",
    ) -> list[subject_embeds.SubjectEmbeds]:
        """Encodes each (picture, query, mask) that is not in the cache. The vision encoder encodes each picture once.
        `encoders` are those of `_encoders`. `text` has further arguments of `encode_prompt`. `prefix` begins the names
        of the arguments in error messages."""
        processor, vision, encoder = encoders
        references = checks_ssr.check_references(subject_image, subject_query, subject_mask, prefix)
        mask_weight = checks_ssr.check_mask_weight(mask_weight, [mask for *_, mask in references])
        image_processing_ssr.check_resize_mode(resize_mode, f"{prefix}resize_mode")
        pixels = {
            id(image): image_processing_ssr.preprocess(picture, processor, resize_mode)
            for image, picture, _, _ in references
        }
        masks = [
            None if m is None else image_processing_ssr.preprocess_mask(m, processor, resize_mode, f"{prefix}mask")
            for *_, m in references
        ]
        device = self._execution_device
        query_states = self._encode_queries(["", *(query for *_, query, _ in references)], device, text).to(
            encoder.dtype
        )
        # never `None`, because the encoder has image levels
        fingerprint: Any = encoder.fingerprint(device)
        # the hidden states of the query, which are part of the keys as well, have the SSR-Encoder's precision
        weights = (subject_cache.version(vision), subject_cache.digest(fingerprint), subject_cache.hooks(encoder))
        digests = {key: subject_cache.digest(each) for key, each in pixels.items()}
        keys = [
            (
                digests[id(image)],
                subject_cache.digest(query_states[[0, index + 1]]),
                subject_cache.digest(mask),
                mask_weight,
                *weights,
            )
            for index, ((image, *_), mask) in enumerate(zip(references, masks, strict=True))
        ]
        cache = _caches.setdefault(encoder, subject_cache.SubjectCache())
        subjects = {key: cache.get(key) for key in keys}

        missing = {id(image): None for (image, *_), key in zip(references, keys, strict=True) if subjects[key] is None}
        place = {key: index + 1 for index, key in enumerate(missing)}
        if missing:
            # The unconditional branch uses an empty query and a picture of zeros after normalisation (section 3.3).
            batch = [torch.zeros_like(next(iter(pixels.values()))), *(pixels[key] for key in missing)]
            levels = torch.stack(_vision_levels(vision, encoder, torch.cat(batch), device))
        for index, ((image, _, query, _), mask, key) in enumerate(zip(references, masks, keys, strict=True)):
            if subjects[key] is None:
                mask = None if mask is None else mask.to(device).expand(2, -1, -1, -1)
                embeds = encoder(query_states[[0, index + 1]], levels[:, [0, place[id(image)]]], mask, mask_weight)
                subjects[key] = subject_embeds.Subject(embeds[1:], embeds[:1], query)
                cache.keep(key, _copied(subjects[key]))
        # copies, so that a change in place of a returned tensor changes neither the cache nor another subject
        return [subject_embeds.SubjectEmbeds((_copied(subjects[key]),), _copied_tensor(fingerprint)) for key in keys]

    def _encode_queries(self, queries: list[str], device, text: dict) -> torch.Tensor:
        """Returns the text hidden states of the queries. The pipeline's text encoder encodes them in the same way as a
        prompt. The first query is the empty query of the unconditional branch."""
        given = {name: value for name, value in text.items() if value is not None}
        if hasattr(self, "encode_prompt"):
            return self.encode_prompt(queries, device, 1, False, **given)[0]
        given.pop("clip_skip", None)
        return self._encode_prompt(queries, device, 1, False, **given)  # InstructPix2Pix has no other

    @torch.no_grad()
    def subject_attention_map(
        self,
        image,
        query: str | None = None,
        mask=None,
        mask_weight: float = 1.0,
        resize_mode: str = "pad",
        tokens: str = "all",
    ) -> attention_map.SubjectAttentionMap:
        r"""
        Returns the attention of a query to each part of a picture. It takes the arguments of `encode_subject`, with a
        single query, and:

        Args:
            tokens (`str`, defaults to `"all"`):
                `"all"` uses all tokens of the query, including padding, because all of them enter the subject's
                embeddings. It shows how much their attention exceeds that of an empty query. `"own"` uses only the
                tokens of the query's words and scales the map to its maximum, as in figure 5 of the paper.

        Returns:
            [`SubjectAttentionMap`]: a heat map and an overlay at the size of the picture, one map for each token, and
            the share of its attention that the query directs elsewhere than an empty query does.

        Raises:
            `ValueError`: for the same reasons as `encode_subject`, or if `tokens` is not `"all"` or `"own"`.

        Example:

        ```py
        >>> attention = pipe.subject_attention_map(photo, query="cat")
        >>> attention.overlay().save("where_is_the_cat.png")
        >>> attention.gathered
        ```
        """
        processor, vision, encoder = self._encoders()
        for name, value in {"image": image, "query": query, "mask": mask}.items():
            if isinstance(value, list):
                raise ValueError(
                    f"`{name}` is a list of {len(value)}, but an attention map is of one query in one picture: call"
                    " `subject_attention_map` for each."
                )
        ((_, picture, query, mask),) = checks_ssr.check_references(image, query, mask, prefix="")
        mask_weight = checks_ssr.check_mask_weight(mask_weight, [mask])
        image_processing_ssr.check_resize_mode(resize_mode)
        if tokens not in ("all", "own"):
            raise ValueError(f'`tokens` has to be "all" or "own", but is {tokens!r}.')
        device = self._execution_device
        if mask is not None:
            mask = image_processing_ssr.preprocess_mask(mask, processor, resize_mode, "mask").to(device)
        levels = _vision_levels(
            vision, encoder, image_processing_ssr.preprocess(picture, processor, resize_mode), device
        )
        query_states = self._encode_queries(["", query], device, {}).to(encoder.dtype)
        # The empty query attends to the picture without the mask, so that the map also shows the effect of the mask.
        probs, empty_probs = (
            encoder.attention_probs(states, levels[-1], each, mask_weight)[0].float().mean(0).cpu()
            for states, each in ((query_states[1:], mask), (query_states[:1], None))
        )
        return attention_map.make_attention_map(
            probs, empty_probs, self._own_tokens(query), picture, resize_mode, tokens
        )

    def _own_tokens(self, query: str) -> dict[int, str]:
        """Returns the tokens of a query's words by position, without the start, end and padding tokens."""

        def tokenize(pipeline) -> list[int]:
            text, tokenizer = query, pipeline.tokenizer
            if isinstance(pipeline, TextualInversionLoaderMixin):
                # like `encode_prompt`: a textual inversion with several vectors has one token for each
                text = pipeline.maybe_convert_prompt(query, tokenizer)
            return tokenizer(text, truncation=True).input_ids

        ids = shared_components.with_own_tokenizer(self, tokenize)
        own = [i for i, token in enumerate(ids) if token not in self.tokenizer.all_special_ids]
        return dict(zip(own, self.tokenizer.convert_ids_to_tokens([ids[i] for i in own]), strict=True))

    def _encoders(self) -> tuple[CLIPImageProcessor, PreTrainedModel, modeling_ssr.SSREncoder]:
        """Returns the components that encode references, each read once, because another thread may exchange them
        while a subject is encoded. Raises a `ValueError` if one is missing or does not fit."""
        vision, encoder, text_encoder = self.ssr_image_encoder, self.ssr_encoder, self.text_encoder
        if encoder is None:
            raise ValueError(
                "There is no SSR-Encoder in this pipeline yet: call `load_ssr` before encoding a subject."
            )
        checks_ssr.check_fits(self.unet, encoder, vision, text_encoder)
        if vision is None or not encoder.config.image_levels:
            raise ValueError(
                "The encoders of this pipeline are not loaded, or were dropped: call `load_ssr` before encoding a subject."
            )
        if text_encoder is None:
            raise ValueError("`text_encoder` is None, but a query needs it: encode subjects before removing it.")
        processor = self.ssr_image_processor
        if processor is None:
            processor = image_processing_ssr.default_image_processor(vision)
            self.register_modules(ssr_image_processor=processor)
        return processor, vision, encoder
