r"""
Divergences between the distributions of a student and a teacher.

Shapes: N samples or positions, C classes. Symbols: p_s and p_t are the distributions of student and teacher at
temperature T, softmax(logits / T); beta is the weight of the generalised Jensen-Shannon divergence.

Every divergence here is without the factor T^2 that keeps the size of its gradient the same at every temperature
(Hinton et al., 2015, arXiv 1503.02531, section 2): the losses multiply by it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.errors import invalid


__all__ = ["DIVERGENCES", "Divergence", "binary_divergence", "dense_divergence", "outcome_divergence"]

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Divergence:
    r"""
    Which divergence, and at which temperature.

    Args:
        kind (`str`, *optional*, defaults to `"forward_kl"`):
            `"forward_kl"`: KL(p_t || p_s) = sum p_t (log p_t - log p_s), the teacher's entropy included, so it is zero
            where both agree. `"reverse_kl"`: KL(p_s || p_t). `"jsd"`: the generalised Jensen-Shannon divergence
            beta KL(p_t || m) + (1 - beta) KL(p_s || m) with m = (1 - beta) p_s + beta p_t (Agarwal et al., 2023,
            arXiv 2306.13649, equation 1).
        beta (`float`, *optional*, defaults to `0.5`):
            Weight of the teacher in `"jsd"`, in [0, 1]. As in TRL, 0 stands for the forward KL and 1 for the reverse
            KL (the limits of JSD / beta and of JSD / (1 - beta): the divergence itself vanishes at both ends). The
            other kinds do not use it.
        temperature (`float`, *optional*, defaults to `1.0`):
            T > 0: the logits of both sides are divided by it.

    Raises:
        `ValueError`: for an unknown kind, a beta outside [0, 1], a temperature that is not positive and finite.

    Example:

    ```python
    >>> from hf_curriculum.distillation.losses import Divergence

    >>> Divergence("jsd", beta=0.0).resolved
    'forward_kl'
    ```
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise invalid("divergence", self.kind, f"one of {', '.join(DIVERGENCES)}")
        if not 0.0 <= self.beta <= 1.0:
            raise invalid("beta", self.beta, "a float in [0, 1]", "0 is the forward KL, 1 the reverse KL.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise invalid("temperature", self.temperature, "a finite float > 0", "1 leaves the logits as they are.")

    @property
    def resolved(self) -> str:
        """The kind that is computed: `"jsd"` is one of the two KL divergences at the ends of its beta."""
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        return self.kind


def _check_logits(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise invalid(
            "teacher_logits",
            f"shape {tuple(teacher_logits.shape)}",
            f"the shape of `student_logits`, {tuple(student_logits.shape)}, as (N, C)",
            "A teacher must score the same rows and the same classes as its student.",
        )


def _divergence(log_student: torch.Tensor, log_teacher: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """Divergence over the last dimension of two arrays of log-probabilities of the same shape."""

    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    if divergence.resolved == "forward_kl":
        return kl(log_teacher, log_student)
    if divergence.resolved == "reverse_kl":
        return kl(log_student, log_teacher)
    beta = divergence.beta
    log_mixture = torch.logaddexp(log_student + math.log(1 - beta), log_teacher + math.log(beta))
    return beta * kl(log_teacher, log_mixture) + (1 - beta) * kl(log_student, log_mixture)


def _arithmetic(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32, or in float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def dense_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """
    Divergence of two softmax distributions over the same classes, for logits small enough to be held whole.

    Args:
        student_logits (`torch.Tensor` of shape `(N, C)`, floating point):
            Logits with gradient.
        teacher_logits (`torch.Tensor` of shape `(N, C)`, floating point):
            Logits of the teacher; no gradient flows to them.
        divergence ([`Divergence`]):
            Kind and temperature.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32 (float64 for float64 logits): in nats, without the factor T^2.

    Raises:
        `ValueError`: if the shapes differ.
    """
    _check_logits(student_logits, teacher_logits)
    temperature = divergence.temperature
    log_student = F.log_softmax(_arithmetic(student_logits) / temperature, dim=-1)
    log_teacher = F.log_softmax(_arithmetic(teacher_logits.detach()) / temperature, dim=-1)
    return _divergence(log_student, log_teacher, divergence)


def binary_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """
    Divergence for multi-label outputs: the mean over C independent Bernoulli distributions sigmoid(logit / T).

    The mean, because the cross-entropy of multi-label classification is a mean over the labels too
    (`BCEWithLogitsLoss`), so that alpha weighs like with like.

    Args:
        student_logits (`torch.Tensor` of shape `(N, C)`, floating point):
            Logits with gradient.
        teacher_logits (`torch.Tensor` of shape `(N, C)`, floating point):
            Logits of the teacher; no gradient flows to them.
        divergence ([`Divergence`]):
            Kind and temperature.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32 (float64 for float64 logits): in nats, without the factor T^2.

    Raises:
        `ValueError`: if the shapes differ.
    """
    _check_logits(student_logits, teacher_logits)

    def log_outcomes(logits: torch.Tensor) -> torch.Tensor:
        scaled = _arithmetic(logits) / divergence.temperature
        return torch.stack([F.logsigmoid(scaled), F.logsigmoid(-scaled)], dim=-1)  # [N, C, 2]

    per_class = _divergence(log_outcomes(student_logits), log_outcomes(teacher_logits.detach()), divergence)
    return per_class.mean(dim=-1)


def outcome_divergence(
    log_student: torch.Tensor, log_teacher: torch.Tensor, divergence: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Divergence over a few outcomes, with its derivative written out.

    Args:
        log_student (`torch.Tensor` of shape `(N, C)`):
            log p_s of each outcome, at temperature T.
        log_teacher (`torch.Tensor` of shape `(N, C)`):
            log p_t.
        divergence ([`Divergence`]):
            The kind; its temperature is not used.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the divergence in nats, `(N, 1)`, and its derivative by `log_student`,
        `(N, C)`, up to a multiple of p_s, which the normalisation of p_s takes out again.
    """
    p_s, p_t = log_student.exp(), log_teacher.exp()
    if divergence.resolved == "forward_kl":
        return (p_t * (log_teacher - log_student)).sum(dim=-1, keepdim=True), -p_t
    if divergence.resolved == "reverse_kl":
        terms = p_s * (log_student - log_teacher)
        return terms.sum(dim=-1, keepdim=True), terms
    beta = divergence.beta
    log_m = torch.logaddexp(log_student + math.log(1 - beta), log_teacher + math.log(beta))
    terms = (1 - beta) * p_s * (log_student - log_m)
    return (beta * p_t * (log_teacher - log_m) + terms).sum(dim=-1, keepdim=True), terms
