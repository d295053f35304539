"""
Losses of models whose logits are small: sequence and token classification, sequence-to-sequence.

Shapes: N samples or labelled positions, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.errors import unsupported
from .loss_sums import LossSums, loss_sums
from .losses import Divergence, binary_divergence, dense_divergence


__all__ = ["DenseLosses", "check_own_loss", "dense_losses"]


@dataclass(frozen=True)
class DenseLosses:
    """
    Losses of the labelled items of a batch.

    Args:
        ce (`torch.Tensor` of shape `(N,)`, float32):
            Cross-entropy; for several labels at once the mean of the C binary ones.
        kd (`torch.Tensor` of shape `(N,)`, float32):
            T^2 D; zero without a teacher.
        labels_per_item (`int`):
            Labels that the Trainer counts for each item: C where several hold at once, else 1.
    """

    ce: torch.Tensor
    kd: torch.Tensor
    labels_per_item: int

    def mean(self, alpha: float | torch.Tensor, num_labels: torch.Tensor | int | None) -> torch.Tensor:
        """
        The loss: (1 - alpha) CE + alpha T^2 D.

        Args:
            alpha (`float` or `torch.Tensor` of shape `(N,)`):
                Weight of the distillation.
            num_labels (`torch.Tensor` or `int`, *optional*):
                Labels of the whole optimizer step, to divide by; those of this batch where it is None.

        Returns:
            `torch.Tensor` of shape `()`, with graph.
        """
        total = (self.ce + alpha * (self.kd - self.ce)).sum()
        return total / max(len(self.ce), 1) if num_labels is None else total * self.labels_per_item / num_labels

    def sums(self, alpha: float | torch.Tensor) -> LossSums:
        """
        What this batch adds to the logged means.

        Args:
            alpha (`float` or `torch.Tensor` of shape `(N,)`):
                Weight of the distillation.

        Returns:
            [`~hf_curriculum.distillation.loss_sums.LossSums`]
        """
        return loss_sums(self.ce.detach(), self.kd.detach(), alpha)


def dense_losses(
    logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor | None, divergence: Divergence
) -> DenseLosses:
    """
    Cross-entropy and distillation term of each labelled item.

    Args:
        logits (`torch.Tensor` of shape `(B, C)` or `(B, S, C)`):
            The student's, with gradient.
        labels (`torch.Tensor` of shape `(B,)` or `(B, S)`, int64, or `(B, C)`, floating):
            Classes, -100 where there is none, not shifted; floating for several labels at once.
        teacher_logits (`torch.Tensor`, *optional*):
            The teacher's, of the same shape.
        divergence ([`~hf_curriculum.distillation.losses.Divergence`]):
            D and T.

    Returns:
        [`DenseLosses`]
    """
    several = labels.is_floating_point()
    items = torch.ones_like(labels[:, 0], dtype=torch.bool) if several else labels != -100
    student = logits[items].float()
    if several:
        ce = F.binary_cross_entropy_with_logits(student, labels.float(), reduction="none").mean(dim=-1)
    else:
        ce = F.cross_entropy(student, labels[items], reduction="none")
    kd = torch.zeros_like(ce)
    if teacher_logits is not None:
        distance = binary_divergence if several else dense_divergence
        kd = divergence.temperature**2 * distance(student, teacher_logits[items].float(), divergence)
    return DenseLosses(ce=ce, kd=kd, labels_per_item=labels.shape[-1] if several else 1)


def check_own_loss(loss: torch.Tensor, losses: DenseLosses) -> None:
    """
    Refuses a model whose own loss is not the cross-entropy of its logits: its other terms would be lost.

    Args:
        loss (`torch.Tensor` of shape `()`):
            The model's own, of one batch.
        losses ([`DenseLosses`]):
            Those of the same batch.

    Raises:
        `NotImplementedError`: if they differ by more than half precision explains.
    """
    if len(losses.ce) and not torch.allclose(loss.float(), losses.ce.mean(), rtol=2e-2, atol=1e-3):
        raise unsupported(
            f"Distillation of a model whose loss ({loss.item():.4g}) is not the cross-entropy of its logits "
            f"({losses.ce.mean().item():.4g})",
            "what else is in it would be left out",
            "Train it without a teacher.",
        )
