"""The way of a batch's tasks from the call of a model to its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import nn

from ...core.errors import invalid
from ..passes import checkpoint_in_passes, checkpointed_modules, forget_passes
from ..tasks import TaskRegistry, Tasks, is_one_task
from .config import CGCLoraConfig
from .layer import CGCLoraLayer
from .state import TaskBatch, TaskState, resolve_tasks


__all__ = ["TaskSetting", "TaskTransport"]

# Arguments of a model whose first dimension is the rows.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values")


class TaskSetting:
    """
    What [`TaskTransport.set_task`] returns: as a context manager it puts the former task back.

    Args:
        model ([`CGCLoraModel`]):
            The model whose task was set.
        former (`str`, `int`, `Sequence` or `torch.Tensor`, *optional*):
            The task before.
    """

    def __init__(self, model: TaskTransport, former: Tasks | None) -> None:
        self._model = model
        self._former = former

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._model.set_task(self._former)


def check_count(tasks: Tasks | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    Refuses as many tasks as fit the rows only if each is taken several times.

    Args:
        tasks (`str`, `int`, `Sequence` or `torch.Tensor`, *optional*):
            What a caller passed.
        args (`tuple`):
            The positional arguments of the call, of which the first tensor tells the number of rows.
        kwargs (`dict[str, Any]`):
            The keyword arguments, where there is none among those.

    Raises:
        `ValueError`: for another number than one or that of the rows. Ids per token are checked where they are used.
    """
    if tasks is None or is_one_task(tasks) or (isinstance(tasks, torch.Tensor) and tasks.dim() > 1):
        return
    inputs = (*args, *(kwargs.get(name) for name in _INPUTS))
    rows = next((len(value) for value in inputs if isinstance(value, torch.Tensor) and value.dim() > 0), None)
    count = len(tasks)  # type: ignore[arg-type] # a number is one task
    if rows is not None and count not in (1, rows):
        raise invalid("tasks", f"{count} tasks", f"one, or one for each of the {rows} rows")


class _GenerateWithTasks:
    """`generate` of a base model that takes `tasks=`, which transformers would refuse as an unused argument."""

    def __init__(self, generate: Any, tuner: TaskTransport) -> None:
        self.generate = generate
        self.tuner = tuner
        self.__doc__ = generate.__doc__

    def __call__(self, *args: Any, tasks: Tasks | None = None, **kwargs: Any) -> Any:
        check_count(tasks, args, kwargs)
        with self.tuner.using_tasks(tasks):
            return self.generate(*args, **kwargs)


class TaskTransport:
    """
    The part of a [`CGCLoraModel`] that knows which tasks a pass has.

    The keyword `tasks` is taken out by hooks on the base model and on its backbone, so it may be passed to the PEFT
    model, to a wrapper around it (DDP, DeepSpeed), to the base model or to the backbone.
    """

    model: nn.Module
    peft_config: dict[str, PeftConfig]
    active_adapters: list[str]
    task_state: TaskState
    _task: Tasks | None
    _registries: dict[str, tuple[PeftConfig, TaskRegistry]]
    _adapted: list[CGCLoraLayer]
    _checkpointed: list[Any]
    _hooks: list[Any]

    def _start_transport(self) -> None:
        # Plain attributes that the injection of adapters reads: set before `nn.Module.__init__`, which keeps them.
        plain: dict[str, object] = {"task_state": TaskState(), "_task": None, "_registries": {}}
        plain |= {"_adapted": [], "_checkpointed": [], "_hooks": []}
        self.__dict__.update(plain)

    def registry(self, adapter_name: str | None = None) -> TaskRegistry:
        """
        Tasks of an adapter.

        Args:
            adapter_name (`str`, *optional*):
                The active one by default.

        Returns:
            [`TaskRegistry`]
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        config = self.adapter_config(name)
        known = self._registries.get(name)
        if known is None or known[0] is not config:
            self._registries[name] = known = (config, config.registry())
        return known[1]

    def adapter_config(self, adapter_name: str | None = None) -> CGCLoraConfig:
        """
        Configuration of an adapter.

        Args:
            adapter_name (`str`, *optional*):
                The active one by default.

        Returns:
            [`CGCLoraConfig`]

        Raises:
            `ValueError`: if there is no such adapter.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        config = self.peft_config.get(name)
        if not isinstance(config, CGCLoraConfig):
            raise invalid("adapter_name", name, f"one of {sorted(self.peft_config)}")
        return config

    def set_task(self, tasks: Tasks | None) -> TaskSetting:
        """
        Sets the task of every pass that names none.

        Args:
            tasks (`str`, `int`, `Sequence` or `torch.Tensor`, *optional*):
                As in [`TaskRegistry.ids`], `"common"` and `"uniform"` included. `None` forgets the task.

        Returns:
            [`TaskSetting`]: to be used as a context manager, or ignored.

        Raises:
            `ValueError`: for a task that an active adapter does not have.
        """
        if tasks is not None:
            self._resolve(tasks)
        former = self._task
        self._task = tasks
        return TaskSetting(self, former)

    @property
    def task(self) -> Tasks | None:
        """What [`set_task`] set."""
        return self._task

    @contextmanager
    def using_tasks(self, tasks: Tasks | None) -> Iterator[None]:
        """
        Has every pass inside the context see `tasks`, also one of a part of the model, such as its encoder.

        Args:
            tasks (`str`, `int`, `Sequence` or `torch.Tensor`, *optional*):
                As in [`TaskRegistry.ids`]. By default what [`set_task`] set.
        """
        with self.task_state.using(self._batches(tasks)):
            yield

    def _batches(self, tasks: Tasks | None) -> Mapping[str, TaskBatch] | None:
        """What the layers are to see: what is passed, else what surrounds the pass, else what was set."""
        if tasks is not None:
            return self._resolve(tasks)
        if self.task_state.current is None and self._has_answer_without_tasks():
            return self._resolve(self._task)
        return self.task_state.current

    def _resolve(self, tasks: Tasks | None) -> Mapping[str, TaskBatch]:
        if isinstance(tasks, np.ndarray):
            tasks = tasks.tolist()
        adapters = [name for name in self.active_adapters if name in self.peft_config]
        registries = [self.registry(name) for name in adapters]
        by_name = isinstance(tasks, str) or (
            isinstance(tasks, list | tuple) and all(isinstance(task, str) for task in tasks)
        )
        if not by_name and any(registry.names != registries[0].names for registry in registries[1:]):
            raise invalid("tasks", tasks, "names of tasks", "The active adapters number their tasks differently.")
        batches = {}
        for name, registry in zip(adapters, registries):
            batch = resolve_tasks([None] if tasks is None else tasks, registry)
            self._check_merged(name, batch)
            batches[name] = batch
        return batches

    def _check_merged(self, adapter: str, batch: TaskBatch) -> None:
        merged = self._merged_task(adapter)
        if merged is not None and batch.single != merged:
            raise invalid(
                "tasks",
                "another task, or one that is not known on the CPU",
                f"{self.registry(adapter).name(merged)!r}, which is merged into the weights",
                "Call `model.unmerge_adapter()` first.",
            )

    def _merged_task(self, adapter: str) -> int | None:
        return next((layer.merged_tasks[adapter] for layer in self._adapted if adapter in layer.merged_tasks), None)

    def _install_hooks(self) -> None:
        self._checkpointed = checkpointed_modules(self.model)
        entries = [self.model]
        backbone = getattr(self.model, "base_model", None)
        if isinstance(backbone, nn.Module) and backbone is not self.model:
            entries.append(backbone)
        for module in entries:
            # First of all hooks, so that none sees a keyword that the model's signature lacks.
            before = module.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
            after = module.register_forward_hook(self._after_forward, always_call=True)
            self._hooks += [before, after]
        if callable(generate := getattr(self.model, "generate", None)):
            self.model.generate = _GenerateWithTasks(generate, self)  # type: ignore[assignment]

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tasks = kwargs.pop("tasks", None)
        check_count(tasks, args, kwargs)
        self.task_state.enter()
        self.task_state.current = self._batches(tasks)
        if not torch.compiler.is_compiling():
            checkpoint_in_passes(self._checkpointed, self.task_state)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.task_state.leave()

    def _has_answer_without_tasks(self) -> bool:
        # With no answer the layers raise; disabled or merged adapters need none.
        if self._task is not None:
            return True
        adapters = [name for name in self.active_adapters if name in self.peft_config]
        return all(
            self.registry(name).unknown_task != "error" and self._merged_task(name) is None for name in adapters
        )

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.model.__dict__.pop("generate", None)
        forget_passes(self._checkpointed)
