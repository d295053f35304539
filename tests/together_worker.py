"""Trains with order, memory, place and (on adapters) sharing in one run; can kill itself and resume."""

import argparse
import hashlib
import json
import os
import signal
import sys

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_curriculum import (
    CGCLoraConfig,
    CurriculumConfig,
    CurriculumMixin,
    CurriculumSFTTrainer,
    DistillationConfig,
    DistillationMixin,
    LayerFreezeCallback,
    MultiTaskMixin,
)
from hf_curriculum.core.distributed import end_processes, is_main_process
from hf_curriculum.core.parameters import ParameterSnapshot, parameters_by_name
from hf_curriculum.core.records import RunRecord
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


NAMES = ["sum", "sort", "echo"]


class TasksTrainer(MultiTaskMixin, DistillationMixin, CurriculumMixin, SFTTrainer):
    """All four."""


class KillAt(TrainerCallback):
    """Ends the process as `kill -9` does, once a number of optimizer steps is done."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class FrozenWatch(TrainerCallback):
    """In every step what learns moves, and what does not stands still, by block."""

    def __init__(self, trainer, callback):
        self.trainer, self.callback, self.before = trainer, callback, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = values_of(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        after, run = values_of(self.trainer), self.callback.run
        if is_main_process() and state.global_step > 1:  # the learning rate of the first step is 0
            for number, block in enumerate(run.blocks.blocks):
                moved = any(not torch.equal(self.before[name], after[name]) for name in block.parameters)
                assert moved == (number in run.window.active), (state.global_step, block.name)


class TeacherWatch(TrainerCallback):
    """A hash of what the teacher says about a fixed batch, after every optimizer step."""

    def __init__(self, trainer):
        self.trainer, self.digests = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        teacher = self.trainer._keeper.teacher
        if teacher is not None:
            ids = torch.arange(5, 13).reshape(2, 4)
            inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            if isinstance(self.trainer, TasksTrainer):
                inputs["tasks"] = torch.tensor([0, 2])
            hidden = teacher.hidden(self.trainer.model_wrapped, inputs).float()
            self.digests.append([state.global_step, hashlib.sha256(hidden.numpy().tobytes()).hexdigest()[:16]])


def values_of(trainer):
    """All weights, whole, on rank 0."""
    return ParameterSnapshot(parameters_by_name(trainer.model), model=trainer.model_wrapped).state()


def rows(count, seed):
    corpus = generate_corpus(count, seed=seed)
    tasks = [NAMES[min(index % 4, 2)] for index in range(count)]
    return Dataset.from_dict({"prompt": corpus["prompt"], "completion": corpus["completion"], "task": tasks})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tasks", action="store_true", help="CGC-LoRA on three tasks in place of full fine-tuning")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill_at", type=int, default=-1)
    parser.add_argument("--per_device", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--expect")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.config.attention_dropout = options.dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = options.dropout
    data, probe, extra = rows(96, 0), rows(12, 1), {}
    if options.tasks:
        extra["peft_config"] = CGCLoraConfig(task_names=NAMES, lora_dropout=options.dropout, task_type="CAUSAL_LM")
    else:
        data, probe = data.remove_columns("task"), probe.remove_columns("task")
    freezing = LayerFreezeCallback("adaptive", active_fraction=0.5, interval_steps=3, warmup_steps=4, ramp_steps=2)
    trainer = (TasksTrainer if options.tasks else CurriculumSFTTrainer)(
        model=model,
        args=SFTConfig(
            output_dir=options.output_dir,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=options.checkpointing,
            per_device_train_batch_size=options.per_device,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=1e-2,
            weight_decay=0.1,
            warmup_steps=1,
            max_length=128,
            save_steps=4,
            logging_steps=1,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=probe,
        processing_class=tokenizer,
        curriculum=CurriculumConfig(scorer="length", num_levels=3, replay_fraction=0.25, use_cache=False),
        distillation=DistillationConfig(teacher="previous_stage", alpha=0.5),
        callbacks=[freezing],
        **extra,
    )
    if options.expect:
        state = trainer.accelerator.state
        stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
        assert f"{state.distributed_type.value}{stage} {state.num_processes}" == options.expect
    watch = TeacherWatch(trainer)
    for callback in (KillAt(options.kill_at), FrozenWatch(trainer, freezing), watch):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=options.resume or None)
    values = values_of(trainer)
    if is_main_process():
        digest = hashlib.sha256()
        for name, value in sorted(values.items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        record = RunRecord(options.output_dir).read("layers")
        results = {
            "STEPS": trainer.state.global_step,
            "STAGES": [[stage.first_step, stage.end_step] for stage in trainer.stages],
            "DECISIONS": [[line["first_step"], line["active"]] for line in record],
            "TEACHER": watch.digests,
            "LOSSES": [entry["loss"] for entry in logs],
            "DIVERGENCES": [entry.get("kd_loss") for entry in logs],
            "MATRIX": trainer.level_matrix.matrix("loss").tolist(),
            "WEIGHTS": digest.hexdigest(),
        }
        for key, value in results.items():
            sys.stdout.write(f"{key} {json.dumps(value)}\n")
    end_processes()


if __name__ == "__main__":
    main()
