import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from hf_curriculum.analysis.attention_words import (
    CATEGORIES,
    CONTENT,
    FUNCTION,
    NUMBER,
    PUNCTUATION,
    SPECIAL,
    WordRules,
    corpus_idf,
    encode_texts,
    row_spearman,
    split_words,
    word_idf,
    words_of_tokens,
)
from hf_curriculum.core.ranks import mean_ranks
from hf_curriculum.demo.model import build_tokenizer


TEXT = "The unbelievable Café-owner didn't pay $1,250.50\n\nfor naïve 東京 cats!! ####"
TRAINING = [TEXT, "Ann has 12 cats and 3.5 dogs.", "the cat unbelievably believed the owner"] * 3


def byte_bpe(digits=False):
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(TRAINING, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def sentencepiece():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "<pad>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(TRAINING, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {
    "byte-bpe": byte_bpe,
    "byte-bpe-digits": lambda: byte_bpe(digits=True),
    "wordpiece": wordpiece,
    "sentencepiece": sentencepiece,
    "unigram-with-bytes": build_tokenizer,
}


def naive_word(words, start, end):
    """The word that most characters of a token are in."""
    shared = [len(set(range(word.start, word.end)) & set(range(start, end))) for word in words]
    return shared.index(max(shared)) if shared and max(shared) > 0 else -1


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokens_are_put_to_the_word_they_share_most_characters_with(make):
    tokenizer = make()
    encoded = encode_texts(tokenizer, [TEXT], WordRules())[0]
    all_words = split_words(TEXT, WordRules())
    offsets = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    assert len(encoded.input_ids) == len(encoded.word_of_token) == len(encoded.categories)
    for place, (token, (start, end)) in enumerate(zip(encoded.input_ids, offsets)):
        word = encoded.word_of_token[place]
        if token in tokenizer.all_special_ids:
            assert (word, encoded.categories[place]) == (-1, SPECIAL)
            continue
        expected = naive_word(all_words, start, end)
        if expected < 0:
            assert (word, encoded.categories[place]) == (-1, PUNCTUATION)
        else:
            assert encoded.words[word] == all_words[expected]
            assert encoded.categories[place] == all_words[expected].category


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_tokenizer_finds_the_same_words(make):
    # Without unknown characters, which WordPiece and SentencePiece have no token of.
    text = "The unbelievable owner didn't pay for 12 cats and 3.5 dogs."
    encoded = encode_texts(make(), [text], WordRules())[0]
    names = [word.text for word in encoded.words]
    assert names == ["The", "unbelievable", "owner", "didn't", "pay", "for", "12", "cats", "and", "3.5", "dogs", "."]
    assert [word.category for word in encoded.words] == [
        FUNCTION, CONTENT, CONTENT, FUNCTION, CONTENT, FUNCTION, NUMBER, CONTENT, FUNCTION, NUMBER, CONTENT,
        PUNCTUATION,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "category"),
    [
        ("the", FUNCTION), ("The", FUNCTION), ("he's", FUNCTION), ("won't", FUNCTION), ("don\u2019t", FUNCTION),
        ("Ann's", CONTENT), ("ton's", CONTENT), ("won", CONTENT), ("48", NUMBER), ("1,250.50", NUMBER),
        ("####", PUNCTUATION), ("$", PUNCTUATION), ("東京", CONTENT),
    ],
)  # fmt: skip
def test_category_of_a_word(word, category):
    found = split_words(word, WordRules())
    assert [(item.text, item.category) for item in found] == [(word, category)]


def test_function_words_of_another_language_replace_the_list():
    rules = WordRules(function_words={"der"})
    assert [word.category for word in split_words("der the", rules)] == [FUNCTION, CONTENT]


def test_categorize_replaces_the_list():
    rules = WordRules(categorize=lambda text, words: ["number"] * len(words))
    assert {word.category for word in split_words("all of it.", rules)} == {NUMBER}


@pytest.mark.parametrize("given", [["content"], ["content", "noun"]], ids=["too-few", "unknown"])
def test_wrong_categories_are_refused(given):
    with pytest.raises(ValueError, match=f"one of {', '.join(CATEGORIES)}"):
        split_words("two words", WordRules(categorize=lambda *_: given))


def test_token_over_two_words_goes_to_the_one_with_more_of_it():
    words = split_words("ab cdef", WordRules())
    assert words_of_tokens(words, [(0, 7), (0, 4), (2, 3), (5, 5)]).tolist() == [1, 0, -1, -1]


def test_long_text_is_cut_and_loses_its_last_words():
    encoded = encode_texts(wordpiece(), ["the cat the cat the cat owner"], WordRules(), max_length=4)[0]
    assert encoded.truncated
    assert len(encoded.input_ids) == 4
    # The closing token of the template stays.
    assert encoded.categories[-1] == SPECIAL
    assert len(encoded.words) == 2


def test_special_token_written_in_the_text_is_special():
    encoded = encode_texts(sentencepiece(), ["the <s> cat"], WordRules())[0]
    assert (encoded.categories == SPECIAL).sum() == 2
    assert [word.text for word in encoded.words] == ["the", "cat"]


class SlowTokenizer(PreTrainedTokenizer):
    vocab_size = 1

    def get_vocab(self):
        return {"a": 0}


def test_tokenizer_without_offsets_is_refused():
    with pytest.raises(NotImplementedError, match="SlowTokenizer is not supported: it has no character offsets"):
        encode_texts(SlowTokenizer(), ["a"], WordRules())


@pytest.mark.parametrize(("texts", "message"), [([], "an empty probe set"), ("abc", "got str"), ([1], "got list")])
def test_something_else_than_texts_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        encode_texts(byte_bpe(), texts, WordRules())


def test_idf_has_the_literal_numbers():
    idf = corpus_idf(["A cat", "a dog a", "the cat"])
    assert idf["a"] == pytest.approx(math.log(4 / 3))
    assert idf["dog"] == pytest.approx(math.log(4 / 2))
    words = split_words("CAT zebra", WordRules())
    assert word_idf(words, idf).tolist() == pytest.approx([math.log(4 / 3), math.log(4)])


def naive_ranks(values):
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_equals_its_naive_twin_with_ties(seed):
    rng = np.random.default_rng(seed)
    rows, other = rng.integers(0, 4, (3, 12)).astype(float), rng.integers(0, 4, 12).astype(float)
    assert mean_ranks(other).tolist() == naive_ranks(other)
    expected = [np.corrcoef(naive_ranks(row), naive_ranks(other))[0, 1] for row in rows]
    assert row_spearman(rows, other) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_of_nothing_to_rank_is_nan():
    assert np.isnan(row_spearman(np.ones((2, 5)), np.arange(5.0))).all()
    assert np.isnan(row_spearman(np.ones((2, 2)), np.arange(2.0))).all()
    assert row_spearman(np.arange(4.0)[None], -np.arange(4.0)).tolist() == [-1.0]
