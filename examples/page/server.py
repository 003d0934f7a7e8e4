"""The options of the page, and the server."""

import argparse
import os
import socket
from collections.abc import Sequence

from command_line import make_parser, port, positive
from drawing import SD15_SETTINGS, call_options, check_model, check_source, default_settings


LARGEST_FILE = "32mb"
NEEDS = 'The page needs Gradio: pip install -e ".[app]"'


def parse_args(arguments: Sequence[str] | None = None, description: str | None = __doc__) -> argparse.Namespace:
    parser = make_parser(description, epilog=NEEDS)
    call_options(parser)
    # these depend on the checkpoint, and the seed is random
    parser.set_defaults(**dict.fromkeys(SD15_SETTINGS), seed=None)
    parser.add_argument("--prompt", help="the first prompt; default: one that follows the queries")
    parser.add_argument("--ssr", help="the SSR-Encoder, if --checkpoint is only a base model")
    parser.add_argument(
        "--controlnet", help="a ControlNet that follows edges; default: that of the checkpoint, if it has one"
    )
    parser.add_argument(
        "--motion_adapter", help="a motion adapter for videos; default: that of the checkpoint, if it has one"
    )
    parser.add_argument("--max_subjects", type=positive, default=3, help="how many subjects an image may have")
    parser.add_argument("--max_frames", type=positive, default=16, help="how many frames a video may have")
    parser.add_argument(
        "--concurrency", type=positive, default=2, help="how many requests run at once; others wait in a queue"
    )
    parser.add_argument(
        "--max_waiting", type=positive, default=64, help="how many requests can wait; further ones are rejected"
    )
    # this is an environment variable of Gradio, which is set in a Space
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on"
    )
    parser.add_argument("--port", type=port, help="port; default: the first free one from 7860")
    args = parser.parse_args(arguments)
    for name, value in default_settings(args.checkpoint).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(arguments: Sequence[str] | None = None, description: str | None = __doc__) -> None:
    args = parse_args(arguments, description)
    try:
        start(args)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise SystemExit(NEEDS) from None


def start(args: argparse.Namespace, wait: bool = True) -> "Page":  # noqa: F821
    """Loads the models and serves the page. With `wait=False`, the function returns while the server is running."""
    for setting in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        os.environ.setdefault(setting, "False")
    for option in ("checkpoint", "ssr", "controlnet", "motion_adapter"):
        check_source(f"--{option}", getattr(args, option))
    try:
        socket.getaddrinfo(args.host, None)
    except OSError as error:
        raise ValueError(f"--host: {args.host} is not an address of this machine: {error}") from error
    from diffusers import ControlNetModel, MotionAdapter

    from .checkpoints import Checkpoints
    from .layout import Page
    from .studio import Studio
    from .widgets import CSS, THEME

    # the studio loads these models when they are used first
    for model_class, option in ((ControlNetModel, "controlnet"), (MotionAdapter, "motion_adapter")):
        if getattr(args, option) is not None:
            check_model(f"--{option}", getattr(args, option), model_class)
    page = Page(Studio(Checkpoints.from_options(args)), args)
    page.blocks.queue(max_size=args.max_waiting)
    page.blocks.launch(
        server_name=args.host,
        server_port=args.port,
        css=CSS,
        theme=THEME,
        footer_links=[],
        max_file_size=LARGEST_FILE,
        ssr_mode=False,  # server-side rendering of Gradio, which needs Node
        prevent_thread_lock=not wait,
        # Gradio would end the start if the page does not answer within 3 seconds, as on a busy machine
        _frontend=False,
    )
    return page
