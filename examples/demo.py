"""Draw each subject of a few reference pictures on its own, with the embedded pocket checkpoint.

Every reference holds two or three things, and none of these very things was seen in training. A contact sheet shows the
reference, each query and what was drawn for it.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parent.parent
ZOOM = 2
GAP = 12
LABEL = 22


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "pocket"), help="base model and SSR-Encoder")
    parser.add_argument("--references", type=Path, default=ROOT / "pocket" / "references", help="pictures and queries")
    parser.add_argument("--places", nargs="+", default=["in the snow", "on the beach"], help="where to draw them")
    parser.add_argument("--scale", type=float, default=1.0, help="how strongly the subject acts")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--eta", type=float, default=0.9, help="DDIM's noise: it corrects errors on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"))
    return parser.parse_args()


def write_contact_sheet(rows: list[list[tuple[str, Image.Image | None]]], file: Path) -> None:
    """Rows of labelled pictures, `None` leaving a place empty, into a file."""
    side = max(picture.width for row in rows for _, picture in row if picture) * ZOOM
    columns = max(len(row) for row in rows)
    cell_width, cell_height = side + GAP, side + LABEL + GAP
    sheet = Image.new("RGB", (columns * cell_width + GAP, len(rows) * cell_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for y, row in enumerate(rows):
        for x, (label, picture) in enumerate(row):
            if picture is None:
                continue
            left, top = GAP + x * cell_width, GAP + y * cell_height
            draw.text((left, top), label, fill="black", font=font)
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top + LABEL))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    print(f"The contact sheet is in {file}")


def main():
    args = parse_args()
    logging.set_verbosity_error()
    pipe = DiffusionPipeline.from_pretrained(
        args.checkpoint, custom_pipeline=str(ROOT), trust_remote_code=True, dtype=torch.float32
    )
    pipe.load_ssr(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)

    references = json.loads((args.references / "queries.json").read_text())
    bar = tqdm(total=sum(map(len, references.values())), desc="subjects")
    rows = []
    for name, queries in references.items():
        reference = Image.open(args.references / name)
        row = [("reference", reference)]
        for query in queries:
            subject = pipe.encode_subject(reference, query=query).scaled(args.scale)
            article = "an" if query[0] in "aeiou" else "a"
            images = pipe(
                [f"{article} {query} {place}" for place in args.places],
                subject=subject,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                eta=args.eta,
                generator=torch.Generator().manual_seed(args.seed),
            ).images
            places = [place.split()[-1] for place in args.places]
            row += [(f'"{query}", {place}', image) for place, image in zip(places, images, strict=True)]
            bar.update()
        rows.append(row)
    bar.close()
    write_contact_sheet(rows, args.output_dir / "demo.png")


if __name__ == "__main__":
    main()
