"""The SSR-Encoder model: the token-to-patch aligner, the detail-preserving subject encoder, and the projections to the
keys and values of the UNet's cross-attention layers."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from . import files_ssr, internals_ssr


# The cross-attention layers of SD 1.5's UNet and their widths, in the order of `unet.attn_processors`.
SD15_ATTENTION_LAYERS = {
    f"{block}.attentions.{index}.transformer_blocks.0.attn2": width
    for block, count, width in (
        ("down_blocks.0", 2, 320),
        ("down_blocks.1", 2, 640),
        ("down_blocks.2", 2, 1280),
        ("up_blocks.1", 3, 1280),
        ("up_blocks.2", 3, 640),
        ("up_blocks.3", 3, 320),
        ("mid_block", 1, 1280),
    )
    for index in range(count)
}


class _Layers(nn.ModuleDict):
    """Projects subject embeddings to the keys and values of the layers. It is a module with its own `forward`, because
    group offloading loads the weights in a hook on `forward`."""

    def forward(self, subject_embeds: torch.Tensor, names: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        layers = (cast(nn.ModuleDict, self[name]) for name in names)
        return [(layer["to_k"](subject_embeds), layer["to_v"](subject_embeds)) for layer in layers]


class SSREncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers types `config_name` in two ways
    r"""
    Turns a query and the hidden states of an image into subject embeddings, and projects these to keys and values for
    the UNet's cross-attention (SSR-Encoder, https://arxiv.org/abs/2312.16272, sections 3.2 and 3.3).

    In the token-to-patch aligner, each token of the query attends to the image's patches; this locates the subject.
    The subject encoder applies the same attention to several levels of the vision encoder, which preserves both the
    meaning and the fine details of the subject. The defaults are for SD 1.5 with CLIP ViT-L/14.

    Args:
        cross_attention_dim (`int`, defaults to 768):
            Width of the text encoder's hidden states, and of the subject embeddings.
        vision_hidden_size (`int`, defaults to 1024):
            Width of the vision encoder's hidden states.
        inner_dim (`int`, defaults to 512):
            Total width of all heads of the aligner's attention.
        num_attention_heads (`int`, defaults to 8):
            Number of heads of the aligner's attention.
        image_levels (`tuple[int]`, defaults to `(4, 8, 12, 16, 20, 24)`):
            Indices of the vision encoder's hidden states that are used, lowest first; 0 is the embedding output. The
            aligner computes its attention from the last one.
        attention_layers (`dict[str, int]`, *optional*):
            Name and width of each cross-attention layer that receives the subject's keys and values. Defaults to the
            sixteen cross-attention layers of SD 1.5.
        known_fingerprint (`list[list[float]]`, *optional*):
            The [`~SSREncoder.fingerprint`] of the encoder that [`~SSREncoder.layers_alone`] was called on. It is only
            for encoders without image levels, which cannot compute it.

    Raises:
        `ValueError`: if `inner_dim` is not a multiple of `num_attention_heads`.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ssr import SSREncoder

    >>> encoder = SSREncoder()
    >>> subject_embeds = encoder(torch.randn(1, 77, 768), torch.randn(6, 1, 257, 1024))
    >>> subject_embeds.shape
    torch.Size([1, 462, 768])
    ```
    """

    _group_offload_block_modules = ["layers"]
    # diffusers types `config` as a dict, but its entries can also be read as attributes
    config: Any

    @register_to_config
    def __init__(
        self,
        cross_attention_dim: int = 768,
        vision_hidden_size: int = 1024,
        inner_dim: int = 512,
        num_attention_heads: int = 8,
        image_levels: tuple[int, ...] = (4, 8, 12, 16, 20, 24),
        attention_layers: dict[str, int] | None = None,
        known_fingerprint: list[list[float]] | None = None,
    ):
        super().__init__()
        if attention_layers is None:
            attention_layers = SD15_ATTENTION_LAYERS
            self.register_to_config(attention_layers=dict(attention_layers))
        if inner_dim % num_attention_heads:
            raise ValueError(
                f"`inner_dim` has to be a multiple of `num_attention_heads`, but is {inner_dim} with"
                f" {num_attention_heads} heads."
            )

        self.to_q = nn.Linear(cross_attention_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(vision_hidden_size, inner_dim, bias=False)
        self.to_v = nn.ModuleList(nn.Linear(vision_hidden_size, inner_dim, bias=False) for _ in image_levels)
        self.to_out = nn.ModuleList(nn.Linear(inner_dim, cross_attention_dim, bias=False) for _ in image_levels)
        self.norm = nn.LayerNorm(cross_attention_dim)

        # keyed by name, because a saved config sorts its keys alphabetically and loses the order of the layers
        self.layers = _Layers(
            {
                _module_name(name): nn.ModuleDict(
                    {part: nn.Linear(cross_attention_dim, width, bias=False) for part in ("to_k", "to_v")}
                )
                for name, width in attention_layers.items()
            }
        )

    @apply_forward_hook
    def attention_probs(
        self,
        query_hidden_states: torch.Tensor,
        image_hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        mask_weight: float = 1.0,
    ) -> torch.Tensor:
        r"""
        Returns the token-to-patch attention: the attention of each query token to the image patches (section 3.2 of
        the paper, equation 2).

        Args:
            query_hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, cross_attention_dim)`):
                The query's last hidden states.
            image_hidden_states (`torch.Tensor` of shape `(batch_size, 1 + num_patches, vision_hidden_size)`):
                Hidden states of the vision encoder at the last of `config.image_levels`, class token first.
            mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`, *optional*):
                1 where the subject is and 0 elsewhere, aligned with the pixels that the vision encoder received.
            mask_weight (`float`, defaults to 1.0):
                How strongly the mask moves the attention to its inside: with a weight of `w`, `w * w` is added to the
                logits inside the mask, `w` is subtracted from the logits outside it, and 1 is added to that of the
                class token.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_attention_heads, num_tokens, 1 + num_patches)`. Each row sums
            to 1.

        Raises:
            `ValueError`: if the encoder has no image levels.
        """
        self._check_has_levels()
        heads = self.config.num_attention_heads
        query = self.to_q(query_hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = self.to_k(image_hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            side = round((image_hidden_states.shape[1] - 1) ** 0.5)
            patches = F.interpolate(mask.float(), (side, side), mode="bilinear", antialias=True).flatten(1)
            inside = patches * mask_weight
            bias = inside - (1 - inside) * mask_weight
            bias = F.pad(bias, (1, 0), value=1.0)  # the class token, as in the released code
            scores = scores + bias[:, None, None, :].to(scores.dtype)
        return scores.softmax(dim=-1)

    def forward(
        self,
        query_hidden_states: torch.Tensor,
        image_hidden_states: torch.Tensor | Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        mask_weight: float = 1.0,
    ) -> torch.Tensor:
        r"""
        Computes the subject embeddings of the queried subject in an image (section 3.2 of the paper, equations 2 to
        4).

        Args:
            query_hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, cross_attention_dim)`):
                The query's last hidden states, padded to the text encoder's length (77 tokens).
            image_hidden_states (`torch.Tensor` of shape `(num_levels, batch_size, 1 + num_patches, vision_hidden_size)` or a sequence of `num_levels` tensors):
                Hidden states of the vision encoder at `config.image_levels`, before its last layer norm.
            mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`, *optional*):
                See [`~SSREncoder.attention_probs`].
            mask_weight (`float`, defaults to 1.0):
                See [`~SSREncoder.attention_probs`].

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens * num_levels, cross_attention_dim)`: the subject
            embeddings, lowest level first.

        Raises:
            `ValueError`: if `image_hidden_states` and `config.image_levels` differ in length, or if the encoder has no
                image levels.
        """
        self._check_has_levels()
        if len(image_hidden_states) != len(self.to_v):
            raise ValueError(
                f"`image_hidden_states` has to hold {len(self.to_v)} levels, one for each of `config.image_levels`, but"
                f" holds {len(image_hidden_states)}."
            )
        probs = self.attention_probs(query_hidden_states, image_hidden_states[-1], mask, mask_weight)
        heads = self.config.num_attention_heads
        levels = []
        for hidden_states, to_v, to_out in zip(image_hidden_states, self.to_v, self.to_out, strict=True):
            value = to_v(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
            levels.append(to_out((probs @ value).transpose(1, 2).flatten(2)))
        return self.norm(torch.cat(levels, dim=1))

    def _check_has_levels(self) -> None:
        if not self.config.image_levels:
            raise ValueError(
                "`image_levels` of this SSREncoder is empty, so it only projects subjects that are encoded already:"
                " load the whole encoder to encode an image."
            )

    @apply_forward_hook
    def project(self, subject_embeds: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        r"""
        Projects subject embeddings to the keys and values that the UNet's layers attend to (section 3.3 of the paper,
        equation 5). They depend only on the subject, so they are computed once and used in all denoising steps.

        Args:
            subject_embeds (`torch.Tensor` of shape `(batch_size, num_subject_tokens, cross_attention_dim)`):
                Subject embeddings, as returned by `forward`.

        Returns:
            `list` of pairs of `torch.Tensor`, each of shape `(batch_size, num_subject_tokens, width)`: the keys and
            values for each layer, in the order of `config.attention_layers`.
        """
        return self.layers(subject_embeds, [_module_name(name) for name in self.config.attention_layers])

    def layers_alone(self) -> "SSREncoder":
        """Returns an encoder that only projects subject embeddings to keys and values. It shares these weights with this
        encoder, has the same [`~SSREncoder.fingerprint`], also after it is saved and loaded, and cannot encode images.

        Example:

        ```py
        >>> encoder.layers_alone().project(subject_embeds)
        ```
        """
        config = self.config
        fingerprint = self.fingerprint()
        known = None if fingerprint is None else fingerprint.tolist()
        alone = type(self)(config.cross_attention_dim, config.vision_hidden_size, 1, 1, (), {}, known)
        # with sequential offloading, the weights are on the meta device, from which nothing can be copied
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        for module in (alone.to_q, alone.to_k, alone.norm):
            module.to(device, self.dtype)
        alone.layers = self.layers
        alone.register_to_config(attention_layers=dict(config.attention_layers))
        return alone.eval()

    @torch.no_grad()
    def fingerprint(self, device: torch.device | None = None) -> torch.Tensor | None:
        """Returns the output of the encoder for a fixed input, which identifies the encoder: float32 on the CPU, of shape
        `(num_levels + 1, 8)`. The same encoder has nearly the same fingerprint in any precision and on any device, and
        different encoders have different ones, unless their weights are nearly the same. It is `None` for an encoder without
        image levels whose config has no `known_fingerprint`.

        Args:
            device (`torch.device`, *optional*):
                The device on which the encoder runs. Defaults to the device of the weights.
        """
        config = self.config
        if not config.image_levels:
            known = config.known_fingerprint
            return None if known is None else torch.tensor(known, dtype=torch.float32, device="cpu")
        if device is None:
            # accelerate's hooks move the input to the execution device, but nothing can be copied from the meta device
            device = torch.device("cpu") if self.device.type == "meta" else self.device

        def fixed(*shape: int) -> torch.Tensor:
            # always computed on the CPU, even if the default device is another one
            count = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device="cpu")
            return torch.sin(count * 1.7).reshape(shape).to(device, self.dtype)

        levels = len(config.image_levels)
        subject = self(fixed(1, 1, config.cross_attention_dim), fixed(levels, 1, 2, config.vision_hidden_size))
        parts = [subject[0, :, :8]]
        if config.attention_layers:
            parts.append(sum(key[0].mean(0)[:8] + value[0].mean(0)[:8] for key, value in self.project(subject))[None])
        return torch.cat(parts).float().cpu()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> "SSREncoder":
        r"""
        Loads an encoder that was saved with `save_pretrained`. The arguments are those of
        `ModelMixin.from_pretrained`.

        Returns:
            [`SSREncoder`] in evaluation mode. With `output_loading_info=True`, a tuple of the encoder and the loading
            info.

        Raises:
            `OSError`: if the file or repository does not exist.
            `ValueError`: if a weight is missing, unexpected, of the wrong shape, or not finite.
        """
        problem = f"`pretrained_model_name_or_path`: {pretrained_model_name_or_path} holds no usable SSREncoder"
        with_info = kwargs.pop("output_loading_info", False)
        kwargs = internals_ssr.precision_arguments(kwargs)
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (OSError, ImportError):
            raise
        except Exception as error:  # diffusers raises different errors for a wrong config, name or shape
            raise ValueError(f"{problem}: {error or type(error).__name__}") from error
        # a quantized encoder is returned without the info
        info: dict[str, Any] = {}
        model, info = loaded if isinstance(loaded, tuple) else (loaded, info)
        # those that an index lists, but no shard has, are on the meta device
        if "missing_keys" in info and not hasattr(model, "_hf_hook"):
            on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
            info["missing_keys"] = [*info["missing_keys"], *on_meta]
        internals_ssr.check_weights(problem, model, info)
        return (model, info) if with_info else model  # type: ignore[return-value]  # same as in diffusers

    @classmethod
    def from_released(
        cls,
        aligner: str | os.PathLike | Mapping[str, torch.Tensor],
        layers: str | os.PathLike | Mapping[str, torch.Tensor],
        **config: Any,
    ) -> "SSREncoder":
        r"""
        Loads an encoder from the two files in which the authors of SSR-Encoder released their weights.

        Args:
            aligner (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                The weights of the aligner and the subject encoder (`pytorch_model.bin`): the path of a torch pickle,
                which is loaded with `weights_only=True`, the path of a safetensors file, or a state dict.
            layers (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                The weights of the layers' keys and values (`pytorch_model_1.bin`), in one of the same forms.
            **config:
                Arguments of `SSREncoder` that differ from the defaults.

        Returns:
            [`SSREncoder`] in evaluation mode.

        Raises:
            `FileNotFoundError`: if a file does not exist.
            `ValueError`: if a tensor is missing or unexpected, has the wrong shape, or has values that are not finite.

        Example:

        ```py
        >>> encoder = SSREncoder.from_released("pytorch_model.bin", "pytorch_model_1.bin")
        >>> encoder.save_pretrained("my-ssr/ssr_encoder")
        ```
        """
        # on the meta device, so that names and shapes are checked before memory is allocated for the encoder
        with torch.device("meta"):
            model = cls(**config)
        state_dict = files_ssr.read_released_weights(
            aligner, layers, model.state_dict(), [_module_name(name) for name in model.config.attention_layers]
        )
        # `to_empty` does not initialize the weights; `load_state_dict` overwrites all of them
        model.to_empty(device=torch.get_default_device())
        model.load_state_dict(state_dict)
        return model.eval()


def _module_name(layer: str) -> str:
    return layer.replace(".", "_")
