"""A small bidirectional encoder that has read generated messages: the base model of the classification demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.console import say
from ..core.errors import invalid
from .base import BATCH_SIZE, take_steps
from .messages import draw_pairs, message_vocabulary
from .model import MAX_LENGTH, build_tokenizer


if TYPE_CHECKING:
    import torch
    from transformers import BertModel, PreTrainedTokenizerFast

__all__ = ["build_encoder", "build_message_tokenizer", "message_reader"]

WARMUP_STEPS = 30
# Of the cosine of two texts, as sentence-transformers trains its encoders (a scale of 20).
TEMPERATURE = 0.05


def build_message_tokenizer() -> PreTrainedTokenizerFast:
    """
    Builds the tokenizer: whole words of the messages, single digits, and bytes for every other text.

    Returns:
        `transformers.PreTrainedTokenizerFast`: that of [`~hf_curriculum.demo.model.build_tokenizer`] with other words.

    Example:

    ```python
    >>> from hf_curriculum.demo.encoder import build_message_tokenizer

    >>> len(build_message_tokenizer()("Remove the parcel.").input_ids)
    4
    ```
    """
    return build_tokenizer(message_vocabulary())


def build_encoder(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> BertModel:
    """
    Builds a BERT of three blocks with random weights, float32, without a head.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerFast`):
            Tokenizer whose vocabulary the model takes.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state is left as it was.

    Returns:
        `transformers.BertModel`: in training mode, on the CPU.

    Example:

    ```python
    >>> from hf_curriculum.demo.encoder import build_encoder, build_message_tokenizer

    >>> build_encoder(build_message_tokenizer()).config.hidden_size
    96
    ```
    """
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: BertModel = BertModel(config, add_pooling_layer=False)
    return model


def message_reader(num_steps: int, seed: int = 0) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """
    Trains the encoder to tell which two texts say the same, as sentence encoders are: what one from the Hub brings.

    Each text must find its partner among those of a batch, by the cosine of their mean token vectors (InfoNCE, van den
    Oord et al. 2018, arXiv 1807.03748, in both directions). Half of the wordings stay unknown to it
    ([`~hf_curriculum.demo.messages.draw_pairs`]). Every process of a run trains it alone on the same pairs, so that
    all have the same.

    Args:
        num_steps (`int`):
            Steps of 32 pairs, at least 0.
        seed (`int`, *optional*, defaults to `0`):
            Seed of weights and pairs. The global random state is left as it was.

    Returns:
        `tuple[transformers.BertModel, transformers.PreTrainedTokenizerFast]`: on the CPU.

    Raises:
        `ValueError`: for fewer than 0 steps.
    """
    if num_steps < 0:
        raise invalid("num_steps", num_steps, "an integer >= 0")
    tokenizer = build_message_tokenizer()
    model = build_encoder(tokenizer, seed=seed)
    if num_steps == 0:
        return model, tokenizer
    say(f"Training the embedded encoder to tell which messages say the same, {num_steps} steps.")
    pairs = draw_pairs(BATCH_SIZE * num_steps, seed)

    def loss_of(step: int) -> torch.Tensor:
        texts = [message.text for pair in pairs[BATCH_SIZE * step : BATCH_SIZE * (step + 1)] for message in pair]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return _loss(hidden, batch.attention_mask)

    take_steps(model, num_steps, loss_of, WARMUP_STEPS)
    return model, tokenizer


def _loss(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    InfoNCE in both directions; partners are neighbours.

    `hidden` is `(2 P, S, H)` of P pairs, `mask` `(2 P, S)`.
    """
    import torch
    import torch.nn.functional as F

    weights = mask[..., None].to(hidden.dtype)
    vectors = F.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)
    cosines = vectors[::2] @ vectors[1::2].T / TEMPERATURE  # [P, P]
    partners = torch.arange(len(cosines))
    return (F.cross_entropy(cosines, partners) + F.cross_entropy(cosines.T, partners)) / 2
