"""
The names of tasks and their ids.

Shapes: B rows in the batch, S positions in a row, T tasks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch

from ..core.errors import invalid


__all__ = [
    "COMMON_TASK_ID",
    "RESERVED_TASKS",
    "UNIFORM_TASK_ID",
    "UNKNOWN_TASK_POLICIES",
    "TaskRegistry",
    "Tasks",
    "is_one_task",
]

# What a batch may name its tasks by: one name or id for all rows, one per row, or a tensor of ids.
Tasks = str | int | Sequence[str | int | None] | np.ndarray | torch.Tensor

# Negative, so that a table with one row per task and these two rows at its end is indexed by the ids as they are.
COMMON_TASK_ID = -1
UNIFORM_TASK_ID = -2
RESERVED_TASKS = {"common": COMMON_TASK_ID, "uniform": UNIFORM_TASK_ID}
UNKNOWN_TASK_POLICIES = ("error", *RESERVED_TASKS)

# File systems allow 255 bytes for a name; the rest is for what a name is extended by. Our choice.
MAX_NAME_BYTES = 200


def is_one_task(tasks: Tasks) -> bool:
    """Whether this is one task, by name or id, and no sequence of them."""
    if isinstance(tasks, np.ndarray | torch.Tensor):
        return tasks.ndim == 0
    return isinstance(tasks, str) or not isinstance(tasks, Sequence)


class TaskRegistry:
    r"""
    The tasks of a model: names, and ids that are positions in the list of names.

    Names are what is stable: they are saved with the model, and ids of another list are mapped by name ([`remap`]).
    Two names are reserved and need not be listed: `"common"` (id -1) uses what all tasks share and nothing else,
    `"uniform"` (id -2) weighs all tasks alike.

    Args:
        names (`Sequence[str]`):
            One name per task, in the order of their ids. Unique even where case is ignored, and safe as file names,
            since each may become a folder: at most 200 bytes of UTF-8, without `/`, `\` and control characters,
            without a leading dot or spaces around it.
        unknown_task (`str`, *optional*, defaults to `"error"`):
            What [`ids`] makes of a name that is not listed and of a missing one (`None`): `"error"`, `"common"` or
            `"uniform"`.

    Raises:
        `ValueError`: if there is no name, or one that is repeated, reserved or unsafe.

    Example:

    ```python
    >>> from hf_curriculum.multitask.tasks import TaskRegistry

    >>> registry = TaskRegistry(["summary", "translation"])
    >>> registry.ids(["translation", "summary"])
    tensor([1, 0])
    >>> registry.ids("summary", batch_size=3)
    tensor([0, 0, 0])
    ```
    """

    def __init__(self, names: Sequence[str], *, unknown_task: str = "error") -> None:
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) == 0:
            raise invalid("task_names", names, "a list of at least one name")
        _check_names(names)
        if unknown_task not in UNKNOWN_TASK_POLICIES:
            raise invalid("unknown_task", unknown_task, f"one of {UNKNOWN_TASK_POLICIES}")
        self._names = tuple(names)
        self._positions = {name: position for position, name in enumerate(self._names)}
        self._unknown_task = unknown_task

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of their ids."""
        return self._names

    @property
    def unknown_task(self) -> str:
        """What becomes of a name that is not listed: `"error"`, `"common"` or `"uniform"`."""
        return self._unknown_task

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskRegistry):
            return NotImplemented
        return self._names == other._names and self._unknown_task == other._unknown_task

    def __hash__(self) -> int:
        return hash((self._names, self._unknown_task))

    def __repr__(self) -> str:
        return f"TaskRegistry({list(self._names)!r}, unknown_task={self._unknown_task!r})"

    def id(self, task: str | int | None) -> int:
        """
        Looks one task up.

        Args:
            task (`str` or `int`, *optional*):
                A name, an id, or `None` where the task is missing.

        Returns:
            `int` in [0, T), or -1 (`"common"`) or -2 (`"uniform"`).

        Raises:
            `ValueError`: for an id out of range, and under the policy `"error"` for a name that is not listed or
                missing. The numbers -1 and -2 are refused under that policy too, where they are more likely to stand
                for a missing task; the names `"common"` and `"uniform"` are not.
        """
        if isinstance(task, str):
            if task in self._positions:
                return self._positions[task]
            return RESERVED_TASKS[task] if task in RESERVED_TASKS else self._unknown(task)
        if task is None:
            return self._unknown(task)
        try:
            number = None if isinstance(task, bool) else task.__index__()
        except AttributeError:
            number = None
        if number is None:
            raise invalid("tasks", task, "names or ids of tasks")
        if not self._lowest_id <= number < len(self):
            raise self._out_of_range(number)
        return number

    def name(self, task_id: int) -> str:
        """
        Name of an id.

        Args:
            task_id (`int`):
                In [-2, T).

        Returns:
            `str`: the task's name, `"common"` for -1, `"uniform"` for -2.

        Raises:
            `ValueError`: for an id out of range.
        """
        for name, reserved in RESERVED_TASKS.items():
            if task_id == reserved:
                return name
        if not 0 <= task_id < len(self):
            raise self._out_of_range(task_id)
        return self._names[task_id]

    def ids(self, tasks: Tasks, batch_size: int | None = None) -> torch.Tensor:
        """
        Turns tasks into a tensor of ids.

        Values are checked where that costs nothing: numbers, names and tensors on the CPU. A tensor on an accelerator
        is passed on unread, because reading it would wait for the device.

        Args:
            tasks (`str`, `int`, `Sequence`, `np.ndarray` or `torch.Tensor`):
                A name or an id for all rows; a sequence of names, ids and `None` (missing), one per row; a tensor of
                ids of shape `()`, `(B,)`, `(B, S)` or `(1, T)` for rows packed into one.
            batch_size (`int`, *optional*):
                Number of rows B. A single task is repeated so often; anything else must have this length.

        Returns:
            `torch.Tensor` of shape `(B,)`, or `(B, S)` if one of that shape is given, int64, on the device of a tensor
            that is given and on the CPU otherwise.

        Raises:
            `ValueError`: for an unknown task (see [`id`]), a wrong shape, dtype or length.
        """
        if isinstance(tasks, np.ndarray):
            tasks = tasks.tolist()
        if isinstance(tasks, torch.Tensor):
            ids = self._check_tensor(tasks)
        elif is_one_task(tasks):
            ids = torch.tensor(self.id(tasks), dtype=torch.int64)  # type: ignore[arg-type] # one of the three
        else:
            several = cast(Sequence[str | int | None], tasks)
            ids = torch.tensor([self.id(task) for task in several], dtype=torch.int64)
        if ids.dim() == 0:
            return ids.repeat(1 if batch_size is None else batch_size)
        if batch_size is not None and ids.shape[0] != batch_size:
            raise invalid("tasks", f"{ids.shape[0]} tasks", f"one task, or one for each of the {batch_size} rows")
        return ids

    def remap(self, other: TaskRegistry) -> torch.Tensor:
        """
        Where the tasks of another registry are in this one, by name.

        Args:
            other ([`TaskRegistry`]):
                The registry whose ids a data set or a batch holds.

        Returns:
            `torch.Tensor` of shape `(len(other) + 2,)`, int64: indexed by an id of `other`, the id here; its last two
            entries keep the reserved ids.

        Raises:
            `ValueError`: if a name is not listed here and the policy is `"error"`.

        Example:

        ```python
        >>> from hf_curriculum.multitask.tasks import TaskRegistry

        >>> saved, current = TaskRegistry(["a", "b"]), TaskRegistry(["b", "a"])
        >>> saved.remap(current)[current.ids(["a", "b", "b"])]
        tensor([0, 1, 1])
        ```
        """
        return torch.tensor([*(self.id(name) for name in other), UNIFORM_TASK_ID, COMMON_TASK_ID])

    def to_dict(self) -> dict[str, object]:
        """Values for JSON, read back by [`from_dict`]."""
        return {"task_names": list(self._names), "unknown_task": self._unknown_task}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TaskRegistry:
        """
        Reads what [`to_dict`] wrote.

        Args:
            values (`Mapping`):
                With `task_names` and, optionally, `unknown_task`.

        Returns:
            [`TaskRegistry`]

        Raises:
            `ValueError`: if a key is missing or not known, or a value is wrong.
        """
        if "task_names" not in values or set(values) - {"task_names", "unknown_task"}:
            raise invalid("task registry", sorted(values), "the keys `task_names` and `unknown_task`")
        return cls(values["task_names"], unknown_task=values.get("unknown_task", "error"))  # type: ignore[arg-type]

    @property
    def _lowest_id(self) -> int:
        return 0 if self._unknown_task == "error" else min(RESERVED_TASKS.values())

    def _unknown(self, task: str | None) -> int:
        if self._unknown_task != "error":
            return RESERVED_TASKS[self._unknown_task]
        raise invalid(
            "tasks",
            "no task" if task is None else task,
            f"one of {_shorten(self._names)}",
            "Name the task of every row, or choose `unknown_task='common'` or `'uniform'`.",
        )

    def _out_of_range(self, task_id: int) -> ValueError:
        return invalid(
            "tasks", task_id, f"an id in [{self._lowest_id}, {len(self)})", f"Tasks: {_shorten(self._names)}."
        )

    def _check_tensor(self, tasks: torch.Tensor) -> torch.Tensor:
        if tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool or tasks.dim() > 2:
            raise invalid(
                "tasks",
                f"a tensor of shape {tuple(tasks.shape)} and dtype {tasks.dtype}",
                "integers of shape (), (B,) or (B, S)",
            )
        ids = tasks.to(torch.int64)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() > 0:
            lowest, highest = (int(bound) for bound in torch.aminmax(ids))
            for bound in (lowest, highest):
                if not self._lowest_id <= bound < len(self):
                    raise self._out_of_range(bound)
        return ids


def _shorten(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def _check_names(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise invalid("task_names", name, "strings")
        if (problem := _problem_as_file_name(name)) is not None:
            raise invalid("task_names", ascii(name), f"names that are safe as file names: {problem}")
        if name in RESERVED_TASKS:
            raise invalid("task_names", name, f"names other than {tuple(RESERVED_TASKS)}, which have a meaning here")
        # A folder per task must not overwrite another's where the file system ignores case or normalises.
        key = unicodedata.normalize("NFC", name.casefold())
        if key in seen:
            raise invalid("task_names", f"{seen[key]!r} and {name!r}", "unique names, also where case is ignored")
        seen[key] = name


def _problem_as_file_name(name: str) -> str | None:
    problem = None
    if not name:
        problem = "this one is empty"
    elif any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        problem = "no control characters or lone surrogates"
    elif "/" in name or "\\" in name:
        problem = "no slash or backslash"
    elif name.startswith("."):
        problem = "no leading dot"
    elif name != name.strip():
        problem = "no spaces around the name"
    elif len(name.encode()) > MAX_NAME_BYTES:
        problem = f"at most {MAX_NAME_BYTES} bytes"
    return problem
