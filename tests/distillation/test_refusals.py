"""Trainers that would train without their teacher, or against another one, are refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer
from trl import SFTTrainer

from hf_curriculum import DistillationConfig, DistillationMixin
from hf_curriculum.trainers import KDSFTTrainer, KDTrainer


_spec = importlib.util.spec_from_file_location("distillation_twin", Path(__file__).with_name("distillation_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)


def classifier():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=3))


def classified():
    ids = torch.randint(1, 40, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [row[0] % 3 for row in ids]})


@pytest.mark.parametrize("build", [classifier, lambda: twin.llama()], ids=["classifier", "causal"])
def test_model_init_is_refused(tmp_path, build):
    with pytest.raises(NotImplementedError, match=r"`model_init` is not supported.*`model=model_init\(\)`"):
        KDTrainer(
            model_init=build,
            args=twin.arguments(tmp_path),
            train_dataset=classified(),
            distillation=DistillationConfig(teacher="base"),
        )


class Weighted:
    """A loss of the user's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class WeightedTrainer(Weighted, Trainer):
    pass


class DistilledWeightedTrainer(DistillationMixin, WeightedTrainer):
    pass


def test_loss_of_a_classifier_s_trainer_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="the `compute_loss` of Weighted is not supported"):
        DistilledWeightedTrainer(
            model=classifier(),
            args=twin.arguments(tmp_path),
            train_dataset=classified(),
            distillation=DistillationConfig(teacher="base"),
        )


def test_loss_that_takes_the_labels_away_is_refused(tmp_path):
    ids = torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = DistilledWeightedTrainer(
        model=twin.llama(),
        args=twin.arguments(tmp_path),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 6] * 8}),
        distillation=DistillationConfig(teacher="base"),
    )
    with pytest.raises(NotImplementedError, match="calls the model without labels"):
        trainer.train()


class Scaled(SFTTrainer):
    """A trainer of the user's that adds to the loss that there is, and has an argument of its own."""

    def __init__(self, scale, *args, **kwargs):
        self.scale = scale
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return (loss[0] * self.scale, *loss[1:]) if isinstance(loss, tuple) else loss * self.scale


class DistilledScaledTrainer(DistillationMixin, Scaled):
    pass


def test_loss_on_top_of_the_distillation_is_kept(tmp_path):
    found = []
    for cls, own in ((KDSFTTrainer, {}), (DistilledScaledTrainer, {"scale": 3.0})):
        distillation = {"teacher": twin.llama(5), "alpha": 0.5}
        trainer = twin.sft_trainer(cls, tmp_path, twin.llama(), distillation, max_steps=1, **own)
        recorder = twin.Recorder(trainer)
        trainer.train()
        found.append(recorder.losses[0])
    assert found[1]["loss"] == pytest.approx(3 * found[0]["loss"], rel=1e-5)
    assert found[1]["kd_loss"] == pytest.approx(found[0]["kd_loss"], rel=1e-5)


def with_trained_norms():
    model = twin.lora(twin.llama())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "build", [lambda: twin.lora(twin.llama(attention_bias=True), bias="lora_only"), with_trained_norms]
)
def test_base_under_an_adapter_is_refused_where_more_than_the_adapter_learns(tmp_path, build):
    with pytest.raises(NotImplementedError, match="parameters that learn beside the adapter"):
        twin.sft_trainer(KDSFTTrainer, tmp_path, build(), {"teacher": "base"})


def test_folder_of_an_adapter_is_no_teacher(tmp_path):
    twin.lora(twin.llama()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="which holds an adapter, expected a whole model"):
        twin.sft_trainer(KDSFTTrainer, tmp_path, twin.llama(), {"teacher": str(tmp_path / "adapter")})


def test_adapter_object_as_teacher_is_named_by_its_class():
    with pytest.raises(ValueError, match="got PeftModelForCausalLM, expected one of"):
        DistillationConfig(teacher=twin.lora(twin.llama()))


def test_cache_covers_the_last_rows_where_training_drops_its_last_batch(tmp_path):
    trainer = twin.sft_trainer(
        KDSFTTrainer,
        tmp_path,
        twin.llama(),
        {"teacher": twin.llama(5), "teacher_cache": "top_k", "cache_top_k": 4},
        rows=21,
        max_steps=12,
        dataloader_drop_last=True,
    )
    trainer.train()
    assert trainer.state.global_step == 12
