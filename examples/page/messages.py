"""Errors as messages on the page."""

import functools
import logging
from collections.abc import Callable

import gradio as gr
import torch


logger = logging.getLogger(__name__)


def as_message(function: Callable) -> Callable:
    """`function`, whose errors are shown as a message. What a person can mend is shown as it is; of everything else the page
    says only that it happened, and the log says what."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except torch.OutOfMemoryError as error:
            logger.exception("out of memory")
            message = "There is not enough memory on the graphics card. Try again when fewer people draw."
            raise gr.Error(message, print_exception=False) from error
        except Exception as error:
            logger.exception("unexpected")
            message = "Something went wrong while drawing. The log of the page's server says what."
            raise gr.Error(message, print_exception=False) from error

    return wrapped
