"""Connects a trainer with a teacher to its own events."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.stages import Stage


__all__ = ["TeacherKeeper", "TeacherUpdates"]


class TeacherKeeper(Protocol):
    """What the callback needs of the trainer."""

    def begin_teacher(self) -> None:
        """Makes or restores the teacher that the run begins with."""

    def follow_student(self) -> None:
        """Moves a running average one step."""

    def refresh_teacher(self, stage: Stage) -> None:
        """Makes the student of this moment the teacher of the stage that begins."""


class TeacherUpdates(TrainerCallback):
    """
    Lets the trainer keep its teacher: at the start, after each optimizer step, where stages meet.

    The teacher changes when the next stage begins, not when the last one ends: what is evaluated at a stage end is
    compared with the teacher that the stage had.

    Args:
        trainer ([`TeacherKeeper`]):
            The trainer.
    """

    def __init__(self, trainer: TeacherKeeper) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes or restores the teacher. By now the model is wrapped, and a checkpoint loaded."""
        self.trainer.begin_teacher()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves a running average."""
        self.trainer.follow_student()

    def on_stage_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Makes the student, as the stage before has left it, the teacher."""
        self.trainer.refresh_teacher(stage)

    def on_stage_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Nothing to do."""
