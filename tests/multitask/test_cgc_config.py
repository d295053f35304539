"""What a configuration may hold, and the methods that are special cases of it."""

import pytest

from hf_curriculum.multitask.cgc_lora import CGCLoraConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_names": None}, "`task_names`: got None"),
        ({"task_names": []}, "at least one name"),
        ({"task_names": ["a", "a"]}, "unique names"),
        ({"task_names": ["../x"]}, "no slash"),
        ({"num_common_experts": -1}, "`num_common_experts`: got -1"),
        ({"num_common_experts": 0, "num_task_experts": 0}, "at least one expert"),
        ({"r": 0}, "`r`: got 0, expected an integer >= 1"),
        ({"r": 2.0}, "`r`: got 2.0"),
        ({"lora_alpha": 0}, "`lora_alpha`"),
        ({"lora_dropout": 1.0}, "`lora_dropout`"),
        ({"gate": "expert"}, "`gate`: got expert"),
        ({"gate_normalization": "max"}, "`gate_normalization`"),
        ({"gate_temperature": 0.0}, "`gate_temperature`"),
        ({"bias": "all"}, "`bias`: got all"),
        ({"unknown_task": "skip"}, "`unknown_task`"),
        ({"task_embedding_dim": 8}, "None unless `gate='task_embedding'`"),
        ({"shared_down_projection": True}, "False with task-specific experts"),
        ({"task_matrix": True}, "without `shared_down_projection=True`"),
        ({"unknown_task": "common", "num_common_experts": 0, "num_task_experts": 2}, "no common expert"),
        ({"num_common_experts": 0, "gate": "token"}, "has nothing to gate"),
        ({"layers_pattern": "h"}, "None without `layers_to_transform`"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "where `target_modules` is a string"),
        ({"task_type": "NO_SUCH"}, "Invalid task type"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CGCLoraConfig(**{"task_names": ["a", "b"], **fields})


def test_ranks_follow_from_the_experts() -> None:
    layout = CGCLoraConfig(task_names=["a", "b", "c"], num_common_experts=2, num_task_experts=1, r=4).layout
    assert (layout.visible, layout.num_experts) == (3, 5)
    assert (layout.visible_rank, layout.total_rank, layout.idle_rank) == (12, 20, 8)
    assert layout.own_slice(1) == slice(12, 16)


def test_presets_are_what_they_are_called() -> None:
    tasks = ["a", "b"]
    plain = CGCLoraConfig.plain_lora(tasks, r=8, lora_alpha=16)
    assert (plain.layout.total_rank, plain.layout.visible_rank) == (8, 8)
    separate = CGCLoraConfig.separate_loras(tasks, r=8, lora_alpha=16)
    assert (separate.layout.total_rank, separate.layout.visible_rank) == (16, 8)
    moe = CGCLoraConfig.moelora(tasks, r=16, lora_alpha=32)
    assert (moe.layout.num_experts, moe.r, moe.layout.total_rank) == (8, 2, 16)
    assert moe.lora_alpha / moe.r == 32 / 16
    assert (moe.gate, moe.task_embedding_dim) == ("task_embedding", 64)
    mtl = CGCLoraConfig.mtl_lora(tasks, r=8, lora_alpha=16, target_modules=["q"])
    assert mtl.shared_down_projection
    assert mtl.task_matrix
    assert (mtl.layout.num_experts, mtl.gate_temperature) == (3, 0.1)
    assert all(config.collapses for config in (plain, separate, moe, mtl))
    assert not CGCLoraConfig(task_names=tasks, gate="token").collapses
    with pytest.raises(ValueError, match="a multiple of `num_experts`"):
        CGCLoraConfig.moelora(tasks, r=12, lora_alpha=8)


def test_every_field_is_explained() -> None:
    for name, field in CGCLoraConfig.__dataclass_fields__.items():
        if name in CGCLoraConfig.__annotations__:
            assert field.metadata["help"], name
            assert f"        {name} (`" in CGCLoraConfig.__doc__, name
