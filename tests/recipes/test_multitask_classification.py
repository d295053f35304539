import importlib.util
import shutil
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from trl import ModelConfig, ScriptArguments, SFTConfig

from hf_curriculum.core.records import RunRecord
from hf_curriculum.demo.encoder import build_encoder, build_message_tokenizer
from hf_curriculum.demo.messages import generate_messages
from hf_curriculum.multitask.attention_fusion import AttentionFusionModel
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.task_head import TaskHead
from hf_curriculum.recipe import DataArguments, config_from_arguments, prefixed_arguments


@pytest.fixture(scope="module")
def recipe(repository):
    path = repository / "recipes" / "multitask_classification.py"
    spec = importlib.util.spec_from_file_location("multitask_classification", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["multitask_classification"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def configs(repository):
    return repository / "recipes" / "configs" / "multitask_classification"


CPU_RUN = ["--report_to", "none", "--disable_tqdm", "true", "--cpu_threads", "1", "--save_strategy", "no"]
SMALL = ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--max_length", "48", "--lora_r", "2"]
DEMO = ["--demo_rows", "64", "--demo_few_rows", "12", "--demo_held_out_rows", "6", "--demo_base_steps", "0"]
TASKS = ["intent", "mood", "tags", "topic"]


def parse(recipe, *args):
    *parsed, multitask = recipe.make_parser().parse_args_and_config(list(map(str, args)))
    return *parsed, config_from_arguments(MultiTaskConfig, "multitask_", multitask, task_column="task")


def run(recipe, *args):
    recipe.main(*parse(recipe, *CPU_RUN, *SMALL, *args))


def test_defaults_work_without_an_accelerator(recipe):
    _, training, _, data, labels, fusion, multitask = parse(recipe)
    assert multitask == MultiTaskConfig()
    assert (data.prompt_column, labels.label_column, fusion.fusion_stage, fusion.fusion_level) == (
        "text",
        "label",
        "both",
        "output",
    )
    if not torch.accelerator.is_available():
        assert training.use_cpu
        assert not training.bf16


def test_no_name_is_taken_twice(recipe):
    multitask = prefixed_arguments(MultiTaskConfig, "multitask_", without=("task_column",))
    groups = (ScriptArguments, SFTConfig, ModelConfig, DataArguments, recipe.LabelArguments, recipe.FusionArguments)
    names = [item.name for group in (*groups, multitask) for item in fields(group)]
    shared = {"trust_remote_code"}  # TRL's own, in two of its groups
    assert sorted({name for name in names if names.count(name) > 1} - shared) == []


def test_every_yaml_is_read(recipe, configs):
    files = sorted(configs.glob("*.yaml"))
    assert [file.stem for file in files] == ["decoder_zero3", "demo", "minilm"]
    for file in files:
        _, training, model_args, _, _, fusion, _ = parse(recipe, "--config", file)
        values = yaml.safe_load(file.read_text())
        assert model_args.lora_r == values["lora_r"]
        assert fusion.fusion_stage == values["fusion_stage"]
        assert training.output_dir == values["output_dir"]


def test_arguments_reach_the_model(recipe, tmp_path):
    args = "--lora_r 3 --lora_alpha 7 --lora_dropout 0.2 --lora_target_modules query --fusion_level layer"
    args += " --fusion_dim 6 --fusion_heads 3 --fusion_pooling cls --fusion_dropout 0.3"
    _, _, model_args, _, _, fusion, _ = parse(recipe, *args.split())
    base = build_encoder(build_message_tokenizer())
    model = recipe.build_model(base, {"a": TaskHead(2), "b": TaskHead(3)}, model_args, fusion)
    config = model.fusion_config
    assert (config.level, config.fusion_dim, config.num_attention_heads, config.pooling, config.dropout) == (
        "layer",
        6,
        3,
        "cls",
        0.3,
    )
    lora = config.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, set(lora.target_modules)) == (3, 7, 0.2, {"query"})
    assert model.stage == "tasks"


def test_loaded_tasks_are_named_by_words_or_a_mapping(recipe, tmp_path):
    found = [
        parse(recipe, "--fusion_load", "a=x/y", "b=org/z")[5].loads(),
        parse(recipe, "--fusion_load", "a=x/y,b=org/z")[5].loads(),
    ]
    (tmp_path / "c.yaml").write_text("fusion_load:\n  a: x/y\n  b: org/z\n")
    found.append(parse(recipe, "--config", tmp_path / "c.yaml")[5].loads())
    assert found == [{"a": "x/y", "b": "org/z"}] * 3
    with pytest.raises(ValueError, match="`fusion_load`: got ax"):
        parse(recipe, "--fusion_load", "ax")[5].loads()


def test_f1_of_classes_and_of_labels(recipe):
    assert recipe.class_f1(np.array([0, 1, 0]), np.array([0, 1, 1])) == pytest.approx(2 / 3)
    found, wanted = np.array([[1, 0], [0, 0], [1, 0]]), np.array([[1, 0], [0, 0], [1, 1]])
    assert recipe.class_f1(found, wanted) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["query"], {"query"}), (["query", "value"], {"query", "value"}), (["all-linear"], "all-linear")],
)
def test_adapted_linears_are_names(recipe, monkeypatch, words, expected):
    made = []
    monkeypatch.setattr(recipe, "AttentionFusionModel", lambda base, config: made.append(config.lora))
    _, _, model_args, _, _, fusion, _ = parse(recipe, "--lora_target_modules", *words)
    recipe.build_model(None, {"a": TaskHead(2)}, model_args, fusion)
    assert (made[0].target_modules, made[0].task_type) == (expected, None)


def test_lora_arguments_that_tasks_cannot_have_are_refused(recipe):
    _, _, model_args, _, _, fusion, _ = parse(recipe, "--lora_modules_to_save", "pooler")
    with pytest.raises(NotImplementedError, match="`modules_to_save` in lora"):
        recipe.build_model(build_encoder(build_message_tokenizer()), {"a": TaskHead(2)}, model_args, fusion)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fusion_stage", "third"], "`fusion_stage`: got third"),
        (["--fusion_cache", "true", "--fusion_level", "layer"], "`fusion_cache`: got true at level layer"),
        (["--fusion_prune_rows", "-1"], "`fusion_prune_rows`: got -1"),
        (["--demo_few_rows", "0"], "`demo_few_rows`: got 0"),
        (["--demo_rows", "20", "--demo_few_rows", "10"], "`demo_rows`: got 20"),
        (["--dataset_name", "x.jsonl"], "both, or neither"),
        (["--fusion_stage", "fusion"], "`fusion_from`: got None"),
        (["--fusion_stage", "fusion", "--fusion_from", "nowhere"], "`fusion_from`: got nowhere, without intent"),
        (["--fusion_load", "weather=x"], "`fusion_load`: got weather"),
        (["--multi_label_tasks", "mod"], r"`multi_label_tasks`: got \['mod'\]"),
        (["--multi_label_tasks", "topic"], r"got \['ask account'\]|of task tags"),
        (["--class_weights", "even"], "`class_weights`: got even"),
        (["--multi_label_threshold", "1.5"], "`threshold`: got 1.5"),
        (["--multitask_task_names", "intent", "mood", "tags", "topic", "spam"], "no label of task spam"),
        (["--multitask_task_names", "intent", "mood"], "`tasks`: got t"),
        (["--resume_from_checkpoint", "true"], "a complete checkpoint of the last run"),
        (["--resume_from_checkpoint", "elsewhere/checkpoint-3"], "`resume_from_checkpoint`: got elsewhere"),
    ],
)
def test_bad_arguments_are_named_before_training(recipe, tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, "--output_dir", tmp_path / "out", *DEMO, *args)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_both_stages_in_one_process_are_refused_under_deepspeed(recipe):
    _, training, *_, fusion, _ = parse(recipe, "--output_dir", "out")
    training.deepspeed_plugin = type("Plugin", (), {"zero_stage": 3})()
    with pytest.raises(
        NotImplementedError, match=r"--fusion_stage tasks.*--fusion_stage fusion --fusion_from out/tasks"
    ):
        recipe.check_stages(training, fusion, ["a"])
    fusion.fusion_stage, fusion.fusion_from, fusion.fusion_cache = "fusion", "x", True
    with pytest.raises(NotImplementedError, match="`--fusion_cache true` under ZeRO-3"):
        recipe.check_stages(training, fusion, ["a"])


def rows_of(**columns):
    values = {"text": ["a b", "c", "d", "e"], "task": ["x", "x", "y", "y"], "label": ["p", "q", "r", "s"], **columns}
    return Dataset.from_dict(values)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["p", None, "r", "s"]}, r"column label`: got None in row 1, of task x.*one label"),
        ({"label": ["p", " ", "r", "s"]}, "got ' ' in row 1, of task x"),
        ({"label": [0.5, float("nan"), 1.0, 2.0]}, "got nan in row 1, of task x"),
        ({"text": ["a", "", "c", "d"]}, "column text`: got '' in row 1"),
        ({"text": ["a", None, "c", "d"]}, "column text`: got None in row 1"),
        ({"label": [["p", "q"], ["q"], ["r"], ["s"]]}, "no error"),
        ({"task": ["x", "x", "y", None]}, "no task"),
    ],
)
def test_bad_rows_are_named(recipe, tmp_path, columns, message):
    rows_of(**columns).save_to_disk(tmp_path / "rows")
    args = ["--model_name_or_path", "m", "--dataset_name", tmp_path / "rows", "--eval_fraction", "0"]
    script, training, _, data, labels, _, multitask = parse(recipe, *args)
    if message == "no error":
        train, _, heads = recipe.read_splits(script, data, training, labels, multitask)
        assert [head.problem_type.split("_")[0] for head in heads.values()] == ["multi", "single"]
        assert train.labels == [["p", "q"], ["q"], "r", "s"]
        return
    with pytest.raises(ValueError, match=message):
        recipe.read_splits(script, data, training, labels, multitask)


@pytest.mark.slow
def test_demo_trains_both_stages_reports_and_saves(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):  # a second run in the same folder replaces the first
        run(recipe, "--output_dir", out, *DEMO)
    text = "".join(capsys.readouterr())
    for words in ("Stage tasks", "Stage fusion", "Held-out rows", "listens to", "k LoRAs", "Predictions", "Fusion: "):
        assert words in text
    model = AttentionFusionModel.from_pretrained(out / "fusion", base=build_encoder(build_message_tokenizer()))
    assert (list(model.heads), model.stage) == (TASKS, "fusion")
    assert model.heads["tags"].problem_type == "multi_label_classification"
    assert torch.allclose(model.mean_attention.sum(dim=1), torch.ones(4), atol=1e-4)
    folders = {path.parent.name for path in (out / "tasks").glob("*/adapter_config.json")}
    assert folders == {path.parent.name for path in (out / "fusion").glob("*/adapter_config.json")} == set(TASKS)
    (event,) = RunRecord(out / "fusion").read("fusion_attention")
    assert event["rows"] == [6] * 4
    drawn = {path.name for path in (out / "fusion" / "hf_curriculum").glob("*.png")}
    if importlib.util.find_spec("matplotlib") is not None:
        assert drawn == {"fusion_attention.png", *(f"fusion_attention_{task}.png" for task in TASKS)}
    assert (out / "fusion" / "pooled").is_dir()


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_stage_it_was_in(recipe, tmp_path, monkeypatch):
    steps = ["--output_dir", tmp_path / "out", *DEMO, "--save_strategy", "steps", "--save_steps", "3"]
    steps += ["--fusion_prune_rows", "0"]
    whole = ["--output_dir", tmp_path / "whole", *steps[2:]]
    run(recipe, *whole)

    class Kill(Exception):
        pass

    original = recipe.MultiTaskTrainer._save_checkpoint

    def kill_after(count):
        def save(self, *args, **kwargs):
            original(self, *args, **kwargs)
            if self.state.global_step == count:
                raise Kill

        monkeypatch.setattr(recipe.MultiTaskTrainer, "_save_checkpoint", save)

    kill_after(3)
    with pytest.raises(Kill):
        run(recipe, *steps)
    assert not (tmp_path / "out" / "fusion").exists()
    with pytest.raises(ValueError, match=r"tasks, which holds checkpoint-3 of an earlier run"):
        run(recipe, *steps)
    kill_after(-1)
    resumed = [*steps, "--resume_from_checkpoint", "true"]
    model = recipe.train_stage

    def stop_in_fusion(stage, *args):
        if stage == "fusion":
            kill_after(6)
        return model(stage, *args)

    monkeypatch.setattr(recipe, "train_stage", stop_in_fusion)
    with pytest.raises(Kill):
        run(recipe, *resumed)
    monkeypatch.setattr(recipe, "train_stage", model)
    kill_after(-1)
    # Nothing of the second stage is left of the first one's trainer: the cache alone may stay.
    shutil.rmtree(tmp_path / "out" / "fusion" / "pooled")
    run(recipe, *resumed)
    for name in (
        "fusion/fusion.safetensors",
        "fusion/task_heads.safetensors",
        "fusion/intent/adapter_model.safetensors",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("level", ["output", "layer"])
def test_stages_of_a_model_and_a_file_of_the_user_s(recipe, tmp_path, level):
    tokenizer = build_message_tokenizer()
    build_encoder(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = generate_messages(12).map(lambda row: {"label": "|".join(row["label"])})
    rows = rows.cast_column("label", rows.features["text"]).rename_columns(
        {"text": "message", "task": "about", "label": "classes"}
    )
    rows.to_json(tmp_path / "data.jsonl")
    args = ["--prompt_column", "message", "--task_column", "about", "--label_column", "classes"]
    args += ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.jsonl"]
    args += ["--multi_label_tasks", "tags", "--label_separator", "|", "--class_weights", "balanced"]
    args += ["--eval_fraction", "0.25", "--output_dir", tmp_path / "out", "--fusion_level", level]
    run(recipe, *args, "--fusion_stage", "tasks")
    load = ["--fusion_load", f"mood={tmp_path / 'out' / 'tasks' / 'mood'}"]
    run(recipe, *args, "--fusion_stage", "fusion", "--fusion_from", tmp_path / "out" / "tasks", *load)
    run(recipe, *args, "--fusion_stage", "joint")
    for stage in ("fusion", "joint"):
        model = AttentionFusionModel.from_pretrained(tmp_path / "out" / stage)
        assert (model.stage, model.level, list(model.heads)) == (stage, level, TASKS)
        assert model.heads["topic"].class_weights is not None
        found = model.predict(["Please cancel the parcel."], processing_class=tokenizer)[0]
        assert set(found["tags"].attention) == set(TASKS)
    assert (tmp_path / "out" / "fusion" / "pooled").exists() == (level == "output")
    for name in ("adapter_model.safetensors", "task_heads.safetensors"):
        pair = [tmp_path / "out" / stage / "mood" / name for stage in ("tasks", "fusion")]
        assert pair[0].read_bytes() == pair[1].read_bytes(), "the task models stay what they are"


def test_what_is_pushed_is_the_model_alone(recipe, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, **kwargs):
            calls.append((name, kwargs))
            return type("Repository", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, **kwargs):
            calls.append(kwargs)

    monkeypatch.setattr(recipe, "HfApi", Api)
    _, training, *_ = parse(recipe, "--output_dir", tmp_path / "runs" / "x", "--hub_token", "secret")
    recipe.push(str(tmp_path / "runs" / "x" / "fusion"), training)
    assert calls[0] == "secret"
    assert calls[1] == ("x", {"private": None, "exist_ok": True})
    assert calls[2]["repo_id"] == "me/x"
    from huggingface_hub.utils import filter_repo_objects

    kept = ["fusion.safetensors", "intent/adapter_model.safetensors", "README.md", "fusion_config.json"]
    left = ["checkpoint-3/x.bin", "pooled/pooled-1/pooled.npy", "hf_curriculum/record.jsonl", "training_args.bin"]
    assert list(filter_repo_objects(kept + left, ignore_patterns=calls[2]["ignore_patterns"])) == kept


TWO_PROCESSES = """
import importlib.util, sys
from hf_curriculum.core.distributed import end_processes
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.recipe import config_from_arguments

spec = importlib.util.spec_from_file_location("recipe", sys.argv[1])
recipe = importlib.util.module_from_spec(spec)
sys.modules["recipe"] = recipe
spec.loader.exec_module(recipe)
*parsed, multitask = recipe.make_parser().parse_args_and_config(sys.argv[2:])
recipe.main(*parsed, config_from_arguments(MultiTaskConfig, "multitask_", multitask, task_column="task"))
end_processes()
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_two_processes_train_report_and_save(launch, repository, tmp_path, backend):
    path = repository / "recipes" / "multitask_classification.py"
    common = [str(path), *CPU_RUN, *SMALL, *DEMO, "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    if backend == "ddp":
        text = launch(TWO_PROCESSES, 2, args=common).stdout
    else:
        launch(TWO_PROCESSES, 2, args=[*common, "--fusion_stage", "tasks"], config="zero3.yaml")
        second = ["--fusion_stage", "fusion", "--fusion_from", "out/tasks"]
        text = launch(TWO_PROCESSES, 2, args=[*common, *second], config="zero3.yaml").stdout
    assert text.count("Predictions, and whom they listened to") == 1
    model = AttentionFusionModel.from_pretrained("out/fusion", base=build_encoder(build_message_tokenizer()))
    assert model.stage == "fusion"
    assert model.fusion.output.abs().max() > 0
