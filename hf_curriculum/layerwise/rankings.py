"""
The policies: rankings of blocks, pure functions of (what is known, budget, generator).

Shapes: L blocks in forward order, block L - 1 next to the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..core.errors import invalid
from ..core.order import seeded_order


if TYPE_CHECKING:
    from .policies import LayerHistory, Signal

__all__ = [
    "AdaptivePolicy",
    "CyclicPolicy",
    "FixedPolicy",
    "GradientPolicy",
    "GradualUnfreezingPolicy",
    "LastNPolicy",
    "RandomPolicy",
    "SpectrumPolicy",
]


@dataclass(frozen=True)
class AdaptivePolicy:
    r"""
    By weight change rate, with frozen blocks that ripen and a share of the budget for the longest frozen.

    Ours for ALF (J. Y. Lee, IJASC 14(4), 2025), whose abstract names the signal and no rule. Selecting by the rate
    alone ends with the first choice, since a frozen block changes by nothing. Here (1) a block never scored comes
    first; (2) the score of a block frozen for n windows counts as `score * (1 + aging)^n`; (3) at decision d,
    `floor((d + 1) x) - floor(d x)` places go to the blocks of the largest age before any score is looked at, with
    `x = exploration * budget / (mean size of a block)`. Ties are broken by the generator.

    Every block is active again within `ceil(C / x)` decisions, C blocks to choose from, if they are of one size or
    `x <= 1`; within C decisions otherwise; and earlier as its score ripens. With the defaults, a budget of 25 % and
    blocks of one size that is at most 40 decisions; with `exploration=0` no number holds.

    Defaults: our choice, by a simulation of blocks whose gain is constant, decays with training, drifts, recovers or
    rises late (8 to 64 blocks, budgets of 12.5, 25 and 50 %, noisy rates): of the gain of a chooser that sees
    everything, 0.919 were caught, against 0.896 without either, 0.908 with an exploration of 0.25 alone, and 0.731 by
    random choice.

    Args:
        exploration (`float`, *optional*, defaults to `0.1`):
            Share of the budget that goes by age, in [0, 1]. 1 goes round by age alone.
        aging (`float`, *optional*, defaults to `0.02`):
            Growth of a frozen block's score in each window, at least 0.
    """

    exploration: float = 0.1
    aging: float = 0.02

    signal: ClassVar[Signal | None] = "change_rate"

    def __post_init__(self) -> None:
        _check_share("exploration", self.exploration)
        if not 0 <= self.aging < float("inf"):
            raise invalid("aging", self.aging, "a float >= 0")

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        return _rank_exploring(history, budget, generator, self.exploration, self.aging)


@dataclass(frozen=True)
class GradientPolicy:
    """
    By gradient norm, with a share of the budget for the longest frozen.

    After GRASS (arXiv 2604.07808: mean gradient norm of a layer, re-estimated in training) and AdaGradSelect (arXiv
    2512.15764: blocks of the largest gradient norms, with epsilon-greedy exploration). Both draw at random (in
    proportion to the norms, by a Dirichlet distribution); here the largest are taken and exploration goes by age, as
    in [`AdaptivePolicy`], so that the two differ in their signal alone.

    Args:
        exploration (`float`, *optional*, defaults to `0.1`):
            Share of the budget that goes by age, in [0, 1]. That of [`AdaptivePolicy`].
    """

    exploration: float = 0.1

    signal: ClassVar[Signal | None] = "gradient_norm"

    def __post_init__(self) -> None:
        _check_share("exploration", self.exploration)

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        return _rank_exploring(history, budget, generator, self.exploration, 0.0)


@dataclass(frozen=True)
class RandomPolicy:
    """Uniformly at random at each decision: LISA (arXiv 2403.17919, algorithm 1), within a budget of parameters."""

    signal: ClassVar[Signal | None] = None

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        return _shuffled(history.candidates, generator)


@dataclass(frozen=True)
class CyclicPolicy:
    """
    Every block once in each cycle: BAdam (Luo et al., NeurIPS 2024, arXiv 2404.02827), many blocks at once.

    The last decision of a cycle tops up its budget with the first blocks of the next one, in which they do not come
    again. Where the cycle stands is read off the earlier decisions.

    Args:
        order (`str`, *optional*, defaults to `"random"`):
            `"random"` (drawn anew for each cycle), `"ascending"` (from the embeddings up) or `"descending"`, as in
            BAdam, whose default is `"random"` too.
    """

    order: str = "random"

    signal: ClassVar[Signal | None] = None

    def __post_init__(self) -> None:
        if self.order not in ("random", "ascending", "descending"):
            raise invalid("order", self.order, "one of random, ascending, descending")

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        everything = set(history.candidates)
        remaining = set(everything)
        for decision in history.decisions:
            # What a decision holds beyond the end of its cycle belongs to the next.
            rest = remaining.difference(decision)
            remaining = rest or everything.difference(set(decision) - remaining)
        ranking = self._ordered(remaining, generator)
        if int(history.sizes[ranking].sum()) <= budget:
            ranking += self._ordered(everything - remaining, generator)
        return ranking

    def _ordered(self, blocks: set[int], generator: np.random.Generator) -> list[int]:
        ordered = sorted(blocks, reverse=self.order == "descending")
        return _shuffled(ordered, generator) if self.order == "random" else ordered


@dataclass(frozen=True)
class FixedPolicy:
    """
    The same blocks for the whole run.

    Args:
        blocks (`Sequence[int]`):
            Their numbers in forward order, from 0; at least one, each once.
    """

    blocks: Sequence[int]

    signal: ClassVar[Signal | None] = None
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        blocks = tuple(self.blocks)
        whole = all(isinstance(block, int | np.integer) and not isinstance(block, bool) for block in blocks)
        if not blocks or not whole or len(set(blocks)) != len(blocks) or min(blocks) < 0:
            raise invalid("blocks", blocks, "at least one block number >= 0, each once")
        object.__setattr__(self, "blocks", tuple(int(block) for block in blocks))

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        outside = sorted(set(self.blocks).difference(history.candidates))
        if outside:
            expected = f"blocks out of {history.candidates}"
            raise invalid("blocks", f"blocks {outside}", expected, "Name other blocks, or raise `max_depth`.")
        size = int(history.sizes[list(self.blocks)].sum())
        if size > budget:
            fix = "Raise `active_fraction`, or name fewer."
            raise invalid("blocks", f"{size} parameters", f"at most {budget}, the budget", fix)
        return self.blocks


@dataclass(frozen=True)
class LastNPolicy:
    """The blocks next to the head, as many as the budget holds, for the whole run: the usual partial fine-tuning."""

    signal: ClassVar[Signal | None] = None
    contiguous: ClassVar[bool] = True
    static: ClassVar[bool] = True

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        return history.candidates[::-1]


@dataclass(frozen=True)
class GradualUnfreezingPolicy:
    """
    From the head down, one block more at each decision until the budget is full: ULMFiT.

    Howard and Ruder 2018, arXiv 1801.06146, section 3.3, which unfreezes one layer at each epoch and ends with all.
    """

    signal: ClassVar[Signal | None] = None
    contiguous: ClassVar[bool] = True

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        return history.candidates[::-1][: len(history.decisions) + 1]


@dataclass(frozen=True)
class SpectrumPolicy:
    """
    By signal-to-noise ratio of the weights, measured once before training: Spectrum (arXiv 2406.06623).

    Spectrum ranks single matrices within each kind of matrix; here the unit is the block, as in every policy.
    """

    signal: ClassVar[Signal | None] = "signal_to_noise"
    static: ClassVar[bool] = True

    def rank(self, history: LayerHistory, budget: int, generator: np.random.Generator) -> Sequence[int]:
        """See [`~hf_curriculum.layerwise.policies.LayerPolicy`]."""
        scores = {block: float(history.scores[block]) for block in history.candidates}
        if any(map(math.isnan, scores.values())):
            raise invalid("scores", list(scores.values()), "a signal-to-noise ratio of every block")
        return sorted(scores, key=lambda block: -scores[block])


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise invalid(name, value, "a float in [0, 1]")


def _shuffled(blocks: list[int], generator: np.random.Generator) -> list[int]:
    """Raw draws alone enter: numpy guarantees their stream, not that of `Generator.permutation`."""
    order = seeded_order(len(blocks), int(generator.bit_generator.random_raw()) >> 1)
    return [blocks[place] for place in order.tolist()]


def _rank_exploring(
    history: LayerHistory, budget: int, generator: np.random.Generator, exploration: float, aging: float
) -> list[int]:
    """The places that are due by age, then all other blocks by aged score; ties in random order."""
    blocks = np.array(_shuffled(history.candidates, generator), dtype=np.int64)
    ages, decision = history.ages[blocks], len(history.decisions)
    places = exploration * min(budget / float(history.sizes[blocks].mean()), float(len(blocks)))
    # A product of decimal shares may end just below the integer that it stands for.
    due = math.floor((decision + 1) * places + 1e-9) - math.floor(decision * places + 1e-9)
    oldest = blocks[np.argsort(-ages, kind="stable")][:due]
    # In logarithms: the power of a block frozen for thousands of windows leaves the range of floats.
    with np.errstate(divide="ignore"):
        aged = np.log(history.scores[blocks]) + ages * np.log1p(aging)
    aged[np.isnan(history.scores[blocks])] = np.inf
    by_score = blocks[np.argsort(-aged, kind="stable")]
    return [*oldest.tolist(), *by_score[~np.isin(by_score, oldest)].tolist()]
