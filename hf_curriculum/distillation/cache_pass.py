"""The pass that writes a teacher cache: the teacher once over the rows of a stage."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft.utils.integrations import gather_params_ctx
from torch import nn

from ..core.head import CausalLMHead
from .cache import TopKCache, TopKSpec
from .cache_writer import TopKWriter
from .chunked import top_k_log_probs
from .forward import head_weights, projection_of
from .row_index import LABELS_PER_ROW, ROW_INDEX
from .teacher import Teacher


__all__ = ["write_teacher_cache"]


def write_teacher_cache(
    batches: Iterable[dict[str, Any]],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    teacher: Teacher,
    student: nn.Module,
    own_head: CausalLMHead,
    path: Path,
    spec: TopKSpec,
) -> TopKCache:
    """
    Runs a teacher over batches and writes its largest log-probabilities. Collective.

    Args:
        batches (`Iterable[dict[str, Any]]`):
            As many on every rank, with `row_index` and `labels_per_row`.
        prepare (`Callable`):
            Moves a batch to the device.
        teacher ([`~hf_curriculum.distillation.teacher.Teacher`]):
            The teacher.
        student (`nn.Module`):
            The wrapped student.
        own_head ([`~hf_curriculum.core.head.CausalLMHead`]):
            The student's head, for a teacher without one of its own.
        path (`Path`):
            The file.
        spec ([`~hf_curriculum.distillation.cache.TopKSpec`]):
            What it holds.

    Returns:
        [`~hf_curriculum.distillation.cache.TopKCache`], open for reading.
    """
    projection = projection_of(own_head)
    with TopKWriter(path, spec) as writer:
        for batch in batches:
            inputs = prepare(batch)
            row_index, counts = inputs.pop(ROW_INDEX), inputs.pop(LABELS_PER_ROW)
            hidden = teacher.hidden(student, inputs)
            with teacher.head() as head, gather_params_ctx(list(projection.parameters()), modifier_rank=None):
                weights = head_weights(projection, own_head) if head is None else head
                indices, log_probs = top_k_log_probs(hidden, weights, spec.columns, spec.temperature)
            writer.append(row_index, counts, indices, log_probs)
        return writer.finish()
