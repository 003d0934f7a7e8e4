"""Text-to-image generation with a subject from a reference image, for any Stable Diffusion 1.5 checkpoint."""

from .internals_ssr import check_versions  # noqa: F401  # isort: skip  (first: it names libraries that are too old)
from diffusers import StableDiffusionPipeline

from .arguments_ssr import parse_subjects  # noqa: F401  (see pipeline.py)
from .attention_processors import SSRAttnProcessor2_0  # noqa: F401
from .components_ssr import SSRComponents  # noqa: F401
from .encoding_ssr import SubjectEncodingMixin  # noqa: F401
from .files_ssr import read_subject_file  # noqa: F401
from .hooks_ssr import subject_in_unet  # noqa: F401
from .images_ssr import to_pil  # noqa: F401
from .loading_ssr import SSRLoaderMixin  # noqa: F401
from .mixin_ssr import SSRPipelineMixin
from .modeling_ssr import SSREncoder  # noqa: F401
from .pipeline_classes_ssr import ssr_pipeline_class  # noqa: F401
from .request_ssr import SubjectRequest  # noqa: F401
from .subject_embeds_ssr import SubjectEmbeds  # noqa: F401


class StableDiffusionSSRPipeline(SSRPipelineMixin, StableDiffusionPipeline):
    r"""
    Pipeline for text-to-image generation with a subject from a reference image. A text query names the subject in
    the image. The pipeline has the arguments, components and methods of [`StableDiffusionPipeline`] and of
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
