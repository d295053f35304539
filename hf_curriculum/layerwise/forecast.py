"""What a user is told before the first step: the blocks, the predicted cost, and what eats the saving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..core.console import say
from ..core.parameters import parameters_by_name
from .cost import Memory, memory_by_kind, show_cost
from .savings import input_gradient_hooks, is_checkpointing, saving_eaters
from .towers import num_elements


if TYPE_CHECKING:
    from .run import LayerwiseRun

__all__ = ["tell_cost"]


def tell_cost(run: LayerwiseRun, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    """
    Shows, on the main process, what was found and what it will cost.

    Args:
        run ([`~hf_curriculum.layerwise.run.LayerwiseRun`]):
            With its first window open.
        model (`nn.Module`):
            The model that is trained.
        args ([`~transformers.TrainingArguments`]):
            Those of the training.
        state ([`~transformers.TrainerState`]):
            That of the training.
    """
    assert run.window is not None
    blocks = run.blocks
    active: Sequence[int] | int = run.window.active
    if run.window.end_step is not None:
        active = max(1, round(run.budget * len(blocks.blocks) / blocks.num_parameters))
    show_cost(
        blocks,
        active,
        checkpointing=is_checkpointing(model, args),
        input_gradients=next(input_gradient_hooks(model), None) is not None,
        allowed=run.allowed,
        eaters=saving_eaters(model, args, AcceleratorState().num_processes),
        memory=_memory(run, model),
    )
    if state.global_step == 0 and run.warmup_steps > 1:
        all_of_it = "" if run.warmup_steps < state.max_steps else f", which is all of a run of {state.max_steps}"
        say(f"Each block learns in turn for the first {run.warmup_steps} steps, to be measured{all_of_it}.")
    if run.policy.signal == "gradient_norm":
        say("In the last step of each interval every block has a gradient, and the memory for it is needed.")


def _memory(run: LayerwiseRun, model: nn.Module) -> list[Memory]:
    assert run.window is not None
    blocks, accelerator, named = run.blocks, AcceleratorState(), parameters_by_name(model)
    always, frozen = (num_elements(named[name] for name in names) for names in (blocks.always, blocks.frozen))
    zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    sharded = accelerator.distributed_type == DistributedType.FSDP
    return memory_by_kind(
        num_elements(named.values()),
        blocks.num_parameters + always + frozen,
        always + int(blocks.share(run.window.active) * blocks.num_parameters),
        regime="zero" if zero else "sharded" if sharded else "plain",
        weight_bytes=next(iter(named.values())).element_size(),
        world=accelerator.num_processes,
        stage=(accelerator.deepspeed_plugin.zero_stage or 1) if zero else 2,
    )
