"""The mixin that loads, replaces and saves the SSR-Encoder of a pipeline, similar to the loader mixins of
diffusers."""

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers.utils.torch_utils import is_compiled_module
from huggingface_hub.utils import EntryNotFoundError, validate_hf_hub_args
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionModel, PreTrainedModel

from . import components_ssr, hooks_ssr, images_ssr, internals_ssr, modeling_ssr


class SSRLoaderMixin(components_ssr.SSRComponents):
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
        Loads an SSR-Encoder, and the vision encoder that it was trained with, into the pipeline. Offloading is disabled
        while the components are replaced and enabled again afterwards, as in the loaders of diffusers.

        Args:
            pretrained_model_name_or_path (`str`, `os.PathLike` or [`SSREncoder`]):
                A repository on the Hub, a folder that was written by `save_pretrained` or `train_ssr.py`, a checkpoint
                of `train_ssr.py`, or an encoder that is already in memory. An encoder in memory has to be on the
                pipeline's device. Its dtype and device are not changed, because other pipelines may use it. Offloading
                moves it like the other components.
            subfolder (`str`, defaults to `"ssr_encoder"`):
                The subfolder with the SSR-Encoder.
            image_encoder (`CLIPVisionModel` or `CLIPVisionModelWithProjection`, *optional*):
                A vision encoder that is already in memory. By default, it is loaded from `image_encoder_folder`.
            image_encoder_folder (`str`, *optional*, defaults to `"ssr_image_encoder"`):
                The subfolder with the vision encoder. If `None`, no vision encoder is loaded, and the pipeline can
                only use subjects that are already encoded.
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
                memory is on another device than the pipeline, or if a weight is missing, unexpected, of the wrong
                shape, or not finite. The pipeline is not changed in this case.

        Example:

        ```py
        >>> pipe.load_ssr("<owner>/<repo>")
        ```
        """
        # 1. arguments; a pipeline without a UNet can encode subjects
        source = pretrained_model_name_or_path
        _check_load_arguments(source, image_encoder, kwargs)
        precise = self.text_encoder if self.unet is None else hooks_ssr.find_unet(self.unet)
        kwargs = internals_ssr.precision_arguments(kwargs, default=getattr(precise, "dtype", None))

        # 2. load what is not in memory
        loaded: list[nn.Module] = []
        if isinstance(source, nn.Module):
            encoder: Any = source
            if image_encoder is None and image_encoder_folder is not None:
                raise ValueError(
                    "`image_encoder` has to be given with an SSREncoder that is already in memory, or"
                    " `image_encoder_folder=None` to use only subjects that are encoded already."
                )
        else:
            encoder = modeling_ssr.SSREncoder.from_pretrained(source, subfolder=subfolder, **kwargs)
            loaded.append(encoder)
            if image_encoder is None and image_encoder_folder is not None:
                image_encoder = _load_image_encoder(source, image_encoder_folder, kwargs)
                loaded.append(image_encoder)
            if image_processor is None and image_processor_folder is not None:
                image_processor = _load_image_processor(source, image_processor_folder, kwargs)
        if image_processor is None and image_encoder is not None:
            image_processor = images_ssr.default_image_processor(image_encoder)

        # 3. do the parts fit each other
        components_ssr.check_fits(self.unet, encoder, image_encoder, self.text_encoder)
        _check_image_processor(image_processor, image_encoder)
        for model in (encoder, image_encoder):
            if model is not None and not any(model is new for new in loaded):
                self._check_device(model)

        # 4. replace the components
        with self._offloading_disabled() as offloaded:
            for model in loaded:
                model.to("cpu" if offloaded else self._execution_device)
            for model in (encoder, image_encoder):
                if model is not None:
                    model.eval()
            self.register_modules(
                ssr_encoder=encoder, ssr_image_encoder=image_encoder, ssr_image_processor=image_processor
            )

    def _check_device(self, model: nn.Module) -> None:
        """Raises a `ValueError` if a model in memory is on another device than the pipeline, which moves no models that
        other pipelines may use. With offloading, diffusers moves all components."""
        offloaded = any(hasattr(part, "_hf_hook") for part in self.components.values())
        device = torch.device(self._execution_device)
        if not offloaded and model.device.type not in ("meta", device.type):
            name = type(_without_compilation(model)).__name__
            raise ValueError(
                f"`{name}` is on {model.device}, but the pipeline runs on {device}: move it there with"
                f' `.to("{device}")` before `load_ssr`. Models that are already in memory are not moved.'
            )

    def unload_ssr(self) -> None:
        """Removes the SSR-Encoder and its vision encoder. The pipeline then behaves like the stock pipeline.

        Example:

        ```py
        >>> pipe.unload_ssr()
        ```
        """
        with self._offloading_disabled():
            self.register_modules(**dict.fromkeys(components_ssr.COMPONENTS))
        self._ssr_scale = components_ssr.DEFAULT_SCALE

    def drop_ssr_encoders(self) -> None:
        r"""
        Frees the memory of the vision encoder and of the part of the SSR-Encoder that encodes images. Subjects that
        are already encoded, or loaded from a file, can still be used. Call `load_ssr` again to encode another
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
        model, sequential, group = internals_ssr.disable_offloading(self)
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
                        internals_ssr.reapply_group_offloading(component)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        r"""
        Saves the whole pipeline with its code. `DiffusionPipeline.from_pretrained(save_directory,
        trust_remote_code=True)` can load it without this package. The arguments are those of
        `DiffusionPipeline.save_pretrained`. All files are written to a temporary folder first, so that an error does
        not change a folder that exists.

        Raises:
            `ValueError`: if `save_directory` is a file, or if the pipeline's class is not defined in a module whose
                code can be saved, for example in a notebook.
        """
        stock = vars(type(self)).get("_stock_class", type(self))
        if stock.__module__ == "__main__" or stock.__qualname__ != stock.__name__:
            raise ValueError(
                f"{stock.__name__} cannot be saved with the pipeline, because it is not defined at the top of a module:"
                " move it to a file and import it, or save `StableDiffusionSSRPipeline.from_pipe(pipe)`."
            )
        target = Path(save_directory).resolve()
        if target.is_file():
            raise ValueError(f"`save_directory`: {target} is a file, not a folder.")
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as staging:
            # with the same name, because diffusers uses the folder's name as that of the repository in `push_to_hub`
            folder = Path(staging, target.name)
            super().save_pretrained(os.fspath(folder), *args, **kwargs)
            self._save_index_and_code(folder)
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                destination = target / file.relative_to(folder)
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, destination)
                # an index of earlier, sharded weights would have priority over the new weights
                destination.with_name(f"{file.name}.index.json").unlink(missing_ok=True)

    def _save_index_and_code(self, folder: Path) -> None:
        """Copies the pipeline's modules to the folder and writes their names to `model_index.json`."""
        entry = self._save_code(folder)
        model_index = folder / self.config_name
        config = json.loads(model_index.read_text())
        config["_class_name"] = [entry.stem, type(self).__name__]
        if self.ssr_encoder is not None:
            encoder = type(_without_compilation(self.ssr_encoder))
            code = Path(inspect.getfile(encoder))
            shutil.copy(code, folder / "ssr_encoder")
            config["ssr_encoder"] = [code.stem, encoder.__name__]
        model_index.write_text(json.dumps(config, indent=2) + "\n")

    def _save_code(self, folder: Path) -> Path:
        """Copies the modules that the pipeline needs, and returns the one in which diffusers looks for its class."""
        # A pipeline file that imports all modules. A folder of custom code contains only the one that was requested.
        files = sorted(Path(__file__).parent.glob("pipeline*.py"), reverse=True)
        listing = next(file for file in files if "from .mixin_ssr import" in file.read_text())
        imports = "\n".join(line for line in listing.read_text().splitlines() if line.startswith("from ."))
        name, stock = type(self).__name__, vars(type(self)).get("_stock_class")
        code = entry = Path(inspect.getfile(type(self)))
        if stock is not None:  # a class made by `ssr_pipeline_class` is not defined in a file
            entry = folder / f"pipeline_{name.lower()}.py"
            base = f"from {stock.__module__} import {stock.__name__}"
            entry.write_text(f"{base}\n\n{imports}\n\n{name} = ssr_pipeline_class({stock.__name__})\n")
        else:
            shutil.copy(code, folder)
        if code.parent != Path(__file__).parent:  # the file of a user's own class does not import all modules
            entry = folder / f"entry_{name.lower()}.py"
            entry.write_text(f"{imports}\nfrom .{code.stem} import {name}  # noqa: F401\n")
        for file in get_relative_import_files(listing):
            shutil.copy(file, folder)
        return entry

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
        return super().from_pretrained(pretrained_model_name_or_path, **internals_ssr.precision_arguments(kwargs))

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Creates a pipeline of this class that shares the components of any Stable Diffusion 1.5 pipeline, with its
        SSR-Encoder and the scale of `set_ssr_scale`. The arguments are those of `DiffusionPipeline.from_pipe`, which casts
        the shared components to float32 by default. This method keeps their dtype if all have the same one. A UNet with
        motion modules is a new model on the CPU.

        Example:

        ```py
        >>> pipe = StableDiffusionSSRPipeline.from_pipe(stock_pipe)
        ```
        """
        ours = {name: getattr(pipeline, name, None) for name in components_ssr.COMPONENTS}
        ours = {name: part for name, part in ours.items() if part is not None}
        models = (part for part in pipeline.components.values() if isinstance(part, nn.Module))
        dtypes = {getattr(model, "dtype", None) for model in models} - {None}
        default = dtypes.pop() if len(dtypes) == 1 else None
        made = super().from_pipe(pipeline, **{**ours, **internals_ssr.precision_arguments(kwargs, default=default)})
        made._ssr_scale = getattr(pipeline, "_ssr_scale", components_ssr.DEFAULT_SCALE)
        return made


# the arguments of `from_pretrained` that `load_ssr` accepts
_FROM_PRETRAINED = (
    "cache_dir", "dtype", "force_download", "local_files_only", "proxies", "revision", "token", "torch_dtype",
    "use_safetensors", "variant",
)  # fmt: skip


def _check_load_arguments(source: Any, image_encoder: Any, kwargs: dict) -> None:
    # `custom_pipeline=` imports its own copy of the class, which is recognised by its name
    names = [base.__name__ for base in type(_without_compilation(source)).__mro__]
    if not isinstance(source, (str, os.PathLike)) and modeling_ssr.SSREncoder.__name__ not in names:
        raise ValueError(
            "`pretrained_model_name_or_path` has to be a folder, the name of a repository, or an SSREncoder, but is"
            f" of type {type(source).__name__}."
        )
    if image_encoder is not None and not hasattr(getattr(image_encoder, "config", None), "hidden_size"):
        raise ValueError(f"`image_encoder` has to be a CLIPVisionModel, but is a {type(image_encoder).__name__}.")
    for name in kwargs:
        if name not in _FROM_PRETRAINED:
            raise ValueError(f"`{name}` is not an argument of `load_ssr`; it has {', '.join(_FROM_PRETRAINED)}.")


def _load_image_encoder(source, folder: str, kwargs: dict) -> CLIPVisionModel:
    # a checkpoint of `train_ssr.py` contains only the trained models; the vision encoder is in the parent folder
    beside = Path(source).parent
    if os.path.isdir(source) and not os.path.isdir(os.path.join(source, folder)):
        if not (beside / folder).is_dir():
            raise ValueError(
                f"`image_encoder_folder`: {source} holds no folder {folder!r}: pass the vision encoder that the SSR-Encoder"
                " was trained on as `image_encoder`, or `image_encoder_folder=None` to use only encoded subjects."
            )
        source = beside
    kwargs = internals_ssr.precision_arguments(kwargs, "transformers")
    problem = f"`image_encoder_folder`: {folder!r} of {source} holds no usable vision encoder"
    vision: Any = CLIPVisionModel
    try:
        model, info = vision.from_pretrained(
            source, subfolder=folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (OSError, ImportError):
        raise
    except Exception as error:  # transformers raises different errors for a wrong config
        raise ValueError(f"{problem}: {error or type(error).__name__}") from error
    internals_ssr.check_weights(problem, model, {**info, "unexpected_keys": []})
    return model


def _load_image_processor(source, subfolder: str, kwargs: dict) -> CLIPImageProcessor | None:
    if os.path.isdir(source) and not os.path.isdir(os.path.join(source, subfolder)):
        return None
    others = ("dtype", "torch_dtype", "variant", "use_safetensors")
    kwargs = {name: value for name, value in kwargs.items() if name not in others}
    try:
        return CLIPImageProcessor.from_pretrained(source, subfolder=subfolder, **kwargs)
    except (EntryNotFoundError, OSError) as error:
        if os.path.isdir(source):
            raise ValueError(f"`image_processor_folder`: {subfolder!r} of {source}: {error}") from error
        return None  # the repository has none: it is created from the config of the vision encoder


def _check_image_processor(processor: Any, image_encoder: Any) -> None:
    if processor is None or image_encoder is None:
        return
    side = image_encoder.config.image_size
    size, crop = getattr(processor, "size", None) or {}, getattr(processor, "crop_size", None) or {}
    if (size.get("shortest_edge"), crop.get("height"), crop.get("width")) != (side, side, side):
        raise ValueError(
            f"`image_processor` has to have the size of the vision encoder, {side}, in `size` and `crop_size`, but has"
            f" {size} and {crop}."
        )


def _without_compilation(model: Any) -> Any:
    return model._orig_mod if isinstance(model, nn.Module) and is_compiled_module(model) else model
