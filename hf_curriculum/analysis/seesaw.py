"""Gains and losses of tasks trained together as an `evaluate.Metric`, used without the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value

from ..core.console import show_table
from ..core.errors import invalid
from ..core.metrics import seesaw_summary


__all__ = ["Seesaw", "show_seesaw"]

_DESCRIPTION = """
The seesaw of multi-task learning: each task's score against the one it has when trained alone.
"""

_INPUTS = """
    predictions (`list[float]`): the score of each task, trained together.
    references (`list[float]`): the score of each task, trained alone.
    task_names (`list[str]`, *optional*): names of the tasks. Defaults to their numbers.
    higher_is_better (`bool` or `list[bool]`, *optional*, defaults to `True`): True for an accuracy, False for a loss.
    tolerance (`float`, *optional*, defaults to 0): a change of at most this size is neither gain nor loss.
"""

_CITATION = """
@inproceedings{tang2020progressive,
  title={Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized Recommendations},
  author={Tang, Hongyan and Liu, Junning and Zhao, Ming and Gong, Xudong},
  booktitle={RecSys},
  year={2020}
}
@inproceedings{maninis2019attentive,
  title={Attentive Single-Tasking of Multiple Tasks},
  author={Maninis, Kevis-Kokitsi and Radosavovic, Ilija and Kokkinos, Iasonas},
  booktitle={CVPR},
  year={2019}
}
"""


class Seesaw(evaluate.Metric):
    """
    Who gained and who lost by being trained together.

    Scores are float64 throughout: the `float32` that most metrics declare would round small changes.

    Args:
        config_name (`str`, *optional*):
            As in [`~evaluate.EvaluationModule`].
        keep_in_memory (`bool`, *optional*, defaults to `True`):
            Whether rows stay in memory. There is one per task, and in memory an error leaves neither a file nor a
            lock.
        **kwargs:
            Passed on to [`~evaluate.EvaluationModule`]; `cache_dir` is the only folder that is written to.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> from hf_curriculum.analysis.seesaw import Seesaw

    >>> metric = Seesaw(cache_dir=mkdtemp())
    >>> found = metric.compute(predictions=[0.75, 0.5], references=[0.5, 0.625], task_names=["sum", "sort"])
    >>> found["gained"], found["lost"], found["worst_change"], found["mean"]
    (['sum'], ['sort'], -0.125, 0.0625)
    ```
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
            reference_urls=["https://arxiv.org/abs/1904.08918"],
        )

    def _compute(
        self,
        *,
        predictions: Sequence[float],
        references: Sequence[float],
        task_names: Sequence[str] | None = None,
        higher_is_better: bool | Sequence[bool] = True,
        tolerance: float = 0.0,
    ) -> dict[str, Any]:
        """
        Compares the scores; [`~evaluate.EvaluationModule.compute`] calls it.

        Args:
            predictions (`Sequence[float]` of length T):
                Scores of the tasks trained together.
            references (`Sequence[float]` of length T):
                Scores of each trained alone.
            task_names (`Sequence[str]` of length T, *optional*):
                Names. Defaults to the numbers from 0.
            higher_is_better (`bool` or `Sequence[bool]`, *optional*, defaults to `True`):
                Direction of the scores.
            tolerance (`float`, *optional*, defaults to `0.0`):
                A change of at most this size is neither gain nor loss.

        Returns:
            `dict`: `changes` (by task; positive = better than alone, for a loss as for an accuracy), `mean`,
            `relative_mean` (NaN if a baseline is 0), `gained` and `lost` (names), `worst_task` and `worst_change`
            (the smallest change, which is a loss only if negative).
        """
        names = [str(number) for number in range(len(predictions))] if task_names is None else list(task_names)
        if len(names) != len(predictions) or len(set(names)) != len(names):
            raise invalid("task_names", names, f"{len(predictions)} different names, one for each task")
        summary = seesaw_summary(predictions, references, higher_is_better, tolerance)
        return {
            "changes": dict(zip(names, summary.changes, strict=True)),
            "mean": summary.mean,
            "relative_mean": summary.relative_mean,
            "gained": [names[task] for task in summary.gained],
            "lost": [names[task] for task in summary.lost],
            "worst_task": names[summary.worst],
            "worst_change": summary.changes[summary.worst],
        }


def show_seesaw(
    predictions: Sequence[float],
    references: Sequence[float],
    task_names: Sequence[str],
    higher_is_better: bool | Sequence[bool] = True,
    tolerance: float = 0.0,
) -> None:
    """
    Prints the seesaw as a table, on the main process. Arguments as in [`Seesaw`].

    Args:
        predictions (`Sequence[float]` of length T):
            Scores of the tasks trained together.
        references (`Sequence[float]` of length T):
            Scores of each trained alone.
        task_names (`Sequence[str]` of length T):
            Names.
        higher_is_better (`bool` or `Sequence[bool]`, *optional*, defaults to `True`):
            Direction of the scores.
        tolerance (`float`, *optional*, defaults to `0.0`):
            A change of at most this size is neither gain nor loss.
    """
    summary = seesaw_summary(predictions, references, higher_is_better, tolerance)
    words = dict.fromkeys(summary.gained, "gained") | dict.fromkeys(summary.lost, "lost")
    columns = ("task", "alone", "together", "change (> 0: better)", "")
    rows: list[list[object]] = [
        [name, float(alone), float(together), change, words.get(task, "")]
        for task, (name, alone, together, change) in enumerate(
            zip(task_names, references, predictions, summary.changes, strict=True)
        )
    ]
    title = f"Seesaw: {len(summary.gained)} gained, {len(summary.lost)} lost, mean change {summary.mean:+.4g}"
    show_table(title, columns, rows)
