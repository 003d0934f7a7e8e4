"""Subjects, encoded: what `encode_subject` returns and the pipelines' `subject` argument takes."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import token_merging


FORMAT = "ssr-subject-1"
TENSORS = ("embeds", "negative_embeds", "region", "counts", "negative_counts")


@dataclass(frozen=True, eq=False)
class Subject:
    """One subject of a [`SubjectEmbeds`]: its tokens and those of nothing, each `(1, num_tokens, cross_attention_dim)`, the
    query that selected it, its scale (`None`: the call's), where in the output it may appear, `(height, width)` from 0
    to 1 (`None`: anywhere), and how many tokens each of its own stands for, `(1, num_tokens)` (`None`: itself)."""

    embeds: torch.Tensor
    negative_embeds: torch.Tensor
    query: str = ""
    scale: float | None = None
    region: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    negative_counts: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class SubjectEmbeds:
    r"""
    One or several subjects that were picked out of pictures, ready to be drawn any number of times without encoding them
    again. `encode_subject` makes one, `+` puts several into one picture, `save` and `load` keep it in a safetensors file.

    Args:
        subjects (`tuple[Subject]`):
            The subjects.
        fingerprint (`torch.Tensor`, *optional*):
            What the SSR-Encoder makes of a fixed input: it tells encoders apart. Without it anything is accepted.

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
        The same, more or less strongly drawn.

        Args:
            scale (`float`):
                0 leaves it out, 0.5 to 0.8 is usual, 1 draws it as strongly as the prompt. Of several subjects, each
                gets it.

        Returns:
            [`SubjectEmbeds`] with that scale.

        Raises:
            `ValueError`: if `scale` is not a number.

        Example:

        ```py
        >>> image = pipe("a cat in a spacesuit", subject=cat.scaled(0.8)).images[0]
        ```
        """
        scale = check_scale("scale", scale)
        return replace(self, subjects=tuple(replace(subject, scale=scale) for subject in self.subjects))

    def inside(self, region) -> "SubjectEmbeds":
        r"""
        The same, kept to a part of the output.

        Args:
            region (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor` of shape `(height, width)`):
                White, or 1, where in the drawn picture the subject may appear, of the picture's proportions. Elsewhere
                the prompt alone decides.

        Returns:
            [`SubjectEmbeds`] with that region.

        Raises:
            `ValueError`: if `region` is not a mask.

        Example:

        ```py
        >>> left = np.zeros((512, 512))
        >>> left[:, :256] = 1
        >>> image = pipe("a cat and a dog", subject=cat.inside(left) + dog.inside(1 - left)).images[0]
        ```
        """
        if isinstance(region, Image.Image):
            region = np.asarray(region.convert("L")) / 255.0
        region = torch.as_tensor(region) if isinstance(region, (np.ndarray, torch.Tensor)) else region
        if not isinstance(region, torch.Tensor) or region.ndim != 2:
            shape = getattr(region, "shape", type(region).__name__)
            raise ValueError(f"`region` has to be a mask of shape (height, width), but is {shape}.")
        region = region.detach().float().cpu()
        region = region / 255 if region.max() > 1 else region
        if not torch.isfinite(region).all() or region.min() < 0 or not (region > 0.5).any():
            raise ValueError("`region` has to hold values from 0 to 1 and to mark some place, but does not.")
        return replace(self, subjects=tuple(replace(subject, region=region) for subject in self.subjects))

    def compact(self, num_tokens: int) -> "SubjectEmbeds":
        r"""
        Nearly the same subject in fewer tokens, so that drawing costs less: tokens that are alike, most of the query's
        padding among them, become one that counts as often. The picture changes a little; docs/performance.md says by how
        much on the pocket checkpoint.

        Args:
            num_tokens (`int`):
                How many tokens each subject keeps, of 462 with Stable Diffusion 1.5; one that has no more stays as it is.

        Returns:
            [`SubjectEmbeds`] with at most so many tokens a subject.

        Raises:
            `ValueError`: if `num_tokens` is not a positive whole number.

        Example:

        ```py
        >>> image = pipe("a cat in a spacesuit", subject=cat.compact(48)).images[0]
        ```
        """
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
            raise ValueError(f"`num_tokens` has to be a positive whole number, but is {num_tokens!r}.")
        return replace(self, subjects=tuple(_compact(subject, num_tokens) for subject in self.subjects))

    def __add__(self, other: "SubjectEmbeds") -> "SubjectEmbeds":
        """All subjects of both, in one picture (appendix of the paper on several subjects)."""
        if not is_subject_embeds(other):
            return NotImplemented
        if not same_fingerprint(self.fingerprint, other.fingerprint):
            raise ValueError("The subjects come from different SSR-Encoders and cannot be drawn together.")
        fingerprint = other.fingerprint if self.fingerprint is None else self.fingerprint
        return SubjectEmbeds(self.subjects + other.subjects, fingerprint)

    def save(self, path: str | os.PathLike) -> None:
        r"""
        Write everything to one safetensors file, with the queries and scales in its metadata.

        Args:
            path (`str` or `os.PathLike`):
                The file, usually ending in ".safetensors".

        Example:

        ```py
        >>> cat.save("cat.safetensors")
        ```
        """
        tensors = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        for index, subject in enumerate(self.subjects):
            for name in TENSORS:
                tensor = getattr(subject, name)
                if tensor is not None:
                    tensors[f"{index}.{name}"] = tensor.detach().cpu().contiguous()
        subjects = [{"query": subject.query, "scale": subject.scale} for subject in self.subjects]
        partial = Path(f"{os.fspath(path)}.part")
        save_file(tensors, partial, metadata={"format": FORMAT, "subjects": json.dumps(subjects)})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SubjectEmbeds":
        r"""
        Read what `save` has written.

        Args:
            path (`str` or `os.PathLike`):
                The file.

        Returns:
            [`SubjectEmbeds`] on the CPU; pipelines move it where they run.

        Raises:
            `ValueError`: if the file is cut off or holds no subject.

        Example:

        ```py
        >>> image = pipe("a cat on the beach", subject=SubjectEmbeds.load("cat.safetensors")).images[0]
        ```
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"`path`: {path} is cut off or no safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"`path`: {path} holds no subject; `SubjectEmbeds.save` writes such files.")
        subjects = tuple(
            Subject(**{name: tensors.get(f"{index}.{name}") for name in TENSORS}, **described)
            for index, described in enumerate(json.loads(metadata["subjects"]))
        )
        for index, subject in enumerate(subjects):
            of_tokens = (subject.embeds, subject.negative_embeds, subject.counts, subject.negative_counts)
            lengths = {tensor.shape[1] for tensor in of_tokens if tensor is not None}
            if subject.embeds is None or subject.negative_embeds is None or len(lengths) != 1:
                raise ValueError(
                    f"`path`: {path} lacks tokens of its subject {index}, or holds other counts than tokens."
                )
        return cls(subjects, tensors.get("fingerprint"))


def _compact(subject: Subject, num_tokens: int) -> Subject:
    if subject.embeds.shape[1] <= num_tokens:
        return subject
    embeds, counts = token_merging.merge_tokens(subject.embeds, subject.counts, num_tokens)
    negative_embeds, negative_counts = token_merging.merge_tokens(
        subject.negative_embeds, subject.negative_counts, num_tokens
    )
    merged = {"embeds": embeds, "negative_embeds": negative_embeds, "counts": counts}
    return replace(subject, **merged, negative_counts=negative_counts)


def is_subject_embeds(value) -> bool:
    """Whether it is a [`SubjectEmbeds`], be it of another copy of this module: `custom_pipeline=` imports its own."""
    return isinstance(value, SubjectEmbeds) or type(value).__name__ == SubjectEmbeds.__name__


def same_fingerprint(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two fingerprints are of one encoder, whatever precision it ran in; an unknown one fits any."""
    if first is None or second is None:
        return True
    if first.shape != second.shape:
        return False
    first, second = first.float().cpu(), second.float().cpu()
    # by row: single numbers may be small differences of large ones, which bfloat16 loses
    return bool(((first - second).norm(dim=-1) <= 0.05 * second.norm(dim=-1)).all())


def check_scale(name: str, scale) -> float:
    """`scale` as a float; a `ValueError` that names the argument `name` if it is not a finite number."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not abs(scale) < float("inf"):
        raise ValueError(f"`{name}` has to be a number, usually from 0 to 1, but is {scale!r}.")
    return float(scale)
