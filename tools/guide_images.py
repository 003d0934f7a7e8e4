"""Makes the images of the guide, in docs/images, with the checkpoint in pocket/.

Each image is a strip: what a call gets, and what it generates, with the settings of pocket/settings.json and seed 0.

    python -m tools.guide_images
    python -m tools.guide_images query scale
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel
from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline
from PIL import Image, ImageDraw, ImageFont


ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

from drawing import POCKET, default_settings, load_pipeline  # noqa: E402


SIDE, GAP, LABEL = 128, 8, 20
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
MOVING = {0: (0, 0, 0.56, 1), 7: (0.44, 0, 1, 1)}
Strip = list[tuple[str, Image.Image]]


def sheet(strip: Strip) -> Image.Image:
    """Returns the images of a strip side by side, each below its label."""
    canvas = Image.new("RGB", (GAP + len(strip) * (SIDE + GAP), LABEL + SIDE + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for i, (label, image) in enumerate(strip):
        left = GAP + i * (SIDE + GAP)
        draw.text((left, 3), label, fill="black", font=font)
        canvas.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, LABEL))
    return canvas


def box_image(*boxes: tuple[float, ...]) -> Image.Image:
    """Returns an image of the size of a strip's images, with the outlines of boxes in fractions."""
    image = Image.new("RGB", (SIDE, SIDE), "black")
    for box in boxes:
        left, top, right, bottom = (round(edge * (SIDE - 1)) for edge in box)
        ImageDraw.Draw(image).rectangle((left, top, right, bottom), fill=(90, 90, 90), outline="white", width=2)
    return image


class Guide:
    """The images of the guide by name: each method returns the strip of one image, or the frames of a video."""

    def __init__(self) -> None:
        self.pipe = load_pipeline(str(POCKET), device=torch.device("cpu"))
        self.settings = default_settings(POCKET)
        self.subject_scale = self.settings.pop("scale")
        self.photo, self.other = (
            Image.open(POCKET / "references" / f"{name}.png").convert("RGB") for name in ("1_cat_car", "3_house_dog")
        )
        self.reference = ("reference image", self.photo)
        self.cat, self.car = (
            subject.scaled(self.subject_scale)
            for subject in self.pipe.encode_subject(self.photo, query=["cat", "car"])
        )
        self.dog = self.pipe.encode_subject(self.other, query="dog").scaled(self.subject_scale)

    def _generate(self, prompt: str, subject=None, pipe=None, seed: int = 0, **kwargs) -> Image.Image:
        """Returns the image of a prompt and a subject. `kwargs` are further arguments of the call."""
        generator = torch.Generator().manual_seed(seed)
        return (pipe or self.pipe)(prompt, subject=subject, generator=generator, **self.settings, **kwargs).images[0]

    def query(self) -> Strip:
        images = [(f'query "{q}"', self._generate(f"a {q} in the snow", getattr(self, q))) for q in ("cat", "car")]
        return [self.reference, *images]

    def mask(self) -> Strip:
        mask = Image.new("L", self.photo.size)
        mask.paste(255, (34, 26, 62, 54))
        subject = self.pipe.encode_subject(self.photo, query="cat", mask=mask, mask_weight=3.0).scaled(
            self.subject_scale
        )
        alone = self.pipe.encode_subject(self.photo, mask=mask, mask_weight=3.0).scaled(self.subject_scale)
        return [
            self.reference,
            ("mask", mask),
            ('mask and "cat"', self._generate("a cat in the snow", subject)),
            ("mask, no query", self._generate("a thing in the snow", alone)),
        ]

    def scale(self) -> Strip:
        scales = (0, 0.3, 0.65, 1)
        return [
            self.reference,
            *((f"scale {s}", self._generate("a cat on the beach", self.cat.scaled(float(s)))) for s in scales),
        ]

    def window(self) -> Strip:
        windows = ({}, {"subject_end": 0.6}, {"subject_end": 0.3}, {"subject_start": 0.3}, {"subject_start": 0.6})
        named = [(" ".join(f"{k} {v}" for k, v in window.items()) or "all steps", window) for window in windows]
        images = [(label, self._generate("a cat on the beach", self.cat, **window)) for label, window in named]
        return [self.reference, *images]

    def attention_map(self) -> Strip:
        maps = [
            (f'query "{q}"', self.pipe.subject_attention_map(self.photo, query=q).overlay()) for q in ("cat", "car")
        ]
        return [self.reference, *maps]

    def _two(self) -> Strip:
        return [("reference image", self.photo), ("reference image", self.other)]

    def several_subjects(self) -> Strip:
        prompt = "a cat and a dog on the beach"
        images = [
            (f"cat + dog, {s:g}", self._generate(prompt, self.cat.scaled(s) + self.dog.scaled(s))) for s in (0.6, 1.0)
        ]
        return [*self._two(), ("no subject", self._generate(prompt)), *images]

    def regions(self) -> Strip:
        prompt = "a cat and a dog on the beach"
        both = self.cat.inside(LEFT) + self.dog.inside(RIGHT)
        swapped = self.cat.inside(RIGHT) + self.dog.inside(LEFT)
        return [
            *self._two(),
            ("the two boxes", box_image(LEFT, RIGHT)),
            ("cat left, dog right", self._generate(prompt, both)),
            ("dog left, cat right", self._generate("a dog and a cat on the beach", swapped)),
        ]

    def boxes(self) -> Strip:
        strip = [self.reference]
        for label, box in (("the cat's box", (0.5, 0.4, 1, 0.85)), ("the car's box", (0, 0.4, 0.5, 0.8))):
            subject = self.pipe.encode_subject(self.photo, mask=box, mask_weight=3.0).scaled(self.subject_scale)
            strip += [(label, box_image(box)), ("a thing", self._generate("a thing in the snow", subject))]
        return strip

    def moving_subject(self) -> list[Image.Image]:
        adapter = MotionAdapter.from_pretrained(str(POCKET), subfolder="motion_adapter")
        pipe = AnimateDiffSSRPipeline.from_pipe(self.pipe, motion_adapter=adapter)
        pipe.set_progress_bar_config(disable=True)
        generator, cat = torch.Generator().manual_seed(0), self.cat.inside(MOVING)
        frames = pipe("a cat in the snow", subject=cat, num_frames=8, generator=generator, **self.settings).frames[0]
        steps = [tuple(np.interp(i, (0, 7), edges) for edges in zip(*MOVING.values(), strict=True)) for i in range(8)]
        return [
            sheet([self.reference, ("the box", box_image(box)), (f"frame {i}", frame)])
            for i, (box, frame) in enumerate(zip(steps, frames, strict=True))
        ]

    def controlnet(self) -> Strip:
        controlnet = ControlNetModel.from_pretrained(str(POCKET), subfolder="controlnet")
        pipe = StableDiffusionSSRControlNetPipeline.from_pipe(self.pipe, controlnet=controlnet)
        pipe.set_progress_bar_config(disable=True)
        edges, prompt = Image.open(POCKET / "controls" / "cat.png").convert("RGB"), "a cat on the beach"
        subjects = {"no subject": None, "with the cat": self.cat}
        images = [(label, self._generate(prompt, s, pipe, image=edges)) for label, s in subjects.items()]
        return [self.reference, ("edges", edges), *images]

    def another_checkpoint(self) -> Strip:
        unet = UNet2DConditionModel.from_pretrained(str(POCKET), subfolder="unet", dtype=torch.float32)
        pipe = type(self.pipe).from_pipe(self.pipe, unet=unet)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(str(POCKET / "look"))
        pipe.fuse_lora()
        prompt = "a cat on the beach"
        return [
            self.reference,
            ("pocket", self._generate(prompt, self.cat)),
            ("another UNet", self._generate(prompt, self.cat, pipe)),
            ("it, no subject", self._generate(prompt, None, pipe)),
        ]


NAMES = [name for name in vars(Guide) if not name.startswith("_")]


def file_of(name: str) -> Path:
    """Returns where an image is written."""
    return ROOT / "docs" / "images" / f"{name}.{'gif' if name == 'moving_subject' else 'jpg'}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="by default all")
    args = parser.parse_args()
    guide = Guide()
    for name in args.names:
        made = getattr(guide, name)()
        if isinstance(made[0], tuple):
            sheet(made).save(file_of(name), quality=85)
        else:
            made[0].save(file_of(name), save_all=True, append_images=made[1:], duration=150, loop=0)
        print(file_of(name).relative_to(ROOT))
