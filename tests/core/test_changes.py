"""How far parameters moved: against sums in numpy, in half precision, and from shards of several processes."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_curriculum.core.changes import RollingReference


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)


def moved(module, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_by_group_equal_a_float64_loop(dtype):
    module = model(dtype)
    parameters = dict(module.named_parameters())
    before = {name: parameter.detach().double().numpy().copy() for name, parameter in parameters.items()}
    reference = RollingReference(parameters)
    moved(module)
    group_of = {"0.weight": 1, "0.bias": 1, "1.weight": 0}
    expected = np.zeros((3, 2))
    for name, group in group_of.items():
        now = parameters[name].detach().double().numpy()
        expected[group] += [np.sum((now - before[name]) ** 2), np.sum(before[name] ** 2)]
    found = reference.squared_sums(group_of, 3)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(found.numpy()[2], [0.0, 0.0])


def test_without_names_the_sums_are_zero():
    assert RollingReference(dict(model().named_parameters())).squared_sums({}, 2).tolist() == [[0.0, 0.0]] * 2


def test_what_stands_still_has_not_changed_and_the_reference_can_be_taken_again():
    module = model()
    reference = RollingReference(dict(module.named_parameters()))
    moved(module)
    assert reference.squared_sums({"0.weight": 0}, 1)[0, 0] > 0
    reference.capture()
    assert reference.squared_sums({"0.weight": 0, "1.weight": 0}, 1)[0, 0] == 0


def test_a_pair_is_what_is_and_what_was():
    module = model()
    before = module[0].weight.detach().clone()
    reference = RollingReference(dict(module.named_parameters()))
    moved(module)
    live, then = reference.pair("0.weight")
    assert torch.equal(live, module[0].weight)
    assert torch.equal(then, before)


SCRIPT = """
    import sys
    import numpy as np, torch, torch.distributed as dist
    import deepspeed
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from hf_curriculum.core.changes import RollingReference
    from hf_curriculum.core.distributed import end_processes

    dist.init_process_group("gloo")

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))  # 35 elements: the last partition is padded

    def move(module, full):
        with torch.no_grad():
            for parameter in module.parameters():
                with full(parameter) as values:
                    values.add_(1.0)

    whole = model()
    expected = RollingReference(dict(whole.named_parameters()))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(1.0)
    group_of = {"0.weight": 0, "1.weight": 1, "1.bias": 1}
    expected = expected.squared_sums(group_of, 2)

    sharded = model()
    fully_shard(sharded)
    reference = RollingReference(dict(sharded.named_parameters()), model=sharded)
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(reference.squared_sums(group_of, 2), expected)

    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
    }
    module = model()
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), config=config
    )
    # A padding that is no number must not reach the sums.
    for parameter in module.parameters():
        rest = parameter.ds_numel - dist.get_rank() * parameter.ds_tensor.numel()
        parameter.ds_tensor.data[max(0, rest):] = float("nan")
    reference = RollingReference(dict(module.named_parameters()), model=engine)
    for parameter in module.parameters():
        parameter.ds_tensor.data.add_(1.0)
    torch.testing.assert_close(reference.squared_sums(group_of, 2), expected)
    sys.stdout.write(f"ended {dist.get_rank()}\\n")
    end_processes()
"""


@pytest.mark.distributed
def test_shards_and_partitions_add_up(launch):
    text = launch(SCRIPT, 2, env={"DS_ACCELERATOR": "cpu"}).stdout
    assert "ended 0" in text
    assert "ended 1" in text
