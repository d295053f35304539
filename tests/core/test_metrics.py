import math

import numpy as np
import pytest

from hf_curriculum.core.metrics import (
    ForgettingSummary,
    accuracy_mean,
    backward_transfer,
    forgetting_per_level,
    forgetting_summary,
)


NAN = float("nan")
# Accuracy of three levels after each of three stages: level 0 falls from 0.9 to 0.6, level 1 from 0.8 to 0.7.
ACCURACY = [[0.9, 0.1, 0.0], [0.7, 0.8, 0.1], [0.6, 0.7, 0.5]]


def test_accuracy_is_the_mean_of_the_last_row():
    assert accuracy_mean(ACCURACY) == pytest.approx(0.6)


def test_accuracy_leaves_out_levels_that_were_not_measured():
    assert accuracy_mean([[1.0, 2.0], [NAN, 4.0]]) == 4.0
    assert math.isnan(accuracy_mean([[NAN, NAN]]))


def test_backward_transfer_of_an_accuracy_that_falls_is_negative():
    assert backward_transfer(ACCURACY, [0, 1, 2], higher_is_better=True) == pytest.approx((-0.3 - 0.1) / 2)


def test_a_loss_and_its_negative_as_a_gain_are_the_same_forgetting():
    loss = [[-score for score in row] for row in ACCURACY]
    assert backward_transfer(loss, [0, 1, 2]) == pytest.approx(-0.2)
    assert forgetting_per_level(loss) == pytest.approx(forgetting_per_level(ACCURACY, higher_is_better=True))


def test_backward_transfer_compares_with_the_stage_that_introduced_a_level():
    assert backward_transfer(ACCURACY, [2, 1, 0], higher_is_better=True) == pytest.approx((-0.1 + 0.5) / 2)


@pytest.mark.parametrize(
    ("matrix", "introduced_at"),
    [
        ([[0.5, 0.4]], [0, 0]),
        (ACCURACY, [None] * 3),
        (ACCURACY, [2, 2, 2]),
        ([[NAN], [0.5]], [0]),
        ([[0.5], [NAN]], [0]),
    ],
    ids=["one stage", "no level follows a stage", "all last", "not measured then", "not measured at the end"],
)
def test_backward_transfer_is_none_where_no_level_qualifies(matrix, introduced_at):
    assert backward_transfer(matrix, introduced_at) is None


def test_backward_transfer_leaves_out_levels_without_a_stage():
    assert backward_transfer(ACCURACY, [None, 1, None], higher_is_better=True) == pytest.approx(-0.1)


def test_forgetting_is_the_best_earlier_score_less_the_final_one():
    assert forgetting_per_level(ACCURACY, higher_is_better=True) == pytest.approx([0.3, 0.1, -0.4])


def test_forgetting_of_a_loss_is_the_final_less_the_lowest_earlier_one():
    assert forgetting_per_level([[3.0], [1.0], [2.0], [2.5]]) == [1.5]


def test_forgetting_skips_stages_that_were_not_measured():
    forgotten = forgetting_per_level([[NAN, 0.5, NAN, NAN], [2.0, 1.0, NAN, 1.0], [3.0, NAN, 1.0, 0.5]])
    assert forgotten[0] == 1.0
    assert math.isnan(forgotten[1])
    assert math.isnan(forgotten[2])
    assert forgotten[3] == -0.5


def test_forgetting_of_a_single_stage_is_nan():
    assert all(math.isnan(value) for value in forgetting_per_level([[1.0, 2.0]]))


def test_naive_loops_agree_on_random_matrices():
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = rng.normal(size=(4, 3))
        stages = [int(stage) for stage in rng.integers(0, 4, 3)]
        terms = [matrix[s][level] - matrix[3][level] for level, s in enumerate(stages) if s < 3]
        expected = ForgettingSummary(
            acc=sum(matrix[3]) / 3,
            bwt=sum(terms) / len(terms) if terms else None,
            forgetting=tuple(matrix[3][level] - min(matrix[s][level] for s in range(3)) for level in range(3)),
        )
        summary = forgetting_summary(matrix, stages)
        assert summary.acc == pytest.approx(expected.acc)
        assert summary.bwt == (None if expected.bwt is None else pytest.approx(expected.bwt))
        assert summary.forgetting == pytest.approx(expected.forgetting)


@pytest.mark.parametrize("matrix", [[], [[]], [1.0, 2.0], [[1.0, 2.0], [1.0]]], ids=["empty", "bare", "1-D", "ragged"])
def test_matrix_that_is_none_is_refused(matrix):
    with pytest.raises(ValueError, match=r"Invalid `matrix`: got .* expected"):
        forgetting_summary(matrix, [0])


@pytest.mark.parametrize("introduced_at", [[0], [0, 2], [0, -1]], ids=["too short", "too late", "negative"])
def test_stages_that_do_not_fit_the_matrix_are_refused(introduced_at):
    with pytest.raises(ValueError, match=r"for each of 2 levels a stage in \[0, 2\), or None"):
        backward_transfer([[1.0, 2.0], [1.0, 2.0]], introduced_at)
