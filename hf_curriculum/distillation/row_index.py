"""
Which row of the data set each row of a batch is, whatever the collator does with the columns.

A column would not do: `remove_unused_columns` drops it, TRL's collator ignores it, others pass it to the model, and to
add one to a data set with a selection copies all of it. So each row travels to the collator together with its number,
in a container that is not a dict, and the number comes back as a tensor of the batch.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..core.errors import invalid, unsupported


if TYPE_CHECKING:
    from transformers import Trainer

__all__ = [
    "LABELS_PER_ROW",
    "ROW_INDEX",
    "IndexedRow",
    "IndexedRows",
    "RowIndexCollator",
    "indexed_rows",
    "labels_per_row",
]

ROW_INDEX = "row_index"
LABELS_PER_ROW = "labels_per_row"


class IndexedRow(NamedTuple):
    """
    A row on its way to the collator.

    Args:
        number (`int`):
            Its number, in the data set or as it was given.
        row (`object`):
            The row as the data set gives it.
    """

    # Not a dict: `RemoveColumnsCollator` of transformers 5.23 hands on unchanged what is none.
    number: int
    row: Any


class IndexedRows(Dataset[IndexedRow]):
    """
    A data set whose rows know their numbers.

    Args:
        dataset ([`~datasets.Dataset`] or `torch.utils.data.Dataset`):
            The rows, with `__len__` and `__getitem__`.
        row_ids (`np.ndarray` of shape `(N,)`, int64, *optional*):
            Number of each row, for a selection of a larger data set. Defaults to the position.

    Raises:
        `NotImplementedError`: for a stream.
        `ValueError`: if there are not as many numbers as rows.
    """

    def __init__(self, dataset: Any, row_ids: "np.ndarray[Any, Any] | None" = None) -> None:
        if isinstance(dataset, IterableDataset | datasets.IterableDataset):
            raise unsupported(
                "A top-k teacher cache with a streaming data set",
                "its rows have no number that holds from one pass to the next",
                "Load the data set, or use `teacher_cache='none'`.",
            )
        if row_ids is not None and len(row_ids) != len(dataset):
            raise invalid("row_ids", f"{len(row_ids)} numbers", f"{len(dataset)}, one per row")
        self.dataset = dataset
        self.row_ids = row_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def _number(self, position: int) -> int:
        return position if self.row_ids is None else int(self.row_ids[position])

    def __getitem__(self, position: int) -> IndexedRow:
        return IndexedRow(self._number(position), self.dataset[position])

    def __getitems__(self, positions: Sequence[int]) -> list[IndexedRow]:
        """
        Reads the rows of a batch at once, as `torch.utils.data.DataLoader` does where it can.

        Args:
            positions (`Sequence[int]`):
                Positions in the data set.

        Returns:
            `list[IndexedRow]`: the rows.
        """
        together = getattr(self.dataset, "__getitems__", None)
        rows = [self.dataset[position] for position in positions] if together is None else together(positions)
        return [IndexedRow(self._number(position), row) for position, row in zip(positions, rows, strict=True)]

    def sampler_fn(
        self, sampler_fn: Callable[[Dataset[Any]], Sampler[Any]] | None
    ) -> Callable[[Dataset[Any]], Sampler[Any]] | None:
        """
        Lets a function that makes a sampler see the data set itself, whose type and columns it may ask for.

        Args:
            sampler_fn (`Callable`, *optional*):
                `sampler_fn` of `Trainer._get_dataloader`.

        Returns:
            `Callable`, *optional*: to be passed on with these rows.
        """
        return None if sampler_fn is None else lambda _: sampler_fn(self.dataset)


def labels_per_row(labels: torch.Tensor, lengths: Sequence[int], shift_labels: bool = True) -> torch.Tensor:
    """
    Counts the labelled positions of each row of a batch, padded or flattened.

    Args:
        labels (`torch.Tensor` of shape `(B, S)`, `(1, S)` or `(B,)`, int64):
            Labels of the batch, -100 where there is none: one line per row; or all rows one after another in one line
            (`padding_free`, packing); or one label per row (sequence classification).
        lengths (`Sequence[int]`):
            Tokens of each row, B of them; read for flattened rows only.
        shift_labels (`bool`, *optional*, defaults to `True`):
            Whether position s predicts label s + 1, as in causal models: then the first column is never predicted.

    Returns:
        `torch.Tensor` of shape `(B,)`, int64: counts in the order of
        [`~hf_curriculum.core.head.gather_labelled`].

    Raises:
        `ValueError`: if the labels are laid out in none of these ways.
    """
    labelled = labels != -100
    if labels.ndim == 1 and len(labels) == len(lengths):
        return labelled.long()
    if labels.ndim != 2 or (len(labels) != len(lengths) and (len(labels) != 1 or sum(lengths) > labels.shape[1])):
        raise invalid(
            "data_collator",
            f"labels of shape {tuple(labels.shape)} for {len(lengths)} rows of {sum(lengths)} tokens",
            "one line per row, or all tokens of all rows in one line",
        )
    if shift_labels:
        labelled = labelled.clone()
        labelled[:, 0] = False
    if len(labels) == len(lengths):
        return labelled.sum(dim=1)
    parts = labelled[0].split([*lengths, labels.shape[1] - sum(lengths)])
    if parts[-1].any():
        raise invalid("data_collator", "labels behind the last row", "labels in the rows only")
    return torch.stack([part.sum() for part in parts[:-1]])


class RowIndexCollator:
    """
    Collates the rows of [`IndexedRows`] with another collator, and adds to the batch which rows they are.

    The batch gets `row_index` and `labels_per_row`, both of shape `(B,)` and int64, which must be taken out of it
    before it goes to a model. B is the number of rows, also where the inner collator flattens them into one.

    Args:
        inner (`Callable`):
            The collator; it sees the rows alone.
        shift_labels (`bool`, *optional*, defaults to `True`):
            See [`labels_per_row`].
    """

    def __init__(self, inner: Callable[[list[Any]], Any], shift_labels: bool = True) -> None:
        self.inner = inner
        self.shift_labels = shift_labels

    def __call__(self, rows: list[IndexedRow]) -> MutableMapping[str, Any]:
        """
        Collates a batch.

        Args:
            rows (`list[IndexedRow]`):
                The rows.

        Returns:
            `MutableMapping[str, Any]`: the inner collator's batch with the two tensors.

        Raises:
            `ValueError`: if the inner collator gives no mapping, no `labels`, or one of the two keys itself.
        """
        # Before the inner collator, which may change the rows in place.
        lengths = [len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0 for _, row in rows]
        batch = self.inner([row for _, row in rows])
        name = f"data_collator ({type(self.inner).__name__})"
        if not isinstance(batch, MutableMapping) or not isinstance(batch.get("labels"), torch.Tensor):
            raise invalid(name, type(batch).__name__, "a batch that is a dict with the tensor `labels`")
        if taken := {ROW_INDEX, LABELS_PER_ROW} & batch.keys():
            raise invalid(
                name, f"the key `{sorted(taken)[0]}`", "a batch without it", "Rename that column of the data."
            )
        batch[ROW_INDEX] = torch.tensor([number for number, _ in rows], dtype=torch.int64)
        batch[LABELS_PER_ROW] = labels_per_row(batch["labels"], lengths, self.shift_labels)
        return batch


@contextmanager
def indexed_rows(
    trainer: "Trainer",
    dataset: Any,
    description: str,
    row_ids: "np.ndarray[Any, Any] | None" = None,
    shift_labels: bool = True,
) -> Iterator[IndexedRows]:
    """
    Within this context, `Trainer._get_dataloader` of the rows it gives makes batches that say which rows they hold.

    Columns are removed here, as `_get_dataloader` would (transformers 5.23): it takes what it is given for a data set
    of torch. The trainer's collator is another within the context only, so that other loaders are as they were.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        dataset ([`~datasets.Dataset`] or `torch.utils.data.Dataset`):
            The rows.
        description (`str`):
            What they are, for the Trainer's log.
        row_ids (`np.ndarray` of shape `(N,)`, int64, *optional*):
            Number of each row. Defaults to the position.
        shift_labels (`bool`, *optional*, defaults to `True`):
            See [`labels_per_row`].

    Yields:
        [`IndexedRows`]: in place of `dataset`.

    Example:

    ```python
    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if not is_training:
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, is_training, dataloader_key
            )
        with indexed_rows(self, dataset, description) as rows:
            return super()._get_dataloader(
                rows, description, batch_size, rows.sampler_fn(sampler_fn), is_training, dataloader_key
            )
    ```
    """
    collator = trainer.data_collator
    if isinstance(dataset, datasets.Dataset):
        inner, dataset = collator, trainer._remove_unused_columns(dataset, description=description)
    else:
        inner = trainer._get_collator_with_removed_columns(collator, description=description)
    rows = IndexedRows(dataset, row_ids)
    trainer.data_collator = RowIndexCollator(inner, shift_labels)  # type: ignore[assignment]  # not always a dict
    try:
        yield rows
    finally:
        trainer.data_collator = collator
