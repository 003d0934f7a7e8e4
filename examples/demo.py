"""Generate images of each subject of a few reference images with the pocket checkpoint.

Every reference shows two or three things, which are not in the training data in this design and colour. A contact
sheet shows the references, the queries and the images that were generated for them. More rows show subjects of two
references in one image, subjects that were selected with a mask, and the first subjects with another checkpoint,
with a ControlNet, and in a video. The video is also saved as a GIF.

    python examples/demo.py
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from extras import is_installed

from command_line import run_script
from drawing import MASK_WEIGHT, POCKET, call_arguments, load_pipeline, named, options, write_contact_sheet
from PIL import Image


def parse_args() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument(
        "--references", type=Path, default=POCKET / "references", help="reference images and queries.json"
    )
    parser.add_argument("--places", nargs="+", default=["in the snow", "on the beach"], help="places in the prompts")
    args = parser.parse_args()
    if not (args.references / "queries.json").is_file():
        parser.error(f"--references: {args.references} holds no queries.json, which lists the queries of each image.")
    if not all(place.strip() for place in args.places):
        parser.error(f"--places: a place has to be a text, but got {args.places}.")
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the imports below, which take seconds

import numpy as np
from diffusers import ControlNetModel, DiffusionPipeline, MotionAdapter, UNet2DConditionModel
from diffusers.utils import export_to_gif
from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline
from references import read_queries
from tqdm.auto import tqdm


Row = list[tuple[str, Image.Image | None]]


def generate_subjects(pipe: DiffusionPipeline, args: argparse.Namespace, bar: tqdm) -> Iterator[Row]:
    """Yields a row for each reference, with an image of each of its subjects in each place."""
    for name, queries in args.queries.items():
        reference = Image.open(args.references / name)
        row = [("reference", reference)]
        for query in queries:
            subject = pipe.encode_subject(reference, query=query).scaled(args.scale)
            prompts = [f"{named(query)} {place}" for place in args.places]
            images = pipe(prompts, subject=subject, **call_arguments(args)).images
            places = [place.split()[-1] for place in args.places]
            row += [(f'"{query}", {place}', image) for place, image in zip(places, images, strict=True)]
            bar.update()
        yield row


def first_subjects(pipe: DiffusionPipeline, args: argparse.Namespace, count: int) -> list[tuple]:
    """Returns the reference image, the first query and the encoded subject for each of the first references."""
    found = []
    for name, (query, *_) in list(args.queries.items())[:count]:
        reference = Image.open(args.references / name)
        found.append((reference, query, pipe.encode_subject(reference, query=query).scaled(args.scale)))
    return found


def generate_together(pipe: DiffusionPipeline, args: argparse.Namespace) -> Row:
    """Generates the first subjects of two references in one image, each in its half (see docs/several.md)."""
    row = []
    subjects = first_subjects(pipe, args, len(args.queries))
    for (first, one, left), (second, other, right) in zip(subjects[::2], subjects[1::2], strict=False):
        half = np.zeros((64, 64))
        half[:, :32] = 1
        subject = left.inside(half) + right.inside(1 - half)
        prompt = f"{named(one)} and {named(other)} {args.places[-1]}"
        image = pipe(prompt, subject=subject, **call_arguments(args)).images[0]
        row += [(f'"{one}"', first), (f'"{other}"', second), ("together", image)]
    return row


def generate_masked(pipe: DiffusionPipeline, args: argparse.Namespace) -> Row:
    """Generates subjects that a mask selects in the reference, without a query."""
    row = []
    for file in sorted((Path(args.checkpoint) / "masks").glob("*.png")):
        if not (args.references / file.name).exists():
            continue  # the masks belong to the references of the checkpoint
        reference, mask = Image.open(args.references / file.name), Image.open(file)
        subject = pipe.encode_subject(reference, mask=mask, mask_weight=MASK_WEIGHT).scaled(args.scale)
        image = pipe(f"a thing {args.places[-1]}", subject=subject, **call_arguments(args)).images[0]
        row += [("reference", reference), ("mask", mask.convert("RGB")), ("by mask", image)]
    return row


def generate_look(pipe: DiffusionPipeline, args: argparse.Namespace) -> Row:
    """Generates the first subjects with another UNet, which has the same architecture and another style."""
    unet = UNet2DConditionModel.from_pretrained(args.checkpoint, subfolder="unet", dtype=pipe.unet.dtype)
    pipe = type(pipe).from_pipe(pipe, unet=unet.to(pipe.device))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(f"{args.checkpoint}/look")
    pipe.fuse_lora()
    row = []
    for reference, query, subject in first_subjects(pipe, args, 3):
        image = pipe(f"{named(query)} {args.places[-1]}", subject=subject, **call_arguments(args)).images[0]
        row += [("reference", reference), (f'"{query}", other look', image)]
    return row


def generate_along_edges(pipe: DiffusionPipeline, args: argparse.Namespace) -> Row:
    """Generates the first subjects along the edges of another image with a ControlNet."""
    controlnet = ControlNetModel.from_pretrained(args.checkpoint, subfolder="controlnet", dtype=pipe.unet.dtype)
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet.to(pipe.device))
    pipe.set_progress_bar_config(disable=True)
    row = []
    for reference, query, subject in first_subjects(pipe, args, 2):
        file = Path(args.checkpoint) / "controls" / f"{query}.png"
        if not file.exists():
            continue
        edges = Image.open(file)
        prompt = f"{named(query)} {args.places[-1]}"
        image = pipe(prompt, image=edges, subject=subject, **call_arguments(args)).images[0]
        row += [("reference", reference), ("edges", edges), (f'"{query}" along them', image)]
    return row


def generate_video(pipe: DiffusionPipeline, args: argparse.Namespace) -> Row:
    """Generates a video of the first subject. Some frames are shown on the sheet, and all frames are saved as a GIF."""
    adapter = MotionAdapter.from_pretrained(args.checkpoint, subfolder="motion_adapter", dtype=pipe.unet.dtype)
    # `from_pipe` creates a new UNet with motion modules on the CPU
    pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter).to(pipe.device)
    pipe.set_progress_bar_config(disable=True)
    ((reference, query, subject),) = first_subjects(pipe, args, 1)
    frames = pipe(
        f"{named(query)} {args.places[0]}", subject=subject, num_frames=8, **call_arguments(args)
    ).frames[0]  # fmt: skip
    args.output_dir.mkdir(parents=True, exist_ok=True)
    larger = [frame.resize((256, 256), Image.Resampling.BICUBIC) for frame in frames]
    export_to_gif(larger, str(args.output_dir / "demo.gif"), fps=8)
    return [("reference", reference), *((f"frame {i + 1} of 8", frames[i]) for i in range(0, 8, 2))]


# The part of the checkpoint that each additional row needs, because other checkpoints may not contain all parts
CHAINS = {
    "unet": generate_together, "masks": generate_masked, "look": generate_look, "controlnet": generate_along_edges,
    "motion_adapter": generate_video,
}  # fmt: skip


def main():
    args = parse_args()
    args.queries = read_queries(args.references)
    pipe = load_pipeline(args.checkpoint)
    chains = {part: draw for part, draw in CHAINS.items() if (Path(args.checkpoint) / part).is_dir()}
    if "look" in chains and not is_installed("peft"):
        print('The row with another look is skipped, because it needs peft. To install it: pip install -e ".[demo]"')
        del chains["look"]
    sheet = args.output_dir / "demo.png"
    print(f"The images appear in {sheet}, one row for each reference.")
    rows = []
    with tqdm(total=sum(map(len, args.queries.values())), desc="subjects") as bar:
        # the sheet is written after each reference, so that the first images can be viewed early
        for row in generate_subjects(pipe, args, bar):
            rows.append(row)
            write_contact_sheet(rows, sheet, finished=False)
    rows += [row for draw in tqdm(chains.values(), desc="more rows") if (row := draw(pipe, args))]
    write_contact_sheet(rows, sheet)


if __name__ == "__main__":
    run_script(main)
