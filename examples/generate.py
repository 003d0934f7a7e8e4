"""Generate images of a subject in a photo.

    python examples/generate.py --reference photo.jpg --query cat --prompt "a cat on the beach" \\
        --checkpoint stable-diffusion-v1-5/stable-diffusion-v1-5 --ssr pytorch_model.bin pytorch_model_1.bin

Without --checkpoint, the small one in pocket/ is used, which only generates emoji of 64 pixels:

    python examples/generate.py

For several subjects, repeat the options of a subject: --reference, --query, --mask and --region. A subject without
--reference is in the same reference image as the one before it. Here, each of two subjects has a half of the image:

    python examples/generate.py --prompt "a cat and a dog" --reference first.jpg --query cat --region 0,0,0.5,1 \\
        --reference second.jpg --query dog --region 0.5,0,1,1

The images are written one by one, and all of them together, beside the reference images, to generated.png.
"""

import argparse
import re
from pathlib import Path

from command_line import image_side, make_parser, output_folder, positive, run_script, seed, share
from drawing import (
    DTYPES,
    MASK_WEIGHT,
    POCKET,
    check_model,
    default_settings,
    load_pipeline,
    load_reference,
    named,
    write_contact_sheet,
)
from PIL import ImageOps


REFERENCE = POCKET / "references" / "1_cat_car.png"
KINDS = "cat, dog, fish, butterfly, car, rocket, tulip, mushroom, house, guitar, umbrella, woman"
EMOJI = f"""The checkpoint in pocket/ is a test fixture that knows twelve kinds of emoji of 64 pixels ({KINDS}), so it
generates an emoji and not the subject of your photo. For photos, pass --checkpoint and --ssr."""


class SubjectOption(argparse.Action):
    """An option of a subject. One that the last subject already has begins the next subject."""

    def __call__(self, parser, args, value, option=None):
        if not args.subjects or self.dest in args.subjects[-1]:
            args.subjects = [*args.subjects, {}]
        args.subjects[-1][self.dest] = value


def box_or_file(text: str) -> tuple[float, ...] | str:
    """The type of an option that is a box, such as 0,0,0.5,1, or a file."""
    numbers = text.split(",")
    if len(numbers) == 4 and all(re.fullmatch(r"\s*\d*\.?\d+\s*", number) for number in numbers):
        return tuple(map(float, numbers))
    return text


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(subjects=[])
    add = parser.add_argument
    box = "a file that is white there, or a box left,top,right,bottom in fractions, such as 0,0,0.5,1"
    add("--reference", action=SubjectOption, help="file or URL of the reference image with the subject")
    add("--query", action=SubjectOption, help="the subject, in words, such as cat")
    add("--mask", action=SubjectOption, type=box_or_file, help=f"where the subject is in the reference image: {box}")
    add("--region", action=SubjectOption, type=box_or_file, help=f"where it may appear in the generated image: {box}")
    add("--mask_weight", type=float, default=MASK_WEIGHT, help="how strongly the attention is restricted to the masks")
    add("--prompt", help="text that describes the image and names the subjects; default: the queries on the beach")
    add("--negative_prompt", help="text that describes what the image should not show")
    add("--checkpoint", default=str(POCKET), help="folder, repository or single file with the base model")
    add("--ssr", nargs="+", help="folder or repository with the SSR-Encoder, or the two files of the authors, if the"
        " checkpoint has none")  # fmt: skip
    add("--controlnet", help="folder or repository with a ControlNet")
    add("--control_image", help="the image that the ControlNet follows, such as edges; its size is that of the images")
    add("--num_images", type=positive, default=1, help="images to generate, the first one with --seed")
    add("--seed", type=seed, default=0, help="seed of the first image; each further one has the next seed")
    add(
        "--scale",
        type=float,
        help="how closely the subjects are followed; default: settings of the checkpoint, or 0.65",
    )
    add("--num_inference_steps", type=positive, help="denoising steps; default: settings of the checkpoint, or 30")
    add("--guidance_scale", type=float, help="classifier-free guidance; default: settings of the checkpoint, or 7.5")
    add("--eta", type=share, help="noise that DDIM adds in each step; default: settings of the checkpoint, or 0")
    add("--height", type=image_side, help="height in pixels, a multiple of 8; default: the base model's")
    add("--width", type=image_side, help="width in pixels, a multiple of 8; default: the base model's")
    add("--dtype", choices=DTYPES, help="default: fp16 on a GPU, else fp32")
    add("--device", help="such as cuda:1 or cpu; default: the GPU if there is one")
    add("--offload", choices=("model", "sequential"), help="keep the models on the CPU until they are needed")
    add("--output_dir", type=output_folder, default=Path("outputs"), help="where the images are written")
    args = parser.parse_args()

    args.subjects = args.subjects or [{"query": "cat"}]
    reference = next((each["reference"] for each in args.subjects if "reference" in each), str(REFERENCE))
    for subject in args.subjects:
        reference = subject.setdefault("reference", reference)
        if not subject.keys() & {"query", "mask"}:
            parser.error(f"--reference {reference}: name the subject with --query, or show where it is with --mask")
    if (args.controlnet is None) != (args.control_image is None):
        parser.error("--controlnet and --control_image go together")
    if args.ssr and len(args.ssr) > 2:
        parser.error("--ssr: pass a folder, a repository, or the two files of the authors")
    if args.prompt is None:
        args.prompt = f"{' and '.join(named(each.get('query', 'thing')) for each in args.subjects)} on the beach"
    for name, value in default_settings(args.checkpoint).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def encode(pipe, subject: dict, images: dict, args: argparse.Namespace):
    """Encodes a subject, with its region."""
    mask, region = (images.get(subject.get(name), subject.get(name)) for name in ("mask", "region"))
    embeds = pipe.encode_subject(
        images[subject["reference"]], query=subject.get("query"), mask=mask,
        mask_weight=1.0 if mask is None else args.mask_weight,
    ).scaled(args.scale)  # fmt: skip
    return embeds if region is None else embeds.inside(region)


def main():
    args = parse_args()
    # what can be wrong is checked before models are loaded
    images = {
        subject[name]: load_reference(f"--{name}", subject[name])
        for subject in args.subjects
        for name in ("reference", "mask", "region")
        if isinstance(subject.get(name), str)
    }
    control = {} if args.controlnet is None else {"image": load_reference("--control_image", args.control_image)}

    import torch
    from diffusers import ControlNetModel
    from diffusers_ssr import StableDiffusionSSRControlNetPipeline

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.offload and device.type == "cpu":
        raise ValueError("--offload: there is no GPU whose memory could be saved.")
    if args.controlnet is not None:
        check_model("--controlnet", args.controlnet, ControlNetModel)
    if Path(args.checkpoint).resolve() == POCKET and not all(
        POCKET in Path(each["reference"]).resolve().parents for each in args.subjects
    ):
        print(EMOJI)
    dtype = args.dtype and getattr(torch, DTYPES[args.dtype])
    pipe = load_pipeline(
        args.checkpoint, args.ssr, device=torch.device("cpu") if args.offload else device, dtype=dtype
    )
    if args.controlnet is not None:
        controlnet = ControlNetModel.from_pretrained(args.controlnet, dtype=pipe.unet.dtype).to(pipe.device)
        pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    if args.offload:
        getattr(pipe, f"enable_{args.offload}_cpu_offload")(device=device)
    pipe.set_progress_bar_config(desc="steps")

    first, *others = (encode(pipe, each, images, args) for each in args.subjects)
    row = [(f"reference: {each.get('query', 'mask')}", images[each["reference"]]) for each in args.subjects]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number in range(args.seed, args.seed + args.num_images):
        image = pipe(
            args.prompt,
            negative_prompt=args.negative_prompt,
            subject=sum(others, first),
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            eta=args.eta,
            generator=torch.Generator().manual_seed(number),
            **control,
        ).images[0]
        file = args.output_dir / f"generated_{number}.png"
        image.save(file)
        print(f"{file}: {image.width} x {image.height} pixels, seed {number}")
        row.append((f"seed {number}", image))
    shown = [(label, image if image.width >= 256 else ImageOps.contain(image, (256, 256))) for label, image in row]
    write_contact_sheet([shown], args.output_dir / "generated.png")


if __name__ == "__main__":
    run_script(main)
