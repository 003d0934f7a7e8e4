"""Draw a subject along the lines of a photo, which controlnet-aux detects and a ControlNet follows.

    python examples/controlnet.py --query cat --prompt "a cat on the beach" --photo photo.jpg

Both detectors work without a download. Without --photo, the lines are taken from a picture of the query that the base
model draws first.
"""

import warnings

from extras import needs

from command_line import positive, run_script
from diffusers import ControlNetModel
from diffusers_ssr import StableDiffusionSSRControlNetPipeline
from drawing import (
    POCKET,
    call_arguments,
    check_model,
    load_pipeline,
    load_reference,
    named,
    options,
    reference_options,
    write_contact_sheet,
)
from PIL import Image, ImageOps


with needs("demo"), warnings.catch_warnings():
    # ignore warnings about missing packages that only other detectors need
    warnings.simplefilter("ignore")
    from controlnet_aux import CannyDetector, LineartStandardDetector


def canny(photo: Image.Image) -> Image.Image:
    side = photo.width
    return CannyDetector()(photo, detect_resolution=side, image_resolution=side)


def lineart(photo: Image.Image) -> Image.Image:
    side = photo.width
    # the line width scales with the picture size; `guassian_sigma` is the spelling of controlnet-aux
    return LineartStandardDetector()(photo, guassian_sigma=6 * side / 512, detect_resolution=side)


DETECTORS = {"canny": canny, "lineart": lineart}


def main():
    parser = options(__doc__)
    place = "on the beach"
    reference_options(parser, place)
    parser.set_defaults(seed=3)
    parser.add_argument("--controlnet", default=str(POCKET / "controlnet"), help="folder or repository")
    parser.add_argument("--photo", help="file or URL of a picture; the result follows its lines")
    parser.add_argument("--detector", choices=DETECTORS, default="canny", help="detector for the lines")
    parser.add_argument("--controlnet_conditioning_scale", type=float, default=1.0, help="scale of the ControlNet")
    parser.add_argument("--num_images", type=positive, default=3, help="pictures to draw")
    args = parser.parse_args()

    check_model("--controlnet", args.controlnet, ControlNetModel)
    reference = load_reference("--reference", args.reference)
    photo = None if args.photo is None else load_reference("--photo", args.photo)
    pipe = load_pipeline(args.checkpoint)
    controlnet = ControlNetModel.from_pretrained(args.controlnet, dtype=pipe.unet.dtype).to(pipe.device)
    if photo is None:
        photo = pipe(named(args.query), **call_arguments(args)).images[0]
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    pipe.set_progress_bar_config(desc="steps")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    photo = ImageOps.fit(photo, (side, side), Image.Resampling.LANCZOS)
    lines = DETECTORS[args.detector](photo)
    images = pipe(
        f"{named(args.query)} {place}" if args.prompt is None else args.prompt,
        image=lines,
        subject_image=reference,
        subject_query=args.query,
        subject_scale=args.scale,
        controlnet_conditioning_scale=args.controlnet_conditioning_scale,
        num_images_per_prompt=args.num_images,
        **call_arguments(args),
    ).images
    row = [("reference", reference), ("photo", photo), (args.detector, lines)]
    row += [(f'"{args.query}"', image) for image in images]
    write_contact_sheet([row], args.output_dir / "controlnet.png")


if __name__ == "__main__":
    run_script(main)
