"""What the recipe scripts share: arguments made from configs, CPU defaults, data from anywhere, the output folder."""

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin, get_type_hints

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from .core.console import say
from .core.distributed import on_main_process
from .core.errors import invalid, unsupported
from .core.order import seeded_order
from .core.state import list_checkpoints


__all__ = [
    "DataArguments",
    "check_output_dir",
    "command_line",
    "config_from_arguments",
    "hold_out",
    "load_splits",
    "named_model",
    "prefixed_arguments",
    "resume_argument",
    "set_cpu_defaults",
    "set_cpu_threads",
    "to_prompt_completion",
]

T = TypeVar("T")

FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataArguments:
    """
    Where rows come from and how they are read, beside TRL's own script arguments.

    Args:
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column with the prompt.
        completion_column (`str`, *optional*, defaults to `"completion"`):
            Column with the completion.
        prompt_separator (`str`, *optional*, defaults to a line break):
            Put between prompt and completion, as part of the prompt, if the tokenizer has no chat template.
        eval_fraction (`float`, *optional*, defaults to `0.1`):
            Share of the training rows held out for evaluation, at random and so from every level, when the data has
            no evaluation split; 0 for none.
        demo_rows (`int`, *optional*, defaults to `4000`):
            Rows of the embedded corpus, which is used when no data set is named.
        cpu_threads (`int`, *optional*):
            Threads of each process on CPU. Defaults to the cores divided by the processes.
    """

    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt."})
    completion_column: str = field(default="completion", metadata={"help": "Column with the completion."})
    prompt_separator: str = field(default="\n", metadata={"help": "Ends the prompt where there is no chat template."})
    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the training rows held out when the data has no evaluation split; 0 for none."},
    )
    demo_rows: int = field(default=4000, metadata={"help": "Rows of the embedded corpus."})
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of each process on CPU. None: cores divided by processes."}
    )

    def __post_init__(self) -> None:
        self.prompt_separator = self.prompt_separator.replace("\\n", "\n").replace("\\t", "\t")
        if not 0 <= self.eval_fraction < 1:
            raise invalid("eval_fraction", self.eval_fraction, "a float in [0, 1)")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise invalid("cpu_threads", self.cpu_threads, "an integer >= 1")


def prefixed_arguments(config: type, prefix: str, without: Sequence[str] = ()) -> type:
    """
    Makes a dataclass for an argument parser from a config: each field with a prefix, so that no name clashes.

    Args:
        config (`type`):
            A config dataclass. A field that also takes an object says in `metadata["cli_type"]` what the command line
            takes.
        prefix (`str`):
            Put before each name, `"curriculum_"` say.
        without (`Sequence[str]`, *optional*):
            Fields that are left out.

    Returns:
        `type`: the dataclass.
    """
    hints = get_type_hints(config, localns={"DifficultyScorer": object})
    made: list[tuple[str, Any, Any]] = []
    for item in (item for item in fields(config) if item.name not in without):
        if item.default is MISSING:
            raise invalid(f"{config.__name__}.{item.name}", "no default", "a field with a default")
        kind = item.metadata.get("cli_type", hints[item.name])
        described: dict[str, Any] = {"metadata": {"help": item.metadata["help"]}}
        if get_origin(kind) is list:
            # The parser reads the default of a list from a factory alone.
            described["default_factory"] = lambda value=item.default: value
        else:
            described["default"] = item.default
        made.append((prefix + item.name, kind, field(**described)))
    return make_dataclass(f"{config.__name__}Arguments", made)


def config_from_arguments(config: type[T], prefix: str, arguments: object, **others: Any) -> T:
    """
    Makes the config from what [`prefixed_arguments`] parsed.

    Args:
        config (`type`):
            The config dataclass.
        prefix (`str`):
            The same prefix.
        arguments (`object`):
            The parsed dataclass.
        **others:
            Fields that it was made without.

    Returns:
        An instance of `config`.
    """
    names = [item.name for item in fields(config) if item.name not in others]  # type: ignore[arg-type]
    return config(**others, **{name: getattr(arguments, prefix + name) for name in names})


def command_line(words: Sequence[str], demo_config: Path) -> list[str]:
    """
    Reads the words of a command line as TRL's parser takes them; those of the demo where no data is named.

    Args:
        words (`Sequence[str]`):
            The words. `--config=file` is taken apart, which the parser knows only as two words.
        demo_config (`Path`):
            The YAML file of the demo, used without `--config` and `--dataset_name`.

    Returns:
        `list[str]`
    """
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    is_named = {"--config", "--dataset_name", "--dataset-name"} & {word.split("=")[0] for word in split}
    return split if is_named else ["--config", str(demo_config), *split]


def named_model(
    model: ModelConfig, script: ScriptArguments, training: SFTConfig
) -> tuple[str, PreTrainedTokenizerBase] | None:
    """
    Makes a model ready for the trainer to load by its name.

    Args:
        model ([`~trl.ModelConfig`]):
            Name, revision, attention and dtype.
        script ([`~trl.ScriptArguments`]):
            Read: `dataset_name`.
        training ([`~trl.SFTConfig`]):
            Gets `model_init_kwargs`.

    Returns:
        `tuple[str, PreTrainedTokenizerBase]`, *optional*: name and tokenizer; None for the embedded demo.

    Raises:
        `ValueError`: if only one of model and data is named.
    """
    name = model.model_name_or_path
    if (script.dataset_name is None) != (name is None):
        got = f"{name} and {script.dataset_name}"
        raise invalid("model_name_or_path and dataset_name", got, "both, or neither for the embedded demo")
    if name is None:
        return None
    own = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = own | cast(dict[str, Any], training.model_init_kwargs or {})
    loading = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    return name, AutoTokenizer.from_pretrained(name, **loading)


def set_cpu_defaults(parser: HfArgumentParser) -> None:
    """
    Lets the training arguments work on a machine without an accelerator, unless the user says otherwise.

    There, a bare `SFTConfig()` raises (it asks for bf16), and started processes do not find one another without
    `use_cpu=True`. Gradient checkpointing only costs time on CPU.

    Args:
        parser ([`~transformers.HfArgumentParser`]):
            The script's parser, before it parses.
    """
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False, gradient_checkpointing=False)


def set_cpu_threads(args: TrainingArguments, threads: int | None) -> None:
    """
    Gives each CPU process its share of the cores (the launcher gives it one), and prints what the run has.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The training arguments.
        threads (`int`, *optional*):
            Threads of each process; None for cores divided by processes.
    """
    state = PartialState(cpu=args.use_cpu)
    if args.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(threads or max(1, cores // local))
    batch = args.train_batch_size * args.gradient_accumulation_steps * state.num_processes
    say(
        f"{state.num_processes} process(es) on {args.device.type}, {torch.get_num_threads()} thread(s) each; global "
        f"batch {batch} = {args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
        f"{state.num_processes}."
    )


def check_output_dir(args: TrainingArguments) -> None:
    """
    Refuses to start a new run among the checkpoints of an earlier one.

    Without checkpoints in it, a folder is used again: the model, the run record and the tables there are replaced.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Read: `output_dir`, `resume_from_checkpoint`.

    Raises:
        `ValueError`: if there are checkpoints and the run does not resume.
    """

    def check() -> None:
        found = list_checkpoints(str(args.output_dir))
        if found and not resume_argument(args):
            raise invalid(
                "output_dir",
                f"{args.output_dir}, which holds {found[0].name} of an earlier run",
                "a folder without checkpoints",
                "Continue that run with `--resume_from_checkpoint true`, name another folder, or delete this one.",
            )

    on_main_process(check)


def resume_argument(args: TrainingArguments) -> str | bool | None:
    """
    What `--resume_from_checkpoint` means: `true` and `false` are words, anything else is a path.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The training arguments.

    Returns:
        `str`, `bool` or None, for `Trainer.train`.
    """
    value = args.resume_from_checkpoint
    words = {"true": True, "1": True, "false": None, "0": None, "none": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def load_splits(arguments: ScriptArguments) -> tuple[Dataset, Dataset | None]:
    """
    Loads training and evaluation rows from a Hub id, a file, a folder of files or a saved data set.

    Args:
        arguments ([`~trl.ScriptArguments`]):
            Read: `dataset_name`, `dataset_config`, `dataset_train_split` and `dataset_test_split` (slices like
            `train[:2000]` work, except of saved data sets; a single file has no test split), `dataset_streaming`.

    Returns:
        `tuple[Dataset, Dataset | None]`: training rows, and evaluation rows if the data has that split.

    Raises:
        `ValueError`: for a path that does not exist, a file of unknown kind, or a missing training split.
        `NotImplementedError`: for streaming.
    """
    if arguments.dataset_streaming:
        why = "rows must be scored and ordered before training, and a stream has neither length nor random access"
        raise unsupported("`dataset_streaming`", why, "Leave it unset.")
    path = Path(str(arguments.dataset_name))
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        return _from_saved(load_from_disk(str(path)), arguments)
    if path.is_dir() and (path / "state.json").is_file():
        if arguments.dataset_train_split != "train":
            expected = "train: a saved data set has no splits"
            raise invalid("dataset_train_split", arguments.dataset_train_split, expected)
        return load_from_disk(str(path)), None
    options = _loading_options(str(arguments.dataset_name), arguments.dataset_config)
    train = load_dataset(**options, split=arguments.dataset_train_split)
    if path.is_file():
        return train, None
    try:
        return train, load_dataset(**options, split=arguments.dataset_test_split)
    except ValueError as error:
        # `datasets` has no other way to say that a split does not exist.
        if "Unknown split" not in str(error):
            raise
        say(f"The data has no split `{arguments.dataset_test_split}`.")
        return train, None


def _loading_options(name: str, config: str | None) -> dict[str, Any]:
    """Arguments of `load_dataset` for a file, a folder or a Hub id."""
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_BUILDERS:
            raise invalid("dataset_name", name, f"a file ending in {', '.join(FILE_BUILDERS)}")
        if path.stat().st_size == 0:
            raise invalid("dataset_name", f"{name}, which is empty", "a file with rows")
        return {"path": FILE_BUILDERS[path.suffix], "data_files": {"train": name}}
    if not path.exists() and (path.suffix in FILE_BUILDERS or name.startswith((".", "/", "~"))):
        raise invalid("dataset_name", name, "a file or folder that exists, or a Hub id", f"Looked in {Path.cwd()}.")
    return {"path": name, "name": config}


def _from_saved(saved: DatasetDict, arguments: ScriptArguments) -> tuple[Dataset, Dataset | None]:
    if arguments.dataset_train_split not in saved:
        known = f"one of the saved splits: {', '.join(saved)}"
        raise invalid("dataset_train_split", arguments.dataset_train_split, known)
    return saved[arguments.dataset_train_split], saved.get(arguments.dataset_test_split)


def hold_out(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """
    Sets rows aside for evaluation, at random, before anything has learned from them.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            The rows.
        fraction (`float`):
            Share to hold out, in [0, 1).
        seed (`int`):
            Seed of the choice.

    Returns:
        `tuple[Dataset, Dataset | None]`: the rest and the held-out rows, each in their old order; None for none.
    """
    count = round(fraction * len(rows))
    if count == 0:
        return rows, None
    if count == len(rows):
        raise invalid("eval_fraction", fraction, f"a share that leaves some of the {len(rows)} rows to train on")
    order = seeded_order(len(rows), seed, 0)
    return rows.select(sorted(order[count:].tolist())), rows.select(sorted(order[:count].tolist()))


def to_prompt_completion(rows: Dataset, data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """
    Reads prompt and completion from the named columns.

    With a chat template each row becomes a message of the user and one of the assistant; without one, the separator
    ends the prompt. Rows that are conversations, plain text or tokens already stay as they are.

    Args:
        rows ([`~datasets.Dataset`]):
            The rows.
        data ([`DataArguments`]):
            Columns and separator.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        [`~datasets.Dataset`]: the same rows in the same order, with `prompt` and `completion`, and all other columns.

    Raises:
        `ValueError`: if the columns are missing and the rows are of no other known kind.
    """
    names = (data.prompt_column, data.completion_column)
    if any(name not in rows.column_names for name in names):
        if {"messages", "text", "input_ids"} & set(rows.column_names) and names == ("prompt", "completion"):
            return rows
        raise invalid(
            "prompt_column and completion_column",
            ", ".join(names),
            f"columns of the data set, which has {', '.join(rows.column_names)}",
        )
    if not isinstance(rows[0][data.prompt_column], str):
        return rows.rename_columns({old: new for old, new in zip(names, ("prompt", "completion")) if old != new})

    def as_messages(prompt: str, completion: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }

    def as_text(prompt: str, completion: str) -> dict[str, Any]:
        return {"prompt": prompt + data.prompt_separator, "completion": completion}

    return rows.map(
        as_messages if tokenizer.chat_template else as_text,
        input_columns=list(names),
        remove_columns=list(names),
        desc="Reading prompts and completions",
    )
