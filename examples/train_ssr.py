"""Train or fine-tune an SSR-Encoder on a frozen Stable Diffusion 1.5 (section 3.4 of the paper).

    accelerate launch examples/train_ssr.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --image_encoder_name_or_path openai/clip-vit-large-patch14 --train_data_dir images --output_dir my-ssr

The folder `images` contains a `metadata.jsonl` with lines like
{"file_name": "1.jpg", "text": "a cat on a sofa", "query": "cat"}. A target that shows several subjects has lists, here
with `--reference_column reference`:

    {"file_name": "2.jpg", "text": "a cat and a dog", "reference_file_name": ["3.jpg", "4.jpg"], "query": ["cat", "dog"]}

For other training sets, see docs/training.md. The result can be loaded with `pipe.load_ssr("my-ssr")`. For several
processes on CPUs, use `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2`.
"""

import argparse
import copy
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from extras import needs

from command_line import naming, run_script
from training_options import check_args, parse_args


if __name__ == "__main__":
    parse_args(__doc__)  # --help and wrong options are answered before the imports below, which take seconds

with needs("train"):
    import numpy as np
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from accelerate.logging import get_logger
    from accelerate.utils import ProjectConfiguration, gather_object, set_seed
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline, subject_in_unet
    from diffusers_ssr.attention_processors import SubjectConditions
    from processes import check_processes
    from torch import nn
    from tqdm.auto import tqdm
    from training_data import Columns, FeatureCache, Preparation, Samples, Tensors, load_rows, summary
    from transformers import CLIPImageProcessor, CLIPVisionModel


logger = get_logger(__name__, log_level="INFO")


def new_encoder(unet, text_width: int, vision_config, args, encoder_class=SSREncoder) -> SSREncoder:
    """Creates a new encoder that fits the loaded models. With `init_from_text`, the key and value projections start as
    those of the UNet for text, because the loss keeps subject embeddings close to text embeddings (equation 7)."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    layers = {name: unet.get_submodule(name) for name in names if name.endswith("attn2")}
    # six evenly spaced layers of the vision encoder, up to the last one: 4, 8, ..., 24 for CLIP ViT-L/14
    levels = {round(vision_config.num_hidden_layers * part / 6) for part in range(1, 7)} - {0}
    encoder = encoder_class(
        cross_attention_dim=text_width,
        vision_hidden_size=vision_config.hidden_size,
        inner_dim=args.inner_dim,
        num_attention_heads=args.num_attention_heads,
        image_levels=tuple(args.image_levels or sorted(levels)),
        attention_layers={name: layer.inner_dim for name, layer in layers.items()},
    )
    for name, layer in layers.items() if args.init_from_text else ():
        pair = encoder.layers[name.replace(".", "_")]
        pair["to_k"].weight.data.copy_(layer.to_k.weight)
        pair["to_v"].weight.data.copy_(layer.to_v.weight)
    return encoder


def load_models(args: argparse.Namespace, build: Callable[..., SSREncoder] = new_encoder):
    """Returns the frozen pipeline and the encoder to train, in full precision. `build` creates a new encoder. Raises a
    `ValueError` if the models do not fit together."""
    base, vision = args.pretrained_model_name_or_path, args.image_encoder_name_or_path
    with naming("--pretrained_model_name_or_path", base):
        pipe = StableDiffusionSSRPipeline.from_pretrained(
            base, revision=args.revision, variant=args.variant, dtype=torch.float32, safety_checker=None,
            requires_safety_checker=False, ssr_encoder=None, ssr_image_encoder=None,
        )  # fmt: skip
    models = {}
    if vision is not None:
        with naming("--image_encoder_name_or_path", vision):
            models["image_encoder"] = CLIPVisionModel.from_pretrained(vision).float()
            models["image_processor"] = CLIPImageProcessor.from_pretrained(vision)
    start = args.ssr_encoder_name_or_path
    if start is not None:
        with naming("--ssr_encoder_name_or_path", start):
            pipe.load_ssr(start, dtype=torch.float32, **models)
    else:
        encoder = build(pipe.unet, pipe.text_encoder.config.hidden_size, models["image_encoder"].config, args)
        pipe.load_ssr(encoder, **models)
    encoder = pipe.ssr_encoder
    pipe.register_modules(ssr_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.ssr_image_encoder):
        model.requires_grad_(False).eval()
    args.resolution = args.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    return pipe, encoder.float().train()


class SubjectEncoding(nn.Module):
    """Combines all trained parts in one module with one forward call, which distributed training can wrap."""

    def __init__(self, encoder: SSREncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, query_states, levels, mask=None, mask_weight=1.0):
        """Returns the subject embeddings, and a dict from layer names of the UNet to keys and values."""
        subject_embeds = self.encoder(query_states, levels, mask, mask_weight)
        pairs = self.encoder.project(subject_embeds)
        return subject_embeds, dict(zip(self.encoder.config.attention_layers, pairs, strict=True))


class FrozenFeatures:
    """Computes the outputs of the frozen models for samples. With a cache, each sample is computed once and in a batch
    of its own, so that the features do not depend on the other samples of a batch."""

    def __init__(self, pipe, levels: Sequence[int], dtype: torch.dtype, cache: FeatureCache | None):
        self.pipe, self.levels, self.dtype, self.cache = pipe, list(levels), dtype, cache
        self.image_size = (pipe.ssr_image_processor.crop_size["height"], pipe.ssr_image_processor.crop_size["width"])
        # the unconditional branch gets pixels that are zero after normalization (section 3.3), and the empty query
        self.empty_levels = self._image_levels(torch.zeros(1, 3, *self.image_size))[0]
        self.empty_text = self._text_states([""])[0]

    @torch.no_grad()
    def _image_levels(self, pixels: torch.Tensor) -> torch.Tensor:
        vision = self.pipe.ssr_image_encoder
        states = vision(pixels.to(vision.device, vision.dtype), output_hidden_states=True).hidden_states
        return torch.stack([states[level] for level in self.levels], dim=1)

    @torch.no_grad()
    def _text_states(self, texts: list[str]) -> torch.Tensor:
        return self.pipe.encode_prompt(texts, self.pipe.text_encoder.device, 1, False)[0]

    @torch.no_grad()
    def _compute(self, samples: list[dict]) -> Tensors:
        vae = self.pipe.vae
        pixels = torch.stack([sample["pixel_values"] for sample in samples]).to(vae.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist
        queries = [query for sample in samples for query in sample["queries"]]
        texts = self._text_states([*(sample["caption"] for sample in samples), *queries])
        no_mask = torch.full((1, *self.image_size), -1.0)
        masks = [no_mask if mask is None else mask for sample in samples for mask in sample["masks"]]
        return {
            "latent_mean": latents.mean,
            "latent_std": latents.std,
            "levels": self._image_levels(torch.cat([sample["reference_values"] for sample in samples])),
            "caption_states": texts[: len(samples)],
            "query_states": texts[len(samples) :],
            "mask": torch.stack(masks),
        }

    def __call__(self, samples: list[dict], mask_weight: float = 1.0) -> Tensors:
        """Returns `latent_mean`, `latent_std` and `caption_states` of the samples, and of the subjects of all samples
        `levels`, `query_states`, `row` (the index of their sample), and `mask` if a subject has one."""
        device = self.pipe.unet.device
        compute = self._compute
        parts = [self.cache(sample, compute) for sample in samples] if self.cache else [compute(samples)]
        features = {name: torch.cat([part[name].to(device) for part in parts]) for name in parts[0]}
        counts = torch.tensor([len(sample["queries"]) for sample in samples])
        features["row"] = torch.arange(len(samples)).repeat_interleave(counts).to(device)
        mask = features.pop("mask")
        if (mask >= 0).any():
            # without an effect for subjects without a mask: with this value, the logits of all patches grow by 1, like the logit of the class token
            features["mask"] = torch.where(mask >= 0, mask, 1 / mask_weight if mask_weight else 1.0)
        return features


def join_subjects(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], row: torch.Tensor) -> SubjectConditions:
    """Concatenates the keys and values of the subjects of each row, as a pipeline does for several subjects in one
    image. The keys and values have the shape `(num_subjects, num_tokens, width)`."""
    counts = row.bincount()
    most = int(counts.max())
    if most == 1:
        return SubjectConditions(pairs)
    # the index of each subject within its row
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]

    def spread(states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(len(counts), most, *states.shape[1:]).index_put((row, place), states).flatten(1, 2)

    slots = torch.arange(most, device=row.device)
    length = next(iter(pairs.values()))[0].shape[1]
    subject = torch.where(slots < counts[:, None], slots, -1).float().repeat_interleave(length, dim=1)
    return SubjectConditions({name: (spread(key), spread(value)) for name, (key, value) in pairs.items()}, subject)


def draw(seed: int, numbers: Sequence[int], latent_shape: Sequence[int]) -> Tensors:
    """Returns the random numbers for some samples of a run. They depend only on the seed and the number of the sample,
    so they do not change if a run is interrupted and resumed or uses more processes."""
    drawn = {"shares": [], "noise": [], "latent_noise": []}
    for number in numbers:
        # the seeds are mixed, because consecutive seeds must not lead to similar generator states
        mixed = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(mixed)
        drawn["shares"].append(torch.rand(3, generator=generator))
        drawn["noise"].append(torch.randn(*latent_shape, generator=generator))
        drawn["latent_noise"].append(torch.randn(*latent_shape, generator=generator))
    return {name: torch.stack(values) for name, values in drawn.items()}


def consistency_loss(subject_embeds: torch.Tensor, query_hidden_states: torch.Tensor, form="released", weights=None):
    """
    Returns the embedding consistency loss, which keeps the subject embeddings of shape
    `(batch_size, num_tokens * num_levels, cross_attention_dim)` close to the query hidden states of shape
    `(batch_size, num_tokens, cross_attention_dim)` (section 3.4 of the paper, equation 7). The form "released" compares
    each token with the query's token and sums over the levels, as the released code does, and "paper" compares the
    means over all tokens. `weights`, of shape `(batch_size,)`, are the weights of the samples.
    """
    query = query_hidden_states.detach()
    if form == "paper":
        losses = 1 - F.cosine_similarity(subject_embeds.mean(1), query.mean(1), dim=-1)
    elif form == "released":
        levels = subject_embeds.unflatten(1, (-1, query.shape[1]))
        losses = (1 - F.cosine_similarity(levels, query[:, None], dim=-1)).mean(2).sum(1)
    else:
        raise ValueError(f'`form` has to be "released" or "paper", but is {form!r}.')
    return losses.mean() if weights is None else (losses * weights).sum()


def encode_subjects(model: nn.Module, frozen: FrozenFeatures, features: Tensors, drawn: Tensors, args):
    """Returns the [`SubjectConditions`] for the UNet, and the consistency loss."""
    row = features["row"]
    no_subject = (drawn["shares"][:, 2].to(row.device) < args.subject_dropout)[row]
    query_states = torch.where(no_subject[:, None, None], frozen.empty_text, features["query_states"]).float()
    levels = torch.where(no_subject[:, None, None, None], frozen.empty_levels, features["levels"]).float()
    subject_embeds, pairs = model(query_states, levels.transpose(0, 1), features.get("mask"), args.mask_weight)
    # Each row has the same weight, regardless of its number of subjects. Otherwise, the result would depend on how the
    # rows are divided among processes.
    counts = row.bincount()
    weights = 1 / (len(counts) * counts[row])
    consistency = consistency_loss(subject_embeds.float(), query_states, args.consistency_form, weights)
    pairs = {name: (key.to(frozen.dtype), value.to(frozen.dtype)) for name, (key, value) in pairs.items()}
    return join_subjects(pairs, row), consistency


def denoising_loss(frozen: FrozenFeatures, features: Tensors, drawn: Tensors, scheduler: DDPMScheduler, args):
    """Returns the denoising loss (equation 6). Call this inside [`subject_in_unet`]."""
    pipe, device = frozen.pipe, frozen.pipe.unet.device
    time_share, no_prompt, _ = drawn["shares"].to(device).unbind(1)
    noise = drawn["noise"].to(device)
    latents = features["latent_mean"].float()
    if args.latents == "sample":
        latents = latents + features["latent_std"].float() * drawn["latent_noise"].to(device)
    latents = latents * pipe.vae.config.scaling_factor
    num_steps = scheduler.config.num_train_timesteps
    timesteps = (num_steps * time_share**args.timestep_bias).long().clamp(max=num_steps - 1)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps).to(frozen.dtype)
    no_prompt = (no_prompt < args.prompt_dropout)[:, None, None]
    prompt_states = torch.where(no_prompt, frozen.empty_text, features["caption_states"]).to(frozen.dtype)
    predicted = pipe.unet(noisy_latents, timesteps, encoder_hidden_states=prompt_states).sample
    target = {"epsilon": noise, "sample": latents}.get(args.prediction_type or scheduler.config.prediction_type)
    if target is None:
        target = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(predicted.float(), target.float())


class Run:
    """The state of a training run that accelerate does not handle: the encoder, the moving average of its weights, the
    step and the position in the training set. It is saved and loaded with accelerate's checkpoints."""

    def __init__(self, accelerator: Accelerator, encoder: SSREncoder, args: argparse.Namespace):
        self.accelerator, self.encoder, self.args = accelerator, encoder, args
        self.average = copy.deepcopy(encoder).requires_grad_(False).eval() if args.use_ema else None
        self.step, self.position = 0, (0, 0)
        self.bad: dict[str, str] = {}
        accelerator.register_save_state_pre_hook(self._save_hook)
        accelerator.register_load_state_pre_hook(self._load_hook)

    @torch.no_grad()
    def update_average(self) -> None:
        """Updates the moving average. The decay is lower in the first steps, to forget the initial weights."""
        if self.average is not None:
            decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
            parameters = [parameter.detach() for parameter in self.encoder.parameters()]
            torch._foreach_lerp_(list(self.average.parameters()), parameters, 1 - decay)

    def _models(self) -> dict[str, SSREncoder]:
        average = {"ssr_encoder_ema": self.average} if self.average is not None else {}
        return {"ssr_encoder": self.encoder, **average}

    def _save_hook(self, models, weights, folder) -> None:
        weights.clear()  # accelerate would write everything that remains
        for name, model in self._models().items() if self.accelerator.is_main_process else ():
            model.save_pretrained(Path(folder) / name)
        state = {"step": self.step, "position": self.position, "bad": self.bad}
        state["num_processes"] = self.accelerator.num_processes
        (Path(folder) / f"run_{self.accelerator.process_index}.json").write_text(json.dumps(state))

    def _load_hook(self, models, folder) -> None:
        models.clear()
        for name, model in self._models().items():
            if not (Path(folder) / name).is_dir():
                raise ValueError(f"`use_ema`: the checkpoint {folder} has no moving average.")
            model.load_state_dict(type(model).from_pretrained(folder, subfolder=name).state_dict())

    def save(self) -> None:
        """Saves a checkpoint and deletes the oldest ones. Each `checkpoint-*` folder is complete."""
        checkpoint = self.args.output_dir / f"checkpoint-{self.step}"
        partial = checkpoint.with_suffix(".part")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            replace_folder(partial, checkpoint)
            limit = self.args.checkpoints_total_limit
            for old in checkpoints(self.args.output_dir)[:-limit] if limit else ():
                remove_folder(old)
            logger.info(f"Saved {checkpoint}")
        self.accelerator.wait_for_everyone()

    def load(self, which: str) -> None:
        """Resumes from the checkpoint `which`, a folder or "latest"."""
        folder = Path(which)
        if which == "latest":
            folder = next(reversed(checkpoints(self.args.output_dir)), None)
            if folder is None:
                return logger.info("There is no checkpoint yet: training starts from the beginning.")
        self.accelerator.load_state(str(folder))
        own = folder / f"run_{self.accelerator.process_index}.json"
        state = json.loads((own if own.exists() else folder / "run_0.json").read_text())
        if state["num_processes"] != self.accelerator.num_processes:
            logger.warning(f"The checkpoint was saved by {state['num_processes']} processes: the samples differ.")
        self.step, self.position, self.bad = state["step"], tuple(state["position"]), state.get("bad", {})
        logger.info(f"Resumed from {folder} at step {self.step}")


def checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def remove_folder(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a partly deleted folder is not mistaken for a complete one."""
    shutil.rmtree(folder.rename(folder.with_suffix(".old.part")))


def replace_folder(new: Path, target: Path) -> None:
    """Renames a complete folder to `target`."""
    if target.exists():
        remove_folder(target)
    new.rename(target)


def save_part(folder: Path, name: str, part) -> None:
    """Saves a model in `folder / name`, where `load_ssr` finds it."""
    partial_folder = folder / f"{name}.part"
    shutil.rmtree(partial_folder, ignore_errors=True)
    part.save_pretrained(partial_folder)
    replace_folder(partial_folder, folder / name)


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Creates the accelerator, and checks that it connects all processes."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / "logs")),
        step_scheduler_with_optimizer=False,  # one step for each optimizer step, for any number of processes
    )
    check_processes(accelerator.num_processes)
    return accelerator


def make_cache(args: argparse.Namespace, pipe, encoder: SSREncoder, dtype: torch.dtype) -> FeatureCache:
    """Creates the feature cache. Its settings are everything that the features depend on, except the samples."""
    models = (pipe.vae, pipe.text_encoder, pipe.ssr_image_encoder)
    # the weights themselves, because those in a folder can change while its path stays the same
    weights = [sum(weight.abs().sum(dtype=torch.float64).item() for weight in model.parameters()) for model in models]
    settings = {"weights": weights, "levels": list(encoder.config.image_levels), "dtype": str(dtype)}
    return FeatureCache(args.cache_features, settings)


def main(
    arguments: Sequence[str] | None = None,
    build: Callable[..., SSREncoder] = new_encoder,
    open_samples: Callable[[Preparation, tuple[int, int]], Samples] | None = None,
) -> None:
    """Trains an encoder. `arguments` replace the command-line arguments. `build` is used instead of `new_encoder`.
    `open_samples` gets the [`Preparation`] of the run and the position to start at, and returns an iterable like
    [`training_data.Samples`], for samples that are not read from the rows of a training set."""
    # options, training set and processes: what can be wrong is checked before models are loaded
    args = parse_args(__doc__, arguments)
    check_args(args)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    columns = Columns(*(getattr(args, f"{name}_column") for name in "image caption query reference mask".split()))
    source = (args.train_data_dir, args.dataset_name, args.dataset_config_name, args.streaming, columns)
    rows = load_rows(*source) if open_samples is None else []
    accelerator = make_accelerator(args)
    process, num_processes = accelerator.process_index, accelerator.num_processes
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)

    # models
    pipe, encoder = load_models(args, build)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe.to(accelerator.device, dtype)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    encoder.to(accelerator.device)
    cache = None if args.cache_features is None else make_cache(args, pipe, encoder, dtype)
    frozen = FrozenFeatures(pipe, encoder.config.image_levels, dtype, cache)

    # optimizer, and the state of an earlier run
    run = Run(accelerator, encoder, args)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
    )  # fmt: skip
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(SubjectEncoding(encoder), optimizer, lr_scheduler)
    if args.resume_from_checkpoint is not None:
        run.load(args.resume_from_checkpoint)
    plain = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(args).items()}
    accelerator.init_trackers("train_ssr", config=plain)

    # samples
    prepare = Preparation(columns, pipe.ssr_image_processor, args.resolution, args.min_image_size, args.mask_query)
    if open_samples is not None:
        samples = open_samples(prepare, run.position)
    else:
        samples = Samples(
            rows, prepare, run.position, args.seed, args.shuffle_buffer_size, args.dataloader_num_workers,
            (process, num_processes), partial(logger.warning, main_process_only=False),
        )  # fmt: skip
        samples.bad = run.bad
    stream = iter(samples)

    if accelerator.is_main_process:
        for name in ("ssr_image_encoder", "ssr_image_processor"):  # with these, `load_ssr` can load each checkpoint
            save_part(args.output_dir, name, getattr(pipe, name))
    bar = tqdm(total=args.max_train_steps, initial=run.step, desc="steps", disable=not accelerator.is_main_process)
    while run.step < args.max_train_steps:
        for micro_step in range(args.gradient_accumulation_steps):
            batch = [next(stream) for _ in range(args.train_batch_size)]
            run.position = samples.position
            features = frozen(batch, args.mask_weight)
            turn = run.step * args.gradient_accumulation_steps + micro_step
            first = turn * num_processes * len(batch) + process
            numbers = range(first, first + num_processes * len(batch), num_processes)
            drawn = draw(args.seed, numbers, features["latent_mean"].shape[1:])
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    conditions, consistency = encode_subjects(model, frozen, features, drawn, args)
                # the backward pass has the subject as well, because gradient checkpointing runs the layers again
                with subject_in_unet(pipe.unet, encoder, conditions):
                    with accelerator.autocast():
                        mse = denoising_loss(frozen, features, drawn, scheduler, args)
                    loss = mse + args.consistency_weight * consistency
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients:
                    lr_scheduler.step()
                optimizer.zero_grad()
        run.step += 1
        run.update_average()
        bar.update()
        logs = {"loss": loss.item(), "mse": mse.item(), "consistency": consistency.item()}
        bar.set_postfix(logs, refresh=False)
        accelerator.log({**logs, "lr": lr_scheduler.get_last_lr()[0]}, step=run.step)
        if run.step % args.checkpointing_steps == 0:
            run.save()
    bar.close()

    # result
    accelerator.wait_for_everyone()
    bad = {name: reason for part in gather_object([samples.bad]) for name, reason in part.items()}
    if accelerator.is_main_process:
        save_part(args.output_dir, "ssr_encoder", encoder if run.average is None else run.average)
        logger.info(summary(bad))
        (args.output_dir / "bad_samples.json").write_text(json.dumps(bad, indent=1) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
