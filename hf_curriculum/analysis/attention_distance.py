r"""
What attention would be if it followed distance alone: the yardstick for the attention that a word receives.

A late token is seen by few queries, all of them near; an early one mostly by queries far away. Heads that look at what
is near would so make every late word look central, whatever it means. The yardstick is the head that gives the key k
of a query q the mass

    f(q - k) / sum of f(q - j) over the keys j of q,

with the f that has the observed mass at every distance (the maximum-likelihood fit, by the usual alternation of
Luce's choice model: f(d) <- observed mass at d / sum over queries with a key at d of 1 / sum of f over their keys).
Received attention is told as a ratio to it: 1 is what distance explains.

Shapes: M heads, S positions of the longest text, T positions of a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


__all__ = ["expected_received", "fit_distance_profile"]

# The fit only has to be a good yardstick: after ten rounds the remaining change is far below a per cent (measured on
# the models of docs/attention.md).
ROUNDS = 10


def _sums_over_keys(profile: np.ndarray, length: int) -> np.ndarray:
    """Sum of f(q - k) over the keys k = 1 .. T - 1 of each query q = 0 .. T - 1, `(M, T)`; the sink 0 is no key."""
    middle = profile.shape[1] // 2
    running = np.concatenate([np.zeros((len(profile), 1)), np.cumsum(profile, axis=1)], axis=1)
    queries = np.arange(length)
    sums: np.ndarray = running[:, middle + queries] - running[:, middle + queries - (length - 1)]
    return sums


def _inverse(sums: np.ndarray, causal: bool) -> np.ndarray:
    """1 / sums for the queries that count: those with two keys beside the sink."""
    inverse = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
    if causal:
        inverse[:, :2] = 0.0
    return inverse if inverse.shape[1] >= 3 else np.zeros_like(inverse)


def fit_distance_profile(observed: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """
    Fits the head that looks at distance alone.

    Args:
        observed (`np.ndarray` of shape `(M, 2 S - 1)`):
            Mass at each distance q - k from -(S - 1) to S - 1, summed over queries and texts, sink taken out.
        lengths (`Sequence[int]`):
            Tokens of each text.

    Returns:
        `np.ndarray` of shape `(M, 2 S - 1)`, float64: f, 0 where no mass was observed.
    """
    middle = observed.shape[1] // 2
    causal = bool((observed[:, :middle] == 0).all())
    counts = Counter(int(length) for length in lengths if length > 0)
    profile = (observed > 0).astype(np.float64)
    for _ in range(ROUNDS):
        weights = np.zeros_like(profile)
        for length, count in counts.items():
            inverse = _inverse(_sums_over_keys(profile, length), causal)
            running = np.concatenate([np.zeros((len(profile), 1)), np.cumsum(inverse, axis=1)], axis=1)
            # The queries with a key at distance d are max(0, d + 1) .. min(T - 1, d + T - 1).
            distances = np.arange(1 - length, length)
            first = np.clip(distances + 1, 0, length)
            last = np.clip(distances + length, 0, length)
            weights[:, middle + distances] += count * (running[:, last] - running[:, np.minimum(first, last)])
        profile = np.divide(observed, weights, out=np.zeros_like(profile), where=weights > 0)
        profile /= np.maximum(profile.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return profile


def expected_received(profile: np.ndarray, length: int) -> np.ndarray:
    """
    Attention that each token of a text receives from a head that looks at distance alone.

    Args:
        profile (`np.ndarray` of shape `(M, 2 S - 1)`):
            From [`fit_distance_profile`].
        length (`int`):
            T.

    Returns:
        `np.ndarray` of shape `(M, T)`, float64: sum over the queries that count; 0 for the sink.
    """
    if length == 0:
        return np.zeros((len(profile), 0))
    middle = profile.shape[1] // 2
    causal = bool((profile[:, :middle] == 0).all())
    inverse = _inverse(_sums_over_keys(profile, length), causal)
    near = profile[:, middle - (length - 1) : middle + length]  # distances -(T - 1) .. T - 1
    # Sum over q of f(q - k) / sums(q) is a correlation; T^2 products per head would take longer than the model.
    size = 4 * length
    spectrum = np.fft.rfft(near[:, ::-1], size) * np.fft.rfft(inverse, size)
    received = np.fft.irfft(spectrum, size)[:, length - 1 : 2 * length - 1]
    received[:, 0] = 0.0
    return np.maximum(received, 0.0)
