"""Generate a subject along the edges of an image, with a ControlNet. Run it in the folder of the repository. The defaults
are for the small checkpoint in pocket/; generate.py has more options."""

import argparse
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="pocket", help="folder or repository with base model and SSR-Encoder")
    add("--controlnet", default="pocket/controlnet", help="such as lllyasviel/control_v11p_sd15_canny")
    add("--reference", default="pocket/references/6_guitar_woman_cat.png", help="file or URL of the reference image")
    add("--query", default="cat", help="the subject in the reference image")
    add("--control_image", default="docs/quick_start.png", help="image whose edges are followed")
    add("--prompt", default="a cat on the beach", help="the prompt, which should name the subject")
    add("--scale", type=float, default=1.0, help="subject scale; 0.5 to 0.8 with Stable Diffusion 1.5")
    add("--guidance_scale", type=float, default=3.0, help="classifier-free guidance; 7.5 with Stable Diffusion 1.5")
    add("--num_inference_steps", type=int, default=25, help="denoising steps")
    add("--seed", type=int, default=3, help="seed of the initial noise")
    add("--output_dir", type=Path, default=Path("outputs"), help="where the image is written")
    args = parser.parse_args()

    # imported after the options are read, so that --help does not wait
    import cv2
    import numpy as np
    import torch
    from diffusers import ControlNetModel
    from diffusers.utils import load_image, make_image_grid
    from diffusers_ssr import StableDiffusionSSRControlNetPipeline, StableDiffusionSSRPipeline
    from PIL import Image

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionSSRPipeline.from_pretrained(args.checkpoint, dtype=dtype, trust_remote_code=True)
    controlnet = ControlNetModel.from_pretrained(args.controlnet, dtype=dtype)
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=controlnet).to(device)

    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    edges = cv2.Canny(np.array(load_image(args.control_image).resize((side, side))), 100, 200)
    edges = Image.fromarray(edges).convert("RGB")
    reference = load_image(args.reference)
    image = pipe(
        args.prompt,
        image=edges,
        subject_image=reference,
        subject_query=args.query,
        subject_scale=args.scale,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=0.9,  # noise of DDIM in each step, for pocket/; the default is 0
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    make_image_grid([reference, edges, image], 1, 3, resize=256).save(args.output_dir / "controlnet.png")


if __name__ == "__main__":
    main()
