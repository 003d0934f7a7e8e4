"""Divides the work of a script among the processes that `torchrun` or `accelerate launch` starts."""

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


Item = TypeVar("Item")


def start_processes() -> PartialState:
    """Joins the processes of the launcher. Without a launcher, there is one process."""
    # unlike `Accelerator`, `PartialState` does not read this variable
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))
    atexit.register(state.destroy_process_group)
    check_processes(state.num_processes)
    return state


def check_processes(num_processes: int) -> None:
    """Raises a `ValueError` if accelerate sees fewer processes than were started, which would all do the same work."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes < started:
        raise ValueError(
            f"`WORLD_SIZE` is {started}, but accelerate sees {num_processes} process: on CPUs it needs"
            " ACCELERATE_USE_CPU=1 in the environment."
        )


def own_share(state: PartialState, items: Sequence[Item], name: str) -> list[Item]:
    """Returns the items for this process, and prints their number. Every item belongs to exactly one process."""
    own = list(items[state.process_index :: state.num_processes])
    print(
        f"process {state.process_index} of {state.num_processes} on {state.device}: {len(own)} of {len(items)} {name}",
        flush=True,
    )
    return own
