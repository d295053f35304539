"""What the recipe scripts share: arguments made from configs, CPU defaults, the output folder."""

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin, get_type_hints

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from .core.console import say
from .core.distributed import on_main_process
from .core.errors import invalid
from .core.state import list_checkpoints


__all__ = [
    "DataArguments",
    "check_output_dir",
    "command_line",
    "config_from_arguments",
    "named_model",
    "prefixed_arguments",
    "resume_argument",
    "set_cpu_defaults",
    "set_cpu_threads",
]

T = TypeVar("T")


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
