"""Neither momentum nor weight decay moves what belongs to a task that a step has no row of."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from peft import get_peft_model
from transformers import BertConfig, BertModel, TrainerCallback, TrainingArguments

from hf_curriculum import CurriculumConfig
from hf_curriculum.multitask.absent import freeze_absent_tasks
from hf_curriculum.multitask.aware import moves_absent_tasks
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.heads import MultiTaskHeads
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.trainers import MultiTaskTrainer


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("task_runs", Path(__file__).with_name("task_runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)
cgc, language_model, text_rows = runs.cgc, runs.language_model, runs.text_rows


# Experts


def own_rows(trainer):
    """What belongs to the task `sort` in every adapted linear."""
    place = trainer.task_registry.id("sort")
    found = []
    for experts in trainer.model.base_model.experts().values():
        own = experts.layout.own_slice(place)
        found += [experts.A[own], experts.B[:, own], experts.gate_logits[place]]
    return [value.detach().clone() for value in found]


def one_task_at_a_time(build, multitask=None, **args):
    """All steps of `sort` come first, then those of `sum`: its experts have momentum when it is gone."""
    rows = text_rows(24)
    rows = rows.remove_columns("task").add_column("task", ["sort"] * 8 + ["sum"] * 16)
    rows = rows.add_column("difficulty", [0.0] * 8 + [1.0] * 16)
    trainer = build(
        {"weight_decay": 0.5, "learning_rate": 1e-2, **args},
        multitask,
        rows=rows,
        peft_config=cgc(),
        cls=runs.CurriculumMultiTaskTrainer,
        curriculum=CurriculumConfig(scorer="column", difficulty_column="difficulty", num_levels=2),
    )
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = own_rows(trainer)

    trainer.add_callback(Watch())
    trainer.train()
    return seen


def same(first, second):
    return [torch.equal(*pair) for pair in zip(first, second, strict=True)]


def test_a_task_that_is_absent_stays_bit_equal(build):
    seen = one_task_at_a_time(build)
    assert len(seen) == 6
    assert not any(same(seen[1], seen[2]))
    for step in (3, 4, 5, 6):
        assert all(same(seen[2], seen[step]))


def test_without_holding_an_absent_task_is_moved(build):
    seen = one_task_at_a_time(build, {"hold_absent_tasks": False})
    assert not any(same(seen[2], seen[6]))


def test_an_optimizer_with_other_state_trains_and_says_so(build, capsys):
    seen = one_task_at_a_time(build, optim="adafactor")
    assert not all(same(seen[2], seen[6]))
    text = "".join(capsys.readouterr())
    assert text.count("Adafactor moves the experts and heads of tasks") == 1
    with pytest.raises(NotImplementedError, match="no number per element"):
        one_task_at_a_time(build, {"hold_absent_tasks": True}, optim="adafactor")


@pytest.mark.parametrize("backend", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_backends_with_flattened_parameters_are_told_of(tokenizer, backend):
    model = get_peft_model(language_model(tokenizer), cgc())
    assert "momentum and weight decay also move" in moves_absent_tasks(model, backend, None)
    with pytest.raises(NotImplementedError, match=r"`multitask\.hold_absent_tasks` under"):
        moves_absent_tasks(model, backend, True)
    assert moves_absent_tasks(model, backend, False) is None
    assert moves_absent_tasks(model, DistributedType.MULTI_GPU, True) is None
    plain = language_model(tokenizer)
    assert moves_absent_tasks(plain, backend, None) is None
    with pytest.raises(ValueError, match=r"`multitask\.hold_absent_tasks`: got True"):
        moves_absent_tasks(plain, DistributedType.NO, True)


# Heads

HEADS = {"topic": TaskHead(3), "mood": TaskHead(2), "score": TaskHead(1, "regression"), "kind": TaskHead(5)}


def classifier(adapter=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = BertModel(BertConfig(vocab_size=30, max_position_embeddings=8, **sizes), add_pooling_layer=False)
    if adapter is not None:
        backbone = get_peft_model(backbone, adapter)
    return MultiTaskHeads(backbone, HEADS, pooling="mean", dropout=0.0)


def labelled_rows(count=40):
    tasks = [list(HEADS)[index % 4] for index in range(count)]
    # Of one column for all, classes and numbers alike.
    labels = [[float(index // 4 % 2) + (0.5 if task == "score" else 0.0)] for index, task in enumerate(tasks)]
    ids = [[1 + index % 29, 1 + index * 7 % 29, 3] for index in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "task": tasks})


def head_parts(model):
    """Rows and biases of each head, one tensor a task."""
    sizes = [head.num_labels for head in HEADS.values()]
    both = torch.cat([model.classifier.weight, model.classifier.bias[:, None]], dim=1)
    return [part.detach().clone() for part in both.split(sizes)]


def steps_of_one_task(adapter=None, **args):
    """Each optimizer step is of one task: its id, and the heads before and after."""
    model, seen = classifier(adapter), []
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer = MultiTaskTrainer(
        model=model,
        args=TrainingArguments(**{**runs.CPU, **settings, "weight_decay": 0.5, "learning_rate": 1e-2, **args}),
        train_dataset=labelled_rows(),
        multitask=MultiTaskConfig(batches="homogeneous_step", hold_absent_tasks=True),
    )
    step, last = trainer.training_step, {"parts": head_parts(model)}

    def noted(model, inputs, *args, **kwargs):
        (last["task"],) = set(inputs["tasks"].tolist())
        return step(model, inputs, *args, **kwargs)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((last["task"], last["parts"], head_parts(model)))
            last["parts"] = seen[-1][2]

    trainer.training_step = noted
    trainer.add_callback(Watch())
    trainer.train()
    return seen


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd_momentum"])
@pytest.mark.parametrize("adapted", [False, True], ids=["heads-alone", "over-cgc-lora"])
def test_a_step_of_one_task_moves_its_head_alone(optimizer, adapted):
    adapter = runs.CGCLoraConfig(task_names=list(HEADS), target_modules=["query"]) if adapted else None
    options = {"optim": "sgd", "optim_args": "momentum=0.9"} if optimizer == "sgd_momentum" else {"optim": optimizer}
    seen = steps_of_one_task(adapter, **options)
    assert len(seen) == 20
    assert {task for task, _, _ in seen} == set(range(4))
    for present, before, after in seen:
        assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [
            task != present for task in range(4)
        ]


def head_step(model, optimizer, task, labels):
    optimizer.zero_grad()
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    model(input_ids=ids, labels=torch.tensor(labels), tasks=task).loss.backward()
    optimizer.step()


def test_momentum_of_an_absent_head_is_there_when_it_comes_back():
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = freeze_absent_tasks(optimizer, model)
    head_step(model, optimizer, "mood", [0, 1])
    state = optimizer.state[model.classifier.bias]["exp_avg"]
    mood, others = state[3:5].clone(), head_parts(model)
    head_step(model, optimizer, "topic", [0, 2])
    assert torch.equal(state[3:5], mood)
    assert mood.any()
    assert state[:3].any()
    assert torch.equal(head_parts(model)[1], others[1])
    guard.remove()
    head_step(model, optimizer, "topic", [0, 2])
    assert not torch.equal(state[3:5], mood)
    assert not torch.equal(head_parts(model)[1], others[1])


def test_a_head_with_one_output_is_held_with_its_momentum():
    torch.manual_seed(0)
    model = MultiTaskHeads(classifier().backbone, {"score": TaskHead(1, "regression")}, pooling="mean", dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    freeze_absent_tasks(optimizer, model)
    head_step(model, optimizer, "score", [1.0, 2.0])
    bias = model.classifier.bias.detach().clone()
    momentum = optimizer.state[model.classifier.bias]["momentum_buffer"].clone()
    # Rows without labels: the task is in the batch and has nothing to learn.
    head_step(model, optimizer, "score", [-100.0, -100.0])
    assert torch.equal(model.classifier.bias, bias)
    assert torch.equal(optimizer.state[model.classifier.bias]["momentum_buffer"], momentum)


WORKER = """
import argparse, importlib.util, json, os, sys
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments
from hf_curriculum.core.distributed import end_processes
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.trainers import MultiTaskTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--tests")
parser.add_argument("--expect")
parser.add_argument("--weight_decay", type=float)
options = parser.parse_args()
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("tests", options.tests)
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
held = options.expect == "MULTI_CPU"
model = tests.classifier()
trainer = MultiTaskTrainer(
    model=model,
    args=TrainingArguments(
        **{**tests.runs.CPU, "output_dir": os.path.join(os.getcwd(), "out")}, per_device_train_batch_size=2,
        num_train_epochs=2, weight_decay=options.weight_decay, learning_rate=1e-2, max_grad_norm=0.0,
    ),
    train_dataset=tests.labelled_rows(),
    # The rows of one process in one step are of one task.
    multitask=MultiTaskConfig(batches="homogeneous", hold_absent_tasks=True if held else None),
)
state = trainer.accelerator.state
stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
assert state.distributed_type.value + stage == options.expect
step, last, ever = trainer.training_step, {"parts": tests.head_parts(model)}, set()
found = {"moved though absent": 0, "moved though unseen": 0, "still though present": 0, "on one rank": 0}

def noted(model, inputs, *args, **kwargs):
    (last["task"],) = set(inputs["tasks"].tolist())
    return step(model, inputs, *args, **kwargs)

class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        parts = tests.head_parts(model)
        ranks = [None, None]
        dist.all_gather_object(ranks, (last["task"], parts))
        assert all(torch.equal(*pair) for pair in zip(ranks[0][1], ranks[1][1])), "replicas differ"
        present = {task for task, _ in ranks}
        ever.update(present)
        found["on one rank"] += len(present) == 2
        for task, (before, after) in enumerate(zip(last["parts"], parts)):
            moved = not torch.equal(before, after)
            found["still though present"] += task in present and not moved
            found["moved though absent"] += task not in present and moved
            found["moved though unseen"] += task not in ever and moved
        last["parts"] = parts

trainer.training_step = noted
trainer.add_callback(Watch())
trainer.train()
if trainer.is_world_process_zero():
    sys.stdout.write("FOUND " + json.dumps(found) + "\\n")
    sys.stdout.flush()
end_processes()
"""


def found_by(launch, expect, weight_decay, config):
    args = ["--tests", __file__, "--expect", expect, "--weight_decay", str(weight_decay)]
    text = launch(WORKER, 2, args=args, config=config, timeout=100).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_head_present_on_one_rank_moves_on_both_and_no_other_does(launch):
    found = found_by(launch, "MULTI_CPU", 0.5, None)
    assert found.pop("on one rank") > 0
    assert set(found.values()) == {0}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2])
def test_under_zero_without_weight_decay_a_head_stays_at_its_start_until_its_task_comes(launch, stage):
    found = found_by(launch, f"DEEPSPEED-{stage}", 0.0, f"zero{stage}.yaml")
    assert found["on one rank"] > 0
    assert found["still though present"] == found["moved though unseen"] == 0
    # What a user is told of at the start: momentum goes on.
    assert found["moved though absent"] > 0
