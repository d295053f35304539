"""
What an attention layer got, and the scores and the mask of a block of its queries.

Shapes: B rows, S positions, H heads, Q queries and K keys of a block, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.errors import unsupported


__all__ = ["BlockInputs", "mask_block", "scores_block"]


@dataclass(frozen=True)
class BlockInputs:
    """
    What one attention layer got.

    Args:
        query (`torch.Tensor` of shape `(B, H, S, D)`):
            Queries.
        key (`torch.Tensor` of shape `(B, H or fewer, S, D)`):
            Keys.
        value_norms (`torch.Tensor` of shape `(B, H, S)`):
            Euclidean norm of each value, before the output projection.
        mask (`torch.Tensor`, *optional*):
            Dense mask.
        scaling (`float`):
            Factor on the scores.
        causal (`bool`):
            Whether a query sees no later key, in the absence of a mask.
        softcap (`float`, *optional*):
            c, where scores become c * tanh(scores / c).
        bias (`torch.Tensor`, *optional*):
            Added to the scores, `(B or 1, H, S, S)`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value_norms: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    causal: bool
    softcap: float | None
    bias: torch.Tensor | None

    @classmethod
    def build(
        cls,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> BlockInputs:
        """
        Reads the arguments of an attention function.

        Args:
            module (`nn.Module`):
                The attention layer.
            query (`torch.Tensor` of shape `(B, H, S, D)`):
                Queries.
            key (`torch.Tensor` of shape `(B, H or fewer, S, D)`):
                Keys.
            value (`torch.Tensor` of shape `(B, H or fewer, S, D)`):
                Values.
            mask (`torch.Tensor`, *optional*):
                Dense mask.
            options (`dict[str, Any]`):
                Keyword arguments.

        Returns:
            [`BlockInputs`], in float32 at least.

        Raises:
            `NotImplementedError`: for a layer with learned sinks, whose rows do not add up to 1.
        """
        if options.get("s_aux") is not None:
            raise unsupported(
                f"Attention statistics of {type(module).__name__}, which has learned sinks",
                "part of each row's mass goes to no token",
                "Use a model without `s_aux`.",
            )
        dtype = torch.promote_types(query.dtype, torch.float32)
        norms = torch.linalg.vector_norm(value.to(dtype), dim=-1)
        causal, scaling = options.get("is_causal"), options.get("scaling")
        return cls(
            query=query.to(dtype),
            key=key.to(dtype),
            value_norms=norms.repeat_interleave(query.shape[1] // value.shape[1], dim=1),
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            softcap=options.get("softcap"),
            bias=options.get("position_bias"),
        )


def mask_block(inputs: BlockInputs, block: slice) -> torch.Tensor:
    """
    Which keys the queries of a block see.

    Args:
        inputs ([`BlockInputs`]):
            The layer's inputs.
        block (`slice`):
            Columns of the queries.

    Returns:
        `torch.Tensor` of shape `(B or 1, 1 or H, Q, K)`, bool; keys after the last one seen are cut off.
    """
    length = inputs.key.shape[-2]
    if inputs.mask is None:
        columns = torch.arange(length, device=inputs.key.device)
        if not inputs.causal:
            return torch.ones(1, 1, block.stop - block.start, length, dtype=torch.bool, device=columns.device)
        return (columns[None, : block.stop] <= columns[block, None])[None, None]
    mask = inputs.mask[..., block, :length]
    # Eager masks hold the type's minimum, or less after a sum; half of it tells them from any bias.
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    causal = not bool(allowed[..., block.stop :].any())
    return allowed[..., : block.stop] if causal else allowed


def scores_block(inputs: BlockInputs, block: slice, allowed: torch.Tensor) -> torch.Tensor:
    """
    Scores of the queries of a block, as the softmax gets them.

    Args:
        inputs ([`BlockInputs`]):
            The layer's inputs.
        block (`slice`):
            Columns of the queries.
        allowed (`torch.Tensor` of shape `(B or 1, 1 or H, Q, K)`, bool):
            From [`mask_block`].

    Returns:
        `torch.Tensor` of shape `(B, H, Q, K)`, arbitrary where a query does not see a key.
    """
    keys = allowed.shape[-1]
    batch, heads, _, size = inputs.query.shape
    groups = inputs.key.shape[1]
    query = inputs.query[:, :, block].reshape(batch, groups, -1, size)  # [B, G, H / G * Q, D]
    scores = query @ inputs.key[:, :, :keys].transpose(-1, -2)
    scores = scores.view(batch, heads, -1, keys).mul_(inputs.scaling)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if inputs.bias is not None:
        scores = scores + inputs.bias[..., block, :keys]
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        scores = scores + inputs.mask[..., block, :keys]
    return scores
