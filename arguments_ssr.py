"""Reads the arguments of a call with subjects, and checks them before any work starts."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image

from . import internals_ssr, request_ssr, subject_embeds_ssr


# What to use instead of arguments that other pipelines, `encode_subject` and `SubjectEmbeds` have.
_INSTEAD = {
    "image": "subject_image",
    "mask": "subject_mask",
    "query": "subject_query",
    "ref_image": "subject_image",
    "reference": "subject_image",
    "reference_image": "subject_image",
    "region": "subject=cat.inside(region)",
    "scale": "subject_scale",
    "ssr_image": "subject_image",
    "ssr_scale": "subject_scale",
    "subject_embeds": "subject",
    "subject_region": "subject=cat.inside(region)",
    "subject_weight": "subject_scale",
}


def check_unknown_arguments(arguments: dict, stock: Any, own: dict) -> None:
    """Raises a `ValueError` for an argument that neither the stock call nor ours accepts, and that is about subjects.
    Stock calls with `**kwargs` would ignore it. Other unknown arguments are left to the stock call, and so is `None`,
    which is the default of most arguments."""
    # A call that does not name `num_inference_steps` passes its arguments on to another call, whose names are not
    # known here. It can have an `image` or `mask`.
    passes_on = "num_inference_steps" not in stock
    for name, value in arguments.items():
        if name in stock or value is None:
            continue
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        about_subjects = "subject" in name or name.startswith("ssr")
        if about_subjects or near or (name in _INSTEAD and not passes_on):
            instead = _INSTEAD.get(name, near[0] if near else None)
            hint = (
                f"did you mean `{instead}`?"
                if instead
                else f"it has {', '.join(f'`{own_name}`' for own_name in own)}."
            )
            raise ValueError(f"`{name}` is not an argument of this pipeline; {hint}")


def check_own_arguments(own: dict, defaults: dict, kwargs: dict, stock_call: Callable) -> bool:
    """Returns whether a call has a subject. Raises a `ValueError` if one of its own arguments has no effect, and for
    unknown arguments in `kwargs` that are about subjects."""
    check_unknown_arguments(kwargs, inspect.signature(stock_call).parameters, defaults)
    reference = [name for name in ("subject_image", "subject_query", "subject_mask") if own[name] is not None]
    if own["subject"] is not None:
        if reference:
            raise ValueError(f"Pass either `subject` or `{reference[0]}`, but not both.")
        unused, reason = (
            ["mask_weight", "subject_resize_mode"],
            "`subject` is encoded already: pass it to `encode_subject`",
        )
    else:
        unused, reason = [] if reference else ["mask_weight", "subject_resize_mode"], "there is no `subject_image`"
        if not reference and own["negative_subject"] is None:
            unused, reason = list(own), "there is no subject"
    for name in unused:
        value, default = own[name], defaults[name]
        # arrays are compared by element, so they are never a default value here
        if value is not default and (hasattr(value, "shape") or value != default):
            raise ValueError(f"`{name}` is {value!r}, but {reason}.")
    return own["subject"] is not None or own["negative_subject"] is not None or bool(reference)


def arguments_by_name(call: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
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
    if arguments.get("num_inference_steps") is not None:
        internals_ssr.check_count("num_inference_steps", arguments["num_inference_steps"])
    return arguments


def parse_window(start: Any, end: Any, stock_call: Callable) -> tuple[float, float] | None:
    """Returns the window, or `None` if it covers the whole denoising process."""
    start, end = internals_ssr.check_scale("subject_start", start), internals_ssr.check_scale("subject_end", end)
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"`subject_start` has to be less than `subject_end`, and both from 0 to 1, but they are {start} and {end}."
        )
    if (start, end) == (0.0, 1.0):
        return None
    if "callback_on_step_end" not in inspect.signature(stock_call).parameters:
        raise ValueError("`subject_start` and `subject_end` need a pipeline with `callback_on_step_end`.")
    return start, end


def check_rows(rows: list[request_ssr.Row], num_frames: int, own: dict, arguments: dict, pipeline: Any) -> None:
    """Raises a `ValueError` if the subjects do not fit the other arguments of the call."""
    for row in rows:
        request_ssr.check_frames(row, num_frames)
    subjects = request_ssr.all_subjects(rows)
    if arguments.get("padding_mask_crop") is not None and any(subject.region is not None for subject in subjects):
        raise ValueError(
            "`subject` has a region of the whole image, but `padding_mask_crop` generates a part of the image: use a"
            " subject without a region."
        )
    if not own["subject_in_controlnet"]:
        return
    if own["negative_subject"] is not None:
        raise ValueError("`subject_in_controlnet` does not support a `negative_subject`.")
    if getattr(pipeline, "controlnet", None) is None:
        raise ValueError(f"`subject_in_controlnet` is True, but {type(pipeline).__name__} has no ControlNet.")
    if any(len(row) > 1 for row in rows):
        raise ValueError("`subject_in_controlnet` does not support subjects with keyframes.")
    counts = {len(request_ssr.all_subjects([row])) for row in rows}
    if len(counts) > 1:
        raise ValueError(
            f"`subject_in_controlnet` needs the same number of subjects for all prompts, but got {sorted(counts)}."
        )
    if any(subject.counts is not None for subject in subjects):
        raise ValueError("`subject_in_controlnet` needs a subject with all of its tokens, not a compact one.")


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
            raise ValueError(
                f"`{name}` has a scale for {unknown or [part]} ({part!r}), but subjects only affect {reached}."
            )
        for numbers in within.values() if isinstance(value, dict) else [value]:
            for number in numbers if isinstance(numbers, list) else [numbers]:
                internals_ssr.check_scale(name, number)


def num_prompts(arguments: dict) -> int:
    prompt, prompt_embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    return len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)


def num_frames(stock_call: Callable, arguments: dict) -> int:
    """Returns the number of frames that a call generates. It is 1 for images."""
    parameters = inspect.signature(stock_call).parameters
    latents: Any = arguments.get("latents")
    if getattr(latents, "ndim", 0) == 5:
        return latents.shape[2]  # a call that gets the latents of a video generates their frames
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


def text_arguments(arguments: dict) -> dict:
    """Returns the arguments that the call passes to `encode_prompt` for its prompts. They are used for queries too."""
    lora_scale = (arguments.get("cross_attention_kwargs") or {}).get("scale")
    return {"lora_scale": lora_scale, "clip_skip": arguments.get("clip_skip")}


def parse_subjects(subject: Any, num_prompts: int) -> list[request_ssr.Row]:
    """Reads the argument `subject` of a call: a [`SubjectEmbeds`], a dict of them by frame, or a list of these and `None`.
    Returns one row for all prompts, or one row for each prompt, all with the same keyframes. Raises a `ValueError` if it
    is something else, or if the rows do not fit together."""
    values = subject if isinstance(subject, list) else [subject]
    rows = [_parse_row(value, isinstance(subject, list)) for value in values]
    keyframes = {tuple(row) for row in rows if len(row) > 1}
    if len(keyframes) > 1:
        raise ValueError(
            f"`subject` has to have the same keyframes for all prompts, but they differ: {sorted(keyframes)}."
        )
    if keyframes:
        # a prompt without keyframes has the same subject, or none, at all of them
        (frames,) = keyframes
        rows = [row if len(row) > 1 else dict.fromkeys(frames, *row.values()) for row in rows]
        if not request_ssr.all_subjects(rows):
            raise ValueError("`subject` holds only None: leave it out to generate without a subject.")
        if any(s.counts is not None for s in request_ssr.all_subjects(rows)):
            raise ValueError(
                "`subject` cannot be compact with keyframes: the tokens of two keyframes do not correspond."
            )
    return check_one_for_each("`subject`", rows, num_prompts)


def parse_negative_subject(subject: Any, num_prompts: int, keyframes: list[int]) -> list[request_ssr.Row] | None:
    """Reads the argument `negative_subject` of a call, which has the same subjects at all keyframes of `subject`."""
    if subject is None:
        return None
    values = subject if isinstance(subject, list) else [subject]
    rows = [_parse_row(value, True, "negative_subject") for value in values]
    if any(len(row) > 1 for row in rows):
        raise ValueError("`negative_subject` cannot have keyframes.")
    rows = [dict.fromkeys(keyframes, *row.values()) for row in rows]
    return check_one_for_each("`negative_subject`", rows, num_prompts)


def check_one_for_each(names: str, rows: list, num_prompts: int) -> list:
    """Returns the list. Raises a `ValueError` if it has neither one subject nor one for each prompt."""
    if len(rows) not in (1, num_prompts):
        hint = ": for several subjects in one image, add them (`cat + car`)" if num_prompts == 1 else ""
        raise ValueError(
            f"{names} as a list has to hold one for each prompt, but holds {len(rows)} for {num_prompts}{hint}."
        )
    return rows


def _parse_row(subject: Any, none_is_allowed: bool, name: str = "subject") -> request_ssr.Row:
    keyframes = subject if isinstance(subject, dict) else {0: subject}
    if not keyframes or not all(map(internals_ssr.is_frame, keyframes)):
        raise ValueError(f"`subject` as a dict has to hold subjects by frame, 0 the first, but has {list(keyframes)}.")
    for value in keyframes.values():
        if not subject_embeds_ssr.is_subject_embeds(value) and not (
            value is None and (none_is_allowed or isinstance(subject, dict))
        ):
            raise ValueError(
                f"`{name}` has to be a SubjectEmbeds, a dict of them by frame, or a list of these and None, but holds"
                f" {type(value).__name__}."
            )
    shapes = {tuple(s.embeds.shape[1] for s in v.subjects) for v in keyframes.values() if v is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"`subject` has to have the same numbers of subjects and tokens at all keyframes: {sorted(shapes)}."
        )
    if not isinstance(subject, dict) or not shapes:
        return dict(sorted((int(frame), value) for frame, value in keyframes.items()))
    # `None` at a keyframe is the subject of another keyframe with scale 0, so that it fades in or out
    example = next(keyframes[frame] for frame in sorted(keyframes) if keyframes[frame] is not None)
    hidden = example.scaled(0.0)
    return {int(frame): hidden if keyframes[frame] is None else keyframes[frame] for frame in sorted(keyframes)}


def without_disabled_subjects(row: request_ssr.Row, scale: float | dict[str, float]) -> request_ssr.Row:
    """Returns the row without the subjects that have scale 0 at all keyframes. Multiplied by 0, their tokens would still
    take a part of the attention from the other subjects of the row."""
    present = [subjects.subjects for subjects in row.values() if subjects is not None]
    scales = [[request_ssr.scale_of(subject, scale) for subject in subjects] for subjects in present]
    kept = [index for index, values in enumerate(zip(*scales, strict=True)) if any(values)]
    if not scales or len(kept) == len(scales[0]):
        return row
    if not kept:
        return dict.fromkeys(row)
    return {
        frame: subjects and replace(subjects, subjects=tuple(subjects.subjects[index] for index in kept))
        for frame, subjects in row.items()
    }


def has_effect(rows: list[request_ssr.Row], scale: float | dict[str, float]) -> bool:
    """Returns whether any subject has a scale other than 0 in any layer."""
    scales = [request_ssr.scale_of(subject, scale) for subject in request_ssr.all_subjects(rows)]
    return any(scales) and (not isinstance(scale, dict) or any(scale.values()))
