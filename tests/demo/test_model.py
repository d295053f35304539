"""The demo's tokenizer and model: built from code, the same every time, and able to read any text."""

from __future__ import annotations

import string

import pytest
import torch

from hf_curriculum.demo.corpus import generate_corpus, vocabulary
from hf_curriculum.demo.model import MAX_LENGTH, build_model, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def texts():
    corpus = generate_corpus(500, seed=5)
    return [f"{row['prompt']}\n{row['completion']}" for row in corpus]


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<eos>", "<unk>")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer("Add 1 <eos>").input_ids[-1] == tokenizer.eos_token_id


def test_no_token_is_added_by_itself(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("Add").input_ids) == ["Add"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Add 12 to get 345.",
        "two  spaces\n\nand a tab\t.",
        "never seen: zebra",
        "gr\u00fc\u00df \u65e5\u672c \U0001f600",
    ],
    ids=["empty", "space", "corpus", "whitespace", "other_words", "other_scripts"],
)
def test_any_text_survives_the_round_trip_without_an_unknown_token(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_generated_rows_are_whole_words_and_survive_the_round_trip(tokenizer, texts):
    """One token per word, digit and sign: a word missing from the vocabulary would fall apart into letters."""
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert {token.removeprefix("\u2581") for token in tokens} <= {*vocabulary(), *string.digits, "\n"}
        assert tokenizer.decode(ids) == text
        assert len(ids) < MAX_LENGTH // 2


def test_each_digit_is_a_token_of_its_own(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("get 1057.").input_ids)
    assert all(sum(character.isdigit() for character in token) <= 1 for token in tokens)
    assert sum(any(character.isdigit() for character in token) for token in tokens) == 4


def test_a_prompt_ends_where_its_completion_begins(tokenizer):
    """What prompt-completion training needs: the ids of the prompt are the first ids of prompt and completion."""
    row = generate_corpus(1)[0]
    prompt, completion = row["prompt"] + "\n", row["completion"]
    assert tokenizer(prompt + completion).input_ids == tokenizer(prompt).input_ids + tokenizer(completion).input_ids


def test_two_builds_and_a_saved_copy_are_the_same_tokenizer(tokenizer, texts, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab() == saved.get_vocab()
    assert saved(texts).input_ids == tokenizer(texts).input_ids
    assert saved.decode(saved(texts[0]).input_ids) == texts[0]
    assert (saved.pad_token_id, saved.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_model_is_small_float32_and_tied(tokenizer):
    model = build_model(tokenizer)
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_weights_follow_from_the_seed_and_leave_the_global_state_alone(tokenizer):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (
        build_model(tokenizer, seed=1),
        build_model(tokenizer, seed=1),
        build_model(tokenizer, seed=2),
    )
    assert torch.equal(torch.rand(3), expected)
    for left, right in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_an_untrained_model_knows_nothing(tokenizer, texts):
    """The loss of random weights is that of a uniform guess: otherwise a demo would not start from nothing."""
    batch = tokenizer(texts[:8], padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        loss = build_model(tokenizer)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        ).loss
    assert loss.item() == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), rel=0.1)
