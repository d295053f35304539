"""Fused models on disk: plain LoRA folders that stock PEFT loads, tasks added or loaded later, and wrong folders."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_curriculum.multitask.attention_fusion import AttentionFusionConfig, AttentionFusionModel
from hf_curriculum.multitask.heads import MultiTaskHeads
from hf_curriculum.multitask.task_head import TaskHead


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("fusion_twin", Path(__file__).with_name("fusion_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)
HEADS, TASKS, make = twin.HEADS, twin.TASKS, twin.make
NAMES = list(HEADS)

both_levels = pytest.mark.parametrize("level", ["output", "layer"])


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    twin.base_model("bert").save_pretrained(folder)
    return folder


def stored(base_folder, **options):
    """A model whose base has a name, so that its folder can find it again."""
    return make(base=AutoModel.from_pretrained(base_folder, add_pooling_layer=False), **options)


def outputs(model, inputs=None, **kwargs):
    with torch.no_grad():
        return model.eval()(**(inputs or twin.batch()), tasks=kwargs.pop("tasks", TASKS), **kwargs)


@both_levels
@pytest.mark.parametrize("stage", ["tasks", pytest.param("fusion", marks=pytest.mark.slow), "joint"])
def test_saved_and_loaded_is_equal(base_folder, tmp_path, level, stage):
    model = stored(base_folder, level=level, stage=stage)
    model.save_pretrained(tmp_path)
    loaded = AttentionFusionModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.fusion_config.to_dict() == {**model.fusion_config.to_dict(), "pooling": "mean"}
    assert list(loaded.heads.items()) == list(model.heads.items())
    for again in ("tasks", "fusion", "joint"):
        model.set_stage(again)
        loaded.set_stage(again)
        torch.testing.assert_close(outputs(loaded).logits, outputs(model).logits, rtol=0, atol=1e-7)
    attention = [outputs(one, return_attention=True).attention for one in (model, loaded)]
    torch.testing.assert_close(attention[1], attention[0], rtol=0, atol=1e-7)


@both_levels
def test_a_loaded_model_is_fused(base_folder, tmp_path, level):
    """What is loaded answers as the fused model that was saved, without a word about stages."""
    model = stored(base_folder, level=level, stage="fusion")
    model.save_pretrained(tmp_path)
    found = outputs(AttentionFusionModel.from_pretrained(tmp_path)).logits
    torch.testing.assert_close(found, outputs(model).logits, rtol=0, atol=1e-7)


def test_a_given_base_is_taken(base_folder, tmp_path):
    model = stored(base_folder, stage="fusion")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(base_folder)
    loaded = AttentionFusionModel.from_pretrained(tmp_path, base=base)
    torch.testing.assert_close(outputs(loaded).logits, outputs(model).logits, rtol=0, atol=1e-7)


@both_levels
def test_the_folder_holds_plain_loras_and_no_base(base_folder, tmp_path, level):
    model = stored(base_folder, level=level)
    model.save_pretrained(tmp_path / "fused")
    files = {
        path.relative_to(tmp_path / "fused").as_posix() for path in (tmp_path / "fused").rglob("*") if path.is_file()
    }
    of_task = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "task_heads.json",
        "task_heads.safetensors",
        "README.md",
    }
    assert files == {f"{name}/{file}" for name in NAMES for file in of_task} | {
        "fusion.safetensors",
        "fusion_config.json",
        "task_heads.json",
        "task_heads.safetensors",
        "README.md",
    }
    own = {name: load_file(tmp_path / "fused" / name / "adapter_model.safetensors") for name in NAMES}
    for tensors in own.values():
        assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in tensors)
    written = sum(
        load_file(path)[key].numel()
        for path in (tmp_path / "fused").glob("**/*.safetensors")
        for key in load_file(path)
    )
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    heads = sum(parameter.numel() for parameter in model.classifier.parameters())
    # Heads lie in the folder and beside their LoRAs; two tables say which task may listen to which, and which does.
    assert written == learned + heads + 2 * len(HEADS) ** 2


@both_levels
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_stock_peft_and_its_head_are_the_tasks_own_model(tmp_path, level, kind):
    model = make(kind, level=level, stage="tasks")
    model.save_pretrained(tmp_path)
    inputs = twin.batch()
    with torch.no_grad():
        pooled = model.pooled_outputs(**inputs)
    for task, name in enumerate(NAMES):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        stock = PeftModel.from_pretrained(twin.base_model(kind), str(tmp_path / name)).eval()
        with torch.no_grad():
            hidden = stock(**inputs).last_hidden_state
        for row in range(5):
            own = twin.pool_row(hidden[row], inputs["attention_mask"][row], model.pooling)
            torch.testing.assert_close(pooled[row, task], own, rtol=1e-5, atol=1e-6)
        heads = MultiTaskHeads.from_pretrained(tmp_path / name, stock)
        with torch.no_grad():
            alone = heads(**inputs).logits
        torch.testing.assert_close(
            outputs(model, inputs, tasks=name).logits[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-6
        )


def test_a_task_folder_alone_is_a_classifier(base_folder, tmp_path):
    model = stored(base_folder, stage="tasks")
    model.save_pretrained(tmp_path)
    for name, head in HEADS.items():
        loaded = MultiTaskHeads.from_pretrained(tmp_path / name)
        assert loaded.heads == {name: head}
        with torch.no_grad():
            own = loaded(**twin.batch()).logits
        torch.testing.assert_close(outputs(model, tasks=name).logits[:, : head.num_labels], own, rtol=1e-5, atol=1e-6)


@both_levels
def test_untrained_fusion_is_the_saved_adapter_and_head(base_folder, tmp_path, level):
    model = stored(base_folder, level=level, stage="fusion", heard=False)
    model.save_pretrained(tmp_path)
    for name, head in HEADS.items():
        with torch.no_grad():
            own = MultiTaskHeads.from_pretrained(tmp_path / name)(**twin.batch()).logits
        torch.testing.assert_close(outputs(model, tasks=name).logits[:, : head.num_labels], own, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ tasks that are loaded or added


def stock_lora(base_folder, folder, seed=5, **options):
    """A LoRA that was trained by others, without a head."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModel.from_pretrained(base_folder), twin.lora_config(init_lora_weights=False, **options)
    )
    model.save_pretrained(folder)
    return model.eval()


@both_levels
@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 4, "target_modules": ["query"], "use_rslora": True},
        *[
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({}, {"r": 3, "lora_alpha": 4}, {"target_modules": ["query"]}, {"upper": True})
        ],
    ],
)
def test_loras_of_others_are_loaded(base_folder, tmp_path, level, options):
    model = stored(base_folder, level=level, stage="tasks")
    before = outputs(model).logits
    stock = stock_lora(base_folder, tmp_path / "other", **options)
    model.load_task("mood", str(tmp_path / "other"))
    inputs = twin.batch()
    with torch.no_grad():
        hidden = stock(**inputs).last_hidden_state
        found = model.pooled_outputs(**inputs)[:, 1]
    for row in range(5):
        own = twin.pool_row(hidden[row], inputs["attention_mask"][row], model.pooling)
        torch.testing.assert_close(found[row], own, rtol=1e-5, atol=1e-5)
    others = [row for row, task in enumerate(TASKS) if task != 1]
    torch.testing.assert_close(outputs(model).logits[others], before[others], rtol=1e-6, atol=1e-6)
    # And the fused model computes with it, is saved, and loads.
    twin.randomise(model, {"fusion"})
    model.set_stage("fusion")
    expected = twin.run(twin.parts_of(model), inputs, TASKS, stage="fusion", level=level)
    sizes = [head.num_labels for head in HEADS.values()]
    fused = outputs(model).logits
    for row, (own, task) in enumerate(zip(expected.logits, TASKS, strict=True)):
        torch.testing.assert_close(fused[row, : sizes[task]].double(), own.detach(), rtol=1e-4, atol=2e-5)
    model.save_pretrained(tmp_path / "fused")
    loaded = AttentionFusionModel.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(outputs(loaded).logits, fused, rtol=0, atol=1e-6)


def test_a_task_brings_the_head_that_lies_beside_its_lora(base_folder, tmp_path):
    trained = stored(base_folder, stage="tasks", seed=11)
    trained.save_pretrained(tmp_path)
    model = stored(base_folder, stage="tasks", seed=12)
    before = outputs(model, tasks="topic").logits
    model.load_task("mood", str(tmp_path / "mood"))
    torch.testing.assert_close(
        outputs(model, tasks="mood").logits, outputs(trained, tasks="mood").logits, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(outputs(model, tasks="topic").logits, before, rtol=1e-6, atol=1e-6)


@both_levels
@pytest.mark.parametrize("adapter", [False, True], ids=["fresh", "loaded"])
def test_an_added_task_leaves_the_others_unchanged(base_folder, tmp_path, level, adapter):
    model = stored(base_folder, level=level, stage="fusion")
    before = outputs(model, return_attention=True)
    options = {}
    if adapter:
        stock_lora(base_folder, tmp_path / "other", r=3)
        options["adapter"] = str(tmp_path / "other")
    model.add_task("new", TaskHead(6), **options)
    assert list(model.heads) == [*NAMES, "new"]
    assert model.registry().names == (*NAMES, "new")
    after = outputs(model, return_attention=True)
    torch.testing.assert_close(after.logits[:, :5], before.logits[:, :5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.attention[:, :3], before.attention, rtol=1e-5, atol=1e-6)
    assert not after.attention[:, 3].any()
    inputs = twin.batch()
    fresh = outputs(model, inputs, tasks="new").logits
    assert fresh.shape == (5, 6)
    model.save_pretrained(tmp_path / "fused")
    loaded = AttentionFusionModel.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(outputs(loaded).logits, outputs(model).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(loaded, tasks="new").logits, fresh, rtol=0, atol=1e-6)


@both_levels
def test_training_an_added_task_leaves_the_models_of_the_others_unchanged(base_folder, level):
    model = stored(base_folder, level=level, stage="tasks")
    before = outputs(model).logits
    model.add_task("new", TaskHead(4))
    fresh = outputs(model, tasks="new").logits
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(**twin.batch(), tasks="new", labels=twin.encoded(model, "new", [0, 1, 2, 3, 0])).loss.backward()
        optimizer.step()
    assert not torch.allclose(outputs(model, tasks="new").logits, fresh, rtol=0, atol=1e-3)
    torch.testing.assert_close(outputs(model).logits[:, :5], before[:, :5], rtol=1e-6, atol=1e-6)
    # A first fusion begins with all models as they are.
    model.set_stage("fusion")
    twin.silence(model)
    trained = outputs(model, tasks="new").logits
    model.set_stage("tasks")
    torch.testing.assert_close(outputs(model, tasks="new").logits, trained, rtol=1e-6, atol=1e-6)


@both_levels
def test_others_listen_to_an_added_task_when_told_to(base_folder, tmp_path, level):
    model = stored(base_folder, level=level, stage="fusion")
    before = outputs(model).logits[:, :5]
    model.add_task("new", TaskHead(4))
    twin.randomise(model, {"own_classifier"}, seed=4)
    for stage in ("tasks", "joint", "fusion"):
        model.set_stage(stage)
    if level == "output":
        # What became of the heads in stage joint is theirs; the fusion is as it was.
        torch.testing.assert_close(outputs(model).logits[:, :5], before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AttentionFusionModel.from_pretrained(tmp_path)
    for one in (model, loaded):
        assert not outputs(one, return_attention=True).attention[:, 3].any()
        one.let_all_listen()
        assert (outputs(one, return_attention=True).attention[:, 3] > 0).all()
    torch.testing.assert_close(outputs(loaded).logits, outputs(model).logits, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ wrong folders


def damaged(folder, **changed):
    """Changes fields of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_dora": True}, NotImplementedError, "dora"),
        ({"bias": "lora_only"}, NotImplementedError, "bias"),
        ({"lora_bias": True}, NotImplementedError, "lora_bias"),
        ({"modules_to_save": ["dense"]}, NotImplementedError, "modules_to_save|trained modules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_loras_that_are_more_than_a_low_rank_update_are_refused(base_folder, tmp_path, options, error, message):
    if "modules_to_save" in options:
        options = {**options, "target_modules": ["query"]}
    stock_lora(base_folder, tmp_path / "other", **options)
    model = stored(base_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model.load_task("mood", str(tmp_path / "other"))
    assert unchanged(model, before)
    with pytest.raises(error, match=message):
        AttentionFusionConfig(task_names=["a"], num_labels={"a": 2}, lora=LoraConfig(**options))


def unchanged(model, before):
    after = model.state_dict()
    same = [torch.allclose(after[name], value, rtol=0, atol=0, equal_nan=True) for name, value in before.items()]
    return list(after) == list(before) and all(same)


def test_other_methods_are_refused(base_folder, tmp_path):
    config = IA3Config(target_modules=["key"], feedforward_modules=[])
    get_peft_model(AutoModel.from_pretrained(base_folder), config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="IA3"):
        stored(base_folder).load_task("mood", str(tmp_path / "other"))


def test_loras_of_another_base_are_refused(base_folder, tmp_path):
    wider = twin.base_model("bert", hidden_size=32, intermediate_size=48)
    wider.save_pretrained(tmp_path / "wider")
    stock_lora(tmp_path / "wider", tmp_path / "other")
    # The name alone must not decide: the same LoRA under this base's name has other shapes.
    model = stored(base_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of the base .*wider, expected one of"):
        model.load_task("mood", str(tmp_path / "other"))
    damaged(tmp_path / "other", base_model_name_or_path=str(base_folder))
    with pytest.raises(ValueError, match=r"factors of shape .* It is of another base model"):
        model.load_task("mood", str(tmp_path / "other"))
    assert unchanged(model, before)


def test_loras_of_a_base_of_another_name_are_refused(base_folder, tmp_path):
    stock_lora(base_folder, tmp_path / "other")
    damaged(tmp_path / "other", base_model_name_or_path="somebody/else")
    with pytest.raises(ValueError, match="somebody/else"):
        stored(base_folder).load_task("mood", str(tmp_path / "other"))


def test_loras_of_linears_that_the_base_lacks_are_refused(base_folder, tmp_path):
    deeper = twin.base_model("bert", num_hidden_layers=3)
    deeper.save_pretrained(tmp_path / "deeper")
    stock_lora(tmp_path / "deeper", tmp_path / "other")
    damaged(tmp_path / "other", base_model_name_or_path=str(base_folder))
    model = stored(base_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"adapts encoder\.layer\.2.*expected layers that the base model has"):
        model.load_task("mood", str(tmp_path / "other"))
    assert unchanged(model, before)


def test_label_sets_that_do_not_match_the_head_are_refused(base_folder, tmp_path):
    heads = {**HEADS, "mood": TaskHead(4)}
    stored(base_folder, heads=heads).save_pretrained(tmp_path)
    model = stored(base_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="head"):
        model.load_task("mood", str(tmp_path / "mood"))
    assert unchanged(model, before)


def test_names_of_classes_count_as_the_label_set(base_folder, tmp_path):
    named = {**HEADS, "mood": TaskHead(5, id2label=("a", "b", "c", "d", "e"))}
    other = {**HEADS, "mood": TaskHead(5, id2label=("a", "b", "c", "e", "d"))}
    stored(base_folder, heads=other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`head of task mood`: got id2label"):
        stored(base_folder, heads=named).load_task("mood", str(tmp_path / "mood"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, folder: model.load_task("who", str(folder)), "who"),
        (lambda model, folder: model.load_task("mood", str(folder / "nothing")), "nothing"),
        (lambda model, folder: model.add_task("mood", TaskHead(2)), "mood"),
        (lambda model, folder: model.add_task("a/b", TaskHead(2)), "safe as file names"),
        (lambda model, folder: model.add_task("new", 3), "TaskHead"),
        (lambda model, folder: model.set_stage("both"), "`stage`: got both"),
    ],
)
def test_wrong_calls_are_named_and_change_nothing(base_folder, tmp_path, call, message):
    model = stored(base_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(model, tmp_path)
    assert unchanged(model, before)
    assert list(model.heads) == NAMES


def test_a_task_whose_lora_is_refused_is_not_added(base_folder, tmp_path):
    stock_lora(base_folder, tmp_path / "other", use_dora=True)
    model = stored(base_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match="dora"):
        model.add_task("new", TaskHead(2), adapter=str(tmp_path / "other"))
    assert unchanged(model, before)
    assert list(model.heads) == NAMES
    assert list(model.fusion_config.heads) == NAMES


@pytest.mark.parametrize("level", ["output", "layer"])
def test_a_task_that_was_loaded_late_starts_as_its_own_model(base_folder, tmp_path, level):
    """Its head is that of its own model also where others have begun with fusion."""
    stored(base_folder, stage="tasks", seed=11).save_pretrained(tmp_path)
    model = stored(base_folder, level=level, stage="fusion", random=False)
    model.load_task("mood", str(tmp_path / "mood"))
    fused = outputs(model, tasks="mood").logits
    model.set_stage("tasks")
    torch.testing.assert_close(fused, outputs(model, tasks="mood").logits, rtol=1e-6, atol=1e-6)


def remove(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def resave(folder, change):
    path = folder / "fusion.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors):
    return sorted(tensors)[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: remove(folder, "fusion_config.json"), "fusion_config.json"),
        (lambda folder: remove(folder, "fusion.safetensors"), "fusion.safetensors"),
        (lambda folder: remove(folder, "task_heads.json"), "task_heads.json"),
        (lambda folder: remove(folder, "mood"), "mood"),
        (lambda folder: remove(folder, "mood/adapter_model.safetensors"), "mood"),
        (lambda folder: (folder / "fusion_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "fusion_config.json").write_text("[]"), "fusion_config.json"),
        (lambda folder: (folder / "fusion.safetensors").write_bytes(b"0"), "cannot be read"),
        (lambda folder: resave(folder, lambda tensors: tensors.pop(first(tensors))), "fusion|read"),
        (lambda folder: resave(folder, lambda tensors: tensors.update(x=torch.ones(1))), "fusion|read"),
        (
            lambda folder: resave(folder, lambda tensors: tensors.update({first(tensors): torch.ones(1)})),
            "fusion|read",
        ),
    ],
)
def test_damaged_folders_are_refused(base_folder, tmp_path, damage, message):
    stored(base_folder).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        AttentionFusionModel.from_pretrained(tmp_path)


def test_another_base_is_refused(base_folder, tmp_path):
    stored(base_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Invalid `base`: got .*'hidden_size': 32.*expected .*'hidden_size': 16"):
        AttentionFusionModel.from_pretrained(tmp_path, base=twin.base_model("bert", hidden_size=32))
    with pytest.raises(ValueError, match=r"Invalid `base`: got .*gpt2.*expected .*bert"):
        AttentionFusionModel.from_pretrained(tmp_path, base=twin.base_model("gpt2"))
