"""Animate a subject with AnimateDiff and save the video as GIF and MP4.

    python examples/animatediff.py --query car --prompt "a car in the snow"

The defaults are for the pocket checkpoint.
"""

from extras import needs

from command_line import positive, run_script
from diffusers import MotionAdapter
from diffusers.utils import export_to_gif, export_to_video
from diffusers_ssr import AnimateDiffSSRPipeline
from drawing import (
    POCKET,
    call_arguments,
    check_model,
    load_pipeline,
    load_reference,
    named,
    options,
    reference_options,
)
from PIL import Image


with needs("demo"):
    # `export_to_video` needs these packages to write the MP4 file
    import imageio  # noqa: F401
    import imageio_ffmpeg  # noqa: F401


def main():
    parser = options(__doc__)
    place = "in the snow"
    reference_options(parser, place)
    parser.add_argument("--motion_adapter", default=str(POCKET / "motion_adapter"), help="folder or repository")
    parser.add_argument("--num_frames", type=positive, default=8, help="number of frames of the video")
    parser.add_argument("--fps", type=positive, default=8, help="frames per second")
    args = parser.parse_args()
    reference = load_reference("--reference", args.reference)
    longest = check_model("--motion_adapter", args.motion_adapter, MotionAdapter)["motion_max_seq_length"]
    if args.num_frames > longest:
        raise ValueError(
            f"`num_frames` has to be at most {longest} for this motion adapter, but is {args.num_frames}."
        )

    pipe = load_pipeline(args.checkpoint)
    adapter = MotionAdapter.from_pretrained(args.motion_adapter, dtype=pipe.unet.dtype)
    # `from_pipe` creates a new UNet with motion modules on the CPU
    pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter).to(pipe.device)
    pipe.set_progress_bar_config(desc="steps")
    frames = pipe(
        f"{named(args.query)} {place}" if args.prompt is None else args.prompt,
        subject_image=reference,
        subject_query=args.query,
        subject_scale=args.scale,
        num_frames=args.num_frames,
        **call_arguments(args),
    ).frames[0]
    side = max(256, frames[0].width)  # the frames of the pocket checkpoint are too small to view
    frames = [frame.resize((side, side * frame.height // frame.width), Image.Resampling.BICUBIC) for frame in frames]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for file, export in (("animatediff.gif", export_to_gif), ("animatediff.mp4", export_to_video)):
        export(frames, str(args.output_dir / file), fps=args.fps)
        print(f"The video is in {args.output_dir / file}")


if __name__ == "__main__":
    run_script(main)
