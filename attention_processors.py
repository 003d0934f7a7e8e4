"""Adds a subject's attention to the UNet's cross-attention layers (equation 5 of the paper), next to any processor."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn


class LayerSubject(NamedTuple):
    """What the cross-attention layers of one transformer get instead of `encoder_hidden_states`: the hidden states of
    the text, and the subject.

    `text` is the original `encoder_hidden_states` (a tuple with an IP-Adapter). `keys` and `values` have one tensor of
    shape `(num_rows, num_tokens, width)` for each block of the transformer, or `None` for a block without a subject.
    The values are already multiplied by the scale. `mask` has the shape
    `(num_rows, 1, num_positions or 1, num_tokens)`: a float mask is added to the logits, and a boolean mask is True for
    the tokens that a position may attend to. `reached`, of shape `(num_rows, num_positions, 1)`, is 1 at each position
    where a subject may appear. Several consecutive images or frames of the batch can share a row."""

    text: torch.Tensor | tuple
    keys: tuple[torch.Tensor | None, ...]
    values: tuple[torch.Tensor | None, ...]
    mask: torch.Tensor | None = None
    reached: torch.Tensor | None = None


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

    Both terms use the layer's queries, heads and scale, and the sum goes through the layer's output projection.

    This is not an attention processor that can be set in a UNet, but a set of forward hooks: the layer keeps its own
    processor (plain, sliced, fused, IP-Adapter, Custom Diffusion or user-defined), which computes the first term, and
    the hooks add the second term. The methods are hooks on three modules: the layer (`enter` and `leave`), its query
    projection (`keep_query`) and its output projection (`add_subject`). [`subject_in_unet`] registers them.

    One object is used for all layers of all UNets, because it has no weights and keeps the state of a forward pass
    separately for each thread. This allows `torch.compile` to reuse one compiled block for all layers of the same
    width.

    Args:
        index (`int`, defaults to 0):
            The index of the layer's block in its transformer. In Stable Diffusion 1.5, each transformer has one block.
    """

    def __init__(self, index: int = 0):
        self.index = index
        self.visits: dict[int, _Visit] = {}

    # The last arguments of the hooks have defaults because of threads: if one thread removes the hooks while another
    # one runs the same module, torch may call a hook that it has already looked up without `kwargs`.

    def enter(self, attn: Attention, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Forward pre-hook of a cross-attention layer. Takes the subject out of `encoder_hidden_states`, so that the
        layer's processor gets only the text. Without a subject, this hook and the hooks below do nothing."""
        # an interrupted forward pass of this thread may not have removed its visit
        self.visits.pop(_thread(), None)
        subject = None if kwargs is None else kwargs.get("encoder_hidden_states")
        if kwargs is None or not isinstance(subject, LayerSubject):
            return None
        key = subject.keys[self.index]
        if key is not None and key.shape[1] > 0:
            self.visits[_thread()] = _Visit(attn, subject)
        return args, {**kwargs, "encoder_hidden_states": subject.text}

    def keep_query(self, to_q: nn.Module, args: tuple, query: torch.Tensor) -> None:
        """Forward hook of a query projection. Stores the queries."""
        visit = self.visits.get(_thread())
        if visit is not None:
            visit.query = query
            visit.num_queries += 1

    def add_subject(self, to_out: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Forward pre-hook of an output projection. Adds the attention to the subject to the hidden states that the
        layer's processor computed."""
        visit = self.visits.get(_thread())
        if visit is None:
            return None
        visit.num_outputs += 1
        if visit.query is None or not args or args[0].shape != visit.query.shape:
            return None
        visit.added = True
        added = attend_to_subject(visit.query, visit.subject, visit.heads, visit.scale, self.index)
        return (args[0] + added, *args[1:]), kwargs or {}

    def leave(self, attn: Attention, args: tuple, output: torch.Tensor) -> None:
        """Forward hook of a cross-attention layer. Raises a `ValueError` if the subject was not added exactly once in
        this forward pass."""
        visit = self.visits.pop(_thread(), None)
        problem = None if visit is None else visit.problem()
        if problem is not None:
            raise ValueError(
                f"A subject cannot be used with the attention processor {type(attn.processor).__name__}: {problem}."
            )

    def forget(self) -> None:
        """Removes the state that an interrupted forward pass of this thread left."""
        self.visits.pop(_thread(), None)


@functools.cache
def processor_of_block(index: int) -> SSRAttnProcessor2_0:
    """Returns the hooks of a block's layer. They are the same object in each call, because compiled code is only valid
    for the same hooks."""
    return SSRAttnProcessor2_0(index)


def attend_to_subject(
    query: torch.Tensor, subject: LayerSubject, heads: int, scale: float, index: int = 0
) -> torch.Tensor:
    """Returns the second term of equation 5 for queries of shape `(batch_size, sequence_length, width)`, in the same
    shape."""
    rows = subject.keys[index].shape[0]  # type: ignore[union-attr]  # `enter` checks that the block has a subject
    if query.shape[0] % rows:
        raise ValueError(f"The UNet's layers got a batch of {query.shape[0]} for {rows} rows of subjects.")
    # The queries of all images and frames of a row are concatenated, so that keys and values need not be repeated.
    q, k, v = (
        states.reshape(rows, -1, heads, states.shape[-1] // heads).transpose(1, 2)  # type: ignore[union-attr]
        for states in (query, subject.keys[index], subject.values[index])
    )
    if subject.mask is not None and subject.mask.shape[2] not in (1, q.shape[2]):
        raise ValueError(
            f"A subject with a region needs layers whose positions form the image's grid, but one has {query.shape[1]}"
            " positions instead: something merges them (ToMe's `merge_crossattn`)."
        )
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=subject.mask, scale=scale).transpose(1, 2).flatten(2)
    if subject.reached is not None:
        output = output * subject.reached
    return output.view(query.shape)


@dataclass(eq=False)
class SubjectConditions:
    r"""
    The subjects of one forward pass of the UNet: keys and values for all layers, and masks.

    Args:
        pairs (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            Key and value for each layer name, each of shape `(num_rows, num_subject_tokens, width)`, or
            `(num_rows, num_keyframes, num_subject_tokens, width)` with keyframes. The values are already multiplied by
            the scale. A layer with zero tokens is not changed. A row is used for one image or video, or for several
            consecutive ones in the batch.
        token_subject (`torch.Tensor` of shape `(num_rows, num_subject_tokens)`, *optional*):
            The index of the subject in its row that each token belongs to, -1 for padding.
        regions (`list[list[torch.Tensor | None]]`, *optional*):
            For each row and each of its subjects, where it may appear: 1 inside and 0 outside, of shape
            `(1, height, width)` or `(num_frames, height, width)`. `None` allows the subject everywhere.
        counts (`torch.Tensor` of shape `(num_rows, num_subject_tokens)`, *optional*):
            How many times each token counts in the softmax. By default each token counts once.
        frames (`int`, defaults to 1):
            Number of frames of each video.
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

    def for_transformer(
        self, layers: Sequence[str], text: torch.Tensor | tuple, batch_size: int, grid: tuple[int, int]
    ) -> LayerSubject | torch.Tensor | tuple:
        """Returns what the cross-attention layers of one transformer get: `text` if none has a subject. `layers` are the
        names of its layers, one for each block, `text` is its `encoder_hidden_states`, `batch_size` the number of images
        (or frames) in its batch, and `grid` the height and width of its grid of positions."""
        pairs: list[Any] = [self.pairs.get(name, (None, None)) for name in layers]
        if self.keyframes is not None:
            pairs = [(_between_keyframes(k, self.keyframes), _between_keyframes(v, self.keyframes)) for k, v in pairs]
        rows = [key.shape[0] for key, _ in pairs if key is not None]
        if not rows:
            return text
        keys, values = zip(*pairs, strict=True)
        return LayerSubject(text, keys, values, *self._mask(batch_size // rows[0], grid))

    def _mask(self, per_row: int, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns `LayerSubject.mask` and `LayerSubject.reached`. They are computed once for each grid."""
        masks = self._masks.get((per_row, grid))
        if masks is None:
            masks = self._make_mask(per_row, grid)
            # tensors made inside a compiled graph are only valid during that run of the graph
            if not torch.compiler.is_dynamo_compiling():
                self._masks[per_row, grid] = masks
        return masks

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
        """Returns which tokens each position may attend to, and which positions a subject may appear at."""
        if self.token_subject is None:
            return None, None
        present = self.token_subject[:, None, None, :] >= 0
        if self.regions is None:
            return present, None
        # the region of each token's subject, over the positions of the grid
        regions = self._fit_regions(self.regions, grid, self.token_subject.device)
        index = self.token_subject.clamp(min=0).long()[:, :, None].expand(-1, -1, regions.shape[2])
        allowed = regions.gather(1, index).transpose(1, 2)[:, None] & present
        # A position that no subject may reach attends to all tokens, and `reached` sets its result to 0 afterwards.
        # Without any token, its softmax would be NaN.
        reached = allowed.any(-1)
        allowed = allowed | ~reached[..., None] & present
        # the same for each image of the row
        repeats = per_row // self.frames if self.keyframes is None else 1
        reached = reached[:, 0, :, None].to(self._dtype)
        return allowed.repeat(1, 1, repeats, 1), reached.repeat(1, repeats, 1)

    def _fit_regions(
        self, regions: list[list[torch.Tensor | None]], grid: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        """Returns the regions resized to a layer's grid, as booleans of shape
        `(num_rows, num_subjects, frames * positions)`."""
        everywhere = torch.ones(1, *grid, device=device)
        slots = max(map(len, regions))
        rows = [[everywhere if region is None else region for region in row] for row in regions]
        padded = [[*row, *[everywhere] * (slots - len(row))] for row in rows]
        return torch.stack([torch.stack([self._fit(region.to(device), grid) for region in row]) for row in padded])

    def _fit(self, region: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return fit_region(region, grid).expand(self.frames, -1, -1).flatten()

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.pairs.values()))[0].dtype


def fit_region(region: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Returns the positions of a grid that a region covers by more than half, as booleans of shape `(..., *grid)`, for a
    region of shape `(..., height, width)`."""
    return F.adaptive_avg_pool2d(region[None], grid)[0] > 0.5


def _between_keyframes(states: torch.Tensor | None, keyframes: torch.Tensor) -> torch.Tensor | None:
    """Interpolates the keys or values of keyframes, `(num_rows, num_keyframes, ...)`, to those of all frames,
    `(num_rows * frames, ...)`."""
    if states is None:
        return None
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
