"""
Which LoRAs the rows of a forward pass run through, and where rows become several.

Shapes: B rows, S positions, T tasks, K tasks that every row runs through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..passes import PassState


__all__ = ["SharedStart", "TaskPass", "belongs_to_rows", "repeat_rows"]


@dataclass(frozen=True)
class TaskPass:
    """
    What a forward pass tells the adapted layers.

    Args:
        tasks (`torch.Tensor` of shape `(B,)`, int64):
            Task of each row.
        single (`int`, *optional*):
            The task of all rows, where this is known without reading an accelerator.
        sources (`torch.Tensor` of shape `(K,)`, int64, *optional*):
            Tasks whose LoRAs every row runs through: the layers see K blocks of B rows, block j through LoRA
            `sources[j]`. `None`: every row runs through the LoRA of its own task.
        fused (`bool`, *optional*, defaults to `False`):
            Whether the layers fuse the outputs of all LoRAs (level `"layer"`).
        visible (`torch.Tensor` of shape `(B, T)`, bool, *optional*):
            Which tasks a row may listen to, with `fused`. All by default.
        mask (`torch.Tensor` of shape `(B, S)`, *optional*):
            0 at padding, for the attention that is kept in `attention`.
        attention (`list[torch.Tensor]`, *optional*):
            Where layers that fuse put what each row listened to, `(B, T)`. `None`: nowhere.
        widened (`dict`):
            Inputs that were repeated already, so that those that go to every block are repeated once.
    """

    tasks: torch.Tensor
    single: int | None = None
    sources: torch.Tensor | None = None
    fused: bool = False
    visible: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    attention: list[torch.Tensor] | None = None
    widened: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def repeat_rows(value: Any, rows: int, times: int) -> Any:
    """
    Repeats the rows of a batch, one block after the other.

    Args:
        value (`Any`):
            A tensor of shape `(B, ...)`, or anything else, which is left alone.
        rows (`int`):
            B.
        times (`int`):
            K.

    Returns:
        A tensor of shape `(K B, ...)`, or what was given.
    """
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows:
        return value.repeat(times, *[1] * (value.dim() - 1))
    return value


class SharedStart:
    """
    The blocks below the first adapted one, which rows pass once, whatever number of LoRAs comes after them.

    At the first adapted block, the rows become K blocks of rows: there and in all blocks after it, what is of rows is
    repeated (hidden states, masks, positions), as told by [`belongs_to_rows`].

    Args:
        backbone (`nn.Module`):
            The base model.
        adapted (`Sequence[str]`):
            Names of the adapted linears in it.
        state ([`~hf_curriculum.multitask.passes.PassState`]):
            What the layers read.

    Attributes:
        blocks (`int`):
            Blocks of the model; 0 if the adapted linears are not all in one list of blocks.
        first (`int`):
            Number of the first adapted block; nothing is shared where it is 0.
    """

    def __init__(self, backbone: nn.Module, adapted: Sequence[str], state: PassState[TaskPass]) -> None:
        self._state = state
        blocks, numbers = _blocks_of(backbone, adapted)
        self.blocks, self.first = len(blocks), min(numbers, default=0)
        self._handles = []
        if self.first > 0:
            for block in blocks[self.first :]:
                self._handles.append(block.register_forward_pre_hook(self._widen, with_kwargs=True))

    @property
    def is_shared(self) -> bool:
        """Whether any block comes before the first adapted one."""
        return self.first > 0

    @property
    def fraction(self) -> float:
        """Share of the blocks below the first adapted one, in [0, 1)."""
        return self.first / self.blocks if self.blocks else 0.0

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _widen(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        current = self._state.current
        if current is None or current.sources is None:
            return None
        return _widened(args, current), _widened(kwargs, current)


def belongs_to_rows(value: torch.Tensor, rows: int) -> bool:
    """
    Whether an input of a block is of rows, or has as many entries by chance.

    Args:
        value (`torch.Tensor`):
            The input.
        rows (`int`):
            B.

    Returns:
        `bool`: True where the first dimension is B, but for vectors, for matrices of numbers and for whole numbers in
        three dimensions, which are tables of positions or distances. With one row, biases and masks of four dimensions
        broadcast, and are left alone.
    """
    if value.dim() < 2 or value.shape[0] != rows:
        return False
    if value.dim() == 2:
        return not value.is_floating_point()
    if value.dim() == 3:
        return value.is_floating_point() or value.dtype == torch.bool
    return rows > 1


def _widened(value: Any, current: TaskPass) -> Any:
    """The inputs of a block with their rows repeated; those that have been stay as they are."""
    if isinstance(value, torch.Tensor):
        rows = current.tasks.shape[0]
        if not belongs_to_rows(value, rows):
            return value
        found = current.widened.get(id(value))
        if found is None or found[0] is not value:
            assert current.sources is not None
            found = (value, repeat_rows(value, rows, len(current.sources)))
            current.widened[id(value)] = found
        return found[1]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_widened(entry, current) for entry in value)
    if isinstance(value, list):
        return [_widened(entry, current) for entry in value]
    if type(value) is dict:
        return {name: _widened(entry, current) for name, entry in value.items()}
    return value


def _blocks_of(backbone: nn.Module, adapted: Sequence[str]) -> tuple[Sequence[nn.Module], list[int]]:
    """The outermost list of modules that holds all adapted linears, and the numbers of those that do."""
    modules: Mapping[str, nn.Module] = dict(backbone.named_modules())
    found: dict[str, list[int]] = {}
    for name in adapted:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            path = ".".join(parts[:depth])
            if part.isdigit() and isinstance(modules.get(path), nn.ModuleList):
                found.setdefault(path, []).append(int(part))
                break
    if len(found) != 1:
        return [], []
    path, numbers = next(iter(found.items()))
    if len(numbers) != len(adapted):
        return [], []
    return list(modules[path]), numbers  # type: ignore[call-overload]
