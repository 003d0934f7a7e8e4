"""SSR-Encoder for diffusers: select a subject in a reference image, and generate new images of it."""

from . import internals_ssr  # noqa: F401  # isort: skip  (first, because it checks the versions of the libraries)
from .attention_processors import SSRAttnProcessor2_0
from .encoding_ssr import SubjectAttentionMap
from .hooks_ssr import subject_in_unet
from .mixin_ssr import SSRPipelineMixin
from .modeling_ssr import SSREncoder
from .pipeline_classes_ssr import ssr_pipeline_class
from .pipeline_ssr import StableDiffusionSSRPipeline
from .pipeline_ssr_animatediff import AnimateDiffSSRPipeline
from .pipeline_ssr_controlnet import StableDiffusionSSRControlNetPipeline
from .subject_embeds_ssr import SubjectEmbeds


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
    "ssr_pipeline_class",
    "subject_in_unet",
]


def __dir__() -> list[str]:
    """Returns the public names, without the modules, for tab completion."""
    return [*__all__, "__doc__", "__version__"]
