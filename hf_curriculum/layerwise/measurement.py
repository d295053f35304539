"""
How much each block changes: its parameters against a rolling reference, adapters by the update that they make.

A LoRA pair starts with B = 0, so the change of its parameters says nothing about the model: what counts is the change
of B A, against the weight that it is added to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..core.changes import RollingReference
from ..core.distributed import on_main_process, rank_and_world
from ..core.layouts import layout_of
from ..core.parameters import parameters_by_name
from .importance import change_rate, lora_change_squared, signal_to_noise


if TYPE_CHECKING:
    from .blocks import Blocks

__all__ = ["ChangeMeter", "LowRankPair", "low_rank_pairs", "measure_signal_to_noise"]


@dataclass(frozen=True)
class LowRankPair:
    """
    Two factors whose product is added to a weight.

    Args:
        down (`str`):
            Name of A, (r, d_in).
        up (`str`):
            Name of B, (d_out, r).
        scaling (`float`):
            Factor on B A.
        base (`nn.Module`):
            The layer with the weight W0 that the product is added to.
        magnitude (`str`, *optional*):
            Name of DoRA's column norms, a change of which is the radial part of the change of the weight.
    """

    down: str
    up: str
    scaling: float
    base: nn.Module
    magnitude: str | None = None


def low_rank_pairs(model: nn.Module) -> list[LowRankPair]:
    """
    Finds the LoRA and CGC-LoRA factors of a model that learn.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.

    Returns:
        `list[LowRankPair]`: in the model's order; empty in full fine-tuning. The experts of CGC-LoRA are one pair, as
        if every gate was 1.
    """
    named = parameters_by_name(model)
    name_of = {id(parameter): name for name, parameter in named.items()}
    pairs = []
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    for module in layers:
        base = module.get_base_layer()
        magnitudes = getattr(module, "lora_magnitude_vector", {})
        downs = getattr(module, "lora_A", {})
        # AdaLoRA keeps parameters there, and a third factor between: they count by their own change.
        for adapter, down in downs.items() if isinstance(downs, nn.ModuleDict) else ():
            a, b = down.weight, module.lora_B[adapter].weight
            if a.requires_grad or b.requires_grad:
                magnitude = magnitudes[adapter].weight if adapter in magnitudes else None
                pairs.append(
                    LowRankPair(
                        name_of[id(a)],
                        name_of[id(b)],
                        float(module.scaling[adapter]),
                        base,
                        None if magnitude is None else name_of[id(magnitude)],
                    )
                )
        for experts in getattr(module, "cgc_lora_experts", {}).values():
            shapes = [layout_of("", each).full_shape(each) for each in (experts.A, experts.B)]
            if experts.A.requires_grad and shapes[0][0] == shapes[1][1]:
                pairs.append(LowRankPair(name_of[id(experts.A)], name_of[id(experts.B)], 1.0, base))
    return pairs


class ChangeMeter:
    """
    Measures the weight change rate of blocks (ALF): ||W_t - W_(t-k)||_F / ||W_(t-k)||_F over the matrices of a block.

    A block without matrices counts by all its parameters; what starts at zero (adapters of OFT, new biases) counts as
    all of it new, a rate of 1. Of adapters it is ||scaling * (B A - B' A')||_F / ||W0||_F
    over the weights that the block's adapters are added to; other parameters of adapters count by their own change.
    The abstract of ALF gives no formula: both are our choice.

    Args:
        model (`nn.Module`):
            The model, wrapped or not; under DeepSpeed and FSDP2 after the engine is built.
        blocks ([`~hf_curriculum.layerwise.blocks.Blocks`]):
            Its blocks, all learning now.
    """

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self._named = parameters_by_name(model)
        # A snapshot walks through the model that it is given, and only partitions need it.
        partitioned = any(layout_of(name, each).partitioned for name, each in self._named.items())
        self._model = model if partitioned else None
        self._names = [block.parameters for block in blocks.blocks]
        self._pairs: list[list[LowRankPair]] = [[] for _ in self._names]
        block_of = {name: number for number, names in enumerate(self._names) for name in names}
        for pair in low_rank_pairs(model):
            if (number := block_of.get(pair.down)) is not None:
                self._pairs[number].append(pair)
        self._plain = [self._plain_names(number) for number in range(len(self._names))]
        self._base_squares = [
            math.fsum(_weight_square(pair.base) for pair in pairs) for pairs in self._pairs
        ]  # fmt: skip
        self.reference: RollingReference | None = None
        self._measured: tuple[int, ...] = ()

    def start(self, active: Sequence[int]) -> None:
        """
        Takes the blocks as they are now for the reference.

        Args:
            active (`Sequence[int]`):
                The blocks to measure: those that learn from now on.
        """
        self._measured = tuple(active)
        names = [
            *(name for number in active for name in self._plain[number]),
            *(name for number in active for pair in self._pairs[number] for name in (pair.down, pair.up)),
        ]
        self.reference = RollingReference({name: self._named[name] for name in names}, model=self._model)

    def rates(self, learning_rates: Sequence[float] | None = None) -> dict[int, float]:
        """
        The change rate of each measured block since [`~ChangeMeter.start`]. Collective.

        Args:
            learning_rates (`Sequence[float]`, *optional*):
                Sum of the learning rates of each block's steps, by which its rate is divided.

        Returns:
            `dict[int, float]`: by block number, equal on every rank. A block whose learning rates sum up to 0 is left
            out.
        """
        assert self.reference is not None
        order, count = {number: place for place, number in enumerate(self._measured)}, len(self._measured)
        group_of = {name: order[number] for number in self._measured for name in self._plain[number]}
        # DoRA's column norms in groups of their own: they are a part of W0, whose norm is there already.
        group_of |= {
            pair.magnitude: count + order[number]
            for number in self._measured
            for pair in self._pairs[number]
            if pair.magnitude in group_of
        }
        sums = self.reference.squared_sums(group_of, 2 * count)
        changed, values = sums[:count, 0] + sums[count:, 0], sums[:count, 1]
        for number in self._measured:
            changed[order[number]] += sum(self._pair_change(pair) for pair in self._pairs[number])
            values[order[number]] += self._base_squares[number]
        rates = {}
        for number in self._measured:
            divisor = None if learning_rates is None else learning_rates[number]
            if divisor != 0.0:
                moved = float(changed[order[number]])
                rates[number] = change_rate(moved, float(values[order[number]]) or moved, divisor)
        return on_main_process(lambda: rates)

    def _pair_change(self, pair: LowRankPair) -> float:
        assert self.reference is not None
        (a, a_then), (b, b_then) = self.reference.pair(pair.down), self.reference.pair(pair.up)
        factors = (a.flatten(1), b.flatten(1), a_then.flatten(1), b_then.flatten(1))
        return float(lora_change_squared(*factors, pair.scaling))

    def _plain_names(self, number: int) -> list[str]:
        in_pairs = {name for pair in self._pairs[number] for name in (pair.down, pair.up)}
        names = [name for name in self._names[number] if name not in in_pairs]
        if self._pairs[number]:
            return names
        matrices = [name for name in names if len(_shape(self._named[name])) > 1]
        return matrices or names


@torch.no_grad()
def measure_signal_to_noise(model: nn.Module, blocks: Blocks) -> list[float]:
    """
    Spectrum's signal-to-noise ratio of each block's weights, frozen base weights included. Collective.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.
        blocks ([`~hf_curriculum.layerwise.blocks.Blocks`]):
            Its blocks.

    Returns:
        `list[float]` of length L: the mean over a block's matrices, weighted by their elements; equal on every rank.
    """
    named = parameters_by_name(model)
    adapters = {name for block in blocks.blocks for name in block.parameters} if blocks.adapters else set()
    ratios = []
    for block in blocks.blocks:
        found = []
        for name, parameter in named.items():
            inside = name.startswith(f"{block.name}.") and name not in adapters
            if inside and len(_shape(parameter)) == 2 and parameter.is_floating_point():
                layout = layout_of(name, parameter)
                weight = layout.full(parameter, layout.local(parameter)).detach()
                found.append((signal_to_noise(weight), weight.numel()))
        total = sum(size for _, size in found)
        ratios.append(math.fsum(ratio * size for ratio, size in found) / total if total else 0.0)
    return on_main_process(lambda: ratios)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return layout_of("", parameter).full_shape(parameter)


@torch.no_grad()
def _weight_square(layer: nn.Module) -> float:
    """||W||_F^2 of a layer's weight, quantised or partitioned. Collective where it is partitioned."""
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight

        return float(torch.linalg.vector_norm(dequantize_module_weight(layer), dtype=torch.float64).square())
    layout = layout_of("weight", weight)
    own = layout.own(weight, layout.local(weight))
    square = torch.linalg.vector_norm(own.float(), dtype=torch.float64).square()
    if layout.partitioned and rank_and_world()[1] > 1:
        square = square.to(layout.device(weight))
        dist.all_reduce(square)
    return float(square)
