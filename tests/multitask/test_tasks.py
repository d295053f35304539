"""Names and ids of tasks."""

import json

import numpy as np
import pytest
import torch

from hf_curriculum.multitask.tasks import COMMON_TASK_ID, UNIFORM_TASK_ID, TaskRegistry


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry(["qa", "summary", "code"])


def test_ids_are_positions(registry: TaskRegistry) -> None:
    assert registry.names == ("qa", "summary", "code")
    assert len(registry) == 3
    assert "code" in registry
    assert "common" not in registry
    assert [registry.id(name) for name in registry] == [0, 1, 2]
    assert [registry.name(number) for number in (0, 1, 2, -1, -2)] == ["qa", "summary", "code", "common", "uniform"]


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("summary", [1]),
        (2, [2]),
        (["code", "qa"], [2, 0]),
        (("code", 1), [2, 1]),
        ([np.int64(2), 0], [2, 0]),
        (torch.tensor([1, 2], dtype=torch.int32), [1, 2]),
        (torch.tensor(1), [1]),
        ("common", [COMMON_TASK_ID]),
        (["uniform", "qa"], [UNIFORM_TASK_ID, 0]),
    ],
    ids=str,
)
def test_ids_of_all_spellings(registry: TaskRegistry, tasks: object, expected: list[int]) -> None:
    ids = registry.ids(tasks)
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


def test_one_task_is_repeated_for_a_batch(registry: TaskRegistry) -> None:
    assert registry.ids("code", batch_size=3).tolist() == [2, 2, 2]
    assert registry.ids(torch.tensor(1), batch_size=2).tolist() == [1, 1]


def test_ids_per_token_keep_their_shape(registry: TaskRegistry) -> None:
    per_token = torch.tensor([[0, 0, 1, 2]])
    assert torch.equal(registry.ids(per_token, batch_size=1), per_token)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("poetry", "got poetry, expected one of 'qa', 'summary', 'code'"),
        (["qa", None], "got no task"),
        (3, r"got 3, expected an id in \[0, 3\)"),
        (-1, r"got -1, expected an id in \[0, 3\)"),
        (torch.tensor([0, 7]), r"got 7, expected an id in \[0, 3\)"),
        (torch.tensor([[0, -2]]), r"got -2, expected an id"),
        (torch.tensor([0.0]), "dtype torch.float32"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"shape \(1, 1, 1\)"),
        (True, "names or ids of tasks"),
        ([1.5], "names or ids of tasks"),
    ],
    ids=str,
)
def test_unknown_tasks_are_refused(registry: TaskRegistry, tasks: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.ids(tasks)


def test_number_of_tasks_must_fit_the_batch(registry: TaskRegistry) -> None:
    with pytest.raises(ValueError, match="got 2 tasks, expected one task, or one for each of the 3 rows"):
        registry.ids(["qa", "code"], batch_size=3)


@pytest.mark.parametrize(("policy", "number"), [("common", -1), ("uniform", -2)])
def test_policy_for_unknown_tasks(policy: str, number: int) -> None:
    registry = TaskRegistry(["qa", "code"], unknown_task=policy)
    assert registry.ids(["poetry", None, "code"]).tolist() == [number, number, 1]
    assert registry.ids(torch.tensor([-2, -1, 1])).tolist() == [-2, -1, 1]
    with pytest.raises(ValueError, match=r"got -3, expected an id in \[-2, 2\)"):
        registry.ids(-3)


def test_values_on_a_device_are_not_read(registry: TaskRegistry) -> None:
    # A meta tensor has no values: reading one, as a check on a device would, raises.
    assert registry.ids(torch.zeros(4, dtype=torch.int32, device="meta")).shape == (4,)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "a list of at least one name"),
        ("qa", "a list of at least one name"),
        ([1], "strings"),
        ([""], "this one is empty"),
        (["qa", "qa"], "unique names"),
        (["qa", "QA"], "unique names, also where case is ignored"),
        (["\u00e9t\u00e9", "e\u0301te\u0301"], "unique names"),
        (["../x"], "no slash"),
        (["a\\b"], "no slash"),
        ([".."], "no leading dot"),
        ([".hidden"], "no leading dot"),
        (["a\0b"], "no control characters"),
        (["a\nb"], "no control characters"),
        (["\ud800"], "no control characters or lone surrogates"),
        ([" qa"], "no spaces around"),
        (["x" * 201], "at most 200 bytes"),
        (["common"], "have a meaning here"),
        (["qa", "uniform"], "have a meaning here"),
    ],
    ids=ascii,
)
def test_bad_names_are_refused(names: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskRegistry(names)


def test_bad_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="`unknown_task`: got drop"):
        TaskRegistry(["qa"], unknown_task="drop")


def test_survives_json(registry: TaskRegistry) -> None:
    assert TaskRegistry.from_dict(json.loads(json.dumps(registry.to_dict()))) == registry
    assert registry != TaskRegistry(["summary", "qa", "code"])
    assert registry != TaskRegistry(["qa", "summary", "code"], unknown_task="common")
    with pytest.raises(ValueError, match="task registry"):
        TaskRegistry.from_dict({"names": ["qa"]})


def test_other_order_is_mapped_by_name(registry: TaskRegistry) -> None:
    other = TaskRegistry(["code", "qa"])
    table = registry.remap(other)
    for name in ("code", "qa", "uniform", "common"):
        assert table[other.id(name)] == registry.id(name)
    with pytest.raises(ValueError, match="got poetry"):
        registry.remap(TaskRegistry(["poetry"]))
