"""SSR-Encoder for diffusers: select a subject in a picture with a text query, and generate new pictures of it."""

from . import versions_ssr  # noqa: F401  (first, see that module)
from .attention_map import SubjectAttentionMap
from .attention_processors import SSRAttnProcessor2_0
from .mixin_ssr import SSRPipelineMixin
from .modeling_ssr import SSREncoder
from .pipeline_classes import ssr_pipeline_class
from .pipeline_ssr import StableDiffusionSSRPipeline
from .pipeline_ssr_animatediff import AnimateDiffSSRPipeline
from .pipeline_ssr_controlnet import StableDiffusionSSRControlNetPipeline
from .shared_components import set_max_concurrent_calls
from .subject_embeds import SubjectEmbeds


__version__ = "0.1.0"

__all__ = [
    "AnimateDiffSSRPipeline",
    "SSRAttnProcessor2_0",
    "SSREncoder",
    "SSRPipelineMixin",
    "StableDiffusionSSRControlNetPipeline",
    "StableDiffusionSSRPipeline",
    "SubjectAttentionMap",
    "SubjectEmbeds",
    "set_max_concurrent_calls",
    "ssr_pipeline_class",
]
