"""The encoders that SSR-Encoder is compared with: an adapter in the style of IP-Adapter Plus, and one that averages
patches.

Both replace the SSREncoder in training and in the pipeline, so everything else is the same in the comparison.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from diffusers_ssr import SSREncoder


class WholePictureEncoder(SSREncoder):
    """
    Encodes the whole image without a query, as IP-Adapter Plus does. The resampler of diffusers converts the
    patches' hidden states at one level to a few tokens, and each layer projects these tokens to keys and values.

    Args:
        cross_attention_dim (`int`), vision_hidden_size (`int`), attention_layers (`dict[str, int]`): as in `SSREncoder`.
        image_levels (`tuple[int]`): the level that is used; IP-Adapter Plus uses the second to last level.
        num_queries (`int`): the number of tokens for an image.
        depth (`int`): the number of blocks of the resampler.
        inner_dim (`int`): the width of the resampler.
        num_attention_heads (`int`): the resampler's heads, each with a width of `inner_dim // num_attention_heads`.
    """

    @register_to_config
    def __init__(
        self,
        cross_attention_dim: int,
        vision_hidden_size: int,
        inner_dim: int,
        num_attention_heads: int,
        image_levels: tuple[int, ...],
        attention_layers: dict[str, int],
        num_queries: int = 16,
        depth: int = 4,
    ):
        super().__init__(
            cross_attention_dim, vision_hidden_size, inner_dim, num_attention_heads, image_levels, attention_layers
        )
        for name in ("to_q", "to_k", "to_v", "to_out", "norm"):
            delattr(self, name)
        self.resampler = IPAdapterPlusImageProjection(
            vision_hidden_size, cross_attention_dim, inner_dim, depth, inner_dim // num_attention_heads,
            num_attention_heads, num_queries,
        )  # fmt: skip

    def forward(self, query_hidden_states, image_hidden_states, mask=None, mask_weight=1.0) -> torch.Tensor:
        """Same as `SSREncoder.forward`, but ignores the query and the mask, and returns embeddings of shape
        `(batch_size, num_queries, cross_attention_dim)`."""
        return self.resampler(image_hidden_states[-1])


class MeanPatchEncoder(SSREncoder):
    """
    An SSR-Encoder that ignores the query: its tokens attend equally to all patches. This is the ablation without
    token-to-patch alignment. The arguments are those of `SSREncoder`.
    """

    def attention_probs(self, query_hidden_states, image_hidden_states, mask=None, mask_weight=1.0) -> torch.Tensor:
        """Returns the same attention for each patch, and 0 for the class token."""
        batch_size, num_tokens = query_hidden_states.shape[:2]
        length = image_hidden_states.shape[1]
        probs = query_hidden_states.new_full((1, 1, 1, length), 1 / (length - 1))
        probs[..., 0] = 0
        return probs.expand(batch_size, self.config.num_attention_heads, num_tokens, length)
