"""Draw a picture for each row of a table with reference pictures, queries, prompts and seeds.

    accelerate launch examples/generate_batch.py --table rows.csv --output_dir drawn \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --ssr my-ssr

The table is CSV with a header, or JSON lines. The columns are `image`, `query`, `prompt`, `seed`, and optionally
`mask`, `scale` and `name` (the name of the picture to write). Paths of pictures are relative to the table. The rows
are divided among the processes of accelerate, and `--batch_size` rows are drawn together. Each row has its own random
generator, so its picture does not depend on the number of processes or, except for rounding errors, on the batch size.

`manifest.jsonl` contains for each row the file name of the picture, or the error message. Run the same command again
to draw only the rows that are not done. The exit status is 1 if a row failed.
"""

import argparse
import contextlib
import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from extras import needs

import torch
from command_line import HelpFormatter, naming, output_folder, picture_side, positive, run_script, share
from diffusers_ssr import StableDiffusionSSRPipeline, SubjectEmbeds
from diffusers_ssr.file_utils import atomic_file, check_regular_file
from diffusers_ssr.image_processing_ssr import open_image
from drawing import hide_library_output
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from text_files import read_rows
from tqdm.auto import tqdm


with needs("demo"):
    from accelerate import PartialState


REQUIRED = ("query", "prompt", "image")
KNOWN = (*REQUIRED, "seed", "mask", "scale", "name")
SOME_ROWS = 1000
MAX_NAME = 1024
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_table(table: Path) -> list[dict]:
    """
    Reads the rows of the table. The values of a row are only checked when the row is drawn.

    Raises:
        `ValueError`: if the file is missing, is not a table, or has a missing or an unknown column.
    """
    rows: list[dict] = []
    columns: set[str] = set()
    try:
        for number, row in read_rows(table, "table"):
            if isinstance(row, str):
                raise ValueError(
                    f"`table` has to be CSV or JSON lines, but line {number} of {table} cannot be read: {row}"
                )
            unknown = sorted(row.keys() - set(KNOWN))
            if unknown:
                raise ValueError(f"`table`: {table} has the columns {unknown!s:.300}, but only {KNOWN} are known.")
            rows.append(row)
            columns |= row.keys()
            # a column that no row has had until then is missing, and millions of short rows would fill the memory
            if len(rows) == SOME_ROWS and _missing(columns):
                break
    except FileNotFoundError as error:
        raise ValueError(f"`table`: there is no file {table}.") from error
    if not rows:
        raise ValueError(f"`table`: {table} has no rows.")
    missing = _missing(columns)
    if missing:
        raise ValueError(f"`table`: {table} lacks the columns {missing}; it has {sorted(columns)}.")
    return rows


def _missing(columns: set[str]) -> list[str]:
    """Returns the columns that a table lacks."""
    return sorted({"image", "prompt"} - columns) or ([] if columns & {"query", "mask"} else ["query"])


def check_names(rows: list[dict]) -> dict[int, ValueError]:
    """Returns an error for each row with an invalid or conflicting `name`. Only these rows will fail."""
    faults: dict[int, ValueError] = {}
    files: dict[str, int] = {}
    folders: dict[str, int] = {}
    for index, row in enumerate(rows):
        name = file_of(row, index)
        if len(name) > MAX_NAME:  # each folder of a path is compared with the other paths
            faults[index] = ValueError(f"`name` has {len(name):,} characters, more than {MAX_NAME:,}.")
            continue
        path = PurePosixPath(name)
        file, within = _as_on_disk(path), [_as_on_disk(parent) for parent in path.parents][:-1]
        taken = [files[name] for name in (file, *within) if name in files]
        taken += [folders[file]] if file in folders else []
        if path.is_absolute() or ".." in path.parts or not all(map(_is_file_name, path.parts)):
            faults[index] = ValueError(f"`name` is {row['name']!r:.80}, which cannot be a file in the output folder.")
        elif taken:
            faults[index] = ValueError(f"`name` is {row.get('name')!r:.80}, which conflicts with row {taken[0]}.")
        else:
            files[file] = index
            folders.update((name, index) for name in within if name not in folders)
    return faults


def _as_on_disk(path: PurePosixPath) -> str:
    """Returns the same text for paths that are one file on macOS or Windows, which ignore upper and lower case."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _is_file_name(name: str) -> bool:
    try:
        return "\0" not in name and len(name.encode()) < 256
    except UnicodeEncodeError:  # JSON can contain lone surrogates
        return False


def identity(row: dict, settings: dict) -> str:
    """Returns a hash of the row and the settings, which changes if any of them changes."""
    return hashlib.blake2b(json.dumps([row, settings], sort_keys=True).encode(), digest_size=8).hexdigest()


def read_manifests(folder: Path) -> dict[str, dict]:
    """Returns the entries of all manifest files by their `id`. The files can come from any number of processes.
    Incomplete lines are ignored."""
    entries: dict[str, dict] = {}
    for file in sorted(folder.glob("manifest*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_entry(entry) and entries.get(entry["id"], {}).get("status") != "done":
                entries[entry["id"]] = entry
    return entries


def _is_entry(entry) -> bool:
    """Returns whether a line of a manifest has the format that this script writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return False
    said = {"done": "file", "failed": "error"}.get(str(entry.get("status")))
    return said is not None and isinstance(entry.get(said), str)


def is_done(entry: dict | None, folder: Path) -> bool:
    """Returns whether the row was drawn and its picture still exists and belongs to this row."""
    if entry is None or entry["status"] != "done":
        return False
    try:
        check_regular_file(folder / entry["file"], "file")
        with Image.open(folder / entry["file"], formats=["PNG"]) as picture:
            return picture.text.get("id") == entry["id"]
    # a file that cannot be opened is not the picture of the row
    except Exception:
        return False


def file_of(row: dict, index: int) -> str:
    """Returns the path of the row's picture in the output folder."""
    name = row.get("name")
    return f"{f'{index:06d}' if name in (None, '') else name}.png"


@dataclass
class Request:
    """The checked values of a row, with the encoded subject."""

    prompt: str
    subject: SubjectEmbeds
    seed: int


def read_row(pipe: StableDiffusionSSRPipeline, row: dict, folder: Path, args: argparse.Namespace) -> Request:
    """
    Check a row and encode its subject.

    Args:
        pipe ([`StableDiffusionSSRPipeline`]): encodes the subject.
        row (`dict`): a row of the table.
        folder (`Path`): the folder that the paths in the row are relative to.
        args (`argparse.Namespace`): the options. `scale` is used for rows without a scale.

    Raises:
        `ValueError` or `OSError`: if a value is missing or invalid, or if a picture cannot be opened.
    """
    for name in ("image", "prompt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"`{name}` is missing in this row.")
    for name, wanted in (("query", "a text"), ("mask", "the path of a file")):
        if not isinstance(row.get(name), (str, type(None))):
            raise ValueError(f"`{name}` has to be {wanted}, but is {row[name]!r}.")
    scale, seed = _number(row, "scale", args.scale), _number(row, "seed", 0)
    if seed != int(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"`seed` has to be a whole number from 0 to 2**63 - 1, but is {row['seed']!r}.")
    mask = open_image(folder / row["mask"], "mask") if row.get("mask") else None
    subject = pipe.encode_subject(open_image(folder / row["image"], "image"), row.get("query") or None, mask)
    return Request(row["prompt"], subject.scaled(scale), int(seed))


def _number(row: dict, name: str, default: float) -> float:
    """Returns a number of a row. Only an empty cell is replaced with the default, because 0 is a valid scale."""
    value = default if row.get(name) in (None, "") else row[name]
    if isinstance(value, str):
        for convert in (int, float):  # a large seed is not exact as a float
            with contextlib.suppress(ValueError):
                value = convert(value)
                break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"`{name}` has to be a finite number, but is {row.get(name)!r}.")
    return value


def resolution(pipe: StableDiffusionSSRPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Returns the height and the width, each from the base model if it is `None`. The stock call would ignore the
    given one if the other is `None`."""
    size = pipe.unet.config.sample_size
    default_height, default_width = (
        side * pipe.vae_scale_factor for side in ((size, size) if isinstance(size, int) else size)
    )
    return default_height if height is None else height, default_width if width is None else width


def draw(pipe: StableDiffusionSSRPipeline, requests: list[Request], args: argparse.Namespace) -> list[Image.Image]:
    """Draws one picture for each request in a single pipeline call, with a separate generator for each request."""
    height, width = resolution(pipe, args.height, args.width)
    return pipe(
        [request.prompt for request in requests],
        negative_prompt=None if args.negative_prompt is None else [args.negative_prompt] * len(requests),
        subject=[request.subject for request in requests],
        height=height,
        width=width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
    ).images


def draw_each(
    pipe: StableDiffusionSSRPipeline, requests: list[Request], args: argparse.Namespace
) -> list[Image.Image | Exception]:
    """Returns a picture or an exception for each request. If the batch fails, the requests are drawn one by one, so
    that one request cannot make the others fail."""
    try:
        return draw(pipe, requests, args)
    except Exception as error:
        if len(requests) == 1:
            return [error]
    return [draw_each(pipe, [request], args)[0] for request in requests]


def draw_rows(
    pipe: StableDiffusionSSRPipeline, rows: list[dict | ValueError], folder: Path, args: argparse.Namespace
) -> list[Image.Image | Exception]:
    """Returns a picture or an exception for each row. A row that is an exception is returned as it is."""
    results: list[Image.Image | Exception | Request] = []
    for row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            results.append(read_row(pipe, row, folder, args))
        # an error in one row must not prevent the other rows from being drawn
        except Exception as error:
            results.append(error)
    requests = [each for each in results if isinstance(each, Request)]
    drawn = iter(draw_each(pipe, requests, args) if requests else [])
    return [next(drawn) if isinstance(each, Request) else each for each in results]


def save_picture(image: Image.Image, file: Path, name: str) -> None:
    """Writes the picture under a temporary name and renames it. The PNG metadata contains the row's id, `name`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    note = PngInfo()
    note.add_text("id", name)
    with atomic_file(file) as partial:
        image.save(partial, "png", pnginfo=note)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help=".csv or .jsonl")
    parser.add_argument("--output_dir", type=output_folder, required=True, help="where the pictures are written")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="the base model")
    parser.add_argument("--ssr", required=True, help="repository or folder with the SSR-Encoder")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, else fp32")
    parser.add_argument("--batch_size", type=positive, default=1, help="number of rows per batch")
    parser.add_argument("--scale", type=float, default=0.65, help="scale of rows without their own")
    parser.add_argument("--negative_prompt", help="negative prompt")
    parser.add_argument(
        "--height", type=picture_side, help="height in pixels, a multiple of 8; default: the base model's"
    )
    parser.add_argument(
        "--width", type=picture_side, help="width in pixels, a multiple of 8; default: the base model's"
    )
    parser.add_argument("--num_inference_steps", type=positive, default=30, help="denoising steps")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="scale of classifier-free guidance")
    parser.add_argument(
        "--eta", type=share, default=0.0, help="eta of DDIM: how much noise is added in each step, from 0 to 1"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws all rows. Returns the number of failed rows in the main process, and 0 in the other processes."""
    args = parse_args(arguments)
    rows = read_table(args.table)
    faults = check_names(rows)
    state = PartialState()
    not_asked = ("table", "output_dir", "batch_size")
    settings = {name: str(value) for name, value in vars(args).items() if name not in not_asked}
    ids = [f"{identity(row, settings)}-{index:06d}" for index, row in enumerate(rows)]
    known = read_manifests(args.output_dir)
    waiting = [index for index, name in enumerate(ids) if not is_done(known.get(name), args.output_dir)]
    # all processes have to read the manifests before any process writes
    state.wait_for_everyone()

    own = waiting[state.process_index :: state.num_processes]
    if own:
        hide_library_output()
        dtype = DTYPES[args.dtype or ("fp16" if state.device.type == "cuda" else "fp32")]
        with naming("--pretrained_model_name_or_path", args.pretrained_model_name_or_path):
            pipe = StableDiffusionSSRPipeline.from_pretrained(
                args.pretrained_model_name_or_path,
                dtype=dtype,
                safety_checker=None,
                requires_safety_checker=False,
                ssr_encoder=None,
                ssr_image_encoder=None,
            ).to(state.device)
        with naming("--ssr", args.ssr):
            pipe.load_ssr(args.ssr)
        pipe.set_progress_bar_config(disable=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(own), desc="pictures", disable=not state.is_local_main_process)
    with (args.output_dir / f"manifest.{state.process_index}.jsonl").open("a", encoding="utf-8") as manifest:
        # start on a new line, in case a previous run was interrupted while writing a line
        manifest.write("\n")
        for start in range(0, len(own), args.batch_size):
            batch = own[start : start + args.batch_size]
            results = draw_rows(pipe, [faults.get(index, rows[index]) for index in batch], args.table.parent, args)
            for index, result in zip(batch, results, strict=True):
                entry = {"id": ids[index], "row": index, **rows[index]}
                name = file_of(rows[index], index)
                try:
                    if isinstance(result, Exception):
                        raise result
                    save_picture(result, args.output_dir / name, ids[index])
                except Exception as error:
                    entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
                else:
                    entry |= {"status": "done", "file": name}
                manifest.write(json.dumps(entry) + "\n")
                manifest.flush()
                bar.update()
    bar.close()

    state.wait_for_everyone()
    failed = []
    if state.is_main_process:
        entries = read_manifests(args.output_dir)
        lines = [json.dumps({**entries[name], "row": index}) for index, name in enumerate(ids)]
        merged = args.output_dir / "manifest.jsonl"
        merged.with_suffix(".part").write_text("\n".join(lines) + "\n", encoding="utf-8")
        merged.with_suffix(".part").replace(merged)
        for file in args.output_dir.glob("manifest.*.jsonl"):
            if file.is_file():
                file.unlink()
        failed = [entries[name] for name in ids if entries[name]["status"] == "failed"]
        print(f"{len(rows) - len(failed)} of {len(rows)} pictures are in {args.output_dir}")
        for entry in failed:
            # error messages can contain characters that a terminal cannot show
            print(f"  row {entry['row']}: {entry['error']}".encode("utf-8", "backslashreplace").decode())
    state.destroy_process_group()
    return len(failed)


if __name__ == "__main__":
    run_script(lambda: main() > 0)
