"""
Does distillation from the previous stage cut forgetting, and does it lift the final mean?

Against no distillation and replay, over seeds; the grid that the defaults of `DistillationConfig` come from.

Every arm trains the same levels in stages (scores are measured once) and evaluates every level at each stage end.
`kd-<alpha>-<T>` distils from the previous stage in all stages but the first, which costs a third more there;
`replay-cost` spends the same on rows of earlier levels (a third of each stage's rows, so more steps), `replay-steps`
replays as much within the steps of `staged`. Finished runs are kept in the output folder and skipped next time;
processes started side by side with `--part 0/2` and `--part 1/2` share the work.

    OMP_NUM_THREADS=1 python benchmarks/forgetting.py --output out/demo                          # the embedded corpus
    OMP_NUM_THREADS=1 python benchmarks/forgetting.py --output out/gsm8k --model base-8m --data gsm8k/train.jsonl
    python benchmarks/forgetting.py --output out/gsm8k --report
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer, DistillationConfig, score_dataset
from hf_curriculum.core.files import write_atomic
from hf_curriculum.core.order import seeded_order
from hf_curriculum.demo import build_model, build_tokenizer, generate_corpus


GRID = ["kd-0.25-1", "kd-0.5-1", "kd-0.5-2", "kd-0.75-2"]
SCORING_SEED = 7


def build(options: argparse.Namespace, seed: int):
    """Model and tokenizer."""
    if options.model is None:
        tokenizer = build_tokenizer()
        return build_model(tokenizer, seed=seed), tokenizer
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(options.model)


def arguments(options: argparse.Namespace, seed: int, max_steps: int = -1) -> SFTConfig:
    return SFTConfig(
        output_dir=str(options.output / "run"),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_train_epochs=options.epochs,
        max_steps=max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=10,
        max_length=512,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def scored(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training and held-out rows with their difficulty; measured once."""
    folder = options.output / "scored"
    if not folder.is_dir():
        if options.data is None:
            rows = generate_corpus(options.rows, seed=SCORING_SEED)
        else:
            rows = load_dataset("json", data_files=options.data, split=f"train[:{options.rows}]")
            rows = rows.map(
                lambda question, answer: {"prompt": f"{question}\n", "completion": answer},
                input_columns=["question", "answer"],
                remove_columns=rows.column_names,
            )
        held_out = np.zeros(len(rows), dtype=bool)
        held_out[seeded_order(len(rows), SCORING_SEED, 0)[: len(rows) // 10]] = True
        model, tokenizer = build(options, SCORING_SEED)
        config = CurriculumConfig(probe="full")
        rows = score_dataset(
            model, rows, "self_paced", processing_class=tokenizer, args=arguments(options, SCORING_SEED),
            config=config, held_out=held_out,
        )  # fmt: skip
        rows = rows.add_column("held_out", held_out)
        rows.save_to_disk(options.output / "scored.unfinished")
        (options.output / "scored.unfinished").rename(folder)
    rows = load_from_disk(str(folder))
    held_out = np.asarray(rows["held_out"][:])
    rows = rows.remove_columns("held_out")
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def run(options: argparse.Namespace, arm: str, seed: int, path: Path) -> None:
    """Trains one arm and writes what came out."""
    train, test = scored(options)
    distillation, replay, max_steps = None, 0.0, -1
    if arm.startswith("kd-"):
        _, alpha, temperature = arm.split("-")
        distillation = DistillationConfig(alpha=float(alpha), temperature=float(temperature))
    elif arm.startswith("replay"):
        replay = 1 / 3
        steps = -(-len(train) * options.epochs // options.batch_size)
        max_steps = steps if arm == "replay-steps" else -1
    model, tokenizer = build(options, seed)
    trainer = CurriculumSFTTrainer(
        model=model,
        args=arguments(options, seed, max_steps),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        curriculum=CurriculumConfig(scorer="column", num_levels=3, pacing="staged", replay_fraction=replay),
        distillation=distillation,
    )
    trainer.args.output_dir = str(path.with_suffix(""))
    started = time.process_time()
    trainer.train()
    result = {
        "arm": arm,
        "seed": seed,
        "steps": trainer.state.global_step,
        "cpu_seconds": time.process_time() - started,
        "matrix": trainer.level_matrix.matrix("loss").tolist(),
        **{name: trainer.level_matrix.forgetting()[f"eval_loss_{name}"] for name in ("acc", "bwt")},
    }
    write_atomic(path, lambda file: file.write(json.dumps(result).encode()))
    print(json.dumps({key: value for key, value in result.items() if key != "matrix"}), flush=True)


def report(results: list[dict]) -> None:
    print("arm            seeds  ACC (mean loss, lower is better)   BWT (< 0: forgotten)   CPU s")
    for arm in dict.fromkeys(result["arm"] for result in results):
        of_arm = [result for result in results if result["arm"] == arm]
        acc, bwt = ([result[key] for result in of_arm] for key in ("acc", "bwt"))
        spread = [np.std(values, ddof=1) if len(values) > 1 else float("nan") for values in (acc, bwt)]
        seconds = np.mean([result["cpu_seconds"] for result in of_arm])
        print(
            f"{arm:14} {len(of_arm):5}  {np.mean(acc):.4f} +- {spread[0]:.4f}                   "
            f"{np.mean(bwt):+.4f} +- {spread[1]:.4f}     {seconds:6.0f}"
        )
        for level, row in enumerate(np.mean([result["matrix"] for result in of_arm], axis=0)):
            print(f"    after stage {level}: " + "  ".join(f"{value:.3f}" for value in row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="path or Hub id; without one, the embedded model")
    parser.add_argument("--data", help="JSON lines with `question` and `answer`; without it, the embedded corpus")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--arms", nargs="+", default=["staged", *GRID])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--prepare", action="store_true", help="measure the difficulty and stop")
    parser.add_argument("--report", action="store_true", help="print what is there and stop")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.report:
        report([json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))])
        return
    scored(options)
    if options.prepare:
        return
    part, parts = map(int, options.part.split("/"))
    jobs = [(seed, arm) for seed in options.seeds for arm in options.arms]
    for number, (seed, arm) in enumerate(jobs):
        path = options.output / f"{arm}-{seed}.json"
        if number % parts == part and not path.is_file():
            run(options, arm, seed, path)


if __name__ == "__main__":
    main()
