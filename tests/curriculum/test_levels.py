from itertools import combinations

import numpy as np
import pytest
from datasets import Dataset

from hf_curriculum.curriculum.levels import assign_levels, level_cuts, levels_at


def partitions(num_values, num_levels):
    for borders in combinations(range(1, num_values), num_levels - 1):
        yield list(zip((0, *borders), (*borders, num_values)))


def spread(values, weights):
    mean = np.average(values, weights=weights)
    return float(weights @ (values - mean) ** 2)


def cost_of(scores, weights, levels, method):
    if method == "jenks":
        return sum(spread(scores[levels == level], np.ones((levels == level).sum())) for level in set(levels.tolist()))
    return sum(float(weights[levels == level].sum()) ** 2 for level in set(levels.tolist()))


def least_cost(scores, weights, num_levels, method):
    values, inverse = np.unique(scores, return_inverse=True)
    costs = []
    for runs in partitions(len(values), num_levels):
        level_of_value = np.concatenate([[level] * (end - start) for level, (start, end) in enumerate(runs)])
        costs.append(cost_of(scores, weights, level_of_value[inverse], method))
    return min(costs)


@pytest.mark.parametrize("method", ["quantile", "tokens", "jenks"])
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
def test_cuts_are_as_good_as_the_best_of_all_partitions(method, num_levels):
    rng = np.random.default_rng(num_levels)
    for _ in range(20):
        scores = rng.integers(0, 9, 24).astype(float) ** rng.integers(1, 4)
        tokens = rng.integers(1, 8, 24).astype(float) ** 3
        weights = tokens if method == "tokens" else np.ones(24)
        levels = assign_levels(scores, num_levels, method, token_counts=tokens)
        assert sorted(set(levels.tolist())) == list(range(num_levels))
        best = least_cost(scores, weights, num_levels, method)
        assert cost_of(scores, weights, levels, method) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", ["quantile", "tokens", "jenks"])
def test_harder_rows_are_never_in_easier_levels_and_equal_rows_share_one(method):
    scores = np.random.default_rng(0).integers(0, 40, 500).astype(float)
    levels = assign_levels(scores, 5, method, token_counts=np.arange(500))
    order = np.argsort(scores)
    assert (np.diff(levels[order]) >= 0).all()
    assert all(len(set(levels[scores == value].tolist())) == 1 for value in set(scores.tolist()))


def test_literal_levels():
    assert assign_levels([0.3, 0.1, 0.2, 0.9, 0.5, 0.4], 3, "quantile").tolist() == [1, 0, 0, 2, 2, 1]
    assert assign_levels([1, 2, 3, 4], 2, "tokens", token_counts=[10, 10, 10, 30]).tolist() == [0, 0, 0, 1]
    assert assign_levels([1, 2, 3, 4, 5], 3, "tokens", token_counts=[2, 8, 5, 1, 2]).tolist() == [0, 1, 2, 2, 2]
    assert assign_levels([1, 2, 3, 10, 11, 30], 3, "jenks").tolist() == [0, 0, 0, 1, 1, 2]
    assert assign_levels([1, 2, 3], 2, "thresholds", thresholds=[2]).tolist() == [0, 1, 1]


@pytest.mark.parametrize("num_levels", [3, 7, 10])
def test_many_distinct_scores_are_divided_into_equal_counts(num_levels):
    scores = np.random.default_rng(1).normal(size=30_011)
    counts = np.bincount(assign_levels(scores, num_levels))
    assert len(counts) == num_levels
    assert counts.max() - counts.min() <= 1


def test_a_large_tie_gets_a_level_and_the_rest_is_divided_equally():
    scores = np.concatenate([np.zeros(90_000), np.random.default_rng(0).random(10_000)])
    assert np.bincount(assign_levels(scores, 3)).tolist() == [90_000, 5_000, 5_000]


def test_a_large_tie_in_the_middle_keeps_room_for_both_sides():
    rng = np.random.default_rng(0)
    scores = np.concatenate([-rng.random(4_000) - 1, np.zeros(50_000), rng.random(4_000) + 1])
    assert np.bincount(assign_levels(scores, 5)).tolist() == [2_000, 2_000, 50_000, 2_000, 2_000]


def test_a_row_heavier_than_all_others_leaves_a_level_for_each_part_of_the_rest():
    tokens = np.ones(3_001, dtype=np.int64)
    tokens[0] = 10**9
    counts = np.bincount(assign_levels(np.arange(3_001), 4, "tokens", token_counts=tokens))
    assert counts.tolist() == [1, 1_000, 1_000, 1_000]


def test_natural_breaks_of_many_scores_fall_between_clusters():
    rng = np.random.default_rng(0)
    cluster = rng.choice(3, 9_000, p=[0.7, 0.2, 0.1])
    scores = np.array([0.0, 5.0, 9.0])[cluster] + rng.normal(scale=0.3, size=9_000)
    np.testing.assert_array_equal(assign_levels(scores, 3, "jenks"), cluster)


def test_natural_breaks_survive_a_large_offset():
    scores = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 30.0])
    np.testing.assert_array_equal(assign_levels(scores + 1e12, 3, "jenks"), assign_levels(scores, 3, "jenks"))
    np.testing.assert_array_equal(assign_levels(scores * 1e300, 3, "jenks"), assign_levels(scores, 3, "jenks"))


@pytest.mark.parametrize("method", ["quantile", "jenks"])
def test_neighbouring_floats_are_cut_apart(method):
    one = np.nextafter(1.0, 2.0)
    assert assign_levels([1.0, one, 1.0], 2, method).tolist() == [0, 1, 0]
    tiny = 5e-324
    assert assign_levels([tiny, 2 * tiny], 2, method).tolist() == [0, 1]


@pytest.mark.parametrize("method", ["quantile", "tokens", "jenks", "thresholds"])
def test_levels_are_those_of_the_cuts_so_that_other_rows_can_be_placed(method):
    scores = np.random.default_rng(3).random(200)
    options = {"token_counts": np.arange(200), "thresholds": [0.2, 0.5] if method == "thresholds" else None}
    cuts = level_cuts(scores, 3, method, **options)
    assert cuts.dtype == np.float64
    assert (np.diff(cuts) > 0).all()
    np.testing.assert_array_equal(levels_at(scores, cuts), assign_levels(scores, 3, method, **options))
    assert levels_at([-1.0, *cuts, 2.0], cuts).tolist() == [0, 1, 2, 2]


def test_a_column_of_a_data_set_and_a_list_are_as_good_as_an_array():
    scored = Dataset.from_dict({"difficulty": [0.3, 0.1, 0.2]})
    levels = assign_levels(scored["difficulty"], num_levels=3, method="quantile")
    assert levels.tolist() == assign_levels(np.array([0.3, 0.1, 0.2])).tolist() == [2, 0, 1]


def test_one_level_takes_all_even_if_all_scores_are_equal():
    assert assign_levels([1.0, 1.0], 1).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1), "Invalid `difficulty`: got no rows"),
        (([0.1, float("nan"), float("inf")], 2), r"got nan in row 1 \(2 such rows in all\), expected finite numbers"),
        (([0.1, None], 2), "got nan in row 1"),
        (([0.1, 0.2], 3), "got 2 rows, expected at least 3, one for each level. Lower `num_levels`"),
        (([0.5] * 9, 3), r"got 1 distinct scores in 9 rows \(all rows have the same score\), expected at least 3"),
        (([0.5, 0.6] * 4, 3), "got 2 distinct scores in 8 rows, expected at least 3"),
        (([1.0, 2.0], 2, "median"), "Invalid `method`: got median, expected one of quantile, tokens,"),
        (([1.0, 2.0], 0), "Invalid `num_levels`: got 0"),
        ((["a", "b"], 2), "got values that are not numbers"),
        (([[1.0], [2.0]], 2), r"got an array of shape \(2, 1\)"),
        (([1.0, 2.0], 2, "tokens"), "Invalid `token_counts`: got None"),
        (([1.0, 2.0], 2, "thresholds"), "Invalid `thresholds`: got None, expected a list of cuts"),
    ],
)
def test_bad_scores_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        assign_levels(*arguments)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], "got 3 counts, expected 2, one for each difficulty"),
        ([1, -2], "got -2, expected numbers >= 0"),
        ([0, 0], "got zeros only"),
        ([1, float("nan")], "Invalid `token_counts`: got nan in row 1"),
    ],
)
def test_bad_token_counts_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        assign_levels([1.0, 2.0], 2, "tokens", token_counts=tokens)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([1.5], "expected 2 increasing finite numbers, one less than `num_levels=3`"),
        ([2.0, 2.0], "expected 2 increasing finite numbers"),
        ([3.0, 2.0], "expected 2 increasing finite numbers"),
        ([1.5, float("nan")], "expected 2 increasing finite numbers"),
        ([1.5, 9.0], r"the levels hold \[1, 3, 0\] rows. Scores go from 1 to 4"),
    ],
)
def test_bad_thresholds_are_refused(thresholds, message):
    with pytest.raises(ValueError, match=message):
        assign_levels([1.0, 2.0, 3.0, 4.0], 3, "thresholds", thresholds=thresholds)


def test_thresholds_with_another_method_are_refused():
    with pytest.raises(ValueError, match="expected None with `method='quantile'`"):
        level_cuts([1.0, 2.0], 2, thresholds=[1.5])


def test_placing_a_row_without_a_score_is_refused():
    with pytest.raises(ValueError, match="got nan in row 0"):
        levels_at([float("nan")], [0.5])
