r"""
What freezing layers costs and saves, before a run: time by counting matrix products, and memory by kind.

Time: a forward pass through a block costs 1 (two operations per weight and token); back-propagation costs 1 for the
gradient of its input and 1 for that of its weights; checkpointing costs 1 more for each block that back-propagation
enters. With a the share of the weights that learn and p the depth that back-propagation crosses:

    without checkpointing     T / T_all = (1 + p + a) / 3        adapters: (1 + p) / 2
    with checkpointing        T / T_all = (1 + 2 p + a) / 4      adapters: (1 + 2 p) / 3

and p = 1 wherever the input embeddings are made to require a gradient. The products of attention scores (two in the
backward pass for one in the forward, whether weights learn or not), embeddings, head, optimizer and communication are
left out: at long sequences and large vocabularies the truth lies nearer to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.console import say, show_table
from ..core.errors import invalid
from .blocks import BLOCK_COLUMNS, Blocks
from .savings import Eater


__all__ = [
    "MEMORY_COLUMNS",
    "REGIMES",
    "Memory",
    "expected_depth",
    "memory_by_kind",
    "memory_rows",
    "predicted_lines",
    "predicted_ratio",
    "show_cost",
    "time_ratio",
]

REGIMES = ("plain", "sharded", "zero")
MEMORY_COLUMNS = ("memory of parameters", "nothing frozen", "active blocks", "ratio")
_SHOWN_NAMES = 6
# AdamW: two moments.
_MOMENTS = 2
_BYTES_OF_FLOAT32 = 4


def time_ratio(share: float, depth: float, *, checkpointing: bool, input_gradients: bool, adapters: bool) -> float:
    """
    Predicts the time of a step, as a part of what it takes when all blocks learn.

    Args:
        share (`float` in [0, 1]):
            Denoted a: share of the weights that learns. Of no matter for adapters: the gradients of their few weights
            cost next to nothing.
        depth (`float` in [0, 1]):
            Denoted p: share of the weights that back-propagation crosses, from the top down.
        checkpointing (`bool`):
            Whether activations are checkpointed.
        input_gradients (`bool`):
            Whether the embeddings' output is made to require a gradient, by a hook or by reentrant checkpointing.
        adapters (`bool`):
            Whether only adapters learn.

    Returns:
        `float` in (0, 1].

    Raises:
        `ValueError`: for a share or depth outside its range.

    Example:

    ```python
    >>> from hf_curriculum.layerwise.cost import time_ratio

    >>> time_ratio(0.25, 0.25, checkpointing=False, input_gradients=False, adapters=False)  # the top quarter
    0.5
    ```
    """
    for name, value in (("share", share), ("depth", depth)):
        if not 0.0 <= value <= 1.0:
            raise invalid(name, value, "a float in [0, 1]")
    here = _products(share, depth, checkpointing, input_gradients, adapters)
    return here / _products(1.0, 1.0, checkpointing, input_gradients, adapters)


def _products(share: float, depth: float, checkpointing: bool, input_gradients: bool, adapters: bool) -> float:
    """Matrix products of a step, in units of a forward pass."""
    crossed = 1.0 if input_gradients else depth
    return 1.0 + (2.0 if checkpointing else 1.0) * crossed + (0.0 if adapters else share)


def expected_depth(num_blocks: int, num_active: int) -> float:
    """
    The mean depth that back-propagation crosses, if k of L equal blocks are drawn uniformly.

    The lowest of k blocks drawn from L has (L - k) / (k + 1) blocks below it on average.

    Args:
        num_blocks (`int`):
            L, at least 1.
        num_active (`int`):
            k, in [0, L].

    Returns:
        `float` in [0, 1]; 0 for k = 0.

    Raises:
        `ValueError`: for numbers out of range.
    """
    if num_blocks < 1:
        raise invalid("num_blocks", num_blocks, "an integer >= 1")
    if not 0 <= num_active <= num_blocks:
        raise invalid("num_active", num_active, f"an integer in [0, {num_blocks}]")
    if num_active == 0:
        return 0.0
    return 1.0 - (num_blocks - num_active) / ((num_active + 1) * num_blocks)


def predicted_ratio(blocks: Blocks, active: Iterable[int], *, checkpointing: bool, input_gradients: bool) -> float:
    """
    Predicts the time of a step with some blocks learning, as a part of what it takes when all of them learn.

    As [`time_ratio`], but for blocks of any size and for models some of whose layers never learn.

    Args:
        blocks ([`~hf_curriculum.layerwise.blocks.Blocks`]):
            The blocks.
        active (`Iterable[int]`):
            Numbers of those that learn.
        checkpointing (`bool`):
            Whether activations are checkpointed.
        input_gradients (`bool`):
            Whether the embeddings' output is made to require a gradient.

    Returns:
        `float` in (0, 1].
    """

    def products(chosen: Sequence[int]) -> float:
        share = 0.0 if blocks.adapters else blocks.num_active(chosen) / blocks.num_layer_weights
        return _products(share, blocks.depth(chosen), checkpointing, input_gradients, blocks.adapters)

    return products(list(active)) / products(range(len(blocks.blocks)))


@dataclass(frozen=True)
class Memory:
    """
    What one kind of memory takes on each rank.

    Args:
        kind (`str`):
            Weights, gradients, master copy or optimizer state.
        everything (`int`):
            Bytes when nothing is frozen.
        active (`int`):
            Bytes with the active blocks learning.
    """

    kind: str
    everything: int
    active: int


def memory_by_kind(
    num_weights: int,
    num_learning: int,
    num_active: int,
    *,
    regime: str = "plain",
    weight_bytes: int = 4,
    world: int = 1,
    stage: int = 2,
) -> list[Memory]:
    """
    Predicts the memory of parameters under AdamW; activations are left out.

    Args:
        num_weights (`int`):
            Elements of the model.
        num_learning (`int`):
            Elements that learn when nothing is frozen, at most `num_weights`.
        num_active (`int`):
            Elements that learn with the active blocks, what always learns outside them included.
        regime (`str`, *optional*, defaults to `"plain"`):
            `"plain"`: one process or DDP, gradients and optimizer state in the dtype of the weights. `"sharded"`:
            the same, cut into one part per rank (FSDP2). `"zero"`: DeepSpeed ZeRO, with a float32 master copy; the
            partitions of gradients and master copy are made before the first step and stay, whatever is frozen.
        weight_bytes (`int`, *optional*, defaults to `4`):
            Bytes of a weight: 4 for float32 (autocast too), 2 for bfloat16.
        world (`int`, *optional*, defaults to `1`):
            Processes.
        stage (`int`, *optional*, defaults to `2`):
            Of ZeRO: 1, 2 or 3.

    Returns:
        `list[Memory]`

    Raises:
        `ValueError`: for a value out of range.

    Example:

    ```python
    >>> from hf_curriculum.layerwise.cost import memory_by_kind

    >>> memory_by_kind(1000, 1000, 250)[-1]
    Memory(kind='optimizer state', everything=8000, active=2000)
    ```
    """
    if regime not in REGIMES:
        raise invalid("regime", regime, f"one of {', '.join(REGIMES)}")
    if not 0 <= num_active <= num_learning <= num_weights:
        got = f"{num_active} active, {num_learning} learning, {num_weights} in all"
        raise invalid("num_active", got, "counts in ascending order")
    if world < 1 or stage not in (1, 2, 3):
        raise invalid("world", f"{world} processes, stage {stage}", "at least one process, and a stage of 1, 2 or 3")
    shards = 1 if regime == "plain" else world
    state_bytes = _MOMENTS * (_BYTES_OF_FLOAT32 if regime == "zero" else weight_bytes)
    is_cut = regime == "sharded" or (regime == "zero" and stage == 3)
    weights = num_weights * weight_bytes / (shards if is_cut else 1)
    kinds = [("weights", weights, weights)]
    if regime == "zero":
        gradients = num_learning * weight_bytes / (shards if stage >= 2 else 1)
        master = num_learning * _BYTES_OF_FLOAT32 / shards
        kinds += [("gradients", gradients, gradients), ("master copy", master, master)]
    else:
        kinds.append(("gradients", num_learning * weight_bytes / shards, num_active * weight_bytes / shards))
    kinds.append(("optimizer state", num_learning * state_bytes / shards, num_active * state_bytes / shards))
    return [Memory(kind, math.ceil(everything), math.ceil(active)) for kind, everything, active in kinds]


def memory_rows(memory: Sequence[Memory]) -> list[list[object]]:
    """
    Memory as a table, with its sum.

    Args:
        memory (`Sequence[Memory]`):
            As [`memory_by_kind`] gives it.

    Returns:
        `list[list]`: cells under [`MEMORY_COLUMNS`].
    """
    total = Memory("together", sum(one.everything for one in memory), sum(one.active for one in memory))
    return [
        [one.kind, _bytes(one.everything), _bytes(one.active), one.active / one.everything if one.everything else None]
        for one in [*memory, total]
    ]


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def predicted_lines(
    blocks: Blocks,
    active: Sequence[int] | int,
    *,
    checkpointing: bool,
    input_gradients: bool,
    allowed: Sequence[int] | None = None,
    eaters: Sequence[Eater] = (),
) -> list[str]:
    """
    What to tell a user before a run: what learns, the predicted time, and what eats the saving.

    Args:
        blocks ([`~hf_curriculum.layerwise.blocks.Blocks`]):
            The blocks.
        active (`Sequence[int]` or `int`):
            Numbers of the blocks that learn; or how many, of equal size and drawn uniformly, where the choice is not
            known yet.
        checkpointing (`bool`):
            Whether activations are checkpointed.
        input_gradients (`bool`):
            Whether the embeddings' output is made to require a gradient.
        allowed (`Sequence[int]`, *optional*):
            Numbers of the blocks that may be drawn. Defaults to all.
        eaters (`Sequence[Eater]`, *optional*):
            As [`~hf_curriculum.layerwise.savings.saving_eaters`] finds them.

    Returns:
        `list[str]`: lines.
    """
    options = {"checkpointing": checkpointing, "input_gradients": input_gradients}
    what = "the time of training all adapters" if blocks.adapters else "the time of all blocks learning"
    if isinstance(active, int):
        drawn_from = range(len(blocks.blocks)) if allowed is None else allowed
        places = len(blocks.blocks)
        share, depth = active / places, expected_depth(len(drawn_from), active)
        # Never less than what always learns outside the blocks makes it.
        depth = max(depth * blocks.depth(drawn_from), blocks.depth(()))
        ratio = time_ratio(share, depth, adapters=blocks.adapters, **options)
        where = f"Some {active} of {places} blocks learn at a time: {share:.0%} of the block parameters"
        average = " on average"
    else:
        share, depth = blocks.share(active), blocks.depth(active)
        ratio = predicted_ratio(blocks, active, **options)
        where, average = f"{share:.0%} of the block parameters learn", ""
    crossed = 1.0 if input_gradients else depth
    lines = [
        f"{where}, back-propagation crosses {crossed:.0%} of the depth{average}: predicted {ratio:.2f} of {what} "
        "(matrix products of the blocks alone)."
    ]
    lines += [
        f"Outside the blocks {verb}: {_listed(names)}."
        for verb, names in (("learn as well", blocks.always), ("are frozen", blocks.frozen))
        if names
    ]
    lines += [f"{eater.name}: {eater.why}. {eater.fix}" for eater in eaters]
    return lines


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def show_cost(
    blocks: Blocks,
    active: Sequence[int] | int,
    *,
    checkpointing: bool,
    input_gradients: bool,
    allowed: Sequence[int] | None = None,
    eaters: Sequence[Eater] = (),
    memory: Sequence[Memory] = (),
) -> None:
    """
    Shows the blocks, the predicted cost and what eats the saving, on the main process.

    Args:
        blocks ([`~hf_curriculum.layerwise.blocks.Blocks`]):
            The blocks.
        active (`Sequence[int]` or `int`):
            As for [`predicted_lines`].
        checkpointing (`bool`):
            Whether activations are checkpointed.
        input_gradients (`bool`):
            Whether the embeddings' output is made to require a gradient.
        allowed (`Sequence[int]`, *optional*):
            As for [`predicted_lines`].
        eaters (`Sequence[Eater]`, *optional*):
            What eats the saving.
        memory (`Sequence[Memory]`, *optional*):
            As [`memory_by_kind`] gives it.
    """
    show_table("Blocks that can learn or be frozen", BLOCK_COLUMNS, blocks.rows())
    lines = predicted_lines(
        blocks, active, checkpointing=checkpointing, input_gradients=input_gradients, allowed=allowed, eaters=eaters
    )
    say("\n".join(lines))
    if memory:
        show_table("Predicted memory on each rank, without activations", MEMORY_COLUMNS, memory_rows(memory))
