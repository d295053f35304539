"""The stage x level matrix: what each stage did to every level. Arithmetic on plain values, and its tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.console import show_table
from ..core.metrics import forgetting_summary
from ..core.stages import Stage


__all__ = ["LevelMatrix", "is_distance", "is_loss", "level_name"]


def level_name(level: int) -> str:
    """Name of a level in metric keys, `level_<i>`."""
    return f"level_{level}"


# Last words of metric names whose values are better when lower; all others are taken to be better when higher.
FALLING = {"loss", "perplexity", "ppl", "wer", "cer", "mse", "rmse", "mae", "error", "ece", "brier"}


def is_loss(metric: str) -> bool:
    """Whether a lower value of the metric is better, told from the end of its name (`wer`, `val_loss`)."""
    return metric.rpartition("_")[2] in FALLING or metric.endswith("error_rate")


def is_distance(metric: str) -> bool:
    """Whether the metric says how far two models are apart (`kl_to_previous_stage`): nothing to be forgotten."""
    return metric.startswith("kl_")


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
    def measured(self) -> list[Stage]:
        """The stages whose end was measured: all of them, unless the run stopped early."""
        return [stage for stage in self.stages if stage.index in self._rows]

    @property
    def introduced_at(self) -> list[int | None]:
        """For each level the row of the matrix that first trained on it; None where stages do not follow levels."""
        found = {level: row for row, stage in enumerate(self.measured) for level in stage.introduces}
        return [found.get(level) for level in range(self.num_levels)]

    def add(self, stage: int, metrics: Mapping[str, float]) -> dict[str, list[float | None]]:
        """
        Adds the end of a stage.

        Args:
            stage (`int`):
                Its index.
            metrics (`Mapping[str, float]`):
                `eval_level_<i>_<metric>`, for each level with evaluation rows. What is not a number is left out.

        Returns:
            `dict[str, list]`: by the metric's bare name the K values, None for a level without evaluation rows.
        """
        row: dict[str, list[float | None]] = {}
        for level in range(self.num_levels):
            prefix = f"eval_{level_name(level)}_"
            for key, value in metrics.items():
                if not key.startswith(prefix) or not isinstance(value, int | float):
                    continue
                row.setdefault(key.removeprefix(prefix), [None] * self.num_levels)[level] = float(value)
        self._rows[stage] = row
        return row

    def matrix(self, metric: str) -> np.ndarray:
        """
        One metric.

        Args:
            metric (`str`):
                Its bare name.

        Returns:
            `np.ndarray` of shape `(T, K)`, float64, for the T stages measured: NaN where there is no value.
        """
        empty = [None] * self.num_levels
        rows = [self._rows[stage.index].get(metric, empty) for stage in self.measured]
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
            if is_distance(metric):
                continue
            summary = forgetting_summary(self.matrix(metric), self.introduced_at, higher_is_better=not is_loss(metric))
            values = {"acc": summary.acc, "bwt": summary.bwt}
            values |= {f"forgetting_{level_name(i)}": value for i, value in enumerate(summary.forgetting)}
            for name, value in values.items():
                if value is not None and not math.isnan(value):
                    found[f"eval_{metric}_{name}"] = float(value)
        return found

    def show(self) -> None:
        """Prints the matrix of every metric, with ACC, BWT and forgetting where something can be forgotten."""
        for metric in self.metrics:
            values = self.matrix(metric)
            rows: list[list[object]] = [
                [f"after stage {stage.index}", *map(float, row), float(np.nanmean(row))]
                for stage, row in zip(self.measured, values, strict=True)
                if not np.isnan(row).all()
            ]
            title = f"eval_{metric} by level"
            if not is_distance(metric):
                better = "lower is better" if is_loss(metric) else "higher is better"
                summary = forgetting_summary(values, self.introduced_at, higher_is_better=not is_loss(metric))
                rows.append(["forgetting (> 0: forgotten)", *map(float, summary.forgetting), None])
                title += f" ({better}); ACC {summary.acc:.4g}"
                title += "" if summary.bwt is None else f", BWT {summary.bwt:+.4g} (< 0: forgotten)"
            show_table(title, ["", *(f"level {level}" for level in range(self.num_levels)), "mean"], rows)

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
