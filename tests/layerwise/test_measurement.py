"""The change rate of blocks: against whole matrices in float64, for full fine-tuning, LoRA, DoRA and CGC-LoRA."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_curriculum import CGCLoraConfig
from hf_curriculum.layerwise.blocks import find_blocks
from hf_curriculum.layerwise.importance import signal_to_noise
from hf_curriculum.layerwise.measurement import ChangeMeter, low_rank_pairs, measure_signal_to_noise


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            attention_bias=True,
        )
    )  # fmt: skip


def move(model, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def double(tensor):
    return tensor.detach().double().numpy().copy()


def test_full_fine_tuning_counts_the_matrices_of_a_block():
    model = llama()
    blocks = find_blocks(model)
    matrices = {
        number: {name: double(p) for name, p in model.named_parameters() if name in block.parameters and p.dim() > 1}
        for number, block in enumerate(blocks.blocks)
    }
    meter = ChangeMeter(model, blocks)
    meter.start([0, 2])
    move(model)
    rates = meter.rates()
    named = dict(model.named_parameters())
    assert set(rates) == {0, 2}
    for number in rates:
        changed = sum(np.sum((double(named[name]) - was) ** 2) for name, was in matrices[number].items())
        size = sum(np.sum(was**2) for was in matrices[number].values())
        assert rates[number] == pytest.approx(np.sqrt(changed / size), rel=1e-6)
    assert meter.rates([0.5, 0.0, 0.0]) == {0: pytest.approx(2 * rates[0])}


def full_update(module, adapter="default"):
    """The weight that a LoRA or DoRA linear computes with, less its base weight's own part, in float64."""
    product = double(module.lora_B[adapter].weight) @ double(module.lora_A[adapter].weight)
    return module.scaling[adapter] * product


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_count_by_the_update_that_they_make(dora):
    targets = ["q_proj", "down_proj"]
    model = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=dora))
    move(model)
    blocks = find_blocks(model)
    linears = [
        [m for name, m in model.named_modules() if hasattr(m, "lora_A") and name.startswith(block.name)]
        for block in blocks.blocks
    ]
    before = [[full_update(linear) for linear in found] for found in linears]
    norms = [
        [double(linear.lora_magnitude_vector["default"].weight) if dora else 0.0 for linear in found]
        for found in linears
    ]
    meter = ChangeMeter(model, blocks)
    meter.start([1])
    move(model)
    changed, size = 0.0, 0.0
    for linear, was, norm in zip(linears[1], before[1], norms[1]):
        changed += np.sum((full_update(linear) - was) ** 2)
        if dora:
            changed += np.sum((double(linear.lora_magnitude_vector["default"].weight) - norm) ** 2)
        size += np.sum(double(linear.get_base_layer().weight) ** 2)
    assert len(linears[1]) == 2
    assert meter.rates() == {1: pytest.approx(np.sqrt(changed / size), rel=1e-6)}


def test_the_experts_of_cgc_lora_are_one_pair_of_factors():
    config = CGCLoraConfig(
        task_names=["a", "b"], r=2, lora_alpha=4, num_common_experts=1, num_task_experts=1,
        target_modules=["q_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(llama(), config)
    pairs = low_rank_pairs(model)
    assert len(pairs) == 3
    blocks = find_blocks(model)
    meter = ChangeMeter(model, blocks)
    meter.start([0])
    move(model)
    assert meter.rates()[0] > 0


def test_a_frozen_adapter_is_no_pair():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.requires_grad_(False)
    assert low_rank_pairs(model) == []


@pytest.mark.parametrize("lora", [False, True])
def test_signal_to_noise_is_of_the_weights_and_not_of_the_adapters(lora):
    plain = llama()
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])) if lora else plain
    expected = []
    for layer in plain.model.layers:
        matrices = [p for p in layer.parameters() if p.dim() == 2]
        ratios = [signal_to_noise(matrix) for matrix in matrices]
        expected.append(np.average(ratios, weights=[matrix.numel() for matrix in matrices]))
    assert measure_signal_to_noise(model, find_blocks(model)) == pytest.approx(expected, rel=1e-12)
