"""Settings that eat what freezing layers saves, read off a model and its training arguments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from accelerate.utils import str_to_bool
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..core.wrappers import unwrapped


__all__ = ["Eater", "input_gradient_hooks", "is_checkpointing", "is_reentrant", "saving_eaters"]

# Functions of transformers 5.23 (`enable_input_require_grads`) and PEFT 0.21 that they hook to embeddings.
_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


@dataclass(frozen=True)
class Eater:
    """
    A setting that eats a part of the saving.

    Args:
        name (`str`):
            What it is, as the user knows it.
        why (`str`):
            What it costs.
        fix (`str`):
            What to change, as a sentence.
    """

    name: str
    why: str
    fix: str


def input_gradient_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """
    Finds the hooks that make the output of embeddings require a gradient.

    transformers, PEFT and TRL each put one on for checkpointing, and `disable_input_require_grads()` takes off the
    last one only. To take one off, `module._forward_hooks.pop(key)`.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.

    Yields:
        `tuple[nn.Module, int]`: the module and the key of the hook in its `_forward_hooks`.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _HOOKS:
                yield module, key


def is_checkpointing(model: nn.Module, args: object) -> bool:
    """
    Whether activations are, or will be, checkpointed.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.
        args ([`~transformers.TrainingArguments`]):
            Those of the training.

    Returns:
        `bool`
    """
    asked = (getattr(args, name, None) for name in ("activation_checkpointing", "gradient_checkpointing"))
    return next(_checkpointed(model), None) is not None or any(asked)


def is_reentrant(model: nn.Module, args: object) -> bool:
    """
    Whether activations are, or will be, checkpointed in the reentrant way.

    It cannot do without the gradient of a block's input: the hook on the embeddings must stay.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.
        args ([`~transformers.TrainingArguments`]):
            Those of the training; of no matter once the model has checkpointing turned on.

    Returns:
        `bool`
    """
    options: Mapping[str, object] | None = None
    module = next(_checkpointed(model), None)
    if module is not None:
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    elif is_checkpointing(model, args):
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        given: Mapping[str, object] = next((value for name in names if (value := getattr(args, name, None))), {})
        # What the Trainer takes out before it hands the rest on; it asks for the other way if nothing is left.
        options = {key: value for key, value in given.items() if key not in ("every_n_layers", "offload")}
        options = options or {"use_reentrant": False}
    # torch's own default is the reentrant way.
    return options is not None and options.get("use_reentrant") is not False


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    return (
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) is True and hasattr(module, "_gradient_checkpointing_func")
    )


def saving_eaters(model: nn.Module, args: object, world: int) -> list[Eater]:
    """
    Finds the settings that eat what freezing layers saves.

    Args:
        model (`nn.Module`):
            The model that is trained, wrapped or not.
        args ([`~transformers.TrainingArguments`]):
            Those of the training.
        world (`int`):
            Processes.

    Returns:
        `list[Eater]`: what was found, the costliest first.
    """
    found = [_reentrant(model, args), _input_gradients(model, args), _compile(args), _unused(model, args, world)]
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        found.append(
            Eater(
                "Adapters",
                "their weight gradients cost next to nothing, so time is saved by depth alone, memory hardly at all",
                "Choose blocks near the top: `max_depth`, or `policy='last_n'`.",
            )
        )
    return [eater for eater in found if eater is not None]


def _reentrant(model: nn.Module, args: object) -> Eater | None:
    if not is_reentrant(model, args):
        return None
    return Eater(
        "Reentrant checkpointing",
        "back-propagation and recomputation run through all blocks, whichever learn",
        "Set `activation_checkpointing_kwargs={'use_reentrant': False}`"
        " (with PEFT under ZeRO-3, which needs it, take ZeRO-2).",
    )


def _input_gradients(model: nn.Module, args: object) -> Eater | None:
    if is_reentrant(model, args):
        return None
    is_hooked = next(input_gradient_hooks(model), None) is not None
    # The Trainer turns checkpointing on, and the hook with it, when training begins.
    inner = unwrapped(model)
    will_be = next(_checkpointed(model), None) is None and is_checkpointing(model, args)
    if not is_hooked and not (will_be and getattr(inner, "main_input_name", None) == "input_ids"):
        return None
    return Eater(
        "The hook that makes embeddings require a gradient",
        "put on by checkpointing, it has back-propagation run below the lowest block that learns",
        "`free_prefix=True` takes it off.",
    )


def _compile(args: object) -> Eater | None:
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    is_regional = str_to_bool(os.environ.get("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "no")) == 1
    if is_regional or not (getattr(args, "torch_compile", False) or backend.lower() != "no"):
        return None
    return Eater(
        "`torch_compile` of the whole model",
        "it compiles anew for every set of active blocks, and gives up after eight",
        "Compile block by block: set the environment variable `ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=1`.",
    )


def _unused(model: nn.Module, args: object, world: int) -> Eater | None:
    others = ("deepspeed", "deepspeed_plugin", "fsdp")
    if world < 2 or any(getattr(args, name, None) for name in others):
        return None
    wanted = getattr(args, "ddp_find_unused_parameters", None)
    if wanted is None:
        # As the Trainer of transformers 5.23 chooses it.
        wanted = not isinstance(unwrapped(model), PreTrainedModel) or not is_checkpointing(model, args)
    if not wanted:
        return None
    return Eater(
        "`ddp_find_unused_parameters`",
        "DDP walks the graph of every forward to look for what has no gradient",
        "Set `ddp_find_unused_parameters=False`.",
    )
