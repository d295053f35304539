"""
Attention over the outputs of task models: the two places where tasks consult one another.

Shapes: B rows, S positions, T tasks, K of them that are consulted, H hidden size, D outputs of a linear, r rank,
k fusion_dim = h heads of size d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


__all__ = ["LayerFusion", "OutputFusion", "attend"]

LAYER_NORM_EPS = 1e-5
RMS_EPS = 1e-6


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scaled dot-product attention over tasks.

    Args:
        queries (`torch.Tensor` of shape `(..., k)`):
            Of the task that asks.
        keys (`torch.Tensor` of shape `(..., K, k)`):
            Of the tasks that are asked.
        values (`torch.Tensor` of shape `(..., K, k)`):
            What they say.
        num_heads (`int`):
            h, a divisor of k.
        visible (`torch.Tensor` that broadcasts to shape `(..., K)`, bool, *optional*):
            Which may be listened to, at least one for each query. All by default.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: of shape `(..., k)`, the sums of the values under the weights of each
        head; and of shape `(..., K)`, the weights, averaged over the heads, which sum to 1. Softmax in float32 at
        least.
    """
    size = queries.shape[-1] // num_heads
    heads = (num_heads, size)
    # [..., K, h]
    scores = (keys.unflatten(-1, heads) * queries.unsqueeze(-2).unflatten(-1, heads)).sum(-1) * size**-0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(-1), -torch.inf)
    weights = scores.softmax(dim=-2)
    mixed = (weights.unsqueeze(-1) * values.unflatten(-1, heads)).sum(dim=-3)
    return mixed.flatten(-2), weights.mean(dim=-1)


class _Fusion(nn.Module):
    """What both levels learn: low-rank projections, and for each task what it asks and what it is asked for."""

    def __init__(self, width: int, fusion_dim: int, num_heads: int, num_tasks: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(fusion_dim, width))
        self.key = nn.Parameter(torch.empty(fusion_dim, width))
        self.value = nn.Parameter(torch.empty(fusion_dim, width))
        self.output = nn.Parameter(torch.zeros(width, fusion_dim))
        self.task_query = nn.Parameter(torch.empty(num_tasks, fusion_dim))
        self.task_key = nn.Parameter(torch.empty(num_tasks, fusion_dim))
        for weight in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(weight)
        for table in (self.task_query, self.task_key):
            nn.init.normal_(table, std=0.02)

    def grow(self) -> None:
        """Makes room for one more task, behind the others, whose vectors stay as they are."""
        for name in ("task_query", "task_key"):
            table = getattr(self, name)
            new = torch.empty_like(table[:1])
            nn.init.normal_(new, std=0.02)
            grown = nn.Parameter(torch.cat([table.detach(), new]), requires_grad=table.requires_grad)
            setattr(self, name, grown)


class OutputFusion(_Fusion):
    r"""
    Attention over the pooled outputs of the task models.

    With v_i the pooled output of task model i and n_i = LayerNorm(v_i) without weights, a row of task t gets
    f = v_t + W_o concat_a sum_i p_i^a (W_v n_i)^a with p^a = softmax_i((W_q n_t + E_q[t])^a (W_k n_i + E_k[i])^a /
    sqrt(d)) in each head a. W_o is zero at the start, so that an untrained fusion is the task's own model. Pre-norm
    residual attention as in transformers; the low rank and the vectors of tasks are our choice.

    Args:
        width (`int`):
            H.
        fusion_dim (`int`):
            k.
        num_heads (`int`):
            h.
        num_tasks (`int`):
            T.
    """

    def forward(
        self,
        pooled: torch.Tensor,
        tasks: torch.Tensor,
        sources: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Fuses.

        Args:
            pooled (`torch.Tensor` of shape `(B, K, H)`):
                Pooled outputs of the task models.
            tasks (`torch.Tensor` of shape `(B,)`, int64):
                Task of each row, one of the K.
            sources (`torch.Tensor` of shape `(K,)`, int64, *optional*):
                Which tasks the K are. All, in order, by default.
            visible (`torch.Tensor` of shape `(B, K)`, bool, *optional*):
                Which of them a row may listen to, its own task among them. All by default.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: of shape `(B, H)`, in the dtype of the fusion, and of shape `(B, K)`,
            what each row listened to, summing to 1.
        """
        pooled = pooled.to(self.query.dtype)
        places = tasks if sources is None else (sources == tasks[:, None]).to(torch.int64).argmax(dim=1)
        own = pooled[torch.arange(len(tasks), device=tasks.device), places]
        normed = F.layer_norm(pooled, pooled.shape[-1:], eps=LAYER_NORM_EPS)
        asking = F.layer_norm(own, own.shape[-1:], eps=LAYER_NORM_EPS)
        task_key = self.task_key if sources is None else self.task_key[sources]
        queries = F.linear(asking, self.query) + self.task_query[tasks]
        keys = F.linear(normed, self.key) + task_key
        mixed, attention = attend(queries, keys, F.linear(normed, self.value), self.num_heads, visible)
        # Under autocast the product comes in 16 bits, and the row's own vector must not lose any.
        return own + F.linear(mixed.to(self.output.dtype), self.output).to(own.dtype), attention


class LayerFusion(_Fusion):
    r"""
    Attention over the LoRA outputs of all tasks in one linear layer, computed in their ranks.

    With z_i = A_i x, u_i = s_i B_i z_i and g_i = u_i / RMS(u_i), a token of a row of task t gets, beside the output of
    the base layer and u_t, W_o concat_a sum_i p_i^a (W_v u_i)^a with weights as in [`OutputFusion`], of g_t and g_i in
    place of the normalised outputs. W_o is zero at the start.

    No u_i but the task's own is ever made: (W_k s_i B_i) z_i takes k r products for each token and task in place of
    D (r + k), and the length of u_i is that of z_i under s_i^2 B_i^T B_i.

    Args:
        width (`int`):
            D.
        fusion_dim (`int`):
            k.
        num_heads (`int`):
            h.
        num_tasks (`int`):
            T.
    """

    def forward(
        self,
        down: torch.Tensor,
        up: torch.Tensor,
        tasks: torch.Tensor,
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Fuses.

        Args:
            down (`torch.Tensor` of shape `(B, S, T, r)`):
                z, the input under each task's A.
            up (`torch.Tensor` of shape `(T, D, r)`):
                s B of each task.
            tasks (`torch.Tensor` of shape `(B,)`, int64):
                Task of each row.
            visible (`torch.Tensor` of shape `(B, T)`, bool, *optional*):
                Which tasks a row may listen to, its own among them. All by default.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: of shape `(B, S, D)`, the update of the layer's output, the task's own
            included; and of shape `(B, S, T)`, what each token listened to.
        """
        rows, positions, _, rank = down.shape
        own = down[torch.arange(rows, device=tasks.device), :, tasks]  # [B, S, r]
        gram = up.mT @ up / up.shape[1]  # [T, r, r]
        keys_up, values_up = self.key @ up, self.value @ up  # [T, k, r]
        stacked = torch.cat([gram, keys_up, values_up], dim=1)  # [T, r + 2 k, r]
        tokens = down.flatten(0, 1).transpose(0, 1)  # [T, B S, r]
        projected = torch.bmm(tokens, stacked.mT).transpose(0, 1).unflatten(0, (rows, positions))
        dim = len(self.key)
        lengths, keys, values = projected.split([rank, dim, dim], dim=-1)  # [B, S, T, .]
        # Rounding may leave the square of a length of next to nothing below zero.
        squares = (lengths * down).sum(-1, keepdim=True).clamp(min=0)
        scale = (squares + RMS_EPS).rsqrt()  # [B, S, T, 1]
        places = tasks[:, None, None, None].expand(rows, positions, 1, 1)
        own_scale = scale.gather(2, places).squeeze(2)  # [B, S, 1]
        asking = torch.bmm(own, (self.query @ up)[tasks].mT) * own_scale
        queries = asking + self.task_query[tasks][:, None]
        seen = None if visible is None else visible[:, None]
        mixed, attention = attend(queries, keys * scale + self.task_key, values, self.num_heads, seen)
        update = torch.bmm(own, up[tasks].mT)
        return update + F.linear(mixed.to(self.output.dtype), self.output).to(update.dtype), attention
