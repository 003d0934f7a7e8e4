"""Adds a subject to the UNet's cross-attention (equation 5 of the paper), with any attention processor."""

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn


class LayerSubject(NamedTuple):
    """The subject for one cross-attention layer. `key` and `value` have the shape `(num_rows, num_tokens, width)`, and the
    values are multiplied by the scale. `mask` is added to the logits (or is boolean: the tokens that a position may attend to),
    `(num_rows, 1, num_positions or 1, num_tokens)`. `reached` is 1 at each position where a subject may appear,
    `(num_rows, num_positions, 1)`. Consecutive pictures or frames share a row."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    reached: torch.Tensor | None = None


class TextAndSubject(NamedTuple):
    """Passed as `encoder_hidden_states` from a transformer to the cross-attention inside it: the hidden states of the text (and
    of an IP-Adapter, if there is one) and the layer's subject."""

    text: torch.Tensor | tuple
    subject: LayerSubject


class _Visit:
    """The state of one forward pass of one layer: the queries so far, and whether the subject was added."""

    def __init__(self, attn: Attention, subject: LayerSubject):
        self.heads, self.scale = attn.heads, attn.scale
        self.subject = subject
        self.query: torch.Tensor | None = None
        self.num_queries = self.num_outputs = 0
        self.added = False

    def problem(self) -> str | None:
        """The reason why the subject was not added as in equation 5, or `None` if it was."""
        if self.num_queries != 1:
            return f"it computes queries with a `to_q` {self.num_queries} times instead of once"
        if self.num_outputs != 1:
            return f"it calls the output projection `to_out[0]` {self.num_outputs} times instead of once"
        return None if self.added else "what it projects has another shape than its queries"


class SSRAttnProcessor2_0:
    r"""
    Attends to the subject in addition to the text (section 3.3 of the paper, equation 5):

        Z = Attention(Q, K_text, V_text) + Attention(Q, K_subject, V_subject)

    It uses the layer's queries, heads, scale and output projection. It does not replace the layer's processor (plain, sliced,
    fused, IP-Adapter, Custom Diffusion, or your own), which computes the first term. Forward hooks add the second term. They are
    on the layer itself (`enter` and `leave`), on its query projection (`keep_query`), and on its output projection
    (`add_subject`).

    One object is used for all layers of all UNets. It has no weights, and stores the state of a forward pass by thread.
    `torch.compile` can therefore use one compiled block for all layers of the same width.
    """

    def __init__(self):
        self.visits: dict[int, _Visit] = {}

    def enter(self, attn: Attention, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Forward pre-hook of a cross-attention layer: removes the subject from `encoder_hidden_states`, so that the layer's
        processor gets only the text. Without a subject, this hook and the hooks below do nothing."""
        # an interrupted forward pass of this thread may have left its state
        self.visits.pop(_thread(), None)
        if kwargs is None or not isinstance(kwargs.get("encoder_hidden_states"), TextAndSubject):
            return None
        text, subject = kwargs["encoder_hidden_states"]
        if subject.key.shape[1] > 0:
            self.visits[_thread()] = _Visit(attn, subject)
        return args, {**kwargs, "encoder_hidden_states": text}

    # If one thread removes hooks while another thread, without a subject, runs the module, torch still calls the hooks that it
    # has already looked up, and may call them without `kwargs`. The defaults are for this case.

    def keep_query(self, to_q: nn.Module, args: tuple, kwargs: dict | None = None, query=None) -> None:
        """Forward hook of a query projection: stores the queries."""
        visit = self.visits.get(_thread())
        if visit is not None:
            visit.query = query
            visit.num_queries += 1

    def add_subject(self, to_out: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Forward pre-hook of an output projection: adds the subject's attention to the output of the layer's own
        processor."""
        visit = self.visits.get(_thread())
        if visit is None or kwargs is None:
            return None
        visit.num_outputs += 1
        if visit.query is None or not args or args[0].shape != visit.query.shape:
            return None
        visit.added = True
        return (args[0] + attend_to_subject(visit.query, visit.subject, visit.heads, visit.scale), *args[1:]), kwargs

    def forget(self) -> None:
        """Remove the state of an interrupted forward pass of this thread."""
        self.visits.pop(_thread(), None)

    def leave(self, attn: Attention, args: tuple, kwargs: dict | None = None, output=None) -> None:
        """Forward hook of a cross-attention layer: raises an error if the subject was not added exactly once."""
        visit = self.visits.pop(_thread(), None)
        problem = None if visit is None or output is None else visit.problem()
        if problem is not None:
            raise ValueError(
                f"A subject cannot act with the attention processor {type(attn.processor).__name__}: {problem}."
            )


def attend_to_subject(query: torch.Tensor, subject: LayerSubject, heads: int, scale: float) -> torch.Tensor:
    """The second term of equation 5 for queries of shape `(batch_size, sequence_length, width)`, in the same shape."""
    # consecutive pictures and frames of a row become queries of one attention, so keys and values are not repeated
    rows = subject.key.shape[0]
    if query.shape[0] % rows:
        raise ValueError(f"The UNet's layers got a batch of {query.shape[0]} for {rows} rows of subjects.")
    positions = query.unflatten(0, (rows, -1)).flatten(1, 2)
    if subject.mask is not None and subject.mask.shape[2] not in (1, positions.shape[1]):
        raise ValueError(
            f"A subject with a region needs layers whose positions form the picture's grid, but one has"
            f" {query.shape[1]} positions instead: something merges them (ToMe's `merge_crossattn`)."
        )
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (positions, subject.key, subject.value))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=subject.mask, scale=scale).transpose(1, 2).flatten(2)
    if subject.reached is not None:
        found = found * subject.reached
    return found.unflatten(1, (-1, query.shape[1])).flatten(0, 1)


@dataclass(eq=False)
class SubjectConditions:
    r"""
    The subjects for the UNet's cross-attention layers, passed as `cross_attention_kwargs["ssr_subject"]`.

    Args:
        pairs (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            Key and value for each layer by name, each of shape `(num_rows, num_subject_tokens, width)`, or with keyframes
            `(num_rows, num_keyframes, num_subject_tokens, width)`. The values are multiplied by the scale. In a layer whose pair
            has no tokens, the subject does not act. A row is used for one or several consecutive pictures or videos of the batch.
        token_subject (`torch.Tensor` of shape `(num_rows, num_subject_tokens)`, *optional*):
            The index of the subject that each token belongs to, with -1 for padding. It is needed if rows differ in length or
            if there are regions.
        regions (`list[list[torch.Tensor | None]]`, *optional*):
            The region of each subject of each row: 1 where it may appear and 0 elsewhere, of shape `(1, height, width)`, or
            `(num_frames, height, width)` for a region that moves. `None` is the whole output.
        counts (`torch.Tensor` of shape `(num_rows, num_subject_tokens)`, *optional*):
            How many times each token counts in the softmax. Defaults to once.
        frames (`int`, defaults to 1):
            The number of frames of each video.
        keyframes (`torch.Tensor` of shape `(num_frames,)`, *optional*):
            The position of each frame between the keyframes: 1.25 is a quarter of the way from the second to the third.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    token_subject: torch.Tensor | None = None
    regions: list[list[torch.Tensor | None]] | None = None
    counts: torch.Tensor | None = None
    frames: int = 1
    keyframes: torch.Tensor | None = None
    _masks: dict = field(default_factory=dict, repr=False)

    def for_layer(self, name: str, batch_size: int, grid: tuple[int, int]) -> LayerSubject:
        r"""
        The subject for one layer.

        Args:
            name (`str`):
                The layer's name in the UNet.
            batch_size (`int`):
                The number of pictures (or frames of videos) in the layer's batch.
            grid (`tuple[int, int]`):
                The height and width of the layer's input.
        """
        key, value = self.pairs[name]
        if self.keyframes is not None:
            key, value = (_between_keyframes(states, self.keyframes) for states in (key, value))
        per_row = batch_size // key.shape[0]
        return LayerSubject(key, value, *self._mask(per_row, grid))

    def _mask(self, per_row: int, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`LayerSubject.mask` and `LayerSubject.reached`, computed once for each grid."""
        known = self._masks.get((per_row, grid))
        if known is None:
            known = self._make_mask(per_row, grid)
            # in a compiled graph the tensors belong to that graph's run
            if not torch.compiler.is_dynamo_compiling():
                self._masks[per_row, grid] = known
        return known

    def _make_mask(self, per_row: int, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        allowed, reached = self._allowed(per_row, grid)
        if self.counts is not None:
            # a key that counts n times adds n times its exponential to the softmax
            bias = self.counts.log()[:, None, None, :].to(self._dtype)
            allowed = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
        if self.keyframes is None:
            return allowed, reached
        # with keyframes, each frame is its own row
        return _frames_as_rows(allowed, self.frames, 2), _frames_as_rows(reached, self.frames, 1)

    def _allowed(self, per_row: int, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.token_subject is None:
            return None, None
        present = self.token_subject[:, None, None, :] >= 0
        if self.regions is None:
            return present, None
        fitted = self._fit_regions(self.regions, grid, self.token_subject.device)
        index = self.token_subject.clamp(min=0).long()[:, :, None].expand(-1, -1, fitted.shape[2])
        allowed = fitted.gather(1, index).transpose(1, 2)[:, None] & present
        reached = allowed.any(-1)
        # a position outside all regions attends to all subjects, and its result is then set to 0: a row of the softmax without
        # any token would be NaN
        allowed = allowed | ~reached[..., None] & present
        repeats = per_row // self.frames if self.keyframes is None else 1
        reached = reached[:, 0, :, None].to(self._dtype)
        return allowed.repeat(1, 1, repeats, 1), reached.repeat(1, repeats, 1)

    def _fit_regions(
        self, regions: list[list[torch.Tensor | None]], grid: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        """The regions on a layer's own grid, `(num_rows, num_subjects, frames * positions)`, as booleans: this is where a
        region is applied."""
        everywhere = torch.ones(1, self.frames * grid[0] * grid[1], dtype=torch.bool, device=device)
        slots = max(map(len, regions))
        rows = []
        for row in regions:
            fitted = [everywhere[0] if region is None else self._fit(region, grid, device) for region in row]
            rows.append(torch.stack(fitted + [everywhere[0]] * (slots - len(row))))
        return torch.stack(rows)

    def _fit(self, region: torch.Tensor, grid: tuple[int, int], device) -> torch.Tensor:
        fitted = F.adaptive_avg_pool2d(region.to(device)[None], grid)[0] > 0.5
        return fitted.expand(self.frames, -1, -1).flatten()

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.pairs.values()))[0].dtype


def _between_keyframes(states: torch.Tensor, keyframes: torch.Tensor) -> torch.Tensor:
    """Interpolate keys or values of keyframes, `(num_rows, num_keyframes, ...)`, to frames, `(num_rows * frames, ...)`."""
    before = keyframes.floor().long()
    after = (before + 1).clamp(max=states.shape[1] - 1)
    share = (keyframes - before).to(states.dtype)[:, None, None]
    return torch.lerp(states[:, before], states[:, after], share).flatten(0, 1)


def _frames_as_rows(states: torch.Tensor | None, frames: int, dim: int) -> torch.Tensor | None:
    """Reshape `(num_rows, ..., frames * positions, ...)` to `(num_rows * frames, ..., positions, ...)`."""
    if states is None:
        return None
    if states.shape[dim] == 1:
        return states.repeat_interleave(frames, dim=0)
    return states.unflatten(dim, (frames, -1)).movedim(dim, 1).flatten(0, 1)


def _thread() -> int:
    """The id of this thread. In compiled code, which runs a layer and its projections in one piece, it is always 0."""
    # not `is_compiling`, which is also true in other threads while one thread compiles
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()
