"""A tokenizer and a small Llama built from code: the model of the demo."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .corpus import vocabulary


if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


__all__ = ["EOS_TOKEN", "MAX_LENGTH", "PAD_TOKEN", "UNK_TOKEN", "build_model", "build_tokenizer"]

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
UNK_TOKEN = "<unk>"
MAX_LENGTH = 512

_SPACE = "\u2581"


def build_tokenizer(words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """
    Builds the demo's tokenizer: whole words of the corpus, single digits, and bytes for every other text.

    The vocabulary follows from the templates of the corpus, so it is the same for every seed and size. A word carries
    the space before it, as in SentencePiece, so decoding gives the text back. Other text falls back to letters and
    bytes: nothing is unknown, only longer.

    Args:
        words (`Sequence[str]`, *optional*):
            Words and signs, each once. Defaults to those of the corpus.

    Returns:
        `transformers.PreTrainedTokenizerFast`: with `<pad>`, `<eos>` and `<unk>`; it adds no special token by itself.

    Example:

    ```python
    >>> from hf_curriculum.demo.model import build_tokenizer

    >>> tokenizer = build_tokenizer()
    >>> len(tokenizer(" 345").input_ids)
    3
    ```
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD_TOKEN, EOS_TOKEN, UNK_TOKEN]
    words = vocabulary() if words is None else words
    single = [_SPACE, "\n", *string.digits, *string.ascii_letters, *string.punctuation]
    single += [_SPACE + digit for digit in string.digits]
    whole = [_SPACE + word for word in words] + [word for word in words if word.istitle()]
    # A piece that covers more of the text must win over the letters and bytes that spell it.
    scores = dict.fromkeys(special, 0.0) | {f"<0x{byte:02X}>": -20.0 for byte in range(256)}
    scores |= dict.fromkeys(single, -10.0) | dict.fromkeys(whole, -1.0)
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=special.index(UNK_TOKEN), byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=True)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """
    Builds the demo's model: a Llama of four blocks with random weights, float32, tied embeddings.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerFast`):
            Tokenizer whose vocabulary and special tokens the model takes.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state is left as it was.

    Returns:
        `transformers.LlamaForCausalLM`: in training mode, on the CPU.

    Example:

    ```python
    >>> from hf_curriculum.demo.model import build_model, build_tokenizer

    >>> model = build_model(build_tokenizer())
    >>> model.config.num_hidden_layers
    4
    ```
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model
