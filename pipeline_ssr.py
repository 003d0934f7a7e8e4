"""Text-to-image generation with a subject from a reference picture, for any Stable Diffusion 1.5 checkpoint."""

from . import versions_ssr  # noqa: F401  # isort: skip  (first, see that module)
from diffusers import StableDiffusionPipeline

from .attention_map import SubjectAttentionMap  # noqa: F401  (see pipeline.py)
from .attention_processors import SSRAttnProcessor2_0  # noqa: F401
from .checks_ssr import check_fits  # noqa: F401
from .encoding_ssr import SubjectEncodingMixin  # noqa: F401
from .file_utils import atomic_folder  # noqa: F401
from .image_decoding import decode  # noqa: F401
from .image_processing_ssr import preprocess  # noqa: F401
from .library_internals import disable_offloading  # noqa: F401
from .loading_ssr import SSRLoaderMixin  # noqa: F401
from .mixin_ssr import SSRPipelineMixin
from .modeling_ssr import SSREncoder  # noqa: F401
from .pipeline_classes import ssr_pipeline_class  # noqa: F401
from .released_weights import read_released_weights  # noqa: F401
from .shared_components import own_pipeline  # noqa: F401
from .subject_cache import SubjectCache  # noqa: F401
from .subject_embeds import SubjectEmbeds  # noqa: F401
from .subject_file import read_subject_file  # noqa: F401
from .subject_request import SubjectRequest  # noqa: F401
from .token_merging import merge_tokens  # noqa: F401
from .unet_hooks import SubjectPasses  # noqa: F401
from .versions_ssr import check_versions  # noqa: F401
from .weight_files import read_header  # noqa: F401


class StableDiffusionSSRPipeline(SSRPipelineMixin, StableDiffusionPipeline):
    r"""
    Pipeline for text-to-image generation with a subject from a reference picture. A text query names the subject in
    the picture. The pipeline has the arguments, components and methods of [`StableDiffusionPipeline`] and of
    [`SSRPipelineMixin`].

    Example:

    ```py
    >>> import torch
    >>> from diffusers import DiffusionPipeline
    >>> from diffusers.utils import load_image

    >>> pipe = DiffusionPipeline.from_pretrained(
    ...     "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     custom_pipeline="<owner>/<repo>",
    ...     trust_remote_code=True,
    ...     dtype=torch.float16,
    ... ).to("cuda")
    >>> pipe.load_ssr("<owner>/<repo>")
    >>> photo = load_image("cat_and_dog.png")
    >>> image = pipe("a cat on the beach", subject_image=photo, subject_query="cat", subject_scale=0.65).images[0]
    ```
    """
