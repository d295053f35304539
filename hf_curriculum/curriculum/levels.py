"""Difficulty cut into levels: where to cut, and which level a row belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..core.errors import invalid
from .config import LEVEL_METHODS


__all__ = ["assign_levels", "level_cuts", "levels_at"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = Sequence[float] | npt.NDArray[np.generic]
RunCost: TypeAlias = Callable[[IntArray], FloatArray]

# The exact search over m bins costs num_levels * m^2 operations and two m^2 tables: 0.1 s and 70 MB at this number.
_MAX_BINS = 2048


def assign_levels(
    difficulty: Numbers,
    num_levels: int = 3,
    method: str = "quantile",
    *,
    token_counts: Numbers | None = None,
    thresholds: Sequence[float] | None = None,
) -> IntArray:
    """
    Cuts rows into levels of difficulty.

    The same as [`levels_at`] at the cuts of [`level_cuts`], so equal difficulties always share a level.

    Args:
        difficulty (`Sequence[float]` or `np.ndarray` of shape `(N,)`):
            Score of each row, the higher the harder. A column of a `datasets.Dataset` will do.
        num_levels (`int`, *optional*, defaults to `3`):
            Number of levels.
        method (`str`, *optional*, defaults to `"quantile"`):
            Where to cut, see [`level_cuts`].
        token_counts (`Sequence[int]` or `np.ndarray` of shape `(N,)`, *optional*):
            Tokens of each row; `method="tokens"` reads them.
        thresholds (`Sequence[float]`, *optional*):
            The cuts of `method="thresholds"`.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `int64`: level of each row, 0 the easiest. No level is empty.

    Raises:
        `ValueError`: see [`level_cuts`].

    Example:

    ```python
    >>> from hf_curriculum.curriculum.levels import assign_levels

    >>> assign_levels([0.3, 0.1, 0.2, 0.9, 0.5, 0.4]).tolist()
    [1, 0, 0, 2, 2, 1]
    ```
    """
    scores = _scores(difficulty, num_levels)
    cuts = level_cuts(scores, num_levels, method, token_counts=token_counts, thresholds=thresholds)
    return levels_at(scores, cuts)


def levels_at(difficulty: Numbers, cuts: Numbers) -> IntArray:
    """
    Finds the level of each row at given cuts, for rows (of an evaluation set, say) that did not place them.

    Args:
        difficulty (`Sequence[float]` or `np.ndarray` of shape `(N,)`):
            Score of each row. Finite.
        cuts (`Sequence[float]` or `np.ndarray` of shape `(num_levels - 1,)`):
            Increasing cuts, as [`level_cuts`] returns them.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `int64`: the number of cuts that are not above the score; a row at a cut
        is in the harder level. Levels may be empty here.

    Raises:
        `ValueError`: for a score that is not finite.

    Example:

    ```python
    >>> from hf_curriculum.curriculum.levels import levels_at

    >>> levels_at([0.1, 0.5, 0.7], [0.5]).tolist()
    [0, 1, 1]
    ```
    """
    scores = _numbers("difficulty", difficulty)
    _check_finite("difficulty", scores)
    return np.searchsorted(_numbers("cuts", cuts), scores, side="right").astype(np.int64, copy=False)


def level_cuts(
    difficulty: Numbers,
    num_levels: int = 3,
    method: str = "quantile",
    *,
    token_counts: Numbers | None = None,
    thresholds: Sequence[float] | None = None,
) -> FloatArray:
    r"""
    Places the cuts between levels.

    - `"quantile"`: the numbers of rows per level are as equal as ties allow (least sum of their squares).
    - `"tokens"`: the same for the numbers of tokens.
    - `"jenks"`: natural breaks. Least sum over rows of the squared distance to their level's mean, which is exact
      one-dimensional k-means (Jenks 1967; dynamic program as in Wang and Song 2011, "Ckmeans.1d.dp").
    - `"thresholds"`: at yours.

    All but the last choose among the gaps between neighbouring distinct scores, and put the cut in the middle of the
    gap. Up to 2048 distinct scores the result is exact. Above, cuts are first searched between 2048 bins with equal
    numbers of rows (or tokens), then between ever finer ones around the best, down to single scores.

    Args:
        difficulty (`Sequence[float]` or `np.ndarray` of shape `(N,)`):
            Score of each row, the higher the harder. Finite.
        num_levels (`int`, *optional*, defaults to `3`):
            Number of levels, at least 1.
        method (`str`, *optional*, defaults to `"quantile"`):
            `"quantile"`, `"tokens"`, `"jenks"` or `"thresholds"`.
        token_counts (`Sequence[int]` or `np.ndarray` of shape `(N,)`, *optional*):
            Tokens of each row, at least 0. Needed by `method="tokens"`, not read by the others.
        thresholds (`Sequence[float]`, *optional*):
            The `num_levels - 1` increasing cuts of `method="thresholds"`; an error with the others.

    Returns:
        `np.ndarray` of shape `(num_levels - 1,)` and dtype `float64`: increasing cuts; a row at a cut is in the harder
        level.

    Raises:
        `ValueError`: for an unknown method; no rows, or fewer rows or distinct scores than levels; a score that is
        not finite; token counts or thresholds that are missing, out of range or of the wrong length; a level that
        `thresholds` leave empty.

    Example:

    ```python
    >>> from hf_curriculum.curriculum.levels import level_cuts

    >>> level_cuts([1, 2, 3, 10, 11, 30], num_levels=3, method="jenks").tolist()
    [6.5, 20.5]
    ```
    """
    if method not in LEVEL_METHODS:
        raise invalid("method", method, f"one of {', '.join(LEVEL_METHODS)}")
    if (thresholds is None) == (method == "thresholds"):
        expected = "a list of cuts" if method == "thresholds" else "None"
        raise invalid("thresholds", thresholds, f"{expected} with `method={method!r}`")
    scores = _scores(difficulty, num_levels)
    if thresholds is not None:
        return _checked_thresholds(scores, num_levels, thresholds)
    if method == "tokens":
        values, weights = _weigh_by_tokens(scores, token_counts)
    else:
        values, counts = np.unique(scores, return_counts=True)
        weights = counts.astype(np.float64)
    if len(values) < num_levels:
        same = " (all rows have the same score)" if len(values) == 1 else ""
        raise invalid(
            "difficulty",
            f"{len(values)} distinct scores in {len(scores)} rows{same}",
            f"at least {num_levels}, one for each level, since equal scores share a level",
            "Lower `num_levels`, or use a finer scorer.",
        )
    run_cost = _scatter(values, weights) if method == "jenks" else _balance(weights)
    borders = _search_borders(weights, num_levels, run_cost)
    below, above = values[borders - 1], values[borders]
    middle = below / 2 + above / 2
    return np.where(middle > below, middle, above)


def _balance(weights: FloatArray) -> RunCost:
    """Cost of equal weights: the square of a run's weight, `weights` being those of the groups in order."""
    total = _prefix_sums(weights)

    def cost(edges: IntArray) -> FloatArray:
        return _differences(total[edges]) ** 2

    return cost


def _scatter(values: FloatArray, weights: FloatArray) -> RunCost:
    """Cost of natural breaks: the weighted squared distance of a run's values to their mean."""
    # Centred and scaled: the sums of squares would lose all digits at 1e9 + small differences.
    scaled = values / 2 - np.average(values / 2, weights=weights)
    scaled /= np.abs(scaled).max() or 1.0
    totals = [_prefix_sums(weights * scaled**power) for power in range(3)]

    def cost(edges: IntArray) -> FloatArray:
        zeroth, first, second = (_differences(total[edges]) for total in totals)
        return second - np.divide(first**2, zeroth, out=np.zeros_like(first), where=zeroth > 0)

    return cost


def _search_borders(weights: FloatArray, num_levels: int, run_cost: RunCost) -> IntArray:
    """
    Divides groups of rows into runs of least total cost: over bins first, then over finer ones around the best.

    Args:
        weights (`np.ndarray` of shape `(m,)`): weight of each group, in order of difficulty.
        num_levels (`int`): number of runs, at most `m`.
        run_cost (`Callable`): from edges to the table of costs that [`_best_borders`] takes.

    Returns:
        `np.ndarray` of shape `(num_levels - 1,)`: first group of each run but the first, strictly increasing.
    """
    edges = _bin_edges(_prefix_sums(weights), num_levels)
    borders = edges[_best_borders(run_cost(edges), num_levels)]
    reach = max(2, _MAX_BINS // (2 * num_levels))
    gap = int(np.diff(edges).max())
    while gap > 1:
        gap = -(-gap // reach)
        around = borders[:, None] + gap * np.arange(-reach, reach + 1)
        edges = np.unique(np.clip([0, len(weights), *around.ravel()], 0, len(weights)))
        borders = edges[_best_borders(run_cost(edges), num_levels)]
    return borders


def _prefix_sums(values: FloatArray) -> FloatArray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _differences(totals: FloatArray) -> FloatArray:
    """Sums of all runs, from the sums before their edges: `[i, j]` holds that of the run from edge `i` to `j`."""
    return totals[None, :] - totals[:, None]


def _bin_edges(total: FloatArray, num_levels: int) -> IntArray:
    """
    Chooses where runs may begin: everywhere up to 2048 groups, else at evenly spaced weights and at the exact targets.

    Args:
        total (`np.ndarray` of shape `(m + 1,)`): weight before each group, and of all.
        num_levels (`int`): number of runs.

    Returns:
        `np.ndarray`: increasing positions in `[0, m]`, both ends included.
    """
    num_groups = len(total) - 1
    if num_groups <= max(_MAX_BINS, num_levels):
        return np.arange(num_groups + 1)
    targets = np.concatenate(
        [np.linspace(0, total[-1], _MAX_BINS + 1), total[-1] * np.arange(1, num_levels) / num_levels]
    )
    right = np.clip(np.searchsorted(total, targets), 1, num_groups)
    nearest = np.where(targets - total[right - 1] < total[right] - targets, right - 1, right)
    # A tie wider than a bin leaves few positions: without its own neighbours as well, runs could be too few.
    return np.unique(np.concatenate([[0, num_groups], nearest, np.arange(num_levels)]))


def _best_borders(cost: FloatArray, num_levels: int) -> IntArray:
    """
    Divides `b` bins into runs of least total cost, by dynamic programming over all divisions.

    Args:
        cost (`np.ndarray` of shape `(b + 1, b + 1)`): `cost[i, j]` of a run of bins `i` to `j - 1`; only `i < j` is
            read.
        num_levels (`int`): number of runs, at most `b`.

    Returns:
        `np.ndarray` of shape `(num_levels - 1,)`: first bin of each run but the first, strictly increasing.
    """
    reach = np.where(np.tri(len(cost), dtype=bool), np.inf, cost)
    best = reach[0]
    choices = []
    for _ in range(num_levels - 1):
        candidates = best[:, None] + reach
        choice = candidates.argmin(axis=0)
        best = np.take_along_axis(candidates, choice[None, :], axis=0)[0]
        choices.append(choice)
    border, borders = len(cost) - 1, []
    for choice in reversed(choices):
        border = int(choice[border])
        borders.append(border)
    return np.array(borders[::-1], dtype=np.int64)


def _weigh_by_tokens(scores: FloatArray, token_counts: Numbers | None) -> tuple[FloatArray, FloatArray]:
    """Sums the tokens at each distinct score."""
    if token_counts is None:
        raise invalid("token_counts", None, "the number of tokens of each row with `method='tokens'`")
    tokens = _numbers("token_counts", token_counts)
    if len(tokens) != len(scores):
        raise invalid("token_counts", f"{len(tokens)} counts", f"{len(scores)}, one for each difficulty")
    _check_finite("token_counts", tokens)
    if tokens.min() < 0 or tokens.max() == 0:
        wrong = f"{tokens.min():g}" if tokens.min() < 0 else "zeros only"
        raise invalid("token_counts", wrong, "numbers >= 0 that are not all 0")
    order = np.argsort(scores)
    values, starts = np.unique(scores[order], return_index=True)
    return values, np.add.reduceat(tokens[order], starts)


def _checked_thresholds(scores: FloatArray, num_levels: int, thresholds: Sequence[float]) -> FloatArray:
    cuts = _numbers("thresholds", thresholds)
    if len(cuts) != num_levels - 1 or not np.isfinite(cuts).all() or (np.diff(cuts) <= 0).any():
        raise invalid(
            "thresholds",
            list(thresholds),
            f"{num_levels - 1} increasing finite numbers, one less than `num_levels={num_levels}`",
        )
    counts = np.bincount(np.searchsorted(cuts, scores, side="right"), minlength=num_levels)
    if (counts == 0).any():
        raise invalid(
            "thresholds",
            list(thresholds),
            f"at least one row in each level, but the levels hold {counts.tolist()} rows",
            f"Scores go from {scores.min():g} to {scores.max():g}: move the cuts, or use `method='quantile'`.",
        )
    return cuts


def _scores(difficulty: Numbers, num_levels: int) -> FloatArray:
    if num_levels < 1:
        raise invalid("num_levels", num_levels, "an integer >= 1")
    scores = _numbers("difficulty", difficulty)
    _check_finite("difficulty", scores)
    if len(scores) < num_levels:
        raise invalid(
            "difficulty", f"{len(scores)} rows", f"at least {num_levels}, one for each level", "Lower `num_levels`."
        )
    return scores


def _check_finite(name: str, values: FloatArray) -> None:
    if len(values) == 0:
        raise invalid(name, "no rows", "at least one row")
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argmin(finite))
        raise invalid(
            name,
            f"{values[row]} in row {row} ({len(values) - int(finite.sum())} such rows in all)",
            "finite numbers",
            "Drop these rows, or correct their values.",
        )


def _numbers(name: str, values: Numbers) -> FloatArray:
    try:
        # A slice, because a column of a data set is read far faster at once than row by row.
        numbers = np.asarray(values[:], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise invalid(name, f"values that are not numbers ({error})", "a sequence of numbers") from error
    if numbers.ndim != 1:
        raise invalid(name, f"an array of shape {numbers.shape}", "a sequence of numbers, one for each row")
    return numbers
