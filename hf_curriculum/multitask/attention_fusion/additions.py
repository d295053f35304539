"""Tasks that come from elsewhere, or later than the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PretrainedConfig

from ...core.errors import invalid
from ..task_head import TaskHead
from .adapters import LoadedAdapter, fit_adapter, put_adapter, read_adapter
from .config import AttentionFusionConfig
from .task_loras import lora_shape, task_lora_layers


if TYPE_CHECKING:
    from .model import AttentionFusionModel

__all__ = ["TaskAdditions"]


class TaskAdditions:
    """The part of an [`AttentionFusionModel`] that takes in tasks."""

    def load_task(
        self, task: str, source: str | os.PathLike[str], *, check_base: bool = True, **kwargs: Any
    ) -> LoadedAdapter:
        """
        Takes over a plain LoRA as a task's, and the head that lies beside it.

        Args:
            task (`str`):
                Name of the task.
            source (`str` or `os.PathLike`):
                A folder or Hub id with a LoRA that PEFT wrote: trained with PEFT alone, exported by
                [`~hf_curriculum.export_task_adapters`], or saved by such a model.
            check_base (`bool`, *optional*, defaults to `True`):
                Whether the adapter must name the base of this model. Shapes must fit in any case.
            **kwargs:
                Passed on to PEFT, such as `subfolder` and `revision`.

        Returns:
            [`LoadedAdapter`]: what was taken over.

        Raises:
            `ValueError`: for an unknown task, an adapter of another base, or a head with other labels.
            `NotImplementedError`: for an adapter that is more than a low-rank update of linears.
        """
        model = cast("AttentionFusionModel", self)
        if task not in model.heads:
            raise invalid("task", task, f"one of {', '.join(model.heads)}")
        base_name = model.config._name_or_path if check_base else None
        loaded = read_adapter(str(source), task, model.heads[task], base_name, model.pooling, **kwargs)
        self._put(task, loaded)
        return loaded

    def _put(self, task: str, loaded: LoadedAdapter) -> None:
        model = cast("AttentionFusionModel", self)
        put_adapter(model.backbone, model.registry().id(task), loaded, model.pass_state, len(model.heads))
        if loaded.head is not None:
            self.put_head(model.own_classifier, task, loaded.head)
            self.put_head(model.classifier, task, loaded.head)
        model.add_fusion()
        model.share_start()
        model.apply_stage()

    @torch.no_grad()
    def put_head(self, classifier: nn.Linear, task: str, head: Mapping[str, torch.Tensor]) -> None:
        """
        Sets the head of one task.

        Args:
            classifier (`nn.Linear`):
                `own_classifier`, or `classifier` for fused outputs.
            task (`str`):
                Name of the task.
            head (`Mapping[str, torch.Tensor]`):
                `weight` of shape `(C_t, H)` and `bias` of shape `(C_t,)`.

        Raises:
            `ValueError`: for another shape.
        """
        model = cast("AttentionFusionModel", self)
        own = model.head_rows(task)
        for name, parameter in classifier.named_parameters():
            if head[name].shape != parameter[own].shape:
                raise invalid(
                    f"{name} of the head of {task}",
                    f"the shape {tuple(head[name].shape)}",
                    f"{tuple(parameter[own].shape)}",
                )
            parameter[own] = head[name].to(parameter)

    @torch.no_grad()
    def add_task(self, name: str, head: TaskHead, adapter: str | os.PathLike[str] | None = None) -> None:
        """
        Adds a task behind the others, whose models and outputs stay as they are; before the Trainer is made.

        Train its model in stage `"tasks"` on its rows alone. It may listen to all; the others listen to it from
        [`let_all_listen`] on. Their outputs move when the fusion is trained again, on whatever rows. What tasks have
        listened to is to be measured anew for `predict(top_k=...)`.

        Args:
            name (`str`):
                Name of the task.
            head ([`~hf_curriculum.multitask.task_head.TaskHead`]):
                What it predicts.
            adapter (`str` or `os.PathLike`, *optional*):
                A plain LoRA to take over, as in [`load_task`]. By default a new one is made.

        Raises:
            `ValueError`: for a name that is taken or unsafe, and as in [`load_task`].
        """
        model = cast("AttentionFusionModel", self)
        if not isinstance(head, TaskHead):
            raise invalid("head", head, "a `TaskHead`")
        heads = {**model.heads, name: head} if name not in model.heads else {}
        if not heads:
            raise invalid("name", name, "the name of a new task", f"Tasks: {', '.join(model.heads)}.")
        config, loaded = model.fusion_config, None
        if adapter is not None:
            # Before anything has changed.
            loaded = read_adapter(str(adapter), name, head, model.config._name_or_path, model.pooling)
            fit_adapter(model.backbone, loaded)
        grown = AttentionFusionConfig(
            heads=heads, level=config.level, lora=config.lora, pooling=config.pooling, fusion_dim=config.fusion_dim,
            num_attention_heads=config.num_attention_heads, dropout=config.dropout,
        )  # fmt: skip
        fused, own = (_grown(part, head.num_labels, model.config) for part in (model.classifier, model.own_classifier))
        model.set_heads(heads)
        model.classifier, model.own_classifier = fused, own
        model.fusion_config, grown.heads = grown, model.heads
        assert grown.lora is not None
        for place, layer in task_lora_layers(model.backbone):
            layer.grow()
            if check_target_module_exists(grown.lora, place):
                layer.start(len(heads) - 1, *lora_shape(grown.lora, place), grown.lora.init_lora_weights == "gaussian")
        if model.fusion is not None:
            model.fusion.grow()
        count = len(heads)
        sees = torch.ones(count, count, dtype=torch.bool, device=model.sees.device)
        sees[:-1, :-1] = model.sees
        sees[:-1, -1] = False
        unknown = torch.full((count, count), torch.nan, device=model.sees.device)
        model.set_tables(sees, unknown)
        model.apply_stage()
        if loaded is not None:
            self._put(name, loaded)

    def let_all_listen(self) -> None:
        """Has every task listen to every other from now on, also to those that were added later."""
        model = cast("AttentionFusionModel", self)
        model.set_tables(torch.ones_like(model.sees), model.mean_attention)


def _grown(classifier: nn.Linear, places: int, config: PretrainedConfig) -> nn.Linear:
    """The classifier with more outputs behind the others."""
    weight, bias = classifier.weight.detach(), classifier.bias.detach()
    rows, width = weight.shape
    grown = nn.Linear(width, rows + places).to(weight)
    nn.init.normal_(grown.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(grown.bias)
    grown.weight[:rows], grown.bias[:rows] = weight, bias
    return grown
