"""Shared code of the examples that generate images: options, loading the pipeline, and the contact sheet."""

import argparse
import ast
import importlib.util
import json
from collections.abc import Sequence
from logging import LogRecord
from pathlib import Path
from typing import TYPE_CHECKING

import extras  # noqa: F401  (exits with a message if the project is not installed)

from command_line import make_parser, naming, output_folder, positive, seed, share
from PIL import Image, ImageDraw, ImageFont, ImageOps


# the functions import torch, diffusers and transformers, which take seconds, so that `--help` does not wait for them
if TYPE_CHECKING:
    import torch
    from diffusers import ConfigMixin
    from diffusers_ssr import StableDiffusionSSRPipeline

CODE = Path(importlib.util.find_spec("diffusers_ssr").origin).parent
POCKET = Path(__file__).resolve().parent.parent / "pocket"
# the vision encoder of the authors' weights
RELEASED_IMAGE_ENCODER = "openai/clip-vit-large-patch14"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ZOOM = 2
LARGEST = 512
GAP = 12
LABEL = 22
MASK_WEIGHT = 3.0  # with 1, the default of the pipeline, the image often shows another thing than the one in the mask
SD15_SETTINGS = {"num_inference_steps": 30, "guidance_scale": 7.5, "eta": 0.0, "scale": 0.65}


def default_settings(checkpoint: str | Path) -> dict:
    """Returns the settings that suit a checkpoint: those in its `settings.json`, which the pocket checkpoint has, or
    else usual ones for Stable Diffusion 1.5."""
    file = Path(checkpoint) / "settings.json"
    if not Path(checkpoint).exists():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        try:
            file = Path(hf_hub_download(str(checkpoint), file.name))
        except (OSError, HFValidationError):
            pass  # the repository has no such file; if it cannot be reached, the error is raised when it is loaded
    return json.loads(file.read_text()) if file.is_file() else dict(SD15_SETTINGS)


def options(description: str | None) -> argparse.ArgumentParser:
    """Creates a parser with options for generation and for the output folder."""
    parser = make_parser(description)
    call_options(parser)
    help_text = "where the results are written"
    parser.add_argument("--output_dir", type=output_folder, default=Path("outputs"), help=help_text)
    return parser


def call_options(parser: argparse.ArgumentParser) -> None:
    """Adds options for generation. The defaults are for the pocket checkpoint."""
    add, settings = parser.add_argument, default_settings(POCKET)
    add("--checkpoint", default=str(POCKET), help="folder or repository with base model and SSR-Encoder")
    add(
        "--scale",
        type=float,
        default=settings["scale"],
        help="subject scale; 0.5 to 0.8 is usual with full-size checkpoints",
    )
    add("--num_inference_steps", type=positive, default=settings["num_inference_steps"], help="denoising steps")
    add("--guidance_scale", type=float, default=settings["guidance_scale"], help="scale of classifier-free guidance")
    add(
        "--eta",
        type=share,
        default=settings["eta"],
        help="eta of DDIM: how much noise is added in each step, from 0 to 1",
    )
    add("--seed", type=seed, default=0, help="seed of the initial noise")


_UNIMPORTANT = ("should be kept in float32: []", "No LoRA keys associated to")
_reported: set[str] = set()


def hide_library_output() -> None:
    """Disables progress bars of the libraries in the output of a script, and messages of diffusers about nothing.
    Other warnings are printed, for example which part of a prompt or query is too long and was cut."""
    import transformers
    from diffusers.utils import logging

    for handler in logging.get_logger("diffusers").handlers:
        handler.addFilter(_is_important)
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _is_important(record: LogRecord) -> bool:
    message = record.getMessage()
    start, _, texts = message.partition(" tokens: ")
    if "was truncated because CLIP" in start and texts[:1] + texts[-1:] == "[]":
        # of a batch, diffusers lists all prompts, and only the padding of those that are not too long
        new = {text.replace("<|endoftext|>", "") for text in ast.literal_eval(texts)} - _reported - {""}
        _reported.update(new)
        record.msg = f"{start} tokens: {sorted(new)}"
        return bool(new)
    return not any(text in message for text in _UNIMPORTANT)


def check_source(option: str, source: str | None) -> None:
    """Raises a `ValueError` if the value of an option is neither a folder or file nor the name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if source is not None and not Path(source).exists():
            validate_repo_id(source)
    except HFValidationError:
        raise ValueError(
            f"{option}: {source} is neither a folder nor the name of a repository on the Hub (<owner>/<repo>)."
        ) from None


def load_reference(option: str, source: str) -> Image.Image:
    """Loads the image of an option from a file or a URL. It is upright and in RGB, with white instead of transparent
    parts."""
    from diffusers.utils import load_image
    from diffusers_ssr.images_ssr import to_pil

    with naming(option, source):
        return load_image(source, convert_method=to_pil)


def check_model(option: str, source: str, model_class: "type[ConfigMixin]") -> dict:
    """Returns the config of the model in an option. Raises a `ValueError` if it is a model of another class, which would
    load without its weights."""
    with naming(option, source):
        config = model_class.load_config(source)
        found = config.get("_class_name")
        if found != model_class.__name__:
            raise ValueError(f"it is a {found}, not a {model_class.__name__}")
    return config


def named(thing: str) -> str:
    """Returns a thing with its article."""
    return f"{'an' if thing[:1].lower() in set('aeiou') else 'a'} {thing}"


def load_pipeline(
    checkpoint: str,
    ssr: str | Sequence[str] | None = None,
    option: str = "--checkpoint",
    device: "torch.device | None" = None,
    **kwargs,
) -> "StableDiffusionSSRPipeline":
    """Loads the SSR pipeline of a checkpoint, which is the value of `option`: a folder, a repository, or a single file.
    The SSR-Encoder is that of the checkpoint, or the one in `ssr` if it is given: a folder, a repository, or the two
    files of the authors. By default, the pipeline is on the GPU in half precision if there is one. `kwargs` are passed to
    `from_pretrained`."""
    ssr = [ssr] if isinstance(ssr, str) else list(ssr or ())
    for name, source in ((option, checkpoint), *(("--ssr", source) for source in ssr)):
        check_source(name, source)
    import torch
    from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline

    hide_library_output()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kwargs["dtype"] = kwargs.get("dtype") or (torch.float32 if device.type == "cpu" else torch.float16)
    with naming(option, checkpoint):
        if Path(checkpoint).is_file():
            kwargs["torch_dtype"] = kwargs.pop("dtype")
            pipe = StableDiffusionSSRPipeline.from_single_file(checkpoint, **kwargs)
        else:
            parts = {"ssr_encoder": None, "ssr_image_encoder": None} if ssr else {}
            pipe = StableDiffusionSSRPipeline.from_pretrained(checkpoint, trust_remote_code=True, **parts, **kwargs)
    if ssr:
        with naming("--ssr", " ".join(ssr)):
            if len(ssr) == 2:
                from transformers import CLIPVisionModel

                vision = CLIPVisionModel.from_pretrained(RELEASED_IMAGE_ENCODER)
                pipe.load_ssr(SSREncoder.from_released(*ssr), image_encoder=vision)
            else:
                pipe.load_ssr(ssr[0])
    elif pipe.ssr_encoder is None:
        raise ValueError(
            f"{option}: {checkpoint} contains no SSR-Encoder. Load one with `pipe.load_ssr`, save the whole pipeline with"
            f" `pipe.save_pretrained(folder)`, and pass this folder as {option}, or pass --ssr if the script has it."
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def call_arguments(args: argparse.Namespace) -> dict:
    """Returns the arguments of a pipeline call that the options specify."""
    import torch

    return {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "eta": args.eta,
        "generator": torch.Generator().manual_seed(args.seed),
    }


def write_contact_sheet(rows: list[list[tuple[str, Image.Image | None]]], file: Path, finished: bool = True) -> None:
    """Writes rows of labeled images to a file, and prints the file name if `finished`. `None` is an empty cell."""
    side = min(max(image.width for row in rows for _, image in row if image) * ZOOM, LARGEST)
    columns = max(len(row) for row in rows)
    cell_width, cell_height = side + GAP, side + LABEL + GAP
    sheet = Image.new("RGB", (columns * cell_width + GAP, len(rows) * cell_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for y, row in enumerate(rows):
        for x, (label, image) in enumerate(row):
            if image is None:
                continue
            left, top = GAP + x * cell_width, GAP + y * cell_height
            draw.text((left, top), label, fill="black", font=font)
            sheet.paste(ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC), (left, top + LABEL))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    if finished:
        print(f"The contact sheet is in {file}")
