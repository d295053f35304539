"""What a user can set about training on several tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.errors import invalid
from .sampler import BATCH_KINDS, SAMPLINGS
from .tasks import UNKNOWN_TASK_POLICIES


__all__ = ["MultiTaskConfig"]


@dataclass
class MultiTaskConfig:
    """
    Where the tasks of rows come from, how often each is drawn, and what is measured of each.

    Args:
        task_column (`str`, *optional*, defaults to `"task"`):
            Column of the data sets with the task of each row, by name or id.
        task_names (`list[str]`, *optional*):
            Names in the order of their ids. Defaults to those of the model (CGC-LoRA, task heads), and for a model
            that knows no tasks to the names in the training data, sorted.
        unknown_task (`str`, *optional*):
            What a name that is not listed or missing means: `"error"`, `"common"` or `"uniform"`. Defaults to the
            model's policy, and to `"error"` for a model that knows no tasks.
        sampling (`str`, *optional*, defaults to `"proportional"`):
            Share of the draws that a task gets: `"proportional"` to its rows, which leaves the data as it is;
            `"temperature"`, to a root of them; `"uniform"`; `"round_robin"`, which is uniform in turns. See
            [`~hf_curriculum.multitask.sampler.sampling_shares`].
        temperature (`float`, *optional*, defaults to `2.0`):
            For `sampling="temperature"`, at least 1: rows to the power of 1/temperature.
        batches (`str`, *optional*, defaults to `"mixed"`):
            `"mixed"`, `"homogeneous"` (each micro-batch, the rows of one forward on one process, is of one task) or
            `"homogeneous_step"` (each global batch, the rows of one optimizer step, is).
        log_task_losses (`bool`, *optional*, defaults to `True`):
            Whether the training loss of each task is logged. It costs no synchronisation; where the trainer does not
            compute losses per token anyway ([`~transformers.Trainer`] on a language model), it costs a second pass
            over the logits.
        hold_absent_tasks (`bool`, *optional*):
            Whether the experts (CGC-LoRA) and heads of tasks that an optimizer step has no row of stay exactly where
            they are, whatever momentum and weight decay say. By default wherever that is possible: not under DeepSpeed
            and FSDP, nor with optimizers whose state is no number per element, and a line says so. `True` makes an
            error of that line.

    Raises:
        `ValueError`: for a value out of range, or one that does nothing beside the others.

    Example:

    ```python
    >>> from hf_curriculum.multitask.config import MultiTaskConfig

    >>> MultiTaskConfig(sampling="temperature", temperature=3.0).batches
    'mixed'
    ```
    """

    task_column: str = field(default="task", metadata={"help": "Column with the task of each row, by name or id."})
    task_names: list[str] | None = field(
        default=None,
        metadata={"help": "Names in the order of their ids. None: the model's, else those in the training data."},
    )
    unknown_task: str | None = field(
        default=None,
        metadata={"help": f"Unknown or missing task: one of {', '.join(UNKNOWN_TASK_POLICIES)}. None: the model's."},
    )
    sampling: str = field(
        default="proportional", metadata={"help": f"Share of the draws of a task: one of {', '.join(SAMPLINGS)}."}
    )
    temperature: float = field(
        default=2.0, metadata={"help": "For `sampling=temperature`: rows to the power of 1/temperature."}
    )
    batches: str = field(
        default="mixed",
        metadata={"help": f"Tasks in a batch: one of {', '.join(BATCH_KINDS)} (of a micro-batch, of a step)."},
    )
    log_task_losses: bool = field(default=True, metadata={"help": "Log the training loss of each task."})
    hold_absent_tasks: bool | None = field(
        default=None,
        metadata={"help": "Keep experts and heads of tasks that a step has no row of. None: where possible."},
    )

    def __post_init__(self) -> None:
        choices = {"sampling": SAMPLINGS, "batches": BATCH_KINDS, "unknown_task": (None, *UNKNOWN_TASK_POLICIES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise invalid(name, getattr(self, name), f"one of {', '.join(map(str, allowed))}")
        if not isinstance(self.task_column, str) or not self.task_column or self.task_column == "tasks":
            raise invalid("task_column", repr(self.task_column), "the name of a column, other than `tasks`")
        if not 1 <= self.temperature < float("inf"):
            raise invalid("temperature", self.temperature, "a float >= 1")
        if self.sampling != "temperature" and self.temperature != 2.0:
            raise invalid(
                "temperature",
                self.temperature,
                f"its default with `sampling={self.sampling!r}`, which does not read it",
                "Set `sampling='temperature'`.",
            )

    @property
    def orders(self) -> bool:
        """Whether anything here asks for an order of its own, beside the proportional mixed one."""
        return self.sampling != "proportional" or self.batches != "mixed"
