"""The stage x level matrix: what each stage did to every level. Arithmetic on plain values, and its tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.console import show_table
from ..core.metrics import forgetting_summary
from ..core.stages import Stage


__all__ = ["LevelMatrix", "is_loss", "level_name"]


def level_name(level: int) -> str:
    """Name of a level in metric keys, `level_<i>`."""
    return f"level_{level}"


def is_loss(metric: str) -> bool:
    """Whether a lower value of the metric is better, told from its name: losses and perplexities; all others rise."""
    return metric.endswith(("loss", "perplexity"))


class LevelMatrix:
    """
    Metrics of every level at the end of every stage, in the order in which they are measured.

    Args:
        stages (`Sequence[Stage]`):
            The plan's stages.
        num_levels (`int`):
            K.
    """

    def __init__(self, stages: Sequence[Stage], num_levels: int) -> None:
        self.stages = stages
        self.num_levels = num_levels
        self._rows: dict[int, dict[str, list[float | None]]] = {}

    @property
    def introduced_at(self) -> list[int | None]:
        """For each level the stage that first trained on it; None where stages do not follow levels."""
        found = {level: stage.index for stage in self.stages for level in stage.introduces}
        return [found.get(level) for level in range(self.num_levels)]

    def add(self, stage: int, metrics: Mapping[int, Mapping[str, float]]) -> dict[str, list[float | None]]:
        """
        Adds the end of a stage.

        Args:
            stage (`int`):
                Its index.
            metrics (`Mapping[int, Mapping[str, float]]`):
                For each level with evaluation rows, its metrics by bare name (`loss`, `accuracy`).

        Returns:
            `dict[str, list]`: for each metric the K values, None for a level without evaluation rows.
        """
        names = sorted({name for values in metrics.values() for name in values})
        row: dict[str, list[float | None]] = {
            name: [metrics.get(level, {}).get(name) for level in range(self.num_levels)] for name in names
        }
        self._rows[stage] = row
        return row

    def matrix(self, metric: str) -> np.ndarray:
        """
        One metric.

        Args:
            metric (`str`):
                Its bare name.

        Returns:
            `np.ndarray` of shape `(num_stages, K)`, float64: NaN where nothing was measured.
        """
        empty = [None] * self.num_levels
        rows = [self._rows.get(stage.index, {}).get(metric, empty) for stage in self.stages]
        return np.array([[math.nan if value is None else value for value in row] for row in rows])

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics measured so far, the loss first."""
        names = {name for row in self._rows.values() for name in row}
        return sorted(names, key=lambda name: (name != "loss", name))

    def forgetting(self) -> dict[str, float]:
        """
        ACC, BWT and forgetting per level of every metric, under the key habits of the Trainer.

        Returns:
            `dict[str, float]`: `eval_<metric>_acc` (mean over levels at the end), `eval_<metric>_bwt` (negative:
            forgotten, for a loss as for an accuracy), `eval_<metric>_forgetting_level_<i>` (positive: forgotten).
            Values that are not defined are left out.
        """
        found: dict[str, float] = {}
        for metric in self.metrics:
            summary = forgetting_summary(self.matrix(metric), self.introduced_at, higher_is_better=not is_loss(metric))
            values = {"acc": summary.acc, "bwt": summary.bwt}
            values |= {f"forgetting_{level_name(i)}": value for i, value in enumerate(summary.forgetting)}
            for name, value in values.items():
                if value is not None and not math.isnan(value):
                    found[f"eval_{metric}_{name}"] = float(value)
        return found

    def show(self) -> None:
        """Prints the matrix of every metric, with ACC, BWT and forgetting below."""
        for metric in self.metrics:
            values = self.matrix(metric)
            better = "lower is better" if is_loss(metric) else "higher is better"
            summary = forgetting_summary(values, self.introduced_at, higher_is_better=not is_loss(metric))
            rows: list[list[object]] = [
                [
                    f"after stage {stage.index}",
                    *map(float, values[stage.index]),
                    float(np.nanmean(values[stage.index])),
                ]
                for stage in self.stages
                if not np.isnan(values[stage.index]).all()
            ]
            rows.append(["forgetting (> 0: forgotten)", *map(float, summary.forgetting), None])
            show_table(
                f"eval_{metric} by level ({better}); ACC {summary.acc:.4g}"
                + ("" if summary.bwt is None else f", BWT {summary.bwt:+.4g} (< 0: forgotten)"),
                ["", *(f"level {level}" for level in range(self.num_levels)), "mean"],
                rows,
            )

    def state(self) -> dict[str, Any]:
        """JSON values to put into a checkpoint."""
        return {str(stage): row for stage, row in self._rows.items()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """
        Forgets everything, then takes over what a checkpoint holds.

        Args:
            state (`Mapping`, *optional*):
                What [`state`] gave.
        """
        self._rows = {int(stage): dict(row) for stage, row in (state or {}).items()}
