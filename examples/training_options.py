"""The options of train_ssr.py, and the checks of their values before training starts."""

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

from command_line import check_unused, make_parser, output_folder, positive, seed, share


# those of diffusers' SchedulerType
SCHEDULES = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup piecewise_constant".split()


def parse_args(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the options from `arguments` or from the command line."""
    parser = make_parser(description)
    add = parser.add_argument

    add("--pretrained_model_name_or_path", required=True, help="Stable Diffusion 1.5, from the Hub or a folder")
    add("--revision", help="revision of the pretrained model")
    add("--variant", help='of the pretrained model\'s files, such as "fp16"')
    add("--image_encoder_name_or_path", help="CLIP vision encoder, usually openai/clip-vit-large-patch14")
    add("--ssr_encoder_name_or_path", help="repository or folder with an SSR-Encoder to fine-tune")
    add("--inner_dim", type=positive, default=512, help="width of a new encoder's aligner")
    add("--num_attention_heads", type=positive, default=8, help="heads of a new encoder's aligner")
    add("--image_levels", type=int, nargs="+", help="levels of a new encoder; default: six of the vision encoder")
    add("--init_from_text", action=BooleanOptionalAction, default=True, help="start from the UNet's text projections")

    add("--train_data_dir", help="folder with metadata.jsonl, Parquet files (*.parquet) or WebDataset shards (*.tar)")
    add("--dataset_name", help="dataset of the Hub, instead of a folder")
    add("--dataset_config_name", help="configuration of the Hub's dataset")
    add("--streaming", action="store_true", help="stream Parquet files or a dataset of the Hub; shards always are")
    add("--shuffle_buffer_size", type=positive, default=1000, help="number of rows in the shuffle buffer of a stream")
    add("--image_column", default="image", help="the target image")
    add("--caption_column", default="text", help="the prompt")
    add("--query_column", default="query", help="the query, or a list of queries if the target shows several subjects")
    add("--reference_column", help="the reference, if it is not the target, or a list of references")
    add("--mask_column", help="the mask, white where the subject is in the reference, or a list; it can be empty")
    add("--mask_query", choices=("caption", "empty"), default="caption", help="query of a subject with only a mask")
    add("--mask_weight", type=float, default=1.0, help="how strongly the attention is restricted to the mask")
    add("--min_image_size", type=positive, default=64, help="images with a shorter side are skipped")
    add("--resolution", type=int, help="side of the square targets, in pixels; default: the base model's")
    add("--dataloader_num_workers", type=int, default=4, help="threads that read and prepare samples ahead")
    add("--cache_features", type=Path, help="cache the outputs of the frozen models in this folder")

    # optimization
    add("--output_dir", type=output_folder, default=Path("ssr-model"), help="for the encoder and the checkpoints")
    add("--report_to", default="tensorboard", help='"tensorboard", "wandb", "all", ... or "none"')
    add("--seed", type=seed, default=0, help="seed of the order of the rows and of all random numbers")
    add("--max_train_steps", type=positive, default=100_000, help="optimizer steps")
    add("--train_batch_size", type=positive, default=16, help="batch size of each process")
    add("--gradient_accumulation_steps", type=positive, default=1, help="number of batches per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="use gradient checkpointing: less memory, but slower")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's config")
    add("--allow_tf32", action="store_true", help="use TF32, which is faster on NVIDIA GPUs since Ampere")
    add("--learning_rate", type=float, default=5e-5, help="learning rate of AdamW")
    add("--lr_scheduler", choices=SCHEDULES, default="constant", help="learning rate schedule")
    add("--lr_warmup_steps", type=int, default=500, help="number of steps in which the learning rate rises from 0")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's decay of the mean of the gradients")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's decay of the mean of the squared gradients")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay of AdamW")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of AdamW")
    add("--max_grad_norm", type=float, default=1.0, help="maximum norm of the gradients")
    add("--use_ema", action="store_true", help="keep a moving average of the weights, and save it as the result")
    add("--ema_decay", type=share, default=0.9999, help="decay of the moving average")

    # loss
    add("--consistency_weight", type=float, help="weight of the consistency loss; default: 0.1, fine-tuning 0.001")
    add("--consistency_form", choices=("released", "paper"), default="released", help="compare tokens, or their means")
    add("--prompt_dropout", type=share, default=0.8, help="share of samples with an empty prompt")
    add("--subject_dropout", type=share, default=0.05, help="share of samples with an empty query and zero pixels")
    add("--timestep_bias", type=float, default=1.0, help="timestep = T * u ** timestep_bias: below 1, more noise")
    add("--latents", choices=("sample", "mode"), default="sample", help="mode: without the VAE's standard deviation")
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="default: that of the scheduler")

    # checkpoints
    add("--checkpointing_steps", type=positive, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=positive, help="maximum number of checkpoints; older ones are deleted")
    add("--resume_from_checkpoint", help='folder of a checkpoint, or "latest"')
    args = parser.parse_args(arguments)

    new_encoder = ("inner_dim", "num_attention_heads", "image_levels", "init_from_text")
    check_unused(parser, args, {"ssr_encoder_name_or_path": new_encoder})
    if args.consistency_weight is None:
        args.consistency_weight = 0.1 if args.ssr_encoder_name_or_path is None else 0.001
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` for the first option with an invalid value."""

    def check(valid: bool, message: str) -> None:
        if not valid:
            raise ValueError(message)

    for name in ("timestep_bias", "learning_rate", "max_grad_norm"):
        check(getattr(args, name) > 0, f"`{name}` has to be greater than 0, but is {getattr(args, name)}.")
    for name in ("consistency_weight", "mask_weight", "lr_warmup_steps", "dataloader_num_workers"):
        check(getattr(args, name) >= 0, f"`{name}` must not be negative, but is {getattr(args, name)}.")
    size = 8 if args.resolution is None else args.resolution
    check(size >= 8 and size % 8 == 0, f"`resolution` has to be a multiple of 8, but is {size}.")

    models = args.ssr_encoder_name_or_path, args.image_encoder_name_or_path
    check(any(models), "`image_encoder_name_or_path` is missing: pass the CLIP encoder for the references.")
    sources = (args.train_data_dir, args.dataset_name)
    check(sources.count(None) == 1, f"Pass either `train_data_dir` or `dataset_name`, but not {sources}.")
    resume = args.resume_from_checkpoint
    valid = resume in (None, "latest") or (Path(resume) / "run_0.json").is_file()
    check(valid, f'`resume_from_checkpoint` has to be "latest" or the folder of a checkpoint, but is {resume!r}.')

    from accelerate.tracking import get_available_trackers  # slow

    # accelerate only skips trackers that are not installed
    trackers = ["none", "all", *map(str, get_available_trackers())]
    unknown = f"`report_to` is {args.report_to!r}, which is unknown or not installed: choose one of {trackers}."
    check(args.report_to in trackers, unknown)
