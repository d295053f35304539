"""Trains with layers freezing; can kill itself, resume, and print what came out."""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig

from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer
from hf_curriculum.core.distributed import end_processes, is_main_process
from hf_curriculum.core.parameters import ParameterSnapshot, parameters_by_name
from hf_curriculum.core.records import RunRecord
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.layerwise.callback import LayerFreezeCallback


_SPEC = importlib.util.spec_from_file_location("freeze_twin", Path(__file__).with_name("freeze_twin.py"))
freeze_twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(freeze_twin)

STEPS = 21


class KillAt(TrainerCallback):
    """Ends the process as `kill -9` does, once a number of optimizer steps is done."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SaveWithin(TrainerCallback):
    """Writes a checkpoint when the blocks of a step are chosen, and others are frozen."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.trainer._save_checkpoint(model, trial=None)


class SavedAdapters(TrainerCallback):
    """Every checkpoint holds the adapters of all blocks as they are, frozen ones too."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.at = {}

    def on_save(self, args, state, control, **kwargs):
        values = values_of(self.trainer)
        if is_main_process():
            values = {name.replace(".default.", "."): value for name, value in values.items() if "lora_" in name}
            saved = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter_model.safetensors")
            assert saved.keys() == values.keys(), sorted(values.keys() - saved.keys())
            for name, value in values.items():
                assert torch.equal(saved[name], value), name
            self.at[state.global_step] = values


def values_of(trainer):
    """All weights, whole, on rank 0."""
    return ParameterSnapshot(parameters_by_name(trainer.model), model=trainer.model_wrapped).state()


def plain_trainer(options, settings):
    return Trainer(
        model=freeze_twin.llama(options.lora),
        args=TrainingArguments(**settings, train_sampling_strategy="random"),
        train_dataset=freeze_twin.rows(),
        eval_dataset=freeze_twin.rows(4),
    )


def curriculum_trainer(options, settings):
    tokenizer, peft_config = build_tokenizer(), None
    if options.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return CurriculumSFTTrainer(
        model=build_model(tokenizer),
        args=SFTConfig(**settings, bf16=False, gradient_checkpointing=False),
        train_dataset=generate_corpus(96, seed=0),
        processing_class=tokenizer,
        peft_config=peft_config,
        curriculum=CurriculumConfig(scorer="length", num_levels=3, use_cache=False),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--trainer", choices=["plain", "curriculum"], default="plain")
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--attach", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill_at", type=int, default=-1)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--save_within", type=int, default=-1)
    parser.add_argument("--expect")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "output_dir": options.output_dir,
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "save_steps": 5,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if options.best:
        # The loss falls, so that the first checkpoint is the "best" one.
        settings |= {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
        settings |= {"eval_strategy": "steps", "eval_steps": 5}
    trainer = (plain_trainer if options.trainer == "plain" else curriculum_trainer)(options, settings)
    state = trainer.accelerator.state
    stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
    assert options.expect in (None, f"{state.distributed_type.value}{stage} {state.num_processes}")
    # Windows end at 6, 10, 14, 18: checkpoint 10 is written at a decision, checkpoint 15 between two.
    more = {"warmup_steps": 6} if options.policy == "adaptive" else {}
    freezing = LayerFreezeCallback(options.policy, active_fraction=0.5, interval_steps=4, ramp_steps=3, **more)
    if options.attach:
        freezing.attach(trainer)
    else:
        trainer.add_callback(freezing)
    trainer.add_callback(KillAt(options.kill_at))
    trainer.add_callback(SaveWithin(trainer, options.save_within))
    saved = SavedAdapters(trainer)
    if options.lora:
        trainer.add_callback(saved)
    trainer.train(resume_from_checkpoint=options.resume or None)
    values = values_of(trainer)
    if is_main_process():
        if options.best:
            for name, value in saved.at[5].items():
                assert torch.equal(values[name.replace(".weight", ".default.weight")], value), name
            sys.stdout.write(f"BEST {trainer.state.best_global_step}\n")
        if options.lora:
            sys.stdout.write(f"SAVED {json.dumps(sorted(saved.at))}\n")
        digest = hashlib.sha256()
        for name, value in sorted(values.items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        lines = RunRecord(options.output_dir).read("layers")
        chosen = [(line["first_step"], line["active"]) for line in lines]
        sys.stdout.write(f"STEPS {trainer.state.global_step}\n")
        sys.stdout.write(f"DECISIONS {json.dumps(chosen)}\n")
        sys.stdout.write(f"SCORES {json.dumps([line.get('scores') for line in lines])}\n")
        sys.stdout.write(f"WEIGHTS {digest.hexdigest()}\n")
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        sys.stdout.write(f"LOSSES {json.dumps(logged)}\n")
    end_processes()


if __name__ == "__main__":
    main()
