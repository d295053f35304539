"""What several processes must agree on, over whatever process group the Trainer started."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from .errors import invalid


T = TypeVar("T")

__all__ = ["check_launch", "end_processes", "is_main_process", "on_main_process", "rank_and_world", "sum_over_ranks"]


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return rank_and_world()[0] == 0


def on_main_process(function: Callable[[], T]) -> T:
    """
    Calls a function on rank 0 and gives its result, or its error, to every rank.

    Without this, an error on rank 0 alone (a full disk, say) leaves the others waiting in their next collective.

    Args:
        function (`Callable`):
            Called without arguments on rank 0 only. Its result must be picklable.

    Returns:
        The result, on every rank.

    Raises:
        `Exception`: the function's own on rank 0, a `RuntimeError` with its text on the others.
    """
    rank, world = rank_and_world()
    if world == 1:
        return function()
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    failure: Exception | None = None
    if rank == 0:
        try:
            outcome = [(function(), None)]
        except Exception as error:  # told to every rank and raised on each, never swallowed
            failure, outcome = error, [(None, f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    result, told = outcome[0]
    if failure is not None:
        raise failure
    if told is not None:
        raise RuntimeError(f"Rank 0 failed: {told}")
    return result  # type: ignore[return-value]


def sum_over_ranks(values: np.ndarray, device: torch.device) -> np.ndarray:
    """
    Adds up an array over all ranks. Collective.

    Args:
        values (`np.ndarray`, float64):
            This rank's part; zero where another rank has the value.
        device (`torch.device`):
            Device that the process group communicates on.

    Returns:
        `np.ndarray` of the same shape, float64: the sum, equal on every rank.
    """
    if rank_and_world()[1] == 1:
        return values
    # A copy: on the CPU the tensor would share the caller's memory, and the reduction is in place.
    on_device = torch.from_numpy(values).to(device, copy=True)
    dist.all_reduce(on_device)
    return on_device.cpu().numpy()


def check_launch(accelerator: Accelerator) -> None:
    """
    Refuses a launch in which the started processes do not know of one another.

    On a machine without an accelerator, two started processes each believe they are alone unless the training
    arguments say `use_cpu=True`: both would train on all the data and write the same files.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.

    Raises:
        `ValueError`: if the environment's `WORLD_SIZE` is not the accelerator's number of processes.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise invalid(
            "WORLD_SIZE",
            started,
            f"{accelerator.num_processes}, the number of processes that the trainer sees",
            "Without an accelerator, set `use_cpu=True` in the training arguments, so that the processes find one "
            "another.",
        )


def end_processes() -> None:
    """
    Ends this process when every process of its group has come to its end. To be called last; a no-op without a group.

    Interpreters that close a gloo group while another process still writes, or that something (a wrapped model, a
    DeepSpeed engine) still holds one of when they are finalized, abort now and then after their work is done, and the
    launch counts as failed: in 8 of 25 launches on two busy cores, none of 25 when nothing held the group. So with
    gloo the exit handlers run, the streams are flushed, and the interpreter is left without being finalized.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    gloo = "gloo" in dist.get_backend_config()
    dist.barrier()
    dist.destroy_process_group()
    if gloo:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
