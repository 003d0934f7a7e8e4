"""Draw a subject along the lines of a photo: controlnet-aux finds them, a ControlNet follows them.

Needs `pip install controlnet-aux`. Both detectors work without a download. Without --photo it is the portrait that comes with
scikit-image, by NASA.
"""

from controlnet_aux import CannyDetector, LineartStandardDetector
from diffusers import ControlNetModel
from diffusers.utils import load_image
from diffusers_ssr import StableDiffusionSSRControlNetPipeline
from drawing import POCKET, call_arguments, load_pipeline, options, reference_options, write_contact_sheet
from PIL import Image, ImageOps


def canny(photo: Image.Image) -> Image.Image:
    side = photo.width
    return CannyDetector()(photo, detect_resolution=side, image_resolution=side)


def lineart(photo: Image.Image) -> Image.Image:
    side = photo.width
    # the width of a line goes with the picture; controlnet-aux spells it so
    return LineartStandardDetector()(photo, guassian_sigma=6 * side / 512, detect_resolution=side)


DETECTORS = {"canny": canny, "lineart": lineart}


def load_photo(address: str | None) -> Image.Image:
    if address is not None:
        return load_image(address)
    from skimage.data import astronaut  # comes with controlnet-aux

    return Image.fromarray(astronaut()).crop((90, 0, 360, 270))


def main():
    parser = options(__doc__)
    reference_options(parser)
    parser.set_defaults(
        reference=str(POCKET / "references" / "6_guitar_woman_cat.png"), query="woman", prompt="a woman on the beach"
    )
    parser.add_argument("--controlnet", default=str(POCKET / "controlnet"))
    parser.add_argument("--photo", help="a file or address: its lines are followed")
    parser.add_argument("--detector", choices=DETECTORS, default="canny")
    parser.add_argument("--controlnet_conditioning_scale", type=float, default=1.0)
    parser.add_argument("--num_images", type=int, default=3)
    args = parser.parse_args()

    pipe = load_pipeline(args.checkpoint)
    controlnet = ControlNetModel.from_pretrained(args.controlnet, dtype=pipe.unet.dtype).to(pipe.device)
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    photo = ImageOps.fit(load_photo(args.photo).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    lines = DETECTORS[args.detector](photo)
    reference = load_image(args.reference)
    images = pipe(
        args.prompt,
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
    main()
