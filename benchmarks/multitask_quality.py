"""
Do tasks gain or lose by sharing: separate LoRAs, one shared LoRA, MOELoRA, CGC-LoRA, attention fusion, over seeds.

Four tasks of intent classification on a sentence encoder, few examples per class: three domains of CLINC150, two of
them about money like the fourth task, BANKING77, one not. All arms train the same rank in all (24 in each adapted
linear), see each row as often and take as many optimizer steps per task: a training on one task gets that task's share
of the joint batch. `lora_alpha` is such that each expert starts at scale 2 under its gate. The learning rate of an arm
is the better of the candidates on the first seed, by mean accuracy on rows that are neither trained on nor tested.

The fused arms train task LoRAs of the same rank side by side at `--task_rate`, once for both, and then a fusion for as
many steps at the rate of the arm; beside them stand single-task LoRAs with as many parameters more.

Finished runs are kept in the output folder and skipped next time; processes started side by side with `--part 0/2` and
`--part 1/2` share the arms.

    OMP_NUM_THREADS=1 python benchmarks/multitask_quality.py --output out --model all-MiniLM-L6-v2 --data data
    python benchmarks/multitask_quality.py --output out --report

`--data` holds `clinc150/{train,validation,test}.jsonl` (`text`, `intent`, `domain`) and `banking77/{train,test}.jsonl`
(`text`, `intent`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel, TrainingArguments

from hf_curriculum import (
    AttentionFusionConfig,
    AttentionFusionModel,
    CGCLoraConfig,
    MultiTaskTrainer,
    cache_features,
    measure_attention,
)
from hf_curriculum.analysis.classification_metrics import accuracy
from hf_curriculum.analysis.seesaw import show_seesaw
from hf_curriculum.core.console import show_table
from hf_curriculum.core.files import write_atomic
from hf_curriculum.core.metrics import seesaw_summary
from hf_curriculum.core.order import seeded_order
from hf_curriculum.multitask.attention_fusion.features import FeatureCollator
from hf_curriculum.multitask.heads import MultiTaskHeads, TaskHead
from hf_curriculum.multitask.labels import heads_of_labels


DOMAINS = ("banking", "credit_cards", "travel")
TASKS = (*DOMAINS, "banking77")
TARGETS = ["query", "value"]
# Trained in each adapted linear by every arm: a multiple of 4 tasks, 8 experts of MOELoRA, and 2 + 4 of CGC-LoRA.
TOTAL_RANK = 24
SCALE = 2
VALIDATION_ROWS = 4  # per class of BANKING77, which has no validation split


@dataclass(frozen=True)
class Arm:
    """The model of some tasks, with `encode_label`, and how it is trained."""

    build: Callable[[PreTrainedModel, Mapping[str, TaskHead]], nn.Module]
    together: bool = True
    # Whether task models are trained first, and then what fuses them.
    fused: bool = False


@dataclass(frozen=True)
class Schedule:
    """What all trainings of one run have in common."""

    seed: int
    learning_rate: float
    steps: int


def under_heads(adapter: Callable[[list[str]], PeftConfig]):
    """Builds a model: the adapter of these tasks, with a head each."""
    return lambda base, heads: MultiTaskHeads(get_peft_model(base, adapter(list(heads))), heads, pooling="mean")


def plain_lora(rank: int) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=TARGETS)


def moelora(names: list[str]) -> PeftConfig:
    # Each of 8 experts starts at 1/8 under its gate.
    return CGCLoraConfig.moelora(
        names, r=TOTAL_RANK, lora_alpha=8 * SCALE * TOTAL_RANK, num_experts=8, target_modules=TARGETS
    )


def cgc_lora(names: list[str]) -> PeftConfig:
    rank = TOTAL_RANK // (2 + len(names))
    # Each of the 3 experts that a task sees starts at 1/3.
    return CGCLoraConfig(
        task_names=names, num_common_experts=2, num_task_experts=1, r=rank, lora_alpha=3 * SCALE * rank,
        target_modules=TARGETS,
    )  # fmt: skip


def attention_fusion(level: str):
    rank = TOTAL_RANK // len(TASKS)
    return lambda base, heads: AttentionFusionModel(
        base, AttentionFusionConfig(heads=dict(heads), level=level, lora=plain_lora(rank), pooling="mean")
    )


def single(rank: int) -> Arm:
    return Arm(under_heads(lambda names: plain_lora(rank)), together=False)


SINGLE = "single-task LoRAs"
ARMS = {
    SINGLE: single(TOTAL_RANK // len(TASKS)),
    "one shared LoRA": Arm(under_heads(lambda names: plain_lora(TOTAL_RANK))),
    "MOELoRA": Arm(under_heads(moelora)),
    "CGC-LoRA": Arm(under_heads(cgc_lora)),
    "fusion of outputs": Arm(attention_fusion("output"), fused=True),
    "fusion in layers": Arm(attention_fusion("layer"), fused=True),
    # Ranks with which four LoRAs have the parameters of four of rank 6 and of the fusion: 1.04 and 1.00 times as many.
    "single-task LoRAs of rank 9": single(9),
    "single-task LoRAs of rank 10": single(10),
}


# Data


def read(path: Path, task: str | None = None) -> list[dict[str, str]]:
    """Rows of one file, each with its task: the one named, or the domain where it is one of ours."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if task is not None or row["domain"] in DOMAINS:
            found.append({"text": row["text"], "intent": row["intent"], "task": task or row["domain"]})
    return found


def load_rows(options: argparse.Namespace, seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows to train on, drawn anew for each seed, to choose the learning rate by, and to test on."""
    clinc, banking = options.data / "clinc150", options.data / "banking77"
    by_class: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read(clinc / "train.jsonl") + read(banking / "train.jsonl", "banking77"):
        by_class.setdefault((row["task"], row["intent"]), []).append(row)
    train, validation = [], read(clinc / "validation.jsonl")
    for number, ((task, _), rows) in enumerate(sorted(by_class.items())):
        order = seeded_order(len(rows), seed, number)
        train += [rows[place] for place in order[: options.shots]]
        if task == "banking77":
            validation += [rows[place] for place in order[options.shots : options.shots + VALIDATION_ROWS]]
    return {
        "train": train,
        "validation": validation,
        "test": read(clinc / "test.jsonl") + read(banking / "test.jsonl", "banking77"),
    }


def encoded(rows: list[dict[str, str]], model: MultiTaskHeads, tokenizer, max_length: int) -> Dataset:
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
    found = [
        {"input_ids": tokens, "labels": model.encode_label(row["task"], row["intent"]), "task": row["task"]}
        for row, tokens in zip(rows, ids, strict=True)
    ]
    return Dataset.from_list(found)


# One run


def arguments(options: argparse.Namespace, schedule: Schedule, batch: int, folder: Path) -> TrainingArguments:
    # Rows of a few short forwards need less padding than those of a long one.
    micro_batch = max(size for size in range(1, 9) if batch % size == 0)
    return TrainingArguments(
        output_dir=str(folder),
        seed=schedule.seed,
        use_cpu=options.device == "cpu",
        bf16=options.bf16,
        max_steps=schedule.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        per_device_eval_batch_size=32,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=schedule.steps // 20,
        logging_steps=max(1, schedule.steps // 6),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(options: argparse.Namespace, arm: Arm, names: list[str], rows: dict, schedule: Schedule, folder: Path):
    """Trains these tasks together; accuracy of each on the rows held out, and the number of parameters."""
    ours = {part: [row for row in found if row["task"] in names] for part, found in rows.items()}
    torch.manual_seed(schedule.seed)
    base = AutoModel.from_pretrained(options.model, dtype=torch.float32, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    columns = ([row[name] for row in ours["train"]] for name in ("task", "intent"))
    heads = heads_of_labels(names, *columns)
    model = arm.build(base, heads)
    batch = round(options.batch_size * len(ours["train"]) / len(rows["train"]))
    in_heads = sum(head.num_labels * (base.config.hidden_size + 1) for head in heads.values())
    found: dict[str, object] = {"batch": batch, "heads": in_heads}
    if arm.fused:
        found |= train_task_models(options, model, ours, schedule, tokenizer)
        model.set_stage("fusion")
    trainer = make_trainer(options, model, ours, schedule, batch, folder, tokenizer)
    trainer.train()
    found["last_loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    found["adapter"] = sum(part.numel() for part in model.parameters() if part.requires_grad) - in_heads
    if arm.fused:
        found["adapter"] += sum(part.numel() for name, part in model.named_parameters() if ".lora_" in name)
        attention = measure_attention(model, encoded(ours["test"], model, tokenizer, options.max_length),
                                      collator=DataCollatorWithPadding(tokenizer))  # fmt: skip
        attention.show()
        found["attention"] = attention.mean().tolist()
    return {**found, **evaluated(options, trainer, model, ours, names, tokenizer)}


def make_trainer(options, model, ours, schedule, batch, folder, tokenizer) -> MultiTaskTrainer:
    """On tokens, or where only a fusion of outputs learns, on what the task models make of them."""
    data = encoded(ours["train"], model, tokenizer, options.max_length)
    collator = DataCollatorWithPadding(tokenizer)
    if getattr(model, "fusion", None) is not None and model.stage == "fusion":
        features = cache_features(model, data, options.output / "features", collator=collator)
        data, collator = features.rows, features.collator
    return MultiTaskTrainer(
        model=model,
        args=arguments(options, schedule, batch, folder),
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
    )


def train_task_models(options, model, ours, schedule, tokenizer) -> dict[str, object]:
    """Trains the LoRA and head of each task side by side, or reads them; accuracies of the task models alone."""
    folder = options.output / f"task-models-{schedule.seed}"
    if not (folder / "scores.json").is_file():
        first = replace(schedule, learning_rate=options.task_rate)
        trainer = make_trainer(options, model, ours, first, options.batch_size, folder / "run", tokenizer)
        trainer.train()
        model.save_pretrained(folder)
        scored = evaluated(options, trainer, model, ours, list(model.heads), tokenizer)
        write_atomic(folder / "scores.json", lambda file: file.write(json.dumps(scored).encode()))
    for name in model.heads:
        model.load_task(name, folder / name)
    alone = json.loads((folder / "scores.json").read_text())
    return {"task_models": alone}


def evaluated(options, trainer, model, ours, names, tokenizer) -> dict[str, dict[str, float]]:
    """Accuracy of each task on the rows held out."""
    found = {}
    for part in ("validation", "test"):
        # Rows of like length side by side need little padding.
        by_length = sorted(ours[part], key=lambda row: len(row["text"]))
        data = encoded(by_length, model, tokenizer, options.max_length)
        if isinstance(trainer.data_collator.inner, FeatureCollator):
            collator = DataCollatorWithPadding(tokenizer)
            data = cache_features(model, data, options.output / "features", collator=collator).rows
        found[part] = scores(trainer, data, names)
    return found


def scores(trainer: MultiTaskTrainer, rows: Dataset, names: list[str]) -> dict[str, float]:
    """Accuracy of each task."""
    predicted = trainer.predict(rows)
    classes = predicted.predictions.argmax(axis=-1)
    tasks = rows["task"][:]
    places = {name: [place for place, task in enumerate(tasks) if task == name] for name in names}
    return {name: accuracy(classes[own], predicted.label_ids[own]) for name, own in places.items()}


def run(options: argparse.Namespace, name: str, rate: float, seed: int) -> dict:
    """Trains one arm, unless that is done, and keeps what came out."""
    path = options.output / f"{name.replace(' ', '-')}-{rate:g}-{seed}.json"
    setting = {"epochs": options.epochs, "shots": options.shots}
    if path.is_file():
        result = json.loads(path.read_text())
        if any(result[key] != value for key, value in setting.items()):
            raise SystemExit(f"{path} is of another setting than {setting}: name another --output.")
        return result
    arm, rows = ARMS[name], load_rows(options, seed)
    schedule = Schedule(seed, rate, steps=-(-len(rows["train"]) * options.epochs // options.batch_size))
    groups = [list(TASKS)] if arm.together else [[task] for task in TASKS]
    started = time.process_time()
    parts = [
        train(options, arm, group, rows, schedule, path.with_suffix("") / "-".join(group)) for group in groups
    ]  # fmt: skip
    scored = {
        key: {task: score for part in parts for task, score in part[key].items()} for key in ("validation", "test")
    }
    result = {
        "arm": name,
        "learning_rate": rate,
        "seed": seed,
        **setting,
        "steps": schedule.steps,
        "cpu_seconds": time.process_time() - started,
        **{key: sum(part[key] for part in parts) for key in ("adapter", "heads")},
        **{key: [part[key] for part in parts] for key in ("batch", "last_loss")},
        **{key: parts[0][key] for key in ("task_models", "attention") if key in parts[0]},
        **scored,
    }
    write_atomic(path, lambda file: file.write(json.dumps(result).encode()))
    print(json.dumps(result), flush=True)
    return result


# The report


def mean_score(result: dict, part: str) -> float:
    return statistics.mean(result[part].values())


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{100 * statistics.mean(values):.1f} +- {100 * deviation:.1f}"


def report(results: list[dict], first_seed: int) -> None:
    """Prints the learning rates tried, the accuracies at the better one, and the seesaws."""
    chosen: dict[str, dict[int, dict]] = {}
    tried = []
    for name in dict.fromkeys(result["arm"] for result in results):
        of_arm = [result for result in results if result["arm"] == name]
        searched = [result for result in of_arm if result["seed"] == first_seed]
        best = max(searched, key=lambda result: mean_score(result, "validation"))["learning_rate"]
        chosen[name] = {result["seed"]: result for result in of_arm if result["learning_rate"] == best}
        tried += [
            [name, f"{result['learning_rate']:g}", *(spread([mean_score(result, part)]).split()[0]
             for part in ("validation", "test")), "chosen" if result["learning_rate"] == best else ""]
            for result in searched
        ]  # fmt: skip
    show_table(f"Learning rates on seed {first_seed}, mean accuracy", ("arm", "rate", "validation", "test", ""), tried)
    table = []
    for name, by_seed in chosen.items():
        runs = list(by_seed.values())
        per_task = [spread([result["test"][task] for result in runs]) for task in TASKS]
        mean = spread([mean_score(result, "test") for result in runs])
        worst = spread([min(result["test"].values()) for result in runs])
        seconds = f"{statistics.mean(result['cpu_seconds'] for result in runs):.0f}"
        table.append([name, len(runs), runs[0]["adapter"], *per_task, mean, worst, seconds])
    columns = ("arm", "seeds", "parameters", *TASKS, "mean", "worst task", "CPU s")
    show_table(
        "Test accuracy in percent, mean +- standard deviation over seeds; parameters of the adapters", columns, table
    )
    show_seesaws(chosen)


def show_seesaws(chosen: dict[str, dict[int, dict]]) -> None:
    """Each arm against single-task training on the same rows."""
    alone = chosen.get(SINGLE, {})
    table = []
    for name in [name for name in chosen if name != SINGLE]:
        seeds = sorted(set(alone) & set(chosen[name]))
        if not seeds:
            continue
        pairs = [([chosen[name][seed]["test"][t] for t in TASKS], [alone[seed]["test"][t] for t in TASKS])
                 for seed in seeds]  # fmt: skip
        found = [seesaw_summary(together, single, True, 0.0) for together, single in pairs]
        changes = [spread([summary.changes[task] for summary in found]) for task in range(len(TASKS))]
        worst = spread([min(summary.changes) for summary in found])
        table.append([name, *changes, spread([summary.mean for summary in found]), worst])
        means = [[statistics.mean(column) for column in zip(*side, strict=True)] for side in zip(*pairs, strict=True)]
        show_seesaw(*means, [f"{name}: {task}" for task in TASKS])
    show_table(
        "Change against single-task LoRAs on the same rows, points, mean +- standard deviation over seeds",
        ("arm", *TASKS, "mean", "worst change of a seed"),
        table,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="path or Hub id of a sentence encoder")
    parser.add_argument("--data", type=Path, help="folder with `clinc150` and `banking77`")
    parser.add_argument("--shots", type=int, default=16, help="training rows per class")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=48)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--task_rate", type=float, default=3e-3, help="of the task models that are fused")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--report", action="store_true", help="print what is there and stop")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.report:
        results = [json.loads(path.read_text()) for path in options.output.glob("*.json")]
        order = {name: number for number, name in enumerate(ARMS)}
        results.sort(key=lambda result: (order[result["arm"]], result["learning_rate"], result["seed"]))
        report(results, options.seeds[0])
        return
    if options.model is None or options.data is None:
        parser.error("--model and --data are needed to train")
    if options.device == "cpu":
        torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    first, *others = options.seeds
    for name in options.arms[part::parts]:
        searched = [run(options, name, rate, first) for rate in options.learning_rates]
        best = max(searched, key=lambda result: mean_score(result, "validation"))["learning_rate"]
        for seed in others:
            run(options, name, best, seed)


if __name__ == "__main__":
    main()
