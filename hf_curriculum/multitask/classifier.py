"""
Heads of several tasks, whatever they stand on.

Shapes: B rows, H hidden size, T tasks, C_t outputs of task t, C the largest C_t, K columns of labels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..core.errors import invalid, unsupported
from .absent import TaskBlocks, task_owners
from .head_files import EXPECTED, read_head_files, tensors_below, write_head_files
from .head_math import POOLINGS, HeadLayout, batch_loss, row_losses
from .task_head import IGNORED, PROBLEM_TYPES, TaskHead, label_values, prediction
from .tasks import TaskRegistry, Tasks


__all__ = ["TaskClassifier"]


class TaskClassifier(nn.Module):
    r"""
    The heads of several tasks: what models with a head per task have in common.

    All heads are rows of one matrix, so that a batch of mixed tasks takes one product, no loop over rows and no
    waiting for the device; each row then picks the outputs of its own task. Every head is in every graph, as DDP and
    ZeRO need it: one whose task is absent from a batch gets a gradient of zero, and
    [`~hf_curriculum.multitask.absent.freeze_absent_tasks`], which the trainers of this package call, keeps momentum
    and weight decay from moving it.

    The loss is the mean over the labelled rows, so a task weighs as many rows as it has in the batch (the sampler's
    business), of each row's loss in units of an uninformed guess, so that no task weighs more for the number or kind
    of its outputs (our choice): cross-entropy divided by log C_t, binary cross-entropy averaged over the C_t and
    divided by log 2, squared errors averaged over the C_t and divided by `target_scale` squared. Class weights are
    relative, so that a task does not weigh more for their size either; see
    [`~hf_curriculum.multitask.head_math.batch_loss`].

    Args:
        backbone ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What gives the vectors.
        heads (`Mapping[str, TaskHead]`):
            The head of each task, by name, in the order of the ids.
        pooling (`str`):
            `"cls"`, `"mean"` or `"last"`: how rows become vectors.
        dropout (`float`):
            Dropout before the heads, in [0, 1).

    Raises:
        `ValueError`: for a wrong pooling or dropout, or without heads.
        `NotImplementedError`: for an encoder-decoder.
    """

    # Its mean is over the rows of a micro-batch: the Trainer must divide by the accumulation steps itself, and would
    # count labels as a causal model's.
    accepts_loss_kwargs = False

    def __init__(self, backbone: Any, heads: Mapping[str, TaskHead], *, pooling: str, dropout: float) -> None:
        super().__init__()
        if not heads or not all(isinstance(head, TaskHead) for head in heads.values()):
            raise invalid("heads", heads, "a `TaskHead` by the name of each task")
        if pooling not in POOLINGS:
            raise invalid("pooling", pooling, f"one of {', '.join(POOLINGS)}")
        if not 0 <= dropout < 1:
            raise invalid("dropout", dropout, "a float in [0, 1)")
        if getattr(backbone.config, "is_encoder_decoder", False):
            raise unsupported(
                "Task heads over an encoder-decoder",
                "its last hidden states are the decoder's, of another input",
                "Use its encoder (`model.get_encoder()`), or an encoder or decoder model.",
            )
        self.backbone = backbone
        self.config: PretrainedConfig = backbone.config
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        first = next(backbone.parameters())
        # Not in 16 bits, in which small updates round to nothing; PEFT keeps its adapters in float32 likewise.
        dtype = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else torch.float32
        self.set_heads(heads)
        self.classifier.to(device=first.device, dtype=dtype)

    def set_heads(self, heads: Mapping[str, TaskHead]) -> None:
        """Makes a classifier for these heads, with weights of its own."""
        self.heads = dict(heads)
        self._registry = TaskRegistry(list(heads))
        self.layout = HeadLayout(list(heads.values()))
        self.classifier = nn.Linear(self.hidden_size, self.layout.num_outputs)
        # As transformers starts its classifiers.
        nn.init.normal_(self.classifier.weight, std=getattr(self.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.config.get_text_config().hidden_size)

    def registry(self) -> TaskRegistry:
        """The tasks: names and ids."""
        return self._registry

    def task_blocks(self) -> tuple[int, list[TaskBlocks]]:
        """T, and the rows of the heads that belong to single tasks: all."""
        owners = task_owners([head.num_labels for head in self.heads.values()], len(self.heads))
        return len(self.heads), [TaskBlocks(parameter, owners) for parameter in self.classifier.parameters()]

    def row_tasks(self, tasks: Tasks | None, rows: torch.Tensor) -> torch.Tensor:
        """
        Ids of the tasks of a batch, on its device.

        Args:
            tasks (`str`, `int`, `Sequence` or `torch.Tensor`, *optional*):
                Task of each row, or of all. May be left out where there is one head.
            rows (`torch.Tensor` of shape `(B, ...)`):
                Any input.

        Returns:
            `torch.Tensor` of shape `(B,)`, int64.

        Raises:
            `ValueError`: without tasks, or for unknown or reserved ones.
            `NotImplementedError`: for a task per token.
        """
        if tasks is None and len(self.heads) == 1:
            tasks = 0
        if tasks is None:
            raise invalid("tasks", None, "the task of each row", f"Tasks: {', '.join(self._registry)}.")
        ids = self._registry.ids(tasks, batch_size=rows.shape[0])
        # Where this costs no waiting for a device; trainers look at all rows before training.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and (ids < 0).any():
            one_of = f"one of {', '.join(self._registry)}"
            raise invalid("tasks", "common or uniform", one_of, "Heads are of one task.")
        if ids.dim() == 2:
            raise unsupported(
                "A task per token with task heads", "rows of a flattened batch cannot be told apart", "Pad the batch."
            )
        return ids.to(rows.device)

    def answer(
        self,
        pooled: torch.Tensor,
        ids: torch.Tensor,
        labels: torch.Tensor | None,
        classifier: nn.Linear | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """
        Applies the heads to one vector per row.

        Args:
            pooled (`torch.Tensor` of shape `(B, H)`):
                The vectors.
            ids (`torch.Tensor` of shape `(B,)`, int64):
                Tasks.
            labels (`torch.Tensor` of shape `(B,)` or `(B, K)`, *optional*):
                As in [`forward`].
            classifier (`nn.Linear`, *optional*):
                Other weights of the same heads.

        Returns:
            `dict`: `loss` (None without labels) and `logits`, as in [`forward`].
        """
        outputs = self.classifier if classifier is None else classifier
        logits = self.layout.pick(outputs(self.dropout(pooled).to(outputs.weight.dtype)), ids)
        loss = None
        if labels is not None:
            loss = batch_loss(logits, labels, ids, self.layout)
        return {"loss": loss, "logits": logits}

    def row_losses(
        self, logits: torch.Tensor, labels: torch.Tensor, tasks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Losses of rows in their own units, for logs: nats, or squared errors.

        Args:
            logits (`torch.Tensor` of shape `(B, C)`):
                What [`forward`] returned.
            labels (`torch.Tensor` of shape `(B,)` or `(B, K)`):
                The labels.
            tasks (`torch.Tensor` of shape `(B,)`, int64):
                Ids.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B,)`, float32: losses, and how much each row counts:
            1, or the weight of its class, where there is a label, else 0.
        """
        return row_losses(logits, labels, tasks, self.layout)

    @property
    def label_width(self) -> int | None:
        """K, the columns of labels; None where every task has a single number, and labels have shape `(B,)`."""
        widths = [1 if head.problem_type == PROBLEM_TYPES[0] else head.num_labels for head in self.heads.values()]
        kinds = {head.problem_type for head in self.heads.values()}
        return None if max(widths) == 1 and len(kinds) == 1 else max(widths)

    def encode_label(self, task: str | int, label: Any) -> int | float | list[float]:
        """
        Writes a label as the column `labels` of a data set needs it.

        Args:
            task (`str` or `int`):
                The row's task.
            label (`Any`):
                A class, by id or name; a list of those that apply (multi-label); a number or a list of numbers
                (regression); None where there is none.

        Returns:
            `int` or `float` where all tasks of the model have one such number, else `list[float]` of length K, padded
            with -100.

        Raises:
            `ValueError`: for a class that the task does not have, or numbers that are no targets.
        """
        name = self._registry.name(self._registry.id(task))
        if name not in self.heads:
            raise invalid("task", task, f"one of {', '.join(self.heads)}")
        head = self.heads[name]
        values = [float(IGNORED)] if label is None else label_values(head, label)
        if self.label_width is None:
            return values[0] if head.problem_type == "regression" else int(values[0])
        padding = self.label_width - len(values)
        return [float(value) for value in values] + [float(IGNORED)] * padding

    def decode(self, logits: torch.Tensor, tasks: Tasks) -> list[Any]:
        """
        Reads predictions, on the CPU.

        Args:
            logits (`torch.Tensor` of shape `(B, C)`):
                What [`forward`] returned.
            tasks (`str`, `int`, `Sequence` or `torch.Tensor`):
                Task of each row, or of all.

        Returns:
            `list` of length B: a class (its name where there are names); a list of classes of probability above the
            head's `threshold` (multi-label); a list of C_t numbers (regression).
        """
        ids = self._registry.ids(tasks, len(logits)).tolist()
        rows = logits.float().cpu()
        return [prediction(self.heads[self._registry.name(task)], row) for row, task in zip(rows, ids, strict=True)]

    def head_rows(self, task: str) -> slice:
        """Rows of a task's head among those of the classifier."""
        start = sum(head.num_labels for head in list(self.heads.values())[: self._registry.id(task)])
        return slice(start, start + self.heads[task].num_labels)

    def save_heads(self, folder: str | os.PathLike[str], state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Writes all heads: `task_heads.safetensors` and, last, `task_heads.json`.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*):
                The weights of this model by name, where its parameters do not hold them whole (ZeRO-3).
        """
        tensors = self.classifier.state_dict() if state_dict is None else tensors_below("classifier.", state_dict)
        write_head_files(folder, self.head_settings(), tensors)

    def save_head(self, task: str, folder: str | os.PathLike[str]) -> None:
        """
        Writes the head of one task alone, for [`from_pretrained`] over a backbone that is adapted to that task.

        Args:
            task (`str`):
                Name of the task.
            folder (`str` or `os.PathLike`):
                The folder, which gets `task_heads.safetensors` and `task_heads.json`.

        Raises:
            `ValueError`: for an unknown task.
        """
        if task not in self.heads:
            raise invalid("task", task, f"one of {', '.join(self.heads)}")
        own = self.head_rows(task)
        tensors = {name: value[own] for name, value in self.classifier.state_dict().items()}
        write_head_files(folder, self.head_settings([task]), tensors)

    def head_settings(self, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """What `task_heads.json` says about some tasks, or all of them."""
        described = {name: asdict(self.heads[name]) for name in (self.heads if tasks is None else tasks)}
        return {"pooling": self.pooling, "dropout": self.dropout.p, "heads": described}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """What a Trainer calls to write a checkpoint."""
        raise NotImplementedError

    def load_weights(self, folder: str | os.PathLike[str]) -> Any:
        """What a Trainer calls to read a checkpoint; returns the part whose weights it is to read itself, or None."""
        raise NotImplementedError

    def load_heads(self, folder: str | os.PathLike[str]) -> None:
        """
        Reads the weights of the heads, not of the backbone, into this model.

        Args:
            folder (`str` or `os.PathLike`):
                A folder that [`save_pretrained`] wrote from heads like these.

        Raises:
            `ValueError`: if a file is missing or unreadable, or its heads are others.
        """
        settings, tensors = read_head_files(folder)
        try:
            theirs = [(name, TaskHead(**values)) for name, values in settings["heads"].items()]
        except (KeyError, TypeError, AttributeError) as error:
            raise invalid("folder", f"{folder}, which cannot be read ({error})", EXPECTED) from error
        if theirs != list(self.heads.items()):
            raise invalid("folder", f"{folder}, with other heads than the model", f"heads {list(self.heads)} as here")
        try:
            self.classifier.load_state_dict(tensors)
        except RuntimeError as error:
            raise invalid("folder", f"{folder}, which cannot be read ({error})", EXPECTED) from error
