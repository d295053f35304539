"""
Teachers: what the student is compared with, behind one protocol.

A teacher that is the student at another time is a copy of the values of the parameters that learn, exchanged with the
live ones for one forward pass: it takes no second model, and works wherever parameters can be exchanged
(`core/parameters.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import gather_params_ctx
from torch import nn

from ..core.head import CausalLMHead
from ..core.modes import evaluation_mode
from ..core.parameters import ParameterSnapshot, learning_parameters, parameters_by_name
from .forward import TeacherPass, head_weights, projection_of
from .projection import HeadWeights


__all__ = ["AdapterOffTeacher", "LiveTeacher", "ModelTeacher", "SnapshotTeacher", "Teacher"]


class Teacher(ABC):
    """
    A model that gives the signal to distil from.

    Its forward runs without gradient and in evaluation mode, and leaves the modes of the student as they were.
    """

    @property
    def ready(self) -> bool:
        """Whether there is something to distil from yet."""
        return True

    @abstractmethod
    def acting(self, student: nn.Module) -> AbstractContextManager[nn.Module]:
        """
        Context in which the teacher can be called.

        Args:
            student (`nn.Module`):
                The model that learns, in the wrapper that the Trainer put it in.

        Yields:
            `nn.Module`: what to call, in evaluation mode.
        """

    @abstractmethod
    def head(self) -> AbstractContextManager[HeadWeights | None]:
        """
        Context in which the weights of the teacher's language-model head can be read.

        Yields:
            [`~hf_curriculum.distillation.projection.HeadWeights`], *optional*: None if they are the student's own.
        """

    def hidden(self, student: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """
        Last hidden states at the labelled positions of a batch.

        Args:
            student (`nn.Module`):
                The wrapped student.
            inputs (`Mapping[str, Any]`):
                The batch, with `labels`.

        Returns:
            `torch.Tensor` of shape `(T, H)`, without gradient.
        """
        with self.acting(student) as model, torch.no_grad():
            return model(**inputs, distillation=TeacherPass()).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, student: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """
        Dense logits of a batch, for models whose logits are small.

        Args:
            student (`nn.Module`):
                The wrapped student.
            inputs (`Mapping[str, Any]`):
                The batch.

        Returns:
            `torch.Tensor` of the shape of the student's logits, without gradient.
        """
        with self.acting(student) as model, torch.no_grad():
            return model(**inputs).logits  # type: ignore[no-any-return]


class SnapshotTeacher(Teacher):
    """
    The student at an earlier time, or its running average.

    Args:
        model (`nn.Module`):
            The student, before it is wrapped. What may learn now is what the snapshot holds, so that a block that is
            frozen for a while and wakes up later is the teacher's old one all the same.
        head ([`~hf_curriculum.core.head.CausalLMHead`], *optional*):
            The student's language-model head, if it has one.
        dtype (`torch.dtype`, *optional*):
            Precision of the copy. Defaults to that of the parameters; a running average needs float32.
    """

    def __init__(self, model: nn.Module, head: CausalLMHead | None, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._head = head
        self._dtype = dtype
        self._names = list(learning_parameters(model))
        self._snapshot: ParameterSnapshot | None = None
        # Parts of the head (weight, bias) that the snapshot holds, by name; looked up when it is taken.
        self._held: dict[str, str] = {}

    @property
    def ready(self) -> bool:
        """Whether a snapshot was taken."""
        return self._snapshot is not None

    @property
    def snapshot(self) -> ParameterSnapshot:
        """The copy."""
        if self._snapshot is None:
            raise RuntimeError("There is no teacher yet.")
        return self._snapshot

    def _take(self) -> ParameterSnapshot:
        # By name: some backends put other parameters in the place of those that the trainer was built with.
        everything = parameters_by_name(self._model)
        names = dict.fromkeys([*self._names, *learning_parameters(self._model)])
        if self._head is not None:
            by_identity = {id(everything[name]): name for name in names}
            own = projection_of(self._head).named_parameters(recurse=False)
            self._held = {part: by_identity[id(live)] for part, live in own if id(live) in by_identity}
        return ParameterSnapshot({name: everything[name] for name in names}, model=self._model, dtype=self._dtype)

    def capture(self) -> None:
        """Makes the student of this moment the teacher. Collective."""
        if self._snapshot is None:
            self._snapshot = self._take()
        else:
            self._snapshot.capture()

    def forget(self) -> None:
        """Goes back to no teacher."""
        self._snapshot = None

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Takes over the teacher of a checkpoint. Collective.

        Args:
            state (`Mapping[str, torch.Tensor]`):
                Full values by name, on rank 0.
        """
        self._snapshot = self._snapshot or self._take()
        self._snapshot.load(state)

    @contextmanager
    def acting(self, student: nn.Module) -> Iterator[nn.Module]:
        """See [`Teacher`]."""
        with evaluation_mode(student), self.snapshot.exchanged():
            yield student

    @contextmanager
    def head(self) -> Iterator[HeadWeights | None]:
        """See [`Teacher`]."""
        if self._head is None:
            yield None
            return
        if not self._held:
            yield None
            return
        with ExitStack() as stack:
            values: dict[str, torch.Tensor] = {}
            for part, live in projection_of(self._head).named_parameters(recurse=False):
                if part in self._held:
                    values[part] = stack.enter_context(self.snapshot.full(self._held[part]))
                else:
                    stack.enter_context(gather_params_ctx(live, modifier_rank=None))
                    values[part] = live
            head = self._head
            yield HeadWeights(values["weight"], values.get("bias"), logit_scale=head.logit_scale, softcap=head.softcap)


class LiveTeacher(Teacher):
    """The student as it is now: what writes a cache at the end of a stage."""

    @contextmanager
    def acting(self, student: nn.Module) -> Iterator[nn.Module]:
        """See [`Teacher`]."""
        with evaluation_mode(student):
            yield student

    @contextmanager
    def head(self) -> Iterator[HeadWeights | None]:
        """See [`Teacher`]."""
        yield None


class AdapterOffTeacher(Teacher):
    """
    The base model under an adapter: the student with its adapter switched off. It takes no memory.

    Args:
        model ([`~peft.PeftModel`]):
            The student, before it is wrapped.
        head ([`~hf_curriculum.core.head.CausalLMHead`], *optional*):
            The student's language-model head, if it has one.
    """

    def __init__(self, model: PeftModel, head: CausalLMHead | None) -> None:
        self._model = model
        self._head = head

    @contextmanager
    def acting(self, student: nn.Module) -> Iterator[nn.Module]:
        """See [`Teacher`]."""
        # PEFT turns `requires_grad` off with the adapter, and on again for all of it, also for what was frozen.
        learned = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        tuner = cast(BaseTuner, self._model.base_model)
        with evaluation_mode(student):
            tuner.disable_adapter_layers()
            try:
                yield student
            finally:
                tuner.enable_adapter_layers()
                for parameter, flag in learned:
                    parameter.requires_grad_(flag)

    @contextmanager
    def head(self) -> Iterator[HeadWeights | None]:
        """See [`Teacher`]."""
        if self._head is None or not isinstance(self._head.projection, ModulesToSaveWrapper):
            yield None
            return
        original = self._head.projection.original_module
        with gather_params_ctx(list(original.parameters()), modifier_rank=None):
            yield head_weights(original, self._head)


class ModelTeacher(Teacher):
    """
    Another model of the same vocabulary.

    Args:
        model (`nn.Module`):
            The model, prepared for the backend.
        head ([`~hf_curriculum.core.head.CausalLMHead`], *optional*):
            Its language-model head, if it has one.
        device (`torch.device`, *optional*):
            Where it computes, if it waits in CPU memory between its forward passes.
    """

    def __init__(self, model: nn.Module, head: CausalLMHead | None, device: torch.device | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._head = head
        self._device = device

    @contextmanager
    def acting(self, student: nn.Module) -> Iterator[nn.Module]:
        """See [`Teacher`]."""
        if self._device is None:
            yield self.model
            return
        self.model.to(self._device)
        try:
            yield self.model
        finally:
            self.model.to("cpu")

    @contextmanager
    def head(self) -> Iterator[HeadWeights | None]:
        """See [`Teacher`]."""
        if self._head is None:
            yield None
            return
        projection = projection_of(self._head)
        with gather_params_ctx(list(projection.parameters()), modifier_rank=None):
            weights = head_weights(projection, self._head)
            if self._device is not None:
                bias = None if weights.bias is None else weights.bias.to(self._device)
                weights = replace(weights, weight=weights.weight.to(self._device), bias=bias)
            yield weights
