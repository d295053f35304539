"""Heads on disk: beside exported adapters, in checkpoints of the trainer, and back."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel, TrainingArguments

from hf_curriculum import cli
from hf_curriculum.multitask.cgc_lora import CGCLoraConfig, export_task_adapters
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.heads import MultiTaskHeads
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.trainers import MultiTaskTrainer


CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
HEADS = {
    "topic": TaskHead(3, id2label=("war", "peace", "sport")),
    "tags": TaskHead(4, "multi_label_classification"),
    "score": TaskHead(2, "regression", target_scale=2.0),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a small encoder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = tmp_path_factory.mktemp("base")
    BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes, **dropout)).save_pretrained(folder)
    return folder


def mixture(base, *, adapter="cgc", dropout=0.0):
    torch.manual_seed(1)
    backbone = AutoModel.from_pretrained(base)
    if adapter == "cgc":
        config = CGCLoraConfig(task_names=list(HEADS), target_modules=["query", "value"], init_weights=False)
        backbone = get_peft_model(backbone, config)
    elif adapter == "lora":
        backbone = get_peft_model(backbone, LoraConfig(target_modules=["query"]))
    return MultiTaskHeads(backbone, HEADS, pooling="mean", dropout=dropout).eval()


def batch():
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0], [10, 11, 12, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(**batch(), **kwargs).logits


def rows(count=24):
    labels = {
        "topic": [2.0, -100.0, -100.0, -100.0],
        "tags": [1.0, 0.0, 0.0, 1.0],
        "score": [0.5, -1.5, -100.0, -100.0],
    }
    tasks = [list(HEADS)[index % 3] for index in range(count)]
    ids = [[4 + index, 6, 7 + index % 5] for index in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [labels[task] for task in tasks], "task": tasks})


def trainer_of(model, folder, **args):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "save_steps": 4}
    return MultiTaskTrainer(
        model=model,
        args=TrainingArguments(**{**CPU, **settings, "output_dir": str(folder), **args}),
        train_dataset=rows(),
        eval_dataset=rows(6),
        multitask=MultiTaskConfig(sampling="uniform"),
    )


def task_losses(trainer):
    found = trainer.evaluate()
    return {task: found[f"eval_{task}_loss"] for task in HEADS}


def check_exported(folder, model):
    """Each task's adapter and head, loaded in one call, have the logits of the mixture."""
    for task, head in HEADS.items():
        loaded = MultiTaskHeads.from_pretrained(folder / task)
        assert isinstance(loaded.backbone, PeftModel)
        assert type(loaded.backbone.peft_config["default"]) is LoraConfig
        assert loaded.heads == {task: head}
        own = logits(model, tasks=task)[:, : head.num_labels]
        assert (logits(loaded) - own).abs().max() <= 1e-5
        assert torch.equal(logits(loaded), logits(loaded, tasks=task))
        if head.problem_type != "regression":
            assert loaded.decode(logits(loaded), task) == model.decode(logits(model, tasks=task), task)


def test_a_task_s_adapter_and_head_have_the_logits_of_the_mixture(base, tmp_path, capsys):
    model = mixture(base)
    report = export_task_adapters(model, tmp_path / "export")
    assert max(report.logit_differences.values()) <= 1e-5
    check_exported(tmp_path / "export", model)
    assert not torch.allclose(logits(model, tasks="topic")[:, :2], logits(model, tasks="score")[:, :2], atol=1e-3)
    assert "lies its head, `task_heads.safetensors`" in "".join(capsys.readouterr())
    assert "which vLLM leaves alone" in (tmp_path / "export" / "README.md").read_text()
    assert "weight @ pooled + bias" in (tmp_path / "export" / "topic" / "README.md").read_text()


def test_the_files_of_a_head_say_all_that_another_program_needs(base, tmp_path):
    model = mixture(base, dropout=0.2)
    export_task_adapters(model, tmp_path / "export", tasks=["score", "topic"])
    folder = tmp_path / "export" / "topic"
    told = json.loads((folder / "task_heads.json").read_text())
    assert told["pooling"] == "mean"
    assert told["heads"]["topic"]["id2label"] == ["war", "peace", "sport"]
    assert told["heads"]["topic"]["problem_type"] == "single_label_classification"
    assert list(told["heads"]) == ["topic"]
    # vLLM refuses adapters with anything but the factors in them.
    assert {name.rsplit(".", 2)[1] for name in load_file(folder / "adapter_model.safetensors")} == {"lora_A", "lora_B"}
    assert not (tmp_path / "export" / "common" / "task_heads.json").exists()
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()
    head, mask = load_file(folder / "task_heads.safetensors"), batch()["attention_mask"][..., None]
    with torch.no_grad():
        hidden = plain(**batch()).last_hidden_state
    pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    found = pooled @ head["weight"].T + head["bias"]
    assert (found - logits(model, tasks="topic")[:, :3]).abs().max() <= 1e-5


def test_a_head_that_cannot_be_written_leaves_nothing(base, tmp_path, monkeypatch):
    model = mixture(base)

    def fails(task, folder):
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_head", fails)
    with pytest.raises(OSError, match="disk full"):
        export_task_adapters(model, tmp_path / "export")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="or task heads over one"):
        export_task_adapters(mixture(base, adapter=None), tmp_path / "export")


def test_a_checkpoint_of_the_trainer_is_loaded_and_exported(base, tmp_path, capsys):
    model = mixture(base)
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    checkpoint = tmp_path / "run" / f"checkpoint-{trainer.state.global_step}"
    # The frozen base stays out of it.
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    loaded = MultiTaskHeads.from_pretrained(checkpoint)
    for task in HEADS:
        assert torch.equal(logits(loaded, tasks=task), logits(model, tasks=task))
    with pytest.raises(ValueError, match="`tasks`: got None"):
        logits(loaded)
    assert cli.main(["export", str(checkpoint), str(tmp_path / "export")]) == 0
    assert "task_heads.safetensors" in "".join(capsys.readouterr())
    check_exported(tmp_path / "export", model)


@pytest.mark.parametrize("adapter", ["cgc", "lora", None])
def test_heads_resume_bit_by_bit(base, tmp_path, adapter):
    whole = mixture(base, adapter=adapter, dropout=0.1)
    trainer_of(whole, tmp_path / "run").train()
    resumed = mixture(base, adapter=adapter, dropout=0.1)
    with torch.no_grad():
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    trainer_of(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    if adapter is None:
        loaded = MultiTaskHeads.from_pretrained(tmp_path / "run" / "checkpoint-4")
        assert isinstance(loaded.backbone, BertModel)


def test_the_best_heads_are_loaded_at_the_end(base, tmp_path):
    model = mixture(base)
    args = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_steps": 4}
    trainer = trainer_of(model, tmp_path / "run", greater_is_better=True, metric_for_best_model="loss", **args)
    trainer.train()
    # The highest loss counts as best here, so it is not what training ends with.
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = MultiTaskHeads.from_pretrained(trainer.state.best_model_checkpoint)
    last = MultiTaskHeads.from_pretrained(tmp_path / "run" / f"checkpoint-{trainer.state.global_step}")
    assert torch.equal(logits(model, tasks="topic"), logits(best, tasks="topic"))
    assert not torch.equal(best.classifier.weight, last.classifier.weight)


def test_heads_of_other_tasks_are_not_loaded_into_a_model(base, tmp_path):
    model = mixture(base)
    model.save_pretrained(tmp_path / "saved")
    other = MultiTaskHeads(AutoModel.from_pretrained(base), {"topic": TaskHead(9)}, pooling="mean")
    before = other.classifier.weight.clone()
    with pytest.raises(ValueError, match="with other heads than the model"):
        other.load_heads(tmp_path / "saved")
    assert torch.equal(other.classifier.weight, before)
    model.load_heads(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "task_heads.safetensors")
    save_file({"weight": weights["weight"]}, tmp_path / "saved" / "task_heads.safetensors")
    with pytest.raises(ValueError, match=r"(?s)cannot be read .*Missing key"):
        model.load_heads(tmp_path / "saved")
    with pytest.raises(ValueError, match="`task`: got who, expected one of topic"):
        model.save_head("who", tmp_path / "head")


def test_weights_and_thresholds_are_saved_and_heads_saved_before_there_were_any_load(base, tmp_path):
    heads = {
        "topic": TaskHead(3, class_weights=(1.0, 2.0, 0.5)),
        "tags": TaskHead(2, "multi_label_classification", class_weights=(3.0, 1.0), threshold=(0.3, 0.9)),
        "mood": TaskHead(2, "multi_label_classification", threshold=0.25),
    }
    MultiTaskHeads(AutoModel.from_pretrained(base), heads, pooling="mean").save_pretrained(tmp_path / "new")
    loaded = MultiTaskHeads.from_pretrained(tmp_path / "new")
    assert loaded.heads == heads
    loaded.load_heads(tmp_path / "new")
    model = mixture(base, adapter=None)
    model.save_pretrained(tmp_path / "old")
    told = json.loads((tmp_path / "old" / "task_heads.json").read_text())
    for head in told["heads"].values():
        assert (head.pop("class_weights"), head.pop("threshold")) == (None, 0.5)
    (tmp_path / "old" / "task_heads.json").write_text(json.dumps(told))
    loaded = MultiTaskHeads.from_pretrained(tmp_path / "old")
    assert loaded.heads == HEADS
    assert torch.equal(logits(loaded, tasks="topic"), logits(model, tasks="topic"))
    with torch.no_grad():
        loaded.classifier.weight.zero_()
    loaded.load_heads(tmp_path / "old")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    told["heads"]["topic"]["threshold"] = 2.0
    (tmp_path / "old" / "task_heads.json").write_text(json.dumps(told))
    for read in (MultiTaskHeads.from_pretrained, loaded.load_heads):
        with pytest.raises(ValueError, match=r"`threshold`: got 2\.0"):
            read(tmp_path / "old")


def test_heads_over_a_16_bit_backbone_learn_in_32_bits(base):
    backbone = AutoModel.from_pretrained(base, dtype=torch.bfloat16)
    model = MultiTaskHeads(backbone, HEADS, pooling="mean", dropout=0.0)
    assert model.classifier.weight.dtype == torch.float32
    before = model.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=1e-5)
    model(**batch(), tasks="topic", labels=torch.tensor([[0.0], [1.0], [2.0]])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.classifier.weight[:3], before[:3])


WORKER = """
import importlib.util, json, sys
from pathlib import Path
import torch
from hf_curriculum.core.distributed import end_processes

tests, base, folder = sys.argv[1:]
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("tests", tests)
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
trainer = tests.trainer_of(tests.mixture(base), folder, save_strategy="no")
assert trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
trainer.train()
trainer.save_model(folder)
losses = tests.task_losses(trainer)
if trainer.is_world_process_zero():
    sys.stdout.write("LOSSES " + json.dumps(losses) + "\\n")
    sys.stdout.flush()
end_processes()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_heads_saved_under_zero_3_are_whole(base, tmp_path, launch):
    args = [__file__, str(base), str(tmp_path / "run")]
    text = launch(WORKER, 2, args=args, config="zero3.yaml", timeout=100).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("LOSSES ")]
    loaded = MultiTaskHeads.from_pretrained(tmp_path / "run")
    expected = json.loads(line.removeprefix("LOSSES "))
    assert task_losses(trainer_of(loaded, tmp_path / "again")) == pytest.approx(expected, rel=1e-4)
