import importlib.util
from pathlib import Path

import pytest
import torch

from hf_curriculum.distillation.losses import DIVERGENCES, Divergence, binary_divergence, dense_divergence


# Tests are imported by path (`--import-mode=importlib`), so the twin beside this file is no package.
_SPEC = importlib.util.spec_from_file_location("loss_twin", Path(__file__).with_name("loss_twin.py"))
twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(twin)

CASES = [
    pytest.param(Divergence(kind, beta, temperature), id=f"{kind}-{beta}-{temperature}")
    for kind, beta in (
        ("forward_kl", 0.5),
        ("reverse_kl", 0.5),
        ("jsd", 0.5),
        ("jsd", 0.2),
        ("jsd", 0.0),
        ("jsd", 1.0),
    )
    for temperature in (1.0, 2.0, 7.0)
]


def make_logits(rows=6, classes=5, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, classes, generator=generator) * spread for _ in range(2))


def dense_twin(student, teacher, divergence):
    p_s, p_t = ((logits.double() / divergence.temperature).softmax(dim=-1) for logits in (student, teacher))
    return torch.stack([twin.divergence_of(a, b, divergence.kind, divergence.beta) for a, b in zip(p_s, p_t)])


FORMS = {
    "dense": (dense_divergence, dense_twin),
    "binary": (binary_divergence, twin.binary_divergence_of),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", CASES)
def test_value_and_gradient_equal_the_formula(form, divergence):
    ours, formula = FORMS[form]
    student, teacher = make_logits()
    student.requires_grad_()
    weights = torch.linspace(0.5, 1.5, len(student))
    value = ours(student, teacher, divergence)
    (gradient,) = torch.autograd.grad((value * weights).sum(), student)
    expected = formula(student, teacher, divergence)
    (expected_gradient,) = torch.autograd.grad((expected * weights.double()).sum(), student)
    assert value.dtype == torch.float32
    assert value.shape == (6,)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", CASES)
def test_divergence_is_positive_and_vanishes_only_between_equals(form, divergence):
    ours, _ = FORMS[form]
    student, teacher = make_logits()
    student.requires_grad_()
    assert (ours(student, teacher, divergence) > 1e-4).all()
    same = ours(student, student, divergence)
    (gradient,) = torch.autograd.grad(same.sum(), student)
    torch.testing.assert_close(same, torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, torch.zeros_like(student), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_symmetric_divergence_is_symmetric_and_the_others_are_not(form):
    ours, _ = FORMS[form]
    student, teacher = make_logits()
    symmetric = Divergence("jsd", beta=0.5)
    torch.testing.assert_close(ours(student, teacher, symmetric), ours(teacher, student, symmetric))
    forward, reverse = Divergence("forward_kl"), Divergence("reverse_kl")
    torch.testing.assert_close(ours(student, teacher, forward), ours(teacher, student, reverse))
    assert (ours(student, teacher, forward) - ours(student, teacher, reverse)).abs().min() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_ends_of_beta_are_the_two_kl_divergences(form):
    ours, _ = FORMS[form]
    student, teacher = make_logits()
    assert torch.equal(
        ours(student, teacher, Divergence("jsd", beta=0.0)), ours(student, teacher, Divergence("forward_kl"))
    )
    assert torch.equal(
        ours(student, teacher, Divergence("jsd", beta=1.0)), ours(student, teacher, Divergence("reverse_kl"))
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_teacher_gets_no_gradient(form, kind):
    student, teacher = (logits.requires_grad_() for logits in make_logits())
    FORMS[form][0](student, teacher, Divergence(kind)).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_extreme_logits_stay_finite(form, kind):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, -1e4]])
    value = FORMS[form][0](student, teacher, Divergence(kind, temperature=2.0))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_low_precision_logits_are_compared_in_float32(kind):
    student, teacher = (logits.bfloat16() for logits in make_logits())
    value = dense_divergence(student, teacher, Divergence(kind))
    assert value.dtype == torch.float32
    assert torch.equal(value, dense_divergence(student.float(), teacher.float(), Divergence(kind)))


def test_temperature_limit_is_half_the_squared_distance_of_centred_logits():
    # Hinton et al., 2015, equation 4: T^2 D tends to the mean square of the centred difference, halved.
    student, teacher = (logits.double() for logits in make_logits())
    difference = student - teacher
    limit = (difference - difference.mean(dim=-1, keepdim=True)).square().mean(dim=-1) / 2
    value = 1e4**2 * dense_divergence(student, teacher, Divergence(temperature=1e4))
    torch.testing.assert_close(value, limit, rtol=1e-2, atol=0)


def test_no_row_gives_no_value():
    empty = torch.zeros(0, 4)
    assert dense_divergence(empty, empty, Divergence()).shape == (0,)
    assert binary_divergence(empty, empty, Divergence()).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "Invalid `divergence`: got kl, expected one of forward_kl, reverse_kl, jsd"),
        ({"beta": 1.5}, r"Invalid `beta`: got 1.5, expected a float in \[0, 1\]"),
        ({"beta": float("nan")}, "Invalid `beta`"),
        ({"temperature": 0.0}, "Invalid `temperature`: got 0.0, expected a finite float > 0"),
        ({"temperature": -1.0}, "Invalid `temperature`"),
        ({"temperature": float("inf")}, "Invalid `temperature`"),
        ({"temperature": float("nan")}, "Invalid `temperature`"),
    ],
)
def test_bad_divergence_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


@pytest.mark.parametrize("form", FORMS)
def test_teacher_of_other_classes_is_refused(form):
    with pytest.raises(ValueError, match=r"Invalid `teacher_logits`: got shape \(2, 4\), expected the shape of"):
        FORMS[form][0](torch.zeros(2, 3), torch.zeros(2, 4), Divergence())
