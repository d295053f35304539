"""One batched pass for all LoRAs, over many architectures and shapes, and passes that the backward runs again."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("fusion_twin", Path(__file__).with_name("fusion_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)
LABELS, TASKS, make = twin.LABELS, twin.TASKS, twin.make

# The others are as many more ways of handing masks and positions to the blocks.
FEW = ("bert", "deberta-v2", "llama", "gpt2")
every_kind = pytest.mark.parametrize(
    "kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in twin.KINDS]
)
both_levels = pytest.mark.parametrize("level", ["output", "layer"])
all_or_upper = pytest.mark.parametrize("upper", [False, True], ids=["all-blocks", "upper-block"])


def separate(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Pooled vectors (B, T, H) by a pass of the stock model with merged weights for each task."""
    parts = twin.parts_of(model)
    with torch.no_grad():
        by_task = [torch.stack(twin.pooled_by(parts, inputs, task)) for task in range(len(parts.heads))]
    return torch.stack(by_task, dim=1)


def check_pooled(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        found = model.pooled_outputs(**inputs)
    expected = separate(model, inputs)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    # LoRAs of different tasks make different vectors, or the comparison would say nothing.
    assert (expected[:, 0] - expected[:, 1]).abs().amax(dim=1).min() > 1e-3


@all_or_upper
@every_kind
def test_one_pass_equals_a_pass_for_each_lora(kind, upper):
    model = make(kind, upper=upper)
    # The mask's own shape, as many rows as tokens, as heads, as tasks, as the model is wide; none that is padded.
    for rows, length in ((5, 6), (6, 6), (2, 7), (3, 5), (16, 4), (1, 5), (1, 1), (4, 1)):
        check_pooled(model, twin.batch(rows, length))


@all_or_upper
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "llama", "gpt2", "gemma3"])
@pytest.mark.slow
def test_one_pass_under_left_padding_and_without_a_mask(kind, upper):
    model = make(kind, upper=upper)
    for rows in (5, 6):
        inputs = twin.batch(rows, 6, side="left")
        check_pooled(model, inputs)
        ids = torch.randint(3, twin.VOCABULARY, (rows, 6))
        check_pooled(model, {"input_ids": ids})


@all_or_upper
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "llama", "modernbert"])
@pytest.mark.slow
def test_one_pass_with_each_attention(kind, attention, upper):
    model = make(kind, upper=upper, base=twin.base_model(kind, attn_implementation=attention))
    for rows, length in ((5, 6), (6, 6), (3, 3)):
        check_pooled(model, twin.batch(rows, length))


@all_or_upper
def test_other_inputs_follow_the_rows(upper):
    model = make("bert", upper=upper)
    for rows in (5, 6):
        inputs = twin.batch(rows, 6)
        kinds = (torch.arange(6)[None] > torch.arange(rows)[:, None] % 4).long()
        positions = (torch.arange(6)[None] + torch.arange(rows)[:, None]) % 20
        check_pooled(model, {**inputs, "token_type_ids": kinds, "position_ids": positions})
        embedded = model_embeddings(model)(inputs["input_ids"]).detach()
        with torch.no_grad():
            by_vectors = model.pooled_outputs(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
            by_tokens = model.pooled_outputs(**inputs)
        torch.testing.assert_close(by_vectors, by_tokens, rtol=1e-5, atol=1e-6)


def model_embeddings(model: nn.Module) -> nn.Module:
    (found,) = [m for name, m in model.named_modules() if name.endswith("word_embeddings")]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", twin.KINDS)
def test_layer_level_of_every_architecture_equals_loops(kind):
    model = make(kind, level="layer", upper=True)
    inputs = twin.batch(5, 5)
    expected = twin.run(twin.parts_of(model), inputs, TASKS, level="layer")
    with torch.no_grad():
        found = model(**inputs, tasks=TASKS, return_attention=True)
    sizes = [head.num_labels for head in model.heads.values()]
    for row, (own, task) in enumerate(zip(expected.logits, TASKS, strict=True)):
        torch.testing.assert_close(found.logits[row, : sizes[task]].double(), own.detach(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.attention.double(), expected.attention.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["output", "layer"])
def test_the_pass_leaves_nothing_behind(level):
    """A pass of all LoRAs, one that raised, and one with gradients do not change what the next one computes."""
    model, inputs = make(level=level), twin.batch()
    with torch.no_grad():
        before = model(**inputs, tasks=TASKS).logits
        model.pooled_outputs(**inputs)
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model(input_ids=torch.tensor([[10**6]]), tasks=[0])
    model(**inputs, tasks=TASKS, labels=LABELS).loss.backward()
    with torch.no_grad():
        after = model(**inputs, tasks=TASKS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-7)


@all_or_upper
def test_sources_are_the_tasks_asked_for(upper):
    model, inputs = make(upper=upper), twin.batch()
    with torch.no_grad():
        everyone = model.pooled_outputs(**inputs)
        for sources in ([1], [2, 0], [0, 1, 2]):
            found = model.pooled_outputs(**inputs, sources=sources)
            torch.testing.assert_close(found, everyone[:, sources], rtol=1e-5, atol=1e-6)


def checkpointed(kind: str, level: str, stage: str, reentrant: bool | None, upper: bool) -> tuple[torch.Tensor, dict]:
    model = make(kind, level=level, stage=stage, upper=upper).train()
    if reentrant is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    inputs = twin.batch(5, 5)
    # Two passes before the backward, of other tasks: the second must not leak into the recomputation of the first.
    first = model(**inputs, tasks=TASKS, labels=LABELS).loss
    others = {name: value.flip(0)[:3] for name, value in inputs.items()}
    second = model(**others, tasks=[1, 1, 0], labels=LABELS[[2, 2, 0]]).loss
    (first + second).backward()
    return first.detach(), twin.gradients_of(model)


@all_or_upper
@both_levels
@pytest.mark.parametrize("stage", ["tasks", pytest.param("fusion", marks=pytest.mark.slow), "joint"])
@pytest.mark.parametrize("kind", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_checkpointing_changes_no_gradient(kind, stage, level, upper):
    loss, expected = checkpointed(kind, level, stage, None, upper)
    assert expected
    for reentrant in (False, True):
        again, found = checkpointed(kind, level, stage, reentrant, upper)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-7)
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@both_levels
def test_frozen_loras_take_no_graph(level):
    """Stage fusion at the output level needs no backward through the base; the layer level does."""
    model = make(level=level, stage="fusion").train()
    loss = model(**twin.batch(), tasks=TASKS, labels=LABELS).loss
    seen, stack, kinds = set(), [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kinds.add(type(node).__name__)
        stack.extend(following for following, _ in node.next_functions)
    through_base = any("Gelu" in kind or "ScaledDot" in kind for kind in kinds)
    assert through_base == (level == "layer")
