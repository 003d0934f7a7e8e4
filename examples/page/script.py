"""Writes Python scripts that repeat a generation of the page."""

import json
import zipfile
from pathlib import Path

import torch
from drawing import MASK_WEIGHT
from PIL import Image

from .checkpoints import Checkpoints
from .request import ALONG_EDGES, IMAGE, VIDEO, GenerationRequest, SubjectChoice


FRAMES_PER_SECOND = 8
CLASSES = {
    IMAGE: ["StableDiffusionSSRPipeline"],
    ALONG_EDGES: ["StableDiffusionSSRControlNetPipeline", "StableDiffusionSSRPipeline"],
    VIDEO: ["AnimateDiffSSRPipeline", "StableDiffusionSSRPipeline"],
}


def needed_images(request: GenerationRequest) -> dict[str, Image.Image]:
    """Returns the images that the script opens, by file name."""
    images = {"edges.png": request.edges}
    for number, choice in enumerate(request.subjects, start=1):
        images[f"subject_{number}.png"] = choice.image
        images[f"subject_{number}_mask.png"] = choice.mask
        images[f"subject_{number}_region.png"] = choice.region
    return {name: image for name, image in images.items() if image is not None}


def write_script(
    request: GenerationRequest, checkpoints: Checkpoints, dtype: torch.dtype, device: torch.device | str
) -> str:
    """
    Returns a script that generates the same images again. The images of `needed_images` have to be in the folder that
    the script runs in.

    Args:
        request ([`GenerationRequest`]):
            The request that was generated.
        checkpoints ([`Checkpoints`]):
            The checkpoints that were used.
        dtype (`torch.dtype`), device (`torch.device` or `str`):
            Precision and device of the models. With other values, the images are slightly different.

    Returns:
        `str`, the source code of the script.
    """
    parts = [
        _imports(request),
        _loading(request, checkpoints, dtype, device),
        *(_subject(number, choice) for number, choice in enumerate(request.subjects, start=1)),
        _call(request),
    ]
    return "\n".join(parts)


def text(value: str) -> str:
    """Returns a Python string literal. Double quotes and escapes of JSON are also valid in Python."""
    return json.dumps(value, ensure_ascii=False)


def _imports(request: GenerationRequest) -> str:
    diffusers = {
        ALONG_EDGES: "from diffusers import ControlNetModel\n",
        VIDEO: "from diffusers import MotionAdapter\n",
    }
    lines = "import torch\n" + diffusers.get(request.kind, "")
    if request.kind == VIDEO:
        lines += "from diffusers.utils import export_to_gif\n"
    lines += f"from diffusers_ssr import {', '.join(CLASSES[request.kind])}\n"
    names = needed_images(request)
    return lines + (f"from PIL import Image  # to open {', '.join(names)}\n" if names else "")


def _loading(
    request: GenerationRequest, checkpoints: Checkpoints, dtype: torch.dtype, device: torch.device | str
) -> str:
    lines = (
        "pipe = StableDiffusionSSRPipeline.from_pretrained(\n"
        f"    {text(checkpoints.base)}, trust_remote_code=True, dtype={dtype}\n"
        ")\n"
    )
    if checkpoints.ssr is not None:
        lines += f"pipe.load_ssr({text(checkpoints.ssr)})\n"
    if request.kind == ALONG_EDGES:
        lines += (
            f"controlnet = ControlNetModel.from_pretrained({text(checkpoints.controlnet)}, dtype={dtype})\n"
            "pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet)\n"
        )
    if request.kind == VIDEO:
        lines += (
            f"adapter = MotionAdapter.from_pretrained({text(checkpoints.motion_adapter)}, dtype={dtype})\n"
            "pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter)\n"
        )
    return lines + f"pipe.to({text(str(device))})\n"


def _subject(number: int, choice: SubjectChoice) -> str:
    arguments = [f'Image.open("subject_{number}.png")']
    if choice.query:
        arguments.append(f"query={text(choice.query)}")
    if choice.mask is not None:
        arguments.append(f'mask=Image.open("subject_{number}_mask.png"), mask_weight={MASK_WEIGHT}')
    changes = f".scaled({choice.scale!r})"
    if choice.region is not None:
        changes += f'.inside(Image.open("subject_{number}_region.png"))'
    name = f"subject_{number}"
    return f"{name} = pipe.encode_subject({', '.join(arguments)})\n{name} = {name}{changes}\n"


def _call(request: GenerationRequest) -> str:
    arguments = {
        name: text(value) if isinstance(value, str) else repr(value)
        for name, value in request.call_arguments().items()
    }
    if request.subjects:
        arguments["subject"] = " + ".join(f"subject_{number}" for number in range(1, len(request.subjects) + 1))
    if request.edges is not None:
        arguments["image"] = 'Image.open("edges.png")'
    seeds = ", ".join(map(str, request.seeds))
    arguments["generator"] = f"[torch.Generator().manual_seed(seed) for seed in [{seeds}]]"
    call = "pipe(\n" + "".join(f"    {name}={value},\n" for name, value in arguments.items()) + ")"
    if request.kind == VIDEO:
        return f'frames = {call}.frames[0]\nexport_to_gif(frames, "video.gif", fps={FRAMES_PER_SECOND})\n'
    return (
        f'images = {call}.images\nfor seed, image in zip([{seeds}], images):\n    image.save(f"image_{{seed}}.png")\n'
    )


def write_bundle(file: Path, request: GenerationRequest, script: str) -> None:
    """Writes the script and the images that it opens to a zip archive."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("repeat.py", script)
        for name, image in needed_images(request).items():
            with archive.open(name, "w") as entry:
                image.save(entry, format="PNG")
