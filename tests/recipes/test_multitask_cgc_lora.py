import importlib.util
import json
import sys
from dataclasses import fields

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig

from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.demo.tasks import generate_tasks
from hf_curriculum.multitask.cgc_lora.config import CGCLoraConfig
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.heads import MultiTaskHeads
from hf_curriculum.recipe import DataArguments, command_line, config_from_arguments, prefixed_arguments


@pytest.fixture(scope="module")
def recipe(repository):
    path = repository / "recipes" / "multitask_cgc_lora.py"
    spec = importlib.util.spec_from_file_location("multitask_cgc_lora", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["multitask_cgc_lora"] = module
    spec.loader.exec_module(module)
    return module


CPU_RUN = ["--report_to", "none", "--disable_tqdm", "true", "--cpu_threads", "1", "--save_strategy", "no"]
SMALL = ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--max_length", "48", "--cgc_r", "2"]


def parse(recipe, *args):
    *parsed, run, cgc, multitask = recipe.make_parser().parse_args_and_config(list(map(str, args)))
    config = config_from_arguments(MultiTaskConfig, "multitask_", multitask, task_column=run.task_column)
    return *parsed, run, cgc, config


def run(recipe, *args):
    recipe.main(*parse(recipe, *args))


def test_defaults_work_without_an_accelerator(recipe):
    _, training, _, _, run_arguments, _, multitask = parse(recipe)
    assert multitask == MultiTaskConfig()
    assert run_arguments.objective == "sft"
    if not torch.accelerator.is_available():
        assert training.use_cpu
        assert not training.bf16


def test_no_name_is_taken_twice(recipe):
    multitask = prefixed_arguments(MultiTaskConfig, "multitask_", without=("task_column",))
    groups = (ScriptArguments, SFTConfig, ModelConfig, DataArguments, recipe.RunArguments, recipe.CGCArguments)
    names = [item.name for group in (*groups, multitask) for item in fields(group)]
    shared = {"trust_remote_code"}  # TRL's own, in two of its groups
    assert sorted({name for name in names if names.count(name) > 1} - shared) == []


def test_arguments_reach_the_configs(recipe):
    values = {"names": ["a", "b"], "sampling": "temperature", "temperature": 3.0, "batches": "homogeneous"}
    args = ["--task_column", "domain", "--multitask_unknown_task", "common", "--multitask_log_task_losses", "false"]
    args += ["--multitask_task_names", "a", "b", "--multitask_sampling", "temperature"]
    args += ["--multitask_temperature", "3.0", "--multitask_batches", "homogeneous"]
    *_, multitask = parse(recipe, *args)
    assert multitask == MultiTaskConfig(
        "domain", values["names"], "common", values["sampling"], values["temperature"], values["batches"], False
    )
    args = "--cgc_num_common_experts 3 --cgc_num_task_experts 2 --cgc_r 6 --cgc_lora_alpha 7 --cgc_lora_dropout 0.1"
    args += " --cgc_target_modules all-linear --cgc_gate task_embedding --cgc_gate_normalization sum_to_n"
    _, _, model_args, _, _, cgc, _ = parse(recipe, *args.split())
    config = recipe.adapter_config(cgc, model_args, ["a", "b"], "common", "CAUSAL_LM")
    assert isinstance(config, CGCLoraConfig)
    found = [config.num_common_experts, config.num_task_experts, config.r, config.lora_alpha, config.lora_dropout]
    assert found == [3, 2, 6, 7.0, 0.1]
    assert (config.target_modules, config.gate, config.unknown_task) == ("all-linear", "task_embedding", "common")
    _, _, shared, *_ = parse(recipe, "--use_peft", "true")
    assert recipe.adapter_config(cgc, shared, ["a"], None, "CAUSAL_LM").peft_type == "LORA"


def test_every_yaml_is_read(recipe, repository):
    files = sorted((repository / "recipes" / "configs" / "multitask_cgc_lora").glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        *_, run_arguments, cgc, multitask = parse(recipe, "--config", file)
        values = yaml.safe_load(file.read_text())
        assert cgc.cgc_r == values["cgc_r"]
        assert run_arguments.objective == values.get("objective", "sft")
        assert multitask.sampling == values.get("multitask_sampling", "proportional")


def test_the_demo_s_config_is_taken_where_no_data_is_named(recipe):
    def words(*given):
        return command_line(given, recipe.demo_config(given))

    assert words("--demo_rows", "8")[1].endswith("demo.yaml")
    assert words("--objective", "classification")[1].endswith("demo_classification.yaml")
    assert words("--objective=classification")[1].endswith("demo_classification.yaml")
    for named in (["--config", "x.yaml"], ["--dataset_name=x", "--objective", "classification"]):
        assert words(*named) == named
    assert words("--config=x.yaml") == ["--config", "x.yaml"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--objective", "ranking"], "`objective`: got ranking"),
        (["--demo_base_steps", "-1"], "`demo_base_steps`: got -1"),
        (["--dataset_name", "x.jsonl"], "both, or neither"),
        (["--task_column", "domain", "--demo_rows", "8"], "`task_column`: got domain"),
        (["--multitask_sampling", "odd"], "`sampling`: got odd"),
    ],
)
def test_bad_arguments_are_named(recipe, tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, *CPU_RUN, "--output_dir", tmp_path / "out", *args)


@pytest.mark.slow
def test_sft_demo_trains_reports_and_exports(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):  # a second run in the same folder replaces the first
        run(recipe, *CPU_RUN, *SMALL, "--output_dir", out, "--demo_rows", 48, "--demo_base_steps", 2)
    text = "".join(capsys.readouterr())
    for words in ("Evaluation loss of each task", "Gates, mean over the layers", "One plain LoRA per task", "reverse"):
        assert words in text
    events = [json.loads(line)["event"] for line in (out / "hf_curriculum" / "record.jsonl").read_text().splitlines()]
    assert {"run", "tasks", "gates", "task_losses"} <= set(events)
    assert (out / "hf_curriculum" / "gates.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    exported = {path.parent.name for path in (out / "task_adapters").glob("*/adapter_config.json")}
    assert exported == {"reverse", "last", "kind", "parity", "common"}


@pytest.mark.slow
def test_a_model_and_a_file_of_the_user_s_are_trained_and_exported(recipe, tmp_path):
    from peft import PeftModel

    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = generate_tasks(40).rename_columns({"prompt": "question", "completion": "answer", "task": "domain"})
    rows.to_json(tmp_path / "data.jsonl")
    args = ["--prompt_column", "question", "--completion_column", "answer", "--task_column", "domain"]
    args += ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.jsonl"]
    run(recipe, *CPU_RUN, *SMALL, *args, "--output_dir", tmp_path / "out", "--multitask_sampling", "uniform")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "task_adapters" / "last")
    assert model.peft_config["default"].peft_type == "LORA"


@pytest.mark.slow
def test_classification_demo_has_a_head_per_task(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--objective", "classification", "--classification_pooling", "last", "--demo_rows", 96]
    run(recipe, *CPU_RUN, *SMALL, *args, "--demo_base_steps", 2, "--output_dir", out)
    text = "".join(capsys.readouterr())
    assert "macro-F1" in text
    assert {path.parent.name for path in (out / "task_adapters").glob("*/adapter_config.json")} == {
        "last",
        "kind",
        "parity",
        "common",
    }
    assert {path.parent.name for path in (out / "task_adapters").glob("*/task_heads.json")} == {
        "last",
        "kind",
        "parity",
    }
    with pytest.raises(ValueError, match="an adapter alone"):
        MultiTaskHeads.from_pretrained(out)
