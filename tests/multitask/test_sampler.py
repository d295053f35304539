import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader

from hf_curriculum.multitask.sampler import (
    BATCH_KINDS,
    SAMPLINGS,
    MultiTaskSampler,
    apportion,
    sampling_shares,
    task_order,
)


SIZES = (60, 25, 9, 1)
TASKS = np.repeat(np.arange(len(SIZES)), SIZES)[np.random.default_rng(0).permutation(sum(SIZES))]


def make(batches="mixed", **options):
    micro = 4 if batches == "homogeneous" else None
    return MultiTaskSampler(TASKS, global_batch_size=8, batches=batches, micro_batch_size=micro, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_shares_are_the_formula(sampling, temperature):
    exponent = {"proportional": 1.0, "temperature": 1 / temperature}.get(sampling, 0.0)
    powers = [size**exponent for size in SIZES]
    expected = [power / sum(powers) for power in powers]
    np.testing.assert_allclose(sampling_shares(SIZES, sampling, temperature), expected, rtol=1e-12)


def test_temperature_one_is_proportional_and_a_high_one_uniform():
    np.testing.assert_allclose(sampling_shares(SIZES, "temperature", 1.0), sampling_shares(SIZES, "proportional"))
    np.testing.assert_allclose(sampling_shares(SIZES, "temperature", 1e9), [0.25] * 4, rtol=1e-6)
    assert sampling_shares([10**15, 1], "temperature", 1.0).min() > 0


@pytest.mark.parametrize("total", [4, 5, 17, 95, 1000])
def test_apportioned_parts_add_up_and_none_is_empty(total):
    shares = sampling_shares(SIZES, "proportional")
    parts = apportion(total, shares)
    assert parts.sum() == total
    assert parts.min() >= 1
    if parts.min() > 1 or total == 95:
        assert np.abs(parts - total * shares).max() < 1


def test_apportioning_the_rows_gives_the_rows():
    for sizes in ((1, 1, 1), (3, 7, 11, 13), SIZES):
        assert apportion(sum(sizes), sampling_shares(sizes, "proportional")).tolist() == list(sizes)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_proportional_mixed_sampling_sees_every_row_once_per_epoch(epochs):
    sampler = make(num_train_epochs=epochs)
    seen = np.bincount(sampler.indices, minlength=len(TASKS))
    filled = len(sampler) - epochs * len(TASKS)
    assert 0 <= filled < 8
    assert seen.min() == epochs
    assert (seen - epochs).sum() == filled


@pytest.mark.parametrize("batches", BATCH_KINDS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_follow_the_shares(sampling, batches):
    sampler = make(batches, sampling=sampling, num_train_epochs=20)
    unit = {"mixed": 1, "homogeneous": 4, "homogeneous_step": 8}[batches]
    expected = len(sampler) * sampling_shares(SIZES, sampling, 2.0)
    drawn = np.bincount(TASKS[sampler.indices], minlength=4)
    assert drawn.tolist() == [sampler.draws[task] for task in range(4)]
    assert np.abs(drawn - expected).max() <= unit


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rows_of_a_task_repeat_only_after_its_pass(sampling):
    sampler = make(sampling=sampling, num_train_epochs=4)
    for task, size in enumerate(SIZES):
        own = sampler.indices[TASKS[sampler.indices] == task]
        for start in range(0, len(own), size):
            part = own[start : start + size]
            assert len(np.unique(part)) == len(part)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("batches", "unit"), [("homogeneous", 4), ("homogeneous_step", 8)])
def test_a_homogeneous_batch_holds_one_task(batches, unit, sampling):
    drawn = TASKS[make(batches, sampling=sampling, num_train_epochs=5).indices].reshape(-1, unit)
    assert (drawn == drawn[:, :1]).all()
    assert len(np.unique(drawn[:, 0])) == 4


def test_mixed_batches_are_mixed():
    drawn = TASKS[make(sampling="uniform", num_train_epochs=5).indices].reshape(-1, 8)
    assert np.mean([len(np.unique(batch)) for batch in drawn]) > 3


@pytest.mark.parametrize(("batches", "unit"), [("mixed", 1), ("homogeneous", 4), ("homogeneous_step", 8)])
def test_round_robin_takes_turns(batches, unit):
    drawn = TASKS[make(batches, sampling="round_robin", num_train_epochs=3).indices]
    turns = drawn[::unit]
    assert turns.tolist() == [turn % 4 for turn in range(len(turns))]


def test_uniform_is_not_in_turns():
    drawn = TASKS[make(sampling="uniform", num_train_epochs=3).indices]
    assert drawn.tolist() != [turn % 4 for turn in range(len(drawn))]


@pytest.mark.parametrize("batches", BATCH_KINDS)
def test_order_is_a_function_of_the_arguments(batches):
    first, again, other = (make(batches, num_train_epochs=2, seed=seed) for seed in (3, 3, 4))
    assert list(first) == list(first) == list(again)
    assert first.hash == again.hash != other.hash
    assert first.indices.tolist() != other.indices.tolist()


def test_order_is_pinned():
    rows, counts = task_order([0, 0, 1, 1, 1], 6, sampling="temperature", seed=7)
    assert (rows.tolist(), counts.tolist()) == ([0, 3, 2, 1, 4, 0], [3, 3])


def test_sampler_leaves_the_global_generators_alone():
    before = torch.random.get_rng_state()
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 - the legacy global state is what is being watched
    list(make())
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002 - as above


def test_length_is_constant_and_in_full_global_batches():
    sampler = make()
    rows = iter(sampler)
    next(rows)
    assert len(sampler) == len(list(sampler)) == sampler.num_steps * 8 == 96
    assert {type(row) for row in sampler} == {int}
    with pytest.raises(ValueError, match="read-only"):
        sampler.indices[0] = 0


def test_max_steps_is_the_number_of_steps():
    assert make(max_steps=5, num_train_epochs=3).num_steps == 5
    assert make(max_steps=50).num_steps == 50


@pytest.mark.parametrize(("per_device", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_mixed_steps_hold_the_same_rows_for_one_and_two_processes(per_device, accumulation):
    sampler = make(num_train_epochs=2)
    expected = [sorted(rows) for rows in sampler.indices.reshape(-1, 8).tolist()]
    for world, accumulated in ((1, 2 * accumulation), (2, accumulation)):
        shards = [
            list(BatchSamplerShard(BatchSampler(sampler, per_device, drop_last=False), world, rank))
            for rank in range(world)
        ]
        steps = [
            sorted(row for shard in shards for batch in shard[start : start + accumulated] for row in batch)
            for start in range(0, len(shards[0]), accumulated)
        ]
        assert steps == expected


def test_homogeneous_micro_batches_reach_each_process_whole():
    sampler = make("homogeneous", num_train_epochs=3)
    for rank in range(2):
        for batch in BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, rank):
            assert len(set(TASKS[batch])) == 1


def test_skipping_batches_continues_the_order():
    sampler = make()
    loader = DataLoader(list(range(len(TASKS))), batch_size=8, sampler=sampler)
    rest = [row for batch in skip_first_batches(loader, 5) for row in batch.tolist()]
    assert rest == sampler.indices[40:].tolist()


def test_one_task_and_ids_that_are_not_dense():
    assert sorted(MultiTaskSampler([7] * 5, global_batch_size=5).indices.tolist()) == [0, 1, 2, 3, 4]
    assert MultiTaskSampler([-1, 5, 5, 5], global_batch_size=4).draws == {-1: 1, 5: 3}


def test_a_task_smaller_than_a_homogeneous_batch_repeats_its_rows():
    sampler = MultiTaskSampler([0] * 20 + [1], global_batch_size=4, batches="homogeneous_step", sampling="uniform")
    assert sampler.indices.reshape(-1, 4).tolist().count([20] * 4) == sampler.num_steps // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "sorted"}, "`sampling`: got sorted, expected one of proportional"),
        ({"sampling": "temperature", "temperature": 0.5}, "`temperature`: got 0.5"),
        ({"batches": "pure"}, "`batches`: got pure"),
        ({"num_train_epochs": 0}, "`num_train_epochs`: got 0"),
        ({"max_steps": 0}, "`max_steps`: got 0"),
        ({"micro_batch_size": 4}, "`micro_batch_size`: got 4, expected None"),
        ({"batches": "homogeneous"}, "`micro_batch_size`: got None, expected a divisor"),
        ({"batches": "homogeneous", "micro_batch_size": 3}, "`micro_batch_size`: got 3"),
        ({"batches": "homogeneous_step", "max_steps": 3}, "3 batches of 8 rows for 4 tasks"),
        ({"task_ids": []}, "got no rows"),
        ({"task_ids": [0.5]}, "dtype float64"),
        ({"global_batch_size": 0}, "`global_batch_size`: got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"task_ids": TASKS, "global_batch_size": 8, **options}
    with pytest.raises(ValueError, match=message):
        MultiTaskSampler(**arguments)


def test_bad_shares_and_orders_are_named():
    with pytest.raises(ValueError, match="`counts`"):
        sampling_shares([3, 0], "uniform")
    with pytest.raises(ValueError, match="`total`: got 1"):
        apportion(1, [0.5, 0.5])
    with pytest.raises(ValueError, match="`num_draws`: got 5, expected a multiple"):
        task_order([0, 1], 5, batch_size=2)
