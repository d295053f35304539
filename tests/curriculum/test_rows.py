"""Rows, collators and trainers as users have them: padded, of other types, with arguments of their own."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_curriculum import CurriculumConfig, CurriculumMixin, CurriculumTrainer, score_dataset
from hf_curriculum.curriculum.measurement import count_labels, row_lengths
from hf_curriculum.demo.corpus import generate_corpus


LENGTHS = np.random.default_rng(0).permutation(np.arange(3, 27))
CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "output_dir": "out"}


def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, pad_token_id=0, **sizes))


def classifier(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes, **config))


def padded(lengths=LENGTHS, width=32):
    rows = [{"input_ids": [5] * n + [0] * (width - n), "attention_mask": [1] * n + [0] * (width - n)} for n in lengths]
    return Dataset.from_list([{**row, "labels": [5] * n + [-100] * (width - n)} for row, n in zip(rows, lengths)])


def stacked(rows):
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])}
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return {**batch, "attention_mask": (batch["input_ids"] > 0).long()}


def train(model, rows, eval_rows=None, cls=CurriculumTrainer, args=None, own=(), **curriculum):
    return cls(
        *own,
        model=model,
        args=TrainingArguments(**CPU, **{"per_device_train_batch_size": 4, "num_train_epochs": 1, **(args or {})}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=stacked if "attention_mask" not in rows.column_names else None,
        curriculum=CurriculumConfig(**{"scorer": "length", "num_levels": 2, "use_cache": False, **curriculum}),
    )


def test_padding_in_the_rows_is_not_length():
    np.testing.assert_array_equal(row_lengths(padded()), LENGTHS)
    np.testing.assert_array_equal(row_lengths(padded().remove_columns("attention_mask")), 32)
    trainer = train(language_model(), padded())
    np.testing.assert_array_equal(trainer.levels, np.median(LENGTHS) <= LENGTHS)
    np.testing.assert_array_equal(trainer.difficulty, LENGTHS)


def test_padded_rows_are_scored_in_batches_of_their_padded_size():
    widths = []
    model = language_model()

    def see(module, args, kwargs, output):
        widths.append(tuple(kwargs["input_ids"].shape))

    model.model.register_forward_hook(see, with_kwargs=True)
    trainer = train(model, padded(), scorer="loss", score_batch_tokens=64)
    assert {width for _, width in widths} == {32}
    assert max(rows for rows, _ in widths) == 2
    again = train(language_model(), padded(width=40), scorer="loss")
    np.testing.assert_allclose(trainer.difficulty, again.difficulty, rtol=1e-5)


class FullLabels:
    """Labels every token."""

    first = 0

    def __call__(self, rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([[*row["input_ids"], *[0] * (width - len(row["input_ids"]))] for row in rows])
        labels = ids.masked_fill(ids == 0, -100)
        labels[:, : self.first] = -100
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


class CompletionLabels(FullLabels):
    """Labels what follows the prompt."""

    first = 3


def test_cached_scores_are_those_of_the_collator(tmp_path):
    ids = [np.random.default_rng(row).integers(3, 50, 8).tolist() for row in range(16)]
    rows = Dataset.from_dict({"input_ids": ids})
    found = {}
    for cached in (True, False):
        for collator in (FullLabels(), CompletionLabels()):
            trainer = CurriculumTrainer(
                model=language_model(),
                args=TrainingArguments(**CPU, per_device_train_batch_size=4, num_train_epochs=1),
                train_dataset=rows,
                data_collator=collator,
                curriculum=CurriculumConfig(
                    scorer="loss", num_levels=2, loss_normalization="sample", use_cache=cached, cache_dir=str(tmp_path)
                ),
            )
            found[cached, type(collator)] = trainer.difficulty
    for kind in (FullLabels, CompletionLabels):
        np.testing.assert_array_equal(found[True, kind], found[False, kind])
    assert not np.allclose(found[True, FullLabels], found[True, CompletionLabels])


def labelled(count=24, types=None):
    ids = [np.random.default_rng(index).integers(1, 50, 4 + index % 7).tolist() for index in range(count)]
    rows = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(ids)]
    return Dataset.from_list(rows) if types is None else Dataset.from_list(rows).cast(Features(types))


@pytest.mark.parametrize(
    "types",
    [
        {"input_ids": Sequence(Value("int32")), "labels": Value("int64")},
        {"input_ids": Sequence(Value("int64")), "labels": ClassLabel(names=["a", "b", "c"])},
    ],
    ids=["int32", "class-label"],
)
@pytest.mark.parametrize("scorer", ["length", "loss"])
def test_evaluation_rows_may_be_of_other_types(types, scorer):
    parts = {"same": labelled(8), "other": labelled(8, types)}
    trainer = train(classifier(num_labels=3), labelled(), parts, scorer=scorer)
    assert sum(len(rows) for rows in trainer._eval_rows.values()) == 16


def test_column_that_the_evaluation_rows_lack_is_named():
    with pytest.raises(ValueError, match="those of the training rows, attention_mask among them"):
        train(language_model(), padded(), padded().remove_columns("attention_mask"))


def test_every_evaluation_row_counts_where_training_drops_its_last_batch():
    args = {"dataloader_drop_last": True, "per_device_eval_batch_size": 8}
    trainer = train(language_model(), padded(), padded(LENGTHS[:13]), args=args)
    trainer.train()
    assert np.isfinite(trainer.level_matrix.matrix("loss")).all()


class Positional(Trainer):
    def __init__(self, class_weights, *args, **kwargs):
        self.class_weights = class_weights
        super().__init__(*args, **kwargs)


class Popping(Trainer):
    def __init__(self, *args, **kwargs):
        self.class_weights = kwargs.pop("class_weights")
        super().__init__(*args, **kwargs)


class CurriculumPositional(CurriculumMixin, Positional):
    pass


class CurriculumPopping(CurriculumMixin, Popping):
    pass


def test_trainers_with_arguments_of_their_own_take_the_mixin():
    assert train(language_model(), padded(), cls=CurriculumPositional, own=([1, 2],)).class_weights == [1, 2]
    rows, config = padded(), CurriculumConfig(scorer="length", num_levels=2)
    args = TrainingArguments(**CPU, per_device_train_batch_size=4, num_train_epochs=1)
    for cls in (CurriculumPositional, CurriculumPopping):
        named = {"model": language_model(), "args": args, "train_dataset": rows, "curriculum": config}
        assert cls(class_weights=[3], **named).class_weights == [3]
    model = language_model()
    trainer = CurriculumPositional([1], model, args, train_dataset=rows, curriculum=config)
    assert trainer.model is model
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        CurriculumPositional([1], model, model=model, args=args, train_dataset=rows, curriculum=config)
    with pytest.raises(TypeError, match="unexpected keyword argument 'datasets'"):
        CurriculumTrainer(model=model, args=args, datasets=rows)


@pytest.mark.parametrize("rows", [1, 6])
def test_self_paced_scoring_of_a_few_rows_admits_the_easiest(rows):
    trainer = train(
        language_model(), padded(LENGTHS[:rows]), num_levels=1, scorer="self_paced", probe="full", lambda_start=0.01
    )
    assert np.isfinite(trainer.difficulty).all()


def test_regression_on_several_targets_is_scored_by_squared_errors():
    ids, targets = np.random.default_rng(1).integers(1, 50, (24, 6)), np.random.default_rng(2).normal(size=(24, 2))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": targets.tolist()})
    model = classifier(num_labels=2, problem_type="regression").eval()
    trainer = train(model, rows, scorer="loss")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(rows["input_ids"][:])).logits
    expected = (logits - torch.tensor(rows["labels"][:])).square().sum(dim=1)
    np.testing.assert_allclose(trainer.difficulty, expected.numpy(), rtol=1e-4)


def test_first_label_counts_where_labels_are_not_shifted():
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2]], "labels": [[4], [-100, 4]]})
    assert count_labels(rows, np.array([1, 2])).tolist() == [0, 1]
    assert count_labels(rows, np.array([1, 2]), shift=False).tolist() == [1, 1]


def test_score_dataset_refuses_a_classifier():
    with pytest.raises(NotImplementedError, match="give them to `CurriculumTrainer`"):
        score_dataset(classifier(), generate_corpus(8), "loss")
