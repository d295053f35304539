"""
The LoRAs of all tasks around one linear layer, side by side.

Shapes: B rows, S positions, T tasks, K blocks of rows, I inputs and D outputs of the linear, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...core.errors import invalid, unsupported
from ..passes import PassState
from .base import is_read
from .fusion import LayerFusion
from .routing import TaskPass


__all__ = ["TaskLoras", "add_task_loras", "linear_shape", "lora_shape", "task_lora_layers"]


class TaskLoras(nn.Module):
    """
    A linear layer with the LoRA of every task around it.

    Computes in the dtype of the LoRAs and returns the dtype of the layer, as PEFT's LoRA does.

    Args:
        base_layer (`nn.Module`):
            The layer: linear, `Conv1D`, or a quantised linear.
        state ([`~hf_curriculum.multitask.passes.PassState`]):
            Where the pass is read, shared by all layers of the model.
        num_tasks (`int`):
            T.
        rank (`int`):
            r, of the widest LoRA; the others end in zeros, which stay zeros.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout on the input of the LoRAs, in [0, 1).

    Attributes:
        in_features (`int`):
            I.
        out_features (`int`):
            D.
        ranks (`list[int]` of length T):
            Rank of each task's LoRA; 0 for a task that does not adapt this layer.
        scalings (`list[float]` of length T):
            Factor of each task's B A.
    """

    scaling: torch.Tensor

    def __init__(
        self, base_layer: nn.Module, state: PassState[TaskPass], num_tasks: int, rank: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        # Numbers of their own: of weights that are partitioned (ZeRO-3) no shape is to be read.
        self.in_features, self.out_features = linear_shape(base_layer)
        self.base_layer = base_layer
        self.state = state
        weight = next(base_layer.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        options: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.zeros(num_tasks, rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(num_tasks, self.out_features, rank, **options))
        self.register_buffer("scaling", torch.zeros(num_tasks, **options), persistent=False)
        self.ranks = [0] * num_tasks
        self.scalings = [0.0] * num_tasks
        self.dropout = nn.Dropout(dropout)
        self.fusion: LayerFusion | None = None

    # Models that read these of their layers get those of the layer, as from PEFT's.

    @property
    def weight(self) -> torch.Tensor:
        """Weight of the layer."""
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias of the layer."""
        return cast("torch.Tensor | None", self.base_layer.bias)

    @torch.no_grad()
    def start(self, task: int, rank: int, scaling: float, gaussian: bool = False) -> None:
        """
        Starts a task's LoRA anew: A as PEFT draws it, B zero.

        Args:
            task (`int`):
                In [0, T).
            rank (`int`):
                At least 1.
            scaling (`float`):
                s, the factor of B A.
            gaussian (`bool`, *optional*, defaults to `False`):
                Draw A from a normal distribution of deviation 1 / rank, not as in `nn.Linear`.
        """
        down = torch.empty(rank, self.in_features)
        if gaussian:
            nn.init.normal_(down, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.put(task, down, torch.zeros(self.out_features, rank), scaling)

    @torch.no_grad()
    def put(self, task: int, down: torch.Tensor, up: torch.Tensor, scaling: float) -> None:
        """
        Sets a task's LoRA, widening all of them where its rank is larger.

        Args:
            task (`int`):
                In [0, T).
            down (`torch.Tensor` of shape `(r, I)`):
                A.
            up (`torch.Tensor` of shape `(D, r)`):
                B.
            scaling (`float`):
                s.
        """
        rank = len(down)
        missing = rank - self.lora_A.shape[1]
        if missing > 0:
            self._replace("lora_A", torch.nn.functional.pad(self.lora_A, (0, 0, 0, missing)))
            self._replace("lora_B", torch.nn.functional.pad(self.lora_B, (0, missing)))
        self.clear(task)
        self.lora_A[task, :rank] = down.to(self.lora_A)
        self.lora_B[task, :, :rank] = up.to(self.lora_B)
        self.scaling[task] = scaling
        self.ranks[task], self.scalings[task] = rank, scaling

    @torch.no_grad()
    def clear(self, task: int) -> None:
        """
        Takes a task's LoRA out of this layer.

        Args:
            task (`int`):
                In [0, T).
        """
        self.lora_A[task].zero_()
        self.lora_B[task].zero_()
        self.scaling[task] = 0.0
        self.ranks[task], self.scalings[task] = 0, 0.0

    @torch.no_grad()
    def grow(self) -> None:
        """Makes room for one more task, behind the others."""
        for name in ("lora_A", "lora_B"):
            weight = getattr(self, name)
            self._replace(name, torch.cat([weight, torch.zeros_like(weight[:1])]))
        self.scaling = torch.cat([self.scaling, self.scaling.new_zeros(1)])
        self.ranks.append(0)
        self.scalings.append(0.0)
        if self.fusion is not None:
            self.fusion.grow()

    def _replace(self, name: str, value: torch.Tensor) -> None:
        setattr(self, name, nn.Parameter(value, requires_grad=getattr(self, name).requires_grad))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Runs the layer.

        Args:
            x (`torch.Tensor` of shape `(rows, ..., I)`):
                Input; `rows` is B, or K B in a pass through several LoRAs.
            *args:
                Passed on to the base layer.
            **kwargs:
                Passed on to the base layer.

        Returns:
            `torch.Tensor` of shape `(rows, ..., D)`.

        Raises:
            `ValueError`: outside a pass of the model, or for an input whose rows cannot be told apart.
        """
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        current = self.state.current
        if current is None:
            raise invalid(
                "forward", "a call of the base model alone", "a call of the `AttentionFusionModel` around it"
            )
        rows = len(current.tasks) * (1 if current.sources is None else len(current.sources))
        if x.shape[0] != rows or x.dim() < 2:
            raise invalid(
                "input of an adapted linear",
                f"the shape {tuple(x.shape)}",
                f"{rows} rows",
                "Leave layers that see no rows (experts of a mixture, say) out of `target_modules`.",
            )
        tokens = self.dropout(x.to(self.lora_A.dtype)).reshape(rows, -1, x.shape[-1])  # [rows, S, I]
        if current.sources is not None:
            update = self._by_block(tokens, current.sources)
        elif current.fused and self.fusion is not None:
            update = self._fused(tokens, current, self.fusion)
        else:
            update = self._own(tokens, current)
        return (result + update.reshape(result.shape)).to(result.dtype)

    def _own(self, tokens: torch.Tensor, current: TaskPass) -> torch.Tensor:
        """Each row through the LoRA of its task."""
        if current.single is not None:
            task = current.single
            down = tokens @ self.lora_A[task].mT
            update: torch.Tensor = down @ (self.lora_B[task] * self.scaling[task]).mT
            return update
        down = torch.bmm(tokens, self.lora_A[current.tasks].mT)
        return torch.bmm(down * self.scaling[current.tasks, None, None], self.lora_B[current.tasks].mT)

    def _by_block(self, tokens: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """Each block of rows through one LoRA."""
        blocks = tokens.reshape(len(sources), -1, tokens.shape[-1])  # [K, B S, I]
        down = torch.bmm(blocks, self.lora_A[sources].mT)
        return torch.bmm(down * self.scaling[sources, None, None], self.lora_B[sources].mT)

    def _fused(self, tokens: torch.Tensor, current: TaskPass, fusion: LayerFusion) -> torch.Tensor:
        """Each row through the LoRA of its task, and what the other LoRAs say."""
        down = (tokens @ self.lora_A.flatten(0, 1).mT).unflatten(-1, self.lora_A.shape[:2])  # [B, S, T, r]
        up = self.lora_B * self.scaling[:, None, None]
        update: torch.Tensor
        update, attention = fusion(down, up, current.tasks, current.visible)
        if current.attention is not None:
            current.attention.append(_mean_over_tokens(attention, current.mask))
        return update


def _mean_over_tokens(attention: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, S, T) -> (B, T), over the positions that are no padding."""
    attention = attention.detach()
    if mask is None or mask.shape[:2] != attention.shape[:2]:
        return attention.mean(dim=1)
    weights = (mask != 0).to(attention.dtype)[..., None]
    return (attention * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def task_lora_layers(model: nn.Module) -> Iterator[tuple[str, TaskLoras]]:
    """The adapted linears of a model, with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, TaskLoras):
            yield name, module


def lora_shape(config: LoraConfig, name: str) -> tuple[int, float]:
    """
    Rank and factor that a LoRA has in one layer.

    Args:
        config ([`~peft.LoraConfig`]):
            The LoRA.
        name (`str`):
            Name of the layer in the base model.

    Returns:
        `tuple[int, float]`: r and s.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """
    Inputs and outputs of a linear layer, wrapped or not.

    Args:
        layer (`nn.Module`):
            The layer.

    Returns:
        `tuple[int, int]`: I and D.

    Raises:
        `NotImplementedError`: for a layer that is no linear.
    """
    if isinstance(layer, TaskLoras):
        return layer.in_features, layer.out_features
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear | Conv1D) and "Linear" not in kind:
        raise unsupported(
            f"Task LoRAs on {kind}",
            "it is no linear layer",
            "Name linear layers, or `'all-linear'`, in `target_modules`.",
        )
    in_features, out_features = _get_in_out_features(layer)
    assert in_features is not None
    assert out_features is not None
    return in_features, out_features


def add_task_loras(base: PreTrainedModel, config: LoraConfig, state: PassState[TaskPass], num_tasks: int) -> None:
    """
    Puts the LoRAs of all tasks around the linears that PEFT would adapt, and freezes the rest of the model.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The model, which is changed.
        config ([`~peft.LoraConfig`]):
            The LoRA of each task. Its `target_modules` are filled in where PEFT knows them.
        state ([`~hf_curriculum.multitask.passes.PassState`]):
            What the layers will read.
        num_tasks (`int`):
            T.

    Raises:
        `ValueError`: if no module fits, or PEFT knows none for this architecture.
        `NotImplementedError`: for a layer that is no linear, or a start that changes the base.
    """
    if config.init_lora_weights not in (True, "gaussian"):
        raise unsupported(
            f"`init_lora_weights={config.init_lora_weights!r}`",
            "the base, which all tasks share, must stay as it is, and B start at zero",
            "Use True or 'gaussian'.",
        )
    learned = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    # PEFT finds the layers; the adapters it makes in them are replaced at once.
    inject_adapter_in_model(config, base)
    del base.peft_config
    found: dict[str, Any] = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    layers: dict[str, nn.Module] = {name: layer.get_base_layer() for name, layer in found.items()}
    gaussian = config.init_lora_weights == "gaussian"
    try:
        for name in filter(is_read, found):
            rank, scaling = lora_shape(config, name)
            layers[name] = loras = TaskLoras(layers[name], state, num_tasks, rank, config.lora_dropout)
            for task in range(num_tasks):
                loras.start(task, rank, scaling, gaussian=gaussian)
        if not any(map(is_read, found)):
            raise invalid(
                "lora.target_modules", config.target_modules, "linears that the last hidden states depend on"
            )
    except BaseException:
        for name, layer in found.items():
            base.set_submodule(name, layer.get_base_layer())
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(learned[name])
        raise
    for name, module in layers.items():
        base.set_submodule(name, module)
    base.requires_grad_(False)
