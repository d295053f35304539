"""What the tests of trainers on several tasks share: rows, a small model, and a trainer of both."""

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_curriculum import CurriculumMixin
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.multitask.cgc_lora.config import CGCLoraConfig
from hf_curriculum.multitask.config import MultiTaskConfig
from hf_curriculum.multitask.mixin import MultiTaskMixin
from hf_curriculum.trainers import MultiTaskSFTTrainer


NAMES = ["sum", "sort", "echo"]
CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "output_dir": "out"}


class CurriculumMultiTaskTrainer(MultiTaskMixin, CurriculumMixin, SFTTrainer):
    pass


def language_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def text_rows(count=24, seed=0, names=NAMES):
    corpus = generate_corpus(count, seed=seed)
    tasks = [names[min(index % 5, 2)] for index in range(count)]
    return Dataset.from_dict({"prompt": corpus["prompt"], "completion": corpus["completion"], "task": tasks})


def cgc(**options):
    return CGCLoraConfig(task_names=NAMES, init_weights=False, task_type="CAUSAL_LM", **options)


def make_trainer(
    tokenizer,
    args=None,
    multitask=None,
    rows=None,
    eval_rows=None,
    peft_config=None,
    cls=MultiTaskSFTTrainer,
    **kwargs,
):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1, "max_length": 160}
    return cls(
        model=kwargs.pop("model", None) or language_model(tokenizer),
        args=SFTConfig(**{**CPU, "bf16": False, "gradient_checkpointing": False, **settings, **(args or {})}),
        train_dataset=text_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        multitask=MultiTaskConfig(**(multitask or {})),
        **kwargs,
    )


def seen_batches(trainer):
    """Every batch as the model's caller gets it."""
    seen = []
    original = trainer.training_step

    def step(model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = step
    trainer.train()
    return seen


def row_task_pairs(trainer):
    registry = trainer.task_registry
    return {
        tuple(ids): registry.id(task)
        for ids, task in zip(trainer.train_dataset["input_ids"], trainer.train_dataset["task"], strict=True)
    }
