"""The adapter between a teacher and a Trainer. It holds no arithmetic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers.trainer_utils import EvalLoopOutput, unwrap_peft_model
from trl import SFTTrainer

from ..core.errors import invalid, unsupported
from ..core.fingerprint import fingerprint_rows
from ..core.head import causal_lm_head
from ..core.means import RunningMeans
from ..core.run import RunMixin
from ..core.stages import Stage
from ..core.state import check_same
from .cache import TopKCache, TopKSpec
from .cache_pass import write_teacher_cache
from .checks import check_adapter_off, check_loss, check_snapshot, check_stages, check_trainer
from .chunked import HeadTeacher, TopKTeacher
from .config import DEFAULT_BETA, DistillationConfig, described
from .dense import check_own_loss, dense_losses
from .forward import StudentPass, check_logits, install, projection_of
from .keeping import TeacherKeeper
from .loss_sums import LossSums
from .losses import Divergence
from .models import check_teacher, dense_kind
from .row_index import LABELS_PER_ROW, ROW_INDEX, indexed_rows
from .teacher import Teacher


__all__ = ["DistillationMixin"]

MEASURED = Divergence("forward_kl", temperature=1.0)


class DistillationMixin(RunMixin):
    """
    Adds a distillation loss to a Trainer class: `class MyTrainer(DistillationMixin, SFTTrainer)`.

    ```
    train()
      on_train_begin   the teacher that the run begins with, or that of the checkpoint
      compute_loss     teacher forward (no gradient, evaluation mode) -> student forward with CE and KD in chunks
      on_step_end      `ema`: the average follows
      on_stage_begin   `previous_stage`: the student, as the stage before has left it, becomes the teacher
    ```

    Causal language models never hold logits of all tokens: the loss is computed inside the model's forward, over
    chunks of labelled positions. Classifiers and sequence-to-sequence models use the logits that they give anyway.
    Logged: `ce_loss` and `kd_loss` (T^2 D, without alpha), means per labelled token since the last log, and in each
    evaluation `eval_kl_to_previous_stage` (`eval_kl_to_teacher` for other teachers): the forward KL at temperature 1,
    mean per labelled token.

    Args:
        args:
            Positional arguments of the Trainer class.
        distillation ([`~hf_curriculum.DistillationConfig`], *optional*):
            The distillation. Without one there is no teacher; classes that are for distillation alone require it.
        kwargs:
            Keyword arguments of the Trainer class.

    Attributes:
        distillation ([`~hf_curriculum.DistillationConfig`]):
            The config.

    Raises:
        `ValueError`: before any training step, for a teacher that does not fit the student or the run.
        `NotImplementedError`: likewise, for losses, models and backends in which the distillation would be wrong.
    """

    # Whether the class has nothing to offer without a teacher.
    requires_teacher = False
    _wants_logits = True

    def __init__(self, *args: Any, distillation: DistillationConfig | None = None, **kwargs: Any) -> None:
        self.distillation = DistillationConfig(teacher="none") if distillation is None else distillation
        if not isinstance(self.distillation, DistillationConfig):
            raise invalid("distillation", distillation, "a `DistillationConfig`")
        if self.requires_teacher and not self.distillation.enabled:
            raise invalid("distillation", distillation, "a `DistillationConfig` with a teacher")
        super().__init__(*args, **kwargs)
        if self.distillation.enabled:
            self._check_stages(self.stages)

    def _check_model(self) -> None:
        super()._check_model()
        if not self.distillation.enabled:
            return
        check_trainer(self)
        student = unwrap_peft_model(self.model)
        self._head = causal_lm_head(self.model) if self._shifts_labels or isinstance(self, SFTTrainer) else None
        if self._head is None:
            kind = dense_kind(student)
            check_loss(type(self), DistillationMixin)
            if self.distillation.teacher_cache != "none":
                raise unsupported(f"A teacher cache for {kind}", "its logits are small", "Leave `teacher_cache` out.")
        else:
            projection_of(self._head)
            install(self.model)
        if self.distillation.names_model:
            classifies = self._head is None and kind != "sequence-to-sequence"
            check_teacher(self.distillation.teacher, student, self.processing_class, classifies)
        elif self.distillation.teacher == "base":
            check_adapter_off(self.model)
        else:
            check_snapshot(self.model)
        # With an underscore, so that the Trainer does not push it to the Hub with the rest of the folder.
        folder = Path(str(self.args.output_dir)) / "_hf_curriculum_teacher_cache"
        self._keeper = TeacherKeeper(
            self.distillation,
            self.model,
            self._head,
            self.accelerator,
            folder,
            self._write_cache,
            self._cache_identity,
        )
        self._training_means = RunningMeans(("ce_loss", "kd_loss"), self.accelerator.device)
        self._evaluation_means = RunningMeans((self._divergence_name,), self.accelerator.device)

    def _check_stages(self, stages: Any) -> None:
        super()._check_stages(stages)
        if self.distillation.enabled:
            check_stages(self.distillation, stages)

    # The teacher's life

    def _begin_run(self) -> None:
        super()._begin_run()
        if self.distillation.enabled:
            self._training_means.restore(None)
            self._model_checked = False
            self._replayed: tuple[int, np.ndarray] = -1, np.empty(0, dtype=bool)
            self._keeper.begin(self._stage_index(), self._saved_teacher, self._resumed_from)

    def _begin_stage(self, stage: Stage) -> None:
        # When the next stage begins, not when one ends: what is evaluated at a stage end is compared with the teacher
        # that the stage had. The first stage has the teacher of the run.
        super()._begin_stage(stage)
        if self.distillation.enabled and stage.index > 0:
            self._keeper.refresh(stage.index)

    def _end_step(self) -> None:
        super()._end_step()
        if self.distillation.enabled:
            self._keeper.follow()

    def _stage_index(self) -> int:
        """Stage of the step that is being computed; 0 in a run without stages."""
        step, last = self.state.global_step, max(len(self.stages) - 1, 0)
        return next((stage.index for stage in self.stages if step < stage.end_step), last)

    def _cache_identity(self) -> dict[str, object]:
        if not isinstance(self.train_dataset, Dataset):
            raise invalid(
                "train_dataset", type(self.train_dataset).__name__, "a `datasets.Dataset` for a teacher cache"
            )
        return {
            "run": self._run_id,
            "training data": fingerprint_rows(self._remove_unused_columns(self.train_dataset)),
        }

    def _write_cache(self, path: Path, spec: TopKSpec, teacher: Teacher, stage: int) -> TopKCache:
        """Runs the teacher once over the rows of a stage."""
        rows = self.stage_rows(self.stages[stage])[0] if self.stages else np.arange(len(self.train_dataset))
        indexing = indexed_rows(self, self.train_dataset.select(rows), "Teacher cache", row_ids=rows)
        with indexing as indexed, self._every_row():
            loader = super()._get_dataloader(indexed, "Teacher cache", self.args.eval_batch_size)
        assert self._head is not None, "a cache is refused where there is no language-model head"
        return write_teacher_cache(loader, self._prepare_inputs, teacher, self.model_wrapped, self._head, path, spec)

    # Training and evaluation

    def _get_dataloader(
        self,
        dataset: Dataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[TorchDataset[Any]], Sampler[Any]] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        needed = self.distillation.teacher_cache != "none" or self.distillation.distill_on != "all"
        if not (is_training and self.distillation.enabled and needed):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        with indexed_rows(self, dataset, description, shift_labels=self._head is not None) as rows:
            return super()._get_dataloader(
                rows, description, batch_size, rows.sampler_fn(sampler_fn), is_training, dataloader_key
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Computes the loss of a micro-batch: CE and KD in training, CE alone in an evaluation.

        Args:
            model (`nn.Module`):
                The wrapped student.
            inputs (`dict[str, Any]`):
                The batch.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether the model's outputs are wanted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Labelled tokens of the whole optimizer step.

        Returns:
            `torch.Tensor` of shape `()`, or that and the outputs.
        """
        rows = {name: inputs.pop(name) for name in (ROW_INDEX, LABELS_PER_ROW) if name in inputs}
        if not self.distillation.enabled or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        several = inputs["labels"].is_floating_point()
        alpha = self._alpha(rows, several) if self.model.training else 0.0
        if self._head is None:
            loss, outputs = self._dense_loss(model, inputs, alpha, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if self.model.training and not self._model_checked:
            check_logits(model, inputs)
            self._model_checked = True
        with self._signal(model, inputs, rows) as teacher:
            if teacher is None and self._trl_is_faster:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            request = StudentPass(
                self._divergence() if self.model.training else MEASURED,
                alpha,
                teacher,
                evaluates=not self.model.training,
                needs_logits=return_outputs and self._wants_logits and not isinstance(self, SFTTrainer),
            )
            computed = super().compute_loss(
                model, {**inputs, "distillation": request}, return_outputs, num_items_in_batch
            )
        if request.sums is None and self.model.training:
            raise unsupported(
                "Distillation with a `compute_loss` that calls the model without labels",
                "the teacher is asked inside the model's forward, where the labels are",
                "Let it call `super().compute_loss(...)` with the inputs as they are, and add its own terms.",
            )
        self._add_up(request.sums)
        return computed

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Evaluates a batch; the Trainer asks for outputs even where it needs the loss alone."""
        self._wants_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._wants_logits = True

    @property
    def _trl_is_faster(self) -> bool:
        """Whether TRL's own fused cross-entropy is the better one: where its Triton kernel runs."""
        return isinstance(self, SFTTrainer) and self.accelerator.device.type != "cpu"

    def _divergence(self) -> Divergence:
        config = self.distillation
        beta = DEFAULT_BETA if config.beta is None else config.beta
        return Divergence(config.divergence, beta, config.temperature_in(self._stage_index()))

    def _alpha(self, rows: dict[str, torch.Tensor], several: bool) -> float | torch.Tensor:
        """Weight of the distillation, for all labelled positions (`several` labels at once: rows) or for each."""
        stage = self._stage_index()
        alpha = self.distillation.alpha_in(stage)
        if self.distillation.distill_on == "all" or alpha == 0:
            return alpha
        if self._replayed[0] != stage:
            # Once per stage: its rows can be all of the data set.
            mask = np.zeros(len(self.train_dataset), dtype=bool)
            mask[self.stage_rows(self.stages[stage])[1]] = True
            self._replayed = stage, mask
        replayed = self._replayed[1][rows[ROW_INDEX].cpu().numpy()]
        chosen = replayed if self.distillation.distill_on == "replay" else ~replayed
        weights = torch.from_numpy(chosen).to(rows[LABELS_PER_ROW].device) * alpha
        # Several labels of one row are one item.
        return weights.float().repeat_interleave(1 if several else rows[LABELS_PER_ROW])

    @contextmanager
    def _signal(
        self, model: nn.Module, inputs: dict[str, Any], rows: dict[str, torch.Tensor]
    ) -> Iterator[torch.Tensor | HeadTeacher | TopKTeacher | None]:
        """What the teacher says about a batch; None where there is none, or none is asked."""
        asked = not self.model.training or self.distillation.alpha_in(self._stage_index()) > 0
        teacher, cache = self._keeper.teacher, self._keeper.cache
        if asked and self.model.training and cache is not None:
            yield TopKTeacher(*cache.rows(rows[ROW_INDEX], rows[LABELS_PER_ROW], self.accelerator.device))
        elif asked and teacher is not None:
            hidden = teacher.hidden(model, inputs)
            with teacher.head() as head:
                yield hidden if head is None else HeadTeacher(hidden, head)
        else:
            yield None

    def _dense_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        alpha: float | torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, Any]:
        """The loss of a classifier or a sequence-to-sequence model, and its outputs."""
        training, teacher = self.model.training, self._keeper.teacher
        asked = teacher is not None and (not training or self.distillation.alpha_in(self._stage_index()) > 0)
        teacher_logits = teacher.logits(model, inputs) if teacher is not None and asked else None
        if training:
            outputs = model(**inputs)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items)
        losses = dense_losses(
            outputs.logits, inputs["labels"], teacher_logits, self._divergence() if training else MEASURED
        )
        alpha = (alpha if training else 1.0) if asked else 0.0
        self._add_up(losses.sums(alpha))
        if training:
            if not self._model_checked:
                check_own_loss(outputs.loss, losses)
                self._model_checked = True
            # The model's own loss divides by the micro-batch even where the Trainer takes it for the whole step's.
            average = self.args.average_tokens_across_devices and num_items is not None
            copies = self.accelerator.num_processes // self.get_tp_size() if average else 1
            loss = losses.mean(alpha, num_items) * copies
        return loss, outputs

    def _add_up(self, sums: LossSums | None) -> None:
        if sums is None:
            return
        if self.model.training:
            self._training_means.add("ce_loss", sums.ce, sums.tokens)
            self._training_means.add("kd_loss", sums.kd, sums.distilled)
        else:
            self._evaluation_means.add(self._divergence_name, sums.kd, sums.distilled)

    @property
    def _divergence_name(self) -> str:
        return "kl_to_previous_stage" if self.distillation.teacher == "previous_stage" else "kl_to_teacher"

    def _training_logs(self) -> dict[str, float]:
        logs = super()._training_logs()
        return {**logs, **self._training_means.take()} if self.distillation.enabled else logs

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates, as [`~transformers.Trainer.evaluation_loop`] does, and measures the distance to the teacher."""
        if not self.distillation.enabled:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._evaluation_means.restore(None)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        measured = self._evaluation_means.take()
        if output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    # State

    def _write_run_files(self, folder: Path) -> None:
        super()._write_run_files(folder)
        if self.distillation.enabled:
            self._keeper.write_files(folder)

    def _run_state(self) -> dict[str, Any]:
        state = super()._run_state()
        if self.distillation.enabled:
            state["distillation"] = {"settings": described(self.distillation), "files": self._keeper.state()}
        return state

    def _restore_run_state(self, state: dict[str, Any] | None) -> None:
        super()._restore_run_state(state)
        self._saved_teacher = None
        if state is not None:
            saved = state.get("distillation", {"settings": described(DistillationConfig(teacher="none"))})
            check_same("distillation", saved["settings"], described(self.distillation), "the same distillation")
            self._saved_teacher = saved.get("files")
