"""Shows errors as messages on the page."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
import torch


logger = logging.getLogger(__name__)


@contextmanager
def messages() -> Iterator[None]:
    """Context manager or decorator that shows errors as messages on the page. The message of a `ValueError` is shown
    as it is, because the user can fix the input. Other errors are logged, and the page only shows a general
    message."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        logger.exception("out of memory")
        message = "The GPU is out of memory. Try again when fewer people use the page."
        raise gr.Error(message, print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        logger.exception("unexpected")
        message = "Something went wrong. The log of the server has the error message."
        raise gr.Error(message, print_exception=False) from error
