"""What attention fusion computes, against loops in float64, and what follows from its definition."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_curriculum.multitask.task_head import TaskHead


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("fusion_twin", Path(__file__).with_name("fusion_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)
HEADS, LABELS, TASKS, make = twin.HEADS, twin.LABELS, twin.TASKS, twin.make

layer_slowly = pytest.mark.parametrize("level", ["output", pytest.param("layer", marks=pytest.mark.slow)])
both_levels = pytest.mark.parametrize("level", ["output", "layer"])


def own_logits(model: nn.Module, logits: torch.Tensor, tasks: list[int] = TASKS) -> list[torch.Tensor]:
    sizes = [head.num_labels for head in model.heads.values()]
    return [row[: sizes[task]] for row, task in zip(logits, tasks, strict=True)]


def compare(model: nn.Module, level: str, stage: str, inputs: dict[str, torch.Tensor]) -> None:
    """Values and gradients of a batch of mixed tasks, in float64 on both sides but for a mean over tokens."""
    model.double()
    close = {"rtol": 1e-4, "atol": 1e-6} if model.pooling == "mean" else {"rtol": 1e-8, "atol": 1e-10}
    parts = twin.parts_of(model)
    expected = twin.run(parts, inputs, TASKS, LABELS, stage=stage, level=level)
    found = model(**inputs, tasks=torch.tensor(TASKS), labels=LABELS, return_attention=stage != "tasks")
    rows = own_logits(model, found.logits)
    for row, own in zip(rows, expected.logits, strict=True):
        torch.testing.assert_close(row, own, **close)
    # The loss is computed in float32.
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    if stage == "tasks":
        assert found.attention is None
    else:
        assert found.attention.shape == (len(TASKS), len(HEADS))
        torch.testing.assert_close(found.attention.double(), expected.attention, **close)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(len(row), generator=generator, dtype=torch.float64) for row in rows]
    sum((row * weight).sum() for row, weight in zip(rows, weights, strict=True)).backward()
    scalar = sum((row * weight).sum() for row, weight in zip(expected.logits, weights, strict=True))
    learning = {"tasks": ("lora", "classifier"), "fusion": ("fusion", "classifier")}.get(stage, ("",))
    leaves = {name: value for name, value in parts.leaves().items() if name.startswith(learning)}
    wanted = dict(zip(leaves, torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True), strict=True))
    got = twin.gradients_of(model)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        # What is padding of a rank, or of a task without rows, has no graph in the twin.
        value = torch.zeros_like(leaves[name]) if value is None else value
        torch.testing.assert_close(got[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")
    assert all(value.abs().max() > 1e-6 for value in got.values())


@pytest.mark.parametrize(
    ("level", "kind", "stage"),
    [
        ("output", "bert", "tasks"),
        ("output", "bert", "fusion"),
        ("output", "gpt2", "joint"),
        ("layer", "bert", "tasks"),
        ("layer", "llama", "joint"),
        *[
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                ("output", "bert", "joint"),
                ("output", "gpt2", "tasks"),
                ("output", "gpt2", "fusion"),
                ("layer", "bert", "fusion"),
                ("layer", "bert", "joint"),
                ("layer", "llama", "tasks"),
                ("layer", "llama", "fusion"),
                ("layer", "gpt2", "tasks"),
                ("layer", "gpt2", "fusion"),
                ("layer", "gpt2", "joint"),
            ]
        ],
    ],
)
def test_values_and_gradients_are_those_of_loops(level, kind, stage):
    pooling = "cls" if kind == "bert" else "last"
    compare(make(kind, level=level, stage=stage, pooling=pooling), level, stage, twin.batch())


@layer_slowly
@pytest.mark.parametrize(
    "options", [{"fusion_dim": 6, "num_attention_heads": 1}, {"fusion_dim": 9, "num_attention_heads": 3}]
)
def test_size_and_heads_of_the_fusion_are_the_configs(level, options):
    model = make(level=level, pooling="cls", **options)
    fusion = next(iter(twin.parts_of(model).fusions.values()))
    assert fusion.W_q.shape[0] == options["fusion_dim"]
    compare(model, level, "joint", twin.batch())


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_is_the_configs(pooling):
    model = make(pooling=pooling)
    assert model.pooling == pooling
    compare(model, "output", "joint", twin.batch())


@layer_slowly
def test_rank_and_scale_may_differ_between_linears(level):
    lora = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["query", "value"],
        rank_pattern={"value": 3},
        alpha_pattern={"value": 2},
        use_rslora=True,
    )
    compare(make(level=level, lora=lora, pooling="cls"), level, "joint", twin.batch())


@both_levels
@pytest.mark.parametrize("upper", [False, True], ids=["all-blocks", "upper-block"])
def test_stages_say_what_learns(level, upper):
    model = make(level=level, upper=upper)
    kinds = twin.kinds_of(model)
    assert set(kinds.values()) == {"base", "lora", "fusion", "classifier", "own_classifier"}
    for stage, learning in {
        "tasks": {"lora", "own_classifier"},
        "fusion": {"fusion", "classifier"},
        "joint": {"lora", "fusion", "classifier"},
    }.items():
        model.set_stage(stage)
        assert model.stage == stage
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (kinds[name] in learning), (stage, name)


@both_levels
def test_starts_as_the_tasks_own_models(level):
    model = make(level=level, heard=False)
    inputs = twin.batch()
    with torch.no_grad():
        model.set_stage("tasks")
        alone = model(**inputs, tasks=TASKS).logits
        for stage in ("fusion", "joint"):
            model.set_stage(stage)
            fused = model(**inputs, tasks=TASKS).logits
            torch.testing.assert_close(fused, alone, rtol=1e-6, atol=1e-6)
    # And a fusion that hears something is another model: the test can fail.
    heard = make(level=level)
    assert not torch.allclose(
        heard(**inputs, tasks=TASKS).logits, make(level=level, heard=False)(**inputs, tasks=TASKS).logits, atol=1e-3
    )


def test_a_new_fusion_hears_nothing_and_learns_to():
    model = make(random=False, stage="fusion")
    inputs = twin.batch()
    parts = twin.parts_of(model)
    assert not parts.fusions[""].W_o.any()
    model(**inputs, tasks=TASKS, labels=LABELS).loss.backward()
    assert twin.gradients_of(model)["fusion..W_o"].abs().max() > 0


def test_unheard_fusion_is_bit_equal_given_the_pooled_vectors():
    model = make(heard=False, stage="fusion")
    pooled = torch.randn(len(TASKS), len(HEADS), 16)
    ids = torch.tensor(TASKS)
    with torch.no_grad():
        fused = model(pooled=pooled, tasks=ids).logits
        own = model.layout.pick(model.classifier(pooled[torch.arange(len(TASKS)), ids]), ids)
    assert torch.equal(fused, own)


@pytest.mark.parametrize("stage", ["fusion"])
def test_pooled_vectors_are_as_good_as_tokens(stage):
    model, inputs = make(stage=stage), twin.batch()
    with torch.no_grad():
        pooled = model.pooled_outputs(**inputs)
        assert pooled.shape == (len(TASKS), len(HEADS), 16)
        direct = model(**inputs, tasks=TASKS, labels=LABELS, return_attention=True)
        cached = model(pooled=pooled, tasks=TASKS, labels=LABELS, return_attention=True)
    torch.testing.assert_close(cached.logits, direct.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cached.loss, direct.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cached.attention, direct.attention, rtol=1e-6, atol=1e-6)


@both_levels
@pytest.mark.parametrize("stage", ["tasks", "joint"])
def test_the_order_of_the_tasks_does_not_matter(level, stage):
    first = make(level=level, stage=stage)
    order = [2, 0, 1]
    names = list(HEADS)
    second = make(level=level, stage=stage, heads={names[task]: HEADS[names[task]] for task in order}, seed=8)
    twin.permute_tasks(first, second, order)
    inputs = twin.batch()
    with torch.no_grad():
        one = first(**inputs, tasks=[names[task] for task in TASKS], labels=LABELS, return_attention=True)
        two = second(**inputs, tasks=[names[task] for task in TASKS], labels=LABELS, return_attention=True)
    torch.testing.assert_close(two.logits, one.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two.loss, one.loss, rtol=1e-5, atol=1e-6)
    if stage == "joint":
        torch.testing.assert_close(two.attention, one.attention[:, order], rtol=1e-5, atol=1e-5)


@layer_slowly
@pytest.mark.parametrize("stage", ["tasks", "joint"])
@pytest.mark.parametrize(
    ("kind", "side"),
    [("bert", "right"), ("bert", "left"), ("llama", "right"), ("llama", "left"), ("modernbert", "left")],
)
def test_padded_batch_equals_single_examples(level, stage, kind, side):
    model = make(kind, level=level, stage=stage)
    inputs = twin.batch(side=side)
    mask = inputs["attention_mask"]
    # Positions count from the first token, as `generate` has them; modernbert's are relative.
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if side == "left" and kind == "bert" else {}
    with torch.no_grad():
        mixed = model(**inputs, **positions, tasks=TASKS, return_attention=stage != "tasks")
        for row, task in enumerate(TASKS):
            own = inputs["input_ids"][row : row + 1, mask[row] == 1]
            alone = model(input_ids=own, tasks=[task], return_attention=stage != "tasks")
            torch.testing.assert_close(mixed.logits[row], alone.logits[0], rtol=1e-4, atol=1e-5)
            if stage != "tasks":
                torch.testing.assert_close(mixed.attention[row], alone.attention[0], rtol=1e-4, atol=1e-5)


@layer_slowly
@pytest.mark.parametrize("stage", ["tasks", "fusion", "joint"])
def test_a_mixed_batch_equals_batches_of_one_task(level, stage):
    model, inputs = make(level=level, stage=stage), twin.batch()
    with torch.no_grad():
        mixed = model(**inputs, tasks=TASKS).logits
        for task in set(TASKS):
            rows = [row for row, own in enumerate(TASKS) if own == task]
            own = model(**{name: value[rows] for name, value in inputs.items()}, tasks=task).logits
            torch.testing.assert_close(mixed[rows], own, rtol=1e-5, atol=1e-5)


@both_levels
def test_attention_is_a_distribution_over_tasks_that_depends_on_the_row(level):
    model, inputs = make(level=level), twin.batch()
    with torch.no_grad():
        attention = model(**inputs, tasks=TASKS, return_attention=True).attention
        other = model(**inputs, tasks=[1] * len(TASKS), return_attention=True).attention
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(len(TASKS)))
    assert not torch.allclose(attention, other, atol=1e-3)
    assert not torch.allclose(other[0], other[1], atol=1e-4)


@both_levels
def test_attention_is_returned_on_demand_only(level):
    model, inputs = make(level=level), twin.batch()
    plain, shown = model(**inputs, tasks=TASKS), model(**inputs, tasks=TASKS, return_attention=True)
    assert plain.attention is None
    torch.testing.assert_close(plain.logits, shown.logits, rtol=1e-6, atol=1e-6)


@both_levels
def test_rows_without_a_label_do_not_count(level):
    model, inputs = make(level=level), twin.batch()
    missing = LABELS.clone()
    missing[0] = -100
    kept = {name: value[1:] for name, value in inputs.items()}
    with torch.no_grad():
        expected = model(**kept, tasks=TASKS[1:], labels=LABELS[1:]).loss
        torch.testing.assert_close(model(**inputs, tasks=TASKS, labels=missing).loss, expected, rtol=1e-5, atol=1e-6)


@both_levels
@pytest.mark.parametrize("stage", ["tasks", "fusion", "joint"])
def test_one_row_of_one_token(level, stage):
    model = make(level=level, stage=stage)
    inputs = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}
    expected = twin.run(twin.parts_of(model), inputs, [1], stage=stage, level=level)
    with torch.no_grad():
        found = model(**inputs, tasks="mood").logits
    torch.testing.assert_close(found[0].double()[:5], expected.logits[0].detach(), rtol=1e-4, atol=1e-5)


@both_levels
def test_a_single_task_hears_itself_and_needs_no_name(level):
    model = make(level=level, heads={"mood": TaskHead(5)})
    inputs = twin.batch()
    expected = twin.run(twin.parts_of(model), inputs, [0] * 5, level=level)
    with torch.no_grad():
        found = model(**inputs, return_attention=True)
    for row, own in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(row.double(), own.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.attention, torch.ones(5, 1))


@layer_slowly
@pytest.mark.parametrize("stage", ["tasks", "fusion", "joint"])
def test_base_of_16_bits_keeps_what_learns_in_32(level, stage):
    model = make(level=level, stage=stage, base=twin.base_model("bert").to(torch.bfloat16))
    kinds = twin.kinds_of(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if kinds[name] == "base" else torch.float32), name
    inputs = twin.batch()
    output = model(**inputs, tasks=TASKS, labels=LABELS)
    exact = make(level=level, stage=stage)(**inputs, tasks=TASKS, labels=LABELS)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)
    output.loss.backward()
    assert all(value.isfinite().all() for value in twin.gradients_of(model).values())


def test_the_twins_merged_weights_are_stock_peft():
    for kind in ("bert", "gpt2"):
        parts = twin.parts_of(make(kind))
        inputs = twin.batch()
        stock = get_peft_model(twin.base_model(kind), twin.lora_config(kind)).double().eval()
        with torch.no_grad():
            for linear, loras in parts.loras.items():
                layer = stock.get_submodule(f"base_model.model.{linear}")
                layer.lora_A["default"].weight.copy_(loras[1].A)
                layer.lora_B["default"].weight.copy_(loras[1].B)
            hidden = stock(**inputs).last_hidden_state
        for row, vector in enumerate(twin.pooled_by(parts, inputs, 1)):
            own = twin.pool_row(hidden[row], inputs["attention_mask"][row], parts.pooling)
            torch.testing.assert_close(vector, own, rtol=1e-10, atol=1e-12)


def test_attention_of_the_twin_is_a_literal():
    """Two tasks, one head: the scores are 0 and ln 3, so the own task gets 1/4."""
    one = [torch.tensor([1.0], dtype=torch.float64)]
    heard, attention = twin.attend(one[0], [one[0] * 0, one[0] * math.log(3)], [one[0] * 4, one[0] * 8], 1, [0, 1])
    assert heard.item() == pytest.approx(7.0)
    assert [value.item() for value in attention] == pytest.approx([0.25, 0.75])
