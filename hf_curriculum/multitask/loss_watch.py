"""The losses of the tasks, watched while a Trainer computes its own loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import nn

from ..core.console import say
from ..core.means import RunningMeans
from .task_losses import ItemLosses, item_losses, sums_by_task
from .tasks import COMMON_TASK_ID, UNIFORM_TASK_ID, TaskRegistry


__all__ = ["TaskLossWatch"]

RowLosses: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class TaskLossWatch:
    """
    Reads the loss of each task off the outputs that a Trainer's loss is made of.

    Training losses stay on the device until they are logged. Evaluation losses are exchanged batch by batch, as the
    Trainer exchanges its own, so that rows that only even out the last batch of several processes do not count. Of
    flattened batches (padding-free) they do: there the Trainer cannot tell them apart either.

    Args:
        registry ([`TaskRegistry`]):
            Names and ids.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        shift_labels (`bool`):
            Whether logits at a position predict the label of the next one.
        training (`bool`):
            Whether training losses are kept.
        row_losses (`Callable`, *optional*):
            The model's own way from logits, labels and tasks to losses and weights of rows, both `(B,)`. By default
            [`~hf_curriculum.multitask.task_losses.item_losses`] reads them off the outputs.
    """

    def __init__(
        self,
        registry: TaskRegistry,
        accelerator: Accelerator,
        *,
        shift_labels: bool,
        training: bool,
        row_losses: RowLosses | None = None,
    ) -> None:
        self._registry = registry
        self._accelerator = accelerator
        self._shift_labels = shift_labels
        self._keeps_training = training
        self._row_losses = row_losses
        self._training = self._new_means()
        self._evaluation: RunningMeans | None = None
        self._told = False

    def _new_means(self) -> RunningMeans:
        # The reserved ids are the last places of `sums_by_task`.
        names = [*self._registry, self._registry.name(UNIFORM_TASK_ID), self._registry.name(COMMON_TASK_ID)]
        return RunningMeans(names, self._accelerator.device)

    @contextmanager
    def watching(self, model: nn.Module, inputs: dict[str, Any], *, training: bool) -> Iterator[None]:
        """
        Counts the losses of one batch, whose loss is computed inside the context.

        Args:
            model (`nn.Module`):
                The model as it is called.
            inputs (`dict[str, Any]`):
                The batch, with `labels` and `tasks`; without either nothing is counted.
            training (`bool`):
                Whether this is a training step.
        """
        labels, tasks = inputs.get("labels"), inputs.get("tasks")
        counted = self._evaluation is not None or (training and self._keeps_training)
        if labels is None or tasks is None or not counted:
            yield
            return
        flattened = tasks.dim() == 2 and "attention_mask" not in inputs
        with _outputs_of(model) as seen:
            yield
        if seen:
            self._count(seen[0], labels, tasks, flattened)

    def _count(self, outputs: object, labels: torch.Tensor, tasks: torch.Tensor, flattened: bool) -> None:
        items = self._items(outputs, labels, tasks)
        if items is None:
            if not self._told:
                say("The outputs of this model hold no loss per row: no `<task>_loss` is logged.")
                self._told = True
            return
        sums = sums_by_task(items, tasks, len(self._registry))
        if self._evaluation is None:
            self._training.add_all(sums.sum(dim=0))
        elif flattened:
            self._evaluation.add_all(self._accelerator.reduce(sums.sum(dim=0), reduction="sum"))
        else:
            self._evaluation.add_all(self._accelerator.gather_for_metrics(sums.contiguous()).sum(dim=0))

    def _items(self, outputs: Any, labels: torch.Tensor, tasks: torch.Tensor) -> ItemLosses | None:
        if self._row_losses is None:
            return item_losses(outputs, labels, shift=self._shift_labels)
        with torch.no_grad():
            losses, weights = self._row_losses(outputs["logits"], labels, tasks)
        return ItemLosses(losses[:, None], weights[:, None])

    def take_training(self) -> dict[str, float]:
        """
        Mean training losses since the last call, over all ranks. Collective; waits for the device.

        Returns:
            `dict[str, float]`: by the name of each task that had a label.
        """
        return self._training.take()

    @contextmanager
    def evaluating(self) -> Iterator[dict[str, float]]:
        """
        Counts evaluation losses inside the context.

        Yields:
            `dict[str, float]`: filled at the end of the context with the mean losses by the name of each task.
        """
        outer, ours = self._evaluation, self._new_means()
        self._evaluation = ours
        means: dict[str, float] = {}
        try:
            yield means
        finally:
            self._evaluation = outer
        # Every batch is summed over the ranks already.
        means |= ours.take(over_ranks=False)

    def state(self) -> list[list[float]]:
        """Sums of the training losses since the last log, over all ranks, as JSON values. Collective."""
        return self._training.state()

    def restore(self, state: list[list[float]] | None) -> None:
        """
        Forgets everything, then takes over what a checkpoint holds.

        Args:
            state (`list[list[float]]`, *optional*):
                What [`state`] gave.
        """
        self._training.restore(state)


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """
    Watches what the forward of a model returns, also where the caller keeps it to itself, as SFTTrainer does.

    The last call with labels counts, since a step may hold other forwards: of a teacher, or for metrics.
    """
    seen: list[Any] = []

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("labels") is not None or not seen:
            seen[:] = [output]

    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
