"""CGC-LoRA as its definition reads: in float64, expert by expert, token by token; and small models of three kinds."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_curriculum.multitask.cgc_lora import CGCLoraConfig
from hf_curriculum.multitask.cgc_lora.experts import CGCExperts


VOCABULARY = 48


def _normalised(logits: list[torch.Tensor], config: CGCLoraConfig) -> list[torch.Tensor]:
    if len(logits) == 0:
        return []
    powers = [torch.exp(logit / config.gate_temperature) for logit in logits]
    factor = len(logits) if config.gate_normalization == "sum_to_n" else 1
    return [factor * power / sum(powers) for power in powers]


def _logits(p: dict[str, torch.Tensor], config: CGCLoraConfig, task: int, token: torch.Tensor) -> list[torch.Tensor]:
    visible = config.num_common_experts + config.num_task_experts
    if visible == 1:
        return [torch.zeros((), dtype=torch.float64)]
    if config.gate == "task":
        return [p["gate_logits"][task, e] for e in range(visible)]
    if config.gate == "task_embedding":
        return [(p["task_embedding"][task] * p["gate_projection"][e]).sum() for e in range(visible)]
    return [(p["token_gate"][task, e] * token).sum() for e in range(visible)]


def _one(p: dict[str, torch.Tensor], config: CGCLoraConfig, task: int, token: torch.Tensor) -> torch.Tensor:
    """The update of one token under one task in [0, T)."""
    gates = _normalised(_logits(p, config, task, token), config)
    scale = config.lora_alpha / config.r
    update = torch.zeros(p["B"].shape[0], dtype=torch.float64)
    for number, gate in enumerate(gates):
        own = number - config.num_common_experts
        expert = number if own < 0 else config.num_common_experts + task * config.num_task_experts + own
        update = update + scale * gate * _expert(p, config, expert, token, [task])
    return update


def _expert(
    p: dict[str, torch.Tensor], config: CGCLoraConfig, expert: int, token: torch.Tensor, tasks: list[int]
) -> torch.Tensor:
    r = config.r
    down = p["A"] if config.shared_down_projection else p["A"][expert * r : (expert + 1) * r]
    z = down @ token
    if config.task_matrix:
        z = sum(p["task_matrix"][task] for task in tasks) / len(tasks) @ z
    return p["B"][:, expert * r : (expert + 1) * r] @ z


def expert_loop(p: dict[str, torch.Tensor], config: CGCLoraConfig, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, S, d_in) and ids (B, S) in [-2, T) -> (B, S, d_out)."""
    everyone = list(range(len(config.task_names)))
    rows = []
    for row, row_ids in zip(x, ids.tolist()):
        tokens = []
        for token, task in zip(row, row_ids):
            if task >= 0:
                tokens.append(_one(p, config, task, token))
            elif task == -1:
                each = [_logits(p, config, t, token)[: config.num_common_experts] for t in everyone]
                mean = [sum(column) / len(everyone) for column in zip(*each)]
                scale = config.lora_alpha / config.r
                parts = [
                    scale * gate * _expert(p, config, e, token, everyone)
                    for e, gate in enumerate(_normalised(mean, config))
                ]
                tokens.append(sum(parts, torch.zeros(p["B"].shape[0], dtype=torch.float64)))
            elif config.task_matrix:
                gates = [_normalised(_logits(p, config, t, token), config) for t in everyone]
                mean = [sum(column) / len(everyone) for column in zip(*gates)]
                scale = config.lora_alpha / config.r
                tokens.append(sum(scale * g * _expert(p, config, e, token, everyone) for e, g in enumerate(mean)))
            else:
                tokens.append(sum(_one(p, config, t, token) for t in everyone) / len(everyone))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def parameters(experts: CGCExperts) -> dict[str, torch.Tensor]:
    """Copies of the parameters in float64, leaves of a graph of their own."""
    return {name: value.detach().double().requires_grad_() for name, value in experts.named_parameters()}


def tiny_llama(**kwargs: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        **kwargs,
    )
    return LlamaForCausalLM(config)


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


# Kind -> (model, target modules, task type).
MODELS: dict[str, tuple[type | object, list[str], str]] = {
    "llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM"),
    "bert": (tiny_bert, ["query", "value", "dense"], "SEQ_CLS"),
    "t5": (tiny_t5, ["q", "v", "wo"], "SEQ_2_SEQ_LM"),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc"], "CAUSAL_LM"),
}


def batch(kind: str, rows: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, 3, (rows,), generator=generator) if kind == "bert" else ids
    return {**inputs, "labels": labels}


def base_model(kind: str) -> PreTrainedModel:
    return MODELS[kind][0]().eval()


def make_config(kind: str = "llama", **kwargs: object) -> CGCLoraConfig:
    _, targets, task_type = MODELS[kind]
    fields = {
        "task_names": ["a", "b", "c"],
        "num_common_experts": 2,
        "num_task_experts": 1,
        "r": 2,
        "lora_alpha": 8,
        "target_modules": list(targets),
        "task_type": task_type,
        "init_weights": False,
    }
    return CGCLoraConfig(**{**fields, **kwargs})
