"""
Attention statistics gathered while a model runs: its output stays bit-identical, and no attention map is kept.

The probe is a registered attention function, with a mask function of the same name (without one, transformers builds
no mask for it and padding leaks in). It calls the model's own function, then goes over the queries in blocks, turns
each block of the map into sums, and drops it.

Shapes: B rows, S positions, H heads, Q queries and K keys of a block, D head size, C categories, T texts, L layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.trainer_utils import unwrap_peft_model

from ..core.errors import invalid, unsupported
from .attention_blocks import PER_HEAD, LayerSums, block_sums
from .attention_layout import TokenLayout
from .attention_scores import BlockInputs, mask_block, scores_block


__all__ = ["AttentionCollector", "BatchStatistics", "attention_probe", "probed_model"]

PROBE_NAME = "hf_curriculum_probe_{own}"
# The implementations whose numbers can be recomputed from queries, keys and a dense mask.
OWN_IMPLEMENTATIONS = ("sdpa", "eager")
# Elements of one block of scores: 2^21 float32 values are 8 MB, a few of which exist at a time. Our choice, measured
# in benchmarks/attention.py: larger blocks leave the cache of a CPU and are no faster.
BLOCK_ELEMENTS = 2**21

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class BatchStatistics:
    """
    Statistics of the T texts of one batch, float64. A text without a query that has two keys to choose from is NaN.

    Args:
        per_head (`dict[str, torch.Tensor]` of shape `(T, L, H)`):
            Means over the queries of a text: `entropy` (of the whole row over the log of its keys), `entropy_rest`
            (the same with the sink taken out), `sink` (mass on the text's first token), `value_sink` (the same with
            each key weighted by the norm of its value), `head_distance` (mean Jensen-Shannon divergence from the
            other heads, in [0, 1]; absent if not asked for).
        mass (`torch.Tensor` of shape `(T, L, H, C)`):
            Mass on each category, sink taken out and the rest renormalised.
        value_mass (`torch.Tensor` of shape `(T, L, H, C)`):
            The same, each key weighted by the norm of its value.
        rollout (`torch.Tensor` of shape `(T, L, C)`):
            Attention rollout from a text's positions after each layer to the categories of its input tokens, sink
            taken out and the rest renormalised.
        received (`torch.Tensor` of shape `(L, H, B, S)`):
            Attention that each position gets, sink taken out and the rest renormalised: sum over the queries.
        distance (`torch.Tensor` of shape `(L, H, 2 S - 1)`):
            The same at each distance q - k from -(S - 1) to S - 1: sum over the queries of the batch.
        queries (`torch.Tensor` of shape `(T,)`, int64):
            Queries that the means are over.
        layers (`list[int]` of length L):
            Index of each layer in the model.
    """

    per_head: dict[str, torch.Tensor]
    mass: torch.Tensor
    value_mass: torch.Tensor
    rollout: torch.Tensor
    received: torch.Tensor
    distance: torch.Tensor
    queries: torch.Tensor
    layers: list[int]


class AttentionCollector:
    """
    Gathers statistics while a model runs inside [`attention_probe`].

    Args:
        own (`AttentionFunction`, *optional*):
            The model's own attention function; None for the eager function of each module's file.
        head_distance (`bool`):
            Whether to compare heads with one another, which costs a pass over the map per pair of heads.
        block_elements (`int`):
            Scores that exist at a time.
    """

    def __init__(self, own: AttentionFunction | None, head_distance: bool, block_elements: int) -> None:
        self._own = own
        self._head_distance = head_distance
        self._block_elements = block_elements
        self._layout: TokenLayout | None = None
        self._layers: list[int] = []
        self._sums: list[dict[str, torch.Tensor]] = []
        self._rollout = torch.empty(0)

    def begin(self, layout: TokenLayout) -> None:
        """
        Says what the positions of the next forward pass are.

        Args:
            layout ([`TokenLayout`]):
                Texts, sinks and categories of the batch.
        """
        self._layout, self._layers, self._sums = layout, [], []
        self._rollout = layout.indicators(with_sink=True)

    def finish(self) -> BatchStatistics:
        """
        Ends a forward pass.

        Returns:
            [`BatchStatistics`], on the CPU.

        Raises:
            `NotImplementedError`: if the model called no attention function.
        """
        if self._layout is None or not self._sums:
            raise unsupported(
                "Attention statistics of a model without attention weights",
                "no layer called an attention function (a state-space or recurrent model has none to measure)",
                "Use a model with softmax attention.",
            )
        sums = {name: torch.stack([layer[name] for layer in self._sums]).cpu() for name in self._sums[0]}
        count = sums["count"]  # [L, T, H]
        names = PER_HEAD if self._head_distance else PER_HEAD[:-1]
        statistics = BatchStatistics(
            per_head={name: (sums[name] / count).permute(1, 0, 2) for name in names},
            mass=(sums["mass"] / count[..., None]).permute(1, 0, 2, 3),
            value_mass=(sums["value_mass"] / count[..., None]).permute(1, 0, 2, 3),
            rollout=(sums["rollout"] / count[:, :, :1]).permute(1, 0, 2),
            received=sums["received"].transpose(1, 2),
            distance=sums["distance"],
            queries=count[0, :, 0].long(),
            layers=self._layers,
        )
        self._layout, self._layers, self._sums = None, [], []
        return statistics

    def call(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The registered attention function.

        Args:
            module (`nn.Module`):
                The attention layer.
            query (`torch.Tensor` of shape `(B, H, S, D)`):
                Queries.
            key (`torch.Tensor` of shape `(B, H or fewer, S, D)`):
                Keys.
            value (`torch.Tensor` of shape `(B, H or fewer, S, D)`):
                Values.
            attention_mask (`torch.Tensor`, *optional*):
                Dense mask `(B, 1 or H, S, S)`: True, or 0 and above the type's minimum, where a query sees a key.
            **kwargs:
                What the model passes on; `scaling`, `is_causal`, `softcap` and `position_bias` count.

        Returns:
            What the model's own function returns.
        """
        own = self._own if self._own is not None else _eager_function(module)
        result = own(module, query, key, value, attention_mask, **kwargs)
        if self._layout is not None:
            # Under autocast the scores would be multiplied in half precision.
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                self._observe(
                    self._layout, module, BlockInputs.build(module, query, key, value, attention_mask, kwargs)
                )
        return result

    def _observe(self, layout: TokenLayout, module: nn.Module, inputs: BlockInputs) -> None:
        batch, heads, length = inputs.query.shape[0], inputs.query.shape[1], inputs.query.shape[-2]
        if inputs.key.shape[-2] != length or layout.texts.shape != (batch, length):
            raise unsupported(
                f"Attention statistics with {length} queries and {inputs.key.shape[-2]} keys",
                f"the batch has {tuple(layout.texts.shape)} tokens, and every query must be one of the keys",
                "Probe without cache, prompt learning or cross-attention.",
            )
        index = getattr(module, "layer_idx", None)
        self._layers.append(index if isinstance(index, int) and index not in self._layers else len(self._layers))
        sums = LayerSums(layout, inputs, self._rollout)
        size = max(1, self._block_elements // (batch * heads * length))
        for start in range(0, length, size):
            block = slice(start, min(start + size, length))
            allowed = mask_block(inputs, block)
            if not self._sums:
                layout.check_mask(allowed, block)
            scores = scores_block(inputs, block, allowed)
            block_sums(layout, inputs, block, scores, allowed, sums, self._head_distance)
        self._rollout = sums.above
        self._sums.append(sums.close())


_ACTIVE: ContextVar[AttentionCollector] = ContextVar("hf_curriculum_attention_collector")


def _probe(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _ACTIVE.get().call(module, *args, **kwargs)


def _eager_function(module: nn.Module) -> AttentionFunction:
    """Eager attention is not registered: every model file has its own, under the same name."""
    function: AttentionFunction | None = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    if function is None:
        raise unsupported(
            f"Attention statistics of {type(module).__name__} with eager attention",
            "its file has no `eager_attention_forward` to call",
            "Load the model with `attn_implementation='sdpa'`.",
        )
    return function


def probed_model(model: nn.Module) -> PreTrainedModel:
    """
    Finds the transformers model to be probed and checks that it can be.

    Args:
        model (`nn.Module`):
            A transformers model, also with adapters or wrapped for training.

    Returns:
        [`~transformers.PreTrainedModel`], whose adapters stay active.

    Raises:
        `NotImplementedError`: for an encoder-decoder, prompt learning, or an attention implementation that does not
            go through queries, keys and a dense mask (flash, flex, or a kernel of the Hub).
        `ValueError`: if it is no transformers model.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise unsupported(
            f"Attention statistics with the PEFT method {model.active_peft_config.peft_type}",
            "its virtual tokens are keys that are no tokens of the text",
            "Probe the base model, or use an adapter of another kind.",
        )
    base = unwrap_peft_model(model)
    if not isinstance(base, PreTrainedModel):
        raise invalid("model", type(base).__name__, "a transformers model")
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise unsupported(
            f"Attention statistics of {name}, an encoder-decoder",
            "its cross-attention has other keys than queries",
            "Use an encoder or a decoder.",
        )
    own = base.config._attn_implementation
    if own not in OWN_IMPLEMENTATIONS:
        raise unsupported(
            f"Attention statistics of {name} with `attn_implementation='{own}'`",
            "this implementation gets no dense mask, from which the weights could be recomputed",
            "Load the model with `attn_implementation='sdpa'`, or call `model.set_attn_implementation('sdpa')` first.",
        )
    return base


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """Attention implementation of the model (key `""`) and of each part with a config of its own."""
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    found = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation, **found}


@contextmanager
def attention_probe(
    model: nn.Module, *, head_distance: bool = True, block_elements: int = BLOCK_ELEMENTS
) -> Iterator[AttentionCollector]:
    """
    Lets a model run with the probe on, and restores its own implementation afterwards, also after an error.

    Args:
        model (`nn.Module`):
            A transformers model that runs `sdpa` or `eager` attention, also with adapters or wrapped for training.
        head_distance (`bool`, *optional*, defaults to `True`):
            Whether to compare heads with one another.
        block_elements (`int`, *optional*, defaults to `2**21`):
            Scores that exist at a time.

    Yields:
        [`AttentionCollector`]: call `begin(layout)` before each forward pass without cache and `finish()` after it.

    Raises:
        `NotImplementedError`: for a model that cannot be probed, see [`probed_model`].
    """
    base = probed_model(model)
    own = base.config._attn_implementation
    name = PROBE_NAME.format(own=own)
    AttentionInterface.register(name, _probe)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[own])
    collector = AttentionCollector(
        None if own == "eager" else AttentionInterface()[own], head_distance, block_elements
    )
    previous = _implementations(base)
    token = _ACTIVE.set(collector)
    try:
        base.set_attn_implementation(dict.fromkeys(previous, name))
        if base.config._attn_implementation != name:
            raise unsupported(
                f"Attention statistics of {type(base).__name__}",
                "its attention is not called through transformers' `AttentionInterface`, so its weights are out of "
                "reach",
                "Use an architecture that supports `model.set_attn_implementation`.",
            )
        yield collector
    finally:
        base.set_attn_implementation(previous)
        _ACTIVE.reset(token)
