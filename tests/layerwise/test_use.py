"""Layer freezing as users meet it: interrupted, beside other runs, with policies and optimizers of their own."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, OFTConfig, get_peft_model
from transformers import Adafactor, Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import AdafactorSchedule
from trl import SFTConfig

from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer, LayerFreezeCallback
from hf_curriculum.core.records import RunRecord
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.layerwise.blocks import find_blocks
from hf_curriculum.layerwise.config import LayerwiseConfig
from hf_curriculum.layerwise.policies import make_policy
from hf_curriculum.layerwise.report import read_layers


_SPEC = importlib.util.spec_from_file_location("freeze_twin", Path(__file__).with_name("freeze_twin.py"))
freeze_twin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(freeze_twin)

SETTINGS = {
    "max_steps": 6, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no",
    "learning_rate": 1e-2, "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def freezing(policy="random", **options):
    return LayerFreezeCallback(policy, **{"active_fraction": 0.45, "interval_steps": 2, **options})


def trainer_of(folder, *callbacks, model=None, optimizers=(None, None), **args):
    return Trainer(
        model=freeze_twin.llama() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**SETTINGS, **args}),
        train_dataset=freeze_twin.rows(16),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def frozen(model):
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def test_a_model_is_released_after_a_training_that_broke_off(tmp_path):
    callback = freezing()
    trainer = trainer_of(tmp_path, callback, Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert frozen(trainer.model)
    callback.release()
    assert not frozen(trainer.model)
    callback.release()  # nothing is left to do


@pytest.mark.parametrize("add", ["attach", "add_callback"])
def test_a_trainer_after_one_that_broke_off_has_every_parameter(tmp_path, add):
    first = trainer_of(tmp_path, freezing(), Interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second, callback = trainer_of(tmp_path, model=first.model), freezing()
    if add == "attach":
        callback.attach(second)
        second.train()
        assert not frozen(second.model)
        return
    second.add_callback(callback)
    with pytest.raises(ValueError, match=r"broke off, call its `release\(\)` first"):
        second.train()


def test_our_trainers_release_the_model_when_they_break_off(tmp_path):
    tokenizer = build_tokenizer()
    trainer = CurriculumSFTTrainer(
        model=build_model(tokenizer),
        args=SFTConfig(output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False, **SETTINGS),
        train_dataset=generate_corpus(24),
        processing_class=tokenizer,
        curriculum=CurriculumConfig(scorer="length", num_levels=1, use_cache=False),
        callbacks=[freezing(), Interrupt()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not frozen(trainer.model)


def test_the_record_of_an_earlier_run_in_the_folder_does_not_count(tmp_path):
    record = RunRecord(tmp_path)
    record.start("an earlier run of a trainer of ours")
    record.append("stage_end", 500)
    for policy in ("cyclic", "random"):
        trainer_of(tmp_path, freezing(policy)).train()
        layers = read_layers(tmp_path)
        assert layers.policy == policy
        assert layers.bounds.tolist() == [0, 2, 4, 6]
        assert layers.num_steps == 6


def test_a_record_that_mixes_runs_is_refused(tmp_path):
    trainer_of(tmp_path, freezing()).train()
    lines = RunRecord(tmp_path).read("layers")
    for line in lines:
        RunRecord(tmp_path).append("layers", line.pop("step"), **{k: v for k, v in line.items() if k != "event"})
    with pytest.raises(ValueError, match="whose record mixes several runs"):
        read_layers(tmp_path)


class MyPolicy:
    """Of a user, without a `repr`."""

    signal = "gradient_norm"

    def rank(self, history, budget, generator):
        return list(range(len(history.sizes)))[::-1]


def test_a_policy_object_resumes_by_its_class(tmp_path):
    assert LayerwiseConfig(policy=MyPolicy()).to_dict()["policy"].endswith("test_use.MyPolicy")
    trainer_of(tmp_path, freezing(MyPolicy()), save_strategy="steps", save_steps=3).train()
    resumed = trainer_of(tmp_path, freezing(MyPolicy()))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert read_layers(tmp_path).picture()["label"] == "share of the gradient norm"


def test_an_unknown_signal_is_refused():
    policy = MyPolicy()
    policy.signal = "change_rates"
    with pytest.raises(ValueError, match="signal of MyPolicy`: got change_rates, expected change_rate, gradient_norm"):
        make_policy(policy)


def with_adapter(config):
    torch.manual_seed(0)
    return get_peft_model(freeze_twin.llama(), config)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4),
        AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=20, tinit=2, tfinal=5),
    ],
    ids=["oft", "adalora"],
)
def test_adapters_that_start_at_zero_are_measured(tmp_path, config, normalize):
    callback = freezing("adaptive", interval_steps=1, normalize_rates=normalize)
    trainer_of(tmp_path, callback, model=with_adapter(config), max_steps=10).train()
    assert np.isfinite(callback.run.scores.scores).all()


def test_an_optimizer_that_sets_its_own_learning_rate_is_refused(tmp_path):
    model = freeze_twin.llama()
    optimizer = Adafactor(model.parameters(), scale_parameter=True, relative_step=True, warmup_init=True, lr=None)
    trainer = trainer_of(tmp_path, freezing(), model=model, optimizers=(optimizer, AdafactorSchedule(optimizer)))
    with pytest.raises(NotImplementedError, match=r"Adafactor\(relative_step=True\)"):
        trainer.train()


def test_numbers_of_blocks_may_be_texts():
    blocks = find_blocks(freeze_twin.llama())
    assert blocks.resolve(["-1", "0"]) == (len(blocks.blocks) - 1, 0)
    with pytest.raises(ValueError, match="a number in"):
        blocks.resolve(["99"])


@pytest.mark.parametrize("name", ["active_fraction", "max_depth", "smoothing"])
def test_shares_that_are_texts_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`: got '0.25', expected a float"):
        LayerwiseConfig(**{name: "0.25"})
