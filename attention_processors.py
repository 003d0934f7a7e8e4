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
    the layer computes exactly what it did before. The subject's scale is contained in `V_subject`.

    Args:
        processor (`Callable`):
            The layer's own attention processor.
        index (`int`):
            Which of the subject's key/value pairs belongs to the layer.
    """

    def __init__(self, processor, index: int):
        self.processor = processor
        self.index = index

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
                The text's hidden states, or what [`SubjectProjection`] makes of them.
            attention_mask, temb, ip_adapter_masks (*optional*):
                For the layer's own processor.
        """
        kwargs = {"temb": temb, "ip_adapter_masks": ip_adapter_masks}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if isinstance(encoder_hidden_states, tuple) and isinstance(encoder_hidden_states[1], SubjectConditions):
            encoder_hidden_states, conditions = encoder_hidden_states
            key, value = conditions.pairs[self.index]
            if conditions.ip_hidden_states is not None:
                encoder_hidden_states = (encoder_hidden_states, conditions.ip_hidden_states)
            if key.shape[1] > 0:
                attn = _AttentionToSubject(attn, key, value)
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


class _AttentionToSubject:
    """A layer as its own processor sees it while a subject is there: the queries are noted on their way in, and what
    the subject adds joins on the way out, before the output projection."""

    def __init__(self, attn: nn.Module, key: torch.Tensor, value: torch.Tensor):
        self.attn = attn
        self.key = key
        self.value = value

    def __getattr__(self, name):
        return getattr(self.attn, name)

    def to_q(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.query = self.attn.to_q(hidden_states)
        return self.query

    @property
    def to_out(self):
        return self._project_sum, self.attn.to_out[1]

    def _project_sum(self, hidden_states: torch.Tensor) -> torch.Tensor:
        heads = self.attn.heads
        query, key, value = (
            states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (self.query, self.key, self.value)
        )
        subject = F.scaled_dot_product_attention(query, key, value, scale=self.attn.scale)
        return self.attn.to_out[0](hidden_states + subject.transpose(1, 2).flatten(2))


class SubjectConditions:
    """What travels beside the text to every cross-attention layer: the subject's keys and values, one pair a layer, and
    the image embeddings of an IP-Adapter (`None` where the UNet has none)."""

    def __init__(self, ip_hidden_states: list[torch.Tensor] | None, pairs: list[tuple[torch.Tensor, torch.Tensor]]):
        self.ip_hidden_states = ip_hidden_states
        self.pairs = pairs


class SubjectProjection(nn.Module):
    r"""
    Takes the place of the UNet's `encoder_hid_proj` while a subject is drawn: of the image embeddings that arrive, the
    last `2 * num_layers` are the subject's keys and values, the others an IP-Adapter's.

    Args:
        num_layers (`int`):
            How many layers the subject reaches.
        ip_projection (`torch.nn.Module`, *optional*):
            The UNet's own `encoder_hid_proj`, an IP-Adapter's image projection.
    """

    def __init__(self, num_layers: int, ip_projection: nn.Module | None = None):
        super().__init__()
        self.num_layers = num_layers
        self.ip_projection = ip_projection

    def forward(self, image_embeds: list[torch.Tensor]) -> SubjectConditions:
        count = len(image_embeds) - 2 * self.num_layers
        ip_embeds, subject = image_embeds[:count], image_embeds[count:]
        ip_hidden_states = None
        if self.ip_projection is not None:
            # an adapter that is loaded but got no picture adds nothing
            ip_hidden_states = self.ip_projection(ip_embeds) if ip_embeds else []
        pairs = list(zip(subject[::2], subject[1::2], strict=True))
        return SubjectConditions(ip_hidden_states, pairs)


@contextmanager
def subject_in_unet(unet: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    r"""
    Let layers of a UNet attend to a subject. Inside, the UNet takes the subject's keys and values as
    `added_cond_kwargs={"image_embeds": [key_0, value_0, key_1, value_1, ...]}`, behind the image embeddings of an
    IP-Adapter if it has one. Afterwards, also after an error, the UNet is what it was. One thread at a time.

    Args:
        unet (`UNet2DConditionModel`):
            The UNet, compiled or not.
        layers (`Iterable[str]`):
            Names of its cross-attention layers, `SSREncoder.config.attention_layers`.
    """
    unet = unwrap(unet)
    with _registry_lock:
        lock = _locks.setdefault(unet, threading.RLock())
        kept = _processors.setdefault(unet, {})
    with lock:
        attentions = {name: unet.get_submodule(name) for name in layers}
        own = {name: attn.processor for name, attn in attentions.items()}
        ip_projection, hid_dim_type = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
        try:
            for index, (name, attn) in enumerate(attentions.items()):
                # the same objects at every call, so that compiled code stays valid
                if name not in kept or kept[name].processor is not own[name] or kept[name].index != index:
                    kept[name] = SSRAttnProcessor2_0(own[name], index)
                attn.set_processor(kept[name])
            unet.encoder_hid_proj = SubjectProjection(len(attentions), ip_projection)
            unet.config.encoder_hid_dim_type = "ip_image_proj"
            yield
        finally:
            for name, attn in attentions.items():
                attn.set_processor(own[name])
            del unet.encoder_hid_proj
            unet.encoder_hid_proj = ip_projection
            unet.config.encoder_hid_dim_type = hid_dim_type


def unwrap(unet: nn.Module) -> nn.Module:
    """The UNet itself, where `torch.compile` has wrapped it."""
    return unet._orig_mod if is_compiled_module(unet) else unet


# by UNet: who is in it, and the processors it was given
_locks: WeakKeyDictionary = WeakKeyDictionary()
_processors: WeakKeyDictionary = WeakKeyDictionary()
_registry_lock = threading.Lock()
