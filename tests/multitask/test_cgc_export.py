"""Export: each task as a LoRA that stock PEFT loads."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_curriculum.multitask.cgc_lora import export as export_module
from hf_curriculum.multitask.cgc_lora import export_task_adapters
from hf_curriculum.multitask.cgc_lora.collapse import pad_rank, truncate_rank
from hf_curriculum.multitask.cgc_lora.export_card import serve_command


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("cgc_twin", Path(__file__).with_name("cgc_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)
base_model, batch, make_config = twin.base_model, twin.batch, twin.make_config


def make(kind: str = "llama", **kwargs: object) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base_model(kind), make_config(kind, **kwargs)).eval()


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "gpt2"])
@pytest.mark.parametrize(
    "structure",
    [
        {},
        {"gate": "task_embedding", "gate_normalization": "sum_to_n", "num_task_experts": 2},
        {"num_common_experts": 3, "num_task_experts": 0, "shared_down_projection": True, "task_matrix": True},
    ],
    ids=["task", "task_embedding", "mtl_lora"],
)
def test_exported_tasks_have_the_logits_of_the_mixture(
    kind: str, structure: dict[str, object], tmp_path: Path
) -> None:
    model, inputs = make(kind, **structure), batch(kind)
    report = export_task_adapters(model, tmp_path / "export")
    assert list(report.ranks) == ["a", "b", "c", "common"]
    for task in report.ranks:
        loaded = PeftModel.from_pretrained(base_model(kind), tmp_path / "export" / task).eval()
        assert isinstance(loaded.peft_config["default"], LoraConfig)
        difference = (logits(loaded, inputs) - logits(model, inputs, tasks=task)).abs().max()
        assert difference <= 1e-5
        assert report.logit_differences[task] <= 1e-5
    assert not torch.allclose(logits(model, inputs, tasks="a"), logits(model, inputs, tasks="b"), atol=1e-3)


@pytest.mark.slow
def test_a_process_without_this_package_generates_the_same(tmp_path: Path) -> None:
    model, inputs = make(), batch("llama")
    with torch.no_grad():
        for experts in model.experts().values():
            experts.B.mul_(10)
    export_task_adapters(model, tmp_path / "export")
    base_model("llama").save_pretrained(tmp_path / "base")
    expected = {}
    for task in ("a", "b", "c", "common"):
        options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
        expected[task + ".logits"] = logits(model, inputs, tasks=task)
        expected[task + ".tokens"] = model.generate(input_ids=inputs["input_ids"], tasks=task, **options)
    save_file({**expected, "input_ids": inputs["input_ids"]}, tmp_path / "expected.safetensors")
    program = f"""
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file({str(tmp_path / "expected.safetensors")!r})
ids = expected["input_ids"]
for task in ("a", "b", "c", "common"):
    base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
    model = PeftModel.from_pretrained(base, {str(tmp_path / "export")!r} + "/" + task).eval()
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected[task + ".logits"]).abs().max() <= 1e-5
    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, min_new_tokens=5,
        pad_token_id=0,
    )
    assert torch.equal(tokens, expected[task + ".tokens"])
assert "hf_curriculum" not in sys.modules
print("same")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["same"], run.stderr


def test_folders_hold_what_servers_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    report = export_task_adapters(model, tmp_path / "export", tasks=["c", "a"])
    names = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert names == ["README.md", "a", "c", "common", "tasks.json"]
    config = json.loads((tmp_path / "export" / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert not config["rank_pattern"]
    assert config["modules_to_save"] is None
    tensors = load_file(tmp_path / "export" / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 6
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {8}
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    mapping = json.loads((tmp_path / "export" / "tasks.json").read_text())
    assert mapping["tasks"] == {"c": "c", "a": "a"}
    assert mapping["common"] == "common"
    assert "--enable-lora --max-lora-rank 8 --max-loras 3" in report.serve_command
    assert report.serve_command in (tmp_path / "export" / "README.md").read_text()
    assert report.serve_command in capsys.readouterr().out


def test_heads_go_with_the_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = make("bert"), batch("bert")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(3)
    export_task_adapters(model, tmp_path / "export")
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "export" / "b").eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs, tasks="b"), rtol=0, atol=1e-5)
    assert "vLLM refuses" in capsys.readouterr().out
    assert "vLLM refuses such" in (tmp_path / "export" / "README.md").read_text()


def test_without_common_experts_there_is_no_common_adapter(tmp_path: Path) -> None:
    assert list(export_task_adapters(make(num_common_experts=0), tmp_path / "export").ranks) == ["a", "b", "c"]
    assert list(export_task_adapters(make(), tmp_path / "second", include_common=False).ranks) == ["a", "b", "c"]


def test_truncation_is_the_best_of_its_rank(tmp_path: Path) -> None:
    model = make()
    report = export_task_adapters(model, tmp_path / "export", truncate_rank=2, rank_multiple=1)
    assert set(report.ranks.values()) == {2}
    name, experts = next(iter(model.experts().items()))
    with torch.no_grad():
        down, up = experts.task_factors(0)
    values = torch.linalg.svdvals((up @ down).double())
    expected = float((values[2:].square().sum() / values.square().sum()).sqrt())
    assert report.truncation_errors["a"][name] == pytest.approx(expected, rel=1e-4)
    tensors = load_file(tmp_path / "export" / "a" / "adapter_model.safetensors")
    written = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
    error = torch.linalg.norm(up @ down - written) / torch.linalg.norm(up @ down)
    assert float(error) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(3, 7, 5), (6, 4, 9), (5, 5, 5)], ids=str)
def test_truncation_equals_the_singular_values_of_the_product(shape: tuple[int, int, int]) -> None:
    rank, d_in, d_out = shape
    down, up = torch.randn(rank, d_in, dtype=torch.float64), torch.randn(d_out, rank, dtype=torch.float64)
    u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
    new_down, new_up, error = truncate_rank(down, up, 2)
    torch.testing.assert_close(new_up @ new_down, u[:, :2] * s[:2] @ v[:2])
    assert error == pytest.approx(float(s[2:].norm() / s.norm()))
    assert truncate_rank(down, up, rank)[2] == 0.0
    assert truncate_rank(down, torch.zeros_like(up), 1)[2] == 0.0
    with pytest.raises(ValueError, match="`truncate_rank`: got 0"):
        truncate_rank(down, up, 0)


def test_a_linear_narrower_than_the_rank_is_filled_with_zeros() -> None:
    # Four outputs have four singular values, and the adapter one rank for all of its linears.
    down, up = torch.randn(9, 7, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    new_down, new_up, error = truncate_rank(down, up, 6)
    assert new_down.shape == (6, 7)
    assert new_up.shape == (4, 6)
    assert error == 0.0
    torch.testing.assert_close(new_up @ new_down, up @ down)


def test_padding_keeps_the_update() -> None:
    down, up = torch.randn(6, 4), torch.randn(5, 6)
    padded_down, padded_up = pad_rank(down, up, 8)
    assert padded_down.shape == (8, 4)
    assert padded_up.shape == (5, 8)
    torch.testing.assert_close(padded_up @ padded_down, up @ down)
    assert pad_rank(down, up, 3)[0].shape == (6, 4)
    with pytest.raises(ValueError, match="`rank_multiple`: got 0"):
        pad_rank(down, up, 0)


def test_nothing_is_written_over_or_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="expected a folder that does not exist"):
        export_task_adapters(model, tmp_path / "there")
    with pytest.raises(ValueError, match="a list of different names"):
        export_task_adapters(model, tmp_path / "export", tasks=["a", "poetry"])
    with pytest.raises(NotImplementedError, match="Gates 'task' and 'task_embedding' can be merged and exported"):
        export_task_adapters(make(gate="token"), tmp_path / "export")
    with pytest.raises(ValueError, match="a PeftModel with a CGC-LoRA adapter"):
        export_task_adapters(base_model("llama"), tmp_path / "export")

    # A wrong export is found before it is written.
    def wrong(down: torch.Tensor, up: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
        return down, up * 1.01

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "pad_rank", wrong)
        with pytest.raises(RuntimeError, match="Nothing was written"):
            export_task_adapters(model, tmp_path / "export")

    # And a disk that fills up in the middle leaves nothing behind.
    calls = []

    def fails(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_lora", fails)
        with pytest.raises(OSError, match="disk full"):
            export_task_adapters(model, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    # The model is as it was.
    assert all(type(experts).__name__ == "CGCExperts" for experts in model.experts().values())
    model.merge_adapter(task="a")
    with pytest.raises(ValueError, match="got merged weights"):
        export_task_adapters(model, tmp_path / "export")


def test_names_of_the_exports_own_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got Tasks\.json"):
        export_task_adapters(make(task_names=["a", "Tasks.json"]), tmp_path / "export")


def test_check_takes_a_batch(tmp_path: Path) -> None:
    model = make().train()
    report = export_task_adapters(model, tmp_path / "export", check=batch("llama"))
    assert max(report.logit_differences.values()) <= 1e-5
    assert model.training
    unchecked = export_task_adapters(model, tmp_path / "second", check=False)
    assert set(unchecked.logit_differences.values()) == {None}


def test_serve_command_is_safe_and_names_a_rank_that_vllm_takes() -> None:
    command = serve_command("org/model", Path("my export"), {"a b": 24, "c": 8})
    assert command == (
        "vllm serve org/model --enable-lora --max-lora-rank 32 --max-loras 2 "
        "--lora-modules 'a b=my export/a b' 'c=my export/c'"
    )
    assert "vLLM takes ranks up to 512" in serve_command("m", Path("x"), {"a": 520})
