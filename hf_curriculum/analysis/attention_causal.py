"""
One causal check: does hiding the words that get most attention cost more loss than hiding their neighbours?

Shapes: T texts, B rows, S positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..core.errors import invalid
from ..core.head import CausalLMHead, causal_lm_head, gather_labelled, token_nll
from ..core.modes import evaluation_mode
from .attention_comparison import CONFIDENCE, bootstrap_interval
from .attention_layout import probe_batches
from .attention_measurement import (
    AttentionMeasurement,
    longest_readable,
    mean_without_nan,
)
from .attention_probe import probed_model
from .attention_words import CONTENT, FUNCTION, NUMBER, EncodedText, WordRules, encode_texts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CausalCheck", "causal_check"]

# A control word is drawn from this many nearest words that are not hidden. Our choice: near enough to have as many
# words after it, wide enough to have a choice.
NEIGHBOURS = 6


@dataclass(frozen=True)
class CausalCheck:
    """
    Change in loss from hiding words, per text, in nats per token.

    Args:
        loss (`np.ndarray` of shape `(T,)`, float64):
            Loss with nothing hidden.
        top (`np.ndarray` of shape `(T,)`, float64):
            Change with the most attended words hidden; NaN for a text with too few words.
        control (`np.ndarray` of shape `(T,)`, float64):
            Change with as many neighbouring words hidden, mean of the draws.
        share (`float`):
            Share of the words that is hidden.
    """

    loss: np.ndarray
    top: np.ndarray
    control: np.ndarray
    share: float

    def summary(self) -> dict[str, float]:
        """Means over the texts, with the bootstrap interval of the difference between top and control."""
        difference = self.top - self.control
        low, high = bootstrap_interval(difference, confidence=CONFIDENCE)
        means = {"loss": self.loss, "top": self.top, "control": self.control, "difference": difference}
        found = {name: float(mean_without_nan(values, 0)) for name, values in means.items()}
        return found | {"low": float(low), "high": float(high)}


def causal_check(
    model: nn.Module,
    texts: Sequence[str],
    measurement: AttentionMeasurement,
    *,
    processing_class: PreTrainedTokenizerBase,
    rules: WordRules | None = None,
    share: float = 0.1,
    draws: int = 3,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> CausalCheck:
    """
    Hides the most attended words from all later positions and measures the loss of the other tokens.

    A hidden word's tokens are masked as keys in every layer; the positions of all tokens stay. Their own loss does not
    count. Each control word stands near the word that it replaces, so both arms have equally much text after them.

    Args:
        model (`nn.Module`):
            A causal language model, also with adapters.
        texts (`Sequence[str]`):
            The texts.
        measurement ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The model's attention over these texts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its fast tokenizer.
        rules ([`WordRules`], *optional*):
            As for the measurement.
        share (`float`, *optional*, defaults to `0.1`):
            Share of a text's words to hide, in (0, 0.5); punctuation is no word. Our choice.
        draws (`int`, *optional*, defaults to `3`):
            Draws of the control words.
        max_length (`int`, *optional*):
            As for the measurement.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens in a batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        [`CausalCheck`]

    Raises:
        `NotImplementedError`: for a model without a language-model head.
        `ValueError`: for a `share` out of range, or a measurement of other texts.
    """
    if not 0 < share < 0.5:
        raise invalid("share", share, "a float in (0, 0.5)")
    head, base = causal_lm_head(model), probed_model(model)
    limit = longest_readable(base.config, processing_class, max_length)
    encoded = encode_texts(processing_class, texts, rules or WordRules(), limit)
    if len(encoded) != len(measurement.texts):
        raise invalid("measurement", f"{len(measurement.texts)} texts", f"the {len(encoded)} texts given")
    rng = np.random.default_rng(seed)
    hidden = [_hidden_words(text, measurement, index, share, draws, rng) for index, text in enumerate(encoded)]
    loss, changes = np.empty(len(encoded)), np.empty((len(encoded), 1 + draws))
    with evaluation_mode(base), torch.no_grad():
        for batch in probe_batches(encoded, batch_tokens, "right", processing_class.pad_token_id or 0):
            inputs = {name: value.to(base.device) for name, value in batch.inputs.items()}
            plain = _losses(head, inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool))
            tokens = inputs["attention_mask"].sum(dim=1) - 1
            loss[batch.members] = torch.where(tokens > 0, plain.sum(dim=1) / tokens, torch.nan).cpu().numpy()
            for arm in range(1 + draws):
                masked = _mask([(encoded[index], hidden[index][arm]) for index in batch.members], plain.shape)
                masked = masked.to(base.device)
                counted = (inputs["attention_mask"] == 1) & ~masked
                counted[:, 0] = False
                change = torch.where(counted, _losses(head, inputs, masked) - plain, 0.0)
                changes[batch.members, arm] = (change.sum(dim=1) / counted.sum(dim=1)).cpu().numpy()
    changes[[len(arms[0]) == 0 for arms in hidden]] = np.nan
    return CausalCheck(loss, changes[:, 0], changes[:, 1:].mean(axis=1), share)


def _losses(head: CausalLMHead, inputs: dict[str, torch.Tensor], masked: torch.Tensor) -> torch.Tensor:
    """Loss of each token, `(B, S)`, float64, with some positions hidden as keys; 0 in the first column and padding."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    arguments = {**inputs, "attention_mask": inputs["attention_mask"] * ~masked}
    if "position_ids" in inspect.signature(head.backbone.forward).parameters:
        # Some models count positions over the mask, and a hidden word would move all that follow.
        arguments["position_ids"] = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    hidden = head.backbone(**arguments, use_cache=False).last_hidden_state
    losses = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    losses[:, 1:][labels[:, 1:] != -100] = token_nll(gather_labelled(hidden, labels), head).double()
    return losses


def _mask(rows: Sequence[tuple[EncodedText, np.ndarray]], shape: torch.Size) -> torch.Tensor:
    """Positions of the words of each row, `(B, S)`, bool."""
    mask = np.zeros(tuple(shape), dtype=bool)
    for row, (text, words) in enumerate(rows):
        mask[row, : len(text.input_ids)] = np.isin(text.word_of_token, words)
    return torch.from_numpy(mask)


def _hidden_words(
    text: EncodedText,
    measurement: AttentionMeasurement,
    index: int,
    share: float,
    draws: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Words to hide in each arm, as indices of the encoded text: the most attended, then a draw of neighbours each."""
    measured = measurement.texts[index]
    places = {word.start: place for place, word in enumerate(text.words)}
    if [word.start for word in measured.words if word.start not in places]:
        raise invalid("measurement", "other words", "a measurement of the texts given, read to the same length")
    pool = [
        (places[word.start], received)
        for word, received in zip(measured.words, measured.received)
        if word.category in (CONTENT, NUMBER, FUNCTION) and not np.isnan(received)
    ]
    words = np.array([place for place, _ in pool], dtype=np.int64)
    order = np.argsort([-received for _, received in pool], kind="stable")
    top = np.sort(words[order[: int(share * len(words))]])
    arms = [top]
    for _ in range(draws):
        free = np.setdiff1d(words, top)
        chosen = []
        for word in top:
            near = free[np.argsort(np.abs(free - word), kind="stable")[:NEIGHBOURS]]
            chosen.append(rng.choice(near))
            free = free[free != chosen[-1]]
        arms.append(np.array(chosen, dtype=np.int64))
    return arms
