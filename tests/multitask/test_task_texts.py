"""Texts and labels of several tasks out of one data set: what is read, and what is refused."""

import pytest
from datasets import Dataset

from hf_curriculum.multitask.task_texts import TaskTexts, heads_of_splits, read_texts, several_label_tasks


COLUMNS = {"text": "text", "task": "task", "label": "label"}
NAMES = ["topic", "tags"]


def rows_of(labels, tasks=("topic", "topic", "tags", "tags"), texts=("a", "b", "c", "d")):
    return Dataset.from_dict({"text": list(texts), "task": list(tasks), "label": labels})


@pytest.mark.parametrize(
    ("labels", "separator"),
    [
        ([["art"], ["law"], ["new", "old"], []], ","),
        (["art", "law", "new, old", ""], ","),
        (["art", "law", "new|old|", " "], "|"),
    ],
    ids=["lists", "commas", "bars"],
)
def test_one_label_or_several_are_read_by_task(labels, separator):
    found = read_texts(rows_of(labels), NAMES, COLUMNS, multi_label_tasks=["tags"], separator=separator)
    assert found.labels == ["art", "law", ["new", "old"], []]
    assert (found.texts, found.tasks, len(found)) == (["a", "b", "c", "d"], ["topic", "topic", "tags", "tags"], 4)


def test_tasks_may_be_ids_and_labels_numbers():
    found = read_texts(rows_of([0, 1, 1, 0], tasks=[0, 1, 0, 1]), NAMES, COLUMNS)
    assert (found.tasks, found.labels) == (["topic", "tags", "topic", "tags"], [0, 1, 1, 0])


def test_tasks_with_other_than_one_label_in_a_list_are_found():
    assert several_label_tasks(rows_of([["a"], ["b"], ["c"], []]), "label", "task", NAMES) == ["tags"]
    assert several_label_tasks(rows_of([["a", "b"], ["b"], ["c"], ["d"]]), "label", "task", NAMES) == ["topic"]
    assert several_label_tasks(rows_of(["a", "b", "c,d", ""]), "label", "task", NAMES) == []


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([["a"], ["b", "c"], [], []], {"multi_label_tasks": ["tags"]}, "row 1, of task topic.*multi-label tasks"),
        ([["a"], [], [], []], {"multi_label_tasks": ["tags"]}, r"got \[\] in row 1"),
        ([["a"], ["b"], None, []], {"multi_label_tasks": ["tags"]}, "got None in row 2, of task tags.*may be empty"),
        ([["a"], ["b"], ["x", None], []], {"multi_label_tasks": ["tags"]}, "row 2, of task tags"),
        (["a", None, "b", "c"], {}, "`eval_dataset, column label`: got None in row 1"),
        ([0.5, 1.5, float("nan"), 0.0], {}, "got nan in row 2"),
        (["a", "b", "c", "d"], {"multi_label_tasks": ["tag"]}, r"`multi_label_tasks`: got \['tag'\]"),
    ],
)
def test_labels_that_cannot_be_read_are_named(labels, options, message):
    with pytest.raises(ValueError, match=message):
        read_texts(rows_of(labels), NAMES, COLUMNS, name="eval_dataset", **options)


def test_missing_columns_texts_and_unknown_tasks_are_named():
    rows = rows_of(["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="a column `body`"):
        read_texts(rows, NAMES, {**COLUMNS, "text": "body"})
    with pytest.raises(ValueError, match=r"column text`: got '  ' in row 1"):
        read_texts(rows_of(["a"] * 4, texts=("a", "  ", "c", "d")), NAMES, COLUMNS)
    with pytest.raises(ValueError, match="`tasks`: got tags"):
        read_texts(rows, ["topic"], COLUMNS)


def test_heads_know_the_classes_of_all_splits_and_the_weights_of_the_training_rows():
    train = TaskTexts(["x"] * 6, ["topic"] * 4 + ["tags"] * 2, ["a", "a", "a", "b", ["n"], []])
    test = TaskTexts(["x"] * 2, ["topic", "tags"], ["z", ["m"]])
    heads = heads_of_splits(NAMES, train, test, class_weights="balanced", threshold=0.3)
    topic, tags = heads["topic"], heads["tags"]
    assert topic.id2label == ("a", "b", "z")
    assert topic.class_weights == pytest.approx((4 / 6, 2.0, 1.0))
    assert (tags.id2label, tags.class_weights) == (("m", "n"), (1.0, 1.0))
    assert (tags.threshold, topic.threshold) == (0.3, 0.5)
    assert heads_of_splits(NAMES, train)["topic"].id2label == ("a", "b")
    assert heads_of_splits(NAMES, train)["topic"].class_weights is None


def test_regressions_are_in_units_of_the_training_rows():
    train = TaskTexts(["x"] * 4, ["topic", "topic", "tags", "tags"], [1.0, 3.0, 0, 1])
    test = TaskTexts(["x"], ["topic"], [900.0])
    assert heads_of_splits(NAMES, train, test)["topic"].target_scale == pytest.approx(1.0)


def test_a_task_without_training_rows_is_refused():
    train, test = TaskTexts(["x"], ["topic"], ["a"]), TaskTexts(["x"], ["tags"], ["b"])
    with pytest.raises(ValueError, match="no label of task tags"):
        heads_of_splits(NAMES, train, test)
