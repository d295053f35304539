"""
Measuring the attention of one model over a fixed set of texts.

Shapes: T texts, L layers, H heads, C categories, W words of a text.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..core.console import say
from ..core.distributed import is_main_process
from ..core.errors import invalid, unsupported
from ..core.modes import evaluation_mode
from .attention_distance import expected_received, fit_distance_profile
from .attention_layout import LAYOUTS, TokenLayout, probe_batches
from .attention_probe import BatchStatistics, attention_probe, probed_model
from .attention_words import (
    CATEGORIES,
    CONTENT,
    FUNCTION,
    EncodedText,
    Word,
    WordRules,
    corpus_idf,
    encode_texts,
    row_spearman,
    word_idf,
)


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "AttentionMeasurement",
    "TextWords",
    "longest_readable",
    "mean_without_nan",
    "measure_attention",
]


@dataclass(frozen=True)
class TextWords:
    """
    The words of one text and the attention they got.

    Args:
        words (`list[Word]` of length W):
            The words; that of the text's first token is not among them.
        received (`np.ndarray` of shape `(W,)`, float64):
            Attention received over what a head that looks at distance alone would give (see
            [`~hf_curriculum.analysis.attention_distance`]), summed over the word's tokens, the layers and the heads
            before the division. NaN for a word that no query with a choice sees.
        idf (`np.ndarray` of shape `(W,)`, float64):
            Rarity in the corpus, in nats.
    """

    words: list[Word]
    received: np.ndarray
    idf: np.ndarray


@dataclass(frozen=True)
class AttentionMeasurement:
    """
    Attention of one model over T texts. A text too short to have a choice (under four tokens) is NaN throughout.

    Args:
        per_head (`dict[str, np.ndarray]` of shape `(T, L, H)`, float64):
            `entropy`, `entropy_rest`, `sink`, `value_sink`, `head_distance` (see
            [`~hf_curriculum.analysis.attention_probe.BatchStatistics`]) and `idf_correlation`: Spearman's correlation
            of the attention that the words, numbers and punctuation aside, receive with their idf.
        mass (`np.ndarray` of shape `(T, L, H, C)`, float64):
            Mass on each category, sink taken out and the rest renormalised.
        value_mass (`np.ndarray` of shape `(T, L, H, C)`, float64):
            The same, each key weighted by the norm of its value.
        rollout (`np.ndarray` of shape `(T, L, C)`, float64):
            Attention rollout after each layer to the categories of input tokens.
        texts (`list[TextWords]` of length T):
            The words.
        layers (`list[int]` of length L):
            Index of each layer in the model.
        fingerprint (`str`):
            Hash of the words measured: two measurements compare if it is equal.
    """

    per_head: dict[str, np.ndarray]
    mass: np.ndarray
    value_mass: np.ndarray
    rollout: np.ndarray
    texts: list[TextWords]
    layers: list[int]
    fingerprint: str

    def per_text(self) -> dict[str, np.ndarray]:
        """
        One number per text and measure, the mean over layers and heads.

        Returns:
            `dict[str, np.ndarray]` of shape `(T,)`, float64: the measures of `per_head`, `mass_<category>` and
            `value_mass_<category>`, and `rollout_<category>` after the last layer.
        """
        found = {name: mean_without_nan(values, axis=(1, 2)) for name, values in self.per_head.items()}
        for kind, name in enumerate(CATEGORIES):
            found[f"mass_{name}"] = self.mass[..., kind].mean(axis=(1, 2))
            found[f"value_mass_{name}"] = self.value_mass[..., kind].mean(axis=(1, 2))
            found[f"rollout_{name}"] = self.rollout[:, -1, kind]
        return found

    def summary(self) -> dict[str, float]:
        """Means over the texts of [`AttentionMeasurement.per_text`]; NaN where no text has a value."""
        return {name: float(mean_without_nan(values, axis=0)) for name, values in self.per_text().items()}


def mean_without_nan(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """
    Mean over what is not NaN.

    Args:
        values (`np.ndarray`):
            Numbers.
        axis (`int` or `tuple[int, ...]`):
            Axes to average over.

    Returns:
        `np.ndarray`, float64: NaN where nothing is left. (`np.nanmean` warns there.)
    """
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    mean: np.ndarray = np.where(known, values, 0.0).sum(axis=axis) / np.where(count > 0, count, np.nan)
    return mean


def _check_layout(backbone: nn.Module, layout: str) -> None:
    if layout not in LAYOUTS:
        raise invalid("layout", layout, f"one of {', '.join(LAYOUTS)}")
    # Models of RoBERTa's kind count positions from behind the padding id.
    offset = any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and name.endswith("position_embeddings")
        for name, module in backbone.named_modules()
    )
    if layout != "right" and (offset or "position_ids" not in inspect.signature(backbone.forward).parameters):
        raise unsupported(
            f"layout='{layout}' with {type(backbone).__name__}",
            "it takes no positions that count from 0, so its texts would be read at others",
            "Use `layout='right'`.",
        )


def longest_readable(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    """
    How many tokens of a text a model can read.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            The model's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        wanted (`int`, *optional*):
            What the user wants to read at most.

    Returns:
        `int`: the smallest of the three limits.
    """
    limits = [wanted, tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    return min(limit for limit in limits if limit is not None)


def measure_attention(
    model: nn.Module,
    texts: Sequence[str],
    *,
    processing_class: PreTrainedTokenizerBase,
    adapter: bool = True,
    rules: WordRules | None = None,
    idf: Mapping[str, float] | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    layout: str = "right",
    head_distance: bool = True,
    progress: bool = True,
) -> AttentionMeasurement:
    """
    Measures what a model attends to.

    The model is run without its head, in evaluation mode, and is afterwards as it was.

    Args:
        model (`nn.Module`):
            An encoder or decoder of transformers with `sdpa` or `eager` attention, also with adapters.
        texts (`Sequence[str]`):
            The probe set.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The model's fast tokenizer.
        adapter (`bool`, *optional*, defaults to `True`):
            False to switch a PEFT model's adapters off.
        rules ([`WordRules`], *optional*):
            What content and function words are. Defaults to the English list.
        idf (`Mapping[str, float]`, *optional*):
            Rarity of words from [`corpus_idf`] of your corpus. Defaults to that of `texts`.
        max_length (`int`, *optional*):
            Tokens to read of each text. Defaults to what model and tokenizer allow.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens in a batch, padding included. Our choice: a batch is a forward pass without a head.
        layout (`str`, *optional*, defaults to `"right"`):
            How texts share a batch: padded on the `"right"` or `"left"`, or `"packed"`. The numbers are the same.
        head_distance (`bool`, *optional*, defaults to `True`):
            Whether to compare heads with one another; with many heads this is most of the time.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`AttentionMeasurement`]

    Raises:
        `NotImplementedError`: for a model or tokenizer that cannot be measured.
        `ValueError`: for an empty probe set, or one without a text of four tokens.

    Example:

    ```python
    >>> from hf_curriculum.analysis.attention_measurement import measure_attention
    >>> from hf_curriculum.demo.model import build_model, build_tokenizer

    >>> tokenizer = build_tokenizer()
    >>> found = measure_attention(build_model(tokenizer), ["Ada has 4 apples."], processing_class=tokenizer)
    >>> found.mass.shape
    (1, 4, 5, 5)
    ```
    """
    rules = rules or WordRules()
    base = probed_model(model)
    backbone = base.base_model
    _check_layout(backbone, layout)
    limit = longest_readable(base.config, processing_class, max_length)
    encoded = encode_texts(processing_class, texts, rules, limit)
    if cut := sum(text.truncated for text in encoded):
        say(f"{cut:,} of {len(encoded):,} texts are longer than {limit} tokens; their ends are left out.")
    off = model.disable_adapter() if not adapter and isinstance(model, PeftModel) else nullcontext()
    batches = list(probe_batches(encoded, batch_tokens, layout, processing_class.pad_token_id or 0))
    found: dict[int, tuple[BatchStatistics, int]] = {}
    received: dict[int, np.ndarray] = {}
    with off, evaluation_mode(base), attention_probe(model, head_distance=head_distance) as collector, torch.no_grad():
        for batch in tqdm(batches, "Attention", disable=not progress or not is_main_process(), leave=False):
            collector.begin(_moved(batch.layout, base.device))
            options = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
            backbone(**{name: value.to(base.device) for name, value in batch.inputs.items()}, **options)
            statistics = collector.finish()
            for index, (row, start) in zip(batch.members, batch.spans):
                span = slice(start, start + len(encoded[index].input_ids))
                received[index] = statistics.received[:, :, row, span].float().flatten(0, 1).numpy()  # [L * H, S]
            kept = replace(statistics, received=torch.empty(0))
            found |= {index: (kept, place) for place, index in enumerate(batch.members)}
    return _measurement(encoded, found, received, corpus_idf(texts) if idf is None else idf)


def _moved(layout: TokenLayout, device: torch.device) -> TokenLayout:
    return TokenLayout(
        layout.texts.to(device), layout.categories.to(device), layout.num_texts, layout.num_categories
    )  # fmt: skip


def _distance_profile(statistics: Sequence[BatchStatistics], lengths: Sequence[int]) -> np.ndarray:
    """The fit over all batches, whatever their lengths: (L * H, 2 S - 1) for the longest text of S tokens."""
    longest = max(1, *lengths)
    observed = np.zeros((statistics[0].distance.shape[0] * statistics[0].distance.shape[1], 2 * longest - 1))
    for batch in statistics:
        sums = batch.distance.flatten(0, 1).numpy()
        # Packed rows are longer than any text, but see nothing at such distances.
        reach = min(sums.shape[1] // 2, longest - 1)
        observed[:, longest - 1 - reach : longest + reach] += sums[
            :, sums.shape[1] // 2 - reach : sums.shape[1] // 2 + reach + 1
        ]
    return fit_distance_profile(observed, lengths)


def _words_of_text(
    encoded: EncodedText, received: np.ndarray, profile: np.ndarray, idf: Mapping[str, float]
) -> tuple[TextWords, np.ndarray]:
    """Attention received by the words of a text, and its correlation with idf for each head, `(L * H,)`."""
    expected = expected_received(profile, len(encoded.input_ids))
    count = len(encoded.words)
    tokens = np.flatnonzero(encoded.word_of_token >= 0)

    def by_word(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((count, len(values)))
        np.add.at(sums, encoded.word_of_token[tokens], values[:, tokens].T)
        result: np.ndarray = sums[kept].T  # [L * H, W]
        return result

    # The word of the sink has lost the token that gets most.
    kept = ~np.isin(np.arange(count), encoded.word_of_token[:1])
    observed, even = by_word(received), by_word(expected)
    words = [word for word, keep in zip(encoded.words, kept) if keep]
    rarity = word_idf(words, idf)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, overall = observed / even, observed.sum(axis=0) / even.sum(axis=0)
    kinds = np.array([word.category for word in words], dtype=np.int64)
    ranked = np.isin(kinds, (CONTENT, FUNCTION)) & np.isfinite(ratios).all(axis=0)
    correlation = row_spearman(ratios[:, ranked], rarity[ranked])
    return TextWords(words, np.where(np.isfinite(overall), overall, np.nan), rarity), correlation


def _measurement(
    encoded: Sequence[EncodedText],
    found: Mapping[int, tuple[BatchStatistics, int]],
    received: Mapping[int, np.ndarray],
    idf: Mapping[str, float],
) -> AttentionMeasurement:
    texts = [found[index] for index in range(len(encoded))]

    def stacked(values: Callable[[BatchStatistics], torch.Tensor]) -> np.ndarray:
        return np.stack([values(statistics)[place].numpy() for statistics, place in texts])

    if all(int(statistics.queries[place]) == 0 for statistics, place in texts):
        raise invalid(
            "texts",
            f"{len(encoded)} texts of at most {max(len(text.input_ids) for text in encoded)} tokens",
            "at least one text of four tokens",
            "A token has a choice where it sees two tokens beside the first.",
        )
    batches = list({id(statistics): statistics for statistics, _ in texts}.values())
    profile = _distance_profile(batches, [len(text.input_ids) for text in encoded])
    pairs = [_words_of_text(text, received[index], profile, idf) for index, text in enumerate(encoded)]
    first = texts[0][0]
    per_head = {name: stacked(lambda item, name=name: item.per_head[name]) for name in first.per_head}  # type: ignore[misc]
    shape = per_head["entropy"].shape
    digest = hashlib.sha256()
    for text in encoded:
        digest.update(repr([(word.text, word.start, word.category) for word in text.words]).encode())
    return AttentionMeasurement(
        per_head=per_head | {"idf_correlation": np.stack([values for _, values in pairs]).reshape(shape)},
        mass=stacked(lambda item: item.mass),
        value_mass=stacked(lambda item: item.value_mass),
        rollout=stacked(lambda item: item.rollout),
        texts=[words for words, _ in pairs],
        layers=first.layers,
        fingerprint=digest.hexdigest(),
    )
