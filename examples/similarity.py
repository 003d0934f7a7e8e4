"""Similarity metrics that papers on subject-driven generation use: the cosine similarity of DINO features (DINO score)
and of CLIP features (CLIP-I between images, CLIP-T between an image and a text)."""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers_ssr.images_ssr import preprocess
from PIL import Image
from transformers import AutoModel, CLIPImageProcessor, CLIPModel, CLIPTokenizer


BATCH_SIZE = 16


class ImageFeatures:
    """
    Computes normalized feature vectors of images.

    Args:
        model (`torch.nn.Module`): a vision model.
        processor (`CLIPImageProcessor`): the image sizes and normalization. Images are center-cropped.
    """

    def __init__(self, model: torch.nn.Module, processor: CLIPImageProcessor):
        self.model = model.eval()
        self.processor = processor

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns features of shape `(batch_size, width)` for pixels of shape `(batch_size, 3, height, width)`."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Returns normalized features of shape `(num_images, width)`."""
        features = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            pixels = torch.cat([preprocess(image, self.processor, "crop") for image in batch])
            features.append(self.features(pixels.to(self.model.device, self.model.dtype)).float().cpu())
        return F.normalize(torch.cat(features), dim=-1)


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
    """The projected CLIP features of images and texts, for example from `openai/clip-vit-base-patch32`."""

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
        for text in set(texts):
            tokens = self.tokenizer(text).input_ids
            if len(tokens) > length:
                removed = self.tokenizer.decode(tokens[length - 1 : -1])
                print(f"CLIP reads at most {length} tokens, so this part was cut: {removed}", file=sys.stderr)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        features = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return F.normalize(features.float().cpu(), dim=-1)


def mean_pairwise(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the mean cosine similarity over all pairs of a vector from `first` and a vector from `second`."""
    return (first @ second.T).mean().item()


def mean_matching(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the mean cosine similarity of the vectors with the same index."""
    return (first * second).sum(-1).mean().item()


def selection(generated: torch.Tensor, queried: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """
    Measures whether generated images show the queried subject and not another subject of the reference.

    Args:
        generated (`torch.Tensor` of shape `(num_images, width)`): features of the generated images.
        queried (`torch.Tensor` of shape `(1, width)`): features of the queried subject, cropped from the reference.
        others (`torch.Tensor` of shape `(num_others, width)`): features of the other subjects of the reference.

    Returns:
        `dict`: the mean similarity to the queried subject, the mean similarity to the most similar other subject, the
        difference of both, and the share of generated images that are more similar to the queried subject.
    """
    own = (generated @ queried.T)[:, 0]
    other = (generated @ others.T).max(1).values
    return {
        "queried": own.mean().item(),
        "other": other.mean().item(),
        "difference": (own - other).mean().item(),
        "selected": (own > other).float().mean().item(),
    }
