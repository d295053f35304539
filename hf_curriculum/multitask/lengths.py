"""How long a row may be."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase


__all__ = ["longest_row"]


def longest_row(model: nn.Module, processing_class: PreTrainedTokenizerBase) -> int | None:
    """
    The most tokens of a row that tokenizer and model allow.

    Args:
        model (`nn.Module`):
            A model with the config of its base.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `int`, *optional*: tokens, at least 1; None where neither has a limit.
    """
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind that of padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            assert isinstance(module, nn.Embedding)
            positions = module.num_embeddings - int(module.padding_idx or 0) - 1
    # Tokenizers without a limit name a number beyond all others.
    limit = min(int(processing_class.model_max_length), positions)
    return limit if limit < sys.maxsize else None
