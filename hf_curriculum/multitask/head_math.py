"""
Pooling, picking and losses of task heads: pure functions on tensors.

Shapes: B rows, S positions, H hidden size, T tasks, C_t outputs of task t, C the largest C_t, K columns of labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .task_head import PROBLEM_TYPES


__all__ = ["POOLINGS", "HeadLayout", "pool", "row_losses"]

POOLINGS = ("cls", "mean", "last")


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """
    Makes one vector of each row.

    Args:
        hidden (`torch.Tensor` of shape `(B, S, H)`):
            Last hidden states.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
            0 at padding, on either side.
        pooling (`str`):
            `"cls"`: the first token. `"last"`: the last one. `"mean"`: the mean over all, in float32.

    Returns:
        `torch.Tensor` of shape `(B, H)`, in the dtype of `hidden`.
    """
    if attention_mask is None:
        attention_mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64)
    mask = attention_mask != 0
    if pooling == "mean":
        weights = mask[..., None].float()
        mean = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return mean.to(hidden.dtype)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    # Of equal values `argmax` may give any, so the places themselves are compared.
    chosen = torch.where(mask, places, -1).argmax(dim=1)
    if pooling == "cls":
        chosen = torch.where(mask, places, hidden.shape[1]).argmin(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]


class HeadLayout:
    """
    Where the outputs of each task are among those of all heads.

    Args:
        heads (`Sequence[tuple[int, str, float]]` of length T):
            Outputs, problem type and scale of the targets of each task.
    """

    def __init__(self, heads: Sequence[tuple[int, str, float]]) -> None:
        sizes = [size for size, _, _ in heads]
        starts = [sum(sizes[:task]) for task in range(len(sizes))]
        self.num_outputs = sum(sizes)
        self.width = max(sizes)
        # Places behind a task's own repeat its first one, to be masked.
        self._columns = torch.tensor(
            [
                [start + (place if place < size else 0) for place in range(self.width)]
                for start, size in zip(starts, sizes)
            ]
        )
        self._sizes = torch.tensor(sizes)
        self._kinds = torch.tensor([PROBLEM_TYPES.index(kind) for _, kind, _ in heads])
        guesses = {PROBLEM_TYPES[0]: math.log, PROBLEM_TYPES[1]: lambda _: math.log(2.0)}
        self._guesses = torch.tensor(
            [guesses[kind](size) if kind in guesses else scale**2 for size, kind, scale in heads], dtype=torch.float32
        )

    def to(self, device: torch.device) -> HeadLayout:
        """Moves the tables to a device, once."""
        if self._columns.device != device:
            for name in ("_columns", "_sizes", "_kinds", "_guesses"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def pick(self, outputs: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """
        Picks the outputs of each row's own task.

        Args:
            outputs (`torch.Tensor` of shape `(B, C_1 + ... + C_T)`):
                Of all heads.
            tasks (`torch.Tensor` of shape `(B,)`, int64):
                Ids in [0, T).

        Returns:
            `torch.Tensor` of shape `(B, C)`: the lowest finite number behind the C_t outputs of a row.
        """
        tables = self.to(outputs.device)
        picked = outputs.gather(1, tables._columns[tasks])
        return picked.masked_fill(~tables.own(tasks), torch.finfo(outputs.dtype).min)

    def own(self, tasks: torch.Tensor) -> torch.Tensor:
        """Which of the C places are a row's own, `(B, C)`, bool."""
        tables = self.to(tasks.device)
        return torch.arange(self.width, device=tasks.device) < tables._sizes[tasks][:, None]

    def kinds(self, tasks: torch.Tensor) -> torch.Tensor:
        """Problem type of each row, `(B,)`: 0 for one class, 1 for several, 2 for numbers."""
        return self.to(tasks.device)._kinds[tasks]

    def sizes(self, tasks: torch.Tensor) -> torch.Tensor:
        """Outputs of each row's task, `(B,)`."""
        return self.to(tasks.device)._sizes[tasks]

    def guess_loss(self, tasks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Loss of an uninformed guess in each row, `(B,)`, in the dtype of `like`."""
        return self.to(tasks.device)._guesses[tasks].to(like.dtype)


def row_losses(
    logits: torch.Tensor, labels: torch.Tensor, tasks: torch.Tensor, layout: HeadLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Loss of each row in its own units.

    Negative log-likelihood in nats, binary cross-entropy averaged over the C_t classes, or squared error averaged over
    the C_t numbers.

    Args:
        logits (`torch.Tensor` of shape `(B, C)`):
            As [`HeadLayout.pick`] gives them.
        labels (`torch.Tensor` of shape `(B,)` or `(B, K)`):
            A class in the first column; 0 or 1 for each class; numbers. -100 in the first column: no label.
        tasks (`torch.Tensor` of shape `(B,)`, int64):
            Ids in [0, T).
        layout ([`HeadLayout`]):
            The heads.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B,)`, float32: losses, 0 without a label; and 1 where
        there is one, else 0.
    """
    labels = labels[:, None] if labels.dim() == 1 else labels
    weights = (labels[:, 0] != -100).float()
    wanted = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    columns = min(labels.shape[1], logits.shape[1])
    wanted[:, :columns] = labels[:, :columns].float()
    own, kinds, sizes = layout.own(tasks), layout.kinds(tasks), layout.sizes(tasks)
    # What is not a row's own must not reach a sum, nor a gradient: the lowest number squared is infinite.
    scores = torch.where(own, logits.float(), 0.0)
    wanted = torch.where(own & (weights[:, None] > 0), wanted, 0.0)
    classes = torch.where(kinds == 0, labels[:, 0].long(), 0).clamp(min=0)
    likelihood = F.cross_entropy(logits.float(), classes, reduction="none")
    binary = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    squared = (scores - wanted).square()
    several = torch.where((kinds == 1)[:, None], binary, squared)
    mean = (several * own).sum(dim=1) / sizes
    return torch.where(kinds == 0, likelihood, mean) * weights, weights
