"""Means that are logged: summed up on the device step by step, gathered when they are read."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..core.distributed import rank_and_world


__all__ = ["LossSums", "RunningMeans", "loss_sums"]


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


class RunningMeans:
    """
    Sums and counts by name, without a host sync until they are read.

    Args:
        names (`tuple[str, ...]`):
            What is averaged, in one order on every rank.
        device (`torch.device`):
            Where the process group communicates.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        # float64: token counts of a long logging interval stay exact. MPS has none.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, len(names), dtype=self._dtype, device=device)

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """
        Adds values.

        Args:
            name (`str`):
                One of the names.
            total (`torch.Tensor` of shape `()`):
                Their sum.
            count (`torch.Tensor` of shape `()`):
                How many they are.
        """
        self._sums[:, self._names.index(name)] += torch.stack([total.detach(), count]).to(self._sums)

    def reset(self) -> None:
        """Forgets everything."""
        self._sums.zero_()

    def take(self) -> dict[str, float]:
        """
        Means over all ranks since the last call, which are forgotten then. Collective.

        Returns:
            `dict[str, float]`: by name; what was never added is left out.
        """
        sums = self._sums.clone()
        if rank_and_world()[1] > 1:
            dist.all_reduce(sums)
        self.reset()
        totals, counts = sums.tolist()
        return {name: total / count for name, total, count in zip(self._names, totals, counts) if count > 0}
