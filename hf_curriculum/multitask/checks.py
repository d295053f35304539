"""What would lose the order or the tasks silently is refused by name, before anything is computed."""

from transformers import Trainer, TrainingArguments

from ..core.errors import invalid
from .config import MultiTaskConfig
from .tasks import TaskRegistry


__all__ = ["check_arguments", "check_bases", "check_names", "decides_order"]

# `eval_loss` and the like are keys of the own logs of the trainers, which `<task>_loss` must not become.
TAKEN_NAMES = ("eval", "train", "test", "ce", "kd")


def decides_order(cls: type, mixin: type) -> bool:
    """
    Whether a mixin decides the order of the run in a class.

    Args:
        cls (`type`):
            The trainer's class.
        mixin (`type`):
            The mixin.

    Returns:
        `bool`: False if another class between it and the Trainer brings a sampler of its own.
    """
    owners = [base for base in cls.__mro__ if "_get_train_sampler" in vars(base)]
    return all(base in (mixin, Trainer) for base in owners)


def check_bases(cls: type, mixin: type) -> None:
    """
    Refuses a class in which a mixin that asks for the groups of rows stands before the one that knows them.

    Args:
        cls (`type`):
            The trainer's class.
        mixin (`type`):
            The mixin that knows them.

    Raises:
        `ValueError`: naming the bases.
    """
    before = cls.__mro__[: cls.__mro__.index(mixin)]
    for base in before:
        if "_row_groups" in vars(base) and not issubclass(base, mixin):
            raise invalid(
                f"bases of {cls.__name__}",
                f"{base.__name__} before {mixin.__name__}",
                f"{mixin.__name__} first, or tasks would not be spread over the order of the other",
            )


def check_arguments(args: TrainingArguments | None, config: MultiTaskConfig, orders_run: bool) -> None:
    """
    Refuses training arguments that reorder or skip rows, and sampling that would have no effect.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            The user's.
        config ([`MultiTaskConfig`]):
            The user's.
        orders_run (`bool`):
            Whether the order of the run is this method's.

    Raises:
        `ValueError`: naming the argument and what to do instead.
    """
    if not orders_run:
        if config.orders:
            name = "sampling" if config.sampling != "proportional" else "batches"
            raise invalid(
                f"multitask.{name}",
                getattr(config, name),
                "its default beside a mixin that fixes the order of the run itself",
                "The order of that mixin counts: leave it unset.",
            )
        return
    for name, neutral, why in (
        ("train_sampling_strategy", "random", "the order is fixed before training"),
        ("shuffle_dataset", False, "the order is fixed before training"),
        ("auto_find_batch_size", False, "the order is made for one global batch size"),
        ("ignore_data_skip", False, "a resumed run would start the order anew"),
    ):
        if getattr(args, name, neutral) != neutral:
            raise invalid(name, getattr(args, name), f"{neutral!r} with several tasks: {why}", "Leave it unset.")
    loading = None if args is None else args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(loading, name, None):
            raise invalid(
                f"accelerator_config.{name}",
                True,
                "False with several tasks: batches are dealt to the processes whole",
            )


def check_names(registry: TaskRegistry) -> None:
    """
    Refuses names whose losses would have the keys of the Trainer's own logs.

    Args:
        registry ([`TaskRegistry`]):
            Names and ids.

    Raises:
        `ValueError`: naming them.
    """
    if taken := [name for name in registry if name in TAKEN_NAMES]:
        raise invalid(
            "task_names", ", ".join(taken), f"names other than {', '.join(TAKEN_NAMES)}, which are keys of the logs"
        )
