"""What a run with a teacher computes, against the same run by hand in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer
from trl import SFTTrainer

from hf_curriculum import CurriculumConfig, DistillationConfig
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.trainers import CurriculumSFTTrainer, CurriculumTrainer, KDSFTTrainer, KDTrainer


_spec = importlib.util.spec_from_file_location("distillation_twin", Path(__file__).with_name("distillation_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)

SHARP = {"alpha": 0.4, "temperature": 2.0}


def frozen_head():
    model = twin.llama()
    model.lm_head.weight.requires_grad_(False)
    return model


STUDENTS = {
    "full": twin.llama,
    "full-tied": lambda: twin.llama(tied=True),
    "full-frozen-head": frozen_head,
    "lora": lambda: twin.lora(twin.llama()),
    "lora-tied": lambda: twin.lora(twin.llama(tied=True)),
    "lora-trained-head": lambda: twin.lora(twin.llama(), modules_to_save=["lm_head"]),
}


def base_of(name):
    """What `base` means for a student: without its adapter, or before training."""
    if name.startswith("lora"):
        return lambda: twin.llama(tied="tied" in name)
    return STUDENTS[name]


def check(recorder, build, teacher_of_step, tolerance=1e-4, **loss):
    """Compares every optimizer step of a run with the twin's."""
    assert len(recorder.gradients) >= 2
    for number, (values, batches) in enumerate(zip(recorder.parameters, recorder.batches, strict=True)):
        student = twin.double(build, values)
        expected, ce, kd = twin.step(student, teacher_of_step(number), batches, **loss)
        logged = recorder.losses[number]
        assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        assert logged["ce_loss"] == pytest.approx(ce.item(), rel=1e-5)
        assert logged["kd_loss"] == pytest.approx(kd.item(), rel=1e-3, abs=2e-5)
        twin.assert_close(recorder.gradients[number], twin.gradients_of(student, expected), tolerance)


@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_learns_from_another_model(tmp_path, student):
    trainer = twin.sft_trainer(
        KDSFTTrainer, tmp_path, STUDENTS[student](), {"teacher": twin.llama(5, hidden=48), **SHARP}
    )
    recorder = twin.Recorder(trainer)
    trainer.train()
    teacher = twin.double(lambda: twin.llama(5, hidden=48))
    assert recorder.losses[0]["kd_loss"] > 1
    check(recorder, STUDENTS[student], lambda _: teacher, **SHARP)


@pytest.mark.parametrize("student", ["full", "full-tied", "lora", "lora-trained-head"])
def test_base_is_the_model_before_training_or_without_its_adapter(tmp_path, student):
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, STUDENTS[student](), {"teacher": "base", **SHARP}, max_steps=3)
    recorder = twin.Recorder(trainer)
    trainer.train()
    base = twin.double(base_of(student))
    assert recorder.losses[-1]["kd_loss"] > 1e-2
    check(recorder, STUDENTS[student], lambda _: base, **SHARP)


@pytest.mark.parametrize("student", ["full-tied", "lora-trained-head"])
def test_ema_is_the_running_average_in_float32(tmp_path, student):
    decay = 0.7
    trainer = twin.sft_trainer(
        KDSFTTrainer, tmp_path, STUDENTS[student](), {"teacher": "ema", "ema_decay": decay, **SHARP}, max_steps=4
    )
    recorder = twin.Recorder(trainer)
    trainer.train()
    averages = [recorder.parameters[0]]
    for values in recorder.parameters[1:]:
        averages.append({name: decay * averages[-1][name] + (1 - decay) * values[name] for name in values})
    assert recorder.losses[-1]["kd_loss"] > 1e-2
    check(recorder, STUDENTS[student], lambda number: twin.double(STUDENTS[student], averages[number]), **SHARP)


@pytest.mark.parametrize(
    ("kind", "beta"), [("reverse_kl", None), ("jsd", None), ("jsd", 0.2), ("jsd", 0.0), ("jsd", 1.0)]
)
def test_every_divergence(tmp_path, kind, beta):
    config = {"teacher": twin.llama(5), "divergence": kind, "beta": beta, **SHARP}
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, twin.llama(), config)
    recorder = twin.Recorder(trainer)
    trainer.train()
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    teacher = twin.double(lambda: twin.llama(5))
    settled = 0.5 if beta is None else beta
    check(recorder, twin.llama, lambda _: teacher, kind=ends.get(beta, kind), beta=settled, **SHARP)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_weights_at_the_ends_of_their_range(tmp_path, alpha):
    trainer = twin.sft_trainer(
        KDSFTTrainer, tmp_path, twin.llama(), {"teacher": twin.llama(5), "alpha": alpha, "temperature": 1.0}
    )
    recorder = twin.Recorder(trainer)
    trainer.train()
    teacher = twin.double(lambda: twin.llama(5))
    for number, values in enumerate(recorder.parameters):
        student = twin.double(twin.llama, values)
        loss, ce, kd = twin.step(student, teacher, recorder.batches[number], alpha)
        assert recorder.losses[number]["loss"] == pytest.approx((kd if alpha else ce).item(), rel=1e-5)
        twin.assert_close(recorder.gradients[number], twin.gradients_of(student, loss))


@pytest.mark.parametrize("cls", [KDSFTTrainer, KDTrainer])
def test_accumulated_micro_batches_with_unequal_token_counts_are_one_batch(tmp_path, cls):
    config = {"teacher": twin.llama(5), **SHARP}
    if cls is KDSFTTrainer:
        trainer = twin.sft_trainer(cls, tmp_path, twin.llama(), config, gradient_accumulation_steps=3)
    else:
        trainer = plain_trainer(cls, tmp_path, twin.llama(), config, gradient_accumulation_steps=3)
    recorder = twin.Recorder(trainer)
    trainer.train()
    for batches in recorder.batches:
        counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in batches]
        assert len(counts) == 3
        assert len(set(counts)) > 1
    teacher = twin.double(lambda: twin.llama(5))
    check(recorder, twin.llama, lambda _: teacher, **SHARP)


def plain_rows(rows=24, seed=0):
    """Token ids of prompt and completion, all of them labels."""
    data = generate_corpus(rows, seed=seed)
    texts = [row["prompt"] + row["completion"] for row in data]
    return data.from_dict({"input_ids": [twin.TOKENIZER(text).input_ids for text in texts]})


def plain_trainer(cls, folder, model, distillation, **kwargs):
    names = twin.arguments(folder).__dataclass_fields__
    given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    if distillation is not None:
        kwargs["distillation"] = DistillationConfig(**distillation)
    return cls(
        model=model,
        args=twin.arguments(folder, **given),
        train_dataset=kwargs.pop("rows", None) or plain_rows(),
        eval_dataset=plain_rows(6, seed=1),
        data_collator=DataCollatorForLanguageModeling(twin.TOKENIZER, mlm=False),
        processing_class=twin.TOKENIZER,
        **kwargs,
    )


@pytest.mark.parametrize("student", ["full-tied", "lora-trained-head"])
def test_plain_trainer_with_a_teacher(tmp_path, student):
    trainer = plain_trainer(KDTrainer, tmp_path, STUDENTS[student](), {"teacher": "base", **SHARP}, max_steps=3)
    recorder = twin.Recorder(trainer)
    trainer.train()
    base = twin.double(base_of(student))
    check(recorder, STUDENTS[student], lambda _: base, **SHARP)


def test_another_model_by_its_path(tmp_path):
    twin.llama(5, hidden=48).save_pretrained(tmp_path / "teacher")
    twin.TOKENIZER.save_pretrained(tmp_path / "teacher")
    config = {"teacher": str(tmp_path / "teacher"), **SHARP}
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path / "out", twin.llama(), config)
    recorder = twin.Recorder(trainer)
    trainer.train()
    teacher = twin.double(lambda: twin.llama(5, hidden=48))
    check(recorder, twin.llama, lambda _: teacher, **SHARP)


# Stages


def staged(folder, student, config, **kwargs):
    """A trainer with two stages."""
    return twin.sft_trainer(
        CurriculumSFTTrainer, folder, student, config, rows=12, max_steps=-1, num_train_epochs=1, **kwargs
    )


@pytest.mark.parametrize("student", ["full", "full-frozen-head", "lora", "lora-trained-head"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_previous_stage_is_the_model_at_its_end(tmp_path, student, accumulation):
    trainer = staged(
        tmp_path,
        STUDENTS[student](),
        {"teacher": "previous_stage", **SHARP},
        curriculum={},
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2 if accumulation == 1 else 1,
    )
    recorder = twin.Recorder(trainer)
    trainer.train()
    boundary = trainer.stages[0].end_step
    assert len(trainer.stages) == 2
    for number in range(boundary):
        assert recorder.losses[number]["kd_loss"] is None
        values = twin.double(STUDENTS[student], recorder.parameters[number])
        loss, _, _ = twin.step(values, None, recorder.batches[number], alpha=0.0)
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        twin.assert_close(recorder.gradients[number], twin.gradients_of(values, loss))
    teacher = twin.double(STUDENTS[student], recorder.parameters[boundary])
    if len(recorder.losses) > boundary + 1:
        assert recorder.losses[-1]["kd_loss"] > 1e-3
    for number in range(boundary, len(recorder.losses)):
        values = twin.double(STUDENTS[student], recorder.parameters[number])
        loss, _, kd = twin.step(values, teacher, recorder.batches[number], **SHARP)
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert recorder.losses[number]["kd_loss"] == pytest.approx(kd.item(), rel=1e-3, abs=2e-5)
        twin.assert_close(recorder.gradients[number], twin.gradients_of(values, loss))


def test_schedules_have_one_value_per_stage(tmp_path):
    config = {"teacher": twin.llama(5), "alpha": [0.2, 0.7], "temperature": [1.0, 3.0]}
    trainer = staged(tmp_path, twin.llama(), config, curriculum={})
    recorder = twin.Recorder(trainer)
    trainer.train()
    teacher = twin.double(lambda: twin.llama(5))
    boundary = trainer.stages[0].end_step
    for number, values in enumerate(recorder.parameters):
        stage = int(number >= boundary)
        student = twin.double(twin.llama, values)
        loss, _, _ = twin.step(
            student, teacher, recorder.batches[number], config["alpha"][stage], config["temperature"][stage]
        )
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("distill_on", ["current", "replay"])
def test_rows_of_one_origin_alone_are_distilled(tmp_path, distill_on):
    config = {"teacher": "previous_stage", "distill_on": distill_on, **SHARP}
    trainer = staged(tmp_path, twin.llama(), config, curriculum={"replay_fraction": 0.5})
    recorder = twin.Recorder(trainer)
    trainer.train()
    plan, boundary = trainer.curriculum_plan, trainer.stages[0].end_step
    replayed = plan.replayed.reshape(-1, 2)
    assert 0 < replayed[boundary:].sum() < replayed[boundary:].size
    teacher = twin.double(twin.llama, recorder.parameters[boundary])
    for number in range(boundary, len(recorder.losses)):
        (batch,) = recorder.batches[number]
        chosen = replayed[number] if distill_on == "replay" else ~replayed[number]
        counts = (batch["labels"][:, 1:] != -100).sum(dim=1)
        alpha = torch.from_numpy(np.where(chosen, SHARP["alpha"], 0.0)).repeat_interleave(counts)
        student = twin.double(twin.llama, recorder.parameters[number])
        loss, ce, _ = twin.step(student, teacher, [batch], alpha, SHARP["temperature"])
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert recorder.losses[number]["ce_loss"] == pytest.approx(ce.item(), rel=1e-5)
        assert (recorder.losses[number]["kd_loss"] is not None) == bool(chosen.any())
        twin.assert_close(recorder.gradients[number], twin.gradients_of(student, loss))


# The cache


@pytest.mark.parametrize("teacher", ["base", "other", "base-lora"])
def test_cache_is_the_teacher_s_top_k_and_a_tail(tmp_path, teacher):
    build = STUDENTS["lora" if teacher == "base-lora" else "full-tied"]
    named = twin.llama(5, hidden=48) if teacher == "other" else "base"
    config = {"teacher": named, "teacher_cache": "top_k", "cache_top_k": 5, **SHARP}
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, build(), config, max_steps=3)
    recorder = twin.Recorder(trainer)
    trainer.train()
    built = {"other": lambda: twin.llama(5, hidden=48), "base": build, "base-lora": twin.llama}[teacher]
    model = twin.double(built)
    # float16 keeps a log-probability to 2^-11 of its size.
    for number, values in enumerate(recorder.parameters):
        student = twin.double(build, values)
        loss, _, kd = twin.step(student, model, recorder.batches[number], top_k=5, **SHARP)
        assert recorder.losses[number]["kd_loss"] == pytest.approx(kd.item(), rel=1e-2, abs=2e-3)
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=1e-3)
        twin.assert_close(recorder.gradients[number], twin.gradients_of(student, loss), tolerance=1e-2)
    assert recorder.losses[-1]["kd_loss"] > 1e-2


def test_cache_of_all_tokens_is_the_teacher(tmp_path):
    losses = []
    for cache in ({}, {"teacher_cache": "top_k", "cache_top_k": 10**6}):
        config = {"teacher": twin.llama(5), **cache, **SHARP}
        trainer = twin.sft_trainer(KDSFTTrainer, tmp_path / str(len(losses)), twin.llama(), config)
        recorder = twin.Recorder(trainer)
        trainer.train()
        losses.append(recorder)
    for dense, cached in zip(losses[0].losses, losses[1].losses, strict=True):
        assert cached["kd_loss"] == pytest.approx(dense["kd_loss"], rel=2e-3)
    twin.assert_close(
        losses[1].gradients[0], {n: g.double() for n, g in losses[0].gradients[0].items()}, tolerance=1e-2
    )


def test_cache_of_the_previous_stage_is_written_at_its_end_and_the_one_before_removed(tmp_path):
    config = {"teacher": "previous_stage", "teacher_cache": "top_k", "cache_top_k": 600, **SHARP}
    trainer = twin.sft_trainer(
        CurriculumSFTTrainer, tmp_path, twin.llama(), config, rows=18, max_steps=-1, num_train_epochs=1,
        curriculum={"num_levels": 3, "replay_fraction": 0.5},
    )  # fmt: skip
    recorder = twin.Recorder(trainer)
    trainer.train()
    boundaries = [stage.end_step for stage in trainer.stages]
    teachers = {0: None} | {
        index: twin.double(twin.llama, recorder.parameters[boundaries[index - 1]]) for index in (1, 2)
    }
    for number, values in enumerate(recorder.parameters):
        stage = sum(number >= boundary for boundary in boundaries)
        student = twin.double(twin.llama, values)
        teacher = teachers[stage]
        settings = SHARP if teacher is not None else {"alpha": 0.0}
        loss, _, _ = twin.step(student, teacher, recorder.batches[number], **settings)
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=2e-3)
    assert [path.name for path in tmp_path.rglob("stage_*")] == ["stage_2.safetensors"]


# Beside the twin


def run_sft(cls, folder, distillation, model=None, **kwargs):
    torch.manual_seed(0)
    trainer = twin.sft_trainer(cls, folder, model or twin.llama(attention_dropout=0.2), distillation, **kwargs)
    trainer.train()
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
    return trainer, [{name: log[name] for name in names} for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"padding_free": True, "max_length": None}],
    ids=["padded", "accumulated", "padding-free"],
)
def test_weight_zero_is_trl_s_own_run(tmp_path, settings):
    _, plain = run_sft(SFTTrainer, tmp_path / "plain", None, max_steps=4, **settings)
    teacher = {"teacher": twin.llama(5, attention_dropout=0.2), "alpha": 0.0}
    _, ours = run_sft(KDSFTTrainer, tmp_path / "ours", teacher, max_steps=4, **settings)
    for there, here in zip(plain, ours, strict=True):
        assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("cls", [KDSFTTrainer, CurriculumSFTTrainer])
def test_no_teacher_leaves_the_run_alone(tmp_path, cls):
    if cls is KDSFTTrainer:
        with pytest.raises(ValueError, match="a `DistillationConfig` with a teacher"):
            twin.sft_trainer(cls, tmp_path, twin.llama(), {"teacher": "none"})
        return
    logs = []
    for config in (None, {"teacher": "none"}):
        trainer = staged(tmp_path / str(config), twin.llama(attention_dropout=0.2), config, curriculum={}, eval_rows=4)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert not any("kd_loss" in log or "eval_kl_to_teacher" in log for log in trainer.state.log_history)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("teacher", ["base", "ema", "other", "lora-base"])
def test_dropout_of_the_student_does_not_know_of_the_teacher(tmp_path, teacher):
    # Dropout draws from one stream: a teacher that drew from it, or ran with dropout, would change every later mask.
    def model():
        student = twin.llama(attention_dropout=0.3)
        return twin.lora(student, lora_dropout=0.3) if teacher == "lora-base" else student

    named = {"other": twin.llama(5, attention_dropout=0.3), "lora-base": "base"}.get(teacher, teacher)
    _, plain = run_sft(SFTTrainer, tmp_path / "plain", None, model(), learning_rate=0.0)
    trainer, ours = run_sft(
        KDSFTTrainer, tmp_path / "ours", {"teacher": named, "alpha": 0.5}, model(), learning_rate=0.0
    )
    for there, here in zip(plain, ours, strict=True):
        assert here["entropy"] == pytest.approx(there["entropy"], rel=1e-6)
    logged = [log["ce_loss"] for log in trainer.state.log_history if "ce_loss" in log]
    assert logged == pytest.approx([log["loss"] for log in plain], rel=1e-5)


def test_padding_free_batches(tmp_path):
    trainer = twin.sft_trainer(
        KDSFTTrainer, tmp_path, twin.llama(), {"teacher": twin.llama(5), **SHARP}, padding_free=True,
        max_length=None,
    )  # fmt: skip
    recorder = twin.Recorder(trainer)
    trainer.train()
    assert all(batch["input_ids"].shape[0] == 1 for batches in recorder.batches for batch in batches)
    assert "position_ids" in recorder.batches[0][0]
    teacher = twin.double(lambda: twin.llama(5))
    check(recorder, twin.llama, lambda _: teacher, **SHARP)


def test_padding_free_batches_with_a_cache(tmp_path):
    config = {"teacher": twin.llama(5), "teacher_cache": "top_k", "cache_top_k": 10**6, **SHARP}
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, twin.llama(), config, padding_free=True, max_length=None)
    recorder = twin.Recorder(trainer)
    trainer.train()
    teacher = twin.double(lambda: twin.llama(5))
    for number, values in enumerate(recorder.parameters):
        loss, _, _ = twin.step(twin.double(twin.llama, values), teacher, recorder.batches[number], **SHARP)
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=2e-3)


def test_packed_batches(tmp_path):
    trainer = twin.sft_trainer(
        KDSFTTrainer, tmp_path, twin.llama(), {"teacher": twin.llama(5), **SHARP}, packing=True, max_length=64,
        packing_strategy="bfd",
    )  # fmt: skip
    recorder = twin.Recorder(trainer)
    trainer.train()
    teacher = twin.double(lambda: twin.llama(5))
    check(recorder, twin.llama, lambda _: teacher, **SHARP)


@pytest.mark.parametrize("student", ["full", "lora-trained-head"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, student, reentrant):
    runs = []
    for checkpointing in (False, True):
        trainer = twin.sft_trainer(
            KDSFTTrainer, tmp_path / str(checkpointing), STUDENTS[student](), {"teacher": "base", **SHARP},
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        recorder = twin.Recorder(trainer)
        trainer.train()
        assert trainer.model.training
        runs.append(recorder)
    assert [log["loss"] for log in runs[0].losses] == pytest.approx([log["loss"] for log in runs[1].losses], rel=1e-6)
    for there, here in zip(runs[0].gradients, runs[1].gradients, strict=True):
        twin.assert_close(here, {name: value.double() for name, value in there.items()}, tolerance=1e-5)


# Evaluation and logs


@pytest.mark.parametrize("cls", [KDSFTTrainer, KDTrainer])
def test_evaluation_loss_is_the_cross_entropy_and_the_distance_is_measured(tmp_path, cls):
    student, teacher = twin.llama(), twin.llama(5)
    config = {"teacher": teacher, "alpha": 0.7, "temperature": 3.0, "divergence": "reverse_kl"}
    settings = {"per_device_eval_batch_size": 2, "max_steps": 2}
    if cls is KDSFTTrainer:
        trainer = twin.sft_trainer(cls, tmp_path, student, config, eval_rows=5, **settings)
    else:
        trainer = plain_trainer(cls, tmp_path, student, config, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    values = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    kls, loader = [], trainer.get_eval_dataloader()
    ours, theirs = twin.double(twin.llama, values), twin.double(lambda: twin.llama(5))
    with torch.no_grad():
        for batch in loader:
            pair = [twin.labelled_logits(model, batch)[0] for model in (ours, theirs)]
            kls.append(twin.divergence(*pair, "forward_kl", 1.0))
    assert metrics["eval_kl_to_teacher"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-5)
    plain_model = twin.llama()
    plain_model.load_state_dict(values)
    if cls is KDSFTTrainer:
        plain = twin.sft_trainer(SFTTrainer, tmp_path, plain_model, None, eval_rows=5, **settings)
    else:
        plain = plain_trainer(Trainer, tmp_path, plain_model, None, **settings)
    expected = plain.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    if cls is KDSFTTrainer:
        for name in ("eval_entropy", "eval_mean_token_accuracy"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5)


def test_distance_to_the_previous_stage_is_measured_level_by_level(tmp_path):
    trainer = staged(tmp_path, twin.llama(), {"teacher": "previous_stage", **SHARP}, curriculum={}, eval_rows=8)
    recorder = twin.Recorder(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_level_0_loss" in log]
    names = [f"eval_level_{level}_kl_to_previous_stage" for level in range(2)]
    assert not any(name in logs[0] for name in names)
    values = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    before = recorder.parameters[trainer.stages[0].end_step]
    student, teacher = twin.double(twin.llama, values), twin.double(twin.llama, before)
    for level, rows in trainer._eval_rows.items():
        kls = []
        with torch.no_grad():
            for batch in trainer.get_test_dataloader(rows):
                pair = [twin.labelled_logits(model, batch)[0] for model in (student, teacher)]
                kls.append(twin.divergence(*pair, "forward_kl", 1.0))
        assert logs[1][names[level]] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)


def test_logged_means_are_per_labelled_token_of_the_logging_window(tmp_path):
    config = {"teacher": twin.llama(5), **SHARP}
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, twin.llama(), config, max_steps=6, logging_steps=3)
    recorder = twin.Recorder(trainer)
    trainer.train()
    teacher = twin.double(lambda: twin.llama(5))
    for window in range(2):
        ces, kds, weights = [], [], []
        for number in range(3 * window, 3 * window + 3):
            student = twin.double(twin.llama, recorder.parameters[number])
            with torch.no_grad():
                _, ce, kd = twin.step(student, teacher, recorder.batches[number], **SHARP)
            ces.append(ce.item())
            kds.append(kd.item())
            weights.append((recorder.batches[number][0]["labels"][:, 1:] != -100).sum().item())
        assert len(set(weights)) > 1
        assert recorder.losses[window]["ce_loss"] == pytest.approx(np.average(ces, weights=weights), rel=1e-5)
        assert recorder.losses[window]["kd_loss"] == pytest.approx(np.average(kds, weights=weights), rel=1e-5)


def test_plain_trainer_with_stages_and_a_teacher(tmp_path):
    trainer = plain_trainer(
        CurriculumTrainer, tmp_path, twin.llama(), {"teacher": "previous_stage", **SHARP}, max_steps=-1,
        num_train_epochs=1, curriculum=CurriculumConfig(scorer="length", num_levels=2, use_cache=False),
        rows=plain_rows(12),
    )  # fmt: skip
    recorder = twin.Recorder(trainer)
    trainer.train()
    boundary = trainer.stages[0].end_step
    teacher = twin.double(twin.llama, recorder.parameters[boundary])
    for number, values in enumerate(recorder.parameters):
        student = twin.double(twin.llama, values)
        late = number >= boundary
        loss, _, _ = twin.step(
            student, teacher if late else None, recorder.batches[number], **(SHARP if late else {"alpha": 0.0})
        )
        assert recorder.losses[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        twin.assert_close(recorder.gradients[number], twin.gradients_of(student, loss))


def test_no_logits_of_all_tokens_are_made(tmp_path):
    # The head is never called as a module over (B, S, H), in training and in an evaluation of the loss alone; but for
    # the last position of the first batch, when the model's own logits are looked at.
    model = twin.llama()
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, model, {"teacher": "base", **SHARP}, eval_rows=4)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    trainer.train()
    trainer.evaluate()
    assert shapes
    assert all(len(shape) == 2 or shape[1] == 1 for shape in shapes)
