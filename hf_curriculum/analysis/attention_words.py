"""
Words, their categories and their rarity: what attention is summed over.

Words come from the text, not from the tokenizer, so that models with different tokenizers are compared on the same
words. Tokens are put to words by their character offsets.

Shapes: W words of a text, S tokens of a text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import invalid, unsupported
from ..core.ranks import spearman


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CATEGORIES",
    "CONTENT",
    "ENGLISH_FUNCTION_WORDS",
    "FUNCTION",
    "NUMBER",
    "PUNCTUATION",
    "SPECIAL",
    "EncodedText",
    "Word",
    "WordRules",
    "corpus_idf",
    "encode_texts",
    "row_spearman",
    "split_words",
    "word_idf",
    "words_of_tokens",
]

CATEGORIES = ("content", "number", "function", "punctuation", "special")
CONTENT = 0
NUMBER = 1
FUNCTION = 2
PUNCTUATION = 3
SPECIAL = 4

# The closed classes of English: determiners and quantifiers, pronouns, prepositions, conjunctions, auxiliaries and
# modals, wh-words, particles and the few adverbs of degree and negation. Our list; a user may bring another.
_ENGLISH = """
a an the this that these those all any both each either every few fewer half less little lot lots many more most
much neither no none other others another own same several some such enough
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves one ones someone somebody something anyone anybody anything
everyone everybody everything nobody nothing
about above across after against along among around as at before behind below beneath beside besides between beyond
by despite down during except for from in inside into like near of off on onto out outside over past per since
than through throughout till to toward towards under until up upon versus via with within without
and but or nor so yet because although though if unless while whereas whether
am is are was were be been being do does did doing done have has had having can could may might must shall should
will would ought cannot
who whom whose which what when where why how
not never very too also just only even still then there here again once ever rather quite almost
"""
ENGLISH_FUNCTION_WORDS = frozenset(_ENGLISH.split())

_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+(?:['\u2019][^\W\d_]+)*|([^\w\s]|_)\1*")


@dataclass(frozen=True)
class Word:
    """
    A word, number or sign of a text.

    Args:
        text (`str`):
            As written.
        start (`int`):
            First character.
        end (`int`):
            Character after the last.
        category (`int`):
            Index in [`CATEGORIES`].
    """

    text: str
    start: int
    end: int
    category: int


@dataclass(frozen=True)
class WordRules:
    """
    What makes a word a content or a function word.

    Args:
        function_words (`Collection[str]`, *optional*):
            Lower-case function words of the texts' language. Defaults to [`ENGLISH_FUNCTION_WORDS`]; for another
            language bring its list.
        categorize (`Callable[[str, list[str]], Sequence[str]]`, *optional*):
            Gets a text and its words, and returns a name of [`CATEGORIES`] for each: a part-of-speech tagger, say.
            Replaces the list.
    """

    function_words: Collection[str] = field(default=ENGLISH_FUNCTION_WORDS, repr=False)
    categorize: Callable[[str, list[str]], Sequence[str]] | None = None

    def category(self, word: str) -> int:
        """
        Category of one word by the list.

        Args:
            word (`str`):
                A word, number or sign.

        Returns:
            `int`: index in [`CATEGORIES`]. A contraction counts as its first part (`he's` is a function word, `Ann's`
            is not), and with `n't` it is always a function word.
        """
        if word[0].isdigit():
            return NUMBER
        if not word[0].isalpha():
            return PUNCTUATION
        lowered = word.lower().replace("\u2019", "'")
        is_function = lowered in self.function_words or lowered.split("'")[0] in self.function_words
        return FUNCTION if is_function or lowered.endswith("n't") else CONTENT


@dataclass(frozen=True)
class EncodedText:
    """
    A text as tokens and words.

    Args:
        text (`str`):
            The text.
        input_ids (`list[int]` of length S):
            Token ids, special tokens included.
        words (`list[Word]` of length W):
            The words that have a token.
        word_of_token (`np.ndarray` of shape `(S,)`, int64):
            Index of the word that each token is part of; -1 for special tokens and white space.
        categories (`np.ndarray` of shape `(S,)`, int64):
            Category of each token; white space counts as punctuation.
        truncated (`bool`):
            Whether the end was cut off.
    """

    text: str
    input_ids: list[int]
    words: list[Word]
    word_of_token: np.ndarray
    categories: np.ndarray
    truncated: bool = False


def split_words(text: str, rules: WordRules) -> list[Word]:
    """
    Splits a text into words, numbers and signs.

    A word is a run of letters, with apostrophes inside; equal signs in a row (`####`) are one. In a script without
    spaces between words that is a whole phrase: bring texts with spaces there.

    Args:
        text (`str`):
            The text.
        rules ([`WordRules`]):
            Categories.

    Returns:
        `list[Word]`, in order, without white space.

    Raises:
        `ValueError`: if `rules.categorize` returns another number of categories, or an unknown one.

    Example:

    ```python
    >>> from hf_curriculum.analysis.attention_words import CATEGORIES, WordRules, split_words

    >>> [(word.text, CATEGORIES[word.category]) for word in split_words("He's 48.", WordRules())]
    [("He's", 'function'), ('48', 'number'), ('.', 'punctuation')]
    ```
    """
    matches = list(_WORD.finditer(text))
    names = [match.group() for match in matches]
    if rules.categorize is None:
        categories = [rules.category(name) for name in names]
    else:
        given = list(rules.categorize(text, names))
        if len(given) != len(names) or not set(given) <= set(CATEGORIES):
            raise invalid(
                "categorize",
                f"{len(given)} categories {sorted(set(given))} for {len(names)} words",
                f"one of {', '.join(CATEGORIES)} for each word",
            )
        categories = [CATEGORIES.index(name) for name in given]
    return [Word(match.group(), *match.span(), category) for match, category in zip(matches, categories)]


def words_of_tokens(words: Sequence[Word], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    Puts each token to the word that it shares most characters with.

    Args:
        words (`Sequence[Word]` of length W):
            The words of a text, in order.
        offsets (`Sequence[tuple[int, int]]` of length S):
            First character and character after the last of each token.

    Returns:
        `np.ndarray` of shape `(S,)`, int64: a word's index, the earlier one of equals; -1 for a token that covers no
        word (white space, or nothing).
    """
    starts = np.array([word.start for word in words], dtype=np.int64)
    ends = np.array([word.end for word in words], dtype=np.int64)
    found = np.full(len(offsets), -1, dtype=np.int64)
    for index, (start, end) in enumerate(offsets):
        first = int(np.searchsorted(ends, start, "right"))
        best = 0
        for word in range(first, len(words)):
            if starts[word] >= end:
                break
            shared = int(min(ends[word], end) - max(starts[word], start))
            if shared > best:
                best, found[index] = shared, word
    return found


def encode_texts(
    processing_class: PreTrainedTokenizerBase, texts: Sequence[str], rules: WordRules, max_length: int | None = None
) -> list[EncodedText]:
    """
    Tokenises texts and puts their tokens to words.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            A fast tokenizer. Special tokens are added as it does by itself.
        texts (`Sequence[str]`):
            The texts.
        rules ([`WordRules`]):
            Categories.
        max_length (`int`, *optional*):
            Tokens to keep of each text.

    Returns:
        `list[EncodedText]`: one for each text, in order.

    Raises:
        `NotImplementedError`: for a tokenizer without character offsets.
        `ValueError`: without texts, or for something else than strings.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise invalid("texts", type(texts).__name__, "a sequence of strings")
    if len(texts) == 0:
        raise invalid("texts", "an empty probe set", "at least one text", "Name a data set with rows.")
    if not getattr(processing_class, "is_fast", False):
        raise unsupported(
            f"Word-level attention with {type(processing_class).__name__}",
            "it has no character offsets, so its tokens cannot be put to words",
            "Use a fast tokenizer: `AutoTokenizer.from_pretrained(..., use_fast=True)`.",
        )
    options: dict[str, Any] = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoded = processing_class(list(texts), **options, truncation=False, verbose=False)
    result = []
    for index, text in enumerate(texts):
        ids, special = encoded["input_ids"][index], np.array(encoded["special_tokens_mask"][index], dtype=bool)
        truncated = max_length is not None and len(ids) > max_length
        if truncated:
            cut = processing_class(text, **options, truncation=True, max_length=max_length)
            ids, special = cut["input_ids"], np.array(cut["special_tokens_mask"], dtype=bool)
        offsets = cut["offset_mapping"] if truncated else encoded["offset_mapping"][index]
        # Most tokenizers mark only what their template adds; `<eos>` written in the text is special all the same.
        special |= np.isin(ids, processing_class.all_special_ids)
        result.append(_encoded(text, list(ids), offsets, special, split_words(text, rules), truncated))
    return result


def _encoded(
    text: str, ids: list[int], offsets: Sequence[tuple[int, int]], special: np.ndarray, words: list[Word], cut: bool
) -> EncodedText:
    found = words_of_tokens(words, offsets)
    found[special] = -1
    # A special token that is written in the text leaves no word behind, and a cut leaves none after it.
    kept, found_in_kept = np.unique(found[found >= 0], return_inverse=True)
    word_of_token = np.full(len(ids), -1, dtype=np.int64)
    word_of_token[found >= 0] = found_in_kept
    words = [words[index] for index in kept]
    of_words = np.array([word.category for word in words] + [PUNCTUATION], dtype=np.int64)
    categories = np.where(special, SPECIAL, of_words[word_of_token])
    return EncodedText(text, ids, words, word_of_token, categories, cut)


def corpus_idf(texts: Sequence[str]) -> dict[str, float]:
    r"""
    Rarity of each word of a corpus: idf(w) = ln((1 + N) / (1 + df(w))).

    Args:
        texts (`Sequence[str]` of length N):
            The corpus. df(w) is the number of texts with the word w, whatever its case.

    Returns:
        `dict[str, float]`: lower-case word -> idf in nats, at least 0. The key `""` holds the idf of a word that is in
        no text.
    """
    rules = WordRules()
    counts = Counter(name for text in texts for name in {word.text.lower() for word in split_words(text, rules)})
    total = np.log1p(len(texts))
    return {"": float(total)} | {name: float(total - np.log1p(count)) for name, count in counts.items()}


def word_idf(words: Sequence[Word], idf: Mapping[str, float]) -> np.ndarray:
    """
    Looks up the rarity of words.

    Args:
        words (`Sequence[Word]` of length W):
            The words.
        idf (`Mapping[str, float]`):
            From [`corpus_idf`].

    Returns:
        `np.ndarray` of shape `(W,)`, float64.
    """
    return np.array([idf.get(word.text.lower(), idf[""]) for word in words], dtype=np.float64)


def row_spearman(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    """
    Spearman's rank correlation of each row with one vector, ties at their mean rank.

    Args:
        rows (`np.ndarray` of shape `(M, N)`):
            Numbers.
        other (`np.ndarray` of shape `(N,)`):
            Numbers.

    Returns:
        `np.ndarray` of shape `(M,)`, float64, in [-1, 1]; NaN where either is constant or N is below 3.
    """
    if len(other) < 3:
        return np.full(len(rows), np.nan)
    return np.array([spearman(row, other) for row in rows], dtype=np.float64)
