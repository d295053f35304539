"""
Text classification on several tasks that consult one another: a LoRA and a head per task, and attention over them.

    accelerate launch recipes/multitask_classification.py      # the embedded demo: no download, two minutes on CPU
    accelerate launch recipes/multitask_classification.py --config recipes/configs/multitask_classification/minilm.yaml
    accelerate launch recipes/multitask_classification.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --dataset_name my.jsonl --prompt_column text --label_column label --task_column task --output_dir out

Rows have a text, the name of a task, and a label: a class by name or number, a list of classes or a text of several
(multi-label), or a number with a decimal point (regression). `--fusion_stage` says what is trained:

    both     task LoRAs into <output_dir>/tasks, then the fusion over them into <output_dir>/fusion
    tasks    the first of the two alone
    fusion   the second alone, over `--fusion_from <folder of stage tasks>` or the LoRAs of `--fusion_load`
    joint    both at once, into <output_dir>/joint

Arguments are TRL's (`ScriptArguments`, `SFTConfig`, `ModelConfig`: its `lora_...` make the LoRA of each task),
those of `DataArguments`, the ones below, and every other field of `MultiTaskConfig` with `multitask_` before it. A
YAML file sets defaults, the command line wins, and an unknown name is an error. `--resume_from_checkpoint true` finds
the stage that was interrupted.
"""

import copy
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_quantization_config

from hf_curriculum.analysis.classification_metrics import accuracy, macro_f1, multi_label_f1
from hf_curriculum.analysis.fusion_plots import draw_fusion
from hf_curriculum.core.console import say, show_table
from hf_curriculum.core.distributed import end_processes, on_main_process
from hf_curriculum.core.errors import invalid, unsupported
from hf_curriculum.core.order import seeded_order
from hf_curriculum.core.records import RECORD_FOLDER
from hf_curriculum.core.state import incompleteness, list_checkpoints
from hf_curriculum.demo.encoder import message_reader
from hf_curriculum.demo.messages import generate_messages
from hf_curriculum.multitask.attention_fusion import AttentionFusionConfig, AttentionFusionModel
from hf_curriculum.multitask.attention_fusion.attention import measure_attention
from hf_curriculum.multitask.attention_fusion.features import cache_features
from hf_curriculum.multitask.attention_fusion.files import CONFIG_NAME
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.rows import inferred_names
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.multitask.task_texts import TaskTexts, heads_of_splits, read_texts, several_label_tasks
from hf_curriculum.recipe import (
    DataArguments,
    check_output_dir,
    command_line,
    config_from_arguments,
    hold_out,
    load_splits,
    prefixed_arguments,
    resume_argument,
    set_cpu_defaults,
    set_cpu_threads,
)
from hf_curriculum.trainers import MultiTaskTrainer


DEMO_CONFIG = Path(__file__).parent / "configs" / "multitask_classification" / "demo.yaml"
STAGES = ("both", "tasks", "fusion", "joint")
# Held-out rows shown one by one, and tables of pruning with a line for each k up to so many tasks.
EXAMPLES_OF_A_TASK = 2
MOST_PRUNINGS = 8


@dataclass
class LabelArguments:
    """How rows are read, and the rows of the embedded demo."""

    task_column: str = field(default="task", metadata={"help": "Column with the task of each row, by name or id."})
    label_column: str = field(default="label", metadata={"help": "Column with the label or labels of each row."})
    multi_label_tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks with any number of labels per row. None: those whose lists have other than one."},
    )
    label_separator: str = field(
        default=",", metadata={"help": "Between the labels of a multi-label task, where labels are texts."}
    )
    multi_label_threshold: float = field(
        default=0.5, metadata={"help": "Probability above which a class of a multi-label task is predicted."}
    )
    class_weights: str | None = field(
        default=None, metadata={"help": "`balanced`: rare classes count as much in the loss as frequent ones."}
    )
    demo_few_rows: int = field(
        default=160, metadata={"help": "Of the demo's rows, those of each of its two tasks with few rows."}
    )
    demo_held_out_rows: int = field(default=300, metadata={"help": "Rows of each of the demo's tasks to evaluate on."})
    demo_base_steps: int = field(
        default=150, metadata={"help": "Steps that the embedded encoder is trained, before the tasks."}
    )

    def __post_init__(self) -> None:
        for name in ("demo_few_rows", "demo_held_out_rows"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "an integer >= 1")
        if not self.label_separator:
            raise invalid("label_separator", "an empty text", "what stands between labels")


@dataclass
class FusionArguments:
    """Stages and fusion; see `AttentionFusionConfig`."""

    fusion_stage: str = field(default="both", metadata={"help": f"What is trained: one of {', '.join(STAGES)}."})
    fusion_from: str | None = field(default=None, metadata={"help": "Folder that stage `tasks` has written."})
    fusion_load: list[str] | None = field(
        default=None,
        metadata={"help": "Plain LoRAs of single tasks, folders or Hub ids, as `task=path`; in YAML also a mapping."},
    )
    fusion_level: str = field(default="output", metadata={"help": "Where tasks consult one another: output, layer."})
    fusion_dim: int | None = field(
        default=None, metadata={"help": "Dimension of queries, keys, values. None: 64 (output), 8 (layer)."}
    )
    fusion_heads: int | None = field(default=None, metadata={"help": "Attention heads. None: 4 (output), 2 (layer)."})
    fusion_pooling: str | None = field(
        default=None,
        metadata={"help": "What of a row is classified: cls, mean, last. None: last if causal, else mean."},
    )
    fusion_dropout: float = field(default=0.1, metadata={"help": "Dropout before the task heads."})
    fusion_learning_rate: float | None = field(
        default=None, metadata={"help": "Of stage `fusion`. None: `--learning_rate`."}
    )
    fusion_num_train_epochs: float | None = field(
        default=None, metadata={"help": "Of stage `fusion`. None: `--num_train_epochs`."}
    )
    fusion_cache: bool | None = field(
        default=None,
        metadata={"help": "Train stage `fusion` on pooled outputs computed once. None: at level output."},
    )
    fusion_prune_rows: int = field(
        default=1000, metadata={"help": "Held-out rows, at most, to measure what pruning costs on; 0 for none."}
    )

    def __post_init__(self) -> None:
        if self.fusion_stage not in STAGES:
            raise invalid("fusion_stage", self.fusion_stage, f"one of {', '.join(STAGES)}")
        if self.fusion_cache and (self.fusion_level != "output" or self.fusion_stage in ("tasks", "joint")):
            where = f"level {self.fusion_level}, stage {self.fusion_stage}"
            fix = "There task models learn or consult one another inside the base. Leave it unset."
            raise invalid("fusion_cache", f"true at {where}", "false", fix)

    def loads(self) -> dict[str, str]:
        """Where the LoRAs of single tasks are, by task."""
        if isinstance(self.fusion_load, Mapping):
            return {str(task): str(path) for task, path in self.fusion_load.items()}
        words = [word for text in self.fusion_load or [] for word in text.split(",") if word.strip()]
        pairs = [word.partition("=") for word in words]
        if wrong := [word for word, (task, _, path) in zip(words, pairs, strict=True) if not task or not path]:
            raise invalid("fusion_load", wrong[0], "task=path")
        return {task.strip(): path.strip() for task, _, path in pairs}


def make_parser() -> TrlParser:
    """Builds the parser."""
    multitask = prefixed_arguments(MultiTaskConfig, "multitask_", without=("task_column",))
    groups = (ScriptArguments, SFTConfig, ModelConfig, DataArguments, LabelArguments, FusionArguments, multitask)
    parser = TrlParser(groups)
    set_cpu_defaults(parser)
    parser.set_defaults(output_dir="outputs/multitask_classification", prompt_column="text")
    return parser


# Data and model


def load_data(
    script: ScriptArguments, data: DataArguments, training: SFTConfig, ours: LabelArguments
) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows as they are stored; the generated messages without a name."""
    if script.dataset_name is None:
        many = (data.demo_rows - 2 * ours.demo_few_rows) // 2
        if many < 1:
            raise invalid("demo_rows", data.demo_rows, f"more than twice the {ours.demo_few_rows} of `demo_few_rows`")
        rows = {"topic": many, "mood": many, "intent": ours.demo_few_rows, "tags": ours.demo_few_rows}
        held_out = generate_messages(ours.demo_held_out_rows, seed=training.seed, held_out=True)
        return generate_messages(rows, seed=training.seed), held_out
    train, test = load_splits(script)
    for column in (data.prompt_column, ours.task_column, ours.label_column):
        if column not in train.column_names:
            expected = f"columns of the data, which has {', '.join(train.column_names)}"
            raise invalid("prompt_column, task_column and label_column", column, expected)
    return hold_out(train, data.eval_fraction, training.seed) if test is None else (train, test)


def read_splits(
    script: ScriptArguments,
    data: DataArguments,
    training: SFTConfig,
    ours: LabelArguments,
    multitask: MultiTaskConfig,
) -> tuple[TaskTexts, TaskTexts | None, dict[str, TaskHead]]:
    """Training rows, rows to evaluate on, and the heads that they need."""
    train, test = load_data(script, data, training, ours)
    names = multitask.task_names or inferred_names(train, ours.task_column)
    several = ours.multi_label_tasks
    if several is None:
        several = several_label_tasks(train, ours.label_column, ours.task_column, names)
    columns = {"text": data.prompt_column, "task": ours.task_column, "label": ours.label_column}
    options = {"multi_label_tasks": several, "separator": ours.label_separator}
    texts = read_texts(train, names, columns, name="train_dataset", **options)
    held_out = None if test is None else read_texts(test, names, columns, name="eval_dataset", **options)
    weights = {"class_weights": ours.class_weights, "threshold": ours.multi_label_threshold}
    return texts, held_out, heads_of_splits(names, texts, held_out, **weights)


def load_base(
    model_args: ModelConfig, training: SFTConfig, ours: LabelArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base without head, and tokenizer; the embedded encoder without a name."""
    name = model_args.model_name_or_path
    if name is None:
        return message_reader(ours.demo_base_steps, training.seed)
    shared = {"revision": model_args.model_revision, "trust_remote_code": training.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **shared)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModel.from_pretrained(
        name,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        **shared,
    )
    return base, tokenizer


def build_model(
    base: PreTrainedModel, heads: dict[str, TaskHead], model_args: ModelConfig, fusion: FusionArguments
) -> AttentionFusionModel:
    """The model in stage `tasks`, with TRL's LoRA arguments for each task."""
    targets = model_args.lora_target_modules
    # TRL makes text of a list with one name, which PEFT reads as an expression for the whole name of a layer.
    if isinstance(targets, str) and targets != "all-linear" and targets.isidentifier():
        targets = [targets]
    lora = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=targets,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )
    config = AttentionFusionConfig(
        heads=heads,
        level=fusion.fusion_level,
        lora=lora,
        pooling=fusion.fusion_pooling,
        fusion_dim=fusion.fusion_dim,
        num_attention_heads=fusion.fusion_heads,
        dropout=fusion.fusion_dropout,
    )
    return AttentionFusionModel(base, config)


def load_tasks(model: AttentionFusionModel, fusion: FusionArguments, folder: str | Path | None) -> None:
    """Puts finished LoRAs into the model: those of a folder of stage `tasks`, then those of single tasks."""
    sources = {} if folder is None else {task: str(Path(folder) / task) for task in model.heads}
    if missing := [task for task, path in sources.items() if not Path(path).is_dir()]:
        raise invalid("fusion_from", f"{folder}, without {missing[0]}", "a folder that stage `tasks` has written")
    if unknown := [task for task in fusion.loads() if task not in model.heads]:
        raise invalid("fusion_load", unknown[0], f"tasks among {', '.join(model.heads)}")
    for task, path in {**sources, **fusion.loads()}.items():
        model.load_task(task, path)
    if sources or fusion.loads():
        say(f"Task LoRAs loaded: {', '.join({**sources, **fusion.loads()})}.")


# Stages


def stage_arguments(training: SFTConfig, stage: str, fusion: FusionArguments) -> SFTConfig:
    """The training arguments of one stage, in a folder of its own."""
    args = copy.copy(training)
    args.output_dir = str(Path(str(training.output_dir)) / stage)
    # What is pushed is the model, once, at the end.
    args.push_to_hub = False
    if stage == "fusion":
        args.learning_rate = fusion.fusion_learning_rate or args.learning_rate
        args.num_train_epochs = fusion.fusion_num_train_epochs or args.num_train_epochs
    return args


def stages_to_run(training: SFTConfig, fusion: FusionArguments) -> list[tuple[str, str | bool | None]]:
    """The stages that are left, each with the checkpoint to resume from."""
    wanted = ["tasks", "fusion"] if fusion.fusion_stage == "both" else [fusion.fusion_stage]
    root, resume = Path(str(training.output_dir)), resume_argument(training)
    if not resume:
        return [(stage, None) for stage in wanted]
    if resume is not True:
        stage = Path(str(resume)).resolve().parent.name
        if stage not in wanted:
            folders = " or ".join(str(root / name / "checkpoint-<step>") for name in wanted)
            raise invalid(
                "resume_from_checkpoint", str(resume), f"a checkpoint of stage {fusion.fusion_stage}: {folders}"
            )
        return [(stage, resume), *((later, None) for later in wanted[wanted.index(stage) + 1 :])]
    if len(wanted) == 1 or any(incompleteness(path) is None for path in list_checkpoints(root / "fusion")):
        return [(wanted[-1], True)]
    if (root / "tasks" / CONFIG_NAME).is_file():
        return [("fusion", None)]
    return [("tasks", True), ("fusion", None)]


def check_stages(training: SFTConfig, fusion: FusionArguments, names: list[str]) -> None:
    """Refuses what cannot be done, before anything is loaded or trained."""
    if fusion.fusion_stage == "both" and training.deepspeed_plugin is not None:
        folder = training.output_dir
        raise unsupported(
            "`--fusion_stage both` under DeepSpeed",
            "a process trains once: a second training would destroy its engine",
            f"Run twice: `--fusion_stage tasks`, then `--fusion_stage fusion --fusion_from {folder}/tasks`.",
        )
    if training.packing or training.padding_free:
        raise unsupported("Packing with task heads", "rows of a pack cannot be told apart", "Leave it unset.")
    if fusion.fusion_stage == "fusion" and fusion.fusion_from is None and set(names) - set(fusion.loads()):
        fix = "Run `--fusion_stage tasks` first, or `both`."
        raise invalid("fusion_from", None, "the folder of stage `tasks`, or a `--fusion_load` for every task", fix)
    if fusion.fusion_cache and is_partitioned(training):
        raise unsupported(
            "`--fusion_cache true` under ZeRO-3", "the base is in parts until training starts", "Leave it unset."
        )


def is_partitioned(training: SFTConfig) -> bool:
    """Whether each process holds a part of the weights (ZeRO-3)."""
    return training.deepspeed_plugin is not None and training.deepspeed_plugin.zero_stage == 3


def train_stage(
    stage: str,
    resume: str | bool | None,
    model: AttentionFusionModel,
    rows: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    fusion: FusionArguments,
    multitask: MultiTaskConfig,
) -> MultiTaskTrainer:
    """Trains one stage; that of the fusion over finished outputs on a cache of them."""
    model.set_stage(stage)
    collator = DataCollatorWithPadding(tokenizer)
    cached = fusion.fusion_cache is not False and model.level == "output" and not is_partitioned(args)
    if stage == "fusion" and cached:
        model.to(args.device)
        folder, size = Path(args.output_dir) / "pooled", args.per_device_eval_batch_size
        features = {
            name: cache_features(model, part, folder, collator=collator, batch_size=size)
            for name, part in rows.items()
        }
        # It reads the files of all splits.
        collator = features["train"].collator
        rows = {name: part.rows for name, part in features.items()}
    say(f"\nStage {stage}: {args.num_train_epochs:g} epoch(s), learning rate {args.learning_rate:g}.")
    on_main_process(lambda: (Path(args.output_dir) / CONFIG_NAME).unlink(missing_ok=True))
    trainer = MultiTaskTrainer(
        model=model, args=args, train_dataset=rows["train"], eval_dataset=rows.get("test"), data_collator=collator,
        processing_class=tokenizer, multitask=multitask,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# What came of it


def task_scores(head: TaskHead, logits: np.ndarray, labels: np.ndarray) -> tuple[float | None, float | None]:
    """Accuracy and macro-F1 of one task; several labels per row: rows of which all are right, and mean F1."""
    own = logits[:, : head.num_labels]
    if head.problem_type == "single_label_classification":
        found, wanted = own.argmax(axis=1), labels[:, 0].astype(np.int64)
        return accuracy(found, wanted), macro_f1(found, wanted)
    if head.problem_type == "regression":
        return None, None
    threshold = np.asarray(head.threshold)
    found = (own > np.log(threshold / (1 - threshold))).astype(np.int64)
    wanted = labels[:, : head.num_labels].astype(np.int64)
    return float((found == wanted).all(axis=1).mean()), multi_label_f1(found, wanted)["macro_f1"]


def scores_of(trainer: MultiTaskTrainer, model: AttentionFusionModel, stage: str) -> dict[str, list[Any]]:
    """Rows, accuracy, F1 and loss of each task on the held-out rows, as outputs of one stage."""
    before = model.stage
    model.set_stage(stage)
    predicted = trainer.predict(trainer.eval_dataset)
    model.set_stage(before)
    tasks = np.asarray(trainer.eval_dataset["task"][:])
    labels = np.asarray(predicted.label_ids, dtype=np.float64).reshape(len(tasks), -1)
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    found = {}
    for name, head in model.heads.items():
        if (own := tasks == name).any():
            loss = predicted.metrics[f"test_{name}_loss"]
            found[name] = [int(own.sum()), *task_scores(head, logits[own], labels[own]), loss]
    return found


def show_scores(trainer: MultiTaskTrainer, model: AttentionFusionModel, train: TaskTexts) -> None:
    """Prints the scores of each task's own model, where it was trained alone, and of the fused one."""
    own = {} if model.stage == "joint" else scores_of(trainer, model, "tasks")
    fused = {} if model.stage == "tasks" else scores_of(trainer, model, model.stage)
    counts, nothing, table = Counter(train.tasks), [None] * 4, []
    for name in model.heads:
        alone, together = own.get(name, nothing), fused.get(name, nothing)
        change = None if None in (alone[1], together[1]) else f"{together[1] - alone[1]:+.3f}"
        pairs = [value for pair in zip(alone[1:], together[1:], strict=True) for value in pair]
        table.append([name, counts[name], alone[0] or together[0], *pairs[:2], change, *pairs[2:]])
    columns = (
        "task",
        "trained on",
        "rows",
        "accuracy: own",
        "fused",
        "change",
        "F1: own",
        "fused",
        "loss: own",
        "fused",
    )
    show_table(
        "Held-out rows: the model of each task alone, and fused (several labels: all of a row right)", columns, table
    )
    changes = [fused[name][1] - own[name][1] for name in fused if name in own and own[name][1] is not None]
    if changes:
        better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        say(f"Fusion: {better} task(s) better, {worse} worse, accuracy {np.mean(changes):+.3f} in the mean.")


def show_pruning(
    model: AttentionFusionModel, tokenizer: PreTrainedTokenizerBase, rows: TaskTexts, most: int, length: int | None
) -> None:
    """Prints what is left of the accuracy where each task listens to k tasks alone, itself among them."""
    if model.level != "output" or model.stage == "tasks" or most == 0:
        return
    chosen = sorted(seeded_order(len(rows), 0, 0)[:most].tolist())
    texts, tasks = [rows.texts[place] for place in chosen], [rows.tasks[place] for place in chosen]
    count = len(model.heads)
    every = range(1, count + 1) if count <= MOST_PRUNINGS else [2**power for power in range(count.bit_length())]
    table = []
    for k in dict.fromkeys([*every, count]):
        found = model.predict(texts, task=tasks, processing_class=tokenizer, top_k=k, max_length=length)
        hits: dict[str, list[bool]] = {name: [] for name in model.heads}
        for place, prediction in zip(chosen, found, strict=True):
            label = rows.labels[place]
            right = set(prediction.label) == set(label) if isinstance(label, list) else prediction.label == label
            hits[rows.tasks[place]].append(right)
        table.append([k, *(float(np.mean(own)) if own else None for own in hits.values())])
    title = f"Accuracy on {len(chosen)} held-out rows where each task runs the k LoRAs that it listens to most"
    show_table(title, ("k", *model.heads), table)


def show_examples(
    model: AttentionFusionModel, tokenizer: PreTrainedTokenizerBase, rows: TaskTexts, length: int | None
) -> None:
    """Prints predictions for a few held-out rows, with whom they listened to."""
    places = [
        place
        for name in model.heads
        for place in [place for place, task in enumerate(rows.tasks) if task == name][:EXAMPLES_OF_A_TASK]
    ]
    texts, tasks = [rows.texts[place] for place in places], [rows.tasks[place] for place in places]
    table = []
    found = model.predict(texts, task=tasks, processing_class=tokenizer, max_length=length)
    for place, text, task, prediction in zip(places, texts, tasks, found, strict=True):
        heard = sorted((prediction.attention or {}).items(), key=lambda pair: -pair[1])[:3]
        shown = ", ".join(f"{name} {share:.2f}" for name, share in heard) or None
        table.append([shorten(text, 50), task, *map(as_text, (rows.labels[place], prediction.label)), shown])
    show_table("Predictions, and whom they listened to", ("text", "task", "label", "predicted", "listens to"), table)


def as_text(label: Any) -> str:
    """A label or several in one cell."""
    return ", ".join(map(str, label)) or "(none)" if isinstance(label, list) else str(label)


def report(
    trainer: MultiTaskTrainer,
    model: AttentionFusionModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: tuple[TaskTexts, TaskTexts | None],
    most: int,
) -> None:
    """Measures the attention, which is saved with the model, and shows what came of the training."""
    train, test = splits
    if test is not None:
        show_scores(trainer, model, train)
    if model.stage != "tasks":
        covered = test is not None and set(test.tasks) == set(model.heads)
        rows = trainer.eval_dataset if covered else trainer.train_dataset
        measured = measure_attention(model, rows, collator=trainer.data_collator.inner, batch_size=64)
        measured.write(trainer.record, trainer.state.global_step)
        measured.show()
        model.remember_attention(measured.mean())
        if find_spec("matplotlib") is None:
            say('No picture of the attention: it needs `pip install "hf_curriculum[plots]"`.')
        elif (picture := on_main_process(lambda: draw_fusion(str(trainer.args.output_dir)))) is not None:
            say(f"Heat-maps of whom tasks and classes listen to: {picture} and beside it.")
    if test is not None:
        show_pruning(model, tokenizer, test, most, trainer.args.max_length)
        show_examples(model, tokenizer, test, trainer.args.max_length)


def push(folder: str, training: SFTConfig) -> None:
    """Uploads the saved model, without checkpoints, caches and the run record."""
    api = HfApi(token=training.hub_token)
    name = training.hub_model_id or Path(str(training.output_dir)).name
    repository = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
    left_out = ["checkpoint-*/**", "pooled/**", f"{RECORD_FOLDER}/**", "training_args.bin"]
    commit = "Upload attention-fused LoRAs"
    api.upload_folder(repo_id=repository.repo_id, folder_path=folder, ignore_patterns=left_out, commit_message=commit)
    say(f"Pushed to https://huggingface.co/{repository.repo_id}.")


def main(
    script: ScriptArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    data: DataArguments,
    ours: LabelArguments,
    fusion: FusionArguments,
    multitask: MultiTaskConfig,
) -> None:
    """Trains stage by stage, reports, saves, pushes."""
    if (script.dataset_name is None) != (model_args.model_name_or_path is None):
        got = f"{model_args.model_name_or_path} and {script.dataset_name}"
        raise invalid("model_name_or_path and dataset_name", got, "both, or neither for the embedded demo")
    train, test, heads = read_splits(script, data, training, ours, multitask)
    check_stages(training, fusion, list(heads))
    set_cpu_threads(training, data.cpu_threads)
    plan = stages_to_run(training, fusion)
    for stage, _ in plan:
        check_output_dir(stage_arguments(training, stage, fusion))
    base, tokenizer = load_base(model_args, training, ours)
    # New weights are drawn from the global generator: the same in every process, and when a run is resumed.
    torch.manual_seed(training.seed)
    model = build_model(base, heads, model_args, fusion)
    is_second_half = fusion.fusion_stage == "both" and plan[0][0] == "fusion"
    load_tasks(model, fusion, Path(str(training.output_dir)) / "tasks" if is_second_half else fusion.fusion_from)
    splits = {"train": train} if test is None else {"train": train, "test": test}
    rows = {name: part.encode(model, tokenizer, training.max_length) for name, part in splits.items()}
    for stage, resume in plan:
        args = stage_arguments(training, stage, fusion)
        trainer = train_stage(stage, resume, model, rows, tokenizer, args, fusion, multitask)
        if stage == plan[-1][0]:
            report(trainer, model, tokenizer, (train, test), fusion.fusion_prune_rows)
        trainer.save_model(args.output_dir)
        say(f"Stage {stage} saved to {args.output_dir}, its run record to {trainer.record.folder}.")
    if training.push_to_hub:
        on_main_process(lambda: push(args.output_dir, training))


if __name__ == "__main__":
    *parsed, multitask_arguments = make_parser().parse_args_and_config(command_line(sys.argv[1:], DEMO_CONFIG))
    # The columns of the data become `task` and `labels` when it is read.
    main(*parsed, config_from_arguments(MultiTaskConfig, "multitask_", multitask_arguments, task_column="task"))
    end_processes()
