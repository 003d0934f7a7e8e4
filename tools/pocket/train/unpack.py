"""Create a work folder from the checkpoint in pocket/, to continue the training of a part or to train a new part on
it."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from diffusers_ssr import SSREncoder
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from ..codes import Codes
from ..methods import ROOT
from ..scenes import SceneStream, draw_pictures
from ..training import picture_tensor
from ..world import World, download_designs


def _inner(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state dict of a text or vision model without the prefix that some versions of transformers add."""
    return {name.split("_model.", 1)[-1]: tensor for name, tensor in model.state_dict().items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "pocket")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pocket-training"))
    args = parser.parse_args()
    shipped, output = args.checkpoint, args.work_dir
    output.mkdir(parents=True, exist_ok=True)
    models = {
        "vae": AutoencoderKL, "unet": UNet2DConditionModel, "controlnet": ControlNetModel, "motion_adapter": MotionAdapter,
    }  # fmt: skip
    for name, model in models.items():
        model.from_pretrained(shipped, subfolder=name, dtype=torch.float32).save_pretrained(output / name)
    encoder = SSREncoder.from_pretrained(shipped, subfolder="ssr_encoder", dtype=torch.float32)
    encoder.save_pretrained(output / "shipped" / "ssr" / "ssr_encoder")
    DDIMScheduler.from_pretrained(shipped, subfolder="scheduler").save_pretrained(output / "scheduler")
    clip = output / "clip"
    text = CLIPTextModel.from_pretrained(shipped, subfolder="text_encoder", dtype=torch.float32)
    vision = CLIPVisionModel.from_pretrained(shipped, subfolder="ssr_image_encoder", dtype=torch.float32)
    both = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.config.to_dict()))
    # the checkpoint does not contain the projections for matching images with captions, because they are not used
    both.load_state_dict({f"text_model.{n}": t for n, t in _inner(text).items()}, strict=False)
    both.load_state_dict({f"vision_model.{n}": t for n, t in _inner(vision).items()}, strict=False)
    both.save_pretrained(clip)
    CLIPTokenizer.from_pretrained(shipped, subfolder="tokenizer").save_pretrained(clip)
    CLIPImageProcessor.from_pretrained(shipped, subfolder="ssr_image_processor").save_pretrained(clip)
    judge = load_file(shipped / "judge" / "model.safetensors")
    (output / "judge").mkdir(exist_ok=True)
    save_file(judge, output / "judge" / "model.safetensors")

    # the codes that the autoencoder was trained on are the linear codes that are nearest to its latents
    download_designs(output / "designs")
    stream = SceneStream(World(output / "designs"), "all", varied_share=0.0)
    pictures, vae = draw_pictures(stream, 3000, (0,)), AutoencoderKL.from_pretrained(output / "vae")
    with torch.no_grad():
        parts = (pictures[start : start + 250] for start in range(0, len(pictures), 250))
        latents = torch.cat([vae.encode(picture_tensor(part)).latent_dist.mode() for part in parts])
    codes = Codes.from_latents(pictures, latents)
    codes.save(output / "codes.safetensors")
    error = (codes.encode(pictures) - latents).square().mean() / latents.var()
    print(f"{output} contains the checkpoint; linear codes miss {100 * error:.1f} % of the variance of its latents")


if __name__ == "__main__":
    main()
