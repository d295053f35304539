"""
Task ids in the batch, beside whatever a data collator makes of the rest.

Shapes: B rows in the batch, S positions in a row, T positions of a batch flattened into one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ..core.errors import invalid, unsupported
from .tasks import TaskRegistry


__all__ = ["ChecksModel", "MultiTaskCollator", "plain_value"]

Row = dict[str, Any]


@runtime_checkable
class ChecksModel(Protocol):
    """A data collator whose batches fit certain models alone, such as those of cached features."""

    def check_model(self, model: object) -> None:
        """Raises an error for another model."""


class MultiTaskCollator:
    """
    Adds `tasks` to the batches of any data collator.

    The task column is taken out of the rows before the inner collator sees them. What it holds per row decides what
    `tasks` is, always int64, on the CPU, and checked there:

    | a row's value | padded batch | batch flattened into one row (padding-free) |
    |---|---|---|
    | one name or id | `(B,)` | `(1, T)`, one id per token |
    | a list, one name or id per token (packed rows) | `(B, S)` | `(1, T)` |

    A flattened batch is told by its single row of `input_ids` without an attention mask, as TRL's collator and
    [`~transformers.DataCollatorWithFlattening`] make it. Padding takes the id of the row's last token, since every
    position needs some task. Names that the registry does not know, and missing ones, are treated as its
    `unknown_task` says.

    Args:
        inner (`Callable`):
            The data collator: a list of rows in, a dictionary of tensors out.
        registry ([`~hf_curriculum.multitask.tasks.TaskRegistry`]):
            Names and ids.
        task_column (`str`, *optional*, defaults to `"task"`):
            Column with the tasks.

    Raises:
        `ValueError`: on a call, for rows without the column, unknown tasks, or ids that do not fit the tokens.
        `NotImplementedError`: on a call, if the inner collator changes the number of rows in another way.

    Example:

    ```python
    >>> from transformers import default_data_collator
    >>> from hf_curriculum.multitask.collator import MultiTaskCollator
    >>> from hf_curriculum.multitask.tasks import TaskRegistry

    >>> collator = MultiTaskCollator(default_data_collator, TaskRegistry(["sum", "sort"]))
    >>> collator([{"input_ids": [1, 2], "task": "sort"}, {"input_ids": [3, 4], "task": "sum"}])["tasks"]
    tensor([1, 0])
    ```
    """

    def __init__(
        self,
        inner: Callable[[list[Row]], dict[str, Any]],
        registry: TaskRegistry,
        task_column: str = "task",
    ) -> None:
        if isinstance(inner, MultiTaskCollator):
            raise invalid("inner", inner, "a data collator that does not add tasks itself")
        self.inner = inner
        self.registry = registry
        self.task_column = task_column

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        """
        Collates rows.

        Args:
            features (`Sequence[dict]` of length B):
                Rows with the task column.

        Returns:
            `dict[str, Any]`: the inner collator's batch, and `tasks`.
        """
        if not features or not any(self.task_column in row for row in features):
            columns = ", ".join(sorted(features[0])) if features else "no rows"
            raise invalid(
                f"column `{self.task_column}`",
                f"a batch without it ({columns})",
                "the task of each row, by name or id",
                "Keep the column: `MultiTaskMixin` does; elsewhere set `remove_unused_columns=False`.",
            )
        values = [plain_value(row.get(self.task_column)) for row in features]
        batch = self.inner([{key: value for key, value in row.items() if key != self.task_column} for row in features])
        if "tasks" in batch:
            raise invalid("tasks", "a batch that holds `tasks` already", "a collator that leaves it to this one")
        input_ids = batch.get("input_ids")
        if _is_flattened(batch, len(features)):
            batch["tasks"] = self._per_token(values, features, int(batch["input_ids"].shape[1]))
        elif isinstance(input_ids, torch.Tensor) and input_ids.shape[0] != len(features):
            raise unsupported(
                f"A collator that makes {input_ids.shape[0]} rows of {len(features)}",
                "the tasks of its rows are not known",
                "Use one that keeps the rows, or flattens all of them into one without an attention mask.",
            )
        elif isinstance(values[0], list):
            batch["tasks"] = self._per_padded_token(values, batch)
        else:
            batch["tasks"] = self.registry.ids(values)
        return batch

    def _token_ids(self, value: Any, length: int) -> torch.Tensor:
        """Ids of one row's tokens."""
        if not isinstance(value, list):
            return self.registry.ids([value]).expand(length)
        if len(value) != length:
            raise invalid(
                f"column `{self.task_column}`", f"{len(value)} tasks for a row of {length} tokens", "one for each"
            )
        return self.registry.ids(torch.tensor(value) if value and isinstance(value[0], int) else value)

    def _per_token(self, values: Sequence[Any], features: Sequence[Row], width: int) -> torch.Tensor:
        lengths = [len(row["input_ids"]) for row in features]
        ids = torch.cat([self._token_ids(value, length) for value, length in zip(values, lengths, strict=True)])
        if not 0 < len(ids) <= width:
            raise invalid("input_ids", f"{width} tokens in the batch", f"the {len(ids)} tokens of its rows")
        return torch.cat([ids, ids[-1:].expand(width - len(ids))])[None]

    def _per_padded_token(self, values: Sequence[Any], batch: dict[str, Any]) -> torch.Tensor:
        mask = batch["attention_mask"].bool()  # [B, S]; tells on which side the padding is
        rows = []
        for value, row_mask in zip(values, mask, strict=True):
            own = self._token_ids(value, int(row_mask.sum()))
            rows.append(own[-1:].expand(len(row_mask)).masked_scatter(row_mask, own))
        return torch.stack(rows)


def _is_flattened(batch: dict[str, Any], num_rows: int) -> bool:
    input_ids = batch.get("input_ids")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.shape[0] != 1:
        return False
    return "attention_mask" not in batch and (num_rows > 1 or "position_ids" in batch)


def plain_value(value: Any) -> Any:
    """A value as Python has it: data sets with a format yield tensors and arrays."""
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value
