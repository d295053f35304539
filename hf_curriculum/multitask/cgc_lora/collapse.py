"""
What is done to the factors of a plain LoRA before it is written.

Shapes: k rank, d_in and d_out the size of the linear; the update is B A with A (k, d_in) and B (d_out, k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...core.errors import invalid


__all__ = ["pad_rank", "truncate_rank"]


def pad_rank(down: torch.Tensor, up: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Appends zeros up to a multiple of a rank; the update stays the same.

    Args:
        down (`torch.Tensor` of shape `(k, d_in)`):
            A.
        up (`torch.Tensor` of shape `(d_out, k)`):
            B.
        multiple (`int`):
            At least 1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A and B of the next multiple of `multiple`.

    Raises:
        `ValueError`: for a multiple below 1.
    """
    if multiple < 1:
        raise invalid("rank_multiple", multiple, "an integer >= 1")
    missing = -len(down) % multiple
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))


def truncate_rank(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """
    The best update of lower rank (Eckart-Young), without ever forming B A.

    With B = Q_b R_b and A^T = Q_a R_a, the singular values of B A are those of the small matrix R_b R_a^T.

    Args:
        down (`torch.Tensor` of shape `(k, d_in)`):
            A.
        up (`torch.Tensor` of shape `(d_out, k)`):
            B.
        rank (`int`):
            At least 1. From k on nothing changes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, float]`: A (rank, d_in), B (d_out, rank), and the relative error
        ||B A - B' A'||_F / ||B A||_F, in [0, 1]; 0 for an update of zero. Computed in float64, returned in the dtype
        that is given.

    Raises:
        `ValueError`: for a rank below 1.
    """
    if rank < 1:
        raise invalid("truncate_rank", rank, "an integer >= 1")
    if rank >= len(down):
        return down, up, 0.0
    basis_up, core_up = torch.linalg.qr(up.double())
    basis_down, core_down = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(core_up @ core_down.T, full_matrices=False)
    root = values[:rank].sqrt()
    energy = values.square()
    total = float(energy.sum())
    error = (float(energy[rank:].sum()) / total) ** 0.5 if total > 0 else 0.0
    # A linear narrower than the rank has fewer singular values: zeros stand for the rest.
    new_down, new_up = pad_rank(
        root[:, None] * (right[:rank] @ basis_down.T), (basis_up @ left[:, :rank]) * root, rank
    )
    return new_down.to(down.dtype).contiguous(), new_up.to(up.dtype).contiguous(), error
