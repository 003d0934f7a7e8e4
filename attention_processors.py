"""How a subject joins the UNet's cross-attention."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn


class SSRAttnProcessor2_0:
    r"""
    Attends to the subject beside the text (section 3.3 of the paper, equation 5):

        Z = Attention(Q, K_text, V_text) + Attention(Q, K_subject, V_subject)

    with the layer's own queries, heads and scale; the sum goes through the layer's own output projection. The first term
    is left to the processor that the layer has already (plain, sliced, fused, IP-Adapter's, ...), so whatever that one
    does stays as it is. The second runs on PyTorch's scaled dot product attention.

    It holds no weights and nothing of a request: keys and values arrive with `encoder_hidden_states`, and without them
    the layer computes exactly what it did before. The subject's scale is contained in `V_subject`. Nor does it know which
    layer it serves, so that one compiled block can serve all layers of a width.

    Args:
        processor (`Callable`):
            The layer's own attention processor.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        ip_adapter_masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            attn (`Attention`):
                The layer.
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, width)`):
                The picture's latent tokens.
            encoder_hidden_states (`torch.Tensor` or `tuple`, *optional*):
                The text's hidden states, alone or with what [`SubjectProjection`] made for this layer.
            attention_mask, temb, ip_adapter_masks (*optional*):
                For the layer's own processor.
        """
        kwargs = {"temb": temb, "ip_adapter_masks": ip_adapter_masks}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states, (arrived,) = encoder_hidden_states
            if arrived.ip_hidden_states is not None:
                encoder_hidden_states = (encoder_hidden_states, arrived.ip_hidden_states)
            if arrived.conditions is not None and arrived.conditions.pairs[0][0].shape[1] > 0:
                attn = _AttentionToSubject(attn, arrived.conditions, arrived.frames)
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


class _AttentionToSubject:
    """A layer as its own processor sees it while a subject is there: the queries are noted on their way in, and what
    the subject adds joins on the way out, before the output projection."""

    def __init__(self, attn: nn.Module, conditions: "SubjectConditions", frames: int):
        self.attn = attn
        self.conditions = conditions
        self.frames = frames

    def __getattr__(self, name):
        return getattr(self.attn, name)

    def to_q(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.query = self.attn.to_q(hidden_states)
        return self.query

    @property
    def to_out(self):
        return self._project_sum, self.attn.to_out[1]

    def _project_sum(self, hidden_states: torch.Tensor) -> torch.Tensor:
        ((key, value),) = self.conditions.pairs
        # the frames of a video lie side by side as more queries, so that keys and values are not repeated for each
        frames = self.frames
        query = self.query.unflatten(0, (-1, frames)).flatten(1, 2)
        states = (each.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2) for each in (query, key, value))
        allowed, reached = self.conditions.attention_mask(self.query.shape[1], frames)
        subject = F.scaled_dot_product_attention(*states, attn_mask=allowed, scale=self.attn.scale)
        subject = subject.transpose(1, 2).flatten(2)
        if reached is not None:
            subject = subject * reached
        subject = subject.unflatten(1, (frames, -1)).flatten(0, 1)
        return self.attn.to_out[0](hidden_states + subject)


class SubjectConditions:
    r"""
    What travels to every cross-attention layer beside the text.

    Args:
        pairs (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Key and value for each layer, each `(batch_size, num_subject_tokens, width)`, the scale contained in the
            values. A layer whose pair holds no tokens is left alone.
        token_subject (`torch.Tensor` of shape `(batch_size, num_subject_tokens)`, *optional*):
            Which of its row's subjects each token belongs to, -1 for padding. Needed where rows differ in length or
            there are regions.
        regions (`torch.Tensor` of shape `(batch_size, num_subjects, height, width)`, *optional*):
            1 where in the output each subject may appear, 0 elsewhere.
        counts (`torch.Tensor` of shape `(batch_size, num_subject_tokens)`, *optional*):
            How often each token counts in the softmax; once by default.
    """

    def __init__(
        self,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        token_subject: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ):
        self.pairs = pairs
        self.token_subject = token_subject
        self.regions = regions
        self.counts = counts

    def as_image_embeds(self) -> list[torch.Tensor]:
        """As the list of tensors, each with the batch first, that pipelines repeat, split and pass on."""
        example = self.pairs[0][0]
        nothing = example.new_zeros(example.shape[0], 0)
        further = (nothing if each is None else each for each in (self.token_subject, self.regions, self.counts))
        return [*(states for pair in self.pairs for states in pair), *further]

    @classmethod
    def from_image_embeds(cls, image_embeds: list[torch.Tensor]) -> "SubjectConditions":
        """The reverse of `as_image_embeds`."""
        *states, token_subject, regions, counts = image_embeds
        pairs = list(zip(states[::2], states[1::2], strict=True))
        return cls(pairs, *(each if each.shape[1] else None for each in (token_subject, regions, counts)))

    def attention_mask(self, num_queries: int, frames: int = 1) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For a layer of `num_queries` positions in each of `frames`: which tokens each may attend to, as booleans or, where
        tokens have counts, as what is added to the logits, `(batch_size, 1, frames * num_queries or 1,
        num_subject_tokens)`, and which positions any subject may reach, `(batch_size, frames * num_queries, 1)`."""
        allowed, reached = self._allowed(num_queries, frames)
        if self.counts is None:
            return allowed, reached
        # a key that counts n times adds n times its exponential to the softmax
        bias = self.counts.log()[:, None, None, :].to(self.pairs[0][0].dtype)
        return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf), reached

    def _allowed(self, num_queries: int, frames: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.token_subject is None:
            return None, None
        present = self.token_subject[:, None, None, :] >= 0
        if self.regions is None:
            return present, None
        height, width = self.regions.shape[-2:]
        # positions run over rows; the layer's rows and columns follow from the output's proportions
        rows = max(round((num_queries * height / width) ** 0.5), 1)
        regions = F.adaptive_avg_pool2d(self.regions, (rows, num_queries // rows)).flatten(2) > 0.5
        index = self.token_subject.clamp(min=0).long()[:, :, None].expand(-1, -1, num_queries)
        allowed = regions.gather(1, index).transpose(1, 2)[:, None] & present
        reached = allowed.any(-1)
        # a position that no subject may reach attends to all of them, and then to nothing of what it found
        allowed = allowed | ~reached[..., None] & present
        reached = reached[:, 0, :, None].to(self.pairs[0][0].dtype)
        return allowed.repeat(1, 1, frames, 1), reached.repeat(1, frames, 1)


class _Arrived:
    """What [`SubjectProjection`] hands to the processors: the image embeddings of an IP-Adapter (`None` where the UNet has
    none) and the subject's conditions (`None` outside its window). `UNetMotionModel` takes it for a tensor of `shape` and
    repeats it for each of the `frames`: the adapter's embeddings need that, the subject's keys and values do not."""

    def __init__(
        self,
        shape: torch.Size,
        ip_hidden_states: list[torch.Tensor] | None,
        conditions: SubjectConditions | None,
        frames: int = 1,
    ):
        self.shape = shape
        self.ip_hidden_states = ip_hidden_states
        self.conditions = conditions
        self.frames = frames

    def repeat_interleave(self, repeats: int, dim: int, output_size: int | None = None) -> "_Arrived":
        ip_hidden_states = self.ip_hidden_states
        if ip_hidden_states is not None:
            ip_hidden_states = [each.repeat_interleave(repeats, dim=dim) for each in ip_hidden_states]
        return _Arrived(self.shape, ip_hidden_states, self.conditions, repeats)

    def at(self, index: int) -> "_Arrived":
        """What one layer gets of it."""
        conditions = self.conditions
        if conditions is not None:
            conditions = SubjectConditions(
                conditions.pairs[index : index + 1], conditions.token_subject, conditions.regions, conditions.counts
            )
        return _Arrived(self.shape, self.ip_hidden_states, conditions, self.frames)


class SubjectProjection(nn.Module):
    r"""
    Takes the place of the UNet's `encoder_hid_proj` while a subject is drawn: of the image embeddings that arrive, the
    last are the subject's, the others an IP-Adapter's.

    Args:
        num_layers (`int`):
            How many layers the subject reaches.
        ip_projection (`torch.nn.Module`, *optional*):
            The UNet's own `encoder_hid_proj`, an IP-Adapter's image projection.
    """

    def __init__(self, num_layers: int, ip_projection: nn.Module | None = None):
        super().__init__()
        self.num_embeds = 2 * num_layers + 3
        self.ip_projection = ip_projection
        self.active = True

    def forward(self, image_embeds: list[torch.Tensor]) -> list[_Arrived]:
        count = len(image_embeds) - self.num_embeds
        ip_hidden_states = None
        if self.ip_projection is not None:
            # an adapter that is loaded but got no picture adds nothing
            ip_hidden_states = self.ip_projection(image_embeds[:count]) if count else []
        conditions = SubjectConditions.from_image_embeds(image_embeds[count:]) if self.active else None
        return [_Arrived(image_embeds[-1].shape, ip_hidden_states, conditions)]


class _Layer:
    """A layer's processor, and the hook that hands it what is its own. The hook sits on the block around the layer: inside
    a compiled block, the layer's number would be compiled in."""

    def __init__(self, own_processor, index: int):
        self.processor = SSRAttnProcessor2_0(own_processor)
        self.index = index

    def hand_over(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = kwargs.get("encoder_hidden_states")
        if isinstance(states, tuple):
            text, (arrived,) = states
            kwargs = {**kwargs, "encoder_hidden_states": (text, [arrived.at(self.index)])}
        return args, kwargs


@contextmanager
def alone_in_unet(unet: nn.Module) -> Iterator[nn.Module]:
    """Wait until no other thread is in a UNet, and keep the others out. Yields the UNet itself, uncompiled."""
    unet = unwrap(unet)
    with _registry_lock:
        lock = _locks.setdefault(unet, threading.RLock())
    with lock:
        yield unet


@contextmanager
def subject_in_unet(unet: nn.Module, layers: Iterable[str]) -> Iterator[SubjectProjection]:
    r"""
    Let layers of a UNet attend to a subject. Inside, the UNet takes
    `added_cond_kwargs={"image_embeds": conditions.as_image_embeds()}` with the [`SubjectConditions`], behind the image
    embeddings of an IP-Adapter if it has one. Afterwards, also after an error, the UNet is what it was. One thread at a
    time. Yields the [`SubjectProjection`], whose `active` can be switched off and on between steps.

    Args:
        unet (`UNet2DConditionModel`):
            The UNet, compiled or not.
        layers (`Iterable[str]`):
            Names of its cross-attention layers, `SSREncoder.config.attention_layers`.
    """
    with alone_in_unet(unet) as unet:
        kept = _layers.setdefault(unet, {})
        attentions = {name: unet.get_submodule(name) for name in layers}
        own = {name: attn.processor for name, attn in attentions.items()}
        ip_projection, hid_dim_type = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
        hooks = []
        try:
            for index, (name, attn) in enumerate(attentions.items()):
                # the same objects at every call, so that compiled code stays valid
                if name not in kept or kept[name].processor.processor is not own[name] or kept[name].index != index:
                    kept[name] = _Layer(own[name], index)
                attn.set_processor(kept[name].processor)
                block = unet.get_submodule(name.rpartition(".transformer_blocks.")[0])
                hooks.append(block.register_forward_pre_hook(kept[name].hand_over, with_kwargs=True))
            unet.encoder_hid_proj = projection = SubjectProjection(len(attentions), ip_projection)
            unet.config.encoder_hid_dim_type = "ip_image_proj"
            yield projection
        finally:
            for hook in hooks:
                hook.remove()
            for name, attn in attentions.items():
                attn.set_processor(own[name])
            del unet.encoder_hid_proj
            unet.encoder_hid_proj = ip_projection
            unet.config.encoder_hid_dim_type = hid_dim_type


def unwrap(unet: nn.Module) -> nn.Module:
    """The UNet itself, where `torch.compile` has wrapped it."""
    return unet._orig_mod if is_compiled_module(unet) else unet


# by UNet: who is in it, and what its layers were given
_locks: WeakKeyDictionary = WeakKeyDictionary()
_layers: WeakKeyDictionary = WeakKeyDictionary()
_registry_lock = threading.Lock()
