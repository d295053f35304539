"""What the head of one task predicts, and how its labels and predictions are written as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, log
from typing import Any

import numpy as np
import torch

from ..core.errors import invalid


__all__ = ["IGNORED", "PROBLEM_TYPES", "TaskHead", "label_values", "prediction", "threshold_logits"]

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# What marks a label as missing, in every kind of task.
IGNORED = -100


@dataclass(frozen=True)
class TaskHead:
    """
    What the head of one task predicts.

    Args:
        num_labels (`int`):
            C_t: classes, or numbers to predict. At least 2 classes of which one is right, else at least 1.
        problem_type (`str`, *optional*, defaults to `"single_label_classification"`):
            As in transformers: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        id2label (`tuple[str, ...]`, *optional*):
            Names of the classes in the order of their ids, all different.
        target_scale (`float`, *optional*, defaults to `1.0`):
            Of a regression: the spread of its targets (their standard deviation), above 0. Squared errors are divided
            by its square in the loss.
        class_weights (`tuple[float, ...]` of length C_t, *optional*):
            How much each class counts in the loss, above 0. Where one class is right: a row counts by the weight of
            its class, and only the ratios of the weights matter, since the loss divides them by their harmonic mean.
            Multi-label: how much a class that applies counts against one that does not, so 1.0 changes nothing and
            the size matters, as in `torch.nn.BCEWithLogitsLoss(pos_weight=)`.
            [`~hf_curriculum.multitask.labels.heads_of_labels`] makes those that balance the classes.
        threshold (`float` or `tuple[float, ...]` of length C_t, *optional*, defaults to `0.5`):
            Multi-label: a class is predicted where its probability is above, in (0, 1); of all classes or of each.
            [`~hf_curriculum.multitask.labels.best_thresholds`] finds them.

    Raises:
        `ValueError`: for a value out of range, or one that does nothing beside the others.

    Example:

    ```python
    >>> from hf_curriculum.multitask.task_head import TaskHead

    >>> TaskHead(2, class_weights=(1.0, 9.0)).class_weights
    (1.0, 9.0)
    >>> TaskHead(3, "multi_label_classification", threshold=(0.5, 0.2, 0.7)).threshold
    (0.5, 0.2, 0.7)
    ```
    """

    num_labels: int
    problem_type: str = "single_label_classification"
    id2label: tuple[str, ...] | None = None
    target_scale: float = 1.0
    class_weights: tuple[float, ...] | None = None
    threshold: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        if self.problem_type not in PROBLEM_TYPES:
            raise invalid("problem_type", self.problem_type, f"one of {', '.join(PROBLEM_TYPES)}")
        least = 2 if self.problem_type == PROBLEM_TYPES[0] else 1
        if isinstance(self.num_labels, bool) or not isinstance(self.num_labels, int) or self.num_labels < least:
            raise invalid("num_labels", self.num_labels, f"an integer >= {least} for a {self.problem_type}")
        if self.id2label is not None:
            names = () if isinstance(self.id2label, str | Mapping) else tuple(self.id2label)
            right = len(names) == self.num_labels == len(set(names)) and all(isinstance(name, str) for name in names)
            if not right:
                raise invalid(
                    "id2label", self.id2label, f"{self.num_labels} different names, in the order of their ids"
                )
            object.__setattr__(self, "id2label", names)
        if not 0 < self.target_scale < float("inf"):
            raise invalid("target_scale", self.target_scale, "a float > 0")
        if self.target_scale != 1.0 and self.problem_type != "regression":
            raise invalid("target_scale", self.target_scale, "1.0 except for a regression")
        self._check_class_weights()
        self._check_threshold()

    def _check_class_weights(self) -> None:
        if self.class_weights is None:
            return
        if self.problem_type == "regression":
            raise invalid("class_weights", self.class_weights, "None for a regression, which has no classes")
        weights = _finite(self.class_weights)
        if weights is None or len(weights) != self.num_labels or min(weights) <= 0:
            expected = f"{self.num_labels} finite numbers > 0, one for each class"
            raise invalid("class_weights", self.class_weights, expected)
        object.__setattr__(self, "class_weights", weights)

    def _check_threshold(self) -> None:
        one = not isinstance(self.threshold, Iterable)
        found = _finite([self.threshold] if one else self.threshold)
        if found is None or len(found) != (1 if one else self.num_labels) or not 0 < min(found) <= max(found) < 1:
            expected = f"a float in (0, 1), or {self.num_labels} of them, one for each class"
            raise invalid("threshold", self.threshold, expected)
        object.__setattr__(self, "threshold", found[0] if one else found)
        if self.threshold != 0.5 and self.problem_type != "multi_label_classification":
            raise invalid("threshold", self.threshold, "0.5 except for a multi-label classification")


def _finite(values: Any) -> tuple[float, ...] | None:
    """Numbers as floats; None where one is not a finite number."""
    if not isinstance(values, list | tuple | np.ndarray):
        return None
    numbers = (int, float, np.integer, np.floating)
    if not all(isinstance(value, numbers) and not isinstance(value, bool) and isfinite(value) for value in values):
        return None
    return tuple(float(value) for value in values)


def label_values(head: TaskHead, label: Any) -> list[float]:
    """
    Writes a label as numbers.

    Args:
        head ([`TaskHead`]):
            Of its task.
        label (`Any`):
            A class, by id or name; a list of those that apply (multi-label); a number or a list of numbers
            (regression).

    Returns:
        `list[float]`: a class by its id; 0 or 1 for each of the C_t classes; C_t numbers.

    Raises:
        `ValueError`: for a class that the task does not have, or numbers that are not finite or mark a missing label.
    """
    return _VALUES[head.problem_type](head, label)


def threshold_logits(head: TaskHead) -> list[float]:
    """
    The thresholds of a multi-label task as logits, in which 1/2 is 0 exactly; probabilities near 1 would be rounded.

    Args:
        head ([`TaskHead`]):
            Of the task.

    Returns:
        `list[float]` of length C_t.
    """
    probabilities = head.threshold if isinstance(head.threshold, tuple) else (head.threshold,) * head.num_labels
    return [log(probability / (1 - probability)) for probability in probabilities]


def prediction(head: TaskHead, logits: torch.Tensor) -> Any:
    """
    Reads the prediction of one row.

    Args:
        head ([`TaskHead`]):
            Of its task.
        logits (`torch.Tensor` of shape `(C,)`):
            The first C_t are the task's own.

    Returns:
        A class (its name where there are names); a list of the classes of probability above the head's `threshold`
        (multi-label); a list of C_t numbers (regression).
    """
    own = logits[: head.num_labels]
    names: tuple[str | int, ...] = head.id2label or tuple(range(head.num_labels))
    if head.problem_type == "regression":
        return own.tolist()
    if head.problem_type == "multi_label_classification":
        pairs = zip(names, own.tolist(), threshold_logits(head), strict=True)
        return [name for name, logit, cut in pairs if logit > cut]
    return names[int(own.argmax())]


def _class_id(head: TaskHead, label: Any) -> int:
    names = head.id2label or ()
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < head.num_labels:
        return int(label)
    raise invalid("label", label, f"one of {', '.join(names)}" if names else f"a class in [0, {head.num_labels})")


def _one_class(head: TaskHead, label: Any) -> list[float]:
    return [_class_id(head, label)]


def _several_classes(head: TaskHead, label: Any) -> list[float]:
    if isinstance(label, str) or not isinstance(label, Iterable):
        raise invalid("label", label, "a list of the classes that apply, which may be empty")
    chosen = {_class_id(head, name) for name in label}
    return [float(number in chosen) for number in range(head.num_labels)]


def _numbers(head: TaskHead, label: Any) -> list[float]:
    values = [float(number) for number in (label if isinstance(label, list | tuple) else [label])]
    if len(values) != head.num_labels:
        raise invalid("label", label, f"{head.num_labels} numbers")
    if values[0] == IGNORED or not all(map(isfinite, values)):
        raise invalid("label", label, f"finite numbers, the first other than {IGNORED}, which marks a missing label")
    return values


_VALUES: dict[str, Callable[[TaskHead, Any], list[float]]] = dict(
    zip(PROBLEM_TYPES, (_one_class, _several_classes, _numbers), strict=True)
)
