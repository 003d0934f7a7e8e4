"""The SSR-Encoder model: token-to-patch aligner, detail-preserving subject encoder, and keys and values for the UNet's layers."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from . import library_internals


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


# Limits far above any real encoder. A config with larger sizes would fill the memory before its weights are read.
MAX_WIDTH = 2**15
MAX_LEVELS = 64
MAX_LAYERS = 1024
MAX_PARAMETERS = 2**30


class _Layers(nn.ModuleDict):
    """The projections to the layers' keys and values. They have their own `forward`, because group offloading loads their
    weights there."""

    def forward(self, subject_embeds: torch.Tensor, names: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        layers = (cast(nn.ModuleDict, self[name]) for name in names)
        return [(layer["to_k"](subject_embeds), layer["to_v"](subject_embeds)) for layer in layers]


class SSREncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers types `config_name` in two ways
    r"""
    Computes subject embeddings from a query and the hidden states of a picture, and keys and values for the UNet's
    cross-attention from the subject embeddings (SSR-Encoder, https://arxiv.org/abs/2312.16272, sections 3.2 and 3.3).

    In the token-to-patch aligner, each token of the query attends to the picture's patches, which locates the subject. The
    subject encoder applies the same attention to several levels of the vision encoder, so that the subject keeps its details as
    well as its meaning. The defaults are for Stable Diffusion 1.5 with CLIP ViT-L/14.

    Args:
        cross_attention_dim (`int`, defaults to 768):
            Width of the text encoder's hidden states, and of the subject embeddings.
        vision_hidden_size (`int`, defaults to 1024):
            Width of the vision encoder's hidden states.
        inner_dim (`int`, defaults to 512):
            Total width of the aligner's attention over all heads.
        num_attention_heads (`int`, defaults to 8):
            Number of heads of the aligner's attention.
        image_levels (`tuple[int]`, defaults to `(4, 8, 12, 16, 20, 24)`):
            Indices of the vision encoder's hidden states to use, in ascending order; 0 is the embedding output. The aligner
            uses the last one.
        attention_layers (`dict[str, int]`, *optional*):
            Name and width of each cross-attention layer in which the subject acts. Defaults to the sixteen layers of Stable
            Diffusion 1.5.

    Raises:
        `ValueError`: if a size is not a positive whole number, or exceeds the limits of this module.

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
    # diffusers types it as a dict, but its entries are attributes
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
    ):
        super().__init__()
        if attention_layers is None:
            attention_layers = SD15_ATTENTION_LAYERS
            self.register_to_config(attention_layers=dict(attention_layers))
        _check_widths(cross_attention_dim, vision_hidden_size, inner_dim, num_attention_heads)
        _check_levels(image_levels)
        _check_layers(attention_layers)
        _check_parameters(cross_attention_dim, vision_hidden_size, inner_dim, len(image_levels), attention_layers)

        self.to_q = nn.Linear(cross_attention_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(vision_hidden_size, inner_dim, bias=False)
        self.to_v = nn.ModuleList(nn.Linear(vision_hidden_size, inner_dim, bias=False) for _ in image_levels)
        self.to_out = nn.ModuleList(nn.Linear(inner_dim, cross_attention_dim, bias=False) for _ in image_levels)
        self.norm = nn.LayerNorm(cross_attention_dim)

        # the fingerprint of the complete encoder, if this one has only its layers
        self.known_fingerprint: torch.Tensor | None = None
        # by name, because a saved config is sorted alphabetically
        self.layers = _Layers(
            {
                _module_name(name): nn.ModuleDict(
                    {part: nn.Linear(cross_attention_dim, width, bias=False) for part in ("to_k", "to_v")}
                )
                for name, width in attention_layers.items()
            }
        )

    def attention_probs(
        self,
        query_hidden_states: torch.Tensor,
        image_hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        mask_weight: float = 1.0,
    ) -> torch.Tensor:
        r"""
        The token-to-patch attention from each query token to each patch (section 3.2 of the paper, equation 2).

        Args:
            query_hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, cross_attention_dim)`):
                The query's last hidden states.
            image_hidden_states (`torch.Tensor` of shape `(batch_size, 1 + num_patches, vision_hidden_size)`):
                The last level, with the class token first.
            mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`, *optional*):
                1 where the subject is and 0 elsewhere, resized and cropped like the pixels of the vision encoder.
            mask_weight (`float`, defaults to 1.0):
                How strongly the attention is restricted to the mask. With a weight of `w`, logits inside grow by `w * w` and
                logits outside fall by `w`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_attention_heads, num_tokens, 1 + num_patches)`, each row summing
            to 1.
        """
        heads = self.config.num_attention_heads
        query = self.to_q(query_hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = self.to_k(image_hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            side = round((image_hidden_states.shape[1] - 1) ** 0.5)
            patches = F.interpolate(mask.float(), (side, side), mode="bilinear", antialias=True).flatten(1)
            inside = patches * mask_weight
            bias = inside - (1 - inside) * mask_weight
            bias = F.pad(bias, (1, 0), value=1.0)
            scores = scores + bias[:, None, None, :].to(scores.dtype)
        return scores.softmax(dim=-1)

    def forward(
        self,
        query_hidden_states: torch.Tensor,
        image_hidden_states: torch.Tensor | Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        mask_weight: float = 1.0,
        output_attentions: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Compute the embeddings of the queried subject (section 3.2 of the paper, equations 2 to 4).

        Args:
            query_hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, cross_attention_dim)`):
                The query's last hidden states, padded to the text encoder's length (77 tokens).
            image_hidden_states (`torch.Tensor` of shape `(num_levels, batch_size, 1 + num_patches, vision_hidden_size)` or a sequence of `num_levels` tensors):
                Hidden states of the vision encoder at `config.image_levels`, before its last layer norm.
            mask (`torch.Tensor` of shape `(batch_size, 1, height, width)`, *optional*):
                See [`~SSREncoder.attention_probs`].
            mask_weight (`float`, defaults to 1.0):
                See [`~SSREncoder.attention_probs`].
            output_attentions (`bool`, defaults to `False`):
                Whether to also return the output of [`~SSREncoder.attention_probs`].

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens * num_levels, cross_attention_dim)`: the subject
            embeddings, with the lowest level first; or a tuple of the embeddings and the attention.

        Raises:
            `ValueError`: if the number of levels differs from `config.image_levels`.
        """
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
        subject_embeds = self.norm(torch.cat(levels, dim=1))
        return (subject_embeds, probs) if output_attentions else subject_embeds

    @apply_forward_hook
    def project(self, subject_embeds: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        r"""
        The keys and values for the UNet's layers (section 3.3 of the paper, equation 5). They depend only on the subject, so
        they are projected once for all denoising steps.

        Args:
            subject_embeds (`torch.Tensor` of shape `(batch_size, num_subject_tokens, cross_attention_dim)`):
                Subject embeddings from `forward`.

        Returns:
            `list` of pairs of `torch.Tensor`, each of shape `(batch_size, num_subject_tokens, width)`: key and value
            for each of `config.attention_layers`, in that order.
        """
        return self.layers(subject_embeds, [_module_name(name) for name in self.config.attention_layers])

    def layers_alone(self) -> "SSREncoder":
        r"""
        The part of the encoder that is needed to draw encoded subjects, without the part that reads pictures.

        Returns:
            [`SSREncoder`] that shares the weights for keys and values, and has no levels. It can project subject embeddings, but
            not compute them.

        Example:

        ```py
        >>> encoder.layers_alone().project(subject_embeds)
        ```
        """
        config = self.config
        alone = type(self)(config.cross_attention_dim, config.vision_hidden_size, 1, 1, (), {})
        for module in (alone.to_q, alone.to_k, alone.norm):
            module.to(self.device, self.dtype)
        alone.layers = self.layers
        alone.register_to_config(attention_layers=dict(config.attention_layers))
        alone.known_fingerprint = self.fingerprint()
        return alone.eval()

    @torch.no_grad()
    def fingerprint(self, device: torch.device | None = None) -> torch.Tensor:
        r"""
        The encoder's output for a fixed input. Another encoder has a different fingerprint. The same encoder in another
        precision or on another device has nearly the same one.

        Args:
            device (`torch.device`, *optional*):
                The device on which the encoder runs, if it differs from that of its weights (offloading).

        Returns:
            `torch.Tensor` of shape `(num_levels + 1, 8)`, float32 on the CPU.
        """
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        config = self.config

        def fixed(*shape: int) -> torch.Tensor:
            # on the CPU whatever the default device is
            count = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device="cpu")
            return torch.sin(count * 1.7).reshape(shape).to(device or self.device, self.dtype)

        levels = len(config.image_levels)
        subject = self(fixed(1, 1, config.cross_attention_dim), fixed(levels, 1, 2, config.vision_hidden_size))
        parts = [subject[0, :, :8]]
        if config.attention_layers:
            parts.append(sum(key[0].mean(0)[:8] + value[0].mean(0)[:8] for key, value in self.project(subject))[None])
        return torch.cat(parts).float().cpu()

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Like `ConfigMixin.from_config`, which would treat a config file with a list as the name of a repository."""
        if isinstance(config, list):
            raise ValueError(f"The config has to be a dict, but is {config!r:.80}.")
        return super().from_config(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> "SSREncoder":
        r"""
        Load an encoder that `save_pretrained` has written. The arguments are those of `ModelMixin.from_pretrained`.

        Returns:
            [`SSREncoder`] in evaluation mode, and with `output_loading_info=True` also the loading info.

        Raises:
            `OSError`: if the file or repository does not exist, or if a file is truncated.
            `ValueError`: if the config does not belong to an SSR-Encoder, or if a weight is missing or not finite.
        """
        source = f"`pretrained_model_name_or_path`: {pretrained_model_name_or_path}"
        with_info = kwargs.pop("output_loading_info", False)
        kwargs = library_internals.precision_arguments(kwargs)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (OSError, ImportError):
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{source} holds no usable SSREncoder: {reason}") from error
        info: dict[str, Any] = {}
        model, info = loaded if isinstance(loaded, tuple) else (loaded, info)
        # diffusers would only warn and use random numbers
        missing = sorted(info.get("missing_keys", ()))
        if missing:
            raise ValueError(f"{source} lacks weights of its SSREncoder: {some_names(missing)}.")
        broken = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
        if broken:
            raise ValueError(f"{source} holds weights that are not finite numbers: {some_names(broken)}.")
        return (model, info) if with_info else model  # type: ignore[return-value]  # as diffusers has it

    @classmethod
    def from_released(
        cls,
        aligner: str | os.PathLike | Mapping[str, torch.Tensor],
        layers: str | os.PathLike | Mapping[str, torch.Tensor],
        **config: Any,
    ) -> "SSREncoder":
        r"""
        Load the two files that the authors released.

        Args:
            aligner (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                The aligner and subject encoder (`pytorch_model.bin`): the path of a torch pickle, which is read with
                `weights_only=True`, the path of a safetensors file, or a state dict.
            layers (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                The layers' keys and values (`pytorch_model_1.bin`), in the same form.
            **config:
                Arguments of `SSREncoder`, if its sizes differ from the defaults.

        Returns:
            [`SSREncoder`] in evaluation mode.

        Raises:
            `FileNotFoundError`: if a file does not exist.
            `ValueError`: if a tensor is missing, is not expected, has another shape, or contains values that are not finite.

        Example:

        ```py
        >>> encoder = SSREncoder.from_released("pytorch_model.bin", "pytorch_model_1.bin")
        >>> encoder.save_pretrained("my-ssr/ssr_encoder")
        ```
        """
        # names and shapes are compared before memory is allocated for the encoder
        with torch.device("meta"):
            model = cls(**config)
        # imported here, because the folder of a saved encoder contains only this file, which is enough to load and run it
        from . import released_weights

        state_dict = released_weights.read_released_weights(
            aligner, layers, model.state_dict(), [_module_name(name) for name in model.config.attention_layers]
        )
        # every weight is overwritten by the next line
        model.to_empty(device=torch.get_default_device())
        model.load_state_dict(state_dict)
        return model.eval()


def consistency_loss(
    subject_embeds: torch.Tensor, query_hidden_states: torch.Tensor, form: str = "released"
) -> torch.Tensor:
    r"""
    The embedding consistency regularization loss (section 3.4 of the paper, equation 7). It keeps the subject embeddings close
    to the query's text embeddings.

    Args:
        subject_embeds (`torch.Tensor` of shape `(batch_size, num_tokens * num_levels, cross_attention_dim)`):
            The output of [`SSREncoder`].
        query_hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, cross_attention_dim)`):
            The query of the encoder. It gets no gradient.
        form (`"released"` or `"paper"`, defaults to `"released"`):
            The released code compares token by token and sums over the levels. The paper compares the means.

    Returns:
        `torch.Tensor` with one number, which is 0 if both agree.

    Raises:
        `ValueError`: if `form` is neither `"released"` nor `"paper"`.

    Example:

    ```py
    >>> loss = F.mse_loss(noise_pred, noise) + 0.1 * consistency_loss(subject_embeds, query_hidden_states)
    ```
    """
    query = query_hidden_states.detach()
    if form == "paper":
        return (1 - F.cosine_similarity(subject_embeds.mean(1), query.mean(1), dim=-1)).mean()
    if form != "released":
        raise ValueError(f'`form` has to be "released" or "paper", but is {form!r}.')
    levels = subject_embeds.unflatten(1, (-1, query.shape[1]))
    return (1 - F.cosine_similarity(levels, query[:, None], dim=-1)).mean((0, 2)).sum()


def _module_name(layer: str) -> str:
    return layer.replace(".", "_")


def _check_number(name: str, value: Any, most: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"`{name}` has to be a whole number from {least} to {most}, but is {value!r:.80}.")


def _check_widths(cross_attention_dim: Any, vision_hidden_size: Any, inner_dim: Any, num_attention_heads: Any) -> None:
    _check_number("cross_attention_dim", cross_attention_dim, MAX_WIDTH)
    _check_number("vision_hidden_size", vision_hidden_size, MAX_WIDTH)
    _check_number("inner_dim", inner_dim, MAX_WIDTH)
    _check_number("num_attention_heads", num_attention_heads, MAX_WIDTH)
    if inner_dim % num_attention_heads:
        raise ValueError(
            f"`inner_dim` has to be a multiple of `num_attention_heads`, but is {inner_dim} with {num_attention_heads}"
            " heads."
        )


def _check_levels(image_levels: Any) -> None:
    if not isinstance(image_levels, (list, tuple)) or len(image_levels) > MAX_LEVELS:
        raise ValueError(f"`image_levels` has to be a list of at most {MAX_LEVELS}, but is {image_levels!r:.80}.")
    for level in image_levels:
        _check_number("image_levels", level, MAX_LAYERS, least=0)


def _check_layers(attention_layers: Any) -> None:
    if not isinstance(attention_layers, dict) or len(attention_layers) > MAX_LAYERS:
        raise ValueError(
            f"`attention_layers` has to be a dict with the widths of at most {MAX_LAYERS} layers, but is"
            f" {attention_layers!r:.80}."
        )
    for name, width in attention_layers.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"`attention_layers` has to name layers of the UNet, but names {name!r:.80}.")
        _check_number(f"attention_layers[{name!r:.80}]", width, MAX_WIDTH)
    if len({_module_name(name) for name in attention_layers}) < len(attention_layers):
        raise ValueError("`attention_layers` names two layers that differ in '.' and '_' alone.")


def _check_parameters(
    cross_attention_dim: int, vision_hidden_size: int, inner_dim: int, num_levels: int, layers: dict[str, int]
) -> None:
    of_levels = (num_levels + 1) * inner_dim * (cross_attention_dim + vision_hidden_size)
    count = of_levels + 2 * cross_attention_dim * (sum(layers.values()) + 1)
    if count > MAX_PARAMETERS:
        raise ValueError(f"An encoder of these sizes has {count:,} weights, more than any: {MAX_PARAMETERS:,}.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite. Tensors on the meta device, or with less than 16 bits, are not checked."""
    unknown = tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() < 2
    return unknown or bool(torch.isfinite(tensor).all())


def some_names(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
