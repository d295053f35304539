"""The experts and their gates against the naive loop, and their three ways through against one another."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hf_curriculum.multitask.absent import freeze_absent_tasks
from hf_curriculum.multitask.cgc_lora import CGCLoraConfig
from hf_curriculum.multitask.cgc_lora import experts as experts_module
from hf_curriculum.multitask.cgc_lora.experts import CGCExperts
from hf_curriculum.multitask.cgc_lora.state import TaskBatch, resolve_tasks


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("cgc_twin", Path(__file__).with_name("cgc_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)
expert_loop, make_config, parameters = twin.expert_loop, twin.make_config, twin.parameters

STRUCTURES = {
    "task": {},
    "task_sum_to_n": {"gate_normalization": "sum_to_n", "gate_temperature": 0.5},
    "task_embedding": {"gate": "task_embedding", "task_embedding_dim": 5},
    "token": {"gate": "token"},
    "token_two_own": {"gate": "token", "num_task_experts": 2, "num_common_experts": 1},
    "own_only": {"num_common_experts": 0, "num_task_experts": 2},
    "separate": {"num_common_experts": 0},
    "plain": {"num_common_experts": 1, "num_task_experts": 0},
    "moelora": {"num_common_experts": 4, "num_task_experts": 0, "gate": "task_embedding"},
    "mtl_lora": {
        "num_common_experts": 3,
        "num_task_experts": 0,
        "shared_down_projection": True,
        "task_matrix": True,
        "gate_temperature": 0.1,
    },
    "hydra": {"num_common_experts": 3, "num_task_experts": 0, "shared_down_projection": True, "gate": "token"},
}
D_IN, D_OUT = 7, 5


def make(name: str) -> tuple[CGCLoraConfig, CGCExperts]:
    config = make_config(**STRUCTURES[name])
    return config, CGCExperts(D_IN, D_OUT, config).double()


def compare_with_loop(config: CGCLoraConfig, experts: CGCExperts, x: torch.Tensor, tasks: TaskBatch) -> None:
    """Outputs and gradients of every parameter and of the input, in float64."""
    x = x.double().requires_grad_()
    weights = torch.randn(*x.shape[:-1], D_OUT, dtype=torch.float64)
    output = experts(x, tasks)
    (output * weights).sum().backward()

    twin_parameters, twin_x = parameters(experts), x.detach().clone().requires_grad_()
    ids = tasks.ids if tasks.ids.dim() == 2 else tasks.ids.repeat_interleave(x.shape[0] // len(tasks.ids))
    ids = ids.view(x.shape[0], -1).expand(*x.shape[:2])
    expected = expert_loop(twin_parameters, config, twin_x, ids)
    # Without common experts, `"common"` is the base model: the loop touches no parameter.
    if expected.requires_grad:
        (expected * weights).sum().backward()

    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, torch.zeros_like(x) if twin_x.grad is None else twin_x.grad)
    for key, parameter in experts.named_parameters():
        expected_grad = twin_parameters[key].grad
        if expected_grad is None:  # the loop never touched it
            expected_grad = torch.zeros_like(parameter)
        torch.testing.assert_close(
            parameter.grad, expected_grad, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )


each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@each_structure
@pytest.mark.parametrize("path", ["dense", "gather"])
def test_rows_of_mixed_tasks_equal_the_loop(structure: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, experts = make(structure)
    monkeypatch.setattr(experts_module, "GATHER_MIN_IDLE_RANK", 1 if path == "gather" else 10**9)
    compare_with_loop(config, experts, torch.randn(4, 3, D_IN), TaskBatch(torch.tensor([2, 0, 2, 1])))


@each_structure
def test_tokens_of_mixed_tasks_equal_the_loop(structure: str) -> None:
    config, experts = make(structure)
    compare_with_loop(config, experts, torch.randn(1, 8, D_IN), TaskBatch(torch.tensor([[0, 0, 1, 1, 1, 2, 0, 2]])))


@each_structure
def test_one_known_task_equals_the_loop(structure: str) -> None:
    config, experts = make(structure)
    tasks = resolve_tasks("b", config.registry())
    assert tasks.single == 1
    compare_with_loop(config, experts, torch.randn(3, 2, D_IN), tasks)


@pytest.mark.parametrize("task", ["b", "common", "uniform"])
@each_structure
def test_without_gradients_one_task_takes_its_blocks_alone(
    structure: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, experts = make(structure)
    tasks, x = resolve_tasks(task, config.registry()), torch.randn(3, 2, D_IN, dtype=torch.float64)
    expected = experts(x, tasks)
    calls = []
    monkeypatch.setattr(experts, "_dense", lambda *args: calls.append(args) or CGCExperts._dense(experts, *args))
    with torch.no_grad():
        torch.testing.assert_close(experts.eval()(x, tasks), expected)
    assert bool(calls) == (task == "uniform" or config.layout.idle_rank == 0)


@pytest.mark.parametrize("structure", ["task", "task_embedding", "token", "own_only", "separate"])
def test_gradients_arrive_in_one_order_whichever_way_a_rank_takes(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ZeRO reduces gradients in the order of their arrival and would add those of unlike parameters otherwise.
    orders = set()
    for threshold in (1, 10**9):
        monkeypatch.setattr(experts_module, "GATHER_MIN_IDLE_RANK", threshold)
        for tasks in (
            TaskBatch(torch.tensor([0, 2, 0])),
            TaskBatch(torch.tensor([1, 1, 1]), single=1),
            TaskBatch(torch.tensor([1]), single=1),
            TaskBatch(torch.tensor([1, -1, -2]), has_reserved=True),
        ):
            _, experts = make(structure)
            arrived = []
            for name, parameter in experts.named_parameters():
                parameter.register_post_accumulate_grad_hook(lambda _, n=name, to=arrived: to.append(n))
            experts(torch.randn(3, 2, D_IN, dtype=torch.float64), tasks).sum().backward()
            orders.add(tuple(arrived))
    assert len(orders) == 1


@each_structure
def test_reserved_tasks_equal_the_loop(structure: str) -> None:
    config, experts = make(structure)
    compare_with_loop(
        config, experts, torch.randn(4, 2, D_IN), TaskBatch(torch.tensor([-1, 0, -2, 1]), has_reserved=True)
    )


@pytest.mark.parametrize("task", ["common", "uniform"])
@each_structure
def test_a_reserved_task_alone_equals_the_loop(structure: str, task: str) -> None:
    config, experts = make(structure)
    compare_with_loop(config, experts, torch.randn(2, 2, D_IN), resolve_tasks(task, config.registry()))


@pytest.mark.parametrize("path", ["dense", "gather"])
def test_rows_follow_beams(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, experts = make("task")
    monkeypatch.setattr(experts_module, "GATHER_MIN_IDLE_RANK", 1 if path == "gather" else 10**9)
    compare_with_loop(config, experts, torch.randn(6, 2, D_IN), TaskBatch(torch.tensor([2, 0])))


def test_flattened_batches_keep_their_tasks() -> None:
    _, experts = make("task")
    x, tasks = torch.randn(3, 4, D_IN, dtype=torch.float64), TaskBatch(torch.tensor([0, 2, 1]))
    flat = experts(x.reshape(12, D_IN), tasks)
    torch.testing.assert_close(flat, experts(x, tasks).reshape(12, D_OUT))
    pooled = experts(x[:, 0], tasks)
    torch.testing.assert_close(pooled, experts(x, tasks)[:, 0])


@pytest.mark.parametrize(
    ("shape", "ids", "message"),
    [
        ((3, 2, D_IN), torch.tensor([0, 1]), r"ids of 2 rows for an input of shape \(3, 2, 7\)"),
        ((1, 5, D_IN), torch.tensor([0, 1]), "Packed rows need an id for every token"),
        ((1, 5, D_IN), torch.tensor([[0, 1, 1]]), r"ids of shape \(1, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], ids: torch.Tensor, message: str) -> None:
    _, experts = make("task")
    with pytest.raises(ValueError, match=message):
        experts(torch.randn(shape, dtype=torch.float64), TaskBatch(ids))


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name not in ("token", "token_two_own", "hydra")])
@pytest.mark.parametrize("task_id", [0, 2, -1, -2])
def test_each_task_is_one_lora(structure: str, task_id: int) -> None:
    config, experts = make(structure)
    if task_id == -1 and config.num_common_experts == 0:
        with pytest.raises(ValueError, match="It has no common experts"):
            experts.task_factors(task_id)
        return
    down, up = experts.task_factors(task_id)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    expected = experts(x, TaskBatch(torch.tensor([task_id]), has_reserved=task_id < 0))
    torch.testing.assert_close(x @ down.T @ up.T, expected, rtol=1e-10, atol=1e-12)
    if task_id >= 0 and not config.shared_down_projection:
        assert len(down) == config.layout.visible_rank


def test_gates_sum_to_one_over_the_experts_a_task_sees() -> None:
    config, experts = make("task")
    rows = experts.gate_rows()[:, :: config.r] / experts.scale
    assert rows.shape == (3, config.layout.num_experts)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, dtype=torch.float64))
    for task in range(3):
        own = config.num_common_experts + task
        others = [e for e in range(config.layout.num_experts) if e >= config.num_common_experts and e != own]
        assert (rows[task, others] == 0).all()
        assert (rows[task, [0, 1, own]] > 0).all()


def test_starts_as_a_lora_of_the_visible_rank() -> None:
    # Equal gates 1 / V at the scale alpha / r are the scale alpha / (V r) of a plain LoRA of rank V r.
    config = make_config(init_weights=True)
    experts = CGCExperts(D_IN, D_OUT, config)
    rows = experts.gate_rows()
    visible = rows[rows > 0]
    torch.testing.assert_close(visible, torch.full_like(visible, config.lora_alpha / (3 * config.r)))
    assert (experts.B == 0).all()
    assert experts.A.abs().max() > 0


def test_other_tasks_get_a_gradient_of_exactly_zero() -> None:
    config, experts = make("task")
    experts(torch.randn(2, 3, D_IN, dtype=torch.float64), TaskBatch(torch.tensor([0, 2]))).sum().backward()
    own = config.layout.own_slice(1)
    assert (experts.A.grad[own] == 0).all()
    assert (experts.B.grad[:, own] == 0).all()
    assert (experts.gate_logits.grad[1] == 0).all()
    assert (experts.A.grad[config.layout.own_slice(2)] != 0).any()


def test_dropout_is_of_the_input_and_off_in_evaluation() -> None:
    experts = CGCExperts(D_IN, D_OUT, make_config(lora_dropout=0.5))
    x, tasks = torch.randn(2, 50, D_IN), TaskBatch(torch.tensor([0, 1]))
    assert not torch.equal(experts(x, tasks), experts(x, tasks))
    experts.eval()
    assert torch.equal(experts(x, tasks), experts(x, tasks))


@pytest.mark.parametrize("path", ["dense", "gather"])
@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "tokens"])
def test_compiles_without_graph_breaks(path: str, per_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "GATHER_MIN_IDLE_RANK", 1 if path == "gather" else 10**9)
    _, experts = make("task")
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[0, 1, 2], [2, 2, 0]]) if per_token else torch.tensor([0, 2])
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    torch.testing.assert_close(compiled(x, TaskBatch(ids)), experts(x, TaskBatch(ids)))


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, centered=True),
}


def train_step(experts: CGCExperts, optimizer: torch.optim.Optimizer, ids: list[int]) -> None:
    optimizer.zero_grad()
    x = torch.randn(len(ids), 3, D_IN, generator=torch.Generator().manual_seed(len(ids)), dtype=torch.float64)
    experts(x, TaskBatch(torch.tensor(ids))).square().sum().backward()
    optimizer.step()


def blocks_of(config: CGCLoraConfig, experts: CGCExperts, task: int) -> list[torch.Tensor]:
    own = config.layout.own_slice(task)
    return [
        experts.A[own].detach().clone(),
        experts.B[:, own].detach().clone(),
        experts.gate_logits[task].detach().clone(),
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_absent_tasks_stay_where_they_are(name: str) -> None:
    config, experts = make("task")
    optimizer = OPTIMIZERS[name](experts.parameters())
    freeze_absent_tasks(optimizer, experts)
    train_step(experts, optimizer, [0, 1, 2])  # gives every task momentum
    before = [blocks_of(config, experts, task) for task in range(3)]
    common = experts.A[: config.layout.common_rank].detach().clone()
    state = {
        key: value[config.layout.own_slice(1)].clone()
        for key, value in optimizer.state[experts.A].items()
        if value.dim()
    }
    assert state
    train_step(experts, optimizer, [0, 2])
    after = [blocks_of(config, experts, task) for task in range(3)]
    for task, (old, new) in enumerate(zip(before, after)):
        for first, second in zip(old, new):
            assert torch.equal(first, second) == (task == 1)
    for key, value in state.items():
        assert torch.equal(optimizer.state[experts.A][key][config.layout.own_slice(1)], value)
    assert not torch.equal(experts.A[: config.layout.common_rank], common)


def test_without_the_guard_momentum_and_decay_move_absent_tasks() -> None:
    config, experts = make("task")
    optimizer = OPTIMIZERS["adamw"](experts.parameters())
    guard = freeze_absent_tasks(optimizer, experts)
    guard.remove()
    train_step(experts, optimizer, [0, 1, 2])
    before = blocks_of(config, experts, 1)
    train_step(experts, optimizer, [0, 2])
    assert not any(torch.equal(old, new) for old, new in zip(before, blocks_of(config, experts, 1)))


def test_with_all_tasks_present_the_guard_changes_nothing() -> None:
    torch.manual_seed(0)
    config, guarded = make("task")
    plain = CGCExperts(D_IN, D_OUT, config).double()
    plain.load_state_dict(guarded.state_dict())
    first, second = (OPTIMIZERS["adamw"](module.parameters()) for module in (guarded, plain))
    freeze_absent_tasks(first, guarded)
    for _ in range(3):
        train_step(guarded, first, [0, 1, 2])
        train_step(plain, second, [0, 1, 2])
    for left, right in zip(guarded.parameters(), plain.parameters()):
        assert torch.equal(left, right)


def test_a_first_step_leaves_absent_tasks_at_their_start() -> None:
    config, experts = make("task")
    optimizer = OPTIMIZERS["adamw"](experts.parameters())
    freeze_absent_tasks(optimizer, experts)
    before = blocks_of(config, experts, 1)
    train_step(experts, optimizer, [0])
    assert all(torch.equal(old, new) for old, new in zip(before, blocks_of(config, experts, 1)))


def test_guard_refuses_what_it_cannot_keep() -> None:
    _, experts = make("task")
    with pytest.raises(ValueError, match="a model with CGC-LoRA experts or task heads"):
        freeze_absent_tasks(OPTIMIZERS["sgd"](experts.parameters()), torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="flattened or sharded copies"):
        freeze_absent_tasks(OPTIMIZERS["sgd"](torch.nn.Linear(2, 2).parameters()), experts)
    optimizer = torch.optim.Adafactor(experts.parameters())
    freeze_absent_tasks(optimizer, experts)
    train_step(experts, optimizer, [0, 1])
    with pytest.raises(NotImplementedError, match="no number per element"):
        train_step(experts, optimizer, [0, 1])
    optimizer = OPTIMIZERS["sgd"](experts.parameters())
    freeze_absent_tasks(optimizer, experts)
    with pytest.raises(NotImplementedError, match="with a closure"):
        optimizer.step(lambda: 0.0)
