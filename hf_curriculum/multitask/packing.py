"""Packing in TRL's way, with the task of every token beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from trl import pack_dataset

from ..core.errors import invalid
from ..core.order import seeded_order


__all__ = ["pack_with_tasks"]

# What a seeded order is for, second in its key, apart from those of the sampler.
_PACK = 34


def pack_with_tasks(
    rows: Dataset,
    task_ids: np.ndarray,
    *,
    task_column: str,
    max_length: int,
    strategy: str,
    by_task: bool,
    seed: int,
    map_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Packs tokenised rows, keeping one task id per token.

    Rows are put into a seeded order first, since packing joins rows that lie near one another: neighbours of one task
    would end up in packs of that task.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            With `input_ids` and `labels`.
        task_ids (`np.ndarray` of shape `(N,)`, int64):
            Task of each row.
        task_column (`str`):
            Column that the ids of a pack are written to, a list with one per token.
        max_length (`int`):
            Tokens of a pack.
        strategy (`str`):
            As in [`~trl.pack_dataset`].
        by_task (`bool`):
            Whether each pack is of one task; otherwise tasks share packs.
        seed (`int`):
            Seed of the order.
        map_kwargs (`dict`, *optional*):
            Passed on to [`~datasets.Dataset.map`].

    Returns:
        [`~datasets.Dataset`]: packs with `input_ids`, `labels`, the task column and, unless `strategy="wrapped"`,
        `seq_lengths`.

    Raises:
        `ValueError`: for no rows.
    """
    if len(rows) == 0:
        raise invalid("train_dataset", "0 rows", "at least one row to pack")
    order = seeded_order(len(rows), seed, _PACK)
    rows = rows.select_columns(["input_ids", "labels"]).select(order)
    ids = task_ids[order]
    rows = rows.add_column(task_column, [int(task) for task in ids])
    rows = rows.map(_ids_per_token, fn_kwargs={"task_column": task_column}, **(map_kwargs or {}))
    parts = [np.flatnonzero(ids == task) for task in np.unique(ids)] if by_task else [np.arange(len(ids))]
    packs = [pack_dataset(rows.select(part), max_length, strategy, map_kwargs) for part in parts]
    return concatenate_datasets(packs) if len(packs) > 1 else packs[0]


def _ids_per_token(row: dict[str, Any], task_column: str) -> dict[str, Any]:
    return {task_column: [row[task_column]] * len(row["input_ids"])}
