"""
Keeps the experts of tasks that a step has not seen exactly where they are.

Shapes: T tasks, d_in and d_out the size of a linear, N_s r rank of a task's own experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...core.console import say
from ...core.errors import invalid, unsupported
from .experts import CGCExperts


__all__ = ["AbsentTaskGuard", "freeze_absent_tasks"]


@dataclass(frozen=True)
class _TaskBlocks:
    """The part of a parameter that belongs to single tasks: `view` splits it, `dim` of the view counts tasks."""

    parameter: nn.Parameter
    view: Callable[[torch.Tensor], torch.Tensor]
    dim: int

    def by_task(self, tensor: torch.Tensor) -> torch.Tensor:
        """(T, rest) view or copy of a tensor shaped like the parameter."""
        return self.view(tensor).movedim(self.dim, 0).flatten(1)

    def mask(self, absent: torch.Tensor) -> torch.Tensor:
        """(T,) -> a mask that broadcasts over the view."""
        shape = [1] * self.view(self.parameter.detach()).dim()
        shape[self.dim] = len(absent)
        return absent.view(shape)


def _task_blocks(experts: CGCExperts) -> Iterator[_TaskBlocks]:
    layout, common = experts.layout, experts.layout.common_rank
    if layout.num_own > 0:
        yield _TaskBlocks(experts.A, lambda tensor: tensor[common:].unflatten(0, (layout.num_tasks, -1)), 0)
        yield _TaskBlocks(experts.B, lambda tensor: tensor[:, common:].unflatten(1, (layout.num_tasks, -1)), 1)
    for name in ("gate_logits", "task_embedding", "token_gate", "task_matrix"):
        if (parameter := getattr(experts, name, None)) is not None:
            yield _TaskBlocks(parameter, lambda tensor: tensor, 0)


class AbsentTaskGuard:
    """
    The two hooks that [`freeze_absent_tasks`] puts on an optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer.
        experts (`list[CGCExperts]`):
            All experts that it may move.
        strict (`bool`, *optional*, defaults to `True`):
            As in [`freeze_absent_tasks`].
    """

    def __init__(self, optimizer: Optimizer, experts: list[CGCExperts], strict: bool = True) -> None:
        self._strict = strict
        self._given_up = False
        self._experts = [list(_task_blocks(module)) for module in experts]
        self._saved: list[tuple[_TaskBlocks, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

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
        for blocks in self._experts:
            live = [block for block in blocks if block.parameter.grad is not None]
            if not live:
                continue
            absent = torch.stack([(block.by_task(_grad(block)) == 0).all(dim=1) for block in live]).all(dim=0)
            for block in live:
                state = {
                    name: block.view(value).clone()
                    for name, value in _elementwise_state(optimizer, block.parameter).items()
                }
                values = block.view(block.parameter.detach()).clone()
                self._saved.append((block, block.mask(absent), values, state))

    def _fits(self, optimizer: Optimizer) -> bool:
        """Whether the state can be kept for single tasks; it exists from the second step on."""
        wrong = next((name for name in map(partial(_other_state, optimizer), self._parameters()) if name), None)
        if wrong is None:
            return True
        what, why = (
            f"freeze_absent_tasks with {type(optimizer).__name__}",
            f"its state `{wrong}` is no number per element of a parameter, so it cannot be kept for single tasks",
        )
        if self._strict:
            raise unsupported(what, why, "Use an optimizer such as AdamW or SGD.")
        self._given_up = True
        say(f"{type(optimizer).__name__} moves the experts of tasks that a step has no row of: {why}.")
        return False

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (block.parameter for blocks in self._experts for block in blocks)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for block, mask, values, state in self._saved:
            moved = block.view(block.parameter)
            moved.copy_(torch.where(mask, values, moved))
            for name, former in state.items():
                current = block.view(optimizer.state[block.parameter][name])
                current.copy_(torch.where(mask, former, current))
        self._saved = []


def _grad(block: _TaskBlocks) -> torch.Tensor:
    assert block.parameter.grad is not None
    return block.parameter.grad


def _elementwise_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """State with one number per element of the parameter; step counters are left alone."""
    state = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.numel() > 1}


def _other_state(optimizer: Optimizer, parameter: nn.Parameter) -> str | None:
    """Name of a state of another shape or kind than one number per element."""
    for name, value in _elementwise_state(optimizer, parameter).items():
        if value.shape != parameter.shape or not value.is_floating_point():
            return name
    return None


def freeze_absent_tasks(optimizer: Optimizer, model: nn.Module, *, strict: bool = True) -> AbsentTaskGuard:
    """
    Has an optimizer leave the experts of absent tasks alone: neither momentum nor weight decay moves them.

    Experts are blocks of one matrix, so the gradient of a task that no row of the step had is zero and not `None`, and
    AdamW would go on moving its block. Two hooks on `step` keep, for every task whose blocks in a linear all have a
    gradient of exactly zero, the values and the optimizer's state of before: what `torch.optim.SparseAdam` does for
    rows of an embedding. As there, step counters (bias correction) go on for all. What is absent is read from the
    gradients, after accumulation and after DDP has averaged them: no waiting for a device, no communication, and the
    same answer on every rank. Common experts and what tasks share of their gates are stepped as usual.

    Costs a copy of the tasks' own parameters and of their state while a step lasts.

    Args:
        optimizer (`torch.optim.Optimizer`):
            An optimizer with one number of state per element (AdamW, SGD, Lion, ...), or Accelerate's wrapper of one.
        model (`nn.Module`):
            A model with CGC-LoRA experts, wrapped by DDP or not.
        strict (`bool`, *optional*, defaults to `True`):
            What happens where the optimizer's state turns out not to be one number per element: an error, or a word
            about it, after which absent tasks are moved as they are without this function.

    Returns:
        [`AbsentTaskGuard`]: its `remove()` takes the hooks off.

    Raises:
        `ValueError`: if the model has no CGC-LoRA experts.
        `NotImplementedError`: where the optimizer does not hold the parameters themselves (DeepSpeed) or holds shards
            of them (FSDP), where the state is of another shape (Adafactor, 8-bit), or with a closure; the last two
            are found at a step.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    experts = [module for module in model.modules() if isinstance(module, CGCExperts)]
    if not experts:
        raise invalid("model", type(model).__name__, "a model with CGC-LoRA experts")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in experts:
        for parameter in module.parameters():
            is_shard = type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id")
            if is_shard or (parameter.requires_grad and id(parameter) not in held):
                raise unsupported(
                    "freeze_absent_tasks with DeepSpeed or FSDP",
                    "the optimizer holds flattened or sharded copies, in which no task has rows of its own",
                    "Keep every task in every step (a mixed, uniform sampler), or set `weight_decay=0`.",
                )
    return AbsentTaskGuard(optimizer, experts, strict)
