import json
import math
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_curriculum import (
    CurriculumConfig,
    CurriculumMixin,
    CurriculumPlan,
    CurriculumSFTTrainer,
    CurriculumTrainer,
    build_plan,
)
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
PLAIN = {**CPU, "output_dir": "out", "save_strategy": "no", "per_device_train_batch_size": 4, "num_train_epochs": 1}


def sft_config(**kwargs):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no", "logging_steps": 2}
    defaults = {"output_dir": "out", "bf16": False, "gradient_checkpointing": False}
    return SFTConfig(**{**defaults, **CPU, **settings, **kwargs})


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def build(tokenizer):
    """Makes a trainer over 24 rows of the embedded corpus, scored by length unless told otherwise."""

    def make(curriculum=None, args=None, rows=None, eval_rows=None, cls=CurriculumSFTTrainer, **kwargs):
        return cls(
            model=kwargs.pop("model", None) or build_model(tokenizer),
            args=sft_config(**(args or {})),
            train_dataset=generate_corpus(24) if rows is None else rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            curriculum=CurriculumConfig(**{"scorer": "length", **(curriculum or {})}),
            **kwargs,
        )

    return make


class Spy(TrainerCallback):
    """Keeps the order of events, with the optimizer steps done."""

    def __init__(self):
        self.events = []

    def on_stage_begin(self, args, state, control, *, stage, **kwargs):
        self.events.append((f"begin {stage.index}", state.global_step))

    def on_stage_end(self, args, state, control, *, stage, **kwargs):
        assert kwargs["model"] is not None
        self.events.append((f"end {stage.index}", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluate", state.global_step))


def seen_rows(trainer):
    """The rows that training really sees, read off the batches."""
    seen = []
    by_content = {tuple(ids): row for row, ids in enumerate(trainer.train_dataset["input_ids"])}
    assert len(by_content) == len(trainer.train_dataset)
    original = trainer.training_step

    def step(model, inputs, *args, **kwargs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(by_content[tuple(ids[mask.bool()].tolist())])
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = step
    trainer.train()
    return seen


@pytest.mark.parametrize("pacing", ["staged", "cumulative", "random", "random_levels", "reverse"])
def test_training_follows_the_plan(build, pacing):
    trainer = build({"pacing": pacing}, {"num_train_epochs": 2, "gradient_accumulation_steps": 2})
    assert seen_rows(trainer) == trainer.curriculum_plan.indices.tolist()
    counts = np.bincount(trainer.curriculum_plan.indices, minlength=24)
    assert counts.tolist() == [2] * 24
    assert trainer.state.global_step == trainer.curriculum_plan.num_steps == 6


def test_plan_is_the_function_s(build):
    trainer = build({"replay_fraction": 0.5, "group_by_length": True}, {"num_train_epochs": 3, "data_seed": 7})
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    expected = build_plan(
        trainer.levels, trainer.curriculum, global_batch_size=4, num_train_epochs=3, seed=7, lengths=lengths
    )
    assert trainer.curriculum_plan == expected
    assert expected != build_plan(
        trainer.levels, trainer.curriculum, global_batch_size=4, num_train_epochs=3, seed=8, lengths=lengths
    )


def test_levels_follow_difficulty(build):
    trainer = build()
    assert np.bincount(trainer.levels).tolist() == [7, 8, 9]  # equal scores share a level
    for level in (0, 1):
        assert (
            trainer.difficulty[trainer.levels == level].max() < trainer.difficulty[trainer.levels == level + 1].min()
        )


def test_max_steps_shortens_the_run(build):
    trainer = build(args={"max_steps": 4})
    trainer.train()
    assert trainer.state.global_step == 4 == trainer.curriculum_plan.num_steps


def test_stage_events_come_in_order_and_epoch_strategies_at_stage_ends(build):
    spy = Spy()
    trainer = build(
        args={"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"},
        eval_rows=generate_corpus(9, seed=1),
        callbacks=[spy],
    )
    trainer.train()
    stage_ends = [(f"end {i}", 2 * i + 2) for i in range(3)]
    expected = []
    for index, end in enumerate(stage_ends):
        expected += [(f"begin {index}", 2 * index), end, ("evaluate", end[1]), ("save", end[1])]
    assert spy.events == expected
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [2, 4, 6]


def test_logs_carry_the_stage_and_no_training_log_is_lost_at_a_stage_end(build):
    trainer = build(args={"logging_steps": 1}, eval_rows=generate_corpus(9, seed=1))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["curriculum_stage"] for entry in logs] == [0, 0, 1, 1, 2, 2]
    assert all("entropy" in entry for entry in logs)


def test_matrix_is_measured_logged_recorded_and_summed_up(build, capsys):
    trainer = build(eval_rows=generate_corpus(30, seed=1))
    trainer.train()
    text = "".join(capsys.readouterr())
    history = trainer.state.log_history
    rows = [[entry[f"eval_level_{i}_loss"] for i in range(3)] for entry in history if "eval_level_0_loss" in entry]
    assert len(rows) == 3
    summary = next(entry for entry in history if "eval_loss_acc" in entry)
    assert summary["eval_loss_acc"] == pytest.approx(np.mean(rows[-1]))
    assert summary["eval_loss_bwt"] == pytest.approx(np.mean([rows[0][0] - rows[2][0], rows[1][1] - rows[2][1]]))
    assert summary["eval_loss_forgetting_level_0"] == pytest.approx(rows[2][0] - min(rows[0][0], rows[1][0]))
    record = [json.loads(line) for line in trainer.record.path.read_text().splitlines()]
    assert [line["event"] for line in record] == ["run", "plan", "stage_end", "stage_end", "stage_end", "forgetting"]
    assert [line["metrics"]["loss"] for line in record[2:5]] == rows
    for words in ("Levels by `length`", "Stages, `staged` (6 steps)", "after stage 2", "BWT"):
        assert words in text


def test_level_losses_are_those_of_the_level_s_rows(build):
    trainer = build(eval_rows=generate_corpus(12, seed=1), args={"per_device_eval_batch_size": 1})
    metrics = trainer.evaluate_levels()
    for level, rows in trainer._eval_rows.items():
        whole = trainer.evaluate(rows)["eval_loss"]
        assert metrics[f"eval_level_{level}_loss"] == pytest.approx(whole, rel=1e-6)


def test_compute_metrics_are_in_the_matrix(build):
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    trainer = build(eval_rows=generate_corpus(9, seed=1), compute_metrics=accuracy)
    with pytest.warns(FutureWarning, match="return_outputs"):
        trainer.train()
    assert trainer.level_matrix.metrics == ["loss", "accuracy"]
    assert any("eval_accuracy_bwt" in entry for entry in trainer.state.log_history)


def test_evaluation_at_stage_ends_changes_no_weight(build):
    weights = []
    for eval_levels in (True, False):
        trainer = build({"eval_levels": eval_levels}, eval_rows=generate_corpus(9, seed=1))
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_equals_sft_trainer_on_the_same_order(build, tokenizer):
    ours = build()
    ours.train()
    rows = generate_corpus(24).select(ours.curriculum_plan.indices.tolist())
    theirs = SFTTrainer(
        build_model(tokenizer),
        sft_config(train_sampling_strategy="sequential"),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs.train()
    expected = theirs.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())


def test_user_s_arguments_stay_as_they_were(build, tokenizer):
    args = sft_config(num_train_epochs=3)
    trainer = CurriculumSFTTrainer(
        build_model(tokenizer), args, None, generate_corpus(24), curriculum=CurriculumConfig(scorer="length"),
        processing_class=tokenizer,
    )  # fmt: skip
    assert args.num_train_epochs == 3
    assert trainer.curriculum_plan.num_steps == 18
    output = trainer.train()
    assert output.metrics["train_samples_per_second"] * output.metrics["train_runtime"] == pytest.approx(72, rel=0.05)


def test_second_train_equals_the_first_of_a_new_trainer(build):
    trainer = build(args={"learning_rate": 0.0}, eval_rows=generate_corpus(9, seed=1))
    trainer.train()
    first = trainer.level_matrix.matrix("loss")
    trainer.train()
    np.testing.assert_allclose(trainer.level_matrix.matrix("loss"), first)
    assert len(trainer.record.read("run")) == 1
    assert len(trainer.record.read("stage_end")) == 3


def test_own_trainer_class_takes_the_mixin(build):
    class MyTrainer(CurriculumMixin, SFTTrainer):
        pass

    trainer = build(cls=MyTrainer)
    trainer.train()
    assert trainer.state.global_step == 6


def test_plan_and_scores_are_on_disk(build):
    trainer = build()
    trainer.train()
    assert CurriculumPlan.load("out/hf_curriculum/plan") == trainer.curriculum_plan
    table = pq.read_table("out/hf_curriculum/difficulty.parquet").to_pydict()
    assert table["difficulty"] == trainer.difficulty.tolist()
    assert table["level"] == trainer.levels.tolist()
    assert table["sample_id"] == list(range(24))


def test_unlabelled_rows_are_dropped_counted_and_ids_stay(build, capsys):
    rows = [
        {"prompt": "apples " * 200, "completion": "1"},
        *generate_corpus(23).select_columns(["prompt", "completion"]),
    ]
    trainer = build(rows=Dataset.from_list(rows), args={"max_length": 150})
    assert trainer.sample_ids.tolist() == list(range(1, 24))
    assert len(trainer.levels) == 23
    assert "Scored 23 rows" in (text := "".join(capsys.readouterr()))
    assert "1 rows have no labelled token" in text


def test_column_is_read_and_evaluation_rows_are_levelled_by_it(build):
    rows = generate_corpus(24).add_column("difficulty", np.arange(24.0)[::-1])
    eval_rows = generate_corpus(3, seed=1).add_column("difficulty", [0.0, 23.0, 12.0])
    trainer = build({"scorer": "column"}, rows=rows, eval_rows=eval_rows)
    assert trainer.levels.tolist() == [2] * 8 + [1] * 8 + [0] * 8
    kept = {level: rows["input_ids"][:] for level, rows in trainer._eval_rows.items()}
    assert [len(kept[level]) for level in range(3)] == [1, 1, 1]
    assert kept[2][0] == trainer.eval_dataset["input_ids"][1]


def test_evaluation_data_without_the_column_means_no_matrix_and_a_word(build, capsys):
    rows = generate_corpus(24).add_column("difficulty", np.arange(24.0))
    trainer = build({"scorer": "column"}, rows=rows, eval_rows=generate_corpus(3, seed=1))
    assert "no level by stage matrix" in "".join(capsys.readouterr())
    assert trainer.evaluate_levels() == {}
    trainer.train()


def test_column_keeps_double_precision(build):
    scores = 1.0 + 1e-12 * np.arange(24)
    trainer = build({"scorer": "column"}, rows=generate_corpus(24).add_column("difficulty", scores))
    assert trainer.difficulty.tolist() == scores.tolist()


def test_formatted_data_sets_and_ids_of_the_user_s_train(build):
    rows = generate_corpus(24).add_column("sample_id", [f"id-{i}" for i in range(24)])
    build(rows=rows.with_format("torch")).train()
    table = pq.read_table("out/hf_curriculum/difficulty.parquet").to_pydict()
    assert table["sample_id"] == [f"id-{i}" for i in range(24)]


def test_early_stop_sums_up_what_was_measured(build):
    class StopAfterFirstStage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = build(eval_rows=generate_corpus(9, seed=1), callbacks=[StopAfterFirstStage()])
    trainer.train()
    assert len(trainer.record.read("stage_end")) == 2
    assert "eval_loss_bwt" in trainer.record.read("forgetting")[0]["metrics"]


def test_metrics_that_are_no_numbers_stay_out_of_the_matrix():
    from hf_curriculum.core.stages import Stage
    from hf_curriculum.curriculum.evaluation import LevelMatrix

    stages = [Stage(0, (0,), (0,), 0, 1, 4), Stage(1, (1,), (1,), 1, 2, 4)]
    matrix = LevelMatrix(stages, 2)
    for stage, (loss, wer, accuracy) in enumerate(((1.0, 0.5, 0.5), (3.0, 0.9, 0.1))):
        values = {"loss": loss, "wer": wer, "accuracy": accuracy, "confusion": [[1]], "note": "x"}
        matrix.add(stage, {f"eval_level_{level}_{name}": v for level in (0, 1) for name, v in values.items()})
    assert matrix.metrics == ["loss", "accuracy", "wer"]
    summary = matrix.forgetting()
    # Everything got worse, whichever way it counts.
    assert summary["eval_loss_bwt"] == -2.0
    assert summary["eval_wer_bwt"] == pytest.approx(-0.4)
    assert summary["eval_accuracy_bwt"] == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("metric", "falls"),
    [("loss", True), ("wer", True), ("word_error_rate", True), ("accuracy", False), ("success_rate", False)],
)
def test_direction_of_a_metric_is_told_from_its_name(metric, falls):
    from hf_curriculum.curriculum.evaluation import is_loss

    assert is_loss(metric) is falls


def test_resuming_by_path_after_another_run_can_be_resumed_again(build, checkpoint):
    build(args={"max_steps": 3}).train()
    build(args={"save_steps": 2, "save_strategy": "steps"}).train(resume_from_checkpoint=checkpoint)
    resumed = build()
    resumed.train(resume_from_checkpoint=True)
    assert [line["event"] for line in resumed.record.read()][:2] == ["run", "plan"]


def test_probe_does_not_learn_from_evaluation_rows(build):
    def difficulty(eval_rows):
        settings = {"scorer": "self_paced", "probe": "full", "probe_batch_size": 8, "use_cache": False}
        return build(settings, {"learning_rate": 1e-2}, eval_rows=eval_rows).difficulty

    alone, beside = difficulty(None), difficulty(generate_corpus(60, seed=1))
    np.testing.assert_allclose(beside, alone, atol=1e-6)


def test_dictionary_of_evaluation_sets_is_levelled_together(build):
    trainer = build(eval_rows={"a": generate_corpus(6, seed=1), "b": generate_corpus(6, seed=2)})
    assert sum(len(rows) for rows in trainer._eval_rows.values()) == 12
    trainer.train()


def test_self_paced_scores_evaluation_rows_with_the_same_probe(build):
    trainer = build(
        {"scorer": "self_paced", "probe": "full", "probe_batch_size": 8, "use_cache": False},
        eval_rows=generate_corpus(12, seed=1),
    )
    trainer.train()
    assert trainer.record.read("plan")[0]["scorer"] == "self_paced"
    assert 0 <= trainer.difficulty.min() <= trainer.difficulty.max() <= 1


def tokenised(tokenizer, count=24):
    rows = generate_corpus(count)
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]})


def test_plain_trainer_with_a_causal_model(tokenizer):
    from transformers import DataCollatorForSeq2Seq

    trainer = CurriculumTrainer(
        model=build_model(tokenizer),
        args=TrainingArguments(**PLAIN),
        train_dataset=tokenised(tokenizer),
        eval_dataset=tokenised(tokenizer, 9),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        curriculum=CurriculumConfig(scorer="loss", use_cache=False),
    )  # fmt: skip
    trainer.train()
    assert math.isfinite(trainer.evaluate_levels()["eval_level_2_loss"])


def test_plain_trainer_with_a_classifier(tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    rows = tokenised(tokenizer).remove_columns(["labels"]).add_column("label", [0, 1] * 12)
    trainer = CurriculumTrainer(
        model=LlamaForSequenceClassification(config),
        args=TrainingArguments(**PLAIN),
        train_dataset=rows,
        processing_class=tokenizer,
        curriculum=CurriculumConfig(probe="full", probe_batch_size=8, use_cache=False),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(
    ("args", "error", "told"),
    [
        ({"packing": True}, NotImplementedError, "`packing=True` with a curriculum"),
        ({"padding_free": True, "max_length": None}, NotImplementedError, "`padding_free=True` with a curriculum"),
        ({"eval_packing": True}, NotImplementedError, "`eval_packing=True`"),
        ({"train_sampling_strategy": "sequential"}, ValueError, "train_sampling_strategy"),
        ({"train_sampling_strategy": "group_by_length"}, ValueError, "train_sampling_strategy"),
        ({"shuffle_dataset": True}, ValueError, "shuffle_dataset"),
        ({"auto_find_batch_size": True}, ValueError, "auto_find_batch_size"),
        ({"ignore_data_skip": True}, ValueError, "ignore_data_skip"),
        ({"accelerator_config": {"split_batches": True}}, ValueError, "split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, ValueError, "dispatch_batches"),
        ({"per_device_train_batch_size": 16}, ValueError, "[Mm]ore stages|global batch"),
        ({"max_steps": 2}, ValueError, "Invalid `max_steps`: got 2"),
    ],
)
def test_arguments_that_lose_the_order_are_refused(build, args, error, told):
    with pytest.raises(error, match=told):
        build(args=args)
    assert not os.path.exists("out/hf_curriculum")


@pytest.mark.parametrize(
    ("rows", "curriculum", "error", "told"),
    [
        (lambda: Dataset.from_dict({"prompt": [], "completion": []}), {}, ValueError, "got 0 rows"),
        (lambda: generate_corpus(4).to_iterable_dataset(), {}, NotImplementedError, "Streaming"),
        (lambda: generate_corpus(4).add_column("image", [0] * 4), {}, NotImplementedError, "Vision"),
        (lambda: generate_corpus(2), {}, ValueError, "2"),
        (lambda: Dataset.from_list([generate_corpus(1)[0]] * 24), {}, ValueError, "equal|distinct"),
        (lambda: generate_corpus(24), {"scorer": "column"}, ValueError, "Invalid `difficulty_column`: got difficulty"),
        (
            lambda: generate_corpus(24).add_column("difficulty", [float("nan")] + [1.0] * 23),
            {"scorer": "column"},
            ValueError,
            "1 missing, NaN or infinite values, the first in row 0",
        ),
        (
            lambda: generate_corpus(24).add_column("difficulty", [None] + [1.0] * 23),
            {"scorer": "column"},
            ValueError,
            "1 missing",
        ),
        (
            lambda: generate_corpus(24).add_column("difficulty", ["hard"] * 24),
            {"scorer": "column"},
            ValueError,
            "numbers, one per row",
        ),
        (
            lambda: generate_corpus(24),
            {"level_method": "thresholds", "level_thresholds": [1e6, 2e6]},
            ValueError,
            "level",
        ),
    ],
)
def test_data_without_a_plan_is_refused(build, rows, curriculum, error, told):
    with pytest.raises(error, match=told):
        build(curriculum, rows=rows())
    assert not os.path.exists("out/hf_curriculum")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scorer": "perplexity"}, "Invalid `scorer`: got perplexity"),
        ({"scorer": object()}, "an object with `name`"),
        ({"pacing": "fast"}, "Invalid `pacing`: got fast"),
        ({"level_method": "kmeans"}, "Invalid `level_method`"),
        ({"loss_normalization": "byte"}, "Invalid `loss_normalization`"),
        ({"spl_weights": "soft"}, "Invalid `spl_weights`"),
        ({"num_levels": 0}, "Invalid `num_levels`: got 0"),
        ({"probe_rounds": 1}, "Invalid `probe_rounds`"),
        ({"num_levels": 2.5}, "Invalid `num_levels`: got 2.5, expected an integer"),
        ({"scorer": int}, "an object with `name`"),
        ({"level_method": "thresholds", "level_thresholds": [float("nan"), 1.0]}, "2 increasing numbers"),
        ({"probe_epochs": 0.0}, "Invalid `probe_epochs`"),
        ({"probe_learning_rate": 0.0}, "Invalid `probe_learning_rate`"),
        ({"probe_batch_size": 0}, "Invalid `probe_batch_size`"),
        ({"lambda_start": 0.0}, "Invalid `lambda_start`"),
        ({"lambda_start": float("nan")}, "Invalid `lambda_start`"),
        ({"replay_fraction": 1.5}, r"Invalid `replay_fraction`: got 1.5, expected a float in \[0, 1\]"),
        ({"replay_fraction": 0.5, "pacing": "random"}, "no level is earlier"),
        ({"score_batch_tokens": 0}, "Invalid `score_batch_tokens`"),
        ({"level_method": "thresholds"}, "2 increasing numbers"),
        ({"level_method": "thresholds", "level_thresholds": [2.0, 1.0]}, "2 increasing numbers"),
        ({"level_thresholds": [1.0, 2.0]}, "None with `level_method='quantile'`"),
    ],
)
def test_settings_out_of_range_are_told(settings, told):
    with pytest.raises(ValueError, match=told):
        CurriculumConfig(**settings)


def test_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="pacin"):
        CurriculumConfig(pacin="staged")


def test_hyperparameter_search_is_refused(build):
    with pytest.raises(NotImplementedError, match="hyperparameter search"):
        build().train(trial={"learning_rate": 1.0})


@pytest.fixture
def checkpoint(build):
    """A run of 6 steps with a checkpoint every 2, and the arguments to make a trainer like it."""
    build(args={"save_steps": 2, "save_strategy": "steps"}).train()
    return "out/checkpoint-4"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        pytest.param({"rows": generate_corpus(24, seed=9)}, "contents of the training rows", id="other-data"),
        pytest.param({"rows": generate_corpus(27)}, "training rows: 24 there, 27 here", id="more-data"),
        pytest.param({"args": {"seed": 1}}, "seed: 42 there, 1 here", id="other-seed"),
        pytest.param(
            {"args": {"per_device_train_batch_size": 2}}, "global batch size: 4 there, 2 here", id="other-batch"
        ),
        pytest.param({"curriculum": {"pacing": "reverse"}}, "pacing: staged there, reverse here", id="other-pacing"),
        pytest.param({"args": {"num_train_epochs": 2}}, "num_train_epochs", id="more-epochs"),
    ],
)
def test_resume_with_another_plan_is_refused(build, checkpoint, changed, told):
    trainer = build(**changed)
    with pytest.raises(ValueError, match=told):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 0


def test_resume_without_a_complete_checkpoint_says_why(build, checkpoint):
    for folder in ("out/checkpoint-2", "out/checkpoint-4", "out/checkpoint-6"):
        os.unlink(f"{folder}/hf_curriculum_manifest.json")
    with pytest.raises(ValueError, match=r"checkpoint-6: hf_curriculum_manifest\.json is missing"):
        build().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="a complete checkpoint"):
        build().train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="Found none"):
        build(args={"output_dir": "elsewhere"}).train(resume_from_checkpoint=True)


def test_checkpoints_of_an_earlier_run_in_the_folder_are_not_taken(build, checkpoint):
    build(args={"max_steps": 3}).train()
    with pytest.raises(ValueError, match="of an earlier run in the same folder"):
        build().train(resume_from_checkpoint=True)
    resumed = build()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 6


def test_changed_data_set_after_building_is_refused(build):
    trainer = build()
    trainer.train_dataset = trainer.train_dataset.select(range(20))
    with pytest.raises(ValueError, match="Invalid `train_dataset`: got 20, expected 24"):
        trainer.train()


def test_last_complete_checkpoint_is_never_rotated_away(build, checkpoint, monkeypatch):
    def fail(self, output_dir):
        raise OSError(28, "No space left on device")

    trainer = build(args={"save_steps": 2, "save_strategy": "steps", "save_total_limit": 1})
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer._save_rng_state", fail)
        with pytest.raises(OSError, match="No space left"):
            trainer.train(resume_from_checkpoint=checkpoint)
    resumed = build()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
