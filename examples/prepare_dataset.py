"""Prepare a training set: caption pictures, choose queries, filter pictures, and write WebDataset shards.

    accelerate launch examples/prepare_dataset.py --source photos --output_dir shards \\
        --caption_model Salesforce/blip-image-captioning-large

`--source` is a folder of pictures, or a folder that train_ssr.py accepts. `--dataset_name` is a dataset on the Hub. If
the folder of `photo.jpg` contains `photo.txt`, this file is used as the caption instead of the caption model. With
`--query_from file`, `photo.query.txt` is the query. Each shard is made from `--shard_size` rows of the source and is
only renamed to its final name when it is complete, so a run that was interrupted continues with the next shard. The
shards are divided among the processes of accelerate. Pass the result to train_ssr.py with `--train_data_dir shards`.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice, takewhile
from pathlib import Path

from extras import needs

import torch
from command_line import HelpFormatter, check_companions, naming, output_folder, positive, run_script
from PIL import Image
from similarity import ClipFeatures
from text_files import open_text
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


with needs("train"):
    from accelerate import PartialState
    from training_columns import ERROR_COLUMN, MAX_TEXT, PICTURE_SUFFIXES
    from training_data import BadSample, open_picture, read_bytes, summary
    from training_rows import METADATA_FILES, StreamedRows, load_rows, row_at, row_name


OPENINGS = re.compile(
    r"^(there (is|are)|this is|(an?|the)? ?(close ?up|photo|photograph|picture|image|view|painting|drawing|shot|portrait)s? of)\s+"
)
ARTICLES = {"a", "an", "the", "one", "two", "three", "four", "some", "several", "many", "his", "her", "their", "its"}
# Words that end the name of a thing in a caption, because they begin a place, an action or another thing.
ENDINGS = set(
    "about above across after against along among and are around as at before behind below beneath beside between by"
    " down during for from has have having in inside into is laid lays lies near next of off on onto or out outside over"
    " past sits sat stands that through to toward towards under up upon was wearing were which while who with without".split()
)
NOUNS_IN_ING = {"building", "painting", "drawing", "ceiling", "king", "ring", "wing", "string", "thing", "pudding",
                "earring", "sling", "spring", "clothing", "wedding", "lightning"}  # fmt: skip


def query_from_caption(caption: str) -> str:
    """
    Returns the first thing that a caption names: "brown dog" for "a brown dog sitting on a couch". This is a simple
    heuristic for English captions without a grammar: it takes the words after the first article, up to the first word
    that begins a place or an action.

    Raises:
        [`BadSample`]: if no words remain.
    """
    text = caption.lower()
    while OPENINGS.match(text):
        text = OPENINGS.sub("", text, count=1)
    found = []
    for word in re.findall(r"[\w'-]+|[.,;:!?]", text):
        ended = word in ENDINGS or not word[0].isalnum()
        doing = bool(found) and word.endswith("ing") and word not in NOUNS_IN_ING
        if found and (ended or doing or word in ARTICLES):
            break
        if not ended and word not in ARTICLES:
            found.append(word)
    if not found:
        raise BadSample(f"no thing found in the caption {caption!r}")
    return " ".join(found)


class Captioner:
    """Captions pictures with an image-to-text model such as BLIP.

    Args:
        name_or_path (`str`): the name or folder of the model.
        device (`torch.device`): the device of the model.
        max_new_tokens (`int`): the maximum number of tokens in a caption.
    """

    def __init__(self, name_or_path: str, device: torch.device, max_new_tokens: int = 40):
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(name_or_path)
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Returns one caption for each picture."""
        pixels = self.processor(images=list(pictures), return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(pixel_values=pixels, max_new_tokens=self.max_new_tokens)
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


class AestheticScore:
    """
    Predicts how much people like a picture. The predictor is a head of linear layers on the normalized CLIP embedding,
    like the ones that LAION trained for ViT-L/14: one layer, or several layers without activations between them.

    Args:
        head (`Path`): a PyTorch file with the weights of the layers, loaded with `weights_only=True`.
        clip ([`ClipFeatures`]): the CLIP model that the head was trained on.

    Raises:
        `ValueError`: if the file does not contain such a head, or if the head has a different width.
    """

    def __init__(self, head: Path, clip: ClipFeatures):
        state_dict = torch.load(head, map_location="cpu", weights_only=True)
        numbers = {name: int((re.findall(r"\d+", name) or [0])[0]) for name in state_dict}
        weights = sorted((name for name in state_dict if name.endswith("weight")), key=numbers.get)
        self.layers = [
            (state_dict[name].float(), state_dict.get(name[:-6] + "bias", torch.zeros(1)).float()) for name in weights
        ]
        self.clip = clip
        widths = [clip.model.config.projection_dim, *(weight.shape[0] for weight, _ in self.layers)]
        expected = [weight.shape[1] for weight, _ in self.layers]
        if not self.layers or widths[:-1] != expected or widths[-1] != 1:
            raise ValueError(
                f"`aesthetic_head`: {head} has to hold linear layers from width {widths[0]} to 1, but its layers take"
                f" {expected} and give {widths[1:]}."
            )

    def __call__(self, pictures: Sequence[Image.Image]) -> list[float]:
        """Returns one score for each picture, from about 1 to 10."""
        states = self.clip(pictures)
        for weight, bias in self.layers:
            states = states @ weight.T + bias
        return states[:, 0].tolist()


def read_source(args: argparse.Namespace):
    """Returns the rows to prepare, as a sequence or as a stream."""
    columns = [args.image_column, args.caption_column, args.query_column]
    if args.dataset_name is not None:
        return load_rows(None, args.dataset_name, args.dataset_config_name, args.streaming, columns)
    folder = args.source
    known = [*METADATA_FILES, "*.tar", "*.parquet"]
    if any(next(folder.rglob(pattern), None) is not None for pattern in known):
        return load_rows(folder, streaming=args.streaming, columns=columns)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise ValueError(f"`source`: the folder {folder} holds no pictures.")
    return [{"__key__": str(file.relative_to(folder)), "image": file} for file in files]


def chunks(rows, size: int) -> Iterator[tuple[int, Sequence[dict]]]:
    """Yields the rows in chunks, each with the number of its first row. The rows of a sequence are read lazily."""
    if hasattr(rows, "__len__"):
        for first in range(0, len(rows), size):
            yield first, _Part(rows, first, min(first + size, len(rows)))
        return
    once = takewhile(lambda item: item[0][0] == 0, StreamedRows(rows, 0, buffer_size=1).read((0, 0)))
    for first in count(0, size):
        chunk = [row for _, _, row in islice(once, size)]
        if not chunk:
            return
        yield first, chunk


class _Part:
    """A range of rows of a sequence. The rows are read during iteration."""

    def __init__(self, rows, first: int, end: int):
        self.rows, self.first, self.end = rows, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[dict]:
        return (row_at(self.rows, index) for index in range(self.first, self.end))


def _sidecar(row: dict, suffix: str) -> str:
    """Returns the content of the text file with the name of the picture and this suffix, or an empty string."""
    path = row.get("image")
    file = path.with_suffix(suffix) if isinstance(path, Path) else None
    if file is None or not file.is_file():
        return ""
    with open_text(file, errors="replace") as text:
        return text.read(MAX_TEXT).strip()


def read_row(row: dict, args: argparse.Namespace) -> dict:
    """
    Returns the picture of a row, the JPEG bytes to store, and the caption if the row already has one.

    Raises:
        [`BadSample`]: if the picture is unusable or too small.
    """
    if row.get(ERROR_COLUMN):
        raise BadSample(row[ERROR_COLUMN])
    content = read_bytes(row.get(args.image_column), args.image_column)
    picture = open_picture(content, args.min_image_size)
    if max(picture.size) > args.max_aspect_ratio * min(picture.size):
        raise BadSample(f"{picture.width} x {picture.height} pixels are more than {args.max_aspect_ratio} to 1")
    if args.max_image_size is not None and min(picture.size) > args.max_image_size:
        ratio = args.max_image_size / min(picture.size)
        picture = picture.resize([round(side * ratio) for side in picture.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=args.jpeg_quality, subsampling=0)
    caption = _sidecar(row, ".txt")
    if not caption and isinstance(row.get(args.caption_column), str):
        caption = row[args.caption_column].strip()
    return {"row": row, "picture": picture, "content": buffer.getvalue(), "text": caption}


def choose_query(sample: dict, args: argparse.Namespace) -> str:
    """
    Returns the query, which names the subject in the picture.

    Raises:
        [`BadSample`]: if there is no query.
    """
    if args.query_from == "caption":
        return query_from_caption(sample["text"])
    row = sample["row"]
    query = _sidecar(row, ".query.txt") if args.query_from == "file" else row.get(args.query_column)
    if not isinstance(query, str) or not query.strip():
        raise BadSample(f"there is no query in the {args.query_from}")
    return query.strip()


def prepare(
    rows, first: int, args: argparse.Namespace, captioner, score, bar
) -> tuple[list[tuple[int, dict]], dict[str, str]]:
    """Returns the usable samples with their row numbers, and a dict with the reasons why other rows are unusable.
    `first` is the number of the first row in `rows`."""
    kept, bad = [], {}

    def attempt(place, row, function, *arguments):
        try:
            return function(*arguments)
        except BadSample as error:
            bad[row_name(row, f"row {place}")] = str(error)
            return None

    waiting = []

    def flush():
        without = [sample for _, sample in waiting if not sample["text"]]
        if without and captioner is not None:
            captions = captioner([sample["picture"] for sample in without])
            for sample, caption in zip(without, captions, strict=True):
                sample["text"] = caption
        scores = score([sample["picture"] for _, sample in waiting]) if score is not None and waiting else None
        for index, (place, sample) in enumerate(waiting):
            if attempt(place, sample["row"], finish, sample, scores[index] if scores else None) is not None:
                kept.append((place, sample))
        waiting.clear()

    def finish(sample, aesthetic):
        if not sample["text"]:
            raise BadSample("there is no caption, and no `caption_model` to write one")
        if aesthetic is not None:
            sample["aesthetic"] = aesthetic
            if aesthetic < args.min_aesthetic:
                raise BadSample(f"its aesthetic score is {aesthetic:.2f}")
        sample["query"] = choose_query(sample, args)
        return sample

    for place, row in enumerate(rows, first):
        sample = attempt(place, row, read_row, row, args)
        bar.update()
        if sample is not None:
            waiting.append((place, sample))
        if len(waiting) == args.batch_size:
            flush()
    flush()
    return kept, bad


def write_shard(file: Path, samples: list[tuple[int, dict]]) -> None:
    """Writes a tar file with `key.jpg` and `key.json` for each sample, under a temporary name that is then renamed."""
    partial = file.with_suffix(".part")
    with tarfile.open(partial, "w") as archive:
        for place, sample in samples:
            described = {name: sample[name] for name in ("text", "query", "aesthetic") if name in sample}
            described["width"], described["height"] = sample["picture"].size
            described["source"] = str(sample["row"].get("__key__", ""))
            for suffix, content in (("jpg", sample["content"]), ("json", json.dumps(described).encode())):
                member = tarfile.TarInfo(f"{place:09d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    partial.replace(file)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, help="a folder")
    add("--dataset_name", help="a dataset of the Hub, instead of --source")
    add("--dataset_config_name", help="configuration of the Hub's dataset")
    add("--streaming", action="store_true", help="stream the dataset instead of downloading it first")
    add("--output_dir", type=output_folder, required=True, help="output folder for the shards")
    add("--shard_size", type=positive, default=1000, help="number of rows of the source per shard")
    add("--image_column", default="image", help="the picture")
    add("--caption_column", default="text", help="column with captions; empty cells are captioned")
    add("--query_column", default="query", help="column with queries, for `--query_from column`")
    add("--query_from", choices=("caption", "column", "file"), default="caption",
        help="source of the query: the first thing in the caption, the query column, or the .query.txt of the picture")  # fmt: skip
    add("--caption_model", help="model for pictures without a caption, such as Salesforce/blip-image-captioning-large")
    add("--max_new_tokens", type=positive, default=40, help="maximum number of tokens of a caption")
    add("--batch_size", type=positive, default=16, help="number of pictures that are captioned and scored together")
    add(
        "--min_image_size",
        type=positive,
        default=512,
        help="minimum length of the shorter side; smaller pictures are skipped",
    )
    add("--max_image_size", type=positive, help="length of the shorter side; larger pictures are resized to it")
    add("--max_aspect_ratio", type=float, default=2.0, help="maximum aspect ratio; longer pictures are skipped")
    add("--jpeg_quality", type=int, default=95, help="JPEG quality of the pictures in the shards")
    add(
        "--aesthetic_head",
        type=Path,
        help="file with the aesthetic predictor (linear layers on the CLIP embedding); without it, pictures are not scored",
    )
    add("--aesthetic_clip", default="openai/clip-vit-large-patch14", help="CLIP model that the head was trained on")
    add(
        "--min_aesthetic",
        type=float,
        default=5.0,
        help="minimum aesthetic score; pictures with a lower score are skipped",
    )
    args = parser.parse_args(arguments)
    companions = {
        "dataset_name": ("dataset_config_name", "streaming"),
        "caption_model": ("max_new_tokens",),
        "aesthetic_head": ("aesthetic_clip", "min_aesthetic"),
    }
    check_companions(parser, args, companions)
    return args


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        `ValueError`: for the first option with an invalid value.
    """
    if (args.source is None) == (args.dataset_name is None):
        raise ValueError(f"Pass either `source` or `dataset_name`: got {args.source} and {args.dataset_name!r}.")
    if args.source is not None and not args.source.is_dir():
        raise ValueError(f"`source`: there is no folder {args.source}.")
    if args.max_image_size is not None and args.max_image_size < args.min_image_size:
        raise ValueError(f"`max_image_size` is {args.max_image_size}, less than `min_image_size`.")
    if args.max_aspect_ratio < 1:
        raise ValueError(f"`max_aspect_ratio` has to be at least 1, but is {args.max_aspect_ratio}.")
    if not 1 <= args.jpeg_quality <= 100:
        raise ValueError(f"`jpeg_quality` has to be from 1 to 100, but is {args.jpeg_quality}.")
    if args.aesthetic_head is not None and not args.aesthetic_head.is_file():
        raise ValueError(f"`aesthetic_head`: there is no file {args.aesthetic_head}.")


def check_settings(args: argparse.Namespace, state: PartialState) -> None:
    """Raises a `ValueError` if the output folder contains shards that were made with other settings."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("output_dir", "batch_size")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = args.output_dir / "settings.json"
    changed = file.exists() and json.loads(file.read_text())["digest"] != digest
    if changed and any(args.output_dir.glob("*.tar")):
        raise ValueError(
            f"`output_dir`: {args.output_dir} holds shards of a run with other options (see {file}): delete"
            " it, or use another folder."
        )
    state.wait_for_everyone()
    if state.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if changed:  # the earlier run kept no sample, so its reports are not needed
            shutil.rmtree(args.output_dir / "reports", ignore_errors=True)
        file.with_suffix(".part").write_text(json.dumps({"digest": digest, **settings}, indent=1))
        file.with_suffix(".part").replace(file)
    state.wait_for_everyone()


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Prepares the training set. Returns the number of samples in the main process, and `None` in other processes."""
    args = parse_args(arguments)
    check_args(args)
    state = PartialState()
    kept = None
    rows = read_source(args)
    captioner = None
    if args.caption_model is not None:
        with naming("--caption_model", args.caption_model):
            captioner = Captioner(args.caption_model, state.device, args.max_new_tokens)
    score = None
    if args.aesthetic_head is not None:
        with naming("--aesthetic_clip", args.aesthetic_clip):
            clip = ClipFeatures.from_pretrained(args.aesthetic_clip, state.device)
        score = AestheticScore(args.aesthetic_head, clip)

    # after the models were loaded, because it writes the settings of the run to the output folder
    check_settings(args, state)

    reports = args.output_dir / "reports"
    reports.mkdir(exist_ok=True)
    known = len(rows) if hasattr(rows, "__len__") else None
    bar = tqdm(total=known, desc="rows", disable=not state.is_local_main_process)
    for number, (first, part) in enumerate(chunks(rows, args.shard_size)):
        report = reports / f"{number:06d}.json"
        if report.exists() or number % state.num_processes != state.process_index:
            bar.update(len(part))
            continue
        samples, bad = prepare(part, first, args, captioner, score, bar)
        if samples:
            write_shard(args.output_dir / f"{number:06d}.tar", samples)
        # the report marks the shard as done
        report.with_suffix(".part").write_text(json.dumps({"kept": len(samples), "bad": bad}, indent=1))
        report.with_suffix(".part").replace(report)
    bar.close()

    state.wait_for_everyone()
    if state.is_main_process:
        found = [json.loads(file.read_text()) for file in sorted(reports.glob("*.json"))]
        bad = {name: reason for each in found for name, reason in each["bad"].items()}
        (args.output_dir / "bad_samples.json").write_text(json.dumps(bad, indent=1) + "\n")
        kept = sum(each["kept"] for each in found)
        print(f"{kept} samples are in {args.output_dir}" if kept else "No sample was kept, so no shard was written.")
        print(summary(bad))
        if not kept:
            reasons = Counter(bad.values()).most_common(3)
            print("\n".join(f"  {count} times: {reason}" for reason, count in reasons))
    state.destroy_process_group()
    return kept


if __name__ == "__main__":
    run_script(lambda: main() == 0)
