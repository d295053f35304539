"""
Fine-tuning on several tasks at once with CGC-LoRA, and one plain LoRA per task at the end.

    accelerate launch recipes/multitask_cgc_lora.py            # the embedded demo: no download, minutes on CPU
    accelerate launch recipes/multitask_cgc_lora.py --objective classification
    accelerate launch recipes/multitask_cgc_lora.py --config recipes/configs/multitask_cgc_lora/instructions.yaml
    accelerate launch recipes/multitask_cgc_lora.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my.jsonl \
        --prompt_column question --completion_column answer --task_column domain --output_dir out

Arguments are TRL's (`ScriptArguments`, `SFTConfig`, `ModelConfig`), those of `DataArguments`, the ones below, and
every other field of `MultiTaskConfig` with `multitask_` before it. A YAML file sets defaults, the command line
wins, and an unknown name is an error. `--use_peft true` trains one plain LoRA that all tasks share instead.

With `--objective classification` each task has a head of its own: `--prompt_column` is the text, `--label_column` a
class by name or number, a list of classes (multi-label) or a number with a decimal point (regression).
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedModel
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from hf_curriculum.analysis.classification_metrics import accuracy, macro_f1
from hf_curriculum.analysis.gate_plots import draw_gates
from hf_curriculum.core.console import say, show_table
from hf_curriculum.core.distributed import end_processes, on_main_process
from hf_curriculum.core.errors import invalid, unsupported
from hf_curriculum.demo.base import list_copier
from hf_curriculum.demo.tasks import LABEL_TASKS, TASKS, generate_tasks, guess_losses
from hf_curriculum.multitask.cgc_lora import CGCLoraConfig, CGCLoraModel, export_task_adapters
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.heads import MultiTaskHeads
from hf_curriculum.multitask.lengths import longest_row
from hf_curriculum.multitask.mixin import MultiTaskMixin
from hf_curriculum.multitask.rows import inferred_names, task_groups, with_task_names
from hf_curriculum.multitask.task_texts import TaskTexts, heads_of_splits
from hf_curriculum.recipe import (
    DataArguments,
    check_output_dir,
    command_line,
    config_from_arguments,
    named_model,
    prefixed_arguments,
    resume_argument,
    set_cpu_defaults,
    set_cpu_threads,
)
from hf_curriculum.recipe_data import hold_out, load_splits, to_prompt_completion
from hf_curriculum.trainers import MultiTaskSFTTrainer, MultiTaskTrainer


CONFIGS = Path(__file__).parent / "configs" / "multitask_cgc_lora"
DEMO_CONFIGS = {"sft": CONFIGS / "demo.yaml", "classification": CONFIGS / "demo_classification.yaml"}


@dataclass
class RunArguments:
    """What is trained, and on which columns."""

    objective: str = field(
        default="sft", metadata={"help": "`sft` (text to text) or `classification` (a head per task)."}
    )
    task_column: str = field(default="task", metadata={"help": "Column with the task of each row, by name or id."})
    label_column: str = field(default="label", metadata={"help": "Column with the label, for classification."})
    regression_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks whose whole numbers are no classes, for classification."}
    )
    classification_pooling: str = field(
        default="mean", metadata={"help": "What of a row is classified: `cls`, `mean`, or `last` for decoders."}
    )
    demo_base_steps: int = field(
        default=150,
        metadata={"help": "Steps that the embedded base model is trained to repeat lists, before the tasks."},
    )

    def __post_init__(self) -> None:
        if self.objective not in DEMO_CONFIGS:
            raise invalid("objective", self.objective, f"one of {', '.join(DEMO_CONFIGS)}")
        if self.demo_base_steps < 0:
            raise invalid("demo_base_steps", self.demo_base_steps, "an integer >= 0")


@dataclass
class CGCArguments:
    """The experts; see `CGCLoraConfig`."""

    cgc_num_common_experts: int = field(default=2, metadata={"help": "LoRA experts that every task sees."})
    cgc_num_task_experts: int = field(default=1, metadata={"help": "LoRA experts of each task alone."})
    cgc_r: int = field(default=4, metadata={"help": "Rank of one expert."})
    cgc_lora_alpha: float = field(default=8.0, metadata={"help": "Numerator of the scale alpha / r."})
    cgc_lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the experts."})
    cgc_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers to adapt, or `all-linear`. None: those of PEFT's LoRA."}
    )
    cgc_gate: str = field(default="task", metadata={"help": "What gates depend on: task, task_embedding or token."})
    cgc_gate_normalization: str = field(default="softmax", metadata={"help": "softmax (sum 1) or sum_to_n."})


def make_parser() -> TrlParser:
    """Builds the parser."""
    multitask = prefixed_arguments(MultiTaskConfig, "multitask_", without=("task_column",))
    groups = (ScriptArguments, SFTConfig, ModelConfig, DataArguments, RunArguments, CGCArguments, multitask)
    parser = TrlParser(groups)
    set_cpu_defaults(parser)
    parser.set_defaults(output_dir="outputs/multitask_cgc_lora")
    return parser


def adapter_config(
    cgc: CGCArguments, model_args: ModelConfig, tasks: list[str], unknown_task: str | None, task_type: str | None
) -> PeftConfig:
    """CGC-LoRA, or with `--use_peft true` the plain LoRA that all tasks share."""
    if model_args.use_peft:
        shared = get_peft_config(model_args)
        shared.task_type = task_type
        return shared
    values = {item.name.removeprefix("cgc_"): getattr(cgc, item.name) for item in fields(CGCArguments)}
    if values["target_modules"] == ["all-linear"]:
        values["target_modules"] = "all-linear"
    return CGCLoraConfig(task_names=tasks, unknown_task=unknown_task or "error", task_type=task_type, **values)


# Models and data


def load_data(
    script: ScriptArguments, data: DataArguments, training: SFTConfig, run: RunArguments
) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows as they are stored; the generated tasks without a name."""
    if script.dataset_name is None:
        chosen = LABEL_TASKS if run.objective == "classification" else TASKS
        train, test = generate_tasks(data.demo_rows, seed=training.seed, tasks=chosen), None
    else:
        train, test = load_splits(script)
    if run.task_column not in train.column_names:
        raise invalid(
            "task_column", run.task_column, f"a column of the data, which has {', '.join(train.column_names)}"
        )
    train, test = (with_task_names(rows, run.task_column) for rows in (train, test))
    if test is not None:
        return train, test
    return hold_out(train, data.eval_fraction, training.seed, task_groups(train, run.task_column))


# Text to text


def train_sft(
    model_args: ModelConfig,
    training: SFTConfig,
    script: ScriptArguments,
    data: DataArguments,
    run: RunArguments,
    cgc: CGCArguments,
    multitask: MultiTaskConfig,
) -> tuple[MultiTaskMixin, PreTrainedModel]:
    """Trains on prompts and completions."""
    named = named_model(model_args, script, training)
    train, test = load_data(script, data, training, run)
    tasks = multitask.task_names or inferred_names(train, run.task_column)
    model, tokenizer = named or list_copier(run.demo_base_steps, training.seed)
    keep = {data.prompt_column, data.completion_column, run.task_column, "messages", "text", "input_ids", "labels"}
    parts = [None if part is None else part.select_columns([c for c in part.column_names if c in keep])
             for part in (train, test)]  # fmt: skip
    trainer = MultiTaskSFTTrainer(
        model=model,
        args=training,
        train_dataset=to_prompt_completion(parts[0], data, tokenizer),
        eval_dataset=None if parts[1] is None else to_prompt_completion(parts[1], data, tokenizer),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=adapter_config(cgc, model_args, tasks, multitask.unknown_task, "CAUSAL_LM"),
        multitask=multitask,
    )
    trainer.train(resume_from_checkpoint=resume_argument(training))
    if test is not None:
        show_losses(trainer, with_guess=script.dataset_name is None)
    trainer.save_model(training.output_dir)
    return trainer, trainer.model


def show_losses(trainer: MultiTaskMixin, with_guess: bool = False) -> None:
    """Evaluates, and prints the loss of each task, in the demo beside that of a guess among its answers."""
    found, data = trainer.evaluate(), trainer.train_dataset
    guess = guess_losses(data["labels"][:], data[trainer.multitask.task_column][:]) if with_guess else {}
    rows = [[name, found.get(f"eval_{name}_loss"), guess.get(name)] for name in trainer.task_registry]
    columns = ("task", "loss", "of a guess")
    width = 3 if with_guess else 2
    title = "Evaluation loss of each task, mean over its labels"
    show_table(title, columns[:width], [row[:width] for row in rows])


# Classification


def train_classifier(
    model_args: ModelConfig,
    training: SFTConfig,
    script: ScriptArguments,
    data: DataArguments,
    run: RunArguments,
    cgc: CGCArguments,
    multitask: MultiTaskConfig,
) -> tuple[MultiTaskMixin, MultiTaskHeads]:
    """Trains one head per task over one backbone."""
    if training.packing or training.padding_free:
        raise unsupported(
            "Packing with `--objective classification`", "rows of a pack cannot be told apart", "Leave it unset."
        )
    named = named_model(model_args, script, training)
    train, test = load_data(script, data, training, run)
    tasks = multitask.task_names or inferred_names(train, run.task_column)
    model, tokenizer = named or list_copier(run.demo_base_steps, training.seed)
    if isinstance(model, str):
        kept = {
            "trust_remote_code": training.trust_remote_code,
            "quantization_config": get_quantization_config(model_args),
        }
        backbone = AutoModel.from_pretrained(model, **(kept | training.model_init_kwargs))
    else:
        backbone = model.base_model
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    adapted = get_peft_model(backbone, adapter_config(cgc, model_args, tasks, None, None))
    labelled = [None if rows is None else TaskTexts([], rows[run.task_column][:], rows[run.label_column][:])
                for rows in (train, test)]  # fmt: skip
    heads = heads_of_splits(tasks, *labelled, regression_tasks=run.regression_tasks or ())
    model = MultiTaskHeads(adapted, heads, pooling=run.classification_pooling)

    limits = [limit for limit in (training.max_length, longest_row(backbone, tokenizer)) if limit is not None]
    length = min(limits, default=None)

    def encode(text: str, label: Any, task: str | int) -> dict[str, Any]:
        ids = tokenizer(text, truncation=length is not None, max_length=length)
        return {"input_ids": ids.input_ids, "labels": model.encode_label(task, label), run.task_column: task}

    def encoded(rows: Dataset) -> Dataset:
        columns = [data.prompt_column, run.label_column, run.task_column]
        return rows.map(encode, input_columns=columns, remove_columns=rows.column_names, desc="Tokenizing")

    trainer = MultiTaskTrainer(
        model=model,
        args=training,
        train_dataset=encoded(train),
        eval_dataset=None if test is None else encoded(test),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        multitask=multitask,
    )
    trainer.train(resume_from_checkpoint=resume_argument(training))
    if test is not None:
        show_losses(trainer)
        show_scores(trainer, model)
    trainer.save_model(training.output_dir)
    return trainer, model


def show_scores(trainer: MultiTaskTrainer, model: MultiTaskHeads) -> None:
    """Prints accuracy and macro-F1 of the tasks whose rows have one class."""
    predicted = trainer.predict(trainer.eval_dataset)
    ids = np.array([model.registry().id(task) for task in trainer.eval_dataset[trainer.multitask.task_column]])
    table = []
    for task, (name, head) in enumerate(model.heads.items()):
        labels = np.asarray(predicted.label_ids).reshape(len(ids), -1)[:, 0]
        mask = (ids == task) & (labels != -100)
        if head.problem_type == "single_label_classification" and mask.any():
            found, wanted = predicted.predictions[mask].argmax(axis=1), labels[mask].astype(np.int64)
            table.append([name, int(mask.sum()), head.num_labels, accuracy(found, wanted), macro_f1(found, wanted)])
    if table:
        show_table("Held-out rows", ("task", "rows", "classes", "accuracy", "macro-F1"), table)


# What the tasks came to share, and the way out


def show_gates(tuner: object, output_dir: str) -> None:
    """Prints the gates of each task, averaged over the layers, and draws those of each layer."""
    if not isinstance(tuner, CGCLoraModel) or any(config.gate == "token" for config in tuner.peft_config.values()):
        return
    if any(hasattr(parameter, "ds_id") for parameter in tuner.parameters()):  # ZeRO-3: each process holds a part
        return
    table = torch.stack(list(tuner.gate_table().values())).mean(dim=0)
    layout = next(iter(tuner.peft_config.values())).layout
    common = [f"common {number}" for number in range(layout.num_common)]
    rows = []
    for task, (name, gates) in enumerate(zip(tuner.registry(), table.tolist(), strict=True)):
        start = layout.num_common + task * layout.num_own
        rows.append([name, *gates[: layout.num_common], sum(gates[start : start + layout.num_own])])
    show_table("Gates, mean over the layers", ("task", *common, "own"), rows)
    if find_spec("matplotlib") is None:
        say('No picture of the gates: it needs `pip install "hf_curriculum[plots]"`.')
    elif (picture := on_main_process(lambda: draw_gates(output_dir))) is not None:
        say(f"Gates of each layer and task in {picture}.")


def export(model: PreTrainedModel | MultiTaskHeads, tuner: object, output_dir: str) -> None:
    """Writes one plain LoRA per task, with its head where there is one, where the gates allow it."""
    if not isinstance(tuner, CGCLoraModel):
        return
    if not all(config.collapses for config in tuner.peft_config.values()):
        say("Gates that depend on the token do not collapse: there is no plain LoRA per task to export.")
        return
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        say("Each process holds a part of the weights: export from the saved adapter with `hf-curriculum export`.")
        return
    folder = Path(output_dir) / "task_adapters"
    on_main_process(lambda: shutil.rmtree(folder, ignore_errors=True))
    export_task_adapters(model, folder)
    say(f"One plain LoRA per task in {folder}.")


def main(
    script: ScriptArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    data: DataArguments,
    run: RunArguments,
    cgc: CGCArguments,
    multitask: MultiTaskConfig,
) -> None:
    """Trains, reports, saves, exports."""
    set_cpu_threads(training, data.cpu_threads)
    check_output_dir(training)
    # Experts and heads are drawn from the global generator before a trainer seeds it.
    torch.manual_seed(training.seed)
    train = train_classifier if run.objective == "classification" else train_sft
    trainer, model = train(model_args, training, script, data, run, cgc, multitask)
    tuner = (model.backbone if isinstance(model, MultiTaskHeads) else model).base_model
    show_gates(tuner, training.output_dir)
    export(model, tuner, training.output_dir)
    say(f"Model saved to {training.output_dir}, run record to {trainer.record.folder}.")


def demo_config(words: Sequence[str]) -> Path:
    """The config of the demo whose objective the words of the command line name."""
    return DEMO_CONFIGS["classification" if "classification" in " ".join(words) else "sft"]


if __name__ == "__main__":
    words = command_line(sys.argv[1:], demo_config(sys.argv[1:]))
    *parsed, run_arguments, cgc_arguments, rest = make_parser().parse_args_and_config(words)
    multitask = config_from_arguments(MultiTaskConfig, "multitask_", rest, task_column=run_arguments.task_column)
    main(*parsed, run_arguments, cgc_arguments, multitask)
    end_processes()
