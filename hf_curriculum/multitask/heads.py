"""
One classification or regression head per task over one backbone.

Shapes: B rows, S positions, H hidden size, T tasks, C_t outputs of task t, C the largest C_t, K columns of labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..core.errors import invalid, unsupported
from .absent import TaskBlocks, task_owners
from .aware import model_tasks, takes_tasks
from .head_files import EXPECTED, load_backbone, read_head_files, write_head_files
from .head_math import POOLINGS, HeadLayout, pool, row_losses
from .task_head import IGNORED, PROBLEM_TYPES, TaskHead, label_values, prediction
from .tasks import TaskRegistry, Tasks


__all__ = ["MultiTaskHeads"]


class MultiTaskHeads(nn.Module):
    r"""
    A sequence classifier with one head per task.

    All heads are rows of one matrix, so that a batch of mixed tasks takes one product, no loop over rows and no
    waiting for the device; each row then picks the outputs of its own task. Every head is in every graph, as DDP and
    ZeRO need it: one whose task is absent from a batch gets a gradient of zero, and
    [`~hf_curriculum.multitask.absent.freeze_absent_tasks`], which the trainers of this package call, keeps momentum
    and weight decay from moving it.

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
    >>> from hf_curriculum.multitask.heads import MultiTaskHeads
    >>> from hf_curriculum.multitask.task_head import TaskHead

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
        self,
        backbone: PreTrainedModel | PeftModel,
        heads: Mapping[str, TaskHead],
        *,
        pooling: str,
        dropout: float = 0.1,
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
        # Not in 16 bits, in which small updates round to nothing; PEFT keeps its adapters in float32 likewise.
        dtype = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else torch.float32
        self.classifier.to(device=first.device, dtype=dtype)

    def registry(self) -> TaskRegistry:
        """The tasks: names and ids."""
        return self._registry

    def task_blocks(self) -> tuple[int, list[TaskBlocks]]:
        """T, and the rows of the heads that belong to single tasks: all."""
        owners = task_owners([head.num_labels for head in self.heads.values()], len(self.heads))
        return len(self.heads), [TaskBlocks(parameter, owners) for parameter in self.classifier.parameters()]

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
                Task of each row, or of all. May be left out where there is one head.
            **inputs:
                Passed on to the backbone.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: `logits` of shape `(B, C)`, the lowest finite
            number where a task has fewer outputs; `loss`, a scalar, with labels.

        Raises:
            `ValueError`: without tasks, or for unknown or reserved ones (`"common"`, `"uniform"`).
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids, **inputs}
        given = {name: value for name, value in given.items() if value is not None}
        rows = input_ids if input_ids is not None else inputs["inputs_embeds"]
        if tasks is None and len(self.heads) == 1:
            tasks = 0
        if tasks is None:
            raise invalid("tasks", None, "the task of each row", f"Tasks: {', '.join(self._registry)}.")
        ids = self._registry.ids(tasks, batch_size=rows.shape[0])
        # Where this costs no waiting for a device; trainers look at all rows before training.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and (ids < 0).any():
            one_of = f"one of {', '.join(self._registry)}"
            raise invalid("tasks", "common or uniform", one_of, "Heads are of one task.")
        ids = ids.to(rows.device)
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
            `list` of length B: a class (its name where there are names); a list of classes of probability above 1/2
            (multi-label); a list of C_t numbers (regression).
        """
        ids = self._registry.ids(tasks, len(logits)).tolist()
        rows = logits.float().cpu()
        return [prediction(self.heads[self._registry.name(task)], row) for row, task in zip(rows, ids, strict=True)]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Passed on to the backbone."""
        self.backbone.gradient_checkpointing_enable(*args, **kwargs)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Writes the backbone (or its adapter), `task_heads.safetensors` and, last, `task_heads.json`.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*):
                The weights of this model by name, where its parameters do not hold them whole (ZeRO-3).
            is_main_process (`bool`, *optional*, defaults to `True`):
                Whether this process writes.
            **kwargs:
                Passed on to the backbone's `save_pretrained`.
        """
        if state_dict is not None:
            kwargs["state_dict"] = _below("backbone.", state_dict)
        self.backbone.save_pretrained(str(folder), is_main_process=is_main_process, **kwargs)
        if is_main_process:
            tensors = self.classifier.state_dict() if state_dict is None else _below("classifier.", state_dict)
            write_head_files(folder, self._settings(self.heads), tensors)

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
        start = sum(head.num_labels for head in list(self.heads.values())[: self._registry.id(task)])
        own = slice(start, start + self.heads[task].num_labels)
        tensors = {name: value[own] for name, value in self.classifier.state_dict().items()}
        write_head_files(folder, self._settings({task: self.heads[task]}), tensors)

    def _settings(self, heads: Mapping[str, TaskHead]) -> dict[str, Any]:
        described = {name: asdict(head) for name, head in heads.items()}
        return {"pooling": self.pooling, "dropout": self.dropout.p, "heads": described}

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
        ours: dict[str, Any] = json.loads(json.dumps(self._settings(self.heads)))["heads"]
        theirs = settings.get("heads")
        if theirs != ours or list(theirs) != list(ours):
            raise invalid("folder", f"{folder}, with other heads than the model", f"heads {list(self.heads)} as here")
        try:
            self.classifier.load_state_dict(tensors)
        except RuntimeError as error:
            raise invalid("folder", f"{folder}, which cannot be read ({error})", EXPECTED) from error

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], backbone: PreTrainedModel | PeftModel | None = None
    ) -> MultiTaskHeads:
        """
        Reads what [`save_pretrained`], a trainer, or [`~hf_curriculum.export_task_adapters`] wrote for one task.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
            backbone ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
                The backbone with its weights. By default it is loaded from the folder; where that holds an adapter
                alone, over the base model that the adapter names.

        Returns:
            [`MultiTaskHeads`]: in evaluation mode.

        Raises:
            `ValueError`: if a file is missing or unreadable, the weights do not fit, or no base model is named.

        Example:

        ```python
        >>> from hf_curriculum.multitask.heads import MultiTaskHeads

        >>> model = MultiTaskHeads.from_pretrained("export/topic")  # doctest: +SKIP
        >>> model.decode(model(input_ids=ids, attention_mask=mask).logits, "topic")  # doctest: +SKIP
        ['sport', 'art']
        ```
        """
        settings, tensors = read_head_files(folder)
        if backbone is None:
            backbone = load_backbone(folder)
        try:
            heads = {name: TaskHead(**values) for name, values in settings["heads"].items()}
            model = cls(backbone, heads, pooling=settings["pooling"], dropout=settings["dropout"])
            model.classifier.load_state_dict(tensors)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise invalid("folder", f"{folder}, which cannot be read ({error})", EXPECTED) from error
        return model.eval()


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
