"""Encoded subjects: the class that `encode_subject` returns and that the pipelines accept as `subject`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from . import files_ssr, images_ssr, internals_ssr


# the height and width of the mask of a region that is given as a box; the latents of an image of 1024 pixels have 128
_BOX_SHAPE = (256, 256)


@dataclass(frozen=True, eq=False, repr=False)
class Subject:
    r"""
    One subject of a [`SubjectEmbeds`].

    Args:
        embeds, negative_embeds (`torch.Tensor` of shape `(1, num_tokens, cross_attention_dim)`):
            The subject's tokens for the conditional and the unconditional branch of classifier-free guidance.
        query (`str`, defaults to `""`):
            The text that selected the subject.
        scale (`float`, *optional*):
            How strongly the subject affects the result. Defaults to the scale of the pipeline call.
        region (`torch.Tensor` of shape `(height, width)` or `(frames, height, width)`, *optional*):
            The part of the output in which the subject can appear, float32 from 0 to 1. By default everywhere.
        counts, negative_counts (`torch.Tensor` of shape `(1, num_tokens)`, *optional*):
            The number of original tokens that were merged into each token, float32. Defaults to one for each token.
    """

    embeds: torch.Tensor
    negative_embeds: torch.Tensor
    query: str = ""
    scale: float | None = None
    region: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    negative_counts: torch.Tensor | None = None

    def __repr__(self) -> str:
        query = self.query if len(self.query) <= 40 else self.query[:37] + "..."
        parts = [repr(query), *([] if self.scale is None else [f"scale {self.scale:g}"])]
        parts.append(f"{self.embeds.shape[1]} tokens")
        if self.region is not None:
            parts.append("region " + " x ".join(map(str, self.region.shape)))
        return f"Subject({', '.join(parts)})"


@dataclass(frozen=True, eq=False, repr=False)
class SubjectEmbeds:
    r"""
    One or several encoded subjects. They can be used any number of times without encoding them again.
    `encode_subject` returns them, `+` and `sum` combine several subjects for one image, and `save` and `load` store
    them in a safetensors file.

    Args:
        subjects (`tuple[Subject]`):
            The subjects.
        fingerprint (`torch.Tensor`, *optional*):
            The [`~SSREncoder.fingerprint`] of the SSR-Encoder that encoded the subjects. Pipelines use it to refuse
            subjects of another encoder. Without a fingerprint, there is no such check.

    Example:

    ```py
    >>> cat = pipe.encode_subject(photo, query="cat")
    >>> dog = pipe.encode_subject(another_photo, query="dog")
    >>> image = pipe("a cat and a dog", subject=cat.scaled(0.8) + dog.scaled(0.6)).images[0]
    ```
    """

    subjects: tuple[Subject, ...]
    fingerprint: torch.Tensor | None = None

    def __len__(self) -> int:
        """Returns the number of subjects."""
        return len(self.subjects)

    def __getitem__(self, index: int | slice) -> "SubjectEmbeds":
        """Returns one or several of the subjects. Iteration uses this method."""
        subjects = self.subjects[index]
        if not subjects:
            raise IndexError("There are no subjects in this slice.")
        return replace(self, subjects=subjects if isinstance(subjects, tuple) else (subjects,))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "SubjectEmbeds":
        """Returns the same subjects with their tokens on another device or in another precision, as `torch.Tensor.to`.
        Pipelines do this themselves."""

        def moved(subject: Subject) -> Subject:
            embeds, negative_embeds = (t.to(device, dtype) for t in (subject.embeds, subject.negative_embeds))
            return replace(subject, embeds=embeds, negative_embeds=negative_embeds)

        return replace(self, subjects=tuple(map(moved, self.subjects)))

    @classmethod
    def mean(cls, subjects: Sequence["SubjectEmbeds"]) -> "SubjectEmbeds":
        """Returns one subject from several reference images of it: the mean of their tokens. A step costs as much as with one
        image. `encode_subject([[a, b, c]], query="cat")` uses this method. Query, scale and region are those of the first.
        Raises a `ValueError` if the subjects come from different SSR-Encoders, differ in number or shape, or are compact.

        Example:

        ```py
        >>> cat = SubjectEmbeds.mean([SubjectEmbeds.load(file) for file in ("cat_1.safetensors", "cat_2.safetensors")])
        ```
        """
        if not subjects or not all(map(is_subject_embeds, subjects)):
            raise ValueError("`subjects` has to be a list of SubjectEmbeds, with at least one.")
        total = sum(subjects[1:], subjects[0])  # checks that they come from one SSR-Encoder
        shapes = {tuple(subject.embeds.shape for subject in part.subjects) for part in subjects}
        if len(shapes) > 1 or any(subject.counts is not None for subject in total.subjects):
            raise ValueError(
                "`subjects` have to have the same numbers of subjects and tokens, and not to be compact, but have"
                f" {sorted(shapes)}."
            )

        def mean(parts: tuple[Subject, ...]) -> Subject:
            embeds = torch.stack([part.embeds for part in parts]).mean(0)
            negative_embeds = torch.stack([part.negative_embeds for part in parts]).mean(0)
            return replace(parts[0], embeds=embeds, negative_embeds=negative_embeds)

        return cls(tuple(map(mean, zip(*(part.subjects for part in subjects), strict=True))), total.fingerprint)

    def scaled(self, scale: float) -> "SubjectEmbeds":
        r"""
        Returns the same subjects with another scale. It replaces the scale that they have: `cat.scaled(0.5).scaled(0.5)`
        has a scale of 0.5.

        Args:
            scale (`float`, or any other real number, such as `np.float32` or a tensor without dimensions):
                How strongly the subjects affect the result: 0 removes them, 0.5 to 0.8 is usual, and with 1 they have the same
                weight as the prompt. All subjects get this scale.

        Returns:
            [`SubjectEmbeds`] with this scale.

        Raises:
            `ValueError`: if `scale` is not a number from -100 to 100.

        Example:

        ```py
        >>> image = pipe("a cat in a spacesuit", subject=cat.scaled(0.8)).images[0]
        ```
        """
        scale = internals_ssr.check_scale("scale", scale)
        return replace(self, subjects=tuple(replace(subject, scale=scale) for subject in self.subjects))

    def inside(self, region: Any) -> "SubjectEmbeds":
        r"""
        Returns the same subjects, restricted to a region of the output.

        Args:
            region (`tuple`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `list` or `dict`):
                A box `(left, top, right, bottom)` in fractions from 0 to 1, or a mask of shape `(height, width)` that is
                white, or 1, in the part of the generated image in which the subject can appear. The aspect ratio of a
                mask should be that of the image. Only the prompt affects the rest of the image. A video can have one
                box or mask for each frame (a list, or an array of shape `(frames, height, width)`), or a dict of boxes
                by frame, which are interpolated between. The subject does not appear in frames with an empty mask.

        Returns:
            [`SubjectEmbeds`] with this region.

        Raises:
            `ValueError`: if `region` is not a valid mask, or marks nothing.

        Example:

        ```py
        >>> left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
        >>> image = pipe("a cat and a dog", subject=cat.inside(left) + dog.inside(right)).images[0]
        ```
        """
        values = torch.from_numpy(_region_values(region))
        return replace(self, subjects=tuple(replace(subject, region=values) for subject in self.subjects))

    def compact(self, num_tokens: int) -> "SubjectEmbeds":
        r"""
        Returns nearly the same subjects with fewer tokens, which makes generation faster. Similar tokens, such as most
        of the query's padding, are merged into one, which has the weight of all of them in the attention. The image
        changes slightly; docs/performance.md has measurements on the pocket checkpoint.

        Args:
            num_tokens (`int`):
                The maximum number of tokens of each subject. Stable Diffusion 1.5 subjects have 462 tokens. Subjects
                that do not have more tokens than this are not changed.

        Returns:
            [`SubjectEmbeds`] with at most `num_tokens` tokens for each subject.

        Raises:
            `ValueError`: if `num_tokens` is not a positive whole number.

        Example:

        ```py
        >>> image = pipe("a cat in a spacesuit", subject=cat.compact(48)).images[0]
        ```
        """
        count = internals_ssr.check_count("num_tokens", num_tokens)
        return replace(self, subjects=tuple(_compact(subject, count) for subject in self.subjects))

    def __repr__(self) -> str:
        subjects = [repr(subject) for subject in self.subjects[:4]]
        if len(self.subjects) > 4:
            subjects.append(f"... {len(self.subjects) - 4} more")
        where = {f"{subject.embeds.dtype}, {subject.embeds.device}" for subject in self.subjects}
        return f"SubjectEmbeds([{', '.join(subjects)}], {', '.join(sorted(where))})".replace("torch.", "")

    def __add__(self, other: "SubjectEmbeds") -> "SubjectEmbeds":
        """Combines the subjects of both, which then appear in one image (appendix of the paper on several subjects)."""
        if not is_subject_embeds(other):
            return NotImplemented
        if not same_fingerprint(self.fingerprint, other.fingerprint):
            raise ValueError("The subjects come from different SSR-Encoders and cannot be used together.")
        fingerprint = other.fingerprint if self.fingerprint is None else self.fingerprint
        return SubjectEmbeds(self.subjects + other.subjects, fingerprint)

    def __radd__(self, other: int) -> "SubjectEmbeds":
        """Returns the same subjects for `0 + subject`, with which `sum([cat, dog])` begins."""
        return self if type(other) is int and other == 0 else NotImplemented

    def save(self, path: str | os.PathLike) -> None:
        r"""
        Saves the subjects to one safetensors file, with their queries and scales in the metadata. The file is written
        whole or not at all.

        Args:
            path (`str` or `os.PathLike`):
                The file, usually ending in ".safetensors".

        Raises:
            `ValueError`: if `load` would not accept the file: tensors of more than 67 MB (for example regions of many
                frames), or values that are not finite or far from those of an encoder.
            `FileNotFoundError`: if the folder of the file does not exist.

        Example:

        ```py
        >>> cat.save("cat.safetensors")
        ```
        """
        tensors = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        for index, subject in enumerate(self.subjects):
            for name in files_ssr.SUBJECT_TENSORS:
                if getattr(subject, name) is not None:
                    tensors[f"{index}.{name}"] = getattr(subject, name)
        described = [{"query": subject.query, "scale": subject.scale} for subject in self.subjects]
        files_ssr.write_subject_file(path, described, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SubjectEmbeds":
        r"""
        Loads a file that was written by `save`. Files from strangers are safe to load: sizes and shapes are checked
        before memory is allocated, and then the values.

        Args:
            path (`str` or `os.PathLike`):
                The file.

        Returns:
            [`SubjectEmbeds`] on the CPU. Pipelines move them to their device.

        Raises:
            `FileNotFoundError`: if the file does not exist.
            `ValueError`: if the file is truncated, holds no subject, or has content that is not valid for subjects.

        Example:

        ```py
        >>> image = pipe("a cat on the beach", subject=SubjectEmbeds.load("cat.safetensors")).images[0]
        ```
        """
        described, tensors = files_ssr.read_subject_file(path)
        subjects = tuple(
            Subject(**{name: tensors.get(f"{index}.{name}") for name in files_ssr.SUBJECT_TENSORS}, **given)  # type: ignore[arg-type]
            for index, given in enumerate(described)
        )
        return cls(subjects, tensors.get("fingerprint"))


def _region_values(region: Any) -> np.ndarray:
    """Converts a region to an array of shape `(height, width)`, or `(frames, height, width)` for several frames, from
    0 to 1."""
    if isinstance(region, dict):
        region = _boxes_of_frames(region)
    if isinstance(region, (list, tuple)) and not images_ssr.is_box(region):
        names = [f"region[{index}]" for index in range(len(region))]
        frames = [_frame_values(frame, name) for frame, name in zip(region, names, strict=True)]
        shapes = {frame.shape for frame in frames}
        if len(shapes) != 1 or frames[0].ndim != 2:
            raise ValueError(
                "`region` as a list has to hold boxes, or masks of one size, one for each frame, but holds"
                f" {len(frames)} of {sorted(shapes)}."
            )
        values = np.stack(frames) if len(frames) > 1 else frames[0]
    else:
        values = _frame_values(region, "region")
    if not (values > 0.5).any():
        hint = images_ssr.hint_for_labels(region)
        raise ValueError(f"`region` is empty: it has to mark an area in at least one frame.{hint}")
    return values


def _frame_values(region: Any, name: str) -> np.ndarray:
    is_box = images_ssr.is_box(region)
    return images_ssr.box_values(region, _BOX_SHAPE, name) if is_box else images_ssr.mask_values(region, name)


def _boxes_of_frames(keyframes: dict) -> list[list[float]]:
    """Returns the box of each frame, up to the last keyframe. Between keyframes, boxes are interpolated."""
    frames = sorted(keyframes)
    if not frames or not all(internals_ssr.is_frame(f) and images_ssr.is_box(keyframes[f]) for f in frames):
        raise ValueError(f"`region` as a dict has to hold boxes by frame, 0 the first, but is {keyframes!r:.200}.")
    sides = zip(*(keyframes[frame] for frame in frames), strict=True)
    columns = [np.interp(range(frames[-1] + 1), frames, side) for side in sides]
    return [[float(value) for value in box] for box in zip(*columns, strict=True)]


def _compact(subject: Subject, num_tokens: int) -> Subject:
    if subject.embeds.shape[1] <= num_tokens:
        return subject
    embeds, counts = _merge_tokens(subject.embeds, subject.counts, num_tokens)
    negative_embeds, negative_counts = _merge_tokens(subject.negative_embeds, subject.negative_counts, num_tokens)
    return replace(
        subject, embeds=embeds, negative_embeds=negative_embeds, counts=counts, negative_counts=negative_counts
    )


def _merge_tokens(embeds: torch.Tensor, counts: torch.Tensor | None, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Merges the most similar tokens of shape `(1, length, width)` until `num_tokens` are left, and returns them with their
    counts. A merged token is the mean of its original tokens, and the softmax counts it as often as their number. Keys
    and values are linear in the tokens, so merging equal tokens does not change the result. The two tokens to merge next
    are selected by Ward's criterion: the pair with the smallest increase of the squared error."""
    tokens = embeds[0].detach().double().cpu()
    ones = torch.ones(len(tokens), dtype=torch.float64, device="cpu")
    weights = ones if counts is None else counts[0].double().cpu()
    cost = _cost(tokens, weights, tokens, weights)
    cost.fill_diagonal_(torch.inf)
    alive = torch.ones(len(tokens), dtype=torch.bool, device="cpu")
    for _ in range(len(tokens) - num_tokens):
        first, second = divmod(int(cost.argmin()), len(tokens))
        total = weights[first] + weights[second]
        tokens[first] = (weights[first] * tokens[first] + weights[second] * tokens[second]) / total
        weights[first] = total
        alive[second] = False
        cost[second], cost[:, second] = torch.inf, torch.inf
        row = _cost(tokens[[first]], weights[[first]], tokens, weights)[0]
        row[~alive], row[first] = torch.inf, torch.inf
        cost[first], cost[:, first] = row, row
    return tokens[alive][None].to(embeds), weights[alive][None].to(embeds.device, torch.float32)


def _cost(
    first: torch.Tensor, first_weights: torch.Tensor, second: torch.Tensor, second_weights: torch.Tensor
) -> torch.Tensor:
    """Returns Ward's criterion for each pair of tokens."""
    shared = first_weights[:, None] * second_weights / (first_weights[:, None] + second_weights)
    return shared * torch.cdist(first, second).square()


def is_subject_embeds(value) -> bool:
    """Whether `value` is a [`SubjectEmbeds`], also of another copy of this module: `custom_pipeline=` imports its own copy,
    so the name of the class is compared."""
    return isinstance(value, SubjectEmbeds) or type(value).__name__ == SubjectEmbeds.__name__


def same_fingerprint(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two fingerprints are of the same encoder, in any precision. `None` matches any fingerprint."""
    if first is None or second is None:
        return True
    if first.shape != second.shape:
        return False
    first, second = first.float().cpu(), second.float().cpu()
    # compared by row, because bfloat16 does not preserve single values that are small differences of large numbers;
    # float8 weights change a row by up to 5 %, and two trainings of the pocket's encoder differ by 36 % or more
    return bool(((first - second).norm(dim=-1) <= 0.1 * second.norm(dim=-1)).all())
