"""
Text classification on several tasks that consult one another: a LoRA and a head per task, and attention over them.

    accelerate launch recipes/multitask_classification.py      # the embedded demo: no download, a minute on CPU
    accelerate launch recipes/multitask_classification.py --config recipes/configs/multitask_classification/minilm.yaml
    accelerate launch recipes/multitask_classification.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --dataset_name my.jsonl --prompt_column text --label_column label --task_column task --output_dir out

Rows have a text, the name of a task, and a label: a class by name or number, a list of classes or a text of several
(multi-label), or a number with a decimal point (regression; a task of whole ones beside others' decimals is named by
`--regression_tasks`). `--fusion_stage` says what is trained:

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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from hf_curriculum import AttentionFusionConfig, AttentionFusionModel, MultiTaskConfig, MultiTaskTrainer
from hf_curriculum.analysis.classification_metrics import macro_f1, multi_label_f1
from hf_curriculum.analysis.fusion_plots import draw_fusion
from hf_curriculum.core.console import say
from hf_curriculum.core.distributed import end_processes, on_main_process
from hf_curriculum.core.errors import invalid, unsupported
from hf_curriculum.core.records import RECORD_FOLDER
from hf_curriculum.core.state import incompleteness, list_checkpoints
from hf_curriculum.demo.encoder import message_reader
from hf_curriculum.demo.messages import generate_messages
from hf_curriculum.multitask.attention_fusion import cache_features, measure_attention
from hf_curriculum.multitask.attention_fusion.files import CONFIG_NAME
from hf_curriculum.multitask.attention_fusion.report import show_examples, show_pruning, show_scores
from hf_curriculum.multitask.rows import inferred_names, task_groups
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.multitask.task_texts import TaskTexts, heads_of_splits, read_texts, several_label_tasks
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
from hf_curriculum.recipe_data import hold_out, load_splits


DEMO_CONFIG = Path(__file__).parent / "configs" / "multitask_classification" / "demo.yaml"
STAGES = ("both", "tasks", "fusion", "joint")


@dataclass
class LabelArguments:
    """How rows are read, and the rows of the embedded demo."""

    task_column: str = field(default="task", metadata={"help": "Column with the task of each row, by name or id."})
    label_column: str = field(default="label", metadata={"help": "Column with the label or labels of each row."})
    multi_label_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks with any number of labels per row. None: those with lists of not one."}
    )
    label_separator: str = field(default=",", metadata={"help": "Between the labels of a row, where they are texts."})
    multi_label_threshold: float = field(default=0.5, metadata={"help": "Probability above which a class applies."})
    regression_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks whose whole numbers are no classes."}
    )
    class_weights: str | None = field(default=None, metadata={"help": "`balanced`: classes count alike in the loss."})
    demo_few_rows: int = field(default=160, metadata={"help": "Rows of each of the demo's two tasks with few rows."})
    demo_held_out_rows: int = field(default=300, metadata={"help": "Rows of each of the demo's tasks to evaluate on."})
    demo_base_steps: int = field(default=150, metadata={"help": "Steps of training the embedded encoder beforehand."})

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
        default=None, metadata={"help": "LoRAs of single tasks, folders or Hub ids: `task=path`; in YAML a mapping."}
    )
    fusion_level: str = field(default="output", metadata={"help": "Where tasks consult one another: output, layer."})
    fusion_dim: int | None = field(default=None, metadata={"help": "Of query, key, value. None: 64; 8 at `layer`."})
    fusion_heads: int | None = field(default=None, metadata={"help": "Attention heads. None: 4; 2 at `layer`."})
    fusion_pooling: str | None = field(default=None, metadata={"help": "cls, mean, last. None: mean; last if causal."})
    fusion_dropout: float = field(default=0.1, metadata={"help": "Dropout before the task heads."})
    fusion_learning_rate: float | None = field(default=None, metadata={"help": "Of `fusion`. None: as of `tasks`."})
    fusion_num_train_epochs: float | None = field(default=None, metadata={"help": "Of `fusion`. None: as of `tasks`."})
    fusion_cache: bool | None = field(default=None, metadata={"help": "Compute outputs once. None: at level output."})
    fusion_prune_rows: int = field(default=1000, metadata={"help": "Held-out rows to measure pruning on; 0 for none."})

    def __post_init__(self) -> None:
        if self.fusion_stage not in STAGES:
            raise invalid("fusion_stage", self.fusion_stage, f"one of {', '.join(STAGES)}")
        if self.fusion_cache and (self.fusion_level != "output" or self.fusion_stage in ("tasks", "joint")):
            where = f"level {self.fusion_level}, stage {self.fusion_stage}"
            fix = "There task models learn or consult one another inside the base. Leave it unset."
            raise invalid("fusion_cache", f"true at {where}", "false", fix)
        if self.fusion_prune_rows < 0:
            raise invalid("fusion_prune_rows", self.fusion_prune_rows, "an integer >= 0")

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
    columns = (data.prompt_column, ours.task_column, ours.label_column)
    if missing := [column for column in columns if column not in train.column_names]:
        expected = f"columns of the data, which has {', '.join(train.column_names)}"
        raise invalid("prompt_column, task_column and label_column", missing[0], expected)
    groups = task_groups(train, ours.task_column)
    return (train, test) if test is not None else hold_out(train, data.eval_fraction, training.seed, groups)


def read_splits(
    script: ScriptArguments, data: DataArguments, training: SFTConfig, ours: LabelArguments, multitask: MultiTaskConfig
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
    kinds = {"class_weights": ours.class_weights, "regression_tasks": ours.regression_tasks or ()}
    return texts, held_out, heads_of_splits(names, texts, held_out, threshold=ours.multi_label_threshold, **kinds)


def load_base(
    named: tuple[str, PreTrainedTokenizerBase] | None, model_args: ModelConfig, training: SFTConfig, demo_steps: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base without head, and tokenizer; the embedded encoder without a name."""
    if named is None:
        return message_reader(demo_steps, training.seed)
    name, tokenizer = named
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    quantization = get_quantization_config(model_args)
    kept = {"trust_remote_code": training.trust_remote_code, "quantization_config": quantization}
    return AutoModel.from_pretrained(name, **(kept | training.model_init_kwargs)), tokenizer


def build_model(
    base: PreTrainedModel, heads: dict[str, TaskHead], model_args: ModelConfig, fusion: FusionArguments
) -> AttentionFusionModel:
    """The model in stage `tasks`, with TRL's LoRA arguments for each task."""
    lora = get_peft_config(replace(model_args, use_peft=True))
    # The task type is that of a model with its head, which is not PEFT's.
    lora.task_type = None
    # TRL makes text of a list with one name, which PEFT reads as an expression for the whole name of a layer.
    if isinstance(lora.target_modules, str) and lora.target_modules.isidentifier():
        lora.target_modules = {lora.target_modules}
    sizes = {"fusion_dim": fusion.fusion_dim, "num_attention_heads": fusion.fusion_heads}
    reading = {"pooling": fusion.fusion_pooling, "dropout": fusion.fusion_dropout}
    config = AttentionFusionConfig(heads=heads, level=fusion.fusion_level, lora=lora, **sizes, **reading)
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
            expected = f"a checkpoint of stage {fusion.fusion_stage}: {folders}"
            raise invalid("resume_from_checkpoint", str(resume), expected)
        return [(stage, resume), *((later, None) for later in wanted[wanted.index(stage) + 1 :])]
    if len(wanted) == 1 or any(incompleteness(path) is None for path in list_checkpoints(root / "fusion")):
        return [(wanted[-1], True)]
    if (root / "tasks" / CONFIG_NAME).is_file():
        return [("fusion", None)]
    return [("tasks", True), ("fusion", None)]


def check_stages(training: SFTConfig, fusion: FusionArguments, names: list[str]) -> None:
    """Refuses what cannot be done, before anything is loaded or trained."""
    if fusion.fusion_stage == "both" and training.deepspeed_plugin is not None:
        why = "a process trains once: a second training would destroy its engine"
        second = f"--fusion_stage fusion --fusion_from {training.output_dir}/tasks"
        fix = f"Run twice: `--fusion_stage tasks`, then `{second}`."
        raise unsupported("`--fusion_stage both` under DeepSpeed", why, fix)
    if training.packing or training.padding_free:
        raise unsupported("Packing with task heads", "rows of a pack cannot be told apart", "Leave it unset.")
    if fusion.fusion_stage == "fusion" and fusion.fusion_from is None and set(names) - set(fusion.loads()):
        fix = "Run `--fusion_stage tasks` first, or `both`."
        raise invalid("fusion_from", None, "the folder of stage `tasks`, or a `--fusion_load` for every task", fix)
    if fusion.fusion_cache and getattr(training.deepspeed_plugin, "zero_stage", 0) == 3:
        why = "the base is in parts until training starts"
        raise unsupported("`--fusion_cache true` under ZeRO-3", why, "Leave it unset.")


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
    # Under ZeRO-3 the base is in parts.
    can_cache = model.level == "output" and getattr(args.deepspeed_plugin, "zero_stage", 0) != 3
    if stage == "fusion" and fusion.fusion_cache is not False and can_cache:
        model.to(args.device)
        folder = Path(args.output_dir) / "pooled"
        options = {"collator": collator, "batch_size": args.per_device_eval_batch_size}
        features = {name: cache_features(model, part, folder, **options) for name, part in rows.items()}
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


def class_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """Macro-F1 of classes; where several apply to a row, the mean F1 of each."""
    return macro_f1(found, wanted) if found.ndim == 1 else multi_label_f1(found, wanted)["macro_f1"]


def report(trainer: MultiTaskTrainer, train: TaskTexts, test: TaskTexts | None, prune_rows: int) -> None:
    """Measures the attention, which is saved with the model, and shows what came of the training."""
    model, tokenizer = trainer.model, trainer.processing_class
    if test is not None:
        counts = {name: train.tasks.count(name) for name in model.heads}
        show_scores(trainer, model, trainer.eval_dataset, trained_on=counts, f1=class_f1)
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
        length = trainer.args.max_length
        if model.stage != "tasks" and model.level == "output" and prune_rows:
            show_pruning(model, tokenizer, test, max_rows=prune_rows, max_length=length)
        show_examples(model, tokenizer, test, max_length=length)


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
    named = named_model(model_args, script, training)
    train, test, heads = read_splits(script, data, training, ours, multitask)
    check_stages(training, fusion, list(heads))
    set_cpu_threads(training, data.cpu_threads)
    plan = stages_to_run(training, fusion)
    for stage, _ in plan:
        check_output_dir(stage_arguments(training, stage, fusion))
    base, tokenizer = load_base(named, model_args, training, ours.demo_base_steps)
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
            report(trainer, train, test, fusion.fusion_prune_rows)
        trainer.save_model(args.output_dir)
        say(f"Stage {stage} saved to {args.output_dir}, its run record to {trainer.record.folder}.")
    if training.push_to_hub:
        on_main_process(lambda: push(args.output_dir, training))


if __name__ == "__main__":
    *parsed, multitask_arguments = make_parser().parse_args_and_config(command_line(sys.argv[1:], DEMO_CONFIG))
    # The columns of the data become `task` and `labels` when it is read.
    main(*parsed, config_from_arguments(MultiTaskConfig, "multitask_", multitask_arguments, task_column="task"))
    end_processes()
