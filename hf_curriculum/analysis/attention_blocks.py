"""
Arithmetic of the probe: from a block of attention scores to sums over texts.

For a query q of a text that starts with the token 0, with scores s_k over the keys it sees (B rows and H heads left
out):

    p_k      = softmax of s over the keys but 0                      the row with the sink taken out, renormalised
    sigma    = exp(s_0) / sum of exp(s_k) over all keys              mass on the sink
    H(p)     = -sum_k p_k ln p_k;  entropy_rest = H(p) / ln(n)       n keys without the sink
    entropy  = (h(sigma) + (1 - sigma) H(p)) / ln(n + 1)             h: entropy of a coin; the whole row's entropy

Working on p and sigma, and not on the row, keeps the digits of what is left where the sink takes nearly everything. A
query counts if it has two keys to choose from beside the sink.

Shapes: B rows, S positions, H heads, Q queries and K keys of a block, D head size, C categories, T texts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention_layout import TokenLayout
from .attention_scores import BlockInputs


__all__ = ["PER_HEAD", "LayerSums", "block_sums", "diagonal_sums", "head_divergence"]

PER_HEAD = ("entropy", "entropy_rest", "sink", "value_sink", "head_distance")


class LayerSums:
    """
    What the blocks of one layer add up to.

    Args:
        layout ([`TokenLayout`]):
            Texts and categories.
        inputs ([`BlockInputs`]):
            The layer's inputs.
        below (`torch.Tensor` of shape `(B, S, C + 1)`):
            Rollout from each position to each category of input tokens, the sink last, before this layer.

    Attributes:
        totals (`dict[str, torch.Tensor]`):
            Sums over the queries of each text, `(T, H)` or `(T, H, C)` (`rollout`: `(T, C)`); `received` over
            the queries of each key, `(B, H, S)`; `distance` over the pairs of each distance, `(H, 2 S - 1)`.
        columns (`torch.Tensor` of shape `(B, H, S, 3 C + 1)`):
            What a map is multiplied with: one-hot categories, the same times the norms of the values, and `below`.
        above (`torch.Tensor` of shape `(B, S, C + 1)`):
            Rollout with this layer, written block by block.
    """

    def __init__(self, layout: TokenLayout, inputs: BlockInputs, below: torch.Tensor) -> None:
        device, dtype = layout.texts.device, inputs.query.dtype
        batch, heads, length = inputs.value_norms.shape
        # Sums over many queries; only MPS has no float64.
        wide = dtype if device.type == "mps" else torch.float64
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("count", *PER_HEAD), (layout.num_texts, heads))
        shapes |= dict.fromkeys(("mass", "value_mass"), (layout.num_texts, heads, layout.num_categories))
        shapes |= {"received": (batch, heads, length), "distance": (heads, 2 * length - 1)}
        self.totals = {name: torch.zeros(*shape, dtype=wide, device=device) for name, shape in shapes.items()}
        kinds = layout.indicators(with_sink=False)[:, None].to(dtype).expand(-1, heads, -1, -1)
        carried = below[:, None].to(dtype).expand(-1, heads, -1, -1)
        self.columns = torch.cat([kinds, kinds * inputs.value_norms[..., None], carried], dim=-1)
        self.below, self.above = below, torch.empty_like(below)
        self._layout = layout
        self._counted: list[torch.Tensor] = []

    def add(self, name: str, values: torch.Tensor, counted: torch.Tensor, block: slice) -> None:
        """
        Adds the values of a block's queries to their texts.

        Args:
            name (`str`):
                Which sum.
            values (`torch.Tensor` of shape `(B, H, Q)` or `(B, H, Q, C)`):
                A number or a vector for each query.
            counted (`torch.Tensor` of shape `(B, H, Q)`, bool):
                Queries that count.
            block (`slice`):
                Columns of the queries.
        """
        self._layout.add(self.totals[name], values, counted, block)

    def close(self) -> dict[str, torch.Tensor]:
        """
        Adds the rollout of the layer to its texts, sink taken out and the rest renormalised.

        Returns:
            `dict[str, torch.Tensor]`: the sums, with `rollout`.
        """
        rest = self.above[..., :-1]
        shares = rest / rest.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
        count, total = self._layout.num_texts, self.totals["mass"]
        self.totals["rollout"] = total.new_zeros(count, 1, self._layout.num_categories)
        self.add("rollout", shares[:, None], torch.cat(self._counted, dim=1)[:, None], slice(None))
        self.totals["rollout"] = self.totals["rollout"][:, 0]
        return self.totals

    def count(self, counted: torch.Tensor, block: slice) -> None:
        """
        Notes which queries of a block count.

        Args:
            counted (`torch.Tensor` of shape `(B, H, Q)`, bool):
                Queries that count.
            block (`slice`):
                Columns of the queries.
        """
        self.add("count", torch.ones(counted.shape, device=counted.device), counted, block)
        self._counted.append(counted[:, 0])


def block_sums(
    layout: TokenLayout,
    inputs: BlockInputs,
    block: slice,
    scores: torch.Tensor,
    allowed: torch.Tensor,
    sums: LayerSums,
    head_distance: bool,
) -> None:
    """
    Adds a block of queries to the sums of its texts.

    Args:
        layout ([`TokenLayout`]):
            Texts and categories.
        inputs ([`BlockInputs`]):
            The layer's inputs.
        block (`slice`):
            Columns of the queries.
        scores (`torch.Tensor` of shape `(B, H, Q, K)`):
            From [`scores_block`]; its memory is used.
        allowed (`torch.Tensor` of shape `(B or 1, 1 or H, Q, K)`, bool):
            From [`mask_block`].
        sums ([`LayerSums`]):
            Changed in place.
        head_distance (`bool`):
            Whether to compare heads.
    """
    keys = scores.shape[-1]
    sinks = layout.sinks[:, block]
    is_sink = sinks[:, None, :, None] == torch.arange(keys, device=scores.device)
    rest = allowed & ~is_sink  # [B, 1, Q, K]
    others = rest.sum(dim=-1)  # [B, 1, Q]
    counted = ((others >= 2) & (layout.texts[:, None, block] >= 0)).expand(scores.shape[:-1])
    sink_seen = (allowed & is_sink).any(dim=-1)
    sink_score = scores.gather(-1, sinks[:, None, :, None].expand(*scores.shape[:-1], 1)).squeeze(-1)

    scores = scores.masked_fill_(~rest, -torch.inf)
    peak = scores.amax(dim=-1, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0)
    scores -= peak
    weights = scores.exp()
    total = weights.sum(dim=-1, keepdim=True)
    weights /= total.clamp_min(torch.finfo(total.dtype).tiny)
    log_total = total.log().squeeze(-1)
    nats = log_total - scores.masked_fill_(~rest, 0).mul_(weights).sum(dim=-1)

    # Far below the largest score nothing is left of the sink; infinities would turn its entropy into NaN.
    gap = (sink_score - log_total - peak.squeeze(-1)).masked_fill(~sink_seen, -torch.inf).clamp(-1e4, 1e4)
    gap = torch.where(others == 0, 1e4, gap)
    sink = torch.sigmoid(gap)
    coin = sink * F.softplus(-gap) + (1 - sink) * F.softplus(gap)
    sums.count(counted, block)
    sums.add("entropy_rest", nats / others.log(), counted, block)
    sums.add("entropy", (coin + (1 - sink) * nats) / (others + sink_seen).log(), counted, block)
    sums.add("sink", sink, counted, block)
    _add_shares(layout, inputs, block, weights, sink, counted, sums)
    counts = counted.to(weights.dtype)
    sums.totals["received"][..., :keys] += (counts[..., None, :] @ weights).squeeze(-2)
    first = block.start + sums.below.shape[1] - keys  # distance -(S - 1) is column 0
    by_distance = diagonal_sums((weights * counts[..., None]).sum(dim=0))
    sums.totals["distance"][:, first : first + by_distance.shape[1]] += by_distance
    if head_distance:
        sums.add("head_distance", head_divergence(weights, nats), counted, block)


def _add_shares(
    layout: TokenLayout,
    inputs: BlockInputs,
    block: slice,
    weights: torch.Tensor,
    sink: torch.Tensor,
    counted: torch.Tensor,
    sums: LayerSums,
) -> None:
    """One product of the map with everything that is summed over keys: categories, norms, and the rollout so far."""
    batch, heads, _, keys = weights.shape
    size = layout.num_categories
    below = sums.below.to(weights.dtype)
    mass, value_mass, rolled = (weights @ sums.columns[:, :, :keys]).split([size, size, size + 1], dim=-1)
    sums.add("mass", mass, counted, block)

    tiny = torch.finfo(weights.dtype).tiny
    values = value_mass.sum(dim=-1)  # [B, H, Q]
    sums.add("value_mass", value_mass / values[..., None].clamp_min(tiny), counted, block)
    sinks = layout.sinks[:, block]
    of_sink = sink * inputs.value_norms.gather(-1, sinks[:, None].expand(batch, heads, -1))
    sums.add("value_sink", of_sink / (of_sink + (1 - sink) * values).clamp_min(tiny), counted, block)

    sink_below = below.gather(1, sinks[..., None].expand(-1, -1, size + 1))  # [B, Q, C + 1]
    attended = (1 - sink)[..., None] * rolled + sink[..., None] * sink_below[:, None]
    sums.above[:, block] = 0.5 * (attended.mean(dim=1) + below[:, block])


def diagonal_sums(block: torch.Tensor) -> torch.Tensor:
    """
    Sums along the diagonals.

    Args:
        block (`torch.Tensor` of shape `(H, Q, K)`):
            Matrices.

    Returns:
        `torch.Tensor` of shape `(H, Q + K - 1)`: sum of the elements (i, j) with i - j = -(K - 1) .. Q - 1.
    """
    heads, queries, keys = block.shape
    # In rows that are one element too long for the view, each row starts one column further to the right.
    padded = F.pad(block.flip(-1), (0, queries)).view(heads, -1)[:, : queries * (queries + keys - 1)]
    return padded.view(heads, queries, queries + keys - 1).sum(dim=1)


def head_divergence(weights: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
    r"""
    How far each head is from the others: the mean of JS(p_h, p_j) over the other heads j.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, divided by ln 2 and so in [0, 1]: 0 for equal rows, 1 for rows
    without a common key.

    Args:
        weights (`torch.Tensor` of shape `(B, H, Q, K)`):
            Rows, each with sum 1.
        nats (`torch.Tensor` of shape `(B, H, Q)`):
            Their entropies.

    Returns:
        `torch.Tensor` of shape `(B, H, Q)`; NaN for a single head.
    """
    heads = weights.shape[1]
    total = torch.zeros_like(nats)
    for head in range(heads - 1):
        # One partner at a time: all at once would be a map for every pair.
        for other in range(head + 1, heads):
            middle = torch.special.entr((weights[:, head] + weights[:, other]) / 2).sum(dim=-1)
            distance = (middle - (nats[:, head] + nats[:, other]) / 2) / torch.log(nats.new_tensor(2.0))
            total[:, head] += distance
            total[:, other] += distance
    return total / (heads - 1) if heads > 1 else torch.full_like(nats, torch.nan)
