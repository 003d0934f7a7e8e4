"""The trained base model of a work folder, and functions shared by all models that are trained on top of it."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .codes import load_codes
from .training import picture_array
from .world import PLACE_NAMES, Instance, Other, describe


def caption(instances: list[Instance | Other], place: int, rng: np.random.Generator) -> str:
    """Returns a random kind of caption for a scene: with plain names, with colors and designs, without the names of
    the things, or empty."""
    kind = rng.random()
    if kind < 0.1:
        return ""
    shuffled = [instances[i] for i in rng.permutation(len(instances))]
    things = [i.words if kind < 0.65 else "thing" if kind > 0.85 else i.name for i in shuffled]
    return describe(things, PLACE_NAMES[place] if rng.random() < 0.95 else None)


@torch.no_grad()
def encode_texts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: list[str]) -> torch.Tensor:
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    parts = tokens.input_ids.to(text_encoder.device).split(1024)
    return torch.cat([text_encoder(part).last_hidden_state for part in parts])


def draw_noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns noise of the shape and on the device of a tensor. On a GPU it comes from the global generator, which
    `training.train` seeds before each step, because the CPU would take longer for it than the GPU for the step."""
    return torch.randn_like(like) if like.is_cuda else torch.randn(like.shape, generator=generator)


def diffusion_loss(scheduler, model, latents, importance, generator, steps=None, **conditions) -> torch.Tensor:
    """Mean squared error of the predicted velocity, with the channels weighted by `importance`. The timesteps are
    drawn uniformly if `steps` is `None`. `latents` have shape (batch_size, channels, ...), and `model` is called like
    a UNet."""
    noise = draw_noise(latents, generator)
    if steps is None:
        steps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    steps = steps.to(latents.device)
    predicted = model(scheduler.add_noise(latents, noise, steps), steps, **conditions)[0]
    squared = (predicted - scheduler.get_velocity(latents, noise, steps)).square()
    return (squared * importance.view(1, -1, *[1] * (latents.ndim - 2))).mean()


class Base:
    """The frozen base model in `work_dir`, with its components, its latent codes and its loss."""

    def __init__(self, work_dir: Path, device: str = "cpu"):
        self.tokenizer = CLIPTokenizer.from_pretrained(work_dir / "clip")
        self.text_encoder = CLIPTextModel.from_pretrained(work_dir / "clip").eval().requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(work_dir / "vae").eval().requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(work_dir / "unet").eval().requires_grad_(False)
        self.scheduler = DDIMScheduler.from_pretrained(work_dir / "scheduler")
        self.codes = load_codes(work_dir).to(device)
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(device)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return encode_texts(self.tokenizer, self.text_encoder, texts)

    def loss(self, model, latents, generator, **kwargs) -> torch.Tensor:
        return diffusion_loss(self.scheduler, model, latents, self.codes.importance(), generator, **kwargs)

    def pipeline(self, pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline, **components):
        """Creates a pipeline from the base model and additional components."""
        arguments = {
            "vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer, "unet": self.unet,
            "scheduler": self.scheduler, "feature_extractor": None,
        }  # fmt: skip
        if "motion_adapter" not in components:  # AnimateDiff has no safety checker
            arguments.update(safety_checker=None, requires_safety_checker=False)
        pipe = pipeline_class(**{**arguments, **components})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe, prompts: list[str], **kwargs) -> np.ndarray:
        """Generates images with a pipeline, as uint8 of shape (n, 64, 64, 3)."""
        settings = {"num_inference_steps": 20, "guidance_scale": 3.0, **kwargs}
        images = pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
        return picture_array(images * 2 - 1)
