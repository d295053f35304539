"""
What a fine-tune did to attention: one model against another on the same texts, as functions and as a metric.

Attention is not explanation. The numbers say where attention mass lies, not why a model answers as it does; the causal
check of [`~hf_curriculum.analysis.attention_causal`] asks the second question, in part.

Shapes: T texts, L layers, H heads, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import evaluate
from datasets import Features, Value
from peft import PeftModel

from ..core.errors import invalid
from .attention_comparison import compare_attention
from .attention_measurement import measure_attention
from .attention_words import WordRules


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["AttentionFocus"]

_DESCRIPTION = """
Where attention lies: entropy, mass on content words, function words and the first-token sink, correlation with idf,
rollout; for one model, or as the change from a base model.
"""

_INPUTS = """
    predictions (`list[str]`): the probe texts.
    model: the (tuned) model. processing_class: its fast tokenizer.
    base (*optional*): the model before. adapter_off (`bool`, *optional*): compare with the adapters switched off.
"""

_CITATION = """
@inproceedings{abnar2020quantifying,
  title={Quantifying Attention Flow in Transformers},
  author={Abnar, Samira and Zuidema, Willem},
  booktitle={ACL},
  year={2020}
}
@inproceedings{kobayashi2020attention,
  title={Attention is Not Only a Weight: Analyzing Transformers with Vector Norms},
  author={Kobayashi, Goro and Kuribayashi, Tatsuki and Yokoi, Sho and Inui, Kentaro},
  booktitle={EMNLP},
  year={2020}
}
"""


class AttentionFocus(evaluate.Metric):
    """
    Where a model's attention lies, and how a fine-tune moved it.

    Takes no `references`: `predictions` are the probe texts. It runs the models itself, without their heads, and
    leaves them as they were. For more than a table of numbers use [`compare_attention`].

    Args:
        config_name (`str`, *optional*):
            As in [`~evaluate.EvaluationModule`].
        keep_in_memory (`bool`, *optional*, defaults to `True`):
            Whether texts stay in memory; then an error leaves neither a file nor a lock.
        **kwargs:
            Passed on to [`~evaluate.EvaluationModule`]; `cache_dir` is the only folder that is written to.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> from hf_curriculum import AttentionFocus
    >>> from hf_curriculum.demo.model import build_model, build_tokenizer

    >>> tokenizer = build_tokenizer()
    >>> metric = AttentionFocus(cache_dir=mkdtemp())
    >>> found = metric.compute(
    ...     predictions=["Ada has 4 apples.", "Ben has 7 books."],
    ...     model=build_model(tokenizer, seed=1),
    ...     base=build_model(tokenizer, seed=0),
    ...     processing_class=tokenizer,
    ... )
    >>> sorted(found["change"]["mass_content"])
    ['after', 'before', 'change', 'high', 'low']
    ```
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("string")}),
            reference_urls=["https://arxiv.org/abs/2005.00928", "https://arxiv.org/abs/2004.10102"],
        )

    def _compute(
        self,
        *,
        predictions: Sequence[str],
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase,
        base: nn.Module | None = None,
        adapter_off: bool = False,
        rules: WordRules | None = None,
        idf: Mapping[str, float] | None = None,
        max_length: int | None = None,
        resamples: int = 2000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """
        Measures, and compares if there is something to compare with; [`~evaluate.EvaluationModule.compute`] calls it.

        Args:
            predictions (`Sequence[str]`):
                The probe texts.
            model (`nn.Module`):
                The model.
            processing_class ([`~transformers.PreTrainedTokenizerBase`]):
                Its fast tokenizer.
            base (`nn.Module`, *optional*):
                The model before tuning.
            adapter_off (`bool`, *optional*, defaults to `False`):
                Whether to compare `model` with itself, its adapters switched off, in place of `base`.
            rules (`WordRules`, *optional*):
                What content and function words are.
            idf (`Mapping[str, float]`, *optional*):
                Rarity of words.
            max_length (`int`, *optional*):
                Tokens to read of each text.
            resamples (`int`, *optional*, defaults to `2000`):
                Bootstrap resamples.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the bootstrap.

        Returns:
            `dict`: the summary of `model`, measure by measure; with a comparison also `change`: for each measure
            `before`, `after`, `change`, `low` and `high`.
        """
        if adapter_off and (base is not None or not isinstance(model, PeftModel)):
            raise invalid(
                "adapter_off", f"True with model={type(model).__name__} and base={type(base).__name__}",
                "a `PeftModel` and no `base`",
            )  # fmt: skip
        options: dict[str, Any] = {
            "processing_class": processing_class,
            "rules": rules,
            "idf": idf,
            "max_length": max_length,
            "progress": False,
        }
        texts = list(predictions)
        after = measure_attention(model, texts, **options)
        found: dict[str, Any] = dict(after.summary())
        if base is None and not adapter_off:
            return found
        before = measure_attention(model if base is None else base, texts, adapter=not adapter_off, **options)
        changes = compare_attention(before, after, resamples=resamples, seed=seed).changes
        return found | {"change": {name: vars(item) for name, item in changes.items()}}
