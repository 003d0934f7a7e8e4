"""Makes docs/quick_start.png by running the quick start of the README, and docs/figure.jpg, the figure at its top.

python -m tools.pocket.figure
"""

import json
import os
import re
import tempfile

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import Image, ImageDraw, ImageFont

from .measure.comparison import load_adapter
from .methods import ROOT


SIDE, GAP, LABEL = 320, 14, 40
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)


def quick_start() -> Image.Image:
    """Runs the first Python block of the README, and returns the image that it writes."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("pocket", *(file.name for file in ROOT.glob("*.py"))):
            os.symlink(ROOT / name, name)
        exec(block, {})
        image = Image.open("cat.png").convert("RGB")
        os.chdir(here)
    return image


def make_figure() -> Image.Image:
    """Returns a sheet of two rows: a reference with two queries, and two subjects in one image; below, the adapter without a
    query for the same prompts and seed, and the other reference with a second image of both."""
    settings = json.loads((ROOT / "pocket" / "settings.json").read_text())
    scale = settings.pop("scale")
    pipe = DiffusionPipeline.from_pretrained(
        str(ROOT / "pocket"), custom_pipeline=str(ROOT / "pipeline_ssr.py"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    vision, processor = pipe.ssr_image_encoder, pipe.ssr_image_processor

    def generate(prompt: str, subject, seed: int = 0) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, subject=subject.scaled(scale), generator=generator, **settings).images[0]

    first, second = (
        load_image(str(ROOT / "pocket" / "references" / f"{name}.png")) for name in ("1_cat_car", "3_house_dog")
    )
    upper = [("reference image", first)]
    for query in ("cat", "car"):
        image = generate(f"a {query} in the snow", pipe.encode_subject(first, query=query))
        upper.append((f'query "{query}"', image))
    upper.append(("another reference image", second))
    car, dog = pipe.encode_subject(first, query="car"), pipe.encode_subject(second, query="dog")
    both = car.scaled(scale).inside(LEFT) + dog.scaled(scale).inside(RIGHT)
    lower = []
    for place, row in (("on the beach", upper), ("at night", lower)):
        generator = torch.Generator().manual_seed(0)
        image = pipe(f"a car and a dog {place}", subject=both, generator=generator, **settings).images[0]
        row.append(("car left, dog right", image))
    pipe.load_ssr(load_adapter("ip_adapter_plus"), image_encoder=vision, image_processor=processor)
    whole = pipe.encode_subject(first, query="thing")  # which this adapter ignores
    adapter = [("adapter", None)]
    adapter += [(f'"a {query} in the snow"', generate(f"a {query} in the snow", whole)) for query in ("cat", "car")]
    return sheet([upper, [*adapter, ("", None), *lower]])


def sheet(rows: list[list[tuple[str, Image.Image | None]]]) -> Image.Image:
    """Returns rows of labelled images. The label of an empty cell is text in the cell."""
    width, height = SIDE + GAP, SIDE + LABEL + GAP
    canvas = Image.new("RGB", (GAP + len(rows[0]) * width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=26)
    for y, row in enumerate(rows):
        for x, (label, image) in enumerate(row):
            left, top = GAP + x * width, y * height
            if image is not None:
                draw.text((left, top + 6), label, fill="black", font=font)
                canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top + LABEL))
            elif label:
                text = "the same with an\nadapter without\na query, in the style\nof IP-Adapter"
                draw.text((left, top + LABEL + SIDE // 3), text, fill="black", font=font)
    return canvas


if __name__ == "__main__":
    quick_start().save(ROOT / "docs" / "quick_start.png")
    make_figure().save(ROOT / "docs" / "figure.jpg", quality=88)
