"""Predictions for texts: what each task says, how sure it is, and whom it listened to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ...core.errors import invalid, unsupported
from ...core.modes import evaluation_mode
from ..lengths import longest_row
from ..task_head import TaskHead, prediction


if TYPE_CHECKING:
    from .model import AttentionFusionModel

__all__ = ["FusedClassifierOutput", "FusedPrediction", "FusedPredictions"]


@dataclass
class FusedClassifierOutput(ModelOutput):
    """
    What a pass of an [`AttentionFusionModel`] returns.

    Args:
        loss (`torch.Tensor`, *optional*):
            A scalar, with labels.
        logits (`torch.Tensor` of shape `(B, C)`):
            Of each row's own task; the lowest finite number where it has fewer outputs.
        attention (`torch.Tensor` of shape `(B, T)`, *optional*):
            What each row listened to, summing to 1; where it was asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    attention: torch.Tensor | None = None


@dataclass(frozen=True)
class FusedPrediction:
    """
    What a task says about a text.

    Args:
        label (`Any`):
            A class (its name where there are names); a list of classes (several per row); a list of numbers
            (regression).
        scores (`dict[str | int, float]` or `list[float]`):
            Probability of each class, in [0, 1]; of a regression the numbers.
        attention (`dict[str, float]`, *optional*):
            What the task listened to, by task, summing to 1; `None` in stage `"tasks"`.
    """

    label: Any
    scores: dict[str | int, float] | list[float]
    attention: dict[str, float] | None


@dataclass(frozen=True)
class _Part:
    """Rows that go through the model together: places in the list of texts, the task of all, or of each."""

    places: list[int]
    tasks: list[int] | None
    sources: list[int] | None


class FusedPredictions:
    """The part of an [`AttentionFusionModel`] that predicts for texts."""

    def predict(
        self,
        texts: Sequence[str],
        *,
        task: str | Sequence[str] | None = None,
        processing_class: PreTrainedTokenizerBase,
        batch_size: int = 32,
        max_length: int | None = None,
        top_k: int | None = None,
    ) -> list[Any]:
        """
        Predicts for texts, in evaluation mode.

        Texts of like length go together. A pass for all tasks at once costs no more than for one where pooled outputs
        are fused: every row runs through all LoRAs in either case.

        Args:
            texts (`Sequence[str]`):
                The texts.
            task (`str` or `Sequence[str]`, *optional*):
                Task of all texts, or of each. By default all tasks say something about each text.
            processing_class ([`~transformers.PreTrainedTokenizerBase`]):
                The tokenizer.
            batch_size (`int`, *optional*, defaults to `32`):
                Texts that go together, at least 1.
            max_length (`int`, *optional*):
                Longer texts are cut to so many tokens, at least 1. Defaults to what tokenizer and base allow.
            top_k (`int`, *optional*):
                At level `"output"`: each task listens to itself and the `top_k - 1` tasks that it has listened to most
                ([`remember_attention`]), and no other LoRA is run. In [1, T]. All by default.

        Returns:
            `list[FusedPrediction]`, in the order of the texts; without a task, `list[dict[str, FusedPrediction]]`.

        Raises:
            `ValueError`: for an unknown task, a single string in place of a list, or a `top_k` out of range or without
                known attention.
            `NotImplementedError`: for `top_k` at level `"layer"`, where one pass runs all LoRAs.
        """
        model = cast("AttentionFusionModel", self)
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise invalid("texts", texts if isinstance(texts, str) else "other values", "a list of strings")
        texts = list(texts)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise invalid("batch_size", batch_size, "an integer >= 1")
        if max_length is not None and (isinstance(max_length, bool) or max_length < 1):
            raise invalid("max_length", max_length, "an integer >= 1")
        named = [] if task is None else [task] if isinstance(task, str) else list(task)
        if unknown := [name for name in named if name not in model.heads]:
            raise invalid("task", unknown[0], f"one of {', '.join(model.heads)}")
        ids = None if task is None else model.row_tasks(task, torch.empty(len(texts), 0)).tolist()
        kept = None if top_k is None else self.most_heard(top_k)
        if not texts:
            return []
        length = max_length or longest_row(model, processing_class)
        encoded = processing_class(texts, truncation=length is not None, max_length=length)
        rows = [{name: values[place] for name, values in encoded.items()} for place in range(len(texts))]
        if empty := [place for place, row in enumerate(rows) if not len(row["input_ids"])]:
            raise invalid("texts", f"{texts[empty[0]]!r} in place {empty[0]}", "texts with a token each")
        found: list[dict[int, FusedPrediction]] = [{} for _ in texts]
        with evaluation_mode(model), torch.no_grad():
            for part in _parts([len(row["input_ids"]) for row in rows], ids, kept, batch_size):
                # On the right, whatever the tokenizer's side: absolute positions count from the left.
                batch = processing_class.pad(
                    [rows[place] for place in part.places], return_tensors="pt", padding_side="right"
                )
                inputs = {name: value.to(model.classifier.weight.device) for name, value in batch.items()}
                self._predict_part(inputs, part, found)
        if task is not None:
            return [next(iter(of_text.values())) for of_text in found]
        names = list(model.heads)
        return [{names[number]: of_text[number] for number in sorted(of_text)} for of_text in found]

    def _predict_part(
        self, inputs: Mapping[str, torch.Tensor], part: _Part, found: list[dict[int, FusedPrediction]]
    ) -> None:
        """Predictions of one part, for the tasks of its rows or for all."""
        model = cast("AttentionFusionModel", self)
        names, heads = list(model.heads), list(model.heads.values())
        pooled, sources = None, None
        # In stage "tasks" every row runs through one LoRA, unless all tasks are asked.
        if model.fusion is not None and (model.stage != "tasks" or part.tasks is None):
            if part.sources is not None:
                names = [names[number] for number in part.sources]
                sources = torch.tensor(part.sources, device=model.classifier.weight.device)
            pooled = model.pooled_outputs(sources=sources, **inputs)
        rows = len(part.places)
        for tasks in [part.tasks] if part.tasks is not None else [[task] * rows for task in range(len(heads))]:
            output = self._answer_rows(inputs, torch.tensor(tasks), pooled, sources)
            logits = output.logits.float().cpu()
            attention = None if output.attention is None else output.attention.float().tolist()
            for row, (place, task) in enumerate(zip(part.places, tasks, strict=True)):
                heard = None if attention is None else dict(zip(names, attention[row], strict=True))
                found[place][task] = _prediction(heads[task], logits[row], heard)

    def remember_attention(self, mean: np.ndarray | torch.Tensor) -> None:
        """
        Keeps what each task listens to, for `predict(top_k=...)`; it is saved with the model.

        Args:
            mean (`np.ndarray` or `torch.Tensor` of shape `(T, T)`):
                Row t: what task t listens to, from [`~FusionAttention.mean`].

        Raises:
            `ValueError`: for another shape, or a task without rows.
        """
        model = cast("AttentionFusionModel", self)
        table = torch.as_tensor(mean, dtype=torch.float32)
        if table.shape != model.mean_attention.shape or not table.isfinite().all():
            raise invalid(
                "mean", f"a table of shape {tuple(table.shape)}", f"{tuple(model.mean_attention.shape)} finite numbers"
            )
        model.mean_attention.copy_(table)

    def _answer_rows(
        self,
        inputs: Mapping[str, torch.Tensor],
        ids: torch.Tensor,
        pooled: torch.Tensor | None,
        sources: torch.Tensor | None,
    ) -> Any:
        """Answers of the heads to rows, of which some or all tasks' pooled outputs may be known."""
        model = cast("AttentionFusionModel", self)
        if sources is None or model.fusion is None or pooled is None:
            given = inputs if pooled is None else {}
            return model(**given, tasks=ids, pooled=pooled, return_attention=True)
        ids = ids.to(pooled.device)
        vectors, attention = model.fusion(pooled, ids, sources, visible=model.sees[ids][:, sources])
        answer = model.answer(vectors, ids, None)
        return FusedClassifierOutput(logits=answer["logits"], attention=attention)

    def most_heard(self, top_k: int) -> list[list[int]]:
        """
        Whom each task listens to most.

        Args:
            top_k (`int`):
                In [1, T].

        Returns:
            `list[list[int]]` of length T: itself and `top_k - 1` others, by id.

        Raises:
            `ValueError`: for a number out of range, or where no attention is known.
            `NotImplementedError`: at level `"layer"`.
        """
        model = cast("AttentionFusionModel", self)
        count = len(model.heads)
        if model.level != "output" or model.stage == "tasks":
            raise unsupported(
                "`top_k` " + ("at level `layer`" if model.level != "output" else "in stage `tasks`"),
                "nothing is left out by it",
                "Leave it unset.",
            )
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= count:
            raise invalid("top_k", top_k, f"an integer in [1, {count}]")
        mass = model.mean_attention.clone()
        if mass.isnan().any():
            raise invalid(
                "top_k",
                top_k,
                "None where it is not known what tasks listen to",
                "Call `model.remember_attention(measure_attention(model, rows).mean())` first; it is saved.",
            )
        mass.fill_diagonal_(torch.inf)
        return [sorted(row.topk(top_k).indices.tolist()) for row in mass]


def _parts(
    lengths: Sequence[int], tasks: Sequence[int] | None, kept: list[list[int]] | None, batch_size: int
) -> Iterator[_Part]:
    """Rows of like length; where each task runs LoRAs of its own, of one task."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    if kept is None:
        groups: list[tuple[list[int], int | None]] = [(order, None)]
    elif tasks is None:
        groups = [(order, task) for task in range(len(kept))]
    else:
        groups = [([place for place in order if tasks[place] == task], task) for task in range(len(kept))]
    for places, task in groups:
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            if task is not None and kept is not None:
                yield _Part(chosen, [task] * len(chosen), kept[task])
            else:
                yield _Part(chosen, None if tasks is None else [tasks[place] for place in chosen], None)


def _prediction(head: TaskHead, logits: torch.Tensor, attention: dict[str, float] | None) -> FusedPrediction:
    own = logits[: head.num_labels]
    label = prediction(head, logits)
    if head.problem_type == "regression":
        return FusedPrediction(label, own.tolist(), attention)
    several = head.problem_type == "multi_label_classification"
    probabilities = own.sigmoid() if several else own.softmax(dim=-1)
    names: tuple[str | int, ...] = head.id2label or tuple(range(head.num_labels))
    return FusedPrediction(label, dict(zip(names, probabilities.tolist(), strict=True)), attention)
