"""What a forward pass tells the layers of a model: one object that all of them read, also when they are run again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn


__all__ = ["CheckpointInPass", "PassState", "checkpoint_in_passes", "checkpointed_modules", "forget_passes"]

Pass = TypeVar("Pass")


class PassState(threading.local, Generic[Pass]):
    """
    What the layers of a model see at the moment, in each thread: a server may run several passes at once.

    Args:
        current (*optional*):
            What the forward pass says. `None` outside one.
    """

    def __init__(self) -> None:
        self.current: Pass | None = None
        self._outer: list[Pass | None] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def enter(self) -> None:
        """Starts a pass that may set `current`; [`leave`] puts it back."""
        self._outer.append(self.current)

    def leave(self) -> None:
        """Puts back what [`enter`] found."""
        # Another hook may have raised before ours could enter: then there is nothing to put back.
        self.current = self._outer.pop() if self._outer else None

    @contextmanager
    def using(self, current: Pass | None) -> Iterator[None]:
        """Has the layers see `current` inside the context."""
        self.enter()
        self.current = current
        try:
            yield
        finally:
            self.leave()


class CheckpointInPass(Generic[Pass]):
    """
    A model's checkpoint function whose recomputation in the backward pass sees what its own forward pass said.

    That is captured at the first pass, so that any number of forward passes may come before a backward pass.

    Args:
        checkpoint (`Callable`):
            `torch.utils.checkpoint.checkpoint` with its options, as transformers installed it, or DeepSpeed's.
        state ([`PassState`]):
            What the layers read.
    """

    def __init__(self, checkpoint: Callable[..., Any], state: PassState[Pass]) -> None:
        self.checkpoint = checkpoint
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `function(*args)`."""
        # A compiled checkpoint holds what the pass said as inputs of its graph and recomputes no Python code.
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        current = self.state.current

        def in_pass(*inputs: Any, **options: Any) -> Any:
            with self.state.using(current):
                return function(*inputs, **options)

        return self.checkpoint(in_pass, *args, **kwargs)


def checkpointed_modules(model: nn.Module) -> list[Any]:
    """
    The modules of a model that transformers can checkpoint.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `list`: each has the attribute `gradient_checkpointing`.
    """
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def checkpoint_in_passes(modules: Iterable[Any], state: PassState[Any]) -> None:
    """
    Has modules that are checkpointed recompute in their own pass.

    To be called in every pass: the function is set anew by each call that enables checkpointing.

    Args:
        modules (`Iterable`):
            What [`checkpointed_modules`] found.
        state ([`PassState`]):
            What the layers read.
    """
    for module in modules:
        if not module.gradient_checkpointing:
            continue
        function = module._gradient_checkpointing_func
        if not isinstance(function, CheckpointInPass) or function.state is not state:
            module._gradient_checkpointing_func = CheckpointInPass(function, state)


def forget_passes(modules: Iterable[Any]) -> None:
    """
    Undoes [`checkpoint_in_passes`].

    Args:
        modules (`Iterable`):
            The modules.
    """
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointInPass):
            module._gradient_checkpointing_func = function.checkpoint
