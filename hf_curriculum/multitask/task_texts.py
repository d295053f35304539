"""Texts of several tasks with their labels in one column of a data set, and heads that fit all of its splits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..core.errors import invalid
from .classifier import TaskClassifier
from .labels import heads_of_labels
from .lengths import longest_row
from .rows import row_task_ids
from .task_head import TaskHead
from .tasks import TaskRegistry


__all__ = ["TaskTexts", "heads_of_splits", "read_texts", "several_label_tasks"]


@dataclass(frozen=True)
class TaskTexts:
    """
    Rows as [`read_texts`] reads them.

    Args:
        texts (`list[str]` of length N):
            The texts.
        tasks (`list[str]` of length N):
            Task of each, by name.
        labels (`list` of length N):
            As [`~hf_curriculum.multitask.labels.heads_of_labels`] takes them.
    """

    texts: list[str]
    tasks: list[str]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.texts)

    def encode(
        self, model: TaskClassifier, processing_class: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> Dataset:
        """
        Makes rows for a trainer.

        Args:
            model ([`~hf_curriculum.multitask.classifier.TaskClassifier`]):
                Whose heads the labels are for.
            processing_class ([`~transformers.PreTrainedTokenizerBase`]):
                The tokenizer.
            max_length (`int`, *optional*):
                Longer texts are cut to so many tokens, and all to what tokenizer and base allow.

        Returns:
            [`~datasets.Dataset`] of N rows: `input_ids`, `labels` and `task`.

        Raises:
            `ValueError`: for a label that its task does not have.
        """
        limits = [limit for limit in (max_length, longest_row(model, processing_class)) if limit is not None]
        length = min(limits, default=None)
        ids = processing_class(self.texts, truncation=length is not None, max_length=length).input_ids
        labels = [model.encode_label(task, label) for task, label in zip(self.tasks, self.labels, strict=True)]
        return Dataset.from_dict({"input_ids": ids, "labels": labels, "task": self.tasks})


def several_label_tasks(rows: Dataset, label_column: str, task_column: str, names: Sequence[str]) -> list[str]:
    """
    Tasks whose rows have other than one label, where the labels of a row are a list.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            The training rows.
        label_column (`str`):
            Column with the labels.
        task_column (`str`):
            Column with the task of each row, by name or id.
        names (`Sequence[str]`):
            Names of the tasks.

    Returns:
        `list[str]`: in the order of `names`; empty where the column holds no lists.
    """
    ids = row_task_ids(rows, task_column, TaskRegistry(list(names)))
    found = {
        int(task)
        for task, label in zip(ids, rows[label_column][:], strict=True)
        if isinstance(label, list | tuple) and len(label) != 1
    }
    return [name for task, name in enumerate(names) if task in found]


def read_texts(
    rows: Dataset,
    names: Sequence[str],
    columns: Mapping[str, str],
    *,
    multi_label_tasks: Sequence[str] = (),
    separator: str = ",",
    name: str = "train_dataset",
) -> TaskTexts:
    """
    Reads texts, and the labels of all tasks from one column, in which every row has the same type.

    A file or a data set has one type per column: so where one task has several labels per row, those of all tasks are
    lists, or texts in which a separator stands between labels.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            The rows.
        names (`Sequence[str]`):
            Names of the tasks, in the order of their ids.
        columns (`Mapping[str, str]`):
            Names of the columns: `"text"`; `"task"`, by name or id; `"label"`, a class by name or id, a number, a
            list of classes, or a text of several.
        multi_label_tasks (`Sequence[str]`, *optional*):
            Tasks of which any number of classes applies to a row. Of the others, a list must hold one.
        separator (`str`, *optional*, defaults to `","`):
            Between the labels of a multi-label task, where labels are texts. An empty text: none applies.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Of the data set, for errors.

    Returns:
        [`TaskTexts`]

    Raises:
        `ValueError`: for a missing column, an unknown task, a row without text, a label that is missing or NaN, or
            several where one is wanted.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from hf_curriculum.multitask.task_texts import read_texts

    >>> rows = Dataset.from_dict({"text": ["a", "b"], "task": ["topic", "tags"], "label": ["art", "new, long"]})
    >>> columns = {"text": "text", "task": "task", "label": "label"}
    >>> read_texts(rows, ["topic", "tags"], columns, multi_label_tasks=["tags"]).labels
    ['art', ['new', 'long']]
    ```
    """
    for column in columns.values():
        if column not in rows.column_names:
            raise invalid(name, f"the columns {', '.join(rows.column_names)}", f"a column `{column}`")
    if unknown := [task for task in multi_label_tasks if task not in names]:
        raise invalid("multi_label_tasks", unknown, f"some of {', '.join(names)}")
    ids = row_task_ids(rows, columns["task"], TaskRegistry(list(names))).tolist()
    texts = rows[columns["text"]][:]
    labels = []
    for row, (task, text, label) in enumerate(zip(ids, texts, rows[columns["label"]][:], strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise invalid(f"{name}, column {columns['text']}", f"{text!r} in row {row}", "a text in every row")
        several = names[task] in multi_label_tasks
        value = _several(label, separator) if several else _one(label)
        if value is None:
            wanted = "a list of classes, which may be empty" if several else "one label"
            fix = "Leave rows without a label out."
            if isinstance(label, list) and not several:
                fix = "Name tasks with several labels per row as multi-label tasks."
            got = f"{label!r} in row {row}, of task {names[task]}"
            raise invalid(f"{name}, column {columns['label']}", got, wanted, fix)
        labels.append(value)
    return TaskTexts(texts, [names[task] for task in ids], labels)


def _is_missing(label: Any) -> bool:
    return label is None or (isinstance(label, float | np.floating) and math.isnan(label))


def _one(label: Any) -> Any:
    """One label; None where there is not exactly one."""
    if isinstance(label, list | tuple):
        return _one(label[0]) if len(label) == 1 else None
    return None if _is_missing(label) or (isinstance(label, str) and not label.strip()) else label


def _several(label: Any, separator: str) -> list[Any] | None:
    """Any number of labels; None where they are missing."""
    if isinstance(label, str):
        return [part.strip() for part in label.split(separator) if part.strip()]
    if not isinstance(label, list | tuple):
        return None if _is_missing(label) else [label]
    return None if any(map(_is_missing, label)) else list(label)


def heads_of_splits(
    names: Sequence[str],
    train: TaskTexts,
    test: TaskTexts | None = None,
    *,
    class_weights: str | None = None,
    regression_tasks: Collection[str] = (),
    threshold: float = 0.5,
) -> dict[str, TaskHead]:
    """
    The head of each task, with the classes of all splits and the weights and scales of the training rows.

    A class that occurs in held-out rows alone is a class all the same: it cannot be learned, and counts as wrong.

    Args:
        names (`Sequence[str]`):
            Names of the tasks.
        train ([`TaskTexts`]):
            The training rows.
        test ([`TaskTexts`], *optional*):
            Rows to evaluate on.
        class_weights (`str`, *optional*):
            None or `"balanced"`; see [`~hf_curriculum.multitask.labels.heads_of_labels`].
        regression_tasks (`Collection[str]`, *optional*):
            As there.
        threshold (`float`, *optional*, defaults to `0.5`):
            Probability above which a class of a multi-label task is predicted, in (0, 1).

    Returns:
        `dict[str, TaskHead]`: in the order of `names`.

    Raises:
        `ValueError`: for a task without training rows, and as [`~hf_curriculum.multitask.labels.heads_of_labels`].
    """
    # Whether whole numbers are classes shows in all rows.
    trained = heads_of_labels(
        names, train.tasks, train.labels, class_weights=class_weights, regression_tasks=names
    )  # fmt: skip
    others = TaskTexts([], [], []) if test is None else test
    tasks, labels = train.tasks + others.tasks, train.labels + others.labels
    heads = heads_of_labels(names, tasks, labels, regression_tasks=regression_tasks)
    made = {}
    for name, head in heads.items():
        known = trained[name]
        weights: tuple[float, ...] | None = None
        if known.class_weights is not None:
            classes: tuple[str | int, ...] = known.id2label or tuple(range(known.num_labels))
            of_class = dict(zip(classes, known.class_weights, strict=True))
            weights = tuple(of_class.get(label, 1.0) for label in head.id2label or range(head.num_labels))
        multi = head.problem_type == "multi_label_classification"
        made[name] = replace(
            head,
            target_scale=known.target_scale,
            class_weights=weights,
            threshold=threshold if multi else head.threshold,
        )
    return made
