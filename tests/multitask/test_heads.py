import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model, TrainingArguments

from hf_curriculum.multitask.cgc_lora.config import CGCLoraConfig
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.head_math import HeadLayout, pool, row_losses
from hf_curriculum.multitask.heads import MultiTaskHeads
from hf_curriculum.multitask.labels import heads_of_labels
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.trainers import MultiTaskTrainer


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "output_dir": "out"}
HEADS = {
    "topic": TaskHead(3, id2label=("war", "peace", "sport")),
    "tags": TaskHead(4, "multi_label_classification"),
    "score": TaskHead(2, "regression", target_scale=2.0),
    "mood": TaskHead(2),
}


def encoder():
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**SIZES, **dropout, max_position_embeddings=16), add_pooling_layer=False).eval()


def decoder():
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SIZES, max_position_embeddings=16)).eval()


def heads_over(backbone, pooling="mean", heads=HEADS, dropout=0.0):
    torch.manual_seed(1)
    return MultiTaskHeads(backbone, heads, pooling=pooling, dropout=dropout)


def batch(side="right"):
    torch.manual_seed(2)
    lengths = [5, 2, 7, 1, 4, 3]
    ids, mask = torch.zeros(6, 7, dtype=torch.int64), torch.zeros(6, 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(7 - length, 7)
        ids[row, place] = torch.arange(1, length + 1) + 5 * row
        mask[row, place] = 1
    tasks = torch.tensor([0, 1, 2, 3, 1, 0])
    labels = torch.tensor(
        [
            [2, -100, -100, -100],
            [1, 0, 0, 1],
            [0.5, -1.5, -100, -100],
            [1, -100, -100, -100],
            [0, 0, 0, 0],
            [0, -100, -100, -100],
        ]
    )
    return {"input_ids": ids, "attention_mask": mask, "tasks": tasks}, labels, lengths


def naive(model, inputs, lengths, side, pooling):
    """Each row alone, without padding, through its own slice of the heads."""
    rows = []
    starts = [0, 3, 7, 9, 11]
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(7 - length, 7)
        hidden = model.backbone(inputs["input_ids"][row : row + 1, place]).last_hidden_state[0]
        vector = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(dim=0)}[pooling]
        task = int(inputs["tasks"][row])
        own = slice(starts[task], starts[task + 1])
        rows.append(model.classifier.weight[own] @ vector + model.classifier.bias[own])
    return rows


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("backbone", "pooling"), [(encoder, "cls"), (encoder, "mean"), (decoder, "last"), (decoder, "mean")]
)
def test_each_row_is_classified_by_its_task_whatever_the_padding(backbone, pooling, side):
    model = heads_over(backbone(), pooling)
    inputs, _, lengths = batch(side)
    extra = {}
    if side == "left":  # positions are the tokens', as `generate` counts them
        extra = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        logits = model(**inputs, **extra).logits
        expected = naive(model, inputs, lengths, side, pooling)
    assert logits.shape == (6, 4)
    for row, own in enumerate(expected):
        torch.testing.assert_close(logits[row, : len(own)], own, rtol=1e-4, atol=1e-5)
        assert (logits[row, len(own) :] == torch.finfo(torch.float32).min).all()
        assert logits[row].argmax() < len(own)


def test_loss_is_a_loop_s_in_units_of_a_guess():
    model = heads_over(encoder()).double()
    inputs, labels, lengths = batch()
    found = model(**inputs, labels=labels)
    expected = []
    for own, wanted, task in zip(naive(model, inputs, lengths, "right", "mean"), labels, inputs["tasks"], strict=True):
        if task in (0, 3):
            expected.append(F.cross_entropy(own, wanted[0].long()) / math.log(len(own)))
        elif task == 1:
            expected.append(F.binary_cross_entropy_with_logits(own, wanted.double()) / math.log(2))
        else:
            expected.append((own - wanted[:2].double()).square().mean() / 2.0**2)
    expected = torch.stack(expected).mean()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-6, atol=1e-7)
    ours = torch.autograd.grad(found.loss, model.classifier.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected, model.classifier.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_a_guess_costs_one_in_every_task():
    layout = HeadLayout([TaskHead(5), TaskHead(3, "multi_label_classification")])
    tasks = torch.tensor([0, 1])
    logits = layout.pick(torch.zeros(2, 8), tasks)
    labels = torch.tensor([[4.0, -100, -100], [1.0, 0.0, 1.0]])
    losses, _ = row_losses(logits, labels, tasks, layout)
    torch.testing.assert_close(losses / layout.guess_loss(tasks, losses), torch.ones(2))


def test_rows_weigh_by_their_class_in_the_loss_and_in_the_losses_for_logs():
    # Their harmonic mean is 9/4, to which the last one hardly adds.
    heads = {"topic": TaskHead(3, class_weights=(1.0, 3.0, 3e9)), "mood": TaskHead(2)}
    model, plain = heads_over(encoder(), heads=heads), heads_over(encoder(), heads={**heads, "topic": TaskHead(3)})
    inputs, _, _ = batch()
    inputs["tasks"] = torch.tensor([0, 0, 0, 1, 1, 1])
    labels = torch.tensor([0, 1, -100, 0, 1, -100])
    relative = torch.tensor([4 / 9, 12 / 9, 1.0, 1.0, 1.0, 1.0])
    with torch.no_grad():
        found = model(**inputs, labels=labels)
        losses, ones = plain.row_losses(found.logits, labels, inputs["tasks"])
        ours, weights = model.row_losses(found.logits, labels, inputs["tasks"])
    assert ones.tolist() == [1, 1, 0, 1, 1, 0]
    assert torch.equal(ours, losses)
    torch.testing.assert_close(weights, relative * ones)
    guesses = torch.tensor([math.log(3)] * 3 + [math.log(2)] * 3)
    torch.testing.assert_close(found.loss, (losses * relative * ones / guesses).sum() / 4)


def test_predictions_follow_the_thresholds_of_the_head():
    head = TaskHead(4, "multi_label_classification", threshold=(0.5, 0.5, 0.99, 0.1))
    model = heads_over(encoder(), heads={**HEADS, "tags": head})
    assert model.decode(torch.tensor([[1.0, -1.0, 2.0, -2.0]]), "tags") == [[0, 3]]


def test_rows_without_a_label_do_not_count_and_a_batch_of_them_has_a_zero_gradient():
    model = heads_over(encoder())
    inputs, labels, _ = batch()
    missing = labels.clone()
    missing[[0, 1, 2]] = -100
    kept = {name: value[3:] for name, value in inputs.items()}
    torch.testing.assert_close(model(**inputs, labels=missing).loss, model(**kept, labels=labels[3:]).loss)
    nothing = model(**inputs, labels=torch.full_like(labels, -100)).loss
    nothing.backward()
    assert nothing == 0
    assert not model.classifier.weight.grad.any()


def test_only_heads_of_the_batch_get_a_gradient():
    model = heads_over(encoder())
    inputs, labels, _ = batch()
    rows = inputs["tasks"] == 1
    model(**{name: value[rows] for name, value in inputs.items()}, labels=labels[rows]).loss.backward()
    moved = model.classifier.weight.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 4
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_the_only_head_needs_no_task():
    model = heads_over(encoder(), heads={"mood": TaskHead(2)})
    inputs, _, _ = batch()
    del inputs["tasks"]
    assert torch.equal(model(**inputs).logits, model(**inputs, tasks="mood").logits)


def test_tasks_by_name_by_id_and_for_all_rows_are_the_same():
    model = heads_over(encoder())
    inputs, _, _ = batch()
    inputs["tasks"] = "tags"
    first = model(**inputs).logits
    for tasks in (1, ["tags"] * 6, torch.ones(6, dtype=torch.int64)):
        assert torch.equal(first, model(**{**inputs, "tasks": tasks}).logits)


def test_labels_are_encoded_and_predictions_decoded():
    model = heads_over(encoder())
    assert model.label_width == 4
    assert model.encode_label("topic", "sport") == [2.0, -100.0, -100.0, -100.0]
    assert model.encode_label("tags", [0, 3]) == [1.0, 0.0, 0.0, 1.0]
    assert model.encode_label("score", [0.5, -1.0]) == [0.5, -1.0, -100.0, -100.0]
    assert model.encode_label("mood", None) == [-100.0] * 4
    assert model.encode_label("mood", np.int64(1)) == [1.0, -100.0, -100.0, -100.0]
    assert model.encode_label("tags", []) == [0.0] * 4
    low = torch.finfo(torch.float32).min
    logits = torch.tensor([[0, 1, 2, low], [1, -1, 2, -2.0], [0.5, 2, low, low], [3, 2, low, low]])
    assert model.decode(logits, ["topic", "tags", "score", "mood"]) == ["sport", [0, 2], [0.5, 2.0], 0]
    single = heads_over(encoder(), heads={"a": TaskHead(2), "b": TaskHead(5)})
    assert single.label_width is None
    assert (single.encode_label("b", 4), single.encode_label("a", None)) == (4, -100)
    assert heads_over(encoder(), heads={"a": TaskHead(1, "regression")}).encode_label("a", 2) == 2.0


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_ignores_padding_and_counts_everything_without_a_mask(side):
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]) if side == "right" else torch.tensor([[0, 1, 1], [1, 1, 1]])
    first, last = (0, 1) if side == "right" else (1, 2)
    assert torch.equal(pool(hidden, mask, "cls"), torch.stack([hidden[0, first], hidden[1, 0]]))
    assert torch.equal(pool(hidden, mask, "last"), torch.stack([hidden[0, last], hidden[1, 2]]))
    assert torch.equal(pool(hidden, mask, "mean")[0], hidden[0, first : last + 1].mean(dim=0))
    assert torch.equal(pool(hidden, None, "last"), hidden[:, 2])


def test_saved_heads_load_equal(tmp_path):
    model = heads_over(encoder(), dropout=0.2).eval()
    model.save_pretrained(tmp_path)
    loaded = MultiTaskHeads.from_pretrained(tmp_path)
    inputs, _, _ = batch()
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    assert loaded.heads == model.heads
    assert (loaded.pooling, loaded.dropout.p, loaded.training) == ("mean", 0.2, False)


def cgc(**options):
    return CGCLoraConfig(task_names=list(HEADS), target_modules=["query", "value"], init_weights=False, **options)


def test_heads_over_an_adapter_give_it_their_tasks_and_are_saved_beside_it(tmp_path):
    model = heads_over(get_peft_model(encoder(), cgc())).eval()
    inputs, labels, _ = batch()
    mixed = model(**inputs).logits
    for row in range(6):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(model(**one).logits[0], mixed[row], rtol=1e-4, atol=1e-5)
    shifted = model.backbone(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], tasks=(inputs["tasks"] + 1) % 4
    )
    own = model.backbone(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], tasks=inputs["tasks"])
    assert not torch.allclose(shifted.last_hidden_state, own.last_hidden_state)
    model(**inputs, labels=labels).loss.backward()
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = MultiTaskHeads.from_pretrained(tmp_path, PeftModel.from_pretrained(encoder(), tmp_path))
    torch.testing.assert_close(loaded(**inputs).logits, mixed)
    with pytest.raises(ValueError, match="an adapter alone"):
        MultiTaskHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("adapter", [None, "lora", "cgc"])
def test_trainer_trains_heads_on_mixed_batches_and_measures_each_task(adapter):
    backbone = encoder()
    if adapter is not None:
        config = cgc() if adapter == "cgc" else LoraConfig(target_modules=["query"])
        backbone = get_peft_model(backbone, config)
    model = heads_over(backbone)
    inputs, labels, _ = batch()
    rows = Dataset.from_dict(
        {
            "input_ids": inputs["input_ids"].tolist() * 4,
            "attention_mask": inputs["attention_mask"].tolist() * 4,
            "labels": labels.tolist() * 4,
            "task": [list(HEADS)[task] for task in inputs["tasks"].tolist()] * 4,
        }
    )
    trainer = MultiTaskTrainer(
        model=model,
        args=TrainingArguments(
            **CPU, per_device_train_batch_size=6, num_train_epochs=6, learning_rate=0.05, logging_steps=4
        ),
        train_dataset=rows,
        eval_dataset=rows,
        multitask=MultiTaskConfig(sampling="round_robin"),
    )
    before = trainer.evaluate()
    with torch.no_grad():
        losses, _ = model.row_losses(model.eval()(**inputs).logits, labels, inputs["tasks"])
    for task, name in enumerate(HEADS):
        own = losses[inputs["tasks"] == task].mean().item()
        assert before[f"eval_{name}_loss"] == pytest.approx(own, rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (24, 4)


def test_single_labels_train_with_accumulation_like_one_large_batch():
    heads = {"a": TaskHead(2), "b": TaskHead(3)}
    rows = Dataset.from_dict(
        {"input_ids": [[i, 2, 3] for i in range(16)], "labels": [i % 2 for i in range(16)], "task": ["a", "b"] * 8}
    )
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = heads_over(encoder(), heads=heads)
        trainer = MultiTaskTrainer(
            model=model,
            args=TrainingArguments(
                **CPU,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=1,
                optim="sgd",
                learning_rate=0.1,
                seed=3,
            ),
            train_dataset=rows,
        )
        trainer.train()
        found.append(model.classifier.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskHead(1), "`num_labels`: got 1, expected an integer >= 2"),
        (lambda: TaskHead(2, "ranking"), "`problem_type`: got ranking"),
        (lambda: TaskHead(2, id2label=("a",)), "`id2label`"),
        (lambda: TaskHead(2, id2label=("a", "a")), "2 different names"),
        (lambda: TaskHead(2, target_scale=2.0), "`target_scale`: got 2.0, expected 1.0"),
        (lambda: TaskHead(2, "regression", target_scale=0.0), "`target_scale`: got 0.0"),
        (lambda: heads_over(encoder(), heads={}), "`heads`"),
        (lambda: heads_over(encoder(), heads={"a/b": TaskHead(2)}), "safe as file names"),
        (lambda: heads_over(encoder(), "max"), "`pooling`: got max"),
        (lambda: heads_over(encoder(), dropout=1.0), "`dropout`: got 1.0"),
        (lambda: heads_over(get_peft_model(encoder(), cgc()), heads={"a": TaskHead(2)}), "of the backbone"),
        (lambda: heads_over(encoder())(torch.ones(1, 2, dtype=torch.int64)), "`tasks`: got None"),
        (lambda: heads_over(encoder())(torch.ones(1, 2, dtype=torch.int64), tasks="who"), "got who"),
        (lambda: heads_over(encoder())(torch.ones(1, 2, dtype=torch.int64), tasks=[0, 1]), "got 2 tasks"),
        (lambda: heads_over(encoder())(torch.ones(1, 2, dtype=torch.int64), tasks="common"), "Heads are of one task"),
        (lambda: heads_over(encoder()).encode_label("uniform", 1), "`task`: got uniform"),
        (lambda: heads_over(encoder()).encode_label("topic", "love"), "`label`: got love, expected one of war"),
        (lambda: heads_over(encoder()).encode_label("mood", 2), "`label`: got 2, expected a class in \\[0, 2\\)"),
        (lambda: heads_over(encoder()).encode_label("score", 1.0), "`label`: got 1.0, expected 2 numbers"),
        (lambda: heads_over(encoder()).encode_label("score", [1.0, math.nan]), "expected finite numbers"),
        (lambda: heads_over(encoder()).encode_label("score", [-100, 1.0]), "which marks a missing label"),
        (lambda: heads_over(encoder()).encode_label("tags", "war"), "got war, expected a list of the classes"),
        (lambda: heads_over(encoder()).encode_label("tags", 3), "got 3, expected a list of the classes"),
        (lambda: heads_over(encoder()).encode_label("mood", True), "`label`: got True"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("topic", [3.0, -100, -100, -100], r"labels \[3.0, .* in row 1, of task topic"),
        ("topic", [0.5, -100, -100, -100], "of task topic"),
        ("mood", [-1.0, -100, -100, -100], "of task mood"),
        ("tags", [1.0, 0.0, 2.0, 0.0], "of task tags"),
        ("tags", [1.0, 0.0, 0.0, -100.0], "of task tags"),
        ("score", [1.0, math.inf, -100, -100], "of task score"),
        ("common", [0.0, -100, -100, -100], "row 1 of no single task"),
        ("mood", [1.0], "no table of numbers"),
    ],
)
def test_labels_that_a_head_does_not_have_are_refused_before_training(task, label, message):
    good = [0.0, 1.0, 1.0, 0.0]
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 2, "labels": [good, label], "task": ["tags", task]})
    for which in ("train_dataset", "eval_dataset"):
        both = {"train_dataset": rows.select([0]), "eval_dataset": rows.select([0]), which: rows}
        with pytest.raises(ValueError, match=f"`{which}`: got.*{message}"):
            MultiTaskTrainer(model=heads_over(encoder()), args=TrainingArguments(**CPU), **both)


def test_encoder_decoders_and_flattened_batches_are_refused():
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(NotImplementedError, match="over an encoder-decoder"):
        heads_over(T5Model(T5Config(**sizes)))
    with pytest.raises(NotImplementedError, match="A task per token"):
        heads_over(encoder())(torch.ones(1, 2, dtype=torch.int64), tasks=torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "task_heads.json").unlink(), "has no task_heads.json"),
        (lambda folder: (folder / "task_heads.safetensors").write_bytes(b"0"), "cannot be read"),
        (lambda folder: (folder / "task_heads.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "task_heads.json").write_text("[]"), "cannot be read"),
        (lambda folder: (folder / "task_heads.json").write_text('{"pooling": "me'), "cannot be read"),
        (lambda folder: (folder / "task_heads.json").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    heads_over(encoder()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        MultiTaskHeads.from_pretrained(tmp_path, encoder())


def test_weights_of_other_heads_are_refused(tmp_path):
    heads_over(encoder()).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "task_heads.json").read_text())
    settings["heads"]["mood"]["num_labels"] = 3
    (tmp_path / "task_heads.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="size mismatch"):
        MultiTaskHeads.from_pretrained(tmp_path)


def test_heads_follow_the_kinds_of_labels():
    assert heads_of_labels(["a"], ["a"] * 4, ["x", "z", "y", "x"]) == {"a": TaskHead(3, id2label=("x", "y", "z"))}
    names, labels = ["numbers", "several", "real"], [0, 4, ["q"], ["p", "q"], 1.0, 3.0, None]
    assert heads_of_labels(names, [0, 0, 1, "several", 2, 2, 0], labels) == {
        "numbers": TaskHead(5),
        "several": TaskHead(2, "multi_label_classification", id2label=("p", "q")),
        "real": TaskHead(1, "regression", target_scale=1.0),
    }
    with pytest.raises(ValueError, match="no label of task b"):
        heads_of_labels(["a", "b"], ["a", "b"], ["x", None])
