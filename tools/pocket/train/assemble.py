"""Assemble `pocket/` from the trained models: a diffusers folder in float16, the judge, and reference images.

The SSR-Encoder is the one of `--ssr_encoder`. Without this option, it is the one in `shipped/ssr` of the work folder if
there is one, and otherwise the one in `adapters/ssr`. If all methods were trained (`train.adapters`), they are written
to `--comparison_dir`. They use the vision encoder of the checkpoint.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers_ssr import SSREncoder
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from ..methods import COMPARISON, METHODS
from ..pictures import edges
from ..world import CATEGORY_NAMES, PLACE_NAMES, PLACES, SPLITS, Instance, World, draw_scene


LORA = "pytorch_lora_weights.safetensors"
# The categories in each reference. The instances are held out.
REFERENCES = (
    ("cat", "car"),
    ("woman", "umbrella"),
    ("house", "dog"),
    ("butterfly", "mushroom", "tulip"),
    ("fish", "rocket"),
    ("guitar", "woman", "cat"),
)
MASKED = REFERENCES[2:4]


def draw_references(world: World, folder: Path, masks: Path, held_out: tuple[Instance, ...]) -> None:
    """Saves the references, their queries, and masks of the last thing for some of them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(7)
    queries = {}
    for index, names in enumerate(REFERENCES):
        pools = [[i for i in held_out if i.category == CATEGORY_NAMES.index(name)] for name in names]
        instances = [pool[rng.integers(len(pool))] for pool in pools]
        file = f"{index + 1}_{'_'.join(names)}.png"
        scene = draw_scene(world, rng, instances)
        Image.fromarray(scene.picture).save(folder / file)
        if names in MASKED:
            masks.mkdir(exist_ok=True)
            Image.fromarray(scene.masks[-1]).save(masks / file)
        queries[file] = list(names)
    (folder / "queries.json").write_text(json.dumps(queries, indent=2) + "\n")


def draw_controls(world: World, folder: Path, held_out: tuple[Instance, ...]) -> None:
    """Saves edges for the first subjects of the first references. The edges show other instances at other
    positions."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(11)
    for (name, *_), shift in zip(REFERENCES, ((-12, -10), (12, 4)), strict=False):
        pool = [i for i in held_out if i.category == CATEGORY_NAMES.index(name)]
        scene = draw_scene(world, rng, [pool[rng.integers(len(pool))]], PLACE_NAMES.index("beach"), shift=shift)
        Image.fromarray(edges(scene.picture)).save(folder / f"{name}.png")


def name_ssr_components(folder: Path) -> None:
    """Adds the SSR-Encoder and its vision encoder to `model_index.json`, so that the folder is a complete SSR
    pipeline."""
    if not (folder / "ssr_encoder").is_dir():
        return
    index = json.loads((folder / "model_index.json").read_text())
    index["ssr_encoder"] = ["modeling_ssr", "SSREncoder"]
    index["ssr_image_encoder"] = ["transformers", "CLIPVisionModel"]
    index["ssr_image_processor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n")
    shipped = Path(__file__).resolve().parents[3] / "pocket" / "ssr_encoder" / "modeling_ssr.py"
    (folder / "ssr_encoder" / shipped.name).write_text(shipped.read_text())


def split_tokenizer(folder: Path) -> None:
    """Writes `vocab.json` and `merges.txt` in addition to `tokenizer.json`, because transformers before 5 needs
    them."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def save_vision(trained: Path, folder: Path) -> None:
    """Saves the vision encoder of the work folder in half precision."""
    CLIPVisionModel.from_pretrained(trained / "clip").half().save_pretrained(folder / "ssr_image_encoder")


def save_encoders(trained: Path, output: Path, comparison: Path, chosen: Path | None) -> bool:
    """Saves the SSR-Encoder in the checkpoint (the folder `chosen`, or a trained one), and the methods that are compared
    if all of them were trained. Returns whether they were."""
    found = {name: trained / "adapters" / name / "ssr_encoder" for name in METHODS}
    found = {name: encoder for name, encoder in found.items() if encoder.exists()}
    shipped = chosen or trained / "shipped" / "ssr" / "ssr_encoder"
    if chosen is None and not shipped.exists():
        shipped = found.get("ssr")
    if shipped is not None:  # the adapters are trained on a folder that is assembled without them
        SSREncoder.from_pretrained(shipped).half().save_pretrained(output / "ssr_encoder")
    if len(found) == len(METHODS):
        for name, method in METHODS.items():
            method.encoder_class.from_pretrained(found[name]).half().save_pretrained(comparison / name)
    return len(found) == len(METHODS)


def name_dtypes(folder: Path) -> None:
    """Sets the dtype in all configs to float32, because transformers uses this entry and diffusers uses float32, so
    another value would lead to mixed dtypes. Removes the paths of the work folder."""
    for config in folder.rglob("config.json"):
        described = json.loads(config.read_text())
        described.pop("_name_or_path", None)
        if "dtype" in described:
            described["dtype"] = "float32"
        config.write_text(json.dumps(described, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training"))
    parser.add_argument("--output_dir", type=Path, default=Path("pocket"))
    parser.add_argument("--comparison_dir", type=Path, default=COMPARISON, help="the methods that are compared")
    parser.add_argument("--ssr_encoder", type=Path, help="the folder of the SSR-Encoder")
    parser.add_argument("--split", choices=SPLITS, default="wide", help="the split that the models were trained with")
    args = parser.parse_args()
    trained, output = args.work_dir, args.output_dir
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(trained / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(trained / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(trained / "clip"),
        unet=UNet2DConditionModel.from_pretrained(trained / "unet"),
        scheduler=DDIMScheduler.from_pretrained(trained / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(output)
    split_tokenizer(output / "tokenizer")
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    for name in ("vae", "text_encoder", "unet"):
        getattr(pipe, name).save_pretrained(output / name)
    compared = save_encoders(trained, output, args.comparison_dir, args.ssr_encoder)
    save_vision(trained, output)
    CLIPImageProcessor.from_pretrained(trained / "clip").save_pretrained(output / "ssr_image_processor")
    judge = load_file(trained / "judge" / "model.safetensors")
    judge = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in judge.items()}
    (output / "judge").mkdir(exist_ok=True)
    save_file(judge, output / "judge" / "model.safetensors")
    for name, model in (("controlnet", ControlNetModel), ("motion_adapter", MotionAdapter)):
        if (trained / name).exists():
            model.from_pretrained(trained / name).half().save_pretrained(output / name)
    if (trained / "look").exists():
        (output / "look").mkdir(exist_ok=True)
        look = {name: tensor.half() for name, tensor in load_file(trained / "look" / LORA).items()}
        save_file(look, output / "look" / LORA)
    world = World(trained / "designs")
    draw_references(world, output / "references", output / "masks", SPLITS[args.split][1])
    draw_controls(world, output / "controls", SPLITS[args.split][1])
    known = {"split": args.split, "categories": CATEGORY_NAMES, "places": tuple(PLACES.values())}
    (output / "world.json").write_text(json.dumps(known) + "\n")
    for folder in (output, args.comparison_dir) if compared else (output,):
        name_dtypes(folder)
    name_ssr_components(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output} holds {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
