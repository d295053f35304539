"""
The loss of each task, read off what a model returned: pure functions on tensors.

Shapes: B rows, S positions, S' positions with a loss (S - 1 where labels are shifted, 1 where a row has one label),
V vocabulary, C classes, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


__all__ = ["ItemLosses", "item_losses", "sums_by_task"]


class ItemLosses(NamedTuple):
    """
    Losses before they are summed.

    Args:
        losses (`torch.Tensor` of shape `(B, S')`, floating):
            In nats, or squared errors; without gradient.
        weights (`torch.Tensor` of shape `(B, S')`):
            Where there is a label 1, or how much it counts, above 0; else 0.
    """

    losses: torch.Tensor
    weights: torch.Tensor


@torch.no_grad()
def item_losses(outputs: object, labels: torch.Tensor, *, shift: bool) -> ItemLosses | None:
    """
    Reads the loss of every token, or of every row, off a model's outputs.

    In this order: `log_probs` and `label_mask` (TRL's fused head), `logits` of shape
    `(B, S, V)` (negative log-likelihood of the labels, one row at a time), `logits` of shape `(B, C)` (squared error
    for one class or for real labels of one per row, binary cross-entropy for real labels of C per row, averaged over
    the C, else negative log-likelihood: the losses of the sequence classifiers of transformers).

    Args:
        outputs (`object`):
            What the forward returned.
        labels (`torch.Tensor`):
            `(B, S)` with -100 where there is none, `(B,)` or `(B, C)`.
        shift (`bool`):
            Whether logits at a position predict the label of the next one.

    Returns:
        [`ItemLosses`], *optional*: None if the outputs are of none of these kinds.
    """
    fields: Mapping[str, Any] = outputs if isinstance(outputs, Mapping) else {}
    if fields.get("log_probs") is not None and fields.get("label_mask") is not None:
        return ItemLosses(-fields["log_probs"], fields["label_mask"])
    logits = fields.get("logits")
    if not isinstance(logits, torch.Tensor):
        return None
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # One row at a time: in float32 all logits together would take as much memory again as the step itself.
        rows = [F.cross_entropy(row.float(), own, reduction="none") for row, own in zip(logits, labels, strict=True)]
        return ItemLosses(torch.stack(rows), labels != -100)
    if logits.dim() == 2 and labels.shape[0] == logits.shape[0]:
        losses = _classifier_losses(logits.float(), labels)[:, None]
        return ItemLosses(losses, torch.ones_like(losses))
    return None


def _classifier_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if logits.shape[1] == 1:
        return (logits[:, 0] - labels.reshape(-1).float()).square()
    if labels.dim() == 2:
        targets = labels.float()
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        return F.cross_entropy(logits, labels.argmax(dim=1), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


@torch.no_grad()
def sums_by_task(items: ItemLosses, tasks: torch.Tensor, num_tasks: int) -> torch.Tensor:
    """
    Sums losses and weights of each row by task, on the device and without waiting for it.

    Args:
        items ([`ItemLosses`] of shape `(B, S')`):
            Losses and weights.
        tasks (`torch.Tensor` of shape `(B,)` or `(B, S)`, int64):
            Ids in [-2, T); of the last S' positions those count.
        num_tasks (`int`):
            T.

    Returns:
        `torch.Tensor` of shape `(B, T + 2, 2)`, float64 (float32 where the device has none): sum of the losses and of
        the weights by task; the last two places are of the ids -2 and -1.
    """
    losses, weights = items
    dtype = torch.float32 if losses.device.type == "mps" else torch.float64
    if tasks.dim() == 2:
        tasks = tasks[:, tasks.shape[1] - losses.shape[1] :]
    places = (tasks[:, None] if tasks.dim() == 1 else tasks).remainder(num_tasks + 2).expand(losses.shape)
    weights = weights.to(dtype)
    # A position without a label may hold anything, NaN included.
    weighted = torch.where(weights > 0, losses.to(dtype), 0.0) * weights
    sums = losses.new_zeros((2, losses.shape[0], num_tasks + 2), dtype=dtype)
    sums[0].scatter_add_(1, places, weighted)
    sums[1].scatter_add_(1, places, weights)
    return sums.permute(1, 2, 0)
