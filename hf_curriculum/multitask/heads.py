"""
One classification or regression head per task over one backbone.

Shapes: B rows, S positions, H hidden size, T tasks, C_t outputs of task t, C the largest C_t, K columns of labels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..core.errors import invalid
from .aware import model_tasks, takes_tasks
from .classifier import TaskClassifier
from .head_files import EXPECTED, load_backbone, read_head_files, tensors_below
from .head_math import pool
from .task_head import TaskHead
from .tasks import Tasks


__all__ = ["MultiTaskHeads"]


class MultiTaskHeads(TaskClassifier):
    r"""
    A sequence classifier with one head per task. See [`TaskClassifier`] for the heads and their loss.

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

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        heads: Mapping[str, TaskHead],
        *,
        pooling: str,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(backbone, heads, pooling=pooling, dropout=dropout)
        known = model_tasks(backbone)
        if known is not None and known.names != tuple(heads):
            raise invalid("heads", list(heads), f"one for each task of the backbone, {list(known.names)}, in order")
        self._passes_tasks = takes_tasks(backbone)

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
        ids = self.row_tasks(tasks, rows)
        if self._passes_tasks:
            given["tasks"] = ids
        hidden = self.backbone(**given).last_hidden_state  # [B, S, H]
        answer = self.answer(pool(hidden, attention_mask, self.pooling), ids, labels)
        return SequenceClassifierOutput(loss=answer["loss"], logits=answer["logits"])

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Passed on to the backbone."""
        self.backbone.activation_checkpointing_enable(*args, **kwargs)

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
            kwargs["state_dict"] = tensors_below("backbone.", state_dict)
        self.backbone.save_pretrained(str(folder), is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.save_heads(folder, state_dict)

    def load_weights(self, folder: str | os.PathLike[str]) -> Any:
        """
        Reads the heads, not the backbone, of a checkpoint into this model.

        Args:
            folder (`str` or `os.PathLike`):
                A folder that [`save_pretrained`] wrote from heads like these.

        Returns:
            The backbone, whose weights are the Trainer's to read.

        Raises:
            `ValueError`: as in [`load_heads`].
        """
        self.load_heads(folder)
        return self.backbone

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
