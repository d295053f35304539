r"""
Self-paced learning as a difficulty measurer: the heart of CL-Tuning.

A throw-away probe is fine-tuned in rounds. Each round scores every row, admits the rows whose normalised loss u is
under an age parameter lambda, and trains on what is admitted so far. Lambda grows until everything is in. A row is as
difficult as it was late, and as its loss stayed high.

Sources: Kumar, Packer, Koller, *Self-Paced Learning for Latent Variable Models*, NeurIPS 2010 (hard weights, warm-up,
growing age); Jiang et al., *Easy Samples First*, ACM MM 2014 (linear weights). The abstract of CL-Tuning gives no
formula; what is ours is said where it stands.

Shapes: N rows, R rounds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..core.errors import invalid
from .probe import LORA_LEARNING_RATE, LORA_RANK, ProbeTraining, open_probe
from .scoring import ScoringInputs, check_row_losses, score_rows


__all__ = [
    "SelfPacedScorer",
    "age_schedule",
    "normalised_losses",
    "phase_steps",
    "self_paced_difficulty",
    "spl_weights",
]


# Share of the probe's training that comes before the first round, on random rows: Kumar et al. start from such a model
# too, without saying how long. Our choice: with a quarter, rows that were only rare came out as hard, and what the
# probe does not admit it does not learn (docs/curriculum.md).
WARMUP_SHARE = 0.5


def phase_steps(total: float, num_rounds: int) -> list[int]:
    """
    Shares out the probe's optimizer steps: a warm-up on random rows, then equal parts after every round but the last.

    Args:
        total (`float`):
            Steps of all phases together.
        num_rounds (`int`):
            R, at least 2.

    Returns:
        `list[int]` of length R, each at least 1: the warm-up's steps and those after rounds 1 to R - 1.
    """
    rest = round(total * (1 - WARMUP_SHARE) / (num_rounds - 1))
    return [max(1, round(total * WARMUP_SHARE))] + [max(1, rest)] * (num_rounds - 1)


def normalised_losses(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    r"""
    Position of each loss in the distribution of reference losses, u = (#{ref < l} + #{ref = l} / 2) / #ref.

    With losses in nats, lambda would have to follow the scale of the model and the round; with u it is the share of
    the rows that is admitted. Our choice.

    Args:
        losses (`np.ndarray` of shape `(N,)`, float64):
            Losses of all rows.
        reference (`np.ndarray` of shape `(M,)`, float64):
            Losses of the rows that may be learned from.

    Returns:
        `np.ndarray` of shape `(N,)`, float64, in [0, 1], strictly inside for rows of the reference.
    """
    ordered = np.sort(reference)
    below = np.searchsorted(ordered, losses, side="left")
    upto = np.searchsorted(ordered, losses, side="right")
    return (below + upto) / (2 * len(ordered))


def age_schedule(lambda_start: float, num_rounds: int) -> np.ndarray:
    """
    The age parameter lambda of each round, growing linearly to 1. Our choice; Kumar et al. multiply it by 1.3.

    Args:
        lambda_start (`float`):
            First value, in (0, 1].
        num_rounds (`int`):
            R, at least 2.

    Returns:
        `np.ndarray` of shape `(R,)`, float64.
    """
    return np.linspace(lambda_start, 1.0, num_rounds)


def spl_weights(losses: np.ndarray, age: float, kind: str) -> np.ndarray:
    r"""
    Weights v that minimise v * u + f(v; lambda) over v in [0, 1].

    - `"hard"`, f = -lambda v (Kumar et al. 2010, eq. 4): v = 1 if u < lambda, else 0.
    - `"linear"`, f = lambda (v^2 / 2 - v) (Jiang et al. 2014): v = max(0, 1 - u / lambda).

    Args:
        losses (`np.ndarray` of shape `(N,)`, float64):
            Normalised losses u, in [0, 1].
        age (`float`):
            lambda, in (0, 1].
        kind (`str`):
            `"hard"` or `"linear"`.

    Returns:
        `np.ndarray` of shape `(N,)`, float64, in [0, 1].
    """
    if kind == "hard":
        return (losses < age).astype(np.float64)
    return np.clip(1.0 - losses / age, 0.0, 1.0)


def self_paced_difficulty(normalised: np.ndarray, ages: np.ndarray) -> np.ndarray:
    r"""
    Difficulty from the normalised losses of all rounds: d = (a + u_R) / R.

    a is the round, from 0, in which a row was first admitted, u_R its normalised loss in the last round: rows are
    ordered by when they were admitted, and within a round by how hard they still were. Our choice, measured on the
    demo's graded corpus.

    Args:
        normalised (`np.ndarray` of shape `(R, N)`, float64):
            Normalised losses u of each round.
        ages (`np.ndarray` of shape `(R,)`, float64):
            lambda of each round; the last is 1.

    Returns:
        `np.ndarray` of shape `(N,)`, float64, in [0, 1].
    """
    admitted = normalised < ages[:, None]  # [R, N]
    admitted[-1] = True  # an evaluation row can be harder than every training row
    return np.asarray((admitted.argmax(axis=0) + normalised[-1]) / len(ages))


@dataclass(frozen=True)
class SelfPacedScorer:
    """
    Learned difficulty: fine-tunes a probe in self-paced rounds.

    The fields are those of [`~hf_curriculum.CurriculumConfig`] with the same names, or with `probe_` before them.

    Rows of `inputs` that are not trainable are scored in every round and placed among the trainable ones, but never
    trained on. Collective: every rank calls it with the same rows.
    """

    probe: str
    rounds: int
    epochs: float
    learning_rate: float | None
    batch_size: int
    weights: str
    lambda_start: float
    loss_normalization: str
    name: str = "self_paced"
    uses_model: bool = True

    def settings(self) -> dict[str, Any]:
        """What the result depends on besides rows, weights and seed; for a probe in a folder also its files."""
        folder = Path(self.probe)
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*"))]
        return {**vars(self), "lora": [LORA_RANK, LORA_LEARNING_RATE], "probe_files": files}

    def score(self, inputs: ScoringInputs) -> np.ndarray:
        """
        Measures the difficulty.

        Args:
            inputs ([`~hf_curriculum.curriculum.scoring.ScoringInputs`]):
                Rows and model.

        Returns:
            `np.ndarray` of shape `(N,)`, float64, in [0, 1].

        Raises:
            `ValueError`: if the probe's losses are not finite.
        """
        ages = age_schedule(self.lambda_start, self.rounds)
        learnable = np.flatnonzero(inputs.trainable)
        normalised = np.empty((self.rounds, len(inputs.lengths)))
        with open_probe(self.probe, inputs) as (probe, default_rate):
            check_row_losses(inputs, probe)
            training = ProbeTraining(inputs, probe, self.learning_rate or default_rate, self.batch_size)
            steps = phase_steps(self.epochs * len(learnable) / self.batch_size, self.rounds)
            training.run(learnable, np.ones(len(learnable)), steps[0], phase=0)
            for index, age in enumerate(ages):
                losses = self._losses(inputs, probe, f"Self-paced round {index + 1}/{self.rounds}: scoring")
                normalised[index] = normalised_losses(losses, losses[learnable])
                if index + 1 < self.rounds:
                    positions = normalised[index, learnable]
                    weights = spl_weights(positions, age, self.weights)
                    if not weights.any():  # of a few rows none may be within the share: then the easiest is
                        weights = (positions == positions.min()).astype(np.float64)
                    admitted = weights > 0
                    training.run(learnable[admitted], weights[admitted], steps[index + 1], phase=index + 1)
        return self_paced_difficulty(normalised, ages)

    def _losses(self, inputs: ScoringInputs, probe: nn.Module, description: str) -> np.ndarray:
        losses, counts = score_rows(inputs, probe, description)
        if not np.isfinite(losses).all():
            raise invalid(
                "the probe's loss",
                f"{np.count_nonzero(~np.isfinite(losses))} values that are not finite",
                "finite losses",
                "Lower `probe_learning_rate`, or look for rows that break the model.",
            )
        return losses / counts if self.loss_normalization == "token" else losses
