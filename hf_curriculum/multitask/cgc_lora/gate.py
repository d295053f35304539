"""
Arithmetic of the gates: pure functions of tensors.

Shapes: T tasks, N_c common experts, N_s experts of each task, V = N_c + N_s experts that a task sees, E = N_c + T N_s
experts in all, r rank of one expert, R = E r. The rank vector holds the common experts first, then those of task 0, of
task 1 and so on; each expert has r places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


__all__ = ["GATE_NORMALIZATIONS", "GateLayout", "add_reserved_rows", "expand_gates", "normalise_gates"]

GATE_NORMALIZATIONS = ("softmax", "sum_to_n")


@dataclass(frozen=True)
class GateLayout:
    """
    Where experts stand in the rank vector.

    Args:
        num_tasks (`int`):
            T, at least 1.
        num_common (`int`):
            N_c, at least 0.
        num_own (`int`):
            N_s, at least 0.
        rank (`int`):
            r, at least 1.
    """

    num_tasks: int
    num_common: int
    num_own: int
    rank: int

    @property
    def visible(self) -> int:
        """V: experts that one task sees."""
        return self.num_common + self.num_own

    @property
    def num_experts(self) -> int:
        """E: experts in all."""
        return self.num_common + self.num_tasks * self.num_own

    @property
    def common_rank(self) -> int:
        """Places of the common experts in the rank vector."""
        return self.num_common * self.rank

    @property
    def own_rank(self) -> int:
        """Places of the experts of one task."""
        return self.num_own * self.rank

    @property
    def visible_rank(self) -> int:
        """Rank of the plain LoRA that one task is."""
        return self.visible * self.rank

    @property
    def total_rank(self) -> int:
        """R: length of the rank vector."""
        return self.num_experts * self.rank

    @property
    def idle_rank(self) -> int:
        """Places that are zero for every task but one."""
        return self.total_rank - self.visible_rank

    def own_slice(self, task_id: int) -> slice:
        """Places of the experts of one task, id in [0, T)."""
        start = self.common_rank + task_id * self.own_rank
        return slice(start, start + self.own_rank)


def normalise_gates(logits: torch.Tensor, normalization: str, temperature: float) -> torch.Tensor:
    """
    Turns logits into gates.

    Args:
        logits (`torch.Tensor` of shape `(..., n)`):
            One for each of n experts.
        normalization (`str`):
            `"softmax"`: sums to 1; `"sum_to_n"`: sums to n.
        temperature (`float`):
            Divides the logits, above 0.

    Returns:
        `torch.Tensor` of shape `(..., n)`, float32 (float64 for float64 logits): at least 0.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    gates = torch.softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)
    return gates * logits.shape[-1] if normalization == "sum_to_n" else gates


def expand_gates(gates: torch.Tensor, is_task: torch.Tensor, layout: GateLayout) -> torch.Tensor:
    """
    Spreads the gates of the visible experts over the rank vector.

    Args:
        gates (`torch.Tensor` of shape `(..., V)`):
            Gates of the common experts, then those of the task's own.
        is_task (`torch.Tensor` of shape `(..., T)`, same dtype):
            1 for the task that the gates belong to, 0 elsewhere; zero everywhere leaves the common experts alone.
        layout ([`GateLayout`]):
            Numbers of experts.

    Returns:
        `torch.Tensor` of shape `(..., R)`: exactly 0 for the experts of other tasks.
    """
    common, own = gates[..., : layout.num_common], gates[..., layout.num_common :]
    spread = (is_task[..., :, None] * own[..., None, :]).flatten(-2)  # (..., T N_s)
    return torch.cat([common, spread], dim=-1).repeat_interleave(layout.rank, dim=-1)


def add_reserved_rows(
    task_rows: torch.Tensor, logits: torch.Tensor, layout: GateLayout, normalization: str, temperature: float
) -> torch.Tensor:
    """
    Appends the gates of the reserved tasks: `"uniform"`, then `"common"`.

    `"uniform"` is the mean of all tasks' gates, hence the mean of their updates. `"common"` normalises the mean of all
    tasks' logits over the common experts alone.

    Args:
        task_rows (`torch.Tensor` of shape `(..., T, R)`):
            Gates of each task, over the rank vector.
        logits (`torch.Tensor` of shape `(..., T, V)`):
            What they come from.
        layout ([`GateLayout`]):
            Numbers of experts.
        normalization (`str`):
            As in [`normalise_gates`].
        temperature (`float`):
            As in [`normalise_gates`].

    Returns:
        `torch.Tensor` of shape `(..., T + 2, R)`: indexed by a task's id, -2 and -1 for the reserved ones.
    """
    common = normalise_gates(logits[..., : layout.num_common].mean(dim=-2), normalization, temperature)
    common = common.repeat_interleave(layout.rank, dim=-1)
    absent = common.new_zeros((*common.shape[:-1], layout.total_rank - layout.common_rank))
    rows = [task_rows, task_rows.mean(dim=-2, keepdim=True), torch.cat([common, absent], dim=-1).unsqueeze(-2)]
    return torch.cat(rows, dim=-2)
