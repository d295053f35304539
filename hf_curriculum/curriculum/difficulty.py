"""Scorers: where the difficulty of a row comes from. Each by name, or an object of the user's behind one protocol."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from ..core.errors import invalid
from .config import CurriculumConfig
from .scoring import ScoringInputs, check_row_losses, score_rows
from .self_paced import SelfPacedScorer


__all__ = ["ColumnScorer", "DifficultyScorer", "LengthScorer", "LossScorer", "build_scorer"]


@runtime_checkable
class DifficultyScorer(Protocol):
    """
    What a scorer offers: two attributes and two methods.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_curriculum import CurriculumConfig


    >>> class FewestLabels:
    ...     name, uses_model = "fewest_labels", False
    ...
    ...     def settings(self):
    ...         return {}
    ...
    ...     def score(self, inputs):
    ...         return inputs.label_counts.astype(np.float64)


    >>> config = CurriculumConfig(scorer=FewestLabels())
    ```
    """

    @property
    def name(self) -> str:
        """Its name in tables and in the run record."""

    @property
    def uses_model(self) -> bool:
        """Whether it runs the model. Only such scores are cached, under a fingerprint of the weights."""

    def settings(self) -> dict[str, Any]:
        """JSON values that the score depends on, besides rows, weights and seed; part of the cache's fingerprint."""

    def score(self, inputs: ScoringInputs) -> np.ndarray:
        """
        Scores rows. Called on every rank, and must give every rank the same result.

        Args:
            inputs ([`~hf_curriculum.curriculum.scoring.ScoringInputs`]):
                N tokenised rows, the model, and how to run it.

        Returns:
            `np.ndarray` of shape `(N,)`, float64, finite: higher is harder.
        """


@dataclass(frozen=True)
class LossScorer:
    """
    The model's loss on each row as it stands: one forward pass without full logits.

    Args:
        loss_normalization (`str`):
            `"token"` for the mean over labelled tokens, `"sample"` for their sum.
    """

    loss_normalization: str
    name: str = "loss"
    uses_model: bool = True

    def settings(self) -> dict[str, Any]:
        """What the result depends on besides rows and weights."""
        return dict(vars(self))

    def score(self, inputs: ScoringInputs) -> np.ndarray:
        """Loss in nats, shape `(N,)`."""
        if inputs.model is None:
            raise invalid("model", None, "a model for `scorer='loss'`")
        check_row_losses(inputs, inputs.model)
        losses, counts = score_rows(inputs, inputs.model, "Scoring: loss")
        return losses / counts if self.loss_normalization == "token" else losses


@dataclass(frozen=True)
class LengthScorer:
    """Number of tokens of each row: the baseline that every other scorer should beat."""

    name: str = "length"
    uses_model: bool = False

    def settings(self) -> dict[str, Any]:
        """Nothing to set."""
        return dict(vars(self))

    def score(self, inputs: ScoringInputs) -> np.ndarray:
        """Tokens, shape `(N,)`."""
        return inputs.lengths.astype(np.float64)


@dataclass(frozen=True)
class ColumnScorer:
    """
    The user's own score.

    Args:
        column (`str`):
            Numeric column of the data set.
    """

    column: str
    name: str = "column"
    uses_model: bool = False

    def settings(self) -> dict[str, Any]:
        """The column's name; its values are part of the rows."""
        return dict(vars(self))

    def score(self, inputs: ScoringInputs) -> np.ndarray:
        """
        The column's values, shape `(N,)`.

        Raises:
            `ValueError`: if the column is missing, not numeric, or has missing values.
        """
        if self.column not in inputs.rows.column_names:
            raise invalid(
                "difficulty_column",
                self.column,
                f"a column of the data set, which has {', '.join(inputs.rows.column_names)}",
                "`score_dataset` adds one.",
            )
        # Through Arrow: the numpy format of `datasets` rounds to float32.
        column = inputs.rows.with_format("arrow")[:].column(self.column)
        if not (
            pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)
        ):
            raise invalid(f"column {self.column}", str(column.type), "numbers, one per row")
        values = column.cast(pa.float64(), safe=False).to_numpy()  # integers beyond 2^53 are rounded
        missing = np.flatnonzero(~np.isfinite(values))
        if len(missing):
            first = inputs.rows[int(missing[0])].get("sample_id", int(missing[0]))
            raise invalid(
                f"column {self.column}",
                f"{len(missing)} missing, NaN or infinite values, the first in row {first}",
                "a finite number in every row that has labelled tokens",
                "Drop those rows or give them a score.",
            )
        return np.asarray(values)


def build_scorer(config: CurriculumConfig) -> DifficultyScorer:
    """
    Makes the scorer that a config names.

    Args:
        config ([`~hf_curriculum.CurriculumConfig`]):
            The config.

    Returns:
        [`DifficultyScorer`]: the user's own object where the config holds one.
    """
    if not isinstance(config.scorer, str):
        return config.scorer
    if config.scorer == "self_paced":
        return SelfPacedScorer(
            probe=config.probe,
            rounds=config.probe_rounds,
            epochs=config.probe_epochs,
            learning_rate=config.probe_learning_rate,
            batch_size=config.probe_batch_size,
            weights=config.spl_weights,
            lambda_start=config.lambda_start,
            loss_normalization=config.loss_normalization,
        )
    if config.scorer == "loss":
        return LossScorer(config.loss_normalization)
    if config.scorer == "length":
        return LengthScorer()
    return ColumnScorer(config.difficulty_column)
