"""From the labels in a data set to the heads that they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from ..core.errors import invalid
from .task_head import IGNORED, PROBLEM_TYPES, TaskHead


__all__ = ["check_labels", "heads_of_labels"]

FIX = "labels as `MultiTaskHeads.encode_label` writes them"


def heads_of_labels(names: Sequence[str], tasks: Iterable[str | int], labels: Iterable[Any]) -> dict[str, TaskHead]:
    """
    The head of each task, from the kind of its labels.

    Numbers with a decimal point are regressed, in units of their standard deviation; lists of classes are multi-label;
    all else is one class.

    Args:
        names (`Sequence[str]` of length T):
            Names of the tasks.
        tasks (`Iterable[str | int]` of length N):
            Task of each row, by name or id.
        labels (`Iterable` of length N):
            Label of each row: a class by name or number, a list of classes, a number, or None.

    Returns:
        `dict[str, TaskHead]`: in the order of `names`.

    Raises:
        `ValueError`: for a task without labels.

    Example:

    ```python
    >>> from hf_curriculum.multitask.labels import heads_of_labels

    >>> heads_of_labels(["topic"], ["topic"] * 3, ["sport", "art", "art"])["topic"].id2label
    ('art', 'sport')
    ```
    """
    found: dict[str, list[Any]] = {task: [] for task in names}
    for task, label in zip(tasks, labels, strict=True):
        if label is not None:
            found[task if isinstance(task, str) else names[task]].append(label)
    if empty := [task for task, values in found.items() if not values]:
        raise invalid("labels", f"no label of task {empty[0]}", "labels for every task")
    return {task: _head(values) for task, values in found.items()}


def _head(values: list[Any]) -> TaskHead:
    if all(isinstance(value, float) for value in values):
        return TaskHead(1, "regression", target_scale=float(np.std(values)) or 1.0)
    several = isinstance(values[0], list)
    classes = sorted({name for value in values for name in (value if several else [value])})
    kind = "multi_label_classification" if several else "single_label_classification"
    if all(isinstance(name, str) for name in classes):
        return TaskHead(len(classes), kind, id2label=tuple(classes))
    return TaskHead(max(classes) + 1, kind)


def check_labels(heads: Mapping[str, TaskHead], rows: Dataset, task_ids: np.ndarray, name: str) -> None:
    """
    Refuses labels that a head does not have: on a device they would only show as a loss without end.

    Args:
        heads (`Mapping[str, TaskHead]`):
            By task, in the order of the ids.
        rows ([`~datasets.Dataset`] of N rows):
            With a column `labels` as `MultiTaskHeads.encode_label` writes them; without one nothing is checked.
        task_ids (`np.ndarray` of shape `(N,)`, int64):
            Task of each row.
        name (`str`):
            Of the data set, for the error.

    Raises:
        `ValueError`: for a row of no single task, a class that its task does not have, or numbers that are no targets.
    """
    if (task_ids < 0).any():
        raise invalid(name, f"row {int(np.argmax(task_ids < 0))} of no single task", "a task with a head in every row")
    if "labels" not in rows.column_names or not len(rows):
        return
    try:
        labels = np.asarray(rows["labels"][:], dtype=np.float64).reshape(len(rows), -1)
    except (TypeError, ValueError) as error:
        raise invalid(name, f"labels that are no table of numbers ({error})", FIX) from error
    for task, (title, head) in enumerate(heads.items()):
        own = (task_ids == task) & (labels[:, 0] != IGNORED)
        if (wrong := own & _is_wrong(head, labels)).any():
            row = int(np.argmax(wrong))
            raise invalid(name, f"labels {rows['labels'][row]} in row {row}, of task {title}", FIX)


def _is_wrong(head: TaskHead, labels: np.ndarray) -> np.ndarray:
    """Which rows hold no label of the head, `(N,)`, bool."""
    if head.problem_type == PROBLEM_TYPES[0]:
        first = labels[:, 0]
        return np.asarray(~((first >= 0) & (first < head.num_labels) & (first % 1 == 0)))
    values = labels[:, : head.num_labels]
    if values.shape[1] < head.num_labels:
        return np.ones(len(labels), dtype=bool)
    fits = np.isfinite(values) if head.problem_type == "regression" else (values == 0) | (values == 1)
    return np.asarray(~fits.all(axis=1))
