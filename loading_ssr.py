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
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionModel, PreTrainedModel

from . import checks_ssr, file_utils, image_processing_ssr, library_internals, modeling_ssr, unet_hooks


logger = logging.get_logger(__name__)

COMPONENTS = ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor")
DEFAULT_SCALE = 0.65


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
                memory are not changed, because other pipelines may use it.
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
            unknown, if the encoder does not fit the UNet, the text encoder or the vision encoder, or if an encoder in
            memory and the pipeline are on different devices.

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
        checks_ssr.check_fits(self.unet, encoder, image_encoder, self.text_encoder)
        if image_processor is None and image_encoder is not None:
            image_processor = image_processing_ssr.default_image_processor(image_encoder)
        with self._offloading_disabled() as offloaded:
            models: list[nn.Module] = [encoder] if image_encoder is None else [encoder, image_encoder]
            for model in models:
                model.eval()
                if model in loaded:
                    model.to("cpu" if offloaded else self._execution_device)
                elif not offloaded:
                    _check_device(model, self._execution_device)
            self.register_modules(
                ssr_encoder=encoder, ssr_image_encoder=image_encoder, ssr_image_processor=image_processor
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
        """Same as `DiffusionPipeline.from_pretrained`, but accepts `dtype` in all supported versions of diffusers."""
        return super().from_pretrained(pretrained_model_name_or_path, **library_internals.precision_arguments(kwargs))

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
    return CLIPVisionModel.from_pretrained(source, subfolder=folder, **kwargs)


def _check_device(model: nn.Module, device: torch.device) -> None:
    if model.device.type not in ("meta", torch.device(device).type):
        raise ValueError(
            f"`{type(model).__name__}` is on {model.device}, but the pipeline runs on {device}: move it there with"
            f' `.to("{device}")` before `load_ssr`. Models that are already in memory are not moved.'
        )


def _load_image_processor(path, subfolder: str, kwargs) -> CLIPImageProcessor | None:
    if os.path.isdir(path) and not os.path.isdir(os.path.join(path, subfolder)):
        return None
    try:
        others = ("dtype", "torch_dtype", "variant", "use_safetensors")
        kwargs = {name: value for name, value in kwargs.items() if name not in others}
        return CLIPImageProcessor.from_pretrained(path, subfolder=subfolder, **kwargs)
    except (EntryNotFoundError, OSError):
        logger.info(f"{path} has no {subfolder}: the image processor is created from the vision encoder's config.")
        return None


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
