"""Text-to-video generation with a subject, using AnimateDiff."""

from .internals_ssr import check_versions  # noqa: F401  # isort: skip  (first: it names libraries that are too old)
from diffusers import AnimateDiffPipeline

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


class AnimateDiffSSRPipeline(SSRPipelineMixin, AnimateDiffPipeline):
    r"""
    Pipeline for text-to-video generation with a subject. The pipeline has the arguments, components and methods of
    [`AnimateDiffPipeline`] and of [`SSRPipelineMixin`]. The subject is added in the spatial cross-attention layers,
    not in the motion modules. Its keys and values are stored once for all frames. For video-to-video and for
    AnimateDiff with ControlNet, see `ssr_pipeline_class`.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import MotionAdapter
    >>> from diffusers.utils import export_to_gif, load_image

    >>> adapter = MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2", dtype=torch.float16)
    >>> pipe = AnimateDiffSSRPipeline.from_pipe(ssr_pipe, motion_adapter=adapter).to("cuda")
    >>> cat = pipe.encode_subject(load_image("cat_and_dog.png"), query="cat")
    >>> export_to_gif(pipe("a cat walking", subject=cat, num_frames=16).frames[0], "cat.gif")
    ```
    """
