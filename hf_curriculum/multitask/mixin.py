"""The adapter between several tasks and a Trainer. It holds no arithmetic."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from ..core.arguments import bind_trainer_arguments
from ..core.console import say, show_table
from ..core.errors import invalid
from ..core.run import RunMixin
from ..core.stages import Stage, StageDriver
from ..core.state import check_same
from .absent import AbsentTaskGuard
from .aware import (
    gate_tables,
    hold_absent_tasks,
    ignore_tasks,
    model_tasks,
    moves_absent_tasks,
    takes_tasks,
)
from .checks import check_arguments, check_bases, check_names, decides_order
from .classifier import TaskClassifier
from .collator import ChecksModel, MultiTaskCollator
from .config import MultiTaskConfig
from .epochs import epoch_stages
from .labels import check_labels
from .loss_watch import TaskLossWatch
from .packing import pack_with_tasks
from .rows import check_rows, inferred_names, parts, row_task_ids, tell_missing, with_task_names
from .sampler import MultiTaskSampler
from .tasks import TaskRegistry


__all__ = ["MultiTaskMixin"]


class MultiTaskMixin(RunMixin):
    """
    Adds tasks to a Trainer class: `class MyTrainer(MultiTaskMixin, SFTTrainer)`.

    The task column reaches the batches as `tasks`: one id per row, or one per token where rows are packed or
    flattened. A model that takes `tasks=` gets them (CGC-LoRA, task heads); for any other, plain LoRA shared by all
    tasks say, they are taken out before the forward and only sort the losses.

    The order of the whole run is fixed before training ([`~hf_curriculum.multitask.sampler.MultiTaskSampler`]): the
    Trainer sees one epoch, `num_train_epochs` says how long it is, and the user's epochs are its stages, at whose ends
    the "epoch" strategies act. Beside a mixin with an order of its own (a curriculum) that one decides, and `sampling`
    and `batches` must be left alone. Under TRL's packing, packs are what is drawn and counted: with proportional
    sampling in mixed batches tasks share packs, and otherwise each pack is of one task.

    The experts (CGC-LoRA) and heads of tasks that an optimizer step has no row of stay where they are, on one process
    and under DDP.

    The logs get `<task>_loss`, the mean over the labels of each task on all processes since the last log, and
    evaluation gets `eval_<task>_loss`, over all its rows.

    Args:
        args:
            Positional arguments of the Trainer class.
        multitask ([`~hf_curriculum.multitask.config.MultiTaskConfig`], *optional*):
            The config. Defaults to `MultiTaskConfig()`.
        kwargs:
            Keyword arguments of the Trainer class. Its training arguments are copied before anything in them is set.

    Attributes:
        multitask ([`~hf_curriculum.multitask.config.MultiTaskConfig`]):
            The config.
        task_registry ([`~hf_curriculum.multitask.tasks.TaskRegistry`]):
            Names and ids.
        task_sampler ([`~hf_curriculum.multitask.sampler.MultiTaskSampler`], *optional*):
            The order of the run; None beside a mixin with an order of its own.

    Raises:
        `ValueError`: before any training step, for data without tasks, unknown tasks, or arguments that do not fit.
        `NotImplementedError`: likewise, for streaming.
    """

    _absent_tasks: AbsentTaskGuard | None = None

    def __init__(self, *args: Any, multitask: MultiTaskConfig | None = None, **kwargs: Any) -> None:
        check_bases(type(self), MultiTaskMixin)
        arguments = bind_trainer_arguments(type(self), RunMixin, args, kwargs)
        self.multitask = MultiTaskConfig() if multitask is None else multitask
        if not isinstance(self.multitask, MultiTaskConfig):
            raise invalid("multitask", multitask, "a `MultiTaskConfig`")
        self._orders_run = decides_order(type(self), MultiTaskMixin)
        check_arguments(arguments.get("args"), self.multitask, self._orders_run)
        check_rows(arguments.get("train_dataset"), arguments.get("eval_dataset"), self.multitask.task_column)
        for name in ("train_dataset", "eval_dataset"):
            arguments[name] = with_task_names(arguments.get(name), self.multitask.task_column)
        self.task_registry = self._find_registry(arguments)
        check_names(self.task_registry)
        model = arguments.get("model")
        for name, rows in parts(arguments["train_dataset"], arguments.get("eval_dataset")):
            ids = row_task_ids(rows, self.multitask.task_column, self.task_registry)
            if isinstance(model, TaskClassifier):
                check_labels(model.heads, rows, ids, name)
        arguments["args"] = copy.copy(arguments.get("args"))
        super().__init__(**arguments)
        self._task_ids = self._row_groups()
        if not self._packs_are_mixed():
            tell_missing(self.task_registry, self._task_ids)
        if self.task_sampler is not None:
            self.add_callback(StageDriver(self.stages, self.callback_handler))

    def _check_model(self) -> None:
        # Before the others, which may ask for the stages of the run.
        self._draw_tasks()
        super()._check_model()
        heads: nn.Module = self.model
        if not takes_tasks(self.model):
            ignore_tasks(self.model)
        hold, backend = self.multitask.hold_absent_tasks, self.accelerator.distributed_type
        if (warning := moves_absent_tasks(self.model, backend, hold)) is not None:
            say(warning)
        self._holds_absent_tasks = hold is not False and warning is None
        collator: Any = self.data_collator
        if isinstance(collator, ChecksModel):
            collator.check_model(self.model)
        self.data_collator = MultiTaskCollator(collator, self.task_registry, self.multitask.task_column)
        self._loss_watch = TaskLossWatch(
            self.task_registry,
            self.accelerator,
            shift_labels=self._shifts_labels,
            training=self.multitask.log_task_losses,
            row_losses=heads.row_losses if isinstance(heads, TaskClassifier) else None,
        )

    # Before training: tasks, order

    def _find_registry(self, arguments: dict[str, Any]) -> TaskRegistry:
        """The tasks of the model, else the user's, else the data's."""
        ours = self.multitask
        known = model_tasks(arguments.get("model"), arguments.get("peft_config"))
        if known is None:
            names = ours.task_names or inferred_names(arguments["train_dataset"], ours.task_column)
            return TaskRegistry(names, unknown_task=ours.unknown_task or "error")
        if ours.task_names is not None and tuple(ours.task_names) != known.names:
            expected = f"the model's {list(known.names)}, or None to take them"
            raise invalid("multitask.task_names", ours.task_names, expected)
        if ours.unknown_task not in (None, known.unknown_task):
            expected = f"the model's {known.unknown_task!r}, or None to take it"
            raise invalid("multitask.unknown_task", ours.unknown_task, expected)
        return known

    def _draw_tasks(self) -> None:
        """Fixes the order of the run; the Trainer then sees one epoch."""
        self.task_sampler: MultiTaskSampler | None = None
        if not self._orders_run:
            return
        batches = self.multitask.batches
        self.task_sampler = MultiTaskSampler(
            self._row_groups(),
            global_batch_size=self.get_total_train_batch_size(self.args),
            num_train_epochs=self.args.num_train_epochs,
            max_steps=self.args.max_steps,
            sampling=self.multitask.sampling,
            temperature=self.multitask.temperature,
            batches=batches,
            micro_batch_size=self.args.per_device_train_batch_size if batches == "homogeneous" else None,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        sampler = self.task_sampler
        self._epochs = epoch_stages(sampler.num_rows, sampler.global_batch_size, sampler.num_steps)
        self.args.num_train_epochs = 1.0

    def _row_groups(self) -> np.ndarray:
        """Task of each training row, `(N,)`, int64: what is drawn in proportion. 0 where tasks share packs."""
        if self._packs_are_mixed():
            return np.zeros(len(self.train_dataset), dtype=np.int64)
        return row_task_ids(self.train_dataset, self.multitask.task_column, self.task_registry)

    def _packs_are_mixed(self) -> bool:
        return bool(getattr(self.args, "packing", False)) and not self.multitask.orders

    @property
    def stages(self) -> Sequence[Stage]:
        """The user's epochs, where this mixin decides the order of the run."""
        return super().stages if self.task_sampler is None else self._epochs

    def stage_rows(self, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Rows that an epoch draws; none counts as replayed, although all may have been seen. See the base class."""
        if self.task_sampler is None:
            return super().stage_rows(stage)
        batch = self.task_sampler.global_batch_size
        drawn = self.task_sampler.indices[stage.first_step * batch : stage.end_step * batch]
        return np.unique(drawn), np.empty(0, dtype=np.int64)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer, as the Trainer does; it leaves tasks alone that a step has no row of."""
        optimizer = super().create_optimizer(model)
        if self._holds_absent_tasks:
            if self._absent_tasks is not None:
                self._absent_tasks.remove()
            self._absent_tasks = hold_absent_tasks(optimizer, self.model, self.multitask.hold_absent_tasks)
        return optimizer

    # The way of the tasks from the data to the model

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset:
        # Of SFTTrainer, which packs `input_ids` and `labels` alone. So all but the packing is left to it, without the
        # truncation that it leaves out where it packs itself.
        prepare = super()._prepare_dataset  # type: ignore[misc]
        if not packing or args.max_length is None:
            rows: Dataset = prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
            return rows
        untruncated = copy.copy(args)
        untruncated.max_length = None
        rows = prepare(dataset, processing_class, untruncated, False, formatting_func, dataset_name)
        with args.main_process_first(local=False, desc="packing"):
            return pack_with_tasks(
                rows,
                row_task_ids(rows, self.multitask.task_column, self.task_registry),
                task_column=self.multitask.task_column,
                max_length=args.max_length,
                strategy=args.packing_strategy,
                by_task=self.multitask.orders,
                seed=args.seed if args.data_seed is None else args.data_seed,
                map_kwargs={"num_proc": args.dataset_num_proc},
            )

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Dataset], data_collator: Any) -> None:
        # Of SFTTrainer, which looks at the class of the collator.
        inner = data_collator.inner if isinstance(data_collator, MultiTaskCollator) else data_collator
        super()._reject_skip_prepare_without_labels(datasets, inner)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.multitask.task_column not in columns:
            columns.append(self.multitask.task_column)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        # Rows that were not there when the trainer was built, as in `evaluate(rows)`.
        return super()._get_dataloader(with_task_names(dataset, self.multitask.task_column), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        return super()._get_train_sampler(train_dataset) if self.task_sampler is None else self.task_sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        Computes the loss, as the Trainer class does, and keeps what it says about each task.

        Args:
            model (`nn.Module`):
                The model, wrapped or not.
            inputs (`dict[str, Any]`):
                The batch, with `tasks`.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the outputs as well.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Labels in the whole optimizer step.

        Returns:
            `torch.Tensor` or `tuple[torch.Tensor, Any]`: the loss, a scalar, and the outputs if wanted.
        """
        with self._loss_watch.watching(model, inputs, training=self.model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _training_logs(self) -> dict[str, float]:
        logs = super()._training_logs()
        if self.multitask.log_task_losses:
            logs |= {f"{name}_loss": value for name, value in self._loss_watch.take_training().items()}
        return logs

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates, as the Trainer does, and adds `<prefix>_<task>_loss`, over all rows of each task."""
        with self._loss_watch.evaluating() as means:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}_loss": value for name, value in means.items()})
        if means:
            self.record.append("task_losses", self.state.global_step, split=metric_key_prefix, losses=means)
        return output

    # State and record

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The Trainer knows no model but those of transformers and PEFT: of heads it would write all weights, those of
        # the frozen backbone too, and nothing that says what they are.
        heads: Any = self.model
        if not isinstance(heads, TaskClassifier):
            super()._save(output_dir, state_dict)
            return
        target = Path(str(self.args.output_dir) if output_dir is None else output_dir)
        # What lies beside the weights is the Trainer's to write, under a weight file without a tensor.
        super()._save(output_dir, state_dict={})
        if self.args.should_save:
            (target / SAFE_WEIGHTS_NAME).unlink()
            heads.save_pretrained(target, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        heads = self.model if model is None else model
        if isinstance(heads, TaskClassifier) and not self.is_fsdp_enabled:
            model = heads.load_weights(resume_from_checkpoint)
            if model is None:
                return
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        heads: nn.Module = self.model
        if isinstance(heads, TaskClassifier) and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _planned(self) -> dict[str, tuple[object, object]]:
        planned = super()._planned()
        if (sampler := self.task_sampler) is not None:
            batch = self.get_total_train_batch_size(self.args)
            planned["train_dataset"] = len(self.train_dataset), sampler.num_rows
            planned["global batch size"] = batch, sampler.global_batch_size
        return planned

    def _task_identity(self) -> dict[str, Any]:
        """What must be the same in a resumed run."""
        return {
            "tasks": list(self.task_registry),
            "tasks of the training rows": hashlib.sha256(self._task_ids.astype("<i8").tobytes()).hexdigest(),
            "order": None if self.task_sampler is None else self.task_sampler.hash,
        }

    def _run_state(self) -> dict[str, Any]:
        ours = {"identity": self._task_identity(), "losses": self._loss_watch.state()}
        return {**super()._run_state(), "multitask": ours}

    def _restore_run_state(self, state: dict[str, Any] | None) -> None:
        super()._restore_run_state(state)
        if state is None:
            self._loss_watch.restore(None)
            return
        check_same(
            "order of tasks",
            state["multitask"]["identity"],
            self._task_identity(),
            "the same data, tasks, sampling, seed, epochs and global batch size",
        )
        self._loss_watch.restore(state["multitask"]["losses"])

    def _begin_run(self) -> None:
        super()._begin_run()
        unit = "packs" if getattr(self.args, "packing", False) else "rows"
        ids, counts = np.unique(self._task_ids, return_counts=True)
        draws = {} if self.task_sampler is None else self.task_sampler.draws
        total = sum(draws.values())
        table = [
            [
                "all, sharing packs" if self._packs_are_mixed() else self.task_registry.name(task),
                count,
                draws.get(task),
                draws[task] / total if draws else None,
                draws[task] / count if draws else None,
            ]
            for task, count in zip(ids.tolist(), counts.tolist(), strict=True)
        ]
        columns = ("task", unit, "draws", "share", "passes")
        how = "in an order of another mixin" if not draws else f"`{self.multitask.sampling}`"
        show_table(f"Tasks, {how}, `{self.multitask.batches}` batches", columns, table)
        if not self.record.read("tasks"):
            rows = [dict(zip(columns, row, strict=True)) for row in table]
            self.record.append("tasks", 0, names=list(self.task_registry), tasks=rows)

    def _end_run(self) -> None:
        super()._end_run()
        if (gates := gate_tables(self.model)) is not None:
            self.record.append("gates", self.state.global_step, names=list(self.task_registry), **gates)
