"""Accuracy, backward transfer and forgetting as an `evaluate.Metric`, used without the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as SequenceFeature

from ..core.metrics import forgetting_summary


__all__ = ["Forgetting"]

_DESCRIPTION = """
Forgetting over the stages of a run: ACC and backward transfer (GEM), forgetting per level (Chaudhry et al. 2018).
"""

_INPUTS = """
    predictions (`list[list[float]]`): one row per stage, one score per level in each; None or NaN where not measured.
    introduced_at (`list[int | None]`): for each level the stage after which it was first trained, or None.
    higher_is_better (`bool`, *optional*, defaults to `False`): True for an accuracy, False for a loss.
"""

_CITATION = """
@inproceedings{lopezpaz2017gradient,
  title={Gradient Episodic Memory for Continual Learning},
  author={Lopez-Paz, David and Ranzato, Marc'Aurelio},
  booktitle={NeurIPS},
  year={2017}
}
@inproceedings{chaudhry2018riemannian,
  title={Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence},
  author={Chaudhry, Arslan and Dokania, Puneet K. and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle={ECCV},
  year={2018}
}
"""


class Forgetting(evaluate.Metric):
    """
    How much a run forgot, from its stage x level matrix.

    Takes no `references`. Scores are float64 throughout: the `float32` that most metrics declare would round losses.

    Args:
        config_name (`str`, *optional*):
            As in [`~evaluate.EvaluationModule`].
        keep_in_memory (`bool`, *optional*, defaults to `True`):
            Whether rows stay in memory. A matrix is small, and in memory an error leaves neither a file nor a lock.
        **kwargs:
            Passed on to [`~evaluate.EvaluationModule`]; `cache_dir` is the only folder that is written to.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> from hf_curriculum import Forgetting

    >>> metric = Forgetting(cache_dir=mkdtemp())
    >>> metric.compute(predictions=[[1.0, 3.0], [1.5, 2.0]], introduced_at=[0, 1])
    {'acc': 1.75, 'bwt': -0.5, 'forgetting': [0.5, -1.0]}
    ```
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features({"predictions": SequenceFeature(Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/1706.08840", "https://arxiv.org/abs/1801.10112"],
        )

    def _compute(
        self,
        *,
        predictions: Sequence[Sequence[float | None]],
        introduced_at: Sequence[int | None],
        higher_is_better: bool = False,
    ) -> dict[str, float | list[float] | None]:
        """
        Computes the three measures; [`~evaluate.EvaluationModule.compute`] calls it.

        Args:
            predictions (`Sequence[Sequence[float | None]]` of shape `(S, L)`):
                Score after each stage (row) on each level (column); None or NaN where not measured.
            introduced_at (`Sequence[int | None]` of length `L`):
                Stage after which each level was first trained, or None.
            higher_is_better (`bool`, *optional*, defaults to `False`):
                Direction of the scores: True for an accuracy, False for a loss.

        Returns:
            `dict`: `acc` (mean of the last row, no sign changed), `bwt` (negative = forgetting; None if no level
            qualifies) and `forgetting` (per level, positive = forgotten, NaN where not defined).
        """
        matrix = [[float("nan") if score is None else score for score in row] for row in predictions]
        summary = forgetting_summary(matrix, introduced_at, higher_is_better)
        return {"acc": summary.acc, "bwt": summary.bwt, "forgetting": list(summary.forgetting)}
