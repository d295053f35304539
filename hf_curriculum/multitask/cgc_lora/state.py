"""
How the tasks of a batch reach the layers: one object that all layers of a model read.

Shapes: B rows of ids, S positions in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.errors import invalid
from ..tasks import TaskRegistry, Tasks


__all__ = ["CheckpointWithTasks", "TaskBatch", "TaskState", "resolve_tasks"]


@dataclass(frozen=True)
class TaskBatch:
    """
    The tasks of a batch, as one adapter numbers them.

    Args:
        ids (`torch.Tensor` of shape `(B,)` or `(B, S)`, int64):
            Ids in [-2, T). One row stands for any number of rows of a batch.
        has_reserved (`bool`):
            Whether an id may be below 0. `False` is a promise.
        single (`int`, *optional*):
            The id that all rows have, where this is known without reading an accelerator.
    """

    ids: torch.Tensor
    has_reserved: bool = False
    single: int | None = None

    def to(self, device: torch.device) -> TaskBatch:
        """The same tasks with their ids on `device`."""
        if self.ids.device == device:
            return self
        return TaskBatch(self.ids.to(device, non_blocking=True), self.has_reserved, self.single)


def resolve_tasks(tasks: Tasks, registry: TaskRegistry) -> TaskBatch:
    """
    Looks the tasks of a batch up and notes what is known about them without waiting for a device.

    Args:
        tasks (`str`, `int`, `Sequence` or `torch.Tensor`):
            As in [`TaskRegistry.ids`].
        registry ([`TaskRegistry`]):
            The adapter's tasks.

    Returns:
        [`TaskBatch`]

    Raises:
        `ValueError`: for an unknown task, a wrong shape or dtype, or no row at all.
    """
    ids = registry.ids(tasks)
    if ids.numel() == 0:
        raise invalid("tasks", "none", "the task of at least one row")
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return TaskBatch(ids, has_reserved=registry.unknown_task != "error")
    lowest, highest = (int(bound) for bound in torch.aminmax(ids))
    if lowest != highest:
        return TaskBatch(ids, has_reserved=lowest < 0)
    return TaskBatch(ids if ids.dim() == 2 else ids[:1], has_reserved=lowest < 0, single=lowest)


@dataclass
class TaskState:
    """
    The tasks that the layers of a model see at the moment.

    Args:
        current (`Mapping[str, TaskBatch]`, *optional*):
            By adapter. `None` outside a forward pass.
        merging (`Mapping[str, int]`, *optional*):
            By adapter, the task that is being merged.
    """

    current: Mapping[str, TaskBatch] | None = None
    merging: Mapping[str, int] = field(default_factory=dict)
    _outer: list[Mapping[str, TaskBatch] | None] = field(default_factory=list)

    def enter(self) -> None:
        """Starts a pass that may set `current`; [`leave`] puts it back."""
        self._outer.append(self.current)

    def leave(self) -> None:
        """Puts back what [`enter`] found."""
        # Another hook may have raised before ours could enter: then there is nothing to put back.
        self.current = self._outer.pop() if self._outer else None

    @contextmanager
    def using(self, batches: Mapping[str, TaskBatch] | None) -> Iterator[None]:
        """Has the layers see `batches` inside the context."""
        self.enter()
        self.current = batches
        try:
            yield
        finally:
            self.leave()


class CheckpointWithTasks:
    """
    A model's checkpoint function whose recomputation in the backward pass sees the tasks of its own forward pass.

    The tasks are captured at the first pass, so that any number of forward passes may come before a backward pass.

    Args:
        checkpoint (`Callable`):
            `torch.utils.checkpoint.checkpoint` with its options, as transformers installed it, or DeepSpeed's.
        state ([`TaskState`]):
            What the layers read.
    """

    def __init__(self, checkpoint: Callable[..., Any], state: TaskState) -> None:
        self.checkpoint = checkpoint
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `function(*args)`."""
        # A compiled checkpoint holds the ids as inputs of its graph and recomputes no Python code.
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        batches = self.state.current

        def with_tasks(*inputs: Any, **options: Any) -> Any:
            with self.state.using(batches):
                return function(*inputs, **options)

        return self.checkpoint(with_tasks, *args, **kwargs)
