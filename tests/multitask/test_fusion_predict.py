"""Predictions, pruning, what tasks listen to, class weights, and wrong input before any training step."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, T5Config, T5Model, TrainingArguments

from hf_curriculum.core.records import RunRecord
from hf_curriculum.multitask.attention_fusion import AttentionFusionConfig, AttentionFusionModel
from hf_curriculum.multitask.attention_fusion.attention import measure_attention
from hf_curriculum.multitask.attention_fusion.features import cache_features
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.trainers import MultiTaskTrainer


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("fusion_worker", Path(__file__).with_name("fusion_worker.py"))
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
twin = worker.twin
HEADS, LABELS, TASKS, make = twin.HEADS, twin.LABELS, twin.TASKS, twin.make
NAMES = list(HEADS)
TEXTS = ["add 3 and 4", "sort the letters", "echo", "what is 12 minus 5 plus 1", "a b c d e f g", "7"]
CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "output_dir": "out"}

both_levels = pytest.mark.parametrize("level", ["output", "layer"])


def text_model(tokenizer, level="output", stage="fusion", **options):
    model = worker.model_of(tokenizer, level, stage, **options)
    twin.randomise(model, {"fusion", "classifier"})
    return model


def one_by_one(model, tokenizer, task):
    found = []
    for text in TEXTS:
        encoded = tokenizer([text], return_tensors="pt")
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        with torch.no_grad():
            found.append(model.eval()(**inputs, tasks=task, return_attention=model.stage != "tasks"))
    return found


@both_levels
@pytest.mark.parametrize("stage", ["tasks", "fusion", "joint"])
def test_predictions_are_those_of_single_texts(tokenizer, level, stage):
    model = text_model(tokenizer, level, stage).train()
    for task, head in HEADS.items():
        found = model.predict(TEXTS, task=task, processing_class=tokenizer, batch_size=4)
        for own, expected in zip(found, one_by_one(model, tokenizer, task), strict=True):
            logits = expected.logits[0, : head.num_labels]
            several = head.problem_type == "multi_label_classification"
            scores = logits.sigmoid() if several else logits.softmax(dim=0)
            assert list(own.scores) == list(range(head.num_labels))
            assert list(own.scores.values()) == pytest.approx(scores.tolist(), rel=1e-3, abs=1e-5)
            assert own.label == (
                [n for n, logit in enumerate(logits) if logit > 0] if several else int(logits.argmax())
            )
            if stage == "tasks":
                assert own.attention is None
            else:
                assert list(own.attention) == NAMES
                assert list(own.attention.values()) == pytest.approx(
                    expected.attention[0].tolist(), rel=1e-3, abs=1e-5
                )
        model.train()


@both_levels
def test_predicting_leaves_the_mode(tokenizer, level):
    model = text_model(tokenizer, level).train()
    model.predict(TEXTS[:1], task="mood", processing_class=tokenizer)
    assert model.training
    assert model.dropout.training


def close(first, second):
    assert first.label == second.label
    assert first.scores == pytest.approx(second.scores, rel=1e-3, abs=1e-5)
    assert (first.attention is None) == (second.attention is None)
    if first.attention is not None:
        assert first.attention == pytest.approx(second.attention, rel=1e-3, abs=1e-5)


@both_levels
@pytest.mark.parametrize("stage", ["tasks", "joint"])
def test_all_tasks_at_once_are_each_task_alone(tokenizer, level, stage):
    model = text_model(tokenizer, level, stage)
    everyone = model.predict(TEXTS, processing_class=tokenizer, batch_size=4)
    for task in NAMES:
        for of_text, own in zip(everyone, model.predict(TEXTS, task=task, processing_class=tokenizer), strict=True):
            assert list(of_text) == NAMES
            close(of_text[task], own)


def test_a_task_for_each_text(tokenizer):
    model = text_model(tokenizer)
    tasks = [NAMES[number % 3] for number in range(len(TEXTS))]
    mixed = model.predict(TEXTS, task=tasks, processing_class=tokenizer)
    for text, task, own in zip(TEXTS, tasks, mixed, strict=True):
        close(own, model.predict([text], task=task, processing_class=tokenizer)[0])


def test_names_of_classes_and_thresholds_are_the_heads(tokenizer):
    heads = {
        "topic": TaskHead(3, id2label=("war", "peace", "sport")),
        "tags": TaskHead(4, "multi_label_classification", threshold=(0.01, 0.99, 0.01, 0.99)),
        "size": TaskHead(2, "regression"),
    }
    model = text_model(tokenizer, heads=heads)
    found = model.predict(TEXTS[:2], processing_class=tokenizer)
    assert set(found[0]["topic"].scores) == {"war", "peace", "sport"}
    assert found[0]["topic"].label in heads["topic"].id2label
    assert sum(found[0]["topic"].scores.values()) == pytest.approx(1.0, abs=1e-5)
    for of_text in found:
        cuts = (0.01, 0.99, 0.01, 0.99)
        assert of_text["tags"].label == [n for n, score in of_text["tags"].scores.items() if score > cuts[n]]
        assert of_text["size"].label == of_text["size"].scores
        assert len(of_text["size"].scores) == 2


def test_no_texts_have_no_predictions(tokenizer):
    model = text_model(tokenizer)
    assert model.predict([], processing_class=tokenizer) == []
    assert model.predict([], task="mood", processing_class=tokenizer) == []


def test_long_texts_are_cut(tokenizer):
    model = text_model(tokenizer)
    long = " ".join(["add 3 and 4"] * 30)
    cut = tokenizer.decode(tokenizer(long)["input_ids"][:6])
    close(
        model.predict([long], task="mood", processing_class=tokenizer, max_length=6)[0],
        model.predict([cut], task="mood", processing_class=tokenizer)[0],
    )


# ------------------------------------------------------------------ pruning


def known_attention(model):
    model.remember_attention(np.array([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]))
    return model


@pytest.mark.parametrize("task", [None, "topic", ["topic", "mood", "tags", "tags", "mood", "topic"]])
def test_pruning_to_all_tasks_is_no_pruning(tokenizer, task):
    model = known_attention(text_model(tokenizer))
    whole = model.predict(TEXTS, task=task, processing_class=tokenizer)
    kept = model.predict(TEXTS, task=task, processing_class=tokenizer, top_k=3)
    for first, second in zip(whole, kept, strict=True):
        if task is None:
            for name in NAMES:
                close(first[name], second[name])
        else:
            close(first, second)


def test_pruned_tasks_are_out_of_the_softmax(tokenizer):
    """Whom the rows of each task listen to most, and itself: topic hears tags, mood hears tags, tags hears topic."""
    model = known_attention(text_model(tokenizer))
    parts = twin.parts_of(model)
    heard = {"topic": [0, 2], "mood": [1, 2], "tags": [0, 2]}
    for task, name in enumerate(NAMES):
        found = model.predict(TEXTS, task=name, processing_class=tokenizer, top_k=2)
        for text, own in zip(TEXTS, found, strict=True):
            encoded = tokenizer([text], return_tensors="pt")
            inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
            expected = twin.run(parts, inputs, [task], listened=heard[name])
            assert list(own.attention) == [NAMES[number] for number in heard[name]]
            attention = expected.attention[0][heard[name]].tolist()
            assert list(own.attention.values()) == pytest.approx(attention, rel=1e-3)
            logits = expected.logits[0].detach()
            scores = logits.sigmoid() if name == "tags" else logits.softmax(dim=0)
            assert list(own.scores.values()) == pytest.approx(scores.tolist(), rel=1e-3, abs=1e-5)


def test_pruning_runs_no_other_lora(tokenizer):
    model = known_attention(text_model(tokenizer))
    rows = []
    handle = model.backbone.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    model.predict(TEXTS, task="mood", processing_class=tokenizer, top_k=1)
    model.predict(TEXTS, task="mood", processing_class=tokenizer, top_k=2)
    handle.remove()
    assert rows == [len(TEXTS), 2 * len(TEXTS)]


def test_what_was_remembered_is_saved(tokenizer, tmp_path):
    model = known_attention(text_model(tokenizer))
    model.save_pretrained(tmp_path)
    loaded = AttentionFusionModel.from_pretrained(tmp_path, base=worker.base_of(tokenizer))
    first, second = (one.predict(TEXTS, task="mood", processing_class=tokenizer, top_k=2) for one in (model, loaded))
    for own, expected in zip(first, second, strict=True):
        close(own, expected)


# ------------------------------------------------------------------ what tasks listen to


@both_levels
def test_measured_attention_is_the_mean_of_the_rows(tokenizer, level, tmp_path):
    model = text_model(tokenizer, level)
    rows = worker.rows_of(model, 19)
    found = measure_attention(model, rows, collator=DataCollatorWithPadding(tokenizer), batch_size=4)
    with torch.no_grad():
        outputs = [
            model(input_ids=torch.tensor([row["input_ids"]]), tasks=row["task"], return_attention=True) for row in rows
        ]
    alone = torch.cat([output.attention for output in outputs]).numpy()
    np.testing.assert_allclose(found.attention, alone, rtol=1e-4, atol=1e-5)
    tasks = np.array([NAMES.index(task) for task in rows["task"]])
    assert (found.tasks == tasks).all()
    np.testing.assert_allclose(found.mean(), [alone[tasks == task].mean(axis=0) for task in range(3)], rtol=1e-4)
    labels = np.array(rows["labels"])
    for task, name in enumerate(NAMES):
        for number, mean in enumerate(found.by_class(name)):
            own = (labels[:, number] == 1) if name == "tags" else (labels[:, 0] == number)
            own &= tasks == task
            if own.any():
                np.testing.assert_allclose(mean, alone[own].mean(axis=0), rtol=1e-4)
            else:
                assert np.isnan(mean).all()
    record = RunRecord(tmp_path)
    record.start("run")
    found.write(record, 7)
    (event,) = record.read("fusion_attention")
    assert (event["step"], event["names"], event["rows"]) == (7, NAMES, [7, 6, 6])
    np.testing.assert_allclose(event["mean"], found.mean(), rtol=1e-6)
    assert set(event["by_class"]) == set(NAMES)
    assert len(event["by_class"]["mood"]["attention"]) == 5


def test_attention_over_the_cache_is_attention_over_tokens(tokenizer, tmp_path):
    model = text_model(tokenizer)
    collator = DataCollatorWithPadding(tokenizer)
    rows = worker.rows_of(model, 13).add_column("text", ["x"] * 13)
    features = cache_features(model, rows, tmp_path, collator=collator)
    whole = measure_attention(model, rows.remove_columns("text"), collator=collator)
    np.testing.assert_allclose(measure_attention(model, features).attention, whole.attention, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ class weights


@both_levels
def test_class_weights_are_those_of_a_loop(level):
    heads = {
        "topic": TaskHead(3, class_weights=(1.0, 2.0, 5.0)),
        "mood": TaskHead(5),
        "tags": TaskHead(4, "multi_label_classification", class_weights=(1.0, 3.0, 0.5, 2.0)),
    }
    model = make(level=level, heads=heads)
    output = model(**twin.batch(), tasks=TASKS, labels=LABELS)
    rows, relative = [], [weight / (3 / (1 + 1 / 2 + 1 / 5)) for weight in (1, 2, 5)]
    for logits, label, task in zip(output.logits.double(), LABELS.tolist(), TASKS, strict=True):
        if task == 2:
            weights = (1.0, 3.0, 0.5, 2.0)
            chances = logits[:4].sigmoid()
            terms = [
                -weight * math.log(chance) if applies else -math.log(1 - chance)
                for weight, chance, applies in zip(weights, chances.tolist(), label, strict=True)
            ]
            guess = math.log(2) * sum(2 * weight / (1 + weight) for weight in weights) / 4
            rows.append(sum(terms) / 4 / guess)
        else:
            size = 3 if task == 0 else 5
            weight = relative[int(label[0])] if task == 0 else 1
            rows.append(-weight * float(logits[:size].log_softmax(0)[int(label[0])]) / math.log(size))
    assert output.loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-5)


# ------------------------------------------------------------------ wrong input


def two(**options):
    return AttentionFusionConfig(**{"task_names": ["a", "b"], "num_labels": {"a": 2, "b": 3}, **options})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: two(level="token"), "`level`: got token"),
        (lambda: two(pooling="max"), "`pooling`: got max"),
        (lambda: two(dropout=1.0), "`dropout`: got 1.0"),
        (lambda: two(fusion_dim=0), "`fusion_dim`: got 0"),
        (lambda: two(fusion_dim=2.0), "`fusion_dim`: got 2.0"),
        (lambda: two(num_attention_heads=0), "`num_attention_heads`: got 0"),
        (lambda: two(fusion_dim=10, num_attention_heads=4), "`num_attention_heads`: got 4, expected a divisor of 10"),
        (lambda: two(num_labels={"a": 2}), "`num_labels`"),
        (lambda: two(num_labels={"a": 2, "b": 1}), "`num_labels`: got 1"),
        (lambda: two(num_labels=None), "`task_names`|`num_labels`"),
        (lambda: two(task_names=None), "`task_names`"),
        (lambda: two(task_names=["a", "a"]), "`task_names`"),
        (lambda: two(task_names=["a", "b/c"], num_labels={"a": 2, "b/c": 2}), "safe as file names"),
        (lambda: two(heads={"a": TaskHead(2)}), "`heads`"),
        (lambda: AttentionFusionConfig(heads={"a": 2}), "`heads`"),
        (lambda: AttentionFusionConfig(heads={}), "`task_names`|`heads`"),
        (lambda: two(lora={"r": 4}), "`lora`"),
        (lambda: AttentionFusionModel(twin.base_model("bert"), {"level": "output"}), "`config`"),
        (lambda: AttentionFusionModel(make().backbone, two()), "adapters"),
        (lambda: AttentionFusionModel(torch.nn.Linear(2, 2), two()), "`base`"),
    ],
)
def test_wrong_configs_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_encoder_decoders_are_refused():
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        AttentionFusionModel(T5Model(T5Config(**sizes)), two())


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", False])
def test_starts_that_change_the_base_are_refused(init):
    base = twin.base_model("bert")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(NotImplementedError, match="init_lora_weights"):
        make(base=base, lora=twin.lora_config("bert", init_lora_weights=init))
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


def test_linears_that_the_base_lacks_are_refused_and_change_nothing():
    for targets in (["no_such_linear"], ["word_embeddings"]):
        base = twin.base_model("bert")
        before = [(name, type(module)) for name, module in base.named_modules()]
        with pytest.raises((ValueError, NotImplementedError)):
            make(base=base, lora=twin.lora_config("bert", target_modules=targets))
        assert [(name, type(module)) for name, module in base.named_modules()] == before


IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: model(input_ids=IDS), ValueError, "`tasks`: got None"),
        (lambda model: model(input_ids=IDS, tasks="who"), ValueError, "got who"),
        (lambda model: model(input_ids=IDS, tasks=[0, 3]), ValueError, "3"),
        (lambda model: model(input_ids=IDS, tasks=[0]), ValueError, "got 1 tasks"),
        (lambda model: model(input_ids=IDS, tasks="common"), ValueError, "one of topic, mood, tags"),
        (lambda model: model(tasks="mood"), ValueError, "`input_ids`: got None"),
        (lambda model: model.pooled_outputs(), ValueError, "`input_ids`: got None"),
        (lambda model: model.pooled_outputs(input_ids=IDS, sources=["who"]), ValueError, "got who"),
        (lambda model: model(pooled=torch.ones(2, 2, 16), tasks=[0, 1]), ValueError, "`pooled`"),
        (lambda model: model(pooled=torch.ones(2, 3, 8), tasks=[0, 1]), ValueError, "`pooled`"),
        (lambda model: model.backbone(input_ids=IDS), ValueError, "AttentionFusionModel"),
    ],
)
def test_wrong_calls_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(make(stage="fusion"))


def test_pooled_vectors_are_of_no_use_inside_layers():
    with pytest.raises(NotImplementedError, match="level `layer`"):
        make(level="layer", stage="fusion")(pooled=torch.ones(2, 3, 16), tasks=[0, 1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "who"}, ValueError, "got who"),
        ({"task": ["mood", "who"]}, ValueError, "got who"),
        ({"task": ["mood"]}, ValueError, "got 1 tasks"),
        ({"texts": "one text"}, ValueError, "`texts`: got one text"),
        ({"texts": [1, 2]}, ValueError, "`texts`"),
        ({"batch_size": 0}, ValueError, "`batch_size`: got 0"),
        ({"top_k": 0}, ValueError, "`top_k`: got 0"),
        ({"top_k": 4}, ValueError, r"`top_k`: got 4, expected an integer in \[1, 3\]"),
        ({"level": "layer", "top_k": 1}, NotImplementedError, "`top_k` at level `layer`"),
        ({"stage": "tasks", "top_k": 1}, NotImplementedError, "`top_k` in stage `tasks`"),
    ],
)
def test_wrong_predictions_are_named(tokenizer, options, error, message):
    model = text_model(tokenizer, options.pop("level", "output"), options.pop("stage", "fusion"))
    if model.level == "output":
        known_attention(model)
    with pytest.raises(error, match=message):
        model.predict(**{"texts": TEXTS[:2], "processing_class": tokenizer, **options})


def test_pruning_by_unknown_attention_is_refused(tokenizer):
    with pytest.raises(ValueError, match="remember_attention"):
        text_model(tokenizer).predict(TEXTS, task="mood", processing_class=tokenizer, top_k=2)


GOOD = {"topic": [2.0, -100, -100, -100], "mood": [4.0, -100, -100, -100], "tags": [1.0, 0, 0, 1]}


def trainer_on(model, labels, tasks=("topic", "mood", "tags"), **columns):
    rows = {"input_ids": [[3, 4, 5]] * len(labels), "labels": labels, "task": list(tasks), **columns}
    return MultiTaskTrainer(model=model, args=TrainingArguments(**CPU), train_dataset=Dataset.from_dict(rows))


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("topic", [3.0, -100, -100, -100], "row 0, of task topic"),
        ("topic", [-1.0, -100, -100, -100], "of task topic"),
        ("mood", [5.0, -100, -100, -100], "of task mood"),
        ("mood", [0.5, -100, -100, -100], "of task mood"),
        ("mood", [math.nan, -100, -100, -100], "of task mood"),
        ("tags", [1.0, math.nan, 0, 0], "of task tags"),
        ("tags", [1.0, 2.0, 0, 0], "of task tags"),
        ("tags", [1.0, 0, -100, 0], "of task tags"),
        ("topic", None, "row 0"),
        ("topic", [1.0], "row 0|row 1"),
        ("who", [1.0, -100, -100, -100], "got who"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_training(task, label, message):
    names = [task, *(name for name in NAMES if name != task)][:3]
    labels = [label, *(GOOD[name] for name in names[1:])]
    with pytest.raises(ValueError, match=message):
        trainer_on(make(stage="tasks"), labels, names)


@both_levels
@pytest.mark.parametrize("stage", ["tasks", "joint", "fusion"])
def test_a_task_without_data_is_told(level, stage, capsys):
    """Its LoRA and its head would stay at random without a word."""
    model = make(level=level, stage=stage)
    trainer_on(model, [GOOD["topic"], GOOD["mood"]], ["topic", "mood"])
    assert "tags" in "".join(capsys.readouterr())


def test_cached_features_are_refused_where_they_are_stale(tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion")
    features = cache_features(model, worker.rows_of(model, 6), tmp_path, collator=DataCollatorWithPadding(tokenizer))

    def trainer():
        return MultiTaskTrainer(
            model=model,
            args=TrainingArguments(**CPU),
            train_dataset=features.rows,
            data_collator=features.collator,
        )

    trainer()
    for stage in ("tasks", "joint"):
        model.set_stage(stage)
        with pytest.raises(NotImplementedError, match=f"stage '{stage}'"):
            trainer()
    model.set_stage("fusion")
    twin.randomise(model, {"lora"}, seed=9)
    with pytest.raises(ValueError, match="cached features of other models"):
        trainer()


def test_level_layer_has_no_cache(tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "layer", "fusion")
    with pytest.raises(NotImplementedError, match="level `layer`"):
        cache_features(model, worker.rows_of(model, 6), tmp_path, collator=DataCollatorWithPadding(tokenizer))


@pytest.mark.parametrize("rows", [{"input_ids": []}, {"text": ["a"]}])
def test_rows_without_tokens_are_not_cached(tokenizer, tmp_path, rows):
    model = worker.model_of(tokenizer, "output", "fusion")
    with pytest.raises(ValueError, match="tokenised rows"):
        cache_features(model, Dataset.from_dict(rows), tmp_path, collator=DataCollatorWithPadding(tokenizer))
    assert list(tmp_path.iterdir()) == []


def test_attention_is_measured_in_a_stage_with_fusion(tokenizer):
    model = worker.model_of(tokenizer, "output", "tasks")
    with pytest.raises(ValueError, match="`stage`: got tasks"):
        measure_attention(model, worker.rows_of(model, 3), collator=DataCollatorWithPadding(tokenizer))
