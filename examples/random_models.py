"""Models with the sizes of Stable Diffusion 1.5 and random weights, which do not affect FLOPs, memory or time."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel


POCKET = Path(__file__).resolve().parent.parent / "pocket"


def random_model(make: Callable[[], nn.Module]) -> nn.Module:
    """Creates a large model with random weights of a typical magnitude, faster than its own initialization."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
        else:
            limit = (3 / parameter[0].numel()) ** 0.5
            parameter.data.uniform_(-limit, limit, generator=generator)
    for name, buffer in model.named_buffers():
        positions = name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1])[None] if positions else torch.zeros(()))
    return model


def sd15_pipeline() -> StableDiffusionSSRPipeline:
    """Creates a pipeline with the sizes of SD 1.5 and CLIP ViT-L/14 and random weights. The tokenizer is taken from
    the pocket checkpoint, with a length of 77 tokens as in SD 1.5."""
    tokenizer = CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return StableDiffusionSSRPipeline(
        vae=random_model(lambda: AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=4, **blocks)),
        text_encoder=random_model(lambda: CLIPTextModel(text)),
        tokenizer=tokenizer,
        unet=random_model(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768)),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        ssr_encoder=random_model(SSREncoder),
        ssr_image_encoder=random_model(lambda: CLIPVisionModel(vision)),
    )


def pocket_pipeline() -> StableDiffusionSSRPipeline:
    return StableDiffusionSSRPipeline.from_pretrained(POCKET, trust_remote_code=True)


PIPELINES = {"sd15": sd15_pipeline, "pocket": pocket_pipeline}


def motion_adapter(unet: UNet2DConditionModel) -> MotionAdapter:
    """Creates an AnimateDiff motion adapter that fits the UNet."""
    config = unet.config
    return MotionAdapter(
        block_out_channels=tuple(config.block_out_channels), motion_layers_per_block=config.layers_per_block
    )
