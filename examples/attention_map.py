"""Show the attention of each query to its picture, with a heat map for each query and for each of its tokens.

    python examples/attention_map.py --image photo.jpg --queries cat "the dog on the left"

Without options, the script uses the references and queries of the pocket checkpoint.
"""

from pathlib import Path

import extras  # noqa: F401  (exits with a message if the project is not installed)

from command_line import make_parser, output_folder, run_script
from drawing import POCKET, load_pipeline, load_reference, write_contact_sheet
from PIL import Image
from references import read_queries


def main():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--checkpoint", default=str(POCKET), help="folder or repository with base model and SSR-Encoder"
    )
    parser.add_argument("--image", help="file or URL of a picture; default: the references of the pocket checkpoint")
    parser.add_argument("--queries", nargs="+", help="the queries")
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("outputs"), help="where the picture is written"
    )
    args = parser.parse_args()
    if (args.image is None) != (args.queries is None):
        parser.error("--image and --queries go together")
    if args.image is None:
        folder = POCKET / "references"
        references = [(Image.open(folder / name), queries) for name, queries in read_queries(folder).items()]
    else:
        references = [(load_reference("--image", args.image), args.queries)]
    pipe = load_pipeline(args.checkpoint)

    rows = []
    for picture, queries in references:
        row = [("reference", picture.convert("RGB"))]
        for query in queries:
            attention = pipe.subject_attention_map(picture, query=query)
            row.append((f'"{query}"', attention.overlay()))
            if len(attention.tokens) > 1:
                row += [(name.removesuffix("</w>"), attention.overlay(heat)) for name, heat in attention.tokens]
        rows.append(row)
    write_contact_sheet(rows, args.output_dir / "attention_map.png")


if __name__ == "__main__":
    run_script(main)
