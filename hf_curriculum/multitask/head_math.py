"""
Pooling, picking and losses of task heads: pure functions on tensors.

Shapes: B rows, S positions, H hidden size, T tasks, C_t outputs of task t, C the largest C_t, K columns of labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .task_head import PROBLEM_TYPES, TaskHead


__all__ = ["POOLINGS", "HeadLayout", "batch_loss", "pool", "row_losses"]

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
    Where the outputs of each task are among those of all heads, and what of them counts how much.

    Args:
        heads (`Sequence[TaskHead]` of length T):
            The head of each task, in the order of the ids.
    """

    def __init__(self, heads: Sequence[TaskHead]) -> None:
        sizes = [head.num_labels for head in heads]
        starts = [sum(sizes[:task]) for task in range(len(sizes))]
        self.num_outputs = sum(sizes)
        self.width = max(sizes)
        # Places behind a task's own repeat its first one, to be masked.
        columns = [
            [start + (place if place < size else 0) for place in range(self.width)]
            for start, size in zip(starts, sizes)
        ]
        weights = [_relative_weights(head) + [1.0] * (self.width - head.num_labels) for head in heads]
        self._tables = {
            "columns": torch.tensor(columns),
            "sizes": torch.tensor(sizes),
            "kinds": torch.tensor([PROBLEM_TYPES.index(head.problem_type) for head in heads]),
            "guesses": torch.tensor([_guess_loss(head) for head in heads], dtype=torch.float32),
            "class_weights": torch.tensor(weights, dtype=torch.float32),
        }

    def to(self, device: torch.device) -> HeadLayout:
        """Moves the tables to a device, once."""
        if self._tables["sizes"].device != device:
            self._tables = {name: table.to(device) for name, table in self._tables.items()}
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
        picked = outputs.gather(1, tables._tables["columns"][tasks])
        return picked.masked_fill(~tables.own(tasks), torch.finfo(outputs.dtype).min)

    def own(self, tasks: torch.Tensor) -> torch.Tensor:
        """Which of the C places are a row's own, `(B, C)`, bool."""
        tables = self.to(tasks.device)
        return torch.arange(self.width, device=tasks.device) < tables._tables["sizes"][tasks][:, None]

    def kinds(self, tasks: torch.Tensor) -> torch.Tensor:
        """Problem type of each row, `(B,)`: 0 for one class, 1 for several, 2 for numbers."""
        return self.to(tasks.device)._tables["kinds"][tasks]

    def sizes(self, tasks: torch.Tensor) -> torch.Tensor:
        """Outputs of each row's task, `(B,)`."""
        return self.to(tasks.device)._tables["sizes"][tasks]

    def class_weights(self, tasks: torch.Tensor) -> torch.Tensor:
        """
        How much the classes of each row's task count in the loss.

        Args:
            tasks (`torch.Tensor` of shape `(B,)`, int64):
                Ids in [0, T).

        Returns:
            `torch.Tensor` of shape `(B, C)`, float32: where one class is right, [`TaskHead.class_weights`] divided by
            their harmonic mean; else as they are; 1 where there are none.
        """
        return self.to(tasks.device)._tables["class_weights"][tasks]

    def guess_loss(self, tasks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Loss of an uninformed guess in each row, `(B,)`, in the dtype of `like`."""
        return self.to(tasks.device)._tables["guesses"][tasks].to(like.dtype)


def _relative_weights(head: TaskHead) -> list[float]:
    """Class weights as the loss takes them, of length C_t."""
    weights = head.class_weights
    if weights is None:
        return [1.0] * head.num_labels
    if head.problem_type != PROBLEM_TYPES[0]:
        return list(weights)
    # The mean weight over rows in which each class is as frequent as 1 / its weight, as weights assume that balance
    # classes: dividing by it leaves the task's share of the loss as it is without weights.
    mean = len(weights) / math.fsum(1 / weight for weight in weights)
    return [weight / mean for weight in weights]


def _guess_loss(head: TaskHead) -> float:
    """Loss of an uninformed guess: equal probabilities, or the mean of the targets."""
    if head.problem_type == PROBLEM_TYPES[0]:
        return math.log(head.num_labels)
    if head.problem_type == "regression":
        return head.target_scale**2
    # The mean weight of a class that applies in a share 1 / (1 + w) of the rows, so that both its sides weigh the
    # same: w / (1 + w) of each.
    weights = head.class_weights or (1.0,) * head.num_labels
    return math.log(2.0) * math.fsum(2 * weight / (1 + weight) for weight in weights) / head.num_labels


def row_losses(
    logits: torch.Tensor, labels: torch.Tensor, tasks: torch.Tensor, layout: HeadLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Loss of each row in its own units, and how much the row counts.

    Negative log-likelihood in nats, binary cross-entropy averaged over the C_t classes, or squared error averaged over
    the C_t numbers. Class weights enter as in torch: where one class is right they are the weight of the row, so that
    the weighted mean over the rows of a task is `torch.nn.CrossEntropyLoss(weight=)`; where several may be, they are
    part of the loss, as in `torch.nn.BCEWithLogitsLoss(pos_weight=)`.

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
        `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B,)`, float32: losses, 0 without a label; and the weight
        of the row, above 0 (1 without class weights) where there is a label, else 0.
    """
    labels = labels[:, None] if labels.dim() == 1 else labels
    labelled = labels[:, 0] != -100
    wanted = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    columns = min(labels.shape[1], logits.shape[1])
    wanted[:, :columns] = labels[:, :columns].float()
    own, kinds, sizes = layout.own(tasks), layout.kinds(tasks), layout.sizes(tasks)
    class_weights = layout.class_weights(tasks)
    # What is not a row's own must not reach a sum, nor a gradient: the lowest number squared is infinite.
    scores = torch.where(own, logits.float(), 0.0)
    wanted = torch.where(own & labelled[:, None], wanted, 0.0)
    classes = torch.where((kinds == 0) & labelled, labels[:, 0].long(), 0)
    likelihood = F.cross_entropy(logits.float(), classes, reduction="none")
    binary = F.binary_cross_entropy_with_logits(scores, wanted, pos_weight=class_weights, reduction="none")
    squared = (scores - wanted).square()
    several = torch.where((kinds == 1)[:, None], binary, squared)
    mean = (several * own).sum(dim=1) / sizes
    weights = torch.where(kinds == 0, class_weights.gather(1, classes[:, None])[:, 0], 1.0)
    return torch.where(kinds == 0, likelihood, mean) * labelled, weights * labelled


def batch_loss(logits: torch.Tensor, labels: torch.Tensor, tasks: torch.Tensor, layout: HeadLayout) -> torch.Tensor:
    """
    Loss of a batch of mixed tasks: the sum of w_i l_i / g_i over the n rows with a label, divided by n.

    Of row i, l_i is the loss and w_i the weight; g_i is the loss of an uninformed guess in its task. The divisor is n,
    not the sum of the weights as in torch (our choice): among the few rows that a task has in a batch, those of one
    class would have their weight divided away, and small batches would not add up to a large one. Over all rows of a
    task that its weights balance, both are the same, and a guess costs 1 as it does without weights.

    Args:
        logits (`torch.Tensor` of shape `(B, C)`):
            As [`HeadLayout.pick`] gives them.
        labels (`torch.Tensor` of shape `(B,)` or `(B, K)`):
            As for [`row_losses`].
        tasks (`torch.Tensor` of shape `(B,)`, int64):
            Ids in [0, T).
        layout ([`HeadLayout`]):
            The heads.

    Returns:
        `torch.Tensor`, a float32 scalar: 0, with a graph, where no row has a label.
    """
    losses, weights = row_losses(logits, labels, tasks, layout)
    scaled = losses / layout.guess_loss(tasks, losses)
    return (scaled * weights).sum() / (weights > 0).sum().clamp(min=1)
