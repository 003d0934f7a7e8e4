"""Generate a video of a subject, with AnimateDiff. Run it in the folder of the repository. The defaults are for the small
checkpoint in pocket/."""

import argparse
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="pocket", help="folder or repository with base model and SSR-Encoder")
    add("--motion_adapter", default="pocket/motion_adapter", help="such as guoyww/animatediff-motion-adapter-v1-5-3")
    add("--reference", default="pocket/references/1_cat_car.png", help="file or URL of the reference image")
    add("--query", default="cat", help="the subject in the reference image")
    add("--prompt", default="a cat in the snow", help="the prompt, which should name the subject")
    add("--num_frames", type=int, default=8, help="number of frames; 16 with Stable Diffusion 1.5")
    add("--scale", type=float, default=1.0, help="subject scale; 0.5 to 0.8 with Stable Diffusion 1.5")
    add("--guidance_scale", type=float, default=3.0, help="classifier-free guidance; 7.5 with Stable Diffusion 1.5")
    add("--num_inference_steps", type=int, default=25, help="denoising steps")
    add("--seed", type=int, default=0, help="seed of the initial noise")
    add("--output_dir", type=Path, default=Path("outputs"), help="where the GIF is written")
    args = parser.parse_args()

    # imported after the options are read, so that --help does not wait
    import torch
    from diffusers import MotionAdapter
    from diffusers.utils import export_to_gif, load_image
    from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRPipeline

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionSSRPipeline.from_pretrained(args.checkpoint, dtype=dtype, trust_remote_code=True)
    adapter = MotionAdapter.from_pretrained(args.motion_adapter, dtype=dtype)
    pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter).to(device)
    frames = pipe(
        args.prompt,
        num_frames=args.num_frames,
        subject_image=load_image(args.reference),
        subject_query=args.query,
        subject_scale=args.scale,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=0.9,  # noise of DDIM in each step, for pocket/; the default is 0
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    frames = [frame.resize((256, 256)) if frame.width < 256 else frame for frame in frames]
    export_to_gif(frames, str(args.output_dir / "animatediff.gif"), fps=8)  # export_to_video writes an MP4


if __name__ == "__main__":
    main()
