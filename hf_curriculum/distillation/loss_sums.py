"""What one micro-batch adds to the means that are logged."""

from dataclasses import dataclass

import torch


__all__ = ["LossSums", "loss_sums"]


@dataclass(frozen=True)
class LossSums:
    """
    What one micro-batch adds to the logged means; tensors on the device, without gradient.

    Args:
        ce (`torch.Tensor` of shape `()`, float32):
            Sum of the cross-entropy, in nats.
        kd (`torch.Tensor` of shape `()`, float32):
            Sum of T^2 D, in nats.
        tokens (`torch.Tensor` of shape `()`, int64):
            Labelled positions.
        distilled (`torch.Tensor` of shape `()`, int64):
            Positions with a distillation term.
    """

    ce: torch.Tensor
    kd: torch.Tensor
    tokens: torch.Tensor
    distilled: torch.Tensor


def loss_sums(ce: torch.Tensor, kd: torch.Tensor, alpha: float | torch.Tensor) -> LossSums:
    """
    Sums up the losses of labelled positions.

    Args:
        ce (`torch.Tensor` of shape `(T,)`):
            Cross-entropy, in nats, without graph.
        kd (`torch.Tensor` of shape `(T,)`):
            T^2 D, in nats, without graph.
        alpha (`float` or `torch.Tensor` of shape `(T,)`):
            Weight of the distillation; positions at 0 have no term.

    Returns:
        [`LossSums`]
    """
    distilled = torch.as_tensor(alpha, device=ce.device).expand(ce.shape) > 0
    count = distilled.sum()
    return LossSums(ce=ce.sum(), kd=(kd * distilled).sum(), tokens=torch.full_like(count, len(ce)), distilled=count)
