"""Train or fine-tune an SSR-Encoder on a frozen Stable Diffusion 1.5 (section 3.4 of the paper).

    accelerate launch examples/train_ssr.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --image_encoder_name_or_path openai/clip-vit-large-patch14 --train_data_dir pictures --output_dir my-ssr

The folder `pictures` contains a `metadata.jsonl` with lines like
{"file_name": "1.jpg", "text": "a cat on a sofa", "query": "cat"}. For Parquet files, datasets on the Hub and
WebDataset shards, see training_rows.py. The result can be loaded with `pipe.load_ssr("my-ssr")`.

If a target shows several subjects together, the row has lists, here with `--reference_column reference`:

    {"file_name": "2.jpg", "text": "a cat and a dog", "reference_file_name": ["3.jpg", "4.jpg"], "query": ["cat", "dog"]}

A row can also have one reference for several queries, or a list of masks (null for a subject without a mask). Rows
with one subject and rows with several subjects can be mixed. To teach the encoder to add nothing if the reference does
not show what the query names, add rows with such a query and a target that only shows the caption.

To train with several processes on CPUs only, use `torchrun` with ACCELERATE_USE_CPU=1.
"""

import argparse
import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from extras import needs

import numpy as np
import torch
import torch.nn.functional as F
from command_line import naming, run_script
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline, subject_in_unet
from diffusers_ssr.attention_processors import SubjectConditions
from diffusers_ssr.modeling_ssr import consistency_loss
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from training_options import check_args, parse_args
from transformers import CLIPImageProcessor, CLIPVisionModel


with needs("train"):
    from accelerate import Accelerator
    from accelerate.logging import get_logger
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, gather_object, set_seed
    from training_data import Columns, FeatureCache, Preparation, Samples, summary
    from training_rows import FiniteRows, StreamedRows, load_rows


logger = get_logger(__name__, log_level="INFO")


def default_levels(num_layers: int) -> tuple[int, ...]:
    """Returns six evenly spaced layers of the vision encoder, up to the last one: 4, 8, ..., 24 for CLIP ViT-L/14."""
    return tuple(sorted({round(num_layers * part / 6) for part in range(1, 7)} - {0}))


def new_encoder(
    unet, text_width: int, vision_config, args: argparse.Namespace, encoder_class: type[SSREncoder] = SSREncoder
) -> SSREncoder:
    """Creates a new encoder that fits the loaded models. With `init_from_text`, the key and value projections are
    initialized with those of the UNet for text, because the loss keeps subject embeddings close to text embeddings
    (equation 7)."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    layers = {name: unet.get_submodule(name) for name in names if name.endswith("attn2")}
    encoder = encoder_class(
        cross_attention_dim=text_width,
        vision_hidden_size=vision_config.hidden_size,
        inner_dim=args.inner_dim,
        num_attention_heads=args.num_attention_heads,
        image_levels=tuple(args.image_levels or default_levels(vision_config.num_hidden_layers)),
        attention_layers={name: layer.inner_dim for name, layer in layers.items()},
    )
    if args.init_from_text:
        for name, layer in layers.items():
            pair = encoder.layers[name.replace(".", "_")]
            pair["to_k"].weight.data.copy_(layer.to_k.weight)
            pair["to_v"].weight.data.copy_(layer.to_v.weight)
    return encoder


def load_models(
    args: argparse.Namespace, build: Callable[..., SSREncoder] = new_encoder
) -> tuple[StableDiffusionSSRPipeline, SSREncoder]:
    """Loads the frozen pipeline and the encoder to train in full precision. `build` creates a new encoder.

    Raises:
        `ValueError`: if the models do not fit together.
    """
    with naming("--pretrained_model_name_or_path", args.pretrained_model_name_or_path):
        pipe = StableDiffusionSSRPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=torch.float32,
            safety_checker=None, requires_safety_checker=False, ssr_encoder=None, ssr_image_encoder=None,
        )  # fmt: skip
    source, start = args.image_encoder_name_or_path, args.ssr_encoder_name_or_path
    if source is not None:
        with naming("--image_encoder_name_or_path", source):
            vision, processor = CLIPVisionModel.from_pretrained(source), CLIPImageProcessor.from_pretrained(source)
    else:
        with naming("--ssr_encoder_name_or_path", start):
            vision = CLIPVisionModel.from_pretrained(start, subfolder="ssr_image_encoder")
            processor = CLIPImageProcessor.from_pretrained(start, subfolder="ssr_image_processor")
    if start is not None:
        with naming("--ssr_encoder_name_or_path", start):
            encoder = SSREncoder.from_pretrained(start, subfolder="ssr_encoder", dtype=torch.float32)
    elif args.released_aligner is not None:
        encoder = SSREncoder.from_released(args.released_aligner, args.released_layers)
    else:
        encoder = build(pipe.unet, pipe.text_encoder.config.hidden_size, vision.config, args)
    pipe.load_ssr(copy.deepcopy(encoder), image_encoder=vision.float(), image_processor=processor)
    # the copy was only needed for the checks in `load_ssr`
    pipe.register_modules(ssr_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder, vision):
        model.requires_grad_(False).eval()
    if args.resolution is None:
        args.resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return pipe, encoder.float().train()


def weight_sum(model: nn.Module) -> float:
    """Returns the sum of the absolute weights, which is used to detect changed weights."""
    return sum(parameter.abs().sum(dtype=torch.float64).item() for parameter in model.parameters())


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
    """Computes the outputs of the frozen models for samples: the mean and standard deviation of the latents, the
    hidden states of the vision encoder at each level, and the text encoder's hidden states for captions and queries.
    With a cache, each sample is computed once and in a batch of its own, so the features do not depend on the other
    samples of a batch."""

    def __init__(self, pipe, levels: Sequence[int], dtype: torch.dtype, cache: FeatureCache | None, writer: str):
        self.pipe = pipe
        self.levels = list(levels)
        self.dtype = dtype
        self.cache = cache
        self.writer = writer
        size = pipe.ssr_image_processor.crop_size
        # the unconditional branch gets pixels that are zero after normalization (section 3.3), and the empty query
        self.empty_levels = self._picture_levels(torch.zeros(1, 3, size["height"], size["width"]))[0]
        self.empty_text = self._text_states([""])[0]

    @torch.no_grad()
    def _picture_levels(self, pixels: torch.Tensor) -> torch.Tensor:
        vision = self.pipe.ssr_image_encoder
        states = vision(pixels.to(vision.device, vision.dtype), output_hidden_states=True).hidden_states
        return torch.stack([states[level] for level in self.levels], dim=1)

    @torch.no_grad()
    def _text_states(self, texts: list[str]) -> torch.Tensor:
        return self.pipe.encode_prompt(texts, self.pipe.text_encoder.device, 1, False)[0]

    @torch.no_grad()
    def _compute(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        vae = self.pipe.vae
        pixels = torch.stack([sample["pixel_values"] for sample in samples]).to(vae.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist
        queries = [query for sample in samples for query in sample["queries"]]
        texts = self._text_states([*(sample["caption"] for sample in samples), *queries])
        return {
            "latent_mean": latents.mean,
            "latent_std": latents.std,
            "levels": self._picture_levels(torch.cat([sample["reference_values"] for sample in samples])),
            "caption_states": texts[: len(samples)],
            "query_states": texts[len(samples) :],
        }

    def __call__(self, samples: list[dict], mask_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """
        Returns a dict with `latent_mean`, `latent_std` and `caption_states` of shape `(batch_size, ...)` for the
        samples, and `levels` and `query_states` of shape `(num_subjects, ...)` for the subjects of all samples. `row`
        of shape `(num_subjects,)` is the index of the sample that each subject belongs to. If at least one subject has
        a mask, the dict also has `mask`, and subjects without a mask get a mask that has no effect.
        """
        device = self.pipe.unet.device
        if self.cache is None:
            features = self._compute(samples)
            masks = [mask for sample in samples for mask in sample["masks"]]
        else:
            each, masks = [], []
            for sample in samples:
                known = sample.get("features")
                if known is None:
                    known = self._compute([sample])
                    given = {f"mask_{i}": mask for i, mask in enumerate(sample["masks"]) if mask is not None}
                    known.update(given)
                    self.cache.save(sample["digest"], known, self.writer)
                masks += [known.get(f"mask_{i}") for i in range(len(sample["queries"]))]
                each.append({name: tensor.to(device) for name, tensor in known.items()})
            features = {name: torch.cat([known[name] for known in each]) for name in each[0] if "mask" not in name}
        counts = torch.tensor([len(sample["queries"]) for sample in samples])
        features["row"] = torch.arange(len(samples)).repeat_interleave(counts).to(device)
        given = next((mask for mask in masks if mask is not None), None)
        if given is not None:
            # with this mask, the logits of all patches grow by 1, like the logit of the class token
            blank = 1 / mask_weight if mask_weight else 1.0
            masks = [torch.full_like(given, blank) if mask is None else mask for mask in masks]
            features["mask"] = torch.stack(masks).to(device)
        return features


def join_subjects(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], row: torch.Tensor) -> SubjectConditions:
    """Concatenates the keys and values of the subjects of each row, as a pipeline does for several subjects in one
    picture. The keys and values have the shape `(num_subjects, num_tokens, width)`."""
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


def draw(seed: int, first: int, count: int, latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Returns the random numbers for samples `first`, `first + 1`, ... of a run. They depend only on the seed and the
    number of the sample, so they do not change if a run is interrupted and resumed or uses more processes."""
    drawn = {"shares": [], "noise": [], "latent_noise": []}
    for number in range(first, first + count):
        # the seeds are mixed, because consecutive seeds must not lead to similar generator states
        mixed = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(mixed)
        drawn["shares"].append(torch.rand(3, generator=generator))
        for name in ("noise", "latent_noise"):
            drawn[name].append(torch.randn(latent_shape, generator=generator))
    return {name: torch.stack(values) for name, values in drawn.items()}


def mean_consistency(
    subject_embeds: torch.Tensor, query_states: torch.Tensor, row: torch.Tensor, form: str
) -> torch.Tensor:
    """Computes the regularizer. Each row has the same weight, regardless of its number of subjects. Otherwise, the
    result would depend on how the rows are divided among processes."""
    counts = row.bincount()
    total = subject_embeds.new_zeros(())
    for count in counts.unique():
        chosen = counts[row] == count
        share = (counts == count).sum() / len(counts)
        total = total + share * consistency_loss(subject_embeds[chosen], query_states[chosen], form)
    return total


def compute_loss(
    model: nn.Module,
    frozen: FrozenFeatures,
    features: dict[str, torch.Tensor],
    drawn: dict[str, torch.Tensor],
    scheduler: DDPMScheduler,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Computes the denoising loss and the regularizer (equations 6 to 8). Call this inside `subject_in_unet`."""
    pipe, device = frozen.pipe, frozen.pipe.unet.device
    time_share, no_prompt, no_subject = drawn["shares"].to(device).unbind(1)
    no_prompt, no_subject = no_prompt < args.prompt_dropout, no_subject < args.subject_dropout
    noise = drawn["noise"].to(device)
    latents = features["latent_mean"].float()
    if args.latents == "sample":
        latents = latents + features["latent_std"].float() * drawn["latent_noise"].to(device)
    latents = latents * pipe.vae.config.scaling_factor
    num_steps = scheduler.config.num_train_timesteps
    timesteps = (num_steps * time_share**args.timestep_bias).long().clamp(max=num_steps - 1)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

    prompt_states = torch.where(no_prompt[:, None, None], frozen.empty_text, features["caption_states"])
    row = features["row"]
    without = no_subject[row]
    query_states = torch.where(without[:, None, None], frozen.empty_text, features["query_states"]).float()
    levels = torch.where(without[:, None, None, None], frozen.empty_levels, features["levels"]).float()
    subject_embeds, pairs = model(query_states, levels.transpose(0, 1), features.get("mask"), args.mask_weight)
    pairs = {name: (key.to(frozen.dtype), value.to(frozen.dtype)) for name, (key, value) in pairs.items()}
    conditions = join_subjects(pairs, row)
    predicted = pipe.unet(
        noisy_latents.to(frozen.dtype),
        timesteps,
        encoder_hidden_states=prompt_states.to(frozen.dtype),
        cross_attention_kwargs={"ssr_subject": conditions},
    ).sample

    prediction_type = args.prediction_type or scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": latents}.get(prediction_type)
    if target is None:
        target = scheduler.get_velocity(latents, noise, timesteps)
    denoising = F.mse_loss(predicted.float(), target.float())
    consistency = mean_consistency(subject_embeds.float(), query_states, row, args.consistency_form)
    loss = denoising + args.consistency_weight * consistency
    return loss, {"loss": loss.detach(), "mse": denoising.detach(), "consistency": consistency.detach()}


class Run:
    """The state of a training run that accelerate does not handle: the encoder, the moving average of its weights, the
    step and the position in the training set. It is saved and loaded with accelerate's checkpoints."""

    def __init__(self, accelerator: Accelerator, encoder: SSREncoder, args: argparse.Namespace):
        self.accelerator = accelerator
        self.encoder = encoder
        self.average = copy.deepcopy(encoder).requires_grad_(False).eval() if args.use_ema else None
        self.decay = args.ema_decay
        self.folder = args.output_dir
        self.limit = args.checkpoints_total_limit
        self.step = 0
        self.position = (0, 0)
        accelerator.register_save_state_pre_hook(self._save_hook)
        accelerator.register_load_state_pre_hook(self._load_hook)

    @property
    def best(self) -> SSREncoder:
        """The encoder to generate with: the moving average if there is one."""
        return self.encoder if self.average is None else self.average

    @torch.no_grad()
    def update_average(self) -> None:
        """Updates the moving average after a step. The decay is lower in the first steps, because the initial weights
        would otherwise influence the average for too long."""
        if self.average is not None:
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            parameters = [parameter.detach() for parameter in self.encoder.parameters()]
            torch._foreach_lerp_(list(self.average.parameters()), parameters, 1 - decay)

    def _save_hook(self, models, weights, folder) -> None:
        # accelerate would write everything that remains in `weights`
        weights.clear()
        if self.accelerator.is_main_process:
            self.encoder.save_pretrained(Path(folder) / "ssr_encoder")
            if self.average is not None:
                self.average.save_pretrained(Path(folder) / "ssr_encoder_ema")
        state = {"step": self.step, "position": self.position, "num_processes": self.accelerator.num_processes}
        (Path(folder) / f"run_{self.accelerator.process_index}.json").write_text(json.dumps(state))

    def _load_hook(self, models, folder) -> None:
        models.clear()
        device = self.accelerator.device
        for name, model in (("ssr_encoder", self.encoder), ("ssr_encoder_ema", self.average)):
            if model is not None:
                if not (Path(folder) / name).is_dir():
                    raise ValueError(f"`use_ema`: the checkpoint {folder} has no moving average.")
                saved = type(self.encoder).from_pretrained(folder, subfolder=name)
                model.load_state_dict(saved.to(device).state_dict())

    def save(self) -> Path:
        """Saves a checkpoint and deletes the oldest ones. The checkpoint is written under a temporary name and then
        renamed, so every `checkpoint-*` folder is complete."""
        checkpoint = self.folder / f"checkpoint-{self.step}"
        partial = checkpoint.with_suffix(".part")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _replace_folder(partial, checkpoint)
            if self.limit is not None:
                for old in checkpoints(self.folder)[: -self.limit]:
                    _remove_folder(old)
            logger.info(f"Saved {checkpoint}")
        self.accelerator.wait_for_everyone()
        return checkpoint

    def load(self, which: str) -> None:
        """Resumes from the checkpoint `which`, a folder or "latest"."""
        folder = Path(which)
        if which == "latest":
            known = checkpoints(self.folder)
            if not known:
                logger.info(f"There is no checkpoint in {self.folder} yet: training starts from the beginning.")
                return
            folder = known[-1]
        self.accelerator.load_state(str(folder))
        states = [json.loads(file.read_text()) for file in sorted(folder.glob("run_*.json"))]
        processes = self.accelerator.num_processes
        if states[0]["num_processes"] != processes:
            logger.warning(
                f"The checkpoint was saved by {len(states)} processes, but this run has {processes}: the samples differ."
            )
        self.step = states[0]["step"]
        own = folder / f"run_{self.accelerator.process_index}.json"
        self.position = tuple((json.loads(own.read_text()) if own.exists() else states[0])["position"])
        logger.info(f"Resumed from {folder} at step {self.step}")


def checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _remove_folder(folder: Path) -> None:
    # rename the folder first, so that a partly deleted folder is not mistaken for a checkpoint
    doomed = folder.rename(folder.with_suffix(".old.part"))
    shutil.rmtree(doomed)


def _replace_folder(new: Path, target: Path) -> None:
    if target.exists():
        _remove_folder(target)
    new.rename(target)


def save_result(run: Run, pipe: StableDiffusionSSRPipeline) -> None:
    """Saves the files that `load_ssr` loads: encoder, vision encoder and image processor."""
    parts = {
        "ssr_encoder": run.best,
        "ssr_image_encoder": pipe.ssr_image_encoder,
        "ssr_image_processor": pipe.ssr_image_processor,
    }
    for name, part in parts.items():
        partial = run.folder / f"{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        part.save_pretrained(partial)
        _replace_folder(partial, run.folder / name)


def validate(run: Run, pipe: StableDiffusionSSRPipeline, args: argparse.Namespace) -> None:
    """Generates the validation pictures with fixed seeds, saves them in `output_dir/validation`, and logs them."""
    pipe.load_ssr(
        copy.deepcopy(run.best), image_encoder=pipe.ssr_image_encoder, image_processor=pipe.ssr_image_processor
    )
    folder = run.folder / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    triples = list(zip(args.validation_image, args.validation_query, args.validation_prompt, strict=True))
    images = []
    for index, (picture, query, prompt) in enumerate(triples):
        image = pipe(
            prompt, subject_image=Image.open(picture), subject_query=query, subject_scale=args.validation_scale,
            height=args.resolution, width=args.resolution, num_inference_steps=args.validation_inference_steps,
            generator=torch.Generator().manual_seed((args.seed or 0) + index),
        ).images[0]  # fmt: skip
        image.save(folder / f"step-{run.step:06d}-{index}.png")
        images.append(image)
    pipe.register_modules(ssr_encoder=None)
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images("validation", pixels, run.step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            captions = [f"{query}: {prompt}" for _, query, prompt in triples]
            logged = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            tracker.log({"validation": logged}, step=run.step)


def push(args: argparse.Namespace, folder: Path) -> None:
    """Uploads the result with a model card to the Hub."""
    from huggingface_hub import HfApi, ModelCard, ModelCardData

    api = HfApi(token=args.hub_token)
    repo_id = api.create_repo(args.hub_model_id or folder.resolve().name, exist_ok=True).repo_id
    data = ModelCardData(
        library_name="diffusers", base_model=str(args.pretrained_model_name_or_path), pipeline_tag="text-to-image",
        tags=["diffusers", "stable-diffusion", "ssr-encoder", "subject-driven-generation"],
    )  # fmt: skip
    text = f'An SSR-Encoder, trained for {args.max_train_steps} steps: `pipe.load_ssr("{repo_id}")`.'
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id}\n\n{text}\n").save(folder / "README.md")
    patterns = ["README.md", "ssr_*/*"]
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=patterns, ignore_patterns=["*.part/*"])


def make_optimizer(parameters, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Creates AdamW, or its 8-bit version with `use_8bit_adam`."""
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    return optimizer_class(
        parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
    )  # fmt: skip


def main(
    arguments: Sequence[str] | None = None,
    build: Callable[..., SSREncoder] = new_encoder,
    open_samples: Callable[[Preparation, tuple[int, int]], Samples] | None = None,
) -> None:
    """Trains an encoder. `arguments` replace the command-line arguments. `build` has the signature of `new_encoder`
    and can create another kind of encoder. `open_samples` is for samples that are not read from the rows of a training
    set. It gets the [`Preparation`] of the run and the position to start at, and returns an iterable like
    [`training_data.Samples`], with the attributes `position` and `bad`, of samples like those of the [`Preparation`]."""
    args = parse_args(__doc__, [each.value for each in SchedulerType], arguments)
    check_args(args)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    columns = Columns(
        args.image_column, args.caption_column, args.query_column, args.reference_column, args.mask_column
    )
    rows = None
    if open_samples is None:
        rows = load_rows(
            args.train_data_dir, args.dataset_name, args.dataset_config_name, args.streaming, columns.names()
        )
    report_to = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        # the learning rate scheduler advances once for each optimizer step, regardless of the number of processes
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes < started:
        # otherwise each process would train separately and overwrite the files of the other processes
        raise ValueError(
            f"`WORLD_SIZE` is {started}, but accelerate sees {accelerator.num_processes} process: on CPUs it needs"
            " ACCELERATE_USE_CPU=1 in the environment."
        )
    if open_samples is not None and (args.cache_features is not None or accelerator.num_processes > 1):
        raise ValueError(
            "`open_samples` cannot be combined with `cache_features`, which needs the files of each row, or with several"
            " processes, which would all train on the same samples."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    seed = 0 if args.seed is None else args.seed
    set_seed(seed)

    pipe, encoder = load_models(args, build)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe.to(accelerator.device)
    if dtype != torch.float32:
        pipe.to(dtype)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    encoder.to(accelerator.device)
    cache = None
    if args.cache_features is not None:
        names = ("pretrained_model_name_or_path", "revision", "variant", "image_encoder_name_or_path",
                 "ssr_encoder_name_or_path", "resolution")  # fmt: skip
        settings: dict[str, object] = {name: str(getattr(args, name)) for name in names}
        # the weights in a folder can change while its path stays the same
        settings["weights"] = [weight_sum(part) for part in (pipe.vae, pipe.text_encoder, pipe.ssr_image_encoder)]
        levels = list(encoder.config.image_levels)
        # `form` is the version of the cache format; files in another format are not read
        cache = FeatureCache(args.cache_features, {**settings, "levels": levels, "dtype": str(dtype), "form": 2})
    frozen = FrozenFeatures(pipe, encoder.config.image_levels, dtype, cache, f"{accelerator.process_index}")

    run = Run(accelerator, encoder, args)
    optimizer = make_optimizer(encoder.parameters(), args)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(SubjectEncoding(encoder), optimizer, lr_scheduler)
    if args.resume_from_checkpoint is not None:
        run.load(args.resume_from_checkpoint)
    if report_to is not None:
        config = {
            name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in vars(args).items()
        }
        accelerator.init_trackers("train_ssr", config=config)

    prepare = Preparation(
        columns, pipe.ssr_image_processor, args.resolution, args.min_image_size, cache, args.mask_query
    )
    place = (accelerator.process_index, accelerator.num_processes)
    if open_samples is not None:
        samples = open_samples(prepare, run.position)
    else:
        if hasattr(rows, "set_epoch"):
            reader = StreamedRows(rows, seed, args.shuffle_buffer_size, *place)
        else:
            reader = FiniteRows(rows, seed, args.train_batch_size, *place)
        samples = Samples(
            reader, prepare, run.position, args.dataloader_num_workers, lambda line: logger.warning(line, main_process_only=False)
        )  # fmt: skip
    stream = iter(samples)

    trainable = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    logger.info(f"Training {trainable:.1f} M parameters to step {args.max_train_steps}")
    bar = tqdm(
        total=args.max_train_steps, initial=run.step, desc="steps", disable=not accelerator.is_local_main_process
    )
    while run.step < args.max_train_steps:
        parts = {}
        for micro_step in range(args.gradient_accumulation_steps):
            batch = [next(stream) for _ in range(args.train_batch_size)]
            run.position = samples.position
            features = frozen(batch, args.mask_weight)
            turn = run.step * args.gradient_accumulation_steps + micro_step
            first = (turn * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            drawn = draw(seed, first, args.train_batch_size, features["latent_mean"].shape[1:])
            # the backward pass runs inside the context as well, because gradient checkpointing runs the layers again
            with accelerator.accumulate(model), subject_in_unet(pipe.unet, encoder.config.attention_layers):
                with accelerator.autocast():
                    loss, parts = compute_loss(model, frozen, features, drawn, scheduler, args)
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
        logs = {name: value.item() for name, value in parts.items()}
        bar.set_postfix({name: f"{value:.4f}" for name, value in logs.items()}, refresh=False)
        accelerator.log({**logs, "lr": lr_scheduler.get_last_lr()[0]}, step=run.step)
        if run.step % args.checkpointing_steps == 0:
            run.save()
        if args.validation_image and run.step % args.validation_steps == 0 and accelerator.is_main_process:
            validate(run, pipe, args)
    bar.close()

    accelerator.wait_for_everyone()
    bad = {name: reason for each in gather_object([samples.bad]) for name, reason in each.items()}
    if accelerator.is_main_process:
        save_result(run, pipe)
        logger.info(summary(bad))
        (run.folder / "bad_samples.json").write_text(json.dumps(bad, indent=1) + "\n")
        if args.push_to_hub:
            push(args, run.folder)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
