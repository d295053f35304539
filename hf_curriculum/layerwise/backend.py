"""What is refused of a backend before the first step: that it would stop later, or go wrong without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from ..core.errors import invalid, unsupported
from .optimizer import BLOCK_KEY, base_optimizer


if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel
    from transformers import TrainingArguments

__all__ = ["check_backend"]


def check_backend(
    args: TrainingArguments, optimizer: Any, *, adapters: bool, ddp: DistributedDataParallel | None = None
) -> None:
    """
    Refuses what layer freezing cannot be right with.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's.
        optimizer (`torch.optim.Optimizer` or a wrapper):
            The trainer's.
        adapters (`bool`):
            Whether adapters are what learns.
        ddp (`DistributedDataParallel`, *optional*):
            The wrapper that trains the model.

    Raises:
        `ValueError`: under DeepSpeed, if the optimizer has no groups per block.
        `NotImplementedError`: for an optimizer that sets its learning rate by itself, for `static_graph` of DDP with
            gradient accumulation, and for checkpoints in the middle
            of a step where they hold only the adapters that require a gradient.
    """
    backend = AcceleratorState().distributed_type
    if backend == DistributedType.DEEPSPEED and not all(
        BLOCK_KEY in group for group in base_optimizer(optimizer).param_groups
    ):
        raise invalid(
            "callbacks",
            "a `LayerFreezeCallback` under DeepSpeed that is not attached",
            "an optimizer with groups per block, made before the engine",
            "Add the line `callback.attach(trainer)` before `trainer.train()`.",
        )
    if any(group.get("relative_step") for group in base_optimizer(optimizer).param_groups):
        raise unsupported(
            f"Freezing with {type(base_optimizer(optimizer)).__name__}(relative_step=True)",
            "the learning rate is in none of its groups, and ramps and change rates need it",
            "Set `relative_step=False` and a learning rate, as `optim='adafactor'` does.",
        )
    if ddp is not None and ddp.static_graph and args.gradient_accumulation_steps > 1:
        raise unsupported(
            f"`ddp_static_graph` with gradient_accumulation_steps={args.gradient_accumulation_steps}",
            "DDP stops at a micro-batch whose gradients are not reduced yet, with nothing frozen too (torch 2.13)",
            "Set `ddp_static_graph=False`, or train without gradient accumulation.",
        )
    if adapters and args.enable_jit_checkpoint and backend in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise unsupported(
            f"Freezing adapters with `enable_jit_checkpoint` under {backend.value}",
            "it saves in the middle of a step, and a checkpoint lacks the adapters that are frozen then",
            "Set `save_steps` instead: between two steps all adapters are saved.",
        )
