"""Stages of a run, and the events at their boundaries: the only coupling between the methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy


__all__ = ["Stage", "StageDriver", "StageEvents"]


@dataclass(frozen=True)
class Stage:
    """
    One stretch of consecutive optimizer steps.

    Args:
        index (`int`):
            Position in the run, from 0.
        levels (`tuple[int, ...]`):
            Difficulty levels whose rows the stage trains on, replayed rows not counted.
        introduces (`tuple[int, ...]`):
            Levels that are trained on here for the first time; empty where stages do not follow levels (controls
            such as a random order). Backward transfer compares the end of the run with the end of these stages.
        first_step (`int`):
            First optimizer step of the stage, from 0.
        end_step (`int`):
            The optimizer step after its last one.
        num_samples (`int`):
            Rows drawn from its own levels, in its own steps: a row that completes the batch of the stage before
            counts there, as filled.
        num_replayed (`int`):
            Rows drawn again from earlier levels.
        num_filled (`int`):
            Rows that complete its last global batch: the next stage's first, or, in the last stage, repeated ones.
    """

    index: int
    levels: tuple[int, ...]
    introduces: tuple[int, ...]
    first_step: int
    end_step: int
    num_samples: int
    num_replayed: int = 0
    num_filled: int = 0

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.end_step - self.first_step


@runtime_checkable
class StageEvents(Protocol):
    """
    What a trainer callback offers to hear of stage boundaries: two methods with the shape of the Trainer's own events.

    Any object in `trainer.callback_handler.callbacks` that has both is called, on every rank, in the order of the
    list. `on_stage_begin` fires before the first forward of the stage; `on_stage_end` fires after its last optimizer
    step, before the Trainer logs, evaluates or saves at that step, so that a checkpoint written there holds what the
    event changed.
    """

    def on_stage_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Called before the first forward pass of `stage`."""

    def on_stage_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Called after the last optimizer step of `stage`."""


class StageDriver(TrainerCallback):
    """
    Turns optimizer steps into stage events, and makes the "epoch" strategies mean "stage".

    One epoch of the Trainer is the whole run, so `logging_strategy`, `eval_strategy` and `save_strategy` of `"epoch"`
    act at each stage end instead. A run resumed in mid-stage does not begin that stage again; one resumed at a
    boundary begins the next stage, which the checkpoint does not hold yet.

    Args:
        stages (`Sequence[Stage]`):
            The stages in order, without gaps.
        callback_handler ([`~transformers.trainer_callback.CallbackHandler`]):
            The trainer's, whose callbacks with [`StageEvents`] are called.
    """

    def __init__(self, stages: Sequence[Stage], callback_handler: CallbackHandler) -> None:
        self.callback_handler = callback_handler
        self._beginning = {stage.first_step: stage for stage in stages}
        self._ending = {stage.end_step: stage for stage in stages}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fires `on_stage_begin` before the first forward of a stage."""
        if (stage := self._beginning.get(state.global_step)) is not None:
            for listener in self._listeners():
                listener.on_stage_begin(args, state, control, stage=stage, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fires `on_stage_end` after the last optimizer step of a stage."""
        if (stage := self._ending.get(state.global_step)) is not None:
            for listener in self._listeners():
                listener.on_stage_end(args, state, control, stage=stage, **kwargs)
            self._act(args, control, True)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes back what the Trainer's own flow asks for here: the last stage end has done it already."""
        if state.global_step in self._ending:
            self._act(args, control, False)

    @staticmethod
    def _act(args: TrainingArguments, control: TrainerControl, wanted: bool) -> None:
        if args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = wanted
        if args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_evaluate = wanted
        if args.save_strategy == SaveStrategy.EPOCH:
            control.should_save = wanted

    def _listeners(self) -> list[StageEvents]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, StageEvents)]
