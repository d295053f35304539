import math
from dataclasses import replace

import numpy as np
import pytest

from hf_curriculum.layerwise.importance import BlockScores
from hf_curriculum.layerwise.policies import (
    POLICIES,
    LayerHistory,
    LayerPolicy,
    decide,
    fill_budget,
    make_policy,
    warmup_windows,
)
from hf_curriculum.layerwise.rankings import (
    AdaptivePolicy,
    CyclicPolicy,
    FixedPolicy,
    GradientPolicy,
    GradualUnfreezingPolicy,
    LastNPolicy,
    RandomPolicy,
    SpectrumPolicy,
)


EVERY_POLICY = [
    AdaptivePolicy(),
    AdaptivePolicy(exploration=0.0),
    AdaptivePolicy(exploration=1.0),
    GradientPolicy(),
    RandomPolicy(),
    CyclicPolicy(),
    CyclicPolicy("ascending"),
    CyclicPolicy("descending"),
    FixedPolicy([0]),
    LastNPolicy(),
    GradualUnfreezingPolicy(),
    SpectrumPolicy(),
]
every_policy = pytest.mark.parametrize("policy", EVERY_POLICY, ids=repr)


def equal_history(num_blocks, scores=None, ages=None, decisions=(), size=10):
    scores = np.linspace(1.0, 2.0, num_blocks) if scores is None else scores
    ages = np.zeros(num_blocks) if ages is None else ages
    return LayerHistory(np.full(num_blocks, size), scores, ages, tuple(decisions))


def random_history(rng, num_blocks):
    ages = rng.integers(0, 30, num_blocks)
    scores = np.where(rng.random(num_blocks) < 0.1, 0.0, rng.random(num_blocks))
    decisions = [
        tuple(sorted(rng.choice(num_blocks, size=rng.integers(1, num_blocks + 1), replace=False).tolist()))
        for _ in range(rng.integers(0, 12))
    ]
    return LayerHistory(rng.integers(1, 1000, num_blocks), scores, ages, tuple(decisions))


def play(policy, sizes, budget, num_decisions, *, seed=0, rate=lambda block, decision: 1.0, allowed=None):
    """A run: warm-up over all blocks, then decisions fed by the rates of the blocks that learned."""
    known, decisions = BlockScores(len(sizes)), []
    for window in warmup_windows(sizes, budget, allowed=allowed):
        known.update(window, {block: rate(block, 0) for block in window})
    for decision in range(num_decisions):
        history = LayerHistory(np.array(sizes), known.scores, known.ages, tuple(decisions))
        decisions.append(decide(policy, history, budget, seed=seed, allowed=allowed))
        known.update(decisions[-1], {block: rate(block, decision) for block in decisions[-1]})
    return decisions


def longest_absence(decisions, blocks):
    """Decisions between two turns of a block, the longest of all blocks."""
    longest = 0
    for block in blocks:
        turns = [-1, *(number for number, active in enumerate(decisions) if block in active), len(decisions)]
        longest = max(longest, *(later - earlier for earlier, later in zip(turns, turns[1:])))
    return longest


# Filling the budget


def test_budget_is_never_exceeded_and_met_within_one_block():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = rng.integers(1, 100, rng.integers(1, 20))
        ranking = rng.permutation(len(sizes))[: rng.integers(1, len(sizes) + 1)].tolist()
        budget = int(rng.integers(0, sizes.sum() + 10))
        taken = fill_budget(ranking, sizes, budget)
        left = budget - int(sizes[list(taken)].sum())
        assert left >= 0
        assert list(taken) == sorted(set(taken))
        assert set(taken) <= set(ranking)
        assert all(sizes[block] > left for block in ranking if block not in taken)


def test_filling_equals_its_naive_twin():
    rng = np.random.default_rng(1)
    for _ in range(200):
        sizes = rng.integers(1, 30, 8).tolist()
        ranking, budget = rng.permutation(8).tolist(), int(rng.integers(1, 100))
        kept, prefix, stopped = [], [], False
        for block in ranking:
            if sum(sizes[other] for other in kept) + sizes[block] <= budget:
                kept.append(block)
            stopped = stopped or sum(sizes[other] for other in prefix) + sizes[block] > budget
            if not stopped:
                prefix.append(block)
        assert fill_budget(ranking, sizes, budget) == tuple(sorted(kept))
        assert fill_budget(ranking, sizes, budget, contiguous=True) == tuple(sorted(prefix))


@every_policy
def test_decision_is_within_the_budget_and_repeats_itself(policy):
    rng = np.random.default_rng(2)
    for _ in range(60):
        history = random_history(rng, int(rng.integers(1, 24)))
        smallest, total = int(history.sizes.max()), int(history.sizes.sum())
        budget = int(rng.integers(smallest, total + 1))
        seed = int(rng.integers(0, 2**40))
        before = (history.sizes.copy(), history.scores.copy(), history.ages.copy())
        active = decide(policy, history, budget, seed=seed)
        assert active == decide(policy, history, budget, seed=seed)
        assert active == tuple(sorted(set(active)))
        assert all(type(block) is int for block in active)
        left = budget - int(history.sizes[list(active)].sum())
        assert left >= 0
        if not isinstance(policy, FixedPolicy | GradualUnfreezingPolicy):
            waiting = [size for block, size in enumerate(history.sizes) if block not in active]
            assert not waiting or left < max(waiting)
        for values, copy in zip((history.sizes, history.scores, history.ages), before):
            assert values.tobytes() == copy.tobytes()


@every_policy
def test_decision_stays_within_the_allowed_blocks(policy):
    rng = np.random.default_rng(3)
    for _ in range(40):
        history = random_history(rng, 12)
        lowest = int(rng.integers(0, 12))
        allowed = list(range(lowest, 12))
        budget = int(history.sizes.max()) + int(rng.integers(0, 2000))
        if isinstance(policy, FixedPolicy) and lowest > 0:
            with pytest.raises(ValueError, match=r"Invalid `blocks`: got blocks \[0\].*max_depth"):
                decide(policy, history, budget, seed=0, allowed=allowed)
            continue
        active = decide(policy, history, budget, seed=0, allowed=allowed)
        assert active
        assert min(active) >= lowest
        assert active == decide(policy, replace(history, allowed=tuple(allowed)), budget, seed=0)


@pytest.mark.parametrize("policy", [RandomPolicy(), CyclicPolicy(), AdaptivePolicy(exploration=1.0)], ids=repr)
def test_seed_and_decision_change_what_is_drawn(policy):
    # All ages and scores alike: the generator alone decides.
    flat = equal_history(32, scores=np.ones(32))
    drawn = {decide(policy, flat, 80, seed=seed) for seed in [0, 1, 2, 2**32, 2**33]}
    assert len(drawn) == 5
    after = replace(flat, decisions=(tuple(range(32)),))
    assert decide(policy, after, 80, seed=0) != decide(policy, flat, 80, seed=0)


def test_drawn_blocks_are_the_same_on_every_platform_and_version():
    flat = equal_history(12, scores=np.ones(12))
    assert decide(RandomPolicy(), flat, 30, seed=0) == (1, 3, 5)
    assert decide(AdaptivePolicy(), flat, 30, seed=7) == (7, 9, 10)


# Adaptive


def naive_adaptive(policy, history, budget):
    """Blocks that must be active, and those that may be: ties are the generator's."""
    places = policy.exploration * budget / history.sizes.mean()
    decision = len(history.decisions)
    due = math.floor((decision + 1) * places + 1e-9) - math.floor(decision * places + 1e-9)
    by_age = sorted(range(len(history.sizes)), key=lambda block: -history.ages[block])
    oldest = by_age[:due]
    value = {
        block: math.inf if math.isnan(score) else score * (1 + getattr(policy, "aging", 0.0)) ** int(age)
        for block, (score, age) in enumerate(zip(history.scores, history.ages))
    }
    return [*oldest, *sorted((block for block in value if block not in oldest), key=lambda block: -value[block])]


@pytest.mark.parametrize("policy", [AdaptivePolicy(0.3, 0.1), AdaptivePolicy(), GradientPolicy(0.5)], ids=repr)
def test_exploring_policies_rank_as_their_naive_twin(policy):
    rng = np.random.default_rng(4)
    for _ in range(100):
        num_blocks = int(rng.integers(2, 20))
        history = replace(
            random_history(rng, num_blocks),
            ages=rng.permutation(50)[:num_blocks],
            scores=rng.permutation(1000)[:num_blocks] + rng.random(num_blocks),
        )
        budget = int(rng.integers(history.sizes.max(), history.sizes.sum() + 1))
        ranking = policy.rank(history, budget, np.random.default_rng(0))
        assert list(ranking) == naive_adaptive(policy, history, budget)


def test_block_never_scored_comes_first_and_one_scored_zero_last():
    history = equal_history(4, scores=[0.0, 5.0, math.nan, 1.0], ages=[900, 0, 0, 0])
    assert list(AdaptivePolicy(0.0).rank(history, 10, np.random.default_rng(0))) == [2, 1, 3, 0]


def test_frozen_block_ripens_until_it_overtakes():
    policy = AdaptivePolicy(exploration=0.0, aging=0.1)
    needed = math.ceil(math.log(4.0) / math.log(1.1))
    for age, first in [(needed - 1, 0), (needed, 1)]:
        history = equal_history(2, scores=[4.0, 1.0], ages=[0, age])
        assert policy.rank(history, 10, np.random.default_rng(0))[0] == first


def test_score_of_a_block_frozen_for_very_long_stays_comparable():
    history = equal_history(3, scores=[1.0, 2.0, 3.0], ages=[10**6, 10**6, 0])
    assert list(AdaptivePolicy(0.0, 1.0).rank(history, 10, np.random.default_rng(0))) == [1, 0, 2]


def test_without_exploration_and_aging_the_first_choice_is_final():
    rate = lambda block, decision: 10.0 if block < 2 else 1.0  # noqa: E731
    decisions = play(AdaptivePolicy(0.0, 0.0), [1] * 8, 2, 200, rate=rate)
    assert set(decisions) == {(0, 1)}
    assert len(set(play(AdaptivePolicy(), [1] * 8, 2, 200, rate=rate))) > 4


@pytest.mark.parametrize("exploration", [0.05, 0.1, 0.25, 1.0])
@pytest.mark.parametrize(("num_blocks", "active"), [(8, 1), (12, 3), (16, 8), (5, 5)])
def test_every_block_is_revisited_within_the_stated_bound(exploration, num_blocks, active):
    bound = math.ceil(num_blocks / (exploration * active) - 1e-9)
    # Blocks 0.. learn for ever and the others never seem to: nothing but exploration brings them back.
    rate = lambda block, decision: 1e9 if block < active else 1e-9  # noqa: E731
    policy = AdaptivePolicy(exploration, aging=0.0)
    decisions = play(policy, [3] * num_blocks, 3 * active, 3 * bound + 5, rate=rate)
    assert longest_absence(decisions, range(num_blocks)) <= bound


def test_blocks_of_unequal_size_are_revisited_within_the_stated_bound():
    rng = np.random.default_rng(5)
    for _ in range(20):
        sizes = rng.integers(1, 50, rng.integers(3, 12)).tolist()
        budget = int(rng.integers(max(sizes), sum(sizes) + 1))
        exploration = float(rng.uniform(0.2, 1.0))
        places = exploration * budget / np.mean(sizes)
        bound = math.ceil(len(sizes) / min(places, 1.0))
        rate = lambda block, decision: 1e9 if block < 2 else 1e-9  # noqa: E731
        decisions = play(AdaptivePolicy(exploration, aging=0.0), sizes, budget, 2 * bound + 3, rate=rate)
        assert longest_absence(decisions, range(len(sizes))) <= bound


def test_exploration_takes_its_share_of_the_places():
    scores, ages = [9.0, 8.0, 7.0, 6.0, 1.0, 1.1, 1.2, 1.3], [0, 0, 0, 0, 9, 8, 7, 6]
    for exploration, expected in [(0.0, (0, 1, 2, 3)), (0.25, (0, 1, 2, 4)), (0.5, (0, 1, 4, 5)), (1.0, (4, 5, 6, 7))]:
        history = equal_history(8, scores, ages)
        assert decide(AdaptivePolicy(exploration, 0.0), history, 40, seed=0) == expected


@pytest.mark.parametrize("exploration", [0.1, 0.29, 0.3, 0.57, 0.7])
def test_places_of_exploration_add_up_over_decisions(exploration):
    places = 0
    for decision in range(100):
        history = equal_history(5, [1.0, 2.0, 2.0, 2.0, 2.0], [9, 0, 0, 0, 0], [(1,)] * decision)
        places += AdaptivePolicy(exploration, 0.0).rank(history, 10, np.random.default_rng(0))[0] == 0
    assert places == round(100 * exploration)


def test_gradient_norms_seen_by_a_probe_decide_without_aging():
    history = equal_history(4, scores=[1.0, 4.0, 3.0, 2.0], ages=[99, 0, 0, 0])
    assert decide(GradientPolicy(exploration=0.0), history, 20, seed=0) == (1, 2)
    assert decide(GradientPolicy(exploration=0.5), history, 20, seed=0) == (0, 1)


# Random and cyclic


def test_random_choice_gives_every_block_its_share():
    counts = np.zeros(8)
    for seed in range(2000):
        counts[list(decide(RandomPolicy(), equal_history(8), 20, seed=seed))] += 1
    # Standard deviation of each count: sqrt(2000 * 1/4 * 3/4) = 19.4.
    assert counts.sum() == 4000
    assert abs(counts - 500).max() < 4.5 * 19.4


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("allowed", [None, [2, 3, 4, 5, 6, 7, 8]], ids=["all", "upper"])
def test_every_block_learns_once_in_each_cycle(order, allowed):
    rng = np.random.default_rng(6)
    for trial in range(25):
        sizes = rng.integers(1, 20, 9).tolist()
        blocks = list(range(9)) if allowed is None else allowed
        budget = int(rng.integers(max(sizes), sum(sizes) + 5))
        decisions = play(CyclicPolicy(order), sizes, budget, 40, seed=trial, allowed=allowed)
        counts = dict.fromkeys(blocks, 0)
        for active in decisions:
            for block in active:
                counts[block] += 1
            # Never two turns ahead: within a decision a cycle may end and the next begin.
            assert max(counts.values()) - min(counts.values()) <= 1
        assert min(counts.values()) >= 40 * budget // (3 * sum(sizes))


def test_cycles_of_literal_orders():
    play_equal = lambda policy, budget, count: play(policy, [1] * 5, budget, count)  # noqa: E731
    assert play_equal(CyclicPolicy("ascending"), 2, 5) == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4)]
    assert play_equal(CyclicPolicy("descending"), 2, 5) == [(3, 4), (1, 2), (0, 4), (2, 3), (0, 1)]
    assert play_equal(CyclicPolicy("ascending"), 5, 2) == [(0, 1, 2, 3, 4)] * 2
    assert play_equal(CyclicPolicy("ascending"), 3, 4) == [(0, 1, 2), (0, 3, 4), (1, 2, 3), (0, 1, 4)]


def test_random_cycles_are_reshuffled():
    decisions = play(CyclicPolicy(), [1] * 8, 1, 80)
    cycles = [tuple(active[0] for active in decisions[start : start + 8]) for start in range(0, 80, 8)]
    assert all(sorted(cycle) == list(range(8)) for cycle in cycles)
    assert len(set(cycles)) == 10


# Decided by position, by name or once


def test_last_n_stops_at_the_first_block_that_does_not_fit():
    history = LayerHistory(np.array([1, 1, 5, 2, 2]), np.ones(5), np.zeros(5))
    assert decide(LastNPolicy(), history, 6, seed=0) == (3, 4)
    assert decide(LastNPolicy(), history, 9, seed=0) == (2, 3, 4)
    assert decide(LastNPolicy(), history, 9, seed=0, allowed=[0, 1, 2]) == (0, 1, 2)


def test_gradual_unfreezing_adds_one_block_each_time_until_the_budget_is_full():
    assert play(GradualUnfreezingPolicy(), [1] * 6, 3, 5) == [(5,), (4, 5), (3, 4, 5), (3, 4, 5), (3, 4, 5)]
    assert play(GradualUnfreezingPolicy(), [1, 1, 1, 4, 1], 4, 3) == [(4,), (4,), (4,)]


def test_spectrum_takes_the_largest_ratios_whatever_the_ages():
    history = equal_history(5, scores=[0.2, 0.9, 0.1, 0.9, 0.5], ages=[50, 0, 90, 0, 0])
    assert decide(SpectrumPolicy(), history, 30, seed=0) == (1, 3, 4)
    with pytest.raises(ValueError, match=r"Invalid `scores`.*of every block"):
        decide(SpectrumPolicy(), equal_history(2, scores=[1.0, math.nan]), 10, seed=0)


def test_fixed_blocks_are_all_chosen_or_refused():
    history = equal_history(6)
    assert decide(FixedPolicy([4, 1]), history, 20, seed=0) == (1, 4)
    assert decide(FixedPolicy([4]), history, 60, seed=0) == (4,)
    with pytest.raises(ValueError, match=r"Invalid `blocks`: got 20 parameters, expected at most 19"):
        decide(FixedPolicy([4, 1]), history, 19, seed=0)
    with pytest.raises(ValueError, match=r"Invalid `blocks`: got blocks \[6\], expected blocks out of"):
        decide(FixedPolicy([6]), history, 19, seed=0)


@pytest.mark.parametrize("name", ["contiguous", "static"])
def test_attributes_that_steer_the_filling(name):
    expected = {"contiguous": {"last_n", "gradual_unfreezing"}, "static": {"last_n", "fixed", "spectrum"}}[name]
    assert {key for key, cls in POLICIES.items() if getattr(cls, name, False)} == expected


def test_signals_that_are_measured():
    signals = {key: cls.signal for key, cls in POLICIES.items() if cls.signal is not None}
    expected = {"adaptive": "change_rate", "gradient": "gradient_norm", "spectrum": "signal_to_noise"}
    assert signals == expected


# Warm-up


def test_warm_up_puts_every_block_into_one_window_within_the_budget():
    rng = np.random.default_rng(7)
    for _ in range(100):
        sizes = rng.integers(1, 40, rng.integers(1, 20)).tolist()
        budget = int(rng.integers(max(sizes), sum(sizes) + 1))
        allowed = sorted(rng.choice(len(sizes), size=rng.integers(1, len(sizes) + 1), replace=False).tolist())
        windows = warmup_windows(sizes, budget, allowed=allowed)
        assert sorted(block for window in windows for block in window) == allowed
        assert all(list(window) == sorted(window) for window in windows)
        assert all(sum(sizes[block] for block in window) <= budget for window in windows)
        # First fit: no block would have fitted into an earlier window, as that was when the block came.
        for number, window in enumerate(windows):
            for earlier in windows[:number]:
                for block in window:
                    before = sum(sizes[other] for other in earlier if other > block)
                    assert before + sizes[block] > budget


def test_warm_up_begins_at_the_top():
    assert warmup_windows([1] * 7, 3) == ((4, 5, 6), (1, 2, 3), (0,))
    assert warmup_windows([1] * 7, 3, allowed=[3, 4, 5, 6]) == ((4, 5, 6), (3,))


# Bad input


class Own:
    signal = None

    def __init__(self, ranking):
        self.ranking = ranking

    def rank(self, history, budget, generator):
        return self.ranking


def test_object_of_ones_own_is_a_policy():
    own = Own([np.int64(2), 0])
    assert make_policy(own) is own
    assert decide(own, equal_history(3), 10, seed=0) == (2,)
    assert decide(own, equal_history(3), 10, seed=0, allowed=[0, 1]) == (0,)


@pytest.mark.parametrize("ranking", [[3], [-1], [0, 0], [0.5], [True], [], ["0"]], ids=lambda ranking: str(ranking))
def test_ranking_that_is_none_is_refused_by_name(ranking):
    with pytest.raises(ValueError, match="Invalid `ranking of Own`"):
        decide(Own(ranking), equal_history(3), 10, seed=0)


def test_ranking_of_blocks_that_are_not_allowed_alone_is_refused():
    with pytest.raises(ValueError, match=r"Invalid `ranking of Own`: got \[0\], expected at least one block out of"):
        decide(Own([0]), equal_history(3), 10, seed=0, allowed=[1, 2])


@pytest.mark.parametrize("policy", [RandomPolicy(), CyclicPolicy(), AdaptivePolicy(), LastNPolicy(), SpectrumPolicy()])
def test_budget_that_a_block_does_not_fit_is_refused_with_the_share_it_needs(policy):
    history = LayerHistory(np.array([30, 31, 39]), np.ones(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"Invalid `active_fraction`: got a budget of 29 parameters.*at least 0\.3"):
        decide(policy, history, 29, seed=0)


def test_block_that_could_never_learn_is_refused_unless_it_need_not():
    history = LayerHistory(np.array([10, 10, 39, 2]), np.array([1.0, 2.0, 3.0, 1.0]), np.zeros(4))
    for policy in (RandomPolicy(), AdaptivePolicy(), CyclicPolicy(), GradientPolicy()):
        with pytest.raises(ValueError, match=r"at least 39, those of block 2.*Set it to at least 0\.64"):
            decide(policy, history, 20, seed=0)
        assert 2 not in decide(policy, history, 20, seed=0, allowed=[0, 1, 3])
    assert decide(SpectrumPolicy(), history, 20, seed=0) == (0, 1)
    with pytest.raises(ValueError, match=r"got a budget of 1 parameters, expected at least 2, those of block 3"):
        decide(SpectrumPolicy(), history, 1, seed=0)
    with pytest.raises(ValueError, match=r"got a budget of 9 parameters, expected at least 10, those of block 1"):
        decide(LastNPolicy(), history, 9, seed=0, allowed=[0, 1])
    assert decide(LastNPolicy(), history, 20, seed=0) == (3,)
    with pytest.raises(ValueError, match="at least 39, those of block 2"):
        warmup_windows(history.sizes, 20)


@pytest.mark.parametrize("allowed", [[], [4], [1, 1]])
def test_allowed_blocks_that_do_not_exist_are_refused(allowed):
    with pytest.raises(ValueError, match="Invalid `allowed`"):
        decide(RandomPolicy(), equal_history(3), 10, seed=0, allowed=allowed)
    with pytest.raises(ValueError, match="Invalid `allowed`"):
        warmup_windows([1, 1, 1], 2, allowed=allowed)


def test_history_of_arrays_that_do_not_belong_together_is_refused():
    with pytest.raises(ValueError, match=r"Invalid `scores`: got 2 values, expected 3"):
        LayerHistory(np.ones(3), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"Invalid `ages`: got 4 values, expected 3"):
        LayerHistory(np.ones(3), np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match=r"Invalid `sizes`: got \[1, 0\]"):
        LayerHistory(np.array([1, 0]), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="Invalid `sizes`"):
        LayerHistory(np.array([]), np.array([]), np.array([]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaptivePolicy(exploration=1.1), r"Invalid `exploration`: got 1.1"),
        (lambda: AdaptivePolicy(exploration=-0.1), r"Invalid `exploration`"),
        (lambda: AdaptivePolicy(aging=-0.1), r"Invalid `aging`"),
        (lambda: AdaptivePolicy(aging=math.inf), r"Invalid `aging`"),
        (lambda: GradientPolicy(exploration=math.nan), r"Invalid `exploration`"),
        (lambda: CyclicPolicy(order="sideways"), r"Invalid `order`.*random, ascending, descending"),
        (lambda: FixedPolicy([]), r"Invalid `blocks`"),
        (lambda: FixedPolicy([1, 1]), r"Invalid `blocks`.*each once"),
        (lambda: FixedPolicy([-1]), r"Invalid `blocks`"),
        (lambda: FixedPolicy(["layers.0"]), r"Invalid `blocks`"),
        (lambda: make_policy("adaptiv"), r"Invalid `policy`: got adaptiv, expected one of .*adaptive.*spectrum"),
        (
            lambda: make_policy("adaptive", order="random"),
            r"Invalid `order`.*options of `adaptive`: exploration, aging",
        ),
        (lambda: make_policy("random", exploration=0.1), r"Invalid `exploration`.*`random` has no options"),
        (lambda: make_policy("random", signal="change_rate"), r"Invalid `signal`"),
        (lambda: make_policy("fixed"), r"Invalid `blocks`: got nothing"),
        (lambda: make_policy(object()), r"Invalid `policy`.*an object with `signal` and `rank`"),
        (lambda: make_policy(AdaptivePolicy), r"Invalid `policy`.*an object with"),
        (lambda: make_policy(AdaptivePolicy(), aging=0.5), r"Invalid `policy`.*Set them on the object"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_are_made_by_name(name):
    policy = make_policy(name, **({"blocks": [1]} if name == "fixed" else {}))
    assert type(policy) is POLICIES[name]
    assert isinstance(policy, LayerPolicy)
    assert make_policy(policy) is policy
    assert hash(policy) == hash(make_policy(policy))


def test_options_reach_the_named_policy():
    assert make_policy("adaptive", exploration=0.5, aging=0.0) == AdaptivePolicy(0.5, 0.0)
    assert make_policy("gradient", exploration=0.5) == GradientPolicy(0.5)
    assert make_policy("cyclic", order="ascending") == CyclicPolicy("ascending")
    assert make_policy("fixed", blocks=[2, 0]) == FixedPolicy((2, 0))
