"""From the labels in a data set to the heads that they need."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from ..core.errors import invalid
from .task_head import IGNORED, PROBLEM_TYPES, TaskHead
from .tasks import TaskRegistry


__all__ = ["best_thresholds", "check_labels", "heads_of_labels"]

FIX = "`MultiTaskHeads.encode_label` writes them."
KINDS = "a class by name or id, a list of classes, a finite number with a decimal point, or None"


def heads_of_labels(
    names: Sequence[str],
    tasks: Iterable[str | int],
    labels: Iterable[Any],
    *,
    class_weights: str | None = None,
    regression_tasks: Collection[str] = (),
) -> dict[str, TaskHead]:
    """
    The head of each task, from the kind of its labels.

    Numbers with a decimal point are regressed, in units of their standard deviation; lists of classes are multi-label;
    all else is one class.

    Balanced weights are N / (C n_c), as in scikit-learn, over the N rows of a task, the C classes that occur in them
    and the n_c rows of each, so that their mean over the rows is 1; multi-label, the rows in which a class does not
    apply for each in which it does. A class without either gets 1: one that no row has (there are such among classes
    given by id), or one that applies in all rows. Regressions have none.

    Args:
        names (`Sequence[str]` of length T):
            Names of the tasks.
        tasks (`Iterable[str | int]` of length N):
            Task of each row, by name or id.
        labels (`Iterable` of length N):
            Label of each row: a class by name or id, a list of classes, a number, or None where there is none.
        class_weights (`str`, *optional*):
            `"balanced"`: heads with class weights, so that rare classes count as much as frequent ones.
        regression_tasks (`Collection[str]`, *optional*):
            Tasks whose numbers are regressed even where all of them are whole.

    Returns:
        `dict[str, TaskHead]`: in the order of `names`.

    Raises:
        `ValueError`: for a task without labels, labels of several kinds in one task, NaN, or negative ids; for whole
            numbers with a decimal point beside other tasks' decimals, which a file makes of classes.

    Example:

    ```python
    >>> from hf_curriculum.multitask.labels import heads_of_labels

    >>> labels = ["art", "sport", "art", "art"]
    >>> head = heads_of_labels(["topic"], ["topic"] * 4, labels, class_weights="balanced")["topic"]
    >>> head.id2label, head.class_weights
    (('art', 'sport'), (0.6666666666666666, 2.0))
    ```
    """
    if class_weights not in (None, "balanced"):
        raise invalid("class_weights", class_weights, "None or 'balanced'")
    registry = TaskRegistry(names)
    found: dict[str, list[Any]] = {task: [] for task in names}
    kinds: dict[str, str] = {}
    for row, (task, label) in enumerate(zip(tasks, labels, strict=True)):
        if label is None:
            continue
        name = registry.name(registry.id(task))
        kind = _kind(label)
        if kind is None:
            raise invalid("labels", f"{label!r} in row {row}, of task {name}", KINDS)
        if kinds.setdefault(name, kind) != kind:
            raise invalid(
                "labels", f"{label!r} in row {row}, of task {name}", f"a label for a {kinds[name]}, as before"
            )
        found[name].append(label)
    if empty := [task for task, values in found.items() if not values]:
        raise invalid("labels", f"no label of task {empty[0]}", "labels for every task")
    _check_whole_numbers({task: found[task] for task in found if kinds[task] == "regression"}, regression_tasks)
    return {task: _head(task, kinds[task], values, class_weights) for task, values in found.items()}


def _check_whole_numbers(regressed: dict[str, list[float]], meant: Collection[str]) -> None:
    """Refuses classes that became decimals because another task of the same column has some."""
    whole = [task for task, values in regressed.items() if all(float(value).is_integer() for value in values)]
    if len(whole) < len(regressed) and (doubtful := [task for task in whole if task not in meant]):
        task = doubtful[0]
        raise invalid(
            "labels",
            f"whole numbers such as {regressed[task][0]} for task {task}, beside decimals of other tasks",
            "classes as texts, or numbers to predict",
            "A file keeps one type for a column. Write the classes of a task as texts; if its numbers are to be "
            "predicted, name it in `regression_tasks`.",
        )


def _kind(label: Any) -> str | None:
    """What a label is a label for; None if for nothing."""
    single, several, numbers = PROBLEM_TYPES
    if isinstance(label, float | np.floating):
        return numbers if math.isfinite(label) else None
    if isinstance(label, list | tuple | np.ndarray):
        return several if all(_kind(name) == single for name in label) else None
    if isinstance(label, int | np.integer) and not isinstance(label, bool):
        return single if label >= 0 else None
    return single if isinstance(label, str) else None


def _head(task: str, kind: str, values: list[Any], class_weights: str | None) -> TaskHead:
    if kind == "regression":
        return TaskHead(1, kind, target_scale=float(np.std(values)) or 1.0)
    several = kind == PROBLEM_TYPES[1]
    # A class named twice in a row applies once.
    rows_of = Counter(name for value in values for name in (set(value) if several else [value]))
    named = [isinstance(name, str) for name in rows_of]
    if any(named) and not all(named):
        raise invalid("labels", f"classes by name and by id, of task {task}", "all by name, or all by id")
    classes: list[Any] = sorted(rows_of) if any(named) else list(range(max(rows_of, default=-1) + 1))
    if not several and len(classes) < 2:
        raise invalid("labels", f"one class, {classes[0]!r}, of task {task}", "two classes or more")
    head = TaskHead(len(classes), kind, id2label=tuple(classes) if any(named) else None)
    if class_weights is None:
        return head
    counts = np.array([rows_of[name] for name in classes])
    return replace(head, class_weights=_balanced(counts, len(values), several=several))


def _balanced(counts: np.ndarray, num_rows: int, *, several: bool) -> tuple[float, ...]:
    """Weights of classes from the rows that have them, `(C_t,)`, int64."""
    occur = counts > 0
    ratio = (num_rows - counts if several else num_rows / occur.sum()) / np.maximum(counts, 1)
    return tuple(np.where(occur & (ratio > 0), ratio, 1.0).tolist())


def best_thresholds(scores: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """
    The thresholds of a multi-label task that maximise the F1 of each class.

    Those tried are 0.5 and the middles between neighbouring scores; of several that are equally good, the one nearest
    to 0.5 is taken. Find them on rows held out from training: on the training rows they would be those of a model
    that is surer than it is right.

    Args:
        scores (`np.ndarray` of shape `(N, C)`):
            Probabilities, in [0, 1].
        labels (`np.ndarray` of shape `(N, C)`):
            0 or 1.

    Returns:
        `tuple[float, ...]` of length C: in (0, 1), for [`~hf_curriculum.multitask.task_head.TaskHead`]; 0.5 for a
        class that applies in no row or in all of them.

    Raises:
        `ValueError`: for other shapes, probabilities out of range or NaN, or labels other than 0 and 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_curriculum.multitask.labels import best_thresholds

    >>> best_thresholds(np.array([[0.1, 0.7], [0.25, 0.2], [0.75, 0.9]]), np.array([[0, 1], [1, 0], [1, 1]]))
    (0.175, 0.5)
    ```
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or 0 in scores.shape:
        raise invalid("scores", f"shape {scores.shape}", "(rows, classes), at least one of each")
    if labels.shape != scores.shape:
        raise invalid("labels", f"shape {labels.shape}", f"that of the scores, {scores.shape}")
    for name, values, fits, expected in (
        ("scores", scores, (scores >= 0) & (scores <= 1), "probabilities in [0, 1]"),
        ("labels", labels, (labels == 0) | (labels == 1), "0 or 1; leave rows without a label out"),
    ):
        if not fits.all():
            row, column = np.argwhere(~fits)[0]
            raise invalid(name, f"{values[row, column]} in row {row}, of class {column}", expected)
    ours = zip(scores.astype(np.float64).T, (labels == 1).T, strict=True)
    return tuple(_best_threshold(own, wanted) for own, wanted in ours)


def _best_threshold(scores: np.ndarray, wanted: np.ndarray) -> float:
    """Of one class; both of shape `(N,)`."""
    if wanted.all() or not wanted.any():
        return 0.5
    order = np.argsort(scores)
    scores, wanted = scores[order], wanted[order]
    distinct = np.unique(np.append(0.0, scores))
    middles = (distinct[:-1] + distinct[1:]) / 2
    tried = np.append(middles[(middles > 0) & (middles < 1)], 0.5)
    below = np.searchsorted(scores, tried, side="right")
    hits = wanted.sum() - np.append(0, np.cumsum(wanted))[below]
    f1 = 2 * hits / (len(scores) - below + wanted.sum())
    best = tried[f1 == f1.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def check_labels(heads: Mapping[str, TaskHead], rows: Dataset, task_ids: np.ndarray, name: str) -> None:
    """
    Refuses labels that a head does not have: on a device they would only show as a loss without end.

    Args:
        heads (`Mapping[str, TaskHead]`):
            By task, in the order of the ids.
        rows ([`~datasets.Dataset`] of N rows):
            With a column `labels` (or `label`, `label_ids`) as `MultiTaskHeads.encode_label` writes them; without
            one nothing is checked.
        task_ids (`np.ndarray` of shape `(N,)`, int64):
            Task of each row.
        name (`str`):
            Of the data set, for the error.

    Raises:
        `ValueError`: for a row of no single task, a class that its task does not have, or numbers that are no targets.
    """
    if (task_ids < 0).any():
        raise invalid(name, f"row {int(np.argmax(task_ids < 0))} of no single task", "a task with a head in every row")
    # The names that transformers' collators make `labels` of.
    title = next((title for title in ("labels", "label", "label_ids") if title in rows.column_names), None)
    if title is None or not len(rows):
        return
    column = rows[title][:]
    try:
        labels = np.asarray(column, dtype=np.float64).reshape(len(rows), -1)
    except (TypeError, ValueError) as error:
        row = _odd_row(column)
        got = f"labels {column[row]!r} in row {row} beside {column[0]!r} in row 0: no table of numbers"
        raise invalid(name, got, "numbers, as many in every row", FIX) from error
    for task, (title, head) in enumerate(heads.items()):
        own = (task_ids == task) & (labels[:, 0] != IGNORED)
        if (wrong := own & _is_wrong(head, labels)).any():
            row = int(np.argmax(wrong))
            expected = f"{_expected(head)} (or {IGNORED} in the first place: no label)"
            raise invalid(name, f"labels {column[row]} in row {row}, of task {title}", expected, FIX)


def _odd_row(column: Sequence[Any]) -> int:
    """The first row that is no numbers, or not as many as those of row 0; 0 if there is none."""
    first = None
    for row, label in enumerate(column):
        try:
            size = np.asarray(label, dtype=np.float64).shape
        except (TypeError, ValueError):
            return row
        first = size if first is None else first
        if size != first:
            return row
    return 0


def _expected(head: TaskHead) -> str:
    if head.problem_type == PROBLEM_TYPES[0]:
        return f"a class in [0, {head.num_labels})"
    kind = "finite numbers" if head.problem_type == "regression" else "numbers that are 0 or 1"
    return f"{head.num_labels} {kind}"


def _is_wrong(head: TaskHead, labels: np.ndarray) -> np.ndarray:
    """Which rows hold no label of the head, `(N,)`, bool."""
    if head.problem_type == PROBLEM_TYPES[0]:
        first = labels[:, 0]
        return np.asarray(~((first >= 0) & (first < head.num_labels) & (first == np.floor(first))))
    values = labels[:, : head.num_labels]
    if values.shape[1] < head.num_labels:
        return np.ones(len(labels), dtype=bool)
    fits = np.isfinite(values) if head.problem_type == "regression" else (values == 0) | (values == 1)
    return np.asarray(~fits.all(axis=1))
