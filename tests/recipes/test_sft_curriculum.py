import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from trl import ModelConfig, ScriptArguments, SFTConfig

from hf_curriculum import CurriculumConfig, DistillationConfig
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.recipe import (
    DataArguments,
    command_line,
    config_from_arguments,
    prefixed_arguments,
)
from hf_curriculum.recipe_data import hold_out, load_splits, to_prompt_completion


@pytest.fixture(scope="module")
def recipe(repository):
    spec = importlib.util.spec_from_file_location("sft_curriculum", repository / "recipes" / "sft_curriculum.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sft_curriculum"] = module
    spec.loader.exec_module(module)
    return module


def parse(recipe, *args):
    *parsed, curriculum, distillation = recipe.make_parser().parse_args_and_config(list(map(str, args)))
    return (
        parsed,
        config_from_arguments(CurriculumConfig, "curriculum_", curriculum),
        config_from_arguments(DistillationConfig, "distillation_", distillation),
    )


CPU_RUN = ["--report_to", "none", "--disable_tqdm", "true", "--cpu_threads", "1"]


def test_defaults_work_without_an_accelerator(recipe):
    (_, training, *_), config, distillation = parse(recipe)
    assert config == CurriculumConfig()
    assert not distillation.enabled
    if not torch.accelerator.is_available():
        assert training.use_cpu
        assert not training.bf16
        assert not training.gradient_checkpointing


def test_every_curriculum_field_reaches_the_config(recipe):
    values = {
        "scorer": "loss", "difficulty_column": "d", "loss_normalization": "sample", "probe": "full",
        "probe_rounds": 5, "probe_epochs": 0.5, "probe_learning_rate": 0.25, "probe_batch_size": 3,
        "spl_weights": "hard", "lambda_start": 0.5, "num_levels": 4, "level_method": "thresholds",
        "level_thresholds": [0.1, 0.2, 0.3], "pacing": "reverse", "replay_fraction": 0.5, "group_by_length": True,
        "eval_levels": False, "score_batch_tokens": 99, "cache_dir": "x", "use_cache": False,
    }  # fmt: skip
    assert set(values) >= {item.name for item in fields(CurriculumConfig)}
    defaults = CurriculumConfig()
    args = []
    for name, value in values.items():
        if not hasattr(defaults, name):
            continue
        args += [f"--curriculum_{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    _, config, _ = parse(recipe, *args)
    assert all(getattr(config, item.name) == values[item.name] for item in fields(CurriculumConfig))


def test_every_distillation_field_reaches_the_config(recipe):
    settings = [
        {"teacher": "ema", "alpha": [0.1, 0.2], "temperature": [1.0, 3.0], "ema_decay": 0.5, "distill_on": "replay"},
        {"teacher": "org/model", "divergence": "jsd", "beta": 0.3, "offload_teacher": True, "temperature": 3.0},
        {"teacher": "base", "teacher_cache": "top_k", "cache_top_k": 7, "alpha": 0.25},
    ]
    assert {name for values in settings for name in values} == {item.name for item in fields(DistillationConfig)}
    for values in settings:
        args = []
        for name, value in values.items():
            args += [f"--distillation_{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        assert parse(recipe, *args)[2] == DistillationConfig(**values)


def test_no_name_clashes_with_trl(recipe):
    ours = [item.name for cls in (DataArguments, recipe.RunArguments) for item in fields(cls)]
    ours += [item.name for item in fields(prefixed_arguments(CurriculumConfig, "curriculum_"))]
    ours += [item.name for item in fields(prefixed_arguments(DistillationConfig, "distillation_"))]
    theirs = {item.name for cls in (ScriptArguments, SFTConfig, ModelConfig) for item in fields(cls)}
    assert len(ours) == len(set(ours))
    assert not theirs & set(ours)


def test_command_line_wins_over_yaml_and_unknown_keys_are_fatal(recipe, tmp_path):
    (tmp_path / "a.yaml").write_text("curriculum_num_levels: 5\nlearning_rate: 0.5\n")
    (_, training, *_), config, _ = parse(recipe, "--config", tmp_path / "a.yaml", "--curriculum_num_levels", 7)
    assert config.num_levels == 7
    assert training.learning_rate == 0.5
    (tmp_path / "b.yaml").write_text("curriculum_levels: 5\n")
    with pytest.raises(ValueError, match="curriculum_levels"):
        parse(recipe, "--config", tmp_path / "b.yaml")
    with pytest.raises(ValueError, match="curriculum_paceing"):
        parse(recipe, "--curriculum_paceing", "staged")


def test_every_yaml_parses(recipe, repository):
    found = sorted((repository / "recipes" / "configs" / "sft_curriculum").glob("*.yaml"))
    assert {path.name for path in found} >= {"demo.yaml", "gsm8k_lora.yaml", "gsm8k_full_zero3.yaml"}
    for path in found:
        parse(recipe, "--config", path)


def test_help_prints(recipe):
    text = recipe.make_parser().format_help()
    assert "--curriculum_pacing" in text
    assert "--prompt_separator" in text


@pytest.fixture
def rows():
    return Dataset.from_list([{"question": f"What is {i}?", "answer": f"It is {i}.", "extra": i} for i in range(20)])


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "saved splits", "folder"])
def test_rows_come_from_anywhere(rows, tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    if kind in ("jsonl", "json"):
        rows.to_json(path)
    elif kind in ("csv", "parquet"):
        getattr(rows, f"to_{kind}")(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    elif kind == "saved splits":
        rows.train_test_split(0.25, shuffle=False).save_to_disk(path)
    else:
        path.mkdir()
        rows.to_json(path / "train.jsonl")
        rows.to_json(path / "test.jsonl")
    train, test = load_splits(ScriptArguments(dataset_name=str(path)))
    assert train[3] == rows[3]
    sizes = {"saved splits": (15, 5), "folder": (20, 20)}
    assert (len(train), test and len(test)) == sizes.get(kind, (20, None))


def test_split_slices_work(rows, tmp_path):
    rows.to_json(tmp_path / "data.jsonl")
    arguments = ScriptArguments(dataset_name=str(tmp_path / "data.jsonl"), dataset_train_split="train[:5]")
    assert len(load_splits(arguments)[0]) == 5


@pytest.mark.parametrize(
    ("name", "told"),
    [("./nowhere.jsonl", "a file or folder that exists"), ("data.txt", "a file ending in"), ("nowhere.csv", "exists")],
)
def test_data_that_is_not_there_is_told(tmp_path, name, told):
    (tmp_path / "data.txt").write_text("x")
    with pytest.raises(ValueError, match=f"Invalid `dataset_name`: got {re.escape(name)}.*{told}"):
        load_splits(ScriptArguments(dataset_name=name))


def test_config_is_known_with_an_equals_sign():
    demo = Path("demo.yaml")
    assert command_line(["--config=a=b.yaml", "--lr=1"], demo) == ["--config", "a=b.yaml", "--lr=1"]
    assert command_line(["--dataset-name=x"], demo) == ["--dataset-name=x"]
    assert command_line(["--lr=1"], demo) == ["--config", "demo.yaml", "--lr=1"]


@pytest.mark.parametrize(
    ("args", "told"),
    [(["--model_name_or_path", "x"], "both, or neither"), (["--dataset_name", "x"], "both, or neither")],
)
def test_model_and_data_are_named_together(recipe, args, told):
    with pytest.raises(ValueError, match=told):
        run(recipe, *args)


def test_empty_file_and_greedy_hold_out_are_told(rows, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl, which is empty"):
        load_splits(ScriptArguments(dataset_name=str(tmp_path / "empty.jsonl")))
    with pytest.raises(ValueError, match="Invalid `eval_fraction`"):
        hold_out(rows, 0.99, seed=0)


def test_slice_of_a_saved_data_set_is_refused(rows, tmp_path):
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="a saved data set has no splits"):
        load_splits(ScriptArguments(dataset_name=str(tmp_path / "saved"), dataset_train_split="train[:5]"))


def test_streaming_is_refused(rows, tmp_path):
    rows.to_json(tmp_path / "data.jsonl")
    with pytest.raises(NotImplementedError, match="`dataset_streaming` is not supported"):
        load_splits(ScriptArguments(dataset_name=str(tmp_path / "data.jsonl"), dataset_streaming=True))


def test_missing_saved_split_is_told(rows, tmp_path):
    rows.train_test_split(0.5).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="one of the saved splits: train, test"):
        load_splits(ScriptArguments(dataset_name=str(tmp_path / "saved"), dataset_train_split="valid"))


def test_held_out_rows_are_seeded_and_apart(rows):
    train, test = hold_out(rows, 0.25, seed=1)
    assert sorted(train["extra"][:] + test["extra"][:]) == list(range(20))
    assert len(test) == 5
    assert hold_out(rows, 0.25, seed=1)[1]["extra"][:] == test["extra"][:]
    assert hold_out(rows, 0.25, seed=2)[1]["extra"][:] != test["extra"][:]
    assert hold_out(rows, 0.0, seed=1)[1] is None


def test_prompts_are_joined_or_become_messages(rows):
    tokenizer = build_tokenizer()
    data = DataArguments(prompt_column="question", completion_column="answer", prompt_separator="\\n->")
    plain = to_prompt_completion(rows, data, tokenizer)
    assert plain[2] == {"extra": 2, "prompt": "What is 2?\n->", "completion": "It is 2."}
    tokenizer.chat_template = "{{ messages }}"
    chat = to_prompt_completion(rows, data, tokenizer)
    assert chat[2]["prompt"] == [{"role": "user", "content": "What is 2?"}]
    assert chat[2]["completion"] == [{"role": "assistant", "content": "It is 2."}]
    again = to_prompt_completion(chat, DataArguments(), tokenizer)
    assert again[2] == chat[2]
    with pytest.raises(ValueError, match="columns of the data set, which has question, answer, extra"):
        to_prompt_completion(rows, DataArguments(), tokenizer)


@pytest.fixture
def model_folder(tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(recipe, *args):
    parsed, curriculum, distillation = parse(recipe, *CPU_RUN, *args)
    recipe.main(*parsed, curriculum, distillation)


def test_local_model_and_file_train_and_save(recipe, model_folder, tmp_path, capsys):
    generate_corpus(40).to_json(tmp_path / "data.jsonl")
    common = ["--model_name_or_path", model_folder, "--dataset_name", tmp_path / "data.jsonl"]
    common += ["--num_train_epochs", 1, "--per_device_train_batch_size", 6, "--output_dir", tmp_path / "out"]
    run(recipe, *common, "--curriculum_scorer", "length", "--save_steps", 2, "--use_peft", "true", "--lora_r", 2)
    text = "".join(capsys.readouterr())
    assert "after stage 2" in text
    assert f"Model saved to {tmp_path / 'out'}" in text
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="which holds checkpoint-6 of an earlier run"):
        run(recipe, *common, "--curriculum_scorer", "length")
    run(
        recipe, *common, "--curriculum_scorer", "length", "--use_peft", "true", "--lora_r", 2,
        "--resume_from_checkpoint", "true",
    )  # fmt: skip


def test_comparison_needs_a_teacher_and_a_run_from_the_start(recipe, tmp_path):
    with pytest.raises(ValueError, match="False without a teacher"):
        run(recipe, "--distillation_compare", "true", "--output_dir", tmp_path)
    teacher = ["--distillation_compare", "true", "--distillation_teacher", "base", "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="False in a resumed run"):
        run(recipe, *teacher, "--resume_from_checkpoint", "true")


def test_score_only_then_train_on_the_column(recipe, model_folder, tmp_path):
    rows = generate_corpus(40).rename_columns({"prompt": "question", "completion": "answer"})
    rows.to_json(tmp_path / "data.jsonl")
    columns = ["--prompt_column", "question", "--completion_column", "answer", "--output_dir", tmp_path / "out"]
    common = [*columns, "--model_name_or_path", model_folder, "--num_train_epochs", 1]
    common += ["--per_device_train_batch_size", 6]
    scoring = ["--dataset_name", tmp_path / "data.jsonl", "--curriculum_scorer", "loss", "--curriculum_use_cache", "0"]
    run(recipe, *common, *scoring, "--curriculum_score_only", "true")
    scored = load_from_disk(tmp_path / "out" / "scored")
    assert {name: len(split) for name, split in scored.items()} == {"train": 36, "test": 4}
    assert set(scored["train"].column_names) == {*rows.column_names, "sample_id", "difficulty"}
    assert set(scored["train"]["question"]) <= set(rows["question"])
    run(recipe, *common, "--dataset_name", tmp_path / "out" / "scored", "--curriculum_scorer", "column")
    direct = tmp_path / "direct"
    run(recipe, *common, *scoring, "--output_dir", direct)
    records = [
        [json.loads(line) for line in (folder / "hf_curriculum" / "record.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "out", direct)
    ]
    matrices = [
        np.array([line["metrics"]["loss"] for line in record if line["event"] == "stage_end"], dtype=float)
        for record in records
    ]
    np.testing.assert_allclose(matrices[0], matrices[1], rtol=1e-6)


@pytest.mark.slow
def test_demo_runs_end_to_end(recipe, tmp_path, capsys):
    args = [
        "--config",
        recipe.DEMO_CONFIG,
        "--demo_rows",
        240,
        "--num_train_epochs",
        1,
        "--output_dir",
        tmp_path / "o",
    ]
    run(recipe, *args)
    text = "".join(capsys.readouterr())
    expected = ("Levels against the known grade: Spearman", "BWT", "Model saved to", "global batch 32")
    for words in (*expected, "what the teacher changed", "without teacher", "with teacher", "The teacher `previous_"):
        assert words in text
    assert (tmp_path / "o" / "_without_teacher" / "hf_curriculum" / "record.jsonl").is_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    AutoTokenizer.from_pretrained(tmp_path / "o")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_runs_under_deepspeed_where_nothing_is_compared(launch, repository, tmp_path):
    args = [
        "--config", repository / "recipes" / "configs" / "sft_curriculum" / "demo.yaml", "--demo_rows", 60,
        "--num_train_epochs", 1, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "o",
        "--curriculum_scorer", "length", "--cpu_threads", 1, "--report_to", "none",
    ]  # fmt: skip
    ended = launch(repository / "recipes" / "sft_curriculum.py", 2, config="zero2.yaml", args=list(map(str, args)))
    assert "First without the teacher" not in ended.stdout
    assert (tmp_path / "o" / "model.safetensors").is_file()
