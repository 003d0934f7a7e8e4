"""Encoded subjects: the class that `encode_subject` returns and that the pipelines accept as `subject`."""

import json
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch

from . import images_ssr, internals_ssr


# The limits of a file of subjects, which can come from a stranger. A subject of Stable Diffusion 1.5 in full precision
# has 2.8 MB, and a region of 32 frames of 512 x 512 has 34 MB.
MAX_BYTES = 2**26
MAX_HEADER_BYTES = 2**20
# The largest number in the tokens of a subject. Tokens come out of a layer norm: with a width of 768, they are at most
# 27.7 times as large as its weights, which are near 1. With much larger values, the keys and values could exceed the
# largest number in half precision, and the image would be NaN.
MAX_TOKEN_VALUE = 1000.0

FORMAT = "ssr-subject-1"
_TENSORS = ("embeds", "negative_embeds", "region", "counts", "negative_counts")


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
            How strongly the subject affects the result. Defaults to the scale of the pipeline call.
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

    def scaled(self, scale: float) -> "SubjectEmbeds":
        r"""
        Returns the same subjects with another scale.

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
            region (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor` of shape `(height, width)`, or `list`):
                A mask that is white, or 1, in the part of the generated image in which the subject can appear. Its
                aspect ratio should be that of the image. Only the prompt affects the rest of the image. A video
                can have one mask for each frame: an array of shape `(frames, height, width)`, or a list of masks of
                the same size. The subject does not appear in frames with an empty mask. See
                [`~images_ssr.mask_values`] for the accepted formats.

        Returns:
            [`SubjectEmbeds`] with this region.

        Raises:
            `ValueError`: if `region` is not a valid mask, or marks nothing.

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
        tokens. The image changes slightly; docs/performance.md has measurements on the pocket checkpoint.

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
            for name in _TENSORS:
                if getattr(subject, name) is not None:
                    tensors[f"{index}.{name}"] = getattr(subject, name)
        # cloned, because subjects can share a region, and safetensors refuses tensors that share memory
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {
            "format": FORMAT,
            "subjects": json.dumps([{"query": s.query, "scale": s.scale} for s in self.subjects]),
        }
        try:
            _check_size(sum(tensor.nbytes for tensor in tensors.values()), len(json.dumps(metadata)))
            for name, tensor in tensors.items():
                _check_tensor(name, tensor)
        except ValueError as error:
            raise ValueError(f"These subjects cannot be saved: {error}.") from None
        with internals_ssr.atomic_file(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata=metadata)

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
        try:
            if not os.path.isfile(path) and os.path.exists(path):
                raise ValueError("it is not a regular file")
            # The file is read once, because another thread or process may replace it.
            with open(path, "rb") as file:
                start = file.read(8)
                header_bytes = int.from_bytes(start, "little")
                _check_size(os.fstat(file.fileno()).st_size, header_bytes)
                content = start + file.read(MAX_BYTES + MAX_HEADER_BYTES)
            header = json.loads(content[8 : 8 + header_bytes])
            described = _parse_metadata(header.pop("__metadata__", {}))
            _check_shapes({name: entry["shape"] for name, entry in header.items()}, len(described))
            tensors = safetensors.torch.load(content)
            for name, tensor in tensors.items():
                _check_tensor(name, tensor)
        except FileNotFoundError:
            raise
        except Exception as error:  # a parser that reads arbitrary bytes may raise anything
            reason = str(error).rstrip(".") or type(error).__name__
            raise ValueError(f"`path`: {os.fspath(path)!r} cannot be used as a file of subjects: {reason}.") from error
        subjects = tuple(
            Subject(**{name: tensors.get(f"{index}.{name}") for name in _TENSORS}, **given)  # type: ignore[arg-type]
            for index, given in enumerate(described)
        )
        return cls(subjects, tensors.get("fingerprint"))


def _check_size(num_bytes: int, header_bytes: int) -> None:
    if num_bytes > MAX_BYTES + MAX_HEADER_BYTES or header_bytes > MAX_HEADER_BYTES:
        raise ValueError(
            f"it has {num_bytes:,} bytes and a header of {header_bytes:,}, more than the {MAX_BYTES:,} and"
            f" {MAX_HEADER_BYTES:,} that are accepted"
        )


def _parse_metadata(metadata: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the query and scale of each subject in a file."""
    if metadata.get("format") != FORMAT:
        raise ValueError("`SubjectEmbeds.save` did not write it")
    subjects = json.loads(metadata.get("subjects", "null"))
    if not isinstance(subjects, list) or not subjects:
        raise ValueError("it has to describe at least one subject, but does not")
    for number, subject in enumerate(subjects):
        if not isinstance(subject, dict) or subject.keys() != {"query", "scale"}:
            raise ValueError(f"subject {number} has to have a query and a scale, but is {str(subject)[:80]}")
        if not isinstance(subject["query"], str):
            raise ValueError(f"the query of subject {number} is {subject['query']!r:.80}, not a text")
        if subject["scale"] is not None:
            subject["scale"] = internals_ssr.check_scale(f"scale of subject {number}", subject["scale"])
    return subjects


def _check_shapes(shapes: dict[str, list[int]], num_subjects: int) -> None:
    """Raises a `ValueError` if tensors of a file are missing or unknown, or have shapes that are not those of
    subjects."""
    known = {f"{number}.{name}" for number in range(num_subjects) for name in _TENSORS} | {"fingerprint"}
    for name in sorted(shapes.keys() - known):
        raise ValueError(f"it holds {name!r:.80}, which does not belong to a subject")
    widths = set()
    for number in range(num_subjects):
        embeds, negative, region, *counts = (shapes.get(f"{number}.{name}") for name in _TENSORS)
        if embeds is None or len(embeds) != 3 or embeds[0] != 1 or 0 in embeds or negative != embeds:
            raise ValueError(
                f"{number}.embeds and {number}.negative_embeds have to be of one shape, (1, num_tokens, width), but are"
                f" {embeds} and {negative}"
            )
        widths.add(embeds[2])
        if counts != [None, None] and counts != [embeds[:2], embeds[:2]]:
            raise ValueError(f"the counts of subject {number} have the shapes {counts}, but have to have {embeds[:2]}")
        if region is not None and (len(region) not in (2, 3) or 0 in region):
            raise ValueError(f"{number}.region has shape {region}, but has to be (height, width) or (frames, ...)")
    if len(widths) != 1:
        raise ValueError(f"its subjects are of different widths: {sorted(widths)}")
    fingerprint = shapes.get("fingerprint", [1, 1])
    if len(fingerprint) != 2 or 0 in fingerprint:
        raise ValueError(f"fingerprint has shape {fingerprint}, but has to have 2 dimensions")


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises a `ValueError` if the dtype or a value of a tensor is not one of a subject."""
    part = name.rpartition(".")[2]
    low, high = {
        "embeds": (-MAX_TOKEN_VALUE, MAX_TOKEN_VALUE),
        "negative_embeds": (-MAX_TOKEN_VALUE, MAX_TOKEN_VALUE),
        "region": (0.0, 1.0),
        "fingerprint": (-65504.0, 65504.0),
    }.get(part, (1.0, 65504.0))
    exact = part not in ("embeds", "negative_embeds")
    dtypes = (torch.float32,) if exact else (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is of type {tensor.dtype}")
    least, most = (float(value) for value in torch.aminmax(tensor))
    # comparisons with NaN are false
    if not (least >= low and most <= high):
        raise ValueError(f"{name} holds values from {least:g} to {most:g}, but has to hold {low:g} to {high:g}")
    if part == "region" and not most > 0.5:
        raise ValueError(f"{name} is empty")


def _region_values(region: Any) -> np.ndarray:
    """Converts a region to an array of shape `(height, width)`, or `(frames, height, width)` for several frames, from
    0 to 1."""
    if isinstance(region, (list, tuple)):
        frames = [images_ssr.mask_values(frame, f"region[{index}]") for index, frame in enumerate(region)]
        shapes = {frame.shape for frame in frames}
        if len(shapes) != 1 or frames[0].ndim != 2:
            raise ValueError(
                "`region` as a list has to hold masks of one size, one for each frame, but holds"
                f" {len(frames)} of {sorted(shapes)}."
            )
        values = np.stack(frames) if len(frames) > 1 else frames[0]
    else:
        values = images_ssr.mask_values(region, "region")
    if not (values > 0.5).any():
        hint = images_ssr.hint_for_labels(region)
        raise ValueError(f"`region` is empty: it has to mark an area in at least one frame.{hint}")
    return values


def _compact(subject: Subject, num_tokens: int) -> Subject:
    if subject.embeds.shape[1] <= num_tokens:
        return subject
    embeds, counts = _merge_tokens(subject.embeds, subject.counts, num_tokens)
    negative_embeds, negative_counts = _merge_tokens(subject.negative_embeds, subject.negative_counts, num_tokens)
    return replace(
        subject, embeds=embeds, negative_embeds=negative_embeds, counts=counts, negative_counts=negative_counts
    )


def _merge_tokens(
    embeds: torch.Tensor, counts: torch.Tensor | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
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
    # compared by row, because bfloat16 does not preserve single values that are small differences of large numbers;
    # float8 weights change a row by up to 5 %, and two trainings of the pocket's encoder differ by 36 % or more
    return bool(((first - second).norm(dim=-1) <= 0.1 * second.norm(dim=-1)).all())
