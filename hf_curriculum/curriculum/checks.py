"""What would lose the order silently is refused by name, before anything is computed."""

from datasets import Dataset
from transformers import TrainingArguments

from ..core.errors import invalid, unsupported
from .dataset import check_dataset


__all__ = ["check_arguments", "check_datasets"]


def check_arguments(args: TrainingArguments | None) -> None:
    """
    Refuses training arguments that reorder, merge or skip rows.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            The user's.

    Raises:
        `ValueError`, `NotImplementedError`: naming the argument and what to do instead.
    """
    if args is None:
        return
    for name in ("packing", "eval_packing", "padding_free"):
        if getattr(args, name, False):
            raise unsupported(
                f"`{name}=True` with a curriculum",
                "packs and flattened batches mix rows of different levels",
                f"Set `{name}=False`; `group_by_length=True` in `CurriculumConfig` saves most of the padding.",
            )
    for name, neutral, why in (
        ("train_sampling_strategy", "random", "the plan fixes the order"),
        ("shuffle_dataset", False, "the plan fixes the order"),
        ("auto_find_batch_size", False, "the plan is built for one global batch size"),
        ("ignore_data_skip", False, "a resumed run would start the order anew"),
    ):
        if getattr(args, name, neutral) != neutral:
            raise invalid(name, getattr(args, name), f"{neutral!r} with a curriculum: {why}", "Leave it unset.")
    loading = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(loading, name, None):
            raise invalid(
                f"accelerator_config.{name}", True, "False with a curriculum: batches are dealt to the processes whole"
            )


def check_datasets(train_dataset: object, eval_dataset: object, eval_levels: bool) -> None:
    """
    Refuses data sets that cannot carry levels.

    Args:
        train_dataset (`object`):
            The user's.
        eval_dataset (`object`):
            The user's: a data set, a dictionary of them, or None.
        eval_levels (`bool`):
            Whether its rows are to get levels.

    Raises:
        `ValueError`, `NotImplementedError`: naming the argument and what to do instead.
    """
    check_dataset(train_dataset, "train_dataset")
    if eval_dataset is None or not eval_levels:
        return
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    for key, part in parts.items():
        if isinstance(part, Dataset) and len(part) == 0:
            raise invalid("eval_dataset", f"0 rows{f' in {key!r}' if key else ''}", "at least one row, or None")
        check_dataset(part, f"eval_dataset[{key!r}]" if key else "eval_dataset")
