"""Data for the recipe scripts, from anywhere: splits, held-out rows, prompts and completions."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from .core.console import say
from .core.errors import invalid, unsupported
from .core.order import seeded_order
from .recipe import DataArguments


__all__ = ["hold_out", "load_splits", "to_prompt_completion"]

FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


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


def hold_out(
    rows: Dataset, fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[Dataset, Dataset | None]:
    """
    Sets rows aside for evaluation, at random, before anything has learned from them.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            The rows.
        fraction (`float`):
            Share to hold out, in [0, 1).
        seed (`int`):
            Seed of the choice.
        groups (`np.ndarray` of shape `(N,)`, int64, *optional*):
            Group of each row, such as its task: the share is held out of each, and one row at least stays in each.
            Defaults to one group.

    Returns:
        `tuple[Dataset, Dataset | None]`: the rest and the held-out rows, each in their old order; None for none.

    Raises:
        `ValueError`: if no row would be left to train on.
    """
    if round(fraction * len(rows)) == len(rows) > 0:
        raise invalid("eval_fraction", fraction, f"a share that leaves some of the {len(rows)} rows to train on")
    groups = np.zeros(len(rows), dtype=np.int64) if groups is None else groups
    held_out: list[int] = []
    order = seeded_order(len(rows), seed, 0)
    for group in np.unique(groups):
        members = order[groups[order] == group]
        held_out += members[: min(round(fraction * len(members)), len(members) - 1)].tolist()
    if not held_out:
        return rows, None
    return rows.select(np.setdiff1d(order, held_out)), rows.select(sorted(held_out))


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
    first = [rows[0][name] for name in names]
    if any(not isinstance(value, str | list) for value in first):
        raise invalid(", ".join(names), first, "texts, or lists of messages", "Cast the columns to strings.")
    if not isinstance(first[0], str):
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
