import math
import os

import numpy as np
import pytest

from hf_curriculum.analysis.forgetting import Forgetting


MATRIX = [[1.0, 3.0, 4.0], [1.25, 2.0, 3.0], [1.5, 2.5, 1.0]]


@pytest.fixture
def metric(tmp_path):
    return Forgetting(cache_dir=str(tmp_path))


def test_metric_returns_python_numbers_and_the_documented_signs(metric):
    result = metric.compute(predictions=MATRIX, higher_is_better=False, introduced_at=[0, 1, 2])
    assert result == {"acc": 5.0 / 3, "bwt": -0.5, "forgetting": [0.5, 0.5, -2.0]}
    assert [type(value) for value in (result["acc"], result["bwt"], *result["forgetting"])] == [float] * 5


def test_direction_turns_the_signs(metric):
    result = metric.compute(predictions=MATRIX, higher_is_better=True, introduced_at=[0, 1, 2])
    assert result["bwt"] == 0.5
    assert result["forgetting"] == [-0.25, 0.5, 3.0]


def test_scores_keep_all_their_digits(metric):
    result = metric.compute(predictions=[[1.0], [1 / 3]], introduced_at=[0])
    assert result["acc"] == 1 / 3


@pytest.mark.parametrize("missing", [None, float("nan")], ids=["None", "NaN"])
def test_missing_scores_are_left_out(metric, missing):
    result = metric.compute(predictions=[[missing, 2.0], [1.0, 3.0]], introduced_at=[0, 0])
    assert result["acc"] == 2.0
    assert result["bwt"] == -1.0
    assert math.isnan(result["forgetting"][0])


def test_stages_may_be_added_one_by_one_and_computed_again(metric):
    for _ in range(2):
        for row in MATRIX:
            metric.add(prediction=row)
        assert metric.compute(introduced_at=[0, 1, 2])["bwt"] == -0.5
    assert metric.compute(predictions=np.array(MATRIX), introduced_at=[None] * 3)["bwt"] is None


def test_an_error_leaves_no_file_and_the_metric_usable(metric, tmp_path):
    with pytest.raises(ValueError, match="Invalid `introduced_at`"):
        metric.compute(predictions=MATRIX, introduced_at=[0])
    assert metric.compute(predictions=MATRIX, introduced_at=[0, 1, 2])["bwt"] == -0.5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_is_written_outside_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []
    real = os.makedirs

    def watched(path, *args, **kwargs):
        opened.append(path)
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", watched)
    Forgetting(cache_dir=str(tmp_path / "cache")).compute(predictions=MATRIX, introduced_at=[0, 1, 2])
    assert opened
    assert all(str(path).startswith(str(tmp_path / "cache")) for path in opened)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_scores_may_pass_through_files_as_other_metrics_do(tmp_path):
    metric = Forgetting(cache_dir=str(tmp_path), keep_in_memory=False)
    assert metric.compute(predictions=MATRIX, introduced_at=[0, 1, 2])["bwt"] == -0.5


def test_global_generator_is_left_alone(metric):
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - the legacy global state is what is being watched
    metric.compute(predictions=MATRIX, introduced_at=[0, 1, 2])
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002 - as above
