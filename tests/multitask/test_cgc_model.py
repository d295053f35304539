"""The tuner: what PEFT asks of one, and the way of the tasks through every kind of pass."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_curriculum.core.head import causal_lm_head
from hf_curriculum.multitask.cgc_lora import CGCLoraConfig, CGCLoraModel, register_cgc_lora


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("cgc_twin", Path(__file__).with_name("cgc_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)
base_model, batch, make_config = twin.base_model, twin.batch, twin.make_config

ROWS = ["a", "c", "a", "b"]
each_kind = pytest.mark.parametrize("kind", ["llama", "bert", "t5", "gpt2"])


def make(kind: str = "llama", **kwargs: object) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base_model(kind), make_config(kind, **kwargs)).eval()


def logits(model: nn.Module, inputs: dict[str, torch.Tensor], **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    # Not `torch.equal`: the alignment of memory decides how a GEMM rounds.
    return torch.allclose(first, second, rtol=1e-5, atol=1e-6)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in gradients(model).items() if "cgc_lora_" in name}
    assert found
    assert all(value.abs().max() > 0 for value in found.values())
    return found


# ------------------------------------------------------------------ what PEFT asks of a tuner


def test_registering_twice_changes_nothing() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    before = len(PeftType)
    register_cgc_lora()
    assert len(PeftType) == before
    assert PeftType("CGC_LORA").value == "CGC_LORA"
    assert PeftType.CGC_LORA in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["CGC_LORA"] is CGCLoraConfig


@each_kind
def test_starts_as_its_base(kind: str) -> None:
    inputs = batch(kind)
    expected = logits(base_model(kind), inputs)
    assert same(logits(make(kind, init_weights=True), inputs, tasks=ROWS), expected)
    assert not torch.allclose(logits(make(kind), inputs, tasks=ROWS), expected)


@each_kind
@pytest.mark.parametrize("gate", ["task", "task_embedding", "token"])
def test_each_row_sees_its_own_task_alone(kind: str, gate: str) -> None:
    model, inputs = make(kind, gate=gate), batch(kind)
    mixed = logits(model, inputs, tasks=ROWS)
    for row, task in enumerate(ROWS):
        alone = logits(model, {name: value[row : row + 1] for name, value in inputs.items()}, tasks=task)
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed, logits(model, inputs, tasks="a"), atol=1e-4)


@each_kind
def test_only_the_adapter_learns(kind: str) -> None:
    model = make(kind)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("cgc_lora_" in name or "modules_to_save" in name), name


@each_kind
@pytest.mark.parametrize("task_type", ["typed", None])
def test_loads_what_it_saved(kind: str, task_type: str | None, tmp_path: Path) -> None:
    kwargs = {} if task_type else {"task_type": None}
    model, inputs = make(kind, **kwargs), batch(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(kind), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs, tasks=ROWS), logits(model, inputs, tasks=ROWS))
    assert loaded.registry() == model.registry()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_auto_class_loads_it(tmp_path: Path) -> None:
    base = base_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), make_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    inputs = batch("llama")
    assert same(logits(loaded, inputs, tasks=ROWS), logits(model, inputs, tasks=ROWS))


def test_config_survives_json(tmp_path: Path) -> None:
    config = make_config(gate="task_embedding", layers_to_transform=[1], unknown_task="common")
    config.save_pretrained(tmp_path)
    loaded = CGCLoraConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), "layers_to_transform": [1]}
    assert loaded.registry() == config.registry()


def test_saved_with_its_card(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("from hf_curriculum import CGCLoraModel") == 1
    assert "`a`, `b`, `c`" in card


@pytest.mark.slow
def test_stock_peft_refuses_it_loudly(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from peft import PeftModel
from torch import nn
try:
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), {str(tmp_path)!r})
except (KeyError, ValueError) as error:
    assert "CGC_LORA" in str(error), error
    print("refused", "hf_curriculum" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["refused", "False"], run.stderr


@each_kind
def test_merging_a_task_keeps_its_logits(kind: str) -> None:
    model, inputs = make(kind), batch(kind)
    expected = {task: logits(model, inputs, tasks=task) for task in ("a", "b")}
    weights = copy.deepcopy(model.get_base_model().state_dict())
    model.merge_adapter(task="b", safe_merge=True)
    torch.testing.assert_close(logits(model, inputs), expected["b"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, inputs, tasks="b"), expected["b"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'b', which is merged into the weights"):
        model(**inputs, tasks="a")
    model.unmerge_adapter()
    for name, value in model.get_base_model().state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model, inputs, tasks="a"), expected["a"], rtol=1e-4, atol=1e-5)
    with model.set_task("a"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, inputs), expected["a"], rtol=1e-4, atol=1e-5)
    assert not any("cgc" in name for name, _ in plain.named_modules())
    assert "generate" not in plain.__dict__
    assert not plain._forward_pre_hooks


def test_merging_refuses_what_is_not_one_task() -> None:
    model = make()
    with pytest.raises(ValueError, match="Merging needs one task"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="got poetry"):
        model.merge_adapter(task="poetry")
    with pytest.raises(NotImplementedError, match="Gates 'task' and 'task_embedding' can be merged"):
        make(gate="token").merge_adapter(task="a")
    model.merge_adapter(task="a")
    with pytest.raises(ValueError, match="'a', which is merged"):
        model.merge_and_unload(task="b")


def test_safe_merge_refuses_broken_weights() -> None:
    model = make()
    experts = next(iter(model.experts().values()))
    with torch.no_grad():
        experts.B[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(task="a", safe_merge=True)


@each_kind
def test_disabled_it_is_its_base(kind: str) -> None:
    model, inputs = make(kind), batch(kind)
    expected = logits(base_model(kind), inputs)
    with model.disable_adapter():
        assert same(logits(model, inputs, tasks=ROWS), expected)
        assert same(logits(model, inputs), expected)
    assert not same(logits(model, inputs, tasks=ROWS), expected)
    # `unload` shares the classification head with the model that learnt it.
    torch.testing.assert_close(logits(model.unload(), inputs), expected)


def test_adapters_with_other_tasks() -> None:
    model, inputs = make(), batch("llama")
    first = logits(model, inputs, tasks="a")
    torch.manual_seed(4)
    model.add_adapter("other", make_config(task_names=["x", "a"], r=3, num_common_experts=0))
    assert same(logits(model, inputs, tasks="a"), first)
    model.set_adapter("other")
    second = logits(model, inputs, tasks="a")
    assert not torch.allclose(first, second)
    assert model.registry().names == ("x", "a")
    with pytest.raises(ValueError, match="got b, expected one of 'x', 'a'"):
        model(**inputs, tasks="b")
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, inputs, tasks="a")
    assert not torch.allclose(both, second)
    with pytest.raises(ValueError, match="number their tasks differently"):
        model(**inputs, tasks=torch.tensor([0, 1, 0, 1]))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert same(logits(model, inputs, tasks="a"), first)


def test_second_adapter_is_saved_apart(tmp_path: Path) -> None:
    model, inputs = make(), batch("llama")
    model.add_adapter("other", make_config(task_names=["x", "y"]))
    model.set_adapter("other")
    expected = logits(model, inputs, tasks="y")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "other", adapter_name="renamed").eval()
    assert same(logits(loaded, inputs, tasks="y"), expected)
    assert "from hf_curriculum" in (tmp_path / "other" / "README.md").read_text()
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(
        load_file(tmp_path / "other" / "adapter_model.safetensors")
    )


def test_layers_are_chosen_by_number() -> None:
    model = make(layers_to_transform=[1])
    assert all(".layers.1." in f".{name}" for name in model.experts())
    assert len(model.experts()) == 3
    assert len(make(target_modules="all-linear").experts()) == 14
    assert len(make(target_modules=r".*\.0\.self_attn\.q_proj").experts()) == 1
    assert len(make(exclude_modules=["down_proj"]).experts()) == 4


def test_embedding_and_other_layers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="CGC-LoRA on an embedding"):
        make(target_modules=["embed_tokens"])
    with pytest.raises(NotImplementedError, match="CGC-LoRA on LlamaMLP"):
        make(target_modules=["mlp"])
    with pytest.raises(ValueError, match="`fan_in_fan_out`: got True, expected False for Linear"):
        make(fan_in_fan_out=True)
    assert make("gpt2", fan_in_fan_out=True).experts()


def test_an_adapter_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith(".B"))
    damaged = {
        "missing": {name: value for name, value in tensors.items() if name != key},
        "unknown": {**tensors, key + "2": tensors[key].clone()},
        "shape": {**tensors, key: tensors[key][:, :-1].contiguous()},
    }
    for kind, message in (("missing", "no tensor"), ("unknown", "1 unknown"), ("shape", "expected shape")):
        save_file(damaged[kind], path)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base_model("llama"), tmp_path)


def test_in_half_precision_the_adapter_stays_in_float32() -> None:
    model = get_peft_model(base_model("llama").to(torch.bfloat16), make_config()).eval()
    experts = next(iter(model.experts().values()))
    assert experts.A.dtype == torch.float32
    output = logits(model, batch("llama"), tasks=ROWS)
    assert output.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(make(), batch("llama"), tasks=ROWS)).all()


def test_a_copy_has_tasks_of_its_own() -> None:
    model, inputs = make(), batch("llama")
    twin_model = copy.deepcopy(model)
    twin_model.set_task("b")
    assert model.task is None
    torch.testing.assert_close(logits(twin_model, inputs), logits(model, inputs, tasks="b"))


def test_injecting_without_the_tuner_is_refused() -> None:
    from peft import inject_adapter_in_model

    with pytest.raises(ValueError, match="shared"):
        inject_adapter_in_model(make_config(), base_model("llama"))


def test_gate_table_is_for_people() -> None:
    model = make()
    table = model.gate_table()
    assert set(table) == set(model.experts())
    for gates in table.values():
        assert gates.shape == (3, 5)
        assert gates.dtype == torch.float32
        torch.testing.assert_close(gates.sum(-1), torch.ones(3))
    one = model.gate_table("b")
    assert all(same(one[name], table[name][1]) for name in table)
    assert all((gates[2:] == 0).all() for gates in model.gate_table("common").values())


# ------------------------------------------------------------------ tasks on their way


def test_tasks_are_needed_and_must_be_known() -> None:
    model, inputs = make(), batch("llama")
    with pytest.raises(ValueError, match="got no task, expected a task for this forward pass"):
        model(**inputs)
    with pytest.raises(ValueError, match="got poetry, expected one of 'a', 'b', 'c'"):
        model(**inputs, tasks="poetry")
    with pytest.raises(ValueError, match=r"got 3, expected an id in \[0, 3\)"):
        model(**inputs, tasks=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="got 3 tasks, expected one, or one for each of the 4 rows"):
        model(**inputs, tasks=["a", "b", "c"])
    # A pass that failed leaves no task behind.
    assert model.base_model.task_state.current is None
    with pytest.raises(ValueError, match="got no task"):
        model(**inputs)


@pytest.mark.parametrize("policy", ["common", "uniform"])
def test_policy_for_a_batch_without_tasks(policy: str) -> None:
    model, inputs = make(unknown_task=policy), batch("llama")
    expected = logits(model, inputs, tasks=policy)
    assert same(logits(model, inputs), expected)
    assert same(logits(model, inputs, tasks="poetry"), expected)


def test_set_task_as_call_and_as_context() -> None:
    model, inputs = make(), batch("llama")
    expected = {task: logits(model, inputs, tasks=task) for task in ("a", "b")}
    model.set_task("a")
    assert same(logits(model, inputs), expected["a"])
    with model.set_task("b"):
        assert same(logits(model, inputs), expected["b"])
        assert same(logits(model, inputs, tasks="a"), expected["a"])
    assert same(logits(model, inputs), expected["a"])
    model.set_task(None)
    with pytest.raises(ValueError, match="got no task"):
        model(**inputs)
    with pytest.raises(ValueError, match="got poetry"):
        model.set_task("poetry")


def test_base_and_backbone_take_tasks_too() -> None:
    model, inputs = make(), batch("llama")
    expected = logits(model, inputs, tasks=ROWS)
    assert same(logits(model.get_base_model(), inputs, tasks=ROWS), expected)
    head = causal_lm_head(model)
    del inputs["labels"]
    with torch.no_grad():
        hidden = head.backbone(**inputs, tasks=ROWS).last_hidden_state
        assert same(head.logits(hidden), expected.float())


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_ids_per_token_for_packed_rows(task_type: str | None) -> None:
    model, inputs = make(task_type=task_type), batch("llama", rows=2, length=5)
    apart = logits(model, inputs, tasks=["c", "b"])
    packed = {
        "input_ids": inputs["input_ids"].reshape(1, 10),
        "position_ids": torch.arange(5).repeat(2)[None],
        "use_cache": False,
    }
    together = logits(model, packed, tasks=torch.tensor([[2] * 5 + [1] * 5]))
    torch.testing.assert_close(together.reshape(apart.shape), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("task_type", ["typed", None])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "beams_returned", "samples"],
)
def test_generation_follows_the_tasks(kind: str, task_type: str | None, options: dict[str, object]) -> None:
    model = make(kind, **({} if task_type else {"task_type": None}))
    inputs = batch(kind)
    del inputs["labels"]
    # Large updates, so that tasks differ in what they generate.
    with torch.no_grad():
        for experts in model.experts().values():
            experts.B.mul_(20)
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, **options}
    torch.manual_seed(0)
    mixed = model.generate(**inputs, tasks=ROWS, **options)
    torch.manual_seed(0)
    again = model.generate(**inputs, tasks=torch.tensor([0, 2, 0, 1]), **options)
    assert torch.equal(mixed, again)
    copies = len(mixed) // len(ROWS)
    if not options["do_sample"]:
        for row, task in enumerate(ROWS):
            alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, tasks=task, **options)
            assert torch.equal(mixed[row * copies : (row + 1) * copies], alone)
        assert not torch.equal(mixed, model.generate(**inputs, tasks="b", **options))
        with model.set_task("b"):
            assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, tasks="b", **options))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("gate", ["task", "token"])
def test_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool, gate: str) -> None:
    inputs = batch(kind)
    expected_model = make(kind, gate=gate).train()
    expected_model(**inputs, tasks=ROWS).loss.backward()
    expected = adapter_gradients(expected_model)
    model = make(kind, gate=gate).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**inputs, tasks=ROWS).loss.backward()
    assert_equal_gradients(expected, adapter_gradients(model))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_several_passes_before_a_backward_keep_their_own_tasks(reentrant: bool) -> None:
    def step(model: PeftModel) -> dict[str, torch.Tensor]:
        inputs, others = batch("llama"), batch("llama", length=9)
        first = model(**inputs, tasks=ROWS).loss
        with torch.no_grad():
            model(**inputs, tasks="b")
        second = model(**others, tasks="c").loss
        with model.set_task("a"):
            third = model(**inputs).loss
        (first - 2 * second + 0.5 * third).backward()
        return adapter_gradients(model)

    expected = step(make().train())
    model = make().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal_gradients(expected, step(model))


def test_checkpointing_survives_the_backbone_alone_and_a_second_enabling() -> None:
    inputs = batch("llama")
    del inputs["labels"]

    def step(model: PeftModel) -> dict[str, torch.Tensor]:
        causal_lm_head(model).backbone(**inputs, tasks=ROWS).last_hidden_state.square().sum().backward()
        return adapter_gradients(model)

    expected = step(make().train())
    model = make().train()
    for _ in range(2):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        found = step(model)
    assert_equal_gradients(expected, found)


@pytest.mark.slow
def test_a_model_compiles_without_graph_breaks() -> None:
    model, inputs = make(), batch("llama")
    del inputs["labels"]
    ids = torch.tensor([0, 2, 0, 1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        output = compiled(**inputs, tasks=ids).logits
    torch.testing.assert_close(output, logits(model, inputs, tasks=ids), rtol=1e-4, atol=1e-5)
    assert model.base_model.task_state.current is None


def test_values_of_ids_on_a_device_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(), batch("llama")
    reads = []
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(self))
    ids = torch.tensor([0, 2, 0, 1])
    with monkeypatch.context() as patch:
        # As on an accelerator, where `resolve_tasks` does not look.
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        batches = model.base_model._resolve(ids)
    with model.base_model.task_state.using(batches), torch.no_grad():
        causal_lm_head(model).backbone(input_ids=inputs["input_ids"])
    assert batches["default"].single is None
    assert not reads


def test_is_what_peft_knows_it_as() -> None:
    model = make()
    assert isinstance(model.base_model, CGCLoraModel)
    status = model.get_model_status()
    assert status.peft_types == {"default": "CGC_LORA"}
    assert status.enabled is True
    assert json.loads(json.dumps(model.peft_config["default"].peft_type)) == "CGC_LORA"
