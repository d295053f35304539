"""
How the tasks of a batch reach the layers: one object that all layers of a model read.

Shapes: B rows of ids, S positions in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import invalid
from ..passes import PassState
from ..tasks import TaskRegistry, Tasks, is_one_task


__all__ = ["TaskBatch", "TaskState", "resolve_tasks"]


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
    if not isinstance(tasks, torch.Tensor):
        # Known without a look at the tensor, which a compiled pass must not take.
        each: Any = [tasks] if is_one_task(tasks) else tasks
        known = [registry.id(task) for task in each]
        lowest, highest = min(known), max(known)
    elif ids.device.type != "cpu" or torch.compiler.is_compiling():
        return TaskBatch(ids, has_reserved=registry.unknown_task != "error")
    else:
        lowest, highest = (int(bound) for bound in torch.aminmax(ids))
    if lowest != highest:
        return TaskBatch(ids, has_reserved=lowest < 0)
    return TaskBatch(ids if ids.dim() == 2 else ids[:1], has_reserved=lowest < 0, single=lowest)


class TaskState(PassState[Mapping[str, TaskBatch]]):
    """
    The tasks that the layers of a model see at the moment, by adapter.

    Args:
        current (`Mapping[str, TaskBatch]`, *optional*):
            By adapter. `None` outside a forward pass.
        merging (`Mapping[str, int]`, *optional*):
            By adapter, the task that is being merged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.merging: Mapping[str, int] = {}
