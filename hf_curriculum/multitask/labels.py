"""From the labels in a data set to the heads that they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..core.errors import invalid
from .heads import TaskHead


__all__ = ["heads_of_labels"]


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
