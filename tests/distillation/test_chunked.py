import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_curriculum.core import head as head_module
from hf_curriculum.distillation import chunked, row_losses
from hf_curriculum.distillation.chunked import (
    HeadTeacher,
    TopKTeacher,
    chunked_token_losses,
    top_k_log_probs,
)
from hf_curriculum.distillation.losses import DIVERGENCES, Divergence
from hf_curriculum.distillation.projection import HeadWeights


# Tests are imported by path (`--import-mode=importlib`), so the twin beside this file is no package.
_SPEC = importlib.util.spec_from_file_location("loss_twin", Path(__file__).with_name("loss_twin.py"))
twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(twin)

POSITIONS, HIDDEN, VOCABULARY = 11, 6, 23
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2), ("jsd", 0.0), ("jsd", 1.0)]
CASES = [
    pytest.param(Divergence(kind, beta, temperature), id=f"{kind}-{beta}-{temperature}")
    for kind, beta in KINDS
    for temperature in (1.0, 2.0, 7.0)
]
HEADS = {"plain": (1.0, None), "scaled": (0.6, None), "capped": (1.0, 2.0), "scaled-capped": (1.7, 3.0)}
# Below, at and above one in each: both sides, rows without distillation, and rows with nothing else.
ALPHA = torch.tensor([0.0, 1.0, 0.5, 0.3, 0.0, 0.9, 1.0, 0.25, 0.0, 0.7, 0.1])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Three positions in a chunk, two in a group: both leave a rest."""
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 3 * VOCABULARY + 1)
    monkeypatch.setattr(row_losses, "LOGITS_PER_GROUP", 2 * VOCABULARY + 1)


def make_student(form="plain", dtype=torch.float32, trained=True, bias=True):
    generator = torch.Generator().manual_seed(0)
    scale, softcap = HEADS[form]
    hidden, weight, offset = (
        (torch.randn(*shape, generator=generator) * spread).to(dtype).requires_grad_(needed)
        for shape, spread, needed in (
            ((POSITIONS, HIDDEN), 1.0, True),
            ((VOCABULARY, HIDDEN), 0.8, trained),
            ((VOCABULARY,), 0.5, trained),
        )
    )
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    targets[0], targets[1] = 0, VOCABULARY - 1
    return hidden, targets, HeadWeights(weight, offset if bias else None, scale, softcap)


def make_teacher(form="capped", dtype=torch.float32, hidden_size=HIDDEN + 3):
    generator = torch.Generator().manual_seed(1)
    scale, softcap = HEADS[form]
    hidden, weight = (
        torch.randn(rows, hidden_size, generator=generator).to(dtype) for rows in (POSITIONS, VOCABULARY)
    )
    return HeadTeacher(hidden, HeadWeights(weight, None, scale, softcap))


def parameters_of(hidden, head):
    return [value for value in (hidden, head.weight, head.bias) if value is not None and value.requires_grad]


def check_against_twin(hidden, targets, head, teacher, alpha, divergence, rtol=1e-4, atol=2e-5):
    """Every value, and every gradient under a factor as gradient accumulation has it."""
    weights = alpha if isinstance(alpha, torch.Tensor) else torch.full((POSITIONS,), alpha)
    indices = teacher.indices if isinstance(teacher, TopKTeacher) else None
    teacher_logits = None
    if isinstance(teacher, TopKTeacher):
        teacher_logits = torch.full((POSITIONS, VOCABULARY), -math.inf, dtype=torch.float64)
        rest = torch.log(-torch.expm1(torch.logsumexp(teacher.log_probs.double(), dim=-1, keepdim=True)))
        others = VOCABULARY - indices.shape[1]
        teacher_logits[:] = rest - math.log(others) if others else -math.inf
        teacher_logits.scatter_(1, indices.long(), teacher.log_probs.double())
        # The log-probabilities are at T already.
        teacher_logits *= divergence.temperature
    elif teacher is not None:
        teacher_logits = twin.head_logits(teacher.hidden, teacher.head)
    student_logits = twin.head_logits(hidden, head)
    expected = twin.token_losses(student_logits, targets, teacher_logits, weights.double(), divergence, indices)
    parameters = parameters_of(hidden, head)
    expected_gradients = torch.autograd.grad(expected[0].sum() * 0.37, parameters)
    ours = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=alpha, divergence=divergence)
    gradients = torch.autograd.grad(ours.total * 0.37, parameters)
    # The divergence is a difference of sums of size 1, of which T^2 makes an error of T^2 epsilon.
    slack = atol * divergence.temperature**2
    for name, wanted in zip(("loss", "ce", "kd", "entropy", "is_top1"), expected):
        value = getattr(ours, name)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), wanted.double(), rtol=rtol, atol=slack)
    assert ours.total.item() == pytest.approx(expected[0].sum().item(), rel=rtol, abs=slack * POSITIONS)
    for gradient, wanted in zip(gradients, expected_gradients):
        assert gradient.dtype == wanted.dtype
        torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=atol * max(1.0, wanted.abs().max().item()))
    return ours


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("divergence", CASES)
def test_values_and_gradients_equal_the_formula(divergence, form):
    check_against_twin(*make_student(form), make_teacher(), ALPHA, divergence)


@pytest.mark.parametrize("divergence", CASES)
def test_float64_models_equal_the_formula_to_its_last_digits(divergence):
    student, teacher = make_student("scaled-capped", torch.float64), make_teacher(dtype=torch.float64)
    losses = check_against_twin(*student, teacher, ALPHA.double(), divergence, rtol=1e-10, atol=1e-12)
    assert losses.total.dtype == torch.float64


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("divergence", CASES)
def test_cached_teacher_equals_the_divergence_over_buckets(divergence, k):
    hidden, targets, head = make_student("scaled-capped")
    logits = twin.head_logits(make_teacher().hidden, make_teacher().head)
    indices, log_probs = twin.top_k_of(logits, k, divergence.temperature)
    teacher = TopKTeacher(indices.to(torch.int32), log_probs.float())
    check_against_twin(hidden, targets, head, teacher, ALPHA, divergence)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_one_alpha_for_all_positions(kind, alpha):
    hidden, targets, head = make_student()
    same = torch.full((POSITIONS,), alpha)
    divergence = Divergence(kind, temperature=2.0)
    losses = chunked_token_losses(hidden, targets, head, teacher=make_teacher(), alpha=alpha, divergence=divergence)
    if alpha > 0:
        check_against_twin(hidden, targets, head, make_teacher(), alpha, divergence)
        per_position = chunked_token_losses(
            hidden, targets, head, teacher=make_teacher(), alpha=same, divergence=divergence
        )
        assert torch.equal(losses.loss, per_position.loss)
    else:
        assert torch.equal(losses.loss, losses.ce)
        assert (losses.kd > 0).all()  # measured, though it does not count
        check_against_twin(hidden, targets, head, None, 0.0, divergence)


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_alone(form, bias):
    check_against_twin(*make_student(form, bias=bias), None, 0.0, Divergence())


def test_positions_of_alpha_zero_never_meet_the_teacher():
    hidden, targets, head = make_student()
    teacher = make_teacher()
    teacher.hidden[ALPHA == 0] = math.nan
    losses = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=ALPHA)
    losses.total.backward()
    assert hidden.grad.isfinite().all()
    assert torch.equal(losses.kd == 0, ALPHA == 0)
    none = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=torch.zeros(POSITIONS))
    torch.testing.assert_close(none.loss, chunked_token_losses(hidden, targets, head).loss)


@pytest.mark.parametrize("size", [1, VOCABULARY, 4 * VOCABULARY, 2**20])
def test_chunks_and_groups_change_nothing(size, monkeypatch):
    student, teacher = make_student("capped"), make_teacher()
    expected = chunked_token_losses(*student, teacher=teacher, alpha=ALPHA)
    wanted = torch.autograd.grad(expected.total, parameters_of(student[0], student[2]))
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", size)
    monkeypatch.setattr(row_losses, "LOGITS_PER_GROUP", 3 * size)
    losses = chunked_token_losses(*student, teacher=teacher, alpha=ALPHA)
    torch.testing.assert_close(losses.loss, expected.loss)
    for gradient, same in zip(torch.autograd.grad(losses.total, parameters_of(student[0], student[2])), wanted):
        torch.testing.assert_close(gradient, same)


def test_values_without_grad_mode_are_the_same():
    student, teacher = make_student("capped"), make_teacher()
    with_gradient = chunked_token_losses(*student, teacher=teacher, alpha=ALPHA)
    with torch.no_grad():
        without = chunked_token_losses(*student, teacher=teacher, alpha=ALPHA)
    assert not without.total.requires_grad
    for name in ("loss", "ce", "kd", "entropy", "is_top1"):
        assert torch.equal(getattr(with_gradient, name), getattr(without, name))


def test_hidden_states_without_gradient_still_train_the_head():
    hidden, targets, head = make_student()
    chunked_token_losses(hidden.detach(), targets, head).total.backward()
    expected = torch.nn.functional.cross_entropy(twin.head_logits(hidden, head), targets, reduction="sum")
    torch.testing.assert_close(head.weight.grad, torch.autograd.grad(expected, head.weight)[0], rtol=1e-4, atol=1e-5)


class LargestTensors(TorchDispatchMode):
    """Elements of every tensor that an operation makes, views and outputs given to it aside."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.made.append((tuple(leaf.shape), leaf.numel()))
        return result


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("cached", [False, True], ids=["head", "cache"])
def test_no_tensor_outgrows_a_chunk(kind, cached):
    hidden, targets, head = make_student("capped", trained=False)
    teacher = make_teacher()
    if cached:
        teacher = TopKTeacher(*top_k_log_probs(teacher.hidden, teacher.head, 5, 2.0))
    with LargestTensors() as tensors:
        losses = chunked_token_losses(
            hidden, targets, head, teacher=teacher, alpha=0.5, divergence=Divergence(kind, temperature=2.0)
        )
        losses.total.backward()
    assert max(size for _, size in tensors.made) <= head_module.LOGITS_PER_CHUNK
    # One chunk of the student, one of a teacher that is projected, buffers for groups, and no more.
    chunks = [shape for shape, _ in tensors.made if shape == (3, VOCABULARY)]
    assert len(chunks) == (1 if cached else 2)


def test_frozen_head_gets_no_gradient_and_no_room_for_one():
    hidden, targets, head = make_student(trained=False)
    with LargestTensors() as tensors:
        chunked_token_losses(hidden, targets, head, teacher=make_teacher(), alpha=0.5).total.backward()
    assert head.weight.grad is None
    assert head.bias.grad is None
    assert hidden.grad.abs().max() > 0
    assert all(shape != tuple(head.weight.shape) for shape, _ in tensors.made)


def test_trained_head_gets_its_gradient_without_a_copy():
    hidden, targets, head = make_student()
    with LargestTensors() as tensors:
        (chunked_token_losses(hidden, targets, head).total / 7).backward()
    assert sum(shape == tuple(head.weight.shape) for shape, _ in tensors.made) == 1


def test_gradients_accumulate_over_micro_batches():
    hidden, targets, head = make_student()
    whole = chunked_token_losses(hidden, targets, head, teacher=make_teacher(), alpha=ALPHA)
    wanted = torch.autograd.grad(whole.total, parameters_of(hidden, head))
    teacher = make_teacher()
    for rows in (slice(0, 4), slice(4, POSITIONS)):
        part = HeadTeacher(teacher.hidden[rows], teacher.head)
        chunked_token_losses(hidden[rows], targets[rows], head, teacher=part, alpha=ALPHA[rows]).total.backward()
    for parameter, gradient in zip((hidden, head.weight, head.bias), wanted):
        torch.testing.assert_close(parameter.grad, gradient)


def test_second_backward_is_refused():
    losses = chunked_token_losses(*make_student())
    losses.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over by the first backward pass"):
        losses.total.backward()


def test_second_order_is_refused():
    hidden, targets, head = make_student()
    (gradient,) = torch.autograd.grad(chunked_token_losses(hidden, targets, head).total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("with_teacher", [False, True])
def test_no_position_is_a_connected_zero(with_teacher):
    _, _, head = make_student()
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    teacher = HeadTeacher(torch.zeros(0, HIDDEN), make_student()[2]) if with_teacher else None
    losses = chunked_token_losses(
        hidden, torch.zeros(0, dtype=torch.int64), head, teacher=teacher, alpha=0.5 if with_teacher else 0.0
    )
    assert losses.total.item() == 0
    assert all(len(getattr(losses, name)) == 0 for name in ("loss", "ce", "kd", "entropy", "is_top1"))
    losses.total.backward()
    assert hidden.grad.shape == (0, HIDDEN)
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))
    assert [len(part) for part in top_k_log_probs(hidden, head, 3, 1.0)] == [0, 0]


def test_one_position():
    hidden, targets, head = make_student()
    teacher = make_teacher()
    whole = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=0.5)
    one = chunked_token_losses(
        hidden[4:5], targets[4:5], head, teacher=HeadTeacher(teacher.hidden[4:5], teacher.head), alpha=0.5
    )
    torch.testing.assert_close(one.loss[0], whole.loss[4])
    torch.testing.assert_close(one.total, whole.loss[4])


@pytest.mark.parametrize("divergence", CASES)
def test_student_does_not_move_from_a_teacher_that_it_equals(divergence):
    hidden, targets, head = make_student("scaled-capped")
    teacher = HeadTeacher(hidden.detach().clone(), head)
    losses = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=1.0, divergence=divergence)
    torch.testing.assert_close(losses.kd, torch.zeros(POSITIONS), rtol=0, atol=1e-6 * divergence.temperature**2)
    assert (losses.kd >= 0).all()
    losses.total.backward()
    assert hidden.grad.abs().max() < 1e-5
    if divergence.resolved != "jsd":
        assert torch.equal(losses.kd, torch.zeros(POSITIONS))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_large_temperature_tends_to_the_squared_distance_of_centred_logits(kind):
    hidden, targets, head = make_student(dtype=torch.float64)
    teacher = make_teacher("plain", dtype=torch.float64)
    difference = twin.head_logits(hidden, head) - twin.head_logits(teacher.hidden, teacher.head)
    limit = (difference - difference.mean(dim=-1, keepdim=True)).square().mean(dim=-1) / 2
    divergence = Divergence(kind, temperature=1e4)
    losses = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=1.0, divergence=divergence)
    factor = 0.25 if kind == "jsd" else 1.0  # beta (1 - beta)
    torch.testing.assert_close(losses.kd, factor * limit.detach(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_very_large_temperature_stays_finite(kind):
    hidden, targets, head = make_student()
    divergence = Divergence(kind, temperature=1e6)
    losses = chunked_token_losses(hidden, targets, head, teacher=make_teacher(), alpha=0.5, divergence=divergence)
    losses.total.backward()
    assert losses.loss.isfinite().all()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 1, 3, 4])
def test_extreme_logits_stay_finite(kind, temperature, k):
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0], [-1e4, 1e4, 1e4, -1e4], [0.0, 0.0, 0.0, -1e4]])
    hidden = torch.eye(3).requires_grad_()
    head = HeadWeights(logits.T.clone().requires_grad_())
    other = HeadWeights(-logits.T)
    teacher = HeadTeacher(torch.eye(3), other)
    if k is not None:
        teacher = TopKTeacher(*top_k_log_probs(torch.eye(3), other, k, temperature))
    divergence = Divergence(kind, temperature=temperature)
    losses = chunked_token_losses(
        hidden, torch.tensor([1, 0, 3]), head, teacher=teacher, alpha=0.5, divergence=divergence
    )
    losses.total.backward()
    for value in (losses.loss, losses.kd, losses.entropy, hidden.grad, head.weight.grad):
        assert value.isfinite().all()
    torch.testing.assert_close(losses.ce, torch.tensor([2e4, 2e4 + math.log(2), 1e4 + math.log(3)]))


def test_entropy_and_accuracy_of_known_rows():
    hidden = torch.eye(3)
    head = HeadWeights(torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, -1e4, -1e4], [0.0, 0.0, 0.0, 1e4]]).T)
    first = chunked_token_losses(hidden, torch.tensor([0, 0, 3]), head)
    torch.testing.assert_close(first.entropy, torch.tensor([math.log(4), math.log(2), 0.0]))
    assert first.is_top1.tolist() == [True, True, True]
    # Among equal logits the first one counts, as argmax has it.
    second = chunked_token_losses(hidden, torch.tensor([1, 1, 2]), head)
    assert second.is_top1.tolist() == [False, False, False]


def test_cached_teacher_in_half_precision_is_normalised():
    hidden, targets, head = make_student()
    teacher = make_teacher()
    indices, log_probs = top_k_log_probs(teacher.hidden, teacher.head, VOCABULARY - 1, 1.0)
    rounded_up = log_probs.half() + 2e-3  # the named probabilities now sum to more than 1
    losses = chunked_token_losses(hidden, targets, head, teacher=TopKTeacher(indices, rounded_up), alpha=1.0)
    exact = chunked_token_losses(hidden, targets, head, teacher=TopKTeacher(indices, log_probs), alpha=1.0)
    assert (losses.kd > 0).all()
    torch.testing.assert_close(losses.kd, exact.kd, rtol=0.05, atol=0.02)


def test_tail_keeps_its_digits_where_the_named_tokens_are_nearly_everything():
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    hidden = torch.ones(1, 1, requires_grad=True)
    head = HeadWeights(logits.T.float())
    teacher = TopKTeacher(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]))
    losses = chunked_token_losses(hidden, torch.tensor([0]), head, teacher=teacher, alpha=1.0)
    p = torch.softmax(logits[0], dim=-1)
    expected = 0.5 * math.log(0.5 / p[0]) + 0.5 * math.log(0.5 / p[1:].sum())
    torch.testing.assert_close(losses.kd[0].item(), expected, rtol=1e-6, atol=0)


def test_all_tokens_named_equals_the_whole_teacher():
    hidden, targets, head = make_student("capped")
    teacher = make_teacher()
    divergence = Divergence("jsd", beta=0.3, temperature=2.0)
    whole = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=0.5, divergence=divergence)
    named = TopKTeacher(*top_k_log_probs(teacher.hidden, teacher.head, VOCABULARY, 2.0))
    losses = chunked_token_losses(hidden, targets, head, teacher=named, alpha=0.5, divergence=divergence)
    torch.testing.assert_close(losses.kd, whole.kd, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_equals_a_full_sort(temperature):
    teacher = make_teacher("scaled-capped")
    indices, log_probs = top_k_log_probs(teacher.hidden.requires_grad_(), teacher.head, 4, temperature)
    wanted, values = twin.top_k_of(twin.head_logits(teacher.hidden, teacher.head), 4, temperature)
    assert indices.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    assert not log_probs.requires_grad
    assert torch.equal(indices, wanted)
    torch.testing.assert_close(log_probs.double(), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("how", ["model", "autocast"])
def test_bfloat16_is_near_the_formula(how, kind):
    dtype = torch.bfloat16 if how == "model" else torch.float32
    hidden, targets, head = make_student("scaled", dtype)
    teacher = make_teacher("plain", dtype)
    divergence = Divergence(kind, temperature=2.0)
    # The formula on the numbers that the products get.
    exact = [value.detach().bfloat16().double().requires_grad_() for value in (hidden, head.weight, head.bias)]
    same = HeadWeights(exact[1], exact[2], head.logit_scale)
    teacher_logits = twin.head_logits(
        teacher.hidden.bfloat16(), HeadWeights(teacher.head.weight.bfloat16(), None, teacher.head.logit_scale)
    )
    expected = twin.token_losses(twin.head_logits(exact[0], same), targets, teacher_logits, ALPHA.double(), divergence)
    wanted = torch.autograd.grad(expected[0].sum(), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        losses = chunked_token_losses(hidden, targets, head, teacher=teacher, alpha=ALPHA, divergence=divergence)
    losses.total.backward()
    assert losses.total.dtype == losses.ce.dtype == torch.float32
    torch.testing.assert_close(losses.ce.double(), expected[1].detach(), rtol=0.02, atol=0.03)
    torch.testing.assert_close(losses.kd.double(), expected[2].detach(), rtol=0.05, atol=0.05)
    for parameter, gradient in zip((hidden, head.weight, head.bias), wanted):
        assert parameter.grad.dtype == dtype
        error = (parameter.grad.double() - gradient).norm() / gradient.norm()
        assert error < 0.02


def test_gradient_of_a_bfloat16_head_is_summed_in_float32(monkeypatch):
    # One large contribution, then many that bfloat16 rounds away next to it: 1 + 2^-9 is 1 there.
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 1)
    positions = 257
    hidden = torch.full((positions, 1), 2.0**-9, dtype=torch.bfloat16)
    hidden[0] = 1.0
    head = HeadWeights(torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True))
    chunked_token_losses(hidden, torch.zeros(positions, dtype=torch.int64), head).total.backward()
    torch.testing.assert_close(head.weight.grad.float(), torch.tensor([[-0.75], [0.75]]), rtol=0, atol=0)


def test_frozen_chunks_are_no_longer_than_a_product_needs(monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 2**20)
    monkeypatch.setattr(chunked, "ROWS_PER_CHUNK", 4)
    hidden, targets, head = make_student(trained=False)
    with LargestTensors() as tensors:
        losses = chunked_token_losses(hidden, targets, head)
    assert max(size for _, size in tensors.made) == 4 * VOCABULARY
    torch.testing.assert_close(losses.loss, chunked_token_losses(*make_student()).loss)


def bad_head(**changes):
    return lambda: HeadWeights(**{"weight": torch.zeros(VOCABULARY, HIDDEN), **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_head(weight=torch.zeros(0)), r"Invalid `weight`: got shape \(0,\), expected a matrix .* gathered first"),
        (bad_head(bias=torch.zeros(3)), r"Invalid `bias`: got shape \(3,\), expected shape \(23,\)"),
    ],
    ids=["partitioned", "bias"],
)
def test_bad_head_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def wide_teacher():
    teacher = make_teacher()
    return HeadTeacher(teacher.hidden, HeadWeights(torch.zeros(VOCABULARY + 1, HIDDEN + 3)))


NAMED = torch.zeros(POSITIONS, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.5}, "Invalid `alpha`: got a positive weight without a teacher, expected 0"),
        ({"alpha": ALPHA}, "Invalid `alpha`: got a positive weight without a teacher"),
        ({"alpha": 1.5, "teacher": make_teacher()}, r"Invalid `alpha`: got 1.5, expected a float in \[0, 1\]"),
        ({"alpha": ALPHA[:3], "teacher": make_teacher()}, r"Invalid `alpha`: got shape \(3,\)"),
        ({"hidden": torch.zeros(POSITIONS, HIDDEN + 1)}, r"Invalid `hidden`: got shape \(11, 7\)"),
        ({"hidden": torch.zeros(POSITIONS + 1, HIDDEN)}, r"Invalid `hidden`: got shape \(12, 6\)"),
        ({"teacher": wide_teacher()}, "got a vocabulary of 24, expected the student's, 23. .*share tokenizer"),
        (
            {"teacher": HeadTeacher(torch.zeros(3, HIDDEN + 3), make_teacher().head)},
            r"Invalid `teacher.hidden`: got shape \(3, 9\), expected shape \(11, 9\)",
        ),
        ({"teacher": TopKTeacher(NAMED, torch.zeros(POSITIONS, 3))}, "Invalid `teacher`: got indices of shape"),
        ({"teacher": TopKTeacher(NAMED[:, :0], torch.zeros(POSITIONS, 0))}, "Invalid `teacher`: got k = 0"),
        ({"teacher": TopKTeacher(NAMED[:3], torch.zeros(3, 2))}, "Invalid `teacher`: got indices of shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    hidden, targets, head = make_student()
    hidden = arguments.pop("hidden", hidden)
    with pytest.raises(ValueError, match=message):
        chunked_token_losses(hidden, targets, head, **arguments)


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_bad_k_is_refused(k):
    hidden, _, head = make_student()
    with pytest.raises(ValueError, match=f"Invalid `k`: got {k}, expected 1 <= k <= 23"):
        top_k_log_probs(hidden, head, k, 1.0)
