"""Prepare a training set: caption images, choose queries, filter images, and write Parquet files.

    accelerate launch examples/prepare_dataset.py --source photos --output_dir shards \\
        --caption_model Salesforce/blip-image-captioning-large

`--source` is a folder of images, or a folder that train_ssr.py accepts. The caption of `photo.jpg` is the text in
`photo.txt` if it exists, and with `--query_from file`, the query is the text in `photo.query.txt`. An interrupted run
continues with the next shard. The processes of accelerate divide the shards. train_ssr.py reads `--train_data_dir shards`.
"""

import argparse
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from extras import needs

from command_line import check_companions, make_parser, naming, output_folder, positive, run_script


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--source", type=Path, help="a folder")
    add("--dataset_name", help="a dataset of the Hub, instead of --source")
    add("--dataset_config_name", help="configuration of the Hub's dataset")
    add("--streaming", action="store_true", help="stream the dataset instead of downloading it first")
    add("--output_dir", type=output_folder, required=True, help="output folder for the shards")
    add("--shard_size", type=positive, default=1000, help="number of rows of the source per shard")
    add("--image_column", default="image", help="the image")
    add("--caption_column", default="text", help="column with captions; empty cells are captioned")
    add("--query_column", default="query", help="column with queries, for `--query_from column`")
    add("--query_from", choices=("caption", "column", "file"), default="caption", help="source of the query")
    add("--caption_model", help="model for images without a caption, such as Salesforce/blip-image-captioning-large")
    add("--batch_size", type=positive, default=16, help="number of images that are captioned together")
    add("--min_image_size", type=positive, default=512, help="images with a shorter side are skipped")
    add("--max_image_size", type=positive, help="length of the shorter side; larger images are resized to it")
    add("--max_aspect_ratio", type=float, default=2.0, help="maximum aspect ratio; longer images are skipped")
    add("--jpeg_quality", type=positive, default=95, help="JPEG quality of the images in the shards")
    args = parser.parse_args(arguments)
    check_companions(parser, args, {"dataset_name": ("dataset_config_name", "streaming")})
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the imports below, which take seconds
with needs("train"):
    import datasets
    import torch
    import training_data
    from image_files import SUFFIXES
    from PIL import Image
    from processes import start_processes
    from text_files import is_blank, text_of
    from tqdm.auto import tqdm
    from transformers import AutoModelForImageTextToText, AutoProcessor


TEXT = datasets.Value("string")
FEATURES = datasets.Features({"__key__": TEXT, "image": datasets.Image(), "text": TEXT, "query": TEXT})
OPENINGS = re.compile(
    r"^((there (is|are)|this is|(an?|the)? ?(close ?up|photo|photograph|picture|image|view|painting|drawing|shot|portrait)s? of)\s+)*"
)
ARTICLES = {"a", "an", "the", "one", "two", "three", "four", "some", "several", "many", "his", "her", "their", "its"}
# words that begin a place, an action or another thing
ENDINGS = set(
    "about above across after against along among and are around as at before behind below beneath beside between by"
    " down during for from has have having in inside into is laid lays lies near next of off on onto or out outside over"
    " past sits sat stands that through to toward towards under up upon was wearing were which while who with without".split()
)
NOUNS_IN_ING = {"building", "painting", "drawing", "ceiling", "king", "ring", "wing", "string", "thing", "pudding",
                "earring", "sling", "spring", "clothing", "wedding", "lightning"}  # fmt: skip


def query_from_caption(caption: str) -> str:
    """Returns the first thing that an English caption names: "brown dog" for "a brown dog sitting on a couch". These are
    the words after the first article, up to the first word that begins a place or an action."""
    text = OPENINGS.sub("", caption.lower())
    found = []
    for word in re.findall(r"[\w'-]+|[.,;:!?]", text):
        ended = word in ENDINGS or not word[0].isalnum()
        doing = bool(found) and word.endswith("ing") and word not in NOUNS_IN_ING
        if found and (ended or doing or word in ARTICLES):
            break
        if not ended and word not in ARTICLES:
            found.append(word)
    if not found:
        raise ValueError(f"no thing found in the caption {caption!r}")
    return " ".join(found)


def load_captioner(name_or_path: str, device: torch.device) -> Callable[[list[Image.Image]], list[str]]:
    """Loads an image-to-text model such as BLIP. Returns a function that captions images."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(name_or_path)

    @torch.no_grad()
    def captioner(images: list[Image.Image]) -> list[str]:
        pixels = processor(images=images, return_tensors="pt").pixel_values.to(device, dtype)
        tokens = model.generate(pixel_values=pixels, max_new_tokens=40)
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    return captioner


def read_source(args: argparse.Namespace) -> tuple[Iterable[dict], dict[str, str]]:
    """Returns the rows to prepare, and a dict with the names and reasons of the files that are left out."""
    if (args.source is None) == (args.dataset_name is None):
        raise ValueError(f"Pass either `source` or `dataset_name`: got {args.source} and {args.dataset_name!r}.")
    if args.source and not args.source.is_dir():
        raise ValueError(f"`source`: there is no folder {args.source}.")
    columns = training_data.Columns(args.image_column, args.caption_column, args.query_column)
    files = sorted(file for file in args.source.rglob("*") if file.is_file()) if args.source else []
    known = any(file.suffix in (".tar", ".parquet") or file.name in training_data.METADATA_FILES for file in files)
    if args.dataset_name is not None or known:
        options = (args.dataset_name, args.dataset_config_name, args.streaming or known, columns)
        return training_data.load_rows(args.source, *options), {}
    names = {file: str(file.relative_to(args.source)) for file in files}
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        raise ValueError(f"`source`: the folder {args.source} holds no images.")
    texts = {file.with_suffix(suffix) for file in images for suffix in (".txt", ".query.txt")}
    others = [names[file] for file in files if file not in {*images, *texts}]
    rows = [{"__key__": names[file], args.image_column: training_data.FilePath(file)} for file in images]
    return rows, dict.fromkeys(others, "neither an image file, by its suffix, nor the text of one")


def chunks(rows: Iterable, size: int) -> Iterator[list[tuple]]:
    """Yields the rows with default names, in chunks."""
    named = ((row, f"row {number}") for number, row in enumerate(rows))
    yield from iter(lambda: list(islice(named, size)), [])


def sidecar(cell, suffix: str) -> str | None:
    """Returns the text in the file with the name of the image and this suffix, or `None` without such a text."""
    file = Path(cell).with_suffix(suffix) if isinstance(cell, training_data.FilePath) else None
    return text_of(file.read_bytes(), file.name) if file and file.is_file() and file.stat().st_size else None


def open_sample(row: dict, args: argparse.Namespace) -> dict:
    """Returns the row with its image, and with its caption if it has one. Raises a `ValueError` for an unusable row."""
    if row.get(training_data.ERROR_COLUMN):
        raise ValueError(row[training_data.ERROR_COLUMN])
    cell, text = row.get(args.image_column), row.get(args.caption_column)
    image = training_data.open_rgb(cell, args.image_column, args.min_image_size)
    if max(image.size) > args.max_aspect_ratio * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are more than {args.max_aspect_ratio} to 1")
    if args.max_image_size is not None and min(image.size) > args.max_image_size:
        ratio = args.max_image_size / min(image.size)
        image = image.resize([round(side * ratio) for side in image.size], Image.Resampling.LANCZOS)
    text = sidecar(cell, ".txt") or (None if is_blank(text) else text)
    return {**row, "image": image, "text": text, "cell": cell}


def finish_sample(sample: dict, args: argparse.Namespace) -> dict:
    """Returns the columns to write. Raises a `ValueError` if something is missing."""
    if sample["text"] is None:
        raise ValueError("there is no caption, and no `caption_model` to write one")
    text = text_of(sample["text"], args.caption_column)
    query = query_from_caption(text) if args.query_from == "caption" else sample.get(args.query_column)
    query = sidecar(sample["cell"], ".query.txt") if args.query_from == "file" else query
    buffer = io.BytesIO()
    sample["image"].save(buffer, "jpeg", quality=args.jpeg_quality, subsampling=0)
    query = text_of(query, f"the query in the {args.query_from}")
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "text": text, "query": query}


def prepare(chunk: list, args: argparse.Namespace, captioner) -> tuple[list[dict], dict[str, str]]:
    """Returns the rows to write, and a dict with the names and reasons of the other rows."""
    kept, bad = [], {}

    def attempt(name: str, function: Callable[..., dict], *arguments) -> list[tuple[str, dict]]:
        try:
            return [(name, function(*arguments, args))]
        except ValueError as error:
            bad[name] = str(error)
            return []

    for start in range(0, len(chunk), args.batch_size):
        rows = [training_data.read_row(row, name) for row, name in chunk[start : start + args.batch_size]]
        samples = [sample for name, row in rows for sample in attempt(name, open_sample, row)]
        without = [sample for _, sample in samples if sample["text"] is None]
        captions = captioner([sample["image"] for sample in without]) if captioner and without else []
        for sample, text in zip(without, captions, strict=False):
            sample["text"] = text
        finished = [row for name, sample in samples for row in attempt(name, finish_sample, sample)]
        kept += [{"__key__": name, **row} for name, row in finished]
    return kept, bad


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name, and renames it when it is complete."""
    write(file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def write_json(file: Path, content: dict) -> None:
    write_whole(file, lambda partial_file: partial_file.write_text(json.dumps(content, indent=1) + "\n"))


def check_settings(args: argparse.Namespace, state) -> None:
    """Creates the output folder. Raises a `ValueError` if it holds a run with other options."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("output_dir", "batch_size")}
    file = args.output_dir / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise ValueError(f"`output_dir`: {file} is of a run with other options: use another folder, or delete it.")
    state.wait_for_everyone()
    (args.output_dir / "reports").mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        write_json(file, settings)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Prepares the training set. Returns the number of samples in the main process, and `None` in other processes."""
    args = parse_args(arguments)
    state = start_processes()
    rows, bad = read_source(args)
    captioner = kept = None
    if args.caption_model is not None:
        with naming("--caption_model", args.caption_model):
            captioner = load_captioner(args.caption_model, state.device)
    check_settings(args, state)  # after the model was loaded, because it writes to the output folder
    shards = tqdm(chunks(rows, args.shard_size), desc="shards", disable=not state.is_local_main_process)
    for number, chunk in enumerate(shards):
        report = args.output_dir / "reports" / f"{number:06d}.json"
        if not report.exists() and number % state.num_processes == state.process_index:
            samples, left_out = prepare(chunk, args, captioner)
            if samples:
                table = datasets.Dataset.from_list(samples, FEATURES)
                write_whole(args.output_dir / f"{number:06d}.parquet", table.to_parquet)
            write_json(report, {"kept": len(samples), "bad": left_out})  # marks the shard as done

    state.wait_for_everyone()
    if state.is_main_process:
        reports = [json.loads(file.read_text()) for file in sorted(args.output_dir.glob("reports/*.json"))]
        bad |= {name: reason for report in reports for name, reason in report["bad"].items()}
        write_json(args.output_dir / "bad_samples.json", bad)
        kept = sum(report["kept"] for report in reports)
        print(f"{kept} samples are in {args.output_dir}" if kept else "No sample was kept, so no shard was written.")
        print(training_data.summary(bad))
    return kept


if __name__ == "__main__":
    run_script(lambda: main() == 0)
