import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_curriculum import __version__, cli
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
    monkeypatch.setattr(cli, "_measure", lambda *_: pytest.fail("a model was loaded"))
    assert attention(folders) == 1
    assert 'pip install "hf_curriculum[plots]"' in capsys.readouterr().err


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

    monkeypatch.setattr(cli, "_measure", broken)
    with pytest.raises(KeyError):
        attention(folders, "--no_plots")
