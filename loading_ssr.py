"""The mixin that loads, replaces and saves the SSR-Encoder of a pipeline, similar to the loader mixins of
diffusers."""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers.utils.torch_utils import is_compiled_module
from huggingface_hub.utils import EntryNotFoundError, validate_hf_hub_args
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from . import checks_ssr, file_utils, image_processing_ssr, library_internals, modeling_ssr, unet_hooks, weight_files


logger = logging.get_logger(__name__)

COMPONENTS = ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor")
DEFAULT_SCALE = 0.65

# Upper limits for the config of a vision encoder, above the sizes of the largest CLIP.
MAX_VISION_SIDE = 4096
MAX_VISION_LAYERS = 256
MAX_VISION_WIDTH = 2**17
MAX_VISION_PARAMETERS = 2**33
# the limits of the mean and the standard deviation of an image processor, for pixels from 0 to 1
MAX_PIXEL_VALUE = 1000.0


# For type checkers the mixins are subclasses of `DiffusionPipeline`, because they are mixed into pipelines. At run
# time they must not be, because diffusers refuses a file of custom code that contains two pipeline classes.
if TYPE_CHECKING:
    _Pipeline = DiffusionPipeline
else:
    _Pipeline = object


class SSRComponents(_Pipeline):
    """Declares the pipeline's attributes that the mixins use. The SSR components are `None` until `load_ssr` is
    called; `_loaded_encoder` raises an error in that case."""

    unet: Any
    text_encoder: Any
    tokenizer: Any
    ssr_encoder: modeling_ssr.SSREncoder
    ssr_image_encoder: PreTrainedModel
    ssr_image_processor: CLIPImageProcessor

    if TYPE_CHECKING:
        controlnet: Any
        __call__: Callable[..., Any]
        _encode_prompt: Callable[..., Any]
        _offload_device: Any

        def _loaded_encoder(self) -> modeling_ssr.SSREncoder: ...


class SSRLoaderMixin(SSRComponents):
    """`load_ssr`, `unload_ssr`, `drop_ssr_encoders`, `from_pretrained`, `from_pipe` and `save_pretrained` for
    [`SSRPipelineMixin`]."""

    @validate_hf_hub_args
    def load_ssr(
        self,
        pretrained_model_name_or_path: str | os.PathLike | modeling_ssr.SSREncoder,
        subfolder: str = "ssr_encoder",
        image_encoder: PreTrainedModel | None = None,
        image_encoder_folder: str | None = "ssr_image_encoder",
        image_processor: CLIPImageProcessor | None = None,
        image_processor_folder: str | None = "ssr_image_processor",
        **kwargs,
    ) -> None:
        r"""
        Load an SSR-Encoder, and the vision encoder that it was trained with, into the pipeline. Offloading is disabled
        while the components are replaced and enabled again afterwards, as in the loaders of diffusers.

        Args:
            pretrained_model_name_or_path (`str`, `os.PathLike` or [`SSREncoder`]):
                A repository on the Hub, a folder that was written by `save_pretrained` or `train_ssr.py`, a checkpoint
                of `train_ssr.py`, or an encoder that is already in memory. The dtype and the device of an encoder in
                memory are not changed, because other pipelines may use it. So it has to be on the device of the
                pipeline, or on the CPU if the pipeline uses model offloading, and a pipeline with sequential
                offloading only takes a folder or repository.
            subfolder (`str`, defaults to `"ssr_encoder"`):
                The subfolder with the SSR-Encoder.
            image_encoder (`CLIPVisionModel` or `CLIPVisionModelWithProjection`, *optional*):
                A vision encoder that is already in memory. By default, it is loaded from `image_encoder_folder`.
            image_encoder_folder (`str`, *optional*, defaults to `"ssr_image_encoder"`):
                The subfolder with the vision encoder. If `None`, no vision encoder is loaded, and the pipeline can
                only draw subjects that are already encoded.
            image_processor (`CLIPImageProcessor`, *optional*):
                The image processor with the vision encoder's input size and normalization. If it is not given and not
                in the repository, it is created from the config of the vision encoder.
            image_processor_folder (`str`, *optional*, defaults to `"ssr_image_processor"`):
                The subfolder with the image processor. If `None`, no image processor is loaded.
            **kwargs:
                `dtype` (or `torch_dtype`), which defaults to the dtype of the UNet, and the `from_pretrained`
                arguments `cache_dir`, `force_download`, `local_files_only`, `proxies`, `revision`, `token`,
                `use_safetensors` and `variant`.

        Raises:
            `ValueError`: if `pretrained_model_name_or_path` or `image_encoder` is something else, if an argument is
            unknown, if the encoder does not fit the UNet, the text encoder or the vision encoder, if an encoder in
            memory is on another device than the pipeline, or is given to a pipeline with sequential offloading, if a
            file is broken or too large, if a weight is missing, or of a wrong shape, or not finite, or if the image
            processor does not fit the vision encoder. The pipeline is not changed in this case.

        Example:

        ```py
        >>> pipe.load_ssr("<owner>/<repo>")
        ```
        """
        source = pretrained_model_name_or_path
        _check_load_arguments(source, image_encoder, kwargs)
        # a pipeline without a UNet can encode subjects
        precise = self.text_encoder if self.unet is None else unet_hooks.find_unet(self.unet)
        kwargs = library_internals.precision_arguments(kwargs, default=getattr(precise, "dtype", None))
        loaded = []
        named = "`image_processor`"
        if isinstance(source, nn.Module):
            encoder: Any = source
            if image_encoder is None and image_encoder_folder is not None:
                raise ValueError(
                    "`image_encoder` has to be given with an SSREncoder that is already in memory, or"
                    " `image_encoder_folder=None` to draw only subjects that are encoded already."
                )
        else:
            encoder = modeling_ssr.SSREncoder.from_pretrained(source, subfolder=subfolder, **kwargs)
            loaded.append(encoder)
            if image_encoder is None and image_encoder_folder is not None:
                image_encoder = _load_image_encoder(source, image_encoder_folder, kwargs)
                loaded.append(image_encoder)
            if image_processor is None and image_processor_folder is not None:
                image_processor = _load_image_processor(source, image_processor_folder, kwargs)
                named = f"`image_processor_folder`: {image_processor_folder!r} of {source}"
        checks_ssr.check_fits(self.unet, encoder, image_encoder, self.text_encoder)
        if image_processor is not None:
            check_image_processor(image_processor, image_encoder, named)
        elif image_encoder is not None:
            image_processor = image_processing_ssr.default_image_processor(image_encoder)
        models: list[nn.Module] = [encoder] if image_encoder is None else [encoder, image_encoder]
        for model in models:
            if model not in loaded:
                self._check_device(model)
        with self._offloading_disabled() as offloaded:
            for model in models:
                model.eval()
                if model in loaded:
                    model.to("cpu" if offloaded else self._execution_device)
            self.register_modules(
                ssr_encoder=encoder, ssr_image_encoder=image_encoder, ssr_image_processor=image_processor
            )

    def _check_device(self, model: nn.Module) -> None:
        """Raises a `ValueError` if the pipeline would have to move a model that another pipeline may use."""
        name = type(_without_compilation(model)).__name__
        offloaded, sequential = library_internals.offloading(self)
        if offloaded and any(model is own for own in (self.ssr_encoder, self.ssr_image_encoder)):
            return
        if sequential:
            raise ValueError(
                f"`{name}` is already in memory, but sequential offloading would take its weights away, also for other"
                " pipelines: pass the name of a folder or repository to `load_ssr`, or call `load_ssr` before"
                " `enable_sequential_cpu_offload`."
            )
        device = torch.device("cpu") if offloaded else torch.device(self._execution_device)
        if model.device.type not in ("meta", device.type):
            where = "keeps its models on cpu" if offloaded else f"runs on {device}"
            raise ValueError(
                f"`{name}` is on {model.device}, but the pipeline {where}: move it there with"
                f' `.to("{device}")` before `load_ssr`. Models that are already in memory are not moved.'
            )

    def unload_ssr(self) -> None:
        r"""
        Remove the SSR-Encoder and its vision encoder from the pipeline. The pipeline then behaves like the stock
        pipeline.

        Example:

        ```py
        >>> pipe.unload_ssr()
        ```
        """
        with self._offloading_disabled():
            self.register_modules(**dict.fromkeys(COMPONENTS))
        self._ssr_scale = DEFAULT_SCALE

    def drop_ssr_encoders(self) -> None:
        r"""
        Free the memory of the vision encoder and of the part of the SSR-Encoder that encodes pictures. Subjects that
        are already encoded, or loaded from a file, can still be drawn. Call `load_ssr` again to encode another
        subject. Other pipelines that share the encoders are not affected.

        Raises:
            `ValueError`: if no SSR-Encoder is loaded.

        Example:

        ```py
        >>> cat = pipe.encode_subject(photo, query="cat")
        >>> pipe.drop_ssr_encoders()
        >>> image = pipe("a cat on the beach", subject=cat).images[0]
        ```
        """
        self._loaded_encoder()
        with self._offloading_disabled():
            self.register_modules(
                ssr_encoder=self.ssr_encoder.layers_alone(), ssr_image_encoder=None, ssr_image_processor=None
            )

    @contextmanager
    def _offloading_disabled(self) -> Iterator[bool]:
        """Disables offloading, so that components can be replaced while they have no offloading hooks, and enables it
        again afterwards, as in the loaders of diffusers. Yields whether offloading keeps the models on the CPU."""
        model, sequential, group = library_internals.disable_offloading(self)
        try:
            yield model or sequential
        finally:
            if model:
                self.enable_model_cpu_offload(device=self._offload_device)
            elif sequential:
                self.enable_sequential_cpu_offload(device=self._offload_device)
            elif group:
                for component in self.components.values():
                    if isinstance(component, nn.Module):
                        library_internals.reapply_group_offloading(component)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        r"""
        Save the whole pipeline with its code. `DiffusionPipeline.from_pretrained(save_directory,
        trust_remote_code=True)` can load it without this package. The arguments are those of
        `DiffusionPipeline.save_pretrained`. If an error occurs, the folder is not changed.

        A class that is defined in a notebook, in an interactive session, or in the script that is running, is not in a
        module that can be saved. In this case the pipeline is saved as the nearest class that it is derived from, and a
        warning names this class. To load it as the first class, call `from_pretrained` of that class.

        Raises:
            `ValueError`: if a class is not in a module that can be saved, and is not derived from a Stable Diffusion
                1.5 pipeline of one.
        """
        saved = self._saved_class()
        if saved is not type(self):
            logger.warning(
                f"{type(self).__name__} is not defined in a module that can be saved with the pipeline: it is saved as"
                f" {saved.__name__}. `{type(self).__name__}.from_pretrained` loads it as {type(self).__name__}."
            )
        with file_utils.atomic_folder(save_directory) as folder:
            super().save_pretrained(os.fspath(folder), *args, **kwargs)
            self._save_index_and_code(folder, saved)

    def _saved_class(self) -> Any:
        """Returns the class that `model_index.json` names: the pipeline's class, or the nearest class that it is derived
        from and whose code can be saved."""
        from . import pipeline_classes  # imported here, because that module imports this one

        pipelines = [each for each in type(self).__mro__ if issubclass(each, DiffusionPipeline)]
        for each in pipelines:
            if issubclass(each, SSRLoaderMixin) and _has_code(vars(each).get("_stock_class", each)):
                return each
        stock: Any = next(each for each in pipelines if not issubclass(each, SSRLoaderMixin) and _has_code(each))
        try:
            return pipeline_classes.ssr_pipeline_class(stock)
        except ValueError as error:
            raise ValueError(
                f"{type(self).__name__} cannot be saved, because it is not defined in a module whose code can be saved"
                f" with it: move it to a module and import it. ({error})"
            ) from error

    def _save_index_and_code(self, folder: Path, saved: Any) -> None:
        """Copies the pipeline's modules to the folder and writes their names to `model_index.json`."""
        entry = self._save_code(folder, saved)
        model_index = folder / self.config_name
        config = json.loads(model_index.read_text())
        config["_class_name"] = [entry.stem, saved.__name__]
        if self.ssr_encoder is not None:
            model = _without_compilation(self.ssr_encoder)
            encoder = next(each for each in type(model).__mro__ if _has_code(each))
            code = Path(inspect.getfile(encoder))
            _copy_code(code, folder / "ssr_encoder")
            config["ssr_encoder"] = [code.stem, encoder.__name__]
        model_index.write_text(json.dumps(config, indent=2) + "\n")

    def _save_code(self, folder: Path, saved: Any) -> Path:
        """Copy the modules that the class needs, and return the one in which diffusers looks for the class."""
        # Any pipeline file that imports all modules will do. A folder of custom code contains only one of them, the
        # one that was requested.
        files = sorted(Path(__file__).parent.glob("pipeline*.py"), reverse=True)
        listing = next(file for file in files if "from .mixin_ssr import" in file.read_text())
        if "_stock_class" in vars(saved):  # a class made by `ssr_pipeline_class` is not defined in a file
            entry = folder / f"pipeline_{saved.__name__.lower()}.py"
            stock, lines = saved._stock_class, _import_lines(listing)
            entry.write_text(
                f'"""{saved.__name__}, as `ssr_pipeline_class` makes it."""\n\n'
                f"from {stock.__module__} import {stock.__name__}\n\n{lines}\n\n"
                f"{saved.__name__} = ssr_pipeline_class({stock.__name__})\n"
            )
        else:
            entry = Path(inspect.getfile(saved))
        for file in {entry, *map(Path, get_relative_import_files(listing))}:
            _copy_code(file, folder)
        return entry

    def __getstate__(self) -> dict:
        """Makes the pipeline picklable, for example to send it to another process."""
        state = dict(self.__dict__)
        if state.get("ssr_image_encoder") is not None:
            state["ssr_image_encoder"] = library_internals.without_capturing_hooks(state["ssr_image_encoder"])
        return state

    def __copy__(self):
        # `copy.copy` would use `__getstate__`, and the copy would not share the vision encoder
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    # The `model_index.json` of a saved pipeline names the class and the code that it was saved with. The next two
    # methods replace these names if the pipeline is loaded with one of the package's classes, for example with
    # `StableDiffusionSSRControlNetPipeline.from_pretrained(folder, controlnet=...)`. Without them, diffusers would
    # return the saved class and drop the ControlNet.

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs):
        config = super()._dict_from_json_file(json_file, **kwargs)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Same as `DiffusionPipeline.load_config`, but with the [`SSREncoder`] class of the running code."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict) and (config.get("ssr_encoder") or [None])[0] is not None:
            config["ssr_encoder"] = [modeling_ssr.SSREncoder.__module__, modeling_ssr.SSREncoder.__name__]
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Same as `DiffusionPipeline.from_pretrained`, but accepts `dtype` in all supported versions of diffusers, and
        raises a `ValueError` if the vision encoder has weights that are not finite, or if the image processor does not
        fit it."""
        kwargs = library_internals.precision_arguments(kwargs)
        made = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        named = f"`pretrained_model_name_or_path`: {pretrained_model_name_or_path}"
        image_encoder, processor = (getattr(made, name, None) for name in COMPONENTS[1:])
        if image_encoder is not None:
            _check_finite(image_encoder, f"{named}: `ssr_image_encoder`")
        if processor is not None:
            check_image_processor(processor, image_encoder, f"{named}: `ssr_image_processor`")
        return made

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        r"""
        Create this pipeline from the components of another pipeline, including its SSR-Encoder and the scale that was
        set with `set_ssr_scale`. The arguments are
        those of `DiffusionPipeline.from_pipe`. Only the default of `dtype` is different: `DiffusionPipeline.from_pipe`
        casts the shared components to float32, and this method keeps their dtype if all of them have the same one.

        Args:
            pipeline (`DiffusionPipeline`):
                Any Stable Diffusion 1.5 pipeline, with or without an SSR-Encoder.
            kwargs:
                Additional components, such as `controlnet`, and `dtype`.

        Returns:
            A pipeline of this class that shares the components. If the pipeline needs a UNet with motion modules, this
            UNet is a new model on the CPU.

        Example:

        ```py
        >>> pipe = StableDiffusionSSRPipeline.from_pipe(stock_pipe)
        ```
        """
        ours = {name: getattr(pipeline, name) for name in COMPONENTS if getattr(pipeline, name, None) is not None}
        models = (each for each in pipeline.components.values() if isinstance(each, nn.Module))
        dtypes = {getattr(each, "dtype", None) for each in models} - {None}
        default = dtypes.pop() if len(dtypes) == 1 else None
        made = super().from_pipe(
            pipeline, **{**ours, **library_internals.precision_arguments(kwargs, default=default)}
        )
        made._ssr_scale = getattr(pipeline, "_ssr_scale", DEFAULT_SCALE)
        return made


# the arguments of `from_pretrained` that `load_ssr` accepts
_FROM_PRETRAINED = (
    "cache_dir",
    "dtype",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "torch_dtype",
    "use_safetensors",
    "variant",
)


def _check_load_arguments(source: Any, image_encoder: Any, kwargs: dict) -> None:
    # `custom_pipeline=` imports its own copy of the class, which is recognised by its name
    names = [each.__name__ for each in type(_without_compilation(source)).__mro__]
    if not isinstance(source, (str, os.PathLike)) and modeling_ssr.SSREncoder.__name__ not in names:
        raise ValueError(
            "`pretrained_model_name_or_path` has to be a folder, the name of a repository, or an SSREncoder, but is"
            f" of type {type(source).__name__}."
        )
    if image_encoder is not None and not hasattr(getattr(image_encoder, "config", None), "hidden_size"):
        raise ValueError(
            "`image_encoder` has to be a CLIPVisionModel or CLIPVisionModelWithProjection, but is a"
            f" {type(image_encoder).__name__}."
        )
    for name in kwargs:
        if name not in _FROM_PRETRAINED:
            raise ValueError(
                f"`{name}` is not an argument of `load_ssr`, which passes only {', '.join(_FROM_PRETRAINED)} on to"
                " `from_pretrained`."
            )


def _load_image_encoder(source, folder: str, kwargs: dict) -> CLIPVisionModel:
    # a checkpoint of `train_ssr.py` contains only the trained models; the vision encoder is in the parent folder
    beside = Path(source).parent
    if os.path.isdir(source) and not os.path.isdir(os.path.join(source, folder)):
        if not (beside / folder).is_dir():
            raise ValueError(
                f"`image_encoder_folder`: {source} holds no folder {folder!r}: pass the vision encoder that the SSR-Encoder"
                " was trained on as `image_encoder`, or `image_encoder_folder=None` to draw only encoded subjects."
            )
        source = beside
    kwargs = library_internals.precision_arguments(kwargs, "transformers")
    named = f"`image_encoder_folder`: {folder!r} of {source}"
    vision: Any = CLIPVisionModel
    try:
        kwargs = _check_image_encoder_files(source, folder, kwargs)
        model, info = vision.from_pretrained(source, subfolder=folder, output_loading_info=True, **kwargs)
    except (OSError, ImportError):
        raise
    except Exception as error:  # transformers raises a `RuntimeError` for a wrong shape, and others for a wrong config
        reason = str(error) or type(error).__name__
        raise ValueError(f"{named} holds no usable vision encoder: {reason}") from error
    # transformers only warns about missing weights and initializes them with random numbers
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{named} lacks weights of its vision encoder: {weight_files.some_names(missing)}.")
    _check_finite(model, named)
    return model


def _check_finite(model: nn.Module, named: str) -> None:
    broken = [name for name, parameter in model.named_parameters() if not modeling_ssr.is_finite(parameter)]
    if broken:
        raise ValueError(f"{named} holds weights that are not finite numbers: {weight_files.some_names(broken)}.")


def _check_image_encoder_files(source: Any, folder: str, kwargs: dict) -> dict:
    """Raises a `ValueError` if the config or the weights cannot be those of a vision encoder, before they are loaded.
    Returns the arguments with which `from_pretrained` loads the files that were checked."""
    file, kwargs = weight_files.check_config(source, folder, kwargs)
    if file is None:
        return kwargs
    try:
        config = CLIPVisionConfig.from_pretrained(file)
    except OSError as error:  # it is not JSON
        raise ValueError(str(error)) from error
    if getattr(config, "quantization_config", None):  # a quantized encoder has other weights
        return kwargs
    _check_vision_config(config)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = SAFE_WEIGHTS_NAME, WEIGHTS_NAME
    weight_files.check_weights(source, folder, names, kwargs, shapes, strict=False)
    return {**kwargs, "force_download": False}  # the check has downloaded the files


def _check_vision_config(config: Any) -> None:
    """Raises a `ValueError` if a size is not a positive whole number, or too large. transformers would allocate memory
    for any size."""
    most = {
        "hidden_size": MAX_VISION_WIDTH,
        "intermediate_size": MAX_VISION_WIDTH,
        "num_hidden_layers": MAX_VISION_LAYERS,
        "num_attention_heads": MAX_VISION_WIDTH,
        "num_channels": 4,
        "image_size": MAX_VISION_SIDE,
        "patch_size": MAX_VISION_SIDE,
    }
    for name, largest in most.items():
        modeling_ssr.check_number(name, getattr(config, name), largest)
    width = config.hidden_size
    if width % config.num_attention_heads:
        raise ValueError(
            f"`hidden_size` has to be a multiple of `num_attention_heads`, but is {width} with"
            f" {config.num_attention_heads} heads."
        )
    patches = (config.image_size // config.patch_size) ** 2
    count = config.num_hidden_layers * width * (4 * width + 2 * config.intermediate_size) + patches * width
    if not patches or count > MAX_VISION_PARAMETERS:
        raise ValueError(
            f"A vision encoder of these sizes has {patches:,} patches and about {count:,} weights; it has to have at"
            f" least 1 patch and at most {MAX_VISION_PARAMETERS:,} weights."
        )


def check_image_processor(processor: Any, image_encoder: Any, named: str = "`image_processor`") -> None:
    r"""
    Raise an error if an image processor does not fit a vision encoder, or would give pixels that are not numbers.

    Args:
        processor (`CLIPImageProcessor`):
            The image processor.
        image_encoder (`CLIPVisionModel`, *optional*):
            The vision encoder. Without it, the sizes only have to be equal and not too large.
        named (`str`, defaults to "`image_processor`"):
            What the image processor is called in error messages.

    Raises:
        `ValueError`: if `size` or `crop_size` is not the size that the vision encoder takes, or if `image_mean`,
            `image_std` or `resample` has a value that cannot be used.
    """
    side = getattr(getattr(image_encoder, "config", None), "image_size", None)
    try:
        size, crop = processor.size["shortest_edge"], processor.crop_size
        sizes = [size, crop["height"], crop["width"]]
        values = {name: [float(value) for value in getattr(processor, name)] for name in ("image_mean", "image_std")}
        Image.Resampling(processor.resample)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{named} has to be a CLIPImageProcessor with `size`, `crop_size`, `image_mean`, `image_std` and"
            f" `resample`, but one of them cannot be used: {error!r:.80}."
        ) from error
    wanted = sizes[0] if side is None else side
    if sizes != [wanted] * 3 or not 1 <= wanted <= MAX_VISION_SIDE:
        largest = f"one size of at most {MAX_VISION_SIDE}" if side is None else f"{side}, as the vision encoder takes,"
        raise ValueError(
            f"{named} has to have {largest} in `size` and `crop_size`, but has a shortest edge of {sizes[0]!r:.20} and a"
            f" crop of {sizes[1]!r:.20} x {sizes[2]!r:.20}."
        )
    for name, numbers in values.items():
        least = -MAX_PIXEL_VALUE if name == "image_mean" else 1 / MAX_PIXEL_VALUE
        # NaN fails the comparison
        if len(numbers) != 3 or not all(least <= number <= MAX_PIXEL_VALUE for number in numbers):
            raise ValueError(
                f"{named} has to have three numbers from {least:g} to {MAX_PIXEL_VALUE:g} in `{name}`, but has"
                f" {numbers!r:.80}."
            )


def _load_image_processor(path, subfolder: str, kwargs) -> CLIPImageProcessor | None:
    if os.path.isdir(path) and not os.path.isdir(os.path.join(path, subfolder)):
        return None
    others = ("dtype", "torch_dtype", "variant", "use_safetensors")
    kwargs = {name: value for name, value in kwargs.items() if name not in others}
    named = f"`image_processor_folder`: {subfolder!r} of {path}"
    try:
        file, kwargs = weight_files.check_config(path, subfolder, kwargs, "preprocessor_config.json")
    except ValueError as error:
        raise ValueError(f"{named} holds no usable image processor: {error}") from error
    try:
        return CLIPImageProcessor.from_pretrained(path, subfolder=subfolder, **kwargs)
    except Exception as error:
        if file is None and isinstance(error, (EntryNotFoundError, OSError)):
            logger.info(f"{path} has no {subfolder}: the image processor is created from the vision encoder's config.")
            return None
        reason = str(error) or type(error).__name__
        raise ValueError(f"{named} holds no usable image processor: {reason}") from error


def _without_compilation(model: Any) -> Any:
    """Returns the model inside `torch.compile`, or the object itself."""
    return model._orig_mod if isinstance(model, nn.Module) and is_compiled_module(model) else model


def _has_code(defined: type) -> bool:
    """Returns whether a class is at the top of a module with a file, so that other programs can import it. A class in
    `__main__` is defined in a notebook, in an interactive session, or in a script that runs when it is imported."""
    if defined.__module__ == "__main__" or defined.__qualname__ != defined.__name__:
        return False
    try:
        return Path(inspect.getfile(defined)).is_file()
    except (OSError, TypeError):  # the module does not exist, or has no file
        return False


def _import_lines(entry: Path) -> str:
    """Returns the relative imports of a pipeline file. They import all modules of the package."""
    return "\n".join(line for line in entry.read_text().splitlines() if line.startswith("from ."))


def _copy_code(file: Path, folder: Path) -> None:
    target = folder / file.name
    if not target.exists() or not target.samefile(file):
        shutil.copyfile(file, target)
