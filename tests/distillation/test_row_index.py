import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_curriculum.core.head import gather_labelled
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.distillation.cache import TopKSpec
from hf_curriculum.distillation.cache_writer import TopKWriter
from hf_curriculum.distillation.row_index import (
    LABELS_PER_ROW,
    ROW_INDEX,
    IndexedRow,
    IndexedRows,
    RowIndexCollator,
    indexed_rows,
    labels_per_row,
)


CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "output_dir": "out"}
KEYS = {ROW_INDEX, LABELS_PER_ROW}


class Indexed:
    """What a mixin does with the context."""

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if not is_training:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        with indexed_rows(self, dataset, description) as rows:
            return super()._get_dataloader(
                rows, description, batch_size, rows.sampler_fn(sampler_fn), is_training, dataloader_key
            )


class IndexedTrainer(Indexed, Trainer):
    pass


class IndexedSFTTrainer(Indexed, SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer)


def row_of(trainer, number):
    """Tokens and labels of a row of the data set, and which of its positions are predicted, by plain loops."""
    row = trainer.train_dataset[number]
    tokens, labels = list(row["input_ids"]), list(row.get("labels", row["input_ids"]))
    starts = np.cumsum([0, *row.get("seq_lengths", [])]).tolist()
    return tokens, [label for at, label in enumerate(labels) if label != -100 and at > 0 and at not in starts[1:-1]]


def check_batches(trainer):
    """Every batch holds the rows that it says, and the labels of each, in its order."""
    seen, shapes = [], []
    for batch in trainer.get_train_dataloader():
        numbers, counts = batch.pop(ROW_INDEX), batch.pop(LABELS_PER_ROW)
        assert (numbers.dtype, counts.dtype) == (torch.int64, torch.int64)
        rows = [row_of(trainer, number) for number in numbers.tolist()]
        targets = gather_labelled(torch.zeros(*batch["labels"].shape, 1), batch["labels"]).targets
        assert [labels.tolist() for labels in targets.split(counts.tolist())] == [labels for _, labels in rows]
        lines = batch["input_ids"].tolist()
        if len(lines) == len(rows):
            assert all(line[: len(tokens)] == tokens for line, (tokens, _) in zip(lines, rows, strict=True))
        else:
            flat = [token for tokens, _ in rows for token in tokens]
            assert len(lines) == 1
            assert lines[0][: len(flat)] == flat
        seen += numbers.tolist()
        shapes.append((len(numbers), len(lines)))
    assert sorted(seen) == list(range(len(trainer.train_dataset)))
    assert seen != sorted(seen), "the sampler was not the Trainer's"
    return shapes


SFT = {
    "padded": {},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "all tokens": {"completion_only_loss": False},
    "flattened": {"padding_free": True, "max_length": None},
    "flattened to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "packed": {"packing": True, "max_length": 160},
    "packed and wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
}


def sft_trainer(tokenizer, model, layout, cls=IndexedSFTTrainer, rows=19, **args):
    settings = {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4, **CPU, **args}
    return cls(
        model=model,
        args=SFTConfig(**settings, **SFT[layout]),
        train_dataset=generate_corpus(rows),
        eval_dataset=generate_corpus(5, seed=1),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("remove_unused_columns", [True, False], ids=["removed", "all columns"])
@pytest.mark.parametrize("layout", SFT)
def test_sft_batches_say_which_rows_they_hold(tokenizer, model, layout, remove_unused_columns):
    rows = 80 if "packed" in layout else 19
    trainer = sft_trainer(tokenizer, model, layout, rows=rows, remove_unused_columns=remove_unused_columns)
    collator = trainer.data_collator
    shapes = check_batches(trainer)
    flattened = "flattened" in layout or layout == "packed"
    assert all(lines == (1 if flattened else number) for number, lines in shapes)
    assert max(number for number, _ in shapes) == 4
    assert trainer.data_collator is collator
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(trainer.eval_dataset)):
        assert all(not KEYS & batch.keys() for batch in loader)


def test_batches_are_those_of_the_plain_trainer_but_for_the_two_keys(tokenizer, model):
    ours, plain = (sft_trainer(tokenizer, model, "padded", cls) for cls in (IndexedSFTTrainer, SFTTrainer))
    batches = []
    for trainer in (ours, plain):
        torch.manual_seed(0)
        batches.append(list(trainer.get_train_dataloader()))
    for batch, other in zip(*batches, strict=True):
        assert batch.keys() - other.keys() == KEYS
        assert all(torch.equal(batch[name], other[name]) for name in other)


@pytest.mark.parametrize("layout", ["padded", "flattened"])
def test_batches_of_workers_say_it_too(tokenizer, model, layout):
    check_batches(sft_trainer(tokenizer, model, layout, dataloader_num_workers=1))


class TorchRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, position):
        return dict(self.rows[position])


def token_rows(number=11, **columns):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, number)
    ids = [rng.integers(5, 50, length).tolist() for length in lengths]
    labels = [[-100, *row[1:]] for row in ids]
    labels[3] = [-100] * len(labels[3])
    return Dataset.from_dict({"input_ids": ids, "labels": labels, **columns})


def plain_trainer(tokenizer, model, dataset, collator=None, cls=IndexedTrainer, **args):
    return cls(
        model=model,
        args=TrainingArguments(per_device_train_batch_size=4, **CPU, **args),
        train_dataset=dataset,
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
    )


@pytest.mark.parametrize("collator", ["padding", "flattening"])
@pytest.mark.parametrize("kind", ["arrow", "torch", "selection"])
@pytest.mark.parametrize("remove_unused_columns", [True, False], ids=["removed", "all columns"])
def test_plain_trainer_with_any_data_set_and_collator(tokenizer, model, kind, remove_unused_columns, collator):
    rows = token_rows(**({"text": [[1]] * 11} if remove_unused_columns else {}))
    dataset = {"arrow": rows, "torch": TorchRows(rows.to_list()), "selection": rows.select(range(10, 0, -1))}[kind]
    inner = DataCollatorForSeq2Seq(tokenizer) if collator == "padding" else DataCollatorWithFlattening()
    trainer = plain_trainer(tokenizer, model, dataset, inner, remove_unused_columns=remove_unused_columns)
    check_batches(trainer)
    if remove_unused_columns:
        assert all("text" not in batch for batch in trainer.get_train_dataloader())


def test_sampler_sees_the_data_set_itself(tokenizer, model):
    rows = token_rows(length=[*range(11)])
    seen = []

    class Sampled(IndexedTrainer):
        def _get_train_sampler(self, train_dataset=None):
            seen.append(train_dataset)
            return super()._get_train_sampler(train_dataset)

    trainer = plain_trainer(
        tokenizer, model, rows, cls=Sampled, train_sampling_strategy="group_by_length", remove_unused_columns=False
    )
    trainer.get_train_dataloader()
    assert isinstance(seen[0], Dataset)
    assert IndexedRows(rows).sampler_fn(None) is None


def test_collator_is_the_trainers_own_again_after_an_error(tokenizer, model):
    trainer = plain_trainer(tokenizer, model, token_rows())
    collator = trainer.data_collator

    def stop():
        with indexed_rows(trainer, trainer.train_dataset, "Training"):
            assert trainer.data_collator is not collator
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert trainer.data_collator is collator


def test_numbers_of_a_selection_are_those_of_the_whole(tokenizer, model):
    trainer = plain_trainer(tokenizer, model, token_rows())
    numbers = np.array([8, 2, 5, 9, 0])
    with indexed_rows(trainer, trainer.train_dataset.select(numbers), "Teacher", row_ids=numbers) as rows:
        loader = Trainer._get_dataloader(trainer, rows, "Teacher", 2, sampler_fn=SequentialSampler)
        batches = list(loader)
    assert torch.cat([batch[ROW_INDEX] for batch in batches]).tolist() == numbers.tolist()
    for batch in batches:
        for line, number in zip(batch["input_ids"].tolist(), batch[ROW_INDEX].tolist(), strict=True):
            tokens = trainer.train_dataset[number]["input_ids"]
            assert line[: len(tokens)] == tokens
    with pytest.raises(ValueError, match=r"Invalid `row_ids`: got 2 numbers, expected 5, one per row"):
        IndexedRows(token_rows(5), np.array([0, 1]))


def test_cache_of_padded_batches_is_right_for_flattened_ones_of_another_order(tokenizer, model, tmp_path):
    spec = TopKSpec(k=1, temperature=1.0, vocabulary=len(tokenizer))

    def batches(layout, seed):
        torch.manual_seed(seed)
        for batch in sft_trainer(tokenizer, model, layout).get_train_dataloader():
            targets = gather_labelled(torch.zeros(*batch["labels"].shape, 1), batch["labels"]).targets
            yield batch[ROW_INDEX], batch[LABELS_PER_ROW], targets[:, None]

    with TopKWriter(tmp_path / "cache", spec) as writer:
        for numbers, counts, targets in batches("padded", 0):
            writer.append(numbers, counts, targets, torch.full(targets.shape, -1.0))
        cache = writer.finish()
    for numbers, counts, targets in batches("flattened", 1):
        assert torch.equal(cache.rows(numbers, counts)[0], targets)


def test_training_with_the_keys_taken_out_is_the_plain_training(tokenizer):
    losses = []

    class Taking(IndexedSFTTrainer):
        rows = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                self.rows += len(inputs.pop(ROW_INDEX))
                inputs.pop(LABELS_PER_ROW)
            assert not KEYS & inputs.keys()
            return super().compute_loss(model, inputs, *args, **kwargs)

    for cls in (Taking, SFTTrainer):
        trainer = sft_trainer(tokenizer, build_model(tokenizer), "padded", cls, rows=8, num_train_epochs=1)
        trainer.train()
        losses.append((trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]))
        if cls is Taking:
            assert trainer.rows == 8
    assert losses[0] == losses[1]


# Counting


@pytest.mark.parametrize("shift_labels", [True, False])
def test_counts_by_plain_loops(shift_labels):
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 7, rng.integers(1, 6)).tolist()
        rows = [np.where(rng.random(length) < 0.5, 3, -100).tolist() for length in lengths]
        padded = torch.tensor([[*row, *[-100] * (7 - len(row))] for row in rows])
        expected = [sum(label != -100 for label in row[int(shift_labels) :]) for row in rows]
        assert labels_per_row(padded, lengths, shift_labels).tolist() == expected
        if shift_labels:  # as the flattening collators do
            rows = [[-100, *row[1:]] for row in rows]
        flat = torch.tensor([[label for row in rows for label in row] + [-100] * 3])
        assert labels_per_row(flat, lengths, shift_labels).tolist() == expected


def test_one_label_per_row():
    assert labels_per_row(torch.tensor([1, -100, 0]), [4, 4, 4]).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (torch.ones(3, 4, dtype=torch.int64), r"labels of shape \(3, 4\) for 2 rows of 5 tokens"),
        (torch.ones(1, 4, dtype=torch.int64), r"labels of shape \(1, 4\)"),
        (torch.ones(3, dtype=torch.int64), r"labels of shape \(3,\)"),
        (torch.ones(1, 6, dtype=torch.int64), "labels behind the last row"),
    ],
)
def test_labels_of_another_layout_are_refused(labels, named):
    with pytest.raises(ValueError, match=f"Invalid `data_collator`: got {named}"):
        labels_per_row(labels, [2, 3])


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ([torch.zeros(1)], "got list"),
        ({"input_ids": torch.zeros(1, 2)}, "the tensor `labels`"),
        ({"labels": torch.zeros(1, 2), ROW_INDEX: 1}, "got the key `row_index`.*Rename that column"),
        ({"labels": torch.zeros(1, 2), LABELS_PER_ROW: 1}, "got the key `labels_per_row`"),
    ],
)
def test_collators_that_cannot_be_extended_are_refused(batch, named):
    with pytest.raises(ValueError, match=rf"Invalid `data_collator \(function\)`.*{named}"):
        RowIndexCollator(lambda rows: batch)([IndexedRow(0, {"input_ids": [1, 2]})])


def test_stream_is_refused():
    with pytest.raises(NotImplementedError, match="streaming"):
        IndexedRows(IterableDataset.from_generator(lambda: iter([{"a": 1}])))
