"""Classifiers and sequence-to-sequence models with a teacher, against the same by hand."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_curriculum import CurriculumConfig, DistillationConfig
from hf_curriculum.trainers import CurriculumTrainer, KDTrainer


VOCABULARY = 40
CLASSES = 3
ALPHA, TEMPERATURE = 0.4, 2.0


def bert(cls, seed=0, hidden=32, **config):
    torch.manual_seed(seed)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.3}
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {"num_labels": CLASSES, **settings, **without_dropout, **config}
    return cls(BertConfig(vocab_size=VOCABULARY, hidden_size=hidden, **config))


def sequence(seed=0, **config):
    return bert(BertForSequenceClassification, seed, **config)


def several(seed=0):
    return bert(BertForSequenceClassification, seed, problem_type="multi_label_classification")


def tokens(seed=0):
    return bert(BertForTokenClassification, seed)


def t5(seed=0):
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, initializer_factor=1.5,
        )
    )  # fmt: skip


def bart(seed=0):
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, attention_dropout=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.3,
        )
    )  # fmt: skip
    # A bias that the head itself does not hold.
    model.final_logits_bias = torch.linspace(-1, 1, VOCABULARY).unsqueeze(0)
    return model


KINDS = {"sequence": sequence, "several": several, "tokens": tokens, "t5": t5, "bart": bart}


def rows(kind, number=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    lengths = draw(4, 10, number).tolist()
    data = {"input_ids": [draw(3, VOCABULARY, length).tolist() for length in lengths]}
    if kind == "sequence":
        data["labels"] = draw(0, CLASSES, number).tolist()
    elif kind == "several":
        data["labels"] = draw(0, 2, number, CLASSES).float().tolist()
    else:
        high = CLASSES if kind == "tokens" else VOCABULARY
        data["labels"] = [draw(0, high, length).tolist() for length in lengths]
        for labels in data["labels"]:
            labels[0] = -100
    return Dataset.from_dict(data)


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in batch])

    inputs = {"input_ids": padded("input_ids", 0)}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    ragged = isinstance(batch[0]["labels"], list) and isinstance(batch[0]["labels"][0], int)
    inputs["labels"] = padded("labels", -100) if ragged else torch.tensor([row["labels"] for row in batch])
    return inputs


def trainer_of(cls, folder, kind, model, distillation, number=12, **kwargs):
    names = TrainingArguments.__dataclass_fields__
    settings = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 3,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "logging_steps": 1, "max_grad_norm": 0.0,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "bf16": False,
    }  # fmt: skip
    settings |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    if distillation is not None:
        kwargs["distillation"] = DistillationConfig(**{"alpha": ALPHA, "temperature": TEMPERATURE, **distillation})
    return cls(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=kwargs.pop("train_dataset", None) or rows(kind, number),
        eval_dataset=rows(kind, 7, seed=1),
        data_collator=collate,
        **kwargs,
    )


class Recorder(TrainerCallback):
    """Keeps the parameters, micro-batches, gradients and logs of every optimizer step."""

    def __init__(self, trainer):
        self.parameters, self.batches, self.gradients, self.losses = [], [], [], []
        original = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            if trainer.model.training:
                self.batches[-1].append({name: value.clone() for name, value in inputs.items()})
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.parameters.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        self.batches.append([])

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: v.grad.clone() for n, v in model.named_parameters() if v.grad is not None})

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs)


def twin_losses(model, teacher, batch, temperature=TEMPERATURE):
    """CE and T^2 KL(teacher || student) of each labelled item, in float64."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    if inputs["labels"].is_floating_point():
        inputs["labels"] = inputs["labels"].double()
    logits, labels = model(**inputs).logits, inputs["labels"]
    with torch.no_grad():
        signal = None if teacher is None else teacher(**inputs).logits
    if labels.is_floating_point():
        ce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        if signal is None:
            return ce, torch.zeros_like(ce)
        p, q = (torch.sigmoid(values / temperature) for values in (logits, signal))
        kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        return ce, temperature**2 * kl.mean(-1)
    chosen = labels != -100
    ce = F.cross_entropy(logits[chosen], labels[chosen], reduction="none")
    if signal is None:
        return ce, torch.zeros_like(ce)
    p, q = (F.softmax(values[chosen] / temperature, dim=-1) for values in (logits, signal))
    return ce, temperature**2 * (q * (q.log() - p.log())).sum(-1)


def double(build, values=None):
    model = build()
    if values is not None:
        model.load_state_dict(values)
    return model.double().eval()


def check(trainer, recorder, build, teacher_of_step, whole_step):
    for number, values in enumerate(recorder.parameters):
        model, teacher = double(build, values), teacher_of_step(number)
        pairs = [twin_losses(model, teacher, batch) for batch in recorder.batches[number]]
        alpha = 0.0 if teacher is None else ALPHA
        parts = [(1 - alpha) * ce + alpha * kd for ce, kd in pairs]
        expected = torch.cat(parts).mean() if whole_step else torch.stack([part.mean() for part in parts]).mean()
        ce, kd = (torch.cat(values).mean().item() for values in zip(*pairs, strict=True))
        assert recorder.losses[number]["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert recorder.losses[number]["ce_loss"] == pytest.approx(ce, rel=1e-5)
        if teacher is not None:
            assert recorder.losses[number]["kd_loss"] == pytest.approx(kd, rel=1e-3, abs=1e-5)
        expected.backward()
        wanted = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        # Of the whole model: the bias of keys, for one, has a gradient of zero but for rounding.
        scale = max(value.abs().max().item() for value in wanted.values())
        assert wanted.keys() == recorder.gradients[number].keys()
        for name, gradient in recorder.gradients[number].items():
            torch.testing.assert_close(gradient.double(), wanted[name], rtol=0, atol=3e-5 * scale)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_by_hand(tmp_path, kind, accumulation):
    build = KINDS[kind]
    trainer = trainer_of(
        KDTrainer, tmp_path, kind, build(), {"teacher": build(1)}, gradient_accumulation_steps=accumulation
    )
    recorder = Recorder(trainer)
    trainer.train()
    teacher = double(lambda: build(1))
    assert recorder.losses[0]["kd_loss"] > 1e-2
    assert all(len(batches) == accumulation for batches in recorder.batches[:2])
    # A model that does not take the number of labels of the step gives means of micro-batches, as without a teacher.
    check(trainer, recorder, build, lambda _: teacher, whole_step=trainer.model_accepts_loss_kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_loss_is_the_model_s_own(tmp_path, kind):
    build = KINDS[kind]
    ours = trainer_of(KDTrainer, tmp_path / "ours", kind, build(), {"teacher": build(1)})
    ours.train()
    plain = trainer_of(Trainer, tmp_path / "plain", kind, ours.model, None)
    metrics = ours.evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    student, teacher = double(build, ours.model.state_dict()), double(lambda: build(1))
    distances = [twin_losses(student, teacher, batch, 1.0)[1] for batch in ours.get_eval_dataloader()]
    assert metrics["eval_kl_to_teacher"] == pytest.approx(torch.cat(distances).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_metrics_see_the_student_s_logits(tmp_path, kind):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction
        return {}

    trainer = trainer_of(
        KDTrainer, tmp_path, kind, KINDS[kind](), {"teacher": KINDS[kind](1)}, compute_metrics=compute_metrics
    )
    trainer.train()
    trainer.evaluate()
    assert seen["logits"].shape == (*seen["labels"].shape, CLASSES)


@pytest.mark.parametrize("kind", ["sequence", "several", "tokens"])
def test_previous_stage_of_a_classifier(tmp_path, kind):
    build = KINDS[kind]
    trainer = trainer_of(
        CurriculumTrainer, tmp_path, kind, build(), {"teacher": "previous_stage"}, max_steps=-1, num_train_epochs=1,
        curriculum=CurriculumConfig(scorer="length", num_levels=2, use_cache=False),
    )  # fmt: skip
    recorder = Recorder(trainer)
    trainer.train()
    boundary = trainer.stages[0].end_step
    assert recorder.losses[-1]["kd_loss"] > 1e-5
    teacher = double(build, recorder.parameters[boundary])
    check(
        trainer, recorder, build, lambda number: teacher if number >= boundary else None,
        whole_step=trainer.model_accepts_loss_kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["sequence", "several", "tokens"])
def test_replayed_rows_of_a_classifier_alone_are_distilled(tmp_path, kind):
    build = KINDS[kind]
    trainer = trainer_of(
        CurriculumTrainer, tmp_path, kind, build(), {"teacher": "previous_stage", "distill_on": "replay"},
        max_steps=-1, num_train_epochs=1,
        curriculum=CurriculumConfig(scorer="length", num_levels=2, replay_fraction=0.5, use_cache=False),
    )  # fmt: skip
    recorder = Recorder(trainer)
    trainer.train()
    boundary = trainer.stages[0].end_step
    teacher = double(build, recorder.parameters[boundary])
    replayed = trainer.curriculum_plan.replayed.reshape(-1, 2)
    assert 0 < replayed[boundary:].sum() < replayed[boundary:].size
    for number in range(boundary, len(recorder.parameters)):
        (batch,) = recorder.batches[number]
        ce, kd = twin_losses(double(build, recorder.parameters[number]), teacher, batch)
        counts = (batch["labels"] != -100).sum(-1) if kind == "tokens" else torch.ones(2, dtype=torch.int64)
        weights = torch.from_numpy(replayed[number]).repeat_interleave(counts) * ALPHA
        expected = ((1 - weights) * ce + weights * kd).mean().item()
        assert recorder.losses[number]["loss"] == pytest.approx(expected, rel=1e-5)


def test_base_of_an_adapter_is_the_classifier_without_it(tmp_path):
    def build():
        return get_peft_model(
            sequence(), LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False, target_modules=["query"])
        )

    torch.manual_seed(0)
    model = build()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(KDTrainer, tmp_path, "sequence", model, {"teacher": "base"})
    recorder = Recorder(trainer)
    trainer.train()
    off = double(build, start)
    off.base_model.disable_adapter_layers()
    check(trainer, recorder, build, lambda _: off, whole_step=trainer.model_accepts_loss_kwargs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: sequence(num_labels=1), "Distillation of a regression is not supported"),
        (lambda: sequence(problem_type="regression"), "Distillation of a regression is not supported"),
        (lambda: bert(BertForMaskedLM), "Distillation of BertForMaskedLM is not supported"),
    ],
    ids=["one-label", "regression", "masked"],
)
def test_models_without_a_distribution_over_classes_are_refused(tmp_path, model, message):
    with pytest.raises(NotImplementedError, match=message):
        trainer_of(KDTrainer, tmp_path, "sequence", model(), {"teacher": "base"})


def test_cache_and_other_classes_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="A teacher cache for sequence classification"):
        trainer_of(KDTrainer, tmp_path, "sequence", sequence(), {"teacher": "base", "teacher_cache": "top_k"})
    with pytest.raises(ValueError, match="got BertForSequenceClassification with 5 classes, expected 3"):
        trainer_of(KDTrainer, tmp_path, "sequence", sequence(), {"teacher": sequence(num_labels=5)})


def test_base_of_a_prompt_is_refused_before_training(tmp_path):
    # Virtual tokens are no layers that could be switched off.
    model = get_peft_model(
        sequence(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=32, num_layers=2)
    )
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING"):
        trainer_of(KDTrainer, tmp_path, "sequence", model, {"teacher": "base"})
