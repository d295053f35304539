"""
One model's attention against another's on the same texts, with intervals and a baseline.

Shapes: T texts, L layers, H heads, R bootstrap resamples, M measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.console import format_cell, show_table
from ..core.errors import invalid
from .attention_measurement import AttentionMeasurement, mean_without_nan
from .attention_words import CATEGORIES


__all__ = ["Change", "Comparison", "HeadShuffle", "bootstrap_interval", "compare_attention", "shuffled_heads"]

# What the paper's claim is about: more attention on the words that carry the meaning.
CLAIM = ("mass_content", "value_mass_content", "rollout_content", "idf_correlation")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Change:
    """
    A measure before and after, as means over texts.

    Args:
        before (`float`):
            Base model.
        after (`float`):
            Tuned model.
        change (`float`):
            Mean of the texts' changes.
        low (`float`):
            Lower end of its bootstrap interval.
        high (`float`):
            Upper end.
    """

    before: float
    after: float
    change: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`up` or `down` if the interval leaves out 0; `same` if nothing changed; `-` for no value; else `unclear`."""
        if np.isnan(self.change):
            return "-"
        if self.low == self.high == 0:
            return "same"
        return "up" if self.low > 0 else "down" if self.high < 0 else "unclear"


@dataclass(frozen=True)
class HeadShuffle:
    """
    How much the single heads changed, beside how much heads differ anyway.

    Args:
        observed (`float`):
            Mean over layers and heads of |after - before|, each head with itself.
        shuffled (`float`):
            The same where each head is compared with one drawn from its layer; mean of the draws.
        low (`float`):
            Lower end of the central 95 % of the draws.
        high (`float`):
            Upper end.
    """

    observed: float
    shuffled: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """
    Two measurements of the same texts.

    Args:
        changes (`dict[str, Change]`):
            Of each measure of [`~AttentionMeasurement.per_text`].
        by_layer (`dict[str, list[Change]]` of length L):
            Of the mass on each category and each measure per head, layer by layer.
        heads (`dict[str, np.ndarray]` of shape `(L, H)`, float64):
            Change of each measure per head.
        shuffles (`dict[str, HeadShuffle]`):
            The shuffled-head baseline of each measure per head.
        layers (`list[int]` of length L):
            Index of each layer.
        num_texts (`int`):
            T.
    """

    changes: dict[str, Change]
    by_layer: dict[str, list[Change]]
    heads: dict[str, np.ndarray]
    shuffles: dict[str, HeadShuffle]
    layers: list[int]
    num_texts: int

    def show(self, title: str) -> None:
        """
        Prints the changes as a table, then the shuffled-head baseline.

        Args:
            title (`str`):
                One line above.
        """
        # 95 % is the constant `CONFIDENCE`, written out as people read it.
        columns = ["measure", "before", "after", "change", "95 % interval", ""]
        rows = [
            [name, item.before, item.after, item.change, _interval(item), item.verdict]
            for name, item in self.changes.items()
        ]
        show_table(f"{title} ({self.num_texts} texts; means over texts, layers and heads)", columns, rows)
        columns = ["measure", "mean |change| of a head", "heads shuffled within their layer", "95 % of the shuffles"]
        baseline = [[name, item.observed, item.shuffled, _interval(item)] for name, item in self.shuffles.items()]
        show_table("Single heads: their change beside the difference between heads", columns, baseline)

    def claim(self) -> str:
        """The verdicts on the claim that tuning moves attention to semantically central words, in a line."""
        verdicts = [f"{name} {self.changes[name].verdict}" for name in CLAIM]
        return f"More attention on content words after tuning? {', '.join(verdicts)}."


def _interval(item: Change | HeadShuffle) -> str:
    return f"[{format_cell(item.low)}, {format_cell(item.high)}]"


def bootstrap_interval(
    values: np.ndarray, *, resamples: int = 2000, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[np.ndarray, np.ndarray]:
    """
    Percentile interval of the mean over texts, by resampling texts.

    Args:
        values (`np.ndarray` of shape `(T, ...)`):
            One value, or an array of values, per text; NaN where a text has none.
        resamples (`int`, *optional*, defaults to `2000`):
            R.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws: equal seeds draw equal texts.
        confidence (`float`, *optional*, defaults to `0.95`):
            Share of the resampled means inside.

    Returns:
        `tuple[np.ndarray, np.ndarray]` of shape `(...)`: lower and upper end; NaN where no text has a value.
    """
    count = len(values)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)  # [R, T]
    flat = values.reshape(count, -1)
    known = ~np.isnan(flat)
    sizes = (weights @ known).astype(np.float64)
    means = (weights @ np.where(known, flat, 0.0)) / np.where(sizes > 0, sizes, np.nan)
    low, high = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], np.nan)
    some = known.any(axis=0)
    if some.any():  # the quantiles of nothing have no second axis
        low[some], high[some] = np.nanquantile(means[:, some], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def _changes(before: np.ndarray, after: np.ndarray, resamples: int, seed: int) -> list[Change]:
    """Changes of measures side by side, `(T, M)` each."""
    paired = after - before
    low, high = bootstrap_interval(paired, resamples=resamples, seed=seed)
    columns = (mean_without_nan(before, 0), mean_without_nan(after, 0), mean_without_nan(paired, 0), low, high)
    return [Change(*(float(value) for value in values)) for values in zip(*columns)]


def shuffled_heads(before: np.ndarray, after: np.ndarray, *, draws: int = 200, seed: int = 0) -> HeadShuffle:
    """
    Baseline for the change of single heads: the change if each head were compared with another of its layer.

    An observed change far below the shuffled one says that the heads kept their roles; one near it says that a head
    after tuning is as far from itself before as heads are from one another.

    Args:
        before (`np.ndarray` of shape `(L, H)`):
            A measure of each head.
        after (`np.ndarray` of shape `(L, H)`):
            The same after tuning.
        draws (`int`, *optional*, defaults to `200`):
            Permutations, one per layer in each draw.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        [`HeadShuffle`]
    """
    rng = np.random.default_rng(seed)
    sizes = [float(mean_without_nan(np.abs(rng.permuted(after, axis=1) - before), (0, 1))) for _ in range(draws)]
    low, high = np.quantile(sizes, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    observed = float(mean_without_nan(np.abs(after - before), (0, 1)))
    return HeadShuffle(observed, float(np.mean(sizes)), float(low), float(high))


def compare_attention(
    before: AttentionMeasurement, after: AttentionMeasurement, *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """
    Compares two models, text by text.

    Args:
        before ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The base model.
        after ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The tuned model, on the same texts.
        resamples (`int`, *optional*, defaults to `2000`):
            Bootstrap resamples of the texts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap and of the shuffles.

    Returns:
        [`Comparison`]

    Raises:
        `ValueError`: if texts, layers or heads differ.
    """
    if before.fingerprint != after.fingerprint:
        raise invalid(
            "after",
            "a measurement of other texts",
            "the texts of `before`, read to the same length",
            "Measure both with the same texts, rules and `max_length`.",
        )
    if before.mass.shape != after.mass.shape:
        raise invalid(
            "after",
            f"{after.mass.shape[1]} layers of {after.mass.shape[2]} heads",
            f"{before.mass.shape[1]} layers of {before.mass.shape[2]} heads, as in `before`",
        )
    old, new = before.per_text(), after.per_text()
    overall = _changes(
        np.stack(list(old.values()), axis=1), np.stack(list(new.values()), axis=1), resamples, seed
    )  # fmt: skip
    shared = [name for name in before.per_head if name in after.per_head]
    by_layer = {
        name: _changes(_by_layer(before, name), _by_layer(after, name), resamples, seed)
        for name in (*shared, *(name for name in old if name.startswith("mass_")))
    }
    means = {name: [mean_without_nan(side.per_head[name], 0) for side in (before, after)] for name in shared}
    return Comparison(
        changes={name: item for name, item in zip(old, overall) if name in new},
        by_layer=by_layer,
        heads={name: pair[1] - pair[0] for name, pair in means.items()},
        shuffles={name: shuffled_heads(*pair, seed=seed) for name, pair in means.items()},
        layers=before.layers,
        num_texts=len(before.texts),
    )


def _by_layer(measurement: AttentionMeasurement, name: str) -> np.ndarray:
    """A measure per text and layer, `(T, L)`, mean over the heads."""
    if name in measurement.per_head:
        return mean_without_nan(measurement.per_head[name], 2)
    return mean_without_nan(measurement.mass[..., CATEGORIES.index(name.removeprefix("mass_"))], 2)
