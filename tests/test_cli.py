import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_curriculum import __version__, cli
from hf_curriculum.commands import attention as attention_command
from hf_curriculum.commands import export as export_command
from hf_curriculum.core.records import RunRecord
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, a tuned one, an adapter, and a data set, saved as a user would have them."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    base = build_model(tokenizer)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    build_model(tokenizer, seed=1).save_pretrained(root / "tuned")
    torch.manual_seed(0)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(root / "adapter")
    generate_corpus(8).to_json(root / "rows.jsonl")
    generate_corpus(8).select([]).to_json(root / "empty.jsonl")
    (root / "words.txt").write_text("the\nof\n")
    return root


def attention(folders, *more, tuned="tuned", dataset="rows.jsonl"):
    return cli.main(
        ["attention", str(folders / "base"), str(folders / tuned), "--dataset", str(folders / dataset),
         "--template", "{prompt} {completion}", "--max_texts", "4", "--output_dir", "out", *more]
    )  # fmt: skip


def test_tuned_model_is_compared_in_tables_pictures_and_data(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert attention(folders, "--causal_check") == 0
    output = capsys.readouterr()
    shown = output.out + output.err
    assert "base -> tuned (4 texts" in shown
    assert "More attention on content words after tuning? mass_content" in shown
    assert "hiding the most attended tenth" in shown
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    pictures = [
        f"{stem}.{kind}" for stem in ("categories", "entropy_change", "idf", "sentence") for kind in ("csv", "png")
    ]
    assert names == sorted(["changes.csv", "changes.json", *pictures])
    numbers = json.loads((tmp_path / "out" / "changes.json").read_text())
    assert numbers["texts"] == 4
    assert numbers["changes"]["mass_content"]["change"] != 0


def test_adapter_is_compared_switched_on_and_off(folders, tmp_path):
    assert attention(folders, "--no_plots", "--no_head_distance", tuned="adapter") == 0
    on = json.loads((tmp_path / "out" / "changes.json").read_text())["changes"]
    off = json.loads((tmp_path / "out" / "adapter_off" / "changes.json").read_text())["changes"]
    assert on["entropy"]["change"] != 0
    assert off["entropy"]["change"] == 0
    assert "head_distance" not in on
    assert not list((tmp_path / "out").rglob("*.png"))


def test_function_words_come_from_a_file(folders, tmp_path):
    for folder, more in (("english", ()), ("own", ("--function_words", str(folders / "words.txt")))):
        assert attention(folders, "--no_plots", "--no_head_distance", "--output_dir", folder, *more) == 0
    shares = [
        json.loads((tmp_path / folder / "changes.json").read_text())["changes"]["mass_function"]["before"]
        for folder in ("english", "own")
    ]
    assert 0 < shares[1] < shares[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--template", "{question}"), "Invalid `template`: got {question}, expected columns of the data set"),
        (("--template", "no column"), "Invalid `template`"),
        (("--max_texts", "0"), "Invalid `max_texts`: got 0, expected an integer >= 1"),
        (("--sentence", "4"), "Invalid `sentence`: got 4"),
        (("--dataset", "/nowhere.jsonl"), "Invalid `dataset_name`"),
        (("--function_words", "nowhere.txt"), "nowhere.txt"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(folders, tmp_path, capsys, more, message):
    assert attention(folders, "--no_plots", *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-curriculum attention: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_empty_data_set_is_refused(folders, capsys):
    assert attention(folders, "--no_plots", dataset="empty.jsonl") == 1
    assert "empty.jsonl, a file without rows, expected at least one text" in capsys.readouterr().err


def test_missing_model_is_refused(folders, capsys):
    assert attention(folders, "--no_plots", tuned="missing") == 1
    assert "Invalid `tuned`" in capsys.readouterr().err


def test_missing_matplotlib_is_told_before_a_model_runs(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(attention_command, "_measure", lambda *_: pytest.fail("a model was loaded"))
    assert attention(folders) == 1
    assert 'pip install "hf_curriculum[plots]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def cgc_adapter(folders):
    """A CGC-LoRA adapter of the base model, and one beside it whose tensors are of another one."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from hf_curriculum import CGCLoraConfig

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    config = CGCLoraConfig(
        task_names=["sum", "sort"], target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(base, config).save_pretrained(folders / "cgc")
    broken = folders / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((folders / "cgc" / "adapter_config.json").read_bytes())
    tensors = load_file(folders / "cgc" / "adapter_model.safetensors")
    save_file({name: value[:1].clone() for name, value in tensors.items()}, broken / "adapter_model.safetensors")
    return folders / "cgc"


def test_export_writes_adapters_that_plain_peft_reads(cgc_adapter, folders, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert cli.main(["export", str(cgc_adapter), "export"]) == 0
    shown = "".join(capsys.readouterr())
    assert "vllm serve" in shown
    assert "largest logit difference" in shown
    folder = tmp_path / "export"
    assert {path.parent.name for path in folder.glob("*/adapter_config.json")} == {"sum", "sort", "common"}
    ids = torch.arange(4, 12).reshape(1, 8)

    def base():
        return AutoModelForCausalLM.from_pretrained(folders / "base")

    with torch.no_grad():
        mixture = PeftModel.from_pretrained(base(), cgc_adapter)(input_ids=ids, tasks="sort").logits
        plain = PeftModel.from_pretrained(base(), folder / "sort")
        assert plain.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(plain(input_ids=ids).logits, mixture, atol=1e-5, rtol=0)


def test_export_of_some_tasks_at_a_lower_rank(cgc_adapter, tmp_path, capsys):
    words = ["export", str(cgc_adapter), "export", "--tasks", "sum", "--no_common", "--truncate_rank", "2"]
    assert cli.main([*words, "--rank_multiple", "1"]) == 0
    assert "largest truncation error" in "".join(capsys.readouterr())
    (config,) = (tmp_path / "export").glob("*/adapter_config.json")
    assert config.parent.name == "sum"
    assert json.loads(config.read_text())["r"] == 2


@pytest.mark.parametrize(
    ("adapter", "more", "message"),
    [
        ("cgc", ["--tasks", "who"], "Invalid `tasks`"),
        ("cgc", ["--truncate_rank", "0"], "Invalid `truncate_rank`: got 0"),
        ("cgc", ["--rank_multiple", "0"], "Invalid `rank_multiple`: got 0"),
        ("cgc", ["--base_model", "./missing"], "Invalid `base_model`"),
        ("missing", [], "Invalid `adapter`"),
        ("adapter", [], "of type LORA, expected a CGC-LoRA adapter"),
        ("base", [], "adapter_config.json"),
        ("broken", [], "Invalid `adapter file`"),
    ],
)
def test_bad_exports_are_one_line_and_leave_nothing(cgc_adapter, folders, tmp_path, capsys, adapter, more, message):
    assert cli.main(["export", str(folders / adapter), "export", *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-curriculum export: ")
    assert message in error
    assert not list(tmp_path.glob("*export*"))


def test_export_over_something_is_refused_before_anything_is_loaded(cgc_adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_command, "_load_adapted_base", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "export").mkdir()
    assert cli.main(["export", str(cgc_adapter), "export"]) == 1
    assert "Invalid `output`: got export, expected a folder that does not exist" in capsys.readouterr().err


def test_version_and_missing_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2


def test_fault_of_ours_is_not_hidden(folders, monkeypatch):
    def broken(*_):
        raise KeyError("ours")

    monkeypatch.setattr(attention_command, "_measure", broken)
    with pytest.raises(KeyError):
        attention(folders, "--no_plots")


@pytest.fixture
def layer_run(tmp_path):
    """The output folder of a run that froze layers."""
    record = RunRecord(tmp_path / "run")
    names = [f"model.layers.{number}" for number in range(4)]
    for first_step, active in ((0, 3), (5, 1), (10, 1)):
        record.append(
            "layers", first_step + 1, first_step=first_step, policy="random", turn=None, blocks=names,
            active=[active], active_fraction=0.25, rates={}, scores=dict.fromkeys(names),
        )  # fmt: skip
    return tmp_path / "run"


def test_layers_are_shown_drawn_and_fixed(layer_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["layers", str(layer_run)]) == 0
    shown = "".join(capsys.readouterr())
    assert "Which blocks learned: policy random, 3 decisions in 11 steps" in shown
    assert "fixed" not in shown
    assert not list(tmp_path.rglob("*.png"))
    words = ["layers", str(layer_run), "--plot", "new/map.png", "--static", "--active_fraction", "0.5"]
    assert cli.main(words) == 0
    shown = "".join(capsys.readouterr())
    assert 'policy="fixed", active_fraction=0.5, blocks=["model.layers.1", "model.layers.3"]' in shown
    assert '{"layers_to_transform": [1, 3], "layers_pattern": "layers"}' in shown
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["map.csv", "map.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plot", "map.csv"], "Invalid `plot`: got map.csv, expected a file name that ends in .png"),
        (["--active_fraction", "0.5"], "Invalid `active_fraction`: got 0.5, expected nothing without --static"),
        (["--static", "--active_fraction", "0.1"], "Invalid `active_fraction`: got 0.1, expected at least 0.25"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_layers_are_one_line_and_leave_nothing(layer_run, tmp_path, capsys, more, message):
    assert cli.main(["layers", str(layer_run), *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-curriculum layers: ")
    assert message in error
    assert not list(tmp_path.glob("map.*"))


def test_layers_of_a_folder_without_a_record_are_refused(tmp_path, capsys):
    assert cli.main(["layers", str(tmp_path)]) == 1
    assert "without a record of layers, expected the output folder of a run" in capsys.readouterr().err
