"""Train the second style of the pocket checkpoint as a LoRA of the base model: faded instant photographs in a white
frame.

Fused into the UNet, it replaces a community checkpoint: another UNet with the same architecture and another style.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ..base import Base, caption
from ..pictures import as_photograph
from ..scenes import SceneStream
from ..training import Batches, options, train
from ..world import CATEGORY_NAMES, PLACE_NAMES, SPLITS, World, describe, sheet


def add_lora(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """Adds a trainable LoRA to the attention and convolution layers of a frozen UNet."""
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2", "conv1", "conv2", "conv_out"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    print(f"LoRA: {sum(p.numel() for p in unet.parameters() if p.requires_grad) / 1e6:.2f} M parameters")
    return unet.train()


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def main():
    parser = options(__doc__, max_train_steps=3000, train_batch_size=10, learning_rate=1e-3, sample_steps=500)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--split", choices=SPLITS, default="wide", help="split whose held-out instances are not drawn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base = Base(args.work_dir, args.device)
    scenes = SceneStream(World(args.work_dir / "designs"), args.split, varied_share=0.25)
    unet = add_lora(base.unet, args.rank)

    def prepare(number):
        rng = np.random.default_rng([args.seed, number])
        drawn = scenes.draw(rng, args.train_batch_size)
        pictures = as_photograph(np.stack([scene.picture for scene in drawn]))
        return pictures, [caption(scene.instances, scene.place, rng) for scene in drawn]

    def move(samples):
        pictures, texts = samples
        return base.codes.encode(pictures), base.encode_texts(texts)

    batches = Batches(prepare, args, move)

    def loss_fn(generator):
        latents, states = batches(generator)
        return base.loss(unet, latents, generator, encoder_hidden_states=states), {}

    def sample_fn(file):
        prompts = [describe([c], PLACE_NAMES[i % len(PLACE_NAMES)]) for i, c in enumerate(CATEGORY_NAMES)]
        sheet(list(base.draw(base.pipeline(), prompts)), 6).save(file)

    train("look", args, {"unet": unet}, loss_fn, sample_fn)
    save_lora(unet, args.work_dir / "look")


if __name__ == "__main__":
    main()
