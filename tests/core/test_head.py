import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_curriculum.core import head as head_module
from hf_curriculum.core.head import causal_lm_head, gather_labelled, token_nll


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gemma2-softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "granite-scaling": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere-scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}


def make_batch():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 50, (3, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 8:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :5] = -100
    labels[2] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask}, labels


def reference_nll(model, inputs, labels):
    """The loss of each label by a loop over the model's own full logits, in float64."""
    logits = model(**inputs).logits.double()
    losses = [
        -torch.log_softmax(logits[row, position], dim=-1)[labels[row, position + 1]]
        for row in range(labels.shape[0])
        for position in range(labels.shape[1] - 1)
        if labels[row, position + 1] != -100
    ]
    return torch.stack(losses)


def our_nll(model, inputs, labels):
    head = causal_lm_head(model)
    hidden = head.backbone(**inputs, use_cache=False).last_hidden_state
    return token_nll(gather_labelled(hidden, labels), head)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_full_logits(name, monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 150)  # three positions in a chunk
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)  # or scales and caps would not show
    inputs, labels = make_batch()
    weights = torch.linspace(0.5, 1.5, int((labels[:, 1:] != -100).sum()))
    expected = reference_nll(model, inputs, labels)
    (expected * weights.double()).sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    ours = our_nll(model, inputs, labels)
    (ours * weights).sum().backward()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(our_nll(model, inputs, labels), ours.detach(), rtol=1e-6, atol=1e-6)


def test_chunks_bound_the_logits(monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 150)
    model = MODELS["llama"]()
    inputs, labels = make_batch()
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    with torch.no_grad():
        our_nll(model, inputs, labels)
    assert max(sizes) == 150
    assert sum(sizes) == 50 * int((labels[:, 1:] != -100).sum())


def test_frozen_head_gets_no_gradient():
    model = MODELS["llama"]()
    model.lm_head.weight.requires_grad_(False)
    our_nll(model, *make_batch()).sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_batch_without_a_label_is_a_differentiable_nothing():
    model = MODELS["llama"]()
    inputs, labels = make_batch()
    loss = our_nll(model, inputs, torch.full_like(labels, -100)).sum()
    assert loss.item() == 0
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() == 0


def test_first_position_is_never_predicted():
    hidden = torch.zeros(1, 3, 4)
    positions = gather_labelled(hidden, torch.tensor([[7, -100, 9]]))
    assert positions.targets.tolist() == [9]
    assert positions.rows.tolist() == [0]


def test_model_without_a_head_is_refused():
    with pytest.raises(NotImplementedError, match="no language-model head"):
        causal_lm_head(LlamaForSequenceClassification(LlamaConfig(**SIZES)))


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        causal_lm_head(get_peft_model(MODELS["llama"](), config))
