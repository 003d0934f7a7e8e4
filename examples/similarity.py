"""Similarity metrics that papers on subject-driven generation use: the cosine similarity of DINO features (DINO score)
and of CLIP features (CLIP-I between pictures, CLIP-T between a picture and a text)."""

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
    Computes normalized feature vectors of pictures.

    Args:
        model (`torch.nn.Module`): a vision model.
        processor (`CLIPImageProcessor`): the image sizes and normalization. Pictures are center-cropped.
        batch_size (`int`): the number of pictures in a batch.
    """

    def __init__(self, model: torch.nn.Module, processor: CLIPImageProcessor, batch_size: int = 16):
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size

    @abstractmethod
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns features of shape `(batch_size, width)` for pixels of shape `(batch_size, 3, height, width)`."""

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Returns normalized features of shape `(num_pictures, width)`."""
        found = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            pixels = torch.cat([preprocess(picture, self.processor, "crop") for picture in batch])
            found.append(self.features(pixels.to(self.model.device, self.model.dtype)).float().cpu())
        return F.normalize(torch.cat(found), dim=-1)


class DinoFeatures(ImageFeatures):
    """The class token after the last layer norm of a DINO ViT (`facebook/dino-vits16`, or DINOv2). As in the official
    DINO evaluation, the shorter side is scaled to 8/7 of the model's image size, the center is cropped, and pixels are
    normalized with the mean and standard deviation of ImageNet."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str | torch.device = "cpu") -> "DinoFeatures":
        """Loads the model from the Hub or from a folder."""
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
    """The projected CLIP features of pictures and texts, for example from `openai/clip-vit-base-patch32`."""

    tokenizer: CLIPTokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str | torch.device = "cpu") -> "ClipFeatures":
        """Loads the model from the Hub or from a folder."""
        model = CLIPModel.from_pretrained(name_or_path).to(device)
        features = cls(model, CLIPImageProcessor.from_pretrained(name_or_path))
        features.tokenizer = CLIPTokenizer.from_pretrained(name_or_path)
        return features

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns normalized features of shape `(num_texts, width)`."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        found = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return F.normalize(found.float().cpu(), dim=-1)


class ClipVisionFeatures(ImageFeatures):
    """The pooled output of a CLIP vision model without a projection, such as the image encoder of an SSR pipeline."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str | torch.device = "cpu") -> "ClipVisionFeatures":
        """Loads the model from the Hub or from a folder, which can also be a folder for `load_ssr`."""
        part = Path(name_or_path) / "ssr_image_encoder"
        encoder, processor = (part, part.with_name("ssr_image_processor")) if part.is_dir() else (name_or_path,) * 2
        model = CLIPVisionModel.from_pretrained(encoder, dtype=torch.float32).to(device)
        return cls(model, CLIPImageProcessor.from_pretrained(processor))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).pooler_output


def mean_pairwise(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the mean cosine similarity over all pairs of a vector from `first` and a vector from `second`."""
    return (first @ second.T).mean().item()


def mean_matching(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the mean cosine similarity of the vectors with the same index."""
    return (first * second).sum(-1).mean().item()


def selection(drawn: torch.Tensor, queried: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """
    Measures whether drawn pictures show the queried subject and not another subject of the reference.

    Args:
        drawn (`torch.Tensor` of shape `(num_pictures, width)`): features of the drawn pictures.
        queried (`torch.Tensor` of shape `(1, width)`): features of the queried subject, cropped from the reference.
        others (`torch.Tensor` of shape `(num_others, width)`): features of the other subjects of the reference.

    Returns:
        `dict`: the mean similarity to the queried subject, the mean similarity to the most similar other subject, the
        difference of both, and the share of drawn pictures that are more similar to the queried subject.
    """
    own = (drawn @ queried.T)[:, 0]
    other = (drawn @ others.T).max(1).values
    return {
        "queried": own.mean().item(),
        "other": other.mean().item(),
        "difference": (own - other).mean().item(),
        "selected": (own > other).float().mean().item(),
    }
