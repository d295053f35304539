"""Models that know their tasks."""

import inspect
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import DistributedType
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_utils import unwrap_peft_model

from ..core.errors import invalid, unsupported
from .absent import AbsentTaskGuard, freeze_absent_tasks, modules_with_task_blocks
from .tasks import TaskRegistry


__all__ = [
    "TaskAware",
    "gate_tables",
    "hold_absent_tasks",
    "ignore_tasks",
    "model_tasks",
    "moves_absent_tasks",
    "takes_tasks",
]


@runtime_checkable
class TaskAware(Protocol):
    """A model, or a part or config of one, that knows its tasks; a model also takes `tasks=` in its forward."""

    def registry(self) -> TaskRegistry:
        """The tasks."""


@runtime_checkable
class Gated(Protocol):
    """A tuner with gates, as CGC-LoRA has them."""

    def gate_table(self) -> dict[str, torch.Tensor]:
        """Gates by the name of the layer, `(T, E)` each."""

    def adapter_config(self) -> Any:
        """Config of the active adapter, with `num_common_experts`."""


def moves_absent_tasks(model: nn.Module, backend: DistributedType, wanted: bool | None) -> str | None:
    """
    What to tell a user whose optimizer will move tasks that a step has no row of.

    Args:
        model (`nn.Module`):
            The model, not wrapped for several processes.
        backend ([`~accelerate.DistributedType`]):
            Of the run.
        wanted (`bool`, *optional*):
            Whether the user wants them held; None where it is possible.

    Returns:
        `str`, *optional*: None where they are held, where there are none, and where the user wants them moved.

    Raises:
        `ValueError`: if they should be held in a model without parameters of single tasks.
        `NotImplementedError`: if they should be held and the backend does not allow it.
    """
    if not modules_with_task_blocks(model):
        if wanted:
            raise invalid(
                "multitask.hold_absent_tasks", True, "None for a model without experts or heads of single tasks"
            )
        return None
    if wanted is False or backend not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return None
    name = "DeepSpeed" if backend is DistributedType.DEEPSPEED else "FSDP"
    why = "its optimizer holds flattened or sharded copies, in which no task has rows of its own"
    if wanted:
        raise unsupported(
            f"`multitask.hold_absent_tasks` under {name}", why, "Use DDP, or leave it unset and keep tasks mixed."
        )
    return (
        f"Under {name}, momentum and weight decay also move the experts and heads of tasks that a step has no row of: "
        f"{why}. With tasks mixed in every batch that is next to nothing; with `weight_decay=0` momentum alone is "
        "left, and a task that has had no row yet stays at its start."
    )


def hold_absent_tasks(optimizer: Optimizer, model: nn.Module, wanted: bool | None) -> AbsentTaskGuard | None:
    """
    Has an optimizer leave tasks alone that a step has no row of.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer.
        model (`nn.Module`):
            The model, not wrapped for several processes.
        wanted (`bool`, *optional*):
            None: with a word in place of an error for an optimizer whose state does not allow it.

    Returns:
        [`~hf_curriculum.multitask.absent.AbsentTaskGuard`], *optional*: None for a model without parameters of single
        tasks.
    """
    if not modules_with_task_blocks(model):
        return None
    return freeze_absent_tasks(optimizer, model, strict=bool(wanted))


def model_tasks(model: object, peft_config: object = None) -> TaskRegistry | None:
    """
    Tasks that a model was made for.

    Args:
        model (`object`):
            A model, or the name of one.
        peft_config (`object`, *optional*):
            Config of an adapter that it will get.

    Returns:
        [`TaskRegistry`], *optional*: of the adapter's config, the active adapter, or the model; None for a model that
        knows no tasks.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else None
    for known in (peft_config, tuner, model):
        if isinstance(known, TaskAware):
            return known.registry()
    return None


def takes_tasks(model: nn.Module) -> bool:
    """
    Whether a model's forward takes `tasks=`.

    Args:
        model (`nn.Module`):
            The model, not wrapped for several processes.

    Returns:
        `bool`: True for a model that knows its tasks, or whose forward names the argument.
    """
    return model_tasks(model) is not None or "tasks" in inspect.signature(unwrap_peft_model(model).forward).parameters


def ignore_tasks(model: nn.Module) -> None:
    """
    Lets a model that does not know tasks be called with `tasks=`, which then has no effect.

    The keyword is taken out before the forward of the model, of the base model under an adapter, and of its backbone,
    which losses that do without logits call directly.

    Args:
        model (`nn.Module`):
            The model, not wrapped for several processes.
    """

    def drop(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "tasks"}

    base = unwrap_peft_model(model)
    entries = [model, base, getattr(base, "base_model", None)]
    for module in {id(entry): entry for entry in entries if isinstance(entry, nn.Module)}.values():
        module.register_forward_pre_hook(drop, with_kwargs=True)


def gate_tables(model: nn.Module) -> dict[str, Any] | None:
    """
    Gates of all layers, for the run record.

    Args:
        model (`nn.Module`):
            The model, not wrapped for several processes.

    Returns:
        `dict[str, Any]`, *optional*: `layers`, by the name of each adapted layer the gates of each task, and
        `common_experts`, which come first in them; None for a model without gates that depend on the task alone, and
        where each process holds a part of them (ZeRO-3).
    """
    for module in model.modules():
        if isinstance(module, Gated) and isinstance(module, nn.Module):
            config = getattr(module, "peft_config", {})
            by_token = any(getattr(adapter, "gate", None) == "token" for adapter in config.values())
            partitioned = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
            if by_token or partitioned:
                return None
            layers = {name: table.tolist() for name, table in module.gate_table().items()}
            return {"layers": layers, "common_experts": module.adapter_config().num_common_experts}
    return None
