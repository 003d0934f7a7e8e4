"""Generate an image for each row of a table with reference images, queries, prompts and seeds.

    accelerate launch examples/generate_batch.py --table rows.csv --output_dir generated \\
        --checkpoint stable-diffusion-v1-5/stable-diffusion-v1-5 --ssr my-ssr

The table is CSV with a header, or JSON lines. The columns are `image`, `prompt`, `query` or `mask` (or both), and
optionally `negative_prompt`, `seed`, `scale` and `name` (the file to write). Paths are relative to the table. The rows
are divided among the processes. Each row has its own random generator, so its image does not depend on the number of
processes or, except for rounding errors, on the batch size. At the end, `manifest.jsonl` contains the file or the error
message of each row. Run the same command again to generate only the missing images.
"""

import argparse
import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from extras import needs

from command_line import image_side, make_parser, output_folder, positive, run_script, share
from drawing import DTYPES, MASK_WEIGHT, load_pipeline


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--table", type=Path, required=True, help=".csv or .jsonl")
    add("--output_dir", type=output_folder, required=True, help="where the images are written")
    add("--checkpoint", required=True, help="folder or repository with the base model or a complete SSR pipeline")
    add("--ssr", help="folder or repository with the SSR-Encoder, if the checkpoint has none")
    add("--dtype", choices=DTYPES, help="default: fp16 on a GPU, else fp32")
    add("--batch_size", type=positive, default=1, help="number of rows per batch")
    add("--scale", type=float, default=0.65, help="subject scale of rows without their own")
    add("--mask_weight", type=float, default=MASK_WEIGHT, help="how strongly the attention is restricted to the masks")
    add("--negative_prompt", default="", help="negative prompt of rows without their own")
    add("--height", type=image_side, help="height in pixels, a multiple of 8; default: the base model's")
    add("--width", type=image_side, help="width in pixels, a multiple of 8; default: the base model's")
    add("--num_inference_steps", type=positive, default=30, help="denoising steps")
    add("--guidance_scale", type=float, default=5.0, help="scale of classifier-free guidance")
    add("--eta", type=share, default=0.0, help="eta of DDIM: how much noise is added in each step, from 0 to 1")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the imports below, which take seconds

with needs("demo"):
    import torch
    from accelerate.utils import gather_object
    from diffusers_ssr import StableDiffusionSSRPipeline
    from diffusers_ssr.files_ssr import atomic_file
    from image_files import open_image
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from processes import own_share, start_processes
    from text_files import read_rows
    from tqdm.auto import tqdm


COLUMNS = ("image", "prompt", "query", "mask", "negative_prompt", "seed", "scale", "name")
UNRELATED = ("table", "output_dir", "batch_size")  # options that do not change the image of a row


def read_table(table: Path) -> list[dict]:
    """Reads the rows of the table. The values of a row are only checked when its image is generated."""
    rows = []
    for number, row in read_rows(table, "table"):
        where = f"`table`: {table}, line {number}"
        if isinstance(row, str):
            raise ValueError(f"{where}: {row}.")
        if unknown := sorted(row.keys() - set(COLUMNS)):
            raise ValueError(f"{where}: the columns {unknown!s:.300} are unknown; the known ones are {COLUMNS}.")
        required = {"image", "prompt", "mask" if "mask" in row else "query"}
        if missing := sorted(required - row.keys()):
            raise ValueError(f"{where}: the columns {missing} are missing; the row has {sorted(row)}.")
        rows.append(row)
    if not rows:
        raise ValueError(f"`table`: {table} has no rows.")
    return rows


def name_files(rows: list[dict]) -> list[str | ValueError]:
    """Returns the path of each row's image in the output folder, or an error for a path that is invalid or taken."""
    files: list[str | ValueError] = []
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        name = f"{index:06d}" if row.get("name") in (None, "") else str(row["name"])
        file = name if name.lower().endswith(".png") else f"{name}.png"
        # names that differ in upper and lower case are one file on macOS and Windows
        unique = unicodedata.normalize("NFC", file).casefold()
        fault = None if _is_inside(file) else ", which cannot be a file in the output folder"
        if fault is None and seen.setdefault(unique, index) != index:
            fault = f", as in row {seen[unique]}"
        files.append(file if fault is None else ValueError(f"`name` is {name!r:.80}{fault}."))
    return files


def _is_inside(file: str) -> bool:
    parts = file.split("/")
    # JSON can contain lone surrogates, which cannot be part of a file name
    encodable = not any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in file)
    return encodable and not {"", ".", ".."} & set(parts) and all(len(part.encode()) < 256 for part in parts)


def make_id(index: int, row: dict, settings: dict) -> str:
    """Returns the text that is stored in the image. It changes if the row or a setting changes."""
    return hashlib.blake2b(json.dumps([index, row, settings], sort_keys=True).encode(), digest_size=8).hexdigest()


def is_done(file: Path, row_id: str) -> bool:
    """Returns whether the image of the row exists."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return image.info.get("id") == row_id
    except Exception:  # no file, or another one
        return False


def read_row(pipe: StableDiffusionSSRPipeline, row: dict, args: argparse.Namespace) -> dict:
    """Checks a row, opens its images and encodes its subject. Returns arguments for the pipeline."""
    texts = {name: row.get(name) or None for name in ("image", "prompt", "query", "mask", "negative_prompt")}
    for name, text in texts.items():
        if text is None and name in ("image", "prompt"):
            raise ValueError(f"`{name}` is missing in this row.")
        if not isinstance(text, (str, type(None))):
            raise ValueError(f"`{name}` has to be a text, but is {text!r:.80}.")
    scale, seed = _number(row, "scale", args.scale), _number(row, "seed", 0)
    if seed != int(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"`seed` has to be a whole number from 0 to 2**63 - 1, but is {row['seed']!r:.80}.")
    image, mask = (texts[name] and open_image(args.table.parent / texts[name], name) for name in ("image", "mask"))
    return {
        "prompt": texts["prompt"],
        "negative_prompt": texts["negative_prompt"] or args.negative_prompt,
        "subject": pipe.encode_subject(image, texts["query"], mask, args.mask_weight if mask else 1.0).scaled(scale),
        "generator": torch.Generator().manual_seed(int(seed)),
    }


def _number(row: dict, name: str, default: float) -> float:
    value = default if row.get(name) in (None, "") else row[name]
    text = str(value).replace(",", ".") if name == "scale" else str(value)  # many spreadsheets write 0,8
    try:
        number = int(text) if text.strip().isdecimal() else float(text)  # a large seed is not exact as a float
    except ValueError:
        number = math.nan
    if not abs(number) < math.inf:
        raise ValueError(f"`{name}` has to be a finite number, but is {value!r:.80}.")
    return number


def resolution(pipe: StableDiffusionSSRPipeline, height: int | None, width: int | None) -> dict[str, int]:
    """Returns the height and width. The stock call would ignore one of them if the other is `None`."""
    size = pipe.unet.config.sample_size
    default = [side * pipe.vae_scale_factor for side in ((size, size) if isinstance(size, int) else size)]
    return {"height": height or default[0], "width": width or default[1]}


def generate(pipe: StableDiffusionSSRPipeline, requests: list[dict], args: argparse.Namespace) -> list[Image.Image]:
    """Generates an image for each result of `read_row`, in one call."""
    return pipe(
        **{name: [request[name] for request in requests] for name in requests[0]},
        **resolution(pipe, args.height, args.width),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
    ).images


def generate_rows(
    pipe: StableDiffusionSSRPipeline, rows: list[dict], args: argparse.Namespace
) -> list[Image.Image | Exception]:
    """Returns an image or an exception for each row. An error in one row does not affect the other rows."""
    results: list[dict | Exception] = []
    for row in rows:
        try:
            results.append(read_row(pipe, row, args))
        except Exception as error:
            results.append(error)
    try:
        requests = [result for result in results if isinstance(result, dict)]
        images = iter(generate(pipe, requests, args) if requests else [])
    except Exception as error:
        if len(rows) > 1:  # each row is generated alone
            return [result for row in rows for result in generate_rows(pipe, [row], args)]
        return [error]
    return [next(images) if isinstance(result, dict) else result for result in results]


def save_image(image: Image.Image | Exception, file: Path, row_id: str) -> None:
    if isinstance(image, Exception):
        raise image
    file.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text("id", row_id)
    with atomic_file(file) as partial:
        image.save(partial, "png", pnginfo=info)


def generate_table(rows: list[dict], args: argparse.Namespace) -> str | None:
    """Generates the images of all rows. Returns a message about the rows that failed, in the main process."""
    files = name_files(rows)
    state = start_processes()
    settings = {name: str(value) for name, value in vars(args).items() if name not in UNRELATED}
    ids = [make_id(index, row, settings) for index, row in enumerate(rows)]

    # each process only looks at its own rows, because the other processes are already writing
    own = own_share(state, [index for index, file in enumerate(files) if isinstance(file, str)], "rows")
    own = [index for index in own if not is_done(args.output_dir / files[index], ids[index])]
    if own:
        no_checker = {"safety_checker": None, "requires_safety_checker": False}
        dtype = args.dtype and getattr(torch, DTYPES[args.dtype])
        pipe = load_pipeline(args.checkpoint, args.ssr, device=state.device, dtype=dtype, **no_checker)
    failed = [(index, str(file)) for index, file in enumerate(files) if isinstance(file, ValueError)]
    with tqdm(total=len(own), desc="images", disable=not state.is_local_main_process) as bar:
        for start in range(0, len(own), args.batch_size):
            batch = own[start : start + args.batch_size]
            results = generate_rows(pipe, [rows[index] for index in batch], args)
            for index, result in zip(batch, results, strict=True):
                try:
                    save_image(result, args.output_dir / files[index], ids[index])
                except Exception as error:
                    failed.append((index, f"{type(error).__name__}: {error}"))
                bar.update()
    errors = dict(gather_object(failed))
    return finish(args.output_dir, rows, files, errors) if state.is_main_process else None


def finish(folder: Path, rows: list[dict], files: list, errors: dict[int, str]) -> str | None:
    """Writes the manifest and prints the number of images. Returns a message about the rows that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "manifest.jsonl") as partial, open(partial, "w", encoding="utf-8") as manifest:
        for index, row in enumerate(rows):
            result = {"status": "done", "file": files[index]}
            if index in errors:
                result = {"status": "failed", "error": errors[index]}
            manifest.write(json.dumps({"row": index, **row, **result}) + "\n")
    print(f"{len(rows) - len(errors)} of {len(rows)} images are in {folder}")
    return "\n".join(f"row {index}: {errors[index]}" for index in sorted(errors)) or None


def main(arguments: Sequence[str] | None = None) -> str | None:
    args = parse_args(arguments)
    return generate_table(read_table(args.table), args)


if __name__ == "__main__":
    run_script(main)
