"""Arithmetic of accuracy, backward transfer and forgetting on a stage x level matrix, and of gains between tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import invalid


__all__ = [
    "ForgettingSummary",
    "SeesawSummary",
    "accuracy_mean",
    "backward_transfer",
    "forgetting_per_level",
    "forgetting_summary",
    "seesaw_summary",
]

# Shape `(S, L)`: row s holds the scores measured at the end of stage s, column l those of level l.
Matrix: TypeAlias = Sequence[Sequence[float]] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class ForgettingSummary:
    """
    What a stage x level matrix says about a run.

    Args:
        acc (`float`):
            Mean of the last row, in the unit of the scores: of a loss, the lower the better. NaN if nothing was
            measured there.
        bwt (`float`, *optional*):
            Backward transfer; negative = forgetting, for a loss as for an accuracy. None if no level qualifies.
        forgetting (`tuple[float, ...]`):
            Forgetting of each level; positive = forgotten, for a loss as for an accuracy. NaN where not defined.
    """

    acc: float
    bwt: float | None
    forgetting: tuple[float, ...]


@dataclass(frozen=True)
class SeesawSummary:
    """
    What training tasks together did to each of them.

    Args:
        changes (`tuple[float, ...]`):
            Of each task, in the unit of its score: positive = better than alone, for a loss as for an accuracy.
        mean (`float`):
            Mean of the changes.
        relative_mean (`float`):
            Mean of the changes as shares of the baselines' sizes. NaN if a baseline is 0.
        gained (`tuple[int, ...]`):
            Positions of the tasks that are better than alone by more than the tolerance.
        lost (`tuple[int, ...]`):
            Positions of those that are worse by more than it.
        worst (`int`):
            Position of the smallest change, the first of equal ones.
    """

    changes: tuple[float, ...]
    mean: float
    relative_mean: float
    gained: tuple[int, ...]
    lost: tuple[int, ...]
    worst: int


def seesaw_summary(
    scores: Sequence[float],
    baselines: Sequence[float],
    higher_is_better: bool | Sequence[bool] = True,
    tolerance: float = 0.0,
) -> SeesawSummary:
    r"""
    Compares each task's score with the one it has when trained alone.

    The name is of the effect that some tasks gain while others lose (Tang et al., PLE, RecSys 2020). The relative mean
    is `Delta_m = 1/T sum_t (-1)^{l_t} (M_t - B_t) / B_t` of Maninis et al. (arXiv 1904.08918, eq. 4), with `l_t = 1`
    for a loss; deviation: the size of `B_t` divides, so that scores below 0 keep their direction.

    Args:
        scores (`Sequence[float]` of length T):
            Of the tasks trained together.
        baselines (`Sequence[float]` of length T):
            Of each task trained alone.
        higher_is_better (`bool` or `Sequence[bool]` of length T, *optional*, defaults to `True`):
            Direction of the scores: True for an accuracy, False for a loss.
        tolerance (`float`, *optional*, defaults to `0.0`):
            A change of at most this size is neither gain nor loss, the spread over seeds say; at least 0.

    Returns:
        [`SeesawSummary`]

    Raises:
        `ValueError`: for no tasks, different numbers of them, scores that are not finite, or a negative tolerance.

    Example:

    ```python
    >>> from hf_curriculum.core.metrics import seesaw_summary

    >>> seesaw_summary([0.75, 0.5], [0.5, 0.625]).changes
    (0.25, -0.125)
    ```
    """
    ours, alone = np.asarray(scores, dtype=np.float64), np.asarray(baselines, dtype=np.float64)
    for name, values in (("scores", ours), ("baselines", alone)):
        if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
            raise invalid(name, values.tolist(), "one finite score for each of at least one task")
    rising = np.atleast_1d(np.asarray(higher_is_better, dtype=bool))
    if len(ours) != len(alone) or len(rising) not in (1, len(ours)):
        raise invalid("baselines", f"{len(alone)} scores", f"{len(ours)}, as many as there are tasks")
    if not 0 <= tolerance < float("inf"):
        raise invalid("tolerance", tolerance, "a float >= 0")
    changes = np.where(rising, ours - alone, alone - ours)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = float(np.mean(changes / np.abs(alone)))
    return SeesawSummary(
        changes=tuple(float(change) for change in changes),
        mean=float(changes.mean()),
        relative_mean=relative if np.isfinite(relative) else float("nan"),
        gained=tuple(int(task) for task in np.flatnonzero(changes > tolerance)),
        lost=tuple(int(task) for task in np.flatnonzero(changes < -tolerance)),
        worst=int(np.argmin(changes)),
    )


def accuracy_mean(matrix: Matrix) -> float:
    r"""
    ACC, the mean score over levels at the end of the run.

    `ACC = 1/L * sum_l R[S, l]` of GEM (Lopez-Paz and Ranzato, arXiv 1706.08840, eq. 2), which TRACE (arXiv 2310.06762)
    calls overall performance. Deviation: levels not measured at the end (NaN) are left out of the mean.

    Args:
        matrix (`Sequence[Sequence[float]]` or `np.ndarray` of shape `(S, L)`):
            Score after each stage (row) on each level (column), NaN where not measured.

    Returns:
        `float`: in the unit and with the direction of the scores: no sign is changed, so for a loss lower is better.
        NaN if no level was measured at the end.

    Raises:
        `ValueError`: for an empty or ragged matrix.

    Example:

    ```python
    >>> from hf_curriculum.core.metrics import accuracy_mean

    >>> accuracy_mean([[0.9, 0.2], [0.8, 0.6]])
    0.7
    ```
    """
    last = _as_matrix(matrix)[-1]
    measured = last[~np.isnan(last)]
    return float(measured.mean()) if len(measured) else float("nan")


def backward_transfer(
    matrix: Matrix, introduced_at: Sequence[int | None], higher_is_better: bool = False
) -> float | None:
    r"""
    BWT, how much what came later has helped (or hurt) what was learnt before.

    `BWT = 1/(T - 1) * sum_{i < T} (R[T, i] - R[i, i])` of GEM (Lopez-Paz and Ranzato, arXiv 1706.08840, eq. 3), where
    `R[i, i]` is the score of level i after the stage that introduced it. Two deviations: levels may be introduced in
    any order or not at all, and the sign of each difference is turned round for a loss.

    Args:
        matrix (`Sequence[Sequence[float]]` or `np.ndarray` of shape `(S, L)`):
            Score after each stage (row) on each level (column), NaN where not measured.
        introduced_at (`Sequence[int | None]` of length `L`):
            Stage after which each level was first trained, in `[0, S)`; None where stages do not follow levels.
        higher_is_better (`bool`, *optional*, defaults to `False`):
            Direction of the scores: True for an accuracy, False for a loss.

    Returns:
        `float`, *optional*: negative = forgetting, positive = later stages helped, for a loss as for an accuracy. The
        mean is over levels introduced before the last stage and measured both then and at the end; None if there is
        none.

    Raises:
        `ValueError`: for an empty or ragged matrix, or stages that do not fit it.

    Example: a loss that rises from 1.0 to 1.5 and an accuracy that falls by as much are the same forgetting.

    ```python
    >>> from hf_curriculum.core.metrics import backward_transfer

    >>> backward_transfer([[1.0, 3.0], [1.5, 2.0]], introduced_at=[0, 1])
    -0.5
    ```
    """
    scores = _as_matrix(matrix)
    last = len(scores) - 1
    gains = _oriented(scores, higher_is_better)
    differences = [
        gains[last, level] - gains[stage, level]
        for level, stage in enumerate(_checked_stages(introduced_at, scores.shape))
        if stage is not None and stage < last
    ]
    measured = [difference for difference in differences if not np.isnan(difference)]
    return float(np.mean(measured)) if measured else None


def forgetting_per_level(matrix: Matrix, higher_is_better: bool = False) -> list[float]:
    r"""
    Forgetting, how far each level ends below the best it has been.

    `f_j = max_{l < k} a[l, j] - a[k, j]` (Chaudhry et al. 2018, arXiv 1801.10112, eq. 3), with `k` the last stage. For
    a loss it is the final one minus the lowest before.

    Args:
        matrix (`Sequence[Sequence[float]]` or `np.ndarray` of shape `(S, L)`):
            Score after each stage (row) on each level (column), NaN where not measured.
        higher_is_better (`bool`, *optional*, defaults to `False`):
            Direction of the scores: True for an accuracy, False for a loss.

    Returns:
        `list[float]` of length `L`: positive = forgotten, negative = the end is better than all before, for a loss as
        for an accuracy. NaN for a level that was not measured at the end, or never before it.

    Raises:
        `ValueError`: for an empty or ragged matrix.

    Example:

    ```python
    >>> from hf_curriculum.core.metrics import forgetting_per_level

    >>> forgetting_per_level([[1.0, 3.0], [0.5, 2.0], [1.5, 1.0]])
    [1.0, -1.0]
    ```
    """
    gains = _oriented(_as_matrix(matrix), higher_is_better)
    earlier = np.where(np.isnan(gains[:-1]), -np.inf, gains[:-1]).max(axis=0, initial=-np.inf)
    forgotten = np.where(np.isneginf(earlier), np.nan, earlier) - gains[-1]
    return [float(value) for value in forgotten]


def forgetting_summary(
    matrix: Matrix, introduced_at: Sequence[int | None], higher_is_better: bool = False
) -> ForgettingSummary:
    """
    Computes ACC, backward transfer and forgetting of one matrix.

    Args:
        matrix (`Sequence[Sequence[float]]` or `np.ndarray` of shape `(S, L)`):
            Score after each stage (row) on each level (column), NaN where not measured.
        introduced_at (`Sequence[int | None]` of length `L`):
            Stage after which each level was first trained, in `[0, S)`; None where stages do not follow levels.
        higher_is_better (`bool`, *optional*, defaults to `False`):
            Direction of the scores: True for an accuracy, False for a loss.

    Returns:
        [`ForgettingSummary`]: its fields state their signs.

    Raises:
        `ValueError`: for an empty or ragged matrix, or stages that do not fit it.

    Example:

    ```python
    >>> from hf_curriculum.core.metrics import forgetting_summary

    >>> forgetting_summary([[1.0, 3.0], [1.5, 2.0]], introduced_at=[0, 1])
    ForgettingSummary(acc=1.75, bwt=-0.5, forgetting=(0.5, -1.0))
    ```
    """
    return ForgettingSummary(
        acc=accuracy_mean(matrix),
        bwt=backward_transfer(matrix, introduced_at, higher_is_better),
        forgetting=tuple(forgetting_per_level(matrix, higher_is_better)),
    )


def _oriented(scores: npt.NDArray[np.float64], higher_is_better: bool) -> npt.NDArray[np.float64]:
    """Turns scores so that higher is better."""
    return scores if higher_is_better else -scores


def _as_matrix(matrix: Matrix) -> npt.NDArray[np.float64]:
    try:
        scores = np.asarray(matrix, dtype=np.float64)
    except ValueError as error:
        raise invalid("matrix", f"rows of different lengths ({error})", "one score per level in every row") from error
    if scores.ndim != 2 or scores.size == 0:
        raise invalid("matrix", f"an array of shape {scores.shape}", "at least one stage (row) and one level (column)")
    return scores


def _checked_stages(introduced_at: Sequence[int | None], shape: tuple[int, ...]) -> list[int | None]:
    stages = list(introduced_at)
    num_stages, num_levels = shape
    if len(stages) != num_levels or any(stage is not None and not 0 <= stage < num_stages for stage in stages):
        raise invalid(
            "introduced_at",
            stages,
            f"for each of {num_levels} levels a stage in [0, {num_stages}), or None",
        )
    return stages
