"""
Scores of classifiers and regressors as `evaluate.Metric` modules, used without the Hub.

Pure functions first, on arrays of float64 or int64; then the modules, which hold no arithmetic. Shapes: N rows, C
classes. Each is what scikit-learn computes under its defaults, unless a deviation is stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import evaluate
import numpy as np
import numpy.typing as npt
from datasets import Features, Value
from datasets import Sequence as SequenceFeature

from ..core.errors import invalid
from ..core.ranks import spearman


__all__ = [
    "Accuracy",
    "CalibrationError",
    "Correlation",
    "MacroF1",
    "MatthewsCorrelation",
    "MultiLabelF1",
    "accuracy",
    "expected_calibration_error",
    "macro_f1",
    "matthews_correlation",
    "multi_label_f1",
    "pearson",
]

Array: TypeAlias = npt.ArrayLike


def _pair(predictions: Array, references: Array, *, same_shape: bool = True) -> tuple[np.ndarray, np.ndarray]:
    found, wanted = np.asarray(predictions), np.asarray(references)
    if len(found) == 0 or len(found) != len(wanted) or (same_shape and found.shape != wanted.shape):
        raise invalid("predictions", f"shape {found.shape}", f"as many rows as references, {wanted.shape}, not 0")
    return found, wanted


def accuracy(predictions: Array, references: Array) -> float:
    """
    Share of rows whose class is right.

    Args:
        predictions (array of shape `(N,)`):
            Predicted classes.
        references (array of shape `(N,)`):
            True classes.

    Returns:
        `float` in [0, 1].
    """
    found, wanted = _pair(predictions, references)
    return float((found == wanted).mean())


def _f1(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """F1 of each column of two indicator matrices, NaN where a column is empty in both."""
    hits = (found & wanted).sum(axis=0)
    total = found.sum(axis=0) + wanted.sum(axis=0)
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)


def macro_f1(predictions: Array, references: Array) -> float:
    """
    Mean over classes of the harmonic mean of precision and recall.

    Args:
        predictions (array of shape `(N,)`):
            Predicted classes.
        references (array of shape `(N,)`):
            True classes.

    Returns:
        `float` in [0, 1]: over the classes that occur on either side; one that is never right counts 0.
    """
    found, wanted = _pair(predictions, references)
    classes = np.union1d(found, wanted)
    return float(_f1(found[:, None] == classes, wanted[:, None] == classes).mean())


def matthews_correlation(predictions: Array, references: Array) -> float:
    """
    Matthews' correlation for any number of classes (Gorodkin 2004, the R_K statistic).

    Args:
        predictions (array of shape `(N,)`):
            Predicted classes.
        references (array of shape `(N,)`):
            True classes.

    Returns:
        `float` in [-1, 1]; 0 if either side has one class only, where it is not defined.
    """
    found, wanted = _pair(predictions, references)
    classes = np.union1d(found, wanted)
    predicted = (found[:, None] == classes).sum(axis=0).astype(np.float64)
    true = (wanted[:, None] == classes).sum(axis=0).astype(np.float64)
    rows, hits = float(len(found)), float((found == wanted).sum())
    spread = np.sqrt((rows**2 - (predicted**2).sum()) * (rows**2 - (true**2).sum()))
    return float((hits * rows - predicted @ true) / spread) if spread > 0 else 0.0


def multi_label_f1(predictions: Array, references: Array) -> dict[str, float]:
    """
    F1 where a row may have any number of classes.

    Args:
        predictions (array of shape `(N, C)`):
            1 where a class is predicted, else 0.
        references (array of shape `(N, C)`):
            1 where it is true, else 0.

    Returns:
        `dict[str, float]`: `micro_f1`, over all cells; `macro_f1`, the mean over classes that occur on either side
        (deviation: scikit-learn counts the others as 0). NaN if no class occurs.

    Raises:
        `ValueError`: for other shapes or values.
    """
    found, wanted = _pair(predictions, references)
    if found.ndim != 2 or not (np.isin(found, (0, 1)).all() and np.isin(wanted, (0, 1)).all()):
        raise invalid("predictions", f"an array of shape {found.shape}", "0 and 1 for each row and class")
    found, wanted = found.astype(bool), wanted.astype(bool)
    each = _f1(found, wanted)
    occurring = each[~np.isnan(each)]
    return {
        "micro_f1": float(_f1(found.reshape(-1, 1), wanted.reshape(-1, 1))[0]),
        "macro_f1": float(occurring.mean()) if len(occurring) else float("nan"),
    }


def pearson(predictions: Array, references: Array) -> float:
    """
    Pearson's correlation.

    Args:
        predictions (array of shape `(N,)`):
            Numbers.
        references (array of shape `(N,)`):
            Numbers.

    Returns:
        `float` in [-1, 1]; NaN if either is constant.
    """
    found, wanted = (values.astype(np.float64) for values in _pair(predictions, references))
    found, wanted = found - found.mean(), wanted - wanted.mean()
    # Scaled first: squares of very small or large numbers would leave the range of floats.
    scales = [float(np.abs(values).max()) for values in (found, wanted)]
    if min(scales) == 0:
        return float("nan")
    found, wanted = found / scales[0], wanted / scales[1]
    return float(np.clip(found @ wanted / np.sqrt((found @ found) * (wanted @ wanted)), -1.0, 1.0))


def expected_calibration_error(probabilities: Array, references: Array, num_bins: int = 15) -> float:
    r"""
    ECE, how far confidence is from accuracy.

    `ECE = sum_m |B_m| / N |acc(B_m) - conf(B_m)|` over bins of equal width of the confidence, the highest probability
    of each row (Guo et al. 2017, arXiv 1706.04599, eq. 3, with its 15 bins). Bin m holds confidences in
    ((m - 1)/M, m/M].

    Args:
        probabilities (array of shape `(N, C)`):
            Of each class; each row sums to 1.
        references (array of shape `(N,)`):
            True classes, in [0, C).
        num_bins (`int`, *optional*, defaults to `15`):
            M, at least 1.

    Returns:
        `float` in [0, 1]; 0 is calibrated.

    Raises:
        `ValueError`: for rows that are no distributions, or classes out of range.
    """
    shares, wanted = _pair(probabilities, references, same_shape=False)
    if num_bins < 1:
        raise invalid("num_bins", num_bins, "an integer >= 1")
    if shares.ndim != 2 or (shares < 0).any() or not np.allclose(shares.sum(axis=1), 1.0, atol=1e-3):
        raise invalid("predictions", f"an array of shape {shares.shape}", "rows of probabilities that sum to 1")
    if wanted.min() < 0 or wanted.max() >= shares.shape[1]:
        raise invalid("references", f"classes {wanted.min()} to {wanted.max()}", f"classes in [0, {shares.shape[1]})")
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == wanted
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(wanted))


class _InMemoryMetric(evaluate.Metric):
    """Keeps rows in memory: an error then leaves neither a file nor a lock."""

    _about = ""
    _columns: ClassVar[Mapping[str, Any]] = {}
    _urls: Sequence[str] = ()

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._about,
            citation="",
            inputs_description="predictions and references, one of each per row",
            features=Features(self._columns),
            reference_urls=list(self._urls),
        )


_CLASSES = {"predictions": Value("int64"), "references": Value("int64")}


class Accuracy(_InMemoryMetric):
    """
    [`accuracy`] of classes, under the key `accuracy`.

    Args:
        config_name (`str`, *optional*):
            As in [`~evaluate.EvaluationModule`].
        keep_in_memory (`bool`, *optional*, defaults to `True`):
            Whether rows stay in memory.
        **kwargs:
            Passed on; `cache_dir` is the only folder that is written to.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> from hf_curriculum.analysis.classification_metrics import Accuracy

    >>> Accuracy(cache_dir=mkdtemp()).compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2])
    {'accuracy': 0.75}
    ```
    """

    _about = "Share of rows whose class is right."
    _columns: ClassVar[Mapping[str, Any]] = _CLASSES

    def _compute(self, *, predictions: Array, references: Array) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}


class MacroF1(_InMemoryMetric):
    """[`macro_f1`] of classes, under the key `macro_f1`. Arguments as in [`Accuracy`]."""

    _about = "Mean over classes of the harmonic mean of precision and recall."
    _columns: ClassVar[Mapping[str, Any]] = _CLASSES

    def _compute(self, *, predictions: Array, references: Array) -> dict[str, float]:
        return {"macro_f1": macro_f1(predictions, references)}


class MatthewsCorrelation(_InMemoryMetric):
    """[`matthews_correlation`] of classes, under the key `matthews_correlation`. Arguments as in [`Accuracy`]."""

    _about = "Matthews' correlation for any number of classes."
    _columns: ClassVar[Mapping[str, Any]] = _CLASSES

    def _compute(self, *, predictions: Array, references: Array) -> dict[str, float]:
        return {"matthews_correlation": matthews_correlation(predictions, references)}


class MultiLabelF1(_InMemoryMetric):
    """
    [`multi_label_f1`] of rows of 0 and 1, under the keys `micro_f1` and `macro_f1`.

    Arguments as in [`Accuracy`].
    """

    _about = "F1 where a row may have any number of classes."
    _columns: ClassVar[Mapping[str, Any]] = {name: SequenceFeature(Value("int64")) for name in _CLASSES}

    def _compute(self, *, predictions: Array, references: Array) -> dict[str, float]:
        return multi_label_f1(predictions, references)


class Correlation(_InMemoryMetric):
    """
    [`pearson`] and Spearman's correlation of numbers, under the keys `pearson` and `spearman`.

    Arguments as in [`Accuracy`].
    """

    _about = "Pearson's and Spearman's correlation, ties at their mean rank."
    _columns: ClassVar[Mapping[str, Any]] = {name: Value("float64") for name in _CLASSES}

    def _compute(self, *, predictions: Array, references: Array) -> dict[str, float]:
        ranks = spearman(np.asarray(predictions), np.asarray(references))
        return {"pearson": pearson(predictions, references), "spearman": ranks}


class CalibrationError(_InMemoryMetric):
    """
    [`expected_calibration_error`] of rows of probabilities, under the key `ece`.

    Arguments as in [`Accuracy`]; `compute` takes `num_bins` as well.
    """

    _about = "Expected calibration error over bins of equal width."
    _columns: ClassVar[Mapping[str, Any]] = {
        "predictions": SequenceFeature(Value("float64")),
        "references": Value("int64"),
    }
    _urls = ("https://arxiv.org/abs/1706.04599",)

    def _compute(self, *, predictions: Array, references: Array, num_bins: int = 15) -> dict[str, float]:
        return {"ece": expected_calibration_error(predictions, references, num_bins)}
