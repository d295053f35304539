import numpy as np
import pytest

from hf_curriculum.analysis.attention_distance import ROUNDS, expected_received, fit_distance_profile


def keys_of(query, length, causal):
    return [k for k in range(1, length) if k <= query or not causal]


def naive_fit(observed, lengths, causal):
    """The same rounds, as loops over pairs of query and key."""
    middle = len(observed) // 2
    profile = (observed > 0).astype(float)
    for _ in range(ROUNDS):
        weights = np.zeros_like(profile)
        for length in lengths:
            for q in range(length):
                keys = keys_of(q, length, causal)
                if len(keys) >= 2:
                    total = sum(profile[middle + q - k] for k in keys)
                    for k in keys:
                        weights[middle + q - k] += 1 / total
        profile = np.array([o / w if w > 0 else 0.0 for o, w in zip(observed, weights)])
        profile = profile / profile.sum()
    return profile


def naive_expected(profile, length, causal):
    middle = len(profile) // 2
    received = np.zeros(length)
    for q in range(length):
        keys = keys_of(q, length, causal)
        if len(keys) >= 2:
            total = sum(profile[middle + q - k] for k in keys)
            for k in keys:
                received[k] += profile[middle + q - k] / total
    return received


def mass_by_distance(profile, lengths, causal):
    """What a head that looks at distance alone would be observed to do."""
    middle = len(profile) // 2
    observed = np.zeros_like(profile)
    for length in lengths:
        for q in range(length):
            keys = keys_of(q, length, causal)
            if len(keys) >= 2:
                total = sum(profile[middle + q - k] for k in keys)
                for k in keys:
                    observed[middle + q - k] += profile[middle + q - k] / total
    return observed


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_fit_and_expectation_equal_their_naive_twins(causal):
    rng = np.random.default_rng(0)
    lengths = [8, 3, 5, 5, 2, 1]
    observed = rng.random((3, 15)) + 0.1
    observed[:, -1] = 0
    if causal:
        observed[:, :7] = 0
    fitted = fit_distance_profile(observed, lengths)
    for row, profile in zip(observed, fitted):
        row = np.where(mass_by_distance(np.ones(15), lengths, causal) > 0, row, 0)
        assert profile == pytest.approx(naive_fit(row, lengths, causal), abs=1e-9)
    for length in lengths:
        found = expected_received(fitted, length)
        for row, profile in zip(found, fitted):
            assert row == pytest.approx(naive_expected(profile, length, causal), abs=1e-9)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("shape", ["even", "near", "far", "window"])
def test_head_that_looks_at_distance_alone_receives_what_is_expected(causal, shape):
    distances = np.arange(-29, 30)
    profile = {
        "even": np.ones(59), "near": 0.7 ** np.abs(distances), "far": 1.05 ** np.abs(distances),
        "window": (np.abs(distances) < 6).astype(float),
    }[shape]  # fmt: skip
    if causal:
        profile = np.where(distances < 0, 0, profile)
    lengths = [30, 20, 25, 11]
    observed = mass_by_distance(profile, lengths, causal)
    fitted = fit_distance_profile(observed[None], lengths)
    for length in lengths:
        truth = naive_expected(profile, length, causal)[1:]
        ratio = truth / expected_received(fitted, length)[0, 1:]
        # Ten rounds of the fit: within a per cent of what the head does.
        assert np.abs(ratio - 1).max() < 0.01


def test_all_queries_mass_is_handed_out():
    observed = np.random.default_rng(1).random((2, 19))
    observed[:, :9] = 0
    received = expected_received(fit_distance_profile(observed, [10, 7]), 10)
    assert received.sum(axis=1) == pytest.approx([8, 8])
    assert (received[:, 0] == 0).all()


@pytest.mark.parametrize("length", [1, 2])
def test_text_without_a_choice_expects_nothing(length):
    profile = fit_distance_profile(np.ones((1, 19)), [10])
    assert (expected_received(profile, length) == 0).all()
