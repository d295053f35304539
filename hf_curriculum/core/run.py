"""What all our trainers share: the launch check, the run record, and checkpoints that can be resumed exactly."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from uuid import uuid4

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .console import say
from .distributed import check_launch, on_main_process
from .errors import invalid, unsupported
from .head import is_causal_lm
from .records import RunRecord
from .sampler import RunSampler
from .stages import Stage
from .state import (
    incompleteness,
    invalidate_checkpoint,
    list_checkpoints,
    read_checkpoint_state,
    write_checkpoint_state,
    write_manifest,
)


if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, Trainer
else:
    Trainer = object

__all__ = ["RunEvents", "RunMixin", "RunPart"]


class RunEvents(TrainerCallback):
    """
    Lets a trainer act on its own events.

    Args:
        run ([`RunMixin`]):
            The trainer.
    """

    def __init__(self, run: "RunMixin") -> None:
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See [`RunMixin._begin_run`]."""
        self.run._begin_run()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See [`RunMixin._end_step`]."""
        self.run._end_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See [`RunMixin._end_run`]."""
        self.run._end_run()

    def on_stage_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """See [`RunMixin._begin_stage`]."""
        self.run._begin_stage(stage)

    def on_stage_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """See [`RunMixin._end_stage`]."""
        self.run._end_stage(stage)


@runtime_checkable
class RunPart(Protocol):
    """
    What a callback offers to be a part of our trainers: methods that are called on every rank.

    It is attached when the trainer is built, what it writes is inside the checkpoint when that is closed, and it
    releases the model when training breaks off.
    """

    def attach(self, trainer: "Trainer") -> None:
        """Called once, before the optimizer is created. May be called for any Trainer by its user."""

    def write_run_files(self, folder: Path) -> None:
        """Writes what a checkpoint must hold beside JSON values into its folder."""

    def release(self) -> None:
        """Takes off the model what it put on, after an error or Ctrl-C."""


class RunMixin(Trainer):
    """
    Base of our trainer mixins, to stand before a [`~transformers.Trainer`] class in the list of bases.

    It refuses launches whose processes do not know of one another, keeps the run record, closes every checkpoint with
    a manifest, and resumes from complete checkpoints only.

    Mixins on top of it extend its hooks, always calling `super()`. When the trainer is built: [`_check_model`],
    [`_check_stages`]. While it trains: [`_begin_run`], [`_begin_stage`], [`_end_step`], [`_end_stage`], [`_end_run`],
    [`_training_logs`]. For checkpoints: [`_run_state`], [`_restore_run_state`], [`_write_run_files`]. A mixin that
    fixes the order of the run overrides [`stages`], [`stage_rows`] and [`_planned`], and its sampler is a
    [`~hf_curriculum.core.sampler.RunSampler`].

    Attributes:
        record ([`~hf_curriculum.core.records.RunRecord`]):
            The run record, under `<output_dir>/hf_curriculum/`.
    """

    record: RunRecord
    # Narrower than in the Trainer, which also runs without them; ours has checked them when `__init__` is done.
    model: "PreTrainedModel"
    train_dataset: "Dataset"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_launch(self.accelerator)
        self.record = RunRecord(str(self.args.output_dir), enabled=self.is_world_process_zero())
        self._run_id = ""
        self._resumed_from: Path | None = None
        self.add_callback(RunEvents(self))
        self._check_model()
        for part in self._parts():
            part.attach(self)

    def _check_model(self) -> None:
        """Refuses, or makes ready, what the Trainer was built with, before anything is measured on it."""

    def _check_stages(self, stages: Sequence[Stage]) -> None:
        """Refuses a run with these stages. Called once before anything is measured, if there will be stages."""

    @property
    def _shifts_labels(self) -> bool:
        """Whether the model's own loss holds each position against the label of the next."""
        return self._loss_shifts_labels or is_causal_lm(self.model)

    @contextmanager
    def _every_row(self) -> Iterator[None]:
        """Lets loaders that are built inside keep their last batch: `dataloader_drop_last` is meant for training."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = dropping

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of the run, in order; none where the run has no stages."""
        return ()

    def stage_rows(self, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows of one stage.

        Args:
            stage ([`~hf_curriculum.core.stages.Stage`]):
                One of `stages`.

        Returns:
            `tuple[np.ndarray, np.ndarray]`, int64, sorted: the rows of `train_dataset` that the steps of the stage
            draw, and those of them that are replayed from earlier stages.
        """
        raise NotImplementedError(f"{type(self).__name__} has no stages.")

    def _planned(self) -> dict[str, tuple[object, object]]:
        """By name what the order of the run was made for: as it is now, and as it was then."""
        return {}

    def _begin_run(self) -> None:
        """Called when training begins: the model is wrapped, and a checkpoint loaded."""

    def _begin_stage(self, stage: Stage) -> None:
        """Called before the first forward of a stage."""

    def _end_step(self) -> None:
        """Called after every optimizer step."""

    def _end_stage(self, stage: Stage) -> None:
        """Called after the last optimizer step of a stage, before the Trainer logs, evaluates or saves at it."""

    def _end_run(self) -> None:
        """Called when training ends."""

    def _training_logs(self) -> dict[str, float]:
        """What is logged beside the training loss. Called on every rank."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, as the Trainer does; training logs get what the methods have to say."""
        if "loss" in logs and "eval_loss" not in logs:
            logs |= self._training_logs()
        super().log(logs, start_time)

    def num_examples(self, dataloader: "DataLoader[Any]") -> int:
        """Rows that a loader yields: for the training loader of a run with a fixed order, all of its draws."""
        batches = dataloader.batch_sampler
        inner = batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches
        sampler = getattr(inner, "sampler", None)
        return len(sampler) if isinstance(sampler, RunSampler) else super().num_examples(dataloader)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a callback, as the Trainer does; a [`RunPart`] is attached."""
        super().add_callback(callback)
        if isinstance(added := self.callback_handler.callbacks[-1], RunPart):
            added.attach(self)

    def _parts(self) -> list[RunPart]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RunPart)]

    def _write_run_files(self, folder: Path) -> None:
        """Writes what a checkpoint must hold beside JSON values. Called on every rank, before [`_run_state`]."""
        for part in self._parts():
            part.write_run_files(folder)

    def _run_state(self) -> dict[str, Any]:
        """JSON values that a checkpoint must hold, one key per method. Called on every rank."""
        return {
            "run": {
                "run_id": self._run_id,
                "step": self.state.global_step,
                "num_processes": self.accelerator.num_processes,
            }
        }

    def _restore_run_state(self, state: dict[str, Any] | None) -> None:
        """
        Resets everything that a run changes, then takes over the state of a checkpoint.

        Called on every rank, before anything is loaded.

        Args:
            state (`dict[str, Any]`, *optional*):
                What [`_run_state`] gave at the checkpoint; None for a new run.

        Raises:
            `ValueError`: if the checkpoint is of another run than this trainer would make.
        """
        if state is None:
            self._run_id = on_main_process(lambda: uuid4().hex)
        else:
            self._run_id = state["run"]["run_id"]
            processes = state["run"]["num_processes"]
            if processes != self.accelerator.num_processes:
                say(
                    f"The checkpoint was written by {processes} processes, this run has "
                    f"{self.accelerator.num_processes}: the same data order, but other dropout and rounding."
                )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Trains, as [`~transformers.Trainer.train`] does, from the start or from a complete checkpoint.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` takes the newest complete checkpoint of the run in `output_dir` and says which; a path takes
                that one.
            trial:
                Not supported.
            ignore_keys_for_eval (`list[str]`, *optional*):
                Passed on.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]

        Raises:
            `ValueError`: if there is no complete checkpoint, or it is of a run with another data order; if what the
                order was made for has changed since.
            `NotImplementedError`: in a hyperparameter search.
        """
        for name, (now, then) in self._planned().items():
            if now != then:
                raise invalid(
                    name, now, f"{then}, which the order of the run was made for", "Build a new trainer for it."
                )
        if trial is not None:
            raise unsupported(
                "A hyperparameter search inside one trainer",
                "a trial changes arguments that the plan was built from",
                "Build one trainer per trial.",
            )
        checkpoint = self._resumed_from = self._find_checkpoint(resume_from_checkpoint)
        if checkpoint is None:
            self._restore_run_state(None)
            self.record.start(self._run_id)
        else:
            state = read_checkpoint_state(checkpoint)
            self._restore_run_state(state)
            self.record.resume(self._run_id, state["run"]["step"])
        try:
            return super().train(
                resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        except BaseException:
            for part in self._parts():
                part.release()
            raise

    def _find_checkpoint(self, requested: str | bool | None) -> Path | None:
        """The checkpoint to resume from, complete; None for a new run."""
        if not requested:
            return None
        if requested is not True:
            if (missing := incompleteness(requested)) is not None:
                raise invalid("resume_from_checkpoint", requested, "a complete checkpoint", f"In it, {missing}.")
            return Path(requested)
        run_id = on_main_process(lambda: RunRecord(str(self.args.output_dir)).run_id)
        skipped: list[str] = []
        for folder in list_checkpoints(str(self.args.output_dir)):
            missing = incompleteness(folder)
            if missing is None and run_id is not None and read_checkpoint_state(folder)["run"]["run_id"] != run_id:
                missing = "it is of an earlier run in the same folder; name its path to continue that run"
            if missing is None:
                why = f" ({'; '.join(skipped)})" if skipped else ""
                say(f"Resuming from {folder}, the newest complete checkpoint{why}.")
                return folder
            skipped.append(f"{folder.name}: {missing}")
        raise invalid(
            "resume_from_checkpoint",
            True,
            f"a complete checkpoint of the last run in {self.args.output_dir}",
            f"Found {'; '.join(skipped) if skipped else 'none'}.",
        )

    def _save_checkpoint(self, model: "nn.Module", trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            invalidate_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing the Trainer writes before `trainer_state.json`, and it does so on every rank.
        super()._save_rng_state(output_dir)
        self._write_run_files(Path(output_dir))
        state = self._run_state()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_checkpoint_state(output_dir, state)
            write_manifest(output_dir)
