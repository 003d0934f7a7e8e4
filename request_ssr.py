"""Computes the keys and values of a call's subjects for the UNet's layers (section 3.3 of the paper)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from . import attention_processors, modeling_ssr, subject_embeds_ssr


# The subjects of one prompt: `{0: subjects}`, or for a video the subjects at each keyframe, ordered by frame. `None`
# is a prompt, or a keyframe, without a subject.
Row = dict[int, subject_embeds_ssr.SubjectEmbeds | None]

# The branches of guidance in the order of the UNet's batch, True for a conditional branch.
Branches = tuple[bool, ...]


@dataclass(eq=False)
class SubjectRequest:
    r"""
    The subjects of one call, with their keys and values.

    Args:
        rows (`list[dict[int, SubjectEmbeds | None]]`):
            One row for all prompts, or one row for each prompt. A row has the subjects by keyframe, `{0: subject}` for
            images.
        num_images (`int`, *optional*):
            The number of images (or videos) that the call generates: the number of prompts times the number of images
            per prompt. By default, it is read from the batch.
        encoder ([`SSREncoder`]):
            The encoder that projects the keys and values.
        dtype (`torch.dtype`):
            The UNet's precision. The pipelines set it again if a callback replaces the UNet.
        scale (`float` or `dict[str, float]`):
            The scale of subjects without their own scale, or a dict with a factor of all scales for each layer.
        branches (`Callable`):
            Returns the possible branches of guidance: one element if the pipeline says whether guidance is on. It is
            called for each forward pass, because a callback may switch guidance off or on.
        num_frames (`int`, *optional*, defaults to 1):
            The number of frames of each video; 1 for images.
        negative_rows (`list[dict[int, SubjectEmbeds | None]]`, *optional*):
            The subjects of the unconditional branch, one row for all prompts, or one row for each prompt. By default,
            and for `None`, it has the subjects' own `negative_embeds`.
    """

    rows: list[Row]
    num_images: int | None
    encoder: modeling_ssr.SSREncoder
    dtype: torch.dtype
    scale: float | dict[str, float]
    branches: Callable[[], list[Branches]]
    num_frames: int = 1
    negative_rows: list[Row] | None = None
    # whether the next step is inside the call's window
    active: bool = True
    # whether a callback is running, in which the UNet is stock
    in_callback: bool = False
    # the number of forward passes of the UNet, to notice if there is none
    passes: int = 0
    _prepared: dict = field(default_factory=dict, repr=False)

    def conditions(self, sample: torch.Tensor) -> attention_processors.SubjectConditions | None:
        """Returns the conditions for a forward pass of the UNet, or `None` outside the call's window and in callbacks.
        They are computed once per call, and again if the batch changes, for example if a callback switches guidance
        off. `sample` has shape `(batch_size, channels, height, width)`, for a video with frames after the channels."""
        if self.in_callback:
            return None
        self.passes += 1
        if not self.active:
            return None
        frames = sample.shape[2] if sample.ndim == 5 else 1
        branches = self._branches_of(sample.shape[0], "latents", self.branches())
        if self.negative_rows is not None and not self._prepared and all(branches):
            raise ValueError("`negative_subject` needs guidance: `guidance_scale` has to be greater than 1.")
        key = branches, sample.shape[0], frames, sample.device, self.dtype
        if key not in self._prepared:
            for row in [*self.rows, *(self.negative_rows or [])]:
                check_frames(row, frames)
                _check_regions(row, (sample.shape[-2], sample.shape[-1]))
            self._prepared[key] = self._prepare(branches, sample.shape[0] // len(branches), frames, sample.device)
        return self._prepared[key]

    def tokens(self, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """Returns the subject embeddings for a ControlNet's batch, of shape `(batch_size, num_subject_tokens, width)`,
        or `None` outside the call's window and in callbacks."""
        if not self.active or self.in_callback:
            return None
        # in guess mode, a ControlNet only gets the conditional branch
        branches = self._branches_of(batch_size // self.num_frames, "text", [*self.branches(), (True,)])
        embeds, _ = self._embeds(
            [(positive, subjects) for positive in branches for row in self.rows for subjects in row.values()], device
        )
        return embeds.repeat_interleave(batch_size // len(embeds), dim=0)

    def _branches_of(self, batch_size: int, what: str, possible: list[Branches]) -> Branches:
        """Returns the branches of guidance in a batch. A part of a batch (a wrapper of the UNet may split it) raises an
        error, because each row needs to be found in it."""
        for branches in possible:
            if batch_size == len(branches) * (self.num_images or max(batch_size // len(branches), 1)):
                return branches
        counts = " or ".join(str(len(branches)) for branches in possible)
        raise ValueError(
            f"The UNet gets a batch of {batch_size} {what} for {self.num_images or 'any'} images with {counts} branches of"
            " guidance each, so it is not known which of them have the subject. `image` and `latents` have to hold one image for"
            " each prompt, and the batch of a call must not be split or reduced."
        )

    @torch.no_grad()
    def _prepare(
        self, branches: Branches, num_images: int, frames: int, device: torch.device
    ) -> attention_processors.SubjectConditions:
        # 1. One entry for each branch, row and keyframe, in this order. The tokens of a negative subject are its
        # conditional tokens, in the unconditional branch.
        rows, keyframes = list(self.rows), list(self.rows[0])
        moving = len(keyframes) > 1
        negative_rows = self.negative_rows or [dict.fromkeys(keyframes)]
        count = max(len(rows), len(negative_rows))
        if num_images % count or count % len(rows) or count % len(negative_rows):
            raise ValueError(f"The subjects are for {count} prompts, but the UNet gets {num_images} images.")
        # with keyframes, each video needs its own row, because its frames become rows in the layers
        count = num_images if moving else count
        table = []
        for positive in branches:
            for index in range(count):
                negative = negative_rows[index * len(negative_rows) // count]
                has_negative = not positive and any(subjects is not None for subjects in negative.values())
                row = negative if has_negative else rows[index * len(rows) // count]
                table.append((positive or has_negative, row))
        entries = [(conditional, subjects) for conditional, row in table for subjects in row.values()]

        # 2. Tokens, keys and values. The tokens are on the device of the UNet's latents. With offloading, the encoder's
        # weights are moved to this device in `project`.
        embeds, lengths = self._embeds(entries, device)
        scales = torch.tensor([self._scale_of_values(subjects) for _, subjects in entries], device=device)
        pairs = {}
        projected = self.encoder.project(embeds)
        for name, (key, value) in zip(self.encoder.config.attention_layers, projected, strict=True):
            layer_scale = self.scale[name] if isinstance(self.scale, dict) else 1.0
            if layer_scale == 0:
                key, value = key[:, :0], value[:, :0]
            pair = key.to(self.dtype), (value * (scales[:, None, None] * layer_scale)).to(self.dtype)
            if moving:
                pair = pair[0].unflatten(0, (-1, len(keyframes))), pair[1].unflatten(0, (-1, len(keyframes)))
            pairs[name] = pair

        # 3. what the masks are made of
        regions = [_regions_of_row(row, frames) for _, row in table]
        has_regions = any(region is not None for row in regions for region in row)
        counts = _counts(entries, embeds.shape[1])
        token_subject = None
        if has_regions or len(set(map(sum, lengths))) > 1:
            token_subject = _token_subject(lengths[:: len(keyframes)], embeds.shape[1]).to(device)
        return attention_processors.SubjectConditions(
            pairs,
            token_subject,
            regions if has_regions else None,
            None if counts is None else counts[:: len(keyframes)].to(device),
            frames,
            torch.from_numpy(_places_between(keyframes, frames)).to(device) if moving else None,
        )

    def _embeds(
        self, entries: list[tuple[bool, subject_embeds_ssr.SubjectEmbeds | None]], device: torch.device
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Returns the tokens of each entry, padded to the same length, and the number of tokens of each of its
        subjects.

        If an entry has one subject, its scale is applied to the values of the layers (see `_scale_of_values`). If an
        entry has several subjects, the conditional tokens of each subject are multiplied by its scale. An entry without
        subjects has tokens of zeros: their values are zero, because the projections have no bias."""
        tokens, lengths = [], []
        for positive, subjects in entries:
            parts = () if subjects is None else subjects.subjects
            embeds = [(part.embeds if positive else part.negative_embeds).to(device) for part in parts]
            if positive and len(parts) > 1:
                embeds = [states * scale_of(part, self.scale) for states, part in zip(embeds, parts, strict=True)]
            tokens.append(torch.cat(embeds, dim=1) if embeds else None)
            lengths.append([states.shape[1] for states in embeds])
        longest = max(sum(parts) for parts in lengths)
        width = self.encoder.config.cross_attention_dim
        empty = torch.zeros(1, longest, width, device=device, dtype=self.encoder.dtype)
        padded = [empty if t is None else F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in tokens]
        return torch.cat(padded).to(self.encoder.dtype), [parts or [longest] for parts in lengths]

    def _scale_of_values(self, subjects: subject_embeds_ssr.SubjectEmbeds | None) -> float:
        """Returns the factor of an entry's values: the scale of a single subject. The tokens of several subjects are
        multiplied by their scales already, unless all scales are 0."""
        scales = [] if subjects is None else [scale_of(subject, self.scale) for subject in subjects.subjects]
        if len(scales) == 1:
            return scales[0]
        return 1.0 if any(scales) else 0.0


def scale_of(subject: subject_embeds_ssr.Subject, scale: float | dict[str, float]) -> float:
    """Returns the scale of a subject: its own one, or that of the call."""
    if subject.scale is not None:
        return subject.scale
    return 1.0 if isinstance(scale, dict) else scale


def all_subjects(rows: list[Row]) -> list[subject_embeds_ssr.Subject]:
    """Returns all subjects of the rows."""
    return [s for row in rows for subjects in row.values() if subjects is not None for s in subjects.subjects]


def check_frames(row: Row, frames: int) -> None:
    """Raises a `ValueError` if a row's keyframes or moving regions do not fit a video with `frames` frames (1 for an
    image)."""
    what = "an image has only frame 0" if frames == 1 else f"the video has {frames} frames, 0 to {frames - 1}"
    if max(row) >= frames:
        raise ValueError(f"`subject` has keyframes at {list(row)}, but {what}.")
    for subject in all_subjects([row]):
        masks = 1 if subject.region is None or subject.region.ndim == 2 else subject.region.shape[0]
        if masks not in (1, frames):
            raise ValueError(f"`subject` has a region of {masks} masks, one for each frame, but {what}.")


def _check_regions(row: Row, grid: tuple[int, int]) -> None:
    """Raises a `ValueError` if a region covers no position of the latents, so that its subject would not appear."""
    for subject in all_subjects([row]):
        if subject.region is not None and not attention_processors.fit_region(subject.region, grid).any():
            height, width = grid
            raise ValueError(
                f"`subject` has a region that covers no position of the latents ({height} x {width}) by more than half, so"
                " that the subject would not appear: use a larger region."
            )


def _places_between(keyframes: list[int], frames: int) -> np.ndarray:
    """Returns the position of each frame between the keyframes. For example, 1.25 is a quarter of the way from the
    second keyframe to the third."""
    return np.interp(range(frames), keyframes, range(len(keyframes))).astype(np.float32)


def _token_subject(lengths: list[list[int]], longest: int) -> torch.Tensor:
    """Returns the index of the subject in its row that each token belongs to, of shape `(num_rows, longest)`, with -1
    for padding."""
    owners = [[index for index, length in enumerate(parts) for _ in range(length)] for parts in lengths]
    padded = [[*row, *[-1] * (longest - len(row))] for row in owners]
    return torch.tensor(padded, device="cpu", dtype=torch.float32)


def _regions_of_row(row: Row, frames: int) -> list[torch.Tensor | None]:
    """Returns the region of each subject of a row over all frames, of shape `(1 or num_frames, height, width)`, or
    `None` for a subject that may appear everywhere. Each frame has the region of the nearest keyframe."""
    subjects = [value.subjects for value in row.values() if value is not None]
    regions = []
    for at_keyframes in zip(*subjects, strict=True):
        own = [None if s.region is None else s.region.reshape(-1, *s.region.shape[-2:]) for s in at_keyframes]
        if all(subject.region is at_keyframes[0].region for subject in at_keyframes):
            regions.append(own[0])
            continue
        size = next(region for region in own if region is not None).shape[-2:]
        masks = []
        for frame, place in enumerate(_places_between(list(row), frames)):
            region = own[int(place + 0.5)]
            region = torch.ones(1, *size, device="cpu", dtype=torch.float32) if region is None else region
            mask = region[min(frame, len(region) - 1)]
            masks.append(F.interpolate(mask[None, None], size, mode="nearest")[0, 0])
        regions.append(torch.stack(masks))
    return regions or [None]


def _counts(entries: list[tuple[bool, subject_embeds_ssr.SubjectEmbeds | None]], longest: int) -> torch.Tensor | None:
    """Returns how many times each token of each entry counts in the softmax, of shape `(len(entries), longest)`, or
    `None` if all tokens count once."""
    parts = [[] if subjects is None else subjects.subjects for _, subjects in entries]
    if all(subject.counts is None for subjects in parts for subject in subjects):
        return None
    counts = torch.ones(len(entries), longest, device="cpu", dtype=torch.float32)
    for row, (positive, _), subjects in zip(counts, entries, parts, strict=True):
        start = 0
        for subject in subjects:
            own = subject.counts if positive else subject.negative_counts
            length = subject.embeds.shape[1]
            if own is not None:
                row[start : start + length] = own[0]
            start += length
    return counts
