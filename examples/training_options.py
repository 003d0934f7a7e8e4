"""The options of train_ssr.py, and the checks of their values before training starts."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from command_line import HelpFormatter, check_companions, check_unused, output_folder


def parse_args(
    description: str, lr_schedulers: Sequence[str], arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parses the options from `arguments` or from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument

    add("--pretrained_model_name_or_path", required=True, help="Stable Diffusion 1.5, from the Hub or a folder")
    add("--revision", help="revision of the pretrained model")
    add("--variant", help='of the pretrained model\'s files, such as "fp16"')
    add("--image_encoder_name_or_path", help="CLIP vision encoder, usually openai/clip-vit-large-patch14")
    add("--ssr_encoder_name_or_path", help="repository or folder with an SSR-Encoder to fine-tune")
    add("--released_aligner", type=Path, help="pytorch_model.bin of the authors, to fine-tune the released weights")
    add("--released_layers", type=Path, help="pytorch_model_1.bin of the authors")

    add("--inner_dim", type=int, default=512, help="width of a new encoder's aligner")
    add("--num_attention_heads", type=int, default=8, help="heads of a new encoder's aligner")
    add(
        "--image_levels",
        type=int,
        nargs="+",
        help="levels of the vision encoder for a new encoder; default: six, evenly spaced",
    )
    add("--init_from_text", action=argparse.BooleanOptionalAction, default=True,
        help="initialise a new encoder's keys and values with those of the UNet for text")  # fmt: skip

    add("--train_data_dir", help="folder with metadata.jsonl, Parquet files (*.parquet) or WebDataset shards (*.tar)")
    add("--dataset_name", help="dataset of the Hub, instead of a folder")
    add("--dataset_config_name", help="configuration of the Hub's dataset")
    add(
        "--streaming",
        action="store_true",
        help="stream Parquet files or a dataset of the Hub; shards are always streamed",
    )
    add("--shuffle_buffer_size", type=int, default=1000, help="number of rows in the shuffle buffer of a stream")
    add("--image_column", default="image", help="the target picture")
    add("--caption_column", default="text", help="the prompt")
    add("--query_column", default="query",
        help="column with the query, or with a list of queries if the target shows several subjects")  # fmt: skip
    add("--reference_column", help="column with the reference, if it is not the target, or with a list of references")
    add(
        "--mask_column",
        help="column with the mask (white where the subject is in the reference), or with a list; rows can leave it empty",
    )
    add("--mask_query", choices=("caption", "empty"), default="caption",
        help="the query of a subject that has a mask and no query: the caption, or an empty query")  # fmt: skip
    add("--mask_weight", type=float, default=1.0, help="how strongly the attention is restricted to the mask")
    add(
        "--min_image_size",
        type=int,
        default=64,
        help="minimum length of the shorter side; smaller pictures are skipped",
    )
    add("--resolution", type=int, help="side of the square targets, in pixels; default: the base model's")
    add("--dataloader_num_workers", type=int, default=4, help="threads that read and prepare samples ahead")
    add("--cache_features", type=Path, help="cache the outputs of the frozen models in this folder")

    add("--output_dir", type=output_folder, default=Path("ssr-model"),
        help="output folder for the encoder (for load_ssr) and the checkpoints")  # fmt: skip
    add("--logging_dir", default="logs", help="folder for logs inside output_dir")
    add("--report_to", default="tensorboard", help='"tensorboard", "wandb", "all", ... or "none"')
    add("--seed", type=int, help="default: 0")
    add("--max_train_steps", type=int, default=100_000, help="optimizer steps")
    add("--train_batch_size", type=int, default=16, help="batch size of each process")
    add("--gradient_accumulation_steps", type=int, default=1, help="number of batches per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="use gradient checkpointing: less memory, but slower")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's config")
    add("--allow_tf32", action="store_true", help="use TF32, which is faster on NVIDIA GPUs since Ampere")
    add("--learning_rate", type=float, default=5e-5, help="learning rate of AdamW")
    add("--lr_scheduler", choices=lr_schedulers, default="constant", help="learning rate schedule")
    add("--lr_warmup_steps", type=int, default=500, help="number of steps in which the learning rate rises from 0")
    add("--use_8bit_adam", action="store_true", help="needs bitsandbytes")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's decay of the mean of the gradients")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's decay of the mean of the squared gradients")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay of AdamW")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of AdamW")
    add("--max_grad_norm", type=float, default=1.0, help="maximum norm of the gradients")
    add("--use_ema", action="store_true", help="keep a moving average of the weights, and save it as the result")
    add("--ema_decay", type=float, default=0.9999, help="decay of the moving average")

    add(
        "--consistency_weight",
        type=float,
        help="weight of the consistency loss; default: 0.1, and 0.001 when fine-tuning",
    )
    add("--consistency_form", choices=("released", "paper"), default="released",
        help="released: compares each token; paper: compares the means")  # fmt: skip
    add("--prompt_dropout", type=float, default=0.8, help="share of samples with an empty prompt")
    add("--subject_dropout", type=float, default=0.05,
        help="share of samples with an empty query and zero pixels, as in the unconditional branch")  # fmt: skip
    add("--timestep_bias", type=float, default=1.0,
        help="timestep = T * u ** timestep_bias: below 1, noisy steps come more often")  # fmt: skip
    add("--latents", choices=("sample", "mode"), default="sample",
        help="how latents are taken from the VAE's distribution; use mode for a VAE with an untrained standard deviation")  # fmt: skip
    add(
        "--prediction_type",
        choices=("epsilon", "v_prediction", "sample"),
        help="prediction target; default: that of the scheduler",
    )

    add("--checkpointing_steps", type=int, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=int, help="maximum number of checkpoints; older ones are deleted")
    add("--resume_from_checkpoint", help='folder of a checkpoint, or "latest"')
    add("--validation_image", type=Path, nargs="+", help="references for validation pictures")
    add("--validation_query", nargs="+", help="one query for each validation image")
    add("--validation_prompt", nargs="+", help="one prompt for each validation image")
    add("--validation_steps", type=int, default=500, help="steps between validations")
    add("--validation_scale", type=float, default=0.65, help="subject scale of the validation pictures")
    add("--validation_inference_steps", type=int, default=30, help="denoising steps")
    add("--push_to_hub", action="store_true", help="upload the result")
    add("--hub_model_id", help="<owner>/<repo>; default: the name of output_dir")
    add("--hub_token", help="default: the one of `hf auth login`")
    args = parser.parse_args(arguments)
    companions = {
        "dataset_name": ("dataset_config_name",),
        "mask_column": ("mask_query", "mask_weight"),
        "use_ema": ("ema_decay",),
        "push_to_hub": ("hub_model_id", "hub_token"),
        "validation_image": ("validation_steps", "validation_scale", "validation_inference_steps"),
    }
    check_companions(parser, args, companions)
    new_encoder = ("inner_dim", "num_attention_heads", "image_levels", "init_from_text")
    check_unused(parser, args, {"ssr_encoder_name_or_path": new_encoder, "released_aligner": new_encoder})
    if args.consistency_weight is None:
        fresh = args.ssr_encoder_name_or_path is None and args.released_aligner is None
        args.consistency_weight = 0.1 if fresh else 0.001
    return args


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        `ValueError`: for the first option with an invalid value.
    """
    positive = (
        "min_image_size", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
        "checkpointing_steps", "validation_steps", "validation_inference_steps", "inner_dim", "num_attention_heads",
        "shuffle_buffer_size", "timestep_bias", "learning_rate", "max_grad_norm",
    )  # fmt: skip
    for name in positive:
        if not getattr(args, name) > 0:
            raise ValueError(f"`{name}` has to be greater than 0, but is {getattr(args, name)}.")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        raise ValueError(f"`checkpoints_total_limit` has to be at least 1, but is {args.checkpoints_total_limit}.")
    for name in ("prompt_dropout", "subject_dropout", "ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`{name}` is a share and has to be from 0 to 1, but is {getattr(args, name)}.")
    for name in ("consistency_weight", "mask_weight", "lr_warmup_steps", "dataloader_num_workers"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"`{name}` must not be negative, but is {getattr(args, name)}.")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"`seed` must not be negative, but is {args.seed}.")
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        raise ValueError(f"`resolution` has to be a multiple of 8, but is {args.resolution}.")
    if args.inner_dim % args.num_attention_heads:
        raise ValueError(
            f"`inner_dim` has to be a multiple of `num_attention_heads`, but they are {args.inner_dim} and"
            f" {args.num_attention_heads}."
        )
    if (args.released_aligner is None) != (args.released_layers is None):
        raise ValueError("`released_aligner` and `released_layers` belong together: pass both or none.")
    if args.released_aligner is not None and args.ssr_encoder_name_or_path is not None:
        raise ValueError("Pass either `ssr_encoder_name_or_path` or the released files, but not both.")
    if args.image_encoder_name_or_path is None and args.ssr_encoder_name_or_path is None:
        raise ValueError("`image_encoder_name_or_path` is missing: pass the CLIP vision encoder for the references.")
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError(
            f"Pass either `train_data_dir` or `dataset_name`: got {args.train_data_dir!r} and {args.dataset_name!r}."
        )
    _check_files(args)
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("`use_8bit_adam` needs the package bitsandbytes, which is not installed.")


def _check_files(args: argparse.Namespace) -> None:
    images, queries, prompts = (getattr(args, f"validation_{name}") or [] for name in ("image", "query", "prompt"))
    if not len(images) == len(queries) == len(prompts):
        raise ValueError(
            "`validation_image`, `validation_query` and `validation_prompt` have to be of one length, but hold"
            f" {len(images)}, {len(queries)} and {len(prompts)}."
        )
    named = [("validation_image", file) for file in images]
    named += [(name, getattr(args, name)) for name in ("released_aligner", "released_layers") if getattr(args, name)]
    for name, file in named:
        if not file.is_file():
            raise ValueError(f"`{name}`: there is no file {file}.")
    resume = args.resume_from_checkpoint
    if resume is not None and resume != "latest" and not (Path(resume) / "run_0.json").is_file():
        raise ValueError(
            f'`resume_from_checkpoint` has to be "latest" or the folder of a checkpoint (`checkpoint-...` in the output'
            f" folder of an earlier run), but is {resume!r}."
        )
