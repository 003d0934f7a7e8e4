"""Text-to-image generation with a subject from a reference image and a layout from a ControlNet."""

from .internals_ssr import check_versions  # noqa: F401  # isort: skip  (first: it names libraries that are too old)
from diffusers import StableDiffusionControlNetPipeline

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


class StableDiffusionSSRControlNetPipeline(SSRPipelineMixin, StableDiffusionControlNetPipeline):
    r"""
    Pipeline for text-to-image generation with a subject and one or several ControlNets. The pipeline has the
    arguments, components and methods of [`StableDiffusionControlNetPipeline`] and of [`SSRPipelineMixin`]. By default,
    a ControlNet gets only the text; with `subject_in_controlnet=True` it also gets the subject's tokens. For
    image-to-image and inpainting with ControlNet, see `ssr_pipeline_class`.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import ControlNetModel
    >>> from diffusers.utils import load_image

    >>> controlnet = ControlNetModel.from_pretrained("lllyasviel/control_v11p_sd15_canny", dtype=torch.float16)
    >>> pipe = StableDiffusionSSRControlNetPipeline.from_pipe(ssr_pipe, controlnet=controlnet.to("cuda"))
    >>> cat = pipe.encode_subject(load_image("cat_and_dog.png"), query="cat")
    >>> image = pipe("a cat on a sofa", image=load_image("edges.png"), subject=cat).images[0]
    ```
    """
