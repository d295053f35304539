"""The adapter between the curriculum and a Trainer. It holds no arithmetic."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from trl import SFTTrainer

from ..core.arguments import bind_trainer_arguments
from ..core.console import say, show_table
from ..core.distributed import on_main_process
from ..core.errors import invalid
from ..core.files import write_atomic
from ..core.fingerprint import fingerprint_rows
from ..core.run import RunMixin
from ..core.stages import Stage, StageDriver
from ..core.state import check_same
from .checks import check_arguments, check_datasets
from .config import CurriculumConfig
from .dataset import add_sample_ids, with_features
from .difficulty import build_scorer
from .evaluation import LevelMatrix, level_name
from .levels import level_cuts, levels_at
from .measurement import Measurement, measure_difficulty
from .plan import CurriculumPlan, build_plan
from .sampler import CurriculumSampler
from .tables import LEVEL_COLUMNS, STAGE_COLUMNS, level_rows, stage_rows


__all__ = ["CurriculumMixin"]


class CurriculumMixin(RunMixin):
    """
    Adds a curriculum to a Trainer class: `class MyTrainer(CurriculumMixin, SFTTrainer)`.

    When the trainer is built, its training rows are scored and cut into levels, evaluation rows are placed among them,
    and the order of the whole run is planned. `train()` then is one pass over the plan: `num_train_epochs` says how
    often each row is seen in it, the Trainer itself sees one epoch, and the "epoch" strategies act at stage ends.

    ```
    __init__          prepare rows (SFT) -> score -> cut into levels -> plan
    train()           check a checkpoint against the plan -> show levels and stages
      on_step_begin   first step of a stage: on_stage_begin
      on_step_end     last step of a stage:  on_stage_end -> evaluate every level -> log, save
      on_train_end    ACC, BWT, forgetting per level -> table, log, run record
    ```

    Args:
        args:
            Positional arguments of the Trainer class.
        curriculum ([`~hf_curriculum.CurriculumConfig`], *optional*):
            The curriculum. Defaults to `CurriculumConfig()`.
        kwargs:
            Keyword arguments of the Trainer class. Its training arguments are copied before anything in them is set.

    Attributes:
        curriculum ([`~hf_curriculum.CurriculumConfig`]):
            The config.
        curriculum_plan ([`~hf_curriculum.CurriculumPlan`]):
            The plan.
        difficulty (`np.ndarray` of shape `(N,)`, float64):
            Difficulty of the rows of `train_dataset`.
        levels (`np.ndarray` of shape `(N,)`, int64):
            Their levels, 0 the easiest.
        sample_ids (`np.ndarray` of shape `(N,)`):
            Their ids: the column `sample_id` of the user's data if its values are unique, else row numbers there.
        level_matrix ([`~hf_curriculum.curriculum.evaluation.LevelMatrix`]):
            Metrics of every level at the end of every stage so far.

    Raises:
        `ValueError`: before any training step, for data or arguments that do not make a plan.
        `NotImplementedError`: likewise, for what would lose the order: packing, streaming, vision data.
    """

    def __init__(self, *args: Any, curriculum: CurriculumConfig | None = None, **kwargs: Any) -> None:
        arguments = bind_trainer_arguments(type(self), RunMixin, args, kwargs)
        self.curriculum = CurriculumConfig() if curriculum is None else curriculum
        if not isinstance(self.curriculum, CurriculumConfig):
            raise invalid("curriculum", curriculum, "a `CurriculumConfig`")
        check_arguments(arguments.get("args"))
        check_datasets(arguments.get("train_dataset"), arguments.get("eval_dataset"), self.curriculum.eval_levels)
        arguments["args"] = copy.copy(arguments.get("args"))
        given = arguments["train_dataset"]
        arguments["train_dataset"] = add_sample_ids(given)
        super().__init__(**arguments)
        self.sample_ids = np.asarray(self.train_dataset.with_format(None)["sample_id"][:])
        if "sample_id" not in given.column_names:
            # Or it would reach collators that take every column.
            self.train_dataset = self.train_dataset.remove_columns("sample_id")
        self._check_plan()
        self._measure(num_dropped=len(given) - len(self.train_dataset))
        self._plan()
        self.add_callback(StageDriver(self.curriculum_plan.stages, self.callback_handler))

    # Before training: difficulty, levels, plan

    def _check_plan(self) -> None:
        """Refuses what makes no plan whatever the scores, before hours are spent on them."""
        rows = len(self.train_dataset)
        if rows >= self.curriculum.num_levels:
            levels = np.arange(rows) * self.curriculum.num_levels // rows
            self._check_stages(self._build_plan(levels, np.ones(rows, dtype=np.int64)).stages)

    def _measure(self, num_dropped: int) -> None:
        """Scores training and evaluation rows, and cuts them into levels."""
        parts = self._evaluation_parts()
        if build_scorer(self.curriculum).uses_model:
            rows = concatenate_datasets([self._batch_rows(self.train_dataset), *map(self._like_training, parts)])
            trainable = np.arange(len(rows)) < len(self.train_dataset)
            measured = self._measure_rows(rows, trainable, num_dropped)
            split = len(self.train_dataset)
            difficulty, eval_difficulty = measured.difficulty[:split], measured.difficulty[split:]
        else:
            measured = self._measure_rows(self.train_dataset, None, num_dropped)
            difficulty = measured.difficulty
            eval_parts = [self._measure_rows(part, None, 0).difficulty for part in parts]
            eval_difficulty = np.concatenate([np.empty(0), *eval_parts])
        self._measurement = measured
        kept = np.flatnonzero(np.isfinite(difficulty))
        if len(kept) < len(difficulty):
            self.train_dataset = self.train_dataset.select(kept)
            self.sample_ids = self.sample_ids[kept]
        self.difficulty = difficulty[kept]
        self._lengths = measured.lengths[: len(difficulty)][kept]
        cuts = level_cuts(
            self.difficulty,
            self.curriculum.num_levels,
            self.curriculum.level_method,
            token_counts=self._lengths if self.curriculum.level_method == "tokens" else None,
            thresholds=self.curriculum.level_thresholds,
        )
        self.levels = levels_at(self.difficulty, cuts)
        self._eval_rows = self._rows_by_level(parts, eval_difficulty, cuts)

    def _measure_rows(self, rows: Dataset, trainable: np.ndarray | None, num_dropped: int) -> Measurement:
        return measure_difficulty(
            rows,
            self.curriculum,
            model=self.model,
            collate=self.data_collator,
            batch_columns=self._batch_rows(rows).column_names,
            args=self.args,
            processing_class=self.processing_class,
            trainable=trainable,
            num_dropped=num_dropped,
            shift_labels=self._shifts_labels or isinstance(self, SFTTrainer),
        )

    def _batch_rows(self, rows: Dataset) -> Dataset:
        return self._remove_unused_columns(rows)

    def _like_training(self, part: Dataset) -> Dataset:
        """The columns of evaluation rows that batches are made of, with the types of the training rows."""
        return with_features(self._batch_rows(part), self._batch_rows(self.train_dataset).features)

    def _evaluation_parts(self) -> list[Dataset]:
        """The evaluation sets whose rows get levels; none, with a word about it, where that cannot be."""
        if self.eval_dataset is None:
            say("No evaluation data: there will be no level by stage matrix. Pass `eval_dataset` to get one.")
            return []
        if not self.curriculum.eval_levels:
            return []
        given = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        everything: list[Dataset] = [*given.values()]
        parts = [part for part in everything if len(part)]
        if len(parts) < len(everything):
            say("An evaluation set has no row with a labelled token after truncation; it is left out of the matrix.")
        column = self.curriculum.difficulty_column
        if self.curriculum.scorer == "column" and any(column not in part.column_names for part in parts):
            say(
                f"The evaluation data has no column `{column}`: there will be no level by stage matrix. Score it "
                "together with the training data (`score_dataset(..., held_out=...)`)."
            )
            return []
        return parts

    def _rows_by_level(self, parts: list[Dataset], difficulty: np.ndarray, cuts: np.ndarray) -> dict[int, Dataset]:
        if not parts:
            return {}
        rows = concatenate_datasets([self._like_training(part) for part in parts])
        scored = np.flatnonzero(np.isfinite(difficulty))
        levels = levels_at(difficulty[scored], cuts)
        members = {level: scored[levels == level] for level in range(self.curriculum.num_levels)}
        if empty := [level for level, indices in members.items() if len(indices) == 0]:
            say(f"No evaluation row is in level {', '.join(map(str, empty))}: its column of the matrix stays empty.")
        return {level: rows.select(indices) for level, indices in members.items() if len(indices)}

    def _plan(self) -> None:
        """Fixes the order of the run; the Trainer then sees one epoch."""
        self._num_train_epochs = self.args.num_train_epochs
        self.curriculum_plan = self._build_plan(self.levels, self._lengths)
        self.args.num_train_epochs = 1.0
        self.level_matrix = LevelMatrix(self.curriculum_plan.stages, self.curriculum.num_levels)
        self._data_fingerprint = self._fingerprint_data()

    def _build_plan(self, levels: np.ndarray, lengths: np.ndarray) -> CurriculumPlan:
        return build_plan(
            levels,
            self.curriculum,
            global_batch_size=self.get_total_train_batch_size(self.args),
            num_train_epochs=self.args.num_train_epochs,
            max_steps=self.args.max_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            lengths=lengths,
            groups=self._row_groups(),
        )

    def _row_groups(self) -> np.ndarray | None:
        """Group of each training row, `(N,)`, int64, to be spread over each stage: of a mixin before this one."""
        return None

    def _fingerprint_data(self) -> str:
        return fingerprint_rows(self._batch_rows(self.train_dataset))

    # Training

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of the plan."""
        return self.curriculum_plan.stages

    def stage_rows(self, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Rows that a stage draws, and those of them that are replayed. See the base class."""
        plan = self.curriculum_plan
        drawn = slice(stage.first_step * plan.global_batch_size, stage.end_step * plan.global_batch_size)
        return np.unique(plan.indices[drawn]), np.unique(plan.indices[drawn][plan.replayed[drawn]])

    def _planned(self) -> dict[str, tuple[object, object]]:
        plan = self.curriculum_plan
        return {
            **super()._planned(),
            "train_dataset": (len(self.train_dataset), plan.num_rows),
            "contents of train_dataset": (self._fingerprint_data(), self._data_fingerprint),
            "global batch size": (self.get_total_train_batch_size(self.args), plan.global_batch_size),
        }

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> CurriculumSampler:
        return CurriculumSampler(self.curriculum_plan)

    def _training_logs(self) -> dict[str, float]:
        logs, step = super()._training_logs(), self.state.global_step
        if 0 < step <= self.curriculum_plan.num_steps:
            logs["curriculum_stage"] = self.curriculum_plan.stage_at(step - 1).index
        return logs

    # Evaluation by level

    def evaluate_levels(self) -> dict[str, float]:
        """
        Evaluates the rows of every level, and logs the result.

        Returns:
            `dict[str, float]`: `eval_level_<i>_loss` and the metrics of `compute_metrics` under the same prefix, for
            each level with evaluation rows; empty without evaluation data. They are logged, but are not part of
            `evaluate()`, and so not a `metric_for_best_model`.

        Example:

        ```python
        >>> trainer.evaluate_levels()  # doctest: +SKIP
        {'eval_level_0_loss': 0.71, 'eval_level_1_loss': 1.32, 'eval_level_2_loss': 1.9}
        ```
        """
        metrics: dict[str, float] = {}
        training = self.model.training
        for level, rows in self._eval_rows.items():
            # The test loader, since the evaluation loader is kept by name where workers persist.
            with self._every_row():
                loader = self.get_test_dataloader(rows)
            output = self.evaluation_loop(
                loader,
                description=f"Evaluation of level {level}",
                prediction_loss_only=True if self.compute_metrics is None else None,
                metric_key_prefix=f"eval_{level_name(level)}",
            )
            self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
            measured = (output.metrics or {}).items()
            metrics |= {name: value for name, value in measured if not name.endswith("_time")}
        self.model.train(training)
        if metrics:
            self._log_evaluation(metrics)
        return metrics

    def _end_stage(self, stage: Stage) -> None:
        super()._end_stage(stage)
        metrics = self.evaluate_levels()
        row = self.level_matrix.add(stage.index, metrics)
        self.record.append("stage_end", self.state.global_step, stage=stage.index, metrics=row)

    def _end_run(self) -> None:
        super()._end_run()
        # Over the stages that were measured, all of them unless the run stopped early.
        if self._eval_rows and self.level_matrix.measured:
            summary = self.level_matrix.forgetting()
            self.record.append("forgetting", self.state.global_step, metrics=summary)
            self._log_evaluation(summary)
            self.level_matrix.show()

    def _log_evaluation(self, metrics: dict[str, float]) -> None:
        """
        Logs evaluation metrics in the middle of a training step.

        SFTTrainer tells evaluation logs from training logs by the mode of the model, and every log clears
        `should_log`, also where the training log of this very step is still to come.
        """
        training, should_log = self.model.training, self.control.should_log
        self.model.eval()
        self.log(dict(metrics))
        self.model.train(training)
        self.control.should_log = should_log

    # State and record

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a resumed run."""
        plan = self.curriculum_plan
        return {
            "training rows": plan.num_rows,
            "contents of the training rows": self._data_fingerprint,
            "global batch size": plan.global_batch_size,
            **plan.settings,
            "plan": plan.hash,
        }

    def _run_state(self) -> dict[str, Any]:
        return {
            **super()._run_state(),
            "curriculum": {"identity": self._identity(), "matrix": self.level_matrix.state()},
        }

    def _restore_run_state(self, state: dict[str, Any] | None) -> None:
        super()._restore_run_state(state)
        if state is None:
            self.level_matrix.restore(None)
            return
        saved, ours = state["curriculum"]["identity"], self._identity()
        check_same(
            "plan",
            saved,
            ours,
            "the same data, seed, curriculum and global batch size",
            "With the same arguments but other scores, train on the scores of that run: they are in "
            "hf_curriculum/difficulty.parquet beside its checkpoints, for `scorer='column'`.",
        )
        self.level_matrix.restore(state["curriculum"]["matrix"])

    def _begin_run(self) -> None:
        super()._begin_run()
        eval_counts = [len(self._eval_rows.get(level, ())) for level in range(self.curriculum.num_levels)]
        data = (self._lengths, eval_counts, self.train_dataset, self.processing_class)
        levels = level_rows(self.difficulty, self.levels, *data)
        stages = stage_rows(self.curriculum_plan, self.difficulty, self._lengths)
        correlation = f"Spearman of difficulty with length {self._measurement.length_correlation:.2f}"
        show_table(f"Levels by `{self._measurement.scorer}` ({correlation})", LEVEL_COLUMNS, levels)
        steps = self.curriculum_plan.num_steps
        show_table(f"Stages, `{self.curriculum.pacing}` ({steps} steps)", STAGE_COLUMNS, stages)
        if not self.record.read("plan"):
            self.record.append(
                "plan",
                0,
                scorer=self._measurement.scorer,
                length_correlation=self._measurement.length_correlation,
                label_correlation=self._measurement.label_correlation,
                scoring_seconds=self._measurement.seconds,
                num_train_epochs=self._num_train_epochs,
                hash=self.curriculum_plan.hash,
                # Without the example, the last: the record is pushed to the Hub with the model.
                levels=[dict(zip(LEVEL_COLUMNS[:-1], row)) for row in levels],
                stages=[dict(zip(STAGE_COLUMNS, row, strict=True)) for row in stages],
            )
        on_main_process(self._write_plan)

    def _write_plan(self) -> None:
        self.curriculum_plan.save(self.record.folder / "plan")
        table = pa.table({"sample_id": self.sample_ids, "difficulty": self.difficulty, "level": self.levels})
        write_atomic(self.record.folder / "difficulty.parquet", lambda file: pq.write_table(table, file))
