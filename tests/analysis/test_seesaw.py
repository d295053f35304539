import math
import os

import pytest

from hf_curriculum.analysis.seesaw import Seesaw, show_seesaw
from hf_curriculum.core.metrics import seesaw_summary


@pytest.fixture
def metric(tmp_path):
    return Seesaw(cache_dir=str(tmp_path))


TOGETHER, ALONE, NAMES = [0.75, 0.5, 0.25, 0.5], [0.5, 0.625, 0.25, 1.0], ["a", "b", "c", "d"]


def test_metric_names_who_gained_and_who_lost(metric):
    found = metric.compute(predictions=TOGETHER, references=ALONE, task_names=NAMES)
    assert found == {
        "changes": {"a": 0.25, "b": -0.125, "c": 0.0, "d": -0.5},
        "mean": -0.09375,
        "relative_mean": (0.5 - 0.2 + 0.0 - 0.5) / 4,
        "gained": ["a"],
        "lost": ["b", "d"],
        "worst_task": "d",
        "worst_change": -0.5,
    }
    assert type(found["mean"]) is float


def test_a_fall_of_a_loss_is_a_gain(metric):
    found = metric.compute(predictions=TOGETHER, references=ALONE, higher_is_better=False)
    assert found["gained"] == ["1", "3"]
    assert found["worst_task"] == "0"
    mixed = metric.compute(predictions=TOGETHER, references=ALONE, higher_is_better=[True, False, True, False])
    assert (mixed["gained"], mixed["lost"]) == (["0", "1", "3"], [])


def test_changes_within_the_tolerance_are_neither(metric):
    found = metric.compute(predictions=TOGETHER, references=ALONE, task_names=NAMES, tolerance=0.125)
    assert (found["gained"], found["lost"]) == (["a"], ["d"])


def test_all_digits_are_kept(metric):
    assert metric.compute(predictions=[1 / 3], references=[0.0])["mean"] == 1 / 3


def test_without_a_baseline_to_divide_by_there_is_no_relative_mean(metric):
    assert math.isnan(metric.compute(predictions=[1.0, 2.0], references=[0.0, 1.0])["relative_mean"])
    assert seesaw_summary([-1.0], [-2.0]).relative_mean == 0.5


def test_no_change_is_the_worst_of_gains():
    summary = seesaw_summary([1.0, 2.0], [1.0, 1.0])
    assert (summary.worst, summary.changes[summary.worst], summary.lost) == (0, 0.0, ())


def test_table_shows_every_task(capsys):
    show_seesaw(TOGETHER, ALONE, NAMES)
    text = capsys.readouterr().out
    assert "1 gained, 2 lost, mean change -0.09375" in text
    assert [line.split()[0] for line in text.splitlines() if line.split()[-1:] in (["gained"], ["lost"])] == [
        "a",
        "b",
        "d",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": [0.5], "references": [float("nan")]}, "`baselines`: got \\[nan\\]"),
        ({"predictions": [float("inf")], "references": [1.0]}, "`scores`"),
        ({"predictions": [0.5], "references": [0.5], "tolerance": -1.0}, "`tolerance`: got -1.0"),
        ({"predictions": [0.5], "references": [0.5], "task_names": ["a", "b"]}, "`task_names`"),
        ({"predictions": [0.5] * 2, "references": [0.5] * 2, "task_names": ["a", "a"]}, "2 different names"),
        ({"predictions": [0.5] * 3, "references": [0.5] * 3, "higher_is_better": [True, False]}, "as many as"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(metric, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**options)
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == []


def test_bad_numbers_of_scores_are_named():
    with pytest.raises(ValueError, match="`baselines`: got 2 scores, expected 1"):
        seesaw_summary([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one task"):
        seesaw_summary([], [])
