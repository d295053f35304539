import importlib.util
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from trl import ModelConfig, ScriptArguments, SFTConfig

from hf_curriculum import LayerwiseConfig
from hf_curriculum.core.records import RunRecord
from hf_curriculum.demo.base import arithmetic_beginner
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.recipe import DataArguments, config_from_arguments, prefixed_arguments


@pytest.fixture(scope="module")
def recipe(repository):
    spec = importlib.util.spec_from_file_location("sft_layerwise", repository / "recipes" / "sft_layerwise.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sft_layerwise"] = module
    spec.loader.exec_module(module)
    return module


def parse(recipe, *args):
    *parsed, layerwise = recipe.make_parser().parse_args_and_config(list(map(str, args)))
    return parsed, config_from_arguments(LayerwiseConfig, "layerwise_", layerwise)


EVALUATED = ["--eval_strategy", "epoch", "--eval_on_start", "true"]
CPU_RUN = ["--report_to", "none", "--disable_tqdm", "true", "--cpu_threads", "1"]


def run(recipe, *args):
    parsed, layerwise = parse(recipe, *CPU_RUN, *args)
    recipe.main(*parsed, layerwise)


def test_defaults_work_without_an_accelerator(recipe):
    (_, training, *_), config = parse(recipe)
    assert config == LayerwiseConfig()
    if not torch.accelerator.is_available():
        assert training.use_cpu
        assert not training.bf16
        assert not training.gradient_checkpointing


def test_every_field_reaches_the_config(recipe):
    settings = [
        {
            "policy": "adaptive", "active_fraction": 0.5, "interval_steps": 7, "warmup_steps": 9, "max_depth": 0.75,
            "smoothing": 0.25, "normalize_rates": False, "exploration": 0.5, "aging": 0.125, "ramp_steps": 3,
            "always_train": ["lm_head", "norm"], "block_modules": ["a.b"], "free_prefix": False, "verify": False,
            "seed": 11,
        },
        {"policy": "cyclic", "order": "ascending"},
        {"policy": "fixed", "blocks": ["layers.1", "layers.2"]},
    ]  # fmt: skip
    assert {name for values in settings for name in values} == {item.name for item in fields(LayerwiseConfig)}
    for values in settings:
        args = []
        for name, value in values.items():
            args += [f"--layerwise_{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        assert parse(recipe, *args)[1] == LayerwiseConfig(**values)


def test_no_name_clashes_with_trl(recipe):
    ours = [item.name for cls in (DataArguments, recipe.RunArguments) for item in fields(cls)]
    ours += [item.name for item in fields(prefixed_arguments(LayerwiseConfig, "layerwise_"))]
    theirs = {item.name for cls in (ScriptArguments, SFTConfig, ModelConfig) for item in fields(cls)}
    assert len(ours) == len(set(ours))
    assert not theirs & set(ours)


def test_unknown_keys_and_bad_values_are_fatal(recipe, tmp_path):
    (tmp_path / "a.yaml").write_text("layerwise_fraction: 0.5\n")
    with pytest.raises(ValueError, match="layerwise_fraction"):
        parse(recipe, "--config", tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"Invalid `active_fraction`: got 1\.5"):
        parse(recipe, "--layerwise_active_fraction", 1.5)
    with pytest.raises(ValueError, match="Invalid `demo_base_steps`: got -1"):
        parse(recipe, "--demo_base_steps", -1)


def test_every_yaml_parses(recipe, repository):
    found = sorted((repository / "recipes" / "configs" / "sft_layerwise").glob("*.yaml"))
    assert [path.name for path in found] == ["demo.yaml", "gsm8k_full.yaml", "gsm8k_full_zero3.yaml"]
    for path in found:
        assert parse(recipe, "--config", path)[1].active_fraction == 0.25


@pytest.mark.parametrize("named", ["--model_name_or_path", "--dataset_name"])
def test_model_and_data_are_named_together(recipe, named):
    with pytest.raises(ValueError, match="both, or neither"):
        run(recipe, named, "x")


def test_comparison_needs_evaluations_and_a_run_from_the_start(recipe, tmp_path):
    compare = ["--layerwise_compare", "true", "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="False without evaluations before and after training"):
        run(recipe, *compare, "--eval_strategy", "epoch")
    with pytest.raises(ValueError, match="False in a resumed run"):
        run(recipe, *compare, *EVALUATED, "--resume_from_checkpoint", "true")


@pytest.mark.parametrize(
    ("named", "asked", "more", "expected"),
    [
        (False, None, EVALUATED, True), (True, None, EVALUATED, False), (True, True, EVALUATED, True),
        (False, False, EVALUATED, False), (False, None, [], False),
    ],
)  # fmt: skip
def test_demo_is_compared_where_it_can_be(recipe, named, asked, more, expected):
    more = [*more, *(["--dataset_name", "x"] if named else [])]
    more += [] if asked is None else ["--layerwise_compare", asked]
    (script, training, _, _, run_arguments), _ = parse(recipe, *more)
    assert recipe.is_compared(script, training, run_arguments) == expected


def test_beginner_is_seeded_and_knows_easy_problems():
    first, tokenizer = arithmetic_beginner(2)
    second, _ = arithmetic_beginner(2)
    untrained, _ = arithmetic_beginner(0)
    weights = [model.state_dict() for model in (first, second, untrained)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["model.norm.weight"], weights[2]["model.norm.weight"])
    assert first.config.vocab_size == len(tokenizer)
    with pytest.raises(ValueError, match="Invalid `num_steps`: got -1"):
        arithmetic_beginner(-1)


@pytest.fixture
def common(tmp_path):
    """A local model and file, and a run of 6 steps in windows of 2."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = generate_corpus(40).rename_columns({"prompt": "question", "completion": "answer"})
    rows.to_json(tmp_path / "data.jsonl")
    return [
        "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.jsonl",
        "--prompt_column", "question", "--completion_column", "answer", "--per_device_train_batch_size", 6,
        "--num_train_epochs", 1, "--learning_rate", 1e-3, "--layerwise_interval_steps", 2,
    ]  # fmt: skip


def test_local_model_and_file_train_report_and_save(recipe, common, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    # One step without a learning rate comes first: what is frozen is checked at the first step that moves anything.
    run(recipe, *common, "--layerwise_policy", "random", "--warmup_steps", 1, "--output_dir", tmp_path / "out")
    text = "".join(capsys.readouterr())
    assert "Which blocks learned: policy random, 3 decisions" in text
    assert 'LayerFreezeCallback(policy="fixed", active_fraction=0.25, blocks=["model.layers.' in text
    assert f"Model saved to {tmp_path / 'out'}" in text
    assert (tmp_path / "out" / "hf_curriculum" / "layers.png").stat().st_size > 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    moved = {name.split(".")[2] for name in after if not torch.equal(before[name], after[name])}
    lines = RunRecord(tmp_path / "out").read("layers")
    assert moved == {str(block) for line in lines for block in line["active"]}
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_resumed_adapters_equal_those_of_an_unbroken_run(recipe, common, tmp_path, capsys):
    lora = [*common, "--use_peft", "true", "--lora_r", 2, "--lora_target_modules", "all-linear", "--save_steps", 3]
    lora += ["--layerwise_policy", "adaptive", "--layerwise_warmup_steps", 4]
    for name in ("whole", "broken"):
        run(recipe, *lora, "--output_dir", tmp_path / name)
    checkpoint = tmp_path / "broken" / "checkpoint-3"
    with pytest.raises(ValueError, match="of an earlier run"):
        run(recipe, *lora, "--output_dir", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    run(recipe, *lora, "--output_dir", tmp_path / "broken", "--resume_from_checkpoint", checkpoint)
    whole, broken = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    records = [RunRecord(tmp_path / name).read("layers") for name in ("whole", "broken")]
    assert records[0] == records[1]


@pytest.mark.slow
def test_demo_runs_end_to_end(recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    small = [
        "--demo_rows",
        400,
        "--demo_base_steps",
        5,
        "--layerwise_warmup_steps",
        4,
        "--layerwise_interval_steps",
        3,
    ]
    run(recipe, "--config", recipe.DEMO_CONFIG, *small, "--output_dir", tmp_path / "o")
    text = "".join(capsys.readouterr())
    expected = (
        "to solve easy problems, 5 steps",
        "nothing frozen",
        "policy adaptive, 25% of the layers",
        "model.layers.3",
    )
    for words in (*expected, "Evaluation loss", "layers_to_transform", "Heat-map", "Model saved to"):
        assert words in text
    assert RunRecord(tmp_path / "o" / "nothing_frozen").read("layers") == []
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    AutoTokenizer.from_pretrained(tmp_path / "o")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["ddp_cpu.yaml", "zero2.yaml", "zero3.yaml"])
def test_two_processes_train_report_and_save(launch, repository, tmp_path, config):
    args = [
        "--config", repository / "recipes" / "configs" / "sft_layerwise" / "demo.yaml", "--demo_rows", 100,
        "--demo_base_steps", 2, "--layerwise_warmup_steps", 4, "--layerwise_interval_steps", 2, "--max_steps", 8,
        "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "o", *CPU_RUN,
    ]  # fmt: skip
    ended = launch(repository / "recipes" / "sft_layerwise.py", 2, config=config, args=list(map(str, args)))
    assert "2 process(es) on cpu" in ended.stdout
    assert ended.stdout.count("Which blocks learned: policy adaptive, 2 decisions") == 1
    assert ended.stdout.count("Evaluation loss, first and last") == 1
    assert ("Now layer by layer" in ended.stdout) == (config == "ddp_cpu.yaml")
    assert (tmp_path / "o" / "model.safetensors").is_file()
