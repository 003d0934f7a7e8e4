"""What SSR-Encoder is compared with: an adapter of IP-Adapter-Plus's kind, and one that averages patches.

Both stand where an SSREncoder stands, in training and in the pipeline, so that nothing else differs.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from diffusers_ssr import SSREncoder


class WholePictureEncoder(SSREncoder):
    """
    Reads the whole picture and no query, as IP-Adapter Plus does: diffusers' own resampler makes a few tokens of the patches'
    hidden states at one level, and each layer has keys and values for them.

    Args:
        cross_attention_dim (`int`), vision_hidden_size (`int`), attention_layers (`dict[str, int]`): as in `SSREncoder`.
        image_levels (`tuple[int]`): the level that is read; IP-Adapter Plus takes the last but one.
        num_queries (`int`): how many tokens describe the picture.
        depth (`int`): the resampler's blocks.
        inner_dim (`int`): the resampler's width.
        num_attention_heads (`int`): the resampler's heads, `inner_dim // num_attention_heads` wide.
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
        """As `SSREncoder.forward`, but for query and mask, of which nothing is used: `(batch_size, num_queries,
        cross_attention_dim)`."""
        return self.resampler(image_hidden_states[-1])


class MeanPatchEncoder(SSREncoder):
    """
    An SSR-Encoder whose tokens do not look where the query says, but everywhere alike: the ablation without token-to-patch
    alignment. Arguments are those of `SSREncoder`.
    """

    def attention_probs(self, query_hidden_states, image_hidden_states, mask=None, mask_weight=1.0) -> torch.Tensor:
        """The same share for each patch, and none for the class token."""
        batch_size, num_tokens = query_hidden_states.shape[:2]
        length = image_hidden_states.shape[1]
        probs = query_hidden_states.new_full((1, 1, 1, length), 1 / (length - 1))
        probs[..., 0] = 0
        return probs.expand(batch_size, self.config.num_attention_heads, num_tokens, length)
