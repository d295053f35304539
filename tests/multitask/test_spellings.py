"""Tasks and labels as data sets and callers spell them: the right task learns, or an error says what was meant."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, RobertaConfig, RobertaModel

from hf_curriculum.multitask.attention_fusion import AttentionFusionConfig, AttentionFusionModel
from hf_curriculum.multitask.attention_fusion.features import FeatureCollator
from hf_curriculum.multitask.labels import check_labels, heads_of_labels
from hf_curriculum.multitask.lengths import longest_row
from hf_curriculum.multitask.rows import inferred_names, row_task_ids, with_task_names
from hf_curriculum.multitask.sampler import task_order
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.multitask.tasks import TaskRegistry
from hf_curriculum.recipe_data import hold_out


# Neighbours' files: with `--import-mode=importlib` the tests' folders are on no path.
def neighbour(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs, twin = neighbour("task_runs"), neighbour("cgc_twin")


def class_labelled(rows, names):
    ids = [None if task is None else names.index(task) for task in rows["task"][:]]
    rows = rows.add_column("ids", ids).remove_columns("task").rename_column("ids", "task")
    return rows.cast_column("task", ClassLabel(names=names))


def test_class_labels_are_tasks_by_name():
    rows = class_labelled(Dataset.from_dict({"task": ["b", "a", "b", "a"]}), ["b", "a"])
    assert row_task_ids(rows, "task", TaskRegistry(["a", "b"])).tolist() == [1, 0, 1, 0]
    assert inferred_names(rows, "task") == ["a", "b"]
    assert with_task_names({"x": rows}, "task")["x"]["task"][:] == ["b", "a", "b", "a"]
    missing = class_labelled(Dataset.from_dict({"task": ["b", None]}), ["b", "a"])
    assert row_task_ids(missing, "task", TaskRegistry(["a", "b"], unknown_task="common")).tolist() == [1, -1]


def test_class_labels_train_and_evaluate_as_their_names_do(build):
    found = []
    for spell in (lambda rows: rows, lambda rows: class_labelled(rows, ["echo", "sort", "sum"])):
        trainer = build(
            peft_config=runs.cgc(), rows=spell(runs.text_rows()), eval_rows=spell(runs.text_rows(8, seed=1))
        )
        batches = runs.seen_batches(trainer)
        later = trainer.evaluate(spell(runs.text_rows(8, seed=2)))
        tasks = sorted(task for batch in batches for task in batch["tasks"].tolist())
        found.append((tasks, trainer.evaluate(), later))
    assert found[0][0] == found[1][0]
    for names, labels in zip(found[0][1:], found[1][1:], strict=True):
        for task in runs.NAMES:
            assert labels[f"eval_{task}_loss"] == pytest.approx(names[f"eval_{task}_loss"], rel=1e-5)


def adapted(kind="llama", **kwargs):
    torch.manual_seed(3)
    return get_peft_model(twin.base_model(kind), twin.make_config(kind, **kwargs)).eval()


@pytest.mark.parametrize("tasks", [np.array(["a", "c", "a", "b"]), np.array([0, 2, 0, 1])], ids=["names", "ids"])
def test_arrays_are_tasks(tasks):
    model, inputs = adapted(), twin.batch("llama")
    with torch.no_grad():
        expected = model(**inputs, tasks=["a", "c", "a", "b"]).logits
        assert torch.allclose(model(**inputs, tasks=tasks).logits, expected, atol=1e-6)


@pytest.mark.parametrize("tasks", [["a", "b"], ("a", "a"), torch.tensor([0, 1]), np.array(["a", "b"])])
def test_fewer_tasks_than_rows_are_refused(tasks):
    model, inputs = adapted(), twin.batch("llama")
    with pytest.raises(ValueError, match="got 2 tasks, expected one, or one for each of the 4 rows"):
        model(**inputs, tasks=tasks)
    with pytest.raises(ValueError, match="got 2 tasks, expected one, or one for each of the 4 rows"):
        model.generate(input_ids=inputs["input_ids"], tasks=tasks, max_new_tokens=2)
    assert model(**inputs, tasks="a").logits.shape[0] == 4


@pytest.mark.parametrize("task", ["common", "uniform", "b"])
@pytest.mark.parametrize("how", ["keyword", "list", "set"])
def test_compiled_passes_take_reserved_tasks(task, how):
    torch._dynamo.reset()
    model, inputs = adapted(), twin.batch("llama")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(**inputs, tasks=task).logits
        if how == "set":
            with model.base_model.set_task(task):
                found = compiled(**inputs).logits
        else:
            found = compiled(**inputs, tasks=task if how == "keyword" else [task] * 4).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_experts_of_tasks_in_another_order_are_not_loaded(tmp_path):
    model = adapted(init_weights=False)
    names = list(model.peft_config["default"].task_names)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(twin.base_model("llama"), tmp_path)
    other = adapted(task_names=names[::-1])
    with pytest.raises(ValueError, match="tasks with other names or in another order"):
        other.load_adapter(str(tmp_path), "default")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="tasks with other names or in another order"):
        set_peft_model_state_dict(other, tensors)
    # Files that know no names, of ZeRO-3 for one, are taken as they are.
    nameless = {name: value for name, value in tensors.items() if not name.endswith("_extra_state")}
    assert len(nameless) < len(tensors)
    set_peft_model_state_dict(other, nameless)


def test_classes_that_a_file_makes_decimals_are_not_regressed():
    tasks, labels = ["stars", "price", "stars", "price"], [0.0, 1.5, 4.0, 2.0]
    with pytest.raises(ValueError, match=r"whole numbers such as 0\.0 for task stars"):
        heads_of_labels(["stars", "price"], tasks, labels)
    heads = heads_of_labels(["stars", "price"], tasks, labels, regression_tasks=["stars"])
    assert [head.problem_type for head in heads.values()] == ["regression", "regression"]
    alone = heads_of_labels(["stars"], ["stars"] * 2, [1.0, 5.0])["stars"]
    assert alone.problem_type == "regression"


@pytest.mark.parametrize("title", ["label", "label_ids"])
def test_labels_are_checked_under_each_name_that_collators_take(title):
    rows = Dataset.from_dict({"input_ids": [[1], [2]], title: [0, 7]})
    with pytest.raises(ValueError, match="labels 7 in row 1, of task a"):
        check_labels({"a": TaskHead(3)}, rows, np.zeros(2, dtype=np.int64), "train_dataset")


def test_every_task_keeps_rows_when_some_are_held_out():
    rows = Dataset.from_dict({"task": [0] * 20 + [1] * 10 + [2]})
    train, test = hold_out(rows, 0.1, 0, np.array(rows["task"][:]))
    assert [train["task"][:].count(task) for task in range(3)] == [18, 9, 1]
    assert [test["task"][:].count(task) for task in range(3)] == [2, 1, 0]
    assert hold_out(rows.select([30]), 0.4, 0, np.array([2]))[1] is None


class Tokenizer:
    model_max_length = int(1e30)


SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def test_longest_row_is_what_positions_allow():
    assert longest_row(BertModel(BertConfig(**SIZES, max_position_embeddings=40)), Tokenizer()) == 40
    roberta = RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=40, pad_token_id=1)).eval()
    longest = longest_row(roberta, Tokenizer())
    assert roberta(torch.full((1, longest), 5)).last_hidden_state.shape[1] == longest == 38
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_predictions_do_not_depend_on_the_side_that_a_tokenizer_pads_on(kind, tokenizer):
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tokenizer)
    if kind == "bert":
        base = BertModel(BertConfig(**{**SIZES, "vocab_size": len(tokenizer)}), add_pooling_layer=False)
    else:
        base = GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64))
    model = AttentionFusionModel(
        base, AttentionFusionConfig(task_names=["a", "b"], num_labels={"a": 3, "b": 2})
    ).eval()
    texts = ["one", "one two three four five six seven", "two three"]
    scores = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        together = model.predict(texts, task="a", processing_class=tokenizer)
        alone = [model.predict([text], task="a", processing_class=tokenizer)[0] for text in texts]
        for one, other in zip(together, alone, strict=True):
            assert list(one.scores.values()) == pytest.approx(list(other.scores.values()), abs=1e-5)
        scores.append([list(each.scores.values()) for each in together])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_rows_that_are_no_cached_features_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="columns input_ids, labels, expected `pooled`, as `cache_features` writes it"
    ):
        FeatureCollator(tmp_path, "models")([{"input_ids": [1], "labels": 0}])


@pytest.mark.parametrize(("batch_size", "fix"), [(1, "larger batches"), (2, "`batches='mixed'`")])
def test_too_few_steps_for_the_tasks_name_what_helps(batch_size, fix):
    with pytest.raises(ValueError, match=fix):
        task_order(list(range(5)), 4, batch_size=batch_size)
