"""Train the pocket's second look as a LoRA on the base model: faded instant photographs in a white frame.

Fused into the UNet it is the pocket's "community checkpoint": another UNet of the same layout that draws everything its way.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ..base import Base, caption
from ..pictures import as_photograph
from ..scenes import load_scenes
from ..training import options, train
from ..world import CATEGORY_NAMES, PLACE_NAMES, describe, sheet


def add_lora(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """Put a trainable LoRA into the attention and convolution layers of a frozen UNet."""
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2", "conv1", "conv2", "conv_out"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    print(f"LoRA: {sum(p.numel() for p in unet.parameters() if p.requires_grad) / 1e6:.2f} M parameters")
    return unet.train()


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def main():
    parser = options(__doc__, max_train_steps=3000, train_batch_size=10, learning_rate=1e-3, sample_steps=500)
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base, scenes = Base(args.work_dir), load_scenes(args.work_dir)
    unet = add_lora(base.unet, args.rank)

    def loss_fn(generator):
        rows = torch.randint(len(scenes), (args.train_batch_size,), generator=generator).numpy()
        rng = np.random.default_rng(int(rows.sum()))
        texts = [caption(scenes.instances_of(row), scenes.places[row], rng) for row in rows]
        latents = base.codes.encode(as_photograph(scenes.pictures[rows]))
        return base.loss(unet, latents, generator, encoder_hidden_states=base.encode_texts(texts)), {}

    def sample_fn(file):
        prompts = [describe([c], PLACE_NAMES[i % len(PLACE_NAMES)]) for i, c in enumerate(CATEGORY_NAMES)]
        sheet(list(base.draw(base.pipeline(), prompts)), 6).save(file)

    train("look", args, {"unet": unet}, loss_fn, sample_fn)
    save_lora(unet, args.work_dir / "look")


if __name__ == "__main__":
    main()
