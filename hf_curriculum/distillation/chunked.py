r"""
Cross-entropy and distillation of a language-model head over labelled positions, one chunk of logits at a time.

Shapes: T labelled positions, H hidden size of the student, H_t of the teacher, V vocabulary, k entries of a cache,
R positions of one group. Symbols: T alone in a formula is the temperature; p_s and p_t are the distributions of
student and teacher at it.

The gradient is computed together with the loss: each chunk of logits is turned into its own gradient in place and
multiplied back at once, so the student is projected once and the backward pass only scales what is there. A frozen
head gets no gradient buffer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..core import head as core_head
from ..core.errors import invalid
from .losses import Divergence
from .projection import HeadGradients, HeadWeights, Projection
from .row_losses import RowCoefficients, RowScratch, RowTeacher, finish_logits, row_losses


__all__ = [
    "HeadTeacher",
    "TokenLosses",
    "TopKTeacher",
    "chunked_token_losses",
    "top_k_log_probs",
]


# Rows from which a product has its full speed on a CPU, to 5 %. Our choice, measured with hidden sizes of 256 and 512.
ROWS_PER_CHUNK = 128
# A product of 96 rows takes less time than one of 110: the kernels work in blocks of rows.
ROWS_PER_BLOCK = 32


@dataclass(frozen=True)
class HeadTeacher:
    """
    A teacher whose logits are projected chunk by chunk.

    Args:
        hidden (`torch.Tensor` of shape `(T, H_t)`, floating point):
            The teacher's last hidden states at the student's labelled positions.
        head ([`HeadWeights`]):
            The teacher's head, of the student's vocabulary.
    """

    hidden: torch.Tensor
    head: HeadWeights


@dataclass(frozen=True)
class TopKTeacher:
    """
    A teacher of which the k largest log-probabilities are known; all other tokens together are one outcome, the tail.

    Args:
        indices (`torch.Tensor` of shape `(T, k)`, integer):
            Token ids, distinct within a row.
        log_probs (`torch.Tensor` of shape `(T, k)`, floating point):
            Their log-probabilities in nats, at the temperature of the divergence.
    """

    indices: torch.Tensor
    log_probs: torch.Tensor


@dataclass(frozen=True)
class TokenLosses:
    """
    Losses of the labelled positions. Everything but `total` is without graph; float32 (float64 where the model is).

    Args:
        total (`torch.Tensor` of shape `()`):
            Sum of `loss`, with graph.
        loss (`torch.Tensor` of shape `(T,)`):
            (1 - alpha) ce + alpha kd.
        ce (`torch.Tensor` of shape `(T,)`):
            Cross-entropy of the label at temperature 1, in nats.
        kd (`torch.Tensor` of shape `(T,)`):
            Divergence from the teacher times T^2, in nats; 0 where there is no teacher.
        entropy (`torch.Tensor` of shape `(T,)`):
            Entropy of the student at temperature 1, in nats.
        is_top1 (`torch.Tensor` of shape `(T,)`, bool):
            Whether the label is the most likely token; among equal ones, the first.
    """

    total: torch.Tensor
    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


@dataclass(frozen=True)
class _Problem:
    """What is not differentiated."""

    targets: torch.Tensor
    head: HeadWeights
    teacher: HeadTeacher | TopKTeacher | None
    alpha: float | torch.Tensor
    divergence: Divergence


def _chunk_rows(head: HeadWeights, *, weight_gradient: bool, two_sided: bool) -> int:
    """
    Positions in a chunk.

    On a CPU a chunk need not be larger than its products need to be fast, and a small one stays in the cache; where a
    teacher has a chunk of its own, both share the room of one. But the gradient of the weight is read and written
    once per chunk: for it a chunk is as large as may be.
    """
    size = max(1, core_head.LOGITS_PER_CHUNK // head.vocabulary)
    if head.weight.device.type == "cpu" and not weight_gradient:
        half = -(-size // (2 * ROWS_PER_BLOCK)) * ROWS_PER_BLOCK
        size = min(size, ROWS_PER_CHUNK, half if two_sided else size)
    return size - size % ROWS_PER_BLOCK if size > ROWS_PER_BLOCK else size


def _rows(problem: _Problem, size: int) -> Iterator[tuple[slice | torch.Tensor, bool]]:
    """
    Chunks of positions, and whether they are compared with the teacher.

    With one alpha per position, those of alpha 0 are gathered in chunks of their own, where no teacher is projected.
    """
    count = len(problem.targets)
    if problem.teacher is None or not isinstance(problem.alpha, torch.Tensor) or bool((problem.alpha != 0).all()):
        for start in range(0, count, size):
            yield slice(start, min(start + size, count)), problem.teacher is not None
        return
    for with_teacher in (True, False):
        for rows in torch.nonzero((problem.alpha != 0) == with_teacher).squeeze(1).split(size):
            if len(rows) > 0:
                yield rows, with_teacher


def _row_teacher(
    problem: _Problem, rows: slice | torch.Tensor, projection: Projection | None, buffer: torch.Tensor | None
) -> RowTeacher:
    """The teacher's side of a chunk."""
    teacher = problem.teacher
    if isinstance(teacher, TopKTeacher):
        return RowTeacher(indices=teacher.indices[rows].long(), log_probs=teacher.log_probs[rows])
    assert isinstance(teacher, HeadTeacher)
    assert projection is not None
    assert buffer is not None
    return RowTeacher(
        logits=projection.into(buffer, teacher.hidden[rows]),
        logit_scale=teacher.head.logit_scale,
        softcap=teacher.head.softcap,
    )


def _compute(
    hidden: torch.Tensor, problem: _Problem, wanted: tuple[bool, bool, bool]
) -> tuple[TokenLosses, list[torch.Tensor | None]]:
    """All losses, and the gradients of hidden states, weight and bias that are wanted; runs without grad mode."""
    head, count = problem.head, len(problem.targets)
    two_sided = isinstance(problem.teacher, HeadTeacher)
    size = max(1, min(count, _chunk_rows(head, weight_gradient=wanted[1], two_sided=two_sided)))
    projection = Projection(head, hidden)
    arithmetic = projection.arithmetic
    buffer = projection.buffer(size)
    teacher_projection, teacher_buffer = None, None
    if isinstance(problem.teacher, HeadTeacher):
        teacher_projection = Projection(problem.teacher.head, problem.teacher.hidden)
        teacher_buffer = teacher_projection.buffer(size)
    scratch = RowScratch(head.vocabulary, arithmetic, hidden.device)
    alpha = torch.as_tensor(problem.alpha, dtype=arithmetic, device=hidden.device).expand(count)
    ce, kd, entropy = (hidden.new_zeros(count, dtype=arithmetic) for _ in range(3))
    is_top1 = torch.zeros(count, dtype=torch.bool, device=hidden.device)
    gradients = HeadGradients(hidden, head, projection, wanted)
    for rows, with_teacher in _rows(problem, size):
        chunk = hidden[rows]
        logits = projection.into(buffer, chunk)
        teacher = _row_teacher(problem, rows, teacher_projection, teacher_buffer) if with_teacher else None
        asked = RowCoefficients(alpha[rows], problem.divergence, head.logit_scale, head.softcap, any(wanted))
        ce[rows], kd[rows], entropy[rows], is_top1[rows] = row_losses(
            logits, problem.targets[rows], teacher, asked, scratch
        )
        if any(wanted):
            gradients.add(rows, logits, chunk)
    loss = (1 - alpha) * ce + alpha * kd
    return TokenLosses(loss.sum(), loss, ce, kd, entropy, is_top1), gradients.result()


class _ChunkedTokenLosses(torch.autograd.Function):
    """Hands over, in the backward pass, the gradients that the forward pass has computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        problem: _Problem,
    ) -> tuple[torch.Tensor, ...]:
        losses, ctx.gradients = _compute(hidden, problem, ctx.needs_input_grad[:3])
        per_token = losses.loss, losses.ce, losses.kd, losses.entropy, losses.is_top1
        ctx.mark_non_differentiable(*per_token)
        ctx.set_materialize_grads(False)
        return losses.total, *per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradient of the chunked loss is computed once, in its forward pass, and was handed over by the "
                "first backward pass. Call the model again instead of `backward(retain_graph=True)`."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if grad_total is None:
            return None, None, None, None
        # In place: the buffers are no one else's, and a second (V, H) buffer would double the cost of a trained head.
        return (*(None if gradient is None else gradient.mul_(grad_total) for gradient in gradients), None)


def _check_teacher(teacher: HeadTeacher | TopKTeacher, head: HeadWeights, count: int) -> None:
    """Raises for a teacher that does not fit the student's head or the number of positions."""
    if isinstance(teacher, TopKTeacher):
        shape = tuple(teacher.indices.shape)
        if len(shape) != 2 or shape[0] != count or teacher.log_probs.shape != shape:
            got = f"indices of shape {shape} and log_probs of shape {tuple(teacher.log_probs.shape)}"
            raise invalid("teacher", got, f"both of shape ({count}, k)")
        if not 1 <= shape[1] <= head.vocabulary:
            raise invalid("teacher", f"k = {shape[1]}", f"1 <= k <= {head.vocabulary}, the vocabulary")
        return
    if teacher.head.vocabulary != head.vocabulary:
        raise invalid(
            "teacher",
            f"a vocabulary of {teacher.head.vocabulary}",
            f"the student's, {head.vocabulary}",
            "Student and teacher must share tokenizer and embedding size.",
        )
    expected = (count, teacher.head.weight.shape[1])
    if teacher.hidden.shape != expected:
        raise invalid("teacher.hidden", f"shape {tuple(teacher.hidden.shape)}", f"shape {expected}")


def _check(hidden: torch.Tensor, problem: _Problem) -> None:
    """Raises for parts that do not fit together."""
    head, alpha, count = problem.head, problem.alpha, len(problem.targets)
    expected = (count, head.weight.shape[1])
    if hidden.shape != expected:
        got = f"shape {tuple(hidden.shape)}"
        raise invalid("hidden", got, f"shape {expected}: as many rows as targets, as wide as the head")
    if isinstance(alpha, torch.Tensor):
        if alpha.shape != (count,):
            raise invalid("alpha", f"shape {tuple(alpha.shape)}", f"a number, or one per position: shape ({count},)")
    elif not 0.0 <= alpha <= 1.0:
        raise invalid("alpha", alpha, "a float in [0, 1]")
    if problem.teacher is not None:
        _check_teacher(problem.teacher, head, count)
    elif bool((torch.as_tensor(alpha) != 0).any()):
        raise invalid("alpha", "a positive weight without a teacher", "0", "There is nothing to distil from.")


def chunked_token_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: HeadWeights,
    *,
    teacher: HeadTeacher | TopKTeacher | None = None,
    alpha: float | torch.Tensor = 0.0,
    divergence: Divergence = Divergence(),  # noqa: B008 -- frozen
) -> TokenLosses:
    r"""
    (1 - alpha) CE + alpha T^2 D(teacher, student) of every labelled position, and its sum with gradient.

    Args:
        hidden (`torch.Tensor` of shape `(T, H)`, floating point):
            The student's hidden states at the labelled positions.
        targets (`torch.Tensor` of shape `(T,)`, int64):
            Their labels, in [0, V).
        head ([`HeadWeights`]):
            The student's head.
        teacher ([`HeadTeacher`] or [`TopKTeacher`], *optional*):
            The teacher's signal. No gradient flows to it.
        alpha (`float` or `torch.Tensor` of shape `(T,)`, *optional*, defaults to `0.0`):
            Weight of the distillation in [0, 1]; 0 without a teacher. Positions at which a tensor is 0 are not
            compared with the teacher, and their `kd` is 0; a number compares all positions, 0 as well.
        divergence ([`Divergence`], *optional*, defaults to `Divergence()`):
            D and T.

    Returns:
        [`TokenLosses`]. In grad mode `total` has a gradient to `hidden`, and to weight and bias where they require
        one; it is computed now, and can be asked for once.

    Raises:
        `ValueError`: if parts do not fit together: shapes, vocabularies, an alpha without a teacher.

    Example:

    ```python
    >>> import torch
    >>> from hf_curriculum.distillation.chunked import HeadTeacher, chunked_token_losses
    >>> from hf_curriculum.distillation.projection import HeadWeights

    >>> hidden, head = torch.randn(5, 8, requires_grad=True), HeadWeights(torch.randn(100, 8))
    >>> teacher = HeadTeacher(hidden.detach(), head)
    >>> losses = chunked_token_losses(hidden, torch.arange(5), head, teacher=teacher, alpha=0.5)
    >>> losses.kd.tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0]
    >>> losses.total.backward()
    ```
    """
    problem = _Problem(targets, head, teacher, alpha, divergence)
    _check(hidden, problem)
    if torch.is_grad_enabled():
        return TokenLosses(*_ChunkedTokenLosses.apply(hidden, head.weight, head.bias, problem))  # type: ignore[no-untyped-call]
    return _compute(hidden, problem, (False, False, False))[0]


@torch.no_grad()
def top_k_log_probs(
    hidden: torch.Tensor, head: HeadWeights, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k most likely tokens of every position, chunk by chunk.

    Args:
        hidden (`torch.Tensor` of shape `(T, H)`, floating point):
            Hidden states.
        head ([`HeadWeights`]):
            The head.
        k (`int`):
            1 <= k <= V.
        temperature (`float`):
            T > 0 that divides the logits.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: indices of shape `(T, k)`, int64, the most likely token first, and their
        log-probabilities of shape `(T, k)`, float32, in nats.

    Raises:
        `ValueError`: for a k outside its range.
    """
    if not 1 <= k <= head.vocabulary:
        raise invalid("k", k, f"1 <= k <= {head.vocabulary}, the vocabulary")
    projection = Projection(head, hidden)
    size = _chunk_rows(head, weight_gradient=False, two_sided=False)
    indices = hidden.new_empty((len(hidden), k), dtype=torch.int64)
    log_probs = hidden.new_empty((len(hidden), k), dtype=projection.arithmetic)
    buffer = projection.buffer(min(size, len(hidden)))
    for start in range(0, len(hidden), size):
        logits = projection.into(buffer, hidden[start : start + size]).to(projection.arithmetic)
        finish_logits(logits, head.logit_scale, head.softcap).div_(temperature)
        rows = slice(start, start + len(logits))
        log_probs[rows], indices[rows] = logits.topk(k, dim=-1)
        log_probs[rows] -= torch.logsumexp(logits, dim=-1, keepdim=True)
    return indices, log_probs
