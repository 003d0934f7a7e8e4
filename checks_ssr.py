"""Checks the arguments of a call, and whether an SSR-Encoder fits a pipeline, before any computation starts."""

import difflib
from numbers import Integral

import torch
from PIL import Image
from torch import nn

from . import image_processing_ssr, library_internals, subject_embeds, subject_request, unet_hooks


def check_references(
    image, query, mask, prefix: str = "subject_"
) -> list[tuple[object, Image.Image, str, Image.Image | None]]:
    """Returns (the picture as given, the picture as PIL, query, mask) for each reference. An argument that is not a
    list is used for all references. In error messages, the names of the arguments begin with `prefix`."""
    given = {f"{prefix}image": image, f"{prefix}query": query, f"{prefix}mask": mask}
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"Lists of subjects have to be of one length, and not empty, but got {lengths}.")
    count = max(lengths.values(), default=1)
    columns = [value if isinstance(value, list) else [value] * count for value in given.values()]
    pictures: dict[int, Image.Image] = {}
    references = []
    for image, query, mask in zip(*columns, strict=True):
        _check_reference(image, query, mask, prefix)
        if id(image) not in pictures:
            pictures[id(image)] = image_processing_ssr.to_pil(image, f"{prefix}image")
        picture = pictures[id(image)]
        if mask is not None:
            mask = image_processing_ssr.to_mask(mask, picture.size, f"{prefix}mask")
        references.append((image, picture, query or "", mask))
    return references


def _check_reference(image, query, mask, prefix: str) -> None:
    if image is None and query is None and mask is None:
        hint = ", or encode the subjects and pass `subject=[cat, None]` for a prompt without one" if prefix else ""
        raise ValueError(f"`{prefix}image` is missing: pass the picture of the subject{hint}.")
    if image is None:
        what = f"`{prefix}query` is {query!r}" if mask is None else f"`{prefix}mask` is given"
        raise ValueError(f"{what}, but `{prefix}image` is missing: pass the picture of the subject.")
    if query is None and mask is None:
        raise ValueError(
            f"`{prefix}image` is given, but `{prefix}query` is missing: pass the name of the subject, or a mask of it"
            f" in `{prefix}mask`."
        )
    if query is not None and (not isinstance(query, str) or not query.strip() and mask is None):
        hint = ": pass several queries as a list" if isinstance(query, tuple) else ""
        raise ValueError(f"`{prefix}query` has to be a text that names the subject, but is {query!r}{hint}.")


def check_mask_weight(mask_weight, masks: list) -> float:
    """Returns the weight as a `float`. Raises a `ValueError` if it is negative, or if there is no mask that it could be
    used for."""
    weight = subject_embeds.check_scale("mask_weight", mask_weight)
    if weight < 0:
        raise ValueError(f"`mask_weight` has to be 0 or more, but is {mask_weight!r}.")
    if weight != 1 and all(mask is None for mask in masks):
        raise ValueError(f"`mask_weight` is {mask_weight!r}, but there is no mask.")
    return weight


def check_window(start, end) -> tuple[float, float] | None:
    """Returns the window, or `None` if it covers the whole denoising process."""
    start, end = subject_embeds.check_scale("subject_start", start), subject_embeds.check_scale("subject_end", end)
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"`subject_start` has to be less than `subject_end`, and both from 0 to 1, but they are {start} and {end}."
        )
    return None if (start, end) == (0.0, 1.0) else (start, end)


def check_window_has_steps(start: float, end: float, num_steps: int) -> None:
    """Raises a `ValueError` if the window is between two steps, so that the subject would never be used."""
    if not any(start * num_steps <= step < end * num_steps for step in range(num_steps)):
        raise ValueError(
            f"`subject_start` = {start} and `subject_end` = {end} contain none of the {num_steps} steps, which begin at"
            f" multiples of {1 / num_steps:.3g}."
        )


# names that other pipelines, `encode_subject` and `set_ssr_scale` use for arguments that have different names in a call
_OTHER_NAMES = {
    "subject_embeds": "subject",
    "subjects": "subject",
    "subject_images": "subject_image",
    "image": "subject_image",
    "reference": "subject_image",
    "reference_image": "subject_image",
    "query": "subject_query",
    "queries": "subject_query",
    "mask": "subject_mask",
    "reference_mask": "subject_mask",
    "scale": "subject_scale",
    "ssr_scale": "subject_scale",
    "start": "subject_start",
    "end": "subject_end",
    "resize_mode": "subject_resize_mode",
    "in_controlnet": "subject_in_controlnet",
    "lora_scale": 'cross_attention_kwargs={"scale": ...}',
}


def check_unknown_arguments(given, stock, own) -> None:
    """Raises a `ValueError` for an argument that neither the stock call nor ours accepts and that is similar to one of
    ours (for example `subject_scal` or `query`). Stock calls with `**kwargs` would ignore it silently. Other unknown
    arguments are left to the stock call, and so is `None`, which is the default of most arguments."""
    # A call that does not name `num_inference_steps` passes its arguments on to another call, whose names are not
    # known here. It can have an `image` or `mask`.
    passes_on = "num_inference_steps" not in stock
    others = {name: meant for name, meant in _OTHER_NAMES.items() if name.startswith("subject") or not passes_on}
    meanings = {**{name: name for name in own}, **others}
    candidates = [name for name in meanings if name not in stock]
    for name, value in given.items():
        if name in stock or value is None:
            continue
        # an unknown argument that begins with "subject" is always treated as one of ours
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0 if name.startswith("subject") else 0.8)
        if near:
            raise ValueError(f"`{name}` is not an argument of this pipeline; did you mean `{meanings[near[0]]}`?")


def check_unused(given: dict, defaults: dict, reason: str) -> None:
    """Raises a `ValueError` for an argument that has no effect in this call but not its default value."""
    for name, value in given.items():
        # arrays are compared by element, so they are never a default value here
        if value is not defaults[name] and (hasattr(value, "shape") or value != defaults[name]):
            raise ValueError(f"`{name}` is {value!r}, but {reason}.")


def one_for_each(names: str, subjects: list, num_prompts: int) -> list:
    """Returns the list. Raises a `ValueError` if it has neither one subject for all prompts nor one for each
    prompt."""
    if len(subjects) not in (1, num_prompts):
        hint = ": for several subjects in one picture, add them (`cat + car`)" if num_prompts == 1 else ""
        raise ValueError(
            f"{names} as a list has to hold one for each prompt, but holds {len(subjects)} for {num_prompts}{hint}."
        )
    return subjects


def check_subjects(subject, num_prompts: int, check_encoder) -> list[subject_request.SubjectRow]:
    """Converts `subject` to rows, one for all prompts or one for each prompt, and calls `check_encoder` with each
    `SubjectEmbeds`."""
    given = subject if isinstance(subject, list) else [subject]
    rows = [_row(each, isinstance(subject, list)) for each in given]
    embeds = [each for row in rows for each in row.keyframes if each is not None]
    for each in embeds:
        check_encoder(each)
    if not embeds and any(len(row.frames) > 1 for row in rows):
        raise ValueError("`subject` holds only None: leave it out to draw without a subject.")
    moving = {row.frames for row in rows if len(row.frames) > 1}
    if len(moving) > 1:
        raise ValueError(
            f"`subject` has to have the same keyframes for all prompts, but they differ: {sorted(moving)}."
        )
    if moving:
        # a prompt without keyframes has the same subject, or none, at all of them
        rows = [_at_keyframes(row, *moving) for row in rows]
    return one_for_each("`subject`", rows, num_prompts)


def _at_keyframes(row: subject_request.SubjectRow, frames: tuple[int, ...]) -> subject_request.SubjectRow:
    if row.frames == frames:
        return row
    _check_not_compact(row.keyframes)
    return subject_request.SubjectRow(row.keyframes * len(frames), frames)


def _row(subject, none_is_allowed: bool) -> subject_request.SubjectRow:
    if isinstance(subject, dict):
        return _row_of_keyframes(subject)
    if not subject_embeds.is_subject_embeds(subject) and not (subject is None and none_is_allowed):
        raise ValueError(
            "`subject` has to be a SubjectEmbeds, a dict of them by frame, or a list of these and None, but holds"
            f" {type(subject).__name__}."
        )
    return subject_request.SubjectRow((subject,))


def _row_of_keyframes(keyframes: dict) -> subject_request.SubjectRow:
    # numpy integers too, but not booleans
    integers = all(isinstance(frame, Integral) and not isinstance(frame, bool) for frame in keyframes)
    if not keyframes or not integers or min(keyframes) < 0:
        raise ValueError(f"`subject` as a dict has to hold subjects by frame, 0 the first, but has {list(keyframes)}.")
    frames = sorted(keyframes)
    for each in keyframes.values():
        if each is not None and not subject_embeds.is_subject_embeds(each):
            raise ValueError(
                f"`subject` has to hold a SubjectEmbeds or None at a frame, but holds {type(each).__name__}."
            )
    subjects = [each for each in keyframes.values() if each is not None]
    shapes = {tuple(s.embeds.shape[1] for s in each.subjects) for each in subjects}
    if len(shapes) > 1:
        raise ValueError(
            f"`subject` has to have the same numbers of subjects and tokens at all keyframes, but has"
            f" {sorted(shapes)}."
        )
    if len(frames) > 1:
        _check_not_compact(subjects)
    return subject_request.SubjectRow(tuple(keyframes[frame] for frame in frames), tuple(map(int, frames)))


def _check_not_compact(keyframes) -> None:
    if any(s.counts is not None for each in keyframes if each is not None for s in each.subjects):
        raise ValueError("`subject` cannot be compact with keyframes: the tokens of two keyframes do not correspond.")


def check_fits(unet, encoder, image_encoder, text_encoder) -> None:
    """Raises a `ValueError` if an SSR-Encoder was made for other models. A model that is `None` is not checked: drawing
    needs no image encoder and, with `prompt_embeds`, no text encoder, and encoding needs no UNet."""
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
    """Raises a `ValueError` if an SSR-Encoder was made for another UNet, or if FreeNoise's split inference is
    enabled."""
    config, unet = encoder.config, unet_hooks.find_unet(unet)
    if library_internals.uses_split_inference(unet):
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


def check_precision(text_encoder: nn.Module | None, unet) -> None:
    """Raises a `ValueError` if the text encoder and the UNet have different precisions and autocast is disabled. Such
    a pipeline would fail in the first step."""
    usual = (torch.float16, torch.bfloat16, torch.float32)
    dtypes = (None if text_encoder is None else text_encoder.dtype), unet_hooks.find_unet(unet).dtype
    mixed = all(dtype in usual for dtype in dtypes) and dtypes[0] != dtypes[1]
    if mixed and not torch.is_autocast_enabled(unet_hooks.find_unet(unet).device.type):
        raise ValueError(
            f"`text_encoder` is in {dtypes[0]}, but `unet` in {dtypes[1]}: load the pipeline with `dtype=` (for instance"
            " `dtype=torch.float32`), or move it with `pipe.to(dtype)`."
        )


def check_controlnet(controlnet, encoder) -> None:
    """Raises a `ValueError` if a ControlNet, or one of several ControlNets, belongs to another model family."""
    for net in getattr(controlnet, "nets", [controlnet] if controlnet is not None else []):
        if net.config.cross_attention_dim != encoder.config.cross_attention_dim:
            raise ValueError(
                f"`controlnet` reads text of width {net.config.cross_attention_dim}, but this pipeline's is"
                f" {encoder.config.cross_attention_dim} wide: it belongs to another model family."
            )


def check_in_controlnet(rows: list[subject_request.SubjectRow], has_controlnet: bool, pipeline_name: str) -> None:
    """Raises a `ValueError` if the subjects' tokens cannot be appended to the text that a ControlNet gets."""
    if not has_controlnet:
        raise ValueError(f"`subject_in_controlnet` is True, but {pipeline_name} has no ControlNet.")
    if any(len(row.frames) > 1 for row in rows):
        raise ValueError("`subject_in_controlnet` does not support subjects with keyframes.")
    counts = {0 if each is None else len(each.subjects) for row in rows for each in row.keyframes}
    if len(counts) > 1:
        raise ValueError(
            f"`subject_in_controlnet` needs the same number of subjects for all prompts, but got {sorted(counts)}."
        )
    subjects = (s for row in rows for each in row.keyframes if each is not None for s in each.subjects)
    if any(subject.counts is not None for subject in subjects):
        raise ValueError("`subject_in_controlnet` needs a subject with all of its tokens, not a compact one.")


def check_no_regions(rows: list[subject_request.SubjectRow], reason: str) -> None:
    """Raises a `ValueError` if a subject has a region."""
    subjects = (s for row in rows for each in row.keyframes if each is not None for s in each.subjects)
    if any(subject.region is not None for subject in subjects):
        raise ValueError(f"`subject` has a region of the whole picture, but {reason}: use a subject without a region.")


def check_block_scales(name: str, scale: dict, layers) -> None:
    """Raises a `ValueError` if a scale per block contains values that are not numbers, or blocks that do not attend to
    subjects."""
    blocks: dict[str, list[str]] = {"down": [], "up": [], "mid": []}
    for layer in layers:
        part, _, rest = layer.partition(".")
        if part in ("down_blocks", "up_blocks"):
            blocks[part.removesuffix("_blocks")].append(f"block_{rest.partition('.')[0]}")
    reached = {part: sorted(set(names)) for part, names in blocks.items()}
    for part, value in scale.items():
        # only the middle has no blocks, and is given as a number or a list
        within = value if isinstance(value, dict) else {}
        unknown = [block for block in within if block not in reached.get(part, ())]
        if part not in reached or unknown or isinstance(value, dict) and not value:
            raise ValueError(f"`{name}` names {unknown or [part]} ({part!r}), but subjects reach only {reached}.")
        for each in within.values() if isinstance(value, dict) else [value]:
            for number in each if isinstance(each, list) else [each]:
                subject_embeds.check_scale(name, number)


def acts(rows: list[subject_request.SubjectRow], scale: float | dict[str, float]) -> bool:
    """Returns whether any subject has a scale other than 0 in any layer."""
    number = scale if isinstance(scale, float) else 1.0
    subjects = [s for row in rows for each in row.keyframes if each is not None for s in each.subjects]
    scales = [number if subject.scale is None else subject.scale for subject in subjects]
    return any(scales) and (isinstance(scale, float) or any(scale.values()))
