"""Teachers leave the student as it was, and stay as they are while it learns."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_curriculum.core.head import causal_lm_head
from hf_curriculum.distillation.forward import install
from hf_curriculum.distillation.teacher import AdapterOffTeacher, LiveTeacher, ModelTeacher, SnapshotTeacher
from hf_curriculum.trainers import CurriculumSFTTrainer, KDSFTTrainer


_spec = importlib.util.spec_from_file_location("distillation_twin", Path(__file__).with_name("distillation_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)


def batch_of():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (3, 9), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def student_of(kind):
    student = twin.llama(attention_dropout=0.3)
    if kind == "full":
        return student
    extra = {"modules_to_save": ["lm_head"]} if kind == "lora-trained-head" else {}
    return twin.lora(student, lora_dropout=0.3, **extra)


TEACHERS = {
    "snapshot": lambda model: SnapshotTeacher(model, causal_lm_head(model)),
    "snapshot-float32": lambda model: SnapshotTeacher(model, causal_lm_head(model), torch.float32),
    "live": lambda model: LiveTeacher(),
    "off": lambda model: AdapterOffTeacher(model, causal_lm_head(model)),
    "model": lambda model: other_teacher(),
}
PAIRS = [
    (teacher, student)
    for teacher in TEACHERS
    for student in ("full", "lora", "lora-trained-head")
    if (teacher, student) != ("off", "full")
]


def other_teacher():
    model = twin.llama(5, hidden=48, attention_dropout=0.3)
    install(model)
    return ModelTeacher(model, causal_lm_head(model))


def made(kind, student):
    install(student)
    teacher = TEACHERS[kind](student)
    if isinstance(teacher, SnapshotTeacher):
        assert not teacher.ready
        teacher.capture()
    assert teacher.ready
    return teacher


def logits(teacher, student, batch):
    hidden = teacher.hidden(student, batch)
    with teacher.head() as head:
        return causal_lm_head(student).logits(hidden).detach() if head is None else hidden @ head.weight.T


@pytest.mark.parametrize(("kind", "student"), PAIRS)
def test_student_is_left_as_it_was(kind, student):
    model, batch = student_of(student), batch_of()
    teacher = made(kind, model)
    model.train()
    # Some modules of a model in training may be in evaluation mode, and some adapters frozen: by hand, or by others.
    model.get_submodule("base_model.model.model" if student != "full" else "model").layers[0].eval()
    frozen = [name for name, value in model.named_parameters() if "layers.0" in name and value.requires_grad]
    assert frozen
    for name, value in model.named_parameters():
        if name in frozen:
            value.requires_grad_(False)
    state = torch.get_rng_state()
    with twin.untouched(model):
        hidden = teacher.hidden(model, batch)
        with teacher.head():
            pass
    assert torch.equal(torch.get_rng_state(), state)
    assert not hidden.requires_grad
    # No dropout: the same again.
    assert torch.equal(teacher.hidden(model, batch), hidden)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("kind", "student"), PAIRS)
def test_failure_in_the_teacher_s_forward_leaves_the_student_as_it_was(kind, student):
    model = student_of(student)
    teacher = made(kind, model)
    acting = teacher.model if kind == "model" else model
    model.train()
    # A whole teacher of other values, so that what is not put back shows.
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1)

    def fail(*_):
        raise RuntimeError("broken in the middle")

    layer = next(module for name, module in acting.named_modules() if name.endswith("layers.1"))
    handle = layer.register_forward_hook(fail)
    with twin.untouched(model), pytest.raises(RuntimeError, match="broken in the middle"):
        teacher.hidden(model, batch_of())
    handle.remove()
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert not any(module.disable_adapters for module in adapters)
    assert torch.is_grad_enabled()
    teacher.hidden(model, batch_of())


@pytest.mark.parametrize(("kind", "student"), [pair for pair in PAIRS if pair[0] != "live"])
def test_teacher_stays_while_the_student_moves(kind, student):
    model, batch = student_of(student), batch_of()
    teacher = made(kind, model)
    before = logits(teacher, model, batch)
    expected = None
    if kind == "off":
        expected = twin.llama()(**{n: v for n, v in batch.items() if n != "labels"}).logits[:, :-1]
        expected = expected[batch["labels"][:, 1:] != -100]
        torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-4)
    own = LiveTeacher()
    at_start = logits(own, model, batch)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(own, model, batch), at_start)
    assert torch.equal(logits(teacher, model, batch), before)
    if kind.startswith("snapshot"):
        assert torch.equal(before, at_start)
        teacher.capture()
        assert torch.equal(logits(teacher, model, batch), logits(own, model, batch))
        teacher.forget()
        assert not teacher.ready


def test_block_that_is_frozen_when_the_snapshot_is_taken_is_in_it():
    # It wakes up later: the teacher's is the old one all the same.
    model, batch = student_of("full"), batch_of()
    install(model)
    teacher = SnapshotTeacher(model, causal_lm_head(model))
    model.model.layers[1].requires_grad_(False)
    teacher.capture()
    before = logits(teacher, model, batch)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(1.0)
    assert torch.equal(logits(teacher, model, batch), before)


def test_frozen_parts_are_not_copied():
    model = student_of("lora")
    teacher = made("snapshot", model)
    learned = sum(value.numel() * 4 for value in model.parameters() if value.requires_grad)
    assert teacher.snapshot.nbytes == learned


class Watch(TrainerCallback):
    """Keeps what the teacher says about one batch after every step."""

    def __init__(self):
        self.seen, self.trainer = [], None

    def on_step_end(self, args, state, control, **kwargs):
        teacher = self.trainer._keeper.teacher
        self.seen.append(None if teacher is None else logits(teacher, self.trainer.model, batch_of()))


@pytest.mark.parametrize("student", ["full", "lora-trained-head"])
def test_teacher_s_logits_are_the_same_through_a_whole_stage(tmp_path, student):
    watch = Watch()
    watch.trainer = trainer = twin.sft_trainer(
        CurriculumSFTTrainer, tmp_path, student_of(student), {"teacher": "previous_stage"}, rows=18, max_steps=-1,
        num_train_epochs=1, curriculum={"num_levels": 3}, callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    first, second, third = trainer.stages
    # The callbacks of a user come before the refresh of a stage end.
    assert all(value is None for value in watch.seen[: first.end_step])
    in_second = watch.seen[first.end_step : second.end_step]
    in_third = watch.seen[second.end_step : third.end_step]
    for values in (in_second, in_third):
        assert len(values) > 1
        assert all(torch.equal(value, values[0]) for value in values)
    assert not torch.equal(in_second[0], in_third[0])


def test_adapter_frozen_by_hand_stays_frozen_in_a_run(tmp_path):
    model = twin.lora(twin.llama())
    frozen = [name for name, value in model.named_parameters() if "lora_" in name and "layers.0" in name]
    for name, value in model.named_parameters():
        if name in frozen:
            value.requires_grad_(False)
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, model, {"teacher": "base"})
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    for name, value in model.named_parameters():
        assert value.requires_grad == ("lora_" in name and name not in frozen)
        assert torch.equal(value, before[name]) == (not value.requires_grad), name


def test_model_teacher_is_no_part_of_the_run(tmp_path):
    teacher = twin.llama(5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = twin.sft_trainer(
        KDSFTTrainer, tmp_path, twin.llama(), {"teacher": teacher}, save_strategy="steps", save_steps=2
    )
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(value.requires_grad or value.grad is not None for value in teacher.parameters())
    assert not list(tmp_path.rglob("*teacher*"))
    held = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert not held & {id(value) for value in teacher.parameters()}


def test_teacher_file_holds_what_learns(tmp_path):
    trainer = twin.sft_trainer(
        KDSFTTrainer, tmp_path, twin.lora(twin.llama()), {"teacher": "ema", "ema_decay": 0.5},
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    values = load_file(tmp_path / "checkpoint-2" / "hf_curriculum_teacher.safetensors")
    assert set(values) == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    held = trainer._keeper.teacher.snapshot.state()
    assert all(torch.equal(value, held[name]) for name, value in values.items())


def test_two_adapters_and_the_one_that_learns(tmp_path):
    model = twin.lora(twin.llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("default")
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    trainer = twin.sft_trainer(KDSFTTrainer, tmp_path, model, {"teacher": "base"})
    trainer.train()
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert model.active_adapter == "default"
