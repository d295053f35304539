"""Rank correlation, ties at their mean rank."""

import numpy as np


__all__ = ["mean_ranks", "spearman"]


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """
    Ranks of numbers, ties at their mean rank.

    Args:
        values (`np.ndarray` of shape `(N,)`):
            Numbers.

    Returns:
        `np.ndarray` of shape `(N,)`, float64: 1 for the smallest.
    """
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2.0


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """
    Spearman's rank correlation.

    Args:
        first (`np.ndarray` of shape `(N,)`):
            Numbers.
        second (`np.ndarray` of shape `(N,)`):
            Numbers.

    Returns:
        `float` in [-1, 1]; NaN if either is constant.
    """
    ranks = [mean_ranks(np.asarray(values)) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else float("nan")
