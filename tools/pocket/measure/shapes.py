"""Measures without any network whether images show the right thing: the nearest of 16 things by pixels, and the error of
the denoiser by kind of thing."""

import itertools

import numpy as np
import torch

from ..base import encode_texts
from ..training import picture_array, picture_tensor
from ..world import (
    ALL_DESIGNS,
    LAYOUTS,
    NUM_VARIANTS,
    PLACE_NAMES,
    Instance,
    Other,
    World,
    _scale,
    describe,
    draw_scene,
)
from .references import NUM_CANDIDATES, References, draw, share


Thing = Instance | Other
TIMESTEP = 300
# the sides of the things relative to the layout, and their offsets in pixels, that are compared with an image
SIDES = (36, 40, 44)
OFFSETS = tuple(itertools.product((-4, -2, 0, 2, 4), repeat=2))


def distances(world: World, image: np.ndarray, things: list[Thing]) -> np.ndarray:
    """Returns the distance between a uint8 `image` of one thing, of shape (64, 64, 3), and each of the things in the
    layout of one thing. The thing is pasted on the background, which is the median color of each row beside it. The
    nearest of several sizes, offsets and mirror images counts, and the distance is the mean squared difference in the
    middle of the image."""
    image = image.astype(np.float32) / 255
    side, (left,), top = LAYOUTS[1]
    row = np.median(np.concatenate([image[:, : left - 2], image[:, left + side + 2 :]], 1), axis=1, keepdims=True)
    # the whole square that a shifted or larger thing can cover
    margin = (max(SIDES) - side) // 2 + 4
    window = slice(top - margin, top + side + margin), slice(left - margin, left + side + margin)
    image, back = image[window], np.broadcast_to(row, image.shape)[window]
    empty, found = (image - back) ** 2, []
    for thing in things:
        errors, sprite = [], world.sprite(thing)
        for size in SIDES:
            drawn = _scale(sprite, size)
            for flip in (drawn, drawn[:, ::-1]):
                colour, keep = flip[..., :3], 1 - flip[..., 3:]
                for down, right in OFFSETS:
                    start = margin + (side - size) // 2
                    part = slice(start + down, start + down + size), slice(start + right, start + right + size)
                    errors.append(((image[part] - back[part] * keep - colour) ** 2).sum() - empty[part].sum())
        found.append(min(errors) + empty.sum())
    return np.array(found) / image.size


def nearest_by_pixels(world: World, images: np.ndarray, candidates: list[list[Thing]]) -> np.ndarray:
    """Returns for each image whether the first of its candidates is the nearest one."""
    return np.array(
        [distances(world, image, some).argmin() == 0 for image, some in zip(images, candidates, strict=True)]
    )


def kinds(refs: References) -> dict[str, list[Thing]]:
    """Returns the things of each kind. All have a hue, because the sixteen things are compared in the same hue."""
    known = {(each.category, each.design) for each in refs.seen}
    held_out = [each for each in refs.held_out if each.hue is not None]
    others = [Other(name, code, design, 0.0) for code, name in refs.world.others.items() for design in range(3)]
    return {
        "seen": [each for each in refs.seen if each.hue is not None],
        "held-out colours": [each for each in held_out if (each.category, each.design) in known],
        "held-out designs": [each for each in held_out if (each.category, each.design) not in known],
        "others": others,
    }


def in_hue(thing: Thing, hue: float) -> Other:
    """Returns the thing in a hue."""
    return Other(thing.name, thing.code, thing.design, hue)


def choose(refs: References, pool: list[Thing], others: list[Thing], count: int) -> list[list[Thing]]:
    """Draws things, each followed by 15 things of other names in the same hue and in designs of their own."""
    rng = np.random.default_rng(refs.args.seed)
    chosen = []
    for _ in range(count):
        own = pool[rng.integers(len(pool))]
        if isinstance(own, Other):
            own = in_hue(own, int(rng.integers(NUM_VARIANTS)) / NUM_VARIANTS)
        some: list[Thing] = [own]
        while len(some) < NUM_CANDIDATES:
            other = in_hue(others[rng.integers(len(others))], own.hue)
            if other.name not in {each.name for each in some}:
                some.append(other)
        chosen.append(some)
    return chosen


@torch.no_grad()
def denoising_errors(refs: References, scenes: list, batch_size: int = 50) -> np.ndarray:
    """Returns for each scene the squared error of the latents that the UNet predicts without a caption at `TIMESTEP`, in
    the cells that the thing covers, as a share of the variance of each channel in these cells."""
    pipe, device = refs.pipe, refs.args.device
    (empty,) = encode_texts(pipe.tokenizer, pipe.text_encoder, [""])
    errors, variances = [], []
    generator = torch.Generator().manual_seed(refs.args.seed)
    for start in range(0, len(scenes), batch_size):
        some = scenes[start : start + batch_size]
        pixels = picture_tensor(np.stack([scene.picture for scene in some])).to(device)
        clean = pipe.vae.encode(pixels).latent_dist.mode()
        covered = np.stack([scene.masks[0].reshape(8, 8, 8, 8).mean((1, 3)) for scene in some])
        cover = torch.from_numpy(covered).float()[:, None].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        steps = torch.full((len(clean),), TIMESTEP, device=device)
        noisy = pipe.scheduler.add_noise(clean, noise, steps)
        predicted = pipe.unet(noisy, steps, empty.expand(len(clean), -1, -1)).sample
        alpha = pipe.scheduler.alphas_cumprod[TIMESTEP].to(device)
        error = (alpha.sqrt() * noisy - (1 - alpha).sqrt() * predicted - clean).square()
        middle = (clean * cover).sum((0, 2, 3), keepdim=True) / cover.sum()
        errors.append((error * cover).sum((2, 3)).cpu())
        variances.append(((clean - middle).square() * cover).sum((2, 3)).cpu())
    return (torch.cat(errors) / torch.cat(variances).mean(0)).mean(1).numpy()


def shapes(refs: References) -> None:
    """Measures by pixels which of 16 different things of one hue an image shows, for each kind of thing: the image
    itself, the round trip of the autoencoder, the base model in full words and, if there is one, the SSR-Encoder with the
    thing beside another one. Then the error of the denoiser.

    Raises:
        `SystemExit`: if fewer of the others in full words are right than `--at_least` percent, so that nothing is trained
            on a base model that cannot generate what it was trained on.
    """
    rates = {}
    for kind, pool in kinds(refs).items():
        if not pool:
            continue
        rng = np.random.default_rng(refs.args.seed)
        chosen = choose(refs, pool, kinds(refs)["others"], len(refs.rows))
        things = [some[0] for some in chosen]
        designs = np.array([f"{each.name} {ALL_DESIGNS[each.design]}" for each in things])
        scenes = [draw_scene(refs.world, rng, [each], place) for each, place in zip(things, refs.places, strict=True)]
        originals = np.stack([scene.picture for scene in scenes])
        with torch.no_grad():
            pixels = picture_tensor(originals).to(refs.args.device)
            decoded = refs.pipe.vae.decode(refs.pipe.vae.encode(pixels).latent_dist.mode()).sample
        prompts = [describe([each.words], PLACE_NAMES[p]) for each, p in zip(things, refs.places, strict=True)]
        images = {
            "the scene itself": originals,
            "round trip of the autoencoder": picture_array(decoded),
            "the base in full words": draw(refs.pipe, refs.args, prompts, None, f"full words, {kind}"),
        }
        if getattr(refs.pipe, "ssr_encoder", None) is not None:
            subjects = [
                refs.pipe.encode_subject(draw_scene(refs.world, rng, some[:2]).picture, query=some[0].name)
                for some in chosen
            ]
            images["SSR, one of two by name"] = draw(
                refs.pipe, refs.args, refs.prompts(None), subjects, f"SSR, {kind}"
            )
        print(f"nearest of {NUM_CANDIDATES} things of the same hue by pixels, {kind} ({len(things)} images):")
        for how, shown in images.items():
            hits = nearest_by_pixels(refs.world, shown, chosen)
            rates[kind, how] = hits.mean()
            print(f"  {f'{how}:':32} {share(hits, designs)}")
        error = denoising_errors(refs, scenes)
        half = 1.96 * error.std() / len(error) ** 0.5
        print(
            f"  denoising error, share of variance: {error.mean():.2f} ({error.mean() - half:.2f} to {error.mean() + half:.2f})"
        )
    if 100 * rates["others", "the base in full words"] < refs.args.at_least:
        raise SystemExit(
            f"The base model generates fewer than {refs.args.at_least:g} % of the others. Train it further."
        )
