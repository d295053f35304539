import json
import math

import numpy as np
import pytest
import torch

from hf_curriculum.layerwise.importance import BlockScores, change_rate, lora_change_squared, signal_to_noise


def factors(seed, rank=3, d_in=7, d_out=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(rank, d_in), draw(d_out, rank), draw(rank, d_in), draw(d_out, rank)


def naive_lora_change(a, b, a_reference, b_reference, scaling):
    a, b, a_reference, b_reference = (x.double() for x in (a, b, a_reference, b_reference))
    return (scaling * (b @ a - b_reference @ a_reference)).square().sum().item()


def naive_signal_to_noise(weight):
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    ordered = np.sort(values)

    def quantile(share):
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    sigma = (quantile(0.75) - quantile(0.25)) / 1.349
    n, m = weight.shape
    beta = n / m if n < m else m / n
    edge = sigma * math.sqrt((1 + math.sqrt(beta)) ** 2)
    signal = sum(value for value in values if value > edge)
    noise = sum(value for value in values if value <= edge) or 1.0
    return signal / noise / max(values)


def test_change_rate_is_the_ratio_of_the_norms():
    rng = np.random.default_rng(0)
    for _ in range(50):
        before, step = rng.normal(size=20), rng.normal(size=20) * 10.0 ** rng.integers(-6, 1)
        naive = np.linalg.norm(step) / np.linalg.norm(before)
        assert change_rate(float(step @ step), float(before @ before)) == pytest.approx(naive, rel=1e-14)
        normalised = change_rate(float(step @ step), float(before @ before), learning_rate_sum=1e-3)
        assert normalised == pytest.approx(naive / 1e-3, rel=1e-14)


def test_change_rate_of_extreme_norms_stays_in_range():
    assert change_rate(1e-320, 1e300) == pytest.approx(1e-310, rel=1e-3)
    assert change_rate(1e300, 1e-300) == pytest.approx(1e300)


def test_change_rate_without_change_is_zero_and_without_reference_infinite():
    assert change_rate(0.0, 0.0) == 0.0
    assert change_rate(0.0, 4.0, learning_rate_sum=0.1) == 0.0
    assert change_rate(1.0, 0.0) == math.inf
    assert math.isnan(change_rate(math.nan, 1.0))
    assert math.isnan(change_rate(math.nan, 0.0))
    assert math.isnan(change_rate(0.0, math.nan))


@pytest.mark.parametrize("learning_rate_sum", [0.0, -1e-3, math.nan, math.inf])
def test_window_without_a_learning_rate_is_refused(learning_rate_sum):
    with pytest.raises(ValueError, match=r"Invalid `learning_rate_sum`.*a float > 0.*leave it out"):
        change_rate(1.0, 1.0, learning_rate_sum=learning_rate_sum)


@pytest.mark.parametrize(("name", "sums"), [("change_squared", (-1.0, 1.0)), ("reference_squared", (1.0, -1.0))])
def test_negative_sum_of_squares_is_refused(name, sums):
    with pytest.raises(ValueError, match=rf"Invalid `{name}`: got -1.0"):
        change_rate(*sums)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 7, 5), (8, 4, 6)], ids=str)
def test_lora_change_equals_that_of_the_full_products(dtype, shape):
    for seed in range(5):
        pair = factors(seed, *shape, dtype=dtype)
        change = lora_change_squared(*pair, scaling=0.5)
        assert change.dtype == torch.float64
        assert change.shape == ()
        assert change.item() == pytest.approx(naive_lora_change(*pair, 0.5), rel=1e-12)


def test_lora_change_of_a_tiny_step_keeps_its_digits():
    a, b, da, db = factors(0)
    a_reference, b_reference = a.float(), b.float()
    a, b = a_reference + 1e-6 * da.float(), b_reference + 1e-6 * db.float()
    exact_a, exact_b = a.double() - a_reference.double(), b.double() - b_reference.double()
    exact = (b.double() @ exact_a + exact_b @ a_reference.double()).square().sum().item()
    assert lora_change_squared(a, b, a_reference, b_reference, 1.0).item() == pytest.approx(exact, rel=1e-13)
    # The difference of the products in the factors' own type has lost them.
    lossy = (b @ a - b_reference @ a_reference).square().sum().item()
    assert lossy != pytest.approx(exact, rel=1e-3)


def test_lora_change_starts_at_zero_b():
    a, b, a_now, _ = factors(1)
    nothing = torch.zeros_like(b)
    assert lora_change_squared(a_now, nothing, a, nothing, 2.0).item() == 0.0
    assert lora_change_squared(a, b, a, b, 2.0).item() == 0.0
    expected = (2.0 * (b @ a)).square().sum().item()
    assert lora_change_squared(a, b, a, nothing, 2.0).item() == pytest.approx(expected, rel=1e-13)


def test_lora_change_is_zero_where_factors_change_and_their_product_does_not():
    for seed in range(50):
        a, b, *_ = factors(seed)
        change = lora_change_squared(3.0 * a, b / 3.0, a, b, 1.0).item()
        assert 0.0 <= change < 1e-13 * (b @ a).square().sum().item()


def test_lora_change_has_no_gradient_and_leaves_its_inputs():
    pair = [x.requires_grad_() for x in factors(3)]
    copies = [x.detach().clone() for x in pair]
    assert not lora_change_squared(*pair, 1.0).requires_grad
    assert all(torch.equal(x, copy) for x, copy in zip(pair, copies))


def test_lora_factors_that_do_not_belong_together_are_refused():
    a, b, a_reference, b_reference = factors(0)
    with pytest.raises(ValueError, match=r"Invalid `a, b`.*\(r, d_in\) and \(d_out, r\)"):
        lora_change_squared(b, a, b_reference, a_reference, 1.0)
    with pytest.raises(ValueError, match=r"Invalid `a_reference, b_reference`"):
        lora_change_squared(a, b, a_reference[:, :-1], b_reference, 1.0)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 5), (3, 3)], ids=str)
def test_signal_to_noise_equals_its_definition(shape):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight[:, 0] *= 1.0 + 3.0 * seed
        assert signal_to_noise(weight) == pytest.approx(naive_signal_to_noise(weight), rel=1e-10)
        narrow = weight.bfloat16()
        assert signal_to_noise(narrow) == pytest.approx(naive_signal_to_noise(narrow.float()), rel=1e-4)


def test_signal_to_noise_literal():
    # Quartiles 1 and 2, edge 1 / 1.349 * 2 = 1.4826: signal 8 + 2 + 2, noise 1 + 1, largest 8.
    assert signal_to_noise(torch.diag(torch.tensor([8.0, 2.0, 2.0, 1.0, 1.0]))) == pytest.approx(12 / 2 / 8)
    # 1.482 lies just below the edge.
    weight = torch.diag(torch.tensor([8.0, 2.0, 1.482, 1.0, 1.0], dtype=torch.float64))
    assert signal_to_noise(weight) == pytest.approx(10 / 3.482 / 8)


def test_signal_to_noise_is_finite_without_noise():
    assert signal_to_noise(torch.zeros(4, 3)) == 0.0
    assert signal_to_noise(torch.eye(4)) == pytest.approx(4.0)
    assert signal_to_noise(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        pytest.param(torch.ones(3), r"shape \(3,\)", id="vector"),
        pytest.param(torch.ones(2, 3, 4), r"shape \(2, 3, 4\)", id="stack"),
        pytest.param(torch.ones(2, 2, dtype=torch.int8), "torch.int8", id="quantised"),
        pytest.param(torch.ones(0, 2), r"shape \(0, 2\)", id="partitioned"),
        pytest.param(torch.full((2, 2), torch.nan), "not finite", id="nan"),
    ],
)
def test_signal_to_noise_refuses_what_is_no_finite_matrix(weight, match):
    with pytest.raises(ValueError, match=rf"Invalid `weight`.*{match}"):
        signal_to_noise(weight)


def test_scores_are_the_bias_corrected_average_of_each_blocks_own_rates():
    rng = np.random.default_rng(0)
    for smoothing in (0.0, 0.5, 0.7, 0.99):
        known, seen, last_active = BlockScores(5, smoothing), [[] for _ in range(5)], [0] * 5
        for window in range(1, 30):
            active = rng.choice(5, size=2, replace=False).tolist()
            rates = {block: float(rng.random()) for block in active}
            known.update(active, rates)
            for block in active:
                seen[block].append(rates[block])
                last_active[block] = window
        for block, values in enumerate(seen):
            weights = [smoothing ** (len(values) - 1 - place) for place in range(len(values))]
            assert known.scores[block] == pytest.approx(np.average(values, weights=weights), rel=1e-12)
            assert known.ages[block] == 29 - last_active[block]
            assert known.counts[block] == len(values)


def test_frozen_block_keeps_its_score_and_ages():
    known = BlockScores(3)
    assert np.isnan(known.scores).all()
    assert known.ages.tolist() == [0, 0, 0]
    known.update([0], {0: 4.0})
    known.update([1], {1: 1.0})
    known.update([1], {1: 1.0})
    assert known.scores[:2] == pytest.approx([4.0, 1.0])
    assert np.isnan(known.scores[2])
    assert known.ages.tolist() == [2, 0, 3]


def test_probe_of_a_frozen_block_moves_its_score_and_not_its_age():
    known = BlockScores(2, smoothing=0.0)
    known.update([0], {0: 1.0, 1: 5.0})
    known.update([0], {1: 7.0})
    assert known.scores.tolist() == [1.0, 7.0]
    assert known.ages.tolist() == [0, 2]


def test_what_scores_hand_out_cannot_change_them():
    known = BlockScores(2)
    known.update([0], {0: 1.0})
    for values in (known.scores, known.ages, known.counts):
        values += 1
    known.state()["ages"].append(3)
    assert known.scores[0] == 1.0
    assert known.ages.tolist() == [0, 1]
    assert known.counts.tolist() == [1, 0]


def test_state_survives_json_to_the_last_bit():
    rng = np.random.default_rng(1)
    known, restored = BlockScores(6), BlockScores(6)
    for _ in range(17):
        active = rng.choice(5, size=2, replace=False).tolist()
        known.update(active, {block: float(rng.random()) / 3 for block in active})
    restored.restore(json.loads(json.dumps(known.state())))
    for one in (known, restored):
        one.update([1], {1: 0.1, 5: 0.7})
    assert restored.scores.tobytes() == known.scores.tobytes()
    assert restored.ages.tolist() == known.ages.tolist()
    assert restored.state() == known.state()


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_rate_that_is_no_rate_is_refused_by_block_and_changes_nothing(rate):
    known = BlockScores(4)
    known.update([0, 1], {0: 1.0, 1: 2.0})
    before = known.state()
    with pytest.raises(ValueError, match=r"Invalid `rates\[3\]`.*block 3"):
        known.update([1, 3], {1: 1.0, 3: rate})
    assert known.state() == before


@pytest.mark.parametrize(
    ("active", "rates", "match"),
    [
        ([4], {}, r"Invalid `active`: got 4"),
        ([-1], {}, r"Invalid `active`: got -1"),
        ([True], {}, r"Invalid `active`: got True"),
        ([1, 1], {}, r"Invalid `active`: got \[1, 1\].*each block once"),
        ([0], {9: 1.0}, r"Invalid `rates`: got 9"),
    ],
)
def test_unknown_blocks_are_refused(active, rates, match):
    with pytest.raises(ValueError, match=match):
        BlockScores(4).update(active, rates)


def test_settings_of_scores_out_of_range_are_refused():
    for smoothing in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"Invalid `smoothing`.*\[0, 1\)"):
            BlockScores(2, smoothing)
    for number in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"Invalid `num_blocks`"):
            BlockScores(number)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ages": [0, 0], "counts": [0, 0], "averages": [0.0, 0.0]}, r"a state of 2 blocks.*3, as many as the model"),
        ({"smoothing": 0.5}, r"Invalid `smoothing`: got 0.7, expected 0.5, as in the checkpoint"),
        ({"ages": [0, 0, 0.5]}, r"state\['ages'\]"),
        ({"ages": None}, r"state\['ages'\]"),
        ({"averages": [0.0, 0.0, math.nan]}, r"state\['averages'\]"),
        ({"counts": [0, 0, -1]}, r"state\['counts'\]"),
    ],
)
def test_state_of_another_run_is_refused_and_changes_nothing(change, match):
    known = BlockScores(3)
    known.update([1], {1: 2.0})
    before = known.state()
    with pytest.raises(ValueError, match=match):
        known.restore({**BlockScores(3).state(), **change})
    assert known.state() == before
