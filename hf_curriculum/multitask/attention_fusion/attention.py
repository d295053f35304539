"""
What tasks listen to.

Shapes: N rows, T tasks, C_t outputs of task t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from ...core.console import show_table
from ...core.distributed import rank_and_world
from ...core.errors import invalid
from ...core.modes import evaluation_mode
from ...core.records import RunRecord
from ..collator import MultiTaskCollator
from ..task_head import IGNORED, TaskHead
from .features import CachedFeatures, in_batches
from .model import AttentionFusionModel


__all__ = ["FusionAttention", "measure_attention"]


@dataclass(frozen=True)
class FusionAttention:
    """
    What rows listened to.

    Args:
        heads (`dict[str, TaskHead]` of length T):
            The tasks.
        tasks (`np.ndarray` of shape `(N,)`, int64):
            Task of each row.
        labels (`np.ndarray` of shape `(N, K)`, float64):
            Labels of each row as `encode_label` writes them; -100 where there is none.
        attention (`np.ndarray` of shape `(N, T)`, float32):
            Weights, which sum to 1 in each row, averaged over heads, and at level `"layer"` over tokens and layers.
    """

    heads: dict[str, TaskHead]
    tasks: np.ndarray
    labels: np.ndarray
    attention: np.ndarray

    def mean(self) -> np.ndarray:
        """Mean over the rows of each task, `(T, T)`, float64: row t is what task t listens to; NaN without rows."""
        return np.stack([self._mean(self.tasks == task) for task in range(len(self.heads))])

    def by_class(self, task: str) -> np.ndarray:
        """
        Mean over the rows of each class of a task.

        Args:
            task (`str`):
                Name of the task.

        Returns:
            `np.ndarray` of shape `(C_t, T)`, float64; NaN for classes without rows. Rows of several classes count for
            each. Empty for a regression.

        Raises:
            `ValueError`: for an unknown task.
        """
        if task not in self.heads:
            raise invalid("task", task, f"one of {', '.join(self.heads)}")
        head, own = self.heads[task], self.tasks == list(self.heads).index(task)
        if head.problem_type == "regression":
            return np.empty((0, len(self.heads)))
        if head.problem_type == "multi_label_classification":
            return np.stack([self._mean(own & (self.labels[:, number] == 1)) for number in range(head.num_labels)])
        return np.stack([self._mean(own & (self.labels[:, 0] == number)) for number in range(head.num_labels)])

    def _mean(self, chosen: np.ndarray) -> np.ndarray:
        if not chosen.any():
            return np.full(len(self.heads), np.nan)
        return np.asarray(self.attention[chosen].mean(axis=0, dtype=np.float64))

    def show(self) -> None:
        """Prints what each task listens to."""
        columns = ("task", "rows", *self.heads)
        counts = [int((self.tasks == task).sum()) for task in range(len(self.heads))]
        rows = [[name, count, *values] for name, count, values in zip(self.heads, counts, self.mean().tolist())]
        show_table("What each task (down) listens to, mean over its rows", columns, rows)

    def write(self, record: RunRecord, step: int) -> None:
        """
        Appends the means to the record of a run, as `fusion_attention`.

        Args:
            record ([`~hf_curriculum.core.records.RunRecord`]):
                The record.
            step (`int`):
                Optimizer steps so far.
        """
        by_class = {}
        for name, head in self.heads.items():
            classes = [str(label) for label in head.id2label or range(head.num_labels)]
            if (means := self.by_class(name)).size:
                by_class[name] = {"classes": classes, "attention": _without_nan(means)}
        counts = [int((self.tasks == task).sum()) for task in range(len(self.heads))]
        names = list(self.heads)
        record.append(
            "fusion_attention", step, names=names, rows=counts, mean=_without_nan(self.mean()), by_class=by_class
        )


def _without_nan(values: np.ndarray) -> list[list[float | None]]:
    """Lists for JSON, which knows no NaN."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def measure_attention(
    model: AttentionFusionModel,
    rows: Dataset | CachedFeatures,
    *,
    collator: Callable[[list[dict[str, Any]]], Any] | None = None,
    batch_size: int = 32,
    task_column: str = "task",
) -> FusionAttention:
    """
    Measures what the rows of each task listen to. Collective.

    Args:
        model ([`AttentionFusionModel`]):
            In a stage with fusion.
        rows ([`~datasets.Dataset`] or [`CachedFeatures`]):
            Tokenised rows with their tasks and, for the means by class, labels.
        collator (`Callable`, *optional*):
            Pads rows; for cached features their own.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows that go together, at least 1.
        task_column (`str`, *optional*, defaults to `"task"`):
            Column with the task of each row.

    Returns:
        [`FusionAttention`]: equal on all processes.

    Raises:
        `ValueError`: in stage `"tasks"`, without rows, or without a collator.
    """
    if model.stage == "tasks":
        raise invalid("stage", "tasks", "a stage with fusion", "Call `model.set_stage('fusion')`.")
    if isinstance(rows, CachedFeatures):
        rows.collator.check_model(model)
    data, inner = (rows.rows, rows.collator) if isinstance(rows, CachedFeatures) else (rows, collator)
    if inner is None or not len(data):
        raise invalid("rows", f"{len(data)} rows, collator {inner}", "rows, and a collator that pads them")
    wrapped = MultiTaskCollator(inner, model.registry(), task_column)
    attention = np.zeros((len(data), len(model.heads)), dtype=np.float32)
    tasks = np.zeros(len(data), dtype=np.int64)
    labels = np.full((len(data), model.label_width or 1), IGNORED, dtype=np.float64)
    mine = np.zeros(len(data), dtype=bool)
    with evaluation_mode(model), torch.no_grad():
        for places, batch in in_batches(data, wrapped, batch_size, model.classifier.weight.device, [task_column]):
            tasks[places] = batch["tasks"].cpu().numpy()
            if (given := batch.pop("labels", None)) is not None:
                labels[places] = given.double().cpu().numpy().reshape(len(places), -1)
            attention[places] = model(**batch, return_attention=True).attention.float().cpu().numpy()
            mine[places] = True
    if rank_and_world()[1] > 1:
        parts: list[Any] = [None] * rank_and_world()[1]
        dist.all_gather_object(parts, (np.flatnonzero(mine), tasks[mine], labels[mine], attention[mine]))
        for places, *values in parts:
            tasks[places], labels[places], attention[places] = values
    return FusionAttention(dict(model.heads), tasks, labels, attention)
