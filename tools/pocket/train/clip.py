"""Train the CLIP of the pocket checkpoint: tokenizer, text encoder and vision encoder, on captions with colour and
design.

The real CLIP learned colours, styles and positions from hundreds of millions of captions. Here a second loss replaces
this amount of data: small heads, which are not saved, predict at each patch the thing (of several hundred emoji), its
design, its hue, and the look of people. Scenes contain one to four things of random sizes and positions. Many things
are rotated, outlined or have fewer colours, and the images are shifted, faded and have different brightness, so that
shapes are learned independently of colours and drawing styles.

`--part vision` only trains the vision encoder of the work folder. Models that use the text encoder remain valid.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from ..scenes import SceneStream, patch_cover
from ..training import Batches, options, train
from ..world import (
    ALL_DESIGNS,
    CATEGORY_NAMES,
    COLOURS,
    LOOKS,
    PLACE_NAMES,
    PLACES,
    SPLITS,
    Instance,
    Scene,
    World,
    describe,
    download_designs,
)


TEXT_WIDTH = 96
VISION_WIDTH = 192
NUM_LAYERS = 6
MOVE = 4  # pixels; the cover of the patches of 8 pixels is not adjusted
NUM_TOKENS = 32  # the longest caption has 25 tokens; 77 tokens, as in CLIP, would be slower
WORDS = "a an and of image with thing something " + " ".join(
    [*CATEGORY_NAMES, *COLOURS, *ALL_DESIGNS, *(look for _, look in LOOKS), *PLACES.values()]
)


def build_tokenizer(folder, world: World) -> CLIPTokenizer:
    """Creates a byte-pair tokenizer in the format of CLIP, with one token for each word of the pocket world."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    bpe.train_from_iterator([" ".join([WORDS, *world.others.values()])] * 3, trainer)
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
        num_attention_heads=6,
        image_size=64,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


class PatchNamer(torch.nn.Module):
    """Predicts the content of each patch: the thing (or background), its design, its hue as a direction, and the look
    of a person. Predicts the place from the class token."""

    def __init__(self, num_things: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(VISION_WIDTH)
        self.sizes = (num_things + 1, len(ALL_DESIGNS), 2, len(LOOKS))
        self.patch = torch.nn.Linear(VISION_WIDTH, sum(self.sizes))
        self.place = torch.nn.Linear(VISION_WIDTH, len(PLACES))

    def forward(self, hidden_states):
        hidden_states = self.norm(hidden_states)
        return self.patch(hidden_states[:, 1:]).split(self.sizes, -1), self.place(hidden_states[:, 0])


class Lesson(NamedTuple):
    """Scenes and their training targets: `pictures` of shape (n, 3, 64, 64), `captions` of shape (n, tokens), `places`,
    `cover` of shape (n, 4, 8, 8), and for each thing of a scene, of shape (n, 4), `things`, `designs`, `hues` (from 0
    to 1, NaN for things without a known hue) and `looks` (-1 for things that are not people)."""

    pictures: torch.Tensor
    captions: torch.Tensor
    places: torch.Tensor
    cover: torch.Tensor
    things: torch.Tensor
    designs: torch.Tensor
    hues: torch.Tensor
    looks: torch.Tensor

    @classmethod
    def of(cls, scenes: list[Scene], number: dict[str, int], captions: torch.Tensor) -> "Lesson":
        """Returns the targets of scenes. `number` is the index of each thing's name."""
        count = len(scenes)
        lesson = cls(
            pictures=torch.from_numpy(np.stack([scene.picture for scene in scenes])).permute(0, 3, 1, 2),
            captions=captions,
            places=torch.tensor([scene.place for scene in scenes]),
            cover=torch.zeros(count, 4, 8, 8),
            things=torch.full((count, 4), -1),
            designs=torch.full((count, 4), -1),
            hues=torch.full((count, 4), torch.nan),
            looks=torch.full((count, 4), -1),
        )
        for row, scene in enumerate(scenes):
            for slot, (thing, mask) in enumerate(zip(scene.instances, scene.masks, strict=True)):
                lesson.cover[row, slot] = torch.from_numpy(patch_cover(mask))
                lesson.things[row, slot] = number[thing.name]
                lesson.designs[row, slot] = thing.design
                if thing.hue is not None:
                    lesson.hues[row, slot] = thing.hue
                elif isinstance(thing, Instance):
                    lesson.looks[row, slot] = thing.variant
        return lesson


def vary(pictures: torch.Tensor, generator: torch.Generator):
    """Returns randomly shifted and faded images of shape (n, 3, 64, 64) from 0 to 1 with other brightness and
    contrast, and a mask of shape (n,) of the images with enough saturation to recognise colours. The hues do not
    change, because some are held out."""
    count = len(pictures)
    size = pictures.shape[-1]
    # the rows and columns of each shifted image; those outside of an image repeat its edge
    moves = torch.randint(-MOVE, MOVE + 1, (2, count, 1), generator=generator)
    down, right = (moves + torch.arange(size)).clamp(0, size - 1).to(pictures.device)
    which = torch.arange(count, device=pictures.device)[:, None, None]
    pictures = pictures[which, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)
    fading, light, contrast = torch.rand(3, count, 1, 1, 1, generator=generator).to(pictures.device)
    saturation = torch.where(fading < 0.4, fading * 2.5, 1.0)
    pictures = torch.lerp(pictures.mean(1, keepdim=True), pictures, saturation)
    middle = pictures.mean((1, 2, 3), keepdim=True)
    pictures = (middle + (pictures - middle) * (0.8 + 0.4 * contrast)) * (0.85 + 0.3 * light)
    return pictures.clamp(0, 1), saturation.flatten() > 0.5


def name_things(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a caption of a scene, with colours or looks in four of five cases. For three or more things it names one
    or all."""
    named = list(scene.instances)
    if len(named) > 2 and rng.random() < 0.5:
        named = [named[rng.integers(len(named))]]
    words = [thing.words if rng.random() < 0.8 else f"{ALL_DESIGNS[thing.design]} {thing.name}" for thing in named]
    rng.shuffle(words)
    return describe(words, PLACE_NAMES[scene.place])


def main():
    parser = options(__doc__, max_train_steps=8000, train_batch_size=32, learning_rate=1e-3, ema_decay=0.995)
    parser.add_argument("--part", choices=("all", "vision"), default="all")
    parser.add_argument("--split", choices=SPLITS, default="wide", help="split whose held-out instances are not drawn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    download_designs(args.work_dir / "designs")
    world = World(args.work_dir / "designs")
    stream = SceneStream(
        world,
        args.split,
        (0.2, 0.35, 0.25, 0.2),
        varied_share=0.85,
        others_share=0.35,
        kin_share=0.15,
        restyled_share=0.5,
    )
    number = {name: index for index, name in enumerate(dict.fromkeys([*CATEGORY_NAMES, *world.others.values()]))}
    folder = args.work_dir / "clip"
    folder.mkdir(exist_ok=True)
    alone = args.part == "vision"
    tokenizer = CLIPTokenizer.from_pretrained(folder) if alone else build_tokenizer(folder, world)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    clip, namer = CLIPModel.from_pretrained(folder) if alone else build(tokenizer), PatchNamer(len(number))
    clip.train().to(args.device)
    namer.to(args.device)
    if alone:
        clip.text_model.requires_grad_(False)
    mean, std = (
        torch.tensor(s, device=args.device).view(3, 1, 1) for s in (processor.image_mean, processor.image_std)
    )
    # lower weight for the background, which most patches show
    thing_weights = torch.tensor([1.0] * len(number) + [0.1], device=args.device)

    def prepare(turn):
        rng = np.random.default_rng([args.seed, turn])
        scenes = stream.draw(rng, args.train_batch_size)
        texts = [name_things(scene, rng) for scene in scenes]
        return Lesson.of(
            scenes, number, tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        )

    lessons = Batches(prepare, args, lambda lesson: tuple(part.to(args.device) for part in lesson))

    def contrast_loss(captions, pooled):
        text = clip.text_model(input_ids=captions).pooler_output
        text = F.normalize(clip.text_projection(text), dim=-1)
        image = F.normalize(clip.visual_projection(pooled), dim=-1)
        logits = clip.logit_scale.clamp(max=4.6).exp() * text @ image.T
        target = torch.arange(len(captions), device=args.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, (logits.argmax(1) == target).float().mean()

    def loss_fn(generator):
        known = Lesson(*lessons(generator))
        pictures, coloured = vary(known.pictures.float() / 255, generator)
        vision = clip.vision_model(pixel_values=(pictures - mean) / std)
        (thing, design, hue, look), place = namer(vision.last_hidden_state)
        share, slot = known.cover.flatten(2).max(1)
        shown = share > 0.3
        things, designs, hues, looks = (
            each.gather(1, slot) for each in (known.things, known.designs, known.hues, known.looks)
        )
        things = torch.where(shown, things, len(number))
        with_hue = shown & coloured[:, None] & hues.isfinite()
        angle = 2 * torch.pi * hues[with_hue]
        loss = F.cross_entropy(thing.flatten(0, 1), things.flatten(), weight=thing_weights)
        loss = loss + 0.5 * F.cross_entropy(design[shown], designs[shown])
        loss = loss + 2 * F.mse_loss(hue[with_hue], torch.stack([angle.cos(), angle.sin()], -1))
        person = shown & coloured[:, None] & (looks >= 0)
        # without people, the mean of no patch would be NaN
        loss = loss + 0.3 * F.cross_entropy(look[person], looks[person], reduction="sum") / person.sum().clamp(min=1)
        loss = loss + 0.2 * F.cross_entropy(place, known.places)
        ours = shown & (things < len(CATEGORY_NAMES))
        off = torch.atan2(hue[with_hue][:, 1], hue[with_hue][:, 0]) - angle
        metrics = {
            "thing": (thing.argmax(-1) == things)[shown].float().mean(),
            "category": (thing.argmax(-1) == things)[ours].float().mean(),
            "design": (design.argmax(-1)[shown] == designs[shown]).float().mean(),
            "hue": (off.cos() > 0.866).float().mean(),
        }
        if not alone:
            contrast, metrics["matched"] = contrast_loss(known.captions, vision.pooler_output)
            loss = loss + contrast
        return loss, metrics

    train("vision" if alone else "clip", args, {"clip": clip, "namer": namer}, loss_fn)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
