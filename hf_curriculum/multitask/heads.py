"""
One classification or regression head per task over one backbone.

Shapes: B rows, S positions, H hidden size, T tasks, C_t outputs of task t, C the largest C_t, K columns of labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..core.errors import invalid, unsupported
from ..core.files import write_atomic
from .aware import model_tasks, takes_tasks
from .head_math import POOLINGS, HeadLayout, pool, row_losses
from .tasks import TaskRegistry, Tasks


__all__ = ["PROBLEM_TYPES", "MultiTaskHeads", "TaskHead"]

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
CONFIG_NAME, WEIGHTS_NAME = "task_heads.json", "task_heads.safetensors"
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

    Raises:
        `ValueError`: for a value out of range, or one that does nothing beside the others.
    """

    num_labels: int
    problem_type: str = "single_label_classification"
    id2label: tuple[str, ...] | None = None
    target_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.problem_type not in PROBLEM_TYPES:
            raise invalid("problem_type", self.problem_type, f"one of {', '.join(PROBLEM_TYPES)}")
        least = 2 if self.problem_type == PROBLEM_TYPES[0] else 1
        if isinstance(self.num_labels, bool) or not isinstance(self.num_labels, int) or self.num_labels < least:
            raise invalid("num_labels", self.num_labels, f"an integer >= {least} for a {self.problem_type}")
        if self.id2label is not None:
            names = tuple(self.id2label)
            if len(names) != self.num_labels or len(set(names)) != len(names):
                raise invalid("id2label", names, f"{self.num_labels} different names, one for each class")
            object.__setattr__(self, "id2label", names)
        if not 0 < self.target_scale < float("inf"):
            raise invalid("target_scale", self.target_scale, "a float > 0")
        if self.target_scale != 1.0 and self.problem_type != "regression":
            raise invalid("target_scale", self.target_scale, "1.0 except for a regression")


class MultiTaskHeads(nn.Module):
    r"""
    A sequence classifier with one head per task.

    All heads are rows of one matrix, so that a batch of mixed tasks takes one product, no loop over rows and no
    waiting for the device; each row then picks the outputs of its own task. Every head is in every graph, as DDP and
    ZeRO need it: one whose task is absent from a batch gets a gradient of zero, on which momentum and weight decay
    still act.

    The loss is the mean over the labelled rows, so a task weighs as many rows as it has in the batch (the sampler's
    business), of each row's loss in units of an uninformed guess, so that no task weighs more for the number or kind
    of its outputs (our choice): cross-entropy divided by log C_t, binary cross-entropy averaged over the C_t and
    divided by log 2, squared errors averaged over the C_t and divided by `target_scale` squared.

    Args:
        backbone ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model without head ([`~transformers.AutoModel`]), an encoder or a decoder, adapted by PEFT or not. One
            that takes `tasks=` gets them.
        heads (`Mapping[str, TaskHead]`):
            The head of each task, by name, in the order of the ids; those of the backbone where it knows tasks.
        pooling (`str`):
            What of a row is classified: `"cls"` (its first token; encoders such as BERT), `"mean"` (the mean over its
            tokens; sentence encoders) or `"last"` (its last token; decoders). Padding never counts, on either side.
        dropout (`float`, *optional*, defaults to `0.1`):
            Dropout before the heads, in [0, 1); as in BERT.

    Raises:
        `ValueError`: for heads that do not fit the backbone's tasks, or a wrong pooling or dropout.
        `NotImplementedError`: for an encoder-decoder.

    Example:

    ```python
    >>> from transformers import AutoModel
    >>> from hf_curriculum.multitask.heads import MultiTaskHeads, TaskHead

    >>> backbone = AutoModel.from_pretrained("bert-base-uncased")  # doctest: +SKIP
    >>> heads = {"topic": TaskHead(4), "tags": TaskHead(9, "multi_label_classification")}
    >>> model = MultiTaskHeads(backbone, heads, pooling="cls")  # doctest: +SKIP
    >>> model(input_ids=ids, attention_mask=mask, tasks=["topic", "tags"]).logits.shape  # doctest: +SKIP
    torch.Size([2, 9])
    ```
    """

    # Its mean is over the rows of a micro-batch: the Trainer must divide by the accumulation steps itself, and would
    # count labels as a causal model's.
    accepts_loss_kwargs = False

    def __init__(
        self, backbone: PreTrainedModel, heads: Mapping[str, TaskHead], *, pooling: str, dropout: float = 0.1
    ) -> None:
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
        known = model_tasks(backbone)
        if known is not None and known.names != tuple(heads):
            raise invalid("heads", list(heads), f"one for each task of the backbone, {list(known.names)}, in order")
        self.backbone = backbone
        self.config = backbone.config
        self.heads = dict(heads)
        self.pooling = pooling
        self._registry = TaskRegistry(list(heads))
        self._passes_tasks = takes_tasks(backbone)
        self.layout = HeadLayout([(head.num_labels, head.problem_type, head.target_scale) for head in heads.values()])
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(backbone.config.get_text_config().hidden_size, self.layout.num_outputs)
        # As transformers starts its classifiers.
        nn.init.normal_(self.classifier.weight, std=getattr(backbone.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)
        first = next(backbone.parameters())
        self.classifier.to(device=first.device, dtype=first.dtype if first.is_floating_point() else None)

    def registry(self) -> TaskRegistry:
        """The tasks: names and ids."""
        return self._registry

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        tasks: Tasks | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """
        Classifies rows, each by the head of its task.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`, int64, *optional*):
                Tokens; or `inputs_embeds` among the other inputs.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
                0 at padding. Without one, every position counts.
            token_type_ids (`torch.Tensor` of shape `(B, S)`, int64, *optional*):
                Passed on where given.
            labels (`torch.Tensor` of shape `(B,)` or `(B, K)`, *optional*):
                As [`encode_label`] makes them; -100 where a row has none.
            tasks (`str`, `int`, `Sequence` or `torch.Tensor`):
                Task of each row, or of all.
            **inputs:
                Passed on to the backbone.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: `logits` of shape `(B, C)`, the lowest finite
            number where a task has fewer outputs; `loss`, a scalar, with labels.

        Raises:
            `ValueError`: without tasks, or for unknown ones.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids, **inputs}
        given = {name: value for name, value in given.items() if value is not None}
        rows = input_ids if input_ids is not None else inputs["inputs_embeds"]
        if tasks is None:
            raise invalid("tasks", None, "the task of each row", f"Tasks: {', '.join(self._registry)}.")
        ids = self._registry.ids(tasks, batch_size=rows.shape[0]).to(rows.device)
        if ids.dim() == 2:
            raise unsupported(
                "A task per token with task heads", "rows of a flattened batch cannot be told apart", "Pad the batch."
            )
        if self._passes_tasks:
            given["tasks"] = ids
        hidden = self.backbone(**given).last_hidden_state  # [B, S, H]
        pooled = self.dropout(pool(hidden, attention_mask, self.pooling))
        logits = self.layout.pick(self.classifier(pooled.to(self.classifier.weight.dtype)), ids)
        loss = None
        if labels is not None:
            losses, weights = row_losses(logits, labels, ids, self.layout)
            scaled = losses / self.layout.guess_loss(ids, losses)
            # A batch without labels still needs a graph.
            loss = (scaled * weights).sum() / weights.sum().clamp(min=1)
        return SequenceClassifierOutput(loss=loss, logits=logits)

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
            `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B,)`, float32: losses, and 1 where there is a label.
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
            `ValueError`: for a class that the task does not have.
        """
        head = self.heads[self._registry.name(self._registry.id(task))]
        if label is None:
            values: list[float] = [IGNORED]
        elif head.problem_type == "regression":
            values = [float(number) for number in (label if isinstance(label, list | tuple) else [label])]
            if len(values) != head.num_labels:
                raise invalid("label", label, f"{head.num_labels} numbers")
        elif head.problem_type == "multi_label_classification":
            chosen = {_class_id(head, name) for name in label}
            values = [float(number in chosen) for number in range(head.num_labels)]
        else:
            values = [_class_id(head, label)]
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
            `list` of length B: a class (its name where there are names); a list of classes of probability above 1/2
            (multi-label); a list of C_t numbers (regression).
        """
        found: list[Any] = []
        for row, task in zip(logits.float().cpu(), self._registry.ids(tasks, len(logits)).tolist(), strict=True):
            head = self.heads[self._registry.name(task)]
            own = row[: head.num_labels]
            names: tuple[str | int, ...] = head.id2label or tuple(range(head.num_labels))
            if head.problem_type == "regression":
                found.append(own.tolist())
            elif head.problem_type == "multi_label_classification":
                found.append([names[number] for number, logit in enumerate(own.tolist()) if logit > 0])
            else:
                found.append(names[int(own.argmax())])
        return found

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Passed on to the backbone."""
        self.backbone.gradient_checkpointing_enable(*args, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """
        Writes the backbone (or its adapter), `task_heads.safetensors` and, last, `task_heads.json`.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
            **kwargs:
                Passed on to the backbone's `save_pretrained`.
        """
        target = Path(folder)
        self.backbone.save_pretrained(target, **kwargs)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.classifier.state_dict().items()}
        settings = {
            "pooling": self.pooling,
            "dropout": self.dropout.p,
            "heads": {name: asdict(head) for name, head in self.heads.items()},
        }
        write_atomic(target / WEIGHTS_NAME, lambda file: file.write(save(tensors)))
        write_atomic(target / CONFIG_NAME, lambda file: file.write(json.dumps(settings, indent=2).encode()))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], backbone: PreTrainedModel | None = None
    ) -> MultiTaskHeads:
        """
        Reads what [`save_pretrained`] wrote.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
            backbone ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
                The backbone with its weights. Needed where the folder holds an adapter alone; by default it is loaded
                from the folder.

        Returns:
            [`MultiTaskHeads`]: in evaluation mode.

        Raises:
            `ValueError`: if a file is missing or unreadable, or the weights do not fit.
        """
        source = Path(folder)
        expected = "a folder written by `MultiTaskHeads.save_pretrained`"
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (source / name).is_file():
                raise invalid("folder", f"{source}, which has no {name}", expected)
        if backbone is None:
            if not (source / "config.json").is_file():
                raise invalid("backbone", None, "the adapted model, since the folder holds an adapter alone")
            backbone = AutoModel.from_pretrained(source)
        try:
            settings = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
            heads = {name: TaskHead(**values) for name, values in settings["heads"].items()}
            model = cls(backbone, heads, pooling=settings["pooling"], dropout=settings["dropout"])
            model.classifier.load_state_dict(load_file(source / WEIGHTS_NAME))
        except (OSError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise invalid("folder", f"{source}, which cannot be read ({error})", expected) from error
        return model.eval()


def _class_id(head: TaskHead, label: Any) -> int:
    names = head.id2label or ()
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < head.num_labels:
        return label
    raise invalid("label", label, f"one of {', '.join(names)}" if names else f"a class in [0, {head.num_labels})")
