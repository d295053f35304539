"""Tasks beside a curriculum and a teacher, in one trainer."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from hf_curriculum import CurriculumConfig, CurriculumMixin, DistillationConfig, DistillationMixin
from hf_curriculum.multitask.mixin import MultiTaskMixin


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("task_runs", Path(__file__).with_name("task_runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)
NAMES, cgc, row_task_pairs, seen_batches, text_rows = (
    runs.NAMES,
    runs.cgc,
    runs.row_task_pairs,
    runs.seen_batches,
    runs.text_rows,
)
CurriculumMultiTaskTrainer = runs.CurriculumMultiTaskTrainer


def test_a_curriculum_decides_the_order_and_tasks_travel_along(build):
    trainer = build(
        {"num_train_epochs": 2},
        cls=CurriculumMultiTaskTrainer,
        peft_config=cgc(),
        eval_rows=text_rows(8, seed=2),
        curriculum=CurriculumConfig(scorer="loss", num_levels=2, use_cache=False),
    )
    assert trainer.task_sampler is None
    of_row = row_task_pairs(trainer)
    position = {tuple(ids): row for row, ids in enumerate(trainer.train_dataset["input_ids"])}
    drawn = []
    for batch in seen_batches(trainer):
        for ids, mask, task in zip(batch["input_ids"], batch["attention_mask"], batch["tasks"], strict=True):
            drawn.append(position[tuple(ids[mask.bool()].tolist())])
            assert of_row[tuple(ids[mask.bool()].tolist())] == task
    assert drawn == trainer.curriculum_plan.indices.tolist()
    assert "eval_level_0_loss" in trainer.evaluate_levels()
    assert any(key.startswith("eval_level_0_") and key.endswith("sum_loss") for key in trainer.evaluate_levels())


@pytest.mark.parametrize("multitask", [{"sampling": "uniform"}, {"batches": "homogeneous"}])
def test_sampling_beside_a_curriculum_is_refused(build, multitask):
    with pytest.raises(ValueError, match="its default beside a mixin that fixes the order"):
        build(cls=CurriculumMultiTaskTrainer, multitask=multitask, curriculum=CurriculumConfig(scorer="length"))


def test_a_curriculum_spreads_the_tasks_over_each_stage(build):
    rows = text_rows(40)
    # By task in the order of the file, so that only spreading can mix them; levels cut across the tasks.
    rows = rows.add_column("difficulty", [float(index // 5 % 2) for index in range(40)]).sort("task")
    trainer = build(
        rows=rows,
        cls=CurriculumMultiTaskTrainer,
        curriculum=CurriculumConfig(scorer="column", difficulty_column="difficulty", num_levels=2),
    )
    tasks = np.array(trainer.train_dataset["task"])[trainer.curriculum_plan.indices]
    for stage in trainer.stages:
        # Each half of a stage has the tasks in their shares: echo 3/5, the others 1/5.
        own = tasks[stage.first_step * 4 : stage.end_step * 4]
        for half in np.array_split(own, 2):
            assert abs(np.mean(half == "echo") - 0.6) <= 0.11
            assert set(half) == set(NAMES)


class WronglyOrderedTrainer(CurriculumMixin, MultiTaskMixin, SFTTrainer):
    pass


def test_a_curriculum_before_the_tasks_is_refused(build):
    with pytest.raises(ValueError, match="got CurriculumMixin before MultiTaskMixin"):
        build(cls=WronglyOrderedTrainer, curriculum=CurriculumConfig(scorer="length"))


class EverythingTrainer(MultiTaskMixin, DistillationMixin, CurriculumMixin, SFTTrainer):
    pass


class TeacherWatch(TrainerCallback):
    """Logits of the teacher on a fixed batch, by stage."""

    def __init__(self):
        self.trainer, self.logits = None, {}

    def note(self):
        teacher = self.trainer._keeper.teacher
        stage = next(stage.index for stage in self.trainer.stages if self.trainer.state.global_step < stage.end_step)
        if teacher is not None:
            with torch.no_grad(), teacher.acting(self.trainer.model) as model:
                logits = model(input_ids=torch.arange(5, 13).reshape(2, 4), tasks=["sum", "echo"]).logits
            self.logits.setdefault(stage, []).append(logits.clone())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.note()


@pytest.mark.parametrize("teacher", ["previous_stage", "base"])
def test_curriculum_distillation_and_tasks_train_together(build, teacher):
    watch, forwards, batches = TeacherWatch(), [], []
    trainer = watch.trainer = build(
        {"learning_rate": 1e-2},
        cls=EverythingTrainer,
        peft_config=cgc(),
        curriculum=CurriculumConfig(scorer="length", num_levels=2),
        distillation=DistillationConfig(teacher=teacher, alpha=0.5),
        callbacks=[watch],
    )
    tuner, step = trainer.model.base_model, trainer.training_step

    def noted(model, inputs, *args, **kwargs):
        batches.append(inputs["tasks"].tolist())
        return step(model, inputs, *args, **kwargs)

    def see(module, inputs):
        current = tuner.task_state.current["default"].ids.tolist()
        if inputs[0].shape[1] > 4:  # the watch's own batch has 4 tokens
            forwards.append((torch.is_grad_enabled(), current))

    trainer.training_step = noted
    tuner.adapted_layers()[0][1].register_forward_pre_hook(see)
    trainer.train()

    def rows(ids, batch):  # a batch of one task is one id
        return ids * len(batch) if len(ids) == 1 else ids

    students = [ids for with_gradients, ids in forwards if with_gradients]
    # The first two without gradients compare the model's own logits with those of its head.
    teachers = [ids for with_gradients, ids in forwards if not with_gradients][2:]
    with_teacher = batches[-len(teachers) :]
    assert [rows(ids, batch) for ids, batch in zip(students, batches, strict=True)] == batches
    assert [rows(ids, batch) for ids, batch in zip(teachers, with_teacher, strict=True)] == with_teacher
    assert len(teachers) == (len(batches) if teacher == "base" else trainer.stages[1].num_steps)
    for logits in watch.logits.values():
        assert len(logits) > 1
        assert all(torch.equal(logits[0], later) for later in logits[1:])
    assert set(watch.logits) == ({0, 1} if teacher == "base" else {1})
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert any(entry.get("kd_loss", 0) > 0 for entry in logs)
    assert all(np.isfinite(entry["loss"]) for entry in logs)
    assert {f"{name}_loss" for name in NAMES} <= {key for entry in logs for key in entry}


class DistilledMultiTaskTrainer(MultiTaskMixin, DistillationMixin, SFTTrainer):
    pass


def test_epochs_are_the_stages_of_a_teacher(build):
    trainer = build(
        {"num_train_epochs": 2, "learning_rate": 1e-2},
        cls=DistilledMultiTaskTrainer,
        peft_config=cgc(),
        distillation=DistillationConfig(teacher="previous_stage", alpha=0.5),
    )
    trainer.train()
    found = [entry.get("kd_loss") for entry in trainer.state.log_history if "loss" in entry]
    assert not any(found[:6])
    assert any(found[6:])
