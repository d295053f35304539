r"""
Losses and gradients of a few rows of logits, in place: the arithmetic of the chunked loss.

Shapes: R rows, V vocabulary, k entries of a cache. Symbols: T is the temperature; p is the student's distribution at
temperature 1, p_s and p_t are those of student and teacher at T; lse is the log of a sum of exponentials.

The passes over the logits are bound by memory, so they run over groups of rows that stay in the cache of the
processor, in scratch buffers that are allocated once.
"""

from dataclasses import dataclass, replace

import torch

from .losses import Divergence, outcome_divergence


__all__ = ["RowCoefficients", "RowScratch", "RowTeacher", "finish_logits", "row_losses"]

# Elements of one group of rows on a CPU. Our choice: the fastest of 2^16 to 2^22 at vocabularies of 8k to 152k (below,
# the calls themselves cost most; above, the buffers leave the cache).
LOGITS_PER_GROUP = 2**18


@dataclass(frozen=True)
class RowTeacher:
    """
    The teacher's side of some rows: raw logits, or the largest log-probabilities.

    Args:
        logits (`torch.Tensor` of shape `(R, V)`, *optional*):
            What the projection gave; overwritten.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on `logits`.
        softcap (`float`, *optional*):
            Bound of the logits.
        indices (`torch.Tensor` of shape `(R, k)`, int64, *optional*):
            Tokens of known log-probability.
        log_probs (`torch.Tensor` of shape `(R, k)`, *optional*):
            Log-probabilities at T, in nats.
    """

    logits: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    indices: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None


@dataclass(frozen=True)
class RowCoefficients:
    """
    What is asked of the rows.

    Args:
        alpha (`torch.Tensor` of shape `(R,)`):
            Weight of the distillation.
        divergence ([`Divergence`]):
            D and T.
        logit_scale (`float`):
            Factor on the student's raw logits.
        softcap (`float`, *optional*):
            Bound of the student's logits.
        gradient (`bool`):
            Whether the raw logits are to be overwritten with their gradient.
    """

    alpha: torch.Tensor
    divergence: Divergence
    logit_scale: float
    softcap: float | None
    gradient: bool


class RowScratch:
    """
    Buffers for one group of rows, allocated at their first use.

    Args:
        vocabulary (`int`):
            V.
        dtype (`torch.dtype`):
            Precision of the arithmetic.
        device (`torch.device`):
            Where the logits are. Groups are for the caches of a CPU; elsewhere all rows of a chunk are one group.
    """

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.group_rows = max(1, LOGITS_PER_GROUP // vocabulary) if device.type == "cpu" else None
        self._buffers: dict[str, torch.Tensor] = {}

    def like(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The buffer of that name, uninitialised, in the shape of `rows`."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(rows):
            buffer = self._buffers[name] = torch.empty(rows.shape, dtype=self.dtype, device=rows.device)
        return buffer[: len(rows)]

    def working(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """`rows` themselves, or a copy of them in the precision of the arithmetic."""
        return rows if rows.dtype == self.dtype else self.like(name, rows).copy_(rows)


def finish_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """
    Scale and soft-cap, in place.

    Args:
        logits (`torch.Tensor` of shape `(R, V)`):
            What the projection gave.
        scale (`float`):
            Factor.
        softcap (`float`, *optional*):
            c: logits become c tanh(scale logits / c).

    Returns:
        `torch.Tensor` of shape `(R, V)`: `logits`.
    """
    if softcap is not None:
        return logits.mul_(scale / softcap).tanh_().mul_(softcap)
    return logits if scale == 1.0 else logits.mul_(scale)


def _shift(logits: torch.Tensor, temperature: float, out: torch.Tensor) -> torch.Tensor:
    """
    Logits over T, their maximum 0.

    Student and teacher come by here, so that equal logits stay equal to the last bit and their divergence is 0.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    if temperature in (1.0, 2.0):  # where a product with 1 / T is exact, both steps in one pass round alike
        return torch.add(largest.mul_(-1 / temperature), logits, alpha=1 / temperature, out=out)
    return torch.sub(logits, largest, out=out).mul_(1 / temperature)


def _softmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Softmax of logits whose maximum is 0; returns their lse, (R, 1), which is the log of 1 over the largest p."""
    torch.softmax(logits, dim=-1, out=out)
    return out.amax(dim=-1, keepdim=True).log_().neg_()


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Inner product of each row, (R, 1)."""
    products: torch.Tensor = torch.linalg.vecdot(left, right)
    return products.unsqueeze(1)


def _is_top1(logits: torch.Tensor, targets: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Whether the target is the first of the largest logits, (R,); the largest is 0, targets are (R, 1)."""
    is_top1 = (target_logits == 0).squeeze(1)
    # argmax is the slowest of all passes on a CPU, and only where another logit is as large does it say more.
    others = logits.scatter_(1, targets, -1.0).amax(dim=-1)
    logits.scatter_(1, targets, target_logits)
    tied = torch.nonzero(is_top1 & (others == 0)).squeeze(1)
    if len(tied) > 0:
        is_top1[tied] = logits[tied].argmax(dim=-1) == targets[tied].squeeze(1)
    return is_top1


@dataclass(frozen=True)
class _Student:
    """
    The student at temperature T.

    Args:
        logits (`torch.Tensor` of shape `(R, V)`):
            Divided by T, their maximum 0; to be overwritten with the gradient of D if that is wanted.
        p (`torch.Tensor` of shape `(R, V)`):
            p_s.
        lse (`torch.Tensor` of shape `(R, 1)`):
            Of the logits.
    """

    logits: torch.Tensor
    p: torch.Tensor
    lse: torch.Tensor


def _dense(
    student: _Student, teacher: torch.Tensor, divergence: Divergence, gradient: bool, scratch: RowScratch
) -> torch.Tensor:
    """D against all logits of a teacher (divided by T, their maximum 0; overwritten), (R, 1)."""
    z, p_s, lse = student.logits, student.p, student.lse
    p_t = scratch.like("teacher_p", teacher)
    lse_t = _softmax(teacher, p_t)
    if divergence.resolved == "forward_kl":
        value = _dot(p_t, teacher.sub_(z)) - lse_t + lse
        if gradient:
            torch.sub(p_s, p_t, out=z)
        return value
    if divergence.resolved == "reverse_kl":
        value = _dot(p_s, z.sub_(teacher)) - lse + lse_t
        if gradient:
            z.sub_(lse - lse_t + value).mul_(p_s)
        return value
    beta = divergence.beta
    negentropy_s, negentropy_t = _dot(p_s, z) - lse, _dot(p_t, teacher) - lse_t
    mixture = torch.lerp(p_s, p_t, beta, out=p_t)
    # Where both probabilities are 0 the terms are 0 times a logarithm, which must be finite.
    log_mixture = torch.log(mixture.clamp_min_(torch.finfo(mixture.dtype).tiny), out=teacher)
    value = beta * negentropy_t + (1 - beta) * negentropy_s - _dot(mixture, log_mixture)
    if gradient:
        kl_s = negentropy_s - _dot(p_s, log_mixture)
        z.sub_(log_mixture).sub_(lse + kl_s).mul_(p_s).mul_(1 - beta)
    return value


def _top_k(student: _Student, teacher: RowTeacher, divergence: Divergence, gradient: bool) -> torch.Tensor:
    """
    D over the k named tokens and the tail, (R, 1).

    With g the derivative of D by the log-probability of each outcome, the gradient of a named logit is g - p_s sum(g);
    the tail's g is shared by its tokens in proportion to p_s.
    """
    indices, log_named_t = teacher.indices, teacher.log_probs
    assert indices is not None
    assert log_named_t is not None
    z, p_s = student.logits, student.p
    named = p_s.gather(1, indices)
    log_s = z.gather(1, indices) - student.lse
    log_t = log_named_t.to(z.dtype)
    has_tail = indices.shape[1] < z.shape[1]
    # Summed over the tail itself: 1 - sum(named) has no digits left where the named tokens are nearly everything.
    p_s.scatter_(1, indices, 0.0)
    tail = p_s.sum(dim=-1, keepdim=True).clamp_min_(torch.finfo(z.dtype).tiny)
    if has_tail:
        log_s = torch.cat([log_s, tail.log()], dim=-1)
        log_t = torch.cat([log_t, _log_tail(log_t)], dim=-1)
    value, g = outcome_divergence(log_s, log_t - torch.logsumexp(log_t, dim=-1, keepdim=True), divergence)
    if gradient:
        total = g.sum(dim=-1, keepdim=True)
        g_tail = g[:, -1:] if has_tail else torch.zeros_like(total)
        torch.mul(p_s, g_tail / tail - total, out=z)
        z.scatter_(1, indices, g[:, : indices.shape[1]] - named * total)
    p_s.scatter_(1, indices, named)
    return value


def _log_tail(log_named: torch.Tensor) -> torch.Tensor:
    """
    log(1 - sum of the named probabilities), (R, 1), at least the log of the precision.

    Rounding can bring the sum to 1 and above; the tail of a softmax is never empty.
    """
    # The largest sum that is told from 1: what is left below it is rounding noise.
    limit = -torch.finfo(log_named.dtype).eps
    return torch.log(-torch.expm1(torch.logsumexp(log_named, dim=-1, keepdim=True).clamp_max_(limit)))


def _distillation(
    student: _Student,
    teacher: RowTeacher,
    divergence: Divergence,
    gradient: bool,
    scratch: RowScratch,
) -> torch.Tensor:
    """D of each row, (R, 1), without T^2; `student.logits` become its gradient if that is wanted."""
    if teacher.logits is None:
        return _top_k(student, teacher, divergence, gradient)
    # Out of the chunk and into a buffer that stays in the cache: the chunk would be written back to memory.
    logits = scratch.like("teacher_logits", teacher.logits)
    raw = teacher.logits
    if raw.dtype != logits.dtype or teacher.softcap is not None or teacher.logit_scale != 1.0:
        raw = finish_logits(logits.copy_(raw), teacher.logit_scale, teacher.softcap)
    _shift(raw, divergence.temperature, logits)
    return _dense(student, logits, divergence, gradient, scratch)


@dataclass(frozen=True)
class _Softmax:
    """
    The student at temperature 1.

    Args:
        p (`torch.Tensor` of shape `(R, V)`):
            norm times its distribution.
        norm (`torch.Tensor` of shape `(R, 1)`, *optional*):
            None where it is 1.
        ce (`torch.Tensor` of shape `(R, 1)`):
            Cross-entropy of the targets.
        entropy (`torch.Tensor` of shape `(R, 1)`):
            Entropy.
        is_top1 (`torch.Tensor` of shape `(R,)`, bool):
            Whether the target is the most likely token.
    """

    p: torch.Tensor
    norm: torch.Tensor | None
    ce: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def _student(
    z: torch.Tensor, targets: torch.Tensor, temperature: float, scratch: RowScratch
) -> tuple[_Softmax, _Student]:
    """The student at temperature 1 and at T, from its logits, which are overwritten. `targets` are (R, 1)."""
    p = scratch.like("p", z)
    if temperature == 2.0:
        # The usual temperature: one softmax is the square of the other, which saves the costliest pass.
        _shift(z, 2.0, z)
        p_s = scratch.like("p_s", z)
        lse_s = _softmax(z, p_s)
        torch.mul(p_s, p_s, out=p)
        norm = p.sum(dim=-1, keepdim=True)
        lse = 2 * lse_s + norm.log()
        target_logits = z.gather(1, targets)
        is_top1 = _is_top1(z, targets, target_logits)
        entropy = lse - 2 * _dot(p, z) / norm
        return _Softmax(p, norm, lse - 2 * target_logits, entropy, is_top1), _Student(z, p_s, lse_s)
    lse = _softmax(_shift(z, 1.0, z), p)
    target_logits = z.gather(1, targets)
    is_top1 = _is_top1(z, targets, target_logits)
    plain = _Softmax(p, None, lse - target_logits, lse - _dot(p, z), is_top1)
    if temperature == 1.0:
        return plain, _Student(z, p, lse)
    p_s = scratch.like("p_s", z.mul_(1 / temperature))
    return plain, _Student(z, p_s, _softmax(z, p_s))


def _row_group(
    raw: torch.Tensor,
    targets: torch.Tensor,
    teacher: RowTeacher | None,
    coefficients: RowCoefficients,
    scratch: RowScratch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`row_losses` of one group; targets are (R, 1), results (R, 1), the last (R,)."""
    divergence, gradient, scale = coefficients.divergence, coefficients.gradient, coefficients.logit_scale
    temperature = divergence.temperature if teacher is not None else 1.0
    z = finish_logits(scratch.working("logits", raw), scale, coefficients.softcap)
    slope = None
    if coefficients.softcap is not None and gradient:
        # Derivative of the soft-cap: 1 - tanh^2.
        slope = torch.div(z, coefficients.softcap, out=scratch.like("slope", z)).square_().neg_().add_(1.0)
    plain, student = _student(z, targets, temperature, scratch)
    alpha, kd = coefficients.alpha.unsqueeze(1), torch.zeros_like(plain.ce)
    ce_factor = (1 - alpha) * scale
    p_factor = ce_factor if plain.norm is None else ce_factor / plain.norm
    if teacher is not None:
        # Rounding can bring a divergence of nearly equal distributions below 0.
        kd = _distillation(student, teacher, divergence, gradient, scratch).clamp_min_(0.0).mul_(temperature**2)
        if gradient:
            z.mul_(alpha * (temperature * scale)).addcmul_(plain.p, p_factor)
    elif gradient:
        torch.mul(plain.p, p_factor, out=z)
    if gradient:
        z.scatter_add_(1, targets, -ce_factor)
        if slope is not None:
            z.mul_(slope)
        if z.dtype != raw.dtype:
            raw.copy_(z)
    return plain.ce, kd, plain.entropy, plain.is_top1


def row_losses(
    raw: torch.Tensor,
    targets: torch.Tensor,
    teacher: RowTeacher | None,
    coefficients: RowCoefficients,
    scratch: RowScratch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Losses of rows of logits, and their gradient in place.

    Args:
        raw (`torch.Tensor` of shape `(R, V)`):
            What the projection gave, in its precision. Overwritten: with the gradient of
            sum (1 - alpha) CE + alpha T^2 D if that is asked for.
        targets (`torch.Tensor` of shape `(R,)`, int64):
            The labels.
        teacher ([`RowTeacher`], *optional*):
            The teacher of these rows.
        coefficients ([`RowCoefficients`]):
            Weights and temperature.
        scratch ([`RowScratch`]):
            Buffers.

    Returns:
        `tuple` of four `torch.Tensor` of shape `(R,)`: cross-entropy, T^2 D, entropy (all in nats), and whether the
        label is the most likely token.
    """
    size = scratch.group_rows or len(raw)
    results = []
    for start in range(0, len(raw), size):
        rows = slice(start, start + size)
        part = None
        if teacher is not None:
            arrays = (teacher.logits, teacher.indices, teacher.log_probs)
            logits, indices, log_probs = (None if array is None else array[rows] for array in arrays)
            part = RowTeacher(logits, teacher.logit_scale, teacher.softcap, indices, log_probs)
        asked = replace(coefficients, alpha=coefficients.alpha[rows])
        results.append(_row_group(raw[rows], targets[rows].unsqueeze(1), part, asked, scratch))
    ce, kd, entropy, is_top1 = (torch.cat(parts) for parts in zip(*results))
    return ce.squeeze(1), kd.squeeze(1), entropy.squeeze(1), is_top1
