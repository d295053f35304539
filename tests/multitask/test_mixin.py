import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_curriculum.multitask.aware import takes_tasks
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.epochs import epoch_stages
from hf_curriculum.multitask.task_losses import ItemLosses, item_losses, sums_by_task
from hf_curriculum.trainers import MultiTaskSFTTrainer, MultiTaskTrainer


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("task_runs", Path(__file__).with_name("task_runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)
CPU, NAMES, cgc, language_model = runs.CPU, runs.NAMES, runs.cgc, runs.language_model
row_task_pairs, seen_batches, text_rows = runs.row_task_pairs, runs.seen_batches, runs.text_rows


def token_rows(tokenizer, count=24):
    rows = text_rows(count)
    texts = [f"{row['prompt']} {row['completion']}" for row in rows]
    ids = [tokenizer(text).input_ids[:24] for text in texts]
    ids = [row + [tokenizer.eos_token_id] * (24 - len(row)) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "task": rows["task"]})


def naive_losses(trainer, rows, tasks):
    """Mean loss of the labels of each task, row by row, in float64, from the model's own logits."""
    model = trainer.model.double().eval()
    sums = {}
    for ids, labels, task in zip(rows["input_ids"], rows["labels"], tasks, strict=True):
        extra = {"tasks": [task]} if takes_tasks(model) else {}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), **extra).logits[0, :-1]
        targets = torch.tensor(labels)[1:]
        losses = F.cross_entropy(logits, targets, reduction="none")
        total, count = sums.get(task, (0.0, 0))
        sums[task] = (total + losses.sum().item(), count + int((targets != -100).sum()))
    model.float()
    return {f"eval_{task}_loss": total / count for task, (total, count) in sums.items()}


# The way of the tasks


@pytest.mark.parametrize("sampling", ["proportional", "temperature", "uniform", "round_robin"])
def test_training_follows_the_sampler_and_each_row_has_its_task(build, sampling):
    trainer = build({"gradient_accumulation_steps": 2, "num_train_epochs": 2}, {"sampling": sampling})
    of_row = row_task_pairs(trainer)
    position = {tuple(ids): row for row, ids in enumerate(trainer.train_dataset["input_ids"])}
    drawn = []
    for batch in seen_batches(trainer):
        for ids, mask, task in zip(batch["input_ids"], batch["attention_mask"], batch["tasks"], strict=True):
            row = tuple(ids[mask.bool()].tolist())
            drawn.append(position[row])
            assert of_row[row] == task
    assert drawn == trainer.task_sampler.indices.tolist()
    assert trainer.state.global_step == trainer.task_sampler.num_steps == 6


@pytest.mark.parametrize("unit", ["homogeneous", "homogeneous_step"])
def test_homogeneous_batches_reach_the_model(build, unit):
    trainer = build({"gradient_accumulation_steps": 2, "num_train_epochs": 4}, {"batches": unit})
    batches = [set(batch["tasks"].tolist()) for batch in seen_batches(trainer)]
    assert all(len(tasks) == 1 for tasks in batches)
    pairs = [first | second for first, second in zip(batches[::2], batches[1::2], strict=True)]
    assert all(len(pair) == 1 for pair in pairs) == (unit == "homogeneous_step")


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("by_task", [False, True])
def test_packed_tokens_keep_their_tasks(build, strategy, by_task):
    multitask = {"sampling": "uniform"} if by_task else {}
    trainer = build({"packing": True, "packing_strategy": strategy, "max_length": 96}, multitask)
    plain = build({"max_length": None})
    of_row = row_task_pairs(plain)
    batches = seen_batches(trainer)
    mixed = 0
    for batch in batches:
        assert batch["tasks"].shape == batch["input_ids"].shape
        for ids, tasks in zip(batch["input_ids"].tolist(), batch["tasks"].tolist(), strict=True):
            found = len(set(tasks))
            mixed += found > 1
            if strategy == "bfd":  # where rows are whole, unless they are longer than a pack
                text = ",".join(map(str, ids))
                whole = [row for row in of_row if ",".join(map(str, row)) in text]
                assert {of_row[row] for row in whole} <= set(tasks)
    if by_task and strategy == "wrapped":
        assert mixed == 0
    if not by_task:
        assert mixed > 0
    if by_task:
        assert all(len(set(pack)) == 1 for pack in trainer.train_dataset["task"])


def test_packing_keeps_the_tokens_that_trl_keeps(tokenizer, build):
    for strategy in ("bfd", "bfd_split", "wrapped"):
        args = {"packing": True, "packing_strategy": strategy, "max_length": 48}
        ours = build(args)
        theirs = SFTTrainer(
            model=language_model(tokenizer),
            args=SFTConfig(**{**CPU, "bf16": False, "gradient_checkpointing": False, **args}),
            train_dataset=text_rows().remove_columns("task"),
            processing_class=tokenizer,
        )
        tokens = [
            sorted(token for pack in trainer.train_dataset["input_ids"] for token in pack)
            for trainer in (ours, theirs)
        ]
        assert tokens[0] == tokens[1]
        assert max(map(len, ours.train_dataset["input_ids"])) <= 48


def test_padding_packing_and_flattening_measure_the_same_losses(build):
    eval_rows = text_rows(9, seed=1)
    expected = None
    for args in ({}, {"packing": True}, {"padding_free": True, "max_length": None}):
        trainer = build(args, eval_rows=eval_rows, peft_config=cgc())
        if expected is None:
            # Before the evaluation in float32 below, on the rows as they were tokenised.
            expected = naive_losses(trainer, trainer.eval_dataset, eval_rows["task"])
        found = trainer.evaluate()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-5), (args, name)


def test_tasks_matter_to_the_model_that_takes_them(build):
    rows = text_rows(9, seed=1)
    losses = []
    for names in (NAMES, NAMES[1:] + NAMES[:1]):
        renamed = rows.remove_columns("task").add_column("task", [names[NAMES.index(task)] for task in rows["task"]])
        losses.append(build(eval_rows=renamed, peft_config=cgc()).evaluate()["eval_loss"])
    assert losses[0] != losses[1]


def test_a_model_that_knows_no_tasks_is_called_without_them(build):
    plain = build(eval_rows=text_rows(9, seed=1), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    assert not takes_tasks(plain.model)
    expected = naive_losses(plain, plain.eval_dataset, text_rows(9, seed=1)["task"])
    found = plain.evaluate()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)
    assert plain.task_registry.names == tuple(sorted(NAMES))
    batch = plain.data_collator([plain.train_dataset[0]])
    with torch.no_grad():
        ids = batch["input_ids"]
        assert torch.equal(plain.model(input_ids=ids, tasks=batch["tasks"]).logits, plain.model(input_ids=ids).logits)
        backbone = plain.model.get_base_model().model
        assert torch.equal(backbone(ids, tasks=batch["tasks"])[0], backbone(ids)[0])


def test_gradients_are_those_of_the_plain_trainer(build, tokenizer):
    # Shared LoRA, same rows in the same order: the tasks must change nothing.
    rows = text_rows(8)
    shared = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_length": 160,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    trainer = build(shared, rows=rows)
    order = trainer.task_sampler.indices
    trainer.train()
    plain = SFTTrainer(
        model=language_model(tokenizer),
        args=SFTConfig(
            **{**CPU, "bf16": False, "gradient_checkpointing": False, **shared},
        ),
        train_dataset=rows.remove_columns("task").select(order),
        processing_class=tokenizer,
    )
    plain._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(plain.train_dataset)
    plain.train()
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# Losses of the tasks


def test_training_losses_add_up_to_the_loss(build):
    trainer = build({"gradient_accumulation_steps": 2, "num_train_epochs": 2}, peft_config=cgc())
    batches = seen_batches(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(batches) // 2
    for entry, pair in zip(logs, zip(batches[::2], batches[1::2], strict=True), strict=True):
        counts = dict.fromkeys(range(3), 0)
        for batch in pair:
            for labels, task in zip(batch["labels"], batch["tasks"].tolist(), strict=True):
                counts[task] += int((labels[1:] != -100).sum())
        present = {NAMES[task]: count for task, count in counts.items() if count}
        assert {name for name in NAMES if f"{name}_loss" in entry} == set(present)
        mean = sum(entry[f"{name}_loss"] * count for name, count in present.items()) / sum(present.values())
        assert mean == pytest.approx(entry["loss"], rel=1e-5)


def test_losses_are_means_since_the_last_log(build):
    each = build({"logging_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 24})
    both = build({"logging_steps": 2, "learning_rate": 0.0, "per_device_train_batch_size": 24, "max_steps": 2})
    each.train(), both.train()
    first, second = (trainer.state.log_history[0] for trainer in (each, both))
    for name in NAMES:
        assert first[f"{name}_loss"] == pytest.approx(second[f"{name}_loss"], rel=1e-6)


def test_task_losses_can_be_left_out_of_training(build):
    trainer = build(multitask={"log_task_losses": False}, eval_rows=text_rows(6))
    trainer.train()
    assert not any("sum_loss" in entry for entry in trainer.state.log_history)
    assert "eval_sum_loss" in trainer.evaluate()


def test_evaluation_sets_by_name_have_their_tasks(build):
    found = build(eval_rows={"one": text_rows(6), "two": text_rows(4)}).evaluate()
    assert {"eval_one_sum_loss", "eval_one_echo_loss", "eval_two_sum_loss", "eval_two_loss"} <= set(found)


def test_plain_trainer_measures_language_models(tokenizer):
    rows = token_rows(tokenizer)
    trainer = MultiTaskTrainer(
        model=get_peft_model(language_model(tokenizer), cgc()),
        args=TrainingArguments(**CPU, per_device_train_batch_size=8, num_train_epochs=1, logging_steps=1),
        train_dataset=rows,
        eval_dataset=rows,
    )
    expected = naive_losses(trainer, rows, rows["task"])
    found = trainer.evaluate()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {f"{name}_loss" for name in NAMES} <= set(logged)


def classifier(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=20, max_position_embeddings=8, **sizes, **options)
    ).eval()


def test_a_classifier_with_a_strict_signature_is_trained_and_predicts_without_labels():
    rows = Dataset.from_dict(
        {"input_ids": [[i, 2, 3] for i in range(12)], "label": [i % 3 for i in range(12)], "task": ["a", "b", "a"] * 4}
    )
    trainer = MultiTaskTrainer(
        model=classifier(num_labels=3),
        args=TrainingArguments(**CPU, per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1),
        train_dataset=rows,
        eval_dataset=rows,
    )
    found = trainer.evaluate()
    with torch.no_grad():
        logits = trainer.model(torch.tensor(rows["input_ids"])).logits.double()
    losses = F.cross_entropy(logits, torch.tensor(rows["label"]), reduction="none").numpy()
    for name in "ab":
        own = losses[np.array(rows["task"]) == name].mean()
        assert found[f"eval_{name}_loss"] == pytest.approx(own, rel=1e-5)
    trainer.train()
    assert trainer.predict(rows.remove_columns("label")).predictions.shape == (12, 3)


# Epochs, record, resuming


class Spy(TrainerCallback):
    def __init__(self):
        self.evaluated, self.stages = [], []

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)

    def on_stage_begin(self, args, state, control, *, stage, **kwargs):
        self.stages.append(stage.first_step)

    def on_stage_end(self, args, state, control, *, stage, **kwargs):
        pass


def test_epoch_strategies_act_at_the_user_s_epochs(build):
    spy = Spy()
    trainer = build({"num_train_epochs": 3, "eval_strategy": "epoch"}, eval_rows=text_rows(3), callbacks=[spy])
    trainer.train()
    assert spy.evaluated == [6, 12, 18]
    assert spy.stages == [0, 6, 12]
    drawn = [trainer.stage_rows(stage)[0].tolist() for stage in trainer.stages]
    assert len(drawn) == 3
    assert set(map(len, drawn)) <= set(range(12, 25))


@pytest.mark.parametrize(
    ("rows", "batch", "steps", "ends"),
    [(10, 4, 6, [3, 5, 6]), (3, 8, 2, [1, 2]), (8, 8, 3, [1, 2, 3]), (100, 8, 5, [5]), (7, 3, 7, [3, 5, 7])],
)
def test_epochs_end_with_the_step_of_their_last_row(rows, batch, steps, ends):
    stages = epoch_stages(rows, batch, steps)
    assert [stage.end_step for stage in stages] == ends
    assert [stage.first_step for stage in stages] == [0, *ends[:-1]]


def test_record_holds_tasks_losses_and_gates(build, tmp_path):
    trainer = build({"output_dir": str(tmp_path / "run")}, eval_rows=text_rows(4), peft_config=cgc())
    trainer.train()
    trainer.evaluate()
    lines = [json.loads(line) for line in trainer.record.path.read_text().splitlines()]
    by_event = {line["event"]: line for line in lines}
    assert [task["task"] for task in by_event["tasks"]["tasks"]] == NAMES
    assert sum(task["draws"] for task in by_event["tasks"]["tasks"]) == 24
    assert set(by_event["task_losses"]["losses"]) <= set(NAMES)
    gates = by_event["gates"]["layers"]
    assert all(np.array(table).shape == (3, 5) for table in gates.values())
    assert len(gates) >= 2


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.slow
def test_a_resumed_run_equals_a_whole_one_bit_by_bit(build, tmp_path):
    def make(folder):
        # Saved between two logs.
        args = {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
        multitask = {"sampling": "temperature", "batches": "homogeneous"}
        return build({**args, "num_train_epochs": 2}, multitask, peft_config=cgc(lora_dropout=0.1))

    whole = make("run")
    whole.train()
    resumed = make("run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    keys = [f"{name}_loss" for name in NAMES]
    logs = [
        [[entry.get(key) for key in keys] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    again = make("run")
    again.train()
    again.train()
    assert again.state.global_step == whole.state.global_step


def test_a_checkpoint_of_another_order_is_refused(build, tmp_path):
    args = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 3}
    build(args).train()
    for other in ({"sampling": "uniform"}, {"batches": "homogeneous"}):
        with pytest.raises(ValueError, match=r"another order of tasks \(order"):
            build(args, other).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"another order of tasks \(tasks"):
        build(args, {"task_names": ["sum", "sort", "echo", "more"]}).train(resume_from_checkpoint=True)


def test_a_changed_data_set_is_refused(build):
    trainer = build()
    trainer.train_dataset = trainer.train_dataset.select(range(8))
    with pytest.raises(ValueError, match="`train_dataset`: got 8, expected 24"):
        trainer.train()


# Bad input


def without_task(rows):
    return rows.remove_columns("task")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": without_task(text_rows(4))}, "`train_dataset`: got the columns .* expected a column `task`"),
        ({"eval_rows": without_task(text_rows(4))}, "`eval_dataset`: got the columns"),
        ({"eval_rows": {"x": without_task(text_rows(4))}}, r"`eval_dataset\['x'\]`"),
        ({"rows": text_rows(4, names=["sum", "sort", "who"]), "peft_config": cgc()}, "got who, expected one of"),
        ({"eval_rows": text_rows(4, names=["sum", "sort", "who"])}, "got who, expected one of"),
        ({"multitask": {"task_names": ["a"]}, "peft_config": cgc()}, "`multitask.task_names`: got \\['a'\\]"),
        ({"multitask": {"unknown_task": "common"}, "peft_config": cgc()}, "`multitask.unknown_task`: got common"),
        ({"rows": text_rows(4, names=["sum", "sort", "eval"])}, "got eval|`task_names`"),
        ({"args": {"shuffle_dataset": True}}, "`shuffle_dataset`: got True"),
        ({"args": {"train_sampling_strategy": "group_by_length"}}, "`train_sampling_strategy`"),
        ({"args": {"ignore_data_skip": True}}, "`ignore_data_skip`"),
        ({"args": {"packing": True, "max_length": None}}, "max_length"),
        ({"rows": text_rows(4).select([])}, "got 0 rows"),
    ],
)
def test_bad_arguments_are_refused_before_training(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_streams_and_wrong_configs_are_refused(build, tokenizer):
    with pytest.raises(NotImplementedError, match="A streamed `train_dataset`"):
        build(rows=IterableDataset.from_generator(lambda: iter(text_rows(4))))
    with pytest.raises(ValueError, match="expected a `MultiTaskConfig`"):
        MultiTaskSFTTrainer(
            model=language_model(tokenizer),
            args=SFTConfig(**CPU, bf16=False),
            train_dataset=text_rows(4),
            multitask={},
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "odd"}, "`sampling`"),
        ({"batches": "odd"}, "`batches`"),
        ({"unknown_task": "odd"}, "`unknown_task`"),
        ({"temperature": 0.0, "sampling": "temperature"}, "`temperature`"),
        ({"temperature": 3.0}, "`temperature`: got 3.0, expected its default with"),
        ({"task_column": "tasks"}, "`task_column`"),
        ({"task_column": ""}, "`task_column`"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiTaskConfig(**options)


# Arithmetic


@pytest.mark.parametrize("per_token", [False, True])
def test_sums_are_a_loop_s(per_token):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(5, 6, generator=generator)
    weights = torch.rand(5, 6, generator=generator) > 0.4
    losses[~weights] = float("nan")
    tasks = torch.randint(-2, 3, (5, 7) if per_token else (5,), generator=generator)
    expected = torch.zeros(5, 5, 2, dtype=torch.float64)
    for row in range(5):
        for column in range(6):
            if weights[row, column]:
                task = int(tasks[row, column + 1] if per_token else tasks[row])
                expected[row, task, 0] += losses[row, column].double()
                expected[row, task, 1] += 1
    found = sums_by_task(ItemLosses(losses, weights), tasks, 3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_classifier_losses_are_those_of_transformers(kind):
    options = {"single": {"num_labels": 4}, "multi": {"num_labels": 4}, "regression": {"num_labels": 1}}[kind]
    model = classifier(**options)
    ids = torch.arange(15).reshape(5, 3)
    labels = {
        "single": torch.tensor([0, 3, 1, 2, 2]),
        "multi": torch.randint(0, 2, (5, 4)).float(),
        "regression": torch.rand(5),
    }[kind]
    with torch.no_grad():
        outputs = model(ids, labels=labels)
    items = item_losses(outputs, labels, shift=False)
    assert items.losses.shape == (5, 1)
    assert items.losses.mean().item() == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_unreadable_outputs_give_no_losses():
    assert item_losses((torch.zeros(2, 3),), torch.zeros(2), shift=False) is None
    assert item_losses({"logits": torch.zeros(2, 3, 4)}, torch.zeros(2, 5), shift=False) is None
