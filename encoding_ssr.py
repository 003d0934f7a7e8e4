"""Encodes reference images and queries into subject embeddings (section 3.2 of the paper), and shows which parts of an
image a query attends to."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image
from transformers import CLIPImageProcessor

from . import components_ssr, images_ssr, internals_ssr, subject_embeds_ssr


@dataclass(eq=False)
class _Reference:
    """A reference image with the query or mask that selects a subject in it. References with the same `number` are
    images of one subject."""

    image: Image.Image
    query: str
    mask: Image.Image | None
    number: int


class SubjectEncodingMixin(components_ssr.SSRComponents):
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
    ) -> subject_embeds_ssr.SubjectEmbeds | list[subject_embeds_ssr.SubjectEmbeds]:
        r"""
        Encodes one or several subjects of an image (section 3.2 of the paper).

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`):
                The reference image. A list encodes several subjects. A list inside of a list, as for
                `ip_adapter_image` in diffusers, has several images of one subject: `[[a, b, c]]` (see
                [`SubjectEmbeds.mean`]).
            query (`str` or `list`, *optional*):
                A text that names the subject in the image. A list encodes the image once and returns a list of
                subjects. The pipeline's text encoder encodes the query like a prompt. With a mask, the query is
                optional; the authors used a caption of the whole image.
            mask (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*):
                A mask of the subject, of shape `(height, width)` and the size of the image: white, or 1, where the
                subject is. Or a box, `(left, top, right, bottom)` in fractions from 0 to 1.
            mask_weight (`float`, defaults to 1.0):
                How strongly the mask increases the attention inside it, 0 or more. It needs a mask.
            resize_mode (`str`, defaults to `"pad"`):
                `"pad"` passes the whole image to the encoder, with a margin if the image is not square. `"crop"`
                passes only the central square, as the released code does: the subject is larger, but the ends of a
                long image are lost.
            lora_scale (`float`, *optional*), clip_skip (`int`, *optional*):
                Arguments of `encode_prompt`, which are used for the query. A pipeline call passes the values that it
                uses for its prompt.

        Returns:
            [`SubjectEmbeds`] or a `list` of them, for the `subject` argument of any pipeline with the same
            SSR-Encoder.

        Raises:
            `ValueError`: if no SSR-Encoder or text encoder is loaded, `image` is not an image, `query` is not a text
                or is empty, or `mask` does not have the size of the image or marks nothing in the part that
                `resize_mode` keeps.

        Example:

        ```py
        >>> subject = pipe.encode_subject(photo, query="cat")
        >>> image = pipe("a cat on the beach", subject=subject).images[0]
        ```
        """
        text = {"lora_scale": lora_scale, "clip_skip": clip_skip}
        references = parse_references(image, query, mask, prefix="")
        encoded = self._encode_references(references, mask_weight, resize_mode, text, prefix="")
        return encoded if any(map(_is_list, (image, query, mask))) else encoded[0]

    @torch.no_grad()
    def _encode_references(
        self, references: list[_Reference], mask_weight: float, resize_mode: str, text: dict, prefix: str = "subject_"
    ) -> list[subject_embeds_ssr.SubjectEmbeds]:
        """Encodes each reference. The vision encoder encodes each image once. `text` has further arguments of
        `encode_prompt`. `prefix` begins the names of the arguments in error messages."""
        # 1. the components are read once, because another thread may exchange them during the call
        processor, vision, encoder = self._loaded_image_encoder()
        mask_weight = _parse_mask_weight(mask_weight, references)
        images_ssr.check_resize_mode(resize_mode, f"{prefix}resize_mode")

        # 2. Images and masks to pixels. The first image is that of the unconditional branch, which gets an image of
        # zeros after normalization (section 3.3).
        images = list({id(reference.image): reference.image for reference in references}.values())
        batch = [images_ssr.preprocess(image, processor, resize_mode) for image in images]
        pixels = torch.cat([torch.zeros_like(batch[0]), *batch])
        masks = [
            None if r.mask is None else images_ssr.preprocess_mask(r.mask, processor, resize_mode, f"{prefix}mask")
            for r in references
        ]

        # 3. Queries and images to hidden states. The first query is the empty one of the unconditional branch.
        device = self._execution_device
        query_states = self._encode_queries(["", *(reference.query for reference in references)], device, text)
        query_states = query_states.to(encoder.dtype)
        levels = torch.stack(_vision_levels(vision, encoder, pixels, device))

        # 4. hidden states to subject embeddings, together with those of the unconditional branch
        fingerprint = encoder.fingerprint(device)
        subjects = []
        for index, (reference, mask) in enumerate(zip(references, masks, strict=True), 1):
            place = 1 + next(place for place, image in enumerate(images) if image is reference.image)
            both = None if mask is None else mask.to(device).expand(2, -1, -1, -1)
            embeds = encoder(query_states[[0, index]], levels[:, [0, place]], both, mask_weight)
            subjects.append(subject_embeds_ssr.Subject(embeds[1:], embeds[:1], reference.query))
        encoded = [subject_embeds_ssr.SubjectEmbeds((subject,), fingerprint) for subject in subjects]
        of_subject: dict[int, list] = {}
        for reference, embeds in zip(references, encoded, strict=True):
            of_subject.setdefault(reference.number, []).append(embeds)
        return [subject_embeds_ssr.SubjectEmbeds.mean(embeds) for embeds in of_subject.values()]

    def _encode_queries(self, queries: list[str], device, text: dict) -> torch.Tensor:
        """Returns the text hidden states of the queries. The pipeline's text encoder encodes them in the same way as a
        prompt. The first query is the empty query of the unconditional branch."""
        arguments = {name: value for name, value in text.items() if value is not None}
        if hasattr(self, "encode_prompt"):
            return self.encode_prompt(queries, device, 1, False, **arguments)[0]
        arguments.pop("clip_skip", None)
        return self._encode_prompt(queries, device, 1, False, **arguments)  # InstructPix2Pix has no other

    @torch.no_grad()
    def subject_attention_map(
        self,
        image,
        query: str | None = None,
        mask=None,
        mask_weight: float = 1.0,
        resize_mode: str = "pad",
        tokens: str = "all",
    ) -> "SubjectAttentionMap":
        r"""
        Returns the attention of a query to each part of a reference image. It takes the arguments of `encode_subject`, with a
        single query, and:

        Args:
            tokens (`str`, defaults to `"all"`):
                `"all"` uses all tokens of the query, including padding, because all of them enter the subject's
                embeddings. It shows how much their attention exceeds that of an empty query. `"own"` uses only the
                tokens of the query's words and scales the map to its maximum, as in figure 5 of the paper.

        Returns:
            [`SubjectAttentionMap`]: a heat map and an overlay at the size of the image, one map for each token, and
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
        processor, vision, encoder = self._loaded_image_encoder()
        for name, value in {"image": image, "query": query, "mask": mask}.items():
            if _is_list(value):
                raise ValueError(
                    f"`{name}` is a list of {len(value)}, but an attention map is of one query in one image: call"
                    " `subject_attention_map` for each."
                )
        (reference,) = parse_references(image, query, mask, prefix="")
        mask_weight = _parse_mask_weight(mask_weight, [reference])
        images_ssr.check_resize_mode(resize_mode)
        if tokens not in ("all", "own"):
            raise ValueError(f'`tokens` has to be "all" or "own", but is {tokens!r}.')
        device = self._execution_device
        mask = reference.mask and images_ssr.preprocess_mask(reference.mask, processor, resize_mode, "mask").to(device)
        pixels = images_ssr.preprocess(reference.image, processor, resize_mode)
        levels = _vision_levels(vision, encoder, pixels, device)
        query_states = self._encode_queries(["", reference.query], device, {}).to(encoder.dtype)
        # The empty query attends to the image without the mask, so that the map also shows the effect of the mask.
        probs, empty_probs = (
            encoder.attention_probs(states, levels[-1], at, mask_weight)[0].float().mean(0).cpu()
            for states, at in ((query_states[1:], mask), (query_states[:1], None))
        )
        own_tokens = self._own_tokens(reference.query)
        return _make_attention_map(probs, empty_probs, own_tokens, reference.image, resize_mode, tokens)

    def _own_tokens(self, query: str) -> dict[int, str]:
        """Returns the tokens of a query's words by position, without the start, end and padding tokens."""
        tokenizer = self.tokenizer
        if isinstance(self, TextualInversionLoaderMixin):
            # like `encode_prompt`: a textual inversion with several vectors has one token for each
            query = self.maybe_convert_prompt(query, tokenizer)
        with components_ssr.tokenizer_lock(tokenizer):
            ids = tokenizer(query, truncation=True).input_ids
        own = [i for i, token in enumerate(ids) if token not in tokenizer.all_special_ids]
        return dict(zip(own, tokenizer.convert_ids_to_tokens([ids[i] for i in own]), strict=True))

    def _loaded_image_encoder(self) -> tuple[CLIPImageProcessor, Any, Any]:
        """Returns the components that encode reference images. Raises a `ValueError` if one is missing or wrong."""
        encoder, vision = self._loaded_encoder(), self.ssr_image_encoder
        if vision is None or not encoder.config.image_levels:
            raise ValueError(
                "The encoders of this pipeline are not loaded, or were dropped: call `load_ssr` before encoding a subject."
            )
        if self.text_encoder is None:
            raise ValueError("`text_encoder` is None, but a query needs it: encode subjects before removing it.")
        return self.ssr_image_processor or images_ssr.default_image_processor(vision), vision, encoder


def parse_references(image: Any, query: Any, mask: Any, prefix: str = "subject_") -> list[_Reference]:
    """Reads reference images, queries and masks. An argument that is not a list is used for all subjects, and a list
    inside of a list has the images of one subject. `prefix` begins the names of the arguments in error messages."""
    names = [f"{prefix}image", f"{prefix}query", f"{prefix}mask"]
    images: dict[int, Image.Image] = {}
    references = []
    for number, subject in enumerate(_columns(names, (image, query, mask), "subjects")):
        for image, query, mask in _columns(names, subject, "images of one subject"):
            _check_reference(image, query, mask, prefix)
            if id(image) not in images:
                images[id(image)] = images_ssr.to_pil(image, names[0])
            mask = None if mask is None else images_ssr.to_mask(mask, images[id(image)].size, names[2])
            references.append(_Reference(images[id(image)], query or "", mask, number))
    return references


def _is_list(value: Any) -> bool:
    """Whether an argument has a value for each subject. A box is not a list of masks."""
    return isinstance(value, list) and not images_ssr.is_box(value)


def _columns(names: list[str], values: tuple, what: str) -> list[tuple]:
    """Returns the image, query and mask of each subject, or of each image. A value that is not a list is repeated."""
    lists = [_is_list(value) for value in values]
    lengths = {name: len(value) for name, value, is_list in zip(names, values, lists, strict=True) if is_list}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"Lists of {what} have to be of one length, and not empty, but got {lengths}.")
    count = max(lengths.values(), default=1)
    columns = [value if is_list else [value] * count for value, is_list in zip(values, lists, strict=True)]
    return list(zip(*columns, strict=True))


def _check_reference(image: Any, query: Any, mask: Any, prefix: str) -> None:
    """Raises a `ValueError` if the image, or both the query and the mask are missing, or if the query is not a text."""
    if image is None and query is None and mask is None:
        hint = ", or encode the subjects and pass `subject=[cat, None]` for a prompt without one" if prefix else ""
        raise ValueError(f"`{prefix}image` is missing: pass the reference image of the subject{hint}.")
    if image is None:
        what = f"`{prefix}query` is {query!r}" if mask is None else f"`{prefix}mask` is given"
        raise ValueError(f"{what}, but `{prefix}image` is missing: pass the reference image of the subject.")
    if query is None and mask is None:
        raise ValueError(
            f"`{prefix}image` is given, but `{prefix}query` is missing: pass the name of the subject, or a mask of it"
            f" in `{prefix}mask`."
        )
    if query is not None and (not isinstance(query, str) or not query.strip() and mask is None):
        hint = ": pass several queries as a list" if isinstance(query, tuple) else ""
        raise ValueError(f"`{prefix}query` has to be a text that names the subject, but is {query!r}{hint}.")


def _parse_mask_weight(mask_weight: Any, references: list[_Reference]) -> float:
    weight = internals_ssr.check_scale("mask_weight", mask_weight)
    if weight < 0:
        raise ValueError(f"`mask_weight` has to be 0 or more, but is {mask_weight!r}.")
    if weight != 1 and all(reference.mask is None for reference in references):
        raise ValueError(f"`mask_weight` is {mask_weight!r}, but there is no mask.")
    return weight


def _vision_levels(vision, encoder, pixels: torch.Tensor, device) -> list[torch.Tensor]:
    """Returns the hidden states of the vision encoder at the levels that the SSR-Encoder uses, lowest level first."""
    hidden_states = vision(pixels.to(device, vision.dtype), output_hidden_states=True).hidden_states
    return [hidden_states[level].to(encoder.dtype) for level in encoder.config.image_levels]


@dataclass(frozen=True, eq=False, repr=False)
class SubjectAttentionMap:
    r"""
    The token-to-patch attention of a query to its reference image, averaged over the heads. The subject embeddings are
    computed with this attention, so it shows which parts of the image are used. The attention of an empty query is
    subtracted, because every query attends to some parts of an image, such as a horizon or the brightest object.

    Args:
        heat (`np.ndarray` of shape `(height, width)`):
            A map of the size of the image, from 0 to 1. By default, it shows how much more attention the query's
            tokens, including the padding, pay to each place than the tokens of an empty query. The map is scaled to a
            maximum of twice `gathered` (at most 1). A query that attends to no particular place gives a faint map.
            With `tokens="own"`, it shows the attention of the tokens of the query's words instead, as in figure 5 of
            the paper. This map is scaled to a maximum of 1, and the attention of an empty query is not subtracted.
        tokens (`list[tuple[str, np.ndarray]]`):
            The text and the map of each token of the query's words. A textual inversion with several vectors has one
            token for each vector.
        image (`PIL.Image.Image`):
            The reference image, upright and in RGB.
        gathered (`float`):
            The share of the query's attention, from 0 to 1, that goes to other places than the attention of an empty
            query. It tends to be lower if the image does not contain the queried subject. The typical values depend
            on the checkpoint.

    Example:

    ```py
    >>> attention = pipe.subject_attention_map(photo, query="cat")
    >>> attention.overlay().save("where_is_the_cat.png")
    >>> attention.gathered
    ```
    """

    heat: np.ndarray
    tokens: list[tuple[str, np.ndarray]]
    image: Image.Image = field(repr=False)
    gathered: float = 0.0

    def __repr__(self) -> str:
        size = f"{self.image.width} x {self.image.height} pixels"
        return f"SubjectAttentionMap({len(self.tokens)} tokens, {size}, gathered={self.gathered:.2f})"

    def overlay(self, heat: np.ndarray | None = None) -> Image.Image:
        """Returns the image with the map, or with another one such as that of one token, over it: red where the attention is
        high, and gray where it is low."""
        heat = (self.heat if heat is None else heat)[..., None]
        pixels = np.asarray(self.image).astype(np.float32)
        grey = pixels.mean(-1, keepdims=True).repeat(3, -1) * 0.6
        mixed = grey * (1 - heat) + (0.55 * pixels + 0.45 * np.array([255, 40, 0])) * heat
        return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _make_attention_map(
    probs: torch.Tensor,
    empty_probs: torch.Tensor,
    own_tokens: dict[int, str],
    image: Any,
    resize_mode: str,
    tokens: str,
) -> SubjectAttentionMap:
    """Creates an attention map. `probs` and `empty_probs`, of shape `(num_tokens, 1 + num_patches)`, are the attention of
    the query and of an empty query. `own_tokens` has the tokens of the query's words by position."""
    empty = empty_probs.mean(0)
    own = probs[list(own_tokens)]
    if tokens == "own":
        attention = torch.cat([(own if len(own) else probs).mean(0, keepdim=True), own])
        peaks = torch.ones(len(attention))
    else:
        whole = torch.cat([probs.mean(0, keepdim=True), own])
        attention, peaks = (whole - empty).clamp(min=0), (2 * _distance(whole, empty)).clamp(max=1)
    side = round((probs.shape[1] - 1) ** 0.5)
    maps = images_ssr.postprocess_map(attention[:, 1:].unflatten(1, (side, side)), image.size, resize_mode)
    # the clamp prevents a division by 0 for a map that is 0 everywhere
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12) * peaks[:, None, None]
    gathered = float(_distance(probs.mean(0), empty))
    return SubjectAttentionMap(
        maps[0].numpy(), list(zip(own_tokens.values(), maps[1:].numpy(), strict=True)), image, gathered
    )


def _distance(probs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns the total variation distance: the share that two distributions do not have in common."""
    return (probs - others).abs().sum(-1) / 2
