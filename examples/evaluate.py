"""Evaluate drawn pictures: subject fidelity, prompt fidelity, and the selection of the right subject.

    python examples/evaluate.py --subjects_dir dreambooth/dataset --generated_dir drawn --output_dir results

The real pictures of a subject are expected in `<subjects_dir>/<subject>/*.jpg`, as in DreamBench, and the drawn
pictures in `<generated_dir>/<subject>/`. CLIP-T also needs `<generated_dir>/manifest.jsonl`, which generate_batch.py
writes, for the prompt of each file. With `--pretrained_model_name_or_path` and `--ssr`, the script first draws the
pictures: each prompt of `--prompts` with the first picture of each subject. The results are DINO, CLIP-I (the mean
cosine similarity over all pairs of a drawn and a real picture) and CLIP-T.

With `--selective_dir`, the script measures selection instead. Each subject of a reference is a cropped picture
`<reference>/crops/<query>.png`. Alternatively, `<reference>/reference.png` is the whole picture, and
`<reference>/masks/<query>.png` is the mask of each subject. The drawn pictures of a subject are in
`<generated_dir>/<reference>/<query>/`.

Each result is written as a table (CSV and Markdown) with a row for each subject, and as a bar chart.
"""

import argparse
import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from extras import needs

import numpy as np
import torch
from command_line import HelpFormatter, check_companions, naming, output_folder, positive, run_script, seed
from PIL import Image
from similarity import ClipFeatures, ClipVisionFeatures, DinoFeatures, mean_matching, mean_pairwise, selection
from text_files import open_text, read_lines
from tqdm.auto import tqdm


with needs("train"):
    import generate_batch
    import matplotlib
    from accelerate import PartialState
    from training_columns import PICTURE_SUFFIXES
    from training_data import BadSample, open_picture

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt


HERE = Path(__file__).resolve().parent
ROWS = "rows.jsonl"  # the table of the pictures that `--ssr` draws


def picture_files(folder: Path) -> list[Path]:
    """Returns the picture files in a folder, sorted by name. Subfolders are not searched."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)


def open_all(files: Sequence[Path], bad: dict[str, str]) -> dict[Path, Image.Image]:
    """Opens the pictures. Files that cannot be opened are left out and recorded in `bad`."""
    pictures = {}
    for file in files:
        try:
            pictures[file] = open_picture(file)
        except BadSample as error:
            bad[str(file)] = str(error)
    return pictures


def class_name(subject: str, classes: dict[str, str]) -> str:
    """Returns the name of a subject in prompts: "dog" for the folder dog6, unless `classes` has another name."""
    return classes.get(subject) or re.sub(r"[\d_]+$", "", subject).replace("_", " ")


def read_classes(file: Path | None) -> dict[str, str]:
    """Reads a file with lines of the form `subject,class`."""
    if file is None:
        return {}
    classes = {}
    with open_text(file, "classes") as lines:
        reader = csv.reader(lines)
        for row in reader:
            if len(row) not in (0, 2):
                raise ValueError(
                    f"`classes`: line {reader.line_num} of {file} is not of the form subject,class: {row}."
                )
            classes |= {row[0].strip(): row[1].strip()} if row else {}
    return classes


def draw_subjects(args: argparse.Namespace) -> None:
    """Draws each prompt for each subject. The first picture of the subject is the reference."""
    templates = read_lines(args.prompts, "prompts")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"`prompts`: each line of {args.prompts} has to hold {{}} where the subject is named.")
    classes = read_classes(args.classes)
    rows = []
    for folder in sorted(path for path in args.subjects_dir.iterdir() if picture_files(path)):
        name = class_name(folder.name, classes)
        for number, template in enumerate(templates):
            for index in range(args.images_per_prompt):
                rows.append(
                    {
                        "image": str(picture_files(folder)[0].resolve()),
                        "query": name,
                        "prompt": template.replace("{}", name),
                        "seed": args.seed + index,
                        "name": f"{folder.name}/{number:02d}-{index}",
                    }
                )
    args.generated_dir.mkdir(parents=True, exist_ok=True)
    table = args.generated_dir / ROWS
    table.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    generate_batch.main(
        [
            *("--table", str(table), "--output_dir", str(args.generated_dir), "--ssr", args.ssr),
            *("--pretrained_model_name_or_path", args.pretrained_model_name_or_path, "--scale", str(args.scale)),
            *("--num_inference_steps", str(args.num_inference_steps), "--guidance_scale", str(args.guidance_scale)),
        ]
    )


def read_prompts(generated_dir: Path) -> dict[Path, str]:
    """Returns the prompt of each drawn file."""
    manifest = generated_dir / "manifest.jsonl"
    if not manifest.exists():
        return {}
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {generated_dir / entry["file"]: entry["prompt"] for entry in entries if "file" in entry}


def measure_subjects(args: argparse.Namespace, models: dict, bad: dict[str, str]) -> list[dict]:
    """Returns a row with DINO, CLIP-I and CLIP-T for each subject."""
    prompts = read_prompts(args.generated_dir)
    if args.ssr is not None:
        # the folder may hold pictures of an earlier run with more prompts
        lines = (args.generated_dir / ROWS).read_text(encoding="utf-8").splitlines()
        names = {json.loads(line)["name"] for line in lines}
    rows = []
    folders = sorted(path for path in args.subjects_dir.iterdir() if picture_files(path))
    for folder in tqdm(folders, desc="subjects"):
        real = open_all(picture_files(folder), bad)
        files = picture_files(args.generated_dir / folder.name)
        if args.ssr is not None:
            files = [file for file in files if f"{folder.name}/{file.stem}" in names]
        drawn = open_all(files, bad)
        if not real or not drawn:
            bad[folder.name] = f"{len(real)} real pictures and {len(drawn)} drawn ones"
            continue
        row = {"subject": folder.name, "pictures": len(drawn)}
        for name, model in models.items():
            features = model(list(drawn.values()))
            row[{"clip": "CLIP-I"}.get(name, name.upper())] = mean_pairwise(features, model(list(real.values())))
            if name != "clip" or not isinstance(model, ClipFeatures):
                continue
            known = [index for index, file in enumerate(drawn) if file in prompts]
            texts = [prompts[file] for file in drawn if file in prompts]
            row["CLIP-T"] = mean_matching(features[known], model.texts(texts)) if texts else math.nan
        rows.append(row)
    return rows


def cut_out(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Crops a picture to the bounding box of the subject, and paints everything outside of the mask white."""
    inside = np.asarray(mask.convert("L").resize(picture.size, Image.Resampling.NEAREST)) > 127
    if not inside.any():
        raise BadSample("the mask is empty")
    pixels = np.where(inside[..., None], np.asarray(picture), 255).astype(np.uint8)
    (top, bottom), (left, right) = ((kept.min(), kept.max() + 1) for kept in np.nonzero(inside))
    return Image.fromarray(pixels[top:bottom, left:right])


def read_subjects(reference: Path, bad: dict[str, str]) -> dict[str, Image.Image]:
    """Returns a dict from queries to cropped pictures of the subjects in a reference."""
    crops = picture_files(reference / "crops")
    if crops:
        return {file.stem: picture for file, picture in open_all(crops, bad).items()}
    whole = [file for file in picture_files(reference) if file.stem == "reference"]
    pictures = open_all(whole, bad)
    subjects = {}
    for file, mask in open_all(picture_files(reference / "masks"), bad).items() if pictures else ():
        try:
            subjects[file.stem] = cut_out(next(iter(pictures.values())), mask)
        except BadSample as error:
            bad[str(file)] = str(error)
    return subjects


def measure_selection(args: argparse.Namespace, models: dict, bad: dict[str, str]) -> list[dict]:
    """Measures for each subject of each reference how similar its drawn pictures are to the subject and to the other
    subjects of the reference."""
    rows = []
    for reference in tqdm(sorted(path for path in args.selective_dir.iterdir() if path.is_dir()), desc="references"):
        subjects = read_subjects(reference, bad)
        if len(subjects) < 2:
            bad[reference.name] = f"{len(subjects)} subjects, but selection needs two or more"
            continue
        crops = {name: model(list(subjects.values())) for name, model in models.items()}
        for place, query in enumerate(subjects):
            drawn = open_all(picture_files(args.generated_dir / reference.name / query), bad)
            if not drawn:
                bad[f"{reference.name}/{query}"] = "no drawn pictures"
                continue
            row = {"subject": f"{reference.name}: {query}", "pictures": len(drawn)}
            for name, model in models.items():
                others = torch.cat([crops[name][:place], crops[name][place + 1 :]])
                found = selection(model(list(drawn.values())), crops[name][place : place + 1], others)
                row |= {f"{name.upper()} {part}": value for part, value in found.items()}
            row["chance"] = 1 / len(subjects)
            rows.append(row)
    return rows


def with_mean(rows: list[dict]) -> list[dict]:
    """Appends the mean of the rows. Each subject has the same weight, regardless of its number of pictures."""
    mean = {"subject": "mean", "pictures": sum(row["pictures"] for row in rows)}
    for name in [name for name in rows[0] if name not in mean]:
        known = [row[name] for row in rows if not math.isnan(row[name])]
        mean[name] = fmean(known) if known else math.nan
    return [*rows, mean]


def write_results(rows: list[dict], folder: Path, name: str) -> None:
    """Writes the rows to `name`.csv, `name`.md and `name`.png."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    shown = [
        {key: ("" if math.isnan(value) else f"{value:.4f}") if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]  # fmt: skip
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(shown)
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in shown)]
    text = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    write_chart(rows, folder / f"{name}.png")


def write_chart(rows: list[dict], file: Path) -> None:
    """Draws a bar chart with a group of bars for each row and a color for each metric."""
    numbers = [name for name, value in rows[0].items() if isinstance(value, float) and name != "chance"]
    places = np.arange(len(rows))
    height = 0.8 / len(numbers)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(rows) * max(len(numbers), 2)), layout="constrained")
    for index, name in enumerate(numbers):
        axes.barh(places + index * height, [row[name] for row in rows], height, label=name)
    axes.set_yticks(places + 0.4 - height / 2, [row["subject"] for row in rows])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.5)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--subjects_dir",
        type=Path,
        help="folder with a subfolder of real pictures for each subject, such as the dataset of DreamBench",
    )
    add("--selective_dir", type=Path, help="folder with references that show several subjects")
    add("--generated_dir", type=Path, required=True, help="the drawn pictures")
    add("--output_dir", type=output_folder, default=Path("results"), help="output folder for tables and charts")
    add("--dino", default="facebook/dino-vits16", help='name or folder, or "none"')
    add("--clip", default="openai/clip-vit-base-patch32", help='a CLIPModel\'s name or folder, or "none"')
    add(
        "--clip_vision",
        help="CLIPVisionModel, or folder for load_ssr, to use its pooled output instead of --clip; without CLIP-T",
    )
    add(
        "--classes",
        type=Path,
        help="file with lines of the form subject,class; default: the folder name without its number",
    )

    add("--pretrained_model_name_or_path", help="base model to draw the pictures with, before they are evaluated")
    add("--ssr", help="repository or folder with the SSR-Encoder for the base model")
    add(
        "--prompts",
        type=Path,
        default=HERE / "evaluation_prompts.txt",
        help="file with one prompt per line, and {} for the subject",
    )
    add(
        "--images_per_prompt",
        type=positive,
        default=4,
        help="number of pictures for each prompt, with different seeds",
    )
    add("--scale", type=float, default=0.65, help="subject scale")
    add("--num_inference_steps", type=positive, default=30, help="denoising steps")
    add("--guidance_scale", type=float, default=5.0, help="scale of classifier-free guidance")
    add("--seed", type=seed, default=0, help="seed of the first picture of each prompt")
    args = parser.parse_args(arguments)
    drawing = ("prompts", "images_per_prompt", "scale", "num_inference_steps", "guidance_scale", "seed")
    check_companions(parser, args, {"ssr": drawing})
    return args


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        `ValueError`: for the first option with an invalid value.
    """
    if (args.subjects_dir is None) == (args.selective_dir is None):
        raise ValueError(
            f"Pass either `subjects_dir` or `selective_dir`: got {args.subjects_dir}, {args.selective_dir}."
        )
    if (args.pretrained_model_name_or_path is None) != (args.ssr is None):
        raise ValueError("`pretrained_model_name_or_path` and `ssr` belong together: pass both or none.")
    if args.ssr is not None and args.selective_dir is not None:
        raise ValueError("`ssr` draws for `subjects_dir`; for `selective_dir`, draw with generate_batch.py.")
    if args.dino == "none" and args.clip == "none" and args.clip_vision is None:
        raise ValueError('`dino` and `clip` are both "none", so there is no metric.')
    folders = {"subjects_dir": args.subjects_dir, "selective_dir": args.selective_dir}
    folders["generated_dir"] = args.generated_dir if args.ssr is None else None
    for name, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise ValueError(f"`{name}`: there is no folder {folder}.")
    for name in ("classes", "prompts"):
        file = getattr(args, name)
        if file is not None and not file.is_file():
            raise ValueError(f"`{name}`: there is no file {file}.")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    check_args(args)
    if args.ssr is not None:
        draw_subjects(args)
        if not PartialState().is_main_process:
            return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {}
    if args.dino != "none":
        with naming("--dino", args.dino):
            models["dino"] = DinoFeatures.from_pretrained(args.dino, device)
    if args.clip_vision is not None:
        with naming("--clip_vision", args.clip_vision):
            models["clip"] = ClipVisionFeatures.from_pretrained(args.clip_vision, device)
    elif args.clip != "none":
        with naming("--clip", args.clip):
            models["clip"] = ClipFeatures.from_pretrained(args.clip, device)
    bad = {}
    rows = (measure_subjects if args.selective_dir is None else measure_selection)(args, models, bad)
    for name, reason in bad.items():
        print(f"left out {name}: {reason}")
    if not rows:
        raise ValueError(f"`generated_dir`: {args.generated_dir} holds no picture of any of the subjects.")
    name = "subjects" if args.selective_dir is None else "selection"
    write_results(with_mean(rows), args.output_dir, name)
    print((args.output_dir / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
