import functools
import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_curriculum.layerwise.blocks import Block, Blocks, find_blocks
from hf_curriculum.layerwise.cost import (
    MEMORY_COLUMNS,
    Memory,
    expected_depth,
    memory_by_kind,
    memory_rows,
    predicted_lines,
    predicted_ratio,
    show_cost,
    time_ratio,
)
from hf_curriculum.layerwise.depth import Layer
from hf_curriculum.layerwise.savings import (
    Eater,
    input_gradient_hooks,
    is_checkpointing,
    is_reentrant,
    saving_eaters,
)


LAYERS = 12
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CHOICES = {"top": (9, 10, 11), "middle": (5, 6, 7), "scattered": (3, 6, 9), "bottom": (0, 1, 2)}


def llama(layers=2, kind=LlamaForCausalLM):
    return kind(LlamaConfig(**SIZES, num_hidden_layers=layers))


def adapted(model):
    return get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", exclude_modules=["lm_head"]))


def training(**changes):
    return TrainingArguments(output_dir="out", use_cpu=True, report_to="none", **changes)


# Time


@functools.cache
def counted(active, checkpointing, hook, adapters):
    """Operations of one step of a Llama without embeddings and head, and what is predicted for it."""
    torch.manual_seed(0)
    model = llama(LAYERS, LlamaModel)
    if adapters:
        model = adapted(model)
    blocks = find_blocks(model)
    parameters = dict(model.named_parameters())
    for name in blocks.frozen:
        parameters[name].requires_grad_(False)
    for number, block in enumerate(blocks.blocks):
        for name in block.parameters:
            parameters[name].requires_grad_(number in active)
    base = model.get_base_model() if adapters else model
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    elif hook:
        base.enable_input_require_grads()
    if not hook:
        base.disable_input_require_grads()
    assert (next(input_gradient_hooks(model), None) is not None) == hook
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=torch.arange(4)[None], use_cache=False).last_hidden_state.sum().backward()
    predicted = predicted_ratio(blocks, active, checkpointing=checkpointing, input_gradients=hook)
    return counter.get_total_flops(), predicted


@pytest.mark.parametrize(
    ("choice", "checkpointing", "hook", "adapters"),
    [
        ("top", False, False, False),
        ("middle", False, False, False),
        ("scattered", False, False, False),
        ("bottom", False, False, False),
        ("top", True, False, False),
        ("scattered", True, False, False),
        ("top", True, True, False),
        ("top", False, True, False),
        ("top", False, False, True),
        ("scattered", False, False, True),
        ("top", True, False, True),
    ],
)
def test_predicted_time_is_that_of_the_counted_operations(choice, checkpointing, hook, adapters):
    active = CHOICES[choice]
    everything, _ = counted(tuple(range(LAYERS)), checkpointing, False, adapters)
    some, predicted = counted(active, checkpointing, hook, adapters)
    assert predicted == pytest.approx(some / everything, rel=0.03)
    depth = (LAYERS - min(active)) / LAYERS
    options = {"checkpointing": checkpointing, "input_gradients": hook, "adapters": adapters}
    assert time_ratio(len(active) / LAYERS, depth, **options) == pytest.approx(predicted, rel=0.005)


def test_time_of_the_known_cases():
    plain = {"checkpointing": False, "input_gradients": False, "adapters": False}
    assert time_ratio(0.25, 0.25, **plain) == 0.5
    assert time_ratio(0.25, 1.0, **plain) == 0.75
    assert time_ratio(0.25, 0.25, **{**plain, "checkpointing": True}) == pytest.approx(1.75 / 4)
    # With the hook the place of the active blocks does not matter.
    hooked = {**plain, "checkpointing": True, "input_gradients": True}
    assert time_ratio(0.25, 0.25, **hooked) == time_ratio(0.25, 1.0, **hooked) == 3.25 / 4
    adapters = {**plain, "adapters": True}
    assert time_ratio(0.25, 0.5, **adapters) == time_ratio(1.0, 0.5, **adapters) == 0.75
    assert time_ratio(0.25, 0.5, **{**adapters, "checkpointing": True}) == pytest.approx(2 / 3)


@pytest.mark.parametrize("flags", [*itertools.product([False, True], repeat=3)])
def test_time_is_one_when_all_learn_and_never_falls_as_more_does(flags):
    options = dict(zip(("checkpointing", "input_gradients", "adapters"), flags))
    assert time_ratio(1.0, 1.0, **options) == 1.0
    grid = np.linspace(0, 1, 5)
    times = np.array([[time_ratio(float(share), float(depth), **options) for depth in grid] for share in grid])
    assert (np.diff(times, axis=0) >= 0).all()
    assert (np.diff(times, axis=1) >= 0).all()
    assert (times > 0).all()


@pytest.mark.parametrize(("share", "depth"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 1.5), (0.5, float("nan"))])
def test_shares_outside_their_range_are_refused(share, depth):
    with pytest.raises(ValueError, match=r"expected a float in \[0, 1\]"):
        time_ratio(share, depth, checkpointing=False, input_gradients=False, adapters=False)


@pytest.mark.parametrize(("blocks", "active"), [(1, 1), (4, 1), (4, 4), (7, 3), (9, 2), (5, 0)])
def test_expected_depth_is_the_mean_over_all_choices(blocks, active):
    depths = [
        (blocks - min(chosen, default=blocks)) / blocks for chosen in itertools.combinations(range(blocks), active)
    ]
    assert expected_depth(blocks, active) == pytest.approx(np.mean(depths), rel=1e-12)


def test_expected_depth_of_a_quarter_of_usual_models():
    assert [round(expected_depth(n, n // 4), 3) for n in (28, 32, 80)] == [0.906, 0.917, 0.964]


@pytest.mark.parametrize(("blocks", "active"), [(0, 0), (3, 4), (3, -1)])
def test_impossible_choices_are_refused(blocks, active):
    with pytest.raises(ValueError, match="expected an integer"):
        expected_depth(blocks, active)


def hand_made(sizes=(4, 4, 4, 4), **changes):
    blocks = tuple(Block(f"m.{i}", "m", i, (f"m.{i}.w",), n, n, "L") for i, n in enumerate(sizes))
    return Blocks(**{"blocks": blocks, "always": (), "frozen": (), "adapters": False, **changes})


def test_layers_that_never_learn_cost_their_forward_pass_with_and_without_freezing():
    below = hand_made(layers=(Layer("below", 16), *(Layer(f"m.{i}", 4) for i in range(4))))
    # Forward 32, back-propagation and gradients 16 each; of the top block 4 each.
    ratio = predicted_ratio(below, [3], checkpointing=False, input_gradients=False)
    assert ratio == pytest.approx((32 + 4 + 4) / (32 + 16 + 16))


def test_blocks_of_different_sizes_count_by_their_weights():
    ratio = predicted_ratio(hand_made(sizes=(10, 2, 4)), [2], checkpointing=False, input_gradients=False)
    assert ratio == pytest.approx((16 + 4 + 4) / 48)


# Memory


def test_memory_of_plain_training_follows_the_active_share():
    memory = memory_by_kind(1000, 800, 200)
    assert memory == [
        Memory("weights", 4000, 4000),
        Memory("gradients", 3200, 800),
        Memory("optimizer state", 6400, 1600),
    ]
    half = memory_by_kind(1000, 800, 200, weight_bytes=2)
    assert [(one.everything, one.active) for one in half] == [(2000, 2000), (1600, 400), (3200, 800)]
    cut = memory_by_kind(1000, 800, 200, regime="sharded", world=4)
    assert [(one.everything, one.active) for one in cut] == [(1000, 1000), (800, 200), (1600, 400)]


def test_memory_agrees_with_the_tensors_of_a_training():
    model = llama()
    blocks = find_blocks(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in blocks.blocks[1].parameters)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    states = [
        value for state in optimizer.state.values() for name, value in state.items() if name.startswith("exp_avg")
    ]
    held = [sum(tensor.nbytes for tensor in tensors) for tensors in (model.parameters(), gradients, states)]
    memory = memory_by_kind(blocks.num_weights, blocks.num_weights, blocks.num_active([1]))
    assert [one.active for one in memory] == held


def test_partitions_of_zero_stay_whatever_is_frozen():
    memory = {one.kind: one for one in memory_by_kind(1000, 800, 200, regime="zero", weight_bytes=2)}
    per_weight = {kind: (one.everything / 800, one.active / 800) for kind, one in memory.items() if kind != "weights"}
    assert per_weight == {"gradients": (2, 2), "master copy": (4, 4), "optimizer state": (8, 2)}
    assert memory["weights"] == Memory("weights", 2000, 2000)


@pytest.mark.parametrize(
    ("stage", "everything"),
    [(1, [2000, 1600, 1600, 3200]), (2, [2000, 800, 1600, 3200]), (3, [1000, 800, 1600, 3200])],
)
def test_stages_of_zero_cut_more_and_more(stage, everything):
    memory = memory_by_kind(1000, 800, 200, regime="zero", weight_bytes=2, world=2, stage=stage)
    assert [one.everything for one in memory] == everything
    assert memory[-1].active == 800


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((10, 20, 5), {}, "counts in ascending order"),
        ((10, 10, 11), {}, "counts in ascending order"),
        ((10, 10, 5), {"regime": "fsdp"}, "expected one of plain, sharded, zero"),
        ((10, 10, 5), {"world": 0}, "at least one process"),
        ((10, 10, 5), {"regime": "zero", "stage": 4}, "a stage of 1, 2 or 3"),
    ],
)
def test_impossible_memory_is_refused(counts, options, message):
    with pytest.raises(ValueError, match=message):
        memory_by_kind(*counts, **options)


def test_table_of_memory_ends_with_the_sum():
    rows = memory_rows([Memory("weights", 3 * 2**30, 3 * 2**30), Memory("optimizer state", 2**30, 2**20)])
    assert rows[1] == ["optimizer state", "1.0 GiB", "1.0 MiB", 1 / 1024]
    assert rows[2][:3] == ["together", "4.0 GiB", "3.0 GiB"]
    assert {len(row) for row in rows} == {len(MEMORY_COLUMNS)}
    assert memory_rows([Memory("gradients", 0, 0)])[0] == ["gradients", "0 B", "0 B", None]


# What eats the saving


def eaten_by(model, args, world=1):
    return [eater.name.split()[0] for eater in saving_eaters(model, args, world)]


@pytest.fixture(autouse=True)
def _no_compile(monkeypatch):
    for name in ("BACKEND", "MODE", "USE_REGIONAL_COMPILATION"):
        # Set first, so that what a test writes there is taken back.
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")


def test_plain_training_saves_all_it_can():
    assert eaten_by(llama(), training()) == []


def test_hook_on_the_embeddings_is_told_before_and_after_it_is_put_on():
    model, args = llama(), training(activation_checkpointing=True)
    assert eaten_by(model, args) == ["The"]
    model.activation_checkpointing_enable()
    assert eaten_by(model, args) == ["The"]
    for module, key in list(input_gradient_hooks(model)):
        module._forward_hooks.pop(key)
    assert eaten_by(model, args) == []


def test_every_hook_is_found_where_transformers_takes_off_the_last_alone():
    model = llama()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    assert len(list(input_gradient_hooks(model))) == 2
    model.disable_input_require_grads()
    assert len(list(input_gradient_hooks(model))) == 1


def test_vision_models_get_no_hook():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    args = training(activation_checkpointing=True)
    assert eaten_by(model, args) == []
    model.activation_checkpointing_enable()
    assert eaten_by(model, args) == []


@pytest.mark.parametrize(
    ("options", "reentrant"),
    [
        (None, False),
        ({"use_reentrant": True}, True),
        ({"use_reentrant": False}, False),
        ({"every_n_layers": 2}, False),
        ({"preserve_rng_state": True}, True),
    ],
)
def test_kind_of_checkpointing_is_the_same_before_and_after_it_is_turned_on(options, reentrant):
    model, args = llama(), training(activation_checkpointing=True, activation_checkpointing_kwargs=options)
    assert is_checkpointing(model, args)
    assert is_reentrant(model, args) == reentrant
    rest = {key: value for key, value in (options or {}).items() if key != "every_n_layers"}
    model.activation_checkpointing_enable(rest or None)
    assert is_reentrant(model, args) == reentrant
    assert is_reentrant(model, training()) == reentrant
    assert eaten_by(model, args) == (["Reentrant"] if reentrant else ["The"])


def test_without_checkpointing_nothing_is_reentrant():
    args = training(activation_checkpointing_kwargs={"use_reentrant": True})
    assert not is_checkpointing(llama(), args)
    assert not is_reentrant(llama(), args)


@pytest.mark.parametrize(
    ("options", "world", "found"),
    [
        ({}, 1, False),
        ({}, 2, True),
        ({"ddp_find_unused_parameters": False}, 2, False),
        ({"activation_checkpointing": True}, 2, False),
        ({"activation_checkpointing": True, "ddp_find_unused_parameters": True}, 2, True),
    ],
)
def test_search_for_unused_parameters_is_told_where_ddp_does_it(options, world, found):
    assert ("`ddp_find_unused_parameters`" in eaten_by(llama(), training(**options), world)) == found


def test_ddp_looks_for_unused_parameters_of_a_peft_model_whatever_is_checkpointed():
    model = adapted(llama())
    assert "`ddp_find_unused_parameters`" in eaten_by(model, training(activation_checkpointing=True), 2)


def test_other_backends_do_not_look_for_unused_parameters():
    args = training()
    args.deepspeed_plugin = object()
    assert eaten_by(llama(), args, 2) == []


def test_compiling_the_whole_model_is_told_and_compiling_its_blocks_is_not(monkeypatch):
    args = training(torch_compile=True, torch_compile_backend="eager")
    assert eaten_by(llama(), args) == ["`torch_compile`"]
    # As `accelerate launch --dynamo_backend` says it.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert eaten_by(llama(), training()) == ["`torch_compile`"]
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")
    assert eaten_by(llama(), args) == []


def test_adapters_are_told_to_save_time_by_depth_alone():
    (eater,) = saving_eaters(adapted(llama()), training(), 1)
    assert eater.name == "Adapters"
    assert "depth alone" in eater.why
    assert "max_depth" in eater.fix


def test_models_that_are_not_of_transformers_are_looked_at_too():
    assert eaten_by(nn.Linear(2, 2), training(activation_checkpointing=True)) == []


# Words


def test_words_name_share_depth_and_time():
    (line,) = predicted_lines(hand_made(), [3], checkpointing=False, input_gradients=False)
    assert line.startswith(
        "25% of the block parameters learn, back-propagation crosses 25% of the depth: predicted 0.50"
    )
    (line,) = predicted_lines(hand_made(), [0], checkpointing=True, input_gradients=False)
    assert "crosses 100% of the depth: predicted 0.81 of the time of all blocks learning" in line
    (line,) = predicted_lines(hand_made(), [3], checkpointing=True, input_gradients=True)
    assert "crosses 100% of the depth: predicted 0.81" in line
    (line,) = predicted_lines(hand_made(adapters=True), [2, 3], checkpointing=False, input_gradients=False)
    assert "predicted 0.75 of the time of training all adapters" in line


def test_choice_that_is_not_known_yet_is_told_on_average():
    many = hand_made(sizes=(4,) * 32)
    (line,) = predicted_lines(many, 8, checkpointing=False, input_gradients=False)
    assert line.startswith("Some 8 of 32 blocks learn at a time: 25% of the block parameters, ")
    assert "crosses 92% of the depth on average: predicted 0.72" in line
    (line,) = predicted_lines(many, 8, checkpointing=False, input_gradients=False, allowed=range(16, 32))
    # Half of the depth, of which 8 of 16 cross 1 - 8 / (9 * 16).
    assert "crosses 47% of the depth on average: predicted 0.57" in line
    learns_below = hand_made(layers=tuple(Layer(f"m.{i}", 4, is_crossed=True) for i in range(4)))
    (line,) = predicted_lines(learns_below, 1, checkpointing=False, input_gradients=False)
    assert "crosses 100% of the depth" in line


def test_words_name_what_lies_outside_and_what_eats_the_saving():
    blocks = hand_made(always=("head.weight",), frozen=tuple(f"part.{i}" for i in range(8)))
    eater = Eater("A switch", "it costs time", "Turn it off.")
    lines = predicted_lines(blocks, [3], checkpointing=False, input_gradients=False, eaters=[eater])
    assert lines[1] == "Outside the blocks learn as well: head.weight."
    assert lines[2].startswith("Outside the blocks are frozen: part.0, part.1, ")
    assert lines[2].endswith(" and 2 more.")
    assert lines[3] == "A switch: it costs time. Turn it off."


def test_cost_is_shown_as_tables_and_lines(capsys):
    blocks = find_blocks(llama())
    memory = memory_by_kind(blocks.num_weights, blocks.num_weights, blocks.num_active([1]))
    show_cost(blocks, [1], checkpointing=False, input_gradients=False, memory=memory)
    shown = capsys.readouterr().out
    for text in ("model.layers", "0 to 1", "LlamaDecoderLayer", "predicted 0.67", "lm_head.weight", "optimizer state"):
        assert text in shown
