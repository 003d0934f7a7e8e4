"""The pocket world: small scenes of emoji subjects on painted places, with captions.

A *category* ("cat") has instances: one design set ("flat") in one of twelve colours. People come in looks (skin and hair)
instead of colours. Some instances are held out from everything that is trained, the judge apart: `is_held_out`.
"""

import math
import subprocess
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image


# Design word -> (npm package, folder of its pictures, their ending, credit)
DESIGN_SETS = {
    "painted": ("emoji-datasource-google", "img/google/64", "png", "Noto Emoji, Google, Apache License 2.0"),
    "flat": ("emoji-datasource-twitter", "img/twitter/64", "png", "Twemoji, Twitter and contributors, CC-BY 4.0"),
    "glossy": ("@lobehub/fluent-emoji-3d", "assets", "webp", "Fluent Emoji, Microsoft, packaged by LobeHub, MIT"),
}
DESIGNS = tuple(DESIGN_SETS)

# Code points of each category's picture; people have one for each look.
CATEGORIES = {
    "cat": "1f431",
    "dog": "1f436",
    "fish": "1f420",
    "butterfly": "1f98b",
    "car": "1f697",
    "rocket": "1f680",
    "tulip": "1f337",
    "mushroom": "1f344",
    "house": "1f3e0",
    "guitar": "1f3b8",
    "umbrella": "2602-fe0f",
    "woman": None,
}
CATEGORY_NAMES = tuple(CATEGORIES)

COLOURS = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "pink")
NUM_VARIANTS = len(COLOURS)
SKIN_TONES = {"1f3fb": "pale", "1f3fd": "tanned", "1f3ff": "dark"}
HAIR = {"": "brown-haired", "-200d-1f9b0": "red-haired", "-200d-1f9b1": "curly", "-200d-1f9b3": "white-haired"}
LOOKS = tuple((skin + hair, f"{SKIN_TONES[skin]} {HAIR[hair]}") for hair in HAIR for skin in SKIN_TONES)

PLACES = {
    "beach": "on the beach",
    "meadow": "in the meadow",
    "night": "in the night",
    "snow": "in the snow",
    "desert": "in the desert",
    "room": "in the room",
}
PLACE_NAMES = tuple(PLACES)

SIZE = 64
SPRITE_SIZE = 64
# For each number of subjects their side, left edges and top edge, in pixels. One layout each: a small base model then learns
# what things look like, and not where every pixel may lie. Which subject stands left is drawn.
LAYOUTS = {1: (40, (12,), 18), 2: (28, (2, 34), 26), 3: (20, (1, 22, 43), 36)}


@dataclass(frozen=True)
class Instance:
    """One particular subject: a category in one design and one variant (a colour, for people a look)."""

    category: int
    design: int
    variant: int

    @property
    def name(self) -> str:
        return CATEGORY_NAMES[self.category]

    @property
    def words(self) -> str:
        """What a rich caption says of it: "red glossy cat". Never used in a prompt that is measured."""
        look = LOOKS[self.variant][1] if CATEGORIES[self.name] is None else COLOURS[self.variant]
        return f"{look} {DESIGNS[self.design]} {self.name}"


def is_held_out(instance: Instance) -> bool:
    """A quarter of all instances: in each category, each design lacks a band of three neighbouring variants."""
    start = (instance.category * 5 + instance.design * 4) % NUM_VARIANTS
    return (instance.variant - start) % NUM_VARIANTS < 3


INSTANCES = tuple(
    Instance(c, d, v) for c in range(len(CATEGORIES)) for d in range(len(DESIGNS)) for v in range(NUM_VARIANTS)
)
SEEN = tuple(i for i in INSTANCES if not is_held_out(i))
HELD_OUT = tuple(i for i in INSTANCES if is_held_out(i))


def download_designs(folder: str | Path) -> None:
    """Fetch the three design sets from the npm registry with `npm pack` and keep the pictures that the world uses."""
    folder = Path(folder)
    for design, (package, pictures, ending, _) in DESIGN_SETS.items():
        target = folder / design
        wanted = {f"package/{pictures}/{name}.{ending}" for name in _code_points()}
        if target.is_dir() and len(list(target.iterdir())) == len(wanted):
            continue
        target.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        archive = folder / packed.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name in wanted:
                    (target / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        archive.unlink()


def _code_points() -> list[str]:
    return [c for c in CATEGORIES.values() if c] + ["1f469-" + look for look, _ in LOOKS]


def _recolour(rgba: np.ndarray, hue: float) -> np.ndarray:
    """Turn the hues of a sprite so that its dominant one becomes `hue` (0 to 1); greys are tinted a little."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV")).astype(np.float32) / 255
    h, s, v = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    weight = s * v * (rgba[..., 3] > 127)
    angle = np.angle((weight * np.exp(2j * np.pi * h)).sum()) / (2 * np.pi)
    h = (h - angle + hue) % 1.0
    flat = s < 0.15
    h = np.where(flat, hue, h)
    s = np.where(flat, np.maximum(s, 0.3 * np.clip(v * 1.2, 0, 1)), np.clip(s * 1.15, 0, 1))
    hsv = (np.stack([h, s, v], -1) * 255).round().astype(np.uint8)
    return np.dstack([np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")), rgba[..., 3]])


class World:
    """Draws scenes from the design sets in `folder` (see `download_designs`)."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._sprite = lru_cache(maxsize=None)(self._load_sprite)
        self._scaled = lru_cache(maxsize=60_000)(self._scale_sprite)

    def _load_sprite(self, instance: Instance) -> Image.Image:
        design = DESIGNS[instance.design]
        ending = DESIGN_SETS[design][2]
        code = CATEGORIES[instance.name]
        person = code is None
        if person:
            code = "1f469-" + LOOKS[instance.variant][0]
        with Image.open(self.folder / design / f"{code}.{ending}") as picture:
            rgba = picture.convert("RGBA")
        rgba = rgba.crop(rgba.getchannel("A").getbbox())
        side = max(rgba.size)
        square = Image.new("RGBA", (side, side))
        square.paste(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
        square = np.asarray(square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS))
        if not person:
            square = _recolour(square, instance.variant / NUM_VARIANTS)
        return Image.fromarray(square, "RGBA")

    def _scale_sprite(self, instance: Instance, side: int) -> np.ndarray:
        sprite = self._sprite(instance)
        # premultiplied, so that edges do not darken
        rgba = np.asarray(sprite).astype(np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:]
        channels = [
            np.asarray(Image.fromarray(rgba[..., c]).resize((side, side), Image.Resampling.BOX)) for c in range(4)
        ]
        return np.stack(channels, -1)

    def paste(self, canvas: np.ndarray, instance: Instance, x: int, y: int, side: int) -> np.ndarray:
        """Put an instance's picture into `canvas` ((height, width, 3), 0 to 1); returns its alpha, same height and width."""
        sprite = self._scaled(instance, side)
        region = canvas[y : y + side, x : x + side]
        region *= 1 - sprite[..., 3:]
        region += sprite[..., :3]
        alpha = np.zeros(canvas.shape[:2], np.float32)
        alpha[y : y + side, x : x + side] = sprite[..., 3]
        return alpha


@dataclass
class Scene:
    """A picture ((height, width, 3) uint8), its place, and for each subject the instance and its mask (bool)."""

    picture: np.ndarray
    place: int
    instances: list[Instance]
    masks: list[np.ndarray] = field(default_factory=list)

    def caption(self, rng: np.random.Generator | None = None, rich: bool = False) -> str:
        """ "a cat and a dog on the beach"; with `rich`, colour and design are named too."""
        things = [i.words if rich else i.name for i in self.instances]
        if rng is not None:
            rng.shuffle(things)
        return describe(things, PLACE_NAMES[self.place])


def describe(things: list[str], place: str | None) -> str:
    """The caption of things on a place: "a cat and an umbrella in the snow"."""
    named = [("an " if t[0] in "aeiou" else "a ") + t for t in things]
    text = " and ".join(named)
    return f"{text} {PLACES[place]}" if place else text


def paint_place(place: int, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """An empty place with its own light, horizon and details, as (size, size, 3) floats from 0 to 1."""
    name = PLACE_NAMES[place]
    y = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    x = np.linspace(0, 1, size, dtype=np.float32)[None, :]
    wave = rng.uniform(0.015, 0.05) * np.sin(2 * np.pi * (x * rng.uniform(0.7, 1.6) + rng.uniform()))
    horizon = rng.uniform(0.5, 0.68) + wave
    top, low, ground, deep = {
        "beach": ((0.35, 0.68, 0.95), (0.80, 0.93, 1.00), (0.96, 0.86, 0.62), (0.90, 0.75, 0.48)),
        "meadow": ((0.45, 0.75, 0.98), (0.85, 0.95, 1.00), (0.50, 0.78, 0.32), (0.30, 0.58, 0.22)),
        "night": ((0.04, 0.05, 0.18), (0.15, 0.14, 0.38), (0.13, 0.15, 0.25), (0.07, 0.08, 0.15)),
        "snow": ((0.66, 0.74, 0.84), (0.88, 0.91, 0.95), (0.97, 0.98, 1.00), (0.84, 0.90, 0.97)),
        "desert": ((0.98, 0.62, 0.36), (1.00, 0.86, 0.60), (0.86, 0.55, 0.30), (0.70, 0.40, 0.20)),
        "room": ((0.82, 0.76, 0.70), (0.88, 0.83, 0.78), (0.62, 0.42, 0.27), (0.52, 0.33, 0.20)),
    }[name]
    top, low, ground, deep = (np.array(c, np.float32) for c in (top, low, ground, deep))
    if name == "room":
        horizon = np.full_like(wave, rng.uniform(0.6, 0.7))
    sky = top + (low - top) * (y / 0.6).clip(0, 1)[..., None]
    depth = ((y - horizon) / (1 - horizon)).clip(0, 1)[..., None]
    land = ground + (deep - ground) * depth
    soft = ((y - horizon) * size * 0.7 + 0.5).clip(0, 1)[..., None]
    canvas = sky * np.ones((1, size, 1), np.float32)

    def disc(cx, cy, radius, colour):
        cover = ((radius - np.hypot(x - cx, y - cy)) * size + 0.5).clip(0, 1)[..., None]
        canvas[:] = canvas * (1 - cover) + np.array(colour, np.float32) * cover

    if name == "night":
        for _ in range(rng.integers(10, 18)):
            disc(rng.uniform(), rng.uniform(0, 0.55), rng.uniform(0.006, 0.014), (0.95, 0.95, 0.85))
        disc(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.25), 0.07, (0.97, 0.95, 0.80))
    elif name == "desert":
        disc(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.25), 0.08, (1.0, 0.95, 0.70))
    elif name == "beach":
        sea = horizon - rng.uniform(0.10, 0.16)
        cover = ((y - sea.mean()) * size + 0.5).clip(0, 1)[..., None]
        canvas[:] = canvas * (1 - cover) + np.array((0.16, 0.55, 0.78), np.float32) * cover
    elif name == "meadow":
        hill = 0.42 + 0.1 * np.sin(2 * np.pi * (x * 0.8 + rng.uniform()))
        cover = ((y - hill) * size + 0.5).clip(0, 1)[..., None]
        canvas[:] = canvas * (1 - cover) + np.array((0.55, 0.80, 0.55), np.float32) * cover
    elif name == "room":
        left = rng.uniform(0.05, 0.65)
        inside = (x > left) & (x < left + 0.28) & (y > 0.08) & (y < 0.40)
        canvas[inside] = (0.70, 0.86, 0.97)
    canvas = canvas * (1 - soft) + land * soft
    if name == "snow":
        for _ in range(rng.integers(14, 24)):
            disc(rng.uniform(), rng.uniform(), rng.uniform(0.008, 0.018), (1, 1, 1))
    elif name == "room":
        boards = np.arange(size)[None, :] % rng.integers(9, 14) == 0
        canvas = np.where((boards & (soft[..., 0] > 0.5))[..., None], canvas * 0.85, canvas)
    return (canvas * rng.uniform(0.93, 1.05)).clip(0, 1).astype(np.float32)


def draw_scene(
    world: World,
    rng: np.random.Generator,
    instances: list[Instance],
    place: int | None = None,
    size: int = SIZE,
    shift: tuple[int, int] = (0, 0),
    canvas: np.ndarray | None = None,
) -> Scene:
    """Put one to three instances side by side, in any order, on a place (a random one if `None`).

    `shift` moves them by pixels to the right and down, at most to the picture's edge; `canvas` is a place that is
    painted already.
    """
    place = int(rng.integers(len(PLACES))) if place is None else place
    canvas = paint_place(place, rng, size) if canvas is None else canvas.copy()
    masks: list = [None] * len(instances)
    side, lefts, top = (np.array(pixels) * size // SIZE for pixels in LAYOUTS[len(instances)])
    for column, index in enumerate(rng.permutation(len(instances))):
        x, y = np.clip((lefts[column] + shift[0], top + shift[1]), 0, size - side)
        masks[index] = world.paste(canvas, instances[index], int(x), int(y), int(side))
    alphas = [mask > 0.5 for mask in masks]
    return Scene((canvas.clip(0, 1) * 255).round().astype(np.uint8), place, list(instances), alphas)


def draw_instances(rng: np.random.Generator, pool: tuple[Instance, ...], count: int) -> list[Instance]:
    """`count` instances of `count` different categories."""
    chosen: list[Instance] = []
    while len(chosen) < count:
        candidate = pool[rng.integers(len(pool))]
        if all(candidate.category != other.category for other in chosen):
            chosen.append(candidate)
    return chosen


def sheet(pictures: list[np.ndarray], columns: int, zoom: int = 2, gap: int = 4) -> Image.Image:
    """Pictures of one size ((height, width, 3) uint8) as one contact sheet."""
    height, width = pictures[0].shape[:2]
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * (width * zoom + gap) + gap, rows * (height * zoom + gap) + gap), "white")
    for index, picture in enumerate(pictures):
        image = Image.fromarray(picture).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        canvas.paste(image, (gap + column * (width * zoom + gap), gap + row * (height * zoom + gap)))
    return canvas
