"""Tasks of the rows of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, IterableDataset

from ..core.console import say
from ..core.errors import invalid, unsupported
from .tasks import TaskRegistry


__all__ = ["check_rows", "inferred_names", "parts", "row_task_ids", "task_groups", "tell_missing", "with_task_names"]


def parts(*datasets: Any) -> Iterator[tuple[str, Dataset]]:
    """
    The data sets among arguments of a Trainer.

    Args:
        *datasets:
            The training data, then the evaluation data: data sets, dictionaries of them, or None.

    Returns:
        `Iterator[tuple[str, Dataset]]`: each with its name as the user spells it.
    """
    for name, given in zip(("train_dataset", "eval_dataset"), datasets):
        if isinstance(given, dict):
            yield from ((f"{name}[{key!r}]", part) for key, part in given.items())
        elif given is not None:
            yield name, given


def check_rows(train_dataset: object, eval_dataset: object, task_column: str) -> None:
    """
    Refuses data sets whose rows have no task.

    Args:
        train_dataset (`object`):
            The user's.
        eval_dataset (`object`):
            The user's: a data set, a dictionary of them, or None.
        task_column (`str`):
            Column that should be there.

    Raises:
        `ValueError`, `NotImplementedError`: naming the argument and what to do instead.
    """
    if train_dataset is None:
        raise invalid("train_dataset", None, "a data set")
    for name, rows in parts(train_dataset, eval_dataset):
        if isinstance(rows, IterableDataset):
            raise unsupported(
                f"A streamed `{name}`",
                "the tasks of all rows must be known before training, and a stream has no length",
                "Load it without `streaming=True`.",
            )
        if not isinstance(rows, Dataset):
            raise invalid(name, type(rows).__name__, "a `datasets.Dataset`")
        if task_column not in rows.column_names:
            raise invalid(
                name,
                f"the columns {', '.join(rows.column_names)}",
                f"a column `{task_column}` with the task of each row, by name or id",
                "Name another column with `MultiTaskConfig(task_column=...)`.",
            )
        if len(rows) == 0 and name == "train_dataset":
            raise invalid(name, "0 rows", "at least one row")


def with_task_names(rows: Any, task_column: str) -> Any:
    """
    Spells the tasks of a `ClassLabel` column, whose numbers are its own and not those of a registry.

    Args:
        rows ([`~datasets.Dataset`]):
            Maybe with the task column: a name or id per row, or a list with one per token; or a dictionary of such.
            Anything else is returned as it is.
        task_column (`str`):
            Its name.

    Returns:
        [`~datasets.Dataset`]: the rows, with names in place of a class label's numbers.
    """
    if isinstance(rows, dict):
        return {key: with_task_names(part, task_column) for key, part in rows.items()}
    if not isinstance(rows, Dataset) or task_column not in rows.column_names:
        return rows
    kind = rows.features[task_column]
    each = getattr(kind, "feature", kind)
    if not isinstance(each, ClassLabel):
        return rows

    def spelled(value: Any) -> Any:
        if isinstance(value, list):
            return [spelled(part) for part in value]
        return None if value is None or value < 0 else each.int2str(value)

    names = [spelled(value) for value in rows.with_format(None)[task_column][:]]
    # Beside the column first: a data set without columns has no rows.
    spelt = f"{task_column} by name"
    return rows.add_column(spelt, names).remove_columns(task_column).rename_column(spelt, task_column)


def _column(rows: Dataset, task_column: str) -> pa.Array:
    """The column, of a row that is a list the first entry."""
    chunks = []
    for table in rows.select_columns([task_column]).with_format("arrow").iter(batch_size=10_000):
        column = table.column(task_column).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pa.compute.list_element(column, 0)
        chunks.append(column)
    return pa.concat_arrays(chunks) if chunks else pa.array([], type=pa.string())


def inferred_names(rows: Dataset, task_column: str) -> list[str]:
    """
    Names of tasks for a model that knows none.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            The training data.
        task_column (`str`):
            Column with names, or with ids from 0.

    Returns:
        `list[str]`: the names in the data, sorted; for ids up to t the names `task_0` to `task_<t>`.

    Raises:
        `ValueError`: if no row has a task, or the column holds neither names nor ids.
    """
    rows = with_task_names(rows, task_column)
    found = [value for value in _column(rows, task_column).unique().to_pylist() if value is not None]
    if found and all(isinstance(value, str) for value in found):
        return sorted(found)
    if found and all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in found):
        return [f"task_{number}" for number in range(max(found) + 1)]
    raise invalid(f"column `{task_column}`", f"values such as {found[:3]}", "the task of each row, by name or id")


def row_task_ids(rows: Dataset, task_column: str, registry: TaskRegistry) -> np.ndarray:
    """
    Task of each row.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            With the task column: a name or id per row, or a list with one per token, of which the first counts.
        task_column (`str`):
            Its name.
        registry ([`TaskRegistry`]):
            Names and ids.

    Returns:
        `np.ndarray` of shape `(N,)`, int64: ids in [-2, T).

    Raises:
        `ValueError`: for a task that the registry does not take.
    """
    rows = with_task_names(rows, task_column)
    encoded = _column(rows, task_column).dictionary_encode(null_encoding="encode")
    known = np.array([registry.id(value) for value in encoded.dictionary.to_pylist()], dtype=np.int64)
    positions = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return np.asarray(known[positions])


def task_groups(rows: Dataset, task_column: str) -> np.ndarray:
    """
    Numbers the tasks of rows, whatever they are called.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            With the task column.
        task_column (`str`):
            Its name.

    Returns:
        `np.ndarray` of shape `(N,)`, int64: equal where the tasks are.
    """
    encoded = _column(rows, task_column).dictionary_encode(null_encoding="encode")
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), dtype=np.int64)


def tell_missing(registry: TaskRegistry, task_ids: np.ndarray) -> None:
    """
    Says which tasks have no row to learn from.

    Args:
        registry ([`TaskRegistry`]):
            The tasks.
        task_ids (`np.ndarray` of shape `(N,)`, int64):
            Task of each training row.
    """
    there = set(np.unique(task_ids).tolist())
    if missing := [name for number, name in enumerate(registry) if number not in there]:
        say(f"No training row is of {', '.join(missing)}: what belongs to them alone does not learn.")
