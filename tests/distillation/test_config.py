"""What a distillation is refused for, with its message, before anything is computed."""

import importlib.util
import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hf_curriculum import DistillationConfig
from hf_curriculum.curriculum import mixin as curriculum_mixin
from hf_curriculum.distillation.checks import check_arguments
from hf_curriculum.trainers import CurriculumSFTTrainer, KDSFTTrainer, KDTrainer


_spec = importlib.util.spec_from_file_location("distillation_twin", Path(__file__).with_name("distillation_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": 0.0}, r"`temperature`: got 0.0, expected a float > 0"),
        ({"temperature": -1.0}, r"`temperature`"),
        ({"temperature": float("inf")}, r"`temperature`"),
        ({"temperature": float("nan")}, r"`temperature`"),
        ({"temperature": [1.0, 0.0]}, r"`temperature`.*a float > 0 for each stage"),
        ({"alpha": 1.01}, r"`alpha`: got 1.01, expected a float in \[0, 1\]"),
        ({"alpha": -0.1}, r"`alpha`"),
        ({"alpha": float("nan")}, r"`alpha`"),
        ({"alpha": [0.0, 2.0]}, r"`alpha`.*for each stage"),
        ({"alpha": []}, r"`alpha`: got \[\], expected one value, or one per stage"),
        ({"alpha": True}, r"`alpha`"),
        ({"alpha": "half"}, r"`alpha`"),
        ({"divergence": "kl"}, r"`divergence`: got kl, expected one of forward_kl, reverse_kl, jsd"),
        ({"teacher_cache": "topk"}, r"`teacher_cache`: got topk, expected one of none, top_k"),
        ({"distill_on": "replayed"}, r"`distill_on`: got replayed, expected one of all, current, replay"),
        ({"teacher": ""}, r"`teacher`"),
        ({"teacher": None}, r"`teacher`: got None"),
        ({"teacher": torch.nn.Linear(2, 2)}, r"`teacher`.*a `PreTrainedModel`"),
        ({"beta": 0.5}, r"`beta`: got 0.5, expected None: only `divergence='jsd'` reads it"),
        ({"beta": 1.5, "divergence": "jsd"}, r"`beta`: got 1.5, expected a float in \[0, 1\]"),
        ({"ema_decay": 0.9}, r"`ema_decay`.*only `teacher='ema'` reads it"),
        ({"ema_decay": 1.0, "teacher": "ema"}, r"`ema_decay`: got 1.0, expected a float in \(0, 1\)"),
        ({"cache_top_k": 8}, r"`cache_top_k`.*only `teacher_cache='top_k'` reads it"),
        ({"cache_top_k": 0, "teacher_cache": "top_k"}, r"`cache_top_k`: got 0, expected an integer >= 1"),
        ({"offload_teacher": True}, r"`offload_teacher`.*`teacher='previous_stage'`, which is not a model of its own"),
        ({"offload_teacher": True, "teacher": "ema"}, r"`offload_teacher`"),
        ({"teacher": "ema", "teacher_cache": "top_k"}, r"`teacher_cache`.*which moves at every step"),
    ],
)
def test_values_out_of_range_and_values_that_do_nothing(config, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**config)


def test_values_of_a_command_line():
    config = DistillationConfig(alpha=[0.3], temperature=[2.0])
    assert (config.alpha, config.temperature) == (0.3, 2.0)
    assert DistillationConfig(alpha=(0.0, 0.5)).alpha_in(1) == 0.5
    assert DistillationConfig(temperature=[1.0, 4.0]).temperature_in(1) == 4.0
    assert not DistillationConfig(teacher="none", alpha=0.2, beta=0.1).enabled
    assert DistillationConfig(teacher="./base").names_model


def sft(tmp_path, distillation, model=None, cls=KDSFTTrainer, **kwargs):
    return twin.sft_trainer(cls, tmp_path, model or twin.llama(), distillation, **kwargs)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("cls", [KDSFTTrainer, CurriculumSFTTrainer])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "Distillation with `label_smoothing_factor`"),
        ({"loss_type": "dft"}, "Distillation with `loss_type='dft'`"),
        ({"compute_loss_func": lambda *_, **__: None}, "Distillation with `compute_loss_func`"),
    ],
)
def test_losses_that_do_not_go_together(tmp_path, cls, kwargs, message):
    with pytest.raises(NotImplementedError, match=message):
        sft(tmp_path, {"teacher": "base"}, cls=cls, **kwargs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"torch_compile": True}, "Distillation with `torch_compile`"),
        ({"use_liger_kernel": True}, "Distillation with Liger's fused cross-entropy"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "Distillation with Liger's fused cross-entropy",
        ),
        ({"hub_strategy": "checkpoint", "push_to_hub": True}, "Distillation with `hub_strategy='checkpoint'`"),
        ({"hub_strategy": "all_checkpoints", "push_to_hub": True}, "`hub_strategy='all_checkpoints'`"),
    ],
    ids=str,
)
def test_ways_of_running_that_do_not_go_together(tmp_path, changed, message):
    # Set afterwards: each of them asks for a library, a login or an environment when the arguments are built.
    arguments = twin.sft_arguments(tmp_path)
    check_arguments(arguments, None)
    for name, value in changed.items():
        setattr(arguments, name, value)
    with pytest.raises(NotImplementedError, match=message):
        check_arguments(arguments, None)


def test_liger_s_other_kernels_and_other_hub_strategies_are_fine(tmp_path):
    arguments = twin.sft_arguments(tmp_path)
    arguments.use_liger_kernel, arguments.liger_kernel_config = True, {"fused_linear_cross_entropy": False}
    arguments.push_to_hub = True
    check_arguments(arguments, None)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (
            lambda: get_peft_model(twin.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            {},
            "PROMPT_TUNING",
        ),
        (
            lambda: get_peft_model(
                twin.llama(), AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10)
            ),
            {"teacher": "ema"},
            "snapshot with the PEFT method ADALORA",
        ),
    ],
    ids=["prompt", "adalora"],
)
def test_peft_methods_that_a_teacher_cannot_follow(tmp_path, model, config, message):
    with pytest.raises(NotImplementedError, match=message):
        sft(tmp_path, {"teacher": "base", **config}, model())


@pytest.mark.parametrize("cls", [KDSFTTrainer, KDTrainer])
def test_a_teacher_is_required(tmp_path, cls):
    with pytest.raises(ValueError, match="`distillation`: got None, expected a `DistillationConfig` with a teacher"):
        cls(model=twin.llama(), args=twin.sft_arguments(tmp_path), train_dataset=twin.generate_corpus(4))
    with pytest.raises(ValueError, match=r"`distillation`.*expected a `DistillationConfig`"):
        cls(model=twin.llama(), args=twin.sft_arguments(tmp_path), distillation={"teacher": "base"})


@pytest.mark.parametrize(
    ("config", "curriculum", "message"),
    [
        ({"teacher": "previous_stage"}, None, "previous_stage in a run with no stages"),
        ({"teacher": "base", "alpha": [0.5, 0.5]}, None, "`alpha`"),
        ({"teacher": "base", "distill_on": "replay"}, None, "all in a run that replays no rows"),
        ({"teacher": "previous_stage"}, {"num_levels": 1}, "previous_stage in a run with 1 stage,"),
        ({"alpha": [0.0, 0.5, 0.5]}, {}, "`alpha`.*one value, or 2: one for each stage"),
        ({"temperature": [1.0, 2.0, 3.0]}, {}, "`temperature`"),
        ({"alpha": [0.5, 0.5]}, {}, "`alpha`.*0 for the first stage, which has no previous one"),
        ({"distill_on": "replay"}, {}, "`distill_on`.*replays no rows"),
        ({"distill_on": "current"}, {}, "`distill_on`.*replays no rows"),
        ({"teacher": "base", "distill_on": "current"}, {}, "`distill_on`.*replays no rows"),
    ],
)
def test_configs_that_do_not_fit_the_stages_are_refused_before_scoring(
    tmp_path, monkeypatch, config, curriculum, message
):
    def measure(*args, **kwargs):
        raise AssertionError("scored")

    monkeypatch.setattr(curriculum_mixin, "measure_difficulty", measure)
    cls = KDSFTTrainer if curriculum is None else CurriculumSFTTrainer
    given = None if curriculum is None else {"scorer": "loss", **curriculum}
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, config, cls=cls, curriculum=given, max_steps=-1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("config", "model", "kwargs", "message"),
    [
        ({"teacher": "base"}, twin.llama, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"teacher": "other"}, twin.llama, {}, "`teacher`"),
    ],
)
def test_what_scores_cannot_change_is_refused_before_scoring(tmp_path, monkeypatch, config, model, kwargs, message):
    def measure(*args, **kwargs):
        raise AssertionError("scored")

    monkeypatch.setattr(curriculum_mixin, "measure_difficulty", measure)
    if config["teacher"] == "other":
        config = {"teacher": twin.llama(vocabulary=700)}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        sft(tmp_path, config, model(), CurriculumSFTTrainer, curriculum={"scorer": "loss"}, **kwargs)


def shuffled_tokenizer():
    """The same words with other ids."""
    state = json.loads(twin.TOKENIZER.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = vocabulary[:300] + vocabulary[300:][::-1]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def test_teachers_of_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with 700 tokens in the vocabulary, expected \d+"):
        sft(tmp_path, {"teacher": twin.llama(vocabulary=700)})
    path = tmp_path / "teacher"
    twin.llama(5).save_pretrained(path)
    shuffled_tokenizer().save_pretrained(path)
    with pytest.raises(ValueError, match="whose tokenizer has another id for"):
        sft(tmp_path, {"teacher": str(path)})
    twin.llama(vocabulary=700).save_pretrained(path)
    with pytest.raises(ValueError, match="with 700 tokens in the vocabulary"):
        sft(tmp_path, {"teacher": str(path)})


def test_a_path_without_a_model(tmp_path):
    with pytest.raises(OSError, match="nothing-there"):
        sft(tmp_path, {"teacher": str(tmp_path / "nothing-there")})


def test_teacher_without_tokenizer_files_says_so(tmp_path, capsys):
    twin.llama(5).save_pretrained(tmp_path / "teacher")
    sft(tmp_path, {"teacher": str(tmp_path / "teacher")})
    assert "has no tokenizer: only the size of its vocabulary was compared" in capsys.readouterr().out


def test_teacher_that_is_the_student_itself(tmp_path):
    model = twin.llama()
    with pytest.raises(ValueError, match=r"`teacher`.*shares"):
        sft(tmp_path, {"teacher": model}, model)
    with pytest.raises(ValueError, match=r"`teacher`.*shares"):
        sft(tmp_path, {"teacher": model}, get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")))
    other = twin.llama(5)
    other.model.embed_tokens = model.model.embed_tokens
    with pytest.raises(ValueError, match=r"`teacher`.*shares"):
        sft(tmp_path, {"teacher": other}, model)


def test_offloading_where_there_is_nothing_to_move_away_from(tmp_path):
    trainer = sft(tmp_path, {"teacher": twin.llama(5), "offload_teacher": True})
    with pytest.raises(ValueError, match=r"`offload_teacher`.*False on a CPU"):
        trainer.train()


# Resuming


class StopAt(TrainerCallback):
    """Ends training after some steps, once a checkpoint of that step is written."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def run(folder, config, stop=None, resume=None, model=None, **kwargs):
    settings = {
        "rows": 24, "max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2,
        "curriculum": {"num_levels": 3, "replay_fraction": 0.25},
    }  # fmt: skip
    torch.manual_seed(0)
    trainer = sft(
        folder,
        config,
        model or twin.llama(attention_dropout=0.1),
        CurriculumSFTTrainer,
        callbacks=[] if stop is None else [StopAt(stop)],
        **{**settings, **kwargs},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_weights(first, second):
    theirs = second.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in first.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"teacher": "previous_stage"},
        {"teacher": "ema", "ema_decay": 0.8},
        {"teacher": "base"},
        {"teacher": "previous_stage", "teacher_cache": "top_k", "cache_top_k": 8},
        {"teacher": "base", "teacher_cache": "top_k", "cache_top_k": 8, "distill_on": "replay"},
    ],
    ids=["previous-stage", "ema", "base", "previous-stage-cache", "base-cache"],
)
def test_resumed_run_ends_with_the_same_weights(tmp_path, config):
    whole = run(tmp_path / "whole", config)
    boundaries = [stage.end_step for stage in whole.stages]
    stop = next(step for step in range(boundaries[1] + 1, boundaries[2]) if step % 2 == 0)
    broken = run(tmp_path / "broken", config, stop=stop)
    assert broken.state.global_step == stop < boundaries[2]
    resumed = run(tmp_path / "broken", config, resume=True)
    assert resumed.state.global_step == boundaries[2]
    assert_same_weights(whole, resumed)
    names = ("loss", "ce_loss", "kd_loss")
    logs = [[{n: log.get(n) for n in names} for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert logs[0] == logs[1]
    assert logs[0][-1]["kd_loss"] is not None


def test_resumed_at_a_stage_end_has_the_teacher_of_the_next_stage(tmp_path):
    config = {"teacher": "previous_stage"}
    whole = run(tmp_path / "whole", config, save_strategy="epoch")
    run(tmp_path / "broken", config, stop=whole.stages[0].end_step, save_strategy="epoch")
    resumed = run(tmp_path / "broken", config, resume=True, save_strategy="epoch")
    assert_same_weights(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"teacher": "previous_stage"}, {"teacher": "ema", "ema_decay": 0.8}], ids=str)
def test_second_run_of_a_trainer_forgets_the_teacher_of_the_first(tmp_path, config):
    fresh = run(tmp_path / "fresh", config, model=twin.llama())
    again = run(tmp_path / "again", config, model=twin.llama())
    again.model.load_state_dict(twin.llama().state_dict())
    again.optimizer = again.lr_scheduler = None
    again.train()
    assert_same_weights(fresh, again)
    logged = [log["kd_loss"] for log in again.state.log_history if "kd_loss" in log]
    assert logged == [log["kd_loss"] for log in fresh.state.log_history if "kd_loss" in log]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = run(folder, {"teacher": "base", "alpha": 0.5}, stop=2)
    assert trainer.state.global_step == 2
    return folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha": 0.4}, r"alpha: 0.5 there, 0.4 here"),
        ({"temperature": 3.0}, r"temperature: 1.0 there, 3.0 here"),
        ({"teacher": "ema"}, r"teacher: base there, ema here"),
        ({"teacher": "none"}, r"teacher: base there, none here"),
        ({"divergence": "jsd"}, r"divergence: forward_kl there, jsd here"),
    ],
)
def test_another_distillation_is_not_resumed(tmp_path, checkpoint, config, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, {"teacher": "base", **config}, resume=str(checkpoint))


def test_a_checkpoint_without_a_teacher_is_not_resumed_with_one(tmp_path):
    run(tmp_path, None, stop=2)
    with pytest.raises(ValueError, match=r"teacher: none there, base here"):
        run(tmp_path, {"teacher": "base"}, resume=str(tmp_path / "checkpoint-2"))


def test_missing_and_damaged_teachers_are_refused(tmp_path, checkpoint):
    path = checkpoint / "hf_curriculum_teacher.safetensors"
    whole = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(ValueError, match=r"hf_curriculum_teacher.safetensors is missing"):
            run(tmp_path, {"teacher": "base", "alpha": 0.5}, resume=str(checkpoint))
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"hf_curriculum_teacher.safetensors.*the recorded hash"):
            run(tmp_path, {"teacher": "base", "alpha": 0.5}, resume=str(checkpoint))
    finally:
        path.write_bytes(whole)
    run(tmp_path, {"teacher": "base", "alpha": 0.5}, resume=str(checkpoint))


def test_cache_that_is_missing_damaged_or_of_other_rows_is_refused(tmp_path):
    config = {"teacher": "base", "teacher_cache": "top_k", "cache_top_k": 4}
    rows = twin.generate_corpus(24)
    settings = {"curriculum": None, "cls": KDSFTTrainer, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = sft(tmp_path / "run", config, rows=rows, **settings)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    other = sft(tmp_path / "other", config, rows=twin.generate_corpus(24, seed=9), **settings)
    with pytest.raises(ValueError, match=r"cache of something else .*training data"):
        other.train(resume_from_checkpoint=str(checkpoint))
    path = checkpoint / "hf_curriculum_teacher_top_k.safetensors"
    # The file of the checkpoint may be a link to the one of the run.
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="top-k cache"):
        sft(tmp_path / "third", config, rows=rows, **settings).train(resume_from_checkpoint=str(checkpoint))
    path.unlink()
    with pytest.raises(ValueError, match=r"hf_curriculum_teacher_top_k.safetensors is missing"):
        sft(tmp_path / "third", config, rows=rows, **settings).train(resume_from_checkpoint=str(checkpoint))


def test_the_teacher_is_not_among_the_files_that_are_pushed(tmp_path):
    config = {"teacher": "base", "teacher_cache": "top_k", "cache_top_k": 4}
    sft(tmp_path, config, save_strategy="steps", save_steps=2).train()
    # As `Trainer._push_from_checkpoint` and `Trainer.push_to_hub` leave files of `output_dir` out.
    pushed = [
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file()
        and not any(fnmatch(path.relative_to(tmp_path).as_posix(), pattern) for pattern in ("_*", "checkpoint-*"))
    ]
    assert not [name for name in pushed if "teacher" in name]
