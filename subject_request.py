"""Computes the keys and values of a call's subjects for the UNet's layers (section 3.3 of the paper)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from . import attention_processors, modeling_ssr, subject_embeds


@dataclass(frozen=True, eq=False)
class SubjectRow:
    """The subjects of one prompt: one [`SubjectEmbeds`] or `None`, or one for each keyframe of a video."""

    keyframes: tuple[subject_embeds.SubjectEmbeds | None, ...]
    frames: tuple[int, ...] = (0,)

    @property
    def example(self) -> subject_embeds.SubjectEmbeds | None:
        """The first keyframe that has a subject. Keyframes without a subject get the shape of this one."""
        return next((each for each in self.keyframes if each is not None), None)


@dataclass(eq=False)
class SubjectRequest:
    r"""
    The subjects of one call.

    Args:
        rows (`list[SubjectRow]`):
            One row for all prompts, or one row for each prompt.
        num_pictures (`int`):
            The number of pictures (or videos) that the call generates: the number of prompts times the number of
            pictures per prompt.
        encoder ([`SSREncoder`]):
            The encoder that projects the keys and values.
        dtype (`torch.dtype`):
            The UNet's precision.
        scale (`float` or `dict[str, float]`):
            The scale for all layers, or a dict with one scale for each layer. A number is only used for subjects that
            do not have their own scale. A dict is multiplied with the subjects' own scales.
        branches (`Callable`):
            A function that returns the branches of guidance in the order of the UNet's batch, `True` for a conditional
            branch. It is called for each forward pass, because a callback may switch guidance off or on. It returns a
            list of the possible cases, which has one element if the pipeline says whether guidance is on.
        num_frames (`int`, *optional*, defaults to 1):
            The number of frames of each video; 1 for pictures.
    """

    rows: list[SubjectRow]
    num_pictures: int
    encoder: modeling_ssr.SSREncoder
    dtype: torch.dtype
    scale: float | dict[str, float]
    branches: Callable[[], list[tuple[bool, ...]]]
    num_frames: int = 1
    # whether the next step is inside the call's window
    active: bool = True
    _prepared: dict = field(default_factory=dict, repr=False)
    # whether a forward pass of the UNet had all branches of all pictures; the batch of a ControlNet does not show this,
    # because in guess mode it is half of it also without a wrapper that splits it
    _whole_batch_seen: bool = False

    def conditions(self, sample: torch.Tensor) -> attention_processors.SubjectConditions | None:
        r"""
        Returns the conditions for a forward pass of the UNet. They are computed once per call, and again if the batch
        changes: if a callback switches guidance off, only the conditional branch remains.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)` or `(batch_size, channels, num_frames, height, width)`):
                The latents of the forward pass. Their batch size determines the branches of guidance.

        Returns:
            [`SubjectConditions`], or `None` outside the call's window.
        """
        if not self.active:
            return None
        frames = sample.shape[2] if sample.ndim == 5 else 1
        branches = self._branches_of(sample.shape[0], "latents", self.branches())
        if sample.shape[0] == len(branches) * self.num_pictures:
            self._whole_batch_seen = True
        key = branches, frames, sample.device
        if key not in self._prepared:
            for row in self.rows:
                check_regions(row, (sample.shape[-2], sample.shape[-1]))
            self._prepared[key] = self._prepare(branches, frames, sample.device)
        return self._prepared[key]

    def tokens(self, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """Returns the subject embeddings for a ControlNet's batch, of shape
        `(batch_size, num_subject_tokens, cross_attention_dim)`, or `None` outside the call's window."""
        if not self.active:
            return None
        # in guess mode, a ControlNet only gets the conditional branch
        branches = self._branches_of(batch_size // self.num_frames, "text", [*self.branches(), (True,)])
        embeds, _ = self._embeds(self._entries(branches), device)
        return embeds.repeat_interleave(batch_size // len(embeds), dim=0)

    def _branches_of(self, batch_size: int, what: str, possible: list[tuple[bool, ...]]) -> tuple[bool, ...]:
        """Returns the branches of guidance in a batch. A part of a batch (a wrapper of the UNet may split it) raises an
        error, because each row needs to be found in it."""
        for branches in possible:
            if batch_size == len(branches) * self.num_pictures:
                return branches
        if self._whole_batch_seen and len(possible) == 1 and len(self.rows) == 1 and not self._has_keyframes:
            # a callback removed some of the pictures, and all pictures have the same subject
            (branches,) = possible
            if batch_size and batch_size % len(branches) == 0 and batch_size < len(branches) * self.num_pictures:
                return branches
        counts = " or ".join(str(len(branches)) for branches in possible)
        raise ValueError(
            f"The UNet gets a batch of {batch_size} {what} for {self.num_pictures} pictures with {counts} branches of"
            " guidance each, so it is not known which of them have the subject. `image` and `latents` have"
            " to hold one picture for each prompt, the batch of a call must not be split, and a callback may only remove"
            " pictures if all of them have the same subject."
        )

    @property
    def _has_keyframes(self) -> bool:
        return any(len(row.frames) > 1 for row in self.rows)

    def _entries(
        self, branches: tuple[bool, ...]
    ) -> list[tuple[bool, SubjectRow, subject_embeds.SubjectEmbeds | None]]:
        """Returns the entries that need keys and values, as (branch, row, subjects). They are ordered by branch, then
        by row, then by keyframe."""
        rows = self.rows
        if self._has_keyframes:
            # each picture needs its own row here, because its frames become rows in the layers
            rows = [row for row in rows for _ in range(self.num_pictures // len(rows))]
        return [(positive, row, subjects) for positive in branches for row in rows for subjects in row.keyframes]

    @torch.no_grad()
    def _prepare(
        self, branches: tuple[bool, ...], frames: int, device: torch.device
    ) -> attention_processors.SubjectConditions:
        for row in self.rows:
            check_frames(row, frames)
        entries = self._entries(branches)
        embeds, lengths = self._embeds(entries, device)
        # The embeddings are on the device of the UNet's latents. With offloading, the encoder's weights are moved to
        # this device in `project`.
        projected = self.encoder.project(embeds)
        row_scales = torch.tensor([self._row_scale(*entry[1:]) for entry in entries], device=device)[:, None, None]
        num_keyframes = len(self.rows[0].frames)
        pairs = {}
        for name, (key, value) in zip(self.encoder.config.attention_layers, projected, strict=True):
            layer_scale = self.scale[name] if isinstance(self.scale, dict) else 1.0
            if layer_scale == 0:
                key, value = key[:, :0], value[:, :0]
            pair = key.to(self.dtype), (value * (row_scales * layer_scale)).to(self.dtype)
            pairs[name] = (
                tuple(each.unflatten(0, (-1, num_keyframes)) for each in pair) if self._has_keyframes else pair
            )

        regions, counts = _regions(entries, num_keyframes, frames), _counts(entries, embeds.shape[1])
        token_subject = None
        if regions is not None or len(set(map(sum, lengths))) > 1:
            token_subject = _token_subject(lengths[::num_keyframes], embeds.shape[1]).to(device)
        return attention_processors.SubjectConditions(
            pairs,
            token_subject,
            regions,
            None if counts is None else counts[::num_keyframes].to(device),
            frames,
            torch.from_numpy(_places_between(self.rows[0].frames, frames)).to(device) if self._has_keyframes else None,
        )

    def _embeds(self, entries: list, device: torch.device) -> tuple[torch.Tensor, list[list[int]]]:
        """Returns the tokens of each entry, padded to the same length, and the number of tokens of each of its
        subjects.

        If an entry has one subject, its scale is applied to the values of the layers (see `_row_scale`). If an entry
        has several subjects, the conditional tokens of each subject are multiplied by its scale, and the values of the
        layers are not scaled per subject."""
        tokens, lengths = [], []
        for positive, row, subjects in entries:
            parts = self._subjects_of(row, subjects)
            embeds = [(part.embeds if positive else part.negative_embeds).to(device) for part in parts]
            if positive and len(parts) > 1:
                embeds = [each * self._scale(part) for each, part in zip(embeds, parts, strict=True)]
            tokens.append(torch.cat(embeds, dim=1))
            lengths.append([each.shape[1] for each in embeds])
        longest = max(each.shape[1] for each in tokens)
        padded = [F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in tokens]
        return torch.cat(padded).to(self.encoder.dtype), lengths

    def _subjects_of(
        self, row: SubjectRow, subjects: subject_embeds.SubjectEmbeds | None
    ) -> tuple[subject_embeds.Subject, ...]:
        """Returns the subjects of an entry. For an entry without subjects, it returns those of another entry, because
        all entries need tokens. `_row_scale` sets the values of such an entry to 0."""
        others = row.example or next(each.example for each in self.rows if each.example is not None)
        if subjects is None and row.example is None:
            return others.subjects[:1]
        return (subjects or others).subjects

    def _scale(self, subject: subject_embeds.Subject) -> float:
        if subject.scale is not None:
            return subject.scale
        return 1.0 if isinstance(self.scale, dict) else self.scale

    def _row_scale(self, row: SubjectRow, subjects: subject_embeds.SubjectEmbeds | None) -> float:
        if subjects is None:
            return 0.0
        return self._scale(subjects.subjects[0]) if len(subjects.subjects) == 1 else 1.0


def without_disabled_subjects(row: SubjectRow, scale: float | dict[str, float]) -> SubjectRow:
    """Returns the row without the subjects that have scale 0 at all keyframes. Multiplied by 0, their tokens would still
    take a part of the attention from the other subjects of the row."""
    default = 1.0 if isinstance(scale, dict) else scale
    given = [each for each in row.keyframes if each is not None]
    scales = [[default if s.scale is None else s.scale for s in each.subjects] for each in given]
    kept = [index for index, each in enumerate(zip(*scales, strict=True)) if any(each)]
    if not given or len(kept) == len(scales[0]):
        return row
    if not kept:
        return replace(row, keyframes=tuple(None for _ in row.keyframes))
    return replace(
        row,
        keyframes=tuple(
            None if each is None else replace(each, subjects=tuple(each.subjects[index] for index in kept))
            for each in row.keyframes
        ),
    )


def check_frames(row: SubjectRow, frames: int) -> None:
    """Raises a `ValueError` if a row's keyframes or moving regions do not fit a video with `frames` frames (1 for a
    picture)."""
    what = "a picture has only frame 0" if frames == 1 else f"the video has {frames} frames, 0 to {frames - 1}"
    if row.frames[-1] >= frames:
        raise ValueError(f"`subject` has keyframes at {list(row.frames)}, but {what}.")
    for subjects in row.keyframes:
        for subject in subjects.subjects if subjects is not None else ():
            masks = 1 if subject.region is None or subject.region.ndim == 2 else subject.region.shape[0]
            if masks not in (1, frames):
                raise ValueError(f"`subject` has a region of {masks} masks, one for each frame, but {what}.")


def check_regions(row: SubjectRow, grid: tuple[int, int]) -> None:
    """Raises a `ValueError` if a region covers no position of the latents, so that its subject would not be drawn."""
    for subject in (s for each in row.keyframes if each is not None for s in each.subjects):
        if subject.region is not None and not attention_processors.fit_region(subject.region, grid).any():
            height, width = grid
            raise ValueError(
                f"`subject` has a region that covers no position of the latents ({height} x {width}) by more than half, so"
                " that the subject would not be drawn: use a larger region."
            )


def _places_between(keyframes: tuple[int, ...], frames: int) -> np.ndarray:
    """Returns the position of each frame between the keyframes. For example, 1.25 is a quarter of the way from the
    second keyframe to the third."""
    return np.interp(range(frames), keyframes, range(len(keyframes))).astype(np.float32)


def _token_subject(lengths: list[list[int]], longest: int) -> torch.Tensor:
    """Returns the index of the subject in its row that each token belongs to, of shape `(num_rows, longest)`, with -1
    for padding."""
    owners = torch.full((len(lengths), longest), -1.0, device="cpu", dtype=torch.float32)
    for row, each in zip(owners, lengths, strict=True):
        start = 0
        for index, length in enumerate(each):
            row[start : start + length] = index
            start += length
    return owners


def _regions(entries: list, num_keyframes: int, frames: int) -> list[list[torch.Tensor | None]] | None:
    """Returns the regions of each row's subjects, or `None` if all subjects may appear everywhere."""
    rows = []
    for first in range(0, len(entries), num_keyframes):
        keyframes = [entry[2] for entry in entries[first : first + num_keyframes]]
        row = entries[first][1]
        slots = 1 if row.example is None else len(row.example.subjects)
        regions = [
            [None if each is None else each.subjects[slot].region for each in keyframes] for slot in range(slots)
        ]
        rows.append([_region_of_frames(each, row.frames, frames) for each in regions])
    return rows if any(region is not None for row in rows for region in row) else None


def _region_of_frames(
    regions: list[torch.Tensor | None], keyframes: tuple[int, ...], frames: int
) -> torch.Tensor | None:
    """Combines the regions of one subject at its keyframes into one region, in which each frame has the region of the
    nearest keyframe. Its shape is `(1 or num_frames, height, width)`."""
    given = [region if region is None or region.ndim == 3 else region[None] for region in regions]
    if all(region is regions[0] for region in regions):
        return given[0]
    size = next(region for region in given if region is not None).shape[-2:]
    masks = []
    for frame, place in enumerate(_places_between(keyframes, frames)):
        region = given[int(place + 0.5)]
        region = torch.ones(1, *size, device="cpu", dtype=torch.float32) if region is None else region
        mask = region[min(frame, len(region) - 1)]
        masks.append(F.interpolate(mask[None, None], size, mode="nearest")[0, 0])
    return torch.stack(masks)


def _counts(entries: list, longest: int) -> torch.Tensor | None:
    """Returns how many times each token of each entry counts in the softmax, of shape `(len(entries), longest)`, or
    `None` if all tokens count once."""
    given = [each.subjects for _, _, each in entries if each is not None]
    if all(subject.counts is None for subjects in given for subject in subjects):
        return None
    stacked = torch.ones(len(entries), longest, device="cpu", dtype=torch.float32)
    for counts, (positive, _, subjects) in zip(stacked, entries, strict=True):
        start = 0
        for subject in subjects.subjects if subjects is not None else ():
            own = subject.counts if positive else subject.negative_counts
            length = subject.embeds.shape[1]
            if own is not None:
                counts[start : start + length] = own[0]
            start += length
    return stacked
