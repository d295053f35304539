"""All three stages through the Trainer: what moves and what does not, resumed runs, and cached features."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding, TrainingArguments

from hf_curriculum.multitask.attention_fusion import AttentionFusionModel
from hf_curriculum.multitask.attention_fusion.features import cache_features
from hf_curriculum.trainers import MultiTaskTrainer


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("fusion_worker", Path(__file__).with_name("fusion_worker.py"))
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
twin = worker.twin
WORKER = Path(worker.__file__)
CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}

both_levels = pytest.mark.parametrize("level", ["output", "layer"])


@pytest.fixture(scope="module")
def collator(tokenizer):
    return DataCollatorWithPadding(tokenizer)


def train(model, rows, collator, folder, resume=None, **args):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    trainer = MultiTaskTrainer(
        model=model,
        args=TrainingArguments(**{**CPU, **settings, "output_dir": str(folder), "logging_steps": 1, **args}),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(model, before):
    """Which kinds of parameters moved: some did, none did."""
    kinds = twin.kinds_of(model)
    found = {}
    for name, value in model.named_parameters():
        found.setdefault(kinds[name], []).append(not torch.equal(value, before[name]))
    return {kind: any(moves) for kind, moves in found.items()}


@pytest.mark.slow
@both_levels
def test_each_stage_moves_its_own_parts_and_no_other_bit(level, collator, tokenizer, tmp_path):
    model = worker.model_of(tokenizer, level, "tasks", lora_dropout=0.1)
    rows = worker.rows_of(model, 24)
    for stage, learning in {
        "tasks": {"lora", "own_classifier"},
        "fusion": {"fusion", "classifier"},
        "joint": {"lora", "fusion", "classifier"},
    }.items():
        model.set_stage(stage)
        before = snapshot(model)
        trainer = train(model, rows, collator, tmp_path / stage, weight_decay=0.1, num_train_epochs=2)
        found = moved(model, before)
        assert {kind for kind, moves in found.items() if moves} == learning, stage
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 12
        assert all(np.isfinite(losses))
        evaluated = trainer.evaluate(rows)
        assert {f"eval_{name}_loss" for name in model.heads} <= set(evaluated)


@pytest.mark.slow
@both_levels
def test_the_stages_learn(level, collator, tokenizer, tmp_path):
    model = worker.model_of(tokenizer, level, "tasks", random=False)
    rows = worker.rows_of(model, 48)
    losses = []
    for stage in ("tasks", "fusion", "joint"):
        model.set_stage(stage)
        trainer = train(model, rows, collator, tmp_path / stage, num_train_epochs=6, per_device_train_batch_size=8)
        losses.append(trainer.evaluate(rows)["eval_loss"])
    assert losses[0] < 0.9
    assert losses[2] < losses[1] < losses[0]


def features_of(model, rows, folder, collator, **kwargs):
    return cache_features(model, rows, folder, collator=collator, **kwargs)


def collated(features, places):
    """As the Trainer makes batches: the task column is taken out before."""
    rows = features.rows.remove_columns("task")
    return features.collator([rows[place] for place in places])


def test_training_on_the_cache_equals_training_on_tokens(collator, tokenizer, tmp_path):
    """Dropout in the base and in the LoRAs is on, and must not matter: their vectors are of frozen parts."""
    outcomes = []
    for cached in (False, True):
        model = worker.model_of(tokenizer, "output", "fusion", lora_dropout=0.3, base_dropout=0.2).train()
        rows, collate = worker.rows_of(model, 24), collator
        if cached:
            features = features_of(model, rows, tmp_path / "cache", collator)
            rows, collate = features.rows, features.collator
        trainer = train(model, rows, collate, tmp_path / str(cached), num_train_epochs=3)
        outcomes.append((snapshot(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    np.testing.assert_allclose(outcomes[1][1], outcomes[0][1], rtol=1e-4)
    for name, value in outcomes[0][0].items():
        torch.testing.assert_close(outcomes[1][0][name], value, rtol=1e-3, atol=1e-5)


def test_cached_vectors_are_the_models(collator, tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion", lora_dropout=0.3, base_dropout=0.2).train()
    rows = worker.rows_of(model, 11)
    features = features_of(model, rows, tmp_path / "cache", collator, batch_size=4)
    assert len(features.rows) == 11
    assert model.training
    batch = collated(features, [3, 0, 10])
    assert batch["pooled"].shape == (3, 3, 16)
    assert batch["labels"].tolist() == [rows[index]["labels"] for index in (3, 0, 10)]
    model.eval()
    for place, index in enumerate((3, 0, 10)):
        with torch.no_grad():
            own = model.pooled_outputs(input_ids=torch.tensor([rows[index]["input_ids"]]))[0]
        torch.testing.assert_close(batch["pooled"][place], own, rtol=1e-5, atol=1e-5)
    assert list(features.rows["task"]) == list(rows["task"])
    assert list(features.rows["labels"]) == list(rows["labels"])


def test_a_cache_is_built_once(collator, tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = worker.rows_of(model, 9)
    first = features_of(model, rows, tmp_path / "cache", collator)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    calls = []
    handle = model.backbone.register_forward_hook(lambda *args: calls.append(1))
    again = features_of(model, rows, tmp_path / "cache", collator)
    handle.remove()
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == files
    pair = [collated(one, range(9))["pooled"] for one in (first, again)]
    assert (first.seconds > 0, again.seconds) == (True, 0)
    assert torch.equal(*pair)


@pytest.mark.parametrize("kind", ["lora", "base"])
def test_a_cache_of_other_weights_is_not_taken(collator, tokenizer, tmp_path, kind):
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = worker.rows_of(model, 9)
    before = collated(features_of(model, rows, tmp_path / "cache", collator), range(9))["pooled"]
    kinds = twin.kinds_of(model)
    changed = next(value for name, value in model.named_parameters() if kinds[name] == kind)
    with torch.no_grad():
        changed.add_(torch.randn(changed.shape))
    check_fresh(lambda: features_of(model, rows, tmp_path / "cache", collator), model, rows)
    after = collated(features_of(model, rows, tmp_path / "cache", collator), range(9))["pooled"]
    assert not torch.allclose(after, before, atol=1e-3)


def check_fresh(cache, model, rows):
    """The vectors are this model's."""
    found = collated(cache(), range(len(rows)))["pooled"]
    with torch.no_grad():
        for index in range(len(rows)):
            own = model.eval().pooled_outputs(input_ids=torch.tensor([rows[index]["input_ids"]]))[0]
            torch.testing.assert_close(found[index], own, rtol=1e-5, atol=1e-5)


def test_a_cache_of_other_rows_is_not_taken(collator, tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion")
    features_of(model, worker.rows_of(model, 9), tmp_path / "cache", collator)
    for rows in (
        worker.rows_of(model, 9, seed=7),
        worker.rows_of(model, 8),
        worker.rows_of(model, 9).select(range(8, -1, -1)),
    ):
        check_fresh(lambda rows=rows: features_of(model, rows, tmp_path / "cache", collator), model, rows)


def test_a_cache_of_another_pooling_is_not_taken(collator, tokenizer, tmp_path):
    first = worker.model_of(tokenizer, "output", "fusion", pooling="mean")
    rows = worker.rows_of(first, 9)
    features_of(first, rows, tmp_path / "cache", collator)
    second = worker.model_of(tokenizer, "output", "fusion", pooling="cls")
    check_fresh(lambda: features_of(second, rows, tmp_path / "cache", collator), second, rows)


def test_a_cache_lasts_while_the_fusion_learns(collator, tokenizer, tmp_path):
    """Heads and fusion are no part of what is cached: trained, they find the cache again."""
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = worker.rows_of(model, 12)
    features = features_of(model, rows, tmp_path / "cache", collator)
    train(model, features.rows, features.collator, tmp_path / "run")
    calls = []
    handle = model.backbone.register_forward_hook(lambda *args: calls.append(1))
    features_of(model, rows, tmp_path / "cache", collator)
    handle.remove()
    assert not calls


def test_labels_may_change_under_a_cache(collator, tokenizer, tmp_path):
    """Labels come from the rows that are given, never from the disk."""
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = worker.rows_of(model, 9)
    features_of(model, rows, tmp_path / "cache", collator)
    none = [[-100.0] * 4] * 9
    relabelled = rows.remove_columns("labels").add_column("labels", none)
    assert features_of(model, relabelled, tmp_path / "cache", collator).rows["labels"][:] == none


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_cache_is_rebuilt(collator, tokenizer, tmp_path, after):
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = worker.rows_of(model, 12)
    passes = []

    def stop(*args):
        passes.append(1)
        if len(passes) > after:
            raise KeyboardInterrupt

    handle = model.backbone.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        features_of(model, rows, tmp_path / "cache", collator, batch_size=4)
    handle.remove()
    check_fresh(lambda: features_of(model, rows, tmp_path / "cache", collator, batch_size=4), model, rows)


def test_a_truncated_cache_is_refused(collator, tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = worker.rows_of(model, 12)
    features_of(model, rows, tmp_path / "cache", collator)
    largest = max(
        (path for path in (tmp_path / "cache").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-40])
    with pytest.raises(ValueError, match="Delete the folder"):
        features_of(model, rows, tmp_path / "cache", collator)


@pytest.mark.parametrize(
    ("level", "stage", "cached"),
    [
        ("output", "fusion", True),
        *[
            pytest.param(*values, False, marks=pytest.mark.slow)
            for values in [
                ("output", "tasks"),
                ("output", "fusion"),
                ("output", "joint"),
                ("layer", "tasks"),
                ("layer", "fusion"),
                ("layer", "joint"),
            ]
        ],
    ],
)
def test_resumed_is_bit_equal_to_uninterrupted(level, stage, cached, collator, tokenizer, tmp_path):
    finals = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-4")):
        # With dropout wherever there is one: the resumed run draws the same masks.
        model = worker.model_of(tokenizer, level, stage, lora_dropout=0.1, base_dropout=0.1, dropout=0.1)
        rows, collate = worker.rows_of(model, 21), collator
        if cached:
            features = features_of(model, rows, tmp_path / "cache", collator)
            rows, collate = features.rows, features.collator
        folder = tmp_path / "run" if resume is None else tmp_path / "again"
        trainer = train(
            model, rows, collate, folder, resume=resume, num_train_epochs=2, save_strategy="steps", save_steps=4
        )
        # The Trainer's `train_loss` is of the steps since the resume.
        logs = [
            {key: value for key, value in entry.items() if key.endswith("loss") and key != "train_loss"}
            for entry in trainer.state.log_history
        ]
        # In stage joint the heads of the tasks alone become those of the fused outputs when the stage ends.
        model.set_stage("tasks")
        finals.append((snapshot(model), logs))
    assert trainer.state.global_step == 11
    for name, value in finals[0][0].items():
        assert torch.equal(finals[1][0][name], value), name
    assert finals[1][1] == finals[0][1]
    start = worker.model_of(tokenizer, level, stage)
    assert any(moved(start, finals[0][0]).values())


def test_a_checkpoint_is_a_model_folder_without_its_base(collator, tokenizer, tmp_path):

    model = worker.model_of(tokenizer, "output", "joint")
    train(model, worker.rows_of(model, 8), collator, tmp_path, save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoint-2"
    assert not (folder / "model.safetensors").exists()
    loaded = AttentionFusionModel.from_pretrained(folder, base=worker.base_of(tokenizer))
    inputs = {"input_ids": torch.tensor([[3, 4, 5]] * 5)}
    loaded.set_stage("joint")
    with torch.no_grad():
        expected = model.eval()(**inputs, tasks=twin.TASKS).logits
        torch.testing.assert_close(loaded(**inputs, tasks=twin.TASKS).logits, expected, rtol=0, atol=1e-7)


@pytest.mark.slow
@both_levels
def test_the_best_model_is_loaded_at_the_end(level, collator, tokenizer, tmp_path):
    model = worker.model_of(tokenizer, level, "joint")
    rows = worker.rows_of(model, 16)
    trainer = MultiTaskTrainer(
        model=model,
        args=TrainingArguments(
            **CPU,
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=3,
            learning_rate=0.1 if level == "layer" else 0.5,  # too high, so that the best is not the last
            lr_scheduler_type="constant",
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.slow
@both_levels
def test_tasks_without_rows_in_a_step_stay_where_they_are(level, collator, tokenizer, tmp_path):
    """Momentum and weight decay move no LoRA and no head of a task that the data do not have."""
    model = worker.model_of(tokenizer, level, "tasks")
    rows = worker.rows_of(model, 24).filter(lambda row: row["task"] != "mood")
    before = twin.parts_of(model).leaves()
    train(model, rows, collator, tmp_path, weight_decay=0.1)
    after = twin.parts_of(model).leaves()
    for name, value in after.items():
        if name.startswith("lora.") and name.split(".")[-2] == "1":
            assert torch.equal(value, before[name]), name
        elif name.startswith("lora."):
            assert not torch.equal(value, before[name]), name
    assert torch.equal(after["classifier.weight"][3:8], before["classifier.weight"][3:8])
    assert not torch.equal(after["classifier.weight"][:3], before["classifier.weight"][:3])
