"""Tests of `save_pretrained`, `from_pretrained` and `from_pipe` of all classes. test_loading.py loads saved pipelines
in a process without the package."""

import copy
import errno
import inspect
import shutil
from pathlib import Path
from typing import Union, get_origin

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    call_args,
    make_components,
    make_image_encoder,
    make_picture,
    make_ssr_encoder,
    make_unet,
    quiet,
    subject_args,
)
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers_ssr import (
    AnimateDiffSSRPipeline,
    SSREncoder,
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
    ssr_pipeline_class,
)
from test_chains import make_controlnet


class OwnPipeline(StableDiffusionPipeline):
    """A user's stock pipeline."""


class OwnSSRPipeline(StableDiffusionSSRPipeline):
    """A user's subclass of a class of the package."""


class OwnSSRInpaintPipeline(ssr_pipeline_class(diffusers.StableDiffusionInpaintPipeline)):
    """A user's subclass of a class that `ssr_pipeline_class` made."""


CLASSES = [
    StableDiffusionSSRPipeline,
    ssr_pipeline_class(diffusers.StableDiffusionInpaintPipeline),
    ssr_pipeline_class(OwnPipeline),
    OwnSSRPipeline,
    OwnSSRInpaintPipeline,
]
IMAGE = make_picture(11, (16, 16))


def generate(pipe, **arguments) -> np.ndarray:
    """Calls a pipeline of any class."""
    arguments = {"image": IMAGE, "mask_image": IMAGE, "height": 16, "width": 16, **arguments}
    taken = inspect.signature(type(pipe).__call__).parameters
    return quiet(pipe)(**subject_args(**{name: value for name, value in arguments.items() if name in taken})).images


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("pipeline_class", CLASSES, ids=lambda pipeline_class: pipeline_class.__name__)
def test_save_and_load(pipe, tmp_path, pipeline_class):
    """With the class itself, with custom code, and as another class. A copy shares the components."""
    own = pipeline_class.from_pipe(pipe)
    expected = generate(own)
    own.save_pretrained(tmp_path)
    again = pipeline_class.from_pretrained(tmp_path)
    assert type(again) is pipeline_class
    trusted = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(trusted).__name__ == pipeline_class.__name__ and type(trusted) is not pipeline_class
    copied = copy.copy(own)
    copied.set_ssr_scale(0.1)
    for loaded in (again, trusted, copied):
        assert np.array_equal(generate(loaded), expected)
    assert all(getattr(copied, name) is part for name, part in own.components.items())
    assert type(StableDiffusionSSRPipeline.from_pretrained(tmp_path)) is StableDiffusionSSRPipeline


def test_a_saved_pipeline_can_be_loaded_with_a_controlnet(pipe, tmp_path):
    """`from_pretrained` returns the class that it is called on, with its components, without remote code."""
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.save_pretrained(tmp_path)
    controlnet = make_controlnet()
    control = StableDiffusionSSRControlNetPipeline.from_pretrained(tmp_path, controlnet=controlnet)
    assert type(control) is StableDiffusionSSRControlNetPipeline and control.controlnet is controlnet
    images = [
        quiet(control)(**call_args(image=make_picture(seed, (16, 16)), subject=subject)).images for seed in (1, 2)
    ]
    assert np.abs(images[0] - images[1]).max() > 1e-4


def test_stock_pipeline_can_be_loaded_as_an_ssr_pipeline(components, tmp_path):
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(tmp_path)
    pipe = StableDiffusionSSRPipeline.from_pretrained(tmp_path)
    assert pipe.ssr_encoder is None
    pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())
    assert pipe.ssr_image_processor is not None


@pytest.mark.parametrize("way", ["attribute", "load_ssr", "in place"])
def test_a_pipeline_with_a_compiled_encoder_can_be_saved_and_loaded(pipe, tmp_path, way):
    expected = pipe(**subject_args()).images
    if way == "in place":
        pipe.ssr_encoder.compile(backend="eager")
    elif way == "attribute":
        pipe.ssr_encoder = torch.compile(pipe.ssr_encoder, backend="eager")
    else:
        pipe.load_ssr(torch.compile(pipe.ssr_encoder, backend="eager"), image_encoder=pipe.ssr_image_encoder)
    assert np.allclose(pipe(**subject_args()).images, expected, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "ssr_encoder" / "modeling_ssr.py").exists()
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert np.array_equal(quiet(again)(**subject_args()).images, expected)


@pytest.mark.parametrize("number", [1, 4, 8, 11])
def test_full_disk_keeps_the_saved_pipeline(pipe, tmp_path, monkeypatch, number):
    """The disk is full at different files. The pipeline that was saved before can still be loaded."""
    folder, writes = tmp_path / "saved", []
    pipe.save_pretrained(folder)
    before, expected = contents(folder), pipe(**subject_args()).images

    def failing(write):
        def wrapper(*args, **kwargs):
            writes.append(args)
            if len(writes) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return wrapper

    changed = StableDiffusionSSRPipeline(**pipe.components, requires_safety_checker=False)
    changed.unet = make_unet(seed=7)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", failing(shutil.copyfile))
        patch.setattr(Path, "write_text", failing(Path.write_text))
        for part in (changed.unet, changed.vae, changed.text_encoder, changed.ssr_encoder):
            patch.setattr(part, "save_pretrained", failing(part.save_pretrained))
        with pytest.raises(OSError, match="No space left"):
            changed.save_pretrained(folder)
    assert contents(folder) == before
    again = StableDiffusionSSRPipeline.from_pretrained(folder)
    assert np.array_equal(quiet(again)(**subject_args()).images, expected)
    changed.save_pretrained(folder)
    assert contents(folder).keys() == before.keys() and contents(folder) != before


def test_saving_replaces_shards_and_keeps_other_files(pipe, tmp_path):
    """An index of earlier, sharded weights would have priority over the new weights."""
    pipe.save_pretrained(tmp_path, max_shard_size="4KB")
    assert list(tmp_path.rglob("*.index.json"))
    (tmp_path / "README.md").write_text("mine")
    pipe.unet = make_unet(seed=7)
    expected = pipe(**subject_args()).images
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    again = StableDiffusionSSRPipeline.from_pretrained(tmp_path)
    assert np.array_equal(quiet(again)(**subject_args()).images, expected)
    with pytest.raises(ValueError, match="`save_directory`: .*README.md is a file, not a folder"):
        pipe.save_pretrained(tmp_path / "README.md")


NOTEBOOK = """
from diffusers import StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline, ssr_pipeline_class

class Derived(StableDiffusionSSRPipeline): ...
class Stock(StableDiffusionPipeline): ...
Made = ssr_pipeline_class(Stock)
def nested():
    class Nested(StableDiffusionSSRPipeline): ...
    return Nested
Nested = nested()
"""


@pytest.mark.parametrize("name", ["Derived", "Made", "Nested"])
def test_a_class_of_a_notebook_cannot_be_saved(pipe, tmp_path, name):
    namespace = {"__name__": "__main__"}
    exec(NOTEBOOK, namespace)
    with pytest.raises(ValueError, match="cannot be saved with the pipeline.*move it to a file"):
        namespace[name].from_pipe(pipe).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# Classes and `from_pipe`


@pytest.mark.parametrize("parent", CLASSES, ids=lambda parent: parent.__name__)
def test_a_subclass_has_the_arguments_and_components_of_its_parent(parent):
    own = type("Own", (parent,), {})
    for name in ("__init__", "__call__"):
        assert inspect.signature(getattr(own, name)) == inspect.signature(getattr(parent, name))
    assert own._optional_components == parent._optional_components
    assert own.model_cpu_offload_seq == parent.model_cpu_offload_seq
    assert own.model_cpu_offload_seq.count("ssr_encoder") == 1


@pytest.mark.parametrize(
    "pipeline_class", [StableDiffusionSSRPipeline, StableDiffusionSSRControlNetPipeline, AnimateDiffSSRPipeline]
)
def test_component_annotations_are_compatible_with_old_diffusers_versions(pipeline_class):
    """diffusers 0.36 supports `Optional[X]` but not `X | None`, and cannot load a pipeline with such a component."""
    parameters = inspect.signature(pipeline_class.__init__).parameters
    for name in ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor"):
        assert get_origin(parameters[name].annotation) is Union, name


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_from_pipe_keeps_one_precision_and_treats_several_like_the_stock_method(dtypes):
    results = []
    for pipeline_class in (StableDiffusionSSRPipeline, StableDiffusionPipeline):
        pipe = StableDiffusionPipeline(**make_components(), requires_safety_checker=False).to(dtypes[0])
        pipe.vae.to(dtypes[1])
        other = pipeline_class.from_pipe(pipe)
        results.append([getattr(other, name).dtype for name in ("unet", "vae", "text_encoder")])
    ours, stock = results
    assert ours == ([dtypes[0]] * 3 if dtypes[0] == dtypes[1] else stock)


def test_a_subclass_of_the_encoder_is_saved_with_its_code(pipe, tmp_path):
    """Its module is copied, so it has to be in a file."""
    expected = pipe(**subject_args()).images
    encoder = OwnEncoder.from_config(pipe.ssr_encoder.config)
    encoder.load_state_dict(pipe.ssr_encoder.state_dict())
    pipe.load_ssr(encoder, image_encoder=pipe.ssr_image_encoder)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionSSRPipeline.from_pretrained(tmp_path)
    assert np.array_equal(quiet(again)(**subject_args()).images, expected)


class OwnEncoder(SSREncoder):
    """A user's subclass of the encoder."""
