"""
Does a quarter of the layers do? Full fine-tuning, LoRA of as many parameters, and policies at 25 %, at equal steps.

Each arm trains at its own best of three learning rates, chosen on one seed and half an epoch, then for one epoch on
three further seeds. What counts is the loss on held-out rows. Finished runs are kept in the output folder and skipped
next time; processes started side by side with `--part 0/2` and `--part 1/2` share the work.

    OMP_NUM_THREADS=1 python benchmarks/layerwise_quality.py --output out/layers --model base-8m --data gsm8k
    python benchmarks/layerwise_quality.py --output out/layers --report
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_curriculum import LayerFreezeCallback
from hf_curriculum.core.files import write_atomic


# Learning rates to choose from: full fine-tuning's, and higher ones where fewer parameters learn.
RATES = {"full": [2.5e-4, 5e-4, 1e-3], "lora": [1e-3, 2e-3, 5e-3], "layers": [1e-3, 2e-3, 4e-3]}
POLICIES = ["adaptive", "random", "cyclic", "last_n"]
ARMS = ["full", "lora", *POLICIES]
CHOICE_SEED, SEEDS = 0, [1, 2, 3]


def rows(options: argparse.Namespace, split: str, count: int):
    data = load_dataset("json", data_files=str(options.data / f"{split}.jsonl"), split=f"train[:{count}]")
    return data.map(
        lambda question, answer: {"prompt": f"{question}\n", "completion": answer},
        input_columns=["question", "answer"],
        remove_columns=data.column_names,
    )


def rates(arm: str) -> list[float]:
    return RATES.get(arm, RATES["layers"])


def run(options: argparse.Namespace, arm: str, rate: float, seed: int, epochs: float, path: Path) -> None:
    """Trains one arm and writes what came out."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    callback = None
    if arm not in ("full", "lora"):
        callback = LayerFreezeCallback(
            policy=arm,
            active_fraction=options.fraction,
            interval_steps=options.interval,
            warmup_steps=2 * options.interval if arm == "adaptive" else None,
        )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(path.with_suffix("")),
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_train_epochs=epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=32,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=10,
            max_length=256,
            train_sampling_strategy="group_by_length",
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows(options, "train", options.rows),
        eval_dataset=rows(options, "test", options.eval_rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules="all-linear")
        if arm == "lora"
        else None,
        callbacks=[callback] if callback else [],
    )
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    learning = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    result = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "epochs": epochs,
        "steps": trainer.state.global_step,
        "cpu_seconds": seconds,
        "learning": callback.run.budget if callback else learning,
        "eval_loss": trainer.evaluate()["eval_loss"],
        "decisions": callback.run.decisions if callback else [],
    }
    write_atomic(path, lambda file: file.write(json.dumps(result).encode()))
    print(json.dumps({key: value for key, value in result.items() if key != "decisions"}), flush=True)


def load(options: argparse.Namespace) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))]


def best_rate(results: list[dict], arm: str) -> float | None:
    """The rate with the lowest loss on the seed of the choice; None until all were tried."""
    tried = {r["rate"]: r["eval_loss"] for r in results if r["arm"] == arm and r["seed"] == CHOICE_SEED}
    return min(tried, key=tried.__getitem__) if tried.keys() >= set(rates(arm)) else None


def report(results: list[dict]) -> None:
    print("arm        rate     seeds  loss on held-out rows   parameters   CPU s")
    for arm in ARMS:
        rate = best_rate(results, arm)
        found = [r for r in results if r["arm"] == arm and r["seed"] in SEEDS]
        if found:
            losses = [r["eval_loss"] for r in found]
            spread = np.std(losses, ddof=1) if len(losses) > 1 else float("nan")
            seconds = np.mean([r["cpu_seconds"] for r in found])
            print(
                f"{arm:10} {rate:.0e}  {len(found):5}  {np.mean(losses):.4f} +- {spread:.4f}     "
                f"{found[0]['learning']:10,}   {seconds:6.0f}"
            )
    print("\nchoice of the learning rate (half an epoch, one seed):")
    for arm in ARMS:
        tried = {r["rate"]: r["eval_loss"] for r in results if r["arm"] == arm and r["seed"] == CHOICE_SEED}
        print(f"{arm:10} " + "  ".join(f"{rate:.0e}: {loss:.4f}" for rate, loss in sorted(tried.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="a causal language model: Hub id or path")
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--interval", type=int, default=10, help="steps between two decisions")
    parser.add_argument("--lora-r", type=int, default=39)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.report:
        report(load(options))
        return
    index, count = map(int, options.part.split("/"))
    choice = [(arm, rate, CHOICE_SEED, 0.5) for arm in ARMS for rate in rates(arm)]
    for number, (arm, rate, seed, epochs) in enumerate(choice):
        path = options.output / f"{arm}-{rate:g}-{seed}.json"
        if number % count == index and not path.exists():
            run(options, arm, rate, seed, epochs, path)
    for number, (seed, arm) in enumerate((seed, arm) for seed in SEEDS for arm in ARMS):
        rate = best_rate(load(options), arm)
        while rate is None:  # the other processes are still at it
            time.sleep(10)
            rate = best_rate(load(options), arm)
        path = options.output / f"{arm}-best-{seed}.json"
        if number % count == index and not path.exists():
            run(options, arm, rate, seed, 1.0, path)
    report(load(options))


if __name__ == "__main__":
    main()
