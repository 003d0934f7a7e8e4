"""Compares SSR-Encoder with an adapter in the style of IP-Adapter Plus and with its ablations, on the base model of the
checkpoint. All methods were trained with the same data and steps, so the SSR-Encoder is not that of the checkpoint."""

from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers_ssr import SSREncoder
from PIL import Image

from ..methods import COMPARISON, METHODS, write_contact_sheet
from ..world import Scene
from .references import References, draw, share


FIGURE_COLUMNS = 8
WITHOUT = "without a reference"


def load_adapter(name: str, folder: Path = COMPARISON) -> SSREncoder:
    """Loads the encoder of a method."""
    return METHODS[name].encoder_class.from_pretrained(folder / name, dtype=torch.float32).eval()


def comparison(refs: References) -> None:
    """Measures every method in `--comparison_dir` with the same references, prompts and seeds, and writes a figure with a
    row for each."""
    pipe = refs.pipe
    own, vision, processor = pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor
    folder = refs.args.comparison_dir
    methods = [name for name in METHODS if (folder / name).is_dir()]
    queried, other = refs.wanted("category"), refs.wanted("category", 1)
    rows = {}
    for naming, categories in (("a thing", None), ("its category", queried)):
        for name in (*methods, None):
            label = METHODS[name].label if name else WITHOUT
            if name:
                encoder = load_adapter(name, folder).to(refs.args.device)
                pipe.load_ssr(encoder, image_encoder=vision, image_processor=processor)
            subjects = refs.encode(0) if name else None
            pictures = draw(pipe, refs.args, refs.prompts(categories), subjects, f"{naming}, {label}")
            rows.setdefault(label, pictures)
            verdict = refs.judge.look_at(pictures)
            scores = verdict.categories.numpy()
            print(f"{label}, the prompt names {naming} ({len(pictures)} images):")
            refs.report_instances(verdict)
            print(f"  the wrong subject is there:            {share(scores[refs.rows, other] > 0)}")
            print(f"  the place asked for:                   {share(verdict.places.argmax(1).numpy() == refs.places)}")
            if name and categories is None:
                missing, subjects = refs.encode_absent()
                pictures = draw(pipe, refs.args, refs.prompts(None), subjects, f"absent, {label}")
                drawn = refs.judge.look_at(pictures).categories.argmax(1).numpy() == missing
                print(f"  a queried third thing is generated:    {share(drawn)}")
    pipe.load_ssr(own, image_encoder=vision, image_processor=processor)
    save_figure(refs, rows)


def cutouts(refs: References) -> None:
    """Measures SSR-Encoder with a query, and the adapter in the style of IP-Adapter Plus with a reference that only shows
    the queried thing, in three ways. These need masks."""
    pipe = refs.pipe
    own, vision, processor = pipe.ssr_encoder, pipe.ssr_image_encoder, pipe.ssr_image_processor
    for name, how, picture_of in (
        ("ssr", "with a query", lambda scene: scene.picture),
        ("ip_adapter_plus", "the other thing erased", _erase_other),
        ("ip_adapter_plus", "erased, and the queried thing enlarged", _enlarged),
        ("ip_adapter_plus", "the queried thing on white", _on_white),
    ):
        encoder = load_adapter(name, refs.args.comparison_dir).to(refs.args.device)
        pipe.load_ssr(encoder, image_encoder=vision, image_processor=processor)
        subjects = [pipe.encode_subject(picture_of(each), query=each.instances[0].name) for each in refs.scenes]
        verdict = refs.judge.look_at(draw(pipe, refs.args, refs.prompts(None), subjects, how))
        print(f'{METHODS[name].label}, {how}, the prompt names "a thing" ({len(refs.rows)} images):')
        refs.report_instances(verdict)
    pipe.load_ssr(own, image_encoder=vision, image_processor=processor)


def _erase_other(scene: Scene) -> np.ndarray:
    """Returns the reference without the other thing, whose place OpenCV fills."""
    queried, other = (mask.astype(np.uint8) for mask in scene.masks)
    return cv2.inpaint(scene.picture, cv2.dilate(other, np.ones((3, 3))) * (1 - queried), 3, cv2.INPAINT_TELEA)


def _enlarged(scene: Scene) -> np.ndarray:
    """Returns a square around the queried thing, without the other thing, in the size of the reference."""
    top, left = (axis.min() for axis in scene.masks[0].nonzero())
    bottom, right = (axis.max() + 1 for axis in scene.masks[0].nonzero())
    side = max(bottom - top, right - left) + 8
    start = [int(np.clip((a + b - side) // 2, 0, 64 - side)) for a, b in ((top, bottom), (left, right))]
    part = _erase_other(scene)[start[0] : start[0] + side, start[1] : start[1] + side]
    return cv2.resize(part, scene.picture.shape[:2], interpolation=cv2.INTER_CUBIC)


def _on_white(scene: Scene) -> np.ndarray:
    return np.where(scene.masks[0][..., None], scene.picture, 255).astype(np.uint8)


def save_figure(refs: References, rows: dict[str, np.ndarray]) -> None:
    """Saves a figure of references with their queries, and a row of images for each method."""
    some = range(min(FIGURE_COLUMNS, len(refs.scenes)))
    table = [[(f'"{refs.scenes[i].instances[0].name}"', Image.fromarray(refs.scenes[i].picture)) for i in some]]
    for label, pictures in rows.items():
        table.append([(label if i == 0 else "", Image.fromarray(pictures[i])) for i in some])
    write_contact_sheet(table, refs.args.output_dir / "comparison.png")
