"""Adds a subject's attention to the UNet's cross-attention layers (equation 5 of the paper), with any processor."""

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn


class LayerSubject(NamedTuple):
    """The subject tokens that one cross-attention layer attends to in addition to the text.

    `key` and `value` have the shape `(num_rows, num_tokens, width)`; the values are already multiplied by the scale.
    `mask` has the shape `(num_rows, 1, num_positions or 1, num_tokens)`: a float mask is added to the logits, and a
    boolean mask is True for the tokens that a position may attend to. `reached`, of shape
    `(num_rows, num_positions, 1)`, is 1 at each position where a subject may appear. Several consecutive pictures or
    frames of the batch can share a row."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    reached: torch.Tensor | None = None


class TextAndSubject(NamedTuple):
    """Replaces `encoder_hidden_states` between a transformer and its cross-attention layer. It holds the text's hidden
    states (with those of an IP-Adapter, if one is loaded) and the layer's subject."""

    text: torch.Tensor | tuple
    subject: LayerSubject


class _Visit:
    """The state of one forward pass of one layer: the queries that its processor computed, and whether the subject was
    added to its output."""

    def __init__(self, attn: Attention, subject: LayerSubject):
        self.heads, self.scale = attn.heads, attn.scale
        self.subject = subject
        self.query: torch.Tensor | None = None
        self.num_queries = self.num_outputs = 0
        self.added = False

    def problem(self) -> str | None:
        """Returns why the subject was not added as in equation 5, or `None` if it was."""
        if self.num_queries == self.num_outputs == 0:
            return (
                "it uses neither `to_q` nor `to_out[0]`, or a cache of cross-attention outputs skipped the layer (Pyramid"
                " Attention Broadcast can be used with other layers than cross-attention)"
            )
        if self.num_queries != 1:
            return f"it computes queries with a `to_q` {self.num_queries} times instead of once"
        if self.num_outputs != 1:
            return f"it calls the output projection `to_out[0]` {self.num_outputs} times instead of once"
        return None if self.added else "what it projects has another shape than its queries"


class SSRAttnProcessor2_0:
    r"""
    Attends to the subject in addition to the text (section 3.3 of the paper, equation 5):

        Z = Attention(Q, K_text, V_text) + Attention(Q, K_subject, V_subject)

    Both terms use the layer's queries, heads and scale, and the sum goes through the layer's output projection. This
    class does not replace the layer's attention processor. The layer keeps its own processor (plain, sliced, fused,
    IP-Adapter, Custom Diffusion or user-defined), which computes the first term. Forward hooks add the second term.
    They are registered on three modules: the layer (`enter` and `leave`), its query projection (`keep_query`) and its
    output projection (`add_subject`).

    One object is used for all layers of all UNets, because it has no weights and keeps the state of a forward pass
    separately for each thread. This allows `torch.compile` to reuse one compiled block for all layers of the same
    width.
    """

    def __init__(self):
        self.visits: dict[int, _Visit] = {}

    def enter(self, attn: Attention, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Forward pre-hook of a cross-attention layer. Takes the subject out of `encoder_hidden_states`, so that the
        layer's processor gets only the text. Without a subject, this hook and the hooks below do nothing."""
        # an interrupted forward pass of this thread may not have removed its visit
        self.visits.pop(_thread(), None)
        if kwargs is None or not isinstance(kwargs.get("encoder_hidden_states"), TextAndSubject):
            return None
        text, subject = kwargs["encoder_hidden_states"]
        if subject.key.shape[1] > 0:
            self.visits[_thread()] = _Visit(attn, subject)
        return args, {**kwargs, "encoder_hidden_states": text}

    # `kwargs` and the last arguments have defaults because of threads: if one thread removes the hooks while another
    # thread (without a subject) runs the same module, torch still calls the hooks it has already looked up, possibly
    # without `kwargs`.

    def keep_query(self, to_q: nn.Module, args: tuple, kwargs: dict | None = None, query=None) -> None:
        """Forward hook of a query projection. Stores the queries."""
        visit = self.visits.get(_thread())
        if visit is not None:
            visit.query = query
            visit.num_queries += 1

    def add_subject(self, to_out: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Forward pre-hook of an output projection. Adds the attention to the subject to the hidden states that the
        layer's processor computed."""
        visit = self.visits.get(_thread())
        if visit is None or kwargs is None:
            return None
        visit.num_outputs += 1
        if visit.query is None or not args or args[0].shape != visit.query.shape:
            return None
        visit.added = True
        return (args[0] + attend_to_subject(visit.query, visit.subject, visit.heads, visit.scale), *args[1:]), kwargs

    def forget(self) -> None:
        """Removes the state that an interrupted forward pass of this thread left."""
        self.visits.pop(_thread(), None)

    def leave(self, attn: Attention, args: tuple, kwargs: dict | None = None, output=None) -> None:
        """Forward hook of a cross-attention layer. Raises a `ValueError` if the subject was not added exactly once in
        this forward pass."""
        visit = self.visits.pop(_thread(), None)
        problem = None if visit is None or output is None else visit.problem()
        if problem is not None:
            raise ValueError(
                f"A subject cannot be used with the attention processor {type(attn.processor).__name__}: {problem}."
            )


def attend_to_subject(query: torch.Tensor, subject: LayerSubject, heads: int, scale: float) -> torch.Tensor:
    """Returns the second term of equation 5 for queries of shape `(batch_size, sequence_length, width)`, in the same
    shape."""
    # The queries of all pictures and frames of a row are concatenated, so that keys and values need not be repeated.
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
    The subjects of a forward pass. They are passed to the UNet's cross-attention layers as
    `cross_attention_kwargs["ssr_subject"]`.

    Args:
        pairs (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            Key and value for each layer name, each of shape `(num_rows, num_subject_tokens, width)`, or
            `(num_rows, num_keyframes, num_subject_tokens, width)` with keyframes. The values are already multiplied by
            the scale. A layer with zero tokens is not changed. A row is used for one picture or video, or for several
            consecutive ones in the batch.
        token_subject (`torch.Tensor` of shape `(num_rows, num_subject_tokens)`, *optional*):
            The index of the subject in its row that each token belongs to, -1 for padding. Required if the rows have
            different numbers of tokens or if there are regions.
        regions (`list[list[torch.Tensor | None]]`, *optional*):
            For each row and each of its subjects, a mask of where in the output the subject may appear: 1 inside and 0
            outside. The shape is `(1, height, width)`, or `(num_frames, height, width)` for a region that moves.
            `None` allows the subject everywhere.
        counts (`torch.Tensor` of shape `(num_rows, num_subject_tokens)`, *optional*):
            How many times each token counts in the softmax. By default each token counts once.
        frames (`int`, defaults to 1):
            Number of frames of each video.
        keyframes (`torch.Tensor` of shape `(num_frames,)`, *optional*):
            The position of each frame between the keyframes. For example, 1.25 is a quarter of the way from the second
            keyframe to the third.
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
        Returns the subject tokens and masks of one layer.

        Args:
            name (`str`):
                The layer's name in the UNet.
            batch_size (`int`):
                The number of pictures (or frames, for videos) in the layer's batch.
            grid (`tuple[int, int]`):
                The height and width of the layer's grid of positions.
        """
        key, value = self.pairs[name]
        if self.keyframes is not None:
            key, value = (_between_keyframes(states, self.keyframes) for states in (key, value))
        per_row = batch_size // key.shape[0]
        return LayerSubject(key, value, *self._mask(per_row, grid))

    def _mask(self, per_row: int, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns `LayerSubject.mask` and `LayerSubject.reached`. They are computed once for each grid."""
        known = self._masks.get((per_row, grid))
        if known is None:
            known = self._make_mask(per_row, grid)
            # tensors made inside a compiled graph are only valid during that run of the graph
            if not torch.compiler.is_dynamo_compiling():
                self._masks[per_row, grid] = known
        return known

    def _make_mask(self, per_row: int, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        allowed, reached = self._allowed(per_row, grid)
        if self.counts is not None:
            # adding log(n) to a logit multiplies its exponential by n, as if the key occurred n times in the softmax
            bias = self.counts.log()[:, None, None, :].to(self._dtype)
            allowed = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
        if self.keyframes is None:
            return allowed, reached
        # with keyframes each frame has its own row
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
        # A position that no subject may reach attends to all tokens, and `reached` sets its result to 0 afterwards.
        # Without any token, its softmax would be NaN.
        allowed = allowed | ~reached[..., None] & present
        repeats = per_row // self.frames if self.keyframes is None else 1
        reached = reached[:, 0, :, None].to(self._dtype)
        return allowed.repeat(1, 1, repeats, 1), reached.repeat(1, repeats, 1)

    def _fit_regions(
        self, regions: list[list[torch.Tensor | None]], grid: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        """Returns the regions resized to a layer's grid, as booleans of shape
        `(num_rows, num_subjects, frames * positions)`."""
        everywhere = torch.ones(1, self.frames * grid[0] * grid[1], dtype=torch.bool, device=device)
        slots = max(map(len, regions))
        rows = []
        for row in regions:
            fitted = [everywhere[0] if region is None else self._fit(region, grid, device) for region in row]
            rows.append(torch.stack(fitted + [everywhere[0]] * (slots - len(row))))
        return torch.stack(rows)

    def _fit(self, region: torch.Tensor, grid: tuple[int, int], device) -> torch.Tensor:
        return fit_region(region.to(device), grid).expand(self.frames, -1, -1).flatten()

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.pairs.values()))[0].dtype


def fit_region(region: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Returns the positions of a grid that a region covers by more than half, as booleans of shape `(..., *grid)`, for a
    region of shape `(..., height, width)`."""
    return F.adaptive_avg_pool2d(region[None], grid)[0] > 0.5


def _between_keyframes(states: torch.Tensor, keyframes: torch.Tensor) -> torch.Tensor:
    """Interpolates the keys or values of keyframes, `(num_rows, num_keyframes, ...)`, to those of all frames,
    `(num_rows * frames, ...)`."""
    before = keyframes.floor().long()
    after = (before + 1).clamp(max=states.shape[1] - 1)
    share = (keyframes - before).to(states.dtype)[:, None, None]
    return torch.lerp(states[:, before], states[:, after], share).flatten(0, 1)


def _frames_as_rows(states: torch.Tensor | None, frames: int, dim: int) -> torch.Tensor | None:
    """Reshapes `(num_rows, ..., frames * positions, ...)` to `(num_rows * frames, ..., positions, ...)`."""
    if states is None:
        return None
    if states.shape[dim] == 1:
        return states.repeat_interleave(frames, dim=0)
    return states.unflatten(dim, (frames, -1)).movedim(dim, 1).flatten(0, 1)


def _thread() -> int:
    """Returns the identifier of the current thread. In compiled code it always returns 0, because compiled code runs a
    layer and its projections without interruption."""
    # not `is_compiling`, which is also true in other threads while one thread compiles
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()
