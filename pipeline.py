"""The entry file that `custom_pipeline="<owner>/<repo>"` or `custom_pipeline="<folder>"` loads.

diffusers copies a local entry file and the files that it imports with relative imports, but not the files that these
files import in turn. Therefore this file imports every module.
"""

from . import versions_ssr  # noqa: F401  (first, see that module)
from .attention_map import SubjectAttentionMap  # noqa: F401
from .attention_processors import SSRAttnProcessor2_0  # noqa: F401
from .checks_ssr import check_fits  # noqa: F401
from .encoding_ssr import SubjectEncodingMixin  # noqa: F401
from .file_utils import atomic_folder  # noqa: F401
from .image_decoding import decode  # noqa: F401
from .image_processing_ssr import preprocess  # noqa: F401
from .library_internals import disable_offloading  # noqa: F401
from .loading_ssr import SSRLoaderMixin  # noqa: F401
from .mixin_ssr import SSRPipelineMixin  # noqa: F401
from .modeling_ssr import SSREncoder  # noqa: F401
from .pipeline_classes import ssr_pipeline_class  # noqa: F401
from .pipeline_ssr import StableDiffusionSSRPipeline  # noqa: F401
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
