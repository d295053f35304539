"""Checks on the tensors of an adapter file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...core.errors import invalid
from .layer import CGCLoraLayer
from .registration import PREFIX


__all__ = ["check_adapter_tensors"]

# What torch calls the state of a module beside its tensors: here the names of the tasks, compared when it is loaded.
_EXTRA_STATE = "_extra_state"


def check_adapter_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Checks that a file holds the tensors of an adapter, all of them, in their shapes.

    PEFT only warns of missing tensors, and the layer would go on with its random ones.

    Args:
        model (`nn.Module`):
            The model with the adapter injected.
        adapter_name (`str`):
            Name of the adapter.
        tensors (`Mapping[str, torch.Tensor]`):
            By the names that the model's state has.

    Raises:
        `ValueError`: if one is missing, unknown, or has another shape.
    """
    expected: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, CGCLoraLayer) and adapter_name in module.cgc_lora_experts:
            parameters = module.cgc_lora_experts[adapter_name].named_parameters()
            expected |= {f"{name}.{PREFIX}experts.{adapter_name}.{key}": value for key, value in parameters}
    found = {key: value for key, value in tensors.items() if f".{PREFIX}" in key and not key.endswith(_EXTRA_STATE)}
    fix = "The file and its `adapter_config.json`, or the base model, do not belong together."
    if missing := sorted(set(expected) - set(found)):
        raise invalid("adapter file", f"no tensor {missing[0]} ({len(missing)} missing)", "one for each expert", fix)
    if unknown := sorted(set(found) - set(expected)):
        raise invalid("adapter file", f"{unknown[0]} ({len(unknown)} unknown)", "tensors that the model has", fix)
    for key, parameter in expected.items():
        # Under ZeRO-3 a parameter is empty between its uses and keeps its shape beside.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(found[key].shape) != shape:
            raise invalid("adapter file", f"{key} of shape {tuple(found[key].shape)}", f"shape {shape}", fix)
