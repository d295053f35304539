import math
import os

import numpy as np
import pytest

from hf_curriculum.analysis.classification_metrics import (
    Accuracy,
    CalibrationError,
    Correlation,
    MacroF1,
    MatthewsCorrelation,
    MultiLabelF1,
    expected_calibration_error,
    macro_f1,
    matthews_correlation,
    multi_label_f1,
    pearson,
)


RANDOM = np.random.default_rng(0)
FOUND, WANTED = RANDOM.integers(0, 5, 200), RANDOM.integers(0, 4, 200)
FOUND[:120] = WANTED[:120]


def naive_f1(found, wanted):
    hits = sum(f and w for f, w in zip(found, wanted, strict=True))
    precision = hits / sum(found) if sum(found) else 0.0
    recall = hits / sum(wanted) if sum(wanted) else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_accuracy_is_the_share_of_right_rows(tmp_path):
    found = Accuracy(cache_dir=str(tmp_path)).compute(predictions=FOUND, references=WANTED)
    assert found == {"accuracy": sum(f == w for f, w in zip(FOUND, WANTED, strict=True)) / 200}


def test_macro_f1_is_a_loop_s(tmp_path):
    classes = sorted({*FOUND.tolist(), *WANTED.tolist()})
    expected = np.mean([naive_f1((c == FOUND).tolist(), (c == WANTED).tolist()) for c in classes])
    found = MacroF1(cache_dir=str(tmp_path)).compute(predictions=FOUND.tolist(), references=WANTED.tolist())
    assert found["macro_f1"] == pytest.approx(expected, rel=1e-12)
    # scikit-learn's documented example: f1_score([0,1,2,0,1,2], [0,2,1,0,0,1], average="macro").
    assert macro_f1([0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2]) == pytest.approx(0.26666667)


def test_matthews_is_the_formula_of_the_confusion_matrix(tmp_path):
    metric = MatthewsCorrelation(cache_dir=str(tmp_path))
    # scikit-learn's documented example.
    assert metric.compute(predictions=[1, -1, 1, 1], references=[1, 1, 1, -1])["matthews_correlation"] == (
        pytest.approx(-1 / 3)
    )
    # For two classes it is Pearson's correlation of the labels.
    two = (FOUND % 2, WANTED % 2)
    assert matthews_correlation(*two) == pytest.approx(np.corrcoef(*two)[0, 1], rel=1e-12)
    # For more, that of the indicator matrices (Gorodkin 2004).
    x, y = (np.eye(5)[labels] - np.eye(5)[labels].mean(axis=0) for labels in (FOUND, WANTED))
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert matthews_correlation(FOUND, WANTED) == pytest.approx(expected, rel=1e-12)


def test_constant_predictions_have_no_correlation():
    assert matthews_correlation([1, 1, 1], [0, 1, 2]) == 0.0
    assert matthews_correlation([1, 1], [1, 1]) == 0.0
    assert math.isnan(pearson([1.0, 1.0], [0.0, 2.0]))


def test_perfect_and_permuted_labels_are_the_ends_of_the_scales():
    assert (macro_f1(WANTED, WANTED), matthews_correlation(WANTED, WANTED)) == (1.0, pytest.approx(1.0))
    assert matthews_correlation(1 - WANTED % 2, WANTED % 2) == pytest.approx(-1.0)
    assert macro_f1(WANTED + 10, WANTED) == 0.0


def test_multi_label_f1_is_a_loop_s(tmp_path):
    found, wanted = (RANDOM.integers(0, 2, (50, 4)) for _ in range(2))
    metric = MultiLabelF1(cache_dir=str(tmp_path))
    result = metric.compute(predictions=found, references=wanted)
    columns = [naive_f1(found[:, c].tolist(), wanted[:, c].tolist()) for c in range(4)]
    assert result["macro_f1"] == pytest.approx(np.mean(columns), rel=1e-12)
    assert result["micro_f1"] == pytest.approx(naive_f1(found.ravel().tolist(), wanted.ravel().tolist()), rel=1e-12)


def test_labels_that_never_occur_are_left_out():
    assert multi_label_f1([[1, 0, 0]], [[1, 1, 0]]) == {"micro_f1": pytest.approx(2 / 3), "macro_f1": 0.5}
    assert all(math.isnan(value) for value in multi_label_f1([[0, 0]], [[0, 0]]).values())


def test_correlations_are_numpy_s(tmp_path):
    x = RANDOM.normal(size=100)
    y = 0.5 * x + RANDOM.normal(size=100)
    found = Correlation(cache_dir=str(tmp_path)).compute(predictions=x, references=y)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-12)
    assert pearson(x * 1e-200, y * 1e200) == pytest.approx(found["pearson"], rel=1e-12)
    assert pearson(x, -3 * x + 1) == pytest.approx(-1.0)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_is_a_loop_s(tmp_path, bins):
    shares = RANDOM.dirichlet(np.ones(3), 80)
    shares[:3] = [[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [1 / 3, 1 / 3, 1 / 3]]
    wanted = RANDOM.integers(0, 3, 80)
    expected = 0.0
    for number in range(bins):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(shares, wanted, strict=True)
            if number / bins < row.max() <= (number + 1) / bins
        ]
        if inside:
            confidence, right = zip(*inside, strict=True)
            expected += len(inside) / 80 * abs(np.mean(right) - np.mean(confidence))
    metric = CalibrationError(cache_dir=str(tmp_path))
    assert metric.compute(predictions=shares, references=wanted, num_bins=bins)["ece"] == pytest.approx(expected)


def test_calibrated_and_overconfident_predictions_are_the_ends():
    assert expected_calibration_error([[1.0, 0.0]] * 4, [0] * 4) == 0.0
    assert expected_calibration_error([[1.0, 0.0]] * 4, [1] * 4) == 1.0
    assert expected_calibration_error([[0.75, 0.25]] * 4, [0, 0, 0, 1]) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        (CalibrationError, {"predictions": [[0.7, 0.7]], "references": [0]}, "rows of probabilities that sum to 1"),
        (CalibrationError, {"predictions": [[0.5, 0.5]], "references": [2]}, "`references`: got classes 2 to 2"),
        (CalibrationError, {"predictions": [[0.5, 0.5]], "references": [0], "num_bins": 0}, "`num_bins`"),
        (MultiLabelF1, {"predictions": [[2]], "references": [[1]]}, "0 and 1 for each row"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(tmp_path, metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric(cache_dir=str(tmp_path)).compute(**options)
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == []


def test_rows_that_do_not_match_are_named():
    with pytest.raises(ValueError, match="as many rows as references"):
        macro_f1([1, 2], [1])
    with pytest.raises(ValueError, match="not 0"):
        macro_f1([], [])
