"""Assemble the Hub repository (code, weights, model card) and upload it.

    python examples/publish.py --repo_id me/ssr --weights pocket

If --weights is the pocket checkpoint or another folder with a complete pipeline, the repository can be loaded with
`DiffusionPipeline.from_pretrained("<owner>/<repo>", trust_remote_code=True)`. If it only contains an encoder, as
written by convert_released_checkpoint.py, use the repository with `custom_pipeline="<owner>/<repo>"` and
`load_ssr("<owner>/<repo>")`.

--space also assembles a Space with the page of app.py. The Space loads the weights from the repository or contains a
copy:

    python examples/publish.py --repo_id <owner>/<repo> --space <owner>/<space> --space_weights copy
"""

import argparse
import json
import shutil
from pathlib import Path

from extras import needs

from command_line import check_companions, make_parser, output_folder, run_script


ROOT = Path(__file__).resolve().parent.parent
BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--repo_id", required=True, help="<owner>/<repo> on the Hub")
    parser.add_argument("--weights", type=Path, default=ROOT / "pocket", help="folder with a pipeline or an encoder")
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        default=Path("outputs/hub"),
        help="output folder for the assembled repository",
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        default=["fp16"],
        choices=["fp16"],
        help="precisions to save in addition to full precision",
    )
    parser.add_argument("--space", help="<owner>/<space>: also assemble a Space")
    parser.add_argument(
        "--space_weights",
        choices=["hub", "copy"],
        default="hub",
        help="whether the Space loads the weights from --repo_id or contains a copy",
    )
    parser.add_argument(
        "--base_model",
        default=BASE_MODEL,
        help="base model in the model card and for a Space, if --weights is only an encoder",
    )
    parser.add_argument("--image", type=Path, help="an image for the model card, generated with the weights")
    parser.add_argument("--push_to_hub", action="store_true", help="upload it")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="the branch to upload to")
    parser.add_argument("--token", help="the token to upload with, unless you are logged in")
    args = parser.parse_args()
    check_companions(parser, args, {"space": ("space_weights",), "push_to_hub": ("private", "revision", "token")})
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the imports below, which take seconds

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline
from drawing import POCKET, default_settings
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from space import write_space
from transformers import CLIPVisionModel


LOAD_WHOLE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)"""
LOAD_ENCODER = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base_model}", custom_pipeline="{repo_id}", trust_remote_code=True)
pipe.load_ssr("{repo_id}")"""
# what the card says about the weights: of the pocket checkpoint, of another pipeline, and of an encoder alone
ABOUT_POCKET = """**This checkpoint is a test fixture, not a model for use.** It is a small Stable Diffusion 1.5 that was trained from scratch on
scenes of recoloured emoji, without a base model. It generates images of 64 x 64 pixels, of twelve kinds of emoji
(cat, dog, fish, butterfly, car, rocket, tulip, mushroom, house, guitar, umbrella, woman) in six places, in a second on a CPU. For
photographs, use the code of this repository with Stable Diffusion 1.5 and an SSR-Encoder for it.

- **Training**: base model, vision encoder and SSR-Encoder from scratch on synthetic scenes, in 25 minutes on one GPU. The designs are
  [Noto Emoji](https://github.com/googlefonts/noto-emoji) (Apache License 2.0), [Twemoji](https://github.com/jdecked/twemoji)
  (CC-BY 4.0) and [Fluent Emoji](https://github.com/microsoft/fluentui-emoji) (MIT).
- **Limits**: it recognises nothing but emoji. Colours that were held out in training are transferred, held-out designs are not.
  The code was not run on the authors' weights, so these images say nothing about the quality on photographs."""
ABOUT_WHOLE = """This repository contains a complete pipeline of the architecture of Stable Diffusion 1.5 and its SSR-Encoder.

- **Base model and training**: please fill in what the weights were trained on, how, and their licence.
- **Limits**: a query for something that is not in the reference image raises no error. Faces are not recognised."""
ABOUT_ENCODER = """This repository contains an SSR-Encoder and its vision encoder for
[{base_model}](https://huggingface.co/{base_model}) and its fine-tuned models. The base model is not part of it.

- **Training**: please fill in what the weights were trained on, how, and their licence.
- **Limits**: it does not fit SDXL and other architectures. A query for something that is not in the reference image raises no error.
  Faces are not recognised."""
ENTRY = '''"""The entry file that `custom_pipeline="<owner>/<repo>"` loads."""

from .pipeline_ssr import StableDiffusionSSRPipeline  # noqa: F401
'''


def copy_code(folder: Path) -> None:
    """Copies the pipelines, the modules that they import, and the license."""
    files = {ROOT / "LICENSE", *map(Path, get_relative_import_files(ROOT / "pipeline.py"))}
    for file in files | set(ROOT.glob("pipeline*.py")):
        shutil.copy(file, folder)
    # diffusers requests each relative import of each file from the Hub: with the imports of `pipeline_ssr.py` alone,
    # it requests each module once
    (folder / "pipeline.py").write_text(ENTRY)


def is_whole(weights: Path) -> bool:
    """Returns whether the folder contains a complete pipeline and not only an encoder."""
    return (weights / "model_index.json").exists()


def check_weights(weights: Path) -> None:
    """Exits with a message if the folder does not contain an encoder and its vision encoder."""
    missing = [name for name in ("ssr_encoder", "ssr_image_encoder") if not (weights / name).is_dir()]
    if not weights.is_dir():
        raise SystemExit(f"--weights: the folder {weights} does not exist.")
    if missing:
        raise SystemExit(f"--weights: the folder {weights} has to contain {' and '.join(missing)}, but does not.")


def write_weights(weights: Path, folder: Path, variants: list[str]) -> None:
    """Saves the pipeline, or the encoder if there is no pipeline, in full precision and as each of `variants`."""
    whole = is_whole(weights)
    # full precision is saved last, because each save overwrites the configs
    for variant in [*variants, None]:
        dtype = torch.float16 if variant == "fp16" else torch.float32
        encoder = SSREncoder.from_pretrained(weights, subfolder="ssr_encoder", dtype=dtype)
        image_encoder = CLIPVisionModel.from_pretrained(weights, subfolder="ssr_image_encoder", dtype=dtype)
        if whole:
            pipe = DiffusionPipeline.from_pretrained(weights, dtype=dtype, trust_remote_code=True)
            pipe = StableDiffusionSSRPipeline.from_pipe(pipe, dtype=dtype)
            pipe.load_ssr(encoder, image_encoder=image_encoder)
            pipe.save_pretrained(folder, variant=variant)
        else:
            encoder.save_pretrained(folder / "ssr_encoder", variant=variant)
            image_encoder.save_pretrained(folder / "ssr_image_encoder", variant=variant)
    processor, settings = weights / "ssr_image_processor", weights / "settings.json"
    if processor.exists():
        shutil.copytree(processor, folder / processor.name, dirs_exist_ok=True)
    if settings.exists():
        shutil.copy(settings, folder)


def remove_local_names(folder: Path) -> None:
    """Removes the paths on this machine that `save_pretrained` writes to the configs."""
    for file in [*folder.glob("*.json"), *folder.glob("*/*config.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, repo_id: str, base_model: str | None, weights: Path, image: Path | None = None) -> None:
    """Writes the model card, which shows how the repository is loaded and what it contains. `base_model` is the base
    model of a repository that only contains an encoder."""
    pocket = weights.resolve() == POCKET
    settings = default_settings(weights)
    about = (
        ABOUT_POCKET if pocket else ABOUT_WHOLE if base_model is None else ABOUT_ENCODER.format(base_model=base_model)
    )
    image = ROOT / "docs" / "quick_start.png" if pocket and image is None else image
    prompt = "a cat in the snow"
    if image is not None:
        shutil.copy(image, folder / f"example{image.suffix}")
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    values = {"repo_id": repo_id, "base_model": base_model or BASE_MODEL}
    card = ModelCard(
        template.format(
            name=repo_id.rpartition("/")[2],
            image="" if image is None else f"![{prompt}](example{image.suffix})\n\n",
            about=about,
            load=(LOAD_WHOLE if base_model is None else LOAD_ENCODER).format(**values),
            load_code=LOAD_ENCODER.format(**values).partition("\n\n")[2].partition("\n")[0],
            prompt=prompt,
            citation=readme.partition("```bibtex\n")[2].partition("\n```")[0],
            **settings,
        )
    )
    widget = [{"text": prompt, "output": {"url": f"example{image.suffix}"}}] if image is not None else None
    card.data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "stable-diffusion", "ssr-encoder", "subject-driven-generation"],
        base_model=base_model,
        widget=widget,
        inference=False,
    )
    card.save(folder / "README.md")


def assemble_space(args: argparse.Namespace, folder: Path) -> None:
    """Assembles a Space that uses the published weights."""
    copied = args.space_weights == "copy"
    ssr = args.weights.resolve().name if copied else args.repo_id
    arguments = ["--checkpoint", ssr] if is_whole(args.weights) else ["--checkpoint", args.base_model, "--ssr", ssr]
    models = [name for name in arguments if "/" in name]
    write_space(folder, arguments, models, args.weights.resolve() if copied else None)


def finish(args: argparse.Namespace, folder: Path, repo_id: str, **kind: str) -> None:
    """Prints the files of the folder, and uploads them with `push_to_hub`."""
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    print(json.dumps(files, indent=1))
    if args.push_to_hub:
        api = HfApi(token=args.token)
        sdk = {"space_sdk": "gradio"} if kind else {}
        api.create_repo(repo_id, private=args.private, exist_ok=True, **kind, **sdk)
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision=args.revision, **kind)
        print(f"Uploaded to {api.endpoint}/{'spaces/' if kind else ''}{repo_id}")
    else:
        print(f"Assembled in {folder}; --push_to_hub uploads it")


def main():
    args = parse_args()
    for option, repo_id in (("--repo_id", args.repo_id), ("--space", args.space)):
        try:
            validate_repo_id(repo_id or "name")
        except HFValidationError as error:
            raise SystemExit(f"{option}: {error}") from None
    if args.space:
        with needs("app"):
            import gradio  # noqa: F401  (the card of a Space names its version)
    check_weights(args.weights)
    folder = args.output_dir / args.repo_id.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    copy_code(folder)
    write_weights(args.weights, folder, args.variants)
    remove_local_names(folder)
    write_card(folder, args.repo_id, None if is_whole(args.weights) else args.base_model, args.weights, args.image)
    finish(args, folder, args.repo_id)
    if args.space:
        folder = args.output_dir / f"spaces--{args.space.replace('/', '--')}"
        assemble_space(args, folder)
        finish(args, folder, args.space, repo_type="space")


if __name__ == "__main__":
    run_script(main)
