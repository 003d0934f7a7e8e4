"""The pocket world: small scenes of emoji subjects in painted places, with captions.

Each *category* ("cat") has several instances. An instance has one design ("flat") and one of twelve colors. People
have looks (skin and hair) instead of colors. Some instances are held out (`SPLITS`): no model except the judge is
trained on them. In training, the hue of a color is drawn from its twelfth of the color circle (`varied`), and several
hundred other emoji appear in addition to the twelve categories (`World.others`).
"""

import json
import math
import re
import subprocess
import tarfile
import unicodedata
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image


# Name of the design -> (npm package, folder of its images, their file extension, credit)
DESIGN_SETS = {
    "painted": ("emoji-datasource-google", "img/google/64", "png", "Noto Emoji, Google, Apache License 2.0"),
    "flat": ("emoji-datasource-twitter", "img/twitter/64", "png", "Twemoji, Twitter and contributors, CC-BY 4.0"),
    "glossy": ("@lobehub/fluent-emoji-3d", "assets", "webp", "Fluent Emoji, Microsoft, packaged by LobeHub, MIT"),
}
DESIGNS = tuple(DESIGN_SETS)
# Two more sets, of which the split `sets` trains on the first and holds out the second. They are vector graphics without code
# points, and do not have all of the emoji: name of the design -> (npm package, credit).
ICON_SETS = {
    "simple": ("@iconify-json/fxemoji", "Firefox OS Emoji, Mozilla, Apache License 2.0"),
    "round": ("@iconify-json/emojione", "Emoji One 2.3, Emoji One, CC-BY 4.0"),
}
ALL_DESIGNS = (*DESIGNS, *ICON_SETS)

# The code points of the image of each category. People have one image for each look.
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

# Other emoji of the measured categories. The vision encoder is trained to recognize them as these categories.
KIN = {
    "cat": ("1f408", "1f408-200d-2b1b"),
    "dog": ("1f415", "1f429", "1f9ae", "1f415-200d-1f9ba"),
    "fish": ("1f41f",),
    "car": ("1f699", "1f695", "1f693"),
    "house": ("1f3e1",),
    "umbrella": ("2614", "1f302", "26f1-fe0f"),
}
# The emoji groups from which the other emoji are taken, and the emoji that are excluded because they look too similar
# to a measured category.
OTHER_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
TOO_ALIKE = {
    "1f31b", "1f31c", "1f342", "1f3d8-fe0f", "1f3da-fe0f", "1f3e2", "1f3eb", "1f420", "1f421", "1f42f", "1f431", "1f436", "1f43a",
    "1f490", "1f68e", "1f696", "1f694", "1f697", "1f698", "1f6d6", "1f3ce-fe0f", "1f981", "1f98a", "1f98b", "1f988", "1fa95",
    "1fab7", "1fabb", "1f339", "1f940", "1f33a", "1f41b", "1f3d6-fe0f", "1f344-200d-1f7eb", "1f6fb", "1f690", "1f9d1", "1f335",
    "1f3bb", "2602-fe0f", "26c4", "1f3e0", "1f337", "1f344", "1f680", "1f3b8",
}  # fmt: skip

SIZE = 64
SPRITE_SIZE = 64
# The side, left edges and top edge of the subjects in pixels, for each number of subjects. There is one layout for
# each number, so that a small base model can learn the look of the subjects without also learning many positions. The
# order of the subjects is random.
LAYOUTS = {1: (40, (12,), 18), 2: (28, (2, 34), 26), 3: (20, (1, 22, 43), 36)}


@dataclass(frozen=True)
class Instance:
    """One particular subject: a category in one design and one variant (a color, or a look for people). `shift`, from
    -0.5 to 0.5, moves the hue within the color's twelfth of the color circle. `saturation` and `lightness` are
    factors."""

    category: int
    design: int
    variant: int
    shift: float = 0.0
    saturation: float = 1.0
    lightness: float = 1.0
    flipped: bool = False

    @property
    def code(self) -> str:
        return CATEGORIES[self.name] or "1f469-" + LOOKS[self.variant][0]

    @property
    def hue(self) -> float | None:
        """The hue from 0 to 1. It is `None` for people, because their colors are not changed."""
        return None if CATEGORIES[self.name] is None else (self.variant + self.shift) / NUM_VARIANTS % 1.0

    @property
    def name(self) -> str:
        return CATEGORY_NAMES[self.category]

    @property
    def words(self) -> str:
        """The description in rich captions: "red glossy cat". It is never used in prompts for measurements."""
        look = LOOKS[self.variant][1] if CATEGORIES[self.name] is None else COLOURS[self.variant]
        return f"{look} {ALL_DESIGNS[self.design]} {self.name}"


def load_split(checkpoint: str | Path) -> str:
    """Reads the name of the split that a checkpoint was trained with from its `world.json`."""
    return json.loads((Path(checkpoint) / "world.json").read_text())["split"]


@dataclass(frozen=True)
class Other:
    """A thing that is not used in measurements: an emoji that appears next to subjects, or another image of a
    category (`KIN`)."""

    name: str
    code: str
    design: int
    hue: float | None
    saturation: float = 1.0
    lightness: float = 1.0
    flipped: bool = False

    @property
    def words(self) -> str:
        """The description in rich captions, with the nearest color if the hue was changed."""
        colour = [] if self.hue is None else [COLOURS[round(self.hue * NUM_VARIANTS) % NUM_VARIANTS]]
        return " ".join([*colour, ALL_DESIGNS[self.design], self.name])


def varied(rng: np.random.Generator, instance: Instance, flip: bool = False) -> Instance:
    """Returns the instance with a random hue within the twelfth of its color and a slightly different saturation and
    lightness. With `flip`, it is mirrored with a probability of one half. The colors of people are not changed."""
    person = instance.hue is None
    shift, saturation, lightness = rng.uniform((-0.5, 0.75, 0.85), (0.5, 1.15, 1.12))
    return replace(
        instance,
        shift=0.0 if person else float(shift),
        saturation=1.0 if person else float(saturation),
        lightness=float(lightness) if not person else 1.0,
        flipped=flip and bool(rng.random() < 0.5),
    )


def _held_out_first(instance: Instance) -> bool:
    """Holds out a quarter of all instances: three neighboring variants of each design of each category. They are
    different for each design."""
    start = (instance.category * 5 + instance.design * 4) % NUM_VARIANTS
    return (instance.variant - start) % NUM_VARIANTS < 3


def _held_out_wide(instance: Instance) -> bool:
    """Holds out three neighboring variants of each category, the same for all of its designs, so that a color does not
    predict a design. Also holds out a whole design of every third category."""
    band = (instance.variant - instance.category * 5) % NUM_VARIANTS < 3
    return band or (instance.category % 3 == 0 and instance.design == instance.category // 3 % len(DESIGNS))


INSTANCES = tuple(
    Instance(c, d, v) for c in range(len(CATEGORIES)) for d in range(len(DESIGNS)) for v in range(NUM_VARIANTS)
)
# The icon sets have no butterfly, or only one hair for each skin.
SIMPLE, ROUND = len(DESIGNS), len(DESIGNS) + 1
ICON_INSTANCES = tuple(
    Instance(CATEGORY_NAMES.index(name), design, variant)
    for name in CATEGORY_NAMES
    for design in (SIMPLE, ROUND)
    for variant in range(NUM_VARIANTS if CATEGORIES[name] else len(SKIN_TONES))
    if design == ROUND or name not in ("butterfly", "woman")
)


def _held_out_sets(instance: Instance) -> bool:
    """Holds out a whole set, which is an unseen design for each category, and two neighboring variants of all others."""
    return instance.design == ROUND or 0 < (instance.variant - instance.category * 5) % NUM_VARIANTS < 3


def _choosing_sets(instance: Instance) -> bool:
    """Of the instances that `wide` holds out and `sets` does not report: a color and four designs."""
    return not _held_out_sets(instance) and instance.design < SIMPLE and _held_out_wide(instance)


_RULES = {
    "first": (INSTANCES, _held_out_first, None),
    "wide": (INSTANCES, _held_out_wide, None),
    "sets": (INSTANCES + ICON_INSTANCES, _held_out_sets, _choosing_sets),
}
# Name of the split -> instances to choose a checkpoint with. They are neither trained on nor reported.
CHOOSING = {name: tuple(i for i in all if rule and rule(i)) for name, (all, _, rule) in _RULES.items()}
# Name of the split -> (seen instances, held-out instances). With "first", each held-out color of a category is seen in
# its two other designs, so a model that has learned to associate colors with designs generates the wrong design. With
# "wide", a held-out instance cannot be predicted from its color or from its design. With "sets", a whole design set is
# held out, so there is an unseen design of each category.
SPLITS = {
    name: (
        tuple(i for i in all if not held_out(i) and i not in CHOOSING[name]),
        tuple(i for i in all if held_out(i)),
    )
    for name, (all, held_out, _) in _RULES.items()
}


def instances_of(split: str) -> tuple[Instance, ...]:
    """Returns all instances of a split."""
    return _RULES[split][0]


def _pack(package: str, folder: Path) -> Path:
    """Downloads an npm package and returns its archive."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    return folder / packed.stdout.split()[-1]


def download_icons(folder: str | Path) -> None:
    """Adds the images of the icon sets that are used, as PNG files named after the code points, to the folder of
    `download_designs`. An icon is found by the name of the category, of the emoji, or of its first character in
    Unicode."""
    import resvg_py  # only needed here

    others = json.loads((Path(folder) / "others.json").read_text())["others"]
    wanted = {code: [name] for code, name in others.items() if re.fullmatch("[0-9a-f]+(-fe0f)?", code)}
    wanted |= {code: [name] for name, code in CATEGORIES.items() if code}
    wanted[CATEGORIES["house"]].append("house building")
    for code, names in wanted.items():
        names.append(unicodedata.name(chr(int(code.split("-")[0], 16)), ""))
    for skin, tone in zip(SKIN_TONES, ("light", "medium", "dark"), strict=True):
        wanted[f"1f469-{skin}"] = [f"woman {tone} skin tone"]
    for design, (package, _) in ICON_SETS.items():
        target = Path(folder) / design
        if target.exists():
            continue
        archive = _pack(package, Path(folder))
        with tarfile.open(archive) as tar:
            listed = json.load(tar.extractfile("package/icons.json"))
        archive.unlink()
        drawn = target.with_suffix(".part")
        drawn.mkdir(exist_ok=True)
        icons = {re.sub("[^a-z0-9]", "", name): icon for name, icon in listed["icons"].items()}
        for code, names in wanted.items():
            # Unicode calls the face of a cat "cat face", and Firefox calls it "cat", so the most specific name is first
            keys = [re.sub("[^a-z0-9]", "", name.lower()) for name in reversed(names)]
            icon = next((icons[key] for key in keys if key in icons), None)
            if icon is None or (design == "simple" and code.startswith("1f469")):
                continue
            width, height = icon.get("width", listed["width"]), icon.get("height", listed["height"])
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            (drawn / f"{code}.png").write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_SIZE)))
        drawn.rename(target)


def download_designs(folder: str | Path) -> None:
    """Downloads the three design sets from the npm registry with `npm pack`, and keeps the images that are used."""
    folder = Path(folder)
    if (folder / "others.json").exists():
        return
    pictures: dict[str, dict[str, bytes]] = {}
    for design, (package, inside, ending, _) in DESIGN_SETS.items():
        archive = _pack(package, folder)
        start = f"package/{inside}/"
        with tarfile.open(archive) as tar:
            pictures[design] = {}
            for member in tar:
                if member.name.startswith(start) and member.name.endswith(ending):
                    pictures[design][Path(member.name).stem] = tar.extractfile(member).read()
                elif member.name == "package/emoji.json":
                    emoji = json.load(tar.extractfile(member))
        archive.unlink()
    everywhere = set.intersection(*(set(each) for each in pictures.values()))
    kin = {code: name for name, codes in KIN.items() for code in codes if code in everywhere}
    others = {}
    for each in emoji:
        code = Path(each["image"]).stem
        listed = each["category"] in OTHER_GROUPS and code in everywhere
        if listed and code not in TOO_ALIKE and code not in kin and not each["short_name"].startswith("clock"):
            others[code] = each["short_name"].replace("_", " ").replace("-", " ")
    for design, found in pictures.items():
        (folder / design).mkdir(exist_ok=True)
        for code in (*_code_points(), *kin, *others):
            (folder / design / f"{code}.{DESIGN_SETS[design][2]}").write_bytes(found[code])
    (folder / "others.json").write_text(json.dumps({"others": others, "kin": kin}, indent=1))


def _code_points() -> list[str]:
    return [c for c in CATEGORIES.values() if c] + ["1f469-" + look for look, _ in LOOKS]


def _recolour(rgba: np.ndarray, hue: float | None, saturation: float = 1.0, lightness: float = 1.0) -> np.ndarray:
    """Rotates the hues of a sprite so that its dominant hue becomes `hue` (0 to 1), and tints its grays slightly. If
    `hue` is `None`, the hues do not change."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV")).astype(np.float32) / 255
    h, s, v = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    if hue is not None:
        weight = s * v * (rgba[..., 3] > 127)
        angle = np.angle((weight * np.exp(2j * np.pi * h)).sum()) / (2 * np.pi)
        h = (h - angle + hue) % 1.0
        flat = s < 0.15
        h = np.where(flat, hue, h)
        s = np.where(flat, np.maximum(s, 0.3 * np.clip(v * 1.2, 0, 1)), np.clip(s * 1.15, 0, 1))
    hsv = np.stack([h, np.clip(s * saturation, 0, 1), np.clip(v * lightness, 0, 1)], -1)
    hsv = (hsv * 255).round().astype(np.uint8)
    return np.dstack([np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")), rgba[..., 3]])


def restyled(rng: np.random.Generator, sprite: np.ndarray) -> np.ndarray:
    """Changes the style of a uint8 sprite of shape (64, 64, 4): it is rotated, stretched, and drawn with outlines or
    with fewer colors. Encoders and judges are trained on such sprites to recognize things in designs that they have
    not seen."""
    turn, skew = rng.uniform(-0.25, 0.25), rng.uniform(-0.15, 0.15)
    wide, high = 1.1 * np.exp(rng.uniform(-0.16, 0.16, 2))
    matrix = np.array([[np.cos(turn), -np.sin(turn) + skew], [np.sin(turn), np.cos(turn)]]) * [[wide], [high]]
    middle = SPRITE_SIZE / 2 - matrix @ [SPRITE_SIZE / 2, SPRITE_SIZE / 2]
    turned = Image.fromarray(sprite, "RGBA").transform(
        (SPRITE_SIZE, SPRITE_SIZE),
        Image.Transform.AFFINE,
        (*matrix[0], middle[0], *matrix[1], middle[1]),
        Image.Resampling.BILINEAR,
    )
    drawn = np.asarray(turned).copy()
    if rng.random() < 0.3:
        levels = rng.integers(3, 6)
        drawn[..., :3] = ((drawn[..., :3] / 255 * (levels - 1)).round() / (levels - 1) * 255).astype(np.uint8)
    if rng.random() < 0.4:
        grey = np.dstack([drawn[..., :3].mean(-1) / 2, drawn[..., 3]]).astype(np.float32)
        steps = [np.abs(grey - np.roll(grey, by, axis)).max(-1) for axis in (0, 1) for by in (1, -1)]
        lines = np.max(steps, axis=0) > rng.uniform(25, 60)
        if rng.random() < 0.5:
            lines |= np.roll(lines, 1, 0) | np.roll(lines, 1, 1)
        drawn[lines] = (*rng.integers(0, 50, 3), 255)
    return drawn


class World:
    """Draws scenes from the design sets in `folder` (see `download_designs`)."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._codes: dict[int, frozenset[str]] = {}
        self._square = lru_cache(maxsize=None)(self._load_square)
        self._scaled = lru_cache(maxsize=2000)(self._scale_sprite)

    @cached_property
    def others(self) -> dict[str, str]:
        """Code point -> name, for the emoji that are not of a measured category."""
        return json.loads((self.folder / "others.json").read_text())["others"]

    @cached_property
    def kin(self) -> dict[str, str]:
        """Code point -> category, for the other images of the measured categories (`KIN`)."""
        return json.loads((self.folder / "others.json").read_text())["kin"]

    def codes_of(self, design: int) -> frozenset[str]:
        """Returns the code points that a design has."""
        if design not in self._codes:
            files = (self.folder / ALL_DESIGNS[design]).iterdir()
            self._codes[design] = frozenset(file.stem for file in files)
        return self._codes[design]

    def draw_other(self, rng: np.random.Generator, codes: dict[str, str] | None = None, split: str = "wide") -> Other:
        """Draws one of the other emoji at random, with a random design that the split trains on and usually a random
        color."""
        codes = self.others if codes is None else codes
        code = list(codes)[rng.integers(len(codes))]
        hue = float(rng.random()) if rng.random() < 0.75 else None
        saturation, lightness = map(float, rng.uniform((0.75, 0.85), (1.15, 1.12)))
        designs = list(range(len(DESIGNS)))
        if split == "sets" and code in self.codes_of(SIMPLE):
            designs.append(SIMPLE)
        design, flipped = int(rng.choice(designs)), bool(rng.random() < 0.5)
        return Other(codes[code], code, design, hue, saturation, lightness, flipped)

    def _load_square(self, design: str, code: str) -> np.ndarray:
        ending = DESIGN_SETS[design][2] if design in DESIGN_SETS else "png"
        with Image.open(self.folder / design / f"{code}.{ending}") as picture:
            rgba = picture.convert("RGBA")
        rgba = rgba.crop(rgba.getchannel("A").getbbox())
        side = max(rgba.size)
        square = Image.new("RGBA", (side, side))
        square.paste(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
        return np.asarray(square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS))

    def sprite(self, thing: Instance | Other, rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns the image of a thing, as uint8 of shape (64, 64, 4). With `rng`, its style is changed
        (`restyled`)."""
        square = self._square(ALL_DESIGNS[thing.design], thing.code)
        if thing.hue is not None or thing.saturation != 1 or thing.lightness != 1:
            square = _recolour(square, thing.hue, thing.saturation, thing.lightness)
        if thing.flipped:
            square = square[:, ::-1]
        return square if rng is None else restyled(rng, square)

    def _scale_sprite(self, thing: Instance | Other, side: int) -> np.ndarray:
        return _scale(self.sprite(thing), side)

    def paste(
        self,
        canvas: np.ndarray,
        thing: Instance | Other,
        x: int,
        y: int,
        side: int,
        style: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Draws the image of a thing into `canvas`, of shape (height, width, 3) from 0 to 1. Returns its alpha
        channel, of shape (height, width)."""
        sprite = self._scaled(thing, side) if style is None else _scale(self.sprite(thing, style), side)
        region = canvas[y : y + side, x : x + side]
        region *= 1 - sprite[..., 3:]
        region += sprite[..., :3]
        alpha = np.zeros(canvas.shape[:2], np.float32)
        alpha[y : y + side, x : x + side] = sprite[..., 3]
        return alpha


def _scale(sprite: np.ndarray, side: int) -> np.ndarray:
    # premultiplied alpha, because the edges would become darker otherwise
    rgba = sprite.astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    channels = [np.asarray(Image.fromarray(rgba[..., c]).resize((side, side), Image.Resampling.BOX)) for c in range(4)]
    return np.stack(channels, -1)


@dataclass
class Scene:
    """A uint8 image of shape (height, width, 3), its place, and each subject's instance and boolean mask."""

    picture: np.ndarray
    place: int
    instances: list[Instance]
    masks: list[np.ndarray] = field(default_factory=list)

    def caption(self, rng: np.random.Generator | None = None, rich: bool = False) -> str:
        """Returns the caption, such as "a cat and a dog on the beach". With `rich`, it also names colors and
        designs."""
        things = [i.words if rich else i.name for i in self.instances]
        if rng is not None:
            rng.shuffle(things)
        return describe(things, PLACE_NAMES[self.place])


def describe(things: list[str], place: str | None) -> str:
    """Returns a caption of things in a place, such as "a cat and an umbrella in the snow"."""
    named = [("an " if t[0] in "aeiou" else "a ") + t for t in things]
    text = " and ".join(named)
    return f"{text} {PLACES[place]}" if place else text


def paint_place(place: int, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Paints an empty place with random light, horizon and details, as floats from 0 to 1 of shape (size, size, 3)."""
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


Box = tuple[int, int, int]


def arrange(rng: np.random.Generator, count: int, size: int = SIZE) -> list[Box]:
    """Returns random positions for one to four things, each as `(left, top, side)`, from back to front. The things
    have random sizes and are next to each other. In one of four cases they partly overlap."""
    overlap = 0.3 if rng.random() < 0.25 else 0.0
    low, high = {1: (26, 54), 2: (18, 42), 3: (15, 28), 4: (13, 22)}[count]
    sides = rng.integers(low, high + 1, count)
    shown = sides * (1 - overlap)
    needed = shown.sum() + overlap * sides[-1]
    if needed > SIZE:
        sides = (sides * SIZE / needed).astype(int)
        shown = sides * (1 - overlap)
        needed = shown.sum() + overlap * sides[-1]
    gaps = (SIZE - needed) * rng.dirichlet(np.ones(count + 1))
    lefts = np.cumsum(gaps[:-1]) + np.cumsum(shown) - shown
    # things with a lower bottom edge are nearer
    feet = rng.integers(40, SIZE, count)
    order = np.argsort(feet)
    boxes = [(int(lefts[i]), max(int(feet[i] - sides[i]), 0), int(sides[i])) for i in order]
    return [tuple(each * size // SIZE for each in box) for box in boxes]


def draw_scene(
    world: World,
    rng: np.random.Generator,
    things: list[Instance | Other],
    place: int | None = None,
    size: int = SIZE,
    shift: tuple[int, int] = (0, 0),
    canvas: np.ndarray | None = None,
    boxes: list[Box] | None = None,
    restyle: bool = False,
) -> Scene:
    """Draws things side by side, in random order, in a place (a random one if `None`).

    `shift` moves the things to the right and down by a number of pixels, at most to the edge of the image. `canvas`
    is an already painted place. `boxes` are positions of the things (`arrange`) and replace `LAYOUTS`. With `restyle`,
    the style of each thing is changed (`restyled`).
    """
    place = int(rng.integers(len(PLACES))) if place is None else place
    canvas = paint_place(place, rng, size) if canvas is None else canvas.copy()
    masks: list = [None] * len(things)
    if boxes is None:
        side, lefts, top = (np.array(pixels) * size // SIZE for pixels in LAYOUTS[len(things)])
        corners = [np.clip((left + shift[0], top + shift[1]), 0, size - side) for left in lefts]
        boxes = [(int(x), int(y), int(side)) for x, y in corners]
    style = rng if restyle else None
    for box, index in zip(boxes, rng.permutation(len(things)), strict=True):
        alpha = world.paste(canvas, things[index], *box, style)
        masks = [mask if mask is None else mask * (1 - alpha) for mask in masks]
        masks[index] = alpha
    alphas = [mask > 0.5 for mask in masks]
    return Scene((canvas.clip(0, 1) * 255).round().astype(np.uint8), place, list(things), alphas)


def draw_instances(rng: np.random.Generator, pool: tuple[Instance, ...], count: int) -> list[Instance]:
    """Draws `count` random instances of `count` different categories."""
    chosen: list[Instance] = []
    while len(chosen) < count:
        candidate = pool[rng.integers(len(pool))]
        if all(candidate.category != other.category for other in chosen):
            chosen.append(candidate)
    return chosen


def sheet(pictures: list[np.ndarray], columns: int, zoom: int = 2, gap: int = 4) -> Image.Image:
    """Combines uint8 images of the same shape (height, width, 3) to one contact sheet."""
    height, width = pictures[0].shape[:2]
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * (width * zoom + gap) + gap, rows * (height * zoom + gap) + gap), "white")
    for index, picture in enumerate(pictures):
        image = Image.fromarray(picture).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        canvas.paste(image, (gap + column * (width * zoom + gap), gap + row * (height * zoom + gap)))
    return canvas
