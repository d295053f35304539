"""
The optimizer's side of freezing: gradients, state and learning rate of each block, whoever wraps the optimizer.

Without DeepSpeed the optimizer steps the model's own parameters, and a parameter without a gradient is left alone.
Under ZeRO it steps flat partitions, one per parameter group, which get a gradient of zeros where nothing was computed:
weight decay and momentum would go on moving a frozen block. So there every block has groups of its own, and a hook
takes the gradient of the frozen ones away before each step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.tensor import DTensor

from ..core.distributed import rank_and_world
from ..core.errors import invalid, unsupported


__all__ = ["ALWAYS", "BLOCK_KEY", "FROZEN", "BlockOptimizer", "base_optimizer", "refresh_weights", "split_groups"]

# What a parameter group says of itself: the number of its block, or that it is outside the blocks.
BLOCK_KEY = "layerwise_block"
ALWAYS = -1
FROZEN = -2


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """
    Takes the wrappers of Accelerate and DeepSpeed off an optimizer.

    Args:
        optimizer (`torch.optim.Optimizer` or a wrapper):
            The trainer's.

    Returns:
        `torch.optim.Optimizer`: the one whose `step` changes parameters.
    """
    while isinstance(optimizer, AcceleratedOptimizer) or type(optimizer).__module__.startswith("deepspeed."):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise unsupported(
            f"Freezing with {type(optimizer).__name__}",
            "its steps cannot be taken for some parameters only",
            "Use an optimizer that keeps its state per parameter, such as AdamW or SGD.",
        )
    return optimizer


def refresh_weights(optimizer: Any) -> None:
    """
    Takes the weights over from the float32 copies of ZeRO-1 and ZeRO-2, once a checkpoint is loaded. Collective.

    A checkpoint of adapters that was written in the middle of a step lacks those that were frozen, while their float32
    copies are in it; ZeRO-3 has no others.

    Args:
        optimizer (`torch.optim.Optimizer` or a wrapper):
            The trainer's.
    """
    wrapper: Any = getattr(optimizer, "optimizer", None)
    if hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()


def split_groups(optimizer: torch.optim.Optimizer, block_of: Mapping[int, int]) -> None:
    """
    Gives every block parameter groups of its own, in place. Groups with equal settings are not kept apart.

    Args:
        optimizer (`torch.optim.Optimizer`):
            Before an engine or a scheduler is built on it.
        block_of (`Mapping[int, int]`):
            Block of each parameter, or `ALWAYS` or `FROZEN`, by the parameter's identity.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            block = block_of[id(parameter)]
            key = (block, tuple((name, str(value)) for name, value in sorted(settings.items())))
            groups.setdefault(key, {**settings, "params": [], BLOCK_KEY: block})["params"].append(parameter)
    optimizer.param_groups[:] = [groups[key] for key in sorted(groups, key=lambda key: key[0])]


class BlockOptimizer:
    """
    Steps the active blocks of a model and leaves the others exactly as they are, without optimizer state.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The trainer's, wrapped or not; under DeepSpeed with the groups of [`split_groups`].
        blocks (`Sequence[Sequence[nn.Parameter]]`):
            The parameters of each block that may learn.
        always (`Iterable[nn.Parameter]`):
            Parameters outside the blocks that learn.

    Attributes:
        active (`frozenset[int]`):
            Numbers of the blocks that learn.
        learning_rates (`list[float]`):
            Sum of the learning rates of the steps that each block took since [`~BlockOptimizer.reset_rates`].
        flat (`bool`):
            Whether flat partitions are stepped, not the model's parameters (ZeRO).
        measure (`bool`):
            Whether steps sum up squared gradients, of inactive blocks too if they have any.

    Raises:
        `ValueError`: if the optimizer lacks parameters that may learn.
        `NotImplementedError`: for optimizers without state per parameter.
    """

    def __init__(
        self, optimizer: Any, blocks: Sequence[Sequence[nn.Parameter]], always: Iterable[nn.Parameter] = ()
    ) -> None:
        self.optimizer = base_optimizer(optimizer)
        self.blocks = [list(block) for block in blocks]
        self._block_of = {id(parameter): ALWAYS for parameter in always}
        self._block_of |= {id(parameter): number for number, block in enumerate(self.blocks) for parameter in block}
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        grouped = all(BLOCK_KEY in group for group in self.optimizer.param_groups)
        self.flat = grouped and not held >= self._block_of.keys()
        if not grouped and (missing := self._block_of.keys() - held):
            raise invalid(
                "optimizer",
                f"{type(self.optimizer).__name__} without {len(missing)} of {len(self._block_of)} parameters that may "
                "learn",
                "an optimizer that holds every parameter that may learn",
                "Build it while nothing is frozen, from the model that is trained. If an earlier training with a "
                "`LayerFreezeCallback` broke off, call its `release()` first.",
            )
        self.active: frozenset[int] = frozenset()
        self.learning_rates = [0.0] * len(self.blocks)
        self.measure = False
        self._group_of = self._groups_of_blocks()
        self._block_of_flat: dict[int, int] = {}
        self._ramp: dict[int, float] = {}
        self._squares: torch.Tensor | None = None
        self._partitioned = False
        self._whole: tuple[list[dict[str, Any]], list[list[torch.Tensor]]] | None = None
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_state_dict_post_hook(_fill_sharded_state),
        ]

    def _groups_of_blocks(self) -> dict[int, int]:
        """Index of a parameter group of each block."""
        found: dict[int, int] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            numbers = [group[BLOCK_KEY]] if self.flat else [self._block_of.get(id(each)) for each in group["params"]]
            for number in numbers:
                if number is not None and number >= 0:
                    found.setdefault(number, index)
        return found

    def activate(self, active: Iterable[int]) -> None:
        """
        Chooses the blocks that the next steps move, and drops the optimizer state of the others.

        Args:
            active (`Iterable[int]`):
                Block numbers.
        """
        self.active = frozenset(active)
        for number, block in enumerate(self.blocks):
            if number not in self.active:
                for parameter in block:
                    self._forget(parameter)

    def reset_rates(self) -> None:
        """Begins to add up learning rates anew."""
        self.learning_rates = [0.0] * len(self.blocks)

    def begin_step(self, ramp: Mapping[int, float]) -> None:
        """
        Tells of a step that comes, and counts its learning rates.

        Args:
            ramp (`Mapping[int, float]`):
                Factors in (0, 1] on the learning rate of some blocks at this step.
        """
        self._ramp = {number: factor for number, factor in ramp.items() if factor != 1.0}
        for number in self.active:
            rate = float(self.optimizer.param_groups[self._group_of[number]]["lr"])
            self.learning_rates[number] += rate * self._ramp.get(number, 1.0)

    def take_gradient_squares(self) -> torch.Tensor:
        """
        What the step before measured, with `measure` on. Collective where gradients are partitioned.

        Returns:
            `torch.Tensor` of shape (L,), float64, on the CPU: sum of squares of each block's gradient as it was
            stepped with, clipped; zero for a block without one. Equal on every rank.
        """
        squares, self._squares = self._squares, None
        if squares is None:
            return torch.zeros(len(self.blocks), dtype=torch.float64)
        if self._partitioned and rank_and_world()[1] > 1:
            dist.all_reduce(squares)
        return squares.cpu()

    def state_bytes(self) -> int:
        """Bytes of the optimizer state of all blocks on this rank; counters of steps are left out."""
        total = 0
        for parameter, values in self.optimizer.state.items():
            if self._block_of.get(id(parameter), self._block_of_flat.get(id(parameter), FROZEN)) >= 0:
                tensors = (value for value in values.values() if isinstance(value, torch.Tensor) and value.dim() > 0)
                total += sum(_local(tensor).numel() * tensor.element_size() for tensor in tensors)
        return total

    def close(self) -> None:
        """Lets go of the optimizer, which from then on steps whatever has a gradient."""
        # A step that raised an error left them apart.
        self._join_ramp()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _learns(self, number: int) -> bool:
        return number == ALWAYS or number in self.active

    def _forget(self, parameter: torch.Tensor) -> None:
        self.optimizer.state.pop(parameter, None)
        # DeepSpeed's view of the state that there was at the very first step would keep its memory.
        if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            mapping.optim_fragment = {}

    def _members(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, int]]:
        """What is stepped: its group, itself, and the number of its block."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                number = self._block_of.get(id(parameter), FROZEN)
                if self.flat:
                    number = self._block_of_flat[id(parameter)] = group[BLOCK_KEY]
                yield group, parameter, number

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.measure:
            self._add_squares()
        if self.flat or self.measure:
            for _, parameter, number in self._members():
                if not self._learns(number):
                    parameter.grad = None
                    self._forget(parameter)
        if self._ramp:
            self._part_ramp()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._join_ramp()

    def _part_ramp(self) -> None:
        """For one step, takes blocks on a ramp out of their groups into others, at a part of the learning rate."""
        groups = self.optimizer.param_groups
        kept: dict[int, list[torch.Tensor]] = {id(group): [] for group in groups}
        ramped: dict[tuple[int, float], dict[str, Any]] = {}
        for group, parameter, number in self._members():
            factor = self._ramp.get(number, 1.0)
            if factor == 1.0:
                kept[id(group)].append(parameter)
                continue
            if (id(group), factor) not in ramped:
                ramped[id(group), factor] = {**group, "params": [], "lr": group["lr"] * factor}
            ramped[id(group), factor]["params"].append(parameter)
        self._whole = groups, [group["params"] for group in groups]
        for group in groups:
            # The group itself and no copy: some optimizers keep counters in it.
            group["params"] = kept[id(group)]
        self.optimizer.param_groups = [*groups, *ramped.values()]

    def _join_ramp(self) -> None:
        if self._whole is not None:
            groups, members = self._whole
            for group, parameters in zip(groups, members):
                group["params"] = parameters
            self.optimizer.param_groups, self._whole = groups, None

    def _add_squares(self) -> None:
        for _, parameter, number in self._members():
            if number >= 0 and parameter.grad is not None:
                gradient = _local(parameter.grad)
                self._partitioned = self.flat or isinstance(parameter.grad, DTensor)
                if self._squares is None:
                    self._squares = torch.zeros(len(self.blocks), dtype=torch.float64, device=gradient.device)
                norm = torch.linalg.vector_norm(gradient.float(), dtype=torch.float64)
                self._squares[number] += norm.square()


def _fill_sharded_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """
    Gives sharded parameters without state a state of zeros in a checkpoint.

    Read in torch 2.13: `set_optimizer_state_dict` refuses a checkpoint without a state for a parameter that requires
    a gradient, and it loads before anything is frozen again. What was filled in is dropped by the next `activate`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    states = saved["state"]
    template = next((each for each in zip(numbers, parameters) if each[0] in states), None)
    if template is None or not isinstance(template[1], DTensor):
        return
    for number, parameter in zip(numbers, parameters):
        if number not in states:
            states[number] = {
                name: torch.zeros_like(parameter if value.shape == template[1].shape else value, dtype=value.dtype)
                for name, value in states[template[0]].items()
                if isinstance(value, torch.Tensor)
            }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        shard: torch.Tensor = tensor.to_local()
        return shard
    return tensor
