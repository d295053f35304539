import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from hf_curriculum.curriculum.config import CurriculumConfig
from hf_curriculum.curriculum.plan import build_plan
from hf_curriculum.curriculum.sampler import CurriculumSampler


def plan_of(num_rows=61, global_batch_size=8, **options):
    levels = np.arange(num_rows) % 3
    return build_plan(levels, CurriculumConfig(replay_fraction=0.3), global_batch_size=global_batch_size, **options)


def test_sampler_yields_the_plan_as_python_integers_again_and_again():
    plan = plan_of(num_rows=9000)
    sampler = CurriculumSampler(plan)
    first = list(sampler)
    assert first == plan.indices.tolist() == list(sampler)
    assert {type(row) for row in first} == {int}
    assert len(sampler) == len(first) > 4096


def test_half_a_pass_leaves_no_trace():
    sampler = CurriculumSampler(plan_of())
    rows = iter(sampler)
    started = [next(rows) for _ in range(10)]
    assert list(sampler)[:10] == started
    assert len(sampler) == len(list(sampler))


def test_sampler_leaves_the_global_generators_alone():
    before = torch.random.get_rng_state()
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 - the legacy global state is what is being watched
    list(CurriculumSampler(plan_of()))
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002 - as above


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_batches_follow_the_plan(workers):
    plan = plan_of()
    loader = DataLoader(list(range(61)), batch_size=8, sampler=CurriculumSampler(plan), num_workers=workers)
    batches = [batch.tolist() for batch in loader]
    assert batches == plan.indices.reshape(-1, 8).tolist()


def rows_per_step(plan, world, per_device, accumulation):
    shards = []
    for rank in range(world):
        batches = BatchSampler(CurriculumSampler(plan), per_device, drop_last=False)
        shards.append(list(BatchSamplerShard(batches, world, rank)))
    return [
        sorted(row for shard in shards for batch in shard[start : start + accumulation] for row in batch)
        for start in range(0, len(shards[0]), accumulation)
    ]


@pytest.mark.parametrize("max_steps", [-1, 5, 30])
@pytest.mark.parametrize(("per_device", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_optimizer_steps_hold_the_same_rows_for_one_and_two_processes(per_device, accumulation, max_steps):
    plan = plan_of(max_steps=max_steps)
    expected = [sorted(rows) for rows in plan.indices.reshape(-1, 8).tolist()]
    assert rows_per_step(plan, 1, per_device, 2 * accumulation) == expected
    assert rows_per_step(plan, 2, per_device, accumulation) == expected
