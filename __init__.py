"""SSR-Encoder for diffusers: say which thing in a picture is meant, and draw new pictures of it."""

from .attention_map import SubjectAttentionMap
from .attention_processors import SSRAttnProcessor2_0
from .mixin_ssr import SSRPipelineMixin
from .modeling_ssr import SSREncoder
from .pipeline_ssr import StableDiffusionSSRPipeline
from .subject_embeds import SubjectEmbeds


__all__ = [
    "SSRAttnProcessor2_0",
    "SSREncoder",
    "SSRPipelineMixin",
    "StableDiffusionSSRPipeline",
    "SubjectAttentionMap",
    "SubjectEmbeds",
]
