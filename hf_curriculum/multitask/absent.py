"""
Keeps what belongs to the tasks that a step has not seen exactly where it is.

Shapes: T tasks, n places of a parameter that belong to single tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from ..core.console import say
from ..core.errors import invalid, unsupported


__all__ = [
    "AbsentTaskGuard",
    "OwnsTaskBlocks",
    "TaskBlocks",
    "freeze_absent_tasks",
    "modules_with_task_blocks",
    "task_owners",
]


class TaskBlocks:
    """
    Which part of a parameter belongs to which task: the last n places along one dimension.

    Args:
        parameter (`nn.Parameter`):
            The parameter. What stands before its last n places is shared by the tasks.
        owners (`torch.Tensor` of shape `(n,)`, int64):
            Task of each place, in [0, T).
        dim (`int`, *optional*, defaults to `0`):
            The dimension.
    """

    def __init__(self, parameter: nn.Parameter, owners: torch.Tensor, dim: int = 0) -> None:
        self.parameter = parameter
        self.dim = dim
        self._owners = owners

    @property
    def owners(self) -> torch.Tensor:
        """Task of each place, `(n,)`, on the device of the parameter; moved there once."""
        if self._owners.device != self.parameter.device:
            self._owners = self._owners.to(self.parameter.device)
        return self._owners

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of the places of single tasks in a tensor shaped like the parameter."""
        count = len(self._owners)
        return tensor.narrow(self.dim, tensor.shape[self.dim] - count, count)

    def has_gradient(self, num_tasks: int) -> torch.Tensor:
        """Which tasks have a gradient other than zero somewhere in the parameter, `(T,)`, int32: 1 or 0."""
        assert self.parameter.grad is not None
        moved = self.own(self.parameter.grad) != 0
        for dim in reversed(range(moved.dim())):
            if dim != self.dim:
                moved = moved.any(dim=dim)
        found = torch.zeros(num_tasks, dtype=torch.int32, device=moved.device)
        return found.scatter_reduce(0, self.owners, moved.to(torch.int32), "amax")

    def mask(self, tasks: torch.Tensor) -> torch.Tensor:
        """(T,) bool -> a mask that broadcasts over [`own`]."""
        shape = [1] * self.parameter.dim()
        shape[self.dim] = len(self._owners)
        return tasks[self.owners].view(shape)


def task_owners(places: Sequence[int] | int, num_tasks: int) -> torch.Tensor:
    """
    Owners of the places of a parameter in which the tasks stand one after the other.

    Args:
        places (`Sequence[int]` of length T, or `int`):
            Places of each task, or of every task.
        num_tasks (`int`):
            T.

    Returns:
        `torch.Tensor` of shape `(n,)`, int64.
    """
    counts = torch.tensor([places] * num_tasks if isinstance(places, int) else places)
    return torch.repeat_interleave(torch.arange(num_tasks), counts)


@runtime_checkable
class OwnsTaskBlocks(Protocol):
    """A module of whose parameters some parts belong to single tasks: experts of CGC-LoRA, task heads."""

    def task_blocks(self) -> tuple[int, list[TaskBlocks]]:
        """T, and the blocks; a task without a gradient in any of them is absent from all of them."""


def modules_with_task_blocks(model: nn.Module) -> list[OwnsTaskBlocks]:
    """
    The modules of a model that own parts of single tasks.

    Args:
        model (`nn.Module`):
            The model, wrapped by DDP or not.

    Returns:
        `list[OwnsTaskBlocks]`: empty for a model that its tasks share whole.
    """
    return [module for module in model.modules() if isinstance(module, OwnsTaskBlocks)]


class AbsentTaskGuard:
    """
    The two hooks that [`freeze_absent_tasks`] puts on an optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer.
        modules (`list[OwnsTaskBlocks]`):
            All that it may move of single tasks.
        strict (`bool`, *optional*, defaults to `True`):
            As in [`freeze_absent_tasks`].
    """

    def __init__(self, optimizer: Optimizer, modules: list[OwnsTaskBlocks], strict: bool = True) -> None:
        self._strict = strict
        self._given_up = False
        self._modules = [module.task_blocks() for module in modules]
        self._saved: list[tuple[TaskBlocks, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # `args` starts with the optimizer itself.
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
            raise unsupported(
                "freeze_absent_tasks with a closure",
                "the gradients of the step are not known before it",
                "Use an optimizer that steps on the gradients that are there.",
            )
        self._saved = []
        if self._given_up or not self._fits(optimizer):
            return
        for num_tasks, blocks in self._modules:
            live = [block for block in blocks if block.parameter.grad is not None]
            if not live:
                continue
            absent = torch.stack([block.has_gradient(num_tasks) for block in live]).amax(dim=0) == 0
            for block in live:
                state = {
                    name: block.own(value).clone()
                    for name, value in _elementwise_state(optimizer, block.parameter).items()
                }
                self._saved.append((block, block.mask(absent), block.own(block.parameter).clone(), state))

    def _fits(self, optimizer: Optimizer) -> bool:
        """Whether the state can be kept for single tasks; it exists from the second step on."""
        parameters = (block.parameter for _, blocks in self._modules for block in blocks)
        wrong = next((name for name in map(partial(_other_state, optimizer), parameters) if name), None)
        if wrong is None:
            return True
        what, why = (
            f"freeze_absent_tasks with {type(optimizer).__name__}",
            f"its state `{wrong}` is no number per element of a parameter, so it cannot be kept for single tasks",
        )
        if self._strict:
            raise unsupported(what, why, "Use an optimizer such as AdamW or SGD.")
        self._given_up = True
        say(f"{type(optimizer).__name__} moves the experts and heads of tasks that a step has no row of: {why}.")
        return False

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for block, mask, values, state in self._saved:
            moved = block.own(block.parameter)
            moved.copy_(torch.where(mask, values, moved))
            for name, former in state.items():
                current = block.own(optimizer.state[block.parameter][name])
                current.copy_(torch.where(mask, former, current))
        self._saved = []


def _elementwise_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """State with one number per element of the parameter; step counters are left alone."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and (value.numel() > 1 or value.shape == parameter.shape)
    }


def _other_state(optimizer: Optimizer, parameter: nn.Parameter) -> str | None:
    """Name of a state of another shape or kind than one number per element."""
    for name, value in _elementwise_state(optimizer, parameter).items():
        if value.shape != parameter.shape or not value.is_floating_point():
            return name
    return None


def freeze_absent_tasks(optimizer: Optimizer, model: nn.Module, *, strict: bool = True) -> AbsentTaskGuard:
    """
    Has an optimizer leave the experts and heads of absent tasks alone: neither momentum nor weight decay moves them.

    Experts of CGC-LoRA are blocks of one matrix, and task heads are rows of one, so the gradient of a task that no row
    of the step had is zero and not `None`, and AdamW would go on moving its part. Two hooks on `step` keep, for every
    task whose blocks in a module all have a gradient of exactly zero, the values and the optimizer's state of before:
    what `torch.optim.SparseAdam` does for rows of an embedding. As there, step counters (bias correction) go on for
    all. What is absent is read from the gradients, after accumulation and after DDP has averaged them: no waiting for
    a device, no communication, and the same answer on every rank. Common experts and what tasks share of their gates
    are stepped as usual.

    Costs a copy of the tasks' own parameters and of their state while a step lasts.

    Args:
        optimizer (`torch.optim.Optimizer`):
            An optimizer with one number of state per element (AdamW, SGD, Lion, ...), or Accelerate's wrapper of one.
        model (`nn.Module`):
            A model with CGC-LoRA experts or task heads, wrapped by DDP or not.
        strict (`bool`, *optional*, defaults to `True`):
            What happens where the optimizer's state turns out not to be one number per element: an error, or a word
            about it, after which absent tasks are moved as they are without this function.

    Returns:
        [`AbsentTaskGuard`]: its `remove()` takes the hooks off.

    Raises:
        `ValueError`: if the model has neither.
        `NotImplementedError`: where the optimizer does not hold the parameters themselves (DeepSpeed) or holds shards
            of them (FSDP), where the state is of another shape (Adafactor, 8-bit), or with a closure; the last two
            are found at a step.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    modules = modules_with_task_blocks(model)
    if not modules:
        raise invalid("model", type(model).__name__, "a model with CGC-LoRA experts or task heads")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for block in (block for module in modules for block in module.task_blocks()[1]):
        parameter = block.parameter
        is_shard = type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id")
        if is_shard or (parameter.requires_grad and id(parameter) not in held):
            raise unsupported(
                "freeze_absent_tasks with DeepSpeed or FSDP",
                "the optimizer holds flattened or sharded copies, in which no task has rows of its own",
                "Keep every task in every step (a mixed, uniform sampler), or set `weight_decay=0`. Where a model has "
                "begun another stage since the optimizer was made, make a new Trainer.",
            )
    return AbsentTaskGuard(optimizer, modules, strict)
