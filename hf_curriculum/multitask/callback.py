"""Connects a trainer of several tasks to its own events."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


__all__ = ["TaskReport", "TaskReporter"]


class TaskReporter(Protocol):
    """What the callback needs of the trainer."""

    def show_tasks(self) -> None:
        """Table and record before the first step."""

    def record_gates(self) -> None:
        """What the tasks came to share."""


class TaskReport(TrainerCallback):
    """
    Lets the trainer act at the start and at the end of a run.

    Args:
        trainer ([`TaskReporter`]):
            The trainer.
    """

    def __init__(self, trainer: TaskReporter) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the tasks, and writes them down."""
        self.trainer.show_tasks()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the gates down."""
        self.trainer.record_gates()
