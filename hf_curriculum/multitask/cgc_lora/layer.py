"""A linear layer with the experts of any number of CGC-LoRA adapters around it."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.errors import invalid, unsupported
from .config import CGCLoraConfig
from .experts import CGCExperts
from .state import TaskState


__all__ = ["CGCLoraLayer"]


class CGCLoraLayer(nn.Module, BaseTunerLayer):
    """
    Adds the update of each row's task to the output of a linear layer.

    Computes in the dtype of the adapter and returns the dtype of the base layer, as PEFT's LoRA does. The base may be
    `nn.Linear`, transformers' `Conv1D`, or a linear that is quantised in a way that PEFT has a backend for
    (bitsandbytes 8 and 4 bit, HQQ, torchao; forward only for GPTQ, AWQ, AQLM, EETQ).

    Args:
        base_layer (`nn.Module`):
            The layer.
        adapter_name (`str`):
            First adapter.
        config ([`CGCLoraConfig`]):
            Its configuration.
        state ([`TaskState`]):
            Where the tasks of the batch are read, shared by all layers of the model.
        **kwargs:
            What PEFT's quantisation backends ask for.

    Raises:
        `NotImplementedError`: for a layer that is no linear.
    """

    # Containers keyed by adapter, which PEFT saves, loads, switches and deletes by these names.
    adapter_layer_names = ("cgc_lora_experts",)
    other_param_names = ("merged_tasks",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: CGCLoraConfig, *, state: TaskState, **kwargs: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.task_state = state
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        base = self.get_base_layer()
        _check_base_layer(base, self.quantization_backend)
        in_features, out_features = _get_in_out_features(base)
        assert in_features is not None
        assert out_features is not None
        self.in_features, self.out_features = in_features, out_features
        # `Conv1D` stores its weight as (in, out).
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.cgc_lora_experts = nn.ModuleDict()
        self.merged_tasks: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: CGCLoraConfig, **kwargs: Any) -> None:
        """
        Adds an adapter.

        Args:
            adapter_name (`str`):
                Its name.
            config ([`CGCLoraConfig`]):
                Its configuration.
            **kwargs:
                Ignored, as by PEFT's layers.

        Raises:
            `ValueError`: if `fan_in_fan_out` is set and the layer stores its weight as (out, in).
        """
        if config.fan_in_fan_out and not self.fan_in_fan_out:
            raise invalid("fan_in_fan_out", True, f"False for {type(self.get_base_layer()).__name__}")
        self.cgc_lora_experts[adapter_name] = CGCExperts(self.in_features, self.out_features, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Runs the layer.

        Args:
            x (`torch.Tensor` of shape `(rows, ..., d_in)`):
                Input.
            *args:
                Passed on to the base layer.
            **kwargs:
                Passed on to the base layer.

        Returns:
            `torch.Tensor` of shape `(rows, ..., d_out)`.

        Raises:
            `ValueError`: if no task is known for the batch, or its shape does not fit.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base(x, *args, **kwargs)
        result = self._base(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in self.active_adapters:
            if adapter not in self.cgc_lora_experts:
                continue
            experts = self.experts(adapter)
            current = self.task_state.current
            if current is None or adapter not in current:
                raise invalid(
                    "tasks",
                    "no task",
                    "a task for this forward pass",
                    "Pass `tasks=` to the model, or call `model.set_task(...)` before.",
                )
            result = result + experts(self._cast_input_dtype(x, experts.A.dtype), current[adapter])
        return result.to(dtype)

    def experts(self, adapter: str) -> CGCExperts:
        """
        Experts of one adapter.

        Args:
            adapter (`str`):
                Its name.

        Returns:
            [`CGCExperts`]
        """
        return cast(CGCExperts, self.cgc_lora_experts[adapter])

    def _base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return cast(torch.Tensor, self.base_layer(x, *args, **kwargs))

    def get_delta_weight(self, adapter: str, task_id: int | None = None) -> torch.Tensor:
        """
        The update of the weight for one task.

        Args:
            adapter (`str`):
                Name of the adapter.
            task_id (`int`, *optional*):
                In [-2, T). Left out, the task that is being merged or is merged.

        Returns:
            `torch.Tensor` in the shape of the base weight and the dtype of the adapter.

        Raises:
            `ValueError`: if no task is given or merged.
            `NotImplementedError`: if the gates depend on the token.
        """
        experts = self.experts(adapter)
        if task_id is None:
            task_id = self.merged_tasks.get(adapter, self.task_state.merging.get(adapter))
        if task_id is None:
            raise invalid("task", "no task", "the task to merge", "Call `model.merge_adapter(task=...)`.")
        down, up = experts.task_factors(task_id)
        delta = (up @ down).to(experts.A.dtype)
        return delta.T if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Adds the update of one task to the base weight; which one is set by [`CGCLoraModel.merge_adapter`].

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Work on a copy, and refuse weights that are not finite.
            adapter_names (`list[str]`, *optional*):
                Adapters to merge. The active ones by default.

        Raises:
            `ValueError`: if no task is set, or the merged weight is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.cgc_lora_experts:
                continue
            task_id = self.task_state.merging.get(adapter)
            delta = self.get_delta_weight(adapter, task_id)
            weight = self.get_base_weight()
            merged = weight.clone() if safe_merge else weight
            merged += delta.to(merged.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"The merged weights are not finite: the adapter {adapter} seems to be broken.")
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)
            self.merged_tasks[adapter] = self.task_state.merging[adapter]

    def unmerge(self) -> None:
        """Takes merged updates out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weight = self.get_base_weight()
            weight -= self.get_delta_weight(adapter).to(weight.dtype)
            self.set_base_weight(weight)
            del self.merged_tasks[adapter]

    def __repr__(self) -> str:
        return "cgc_lora." + super().__repr__()


def _check_base_layer(layer: nn.Module, backend: Any) -> None:
    if isinstance(layer, nn.Embedding):
        raise unsupported(
            "CGC-LoRA on an embedding",
            "its input are token ids, which no expert can project",
            "Leave it out of `target_modules`; `trainable_token_indices` or `modules_to_save` train an embedding.",
        )
    if getattr(layer, "_hf_tp_plan", None) is not None:
        raise unsupported(
            "CGC-LoRA on a tensor-parallel layer",
            "its experts would see a part of the input or of the output",
            "Use DDP, ZeRO or FSDP.",
        )
    if not isinstance(layer, nn.Linear | Conv1D) and getattr(backend, "layer_type", None) != "linear":
        raise unsupported(
            f"CGC-LoRA on {type(layer).__name__}",
            "it is no linear layer",
            "Name linear layers in `target_modules`, or `'all-linear'`.",
        )
