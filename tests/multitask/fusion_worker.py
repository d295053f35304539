"""Trains a small fused model in one stage; can kill itself, resume, and print what came out."""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments

from hf_curriculum.core.distributed import end_processes
from hf_curriculum.demo.model import build_tokenizer
from hf_curriculum.multitask.attention_fusion.features import cache_features
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.trainers import MultiTaskTrainer


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("fusion_twin", Path(__file__).with_name("fusion_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)

LEARNING = {
    "tasks": {"lora", "own_classifier"},
    "fusion": {"fusion", "classifier"},
    "joint": {"lora", "fusion", "classifier"},
}


def base_of(tokenizer, dropout=0.0):
    quiet = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return twin.base_model("bert", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **quiet)


def model_of(tokenizer, level, stage, *, lora_dropout=0.0, base_dropout=0.0, random=True, **options):
    """A model whose LoRAs and heads are drawn at random, as if they had been trained; its fusion hears nothing yet."""
    model = twin.make(
        base=base_of(tokenizer, base_dropout),
        lora=twin.lora_config("bert", lora_dropout=lora_dropout),
        level=level,
        stage="tasks",
        random=False,
        **options,
    )
    if random:
        twin.randomise(model, {"lora", "own_classifier"})
    model.set_stage(stage)
    return model


def rows_of(model, count, seed=0):
    """Rows of all tasks in turns, of two to seven tokens; what applies follows from the first two."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(2, 8, (1,), generator=generator))
        ids = torch.randint(3, 40, (length,), generator=generator).tolist()
        task = list(model.heads)[number % len(model.heads)]
        head = model.heads[task]
        several = head.problem_type == "multi_label_classification"
        label = [ids[0] % head.num_labels] if several else (ids[0] + ids[1]) % head.num_labels
        rows.append({"input_ids": ids, "labels": model.encode_label(task, label), "task": task})
    return Dataset.from_list(rows)


class KillAt(TrainerCallback):
    """Ends the process as `kill -9` does, once a number of optimizer steps is done."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def digest(tensors):
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def whole_state(trainer):
    """All parameters by name, gathered where each process holds a part of them; on every process."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {} if state is None else {name.removeprefix("module."): value for name, value in state.items()}


def arguments_of(options):
    return TrainingArguments(
        output_dir=options.output_dir,
        use_cpu=True,
        per_device_train_batch_size=options.per_device,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=4,
        logging_steps=1,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=options.reentrant is not None,
        gradient_checkpointing_kwargs=None
        if options.reentrant is None
        else {"use_reentrant": options.reentrant == "yes"},
    )


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--level", default="output")
    parser.add_argument("--stage", default="tasks")
    parser.add_argument("--cache")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill_at", type=int, default=-1)
    parser.add_argument("--per_device", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sampling", default="proportional")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--reentrant", choices=("yes", "no"))
    parser.add_argument("--expect")
    return parser.parse_args()


def main():
    options = parse()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = model_of(tokenizer, options.level, options.stage, lora_dropout=options.dropout, dropout=options.dropout)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    kinds = twin.kinds_of(model)
    args = arguments_of(options)
    rows, collator = rows_of(model, 42), DataCollatorWithPadding(tokenizer)
    evaluation = rows_of(model, 8, seed=1)
    if options.cache:
        # Both processes come here; one makes the cache, and both read it.
        features = cache_features(model, rows, options.cache, collator=collator)
        rows, collator = features.rows, features.collator
    trainer = MultiTaskTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=None if options.cache else evaluation,
        data_collator=collator,
        multitask=MultiTaskConfig(sampling=options.sampling),
        callbacks=[KillAt(options.kill_at)],
    )
    if options.expect:
        state = trainer.accelerator.state
        stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
        assert f"{state.distributed_type.value}{stage} {state.num_processes}" == options.expect
    trainer.train(resume_from_checkpoint=options.resume or None)
    metrics = {} if options.cache else trainer.evaluate()
    state = whole_state(trainer)
    names = [name for name in start if name in state]
    if options.stage == "joint":
        # When the stage ends they become the heads of fused outputs; a checkpoint holds them so already.
        names = [name for name in names if kinds[name] != "own_classifier"]
    # A rank that is given no whole state (ZeRO-3) has nothing to compare.
    frozen = all(torch.equal(state[name], start[name]) for name in names if kinds[name] not in LEARNING[options.stage])
    moved = {kinds[name] for name in names if not torch.equal(state[name], start[name])}
    found = digest({name: state[name] for name in names})
    ranks = [found]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
    if trainer.is_world_process_zero():
        assert names
        logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        of_tasks = {name: value for name, value in sorted(metrics.items()) if name.endswith("_loss")}
        sys.stdout.write(f"STEPS {trainer.state.global_step}\n")
        sys.stdout.write(f"WEIGHTS {json.dumps(found)}\n")
        sys.stdout.write(f"RANKS {json.dumps(ranks)}\n")
        sys.stdout.write(f"FROZEN {json.dumps(frozen)}\n")
        sys.stdout.write(f"MOVED {json.dumps(sorted(moved))}\n")
        sys.stdout.write(f"LOSSES {json.dumps(logs)}\n")
        sys.stdout.write(f"EVALUATION {json.dumps(of_tasks)}\n")
        sys.stdout.flush()
    end_processes()


if __name__ == "__main__":
    main()
