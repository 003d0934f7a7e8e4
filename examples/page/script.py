"""The Python that repeats what the page has drawn."""

import zipfile
from pathlib import Path

import torch
from PIL import Image

from .checkpoints import Checkpoints
from .request import ALONG_EDGES, PICTURE, VIDEO, DrawingRequest


FRAMES_PER_SECOND = 8
CLASSES = {
    PICTURE: ["StableDiffusionSSRPipeline"],
    ALONG_EDGES: ["StableDiffusionSSRControlNetPipeline", "StableDiffusionSSRPipeline"],
    VIDEO: ["AnimateDiffSSRPipeline", "StableDiffusionSSRPipeline"],
}


def needed_pictures(request: DrawingRequest) -> dict[str, Image.Image]:
    """The pictures that the script opens, by file name."""
    pictures = {"edges.png": request.edges}
    for number, choice in enumerate(request.subjects, start=1):
        pictures[f"subject_{number}.png"] = choice.picture
        pictures[f"subject_{number}_mask.png"] = choice.mask
        pictures[f"subject_{number}_region.png"] = choice.region
    return {name: picture for name, picture in pictures.items() if picture is not None}


def write_script(
    request: DrawingRequest, checkpoints: Checkpoints, dtype: torch.dtype, device: torch.device | str
) -> str:
    """
    A script that draws the same picture again, with the pictures of `needed_pictures` beside it.

    Args:
        request ([`DrawingRequest`]):
            What was drawn.
        checkpoints ([`Checkpoints`]):
            What it was drawn with.
        dtype (`torch.dtype`), device (`torch.device` or `str`):
            Precision and place of the models. Another one draws nearly the same picture.

    Returns:
        `str`, the source of the script.
    """
    parts = [
        _imports(request),
        _loading(request, checkpoints, dtype, device),
        *(_subject(number, choice) for number, choice in enumerate(request.subjects, start=1)),
        _call(request),
    ]
    return "\n".join(parts)


def _imports(request: DrawingRequest) -> str:
    diffusers = {
        ALONG_EDGES: "from diffusers import ControlNetModel\n",
        VIDEO: "from diffusers import MotionAdapter\n",
    }
    lines = "import torch\n" + diffusers.get(request.kind, "")
    if request.kind == VIDEO:
        lines += "from diffusers.utils import export_to_gif\n"
    lines += f"from diffusers_ssr import {', '.join(CLASSES[request.kind])}\n"
    names = needed_pictures(request)
    return lines + (f"from PIL import Image  # to open {', '.join(names)}\n" if names else "")


def _loading(request: DrawingRequest, checkpoints: Checkpoints, dtype: torch.dtype, device: torch.device | str) -> str:
    lines = (
        "pipe = StableDiffusionSSRPipeline.from_pretrained(\n"
        f"    {checkpoints.base!r}, trust_remote_code=True, dtype={dtype}\n"
        ")\n"
        f"pipe.load_ssr({checkpoints.ssr!r})\n"
    )
    if request.kind == ALONG_EDGES:
        lines += (
            f"controlnet = ControlNetModel.from_pretrained({checkpoints.controlnet!r}, dtype={dtype})\n"
            "pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet)\n"
        )
    if request.kind == VIDEO:
        lines += (
            f"adapter = MotionAdapter.from_pretrained({checkpoints.motion_adapter!r}, dtype={dtype})\n"
            "pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter)\n"
        )
    return lines + f"pipe.to({str(device)!r})\n"


def _subject(number: int, choice) -> str:
    arguments = [f'Image.open("subject_{number}.png")']
    if choice.query:
        arguments.append(f"query={choice.query!r}")
    if choice.mask is not None:
        arguments.append(f'mask=Image.open("subject_{number}_mask.png")')
    changes = f".scaled({choice.scale!r})"
    if choice.region is not None:
        changes += f'.inside(Image.open("subject_{number}_region.png"))'
    name = f"subject_{number}"
    return f"{name} = pipe.encode_subject({', '.join(arguments)})\n{name} = {name}{changes}\n"


def _call(request: DrawingRequest) -> str:
    arguments = {name: repr(value) for name, value in request.call_arguments().items()}
    if request.subjects:
        arguments["subject"] = " + ".join(f"subject_{number}" for number in range(1, len(request.subjects) + 1))
    if request.edges is not None:
        arguments["image"] = 'Image.open("edges.png")'
    arguments["generator"] = f"torch.Generator().manual_seed({request.seed})"
    call = "pipe(\n" + "".join(f"    {name}={value},\n" for name, value in arguments.items()) + ")"
    if request.kind == VIDEO:
        return f'frames = {call}.frames[0]\nexport_to_gif(frames, "video.gif", fps={FRAMES_PER_SECOND})\n'
    return f'image = {call}.images[0]\nimage.save("picture.png")\n'


def write_bundle(file: Path, request: DrawingRequest, script: str) -> None:
    """The script and the pictures that it opens, as one archive."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("repeat.py", script)
        for name, picture in needed_pictures(request).items():
            with archive.open(name, "w") as entry:
                picture.save(entry, format="PNG")
