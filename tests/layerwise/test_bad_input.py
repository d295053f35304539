"""What is refused before the first step, and what freezing must get along with."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig

from hf_curriculum import (
    CGCLoraConfig,
    CurriculumConfig,
    CurriculumSFTTrainer,
    DistillationConfig,
    LayerFreezeCallback,
    LayerwiseConfig,
    MultiTaskConfig,
    MultiTaskSFTTrainer,
)
from hf_curriculum.core.checksums import parameter_checksums
from hf_curriculum.core.parameters import parameters_by_name
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.layerwise.blocks import find_blocks
from hf_curriculum.layerwise.run import LayerwiseRun


_SPEC = importlib.util.spec_from_file_location("freeze_twin", Path(__file__).with_name("freeze_twin.py"))
freeze_twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(freeze_twin)


def freezing(policy="random", **options):
    return LayerFreezeCallback(policy, **{"active_fraction": 0.45, "interval_steps": 2, **options})


@pytest.fixture
def build(tmp_path):
    def run(*callbacks, model=None, optimizers=(None, None), **args):
        args = {
            "output_dir": str(tmp_path / "run"), "max_steps": 6, "per_device_train_batch_size": 2, "use_cpu": True,
            "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2, "weight_decay": 0.1,
            "disable_tqdm": True, "logging_steps": 1, **args,
        }  # fmt: skip
        return Trainer(
            model=freeze_twin.llama() if model is None else model,
            args=TrainingArguments(**args),
            train_dataset=freeze_twin.rows(16),
            eval_dataset=freeze_twin.rows(4),
            callbacks=list(callbacks),
            optimizers=optimizers,
        )

    return run


def refused(trainer, error, match, **resume):
    """Training stops before its first step, with these words."""
    before = parameter_checksums(parameters_by_name(trainer.model))
    with pytest.raises(error, match=match):
        trainer.train(**resume)
    if not resume:
        assert trainer.state.global_step == 0
        assert parameter_checksums(parameters_by_name(trainer.model)) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"active_fraction": 0.0}, r"`active_fraction`: got 0\.0, expected a float in \(0, 1\]"),
        ({"active_fraction": 1.01}, r"`active_fraction`: got 1\.01"),
        ({"active_fraction": -0.25}, r"`active_fraction`: got -0\.25"),
        ({"active_fraction": float("nan")}, "`active_fraction`: got nan"),
        ({"max_depth": 0.0}, r"`max_depth`: got 0\.0, expected a float in \(0, 1\]"),
        ({"max_depth": 1.5}, r"`max_depth`: got 1\.5"),
        ({"interval_steps": 0}, "`interval_steps`: got 0, expected an integer >= 1"),
        ({"interval_steps": 2.5}, r"`interval_steps`: got 2\.5"),
        ({"ramp_steps": 0}, "`ramp_steps`: got 0"),
        ({"warmup_steps": 0}, "`warmup_steps`: got 0"),
        ({"smoothing": 1.0}, r"`smoothing`: got 1\.0, expected a float in \[0, 1\)"),
        ({"policy": "best"}, "`policy`: got best, expected one of adaptive"),
        ({"policy": "fixed"}, "`blocks`: got None, expected names of the blocks"),
        ({"policy": "random", "exploration": 0.5}, "`exploration`: got 0.5"),
        ({"policy": "adaptive", "order": "ascending"}, "`order`: got ascending"),
        ({"policy": "random", "blocks": ["layers.1"]}, "`blocks`: got "),
    ],
)
def test_settings_out_of_range_are_refused_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        LayerFreezeCallback(**options)


def test_a_config_beside_other_settings_is_refused():
    with pytest.raises(ValueError, match="a config beside other settings"):
        LayerFreezeCallback("random", config=LayerwiseConfig())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"active_fraction": 0.1}, r"`active_fraction`: got 0\.1, expected at least 0\.2, the share of the smallest"),
        ({"policy": "fixed", "blocks": ["layers.99"]}, r"layers\.99"),
        ({"always_train": ["head"]}, "`always_train`: got head"),
        ({"block_modules": ["model.blocks"]}, r"model\.blocks"),
        ({"policy": "adaptive", "warmup_steps": 2}, "`warmup_steps`: got 2, expected at least 3"),
        ({"max_depth": 0.1}, r"`max_depth`: got 0\.1, expected at least 0\.2"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_the_first_step(build, options, match):
    refused(build(freezing(**options)), ValueError, match)


def test_a_model_without_blocks_is_refused(build):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, input_ids, labels):
            return {"loss": self.inner(torch.ones(2)).sum()}

    refused(build(freezing(), model=Flat()), (ValueError, NotImplementedError), "block_modules")


def test_two_callbacks_on_one_model_are_refused(build):
    refused(build(freezing(), freezing("cyclic")), ValueError, "got two of `LayerFreezeCallback`")
    trainer = build(freezing())
    with pytest.raises(ValueError, match="got two of `LayerFreezeCallback`"):
        freezing().attach(trainer)


class BreaksOnce(TrainerCallback):
    broken = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.broken:
            self.broken = True
            raise KeyError("broken")


@pytest.mark.parametrize("again", ["same trainer", "same callback", "all new"])
def test_a_model_trains_as_a_whole_after_a_training_that_broke_off(build, again):
    model, callback = freeze_twin.llama(), freezing()
    trainer = build(callback, BreaksOnce(), model=model)
    with pytest.raises(KeyError, match="broken"):
        trainer.train()
    assert not all(parameter.requires_grad for parameter in model.parameters())
    if again != "same trainer":
        callback = callback if again == "same callback" else freezing()
        trainer = build(callback, model=model)
        assert all(parameter.requires_grad for parameter in model.parameters())
    watch = Watch(callback)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps == trainer.state.global_step == 6
    assert len(callback.blocks.blocks) == freeze_twin.NUM_LAYERS
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_optimizers_that_cannot_leave_parameters_alone_are_refused(build):
    model = freeze_twin.llama()
    optimizer = torch.optim.LBFGS(model.parameters())
    trainer = build(freezing(), model=model, optimizers=(optimizer, None))
    refused(trainer, NotImplementedError, "Freezing with LBFGS")


def test_an_optimizer_that_was_built_while_blocks_were_frozen_is_refused(build):
    model = freeze_twin.llama()
    model.model.layers[1].requires_grad_(False)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.model.layers[1].requires_grad_(True)
    trainer = build(freezing(), model=model, optimizers=(optimizer, None))
    refused(trainer, ValueError, r"AdamW without 9 of 45 parameters.*while nothing is frozen")


def test_fsdp1_is_refused():
    class FlatShards(FullyShardedDataParallel):
        """FSDP1 needs an accelerator: only its type is looked at."""

        __init__ = nn.Module.__init__

    with pytest.raises(NotImplementedError, match=r"FSDP1.*Use FSDP2"):
        find_blocks(nn.Sequential(FlatShards()))


def test_checkpoints_within_a_step_are_refused_where_they_lack_frozen_adapters(build, monkeypatch):
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("hf_curriculum.layerwise.backend.AcceleratorState", lambda: state)
    trainer = build(freezing(), model=freeze_twin.llama(lora=True), enable_jit_checkpoint=True)
    refused(trainer, NotImplementedError, "adapters with `enable_jit_checkpoint` under FSDP.*`save_steps` instead")


@pytest.mark.parametrize(
    ("config", "scheduler", "match"),
    [
        ({"optimizer": {"type": "AdamW"}}, None, "optimizer from the DeepSpeed configuration.*Remove its `optimizer`"),
        ({}, object(), "scheduler that was made beside the trainer.*lr_scheduler_type"),
    ],
)
def test_what_cannot_be_grouped_under_deepspeed_is_refused(build, config, scheduler, match):
    trainer = build()
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(deepspeed_config=config)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer.lr_scheduler = scheduler
    with pytest.raises(NotImplementedError, match=match):
        freezing().attach(trainer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"interval_steps": 3}, "interval_steps"),
        ({"policy": "cyclic"}, "policy"),
        ({"active_fraction": 0.6}, "active_fraction"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(build, options, match):
    build(freezing(), save_strategy="steps", save_steps=3).train()
    refused(build(freezing(**options)), ValueError, match, resume_from_checkpoint=True)


def test_the_state_of_another_model_is_refused(build):
    callback = freezing()
    build(callback).train()
    state = callback.run.state()
    model = freeze_twin.llama(lora=True)
    blocks = find_blocks(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    run = LayerwiseRun(callback.config, model, blocks, optimizer, seed=42, max_steps=6)
    with pytest.raises(ValueError, match="the same model and `LayerwiseConfig`"):
        run.restore(state)


def test_a_checkpoint_without_its_reference_is_refused(build, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    build(freezing("adaptive", warmup_steps=3), **options).train()
    (tmp_path / "run" / "checkpoint-6" / "layerwise_reference.safetensors").unlink()
    trainer = build(freezing("adaptive", warmup_steps=3), **options)
    refused(trainer, ValueError, r"layerwise_reference\.safetensors is not in", resume_from_checkpoint=True)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_requires_a_gradient_is_restored_at_the_end(build, lora):
    model = freeze_twin.llama(lora)
    if not lora:
        model.model.layers[0].mlp.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not all(wanted.values())
    trainer = build(freezing(), model=model)
    trainer.train()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted


def test_the_best_model_is_loaded_at_the_end_and_evaluation_changes_nothing(build):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    quiet, evaluated = build(freezing()), build(freezing(), load_best_model_at_end=True, **settings, learning_rate=0.5)
    evaluated.train()
    losses = [entry["eval_loss"] for entry in evaluated.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6
    assert evaluated.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert all(parameter.requires_grad for parameter in evaluated.model.parameters())
    quiet.train()
    settings["save_strategy"] = "no"
    again = build(freezing(), **settings)
    again.train()
    for (name, one), (_, other) in zip(quiet.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(one, other), name


class Watch(TrainerCallback):
    """After every step what is frozen stood still, and what is active moved."""

    def __init__(self, callback):
        self.callback = callback
        self.steps = 0
        self.windows = set()

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.before = parameter_checksums(parameters_by_name(model))

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model, **kwargs):
        after = parameter_checksums(parameters_by_name(model))
        moved = {name for name in after if after[name] != self.before[name]}
        self.before = after
        blocks, active = self.callback.blocks, self.callback.run.window.active
        assert moved <= {name for number in active for name in blocks.blocks[number].parameters} | set(blocks.always)
        for number in active if self.rate > 0 else ():
            assert moved & set(blocks.blocks[number].parameters)
        self.steps += 1
        self.windows.add(active)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_autocast_in_bfloat16_keeps_frozen_blocks_bit_equal(build, checkpointing):
    callback = freezing("adaptive", warmup_steps=3)
    watch = Watch(callback)
    trainer = build(callback, watch, bf16=True, activation_checkpointing=checkpointing, max_steps=10)
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    assert watch.steps == 10
    assert len(watch.windows) > 2
    state = callback.run.optimizer.optimizer.state
    assert {value.dtype for values in state.values() for value in values.values()} == {torch.float32}


def test_blocks_that_are_compiled_one_by_one_learn_the_same(build):
    values, graphs = [], []
    for compiled in (False, True):
        model = freeze_twin.llama()
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        callback = freezing()
        watch = Watch(callback)
        build(callback, watch, model=model, max_steps=16).train()
        assert len(watch.windows) > 4
        values.append(dict(model.named_parameters()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not [name for name in values[1] if name not in values[0]]
    assert freeze_twin.largest_difference(values[1], values[0]) < 1e-4
    # Not one for each set of active blocks: after 8 of the same code the compiler gives up.
    assert 1 <= graphs[1] <= 8


def small_settings(tmp_path):
    return SFTConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-2, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip


class TeacherBits(TrainerCallback):
    """The teacher's values after every step, by the stage that they teach in."""

    trainer = None

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        teacher = self.trainer._keeper.teacher
        if teacher is not None:
            self.seen.append((self.trainer._stage_index(), teacher.snapshot.state()))


def test_a_teacher_holds_the_blocks_that_wake_up_later(tmp_path):
    tokenizer = build_tokenizer()
    callback, bits = freezing("cyclic", interval_steps=2, active_fraction=0.5), TeacherBits()
    watch = Watch(callback)
    trainer = CurriculumSFTTrainer(
        model=build_model(tokenizer),
        args=small_settings(tmp_path),
        train_dataset=generate_corpus(48, seed=0),
        processing_class=tokenizer,
        curriculum=CurriculumConfig(scorer="length", num_levels=2, use_cache=False),
        distillation=DistillationConfig(teacher="previous_stage", alpha=0.5),
        callbacks=[callback, watch, bits],
    )
    bits.trainer = trainer
    trainer.train()
    learning = {name for block in callback.blocks.blocks for name in block.parameters}
    assert len(watch.windows) > 1
    assert len(bits.seen) > 2
    stage, first = bits.seen[0]
    assert learning <= first.keys()
    for later, values in bits.seen[1:]:
        if later == stage:
            assert all(torch.equal(values[name], first[name]) for name in first)
    live = parameters_by_name(trainer.model)
    for block in callback.blocks.blocks:
        assert any(not torch.equal(live[name], first[name]) for name in block.parameters), block.name


def test_the_blocks_of_cgc_lora_freeze(tmp_path):
    tokenizer = build_tokenizer()
    rows = generate_corpus(32, seed=0)
    rows = rows.add_column("task", ["left", "right"] * 16)
    callback = freezing("adaptive", warmup_steps=2, active_fraction=0.5)
    watch = Watch(callback)
    trainer = MultiTaskSFTTrainer(
        model=build_model(tokenizer),
        args=small_settings(tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=CGCLoraConfig(
            task_names=["left", "right"], r=2, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        multitask=MultiTaskConfig(),
        callbacks=[callback, watch],
    )
    trainer.train()
    assert watch.steps == trainer.state.global_step > 4
    assert callback.blocks.adapters
    assert any("cgc_lora_experts" in name for name in callback.blocks.blocks[0].parameters)
    assert len(watch.windows) > 1
