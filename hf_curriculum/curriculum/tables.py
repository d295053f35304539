"""Levels and stages as tables for people."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .plan import CurriculumPlan


__all__ = ["LEVEL_COLUMNS", "STAGE_COLUMNS", "level_rows", "stage_rows"]

EXAMPLE_WIDTH = 40
# Tokens of a row that are decoded for its example: enough for the width above in any language.
EXAMPLE_TOKENS = 64

LEVEL_COLUMNS = ("level", "rows", "eval rows", "tokens", "mean difficulty", "range", "example")
STAGE_COLUMNS = ("stage", "levels", "steps", "rows", "replayed", "filled", "tokens", "mean difficulty")


def level_rows(
    difficulty: np.ndarray,
    levels: np.ndarray,
    lengths: np.ndarray,
    eval_counts: Sequence[int],
    rows: Dataset,
    processing_class: object | None,
) -> list[list[object]]:
    """
    One line per level, with the row of median difficulty as example.

    Args:
        difficulty (`np.ndarray` of shape `(N,)`, float64):
            Of the training rows.
        levels (`np.ndarray` of shape `(N,)`, int64):
            Their levels.
        lengths (`np.ndarray` of shape `(N,)`, int64):
            Their tokens.
        eval_counts (`Sequence[int]` of length K):
            Evaluation rows in each level.
        rows ([`~datasets.Dataset`] of N rows):
            The training rows, with `input_ids`.
        processing_class (`object`, *optional*):
            A tokenizer; without one there is no example.

    Returns:
        `list[list]`: cells under [`LEVEL_COLUMNS`].
    """
    table: list[list[object]] = []
    for level, eval_count in enumerate(eval_counts):
        members = np.flatnonzero(levels == level)
        middle = members[np.argsort(difficulty[members], kind="stable")[len(members) // 2]]
        scores = difficulty[members]
        table.append(
            [
                level,
                len(members),
                int(eval_count),
                int(lengths[members].sum()),
                float(scores.mean()),
                f"{scores.min():.4g} to {scores.max():.4g}",
                _example(rows[int(middle)]["input_ids"], processing_class),
            ]
        )
    return table


def _example(input_ids: list[int], processing_class: object | None) -> str:
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        return "-"
    decoded = str(processing_class.decode(input_ids[:EXAMPLE_TOKENS], skip_special_tokens=True))
    # Control characters in a row must not reach the terminal.
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in decoded).split())
    return text if len(text) <= EXAMPLE_WIDTH else text[: EXAMPLE_WIDTH - 3] + "..."


def stage_rows(plan: CurriculumPlan, difficulty: np.ndarray, lengths: np.ndarray) -> list[list[object]]:
    """
    One line per stage.

    Args:
        plan ([`~hf_curriculum.CurriculumPlan`]):
            The plan.
        difficulty (`np.ndarray` of shape `(N,)`, float64):
            Of the training rows.
        lengths (`np.ndarray` of shape `(N,)`, int64):
            Their tokens.

    Returns:
        `list[list]`: cells under [`STAGE_COLUMNS`].
    """
    table: list[list[object]] = []
    for stage in plan.stages:
        drawn = plan.indices[stage.first_step * plan.global_batch_size : stage.end_step * plan.global_batch_size]
        table.append(
            [
                stage.index,
                ", ".join(map(str, stage.levels)),
                stage.num_steps,
                stage.num_samples,
                stage.num_replayed,
                stage.num_filled,
                int(lengths[drawn].sum()),
                float(difficulty[drawn].mean()),
            ]
        )
    return table
