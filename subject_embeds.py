"""Encoded subjects: the class that `encode_subject` returns and that the pipelines accept as `subject`."""

import json
import numbers
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from . import file_utils, image_processing_ssr, subject_file, token_merging


# Far larger than useful scales. Larger values cause NaN in half precision.
MAX_SCALE = 100


@dataclass(frozen=True, eq=False, repr=False)
class Subject:
    r"""
    One subject of a [`SubjectEmbeds`].

    Args:
        embeds (`torch.Tensor` of shape `(1, num_tokens, cross_attention_dim)`):
            The subject's tokens.
        negative_embeds (`torch.Tensor` of shape `(1, num_tokens, cross_attention_dim)`):
            The subject's tokens for the unconditional branch of classifier-free guidance.
        query (`str`, defaults to `""`):
            The text that selected the subject.
        scale (`float`, *optional*):
            How strongly the subject is drawn. Defaults to the scale of the pipeline call.
        region (`torch.Tensor` of shape `(height, width)` or `(frames, height, width)`, *optional*):
            The part of the output in which the subject can appear, float32 from 0 to 1. It holds one mask for all
            frames or one mask for each frame. By default, the subject can appear everywhere.
        counts (`torch.Tensor` of shape `(1, num_tokens)`, *optional*):
            The number of original tokens that were merged into each token of `embeds`, float32. Defaults to one for
            each token.
        negative_counts (`torch.Tensor` of shape `(1, num_tokens)`, *optional*):
            The same for `negative_embeds`.
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
    One or several encoded subjects. They can be drawn any number of times without encoding them again.
    `encode_subject` returns them, `+` and `sum` combine several subjects for one picture, and `save` and `load` store
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

    def scaled(self, scale: float) -> "SubjectEmbeds":
        r"""
        Returns the same subjects with another scale.

        Args:
            scale (`float`, or any other real number, such as `np.float32` or a tensor without dimensions):
                How strongly the subjects are drawn: 0 removes them, 0.5 to 0.8 is usual, and with 1 they have the same
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
        scale = check_scale("scale", scale)
        return replace(self, subjects=tuple(replace(subject, scale=scale) for subject in self.subjects))

    def inside(self, region: Any) -> "SubjectEmbeds":
        r"""
        Returns the same subjects, restricted to a region of the output.

        Args:
            region (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor` of shape `(height, width)`, or `list`):
                A mask that is white, or 1, in the part of the generated picture in which the subject can appear. Its
                aspect ratio should be that of the picture. Only the prompt affects the rest of the picture. A video
                can have one mask for each frame: an array of shape `(frames, height, width)`, or a list of masks of
                the same size. The subject does not appear in frames with an empty mask. See
                [`~image_processing_ssr.mask_values`] for the accepted formats.

        Returns:
            [`SubjectEmbeds`] with this region.

        Raises:
            `ValueError`: if `region` is not a valid mask, marks nothing, has more than 33 million values, or more than
                32,768 rows, columns or frames.

        Example:

        ```py
        >>> left = np.zeros((512, 512))
        >>> left[:, :256] = 1
        >>> image = pipe("a cat and a dog", subject=cat.inside(left) + dog.inside(1 - left)).images[0]
        ```
        """
        values = torch.from_numpy(_region_values(region))
        return replace(self, subjects=tuple(replace(subject, region=values) for subject in self.subjects))

    def compact(self, num_tokens: int) -> "SubjectEmbeds":
        r"""
        Returns nearly the same subjects with fewer tokens, which makes generation faster. Similar tokens, such as most
        of the query's padding, are merged into one token. The attention counts it as often as the number of merged
        tokens. The picture changes slightly; docs/performance.md has measurements on the pocket checkpoint.

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
        count = check_count("num_tokens", num_tokens)
        return replace(self, subjects=tuple(_compact(subject, count) for subject in self.subjects))

    def __repr__(self) -> str:
        most = 4
        subjects = [repr(subject) for subject in self.subjects[:most]]
        if len(self.subjects) > most:
            subjects.append(f"... {len(self.subjects) - most} more")
        where = {f"{subject.embeds.dtype}, {subject.embeds.device}" for subject in self.subjects}
        return f"SubjectEmbeds([{', '.join(subjects)}], {', '.join(sorted(where))})".replace("torch.", "")

    def __add__(self, other: "SubjectEmbeds") -> "SubjectEmbeds":
        """Combines the subjects of both, to draw them in one picture (appendix of the paper on several subjects)."""
        if not is_subject_embeds(other):
            return NotImplemented
        if not same_fingerprint(self.fingerprint, other.fingerprint):
            raise ValueError("The subjects come from different SSR-Encoders and cannot be drawn together.")
        fingerprint = other.fingerprint if self.fingerprint is None else self.fingerprint
        return SubjectEmbeds(self.subjects + other.subjects, fingerprint)

    def __radd__(self, other: int) -> "SubjectEmbeds":
        """Returns the same subjects for `0 + subject`, with which `sum([cat, dog])` begins."""
        return self if type(other) is int and other == 0 else NotImplemented

    def save(self, path: str | os.PathLike) -> None:
        r"""
        Save the subjects to one safetensors file, with their queries and scales in the metadata. The file is written
        atomically: it is never incomplete, even if the disk is full or several threads save to the same path.

        Args:
            path (`str` or `os.PathLike`):
                The file, usually ending in ".safetensors".

        Raises:
            `ValueError`: if there are more than 64 subjects, if their tensors have more than 268 MB (for example with
                regions of many frames), or if `load` would not accept their values (NaN, or tokens beyond 1,000, which are
                far from those of any encoder) or their queries.
            `FileNotFoundError`: if the folder of the file does not exist.

        Example:

        ```py
        >>> cat.save("cat.safetensors")
        ```
        """
        tensors = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        for index, subject in enumerate(self.subjects):
            for name in subject_file.TENSORS:
                tensor = getattr(subject, name)
                if tensor is not None:
                    # cloned, because subjects can share a region, and safetensors refuses tensors that share memory
                    tensors[f"{index}.{name}"] = tensor.detach().cpu().contiguous().clone()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if len(self.subjects) > subject_file.MAX_SUBJECTS or size > subject_file.MAX_BYTES:
            raise ValueError(
                f"A file holds at most {subject_file.MAX_SUBJECTS} subjects and {subject_file.MAX_BYTES:,} bytes, but these are"
                f" {len(self.subjects)} and {size:,}: make their regions smaller, or save them one by one."
            )
        subjects = [{"query": subject.query, "scale": subject.scale} for subject in self.subjects]
        subject_file.check_content(subjects, tensors)
        with file_utils.atomic_file(path) as partial:
            save_file(tensors, partial, metadata={"format": subject_file.FORMAT, "subjects": json.dumps(subjects)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SubjectEmbeds":
        r"""
        Load a file that was written by `save`. Untrusted files are safe to load: the whole content is checked, and the
        sizes are checked before memory is allocated.

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
        described, tensors = subject_file.read_subject_file(path, check_scale)
        subjects = tuple(
            Subject(
                embeds=tensors[f"{index}.embeds"],
                negative_embeds=tensors[f"{index}.negative_embeds"],
                region=tensors.get(f"{index}.region"),
                counts=tensors.get(f"{index}.counts"),
                negative_counts=tensors.get(f"{index}.negative_counts"),
                **given,
            )
            for index, given in enumerate(described)
        )
        return cls(subjects, tensors.get("fingerprint"))


def _region_values(region: Any) -> np.ndarray:
    """Converts a region to an array of shape `(height, width)`, or `(frames, height, width)` for several frames, from
    0 to 1."""
    if isinstance(region, (list, tuple)):
        frames = [
            image_processing_ssr.mask_values(frame, f"region[{index}]", subject_file.MAX_REGION_VALUES)
            for index, frame in enumerate(region)
        ]
        shapes = {frame.shape for frame in frames}
        if len(shapes) != 1 or frames[0].ndim != 2 or len(frames) * frames[0].size > subject_file.MAX_REGION_VALUES:
            raise ValueError(
                f"`region` as a list has to hold masks of one size, one for each frame, of at most"
                f" {subject_file.MAX_REGION_VALUES:,} pixels in all, but holds {len(frames)} of {sorted(shapes)}."
            )
        values = np.stack(frames) if len(frames) > 1 else frames[0]
    else:
        values = image_processing_ssr.mask_values(region, "region", subject_file.MAX_REGION_VALUES)
    if max(values.shape) > subject_file.MAX_REGION_SIDE:
        raise ValueError(
            f"`region` has shape {values.shape}, but has to have at most {subject_file.MAX_REGION_SIDE:,} rows, columns"
            " and frames."
        )
    if not (values > 0.5).any():
        hint = image_processing_ssr.hint_for_labels(region)
        raise ValueError(f"`region` is empty: it has to mark an area in at least one frame.{hint}")
    return values


def _compact(subject: Subject, num_tokens: int) -> Subject:
    if subject.embeds.shape[1] <= num_tokens:
        return subject
    embeds, counts = token_merging.merge_tokens(subject.embeds, subject.counts, num_tokens)
    negative_embeds, negative_counts = token_merging.merge_tokens(
        subject.negative_embeds, subject.negative_counts, num_tokens
    )
    return replace(
        subject, embeds=embeds, negative_embeds=negative_embeds, counts=counts, negative_counts=negative_counts
    )


def is_subject_embeds(value) -> bool:
    """Whether `value` is a [`SubjectEmbeds`]. It can be of another copy of this module, because `custom_pipeline=`
    imports its own copy; the class name is compared for this reason."""
    return isinstance(value, SubjectEmbeds) or type(value).__name__ == SubjectEmbeds.__name__


def same_fingerprint(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two fingerprints are of the same encoder. They can be computed in different dtypes. `None` matches any
    fingerprint."""
    if first is None or second is None:
        return True
    if first.shape != second.shape:
        return False
    first, second = first.float().cpu(), second.float().cpu()
    # compared by row, because single values can be small differences of large numbers, which bfloat16 does not
    # preserve
    # float8 weights change a row by up to 5 %, and two trainings of the pocket's encoder differ by 36 % or more
    return bool(((first - second).norm(dim=-1) <= 0.1 * second.norm(dim=-1)).all())


def check_scale(name: str, scale: Any) -> float:
    r"""
    Checks a number that a user passes, such as a scale.

    Args:
        name (`str`):
            The name of the argument in error messages.
        scale (`float`, or any other real number):
            A number of Python or numpy, or an array or tensor without dimensions.

    Returns:
        `float`.

    Raises:
        `ValueError`: if it is not a number from -100 to 100.
    """
    number = _number(scale)
    # NaN fails the comparison
    if number is None or not abs(number) <= MAX_SCALE:
        raise ValueError(
            f"`{name}` has to be a number from {-MAX_SCALE:g} to {MAX_SCALE:g} (usually from 0 to 1), but is {scale!r}."
        )
    return float(number)


def check_count(name: str, count: Any) -> int:
    """Same as [`check_scale`], for positive integers. Returns an `int`."""
    number = _number(count)
    if not isinstance(number, numbers.Integral) or number < 1:
        raise ValueError(f"`{name}` has to be a positive whole number, but is {count!r}.")
    return int(number)


def _number(value: Any) -> Any:
    """Converts an array or tensor without dimensions to a Python number, and returns other numbers unchanged. Returns
    `None` for all other values, including booleans."""
    if getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    return value if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
