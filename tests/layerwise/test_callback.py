"""The callback in one process: what learns, what stands still, and how it goes on."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_curriculum.core.parameters import parameters_by_name
from hf_curriculum.core.records import RunRecord
from hf_curriculum.layerwise.callback import REFERENCE_NAME, LayerFreezeCallback
from hf_curriculum.layerwise.rankings import RandomPolicy


_SPEC = importlib.util.spec_from_file_location("freeze_twin", Path(__file__).with_name("freeze_twin.py"))
freeze_twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(freeze_twin)

NUM_LAYERS = 6


def llama(lora=False):
    return freeze_twin.llama(lora, NUM_LAYERS)


class ActiveSets(TrainerCallback):
    """What required a gradient in each step, by name."""

    def __init__(self):
        self.learning = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.learning.append({name for name, p in model.named_parameters() if p.requires_grad})


@pytest.fixture
def build(tmp_path):
    def run(callback, model=None, data=None, callbacks=(), **args):
        args = {
            "output_dir": str(tmp_path / "run"), "max_steps": 24, "per_device_train_batch_size": 4, "use_cpu": True,
            "report_to": "none", "save_strategy": "no", "learning_rate": freeze_twin.LEARNING_RATE,
            "weight_decay": freeze_twin.WEIGHT_DECAY, "adam_epsilon": freeze_twin.EPSILON,
            "lr_scheduler_type": "linear", "warmup_steps": freeze_twin.WARMUP, "logging_steps": 1,
            "disable_tqdm": True, "train_sampling_strategy": "sequential", **args,
        }  # fmt: skip
        return Trainer(
            model=llama() if model is None else model,
            args=TrainingArguments(**args),
            train_dataset=freeze_twin.rows() if data is None else data,
            callbacks=[callback, *callbacks],
        )

    return run


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("options", "args"),
    [
        ({"policy": "adaptive", "warmup_steps": 6}, {}),
        ({"policy": "random"}, {"gradient_accumulation_steps": 2, "max_steps": 12}),
        ({"policy": "cyclic", "ramp_steps": 1}, {"gradient_checkpointing": True}),
        ({"policy": "gradient"}, {}),
        (
            {"policy": "last_n"},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ),
    ],
    ids=["adaptive", "random", "cyclic", "gradient", "last_n"],
)
def test_training_equals_adamw_of_each_parameter_alone(build, lora, options, args):
    options = {"active_fraction": 0.35, "interval_steps": 4, "ramp_steps": 3, **options}
    callback, seen = LayerFreezeCallback(**options), ActiveSets()
    model = llama(lora)
    if lora:
        model.enable_input_require_grads()
    trainer = build(callback, model, callbacks=[seen], **args)
    trainer.train()
    num_steps = trainer.state.global_step
    windows = freeze_twin.windows_of(callback, trainer.args.output_dir, num_steps)
    if options["policy"] != "gradient":
        for step, names in enumerate(seen.learning):
            assert names == next(active for first, end, active in windows if first <= step < end)
    accumulation = trainer.args.gradient_accumulation_steps
    expected = freeze_twin.twin(
        llama(lora), windows, num_steps, 4, accumulation=accumulation, ramp=options["ramp_steps"]
    )  # fmt: skip
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert len(windows) == 1 or len({frozenset(active) for _, _, active in windows}) > 1


def test_blocks_on_a_ramp_get_one_group_for_each_of_the_optimizer(build):
    """A parameter in a group of its own would be stepped on its own: slow kernels, many launches."""
    found = {}

    class Groups(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            self.whole = [(group, list(group["params"])) for group in optimizer.param_groups]
            optimizer.optimizer.register_step_pre_hook(self.look)

        def look(self, optimizer, args, kwargs):
            found[trainer.state.global_step] = [
                (group["lr"], len(group["params"])) for group in optimizer.param_groups
            ]

        def on_step_end(self, args, state, control, optimizer, **kwargs):
            assert [group["params"] for group in optimizer.param_groups] == [params for _, params in self.whole]
            assert all(group is before for group, (before, _) in zip(optimizer.param_groups, self.whole))

    callback = LayerFreezeCallback(policy="cyclic", active_fraction=0.35, interval_steps=4, ramp_steps=2)
    trainer = build(callback, callbacks=[Groups()])
    trainer.train()
    rates = {step: groups[0][0] for step, groups in found.items()}
    # Matrices, and norms without weight decay; two layers at a time, of 7 and 2 of them.
    assert [round(rate / rates[4], 6) for rate, _ in found[4]] == [1.0, 1.0, 0.5, 0.5]
    assert [count for _, count in found[4]][2:] == [14, 4]
    assert len(found[5]) == 2


def test_between_steps_adapters_of_frozen_blocks_are_marked_as_learning(build):
    """DeepSpeed and FSDP2 save what requires a gradient when a checkpoint is written."""

    class Marks(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            marked.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})

    seen, marked = ActiveSets(), []
    callback = LayerFreezeCallback(policy="cyclic", active_fraction=0.35, interval_steps=3)
    trainer = build(callback, llama(lora=True), callbacks=[seen, Marks()], save_strategy="steps", save_steps=5)
    trainer.train()
    adapters = {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    assert len(marked) == 5
    assert all(names == adapters for names in marked)
    assert all(3 * len(names) == len(adapters) for names in seen.learning)


def test_requires_grad_and_hooks_are_as_before_when_training_has_ended(build):
    model = llama(lora=True)
    model.enable_input_require_grads()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    embeddings = model.get_input_embeddings()
    hooks = dict(embeddings._forward_hooks)
    assert hooks

    class Hooks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            assert not embeddings._forward_hooks

    build(LayerFreezeCallback(policy="random", interval_steps=3), model, callbacks=[Hooks()]).train()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert dict(embeddings._forward_hooks) == hooks


def test_optimizer_state_is_the_active_share(build):
    held = []

    class State(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held.append(callback.run.optimizer.state_bytes())

    callback = LayerFreezeCallback(policy="cyclic", active_fraction=0.5, interval_steps=3)
    trainer = build(callback, callbacks=[State()])
    trainer.train()
    assert set(held) == {2 * 4 * callback.blocks.num_parameters // 2}
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_every_block_is_measured_in_the_warm_up_and_then_the_policy_decides(build):
    callback = LayerFreezeCallback(policy="adaptive", active_fraction=0.35, interval_steps=4, warmup_steps=7)
    trainer = build(callback)
    trainer.train()
    lines = RunRecord(trainer.args.output_dir).read("layers")
    assert [line["turn"] for line in lines] == [0, 1, 2, *[None] * 5]
    assert [line["first_step"] for line in lines] == [0, 2, 4, 7, 11, 15, 19, 23]
    assert sorted(number for line in lines[:3] for number in line["active"]) == list(range(NUM_LAYERS))
    assert all(len(line["active"]) == 2 for line in lines)
    assert all(score is not None for score in lines[3]["scores"].values())
    assert [line["step"] for line in lines] == [line["first_step"] + 1 for line in lines]


def test_without_a_choice_the_warm_up_takes_a_fifth_of_the_run_at_most(build):
    callback = LayerFreezeCallback(active_fraction=0.35, interval_steps=4)
    build(callback, max_steps=30).train()
    assert callback.run.warmup_steps == 6


def test_logs_say_what_learns_and_the_history_has_it(build):
    callback = LayerFreezeCallback(policy="adaptive", active_fraction=0.35, interval_steps=4, warmup_steps=3)
    trainer = build(callback)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["active_blocks"] == 2 for entry in logs)
    assert all(entry["active_fraction"] == pytest.approx(1 / 3) for entry in logs)
    assert all(0 < entry["backward_depth"] <= 1 for entry in logs)
    rates = [name for entry in logs for name in entry if name.startswith("change_rate/")]
    assert set(rates) == {f"change_rate/model.layers.{number}" for number in range(NUM_LAYERS)}
    json.dumps(trainer.state.log_history)


def test_rates_do_not_depend_on_the_learning_rate_of_the_time(build):
    """Under Adam a step is as long as its learning rate, so that a raw rate follows the schedule."""
    found = {}
    for normalize in (True, False):
        callback = LayerFreezeCallback(
            active_fraction=0.35, interval_steps=4, warmup_steps=6, normalize_rates=normalize, ramp_steps=1
        )  # fmt: skip
        trainer = build(callback, lr_scheduler_type="linear", warmup_steps=0)
        trainer.train()
        lines = RunRecord(trainer.args.output_dir).read("layers")
        found[normalize] = [np.mean(list(line["rates"].values())) for line in lines if line["rates"]]
    fall = {normalize: values[-1] / values[0] for normalize, values in found.items()}
    assert fall[False] < 0.5 * fall[True]


def test_a_cap_on_the_depth_keeps_the_blocks_below_frozen(build):
    callback = LayerFreezeCallback(policy="random", active_fraction=0.2, interval_steps=2, max_depth=0.5)
    trainer = build(callback)
    trainer.train()
    assert {number for decision in callback.run.decisions for number in decision} == {3, 4, 5}


def test_a_policy_of_ones_own_is_asked(build):
    class Lowest:
        signal = None

        def rank(self, history, budget, generator):
            return [0]

    callback = LayerFreezeCallback(policy=Lowest(), active_fraction=0.2, interval_steps=10)
    build(callback).train()
    assert set(callback.run.decisions) == {(0,)}


def test_fixed_blocks_by_name_and_parts_outside(build):
    callback = LayerFreezeCallback(
        policy="fixed", blocks=["layers.1", "layers.4"], active_fraction=0.34, always_train=["norm"]
    )  # fmt: skip
    model = llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    build(callback, model).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[2] for name in moved if "layers" in name} == {"1", "4"}
    assert {name for name in moved if "layers" not in name} == {"model.norm.weight"}


def test_a_task_head_learns_beside_the_blocks(build):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=freeze_twin.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    data = [{"input_ids": row["input_ids"], "labels": int(row["input_ids"][0]) % 2} for row in freeze_twin.rows()]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback = LayerFreezeCallback(policy="random", interval_steps=4)
    build(callback, model, data).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"classifier.weight", "classifier.bias"} <= moved
    assert not any("embeddings" in name or "pooler" in name for name in moved)


def test_weights_that_are_not_finite_end_the_run_with_the_block_named(build):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.layers[5].mlp.up_proj.weight.fill_(math.nan)

    callback = LayerFreezeCallback(active_fraction=0.35, warmup_steps=6, verify=False)
    with pytest.raises(ValueError, match=r"rates\[5\].*not finite"):
        build(callback, callbacks=[Poison()]).train()


def test_what_moves_a_frozen_block_is_caught(build):
    class Meddler(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(1e-3)

    with pytest.raises(RuntimeError, match=r"frozen parameters moved.*layers\.0\.mlp\.up_proj"):
        build(LayerFreezeCallback(policy="last_n"), callbacks=[Meddler()]).train()


def test_blocks_that_stand_still_are_caught(build, monkeypatch):
    monkeypatch.setattr("hf_curriculum.layerwise.check.PATIENCE", 3)

    class NoGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for parameter in model.model.layers[5].parameters():
                parameter.grad = None

    with pytest.raises(RuntimeError, match=r"did not move in 3 steps: model\.layers\.5"):
        build(LayerFreezeCallback(policy="last_n", active_fraction=0.35), callbacks=[NoGradient()]).train()


def test_a_policy_object_is_told_by_its_repr():
    assert LayerFreezeCallback(policy=RandomPolicy()).config.to_dict()["policy"] == "RandomPolicy()"


def test_sgd_with_momentum_keeps_frozen_blocks_in_place(build):
    callback = LayerFreezeCallback(policy="cyclic", interval_steps=2)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    seen = []

    class Moved(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            self.before = {name: p.detach().clone() for name, p in parameters_by_name(model).items()}

        def on_step_end(self, args, state, control, model, **kwargs):
            moved = {name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])}
            active = {name for n in callback.run.window.active for name in callback.blocks.blocks[n].parameters}
            seen.append((moved, active))

    trainer = build(callback, model, callbacks=[Moved()], warmup_steps=0)
    trainer.optimizer = optimizer
    trainer.train()
    assert len(seen) == 24
    assert all(moved == active for moved, active in seen[:-1])  # the last step's learning rate is not above 0


def test_a_checkpoint_of_a_plain_trainer_goes_on_exactly(build, tmp_path):
    def callback():
        return LayerFreezeCallback(active_fraction=0.35, interval_steps=5, warmup_steps=12, ramp_steps=3)

    whole = build(callback(), save_strategy="steps", save_steps=16)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-16"
    assert (checkpoint / REFERENCE_NAME).is_file()
    expected = {name: parameter.detach().clone() for name, parameter in whole.model.named_parameters()}
    lines = RunRecord(tmp_path / "run").read("layers")
    again = build(callback(), save_strategy="steps", save_steps=16)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert RunRecord(tmp_path / "run").read("layers") == lines
    (checkpoint / REFERENCE_NAME).unlink()
    with pytest.raises(ValueError, match=f"a checkpoint whose {REFERENCE_NAME} is not in"):
        build(callback()).train(resume_from_checkpoint=str(checkpoint))


def test_rates_are_of_as_many_steps_at_the_same_age_of_the_optimizer_state(build):
    ages = {}

    class Ages(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if callback.run.is_measuring:
                before = previous.get(callback.run.window.first_step, ())
                assert not set(callback.run._newcomers) & set(before)
                first = callback.run.window.first_step
                ages.setdefault(first, []).append(state.global_step - first)

        def on_step_end(self, args, state, control, **kwargs):
            previous[state.global_step] = callback.run.window.active

    previous = {}
    callback = LayerFreezeCallback(active_fraction=0.35, interval_steps=8, warmup_steps=12)
    trainer = build(callback, callbacks=[Ages()], max_steps=36)
    trainer.train()
    assert set(map(tuple, ages.values())) == {(2, 3)}
    lines = RunRecord(trainer.args.output_dir).read("layers")
    for before, line, after in zip([{"active": []}, *lines], lines, lines[1:]):
        names = {line["blocks"][number] for number in set(line["active"]) - set(before["active"])}
        assert set(after["rates"]) == names


def test_a_longer_run_goes_on_with_the_warm_up_of_its_checkpoint(build, tmp_path):
    def callback():
        return LayerFreezeCallback(active_fraction=0.35, interval_steps=9)

    first = callback()
    build(first, save_strategy="steps", save_steps=10, max_steps=30).train()
    second = callback()
    build(second, max_steps=60).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert (first.run.warmup_steps, second.run.warmup_steps) == (6, 6)
    assert first.run._measured_until == second.run._measured_until == 2
