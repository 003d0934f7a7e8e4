"""Similarity of pictures and texts, as in papers on subject-driven generation: cosines between features of DINO (DINO score)
and of CLIP (CLIP-I between pictures, CLIP-T between picture and text)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers_ssr.image_processing_ssr import preprocess
from PIL import Image
from transformers import AutoModel, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModel


class ImageFeatures(ABC):
    """
    Unit vectors of pictures.

    Args:
        model (`torch.nn.Module`): a vision model.
        processor (`CLIPImageProcessor`): its sizes and normalisation; the centre is cropped.
        batch_size (`int`): pictures at a time.
    """

    def __init__(self, model: torch.nn.Module, processor: CLIPImageProcessor, batch_size: int = 16):
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size

    @abstractmethod
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of `(batch_size, 3, height, width)`, the vectors `(batch_size, width)`."""

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """`(num_pictures, width)`, each of length 1."""
        found = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            pixels = torch.cat([preprocess(picture, self.processor, "crop") for picture in batch])
            found.append(self.features(pixels.to(self.model.device, self.model.dtype)).float().cpu())
        return F.normalize(torch.cat(found), dim=-1)


class DinoFeatures(ImageFeatures):
    """The class token after the last layer norm of a DINO ViT (`facebook/dino-vits16`, or DINOv2). As in DINO's own
    evaluation, the shorter side is scaled to 8/7 of the model's and the centre cropped, with ImageNet's mean and deviation."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str | torch.device = "cpu") -> "DinoFeatures":
        """By name or from a folder."""
        model = AutoModel.from_pretrained(name_or_path).to(device)
        side = model.config.image_size
        processor = CLIPImageProcessor(
            size={"shortest_edge": round(side * 8 / 7)}, crop_size={"height": side, "width": side},
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
        )  # fmt: skip
        return cls(model, processor)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


class ClipFeatures(ImageFeatures):
    """CLIP's projected features of pictures and texts (`openai/clip-vit-base-patch32`, say)."""

    tokenizer: CLIPTokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str | torch.device = "cpu") -> "ClipFeatures":
        """By name or from a folder."""
        model = CLIPModel.from_pretrained(name_or_path).to(device)
        features = cls(model, CLIPImageProcessor.from_pretrained(name_or_path))
        features.tokenizer = CLIPTokenizer.from_pretrained(name_or_path)
        return features

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """`(num_texts, width)`, each of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        found = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return F.normalize(found.float().cpu(), dim=-1)


class ClipVisionFeatures(ImageFeatures):
    """The pooled output of a CLIP vision model that comes without a projection, such as an SSR pipeline's own."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str | torch.device = "cpu") -> "ClipVisionFeatures":
        """By name or from a folder, which may be one that `load_ssr` takes."""
        part = Path(name_or_path) / "ssr_image_encoder"
        encoder, processor = (part, part.with_name("ssr_image_processor")) if part.is_dir() else (name_or_path,) * 2
        model = CLIPVisionModel.from_pretrained(encoder, dtype=torch.float32).to(device)
        return cls(model, CLIPImageProcessor.from_pretrained(processor))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).pooler_output


def mean_pairwise(first: torch.Tensor, second: torch.Tensor) -> float:
    """The mean cosine over all pairs of a vector from either."""
    return (first @ second.T).mean().item()


def mean_matching(first: torch.Tensor, second: torch.Tensor) -> float:
    """The mean cosine over vectors at the same place."""
    return (first * second).sum(-1).mean().item()


def selection(drawn: torch.Tensor, queried: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """
    Whether drawings show the subject that was queried, not another one of the reference.

    Args:
        drawn (`torch.Tensor` of shape `(num_pictures, width)`): of the drawings.
        queried (`torch.Tensor` of shape `(1, width)`): of the queried subject, cut out of the reference.
        others (`torch.Tensor` of shape `(num_others, width)`): of the reference's other subjects.

    Returns:
        `dict`: the similarity to the queried one, that to the nearest other one, their difference, and the share of
        drawings that are nearer to the queried one.
    """
    own = (drawn @ queried.T)[:, 0]
    other = (drawn @ others.T).max(1).values
    return {
        "queried": own.mean().item(),
        "other": other.mean().item(),
        "difference": (own - other).mean().item(),
        "selected": (own > other).float().mean().item(),
    }
