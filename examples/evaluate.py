"""Evaluate generated images: subject fidelity, prompt fidelity, and the selection of the right subject.

    python examples/evaluate.py --subjects_dir dreambooth/dataset --generated_dir generated --output_dir results

The real images of a subject are expected in `<subjects_dir>/<subject>/*.jpg`, as in DreamBench, and the generated ones
in `<generated_dir>/<subject>/`. CLIP-T also needs `<generated_dir>/manifest.jsonl`, which generate_batch.py writes, for
the prompt of each file. With `--checkpoint`, the script first generates the images: each prompt of `--prompts` with the
first image of each subject. The results are DINO, CLIP-I (the mean cosine similarity over all pairs of a generated and
a real image) and CLIP-T.

With `--selective_dir`, the script measures selection instead. The subjects of a reference are cropped images
`<reference>/crops/<query>.png`, and the images generated for a subject are in `<generated_dir>/<reference>/<query>/`.
The results are written as CSV and Markdown, with a row for each subject. The processes divide the subjects.
"""

import argparse
import csv
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from extras import needs

from command_line import check_companions, make_parser, naming, output_folder, positive, run_script, seed


PROMPTS = Path(__file__).resolve().parent / "evaluation_prompts.txt"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--subjects_dir", type=Path, help="folder with a subfolder of real images for each subject, as in DreamBench")
    add("--selective_dir", type=Path, help="folder with references that show several subjects")
    add("--generated_dir", type=Path, required=True, help="the generated images")
    add("--output_dir", type=output_folder, default=Path("results"), help="where the tables are written")
    add("--dino", default="facebook/dino-vits16", help='name or folder, or "none"')
    add("--clip", default="openai/clip-vit-base-patch32", help='a CLIPModel\'s name or folder, or "none"')
    add("--checkpoint", help="folder or repository to generate the images with: base model or complete SSR pipeline")
    add("--ssr", help="folder or repository with the SSR-Encoder, if the checkpoint has none")
    add("--classes", type=Path, help="file of lines subject,class; default: the folder name without its number")
    add("--prompts", type=Path, default=PROMPTS, help="file with one prompt per line, and {} for the subject")
    add("--images_per_prompt", type=positive, default=4, help="images for each prompt, with different seeds")
    add("--scale", type=float, default=0.65, help="subject scale")
    add("--num_inference_steps", type=positive, default=30, help="denoising steps")
    add("--guidance_scale", type=float, default=5.0, help="scale of classifier-free guidance")
    add("--seed", type=seed, default=0, help="seed of the first image of each prompt")
    args = parser.parse_args(arguments)
    generation = "ssr classes prompts images_per_prompt scale num_inference_steps guidance_scale seed".split()
    check_companions(parser, args, {"checkpoint": generation})
    if (args.subjects_dir is None) == (args.selective_dir is None):
        parser.error("pass either --subjects_dir or --selective_dir")
    if args.checkpoint is not None and args.selective_dir is not None:
        parser.error("--checkpoint generates for --subjects_dir; see generate_batch.py")
    if args.dino == args.clip == "none":
        parser.error('--dino and --clip are both "none", so there is no metric')
    return args


if __name__ == "__main__":
    parse_args()  # --help and wrong options are answered before the imports below, which take seconds
with needs("demo"):
    import generate_batch
    import torch
    from accelerate.utils import gather_object
    from diffusers_ssr.images_ssr import to_pil
    from image_files import SUFFIXES, open_image
    from PIL import Image
    from processes import own_share, start_processes
    from similarity import ClipFeatures, DinoFeatures, ImageFeatures, mean_matching, mean_pairwise, selection
    from text_files import read_lines, read_rows


def list_images(folder: Path) -> list[Path]:
    """Returns the image files in a folder, sorted by name. Subfolders are not searched."""
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)


def open_all(files: Sequence[Path], left_out: dict[str, str]) -> dict[Path, Image.Image]:
    """Opens image files. Those that cannot be opened are recorded in `left_out`."""
    images = {}
    for file in files:
        try:
            images[file] = to_pil(open_image(file))
        except ValueError as error:
            left_out[str(file)] = str(error)
    return images


def read_classes(file: Path | None) -> dict[str, str]:
    """Reads a file with lines of the form `subject,class`."""
    lines = [] if file is None else read_lines(file, "classes")
    if wrong := [line for line in lines if line.count(",") != 1]:
        raise ValueError(f"`classes`: {file} has to hold lines of the form subject,class, but holds {wrong[0]!r:.80}.")
    return {subject.strip(): name.strip() for subject, name in (line.split(",") for line in lines)}


def class_name(subject: str, classes: dict[str, str]) -> str:
    """Returns the name of a subject in prompts: "dog" for the folder dog6, unless `classes` has another name."""
    return classes.get(subject) or re.sub(r"[\d_]+$", "", subject).replace("_", " ")


def make_rows(args: argparse.Namespace, folders: list[Path]) -> list[dict]:
    templates = read_lines(args.prompts, "prompts")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"`prompts`: each line of {args.prompts} has to hold {{}} where the subject is named.")
    classes = read_classes(args.classes)
    names = {folder: class_name(folder.name, classes) for folder in folders}
    return [
        {
            "image": str(list_images(folder)[0].resolve()),
            "query": names[folder],
            "prompt": template.replace("{}", names[folder]),
            "seed": args.seed + index,
            "name": f"{folder.name}/{number:02d}-{index}.png",
        }
        for folder in folders
        for number, template in enumerate(templates)
        for index in range(args.images_per_prompt)
    ]


def generate(args: argparse.Namespace, folders: list[Path]) -> dict[Path, str]:
    """Generates each prompt for the first image of each subject. Returns the prompt of each file."""
    rows = make_rows(args, folders)
    options = {"table": args.subjects_dir, "output_dir": args.generated_dir}
    for name in ("checkpoint", "ssr", "scale", "num_inference_steps", "guidance_scale"):
        options[name] = getattr(args, name)
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    if message := generate_batch.generate_table(rows, generate_batch.parse_args(arguments)):
        print(message, file=sys.stderr)
    return {args.generated_dir / row["name"]: row["prompt"] for row in rows}


def read_prompts(generated_dir: Path) -> dict[Path, str]:
    """Returns the prompt of each generated file. Raises a `ValueError` if a line of the manifest cannot be read."""
    manifest = generated_dir / "manifest.jsonl"
    rows = list(read_rows(manifest)) if manifest.is_file() else []
    if broken := [f"line {number}: {row}" for number, row in rows if not isinstance(row, dict)]:
        raise ValueError(f"--generated_dir: {manifest}, {broken[0]}")
    entries = ((row.get("file"), row.get("prompt")) for _, row in rows)
    return {generated_dir / f: prompt for f, prompt in entries if isinstance(f, str) and isinstance(prompt, str)}


def measure_subject(
    folder: Path, generated: dict[Path, Image.Image], prompts: dict[Path, str], models: dict, left_out: dict[str, str]
) -> list[dict]:
    """Returns a row with DINO, CLIP-I and CLIP-T of a subject."""
    real = open_all(list_images(folder), left_out)
    if not real or not generated:
        left_out[folder.name] = f"{len(real)} real images and {len(generated)} generated ones"
        return []
    row = {"subject": folder.name, "images": len(generated)}
    for name, model in models.items():
        features = model(list(generated.values()))
        row["CLIP-I" if name == "clip" else "DINO"] = mean_pairwise(features, model(list(real.values())))
        if name == "clip":
            known = [index for index, file in enumerate(generated) if file in prompts]
            texts = [prompts[file] for file in generated if file in prompts]
            row["CLIP-T"] = mean_matching(features[known], model.texts(texts)) if texts else math.nan
    return [row]


def measure_selection(
    reference: Path, generated_dir: Path, models: dict[str, ImageFeatures], left_out: dict[str, str]
) -> list[dict]:
    """Returns for each subject of a reference how similar its generated images are to it and to the other subjects."""
    subjects = open_all(list_images(reference / "crops"), left_out)
    if len(subjects) < 2:
        left_out[reference.name] = f"{len(subjects)} subjects, but selection needs two or more"
        return []
    crops = {name: model(list(subjects.values())) for name, model in models.items()}
    rows = []
    for index, query in enumerate(file.stem for file in subjects):
        generated = open_all(list_images(generated_dir / reference.name / query), left_out)
        if not generated:
            left_out[f"{reference.name}/{query}"] = "no generated images"
            continue
        row = {"subject": f"{reference.name}: {query}", "images": len(generated)}
        for name, model in models.items():
            others = torch.cat([crops[name][:index], crops[name][index + 1 :]])
            measured = selection(model(list(generated.values())), crops[name][index : index + 1], others)
            row |= {f"{name.upper()} {part}": value for part, value in measured.items()}
        rows.append({**row, "chance": 1 / len(subjects)})
    return rows


def with_mean(rows: list[dict]) -> list[dict]:
    """Appends the mean of the rows. Each subject has the same weight, regardless of its number of images."""
    mean = {"subject": "mean", "images": sum(row["images"] for row in rows)}
    for name in [name for name in rows[0] if name not in mean]:
        known = [row[name] for row in rows if not math.isnan(row[name])]
        mean[name] = fmean(known) if known else math.nan
    return [*rows, mean]


def format_cell(value: str | float) -> str:
    return str(value) if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.4f}"


def write_results(rows: list[dict], folder: Path, name: str) -> str:
    """Writes the rows to `name`.csv and `name`.md. Returns the Markdown text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [list(rows[0]), *([format_cell(value) for value in row.values()] for row in rows)]
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    lines.insert(1, ["---"] * len(lines[0]))
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    source = args.subjects_dir or args.selective_dir
    crops = "" if args.selective_dir is None else "crops"
    folders = sorted(path for path in source.glob("*") if list_images(path / crops))
    if not folders:
        raise ValueError(f"--subjects_dir or --selective_dir: {source} holds no subjects with images.")
    state = start_processes()
    stored = args.checkpoint is None
    prompts = read_prompts(args.generated_dir) if stored else generate(args, folders)
    models = {}
    for name, kind in (("dino", DinoFeatures), ("clip", ClipFeatures)):
        if (source_of := getattr(args, name)) != "none":
            with naming(f"--{name}", source_of):
                models[name] = kind.from_pretrained(source_of, state.device)
    rows, left_out = [], {}
    for folder in own_share(state, folders, "subjects"):
        if args.subjects_dir is None:
            rows += measure_selection(folder, args.generated_dir, models, left_out)
            continue
        files = [file for file in list_images(args.generated_dir / folder.name) if stored or file in prompts]
        rows += measure_subject(folder, open_all(files, left_out), prompts, models, left_out)
    rows, left_out = gather_object(rows), dict(gather_object(list(left_out.items())))
    if not state.is_main_process:
        return
    for name, reason in left_out.items():
        print(f"left out {name}: {reason}")
    if not rows:
        raise ValueError(f"--generated_dir: {args.generated_dir} holds no image of any of the subjects.")
    table = "selection" if args.subjects_dir is None else "subjects"
    print(write_results(with_mean(sorted(rows, key=lambda row: row["subject"])), args.output_dir, table))


if __name__ == "__main__":
    run_script(main)
