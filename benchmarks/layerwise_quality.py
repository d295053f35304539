"""
Does a quarter of the layers do? Full fine-tuning, LoRA of as many parameters, and policies, at equal steps.

Each arm trains at its own best of three learning rates, chosen on one seed and half of the epochs by the loss on rows
that are neither trained on nor tested, then in full on three further seeds. What counts is the loss on the test rows,
for classification also the accuracy. Finished runs are kept in the output folder and skipped next time; processes
started side by side with `--part 0/2` and `--part 1/2` share the work.

    export OMP_NUM_THREADS=1
    python benchmarks/layerwise_quality.py --task gsm8k --output out/gsm8k --model base-8m --data data/gsm8k
    python benchmarks/layerwise_quality.py --task banking77 --output out/banking --model MiniLM --data data/banking77
    python benchmarks/layerwise_quality.py --task gsm8k --output out/gsm8k --report

`--data` holds `train.jsonl` and `test.jsonl`: of GSM8K with `question` and `answer`, for a causal language model; of
BANKING77 with `text` and `intent`, for an encoder with a fresh classification head. Head and pooler learn in each arm.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_curriculum import LayerFreezeCallback
from hf_curriculum.core.console import show_table
from hf_curriculum.core.files import write_atomic
from hf_curriculum.core.order import seeded_order
from hf_curriculum.layerwise.blocks import find_blocks


ARMS = ["full", "lora", "adaptive", "random", "cyclic", "last_n"]
POLICIES = ARMS[2:]
CHOICE_SEED, SEEDS = 0, [1, 2, 3]


@dataclass(frozen=True)
class Task:
    """A data set, how a model is trained on it, and what is tried."""

    # (rows to train on, to choose the learning rate by, to test on)
    rows: Callable[[argparse.Namespace], tuple[Dataset, Dataset, Dataset]]
    trainer: Callable[[argparse.Namespace, "Arm", Dataset], Trainer]
    rates: dict[str, list[float]]
    defaults: dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One training."""

    name: str
    rate: float
    seed: int
    epochs: float
    folder: Path
    callback: LayerFreezeCallback | None

    def arguments(self, options: argparse.Namespace) -> dict:
        return {
            "output_dir": str(self.folder),
            "seed": self.seed,
            "use_cpu": True,
            "bf16": False,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": options.batch_size,
            "per_device_eval_batch_size": 32,
            "learning_rate": self.rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "train_sampling_strategy": "group_by_length",
            "logging_steps": 25,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    @property
    def callbacks(self) -> list[LayerFreezeCallback]:
        return [self.callback] if self.callback else []


def lora_rank(model: nn.Module, fraction: float) -> int:
    """The rank at which LoRAs in all linear layers of the blocks have `fraction` of the blocks' parameters."""
    blocks = find_blocks(model)
    linears = [
        module
        for block in blocks.blocks
        for module in model.get_submodule(block.name).modules()
        if isinstance(module, nn.Linear)
    ]
    return int(fraction * blocks.num_parameters / sum(each.in_features + each.out_features for each in linears))


def read(path: Path) -> Dataset:
    return load_dataset("json", data_files=str(path), split="train")


# GSM8K


def gsm8k_rows(options: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset]:
    def rows(split: str, first: int, count: int) -> Dataset:
        data = read(options.data / f"{split}.jsonl").select(range(first, first + count))
        return data.map(
            lambda question, answer: {"prompt": f"{question}\n", "completion": answer},
            input_columns=["question", "answer"],
            remove_columns=data.column_names,
        )

    count = options.eval_rows
    return rows("train", 0, options.rows), rows("train", options.rows, count), rows("test", 0, count)


def gsm8k_trainer(options: argparse.Namespace, arm: Arm, train: Dataset) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rank = lora_rank(model, options.fraction)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arm.arguments(options), gradient_checkpointing=False, max_length=256),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        if arm.name == "lora"
        else None,
        callbacks=arm.callbacks,
    )


# BANKING77


def banking77_rows(options: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset]:
    train, test = read(options.data / "train.jsonl"), read(options.data / "test.jsonl")
    names = sorted(set(train["intent"]))
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], truncation=True, max_length=64)
        return {"input_ids": encoded["input_ids"], "labels": [names.index(intent) for intent in batch["intent"]]}

    chosen, others = np.split(seeded_order(len(train))[: options.rows + options.eval_rows], [options.rows])
    parts = (train.select(chosen), train.select(others), test)
    return tuple(part.map(encode, batched=True, remove_columns=train.column_names) for part in parts)


def banking77_trainer(options: argparse.Namespace, arm: Arm, train: Dataset) -> Trainer:
    torch.manual_seed(arm.seed)  # the fresh head
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=max(train["labels"]) + 1, dtype=torch.float32
    )
    if arm.name == "lora":
        rank, blocks = lora_rank(model, options.fraction), [block.name for block in find_blocks(model).blocks]
        targets = [
            f"{block}.{name}"
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear)
        ]
        model = get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=targets,
                modules_to_save=["pooler", "classifier"],
                task_type=TaskType.SEQ_CLS,
            ),
        )
    return Trainer(
        model=model,
        args=TrainingArguments(**arm.arguments(options)),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        compute_metrics=accuracy,
        callbacks=arm.callbacks,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


TASKS = {
    "gsm8k": Task(
        gsm8k_rows,
        gsm8k_trainer,
        rates={
            **{policy: [1e-3, 2e-3, 4e-3] for policy in POLICIES},
            "full": [2.5e-4, 5e-4, 1e-3],
            "lora": [1e-3, 2e-3, 5e-3],
            "last_n": [2e-3, 4e-3, 8e-3],
        },
        defaults={"rows": 2000, "eval_rows": 200, "batch_size": 8, "epochs": 1, "fraction": 0.25},
    ),
    "banking77": Task(
        banking77_rows,
        banking77_trainer,
        rates={
            **{policy: [5e-4, 1e-3, 2e-3] for policy in POLICIES},
            "full": [2e-4, 5e-4, 1e-3],
            "lora": [5e-4, 1e-3, 2e-3],
        },
        defaults={"rows": 1540, "eval_rows": 770, "batch_size": 16, "epochs": 4, "fraction": 0.34},
    ),
}


def run(options: argparse.Namespace, name: str, rate: float, seed: int, epochs: float, path: Path) -> None:
    """Trains one arm and writes what came out."""
    callback = None
    if name in POLICIES:
        callback = LayerFreezeCallback(
            policy=name,
            active_fraction=options.fraction,
            interval_steps=options.interval,
            always_train=["pooler"] if options.task == "banking77" else None,
        )
    train, validation, test = TASKS[options.task].rows(options)
    arm = Arm(name, rate, seed, epochs, path.with_suffix(""), callback)
    trainer = TASKS[options.task].trainer(options, arm, train)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    learning = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    metrics = trainer.evaluate(validation if seed == CHOICE_SEED else test)
    result = {
        "arm": name,
        "rate": rate,
        "seed": seed,
        "epochs": epochs,
        "steps": trainer.state.global_step,
        "cpu_seconds": seconds,
        "learning": callback.run.budget if callback else learning,
        **{key: metrics[f"eval_{key}"] for key in ("loss", "accuracy") if f"eval_{key}" in metrics},
        "decisions": callback.run.decisions if callback else [],
    }
    write_atomic(path, lambda file: file.write(json.dumps(result).encode()))
    print(json.dumps({key: value for key, value in result.items() if key != "decisions"}), flush=True)


def load(options: argparse.Namespace) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))]


def tried(results: list[dict], arm: str) -> dict[float, float]:
    """Validation loss at each learning rate that was tried."""
    return {r["rate"]: r["loss"] for r in results if r["arm"] == arm and r["seed"] == CHOICE_SEED}


def best_rate(options: argparse.Namespace, arm: str) -> float | None:
    """The rate with the lowest loss on the seed of the choice; None until all were tried."""
    losses = tried(load(options), arm)
    whole = losses.keys() >= set(TASKS[options.task].rates[arm])
    return min(losses, key=losses.__getitem__) if whole else None


def report(options: argparse.Namespace) -> None:
    results, table = load(options), []
    for arm in ARMS:
        found = [r for r in results if r["arm"] == arm and r["seed"] in SEEDS]
        if not found:
            continue
        seconds = np.mean([r["cpu_seconds"] for r in found])
        accuracies = [100 * r["accuracy"] for r in found if "accuracy" in r]
        losses, rate = [r["loss"] for r in found], f"{found[0]['rate']:.0e}"
        shown = spread(accuracies, 2) if accuracies else ""
        table.append([arm, found[0]["learning"], rate, len(found), spread(losses, 4), shown, f"{seconds:.0f}"])
    show_table("test rows", ["arm", "parameters", "learning rate", "seeds", "loss", "accuracy, %", "CPU s"], table)
    choices = [
        [arm, *(f"{rate:.0e}: {loss:.4f}" for rate, loss in sorted(tried(results, arm).items()))]
        for arm in ARMS
        if len(tried(results, arm)) == len(TASKS[options.task].rates[arm])
    ]
    show_table("choice of the learning rate: validation loss", ["arm", "", "", ""], choices)


def spread(values: list[float], digits: int) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} +- {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="Hub id or path")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--rows", type=int, help="to train on")
    parser.add_argument("--eval-rows", type=int, help="to choose the learning rate by")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--fraction", type=float, help="of the blocks' parameters")
    parser.add_argument("--interval", type=int, default=20, help="steps between two decisions")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th")
    parser.add_argument("--report", action="store_true")
    options, _ = parser.parse_known_args()
    parser.set_defaults(**TASKS[options.task].defaults)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.report:
        report(options)
        return
    index, count = map(int, options.part.split("/"))
    choice = [(arm, rate) for arm in ARMS for rate in TASKS[options.task].rates[arm]]
    for number, (arm, rate) in enumerate(choice):
        path = options.output / f"{arm}-{rate:g}-{CHOICE_SEED}.json"
        if number % count == index and not path.exists():
            run(options, arm, rate, CHOICE_SEED, options.epochs / 2, path)
    for number, (seed, arm) in enumerate((seed, arm) for seed in SEEDS for arm in ARMS):
        while (best := best_rate(options, arm)) is None:  # the other processes are still at it
            time.sleep(10)
        path = options.output / f"{arm}-best-{seed}.json"
        if number % count == index and not path.exists():
            run(options, arm, best, seed, options.epochs, path)
    report(options)


if __name__ == "__main__":
    main()
