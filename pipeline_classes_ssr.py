"""Creates SSR versions of diffusers' pipeline classes on demand."""

import functools
import inspect
import typing
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel, UNetMotionModel
from transformers import CLIPTextModel

from . import internals_ssr, mixin_ssr


_OWN_PROCESSORS = "it replaces the UNet's attention processors itself"
_STABLE_DIFFUSION_2 = "it is for Stable Diffusion 2"
_UNSUITABLE = {
    "CycleDiffusionPipeline": "it generates a source prompt in the same batch",
    "SemanticStableDiffusionPipeline": "its guidance uses its own editing prompts",
    "StableDiffusionAttendAndExcitePipeline": _OWN_PROCESSORS,
    "StableDiffusionControlNetXSPipeline": "its UNet has other layers",
    "StableDiffusionDepth2ImgPipeline": _STABLE_DIFFUSION_2,
    "StableDiffusionDiffEditPipeline": "it runs the UNet outside its call as well",
    "StableDiffusionLatentUpscalePipeline": "its UNet is for upscaling",
    "StableDiffusionPanoramaPipeline": "the order of its views in the batch is not that of its prompts",
    "StableDiffusionParadigmsPipeline": "it runs several steps in one batch",
    "StableDiffusionPix2PixZeroPipeline": _OWN_PROCESSORS,
    "StableDiffusionSAGPipeline": "it passes image embeddings only to half of its batch",
    "StableDiffusionUpscalePipeline": _STABLE_DIFFUSION_2,
    "StableUnCLIPImg2ImgPipeline": _STABLE_DIFFUSION_2,
    "StableUnCLIPPipeline": _STABLE_DIFFUSION_2,
    "TextToVideoZeroPipeline": _OWN_PROCESSORS,
}

# the models of Stable Diffusion 1.5 pipelines, with which their constructors are annotated
_MODELS = {"unet": (UNet2DConditionModel, UNetMotionModel), "text_encoder": (CLIPTextModel,)}


def ssr_pipeline_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    r"""
    Returns the SSR version of a Stable Diffusion 1.5 pipeline class. It has the arguments and components of the class
    and those of [`SSRPipelineMixin`].

    Args:
        pipeline_class (`type`):
            A pipeline class of diffusers, or a user-defined one, for Stable Diffusion 1.5.

    Returns:
        `type`: a subclass of [`SSRPipelineMixin`] and `pipeline_class`. Every call with the same class returns the
        same subclass. Its name is "SSR" followed by the name of `pipeline_class`.

    Raises:
        `ValueError`: if `pipeline_class` is not a Stable Diffusion 1.5 pipeline, or does not work with a subject.

    Example:

    ```py
    >>> from diffusers import StableDiffusionInpaintPipeline
    >>> inpaint = ssr_pipeline_class(StableDiffusionInpaintPipeline).from_pipe(pipe)
    >>> image = inpaint("a cat on a bench", image=photo, mask_image=mask, subject=cat).images[0]
    ```
    """
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        raise ValueError(f"`pipeline_class` has to be a pipeline class of diffusers, but is {pipeline_class!r}.")
    return pipeline_class if issubclass(pipeline_class, mixin_ssr.SSRPipelineMixin) else _made_class(pipeline_class)


@functools.cache
def _made_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    name, components = pipeline_class.__name__, inspect.signature(pipeline_class.__init__).parameters
    if name in _UNSUITABLE:
        raise ValueError(f"`pipeline_class` is {name}, but it cannot be used with a subject: {_UNSUITABLE[name]}.")
    if not {"unet", "text_encoder", "tokenizer"} <= set(components) or "text_encoder_2" in components:
        raise ValueError(
            f"`pipeline_class` has to be a pipeline of Stable Diffusion 1.5, but {name} has the components"
            f" {sorted(set(components) - {'self'})}."
        )
    for component, models in _MODELS.items():
        annotated = _annotated_classes(components[component].annotation)
        if annotated and not any(issubclass(model, models) for model in annotated):
            raise ValueError(
                f"`pipeline_class` has to be a pipeline of Stable Diffusion 1.5, whose `{component}` is a"
                f" {models[0].__name__}, but that of {name} is a {annotated[0].__name__}."
            )
    if not any("__call__" in vars(base) for base in pipeline_class.__mro__):
        raise ValueError(f"`pipeline_class` has to be a pipeline with a `__call__`, which {name} does not have.")
    taken = inspect.signature(pipeline_class.__call__).parameters
    if "prompt" not in taken and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        raise ValueError(
            f"`pipeline_class` has to be a pipeline whose call takes a `prompt`, but the call of {name} does not."
        )
    doc = f"[`{name}`] that also takes a subject; see [`SSRPipelineMixin`]."
    namespace = {"__doc__": doc, "__module__": __name__, "_stock_class": pipeline_class}
    metaclass: Any = type(pipeline_class)
    return metaclass(f"SSR{name}", (mixin_ssr.SSRPipelineMixin, pipeline_class), namespace)


def _annotated_classes(annotation: Any) -> list[type]:
    """Returns the classes of an annotation, without `None`. The list is empty if there is no annotation, or a text."""
    parts = typing.get_args(annotation) or (annotation,)
    return [part for part in parts if isinstance(part, type) and part not in (type(None), inspect.Parameter.empty)]


# creating these classes registers them for `AutoPipelineForImage2Image.from_pipe` and similar methods
for _stock in internals_ssr.auto_pipeline_classes():
    ssr_pipeline_class(_stock)
