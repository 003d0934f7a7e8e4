"""Train the pocket's CLIP: tokenizer, text encoder and vision encoder, on rich captions (colour and design named).

The real CLIP learned colours, styles and where things are from hundreds of millions of captions. Here a second loss stands
in for that scale: small heads, thrown away afterwards, name category, design and variant at each patch. Pictures come flipped,
moved, faded and in other light, so that shapes are learned apart from colours: an instance that was held out is a known
design in a known colour, and only the two together are new.

`--part vision` trains the vision encoder alone, further or from nothing: models that were trained on the text encoder stay valid.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from ..scenes import load_scenes
from ..training import options, train
from ..world import CATEGORY_NAMES, COLOURS, DESIGNS, INSTANCES, LOOKS, NUM_VARIANTS, PLACE_NAMES, PLACES, describe


TEXT_WIDTH = 96
VISION_WIDTH = 128
NUM_LAYERS = 6
MOVE = 4  # pixels; covers are by patches of 8, and stay as they are
NUM_TOKENS = 32  # the longest caption has 25; CLIP's 77 would only cost time here
WORDS = "a an and of picture with thing something " + " ".join(
    [*CATEGORY_NAMES, *COLOURS, *DESIGNS, *(look for _, look in LOOKS), *PLACES.values()]
)


def build_tokenizer(folder) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's form in which every word of the world is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    bpe.train_from_iterator([WORDS] * 3, trainer)
    bpe.model.save(str(folder))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=NUM_TOKENS, pad_token="<|endoftext|>")


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=NUM_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


class PatchNamer(torch.nn.Module):
    """Names what each patch shows: category (or background), design, variant; and the place from the class token."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(VISION_WIDTH)
        self.sizes = (len(CATEGORY_NAMES) + 1, len(DESIGNS), NUM_VARIANTS)
        self.patch = torch.nn.Linear(VISION_WIDTH, sum(self.sizes))
        self.place = torch.nn.Linear(VISION_WIDTH, len(PLACES))

    def forward(self, hidden_states):
        hidden_states = self.norm(hidden_states)
        return self.patch(hidden_states[:, 1:]).split(self.sizes, -1), self.place(hidden_states[:, 0])


def vary(pictures: torch.Tensor, cover: torch.Tensor, generator: torch.Generator):
    """Pictures (n, 3, 64, 64) from 0 to 1 as a photographer could have taken them as well, their covers (n, 3, 8, 8), and
    which of them kept enough colour to name it, (n,). Hues never change: some of them are held out."""
    count = len(pictures)
    flipped = torch.rand(count, generator=generator) < 0.5
    pictures = torch.where(flipped[:, None, None, None], pictures.flip(-1), pictures)
    cover = torch.where(flipped[:, None, None, None], cover.flip(-1), cover)
    padded = F.pad(pictures, (MOVE,) * 4, mode="replicate")
    down, right = torch.randint(2 * MOVE + 1, (2, count), generator=generator).tolist()
    size = pictures.shape[-1]
    pictures = torch.stack([p[:, y : y + size, x : x + size] for p, y, x in zip(padded, down, right, strict=True)])
    fading, light, contrast = torch.rand(3, count, 1, 1, 1, generator=generator)
    saturation = torch.where(fading < 0.4, fading * 2.5, 1.0)
    pictures = torch.lerp(pictures.mean(1, keepdim=True), pictures, saturation)
    middle = pictures.mean((1, 2, 3), keepdim=True)
    pictures = (middle + (pictures - middle) * (0.8 + 0.4 * contrast)) * (0.85 + 0.3 * light)
    return pictures.clamp(0, 1), cover, saturation.flatten() > 0.5


def main():
    parser = options(__doc__, max_train_steps=5000, train_batch_size=32, learning_rate=1e-3, ema_decay=0.995)
    parser.add_argument("--part", choices=("all", "vision"), default="all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes = load_scenes(args.work_dir)
    folder = args.work_dir / "clip"
    folder.mkdir(exist_ok=True)
    alone = args.part == "vision"
    tokenizer = CLIPTokenizer.from_pretrained(folder) if alone else build_tokenizer(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    clip, namer = CLIPModel.from_pretrained(folder) if alone else build(tokenizer), PatchNamer()
    clip.train()
    if alone:
        clip.text_model.requires_grad_(False)
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (processor.image_mean, processor.image_std))
    # most patches show background
    category_weights = torch.tensor([1.0] * len(CATEGORY_NAMES) + [0.1])
    attributes = torch.tensor([(i.category, i.design, i.variant) for i in INSTANCES])

    def captions(rows, rng):
        texts = []
        for row in rows:
            present = [INSTANCES[n] for n in scenes.instances[row] if n >= 0]
            things = [i.words if rng.random() < 0.8 else i.name for i in present]
            rng.shuffle(things)
            texts.append(describe(things, PLACE_NAMES[scenes.places[row]]))
        return texts

    several = np.flatnonzero(scenes.counts > 1)

    def loss_fn(generator):
        half = args.train_batch_size // 2
        rows = torch.randint(len(scenes), (args.train_batch_size,), generator=generator).numpy()
        rows[:half] = several[torch.randint(len(several), (half,), generator=generator).numpy()]
        rng = np.random.default_rng(int(rows.sum()))
        pictures = torch.from_numpy(scenes.pictures[rows]).permute(0, 3, 1, 2).float() / 255
        cover = torch.from_numpy(scenes.cover[rows]).float() / 255
        pictures, cover, coloured = vary(pictures, cover, generator)
        pixels = (pictures - mean) / std
        tokens = tokenizer(captions(rows, rng), padding="max_length", truncation=True, return_tensors="pt")
        text = clip.text_model(input_ids=tokens.input_ids).pooler_output
        vision = clip.vision_model(pixel_values=pixels)
        text = F.normalize(clip.text_projection(text), dim=-1)
        image = F.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        logits = clip.logit_scale.clamp(max=4.6).exp() * text @ image.T
        target = torch.arange(len(rows))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        (category, design, variant), place = namer(vision.last_hidden_state)
        share, slot = cover.flatten(2).max(1)
        numbers = torch.from_numpy(scenes.instances[rows]).clamp(min=0).gather(1, slot)
        shown = share > 0.3
        names = torch.where(shown, attributes[numbers][..., 0], len(CATEGORY_NAMES))
        naming = F.cross_entropy(category.flatten(0, 1), names.flatten(), weight=category_weights)
        naming = naming + F.cross_entropy(design[shown], attributes[numbers][shown][:, 1])
        named = shown & coloured[:, None]
        naming = naming + F.cross_entropy(variant[named], attributes[numbers][named][:, 2])
        naming = naming + 0.2 * F.cross_entropy(place, torch.from_numpy(scenes.places[rows]))
        metrics = {
            "contrast": contrast.item(),
            "matched": (logits.argmax(1) == target).float().mean().item(),
            "category": (category.argmax(-1) == names)[shown].float().mean().item(),
            "design": (design.argmax(-1)[shown] == attributes[numbers][shown][:, 1]).float().mean().item(),
            "variant": (variant.argmax(-1)[named] == attributes[numbers][named][:, 2]).float().mean().item(),
        }
        return contrast + naming, metrics

    train("clip", args, {"clip": clip, "namer": namer}, loss_fn)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
