"""Scores, pruning and examples of a fused model, on predictions made by hand."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from hf_curriculum.multitask.attention_fusion import report
from hf_curriculum.multitask.attention_fusion.report import (
    TaskScores,
    class_decisions,
    pruned_accuracies,
    score_tasks,
    show_examples,
    show_pruning,
    show_scores,
)
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.multitask.task_texts import TaskTexts


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("fusion_worker", Path(__file__).with_name("fusion_worker.py"))
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

LOWEST = float(np.finfo(np.float32).min)
NONE = -100.0
TEXTS = ["add 3 and 4", "sort the letters", "echo", "what is 12 minus 5", "a b c", "7"]
HEADS = {
    "topic": TaskHead(2, id2label=("war", "peace")),
    "tags": TaskHead(3, "multi_label_classification", threshold=(0.5, 0.8, 0.5)),
    "size": TaskHead(1, "regression"),
    "idle": TaskHead(2),
}


@pytest.fixture
def tables(monkeypatch):
    """What is shown: titles, headings and cells of tables, and lines."""
    shown = []
    monkeypatch.setattr(report, "show_table", lambda *parts: shown.append(parts))
    monkeypatch.setattr(report, "say", shown.append)
    return shown


def predicted(logits, labels, **losses):
    metrics = {f"test_{name}_loss": loss for name, loss in losses.items()}
    return PredictionOutput(np.array(logits, np.float32), np.array(labels), metrics)


def by_hand():
    """Two rows of topic, one of them right; three of tags, two right; one of size; none of idle."""
    tasks = ["topic", "tags", "tags", "size", "topic", "tags"]
    logits = [[2, 1, LOWEST], [1, 1, -1], [-1, 2, 3], [0.5, LOWEST, LOWEST], [0, 3, LOWEST], [-1, -1, -1]]
    labels = [[0, NONE, NONE], [1, 0, 0], [0, 1, 0], [0.5, NONE, NONE], [0, NONE, NONE], [0, 0, 0]]
    return tasks, predicted(logits, labels, topic=0.25, tags=0.5, size=1.5)


def share_of_equal(found, wanted):
    return float((found == wanted).mean())


# ------------------------------------------------------------------ decisions


def test_one_class_is_the_highest_of_the_task_s_own_outputs():
    logits = np.array([[2.0, 1.0, 9.0], [0.0, 1.0, 9.0], [3.0, 0.0, 9.0]])
    found, wanted = class_decisions(TaskHead(2), logits, np.array([[0.0, NONE], [1.0, NONE], [1.0, NONE]]))
    assert found.tolist() == [0, 1, 0]
    assert wanted.tolist() == [0, 1, 1]
    assert wanted.dtype == np.int64


@pytest.mark.parametrize("threshold", [0.8, (0.8, 0.3)])
def test_several_classes_lie_above_the_threshold(threshold):
    head = TaskHead(2, "multi_label_classification", threshold=threshold)
    chances = np.array([[0.81, 0.79], [0.79, 0.29], [0.5, 0.31]])
    logits = np.concatenate([np.log(chances / (1 - chances)), np.full((3, 1), 99.0)], axis=1)
    labels = np.array([[1.0, 0.0, NONE]] * 3)
    found, wanted = class_decisions(head, logits, labels)
    cuts = np.array(threshold)
    assert found.tolist() == (chances > cuts).astype(int).tolist()
    assert wanted.tolist() == [[1, 0]] * 3


def test_a_probability_at_the_threshold_is_not_above_it():
    found, _ = class_decisions(TaskHead(1, "multi_label_classification"), np.array([[0.0]]), np.array([[1.0]]))
    assert found.tolist() == [[0]]


def test_a_regression_decides_for_no_class():
    assert class_decisions(TaskHead(1, "regression"), np.array([[0.5]]), np.array([[0.5]])) is None


# ------------------------------------------------------------------ scores


def test_scores_of_each_kind_of_task():
    tasks, output = by_hand()
    scores = score_tasks(HEADS, output, tasks, f1=share_of_equal)
    # The second label of the first row of tags needs a probability of 0.8; its logit of 1 is one of 0.73.
    assert scores == {
        "topic": TaskScores(2, 0.5, 0.5, 0.25),
        "tags": TaskScores(3, pytest.approx(2 / 3), pytest.approx(8 / 9), 0.5),
        "size": TaskScores(1, None, None, 1.5),
    }
    assert list(scores) == ["topic", "tags", "size"], "a task without rows has no scores"


def test_without_a_rule_there_is_no_f1():
    tasks, output = by_hand()
    assert [score.f1 for score in score_tasks(HEADS, output, tasks).values()] == [None] * 3


def test_rows_without_a_label_do_not_count():
    output = predicted([[2, 1], [2, 1], [1, 2]], [NONE, 0, 0], topic=0.5)
    assert score_tasks({"topic": TaskHead(2)}, output, ["topic"] * 3)["topic"].rows == 2
    assert score_tasks({"topic": TaskHead(2)}, output, ["topic"] * 3)["topic"].accuracy == 0.5
    assert score_tasks({"topic": TaskHead(2)}, predicted([[2, 1]], [NONE]), ["topic"]) == {}


def test_outputs_beside_the_logits_are_left_alone():
    logits, other = np.array([[2.0, 1.0]]), np.zeros((1, 5))
    scores = score_tasks({"a": TaskHead(2)}, PredictionOutput((logits, other), np.array([0]), None), ["a"])
    assert scores["a"] == TaskScores(1, 1.0, None, None)


def test_tasks_must_be_those_of_the_rows():
    tasks, output = by_hand()
    with pytest.raises(ValueError, match="`tasks`: got 5 of them, expected 6"):
        score_tasks(HEADS, output, tasks[:-1])


class Model:
    """As much of a fused model as scores need."""

    heads = HEADS

    def __init__(self, stage):
        self.stage, self.stages = stage, []

    def set_stage(self, stage):
        self.stage = stage
        self.stages.append(stage)


def trainer_of(model):
    """Predicts in stage `tasks` what was made by hand, and otherwise topic without an error."""

    def predict(rows):
        tasks, output = by_hand()
        assert rows["task"][:] == tasks
        if model.stage != "tasks":
            output.predictions[4] = [3, 0, LOWEST]
            output.metrics["test_topic_loss"] = 0.125
        return output

    return SimpleNamespace(predict=predict)


def shown_scores(stage, tables, **options):
    model = Model(stage)
    rows = Dataset.from_dict({"task": by_hand()[0]})
    show_scores(trainer_of(model), model, rows, f1=share_of_equal, **options)
    assert model.stage == stage
    (_, columns, cells), *lines = tables
    assert len(columns) == len(cells[0]) == 10
    return model, {row[0]: row[1:] for row in cells}, lines


def test_own_models_are_held_against_the_fused(tables):
    counts = {"topic": 7, "tags": 8, "size": 9, "idle": 0}
    model, table, lines = shown_scores("fusion", tables, trained_on=counts)
    assert model.stages == ["tasks", "fusion", "fusion", "fusion"]
    assert table["topic"] == [7, 2, 0.5, 1.0, "+0.500", 0.5, 1.0, 0.25, 0.125]
    two = pytest.approx(2 / 3)
    assert table["tags"] == [8, 3, two, two, "+0.000", pytest.approx(8 / 9), pytest.approx(8 / 9), 0.5, 0.5]
    assert table["size"] == [9, 1, None, None, None, None, None, 1.5, 1.5]
    assert table["idle"] == [0, *[None] * 8]
    assert lines == ["Fusion: 1 task(s) better, 0 worse, accuracy +0.250 in the mean."]


def test_a_model_whose_parts_learned_together_has_no_own_ones(tables):
    model, table, lines = shown_scores("joint", tables)
    assert set(model.stages) == {"joint"}
    assert table["topic"] == [None, 2, None, 1.0, None, None, 1.0, None, 0.125]
    assert lines == []


def test_before_the_fusion_there_is_no_fused_one(tables):
    model, table, lines = shown_scores("tasks", tables)
    assert set(model.stages) == {"tasks"}
    assert table["topic"] == [None, 2, 0.5, None, None, 0.5, None, 0.25, None]
    assert lines == []


def test_the_stage_is_left_as_it_was_where_predicting_fails():
    def fail(rows):
        raise RuntimeError("out of memory")

    model = Model("fusion")
    with pytest.raises(RuntimeError, match="out of memory"):
        show_scores(SimpleNamespace(predict=fail), model, Dataset.from_dict({"task": ["topic"]}))
    assert model.stage == "fusion"


# ------------------------------------------------------------------ pruning and examples


@pytest.fixture
def model(tokenizer):
    heads = {name: HEADS[name] for name in ("topic", "tags", "size", "idle")}
    made = worker.model_of(tokenizer, "output", "fusion", heads=heads)
    worker.twin.randomise(made, {"fusion", "classifier"})
    made.remember_attention(np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]]))
    return made


def held_out(model, tokenizer, top_k=None):
    """Rows whose labels are what the model predicts, but for the first of topic and of tags."""
    tasks = ["topic", "tags", "size", "topic", "tags", "topic"]
    found = model.predict(TEXTS, task=tasks, processing_class=tokenizer, top_k=top_k)
    labels = [prediction.label for prediction in found]
    labels[0] = "war" if labels[0] == "peace" else "peace"
    labels[1] = [] if labels[1] else [0]
    # A class by its id, and several in another order.
    labels[3] = HEADS["topic"].id2label.index(labels[3])
    labels[4] = labels[4][::-1]
    return TaskTexts(TEXTS, tasks, labels)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_accuracy_of_a_pruned_model_is_the_share_of_right_rows(model, tokenizer, top_k):
    rows = held_out(model, tokenizer, top_k)
    found = pruned_accuracies(model, tokenizer, rows, top_k)
    assert found == {"topic": pytest.approx(2 / 3), "tags": 0.5, "size": None, "idle": None}


def test_pruning_is_shown_for_each_k(model, tokenizer, tables):
    rows = held_out(model, tokenizer)
    show_pruning(model, tokenizer, rows)
    ((title, columns, cells),) = tables
    assert title.startswith("Accuracy on 6 held-out rows")
    assert columns == ("k", *HEADS)
    assert [row[0] for row in cells] == [1, 2, 3, 4]
    for k, *accuracies in cells:
        assert accuracies == list(pruned_accuracies(model, tokenizer, rows, k).values())


def test_pruning_of_many_tasks_is_shown_for_powers_of_two(model, tokenizer, tables, monkeypatch):
    monkeypatch.setattr(report, "MOST_LINES", 3)
    show_pruning(model, tokenizer, held_out(model, tokenizer))
    assert [row[0] for row in tables[0][2]] == [1, 2, 4]


def test_so_many_rows_are_drawn_and_always_the_same(model, tokenizer, tables):
    rows = held_out(model, tokenizer)
    asked = []
    original = model.predict
    model.predict = lambda texts, **options: asked.append(texts) or original(texts, **options)
    for _ in range(2):
        show_pruning(model, tokenizer, rows, max_rows=4)
    assert len(asked) == 8
    assert all(texts == asked[0] for texts in asked)
    assert len(asked[0]) == 4
    assert [text for text in TEXTS if text in asked[0]] == asked[0], "in their order"
    assert "on 4 held-out rows" in tables[0][0]
    with pytest.raises(ValueError, match="`max_rows`: got 0"):
        show_pruning(model, tokenizer, rows, max_rows=0)


def test_pruning_is_refused_where_nothing_is_left_out(model, tokenizer):
    rows = held_out(model, tokenizer)
    model.set_stage("tasks")
    with pytest.raises(NotImplementedError, match="stage `tasks`"):
        show_pruning(model, tokenizer, rows)


def test_examples_are_the_first_rows_of_each_task(model, tokenizer, tables):
    rows = held_out(model, tokenizer)
    show_examples(model, tokenizer, rows)
    ((_, columns, cells),) = tables
    assert columns == ("text", "task", "label", "predicted", "listens to")
    assert [row[:2] for row in cells] == [
        [TEXTS[place], rows.tasks[place]] for place in (0, 3, 1, 4, 2)
    ]  # two of topic, two of tags, the one of size
    own = model.predict([TEXTS[0]], task="topic", processing_class=tokenizer)[0]
    assert cells[0][2:4] == [rows.labels[0], own.label]
    heard = sorted(own.attention.items(), key=lambda pair: -pair[1])[:3]
    assert cells[0][4] == ", ".join(f"{name} {share:.2f}" for name, share in heard)


def test_examples_without_a_class_or_a_fusion_say_so(model, tokenizer, tables):
    model.set_stage("tasks")
    show_examples(model, tokenizer, TaskTexts(["echo", "7"], ["tags", "tags"], [[], [0, 2]]), rows_per_task=1)
    show_examples(model, tokenizer, TaskTexts(["add 3 and 4 " * 20], ["tags"], [[0, 2]]), max_length=8)
    (first,), (second,) = tables[0][2], tables[1][2]
    assert (first[2], first[4]) == ("(none)", None)
    assert second[2] == "0, 2"
    assert len(second[0]) <= 50
