"""Trains a small CGC-LoRA on three tasks; can kill itself, resume, and print what came out."""

import argparse
import hashlib
import json
import os
import signal

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig

from hf_curriculum.core.distributed import end_processes
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.multitask.cgc_lora.config import CGCLoraConfig
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.trainers import MultiTaskSFTTrainer


NAMES = ["sum", "sort", "echo"]


class KillAt(TrainerCallback):
    """Ends the process as `kill -9` does, once a number of optimizer steps is done."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def rows(count, seed):
    corpus = generate_corpus(count, seed=seed)
    return Dataset.from_dict(
        {
            "prompt": corpus["prompt"],
            "completion": corpus["completion"],
            "task": [NAMES[min(index % 4, 2)] for index in range(count)],
        }
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill_at", type=int, default=-1)
    parser.add_argument("--per_device", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--shared_lora", action="store_true")
    parser.add_argument("--expect")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    adapter = {"lora_dropout": options.dropout, "task_type": "CAUSAL_LM"}
    peft_config = LoraConfig(**adapter) if options.shared_lora else CGCLoraConfig(task_names=NAMES, **adapter)
    trainer = MultiTaskSFTTrainer(
        model=build_model(tokenizer),
        args=SFTConfig(
            output_dir=options.output_dir,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=options.per_device,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=options.accumulation,
            num_train_epochs=2,
            learning_rate=1e-2,
            max_length=128,
            packing=options.packing,
            save_steps=4,
            logging_steps=3,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows(41, 0),
        eval_dataset=rows(11, 1),
        processing_class=tokenizer,
        peft_config=peft_config,
        multitask=MultiTaskConfig() if options.packing else MultiTaskConfig(sampling="temperature"),
        callbacks=[KillAt(options.kill_at)],
    )
    if options.expect:
        state = trainer.accelerator.state
        stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
        assert f"{state.distributed_type.value}{stage} {state.num_processes}" == options.expect
    trainer.train(resume_from_checkpoint=options.resume or None)
    metrics = trainer.evaluate()
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        print("STEPS", trainer.state.global_step, flush=True)
        print("WEIGHTS", json.dumps(digest.hexdigest()), flush=True)
        print("LOSSES", json.dumps([[entry.get(f"{name}_loss") for name in NAMES] for entry in logs]), flush=True)
        print("EVALUATION", json.dumps([metrics[f"eval_{name}_loss"] for name in NAMES]), flush=True)
    end_processes()


if __name__ == "__main__":
    main()
