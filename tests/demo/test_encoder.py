"""The demo's encoder: the same every time, blind to padding, and better trained than not."""

import pytest
import torch
import torch.nn.functional as F

from hf_curriculum.demo.encoder import _loss, build_encoder, build_message_tokenizer, message_reader
from hf_curriculum.demo.messages import draw_pairs


@pytest.fixture(scope="module")
def tokenizer():
    return build_message_tokenizer()


def vectors(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    weights = batch.attention_mask[..., None].float()
    return F.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def test_weights_follow_from_the_seed_and_leave_the_global_state_alone(tokenizer):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (build_encoder(tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(left, right) for left, right in pairs)
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert first.pooler is None
    assert 200_000 < sum(parameter.numel() for parameter in first.parameters()) < 600_000
    assert first.config.vocab_size == len(tokenizer)


def test_attention_goes_both_ways(tokenizer):
    model = build_encoder(tokenizer).eval()
    ids = tokenizer(["Cancel the parcel today.", "Cancel the parcel now."], return_tensors="pt").input_ids
    with torch.no_grad():
        first, second = model(input_ids=ids).last_hidden_state[:, 0]
    assert not torch.allclose(first, second, atol=1e-5)


def test_the_loss_is_that_of_finding_partners_both_ways():
    """Against a loop in float64."""
    torch.manual_seed(0)
    hidden, mask = torch.randn(6, 5, 4), torch.ones(6, 5, dtype=torch.int64)
    mask[1, 3:], mask[4, :2] = 0, 0
    means = [hidden[row][mask[row] == 1].double().mean(dim=0) for row in range(6)]
    unit = [vector / vector.norm() for vector in means]
    scores = [[float(unit[2 * row] @ unit[2 * column + 1]) / 0.05 for column in range(3)] for row in range(3)]
    table = torch.tensor(scores, dtype=torch.float64)
    expected = sum(
        (table[place].logsumexp(0) + table[:, place].logsumexp(0)) / 2 - table[place, place] for place in range(3)
    )
    assert _loss(hidden, mask).item() == pytest.approx(float(expected) / 3, rel=1e-5)


def test_training_brings_pairs_together_and_is_repeated_exactly(tokenizer):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    short, again = (message_reader(2, seed=1)[0] for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(left, right) for left, right in zip(short.parameters(), again.parameters(), strict=True))
    model, found = message_reader(30, seed=1)
    assert found.get_vocab() == tokenizer.get_vocab()
    pairs = draw_pairs(64, seed=9)
    ranks = []
    for encoder in (build_encoder(tokenizer, seed=1), model):
        left, right = (vectors(encoder.eval(), tokenizer, [pair[side].text for pair in pairs]) for side in (0, 1))
        cosines = left @ right.T
        ranks.append((cosines > cosines.diagonal()[:, None]).sum(dim=1).float().mean().item())
    assert ranks[1] < 0.8 * ranks[0]


def test_no_steps_leave_the_weights_as_they_were(tokenizer):
    model, _ = message_reader(0, seed=4)
    untouched = build_encoder(tokenizer, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))
    with pytest.raises(ValueError, match="`num_steps`: got -1"):
        message_reader(-1)
