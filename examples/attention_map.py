"""Show where each query looks in the reference image. Run it in the folder of the repository."""

import argparse
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="pocket", help="folder or repository with base model and SSR-Encoder")
    add("--reference", default="pocket/references/1_cat_car.png", help="file or URL of the reference image")
    add("--query", nargs="+", default=["cat", "car"], help="things in the reference image")
    add("--output_dir", type=Path, default=Path("outputs"), help="where the image is written")
    args = parser.parse_args()

    # imported after the options are read, so that --help does not wait
    from diffusers.utils import load_image, make_image_grid
    from diffusers_ssr import StableDiffusionSSRPipeline

    pipe = StableDiffusionSSRPipeline.from_pretrained(args.checkpoint, trust_remote_code=True)
    reference = load_image(args.reference)
    maps = [pipe.subject_attention_map(reference, query=query).overlay() for query in args.query]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    make_image_grid([reference, *maps], 1, 1 + len(maps), resize=256).save(args.output_dir / "attention_map.png")


if __name__ == "__main__":
    main()
