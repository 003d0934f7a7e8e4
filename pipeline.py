"""The entry file that `custom_pipeline="<owner>/<repo>"` or `custom_pipeline="<folder>"` loads.

From a local folder, diffusers copies the entry file and the files that it imports with relative imports, but not the
files that these files import in turn. Therefore an entry file imports every module. From the Hub, diffusers follows the
imports of each file. The entry file that `examples/publish.py` writes only imports `pipeline_ssr`, so that each module
is requested once.
"""

from .internals_ssr import check_versions  # noqa: F401  # isort: skip  (first: it names libraries that are too old)
from .arguments_ssr import parse_subjects  # noqa: F401
from .attention_processors import SSRAttnProcessor2_0  # noqa: F401
from .components_ssr import SSRComponents  # noqa: F401
from .encoding_ssr import SubjectEncodingMixin  # noqa: F401
from .files_ssr import read_subject_file  # noqa: F401
from .hooks_ssr import subject_in_unet  # noqa: F401
from .images_ssr import to_pil  # noqa: F401
from .loading_ssr import SSRLoaderMixin  # noqa: F401
from .mixin_ssr import SSRPipelineMixin  # noqa: F401
from .modeling_ssr import SSREncoder  # noqa: F401
from .pipeline_classes_ssr import ssr_pipeline_class  # noqa: F401
from .pipeline_ssr import StableDiffusionSSRPipeline  # noqa: F401
from .request_ssr import SubjectRequest  # noqa: F401
from .subject_embeds_ssr import SubjectEmbeds  # noqa: F401
