import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, default_data_collator
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_curriculum.multitask.collator import MultiTaskCollator
from hf_curriculum.multitask.tasks import TaskRegistry


NAMES = ["sum", "sort", "echo"]
ROWS = [
    {"input_ids": [1, 2, 3], "task": "sort"},
    {"input_ids": [4], "task": "sum"},
    {"input_ids": [5, 6], "task": 2},
]


def collator(inner=default_data_collator, unknown="error", **options):
    return MultiTaskCollator(inner, TaskRegistry(NAMES, unknown_task=unknown), **options)


def language(**options):
    return DataCollatorForLanguageModeling(pad_token_id=0, **options)


def test_padded_batch_has_one_id_per_row_and_is_otherwise_the_inner_collator_s():
    batch = collator(language())(ROWS)
    tasks = batch.pop("tasks")
    assert tasks.tolist() == [1, 0, 2]
    assert tasks.dtype == torch.int64
    plain = language()([{"input_ids": row["input_ids"]} for row in ROWS])
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in plain)
    assert "task" in ROWS[0]


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("count", [1, 3])
def test_padding_free_batch_has_one_id_per_token(count, multiple):
    batch = collator(language(padding_free=True, pad_to_multiple_of=multiple))(ROWS[:count])
    expected = [1, 1, 1, 0, 2, 2] if count == 3 else [1, 1, 1]
    padding = batch["input_ids"].shape[1] - len(expected)
    assert batch["tasks"].tolist() == [expected + expected[-1:] * padding]
    assert batch["tasks"].shape == batch["input_ids"].shape == batch["position_ids"].shape


def test_flattening_collator_of_transformers_is_understood():
    rows = [{**row, "labels": row["input_ids"]} for row in ROWS]
    assert collator(DataCollatorWithFlattening())(rows)["tasks"].tolist() == [[1, 1, 1, 0, 2, 2]]


def test_one_padded_row_keeps_one_id():
    assert collator(language())(ROWS[:1])["tasks"].tolist() == [1]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_ids_stay_with_their_tokens(strategy):
    # Token t of a row of task k is 100 * k + t, so the task can be read off every token.
    lengths = [(0, 5), (1, 3), (2, 4), (0, 1), (1, 9), (2, 2), (1, 1)]
    rows = {
        "input_ids": [[100 * task + token for token in range(length)] for task, length in lengths],
        "task": [[task] * length for task, length in lengths],
    }
    packed = pack_dataset(Dataset.from_dict(rows), 6, strategy)
    flattened = strategy != "wrapped"
    for start in range(0, len(packed), 2):
        features = [packed[index] for index in range(start, min(start + 2, len(packed)))]
        batch = collator(language(padding_free=flattened))(features)
        real = torch.ones_like(batch["input_ids"]) if flattened else batch["attention_mask"]
        assert torch.equal((batch["input_ids"] // 100)[real.bool()], batch["tasks"][real.bool()])
        assert batch["tasks"].shape == batch["input_ids"].shape


def test_ids_per_token_follow_the_side_of_the_padding():
    def left_padded(rows):
        width = max(len(row["input_ids"]) for row in rows)
        pads = [width - len(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.tensor([[0] * pad + row["input_ids"] for pad, row in zip(pads, rows, strict=True)]),
            "attention_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
        }

    rows = [{"input_ids": [1, 2, 3], "task": [0, 0, 1]}, {"input_ids": [4, 5], "task": ["echo", "sum"]}]
    assert collator(left_padded)(rows)["tasks"].tolist() == [[0, 0, 1], [0, 2, 0]]
    assert collator(language())(rows)["tasks"].tolist() == [[0, 0, 1], [2, 0, 0]]


def test_batches_without_tokens_have_one_id_per_row():
    assert collator()([{"pixels": [0.5], "task": "sum"}, {"pixels": [0.1], "task": "echo"}])["tasks"].tolist() == [
        0,
        2,
    ]


def test_tasks_may_come_as_tensors_and_from_worker_processes():
    rows = Dataset.from_list([{"input_ids": [1, 2], "task": index % 3} for index in range(6)]).with_format("torch")
    loader = DataLoader(rows, batch_size=3, collate_fn=collator(), num_workers=2)
    assert [batch["tasks"].tolist() for batch in loader] == [[0, 1, 2], [0, 1, 2]]


def test_another_column_is_read():
    assert collator(task_column="domain")([{"input_ids": [1], "domain": "sort"}])["tasks"].tolist() == [1]


@pytest.mark.parametrize(("policy", "expected"), [("common", -1), ("uniform", -2)])
def test_unknown_and_missing_tasks_follow_the_registry_s_policy(policy, expected):
    rows = [{"input_ids": [1], "task": "sum"}, {"input_ids": [2], "task": "who"}, {"input_ids": [3], "task": None}]
    assert collator(unknown=policy)(rows)["tasks"].tolist() == [0, expected, expected]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [1]}], "column `task``: got a batch without it \\(input_ids\\).*remove_unused_columns=False"),
        ([], "no rows"),
        ([{"input_ids": [1], "task": "who"}], "`tasks`: got who, expected one of 'sum', 'sort', 'echo'"),
        ([{"input_ids": [1], "task": "sum"}, {"input_ids": [1]}], "`tasks`: got no task"),
        ([{"input_ids": [1], "task": 3}], "`tasks`: got 3, expected an id in \\[0, 3\\)"),
        ([{"input_ids": [1], "task": -1}], "`tasks`: got -1"),
        ([{"input_ids": [1], "task": True}], "`tasks`: got True"),
        ([{"input_ids": [1], "task": 0.5}], "`tasks`: got 0.5"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 1], "task": [0]}], "1 tasks for a row of 2 tokens"),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        collator()(rows)


def test_a_batch_with_tasks_and_a_second_wrapping_are_refused():
    with pytest.raises(ValueError, match="holds `tasks` already"):
        collator()([{"input_ids": [1], "tasks": 0, "task": "sum"}])
    with pytest.raises(ValueError, match="`inner`"):
        collator(collator())


def test_a_collator_that_merges_rows_is_refused():
    with pytest.raises(NotImplementedError, match="makes 2 rows of 3 is not supported"):
        collator(lambda rows: {"input_ids": torch.zeros(2, 4)})(ROWS)
