"""A snapshot computes as the model did, and the model goes on as if nothing had happened."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_curriculum.core.checksums import parameter_checksums
from hf_curriculum.core.parameters import ParameterSnapshot, learning_parameters


WORKER = Path(__file__).with_name("parameters_worker.py")
BACKENDS = {
    "ddp_cpu": "MULTI_CPU 2",
    "zero1": "DEEPSPEED-1 2",
    "zero2": "DEEPSPEED-2 2",
    "zero3": "DEEPSPEED-3 2",
}
SCENARIOS = ["full-plain", "lora-plain", "lora-checkpointing", "full-checkpointing", "full-bf16"]


class Tied(nn.Module):
    """Embeddings shared with the head, and dropout."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embeddings.weight
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens):
        return self.head(self.dropout(torch.tanh(self.inner(self.embeddings(tokens)))))


TOKENS = torch.arange(10).view(2, 5)


def tied_model(dtype=torch.float32):
    torch.manual_seed(0)
    return Tied().to(dtype)


def lora_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(tied_model(), LoraConfig(r=2, target_modules=["inner"], lora_dropout=0.1))


def logits(model):
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(TOKENS)
    model.train(training)
    return out


def train(model, steps, each_step=lambda step: None):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05, weight_decay=0.1
    )
    losses = []
    for step in range(steps):
        each_step(step)
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1).float(), TOKENS.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_bit_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("build", [tied_model, lora_model], ids=["full", "lora"])
def test_teacher_stands_still_and_the_student_learns_as_if_it_were_not_there(build):
    alone = build()
    expected_losses = train(alone, 5)
    model = build()
    model_start = logits(model)
    snapshot = ParameterSnapshot(learning_parameters(model), model=model)

    def teach(step):
        with snapshot.exchanged():
            assert torch.equal(logits(model), model_start)
        assert step == 0 or not torch.equal(logits(model), model_start)

    assert train(model, 5, teach) == expected_losses
    assert_bit_equal(values_of(model), values_of(alone))


def test_exchange_between_forward_and_backward_leaves_the_gradient_alone():
    model = tied_model().eval()
    model(TOKENS).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    snapshot = ParameterSnapshot(learning_parameters(model))
    snapshot.load({name: torch.zeros_like(value) for name, value in snapshot.state().items()})
    loss = model(TOKENS).square().sum()
    with snapshot.exchanged():
        assert not logits(model).any()
    loss.backward()
    assert_bit_equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_learning_parameters_come_once_in_the_order_and_under_the_names_of_the_model():
    model = tied_model()
    assert list(learning_parameters(model)) == ["embeddings.weight", "inner.weight", "inner.bias"]
    model.inner.bias.requires_grad_(False)
    assert list(learning_parameters(model)) == ["embeddings.weight", "inner.weight"]
    assert list(learning_parameters(lora_model())) == [
        f"base_model.model.inner.lora_{letter}.default.weight" for letter in "AB"
    ]


def test_names_are_those_without_compilation():
    model = tied_model()
    names = list(learning_parameters(model))
    assert list(learning_parameters(torch.compile(model))) == names
    model.inner = torch.compile(model.inner)
    assert list(learning_parameters(model)) == names


def test_a_module_that_the_user_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert list(learning_parameters(model)) == ["module.weight", "module.bias"]


def test_average_in_float32_of_bfloat16_parameters_matches_the_naive_loop():
    model = tied_model(torch.bfloat16)
    snapshot = ParameterSnapshot(learning_parameters(model), model=model, dtype=torch.float32)
    naive = {name: value.double() for name, value in snapshot.state().items()}

    def average(step):
        snapshot.average(0.9)
        for name, parameter in learning_parameters(model).items():
            naive[name] = 0.9 * naive[name] + 0.1 * parameter.detach().double()

    train(model, 6, average)
    state = snapshot.state()
    for name, value in state.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), naive[name], rtol=1e-6, atol=1e-7)
    before = values_of(model)
    twin = tied_model(torch.bfloat16)
    twin.load_state_dict({name: value.bfloat16() for name, value in state.items()}, strict=False)
    with snapshot.exchanged():
        assert model.inner.weight.dtype == torch.bfloat16
        assert torch.equal(logits(model), logits(twin))
    assert_bit_equal(values_of(model), before)
    assert_bit_equal(snapshot.state(), state)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_average_at_its_ends_is_a_capture_and_nothing(decay):
    model = tied_model()
    snapshot = ParameterSnapshot(learning_parameters(model))
    before = snapshot.state()
    train(model, 1)
    snapshot.average(decay)
    live = {name: parameter.detach() for name, parameter in learning_parameters(model).items()}
    assert_bit_equal(snapshot.state(), live if decay == 0.0 else before)


def test_capture_follows_into_the_same_memory():
    model = tied_model()
    snapshot = ParameterSnapshot(learning_parameters(model))
    with snapshot.full("inner.weight") as value:
        address = value.data_ptr()
    train(model, 2)
    snapshot.capture()
    with snapshot.full("inner.weight") as value:
        assert value.data_ptr() == address
        assert value.data_ptr() != model.inner.weight.data_ptr()
        assert torch.equal(value, model.inner.weight)
        assert not value.requires_grad


def test_error_inside_an_exchange_leaves_everything_as_it_was():
    model = tied_model()
    expected = train(model, 4)
    again = tied_model()
    snapshot = ParameterSnapshot(learning_parameters(again))
    addresses = [parameter.data_ptr() for parameter in again.parameters()]

    def fail(step):
        with pytest.raises(ZeroDivisionError), snapshot.exchanged():
            raise ZeroDivisionError
        assert [parameter.data_ptr() for parameter in again.parameters()] == addresses
        assert torch.is_grad_enabled()

    assert train(again, 4, fail) == expected
    assert_bit_equal(values_of(again), values_of(model))


def test_inside_an_exchange_nothing_else_is_let_in():
    model = tied_model()
    first, second = (ParameterSnapshot(learning_parameters(model)) for _ in range(2))
    with first.exchanged():
        assert not torch.is_grad_enabled()
        for action in (first.capture, second.capture, first.state, lambda: first.average(0.5), lambda: first.load({})):
            with pytest.raises(RuntimeError, match="Leave that exchange first"):
                action()
        for snapshot in (first, second):
            with pytest.raises(RuntimeError, match="Leave that exchange first"), snapshot.exchanged():
                pass
        with first.full("inner.bias") as value:
            assert torch.equal(value, model.inner.bias)
    with second.exchanged():
        pass


def test_autocast_does_not_carry_a_cast_across_the_exchange():
    model = tied_model().eval()
    snapshot = ParameterSnapshot(learning_parameters(model))
    with torch.autocast("cpu", torch.bfloat16):
        teacher = model(TOKENS).detach()
    with torch.no_grad():
        model.inner.weight.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        student = model(TOKENS).detach()
    assert not torch.equal(teacher, student)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert torch.equal(model(TOKENS), student)
            with snapshot.exchanged():
                assert torch.equal(model(TOKENS), teacher)


def test_frozen_parameters_can_be_part_of_a_snapshot():
    model = tied_model()
    model.inner.weight.requires_grad_(False)
    snapshot = ParameterSnapshot(dict(model.named_parameters()))
    expected = logits(model)
    model.inner.weight.requires_grad_(True)
    train(model, 2)
    with snapshot.exchanged():
        assert torch.equal(logits(model), expected)
    assert model.inner.weight.requires_grad


@pytest.mark.gpu
def test_snapshot_follows_a_model_that_was_moved():
    model = tied_model()
    snapshot = ParameterSnapshot(learning_parameters(model))
    expected = snapshot.state()
    model.cuda()
    with snapshot.exchanged(), torch.no_grad():
        assert model(TOKENS.cuda()).is_cuda
    with snapshot.full("inner.weight") as value:
        assert value.is_cuda
    assert_bit_equal(snapshot.state(), expected)


def test_state_loads_into_another_model_and_is_a_copy():
    model, other = tied_model(), tied_model()
    train(model, 2)
    state = ParameterSnapshot(learning_parameters(model)).state()
    snapshot = ParameterSnapshot(learning_parameters(other))
    snapshot.load(state)
    for value in state.values():
        assert value.is_contiguous()
        assert value.device.type == "cpu"
        value.zero_()
    with snapshot.exchanged():
        assert torch.equal(logits(other), logits(model))


def test_bad_state_is_refused_before_anything_changes():
    snapshot = ParameterSnapshot(learning_parameters(tied_model()))
    good = snapshot.state()
    ones = {name: torch.ones_like(value) for name, value in good.items()}
    missing = {name: value for name, value in ones.items() if name != "inner.bias"}
    for bad, message in (
        (missing, r"1 names missing \['inner.bias'\], 0 unexpected"),
        ({**ones, "other": torch.ones(1)}, r"0 names missing \[\], 1 unexpected \['other'\]"),
        ({**ones, "inner.bias": torch.ones(7)}, r"`state\[inner.bias\]`: got shape \(7,\), expected \(6,\)"),
        ({**ones, "inner.bias": torch.ones(6).double()}, "got torch.float64, expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            snapshot.load(bad)
        assert_bit_equal(snapshot.state(), good)
    snapshot.load({name: value.bfloat16() for name, value in ones.items()})
    assert_bit_equal(snapshot.state(), ones)


def test_sizes_are_in_bytes_of_the_kept_dtype():
    parameters = learning_parameters(tied_model())
    elements = 11 * 6 + 6 * 6 + 6
    assert ParameterSnapshot(parameters).nbytes == 4 * elements
    assert ParameterSnapshot(parameters, dtype=torch.float64).full_nbytes == 8 * elements


def test_bad_arguments_say_what_to_do():
    model = tied_model()
    parameters = learning_parameters(model)
    with pytest.raises(ValueError, match="Is the whole model frozen"):
        ParameterSnapshot({})
    with pytest.raises(ValueError, match="expected a floating dtype"):
        ParameterSnapshot(parameters, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"embeddings\.weight, which is not a parameter of the model"):
        ParameterSnapshot(parameters, model=nn.Linear(2, 2))
    quantised = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"which is torch\.uint8"):
        ParameterSnapshot({"weight": quantised})
    with pytest.raises(NotImplementedError, match="which is offloaded"):
        ParameterSnapshot({"weight": nn.Parameter(torch.zeros(2, device="meta"))})
    snapshot = ParameterSnapshot(parameters)
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"expected a float in \[0, 1\]"):
            snapshot.average(decay)
    with pytest.raises(ValueError, match="a parameter of the snapshot"), snapshot.full("head.weight"):
        pass
    half = ParameterSnapshot(learning_parameters(tied_model(torch.bfloat16)))
    with pytest.raises(ValueError, match=r"expected torch\.float32 for an average"):
        half.average(0.5)


def test_parameters_that_changed_under_the_snapshot_are_noticed():
    model = tied_model()
    snapshot = ParameterSnapshot(learning_parameters(model), model=model)
    model.inner = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"inner.weight, which is not a parameter of the model \(any more\)"):
        snapshot.capture()
    model = tied_model()
    snapshot = ParameterSnapshot(learning_parameters(model), model=model)
    model.inner.bias.data = torch.zeros(7)
    with pytest.raises(ValueError, match=r"got inner.bias of shape \(7,\), expected \(6,\)"), snapshot.exchanged():
        pass


def test_experts_that_differ_between_ranks_are_refused():
    expert = nn.Parameter(torch.zeros(2))
    expert.allreduce = False
    with pytest.raises(NotImplementedError, match="differs from rank to rank"):
        ParameterSnapshot({"expert": expert})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_one_changed_bit_and_not_the_layout(dtype):
    parameter = nn.Parameter(torch.randn(5, 3).to(dtype))
    (before,) = parameter_checksums({"weight": parameter}).values()
    transposed = nn.Parameter(parameter.detach().t().contiguous().t())
    assert parameter_checksums({"weight": transposed}) == {"weight": before}
    parameter.data[2, 1] = torch.nextafter(parameter.data[2, 1].float(), torch.tensor(9.0)).to(dtype) * 2
    assert parameter_checksums({"weight": parameter}) != {"weight": before}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", BACKENDS)
def test_backends_train_to_the_same_bits_with_and_without_the_teacher(launch, tmp_path, config):
    args = ["--output_dir", str(tmp_path), "--expect", BACKENDS[config], "--scenarios", *SCENARIOS]
    text = launch(WORKER, 2, args=args, config=f"{config}.yaml").stdout
    for scenario in SCENARIOS:
        assert f"COMPARED {scenario} " in text
    if config == "zero3":
        # The settings of the worker are meant to bring about both kinds of parameters.
        assert "SEEN ['AVAILABLE', 'NOT_AVAILABLE']" in text
    for scenario in ("full-plain", "lora-plain"):
        check_in_one_process(tmp_path / f"{scenario}.safetensors", scenario.startswith("lora"))


def check_in_one_process(path, lora):
    """What several processes gathered computes the same logits in one."""
    build = worker_functions()
    model = build["build"](lora)
    state = load_file(path)
    expected = state.pop("expected_logits")
    snapshot = ParameterSnapshot(learning_parameters(model), model=model)
    assert not torch.allclose(build["logits_of"](model), expected, atol=1e-3)
    snapshot.load(state)
    with snapshot.exchanged():
        torch.testing.assert_close(build["logits_of"](model), expected, rtol=1e-5, atol=1e-6)


def worker_functions():
    import runpy

    return runpy.run_path(str(WORKER))


@pytest.mark.slow
@pytest.mark.distributed
def test_exchange_between_forward_and_backward_holds_under_zero_3(launch, tmp_path):
    args = ["--output_dir", str(tmp_path), "--expect", BACKENDS["zero3"], "--student_first", "--scenarios"]
    text = launch(WORKER, 2, args=[*args, "full-plain", "lora-checkpointing"], config="zero3.yaml").stdout
    assert "COMPARED lora-checkpointing" in text


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp_and_fsdp2_without_a_trainer_train_to_the_same_bits(launch):
    text = launch(WORKER, 2, args=["--blocks", "ddp", "fsdp2"]).stdout
    sums = dict(line.split(" ", 2)[1:] for line in text.splitlines() if line.startswith("BLOCKS "))
    assert json.loads(sums["ddp"]) == json.loads(sums["fsdp2"])
