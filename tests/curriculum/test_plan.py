import json
from collections import Counter
from dataclasses import asdict, replace
from fractions import Fraction
from math import ceil

import numpy as np
import pytest

from hf_curriculum.core.order import draw_order, group_by_length, seeded_order
from hf_curriculum.curriculum.config import PACINGS, CurriculumConfig
from hf_curriculum.curriculum.pacing import StageContent, spread_groups
from hf_curriculum.curriculum.plan import CurriculumPlan, build_plan


REPLAYING = [pacing for pacing in PACINGS if pacing != "random"]


def random_levels(num_rows, num_levels, seed=0):
    levels = np.random.default_rng(seed).integers(0, num_levels, num_rows)
    levels[:num_levels] = range(num_levels)
    return levels


def naive_mix(streams, key):
    slots = seeded_order(sum(map(len, streams)), *key).tolist()
    owner = {}
    for number, stream in enumerate(streams):
        owner |= dict.fromkeys(slots[: len(stream)], number)
        slots = slots[len(stream) :]
    heads = [iter(stream) for stream in streams]
    return [(next(heads[owner[slot]]), owner[slot]) for slot in range(len(owner))]


def naive_stages(levels, config, epochs, seed):
    """Every stage as a list of (row, is replay), by loops."""
    levels, num_levels = list(levels), config.num_levels
    if config.pacing == "random":
        return [[(row, False) for row in draw_order(len(levels), round(epochs * len(levels)), seed, 0, 0).tolist()]]
    if config.pacing == "random_levels":
        levels = [levels[i] for i in seeded_order(len(levels), seed, 3)]
    members = [[row for row, level in enumerate(levels) if level == wanted] for wanted in range(num_levels)]
    draws = []
    for level, rows in enumerate(members):
        drawn = draw_order(len(rows), round(epochs * len(rows)), seed, 0, level)
        draws.append([rows[i] for i in drawn])
    order = list(range(num_levels))[:: -1 if config.pacing == "reverse" else 1]
    stages = []
    for stage, level in enumerate(order):
        if config.pacing == "cumulative":
            streams = [np.array_split(draws[j], num_levels - j)[stage - j].tolist() for j in range(stage + 1)]
        else:
            streams = [draws[level]]
        count = round(config.replay_fraction * sum(map(len, streams))) if stage else 0
        pool = sorted(row for earlier in order[:stage] for row in members[earlier])
        replay = [pool[i] for i in draw_order(len(pool), count, seed, 1, stage)] if count else []
        mixed = naive_mix([*streams, replay], (seed, 2, stage))
        stages.append([(int(row), owner == len(streams)) for row, owner in mixed])
    return stages


def naive_shorten(steps, max_steps):
    quota = [Fraction(count * max_steps, sum(steps)) for count in steps]
    short = [max(1, int(share)) for share in quota]
    while sum(short) < max_steps:
        short[max(range(len(short)), key=lambda i: (quota[i] - short[i], -i))] += 1
    while sum(short) > max_steps:
        short[max((i for i in range(len(short)) if short[i] > 1), key=lambda i: (short[i] - quota[i], -i))] -= 1
    return short


def naive_plan(levels, config, batch, epochs=1.0, max_steps=-1, seed=0, lengths=None):
    """The rows with their flags, and (steps, own, replayed, filled) of every stage."""
    multiple = 1
    while (
        max_steps > 0
        and ceil(sum(map(len, naive_stages(levels, config, epochs * multiple, seed))) / batch) < max_steps
    ):
        multiple += 1
    stages = naive_stages(levels, config, epochs * multiple, seed)
    ends = [ceil(sum(map(len, stages[: i + 1])) / batch) for i in range(len(stages))]
    steps = [end - start for start, end in zip([0, *ends], ends)]
    if 0 < max_steps < sum(steps):
        steps = naive_shorten(steps, max_steps)
    taken, rows, table = 0, [], []
    for i, stage in enumerate(stages):
        kept = stage[taken:][: steps[i] * batch]
        if lengths is not None:
            distinct = len({row for row, _ in stage[: taken + len(kept)]})
            places = group_by_length(
                np.arange(len(kept)),
                np.array([lengths[row] for row, _ in kept]),
                batch,
                seed,
                4,
                i,
                group_batches=min(50, max(1, distinct // (4 * batch))),
            )
            kept = [kept[place] for place in places]
        taken = steps[i] * batch - len(kept)
        if i + 1 < len(stages):
            filled = stages[i + 1][:taken]
        else:
            own = [row for row, is_replay in stage if not is_replay]
            filled = [(own[j], False) for j in draw_order(len(own), taken, seed, 5)]
        rows += kept + filled
        num_replayed = sum(is_replay for _, is_replay in kept)
        table.append((steps[i], len(kept) - num_replayed, num_replayed, taken))
    return rows, table


def table_of(plan):
    return [(stage.num_steps, stage.num_samples, stage.num_replayed, stage.num_filled) for stage in plan.stages]


@pytest.mark.parametrize("group", [False, True], ids=["shuffled", "grouped"])
@pytest.mark.parametrize("max_steps", [-1, 4, 9, 60], ids=["whole", "four steps", "nine steps", "sixty steps"])
@pytest.mark.parametrize("pacing", REPLAYING)
def test_plan_equals_loops_over_rows(pacing, max_steps, group):
    for seed, (epochs, replay, batch) in enumerate([(1, 0.0, 8), (2.5, 0.3, 7), (1, 1.0, 5), (0.7, 0.25, 4)]):
        levels = random_levels(83, 4, seed)
        lengths = np.random.default_rng(seed).integers(1, 60, 83)
        config = CurriculumConfig(num_levels=4, pacing=pacing, replay_fraction=replay, group_by_length=group)
        plan = build_plan(
            levels,
            config,
            global_batch_size=batch,
            num_train_epochs=epochs,
            max_steps=max_steps,
            seed=seed,
            lengths=lengths if group else None,
        )
        rows, table = naive_plan(levels, config, batch, epochs, max_steps, seed, lengths if group else None)
        assert table_of(plan) == table
        assert list(zip(plan.indices.tolist(), plan.replayed.tolist())) == rows


@pytest.mark.parametrize("max_steps", [-1, 7, 60])
def test_random_plan_equals_one_shuffled_stream_cut_into_equal_parts(max_steps):
    levels, config = random_levels(83, 4), CurriculumConfig(num_levels=4, pacing="random")
    plan = build_plan(levels, config, global_batch_size=5, num_train_epochs=2, max_steps=max_steps, seed=3)
    rows, table = naive_plan(levels, config, 5, 2, max_steps, 3)
    assert plan.indices.tolist() == [row for row, _ in rows]
    steps = [stage.num_steps for stage in plan.stages]
    assert sum(steps) == table[0][0]
    assert max(steps) - min(steps) <= 1
    assert sum(stage.num_samples for stage in plan.stages) == table[0][1]
    assert [stage.num_filled for stage in plan.stages] == [0, 0, 0, table[0][3]]
    assert {stage.levels for stage in plan.stages} == {(0, 1, 2, 3)}


@pytest.mark.parametrize("batch", [1, 3, 16, 20])
@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("pacing", PACINGS)
def test_every_row_is_seen_as_often_as_the_user_said(pacing, epochs, batch):
    levels = random_levels(101, 3)
    replay = 0.0 if pacing == "random" else 0.4
    config = CurriculumConfig(num_levels=3, pacing=pacing, replay_fraction=replay)
    plan = build_plan(levels, config, global_batch_size=batch, num_train_epochs=epochs, seed=2)
    body = len(plan.indices) - plan.stages[-1].num_filled
    seen = Counter(plan.indices[:body][~plan.replayed[:body]].tolist())
    assert seen == dict.fromkeys(range(101), epochs)
    assert plan.replayed.any() == (replay > 0)


@pytest.mark.parametrize("pacing", PACINGS)
def test_stages_join_at_global_batches_and_account_for_every_row(pacing):
    plan = build_plan(random_levels(97, 3), CurriculumConfig(pacing=pacing), global_batch_size=8, num_train_epochs=1.5)
    assert len(plan.indices) == plan.num_steps * 8 == plan.stages[-1].end_step * 8
    assert [stage.index for stage in plan.stages] == [0, 1, 2]
    assert plan.stages[0].first_step == 0
    for stage, following in zip(plan.stages, plan.stages[1:]):
        assert stage.end_step == following.first_step
    for stage in plan.stages:
        assert stage.num_samples + stage.num_replayed + stage.num_filled == 8 * stage.num_steps
        assert 0 <= stage.num_filled < 8


def test_fractional_epochs_round_for_each_level():
    levels = [0] * 5 + [1] * 10 + [2] * 21
    plan = build_plan(levels, CurriculumConfig(), global_batch_size=1, num_train_epochs=0.5)
    assert [stage.num_samples for stage in plan.stages] == [2, 5, 10]
    assert max(Counter(plan.indices.tolist()).values()) == 1


@pytest.mark.parametrize(
    ("pacing", "levels", "introduces"),
    [
        ("staged", [(0,), (1,), (2,)], [(0,), (1,), (2,)]),
        ("cumulative", [(0,), (0, 1), (0, 1, 2)], [(0,), (1,), (2,)]),
        ("reverse", [(2,), (1,), (0,)], [(2,), (1,), (0,)]),
        ("random", [(0, 1, 2)] * 3, [()] * 3),
        ("random_levels", [(0, 1, 2)] * 3, [()] * 3),
    ],
)
def test_stages_say_what_they_train_and_what_is_new(pacing, levels, introduces):
    plan = build_plan(random_levels(60, 3), CurriculumConfig(pacing=pacing), global_batch_size=4)
    assert [stage.levels for stage in plan.stages] == levels
    assert [stage.introduces for stage in plan.stages] == introduces


@pytest.mark.parametrize("pacing", ["staged", "reverse", "cumulative"])
def test_stages_hold_the_rows_of_their_levels_and_replay_those_of_earlier_ones(pacing):
    levels = np.repeat([0, 1, 2], 40)
    plan = build_plan(levels, CurriculumConfig(pacing=pacing, replay_fraction=0.5), global_batch_size=1, seed=1)
    trained: set[int] = set()
    for stage in plan.stages:
        rows = levels[plan.indices[stage.first_step : stage.end_step]]
        flags = plan.replayed[stage.first_step : stage.end_step]
        assert set(rows[~flags].tolist()) == set(stage.levels)
        assert set(rows[flags].tolist()) == trained
        assert stage.num_replayed == (round(0.5 * stage.num_samples) if trained else 0)
        trained |= set(stage.introduces)


def test_replay_takes_no_row_twice_before_all_were_taken_and_differs_between_stages():
    levels = np.repeat([0, 1, 2], [30, 40, 40])
    plan = build_plan(levels, CurriculumConfig(replay_fraction=1.0), global_batch_size=1)
    second, third = (
        plan.indices[s.first_step : s.end_step][plan.replayed[s.first_step : s.end_step]] for s in plan.stages[1:]
    )
    assert sorted(second[:30].tolist()) == list(range(30))
    assert len(second) == 40
    assert len(set(third.tolist())) == 40
    assert [row for row in third.tolist() if row < 30] != second[: (third < 30).sum()].tolist()


def test_random_levels_have_the_sizes_of_the_real_ones_but_other_members():
    levels = np.repeat([0, 1, 2], [600, 1200, 1800])
    plan = build_plan(levels, CurriculumConfig(pacing="random_levels"), global_batch_size=1)
    assert [stage.num_samples for stage in plan.stages] == [600, 1200, 1800]
    assert np.bincount(levels[plan.indices[:600]]) == pytest.approx([100, 200, 300], rel=0.2)


def test_short_last_batch_is_filled_from_the_next_stage_and_at_the_end_from_the_last():
    levels = np.repeat([0, 1], [5, 6])
    plan = build_plan(levels, CurriculumConfig(num_levels=2), global_batch_size=4)
    assert table_of(plan) == [(2, 5, 0, 3), (1, 3, 0, 1)]
    assert sorted(plan.indices[:11].tolist()) == list(range(11))
    assert levels[plan.indices[5:]].tolist() == [1] * 7


def test_fill_may_exceed_the_rows_of_the_last_stage():
    plan = build_plan([0] * 10 + [1], CurriculumConfig(num_levels=2), global_batch_size=10)
    assert plan.indices[10:].tolist() == [10] * 10
    assert plan.stages[1].num_filled == 9


@pytest.mark.parametrize("max_steps", [3, 4, 7, 12, 13, 14, 40])
@pytest.mark.parametrize("pacing", PACINGS)
def test_max_steps_is_met_exactly_with_a_step_for_every_stage(pacing, max_steps):
    plan = build_plan(
        np.repeat([0, 1, 2], [5, 20, 25]), CurriculumConfig(pacing=pacing), global_batch_size=4, max_steps=max_steps
    )
    assert plan.num_steps == max_steps
    assert min(stage.num_steps for stage in plan.stages) >= 1


def test_shortened_stages_keep_the_beginning_of_their_order():
    levels = np.repeat([0, 1, 2], [40, 80, 120])
    whole = build_plan(levels, CurriculumConfig(), global_batch_size=4, seed=5)
    short = build_plan(levels, CurriculumConfig(), global_batch_size=4, seed=5, max_steps=30)
    assert [stage.num_steps for stage in short.stages] == [5, 10, 15]
    for long_stage, stage in zip(whole.stages, short.stages):
        beginning = whole.indices[long_stage.first_step * 4 :][: stage.num_steps * 4]
        assert short.indices[stage.first_step * 4 : stage.end_step * 4].tolist() == beginning.tolist()
    assert all(stage.num_filled == 0 for stage in short.stages)


def test_steps_that_small_stages_must_keep_are_taken_from_the_large_one():
    levels = np.repeat([0, 1, 2, 3], [200, 4, 4, 4])
    plan = build_plan(levels, CurriculumConfig(num_levels=4), global_batch_size=4, max_steps=5)
    assert [stage.num_steps for stage in plan.stages] == [2, 1, 1, 1]


def test_max_steps_beyond_the_plan_repeats_epochs_by_the_smallest_multiple():
    plan = build_plan([0, 1, 2] * 4, CurriculumConfig(), global_batch_size=4, num_train_epochs=0.5, max_steps=5)
    assert plan.settings["planned_epochs"] == 1.5
    assert plan.settings["num_train_epochs"] == 0.5
    tiny = build_plan([0, 1, 2], CurriculumConfig(), global_batch_size=1, num_train_epochs=0.3, max_steps=3)
    assert tiny.settings["planned_epochs"] == pytest.approx(0.6)


def test_grouping_by_length_is_aligned_with_the_global_batches():
    rng = np.random.default_rng(0)
    levels, lengths = rng.integers(0, 3, 3000), rng.integers(1, 1000, 3000)
    plain = build_plan(levels, CurriculumConfig(), global_batch_size=16)
    grouped = build_plan(levels, CurriculumConfig(group_by_length=True), global_batch_size=16, lengths=lengths)
    assert table_of(grouped) == table_of(plain)
    padding = [
        [lengths[rows].max() * 16 - lengths[rows].sum() for rows in plan.indices.reshape(-1, 16)]
        for plan in (plain, grouped)
    ]
    assert sum(padding[1]) < 0.2 * sum(padding[0])
    for stage in plain.stages:
        steps = slice(stage.first_step * 16, stage.end_step * 16)
        if stage.num_filled == 0:
            assert sorted(plain.indices[steps].tolist()) == sorted(grouped.indices[steps].tolist())


def test_grouping_keeps_flags_beside_their_rows():
    levels = np.repeat([0, 1], [50, 100])
    config = CurriculumConfig(num_levels=2, replay_fraction=0.5, group_by_length=True)
    plan = build_plan(levels, config, global_batch_size=5, lengths=np.arange(150) % 17)
    stage = plan.stages[1]
    assert (levels[plan.indices[stage.first_step * 5 :]] == 0).tolist() == plan.replayed[
        stage.first_step * 5 :
    ].tolist()


def grouped_plan(pacing="staged", **options):
    """Three levels, and groups of 5 : 3 : 1 that are not spread alike over the levels."""
    groups = np.random.default_rng(1).choice(3, 240, p=[5 / 9, 3 / 9, 1 / 9])
    levels = (np.arange(240) * 3 // 240 + (groups == 2)) % 3
    replay = 0.0 if pacing == "random" else 0.25
    config = CurriculumConfig(pacing=pacing, replay_fraction=replay)
    return groups, build_plan(levels, config, global_batch_size=8, groups=groups, **options)


@pytest.mark.parametrize("pacing", PACINGS)
def test_groups_are_spread_in_proportion_over_each_stage(pacing):
    groups, plan = grouped_plan(pacing, num_train_epochs=2)
    # A stage's own rows begin after those that complete the batch of the stage before.
    starts = [0, *(stage.end_step * 8 for stage in plan.stages[:-1])] if pacing != "random" else [0]
    ends = [*(stage.end_step * 8 - stage.num_filled for stage in plan.stages)] if pacing != "random" else [480]
    for start, end in zip(starts, ends, strict=True):
        drawn = groups[plan.indices[start:end]]
        shares = np.bincount(drawn, minlength=3) / len(drawn)
        for group in range(3):
            seen = np.cumsum(drawn == group)
            # Twice the bound of one stretch from its start, as the borrowed rows were cut off.
            assert np.abs(seen - shares[group] * np.arange(1, len(drawn) + 1)).max() <= 2 * (0.5 + 1.5 * shares[group])


@pytest.mark.parametrize("pacing", PACINGS)
def test_groups_move_rows_inside_their_stage_only(pacing):
    _, spread = grouped_plan(pacing)
    plain = build_plan(
        (np.arange(240) * 3 // 240 + (grouped_plan()[0] == 2)) % 3,
        CurriculumConfig(pacing=pacing, replay_fraction=0.0 if pacing == "random" else 0.25),
        global_batch_size=8,
    )
    assert spread != plain
    assert Counter(spread.indices[: -spread.stages[-1].num_filled or None].tolist()) == Counter(
        plain.indices[: -plain.stages[-1].num_filled or None].tolist()
    )
    if pacing != "random":
        assert [stage.num_steps for stage in spread.stages] == [stage.num_steps for stage in plain.stages]


def test_spread_groups_keep_the_order_inside_a_group_and_the_flags_beside_their_rows():
    rows = np.array([9, 3, 7, 3, 1, 0, 9, 5])
    replayed = np.array([1, 0, 0, 1, 0, 0, 0, 1], dtype=bool)
    groups = np.array([0, 0, 9, 1, 9, 1, 9, 0, 9, 1])
    (spread,) = spread_groups([StageContent((0,), (), rows, replayed)], groups)
    for group in (0, 1):
        before, after = groups[rows] == group, groups[spread.rows] == group
        assert spread.rows[after].tolist() == rows[before].tolist()
        assert spread.replayed[after].tolist() == replayed[before].tolist()


def test_equal_places_of_groups_are_taken_in_a_seeded_order():
    content = StageContent((0,), (), np.arange(40), np.zeros(40, dtype=bool))
    groups = np.arange(40) % 2
    orders = [groups[next(spread_groups([content], groups, seed)).rows].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(pair) == [0, 1] for pair in zip(orders[0][::2], orders[0][1::2], strict=True))


def test_one_group_leaves_the_plan_as_it_is():
    levels = random_levels(50, 3)
    plans = [
        build_plan(levels, CurriculumConfig(), global_batch_size=4, seed=2, groups=groups)
        for groups in (None, [7] * 50)
    ]
    assert plans[0] == plans[1]


def test_places_of_tasks_as_levels_make_a_curriculum_over_tasks():
    tasks = np.array([2, 0, 1] * 10)
    plan = build_plan(tasks, CurriculumConfig(), global_batch_size=5)
    assert tasks[plan.indices].tolist() == [0] * 10 + [1] * 10 + [2] * 10


def base():
    return {"levels": [0, 1, 2] * 9, "config": CurriculumConfig(), "global_batch_size": 2, "seed": 0}


CHANGES = {
    "levels": {"levels": [0, 1, 2] * 8 + [0, 2, 1]},
    "rows": {"levels": [0, 1, 2] * 10},
    "pacing": {"config": CurriculumConfig(pacing="cumulative")},
    "order of levels": {"config": CurriculumConfig(pacing="reverse")},
    "replay": {"config": CurriculumConfig(replay_fraction=0.5)},
    "batch": {"global_batch_size": 3},
    "seed": {"seed": 1},
    "negative seed": {"seed": -1},
    "epochs": {"num_train_epochs": 2},
    "steps": {"max_steps": 4},
    "grouping": {"config": CurriculumConfig(group_by_length=True), "lengths": list(range(27))},
}


def test_plan_is_a_function_of_its_arguments():
    plan = build_plan(**base())
    assert plan == build_plan(**base())
    assert hash(plan) == hash(build_plan(**base()))
    assert plan != "plan"
    assert {build_plan(**(base() | change)).hash for change in CHANGES.values()}.isdisjoint({plan.hash})


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hash_changes_with_every_argument(change):
    assert build_plan(**base()) != build_plan(**(base() | change))


def test_hash_covers_flags_stages_batch_and_rows_but_not_settings():
    plan = build_plan(**base())
    changed = [
        replace(plan, replayed=~plan.replayed),
        replace(plan, stages=(replace(plan.stages[0], num_filled=7), *plan.stages[1:])),
        replace(plan, num_rows=28),
        replace(plan, indices=plan.indices[::-1]),
    ]
    assert len({plan.hash, *(other.hash for other in changed)}) == 5
    assert replace(plan, settings={}) == plan


def test_plan_cannot_be_changed_and_leaves_the_callers_arrays_writable():
    indices = np.arange(6)
    plan = build_plan([0, 1, 2] * 2, CurriculumConfig(), global_batch_size=2)
    own = replace(plan, indices=indices)
    with pytest.raises(ValueError, match="read-only"):
        own.indices[0] = 3
    indices[0] = 0


def test_stage_at_finds_the_stage_of_every_step():
    plan = build_plan(random_levels(50, 3), CurriculumConfig(), global_batch_size=4)
    for stage in plan.stages:
        for step in range(stage.first_step, stage.end_step):
            assert plan.stage_at(step) is stage
    for step in (-1, plan.num_steps):
        with pytest.raises(
            ValueError, match=rf"Invalid `step`: got {step}, expected an integer in \[0, {plan.num_steps}\)"
        ):
            plan.stage_at(step)


def test_saved_plan_is_readable_and_loads_equal(tmp_path):
    plan = build_plan(random_levels(50, 3), CurriculumConfig(replay_fraction=0.2), global_batch_size=4, seed=9)
    plan.save(tmp_path / "new" / "plan")
    plan.save(tmp_path / "new" / "plan")
    loaded = CurriculumPlan.load(tmp_path / "new" / "plan")
    assert loaded == plan
    assert loaded.stages == plan.stages
    assert loaded.settings == plan.settings
    np.testing.assert_array_equal(loaded.indices, plan.indices)
    assert sorted(path.name for path in (tmp_path / "new" / "plan").iterdir()) == [
        "order.npy",
        "plan.json",
        "replayed.npy",
    ]
    text = json.loads((tmp_path / "new" / "plan" / "plan.json").read_text())
    assert text["hash"] == plan.hash
    assert text["settings"]["seed"] == 9
    assert text["num_replayed"] == sum(stage.num_replayed for stage in plan.stages) > 0
    assert text["stages"][1]["levels"] == [1]


def change_json(folder, **changes):
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "no order": (lambda folder: (folder / "order.npy").unlink(), "which has no order.npy"),
    "no table": (lambda folder: (folder / "plan.json").unlink(), "which has no plan.json"),
    "cut order": (
        lambda folder: (folder / "order.npy").write_bytes((folder / "order.npy").read_bytes()[:-3]),
        "cannot be read",
    ),
    "empty flags": (lambda folder: (folder / "replayed.npy").write_bytes(b""), "cannot be read"),
    "cut table": (lambda folder: (folder / "plan.json").write_text('{"hash": '), "cannot be read"),
    "list for a table": (lambda folder: (folder / "plan.json").write_text("[]"), "cannot be read"),
    "key gone": (lambda folder: (folder / "plan.json").write_text('{"format": 1}'), "cannot be read as a plan"),
    "other format": (lambda folder: change_json(folder, format=2), "Invalid `format`: got 2, expected 1"),
    "other order": (lambda folder: np.save(folder / "order.npy", np.zeros(20, dtype=np.int64)), "files were changed"),
    "row outside": (lambda folder: np.save(folder / "order.npy", np.full(20, 99)), r"expected rows in \[0, 20\)"),
    "other batch": (lambda folder: change_json(folder, global_batch_size=5), "cannot be read as a plan"),
    "other rows": (lambda folder: change_json(folder, num_rows=21), "files were changed"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_plan_is_refused(damage, message, tmp_path):
    build_plan(random_levels(20, 3), CurriculumConfig(), global_batch_size=4).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        CurriculumPlan.load(tmp_path)
    assert str(caught.value).startswith("Invalid `folder`")
    assert "Build the plan again" in str(caught.value)


def test_failed_save_leaves_the_old_plan_whole(tmp_path, monkeypatch):
    old = build_plan(**base())
    old.save(tmp_path)

    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        build_plan(**(base() | {"seed": 1})).save(tmp_path)
    assert CurriculumPlan.load(tmp_path) == old
    assert len(list(tmp_path.iterdir())) == 3


def test_parts_that_do_not_fit_are_refused():
    plan = build_plan(**base())
    with pytest.raises(ValueError, match="Invalid `stages`"):
        replace(plan, stages=plan.stages[1:])
    with pytest.raises(ValueError, match="Invalid `stages`"):
        replace(plan, stages=())
    with pytest.raises(ValueError, match=r"Invalid `indices`: got an array of shape \(3,\)"):
        replace(plan, indices=np.arange(3))
    with pytest.raises(ValueError, match=r"expected rows in \[0, 5\)"):
        replace(plan, num_rows=5)


def test_degenerate_runs_are_planned():
    one = build_plan([0], CurriculumConfig(num_levels=1), global_batch_size=4)
    assert one.indices.tolist() == [0, 0, 0, 0]
    assert table_of(one) == [(1, 1, 0, 3)]
    each = build_plan([2, 1, 0], CurriculumConfig(), global_batch_size=1)
    assert each.indices.tolist() == [2, 1, 0]
    tuples = build_plan((0, 1, 2), CurriculumConfig(), global_batch_size=1)
    assert tuples == build_plan(np.array([0, 1, 2], dtype=np.int8), CurriculumConfig(), global_batch_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "Invalid `levels`: got no rows"),
        ({"levels": [0.5, 1.0, 2.0]}, "dtype float64, expected one integer for each row"),
        ({"levels": [[0, 1, 2]]}, r"shape \(1, 3\)"),
        ({"levels": [0, 1]}, "got 2 rows, expected at least 3"),
        ({"levels": [0, 1, 2, 3]}, r"got levels 0 to 3, expected integers in \[0, 3\)"),
        ({"levels": [-1, 0, 1, 2]}, "got levels -1 to 2"),
        ({"levels": [0, 0, 2, 2]}, r"got \[2, 0, 2\] rows in the levels, expected at least one row in each"),
        ({"global_batch_size": 0}, "Invalid `global_batch_size`: got 0"),
        (
            {"global_batch_size": 27},
            "makes 1 global batches of 27 rows, expected at least one global batch for each of 3",
        ),
        ({"global_batch_size": 27, "config": CurriculumConfig(pacing="random")}, "makes 1 global batches of 27 rows"),
        ({"num_train_epochs": 0}, "Invalid `num_train_epochs`: got 0, expected a float > 0"),
        ({"num_train_epochs": float("nan")}, "Invalid `num_train_epochs`: got nan"),
        ({"num_train_epochs": float("inf")}, "Invalid `num_train_epochs`: got inf"),
        ({"num_train_epochs": 0.01}, "makes 0 global batches of 0 rows"),
        ({"max_steps": 0}, "Invalid `max_steps`: got 0"),
        ({"max_steps": 2}, "Invalid `max_steps`: got 2, expected at least 3, one step for each stage"),
        ({"seed": 0.5}, "Invalid `key`"),
        (
            {"config": CurriculumConfig(group_by_length=True)},
            "Invalid `lengths`: got None, expected the length of each row",
        ),
        (
            {"config": CurriculumConfig(group_by_length=True), "lengths": [1]},
            r"got an array of shape \(1,\), expected \(27,\)",
        ),
        ({"groups": [0, 1]}, r"`groups`: got an array of shape \(2,\), expected \(27,\)"),
        ({"groups": [0.5] * 27}, "`groups`: got values of dtype float64"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_plan(**(base() | change))


def test_stage_without_a_step_of_its_own_is_refused_by_name():
    with pytest.raises(ValueError, match=r"for each of 3 stages, which hold \[10, 1, 10\] rows. Lower `num_levels`"):
        build_plan([0] * 10 + [1] + [2] * 10, CurriculumConfig(), global_batch_size=8)


def test_stage_table_is_json():
    plan = build_plan(**base())
    json.dumps([plan.settings, [asdict(stage) for stage in plan.stages]])
