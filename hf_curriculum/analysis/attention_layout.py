"""
Texts in batches, and what the positions of a batch are: which text, which sink, which category.

Shapes: B rows, S positions, H heads, Q queries and K keys of a block, C categories, T texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from ..core.errors import unsupported
from .attention_words import CATEGORIES, EncodedText


__all__ = ["LAYOUTS", "ProbeBatch", "TokenLayout", "probe_batches"]

LAYOUTS = ("right", "left", "packed")


@dataclass(frozen=True)
class TokenLayout:
    """
    What the positions of a batch are.

    Args:
        texts (`torch.Tensor` of shape `(B, S)`, int64):
            Text of each position, in [0, T); -1 for padding. The positions of a text stand together in one row.
        categories (`torch.Tensor` of shape `(B, S)`, int64):
            Category of each position, in [0, C).
        num_texts (`int`):
            T.
        num_categories (`int`):
            C.
    """

    texts: torch.Tensor
    categories: torch.Tensor
    num_texts: int
    num_categories: int

    @cached_property
    def sinks(self) -> torch.Tensor:
        """Column of the first token of each position's text, `(B, S)`, int64."""
        previous = F.pad(self.texts, (1, 0), value=-2)[:, :-1]
        columns = torch.arange(self.texts.shape[1], device=self.texts.device).expand_as(self.texts)
        starts: torch.Tensor = torch.where(self.texts != previous, columns, 0).cummax(dim=1).values
        return starts

    def indicators(self, with_sink: bool) -> torch.Tensor:
        """
        One-hot categories of the positions.

        Args:
            with_sink (`bool`):
                Whether a text's first token is of a category of its own, the last.

        Returns:
            `torch.Tensor` of shape `(B, S, C)`, or `(B, S, C + 1)` with the sink, float32.
        """
        if not with_sink:
            return F.one_hot(self.categories, self.num_categories).float()
        columns = torch.arange(self.texts.shape[1], device=self.texts.device)
        kinds = torch.where(self.sinks == columns, self.num_categories, self.categories)
        return F.one_hot(kinds, self.num_categories + 1).float()

    def add(self, total: torch.Tensor, values: torch.Tensor, counted: torch.Tensor, block: slice) -> None:
        """
        Adds the values of a block's queries to their texts.

        Args:
            total (`torch.Tensor` of shape `(T, H, ...)`):
                Sums, changed in place.
            values (`torch.Tensor` of shape `(B, H, Q, ...)`):
                A number or a vector for each query.
            counted (`torch.Tensor` of shape `(B, H, Q)`, bool):
                Queries that count.
            block (`slice`):
                Columns of the queries.
        """
        weights = counted.reshape(*counted.shape, *[1] * (values.ndim - 3))
        kept = torch.where(weights, values, 0).to(total.dtype).transpose(1, 2).flatten(0, 1)  # [B * Q, H, ...]
        # Padding belongs to no text and never counts, so its zeros may land anywhere.
        total.index_add_(0, self.texts[:, block].flatten().clamp_min(0), kept)

    def check_mask(self, allowed: torch.Tensor, block: slice) -> None:
        """
        Refuses a mask that lets a token see padding or another text: every number would be of the mixture.

        Args:
            allowed (`torch.Tensor` of shape `(B, 1 or H, Q, K)`, bool):
                Keys that each query sees.
            block (`slice`):
                Columns of the queries.

        Raises:
            `NotImplementedError`: if it does.
        """
        queries = self.texts[:, None, block, None]
        other = (self.texts[:, None, None, : allowed.shape[-1]] != queries) & (queries >= 0)
        if bool((allowed & other).any()):
            raise unsupported(
                "Attention statistics where texts see one another or padding",
                "the model's mask does not keep them apart, and every number would be of the mixture",
                "For padded rows pass `attention_mask`; for packed ones pass `position_ids` that start again at 0 in "
                "each text, no `attention_mask`, to a causal model.",
            )


@dataclass(frozen=True)
class ProbeBatch:
    """
    Tokenised texts, laid out for one forward pass.

    Args:
        inputs (`dict[str, torch.Tensor]` of shape `(B, S)`):
            Arguments of the model's backbone.
        layout ([`TokenLayout`]):
            Texts and categories.
        members (`list[int]`):
            Which of the encoded texts these are.
        spans (`list[tuple[int, int]]`):
            Row and first column of each.
    """

    inputs: dict[str, torch.Tensor]
    layout: TokenLayout
    members: list[int]
    spans: list[tuple[int, int]]


def probe_batches(
    encoded: Sequence[EncodedText], batch_tokens: int, layout: str, padding_id: int = 0
) -> Iterator[ProbeBatch]:
    """
    Lays texts of similar length out in batches.

    Args:
        encoded (`Sequence[EncodedText]`):
            The texts.
        batch_tokens (`int`):
            Tokens in a batch, padding included; a longer text has a batch of its own.
        layout (`str`):
            `"right"` or `"left"` (the side of the padding), or `"packed"` (one row, positions start again with each
            text).
        padding_id (`int`, *optional*, defaults to `0`):
            Token to pad with.

    Yields:
        [`ProbeBatch`]
    """
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].input_ids))
    start = 0
    while start < len(order):
        longest = len(encoded[order[start]].input_ids)
        members = order[start : start + max(1, batch_tokens // max(1, longest))]
        yield _laid_out([encoded[index] for index in members], members, layout, padding_id)
        start += len(members)


def _laid_out(rows: list[EncodedText], members: list[int], layout: str, padding_id: int) -> ProbeBatch:
    lengths = [len(row.input_ids) for row in rows]
    packed = layout == "packed"
    # A batch of empty texts still needs a column for the model to read.
    shape = (1, max(1, sum(lengths))) if packed else (len(rows), max(1, *lengths))
    ids = np.full(shape, padding_id, dtype=np.int64)
    texts, categories, positions = np.full(shape, -1), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    spans = []
    for index, (row, length) in enumerate(zip(rows, lengths)):
        at = (0, sum(lengths[:index])) if packed else (index, shape[1] - length if layout == "left" else 0)
        place = (at[0], slice(at[1], at[1] + length))
        ids[place], texts[place], categories[place] = row.input_ids, index, row.categories
        positions[place] = np.arange(length)
        spans.append(at)
    inputs = {"input_ids": torch.from_numpy(ids)}
    if not packed:
        inputs["attention_mask"] = torch.from_numpy((texts >= 0).astype(np.int64))
    if layout != "right":
        inputs["position_ids"] = torch.from_numpy(positions)
    token_layout = TokenLayout(torch.from_numpy(texts), torch.from_numpy(categories), len(rows), len(CATEGORIES))
    return ProbeBatch(inputs, token_layout, members, spans)
