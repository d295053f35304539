"""Connects a trainer with a curriculum to its own events."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.stages import Stage


__all__ = ["LevelEvaluation", "LevelEvaluator"]


class LevelEvaluator(Protocol):
    """What the callback needs of the trainer."""

    def show_and_record(self) -> None:
        """Tables before the first step; plan and scores on disk."""

    def end_stage(self, stage: Stage) -> None:
        """Measures every level."""

    def sum_up(self) -> None:
        """What was forgotten over the stages that were measured."""


class LevelEvaluation(TrainerCallback):
    """
    Lets the trainer act at the start, at stage ends and at the end of a run.

    Args:
        trainer ([`LevelEvaluator`]):
            The trainer.
    """

    def __init__(self, trainer: LevelEvaluator) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows levels and stages, and writes them down."""
        self.trainer.show_and_record()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sums up the stages."""
        self.trainer.sum_up()

    def on_stage_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def on_stage_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Measures every level."""
        self.trainer.end_stage(stage)
