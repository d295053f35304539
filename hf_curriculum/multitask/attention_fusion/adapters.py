"""Plain LoRA adapters on their way into task models and out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ...core.console import say
from ...core.errors import invalid, unsupported
from ..head_files import find_head_files, read_head_files
from ..lora_files import is_transposed, target_modules_of
from ..passes import PassState
from ..task_head import TaskHead
from .base import is_read
from .config import check_lora_config
from .routing import TaskPass
from .task_loras import TaskLoras, linear_shape, lora_shape, task_lora_layers


__all__ = ["LoadedAdapter", "fit_adapter", "lora_config_of", "lora_factors", "put_adapter", "read_adapter"]

PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoadedAdapter:
    """
    A plain LoRA and what lies beside it.

    Args:
        source (`str`):
            Where it was read.
        config ([`~peft.LoraConfig`]):
            Its config.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            A (r, d_in) and B (d_out, r) by the name of the linear, as the adapter's base model names it.
        head (`dict[str, torch.Tensor]`, *optional*):
            `weight` (C_t, H) and `bias` (C_t,) of its task's head.
    """

    source: str
    config: LoraConfig
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    head: dict[str, torch.Tensor] | None = field(default=None, repr=False)


def read_adapter(
    source: str, task: str, head: TaskHead, base_name: str | None, pooling: str, **kwargs: Any
) -> LoadedAdapter:
    """
    Reads a plain LoRA, and the head that lies beside it.

    Args:
        source (`str`):
            A folder or Hub id.
        task (`str`):
            Name of the task that it is to be.
        head ([`TaskHead`]):
            What the task predicts.
        base_name (`str`, *optional*):
            Name of the base model that the adapter must be of; `None` for any.
        pooling (`str`):
            Of the model.
        **kwargs:
            Passed on to PEFT, such as `subfolder` and `revision`.

    Returns:
        [`LoadedAdapter`]

    Raises:
        `ValueError`: for an adapter of another method or base, or a head with other labels or pooling.
        `NotImplementedError`: for one that is more than a low-rank update of linears.
    """
    try:
        config = PeftConfig.from_pretrained(source, **kwargs)
        tensors = load_peft_weights(source, device="cpu", **kwargs)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise invalid("adapter", f"{source}, which cannot be read ({error})", "a LoRA that PEFT wrote") from error
    check_lora_config(config, f"adapter {source}")
    theirs = config.base_model_name_or_path
    if base_name and theirs and theirs != base_name:
        raise invalid(
            "adapter",
            f"{source}, of the base {theirs}",
            f"one of {base_name}",
            "Where both names mean the same weights, pass `check_base=False`.",
        )
    factors: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if part in ("A.weight", "B.weight"):
            factors.setdefault(name, {})[part[0]] = value
        else:
            others[key.removeprefix(PREFIX)] = value
    if not factors or any(len(pair) != 2 for pair in factors.values()):
        raise invalid("adapter", f"{source}, without both factors of its layers", "a LoRA that PEFT wrote")
    pairs = {name: (pair["A"], pair["B"]) for name, pair in factors.items()}
    beside = _head_beside(source, task, head, pooling, **kwargs)
    if beside is None:
        beside = _trained_head(source, others, head, pooling)
    return LoadedAdapter(source, config, pairs, beside)


def _head_beside(
    source: str, task: str, head: TaskHead, pooling: str, **kwargs: Any
) -> dict[str, torch.Tensor] | None:
    """The head that this package wrote beside an adapter."""
    folder = find_head_files(source, **kwargs)
    if folder is None:
        return None
    settings, tensors = read_head_files(folder)
    described = settings.get("heads", {})
    theirs = described.get(task) if len(described) != 1 else next(iter(described.values()))
    if theirs is None:
        raise invalid("adapter", f"{source}, with heads of {', '.join(described)}", f"a head of {task}")
    found, wanted = asdict(TaskHead(**theirs)), asdict(head)
    # Names may be left out on one side; weights in the loss and thresholds are the model's business.
    same = ["num_labels", "problem_type"]
    if found["id2label"] and wanted["id2label"]:
        same.append("id2label")
    if wrong := [name for name in same if found[name] != wanted[name]]:
        raise invalid(
            f"head of task {task}", f"{wrong[0]}={wanted[wrong[0]]!r}", f"{found[wrong[0]]!r}, as in {source}"
        )
    if settings.get("pooling") != pooling:
        raise invalid("pooling", pooling, f"{settings.get('pooling')!r}, as in {source}")
    start = 0
    for name, values in described.items():
        if values is theirs:
            break
        start += described[name]["num_labels"]
    return {name: value[start : start + head.num_labels] for name, value in tensors.items()}


def _trained_head(
    source: str, others: Mapping[str, torch.Tensor], head: TaskHead, pooling: str
) -> dict[str, torch.Tensor] | None:
    """The head among the modules that PEFT trained in full; that of decoders alone reads what ours reads."""
    heads = {"score", "classifier"}
    if wrong := sorted({name.rpartition(".")[0] for name in others if not heads & set(name.split("."))}):
        raise unsupported(
            f"Adapter {source} with trained modules beside its LoRA ({', '.join(wrong)})",
            "tasks share all of the base but their LoRAs",
            "Train it as a plain LoRA.",
        )
    weight = next((value for name, value in others.items() if name.endswith("score.weight")), None)
    if weight is None or pooling != "last":
        if others:
            say(f"The head in {source} is not taken over: it reads other things than pooled hidden states do.")
        return None
    if len(weight) != head.num_labels:
        raise invalid("num_labels", head.num_labels, f"{len(weight)}, the outputs of the head in {source}")
    return {"weight": weight, "bias": weight.new_zeros(len(weight))}


def fit_adapter(base: PreTrainedModel, loaded: LoadedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """
    Finds the places of a LoRA in a base.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base, with the LoRAs of all tasks.
        loaded ([`LoadedAdapter`]):
            The LoRA.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor, float]]`: A, B and s by the name of the linear in this base.
        Without parts that its last hidden states do not depend on.

    Raises:
        `ValueError`: for layers that the base lacks, or that have another shape there.
        `NotImplementedError`: for layers that are no linears.
    """
    modules = dict(base.named_modules())
    places = {}
    for name, (down, up) in loaded.factors.items():
        place = next((known for known in _names_in(base, name) if known in modules), None)
        if place is None:
            raise invalid("adapter", f"{loaded.source}, which adapts {name}", "layers that the base model has")
        inputs, outputs = linear_shape(modules[place])
        if (outputs, len(down), inputs) != (len(up), up.shape[1], down.shape[1]):
            raise invalid(
                "adapter",
                f"{loaded.source}, with factors of shape {tuple(down.shape)} and {tuple(up.shape)} for {place}",
                f"(r, {inputs}) and ({outputs}, r)",
                "It is of another base model.",
            )
        if is_read(place):
            places[place] = (down, up, lora_shape(loaded.config, name)[1])
    if not places:
        raise invalid("adapter", loaded.source, "one of layers that the last hidden states depend on")
    return places


def put_adapter(
    base: PreTrainedModel, task: int, loaded: LoadedAdapter, state: PassState[TaskPass], num_tasks: int
) -> None:
    """
    Puts a LoRA in a task's place; of another LoRA that stood there nothing is left.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base with the LoRAs of all tasks. Linears that none of them adapts yet are wrapped.
        task (`int`):
            In [0, T).
        loaded ([`LoadedAdapter`]):
            The LoRA.
        state ([`~hf_curriculum.multitask.passes.PassState`]):
            What the layers read.
        num_tasks (`int`):
            T.

    Raises:
        `ValueError`, `NotImplementedError`: as in [`fit_adapter`]. Nothing is changed then.
    """
    places = fit_adapter(base, loaded)
    for _, layer in task_lora_layers(base):
        layer.clear(task)
    modules = dict(base.named_modules())
    for place, (down, up, scaling) in places.items():
        layer = modules[place]
        if not isinstance(layer, TaskLoras):
            layer = TaskLoras(layer, state, num_tasks, len(down))
            base.set_submodule(place, layer)
        layer.put(task, down, up, scaling)


def _names_in(base: PreTrainedModel, name: str) -> list[str]:
    """Names that a layer may have in the base: an adapter trained under a head knows it by a longer one."""
    short = name.removeprefix(f"{base.base_model_prefix}.") if base.base_model_prefix else name
    return [name, short, name.partition(".")[2]]


def lora_factors(
    base: PreTrainedModel, task: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    A task's LoRA, without the zeros that fill it up.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base with the LoRAs of all tasks.
        task (`int`):
            In [0, T).
        tensors (`Mapping[str, torch.Tensor]`):
            Weights of the base by name.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: A (r, d_in) and B (d_out, r) by the name of the linear.
    """
    factors = {}
    for name, layer in task_lora_layers(base):
        if rank := layer.ranks[task]:
            factors[name] = tensors[f"{name}.lora_A"][task, :rank], tensors[f"{name}.lora_B"][task, :, :rank]
    return factors


def lora_config_of(base: PreTrainedModel, task: int) -> LoraConfig:
    """
    The config of a task's LoRA, for stock PEFT over the base as it was.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base with the LoRAs of all tasks.
        task (`int`):
            In [0, T).

    Returns:
        [`~peft.LoraConfig`]: with the rank and the scale of most layers, and patterns for the others.
    """
    layers = {name: layer for name, layer in task_lora_layers(base) if layer.ranks[task]}
    ranks = {name: layer.ranks[task] for name, layer in layers.items()}
    # The scale is alpha / r; kept as it was given, in float64.
    alphas = {name: layer.scalings[task] * layer.ranks[task] for name, layer in layers.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    first = next(iter(layers.values()))
    return LoraConfig(
        r=rank,
        # PEFT says `int`, and takes what it divides by the rank.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        lora_dropout=first.dropout.p,
        target_modules=target_modules_of(base, list(layers)),
        fan_in_fan_out=is_transposed([layer.base_layer for layer in layers.values()]),
        base_model_name_or_path=base.config._name_or_path or None,
        inference_mode=True,
    )
