"""Distillation as its definition reads: in float64, full logits of both models, row by row; and what to run it on."""

import contextlib

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig

from hf_curriculum import CurriculumConfig, DistillationConfig
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_tokenizer


TOKENIZER = build_tokenizer()
CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False}
# Rows of very different length, so that every micro-batch has another number of labelled tokens.
STEPS = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "seed": 3}
# Large enough for the student to be another model than its teacher after one step, without a rounding to speak of.
MOVING = {"learning_rate": 2e-2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def llama(seed=0, hidden=32, tied=False, vocabulary=None, **config):
    """A Llama of two blocks whose logits are far from uniform, so that divergences are large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary or len(TOKENIZER),
                hidden_size=hidden,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=tied,
                pad_token_id=TOKENIZER.pad_token_id,
                eos_token_id=TOKENIZER.eos_token_id,
                bos_token_id=None,
                initializer_range=0.3,
                **config,
            )
        )


def lora(model, **config):
    """The model with an adapter that already does something."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**{**settings, **config}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def sft_arguments(folder, **kwargs):
    return SFTConfig(output_dir=str(folder), **{**CPU, **STEPS, **MOVING, **kwargs})


def arguments(folder, **kwargs):
    return TrainingArguments(output_dir=str(folder), **{**CPU, **STEPS, **MOVING, **kwargs})


def sft_trainer(cls, folder, model, distillation, rows=24, eval_rows=None, curriculum=None, **kwargs):
    """An SFT trainer over rows of the demo's corpus."""
    names = sft_arguments(folder).__dataclass_fields__
    given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    if curriculum is not None:
        kwargs["curriculum"] = CurriculumConfig(
            **{"scorer": "length", "num_levels": 2, "use_cache": False, **curriculum}
        )
    if distillation is not None:
        kwargs["distillation"] = DistillationConfig(**distillation)
    return cls(
        model=model,
        args=sft_arguments(folder, **given),
        train_dataset=generate_corpus(rows, seed=0) if isinstance(rows, int) else rows,
        eval_dataset=generate_corpus(eval_rows, seed=1) if isinstance(eval_rows, int) else eval_rows,
        processing_class=TOKENIZER,
        **kwargs,
    )


class Recorder(TrainerCallback):
    """Keeps, for every optimizer step: the parameters before it, its micro-batches, its gradients."""

    def __init__(self, trainer):
        self.parameters, self.batches, self.gradients, self.losses = [], [], [], []
        original = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            if trainer.model.training:
                self.batches[-1].append({n: v.clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)})
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.parameters.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        self.batches.append([])

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(
            {
                name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
                for name, value in model.named_parameters()
                if value.requires_grad
            }
        )

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append({name: logs.get(name) for name in ("loss", "ce_loss", "kd_loss")})


def double(build, values=None):
    """A model like `build()` in float64, in evaluation mode, with other values."""
    model = build()
    if values is not None:
        model.load_state_dict(values)
    return model.double().eval()


def labelled_logits(model, batch):
    """Logits and labels of the positions that predict a label."""
    passed = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    # Without a cache: with one, transformers takes packed rows for a single one.
    logits = model(**passed, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return logits[labels != -100], labels[labels != -100]


def divergence(student, teacher, kind, temperature, beta=0.5):
    """D of two sets of logits `(N, V)`, one value per row."""
    p, q = (F.softmax(logits / temperature, dim=-1) for logits in (student, teacher))

    def kl(first, second):
        return (first * (first.log() - second.log())).sum(dim=-1)

    if kind == "jsd":
        mixture = (1 - beta) * p + beta * q
        return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    return kl(q, p) if kind == "forward_kl" else kl(p, q)


def with_tail(student, teacher, k, temperature):
    """Forward KL over the teacher's k likeliest tokens and one outcome for all others."""
    p, q = (F.softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    top, indices = q.topk(k, dim=-1)
    chosen = p.gather(-1, indices)
    q = torch.cat([top, (1 - top.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
    p = torch.cat([chosen, (1 - chosen.sum(-1, keepdim=True)).clamp(min=1e-300)], dim=-1)
    return torch.where(q > 0, q * (q.clamp(min=1e-300).log() - p.log()), 0).sum(dim=-1)


def step(student, teacher, batches, alpha, temperature=1.0, kind="forward_kl", beta=0.5, top_k=None):
    """Loss, CE and T^2 D of one optimizer step, means over the labelled tokens of all its micro-batches."""
    ces, kds = [], []
    for batch in batches:
        logits, labels = labelled_logits(student, batch)
        ces.append(F.cross_entropy(logits, labels, reduction="none"))
        if teacher is None:
            kds.append(torch.zeros_like(ces[-1]))
            continue
        with torch.no_grad():
            signal, _ = labelled_logits(teacher, batch)
        if top_k is None:
            distance = divergence(logits, signal, kind, temperature, beta)
        else:
            distance = with_tail(logits, signal, top_k, temperature)
        kds.append(temperature**2 * distance)
    ce, kd = torch.cat(ces), torch.cat(kds)
    weights = torch.as_tensor(alpha, dtype=torch.float64)
    return ((1 - weights) * ce + weights * kd).mean(), ce.mean(), kd.mean()


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def assert_close(found, expected, tolerance=1e-4):
    """Gradients by name, relative to the largest of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[name].double(), value, rtol=0, atol=tolerance * max(scale, 1e-6), msg=lambda text, n=name: n + text
        )


@contextlib.contextmanager
def untouched(model):
    """Fails if a mode or a flag of the model is another one afterwards."""

    def look():
        return (
            {name: module.training for name, module in model.named_modules()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        )

    before = look()
    yield
    after = look()
    assert before[:2] == after[:2]
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())
