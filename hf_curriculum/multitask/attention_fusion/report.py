"""
What training has come to: each task's own model held against the fused one, what pruning costs, and examples.

Shapes: N rows, C outputs of the task that has most, C_t of task t, K numbers per label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PredictionOutput

from ...core.console import say, show_table
from ...core.errors import invalid
from ...core.order import seeded_order
from ..task_head import IGNORED, TaskHead, label_values, threshold_logits
from ..task_texts import TaskTexts
from .model import AttentionFusionModel


__all__ = [
    "TaskScores",
    "class_decisions",
    "pruned_accuracies",
    "score_tasks",
    "show_examples",
    "show_pruning",
    "show_scores",
]

# F1, or another score, of predicted and true classes as [`class_decisions`] writes them.
ClassScore: TypeAlias = Callable[[np.ndarray, np.ndarray], float]
# Tables of pruning have a line for each k up to so many tasks, and for powers of two where there are more.
MOST_LINES = 8
# Tasks that an example names, of those that it listened to.
MOST_HEARD = 3


@dataclass(frozen=True)
class TaskScores:
    """
    How well a model does on the rows of a task.

    Args:
        rows (`int`):
            Rows that have a label.
        accuracy (`float`, *optional*):
            Share of them that are right, in [0, 1]; where several classes apply to a row, all of them must be. None
            for a regression.
        f1 (`float`, *optional*):
            F1 in [0, 1]; None for a regression, and where none was asked for.
        loss (`float`, *optional*):
            Mean loss in units of a guess; see [`~hf_curriculum.multitask.classifier.TaskClassifier`].
    """

    rows: int
    accuracy: float | None
    f1: float | None
    loss: float | None


def class_decisions(head: TaskHead, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """
    Reads classes from logits and from labels written as numbers.

    Args:
        head ([`TaskHead`]):
            Of their task.
        logits (`np.ndarray` of shape `(N, C)`):
            The first C_t are the task's own.
        labels (`np.ndarray` of shape `(N, K)`):
            As `encode_label` writes them.

    Returns:
        Predicted and true classes, `np.ndarray` of int64: of shape `(N,)`; where several classes may apply, of shape
        `(N, C_t)` with 1 where one does, predicted where its probability is above the head's `threshold`. None for a
        regression.
    """
    if head.problem_type == "regression":
        return None
    own = logits[:, : head.num_labels]
    if head.problem_type == "single_label_classification":
        return own.argmax(axis=1), labels[:, 0].astype(np.int64)
    found = (own > np.array(threshold_logits(head))).astype(np.int64)
    return found, labels[:, : head.num_labels].astype(np.int64)


def score_tasks(
    heads: Mapping[str, TaskHead], predicted: PredictionOutput, tasks: Sequence[str], *, f1: ClassScore | None = None
) -> dict[str, TaskScores]:
    """
    Scores what a trainer has predicted, task by task.

    Args:
        heads (`Mapping[str, TaskHead]`):
            The tasks.
        predicted ([`~transformers.trainer_utils.PredictionOutput`] of N rows):
            What `MultiTaskTrainer.predict` returns. The losses are read from its metrics, `test_{task}_loss`.
        tasks (`Sequence[str]` of length N):
            Task of each row.
        f1 (`Callable[[np.ndarray, np.ndarray], float]`, *optional*):
            Takes predicted and true classes as [`class_decisions`] returns them. Without it there is no F1.

    Returns:
        `dict[str, TaskScores]`: of the tasks that have rows with a label, in the order of the heads.

    Raises:
        `ValueError`: for another number of tasks than of rows.
    """
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    if len(tasks) != len(logits):
        raise invalid("tasks", f"{len(tasks)} of them", f"{len(logits)}, one for each row that was predicted")
    names = np.asarray(tasks)
    labels = np.asarray(predicted.label_ids, dtype=np.float64).reshape(len(names), -1)
    metrics = predicted.metrics or {}
    scores = {}
    for name, head in heads.items():
        own = (names == name) & (labels[:, 0] != IGNORED)
        if not own.any():
            continue
        accuracy, share = None, None
        if (decided := class_decisions(head, logits[own], labels[own])) is not None:
            found, wanted = decided
            accuracy = float((found == wanted).reshape(len(found), -1).all(axis=1).mean())
            share = None if f1 is None else f1(found, wanted)
        scores[name] = TaskScores(int(own.sum()), accuracy, share, metrics.get(f"test_{name}_loss"))
    return scores


def show_scores(
    trainer: Trainer,
    model: AttentionFusionModel,
    rows: Dataset,
    *,
    trained_on: Mapping[str, int] | None = None,
    f1: ClassScore | None = None,
    task_column: str = "task",
) -> None:
    """
    Prints the scores of each task's own model, and of the fused one beside it. Collective.

    There is no own model to show where all parts learned together (stage `"joint"`), and no fused one before the
    fusion has learned (stage `"tasks"`).

    Args:
        trainer ([`~transformers.Trainer`]):
            A [`~hf_curriculum.trainers.MultiTaskTrainer`] of the model.
        model ([`AttentionFusionModel`]):
            The model, whose stage stays what it is.
        rows ([`~datasets.Dataset`] of N rows):
            Held-out rows as the trainer takes them.
        trained_on (`Mapping[str, int]`, *optional*):
            Training rows of each task, for a column.
        f1 (`Callable[[np.ndarray, np.ndarray], float]`, *optional*):
            See [`score_tasks`].
        task_column (`str`, *optional*, defaults to `"task"`):
            Column with the task of each row, by name.
    """
    stages = {"own": None if model.stage == "joint" else "tasks", "fused": model.stage}
    if model.stage == "tasks":
        stages["fused"] = None
    scores: dict[str, dict[str, TaskScores]] = {}
    before = model.stage
    for kind, stage in stages.items():
        scores[kind] = {}
        if stage is not None:
            model.set_stage(stage)
            try:
                predicted = trainer.predict(rows)
            finally:
                model.set_stage(before)
            scores[kind] = score_tasks(model.heads, predicted, rows[task_column][:], f1=f1)
    _show_comparison(list(model.heads), scores["own"], scores["fused"], trained_on or {})


def _show_comparison(
    names: Sequence[str],
    own: Mapping[str, TaskScores],
    fused: Mapping[str, TaskScores],
    trained_on: Mapping[str, int],
) -> None:
    nothing = TaskScores(0, None, None, None)
    table: list[list[object]] = []
    changes: list[float] = []
    for name in names:
        alone, together = own.get(name, nothing), fused.get(name, nothing)
        change = None
        if alone.accuracy is not None and together.accuracy is not None:
            changes.append(together.accuracy - alone.accuracy)
            change = f"{changes[-1]:+.3f}"
        accuracies = [alone.accuracy, together.accuracy, change]
        counts = [trained_on.get(name), alone.rows or together.rows or None]
        table.append([name, *counts, *accuracies, alone.f1, together.f1, alone.loss, together.loss])
    columns = ("task", "trained on", "rows", "accuracy: own", "fused", "change", "F1: own", "fused")
    title = "Held-out rows: the model of each task alone, and fused (several labels: all of a row right)"
    show_table(title, (*columns, "loss: own", "fused"), table)
    if changes:
        better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        say(f"Fusion: {better} task(s) better, {worse} worse, accuracy {np.mean(changes):+.3f} in the mean.")


def pruned_accuracies(
    model: AttentionFusionModel,
    processing_class: PreTrainedTokenizerBase,
    rows: TaskTexts,
    top_k: int,
    *,
    max_length: int | None = None,
) -> dict[str, float | None]:
    """
    Measures what is left of the accuracy where each task listens to few.

    Args:
        model ([`AttentionFusionModel`]):
            At level `"output"`, in a stage with fusion, and with known attention ([`remember_attention`]).
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        rows ([`~hf_curriculum.multitask.task_texts.TaskTexts`] of N rows):
            Held-out rows.
        top_k (`int`):
            Tasks that each task listens to, itself among them; in [1, T].
        max_length (`int`, *optional*):
            Longer texts are cut to so many tokens.

    Returns:
        `dict[str, float | None]`: share of right rows of each task, in [0, 1]; where several classes apply to a row,
        all of them must be right. None for a task without rows, and for a regression.

    Raises:
        `ValueError`: for a `top_k` out of range, or where no attention is known.
        `NotImplementedError`: at level `"layer"` and in stage `"tasks"`.
    """
    found = model.predict(
        rows.texts, task=rows.tasks, processing_class=processing_class, max_length=max_length, top_k=top_k
    )
    hits: dict[str, list[bool]] = {name: [] for name in model.heads}
    for task, label, prediction in zip(rows.tasks, rows.labels, found, strict=True):
        head = model.heads[task]
        # As numbers, in which a class by its name and by its id are equal.
        if head.problem_type != "regression":
            hits[task].append(label_values(head, prediction.label) == label_values(head, label))
    return {name: float(np.mean(own)) if own else None for name, own in hits.items()}


def show_pruning(
    model: AttentionFusionModel,
    processing_class: PreTrainedTokenizerBase,
    rows: TaskTexts,
    *,
    max_rows: int = 1000,
    max_length: int | None = None,
) -> None:
    """
    Prints what is left of the accuracy where each task listens to k tasks alone, for several k.

    Args:
        model ([`AttentionFusionModel`]):
            As for [`pruned_accuracies`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        rows ([`~hf_curriculum.multitask.task_texts.TaskTexts`] of N rows):
            Held-out rows.
        max_rows (`int`, *optional*, defaults to `1000`):
            Where there are more, so many of them are drawn, always the same; at least 1.
        max_length (`int`, *optional*):
            Longer texts are cut to so many tokens.

    Raises:
        As [`pruned_accuracies`].
    """
    if max_rows < 1:
        raise invalid("max_rows", max_rows, "an integer >= 1")
    chosen = _rows_at(rows, sorted(seeded_order(len(rows), 0, 0)[:max_rows].tolist()))
    count = len(model.heads)
    every = range(1, count + 1) if count <= MOST_LINES else [2**power for power in range(count.bit_length())]
    table: list[list[object]] = []
    for k in dict.fromkeys([*every, count]):
        accuracies = pruned_accuracies(model, processing_class, chosen, k, max_length=max_length)
        table.append([k, *accuracies.values()])
    title = f"Accuracy on {len(chosen)} held-out rows where each task runs the k LoRAs that it listens to most"
    show_table(title, ("k", *model.heads), table)


def show_examples(
    model: AttentionFusionModel,
    processing_class: PreTrainedTokenizerBase,
    rows: TaskTexts,
    *,
    rows_per_task: int = 2,
    max_length: int | None = None,
) -> None:
    """
    Prints predictions for a few rows, with whom they listened to.

    Args:
        model ([`AttentionFusionModel`]):
            The model, in any stage.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        rows ([`~hf_curriculum.multitask.task_texts.TaskTexts`] of N rows):
            Held-out rows.
        rows_per_task (`int`, *optional*, defaults to `2`):
            The first so many of each task are shown.
        max_length (`int`, *optional*):
            Longer texts are cut to so many tokens.
    """
    places = [
        place
        for name in model.heads
        for place in [place for place, task in enumerate(rows.tasks) if task == name][:rows_per_task]
    ]
    chosen = _rows_at(rows, places)
    found = model.predict(chosen.texts, task=chosen.tasks, processing_class=processing_class, max_length=max_length)
    table = []
    for text, task, label, prediction in zip(chosen.texts, chosen.tasks, chosen.labels, found, strict=True):
        heard = sorted((prediction.attention or {}).items(), key=lambda pair: -pair[1])[:MOST_HEARD]
        shown = ", ".join(f"{name} {share:.2f}" for name, share in heard) or None
        table.append([shorten(text, 50), task, *map(_as_text, (label, prediction.label)), shown])
    show_table("Predictions, and whom they listened to", ("text", "task", "label", "predicted", "listens to"), table)


def _rows_at(rows: TaskTexts, places: Sequence[int]) -> TaskTexts:
    columns: list[list[Any]] = [rows.texts, rows.tasks, rows.labels]
    return TaskTexts(*([column[place] for place in places] for column in columns))


def _as_text(label: Any) -> str:
    """A label or several in one cell."""
    return ", ".join(map(str, label)) or "(none)" if isinstance(label, list) else str(label)
