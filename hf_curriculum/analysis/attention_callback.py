"""Attention measured while a model is trained, into the run record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.distributed import is_main_process
from ..core.errors import invalid
from ..core.records import RunRecord
from .attention_measurement import measure_attention


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["AttentionFocusCallback"]

EVENT = "attention"


class AttentionFocusCallback(TrainerCallback):
    """
    Measures attention before training and at every N-th evaluation, as lines `attention` of the run record.

    A line holds each measure of [`~AttentionMeasurement.summary`]. Every process measures the same texts, since a
    sharded model runs on all processes or on none; the first writes. Which evaluation it is follows from the trainer's
    log history, so a resumed run goes on as if it had not stopped.

    Args:
        texts (`Sequence[str]`):
            The probe set, the same at every measurement. A few dozen texts are enough for a curve.
        every_n_evaluations (`int`, *optional*, defaults to `1`):
            N.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's fast tokenizer. Defaults to the trainer's.
        **options:
            Passed on to [`~hf_curriculum.analysis.attention_measurement.measure_attention`].

    Raises:
        `ValueError`: for an N below 1, or an empty probe set.

    Example:

    ```python
    >>> from hf_curriculum.analysis.attention_callback import AttentionFocusCallback

    >>> callback = AttentionFocusCallback(["Ada has 4 apples."], every_n_evaluations=2)
    ```
    """

    def __init__(
        self,
        texts: Sequence[str],
        every_n_evaluations: int = 1,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        if every_n_evaluations < 1:
            raise invalid("every_n_evaluations", every_n_evaluations, "an integer >= 1")
        if isinstance(texts, str) or len(texts) == 0:
            raise invalid("texts", texts, "a sequence of at least one text")
        self.texts = list(texts)
        self.every_n_evaluations = every_n_evaluations
        self.processing_class = processing_class
        self.options = options
        self._measured_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the model as it is before the first step. See [`~transformers.TrainerCallback`]."""
        self._measured_at = None
        RunRecord(str(args.output_dir), enabled=is_main_process()).rewind(EVENT, state.global_step)
        if state.global_step == 0:
            self._measure(args, state, evaluation=0, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures if this is an N-th evaluation. See [`~transformers.TrainerCallback`]."""
        # The trainer logs before it calls this, so the evaluation at hand is in the history.
        steps = {line["step"] for line in state.log_history if any(name.startswith("eval_") for name in line)}
        if state.global_step > 0 and len(steps) % self.every_n_evaluations == 0:
            self._measure(args, state, evaluation=len(steps), **kwargs)

    def _measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        evaluation: int,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        # Several evaluation sets are several evaluations of the same weights.
        if self._measured_at == state.global_step:
            return
        self._measured_at = state.global_step
        tokenizer = self.processing_class if self.processing_class is not None else processing_class
        if tokenizer is None:
            raise invalid("processing_class", None, "the model's tokenizer", "Give it to the callback or the trainer.")
        measured = measure_attention(
            model, self.texts, processing_class=tokenizer, progress=False, **self.options
        )  # fmt: skip
        numbers = measured.summary()
        record = RunRecord(str(args.output_dir), enabled=is_main_process())
        record.append(EVENT, state.global_step, evaluation=evaluation, num_texts=len(self.texts), **numbers)
