"""Convert the two files that the authors of SSR-Encoder released to a folder for `load_ssr` and publish.py.

    python examples/convert_released_checkpoint.py --aligner pytorch_model.bin --layers pytorch_model_1.bin \\
        --output_dir ssr
"""

from pathlib import Path

import extras  # noqa: F401  (exits with a message if the project is not installed)

from command_line import make_parser, naming, output_folder, run_script


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--aligner", type=Path, required=True, help="pytorch_model.bin: aligner and subject encoder")
    parser.add_argument(
        "--layers", type=Path, required=True, help="pytorch_model_1.bin: the UNet layers' keys and values"
    )
    parser.add_argument(
        "--image_encoder", default="openai/clip-vit-large-patch14", help="the vision encoder of these weights"
    )
    parser.add_argument("--output_dir", type=output_folder, required=True, help="the folder to write")
    args = parser.parse_args()
    for option, file in (("--aligner", args.aligner), ("--layers", args.layers)):
        if not file.is_file():
            raise ValueError(f"{option}: there is no file {file}.")
    from diffusers_ssr import SSREncoder
    from transformers import CLIPImageProcessor, CLIPVisionModel

    encoder = SSREncoder.from_released(args.aligner, args.layers)
    with naming("--image_encoder", args.image_encoder):
        image_encoder = CLIPVisionModel.from_pretrained(args.image_encoder)
        processor = CLIPImageProcessor.from_pretrained(args.image_encoder)
    encoder.save_pretrained(args.output_dir / "ssr_encoder")
    image_encoder.save_pretrained(args.output_dir / "ssr_image_encoder")
    processor.save_pretrained(args.output_dir / "ssr_image_processor")
    print(f"Written to {args.output_dir}; load it with pipe.load_ssr({str(args.output_dir)!r})")


if __name__ == "__main__":
    run_script(main)
