"""
Which blocks learn next: a policy ranks them, and of that ranking is taken what fits into the budget.

Shapes: L blocks in forward order, block L - 1 next to the head. The policies themselves stand in `rankings.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..core.errors import invalid
from .rankings import (
    AdaptivePolicy,
    CyclicPolicy,
    FixedPolicy,
    GradientPolicy,
    GradualUnfreezingPolicy,
    LastNPolicy,
    RandomPolicy,
    SpectrumPolicy,
)


__all__ = ["POLICIES", "LayerHistory", "LayerPolicy", "decide", "fill_budget", "make_policy", "warmup_windows"]

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]
Signal: TypeAlias = Literal["change_rate", "gradient_norm", "signal_to_noise"]

# Keeps the generator apart from other streams of the run's seed.
_STREAM = 64


@dataclass(frozen=True)
class LayerHistory:
    """
    What a policy knows when it decides.

    Args:
        sizes (`np.ndarray` of shape `(L,)`, int64):
            Parameters of each block that can learn, at least 1.
        scores (`np.ndarray` of shape `(L,)`, float64):
            Smoothed value of the policy's signal, at least 0; NaN where a block was never scored.
        ages (`np.ndarray` of shape `(L,)`, int64):
            Windows since each block was active, 0 = active in the last one.
        decisions (`tuple[tuple[int, ...], ...]`):
            Earlier active sets, oldest first; windows of the warm-up are none.
        allowed (`tuple[int, ...]`, *optional*):
            Blocks that may be chosen. Defaults to all.

    Raises:
        `ValueError`: for arrays of different lengths, or a block without parameters.
    """

    sizes: IntArray
    scores: FloatArray
    ages: IntArray
    decisions: tuple[tuple[int, ...], ...] = ()
    allowed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, dtype in (("sizes", np.int64), ("scores", np.float64), ("ages", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
            if len(getattr(self, name)) != len(self.sizes):
                got = f"{len(getattr(self, name))} values"
                raise invalid(name, got, f"{len(self.sizes)}, one for each block")
        if len(self.sizes) == 0 or min(self.sizes) < 1:
            raise invalid("sizes", np.asarray(self.sizes).tolist(), "at least one block, and parameters in each")

    @property
    def candidates(self) -> list[int]:
        """`list[int]`: the blocks that may be chosen, in forward order."""
        return list(range(len(self.sizes))) if self.allowed is None else sorted(self.allowed)


@runtime_checkable
class LayerPolicy(Protocol):
    """
    Ranks blocks: the one thing that differs between ways of choosing layers.

    A `repr` that tells the settings, as a dataclass has, lets a resumed run see that they are the same.

    `signal` says what is to be measured for it: `"change_rate"`, `"gradient_norm"`, `"signal_to_noise"`, or None. Two
    further attributes may be there: `contiguous = True` stops filling the budget at the first block that does not fit
    instead of skipping it, and `static = True` says that the first decision holds for the run.
    """

    @property
    def signal(self) -> Signal | None:
        """What is to be measured."""

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """
        Ranks the blocks, best first.

        Must be a pure function: decisions are repeated on every rank and when a run resumes.

        Args:
            history ([`LayerHistory`]):
                What is known. Not to be changed.
            budget (`int`):
                Parameters that may learn at once.
            generator (`np.random.Generator`):
                Seeded by the run's seed and the number of the decision; the only source of randomness.

        Returns:
            `Sequence[int]`: block numbers; blocks left out are not chosen.
        """


def fill_budget(
    ranking: Sequence[int], sizes: Sequence[int] | npt.NDArray[np.int64], budget: int, *, contiguous: bool = False
) -> tuple[int, ...]:
    """
    Takes blocks in order as long as they fit.

    Args:
        ranking (`Sequence[int]`):
            Block numbers, best first.
        sizes (`Sequence[int]` of length L):
            Parameters of each block.
        budget (`int`):
            Parameters in all, never exceeded.
        contiguous (`bool`, *optional*, defaults to `False`):
            Whether to stop at the first block that does not fit. Otherwise it is skipped, and what is left of the
            budget in the end is smaller than any ranked block that was not taken.

    Returns:
        `tuple[int, ...]`: the blocks taken, in forward order; empty if none fits.

    Example:

    ```python
    >>> from hf_curriculum.layerwise.policies import fill_budget

    >>> fill_budget([2, 1, 0], [1, 3, 2], 3), fill_budget([2, 1, 0], [1, 3, 2], 3, contiguous=True)
    ((0, 2), (2,))
    ```
    """
    taken, left = [], int(budget)
    for block in ranking:
        size = int(sizes[block])
        if size <= left:
            taken.append(int(block))
            left -= size
        elif contiguous:
            break
    return tuple(sorted(taken))


def decide(
    policy: LayerPolicy, history: LayerHistory, budget: int, *, seed: int, allowed: Sequence[int] | None = None
) -> tuple[int, ...]:
    """
    Chooses the blocks that learn next: a pure function of its arguments.

    Args:
        policy ([`LayerPolicy`]):
            Who ranks them.
        history ([`LayerHistory`]):
            What is known.
        budget (`int`):
            Parameters that may learn at once.
        seed (`int`):
            The run's seed; the generator is seeded by it and the number of the decision.
        allowed (`Sequence[int]`, *optional*):
            Blocks that may be chosen, those that a cap on the depth leaves. Defaults to those of `history`.

    Returns:
        `tuple[int, ...]`: at least one block, in forward order, with at most `budget` parameters in all.

    Raises:
        `ValueError`: for a ranking that is none, a choice of nothing, or, with a policy that decides again and again,
            a block that alone is larger than the budget and could never learn.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_curriculum.layerwise.policies import LayerHistory, decide, make_policy

    >>> history = LayerHistory(np.array([4, 4, 4]), np.array([0.1, 0.3, 0.2]), np.array([0, 0, 0]))
    >>> decide(make_policy("adaptive"), history, 8, seed=0)
    (1, 2)
    ```
    """
    if allowed is not None:
        history = replace(history, allowed=tuple(_checked(allowed, len(history.sizes), "allowed")))
    candidates, name = history.candidates, type(policy).__name__
    contiguous, static = getattr(policy, "contiguous", False), getattr(policy, "static", False)
    if not contiguous and not static:
        _check_each_fits(history.sizes, budget, candidates)
    words = [int(seed) & (2**32 - 1), (int(seed) >> 32) & (2**32 - 1), len(history.decisions)]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words, spawn_key=(_STREAM,))))
    ranking = _checked(policy.rank(history, budget, generator), len(history.sizes), f"ranking of {name}")
    within = [block for block in ranking if block in candidates]
    if not within:
        raise invalid(f"ranking of {name}", ranking, f"at least one block out of {candidates}")
    chosen = fill_budget(within, history.sizes, budget, contiguous=contiguous)
    if not chosen:
        nearest = within[0] if contiguous else min(within, key=lambda block: int(history.sizes[block]))
        raise _too_small(budget, int(history.sizes[nearest]), nearest, int(history.sizes.sum()))
    return chosen


def warmup_windows(
    sizes: Sequence[int] | npt.NDArray[np.int64], budget: int, *, allowed: Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """
    Divides the blocks into windows within the budget, so that each is scored before the first decision.

    First fit from the head down: a block joins the first window that has room for it.

    Args:
        sizes (`Sequence[int]` of length L):
            Parameters of each block.
        budget (`int`):
            Parameters that may learn at once.
        allowed (`Sequence[int]`, *optional*):
            Blocks to divide. Defaults to all.

    Returns:
        `tuple[tuple[int, ...], ...]`: windows in the order of training, each in forward order; every block is in
        exactly one.

    Raises:
        `ValueError`: for a block that alone is larger than the budget.

    Example:

    ```python
    >>> from hf_curriculum.layerwise.policies import warmup_windows

    >>> warmup_windows([1, 1, 2, 1], 2)
    ((1, 3), (2,), (0,))
    ```
    """
    blocks = sorted(range(len(sizes)) if allowed is None else _checked(allowed, len(sizes), "allowed"))
    _check_each_fits(sizes, budget, blocks)
    windows: list[list[int]] = []
    room: list[int] = []
    for block in reversed(blocks):
        size = int(sizes[block])
        place = next((number for number, left in enumerate(room) if size <= left), len(windows))
        if place == len(windows):
            windows.append([])
            room.append(int(budget))
        windows[place].append(block)
        room[place] -= size
    return tuple(tuple(reversed(window)) for window in windows)


POLICIES: dict[str, type[LayerPolicy]] = {
    "adaptive": AdaptivePolicy,
    "cyclic": CyclicPolicy,
    "fixed": FixedPolicy,
    "gradient": GradientPolicy,
    "gradual_unfreezing": GradualUnfreezingPolicy,
    "last_n": LastNPolicy,
    "random": RandomPolicy,
    "spectrum": SpectrumPolicy,
}


def make_policy(policy: str | LayerPolicy, **options: object) -> LayerPolicy:
    """
    Makes a policy of a name, or takes an object as it is.

    Args:
        policy (`str` or [`LayerPolicy`]):
            One of `POLICIES`, or an object of yours.
        **options:
            Arguments of the named policy.

    Returns:
        [`LayerPolicy`]

    Raises:
        `ValueError`: for an unknown name, an option that the policy does not have or needs, or an object that is no
            policy.

    Example:

    ```python
    >>> from hf_curriculum.layerwise.policies import make_policy

    >>> make_policy("adaptive", exploration=0.2)
    AdaptivePolicy(exploration=0.2, aging=0.02)
    ```
    """
    if not isinstance(policy, str):
        if isinstance(policy, type) or not isinstance(policy, LayerPolicy):
            raise invalid("policy", policy, f"an object with `signal` and `rank`, or one of {', '.join(POLICIES)}")
        if policy.signal not in (None, *get_args(Signal)):
            raise invalid(
                f"signal of {type(policy).__name__}", policy.signal, f"{', '.join(get_args(Signal))}, or None"
            )
        if options:
            raise invalid(
                "policy", policy, f"a name beside the options {', '.join(options)}", "Set them on the object."
            )
        return policy
    if policy not in POLICIES:
        raise invalid("policy", policy, f"one of {', '.join(POLICIES)}, or an object of yours")
    cls = POLICIES[policy]
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type] # each is a dataclass
    for name in options:
        if name not in known:
            has = f"options of `{policy}`: {', '.join(known)}" if known else f"nothing, `{policy}` has no options"
            raise invalid(name, options[name], has)
    if policy == "fixed" and "blocks" not in options:
        raise invalid("blocks", "nothing", "the blocks that learn, for `policy='fixed'`")
    return cls(**options)


def _checked(blocks: Sequence[int], num_blocks: int, name: str) -> list[int]:
    whole = all(isinstance(block, int | np.integer) and not isinstance(block, bool) for block in blocks)
    if not whole or not all(0 <= block < num_blocks for block in blocks) or len(set(blocks)) != len(blocks):
        raise invalid(name, list(blocks), f"block numbers in [0, {num_blocks}), each once")
    if len(blocks) == 0:
        raise invalid(name, "nothing", "at least one block")
    return [int(block) for block in blocks]


def _check_each_fits(sizes: Sequence[int] | npt.NDArray[np.int64], budget: int, blocks: Sequence[int]) -> None:
    largest = max(blocks, key=lambda block: int(sizes[block]))
    if int(sizes[largest]) > budget:
        raise _too_small(budget, int(sizes[largest]), largest, sum(int(size) for size in sizes))


def _too_small(budget: int, needed: int, block: int, total: int) -> ValueError:
    return invalid(
        "active_fraction",
        f"a budget of {budget} parameters",
        f"at least {needed}, those of block {block}, which could never learn otherwise",
        f"Set it to at least {math.ceil(1000 * needed / total) / 1000}.",
    )
