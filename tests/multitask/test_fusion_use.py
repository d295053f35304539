"""What users do with a fused model beside training it: threads, casts, thresholds, damaged folders, odd input."""

import copy
import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorWithPadding

from hf_curriculum.multitask.attention_fusion import (
    AttentionFusionConfig,
    AttentionFusionModel,
    cache_features,
    measure_attention,
)
from hf_curriculum.multitask.labels import heads_of_labels
from hf_curriculum.multitask.task_head import TaskHead


_spec = importlib.util.spec_from_file_location("fusion_worker", Path(__file__).with_name("fusion_worker.py"))
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
twin = worker.twin
NAMES = list(twin.HEADS)
INPUTS = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}


def cached_rows(tokenizer, model):
    texts = ["add 3 and 4", "echo", "7"]
    rows = [
        {"input_ids": tokenizer(text)["input_ids"], "labels": model.encode_label(task, None), "task": task}
        for text in texts
        for task in model.heads
    ]
    return Dataset.from_list(rows)


def test_passes_in_threads_do_not_see_one_another():
    # Larger than the others, so that threads meet in the middle of a pass.
    base = twin.base_model("bert", hidden_size=128, intermediate_size=512)
    model = twin.make(base=base, stage="tasks")
    inputs = {"input_ids": torch.randint(1, 40, (32, 24))}

    def logits(task):
        with torch.no_grad():
            return model(**inputs, tasks=task).logits

    expected = {task: logits(task) for task in NAMES}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, NAMES * 10))
    for task, own in zip(NAMES * 10, found, strict=True):
        assert torch.equal(own, expected[task])


@pytest.mark.parametrize("level", ["output", "layer"])
def test_a_model_cast_to_16_bits_runs(level):
    model = twin.make(level=level)
    full = model(**INPUTS, tasks=NAMES[0]).logits
    cast = copy.deepcopy(model).to(torch.bfloat16)(**INPUTS, tasks=NAMES[0]).logits
    own = model.heads[NAMES[0]].num_labels
    full, cast = full[:, :own], cast[:, :own].float()
    assert (cast - full).abs().max() < 0.1 * full.abs().max()


def test_a_threshold_that_is_set_later_is_saved(tmp_path):
    base = twin.base_model("bert")
    heads = {"tags": TaskHead(3, "multi_label_classification"), "topic": TaskHead(2)}
    model = AttentionFusionModel(base, AttentionFusionConfig(heads=heads))
    model.heads["tags"] = replace(model.heads["tags"], threshold=(0.2, 0.5, 0.7))
    model.save_pretrained(tmp_path)
    loaded = AttentionFusionModel.from_pretrained(tmp_path, base=twin.base_model("bert"))
    assert loaded.heads["tags"].threshold == (0.2, 0.5, 0.7)


def test_heads_that_no_fusion_has_trained_start_anew_as_those_of_the_tasks():
    model = twin.make(random=False, stage="tasks")
    model.set_stage("fusion")
    model.set_stage("tasks")
    twin.randomise(model, {"lora", "own_classifier"}, 5)
    alone = model(**INPUTS, tasks=NAMES[0]).logits
    model.set_stage("fusion")
    torch.testing.assert_close(model.eval()(**INPUTS, tasks=NAMES[0]).logits, alone)


def test_one_config_makes_several_models():
    config = AttentionFusionConfig(task_names=["a"], num_labels={"a": 2}, lora=LoraConfig(r=2))
    AttentionFusionModel(twin.base_model("bert"), config)
    assert config.lora.target_modules is None
    AttentionFusionModel(twin.base_model("llama"), config)


def test_blocks_may_be_given_as_a_range(tmp_path):
    lora = LoraConfig(
        r=2, target_modules=["query"], layers_to_transform=range(1, 2), layers_pattern="layer"
    )  # fmt: skip
    model = AttentionFusionModel(
        twin.base_model("bert"), AttentionFusionConfig(task_names=["a"], num_labels={"a": 2}, lora=lora)
    )
    model.save_pretrained(tmp_path)
    AttentionFusionModel.from_pretrained(tmp_path, base=twin.base_model("bert"))


@pytest.mark.parametrize(
    "name", ["README.md", "fusion.safetensors", "Task_Heads.json", "checkpoint-3", "hf_curriculum"]
)
def test_names_of_files_beside_the_tasks_are_refused(name):
    with pytest.raises(ValueError, match="names other than those of files and folders beside the tasks'"):
        AttentionFusionConfig(task_names=[name], num_labels={name: 2})


@pytest.mark.parametrize(
    ("file", "text"), [("adapter_config.json", "{"), ("adapter_model.safetensors", "broken"), (None, None)]
)
def test_a_damaged_adapter_is_named(tmp_path, file, text):
    model = twin.make()
    model.save_pretrained(tmp_path)
    broken = tmp_path / NAMES[0]
    if file is None:
        (broken / "adapter_model.safetensors").unlink()
    else:
        (broken / file).write_text(text)
    with pytest.raises(ValueError, match=f"Invalid `adapter`: got .*{NAMES[0]}, which cannot be read"):
        AttentionFusionModel.from_pretrained(tmp_path, base=twin.base_model("bert"))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected an existing folder, or the id of a Hub repository"):
        AttentionFusionModel.from_pretrained(tmp_path / "not" / "there")


def test_a_base_of_other_depth_is_refused(tmp_path):
    twin.make().save_pretrained(tmp_path)
    described = json.loads((tmp_path / "fusion_config.json").read_text())
    described["base"]["num_hidden_layers"] += 1
    (tmp_path / "fusion_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"Invalid `base`: got .*num_hidden_layers"):
        AttentionFusionModel.from_pretrained(tmp_path, base=twin.base_model("bert"))


def test_padding_on_the_other_side_makes_features_of_its_own(tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = cached_rows(tokenizer, model)
    names = set()
    for side in ("right", "left"):
        tokenizer.padding_side = side
        names.add(cache_features(model, rows, tmp_path, collator=DataCollatorWithPadding(tokenizer)).name)
    tokenizer.padding_side = "right"
    assert len(names) == 2


def test_what_is_heard_is_not_measured_on_features_of_other_models(tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = cached_rows(tokenizer, model)
    features = cache_features(model, rows, tmp_path, collator=DataCollatorWithPadding(tokenizer))
    twin.randomise(model, {"lora"}, 9)
    with pytest.raises(ValueError, match="cached features of other models"):
        measure_attention(model, features)


def test_rows_with_a_column_of_that_name_are_not_cached(tokenizer, tmp_path):
    model = worker.model_of(tokenizer, "output", "fusion")
    rows = cached_rows(tokenizer, model).add_column("pooled", [0] * 3 * len(model.heads))
    with pytest.raises(ValueError, match="got a column `pooled`"):
        cache_features(model, rows, tmp_path, collator=DataCollatorWithPadding(tokenizer))


def test_texts_may_be_an_array_and_must_have_tokens(tokenizer):
    model = worker.model_of(tokenizer, "output", "fusion")
    texts = ["add 3 and 4", "echo"]
    listed = model.predict(texts, task=NAMES[0], processing_class=tokenizer)
    assert model.predict(np.array(texts), task=NAMES[0], processing_class=tokenizer) == listed
    with pytest.raises(ValueError, match="Invalid `task`: got nope, expected one of"):
        model.predict(texts, task="nope", processing_class=tokenizer)
    with pytest.raises(ValueError, match="Invalid `max_length`: got 0"):
        model.predict(texts, task=NAMES[0], processing_class=tokenizer, max_length=0)


@pytest.mark.parametrize("names", [{0: "no", 1: "yes"}, "ab", [0, 1], ["a", "a"]])
def test_names_of_classes_are_texts_in_a_row(names):
    with pytest.raises(ValueError, match="2 different names, in the order of their ids"):
        TaskHead(2, id2label=names)


@pytest.mark.parametrize("task", [-1, 2, "c"])
def test_labels_of_no_task_are_refused(task):
    with pytest.raises(ValueError, match="Invalid `tasks`"):
        heads_of_labels(["a", "b"], [0, 1, task], [0, 1, 1])


def test_what_is_pushed_is_a_folder_that_loads(monkeypatch, tmp_path):
    pushed = {}

    class Hub:
        def __init__(self, token):
            pushed["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            pushed["repo"] = (repo_id, private, exist_ok)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub")
            return f"{repo_id}: {commit_message}"

    monkeypatch.setattr("hf_curriculum.multitask.attention_fusion.files.HfApi", Hub)
    model = twin.make()
    assert model.push_to_hub("fused", private=True, token="t", commit_message="first") == "me/fused: first"
    assert pushed == {"token": "t", "repo": ("fused", True, True)}
    loaded = AttentionFusionModel.from_pretrained(tmp_path / "hub", base=twin.base_model("bert"))
    assert torch.equal(loaded(**INPUTS, tasks=NAMES[0]).logits, model(**INPUTS, tasks=NAMES[0]).logits)
