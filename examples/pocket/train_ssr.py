"""Train the pocket's SSR-Encoder on the frozen pocket base model (section 3.4 of the paper).

A sample is a pair of scenes: a reference with two or three subjects, of which one is queried, and a target that shows that
very instance elsewhere. A tenth of the samples has no subject (empty query, zeros), as the unconditional branch does. A third
of the rest says it with a mask, and with an empty query or a caption of the whole reference.
"""

from pathlib import Path

import numpy as np
import torch
from base import Base, caption
from codes import load_latents
from diffusers import UNet2DConditionModel
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline
from diffusers_ssr.attention_processors import SubjectConditions, subject_in_unet
from diffusers_ssr.modeling_ssr import consistency_loss
from judge import load_judge
from scenes import load_scenes
from training import options, train
from transformers import CLIPImageProcessor, CLIPVisionModel
from world import INSTANCES, PLACE_NAMES, describe, sheet


def build(trained: Path, unet: UNet2DConditionModel, vision: CLIPVisionModel) -> SSREncoder:
    """The encoder that was trained already, if there is one, or a new one whose layers' keys and values start as the
    text's."""
    if trained.exists():
        return SSREncoder.from_pretrained(trained)
    layers = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    order = [name.removesuffix(".processor") for name in unet.attn_processors]
    layers = {name: layers[name] for name in order if name in layers}
    encoder = SSREncoder(
        cross_attention_dim=unet.config.cross_attention_dim,
        vision_hidden_size=vision.config.hidden_size,
        inner_dim=128,
        num_attention_heads=4,
        image_levels=tuple(range(1, vision.config.num_hidden_layers + 1)),
        attention_layers={name: layer.inner_dim for name, layer in layers.items()},
    )
    for name, layer in layers.items():
        pair = encoder.layers[name.replace(".", "_")]
        pair["to_k"].weight.data.copy_(layer.to_k.weight)
        pair["to_v"].weight.data.copy_(layer.to_v.weight)
    return encoder


def main():
    parser = options(__doc__, max_train_steps=27000, train_batch_size=10, learning_rate=1e-3, sample_steps=500)
    parser.add_argument("--prompt_dropout", type=float, default=0.5)
    parser.add_argument("--consistency_weight", type=float, default=5e-4)
    parser.add_argument("--mask_weight", type=float, default=3.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes = load_scenes(args.work_dir)
    base = Base(args.work_dir)
    unet = base.unet
    vision = CLIPVisionModel.from_pretrained(args.work_dir / "clip").eval().requires_grad_(False)
    processor = CLIPImageProcessor.from_pretrained(args.work_dir / "clip")
    latents = load_latents(args.work_dir, scenes)
    encoder = build(args.work_dir / "ssr_encoder", unet, vision).train()
    print(f"SSR-Encoder: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters")
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (processor.image_mean, processor.image_std))

    singles = [[] for _ in INSTANCES]
    for row in np.flatnonzero(scenes.counts == 1):
        singles[scenes.instances[row, 0]].append(row)

    several = np.flatnonzero(scenes.counts > 1)

    def loss_fn(generator):
        size = args.train_batch_size
        rows = several[torch.randint(len(several), (size,), generator=generator).numpy()]
        rng = np.random.default_rng(int(rows.sum()))
        queries, targets, prompts = [], [], []
        # a mask of this value everywhere raises every patch's logit by the class token's 1: it changes nothing
        masks = torch.full((size, 1, 8, 8), 1 / args.mask_weight)
        empty = rng.random(size) < 0.1
        for index, (row, nothing) in enumerate(zip(rows, empty, strict=True)):
            present = scenes.instances[row][scenes.instances[row] >= 0]
            slot = rng.integers(len(present))
            number = present[slot]
            target = row if nothing else rng.choice(singles[number])
            name = INSTANCES[number].name
            query = "" if nothing else rng.choice([name, describe([name], None), f"the {name}"])
            if not nothing and rng.random() < 0.33:
                masks[index, 0] = torch.from_numpy(scenes.cover[row, slot] / 255.0)
                whole = describe([INSTANCES[n].name for n in present], PLACE_NAMES[scenes.places[row]])
                query = rng.choice(["", whole])
            queries.append(query)
            targets.append(target)
            prompts.append(
                ""
                if rng.random() < args.prompt_dropout
                else caption(scenes.instances_of(target), scenes.places[target], rng)
            )
        pixels = (torch.from_numpy(scenes.pictures[rows]).permute(0, 3, 1, 2).float() / 255 - mean) / std
        pixels[torch.from_numpy(empty)] = 0
        with torch.no_grad():
            hidden_states = vision(pixels, output_hidden_states=True).hidden_states
        query_states = base.encode_texts(queries)
        levels = [hidden_states[level] for level in encoder.config.image_levels]
        subject = encoder(query_states, levels, masks, args.mask_weight)
        conditions = SubjectConditions(encoder.project(subject))

        # more often at the noisy end, where colour and shape are decided
        share = torch.rand(size, generator=generator).sqrt()
        steps = (share * base.scheduler.config.num_train_timesteps).long().clamp(max=999)
        with subject_in_unet(unet, encoder.config.attention_layers):
            denoising = base.loss(
                unet, latents[targets].float(), generator, steps=steps,
                encoder_hidden_states=base.encode_texts(prompts),
                added_cond_kwargs={"image_embeds": conditions.as_image_embeds()},
            )  # fmt: skip
        consistency = consistency_loss(subject, query_states)
        return denoising + args.consistency_weight * consistency, {"mse": denoising.item(), "reg": consistency.item()}

    references = [row for row in range(2000) if scenes.counts[row] == 2][:18]

    def sample_fn(file):
        pipe = base.pipeline(
            StableDiffusionSSRPipeline, ssr_encoder=encoder, ssr_image_encoder=vision, ssr_image_processor=processor
        )
        rows, judge, right, same = [], load_judge(args.work_dir), 0, 0
        for index, row in enumerate(references):
            rows.append(scenes.pictures[row])
            for number in scenes.instances[row][:2]:
                instance = INSTANCES[number]
                image = pipe(
                    describe(["thing"], PLACE_NAMES[index % len(PLACE_NAMES)]),
                    subject_image=scenes.pictures[row],
                    subject_query=instance.name,
                    subject_scale=1.0,
                    num_inference_steps=15,
                    guidance_scale=3.0,
                    generator=torch.Generator().manual_seed(index),
                    output_type="np",
                ).images[0]
                rows.append((image * 255).round().astype(np.uint8))
                verdict = judge.look_at(rows[-1][None])
                right += verdict.categories.argmax().item() == instance.category
                same += verdict.variants[0, instance.category].argmax().item() == instance.variant
        sheet(rows, 9).save(file)
        print(f"\nright subject {right / 2 / len(references):.2f}, right variant {same / 2 / len(references):.2f}")

    train("ssr", args, {"ssr_encoder": encoder}, loss_fn, sample_fn)
    encoder.save_pretrained(args.work_dir / "ssr_encoder")


if __name__ == "__main__":
    main()
