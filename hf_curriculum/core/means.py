"""Means that are logged: summed up on the device step by step, gathered when they are read."""

from collections.abc import Sequence

import torch

from .distributed import is_main_process, sum_over_ranks


__all__ = ["RunningMeans"]


class RunningMeans:
    """
    Sums and counts by name, without waiting for the device until they are read.

    Args:
        names (`Sequence[str]`):
            The N things that are averaged, in one order on every rank.
        device (`torch.device`):
            Where the values come from and the process group communicates.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = list(names)
        # float64: token counts of a long logging interval stay exact. MPS has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(self._names), 2, dtype=dtype, device=device)

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """
        Adds values of one name.

        Args:
            name (`str`):
                One of the names.
            total (`torch.Tensor` of shape `()`):
                Their sum.
            count (`torch.Tensor` of shape `()`):
                How many they are.
        """
        self._sums[self._names.index(name)] += torch.stack([total.detach().to(self._sums), count.to(self._sums)])

    def add_all(self, sums: torch.Tensor) -> None:
        """
        Adds values of every name.

        Args:
            sums (`torch.Tensor` of shape `(N, 2)`):
                Their sums, and how many they are.
        """
        self._sums += sums.to(self._sums)

    def take(self, over_ranks: bool = True) -> dict[str, float]:
        """
        Means since the last call, which are forgotten then. Collective over ranks; waits for the device.

        Args:
            over_ranks (`bool`, *optional*, defaults to `True`):
                Whether every rank has a part of the values; False where every rank was given all of them.

        Returns:
            `dict[str, float]`: by name; what was never added is left out.
        """
        sums = self.state() if over_ranks else self._sums.tolist()
        self._sums.zero_()
        return {name: total / count for name, (total, count) in zip(self._names, sums) if count > 0}

    def state(self) -> list[list[float]]:
        """Sums and counts over all ranks, as JSON values. Collective."""
        total: list[list[float]] = sum_over_ranks(self._sums.double().cpu().numpy(), self._sums.device).tolist()
        return total

    def restore(self, state: list[list[float]] | None) -> None:
        """
        Forgets everything, then takes over what a checkpoint holds.

        Args:
            state (`list[list[float]]`, *optional*):
                What [`state`] gave.
        """
        self._sums.zero_()
        # One rank takes all of it: the ranks' sums are added up when they are read.
        if state is not None and is_main_process():
            self.add_all(torch.tensor(state, dtype=self._sums.dtype))
